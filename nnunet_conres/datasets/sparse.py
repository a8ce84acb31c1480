"""Sparse annotation: make a data set in which only some slices keep their labels.

Source: Çiçek et al., 3D U-Net, MICCAI 2016, which trains on volumes with few annotated slices. They annotate single
slices. Here slices are annotated in slabs of neighbours, because an inter-slice residual needs two annotated slices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.datasets.fingerprint import carry_fingerprint
from nnunet_conres.datasets.raw import (
    TrainingCase,
    find_dataset,
    find_training_cases,
    folder_name,
    id_errors,
    link_or_copy,
    lock_of_dataset,
    look_at_case,
    read_dataset_json,
    target_errors,
)
from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.files import write_json
from nnunet_conres.folders import check_complete, list_files, new_folder
from nnunet_conres.images.volumes import read_labels, reader_for, write_labels
from nnunet_conres.nnunet import PREPROCESSED, folder_from_environment
from nnunet_conres.parallel import map_cases
from nnunet_conres.text import first_few, short_message

Axis = Literal["slice", 0, 1, 2]

SIDECAR: Final = "sparse_annotation.json"
"""File in the new data set's folder that lists the annotated slices."""

IGNORE: Final = "ignore"
"""Name of the ignore label in dataset.json, the label of voxels that are not annotated."""

DEFAULT_SLAB: Final = 2


@dataclass(frozen=True)
class SlabRule:
    """Rule that selects the annotated slices of a case. Exactly one of `every`, `slices` and `fraction` is given.

    The selection depends only on the rule, the case id and the number of slices. It does not depend on other cases or
    on their order.

    Attributes:
        every: Annotate one slab in every N slices; more than `slab`. The first slab has a random position per case.
        slices: Annotate exactly N slices per case, or all slices of a case with N or fewer; `slab` or more. They form
            slices // slab slabs. If there is a remainder, the first slabs are one slice thicker.
        fraction: Approximate fraction of a case's slices, above 0 and below 1, rounded to whole slabs, at least one.
        slab: Number of neighbouring slices that are annotated together, 1 or more.
        seed: Seed of the random positions, 0 or more.
    """

    every: int | None = None
    slices: int | None = None
    fraction: float | None = None
    slab: int = DEFAULT_SLAB
    seed: int = 0

    def errors(self) -> Iterator[str]:
        """Yield a message for every error in the rule itself, independent of the cases."""
        given = [name for name in ("every", "slices", "fraction") if getattr(self, name) is not None]
        if len(given) != 1:
            yield f"{', '.join(given) or 'None'} given; expected exactly one of every, slices and fraction."
        if self.slab < 1:
            yield f"The slab is {self.slab} slices; expected 1 or more."
        if self.seed < 0:
            yield f"The seed is {self.seed}; expected 0 or more."
        if self.every is not None and self.every <= max(1, self.slab):
            yield (
                f"One slab of {self.slab} in every {self.every} slices annotates all slices; expected more than "
                f"{max(1, self.slab)} for every, or a thinner slab."
            )
        if self.slices is not None and self.slices < max(1, self.slab):
            yield (
                f"{self.slices} slices per case are fewer than a slab of {self.slab}; expected {max(1, self.slab)} or "
                f"more, or a thinner slab."
            )
        if self.fraction is not None and not 0 < self.fraction < 1:
            yield f"The fraction is {self.fraction:g}; expected above 0 and below 1."

    def annotated_slices(self, case_id: str, depth: int) -> tuple[int, ...]:
        """Return the annotated slices of a case.

        Args:
            case_id: The case's id.
            depth: Number of its slices, 1 or more.

        Returns:
            Slice indices in ascending order: at least one slab, or all slices if the case has no more than one slab.

        Raises:
            ValueError: The rule is not valid.
        """
        errors = list(self.errors())
        if errors:
            raise ValueError(" ".join(errors))
        if depth <= self.slab:
            return tuple(range(depth))
        if self.every is not None:
            # Whole slabs only. Gaps between slabs have every - slab slices; the gaps before the first and after the
            # last slab have fewer than every.
            first = self._draw(case_id, 0, min(self.every, depth - self.slab + 1))
            starts = range(first, depth - self.slab + 1, self.every)
            return tuple(start + offset for start in starts for offset in range(self.slab))
        if self.slices is not None:
            total = min(self.slices, depth)
            slabs = total // self.slab
        else:
            assert self.fraction is not None
            slabs = int(np.clip(np.floor(self.fraction * depth / self.slab + 0.5), 1, depth // self.slab))
            total = slabs * self.slab
        return tuple(self._spread(case_id, depth, total, slabs))

    def _spread(self, case_id: str, depth: int, total: int, slabs: int) -> Iterator[int]:
        """Yield the slices of `slabs` slabs, each at a random position in its share of the unannotated slices."""
        places = depth - total + 1
        before = 0
        for number in range(slabs):
            low, high = number * places // slabs, (number + 1) * places // slabs
            # Draw from the middle half of the share, so that the gaps have similar sizes.
            margin = (high - low) // 4
            start = before + low + margin + self._draw(case_id, number, max(1, high - low - 2 * margin))
            thickness = total // slabs + (number < total % slabs)
            yield from range(start, start + thickness)
            before += thickness

    def _draw(self, case_id: str, number: int, below: int) -> int:
        # A hash instead of a random generator gives the same result with every version of Python and NumPy.
        digest = hashlib.sha256(f"{self.seed}/{number}/{case_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % below


@dataclass(frozen=True)
class Sparsification:
    """Result of `sparsify`.

    Attributes:
        dataset_folder: The new folder in nnUNet_raw.
        axis: Slice axis in arrays returned by nnU-Net's reader.
        axis_reason: Why this axis was chosen.
        annotated: Annotated slices per case.
        depths: Total number of slices per case.
        ignore_label: Label value of voxels outside the annotated slices.
        transfers: Number of files linked and copied.
        warnings: Warnings for the user about problems that nnU-Net does not report.
    """

    dataset_folder: Path
    axis: int
    axis_reason: str
    annotated: Mapping[str, tuple[int, ...]]
    depths: Mapping[str, int]
    ignore_label: int
    transfers: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def sparsify(
    source: int | str,
    target_id: int,
    rule: SlabRule,
    *,
    target_name: str | None = None,
    axis: Axis = "slice",
    processes: int = 1,
    progress: bool = True,
) -> Sparsification:
    """Make a data set whose training cases are annotated on some slices only; all other voxels have the ignore label.

    Images, imagesTs and labelsTs are taken from the source, as hard links where the file system allows them. All input
    is checked before anything is written, and the data set gets its final name only when it is complete. If the source
    has a fingerprint in nnUNet_preprocessed, the new data set reuses it: a fingerprint computed by nnU-Net would
    include the intensities of unannotated voxels.

    Args:
        source: Id or name of a data set in nnUNet_raw without ignore label.
        target_id: nnU-Net's id for the new data set, 1 to 999.
        rule: Selects the slices that keep their labels.
        target_name: Name of the new data set after the id; by default the source's name with Sparse appended.
        axis: Slice axis in arrays returned by nnU-Net's reader (z, y, x for SimpleITK's and nibabel's readers).
            "slice" is the axis that nnU-Net's planner moves to the front: the axis with the largest median spacing, the
            first one if several are equal.
        processes: Number of processes, 1 or more.
        progress: Whether to show progress bars on stderr.

    Returns:
        Description of the new data set.

    Raises:
        InputError: The source, the target or an argument is invalid. Lists all errors.
    """
    source_folder = find_dataset(source)
    raw = source_folder.parent
    if target_name is None:
        target_name = source_folder.name.split("_", 1)[-1] + "Sparse"
    errors = [*id_errors(target_id, target_name), *rule.errors()]
    errors += target_errors(raw, target_id, target_name, option="-o", may_have_been_used=False)
    if axis not in ("slice", 0, 1, 2):
        errors.append(f"The axis is {axis!r}; expected slice, 0, 1 or 2.")
    if processes < 1:
        errors.append(f"The number of processes is {processes}; expected 1 or more.")

    dataset_json, found = read_dataset_json(source_folder)
    errors += found
    if dataset_json is None:
        raise InputError(errors)
    allowed, found = _labels_of(source_folder, dataset_json)
    errors += found
    cases, found = find_training_cases(source_folder, dataset_json)
    errors += found
    # Check the files even if arguments are invalid, so that one run reports all errors.
    reader: type | None = None
    if cases:
        try:
            reader = reader_for(dataset_json, [case.images[0] for case in cases])
        except InputError as error:
            errors += error.errors
    jobs = [(case, reader, allowed) for case in cases if reader is not None and allowed]
    looks = list(map_cases(look_at_case, jobs, max(1, processes), "Checking", progress))
    errors += [message for look in looks for message in look.errors]
    if errors or reader is None:
        raise InputError(errors)

    spacings = [look.spacing for look in looks]
    chosen = slice_axis(spacings) if axis == "slice" else int(axis)
    depths = {look.case_id: look.shape[chosen] for look in looks}
    annotated = {case_id: rule.annotated_slices(case_id, depth) for case_id, depth in depths.items()}
    dense = [case_id for case_id, slices in annotated.items() if len(slices) == depths[case_id]]
    if len(dense) == len(cases):
        raise InputError([_nothing_left_out(chosen, depths)])

    ignore_label, ending = max(allowed) + 1, str(dataset_json["file_ending"])
    target = raw / folder_name(target_id, target_name)
    transfers: dict[str, int] = {"linked": 0, "copied": 0}
    with new_folder(target, lock=lock_of_dataset(raw, target_id)) as partial:
        # Check again: another process may have created the data set while the files were checked.
        errors = list(target_errors(raw, target_id, target_name, option="-o", may_have_been_used=False, if_busy=False))
        if errors:
            raise InputError(errors)
        with file_errors(partial):
            for folder in ("imagesTr", "labelsTr"):
                (partial / folder).mkdir()
        writes = [
            _Write(case, reader, ending, partial, chosen, annotated[case.case_id], ignore_label) for case in cases
        ]
        without_foreground = []
        for case, written in zip(cases, map_cases(_write_case, writes, processes, "Writing", progress), strict=True):
            for transfer in written.transfers:
                transfers[transfer] += 1
            if written.lost_foreground:
                without_foreground.append(case.case_id)
        for transfer in _transfer_test_cases(source_folder, partial):
            transfers[transfer] += 1
        content = _sparse_dataset_json(dataset_json, target.name, ignore_label, len(cases))
        sidecar = _sidecar(source_folder.name, rule, axis, chosen, ignore_label, annotated, depths)
        with file_errors(partial):
            write_json(partial / "dataset.json", content)
            write_json(partial / SIDECAR, sidecar)
        check_complete(partial, (file for case in cases for file in _files(case, ending)))
    preprocessed = folder_from_environment(PREPROCESSED)
    if preprocessed is not None:
        carry_fingerprint(preprocessed / source_folder.name, preprocessed / target.name)
    median = ", ".join(f"{value:g}" for value in np.median(spacings, axis=0))
    return Sparsification(
        dataset_folder=target,
        axis=chosen,
        axis_reason=f"the first with the largest median spacing ({median} mm)" if axis == "slice" else "as requested",
        annotated=annotated,
        depths=depths,
        ignore_label=ignore_label,
        transfers=transfers,
        warnings=tuple(_warnings(rule, chosen == slice_axis(spacings), dense, without_foreground, len(cases))),
    )


def slice_axis(spacings: Sequence[Sequence[float]]) -> int:
    """Return the axis that nnU-Net's planner moves to the front.

    Args:
        spacings: Voxel size along the three axes of each case, mm.

    Returns:
        Axis with the largest median spacing; the first one if several are equal.
    """
    # As in ExperimentPlanner.determine_transpose. For very anisotropic data the planner lowers the largest spacing, but
    # not below the others, so the axis is the same.
    return int(np.argmax(np.percentile(np.asarray(spacings, dtype=np.float64), 50, axis=0)))


def _labels_of(dataset_folder: Path, dataset_json: Mapping[str, Any]) -> tuple[tuple[int, ...], list[str]]:
    """Return the label values of a data set without ignore label, and a message for every error."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    path = dataset_folder / "dataset.json"
    if dataset_json["labels"].get(IGNORE) is not None:
        return (), [
            f"{path} has the label {IGNORE!r}: the data set is already sparsely annotated. Expected a densely labelled "
            f"data set."
        ]
    try:
        manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        return (), [f"{path} does not define its labels as nnU-Net requires: {short_message(error)}."]
    labels = tuple(int(label) for label in manager.all_labels)
    if labels != tuple(range(len(labels))):
        return (), [f"{path} has the labels {', '.join(map(str, labels))}; nnU-Net requires 0, 1, 2, ... without gaps."]
    return labels, []


@dataclass(frozen=True)
class _Write:
    """Arguments of `_write_case`."""

    case: TrainingCase
    reader: type
    file_ending: str
    dataset_folder: Path
    axis: int
    annotated: tuple[int, ...]
    ignore_label: int


@dataclass(frozen=True)
class _Written:
    transfers: tuple[str, ...]
    lost_foreground: bool


def _files(case: TrainingCase, ending: str) -> list[str]:
    """Return the relative paths of a case's images and labels in the new data set."""
    images = [f"imagesTr/{case.case_id}_{channel:04d}{ending}" for channel in range(len(case.images))]
    return [*images, f"labelsTr/{case.case_id}{ending}"]


def _write_case(write: _Write) -> _Written:
    case, ending = write.case, write.file_ending
    *images, target = (write.dataset_folder / file for file in _files(case, ending))
    transfers = [link_or_copy(source, image) for source, image in zip(case.images, images, strict=True)]
    # nnU-Net stores the spacing of TIFF images in a JSON file next to them.
    first = case.images[0].name
    spacing_file = case.images[0].with_name(first[: -(len(ending) + len("_0000"))] + ".json")
    if spacing_file.is_file():
        link_or_copy(spacing_file, write.dataset_folder / "imagesTr" / f"{case.case_id}.json")

    labels = read_labels(case.labels, write.reader)
    dense = labels.voxels.astype(np.uint16)
    sparse = keep_slices(dense, write.axis, write.annotated, write.ignore_label)
    write_labels(target, sparse, labels.properties, write.reader)
    kept = np.take(dense, write.annotated, axis=write.axis)
    return _Written(tuple(transfers), bool(dense.any() and not kept.any()))


def keep_slices(labels: NDArray[Any], axis: int, annotated: Sequence[int], ignore_label: int) -> NDArray[Any]:
    """Return a label map in which all slices but the annotated ones have the ignore label.

    Args:
        labels: Label map with three axes.
        axis: Axis of the slices, 0 to 2.
        annotated: Indices of the slices that keep their labels.
        ignore_label: Value of all other voxels.

    Returns:
        A new array of the same shape and type.
    """
    sparse = np.full_like(labels, ignore_label)
    index = [slice(None)] * 3
    for position in annotated:
        index[axis] = slice(position, position + 1)
        sparse[tuple(index)] = labels[tuple(index)]
    return sparse


def _transfer_test_cases(source: Path, target: Path) -> Iterator[str]:
    for name in ("imagesTs", "labelsTs"):
        if not (source / name).is_dir():
            continue
        (target / name).mkdir()
        for path in list_files(source / name):
            yield link_or_copy(path, target / name / path.name)


def _nothing_left_out(axis: int, depths: Mapping[str, int]) -> str:
    deepest = max(depths.values())
    if deepest == 1:
        return f"All cases have a single slice along axis {axis}: the images are 2D. Choose another --axis."
    return (
        f"All slices of all cases would keep their labels: no case has more than {deepest} slices along axis {axis}. "
        f"Choose fewer slices."
    )


def _warnings(
    rule: SlabRule, along_slice_axis: bool, dense: Sequence[str], without_foreground: Sequence[str], cases: int
) -> Iterator[str]:
    if rule.slab == 1 and along_slice_axis:
        yield (
            "Slabs of a single slice: ConResNet's residual loss needs two annotated neighbours and is undefined on "
            "this data set. It is fine for the other networks; for ConResNet use --slab 2 or more."
        )
    if dense:
        yield f"{len(dense)} of {cases} cases have too few slices and keep all their labels: {first_few(dense)}."
    if without_foreground:
        yield (
            f"{len(without_foreground)} of {cases} cases have foreground, but none on their annotated slices: "
            f"{first_few(without_foreground)}."
        )


def _sparse_dataset_json(dataset_json: Mapping[str, Any], name: str, ignore_label: int, cases: int) -> dict[str, Any]:
    # Drop the source's list of files: nnU-Net finds the new files by name.
    content = {key: value for key, value in dataset_json.items() if key != "dataset"}
    content["labels"] = {key: value for key, value in content["labels"].items() if key != IGNORE}
    content["labels"][IGNORE] = ignore_label
    content["numTraining"] = cases
    if "name" in content:
        content["name"] = name
    return content


def _sidecar(
    source: str,
    rule: SlabRule,
    axis: Axis,
    chosen: int,
    ignore_label: int,
    annotated: Mapping[str, tuple[int, ...]],
    depths: Mapping[str, int],
) -> dict[str, Any]:
    from nnunet_conres import __version__

    return {
        "source": source,
        "written_by": f"nnunet-conres {__version__}",
        "arguments": asdict(rule) | {"axis": axis},
        "axis": chosen,
        "ignore_label": ignore_label,
        "cases": {
            case_id: {"slices": depths[case_id], "annotated": list(slices)} for case_id, slices in annotated.items()
        },
    }
