"""The networks in the operations of `ledger`: the same layers in the same order as in `nnunet_conres.architectures`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from nnunet_conres.architectures.blocks import per_stage, stage_sizes, strided_size, triple
from nnunet_conres.architectures.conresnet_paper import _BLOCKS as PAPER_BLOCKS
from nnunet_conres.architectures.conresnet_paper import _BOTTLENECK as PAPER_BOTTLENECK
from nnunet_conres.architectures.conresnet_paper import _DECODER_FEATURES as PAPER_DECODER_FEATURES
from nnunet_conres.architectures.conresnet_paper import FEATURES as PAPER_FEATURES
from nnunet_conres.architectures.vnet import convolutions_per_stage
from nnunet_conres.planning.ledger import FLOAT32, Ledger, Parameter, Sized
from nnunet_conres.planning.training_step import TrainingStep

Size = Sequence[int]


class Network(ABC):
    """A network without values.

    Attributes:
        parameters: All parameters made so far.
        buffer_bytes: Running statistics.
        parts: Names of encoder stages and decoder levels.
    """

    def __init__(self, step: TrainingStep, ledger: Ledger) -> None:
        self.ledger = ledger
        self.arguments = step.arguments
        self.input_channels = step.input_channels
        self.classes = step.output_channels
        self.parameters: list[Parameter] = []
        self.buffer_bytes = 0
        n_stages = int(self.arguments["n_stages"])
        self.features = [
            int(f) for f in per_stage("features_per_stage", self.arguments["features_per_stage"], n_stages)
        ]
        self.kernels = [triple(k) for k in per_stage("kernel_sizes", self.arguments["kernel_sizes"], n_stages)]
        self.strides = [triple(s) for s in per_stage("strides", self.arguments.get("strides"), n_stages)]
        checkpointing = self.arguments.get("checkpointing", "none")
        self.checkpoints_encoder = checkpointing == "full"
        self.checkpoints_decoder = checkpointing != "none"
        self.sizes = stage_sizes(step.patch_size, self.strides)
        self.parts = [f"encoder stage {stage}" for stage in range(n_stages)]
        self.parts += [f"decoder level {stage}" for stage in range(n_stages - 2, -1, -1)]

    @abstractmethod
    def forward(self, image: Sized) -> list[Sized]:
        """The logits that training asks for."""

    # --- layers -----------------------------------------------------------------------------------------------------

    def parameter(self, numel: int, is_matrix: bool = False) -> Parameter:
        parameter = Parameter(numel, is_matrix)
        self.parameters.append(parameter)
        return parameter


class Convolution:
    """A convolution, transposed or not, and its parameters."""

    def __init__(
        self,
        network: Network,
        in_channels: int,
        out_channels: int,
        kernel: Size,
        stride: Size = (1, 1, 1),
        bias: bool = False,
        standardized: bool = False,
        is_head: bool = False,
    ) -> None:
        self.ledger = network.ledger
        self.out_channels = out_channels
        self.stride = stride
        self.weight = network.parameter(in_channels * out_channels * math.prod(kernel), is_matrix=not is_head)
        self.bias = network.parameter(out_channels) if bias else None
        self.standardized = standardized

    def __call__(self, x: Sized) -> Sized:
        shape = (x.shape[0], self.out_channels, *strided_size(x.size, self.stride))
        return self.ledger.convolution(x, self.weight, self.bias, shape, self.standardized)

    def transposed(self, x: Sized) -> Sized:
        size = [extent * s for extent, s in zip(x.size, self.stride, strict=True)]
        return self.ledger.convolution(x, self.weight, self.bias, (x.shape[0], self.out_channels, *size))


class Norm:
    """Instance or batch norm, or nothing."""

    def __init__(self, network: Network, channels: int) -> None:
        arguments = network.arguments
        self.ledger = network.ledger
        norm = str(arguments.get("norm_op"))
        self.exists = arguments.get("norm_op") is not None
        given = arguments.get("norm_op_kwargs") or {}
        is_batch_norm = "BatchNorm" in norm
        affine = self.exists and given.get("affine", is_batch_norm)
        self.parameters = [network.parameter(channels) for _ in range(2)] if affine else []
        if self.exists and given.get("track_running_stats", is_batch_norm):
            network.buffer_bytes += 2 * FLOAT32 * channels + 8

    def __call__(self, x: Sized) -> Sized:
        return self.ledger.norm(x, self.parameters) if self.exists else x


class Nonlinearity:
    """Leaky ReLU or ReLU, PReLU, or nothing."""

    def __init__(self, network: Network, channels: int) -> None:
        self.ledger = network.ledger
        self.name = str(network.arguments.get("nonlin")).rpartition(".")[2].strip("'>")
        given = network.arguments.get("nonlin_kwargs") or {}
        self.in_place = bool(given.get("inplace", False))
        self.slope = network.parameter(given.get("num_parameters", channels)) if self.name == "PReLU" else None

    def __call__(self, x: Sized) -> Sized:
        if self.name == "None":
            return x
        if self.slope is not None:
            return self.ledger.prelu(x, self.slope)
        return self.ledger.nonlinearity_in_place(x) if self.in_place else self.ledger.nonlinearity(x)


class ConvNormNonlinearity:
    """nnU-Net's convolution, (dropout,) norm, nonlinearity."""

    def __init__(
        self,
        network: Network,
        in_channels: int,
        out_channels: int,
        kernel: Size,
        stride: Size = (1, 1, 1),
        bias: bool | None = None,
        nonlinear: bool = True,
    ) -> None:
        arguments = network.arguments
        bias = bool(arguments.get("conv_bias", False)) if bias is None else bias
        self.ledger = network.ledger
        self.conv = Convolution(network, in_channels, out_channels, kernel, stride, bias)
        self.drops = arguments.get("dropout_op") is not None
        self.norm = Norm(network, out_channels)
        self.nonlinearity = Nonlinearity(network, out_channels) if nonlinear else None

    def __call__(self, x: Sized) -> Sized:
        x = self.conv(x)
        if self.drops:
            x = self.ledger.dropout(x)
        x = self.norm(x)
        return x if self.nonlinearity is None else self.nonlinearity(x)


class Chain:
    """Layers one after the other."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)

    def __call__(self, x: Sized) -> Sized:
        for layer in self.layers:
            x = layer(x)
        return x


# --- V-Net and 3D U-Net ---------------------------------------------------------------------------------------------


class EncoderDecoderNetwork(Network):
    """`encoder_decoder.EncoderDecoder`; subclasses fill in the layers."""

    stages: list[Any]
    down: list[Any]
    up: list[Any]
    levels: list[Any]
    heads: list[Convolution]

    def forward(self, image: Sized) -> list[Sized]:
        ledger = self.ledger
        skips: list[Sized] = []
        x = image
        for number in range(len(self.stages)):
            with ledger.within(f"encoder stage {number}"):
                x = ledger.checkpoint(self.checkpoints_encoder, self._stage(number), x)[0]
            skips.append(x)
        logits: list[Sized] = []
        first_head = len(self.levels) - len(self.heads)
        for level in range(len(self.levels)):
            with ledger.within(f"decoder level {len(self.levels) - 1 - level}"):
                x = ledger.checkpoint(self.checkpoints_decoder, self._level(level), x, skips[-(level + 2)])[0]
                if level >= first_head:
                    logits.append(self.heads[level - first_head](x))
        return logits[::-1]

    def _stage(self, number: int) -> Any:
        return self.stages[0] if number == 0 else lambda x: self.stages[number](self.down[number - 1](x))

    def _level(self, level: int) -> Any:
        def run(x: Sized, skip: Sized) -> Sized:
            return self.levels[level](self.ledger.cat(self.ledger.crop(self.up[level](x), skip.size), skip))

        return run

    def strided(self, in_channels: int, out_channels: int, stage: int, bias: bool) -> Any:
        """`blocks.CeilStridedConv3d`."""
        stride = self.strides[stage]
        conv = Convolution(self, in_channels, out_channels, stride, stride, bias)
        return lambda x: conv(self.ledger.pad_to_multiple(x, stride))


class UNet3DNetwork(EncoderDecoderNetwork):
    """`unet3d.UNet3D`."""

    def __init__(self, step: TrainingStep, ledger: Ledger) -> None:
        super().__init__(step, ledger)
        arguments, features, n_stages = self.arguments, self.features, len(self.features)
        bias = bool(arguments.get("conv_bias", False))

        def pair(in_channels: int, channels: Sequence[int], kernel: Size) -> Chain:
            steps = zip([in_channels, *channels[:-1]], channels, strict=True)
            return Chain([ConvNormNonlinearity(self, a, b, kernel) for a, b in steps])

        self.stages, self.down = [], []
        counts = per_stage("n_conv_per_stage", arguments.get("n_conv_per_stage", 2), n_stages)
        for stage, n_conv in enumerate(counts):
            above = features[stage - 1] if stage > 0 else self.input_channels
            kept = features[stage - 1] if stage > 0 else max(1, features[0] // 2)
            self.stages.append(pair(above, [kept] * (n_conv - 1) + [features[stage]], self.kernels[stage]))
            if stage > 0:
                self.down.append(
                    self._max_pool(stage)
                    if arguments.get("downsampling") == "max_pool"
                    else self.strided(above, above, stage, bias)
                )
        self.up, self.levels, self.heads = [], [], []
        counts = per_stage("n_conv_per_stage_decoder", arguments.get("n_conv_per_stage_decoder", 2), n_stages - 1)
        for level, n_conv in enumerate(counts):
            stage = n_stages - 2 - level
            below, stride = features[stage + 1], self.strides[stage + 1]
            self.up.append(Convolution(self, below, below, stride, stride).transposed)
            self.levels.append(pair(below + features[stage], [features[stage]] * n_conv, self.kernels[stage]))
            if arguments.get("auxiliary_heads", True) or stage == 0:
                self.heads.append(Convolution(self, features[stage], self.classes, (1, 1, 1), bias=True, is_head=True))

    def _max_pool(self, stage: int) -> Any:
        stride = self.strides[stage]
        return lambda x: self.ledger.pool(
            self.ledger.pad_to_multiple(x, stride), strided_size(x.size, stride), average=False
        )


class VNetNetwork(EncoderDecoderNetwork):
    """`vnet.VNet`."""

    def __init__(self, step: TrainingStep, ledger: Ledger) -> None:
        super().__init__(step, ledger)
        arguments, features, n_stages = self.arguments, self.features, len(self.features)
        bias = bool(arguments.get("conv_bias", True))
        counts = arguments.get("n_conv_per_stage")
        counts = per_stage("n_conv_per_stage", convolutions_per_stage(n_stages) if counts is None else counts, n_stages)
        self.stages, self.down = [], []
        for stage, n_conv in enumerate(counts):
            in_channels = features[stage] if stage > 0 else self.input_channels
            self.stages.append(self._residual_stage(in_channels, features[stage], n_conv, self.kernels[stage]))
            if stage > 0:
                conv = self.strided(features[stage - 1], features[stage], stage, bias)
                self.down.append(Chain([conv, Norm(self, features[stage]), Nonlinearity(self, features[stage])]))
        self.up, self.levels, self.heads = [], [], []
        below = features[-1]
        decoder_counts = arguments.get("n_conv_per_stage_decoder")
        decoder_counts = counts[-2::-1] if decoder_counts is None else decoder_counts
        for level, n_conv in enumerate(per_stage("n_conv_per_stage_decoder", decoder_counts, n_stages - 1)):
            stage = n_stages - 2 - level
            skip, stride = features[stage], self.strides[stage + 1]
            transposed = Convolution(self, below, skip, stride, stride, bias).transposed
            self.up.append(Chain([transposed, Norm(self, skip), Nonlinearity(self, skip)]))
            below = 2 * skip
            self.levels.append(self._residual_stage(below, below, n_conv, self.kernels[stage]))
            if arguments.get("auxiliary_heads", True) or stage == 0:
                self.heads.append(Convolution(self, below, self.classes, (1, 1, 1), bias=True, is_head=True))

    def _residual_stage(self, in_channels: int, channels: int, n_conv: int, kernel: Size) -> Any:
        ledger = self.ledger
        convolutions = Chain(
            [
                ConvNormNonlinearity(
                    self, in_channels if n == 0 else channels, channels, kernel, nonlinear=n < n_conv - 1
                )
                for n in range(n_conv)
            ]
        )
        conv = None
        if channels % in_channels:
            conv = Convolution(self, in_channels, channels, (1, 1, 1), bias=bool(self.arguments.get("conv_bias", True)))
        nonlinearity = Nonlinearity(self, channels)

        def run(x: Sized) -> Sized:
            if conv is not None:
                shortcut = conv(x)
                summed = ledger.add(convolutions(x), shortcut)
            else:
                summed = ledger.add(convolutions(x), self._repeated(x, channels))
            return nonlinearity(summed)

        return run

    def _repeated(self, x: Sized, channels: int) -> Sized:
        shape = (x.shape[0], channels, *x.size)
        if x.channels in (1, channels):
            return Sized(shape, x.itemsize, x.storage, x.node)
        return self.ledger.output(shape, x.itemsize, [(x.node, x.nbytes)])


# --- ConResNet ------------------------------------------------------------------------------------------------------


class ConResNetNetwork(Network):
    """`conresnet.ConResNet`, both topologies; subclasses fill in the encoder, `lift` and the modules."""

    full_size_residuals = False
    n_segmentation_heads: int

    def __init__(self, step: TrainingStep, ledger: Ledger) -> None:
        super().__init__(step, ledger)
        self.shares_encoder = bool(self.arguments.get("shared_encoder", False))
        self.has_stream = not str(step.architecture["network_class_name"]).endswith(".ResidualMapUNet")
        self.attention = self.arguments.get("attention", "paper")

    def encode(self, x: Sized) -> list[Sized]:
        """Features of all stages, full resolution first."""
        features = []
        for stage in range(len(self.stages)):
            with self.ledger.within(f"encoder stage {stage}"):
                x = self.ledger.checkpoint(self.checkpoints_encoder, self._stage(stage), x)[0]
            features.append(x)
        return features

    def _stage(self, stage: int) -> Any:
        return lambda x: self.stages[stage](self.stem(x) if stage == 0 else x)

    @abstractmethod
    def level(self, level: int, segmentation: Sized, residual: Sized, skip: Sized, residual_skip: Sized | None) -> Any:
        """Both streams behind a decoder level."""

    stem: Any
    stages: list[Any]
    segmentation_heads: list[Convolution]
    residual_heads: list[Convolution]

    def forward(self, image: Sized) -> list[Sized]:
        ledger = self.ledger
        residual = image
        if self.has_stream:
            with ledger.within(self.parts[0]):
                residual = self._image_residual(image)
        residual_skips: list[Sized] | None = None
        if self.shares_encoder:
            doubled = ledger.cat(image, residual)
            doubled = Sized((2 * image.shape[0], image.channels, *image.size), FLOAT32, doubled.storage)
            features = self.encode(doubled)
            half = [Sized((image.shape[0], *f.shape[1:]), f.itemsize, f.storage, self._chunk(f)) for f in features]
            del features, doubled
            skips, residual, residual_skips = half, half[-1], half
        else:
            skips = self.encode(image)
        levels = len(self.residual_heads)
        first_head = levels - len(self.segmentation_heads)
        segmentation = skips[-1]
        segmentation_maps: list[Sized] = []
        residual_maps: list[Sized] = []
        for level in range(levels):
            with ledger.within(f"decoder level {levels - 1 - level}"):
                skip = skips[-(level + 2)]
                rest = [] if residual_skips is None else [residual_skips[-(level + 2)]]
                segmentation, residual = ledger.checkpoint(
                    self.checkpoints_decoder, self._level(level), segmentation, residual, skip, *rest
                )
                if level >= first_head:
                    segmentation_maps.insert(0, self.segmentation_heads[level - first_head](segmentation))
                residual_map = self.residual_heads[level](residual)
                if self.full_size_residuals:
                    residual_map = ledger.resize(residual_map, image.size)
                residual_maps.insert(0, residual_map)
        return segmentation_maps + residual_maps

    def _level(self, level: int) -> Any:
        def run(segmentation: Sized, residual: Sized, skip: Sized, residual_skip: Sized | None = None) -> Any:
            return self.level(level, segmentation, residual, skip, residual_skip)

        return run

    def _chunk(self, features: Sized) -> Any:
        # a gradient of the whole tensor is made for either half
        return self.ledger.record([(features.node, features.nbytes)], [])

    def _image_residual(self, image: Sized) -> Sized:
        differences = [self.ledger.tensor(image.shape, image.itemsize) for _ in range(2)]
        residual = self.ledger.tensor(image.shape, image.itemsize)
        del differences
        return residual

    def context_residual(
        self,
        segmentation: Sized,
        residual: Sized,
        convolve: Any,
        feature_residual: Any,
        project: Any,
        merge: Any,
        gate: Any = None,
    ) -> tuple[Sized, Sized]:
        """`context_residual.ContextResidualModule`."""
        ledger = self.ledger
        features = convolve(segmentation)
        if project is not None:
            residual = project(residual)
        residual = merge(ledger.add(residual, feature_residual(self._residual_of_sigmoid(features))))
        if self.attention == "none":
            return features, residual
        return self._attend(features, residual if gate is None else gate(residual)), residual

    def _residual_of_sigmoid(self, x: Sized) -> Sized:
        sigmoid = self.ledger.storage(x.nbytes)
        differences = [self.ledger.storage(x.nbytes) for _ in range(2)]
        del differences
        result = self.ledger.output(x.shape, x.itemsize, [(x.node, x.nbytes)], [x.storage], temporary=3 * x.nbytes)
        del sigmoid
        return result

    def _attend(self, features: Sized, residual: Sized) -> Sized:
        parents = [(features.node, features.nbytes), (residual.node, residual.nbytes)]
        return self.ledger.output(features.shape, features.itemsize, parents, [features.storage, residual.storage])


class DynamicConResNet(ConResNetNetwork):
    """The dynamic topology."""

    def __init__(self, step: TrainingStep, ledger: Ledger) -> None:
        super().__init__(step, ledger)
        arguments, features, n_stages = self.arguments, self.features, len(self.features)
        bias = bool(arguments.get("conv_bias", False))
        self.stem = ConvNormNonlinearity(self, self.input_channels, features[0], self.kernels[0])
        blocks = arguments.get("n_blocks_per_stage")
        if blocks is None:
            convs = per_stage("n_conv_per_stage", arguments.get("n_conv_per_stage", 2), n_stages)
            blocks = [max(1, n // 2) for n in convs]
        self.stages = []
        in_channels = features[0]
        for stage, n_blocks in enumerate(per_stage("n_blocks_per_stage", blocks, n_stages)):
            chain = []
            for block in range(n_blocks):
                stride = self.strides[stage] if block == 0 else (1, 1, 1)
                chain.append(self._basic_block(in_channels, features[stage], self.kernels[stage], stride))
                in_channels = features[stage]
            self.stages.append(Chain(chain))
        counts = per_stage("n_conv_per_stage_decoder", arguments.get("n_conv_per_stage_decoder", 1), n_stages - 1)
        given = arguments.get("residual_features_per_stage")
        residual_features = features if given is None else per_stage("residual_features_per_stage", given, n_stages)
        self.modules: list[tuple[Any, ...]] = []
        self.segmentation_heads, self.residual_heads = [], []
        for level, n_conv in enumerate(counts):
            stage = n_stages - 2 - level
            below, channels, stride, kernel = (
                features[stage + 1],
                features[stage],
                self.strides[stage + 1],
                self.kernels[stage],
            )
            up = Convolution(self, below, channels, stride, stride, bias)
            convolve = Chain(
                [
                    ConvNormNonlinearity(self, 2 * channels if n == 0 else channels, channels, kernel)
                    for n in range(n_conv)
                ]
            )
            self.segmentation_heads.append(
                Convolution(self, channels, self.classes, (1, 1, 1), bias=True, is_head=True)
            )
            width = residual_features[stage]
            self.residual_heads.append(Convolution(self, width, self.classes, (1, 1, 1), bias=True, is_head=True))
            if not self.has_stream:
                self.modules.append((up, None, convolve))
                continue
            from_image = level == 0 and not self.shares_encoder
            width_below = below if level == 0 else residual_features[stage + 1]
            residual_up = None if from_image else Convolution(self, width_below, width, stride, stride, bias)
            feature_residual = Convolution(self, channels, width, (1, 1, 1), bias=bias)
            project = Convolution(self, self.input_channels, width, kernel, bias=bias) if from_image else None
            conv = Convolution(self, width, width, kernel, bias=bias)
            merge = Chain([Norm(self, width), Nonlinearity(self, width), conv])
            gate = Convolution(self, width, channels, (1, 1, 1), bias=True) if self.attention == "identity" else None
            self.modules.append((up, residual_up, convolve, feature_residual, project, merge, gate))

    def _basic_block(self, in_channels: int, channels: int, kernel: Size, stride: Size) -> Any:
        ledger = self.ledger
        first = ConvNormNonlinearity(self, in_channels, channels, kernel, stride)
        second = ConvNormNonlinearity(self, channels, channels, kernel, nonlinear=False)
        last = Nonlinearity(self, channels)
        projection = (
            ConvNormNonlinearity(self, in_channels, channels, (1, 1, 1), bias=False, nonlinear=False)
            if in_channels != channels
            else None
        )

        def run(x: Sized) -> Sized:
            shortcut = x
            if list(stride) != [1, 1, 1]:
                padded = ledger.pad_to_multiple(x, stride)
                shortcut = ledger.pool(padded, strided_size(x.size, stride), average=True)
                del padded
            if projection is not None:
                shortcut = projection(shortcut)
            out = second(first(x))
            out = ledger.add_in_place(out, shortcut)
            return last(out)

        return run

    def level(self, level: int, segmentation: Sized, residual: Sized, skip: Sized, residual_skip: Sized | None) -> Any:
        ledger = self.ledger
        up, residual_up, convolve, *of_stream = self.modules[level]
        segmentation = ledger.cat(ledger.crop(up.transposed(segmentation), skip.size), skip)
        if not of_stream:
            features = convolve(segmentation)
            return features, features
        if residual_up is None:
            residual = ledger.tensor((*residual.shape[:2], *skip.size), residual.itemsize)
        else:
            residual = ledger.crop(residual_up.transposed(residual), skip.size)
            residual = residual if residual_skip is None else ledger.add(residual, residual_skip)
        return self.context_residual(segmentation, residual, convolve, *of_stream)


class PaperConResNet(ConResNetNetwork):
    """The paper topology."""

    full_size_residuals = True

    def __init__(self, step: TrainingStep, ledger: Ledger) -> None:
        super().__init__(step, ledger)
        self.parts = [*self.parts[:4], "fusion", *self.parts[4:]]
        self.stem = self._conv(self.input_channels, PAPER_FEATURES[0])
        self.stages = []
        for stage, (features, n_blocks) in enumerate(zip(PAPER_FEATURES, PAPER_BLOCKS, strict=True)):
            chain: list[Any] = []
            if stage > 0:
                chain.append(self._preactivation(PAPER_FEATURES[stage - 1], features, stride=(2, 2, 2)))
            chain += [self._block(features) for _ in range(n_blocks)]
            self.stages.append(Chain(chain))
        self.fusion = self._preactivation(PAPER_FEATURES[-1], PAPER_BOTTLENECK, drops=True)
        self.modules, self.residual_heads = [], []
        below = PAPER_BOTTLENECK
        for level, features in enumerate(PAPER_DECODER_FEATURES):
            project: Any = None
            if level == 0 and not self.shares_encoder:
                project = self._conv(self.input_channels, features)
            elif below != features:
                project = self._preactivation(below, features)
            self.modules.append(
                (
                    self._preactivation(below, features),
                    self._conv(features, features, kernel=1),
                    project,
                    self._preactivation(features, features),
                )
            )
            self.residual_heads.append(self._conv(features, self.classes, kernel=1, bias=True))
            below = features
        self.segmentation_heads = [self._conv(below, self.classes, kernel=1, bias=True)]

    def _conv(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: Size = (1, 1, 1), bias: bool = False
    ) -> Convolution:
        return Convolution(self, in_channels, out_channels, (kernel,) * 3, stride, bias, standardized=True)

    def _preactivation(self, in_channels: int, out_channels: int, stride: Size = (1, 1, 1), drops: bool = False) -> Any:
        parameters = [self.parameter(in_channels) for _ in range(2)]
        conv = self._conv(in_channels, out_channels, stride=stride)

        def run(x: Sized) -> Sized:
            x = self.ledger.group_norm_relu(x, parameters)
            if drops:
                x = self.ledger.dropout(x)
            return conv(x)

        return run

    def _block(self, features: int) -> Any:
        first, second = self._preactivation(features, features), self._preactivation(features, features)
        return lambda x: self.ledger.add(x, second(first(x)))

    def encode(self, x: Sized) -> list[Sized]:
        *features, last = super().encode(x)
        with self.ledger.within("fusion"):
            return [*features, self.fusion(last)]

    def level(self, level: int, segmentation: Sized, residual: Sized, skip: Sized, residual_skip: Sized | None) -> Any:
        ledger = self.ledger
        segmentation = ledger.add(ledger.resize(segmentation, skip.size), skip)
        residual = ledger.resize(residual, skip.size)
        residual = residual if residual_skip is None else ledger.add(residual, residual_skip)
        return self.context_residual(segmentation, residual, *self.modules[level])


def network_of(step: TrainingStep, ledger: Ledger) -> Network:
    """The network that plans name.

    Raises:
        ValueError: It is none of this package's.
    """
    name = str(step.architecture["network_class_name"])
    classes: dict[str, type[Network]] = {
        "nnunet_conres.architectures.vnet.VNet": VNetNetwork,
        "nnunet_conres.architectures.unet3d.UNet3D": UNet3DNetwork,
        "nnunet_conres.architectures.conresnet.ConResNet": DynamicConResNet,
        "nnunet_conres.architectures.residual_map_unet.ResidualMapUNet": DynamicConResNet,
        "nnunet_conres.architectures.conresnet_paper.ConResNetPaper": PaperConResNet,
    }
    if name not in classes:
        raise ValueError(
            f"The memory of {name} cannot be estimated; expected one of {', '.join(classes)}. Give a trainer of this "
            f"package, or plans of nnunet-conres plan."
        )
    return classes[name](step, ledger)
