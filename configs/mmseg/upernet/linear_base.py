# Linear segmentation on ADE20K: the last map of the frozen encoder, a batch norm, a 1 x 1 convolution. The paper
# gives no recipe; this is DINOv2's for its linear head: 40,000 iterations.
_base_ = "./base.py"

model = dict(
    backbone=dict(frozen=True, final_norm=True, out_indices=(-1,)),
    neck=dict(_delete_=True, type="FeatureBatchNorm"),
    decode_head=dict(
        _delete_=True,
        type="FCNHead",
        in_index=0,
        num_convs=0,
        kernel_size=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=150,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=40000),
]
train_cfg = dict(max_iters=40000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
