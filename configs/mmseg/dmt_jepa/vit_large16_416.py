# 416 pixels: a grid of 26 x 26 patches. 32 images x 64 processes.
_base_ = "./vit_large16.py"

model = dict(img_size=416, checkpointing=True)
train_dataloader = dict(
    batch_size=32,
    dataset=dict(
        pipeline=[
            dict(type="KeyedResizedCrop", size=416, scale=(0.2, 1.0), flip=0.5),
            dict(type="KeyedColorJitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, prob=0.8),
            dict(type="KeyedGrayscale", prob=0.2),
        ]
    ),
)
