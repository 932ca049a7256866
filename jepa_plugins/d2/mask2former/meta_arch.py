"""The MaskFormer meta-architecture: backbone, segmentation head, losses in training, three kinds of results
else."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from jepa_plugins.d2.backbones import build_backbone
from jepa_plugins.d2.inputs import normalised_batch
from jepa_plugins.d2.registration import build_head, register_published

from .criterion import SetCriterion
from .inference import image_results
from .matcher import HungarianMatcher


def loss_weights(
    class_weight: float, mask_weight: float, dice_weight: float, auxiliary_layers: int
) -> dict[str, float]:
    """Weights of the criterion's losses by name, the same for the last layer and for each auxiliary one."""
    weights = {"loss_ce": class_weight, "loss_mask": mask_weight, "loss_dice": dice_weight}
    earlier = {f"{name}_{i}": w for i in range(auxiliary_layers) for name, w in weights.items()}
    return {**weights, **earlier}


def build_criterion(cfg, num_classes: int) -> SetCriterion:
    """The set criterion with the weights of `MODEL.MASK_FORMER`, for the last layer and, if asked, all
    before it."""
    node = cfg.MODEL.MASK_FORMER
    matcher = HungarianMatcher(
        cost_class=node.CLASS_WEIGHT,
        cost_mask=node.MASK_WEIGHT,
        cost_dice=node.DICE_WEIGHT,
        num_points=node.TRAIN_NUM_POINTS,
    )
    layers = node.DEC_LAYERS - 1 if node.DEEP_SUPERVISION else 0
    weights = loss_weights(node.CLASS_WEIGHT, node.MASK_WEIGHT, node.DICE_WEIGHT, layers)
    return SetCriterion(
        num_classes,
        matcher=matcher,
        weight_dict=weights,
        eos_coef=node.NO_OBJECT_WEIGHT,
        losses=["labels", "masks"],
        num_points=node.TRAIN_NUM_POINTS,
        oversample_ratio=node.OVERSAMPLE_RATIO,
        importance_sample_ratio=node.IMPORTANCE_SAMPLE_RATIO,
    )


@register_published(META_ARCH_REGISTRY)
class MaskFormer(nn.Module):
    """Mask2Former as one detectron2 model.

    Args:
        metadata: of the data set; its `thing_dataset_id_to_contiguous_id` says which classes are things.
        size_divisibility: of the padded input; 0 or less takes the backbone's.
        semantic_on, panoptic_on, instance_on: which results to give.
        test_topk_per_image: instances an image.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        sem_seg_head: nn.Module,
        criterion: nn.Module,
        num_queries: int,
        object_mask_threshold: float,
        overlap_threshold: float,
        metadata,
        size_divisibility: int,
        sem_seg_postprocess_before_inference: bool,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        semantic_on: bool,
        panoptic_on: bool,
        instance_on: bool,
        test_topk_per_image: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.num_queries = num_queries
        self.object_mask_threshold = object_mask_threshold
        self.overlap_threshold = overlap_threshold
        self.metadata = metadata
        self.size_divisibility = size_divisibility if size_divisibility > 0 else backbone.size_divisibility
        self.sem_seg_postprocess_before_inference = sem_seg_postprocess_before_inference
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.semantic_on = semantic_on
        self.panoptic_on = panoptic_on
        self.instance_on = instance_on
        self.test_topk_per_image = test_topk_per_image

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Arguments from detectron2's configuration."""
        backbone = build_backbone(cfg)
        sem_seg_head = build_head(cfg, backbone.output_shape())
        node = cfg.MODEL.MASK_FORMER
        return {
            "backbone": backbone,
            "sem_seg_head": sem_seg_head,
            "criterion": build_criterion(cfg, sem_seg_head.num_classes),
            "num_queries": node.NUM_OBJECT_QUERIES,
            "object_mask_threshold": node.TEST.OBJECT_MASK_THRESHOLD,
            "overlap_threshold": node.TEST.OVERLAP_THRESHOLD,
            "metadata": MetadataCatalog.get(cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else "__unused"),
            "size_divisibility": node.SIZE_DIVISIBILITY,
            "sem_seg_postprocess_before_inference": (
                node.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE
                or node.TEST.PANOPTIC_ON
                or node.TEST.INSTANCE_ON
            ),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "semantic_on": node.TEST.SEMANTIC_ON,
            "instance_on": node.TEST.INSTANCE_ON,
            "panoptic_on": node.TEST.PANOPTIC_ON,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: dicts with "image" uint8 [c, H, W]; in training "instances" with gt_classes [N]
                and gt_masks bool [N, H, W]; else optionally "height" and "width" of the wanted results.

        Returns:
            In training the weighted losses; else one dict an image with "sem_seg", "panoptic_seg" and
            "instances", as switched on.
        """
        images = normalised_batch(batched_inputs, self.pixel_mean, self.pixel_std, self.size_divisibility)
        outputs = self.sem_seg_head(self.backbone(images.tensor))
        if self.training:
            targets = (
                [x["instances"].to(self.device) for x in batched_inputs]
                if "instances" in batched_inputs[0]
                else []
            )
            losses = self.criterion(outputs, self.prepare_targets(targets, images))
            weights = self.criterion.weight_dict
            return {name: loss * weights[name] for name, loss in losses.items() if name in weights}
        padded = (int(images.tensor.shape[-2]), int(images.tensor.shape[-1]))
        return [
            image_results(
                mask_cls,
                masks,
                padded,
                size,
                (item.get("height", size[0]), item.get("width", size[1])),
                num_classes=self.sem_seg_head.num_classes,
                thing_ids=self._thing_ids(),
                semantic_on=self.semantic_on,
                panoptic_on=self.panoptic_on,
                instance_on=self.instance_on,
                object_mask_threshold=self.object_mask_threshold,
                overlap_threshold=self.overlap_threshold,
                topk=self.test_topk_per_image,
                resize_before_semantic=self.sem_seg_postprocess_before_inference,
            )
            for mask_cls, masks, size, item in zip(
                outputs["pred_logits"], outputs["pred_masks"], images.image_sizes, batched_inputs, strict=True
            )
        ]

    def _thing_ids(self) -> list[int]:
        return list(getattr(self.metadata, "thing_dataset_id_to_contiguous_id", {}).values())

    def prepare_targets(self, targets: list, images) -> list[dict[str, Tensor]]:
        """Instances of each image -> labels [N] and masks bool [N, H, W] padded to the batch's size."""
        height, width = images.tensor.shape[-2:]
        prepared = []
        for instances in targets:
            masks = getattr(instances.gt_masks, "tensor", instances.gt_masks).bool()
            padded = masks.new_zeros((len(masks), height, width))
            padded[:, : masks.shape[1], : masks.shape[2]] = masks
            prepared.append({"labels": instances.gt_classes, "masks": padded})
        return prepared
