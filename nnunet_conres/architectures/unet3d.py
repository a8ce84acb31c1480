"""3D U-Net: channels are doubled before each downsampling, inside the convolution pair.

Source: Çiçek et al., "3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation", MICCAI 2016,
arXiv 1606.06650.

Shapes are (batch, channel, X, Y, Z).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamic_network_architectures.building_blocks.helper import get_matching_convtransp
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

from nnunet_conres.architectures.blocks import CeilMaxPool3d, CeilStridedConv3d
from nnunet_conres.architectures.encoder_decoder import Encoder, EncoderDecoder, SegmentationDecoder
from nnunet_conres.architectures.network import counts_per_stage

DOWNSAMPLINGS = ("strided_conv", "max_pool")

PAPER_FEATURES = (64, 128, 256, 512)


def paper_arguments() -> dict[str, Any]:
    """Return the constructor arguments of the paper's network that are not defaults, except channels and classes."""
    n_stages = len(PAPER_FEATURES)
    return {
        "n_stages": n_stages,
        "features_per_stage": list(PAPER_FEATURES),
        "conv_op": nn.Conv3d,
        "kernel_sizes": [[3, 3, 3]] * n_stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (n_stages - 1),
        "n_conv_per_stage": [2] * n_stages,
        "n_conv_per_stage_decoder": [2] * (n_stages - 1),
        "conv_bias": True,
        "norm_op": nn.BatchNorm3d,
        "norm_op_kwargs": {},
        "nonlin": nn.ReLU,
        "nonlin_kwargs": {"inplace": True},
        "auxiliary_heads": False,
    }


class UNet3D(EncoderDecoder):
    """Encoder-decoder of convolution pairs whose channels double before the resolution is lowered.

    All convolutions of a stage but the last keep the channels of the stage above. The last one outputs the features of
    the stage, so that a representation is never reduced in space and channels at once. (In the first stage, whose input
    is the image, all but the last output half of the features.) Transposed convolutions keep the channels, and have no
    bias.

    Args:
        ...: Arguments of nnU-Net's plans, see `PlansNetwork`.
        features_per_stage: Output channels of every stage, one number or one per stage.
        n_conv_per_stage: Convolutions per encoder stage.
        conv_bias: Whether convolutions have a bias (transposed ones have none).
        downsampling: ``"strided_conv"``, a convolution as large as its stride, or ``"max_pool"``, as in the paper.
        auxiliary_heads: Whether decoder levels below full resolution have heads for deep supervision.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.

    Source: Çiçek et al. 2016, section 2.
    """

    def __init__(
        self,
        input_channels: int,
        n_stages: int,
        features_per_stage: int | Sequence[int],
        conv_op: type[nn.Module],
        kernel_sizes: int | Sequence[int | Sequence[int]],
        strides: int | Sequence[int | Sequence[int]],
        num_classes: int,
        n_conv_per_stage: int | Sequence[int] = 2,
        n_conv_per_stage_decoder: int | Sequence[int] = 2,
        conv_bias: bool = False,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict[str, Any] | None = None,
        dropout_op: type[nn.Module] | None = None,
        dropout_op_kwargs: dict[str, Any] | None = None,
        nonlin: type[nn.Module] | None = None,
        nonlin_kwargs: dict[str, Any] | None = None,
        deep_supervision: bool = False,
        *,
        downsampling: str = "strided_conv",
        auxiliary_heads: bool = True,
        checkpointing: str = "none",
    ) -> None:
        super().__init__(n_stages, features_per_stage, conv_op, kernel_sizes, strides, checkpointing)
        if downsampling not in DOWNSAMPLINGS:
            raise ValueError(f"downsampling must be one of {DOWNSAMPLINGS}, got {downsampling!r}.")
        self.downsampling = downsampling
        features, kernels = self.features, self.kernel_sizes
        layers = (conv_bias, norm_op, norm_op_kwargs, dropout_op, dropout_op_kwargs, nonlin, nonlin_kwargs)

        def pair(in_channels: int, channels: list[int], kernel_size: list[int]) -> nn.Module:
            return StackedConvBlocks(len(channels), conv_op, in_channels, channels, kernel_size, 1, *layers)

        stages: list[nn.Module] = []
        down: list[nn.Module] = []
        for stage, n_conv in enumerate(counts_per_stage("n_conv_per_stage", n_conv_per_stage, n_stages)):
            above = features[stage - 1] if stage > 0 else input_channels
            kept = features[stage - 1] if stage > 0 else max(1, features[0] // 2)
            stages.append(pair(above, [kept] * (n_conv - 1) + [features[stage]], kernels[stage]))
            if stage > 0:
                stride = self.strides[stage]
                down.append(
                    CeilMaxPool3d(tuple(stride), tuple(stride))
                    if downsampling == "max_pool"
                    else CeilStridedConv3d(above, above, stride, conv_bias)
                )
        self.encoder = Encoder(stages, down, checkpointing == "full")

        transposed_conv_op = get_matching_convtransp(conv_op=conv_op)
        up: list[nn.Module] = []
        stages, heads = [], []
        n_convs = counts_per_stage("n_conv_per_stage_decoder", n_conv_per_stage_decoder, n_stages - 1)
        for level, n_conv in enumerate(n_convs):
            stage = n_stages - 2 - level
            below, stride = features[stage + 1], self.strides[stage + 1]
            up.append(transposed_conv_op(below, below, stride, stride, bias=False))
            stages.append(pair(below + features[stage], [features[stage]] * n_conv, kernels[stage]))
            if auxiliary_heads or stage == 0:
                heads.append(nn.Conv3d(features[stage], num_classes, 1))
        self.decoder = SegmentationDecoder(up, stages, heads, deep_supervision, checkpointing != "none")

    @classmethod
    def paper(cls, input_channels: int, num_classes: int, **kwargs: Any) -> UNet3D:
        """Build the paper's network, with padded convolutions.

        Args:
            input_channels: Number of image channels, 3 in the paper.
            num_classes: Number of output channels, 3 in the paper.
            **kwargs: ``downsampling``, ``deep_supervision``, ``checkpointing``.

        Returns:
            The network. With ``downsampling="max_pool"``, 3 channels and 3 classes its convolutions have the 19,069,955
            weights and biases that the paper states.
        """
        return cls(input_channels=input_channels, num_classes=num_classes, **(paper_arguments() | kwargs))

    def summary(self) -> str:
        """Describe the topology in a few words, for messages."""
        return f"{super().summary()}, {self.downsampling}"

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialise one module as nnU-Net does: He normal."""
        InitWeights_He(1e-2)(module)
