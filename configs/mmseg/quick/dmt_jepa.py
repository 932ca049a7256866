_base_ = "./base.py"
