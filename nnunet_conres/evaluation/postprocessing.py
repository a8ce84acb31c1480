"""Post-processing of label maps: thresholds, small components, holes and small regions, configured by a JSON file.

`nnunet-conres postprocess fit` fits it to the validation predictions of a model's folds and writes the file,
`load_postprocessing` reads it, and `Postprocessing.apply` applies it to a label map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.probabilities import Channels
from nnunet_conres.files import read_json

FORMAT: Final = 1
"""Format version of the JSON file."""

NEUTRAL: Final = 0.5
"""nnU-Net's threshold."""


@dataclass(frozen=True)
class RegionSteps:
    """Post-processing steps of one label or region. The defaults change nothing.

    Attributes:
        threshold: Probability above which a voxel belongs to the region. nnU-Net's 0.5 changes nothing. Labels exclude
            each other, so the threshold sets the odds against a label: at 0.7 it needs 7/3 times the probability that
            it needs at 0.5.
        smallest_component: Components (26 neighbours) smaller than this volume (mm³) are removed.
        fill_holes: Whether to fill holes. Voxels of a hole are filled if they are background or belong to a region that
            contains this one.
        smallest_total: If the total volume is smaller than this (mm³), the region is replaced by the surrounding label:
            enhancing tumour by the rest of the tumour core, for example.
    """

    threshold: float = NEUTRAL
    smallest_component: float = 0.0
    fill_holes: bool = False
    smallest_total: float = 0.0

    @property
    def errors(self) -> list[str]:
        """A message for every invalid value."""
        found = []
        if not 0 < self.threshold < 1:
            found.append(f"threshold is {self.threshold}; expected a number between 0 and 1.")
        for key in ("smallest_component", "smallest_total"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                found.append(f"{key} is {value}; expected 0 mm³ or more.")
        return found


@dataclass(frozen=True)
class Scheme:
    """The labels of a data set that post-processing needs.

    Attributes:
        regions: Label values of each label or region, in the order of dataset.json.
        painted: By label or region, the label value that its voxels get in a label map.
        around: By label or region, the label value that replaces removed voxels: that of the smallest region that
            contains it, or 0 if there is none.
        has_regions: Whether the data set has regions, which nnU-Net predicts independently of each other.
    """

    regions: Mapping[str, tuple[int, ...]]
    painted: Mapping[str, int]
    around: Mapping[str, int]
    has_regions: bool

    @classmethod
    def of(cls, dataset_json: Mapping[str, Any], less: Mapping[str, str] | None = None) -> Scheme:
        """Return the labels that a dataset.json defines.

        Args:
            dataset_json: Content of the dataset.json.
            less: By label name, the name of the label that replaces it. Overrides `around`.

        Raises:
            InputError: The dataset.json has no usable labels.
        """
        channels = Channels.of_dataset(dataset_json)
        regions = channels.regions
        painted = {name: channels.painted[place] for name, place in channels.place.items()}
        around = {}
        for name, values in regions.items():
            holding = [other for other, of_other in regions.items() if set(values) < set(of_other)]
            smallest = min(holding, key=lambda other: len(regions[other]), default=None)
            around[name] = 0 if smallest is None else painted[smallest]
        for name, other in (less or {}).items():
            around[name] = painted[other]
        return cls(regions, painted, around, not channels.exclusive)

    def labels_of(self, probabilities: NDArray[np.floating], thresholds: Mapping[str, float]) -> NDArray[np.integer]:
        """Compute a label map from probabilities as nnU-Net does, with other thresholds.

        Args:
            probabilities: (C, z, y, x), as nnU-Net saves them: of regions, or of the background and all labels.
            thresholds: By label or region. The others keep nnU-Net's threshold.
        """
        names = list(self.regions)
        if self.has_regions:
            _check_channels(probabilities, len(names), "regions")
            labels = np.zeros(probabilities.shape[1:], np.int32)
            for channel, name in enumerate(names):
                labels[probabilities[channel] > thresholds.get(name, NEUTRAL)] = self.painted[name]
            return labels
        values = [0, *(self.painted[name] for name in names)]
        _check_channels(probabilities, len(values), "labels and the background")
        by_value = dict(zip(values, range(len(values)), strict=True))
        channels = [by_value[value] for value in sorted(values)]
        odds = np.array([1.0, *((1 - t) / t for t in (thresholds.get(name, NEUTRAL) for name in names))], np.float32)
        # As in nnU-Net, channels are ordered by label value, and the first of equal probabilities wins.
        weighted = probabilities * odds[channels].reshape(-1, *(1,) * (probabilities.ndim - 1))
        return np.asarray(sorted(values), np.int32)[weighted.argmax(0)]


def _check_channels(probabilities: NDArray[np.floating], expected: int, of_what: str) -> None:
    if probabilities.ndim != 4 or len(probabilities) != expected:
        raise InputError(
            f"The probabilities have shape {probabilities.shape}; expected {expected} channels of {of_what}, and three "
            f"axes."
        )


@dataclass(frozen=True)
class Postprocessing:
    """The post-processing of a model's label maps.

    Attributes:
        scheme: Labels of the data set.
        steps: Steps by label or region. The others are left unchanged.
        folds: Steps by fold, chosen on the validation cases of the other folds. A fold's own validation cases are
            post-processed with them.
        source: The file that it was read from, for messages.
    """

    scheme: Scheme
    steps: Mapping[str, RegionSteps]
    folds: Mapping[int, Mapping[str, RegionSteps]] = field(default_factory=dict)
    source: Path | None = None

    @property
    def needs_probabilities(self) -> bool:
        """Whether a step sets a threshold, which needs probabilities."""
        return any(steps.threshold != NEUTRAL for steps in self.steps.values())

    @property
    def does_nothing(self) -> bool:
        """Whether all steps are off."""
        return all(steps == RegionSteps() for steps in self.steps.values())

    def of_fold(self, fold: int | None) -> Postprocessing:
        """Return the post-processing of a fold's validation cases; `self` for an unknown fold and for a test set."""
        if fold is None or fold not in self.folds:
            return self
        return Postprocessing(self.scheme, self.folds[fold], source=self.source)

    def apply(
        self,
        labels: NDArray[np.integer],
        probabilities: NDArray[np.floating] | None,
        spacing: Sequence[float],
    ) -> NDArray[np.integer]:
        """Post-process a label map.

        Args:
            labels: (z, y, x), with the data set's label values.
            probabilities: (C, z, y, x), as nnU-Net saves them. Needed if a threshold is set, otherwise ignored.
            spacing: Voxel size along the axes, mm.

        Returns:
            A new label map of the same type.

        Raises:
            InputError: Probabilities are needed but missing, or do not match the labels.
        """
        result = labels.copy()
        thresholds = {name: steps.threshold for name, steps in self.steps.items() if steps.threshold != NEUTRAL}
        if thresholds:
            if probabilities is None:
                raise InputError(
                    f"{self.source or 'The post-processing'} sets thresholds for {', '.join(thresholds)}, and there "
                    f"are no probabilities; predict with --save_probabilities."
                )
            if probabilities.shape[1:] != labels.shape:
                raise InputError(
                    f"The probabilities have shape {probabilities.shape[1:]}; expected {labels.shape} like the labels."
                )
            result = self.scheme.labels_of(probabilities, thresholds).astype(labels.dtype)
        cubic = math.prod(spacing)
        # Outermost regions first: voxels removed from a region are removed from the regions inside it too.
        for name in sorted(self.steps, key=lambda name: -len(self.scheme.regions[name])):
            steps, values = self.steps[name], self.scheme.regions[name]
            around, painted = self.scheme.around[name], self.scheme.painted[name]
            if steps.smallest_component > 0:
                result[_small_components(np.isin(result, values), steps.smallest_component / cubic)] = around
            if steps.fill_holes:
                holes = _holes(np.isin(result, values))
                result[holes & ((result == 0) | np.isin(result, self._holding(name)))] = painted
            if steps.smallest_total > 0:
                mask = np.isin(result, values)
                if 0 < int(mask.sum()) * cubic < steps.smallest_total:
                    result[mask] = around
        return result

    def _holding(self, name: str) -> list[int]:
        """Return the label values of all regions that contain a region."""
        values = set(self.scheme.regions[name])
        return sorted({value for other in self.scheme.regions.values() if values < set(other) for value in other})

    def as_json(self) -> dict[str, Any]:
        """Return the entries of the file that `load_postprocessing` reads, except for the labels."""
        return {
            "format": FORMAT,
            "steps": {name: asdict(steps) for name, steps in self.steps.items()},
            "folds": {
                str(fold): {name: asdict(steps) for name, steps in of_fold.items()}
                for fold, of_fold in self.folds.items()
            },
        }


def _small_components(mask: NDArray[np.bool_], voxels: float) -> NDArray[np.bool_]:
    """Return the mask of all components (26 neighbours) with fewer voxels than given."""
    from scipy.ndimage import generate_binary_structure, label

    numbers, _ = label(mask, generate_binary_structure(mask.ndim, mask.ndim))
    # The tolerance allows for rounding: in floating point, 3 * 0.1 > 0.3.
    small = np.bincount(numbers.ravel()) < voxels * (1 - 1e-9)
    small[0] = False
    return small[numbers]


def _holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the holes of a mask (6 neighbours); of an image with one slice, the holes within that slice."""
    from scipy.ndimage import binary_fill_holes

    flat = mask[0] if mask.shape[0] == 1 else mask
    return (binary_fill_holes(flat) & ~flat).reshape(mask.shape)


def load_postprocessing(path: str | Path) -> Postprocessing:
    """Read a JSON file that `nnunet-conres postprocess fit` wrote.

    Args:
        path: The JSON file.

    Raises:
        InputError: The file can't be read, or is not such a file. Lists all errors.
    """
    path = Path(path)
    content = read_json(path)
    if content.get("format") != FORMAT or "steps" not in content or "dataset_json" not in content:
        raise InputError(
            f"{path} is not a post-processing of format {FORMAT}; expected a file of nnunet-conres postprocess fit."
        )
    try:
        scheme = Scheme.of(content["dataset_json"], content.get("less"))
        steps = {name: RegionSteps(**values) for name, values in content["steps"].items()}
        folds = {
            int(fold): {name: RegionSteps(**values) for name, values in of_fold.items()}
            for fold, of_fold in content.get("folds", {}).items()
        }
        every = [steps, *folds.values()]
        errors = [
            f"{path}, {name}: {error}"
            for of_fold in every
            for name, values in of_fold.items()
            for error in values.errors
        ]
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{path} is damaged: {error}. Fit it again with nnunet-conres postprocess fit.") from error
    unknown = sorted({name for of_fold in every for name in of_fold} - set(scheme.regions))
    if unknown:
        errors.append(f"{path} has steps of {', '.join(unknown)}, which its labels do not have; fit it again.")
    if errors:
        raise InputError(list(dict.fromkeys(errors)))
    return Postprocessing(scheme, steps, folds, path)


def check_labels(postprocessing: Postprocessing, dataset_json: Mapping[str, Any], where: object) -> None:
    """Check that a post-processing was fitted to a data set's labels.

    Args:
        postprocessing: The post-processing.
        dataset_json: Content of the data set's dataset.json.
        where: The dataset.json or data set, for messages.

    Raises:
        InputError: The post-processing was fitted to other labels.
    """
    ours, theirs = postprocessing.scheme, Scheme.of(dataset_json)
    if (dict(ours.regions), dict(ours.painted)) != (dict(theirs.regions), dict(theirs.painted)):
        raise InputError(
            f"{postprocessing.source or 'The post-processing'} was fitted to the labels {dict(ours.regions)}, but "
            f"{where} has {dict(theirs.regions)}; fit it with a model that was trained with these labels."
        )
