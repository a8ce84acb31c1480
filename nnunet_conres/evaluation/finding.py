"""First stage of a comparison: find predictions, references and images of the models, and check them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.metrics import MetricOptions
from nnunet_conres.evaluation.predictions import (
    Contender,
    Missing,
    NamedModel,
    Search,
    iterate_missing,
    other_splits,
    same_cases,
    search_cross_validation,
    search_test_set,
)
from nnunet_conres.files import read_json
from nnunet_conres.folders import list_files
from nnunet_conres.nnunet import PREPROCESSED, RAW, folder_from_environment
from nnunet_conres.text import first_few


@dataclass(frozen=True)
class CompareOptions:
    """Options of a comparison.

    Attributes:
        intersection: Whether to compare on the common cases if the models have different ones.
        ensembles: Whether to add ensembles, which average the probabilities of models.
        calibration: Whether to measure the calibration of models that have probabilities.
        run: Whether to run the commands that make missing predictions and probabilities.
        device: Device of those commands; None for cuda if there is a GPU, else cpu.
        metrics: Conventions of the metrics.
        group_pattern: Regular expression that finds the group in a case id, for cases that are not independent; None
            for the patients in BraTS ids since 2023.
        postprocessing: Files written by `nnunet-conres postprocess fit`, to compare each model with its post-processed
            version: one file for all models, or files by model name.
        processes: Number of cases scored in parallel.
        progress: Whether to show progress bars on stderr.
    """

    intersection: bool = False
    ensembles: bool = True
    calibration: bool = True
    run: bool = False
    device: str | None = None
    metrics: MetricOptions = field(default_factory=MetricOptions)
    group_pattern: str | None = None
    postprocessing: Path | Mapping[str, Path] | None = None
    processes: int = 1
    progress: bool = True


@dataclass(frozen=True)
class Found:
    """The models, cases and files of a comparison, checked and complete.

    Attributes:
        kind: "cross-validation" or "test".
        dataset_name: Name of the data set.
        dataset_json: Content of its dataset.json.
        models: The models, the baseline first.
        cases: Ids of the cases.
        references: True label map by case.
        images: Image files by case, one per channel; cases without images are absent.
        settings: Folder with the dataset.json and plans.json that each model predicted with, by model key.
        groups: Group of every case; None if every case is its own group.
        missing_probabilities: Missing probabilities that ensembles need, with the commands that make them.
        left_out: Ids of cases that are not compared although a model predicted them or should have, or, in a test set,
            although they have a reference.
        warnings: Warnings of the search.
    """

    kind: str
    dataset_name: str
    dataset_json: Mapping[str, Any]
    models: list[Contender]
    cases: list[str]
    references: Mapping[str, Path]
    images: Mapping[str, Sequence[Path]]
    settings: Mapping[str, Path]
    groups: Mapping[str, str] | None
    missing_probabilities: Sequence[Missing]
    left_out: Sequence[str]
    warnings: list[str]

    @property
    def folds(self) -> list[int]:
        """The folds of the first model that held out the compared cases."""
        folds = {self.models[0].predictions[case].fold for case in self.cases}
        return sorted(fold for fold in folds if fold is not None)


def find_cross_validation(
    dataset_name: str, names: Sequence[NamedModel], folds: Sequence[int], options: CompareOptions
) -> Found:
    """Find the predictions of models for the cases that their folds held out.

    Args:
        dataset_name: Full name of the data set.
        names: The models, the baseline first.
        folds: Folds that every model must have.
        options: How to compare.

    Raises:
        InputError: Something is missing or inconsistent; lists all errors, with the commands that help.
    """

    def search(device: str) -> Search:
        return search_cross_validation(dataset_name, names, folds, device=device)

    found = _search_or_make(search, options, len(names))
    references = _reference_folder(dataset_name)
    if references is None:
        raise InputError(
            f"{dataset_name} has no references: no labelsTr in nnUNet_raw, no gt_segmentations in nnUNet_preprocessed."
        )
    settings = {model.key: model.folder for model in found.models if model.folder is not None}
    dataset_json = read_json(settings[found.models[0].key] / "dataset.json")
    images = raw_images(dataset_name)
    return _settle("cross-validation", dataset_name, dataset_json, found, references, images, settings, options)


def find_test_set(
    predictions: Mapping[str, str | Path],
    references: str | Path,
    dataset_json: str | Path,
    options: CompareOptions,
    *,
    images: str | Path | None = None,
    model_folders: Mapping[str, str | Path] | None = None,
) -> Found:
    """Find predictions of the same images in folders, one per model.

    Args:
        predictions: Folder by model name, the baseline first.
        references: Folder with the true label maps.
        dataset_json: The data set's dataset.json.
        options: How to compare.
        images: Folder with the images, named as nnU-Net names them, for the pictures of the report.
        model_folders: Trained model folder by model name, for costs and curves.

    Raises:
        InputError: Something is missing or inconsistent; lists all errors.
    """
    content = read_json(Path(dataset_json))
    if "file_ending" not in content:
        raise InputError(f"{dataset_json} has no file_ending; expected the dataset.json of an nnU-Net data set.")
    file_ending = str(content["file_ending"])
    folders = {name: Path(folder) for name, folder in predictions.items()}
    trained = {name: Path(folder) for name, folder in (model_folders or {}).items()}
    missing = [
        f"{folder} is not a folder; expected {what}."
        for folder, what in ((references, "the reference label maps"), (images, "images"))
        if folder is not None and not Path(folder).is_dir()
    ]

    def search(device: str) -> Search:
        found = search_test_set(folders, trained, file_ending, device=device)
        found.errors[:0] = missing
        return found

    found = _search_or_make(search, options, len(folders))
    settings = {model.key: folders[model.name] for model in found.models}
    shown = {} if images is None else images_by_case(Path(images), file_ending)
    name = str(content.get("name", Path(dataset_json).resolve().parent.name))
    return _settle("test", name, content, found, Path(references), shown, settings, options)


def available_device(*, certain: bool) -> str:
    """Return cuda or cpu. With `certain`, ask PyTorch, which takes seconds to import."""
    if certain:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if shutil.which("nvidia-smi") and not version("torch").endswith("+cpu") else "cpu"


def _search_or_make(search: Callable[[str], Search], options: CompareOptions, number: int) -> Search:
    """Search the predictions of `number` models; with `options.run`, run the commands that make missing files.

    Raises:
        InputError: Predictions are missing or inconsistent, or a command failed.
    """
    device = options.device or available_device(certain=options.run)
    found = search(device)
    if options.run and not found.errors:
        todo = list(iterate_missing(found, probabilities=options.ensembles and number > 1))
        unknown = [missing for missing in todo if not missing.is_known]
        if unknown:
            raise InputError(
                [
                    f"--run cannot complete this command: pass the model's folder with --model, run the command "
                    f"yourself, or omit --run to compare without the ensemble. {missing.as_text}"
                    if missing.command
                    else missing.as_text
                    for missing in unknown
                ]
            )
        for missing in todo:
            print(missing.as_text, flush=True)
            try:
                code = subprocess.run(missing.command, check=False).returncode
            except FileNotFoundError as error:
                raise InputError(
                    f"{missing.command[0]} is not installed here. Run this in an environment with nnU-Net."
                ) from error
            if code != 0:
                raise InputError(f"The command failed with exit code {code}: {missing.remedy}")
        if todo:
            found = search(device)
    errors = found.errors + [missing.as_text for missing in found.missing]
    if not options.intersection:
        errors += [f"{gap.as_text} Or compare on the common cases with --intersection." for gap in found.gaps]
    if errors:
        raise InputError(errors)
    return found


def _settle(
    kind: str,
    dataset_name: str,
    dataset_json: Mapping[str, Any],
    search: Search,
    reference_folder: Path,
    images: Mapping[str, Sequence[Path]],
    settings: Mapping[str, Path],
    options: CompareOptions,
) -> Found:
    file_ending = str(dataset_json["file_ending"])
    references = {path.name.removesuffix(file_ending): path for path in list_files(reference_folder, file_ending)}
    cases, errors = same_cases(search.models, list(references), intersection=options.intersection)
    errors += _other_labels(search.models, dataset_json, settings)
    groups, ungrouped = _groups(cases, options.group_pattern)
    errors += ungrouped
    if errors:
        raise InputError(errors)
    warnings = []
    predicted = {case for model in search.models for case in model.predictions}
    left_out = predicted - set(cases)
    if options.intersection:
        warnings += [f"{gap.what} Left out for all models." for gap in search.gaps]
        if left_out:
            warnings.append(f"Compared on the {len(cases)} common cases only; left out: {first_few(sorted(left_out))}.")
        others = other_splits(search.models)
        if others:
            warnings.append(
                f"{first_few(others)}: trained on other splits than {search.models[0].name}. Each case was held "
                f"out, but the models learned from different cases."
            )
    if kind == "test":
        unpredicted = sorted(set(references) - predicted)
        left_out |= set(unpredicted)
        if unpredicted:
            warnings.append(f"{first_few(unpredicted)}: there is a reference, but no model predicted it.")
    return Found(
        kind,
        dataset_name,
        dataset_json,
        search.models,
        cases,
        references,
        images,
        settings,
        groups,
        search.missing_probabilities,
        sorted(left_out | {case for gap in search.gaps for case in gap.cases}),
        warnings,
    )


def _groups(cases: Sequence[str], pattern: str | None) -> tuple[dict[str, str] | None, list[str]]:
    from nnunet_conres.datasets.splits import compile_group, group_cases

    compiled, errors = compile_group(pattern)
    if errors:
        return None, errors
    groups, errors = group_cases(cases, compiled)
    return (groups if len(set(groups.values())) < len(groups) else None), errors


def _other_labels(
    models: Sequence[Contender], dataset_json: Mapping[str, Any], settings: Mapping[str, Path]
) -> Iterator[str]:
    for model in models:
        path = settings[model.key] / "dataset.json"
        if path.is_file() and read_json(path).get("labels") != dataset_json.get("labels"):
            yield (
                f"{model.name} was trained with the labels {read_json(path).get('labels')}, but the comparison uses "
                f"{dataset_json.get('labels')}. Their scores cannot be compared."
            )


def _reference_folder(dataset_name: str) -> Path | None:
    for variable, name in ((RAW, "labelsTr"), (PREPROCESSED, "gt_segmentations")):
        root = folder_from_environment(variable)
        if root is not None and (root / dataset_name / name).is_dir():
            return root / dataset_name / name
    return None


def raw_images(dataset_name: str) -> dict[str, list[Path]]:
    """Return the training images of a data set in nnUNet_raw by case, one file per channel; empty if not there."""
    raw = folder_from_environment(RAW)
    if raw is None or not (raw / dataset_name / "imagesTr").is_dir():
        return {}
    try:
        file_ending = str(read_json(raw / dataset_name / "dataset.json")["file_ending"])
    except (InputError, KeyError):
        return {}
    return images_by_case(raw / dataset_name / "imagesTr", file_ending)


def images_by_case(folder: Path, file_ending: str) -> dict[str, list[Path]]:
    """Return the images of a folder by case, one file per channel. Files not named as for nnU-Net are skipped."""
    cases: dict[str, list[Path]] = {}
    for path in list_files(folder, file_ending):
        stem = path.name.removesuffix(file_ending)
        if stem[-5:-4] == "_" and stem[-4:].isdigit():
            cases.setdefault(stem[:-5], []).append(path)
    return cases
