"""Pictures of a pre-trained ViT: whole commands on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "mm"))

from mm_tiny import tiny_config, train, weights, write_images  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

pytest.importorskip("matplotlib")

import vit_figures  # noqa: E402

from jepa_plugins.core.checkpoints import save_atomic  # noqa: E402

GRID, PATCH = (8, 8), 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a tiny configuration and its checkpoint after four steps."""
    folder = tmp_path_factory.mktemp("vit_figures")
    write_images(folder / "images", 4)
    cfg = tiny_config(folder / "images", folder / "run", train_cfg__steps=4, randomness__seed=3)
    cfg.dump(str(folder / "config.py"))
    runner = train(cfg)
    assert runner.iter == 4
    return folder


def command(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str, **changed: str) -> list[Path]:
    out = [folder / "pictures" / "attention.png", folder / "pictures" / "similarity.png"]
    options = {
        "weights": str(folder / "run" / "iter_4.pth"),
        "images": str(folder / "images"),
        "count": "2",
        **changed,
    }
    named = [part for name, value in options.items() for part in (f"--{name}", value)]
    arguments = [str(folder / "config.py"), *named, "--out", *map(str, out), *more]
    monkeypatch.delenv("JEPA_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["vit_figures.py", *arguments])
    vit_figures.main()
    return out


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """The columns that the command saves, by file name."""
    saved: dict[str, list] = {}
    plain = vit_figures.save_columns

    def save(columns: list, path: str) -> None:
        saved[Path(path).stem] = columns
        plain(columns, path)

    monkeypatch.setattr(vit_figures, "save_columns", save)
    return saved


def test_the_whole_command(trained, monkeypatch, columns, capsys) -> None:
    out = command(trained, monkeypatch)
    assert capsys.readouterr().out.split()[-2:] == [str(path) for path in out]
    assert all(Image.open(path).format == "PNG" and Image.open(path).size[0] > 300 for path in out)
    titles = {name: [title for title, _, _ in found] for name, found in columns.items()}
    parts = ["attention", "mean attention", "LAT", "mean LAT"]
    pairs = [f"{part}, {when}" for part in parts for when in ("before", "after")]
    assert titles["attention"] == ["query patch", *pairs]
    pairs = [f"{part}, {when}" for part in ("cosine", "top 10 %") for when in ("before", "after")]
    assert titles["similarity"] == ["query patch", *pairs]
    for title, pictures, captions in columns["attention"] + columns["similarity"]:
        assert len(pictures) == len(captions) == 2
        for picture in pictures:
            assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
            framed = (picture[16:20, 16:20] == vit_figures.MARK).all(-1)  # the centre's patch
            assert framed.sum() == (0 if title.startswith("mean") else 12)


def test_an_ijepa_checkpoint_has_no_aggregation(trained, tmp_path, monkeypatch, columns) -> None:
    model = MODELS.build(Config.fromfile(trained / "config.py").model)
    held = {k: v for k, v in model.state_dict().items() if "_head" not in k}
    save_atomic({"state_dict": held}, tmp_path / "ijepa.pth")
    options = ["--cfg-options", "model.msn=None", "model.lat=None"]
    command(trained, monkeypatch, *options, weights=str(tmp_path / "ijepa.pth"))
    assert [title for title, _, _ in columns["attention"]][-1] == "mean attention, after"


def test_before_is_the_runs_own_start_and_after_its_checkpoint(trained: Path) -> None:
    cfg = Config.fromfile(trained / "config.py")
    cfg.work_dir, cfg.experiment_name = str(trained / "again"), "again"
    start = Runner.from_cfg(cfg).model.state_dict()
    torch.manual_seed(99)
    before = vit_figures.built_model(cfg, None).state_dict()
    assert all(torch.equal(before[name], start[name]) for name in start)
    after = vit_figures.built_model(cfg, str(trained / "run" / "iter_4.pth")).state_dict()
    held = weights(trained / "run" / "iter_4.pth")
    assert all(torch.equal(after[name], held[name]) for name in held)
    assert not torch.equal(after["target_encoder.norm.weight"], before["target_encoder.norm.weight"])


def test_pictures_show_the_values_of_their_patches() -> None:
    drawer = vit_figures.Drawer(GRID, PATCH, 10)
    values, image = torch.zeros(64), np.full((32, 32, 3), 200, np.uint8)
    values[3], values[60] = 1.0, 0.5
    over = vit_figures.rounded(drawer.over(image, values, 1.0))
    assert (over[20:24] == 50).all()  # dimmed where there is no weight
    brightest, half = over[0:4, 12:16].reshape(-1, 3), over[28:32, 16:20].reshape(-1, 3)
    assert len(np.unique(brightest, axis=0)) == 1 and len(np.unique(half, axis=0)) == 1
    assert brightest[0].sum() > half[0].sum() > 150
    marks = drawer.chosen(image, values > 0.6)
    assert (marks[0:4, 12:16] == 200).all() and (marks[28:32, 16:20] == 50).all()
    assert (marks[4:8, 8:12][0] == vit_figures.MARK).all()  # patch 10: row 1, column 2


def test_crops_are_centred_and_in_the_models_order(tmp_path: Path) -> None:
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20, 0] = 255
    (tmp_path / "one").mkdir()
    Image.fromarray(picture).save(tmp_path / "one" / "a.png")
    (crop,) = vit_figures.read_crops(str(tmp_path / "one"), 5, "BGR", (10, 10))
    assert (crop == [0, 0, 255]).all() and (vit_figures.shown(crop, "BGR") == [255, 0, 0]).all()


@pytest.mark.parametrize(
    ("changed", "more", "sentence"),
    [
        ({"weights": "absent.pth"}, [], "absent.pth"),
        ({"images": "absent"}, [], "--images: 'absent' does not exist: give a folder"),
        ({"count": "0"}, [], "--count is a number of images from 1 on, got 0"),
        ({}, ["--query", "2", "0"], "--query is a place from 0 0"),
        ({}, ["--cfg-options", "model.type=JEPAViT"], "describes the model JEPAViT: give the configuration"),
        ({}, ["--cfg-options", "model.arch.width=16"], "weights of another architecture"),
        ({}, ["--cfg-options", "model.arch.wide=16"], "model.arch needs width, depth and heads and no more"),
    ],
)
def test_errors_are_one_sentence(trained, monkeypatch, changed, more, sentence) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(trained, monkeypatch, *more, **changed)
    text = str(stopped.value)
    assert text.startswith("error: ") and sentence in text and "\n" not in text


def test_a_checkpoint_without_target_encoder_is_refused(trained, tmp_path, monkeypatch) -> None:
    held = {k: v for k, v in weights(trained / "run" / "iter_4.pth").items() if "target_encoder" not in k}
    save_atomic({"state_dict": held}, tmp_path / "half.pth")
    with pytest.raises(SystemExit, match="half.pth lacks .* tensors of target_encoder"):
        command(trained, monkeypatch, weights=str(tmp_path / "half.pth"))
