"""nnU-Net's residual encoder for patches of any size, and the decoder levels that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamic_network_architectures.building_blocks.helper import get_matching_convtransp
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import nn

from nnunet_conres.architectures.blocks import CeilAvgPool3d
from nnunet_conres.architectures.encoder_decoder import StagesAfterStem
from nnunet_conres.architectures.network import PlansNetwork, counts_per_stage


class AnySizeResidualEncoder(StagesAfterStem, ResidualEncoder):
    """nnU-Net's residual encoder, also for odd sizes, and with checkpointing. Takes the same arguments."""

    def __init__(self, *args: Any, checkpointing: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, return_skips=True)
        self.checkpointing = checkpointing
        for module in self.modules():
            if isinstance(module, BasicBlockD) and isinstance(module.skip, nn.Sequential):
                for index, shortcut in enumerate(module.skip):
                    if isinstance(shortcut, nn.AvgPool3d):
                        module.skip[index] = CeilAvgPool3d(shortcut.kernel_size, shortcut.stride)


def residual_encoder(
    network: PlansNetwork,
    input_channels: int,
    conv_op: type[nn.Module],
    n_blocks_per_stage: int | Sequence[int],
    layers: Sequence[Any],
) -> AnySizeResidualEncoder:
    """Build the encoder of a network from the stages, kernels, strides and checkpointing that the network has checked.

    Args:
        network: The network.
        input_channels: Number of image channels.
        conv_op: ``torch.nn.Conv3d``.
        n_blocks_per_stage: Residual blocks per stage.
        layers: Bias, norm, dropout and nonlinearity, in the order of the plans.

    Raises:
        ValueError: If ``n_blocks_per_stage`` doesn't fit the network's stages.
    """
    n_stages = len(network.features)
    return AnySizeResidualEncoder(
        input_channels,
        n_stages,
        network.features,
        conv_op,
        network.kernel_sizes,
        network.strides,
        counts_per_stage("n_blocks_per_stage", n_blocks_per_stage, n_stages),
        *layers,
        checkpointing=network.checkpointing == "full",
    )


def decoder_level(encoder: ResidualEncoder, level: int, n_conv: int) -> tuple[nn.Module, nn.Module]:
    """Build the two modules of a decoder level of nnU-Net's U-Net.

    Args:
        encoder: The encoder, whose kernels, strides, norm and nonlinearity the level uses.
        level: 0 for the level above the bottleneck.
        n_conv: Number of convolutions after the concatenation with the skip.

    Returns:
        The transposed convolution that raises the resolution, and the convolutions that take its output concatenated
        with the skip.
    """
    up, features = transposed_convolution(encoder, level), encoder.output_channels[-(level + 2)]
    convolutions = StackedConvBlocks(
        n_conv,
        encoder.conv_op,
        2 * features,
        features,
        encoder.kernel_sizes[-(level + 2)],
        1,
        encoder.conv_bias,
        encoder.norm_op,
        encoder.norm_op_kwargs,
        encoder.dropout_op,
        encoder.dropout_op_kwargs,
        encoder.nonlin,
        encoder.nonlin_kwargs,
    )
    return up, convolutions


def transposed_convolution(encoder: ResidualEncoder, level: int) -> nn.Module:
    """Build the transposed convolution of a decoder level, 0 for the level above the bottleneck."""
    below, features = encoder.output_channels[-(level + 1)], encoder.output_channels[-(level + 2)]
    stride = encoder.strides[-(level + 1)]
    return get_matching_convtransp(conv_op=encoder.conv_op)(below, features, stride, stride, bias=encoder.conv_bias)
