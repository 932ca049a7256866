"""Unlabelled and labelled data for detectron2: config keys, sources, mappers and loaders."""

from detectron2.config import CfgNode


def add_data_config(cfg: CfgNode) -> None:
    """Add the keys of this package, and Mask2Former's published ``INPUT`` keys, to a detectron2 config."""
    # Unlabelled images: folders, list files (.txt, one path a line), COCO json files, zip files or tar shards
    # ("shards/train-{000000..000146}.tar", "shards/*.tar" or their folder); needs no class names.
    cfg.DATASETS.UNLABELLED = ()
    # Folder that the paths in list and json files are relative to; empty: found from the file's own place.
    cfg.DATASETS.UNLABELLED_ROOT = ""
    # Share of unreadable files above which pre-training stops.
    cfg.DATASETS.UNLABELLED_MAX_BAD = 0.01
    # Random resized crop: output (height, width), share of the image's area, width / height of the box.
    cfg.INPUT.PRETRAIN_CROP_SIZE = (512, 512)
    cfg.INPUT.PRETRAIN_CROP_SCALE = (0.3, 1.0)
    cfg.INPUT.PRETRAIN_CROP_RATIO = (0.75, 1.3333333333)
    # Probability of mirroring left to right.
    cfg.INPUT.PRETRAIN_FLIP = 0.5

    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    cfg.INPUT.COLOR_AUG_SSD = False
    # Training images are padded right and below to a multiple of this; -1 pads nothing.
    cfg.INPUT.SIZE_DIVISIBILITY = -1
    # Largest share of a crop that one category may fill; 1.0 allows every crop.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Large-scale jitter: side of the square crop and range of the scale.
    cfg.INPUT.IMAGE_SIZE = 1024
    cfg.INPUT.MIN_SCALE = 0.1
    cfg.INPUT.MAX_SCALE = 2.0
