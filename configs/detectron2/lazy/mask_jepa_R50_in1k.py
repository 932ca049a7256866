"""Mask-JEPA, R50, ImageNet-1K: twin of detectron2/mask_jepa/R50_in1k.yaml.

Give the images by dataloader.train.sources=[imagenet/train].
"""

from detectron2.config import LazyCall as L

from jepa_plugins.core.mask_jepa import MaskJEPAHead
from jepa_plugins.core.settings import MaskJEPASettings
from jepa_plugins.d2 import lazy
from jepa_plugins.d2.mask_jepa import MaskJEPA, noise_scale

from .common.mask2former_R50 import backbone as _backbone
from .common.mask2former_R50 import sem_seg_head as _sem_seg_head
from .common.train import lr_multiplier, optimizer, train  # noqa: F401

model = L(MaskJEPA)(
    backbone=_backbone,
    sem_seg_head=_sem_seg_head,
    head=L(MaskJEPAHead)(
        settings=L(MaskJEPASettings)(
            noise_sigma=0.4,
            mask_ratio=0.5,
            mask_patch=8,
            recon_stride=8,
            self_attention_blocks=2,
            readout="spatial_queries",
            denoise_target="noise",
            recon_weight=1.0,
            denoise_weight=1.0,
        ),
        feature_dim="${..sem_seg_head.pixel_decoder.conv_dim}",
        mask_dim="${..sem_seg_head.pixel_decoder.mask_dim}",
        hidden_dim="${..sem_seg_head.transformer_predictor.hidden_dim}",
        heads="${..sem_seg_head.transformer_predictor.nheads}",
        feedforward="${..sem_seg_head.transformer_predictor.dim_feedforward}",
        image_channels=3,
    ),
    freeze_backbone=True,
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    noise_factors=L(noise_scale)(pixel_std="${..pixel_std}", input_format="RGB"),
    size_divisibility=32,
    ema=(0.996, 1.0),
    total_steps=L(lazy.optimiser_steps)(
        iterations="${train.max_iter}", accumulation="${optimizer.accumulation}"
    ),
    seed="${train.seed}",
    rank_period=100,
)
model.sem_seg_head.num_classes = 54  # detectron2's default; pre-training leaves the class layer alone

dataloader = dict(
    train=L(lazy.unlabelled_loader)(
        sources=["imagenet/train"],
        total_batch_size=32,
        crop_size=(512, 512),
        crop_scale=(0.3, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        flip=0.5,
        image_format="RGB",
        num_workers=4,
        seed="${train.seed}",
        output_dir="${train.output_dir}",
    ),
)
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.recipe_batch = 32
train.max_iter = 187500  # 5 epochs of 1.2 million images
train.eval_period = 0
