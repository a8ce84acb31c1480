"""Report of `nnunet-conres memory`: the parts of a training step's memory, and the largest patches that fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_conres.datasets.raw import find_dataset, read_dataset_json
from nnunet_conres.errors import InputError
from nnunet_conres.families import find_trainer
from nnunet_conres.nnunet import PREPROCESSED, required_folder
from nnunet_conres.planning.memory import MemoryEstimate, MemoryModel, augmentation_memory, estimate_memory
from nnunet_conres.planning.training_step import TrainingStep
from nnunet_conres.plans.entries import stride_products
from nnunet_conres.preprocessing.dataset import read_plans
from nnunet_conres.text import did_you_mean, format_shape

GIB: Final = 2**30
_LARGEST_EDGE = 1024
_SMALL = 0.01  # parts with a smaller share are merged into one row


@dataclass(frozen=True)
class MemoryReport:
    """Memory of a training step.

    Attributes:
        title: Data set, plans, configuration, trainer and network.
        step: The training step.
        estimate: Its memory.
        largest: For each budget in GiB, the largest patch of about the same proportions that fits; None if none fits.
    """

    title: str
    step: TrainingStep
    estimate: MemoryEstimate
    largest: Mapping[float, tuple[int, ...] | None]

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON content, memory in bytes."""
        return {
            "title": self.title,
            "patch_size": list(self.step.patch_size),
            "batch_size": self.step.batch_size,
            "device": self.step.device,
            "mixed_precision": self.step.mixed_precision,
            **dataclasses.asdict(self.estimate),
            "total": self.estimate.total,
            "largest_patch": {
                f"{budget:g}": None if patch is None else list(patch) for budget, patch in self.largest.items()
            },
        }

    def as_text(self) -> str:
        """Return the report as readable text."""
        step, estimate = self.step, self.estimate
        precision = f"mixed precision on {step.device}" if step.mixed_precision else "float32"
        parts = [
            ("parameters", estimate.parameters),
            ("gradients", estimate.gradients),
            ("optimiser", estimate.optimizer),
            ("batch", estimate.batch),
            *estimate.activations.items(),
            ("loss", estimate.loss),
        ]
        augmentation = augmentation_memory(step)
        limit = _SMALL * sum(size for _, size in parts)
        small = [size for _, size in parts if size < limit]
        parts = [(name, size) for name, size in parts if size >= limit] + [(f"{len(small)} smaller parts", sum(small))]
        lines = [self.title, f"patch {format_shape(step.patch_size)}, batch {step.batch_size}, {precision}", ""]
        lines.append("Permanent, or kept for backward:")
        lines += [_line(name, nbytes) for name, nbytes in parts]
        lines += ["", "At the peak, with temporary tensors of backward:"]
        lines += [
            _line("peak", estimate.peak),
            _line("workspace, allocator" + (", CUDA context" if step.device == "cuda" else ""), estimate.workspace),
            *([_line("  of it augmentation", augmentation)] if augmentation else []),
            _line("total", estimate.total),
        ]
        if self.largest:
            lines += ["", f"Largest patch of about these proportions at batch {step.batch_size}:"]
            for budget, patch in self.largest.items():
                lines.append(f"  {budget:5g} GiB  " + ("none" if patch is None else format_shape(patch)))
        return "\n".join(lines)


def report_memory(
    dataset: int | str,
    plans_name: str,
    configuration: str,
    trainer_name: str = "nnUNetTrainer",
    *,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    device: str = "cuda",
    mixed_precision: bool = True,
    budgets: Sequence[float] = (),
) -> MemoryReport:
    """Estimate the memory of training a configuration.

    Args:
        dataset: Number or name of a data set.
        plans_name: Name of plans in its preprocessed folder.
        configuration: A configuration of the plans.
        trainer_name: Any trainer that nnU-Net finds.
        patch_size: Patch in voxels; None for the plans'.
        batch_size: Batch size; None for the plans'.
        device: "cuda" or "cpu".
        mixed_precision: Whether to train under autocast.
        budgets: Memory in GiB; the largest patch is found for each.

    Raises:
        InputError: There is no such data set, plans, configuration or trainer; the trainer can't train that
            configuration; or a number is out of range.
    """
    for budget in budgets:
        if not (math.isfinite(budget) and budget > 0):
            raise InputError(f"A budget is {budget:g} GiB; expected numbers above 0.")
    trainer = find_trainer(trainer_name)
    plans, dataset_json = _plans_and_dataset(dataset, plans_name)
    manager = PlansManager(plans)
    if configuration not in manager.available_configurations:
        raise InputError(
            f"{plans_name} has no configuration {configuration}, only {', '.join(manager.available_configurations)}."
        )
    resolved = manager.get_configuration(configuration)
    if patch_size is not None and len(patch_size) != len(resolved.patch_size):
        raise InputError(
            f"The patch has {len(patch_size)} numbers; expected {len(resolved.patch_size)}, as in {configuration}."
        )
    entries: dict[str, Any] = dict(resolved.configuration)
    if hasattr(trainer, "resolve"):  # a trainer of this package, which may change the plans' entries
        entries |= trainer.resolve(resolved, configuration)
    step = TrainingStep(
        trainer=trainer,
        architecture=entries["architecture"],
        patch_size=[int(extent) for extent in (entries["patch_size"] if patch_size is None else patch_size)],
        batch_size=int(entries["batch_size"] if batch_size is None else batch_size),
        input_channels=determine_num_input_channels(manager, resolved, dataset_json),
        labels=manager.get_label_manager(dataset_json),
        device=device,
        mixed_precision=mixed_precision,
    )
    network = str(step.architecture["network_class_name"]).rpartition(".")[2]
    model = MemoryModel()
    return MemoryReport(
        title=f"{plans['dataset_name']}, {plans_name} {configuration}, {trainer_name}: {network}",
        step=step,
        estimate=estimate_memory(step),
        largest={budget: largest_patch(step, round(budget * GIB), model) for budget in budgets},
    )


def largest_patch(step: TrainingStep, budget: int, model: MemoryModel) -> tuple[int, ...] | None:
    """Return the largest patch of about the same proportions whose training step fits, with the same network.

    Args:
        step: A training step.
        budget: Memory limit in bytes.
        model: Memory model of training steps.

    Returns:
        Patch in voxels, each axis a multiple of the product of the network's strides; None if not even the smallest
        patch fits.
    """
    divisors = stride_products(step.architecture, len(step.patch_size)) or [1] * len(step.patch_size)
    # the coarsest feature map keeps at least 4 voxels per axis, as in nnU-Net, or its present size if that is smaller
    least = [max(d, min(4 * d, extent // d * d)) for extent, d in zip(step.patch_size, divisors, strict=True)]

    def scaled(scale: float) -> tuple[int, ...]:
        # 1e-9 against rounding errors: a scale computed from an extent must give that extent
        extents = [int(extent * scale / d + 1e-9) * d for extent, d in zip(step.patch_size, divisors, strict=True)]
        return tuple(max(extent, smallest) for extent, smallest in zip(extents, least, strict=True))

    # all scales at which an axis reaches the next multiple of its divisor
    scales = sorted(
        {
            multiple * divisor / extent
            for extent, divisor in zip(step.patch_size, divisors, strict=True)
            for multiple in range(1, _LARGEST_EDGE // divisor + 1)
        }
    )
    scales = [scale for scale in scales if max(scaled(scale)) <= _LARGEST_EDGE]

    def fits(scale: float) -> bool:
        return model.total(dataclasses.replace(step, patch_size=scaled(scale))) <= budget

    if not scales or not fits(scales[0]):
        return None
    fitting, too_large = 0, len(scales)
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        if fits(scales[middle]):
            fitting = middle
        else:
            too_large = middle
    return scaled(scales[fitting])


def _plans_and_dataset(dataset: int | str, plans_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    preprocessed = required_folder(PREPROCESSED)
    try:
        raw = find_dataset(dataset)
    except InputError as error:  # its text says that nothing was written, but this command never writes
        raise InputError(" ".join(error.errors)) from error
    found = read_plans(preprocessed / raw.name)
    if plans_name not in found:
        raise InputError(
            f"There are no plans {plans_name} in {preprocessed / raw.name}{did_you_mean(plans_name, found)} There are "
            f"{', '.join(found) or 'none'}. Make them with nnunet-conres plan or nnUNetv2_plan_experiment."
        )
    dataset_json, errors = read_dataset_json(raw)
    if dataset_json is None:
        raise InputError(" ".join(errors))
    return found[plans_name], dataset_json


def _line(name: str, nbytes: int) -> str:
    return f"  {name:38s} {nbytes / 2**20:10.1f} MiB"
