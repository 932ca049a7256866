"""The training loop: accumulation, resuming, processes, precision, and what stops it."""

import logging
import math
import os
import socket
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.engine import hooks as d2_hooks  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from tiny import (  # noqa: E402
    losses_of,
    save_pictures,
    save_segmentation,
    tiny_config,
    train,
)

from jepa_plugins.core.checkpoints import CheckpointError  # noqa: E402
from jepa_plugins.d2.engine import StartedLate, Trainer, amp_dtype, check_batch  # noqa: E402
from jepa_plugins.d2.hooks import CollapseHook, TargetHook  # noqa: E402

TRAINED = {
    "MODEL.MASK_JEPA.FREEZE_BACKBONE": False,
    "SOLVER.BACKBONE_MULTIPLIER": 1.0,
    "MODEL.TIMM.NAME": "test_convnext",  # without batch statistics
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return save_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture()
def config(images, tmp_path):
    """A function from changes to a configuration with an output folder of its own."""

    def make(changes: dict | None = None, folder: str = "run", name: str = "mask_jepa"):
        base = {"DATASETS.UNLABELLED": (images,), "OUTPUT_DIR": str(tmp_path / folder)}
        (tmp_path / folder).mkdir(exist_ok=True)
        return tiny_config(name, {**base, **(changes or {})})

    return make


def assert_close_models(one, other, tolerance: float = 0.0) -> None:
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        difference = float((value.double() - theirs[name].double()).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference:.3g}"


def assert_equal_optimisers(one, other) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in ours["state"].items():
        for name, value in state.items():
            assert torch.equal(value, theirs["state"][index][name]), (index, name)


# --- the loop


def test_a_run_logs_what_tells_learning_from_collapse(config) -> None:
    trainer = train(config({"SOLVER.MAX_ITER": 3, "MODEL.MASK_JEPA.RANK_PERIOD": 2}))
    names = set(trainer.storage.histories())
    assert {"total_loss", "loss_recon", "loss_denoise", "lr", "grad_norm", "ema_momentum"} <= names
    assert {"target_variance", "explained_variance", "denoise_r2", "rankme_dense_centred"} <= names
    assert int(trainer.model.step) == 3 and not bool(trainer.model.ema_pending)
    momenta = [value for value, _ in trainer.storage.history("ema_momentum").values()]
    assert momenta == pytest.approx([0.996, 0.996 + 0.004 / 3, 0.996 + 0.008 / 3])
    norms = [value for value, _ in trainer.storage.history("grad_norm").values()]
    assert len(norms) == 3 and all(math.isfinite(n) and n > 0 for n in norms)
    total = losses_of(trainer)
    parts = [trainer.storage.history(f"loss_{part}").values() for part in ("recon", "denoise")]
    for (recon, step), (denoise, _) in zip(*parts, strict=True):
        assert total[step] == pytest.approx(recon + denoise, rel=1e-6)


def test_the_learning_rate_is_poly(config) -> None:
    trainer = train(config({"SOLVER.MAX_ITER": 4}))
    rates = [value for value, _ in trainer.storage.history("lr").values()]
    assert rates == pytest.approx([0.001 * (1 - step / 4) ** 0.9 for step in range(4)])


def test_our_hooks_stand_before_the_checkpointer(config) -> None:
    kinds = [type(hook) for hook in Trainer(config())._hooks]
    assert kinds.index(TargetHook) < kinds.index(CollapseHook) < kinds.index(d2_hooks.PeriodicCheckpointer)


def test_a_collapse_is_said_in_words(config, caplog) -> None:
    cfg = config({"SOLVER.MAX_ITER": 3})
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    watch = next(hook for hook in trainer._hooks if isinstance(hook, CollapseHook))
    watch.load_state_dict({"first": {"target_variance": 1e6}, "warned": []})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    warnings = [r.message for r in caplog.records if "the target is collapsing" in r.message]
    assert len(warnings) == 1 and warnings[0].startswith("step 0: ")


@pytest.mark.parametrize("changes", [{}, {"MODEL.MASK_JEPA.READOUT": "spatial_queries"}, TRAINED])
def test_accumulation_equals_one_big_batch(config, changes) -> None:
    common = {**changes, "SOLVER.IMS_PER_BATCH": 4, "SOLVER.MAX_ITER": 3}
    whole = train(config(common))
    parts = train(config({**common, "SOLVER.ACCUMULATION": 2}, folder="parts"))
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-5)
    norms = [[value for value, _ in run.storage.history("grad_norm").values()] for run in (parts, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # which neither clipping nor Adam would show
    # Adam divides by the gradient's size: one of rounding size moves a weight by up to the learning rate
    assert_close_models(parts.model, whole.model, 3e-4)
    differing = torch.cat(
        [
            (a - b).abs().flatten()
            for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True)
        ]
    )
    assert float((differing > 1e-5).double().mean()) < 0.01
    assert int(parts.model.step) == int(whole.model.step) == 3


@pytest.mark.parametrize("changes", [{}, TRAINED, {"SOLVER.ACCUMULATION": 2}])
def test_resuming_equals_never_having_stopped(config, changes) -> None:
    straight = train(config(changes))
    stopped = train(config({**changes, "SOLVER.CHECKPOINT_PERIOD": 3}, folder="parts"), stop_after=3)
    assert int(stopped.model.step) == 3
    assert (Path(stopped.cfg.OUTPUT_DIR) / "model_0000002.pth").is_file()
    resumed = train(config(changes, folder="parts"), resume=True)
    assert resumed.start_iter == 3 and int(resumed.model.step) == 6
    assert_close_models(resumed.model, straight.model)
    assert_equal_optimisers(resumed._trainer.optimizer, straight._trainer.optimizer)
    want = losses_of(straight)
    assert {**losses_of(stopped), **losses_of(resumed)} == want and len(want) == 6


def test_a_longer_run_goes_on_from_a_shorter_one(config) -> None:
    """The schedule's length is the configuration's, not the checkpoint's."""
    train(config({"SOLVER.MAX_ITER": 2}))
    resumed = train(config({"SOLVER.MAX_ITER": 4}), resume=True)
    rates = [value for value, _ in resumed.storage.history("lr").values()]
    assert rates[1:] == pytest.approx([0.001 * (1 - 3 / 4) ** 0.9])
    assert int(resumed.model.step) == 4


def test_a_checkpoint_without_the_optimiser_cannot_be_resumed(config) -> None:
    trainer = train(config({"SOLVER.MAX_ITER": 2}))
    path = Path(trainer.cfg.OUTPUT_DIR) / "model_final.pth"
    content = torch.load(path, weights_only=True)
    assert set(content["trainer"]["_trainer"]) == {"optimizer", "grad_scaler"}
    del content["trainer"]["_trainer"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="lacks the optimiser's state, so a run cannot resume from it"):
        Trainer(trainer.cfg).resume_or_load(True)


def test_resuming_without_a_checkpoint_starts(config) -> None:
    assert train(config({"SOLVER.MAX_ITER": 1}), resume=True).start_iter == 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _process(rank: int, world: int, port: int, cfg, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(world)
    else:  # the 0.6 tag: its launcher sets this
        comm._LOCAL_PROCESS_GROUP = torch.distributed.new_group(list(range(world)))
    torch.manual_seed(rank)  # the first process's weights count
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()
    losses = losses_of(trainer) if rank == 0 else {}  # the mean over processes, known to the first
    torch.save((trainer.model.module.state_dict(), losses), f"{out}/{rank}.pth")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(config, tmp_path) -> None:
    """Half of the batch in each process: the global batch, its draws and the losses are the same."""
    cfg = config(
        {**TRAINED, "SOLVER.IMS_PER_BATCH": 4, "SOLVER.MAX_ITER": 2, "MODEL.MASK_JEPA.RANK_PERIOD": 0}
    )
    torch.manual_seed(0)
    alone = Trainer(cfg)
    alone.train()
    # Forked processes need not import everything again, but cannot use CUDA's autograd threads.
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(
        _process, (2, _free_port(), cfg, str(tmp_path)), nprocs=2, start_method=method
    )
    (one, losses), (other, _) = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    want = alone.model.state_dict()
    assert one.keys() == other.keys() == want.keys()
    differing = []
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
        differing.append((value.double() - want[name].double()).abs().flatten())
    assert float(torch.cat(differing).max()) < 3e-4
    assert float((torch.cat(differing) > 1e-5).double().mean()) < 0.01
    assert losses == pytest.approx(losses_of(alone), rel=1e-5)


# --- precision


def test_precision_names() -> None:
    off = tiny_config()
    assert amp_dtype(off) is None
    on = lambda kind: tiny_config("mask_jepa", {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": kind})  # noqa: E731
    assert amp_dtype(on("auto")) == amp_dtype(on("bfloat16")) == torch.bfloat16
    assert amp_dtype(on("float16")) == torch.float16
    with pytest.raises(ValueError, match="'float8'; give auto, float16 or bfloat16"):
        amp_dtype(on("float8"))


def test_mixed_precision_trains_on_the_cpu(config) -> None:
    exact = train(config({"SOLVER.MAX_ITER": 2}))
    rough = train(config({"SOLVER.MAX_ITER": 2, "SOLVER.AMP.ENABLED": True}, folder="amp"))
    assert losses_of(rough) == pytest.approx(losses_of(exact), rel=0.02)
    assert losses_of(rough) != losses_of(exact)


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_step_that_the_scaler_skips_is_no_error(config) -> None:
    """float16 overflows at the scaler's first, large scale: no step then, and no gradient norm either."""
    torch.manual_seed(0)
    trainer = Trainer(config({"SOLVER.MAX_ITER": 1}))
    before = trainer.model.sem_seg_head.pixel_decoder.mask_features.weight.clone()
    trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=1)
    trainer.train()
    assert torch.equal(before, trainer.model.sem_seg_head.pixel_decoder.mask_features.weight)
    assert "grad_norm" not in trainer.storage.histories()
    assert int(trainer.model.step) == 0  # the target waits for a step as well
    assert trainer._trainer.grad_scaler.get_scale() < 1e38


# --- what stops a run


def test_a_loss_that_is_no_number_stops_the_run(config) -> None:
    trainer = Trainer(config())
    with torch.no_grad():
        trainer.model.jepa.denoise.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="iteration=0"):
        trainer.train()


def test_the_effective_batch_is_computed_printed_and_checked(config, caplog) -> None:
    with caplog.at_level(logging.INFO):
        assert check_batch(config({"SOLVER.IMS_PER_BATCH": 12, "SOLVER.ACCUMULATION": 3}), world=2) == 2
    assert "effective batch 12 = 2 images x 2 processes x 3 accumulated" in caplog.text
    for world, parts in ((5, 1), (2, 4), (1, 0)):
        cfg = config({"SOLVER.IMS_PER_BATCH": 12, "SOLVER.ACCUMULATION": parts})
        with pytest.raises(ValueError, match=f"12 must be a multiple of {world} processes"):
            check_batch(cfg, world)


def test_another_batch_than_the_recipes_is_refused(config) -> None:
    cfg = config({"SOLVER.RECIPE_IMS_PER_BATCH": 32})
    with pytest.raises(
        ValueError, match="effective batch is 2, the recipe's 32: set SOLVER.IMS_PER_BATCH 32"
    ):
        Trainer(cfg)


def test_a_missing_folder_is_named(config) -> None:
    trainer = Trainer(config({"DATASETS.UNLABELLED": ("no/such/folder",)}))
    with pytest.raises(FileNotFoundError, match="'no/such/folder' does not exist"):
        trainer.train()


def test_the_stream_is_built_when_the_start_is_known() -> None:
    built = []
    loader = StartedLate(lambda start: built.append(start) or iter([start, start + 1]))
    batches = iter(loader)
    assert built == []
    loader.start_iteration = 7
    assert list(batches) == [7, 8] and built == [7]


# --- other models and evaluation


def test_a_semantic_fine_tuning_trains_and_is_evaluated(config, tmp_path) -> None:
    root = save_segmentation(tmp_path / "data")
    cfg = config(
        {
            "DATASETS.TRAIN": (f"folder_semantic@{root}@training",),
            "DATASETS.TEST": (f"folder_semantic@{root}@validation",),
            "SOLVER.MAX_ITER": 2,
        },
        name="semantic",
    )
    trainer = train(cfg)
    assert not any(isinstance(hook, (TargetHook, CollapseHook)) for hook in trainer._hooks)
    assert {"loss_ce", "loss_mask", "loss_dice", "loss_ce_1", "grad_norm"} <= set(trainer.storage.histories())
    assert all(math.isfinite(loss) for loss in losses_of(trainer).values())
    assert 0 <= trainer._last_eval_results["sem_seg"]["mIoU"] <= 100
    # its own checkpoint goes on where it stopped
    cfg.SOLVER.MAX_ITER = 3
    assert train(cfg, resume=True).start_iter == 2


def test_held_out_images_are_evaluated_after_training(config, images) -> None:
    trainer = train(config({"SOLVER.MAX_ITER": 1, "DATASETS.UNLABELLED_TEST": (images,)}))
    result = trainer._last_eval_results["held_out"]
    assert {"explained_variance", "explained_variance_beyond_position", "denoise_r2"} <= set(result)
    assert Trainer.test(config(), trainer.model) == {}
