"""nnU-Net's residual encoder U-Net with residual maps as auxiliary outputs.

The decoder's own features predict the inter-slice residual of the segmentation. This task shapes the features in
training and costs nothing at prediction. There is no second decoder, no context residual module and no inter-slice
operation in the network: `conresnet` has those.

Source: the residual maps and their targets are those of Zhang et al., "Inter-slice Context Residual Learning for 3D
Medical Image Segmentation", IEEE TMI 2021, arXiv 2011.14155.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nnunet_conres.architectures.blocks import Heads
from nnunet_conres.architectures.encoder_decoder import EncoderDecoder, UNetDecoder
from nnunet_conres.architectures.network import ResidualMapsMixin, counts_per_stage, residual_classes
from nnunet_conres.architectures.residual_encoder import decoder_level, residual_encoder


class ResidualMapDecoder(UNetDecoder):
    """A U-Net's decoder with heads for the segmentation and for residual maps at every level.

    Args:
        up: Modules that raise the resolution, lowest first.
        stages: Modules that take the upsampled features and the encoder's, concatenated in this order.
        segmentation_heads: 1x1x1 convolutions to the classes, one per level, lowest resolution first.
        residual_heads: 1x1x1 convolutions to the classes that have a residual map, one per level.
        deep_supervision: Whether all segmentation heads are evaluated; can be switched later at the attribute.
        residual_outputs: Whether the residual heads are evaluated; can be switched later at the attribute.
        checkpointing: Whether levels are recomputed for backward instead of being kept.
    """

    def __init__(
        self,
        up: Sequence[nn.Module],
        stages: Sequence[nn.Module],
        segmentation_heads: Sequence[nn.Module],
        residual_heads: Sequence[nn.Module],
        deep_supervision: bool,
        residual_outputs: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__(up, stages, deep_supervision, checkpointing)
        self.seg_layers = Heads(segmentation_heads, residual_heads)
        self.residual_outputs = residual_outputs

    def forward(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Compute logits from the features of all stages, highest resolution first.

        Returns:
            Logits, see ``ConResNet.forward``.
        """
        segmentation_maps: list[Tensor] = []
        residual_maps: list[Tensor] = []
        for level, x in enumerate(self.levels(features)):
            if self.deep_supervision or level == len(self.stages) - 1:
                segmentation_maps.insert(0, self.seg_layers.segmentation[level](x))
            if self.residual_outputs:
                residual_maps.insert(0, self.seg_layers.residual[level](x))
        if self.residual_outputs:
            return segmentation_maps + residual_maps
        return segmentation_maps if self.deep_supervision else segmentation_maps[0]


class ResidualMapUNet(ResidualMapsMixin, EncoderDecoder):
    """nnU-Net's residual encoder U-Net, with residual maps beside the segmentation. Outputs are ordered as ConResNet's.

    Args:
        ...: Arguments of nnU-Net's plans, see `PlansNetwork`.
        n_blocks_per_stage: Residual blocks (two convolutions each) per encoder stage, one number or one per stage.
        residual_outputs: Whether residual maps are returned too; can be switched later at the attribute of this name.
        background_class: Whether the first class is the background, which has no residual map.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.
    """

    decoder: ResidualMapDecoder

    def __init__(
        self,
        input_channels: int,
        n_stages: int,
        features_per_stage: int | Sequence[int],
        conv_op: type[nn.Module],
        kernel_sizes: int | Sequence[int | Sequence[int]],
        strides: int | Sequence[int | Sequence[int]],
        n_blocks_per_stage: int | Sequence[int],
        num_classes: int,
        n_conv_per_stage_decoder: int | Sequence[int] = 1,
        conv_bias: bool = False,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict[str, Any] | None = None,
        dropout_op: type[nn.Module] | None = None,
        dropout_op_kwargs: dict[str, Any] | None = None,
        nonlin: type[nn.Module] | None = None,
        nonlin_kwargs: dict[str, Any] | None = None,
        deep_supervision: bool = False,
        *,
        residual_outputs: bool = False,
        background_class: bool = False,
        checkpointing: str = "none",
    ) -> None:
        super().__init__(n_stages, features_per_stage, conv_op, kernel_sizes, strides, checkpointing)
        layers = (conv_bias, norm_op, norm_op_kwargs, dropout_op, dropout_op_kwargs, nonlin, nonlin_kwargs)
        self.encoder = residual_encoder(self, input_channels, conv_op, n_blocks_per_stage, layers)
        counts = counts_per_stage("n_conv_per_stage_decoder", n_conv_per_stage_decoder, n_stages - 1)
        levels = [decoder_level(self.encoder, level, n_conv) for level, n_conv in enumerate(counts)]
        widths = self.features[-2::-1]
        maps = residual_classes(num_classes, background_class)
        self.decoder = ResidualMapDecoder(
            [up for up, _ in levels],
            [stage for _, stage in levels],
            # The heads of all levels are always built, so that a checkpoint trained with deep supervision loads for
            # prediction without it.
            [conv_op(width, num_classes, 1, bias=True) for width in widths],
            [conv_op(width, maps, 1, bias=True) for width in widths],
            deep_supervision,
            residual_outputs,
            checkpointing=checkpointing != "none",
        )

    def summary(self) -> str:
        """Describe the topology in a few words, for messages."""
        return f"ResidualMapUNet, {super().summary()}"
