"""Runs from the command line: mmsegmentation's own tools/train.py, ours, and several processes."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mm_tiny import REPOSITORY, logged, tiny_config, weights, write_images

from jepa_plugins.config_files import list_configs

OURS = REPOSITORY / "tools" / "train.py"


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300)


def written(folder: Path, work_dir: Path, **changes: object) -> str:
    """A tiny configuration as one file, with a single custom_imports."""
    if not (folder / "images").is_dir():
        write_images(folder / "images", 10)
    cfg = tiny_config(folder / "images", work_dir, train_cfg__steps=3, model__mask__scope="global", **changes)
    assert cfg.custom_imports["imports"] == ["jepa_plugins.mm"]
    cfg.default_hooks.checkpoint.interval = 3
    cfg.pop("experiment_name")
    path = folder / f"{work_dir.name}.py"
    cfg.dump(str(path))
    return str(path)


def mmseg_launcher() -> Path:
    spec = importlib.util.find_spec("mmseg")
    if spec is None or spec.origin is None:
        pytest.skip("mmsegmentation is not installed")
    path = Path(spec.origin).parent / ".mim" / "tools" / "train.py"
    if not path.is_file():
        pytest.skip("this mmsegmentation carries no tools")
    return path


def test_mmsegmentations_own_launcher_trains_as_ours_does(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for launcher, folder in ((mmseg_launcher(), theirs), (OURS, ours)):
        done = run([str(launcher), written(tmp_path, folder), "--work-dir", str(folder)])
        assert done.returncode == 0, done.stderr[-2000:]
    first, second = weights(theirs / "iter_3.pth"), weights(ours / "iter_3.pth")
    assert all(torch.equal(first[name], second[name]) for name in second) and len(first) == len(second)
    assert logged(theirs, "loss") == logged(ours, "loss")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    done = run([str(OURS), written(tmp_path, one)])
    assert done.returncode == 0, done.stderr[-2000:]
    config = written(tmp_path, two, train_dataloader__batch_size=2)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*launch, str(OURS), config, "--launcher", "pytorch"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), rel=1e-5)
    assert logged(two, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-4)
    want, got = weights(one / "iter_3.pth"), weights(two / "iter_3.pth")
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["no_such.py"], "No config 'no_such.py'"),
        (
            ["mmseg/dmt_jepa/vit_tiny16.py"],
            "train_dataloader.dataset.source: 'imagenet/train' does not exist: give a folder",
        ),
        (["mmseg/quick/ijepa.py", "--cfg-options", "model.arch=giant"], "model.arch is one of"),
        (["mmseg/quick/ijepa.py", "--launcher", "pytorch"], "--launcher pytorch is for processes that"),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], sentence: str
) -> None:
    import train  # tools/train.py

    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "JEPA_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *options, "--work-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert str(stopped.value).startswith(f"error: {sentence}") and "\n" not in str(stopped.value)


def test_each_configuration_has_a_work_folder_of_its_own(tmp_path: Path) -> None:
    import train  # tools/train.py

    names = [name for name in list_configs() if name.startswith("mmseg/") and "/_base_/" not in name]
    parse = train.build_parser().parse_args
    folders = [train.configuration(parse([f"configs/{name}"])).work_dir for name in names]
    assert len(set(folders)) == len(names) > 40
    at = dict(zip(names, folders, strict=True))
    assert at["mmseg/dmt_jepa/vit_base16.py"] == os.path.join("work_dirs", "dmt_jepa", "vit_base16")
    assert at["mmseg/ijepa/released/vit_base16.py"] == os.path.join("work_dirs", "ijepa/released/vit_base16")
    mine = tmp_path / "dmt_jepa" / "mine.v2.py"
    mine.parent.mkdir()
    mine.write_text("a = 1\n")
    assert train.configuration(parse([str(mine)])).work_dir == os.path.join("work_dirs", "mine.v2")


def test_an_evaluation_has_the_trainings_work_folder() -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools" / "test.py"))
    args = tool["build_parser"]().parse_args(["mmseg/quick/upernet.py", "iter_300.pth"])
    assert tool["configuration"](args).work_dir == os.path.join("work_dirs", "quick", "upernet")


def test_options_reach_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train  # tools/train.py

    args = ["mmseg/quick/dmt_jepa.py", "--amp", "--resume", "--cfg-options", "train_cfg.steps=7"]
    cfg = train.configuration(train.build_parser().parse_args(args))
    assert cfg.optim_wrapper.dtype == "bfloat16" and cfg.resume and cfg.train_cfg.steps == 7
    assert cfg.work_dir == os.path.join("work_dirs", "quick", "dmt_jepa")
    cfg.optim_wrapper = {"type": "OptimWrapper"}
    train.use_mixed_precision(cfg)
    assert json.loads(json.dumps(cfg.optim_wrapper.to_dict())) == {
        "type": "AmpOptimWrapper",
        "loss_scale": "dynamic",
    }
    cfg.optim_wrapper = {"type": "Other"}
    with pytest.raises(ValueError, match="--amp does not know"):
        train.use_mixed_precision(cfg)
