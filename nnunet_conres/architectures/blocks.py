"""Building blocks that dynamic_network_architectures does not have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from nnunet_conres.architectures.layout import AvgPool3d


class WeightStandardizedConv3d(nn.Conv3d):
    """3D convolution whose filters are standardised before every use.

    Each filter, over its input channels and kernel positions, has its mean subtracted and is divided by
    sqrt(unbiased variance + 1e-12). Takes the arguments of ``nn.Conv3d``.

    Source: Qiao et al., "Weight Standardization", arXiv 1903.10520, in the form that ConResNet uses.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, X, Y, Z) with the standardised filters."""
        dims = list(range(1, self.weight.ndim))
        centred = self.weight - self.weight.mean(dims, keepdim=True)
        # several times faster than torch.var on a CPU
        variance = torch.linalg.vector_norm(centred, dim=dims, keepdim=True).square() / (self.weight[0].numel() - 1)
        std = torch.sqrt(variance + 1e-12)
        return self._conv_forward(input, centred / std, self.bias)


class CeilAvgPool3d(AvgPool3d):
    """Average pooling of n voxels to ceil(n / stride), as in a strided convolution.

    The border fills up the last window. (``ceil_mode`` would do, but code that torch.compile generates for it on a CPU
    has wrong gradients if the size is odd; seen with PyTorch 2.15.)
    """

    def forward(self, input: Tensor) -> Tensor:
        """Pool (B, C, X, Y, Z)."""
        return super().forward(pad_to_multiple(input, triple(self.kernel_size)))


class CeilMaxPool3d(nn.MaxPool3d):
    """Max pooling of n voxels to ceil(n / stride), as in a strided convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """Pool (B, C, X, Y, Z)."""
        return super().forward(pad_to_multiple(input, triple(self.kernel_size)))


class CeilStridedConv3d(nn.Conv3d):
    """Convolution of n voxels to ceil(n / stride), with a kernel as large as its stride.

    Every voxel is used once, and the border fills up the last window. Its counterpart in the decoder is a transposed
    convolution of the same kernel and stride.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: (sx, sy, sz), the kernel size as well.
        bias: Whether there is a bias.

    Source: Springenberg et al., "Striving for Simplicity", arXiv 1412.6806; V-Net (arXiv 1606.04797, section 2).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int], bias: bool = True) -> None:
        step = (int(stride[0]), int(stride[1]), int(stride[2]))
        super().__init__(in_channels, out_channels, step, step, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C_in, X, Y, Z) to (B, C_out, ceil(X / sx), ceil(Y / sy), ceil(Z / sz))."""
        return super().forward(pad_to_multiple(input, self.stride))


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
        """Map (B, C_in, X, Y, Z) to (B, C_out, X', Y', Z')."""
        for module in (self.norm, self.nonlin, self.dropout):
            if module is not None:
                x = module(x)
        return self.conv(x)


class PreActivationBlock(nn.Module):
    """Residual block x + conv2(conv1(x)) of two pre-activation convolutions that keep shape and channels."""

    def __init__(self, conv1: PreActivationConv, conv2: PreActivationConv) -> None:
        super().__init__()
        self.conv1 = conv1
        self.conv2 = conv2

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to the same shape."""
        return x + self.conv2(self.conv1(x))


class Heads(nn.Module):
    """All layers whose shape depends on the number of classes, of a network with residual maps.

    The attribute must be called ``seg_layers``, because nnU-Net skips this name when it loads pretrained weights.

    Args:
        segmentation: 1x1x1 convolutions to the classes.
        residual: 1x1x1 convolutions to the classes that have a residual map.
    """

    def __init__(self, segmentation: Sequence[nn.Module], residual: Sequence[nn.Module]) -> None:
        super().__init__()
        self.segmentation = nn.ModuleList(segmentation)
        self.residual = nn.ModuleList(residual)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (B, C, X, Y, Z) to the spatial size (x, y, z), trilinear with aligned corners; no change if it fits.

    Uses products with interpolation matrices, one per axis, which are faster than PyTorch's kernels, above all in
    backward.
    """
    is_channels_last = x.stride(1) == 1
    y = x.movedim(1, -1) if is_channels_last else x
    first = 1 if is_channels_last else 2
    for axis in (2, 1, 0):
        before, extent, after = y.shape[: first + axis], y.shape[first + axis], y.shape[first + axis + 1 :]
        if extent == size[axis]:
            continue
        matrix = _interpolation(extent, size[axis], x)
        if after:
            matrix = matrix.expand(before.numel(), -1, -1)
            y = torch.bmm(matrix, y.reshape(before.numel(), extent, after.numel()))
        else:
            y = y.reshape(-1, extent) @ matrix.mT
        y = y.view(*before, size[axis], *after)
    return (y.movedim(-1, 1) if is_channels_last else y).to(x.dtype)


def _interpolation(extent: int, new: int, like: Tensor) -> Tensor:
    """Return the matrix, (new, extent), that interpolates ``extent`` numbers linearly to ``new`` numbers."""
    wide: dict[str, Any] = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    positions = torch.linspace(0, extent - 1, new, **wide)
    matrix = (1 - (positions[:, None] - torch.arange(extent, **wide)).abs()).clamp(min=0)
    # Round to multiples of the dtype's resolution between 0.5 and 1, so that the two weights of a voxel sum to 1.
    step = torch.finfo(like.dtype).eps / 2
    return (matrix / step).round().mul(step).to(like.dtype)


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return a view of the first (x, y, z) voxels of (B, C, X, Y, Z).

    A strided convolution with "same" padding turns n voxels into ceil(n / s), and its transposed counterpart turns
    these into s times as many: up to s - 1 too many if s does not divide n.
    """
    for dim, extent in enumerate(size, start=2):
        if x.shape[dim] != extent:
            x = x.narrow(dim, 0, extent)
    return x


def pad_to_multiple(x: Tensor, divisor: Sequence[int]) -> Tensor:
    """Repeat the last voxels of (B, C, X, Y, Z) until every axis is divisible; no change if it fits."""
    # No modulo: PyTorch, at least up to 2.14, cannot compile it if sizes vary from call to call.
    missing = [-(-extent // d) * d - extent for extent, d in zip(x.shape[2:], divisor, strict=True)]
    if any(missing):
        x = F.pad(x, [0, missing[2], 0, missing[1], 0, missing[0]], mode="replicate")
    return x


def maybe_checkpoint(enabled: bool, owner: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function. If enabled, its intermediate results are recomputed for backward instead of being kept.

    Args:
        enabled: Whether to recompute.
        owner: Module that contains all modules that the function calls.
        function: Takes and returns tensors.
        *args: Its arguments.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
    """
    if not (enabled and torch.is_grad_enabled()):
        return function(*args)
    if torch.compiler.is_compiling():  # it frees each tensor after its last use, and statistics change once
        return checkpoint(function, *args, use_reentrant=False)
    norms = [module for module in owner.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    # PyTorch stops early, at the last tensor that is needed, by raising an exception. If it is raised within our own
    # autograd functions, its frames keep large tensors in memory until Python's garbage collection.
    with set_checkpoint_early_stop(False):
        return checkpoint(
            function,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _unchanged_running_statistics(norms)),
        )


@contextlib.contextmanager
def _unchanged_running_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Keep running statistics unchanged: batch norms see the same batch again, which must not count twice."""
    before = [(norm.momentum, _batches(norm).clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            _batches(norm).copy_(batches)


def _batches(norm: _BatchNorm) -> Tensor:
    assert norm.num_batches_tracked is not None  # set if there are running statistics
    return norm.num_batches_tracked


def triple(value: int | Sequence[int]) -> list[int]:
    """Convert one number for the three spatial axes, or three numbers, to a list.

    Raises:
        ValueError: If a sequence does not have three entries.
    """
    values = [value] * 3 if isinstance(value, int) else [int(v) for v in value]
    if len(values) != 3:
        raise ValueError(f"Kernel sizes and strides have three entries in 3D, got {value!r}.")
    return values


def per_stage(name: str, value: Any, n_stages: int) -> list[Any]:
    """Convert one value for all stages, or a list with one value per stage, to a list.

    Raises:
        ValueError: If a list has another length.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value] * n_stages
    if len(values) != n_stages:
        raise ValueError(f"{name} must be one value or have {n_stages} entries, one per stage; got {value!r}.")
    return values


def strided_size(size: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Return the spatial size after a strided convolution with "same" padding."""
    return [-(-extent // step) for extent, step in zip(size, stride, strict=True)]


def stage_sizes(size: Sequence[int], strides: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the spatial size at every stage, each after its stride, for a spatial input size (x, y, z)."""
    sizes, current = [], list(size)
    for stride in strides:
        current = strided_size(current, stride)
        sizes.append(current)
    return sizes
