_base_ = "./vit_large16_ade20k_512x512_160k.py"

model = dict(backbone=dict(init_cfg=dict(checkpoint="checkpoints/ijepa_vit_large16.pth")))
