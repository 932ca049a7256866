"""Mask2Former R50 on COCO, panoptic: twin of detectron2/mask2former/coco/panoptic_R50.yaml."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from jepa_plugins.d2 import lazy

from .common.mask2former_R50 import model  # noqa: F401
from .common.train import optimizer, train  # noqa: F401

dataloader = dict(
    train=L(lazy.labelled_loader)(
        datasets=["coco_2017_train_panoptic"],
        mapper=L(lazy.jitter_mapper)(
            kind="panoptic",
            num_classes="${model.sem_seg_head.num_classes}",
            image_size=1024,
            min_scale=0.1,
            max_scale=2.0,
        ),
        total_batch_size=16,
        num_workers=4,
        seed="${train.seed}",
    ),
    test=L(lazy.test_loader)(
        dataset="coco_2017_val_panoptic_with_sem_seg", min_size=800, max_size=1333, num_workers=4
    ),
    evaluator=L(lazy.evaluator)(
        dataset="${..test.dataset}",
        semantic_on="${model.semantic_on}",
        instance_on="${model.instance_on}",
        panoptic_on="${model.panoptic_on}",
        output_dir="${train.output_dir}",
    ),
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[327778, 355092], num_updates="${train.max_iter}"
    ),
    warmup_factor=1.0,
    warmup_length=10 / 368750,
)
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.recipe_batch = 16
train.max_iter = 368750  # 50 epochs
