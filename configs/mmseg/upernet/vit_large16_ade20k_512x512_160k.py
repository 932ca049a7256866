_base_ = "./base.py"

model = dict(
    backbone=dict(
        arch="large",
        out_indices=(7, 11, 15, 23),
        drop_path=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/dmt_jepa_vit_large16.pth"),
    ),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024] * 4, channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
