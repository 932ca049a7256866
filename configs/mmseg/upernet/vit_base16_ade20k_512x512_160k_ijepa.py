_base_ = "./vit_base16_ade20k_512x512_160k.py"

model = dict(backbone=dict(init_cfg=dict(checkpoint="checkpoints/ijepa_vit_base16.pth")))
