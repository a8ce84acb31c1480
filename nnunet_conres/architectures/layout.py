"""Channels-last networks on a GPU: the layout in which cuDNN's 3D convolutions are fastest, and norms that keep it.

PyTorch's instance norm and group norm make contiguous copies on CUDA, so that each of them would change the layout
twice. Here they are written in plain operations, which the compiler fuses with those around them, keeping the layout.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_DEVICES = {"cuda"}


def wants_channels_last(x: Tensor) -> bool:
    """Return whether networks from `fast` compute channels-last: compiled on a GPU, or predicting a single patch there.

    Training that is not compiled stays contiguous: PyTorch's own norms are faster there.

    Args:
        x: Images or features, in any layout.
    """
    if x.device.type not in _DEVICES or x.ndim != 5:
        return False
    return torch.compiler.is_compiling() or (x.shape[0] == 1 and not torch.is_grad_enabled())


def is_channels_last(x: Tensor) -> bool:
    """Return whether images or features belong to a network that computes channels-last."""
    return wants_channels_last(x) and x.stride(1) == 1


def to_channels_last(x: Tensor) -> Tensor:
    """Copy (B, C, X, Y, Z) so that its channels are adjacent in memory, and convolutions take it for channels-last.

    (``contiguous`` would leave images of one channel as they are, which convolutions take for contiguous.)
    """
    return x.clone(memory_format=torch.channels_last_3d)


class _ChannelsLast:
    """Forward pass of a network that converts images to channels-last once, at its input."""

    def forward(self: Any, x: Tensor) -> Any:
        """Compute the outputs of the network."""
        # Group norm has no channels-last kernel: if it is not compiled, it would convert the layout every time.
        if not wants_channels_last(x) or (self.has_group_norm and not torch.compiler.is_compiling()):
            return super().forward(x)  # type: ignore[misc]
        logits = super().forward(to_channels_last(x))  # type: ignore[misc]
        return _Exit.apply(logits) if isinstance(logits, Tensor) else [_Exit.apply(one) for one in logits]

    def __reduce__(self) -> Any:  # pickle does not find a class that is created at run time
        return _empty, (type(self).__bases__[1],), self.__dict__


class _Exit(torch.autograd.Function):
    """The identity, with a channels-last gradient, so that the features before the heads get such gradients too."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return to_channels_last(gradient)


@functools.cache
def _channels_last_class(network: type[nn.Module]) -> type[nn.Module]:
    return type(network.__name__, (_ChannelsLast, network), {"__module__": network.__module__})


def _empty(network: type[nn.Module]) -> nn.Module:
    """Create an empty channels-last network, which unpickling fills."""
    made = _channels_last_class(network)  # type: ignore[arg-type]
    return made.__new__(made)


def fast(network: nn.Module) -> nn.Module:
    """Make a network channels-last on a GPU, in place. Its function and the names in its state stay the same.

    Args:
        network: A network of this package or of nnU-Net, on any device.

    Returns:
        The same network.
    """
    ours = {nn.InstanceNorm3d: InstanceNorm3d, nn.AvgPool3d: AvgPool3d}
    for module in network.modules():
        module.__class__ = ours.get(type(module), type(module))
    network.has_group_norm = any(isinstance(module, nn.GroupNorm) for module in network.modules())  # type: ignore
    network.__class__ = _channels_last_class(type(network))  # type: ignore[arg-type]
    return network


def weights_to_channels_last(network: nn.Module) -> None:
    """Convert weights of 3D convolutions on a GPU to the layout of compiled code; the parameters stay the same objects.

    Args:
        network: A network from `fast`, bare or in wrappers, on its training device. Other networks stay as they are.
    """
    parts = (module for module in network.modules() if isinstance(module, _ChannelsLast))
    for parameter in (parameter for part in parts for parameter in part.parameters()):
        if parameter.ndim == 5 and parameter.device.type in _DEVICES:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


def with_channels_last_weights(network: nn.Module) -> nn.Module:
    """Convert weights with ``weights_to_channels_last``, and renew a DistributedDataParallel wrapper.

    The wrapper sums gradients in memory with the layout that the weights had when it was created.
    """
    weights_to_channels_last(network)
    if isinstance(network, DistributedDataParallel):
        return DistributedDataParallel(network.module, device_ids=network.device_ids)
    return network


def normalize(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """Normalise to mean 0 and variance 1 along some dimensions, in plain operations.

    Args:
        x: Floating-point tensor.
        dims: Dimensions over which mean and variance are computed.
        eps: Added to the variance.

    Returns:
        Tensor of the same shape, in float32 if ``x`` has 16 bits.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    variance, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
    return (wide - mean) * torch.rsqrt(variance + eps)


def scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multiply every channel of (B, C, X, Y, Z) by its weight and add its bias; either may be absent."""
    shape = (-1, *[1] * (x.ndim - 2))
    if weight is not None:
        x = x * weight.to(x.dtype).view(shape)
    return x if bias is None else x + bias.to(x.dtype).view(shape)


class InstanceNorm3d(nn.InstanceNorm3d):
    """Instance norm in the fastest form for each device, whose output may be changed in place at no cost.

    PyTorch computes it as a batch norm of a reshaped tensor, so that its output is a view. In backward, an operation
    that changed a view in place, as nnU-Net's nonlinearities and residual blocks do, copies the gradient twice. Here
    the output is not a view for autograd. This is safe, because nothing else refers to the base tensor of the view.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to the same shape."""
        if wants_channels_last(input) and not self.track_running_stats and input[0, 0].numel() > 1:
            if torch.compiler.is_compiling():
                normal = normalize(input, (2, 3, 4), self.eps)
                return scale_and_shift(normal, self.weight, self.bias).to(input.dtype)
            # Instance norm of a single patch is a batch norm, and PyTorch's keeps the layout (cuDNN's may overflow).
            return torch.native_batch_norm(input, self.weight, self.bias, None, None, True, 0.0, self.eps)[0]
        output = super().forward(input)
        return torch.ops.aten._unsafe_view(output, list(output.shape))


class AvgPool3d(nn.AvgPool3d):
    """Average pooling that keeps a network channels-last; PyTorch's does not."""

    def forward(self, input: Tensor) -> Tensor:
        """Pool (B, C, X, Y, Z)."""
        output = super().forward(input)
        return to_channels_last(output) if is_channels_last(input) else output
