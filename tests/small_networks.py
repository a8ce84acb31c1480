"""Small networks, as constructors take them and as nnU-Net's plans describe them."""

from collections.abc import Sequence
from typing import Any


def arguments(**changes: Any) -> dict[str, Any]:
    """Return constructor arguments, except for channels, classes, and convolutions or blocks per stage."""
    from torch import nn

    return {
        "n_stages": 3,
        "features_per_stage": [4, 8, 12],
        "conv_op": nn.Conv3d,
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    } | changes


def plain_unet(
    strides: Sequence[Sequence[int]] = ((1, 1, 1), (2, 2, 2)),
    kernel_sizes: Sequence[Sequence[int]] | None = None,
    features: Sequence[int] = (4, 8),
    convolutions: int = 1,
) -> dict[str, Any]:
    """Return nnU-Net's U-Net as plans describe it under ``architecture``."""
    n_stages = len(strides)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": n_stages,
            "features_per_stage": list(features),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * n_stages if kernel_sizes is None else [list(size) for size in kernel_sizes],
            "strides": [list(stride) for stride in strides],
            "n_conv_per_stage": [convolutions] * n_stages,
            "n_conv_per_stage_decoder": [convolutions] * (n_stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
