"""DMT-JEPA and I-JEPA as an mmengine model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from torch import Tensor

from jepa_plugins.core.aggregation import ATTENTIONS, CONTEXTS, LAT_TYPES
from jepa_plugins.core.collapse import rank_metrics
from jepa_plugins.core.dmt_jepa import LOSSES, DMTJEPAModel, DMTJEPASettings
from jepa_plugins.core.multiblock import Masks, MultiBlock, draw_masks
from jepa_plugins.core.neighbours import Neighbourhood
from jepa_plugins.core.step import variance_of
from jepa_plugins.core.vit import Predictor, VisionTransformer, size_of
from jepa_plugins.mm.data import BatchPlace

SCOPES = ("process", "global")
PAPER: Mapping[str, Any] = MappingProxyType({})  # options that are all as in the paper
# of the predictor, by the encoder: width and depth
PREDICTORS = {"tiny": (192, 6), "small": (384, 6), "base": (384, 6), "large": (384, 12), "huge": (384, 12)}


@MODELS.register_module()
class ImagePreprocessor(BaseDataPreprocessor):
    """uint8 crops -> model's device -> normalised float32.

    Args:
        mean, std: in grey levels (0..255), one value a channel.

    Raises:
        ValueError: they do not fit each other or the images.
    """

    def __init__(
        self,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
        non_blocking: bool = True,
    ) -> None:
        super().__init__(non_blocking)
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(
                "model.data_preprocessor takes mean and std of as many values, one a channel, and a std above 0, got "
                f"{tuple(mean)} and {tuple(std)}"
            )
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """A batch of `collate_images` -> "inputs" float32 [B, C, H, W] and "place", which stays on the CPU."""
        images = data["inputs"].to(self.device, non_blocking=self._non_blocking)
        if images.shape[1] != len(self.mean):
            raise ValueError(
                f"images have {images.shape[1]} channels, model.data_preprocessor.mean has {len(self.mean)}: set "
                "model.in_chans, model.data_preprocessor and train_dataloader.dataset.image_format to one number of "
                "channels"
            )
        return {"inputs": (images.float() - self.mean) / self.std, "place": data["place"]}


def _checked(given: Mapping[str, Any], known: Sequence[str], name: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"model.{name} is dict({'=, '.join(known)}=), got {given!r}")
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"model.{name} has no {', '.join(unknown)}; it knows {', '.join(known)}")
    return dict(given)


# of `DMTJEPASettings` by the configuration's entries
LAT_FIELDS = {
    "type": "lat",
    "depth": "depth",
    "target_attn": "target",
    "residual": "residual",
    "context": "context",
    "context_attn": "context_attention",
}


def _neighbourhood(given: Mapping[str, Any]) -> Neighbourhood:
    values = _checked(given, ("window", "k", "include_self", "border"), "msn")
    if values.get("window") == "all":
        values["window"] = 0
    for key in ("window", "k"):
        if not isinstance(values.get(key, 0), int):
            more = " or 'all'" if key == "window" else ""
            raise ValueError(f"model.msn.{key} is a whole number{more}, got {values[key]!r}")
    try:
        return Neighbourhood(**values)
    except ValueError as error:
        raise ValueError(f"model.msn: {error}") from None


def settings_of(msn: Mapping[str, Any] | None, lat: Mapping[str, Any] | None, loss: str) -> DMTJEPASettings:
    """The method's options from a configuration's `msn`, `lat` and `loss`; see `DMTJEPA`."""
    if loss not in LOSSES:
        raise ValueError(f"model.loss is one of {', '.join(LOSSES)}, got {loss!r}")
    where = None if msn is None else _neighbourhood(msn)
    if lat is None:
        if where is not None:
            raise ValueError(
                "model.msn chooses neighbours that model.lat aggregates, but lat is None: for neighbours without "
                "heads set lat=dict(type='parameter_free', target_attn='average', context='none')"
            )
        return DMTJEPASettings(neighbourhood=None, target="none", context="none", loss=loss)
    values = _checked(lat, tuple(LAT_FIELDS), "lat")
    choices = {
        "type": LAT_TYPES,
        "target_attn": ATTENTIONS,
        "context_attn": ATTENTIONS[:-1],
        "context": CONTEXTS,
    }
    for key, known in choices.items():
        if values.get(key, known[0]) not in known:
            raise ValueError(f"model.lat.{key} is one of {', '.join(known)}, got {values[key]!r}")
    try:
        return DMTJEPASettings(
            neighbourhood=where, loss=loss, **{LAT_FIELDS[key]: value for key, value in values.items()}
        )
    except ValueError as error:
        raise ValueError(f"model.lat: {error}") from None


def momenta(given: Sequence[float]) -> tuple[float, float]:
    """The moving average's momentum at the first and last step."""
    pair = tuple(given) if isinstance(given, Sequence) else ()
    if len(pair) != 2 or not all(0 <= value <= 1 for value in pair):
        raise ValueError(f"model.ema is two momenta from 0 to 1, of the first and last step, got {given!r}")
    return float(pair[0]), float(pair[1])


def mask_settings(given: Mapping[str, Any]) -> tuple[str, MultiBlock]:
    """Scope and sampler of a configuration's `mask`; see `DMTJEPA`."""
    known = ("scope", *MultiBlock.__dataclass_fields__)
    values = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in _checked(given, known, "mask").items()
    }
    scope = values.pop("scope", "process")
    if scope not in SCOPES:
        raise ValueError(f"model.mask.scope is one of {', '.join(SCOPES)}, got {scope!r}")
    for key in ("target_scale", "context_scale", "target_aspect"):
        if key in values and not (isinstance(values[key], tuple) and len(values[key]) == 2):
            raise ValueError(
                f"model.mask.{key} is two numbers, the lowest and the highest, got {values[key]!r}"
            )
    try:
        return scope, MultiBlock(**values)
    except ValueError as error:
        raise ValueError(f"model.mask: {error}") from None


def build_encoder(
    arch: str | Mapping[str, int],
    img_size: int | Sequence[int],
    patch_size: int,
    **kwargs: Any,
) -> VisionTransformer:
    """An encoder of a named or given size; see `DMTJEPA`."""
    width, depth, heads = size_of(arch, "model.arch")
    return VisionTransformer(img_size, patch_size, width=width, depth=depth, heads=heads, **kwargs)


def build_predictor(
    encoder: VisionTransformer, arch: str | Mapping[str, int], given: Mapping[str, int] | None
) -> Predictor:
    """The predictor: as wide and deep as its encoder's name says, unless values are given."""
    values = _checked(given or {}, ("width", "depth", "heads"), "predictor")
    if isinstance(arch, str):
        width, depth = PREDICTORS[arch]
        values = {"width": width, "depth": depth, **values}
    values = {"heads": encoder.heads, **values}
    if len(values) < 3:
        raise ValueError(
            "model.predictor needs width and depth, because model.arch is no name that implies them"
        )
    if values["width"] % values["heads"]:
        raise ValueError(
            f"model.predictor: {values['heads']} heads do not divide the width {values['width']}"
        )
    return Predictor(encoder.grid, encoder.width, **values)


@MODELS.register_module()
class DMTJEPA(DMTJEPAModel, BaseModel):
    """Pre-training of a plain ViT without labels (DMT-JEPA, section 3), or I-JEPA.

    Its weights are named `encoder.*`, `target_encoder.*`, `predictor.*`, `context_head.*`, `target_head.*`.

    Args:
        arch: "tiny", "small", "base", "large" or "huge", or dict(width, depth, heads).
        img_size: pixels, one side or (height, width). patch_size: side of a patch in pixels.
        predictor: dict(width, depth, heads) of what differs from the named sizes.
        msn: dict(window: 3, 5, ... or "all"; k; include_self; border: "shift", "wrap" or "mask"); None turns
            neighbours off. What it leaves out, here and in `lat` and `mask`, is the paper's.
        lat: dict(type: "learned" or "parameter_free"; depth; target_attn: "cross", "self", "average", "max" or
            "none"; context_attn: likewise without "none"; residual: whether the image's mean is added to the
            targets; context: "broadcast", "token" or "none"); None turns aggregation off. With msn None too: I-JEPA.
        loss: "mse" (the paper's) or "smooth_l1" (as released, and I-JEPA's).
        mask: dict(scope, and the fields of `MultiBlock`). Scope "process": block sizes and the cut to the
            shortest context are shared by the batch of a process, as published; "global": by all processes and
            accumulated iterations, so that their number changes nothing.
        ema: momentum of the first and last step; total_steps: of the run, set by `PretrainLoop`.
        in_chans: channels of the images.
        drop_path: highest rate of dropped paths in the encoder, from 0, below 1. checkpointing: recompute its
            activations in the backward pass.
        rank_period: steps between measurements of RankMe; 0 for none.
        data_preprocessor: an `ImagePreprocessor`, whose mean and std have one value a channel.

    Raises:
        ValueError: one sentence for a value, or a combination, that makes no sense.
    """

    def __init__(
        self,
        arch: str | Mapping[str, int] = "base",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        predictor: Mapping[str, int] | None = None,
        msn: Mapping[str, Any] | None = PAPER,
        lat: Mapping[str, Any] | None = PAPER,
        loss: str = "mse",
        mask: Mapping[str, Any] | None = None,
        ema: Sequence[float] = (0.996, 1.0),
        total_steps: int = 1,
        in_chans: int = 3,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        rank_period: int = 100,
        data_preprocessor: dict | None = None,
    ) -> None:
        encoder = build_encoder(
            arch, img_size, patch_size, in_chans=in_chans, drop_path=drop_path, checkpointing=checkpointing
        )
        settings = settings_of(msn, lat, loss)
        if rank_period < 0:
            raise ValueError(f"model.rank_period counts steps, 0 for none, got {rank_period}")
        super().__init__(
            encoder,
            build_predictor(encoder, arch, predictor),
            settings,
            ema=momenta(ema),
            total_steps=total_steps,
        )
        self.data_preprocessor = MODELS.build(data_preprocessor or {"type": "ImagePreprocessor"})
        means = getattr(self.data_preprocessor, "mean", None)
        if means is not None and len(means) != in_chans:
            raise ValueError(
                f"model.in_chans is {in_chans}, but model.data_preprocessor.mean has {len(means)} values: give mean "
                "and std one value a channel"
            )
        self.scope, self.mask = mask_settings(mask or {})
        self.mask.check(encoder.grid)
        if settings.neighbourhood is not None:
            settings.neighbourhood.check(encoder.grid)
        self.rank_period = rank_period
        self.ema_by_hook = False
        self._so_far: tuple[int, Any] = (-1, 0.0)  # a step, and the sums of its images

    def masks_of(self, place: BatchPlace, grid: tuple[int, int]) -> Masks:
        """Masks of one process's batch, on the CPU."""
        if self.scope == "process":
            index = torch.tensor(place.positions)
            return draw_masks(self.mask, grid, place.seed, index, place.positions[0])
        index = torch.arange(place.start, place.start + place.total)
        masks = draw_masks(self.mask, grid, place.seed, index, place.start)
        # what only fills this process takes the masks of the last image
        mine = (torch.tensor(place.positions) - place.start).clamp(max=place.total - 1)
        return Masks(masks.context[mine], masks.targets[mine])

    def forward(self, inputs: Tensor, place: BatchPlace | None = None, mode: str = "loss") -> Any:  # type: ignore[override]
        """
        Args:
            inputs: normalised images [B, C, H, W]. place: of the batch, for the loss.
            mode: "loss", or "tensor": features of the target encoder [B, N, D].

        Returns:
            For "loss" the loss, weighted by the share of the global batch that these images are, metrics of these
            images, "moments" of their targets [2, D], "error", their mean squared error, and "images", the number
            that counts.

        Raises:
            ValueError: another mode; the model trains without the hook that moves its targets.
        """
        if mode == "tensor":
            return self.target_encoder(inputs)
        if mode != "loss" or place is None:
            raise ValueError(f"DMTJEPA has the modes loss (with the batch's place) and tensor, got {mode!r}")
        if self.training and not self.ema_by_hook:
            raise ValueError(
                "nothing would move DMTJEPA's targets: add dict(type='TargetHook') to custom_hooks in the "
                "configuration"
            )
        grid = self.encoder.grid_of(inputs.shape[-2], inputs.shape[-1])
        masks = self.masks_of(place, grid).to(inputs.device)
        out = super().forward(inputs, masks)
        metrics = dict(out.metrics)
        if self.training and self.rank_period and self.steps_done % self.rank_period == 0:
            ranks = rank_metrics(out.maps["target"])
            metrics.update({name: inputs.new_tensor(value) for name, value in ranks.items()})
        images = inputs.new_tensor(float(place.counted))
        parts = {name: out.maps[name] for name in ("error", "moments")}
        return {"loss": out.losses["loss"] * self.share(place), **metrics, **parts, "images": images}

    def maps(self, inputs: Tensor, place: BatchPlace) -> dict[str, Tensor]:
        """Targets [B, N, D] and squared errors of a batch's predictions, as `HeldOutMeter` takes them."""
        grid = self.encoder.grid_of(inputs.shape[-2], inputs.shape[-1])
        masks = self.masks_of(place, grid).to(inputs.device)
        maps = super().forward(inputs, masks).maps
        return {**maps, "hidden_count": torch.tensor(float(masks.targets.numel()))}

    def share(self, place: BatchPlace) -> float:
        """Factor that makes the mean over processes and accumulated iterations the mean over all images."""
        return place.counted * self.parts() / place.total

    def parts(self) -> int:
        """Processes x accumulated iterations that share a global batch."""
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return processes * self.accumulation

    accumulation = 1  # set by `PretrainLoop`

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate; and everything to log.

        The loss is the mean over processes, which its weight makes that over images. Metrics are means over the
        images of the optimiser step so far, those of all processes and accumulated iterations; its target variance
        is that of all these images together, which does not change with how they are divided.
        """
        # never zero, since in an iteration of many no process may have an image
        weight = losses["images"].clamp(min=1e-6)
        kept = {
            name: value.detach().float() for name, value in losses.items() if name not in ("loss", "images")
        }
        values = torch.cat([value.flatten() * weight for value in kept.values()] + [weight[None]])
        loss, world = losses["loss"].detach().float()[None], 1
        if dist.is_available() and dist.is_initialized():
            values = torch.cat([values, loss])
            dist.all_reduce(values)
            values, loss = values[:-1], values[-1:]
            world = dist.get_world_size()
        step, sums = self._so_far
        if step == self.steps_done:
            values = values + sums
        self._so_far = self.steps_done, values
        means = (values[:-1] / values[-1]).split([value.numel() for value in kept.values()])
        logged = {name: mean.reshape(kept[name].shape) for name, mean in zip(kept, means, strict=True)}
        variance, error = variance_of(logged.pop("moments")), logged.pop("error")
        logged |= {"target_variance": variance, "explained_variance": 1 - error / variance}
        return losses["loss"], {**logged, "loss": loss[0] / world}
