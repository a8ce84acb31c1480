"""ConResNet with the stages, features, kernels and strides of nnU-Net's plans, built from nnU-Net's building blocks.

Two decoders run side by side, one for the segmentation and one for its inter-slice residual; `conresnet_paper` has the
topology of the authors' published code.

Source: Zhang et al., "Inter-slice Context Residual Learning for 3D Medical Image Segmentation", IEEE TMI 2021,
arXiv 2011.14155.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_conres.architectures.blocks import PreActivationConv, crop
from nnunet_conres.architectures.context_residual import ContextResidualDecoder, ContextResidualModule
from nnunet_conres.architectures.network import (
    PlansNetwork,
    ResidualMapsMixin,
    counts_per_stage,
    residual_classes,
    spatial_axis,
)
from nnunet_conres.architectures.residual_encoder import decoder_level, residual_encoder, transposed_convolution
from nnunet_conres.residuals import inter_slice_residual


class ConResNetDecoder(ContextResidualDecoder):
    """Decoder with transposed convolutions of the plans' strides and concatenated skips, as in nnU-Net's U-Net.

    The residual stream starts from the image residual, averaged down to the coarsest level. With a shared encoder it
    starts from the encoder features of the image residual, whose skips are added on every level.

    Args:
        encoder: The encoder, whose features, kernels, strides, norm and nonlinearity the decoder uses.
        input_channels: Number of image channels.
        num_classes: Number of output channels of the segmentation heads.
        residual_classes: Number of output channels of the residual heads.
        n_conv_per_stage: Convolutions of the segmentation stream per level, lowest resolution first.
        shared_encoder: Whether the residual stream starts from features of the encoder.
        slice_axis: Spatial axis along which slices follow each other.
        deep_supervision: See ``ContextResidualDecoder``.
        residual_outputs: See ``ContextResidualDecoder``.
        checkpointing: See ``ContextResidualDecoder``.
    """

    def __init__(
        self,
        encoder: ResidualEncoder,
        input_channels: int,
        num_classes: int,
        residual_classes: int,
        n_conv_per_stage: Sequence[int],
        shared_encoder: bool,
        slice_axis: int,
        deep_supervision: bool,
        residual_outputs: bool,
        checkpointing: bool,
    ) -> None:
        conv_op, bias = encoder.conv_op, encoder.conv_bias
        stages, segmentation_up, segmentation_heads, residual_heads = [], [], [], []
        residual_up: list[nn.Module] = []
        for level, n_conv in enumerate(n_conv_per_stage):
            features, kernel_size = encoder.output_channels[-(level + 2)], encoder.kernel_sizes[-(level + 2)]
            padding = [(k - 1) // 2 for k in kernel_size]
            starts_from_image = level == 0 and not shared_encoder

            up, segmentation = decoder_level(encoder, level, n_conv)
            segmentation_up.append(up)
            residual_up.append(nn.Identity() if starts_from_image else transposed_convolution(encoder, level))
            project = conv_op(input_channels, features, kernel_size, padding=padding, bias=bias)
            stages.append(
                ContextResidualModule(
                    segmentation=segmentation,
                    feature_residual=conv_op(features, features, 1, bias=bias),
                    project=project if starts_from_image else None,
                    merge=PreActivationConv(
                        conv_op(features, features, kernel_size, padding=padding, bias=bias),
                        norm=_optional(encoder.norm_op, features, kwargs=encoder.norm_op_kwargs),
                        nonlin=_optional(encoder.nonlin, kwargs=encoder.nonlin_kwargs),
                        dropout=_optional(encoder.dropout_op, kwargs=encoder.dropout_op_kwargs),
                    ),
                    slice_axis=slice_axis,
                )
            )
            # The heads of all levels are always built, so that a checkpoint trained with deep supervision loads for
            # prediction without it.
            segmentation_heads.append(conv_op(features, num_classes, 1, bias=True))
            residual_heads.append(conv_op(features, residual_classes, 1, bias=True))
        super().__init__(
            stages,
            segmentation_heads,
            residual_heads,
            deep_supervision,
            residual_outputs,
            full_size_residuals=False,
            checkpointing=checkpointing,
        )
        self.segmentation_up = nn.ModuleList(segmentation_up)
        self.residual_up = nn.ModuleList(residual_up)

    def upsample(
        self, level: int, segmentation: Tensor, residual: Tensor, skip: Tensor, residual_skip: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        size = skip.shape[2:]
        segmentation = torch.cat((crop(self.segmentation_up[level](segmentation), size), skip), 1)
        if level == 0 and residual_skip is None:
            # averaged, not sampled: the coarsest level may be 32 times smaller than the image
            return segmentation, F.adaptive_avg_pool3d(residual, (size[0], size[1], size[2]))
        residual = crop(self.residual_up[level](residual), size)
        return segmentation, residual if residual_skip is None else residual + residual_skip


def _optional(op: type[nn.Module] | None, *args: Any, kwargs: dict[str, Any] | None) -> nn.Module | None:
    return None if op is None else op(*args, **(kwargs or {}))


class ConResNet(ResidualMapsMixin, PlansNetwork):
    """Encoder-decoder network with a second decoder that predicts the inter-slice residual of the segmentation.

    The residual stream of that decoder acts on the segmentation's features as attention, at every level.

    Args:
        ...: Arguments of nnU-Net's plans, see `PlansNetwork`.
        n_blocks_per_stage: Residual blocks (two convolutions each) per encoder stage, one number or one per stage.
        n_conv_per_stage_decoder: Convolutions of the segmentation stream per decoder level, one number or a list.
        residual_outputs: Whether residual maps are returned too; can be switched later at the attribute of this name.
        background_class: Whether the first class is the background, which has no residual map.
        shared_encoder: False: the residual stream starts from the image residual at the coarsest decoder level (the
            authors' form). True: image and image residual both pass through the encoder, with the same weights.
        slice_axis: Spatial axis along which slices follow each other, 0 (in nnU-Net), 1 or 2.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.

    Source: Zhang et al. 2021, section III.
    """

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
        shared_encoder: bool = False,
        slice_axis: int = 0,
        checkpointing: str = "none",
    ) -> None:
        super().__init__(n_stages, features_per_stage, conv_op, kernel_sizes, strides, checkpointing)
        self.shared_encoder = shared_encoder
        self.slice_axis = spatial_axis(slice_axis)
        layers = (conv_bias, norm_op, norm_op_kwargs, dropout_op, dropout_op_kwargs, nonlin, nonlin_kwargs)
        self.encoder = residual_encoder(self, input_channels, conv_op, n_blocks_per_stage, layers)
        self.decoder = ConResNetDecoder(
            self.encoder,
            input_channels,
            num_classes,
            residual_classes(num_classes, background_class),
            counts_per_stage("n_conv_per_stage_decoder", n_conv_per_stage_decoder, n_stages - 1),
            shared_encoder,
            self.slice_axis,
            deep_supervision,
            residual_outputs,
            checkpointing=checkpointing != "none",
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Compute logits.

        Args:
            x: Images, shape (B, input_channels, X, Y, Z).

        Returns:
            - supervision off: segmentation logits, (B, num_classes, X, Y, Z);
            - ``decoder.deep_supervision``: a list of them at the plans' scales, largest first;
            - ``residual_outputs``: a list, the segmentation logits as above (only full size without deep supervision)
              followed by the residual logits of every decoder level at its own resolution, finest first, with a channel
              for every class but the background.
        """
        image_residual = inter_slice_residual(x, self.slice_axis)
        if not self.shared_encoder:
            return self.decoder(self.encoder(x), image_residual)
        # one pass over a doubled batch, so that both see the same weights and keep the device busy
        features = [f.chunk(2) for f in self.encoder(torch.cat((x, image_residual)))]
        return self.decoder([image for image, _ in features], features[-1][1], [residual for _, residual in features])

    def summary(self) -> str:
        """Describe the topology in a few words, for messages."""
        encoder = "shared encoder" if self.shared_encoder else "image encoder"
        return f"ConResNet, {super().summary()}, {encoder}"
