"""Building blocks that dynamic_network_architectures does not have: pre-activation and weight standardisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.helper import maybe_convert_scalar_to_list
from torch import Tensor, nn
from torch.nn import functional as F


class WeightStandardizedConv3d(nn.Conv3d):
    """3D convolution whose filters are standardised before every use.

    Each filter, over its input channels and kernel positions, has its mean subtracted and is divided by
    sqrt(unbiased variance + 1e-12). Takes the arguments of ``nn.Conv3d``.

    Source: Qiao et al., "Weight Standardization", arXiv 1903.10520, in the form that ConResNet uses.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolves (B, C, X, Y, Z) with the standardised filters."""
        # Rounded as published implementations do it, axis by axis: ConResNet's logits reach hundreds, and another order
        # of these operations shows in their third decimal.
        mean = self.weight
        for dim in (1, 2, 3, 4):
            mean = mean.mean(dim, keepdim=True)
        weight = self.weight - mean
        deviation = torch.sqrt(torch.var(weight.flatten(1), dim=1, correction=1) + 1e-12)
        return self._conv_forward(input, weight / deviation.view(-1, 1, 1, 1, 1), self.bias)


class CeilAvgPool3d(nn.AvgPool3d):
    """Average pooling that makes ceil(n / stride) voxels of n, as a strided convolution does.

    What is missing in the last window is repeated from the border. (``ceil_mode`` would do, but code that torch.compile
    generates for it on a CPU has wrong gradients where the size is odd; seen with PyTorch 2.15.)
    """

    def forward(self, input: Tensor) -> Tensor:
        """Pools (B, C, X, Y, Z)."""
        kernel = maybe_convert_scalar_to_list(nn.Conv3d, self.kernel_size)
        missing = [-extent % k for extent, k in zip(input.shape[2:], kernel, strict=True)]
        if any(missing):
            input = F.pad(input, [0, missing[2], 0, missing[1], 0, missing[0]], mode="replicate")
        return super().forward(input)


class PreActivationConv(nn.Module):
    """Norm, nonlinearity, dropout, convolution, in this order; each but the convolution may be absent.

    Args:
        conv: The convolution.
        norm: Module applied first, or None.
        nonlin: Module applied after the norm, or None.
        dropout: Module applied before the convolution, or None.
    """

    def __init__(
        self,
        conv: nn.Conv3d,
        norm: nn.Module | None = None,
        nonlin: nn.Module | None = None,
        dropout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.nonlin = nonlin
        self.dropout = dropout
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C_in, X, Y, Z) to (B, C_out, X', Y', Z')."""
        for module in (self.norm, self.nonlin, self.dropout):
            if module is not None:
                x = module(x)
        return self.conv(x)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Number of output elements for a spatial input size (x, y, z), as nnU-Net's planner counts them."""
        stride = maybe_convert_scalar_to_list(nn.Conv3d, self.conv.stride)
        size = [-(-i // s) for i, s in zip(input_size, stride, strict=True)]
        return np.prod([self.conv.out_channels, *size], dtype=np.int64)


class PreActivationBlock(nn.Module):
    """Residual block x + conv2(conv1(x)) of two pre-activation convolutions that keep shape and channels."""

    def __init__(self, conv1: PreActivationConv, conv2: PreActivationConv) -> None:
        super().__init__()
        self.conv1 = conv1
        self.conv2 = conv2

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, X, Y, Z) to the same shape."""
        return x + self.conv2(self.conv1(x))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Number of output elements of the two convolutions."""
        return self.conv1.compute_conv_feature_map_size(input_size) + self.conv2.compute_conv_feature_map_size(
            input_size
        )


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Trilinear resizing with aligned corners of (B, C, X, Y, Z) to the spatial size (x, y, z); itself if it fits."""
    if list(x.shape[2:]) == list(size):
        return x
    return F.interpolate(x, size=list(size), mode="trilinear", align_corners=True)


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """View of the first (x, y, z) voxels of (B, C, X, Y, Z).

    A strided convolution with "same" padding makes ceil(n / s) voxels of n, its transposed counterpart makes s times
    as many of those: up to s - 1 too many where n is odd.
    """
    for dim, extent in enumerate(size, start=2):
        if x.shape[dim] != extent:
            x = x.narrow(dim, 0, extent)
    return x


def per_stage(name: str, value: Any, n_stages: int) -> list[Any]:
    """One value for all stages, or a list with one for each, as a list.

    Raises:
        ValueError: If a list has another length.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value] * n_stages
    if len(values) != n_stages:
        raise ValueError(f"{name} must be one value or have {n_stages} entries, one per stage; got {value!r}.")
    return values


def count_elements(module: nn.Module, size: Sequence[int]) -> np.int64:
    """Number of output elements of a module's convolutions; of a plain one, ``size`` is that of its output."""
    if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
        return np.prod([module.out_channels, *size], dtype=np.int64)
    return module.compute_conv_feature_map_size(size)  # type: ignore[operator]


def strided_size(size: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Spatial size behind a strided convolution with "same" padding."""
    return [-(-extent // step) for extent, step in zip(size, stride, strict=True)]
