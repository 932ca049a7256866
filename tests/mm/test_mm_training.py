"""Whole runs: exact resume, accumulation, the moving average, checkpoints, the recipe, the collapse warning."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mm_tiny import QUICK, log_lines, logged, tiny_config, train, weights, write_images
from mmengine.config import Config
from mmengine.runner import Runner

from jepa_plugins.core.checkpoints import CheckpointError, read_checkpoint
from jepa_plugins.core.images import ImageError
from jepa_plugins.core.schedules import warmup_cosine
from jepa_plugins.mm import loops


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 10)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work folder of a run of six steps; every second left a checkpoint. Images: 10, so the third batch has 2."""
    folder = tmp_path_factory.mktemp("run")
    train(tiny_config(source, folder))
    return folder


# Layers that draw by themselves; the first block never drops its path.
DROPS = {"model__drop_path": 0.5, "model__arch": {"width": 24, "depth": 2, "heads": 2}}
# The batch of four in two iterations.
IN_TWO = {"optim_wrapper__accumulative_counts": 2, "train_dataloader__batch_size": 2}


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize(("changes", "parts"), [({}, 1), (DROPS, 1), ({**DROPS, **IN_TWO}, 2)])
def test_resume_is_exact(
    source: Path, finished: Path, tmp_path: Path, changes: dict[str, Any], parts: int, at: int
) -> None:
    whole, rest = finished, tmp_path / "rest"
    if changes:
        train(tiny_config(source, whole := tmp_path / "whole", **changes))
    rest.mkdir()
    shutil.copy(whole / f"iter_{at}.pth", rest)
    (rest / "last_checkpoint").write_text(str(rest / f"iter_{at}.pth"))
    train(tiny_config(source, rest, resume=True, randomness__seed=0, **changes))
    assert same(weights(rest / "iter_6.pth"), weights(whole / "iter_6.pth"))
    for key in ("loss", "lr", "grad_norm", "ema_momentum"):
        # an iteration that does not step logs no norm of its own
        got, want = ([line.get(key) for line in log_lines(folder)] for folder in (rest, whole))
        assert got == want[at * parts :]


def test_each_iteration_and_process_draws_its_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[float]] = {0: [], 1: []}
    for rank, values in seen.items():
        cfg = tiny_config(source, tmp_path, train_cfg__steps=3, **IN_TWO)
        runner = Runner.from_cfg(cfg)
        monkeypatch.setattr(loops, "get_rank", lambda rank=rank: rank)
        forward = runner.model.forward

        def recording(*args: Any, forward: Any = forward, values: Any = values, **kwargs: Any) -> Any:
            values.append(float(torch.rand(())))
            return forward(*args, **kwargs)

        monkeypatch.setattr(runner.model, "forward", recording)
        runner.train()
    assert len({*seen[0], *seen[1]}) == 2 * 6


def test_resume_reads_no_image_that_it_skips(
    source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jepa_plugins.core.archives import ImageList

    reads: list[int] = []
    original = ImageList.read

    def read(self: ImageList, index: int, *args: Any, **kwargs: Any) -> np.ndarray:
        reads.append(index)
        return original(self, index, *args, **kwargs)

    monkeypatch.setattr(ImageList, "read", read)
    (tmp_path / "last_checkpoint").write_text(str(finished / "iter_4.pth"))
    train(tiny_config(source, tmp_path, resume=True))
    assert len(reads) == 4 + 2  # steps five and six; the latter ends an epoch of ten


def test_the_seed_of_a_resumed_run_is_its_checkpoints(source: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint").write_text(str(finished / "iter_4.pth"))
    train(tiny_config(source, tmp_path, resume=True, randomness__seed=99))
    assert same(weights(tmp_path / "iter_6.pth"), weights(finished / "iter_6.pth"))


def test_what_is_logged(finished: Path) -> None:
    rates = [warmup_cosine(step + 1, 6, 2, 1e-4, 5e-4, 1e-6) for step in range(6)]
    assert logged(finished, "lr") == pytest.approx(rates)
    assert logged(finished, "ema_momentum") == pytest.approx([0.996 + 0.004 * i / 6 for i in range(6)])
    for key in ("target_variance", "explained_variance", "rankme_dense_centred", "context_patches"):
        assert np.isfinite(logged(finished, key)).all()


def test_accumulated_iterations_are_one_batch(source: Path, finished: Path, tmp_path: Path) -> None:
    runner = train(tiny_config(source, tmp_path, **IN_TWO))
    assert runner.iter == 12 and int(runner.model.step) == 6
    close(weights(tmp_path / "iter_6.pth"), weights(finished / "iter_6.pth"))
    lr = logged(tmp_path, "lr")
    assert lr[::2] == lr[1::2] == pytest.approx(logged(finished, "lr"))
    for key in (
        "target_variance",
        "explained_variance",
        "neighbours_by_position",
    ):  # of the whole batch at last
        assert logged(tmp_path, key)[1::2] == pytest.approx(logged(finished, key), rel=1e-3)


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-6, msg=name)


def test_resume_with_another_accumulation(source: Path, finished: Path, tmp_path: Path) -> None:
    train(tiny_config(source, tmp_path / "two", **IN_TWO))
    for name, first, changes in (("a", finished, IN_TWO), ("b", tmp_path / "two", {})):
        rest = tmp_path / name
        rest.mkdir()
        (rest / "last_checkpoint").write_text(str(first / "iter_4.pth"))
        runner = train(tiny_config(source, rest, resume=True, **changes))
        parts = 2 if changes else 1
        assert runner.iter == 6 * parts and int(runner.model.step) == 6
        close(weights(rest / "iter_6.pth"), weights(finished / "iter_6.pth"))
        for key in ("lr", "ema_momentum"):
            values = [line[key] for line in log_lines(rest) if key in line]
            assert values[parts - 1 :: parts] == pytest.approx(logged(finished, key)[4:])


def test_checkpoints_stand_between_steps_and_count_them(source: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"optim_wrapper__accumulative_counts": 3, "train_dataloader__batch_size": 2}
    cfg = tiny_config(source, tmp_path, train_cfg__steps=5, **changes)
    cfg.custom_hooks.append({"type": "StopAt", "iteration": 11})  # inside the fourth step
    train(cfg)
    assert [path.name for path in tmp_path.glob("iter_*.pth")] == ["iter_2.pth"]
    runner = train(tiny_config(source, tmp_path, resume=True, train_cfg__steps=5, **changes))
    assert runner.iter == 15 and int(runner.model.step) == 5
    assert {path.name for path in tmp_path.glob("iter_*.pth")} == {"iter_2.pth", "iter_4.pth", "iter_5.pth"}
    train(tiny_config(source, tmp_path / "whole", train_cfg__steps=5, **changes))
    assert same(weights(tmp_path / "iter_5.pth"), weights(tmp_path / "whole" / "iter_5.pth"))


def test_targets_move_once_a_step_by_the_momentum(source: Path, tmp_path: Path) -> None:
    first = tiny_config(source, tmp_path, train_cfg__steps=3, model__ema=(0.5, 0.5))
    first.default_hooks.checkpoint.interval = 1
    train(first)
    before, after = weights(tmp_path / "iter_2.pth"), weights(tmp_path / "iter_3.pth")
    for online, target in (("encoder", "target_encoder"), ("context_head", "target_head")):
        name = "blocks.0.mlp.fc1.weight"
        moved = 0.5 * before[f"{target}.{name}"] + 0.5 * after[f"{online}.{name}"]
        torch.testing.assert_close(after[f"{target}.{name}"], moved)
        assert not torch.equal(after[f"{target}.{name}"], before[f"{target}.{name}"])


def test_without_the_hook_one_sentence(source: Path, tmp_path: Path) -> None:
    cfg = tiny_config(source, tmp_path)
    cfg.custom_hooks = []
    with pytest.raises(ValueError, match="nothing would move DMTJEPA's targets"):
        train(cfg)


def test_checkpoints_are_plain_and_complete(finished: Path) -> None:
    content = read_checkpoint(finished / "iter_6.pth")  # weights only
    assert {"meta", "state_dict", "optimizer", "param_schedulers", "message_hub"} == set(content)
    assert int(content["state_dict"]["step"]) == 6 and content["meta"]["iter"] == 6
    assert (finished / "last_checkpoint").read_text().endswith("iter_6.pth")


def test_old_checkpoints_go_after_the_new_one_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_config(source, tmp_path, default_hooks__checkpoint__max_keep_ckpts=1))
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_6.pth"]
    real, calls = torch.save, []

    def full_disk(content: Any, file: Any, *args: Any) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(content, file, *args)

    monkeypatch.setattr(torch, "save", full_disk)
    other = tmp_path / "other"
    with pytest.raises(OSError, match="No space"):
        train(tiny_config(source, other, default_hooks__checkpoint__max_keep_ckpts=1))
    assert [path.name for path in other.glob("*.pth")] == ["iter_2.pth"]
    assert (other / "last_checkpoint").read_text().endswith("iter_2.pth")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from mmengine.fileio import get_file_backend

    path = tmp_path / "a.pth"
    path.write_bytes(b"old")
    backend = get_file_backend(str(path), backend_args={"backend": "atomic"})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CheckpointError, match="a.pth could not be written .*older file is left"):
        backend.put(b"new", str(path))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_model_is_not_resumed(source: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint").write_text(str(finished / "iter_6.pth"))
    wider = {"width": 32, "depth": 1, "heads": 2}
    with pytest.raises(CheckpointError, match="another architecture"):
        train(tiny_config(source, tmp_path, resume=True, model__arch=wider))
    deeper = {"width": 24, "depth": 2, "heads": 2}
    with pytest.raises(CheckpointError, match="lacks"):
        train(tiny_config(source, tmp_path, resume=True, model__arch=deeper))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"train_cfg__recipe": {"batch": 8}},
            "batch 4 instead of 8 .*accumulative_counts=2 for the recipe's",
        ),
        ({"train_cfg__recipe": {"images": 11}}, "images 10 instead of 11.*set train_cfg.recipe=None"),
        (
            {"train_cfg__recipe": {"steps_per_epoch": 2, "steps": 7}},
            "epoch 3 instead of 2; steps 6 instead of 7",
        ),
        ({"train_cfg__recipe": {"epochs": 2}}, "train_cfg.recipe has no epochs; it knows batch"),
        ({"train_cfg__epochs": 2}, "either epochs or steps"),
        ({"train_dataloader__batch_sampler": None}, "needs train_dataloader.batch_sampler"),
    ],
)
def test_runs_that_are_not_the_recipe(source: Path, tmp_path: Path, changes: dict, sentence: str) -> None:
    cfg = tiny_config(source, tmp_path, **changes)
    if "train_dataloader__batch_sampler" in changes:
        cfg.train_dataloader.pop("batch_sampler")
    with pytest.raises(ValueError, match=sentence):
        train(cfg)


def test_the_summary_says_what_runs(source: Path, tmp_path: Path) -> None:
    cfg = tiny_config(source, tmp_path, train_cfg__steps=None, train_cfg__epochs=2)
    cfg.param_scheduler[0].ref_batch = 8
    runner = Runner.from_cfg(cfg)
    runner.train()
    text = runner.train_loop.summary()
    for part in (
        "10 images, 3 steps an epoch (the last is smaller)",
        "4 = 4 images x 1 processes x 1 accumulated",
        "6 steps, 2.00 epochs, 20 images",
        "scaled by 0.5, of 8",
        "linear, from 0.04 to 0.4",
    ):
        assert part in text


def test_unreadable_images_stop_a_run_or_are_reported(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 10)
    (folder / "003.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match="raise train_cfg.max_bad"):
        train(tiny_config(folder, tmp_path / "a"))
    train(tiny_config(folder, tmp_path / "b", train_cfg__max_bad=0.2))
    assert "003.png" in (tmp_path / "b" / "unreadable_images.json").read_text()


def test_a_loss_that_explodes_stops(source: Path, tmp_path: Path) -> None:
    cfg = tiny_config(source, tmp_path, optim_wrapper__optimizer__lr=1e30, model__rank_period=1)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(cfg)


def test_bfloat16_trains(source: Path, finished: Path, tmp_path: Path) -> None:
    train(tiny_config(source, tmp_path, optim_wrapper__dtype="bfloat16"))
    assert logged(tmp_path, "loss") == pytest.approx(logged(finished, "loss"), rel=0.02)
    assert logged(tmp_path, "loss") != logged(finished, "loss")


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("more"), 64)


@pytest.mark.parametrize(("momentum", "lr", "collapses"), [(0.98, 1e-3, True), (0.996, 5e-4, False)])
def test_the_warning_catches_a_collapse(
    more: Path, tmp_path: Path, momentum: float, lr: float, collapses: bool, capsys: pytest.CaptureFixture
) -> None:
    """I-JEPA with a fast target and a high learning rate: its loss falls, and so does the target's variance."""
    cfg = tiny_config(
        more,
        tmp_path,
        "ijepa",
        model__arch={"width": 48, "depth": 2, "heads": 3},
        model__ema=(momentum, 1.0),
        optim_wrapper__optimizer__lr=lr,
        train_dataloader__batch_size=8,
        train_cfg__steps=400,
        default_hooks__checkpoint__interval=1000,
        default_hooks__checkpoint__save_last=False,
    )
    cfg.custom_hooks.append({"type": "StopAt", "iteration": 180})
    runner = train(cfg)
    loss = logged(tmp_path, "loss")
    assert loss[-1] < loss[0] / 2
    assert runner.message_hub.get_info("collapse_watch")["warned"] == ["target_variance"] * collapses
    assert capsys.readouterr().out.count("the target is collapsing") == collapses


def test_a_smaller_last_batch_is_no_collapse(tmp_path: Path) -> None:
    """Nine images in batches of eight, and targets that never move: those of one image vary far less."""
    folder = write_images(tmp_path / "images", 9)
    cfg = tiny_config(folder, tmp_path / "run", train_dataloader__batch_size=8, model__ema=(1.0, 1.0))
    runner = train(cfg)
    variance = logged(tmp_path / "run", "target_variance")
    assert min(variance[1::2]) < 0.25 * variance[0] < min(variance[::2])
    assert runner.message_hub.get_info("collapse_watch")["warned"] == []


def test_weights_of_ijepas_published_layout_start_a_run(source: Path, finished: Path, tmp_path: Path) -> None:
    found = weights(finished / "iter_6.pth")
    parts = ("encoder", "predictor", "target_encoder")
    layout: dict[str, Any] = {
        part: {
            f"module.{k.removeprefix(part + '.')}": v for k, v in found.items() if k.startswith(part + ".")
        }
        for part in parts
    }
    torch.save({**layout, "opt": {"state": {}}, "epoch": 3}, tmp_path / "ijepa.pth.tar")
    changes = {"train_cfg__steps": 3, "optim_wrapper__optimizer__lr": 0.0, "model__ema": (1.0, 1.0)}
    cfg = tiny_config(source, tmp_path / "run", "ijepa", load_from=str(tmp_path / "ijepa.pth.tar"), **changes)
    cfg.param_scheduler[0].update(start=0.0, final=0.0)
    got = train(cfg).model.state_dict()
    assert all(torch.equal(got[name], value) for name, value in found.items() if name.split(".")[0] in parts)


def test_a_new_run_from_weights_counts_its_own_steps(source: Path, finished: Path, tmp_path: Path) -> None:
    runner = train(tiny_config(source, tmp_path, load_from=str(finished / "iter_6.pth"), train_cfg__steps=3))
    assert runner.iter == 3 and int(runner.model.step) == 3
    assert logged(tmp_path, "ema_momentum")[0] == pytest.approx(0.996)
    encoder = {f"encoder.{name}": value for name, value in runner.model.encoder.state_dict().items()}
    torch.save({"state_dict": encoder}, tmp_path / "encoder.pth")
    with pytest.raises(CheckpointError, match="encoder.pth lacks .* of target_encoder"):
        train(tiny_config(source, tmp_path / "b", load_from=str(tmp_path / "encoder.pth")))


def test_held_out_images_are_measured_and_change_nothing(
    source: Path, finished: Path, more: Path, tmp_path: Path
) -> None:
    held_out = {"source": str(more), "interval": 2, "images": 12, "batch_size": 5}
    options = {f"default_hooks__held_out__{name}": value for name, value in held_out.items()}
    cfg = tiny_config(source, tmp_path, **options)
    runner = train(cfg)
    assert same(weights(tmp_path / "iter_6.pth"), weights(finished / "iter_6.pth"))
    hook = next(hook for hook in runner.hooks if type(hook).__name__ == "HeldOutHook")
    last = hook.measure(runner.model, hook.dataset)
    for name, value in last.items():
        assert runner.message_hub.get_scalar(f"train/held_out_{name}").current() == pytest.approx(value)
    assert len(runner.message_hub.get_scalar("train/held_out_explained_variance").data[0]) == 3
    assert last["explained_variance"] < 1 and last["target_variance"] > 0
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "list.txt").write_text("broken.png")
    hook.count = 1
    with pytest.raises(ImageError, match="cannot be read"):
        hook.measure(runner.model, type(hook.dataset)(str(tmp_path / "list.txt"), []))


def test_held_out_images_are_read_as_those_that_train(source: Path, more: Path, tmp_path: Path) -> None:
    options = {"train_dataloader__dataset__image_format": "BGR", "default_hooks__held_out__source": str(more)}
    runner = train(tiny_config(source, tmp_path, train_cfg__steps=3, **options))
    hook = next(hook for hook in runner.hooks if type(hook).__name__ == "HeldOutHook")
    assert hook.dataset.image_format == "BGR"


@pytest.mark.parametrize("name", ["dmt_jepa", "dmt_jepa_parameter_free", "dmt_jepa_released", "ijepa"])
def test_the_quick_configurations_hold_images_out(name: str, tmp_path: Path) -> None:
    held_out = Config.fromfile(QUICK / f"{name}.py").default_hooks.held_out
    crop = held_out.pipeline[0]
    assert held_out.type == "HeldOutHook" and crop.size == 80
    assert held_out.source == "datasets/synthetic/val2017" and held_out.interval <= 100
    sentence = r"^default_hooks.held_out.source \(None measures nothing\): '.*none' does not exist: give"
    with pytest.raises(FileNotFoundError, match=sentence):
        Runner.from_cfg(
            tiny_config(
                write_images(tmp_path / "images", 4),
                tmp_path,
                name,
                default_hooks__held_out__source=str(tmp_path / "none"),
            )
        )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_cfg__steps": 1.5}, "train_cfg.steps gives a run of 1.5 steps"),
        ({"train_cfg__steps": 0}, "train_cfg.steps gives a run of 0 steps"),
        ({"train_cfg__max_bad": 2}, "train_cfg.max_bad is a share from 0 to 1, got 2"),
        ({"train_dataloader__batch_size": 0}, "train_dataloader.batch_size is a whole number from 1 on"),
        ({"optim_wrapper__accumulative_counts": 0}, "accumulative_counts is a whole number from 1 on"),
        ({"default_hooks__held_out__interval": 0}, "held_out.interval and batch_size are at least 1, got 0"),
        ({"default_hooks__held_out__batch_size": 0}, "held_out.interval and batch_size are at least 1"),
        ({"default_hooks__held_out__images": 1}, "the variance over at least two images, got 1"),
        (
            {"train_dataloader__dataset__image_format": "L"},
            "images have 1 channels, .*preprocessor.mean has 3",
        ),
    ],
)
def test_bad_entries(source: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    changes = {"default_hooks__held_out__source": str(source), **changes}
    with pytest.raises(ValueError, match=sentence):
        train(tiny_config(source, tmp_path, **changes))
