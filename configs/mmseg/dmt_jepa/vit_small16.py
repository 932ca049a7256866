_base_ = "../_base_/paper.py"

model = dict(arch="small", predictor=dict(width=384, depth=6))
