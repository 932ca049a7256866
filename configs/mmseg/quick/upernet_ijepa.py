_base_ = "./upernet.py"

model = dict(backbone=dict(init_cfg=dict(checkpoint="work_dirs/quick/ijepa/iter_600.pth")))
