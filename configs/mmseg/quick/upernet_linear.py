# Linear segmentation: the last map of the frozen encoder, a batch norm, a 1 x 1 convolution.
_base_ = "./upernet.py"

model = dict(
    backbone=dict(frozen=True, final_norm=True, drop_path=0.0, out_indices=(-1,)),
    neck=dict(_delete_=True, type="FeatureBatchNorm", channels=192),
    decode_head=dict(
        _delete_=True,
        type="FCNHead",
        in_channels=192,
        channels=192,
        in_index=0,
        num_convs=0,
        kernel_size=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=12,
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
