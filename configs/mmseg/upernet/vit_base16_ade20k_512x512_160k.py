_base_ = "./base.py"

model = dict(
    backbone=dict(
        arch="base",
        out_indices=(3, 5, 7, 11),
        drop_path=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/dmt_jepa_vit_base16.pth"),
    ),
    neck=dict(embed_dim=768),
    decode_head=dict(in_channels=[768] * 4, channels=768),
    auxiliary_head=dict(in_channels=768),
)
