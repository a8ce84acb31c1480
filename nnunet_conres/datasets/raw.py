"""nnU-Net's raw data sets: folders, ids that are taken, and the files of each case."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nnunet_conres.case_ids import unsafe_ids
from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.folders import being_written, list_files, visible
from nnunet_conres.images.volumes import check_image, read_labels, read_volume
from nnunet_conres.nnunet import FOLDER_VARIABLES, RAW, dataset_name_of, folder_from_environment, required_folder
from nnunet_conres.text import number_text


@dataclass(frozen=True)
class TrainingCase:
    """The files of one training case.

    Attributes:
        case_id: nnU-Net's id of the case.
        images: One file per channel, in order.
        labels: The label file.
    """

    case_id: str
    images: tuple[Path, ...]
    labels: Path


# --- folders and ids ------------------------------------------------------------------------------------------------


def folder_name(dataset_id: int, dataset_name: str) -> str:
    """Return the folder name of a data set from its id and the name after the id."""
    return f"Dataset{dataset_id:03d}_{dataset_name}"


def id_errors(dataset_id: int, dataset_name: str) -> Iterator[str]:
    """Yield a message for every error in the id and the name of a new data set."""
    if not 1 <= dataset_id <= 999:
        yield f"The data set id is {dataset_id}; expected 1 to 999 (nnU-Net's own are below 500)."
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", dataset_name):
        yield f"The data set name is {dataset_name!r}; expected letters, digits, - and _ only."


def target_errors(
    raw: Path,
    dataset_id: int,
    dataset_name: str,
    *,
    option: str = "-d",
    may_have_been_used: bool = True,
    if_busy: bool = True,
) -> Iterator[str]:
    """Yield a message for everything that prevents the creation of a data set.

    Args:
        raw: nnU-Net's raw folder.
        dataset_id: Id of the new data set.
        dataset_name: Name of the new data set after the id.
        option: The command-line option that sets the id, for messages.
        may_have_been_used: Whether to allow preprocessed data and results of a data set with the same id and name, as
            when the same data are converted again.
        if_busy: Whether to report that another process is creating the data set.
    """
    target = folder_name(dataset_id, dataset_name)
    if not raw.exists():
        yield f"nnUNet_raw is {raw}, which does not exist. Correct the variable, or make the folder: mkdir -p {raw}"
    elif not raw.is_dir() or not os.access(raw, os.W_OK):
        yield f"nnUNet_raw is {raw}; expected a folder that can be written to."
    elif if_busy:
        yield from being_written(raw / target, lock_of_dataset(raw, dataset_id))
    if (raw / target).exists():
        yield f"{raw / target} exists already; remove it, or choose another {option}."
    # nnU-Net finds data sets by id and stops if two names share an id, also among preprocessed data and results.
    others = [folder for name in FOLDER_VARIABLES[1:] if (folder := folder_from_environment(name)) is not None]
    for folder in (raw, *others):
        for taken in visible(folder) if folder.is_dir() else ():
            if not taken.name.startswith(f"Dataset{dataset_id:03d}_") or not taken.is_dir():
                continue
            if taken.name != target:
                yield f"Data set id {dataset_id} is taken by {taken}; choose another {option}."
            elif folder != raw and not may_have_been_used:
                yield f"{taken} belongs to an earlier data set of that name; remove it, or choose another {option}."


def lock_of_dataset(raw: Path, dataset_id: int) -> Path:
    """Return the lock file for the creation of a data set. Data sets with the same id share it."""
    return raw / f".Dataset{dataset_id:03d}.lock"


def find_dataset(dataset: int | str) -> Path:
    """Return the folder of a raw data set.

    Args:
        dataset: Id or full name of the data set, as in nnU-Net's commands.

    Returns:
        The folder in nnUNet_raw. It contains a dataset.json.

    Raises:
        InputError: There is no such data set, or more than one.
    """
    raw = required_folder(RAW)
    name = dataset_name_of(dataset)
    if not (raw / name).is_dir():
        raise InputError([f"{raw / name} does not exist; expected a raw data set there."])
    if not (raw / name / "dataset.json").is_file():
        raise InputError([f"{raw / name / 'dataset.json'} is missing; expected an nnU-Net data set in {raw / name}."])
    return raw / name


# --- files of a data set --------------------------------------------------------------------------------------------


def find_training_cases(dataset_folder: Path, dataset_json: Mapping[str, Any]) -> tuple[list[TrainingCase], list[str]]:
    """Find the training cases as nnU-Net does: as listed in dataset.json, or by file name in imagesTr and labelsTr.

    Args:
        dataset_folder: Folder of the raw data set.
        dataset_json: Content of its dataset.json.

    Returns:
        The complete cases sorted by id, and a message for every error.
    """
    ending = str(dataset_json["file_ending"])
    if "dataset" in dataset_json:
        return _listed_cases(dataset_folder, dataset_json, ending)

    errors: list[str] = []
    images: dict[str, dict[int, Path]] = defaultdict(dict)
    labels: dict[str, Path] = {}
    for folder in (dataset_folder / "imagesTr", dataset_folder / "labelsTr"):
        if not folder.is_dir():
            errors.append(f"{folder} does not exist; expected the training cases there.")
            continue
        for path in list_files(folder, ending):
            stem = path.name[: -len(ending)]
            if folder.name == "labelsTr":
                labels[stem] = path
                continue
            match = re.fullmatch(r"(.+)_(\d{4})", stem)
            if match is None:
                errors.append(f"{path} is not named as nnU-Net expects; expected CASE_0000{ending} and so on.")
            else:
                images[match[1]][int(match[2])] = path

    errors += unsafe_ids(sorted({*images, *labels}), dataset_folder)
    channels = sorted({channel for files in images.values() for channel in files})
    cases = []
    for case_id in sorted({*images, *labels}):
        missing = [
            dataset_folder / "imagesTr" / f"{case_id}_{channel:04d}{ending}"
            for channel in (channels or [0])
            if channel not in images.get(case_id, {})
        ]
        if case_id not in labels:
            missing.append(dataset_folder / "labelsTr" / f"{case_id}{ending}")
        errors += [f"{path} is missing; case {case_id} needs it." for path in missing]
        if not missing:
            cases.append(
                TrainingCase(case_id, tuple(images[case_id][channel] for channel in channels), labels[case_id])
            )
    if not cases and not errors:
        errors.append(f"{dataset_folder / 'imagesTr'} has no file that ends in {ending}; expected training cases.")
    return cases, errors


def _listed_cases(
    dataset_folder: Path, dataset_json: Mapping[str, Any], ending: str
) -> tuple[list[TrainingCase], list[str]]:
    from copy import deepcopy

    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    try:
        # nnU-Net resolves the paths in place.
        listed = get_filenames_of_train_images_and_targets(str(dataset_folder), deepcopy(dict(dataset_json)))
    except (AttributeError, KeyError, TypeError):
        return [], [
            f"{dataset_folder / 'dataset.json'} has a 'dataset' that does not list cases; expected each id, with "
            f"its 'images' and its 'label'."
        ]
    errors = unsafe_ids(sorted(listed), dataset_folder / "dataset.json")
    cases = []
    for case_id, files in sorted(listed.items()):
        paths = [Path(path) for path in (*files["images"], files["label"])]
        found = [f"{path} is missing; case {case_id} of dataset.json needs it." for path in paths if not path.is_file()]
        found += [
            f"{path} does not end in {ending}, the file_ending of dataset.json."
            for path in paths
            if not path.name.endswith(ending)
        ]
        errors += found
        if not found:
            cases.append(TrainingCase(case_id, tuple(paths[:-1]), paths[-1]))
    if not listed:
        errors.append(f"{dataset_folder / 'dataset.json'} lists no case under 'dataset'.")
    return cases, errors


def read_dataset_json(dataset_folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Read a raw data set's dataset.json. Return its content, None if it is invalid, and a message for every error."""
    path = dataset_folder / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return None, [f"{path} cannot be read: {error}"]
    missing = [key for key in ("labels", "file_ending") if not isinstance(content, dict) or key not in content]
    if missing:
        return None, [f"{path} has no {' and no '.join(missing)}; expected the dataset.json of an nnU-Net data set."]
    if not isinstance(content["labels"], dict):
        return None, [f"{path} has labels {content['labels']!r}; expected their names, each with its value."]
    ending = content["file_ending"]
    # File names are built from it.
    if not isinstance(ending, str) or not re.fullmatch(r"(\.[A-Za-z0-9_-]+)+", ending):
        return None, [f"{path} has the file_ending {ending!r}; expected one such as .nii.gz."]
    return content, []


@dataclass(frozen=True)
class CaseLook:
    """Shape, spacing and errors of a case's files.

    Attributes:
        case_id: Id of the case.
        shape: Number of voxels along the three axes.
        spacing: Voxel size of the images along these axes, mm. nnU-Net's planner uses the spacing of the images.
        errors: A message for every error. Shape and spacing are zero if the files cannot be read.
    """

    case_id: str
    shape: tuple[int, ...] = (0, 0, 0)
    spacing: tuple[float, ...] = (0.0, 0.0, 0.0)
    errors: tuple[str, ...] = ()


def look_at_case(job: tuple[TrainingCase, type, Sequence[int]]) -> CaseLook:
    """Read a case's images and labels, and check the labels' values and shape.

    Args:
        job: The case, nnU-Net's reader for it, and the allowed label values.

    Returns:
        Shape, spacing and errors.
    """
    case, reader, allowed = job
    try:
        image = [read_volume(path, reader) for path in case.images][-1]
        labels = read_labels(case.labels, reader, allowed)
    except InputError as error:
        return CaseLook(case.case_id, errors=error.errors)
    shape = tuple(image.voxels.shape[1:])
    errors = []
    if labels.voxels.shape != shape:
        errors.append(f"{case.labels} has shape {labels.voxels.shape}; expected {shape} like its image.")
    return CaseLook(case.case_id, shape, image.spacing, tuple(errors))


def errors_in_files(job: tuple[TrainingCase, type]) -> tuple[str, ...]:
    """Return a message for every file of a case that nnU-Net can't train on or would misread.

    Args:
        job: The case, and nnU-Net's reader for it.
    """
    case, reader = job
    errors: list[str] = []
    for path in case.images:
        try:
            check_image(path, reader)
        except InputError as error:
            errors += error.errors
    try:
        inexact = read_labels(case.labels, reader).inexact
    except InputError as error:
        errors += error.errors
    else:
        if inexact is not None:
            errors.append(f"{case.labels} has labels that {inexact_labels(reader, inexact)}")
    return tuple(errors)


def inexact_labels(reader: type, value: float) -> str:
    """Return the end of a message about labels that nnU-Net reads as values slightly off an integer.

    Args:
        reader: nnU-Net's reader.
        value: One of these values.
    """
    return (
        f"nnU-Net's {reader.__name__} reads as fractions such as {number_text(value)}; its training truncates them. "
        f"Write the labels as integers, without a scale factor."
    )


def link_or_copy(source: Path, target: Path) -> Literal["linked", "copied"]:
    """Make a hard link if the file system allows it, else a copy.

    Returns:
        "linked" or "copied".
    """
    import shutil

    try:
        # Resolve first: a hard link to a symbolic link would be another symbolic link.
        os.link(source.resolve(), target)
    except OSError:
        # Another drive, a file system without links, or another owner's file.
        with file_errors(target):
            shutil.copyfile(source, target)
        return "copied"
    return "linked"
