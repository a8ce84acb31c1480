"""The convolutions of a network: recording, FLOPs, and time without the rest of the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import Clock, Phases

_ATEN = torch.ops.aten
# Operations that decompose into aten::convolution. In inference mode they arrive here before their decomposition.
_COMPOSED = (
    _ATEN.conv3d.default,
    _ATEN.conv3d.padding,
    _ATEN._convolution_mode.default,
    _ATEN.conv_transpose3d.input,
)


@dataclass(frozen=True)
class Convolution:
    """One call of a convolution.

    Attributes:
        input: Shape of the input, (B, C, X, Y, Z).
        weight: Shape of the weight.
        arguments: Stride, padding, dilation, transposed, output padding, groups.
        output: Shape of the output.
        bias: Whether there is a bias.
        dtype: Data type of the computation.
        channels_last: Whether input and output have their channels last in memory.
        weight_gradient: Whether the weight gets a gradient; not in a head whose output the loss leaves out.
        input_gradient: Whether the input gets a gradient; images do not.
    """

    input: tuple[int, ...]
    weight: tuple[int, ...]
    arguments: tuple[Any, ...]
    output: tuple[int, ...]
    bias: bool
    dtype: torch.dtype
    channels_last: tuple[bool, bool]
    weight_gradient: bool = False
    input_gradient: bool = False

    def __str__(self) -> str:
        stride, _, dilation, transposed, _, groups = self.arguments
        parts = [f"{_by(self.input)} to {self.output[1]} channels, kernel {_by(self.weight[2:])}"]
        parts += [f"{name} {_by(v)}" for name, v in (("stride", stride), ("dilation", dilation)) if set(v) != {1}]
        parts += ["transposed"] if transposed else []
        parts += [f"{groups} groups"] if groups > 1 else []
        return ", ".join(parts)

    @property
    def forward_flops(self) -> int:
        """FLOPs of the forward pass: two per multiply-add. Padding counts, the bias does not."""
        transposed = self.arguments[3]
        # each weight is used once per voxel: of the input if transposed, else of the output
        voxels = prod((self.input if transposed else self.output)[2:])
        return 2 * self.input[0] * voxels * prod(self.weight)

    @property
    def backward_flops(self) -> int:
        """FLOPs of the backward pass: those of the forward pass for each of the two gradients that exist."""
        return self.forward_flops * (self.weight_gradient + self.input_gradient)


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


class _Recorder(TorchDispatchMode):
    """Records all computed convolutions, regardless of the caller, and their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: list[Convolution] = []
        self.weight_gradients: Counter[Any] = Counter()
        self.input_gradients: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COMPOSED:
            with self:
                return func.decompose(*args, **kwargs)
        output = func(*args, **kwargs)
        # a convolution during the backward pass is a recomputation by checkpointing
        if func is _ATEN.convolution.default and torch._C._current_graph_task_id() == -1:
            image, weight, bias, *arguments = args
            self.convolutions.append(
                Convolution(
                    *_key(image, weight, arguments),
                    tuple(output.shape),
                    bias is not None,
                    image.dtype,
                    (_is_channels_last(image), _is_channels_last(output)),
                )
            )
        elif func is _ATEN.convolution_backward.default:
            _, image, weight, _, *arguments, mask = args
            key = _key(image, weight, arguments)
            self.input_gradients[key] += mask[0]
            self.weight_gradients[key] += mask[1]
        return output

    def with_gradients(self) -> list[Convolution]:
        """Return the convolutions in order. If only some of several equal ones have gradients, the first get them."""
        found = []
        weights, inputs = self.weight_gradients.copy(), self.input_gradients.copy()
        for convolution in self.convolutions:
            key = (convolution.input, convolution.weight, convolution.arguments)
            found.append(replace(convolution, weight_gradient=weights[key] > 0, input_gradient=inputs[key] > 0))
            weights[key] -= 1
            inputs[key] -= 1
        return found


def _key(image: Tensor, weight: Tensor, arguments: Sequence[Any]) -> tuple[Any, Any, Any]:
    plain = tuple(tuple(value) if isinstance(value, list) else value for value in arguments)
    return tuple(image.shape), tuple(weight.shape), plain


def _is_channels_last(tensor: Tensor) -> bool:
    # with one channel or one voxel, both memory formats apply
    return tensor.is_contiguous(memory_format=torch.channels_last_3d) and not tensor.is_contiguous()


def record(run: Callable[[], Any]) -> list[Convolution]:
    """Record all convolutions of a call's forward pass, in order, and which of their gradients it computes.

    ``F.conv3d`` counts like a module. Convolutions that checkpointing computes again count once.

    Args:
        run: A prediction or a training step; called once.
    """
    with _Recorder() as recorder:
        run()
    return recorder.with_gradients()


def training_flops(convolutions: Sequence[Convolution]) -> dict[str, int]:
    """Return the FLOPs of a training step's convolutions: forward, backward, and both as ``step``."""
    forward = sum(convolution.forward_flops for convolution in convolutions)
    backward = sum(convolution.backward_flops for convolution in convolutions)
    return {"forward": forward, "backward": backward, "step": forward + backward}


class ConvolutionsAlone:
    """The convolutions of a network and nothing else, forward and then backward, on separate tensors.

    Args:
        convolutions: Recorded convolutions.
        device: Device that does the work.
    """

    def __init__(self, convolutions: Sequence[Convolution], device: torch.device) -> None:
        self.device = device
        self.calls = []
        for convolution in convolutions:
            dtype = convolution.dtype
            image = _random(convolution.input, dtype, device, convolution.channels_last[0])
            weight = _random(convolution.weight, dtype, device)
            features = convolution.weight[1] * convolution.arguments[5] if convolution.arguments[3] else None
            bias = _random((features or convolution.weight[0],), dtype, device) if convolution.bias else None
            wanted = []
            if convolution.weight_gradient:
                wanted += [tensor.requires_grad_() for tensor in (weight, bias) if tensor is not None]
            if convolution.input_gradient:
                wanted.append(image.requires_grad_())
            gradient = _random(convolution.output, dtype, device, convolution.channels_last[1])
            self.calls.append(((image, weight, bias, *convolution.arguments), wanted, gradient))

    def __call__(self) -> Phases:
        clock = Clock(self.device)
        outputs = [torch.convolution(*arguments) for arguments, _, _ in self.calls]
        clock.lap("forward")
        for output, (_, wanted, gradient) in zip(reversed(outputs), reversed(self.calls), strict=True):
            if wanted:
                torch.autograd.grad(output, wanted, gradient)
        clock.lap("backward")
        return clock.seconds()


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device, channels_last: bool = False) -> Tensor:
    # small, so that sums stay within half precision
    tensor = torch.randn(tuple(shape), device=device).mul_(0.01).to(dtype)
    return tensor.contiguous(memory_format=torch.channels_last_3d) if channels_last else tensor


class MatrixProduct:
    """A product of square matrices, which gives the peak rate of the device.

    Args:
        dtype: Data type of the matrices.
        device: Device that does the work.
        edge: Number of rows and columns.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, edge: int) -> None:
        self.device = device
        self.flops = 2 * edge**3
        self.factors = [torch.randn(edge, edge, device=device).to(dtype) for _ in range(2)]

    def __call__(self) -> Phases:
        clock = Clock(self.device)
        torch.mm(*self.factors)
        clock.lap("product")
        return clock.seconds()
