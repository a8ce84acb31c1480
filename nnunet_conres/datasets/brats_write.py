"""Write BraTS cases as files of an nnU-Net data set."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from nnunet_conres.datasets.brats_find import Case
from nnunet_conres.datasets.brats_scheme_files import LabelSet, Mode
from nnunet_conres.datasets.brats_schemes import to_nnunet_labels
from nnunet_conres.datasets.raw import link_or_copy
from nnunet_conres.errors import file_errors
from nnunet_conres.files import write_json
from nnunet_conres.images.nifti import Nifti, compress, is_compressed, read_header, read_nifti, write_nifti

ImageMode = Literal["link", "copy"]
Transfer = Literal["linked", "copied", "compressed", "split"]
TRANSFERS: tuple[Transfer, ...] = ("linked", "copied", "compressed", "split")

SCHEMES_ENTRY: Final = "brats_schemes"
"""Entry of dataset.json with the names of the cases' schemes."""

MISSING_ENTRY: Final = "missing_channels"
"""Entry of dataset.json with the channels that are zero images in some training cases; absent if there are none."""

CASES_FILE = "cases.json"
"""File next to dataset.json with facts about each case that nnU-Net does not store, such as the grade."""


class Job(NamedTuple):
    """A case to write, the data set's folder, and whether to link or copy images."""

    case: Case
    dataset: Path
    image_mode: ImageMode


def case_files(case: Case) -> list[str]:
    """Return the relative paths of a case in a data set: the images of all channels, and the labels if it has any."""
    part = "Tr" if case.trains else "Ts"
    files = [f"images{part}/{case.case_id}_{index:04d}.nii.gz" for index in range(len(case.scheme.layout.channels))]
    return files if case.labels is None else [*files, f"labels{part}/{case.case_id}.nii.gz"]


def write_case(job: Job) -> list[Transfer]:
    """Write a case's images and labels.

    Returns:
        How each image was transferred, without zero images.
    """
    case, dataset, mode = job
    targets = [dataset / file for file in case_files(case)]
    labels_target = targets.pop() if case.labels is not None else None
    transfers: list[Transfer] = []
    for source, content in zip(case.images, case.scheme.layout.images, strict=True):
        own, targets = targets[: len(content)], targets[len(content) :]
        if source is None:
            _write_zeros(own, case.first_image)
        elif len(content) > 1:
            transfers += _split_channels(read_nifti(source), own)
        else:
            transfers.append(_transfer(source, own[0], mode))
    if case.labels is not None and labels_target is not None:
        labels = to_nnunet_labels(read_nifti(case.labels).labels(), case.scheme)
        # Use the image's geometry. The geometry of the label file is equal within our tolerance, but nnU-Net's own
        # check is stricter than the precision of float32.
        write_nifti(labels_target, labels, read_header(case.first_image))
    return transfers


def _write_zeros(targets: Sequence[Path], like: Path) -> None:
    """Write zero images on the grid of another image."""
    header = read_header(like)
    for target in targets:
        write_nifti(target, np.zeros(header.get_data_shape()[:3], np.uint8), header)


def _split_channels(image: Nifti, targets: Sequence[Path]) -> list[Transfer]:
    voxels = image.values()
    for index, target in enumerate(targets):
        write_nifti(target, voxels[..., index], image.header)
    return ["split"] * len(targets)


def _transfer(source: Path, target: Path, mode: ImageMode) -> Transfer:
    if not is_compressed(source):
        compress(source, target)
        return "compressed"
    if mode == "link":
        return link_or_copy(source, target)
    with file_errors(target):
        shutil.copyfile(source, target)
    return "copied"


def write_descriptions(dataset: Path, name: str, cases: Sequence[Case], label_set: LabelSet, mode: Mode) -> None:
    """Write dataset.json, and cases.json with facts about each case."""
    from nnunet_conres import __version__

    schemes = list(dict.fromkeys(case.scheme for case in cases))
    channels = cases[0].scheme.layout.channels
    absent = {channel for case in cases if case.trains for channel in case.missing}
    content: dict[str, Any] = {
        "name": name,
        "description": "; ".join(scheme.title for scheme in schemes)
        + (". Regions that lie within each other" if mode == "regions" else ""),
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        **label_set.dataset_json(mode),
        "numTraining": sum(case.trains for case in cases),
        "file_ending": ".nii.gz",
        "converted_by": f"nnunet-conres {__version__}",
        SCHEMES_ENTRY: [scheme.name for scheme in schemes],
    }
    if absent:
        content[MISSING_ENTRY] = [channel for channel in channels if channel in absent]
    write_json(dataset / "dataset.json", content)
    known = {}
    for case in cases:
        about = {
            "grade": case.grade,
            "scheme": case.scheme.name,
            "source": str(case.first_image.parent),
            "patient": "" if case.patient == case.case_id else case.patient,
            "missing": list(case.missing),
            "corrected": list(case.corrected),
        }
        known[case.case_id] = {key: value for key, value in about.items() if value}
    write_json(dataset / CASES_FILE, known)
