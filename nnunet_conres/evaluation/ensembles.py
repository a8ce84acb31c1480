"""Ensembles of any number of models: the mean of their probabilities, as nnU-Net does for two models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.evaluation.cache import state_of
from nnunet_conres.evaluation.finding import CompareOptions, Found
from nnunet_conres.evaluation.predictions import Contender, Prediction
from nnunet_conres.evaluation.probabilities import read_probabilities
from nnunet_conres.files import read_json, write_json
from nnunet_conres.folders import clear_leftovers
from nnunet_conres.images.volumes import write_labels
from nnunet_conres.parallel import map_cases
from nnunet_conres.unpickling import read_pickle

_SOURCES = "sources.json"


def add_ensembles(found: Found, output: Path, options: CompareOptions) -> Found:
    """Add ensembles of all models that have probabilities, and warnings about ensembles that are not possible.

    Args:
        found: The models and their predictions.
        output: Folder of the comparison; the label maps go into its folder ``ensembles``.
        options: How to compare.

    Returns:
        `found` with the ensembles after the models.

    Raises:
        InputError: The probabilities of a case do not fit each other, or a file can't be read.
    """
    if not options.ensembles:
        return found
    warnings = list(found.warnings)
    file_ending = str(found.dataset_json["file_ending"])
    able = [
        model
        for model in found.models
        if all(model.predictions[case].probabilities(file_ending).is_file() for case in found.cases)
    ]
    if len(found.models) > 1 and len(able) < len(found.models):
        without = [model.name for model in found.models if model not in able]
        lines = [f"No ensemble with {', '.join(without)}: probabilities are missing. Run these commands, or add --run:"]
        for missing in found.missing_probabilities:
            lines.append(missing.remedy if missing.command else missing.as_text)
        warnings.append("\n".join(lines))
    differences = settings_differences(able, found.settings) if len(able) > 1 else []
    if differences:
        warnings.append("No ensembles. " + " ".join(differences))
    ensembles = [
        build_ensemble(
            f"e{number}",
            members,
            found.cases,
            output / "ensembles" / "_".join(member.key for member in members),
            settings_folder=found.settings[members[0].key],
            processes=options.processes,
            progress=options.progress,
        )
        for number, members in enumerate(ensemble_members(able) if not differences else ())
    ]
    return replace(found, models=[*found.models, *ensembles], warnings=warnings)


def ensemble_members(models: Sequence[Contender]) -> list[tuple[Contender, ...]]:
    """Return the members of each ensemble: all pairs, as in nnU-Net, and all models together."""
    members: list[tuple[Contender, ...]] = list(combinations(models, 2))
    if len(models) > 2:
        members.append(tuple(models))
    return members


def settings_differences(models: Sequence[Contender], settings: Mapping[str, Path]) -> list[str]:
    """Return the reasons why the probabilities of models can't be averaged.

    Args:
        models: The models.
        settings: Folder with the dataset.json and plans.json that each model predicted with, by model key.

    Returns:
        A message for every difference that changes the meaning of the probabilities. If files can't be read, messages
        about these only.
    """
    read: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    errors = []
    for model in models:
        folder = settings[model.key]
        try:
            read[model.key] = (read_json(folder / "dataset.json"), read_json(folder / "plans.json"))
        except InputError as error:
            errors.append(f"{model.name} can't be averaged with others: {error}")
    if errors:
        return errors
    first = models[0]
    for model in models[1:]:
        for index, entry, file in (
            (0, "labels", "dataset.json"),
            (0, "regions_class_order", "dataset.json"),
            (0, "file_ending", "dataset.json"),
            (1, "image_reader_writer", "plans.json"),
        ):
            ours, theirs = read[first.key][index].get(entry), read[model.key][index].get(entry)
            if ours != theirs:
                errors.append(
                    f"{first.name} and {model.name} can't be averaged: {entry} in {file} is {ours} and {theirs}."
                )
    return errors


def build_ensemble(
    key: str,
    members: Sequence[Contender],
    cases: Sequence[str],
    output_folder: Path,
    *,
    settings_folder: Path,
    processes: int = 1,
    progress: bool = True,
) -> Contender:
    """Average the members' probabilities with equal weights, and write the label maps.

    A case is skipped if its label map exists and neither the map nor the members' files have changed since.

    Args:
        key: The ensemble's key.
        members: Two models or more, with probabilities for all cases.
        cases: Ids of the cases.
        output_folder: Folder for the label maps.
        settings_folder: Folder with the dataset.json and plans.json of the members.
        processes: Number of processes.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The ensemble.

    Raises:
        InputError: The probabilities of a case do not fit each other, or a file can't be read.
    """
    name = " + ".join(member.name for member in members)
    file_ending = str(read_json(settings_folder / "dataset.json")["file_ending"])
    with file_errors(output_folder):
        output_folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(output_folder)
    try:
        done = read_json(output_folder / _SOURCES)
    except InputError:
        done = {}
    sources = {case: [state_of(path) for path in _files(members, case, file_ending)] for case in cases}
    targets = {case: output_folder / f"{case}{file_ending}" for case in cases}
    todo = [
        case
        for case in cases
        if not targets[case].is_file() or done.get(case) != [*sources[case], state_of(targets[case])]
    ]
    jobs = [
        ([str(path) for path in _files(members, case, file_ending)], str(output_folder / case), str(settings_folder))
        for case in todo
    ]
    for case, _ in zip(todo, map_cases(_average_case, jobs, processes, f"Ensemble {name}", progress), strict=True):
        done[case] = [*sources[case], state_of(targets[case])]
        write_json(output_folder / _SOURCES, done)
    predictions = {case: Prediction(case, targets[case], members[0].predictions[case].fold) for case in cases}
    return Contender(key, name, predictions, folds=members[0].folds, members=tuple(member.key for member in members))


def _files(members: Sequence[Contender], case: str, file_ending: str) -> Iterator[Path]:
    return (member.predictions[case].probabilities(file_ending) for member in members)


def _average_case(job: tuple[list[str], str, str]) -> None:
    """Average the probabilities of a case, and write its label map with nnU-Net's own functions."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    files, target, settings_folder = job
    settings = Path(settings_folder)
    dataset_json = read_json(settings / "dataset.json")
    plans = PlansManager(read_json(settings / "plans.json"))
    total: Any = None
    for file in files:
        probabilities = read_probabilities(Path(file))
        if total is not None and total.shape != probabilities.shape:
            raise InputError(
                f"{file} has probabilities of shape {probabilities.shape}, {files[0]} of shape {total.shape}; "
                f"expected probabilities of the same image and labels."
            )
        total = probabilities if total is None else total + probabilities
    properties_file = Path(files[0]).with_suffix(".pkl")
    try:
        properties = read_pickle(properties_file)
    except InputError as error:
        raise InputError(f"{error} nnU-Net writes it with the probabilities; predict the case again.") from error
    labels = plans.get_label_manager(dataset_json).convert_probabilities_to_segmentation(total / len(files))
    write_labels(Path(f"{target}{dataset_json['file_ending']}"), labels, properties, plans.image_reader_writer_class)
