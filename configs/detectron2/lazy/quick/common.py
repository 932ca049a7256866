"""Changes that turn an R50 configuration into its quick twin: see detectron2/quick/base.yaml."""

from detectron2.config import LazyCall as L

from jepa_plugins.d2 import lazy
from jepa_plugins.d2.backbones import TimmBackbone

PIXEL_MEAN, PIXEL_STD = [127.0, 127.0, 127.0], [128.0, 128.0, 128.0]  # of EfficientNet-Lite0
CROP = (128, 128)
MIN_SIZES = [112, 128, 160]


def shrink_model(model):
    """64 channels, 3 encoder and 3 decoder layers, 30 queries, EfficientNet-Lite0 with frozen weights."""
    model.backbone = L(TimmBackbone)(
        name="tf_efficientnet_lite0", in_channels=3, weights="", freeze=True, kwargs={}
    )
    model.pixel_mean, model.pixel_std = PIXEL_MEAN, PIXEL_STD
    head = model.sem_seg_head
    head.input_shape = L(lazy.pyramid)(res2=24, res3=40, res4=112, res5=320)
    head.num_classes = 12
    head.pixel_decoder.update(
        conv_dim=64, mask_dim=64, transformer_enc_layers=3, transformer_dim_feedforward=256
    )
    head.transformer_predictor.update(hidden_dim=64, num_queries=30, dim_feedforward=256, dec_layers=3)
    if "criterion" in model:
        model.criterion.num_points = 1024
        model.test_topk_per_image = 30


def shrink_training(train, optimizer, dataloader):
    """400 iterations of 8 images on the CPU."""
    train.update(
        device="cpu", init_checkpoint="", max_iter=400, eval_period=0, seed=0, amp=dict(enabled=False)
    )
    train.recipe_batch = 0
    train.checkpointer.period = 100000
    optimizer.lr = 0.001
    dataloader.train.update(total_batch_size=8, num_workers=0)
    if "test" in dataloader:
        dataloader.test.update(min_size=128, max_size=512, num_workers=0)
