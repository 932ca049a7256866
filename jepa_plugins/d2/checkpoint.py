"""detectron2's checkpointer with safe reading, atomic writing and a report that fails loudly."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import Tensor, nn

from jepa_plugins.core.checkpoints import (
    CheckpointError,
    LoadReport,
    atomic_write,
    below,
    check_file,
    drop_batch_counters,
    load_into,
    read_checkpoint,
    save_atomic,
    state_dict_of,
)
from jepa_plugins.core.vit_weights import admitting_plain
from jepa_plugins.core.vitdet import DetectionViT
from jepa_plugins.core.vitdet_weights import BackboneWeights, backbone_weights, holds_detector

# Target copies of a Mask-JEPA model and the online modules that they start from.
TARGETS = (("target_backbone", "backbone"), ("target_pixel_decoder", "sem_seg_head.pixel_decoder"))


class Checkpointer(DetectionCheckpointer):
    """Saves and loads a model with its optimiser, schedule and whatever else `checkpointables` name.

    Differs from detectron2's in four ways: files are written whole or not at all; they are read without
    running code (`trust` names the exceptions); every load logs what was loaded, renamed, left out and
    missing; and a load that does not give what it should is a CheckpointError. That is: a resume that
    lacks any tensor or state; an export that loads fewer tensors than it promises; another architecture
    or number of classes; NaN or infinite weights.

    A Mask-JEPA model's target copies start as the online modules when the file has none (an ImageNet
    backbone, a Mask2Former). A detector on a plain ViT also takes files of a ViT alone, above all pre-training
    checkpoints, of which it takes the target encoder.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        required: Iterable[str] = (),
        leave_out: Iterable[str] = (),
        trust: Iterable[str] = (),
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            required: name prefixes of which a load must fill every tensor; ("",) before an evaluation.
            leave_out: prefixes of names in the file that are not loaded, such as a class head; a resume
                loads them all the same.
            trust: files that may run code when they are read.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.logger = logging.getLogger(__name__)
        self.required, self.leave_out, self.trust = list(required), list(leave_out), list(trust)
        self.report: LoadReport | None = None
        self._source = ""
        self._by_heuristics = False
        self._encoder: BackboneWeights | None = None  # of a file that holds no detector
        self._resuming = False

    # --- writing

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `<save_dir>/<name>.pth` and then `last_checkpoint`, each whole or not at all."""
        if not self.save_dir or not self.save_to_disk:
            return
        if "://" in self.save_dir:  # no local folder: only the path manager can write there
            return super().save(name, **kwargs)
        states = {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving %s", path)
        save_atomic({"model": self.model.state_dict(), **states, **kwargs}, path)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if "://" in self.save_dir:
            return super().tag_last_checkpoint(last_filename_basename)
        path = os.path.join(self.save_dir, "last_checkpoint")
        atomic_write(path, lambda file: file.write(last_filename_basename.encode()))

    # --- reading

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from `last_checkpoint` if there is one and `resume`; otherwise load only the model."""
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        last = self.get_checkpoint_file()
        if last and not self.path_manager.isfile(last):
            raise FileNotFoundError(
                f"{os.path.join(self.save_dir, 'last_checkpoint')} names {os.path.basename(last)}, which is "
                "not there: write the name of an existing checkpoint into it, or start without --resume"
            )
        self._resuming = True
        try:
            return self.load(last)
        finally:
            self._resuming = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file (a path, a URL, `detectron2://...`; `?matching_heuristics=True` matches by suffix).

        Returns the entries that are neither the model nor a checkpointable. Raises FileNotFoundError and
        CheckpointError, each with one sentence.
        """
        self._source, self._by_heuristics, self._encoder = path or "", False, None
        if not path:
            return super().load(path, *args, **kwargs)
        local = self._fetch(path)
        try:
            return super().load(local, *args, **kwargs)
        finally:
            if hasattr(self, "_parsed_url_during_load"):  # current detectron2 resets it only on success
                self._parsed_url_during_load = None

    def _fetch(self, path: str) -> str:
        """The local file behind a path or URL."""
        if not os.path.isfile(path):
            url = urlparse(path)
            queries = parse_qs(url.query)
            self._by_heuristics = queries.pop("matching_heuristics", []) == ["True"]
            if queries:
                raise CheckpointError(
                    f"{path} asks for {sorted(queries)}: only ?matching_heuristics=True is known"
                )
            path = url._replace(query="").geturl()
        if "://" not in path:
            check_file(path)
            return path
        try:
            local = self.path_manager.get_local_path(path)
            check_file(local)
        except Exception as error:  # each handler of the path manager fails in its own way
            raise CheckpointError(
                f"{path} could not be fetched ({type(error).__name__}): download it where there is a network "
                "and set MODEL.WEIGHTS to the file"
            ) from error
        return local

    def _load_file(self, filename: str) -> dict[str, Any]:
        trust = [filename if name == self._source else name for name in self.trust]
        net = getattr(getattr(self.model, "backbone", None), "net", None)
        if isinstance(net, DetectionViT):
            with admitting_plain():
                data = read_checkpoint(filename, trust=trust)
            if not holds_detector(data):
                return self._for_backbone(net, data)
        else:
            data = read_checkpoint(filename, trust=trust)
        if filename.endswith(".pkl") and not ("model" in data and "__author__" in data):
            # Caffe2 and Detectron1 files: bare arrays, or below "blobs"
            blobs = data.get("blobs", data)
            arrays = {k: v for k, v in blobs.items() if not k.endswith("_momentum") and k != "weight_order"}
            data = {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}
        elif "model_state" in data:  # pycls
            state = {k: v for k, v in data["model_state"].items() if not k.endswith("num_batches_tracked")}
            data = {"model": state, "__author__": "pycls", "matching_heuristics": True}
        others = dict(data) if isinstance(data.get("model"), Mapping) else {}
        return {**others, "model": state_dict_of(data)}

    def _for_backbone(self, net: DetectionViT, data: Mapping[str, Any]) -> dict[str, Any]:
        """The encoder in a pre-training checkpoint, or another plain ViT, as the backbone's weights."""
        self._encoder = backbone_weights(net, data, self._source)
        self._by_heuristics = False
        return {"model": self._encoder.weights}

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        weights = checkpoint.pop("model")
        export = checkpoint.get("jepa_export")
        if self._resuming:
            self._check_states(checkpoint)
        self._advise(checkpoint)
        if self._by_heuristics or checkpoint.get("matching_heuristics", False):
            weights = self._align(weights, caffe2=checkpoint.get("__author__") == "Caffe2")
        counters = drop_batch_counters(weights, self.model) if export else 0
        copied = [] if self._resuming else self._targets_missing_in(weights)
        report = load_into(
            self.model,
            weights,
            required=[""] if self._resuming else self.required,
            whole=export["whole"] if export else (),
            # R50 weights in R101 show there; a pyramid on top of a loaded backbone does not
            stacks=["backbone", "sem_seg_head"],
            leave_out=() if self._resuming else self.leave_out,
            optional=["pixel_mean", "pixel_std", *(target for target, _ in copied)],
            adapt_stem=self._adapts_stem(),
            source=self._source or "the checkpoint",
        )
        # old files hold these, current models compute them
        report.unexpected = [k for k in report.unexpected if "anchor_generator.cell_anchors" not in k]
        if self._encoder is not None:
            report.resized += self._encoder.resized
            report.left_out += self._encoder.left_out
            self.logger.info("For the backbone: %s", "; ".join(self._encoder.notes))
        if export:
            self._keep_promise(export, report, counters)
        self._start_targets(copied, report)
        self.report = report
        return _IncompatibleKeys(report.missing, report.unexpected, [])

    def _log_incompatible_keys(self, incompatible: _IncompatibleKeys) -> None:
        self.logger.info("Loaded %s", self.report)

    def _check_states(self, checkpoint: Mapping[str, Any]) -> None:
        lacking = [key for key in self.checkpointables if key not in checkpoint]
        if lacking:
            raise CheckpointError(
                f"{self._source} lacks the state of {', '.join(lacking)}, so a run cannot resume from it: "
                "start without --resume and give it as MODEL.WEIGHTS, or resume from a checkpoint of this run"
            )

    def _advise(self, checkpoint: Mapping[str, Any]) -> None:
        pretrains = any(below(name, target) for name in self.model.state_dict() for target, _ in TARGETS)
        if "jepa_pretraining" in checkpoint and not pretrains:
            self.logger.warning(
                "%s is a Mask-JEPA pre-training checkpoint: tools/export.py turns it into a Mask2Former "
                "checkpoint without the parts that were not trained",
                self._source,
            )

    def _adapts_stem(self) -> bool:
        """A start from other weights may change the number of input channels; a resume or an evaluation not."""
        return not self._resuming and "" not in self.required

    def _colour_stem(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first convolution as it would be for colour images, if it is not and `weights` have such a one:
        detectron2's heuristics match tensors of the same shape only."""
        channels = len(getattr(self.model, "pixel_mean", (None,) * 3))
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Conv2d) and module.in_channels == channels != 3 and module.groups == 1:
                shape = torch.Size((module.out_channels, 3, *module.kernel_size))
                same = any(tensor.shape == shape for tensor in weights.values())
                return {f"{name}.weight": torch.empty(shape, device="meta")} if same else {}
        return {}

    def _align(self, weights: Mapping[str, Tensor], caffe2: bool) -> OrderedDict[str, Tensor]:
        """Weights under the model's names, matched by suffix (detectron2's heuristics)."""
        # a target copy would make each backbone name match twice
        names = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if not any(below(name, target) for target, _ in TARGETS)
        }
        if self._adapts_stem():
            names |= self._colour_stem(weights)
        aligned = OrderedDict(align_and_update_state_dicts(names, dict(weights), c2_conversion=caffe2))
        aligned._metadata = OrderedDict()  # such files are older than any module version
        return aligned

    def _targets_missing_in(self, weights: Mapping[str, Tensor]) -> list[tuple[str, str]]:
        def held(names: Iterable[str], prefix: str) -> bool:
            return any(below(name, prefix) for name in names)

        own = self.model.state_dict()
        return [pair for pair in TARGETS if held(own, pair[0]) and not held(weights, pair[0])]

    @torch.no_grad()
    def _start_targets(self, pairs: Iterable[tuple[str, str]], report: LoadReport) -> None:
        """Make target copies equal to their online modules, if those were loaded."""
        own = self.model.state_dict()
        for target, online in pairs:
            if not any(below(name, online) for name in report.loaded):
                continue
            for name in own:
                if below(name, target):
                    own[name].copy_(own[online + name[len(target) :]])
            self.logger.info("%s starts as a copy of %s", target, online)

    def _keep_promise(self, export: Mapping[str, Any], report: LoadReport, counters: int) -> None:
        promised = int(export["tensors"]) - len(report.left_out) - counters
        if len(report.loaded) < promised:
            unused = f" (no place for {', '.join(report.unexpected[:2])})" if report.unexpected else ""
            raise CheckpointError(
                f"{self._source} is an export of {export['tensors']} tensors and only {len(report.loaded)} "
                f"were loaded{unused}: use the backbone and decoder sizes of the pre-training config, or "
                "export again"
            )
