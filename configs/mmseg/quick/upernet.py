# UPerNet from a quick pre-training, on generated data, at a size that a CPU trains.
_base_ = "../upernet/base.py"

crop_size = (96, 96)
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        arch=dict(width=192, depth=6, heads=3),
        img_size=crop_size,
        patch_size=8,
        out_indices=(1, 2, 3, 5),
        drop_path=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/quick/dmt_jepa/iter_600.pth"),
    ),
    neck=dict(embed_dim=192, rescales=[2, 1, 0.5, 0.25], norm_cfg=norm_cfg),  # strides 4 to 32
    decode_head=dict(in_channels=[192] * 4, channels=64, num_classes=12, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=192, channels=64, num_classes=12, norm_cfg=norm_cfg),
    test_cfg=dict(_delete_=True, mode="whole"),
)

data_root = "datasets/synthetic"
metainfo = dict(
    classes=(
        *("disc", "box", "triangle", "star", "ring", "cross", "crescent", "heart"),
        *("stripes", "bricks", "sand", "waves"),
    ),
    palette=[[(37 * i) % 256, (91 * i) % 256, (151 * i) % 256] for i in range(1, 13)],
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=False),
    dict(type="RandomResize", scale=(128, 128), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=False),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type="BaseSegDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        metainfo=metainfo,
        reduce_zero_label=False,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type="BaseSegDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        metainfo=metainfo,
        reduce_zero_label=False,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=30),
    dict(type="PolyLR", eta_min=0.0, power=0.9, by_epoch=False, begin=30, end=300),
]
train_cfg = dict(max_iters=300, val_interval=300)
randomness = dict(seed=0)
env_cfg = dict(cudnn_benchmark=False)
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(interval=300, max_keep_ckpts=1), recipe=dict(batch=8)
)
log_processor = dict(by_epoch=False, window_size=10)
