"""Records: small files that hold digests of what a step made, and by which later steps know whether they are done.

A record tells contents, never times or places: what is made once more and comes out the same leaves its record as it
is, and two workflows on one data set have the same records. `refresh` brings records in line with what is really there,
so that a changed data set, plans file, split or trainer is seen, and what was removed is made anew.

Which steps to run, in which order and how often to try again is Snakemake's, by the times and checksums of records. It
can't look at nnU-Net's own files instead: it removes the output of a step before the step starts and when it fails,
which would be the checkpoints of a training, and plans and splits that another workflow is reading; where outputs are
marked `update` it puts back the old ones, and what was trained since is lost. Nor can options be `params`: the number
of threads and the package's version are in the same commands, and must not have anything done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from nnunet_conres.errors import file_errors
from nnunet_conres.files import is_temporary, try_read_json, write_if_changed
from nnunet_conres.folders import list_files
from nnunet_conres.nnunet import SPLITS_FILE, resolved_configuration
from nnunet_conres.preprocessing.settings import OF_CONFIGURATIONS
from nnunet_conres.registration import TRAINER_FOLDER, VARIABLE
from nnunet_conres.workflow.config import Experiment, Model, iterate_trainings

# Of larger files only the two ends are read: compressed ones end with a checksum of all that they hold.
_WHOLE_BYTES: Final = 2**20
_END_BYTES: Final = 2**16
# Entries of plans, beside configurations, that nothing is computed from.
_NAMES_ONLY: Final = ("configurations", "plans_name", "experiment_planner_used")


# --- digests --------------------------------------------------------------------------------------------------------


def digest(content: Any) -> str:
    """A digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """A digest of a file: of all of it, or of size and both ends where it is large."""
    with file_errors(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _WHOLE_BYTES:
            return hashlib.sha256(file.read()).hexdigest()[:16]
        content = file.read(_END_BYTES)
        file.seek(-_END_BYTES, os.SEEK_END)
        return hashlib.sha256(b"%d " % size + content + file.read()).hexdigest()[:16]


def folders_digest(folders: Iterable[Path], files: Iterable[Path], cache: Path) -> str:
    """A digest of files and of all files in folders, by name and content.

    Args:
        folders: Folders, without their subfolders; those that are not there are left out.
        files: Files, likewise.
        cache: Digests by size and time of modification, so that what has not been touched is not read again.
    """
    known = try_read_json(cache) or {}
    seen: dict[str, list[Any]] = {}
    paths = [path for folder in folders if folder.is_dir() for path in list_files(folder)]
    for path in sorted([*paths, *(file for file in files if file.is_file())]):
        stat = path.stat()
        name = f"{path.parent.name}/{path.name}"
        before = known.get(name)
        if before and before[:2] == [stat.st_size, stat.st_mtime_ns]:
            seen[name] = before
        else:
            seen[name] = [stat.st_size, stat.st_mtime_ns, file_digest(path)]
    write_if_changed(cache, seen)
    return digest({name: entry[2] for name, entry in seen.items()})


# --- what there is ---------------------------------------------------------------------------------------------------


def raw_state(experiment: Experiment) -> dict[str, Any] | None:
    """The raw data set's training cases; None where there is no data set."""
    raw = experiment.raw
    if not (raw / "dataset.json").is_file():
        return None
    found = folders_digest(
        [raw / "imagesTr", raw / "labelsTr"], [raw / "dataset.json"], experiment.work / "cache" / "raw.json"
    )
    return {"dataset": experiment.dataset, "content": found}


def test_state(experiment: Experiment) -> dict[str, Any] | None:
    """The test cases; None where there are none."""
    if experiment.test_images is None or not experiment.test_images.is_dir():
        return None
    folders = [experiment.test_images, *([experiment.test_labels] if experiment.test_labels else [])]
    return {"content": folders_digest(folders, [], experiment.work / "cache" / "test.json")}


def plans_state(plans: Any, configuration: str) -> dict[str, Any] | None:
    """What plans say of one configuration; None if they have none of that name.

    Changes of other configurations, as by `nnunet-conres variants`, leave it as it is.

    Args:
        plans: What the plans file holds.
        configuration: Name of the configuration.
    """
    try:
        resolved = resolved_configuration(plans, configuration)
    except (KeyError, TypeError):  # TypeError: there are no plans
        return None
    common = {key: value for key, value in plans.items() if key not in _NAMES_ONLY}
    data = {key: resolved.get(key) for key in OF_CONFIGURATIONS}
    data |= {key: common.get(key) for key in ("transpose_forward", "image_reader_writer")}
    return {
        "configuration": digest([common, resolved]),
        "preprocessing": digest(data),
        "data_identifier": resolved.get("data_identifier"),
        "architecture": (resolved.get("architecture") or {}).get("network_class_name"),
    }


def holds_all_cases(experiment: Experiment, folder: Path) -> bool:
    """Whether each training case has its properties, which are written last, and its data in a preprocessed folder."""
    ending = (try_read_json(experiment.raw / "dataset.json") or {}).get("file_ending", "")
    labels = experiment.raw / "labelsTr"
    cases = [path.name[: -len(ending)] for path in list_files(labels, ending)] if ending and labels.is_dir() else []
    there = {path.name: path.stat().st_size for path in folder.glob("*")} if folder.is_dir() else {}
    return bool(cases) and all(
        there.get(f"{case}.pkl") and any(there.get(f"{case}{kind}") for kind in (".b2nd", ".npz", ".npy"))
        for case in cases
    )


def split_states(splits: Any, folds: Iterable[int]) -> dict[int, dict[str, Any]] | None:
    """Digests and validation cases of folds; None where the file of the splits is none or has too few."""
    try:
        return {
            fold: {"content": digest(splits[fold]), "validation": sorted(splits[fold]["val"])}
            for fold in folds
        }  # fmt: skip
    except (TypeError, KeyError, IndexError):
        return None


def trainer_state(name: str) -> dict[str, Any]:
    """A trainer: its name and, where it is a user's own, its file.

    Trainers of nnU-Net and of this package are known by name alone: an update of either must not throw away weeks of
    training.
    """
    # the file may define the trainer, or the one that it differs from in its number of epochs
    pattern = re.compile(rf"^\s*class\s+{re.escape(name)}\b", re.MULTILINE)
    for folder in os.environ.get(VARIABLE, "").split(os.pathsep):
        if not folder.strip() or os.path.realpath(folder) == os.path.realpath(TRAINER_FOLDER):
            continue
        for path in sorted(Path(folder).rglob("*.py")):
            text = path.read_text(errors="replace")
            if pattern.search(text):
                return {"trainer": name, "source": hashlib.sha256(text.encode()).hexdigest()[:16]}
    return {"trainer": name}


def missing_validation(fold_folder: Path, cases: Iterable[str]) -> str | None:
    """What is missing of a fold's validation; None if it is whole, and with it the fold.

    Args:
        fold_folder: nnU-Net's folder of the fold.
        cases: The cases that the fold holds out.
    """
    path = fold_folder / "validation" / "summary.json"
    if not (fold_folder / "checkpoint_final.pth").is_file():
        return "its last checkpoint is not there"
    if not path.is_file():
        return "validation/summary.json is not there"
    content = try_read_json(path)
    if not isinstance(content, dict) or "foreground_mean" not in content:
        return "validation/summary.json is not whole"
    scored = {re.split(r"[\\/]", str(entry.get("prediction_file")))[-1] for entry in content.get("metric_per_case", [])}
    missing = [
        case
        for case in cases
        if not any(name.partition(".")[0] == case or name.startswith(f"{case}.") for name in scored)
    ]
    return f"validation/summary.json lacks {', '.join(missing[:3])}" if missing else None


# --- paths of records ------------------------------------------------------------------------------------------------


def trainer_record(experiment: Experiment, model: Model) -> Path:
    return experiment.records / "trainers" / f"{model.trainer}.json"


def plans_record(experiment: Experiment, model: Model) -> Path:
    return experiment.records / "plans" / f"{model.plans}__{model.configuration}.json"


def data_record(experiment: Experiment, model: Model) -> Path:
    return experiment.records / "preprocessed" / f"{model.plans}__{model.configuration}.json"


def split_record(experiment: Experiment, fold: int) -> Path:
    return experiment.records / "splits" / f"fold_{fold}.json"


def training_record(experiment: Experiment, model: Model, fold: int) -> Path:
    return experiment.records / "train" / model.name / f"fold_{fold}.json"


def stamp_of_fold(experiment: Experiment, model: Model, fold: int) -> Path:
    """What a fold was trained from; beside the fold, for all workflows that share the results folder."""
    return experiment.fold_lock(model, fold).with_suffix(".json")


# --- keeping records true --------------------------------------------------------------------------------------------


def find_records(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Records that match any of the patterns, without those that a step is writing."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if not is_temporary(path))


def refresh(experiment: Experiment) -> None:
    """Brings records in line with files: rewrites those of changed files, removes those of files that are gone.

    What options of the configuration a step depends on is recorded too, under ``options``.
    """
    records = experiment.records
    for name, content in options(experiment).items():
        write_if_changed(records / "options" / f"{name}.json", content)
    for model in experiment.models:
        write_if_changed(trainer_record(experiment, model), trainer_state(model.trainer))
    _update(records / "raw.json", lambda: raw_state(experiment))
    _update(records / "test.json", lambda: test_state(experiment))
    for model in experiment.models:
        plans = try_read_json(experiment.preprocessed / f"{model.plans}.json")
        state = plans_state(plans, model.configuration)
        _update(plans_record(experiment, model), lambda state=state: state)
        folder = experiment.preprocessed / str((state or {}).get("data_identifier"))
        if not holds_all_cases(experiment, folder):
            data_record(experiment, model).unlink(missing_ok=True)
    states = split_states(try_read_json(experiment.preprocessed / SPLITS_FILE), experiment.folds)
    for fold in experiment.folds:
        _update(split_record(experiment, fold), lambda fold=fold: (states or {}).get(fold))
    for model, fold in iterate_trainings(experiment):
        cases = (states or {}).get(fold, {}).get("validation", [])
        if missing_validation(experiment.fold_folder(model, fold), cases):
            training_record(experiment, model, fold).unlink(missing_ok=True)
    for path in find_records(
        records, ("predict/*/*.json", "ensemble/*.json", "compare/*.json", "postprocess/*.json", "package/*.json")
    ):
        made = (try_read_json(path) or {}).get("files", [])
        if not all((experiment.work / name).is_file() for name in made):
            path.unlink()


def options(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """What of the configuration a step's outcome depends on, by name of the step."""
    from dataclasses import asdict

    splits = {key: str(value) for key, value in experiment.splits.model_dump().items()}
    found: dict[str, dict[str, Any]] = {
        "data": {
            "dataset": experiment.dataset,
            "brats": [str(folder) for folder in experiment.brats],
            "held_out": [str(folder) for folder in experiment.held_out],
            "corrected": [str(folder) for folder in experiment.corrected],
            "scheme": [_scheme(one) for one in experiment.scheme],
            "missing": experiment.missing,
        },
        "splits": splits,
        "compare": {
            "models": [[model.name, model.trainer, model.plans, model.configuration] for model in experiment.models],
            "folds": list(experiment.folds),
            "ensembles": [list(members) for members in experiment.ensembles],
            "rules": experiment.rules,
            "postprocess": experiment.postprocess,
        },
        "postprocess": {"folds": list(experiment.folds), "rules": experiment.rules},
        "package": {
            "folds": list(experiment.folds),
            "scheme": None if experiment.package_scheme is None else _scheme(experiment.package_scheme),
            "missing": experiment.package_missing,
            "postprocess": experiment.postprocess,
        },
        "predict": {"parts": experiment.parts, "folds": list(experiment.folds)},
    }
    for plans in experiment.plans.values():
        found[f"plans_{plans.name}"] = asdict(plans)
    return found


def _scheme(scheme: str) -> str:
    """A scheme's name, or a digest of the file that describes one."""
    return file_digest(Path(scheme)) if scheme.lower().endswith(".toml") else scheme


def _update(path: Path, state: Any) -> None:
    """Rewrites a record that is there; what has no record yet gets one by the step that makes it."""
    if not path.is_file():
        return
    found = state()
    if found is None:
        path.unlink()
    else:
        write_if_changed(path, found)
