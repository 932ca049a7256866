"""A plain ViT as a backbone of mmsegmentation's and its relatives' dense models, and a norm for linear heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from jepa_plugins.core.vit import VisionTransformer, size_of
from jepa_plugins.core.vit_weights import admitting_plain, load_encoder, recognise


def _last_blocks(out_indices: Sequence[int], depth: int) -> tuple[int, ...]:
    """Ascending numbers of blocks, from 0; negative ones count from the last."""
    indices = tuple(i + depth if i < 0 else i for i in out_indices)
    if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < depth:
        raise ValueError(
            f"backbone.out_indices are ascending numbers of blocks from 0 to {depth - 1}, got {list(out_indices)}"
        )
    return indices


@MODELS.register_module()
class JEPAViT(VisionTransformer, BaseModule):
    """Feature maps of a plain ViT, for dense heads: images of any size, padded to whole patches.

    A checkpoint of this project's pre-training, of I-JEPA, or one that `tools/convert_weights.py` wrote loads with
    `init_cfg=dict(type="Pretrained", checkpoint=FILE)`; of a pre-training checkpoint the target encoder is taken,
    with `encoder="context"` beside `checkpoint` the context encoder.
    Blocks after the last of `out_indices` are not built.

    Args:
        arch: "tiny", "small", "base", "large" or "huge", or dict(width, depth, heads).
        img_size: pixels, one side or (height, width), that the table of positions is made for; it is resampled for
            other sizes, best avoided by giving the training size. patch_size: side of a patch in pixels.
        out_indices: blocks, from 0, whose tokens become maps; negative ones count from the last.
        final_norm: norm the last map, as pre-training did; without it all maps are raw, as dense models of
            mmsegmentation and detectron2 take them.
        drop_path: rate at the last block, growing linearly from 0.
        frozen: nothing trains, and drop path is off; frozen_stages: the patch embedding and so many first blocks
            do not train; -1 for none, 0 for the patch embedding alone.
        train_positions: the table of positions trains; it is fixed in pre-training.
        in_chans: channels of the images.
        class_token, layer_scale (initial value), rel_pos_bias: for weights of other methods.
        checkpointing: recompute the blocks' activations in the backward pass.

    Raises:
        ValueError: one sentence for a value, or a combination, that makes no sense.
    """

    def __init__(
        self,
        arch: str | Mapping[str, int] = "base",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        out_indices: Sequence[int] = (3, 5, 7, 11),
        *,
        final_norm: bool = False,
        drop_path: float = 0.0,
        frozen: bool = False,
        frozen_stages: int = -1,
        train_positions: bool = False,
        class_token: bool = False,
        layer_scale: float | None = None,
        rel_pos_bias: bool = False,
        in_chans: int = 3,
        checkpointing: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        width, depth, heads = size_of(arch, "backbone.arch")
        indices = _last_blocks(out_indices, depth)
        super().__init__(
            img_size,
            patch_size,
            width=width,
            depth=depth,
            heads=heads,
            in_chans=in_chans,
            drop_path=drop_path,
            class_token=class_token,
            init_values=layer_scale,
            rel_pos_bias=rel_pos_bias,
            checkpointing=checkpointing,
        )
        self.init_cfg, self.out_indices = _checked_init(init_cfg), indices
        del self.blocks[self.out_indices[-1] + 1 :]
        if not final_norm:
            self.norm = nn.Identity()
        if not -1 <= frozen_stages <= len(self.blocks):
            raise ValueError(
                f"backbone.frozen_stages is -1 to {len(self.blocks)}, the blocks in use, got {frozen_stages}"
            )
        self.frozen, self.frozen_stages = frozen, frozen_stages
        self.pos_embed.requires_grad_(train_positions)
        for part in self.frozen_parts():
            part.requires_grad_(False)

    def frozen_parts(self) -> list[nn.Module | nn.Parameter]:
        """What does not train, by `frozen` and `frozen_stages`."""
        if self.frozen:
            return [self]
        if self.frozen_stages < 0:
            return []
        tokens = [self.pos_embed, *([] if self.cls_token is None else [self.cls_token])]
        return [self.patch_embed, *tokens, *self.blocks[: self.frozen_stages]]

    def train(self, mode: bool = True) -> JEPAViT:
        """As of any module; frozen parts stay as in evaluation."""
        super().train(mode)
        for part in self.frozen_parts() if mode else ():
            if part is self:
                super().train(False)
            elif isinstance(part, nn.Module):
                part.train(False)
        return self

    def init_weights(self) -> None:
        """Load the checkpoint of `init_cfg`, and say what was loaded, resized, left out and missing.

        Raises:
            CheckpointError, FileNotFoundError: one sentence, when anything of this model is missing.
        """
        if self._is_init:
            return
        if self.init_cfg:
            path = self.init_cfg["checkpoint"]
            with admitting_plain():
                content = CheckpointLoader.load_checkpoint(path, map_location="cpu", logger="silent")
            encoder = recognise(content, source=str(path), **_options(self))
            report = load_encoder(self, encoder, str(path))
            lines = [f"JEPAViT: weights of {encoder.origin}", *encoder.notes, str(report)]
            print_log("\n  ".join(lines), logger="current")
        self._is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """
        Args:
            x: images [B, c, H, W] of any size.

        Returns:
            For each of `out_indices` a map [B, D, ceil(H / patch), ceil(W / patch)].
        """
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.patch_size, 0, -height % self.patch_size))
        grid = self.grid_of(x.shape[-2], x.shape[-1])
        maps = []
        for i, tokens in enumerate(self.layers(self.embed(x), grid)):
            if i not in self.out_indices:
                continue
            if i == self.out_indices[-1]:
                tokens = self.norm(tokens)
            maps.append(tokens[:, self.prefix :].transpose(1, 2).unflatten(2, grid).contiguous())
        return tuple(maps)


def _options(model: JEPAViT) -> dict[str, Any]:
    """What the model knows of a file that does not tell."""
    return {"heads": model.heads, "which": model.init_cfg.get("encoder"), "expected": model.grid}


def _checked_init(init_cfg: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if init_cfg is None:
        return None
    if init_cfg.get("type") != "Pretrained" or "checkpoint" not in init_cfg:
        raise ValueError(
            "backbone.init_cfg of JEPAViT is None or dict(type='Pretrained', checkpoint=FILE), where encoder="
            f"'context' takes the other encoder of a pre-training; got {dict(init_cfg)}"
        )
    return dict(init_cfg)


@MODELS.register_module()
class FeatureBatchNorm(BaseModule):
    """Neck of a linear head: a batch norm on each map, synchronised over processes.

    Args:
        channels: of every map. maps: how many there are.
    """

    def __init__(self, channels: int, maps: int = 1, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.norms = nn.ModuleList(nn.SyncBatchNorm(channels) for _ in range(maps))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps [B, channels, H, W] -> the same."""
        return tuple(norm(x) for norm, x in zip(self.norms, inputs, strict=True))
