"""BraTS cases as files of an nnU-Net data set."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nnunet_conres.datasets.brats_find import Case
from nnunet_conres.datasets.brats_schemes import CHANNELS, SCHEMES, LabelSet, Mode, to_nnunet_labels
from nnunet_conres.datasets.raw import link_or_copy
from nnunet_conres.errors import file_errors
from nnunet_conres.files import write_json
from nnunet_conres.images.nifti import Nifti, compress, is_compressed, read_header, read_nifti, write_nifti

ImageMode = Literal["link", "copy"]
Transfer = Literal["linked", "copied", "compressed", "split"]
TRANSFERS: tuple[Transfer, ...] = ("linked", "copied", "compressed", "split")

CASES_FILE = "cases.json"
"""Beside dataset.json: what is known of each case that nnU-Net has no place for."""


class Job(NamedTuple):
    """A case to be written, the data set's folder, and how images get there."""

    case: Case
    dataset: Path
    image_mode: ImageMode


def case_files(case: Case) -> list[str]:
    """The files of a case in a data set: the images of all channels, and the labels where it has any."""
    part = "Tr" if case.trains else "Ts"
    files = [f"images{part}/{case.case_id}_{index:04d}.nii.gz" for index in range(len(CHANNELS))]
    return files if case.labels is None else [*files, f"labels{part}/{case.case_id}.nii.gz"]


def write_case(job: Job) -> list[Transfer]:
    """Write a case's images and labels.

    Returns:
        How each image came about.
    """
    case, dataset, mode = job
    files = [dataset / file for file in case_files(case)]
    targets = files[: len(CHANNELS)]
    transfers: list[Transfer]
    if len(case.images) == 1:
        transfers = _split_channels(read_nifti(case.images[0]), targets)
    else:
        transfers = [_transfer(source, target, mode) for source, target in zip(case.images, targets, strict=True)]
    if case.labels is not None:
        labels = to_nnunet_labels(read_nifti(case.labels).labels(), case.scheme)
        # The image's geometry, equal within tolerance: nnU-Net's own check is stricter than the last bit of a float32.
        write_nifti(files[-1], labels, read_header(case.images[0]))
    return transfers


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
    """Write dataset.json, and what is known of each case beside it."""
    from nnunet_conres import __version__

    content: dict[str, Any] = {
        "name": name,
        "description": f"BraTS, labels of {label_set.name}"
        + (", as regions that lie within each other" if mode == "regions" else ""),
        "channel_names": {str(index): channel for index, channel in enumerate(CHANNELS)},
        **label_set.dataset_json(mode),
        "numTraining": sum(case.trains for case in cases),
        "file_ending": ".nii.gz",
        "converted_by": f"nnunet-conres {__version__}",
        "brats_schemes": [name for name in SCHEMES if any(case.scheme == name for case in cases)],
    }
    write_json(dataset / "dataset.json", content)
    known = {}
    for case in cases:
        about = {"scheme": case.scheme, "source": str(case.images[0].parent)}
        known[case.case_id] = about if case.grade is None else {"grade": case.grade, **about}
    write_json(dataset / CASES_FILE, known)
