"""ConResNet in the topology of the authors' published code.

Source: Zhang et al., "Inter-slice Context Residual Learning for 3D Medical Image Segmentation", IEEE TMI 2021,
arXiv 2011.14155.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_conres.architectures.blocks import (
    PreActivationBlock,
    PreActivationConv,
    WeightStandardizedConv3d,
    resize,
)
from nnunet_conres.architectures.context_residual import ContextResidualDecoder, ContextResidualModule
from nnunet_conres.architectures.encoder_decoder import StagesAfterStem
from nnunet_conres.architectures.layout import is_channels_last, to_channels_last
from nnunet_conres.architectures.memory_efficient import GroupNormReLU
from nnunet_conres.architectures.network import PlansNetwork, ResidualMapsMixin, residual_classes, spatial_axis
from nnunet_conres.residuals import inter_slice_residual

FEATURES = (32, 64, 128, 256)
KERNEL_SIZES = ((3, 3, 3),) * 4
STRIDES = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
DIVISOR = 8  # three halvings; the authors' network is defined only for divisible patches
_BLOCKS = (1, 2, 2, 4)  # the last two blocks of the last stage are dilated
_GROUPS = 8
_BOTTLENECK = 128
_DECODER_FEATURES = (64, 32, 32)  # at quarter, half and full resolution
# Beyond this value, variances of the group norms would overflow float32.
_LARGEST_INTENSITY = 1e12


def _conv(in_channels: int, out_channels: int, kernel_size: int = 3, **kwargs: Any) -> WeightStandardizedConv3d:
    """Build a weight-standardised convolution without bias that keeps the size at stride 1."""
    padding = kwargs.get("dilation", 1) * (kernel_size - 1) // 2
    return WeightStandardizedConv3d(in_channels, out_channels, kernel_size, padding=padding, bias=False, **kwargs)


def _preactivation(
    in_channels: int, out_channels: int, dropout: nn.Module | None = None, **kwargs: Any
) -> PreActivationConv:
    """Build group norm, ReLU, (dropout,) weight-standardised 3x3x3 convolution."""
    return PreActivationConv(
        _conv(in_channels, out_channels, **kwargs),
        norm=GroupNormReLU(_GROUPS, in_channels, eps=1e-5),
        dropout=dropout,
    )


class PaperEncoder(StagesAfterStem, nn.Module):
    """Strided convolutions and pre-activation residual blocks; the last two blocks are dilated by 2.

    Source: Zhang et al. 2021, section III-D, as the authors' code computes it.
    """

    def __init__(self, input_channels: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = _conv(input_channels, FEATURES[0])
        stages = []
        for stage, (features, n_blocks) in enumerate(zip(FEATURES, _BLOCKS, strict=True)):
            modules: list[nn.Module] = []
            if stage > 0:
                modules.append(_preactivation(FEATURES[stage - 1], features, stride=2))
            for block in range(n_blocks):
                dilation = 2 if block >= 2 else 1
                modules.append(
                    PreActivationBlock(
                        _preactivation(features, features, dilation=dilation),
                        _preactivation(features, features, dilation=dilation),
                    )
                )
            stages.append(nn.Sequential(*modules))
        self.stages = nn.ModuleList(stages)
        self.fusion = _preactivation(FEATURES[-1], _BOTTLENECK, dropout=nn.Dropout3d(0.1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (B, C, X, Y, Z) to the features of all resolutions, highest first.

        Full, half and quarter resolution have 32, 64 and 128 channels, the bottleneck at an eighth has 128.
        """
        *skips, lowest = super().forward(x)
        return [*skips, self.fusion(lowest)]


class PaperDecoder(ContextResidualDecoder):
    """Decoder with trilinear, corner-aligned resizing of both streams, and skips added to the segmentation stream.

    The residual stream starts from the image residual, resized to quarter resolution. The heads are plain convolutions
    with bias, unlike all other convolutions of this network.

    Args:
        input_channels: Number of image channels.
        num_classes: Number of output channels of the segmentation head.
        residual_classes: Number of output channels of the residual heads.
        slice_axis: Spatial axis along which slices follow each other.
        deep_supervision: Whether the segmentation is returned in a list (of one).
        residual_outputs: Whether the residual heads are computed and returned.
        checkpointing: Whether levels are recomputed for backward instead of being kept.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        residual_classes: int,
        slice_axis: int,
        deep_supervision: bool,
        residual_outputs: bool,
        checkpointing: bool,
    ) -> None:
        stages = []
        below = _BOTTLENECK
        for level, features in enumerate(_DECODER_FEATURES):
            project: nn.Module | None = None
            if level == 0:
                project = _conv(input_channels, features)
            elif below != features:
                project = _preactivation(below, features)
            stages.append(
                ContextResidualModule(
                    segmentation=_preactivation(below, features),
                    feature_residual=_conv(features, features, kernel_size=1),
                    project=project,
                    merge=_preactivation(features, features),
                    slice_axis=slice_axis,
                )
            )
            below = features
        super().__init__(
            stages,
            [nn.Conv3d(_DECODER_FEATURES[-1], num_classes, 1)],
            [nn.Conv3d(features, residual_classes, 1) for features in _DECODER_FEATURES],
            deep_supervision,
            residual_outputs,
            full_size_residuals=True,
            checkpointing=checkpointing,
        )

    def upsample(
        self, level: int, segmentation: Tensor, residual: Tensor, skip: Tensor, residual_skip: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        size = skip.shape[2:]
        return resize(segmentation, size) + skip, resize(residual, size)


class ConResNetPaper(ResidualMapsMixin, PlansNetwork):
    """The network of the authors' published code; 19,018,732 parameters with 4 channels and 3 classes.

    Stages, features, kernels, norms and nonlinearities are fixed. Every side of a patch must be divisible by 8.

    Args:
        input_channels: Number of image channels, 4 in the paper.
        num_classes: Number of output channels of the segmentation, 3 in the paper (one per region).
        deep_supervision: Whether the segmentation is returned in a list, with one entry of full size; can be switched
            later at ``decoder.deep_supervision``.
        residual_outputs: Whether residual maps are returned too; can be switched later at the attribute of this name.
        background_class: Whether the first class is the background, which has no residual map.
        slice_axis: Spatial axis along which slices follow each other, 0 (in nnU-Net), 1 or 2.
        checkpointing: What is recomputed for backward instead of being kept: ``"none"``, the levels of the
            ``"decoder"``, or the ``"full"`` network. Saves memory, and changes no result.
        strides: Must be `STRIDES`. nnU-Net's trainers read the scales of deep supervision from this entry of plans.

    Raises:
        ValueError: If an argument is out of range, or ``strides`` are not `STRIDES`.

    Source: Zhang et al. 2021, section III-D, as the authors' code computes it.
    """

    fixed_stages = (STRIDES, KERNEL_SIZES)
    has_auxiliary_heads = False
    decoder: PaperDecoder

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        residual_outputs: bool = False,
        background_class: bool = False,
        slice_axis: int = 0,
        checkpointing: str = "none",
        strides: Sequence[Sequence[int]] = STRIDES,
    ) -> None:
        super().__init__(len(FEATURES), list(FEATURES), nn.Conv3d, list(KERNEL_SIZES), list(strides), checkpointing)
        if self.strides != [list(stride) for stride in STRIDES]:
            raise ValueError(f"The strides of ConResNetPaper are fixed, {list(STRIDES)}; got {self.strides}.")
        self.slice_axis = spatial_axis(slice_axis)
        self.encoder = PaperEncoder(input_channels, checkpointing == "full")
        self.decoder = PaperDecoder(
            input_channels,
            num_classes,
            residual_classes(num_classes, background_class),
            self.slice_axis,
            deep_supervision,
            residual_outputs,
            checkpointing=checkpointing != "none",
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Compute logits.

        Args:
            x: Images, shape (B, input_channels, X, Y, Z).

        Returns:
            - supervision off: segmentation logits, (B, num_classes, X, Y, Z);
            - ``decoder.deep_supervision``: a list with these;
            - ``residual_outputs``: the list [segmentation, residual, residual/2, residual/4], all of full size, the
              residual logits with a channel for every class but the background.
        """
        clamped = torch.clamp(x, -_LARGEST_INTENSITY, _LARGEST_INTENSITY)
        # clamping makes images of one channel contiguous
        x = to_channels_last(clamped) if is_channels_last(x) else clamped
        return self.decoder(self.encoder(x), inter_slice_residual(x, self.slice_axis))

    def summary(self) -> str:
        """Describe the topology in a few words, for messages."""
        return "ConResNetPaper, the paper's topology"
