# The paper's recipe at a size that a CPU trains: ViT of 192 x 6, patch 8, crops of 80 pixels.
_base_ = "../_base_/paper.py"

model = dict(
    arch=dict(width=192, depth=6, heads=3),
    img_size=80,
    patch_size=8,
    predictor=dict(width=96, depth=3, heads=3),
    mask=dict(scope="global"),
)
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    dataset=dict(
        source="datasets/synthetic/unlabelled",
        pipeline=[
            dict(type="KeyedResizedCrop", size=80, scale=(0.2, 1.0), flip=0.5),
            dict(type="KeyedColorJitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, prob=0.8),
            dict(type="KeyedGrayscale", prob=0.2),
        ],
    ),
)
train_cfg = dict(epochs=None, steps=600, recipe=dict(_delete_=True, batch=32))
# The learning rate is meant for this batch; a warm-up of a tenth of the run.
optim_wrapper = dict(dtype="float32", optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type="WarmupCosineLR", start=5e-5, final=1e-6, warmup_steps=60),
    dict(type="RisingWeightDecay", final=0.4, shape="linear"),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=100, max_keep_ckpts=2),
    # images that do not train; those of your own data, or None
    held_out=dict(
        type="HeldOutHook",
        source="datasets/synthetic/val2017",
        pipeline=[dict(type="KeyedResizedCrop", size=80, scale=(0.2, 1.0), flip=0.5)],
        interval=100,
        images=100,
    ),
)
log_processor = dict(window_size=10)
