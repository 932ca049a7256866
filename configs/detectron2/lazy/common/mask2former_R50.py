"""Mask2Former R50: `backbone`, `sem_seg_head` and the whole `model`, for panoptic segmentation of COCO."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet

from jepa_plugins.d2 import lazy
from jepa_plugins.d2.mask2former.criterion import SetCriterion
from jepa_plugins.d2.mask2former.head import MaskFormerHead
from jepa_plugins.d2.mask2former.matcher import HungarianMatcher
from jepa_plugins.d2.mask2former.meta_arch import MaskFormer, loss_weights
from jepa_plugins.d2.mask2former.pixel_decoder import MSDeformAttnPixelDecoder
from jepa_plugins.d2.mask2former.transformer_decoder import MultiScaleMaskedTransformerDecoder

backbone = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
    stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
    out_features=["res2", "res3", "res4", "res5"],
    freeze_at=0,
)
sem_seg_head = L(MaskFormerHead)(
    input_shape=L(lazy.pyramid)(res2=256, res3=512, res4=1024, res5=2048),
    num_classes=133,
    pixel_decoder=L(MSDeformAttnPixelDecoder)(
        input_shape="${..input_shape}",
        transformer_dropout=0.0,
        transformer_nheads=8,
        transformer_dim_feedforward=1024,
        transformer_enc_layers=6,
        conv_dim=256,
        mask_dim=256,
        norm="GN",
        transformer_in_features=["res3", "res4", "res5"],
        common_stride=4,
    ),
    loss_weight=1.0,
    ignore_value=255,
    transformer_predictor=L(MultiScaleMaskedTransformerDecoder)(
        in_channels="${..pixel_decoder.conv_dim}",
        num_classes="${..num_classes}",
        hidden_dim=256,
        num_queries=100,
        nheads=8,
        dim_feedforward=2048,
        dec_layers=9,
        pre_norm=False,
        mask_dim="${..pixel_decoder.mask_dim}",
        enforce_input_project=False,
    ),
    transformer_in_feature="multi_scale_pixel_decoder",
)
model = L(MaskFormer)(
    backbone=backbone,
    sem_seg_head=sem_seg_head,
    criterion=L(SetCriterion)(
        num_classes="${..sem_seg_head.num_classes}",
        matcher=L(HungarianMatcher)(
            cost_class=2.0, cost_mask=5.0, cost_dice=5.0, num_points="${..num_points}"
        ),
        weight_dict=L(loss_weights)(
            class_weight=2.0,
            mask_weight=5.0,
            dice_weight=5.0,
            auxiliary_layers="${...sem_seg_head.transformer_predictor.dec_layers}",
        ),
        eos_coef=0.1,
        losses=["labels", "masks"],
        num_points=12544,
        oversample_ratio=3.0,
        importance_sample_ratio=0.75,
    ),
    num_queries="${.sem_seg_head.transformer_predictor.num_queries}",
    object_mask_threshold=0.8,
    overlap_threshold=0.8,
    metadata=L(lazy.metadata)(dataset="coco_2017_train_panoptic", classes="${..sem_seg_head.num_classes}"),
    size_divisibility=32,
    sem_seg_postprocess_before_inference=True,
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    semantic_on=True,
    panoptic_on=True,
    instance_on=True,
    test_topk_per_image=100,
)
