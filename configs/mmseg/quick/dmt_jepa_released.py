# The release's choices at the quick size.
_base_ = "./base.py"

model = dict(msn=dict(border="wrap"), loss="smooth_l1")
train_dataloader = dict(
    batch_sampler=dict(drop_last=True),
    dataset=dict(pipeline=[dict(type="KeyedResizedCrop", size=80, scale=(0.3, 1.0), flip=0.0)]),
)
param_scheduler = [
    dict(type="WarmupCosineLR", start=1e-4, final=1e-6, warmup_steps=60),
    dict(type="RisingWeightDecay", final=0.4, shape="cosine"),
]
