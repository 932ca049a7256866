"""Proof that converted weights of a plain ViT compute what the source computes, on a test image.

The source runs in timm's model of its kind, which is not ours; the result in the target's own model. Where something
was changed by design, the same is changed in the source, and the rest has to agree as exactly as without.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from jepa_plugins.core.checkpoints import state_dict_of
from jepa_plugins.core.vit import VisionTransformer
from jepa_plugins.core.vit_convert import Converted, file_content
from jepa_plugins.core.vit_weights import Encoder, ViTShape, resample_grid
from jepa_plugins.core.vitdet import DetectionViT


@dataclass
class Proof:
    """How far the target's features are from the source's, on one image.

    worst: largest difference of a value, relative to the largest value, from the source with the same changes by
    design. cosine: mean similarity of the patches to the source as it is.
    """

    worst: float
    cosine: float
    by_design: list[str] = field(default_factory=list)

    tolerance = 1e-4

    @property
    def right(self) -> bool:
        """Whether the features are the same, but for what was changed by design."""
        return self.worst <= self.tolerance

    @property
    def exact(self) -> bool:
        """Whether the features are the same, and nothing was changed by design."""
        return self.right and not self.by_design

    def __str__(self) -> str:
        worst = f"largest difference {self.worst:.1e} of the largest value"
        if not self.by_design:
            verdict = "exact" if self.right else "WRONG"
            return f"{verdict}: {worst}, cosine similarity {self.cosine:.6f}"
        changes = f"changed by design: {'; '.join(self.by_design)}; cosine similarity {self.cosine:.4f}"
        return f"{changes}; the rest {'exact' if self.right else 'WRONG'}: {worst}"


def generated_image(size: tuple[int, int], channels: int = 3) -> Tensor:
    """A picture of smooth shapes and grain, float32 [1, channels, height, width], about normalised."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, channels, 7, 7, generator=generator)
    image = F.interpolate(coarse, size=size, mode="bicubic")
    return image + 0.3 * torch.randn(image.shape, generator=generator)


def reference(source: Encoder) -> nn.Module:
    """timm's model of the source's kind with the source's weights: an implementation that is not ours."""
    shape = source.shape
    if shape.rel_pos_bias:
        if any(name.endswith("q_bias") for name in source.published):
            return _beit_reference(source)
        return plain_model(shape, source.weights)  # a converted file
    weights = OrderedDict(source.weights)
    if shape.registers and shape.class_token:  # timm adds positions to patches alone
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    return _timm_model(shape, weights)


def _timm_options(shape: ViTShape) -> dict[str, Any]:
    """Arguments of timm's plain ViT and BEiT."""
    return {
        "img_size": shape.img_size,
        "patch_size": shape.patch_size,
        "in_chans": shape.in_chans,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "num_classes": 0,
        "global_pool": "",
        "init_values": 1.0 if shape.layer_scale else None,
    }


def _timm_model(shape: ViTShape, weights: Mapping[str, Tensor]) -> nn.Module:
    """timm's plain ViT with weights under its own names."""
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    model = TimmViT(
        **_timm_options(shape),
        class_token=shape.class_token,
        reg_tokens=shape.registers,
        no_embed_class=bool(shape.registers),
    )
    _fill(model, weights, shape.norm)
    return model.eval()


def _beit_reference(source: Encoder) -> nn.Module:
    from timm.models.beit import Beit

    shared = any(name.startswith("rel_pos_bias.") for name in source.published)
    own = any(".attn.relative_position_bias_table" in name for name in source.published)
    model = Beit(
        **_timm_options(source.shape),
        use_abs_pos_emb="pos_embed" in source.published,
        use_rel_pos_bias=own,
        use_shared_rel_pos_bias=shared,
    )
    names = model.state_dict()
    weights = OrderedDict((k, v) for k, v in source.published.items() if k in names)
    if "fc_norm.weight" in source.published:
        weights.update({f"norm.{part}": source.published[f"fc_norm.{part}"] for part in ("weight", "bias")})
    _fill(model, weights, source.shape.norm)
    return model.eval()


def plain_model(shape: ViTShape, weights: Mapping[str, Tensor]) -> VisionTransformer:
    """Our ViT, which mmsegmentation's `JEPAViT` is."""
    model = VisionTransformer(
        shape.img_size,
        shape.patch_size,
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        in_chans=shape.in_chans,
        class_token=shape.class_token,
        init_values=1.0 if shape.layer_scale else None,
        rel_pos_bias=shape.rel_pos_bias,
    )
    _fill(model, weights, shape.norm)
    return model.eval()


def _fill(model: nn.Module, weights: Mapping[str, Tensor], norm: bool) -> None:
    """Load every tensor; a final norm that the weights have not becomes the identity."""
    if not norm:
        model.norm = nn.Identity()
    model.load_state_dict(weights)


def read_target(content: Mapping[str, Any], encoder: Encoder, target: str) -> nn.Module:
    """The target's model with the content of the file that was written for it."""
    weights = state_dict_of(content)
    if target == "detectron2":
        return _detection_model(encoder.shape, weights)
    if target == "mmseg":
        return plain_model(encoder.shape, weights)
    if encoder.shape.rel_pos_bias:
        return reference(replace(encoder, published=weights, weights=weights))
    return _timm_model(encoder.shape, weights)


def _detection_model(shape: ViTShape, weights: Mapping[str, Tensor]) -> DetectionViT:
    """detectron2's ViT without windows, which would change what the source computes."""
    model = DetectionViT(
        shape.img_size[0],
        patch_size=shape.patch_size,
        in_chans=shape.in_chans,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        pretrain_img_size=shape.img_size,
    )
    model.load_state_dict({name.removeprefix("backbone.net."): value for name, value in weights.items()})
    return model.eval()


def _features(model: nn.Module, image: Tensor, shape: ViTShape) -> Tensor:
    """Of the patches, as a map [1, D, rows, columns]."""
    if isinstance(model, DetectionViT):
        return model.features(image)
    forward: Any = model if isinstance(model, VisionTransformer) else model.forward_features
    tokens = forward(image)[:, int(shape.class_token) + shape.registers :]
    return tokens.transpose(1, 2).unflatten(2, shape.grid)


def changed_by_design(source: Encoder, shape: ViTShape) -> Encoder:
    """The source with the tokens, relative positions, patches and grid of `shape`, and all else as it is."""
    old = source.shape
    weights = OrderedDict(source.weights)
    if old.registers and not shape.registers:
        del weights["reg_token"]
    if old.class_token and not shape.class_token:
        del weights["cls_token"]
        weights["pos_embed"] = weights["pos_embed"][:, -old.grid[0] * old.grid[1] :]
    offsets = (2 * old.grid[0] - 1) * (2 * old.grid[1] - 1)
    for name in [name for name in weights if name.endswith("relative_position_bias_table")]:
        table = weights.pop(name)
        if shape.rel_pos_bias:
            weights[name] = table if shape.class_token else table[:offsets]
    if shape.patch_size != old.patch_size:
        kernel = weights["patch_embed.proj.weight"]
        weights["patch_embed.proj.weight"] = resample_patch_embed(kernel, [shape.patch_size] * 2)
    kept = replace(shape, layer_scale=old.layer_scale, norm=old.norm)
    weights = resample_grid(weights, replace(kept, grid=old.grid), shape.grid)
    return replace(source, shape=kept, weights=weights, published=weights)


def _run(model: nn.Module, image: Tensor, encoder: Encoder, norm: bool) -> Tensor:
    """Features of an image in an encoder's model; without its final norm unless `norm`."""
    if not norm:
        model.norm = nn.Identity()
    return _features(model, _seen(image, encoder), encoder.shape)


def _difference(got: Tensor, want: Tensor) -> float:
    """The largest, relative to the largest value that is wanted."""
    return float((got - want).abs().max() / want.abs().max())


@torch.no_grad()
def prove(source: Encoder, converted: Converted, target: str, image: Tensor | None = None) -> Proof:
    """Run source and target on one image and compare the features of their patches.

    Args:
        image: float32 [1, c, H, W], RGB, normalised; a generated one if None.
    """
    after = converted.encoder
    image = generated_image(source.shape.img_size, source.shape.in_chans) if image is None else image
    norm = after.shape.norm
    want = _run(reference(source), image, source, norm)
    got = _run(read_target(file_content(converted, target), after, target), image, after, True)
    if not converted.by_design:
        return Proof(_difference(got, want), float(F.cosine_similarity(got, want, dim=1).mean()))
    changed = changed_by_design(source, after.shape)
    worst = _difference(got, _run(reference(changed), image, changed, norm))
    if source.shape.rel_pos_bias:  # whose own model reads the published names, and `changed` reads ours
        same = _run(plain_model(source.shape, source.weights), image, source, norm)
        worst = max(worst, _difference(same, want))
    if want.shape != got.shape:
        want = F.interpolate(want, size=got.shape[-2:], mode="bilinear", align_corners=False)
    cosine = float(F.cosine_similarity(got, want, dim=1).mean())
    return Proof(worst, cosine, converted.by_design)


def _seen(image: Tensor, encoder: Encoder) -> Tensor:
    """The image in the encoder's size and order of channels."""
    size = encoder.shape.img_size
    if tuple(image.shape[-2:]) != size:
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True)
    return image.flip(1) if encoder.bgr else image
