"""Encoder and decoder of networks that go down by one layer and up by one layer per level, with concatenated skips.

What the levels consist of is the network's own matter (see vnet.py, unet3d.py); how they are connected is here.
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
        checkpointing: Whether stages are computed again for backward instead of being kept.
    """

    checkpointing: bool
    stem: nn.Module
    stages: nn.ModuleList | nn.Sequential

    def forward(self: Any, x: Tensor) -> list[Tensor]:
        """Maps images (B, C, X, Y, Z) to the features of all stages, highest resolution first."""
        features = []
        for stage in range(len(self.stages)):
            x = maybe_checkpoint(self.checkpointing, self, self._stage, stage, x)
            features.append(x)
        return features

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        return self.stages[stage](self.stem(x) if stage == 0 else x)


class Encoder(nn.Module):
    """A stage at every resolution, and a layer between each and the next that lowers it.

    Args:
        stages: One module per resolution, highest first.
        down: What leads from a stage to the next, one module fewer.
        checkpointing: Whether stages are computed again for backward instead of being kept.
    """

    def __init__(self, stages: Sequence[nn.Module], down: Sequence[nn.Module], checkpointing: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.down = nn.ModuleList(down)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps images (B, C, X, Y, Z) to the features of all stages, highest resolution first."""
        features = [maybe_checkpoint(self.checkpointing, self.stages[0], self.stages[0], x)]
        for stage in range(1, len(self.stages)):
            features.append(maybe_checkpoint(self.checkpointing, self, self._stage, stage, features[-1]))
        return features

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        return self.stages[stage](self.down[stage - 1](x))


class UNetDecoder(nn.Module):
    """Up to the next resolution, concatenation with the encoder's features there, a stage; at every level.

    Args:
        up: Modules that raise the resolution, lowest first.
        stages: Modules that take the raised features and the encoder's, in this order along the channels.
        deep_supervision: Whether the segmentation heads of all levels are evaluated; can be switched later at the
            attribute of this name.
        checkpointing: Whether levels are computed again for backward instead of being kept.
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
        """Computes one level after the other, lowest resolution first.

        Args:
            features: Of all stages of the encoder, highest resolution first.
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
        # what depends on the number of classes is called seg_layers: -pretrained_weights leaves it out
        self.seg_layers = nn.ModuleList(heads)

    def forward(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Computes logits from the features of all stages, highest resolution first.

        Returns:
            Logits at full resolution, (B, num_classes, X, Y, Z); with ``deep_supervision`` a list of them, those of all
            heads, largest first.
        """
        logits: list[Tensor] = []
        first_head = len(self.stages) - len(self.seg_layers)
        for level, x in enumerate(self.levels(features)):
            is_last = level == len(self.stages) - 1
            if is_last or (self.deep_supervision and level >= first_head):
                logits.append(self.seg_layers[level - first_head](x))
        return logits[::-1] if self.deep_supervision else logits[-1]


class EncoderDecoder(PlansNetwork):
    """A network of these two; subclasses fill in ``encoder`` and ``decoder``."""

    encoder: nn.Module
    decoder: UNetDecoder

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Computes logits.

        Args:
            x: Images, shape (B, input_channels, X, Y, Z).

        Returns:
            Logits, (B, num_classes, X, Y, Z); with ``decoder.deep_supervision`` a list of them, largest first.
        """
        return self.decoder(self.encoder(x))
