"""Search for the predictions of models: of a cross-validation, or in folders of a test set."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import Final

from nnunet_conres.case_ids import unsafe_ids
from nnunet_conres.errors import InputError
from nnunet_conres.families import TRAINERS
from nnunet_conres.files import read_json
from nnunet_conres.folders import list_files
from nnunet_conres.nnunet import (
    PREPROCESSED,
    RESULTS,
    SPLITS_FILE,
    Model,
    folder_from_environment,
    not_set,
    plans_names,
    stock_trainers,
)
from nnunet_conres.text import did_you_mean, first_few

PROBABILITIES_ENDING: Final = ".npz"
# Files that nnU-Net writes next to predictions or into a model's folder.
_DATASET_JSON, _PLANS_JSON, _SUMMARY = "dataset.json", "plans.json", "summary.json"
# Placeholders in commands for paths that only the user knows.
_UNKNOWN_IMAGES, _UNKNOWN_MODEL = "IMAGES", "MODEL_FOLDER"


@dataclass(frozen=True)
class NamedModel(Model):
    """A model that may have a name given by the user.

    Attributes:
        label: The user's name for the model, or None.
    """

    label: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Prediction:
    """A model's prediction of a case.

    Attributes:
        case_id: The case.
        labels: File of the label map.
        fold: The fold whose validation predicted the case; None for a test set.
    """

    case_id: str
    labels: Path
    fold: int | None = None

    def probabilities(self, file_ending: str) -> Path:
        """Return the path where nnU-Net writes the probabilities if asked to. The file may not exist."""
        return self.labels.with_name(self.labels.name.removesuffix(file_ending) + PROBABILITIES_ENDING)


@dataclass(frozen=True)
class Contender:
    """A model, a post-processed model or an ensemble of models, with its predictions.

    Attributes:
        key: Short name for files and JSON: m0, m1, ... for models, e0, e1, ... for ensembles, p0, p1, ... for
            post-processed models.
        name: Display name.
        predictions: By case id, sorted.
        folder: The trained model's folder, with plans.json and folds; None if unknown.
        model: nnU-Net's names of the model; None if unknown.
        folds: The folds that made the predictions.
        members: Keys of an ensemble's members, or of the model that was post-processed; empty for a single model.
    """

    key: str
    name: str
    predictions: Mapping[str, Prediction]
    folder: Path | None = None
    model: Model | None = None
    folds: tuple[int | str, ...] = ()
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Missing:
    """Missing predictions or probabilities, and how to make them.

    Attributes:
        what: What is missing, a sentence.
        command: The nnU-Net command that makes them, as a list of arguments; empty if no single command does.
        instead: What to do if there is no command, a sentence.
        cases: The cases affected, if only some cases of a fold are.
    """

    what: str
    command: tuple[str, ...] = ()
    instead: str = ""
    cases: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """The command, quoted for a shell, or what to do instead."""
        return shlex.join(self.command) if self.command else self.instead

    @property
    def as_text(self) -> str:
        """What is missing and how to make it."""
        return f"{self.what} Run: {self.remedy}" if self.command else f"{self.what} {self.remedy}"

    @property
    def is_known(self) -> bool:
        """Whether there is a command without placeholders, which can be run as it is."""
        return bool(self.command) and _UNKNOWN_IMAGES not in self.command and _UNKNOWN_MODEL not in self.command


@dataclass
class Search:
    """Result of a search for predictions.

    Attributes:
        models: The complete models.
        errors: Errors that prevent a comparison.
        missing: Folds without usable validation predictions; they prevent a comparison too.
        gaps: Missing predictions of single cases; without them only the common cases can be compared.
        missing_probabilities: Missing probabilities; only ensembles, calibration and thresholds need them.
    """

    models: list[Contender] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    gaps: list[Missing] = field(default_factory=list)
    missing_probabilities: list[Missing] = field(default_factory=list)


# --- names ------------------------------------------------------------------------------------------------------------


def parse_model_names(
    trainers: Sequence[str], plans: Sequence[str], configurations: Sequence[str]
) -> tuple[list[NamedModel], list[str]]:
    """Parse the models named on a command line.

    Args:
        trainers: TRAINER, TRAINER:PLANS or TRAINER:PLANS:CONFIGURATION each, optionally with NAME= before it.
        plans: Plans of the trainers that name none: one for all, or one for each trainer.
        configurations: Configurations, likewise.

    Returns:
        The models in the order of the trainers, and a message for every error.
    """
    errors = [
        f"{option} has {len(given)} values for {len(trainers)} trainers; expected one for all or one for each."
        for option, given in (("-p", plans), ("-c", configurations))
        if len(given) not in (1, len(trainers))
    ]
    names: list[NamedModel] = []
    for number, text in enumerate(trainers):
        label, equals, rest = text.rpartition("=")
        parts = rest.split(":")
        if len(parts) > 3 or not all(parts) or (equals and not label):
            errors.append(f"-tr {text} is not a model; expected [NAME=]TRAINER[:PLANS[:CONFIGURATION]].")
            continue
        given = [values[number] if number < len(values) else values[0] for values in (plans, configurations)]
        trainer, *others = parts
        own_plans, own_configuration = others + given[len(others) :]
        names.append(NamedModel(trainer, own_plans, own_configuration, label or None))
    doubled = {name.folder_name for name in names if names.count(name) > 1}
    if not doubled:
        # a name given by the user may equal another model's trainer
        shown = display_names(names)
        doubled = {name for name in shown if shown.count(name) > 1}
    errors += [f"{name} is named twice; expected every model once." for name in sorted(doubled)]
    return names, errors


def display_names(names: Sequence[NamedModel]) -> list[str]:
    """Return display names: the user's, else the trainer, with plans and configuration where these differ."""
    several_plans = len({name.plans for name in names}) > 1
    several_configurations = len({name.configuration for name in names}) > 1
    shown = []
    for name in names:
        parts = [name.trainer]
        parts += [name.plans] if several_plans else []
        parts += [name.configuration] if several_configurations else []
        shown.append(name.label if name.label is not None else " ".join(parts))
    return shown


# --- cross-validation -------------------------------------------------------------------------------------------------


def search_cross_validation(
    dataset_name: str, names: Sequence[NamedModel], folds: Sequence[int], *, device: str
) -> Search:
    """Find the validation predictions of trained models.

    Args:
        dataset_name: Full name of the data set.
        names: The models, the baseline first.
        folds: Folds that every model needs.
        device: Device for the suggested commands that make missing predictions.

    Returns:
        The models, without those that have an error.
    """
    found = Search()
    results = folder_from_environment(RESULTS)
    if results is None:
        found.errors.append(not_set(RESULTS))
        return found
    for number, (name, display_name) in enumerate(zip(names, display_names(names), strict=True)):
        folder = results / dataset_name / name.folder_name
        preprocessed = folder_from_environment(PREPROCESSED)
        plans_file = None if preprocessed is None else preprocessed / dataset_name / f"{name.plans}.json"
        if not folder.is_dir() and plans_file is not None and not plans_file.is_file():
            near = did_you_mean(name.plans, plans_names(plans_file.parent))
            found.errors.append(f"{display_name}: there are no plans {name.plans}, {plans_file} does not exist{near}")
            continue
        if not folder.is_dir() and (near := _other_trainer(name.trainer, folder.parent)):
            found.errors.append(f"{display_name}: there is no model {folder}{near}")
            continue
        file_ending = _file_ending(folder, found.errors) if folder.is_dir() else None
        predictions: dict[str, Prediction] = {}
        complete = file_ending is not None
        for number_of_fold in folds:
            train = name.training_command(dataset_name, number_of_fold, "-device", device)
            fold = _Fold(f"{display_name}, fold {number_of_fold},", number_of_fold, folder, train, plans_file)
            of_fold = _held_out(fold, file_ending, found)
            if of_fold is None:
                complete = False
                continue
            twice = sorted(set(of_fold) & set(predictions))
            if twice:
                found.errors.append(
                    f"{display_name} predicted {first_few(twice)} in more than one fold; each case has to be "
                    f"held out once."
                )
                complete = False
            predictions |= of_fold
        if complete:
            found.models.append(
                Contender(f"m{number}", display_name, dict(sorted(predictions.items())), folder, name, tuple(folds))
            )
    return found


def _other_trainer(name: str, models: Path) -> str:
    """Return a "did you mean" for an unknown trainer name close to a known one; empty for any other name."""
    trained = [model.trainer for folder in models.glob("*__*__*") if (model := Model.of_folder(folder))]
    known = [*trained, *TRAINERS, *stock_trainers()]
    near = did_you_mean(name, known)
    return "" if name in known or near == "." else near


@dataclass(frozen=True)
class _Fold:
    """A trained fold of a model."""

    name: str  # for messages
    number: int
    model: Path  # the model's folder
    train: tuple[str, ...]  # the training command
    plans_file: Path | None  # in nnUNet_preprocessed; None if that is not set

    @property
    def folder(self) -> Path:
        return self.model / f"fold_{self.number}"

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that nnU-Net's --val loads."""
        return self.folder / "checkpoint_final.pth"

    def missing(self, what: str, listed: Collection[str] | None) -> Missing:
        """Say how to make the fold's validation predictions.

        Args:
            what: What is missing, a sentence.
            listed: The fold's validation cases according to its summary.json; None if unknown.
        """
        if not self.checkpoint.is_file():
            train = shlex.join((*self.train, "--npz"))
            return Missing(
                what, instead=f"There is no {self.checkpoint} to predict with; train the fold again: {train}"
            )
        if self.plans_file is None or not self.plans_file.is_file():
            where = self.plans_file or "nnUNet_preprocessed, which is not set"
            return Missing(
                what,
                instead=f"The data set is not preprocessed here with the model's plans: {where} does not exist. Copy "
                f"{self.model / _PLANS_JSON} there, preprocess, then run: {self.validate}",
            )
        now = _cases_of_split(self.plans_file.with_name(SPLITS_FILE), self.number)
        if listed is not None and now is not None and set(now) != set(listed):
            return Missing(
                what,
                instead=f"{self.plans_file.with_name('splits_final.json')} differs from the splits of the model's "
                f"training, so a validation would predict cases that the model was trained on. Put the splits of the "
                f"training there, then run: {self.validate}",
            )
        return Missing(what, (*self.train, "--val", "--npz"))

    @property
    def validate(self) -> str:
        """The command that makes validation predictions, quoted for a shell."""
        return shlex.join((*self.train, "--val", "--npz"))


def _held_out(fold: _Fold, file_ending: str | None, found: Search) -> dict[str, Prediction] | None:
    """Return the validation predictions of a fold, None if it can't be compared; add errors and gaps to `found`."""
    validation = fold.folder / "validation"
    if not fold.checkpoint.is_file() and not validation.is_dir():
        found.errors.append(
            f"{fold.name} is not trained to the end: {fold.folder} has no checkpoint_final.pth and no validation. "
            f"Train it: {shlex.join((*fold.train, '--npz'))}"
        )
        return None
    if file_ending is None:
        return None
    listed = _listed_cases(validation / _SUMMARY, file_ending)
    if listed is None:
        found.missing.append(
            fold.missing(
                f"{fold.name} has no complete validation: {validation / _SUMMARY} is missing or damaged.", None
            )
        )
        return None
    predictions = _predictions(validation, file_ending, fold.number)
    if not predictions:
        found.missing.append(
            fold.missing(
                f"{fold.name} has none of the {len(listed)} predictions that its summary.json lists; a model that was "
                f"installed from a zip comes without them unless it was exported with --exp_cv_preds.",
                listed,
            )
        )
        return None
    unlisted = sorted(set(predictions) - set(listed))
    if unlisted:
        found.missing.append(
            Missing(
                f"{fold.name} has no complete validation: {validation} has {', '.join(unlisted)}, which its "
                f"summary.json does not list.",
                instead=f"Move away cases that the fold did not hold out. If it held them out, run: {fold.validate}",
            )
        )
        return None
    lost = sorted(set(listed) - set(predictions))
    if lost:
        gap = fold.missing(f"{fold.name} has no prediction of {', '.join(lost)}, which its summary.json lists.", listed)
        found.gaps.append(replace(gap, cases=tuple(lost)))
    if any(not prediction.probabilities(file_ending).is_file() for prediction in predictions.values()):
        found.missing_probabilities.append(fold.missing(f"{fold.name} has no probabilities.", listed))
    return predictions


def _listed_cases(summary: Path, file_ending: str) -> list[str] | None:
    """Return the cases that nnU-Net's validation predicted; None if the validation did not finish."""
    try:
        files = [str(case["prediction_file"]) for case in read_json(summary)["metric_per_case"]]
    except (InputError, KeyError, TypeError):
        return None
    # the paths may come from another operating system
    return [PureWindowsPath(file).name.removesuffix(file_ending) for file in files]


def _cases_of_split(splits_file: Path, fold: int) -> list[str] | None:
    """Return the validation cases of a fold in nnU-Net's splits file; None if the file does not list them."""
    try:
        return [str(case) for case in json.loads(splits_file.read_text(encoding="utf-8"))[fold]["val"]]
    except (OSError, ValueError, LookupError, TypeError):
        return None


# --- test set ---------------------------------------------------------------------------------------------------------


def search_test_set(
    folders: Mapping[str, Path], model_folders: Mapping[str, Path], file_ending: str, *, device: str
) -> Search:
    """Find predictions in folders that nnUNetv2_predict wrote.

    Args:
        folders: Folder of predictions by model name, the baseline first.
        model_folders: Folder of the trained model by the same names, if known: for costs, training curves, and the
            command that makes missing probabilities.
        file_ending: File ending of the predictions, as in dataset.json.
        device: Device for the suggested commands that make missing probabilities.

    Returns:
        The models, without those that have an error.
    """
    found = Search()
    for name in model_folders:
        if name not in folders:
            found.errors.append(f"--model {name}=...: expected a name of --predictions: {', '.join(folders)}.")
    for number, (name, folder) in enumerate(folders.items()):
        if not folder.is_dir():
            found.errors.append(f"{folder} is not a folder; expected the predictions of {name}.")
            continue
        predictions = _predictions(folder, file_ending, None)
        if not predictions:
            found.errors.append(f"{folder} has no file that ends in {file_ending}; expected predictions of {name}.")
            continue
        trained = model_folders.get(name)
        model: NamedModel | None = None
        folds: tuple[int | str, ...] = ()
        if trained is not None:
            model, folds = NamedModel.of_folder(trained), _trained_folds(trained)
            if model is None:
                found.errors.append(
                    f"{trained} is not the folder of a trained model; expected a folder with plans.json that is named "
                    f"TRAINER__PLANS__CONFIGURATION."
                )
                continue
        found.models.append(Contender(f"m{number}", name, dict(sorted(predictions.items())), trained, model, folds))
        if any(not prediction.probabilities(file_ending).is_file() for prediction in predictions.values()):
            found.missing_probabilities.append(
                Missing(f"{name} has no probabilities in {folder}.", _predict_command(folder, trained, folds, device))
            )
    return found


def _trained_folds(folder: Path) -> tuple[int | str, ...]:
    folds: list[int | str] = [*sorted(int(path.name[5:]) for path in folder.glob("fold_*") if path.name[5:].isdigit())]
    if not folds and (folder / "fold_all").is_dir():
        folds.append("all")
    return tuple(folds)


def _predict_command(folder: Path, trained: Path | None, folds: Sequence[int | str], device: str) -> tuple[str, ...]:
    """Return the command that predicts the folder again with probabilities; unknown paths are placeholders."""
    images = _UNKNOWN_IMAGES
    try:
        written = json.loads((folder / "predict_from_raw_data_args.json").read_text(encoding="utf-8"))
        if isinstance(written["list_of_lists_or_source_folder"], str):
            images = written["list_of_lists_or_source_folder"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    command: tuple[str, ...] = ("nnUNetv2_predict_from_modelfolder", "-i", images, "-o", str(folder))
    command += ("-m", _UNKNOWN_MODEL if trained is None else str(trained))
    if folds:
        command += ("-f", *map(str, folds))
    return (*command, "-device", device, "--save_probabilities")


# --- cases ------------------------------------------------------------------------------------------------------------


def same_cases(
    models: Sequence[Contender], references: Sequence[str], *, intersection: bool
) -> tuple[list[str], list[str]]:
    """Return the cases that all models are compared on.

    Args:
        models: The models.
        references: Ids of all cases with a reference.
        intersection: Whether to compare on the common cases if the models have different ones.

    Returns:
        The case ids, sorted, and a message for every error.
    """
    errors: list[str] = []
    everywhere = set.intersection(*(set(model.predictions) for model in models)) if models else set()
    for model in models:
        errors += unsafe_ids(model.predictions, model.name)
        extra = sorted(set(model.predictions) - everywhere)
        if extra and not intersection:
            without = [other.name for other in models if any(case not in other.predictions for case in extra)]
            errors.append(
                f"{model.name} has predictions of {first_few(extra)}, which are missing for {', '.join(without)}. A "
                f"comparison needs the same cases; predict the missing ones, or compare on the common cases with "
                f"--intersection."
            )
        folds = {model.predictions[case].fold for case in extra} - {None}
        if extra and folds and not intersection:
            errors.append(
                f"Folds {', '.join(map(str, sorted(f for f in folds if f is not None)))} of {model.name} held other "
                f"cases out than those of the other models: they were trained on different splits."
            )
    for model in models[1:]:
        moved = sorted(_in_other_folds(models[0], model) & everywhere)
        if moved and not intersection:
            errors.append(
                f"{model.name} and {models[0].name} held {first_few(moved)} out in different folds: they were trained "
                f"on different splits. Compare models of the same splits, or compare anyway with --intersection."
            )
    without_reference = sorted(everywhere - set(references))
    if without_reference:
        errors.append(
            f"There is no reference segmentation for {first_few(without_reference)}; expected one for every case."
        )
    if models and not everywhere:
        errors.append("The models have no case in common.")
    return sorted(everywhere), errors


def other_splits(models: Sequence[Contender]) -> list[str]:
    """Return the names of the models that predicted common cases in other folds than the first model."""
    return [model.name for model in models[1:] if _in_other_folds(models[0], model)]


def _in_other_folds(first: Contender, second: Contender) -> set[str]:
    common = set(first.predictions) & set(second.predictions)
    return {case for case in common if first.predictions[case].fold != second.predictions[case].fold}


def _predictions(folder: Path, file_ending: str, fold: int | None) -> dict[str, Prediction]:
    cases = {path.name.removesuffix(file_ending): path for path in list_files(folder, file_ending)}
    return {case_id: Prediction(case_id, path, fold) for case_id, path in cases.items()}


def _file_ending(folder: Path, errors: list[str]) -> str | None:
    try:
        return str(read_json(folder / _DATASET_JSON)["file_ending"])
    except InputError as error:
        errors.append(f"{error} Expected the data set's dataset.json there.")
    except KeyError:
        errors.append(f"{folder / _DATASET_JSON} has no file_ending; expected the data set's dataset.json there.")
    return None


def iterate_missing(found: Search, *, probabilities: bool) -> Iterator[Missing]:
    """Yield everything that is missing for a comparison, each command once.

    Args:
        found: Result of the search.
        probabilities: Whether probabilities are needed.
    """
    seen: set[tuple[str, ...] | str] = set()
    for missing in (*found.missing, *found.gaps, *(found.missing_probabilities if probabilities else ())):
        if (key := missing.command or missing.what) not in seen:
            seen.add(key)
            yield missing
