"""Planners: nnU-Net's own, adapted to our networks; patch and batch size follow the memory of these networks."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunet_conres import __version__
from nnunet_conres.architectures.network import CHECKPOINTINGS
from nnunet_conres.datasets.fingerprint import FINGERPRINT, exclude_ignored_voxels
from nnunet_conres.errors import InputError
from nnunet_conres.families import PLANNED, Family, find_trainer
from nnunet_conres.files import write_json
from nnunet_conres.folders import one_at_a_time
from nnunet_conres.nnunet import PREPROCESSED, required_folder
from nnunet_conres.planning.memory import MemoryModel, UntrainableError
from nnunet_conres.planning.training_step import TrainingStep
from nnunet_conres.plans.entries import set_background_class
from nnunet_conres.preprocessing.dataset import read_plans, settings_errors, share_data
from nnunet_conres.text import format_shape

GIB: Final = 2**30
DEFAULT_MEMORY_TARGET: Final = 8.0
"""Memory limit of a training step, GiB; nnU-Net's default."""

CONFIGURATIONS: Final = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres")
"""The configurations that a planner plans. Others in a plans file were added by the user, and are kept."""

_MIN_STAGES = 2
MIN_EDGE: Final = 4
"""Smallest edge of a patch, voxels. The blur of nnU-Net's augmentation mirrors three voxels at the border. On an edge
of three voxels or fewer it fails within the first batches of a training. Images smaller than the patch are padded, as
always in nnU-Net."""


@dataclass(frozen=True)
class PlannedConfiguration:
    """Summary of a planned configuration.

    Attributes:
        name: Name of the configuration.
        patch_size: Patch in voxels.
        batch_size: Patches in a batch.
        data_identifier: Folder of its preprocessed data.
        checkpointing: "none", "decoder" or "full"; None for 2d, which uses nnU-Net's own network.
        memory: Estimated memory of a training step, bytes; None for 2d.
    """

    name: str
    patch_size: tuple[int, ...]
    batch_size: int
    data_identifier: str
    checkpointing: str | None = None
    memory: int | None = None


class TooLittleMemoryError(InputError):
    """Not even the smallest patch fits the memory target."""


class _SmallestPatchReached(Exception):  # noqa: N818  (no error)
    """nnU-Net's search for a patch has reached one that is too small."""


class _PlanAgain(Exception):  # noqa: N818  (no error)
    """A planned configuration exceeds the target when executed. The memory model now has the executed value."""


class NetworkPlanner(ExperimentPlanner):
    """nnU-Net's planner for a network of this package.

    nnU-Net itself plans the preprocessing, and how a patch shrinks: first along the axis that is largest relative to
    the images. A patch is small enough if a training step at batch size 2 fits the target according to the memory
    model. The wanted patch has as many voxels as nnU-Net plans for its own U-Net and the same target. Checkpointing
    costs time, so the planner takes the lowest level under which such a patch fits. If there is none, it takes the
    largest patch that fits under full checkpointing. The batch size is the largest that fits: 2 at least, and otherwise
    5 % of the data set at most. Before plans are written, a training step of every 3D configuration is executed on fake
    tensors. 2d uses nnU-Net's own network, planned by nnU-Net.

    Attributes:
        family: Family of the planned network.
        progress: Whether to show a progress bar on stderr.
        model: Memory model of training steps; planners with equal settings may share one.
    """

    family: ClassVar[Family]
    progress: bool = True

    dataset_name: str
    dataset_json: dict[str, Any]
    dataset_fingerprint: dict[str, Any]
    raw_dataset_folder: str
    plans_identifier: str

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = DEFAULT_MEMORY_TARGET,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            self.family.plans_name if plans_name is None else plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        self._stock_reference = self.UNet_reference_val_3d
        self._stock_estimates: dict[tuple[Any, ...], int] = {}
        self._checkpointing: str | None = None  # of the current search; None: nnU-Net's own network
        self._labels = LabelManager(self.dataset_json["labels"], self.dataset_json.get("regions_class_order"))
        self._previous_stage_channels = 0
        self._search: list[tuple[list[int], int]] = []
        self._only_shrinks = False
        self._smallest: tuple[list[int], dict[str, Any]] | None = None
        self._checked_channels: set[int] = set()
        self._bar = tqdm(disable=True)
        self.model = MemoryModel(progress=lambda: self._bar.update())

    @property
    def memory_target(self) -> int:
        """Memory limit of a training step, bytes."""
        return int(self.UNet_vram_target_GB * GIB)

    # --- memory -----------------------------------------------------------------------------------------------------

    def _step(self, architecture: Mapping[str, Any], patch_size: Sequence[int], batch_size: int) -> TrainingStep:
        """Return a training step with mixed precision."""
        channels = len(self.dataset_json.get("channel_names", self.dataset_json.get("modality", ())))
        return TrainingStep(
            trainer=find_trainer(self.family.trainer_name),
            architecture=architecture,
            patch_size=tuple(int(extent) for extent in patch_size),
            batch_size=batch_size,
            input_channels=channels + self._previous_stage_channels,
            labels=self._labels,
        )

    def _memory(self, architecture: Mapping[str, Any], patch_size: Sequence[int], batch_size: int) -> int:
        """Return the bytes of a training step according to the memory model."""
        return self.model.total(self._step(architecture, patch_size, batch_size))

    def _fits(self, architecture: Mapping[str, Any], patch_size: Sequence[int], batch_size: int) -> bool:
        return self._memory(architecture, patch_size, batch_size) <= self.memory_target

    def static_estimate_VRAM_usage(  # noqa: N802
        self,
        patch_size: Sequence[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict[str, Any],
        arch_kwargs_req_import: Sequence[str],
    ) -> int:
        """Return the value that nnU-Net's search for a patch compares with the target.

        For our network, these are the bytes of a training step at the smallest batch size.

        Raises:
            InputError: If the search has reached a patch that the network can't be trained with.
        """
        if self._checkpointing is None:
            key = (json.dumps(arch_kwargs, default=int), *map(int, patch_size), input_channels, output_channels)
            if key not in self._stock_estimates:
                with torch.device("meta"):  # shapes only: no memory, no time
                    network = get_network_from_plans(
                        arch_class_name, arch_kwargs, arch_kwargs_req_import, input_channels, output_channels, False
                    )
                self._stock_estimates[key] = int(network.compute_conv_feature_map_size(patch_size))
            return self._stock_estimates[key]
        patch = [int(extent) for extent in patch_size]
        self._check_patch(patch, arch_kwargs["n_stages"])
        stock = {
            "network_class_name": arch_class_name,
            "arch_kwargs": arch_kwargs,
            "_kw_requires_import": arch_kwargs_req_import,
        }
        architecture = self._derive(stock, self._checkpointing)
        if self._only_shrinks:
            self._smallest = patch, architecture
            return sys.maxsize
        needed = self._memory(architecture, patch, self.UNet_min_batch_size)
        self._search.append((patch, needed))
        return needed

    def _check_patch(self, patch: list[int], n_stages: int) -> None:
        if n_stages >= _MIN_STAGES and min(patch) >= MIN_EDGE:
            return
        if self._smallest is not None and self._only_shrinks:
            raise _SmallestPatchReached
        if not self._search:
            raise InputError(
                f"The images of {self.dataset_name} are too small for {self.family.title}: a patch of "
                f"{format_shape(patch)} "
                f"voxels makes a network of {n_stages} stages; expected {_MIN_STAGES} stages or more, and {MIN_EDGE} "
                f"voxels along each axis. A finer -overwrite_target_spacing makes them larger."
            )
        raise self._too_little(*min(self._search, key=lambda tried: tried[1]))

    def _too_little(self, patch: list[int], needed: int) -> TooLittleMemoryError:
        return TooLittleMemoryError(
            f"{self.family.title} can't be planned for {self.dataset_name} in {_gib(self.memory_target)}: the smallest "
            f"patch, {format_shape(patch)} voxels, takes {_gib(needed)} at batch {self.UNet_min_batch_size} with "
            f"checkpointing {self._checkpointing}"
            + (" in the cascade, where the previous stage adds channels" if self._previous_stage_channels else "")
            + f". Set -gpu_memory_target to at least {math.ceil(needed / GIB * 100) / 100:g}."
        )

    def _check_smallest_patch(self, arguments: tuple[Any, ...]) -> None:
        """Reject a target that the smallest patch does not fit, before the long search for the largest patch.

        Raises:
            TooLittleMemoryError: If it does not fit under full checkpointing.
        """
        if self._previous_stage_channels in self._checked_channels:
            return
        self._search, self._smallest = [], None
        self._only_shrinks, self._checkpointing = True, CHECKPOINTINGS[-1]
        try:
            super().get_plans_for_configuration(*arguments, {})
        except _SmallestPatchReached:
            assert self._smallest is not None
            patch, architecture = self._smallest
            # If this patch is too small to be trained, it says nothing about the target.
            with contextlib.suppress(UntrainableError):
                needed = self.model.execute(self._step(architecture, patch, self.UNet_min_batch_size))
                if needed > self.memory_target:
                    raise self._too_little(patch, needed) from None
        finally:
            self._only_shrinks, self._checkpointing = False, None
        self._checked_channels.add(self._previous_stage_channels)

    # --- a configuration --------------------------------------------------------------------------------------------

    def _derive(self, stock: Mapping[str, Any], checkpointing: str) -> dict[str, Any]:
        # lists instead of tuples, as read from the plans file: the trainer derives its network from those too
        entry = self.family.plans.architecture(ConfigurationManager({"architecture": json.loads(json.dumps(stock))}))
        set_background_class(entry, self._labels.has_regions)
        entry["arch_kwargs"]["checkpointing"] = checkpointing
        return entry

    def get_plans_for_configuration(
        self,
        spacing: Sequence[float],
        median_shape: Sequence[float],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, Any],
    ) -> dict[str, Any]:
        """Return a configuration as nnU-Net plans it, with our network in 3D.

        Args:
            spacing: Voxel size in mm; three values, or two for 2d.
            median_shape: Median shape of the images at that spacing, voxels.
            data_identifier: Folder of the preprocessed data.
            approximate_n_voxels_dataset: Total number of voxels of all training cases.
            _cache: nnU-Net's cache, used for 2d only.

        Raises:
            InputError: If not even the smallest patch fits the target, or the images are too small for the network.
        """
        if len(spacing) == 2:  # _checkpointing is None, so nnU-Net plans its own network
            return super().get_plans_for_configuration(
                spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
            )
        arguments = (
            spacing,
            tuple(max(extent, MIN_EDGE) if extent >= 1 else extent for extent in median_shape),
            data_identifier,
            approximate_n_voxels_dataset,
        )
        try:
            plan = super().get_plans_for_configuration(*arguments, {})
        except ZeroDivisionError:  # the patch has no voxels
            raise InputError(
                f"The images of {self.dataset_name} are too small for {self.family.title} at a voxel size of "
                f"{' x '.join(f'{extent:g}' for extent in spacing)} mm: "
                f"{format_shape([round(e) for e in median_shape])} "
                f"voxels. A finer -overwrite_target_spacing makes them larger."
            ) from None
        self._check_smallest_patch(arguments)
        wanted = math.prod(int(extent) for extent in plan["patch_size"])
        for checkpointing in CHECKPOINTINGS:
            found = self._largest_patch_under(checkpointing, arguments)
            if found is None:
                continue
            plan = found
            if math.prod(plan["patch_size"]) >= wanted:
                break
        patch_size = plan["patch_size"]
        largest = math.floor(approximate_n_voxels_dataset * self.max_dataset_covered / math.prod(patch_size))
        plan["batch_size"] = self._batch_size(plan["architecture"], patch_size, largest)
        plan["median_image_size_in_voxels"] = median_shape
        return plan

    def _largest_patch_under(self, checkpointing: str, arguments: tuple[Any, ...]) -> dict[str, Any] | None:
        """Return the configuration with the largest patch that fits; None if no patch fits without more checkpointing.

        Raises:
            TooLittleMemoryError: If no patch fits even under full checkpointing.
        """
        self._search, self._checkpointing = [], checkpointing
        # nnU-Net compares the result of static_estimate_VRAM_usage for its reference batch size, 2 in 3D, with this
        # value scaled from its reference memory to the target. With the value set here, the comparison is in bytes.
        self.UNet_reference_val_3d = self.UNet_reference_val_corresp_GB * GIB
        try:
            # an empty cache: the keys of nnU-Net's cache do not include the input channels that a cascade adds
            plan = super().get_plans_for_configuration(*arguments, {})
        except TooLittleMemoryError:
            if checkpointing == CHECKPOINTINGS[-1]:
                raise
            return None
        finally:
            self._checkpointing, self.UNet_reference_val_3d = None, self._stock_reference
        plan["patch_size"] = [int(extent) for extent in plan["patch_size"]]
        plan["architecture"] = self._derive(plan["architecture"], checkpointing)
        return plan

    def _batch_size(self, architecture: Mapping[str, Any], patch_size: Sequence[int], largest: int) -> int:
        """Return the largest batch size that fits: nnU-Net's minimum at least, and otherwise `largest` at most."""
        fits, too_large = self.UNet_min_batch_size, max(largest, self.UNet_min_batch_size) + 1
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            if self._fits(architecture, patch_size, middle):
                fits = middle
            else:
                too_large = middle
        return int(fits)

    def _check_training_steps(self, plans: dict[str, Any]) -> None:
        """Execute a training step of every 3D configuration.

        Raises:
            UntrainableError: If a step can't be executed.
            _PlanAgain: If a step exceeds the target.
        """
        manager = PlansManager(deepcopy(plans))
        for name in (name for name in CONFIGURATIONS if name in manager.available_configurations):
            configuration = manager.get_configuration(name)
            if len(configuration.patch_size) == 3 and self._execute(configuration) > self.memory_target:
                raise _PlanAgain

    def _execute(self, configuration: ConfigurationManager) -> int:
        """Execute a configuration's training step and return its bytes."""
        is_cascade = configuration.previous_stage_name is not None
        self._previous_stage_channels = len(self._labels.foreground_labels) if is_cascade else 0
        try:
            architecture = configuration.configuration["architecture"]
            return self.model.execute(self._step(architecture, configuration.patch_size, configuration.batch_size))
        finally:
            self._previous_stage_channels = 0

    def _plan_cascade(self, configurations: dict[str, Any]) -> None:
        """Give the cascade its own patch, batch size and network if those of 3d_fullres don't fit with its channels.

        The previous stage adds a channel for every foreground label. Inheritance is a shallow update, so all three
        entries are written together.
        """
        cascade = configurations.get("3d_cascade_fullres")
        if cascade is None:
            return
        fullres = configurations["3d_fullres"]
        self._previous_stage_channels = len(self._labels.foreground_labels)
        try:
            if self._fits(fullres["architecture"], fullres["patch_size"], fullres["batch_size"]):
                return
            median_shape = fullres["median_image_size_in_voxels"]
            voxels = float(np.prod(median_shape, dtype=np.float64) * self.dataset_json["numTraining"])
            own = self.get_plans_for_configuration(
                fullres["spacing"], median_shape, fullres["data_identifier"], voxels, {}
            )
        finally:
            self._previous_stage_channels = 0
        cascade.update({entry: own[entry] for entry in ("batch_size", "patch_size", "architecture")})

    # --- plans ------------------------------------------------------------------------------------------------------

    def plan_experiment(self) -> dict[str, Any]:
        """Plan the data set and write the plans.

        If the data set has CT images and an ignore label, the fingerprint is corrected first, unless it already was.

        Returns:
            The plans.

        Raises:
            InputError: The data set can't be planned for this network and memory; nothing was written.
        """
        changed = exclude_ignored_voxels(
            Path(self.raw_dataset_folder), self.plans_file.parent, self.dataset_json, progress=self.progress
        )
        if changed is not None:
            print(changed, file=sys.stderr)
            self.dataset_fingerprint = json.loads((self.plans_file.parent / FINGERPRINT).read_text(encoding="utf-8"))
        title = f"Planning {self.dataset_name}: training steps executed"
        with tqdm(desc=title, unit="step", disable=not self.progress) as self._bar:
            while True:
                try:
                    return super().plan_experiment()
                except _PlanAgain:
                    continue

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Complete nnU-Net's plans and write them; called at the end of ``plan_experiment``.

        Configurations in an existing file that no planner made are kept.

        Raises:
            InputError: If the images are 2D, or existing data of these plans were preprocessed differently.
        """
        configurations = plans["configurations"]
        if "3d_fullres" not in configurations:
            raise InputError(
                f"The images of {self.dataset_name} are single slices, and {self.family.title} is a 3D network. Plan "
                f"them with nnUNetv2_plan_experiment for nnU-Net's own network."
            )
        self._plan_cascade(configurations)
        plans["nnunet_conres"] = {"version": __version__}
        recursive_fix_for_json_export(plans)
        completed = json.loads(json.dumps(plans))
        plans.clear()
        plans.update(completed)
        self._check_training_steps(plans)

        with one_at_a_time(self.plans_file):  # otherwise configurations added meanwhile would be lost
            self._write_plans(plans)

    def _write_plans(self, plans: dict[str, Any]) -> None:
        existing = read_plans(self.plans_file.parent)
        planners = [planner.__name__ for planner in PLANNERS.values()]
        share_data(plans, existing, planners, self.plans_file.parent)
        errors = list(settings_errors(plans, existing, self.plans_file.parent))
        if errors:
            raise InputError(errors)
        for name, configuration in existing.get(self.plans_identifier, {}).get("configurations", {}).items():
            if name not in CONFIGURATIONS:
                plans["configurations"][name] = configuration
        write_json(self.plans_file, plans)

    @property
    def plans_file(self) -> Path:
        """Path of the plans file."""
        return required_folder(PREPROCESSED) / self.dataset_name / f"{self.plans_identifier}.json"

    def planned_configurations(self) -> Iterator[PlannedConfiguration]:
        """Yield a summary of each planned configuration; call after ``plan_experiment``."""
        plans = PlansManager(deepcopy(self.plans))
        for name in (name for name in CONFIGURATIONS if name in plans.available_configurations):
            configuration = plans.get_configuration(name)
            checkpointing = memory = None
            if len(configuration.patch_size) == 3:
                checkpointing = configuration.network_arch_init_kwargs["checkpointing"]
                memory = self._execute(configuration)
            yield PlannedConfiguration(
                name,
                tuple(configuration.patch_size),
                configuration.batch_size,
                configuration.data_identifier,
                checkpointing,
                memory,
            )


def _planner(family: Family) -> type[NetworkPlanner]:
    attributes = {"__module__": __name__, "__doc__": f"Plans for {family.title}.", "family": family}
    return type(family.planner_name, (NetworkPlanner,), attributes)


PLANNERS: Final = {key: _planner(family) for key, family in PLANNED.items()}
"""The planner of each family, by the family's name on the command line."""


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
