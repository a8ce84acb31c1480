"""Trainers of networks that predict residual maps beside the segmentation, including ResidualMapUNet."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_conres.architectures.network import ResidualMapsMixin
from nnunet_conres.errors import InputError
from nnunet_conres.losses import RESIDUAL_WEIGHT, ConResLoss, ResidualMapLoss
from nnunet_conres.plans import residual_maps
from nnunet_conres.residuals import has_neighbours
from nnunet_conres.trainers.base import PluginTrainer
from nnunet_conres.trainers.checks import check_slice_axis
from nnunet_conres.trainers.recipe import MuonMixin


class ResidualMapTrainer(PluginTrainer):
    """Trainer of a network with residual maps.

    Attributes:
        residual_weight: Weight of the residual maps in the objective.
    """

    loss_parts = ("segmentation", "residual")
    residual_weight: ClassVar[float] = RESIDUAL_WEIGHT

    @classmethod
    def resolve(cls, configuration: ConfigurationManager, name: str) -> dict[str, Any]:
        entries = super().resolve(configuration, name)
        check_slice_axis(configuration, name, cls.network_name)
        return entries

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        network = super().build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        assert isinstance(network, ResidualMapsMixin)
        # Residual maps are part of deep supervision: computed with it, and left out without it.
        network.residual_outputs = enable_deep_supervision
        return network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        super().set_deep_supervision_enabled(enabled)
        network = self._unwrapped_network()
        assert isinstance(network, ResidualMapsMixin)
        network.residual_outputs = enabled

    def _build_loss(self) -> nn.Module:
        if not self.enable_deep_supervision:
            raise InputError(
                f"{self.network_name}'s residual maps are supervised where nnU-Net's deep supervision is: leave "
                f"enable_deep_supervision on, or train these plans with a stock trainer."
            )
        scales = self._get_deep_supervision_scales()
        assert scales is not None
        labels = self.label_manager
        residual = ResidualMapLoss(
            classes=None if labels.has_regions else labels.foreground_labels,
            ignore_label=labels.ignore_label,
            slice_axis=self._slice_axis,
            ddp=self.is_ddp,
        )
        return ConResLoss(super()._build_loss(), residual, len(scales), self.residual_weight)

    @property
    def _slice_axis(self) -> int:
        return int(self.configuration_manager.network_arch_init_kwargs.get("slice_axis", 0))

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        datasets = super().get_tr_and_val_datasets()
        if self.label_manager.has_ignore_label and isinstance(self.loss, ConResLoss):
            self._check_neighbours(datasets[0], self.loss)
        return datasets

    def _check_neighbours(self, dataset: Any, loss: ConResLoss) -> None:
        """Turn off the residual loss if no case has two neighbouring annotated slices, and log a warning.

        Batches can't show this: nnU-Net pads with background beyond the volume, and rotation spreads a slice over its
        neighbours, so that annotated pairs would seem to exist.
        """
        for identifier in dataset.identifiers:
            annotation = np.asarray(dataset.load_case(identifier)[1][0])
            annotated = (annotation != self.label_manager.ignore_label) & (annotation >= 0)
            if has_neighbours(annotated, self._slice_axis):
                return
        loss.has_residuals = False
        self.print_to_log_file(
            f"WARNING: in none of the {len(dataset.identifiers)} training cases are two neighbouring slices annotated, "
            f"so no residual between slices is defined. Its loss is NaN in the log and is ignored; training "
            f"continues with the segmentation loss only. Annotate slabs of at least 2 slices along the first axis of "
            f"the patch (nnunet-conres sparsify --slab 2), or train another network, such as nnUNetTrainerMuon."
        )


class nnUNetTrainerResidualMaps(MuonMixin, ResidualMapTrainer):
    """nnU-Net's residual encoder U-Net with residual maps as auxiliary outputs, under nnU-Net's recipe with Muon."""

    network_name = "ResidualMapUNet"

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        return residual_maps.architecture(configuration)


class nnUNetTrainerResidualMaps_SGD(nnUNetTrainerResidualMaps):
    """With nnU-Net's own optimiser and schedule."""

    configure_optimizers = nnUNetTrainer.configure_optimizers
