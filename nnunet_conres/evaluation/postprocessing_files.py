"""Post-processing of label map files: of a folder, or of the models of a comparison."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from nnunet_conres.case_ids import unsafe_ids
from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.evaluation.finding import CompareOptions, Found
from nnunet_conres.evaluation.postprocessing import Postprocessing, check_labels, load_postprocessing
from nnunet_conres.evaluation.predictions import Contender, Prediction
from nnunet_conres.evaluation.probabilities import read_probabilities
from nnunet_conres.files import read_json
from nnunet_conres.folders import being_written, check_complete, clear_leftovers, list_files, new_folder
from nnunet_conres.images.volumes import read_labels, reader_for, write_labels
from nnunet_conres.parallel import map_all_cases

# Files that are copied to the output folder, because later commands need them next to the predictions.
_KEPT: Final = ("dataset.json", "plans.json")


@dataclass(frozen=True)
class Applied:
    """Result of `apply_to_folder`.

    Attributes:
        folder: The new folder.
        changed: Number of changed voxels, by case.
    """

    folder: Path
    changed: dict[str, int]


@dataclass(frozen=True)
class _Job:
    """A label map to post-process."""

    prediction: Prediction
    probabilities: Path
    output: Path
    postprocessing: Postprocessing
    reader: type


def apply_to_folder(
    predictions: str | Path,
    output: str | Path,
    postprocessing_file: str | Path,
    *,
    processes: int = 1,
    progress: bool = True,
) -> Applied:
    """Post-process the label maps of a folder.

    Args:
        predictions: Output folder of nnUNetv2_predict, with probabilities if the post-processing sets thresholds.
        output: Must not exist, or be empty. It appears only when all files are complete.
        postprocessing_file: Output of `fit_postprocessing`.
        processes: Number of cases processed in parallel.
        progress: Whether to show a progress bar on stderr.

    Raises:
        InputError: Files are missing, can't be read or do not match. Lists all errors.
    """
    folder, target = Path(predictions), Path(output).resolve()
    postprocessing = load_postprocessing(postprocessing_file)
    dataset_json = read_json(Path(postprocessing_file))["dataset_json"]
    errors = list(being_written(target))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        errors.append(f"{target} exists already and is not an empty folder; remove it, or choose another -o.")
    file_ending = str(dataset_json["file_ending"])
    paths = list_files(folder, file_ending) if folder.is_dir() else []
    if not paths:
        errors.append(f"{folder} has no file that ends in {file_ending}; expected predictions of nnU-Net.")
    errors += unsafe_ids([path.name.removesuffix(file_ending) for path in paths], folder)
    if paths and not (folder / "dataset.json").is_file():
        errors.append(
            f"{folder} has no dataset.json, so the meaning of its labels is unknown. nnU-Net writes the data set's "
            f"dataset.json beside its predictions; copy it there."
        )
    elif paths:
        try:
            check_labels(postprocessing, read_json(folder / "dataset.json"), folder / "dataset.json")
        except InputError as error:
            errors += error.errors
    found = [Prediction(path.name.removesuffix(file_ending), path) for path in paths]
    errors += _missing_probabilities(postprocessing, found, file_ending)
    if errors:
        raise InputError(errors)
    reader = reader_for(dataset_json, paths)
    with new_folder(target) as partial:
        jobs = [
            _Job(one, one.probabilities(file_ending), partial / one.labels.name, postprocessing, reader)
            for one in found
        ]
        changed = _run(jobs, processes, "Post-processing", progress)
        check_complete(partial, [job.output.name for job in jobs])
        for name in _KEPT:
            if (folder / name).is_file():
                with file_errors(folder / name):
                    shutil.copyfile(folder / name, partial / name)
    return Applied(target, changed)


def add_postprocessed(found: Found, output: Path, options: CompareOptions) -> Found:
    """Add a post-processed copy of each model to a comparison.

    A validation case of a fold is post-processed with the values chosen on the other folds, so that the comparison is
    not biased in favour of the post-processed models.

    Args:
        found: The models and their predictions.
        output: Output folder of the comparison. Label maps are written to its sub-folder postprocessed.
        options: How to compare.

    Returns:
        `found` with the post-processed models after the others.

    Raises:
        InputError: The file can't be read, was fitted to other labels, or needs probabilities that are missing.
    """
    if options.postprocessing is None:
        return found
    file_ending = str(found.dataset_json["file_ending"])
    singles = [model for model in found.models if not model.members]
    rules, errors = _rules_by_name(options.postprocessing, [model.name for model in singles], found.dataset_json)
    for model in singles:
        if model.name in rules:
            compared = [model.predictions[case] for case in found.cases]
            errors += _missing_probabilities(rules[model.name], compared, file_ending)
    if errors:
        raise InputError(errors)
    reader = reader_for(found.dataset_json, [found.references[case] for case in found.cases])
    more = []
    for number, model in enumerate(singles):
        if model.name not in rules:
            continue
        postprocessing = rules[model.name]
        if postprocessing.does_nothing:
            found.warnings.append(f"{postprocessing.source} has no active step: {model.name} is not post-processed.")
            continue
        folder = output / "postprocessed" / model.key
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        predictions = {}
        jobs = []
        for case in found.cases:
            one = model.predictions[case]
            predictions[case] = replace(one, labels=folder / one.labels.name)
            suited = postprocessing.of_fold(one.fold)
            jobs.append(_Job(one, one.probabilities(file_ending), predictions[case].labels, suited, reader))
        _run(jobs, options.processes, f"Post-processing {model.name}", options.progress)
        name = f"{model.name}, post-processed"
        more.append(Contender(f"p{number}", name, predictions, folds=model.folds, members=(model.key,)))
    return replace(found, models=[*found.models, *more])


def _rules_by_name(
    given: Path | Mapping[str, Path], names: Sequence[str], dataset_json: Mapping[str, Any]
) -> tuple[dict[str, Postprocessing], list[str]]:
    """Return the post-processing of each model that has one, and a message for every error."""
    files = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
    errors = [
        f"--postprocessing names {name}, which is not compared; expected one of {', '.join(names)}."
        for name in files
        if name not in names
    ]
    loaded: dict[Path, Postprocessing] = {}
    for path in dict.fromkeys(files.values()):
        try:
            loaded[path] = load_postprocessing(path)
            check_labels(loaded[path], dataset_json, "the data set")
        except InputError as error:
            errors += error.errors
    return {name: loaded[path] for name, path in files.items() if path in loaded}, errors


def _missing_probabilities(
    postprocessing: Postprocessing, predictions: Sequence[Prediction], file_ending: str
) -> list[str]:
    if not postprocessing.needs_probabilities:
        return []
    missing = [path for one in predictions if not (path := one.probabilities(file_ending)).is_file()]
    return [
        f"{path} does not exist, and {postprocessing.source} sets a threshold; predict with --save_probabilities "
        f"(validation: --npz)."
        for path in missing
    ]


def _run(jobs: Sequence[_Job], processes: int, title: str, progress: bool) -> dict[str, int]:
    changed = map_all_cases(_one, jobs, processes, title, progress)
    return {job.prediction.case_id: voxels for job, voxels in zip(jobs, changed, strict=True)}


def _one(job: _Job) -> int:
    """Write a post-processed label map and return the number of changed voxels."""
    allowed = sorted({0, *(value for values in job.postprocessing.scheme.regions.values() for value in values)})
    labels = read_labels(job.prediction.labels, job.reader, allowed)
    probabilities = read_probabilities(job.probabilities) if job.postprocessing.needs_probabilities else None
    try:
        result = job.postprocessing.apply(labels.voxels, probabilities, labels.spacing)
    except InputError as error:
        raise InputError([f"{job.prediction.labels}: {text}" for text in error.errors]) from error
    write_labels(job.output, result.astype(np.min_scalar_type(max(allowed))), labels.properties, job.reader)
    return int((result != labels.voxels).sum())
