"""Checkpoints: reading foreign files without running their code, atomic writing, loading with a report.

Files: `.pth`, `.pt` and `.pyth` (torch), `.safetensors`, `.pkl` (the detectron2 and Mask2Former zoos).
A state dict's `_metadata` (module versions) is kept in all of them: without it `MaskFormerHead` takes a
checkpoint for an old one and renames its keys.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TORCH_SUFFIXES = (".pth", ".pt", ".pyth")
# I-JEPA's and MoCo v3's published files end in .pth.tar, and are torch's all the same.
SUFFIXES = (*TORCH_SUFFIXES, ".pth.tar", ".safetensors", ".pkl")
TRUST = "JEPA_TRUST"  # environment variable: files, separated by os.pathsep, that may run code
CLASS_KEY = "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
_CLASS_TENSORS = re.compile(r"(^|\.)(class_embed\.(weight|bias)|empty_weight)$")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, written or used; the message is one sentence for the user."""


# --- reading ------------------------------------------------------------------------------------------


def _numpy_globals() -> dict[str, Any]:
    """What a pickled array, dtype or scalar refers to, under numpy 1's and numpy 2's module names."""
    # the functions themselves, asked from numpy's own pickling: their home differs between versions
    array, scalar = np.zeros(1), np.float32(0)
    functions = {
        "multiarray._reconstruct": array.__reduce__()[0],
        "multiarray.scalar": scalar.__reduce__()[0],
        "numeric._frombuffer": array.__reduce_ex__(5)[0],
    }
    found: dict[str, Any] = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
    for package in ("numpy.core", "numpy._core"):
        found.update({f"{package}.{name}": function for name, function in functions.items()})
    return found


def _plain_globals() -> dict[str, Any]:
    import _codecs

    found: dict[str, Any] = {"collections.OrderedDict": OrderedDict, "_codecs.encode": _codecs.encode}
    for builtins in ("builtins", "__builtin__"):
        for kind in (set, frozenset, bytes, bytearray, complex):
            found[f"{builtins}.{kind.__name__}"] = kind
    return found


class _RestrictedUnpickler(pickle.Unpickler):
    """Admits numpy arrays, dtypes and scalars, OrderedDict and plain types."""

    allowed = {**_numpy_globals(), **_plain_globals()}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.allowed[f"{module}.{name}"]
        except KeyError:
            raise _ForeignClass(f"{module}.{name}") from None


class _ForeignClass(pickle.UnpicklingError):
    """Carries the dotted name of a class that a weights-only reader does not admit."""


def _named(target: Callable, dotted: str) -> Callable:
    """`target` under another module's name: torch tells admitted functions by `__module__` and name."""
    module, _, name = dotted.rpartition(".")

    def call(*args: Any) -> Any:
        return target(*args)

    call.__module__, call.__name__, call.__qualname__ = module, name, name
    return call


def _torch_globals() -> list[Any]:
    """numpy's part for torch's weights-only reader, in the form that every torch version takes."""
    kinds = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDSUMm"]
    found: list[Any] = [np.ndarray, np.dtype, bytes, frozenset, *dict.fromkeys(kinds)]
    for dotted, target in _numpy_globals().items():
        if not isinstance(target, type):
            found.append(_named(target, dotted))
    return found


_TORCH_GLOBALS = _torch_globals()


@contextlib.contextmanager
def _admitting_numpy() -> Iterator[None]:
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals(_TORCH_GLOBALS):
            yield
    else:  # older torch can only add to its list
        torch.serialization.add_safe_globals(_TORCH_GLOBALS)
        yield


def _read_torch(path: Path, trusted: bool) -> Any:
    if trusted:
        return torch.load(path, map_location="cpu", weights_only=False)
    try:
        with _admitting_numpy():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message advises to admit the class in code; ours names the class and the flag
        foreign = re.search(r"(?:GLOBAL|function|object|class) '?<?(?:class )?'?([\w.]+)", str(error))
        if foreign and "." in foreign.group(1):
            raise _ForeignClass(foreign.group(1)) from None
        raise


def _read_pickle(path: Path, trusted: bool) -> Any:
    with open(path, "rb") as file:
        reader = pickle.Unpickler if trusted else _RestrictedUnpickler
        return reader(file, encoding="latin1").load()  # latin1: arrays pickled by Python 2


def _read_safetensors(path: Path, trusted: bool) -> dict[str, Any]:
    from safetensors import safe_open

    weights: OrderedDict[str, Tensor] = OrderedDict()
    with safe_open(path, framework="pt", device="cpu") as file:
        header = dict(file.metadata() or {})
        for name in file.keys():
            weights[name] = file.get_tensor(name)
    extras = {key: _from_json(text) for key, text in header.items()}
    if isinstance(versions := extras.pop("_metadata", None), dict):
        weights._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return {**extras, "model": weights}


def _from_json(text: str) -> Any:
    """Other programs' header entries are plain strings, ours are JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_file(path: str | os.PathLike) -> None:
    """Raise FileNotFoundError or CheckpointError for what is no checkpoint at first sight."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}: check the path, or put the file there")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name the checkpoint file inside it")
    if not path.name.endswith(SUFFIXES):
        raise CheckpointError(f"{path} is no checkpoint by its name: it must end in {', '.join(SUFFIXES)}")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror}): check its permissions") from None
    if not start:
        raise CheckpointError(f"{path} is empty: copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: fetch it with 'git lfs pull'")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not a checkpoint: download the file itself again")


def read_checkpoint(path: str | os.PathLike, *, trust: Iterable[str | os.PathLike] = ()) -> dict[str, Any]:
    """The content of a checkpoint file, tensors on the CPU, without running code that the file names.

    Arrays (numpy, as in `.pkl` files), tensors, OrderedDict (with its `_metadata`) and plain Python types
    are admitted. A file named in `trust`, or in the environment's JEPA_TRUST, is read without that limit: its code
    runs.
    A `.safetensors` file gives {"model": OrderedDict of tensors, and the header's entries}.

    Raises FileNotFoundError for a missing file; CheckpointError for one that is empty, truncated, of
    another kind, or holds other classes. The message names the file and the remedy.
    """
    path = Path(path)
    check_file(path)
    named = [*trust, *filter(None, os.environ.get(TRUST, "").split(os.pathsep))]
    trusted = any(Path(name).resolve() == path.resolve() for name in named)
    readers = {".safetensors": _read_safetensors, ".pkl": _read_pickle}
    try:
        content = readers.get(path.suffix, _read_torch)(path, trusted)
    except _ForeignClass as error:
        raise CheckpointError(
            f"{path} is not read because it holds more than weights (it needs the class {error}): "
            f"if you trust its author, name it in '--trust {path}' or {TRUST}={path}, which lets its code run"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        reason = (
            (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")[:120]
        )
        raise CheckpointError(
            f"{path} is truncated or damaged ({reason}): copy or download it again, or use an earlier "
            "checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a dict of weights: save the model's state_dict()"
        )
    return content


def _of_parts(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of I-JEPA's layout, named "encoder.*" and so on; none when the checkpoint has another."""
    parts: dict[str, Mapping[str, Any]] = {
        key: part
        for key in ("encoder", "predictor", "target_encoder")
        if isinstance(part := checkpoint.get(key), Mapping)
    }
    if len(parts) < 3:
        return {}
    named = ((key, state_dict_of(part)) for key, part in parts.items())
    return {f"{key}.{name}": value for key, weights in named for name, value in weights.items()}


def state_dict_of(checkpoint: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """The model's weights in a checkpoint: under "model", "state_dict", "model_state", part by part as in I-JEPA's
    published files ("encoder", "predictor", "target_encoder", which then stand before the names), or bare.

    Returns a new OrderedDict of tensors with the `_metadata` of the original, arrays converted, and a
    "module." that all names share (DistributedDataParallel) removed. Raises CheckpointError when there
    are no weights.
    """
    nested = (checkpoint.get(key) for key in ("model", "state_dict", "model_state"))
    weights = next((found for found in nested if isinstance(found, Mapping)), checkpoint)
    if weights is checkpoint:
        weights = _of_parts(checkpoint) or checkpoint
    result: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, (Tensor, np.ndarray, np.generic)):
            raise CheckpointError(
                f"the checkpoint holds no weights where they are expected: '{name}' is a "
                f"{type(value).__name__}, not a tensor; save it as {{'model': model.state_dict()}}"
            )
        result[name] = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    versions = getattr(weights, "_metadata", None)
    if result and all(name.startswith("module.") for name in result):
        result = OrderedDict((name[len("module.") :], value) for name, value in result.items())
        if versions is not None:
            versions = {k[len("module.") :]: v for k, v in versions.items() if k.startswith("module")}
    if versions is not None:
        result._metadata = OrderedDict((k, dict(v)) for k, v in versions.items())  # type: ignore[attr-defined]
    return result


# --- writing ------------------------------------------------------------------------------------------


def _safetensors_bytes(content: Mapping[str, Any], path: Path) -> bytes:
    from safetensors.torch import save

    weights = state_dict_of(content)
    bare = not isinstance(content.get("model"), Mapping)
    extras = {} if bare else {key: value for key, value in content.items() if key != "model"}
    header = {"format": "pt", **extras}
    if (versions := getattr(weights, "_metadata", None)) is not None:
        header["_metadata"] = versions
    try:
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in header.items()}
    except TypeError as error:
        raise CheckpointError(
            f"{path} cannot hold more than weights and plain values ({error}): use .pth"
        ) from None
    # safetensors refuses tensors that share memory or are strided
    tensors = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    return save(tensors, metadata=texts)


def atomic_write(path: str | os.PathLike, write: Callable[[Any], None]) -> None:
    """Give `path` the content that `write(binary file)` produces, all of it or none.

    The content goes to a temporary file of the same folder, to the disk, and then takes the name. On any
    failure an older file stays as it was and the temporary one is removed. Raises CheckpointError when
    the disk refuses.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        if isinstance(error, OSError) or "PytorchStreamWriter" in str(error):
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise CheckpointError(
                f"{path} could not be written ({reason}), an older file is left as it was: make room or "
                "choose another folder"
            ) from error
        raise
    with contextlib.suppress(OSError):  # make the new name last too; not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_atomic(content: Any, path: str | os.PathLike) -> None:
    """Write a checkpoint to `.pth`, `.pt` or `.safetensors`, all of it or nothing.

    A `.safetensors` file takes a state dict, or {"model": state dict, and plain values} whose values and
    `_metadata` travel as JSON in the header. Raises CheckpointError for another suffix, for content that
    the format cannot hold, and when the disk refuses.
    """
    path = Path(path)
    if path.suffix in TORCH_SUFFIXES:
        atomic_write(path, lambda file: torch.save(content, file))
    elif path.suffix == ".safetensors":
        data = _safetensors_bytes(content, path)
        atomic_write(path, lambda file: file.write(data))
    else:
        raise CheckpointError(f"{path} cannot be written: its name must end in .pth or .safetensors")


# --- loading ------------------------------------------------------------------------------------------


@dataclass
class LoadReport:
    """What a load did. Names are the model's, except in `unexpected`, `left_out` and the first of a pair.

    loaded: taken from the checkpoint (renamed and resized ones too). resized: taken, but the module gave
    the tensor another shape or content first. adapted: (name, checkpoint's channels, model's) of a first
    convolution for images of another number of channels. mismatched: (name, checkpoint's shape, model's shape).
    left_out: not loaded on request. missing: in the model only. unexpected: in the checkpoint only.
    """

    source: str = "the checkpoint"
    loaded: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    adapted: list[tuple[str, int, int]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    offered: int = 0

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} of {self.offered} tensors loaded"]
        renamed = [f"{old} -> {new}" for old, new in self.renamed]
        adapted = [
            f"{name} ({old} channels {'summed' if new == 1 else f'repeated and scaled by {old}/{new}'})"
            for name, old, new in self.adapted
        ]
        shapes = [f"{name} {old} here {new}" for name, old, new in self.mismatched]
        for title, entries in (
            ("renamed", _some(renamed)),
            ("resized", _grouped(self.resized)),
            ("adapted to the images' channels", _some(adapted)),
            ("left out", _grouped(self.left_out)),
            ("missing, kept as initialised", _grouped(self.missing)),
            ("unexpected, not used", _grouped(self.unexpected)),
            ("of another shape", _some(shapes)),
        ):
            if entries:
                lines.append(f"  {title}: {entries}")
        return "\n".join(lines)


def _some(entries: Sequence[str], most: int = 4) -> str:
    rest = len(entries) - most
    return ", ".join(entries[:most]) + (f" and {rest} more" if rest > 0 else "")


def _grouped(names: Iterable[str]) -> str:
    """Names counted by their first three parts, so that hundreds fit on a line."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[:3]), []).append(name)
    return _some([f"{k} ({len(v)})" if len(v) > 1 else v[0] for k, v in groups.items()], most=12)


def below(name: str, prefix: str) -> bool:
    """Whether a tensor's name lies below a dotted prefix; "" holds every name."""
    prefix = prefix.rstrip(".")
    return not prefix or name == prefix or name.startswith(prefix + ".")


def _any_below(name: str, prefixes: Iterable[str]) -> bool:
    return any(below(name, prefix) for prefix in prefixes)


def describe(names: Iterable[str]) -> str:
    """What a set of tensor names looks like, in words for an error message."""
    names = list(names)
    signs = (
        ("a Mask-JEPA pre-training checkpoint", r"(jepa|target_pixel_decoder)\."),
        ("a Mask2Former", r"sem_seg_head\.predictor\.transformer_"),
        ("a version 1 Mask2Former or MaskFormer", r"sem_seg_head\.(predictor|adapter_|input_proj)"),
        ("a detectron2 detector", r"(roi_heads|proposal_generator)\."),
        ("a detectron2 or Caffe2 ResNet", r"(stem\.conv1|res2\.0|res2_0_branch|conv1_w)"),
        ("a torchvision or timm ResNet", r"layer1\.0\.conv1"),
        ("a Swin transformer", r"(layers\.0\.blocks\.0|.*relative_position_bias_table)"),
        ("a vision transformer", r"(.*\.)?patch_embed\.proj"),
        ("a timm EfficientNet", r"conv_stem\."),
    )
    for words, pattern in signs:
        if any(re.match(pattern, name) for name in names):
            return words
    return f"weights of an unknown kind ({_some(names, most=3)})" if names else "a file without weights"


def _without_prefixes(weights: Mapping[str, Tensor], prefixes: Sequence[str]) -> OrderedDict[str, Tensor]:
    return OrderedDict((k, v) for k, v in weights.items() if not _any_below(k, prefixes))


def _versions_for(weights: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, dict]:
    """The weights' own `_metadata`; without one, the model's for modules whose names all are the model's.

    A state dict saved as a plain dict counts as version 1 everywhere, and a head with old names would
    rename keys that already are the new ones.
    """
    own = getattr(weights, "_metadata", None)
    if own is not None:
        return own
    current = model.state_dict()
    unknown = {
        ".".join(parts[:depth])
        for parts in (name.split(".") for name in weights if name not in current)
        for depth in range(len(parts))
    }
    versions: Mapping[str, dict] = getattr(current, "_metadata", {})
    return OrderedDict((path, dict(entry)) for path, entry in versions.items() if path not in unknown)


def drop_batch_counters(weights: OrderedDict[str, Tensor], model: nn.Module) -> int:
    """Take out, in place, the batch counters that `model` has no place for; returns how many.

    A batch norm that trained counts its batches; the frozen one that replaces it in another configuration does not.
    """
    held = model.state_dict().keys()
    surplus = [name for name in weights if name.endswith("num_batches_tracked") and name not in held]
    for name in surplus:
        del weights[name]
    return len(surplus)


def check_finite(weights: Mapping[str, Tensor], source: str = "the checkpoint") -> None:
    """Raise CheckpointError that names the first tensors with NaN or infinite values."""
    bad = [k for k, v in weights.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise CheckpointError(
            f"{source} holds NaN or infinite values in {_some(bad)}: the run that wrote it had diverged, use "
            "an earlier checkpoint"
        )


def _watch(
    model: nn.Module, weights: Mapping[str, Tensor], report: LoadReport, adapt_stem: bool
) -> list[Any]:
    """Hooks that see every tensor as its module is about to take it, after all renaming.

    Tensors are followed by identity; those of another shape are adapted, or taken out and reported.
    """
    origin = {id(value): name for name, value in weights.items()}

    def hook(module: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
        own: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
        for name, target in own.items():
            key = prefix + name
            if target is None or name in module._non_persistent_buffers_set or key not in state_dict:
                continue
            value = state_dict[key]
            old_scalar = target.dim() == 0 and value.shape == (1,)  # torch accepts those of 0.3
            lazy = nn.parameter.is_lazy(target)
            stem = adapt_stem and not lazy and _is_stem(value.shape, target.shape)
            if value.shape != target.shape and not (old_scalar or lazy or stem):
                report.mismatched.append((key, tuple(value.shape), tuple(target.shape)))
                del state_dict[key]
                continue
            before = key if weights.get(key) is value else origin.get(id(value))
            if before is None and key not in weights:
                continue  # the module itself filled the gap
            report.loaded.append(key)
            if stem:
                state_dict[key] = adapted_stem(value, target.shape[1])
                report.adapted.append((key, value.shape[1], target.shape[1]))
            if before is None:
                report.resized.append(key)
            elif before != key:
                report.renamed.append((before, key))

    return [
        module._register_load_state_dict_pre_hook(hook, with_module=True)
        for module in dict.fromkeys(model.modules())
    ]


def adapted_stem(weight: Tensor, channels: int) -> Tensor:
    """Weights of a first convolution on colour images [O, 3, k, k] for `channels` others [O, channels, k, k].

    One channel takes their sum, so that grey images give what they gave as colour images of three equal channels;
    more take them in turn, scaled by 3 / channels. This is timm's rule.
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    turns = torch.arange(channels, device=weight.device) % weight.shape[1]
    return weight[:, turns] * (weight.shape[1] / channels)


def _is_stem(theirs: Sequence[int], ours: Sequence[int]) -> bool:
    """Whether two shapes differ as those of a first convolution on colour images and on others do."""
    return (
        len(theirs) == len(ours) == 4
        and theirs[1] == 3 != ours[1]
        and [*theirs[:1], *theirs[2:]] == [*ours[:1], *ours[2:]]
    )


def _aliases(model: nn.Module, names: set[str]) -> set[str]:
    """Further names of the tensors that `names` name."""
    tensors = model.state_dict(keep_vars=True)
    ids = {id(tensors[name]) for name in names if name in tensors}
    return {name for name, tensor in tensors.items() if id(tensor) in ids}


def _load(model: nn.Module, weights: OrderedDict[str, Tensor], report: LoadReport, adapt_stem: bool) -> None:
    handles = _watch(model, weights, report, adapt_stem)
    try:
        outcome = model.load_state_dict(weights, strict=False)
    finally:
        for handle in handles:
            handle.remove()
    mismatched = {name for name, _, _ in report.mismatched}
    there = _aliases(model, set(report.loaded)) | mismatched
    report.missing = [name for name in outcome.missing_keys if name not in there]
    report.unexpected = list(outcome.unexpected_keys)
    order = {name: i for i, name in enumerate(weights)}
    report.loaded.sort(key=lambda name: order.get(name, len(order)))


def _is_class_count(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    return bool(_CLASS_TENSORS.search(name)) and theirs[1:] == ours[1:]


def _check_shapes(report: LoadReport) -> None:
    if not report.mismatched:
        return
    wrong = [entry for entry in report.mismatched if not _is_class_count(*entry)]
    if not wrong:
        _, theirs, ours = report.mismatched[0]
        raise CheckpointError(
            f"{report.source} was trained with {theirs[0] - 1} classes and the model has {ours[0] - 1} "
            f"('{report.mismatched[0][0]}'): set {CLASS_KEY} to {theirs[0] - 1}, or leave the class head out "
            "of the load"
        )
    examples = [f"'{name}' is {list(old)} there and {list(new)} here" for name, old, new in wrong]
    raise CheckpointError(
        f"{report.source} holds weights of another architecture ({len(report.loaded)} of {report.offered} "
        f"tensors fit; {_some(examples, most=2)}): use the config that it was trained with, or weights of "
        "this model"
    )


def _check_share(report: LoadReport, names: Iterable[str], min_match: float) -> None:
    if not report.offered:
        raise CheckpointError(f"{report.source} holds no tensors: give a file with a model's weights")
    if len(report.loaded) < min_match * report.offered:
        examples = _some([f"'{name}'" for name in report.unexpected], most=2)
        raise CheckpointError(
            f"{report.source} holds weights of another architecture (only {len(report.loaded)} of "
            f"{report.offered} tensors fit, the model has no {examples}, it looks like {describe(names)}): "
            "use the config that it was trained with, or weights of this model"
        )


def _check_parts(model: nn.Module, report: LoadReport, required: Sequence[str], whole: Sequence[str]) -> None:
    names = list(model.state_dict())
    for prefix in required:
        if not any(below(name, prefix) for name in names):
            raise ValueError(f"the model has no '{prefix}', so no checkpoint can fill it: check 'required'")
    begun = [prefix for prefix in whole if any(below(name, prefix) for name in report.loaded)]
    loaded = set(report.loaded)
    for prefix in [*required, *begun]:
        total = sum(below(name, prefix) for name in names)
        missing = [n for n in report.missing if below(n, prefix) and not _counts_batches(n, loaded)]
        if not missing:
            continue
        raise CheckpointError(
            f"{report.source} lacks {len(missing)} of the {total} tensors of "
            f"{prefix.rstrip('.') or 'the model'}, for instance "
            f"{_some([repr(name) for name in missing], most=2)}: give the checkpoint of the same model, or "
            "the config that it was trained with"
        )


def _counts_batches(name: str, loaded: set[str]) -> bool:
    """Whether a missing tensor is the counter of a batch norm whose statistics are there.

    Frozen batch norms have none, so a checkpoint of theirs fills a batch norm that trains all the same.
    """
    layer, _, last = name.rpartition(".")
    return last == "num_batches_tracked" and f"{layer}.running_var" in loaded


def _numbered(names: Iterable[str]) -> set[str]:
    """Members of stacks that hold these tensors: "a.layers.3.b.0.w" gives "a.layers.3", "a.layers.3.b.0"."""
    split = [name.split(".") for name in names]
    return {".".join(parts[: i + 1]) for parts in split for i, part in enumerate(parts) if part.isdigit()}


def _check_stacks(report: LoadReport, prefixes: Sequence[str]) -> None:
    """A stack of layers that is loaded in part has another depth than the checkpoint's."""
    filled = _numbered(report.loaded)
    parents = {member.rpartition(".")[0] for member in filled}
    empty = _numbered(name for name in report.missing if _any_below(name, prefixes)) - filled
    absent = sorted(member for member in empty if member.rpartition(".")[0] in parents)
    if absent:
        raise CheckpointError(
            f"{report.source} holds weights of another architecture (it lacks {_some(absent, 2)}, and has "
            "other layers of that stack): use the config that it was trained with, or weights of this model"
        )


def load_into(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    required: Iterable[str] = (),
    min_match: float = 0.5,
    whole: Iterable[str] = (),
    stacks: Iterable[str] = (),
    leave_out: Iterable[str] = (),
    optional: Iterable[str] = (),
    adapt_stem: bool = False,
    source: str = "the checkpoint",
) -> LoadReport:
    """Load weights into `model` by name, report everything, and fail when the result is not what was asked.

    required: dotted name prefixes of which every tensor must be loaded ("" = the whole model).
    min_match: share (0 to 1) of the checkpoint's tensors that must find a place in the model.
    whole: prefixes below which all tensors must be loaded if any is.
    stacks: prefixes below which numbered siblings (the layers of a stage) must be loaded all or none.
    leave_out: prefixes of checkpoint names not to load. optional: prefixes of model names that are never
    called missing. adapt_stem: change the weights of a first convolution on colour images where the model takes
    another number of channels (`adapted_stem`). source: the file's name, for messages.

    The modules' own renaming of old checkpoints runs as in `load_state_dict`. Raises CheckpointError for
    tensors of another shape (another architecture, another number of classes), too few matches, a missing
    part, and NaN or infinite weights; a model is then not to be used.
    """
    required, leave_out = list(required), list(leave_out)
    weights = _without_prefixes(state_dict, leave_out)
    weights._metadata = _versions_for(state_dict, model)  # type: ignore[attr-defined]
    check_finite(weights, source)
    report = LoadReport(source=source, offered=len(weights))
    report.left_out = [name for name in state_dict if _any_below(name, leave_out)]
    _load(model, weights, report, adapt_stem)
    optional = list(optional)
    report.missing = [name for name in report.missing if not _any_below(name, optional)]
    _check_shapes(report)
    _check_share(report, weights, min_match)
    _check_parts(model, report, required, list(whole))
    _check_stacks(report, list(stacks))
    return report
