_base_ = "./upernet_camvid.py"

model = dict(backbone=dict(init_cfg=None))
