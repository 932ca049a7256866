_base_ = "./linear_base.py"

model = dict(
    backbone=dict(
        arch="base",
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/dmt_jepa_vit_base16.pth"),
    ),
    neck=dict(channels=768),
    decode_head=dict(in_channels=768, channels=768),
)
