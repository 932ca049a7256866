"""Twin of detectron2/quick/semantic.yaml."""

from ..mask2former_R50_ade20k_semantic import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401
from .common import CROP, MIN_SIZES, shrink_model, shrink_training

shrink_model(model)
shrink_training(train, optimizer, dataloader)
model.metadata.dataset = "folder_semantic@datasets/synthetic@training"
dataloader.train.datasets = ["folder_semantic@datasets/synthetic@training"]
dataloader.train.mapper.update(min_size=MIN_SIZES, max_size=512, crop_size=CROP, size_divisibility=128)
dataloader.test.dataset = "folder_semantic@datasets/synthetic@validation"
