_base_ = "./linear_base.py"

model = dict(
    backbone=dict(
        arch="large",
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/dmt_jepa_vit_large16_416.pth"),
    ),
    neck=dict(channels=1024),
    decode_head=dict(in_channels=1024, channels=1024),
)
