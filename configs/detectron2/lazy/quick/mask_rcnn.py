"""Twin of detectron2/quick/mask_rcnn.yaml."""

from ..mask_rcnn_vitb_100ep import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401
from .common import shrink_training

model.backbone.update(out_channels=64, scale_factors=[2.0, 1.0, 0.5, 0.25], square_pad=128)
model.backbone.net.update(
    img_size=128,
    patch_size=8,
    embed_dim=192,
    depth=6,
    num_heads=3,
    drop_path_rate=0.0,
    window_size=8,
    window_block_indexes=[0, 1, 3, 4],
    pretrain_img_size=(80, 80),
)
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
model.proposal_generator.update(batch_size_per_image=128, pre_nms_topk=(500, 200), post_nms_topk=(200, 200))
model.roi_heads.update(num_classes=8, batch_size_per_image=64)
model.roi_heads.box_head.update(conv_dims=[64, 64], fc_dims=[128])
model.roi_heads.mask_head.conv_dims = [64, 64, 64]
shrink_training(train, optimizer, dataloader)
lr_multiplier.scheduler.update(values=[1.0, 0.1], milestones=[300], num_updates=400)
lr_multiplier.warmup_length = 20 / 400
dataloader.train.datasets = ["coco_instance@datasets/synthetic@train2017"]
dataloader.train.mapper.update(image_size=128, min_scale=0.8, max_scale=1.5)
dataloader.test.update(dataset="coco_instance@datasets/synthetic@val2017", max_size=128)
