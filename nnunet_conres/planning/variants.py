"""Additional configurations in plans with other patches: same preprocessed data, a topology for each patch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_conres.errors import InputError
from nnunet_conres.families import FAMILIES, PLANNED
from nnunet_conres.files import write_json
from nnunet_conres.folders import one_at_a_time
from nnunet_conres.nnunet import PREPROCESSED, device_option, folder_from_environment, not_set
from nnunet_conres.planning.planners import MIN_EDGE
from nnunet_conres.plans.entries import fixed_stages, stride_products
from nnunet_conres.text import aligned, format_shape

# Values of nnU-Net's planners. An axis is halved until it is shorter than twice _MIN_EDGE. Features are doubled up to
# _MAX_FEATURES, by number of axes. The numbers of blocks and convolutions per stage are arguments of its default and
# its residual encoder planner.
_MIN_EDGE: Final = 4
_MAX_FEATURES: Final[Mapping[int, int]] = {2: 512, 3: 320}
_PER_STAGE: Final = ("n_conv_per_stage", "n_blocks_per_stage")
_PER_DECODER_STAGE: Final = ("n_conv_per_stage_decoder",)
# A patch this many times longer than the images is taken for a typing error.
_LONGEST: Final = 4
_KNOWN_SEQUENCES: Final = ((1, 3, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6),)


@dataclass(frozen=True)
class Variant:
    """A configuration that was added.

    Attributes:
        name: Name of the configuration.
        patch_size: Patch in voxels.
        wanted: The requested patch; ``patch_size`` differs if the network needs multiples.
        batch_size: Patches per step.
        strides: Strides of every stage.
        features: Features of every stage.
        wider_than_images: Axes on which the patch is longer than the median image, so that images are padded.
        was_there: Whether the plans already had it.
    """

    name: str
    patch_size: tuple[int, ...]
    wanted: tuple[int, ...]
    batch_size: int
    strides: tuple[tuple[int, ...], ...]
    features: tuple[int, ...]
    wider_than_images: tuple[int, ...]
    was_there: bool


@dataclass(frozen=True)
class AddedVariants:
    """Configurations that were added to plans.

    Attributes:
        dataset_name: Name of the data set.
        plans_name: Name of the plans.
        plans_file: Path of the plans file.
        base: The configuration that the variants inherit from.
        base_strides: Strides of every stage of the base.
        data_identifier: Folder of the preprocessed data, which all share.
        variants: The new configurations.
        trainer_name: A trainer for these plans.
    """

    dataset_name: str
    plans_name: str
    plans_file: Path
    base: str
    base_strides: tuple[tuple[int, ...], ...]
    data_identifier: str
    variants: tuple[Variant, ...]
    trainer_name: str

    def as_text(self) -> str:
        """Return a readable summary."""
        lines = [
            f"{self.plans_file}",
            f"Configurations that inherit from {self.base} and share its preprocessed data, {self.data_identifier}. "
            "The topology is derived for each patch: another patch can change the stages and strides of the network, "
            "not only the crop.",
        ]
        rows = [("configuration", "patch", "batch", "stages", "strides", "features")]
        for variant in self.variants:
            rows.append(
                (
                    variant.name,
                    format_shape(variant.patch_size),
                    str(variant.batch_size),
                    str(len(variant.strides)),
                    " ".join("".join(map(str, stride)) for stride in variant.strides),
                    " ".join(map(str, variant.features)),
                )
            )
        lines += [f"  {line}" for line in aligned(rows)]
        for variant in self.variants:
            if variant.patch_size != variant.wanted:
                lines.append(
                    f"{variant.name}: {format_shape(variant.wanted)} was rounded up to what the network's strides need."
                )
            if variant.strides != self.base_strides:
                lines.append(f"{variant.name}: another topology than that of {self.base}.")
            if variant.wider_than_images:
                axes = ", ".join(map(str, variant.wider_than_images))
                lines.append(f"{variant.name}: longer than the median image on axis {axes}, where images are padded.")
            if variant.was_there:
                lines.append(f"{variant.name}: existed already, unchanged.")
        number = int(self.dataset_name[7:10])
        plans = "" if self.plans_name == "nnUNetPlans" else f" -p {self.plans_name}"
        options = f"-tr {self.trainer_name}{plans}{device_option()}"
        lines += [f"Next: nnUNetv2_train {number} {variant.name} 0 {options}" for variant in self.variants]
        return "\n".join(lines)


def add_variants(
    dataset_name: str,
    plans_name: str,
    patch_sizes: Sequence[Sequence[int]],
    *,
    base: str = "3d_fullres",
    batch_sizes: Sequence[int] | None = None,
) -> AddedVariants:
    """Add configurations with other patches to plans; they need no new preprocessing.

    Args:
        dataset_name: Full name of the data set.
        plans_name: Name of the plans, stock or of this package.
        patch_sizes: Patches in voxels, in nnU-Net's axis order.
        base: Configuration to inherit spacing, normalisation and data from.
        batch_sizes: One for all or one for each patch; None for the base's.

    Returns:
        The added configurations.

    Raises:
        InputError: The plans or an argument do not allow it; nothing was written. Lists all errors.
    """
    preprocessed = folder_from_environment(PREPROCESSED)
    with contextlib.ExitStack() as stack:
        # Locked from reading to writing: otherwise a second process could overwrite the additions of the first.
        if preprocessed is not None and (preprocessed / dataset_name).is_dir():
            stack.enter_context(one_at_a_time(preprocessed / dataset_name / f"{plans_name}.json"))
        return _add_variants(dataset_name, plans_name, patch_sizes, base, batch_sizes)


def _add_variants(
    dataset_name: str,
    plans_name: str,
    patch_sizes: Sequence[Sequence[int]],
    base: str,
    batch_sizes: Sequence[int] | None,
) -> AddedVariants:
    plans_file, plans, errors = _read(dataset_name, plans_name, base)
    if plans is None:
        raise InputError(errors)
    configuration = PlansManager(deepcopy(plans)).get_configuration(base)
    base_patch = [int(extent) for extent in configuration.patch_size]
    batches = [configuration.batch_size] if batch_sizes is None else list(batch_sizes)
    if len(batches) not in (1, len(patch_sizes)):
        errors.append(
            f"{len(batches)} batch sizes for {len(patch_sizes)} patches; expected one for all or one for each."
        )
    errors += [f"The batch size is {batch}; expected 1 or more." for batch in batches if batch < 1]

    variants: list[Variant] = []
    entries: dict[str, dict[str, Any]] = {}
    for number, wanted in enumerate(patch_sizes):
        if len(wanted) != len(base_patch) or any(extent < 1 for extent in wanted):
            errors.append(
                f"The patch is {format_shape(wanted)}; expected {len(base_patch)} numbers above 0, as {base} has."
            )
            continue
        batch = batches[number] if number < len(batches) else batches[0]
        median = configuration.configuration.get("median_image_size_in_voxels", base_patch)
        largest = [_LONGEST * max(size, own) for size, own in zip(median, base_patch, strict=True)]
        if any(extent > limit for extent, limit in zip(wanted, largest, strict=True)):
            sizes = format_shape([round(size) for size in median])
            errors.append(f"Patch {format_shape(wanted)} is far beyond the images, whose median is {sizes} voxels.")
            continue
        try:
            architecture, patch = derive_architecture(
                configuration.configuration["architecture"], configuration.spacing, wanted
            )
        except InputError as error:
            errors.append(f"Patch {format_shape(wanted)}: {error}")
            continue
        if min(patch) < MIN_EDGE:
            errors.append(
                f"Patch {format_shape(patch)} is too small: expected {MIN_EDGE} voxels or more along each axis, "
                f"below which nnU-Net's augmentation fails."
            )
            continue
        name = f"{base}_{'x'.join(map(str, patch))}" + (f"_b{batch}" if batch != configuration.batch_size else "")
        entry: dict[str, Any] = {
            "inherits_from": base,
            "patch_size": list(patch),
            "batch_size": int(batch),
            "architecture": architecture,
        }
        if configuration.next_stage_names is not None:
            entry["next_stage"] = None  # the cascade continues from the base only
        existing = plans["configurations"].get(name)
        if existing is not None and existing != entry:
            errors.append(f"{plans_file} has another configuration {name} already; remove it there, or rename it.")
        if name in entries:
            errors.append(f"Patch {format_shape(patch)} at batch {batch} is given twice.")
        entries[name] = entry
        if list(patch) == base_patch and batch == configuration.batch_size:
            errors.append(f"Patch {format_shape(patch)} at batch {batch} is the same as {base}.")
        variants.append(
            Variant(
                name,
                patch,
                tuple(wanted),
                int(batch),
                tuple(map(tuple, architecture["arch_kwargs"]["strides"])),
                tuple(architecture["arch_kwargs"]["features_per_stage"]),
                tuple(axis for axis, (extent, size) in enumerate(zip(patch, median, strict=True)) if extent > size),
                existing is not None,
            )
        )
    if errors:
        raise InputError(errors)
    plans["configurations"] |= entries
    write_json(plans_file, plans)
    strides = configuration.configuration["architecture"]["arch_kwargs"]["strides"]
    planner = plans.get("experiment_planner_used")
    family = next((planned for planned in PLANNED.values() if planned.planner_name == planner), FAMILIES[0])
    return AddedVariants(
        dataset_name,
        plans_name,
        plans_file,
        base,
        tuple(map(tuple, strides)),
        configuration.data_identifier,
        tuple(variants),
        family.trainer_name,
    )


def derive_architecture(
    architecture: Mapping[str, Any], spacing: Sequence[float], patch_size: Sequence[int]
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Derive the ``architecture`` entry of plans for another patch by nnU-Net's rules.

    Args:
        architecture: The entry of a configuration; its network, norm and first features are kept.
        spacing: Voxel size in mm.
        patch_size: Patch in voxels.

    Returns:
        The entry, and the patch rounded up to the multiples that the strides need.

    Raises:
        InputError: The patch does not fit a network with a fixed topology, the patch is too small, or the entry lacks
            arguments.
    """
    derived = deepcopy(dict(architecture))
    arguments = derived["arch_kwargs"]
    if fixed_stages(derived["network_class_name"]) is not None:
        divisors = stride_products(derived, len(patch_size)) or []
        if any(extent % divisor for extent, divisor in zip(patch_size, divisors, strict=True)):
            network = derived["network_class_name"].rpartition(".")[2]
            raise InputError(f"{network}'s topology is fixed; expected multiples of {' x '.join(map(str, divisors))}.")
        return derived, tuple(int(extent) for extent in patch_size)
    missing = [key for key in ("features_per_stage", "strides", "kernel_sizes", "n_stages") if key not in arguments]
    if missing:
        raise InputError(f"{derived['network_class_name']} has no {', '.join(missing)}; its topology can't be derived.")
    _, strides, kernel_sizes, patch, _ = get_pool_and_conv_props(spacing, list(patch_size), _MIN_EDGE, 999999)
    n_stages = len(strides)
    if n_stages < 2:
        raise InputError(f"too small: expected an axis of {3 * _MIN_EDGE} voxels or more, to be halved once at least.")
    features = [int(number) for number in arguments["features_per_stage"]]
    doubled = [features[0] * 2**stage for stage in range(n_stages)]
    limit = max(features) if max(features) < features[0] * 2 ** (len(features) - 1) else _MAX_FEATURES[len(patch)]
    arguments |= {
        "n_stages": n_stages,
        "features_per_stage": [min(number, max(limit, features[0])) for number in doubled],
        "kernel_sizes": json.loads(json.dumps(kernel_sizes)),
        "strides": json.loads(json.dumps(strides)),
    }
    for keys, length in ((_PER_STAGE, n_stages), (_PER_DECODER_STAGE, n_stages - 1)):
        for key in keys:
            if isinstance(arguments.get(key), (list, tuple)):
                arguments[key] = _of_length(arguments[key], length)
    return derived, tuple(int(extent) for extent in patch)


def _of_length(values: Sequence[int], length: int) -> list[int]:
    """Adapt values per stage to another number of stages: cut them off, or continue them as the planners do."""
    known = next((sequence for sequence in _KNOWN_SEQUENCES if tuple(values) == sequence[: len(values)]), ())
    longer = list(values) + list(known[len(values) :])
    return (longer + [longer[-1]] * max(0, length - len(longer)))[:length]


def _read(dataset_name: str, plans_name: str, base: str) -> tuple[Path, dict[str, Any] | None, list[str]]:
    preprocessed = folder_from_environment(PREPROCESSED)
    if preprocessed is None:
        return Path(), None, [not_set(PREPROCESSED)]
    path = preprocessed / dataset_name / f"{plans_name}.json"
    try:
        plans = json.loads(path.read_text(encoding="utf-8"))
        configurations = list(plans["configurations"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return path, None, [f"{path} can't be read as nnU-Net's plans ({error}). Plan the data set first."]
    if base not in configurations:
        return path, None, [f"{path} has no configuration {base}; it has {', '.join(configurations)}."]
    return path, plans, []
