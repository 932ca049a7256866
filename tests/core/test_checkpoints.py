"""Reading, writing and loading of checkpoints."""

from __future__ import annotations

import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jepa_plugins.core.checkpoints import (
    CheckpointError,
    describe,
    drop_batch_counters,
    load_into,
    read_checkpoint,
    save_atomic,
    state_dict_of,
)


class Head(nn.Module):
    """Renames names of version 1, as the published MaskFormerHead does."""

    _version = 2

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.pixel_decoder = nn.Linear(4, 4)
        self.predictor = nn.ModuleDict({"class_embed": nn.Linear(4, classes + 1)})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if (local_metadata.get("version") or 1) < 2:
            for name in [n for n in state_dict if n.startswith(prefix)]:
                if not name.startswith(prefix + "predictor."):
                    state_dict[prefix + "pixel_decoder." + name[len(prefix) :]] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Model(nn.Module):
    def __init__(self, classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 4, 1))
        self.sem_seg_head = Head(classes)


def trained(**kwargs: int) -> Model:
    torch.manual_seed(5)
    model = Model(**kwargs)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    return model


def equal(left: nn.Module, right: nn.Module) -> bool:
    theirs = right.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in left.state_dict().items())


def one_sentence(error: pytest.ExceptionInfo, *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text and not re.search(r"\.\s+[A-Z]", text), text
    for word in words:
        assert word in text, text


# --- files


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_round_trip_keeps_weights_versions_and_entries(tmp_path: Path, suffix: str) -> None:
    model = trained()
    path = tmp_path / f"model{suffix}"
    save_atomic({"model": model.state_dict(), "jepa_export": {"format": 1, "tensors": 4}}, path)
    content = read_checkpoint(path)
    weights = state_dict_of(content)
    assert content["jepa_export"] == {"format": 1, "tensors": 4}
    assert weights._metadata["sem_seg_head"]["version"] == 2
    target = Model()
    load_into(target, weights, required=[""])
    assert equal(target, model)


def test_safetensors_takes_tied_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    save_atomic({"a": base, "b": base.t(), "c": base[1:]}, tmp_path / "w.safetensors")
    weights = state_dict_of(read_checkpoint(tmp_path / "w.safetensors"))
    assert torch.equal(weights["b"], base.t()) and torch.equal(weights["c"], base[1:])


def test_safetensors_of_others_loads_without_versions(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "w.safetensors", metadata={"format": "pt", "note": "{broken"})
    content = read_checkpoint(tmp_path / "w.safetensors")
    assert content["note"] == "{broken" and not hasattr(state_dict_of(content), "_metadata")


def test_safetensors_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        save_atomic(
            {"model": {"a": torch.ones(1)}, "optimizer": {"m": torch.ones(1)}}, tmp_path / "w.safetensors"
        )
    one_sentence(error, "w.safetensors", ".pth")
    assert not list(tmp_path.iterdir())


def test_torch_files_may_hold_numpy_state(tmp_path: Path) -> None:
    state = {
        "empty": np.ones(0),
        "rng": np.random.RandomState(0).get_state(),
        "best": np.float64(3.5),
        "when": np.int64(7),
    }
    torch.save(state, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert found["empty"].shape == (0,) and found["best"] == 3.5 and found["when"] == 7
    assert np.array_equal(found["rng"][1], state["rng"][1])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    protocol=st.integers(0, pickle.HIGHEST_PROTOCOL),
    dtype=st.sampled_from(["<f4", "<f8", "<i8", "<f2", "|u1", "|b1"]),
    shape=st.lists(st.integers(0, 4), max_size=3),
    fortran=st.booleans(),
)
def test_pickled_arrays_of_every_protocol(tmp_path: Path, protocol, dtype, shape, fortran) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    array = np.asfortranarray(array) if fortran else array
    weights = OrderedDict(w=array, scalar=np.float32(2.5))
    weights._metadata = OrderedDict({"": {"version": 1}})
    content = {"model": weights, "__author__": "someone", "tags": {1, 2}, "names": ("a", None, True, 1.5)}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_checkpoint(tmp_path / "zoo.pkl")
    assert found["tags"] == {1, 2} and found["names"] == ("a", None, True, 1.5)
    tensors = state_dict_of(found)
    assert tensors["w"].shape == array.shape and np.array_equal(tensors["w"].numpy(), array)
    assert tensors["scalar"].item() == 2.5
    assert tensors._metadata[""] == {"version": 1}


@pytest.mark.parametrize("package", [b"numpy.core", b"numpy._core"])
def test_pickles_of_numpy_1_and_2(tmp_path: Path, package: bytes) -> None:
    data = pickle.dumps({"w": np.arange(3.0), "s": np.float32(1)}, protocol=2)
    data = re.sub(rb"numpy\._?core(?=\.multiarray)", package, data)
    assert package + b".multiarray" in data
    (tmp_path / "zoo.pkl").write_bytes(data)
    assert np.array_equal(read_checkpoint(tmp_path / "zoo.pkl")["w"], np.arange(3.0))


def test_pickles_of_python_2(tmp_path: Path) -> None:
    # {"k": numpy.array([1.5], "<f4")} as Python 2 wrote it: bytes in STRING opcodes, not latin1-encoded text
    data = (
        b"\x80\x02}q\x00U\x01kq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85"
        b"U\x01b\x87R(K\x01K\x01\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x04\x00\x00\xc0?tbs."
    )
    (tmp_path / "old.pkl").write_bytes(data)
    assert read_checkpoint(tmp_path / "old.pkl")["k"].tolist() == [1.5]


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_code_in_a_file_is_refused_unless_trusted(tmp_path: Path, suffix: str) -> None:
    path, mark = tmp_path / f"evil{suffix}", tmp_path / "mark"
    content = {"model": {"w": np.ones(2)}, "extra": Payload(mark)}
    path.write_bytes(pickle.dumps(content)) if suffix == ".pkl" else torch.save(content, path)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path, trust=[tmp_path / "another.pkl"])
    one_sentence(error, str(path), "mkdir", "--trust")
    assert not mark.exists()
    read_checkpoint(path, trust=[path])
    assert mark.exists()


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_class_of_the_author_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    content = {"model": {"w": np.ones(2)}, "args": Path("x")}
    path.write_bytes(pickle.dumps(content)) if suffix == ".pkl" else torch.save(content, path)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    one_sentence(error, str(path), "Path", "--trust")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_truncated_files(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": {f"w{i}": np.ones(50) for i in range(9)}}))
    else:
        save_atomic(trained().state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: max(1, int(share * len(data)))])
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    one_sentence(error, str(path), "truncated or damaged", "again")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>not found</html>", "web page"),
        (b"\x00" * 500, "damaged"),
        (pickle.dumps([1, 2]), "list"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    one_sentence(error, str(path), words)


def test_missing_file_folder_and_suffix(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        read_checkpoint(tmp_path / "none.pth")
    one_sentence(error, "none.pth")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path)
    one_sentence(error, "folder")
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path / "a.onnx")
    one_sentence(error, "a.onnx", ".safetensors")


class Unwritable:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    save_atomic({"w": torch.ones(2)}, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError) as error:
        save_atomic({"w": torch.zeros(2), "x": Unwritable()}, path)
    one_sentence(error, str(path), "No space left")
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_atomic({"w": torch.zeros(2), "x": lambda: 1}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_kill_during_the_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.safetensors"
    save_atomic({"w": torch.ones(2)}, path)
    before = path.read_bytes()

    def killed(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        save_atomic({"w": torch.zeros(2)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    save_atomic({"w": torch.ones(2)}, tmp_path / "deep" / "a.pth")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "deep" / "a.pth").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(CheckpointError) as error:
        save_atomic({"w": torch.ones(2)}, tmp_path / "a.bin")
    one_sentence(error, "a.bin", ".safetensors")


# --- state dicts


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "meta": {}}]
)
def test_weights_are_found_and_unwrapped(wrap) -> None:
    model = trained()
    wrapped = nn.ModuleDict({"module": model})
    weights = state_dict_of(wrap(wrapped.state_dict()))
    assert list(weights) == list(model.state_dict())
    assert weights._metadata["sem_seg_head"]["version"] == 2
    target = Model()
    load_into(target, weights, required=[""])
    assert equal(target, model)


def test_a_file_without_weights() -> None:
    with pytest.raises(CheckpointError) as error:
        state_dict_of({"epoch": 3, "state": {"w": torch.ones(1)}})
    one_sentence(error, "'epoch'", "int")


def test_looks() -> None:
    assert "Mask-JEPA" in describe(["backbone.a", "jepa.mask_token"])
    assert "EfficientNet" in describe(["conv_stem.weight", "bn1.weight"])
    assert "unknown" in describe(["a", "b"]) and "without weights" in describe([])


# --- loading


def test_report_lists_everything() -> None:
    weights = trained().state_dict()
    del weights["sem_seg_head.predictor.class_embed.bias"]
    weights["sem_seg_head.predictor.old.weight"] = torch.ones(1)
    report = load_into(Model(), weights, leave_out=["backbone.2"], source="file.pth")
    assert report.missing == [
        "backbone.2.weight",
        "backbone.2.bias",
        "sem_seg_head.predictor.class_embed.bias",
    ]
    assert report.left_out == ["backbone.2.weight", "backbone.2.bias"]
    assert report.unexpected == ["sem_seg_head.predictor.old.weight"]
    assert len(report.loaded) == len(weights) - 3 == report.offered - 1
    for words in ("file.pth", "10 of 11", "left out", "backbone.2", "predictor.old", "class_embed.bias"):
        assert words in str(report), str(report)


def version_1(weights: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
    old = OrderedDict((name.replace("pixel_decoder.", ""), value) for name, value in weights.items())
    old._metadata = OrderedDict({"": {"version": 1}, "sem_seg_head": {"version": 1}})
    return old


@pytest.mark.parametrize("metadata", [True, False])
def test_version_1_names_are_renamed_and_reported(metadata: bool) -> None:
    model, target = trained(), Model()
    old = version_1(model.state_dict())
    report = load_into(target, old if metadata else dict(old), required=[""])
    assert equal(target, model)
    assert ("sem_seg_head.weight", "sem_seg_head.pixel_decoder.weight") in report.renamed
    assert len(report.renamed) == 2 and not report.unexpected and len(report.loaded) == len(old)


def test_current_names_in_a_plain_dict_are_not_taken_for_version_1() -> None:
    model, target = trained(), Model()
    strict = target.load_state_dict(dict(model.state_dict()), strict=False)
    assert strict.missing_keys  # what torch alone does with such a file
    report = load_into(target, dict(model.state_dict()), required=[""])
    assert equal(target, model) and not report.renamed


def test_a_module_that_adapts_a_tensor_is_reported() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4))

        def _load_from_state_dict(self, state_dict, prefix, *args):
            state_dict[prefix + "w"] = state_dict[prefix + "w"].repeat(2)
            super()._load_from_state_dict(state_dict, prefix, *args)

    model = nn.ModuleDict({"t": Table()})
    report = load_into(model, {"t.w": torch.tensor([1.0, 2.0])}, required=["t"])
    assert report.resized == ["t.w"] == report.loaded
    assert model["t"].w.tolist() == [1, 2, 1, 2]


def test_another_number_of_classes() -> None:
    with pytest.raises(CheckpointError) as error:
        load_into(Model(classes=3), trained(classes=7).state_dict(), source="a.pth")
    one_sentence(error, "a.pth", "7 classes", "has 3", "MODEL.SEM_SEG_HEAD.NUM_CLASSES to 7")
    report = load_into(
        Model(classes=3), trained(classes=7).state_dict(), leave_out=["sem_seg_head.predictor"]
    )
    assert len(report.missing) == 2


def test_another_architecture_by_shape_and_by_name() -> None:
    with pytest.raises(CheckpointError) as error:
        load_into(Model(width=4), trained(width=8).state_dict(), source="a.pth")
    one_sentence(error, "a.pth", "another architecture", "of 13", "backbone.0.weight", "[8, 3, 3, 3]")
    resnet = {f"layer1.0.conv{i}.weight": torch.ones(1) for i in range(1, 4)}
    with pytest.raises(CheckpointError) as error:
        load_into(Model(), resnet, source="r.pth")
    one_sentence(error, "r.pth", "another architecture", "0 of 3", "ResNet")
    with pytest.raises(CheckpointError) as error:
        load_into(Model(), {}, source="r.pth")
    one_sentence(error, "r.pth", "no tensors")


def test_required_and_whole_parts() -> None:
    weights = trained().state_dict()
    del weights["backbone.2.weight"]
    load_into(Model(), weights, required=["sem_seg_head"], whole=["sem_seg_head"])
    for options in ({"required": ["backbone."]}, {"required": [""]}, {"whole": ["backbone"]}):
        with pytest.raises(CheckpointError) as error:
            load_into(Model(), weights, source="a.pth", **options)
        one_sentence(error, "a.pth", "lacks 1 of the", "backbone.2.weight")
    load_into(Model(), weights, required=[""], optional=["backbone.2"])
    heads = OrderedDict((k, v) for k, v in weights.items() if not k.startswith("backbone"))
    load_into(Model(), heads, whole=["backbone"])  # nothing of it is fine
    with pytest.raises(ValueError, match="'backbones'"):
        load_into(Model(), weights, required=["backbones"])


def test_a_stack_of_another_depth() -> None:
    def net(depth: int, pyramid: int = 0) -> nn.Module:
        stages = {"stage": depth, **({"fpn": pyramid} if pyramid else {})}
        parts = {name: nn.Sequential(*(nn.Linear(2, 2) for _ in range(n))) for name, n in stages.items()}
        return nn.ModuleDict({"backbone": nn.ModuleDict(parts)})

    shallow = net(2).state_dict()
    with pytest.raises(CheckpointError) as error:
        load_into(net(4), shallow, stacks=["backbone"], source="a.pth")
    one_sentence(error, "a.pth", "another architecture", "backbone.stage.2, backbone.stage.3")
    load_into(net(4), shallow, stacks=["sem_seg_head"])
    assert len(load_into(net(2, pyramid=2), shallow, stacks=["backbone"]).missing) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_named(value: float) -> None:
    weights, target = trained().state_dict(), Model()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    weights["sem_seg_head.pixel_decoder.weight"][1, 2] = value
    with pytest.raises(CheckpointError) as error:
        load_into(target, weights, source="a.pth")
    one_sentence(error, "a.pth", "sem_seg_head.pixel_decoder.weight", "NaN or infinite")
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_tied_tensors_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = self.a

    weights = Tied().state_dict()
    report = load_into(Tied(), {k: v for k, v in weights.items() if k.startswith("a.")}, required=[""])
    assert not report.missing
    assert not load_into(Tied(), weights).renamed


def test_batch_counters_without_a_place_are_taken_out():
    trained, frozen = (
        nn.Sequential(nn.BatchNorm2d(3)),
        nn.Sequential(nn.BatchNorm2d(3, track_running_stats=True)),
    )
    del frozen[0]._buffers["num_batches_tracked"]
    weights = trained.state_dict()
    assert drop_batch_counters(weights, trained) == 0
    assert drop_batch_counters(weights, frozen) == 1
    assert "0.num_batches_tracked" not in weights and "0.running_mean" in weights


def test_names_of_published_files(tmp_path: Path) -> None:
    """I-JEPA's and MoCo v3's end in .pth.tar; an archive does not pass for a checkpoint."""
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "IN1K-vit.h.14-300e.pth.tar")
    assert read_checkpoint(tmp_path / "IN1K-vit.h.14-300e.pth.tar")["model"]["w"].sum() == 2
    (tmp_path / "images.tar").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="no checkpoint by its name"):
        read_checkpoint(tmp_path / "images.tar")


def test_a_frozen_norms_weights_fill_one_that_trains() -> None:
    """A frozen batch norm has no counter of batches; weights without its statistics are still refused."""
    model = trained()
    weights = OrderedDict(model.state_dict())
    counters = [name for name in weights if name.endswith("num_batches_tracked")]
    frozen = OrderedDict((k, v) for k, v in weights.items() if k not in counters)
    report = load_into(trained(), frozen, required=["backbone"], whole=["backbone"])
    assert counters and set(counters) == set(report.missing)
    without = OrderedDict((k, v) for k, v in frozen.items() if not k.endswith("running_var"))
    with pytest.raises(CheckpointError, match="lacks 2 of the .* tensors of backbone"):
        load_into(trained(), without, required=["backbone"])
