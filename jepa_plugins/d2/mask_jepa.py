"""MaskJEPA: pre-training of a whole Mask2Former without labels, as a detectron2 meta-architecture."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from jepa_plugins.core.collapse import rank_metrics
from jepa_plugins.core.ema import ema_update, momentum_at, target_copy
from jepa_plugins.core.mask_jepa import MaskJEPAHead
from jepa_plugins.core.masking import draw_noise, expand_noise, valid_cells
from jepa_plugins.core.predictor import decoder_layers
from jepa_plugins.core.random import sample_keys
from jepa_plugins.core.settings import MaskJEPASettings
from jepa_plugins.core.step import StepOutput
from jepa_plugins.d2.backbones import build_backbone
from jepa_plugins.d2.config import mask_jepa_settings
from jepa_plugins.d2.inputs import normalised_batch
from jepa_plugins.d2.registration import build_head

# The noise is measured in these (in RGB order, 0..255), whatever the backbone's own normalisation.
IMAGENET_STD = (58.395, 57.12, 57.375)


GREY_LEVELS = {"unit": 255.0, "symmetric": 127.5}  # in one unit of the noise's space


def noise_scale(pixel_std: Sequence[float], input_format: str, space: str = "normalized") -> list[float]:
    """Factor per channel from units of the noise's space to the network's input scale.

    Args:
        pixel_std: grey levels (0..255) in one unit of the input, per channel.
        space: units of ImageNet's standard deviation ("normalized"), of pixels in [0, 1] ("unit") or in
            [-1, 1] ("symmetric").
    """
    if space in GREY_LEVELS:
        return [GREY_LEVELS[space] / std for std in pixel_std]
    if len(pixel_std) != len(IMAGENET_STD):
        return [1.0] * len(pixel_std)  # no ImageNet scale for other channel counts: the data set's own
    unit = IMAGENET_STD[::-1] if input_format == "BGR" else IMAGENET_STD
    return [a / b for a, b in zip(unit, pixel_std, strict=True)]


@META_ARCH_REGISTRY.register()
class MaskJEPA(nn.Module):
    """Backbone, pixel decoder and transformer decoder of the configured names, with Mask-JEPA's targets and
    losses.

    Args:
        backbone, sem_seg_head: as MaskFormer has them, under the same names; the head holds `pixel_decoder`
            and `predictor`.
        head: the parts that exist only while pre-training.
        freeze_backbone: no gradient, eval mode, shared by both branches; else it trains and has an EMA copy.
        noise_factors: per channel, from `noise_scale`.
        ema: momentum at the first and last step; total_steps: optimiser steps of the whole run.
        rank_period: steps between two measurements of RankMe; 0 never.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        sem_seg_head: nn.Module,
        head: MaskJEPAHead,
        freeze_backbone: bool,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        noise_factors: Sequence[float],
        size_divisibility: int,
        ema: tuple[float, float],
        total_steps: int,
        seed: int,
        rank_period: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.jepa = head
        self.freeze_backbone = freeze_backbone
        self.size_divisibility = size_divisibility
        self.ema, self.total_steps = ema, total_steps
        self.seed, self.rank_period = seed, rank_period
        self.forwards = 0  # in training, since the last optimiser step
        self.ema_by_hook = False  # set by the training loop that calls `update_target` itself
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.register_buffer("noise_factors", torch.tensor(noise_factors).view(-1, 1, 1), persistent=False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ema_pending", torch.zeros((), dtype=torch.bool))
        self._freeze_unused()
        # The checkpointer makes them copies again after it has loaded initial weights.
        self.target_pixel_decoder = target_copy(sem_seg_head.pixel_decoder)
        self.target_backbone = None if freeze_backbone else target_copy(backbone)
        self.train(self.training)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Arguments from detectron2's configuration."""
        backbone = build_backbone(cfg)
        former, jepa, head = cfg.MODEL.MASK_FORMER, cfg.MODEL.MASK_JEPA, cfg.MODEL.SEM_SEG_HEAD
        divisibility = max(former.SIZE_DIVISIBILITY, backbone.size_divisibility, 32)
        return {
            "backbone": backbone,
            "sem_seg_head": build_head(cfg, backbone.output_shape()),
            "head": MaskJEPAHead(
                mask_jepa_settings(cfg),
                feature_dim=head.CONVS_DIM,
                mask_dim=head.MASK_DIM,
                hidden_dim=former.HIDDEN_DIM,
                heads=former.NHEADS,
                feedforward=former.DIM_FEEDFORWARD,
                image_channels=len(cfg.MODEL.PIXEL_MEAN),
                num_queries=former.NUM_OBJECT_QUERIES,
                grid=crop_grid(cfg.INPUT.PRETRAIN_CROP_SIZE, jepa.RECON_STRIDE, divisibility),
            ),
            "freeze_backbone": jepa.FREEZE_BACKBONE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "noise_factors": noise_scale(cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT, jepa.NOISE.SPACE),
            "size_divisibility": divisibility,
            "ema": (jepa.EMA.START, jepa.EMA.END),
            "total_steps": cfg.SOLVER.MAX_ITER,
            "seed": max(cfg.SEED, 0),
            "rank_period": jepa.RANK_PERIOD,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    @property
    def settings(self) -> MaskJEPASettings:
        """The method's options."""
        return self.jepa.settings

    def _freeze_unused(self) -> None:
        """Parameters that no loss reaches take no gradient, so that distributed training need not search for
        them."""
        if self.freeze_backbone:
            self.backbone.requires_grad_(False)
        elif not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            raise ValueError(
                "MODEL.MASK_JEPA.FREEZE_BACKBONE is False, but the backbone is frozen: set it to True, or "
                "MODEL.TIMM.FREEZE to False (MODEL.BACKBONE.FREEZE_AT to 0)"
            )
        used = self.settings.predictor_parts()
        read = "|".join(map(str, self.trained_level_rows()))
        other_levels = re.compile(rf"input_proj\.(?!({read})\.)")
        for name, parameter in self.sem_seg_head.predictor.named_parameters():
            if not name.startswith(used) or other_levels.match(name):
                parameter.requires_grad_(False)
        if self.settings.denoise_weight == 0 and hasattr(self.backbone, "norm0"):
            self.backbone.norm0.requires_grad_(False)  # Swin's norm of res2 leads to the stride-4 map only
        for name, parameter in self.sem_seg_head.pixel_decoder.named_parameters():
            if self.settings.denoise_weight == 0 and not name.startswith(("input_proj", "transformer")):
                parameter.requires_grad_(False)  # leads to the stride-4 map only
            elif self.settings.denoise_feature == "stride4" and name.startswith("mask_features"):
                parameter.requires_grad_(False)

    def trained_level_rows(self) -> list[int]:
        """Indices of the pixel decoder's maps, and so of the rows of `level_embed`, that the predictor reads."""
        if self.settings.recon_weight == 0:
            return []
        layers = len(decoder_layers(self.sem_seg_head.predictor))
        return sorted(set(self.settings.reading_order(layers)))

    def train(self, mode: bool = True) -> MaskJEPA:
        """As usual, but targets and a frozen backbone stay in eval mode."""
        super().train(mode)
        self.target_pixel_decoder.eval()
        if self.target_backbone is not None:
            self.target_backbone.eval()
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def ema_momentum(self) -> float:
        """Of the next update of the target."""
        return momentum_at(int(self.step), self.total_steps, *self.ema)

    def update_target(self) -> float:
        """Move the targets once, after an optimiser step (eq. 8), and count the step; returns the momentum
        used."""
        momentum = self.ema_momentum()
        ema_update(self.target_pixel_decoder, self.sem_seg_head.pixel_decoder, momentum)
        if self.target_backbone is not None:
            ema_update(self.target_backbone, self.backbone, momentum)
        self.step += 1
        self.forwards = 0
        self.ema_pending.fill_(False)
        return momentum

    def _sample_index(self, batched_inputs: Sequence[dict]) -> Tensor:
        if "sample_index" in batched_inputs[0]:
            return torch.tensor([item["sample_index"] for item in batched_inputs])
        size = len(batched_inputs)  # a foreign loader: place in a batch that all processes fill alike
        first = int(self.step) * size * comm.get_world_size() + comm.get_rank() * size
        # further batches of one step, under a loop that accumulates, draw far behind the run's own samples
        first += self.forwards << 40
        return torch.arange(first, first + size)

    def _online_features(self, x: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            return self.backbone(x)

    @torch.no_grad()
    def _target_map(self, x: Tensor) -> Tensor:
        backbone = self.backbone if self.target_backbone is None else self.target_backbone
        return decoded_levels(self.target_pixel_decoder, backbone(x))[self.settings.level]

    def run_step(self, batched_inputs: Sequence[dict]) -> StepOutput:
        """Both branches and the losses of one batch (section 3); moves nothing."""
        images: ImageList = normalised_batch(
            batched_inputs, self.pixel_mean, self.pixel_std, self.size_divisibility
        )
        x, settings = images.tensor, self.settings
        sizes = [(int(h), int(w)) for h, w in images.image_sizes]
        index = self._sample_index(batched_inputs)
        noise_keys = sample_keys(self.seed, index, "noise").to(x.device)
        noise = draw_noise(noise_keys, x.shape[1], (x.shape[2], x.shape[3]), settings.noise_sigma)
        inside = valid_cells(sizes, (x.shape[2], x.shape[3]), 1).to(x.device)[:, None]
        noisy = x + self.noise_factors * expand_noise(noise) * inside
        levels, denoise_feature = self._online_maps(noisy)
        out = self.jepa(
            self.sem_seg_head.predictor,
            levels=levels,
            denoise_feature=denoise_feature,
            target=self._target_map(x) if settings.recon_weight > 0 else None,
            noise=noise,
            image=x,
            tile_keys=sample_keys(self.seed, index, "tiles"),
            image_sizes=sizes,
        )
        if not self.training:
            out.maps.update(noise=noise, noisy=noisy)
        return out

    def _online_maps(self, x: Tensor) -> tuple[Sequence[Tensor], Tensor | None]:
        """The maps at strides 32, 16 and 8, and the one that denoising reads, if any."""
        features, decoder = self._online_features(x), self.sem_seg_head.pixel_decoder
        if self.settings.denoise_weight == 0:
            return decoded_levels(decoder, features), None
        if self.settings.denoise_feature == "mask_features":
            decoded = decode(decoder, features)
            return decoded[2], decoded[0]
        with captured_input(decoder.mask_features) as captured:
            decoded = decode(decoder, features)
        return decoded[2], captured[0]

    def forward(self, batched_inputs: Sequence[dict]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """
        Args:
            batched_inputs: dicts with "image" uint8 [c, H, W] and, from our loader, "sample_index".

        Returns:
            In training the losses (their sum is the objective), metrics going to detectron2's event storage;
            else a list with one dict, the batch's maps as `HeldOutMeter.update` takes them.
        """
        if not self.training:
            return [self.run_step(batched_inputs).maps]
        if bool(self.ema_pending):
            self.update_target()
        out = self.run_step(batched_inputs)
        self.forwards += 1
        self._log(out)
        if not self.ema_by_hook:
            self.ema_pending.fill_(True)
        return out.losses

    def _log(self, out: StepOutput) -> None:
        try:
            storage = get_event_storage()
        except AssertionError:  # no training loop around us
            return
        metrics = {name: float(value) for name, value in out.metrics.items()}
        if self.rank_period and "target" in out.maps and int(self.step) % self.rank_period == 0:
            metrics.update(rank_metrics(out.maps["target"]))
        storage.put_scalars(smoothing_hint=False, ema_momentum=self.ema_momentum(), **metrics)

    @torch.no_grad()
    def features(self, batched_inputs: Sequence[dict], which: str = "online") -> dict[str, Tensor]:
        """Maps of clean images, for probes and pictures: "stride4" [B, mask_dim, H/4, W/4], "stride8"
        [B, C, H/8, W/8].

        Args:
            which: the "online" copy or the target ("ema").
        """
        images = normalised_batch(batched_inputs, self.pixel_mean, self.pixel_std, self.size_divisibility)
        backbone, decoder = self.backbone, self.sem_seg_head.pixel_decoder
        if which == "ema":
            backbone, decoder = self.target_backbone or backbone, self.target_pixel_decoder
        decoded = decode(decoder, backbone(images.tensor))
        return {"stride4": decoded[0], "stride8": decoded[2][2]}


def decode(pixel_decoder: nn.Module, features: dict[str, Tensor]) -> Sequence[Any]:
    """What `forward_features` returns, in float32 under any autocast: the published decoder turns CUDA's off
    alone."""
    device = next(iter(features.values())).device
    with torch.autocast(device.type, enabled=False):
        return pixel_decoder.forward_features(features)


def decoded_levels(pixel_decoder: nn.Module, features: dict[str, Tensor]) -> Sequence[Tensor]:
    """The pixel decoder's maps at strides 32, 16 and 8; ours need not compute the stride-4 map for them."""
    if hasattr(pixel_decoder, "forward_levels"):
        return pixel_decoder.forward_levels(features)
    return decode(pixel_decoder, features)[2]


def crop_grid(crop: Sequence[int], stride: int, divisibility: int) -> tuple[int, int]:
    """Cells (height, width) of the map of one training crop, (height, width) in pixels, after padding."""
    height, width = (-(-side // divisibility) * divisibility // stride for side in crop)
    return height, width


@contextlib.contextmanager
def captured_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first argument of each call of `module` inside the `with`."""
    calls: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    try:
        yield calls
    finally:
        handle.remove()
