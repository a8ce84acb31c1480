"""Export nnU-Net's predictions with the labels, file names and geometry that BraTS challenges expect."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_conres.case_ids import unsafe_ids
from nnunet_conres.datasets.brats_find import image_of, names_image, nifti_files
from nnunet_conres.datasets.brats_scheme_files import LabelSet, Layout, Mode, Scheme
from nnunet_conres.datasets.brats_schemes import AUTO, SCHEMES, Selection, labels_outside, map_labels, select_schemes
from nnunet_conres.errors import InputError
from nnunet_conres.folders import being_written, check_complete, new_folder, visible
from nnunet_conres.images.content import DamagedFileError
from nnunet_conres.images.nifti import (
    grid_difference,
    is_nifti,
    read_grid,
    read_header,
    read_nifti,
    stem,
    write_nifti,
)
from nnunet_conres.parallel import map_cases
from nnunet_conres.text import first_few, number_text


class ExportError(InputError):
    """The predictions or the target do not allow an export; nothing was written."""


@dataclass(frozen=True)
class Export:
    """Result of `export_brats`.

    Attributes:
        folder: The new folder.
        case_ids: Ids of the cases, one file each.
        cleaned: Number of enhancing tumour voxels that were replaced, by case.
        warnings: Warnings for the user.
    """

    folder: Path
    case_ids: tuple[str, ...]
    cleaned: Mapping[str, int]
    warnings: tuple[str, ...] = ()


class Prediction(NamedTuple):
    """A predicted label map to check or export.

    Attributes:
        path: File of the prediction.
        table: Maps nnU-Net's labels to the challenge's labels, where the challenge has one.
        known: Tissue of each of nnU-Net's labels.
        scheme: Scheme of the challenge.
        reference: An image of the same case, or None.
        et_min_voxels: Enhancing tumour with fewer voxels is replaced.
        output: The file to write, or None to check only.
    """

    path: Path
    table: Mapping[int, int]
    known: Mapping[int, str]
    scheme: Scheme
    reference: Path | None
    et_min_voxels: int
    output: Path | None


class Result(NamedTuple):
    """Errors of a prediction, and the number of voxels of enhancing tumour that were replaced."""

    errors: tuple[str, ...]
    cleaned: int


def export_brats(
    predictions_folder: str | Path,
    output_folder: str | Path,
    scheme: str,
    *,
    dataset_json: str | Path | None = None,
    reference_folder: str | Path | None = None,
    et_min_voxels: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> Export:
    """Write nnU-Net's predictions with a challenge's labels, one file CASE.nii.gz each.

    Args:
        predictions_folder: Label maps as nnU-Net writes them, CASE.nii.gz.
        output_folder: Must not exist, or be empty. Gets its files only when all are complete.
        scheme: The challenge: a scheme's name, or a TOML file that describes one.
        dataset_json: dataset.json of the data set that the model was trained on; by default the one that nnU-Net writes
            into the folder with predictions.
        reference_folder: Folder to search, with subfolders, for the cases' images, named as in BraTS or nnU-Net. Size
            and geometry of a prediction must match its image; the exported file gets the geometry of the image header.
        et_min_voxels: In cases with fewer enhancing tumour voxels than this, they are replaced by necrosis (paediatric
            cases of 2024: by non-enhancing tumour). So few voxels are mostly false positives, and a challenge scores a
            case without enhancing tumour as 0 if any is predicted. 0 replaces nothing.
        processes: Number of processes, 1 or more.
        progress: Whether to show progress bars on stderr.

    Returns:
        Description of the exported files.

    Raises:
        ExportError: The predictions do not fit the data set or the scheme, or the target is taken. Lists all errors.
    """
    # Resolve the output: if it is a link to an empty folder, replace the folder and keep the link.
    folder, output = Path(predictions_folder), Path(output_folder).resolve()
    challenge, selection, errors = one_scheme(scheme)
    errors += _argument_errors(challenge, et_min_voxels, processes)
    errors += being_written(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        errors.append(f"{output} exists already and is not an empty folder; remove it, or choose another -o.")
    paths = [path for path in visible(folder) if is_nifti(path)] if folder.is_dir() else []
    if not folder.is_dir():
        errors.append(f"{folder} is not a folder; expected a folder with predictions.")
    elif not paths:
        errors.append(f"{folder} has no NIfTI file; expected predictions named CASE.nii.gz.")
    errors += _name_errors(folder, paths, challenge, selection)
    tissues, found = read_tissues(folder / "dataset.json" if dataset_json is None else Path(dataset_json), challenge)
    errors += found
    references, found, warnings = _references(reference_folder, [stem(path) for path in paths], selection.layouts)
    errors += found
    if challenge is None or not tissues:
        raise ExportError(errors)

    # The data set may have labels whose tissue the challenge lacks, as long as no prediction contains them.
    values = {tissue: value for value, tissue in challenge.labels.items()}
    table = {0: 0, **{label: values[tissue] for label, tissue in tissues.items() if tissue in values}}
    missing = [tissue for tissue in values if tissue not in tissues.values()]
    if missing:
        warnings.append(f"The data set has no label for {' or '.join(missing)}, which {challenge.title} requires.")
    unnamed = [stem(path) for path in paths if not challenge.may_be(stem(path))]
    if unnamed:
        warnings.append(f"{first_few(unnamed)}: not named as the cases of {challenge.called}.")
    jobs = [
        Prediction(path, table, tissues, challenge, references.get(stem(path)), et_min_voxels, None) for path in paths
    ]
    checked = list(map_cases(export_case, jobs, max(1, processes), "Checking", progress))
    errors += [error for result in checked for error in result.errors]
    if errors:
        raise ExportError(errors)

    with new_folder(output) as partial:
        jobs = [job._replace(output=partial / f"{stem(job.path)}.nii.gz") for job in jobs]
        results = list(map_cases(export_case, jobs, processes, "Writing", progress))
        check_complete(partial, [job.output.name for job in jobs if job.output is not None])
    cleaned = {stem(job.path): result.cleaned for job, result in zip(jobs, results, strict=True) if result.cleaned}
    return Export(output, tuple(stem(path) for path in paths), cleaned, tuple(warnings))


def export_case(job: Prediction) -> Result:
    """Check a prediction, and write it if the job has an output file.

    Returns:
        Errors, and the number of enhancing tumour voxels that were replaced. Nothing is written if there are errors.
    """
    try:
        file = read_nifti(job.path)
        grid = read_grid(job.path, file.header)
    except InputError as error:
        advice = " Predict the case again." if isinstance(error, DamagedFileError) else ""
        return Result((f"{error}{advice}",), 0)
    not_finite = file.not_finite()
    if not_finite:
        return Result((f"{job.path} has {not_finite} voxels that are NaN or infinite; expected labels.",), 0)
    labels = file.labels()
    errors = []
    if labels.ndim != 3 or labels.dtype.kind not in "iuf":
        return Result((f"{job.path} has {labels.ndim} dimensions; expected one three-dimensional label map.",), 0)
    strange = labels_outside(labels, job.table)
    if strange:
        errors.append(_label_error(job, strange))
    header = file.header
    if job.reference is not None:
        try:
            header = read_header(job.reference)
            difference = grid_difference(read_grid(job.reference, header), grid)
        except InputError as error:
            return Result((*errors, str(error)), 0)
        if difference:
            errors.append(f"{job.path} and {job.reference} do not lie on the same voxel grid: {difference}.")
    if errors or job.output is None:
        return Result(tuple(errors), 0)

    exported = map_labels(labels, job.table)
    cleaned = 0
    if job.et_min_voxels:
        values = {tissue: value for value, tissue in job.scheme.labels.items()}
        enhancing = exported == values["enhancing"]
        count = int(np.count_nonzero(enhancing))
        if 0 < count < job.et_min_voxels:
            exported[enhancing] = values[job.scheme.less_enhancing]
            cleaned = count
    write_nifti(job.output, exported, header)
    return Result((), cleaned)


def _label_error(job: Prediction, strange: Mapping[float, int]) -> str:
    scheme = job.scheme
    tissues = {float(label): tissue for label, tissue in job.known.items()}
    found = ", ".join(
        f"{number_text(value)}{f' {tissues[value]}' if value in tissues else ''} ({count} voxels)"
        for value, count in list(strange.items())[:5]
    )
    if strange.keys() <= tissues.keys():
        return (
            f"{job.path} has labels {found}, but {scheme.called} has only {scheme.known_labels}. Choose the --scheme "
            f"whose tissues the model was trained on."
        )
    expected = ", ".join(f"{label} {tissue}" for label, tissue in job.known.items())
    return (
        f"{job.path} has labels {found}; the data set has 0 background, {expected}. Expected nnU-Net's own prediction: "
        f"is this an image, or a file that already has the challenge's labels?"
    )


def one_scheme(name: str) -> tuple[Scheme | None, Selection, list[str]]:
    """Return the challenge's scheme, None if there is none of this name; the selection of schemes; and errors."""
    selection, errors = select_schemes([name])
    if selection.auto:
        errors = [f"The scheme is {AUTO}; expected one of {', '.join(SCHEMES)}, or a TOML file that describes another."]
    return (None if errors else selection.allowed[0]), selection, errors


def _argument_errors(scheme: Scheme | None, et_min_voxels: int, processes: int) -> Iterator[str]:
    if et_min_voxels < 0:
        yield f"--et-min-voxels is {et_min_voxels}; expected 0 or more."
    elif et_min_voxels and scheme is not None and not scheme.less_enhancing:
        yield (
            f"--et-min-voxels is {et_min_voxels}, but {scheme.called} does not define a replacement of small enhancing "
            f"tumour (less_enhancing). Remove the option."
        )
    if processes < 1:
        yield f"The number of processes is {processes}; expected 1 or more."


def _name_errors(folder: Path, paths: Sequence[Path], scheme: Scheme | None, selection: Selection) -> Iterator[str]:
    """Yield errors about files that are not one case's prediction, or are named as cases of another challenge."""
    ids = [stem(path) for path in paths]
    yield from unsafe_ids(ids, folder)
    doubled = sorted(case_id for case_id, times in Counter(ids).items() if times > 1)
    if doubled:
        yield f"{first_few(doubled)}: more than one file; keep one of each."
    # nnU-Net's image names, CASE_0000.nii.gz, are no error here: ids may end like this, and images are found by their
    # values.
    images = [path.name for path in paths if names_image(path, selection.layouts)]
    if images:
        yield f"{first_few(images)}: named as BraTS names images; expected predictions named CASE.nii.gz."
    if scheme is None:
        return
    others = {case_id: [] if scheme.may_be(case_id) else _owners(case_id) for case_id in ids}
    foreign = [case_id for case_id in ids if others[case_id]]
    if foreign:
        hints = sorted({name for case_id in foreign for name in others[case_id]})
        yield (
            f"{first_few(foreign)}: not named as the cases of {scheme.called}, but as those of --scheme "
            f"{' or '.join(hints)}."
        )


def _owners(case_id: str) -> list[str]:
    """Return the names of the schemes that a case id may belong to."""
    return [name for name, scheme in SCHEMES.items() if scheme.may_be(case_id)]


def read_tissues(path: Path, scheme: Scheme | None) -> tuple[dict[int, str], list[str]]:
    """Return the tissue of each label of a data set, and a message for every error.

    Args:
        path: The data set's dataset.json.
        scheme: The challenge's scheme. Its label set is tried first: a scheme from a TOML file may have a label set
            that none of this package's schemes has.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, [
            f"{path} cannot be read: {error}. nnU-Net puts the data set's dataset.json beside its predictions; name "
            f"another with -djfile."
        ]
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, dict):
        return {}, [f"{path} has no labels; expected the dataset.json of an nnU-Net data set."]
    known = ([] if scheme is None else [scheme]) + list(SCHEMES.values())
    for label_set in (one.label_set for one in known):
        modes: tuple[Mode, ...] = ("regions", "labels")
        for mode in modes:
            if _same_labels(content, label_set, mode):
                return {label: tissue for tissue, label in label_set.tissues.items()}, []
    return {}, [
        f"{path} has labels {labels} in the order {content.get('regions_class_order')}: not those of brats-convert, so "
        f"their tissues are unknown. Expected those of one of the schemes {', '.join(SCHEMES)}. If a file describes "
        f"the scheme, pass it with --scheme."
    ]


def _same_labels(content: Mapping[str, Any], label_set: LabelSet, mode: Mode) -> bool:
    """Return whether a dataset.json has the labels of a label set, also in the spelling of nnU-Net's own scripts."""
    expected = label_set.dataset_json(mode)
    return _normalised(content["labels"]) == _normalised(expected["labels"]) and list(
        content.get("regions_class_order") or []
    ) == expected.get("regions_class_order", [])


def _normalised(labels: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    return [
        (str(name).lower().replace(" ", "_"), sorted(value) if isinstance(value, list) else [value])
        for name, value in labels.items()
    ]


def _references(
    folder: str | Path | None, case_ids: Sequence[str], layouts: Sequence[Layout]
) -> tuple[dict[str, Path], list[str], list[str]]:
    """Return an image of each case, errors, and warnings."""
    if folder is None:
        return {}, [], []
    if not Path(folder).is_dir():
        return {}, [f"{folder} is not a folder; expected the cases' images there."], []
    images: dict[str, Path] = {}
    for path in nifti_files(Path(folder)):
        case_id = image_of(path, layouts)
        if case_id is not None:
            images.setdefault(case_id, path)
    missing = [case_id for case_id in case_ids if case_id not in images]
    predicted = set(case_ids)
    errors = [f"{first_few(missing)}: no image in {folder} to compare the prediction with."] if missing else []
    unpredicted = sorted(case_id for case_id in images if case_id not in predicted)
    warnings = [f"{first_few(unpredicted)}: in {folder}, but not predicted."] if unpredicted else []
    return images, errors, warnings
