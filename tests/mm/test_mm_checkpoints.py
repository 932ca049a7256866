"""mmengine reads checkpoints without running their code once jepa_plugins.mm is imported."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.logging import HistoryBuffer  # noqa: E402
from mmengine.runner import load_checkpoint, save_checkpoint  # noqa: E402

import jepa_plugins.mm  # noqa: E402, F401
from jepa_plugins.core.checkpoints import TRUST, CheckpointError  # noqa: E402
from jepa_plugins.mm.checkpoints import load_from_local  # noqa: E402
from jepa_plugins.mm.hooks import plain  # noqa: E402

RAN = "JEPA_TEST_CODE_RAN"


class Payload:
    def __reduce__(self) -> tuple:
        return os.putenv, (RAN, "1")


class Attribute:
    """Pickled as a call of getattr, as mmengine's histories are."""

    def __reduce__(self) -> tuple:
        return getattr, (HistoryBuffer, "__init__")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    path = tmp_path / "foreign.pth"
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "extra": Payload()}, path)
    return path


def test_code_in_a_checkpoint_does_not_run(foreign: Path) -> None:
    with pytest.raises(CheckpointError, match="foreign.pth is not read because it holds more than weights"):
        load_checkpoint(nn.Linear(2, 2), str(foreign))


def test_only_statistics_are_admitted_as_attributes(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "extra": Attribute()}, tmp_path / "attribute.pth")
    with pytest.raises(CheckpointError, match="attribute"):
        load_checkpoint(nn.Linear(2, 2), str(tmp_path / "attribute.pth"))


def test_a_trusted_file_is_read(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST, os.pathsep.join(["other.pth", str(foreign)]))
    model = nn.Linear(2, 2)
    load_checkpoint(model, str(foreign))
    assert torch.equal(model.weight, torch.load(foreign, weights_only=False)["state_dict"]["weight"])


def test_mmengines_own_checkpoints_are_read(tmp_path: Path) -> None:
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    content = {
        "state_dict": OrderedDict(nn.Linear(2, 2).state_dict()),
        "message_hub": {"log_scalars": OrderedDict({"train/loss": history}), "runtime_info": OrderedDict()},
    }
    save_checkpoint(content, str(tmp_path / "stock.pth"))
    read = load_from_local(str(tmp_path / "stock.pth"))
    assert read["message_hub"]["log_scalars"]["train/loss"].mean() == 1.5
    assert load_from_local(str(tmp_path / "stock.pth"), "meta")["state_dict"]["weight"].is_meta


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint .*none.pth"):
        load_from_local(str(tmp_path / "none.pth"))
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(CheckpointError, match="cut.pth is truncated or damaged"):
        load_checkpoint(nn.Linear(2, 2), str(tmp_path / "cut.pth"))


def test_plain_values() -> None:
    import numpy as np

    content = {"a": [np.float64(1.5), (np.int64(2), "x")], "b": OrderedDict(c=HistoryBuffer([3.0], [1]))}
    out = plain(content)
    assert out["a"] == [1.5, (2, "x")] and type(out["a"][0]) is float
    assert [part.tolist() for part in out["b"]["c"]] == [[3.0], [1.0]]
    assert isinstance(out["b"], OrderedDict)
