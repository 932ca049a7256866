"""DMT-JEPA and I-JEPA as an mmengine model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from torch import Tensor

from jepa_plugins.core.collapse import rank_metrics
from jepa_plugins.core.dmt_jepa import DMTJEPAModel, DMTJEPASettings
from jepa_plugins.core.multiblock import Masks, MultiBlock, draw_masks
from jepa_plugins.core.neighbours import Neighbourhood
from jepa_plugins.core.vit import SIZES, Predictor, VisionTransformer
from jepa_plugins.mm.data import BatchPlace

SCOPES = ("process", "global")
# of the predictor, by the encoder: width and depth
PREDICTORS = {"tiny": (192, 6), "small": (384, 6), "base": (384, 6), "large": (384, 12), "huge": (384, 12)}


@MODELS.register_module()
class ImagePreprocessor(BaseDataPreprocessor):
    """uint8 crops -> model's device -> normalised float32.

    Args:
        mean, std: in grey levels (0..255), one value a channel.
    """

    def __init__(
        self,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
        non_blocking: bool = True,
    ) -> None:
        super().__init__(non_blocking)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """A batch of `collate_images` -> "inputs" float32 [B, C, H, W] and "place", which stays on the CPU."""
        images = data["inputs"].to(self.device, non_blocking=self._non_blocking)
        return {"inputs": (images.float() - self.mean) / self.std, "place": data["place"]}


def _checked(given: Mapping[str, Any], known: Sequence[str], name: str) -> dict[str, Any]:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"model.{name} has no {', '.join(unknown)}; it knows {', '.join(known)}")
    return dict(given)


def settings_of(msn: Mapping[str, Any] | None, lat: Mapping[str, Any] | None, loss: str) -> DMTJEPASettings:
    """The method's options from a configuration's `msn`, `lat` and `loss`; see `DMTJEPA`."""
    where = None
    if msn is not None:
        values = _checked(msn, ("window", "k", "include_self", "border"), "msn")
        if values.get("window") == "all":
            values["window"] = 0
        where = Neighbourhood(**values)
    if lat is None:
        if where is not None:
            raise ValueError(
                "model.msn chooses neighbours that model.lat aggregates, but lat is None: for neighbours without "
                "heads set lat=dict(type='parameter_free', target_attn='average', context='none')"
            )
        return DMTJEPASettings(neighbourhood=None, target="none", context="none", loss=loss)
    names = {
        "type": "lat",
        "depth": "depth",
        "target_attn": "target",
        "residual": "residual",
        "context": "context",
        "context_attn": "context_attention",
    }
    values = _checked(lat, tuple(names), "lat")
    return DMTJEPASettings(
        neighbourhood=where, loss=loss, **{names[key]: value for key, value in values.items()}
    )


def mask_settings(given: Mapping[str, Any]) -> tuple[str, MultiBlock]:
    """Scope and sampler of a configuration's `mask`; see `DMTJEPA`."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    scope = values.pop("scope", "process")
    if scope not in SCOPES:
        raise ValueError(f"model.mask.scope is one of {', '.join(SCOPES)}, got {scope!r}")
    return scope, MultiBlock(**_checked(values, tuple(MultiBlock.__dataclass_fields__), "mask"))


def build_encoder(
    arch: str | Mapping[str, int],
    img_size: int | Sequence[int],
    patch_size: int,
    **kwargs: Any,
) -> VisionTransformer:
    """An encoder of a named or given size; see `DMTJEPA`."""
    if isinstance(arch, str):
        if arch not in SIZES:
            raise ValueError(
                f"model.arch is one of {', '.join(SIZES)}, or dict(width=, depth=, heads=), got {arch!r}"
            )
        width, depth, heads = SIZES[arch]
    else:
        values = _checked(arch, ("width", "depth", "heads"), "arch")
        if len(values) < 3:
            raise ValueError(f"model.arch needs width, depth and heads, got {dict(arch)}")
        width, depth, heads = values["width"], values["depth"], values["heads"]
    if width % heads:
        raise ValueError(f"model.arch: {heads} heads do not divide the width {width}")
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
        msn: dict(window: 3, 5, ... or "all"; k; include_self; border: "shift", "wrap" or "mask"), or None.
        lat: dict(type: "learned" or "parameter_free"; depth; target_attn, context_attn: "cross", "self", "average"
            or "max"; residual; context: "broadcast", "token" or "none"), or None. With msn None too: I-JEPA.
        loss: "mse" (the paper's) or "smooth_l1" (as released, and I-JEPA's).
        mask: dict(scope, and the fields of `MultiBlock`). Scope "process": block sizes and the cut to the
            shortest context are shared by the batch of a process, as published; "global": by all processes and
            accumulated iterations, so that their number changes nothing.
        ema: momentum of the first and last step; total_steps: of the run, set by `PretrainLoop`.
        drop_path: of the encoder. checkpointing: recompute its activations in the backward pass.
        rank_period: steps between measurements of RankMe; 0 for none.

    Raises:
        ValueError: one sentence for a value, or a combination, that makes no sense.
    """

    def __init__(
        self,
        arch: str | Mapping[str, int] = "base",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        predictor: Mapping[str, int] | None = None,
        msn: Mapping[str, Any] | None = None,
        lat: Mapping[str, Any] | None = None,
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
        super().__init__(
            encoder,
            build_predictor(encoder, arch, predictor),
            settings,
            ema=(ema[0], ema[1]),
            total_steps=total_steps,
        )
        self.data_preprocessor = MODELS.build(data_preprocessor or {"type": "ImagePreprocessor"})
        self.scope, self.mask = mask_settings(mask or {})
        self.mask.check(encoder.grid)
        if settings.neighbourhood is not None:
            settings.neighbourhood.check(encoder.grid)
        self.rank_period = rank_period
        self.ema_by_hook = False

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
            For "loss" the loss, weighted by the share of the global batch that these images are, metrics, and
            "images", the number that counts.

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
        return {"loss": out.losses["loss"] * self.share(place), **metrics, "images": images}

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
        """The loss to differentiate; and everything to log: the loss as the mean over processes, which its weight
        makes that over images, and metrics as the mean over images."""
        # never zero, since in an iteration of many no process may have an image
        weight = losses["images"].clamp(min=1e-6)
        logged = {name: value.detach().float() for name, value in losses.items() if name != "images"}
        values = torch.stack([*(value * weight for value in logged.values()), weight, logged["loss"]])
        world = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values)
            world = dist.get_world_size()
        means = dict(zip(logged, (values[:-2] / values[-2]).unbind(), strict=True))
        return losses["loss"], {**means, "loss": values[-1] / world}
