"""What all trainers of this package share: plans, checkpoints, precision on a CPU, parts of the loss in the log."""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_conres import __version__
from nnunet_conres.architectures.blocks import stage_sizes
from nnunet_conres.errors import InputError
from nnunet_conres.losses import SegmentationLoss
from nnunet_conres.optimizers import MUON_LR, MUON_WEIGHT_DECAY, Muon, muon_of
from nnunet_conres.planning.preprocessing import preprocessing_settings
from nnunet_conres.planning.sources import training_data_faults
from nnunet_conres.plans.configurations import (
    configuration_of,
    differences_in_topology,
    paper_patch_size,
    with_configuration,
)
from nnunet_conres.plans.entries import has_auxiliary_heads, set_background_class, stages_of
from nnunet_conres.trainers.logger import LossPartsLogger, loss_part_key
from nnunet_conres.trainers.nonfinite import FiniteStepsTrainer
from nnunet_conres.trainers.precision import bfloat16_gradients_are_wrong, cpu_autocast, training_precision

LATEST_CHECKPOINT = "checkpoint_latest.pth"
CHECKPOINT_VARIABLE = "NNUNET_CONRES_CHECKPOINT_MINUTES"
"""Environment variable with another `PluginTrainer.checkpoint_interval_minutes` for all trainers."""


class PluginTrainer(FiniteStepsTrainer):
    """nnU-Net's trainer plus what every network of this package needs of it.

    Subclasses say which network they train in ``architecture``, and what else they write into the plans in ``resolve``.

    Attributes:
        network_name: What messages call the network.
        training_epochs: Number of epochs; nnU-Net's own 1000.
        optimizer_kind: "sgd", nnU-Net's own, or "muon"; "adam" for subclasses that make it in ``configure_optimizers``.
        training_lr: Learning rate at the start; None for that of the optimiser, with Muon 0.03, else nnU-Net's own.
        training_weight_decay: Weight decay; None for that of the optimiser, with Muon 1e-3, else nnU-Net's own.
        lr_by_iteration: Whether the learning rate falls with every iteration rather than with every epoch; None for yes
            with Muon and no otherwise.
        checkpoint_interval_minutes: At least this often checkpoint_latest.pth is written, in mid-epoch and in mid-
            validation as well; a training that is killed loses no more steps than that when it goes on with ``--c``.
            The environment variable NNUNET_CONRES_CHECKPOINT_MINUTES comes before it.
        loss_parts: Names of the parts of the objective that are logged apart.
    """

    network_name: str = "This network"
    training_epochs: int = 1000
    training_lr: float | None = None
    training_weight_decay: float | None = None
    optimizer_kind: str = "sgd"
    lr_by_iteration: bool | None = None
    checkpoint_interval_minutes: float = 5.0
    loss_parts: tuple[str, ...] = ()

    # set by nnU-Net's constructor, which carries no types
    num_iterations_per_epoch: int
    initial_lr: float
    weight_decay: float
    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    enable_deep_supervision: bool

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net's own signature)
    ) -> None:
        # nnU-Net's constructor makes the output folder: whatever can be refused is refused before it.
        _check_device(device)
        interval = _checkpoint_interval(self.checkpoint_interval_minutes)
        resolved = self.resolve(configuration_of(plans, configuration), configuration)
        labels = PlansManager(plans).get_label_manager(dataset_json)
        set_background_class(resolved["architecture"], labels.has_regions)
        _check_network(resolved["architecture"], configuration)
        _check_preprocessed(plans, configuration)
        resolved = self._as_in_other_folds(resolved, plans, configuration, fold)
        plans = with_configuration(plans, configuration, **resolved)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.training_epochs
        self.checkpoint_interval_minutes = interval
        self.training_precision = self._precision(device)  # nnU-Net writes it into debug.json, for comparisons
        if self.optimizer_kind == "muon" and self._has_our_optimizer:
            self.initial_lr, self.weight_decay = MUON_LR, MUON_WEIGHT_DECAY
        if self.training_lr is not None:
            self.initial_lr = self.training_lr
        if self.training_weight_decay is not None:
            self.weight_decay = self.training_weight_decay
        self.logger.local_logger = LossPartsLogger(
            self.loss_parts, self.region_names, verbose=self.logger.local_logger.verbose
        )
        self._full_epoch_iterations = self.num_iterations_per_epoch
        self._earlier_outputs: list[dict[str, Any]] = []
        self._epoch_outputs: list[dict[str, Any]] = []
        self._epoch_started = self._last_checkpoint = time.monotonic()

    # --- plans and network ------------------------------------------------------------------------------------------

    @classmethod
    def architecture(cls, configuration: ConfigurationManager) -> dict[str, Any]:
        """The ``architecture`` entry of plans for the network that this trainer makes of a configuration.

        Raises:
            InputError: If it can't make one of it.
        """
        raise NotImplementedError

    @classmethod
    def resolve(cls, configuration: ConfigurationManager, name: str) -> dict[str, Any]:
        """What this trainer writes into its configuration of the plans.

        Args:
            configuration: The configuration, inheritance resolved.
            name: Its name, for messages.

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
        """Builds the network that the plans name, or derives it from stock plans; also called for prediction."""
        architecture = cls.architecture(configuration_manager)
        return build_network(architecture, num_input_channels, num_output_channels, enable_deep_supervision)

    @classmethod
    def _as_in_other_folds(
        cls, resolved: dict[str, Any], plans: dict[str, Any], configuration: str, fold: int | str
    ) -> dict[str, Any]:
        """Takes over what other folds of the same model were trained with.

        All folds share one plans.json, from which the network is rebuilt for prediction: a fold trained after a default
        changed would change what the earlier ones predict.

        Raises:
            InputError: If they were trained with another network.
        """
        results = os.environ.get("nnUNet_results")
        if results is None:
            return resolved  # nnU-Net says so itself
        model = Path(results) / plans["dataset_name"] / f"{cls.__name__}__{plans['plans_name']}__{configuration}"
        others = [folder for folder in model.glob("fold_*") if folder.name != f"fold_{fold}"]
        trained = sorted(folder.name for folder in others if any(folder.glob("checkpoint_*.pth")))
        if not trained or not (model / "plans.json").is_file():
            return resolved
        existing = configuration_of(load_json(str(model / "plans.json")), configuration).configuration
        different = differences_in_topology(existing["architecture"], resolved["architecture"])
        if different:
            raise InputError(
                f"{', '.join(trained)} in {model} were trained with another network than this fold would be: "
                f"{'; '.join(different)}. All folds of a model share one plans.json. Train all folds with the plans "
                f"that the existing ones have, or under another plans name, or move the existing ones away."
            )
        return resolved | {key: existing[key] for key in resolved if key != "batch_size"}

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        if self.enable_deep_supervision and not has_auxiliary_heads(self.configuration_manager):
            return [[1.0, 1.0, 1.0]]  # one segmentation head, at full size
        return super()._get_deep_supervision_scales()

    def _build_loss(self) -> nn.Module:
        return SegmentationLoss(self._build_segmentation_loss())

    def _build_segmentation_loss(self) -> nn.Module:
        """nnU-Net's own; of logits and target, or with deep supervision of the lists of them."""
        # nnU-Net gives the coarsest scale no weight; with a single scale it divides 0 by 0
        with np.errstate(invalid="ignore"):
            loss = super()._build_loss()
        if isinstance(loss, DeepSupervisionWrapper):
            weights = loss.weight_factors if len(loss.weight_factors) > 1 else (1.0,)
            # NumPy's numbers, as nnU-Net has them, break a compiled graph
            loss.weight_factors = tuple(float(weight) for weight in weights)
        return loss

    def _at_all_scales(self, loss: nn.Module) -> nn.Module:
        """A loss of our own wrapped as nnU-Net's is, with weight 1 for every scale that there is."""
        scales = self._get_deep_supervision_scales()
        return loss if scales is None else DeepSupervisionWrapper(loss, [1 / len(scales)] * len(scales))

    def _unwrapped_network(self) -> nn.Module:
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    @property
    def region_names(self) -> list[str]:
        """Names of the foreground classes or regions, in the order of nnU-Net's Dice."""
        wanted = (
            self.label_manager.foreground_regions
            if self.label_manager.has_regions
            else self.label_manager.foreground_labels
        )

        def key(value: Any) -> tuple[int, ...]:
            return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)

        names = {key(value): name for name, value in self.dataset_json["labels"].items()}
        return [names.get(key(value), str(value)) for value in wanted]

    # --- steps ------------------------------------------------------------------------------------------------------

    @property
    def _has_our_optimizer(self) -> bool:
        """Whether no subclass makes an optimiser of its own."""
        return type(self).configure_optimizers is PluginTrainer.configure_optimizers

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        if self.optimizer_kind != "muon":
            return super().configure_optimizers()
        optimizer = muon_of(self.network, self.initial_lr, self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        by_iteration = isinstance(self.optimizer, Muon) if self.lr_by_iteration is None else self.lr_by_iteration
        if by_iteration:
            self.lr_scheduler.step(self.current_epoch + len(self._epoch_outputs) / self._full_epoch_iterations)
        with self._autocast():
            outputs = super().train_step(batch)
        outputs |= self._loss_part_values()
        self._epoch_outputs.append(outputs)
        self._maybe_save_latest()
        return outputs

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with self._autocast():
            outputs = super().validation_step(batch)
        self._maybe_save_latest()
        return outputs | self._loss_part_values()

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.training_precision == "float32" else cpu_autocast(self.device)

    def _precision(self, device: torch.device) -> str:
        precision = training_precision(device)
        if device.type != "cpu" or precision == "float32":
            return precision
        strides, kernel_sizes = stages_of(self.configuration_manager)
        depths = [size[0] for size in stage_sizes(self.configuration_manager.patch_size, strides)]
        kernels = [kernel[0] for kernel in kernel_sizes]
        if not bfloat16_gradients_are_wrong(depths, kernels):
            return precision
        self.print_to_log_file(
            f"This processor's bfloat16 convolutions are not reliable where a kernel is deeper than its input, as in "
            f"this network (depths {depths}, kernels {kernels}): training in float32."
        )
        return "float32"

    def _loss_part_values(self) -> dict[str, np.ndarray]:
        parts = getattr(self.loss, "parts", {})  # a trainer of the user's own may have another loss
        undefined = torch.tensor(math.nan)
        return {f"{name}_loss": parts.get(name, undefined).float().cpu().numpy() for name in self.loss_parts}

    def _log_loss_parts(self, phase: str, outputs: Sequence[dict[str, Any]]) -> None:
        for part in self.loss_parts:
            values = [float(output[f"{part}_loss"]) for output in outputs]
            if self.is_ddp:
                gathered: list[list[float]] = [[] for _ in range(distributed.get_world_size())]
                distributed.all_gather_object(gathered, values)
                values = [value for one in gathered for value in one]
            # NaN marks batches in which the part was not defined; those that are infinite were skipped
            defined = [value for value in values if math.isfinite(value)]
            mean = float(np.mean(defined)) if defined else math.nan
            self.logger.log(loss_part_key(phase, part), mean, self.current_epoch)

    # --- epochs -----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        if self.local_rank == 0:
            self._check_raw_data()
        super().on_train_start()
        if self.local_rank == 0:
            for leftover in Path(self.output_folder).glob("checkpoint_*.pth.partial"):
                leftover.unlink()  # of a training that was killed while it wrote
        self._last_checkpoint = time.monotonic()

    def _check_raw_data(self) -> None:
        """Refuses to train on cases whose raw files changed since, and warns where that can't be told.

        Raises:
            InputError: Raw data and preprocessed data differ. Nothing is known where there are no raw data.
        """
        raw = os.environ.get("nnUNet_raw")
        if not raw:
            return
        folder, plans = Path(raw, self.plans_manager.dataset_name), self.plans_manager.plans
        faults, warnings = training_data_faults(
            folder,
            Path(self.preprocessed_dataset_folder_base),
            Path(self.preprocessed_dataset_folder),
            preprocessing_settings(plans, self.configuration_name),
        )
        advice = (
            f"Preprocess again: nnunet-conres plan_and_preprocess with the options that made {plans['plans_name']} and "
            f"--clean, or nnUNetv2_preprocess -d {plans['dataset_name']} -plans_name {plans['plans_name']} -c "
            f"{self.configuration_name}, which makes every case again."
        )
        if faults:
            raise InputError(f"{' '.join(faults)} {advice} To train on them all the same, unset nnUNet_raw.")
        for warning in warnings:
            self.print_to_log_file(f"Warning: {warning} {advice}")

    def on_epoch_start(self) -> None:
        unfinished = self._local_logger.unfinished_epoch
        self._earlier_outputs = []
        elapsed = 0.0
        if unfinished is not None and unfinished["epoch"] == self.current_epoch:
            self._earlier_outputs = unfinished["outputs"]
            elapsed = unfinished["seconds"]
        self._local_logger.unfinished_epoch = None
        self._epoch_started = time.monotonic() - elapsed
        super().on_epoch_start()
        self.logger.local_logger.my_fantastic_logging["epoch_start_timestamps"][-1] -= elapsed

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._epoch_outputs = list(self._earlier_outputs)
        # nnU-Net counts the iterations of an epoch after this call: a continued epoch has fewer to go.
        self._full_epoch_iterations = self.num_iterations_per_epoch
        self.num_iterations_per_epoch = max(0, self._full_epoch_iterations - len(self._earlier_outputs))
        if self._earlier_outputs:
            self.print_to_log_file(
                f"Continuing this epoch after iteration {len(self._earlier_outputs)} of {self._full_epoch_iterations}"
            )

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        self.num_iterations_per_epoch = self._full_epoch_iterations
        train_outputs = self._earlier_outputs + train_outputs
        super().on_train_epoch_end(train_outputs)
        self._log_loss_parts("train", train_outputs)

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        super().on_validation_epoch_end(val_outputs)
        self._log_loss_parts("val", val_outputs)

    def on_epoch_end(self) -> None:
        for part in self.loss_parts:
            train, val = (self.logger.get_value(loss_part_key(phase, part), step=-1) for phase in ("train", "val"))
            self.print_to_log_file(f"{part} loss: train {train:.4f}, val {val:.4f}")
        dice = self.logger.get_value("dice_per_class_or_region", step=-1)
        named = ", ".join(f"{name} {value:.4f}" for name, value in zip(self.region_names, dice, strict=True))
        self.print_to_log_file(f"Pseudo Dice by name: {named}")
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            self.print_to_log_file(f"Peak GPU memory: {peak:.2f} GiB")
        super().on_epoch_end()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def _local_logger(self) -> LossPartsLogger:
        return self.logger.local_logger

    def _maybe_save_latest(self) -> None:
        """Writes checkpoint_latest.pth in mid-epoch when it is too old, with what there is of this epoch."""
        if time.monotonic() - self._last_checkpoint < self.checkpoint_interval_minutes * 60:
            return
        self._local_logger.unfinished_epoch = {
            "epoch": self.current_epoch,
            "outputs": list(self._epoch_outputs),
            "seconds": time.monotonic() - self._epoch_started,
        }
        # nnU-Net notes the epoch after the current one as the next to train; here the current one is not done yet.
        self.current_epoch -= 1
        try:
            self.save_checkpoint(os.path.join(self.output_folder, LATEST_CHECKPOINT))
        finally:
            self.current_epoch += 1
            self._local_logger.unfinished_epoch = None

    def save_checkpoint(self, filename: str) -> None:
        """Writes a checkpoint to a temporary name and renames it: a killed training leaves no truncated file."""
        partial = f"{filename}.partial"
        super().save_checkpoint(partial)
        if self.local_rank == 0 and not self.disable_checkpointing:
            os.replace(partial, filename)
        # Only the latest counts: --c prefers it to the best, however old it is.
        if os.path.basename(filename) == LATEST_CHECKPOINT:
            self._last_checkpoint = time.monotonic()

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """As nnU-Net's; the network is the one that the checkpoint was trained with.

        Raises:
            InputError: If the checkpoint belongs to another topology than plans and trainer ask for.
        """
        if not self.was_initialized:
            self._take_architecture_from(_open_checkpoint(filename_or_checkpoint), filename_or_checkpoint)
        super().load_checkpoint(filename_or_checkpoint)
        versions = self.my_init_kwargs["plans"].setdefault("nnunet_conres", {"version": "unknown"})
        if versions["version"] != __version__:
            versions["continued_with"] = __version__

    def _take_architecture_from(self, checkpoint: dict[str, Any], filename: str) -> None:
        """Adopts the architecture arguments of a checkpoint, so that a changed default doesn't break ``--c``.

        What comes from the plans must agree: continuing with other strides would be another network.
        """
        plans = checkpoint["init_args"]["plans"]
        if checkpoint["init_args"]["configuration"] != self.configuration_name:
            raise InputError(
                f"{filename} was trained in configuration {checkpoint['init_args']['configuration']}, this training is "
                f"in {self.configuration_name}."
            )
        theirs = configuration_of(plans, self.configuration_name).configuration["architecture"]
        different = differences_in_topology(theirs, self.configuration_manager.configuration["architecture"])
        if different:
            raise InputError(
                f"{filename} belongs to another network than these plans and this trainer: {'; '.join(different)}. "
                f"Continue it with the plans it was started with, or start a new training without --c."
            )
        self.plans_manager = PlansManager(
            with_configuration(self.plans_manager.plans, self.configuration_name, architecture=deepcopy(theirs))
        )
        self.configuration_manager = self.plans_manager.get_configuration(self.configuration_name)


def build_network(
    architecture: dict[str, Any], num_input_channels: int, num_output_channels: int, enable_deep_supervision: bool
) -> nn.Module:
    """The network that an ``architecture`` entry of plans describes, its weights drawn anew."""
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        num_input_channels,
        num_output_channels,
        allow_init=True,
        deep_supervision=enable_deep_supervision,
    )


def _open_checkpoint(filename: str) -> dict[str, Any]:
    """Reads a checkpoint; weights and the optimiser's state stay in the file until they are asked for.

    Raises:
        InputError: If it is damaged.
    """
    try:
        return torch.load(filename, map_location="cpu", weights_only=False, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{filename} is damaged and cannot be loaded ({str(error).splitlines()[0]}). Move it away: --c then "
            f"takes another checkpoint of its folder if there is one, or starts anew."
        ) from error


def _checkpoint_interval(minutes: float) -> float:
    """What the environment says about checkpoints, else what the trainer does."""
    text = os.environ.get(CHECKPOINT_VARIABLE)
    if text is None:
        return minutes
    try:
        given = float(text)
    except ValueError:
        given = math.nan
    if not given >= 0:
        raise InputError(f"{CHECKPOINT_VARIABLE} is {text!r}; expected minutes, 0 or more.")
    return given


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("There is no CUDA device here that torch can use. To train on the CPU add: -device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("There is no MPS device here that torch can use. To train on the CPU add: -device cpu")


def _check_network(architecture: dict[str, Any], name: str) -> None:
    """Refuses what the network's constructor would, while there is nothing to clean up yet.

    Raises:
        InputError: With the constructor's own message.
    """
    try:
        with torch.device("meta"):  # shapes only: no memory, no time
            build_network(architecture, 1, 2, enable_deep_supervision=True)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The network that configuration {name} asks for can't be built: {error} Its architecture in the plans: "
            f"{architecture['network_class_name']}."
        ) from error


def check_is_3d(configuration: ConfigurationManager, name: str, network: str) -> None:
    """Refuses 2D configurations.

    Raises:
        InputError: If the patch is 2D.
    """
    patch_size = [int(extent) for extent in configuration.patch_size]
    if len(patch_size) != 3:
        raise InputError(
            f"{network} supports 3D configurations only, but configuration {name} is 2D (patch {patch_size}). Use a 3D "
            f"configuration such as 3d_fullres, or a stock trainer such as nnUNetTrainer."
        )


def with_paper_patch(
    entries: dict[str, Any],
    configuration: ConfigurationManager,
    patch_size: tuple[int, int, int],
    batch_size: int,
    divisor: int,
) -> dict[str, Any]:
    """Entries for the plans with the paper's patch, on every axis no larger than the images need, and its batch.

    Args:
        entries: What the trainer writes into the plans besides.
        configuration: Configuration of stock plans.
        patch_size: The paper's patch in voxels.
        batch_size: The paper's batch.
        divisor: What the network's strides multiply to; sides of the patch are rounded up to it.
    """
    median_shape = configuration.configuration.get("median_image_size_in_voxels", configuration.patch_size)
    return entries | {"patch_size": paper_patch_size(patch_size, median_shape, divisor), "batch_size": batch_size}


def _check_preprocessed(plans: dict[str, Any], configuration: str) -> None:
    """Refuses to train on data that were not preprocessed for these plans."""
    root = os.environ.get("nnUNet_preprocessed")
    if root is None:
        return  # nnU-Net says so itself
    folder = Path(root) / plans["dataset_name"] / configuration_of(plans, configuration).data_identifier
    if not folder.is_dir():
        raise InputError(
            f"There are no preprocessed data for configuration {configuration}: {folder} does not exist. Run: "
            f"nnUNetv2_preprocess -d {plans['dataset_name']} -plans_name {plans['plans_name']} -c {configuration}"
        )


def check_slice_axis(configuration: ConfigurationManager, name: str, network: str) -> None:
    """Refuses configurations without a slice axis to take residuals along.

    Raises:
        InputError: If the patch is 2D, or a single slice.
    """
    check_is_3d(configuration, name, network)
    patch_size = [int(extent) for extent in configuration.patch_size]
    slice_axis = configuration.network_arch_init_kwargs.get("slice_axis", 0)
    if patch_size[slice_axis] < 2:
        raise InputError(
            f"{network} learns from differences between slices, but the patch {patch_size} of configuration {name} is "
            f"a single slice. Plan a patch of at least 2 slices along axis {slice_axis}."
        )
