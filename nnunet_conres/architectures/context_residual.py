"""The context residual module and the two decoders built from it, which both forms of ConResNet share.

Source: Zhang et al., "Inter-slice Context Residual Learning for 3D Medical Image Segmentation", IEEE TMI 2021,
arXiv 2011.14155.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_conres.architectures.blocks import Heads, maybe_checkpoint, resize
from nnunet_conres.architectures.memory_efficient import attend, residual_of_sigmoid


class ContextResidualModule(nn.Module):
    """One resolution of the two decoders.

    F = segmentation(segmentation stream), G = feature_residual(inter-slice residual of sigmoid(F)),
    S = merge(project(residual stream) + G). The residual stream goes on as S, the segmentation stream as
    F * (1 + sigmoid(S)).

    Args:
        segmentation: Maps the segmentation stream (with its skip) to F.
        feature_residual: 1x1x1 convolution that keeps the channels of F.
        project: Maps the residual stream to the channels of F, or None if it has them already.
        merge: Maps the sum of the projected residual stream and G to S.
        slice_axis: Spatial axis along which slices follow each other.

    Source: Zhang et al. 2021, section III-C and figure 3.
    """

    def __init__(
        self,
        segmentation: nn.Module,
        feature_residual: nn.Module,
        project: nn.Module | None,
        merge: nn.Module,
        slice_axis: int,
    ) -> None:
        super().__init__()
        self.segmentation = segmentation
        self.feature_residual = feature_residual
        self.project = project
        self.merge = merge
        self.slice_axis = slice_axis

    def forward(self, segmentation: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Map the two streams to the two streams that go on, (B, C, X, Y, Z) each, of one spatial size."""
        features = self.segmentation(segmentation)
        if self.project is not None:
            residual = self.project(residual)
        # One expression, because a variable would keep the sum in memory.
        residual = self.merge(residual + self.feature_residual(residual_of_sigmoid(features, self.slice_axis)))
        return attend(features, residual), residual

    @staticmethod
    def attention(residual: Tensor) -> Tensor:
        """Return the factors of the features, 1 to 2, given the residual stream that ``forward`` returned."""
        return 1 + torch.sigmoid(residual)


class ContextResidualDecoder(nn.Module):
    """Both decoders: context residual modules from the coarsest resolution to full size, and the heads.

    Subclasses define in ``upsample`` how the streams reach the next resolution.

    Args:
        stages: Context residual modules, coarsest first.
        segmentation_heads: 1x1x1 convolutions to the classes; for all stages, or only for the last ones.
        residual_heads: 1x1x1 convolutions to the classes that have a residual map, one per stage.
        deep_supervision: Whether all segmentation heads are computed, or only the one of full size.
        residual_outputs: Whether the residual heads are computed and returned.
        full_size_residuals: Whether residual maps are resized to full size.
        checkpointing: Whether levels are recomputed for backward instead of being kept.
    """

    def __init__(
        self,
        stages: Sequence[ContextResidualModule],
        segmentation_heads: Sequence[nn.Module],
        residual_heads: Sequence[nn.Module],
        deep_supervision: bool,
        residual_outputs: bool,
        full_size_residuals: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.residual_outputs = residual_outputs
        self.full_size_residuals = full_size_residuals
        self.checkpointing = checkpointing
        self.stages = nn.ModuleList(stages)
        self.seg_layers = Heads(segmentation_heads, residual_heads)

    def upsample(
        self, level: int, segmentation: Tensor, residual: Tensor, skip: Tensor, residual_skip: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Bring both streams to the resolution of ``skip`` and merge the skips into them."""
        raise NotImplementedError

    def forward(
        self, skips: Sequence[Tensor], residual: Tensor, residual_skips: Sequence[Tensor] | None = None
    ) -> Tensor | list[Tensor]:
        """Compute logits from the features of the encoder.

        Args:
            skips: Encoder features of the image, full resolution first, bottleneck last.
            residual: Start of the residual stream: the image residual, or encoder features of it.
            residual_skips: Encoder features of the image residual, ordered as ``skips``, if a shared encoder computed
                them.

        Returns:
            Logits, see ``ConResNet.forward``.
        """
        last = len(self.stages) - 1
        first_head = len(self.stages) - len(self.seg_layers.segmentation)
        full_size = skips[0].shape[2:]

        segmentation = skips[-1]
        segmentation_maps: list[Tensor] = []
        residual_maps: list[Tensor] = []
        for level in range(len(self.stages)):
            skip = skips[-(level + 2)]
            residual_skip = None if residual_skips is None else residual_skips[-(level + 2)]
            segmentation, residual = maybe_checkpoint(
                self.checkpointing, self, self._level, level, segmentation, residual, skip, residual_skip
            )
            if level == last or (self.deep_supervision and level >= first_head):
                segmentation_maps.insert(0, self.seg_layers.segmentation[level - first_head](segmentation))
            if self.residual_outputs:
                residual_maps.insert(0, self._residual_map(self.seg_layers.residual[level], residual, full_size))

        if self.residual_outputs:
            return segmentation_maps + residual_maps
        return segmentation_maps if self.deep_supervision else segmentation_maps[0]

    def _level(
        self, level: int, segmentation: Tensor, residual: Tensor, skip: Tensor, residual_skip: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.stages[level](*self.upsample(level, segmentation, residual, skip, residual_skip))

    def _residual_map(self, head: nn.Module, residual: Tensor, full_size: torch.Size) -> Tensor:
        if not self.full_size_residuals:
            return head(residual)
        # A 1x1x1 convolution and trilinear resizing commute except for rounding: the weights of the interpolation sum
        # to 1, so that the bias stays the same. On the small map the head takes a fraction of the memory.
        return resize(head(residual), full_size)
