"""LazyConfigs: twins of the yaml files; and what detectron2's loops and checkpointers do with our models."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import LazyConfig, instantiate  # noqa: E402
from detectron2.engine import SimpleTrainer  # noqa: E402
from detectron2.modeling import META_ARCH_REGISTRY  # noqa: E402
from detectron2.solver import LRMultiplier  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from omegaconf import ListConfig  # noqa: E402
from prepare_data import make_synthetic  # noqa: E402
from tiny import pictures, steps, tiny_config, tiny_model  # noqa: E402

from jepa_plugins.config_files import config_root, list_configs  # noqa: E402
from jepa_plugins.core.checkpoints import CheckpointError  # noqa: E402
from jepa_plugins.core.optim import ClippedAdamW  # noqa: E402
from jepa_plugins.d2 import env, get_config, lazy, solver  # noqa: E402
from jepa_plugins.d2.checkpoint import Checkpointer  # noqa: E402
from jepa_plugins.d2.data.mappers import build_mapper  # noqa: E402
from jepa_plugins.d2.launchers import LauncherCheckpointer, Stream  # noqa: E402

FULL = {
    "mask_jepa_R50_in1k": "mask_jepa/R50_in1k",
    "mask2former_R50_ade20k_semantic": "mask2former/ade20k/semantic_R50",
    "mask2former_R50_coco_panoptic": "mask2former/coco/panoptic_R50",
    "mask2former_R50_coco_instance": "mask2former/coco/instance_R50",
}
QUICK = {f"quick/{name}": f"quick/{name}" for name in ("mask_jepa", "semantic", "panoptic", "instance")}
TWINS = {**FULL, **QUICK}


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """What the quick configurations name, found below the working directory."""
    folder = tmp_path_factory.mktemp("work")
    make_synthetic(folder / "datasets" / "synthetic", 2, 1, 2, size=64, seed=0, workers=1, overwrite=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def twins(name: str):
    """A LazyConfig and the yaml configuration that it says the same as, on the CPU."""
    root = config_root() / "detectron2"
    cfg = get_config(str(root / f"{TWINS[name]}.yaml"), ["MODEL.DEVICE", "cpu", "SEED", 0])
    return LazyConfig.load(str(root / "lazy" / f"{name}.py")), cfg


def test_every_lazy_configuration_has_a_twin() -> None:
    prefix = "detectron2/lazy/"
    found = {
        name.removeprefix(prefix).removesuffix(".py") for name in list_configs() if name.startswith(prefix)
    }
    detectors = {name for name in found if "mask_rcnn" in name}  # see test_mask_rcnn.py
    assert {name for name in found if "common" not in name} - detectors == set(TWINS)


@pytest.mark.parametrize("name", TWINS)
def test_models_are_those_of_the_yaml_files(name) -> None:
    """Every weight's name, shape and gradient, and every option; small models to the last bit."""
    config, cfg = twins(name)
    with torch.device("meta" if name in FULL else "cpu"):
        torch.manual_seed(0)
        one = instantiate(config.model)
        torch.manual_seed(0)
        other = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    want = other.state_dict()
    assert list(one.state_dict()) == list(want)
    for key, value in one.state_dict().items():
        assert value.shape == want[key].shape and (value.is_meta or torch.equal(value, want[key])), key
    trained = [[key for key, p in model.named_parameters() if p.requires_grad] for model in (one, other)]
    assert trained[0] == trained[1]
    for (key, module), theirs in zip(one.named_modules(), other.modules(), strict=True):
        assert str(module.extra_repr()) == str(theirs.extra_repr()), key
    for module, theirs in zip(one.children(), other.children(), strict=True):
        assert type(module) is type(theirs)
    assert plain(one) == plain(other)
    assert plain(one.sem_seg_head) == plain(other.sem_seg_head)
    if hasattr(one, "jepa"):
        assert one.settings == other.settings


def plain(module: nn.Module) -> dict:
    """A module's own attributes that are values."""
    own = {key: value for key, value in vars(module).items() if key[0] != "_"}
    lists = {key: tuple(value) for key, value in own.items() if isinstance(value, (tuple, list, ListConfig))}
    return {**{key: value for key, value in own.items() if isinstance(value, (int, float, str))}, **lists}


def described(mapper) -> str:
    """Its augmentations in words, without brackets and addresses."""
    return re.sub(r" object at 0x\w+|[][()]", "", str(mapper.augmentations))


@pytest.mark.parametrize("name", TWINS)
def test_training_is_that_of_the_yaml_files(name) -> None:
    config, cfg = twins(name)
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "table": nn.Embedding(2, 2)})
    config.optimizer.params.model = model
    one, other = instantiate(config.optimizer), solver.build_optimizer(cfg, model)
    assert one.max_norm == other.max_norm == 0.01 and one.defaults["betas"] == other.defaults["betas"]
    assert one.param_groups == other.param_groups
    length = config.train.max_iter
    assert length == cfg.SOLVER.MAX_ITER
    ours = LRMultiplier(one, instantiate(config.lr_multiplier), length)
    theirs = solver.build_lr_scheduler(cfg, other)
    for step in (0, 5, 20, length // 2, int(0.9 * length), int(0.97 * length), length - 1):
        ours.last_epoch = theirs.last_epoch = step
        assert ours.get_lr() == pytest.approx(theirs.get_lr(), rel=1e-9)
    train = config.dataloader.train
    assert train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert config.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert config.train.eval_period == cfg.TEST.EVAL_PERIOD
    assert config.train.amp.enabled == cfg.SOLVER.AMP.ENABLED
    if "mapper" in train:
        assert described(instantiate(train.mapper)) == described(build_mapper(cfg, True))
        assert tuple(train.datasets) == cfg.DATASETS.TRAIN
        test = config.dataloader.test
        assert (test.min_size, test.max_size) == (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    else:
        assert tuple(train.sources) == cfg.DATASETS.UNLABELLED
        assert tuple(train.crop_size) == cfg.INPUT.PRETRAIN_CROP_SIZE


@pytest.mark.parametrize("name", [name for name in QUICK if name != "quick/mask_jepa"])
def test_evaluators_are_those_of_the_yaml_files(name) -> None:
    from jepa_plugins.d2.evaluation import build_evaluator

    config, cfg = twins(name)
    batch = next(iter(instantiate(config.dataloader.test)))
    assert min(batch[0]["image"].shape[1:]) == 128
    one, other = instantiate(config.dataloader.evaluator), build_evaluator(cfg, cfg.DATASETS.TEST[0])
    kinds = [[type(part) for part in getattr(each, "_evaluators", [each])] for each in (one, other)]
    assert kinds[0] == kinds[1]


def test_held_out_images_of_a_lazy_configuration() -> None:
    sources = ["datasets/synthetic/unlabelled"]
    loader = lazy.held_out_loader(sources=sources, batch_size=2, crop_size=(32, 64), num_workers=0)
    assert [tuple(item["image"].shape) for item in next(iter(loader))] == [(3, 32, 64)] * 2


def test_another_number_of_classes_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="num_classes is 7, but data set .* has 12 classes: set it to 12"):
        lazy.metadata("folder_semantic@datasets/synthetic@training", 7)


# --- detectron2's loop


def accumulating(model: nn.Module, parts: int) -> ClippedAdamW:
    return lazy.adamw({"model": model}, lr=0.001, weight_decay=0.05, max_norm=0.01, accumulation=parts)


def test_targets_move_with_the_optimiser_alone() -> None:
    """Two batches a step under detectron2's own loop: weights, targets and counter move every other iteration."""
    model = tiny_model()
    batches = [pictures((64, 64), seed=i) for i in range(4)]
    trainer = SimpleTrainer(model, batches, accumulating(model, 2))
    target = model.target_pixel_decoder.mask_features.weight
    online = model.sem_seg_head.pixel_decoder.mask_features.weight
    seen = []
    with EventStorage():
        for _ in range(4):
            trainer.run_step()
            seen.append((int(model.step), online.detach().clone(), target.clone()))
            assert not bool(model.ema_pending)
    assert [step for step, _, _ in seen] == [0, 1, 1, 2]
    for (_, *before), (_, *after), moved in zip(seen, seen[1:], (True, False, True), strict=False):
        assert all(torch.equal(a, b) is not moved for a, b in zip(before, after, strict=True))


def test_a_stream_starts_at_the_loops_iteration_and_seeds_its_draws() -> None:
    def draws(start: int) -> list:
        stream = iter(Stream(lambda first: iter([[{"at": first}], [{"at": first + 1}]]), seed=3))
        with EventStorage(start):
            return [(batch[0]["at"], float(torch.rand(()))) for batch in stream]

    straight = draws(6)
    assert [at for at, _ in straight] == [6, 7] and straight[0][1] != straight[1][1]
    torch.rand(5)  # whatever was drawn before
    assert draws(7)[0] == straight[1]
    assert next(iter(Stream(lambda first: iter([first]), seed=0))) == 0  # outside of a loop


def test_accumulation_is_refused_where_the_loop_steps_after_every_batch() -> None:
    with pytest.raises(
        ValueError, match="SOLVER.ACCUMULATION is 2, but detectron2's loop steps after every batch"
    ):
        env._train_loader(tiny_config("mask_jepa", {"SOLVER.ACCUMULATION": 2}))


def test_an_update_that_a_plain_loop_left_pending_is_made_up_for(tmp_path) -> None:
    plain = tiny_model()
    steps(plain, torch.optim.AdamW(plain.parameters(), lr=0.001), [pictures((64, 64))])
    assert bool(plain.ema_pending)
    Checkpointer(plain, str(tmp_path)).save("plain")
    plain.update_target()
    model = tiny_model(seed=1)
    accumulating(model, 1)
    DetectionCheckpointer(model).load(str(tmp_path / "plain.pth"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    )


# --- detectron2's checkpointer


class Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_their_checkpointer_reads_our_models_files_safely(tmp_path) -> None:
    model = tiny_model()
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    assert type(checkpointer) is LauncherCheckpointer and checkpointer.save_dir == str(tmp_path)
    (tmp_path / "bad.pth").write_bytes(
        pickle.dumps({"model": {}, "extra": Payload(tmp_path / "ran")}, protocol=2)
    )
    with pytest.raises(CheckpointError):
        checkpointer.load(str(tmp_path / "bad.pth"))
    assert not (tmp_path / "ran").exists()
    checkpointer.save("whole")
    other = tiny_model(seed=1)
    DetectionCheckpointer(other).load(str(tmp_path / "whole.pth"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_other_models_and_subclasses_keep_their_checkpointer() -> None:
    class Own(DetectionCheckpointer):
        pass

    assert type(DetectionCheckpointer(nn.Linear(1, 1))) is DetectionCheckpointer
    assert type(DetectionCheckpointer(model=nn.Linear(1, 1))) is DetectionCheckpointer
    assert type(Own(tiny_model())) is Own
    assert type(Checkpointer(tiny_model(), required=[""])) is Checkpointer


def test_a_pre_training_checkpoint_of_their_launcher_tells_an_exporter_what_it_needs(
    tmp_path, caplog
) -> None:
    model = tiny_model()
    trainer = SimpleTrainer(model, [], accumulating(model, 1))
    DetectionCheckpointer(model, str(tmp_path), trainer=trainer).save("last")
    note = torch.load(tmp_path / "last.pth", weights_only=True)["jepa_pretraining"]
    assert note["readout"] == model.settings.readout and note["step"] == 0
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(tiny_model(name="semantic")).load(str(tmp_path / "last.pth"))
    assert "is a Mask-JEPA pre-training checkpoint" in caplog.text
