_base_ = "./upernet.py"

model = dict(backbone=dict(init_cfg=dict(checkpoint="work_dirs/ijepa/iter_600.pth")))
