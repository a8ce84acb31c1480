"""V-Net: residual stages of large convolutions, strided convolutions instead of pooling.

Source: Milletari et al., "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation", 3DV
2016, arXiv 1606.04797.

Shapes are (batch, channel, X, Y, Z).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamic_network_architectures.building_blocks.helper import get_matching_convtransp
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from nnunet_conres.architectures.blocks import CeilStridedConv3d
from nnunet_conres.architectures.encoder_decoder import Encoder, EncoderDecoder, SegmentationDecoder
from nnunet_conres.architectures.network import counts_per_stage

PAPER_FEATURES = (16, 32, 64, 128, 256)
PAPER_CONVOLUTIONS = (1, 2, 3, 3, 3)
PAPER_DIVISOR = 16  # four halvings

# initial slope of torch.nn.PReLU, for He initialisation
_PRELU_SLOPE = 0.25


def convolutions_per_stage(n_stages: int) -> list[int]:
    """Return the paper's 1, 2, 3, 3, 3 convolutions, for any number of stages."""
    return [min(stage + 1, max(PAPER_CONVOLUTIONS)) for stage in range(n_stages)]


def paper_arguments() -> dict[str, Any]:
    """Return the constructor arguments of the paper's network that are not defaults, except channels and classes."""
    n_stages = len(PAPER_FEATURES)
    return {
        "n_stages": n_stages,
        "features_per_stage": list(PAPER_FEATURES),
        "conv_op": nn.Conv3d,
        "kernel_sizes": [[5, 5, 5]] * n_stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (n_stages - 1),
        "n_conv_per_stage": list(PAPER_CONVOLUTIONS),
        "n_conv_per_stage_decoder": list(PAPER_CONVOLUTIONS[-2::-1]),
        "nonlin_kwargs": {},
        "auxiliary_heads": False,
    }


class RepeatChannels(nn.Module):
    """Repeats the channels of (B, C, X, Y, Z) a number of times, without copying if there is only one channel."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to (B, times * C, X, Y, Z)."""
        if x.shape[1] == 1:
            return x.expand(-1, self.times, -1, -1, -1)
        return x.repeat(1, self.times, 1, 1, 1)


class ResidualStage(nn.Module):
    """Convolutions, with the stage's input added to their output before the last nonlinearity.

    Args:
        convolutions: Applied one after the other; the last one without nonlinearity.
        shortcut: Maps the input to the channels of the output.
        nonlin: Applied to the sum, or None.

    Source: Milletari et al. 2016, section 2.
    """

    def __init__(self, convolutions: Sequence[nn.Module], shortcut: nn.Module, nonlin: nn.Module | None) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(*convolutions)
        self.shortcut = shortcut
        self.nonlin = nn.Identity() if nonlin is None else nonlin

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, X, Y, Z) to (B, C_out, X, Y, Z)."""
        return self.nonlin(self.convolutions(x) + self.shortcut(x))


class ResolutionChange(nn.Module):
    """A strided or transposed convolution, then norm and nonlinearity if there are any."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None, nonlin: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.nonlin = nonlin

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, X, Y, Z) to (B, C_out, X', Y', Z')."""
        x = self.conv(x)
        for module in (self.norm, self.nonlin):
            if module is not None:
                x = module(x)
        return x


class VNet(EncoderDecoder):
    """Residual encoder-decoder whose resolution changes by convolutions of kernel and stride 2.

    The strided convolution before a stage changes the channels to those of the stage. In the decoder, a transposed
    convolution outputs as many channels as the skip has, and the stage takes both: twice the encoder's channels at that
    resolution. PReLU has a slope for each channel.

    Args:
        ...: Arguments of nnU-Net's plans, see `PlansNetwork`.
        features_per_stage: Channels of every encoder stage, one number or one per stage.
        n_conv_per_stage: Convolutions per encoder stage. None: 1, 2, 3, 3, 3, ...
        n_conv_per_stage_decoder: Convolutions per decoder level, lowest resolution first. None: as many as the
            encoder has at that resolution.
        auxiliary_heads: Whether decoder levels below full resolution have heads for deep supervision.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.

    Source: Milletari et al. 2016, section 2.
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
        n_conv_per_stage: int | Sequence[int] | None = None,
        n_conv_per_stage_decoder: int | Sequence[int] | None = None,
        conv_bias: bool = True,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict[str, Any] | None = None,
        dropout_op: type[nn.Module] | None = None,
        dropout_op_kwargs: dict[str, Any] | None = None,
        nonlin: type[nn.Module] | None = nn.PReLU,
        nonlin_kwargs: dict[str, Any] | None = None,
        deep_supervision: bool = False,
        *,
        auxiliary_heads: bool = True,
        checkpointing: str = "none",
    ) -> None:
        super().__init__(n_stages, features_per_stage, conv_op, kernel_sizes, strides, checkpointing)
        features = self.features
        if n_conv_per_stage is None:
            n_conv_per_stage = convolutions_per_stage(n_stages)
        n_convs = counts_per_stage("n_conv_per_stage", n_conv_per_stage, n_stages)
        if n_conv_per_stage_decoder is None:
            n_conv_per_stage_decoder = n_convs[-2::-1]

        def norm(channels: int) -> nn.Module | None:
            return None if norm_op is None else norm_op(channels, **(norm_op_kwargs or {}))

        def nonlinearity_arguments(channels: int) -> dict[str, Any]:
            given = dict(nonlin_kwargs or {})
            if nonlin is not None and issubclass(nonlin, nn.PReLU):
                given.setdefault("num_parameters", channels)
            return given

        def nonlinearity(channels: int) -> nn.Module | None:
            return None if nonlin is None else nonlin(**nonlinearity_arguments(channels))

        def residual_stage(in_channels: int, channels: int, n_conv: int, kernel_size: list[int]) -> ResidualStage:
            convolutions = [
                ConvDropoutNormReLU(
                    conv_op,
                    in_channels if number == 0 else channels,
                    channels,
                    kernel_size,
                    1,
                    conv_bias,
                    norm_op,
                    norm_op_kwargs,
                    dropout_op,
                    dropout_op_kwargs,
                    None if number == n_conv - 1 else nonlin,
                    nonlinearity_arguments(channels),
                )
                for number in range(n_conv)
            ]
            shortcut: nn.Module
            if in_channels == channels:
                shortcut = nn.Identity()
            elif channels % in_channels == 0:
                shortcut = RepeatChannels(channels // in_channels)
            else:
                shortcut = nn.Conv3d(in_channels, channels, 1, bias=conv_bias)
            return ResidualStage(convolutions, shortcut, nonlinearity(channels))

        stages: list[nn.Module] = []
        down: list[nn.Module] = []
        for stage, n_conv in enumerate(n_convs):
            in_channels = features[stage] if stage > 0 else input_channels
            stages.append(residual_stage(in_channels, features[stage], n_conv, self.kernel_sizes[stage]))
            if stage > 0:
                conv = CeilStridedConv3d(features[stage - 1], features[stage], self.strides[stage], conv_bias)
                down.append(ResolutionChange(conv, norm(features[stage]), nonlinearity(features[stage])))
        self.encoder = Encoder(stages, down, checkpointing == "full")

        transposed_conv_op = get_matching_convtransp(conv_op=conv_op)
        up: list[nn.Module] = []
        stages, heads = [], []
        below = features[-1]
        decoder_convs = counts_per_stage("n_conv_per_stage_decoder", n_conv_per_stage_decoder, n_stages - 1)
        for level, n_conv in enumerate(decoder_convs):
            stage = n_stages - 2 - level
            skip, stride = features[stage], self.strides[stage + 1]
            transposed = transposed_conv_op(below, skip, stride, stride, bias=conv_bias)
            up.append(ResolutionChange(transposed, norm(skip), nonlinearity(skip)))
            below = 2 * skip
            stages.append(residual_stage(below, below, n_conv, self.kernel_sizes[stage]))
            if auxiliary_heads or stage == 0:
                heads.append(nn.Conv3d(below, num_classes, 1))
        self.decoder = SegmentationDecoder(up, stages, heads, deep_supervision, checkpointing != "none")

    @classmethod
    def paper(cls, input_channels: int, num_classes: int, **kwargs: Any) -> VNet:
        """Build the paper's network: 5x5x5 convolutions, 16 to 256 channels, no norm.

        Args:
            input_channels: Number of image channels, 1 in the paper.
            num_classes: Number of output channels, 2 in the paper (background and foreground).
            **kwargs: ``deep_supervision``, ``checkpointing``.
        """
        return cls(input_channels=input_channels, num_classes=num_classes, **(paper_arguments() | kwargs))

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialise one module: He normal for PReLU; residual stages with a norm start as their shortcut."""
        InitWeights_He(_PRELU_SLOPE)(module)
        if isinstance(module, ResidualStage):
            norm = getattr(module.convolutions[-1], "norm", None)
            if norm is not None:
                for parameter in norm.parameters():
                    nn.init.zeros_(parameter)
