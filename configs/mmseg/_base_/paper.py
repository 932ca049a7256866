# DMT-JEPA on ImageNet-1K as the paper describes it (section 4.1, appendix A.1).
_base_ = "./pretrain.py"

model = dict(
    type="DMTJEPA",
    img_size=224,
    patch_size=16,
    msn=dict(window=3, k=4, include_self=False, border="shift"),
    lat=dict(type="learned", depth=2, target_attn="cross", context_attn="cross", context="broadcast"),
    loss="mse",
    mask=dict(
        scope="process",
        grid="ijepa",
        target_scale=(0.15, 0.2),
        target_aspect=(0.75, 1.5),
        context_scale=(0.85, 1.0),
        targets=4,
        min_keep=10,
    ),
    ema=(0.996, 1.0),
    data_preprocessor=dict(
        type="ImagePreprocessor", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
    ),
)
train_dataloader = dict(
    batch_size=256,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="EpochSampler"),
    batch_sampler=dict(type="RunBatchSampler", drop_last=False),
    collate_fn=dict(type="collate_images"),
    dataset=dict(
        type="UnlabelledImages",
        source="imagenet/train",  # also looked for below DETECTRON2_DATASETS (default: datasets)
        pipeline=[
            dict(type="KeyedResizedCrop", size=224, scale=(0.2, 1.0), flip=0.5),
            dict(type="KeyedColorJitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, prob=0.8),
            dict(type="KeyedGrayscale", prob=0.2),
        ],
    ),
)
# 626 steps an epoch: the last, smaller batch counts.
train_cfg = dict(
    type="PretrainLoop",
    epochs=600,
    recipe=dict(batch=2048, images=1281167, steps_per_epoch=626, steps=375600),
)
optim_wrapper = dict(
    type="PretrainOptimWrapper",
    constructor="PretrainOptimWrapperConstructor",
    dtype="bfloat16",
    accumulative_counts=1,
    clip_grad=None,
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.04),
)
param_scheduler = [
    dict(type="WarmupCosineLR", start=1e-4, final=1e-6, warmup_epochs=15, ref_batch=2048),
    dict(type="RisingWeightDecay", final=0.4, shape="linear"),
]
