"""Operations between convolutions that keep no more tensors for backward than the convolutions keep anyway.

Autograd would keep the intermediate results of ``|sigmoid(F)[k] - sigmoid(F)[k - 1]|`` and ``F * (1 + sigmoid(S))``,
four tensors as large as F at every level. F is kept once in any case, S by the layers that follow, and the sigmoid is
cheap to compute again. For a group norm under mixed precision, autograd would keep copies in float32.

Without these operations, the peak memory of a training step (4 channels, batch 2, 128 x 128 x 128, float16 on CUDA) is
higher: for ConResNet by 11 % (residual of the sigmoid) and 8 % (attention), and for ConResNetPaper by 66 % (group
norm). Without the instance norm of layout.py it is higher by 6 % for ResidualMapUNet and by 12 % for UNet3D.

No ``forward`` returns a tensor that was changed in place, or the result of an operation that may return its input, such
as ``to``: compiled by PyTorch 2.11, such a function has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnunet_conres.architectures.layout import is_channels_last, normalize, scale_and_shift
from nnunet_conres.residuals import inter_slice_residual


class _ResidualOfSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, slice_axis: int) -> Tensor:
        ctx.save_for_backward(features)
        ctx.slice_axis = slice_axis
        return inter_slice_residual(torch.sigmoid(features), slice_axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (features,) = ctx.saved_tensors
        dim, depth = ctx.slice_axis + 2, features.shape[ctx.slice_axis + 2]
        probability = torch.sigmoid(features)
        if depth < 2:
            return torch.zeros_like(probability), None
        difference = probability.narrow(dim, 1, depth - 1) - probability.narrow(dim, 0, depth - 1)
        difference = difference.sign_().mul_(gradient.narrow(dim, 1, depth - 1))
        output = torch.zeros_like(probability)
        output.narrow(dim, 1, depth - 1).add_(difference)
        output.narrow(dim, 0, depth - 1).sub_(difference)
        # the sigmoid's derivative is s - s^2
        return output.mul_(torch.addcmul(probability, probability, probability, value=-1)), None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(features, residual)
        return torch.addcmul(features, features, torch.sigmoid(residual))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        features, residual = ctx.saved_tensors
        attention = torch.sigmoid(residual)
        of_residual = torch.addcmul(attention, attention, attention, value=-1).mul_(features).mul_(gradient)
        return attention.add_(1).mul_(gradient), of_residual


class _GroupNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        ctx.geometry = (x.shape[0], x.shape[1], x[0, 0].numel(), groups)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(_norm_dtype(x)).contiguous()
            parameters = _as_norm_takes(weight, wide), _as_norm_takes(bias, wide)
            normed, mean, std = torch.ops.aten.native_group_norm(wide, *parameters, *ctx.geometry, eps)
            output = normed.relu()
            if output.dtype != x.dtype:
                output = output.to(x.dtype)
        ctx.save_for_backward(x, weight, mean, std, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, std, output = ctx.saved_tensors
        wide = x.to(_norm_dtype(x))
        gradient = torch.ops.aten.threshold_backward(gradient, output, 0).to(wide.dtype).contiguous()
        of_x, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
            gradient, wide.contiguous(), mean, std, _as_norm_takes(weight, wide), *ctx.geometry, [True] * 3
        )
        return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None


def _norm_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a group norm under autocast: on a GPU float32, on a CPU (bfloat16) that of its input."""
    return torch.float32 if x.dtype == torch.float16 or (x.is_cuda and x.dtype == torch.bfloat16) else x.dtype


def _as_norm_takes(parameter: Tensor, x: Tensor) -> Tensor:
    # With bfloat16 on a CPU, scale and shift may be float32, and then the statistics are too.
    return parameter if x.dtype == torch.bfloat16 else parameter.to(x.dtype)


class GroupNormReLU(nn.GroupNorm):
    """Group norm, then ReLU. Takes the arguments of ``nn.GroupNorm``, with scale and shift.

    The output is that of the two layers, in the dtype of the input: mixed precision computes in float32, but keeps no
    features in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to the same shape."""
        if is_channels_last(input) and torch.compiler.is_compiling():
            normal = normalize(input.unflatten(1, (self.num_groups, -1)), (2, 3, 4, 5), self.eps).flatten(1, 2)
            return scale_and_shift(normal, self.weight, self.bias).relu().to(input.dtype)
        return _GroupNormReLU.apply(input, self.weight, self.bias, self.num_groups, self.eps)


def residual_of_sigmoid(features: Tensor, slice_axis: int) -> Tensor:
    """Compute ``inter_slice_residual(torch.sigmoid(features), slice_axis)``, keeping only ``features`` for backward.

    Args:
        features: (B, C, X, Y, Z), floating.
        slice_axis: 0, 1 or 2.

    Returns:
        Tensor of the same shape and type, values from 0 to 1.
    """
    return _ResidualOfSigmoid.apply(features, slice_axis)


def attend(features: Tensor, residual: Tensor) -> Tensor:
    """Compute ``features * (1 + torch.sigmoid(residual))``, keeping only the two inputs for backward.

    Args:
        features: (B, C, X, Y, Z), floating.
        residual: Same shape and type.

    Returns:
        Tensor of the same shape and type.

    Source: Zhang et al. 2021, equation of the context residual module in section III-C.
    """
    if features.dtype != residual.dtype:
        return features * (1 + torch.sigmoid(residual))
    return _Attend.apply(features, residual)
