"""Records: small files with digests of a step's results. They decide whether later steps are up to date.

A record describes contents, never times or paths. If a step runs again with the same result, its record does not
change. Two workflows on one data set have the same records. `refresh` updates records to match the actual files, so
that a changed data set, plans file, split or trainer is detected, and removed results are rebuilt.

Snakemake decides by the times and checksums of records which steps to run, in which order, and how often to retry. It
can't use nnU-Net's own files instead: it removes the output of a step before the step starts and when it fails. That
would remove the checkpoints of a training, and plans and splits that another workflow is reading. If outputs are marked
`update`, it restores the old ones, and training since then is lost. Options can't be `params` either: the commands
also contain the number of threads and the package's version, which must not cause a rerun.
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

# Only the two ends of larger files are read: compressed files end with a checksum of their whole content.
_WHOLE_BYTES: Final = 2**20
_END_BYTES: Final = 2**16
# Entries of plans that do not count for a configuration: the other configurations, and names that affect no result.
_NAMES_ONLY: Final = ("configurations", "plans_name", "experiment_planner_used")


# --- digests --------------------------------------------------------------------------------------------------------


def digest(content: Any) -> str:
    """Return a digest of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return a digest of a file: of its content, or of its size and both ends if it is large."""
    with file_errors(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _WHOLE_BYTES:
            return hashlib.sha256(file.read()).hexdigest()[:16]
        content = file.read(_END_BYTES)
        file.seek(-_END_BYTES, os.SEEK_END)
        return hashlib.sha256(b"%d " % size + content + file.read()).hexdigest()[:16]


def folders_digest(folders: Iterable[Path], files: Iterable[Path], cache: Path) -> str:
    """Return a digest of files and of all files in folders, by name and content.

    Args:
        folders: Folders, without their subfolders; missing ones are skipped.
        files: Files; missing ones are skipped.
        cache: File with digests by size and modification time, so that unchanged files are not read again.
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


# --- states of files -------------------------------------------------------------------------------------------------


def raw_state(experiment: Experiment) -> dict[str, Any] | None:
    """Return the state of the raw training cases; None if there is no data set."""
    raw = experiment.raw
    if not (raw / "dataset.json").is_file():
        return None
    found = folders_digest(
        [raw / "imagesTr", raw / "labelsTr"], [raw / "dataset.json"], experiment.work / "cache" / "raw.json"
    )
    return {"dataset": experiment.dataset, "content": found}


def test_state(experiment: Experiment) -> dict[str, Any] | None:
    """Return the state of the test cases; None if there are none."""
    if experiment.test_images is None or not experiment.test_images.is_dir():
        return None
    folders = [experiment.test_images, *([experiment.test_labels] if experiment.test_labels else [])]
    return {"content": folders_digest(folders, [], experiment.work / "cache" / "test.json")}


def plans_state(plans: Any, configuration: str) -> dict[str, Any] | None:
    """Return the state of one configuration of plans; None if the plans do not have it.

    Changes to other configurations, for example by `nnunet-conres variants`, do not affect it.

    Args:
        plans: Content of the plans file.
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
    """Return whether a preprocessed folder has the data and the properties, written last, of each training case."""
    ending = (try_read_json(experiment.raw / "dataset.json") or {}).get("file_ending", "")
    labels = experiment.raw / "labelsTr"
    cases = [path.name[: -len(ending)] for path in list_files(labels, ending)] if ending and labels.is_dir() else []
    there = {path.name: path.stat().st_size for path in folder.glob("*")} if folder.is_dir() else {}
    return bool(cases) and all(
        there.get(f"{case}.pkl") and any(there.get(f"{case}{kind}") for kind in (".b2nd", ".npz", ".npy"))
        for case in cases
    )


def split_states(splits: Any, folds: Iterable[int]) -> dict[int, dict[str, Any]] | None:
    """Return digests and validation cases of folds; None if the splits are invalid or have too few folds."""
    try:
        return {
            fold: {"content": digest(splits[fold]), "validation": sorted(splits[fold]["val"])}
            for fold in folds
        }  # fmt: skip
    except (TypeError, KeyError, IndexError):
        return None


def trainer_state(name: str) -> dict[str, Any]:
    """Return the state of a trainer: its name and, for a user's own trainer, a digest of the file that defines it.

    Trainers of nnU-Net and of this package are identified by name only: an update of either must not discard weeks of
    training.
    """
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
    """Return what a fold's validation lacks; None if it, and thus the fold, is complete.

    Args:
        fold_folder: nnU-Net's folder of the fold.
        cases: Validation cases of the fold.
    """
    path = fold_folder / "validation" / "summary.json"
    if not (fold_folder / "checkpoint_final.pth").is_file():
        return "checkpoint_final.pth is missing"
    if not path.is_file():
        return "validation/summary.json is missing"
    content = try_read_json(path)
    if not isinstance(content, dict) or "foreground_mean" not in content:
        return "validation/summary.json is incomplete"
    scored = {re.split(r"[\\/]", str(entry.get("prediction_file")))[-1] for entry in content.get("metric_per_case", [])}
    missing = [
        case
        for case in cases
        if not any(name.partition(".")[0] == case or name.startswith(f"{case}.") for name in scored)
    ]
    return f"validation/summary.json does not list {', '.join(missing[:3])}" if missing else None


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
    """Return the file with the digests of a fold's inputs, shared by all workflows with the same results folder."""
    return experiment.fold_lock(model, fold).with_suffix(".json")


# --- updating records ------------------------------------------------------------------------------------------------


def find_records(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the records that match any of the patterns, without those that a step is writing."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if not is_temporary(path))


def refresh(experiment: Experiment) -> None:
    """Update records to match the files: rewrite those of changed files, and remove those of missing files.

    The configuration's options that a step depends on are recorded too, under ``options``.
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
    """Return the configuration's options that a step's result depends on, by name of the step."""
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
    """Return a scheme's name, or a digest of the file that describes it."""
    return file_digest(Path(scheme)) if scheme.lower().endswith(".toml") else scheme


def _update(path: Path, state: Any) -> None:
    """Rewrite an existing record, or remove it if there is no state. Steps write new records themselves."""
    if not path.is_file():
        return
    found = state()
    if found is None:
        path.unlink()
    else:
        write_if_changed(path, found)
