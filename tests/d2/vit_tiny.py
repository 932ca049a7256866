"""The quick Mask R-CNN, shrunk until a step takes a tenth of a second, and a pre-training checkpoint for it."""

from __future__ import annotations

from pathlib import Path

import torch

from jepa_plugins.core.vit import Predictor, VisionTransformer

WIDTH, DEPTH, HEADS, PATCH, CROP = 48, 2, 3, 8, 80
YAML = {
    "MODEL.DEVICE": "cpu",
    "MODEL.VIT.IMG_SIZE": 64,
    "MODEL.VIT.EMBED_DIM": WIDTH,
    "MODEL.VIT.DEPTH": DEPTH,
    "MODEL.VIT.NUM_HEADS": HEADS,
    "MODEL.VIT.WINDOW_SIZE": 3,
    "MODEL.VIT.WINDOW_BLOCK_INDEXES": [0],
    "MODEL.VIT.SQUARE_PAD": 64,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,  # so that a hardly trained model predicts something
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 24,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "INPUT.IMAGE_SIZE": 64,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.STEPS": (3,),
    "SOLVER.WARMUP_ITERS": 1,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "SEED": 5,
}
LAZY = {
    "model.backbone.net.img_size": 64,
    "model.backbone.net.embed_dim": WIDTH,
    "model.backbone.net.depth": DEPTH,
    "model.backbone.net.num_heads": HEADS,
    "model.backbone.net.window_size": 3,
    "model.backbone.net.window_block_indexes": [0],
    "model.backbone.square_pad": 64,
    "model.backbone.out_channels": 16,
    "model.proposal_generator.pre_nms_topk": [50, 50],
    "model.proposal_generator.post_nms_topk": [20, 20],
    "model.proposal_generator.batch_size_per_image": 32,
    "model.roi_heads.batch_size_per_image": 16,
    "model.roi_heads.box_predictor.test_score_thresh": 0.0,
    "model.roi_heads.box_head.conv_dims": [16],
    "model.roi_heads.box_head.fc_dims": [24],
    "model.roi_heads.mask_head.conv_dims": [16, 16],
    "dataloader.train.mapper.image_size": 64,
    "dataloader.test.min_size": 64,
    "dataloader.test.max_size": 64,
    "dataloader.train.total_batch_size": 2,
    "train.max_iter": 4,
    "train.checkpointer.period": 2,
    "train.seed": 5,
    "lr_multiplier.warmup_length": 0.25,
}


def pretraining_checkpoint(path: Path, **sizes: int) -> Path:
    """Write what DMT-JEPA's pre-training saves: context and target encoder, predictor."""
    shape = {"width": WIDTH, "depth": DEPTH, "heads": HEADS} | sizes
    weights = {}
    for seed, part in enumerate(("encoder", "target_encoder")):
        torch.manual_seed(seed)
        vit = VisionTransformer(CROP, PATCH, **shape)
        weights |= {f"{part}.{name}": value for name, value in vit.state_dict().items()}
    predictor = Predictor(vit.grid, shape["width"], width=24, depth=1, heads=3)
    weights |= {f"predictor.{name}": value for name, value in predictor.state_dict().items()}
    torch.save({"state_dict": weights, "meta": {"epoch": 1}}, path)
    return path


def lazy_overrides(*groups: dict) -> list[str]:
    """KEY=VALUE for a command line; later groups win."""
    merged = {key: value for group in groups for key, value in group.items()}
    return [f"{key}={quoted(value)}" for key, value in merged.items()]


def quoted(value) -> str:
    """A value in the grammar of LazyConfig's overrides."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(quoted, value))}]"
    return f"'{value}'" if isinstance(value, (str, Path)) else str(value)
