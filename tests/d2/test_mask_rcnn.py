"""Mask R-CNN on the ViT: padding, targets, weights from pre-training, and the twins of its configurations."""

from __future__ import annotations

import logging
import re

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import LazyConfig, instantiate  # noqa: E402
from detectron2.data import MetadataCatalog  # noqa: E402
from detectron2.solver import LRMultiplier  # noqa: E402
from detectron2.structures import BitMasks, Boxes, Instances  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from prepare_data import make_synthetic  # noqa: E402
from test_lazy_configs import described  # noqa: E402
from tiny import losses_of, options, train  # noqa: E402
from vit_tiny import YAML, pretraining_checkpoint  # noqa: E402

from jepa_plugins.config_files import config_root, list_configs  # noqa: E402
from jepa_plugins.core.checkpoints import CheckpointError  # noqa: E402
from jepa_plugins.d2 import get_config, solver  # noqa: E402
from jepa_plugins.d2.checkpoint import Checkpointer  # noqa: E402
from jepa_plugins.d2.data.catalog import check_num_classes, ensure_registered  # noqa: E402
from jepa_plugins.d2.data.mappers import build_mapper  # noqa: E402
from jepa_plugins.d2.registration import build_model  # noqa: E402

TWINS = {
    "mask_rcnn_vitb_100ep": "mask_rcnn/vitb_100ep",
    "mask_rcnn_vitl_100ep": "mask_rcnn/vitl_100ep",
    "mask_rcnn_vith_75ep": "mask_rcnn/vith_75ep",
    "quick/mask_rcnn": "quick/mask_rcnn",
}


def tiny_config(changes: dict | None = None):
    return get_config("detectron2/quick/mask_rcnn.yaml", options(YAML, changes or {}))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(tiny_config())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    make_synthetic(root, train=4, val=2, unlabelled=1, size=72, seed=0, workers=1, overwrite=False)
    return root


def sample(size: tuple[int, int], classes=(0, 3)) -> dict:
    """An image with a square object for each class, as our mapper gives it."""
    instances = Instances(size)
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    masks = torch.zeros(len(classes), *size, dtype=torch.bool)
    masks[:, 8:40, 4:36] = True
    instances.gt_masks = masks
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 8, 36, 40]] * len(classes)).view(-1, 4))
    return {"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8), "instances": instances}


# --- the model


def test_padding(model) -> None:
    """To a square up to square_pad, then to whole cells; zeros after normalisation, right and below."""
    for sizes, want in (
        ([(64, 40), (30, 50)], (64, 64)),
        ([(20, 20)], (64, 64)),
        ([(64, 65)], (64, 96)),
        ([(40, 130), (70, 20)], (96, 160)),
    ):
        images = [sample(size) for size in sizes]
        got = model.preprocess_image(images)
        assert tuple(got.tensor.shape[-2:]) == want and got.image_sizes == sizes
        for padded, entry, (height, width) in zip(got.tensor, images, sizes, strict=True):
            inside = (entry["image"] - model.pixel_mean) / model.pixel_std
            assert torch.equal(padded[:, :height, :width], inside)
            assert not padded[:, height:].any() and not padded[:, :, width:].any()


def test_masks_of_our_mapper_and_of_detectron2_give_the_same_losses(model) -> None:
    losses = []
    for kind in (lambda masks: masks, BitMasks):
        torch.manual_seed(1)
        entries = [sample((64, 48)), sample((50, 64), classes=())]
        for entry in entries:
            entry["instances"].gt_masks = kind(entry["instances"].gt_masks)
        torch.manual_seed(2)
        with EventStorage():
            losses.append(model.train()(entries))
    assert set(losses[0]) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}
    assert losses[0] == losses[1] and all(torch.isfinite(value) for value in losses[0].values())


def test_a_class_that_the_heads_lack_is_one_sentence(model) -> None:
    entry = {**sample((64, 64), classes=(8,)), "file_name": "a.jpg"}
    with pytest.raises(
        ValueError, match="'a.jpg' has an object of class 8, but MODEL.ROI_HEADS.NUM_CLASSES .* is 8"
    ):
        model.train()([entry])


def test_predictions_are_in_the_files_size(model) -> None:
    entry = {"image": sample((64, 48))["image"], "height": 128, "width": 96}
    with torch.no_grad():
        found = model.eval()([entry])[0]["instances"]
    assert len(found) and found.pred_masks.shape[1:] == (128, 96)
    assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes", "pred_masks"}


def test_the_data_sets_classes_are_those_of_the_detector(data) -> None:
    name = f"coco_instance@{data}@train2017"
    ensure_registered(name)
    check_num_classes(tiny_config(), name)
    with pytest.raises(ValueError, match="MODEL.ROI_HEADS.NUM_CLASSES is 7, but .* set it to 8"):
        check_num_classes(tiny_config({"MODEL.ROI_HEADS.NUM_CLASSES": 7}), name)


def test_the_mapper_does_not_pad(data) -> None:
    """Smaller images stay smaller; boxes are tight around the masks; none is empty."""
    name = f"coco_instance@{data}@train2017"
    ensure_registered(name)
    from detectron2.data import DatasetCatalog

    changes = {"DATASETS.TRAIN": (name,), "INPUT.MIN_SCALE": 0.3, "INPUT.MAX_SCALE": 1.8}
    mapper = build_mapper(tiny_config(changes), True)
    sizes = set()
    for i in range(8):
        torch.manual_seed(i)
        got = mapper(DatasetCatalog.get(name)[i % 4])
        height, width = got["image"].shape[1:]
        sizes.add((height, width))
        assert height <= 64 and width <= 64 and "padding_mask" not in got
        instances = got["instances"]
        assert instances.image_size == (height, width)
        assert instances.gt_masks.shape == (len(instances), height, width)
        assert instances.gt_masks.flatten(1).any(1).all()
        for box, mask in zip(instances.gt_boxes.tensor.int().tolist(), instances.gt_masks, strict=True):
            rows, columns = mask.nonzero().unbind(1)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert len(sizes) > 1


# --- weights


def test_a_pre_training_checkpoint_fills_the_backbone(tmp_path, caplog, model) -> None:
    """Under our checkpointer and under the one that launchers ask for."""
    path = pretraining_checkpoint(tmp_path / "epoch_1.pth")
    target = torch.load(path, weights_only=True)["state_dict"]
    for kind in (Checkpointer, DetectionCheckpointer):
        torch.manual_seed(3)
        fresh = build_model(tiny_config())
        before = {name: value.clone() for name, value in fresh.state_dict().items()}
        checkpointer = kind(fresh)
        with caplog.at_level(logging.INFO):
            checkpointer.load(str(path))
        for name, value in fresh.state_dict().items():
            source = target.get(name.replace("backbone.net", "target_encoder"))
            if name.startswith("backbone.net.") and "rel_pos" not in name:
                assert torch.equal(value, source), name
            else:
                assert torch.equal(value, before[name]), name
        report = checkpointer.report
        assert "the target encoder ('target_encoder') was taken" in caplog.text
        assert (
            "backbone.net.blocks.0.attn.rel_pos_h" in report.missing
            and "encoder.pos_embed" in report.left_out
        )
        assert {name for name in report.missing if "backbone.net" in name and "rel_pos" not in name} == set()
        assert not report.resized and not report.mismatched
        caplog.clear()


def test_resampled_positions_are_reported(tmp_path) -> None:
    path = pretraining_checkpoint(tmp_path / "epoch_1.pth")
    checkpointer = Checkpointer(build_model(tiny_config({"MODEL.VIT.PRETRAIN_IMG_SIZE": (64, 64)})))
    checkpointer.load(str(path))
    assert checkpointer.report.resized == ["backbone.net.pos_embed"]


def test_what_is_missing_or_of_another_size_fails(tmp_path, model) -> None:
    deep = pretraining_checkpoint(tmp_path / "deep.pth", depth=3)
    with pytest.raises(CheckpointError, match=r"deep.pth holds a ViT of another size: set MODEL.VIT.DEPTH 3"):
        Checkpointer(model).load(str(deep))
    path = pretraining_checkpoint(tmp_path / "part.pth")
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if "target" not in k}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="part.pth holds no 'target_encoder'"):
        Checkpointer(model).load(str(path))
    with pytest.raises(CheckpointError, match="lacks .* tensors of the model"):  # an evaluation needs all
        whole = pretraining_checkpoint(tmp_path / "whole.pth")
        Checkpointer(build_model(tiny_config()), required=[""]).load(str(whole))


def test_a_published_detector_loads_with_its_class_tokens_row(tmp_path) -> None:
    published = build_model(tiny_config({"MODEL.VIT.PRETRAIN_USE_CLS_TOKEN": True}))
    torch.save({"model": published.state_dict()}, tmp_path / "published.pth")
    model = build_model(tiny_config())
    checkpointer = Checkpointer(model, required=[""])
    checkpointer.load(str(tmp_path / "published.pth"))
    assert checkpointer.report.resized == ["backbone.net.pos_embed"]
    image = torch.randn(1, 3, 64, 64)
    one, other = published.backbone.eval()(image), model.backbone.eval()(image)
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- training


def test_it_learns_and_its_ap_counts_boxes_and_masks(data, tmp_path) -> None:
    names = {
        f"DATASETS.{part}": (f"coco_instance@{data}@{split}2017",)
        for part, split in (("TRAIN", "train"), ("TEST", "val"))
    }
    path = pretraining_checkpoint(tmp_path / "epoch_1.pth")
    changes = {
        **names,
        "OUTPUT_DIR": str(tmp_path / "out"),
        "MODEL.WEIGHTS": str(path),
        "SOLVER.MAX_ITER": 12,
        "SOLVER.STEPS": (),
        "SOLVER.CHECKPOINT_PERIOD": 100,
        "SOLVER.BASE_LR": 0.003,
    }
    trainer = train(tiny_config(changes))
    losses = list(losses_of(trainer).values())
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    results = trainer._last_eval_results
    assert list(results) == ["bbox", "segm"]
    assert 0 <= results["bbox"]["AP50"] <= 100 and 0 <= results["segm"]["AP50"] <= 100
    assert MetadataCatalog.get(names["DATASETS.TEST"][0]).evaluator_type == "coco"


# --- configurations


def test_every_lazy_configuration_has_a_twin() -> None:
    prefix = "detectron2/lazy/"
    found = {
        name.removeprefix(prefix).removesuffix(".py") for name in list_configs() if name.startswith(prefix)
    }
    assert {name for name in found if "mask_rcnn" in name} == set(TWINS)


def twins(name: str):
    root = config_root() / "detectron2"
    cfg = get_config(str(root / f"{TWINS[name]}.yaml"), ["MODEL.DEVICE", "cpu", "SEED", 0])
    return LazyConfig.load(str(root / "lazy" / f"{name}.py")), cfg


@pytest.mark.parametrize("name", TWINS)
def test_models_are_those_of_the_yaml_files(name) -> None:
    config, cfg = twins(name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        one, other = instantiate(config.model), build_model(cfg)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (one, other)]
    assert shapes[0] == shapes[1]
    for (key, module), theirs in zip(one.named_modules(), other.modules(), strict=True):
        assert type(module) is type(theirs) and str(module.extra_repr()) == str(theirs.extra_repr()), key
        own = [
            {k: v for k, v in vars(part).items() if isinstance(v, (int, float, str)) and k[0] != "_"}
            for part in (module, theirs)
        ]
        assert own[0] == own[1], key
    for part in ("pre_nms_topk", "post_nms_topk"):
        assert getattr(one.proposal_generator, part) == getattr(other.proposal_generator, part)
    assert one.roi_heads.box_in_features == other.roi_heads.box_in_features


@pytest.mark.parametrize("name", TWINS)
def test_training_is_that_of_the_yaml_files(name) -> None:
    config, cfg = twins(name)
    length = config.train.max_iter
    assert length == cfg.SOLVER.MAX_ITER
    optimizer, params = config.optimizer, config.optimizer.params
    assert (optimizer.lr, optimizer.weight_decay) == (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY)
    assert (params.weight_decay_norm, params.layer_decay) == (
        cfg.SOLVER.WEIGHT_DECAY_NORM,
        cfg.SOLVER.LAYER_DECAY,
    )
    assert cfg.SOLVER.BACKBONE_MULTIPLIER == 1.0 and not cfg.SOLVER.CLIP_GRADIENTS.ENABLED
    weight = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    ours = LRMultiplier(weight, instantiate(config.lr_multiplier), length)
    theirs = solver.build_lr_scheduler(cfg, weight)
    for step in (0, 5, 249, 251, length // 2, int(0.9 * length), int(0.97 * length), length - 1):
        ours.last_epoch = theirs.last_epoch = step
        assert ours.get_lr() == pytest.approx(theirs.get_lr(), rel=1e-9), step
    loader, test = config.dataloader.train, config.dataloader.test
    assert (
        loader.total_batch_size == cfg.SOLVER.IMS_PER_BATCH and tuple(loader.datasets) == cfg.DATASETS.TRAIN
    )
    cfg.DATASETS.TRAIN = ()
    assert described(instantiate(loader.mapper)) == described(build_mapper(cfg, True))
    assert re.search(r"FixedSizeCrop.*pad=False", described(build_mapper(cfg, True)))
    assert (test.dataset, test.min_size, test.max_size) == (
        cfg.DATASETS.TEST[0],
        cfg.INPUT.MIN_SIZE_TEST,
        cfg.INPUT.MAX_SIZE_TEST,
    )
    assert config.train.amp.enabled == cfg.SOLVER.AMP.ENABLED
    assert config.train.eval_period == cfg.TEST.EVAL_PERIOD


def test_the_recipe() -> None:
    """Row by row as ViTDet-B's (100 epochs of 118,000 images at batch 64)."""
    cfg = get_config("detectron2/mask_rcnn/vitb_100ep.yaml")
    solver_keys = cfg.SOLVER
    assert (solver_keys.IMS_PER_BATCH, solver_keys.MAX_ITER, solver_keys.STEPS) == (
        64,
        184375,
        (163889, 177546),
    )
    assert (solver_keys.BASE_LR, solver_keys.WEIGHT_DECAY, solver_keys.LAYER_DECAY) == (1e-4, 0.1, 0.7)
    assert (solver_keys.WARMUP_ITERS, solver_keys.WARMUP_FACTOR, solver_keys.OPTIMIZER) == (
        250,
        0.001,
        "ADAMW",
    )
    assert (cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE) == (1024, 0.1, 2.0)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (1024, 1024)
    assert cfg.MODEL.VIT.DROP_PATH_RATE == 0.1 and not cfg.MODEL.VIT.PRETRAIN_USE_CLS_TOKEN
    assert sorted(set(range(12)) - set(cfg.MODEL.VIT.WINDOW_BLOCK_INDEXES)) == [2, 5, 8, 11]
