"""Calibration of models: do voxels with a predicted probability of 0.8 belong to the region in 80 % of the cases?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.cache import Cache, content_of, key_of, state_of
from nnunet_conres.evaluation.finding import CompareOptions, Found
from nnunet_conres.evaluation.metrics import Metric
from nnunet_conres.evaluation.predictions import Contender
from nnunet_conres.evaluation.probabilities import Channels, iterate_channels, read_shape
from nnunet_conres.evaluation.scoring import MEAN
from nnunet_conres.evaluation.statistics import STATISTICS_VERSION, compare_paired
from nnunet_conres.evaluation.surfaces import box_of
from nnunet_conres.evaluation.testing import comparison_row, summarise
from nnunet_conres.files import read_json, without_nan
from nnunet_conres.images.volumes import read_labels, reader_for
from nnunet_conres.nnunet import ignore_label
from nnunet_conres.parallel import try_cases

BINS: Final = 15
"""Equal bins of probability, as in Guo et al. 2017."""

BOUNDARY: Final = 2
"""A voxel is near the boundary if a voxel at most this many voxels away along an axis is on the other side."""

CALIBRATION_METRICS: Final[Mapping[str, Metric]] = {
    "ece_boundary": Metric(
        "ece_boundary",
        "ECE at the boundary",
        "expected calibration error at the boundary",
        "",
        "lower",
        3,
        f"Expected calibration error of the voxels within {BOUNDARY} voxels of the boundary of the true region.",
    ),
    "ece": Metric(
        "ece",
        "ECE, all voxels",
        "expected calibration error",
        "",
        "lower",
        4,
        "Expected calibration error of all annotated voxels; the background far from the region makes it small.",
    ),
}
"""Metrics by key; they differ in the voxels that they include."""

# Raise when a change alters the results.
_VERSION: Final = 1
# Voxels binned at a time: the arrays of a chunk fit in the processor's cache.
_CHUNK: Final = 1 << 18


@dataclass(frozen=True)
class Reliability:
    """Agreement of probabilities and truth, bin by bin.

    Attributes:
        voxels: Number of voxels in each bin.
        probability: Sum of the predicted probabilities of these voxels.
        positives: Number of these voxels that belong to the region.
    """

    voxels: NDArray[np.int64]
    probability: NDArray[np.float64]
    positives: NDArray[np.int64]

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(
            self.voxels + other.voxels, self.probability + other.probability, self.positives + other.positives
        )

    @property
    def error(self) -> float:
        """The expected calibration error, 0 to 1; NaN if there are no voxels."""
        total = int(self.voxels.sum())
        return float(np.abs(self.probability - self.positives).sum() / total) if total else math.nan

    def as_curve(self) -> dict[str, list[Any]]:
        """Return voxels, mean probability and observed frequency of every bin; None for a bin without voxels."""
        with np.errstate(invalid="ignore"):
            means, frequencies = self.probability / self.voxels, self.positives / self.voxels
        content = {"voxels": self.voxels.tolist(), "probability": means.tolist(), "frequency": frequencies.tolist()}
        return dict(without_nan(content))


def reliability(
    probability: NDArray[np.floating[Any]], truth: NDArray[np.bool_], mask: NDArray[np.bool_] | None = None
) -> Reliability:
    """Sort voxels into bins by their predicted probability.

    The expected calibration error (ECE) is the mean over the voxels of |mean probability - observed frequency| of their
    bin. It is computed for each region or label separately. The probability is that of the region, 0 to 1, not that of
    the most probable class, so the ECE means the same for labels (softmax) and regions (sigmoid).

    Args:
        probability: Predicted probability of the region, 0 to 1.
        truth: Whether a voxel belongs to the region, same shape.
        mask: Voxels to include, same shape; all by default.

    Returns:
        `BINS` bins of equal width; each includes its upper edge.

    Source:
        Naeini et al., AAAI 2015 (ECE); Guo et al., ICML 2017 (15 bins); Kull et al., NeurIPS 2019 (each class
        separately); Barfoot et al., arXiv:2506.03942 (per image and pooled, for segmentation).
    """
    if mask is not None:
        probability, truth = probability[mask], truth[mask]
    flat, true = np.ravel(probability), np.ravel(truth)
    edges = np.linspace(0, 1, BINS + 1)[1:-1]
    voxels, positives = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    total = np.zeros(BINS, np.float64)
    for start in range(0, flat.size, _CHUNK):
        values, of = flat[start : start + _CHUNK], true[start : start + _CHUNK]
        # Nearly all voxels are background and fall into the first bin, which needs no search.
        above = np.flatnonzero(values > edges[0])
        higher, of_higher = values[above], of[above]
        places = np.searchsorted(edges, higher)
        voxels += np.bincount(places, minlength=BINS)
        total += np.bincount(places, weights=higher, minlength=BINS)
        positives += np.bincount(places[of_higher], minlength=BINS)
        voxels[0] += values.size - higher.size
        total[0] += values.sum(dtype=np.float64) - higher.sum(dtype=np.float64)
        positives[0] += np.count_nonzero(of) - np.count_nonzero(of_higher)
    return Reliability(voxels, total, positives)


def boundary(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the voxels near the boundary of a region, on both sides of it.

    Most voxels of an image are background that every model is sure of. They hide the differences between models: errors
    and doubt are at the boundary.

    Args:
        region: A mask of any number of axes.

    Returns:
        Mask of the same shape: True where one of the `BOUNDARY` voxels on either side along an axis is across the
        boundary.

    Source:
        Ding et al., "Local temperature scaling for probability calibration", ICCV 2021.
    """
    from scipy.ndimage import maximum_filter1d, minimum_filter1d

    near = np.zeros_like(region)
    box = box_of(region, BOUNDARY)
    inside, width = region[box].view(np.uint8), 2 * BOUNDARY + 1
    for axis in range(region.ndim):
        low, high = (of(inside, width, axis, mode="nearest") for of in (minimum_filter1d, maximum_filter1d))
        near[box] |= low != high
    return near


def measure_calibration(found: Found, cache_folder: Path, reader: str, options: CompareOptions) -> dict[str, Any]:
    """Measure the calibration of all models that have probabilities, and of the ensembles of such models.

    Args:
        found: The models, including ensembles, and their predictions.
        cache_folder: Where to cache bins and statistics.
        reader: Name of nnU-Net's reader for the references.
        options: How to compare.

    Returns:
        The entry ``calibration`` of report.json.

    Raises:
        InputError: Probabilities can't be read or do not fit their reference; lists all errors.
    """
    sources, without = _sources(found)
    bins = _bins(found, sources, Cache(cache_folder), reader, options) if sources else {}
    values = {key: {case: _errors_of(of) for case, of in cases.items()} for key, cases in bins.items()}
    names = {model.key: model.name for model in found.models if model.key in values}
    key = key_of(_VERSION, STATISTICS_VERSION, version("scipy"), without_nan(values), names, found.groups)
    tested = Cache(cache_folder).kept(key, lambda: _test(values, names, found))
    content: dict[str, Any] = {
        "definition": "Mean over the voxels of |mean probability - observed frequency| of their bin",
        "bins": BINS,
        "boundary_voxels": BOUNDARY,
        "metrics": [asdict(metric) for metric in CALIBRATION_METRICS.values()],
        "without": without,
        "remedies": list(dict.fromkeys(missing.as_text for missing in found.missing_probabilities)) if without else [],
        "pooled": {key: _pooled(list(cases.values())) for key, cases in bins.items()},
        "cases": values,
        **tested,
    }
    return dict(without_nan(content))


# --- files of probabilities -------------------------------------------------------------------------------------------


def _sources(found: Found) -> tuple[dict[str, dict[str, tuple[Path, ...]]], list[dict[str, Any]]]:
    """Return the files of probabilities by model and case, several for an ensemble, and the models that lack some."""
    file_ending = str(found.dataset_json["file_ending"])
    by_key = {model.key: model for model in found.models}
    sources: dict[str, dict[str, tuple[Path, ...]]] = {}
    without = []
    for model in found.models:
        if len(model.members) == 1:
            continue  # post-processed: other labels, same probabilities
        of = {case: tuple(_files(model, by_key, case, file_ending)) for case in found.cases}
        missing = [case for case, files in of.items() if not all(path.is_file() for path in files)]
        if missing:
            without.append({"model": model.key, "name": model.name, "cases": missing})
        else:
            sources[model.key] = of
    return sources, without


def _files(model: Contender, by_key: Mapping[str, Contender], case: str, file_ending: str) -> Iterator[Path]:
    for member in [by_key[key] for key in model.members] or [model]:
        yield member.predictions[case].probabilities(file_ending)


def _channels_of(found: Found, model: Contender) -> Channels:
    """Return a model's channels from its own dataset.json: the comparison's may order the regions differently."""
    settings = found.settings.get(model.members[0] if model.members else model.key)
    own = None if settings is None else settings / "dataset.json"
    return Channels.of_dataset(read_json(own) if own is not None and own.is_file() else found.dataset_json)


# --- bins of every case ----------------------------------------------------------------------------------------------

# By region, then by the metric's key.
_Bins = dict[str, dict[str, Reliability]]


@dataclass(frozen=True)
class _Task:
    """A case, to be measured for some models."""

    reference: Path
    dataset_json: Mapping[str, Any]
    files: Mapping[str, tuple[Path, ...]]  # probabilities by model, several for an ensemble
    channels: Channels


def _bins(
    found: Found,
    sources: Mapping[str, Mapping[str, tuple[Path, ...]]],
    cache: Cache,
    reader: str,
    options: CompareOptions,
) -> dict[str, dict[str, _Bins]]:
    """Return the bins by model and case, from the cache where possible."""
    channels = {model.key: _channels_of(found, model) for model in found.models if model.key in sources}
    regions = {name: list(values) for name, values in Channels.of_dataset(found.dataset_json).regions.items()}
    settings = [_VERSION, regions, ignore_label(found.dataset_json["labels"]), reader]
    references = {case: content_of(found.references[case]) for case in found.cases}
    keys = {
        (case, model): key_of(settings, channels[model].place, references[case], [state_of(path) for path in of[case]])
        for case in found.cases
        for model, of in sources.items()
    }
    done = {place: bins for place, key in keys.items() if (bins := _of_entry(cache.get(key), list(regions)))}
    tasks = []
    for case in found.cases:
        # Models with the same channels are measured together, so that files of ensemble members are read only once.
        todo = [model for model in sources if (case, model) not in done]
        for place in dict.fromkeys(tuple(channels[model].place.items()) for model in todo):
            group = [model for model in todo if tuple(channels[model].place.items()) == place]
            files = {model: sources[model][case] for model in group}
            tasks.append((case, _Task(found.references[case], found.dataset_json, files, channels[group[0]])))
    errors: list[str] = []
    results = try_cases(_measure, [task for _, task in tasks], options.processes, "Calibration", options.progress)
    for (case, _), result in zip(tasks, results, strict=True):
        if isinstance(result, InputError):
            errors += result.errors
            continue
        for model, of_model in result.items():
            done[case, model] = of_model
            cache.put(keys[case, model], _as_entry(of_model))
    if errors:
        raise InputError(list(dict.fromkeys(errors)))
    return {model: {case: done[case, model] for case in found.cases} for model in sources}


def _measure(task: _Task) -> dict[str, _Bins]:
    """Measure the bins of a case, by model."""
    meaning = task.channels
    paths = list(dict.fromkeys(chain.from_iterable(task.files.values())))
    reference = read_labels(task.reference, reader_for(task.dataset_json, [task.reference])).voxels
    errors: list[str] = []
    for path in paths:
        try:
            errors += meaning.shape_errors(path, read_shape(path), reference.shape, task.reference)
        except InputError as error:
            errors += error.errors
    if errors:
        raise InputError(errors)
    ignored = ignore_label(task.dataset_json["labels"])
    annotated = None if ignored is None else reference != ignored
    if annotated is not None and annotated.all():
        annotated = None
    names = {place: name for name, place in meaning.place.items()}
    bins: dict[str, _Bins] = {model: {} for model in task.files}
    streams = {path: iterate_channels(path) for path in paths}
    for place in range(meaning.count):
        of_file = {path: next(stream) for path, stream in streams.items()}
        if place not in names:
            continue
        name = names[place]
        truth = np.isin(reference, meaning.regions[name])
        near = boundary(truth)
        if annotated is not None:
            near &= annotated
        for model, files in task.files.items():
            mean = of_file[files[0]]
            for other in files[1:]:
                mean = mean + of_file[other]
            probability = mean if len(files) == 1 else mean / np.float32(len(files))
            bins[model][name] = {
                "ece_boundary": reliability(probability, truth, near),
                "ece": reliability(probability, truth, annotated),
            }
    # in the order of dataset.json
    return {model: {name: of[name] for name in meaning.regions} for model, of in bins.items()}


def _as_entry(bins: _Bins) -> dict[str, Any]:
    return {
        name: {key: [of.voxels.tolist(), of.probability.tolist(), of.positives.tolist()] for key, of in metrics.items()}
        for name, metrics in bins.items()
    }


def _of_entry(content: Any, regions: Sequence[str]) -> _Bins | None:
    """Parse an entry of the cache; return None if it is missing or malformed."""
    try:
        bins: _Bins = {name: {} for name in regions}
        for name in regions:
            for key in CALIBRATION_METRICS:
                voxels, probability, positives = (np.array(part) for part in content[name][key])
                bins[name][key] = Reliability(voxels, probability.astype(np.float64), positives)
        return bins
    except (ValueError, KeyError, TypeError):
        return None


# --- statistics ------------------------------------------------------------------------------------------------------


def _errors_of(bins: _Bins) -> dict[str, dict[str, float]]:
    """Return a case's errors by region and metric, followed by their mean if there are two or more regions."""
    errors = {name: {key: of.error for key, of in metrics.items()} for name, metrics in bins.items()}
    if len(errors) < 2:
        return errors
    mean = {}
    for key in CALIBRATION_METRICS:
        known = [metrics[key] for metrics in errors.values() if not math.isnan(metrics[key])]
        mean[key] = math.fsum(known) / len(known) if known else math.nan
    return {**errors, MEAN: mean}


def _pooled(cases: Sequence[_Bins]) -> dict[str, Any]:
    """Return error and curve of the voxels of all cases together, by region and metric."""
    pooled: dict[str, Any] = {}
    for name, metrics in cases[0].items():
        for key in metrics:
            first, *others = (case[name][key] for case in cases)
            together = sum(others, first)
            pooled.setdefault(name, {})[key] = {"error": together.error, **together.as_curve()}
    return pooled


def _test(
    values: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]], names: Mapping[str, str], found: Found
) -> dict[str, Any]:
    """Return means with intervals, and paired differences to the baseline if it has probabilities."""
    baseline = found.models[0].key
    comparisons = []
    if baseline in values and len(values) > 1:
        named = {names[key]: of for key, of in values.items()}
        keys = {name: key for key, name in names.items()}
        compared = compare_paired(named, names[baseline], groups=found.groups, definitions=CALIBRATION_METRICS)
        comparisons = [comparison_row(comparison, keys) for comparison in compared]
    return dict(
        without_nan({"summary": summarise(values, found.groups, CALIBRATION_METRICS), "comparisons": comparisons})
    )
