"""The paper topology of ConResNet: what the authors' published code computes.

Source: Zhang et al., "Inter-slice Context Residual Learning for 3D Medical Image Segmentation", IEEE TMI 2021,
arXiv 2011.14155.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from nnunet_conres.architectures.blocks import (
    PreActivationBlock,
    PreActivationConv,
    WeightStandardizedConv3d,
    count_elements,
    maybe_checkpoint,
    resize,
    strided_size,
)
from nnunet_conres.architectures.context_residual import ContextResidualDecoder, ContextResidualModule
from nnunet_conres.architectures.frugal import GroupNormReLU

PAPER_FEATURES = (32, 64, 128, 256)
PAPER_BLOCKS = (1, 2, 2, 4)  # the last two blocks of the last stage are dilated
PAPER_STRIDES = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
PAPER_DIVISOR = 8  # three halvings; the authors' graph is defined for patches that all three divide
PAPER_GROUPS = 8
PAPER_BOTTLENECK = 128
PAPER_DECODER_FEATURES = (64, 32, 32)  # at quarter, half and full resolution


def paper_arguments() -> dict[str, Any]:
    """The constructor arguments of the paper topology, but for channels and classes, as plans would hold them."""
    return {
        "n_stages": len(PAPER_FEATURES),
        "features_per_stage": list(PAPER_FEATURES),
        "conv_op": nn.Conv3d,
        "kernel_sizes": [[3, 3, 3] for _ in PAPER_FEATURES],
        "strides": [list(stride) for stride in PAPER_STRIDES],
        "topology": "paper",
    }


def check_paper_arguments(features: list[int], kernels: list[list[int]], strides: list[list[int]]) -> None:
    expected = paper_arguments()
    found = {"features_per_stage": features, "kernel_sizes": kernels, "strides": strides}
    wrong = [f"{name} {value} instead of {expected[name]}" for name, value in found.items() if value != expected[name]]
    if wrong:
        raise ValueError(f"The paper topology is fixed; these arguments contradict it: {'; '.join(wrong)}.")


def _paper_conv(in_channels: int, out_channels: int, kernel_size: int = 3, **kwargs: Any) -> WeightStandardizedConv3d:
    """Weight-standardised convolution that keeps the size at stride 1; without bias unless asked for."""
    padding = kwargs.get("dilation", 1) * (kernel_size - 1) // 2
    kwargs.setdefault("bias", False)
    return WeightStandardizedConv3d(in_channels, out_channels, kernel_size, padding=padding, **kwargs)


def _paper_preactivation(
    in_channels: int, out_channels: int, dropout: nn.Module | None = None, **kwargs: Any
) -> PreActivationConv:
    """Group norm, ReLU, (dropout,) weight-standardised 3x3x3 convolution."""
    return PreActivationConv(
        _paper_conv(in_channels, out_channels, **kwargs),
        norm=GroupNormReLU(PAPER_GROUPS, in_channels, eps=1e-5),
        dropout=dropout,
    )


class PaperEncoder(nn.Module):
    """Strided convolutions and pre-activation residual blocks; the last two blocks are dilated by 2.

    Returns features at full, half and quarter resolution (32, 64, 128 channels) and the bottleneck at an eighth
    (128 channels).

    Source: Zhang et al. 2021, section III-D, as the authors' code computes it.
    """

    def __init__(self, input_channels: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = _paper_conv(input_channels, PAPER_FEATURES[0])
        stages = []
        for stage, (features, n_blocks) in enumerate(zip(PAPER_FEATURES, PAPER_BLOCKS, strict=True)):
            modules: list[nn.Module] = []
            if stage > 0:
                modules.append(_paper_preactivation(PAPER_FEATURES[stage - 1], features, stride=2))
            for block in range(n_blocks):
                dilation = 2 if block >= 2 else 1
                modules.append(
                    PreActivationBlock(
                        _paper_preactivation(features, features, dilation=dilation),
                        _paper_preactivation(features, features, dilation=dilation),
                    )
                )
            stages.append(nn.Sequential(*modules))
        self.stages = nn.ModuleList(stages)
        self.fusion = _paper_preactivation(PAPER_FEATURES[-1], PAPER_BOTTLENECK, dropout=nn.Dropout3d(0.1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, C, X, Y, Z) to the four feature maps, full resolution first."""
        features = []
        for stage in range(len(self.stages)):
            x = maybe_checkpoint(self.checkpointing, self, self._stage, stage, x)
            features.append(x)
        return [*features[:-1], self.fusion(x)]

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        return self.stages[stage](self.stem(x) if stage == 0 else x)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Number of output elements of the encoder's convolutions for a spatial input size (x, y, z)."""
        size = list(input_size)
        output = count_elements(self.stem, size)
        for stage, stride in zip(self.stages, PAPER_STRIDES, strict=True):
            for module in stage.children():
                output += count_elements(module, size)
                if isinstance(module, PreActivationConv):
                    size = strided_size(size, stride)
        return output + count_elements(self.fusion, size)


class PaperDecoder(ContextResidualDecoder):
    """Trilinear, corner-aligned resizing of both streams, and skips that are added to the segmentation stream.

    The residual stream starts from the image residual, resized to quarter resolution, or, with a shared encoder, from
    the residual's own features, whose skips are then added as well.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool,
        residual_outputs: bool,
        residual_input: str,
        slice_axis: int,
    ) -> None:
        stages = []
        below = PAPER_BOTTLENECK
        for level, features in enumerate(PAPER_DECODER_FEATURES):
            project: nn.Module | None = None
            if level == 0 and residual_input == "decoder":
                project = _paper_conv(input_channels, features)
            elif below != features:
                project = _paper_preactivation(below, features)
            stages.append(
                ContextResidualModule(
                    segmentation=_paper_preactivation(below, features),
                    feature_residual=_paper_conv(features, features, kernel_size=1),
                    project=project,
                    merge=_paper_preactivation(features, features),
                    slice_axis=slice_axis,
                )
            )
            below = features
        super().__init__(
            stages,
            [_paper_conv(PAPER_DECODER_FEATURES[-1], num_classes, kernel_size=1, bias=True)],
            [_paper_conv(features, num_classes, kernel_size=1, bias=True) for features in PAPER_DECODER_FEATURES],
            deep_supervision,
            residual_outputs,
            full_size_residuals=True,
        )

    def lift(
        self, level: int, segmentation: Tensor, residual: Tensor, skip: Tensor, residual_skip: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        size = skip.shape[2:]
        segmentation = resize(segmentation, size) + skip
        residual = resize(residual, size)
        return segmentation, residual if residual_skip is None else residual + residual_skip
