"""Twin of detectron2/quick/panoptic.yaml."""

from ..common.train import lr_multiplier  # noqa: F401
from ..mask2former_R50_coco_panoptic import dataloader, model, optimizer, train  # noqa: F401
from .common import shrink_model, shrink_training

shrink_model(model)
shrink_training(train, optimizer, dataloader)
model.object_mask_threshold = 0.4  # after a few hundred steps hardly an object is 80 % sure
model.metadata.dataset = "coco_panoptic@datasets/synthetic@train2017"
dataloader.train.datasets = ["coco_panoptic@datasets/synthetic@train2017"]
dataloader.train.mapper.update(image_size=128, min_scale=0.8, max_scale=1.5)
dataloader.test.dataset = "coco_panoptic@datasets/synthetic@val2017"
