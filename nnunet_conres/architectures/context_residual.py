"""The context residual module, and the two decoders that are made of it; what all forms of ConResNet share.

Source: Zhang et al., "Inter-slice Context Residual Learning for 3D Medical Image Segmentation", IEEE TMI 2021,
arXiv 2011.14155.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_conres.architectures.blocks import count_elements, maybe_checkpoint, resize
from nnunet_conres.architectures.frugal import attend, residual_of_sigmoid


class ContextResidualModule(nn.Module):
    """What happens at one resolution of the two decoders.

    F = segmentation(segmentation stream), G = feature_residual(inter-slice residual of sigmoid(F)),
    S = merge(project(residual stream) + G); the residual stream goes on as S, the segmentation stream as

    - F * (1 + sigmoid(S)), attention as the paper has it, where ``gate`` is None;
    - F * 2 sigmoid(gate(S)) otherwise, which is F itself as long as the gate's weights are 0;
    - F where ``attends`` is False.

    Args:
        segmentation: Maps the segmentation stream (with its skip) to F.
        feature_residual: 1x1x1 convolution from the channels of F to those of the residual stream.
        project: Maps the residual stream to the channels of S, or None where it has them.
        merge: Maps S + G to S.
        slice_axis: Spatial axis along which slices follow each other.
        gate: 1x1x1 convolution from the channels of S to those of F, or None where they are as many.
        attends: Whether the residual stream acts on the segmentation stream at all.

    Source: Zhang et al. 2021, section III-C and figure 3.
    """

    def __init__(
        self,
        segmentation: nn.Module,
        feature_residual: nn.Module,
        project: nn.Module | None,
        merge: nn.Module,
        slice_axis: int,
        gate: nn.Module | None = None,
        attends: bool = True,
    ) -> None:
        super().__init__()
        self.segmentation = segmentation
        self.feature_residual = feature_residual
        self.project = project
        self.merge = merge
        self.slice_axis = slice_axis
        self.gate = gate
        self.attends = attends

    def forward(self, segmentation: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Takes and returns the two streams, (B, C, X, Y, Z) each, of one spatial size."""
        features = self.segmentation(segmentation)
        if self.project is not None:
            residual = self.project(residual)
        # in one expression, which leaves no name behind that would keep what is in between
        residual = self.merge(residual + self.feature_residual(residual_of_sigmoid(features, self.slice_axis)))
        if not self.attends:
            return features, residual
        if self.gate is None:
            return attend(features, residual), residual
        return attend(features, self.gate(residual), start=0, gain=2), residual

    def attention(self, residual: Tensor) -> Tensor:
        """What features are multiplied with where the module returned this residual stream, 0 to 2.

        Args:
            residual: Residual stream as ``forward`` returns it, (B, C, X, Y, Z).

        Returns:
            (B, C', X, Y, Z), with the channels of the features, or of the residual stream where it is 1 everywhere.
        """
        if not self.attends:
            return torch.ones_like(residual)
        return 1 + torch.sigmoid(residual) if self.gate is None else 2 * torch.sigmoid(self.gate(residual))

    def compute_conv_feature_map_size(self, size: Sequence[int]) -> np.int64:
        """Number of output elements of the module's convolutions, as nnU-Net's planner counts them."""
        parts = [self.segmentation, self.feature_residual, self.merge]
        parts += [part for part in (self.project, self.gate) if part is not None]
        return sum((count_elements(part, size) for part in parts), start=np.int64(0))


class SupervisedModule(nn.Module):
    """A decoder level without a residual stream: residual maps are predicted from the segmentation's features.

    Args:
        segmentation: Maps the segmentation stream (with its skip) to F.
    """

    def __init__(self, segmentation: nn.Module) -> None:
        super().__init__()
        self.segmentation = segmentation

    def forward(self, segmentation: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the segmentation stream, (B, C, X, Y, Z); returns its features twice, for either kind of head."""
        features = self.segmentation(segmentation)
        return features, features

    def attention(self, residual: Tensor) -> Tensor:
        """1 everywhere; see ``ContextResidualModule.attention``."""
        return torch.ones_like(residual)

    def compute_conv_feature_map_size(self, size: Sequence[int]) -> np.int64:
        """Number of output elements of the module's convolutions, as nnU-Net's planner counts them."""
        return count_elements(self.segmentation, size)


class _Heads(nn.Module):
    """All layers whose shape depends on the number of classes.

    They must be known as ``seg_layers``: nnU-Net leaves out what is called so when it loads pretrained weights.
    """

    def __init__(self, segmentation: Sequence[nn.Module], residual: Sequence[nn.Module]) -> None:
        super().__init__()
        self.segmentation = nn.ModuleList(segmentation)
        self.residual = nn.ModuleList(residual)


class ContextResidualDecoder(nn.Module):
    """Both decoders: context residual modules from the coarsest resolution to full size, and the heads.

    Subclasses say in ``lift`` how the streams go up by one level.

    Args:
        stages: Context residual modules, coarsest first.
        segmentation_heads: 1x1x1 convolutions to the classes; for all stages, or only for the last ones.
        residual_heads: 1x1x1 convolutions to the classes, one per stage.
        deep_supervision: Whether all segmentation heads are computed, or only that of full size.
        residual_outputs: Whether the residual heads are computed and returned.
        full_size_residuals: Whether residual maps are resized to full size.

    Attributes:
        checkpointing: Whether what a level computes is computed again for backward instead of being kept.
    """

    def __init__(
        self,
        stages: Sequence[ContextResidualModule | SupervisedModule],
        segmentation_heads: Sequence[nn.Module],
        residual_heads: Sequence[nn.Module],
        deep_supervision: bool,
        residual_outputs: bool,
        full_size_residuals: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.residual_outputs = residual_outputs
        self.full_size_residuals = full_size_residuals
        self.checkpointing = False
        self.stages = nn.ModuleList(stages)
        self.seg_layers = _Heads(segmentation_heads, residual_heads)

    def lift(
        self, level: int, segmentation: Tensor, residual: Tensor, skip: Tensor, residual_skip: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Brings both streams to the resolution of ``skip`` and adds the skips."""
        raise NotImplementedError

    def forward(
        self, skips: Sequence[Tensor], residual: Tensor, residual_skips: Sequence[Tensor] | None
    ) -> Tensor | list[Tensor]:
        """Decodes.

        Args:
            skips: Encoder features of the image, full resolution first, bottleneck last.
            residual: What the residual stream starts from: image residual or encoder features of it.
            residual_skips: Encoder features of the image residual, ordered as ``skips``, or None.

        Returns:
            Logits as described at ``ConResNet.forward``.
        """
        segmentation_heads, residual_heads = self.seg_layers.segmentation, self.seg_layers.residual
        last = len(self.stages) - 1
        first_head = len(self.stages) - len(segmentation_heads)
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
                segmentation_maps.insert(0, segmentation_heads[level - first_head](segmentation))
            if self.residual_outputs:
                residual_maps.insert(0, self._residual_map(residual_heads[level], residual, full_size))

        if self.residual_outputs:
            return segmentation_maps + residual_maps
        return segmentation_maps if self.deep_supervision else segmentation_maps[0]

    def _level(
        self, level: int, segmentation: Tensor, residual: Tensor, skip: Tensor, residual_skip: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.stages[level](*self.lift(level, segmentation, residual, skip, residual_skip))

    def _residual_map(self, head: nn.Module, residual: Tensor, full_size: torch.Size) -> Tensor:
        if not self.full_size_residuals:
            return head(residual)
        # A 1x1x1 convolution and trilinear resizing commute but for rounding. In training the head comes first, on the
        # small map, which takes a fraction of the memory; in evaluation last, so that the logits, which reach hundreds,
        # agree with those of the authors' code in all digits.
        return resize(head(residual), full_size) if self.training else head(resize(residual, full_size))

    def compute_conv_feature_map_size(self, sizes: Sequence[Sequence[int]]) -> np.int64:
        """Number of output elements of the decoders' convolutions in training.

        Args:
            sizes: Spatial size (x, y, z) of every encoder stage, full resolution first.
        """
        output = np.int64(0)
        for level, stage in enumerate(self.stages):
            output += count_elements(stage, sizes[-(level + 2)])
        segmentation_heads = list(self.seg_layers.segmentation)
        heads = [segmentation_heads if self.deep_supervision else segmentation_heads[-1:]]
        if self.residual_outputs:
            heads.append(list(self.seg_layers.residual))
        for of_one_kind in heads:
            for head, size in zip(reversed(of_one_kind), sizes, strict=False):
                output += count_elements(head, size)
        return output
