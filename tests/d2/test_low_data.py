"""Low-data runs: the same few images for all arms and tasks, by a rule on their names."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("detectron2")

import prepare_data  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from tiny import BACKBONE, SMALL, losses_of, options, save_segmentation, train  # noqa: E402

from jepa_plugins.core.subsets import LOW_DATA_PERCENT, share_of, share_size, stem_of  # noqa: E402
from jepa_plugins.d2 import get_config  # noqa: E402
from jepa_plugins.d2.data.builtin import SHARES  # noqa: E402
from jepa_plugins.d2.data.catalog import check_num_classes, ensure_registered, num_classes  # noqa: E402
from jepa_plugins.d2.evaluation import build_evaluator  # noqa: E402

ADE20K = [f"ADE_train_{k:08d}" for k in range(1, 20211)]
LOW_DATA = "detectron2/mask2former/ade20k/low_data"
TASKS = {"semantic": "ade20k_sem_seg", "panoptic": "ade20k_panoptic", "instance": "ade20k_instance"}
names = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=80, unique=True)


# --- the rule ---


def test_the_published_counts_and_the_same_images_for_ever() -> None:
    shares = {percent: share_of(ADE20K, percent) for percent in LOW_DATA_PERCENT}
    assert {percent: len(share) for percent, share in shares.items()} == {1: 202, 2: 404, 5: 1010, 10: 2021}
    assert set(shares[1]) < set(shares[2]) < set(shares[5]) < set(shares[10]) < set(ADE20K)
    digest = hashlib.sha256("\n".join(shares[10]).encode()).hexdigest()
    assert digest == "0e385d1c91d9a3552253ae32e4ce99074f9ea4a523abec1f8ec174560a01d52a"
    assert shares[1][:3] == ["ADE_train_00000132", "ADE_train_00000240", "ADE_train_00000267"]


@given(names, st.randoms(use_true_random=False))
def test_the_order_of_the_names_does_not_matter(images: list[str], random) -> None:
    mixed = [*images, images[0]]
    random.shuffle(mixed)
    assert share_of(mixed, 30) == share_of(images, 30)


@given(names, st.integers(1, 100), st.integers(1, 100))
def test_shares_are_nested_and_of_exact_size(images: list[str], one: int, other: int) -> None:
    low, high = sorted((one, other))
    small, large = share_of(images, low), share_of(images, high)
    assert set(small) <= set(large) <= set(images)
    assert len(small) == len(set(small)) == max(1, len(images) * low // 100)
    assert small == sorted(small)


@given(names, st.text(min_size=1, max_size=8))
def test_a_further_image_moves_at_most_one(images: list[str], new: str) -> None:
    """Which comes first of two images does not depend on the others."""
    before, after = set(share_of(images, 50)), set(share_of([*images, new], 50))
    assert len(before - after) <= 1 and len(after - before) <= 1


def test_parts_of_a_percent_are_exact() -> None:
    assert share_size(1000, "0.1") == 1 and share_size(1000, "0.7") == 7 and share_size(1000, "99.9") == 999
    assert share_size(3, 100) == 3 and share_size(3, 1) == 1 and share_size(0, 5) == 0


@pytest.mark.parametrize("percent", ["0", "-1", "101", "x", "", "1/0"])
def test_no_percentage_is_one_sentence(percent: str) -> None:
    with pytest.raises(ValueError, match="no percentage above 0 and up to 100") as caught:
        share_size(10, percent)
    assert "\n" not in str(caught.value)


# --- names ---


def test_ade20ks_names_are_registered_with_the_metadata_of_the_whole() -> None:
    assert len(SHARES) == 12 and set(SHARES) <= set(DatasetCatalog.list())
    for task, base in TASKS.items():
        name = f"{base}_train_5pct"
        assert num_classes(name) == {"semantic": 150, "panoptic": 150, "instance": 100}[task]
        whole = MetadataCatalog.get(f"{base}_train").as_dict()
        own = MetadataCatalog.get(name).as_dict()
        assert own == {**whole, "name": name, "share_of": f"{base}_train"}


def _records(count: int, suffix: str) -> list[dict]:
    return [{"file_name": f"/x/ADE_train_{k:08d}{suffix}"} for k in range(1, count + 1)]


def test_the_three_tasks_share_their_images(monkeypatch) -> None:
    for base, suffix in zip(TASKS.values(), (".jpg", ".jpg", ".jpeg"), strict=True):
        records = _records(20210, suffix)
        monkeypatch.setitem(DatasetCatalog.data, f"{base}_train", lambda records=records: records)
    for percent, count in zip((1, 2, 5, 10), (202, 404, 1010, 2021), strict=True):
        chosen = [
            [stem_of(record["file_name"]) for record in DatasetCatalog.get(f"{base}_train_{percent}pct")]
            for base in TASKS.values()
        ]
        assert chosen[0] == chosen[1] == chosen[2] == share_of(ADE20K, percent) and len(chosen[0]) == count


@pytest.fixture()
def generated(tmp_path: Path) -> str:
    return save_segmentation(tmp_path / "data", count=8)


def test_a_share_of_an_own_data_set_by_its_name(generated: str) -> None:
    whole, share, same = (f"folder_semantic@{generated}@training{end}" for end in ("", "@25%", "@25.0%"))
    ensure_registered([share, same])
    records = DatasetCatalog.get(share)
    assert len(records) == 2 and records == DatasetCatalog.get(same)
    assert [record for record in DatasetCatalog.get(whole) if record in records] == records
    assert num_classes(share) == 12
    build_evaluator(get_config("detectron2/quick/semantic.yaml"), share)  # labels lie beside the images


def test_a_share_of_a_registered_data_set_is_not_evaluated(tmp_path: Path) -> None:
    ensure_registered("ade20k_instance_val@5%")
    cfg = get_config("detectron2/quick/instance.yaml", ["OUTPUT_DIR", str(tmp_path)])
    with pytest.raises(ValueError, match=r"evaluate on 'ade20k_instance_val'\.") as caught:
        build_evaluator(cfg, "ade20k_instance_val@5%")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ["@0%", "@101%", "@five%", "@%"])
def test_a_wrong_share_is_one_sentence(generated: str, end: str) -> None:
    name = f"folder_semantic@{generated}@training{end}"
    with pytest.raises(ValueError, match="no percentage above 0") as caught:
        ensure_registered(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="SCHEME@ROOT@SPLIT"):
        ensure_registered("nonsense@5%")


# --- configurations ---


@pytest.mark.parametrize("percent", LOW_DATA_PERCENT)
@pytest.mark.parametrize("task", TASKS)
def test_both_arms_of_a_configuration(task: str, percent: int) -> None:
    plain = get_config(f"{LOW_DATA}/{task}_R50_{percent}pct.yaml")
    arm = get_config(f"{LOW_DATA}/{task}_R50_{percent}pct_mask_jepa.yaml")
    name = f"{TASKS[task]}_train_{percent}pct"
    assert plain.DATASETS.TRAIN == arm.DATASETS.TRAIN == (name,) and name in SHARES
    for cfg, base in ((plain, f"{task}_R50"), (arm, f"{task}_R50_mask_jepa")):
        whole = get_config(f"detectron2/mask2former/ade20k/{base}.yaml")
        assert cfg.SOLVER.MAX_ITER == 160000
        whole.DATASETS.TRAIN = (name,)
        assert cfg == whole


def test_a_run_on_a_share_of_generated_data(generated: str, tmp_path: Path) -> None:
    data = {"DATASETS.TRAIN": (f"folder_semantic@{generated}@training@25%",)}
    data["DATASETS.TEST"] = (f"folder_semantic@{generated}@validation",)
    own = {"SOLVER.MAX_ITER": 2, "OUTPUT_DIR": str(tmp_path / "out")}
    cfg = get_config("detectron2/quick/semantic.yaml", options(SMALL, BACKBONE, data, own))
    check_num_classes(cfg, cfg.DATASETS.TRAIN[0])
    trainer = train(cfg)
    assert len(losses_of(trainer)) == 2
    assert "mIoU" in trainer.test(cfg, trainer.model)["sem_seg"]


# --- lists ---


def test_the_lists_name_the_images_that_the_names_choose(tmp_path: Path, capsys) -> None:
    images = tmp_path / "images" / "training"
    images.mkdir(parents=True)
    for name in ADE20K[:300]:
        (images / f"{name}.jpg").touch()
    assert prepare_data.main(["low-data", "--out", str(tmp_path), "--any-count"]) == 0
    for percent in LOW_DATA_PERCENT:
        lines = (tmp_path / "low_data" / f"train_{percent}pct.txt").read_text().splitlines()
        assert lines == share_of(ADE20K[:300], percent)
    capsys.readouterr()
    assert prepare_data.main(["low-data", "--out", str(tmp_path)]) == 1
    assert "300 of 20,210 training images" in capsys.readouterr().err


def test_lists_without_images_are_one_sentence(tmp_path: Path, capsys) -> None:
    assert prepare_data.main(["low-data", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "holds no images" in error and error.count("\n") == 1
