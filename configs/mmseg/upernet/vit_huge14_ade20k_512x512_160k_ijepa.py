_base_ = "./vit_huge14_ade20k_512x512_160k.py"

model = dict(backbone=dict(init_cfg=dict(checkpoint="checkpoints/ijepa_vit_huge14.pth")))
