"""Twin of detectron2/mask_rcnn/vith_75ep.yaml: ViT-H, with ViTDet-H's drop path, layer decay and 75 epochs.

Patches of 14 pixels are resampled to 16 while loading; 256 pixels keep the grid of 16 x 16 that a pre-training with
patch 14 at 224 has.
"""

from .mask_rcnn_vitb_100ep import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.net.update(
    embed_dim=1280,
    depth=32,
    num_heads=16,
    drop_path_rate=0.5,
    window_block_indexes=[i for i in range(32) if i % 8 != 7],
    pretrain_img_size=(256, 256),
)
optimizer.params.layer_decay = 0.9
train.max_iter = 138281
lr_multiplier.scheduler.update(milestones=[122916, 133159], num_updates=138281)
lr_multiplier.warmup_length = 250 / 138281
