"""The trainer of all networks of this package. It handles plans and network; each of its bases adds one feature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_conres.architectures.layout import fast, with_channels_last_weights
from nnunet_conres.errors import InputError
from nnunet_conres.losses import SegmentationLoss
from nnunet_conres.nnunet import RAW, folder_from_environment
from nnunet_conres.plans.configurations import configuration_of, with_configuration
from nnunet_conres.plans.entries import has_auxiliary_heads, set_background_class
from nnunet_conres.preprocessing.dataset import preprocessing_settings
from nnunet_conres.preprocessing.sources import training_data_errors
from nnunet_conres.refusals import show_in_one_line
from nnunet_conres.trainers.checks import (
    as_in_other_folds,
    check_device,
    check_is_3d,
    check_network,
    check_preprocessed,
)
from nnunet_conres.trainers.device_augmentation import DeviceAugmentationMixin
from nnunet_conres.trainers.graphs import GraphedStepsTrainer
from nnunet_conres.trainers.logger import LossPartsTrainer
from nnunet_conres.trainers.precision import CpuPrecisionTrainer
from nnunet_conres.trainers.progress import ProgressTrainer
from nnunet_conres.trainers.recipe import RecipeTrainer, wants_fast_step
from nnunet_conres.trainers.stop import StoppableTrainer
from nnunet_conres.trainers.tracking import TrackedTrainer

show_in_one_line()  # also for users' trainers derived from ours, which nnU-Net finds by itself


class PluginTrainer(
    DeviceAugmentationMixin,
    StoppableTrainer,
    TrackedTrainer,
    ProgressTrainer,
    RecipeTrainer,
    LossPartsTrainer,
    CpuPrecisionTrainer,
    GraphedStepsTrainer,
):
    """nnU-Net's trainer for a network that is derived from the plans, and written into them.

    Subclasses define their network in ``architecture``, and all entries that they write into the plans in ``resolve``.

    Attributes:
        network_name: Name of the network in messages.
    """

    network_name: str = "This network"

    enable_deep_supervision: bool  # set by nnU-Net's constructor, which is untyped

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net's own signature, which it reads)
    ) -> None:
        check_device(device)
        entries = self.resolve(configuration_of(plans, configuration), configuration)
        set_background_class(entries["architecture"], PlansManager(plans).get_label_manager(dataset_json).has_regions)
        check_network(entries["architecture"], configuration)
        check_preprocessed(plans, configuration)
        entries = as_in_other_folds(entries, type(self).__name__, plans, configuration, fold)
        plans = with_configuration(plans, configuration, **entries)
        super().__init__(plans, configuration, fold, dataset_json, device)

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        """Return the ``architecture`` entry of plans for this trainer's network in a configuration.

        Raises:
            InputError: If the configuration does not allow this network.
        """
        raise NotImplementedError

    @classmethod
    def resolve(cls, configuration: ConfigurationManager, name: str) -> dict[str, Any]:
        """Return the entries that this trainer writes into its configuration of the plans.

        Args:
            configuration: The configuration, inheritance resolved.
            name: Name of the configuration, for messages.

        Returns:
            Entries such as ``architecture``, ``patch_size``, ``batch_size``.

        Raises:
            InputError: If this trainer can't train that configuration.
        """
        check_is_3d(configuration, name, cls.network_name)
        return {"architecture": cls.architecture(configuration)}

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network that the plans name, or derive it from stock plans. Also called for prediction."""
        entries = configuration_manager.configuration | {"architecture": cls.architecture(configuration_manager)}
        network = nnUNetTrainer.build_network_architecture(
            plans_manager,
            ConfigurationManager(entries),
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        return fast(network) if wants_fast_step() else network

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        if self.enable_deep_supervision and not has_auxiliary_heads(self.configuration_manager):
            return [[1.0, 1.0, 1.0]]  # one segmentation head, at full size
        return super()._get_deep_supervision_scales()

    def _build_loss(self) -> nn.Module:
        return SegmentationLoss(self._build_segmentation_loss())

    def _build_segmentation_loss(self) -> nn.Module:
        """Return nnU-Net's own loss, of logits and target, or with deep supervision of lists of them."""
        # nnU-Net gives the coarsest scale no weight; with a single scale it divides 0 by 0
        with np.errstate(invalid="ignore"):
            loss = super()._build_loss()
        if isinstance(loss, DeepSupervisionWrapper):
            weights = loss.weight_factors if len(loss.weight_factors) > 1 else (1.0,)
            # nnU-Net's NumPy numbers would break a compiled graph
            loss.weight_factors = tuple(float(weight) for weight in weights)
        return loss

    def _at_all_scales(self, loss: nn.Module) -> nn.Module:
        """Wrap a loss for deep supervision as nnU-Net does, with equal weights of all scales that sum to 1."""
        scales = self._get_deep_supervision_scales()
        return loss if scales is None else DeepSupervisionWrapper(loss, [1 / len(scales)] * len(scales))

    def _unwrapped_network(self) -> nn.Module:
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def initialize(self) -> None:
        super().initialize()
        if not self._do_i_compile():
            return
        if wants_fast_step():
            self.network = with_channels_last_weights(self.network)
        if not self.is_ddp and isinstance(self.loss, nn.Module):
            self.loss.compile()  # nnU-Net compiles the network, but only the Dice of its loss

    def on_train_start(self) -> None:
        if self.local_rank == 0:
            self._check_raw_data()
        super().on_train_start()

    def _check_raw_data(self) -> None:
        """Refuse to train on cases whose raw files changed after preprocessing, and warn if that is unknown.

        Nothing is checked if nnUNet_raw is not set.

        Raises:
            InputError: Raw data and preprocessed data differ.
        """
        raw = folder_from_environment(RAW)
        if raw is None:
            return
        folder, plans = raw / self.plans_manager.dataset_name, self.plans_manager.plans
        errors, warnings = training_data_errors(
            folder,
            Path(self.preprocessed_dataset_folder_base),
            Path(self.preprocessed_dataset_folder),
            preprocessing_settings(plans, self.configuration_name),
        )
        advice = (
            f"Preprocess again: nnunet-conres plan_and_preprocess with the options that made {plans['plans_name']} and "
            f"--clean, or nnUNetv2_preprocess -d {plans['dataset_name']} -plans_name {plans['plans_name']} -c "
            f"{self.configuration_name}, which preprocesses all cases."
        )
        if errors:
            raise InputError(f"{' '.join(errors)} {advice} To train anyway, unset nnUNet_raw.")
        for warning in warnings:
            self.print_to_log_file(f"Warning: {warning} {advice}")
