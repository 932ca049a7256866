# I-JEPA: neighbours and heads off, its published loss.
_base_ = "./base.py"

model = dict(msn=None, lat=None, loss="smooth_l1")
