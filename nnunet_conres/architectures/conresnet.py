"""ConResNet: two decoders side by side, one for the segmentation and one for its inter-slice residual.

Source: Zhang et al., "Inter-slice Context Residual Learning for 3D Medical Image Segmentation", IEEE TMI 2021,
arXiv 2011.14155.

Two topologies share the context residual module and the order of computation:

- ``dynamic``, whatever stages, features, kernels and strides nnU-Net's plans hold, in nnU-Net's own building blocks;
- ``paper``, what the authors' published code computes.

Shapes are (batch, channel, X, Y, Z), X being the slice axis of an nnU-Net patch.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.helper import get_matching_convtransp
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_conres.architectures.blocks import (
    CeilAvgPool3d,
    PreActivationConv,
    count_elements,
    crop,
    maybe_checkpoint,
    per_stage,
)
from nnunet_conres.architectures.conresnet_paper import (
    PAPER_FEATURES,
    PaperDecoder,
    PaperEncoder,
    check_paper_arguments,
    paper_arguments,
)
from nnunet_conres.architectures.context_residual import (
    ContextResidualDecoder,
    ContextResidualModule,
    SupervisedModule,
)
from nnunet_conres.architectures.frugal import frugal_norm
from nnunet_conres.architectures.network import PlansNetwork, counts_per_stage, listing, positive
from nnunet_conres.residuals import inter_slice_residual

RESIDUAL_INPUTS = ("decoder", "shared_encoder")
ATTENTIONS = ("paper", "identity", "none")
TOPOLOGIES = ("dynamic", "paper")


class Gate(nn.Conv3d):
    """1x1x1 convolution whose weights start at 0, so that attention through it starts as the identity."""


class DynamicEncoder(ResidualEncoder):
    """nnU-Net's residual encoder, for odd sizes as well, and with checkpointing. Takes its arguments.

    Attributes:
        checkpointing: Whether stages are computed again for backward instead of being kept.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, return_skips=True)
        self.checkpointing = False
        for module in self.modules():
            if isinstance(module, BasicBlockD) and isinstance(module.skip, nn.Sequential):
                for index, shortcut in enumerate(module.skip):
                    if isinstance(shortcut, nn.AvgPool3d):
                        module.skip[index] = CeilAvgPool3d(shortcut.kernel_size, shortcut.stride)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps images (B, C, X, Y, Z) to the features of all stages, highest resolution first."""
        features = []
        for stage in range(len(self.stages)):
            x = maybe_checkpoint(self.checkpointing, self, self._stage, stage, x)
            features.append(x)
        return features

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        return self.stages[stage](self.stem(x) if stage == 0 else x)


class DynamicDecoder(ContextResidualDecoder):
    """Transposed convolutions with the plans' strides and concatenated skips, as in nnU-Net's U-Net.

    The residual stream starts from the image residual, averaged down to the coarsest level, or, with a shared encoder,
    from the residual's own features, whose skips are then added on every level.
    """

    def __init__(
        self,
        encoder: DynamicEncoder,
        input_channels: int,
        num_classes: int,
        n_conv_per_stage: Sequence[int],
        deep_supervision: bool,
        residual_outputs: bool,
        residual_input: str,
        slice_axis: int,
        residual_stream: bool,
        residual_features: Sequence[int],
        attention: str,
    ) -> None:
        conv_op = encoder.conv_op
        transposed_conv_op = get_matching_convtransp(conv_op=conv_op)
        bias = encoder.conv_bias

        def optional(op: Any, *args: Any, kwargs: dict[str, Any] | None) -> nn.Module | None:
            return None if op is None else op(*args, **(kwargs or {}))

        stages: list[ContextResidualModule | SupervisedModule] = []
        segmentation_up, residual_up, segmentation_heads, residual_heads = [], [], [], []
        for level in range(len(encoder.output_channels) - 1):
            below, features = encoder.output_channels[-(level + 1)], encoder.output_channels[-(level + 2)]
            stride, kernel_size = encoder.strides[-(level + 1)], encoder.kernel_sizes[-(level + 2)]
            padding = [(k - 1) // 2 for k in kernel_size]

            segmentation_up.append(transposed_conv_op(below, features, stride, stride, bias=bias))
            segmentation = StackedConvBlocks(
                n_conv_per_stage[level],
                conv_op,
                2 * features,
                features,
                kernel_size,
                1,
                bias,
                encoder.norm_op,
                encoder.norm_op_kwargs,
                encoder.dropout_op,
                encoder.dropout_op_kwargs,
                encoder.nonlin,
                encoder.nonlin_kwargs,
            )
            # The heads of all levels are always built, so that a checkpoint trained with deep supervision loads for
            # prediction without it.
            segmentation_heads.append(conv_op(features, num_classes, 1, bias=True))
            width = residual_features[-(level + 2)]
            residual_heads.append(conv_op(width, num_classes, 1, bias=True))
            if not residual_stream:
                stages.append(SupervisedModule(segmentation))
                continue
            starts_from_image = level == 0 and residual_input == "decoder"
            # what the residual stream has below; features of the shared encoder are as wide as the segmentation's
            width_below = below if level == 0 else residual_features[-(level + 1)]
            residual_up.append(
                nn.Identity()
                if starts_from_image
                else transposed_conv_op(width_below, width, stride, stride, bias=bias)
            )
            stages.append(
                ContextResidualModule(
                    segmentation=segmentation,
                    feature_residual=conv_op(features, width, 1, bias=bias),
                    project=(
                        conv_op(input_channels, width, kernel_size, padding=padding, bias=bias)
                        if starts_from_image
                        else None
                    ),
                    merge=PreActivationConv(
                        conv_op(width, width, kernel_size, padding=padding, bias=bias),
                        norm=optional(encoder.norm_op, width, kwargs=encoder.norm_op_kwargs),
                        nonlin=optional(encoder.nonlin, kwargs=encoder.nonlin_kwargs),
                        dropout=optional(encoder.dropout_op, kwargs=encoder.dropout_op_kwargs),
                    ),
                    slice_axis=slice_axis,
                    gate=Gate(width, features, 1) if attention == "identity" else None,
                    attends=attention != "none",
                )
            )
        super().__init__(
            stages,
            segmentation_heads,
            residual_heads,
            deep_supervision,
            residual_outputs,
            full_size_residuals=False,
        )
        self.segmentation_up = nn.ModuleList(segmentation_up)
        self.residual_up = nn.ModuleList(residual_up)

    def lift(
        self, level: int, segmentation: Tensor, residual: Tensor, skip: Tensor, residual_skip: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        size = skip.shape[2:]
        segmentation = torch.cat((crop(self.segmentation_up[level](segmentation), size), skip), 1)
        if not self.residual_up:
            return segmentation, residual
        if level == 0 and residual_skip is None:
            # averaged, not sampled: the coarsest level may be 32 times smaller than the image
            return segmentation, F.adaptive_avg_pool3d(residual, (size[0], size[1], size[2]))
        residual = crop(self.residual_up[level](residual), size)
        return segmentation, residual if residual_skip is None else residual + residual_skip

    def compute_conv_feature_map_size(self, sizes: Sequence[Sequence[int]]) -> np.int64:
        output = super().compute_conv_feature_map_size(sizes)
        for ups in (self.segmentation_up, self.residual_up):
            for level, up in enumerate(ups):
                if not isinstance(up, nn.Identity):
                    output += count_elements(up, sizes[-(level + 2)])
        return output


class ConResNet(PlansNetwork):
    """Encoder-decoder network with a second decoder that predicts the inter-slice residual of the segmentation.

    Takes the arguments that nnU-Net writes into plans, so that a plans file alone can instantiate it.

    Args:
        input_channels: Number of image channels.
        n_stages: Number of resolutions, at least 2.
        features_per_stage: Channels of every stage, one number or one per stage.
        conv_op: ``torch.nn.Conv3d``; the network needs a slice axis.
        kernel_sizes: Odd kernel sizes, one number or (kx, ky, kz) per stage.
        strides: Strides, one number or (sx, sy, sz) per stage; those of the first stage are 1.
        num_classes: Number of output channels per head.
        n_blocks_per_stage: Residual blocks (two convolutions each) per encoder stage. None: half of
            ``n_conv_per_stage``.
        n_conv_per_stage_decoder: Convolutions of the segmentation stream per decoder level.
        conv_bias: Whether convolutions have a bias.
        norm_op: Norm class, or None, and its arguments ``norm_op_kwargs``.
        norm_op_kwargs: See ``norm_op``.
        dropout_op: Dropout class, or None, and its arguments ``dropout_op_kwargs``.
        dropout_op_kwargs: See ``dropout_op``.
        nonlin: Nonlinearity class, or None, and its arguments ``nonlin_kwargs``.
        nonlin_kwargs: See ``nonlin``.
        deep_supervision: Whether the segmentation is returned at all of the plans' scales; can be switched later at
            ``decoder.deep_supervision``.
        n_conv_per_stage: What plans of nnU-Net's PlainConvUNet carry; two convolutions make a residual block.
        residual_outputs: Whether residual maps are returned too; can be switched later at the attribute of this name.
        residual_input: ``"decoder"``, the residual stream starts from the image residual at the coarsest decoder level
            (the authors' form), or ``"shared_encoder"``, image and image residual both pass through the encoder.
        slice_axis: Spatial axis along which slices follow each other, 0 (in nnU-Net), 1 or 2.
        topology: ``"dynamic"``, built from the arguments above, or ``"paper"``, which is fixed: stages, features,
            kernels and strides must be its own, norm, nonlinearity and dropout are.
        checkpointing: What is computed again for backward instead of being kept: ``"none"``, the levels of the
            ``"decoder"``, or the ``"full"`` network. For memory; changes no result.
        residual_stream: Whether there is a second decoder. If not, residual maps are predicted from the segmentation's
            own features: they teach these in training, and cost nothing at prediction.
        residual_features_per_stage: Channels of the residual stream, one number or one per stage; None for those of the
            segmentation's. The last one is not used.
        attention: How the residual stream S acts on the segmentation's features F: ``"paper"``, F * (1 + sigmoid(S));
            ``"identity"``, F * 2 sigmoid(gate(S)) with a 1x1x1 convolution that starts at 0; ``"none"``, not at all.

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
        num_classes: int,
        n_blocks_per_stage: int | Sequence[int] | None = None,
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
        n_conv_per_stage: int | Sequence[int] | None = None,
        residual_outputs: bool = False,
        residual_input: str = "decoder",
        slice_axis: int = 0,
        topology: str = "dynamic",
        checkpointing: str = "none",
        residual_stream: bool = True,
        residual_features_per_stage: int | Sequence[int] | None = None,
        attention: str = "paper",
    ) -> None:
        super().__init__(n_stages, features_per_stage, conv_op, kernel_sizes, strides, checkpointing)
        if residual_input not in RESIDUAL_INPUTS:
            raise ValueError(f"residual_input must be one of {RESIDUAL_INPUTS}, got {residual_input!r}.")
        if topology not in TOPOLOGIES:
            raise ValueError(f"topology must be one of {TOPOLOGIES}, got {topology!r}.")
        if slice_axis not in (0, 1, 2):
            raise ValueError(f"slice_axis must be 0, 1 or 2, got {slice_axis}.")
        self.topology = topology
        self.residual_input = residual_input
        self.residual_stream = residual_stream
        self.slice_axis = slice_axis

        residual_features = self._residual_features(residual_features_per_stage, attention)

        self.encoder: nn.Module
        self.decoder: ContextResidualDecoder
        if topology == "paper":
            check_paper_arguments(self.features, self.kernel_sizes, self.strides)
            self.encoder = PaperEncoder(input_channels, checkpointing == "full")
            self.decoder = PaperDecoder(
                input_channels, num_classes, deep_supervision, residual_outputs, residual_input, slice_axis
            )
            self.decoder.checkpointing = checkpointing != "none"
            return

        if n_blocks_per_stage is None:
            convs = counts_per_stage("n_conv_per_stage", 2 if n_conv_per_stage is None else n_conv_per_stage, n_stages)
            n_blocks_per_stage = [max(1, n // 2) for n in convs]
        encoder = DynamicEncoder(
            input_channels,
            n_stages,
            self.features,
            conv_op,
            self.kernel_sizes,
            self.strides,
            counts_per_stage("n_blocks_per_stage", n_blocks_per_stage, n_stages),
            conv_bias,
            frugal_norm(norm_op),
            norm_op_kwargs,
            dropout_op,
            dropout_op_kwargs,
            nonlin,
            nonlin_kwargs,
        )
        encoder.checkpointing = checkpointing == "full"
        self.encoder = encoder
        self.decoder = DynamicDecoder(
            encoder,
            input_channels,
            num_classes,
            counts_per_stage("n_conv_per_stage_decoder", n_conv_per_stage_decoder, n_stages - 1),
            deep_supervision,
            residual_outputs,
            residual_input,
            slice_axis,
            residual_stream,
            residual_features,
            attention,
        )
        self.decoder.checkpointing = checkpointing != "none"

    def _residual_features(self, given: int | Sequence[int] | None, attention: str) -> list[int]:
        """Channels of the residual stream at every stage.

        Args:
            given: ``residual_features_per_stage``.
            attention: ``attention``.

        Raises:
            ValueError: If one of the two, or ``residual_stream``, is out of range or does not fit the others.
        """
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {ATTENTIONS}, got {attention!r}.")
        features = self.features
        if given is not None:
            features = per_stage("residual_features_per_stage", given, len(self.features))
            positive("residual_features_per_stage", features)
        if self.topology == "paper" or self.residual_input == "shared_encoder":
            paper = self.topology == "paper"
            form = "The paper topology" if paper else f"residual_input {self.residual_input!r}"
            if not self.residual_stream:
                raise ValueError(f"{form} needs the residual stream, but residual_stream is False.")
            if given is not None:
                raise ValueError(
                    f"{form} has a residual stream as wide as the segmentation's, but residual_features_per_stage is "
                    f"{given}. Leave it out."
                )
            if paper and attention != "paper":
                raise ValueError(f"{form} has attention 'paper', got {attention!r}.")
        if not self.residual_stream and (attention != "paper" or given is not None):
            raise ValueError(
                "Without a residual stream (residual_stream is False) there is no attention and no width of it: leave "
                "attention and residual_features_per_stage out."
            )
        if attention == "paper" and features != self.features:
            raise ValueError(
                f"attention 'paper' multiplies the two streams, so that both need {self.features} channels; "
                f"residual_features_per_stage is {features}. Leave it out, or use attention 'identity'."
            )
        return features

    @classmethod
    def paper(cls, input_channels: int, num_classes: int, **kwargs: Any) -> ConResNet:
        """The network of the authors' published code.

        Args:
            input_channels: Number of image channels, 4 in the paper.
            num_classes: Number of output channels per head, 3 in the paper (one per region).
            **kwargs: ``deep_supervision``, ``residual_outputs``, ``residual_input``, ``slice_axis``, ``checkpointing``.

        Returns:
            The network; 19,018,732 parameters with 4 channels and 3 classes.
        """
        return cls(input_channels=input_channels, num_classes=num_classes, **paper_arguments(), **kwargs)

    @property
    def residual_outputs(self) -> bool:
        """Whether forward returns residual maps behind the segmentation, in training and evaluation alike."""
        return self.decoder.residual_outputs

    @residual_outputs.setter
    def residual_outputs(self, value: bool) -> None:
        self.decoder.residual_outputs = value

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Computes logits.

        Args:
            x: Images, shape (B, input_channels, X, Y, Z).

        Returns:
            - supervision off: segmentation logits, (B, num_classes, X, Y, Z);
            - ``decoder.deep_supervision``: a list of them at the plans' scales, largest first (the paper topology has
              one scale);
            - ``residual_outputs``: a list, the segmentation logits as above (only full size without deep supervision)
              followed by the residual logits of every decoder level, finest first: at their own resolution in the
              dynamic topology; in the paper topology at full size, making [segmentation, residual, residual/2,
              residual/4].
        """
        if not self.residual_stream:
            return self.decoder(self.encoder(x), x, None)
        image_residual = inter_slice_residual(x, self.slice_axis)
        if self.residual_input == "decoder":
            return self.decoder(self.encoder(x), image_residual, None)
        # one pass over a doubled batch, so that both see the same weights and keep the device busy
        features = [f.chunk(2) for f in self.encoder(torch.cat((x, image_residual)))]
        return self.decoder([image for image, _ in features], features[-1][1], [residual for _, residual in features])

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """Number of feature map elements, as nnU-Net's planner counts them for its memory estimate.

        Args:
            input_size: Spatial patch size (x, y, z), without batch and channels.

        Raises:
            ValueError: If ``input_size`` has not three entries.
        """
        sizes = self.feature_map_sizes(input_size)
        passes = 2 if self.residual_input == "shared_encoder" else 1
        return passes * count_elements(self.encoder, input_size) + self.decoder.compute_conv_feature_map_size(sizes)

    def summary(self) -> str:
        """The topology in a few words, for messages."""
        channels = [head.in_channels for head in self.decoder.seg_layers.segmentation.children()]
        stream = [head.in_channels for head in self.decoder.seg_layers.residual.children()]
        return (
            f"{self.topology} topology, decoder channels {channels}, residual channels {stream}, "
            f"strides {self.strides}, {self.residual_input}"
        )

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialises one module: He normal as in nnU-Net; gates of the attention start at 0.

        nnU-Net's residual networks let their blocks start as the identity. Here all layers learn from the first step:
        two decoders behind an encoder that does nothing yet take longer to find the first foreground.
        """
        InitWeights_He(1e-2)(module)
        if isinstance(module, Gate):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


# How the authors' names map to ours. Their module holds layers that no output depends on; those are listed by name, so
# that anything else unknown is an error.
_AUTHORS_CONV = {"gn_seg": "segmentation.norm", "conv_seg": "segmentation.conv", "conv_res": "feature_residual"} | {
    "gn_res1": "merge.norm",
    "conv_res1": "merge.conv",
}
_AUTHORS_LEVELS = {
    "seg_x4": (0, {"conv_mp_first": "project"}),
    "seg_x2": (1, {"gn_mp": "project.norm", "conv_mp": "project.conv"}),
    "seg_x1": (2, {}),
}
_AUTHORS_UNUSED = re.compile(
    r"seg_x[124]\.0\.((gn_res|gn_res2)\.(weight|bias)|conv_res2\.weight)"
    r"|seg_x[14]\.0\.(gn_mp\.(weight|bias)|conv_mp\.weight)"
    r"|seg_x[12]\.0\.conv_mp_first\.weight"
)


def _authors_modules() -> dict[str, str]:
    """Names of the authors' modules (without .weight and .bias) and of ours."""
    names = {
        "conv_4_32.0": "encoder.stem",
        "fusionConv.0": "encoder.fusion.norm",
        "fusionConv.3": "encoder.fusion.conv",
    }
    for stage in range(1, len(PAPER_FEATURES)):
        theirs = f"conv_{PAPER_FEATURES[stage - 1]}_{PAPER_FEATURES[stage]}"
        names[f"{theirs}.0"] = f"encoder.stages.{stage}.0.norm"
        names[f"{theirs}.2"] = f"encoder.stages.{stage}.0.conv"
    for layer, (stage, first, n_blocks) in enumerate([(0, 0, 1), (1, 1, 2), (2, 1, 2), (3, 1, 2), (3, 3, 2)]):
        for block in range(n_blocks):
            for number in (1, 2):
                ours = f"encoder.stages.{stage}.{first + block}.conv{number}"
                names[f"layer{layer}.{block}.gn{number}"] = f"{ours}.norm"
                names[f"layer{layer}.{block}.conv{number}"] = f"{ours}.conv"
    for theirs, (level, projection) in _AUTHORS_LEVELS.items():
        for name, ours in (_AUTHORS_CONV | projection).items():
            names[f"{theirs}.0.{name}"] = f"decoder.stages.{level}.{ours}"
    heads = {"seg_cls": "segmentation.0", "resx4_cls": "residual.0", "resx2_cls": "residual.1", "res_cls": "residual.2"}
    return names | {f"{theirs}.0": f"decoder.seg_layers.{ours}" for theirs, ours in heads.items()}


def from_authors_state_dict(
    state_dict: Mapping[str, Tensor] | str | os.PathLike[str], residual_outputs: bool = False
) -> ConResNet:
    """Builds the paper topology from a checkpoint of the authors' published code.

    Args:
        state_dict: State dictionary of the authors' network, or the path of a file that holds one (read with
            ``torch.load(weights_only=True)``, so that it cannot run code). Keys may carry a ``module.`` prefix. Layers
            that no output of the authors' network depends on are left out.
        residual_outputs: Passed on to ``ConResNet.paper``.

    Returns:
        The network, numerically the same function as the authors', in evaluation mode.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a file holds anything but tensors, or entries are missing, unknown or of the wrong shape; the
            message names them.

    Example:
        >>> network = from_authors_state_dict("conresnet_brats.pth")  # doctest: +SKIP
    """
    if isinstance(state_dict, (str, os.PathLike)):
        try:
            state_dict = torch.load(state_dict, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{state_dict} is not a state dictionary that can be read safely (torch.load with weights_only=True). "
                f"Expected a file written with torch.save(network.state_dict(), ...)."
            ) from error
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"Expected a state dictionary of name and tensor, got {type(state_dict).__name__}.")

    modules = _authors_modules()
    renamed: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for full_name, tensor in state_dict.items():
        name = full_name.removeprefix("module.")
        if _AUTHORS_UNUSED.fullmatch(name):
            continue
        module, _, parameter = name.rpartition(".")
        known = module in modules and parameter in ("weight", "bias") and isinstance(tensor, Tensor)
        ours = f"{modules[module]}.{parameter}" if known else ""
        if known and ours not in renamed:  # with and without the prefix would be one entry too many
            renamed[ours] = tensor
        else:
            unexpected.append(full_name)

    problems = [listing("of the checkpoint are not known", unexpected, most=10)]
    stem, head = renamed.get("encoder.stem.weight"), renamed.get("decoder.seg_layers.segmentation.0.weight")
    # The shapes of stem and head say how many channels and classes there are.
    network = ConResNet.paper(
        input_channels=stem.shape[1] if stem is not None and stem.ndim == 5 else 4,
        num_classes=head.shape[0] if head is not None and head.ndim == 5 else 3,
        residual_outputs=residual_outputs,
    )
    own = network.state_dict()
    theirs = {ours: name for name, ours in modules.items()}

    def authors_name(name: str) -> str:
        module, _, parameter = name.rpartition(".")
        return f"{theirs[module]}.{parameter}"

    problems.append(
        listing("are missing in the checkpoint", [authors_name(k) for k in own if k not in renamed], most=10)
    )
    wrong_shapes = [
        f"{authors_name(k)} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
        for k, v in renamed.items()
        if k in own and v.shape != own[k].shape
    ]
    problems.append(listing("have another shape", wrong_shapes, most=10))
    # a bias where the authors' layer has none
    problems.append(listing("are not known", [authors_name(k) for k in renamed if k not in own], most=10))
    if any(problems):
        raise ValueError("This is not a checkpoint of the authors' ConResNet. " + " ".join(p for p in problems if p))
    network.load_state_dict(renamed)
    return network.eval()
