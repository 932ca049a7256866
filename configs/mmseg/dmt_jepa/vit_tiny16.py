_base_ = "../_base_/paper.py"

model = dict(arch="tiny", predictor=dict(width=192, depth=6))
