"""Preprocessed data: shared between plans that want the same, checked, and completed case by case.

nnU-Net's own command begins with the removal of a configuration's data. Here cases that are there are left as they
are, as long as their raw files are the same; those that are missing or outdated are made by nnU-Net's preprocessor.
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
# Every other scheme may look at the intensities of the whole data set, as CT's does.
_WITHOUT_INTENSITIES = {
    "ZScoreNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
}
# The spacing of 3d_lowres goes with the memory target: what is shared today would differ tomorrow.
_SHARED = ("2d", "3d_fullres")
OF_FILES: Final[tuple[type[Exception], ...]] = (
    AssertionError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    zlib.error,
)
"""What nnU-Net and its readers raise about files; other errors keep their traceback."""
# Below that many cases, starting processes takes longer than looking.
_MANY_CASES = 200


# --- whose data -----------------------------------------------------------------------------------------------------


def read_plans(folder: Path) -> dict[str, dict[str, Any]]:
    """All plans in a preprocessed data set's folder, by name; files that hold something else are left out."""
    plans = {}
    for path in sorted(folder.glob("*.json")):
        content = try_read_json(path)
        if isinstance(content, dict) and isinstance(content.get("configurations"), dict):
            plans[path.stem] = content
    return plans


def preprocessing_settings(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """All in plans that decides what a configuration's preprocessed data are; equal settings make equal data.

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
    """Lets new plans use the data of existing ones wherever they would be the same.

    Data that are there come before data that are yet to be made, and of those the plans' own, from an earlier planning.

    Args:
        plans: New plans; the ``data_identifier`` of their configurations is changed in place.
        existing: Plans in the folder, by name. The stock ones come first, then those of the given planners.
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
    """Data that plans have for a configuration, of those that preprocess it with these settings."""
    return [
        other["configurations"][name]["data_identifier"]
        for other in others
        if "data_identifier" in other["configurations"].get(name, {})
        and preprocessing_settings(other, name) == settings
    ]


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def settings_errors(plans: Mapping[str, Any], existing: Mapping[str, Mapping[str, Any]], folder: Path) -> Iterator[str]:
    """A message wherever new plans would be at odds with existing data of the same name.

    Args:
        plans: New plans.
        existing: Plans in the folder, by name, among them those that are to be replaced.
        folder: The preprocessed data set's folder.
    """
    for name, configuration in plans["configurations"].items():
        identifier = configuration.get("data_identifier")
        if identifier != f"{plans['plans_name']}_{name}":
            continue  # none, or another's
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
                    whose = "holds data that were" if is_replaced else f"is for data of {other_name} too, which are"
                    yield (
                        f"{folder / identifier} {whose} preprocessed with another {', '.join(different)} than "
                        f"configuration {name} is to have now. Name the new plans with -overwrite_plans_name"
                        + (", or remove that folder." if is_replaced else ".")
                    )


# --- what is there --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessed:
    """Data of a configuration.

    Attributes:
        configuration: Name of the configuration.
        folder: Where they are.
        cases: Number of cases of the data set.
        written: Cases that were made now; all others were there.
        outdated: Those of them that were there, made from other raw files, each with what differed.
    """

    configuration: str
    folder: Path
    cases: int
    written: tuple[str, ...]
    outdated: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Wanted:
    """What a configuration's data have to be."""

    folder: Path
    channels: int
    axes: tuple[int, ...]  # where each axis is found in the images
    spacing: tuple[float, ...] | None  # mm, without that of the slices for 2d; None where it doesn't tell the shape
    settings: Mapping[str, Any]  # all in the plans that decides what the data are
    labels: Mapping[str, Any]  # as in dataset.json; the places of their voxels are among the properties
    copies: Path  # folder with copies of the label files
    ending: str  # of those

    def shape(self, properties: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Shape of a case with these properties, None where that can't be known from outside."""
        if self.spacing is None:
            return None
        spacing = [properties["spacing"][axis] for axis in self.axes]
        target = spacing[: len(spacing) - len(self.spacing)] + list(self.spacing)  # slices of 2d keep their distance
        shape = compute_new_shape(properties["shape_after_cropping_and_before_resampling"], spacing, target)
        return (self.channels, *(int(extent) for extent in shape))


@dataclass(frozen=True)
class _State:
    """What there is of a case."""

    complete: bool  # all its files are there and whole
    otherwise: str = ""  # what shows that they were made for other plans
    outdated: str = ""  # what shows that they were made from other raw files
    record: dict[str, Any] | None = None  # to replace that of the properties


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
        return _State(True, f"{case_id} has shape {data} there, and {expected} by these plans")
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
    """Shapes of a case's image and labels, and its properties. Raises if a file is missing or was cut short."""
    properties = read_pickle(folder / f"{case_id}.pkl")  # before nnU-Net does so, which trusts it
    compressed = folder / f"{case_id}.npz"
    if not compressed.is_file():
        image, annotation, _, _ = nnUNetDatasetBlosc2(str(folder), [case_id]).load_case(case_id)
        return tuple(image.shape), tuple(annotation.shape), properties
    with zipfile.ZipFile(compressed) as archive:  # the heads only: nnU-Net would unpack all of it
        shapes = _array_shape(archive, "data"), _array_shape(archive, "seg")
    return *shapes, properties


def _array_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return tuple(read_header(stream)[0])


def _holds_npz(folder: Path) -> bool:
    """Whether data are in the format of older versions of nnU-Net, which doesn't mix with the newer one."""
    return any(folder.glob("*.npz"))


# --- a case that is missing -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What one process needs to preprocess one case."""

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
    """Preprocesses a case in a separate folder and moves it to the others, what says that it is complete last."""
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
    except Exception as error:  # readers, resampling and writers have their own
        is_of_files = isinstance(error, OF_FILES)
        if run_case.n_bytes and is_of_files:  # all is computed: it could not be written
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
        # What says that the case is complete goes first and comes last: never is it beside data of another making.
        (job.folder / f"{case_id}.pkl").unlink(missing_ok=True)
        for path in sorted(own.iterdir(), key=lambda path: (path.suffix == ".pkl", path.name)):
            os.replace(path, job.folder / path.name)
        own.rmdir()
    return case_id


class _Checked:
    """nnU-Net's preprocessing of one case, after a check of its files, and refused where voxels are not finite then.

    One such voxel makes its whole channel NaN where nnU-Net normalises by mean and standard deviation.
    """

    def __init__(self, run_case: Callable[..., tuple[Any, ...]], case: TrainingCase, reader: type) -> None:
        self._run_case, self._case, self._reader = run_case, case, reader
        self.n_bytes = 0  # of the result, once there is one

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
    """Writes a record into a case's properties."""
    properties = read_pickle(properties_file)
    with written_whole(properties_file) as partial:
        partial.write_bytes(pickle.dumps(properties | {RECORD: dict(record)}))


# --- all of a data set ------------------------------------------------------------------------------------------------


class PreprocessedDataset:
    """The preprocessed data of a data set that belong to certain plans.

    Args:
        raw: Folder of the raw data set.
        preprocessed: Folder of the preprocessed one, with the plans in it.
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
        """Where the data of a configuration are, if there are any."""
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
        """Ids of the cases that a configuration has no data of that are complete and made from the raw files of today.

        Raises:
            InputError: There are data, but they were preprocessed otherwise, or nnU-Net can't read them.
        """
        states = self._look(configuration, processes=1, progress=False)
        return [case_id for case_id, state in states.items() if not state.complete or state.outdated]

    def _look(self, configuration: str, processes: int, progress: bool) -> dict[str, _State]:
        """What there is of every case."""
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
        """Makes what is missing, makes again what was made from other raw files, and leaves alone everything else.

        What there is of all configurations is looked at before anything is written. Each case gets its name when it is
        complete, so that an interrupted run can be repeated, and goes on. The labels in original resolution, which
        validation compares with, are copied as nnU-Net does. Two runs on the same data wait for each other.

        Args:
            configurations: Names of configurations, each with the number of processes to preprocess it with. Those
                that the plans don't have are skipped.
            verbose: Whether nnU-Net's preprocessor tells what it does.
            progress: Whether to show progress bars on stderr.

        Returns:
            What there is now of each configuration.

        Raises:
            InputError: There are data, but they were preprocessed otherwise, or nnU-Net can't read them; or a case
                can't be preprocessed, or a process was killed.
        """
        numbers = {name: number for name, number in configurations.items() if name in self._plans["configurations"]}
        folders = {self.folder(name): name for name in reversed(numbers)}  # fullres and cascade have the same
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
        """Copies labels that are missing, older or other than their copy."""
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


# --- cases that are gone ----------------------------------------------------------------------------------------------


def cases_that_are_gone(
    preprocessed: Path, configurations: Sequence[str], case_ids: Sequence[str]
) -> dict[Path, list[str]]:
    """Cases among preprocessed data that the raw data set no longer has; nnU-Net trains on them without splits.

    Args:
        preprocessed: Folder of the preprocessed data set.
        configurations: Those whose data are looked at, of all plans in the folder.
        case_ids: The cases of the raw data set.

    Returns:
        Their ids by folder.
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
    """Removes cases from preprocessed data, in every format of nnU-Net's.

    Args:
        folder: Folder of the data.
        case_ids: Their ids.
    """
    for case_id in case_ids:
        for ending in (".pkl", ".b2nd", "_seg.b2nd", ".npz", ".npy", "_seg.npy"):
            (folder / f"{case_id}{ending}").unlink(missing_ok=True)
