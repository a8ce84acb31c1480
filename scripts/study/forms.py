"""Forms of ConResNet's residual stream that the study tests; they are not part of the package.

docs/results.md gives the reason for each. Each trainer here differs from nnUNetTrainerConResNet in one respect.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_conres.architectures.blocks import Heads
from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.context_residual import ContextResidualModule
from nnunet_conres.architectures.memory_efficient import residual_of_sigmoid
from nnunet_conres.errors import InputError
from nnunet_conres.losses import ConResLoss, ResidualMapLoss, residual_scale_weights
from nnunet_conres.plans import conresnet
from nnunet_conres.plans.entries import class_path
from nnunet_conres.trainers import nnUNetTrainerConResNet

LARGEST_DISTANCE = 4
"""Voxels; signed distances are cut off there and divided by it."""
FINEST_LEVELS = 2
"""Number of levels with a residual stream, where not all have one."""


class SignedConResNet(ConResNet):
    """ConResNet with two residual maps per class: where the structure starts between slices, and where it ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        heads = self.decoder.seg_layers
        doubled = [nn.Conv3d(head.in_channels, 2 * head.out_channels, 1) for head in heads.residual]
        self.decoder.seg_layers = Heads(list(heads.segmentation), doubled)


class NormedContextResidualModule(ContextResidualModule):
    """Attention by the normalised residual stream: F * 2 sigmoid(norm(S)), which equals F on average."""

    def __init__(self, stage: ContextResidualModule) -> None:
        super().__init__(stage.segmentation, stage.feature_residual, stage.project, stage.merge, stage.slice_axis)
        self.norm = nn.InstanceNorm3d(stage.feature_residual.out_channels, affine=True)

    def forward(self, segmentation: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        features = self.segmentation(segmentation)
        if self.project is not None:
            residual = self.project(residual)
        residual = self.merge(residual + self.feature_residual(residual_of_sigmoid(features, self.slice_axis)))
        return features * (2 * torch.sigmoid(self.norm(residual))), residual


class NormedConResNet(ConResNet):
    """ConResNet with `NormedContextResidualModule`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.decoder.stages = nn.ModuleList(map(NormedContextResidualModule, self.decoder.stages))


class FinestDecoder(nn.Module):
    """ConResNet's decoder with a residual stream at the finest levels only; the stream starts from the image residual.

    Args:
        decoder: Decoder whose modules are reused; its coarser levels lose their residual stream.
        input_channels: Number of image channels.
    """

    def __init__(self, decoder: Any, input_channels: int) -> None:
        super().__init__()
        self.first = max(0, len(decoder.stages) - FINEST_LEVELS)
        self.deep_supervision, self.residual_outputs = decoder.deep_supervision, decoder.residual_outputs
        self.up, self.residual_up = decoder.segmentation_up, decoder.residual_up[self.first + 1 :]
        first = decoder.stages[self.first]
        kernel_size = first.merge.conv.kernel_size
        first.project = nn.Conv3d(
            input_channels, first.feature_residual.out_channels, kernel_size, padding=[k // 2 for k in kernel_size]
        )
        self.stages = nn.ModuleList(
            stage if level >= self.first else stage.segmentation for level, stage in enumerate(decoder.stages)
        )
        heads = decoder.seg_layers
        self.seg_layers = Heads(list(heads.segmentation), list(heads.residual[self.first :]))

    def forward(self, skips: Sequence[Tensor], image_residual: Tensor) -> Tensor | list[Tensor]:
        segmentation, residual = skips[-1], image_residual
        segmentation_maps: list[Tensor] = []
        residual_maps: list[Tensor] = []
        for level, stage in enumerate(self.stages):
            skip = skips[-(level + 2)]
            size = skip.shape[2:]
            segmentation = torch.cat((_cropped(self.up[level](segmentation), size), skip), 1)
            if level < self.first:
                segmentation = stage(segmentation)
            else:
                if level == self.first:
                    residual = F.adaptive_avg_pool3d(residual, size)
                else:
                    residual = _cropped(self.residual_up[level - self.first - 1](residual), size)
                segmentation, residual = stage(segmentation, residual)
                if self.residual_outputs:
                    residual_maps.insert(0, self.seg_layers.residual[level - self.first](residual))
            if self.deep_supervision or level == len(self.stages) - 1:
                segmentation_maps.insert(0, self.seg_layers.segmentation[level](segmentation))
        if self.residual_outputs:
            return segmentation_maps + residual_maps
        return segmentation_maps if self.deep_supervision else segmentation_maps[0]


def _cropped(x: Tensor, size: Sequence[int]) -> Tensor:
    return x[:, :, : size[0], : size[1], : size[2]]


class FinestConResNet(ConResNet):
    """ConResNet with `FinestDecoder`."""

    def __init__(self, input_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(input_channels, *args, **kwargs)
        self.decoder = FinestDecoder(self.decoder, input_channels)  # type: ignore[assignment]


class SignedResidualMapLoss(ResidualMapLoss):
    """Residual-map loss. Targets are the positive parts of the residuals of all classes, then the negative parts."""

    def residual_of(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        residual, mask = super().residual_of(target)
        if self.classes is None:
            inside = target[:, : residual.shape[1]].bool()
        else:
            inside = torch.cat([torch.isin(target, torch.as_tensor(labels).to(target)) for labels in self.classes], 1)
        return torch.cat((residual & inside, residual & ~inside), 1), mask


class DistanceMapLoss(ResidualMapLoss):
    """Mean absolute error of signed-distance maps: distance to the border of each class, positive inside.

    Distances are in voxels, clipped to `LARGEST_DISTANCE`, divided by it, and average-pooled to the coarser maps.
    """

    def forward(self, residual_logits: Sequence[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        distances = self.distances(target)
        loss = distances.new_zeros(())
        for weight, maps in zip(residual_scale_weights(len(residual_logits)), residual_logits, strict=True):
            loss = loss + weight * F.l1_loss(maps.float(), F.adaptive_avg_pool3d(distances, maps.shape[2:]))
        return loss, loss.new_tensor(float(target[:, :1].numel()))

    def distances(self, target: Tensor) -> Tensor:
        """Return signed distances, (B, C, X, Y, Z), from -1 to 1."""
        if self.classes is None:
            masks = target.bool()
        else:
            masks = torch.cat([torch.isin(target, torch.as_tensor(labels).to(target)) for labels in self.classes], 1)
        distances = np.stack([[_signed_distance(mask) for mask in of_case] for of_case in masks.cpu().numpy()])
        return torch.from_numpy(distances).to(target.device)


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    if mask.all() or not mask.any():
        return np.full(mask.shape, 1 if mask.any() else -1, np.float32)
    distance = np.where(mask, distance_transform_edt(mask), -distance_transform_edt(~mask))
    return (distance / LARGEST_DISTANCE).clip(-1, 1).astype(np.float32)


class _FormTrainer(nnUNetTrainerConResNet):
    """Base of the trainers: another form of the network, or another loss of its maps."""

    form: type[ConResNet] = ConResNet
    map_loss: type[ResidualMapLoss] = ResidualMapLoss

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        path = class_path(cls.form)
        if configuration.network_arch_class_name == path:
            return deepcopy(configuration.configuration["architecture"])
        return conresnet.architecture(configuration) | {"network_class_name": path}

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        assert isinstance(loss, ConResLoss)
        old = loss.residual
        loss.residual = self.map_loss(old.classes, old.ignore_label, old.slice_axis, old.ddp)
        return loss


class nnUNetTrainerConResNetSigned(_FormTrainer):
    """Trainer with signed residuals as targets."""

    form = SignedConResNet
    map_loss = SignedResidualMapLoss


class nnUNetTrainerConResNetDistance(_FormTrainer):
    """Trainer with signed-distance maps in place of residual maps."""

    map_loss = DistanceMapLoss

    def _build_loss(self) -> nn.Module:
        if self.label_manager.has_ignore_label:
            raise InputError("Signed distances need a complete annotation; this data set has an ignore label.")
        return super()._build_loss()


class nnUNetTrainerConResNetNormed(_FormTrainer):
    """Trainer with attention by the normalised residual stream."""

    form = NormedConResNet


class nnUNetTrainerConResNetFinest(_FormTrainer):
    """Trainer with a residual stream at the two finest levels only."""

    form = FinestConResNet


TRAINERS = {
    form.__name__: form
    for form in (
        nnUNetTrainerConResNetSigned,
        nnUNetTrainerConResNetDistance,
        nnUNetTrainerConResNetNormed,
        nnUNetTrainerConResNetFinest,
    )
}
