"""Preprocessed data: shared between plans with equal settings, checked, and completed case by case.

nnU-Net's own command first removes a configuration's data. Here existing cases are kept as long as their raw files are
unchanged. nnU-Net's preprocessor computes the missing and outdated cases.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_conres.datasets.raw import TrainingCase, errors_in_files, find_training_cases
from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.files import failed_write, try_read_json, written_whole
from nnunet_conres.folders import clear_leftovers, one_at_a_time, partial_folder
from nnunet_conres.parallel import map_cases
from nnunet_conres.preprocessing.settings import OF_CONFIGURATIONS
from nnunet_conres.preprocessing.sources import GT_SEGMENTATIONS, RECORD, cases_in, files_of, judge
from nnunet_conres.text import first_few, short_message
from nnunet_conres.unpickling import read_pickle

STOCK_PLANS: Final = "nnUNetPlans"

_OF_PLANS = ("transpose_forward", "image_reader_writer")
_INTENSITIES = "foreground_intensity_properties_per_channel"
# Any other scheme may use the intensities of the whole data set, as CT normalisation does.
_WITHOUT_INTENSITIES = {
    "ZScoreNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
}
# Not 3d_lowres: its spacing depends on the memory target, so shared data would differ after another planning.
_SHARED = ("2d", "3d_fullres")
OF_FILES: Final[tuple[type[Exception], ...]] = (
    AssertionError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    zlib.error,
)
"""Exceptions that nnU-Net and its readers raise about files; other errors keep their traceback."""
# With fewer cases, starting processes takes longer than checking.
_MANY_CASES = 200


# --- data shared by plans -------------------------------------------------------------------------------------------


def read_plans(folder: Path) -> dict[str, dict[str, Any]]:
    """Read all plans in a preprocessed data set's folder, by name. Other JSON files are ignored."""
    plans = {}
    for path in sorted(folder.glob("*.json")):
        content = try_read_json(path)
        if isinstance(content, dict) and isinstance(content.get("configurations"), dict):
            plans[path.stem] = content
    return plans


def preprocessing_settings(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Return all entries of plans that determine a configuration's preprocessed data. Equal settings give equal data.

    Args:
        plans: Plans as read from their file.
        configuration: Name of the configuration.
    """
    resolved = PlansManager(deepcopy(dict(plans))).get_configuration(configuration).configuration
    settings = {key: plans.get(key) for key in _OF_PLANS} | {key: resolved.get(key) for key in OF_CONFIGURATIONS}
    if not set(settings["normalization_schemes"] or ()) <= _WITHOUT_INTENSITIES:
        settings[_INTENSITIES] = plans.get(_INTENSITIES)
    return settings


def share_data(
    plans: dict[str, Any], existing: Mapping[str, Mapping[str, Any]], planners: Sequence[str], folder: Path
) -> None:
    """Let new plans use the data of existing plans wherever the data would be the same.

    Existing data come before data that are not computed yet. Among existing data, those that an earlier version of the
    same plans used come first.

    Args:
        plans: New plans; the ``data_identifier`` of their configurations is changed in place.
        existing: Plans in the folder, by name. nnU-Net's default plans come first, then those of the given planners.
        planners: Class names of planners.
        folder: The preprocessed data set's folder.
    """
    names = [STOCK_PLANS] + [
        name for name, other in existing.items() if other.get("experiment_planner_used") in planners
    ]
    candidates = [existing[name] for name in names if name in existing and name != plans["plans_name"]]
    for name in _SHARED:
        configuration = plans["configurations"].get(name, {})
        if "data_identifier" not in configuration:
            continue
        settings = preprocessing_settings(plans, name)
        shared = _identifiers(candidates, name, settings)
        earlier = _identifiers([existing[own] for own in [plans["plans_name"]] if own in existing], name, settings)
        with_data = [identifier for identifier in [*earlier, *shared] if _holds_files(folder / identifier)]
        configuration["data_identifier"] = [*with_data, *shared, configuration["data_identifier"]][0]


def _identifiers(others: Sequence[Mapping[str, Any]], name: str, settings: Mapping[str, Any]) -> list[str]:
    """Return the data identifiers of a configuration in all plans that preprocess it with these settings."""
    return [
        other["configurations"][name]["data_identifier"]
        for other in others
        if "data_identifier" in other["configurations"].get(name, {})
        and preprocessing_settings(other, name) == settings
    ]


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def settings_errors(plans: Mapping[str, Any], existing: Mapping[str, Mapping[str, Any]], folder: Path) -> Iterator[str]:
    """Yield a message for every conflict of new plans with existing data of the same name.

    Args:
        plans: New plans.
        existing: Plans in the folder, by name, including those that will be replaced.
        folder: The preprocessed data set's folder.
    """
    for name, configuration in plans["configurations"].items():
        identifier = configuration.get("data_identifier")
        if identifier != f"{plans['plans_name']}_{name}":
            continue  # no data, or data of other plans
        settings = preprocessing_settings(plans, name)
        for other_name, other in existing.items():
            is_replaced = other_name == plans["plans_name"]
            if is_replaced and not _holds_files(folder / identifier):
                continue
            for theirs, content in other["configurations"].items():
                if content.get("data_identifier") != identifier:
                    continue
                before = preprocessing_settings(other, theirs)
                different = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
                if different:
                    whose = "has data that were" if is_replaced else f"is also for data of {other_name}, which are"
                    yield (
                        f"{folder / identifier} {whose} preprocessed with another {', '.join(different)} than "
                        f"configuration {name} needs now. Name the new plans with -overwrite_plans_name"
                        + (", or remove that folder." if is_replaced else ".")
                    )


# --- existing data --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessed:
    """Preprocessed data of a configuration.

    Attributes:
        configuration: Name of the configuration.
        folder: Folder of the data.
        cases: Number of cases of the data set.
        written: Cases preprocessed by this run; all others existed already.
        outdated: The written cases that replace data made from other raw files, each with the difference.
    """

    configuration: str
    folder: Path
    cases: int
    written: tuple[str, ...]
    outdated: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Wanted:
    """Required properties of a configuration's data."""

    folder: Path
    channels: int
    axes: tuple[int, ...]  # axis of the images for each axis of the data
    spacing: tuple[float, ...] | None  # mm, in-plane only for 2d; None if it does not determine the shape
    settings: Mapping[str, Any]  # all entries of the plans that determine the data
    labels: Mapping[str, Any]  # as in dataset.json; the properties contain voxel positions of each label
    copies: Path  # folder with copies of the label files
    ending: str  # of the label files

    def shape(self, properties: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Return the shape of a case with these properties, None if the spacing does not determine it."""
        if self.spacing is None:
            return None
        spacing = [properties["spacing"][axis] for axis in self.axes]
        target = spacing[: len(spacing) - len(self.spacing)] + list(self.spacing)  # 2d keeps the slice distance
        shape = compute_new_shape(properties["shape_after_cropping_and_before_resampling"], spacing, target)
        return (self.channels, *(int(extent) for extent in shape))


@dataclass(frozen=True)
class _State:
    """State of a preprocessed case."""

    complete: bool  # all its files exist and are complete
    otherwise: str = ""  # evidence that they were made for other plans
    outdated: str = ""  # evidence that they were made from other raw files
    record: dict[str, Any] | None = None  # new record to write into the properties


def _look_at(job: tuple[TrainingCase, _Wanted]) -> _State:
    case, wanted = job
    case_id = case.case_id
    try:
        data, labels, properties = _read(wanted.folder, case_id)
    except Exception:  # a file that was cut short can raise anything
        return _State(complete=False)
    if labels[1:] != data[1:]:
        return _State(complete=False)
    expected = wanted.shape(properties)
    if expected is not None and data != expected:
        return _State(True, f"{case_id} has shape {data}, but {expected} by these plans")
    record = properties.get(RECORD)
    if record is not None and record["settings"] != wanted.settings:
        then, now = record["settings"], wanted.settings
        different = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        return _State(True, f"{case_id} was preprocessed with another {', '.join(different)}")
    if record is not None and record["labels"] != wanted.labels:
        return _State(True, outdated="labels in dataset.json")
    copy = wanted.copies / f"{case_id}{wanted.ending}"
    judgement = judge(case, properties, wanted.folder / f"{case_id}.pkl", copy, with_images=True)
    return _State(True, outdated=judgement.changed or judgement.uncertain, record=judgement.record)


def _read(folder: Path, case_id: str) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Read the shapes of a case's image and labels, and its properties. Raises if a file is missing or truncated."""
    properties = read_pickle(folder / f"{case_id}.pkl")  # first, because nnU-Net unpickles without checks
    compressed = folder / f"{case_id}.npz"
    if not compressed.is_file():
        image, annotation, _, _ = nnUNetDatasetBlosc2(str(folder), [case_id]).load_case(case_id)
        return tuple(image.shape), tuple(annotation.shape), properties
    with zipfile.ZipFile(compressed) as archive:  # headers only: nnU-Net would unpack everything
        shapes = _array_shape(archive, "data"), _array_shape(archive, "seg")
    return *shapes, properties


def _array_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return tuple(read_header(stream)[0])


def _holds_npz(folder: Path) -> bool:
    """Return whether data are in the format of older nnU-Net versions, which can't be mixed with the newer one."""
    return any(folder.glob("*.npz"))


# --- preprocessing of one case ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Arguments of `_preprocess_case`."""

    case: TrainingCase
    folder: Path
    partial: Path
    plans: Mapping[str, Any]
    configuration: str
    dataset_json: Mapping[str, Any]
    as_npz: bool
    verbose: bool
    settings: Mapping[str, Any]


def _preprocess_case(job: _Job) -> str:
    """Preprocess a case in a separate folder, then move its files to the data. The .pkl file comes last."""
    plans = PlansManager(deepcopy(dict(job.plans)))
    configuration = plans.get_configuration(job.configuration)
    preprocessor = configuration.preprocessor_class(verbose=job.verbose)
    case_id = job.case.case_id
    images, labels_file = [str(path) for path in job.case.images], str(job.case.labels)
    own = job.partial / case_id
    target = str(own / case_id)
    with file_errors(job.case.labels):
        files = files_of(job.case)
    record = {"files": files, "settings": dict(job.settings), "labels": dict(job.dataset_json["labels"])}
    reader = plans.image_reader_writer_class
    preprocessor.run_case = run_case = _Checked(preprocessor.run_case, job.case, reader)
    arguments = (images, labels_file, plans, configuration, dict(job.dataset_json))
    with file_errors(own):
        own.mkdir()
    try:
        if job.as_npz:
            data, labels, properties = run_case(*arguments)
            nnUNetDatasetNumpy.save_case(data.astype(np.float32), labels.astype(np.int16), properties, target)
        else:
            preprocessor.run_case_save(target, *arguments)
    except Exception as error:  # readers, resampling and writers raise different errors
        is_of_files = isinstance(error, OF_FILES)
        if run_case.n_bytes and is_of_files:  # computed, but not written
            path = job.folder / f"{case_id}{'.npz' if job.as_npz else '.b2nd'}"
            raise failed_write(path, run_case.n_bytes) from error
        raise (InputError if is_of_files else RuntimeError)(
            f"Case {case_id} can't be preprocessed for configuration {job.configuration}: {short_message(error)}. Its "
            f"files: {', '.join((*images, labels_file))}."
        ) from error
    try:
        _note(own / f"{case_id}.pkl", record)
    except InputError as error:
        raise error.naming(job.folder, instead_of=own) from error
    with file_errors(job.folder):
        # The .pkl marks the case as complete. Remove it first and add it last, so that it never belongs to other data.
        (job.folder / f"{case_id}.pkl").unlink(missing_ok=True)
        for path in sorted(own.iterdir(), key=lambda path: (path.suffix == ".pkl", path.name)):
            os.replace(path, job.folder / path.name)
        own.rmdir()
    return case_id


class _Checked:
    """nnU-Net's preprocessing of one case with two checks: raw files before, and voxels that are not finite after.

    One voxel that is not finite makes its whole channel NaN if nnU-Net normalises by mean and standard deviation.
    """

    def __init__(self, run_case: Callable[..., tuple[Any, ...]], case: TrainingCase, reader: type) -> None:
        self._run_case, self._case, self._reader = run_case, case, reader
        self.n_bytes = 0  # size of the result; 0 until it is computed

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        errors = errors_in_files((self._case, self._reader))
        if errors:
            raise InputError(" ".join(errors))
        image, labels, *others = self._run_case(*arguments)
        broken = [str(number) for number, channel in enumerate(image) if not np.isfinite(channel).all()]
        if broken:
            raise InputError(
                f"after preprocessing, channel {', '.join(broken)} has voxels that are NaN or infinite. Look for such "
                f"voxels in the raw images, and correct them or remove the case"
            )
        self.n_bytes = image.nbytes + labels.nbytes
        return (image, labels, *others)


def _note(properties_file: Path, record: Mapping[str, Any]) -> None:
    """Write a record into a case's properties."""
    properties = read_pickle(properties_file)
    with written_whole(properties_file) as partial:
        partial.write_bytes(pickle.dumps(properties | {RECORD: dict(record)}))


# --- preprocessing of a data set --------------------------------------------------------------------------------------


class PreprocessedDataset:
    """The preprocessed data of a data set for given plans.

    Args:
        raw: Folder of the raw data set.
        preprocessed: Folder of the preprocessed data set, with the plans in it.
        plans_name: Name of the plans.

    Raises:
        InputError: Files of the raw data set are missing. Lists all of them.
    """

    def __init__(self, raw: Path, preprocessed: Path, plans_name: str) -> None:
        self._folder = preprocessed
        self._plans = json.loads((preprocessed / f"{plans_name}.json").read_text(encoding="utf-8"))
        self._dataset_json = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
        cases, errors = find_training_cases(raw, self._dataset_json)
        if errors:
            raise InputError(errors)
        self._cases = {case.case_id: case for case in cases}

    def folder(self, configuration: str) -> Path:
        """Return the folder of a configuration's data. It may not exist."""
        return self._wanted(configuration).folder

    def _wanted(self, name: str) -> _Wanted:
        configuration = PlansManager(deepcopy(self._plans)).get_configuration(name)
        is_known = configuration.preprocessor_name == "DefaultPreprocessor" and not configuration.configuration[
            "resampling_fn_data"
        ].startswith("no_")
        return _Wanted(
            folder=self._folder / configuration.data_identifier,
            channels=len(self._dataset_json.get("channel_names", self._dataset_json.get("modality", ()))),
            axes=tuple(self._plans["transpose_forward"]),
            spacing=tuple(configuration.spacing) if is_known else None,
            settings=preprocessing_settings(self._plans, name),
            labels=self._dataset_json["labels"],
            copies=self._folder / GT_SEGMENTATIONS,
            ending=self._dataset_json["file_ending"],
        )

    def missing(self, configuration: str) -> list[str]:
        """Return the ids of cases whose data are missing, incomplete, or made from other raw files.

        Raises:
            InputError: The existing data were preprocessed with other settings, or nnU-Net can't read them.
        """
        states = self._look(configuration, processes=1, progress=False)
        return [case_id for case_id, state in states.items() if not state.complete or state.outdated]

    def _look(self, configuration: str, processes: int, progress: bool) -> dict[str, _State]:
        """Return the state of every case."""
        wanted = self._wanted(configuration)
        if not wanted.folder.is_dir():
            return dict.fromkeys(self._cases, _State(complete=False))
        if _holds_npz(wanted.folder) and any(wanted.folder.glob("*.b2nd")):
            raise InputError(
                f"{wanted.folder} holds both .npz and .b2nd files, which nnU-Net can't train on. Remove the folder, or "
                f"all files of one kind."
            )
        many = len(self._cases) > _MANY_CASES
        jobs = [(case, wanted) for case in self._cases.values()]
        looks = map_cases(_look_at, jobs, processes if many else 1, f"Checking {configuration}", progress and many)
        states = dict(zip(self._cases, looks, strict=True))
        otherwise = [state.otherwise for state in states.values() if state.otherwise]
        if otherwise:
            name = self._plans["plans_name"]
            is_own = wanted.folder.name.startswith(f"{name}_")
            raise InputError(
                f"{wanted.folder} holds data that were preprocessed for other plans than {name}, or for another "
                f"version of them ({first_few(otherwise, 2)}). "
                + ("Plan under another name with -overwrite_plans_name, or remove" if is_own else "Remove")
                + " that folder."
            )
        return states

    def complete(
        self, configurations: Mapping[str, int], *, verbose: bool = False, progress: bool = True
    ) -> list[Preprocessed]:
        """Preprocess missing cases and cases whose raw files changed; keep all others.

        The existing data of all configurations are checked before anything is written. Each case gets its final name
        only when it is complete, so a repeated run continues after an interruption. The labels in original resolution,
        which validation compares with, are copied as in nnU-Net. Two runs on the same data wait for each other.

        Args:
            configurations: Names of configurations, each with its number of preprocessing processes. Configurations
                that the plans don't have are skipped.
            verbose: Whether nnU-Net's preprocessor prints messages.
            progress: Whether to show progress bars on stderr.

        Returns:
            The data of each configuration after the run.

        Raises:
            InputError: The existing data were preprocessed with other settings, nnU-Net can't read them, a case can't
                be preprocessed, or a process was killed.
        """
        numbers = {name: number for name, number in configurations.items() if name in self._plans["configurations"]}
        folders = {self.folder(name): name for name in reversed(numbers)}  # fullres and cascade share one
        with contextlib.ExitStack() as stack:
            for folder in sorted(folders):
                stack.enter_context(one_at_a_time(folder))
                clear_leftovers(folder.parent, folder)
                clear_leftovers(folder)
            states = {folder: self._look(name, numbers[name], progress) for folder, name in folders.items()}
            written = {
                folder: self._preprocess(name, states[folder], numbers[name], verbose, progress)
                for folder, name in folders.items()
            }
        with file_errors(self._folder / GT_SEGMENTATIONS):
            self._copy_labels()
        return [
            Preprocessed(
                name,
                folder,
                len(self._cases),
                written[folder],
                {case_id: state.outdated for case_id, state in states[folder].items() if state.outdated},
            )
            for name in numbers
            for folder in [self.folder(name)]
        ]

    def _preprocess(
        self, configuration: str, states: Mapping[str, _State], processes: int, verbose: bool, progress: bool
    ) -> tuple[str, ...]:
        folder = self.folder(configuration)
        for case_id, state in states.items():
            if state.record is not None:
                with file_errors(folder):
                    _note(folder / f"{case_id}.pkl", state.record)
        case_ids = [case_id for case_id, state in states.items() if not state.complete or state.outdated]
        if not case_ids:
            return ()
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        as_npz = _holds_npz(folder)
        settings = preprocessing_settings(self._plans, configuration)
        with partial_folder(folder) as partial:
            jobs = [
                _Job(
                    self._cases[case_id],
                    folder,
                    partial,
                    self._plans,
                    configuration,
                    self._dataset_json,
                    as_npz,
                    verbose,
                    settings,
                )
                for case_id in case_ids
            ]
            return tuple(map_cases(_preprocess_case, jobs, processes, f"Preprocessing {configuration}", progress))

    def _copy_labels(self) -> None:
        """Copy each label file whose copy is missing, older or different."""
        folder = self._folder / GT_SEGMENTATIONS
        folder.mkdir(exist_ok=True)
        for case in self._cases.values():
            target = folder / f"{case.case_id}{self._dataset_json['file_ending']}"
            if (
                target.is_file()
                and target.stat().st_mtime >= case.labels.stat().st_mtime
                and filecmp.cmp(target, case.labels, shallow=False)
            ):
                continue
            with written_whole(target) as partial:
                shutil.copy2(case.labels, partial)


# --- cases without raw files ------------------------------------------------------------------------------------------


def cases_that_are_gone(
    preprocessed: Path, configurations: Sequence[str], case_ids: Sequence[str]
) -> dict[Path, list[str]]:
    """Find preprocessed cases that the raw data set no longer has. Without a splits file nnU-Net trains on them.

    Args:
        preprocessed: Folder of the preprocessed data set.
        configurations: Configurations to check, in all plans in the folder.
        case_ids: The cases of the raw data set.

    Returns:
        Ids of these cases by folder.
    """
    identifiers = {
        PlansManager(deepcopy(plans)).get_configuration(name).configuration.get("data_identifier")
        for plans in read_plans(preprocessed).values()
        for name in configurations
        if name in plans["configurations"]
    }
    found = {
        preprocessed / identifier: [case for case in cases_in(preprocessed / identifier) if case not in set(case_ids)]
        for identifier in sorted(identifier for identifier in identifiers if identifier)
    }
    return {folder: cases for folder, cases in found.items() if cases}


def remove_cases(folder: Path, case_ids: Sequence[str]) -> None:
    """Remove cases from preprocessed data, in all of nnU-Net's formats.

    Args:
        folder: Folder of the data.
        case_ids: Ids of the cases.
    """
    for case_id in case_ids:
        for ending in (".pkl", ".b2nd", "_seg.b2nd", ".npz", ".npy", "_seg.npy"):
            (folder / f"{case_id}{ending}").unlink(missing_ok=True)
