"""Encoder and decoder with one layer down and one layer up per level, and concatenated skips.

Each network defines its own levels (see vnet.py, unet3d.py); this module connects them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_conres.architectures.blocks import crop, maybe_checkpoint
from nnunet_conres.architectures.network import PlansNetwork


class StagesAfterStem:
    """Forward pass of an encoder that consists of a ``stem`` and ``stages``, each at a lower resolution.

    Attributes:
        checkpointing: Whether stages are recomputed for backward instead of being kept.
    """

    checkpointing: bool
    stem: nn.Module
    stages: nn.ModuleList | nn.Sequential

    def forward(self: Any, x: Tensor) -> list[Tensor]:
        """Map images (B, C, X, Y, Z) to the features of all stages, highest resolution first."""
        features = []
        for stage in range(len(self.stages)):
            x = maybe_checkpoint(self.checkpointing, self, self._stage, stage, x)
            features.append(x)
        return features

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        return self.stages[stage](self.stem(x) if stage == 0 else x)


class Encoder(nn.Module):
    """A stage at every resolution, and a downsampling layer between consecutive stages.

    Args:
        stages: One module per resolution, highest first.
        down: Modules that lead from a stage to the next, one fewer than ``stages``.
        checkpointing: Whether stages are recomputed for backward instead of being kept.
    """

    def __init__(self, stages: Sequence[nn.Module], down: Sequence[nn.Module], checkpointing: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.down = nn.ModuleList(down)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (B, C, X, Y, Z) to the features of all stages, highest resolution first."""
        features = [maybe_checkpoint(self.checkpointing, self.stages[0], self.stages[0], x)]
        for stage in range(1, len(self.stages)):
            features.append(maybe_checkpoint(self.checkpointing, self, self._stage, stage, features[-1]))
        return features

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        return self.stages[stage](self.down[stage - 1](x))


class UNetDecoder(nn.Module):
    """At every level: upsampling to the next resolution, concatenation with the encoder's features, a stage.

    Args:
        up: Modules that raise the resolution, lowest first.
        stages: Modules that take the upsampled features and the encoder's, concatenated in this order.
        deep_supervision: Whether the segmentation heads of all levels are evaluated; can be switched later at the
            attribute of this name.
        checkpointing: Whether levels are recomputed for backward instead of being kept.
    """

    def __init__(
        self,
        up: Sequence[nn.Module],
        stages: Sequence[nn.Module],
        deep_supervision: bool,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.up = nn.ModuleList(up)
        self.stages = nn.ModuleList(stages)
        self.deep_supervision = deep_supervision
        self.checkpointing = checkpointing

    def levels(self, features: Sequence[Tensor]) -> Iterator[Tensor]:
        """Compute one level after the other, lowest resolution first.

        Args:
            features: Features of all stages of the encoder, highest resolution first.
        """
        x = features[-1]
        for level in range(len(self.stages)):
            x = maybe_checkpoint(self.checkpointing, self, self._level, level, x, features[-(level + 2)])
            yield x

    def _level(self, level: int, x: Tensor, skip: Tensor) -> Tensor:
        return self.stages[level](torch.cat((crop(self.up[level](x), skip.shape[2:]), skip), 1))


class SegmentationDecoder(UNetDecoder):
    """A decoder with segmentation heads.

    Args:
        up: See ``UNetDecoder``.
        stages: See ``UNetDecoder``.
        heads: 1x1x1 convolutions to the classes, for all levels, or for the highest resolution only.
        deep_supervision: See ``UNetDecoder``.
        checkpointing: See ``UNetDecoder``.
    """

    def __init__(
        self,
        up: Sequence[nn.Module],
        stages: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        deep_supervision: bool,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(up, stages, deep_supervision, checkpointing)
        # Called seg_layers, so that -pretrained_weights skips the layers that depend on the number of classes.
        self.seg_layers = nn.ModuleList(heads)

    def forward(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Compute logits from the features of all stages, highest resolution first.

        Returns:
            Logits at full resolution, (B, num_classes, X, Y, Z); with ``deep_supervision`` a list with the logits of
            all heads, largest first.
        """
        logits: list[Tensor] = []
        first_head = len(self.stages) - len(self.seg_layers)
        for level, x in enumerate(self.levels(features)):
            is_last = level == len(self.stages) - 1
            if is_last or (self.deep_supervision and level >= first_head):
                logits.append(self.seg_layers[level - first_head](x))
        return logits[::-1] if self.deep_supervision else logits[-1]


class EncoderDecoder(PlansNetwork):
    """A network with an encoder and a decoder. Subclasses set ``encoder`` and ``decoder``."""

    encoder: nn.Module
    decoder: UNetDecoder

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Compute logits.

        Args:
            x: Images, shape (B, input_channels, X, Y, Z).

        Returns:
            Logits, (B, num_classes, X, Y, Z); with ``decoder.deep_supervision`` a list of them, largest first.
        """
        return self.decoder(self.encoder(x))
