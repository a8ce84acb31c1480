"""Fingerprint of a data set with an ignore label: intensities of voxels that are annotated as foreground.

nnU-Net's fingerprint counts unannotated voxels as foreground. nnU-Net normalises CT images by the intensities of the
foreground, so a sparsely annotated CT data set would be normalised by the intensities of air.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from nnunet_conres.datasets.raw import TrainingCase, find_training_cases
from nnunet_conres.errors import InputError
from nnunet_conres.files import write_json
from nnunet_conres.images.volumes import reader_for
from nnunet_conres.parallel import map_cases

FINGERPRINT: Final = "dataset_fingerprint.json"
INTENSITIES: Final = "foreground_intensity_properties_per_channel"
ANNOTATED_ONLY: Final = "ignored_voxels_excluded"
"""Entry of a fingerprint whose intensities are those of annotated foreground only; nnU-Net ignores the entry."""
SOURCES: Final = "nnunet_conres_sources"
"""Entry of a fingerprint, and of a preprocessed case's properties, with the raw files that they were computed from."""

_VOXELS = 10_000_000  # over all cases; nnU-Net samples ten times as many, for the same percentiles


def needs_annotated_intensities(dataset_json: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> bool:
    """Return whether images are normalised by intensities that include those of unannotated voxels.

    Args:
        dataset_json: Content of dataset.json.
        fingerprint: Content of dataset_fingerprint.json.
    """
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

    channels = dataset_json.get("channel_names", dataset_json.get("modality", {})).values()
    return (
        dataset_json["labels"].get("ignore") is not None
        and not fingerprint.get(ANNOTATED_ONLY, False)
        and any(issubclass(get_normalization_scheme(channel), CTNormalization) for channel in channels)
    )


def annotated_intensities(
    dataset_folder: Path, dataset_json: Mapping[str, Any], *, progress: bool = False
) -> dict[str, dict[str, float]]:
    """Compute statistics of the intensities of annotated foreground voxels over all training cases.

    Args:
        dataset_folder: Raw data set.
        dataset_json: Its dataset.json, with an ignore label.
        progress: Whether to show a progress bar on stderr.

    Returns:
        Per channel: mean, median, std, min, max, percentile_99_5 and percentile_00_5, as in a fingerprint.

    Raises:
        InputError: A case can't be found or read, or none has annotated foreground.
    """
    cases, errors = find_training_cases(dataset_folder, dataset_json)
    if errors:
        raise InputError(errors)
    reader = reader_for(dataset_json, [case.images[0] for case in cases])
    samples = max(1, _VOXELS // len(cases))
    jobs = [(case, reader, dataset_json["labels"]["ignore"], samples) for case in cases]
    sampled = [found for found in map_cases(_sample, jobs, 1, "Intensities", progress) if len(found[0])]
    if not sampled:
        raise InputError(
            f"No training case of {dataset_folder} has annotated foreground, but nnU-Net normalises CT images by the "
            f"intensities of the foreground. Check the labels."
        )
    channels = (np.concatenate(channel) for channel in zip(*sampled, strict=True))
    return {str(number): _statistics(intensities) for number, intensities in enumerate(channels)}


def _sample(job: tuple[TrainingCase, Any, int, int]) -> Sequence[Sequence[float]]:
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    case, reader, ignore_label, samples = job
    images, _ = reader().read_images([str(path) for path in case.images])
    labels, _ = reader().read_seg(str(case.labels))
    labels[labels == ignore_label] = 0
    images, labels, _ = crop_to_nonzero(images, labels)
    found: Sequence[Sequence[float]] = DatasetFingerprintExtractor.collect_foreground_intensities(
        labels, images, num_samples=samples
    )[0]
    return found


def _statistics(intensities: np.ndarray[Any, Any]) -> dict[str, float]:
    low, median, high = np.percentile(intensities, (0.5, 50.0, 99.5))
    values = {
        "mean": intensities.mean(),
        "median": median,
        "std": intensities.std(),
        "min": intensities.min(),
        "max": intensities.max(),
        "percentile_99_5": high,
        "percentile_00_5": low,
    }
    return {name: float(value) for name, value in values.items()}


def exclude_ignored_voxels(
    dataset_folder: Path, preprocessed: Path, dataset_json: Mapping[str, Any], *, progress: bool = False
) -> str | None:
    """Replace the intensities in a fingerprint by those of annotated foreground, if images are normalised by them.

    Args:
        dataset_folder: Raw data set.
        preprocessed: Its folder in nnUNet_preprocessed, with the fingerprint.
        dataset_json: Its dataset.json.
        progress: Whether to show a progress bar on stderr.

    Returns:
        Description of the changes for the user; None if nothing was changed.

    Raises:
        InputError: A case can't be found or read, or none has annotated foreground.
    """
    path = preprocessed / FINGERPRINT
    fingerprint = json.loads(path.read_text(encoding="utf-8"))
    if not needs_annotated_intensities(dataset_json, fingerprint):
        return None
    before = fingerprint[INTENSITIES]
    after = annotated_intensities(dataset_folder, dataset_json, progress=progress)
    write_json(path, fingerprint | {INTENSITIES: after, ANNOTATED_ONLY: True})
    changes = (
        f"channel {channel}: mean {before[channel]['mean']:.1f} became {new['mean']:.1f}, clip range "
        f"{before[channel]['percentile_00_5']:.0f} to {before[channel]['percentile_99_5']:.0f} became "
        f"{new['percentile_00_5']:.0f} to {new['percentile_99_5']:.0f}"
        for channel, new in after.items()
    )
    return (
        f"{path}: nnU-Net had counted unannotated voxels as foreground. The intensities are now those of annotated "
        f"foreground; {'; '.join(changes)}."
    )


def carry_fingerprint(source: Path, target: Path) -> bool:
    """Copy the fingerprint of a dense data set to the sparsely annotated data set made from it.

    Spacings and shapes are those of the images, which are the same. The label files differ, so the record of the raw
    files is not copied.

    Args:
        source: Folder of the dense data set in nnUNet_preprocessed.
        target: Folder of the sparse data set in nnUNet_preprocessed; created if it is missing.

    Returns:
        Whether the fingerprint was copied. It is not copied if the source has none or the target has one already.
    """
    if not (source / FINGERPRINT).is_file() or (target / FINGERPRINT).exists():
        return False
    fingerprint = json.loads((source / FINGERPRINT).read_text(encoding="utf-8"))
    fingerprint.pop(SOURCES, None)
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / FINGERPRINT, fingerprint | {ANNOTATED_ONLY: True})
    return True
