_base_ = "../../_base_/released.py"

model = dict(arch="small", predictor=dict(width=384, depth=6))
