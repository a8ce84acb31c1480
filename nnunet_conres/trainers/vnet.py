"""Trainers of V-Net."""

from __future__ import annotations

import math
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunet_conres.architectures.vnet import PAPER_DIVISOR, VNet
from nnunet_conres.augmentation.histogram import HistogramMatchingTransform
from nnunet_conres.losses import SquaredDiceLoss
from nnunet_conres.plans import vnet
from nnunet_conres.plans.configurations import with_paper_patch
from nnunet_conres.plans.entries import names_paper_form
from nnunet_conres.trainers.augmentation import with_deformation, with_spatial, without_intensity_transforms
from nnunet_conres.trainers.base import PluginTrainer
from nnunet_conres.trainers.schedules import StepLRScheduler

PAPER_PATCH_SIZE = (64, 128, 128)  # the slice axis comes first in nnU-Net
PAPER_BATCH_SIZE = 2
PAPER_STEP_ITERATIONS = 25_000


class nnUNetTrainerVNet(PluginTrainer):
    """V-Net under nnU-Net's own recipe, its topology derived from the plans."""

    network_name = "V-Net"

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        return vnet.architecture(configuration)


class nnUNetTrainerVNetPaper(nnUNetTrainerVNet):
    """V-Net as in the paper: topology, loss, optimiser, schedule, patch, batch and augmentation.

    With stock plans, patch and batch size become the paper's (128 x 128 x 64, no axis larger than the images need; 2).
    A configuration that names V-Net without auxiliary heads keeps its own patch and batch size.

    Attributes:
        sigma: Standard deviation of the control points' displacements, relative to their distance. The paper gives no
            value; its published configuration has 15 mm, with control points 64 mm apart.

    Source: Milletari et al. 2016, sections 3 and 4.
    """

    training_epochs = 120  # of 250 iterations: 30,000, as far as the paper trained
    training_lr = 1e-4
    grid_size = 2
    sigma = 15 / 64

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        return vnet.paper_architecture(configuration)

    @classmethod
    def resolve(cls, configuration: ConfigurationManager, name: str) -> dict[str, Any]:
        entries = super().resolve(configuration, name)
        if names_paper_form(configuration, VNet):
            return entries
        return with_paper_patch(entries, configuration, PAPER_PATCH_SIZE, PAPER_BATCH_SIZE, PAPER_DIVISOR)

    def _build_segmentation_loss(self) -> nn.Module:
        labels = self.label_manager
        return self._at_all_scales(SquaredDiceLoss(labels.has_regions, labels.ignore_label))

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, StepLRScheduler]:
        optimizer = torch.optim.SGD(
            self.network.parameters(), self.initial_lr, momentum=0.99, weight_decay=self.weight_decay
        )
        step_epochs = PAPER_STEP_ITERATIONS / self.num_iterations_per_epoch
        return optimizer, StepLRScheduler(optimizer, self.initial_lr, step_epochs)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:  # noqa: N802
        _, dummy_2d, _, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        # large enough for the voxels that a deformation samples from outside of the patch
        initial_patch_size = [
            extent + 2 * math.ceil(self.sigma * extent / self.grid_size)
            for extent in self.configuration_manager.patch_size
        ]
        if dummy_2d:
            initial_patch_size[0] = self.configuration_manager.patch_size[0]
        return (0.0, 0.0), dummy_2d, initial_patch_size, None

    @classmethod
    def get_training_transforms(cls, *args: Any, **kwargs: Any) -> BasicTransform:
        """Return a pipeline that always applies histogram matching and B-spline deformation.

        No rotation, scaling, mirroring or intensity transforms. Takes the arguments of nnU-Net's method of this name.
        """
        pipeline = without_intensity_transforms(nnUNetTrainer.get_training_transforms(*args, **kwargs))

        def deformation_only(transform: SpatialTransform) -> SpatialTransform:
            return with_deformation(
                transform,
                p_rotation=0,
                p_scaling=0,
                p_deformation=1,
                grid_size=cls.grid_size,
                center_deformation=False,
                sigma=[cls.sigma * extent / cls.grid_size for extent in transform.patch_size],
            )

        deformed = with_spatial(pipeline, deformation_only)
        return ComposeTransforms([HistogramMatchingTransform(p=1), *deformed.transforms])
