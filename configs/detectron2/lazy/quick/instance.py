"""Twin of detectron2/quick/instance.yaml."""

from .panoptic import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.sem_seg_head.num_classes = 8
model.object_mask_threshold = 0.8
model.semantic_on = model.panoptic_on = False
model.metadata.dataset = "coco_instance@datasets/synthetic@train2017"
dataloader.train.datasets = ["coco_instance@datasets/synthetic@train2017"]
dataloader.train.mapper.kind = "instance"
dataloader.test.dataset = "coco_instance@datasets/synthetic@val2017"
