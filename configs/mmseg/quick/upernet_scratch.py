# The same without pre-training.
_base_ = "./upernet.py"

model = dict(backbone=dict(init_cfg=None))
