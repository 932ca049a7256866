# Crops of 512 pixels are padded to 37 x 37 patches of 14.
_base_ = "./base.py"

model = dict(
    backbone=dict(
        arch="huge",
        img_size=518,
        patch_size=14,
        out_indices=(7, 15, 23, 31),
        drop_path=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/dmt_jepa_vit_huge14.pth"),
    ),
    neck=dict(embed_dim=1280),
    decode_head=dict(in_channels=[1280] * 4, channels=1280),
    auxiliary_head=dict(in_channels=1280),
)
