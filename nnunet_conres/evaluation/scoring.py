"""Second stage of a comparison: scores of label files against their references, kept from run to run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.cache import Cache, content_of, key_of
from nnunet_conres.evaluation.lesions import challenge_scores
from nnunet_conres.evaluation.metrics import METRIC_VERSION, METRICS, MetricOptions, measure
from nnunet_conres.evaluation.rules import labels_of_regions
from nnunet_conres.files import without_nan
from nnunet_conres.images.volumes import Labels, affine_of, read_labels, reader_for
from nnunet_conres.nnunet import ignore_label, label_values
from nnunet_conres.parallel import map_cases

# The mean over the labels or regions of a case stands beside them under this name.
MEAN: Final = "mean"

# By region, then by metric's key.
CaseScores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class ScoringJob:
    """A prediction to score.

    Attributes:
        model: Name of the model that made it.
        case_id: The case.
        reference: File of the true labels.
        prediction: File of the predicted labels.
    """

    model: str
    case_id: str
    reference: Path
    prediction: Path


@dataclass(frozen=True)
class Scores:
    """Scores of all cases.

    Attributes:
        values: Of every metric, by model, case, label or region, and metric's key; NaN where there is none. Two or
            more regions are followed by their mean, called "mean", of volume errors without their sign.
        options: The conventions they were taken with.
        cached: How many predictions were scored before.
        displaced: Predictions that by their header do not lie where their reference does. Voxels are compared one by
            one all the same, as nnU-Net does.
        missing_regions: Regions that a challenge's rules score, and the data set does not tell apart.
    """

    values: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
    options: MetricOptions
    cached: int = 0
    displaced: tuple[Path, ...] = ()
    missing_regions: tuple[str, ...] = ()


def score_cases(
    jobs: Sequence[ScoringJob],
    dataset_json: Mapping[str, Any],
    *,
    options: MetricOptions | None = None,
    cache_folder: str | Path | None = None,
    reader: str | None = None,
    processes: int = 1,
    progress: bool = True,
) -> Scores:
    """Score predictions, each label or region of dataset.json by all metrics, or a challenge's regions by its rules.

    Args:
        jobs: The predictions; no two of the same model and case.
        dataset_json: Content of the data set's dataset.json: its labels or regions, its ignore label, and how nnU-Net
            reads its files.
        options: Conventions; BraTS's by default.
        cache_folder: Keeps the scores of every pair of files, by the content of both, and is created if need be: who
            starts again after a stop, or with one more model, waits for what is new only. None to keep nothing.
        reader: Name of nnU-Net's reader for the files, where it is known; finding out takes as long as reading a file.
        processes: Files scored at once.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The scores, models and cases in the order of the jobs, regions in that of dataset.json.

    Raises:
        InputError: Files are missing, cannot be read, do not fit each other or hold labels that dataset.json does not
            name; all errors are listed together, missing files before any is read.
    """
    options = options or MetricOptions()
    errors = _job_errors(jobs)
    if processes < 1:
        errors.append(f"processes is {processes}; expected 1 or more.")
    scheme = _scheme(dataset_json, options)
    if MEAN in scheme.regions:
        errors.append(f"A label is called {MEAN!r}, as the mean over all labels is; give it another name.")
    if errors:
        raise InputError(errors)
    kept = Cache(None if cache_folder is None else Path(cache_folder))
    references = [job.reference for job in jobs]
    name = reader or reader_for(dataset_json, references).__name__
    hashed = cache(content_of)  # a reference is that of several models
    keys = [
        str(number) if kept.folder is None else _key(job, scheme, options, name, hashed)
        for number, job in enumerate(jobs)
    ]
    outcomes = {key: outcome for key in keys if (outcome := _of_entry(kept.get(key), scheme, options)) is not None}
    # Two models may have made the very same prediction.
    todo = {key: job for key, job in zip(reversed(keys), reversed(jobs), strict=True) if key not in outcomes}
    if todo:
        found = reader_for(dataset_json, references)
        tasks = [_Task(job, scheme, options, found, kept, key) for key, job in reversed(todo.items())]
        scored = map_cases(_score, tasks, processes, "Scoring", progress)
        outcomes |= {task.key: outcome for task, outcome in zip(tasks, scored, strict=True)}
    values: dict[str, dict[str, CaseScores]] = {}
    cached = 0
    displaced: list[Path] = []
    for key, job in zip(keys, jobs, strict=True):
        outcome = outcomes[key]
        if outcome.errors and job is not todo[key]:
            outcome = _score(_Task(job, scheme, options, found, kept, key))  # the message names another file
        errors += outcome.errors
        cached += outcome.cached
        displaced += [job.prediction] if outcome.displaced else []
        values.setdefault(job.model, {})[job.case_id] = outcome.scores
    if errors:
        # An error of a reference is found once for every model.
        raise InputError("\n".join(dict.fromkeys(errors)))
    return Scores(values, options, cached, tuple(displaced), scheme.missing)


# --- what is scored -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scheme:
    """Labels of a data set.

    Attributes:
        regions: Label values of every label or region, by name.
        allowed: All label values that dataset.json names, but the ignore label.
        ignore: The ignore label, if there is one.
        missing: Regions that a challenge's rules score, and that cannot be.
    """

    regions: Mapping[str, tuple[int, ...]]
    allowed: tuple[int, ...]
    ignore: int | None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Task:
    """What a process needs to score a prediction."""

    job: ScoringJob
    scheme: _Scheme
    options: MetricOptions
    reader: type
    cache: Cache
    key: str


@dataclass(frozen=True)
class _Outcome:
    """Scores of a prediction, or what stood in the way."""

    scores: CaseScores
    cached: bool = False
    errors: tuple[str, ...] = ()
    displaced: bool = False


def _job_errors(jobs: Sequence[ScoringJob]) -> list[str]:
    errors = [] if jobs else ["There is no prediction to score; expected one or more."]
    seen = set()
    for job in jobs:
        if (job.model, job.case_id) in seen:
            errors.append(f"{job.prediction} is one prediction too many of case {job.case_id} by {job.model}.")
        seen.add((job.model, job.case_id))
    missing = dict.fromkeys(path for job in jobs for path in (job.reference, job.prediction) if not path.is_file())
    return errors + [f"{path} does not exist; expected a label file." for path in missing]


def _scheme(dataset_json: Mapping[str, Any], options: MetricOptions) -> _Scheme:
    try:
        regions, ignore = label_values(dataset_json["labels"]), ignore_label(dataset_json["labels"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"The dataset.json has no usable labels ({error!r}); expected that of an nnU-Net data set."
        ) from error
    if "file_ending" not in dataset_json:
        raise InputError("The dataset.json has no file_ending; expected that of an nnU-Net data set.")
    allowed = {0, *(value for values in regions.values() for value in values)}
    if not regions:
        raise InputError("The dataset.json names no label beside background and ignore; expected one or more.")
    if options.rules is None:
        return _Scheme(regions, tuple(sorted(allowed)), ignore)
    found = labels_of_regions(options.rules, dataset_json["labels"])
    return _Scheme(found.labels, tuple(sorted(allowed)), ignore, found.missing)


# --- one prediction -------------------------------------------------------------------------------------------------


def _score(task: _Task) -> _Outcome:
    try:
        reference, prediction, spacing, displaced = read_pair(
            task.job.reference, task.job.prediction, task.reader, task.scheme.allowed, task.scheme.ignore
        )
    except InputError as error:
        return _Outcome({}, errors=tuple(error.errors))
    scores = _scores(task, reference, prediction, spacing)
    content = {"case": task.job.case_id, "prediction": task.job.prediction.name, "displaced": displaced}
    task.cache.put(task.key, content | {"scores": without_nan(scores)})
    return _Outcome(_with_mean(scores), displaced=displaced)


def _scores(
    task: _Task, reference: NDArray[Any], prediction: NDArray[Any], spacing: tuple[float, ...]
) -> dict[str, dict[str, float]]:
    regions, options = task.scheme.regions, task.options
    ignored = None if task.scheme.ignore is None else reference == task.scheme.ignore
    if options.rules is None:
        return {
            name: measure(np.isin(reference, values), np.isin(prediction, values), spacing, options, ignored=ignored)
            for name, values in regions.items()
        }
    if ignored is not None:
        reference, prediction = np.where(ignored, 0, reference), np.where(ignored, 0, prediction)
    found = challenge_scores(
        reference,
        prediction,
        spacing,
        options.rules,
        regions,
        tolerance=options.tolerance,
        like_brats_evaluation=options.like_brats_evaluation,
    )
    # An infinite distance is none to compute with, and JSON has no way to write it.
    return {
        region: {key: values[key] if math.isfinite(values[key]) else math.nan for key in options.measured}
        for region, values in found.items()
    }


def read_pair(
    reference_file: Path, prediction_file: Path, reader: type, allowed: Sequence[int], ignore: int | None
) -> tuple[NDArray[Any], NDArray[Any], tuple[float, ...], bool]:
    """A reference and a prediction of the same image.

    Args:
        reference_file: The true labels.
        prediction_file: The predicted labels.
        reader: nnU-Net's, for both.
        allowed: Label values that may be in both.
        ignore: A label value that the reference may have besides.

    Returns:
        Both label maps, voxel size, and whether one lies elsewhere by its header.

    Raises:
        InputError: A file can't be read, or the two do not fit each other.
    """
    read: list[Labels] = []
    errors: list[str] = []
    for path, more in ((reference_file, () if ignore is None else (ignore,)), (prediction_file, ())):
        try:
            read.append(read_labels(path, reader, (*allowed, *more)))
        except InputError as error:
            errors += error.errors
    if errors:
        raise InputError(errors)
    reference, prediction = read
    if reference.voxels.shape != prediction.voxels.shape:
        raise InputError(
            f"{prediction_file} has shape {prediction.voxels.shape}; expected {reference.voxels.shape} like "
            f"{reference_file}."
        )
    # As far apart as nnU-Net allows an image and its labels to be.
    if not np.allclose(reference.spacing, prediction.spacing):
        raise InputError(
            f"{prediction_file} has voxels of {_lengths(prediction.spacing)} mm; expected "
            f"{_lengths(reference.spacing)} mm like {reference_file}."
        )
    return reference.voxels, prediction.voxels, reference.spacing, _displaced(reference, prediction)


def _displaced(reference: Labels, prediction: Labels) -> bool:
    """Whether a prediction lies elsewhere than its reference by its header."""
    there, here = affine_of(reference.properties), affine_of(prediction.properties)
    if there is None or here is None:
        return False
    # Tenths of a voxel come from rounding in headers; what matters is another origin, or another direction.
    axes = [affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) for affine in (there, here)]
    return not (
        np.allclose(axes[0], axes[1], rtol=1e-4, atol=0.1)
        and np.allclose(there[:3, 3], here[:3, 3], rtol=1e-4, atol=0.1)
    )


def _lengths(spacing: Sequence[float]) -> str:
    return " x ".join(f"{step:g}" for step in spacing)


def _with_mean(scores: CaseScores) -> CaseScores:
    """The scores and, of two or more regions, their mean; regions without a value are left out of it."""
    if len(scores) < 2:
        return scores
    mean = {}
    for key in next(iter(scores.values())):
        # A volume too large here does not make up for one too small there.
        known = [METRICS[key].compared(region[key]) for region in scores.values() if not math.isnan(region[key])]
        mean[key] = math.fsum(known) / len(known) if known else math.nan
    return {**scores, MEAN: mean}


# --- the cache ------------------------------------------------------------------------------------------------------


def reader_name(dataset_json: Mapping[str, Any], references: Sequence[Path], cache_folder: Path) -> str:
    """Name of nnU-Net's reader for the files of a data set.

    Args:
        dataset_json: Content of dataset.json.
        references: Files; nnU-Net chooses by the first that it can read.
        cache_folder: Keeps the answer.

    Raises:
        InputError: None can read any of the files.
    """
    entries = [dataset_json.get(name) for name in ("overwrite_image_reader_writer", "file_ending")]
    key = key_of(version("nnunetv2"), entries, content_of(references[0]))
    return Cache(cache_folder).kept(key, lambda: reader_for(dataset_json, references).__name__)


def _key(job: ScoringJob, scheme: _Scheme, options: MetricOptions, reader: str, hashed: Callable[[Path], str]) -> str:
    """Hash of all that the scores depend on."""
    conventions = {
        "metrics": METRIC_VERSION,
        "options": asdict(options),
        "regions": [[name, list(values)] for name, values in scheme.regions.items()],
        "allowed": list(scheme.allowed),
        "ignore": scheme.ignore,
        "reader": reader,
    }
    return key_of(conventions, hashed(job.reference), hashed(job.prediction))


def _of_entry(content: Any, scheme: _Scheme, options: MetricOptions) -> _Outcome | None:
    """What an entry of the cache holds; None if there is none that makes sense."""
    try:
        regions = content["scores"]
        wanted = scheme.regions if options.rules is None else options.rules.regions
        if list(regions) != [region for region in scheme.regions if region in wanted]:
            return None
        scores = {
            name: {key: math.nan if values[key] is None else float(values[key]) for key in options.measured}
            for name, values in regions.items()
        }
        return _Outcome(_with_mean(scores), cached=True, displaced=bool(content["displaced"]))
    except (ValueError, KeyError, TypeError):
        return None
