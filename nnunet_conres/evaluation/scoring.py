"""Second stage of a comparison: scores of label files against their references, cached between runs."""

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

# Key of the mean over the labels or regions of a case, next to their own keys.
MEAN: Final = "mean"

# By region, then by metric key.
CaseScores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class ScoringJob:
    """A prediction to score.

    Attributes:
        model: Name or key of the model that made the prediction.
        case_id: The case.
        reference: File of the reference labels.
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
        values: By model, case, label or region, and metric key; NaN if undefined. If there are two or more regions,
            their mean follows under the key "mean"; for volume errors it is the mean of absolute values.
        options: Conventions that the scores were computed with.
        cached: Number of predictions whose scores were found in the cache.
        displaced: Predictions whose header places them elsewhere than their reference. Voxels are compared one by one
            nevertheless, as in nnU-Net.
        missing_regions: Regions that a challenge's rules score, but the data set's labels do not distinguish.
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
    """Score predictions: the labels or regions of dataset.json by all metrics, or a challenge's regions by its rules.

    Args:
        jobs: The predictions; one per model and case.
        dataset_json: Content of the data set's dataset.json: its labels or regions, its ignore label, and how nnU-Net
            reads its files.
        options: Conventions; BraTS's by default.
        cache_folder: Folder that caches the scores of every pair of files by their content; created if necessary. A
            restart, or a run with another model, computes only new scores. None for no cache.
        reader: Name of nnU-Net's reader for the files, if known. Determining it takes as long as reading a file.
        processes: Number of predictions scored in parallel.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The scores. Models and cases are in the order of the jobs, regions in the order of dataset.json.

    Raises:
        InputError: Files are missing, cannot be read, do not match, or contain labels that dataset.json does not name.
            Lists all errors; missing files are reported before any file is read.
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
    hashed = cache(content_of)  # models share the references
    keys = [
        str(number) if kept.folder is None else _key(job, scheme, options, name, hashed)
        for number, job in enumerate(jobs)
    ]
    outcomes = {key: outcome for key in keys if (outcome := _of_entry(kept.get(key), scheme, options)) is not None}
    # Identical predictions of two models have the same key and are scored once.
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
            outcome = _score(_Task(job, scheme, options, found, kept, key))  # to name this file, not its copy
        errors += outcome.errors
        cached += outcome.cached
        displaced += [job.prediction] if outcome.displaced else []
        values.setdefault(job.model, {})[job.case_id] = outcome.scores
    if errors:
        # Every model reports the errors of a reference again.
        raise InputError("\n".join(dict.fromkeys(errors)))
    return Scores(values, options, cached, tuple(displaced), scheme.missing)


# --- what is scored -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scheme:
    """Labels of a data set.

    Attributes:
        regions: Label values of every label or region to score, by name.
        allowed: All label values that dataset.json names, except the ignore label.
        ignore: The ignore label, if there is one.
        missing: Regions that a challenge's rules score, but the data set's labels do not distinguish.
    """

    regions: Mapping[str, tuple[int, ...]]
    allowed: tuple[int, ...]
    ignore: int | None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Task:
    """Everything that a worker process needs to score a prediction."""

    job: ScoringJob
    scheme: _Scheme
    options: MetricOptions
    reader: type
    cache: Cache
    key: str


@dataclass(frozen=True)
class _Outcome:
    """Scores of a prediction, or the errors that prevented them."""

    scores: CaseScores
    cached: bool = False
    errors: tuple[str, ...] = ()
    displaced: bool = False


def _job_errors(jobs: Sequence[ScoringJob]) -> list[str]:
    errors = [] if jobs else ["There is no prediction to score; expected one or more."]
    seen = set()
    for job in jobs:
        if (job.model, job.case_id) in seen:
            errors.append(f"{job.prediction} is a second prediction of case {job.case_id} by {job.model}.")
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
    # Infinite distances would break the statistics, and JSON can't represent them.
    return {
        region: {key: values[key] if math.isfinite(values[key]) else math.nan for key in options.measured}
        for region, values in found.items()
    }


def read_pair(
    reference_file: Path, prediction_file: Path, reader: type, allowed: Sequence[int], ignore: int | None
) -> tuple[NDArray[Any], NDArray[Any], tuple[float, ...], bool]:
    """Read a reference and a prediction of the same image.

    Args:
        reference_file: The reference labels.
        prediction_file: The predicted labels.
        reader: nnU-Net's reader for both files.
        allowed: Label values that both may contain.
        ignore: Another label value that the reference may contain.

    Returns:
        Both label maps, the voxel size, and whether the header places the prediction elsewhere than the reference.

    Raises:
        InputError: A file can't be read, or the two do not match.
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
    # The tolerance that nnU-Net has for an image and its labels.
    if not np.allclose(reference.spacing, prediction.spacing):
        raise InputError(
            f"{prediction_file} has voxels of {_lengths(prediction.spacing)} mm; expected "
            f"{_lengths(reference.spacing)} mm like {reference_file}."
        )
    return reference.voxels, prediction.voxels, reference.spacing, _displaced(reference, prediction)


def _displaced(reference: Labels, prediction: Labels) -> bool:
    """Return whether the header places a prediction elsewhere than its reference."""
    there, here = affine_of(reference.properties), affine_of(prediction.properties)
    if there is None or here is None:
        return False
    # Differences up to 0.1 (origins in mm, directions as unit vectors) come from rounding in headers.
    axes = [affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) for affine in (there, here)]
    return not (
        np.allclose(axes[0], axes[1], rtol=1e-4, atol=0.1)
        and np.allclose(there[:3, 3], here[:3, 3], rtol=1e-4, atol=0.1)
    )


def _lengths(spacing: Sequence[float]) -> str:
    return " x ".join(f"{step:g}" for step in spacing)


def _with_mean(scores: CaseScores) -> CaseScores:
    """Add the mean of two or more regions to their scores; regions without a value are left out of the mean."""
    if len(scores) < 2:
        return scores
    mean = {}
    for key in next(iter(scores.values())):
        # Absolute volume errors: one region's excess must not cancel another's deficit.
        known = [METRICS[key].compared(region[key]) for region in scores.values() if not math.isnan(region[key])]
        mean[key] = math.fsum(known) / len(known) if known else math.nan
    return {**scores, MEAN: mean}


# --- the cache ------------------------------------------------------------------------------------------------------


def reader_name(dataset_json: Mapping[str, Any], references: Sequence[Path], cache_folder: Path) -> str:
    """Return the name of nnU-Net's reader for the files of a data set.

    Args:
        dataset_json: Content of dataset.json.
        references: Files. nnU-Net chooses the reader by the first file that it can read.
        cache_folder: Folder that caches the name.

    Raises:
        InputError: No reader can read any of the files.
    """
    entries = [dataset_json.get(name) for name in ("overwrite_image_reader_writer", "file_ending")]
    key = key_of(version("nnunetv2"), entries, content_of(references[0]))
    return Cache(cache_folder).kept(key, lambda: reader_for(dataset_json, references).__name__)


def _key(job: ScoringJob, scheme: _Scheme, options: MetricOptions, reader: str, hashed: Callable[[Path], str]) -> str:
    """Return a hash of everything that the scores depend on."""
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
    """Return the scores of a cache entry; None if there is no valid entry."""
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
