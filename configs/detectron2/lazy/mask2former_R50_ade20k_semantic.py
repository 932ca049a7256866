"""Mask2Former R50 on ADE20K, semantic: twin of detectron2/mask2former/ade20k/semantic_R50.yaml."""

from detectron2.config import LazyCall as L

from jepa_plugins.d2 import lazy

from .common.mask2former_R50 import model  # noqa: F401
from .common.train import lr_multiplier, optimizer, train  # noqa: F401

model.sem_seg_head.num_classes = 150
model.metadata.dataset = "ade20k_sem_seg_train"
model.panoptic_on = model.instance_on = model.sem_seg_postprocess_before_inference = False

dataloader = dict(
    train=L(lazy.labelled_loader)(
        datasets=["ade20k_sem_seg_train"],
        mapper=L(lazy.crop_mapper)(
            kind="semantic",
            num_classes="${model.sem_seg_head.num_classes}",
            min_size=[256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024],
            max_size=2048,
            crop_size=(512, 512),
            single_category_max_area=1.0,
            colour_jitter=True,
            size_divisibility=512,
        ),
        total_batch_size=16,
        num_workers=4,
        seed="${train.seed}",
    ),
    test=L(lazy.test_loader)(dataset="ade20k_sem_seg_val", min_size=512, max_size=2048, num_workers=4),
    evaluator=L(lazy.evaluator)(
        dataset="${..test.dataset}", semantic_on=True, output_dir="${train.output_dir}"
    ),
)
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.recipe_batch = 16
train.max_iter = 160000
