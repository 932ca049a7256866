_base_ = "../_base_/paper.py"

model = dict(arch="large", predictor=dict(width=384, depth=12))
