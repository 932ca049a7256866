# For a ViT-H/16, or a ViT-H/14 whose patches tools/convert_weights.py --to mmseg --patch-size 16 resampled.
_base_ = "./base.py"

model = dict(
    backbone=dict(
        arch="huge",
        out_indices=(7, 15, 23, 31),
        drop_path=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/dmt_jepa_vit_huge16.pth"),
    ),
    neck=dict(embed_dim=1280),
    decode_head=dict(in_channels=[1280] * 4, channels=1280),
    auxiliary_head=dict(in_channels=1280),
)
