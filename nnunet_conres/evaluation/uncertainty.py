"""Uncertainty of predictions and agreement between models: maps, a table and figures of predicted cases."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres import __version__
from nnunet_conres.case_ids import unsafe_ids
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.finding import images_by_case, raw_images
from nnunet_conres.evaluation.predictions import (
    PROBABILITIES_ENDING,
    NamedModel,
    search_cross_validation,
)
from nnunet_conres.evaluation.probabilities import Channels, Painter, iterate_channels, read_shape
from nnunet_conres.evaluation.residual_maps import file_parts
from nnunet_conres.evaluation.summary import dataset_json_near
from nnunet_conres.evaluation.surfaces import dice
from nnunet_conres.files import read_json, without_nan, write_csv, write_json
from nnunet_conres.folders import list_files, writing
from nnunet_conres.images.volumes import affine_of, read_labels, read_standing, reader_for, standing, write_map
from nnunet_conres.parallel import try_cases
from nnunet_conres.text import aligned, first_few, format_shape

TABLE: Final = "uncertainty.json"
"""File in the output folder with all numbers and the file names of every case."""

COLUMNS: Final[Mapping[str, str]] = {
    "volume_ml": "Volume in the segmentation, ml.",
    "entropy": "Mean binary entropy of the region's probability within the segmentation, bits: 0 (sure) to 1.",
    "mutual_information": "Mean of the map of mutual information within the segmentation, 0 to 1.",
    "disagreement": "Mean share of members that do not assign a voxel of the segmentation to the region.",
    "dice_mean": "Mean Dice over all pairs of members; 1 where no member has the region.",
    "dice_lowest": "The lowest of these.",
    "volume_cv": "Standard deviation of the members' volumes as a share of their mean.",
}
"""Columns of the table, per case and region. All but the first two compare members and need at least two."""

_MOST_LISTED: Final = 10


@dataclass(frozen=True)
class Predicted:
    """Predicted cases with probabilities, checked and complete.

    Attributes:
        members: Names of the folders or models that predicted every case.
        dataset_json: Content of the dataset.json that the members were trained with.
        probabilities: Probability files by case, one per member.
        segmentations: The first member's label map by case, which has the image's geometry.
        images: Image files by case, one per channel; cases without images are absent.
    """

    members: tuple[str, ...]
    dataset_json: Mapping[str, Any]
    probabilities: Mapping[str, tuple[Path, ...]]
    segmentations: Mapping[str, Path]
    images: Mapping[str, Sequence[Path]]


@dataclass(frozen=True)
class Uncertainty:
    """Result of `write_uncertainty`.

    Attributes:
        content: Content of `TABLE`.
        json: Path of `TABLE`.
        csv: CSV file with the same numbers, one row per case and region.
    """

    content: Mapping[str, Any]
    json: Path
    csv: Path

    def as_text(self) -> str:
        """Format the least certain cases for a terminal."""
        several = len(self.content["members"]) > 1
        regions = list(self.content["regions"])
        key = "dice_mean" if several else "entropy"

        def overall(case: Mapping[str, Any]) -> float:
            known = [of[key] for of in case["regions"].values() if of[key] is not None]
            return (sum(known) / len(known) if known else math.inf) * (1 if several else -1)

        cases = sorted(self.content["cases"], key=overall)
        rows = [("least certain first", *regions)]
        for case in cases[:_MOST_LISTED]:
            values = [case["regions"][region][key] for region in regions]
            rows.append((case["id"], *("-" if value is None else f"{value:.3f}" for value in values)))
        what = "Mean Dice between the members" if several else "Mean entropy within the segmentation, bits"
        more = [f"... and {len(cases) - _MOST_LISTED} more cases"] if len(cases) > _MOST_LISTED else []
        return "\n".join([f"{what}:", *aligned(rows, left=1), *more, "", f"Table: {self.json}", f"       {self.csv}"])


# --- finding ---------------------------------------------------------------------------------------------------------


def find_predicted(
    folders: Sequence[str | Path], *, dataset_json: str | Path | None = None, images: str | Path | None = None
) -> Predicted:
    """Find predictions of the same images in several folders, such as one folder per fold.

    Args:
        folders: Output folders of nnUNetv2_predict with --save_probabilities; one or more.
        dataset_json: By default the one in or above the first folder.
        images: Folder with the images for the figures, with nnU-Net's names.

    Raises:
        InputError: Files are missing or do not match. Lists all errors.
    """
    paths = [Path(folder) for folder in folders]
    errors = [f"{path} is not a folder; expected predictions of nnU-Net." for path in paths if not path.is_dir()]
    if images is not None and not Path(images).is_dir():
        errors.append(f"{images} is not a folder; expected images, named as for nnU-Net.")
    resolved = [path.resolve() for path in paths]
    twice = dict.fromkeys(path for path, real in zip(paths, resolved, strict=True) if resolved.count(real) > 1)
    errors += [f"{path} is named twice; expected every folder once." for path in twice]
    settings = [Path(dataset_json)] if dataset_json is not None else []
    # dataset.json lies in a folder of predictions, and two folders above a validation folder.
    settings += [near for path in paths if path.is_dir() and (near := dataset_json_near(path / TABLE)) is not None]
    if not settings:
        errors.append(f"{paths[0]} has no dataset.json in or above it; name the data set's with -djfile.")
    if errors:
        raise InputError(errors)
    content = read_json(settings[0])
    files = {str(path): {file.stem: file for file in list_files(path, PROBABILITIES_ENDING)} for path in paths}
    errors += [
        f"{name} has no {PROBABILITIES_ENDING} file; expected probabilities. Predict with --save_probabilities, or "
        f"validate with nnUNetv2_train --val --npz."
        for name, of in files.items()
        if not of
    ]
    shown = {} if images is None else images_by_case(Path(images), str(content.get("file_ending", "")))
    return _settle(files, content, settings, shown, errors)


def find_held_out(dataset_name: str, names: Sequence[NamedModel], folds: Sequence[int], *, device: str) -> Predicted:
    """Find the validation predictions of models.

    Args:
        dataset_name: Full name of the data set.
        names: The models. Only one fold of a model predicts a case, so the members are models, not folds.
        folds: Folds that every model needs.
        device: Device for the suggested commands that make missing predictions.

    Raises:
        InputError: Predictions are missing or do not match. Lists all errors, with the commands that fix them.
    """
    found = search_cross_validation(dataset_name, names, folds, device=device)
    missing = [*found.missing, *found.gaps, *found.missing_probabilities]
    errors = [*found.errors, *(each.as_text for each in missing)]
    if errors:
        raise InputError(list(dict.fromkeys(errors)))
    settings = [model.folder / "dataset.json" for model in found.models if model.folder is not None]
    content = read_json(settings[0])
    ending = str(content["file_ending"])
    files = {
        model.name: {case: prediction.probabilities(ending) for case, prediction in model.predictions.items()}
        for model in found.models
    }
    return _settle(files, content, settings, raw_images(dataset_name), errors)


def _settle(
    files: Mapping[str, Mapping[str, Path]],
    dataset_json: Mapping[str, Any],
    settings: Sequence[Path],
    images: Mapping[str, Sequence[Path]],
    errors: list[str],
) -> Predicted:
    """Check that the members predicted the same cases, and that their channels have the same meaning."""
    errors = [*errors, *_settings_errors(settings)]
    if "file_ending" not in dataset_json:
        errors.append(f"{settings[0]} has no file_ending; expected the dataset.json of an nnU-Net data set.")
    try:
        meaning = Channels.of_dataset(dataset_json)
    except InputError as error:
        named = [text.replace("The dataset.json", str(settings[0])) for text in error.errors]
        raise InputError([*errors, *named]) from error
    cases = sorted(set().union(*files.values()))
    for name, of in files.items():
        lacking = [case for case in cases if case not in of]
        if of and lacking:
            errors.append(
                f"{name} has no probabilities of {first_few(lacking)}, which another member has. Predict these cases "
                f"too, or move away the others' files."
            )
        errors += unsafe_ids(of, name)
    ending = str(dataset_json.get("file_ending", ""))
    first = next(iter(files.values()))
    segmentations = {case: path.with_name(f"{case}{ending}") for case, path in first.items()}
    errors += [
        f"{path} does not exist; nnU-Net writes it with the probabilities. Predict the case again."
        for path in segmentations.values()
        if not path.is_file()
    ]
    for path in (path for of in files.values() for path in of.values()):
        try:
            shape = read_shape(path)
        except InputError as error:
            errors += error.errors
            continue
        if shape[0] != meaning.count:
            what = "labels with the background" if meaning.exclusive else "regions"
            errors.append(f"{path} has {shape[0]} channels; expected {meaning.count}, the {what} of {settings[0]}.")
    if errors:
        raise InputError(list(dict.fromkeys(errors)))
    together = {case: tuple(of[case] for of in files.values()) for case in cases}
    return Predicted(tuple(files), dataset_json, together, segmentations, images)


def _settings_errors(settings: Sequence[Path]) -> list[str]:
    """Return a message for every difference in labels that changes the meaning of a channel between members."""
    errors = []
    read = {path: read_json(path) for path in dict.fromkeys(settings)}
    first, *others = read
    for other in others:
        for entry in ("labels", "regions_class_order"):
            ours, theirs = (read[path].get(entry) for path in (first, other))
            # Compare as text, because the order of the labels is the order of the channels.
            if json.dumps(ours) != json.dumps(theirs):
                errors.append(
                    f"{entry} is {theirs} in {other}, and {ours} in {first}; expected the same. Name only predictions "
                    f"of models that were trained with the same labels."
                )
    return errors


# --- one case --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Maps:
    """Uncertainty maps (z, y, x) of one case.

    Attributes:
        segmentation: Label map of the mean probabilities.
        members: Label map of each member.
        entropy: Entropy of the mean probabilities, from 0 (certain) to 1 (all labels equally probable; for regions,
            every region has a probability of 0.5).
        mutual_information: Entropy of the mean minus the members' mean entropy, on the same scale. It measures the
            disagreement between members without the uncertainty of each member. 0 for a single member.
        disagreement: Share of members whose label differs from the segmentation.
        region_entropy: Binary entropy of each region, 0 to 1 bits; only for regions, not for labels.
        object_entropy: Mean binary entropy of each label or region within the segmentation's label or region, bits; NaN
            if that is empty.
    """

    segmentation: NDArray[Any]
    members: tuple[NDArray[Any], ...]
    entropy: NDArray[np.float32]
    mutual_information: NDArray[np.float32]
    disagreement: NDArray[np.float32]
    region_entropy: Mapping[str, NDArray[np.float32]]
    object_entropy: Mapping[str, float]


def uncertainty_maps(members: Sequence[Iterable[NDArray[np.float32]]], meaning: Channels) -> Maps:
    """Compute entropy and disagreement of the probabilities that several members predict for a case.

    Labels exclude each other (softmax): the entropy is -sum p log p over the background and all labels, divided by the
    log of their number. Regions do not (sigmoid): each has a binary entropy, -p log p - (1 - p) log(1 - p), divided by
    log 2. The map is their mean, which is the entropy of independent regions divided by its maximum.

    Args:
        members: The channels (z, y, x) of each member in the file's order; they are read one by one.
        meaning: Meaning of the channels.

    Source:
        Gal, "Uncertainty in deep learning", 2016 (predictive entropy, mutual information); Lakshminarayanan et al.,
        NeurIPS 2017 (of ensembles); Mehrtash et al., IEEE TMI 2020 (mean binary entropy within the object).
    """
    painters = [Painter(meaning) for _ in members]
    together = Painter(meaning)
    names = {place: name for name, place in meaning.place.items()}
    total: NDArray[np.float32] = np.zeros(1, np.float32)
    of_members: NDArray[np.float32] = np.zeros(1, np.float32)
    means: dict[str, NDArray[np.float32]] = {}
    for place, channels in enumerate(zip(*members, strict=True)):
        mean = np.zeros_like(channels[0])
        for painter, channel in zip(painters, channels, strict=True):
            painter.add(channel)
            mean += channel
            of_members = of_members + _information(channel, meaning.exclusive)
        mean /= np.float32(len(channels))
        together.add(mean)
        total = total + _information(mean, meaning.exclusive)
        if not meaning.exclusive:
            means[names[place]] = mean
    highest = math.log(meaning.count) if meaning.exclusive else meaning.count * math.log(2)
    entropy: NDArray[np.float32] = np.clip(total / np.float32(highest), 0, 1)
    # Rounding may make it negative.
    mutual: NDArray[np.float32] = np.clip((total - of_members / np.float32(len(painters))) / np.float32(highest), 0, 1)
    if len(painters) == 1:
        mutual = np.zeros_like(entropy)
    disagreement = np.zeros_like(entropy)
    for painter in painters:
        disagreement += painter.labels != together.labels
    disagreement /= np.float32(len(painters))
    object_entropy = {}
    for name, values in meaning.regions.items():
        within = np.isin(together.labels, values)
        # Within the segmentation of a label, the label's probability is the highest one.
        probability = (together.best if meaning.exclusive else means[name])[within].astype(np.float64)
        bits = _information(probability, exclusive=False) / math.log(2)
        object_entropy[name] = float(bits.mean()) if bits.size else math.nan
    return Maps(
        together.labels,
        tuple(painter.labels for painter in painters),
        entropy,
        mutual,
        disagreement,
        {
            name: np.asarray(_information(mean, exclusive=False) / np.float32(math.log(2)), np.float32)
            for name, mean in means.items()
        },
        object_entropy,
    )


def _information(probability: NDArray[Any], exclusive: bool) -> NDArray[Any]:
    """Return a channel's contribution to the entropy, nats: -p log p of a label, or a region's binary entropy."""
    from scipy.special import entr

    part = np.zeros_like(probability)
    # Saves time: most voxels are cropped away before prediction and have a probability of exactly 0 or 1.
    unsure = (probability > 0) & (probability < 1)
    values = probability[unsure]
    part[unsure] = entr(values) if exclusive else entr(values) + entr(1 - values)
    return part


def region_numbers(maps: Maps, meaning: Channels, spacing: Sequence[float]) -> dict[str, dict[str, float]]:
    """Compute the columns of the table for every label or region; NaN if undefined.

    Args:
        maps: Maps of the case.
        meaning: Meaning of the channels.
        spacing: Voxel size, mm.

    Source:
        Roy et al., "Bayesian QuickNAT", NeuroImage 2019 (agreement between samples and variation of volumes as quality
        measures).
    """
    numbers = {}
    several = len(maps.members) > 1
    for name, values in meaning.regions.items():
        within = np.isin(maps.segmentation, values)
        masks = [np.isin(labels, values) for labels in maps.members]
        sizes = [int(mask.sum()) for mask in masks]
        dices = [dice(first, second) for first, second in combinations(masks, 2)]
        mean_size = sum(sizes) / len(sizes)
        size = int(within.sum())
        numbers[name] = {
            "volume_ml": size * math.prod(spacing) / 1000,
            "entropy": maps.object_entropy[name],
            "mutual_information": float(maps.mutual_information[within].mean()) if several and size else math.nan,
            "disagreement": float(np.mean([1 - mask[within].mean() for mask in masks]))
            if several and size
            else math.nan,
            "dice_mean": float(np.mean(dices)) if dices else math.nan,
            "dice_lowest": min(dices) if dices else math.nan,
            "volume_cv": float(np.std(sizes, ddof=1)) / mean_size if several and mean_size else math.nan,
        }
    return numbers


@dataclass(frozen=True)
class _Task:
    """Everything that a worker process needs to write a case."""

    case: str
    probabilities: tuple[Path, ...]
    segmentation: Path
    images: Sequence[Path]
    dataset_json: Mapping[str, Any]
    output: Path


def _write_case(task: _Task) -> dict[str, Any]:
    """Write the maps and the figure of a case; return its entry in the table."""
    meaning = Channels.of_dataset(task.dataset_json)
    reader = reader_for(task.dataset_json, [task.segmentation])
    labels = read_labels(task.segmentation, reader)
    if affine_of(labels.properties) is None:
        raise InputError(
            [f"{task.segmentation} has no geometry; expected a volume in a format that has one, like .nii.gz."]
        )
    errors = [
        error
        for path in task.probabilities
        for error in meaning.shape_errors(path, read_shape(path), labels.voxels.shape, task.segmentation)
    ]
    image = None
    channel_name = ""
    if task.images:
        image, channel_name = _image_to_show(task, reader)
        here = standing(labels.voxels, labels.properties)[0].shape
        if image.shape != here:
            errors.append(
                f"{task.images[0]} has shape {format_shape(image.shape)}; expected {format_shape(here)} like "
                f"{task.segmentation}."
            )
    if errors:
        raise InputError(errors)
    maps = uncertainty_maps([iterate_channels(path) for path in task.probabilities], meaning)
    numbers = region_numbers(maps, meaning, labels.spacing)
    files = _write_maps(task, maps, labels.properties)
    files["picture"] = _draw(task, maps, meaning, numbers, labels.properties, image, channel_name).name
    return {"id": task.case, "regions": without_nan(numbers), "files": files}


def _write_maps(task: _Task, maps: Maps, properties: Mapping[str, Any]) -> dict[str, str]:
    volumes: dict[str, NDArray[Any]] = {"segmentation": maps.segmentation, "entropy": maps.entropy}
    parts = file_parts(maps.region_entropy)
    volumes |= {f"entropy_{parts[name]}": volume for name, volume in maps.region_entropy.items()}
    if len(maps.members) > 1:
        volumes |= {"mutual_information": maps.mutual_information, "disagreement": maps.disagreement}
    return {
        name: write_map(task.output / f"{task.case}_{name}.nii.gz", volume, properties).name
        for name, volume in volumes.items()
    }


def _image_to_show(task: _Task, reader: type) -> tuple[NDArray[Any], str]:
    """Return the image channel to show, in LPS orientation, and its name."""
    from nnunet_conres.evaluation.figures import channels_to_show

    names = task.dataset_json.get("channel_names", task.dataset_json.get("modality", {}))
    named = [str(names.get(str(number), f"channel {number}")) for number in range(len(task.images))]
    channel = channels_to_show(named, len(task.images))[0]
    return read_standing(task.images[channel], reader)[0], named[channel]


def _draw(
    task: _Task,
    maps: Maps,
    meaning: Channels,
    numbers: Mapping[str, Mapping[str, float]],
    properties: Mapping[str, Any],
    image: NDArray[Any] | None,
    channel_name: str,
) -> Path:
    from nnunet_conres.evaluation.figures import save_figure
    from nnunet_conres.evaluation.uncertainty_figures import uncertainty_figure

    several = len(maps.members) > 1
    key, what = ("dice_mean", "Dice between members") if several else ("entropy", "Entropy (bits)")
    found = [f"{name} {of[key]:.3f}" for name, of in numbers.items() if not math.isnan(of[key])]
    segmentation, spacing = standing(maps.segmentation, properties)
    figure = uncertainty_figure(
        segmentation,
        standing(maps.entropy, properties)[0],
        standing(maps.disagreement, properties)[0] if several else None,
        regions=meaning.regions,
        image=image,
        channel=channel_name,
        spacing=spacing,
        title=task.case,
        subtitle=f"{what}: {first_few(found)}" if found else "empty segmentation",
    )
    return save_figure(figure, task.output / f"{task.case}_uncertainty.png", dpi=150)


# --- all cases -------------------------------------------------------------------------------------------------------


def write_uncertainty(
    predicted: Predicted, output_folder: str | Path, *, processes: int = 1, progress: bool = True
) -> Uncertainty:
    """Write maps, figures and a table of predicted cases.

    Args:
        predicted: Result of `find_predicted` or `find_held_out`.
        output_folder: Receives CASE_segmentation.nii.gz, CASE_entropy.nii.gz, for regions CASE_entropy_REGION.nii.gz,
            for two or more members CASE_mutual_information.nii.gz and CASE_disagreement.nii.gz, CASE_uncertainty.png,
            and uncertainty.json and uncertainty.csv; created if necessary.
        processes: Number of cases processed in parallel.
        progress: Whether to show a progress bar on stderr.

    Raises:
        InputError: The output folder contains the predictions, or files can't be read or do not match. In the latter
            case, all valid cases are written first.
    """
    output = Path(output_folder)
    sources = {path.parent.resolve() for files in predicted.probabilities.values() for path in files}
    if output.resolve() in sources:
        raise InputError([f"{output} contains the predictions; choose another output folder."])
    tasks = [
        _Task(
            case, files, predicted.segmentations[case], predicted.images.get(case, ()), predicted.dataset_json, output
        )
        for case, files in predicted.probabilities.items()
    ]
    with writing(output):
        cases: list[dict[str, Any]] = []
        errors: list[str] = []
        for result in try_cases(_write_case, tasks, processes, "Uncertainty", progress):
            if isinstance(result, InputError):
                errors += result.errors
            else:
                cases.append(result)
        meaning = Channels.of_dataset(predicted.dataset_json)
        content = {
            "format": 1,
            "nnunet_conres": __version__,
            "members": list(predicted.members),
            "probabilities": "labels (softmax)" if meaning.exclusive else "regions (sigmoid)",
            "regions": list(meaning.regions),
            "columns": dict(COLUMNS),
            "cases": cases,
        }
        table, rows = output / TABLE, output / "uncertainty.csv"
        values = ((case["id"], region, of) for case in cases for region, of in case["regions"].items())
        cells = ([case, region, *(of[key] for key in COLUMNS)] for case, region, of in values)
        write_csv(rows, [["case", "region", *COLUMNS], *cells])
        write_json(table, content)
    if errors:
        shown = "\n".join(f"  - {message}" for message in errors)
        raise InputError(f"{len(cases)} of {len(tasks)} cases are in {output}; the others can't be read:\n{shown}")
    return Uncertainty(content, table, rows)
