# DMT-JEPA and I-JEPA on ImageNet-1K as released: what differs from the paper's text.
_base_ = "./paper.py"

model = dict(msn=dict(border="wrap"), loss="smooth_l1")
train_dataloader = dict(
    batch_sampler=dict(drop_last=True),
    dataset=dict(pipeline=[dict(type="KeyedResizedCrop", size=224, scale=(0.3, 1.0), flip=0.0)]),
)
train_cfg = dict(recipe=dict(steps_per_epoch=625, steps=375000))
param_scheduler = [
    dict(type="WarmupCosineLR", start=2e-4, final=1e-6, warmup_epochs=40, ref_batch=2048),
    dict(type="RisingWeightDecay", final=0.4, shape="cosine"),
]
