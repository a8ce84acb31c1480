"""Implementation of `nnunet-conres plan` and `plan_and_preprocess`: fingerprint, plans, preprocessed data."""

from __future__ import annotations

import contextlib
import glob
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import nnunetv2
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunet_conres.datasets.raw import (
    TrainingCase,
    errors_in_files,
    find_dataset,
    find_training_cases,
    read_dataset_json,
)
from nnunet_conres.errors import InputError, writing_errors
from nnunet_conres.families import PLANNED
from nnunet_conres.folders import one_at_a_time
from nnunet_conres.images.volumes import reader_for
from nnunet_conres.nnunet import (
    NO_PLANS,
    PREPROCESSED,
    SPLITS_FILE,
    device_option,
    folder_from_environment,
    not_set,
    required_folder,
)
from nnunet_conres.parallel import map_cases
from nnunet_conres.planning.planners import CONFIGURATIONS, DEFAULT_MEMORY_TARGET, GIB, PLANNERS, PlannedConfiguration
from nnunet_conres.preprocessing.dataset import (
    OF_FILES,
    STOCK_PLANS,
    Preprocessed,
    PreprocessedDataset,
    cases_that_are_gone,
    read_plans,
    remove_cases,
)
from nnunet_conres.preprocessing.sources import (
    GT_SEGMENTATIONS,
    fingerprint_differences,
    note_in_fingerprint,
    sizes_and_times,
)
from nnunet_conres.text import aligned, first_few, format_shape, short_message

DEFAULT_PREPROCESSOR: Final = "DefaultPreprocessor"
DEFAULT_FINGERPRINT: Final = "DatasetFingerprintExtractor"

# nnU-Net's default numbers of processes
_PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}
_OTHER_PROCESSES = 4


@dataclass(frozen=True)
class PlanOptions:
    """Options of a planner.

    Attributes:
        architecture: A key of PLANNED.
        gpu_memory_target: Memory limit of a training step, GiB.
        overwrite_target_spacing: Spacing of 3d_fullres in mm, three values in nnU-Net's axis order; None for the
            spacing that nnU-Net determines.
        plans_name: Name of the plans; None for the planner's default.
        preprocessor_name: Name of a class in nnunetv2.preprocessing.
        verbose: Whether nnU-Net's planner prints its search.
    """

    architecture: str
    gpu_memory_target: float = DEFAULT_MEMORY_TARGET
    overwrite_target_spacing: Sequence[float] | None = None
    plans_name: str | None = None
    preprocessor_name: str = DEFAULT_PREPROCESSOR
    verbose: bool = False

    @property
    def resolved_plans_name(self) -> str:
        """Name of the plans, with the default filled in."""
        return self.plans_name if self.plans_name is not None else PLANNED[self.architecture].plans_name

    def errors(self) -> Iterator[str]:
        """Yield a message for each invalid option, independent of the data set."""
        target = self.gpu_memory_target
        if not (math.isfinite(target) and target > 0):
            yield f"The memory target is {target:g} GiB; expected a number above 0 for -gpu_memory_target."
        spacing = self.overwrite_target_spacing
        if spacing is not None and not (
            len(spacing) == 3 and all(math.isfinite(extent) and extent > 0 for extent in spacing)
        ):
            given = " ".join(f"{extent:g}" for extent in spacing)
            yield f"The target spacing is {given}; expected three numbers above 0 for -overwrite_target_spacing."
        name = self.resolved_plans_name
        if not re.fullmatch(r"[A-Za-z0-9.-]+(_[A-Za-z0-9.-]+)*", name) or name == STOCK_PLANS:
            yield (
                f"The plans name is {name!r}; expected letters, digits, -, . and single _ for -overwrite_plans_name, "
                f"and not {STOCK_PLANS}, which is nnU-Net's own."
            )
        if _find_class("preprocessing", self.preprocessor_name) is None:
            yield f"The preprocessor is {self.preprocessor_name!r}; expected a class in nnunetv2.preprocessing."


@dataclass(frozen=True)
class Planned:
    """Plans written for a data set.

    Attributes:
        dataset_name: Name of the data set.
        dataset_id: Number of the data set.
        plans_name: Name of the plans.
        plans_file: Path of the plans file.
        network_name: The network of the plans.
        trainer_name: The trainer for these plans.
        memory_target: Memory limit of a training step, bytes.
        configurations: The planned configurations.
        preprocessed: Preprocessed data by configuration; empty if nothing was preprocessed.
        skipped: Configurations requested for preprocessing that the plans do not have.
        notes: Further messages for the user.
        next_commands: The commands to run next.
    """

    dataset_name: str
    dataset_id: int
    plans_name: str
    plans_file: Path
    network_name: str
    trainer_name: str
    memory_target: int
    configurations: tuple[PlannedConfiguration, ...]
    preprocessed: tuple[Preprocessed, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    next_commands: tuple[str, ...] = ()

    def as_text(self) -> str:
        """Return a readable summary of the plans."""
        target = f"{self.memory_target / GIB:g} GiB"
        rows = [("configuration", "patch", "batch", "checkpointing", f"memory of {target}", "data")]
        for planned in self.configurations:
            rows.append(
                (
                    planned.name,
                    format_shape(planned.patch_size),
                    str(planned.batch_size),
                    planned.checkpointing or "-",
                    "nnU-Net's own" if planned.memory is None else f"{planned.memory / GIB:.2f} GiB",
                    planned.data_identifier,
                )
            )
        lines = [f"{self.dataset_name}: {self.plans_name} for {self.network_name}"]
        lines += [f"  {line}" for line in aligned(rows)]
        lines.append(f"Plans: {self.plans_file}")
        for data in self.preprocessed:
            there = data.cases - len(data.written)
            lines.append(f"Data of {data.configuration}: {len(data.written)} cases written, {there} existed already")
            if data.outdated:
                named = [f"{case_id} ({reason})" for case_id, reason in data.outdated.items()]
                lines.append(f"  of these {len(named)} again, because their raw files changed: {first_few(named)}")
        lines += [f"Data of {name}: none, the images don't need this configuration" for name in self.skipped]
        lines += self.notes
        lines += [f"Next: {command}" for command in self.next_commands]
        return "\n".join(lines)


def plan(dataset_ids: Sequence[int], options: PlanOptions, *, progress: bool = True) -> list[Planned]:
    """Plan data sets that have fingerprints, and write the plans.

    Args:
        dataset_ids: Numbers of the data sets.
        options: Options of the planner.
        progress: Whether to show progress bars on stderr.

    Returns:
        The plans, in the order of the data sets.

    Raises:
        InputError: An option or a data set is invalid; nothing was written. Lists all errors. Also if a data set can't
            be planned for this network and memory.
    """
    errors = list(options.errors())
    for dataset_id in dataset_ids:
        errors += _dataset_errors(dataset_id, options, needs_fingerprint=True)
    if errors:
        raise InputError(errors)
    return [_with_next_commands(_plan(dataset_id, options, progress)) for dataset_id in dataset_ids]


def plan_and_preprocess(
    dataset_ids: Sequence[int],
    options: PlanOptions,
    *,
    configurations: Sequence[str],
    processes: Sequence[int] | None = None,
    fingerprint_extractor: str = DEFAULT_FINGERPRINT,
    fingerprint_processes: int = 8,
    verify_dataset_integrity: bool = False,
    clean: bool = False,
    preprocess: bool = True,
    progress: bool = True,
) -> list[Planned]:
    """Extract missing or outdated fingerprints, plan, and preprocess missing or outdated cases.

    Args:
        dataset_ids: Numbers of the data sets.
        options: Options of the planner.
        configurations: Configurations to preprocess; those that a data set doesn't have are skipped.
        processes: Number of processes per configuration, or one number for all; None for nnU-Net's defaults.
        fingerprint_extractor: Name of a class in nnunetv2.experiment_planning.
        fingerprint_processes: Number of processes for the fingerprint.
        verify_dataset_integrity: Whether nnU-Net checks the raw data first.
        clean: Whether to replace existing fingerprints and, with `preprocess`, to remove preprocessed cases that the
            raw data set no longer has.
        preprocess: Whether to preprocess.
        progress: Whether to show progress bars on stderr.

    Returns:
        The plans, in the order of the data sets.

    Raises:
        InputError: An option or a data set is invalid; nothing was written. Lists all errors. Also if a data set can't
            be planned for this network and memory, or a case can't be preprocessed.
        RuntimeError: A process was killed.
    """
    errors = list(options.errors())
    for dataset_id in dataset_ids:
        errors += _dataset_errors(dataset_id, options, needs_fingerprint=False)
        errors += _unknown_configurations(dataset_id, options, configurations)
    extractor = _find_class("experiment_planning", fingerprint_extractor)
    if extractor is None:
        errors.append(
            f"The fingerprint extractor is {fingerprint_extractor!r}; expected a class in nnunetv2.experiment_planning."
        )
    if processes is None:
        processes = [_PROCESSES.get(name, _OTHER_PROCESSES) for name in configurations]
    if len(processes) == 1:
        processes = list(processes) * len(configurations)
    if len(processes) != len(configurations):
        errors.append(
            f"-np has {len(processes)} numbers; expected one, or one for each of {', '.join(configurations)}."
        )
    if any(number < 1 for number in (*processes, fingerprint_processes)):
        errors.append("The number of processes is below 1; expected 1 or more for -np and -npfp.")
    if not errors and preprocess and not clean:
        for dataset_id in dataset_ids:
            errors += _errors_of_cases_that_are_gone(dataset_id, configurations)
    if errors:
        raise InputError(errors)

    for dataset_id in dataset_ids:
        if preprocess and clean:
            _remove_cases_that_are_gone(dataset_id, configurations)
        _take_fingerprint(
            dataset_id,
            extractor,
            fingerprint_processes,
            check=verify_dataset_integrity,
            clean=clean,
            verbose=options.verbose,
            progress=progress,
        )
    done = [_plan(dataset_id, options, progress) for dataset_id in dataset_ids]
    if preprocess:
        done = [
            _preprocess(one, dict(zip(configurations, processes, strict=True)), options.verbose, progress)
            for one in done
        ]
    return [_with_next_commands(one) for one in done]


def _take_fingerprint(
    dataset_id: int, extractor: type | None, processes: int, *, check: bool, clean: bool, verbose: bool, progress: bool
) -> None:
    """Extract a missing or outdated fingerprint, or always if `clean`. A lock admits one process at a time."""
    cases, fingerprint = _cases_of(dataset_id), _folder_of(dataset_id) / "dataset_fingerprint.json"
    with one_at_a_time(fingerprint):
        files = sizes_and_times(cases)
        different = fingerprint_differences(fingerprint, cases, is_copy_different=True) if fingerprint.is_file() else []
        if different:
            print(f"{fingerprint} does not match the raw data ({first_few(different)}). Extracting it again.")
        is_new = clean or bool(different) or not fingerprint.is_file()
        with _refusals_of_nnunet(find_dataset(dataset_id), fingerprint, OF_FILES):
            try:
                extract_fingerprint_dataset(dataset_id, extractor, processes, check, is_new, verbose, progress)
            except Exception:  # nnU-Net's readers raise different types
                _check_files(dataset_id, cases, processes, progress)
                raise
        if is_new:
            try:
                note_in_fingerprint(fingerprint, files)
            except InputError:  # for example a full disk
                fingerprint.unlink(missing_ok=True)
                raise


def _cases_of(dataset_id: int) -> list[TrainingCase]:
    raw = find_dataset(dataset_id)
    return find_training_cases(raw, read_dataset_json(raw)[0] or {})[0]


def _check_files(dataset_id: int, cases: Sequence[TrainingCase], processes: int, progress: bool) -> None:
    """Raise all errors in a data set's files: nnU-Net reports only one, and does not always name the file."""
    dataset_json = read_dataset_json(find_dataset(dataset_id))[0] or {}
    reader = reader_for(dataset_json, [case.images[0] for case in cases])
    jobs = [(case, reader) for case in cases]
    errors = [error for found in map_cases(errors_in_files, jobs, processes, "Checking", progress) for error in found]
    if errors:
        raise InputError(errors)


def _folder_of(dataset_id: int) -> Path:
    """Return the folder of the preprocessed data set."""
    return required_folder(PREPROCESSED) / find_dataset(dataset_id).name


def _errors_of_cases_that_are_gone(dataset_id: int, configurations: Sequence[str]) -> Iterator[str]:
    case_ids = [case.case_id for case in _cases_of(dataset_id)]
    for folder, gone in cases_that_are_gone(_folder_of(dataset_id), configurations, case_ids).items():
        yield (
            f"{folder} has {len(gone)} cases that are not in {find_dataset(dataset_id)}: {first_few(gone, 20)}. "
            f"Without splits nnU-Net would train on them. Remove them with --clean, or put their raw files back."
        )


def _remove_cases_that_are_gone(dataset_id: int, configurations: Sequence[str]) -> None:
    preprocessed, case_ids = _folder_of(dataset_id), [case.case_id for case in _cases_of(dataset_id)]
    for folder, gone in cases_that_are_gone(preprocessed, configurations, case_ids).items():
        print(
            f"Removing {len(gone)} cases from {folder} that are not in {find_dataset(dataset_id)}: "
            f"{first_few(gone, 20)}."
        )
        remove_cases(folder, gone)
        for case_id in gone:
            for copy in (preprocessed / GT_SEGMENTATIONS).glob(f"{glob.escape(case_id)}.*"):
                copy.unlink()


def _notes(dataset_id: int) -> tuple[str, ...]:
    """Return a message if the splits are unreadable or name cases that the raw data set does not have."""
    splits, known = _folder_of(dataset_id) / SPLITS_FILE, {case.case_id for case in _cases_of(dataset_id)}
    try:
        content = json.loads(splits.read_text(encoding="utf-8"))
        named = {str(case_id) for fold in content for part in ("train", "val") for case_id in fold[part]}
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        return (f"{splits} can't be read as nnU-Net's splits ({error}). Remove it, and nnU-Net makes new ones.",)
    gone = sorted(named - known)
    if not gone:
        return ()
    return (
        f"{splits} names {len(gone)} cases that are not in {find_dataset(dataset_id)}: {first_few(gone)}. "
        f"Remove it, and nnU-Net makes new splits, or make some with nnunet-conres split.",
    )


def _plan(dataset_id: int, options: PlanOptions, progress: bool) -> Planned:
    raw = find_dataset(dataset_id)
    # nnU-Net's output during its search is useful for debugging only
    silence = contextlib.nullcontext() if options.verbose else contextlib.redirect_stdout(io.StringIO())
    with _refusals_of_nnunet(raw, _folder_of(dataset_id)), silence:
        planner = PLANNERS[options.architecture](
            dataset_id,
            gpu_memory_target_in_gb=options.gpu_memory_target,
            preprocessor_name=options.preprocessor_name,
            plans_name=options.plans_name,
            overwrite_target_spacing=(
                None
                if options.overwrite_target_spacing is None
                else [float(extent) for extent in options.overwrite_target_spacing]
            ),
        )
        planner.progress = progress
        planner.plan_experiment()
    return Planned(
        dataset_name=raw.name,
        dataset_id=dataset_id,
        plans_name=planner.plans_identifier,
        plans_file=planner.plans_file,
        network_name=planner.family.title,
        trainer_name=planner.family.trainer_name,
        memory_target=planner.memory_target,
        configurations=tuple(planner.planned_configurations()),
    )


def _preprocess(planned: Planned, configurations: dict[str, int], verbose: bool, progress: bool) -> Planned:
    dataset = PreprocessedDataset(find_dataset(planned.dataset_id), planned.plans_file.parent, planned.plans_name)
    done = dataset.complete(configurations, verbose=verbose, progress=progress)
    made = tuple(data.configuration for data in done)
    skipped = tuple(name for name in configurations if name not in made)
    return replace(planned, preprocessed=tuple(done), skipped=skipped)


def _with_next_commands(planned: Planned) -> Planned:
    """Add notes and the remaining commands up to the training of 3d_fullres. None of them destroys data."""
    data = PreprocessedDataset(find_dataset(planned.dataset_id), planned.plans_file.parent, planned.plans_name)
    missing = data.missing("3d_fullres")
    commands = []
    if missing:
        # not nnUNetv2_preprocess: it empties the folder, which other plans may share and have filled by then
        commands.append(
            f"nnunet-conres plan_and_preprocess with the same options: {len(missing)} cases of 3d_fullres are missing"
            + (" or outdated" if data.folder("3d_fullres").is_dir() else "")
        )
    commands.append(
        f"nnUNetv2_train {planned.dataset_id} 3d_fullres 0 -tr {planned.trainer_name} -p {planned.plans_name}"
        f"{device_option()}"
    )
    return replace(planned, notes=_notes(planned.dataset_id), next_commands=tuple(commands))


def _dataset_errors(dataset_id: int, options: PlanOptions, needs_fingerprint: bool) -> Iterator[str]:
    """Yield a message for each error that prevents planning and can be found before it."""
    try:
        raw = find_dataset(dataset_id)
    except InputError as error:
        yield from error.errors
        return
    dataset_json, errors = read_dataset_json(raw)
    yield from errors
    if dataset_json is not None:
        missing = [key for key in ("numTraining",) if key not in dataset_json]
        if "channel_names" not in dataset_json and "modality" not in dataset_json:
            missing.append("channel_names")
        if missing:
            yield f"{raw / 'dataset.json'} has no {' and no '.join(missing)}; nnU-Net's planner needs them."
        yield from find_training_cases(raw, dataset_json)[1]
    folder = folder_from_environment(PREPROCESSED)
    if folder is None:
        yield not_set(PREPROCESSED)
        return
    preprocessed = folder / raw.name
    fingerprint = preprocessed / "dataset_fingerprint.json"
    if fingerprint.is_file():
        again = f"Extract it again: nnUNetv2_extract_fingerprint -d {dataset_id} --clean"
        try:
            json.loads(fingerprint.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if needs_fingerprint or isinstance(error, OSError):
                yield f"{fingerprint} cannot be read: {error}. {again}"
                return
        if needs_fingerprint and dataset_json is not None:
            cases = find_training_cases(raw, dataset_json)[0]
            different = fingerprint_differences(fingerprint, cases, is_copy_different=False)
            if different:
                yield (
                    f"The raw data changed after {fingerprint} was extracted: {first_few(different)}. {again}, or use "
                    f"nnunet-conres plan_and_preprocess."
                )
    elif needs_fingerprint:
        yield (
            f"{fingerprint} is missing. Extract it with nnUNetv2_extract_fingerprint -d {dataset_id}, or use "
            f"nnunet-conres plan_and_preprocess."
        )
    yield from _plans_file_errors(preprocessed / f"{options.resolved_plans_name}.json", options)


def _plans_file_errors(path: Path, options: PlanOptions) -> Iterator[str]:
    """Yield a message if the plans would replace a file that this planner did not write."""
    existing, ours = read_plans(path.parent).get(path.stem), PLANNED[options.architecture].planner_name
    if path.stem in NO_PLANS or (existing is None and path.exists()):
        yield f"{path} is not a file of plans, or cannot be read. Choose another -overwrite_plans_name."
    elif existing is not None and existing.get("experiment_planner_used") != ours:
        yield (
            f"{path} was made by {existing.get('experiment_planner_used')}; {ours} would replace it. Choose another "
            f"-overwrite_plans_name."
        )


def _unknown_configurations(dataset_id: int, options: PlanOptions, configurations: Sequence[str]) -> Iterator[str]:
    """Yield a message for each name that neither a planner nor the existing plans know."""
    known = set(CONFIGURATIONS)
    preprocessed = folder_from_environment(PREPROCESSED)
    with contextlib.suppress(InputError):  # reported elsewhere
        if preprocessed is not None:
            plans = read_plans(preprocessed / find_dataset(dataset_id).name).get(options.resolved_plans_name, {})
            known |= set(plans.get("configurations", ()))
    for name in configurations:
        if name not in known:
            yield f"{name!r} is not a configuration; expected some of {', '.join(sorted(known))} for -c."


def _find_class(folder: str, name: str) -> type | None:
    return recursive_find_python_class(str(Path(nnunetv2.__path__[0], folder)), name, f"nnunetv2.{folder}")


@contextlib.contextmanager
def _refusals_of_nnunet(
    raw: Path, target: Path, kinds: tuple[type[Exception], ...] = (AssertionError,)
) -> Iterator[None]:
    """Convert nnU-Net's exceptions about a data set, or while it writes a target, to InputError."""
    try:
        with writing_errors(target):
            yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(f"nnU-Net rejects {raw}: {short_message(error)}") from error
