"""tools/prepare_data.py check: what each data set needs, what is there, and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import prepare_data  # noqa: E402
from preparing import check, expected  # noqa: E402
from preparing.expected import DATA_SETS, DataSet, Part  # noqa: E402


@pytest.fixture()
def small(monkeypatch) -> tuple[DataSet, ...]:
    """The same data sets with at most three files of a kind."""
    reduced = tuple(
        DataSet(
            item.name,
            item.registered,
            item.folder,
            tuple(Part(part.pattern, min(part.count, 3), part.source, part.use) for part in item.parts),
        )
        for item in DATA_SETS
    )
    monkeypatch.setattr(check, "DATA_SETS", reduced)
    return reduced


def fill(root: Path, item: DataSet) -> None:
    """Write every file that a data set needs."""
    for part in item.parts:
        for number in range(part.count):
            path = root / item.folder / part.pattern.replace("*", f"n{number}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}" if path.suffix == ".json" else "")


def run(root: Path, *names: str) -> int:
    return prepare_data.main(["check", *names, "--root", str(root)])


def test_a_whole_tree_is_complete(small, tmp_path: Path, capsys) -> None:
    for item in small:
        fill(tmp_path, item)
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "11 of 11 data sets are complete" in out
    assert "missing" not in out and "to do" not in out and "ok, 3 files" in out


def test_an_empty_folder_lists_everything_and_what_to_do(tmp_path: Path, capsys) -> None:
    assert run(tmp_path) == 1
    out = capsys.readouterr().out
    for item in DATA_SETS:
        for part in item.parts:
            assert part.pattern in out
            assert expected.SOURCES[part.source].format(root=tmp_path) in out
    assert "0 of 11 data sets are complete" in out


def test_what_is_missing_and_what_is_cut_short(small, tmp_path: Path, capsys) -> None:
    item = next(item for item in small if item.name == "ade20k_panoptic")
    fill(tmp_path, item)
    folder = tmp_path / "ADEChallengeData2016"
    (folder / "ade20k_panoptic_train/n1.png").unlink()
    (folder / "ade20k_panoptic_val.json").write_text('{"images": [{"id": 1, "fi')
    assert run(tmp_path, "ade20k_panoptic") == 1
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.strip()]
    states = {line[0]: line[1] for line in lines if len(line) == 2}
    assert states["ade20k_panoptic_train/*.png"] == "2 of 3 files"
    assert states["ade20k_panoptic_val.json"].startswith("damaged")
    assert states["images/training/*.jpg"] == "ok, 3 files"
    assert sum(line[0] == "to" for line in lines) == 1 and "prepare_data.py ade20k" in str(lines)


def test_what_only_some_figures_need_may_be_missing(small, tmp_path: Path, capsys) -> None:
    item = next(item for item in small if item.name == "coco_panoptic")
    fill(tmp_path, item)
    (tmp_path / "coco/annotations/instances_val2017.json").unlink()
    assert run(tmp_path, "coco_panoptic") == 0
    out = capsys.readouterr().out
    assert "missing (only for AP)" in out and "to do" in out


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (["ade20k"], {"ade20k_semantic", "ade20k_panoptic", "ade20k_instance"}),
        (["ade20k_sem_seg_val"], {"ade20k_semantic"}),
        (["coco_2017_train"], {"coco_instance"}),
        (["coco_2017_val_panoptic_with_sem_seg", "imagenet"], {"coco_panoptic", "imagenet"}),
        (["imagenet_"], {"imagenet_val"}),
        (["ade20k_instance_train_5pct"], {"ade20k_instance"}),
        (["cityscapes_fine_p", "cityscapes_panoptic"], {"cityscapes_panoptic"}),
        ([], {item.name for item in DATA_SETS}),
    ],
)
def test_names_choose(names: list[str], want: set[str]) -> None:
    chosen = [item.name for item in check.select(names)]
    assert set(chosen) == want and len(chosen) == len(want)


def test_an_unknown_name_is_one_sentence(tmp_path: Path, capsys) -> None:
    assert run(tmp_path, "ade21k") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: no data set 'ade21k'") and captured.err.count("\n") == 1
    assert not captured.out


def test_the_folder_comes_from_the_environment(tmp_path: Path) -> None:
    """As a command, without the packages that training needs."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/prepare_data.py"), "check", "imagenet"],
        capture_output=True,
        text=True,
        env={"DETECTRON2_DATASETS": str(tmp_path / "gone"), "PATH": ""},
    )
    assert done.returncode == 1 and f"{tmp_path / 'gone'} does not exist" in done.stdout
    assert "train/*/*.JPEG  missing" in done.stdout


def test_the_trees_are_those_that_the_registrations_read() -> None:
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetCatalog, MetadataCatalog

    import jepa_plugins.d2  # noqa: F401
    from jepa_plugins.d2.data.schemes import data_root

    keys = ("image_root", "image_dir", "sem_seg_root", "gt_dir", "panoptic_root", "panoptic_json")
    names = [(item, name) for item in DATA_SETS for name in item.registered if "/" not in name]
    assert len(names) == 30
    for item, name in names:
        assert name in DatasetCatalog, name
        patterns = [f"{item.folder}/{part.pattern}" for part in item.parts]
        metadata = MetadataCatalog.get(name)
        places = {Path(metadata.get(key)).relative_to(data_root()) for key in keys if metadata.get(key)}
        assert places
        for place in places:
            assert any(f"{pattern}/".startswith(f"{place.as_posix()}/") for pattern in patterns), (
                name,
                place,
            )


def test_every_data_set_of_the_configurations_is_known() -> None:
    pytest.importorskip("detectron2")
    from jepa_plugins.config_files import list_configs
    from jepa_plugins.d2.config import get_config

    known = {name for item in DATA_SETS for name in item.registered}
    for name in list_configs():
        if name.endswith(".yaml") and "/quick/" not in name and name.startswith("detectron2/"):
            data = get_config(name).DATASETS
            assert {*data.TRAIN, *data.TEST, *data.UNLABELLED} <= known, name
