"""Mask2Former R50 on COCO, instances: twin of detectron2/mask2former/coco/instance_R50.yaml."""

from .mask2former_R50_coco_panoptic import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.sem_seg_head.num_classes = 80
model.metadata.dataset = "coco_2017_train"
model.semantic_on = model.panoptic_on = False
dataloader.train.datasets = ["coco_2017_train"]
dataloader.train.mapper.kind = "instance"
dataloader.test.dataset = "coco_2017_val"
