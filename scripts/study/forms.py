"""Other forms of ConResNet to try: classes that come before a trainer among the bases of a study's.

They are no part of the package, where only what pays has a place; docs/results.md has what came out. They change a
network that the trainer has built of its plans, so that whatever they don't name is the package's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_conres.architectures.blocks import WeightStandardizedConv3d, crop
from nnunet_conres.architectures.conresnet import ConResNet, DynamicDecoder
from nnunet_conres.architectures.context_residual import ContextResidualModule, SupervisedModule
from nnunet_conres.architectures.frugal import residual_of_sigmoid
from nnunet_conres.losses import ConResLoss, ResidualMapLoss
from nnunet_conres.residuals import inter_slice_residual, label_residual


class Form:
    """A form of the network; subclasses say in ``change`` what is other, and how many inputs the encoder then has.

    Attributes:
        inputs_per_channel: Input channels of the network for every channel of the images.
    """

    inputs_per_channel = 1

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        *args: Any,
        **kwargs: Any,
    ) -> nn.Module:
        num_input_channels *= cls.inputs_per_channel
        network = super().build_network_architecture(  # type: ignore[misc]
            plans_manager, configuration_manager, num_input_channels, *args, **kwargs
        )
        cls.change(network)
        return network

    @classmethod
    def change(cls, network: ConResNet) -> None:
        """Changes a network in place; new layers are initialised as the others."""


def signed_differences(volume: Tensor, slice_axis: int) -> Tensor:
    """Differences of every slice to the previous and to the next one, 0 where there is none.

    Args:
        volume: (B, C, X, Y, Z).
        slice_axis: 0, 1 or 2.

    Returns:
        (B, 2 C, X, Y, Z), those to the previous slice first.
    """
    dim = slice_axis + 2
    between = volume.diff(dim=dim)
    none = torch.zeros_like(volume.narrow(dim, 0, 1))
    return torch.cat((torch.cat((none, between), dim), torch.cat((-between, none), dim)), 1)


def border(volume: Tensor) -> Tensor:
    """The largest absolute difference of a voxel to the previous one along any of the three axes; as ``volume``."""
    largest = inter_slice_residual(volume, 0)
    for axis in (1, 2):
        largest = torch.maximum(largest, inter_slice_residual(volume, axis))
    return largest


# --- the residual stream ----------------------------------------------------------------------------------------------


class ModuleForm(ContextResidualModule):
    """The package's, but for what the residual stream is told of the features (``told``)."""

    @classmethod
    def of(cls, module: ContextResidualModule, **changes: Any) -> ModuleForm:
        """Made of the parts of another, but for ``changes``."""
        parts = ("segmentation", "feature_residual", "project", "merge", "slice_axis", "gate", "attends")
        return cls(**{part: getattr(module, part) for part in parts} | changes)

    def told(self, features: Tensor) -> Tensor:
        return residual_of_sigmoid(features, self.slice_axis)

    def attended(self, features: Tensor, residual: Tensor) -> Tensor:
        return features * self.attention(residual) if self.attends else features

    def forward(self, segmentation: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        features = self.segmentation(segmentation)
        if self.project is not None:
            residual = self.project(residual)
        residual = self.merge(residual + self.feature_residual(self.told(features)))
        return self.attended(features, residual), residual


class _SignedModule(ModuleForm):
    def told(self, features: Tensor) -> Tensor:
        return signed_differences(torch.sigmoid(features), self.slice_axis)


class Signed(Form):
    """The stream sees signed differences of the features to both neighbouring slices, not one absolute one."""

    @classmethod
    def change(cls, network: ConResNet) -> None:
        for level, module in enumerate(network.decoder.stages):
            old = module.feature_residual
            new = nn.Conv3d(2 * old.in_channels, old.out_channels, 1, bias=old.bias is not None)
            network.initialize(new)
            network.decoder.stages[level] = _SignedModule.of(module, feature_residual=new)


class _StoppedModule(ModuleForm):
    def told(self, features: Tensor) -> Tensor:
        return inter_slice_residual(torch.sigmoid(features.detach()), self.slice_axis)


class Stopped(Form):
    """The residual maps' gradients do not go from the stream into the features that it is told of."""

    @classmethod
    def change(cls, network: ConResNet) -> None:
        for level, module in enumerate(network.decoder.stages):
            network.decoder.stages[level] = _StoppedModule.of(module)


class _BorderModule(ModuleForm):
    def told(self, features: Tensor) -> Tensor:
        return border(torch.sigmoid(features))


class BorderMapLoss(ResidualMapLoss):
    """Of residual maps that mark changes along all three axes. Takes the package's arguments, but no ignore label."""

    def residual_of(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        changes = [label_residual(target, classes=self.classes, slice_axis=axis)[0] for axis in range(3)]
        return torch.stack(changes).any(0), None


class Border(Form):
    """Residuals of features and labels along all three axes; the image's, which is averaged away anyway, along one."""

    @classmethod
    def change(cls, network: ConResNet) -> None:
        for level, module in enumerate(network.decoder.stages):
            network.decoder.stages[level] = _BorderModule.of(module)

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()  # type: ignore[misc]
        old = loss.residual
        if old.ignore_label is not None:
            raise ValueError("Borders are not defined beside an ignore label.")
        loss.residual = BorderMapLoss(old.classes, None, old.slice_axis, old.background_channel, old.ddp)
        return loss


class _FinestModule(ModuleForm):
    image_residual: Tensor

    def forward(self, segmentation: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(segmentation, self.image_residual)


class Finest(Form):
    """A stream at full resolution alone, where it starts from the image residual, not averaged.

    Below, residual maps are predicted from the segmentation's own features.
    """

    @classmethod
    def change(cls, network: ConResNet) -> None:
        stages, encoder = network.decoder.stages, network.encoder
        last = len(stages) - 1
        first: Any = stages[0].project
        kernel = encoder.kernel_sizes[0]
        project = nn.Conv3d(
            first.in_channels,
            stages[last].feature_residual.out_channels,
            kernel,
            padding=[(k - 1) // 2 for k in kernel],
            bias=first.bias is not None,
        )
        network.initialize(project)
        for level in range(last):
            stages[level] = SupervisedModule(stages[level].segmentation)
        stages[last] = _FinestModule.of(stages[last], project=project)
        network.decoder.residual_up = nn.ModuleList()  # so that lift leaves the residual stream alone

        def remember(network: ConResNet, inputs: tuple[Tensor]) -> None:
            finest: Any = network.decoder.stages[-1]
            finest.image_residual = inter_slice_residual(inputs[0], network.slice_axis)

        network.register_forward_pre_hook(remember)


class FallingWeight:
    """The weight of the residual maps falls to 0 over the training, by iteration."""

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        trainer: Any = self
        # a continued epoch has fewer iterations to go, which is why the trainer keeps the full number
        epochs = trainer.current_epoch + len(trainer._epoch_outputs) / trainer._full_epoch_iterations
        trainer.loss.residual_weight = trainer.residual_weight * (1 - epochs / trainer.num_epochs)
        return super().train_step(batch)  # type: ignore[misc]


# --- nnU-Net's optimiser ---------------------------------------------------------------------------------------------


class LowMomentum:
    """SGD with a momentum that remembers twenty steps, not a hundred, as short trainings may want it.

    Attributes:
        momentum: Nesterov momentum; nnU-Net's is 0.99.
    """

    momentum = 0.95

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        optimizer, schedule = super().configure_optimizers()  # type: ignore[misc]
        for group in optimizer.param_groups:
            group["momentum"] = self.momentum
        return optimizer, schedule


# --- without a residual stream ----------------------------------------------------------------------------------------


class DifferenceInput(Form):
    """The encoder sees, beside the images, their signed differences to both neighbouring slices."""

    inputs_per_channel = 3

    @classmethod
    def change(cls, network: ConResNet) -> None:
        def with_differences(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            return (torch.cat((inputs[0], signed_differences(inputs[0], network.slice_axis)), 1),)

        network.encoder.register_forward_pre_hook(with_differences)


class _ContextModule(SupervisedModule):
    def __init__(self, segmentation: nn.Module, features: int, slice_axis: int) -> None:
        super().__init__(segmentation)
        self.context = nn.Conv3d(2 * features, features, 1, bias=False)
        nn.init.zeros_(self.context.weight)
        self.slice_axis = slice_axis

    def forward(self, segmentation: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        features = self.segmentation(segmentation)
        features = features + self.context(signed_differences(torch.sigmoid(features), self.slice_axis))
        return features, features


class Context(Form):
    """Every level adds to its features what a 1x1x1 convolution makes of their differences to both neighbours.

    It starts as the identity. Context residuals without a second decoder.
    """

    @classmethod
    def change(cls, network: ConResNet) -> None:
        for level, module in enumerate(network.decoder.stages):
            features = network.decoder.seg_layers.residual[level].in_channels
            network.decoder.stages[level] = _ContextModule(module.segmentation, features, network.slice_axis)


class DerivedLoss(ConResLoss):
    """The residual of the predicted segmentation itself is held against the annotation's, by their Dice.

    Takes the arguments of the package's objective; residual maps are left alone.
    """

    def forward(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        segmentation = self.segmentation(outputs[: self.n_segmentation_outputs], targets)
        logits, axis = outputs[0].float(), self.residual.slice_axis
        labels = self.residual.background_channel
        probability = torch.softmax(logits, 1)[:, 1:] if labels else torch.sigmoid(logits)
        derived = inter_slice_residual(probability, axis)
        with torch.no_grad():
            truth, mask = self.residual.residual_of(targets[0])
        if mask is not None:
            derived = derived * mask
        dims = (0, 2, 3, 4)
        dice = (2 * (derived * truth).sum(dims) + 1) / (derived.sum(dims) + truth.sum(dims) + 1)
        residual = 1 - dice.mean()
        self.parts = {"segmentation": segmentation.detach(), "residual": residual.detach()}
        return segmentation + self.residual_weight * residual


class Derived(Form):
    """The differences of the segmentation between slices are themselves supervised; residual maps are made, but not."""

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()  # type: ignore[misc]
        return DerivedLoss(loss.segmentation, loss.residual, loss.n_segmentation_outputs, loss.residual_weight)


class AddedSkips(Form):
    """Skips are added, as in the paper, not concatenated."""

    @classmethod
    def change(cls, network: ConResNet) -> None:
        encoder, decoder = network.encoder, network.decoder
        for level, module in enumerate(decoder.stages):
            features = decoder.seg_layers.residual[level].in_channels
            module.segmentation = StackedConvBlocks(
                len(module.segmentation.convs),
                encoder.conv_op,
                features,
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
            module.segmentation.apply(network.initialize)
        decoder.lift = partial(cls._lift, decoder)

    @staticmethod
    def _lift(
        decoder: DynamicDecoder, level: int, segmentation: Tensor, residual: Tensor, skip: Tensor, _: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return crop(decoder.segmentation_up[level](segmentation), skip.shape[2:]) + skip, residual


class Trilinear(Form):
    """Trilinear upsampling behind a 1x1x1 convolution, not transposed convolutions; corners are not aligned."""

    @classmethod
    def change(cls, network: ConResNet) -> None:
        for level, up in enumerate(network.decoder.segmentation_up):
            convolution = nn.Conv3d(up.in_channels, up.out_channels, 1, bias=up.bias is not None)
            network.initialize(convolution)
            larger = nn.Upsample(scale_factor=tuple(float(s) for s in up.stride), mode="trilinear")
            network.decoder.segmentation_up[level] = nn.Sequential(convolution, larger)


class GroupNorms(Form):
    """Group norm (8 groups) and standardised weights, as in the paper, instead of instance norm."""

    groups = 8

    @classmethod
    def change(cls, network: ConResNet) -> None:
        for block in [module for module in network.modules() if isinstance(module, ConvDropoutNormReLU)]:
            old = block.conv
            if max(old.kernel_size) > 1:
                block.conv = WeightStandardizedConv3d(
                    old.in_channels,
                    old.out_channels,
                    old.kernel_size,
                    old.stride,
                    old.padding,
                    bias=old.bias is not None,
                )
                network.initialize(block.conv)
            norm = block.norm
            block.norm = nn.GroupNorm(cls.groups, norm.num_features, norm.eps)
            renewed = {id(old): block.conv, id(norm): block.norm}
            block.all_modules = nn.Sequential(*[renewed.get(id(m), m) for m in block.all_modules])
