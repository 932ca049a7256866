"""Mask R-CNN ViT-B on COCO, 100 epochs at batch 64: twin of detectron2/mask_rcnn/vitb_100ep.yaml.

The ViT starts from a pre-training checkpoint, whose target encoder is taken:
train.init_checkpoint=work_dirs/dmt_jepa/vit_base16/iter_375600.pth.
The paper tests at a short side of 800: dataloader.test.min_size=800 dataloader.test.max_size=1333
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from jepa_plugins.d2 import lazy
from jepa_plugins.d2.mask_rcnn import JEPABoxHead, JEPAMaskHead, JEPAMaskRCNN
from jepa_plugins.d2.vit import JEPASimpleFeaturePyramid, JEPAViT

from .common.train import train  # noqa: F401

backbone = L(JEPASimpleFeaturePyramid)(
    net=L(JEPAViT)(
        img_size=1024,
        patch_size=16,
        in_chans=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=True,
        drop_path_rate=0.1,
        use_rel_pos=True,
        window_size=14,
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],  # 2, 5, 8 and 11 attend across the whole map
        use_act_checkpoint=False,
        pretrain_img_size=(224, 224),
        pretrain_use_cls_token=False,
        out_feature="last_feat",
    ),
    in_feature="${.net.out_feature}",
    out_channels=256,
    scale_factors=[4.0, 2.0, 1.0, 0.5],
    top_block=L(LastLevelMaxPool)(),
    norm="LN",
    square_pad=1024,
)
proposal_generator = L(RPN)(
    in_features=["p2", "p3", "p4", "p5", "p6"],
    head=L(StandardRPNHead)(in_channels="${...backbone.out_channels}", num_anchors=3, conv_dims=[-1, -1]),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[32], [64], [128], [256], [512]],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[4, 8, 16, 32, 64],
        offset=0.0,
    ),
    anchor_matcher=L(Matcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    batch_size_per_image=256,
    positive_fraction=0.5,
    pre_nms_topk=(2000, 1000),
    post_nms_topk=(1000, 1000),
    nms_thresh=0.7,
)
roi_heads = L(StandardROIHeads)(
    num_classes=80,
    batch_size_per_image=512,
    positive_fraction=0.25,
    proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
    box_in_features=["p2", "p3", "p4", "p5"],
    box_pooler=L(ROIPooler)(
        output_size=7,
        scales=(1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32),
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    ),
    box_head=L(JEPABoxHead)(
        input_shape=L(ShapeSpec)(channels="${....backbone.out_channels}", height=7, width=7),
        conv_dims=[256, 256, 256, 256],
        fc_dims=[1024],
        conv_norm="LN",
    ),
    box_predictor=L(FastRCNNOutputLayers)(
        input_shape=L(ShapeSpec)(channels="${...box_head.fc_dims[0]}"),
        test_score_thresh=0.05,
        box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
        num_classes="${..num_classes}",
    ),
    mask_in_features=["p2", "p3", "p4", "p5"],
    mask_pooler=L(ROIPooler)(
        output_size=14,
        scales=(1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32),
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    ),
    mask_head=L(JEPAMaskHead)(
        input_shape=L(ShapeSpec)(channels="${....backbone.out_channels}", height=14, width=14),
        num_classes="${..num_classes}",
        conv_dims=[256, 256, 256, 256, 256],
        conv_norm="LN",
    ),
)
model = L(JEPAMaskRCNN)(
    backbone=backbone,
    proposal_generator=proposal_generator,
    roi_heads=roi_heads,
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    input_format="RGB",
)

dataloader = dict(
    train=L(lazy.labelled_loader)(
        datasets=["coco_2017_train"],
        mapper=L(lazy.jitter_mapper)(
            kind="detection",
            num_classes="${model.roi_heads.num_classes}",
            image_size=1024,
            min_scale=0.1,
            max_scale=2.0,
        ),
        total_batch_size=64,
        num_workers=4,
        seed="${train.seed}",
    ),
    test=L(lazy.test_loader)(dataset="coco_2017_val", min_size=1024, max_size=1024, num_workers=4),
    evaluator=L(lazy.evaluator)(dataset="${..test.dataset}", output_dir="${train.output_dir}"),
)
optimizer = L(lazy.adamw)(
    params=dict(weight_decay_norm=0.0, layer_decay=0.7), lr=0.0001, weight_decay=0.1, accumulation=1
)
# In shares of the run: another train.max_iter stretches it.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[163889, 177546], num_updates=184375
    ),
    warmup_factor=0.001,
    warmup_length=250 / 184375,
)
train.recipe_batch = 64
train.max_iter = 184375  # 100 epochs
