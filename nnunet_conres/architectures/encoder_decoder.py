"""Encoder and decoder of networks that go down by one layer and up by one layer per level, with concatenated skips.

What the levels consist of is the network's own matter (see vnet.py, unet3d.py); how they are connected is here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_conres.architectures.blocks import count_elements, crop, maybe_checkpoint
from nnunet_conres.architectures.network import PlansNetwork


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

    def compute_conv_feature_map_size(self, sizes: Sequence[Sequence[int]]) -> np.int64:
        """Number of elements that convolutions put out, given the spatial size at every stage."""
        modules = [*zip(self.stages, sizes, strict=True), *zip(self.down, sizes[1:], strict=True)]
        convolutional = [(module, size) for module, size in modules if not isinstance(module, nn.MaxPool3d)]
        return np.int64(sum(count_elements(module, size) for module, size in convolutional))


class ConcatDecoder(nn.Module):
    """Up to the next resolution, concatenation with the encoder's features there, a stage; at every level.

    Args:
        up: Modules that raise the resolution, lowest first.
        stages: Modules that take the raised features and the encoder's, in this order along the channels.
        heads: 1x1x1 convolutions to the classes, for all levels, or for the highest resolution only.
        deep_supervision: Whether all heads are evaluated; can be switched later at the attribute of this name.
        checkpointing: Whether levels are computed again for backward instead of being kept.
    """

    def __init__(
        self,
        up: Sequence[nn.Module],
        stages: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        deep_supervision: bool,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.up = nn.ModuleList(up)
        self.stages = nn.ModuleList(stages)
        # what depends on the number of classes is called seg_layers: -pretrained_weights leaves it out
        self.seg_layers = nn.ModuleList(heads)
        self.deep_supervision = deep_supervision
        self.checkpointing = checkpointing

    def forward(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Computes logits from the features of all stages, highest resolution first.

        Returns:
            Logits at full resolution, (B, num_classes, X, Y, Z); with ``deep_supervision`` a list of them, those of all
            heads, largest first.
        """
        x = features[-1]
        logits: list[Tensor] = []
        first_head = len(self.stages) - len(self.seg_layers)
        for level in range(len(self.stages)):
            x = maybe_checkpoint(self.checkpointing, self, self._level, level, x, features[-(level + 2)])
            is_last = level == len(self.stages) - 1
            if is_last or (self.deep_supervision and level >= first_head):
                logits.append(self.seg_layers[level - first_head](x))
        return logits[::-1] if self.deep_supervision else logits[-1]

    def _level(self, level: int, x: Tensor, skip: Tensor) -> Tensor:
        return self.stages[level](torch.cat((crop(self.up[level](x), skip.shape[2:]), skip), 1))

    def compute_conv_feature_map_size(self, sizes: Sequence[Sequence[int]]) -> np.int64:
        """Number of elements that convolutions put out, given the spatial size at every stage."""
        output = np.int64(0)
        first_head = len(self.stages) - len(self.seg_layers)
        for level, (up, stage) in enumerate(zip(self.up, self.stages, strict=True)):
            size = sizes[-(level + 2)]
            output += count_elements(up, size) + count_elements(stage, size)
            is_last = level == len(self.stages) - 1
            if is_last or (self.deep_supervision and level >= first_head):
                output += count_elements(self.seg_layers[level - first_head], size)
        return output


class EncoderDecoder(PlansNetwork):
    """A network of these two; subclasses fill in ``encoder`` and ``decoder``."""

    encoder: Encoder
    decoder: ConcatDecoder

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Computes logits.

        Args:
            x: Images, shape (B, input_channels, X, Y, Z).

        Returns:
            Logits, (B, num_classes, X, Y, Z); with ``decoder.deep_supervision`` a list of them, largest first.
        """
        return self.decoder(self.encoder(x))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Number of feature map elements, as nnU-Net's planner counts them for its memory estimate.

        Args:
            input_size: Spatial patch size (x, y, z), without batch and channels.

        Raises:
            ValueError: If ``input_size`` has not three entries.
        """
        sizes = self.feature_map_sizes(input_size)
        return self.encoder.compute_conv_feature_map_size(sizes) + self.decoder.compute_conv_feature_map_size(sizes)
