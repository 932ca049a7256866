"""What detectron2's tools/lazyconfig_train_net.py reads, and the optimiser and schedule of Mask2Former."""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler

from jepa_plugins.d2 import lazy

train = dict(
    output_dir="./output",
    init_checkpoint="",
    max_iter=90000,
    amp=dict(enabled=True),  # needs CUDA in detectron2's loop
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=5000, max_to_keep=100),
    eval_period=5000,
    log_period=20,
    device="cuda",
    recipe_batch=0,  # images of an optimiser step that our launcher insists on; 0 takes any
    seed=0,
)
optimizer = L(lazy.adamw)(
    params=dict(weight_decay_norm=0.0, weight_decay_embed=0.0, backbone_multiplier=0.1),
    lr=0.0001,
    weight_decay=0.05,
    max_norm=0.01,
    accumulation=1,
)
lr_multiplier = L(PolynomialDecayParamScheduler)(base_value=1.0, power=0.9)
