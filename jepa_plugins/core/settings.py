"""Mask-JEPA's options, validated together."""

from __future__ import annotations

from dataclasses import dataclass, fields

LEVEL_STRIDES = (32, 16, 8)  # of the pixel decoder's maps, in its order
# Parameters of the transformer decoder that the predictor uses, by the first part of their names.
PREDICTOR_PARTS = (
    "transformer_cross_attention_layers",
    "transformer_self_attention_layers",
    "transformer_ffn_layers",
    "decoder_norm",
    "level_embed",
    "input_proj",
)
QUERY_TABLES = ("query_feat", "query_embed")  # the decoder's own queries, which "query_mix" uses
CHOICES: dict[str, tuple[str, ...]] = {
    "noise_space": ("normalized", "unit", "symmetric"),
    "mask_sampling": ("exact", "bernoulli"),
    "levels": ("single", "round_robin"),
    "readout": ("spatial_queries", "masked_queries", "query_mix"),
    "placement": ("post", "pre", "image"),
    "recon_reduction": ("mean", "sum", "norm"),
    "denoise_target": ("noise", "image"),
    "denoise_feature": ("mask_features", "stride4"),
    "denoise_noise_scale": ("raw", "unit"),
    "denoise_downsample": ("area", "bilinear", "nearest"),
}


@dataclass(frozen=True)
class MaskJEPASettings:
    """The method's hyper-parameters; the defaults are the paper's (section 4.1).

    Args:
        noise_sigma: standard deviation of the noise, in the units of `noise_space`: ImageNet's per-channel
            standard deviation ("normalized"), pixels in [0, 1] ("unit") or pixels in [-1, 1] ("symmetric").
        mask_ratio: share of tiles hidden, 0 < ratio < 1. mask_sampling: "exact" count an image, or each tile
            by itself ("bernoulli").
        mask_patch: side p of a tile in cells of the reconstructed map.
        recon_stride: stride of the reconstructed map: 8, 16 or 32.
        levels: layers read the reconstructed map only ("single"), or strides 32, 16, 8 in turn, as in
            fine-tuning ("round_robin"); then all three are masked with the same tiles.
        pos_on_value: add the position to the values too, not to the keys alone.
        self_attention_blocks: M extra blocks; placement: on the queries after the decoder's own layers
            ("post") or before them ("pre"), or on the masked cells before they are read ("image").
        readout: one query per cell ("spatial_queries"), per hidden cell ("masked_queries"), or the decoder's
            own queries, mixed linearly into the cells of one fixed grid ("query_mix").
        readout_norm: the decoder's final norm before the read-out.
        recon_reduction: of the squared error over channels: "mean", "sum", or the "norm" (its root).
        denoise_target: what the 1x1 convolution predicts: the "noise" or the clean "image".
        denoise_feature: the pixel decoder's "mask_features", or the "stride4" map that they are a 1x1
            convolution of.
        denoise_noise_scale: the noise as drawn ("raw") or divided by sigma ("unit").
        denoise_downsample: of the clean image to stride 4.
        recon_weight, denoise_weight: of the two losses; 0 turns a loss off.

    Raises:
        ValueError: one sentence for a value, or a combination, that makes no sense.
    """

    noise_sigma: float = 0.4
    noise_space: str = "normalized"
    mask_ratio: float = 0.5
    mask_sampling: str = "exact"
    mask_patch: int = 8
    recon_stride: int = 8
    levels: str = "single"
    pos_on_value: bool = False
    self_attention_blocks: int = 2
    placement: str = "post"
    readout: str = "spatial_queries"
    readout_norm: bool = True
    recon_reduction: str = "mean"
    denoise_target: str = "noise"
    denoise_feature: str = "mask_features"
    denoise_noise_scale: str = "raw"
    denoise_downsample: str = "area"
    recon_weight: float = 1.0
    denoise_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                words = name.replace("_", " ")
                raise ValueError(f"the {words} is one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for wrong, sentence in (*self._value_problems(), *self._combination_problems()):
            if wrong:
                raise ValueError(sentence)

    def _value_problems(self) -> list[tuple[bool, str]]:
        return [
            (self.noise_sigma < 0, f"the noise's sigma must not be negative, got {self.noise_sigma}"),
            (not 0 < self.mask_ratio < 1, f"the mask ratio must lie between 0 and 1, got {self.mask_ratio}"),
            (self.mask_patch < 1, f"a mask patch has at least one cell, got {self.mask_patch}"),
            (self.recon_stride not in LEVEL_STRIDES, f"the stride is 8, 16 or 32, got {self.recon_stride}"),
            (self.self_attention_blocks < 0, f"M must not be negative, got {self.self_attention_blocks}"),
            (min(self.recon_weight, self.denoise_weight) < 0, "loss weights must not be negative"),
        ]

    def _combination_problems(self) -> list[tuple[bool, str]]:
        noise_target = self.denoise_weight > 0 and self.denoise_target == "noise"
        defaults = {field.name: field.default for field in fields(self)}
        pixels = self.mask_patch * self.recon_stride
        return [
            (
                self.recon_weight == self.denoise_weight == 0,
                "both losses are off, so there is nothing to train",
            ),
            (
                noise_target and self.noise_sigma == 0,
                "predicting the noise makes no sense with sigma 0: predict the image, or turn the denoising "
                "loss off",
            ),
            (
                self.denoise_target == "noise" and self.denoise_downsample != defaults["denoise_downsample"],
                "the denoise downsample concerns the clean image, but the denoise target is the noise",
            ),
            (
                self.denoise_target == "image"
                and self.denoise_noise_scale != defaults["denoise_noise_scale"],
                "the denoise noise scale concerns the noise, but the denoise target is the image",
            ),
            (
                self.self_attention_blocks == 0 and self.placement != defaults["placement"],
                f"placement {self.placement} places the extra self-attention blocks, but M is 0",
            ),
            (
                self.levels == "round_robin" and pixels % LEVEL_STRIDES[0] != 0,
                f"round robin hides the same tiles at strides 32, 16 and 8, but a tile of {self.mask_patch} "
                f"cells of stride {self.recon_stride} is no whole number of stride-32 cells wide: make the "
                f"mask patch a multiple of {LEVEL_STRIDES[0] // self.recon_stride}",
            ),
        ]

    @property
    def level(self) -> int:
        """Index of the reconstructed map in the pixel decoder's list."""
        return LEVEL_STRIDES.index(self.recon_stride)

    def reading_order(self, layers: int) -> tuple[int, ...]:
        """Index of the map that each of the decoder's layers reads."""
        if self.levels == "round_robin":
            return tuple(layer % len(LEVEL_STRIDES) for layer in range(layers))
        return (self.level,) * layers

    def predictor_parts(self) -> tuple[str, ...]:
        """Parameters of the transformer decoder that train, by the first part of their names."""
        if self.recon_weight == 0:
            return ()
        parts = [part for part in PREDICTOR_PARTS if part != "decoder_norm" or self.readout_norm]
        return (*parts, *(QUERY_TABLES if self.readout == "query_mix" else ()))
