"""Run the command of a rule under a lock, unless its work is already done, and record the result.

The workflow's rules call ``python -m nnunet_conres.workflow.step EXPERIMENT STEP --record RECORD ...``. The content of
a file decides whether it is complete, never its mere existence. A step can therefore be killed at any time, restarted,
or started by two workflows at once.

This module closes gaps of Snakemake. Snakemake knows the steps of one folder only, but two workflows with separate
folders may share the data set and its trainings. If it is killed, its jobs live on, and it later starts them again. It
kills the shell of a job, but not the processes that the shell started. It counts GPUs, but does not assign them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.files import try_read_json, write_if_changed
from nnunet_conres.locks import LockedError, hold, hold_some, holder, private_folder
from nnunet_conres.nnunet import CHECKPOINTS, SPLITS_FILE
from nnunet_conres.workflow import commands, records
from nnunet_conres.workflow.config import Experiment, Model, ensemble_name, parse_config
from nnunet_conres.workflow.records import digest

MARK: Final = "[workflow]"
# Variable read by this package's trainers, which are not imported here because that would load torch.
CHECKPOINT_VARIABLE: Final = "nnUNet_conres_checkpoint_minutes"
# Lines of a failed step's log to show in Snakemake's output.
_SHOWN_LINES: Final = 20
# Content of a stamp during a rebuild, so that leftovers of a killed command never count as done.
_UNFINISHED: Final = {"unfinished": True}
_GRACE_SECONDS: Final = 20.0
# If a fold's files changed within this time, but no process holds its lock, a training started by hand is running.
_BY_HAND_SECONDS: Final = 600.0


class StepError(InputError):
    """A step cannot be done; the message says why and what to do."""


# --- commands --------------------------------------------------------------------------------------------------------


def run(
    command: Sequence[str],
    log: Path,
    *,
    keep: Sequence[int] = (),
    environment: dict[str, str] | None = None,
    output: Path | None = None,
) -> None:
    """Run a command to its end; no process that it starts outlives this call.

    Args:
        command: The command.
        log: File that its output is appended to.
        keep: File descriptors of locks for the command to hold too. If only this process is killed, the locks last as
            long as the command.
        environment: Variables in addition to those of this process.
        output: File for its standard output, instead of the log.

    Raises:
        StepError: The command could not be started, or failed.
    """
    with contextlib.ExitStack() as files:
        with file_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            log_file = files.enter_context(log.open("ab", buffering=0))
        job = f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        begun = f"{MARK} {datetime.now():%Y-%m-%d %H:%M:%S} on {os.uname().nodename}{job}: {' '.join(command)}\n"
        _note(log_file, log, begun)
        with _passed_on() as pass_on_to:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=files.enter_context(output.open("wb")) if output else log_file,
                    stderr=log_file,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
                    pass_fds=keep,
                    start_new_session=True,
                )
            except FileNotFoundError as error:
                raise StepError(
                    f"{command[0]} was not found. Install it into the environment of the workflow."
                ) from error
            except PermissionError as error:
                raise StepError(f"{command[0]} cannot be executed: {error.strerror}. Install it again.") from error
            try:
                pass_on_to(process)
                # with a timeout: otherwise a signal handler could not wait for the same process
                code = process.wait(threading.TIMEOUT_MAX)
            except SystemExit as signalled:
                when = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
                _note(log_file, log, f"{MARK} {when} killed by signal {int(signalled.code or 0) - 128}\n")
                raise
            _end_group(process.pid)
        _note(log_file, log, f"{MARK} {datetime.now():%Y-%m-%d %H:%M:%S} ended with exit code {code}\n")
    if code != 0:
        raise StepError(f"{command[0]} ended with exit code {code}; its output: {log}")


def _note(log_file: io.FileIO, log: Path, text: str) -> None:
    with file_errors(log):
        log_file.write(text.encode())


@contextlib.contextmanager
def _passed_on() -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """Make signals that are to end this process end the command first.

    Yields:
        A function to call with the started command. It ends the command at once if a signal has already arrived.
    """
    started: list[subprocess.Popen[bytes]] = []
    too_early: list[int] = []

    def end(number: int, frame: Any) -> None:
        if not started:
            too_early.append(number)
            return
        _signal_group(started[0].pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started[0].wait(_GRACE_SECONDS)
        _end_group(started[0].pid)
        raise SystemExit(128 + number)

    def pass_on_to(process: subprocess.Popen[bytes]) -> None:
        started.append(process)
        if too_early:
            end(too_early[0], None)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield pass_on_to
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_group(group: int) -> None:
    # the data loaders of a killed training would wait for it forever
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


@contextlib.contextmanager
def gpus(experiment: Experiment, number: int) -> Iterator[tuple[dict[str, str], list[int]]]:
    """Reserve GPUs of this machine for one command, unless a scheduler assigns them.

    Yields:
        Variables for the command, and file descriptors of the locks on its GPUs.
    """
    if experiment.device != "cuda" or number == 0 or "SLURM_JOB_ID" in os.environ:
        yield {}, []
        return
    names = gpus_here()
    if not names:  # the command itself reports this best
        yield {}, []
        return
    if number > len(names):
        raise StepError(f"{number} GPUs are needed, but this machine has {len(names)}: {', '.join(names)}.")
    folder = private_folder(Path(os.environ.get("TMPDIR") or "/tmp") / f"nnunet-conres-gpus-{os.getuid()}")
    with hold_some([folder / f"gpu_{name}.lock" for name in names], number) as (positions, descriptors):
        yield {"CUDA_VISIBLE_DEVICES": ",".join(names[position] for position in positions)}, descriptors


def gpus_here(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them.

    Args:
        environment: Variables of the process; None for those of this process.
    """
    visible = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(lines))]


# --- steps before training --------------------------------------------------------------------------------------------


class Step:
    """One step of an experiment.

    Args:
        experiment: The experiment.
        record: The record to write. Some steps read their model or report from its name.
        threads: Number of threads that the command may use.

    Attributes:
        log: File for the command's output, named like the record.
    """

    def __init__(self, experiment: Experiment, record: Path, threads: int = 1) -> None:
        self.experiment = experiment
        self.record = record
        self.threads = threads
        self.log = (experiment.logs / record.relative_to(experiment.records)).with_suffix(".log")

    def lock(self, name: str) -> contextlib.AbstractContextManager[int]:
        """Return a lock of the data set, shared by all workflows with the same preprocessed folder."""
        folder = self.experiment.preprocessed.parent / ".workflow"
        return hold(folder / f"{self.experiment.dataset}_{name}.lock")

    def stamp(self, name: str) -> Path:
        """Return the file that notes the inputs of a result in the preprocessed folder."""
        return self.experiment.preprocessed / "workflow" / f"{name}.json"

    def say(self, text: str) -> None:
        print(text, flush=True)
        with file_errors(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as file:
                file.write(f"{MARK} {text}\n")

    def _raw(self) -> Any:
        return try_read_json(self.experiment.records / "raw.json")

    def convert(self) -> None:
        """Convert BraTS folders to the raw data set, unless it exists."""
        with self.lock("dataset") as descriptor:
            if (self.experiment.raw / "dataset.json").is_file():
                self.say(f"{self.experiment.raw} exists already.")
            elif self.experiment.brats:
                # the conversion requires nnUNet_raw to exist, but a new experiment has no such folder yet
                with file_errors(self.experiment.raw.parent):
                    self.experiment.raw.parent.mkdir(parents=True, exist_ok=True)
                run(commands.convert(self.experiment, self.threads), self.log, keep=[descriptor])
            state = records.raw_state(self.experiment)
            if state is None:
                raise StepError(f"{self.experiment.raw} is not a data set; expected a dataset.json in it.")
            write_if_changed(self.record, state)

    def test_cases(self) -> None:
        """Record the state of the test cases."""
        state = records.test_state(self.experiment)
        if state is None:
            raise StepError(f"{self.experiment.test_images} is not a folder; expected the test images there.")
        write_if_changed(self.record, state)

    def fingerprint(self) -> None:
        """Check the data set's integrity and extract its fingerprint."""
        path, stamp = self.experiment.preprocessed / "dataset_fingerprint.json", self.stamp("fingerprint")
        with self.lock("dataset") as descriptor:
            made_of = try_read_json(stamp)
            if made_of != self._raw() or try_read_json(path) is None:
                # a valid fingerprint made by hand before the workflow is kept
                renew = made_of is not None or (path.exists() and try_read_json(path) is None)
                if renew:
                    write_if_changed(stamp, _UNFINISHED)
                command = commands.fingerprint(self.experiment, self.threads)
                run([*command, *(["--clean"] if renew else [])], self.log, keep=[descriptor])
                write_if_changed(stamp, self._raw())
            write_if_changed(self.record, {"content": records.file_digest(path), "raw": self._raw()["content"]})

    def split(self) -> None:
        """Make the folds; splits made by hand are used unchanged."""
        path, stamp = self.experiment.preprocessed / SPLITS_FILE, self.stamp("splits")
        wanted = {"raw": self._raw(), "options": try_read_json(self.experiment.records / "options" / "splits.json")}
        with self.lock("splits") as descriptor:
            made_of = try_read_json(stamp)
            if path.exists() and made_of is None:
                self.say(f"{path} existed before and is used unchanged.")
            elif made_of != wanted or try_read_json(path) is None:
                if path.exists():
                    self._nobody_trains_on(path)
                command = commands.split(self.experiment, self.threads)
                run([*command, *(["--force"] if path.exists() else [])], self.log, keep=[descriptor])
                write_if_changed(stamp, wanted)
            states = records.split_states(try_read_json(path), self.experiment.folds)
            if states is None:
                raise StepError(
                    f"{path} does not have all folds {', '.join(map(str, self.experiment.folds))}. nnU-Net would split "
                    f"the missing ones at random. Remove the file, or choose folds that it has."
                )
            for fold, state in states.items():
                write_if_changed(records.split_record(self.experiment, fold), state)

    def plan(self, plans_name: str, configuration: str) -> None:
        """Make the plans; plans made by hand are used unchanged."""
        path, stamp = self.experiment.preprocessed / f"{plans_name}.json", self.stamp(f"plans_{plans_name}")
        wanted = {
            "fingerprint": try_read_json(self.experiment.records / "fingerprint.json"),
            "options": try_read_json(self.experiment.records / "options" / f"plans_{plans_name}.json"),
        }
        command = commands.plan(self.experiment, plans_name)
        with self.lock("dataset") as descriptor:
            made_of = try_read_json(stamp)
            if try_read_json(path) is not None and made_of is None:
                self.say(f"{path} existed before and is used unchanged.")
            elif not command and try_read_json(path) is None:
                raise StepError(f"{path} does not exist, and its planner is none. Make the plans, or name a planner.")
            elif command and (made_of != wanted or try_read_json(path) is None):
                if path.exists():
                    self._nobody_trains_on(path, f"*__{plans_name}__*")
                run(command, self.log, keep=[descriptor])
                write_if_changed(stamp, wanted)
            plans = try_read_json(path)
        state = records.plans_state(plans, configuration)
        if state is None:
            there = ", ".join((plans or {}).get("configurations", {}))
            raise StepError(f"{path} has no configuration {configuration}; it has {there}.")
        write_if_changed(self.record, state)

    def preprocess(self, plans_name: str, configuration: str) -> None:
        """Preprocess a configuration, once for all plans and workflows that need the same data."""
        state = records.plans_state(try_read_json(self.experiment.preprocessed / f"{plans_name}.json"), configuration)
        if state is None:
            raise StepError(f"{plans_name} has no configuration {configuration}.")
        identifier = state["data_identifier"]
        folder, stamp = self.experiment.preprocessed / identifier, self.stamp(f"data_{identifier}")
        wanted = {"raw": self._raw()["content"], "preprocessing": state["preprocessing"]}
        with self.lock("preprocess") as descriptor:
            made_of = try_read_json(stamp)
            if made_of is None and records.holds_all_cases(self.experiment, folder):
                self.say(f"{folder} existed before with all cases and is used unchanged.")
                write_if_changed(stamp, wanted)
            elif made_of != wanted or not records.holds_all_cases(self.experiment, folder):
                self._may_be_removed(folder, identifier, wanted)
                write_if_changed(stamp, _UNFINISHED)
                command = commands.preprocess(self.experiment, plans_name, configuration, self.threads)
                run(command, self.log, keep=[descriptor])
                if not records.holds_all_cases(self.experiment, folder):
                    raise StepError(f"{folder} does not have all cases after preprocessing; see {self.log}")
                write_if_changed(stamp, wanted)
        write_if_changed(self.record, state | {"raw": wanted["raw"]})

    def _nobody_trains_on(self, what: Path, models: str = "*") -> None:
        """Refuse to rebuild a file or folder while a training, possibly of another workflow, uses it."""
        results = Path(self.experiment.environment["nnUNet_results"]) / self.experiment.dataset
        for lock in sorted(results.glob(f"{models}/workflow/fold_*.lock")):
            who = holder(lock)
            if who is not None:
                raise StepError(
                    f"{what} must be rebuilt, but {who} is training {lock.parent.parent.name}, {lock.stem}. "
                    f"Wait for it. If another workflow needs different files of the same data set, give this workflow "
                    f"a separate nnUNet_preprocessed and nnUNet_results."
                )

    def _may_be_removed(self, folder: Path, identifier: str, wanted: dict[str, Any]) -> None:
        """Refuse to preprocess into a folder that trainings or other plans use: nnU-Net's command removes it first."""
        if not folder.is_dir():
            return
        self._nobody_trains_on(folder)
        for path in self.experiment.preprocessed.glob("*.json"):
            plans = try_read_json(path)
            if not isinstance(plans, dict) or "configurations" not in plans:
                continue
            for name in plans["configurations"]:
                state = records.plans_state(plans, name) or {}
                if state.get("data_identifier") == identifier and state["preprocessing"] != wanted["preprocessing"]:
                    raise StepError(
                        f"{folder} is also the data folder of {path.name}, {name}, which has other preprocessing "
                        f"settings. Give one of them another data_identifier."
                    )

    def memory(self) -> None:
        """Estimate the memory of a training. The estimate is only advice, so an error does not fail the step."""
        answer: dict[str, Any] = {"total_bytes": None}
        printed = self.record.with_name(f"{self.record.name}.partial")
        try:
            run(commands.memory(self.experiment, self.experiment.model(self.record.stem)), self.log, output=printed)
            answer = {"total_bytes": try_read_json(printed)["total"]}
        except (StepError, TypeError, KeyError) as error:
            self.say(f"The memory of this training could not be estimated: {error}")
        printed.unlink(missing_ok=True)
        write_if_changed(self.record, answer)

    # --- training -------------------------------------------------------------------------------------------------

    def train(self, model: Model, fold: int, number_of_gpus: int) -> None:
        """Train one fold, from where an earlier attempt ended."""
        experiment = self.experiment
        made_of = {
            "data": digest(try_read_json(records.data_record(experiment, model))),
            "split": digest(try_read_json(records.split_record(experiment, fold))),
            "trainer": digest(try_read_json(records.trainer_record(experiment, model))),
        }
        cases = try_read_json(records.split_record(experiment, fold))["validation"]
        folder, stamp = experiment.fold_folder(model, fold), records.stamp_of_fold(experiment, model, fold)
        with hold(experiment.fold_lock(model, fold)) as descriptor:
            self._check_unchanged(model, fold)
            self._move_outdated(model, fold, made_of)
            self._look_for_others(folder, stamp)
            write_if_changed(stamp, made_of)
            if records.missing_validation(folder, cases):
                write_if_changed(_known_logs(stamp), {"logs": _logs(folder)})
                with gpus(experiment, number_of_gpus) as (variables, descriptors):
                    command = [*commands.train(experiment, model, fold), *self._how_to_go_on(folder)]
                    run(command, self.log, keep=[descriptor, *descriptors], environment=variables)
                missing = records.missing_validation(folder, cases)
                if missing:
                    raise StepError(f"{folder} is not complete after the training: {missing}.")
            else:
                self.say(f"{folder} is done.")
            checkpoint = records.file_digest(folder / CHECKPOINTS[0])
            write_if_changed(self.record, made_of | {"checkpoint": checkpoint})

    def _how_to_go_on(self, folder: Path) -> list[str]:
        """Return the flag with which nnU-Net continues from the checkpoints in a folder."""
        for name in CHECKPOINTS:
            checkpoint = folder / name
            if checkpoint.is_file() and not zipfile.is_zipfile(checkpoint):
                # Stock trainers do not write atomically; --c would fail on a truncated file every time.
                checkpoint.rename(checkpoint.with_name(f"{name}.damaged"))
                self.say(f"{checkpoint} was truncated when the training was killed. Renamed to {name}.damaged.")
        there = [name for name in CHECKPOINTS if (folder / name).is_file()]
        if CHECKPOINTS[0] in there:
            return ["--val"]
        return ["--c"] if there else []

    def _check_unchanged(self, model: Model, fold: int) -> None:
        """Check that the files that nnU-Net will read have not changed since this run began."""
        experiment = self.experiment
        plans = experiment.preprocessed / f"{model.plans}.json"
        splits = experiment.preprocessed / SPLITS_FILE
        state = records.plans_state(try_read_json(plans), model.configuration) or {"plans": None}
        prepared = try_read_json(records.data_record(experiment, model)) or {}
        folds = records.split_states(try_read_json(splits), [fold]) or {}
        as_before = {
            plans: all(prepared.get(key) == value for key, value in state.items()),
            splits: folds.get(fold) == try_read_json(records.split_record(experiment, fold)),
        }
        for path, same in as_before.items():
            if not same:
                raise StepError(
                    f"{path} changed after this run of the workflow began, by hand or by another workflow. Run the "
                    f"workflow again: it repeats the steps that depend on the change."
                )

    def _look_for_others(self, folder: Path, stamp: Path) -> None:
        """Refuse a fold that appears to be in training by hand, which holds no lock.

        Every training starts a new log. This workflow's last attempt started at most one, so any further new log
        belongs to someone else.
        """
        if not folder.is_dir():
            return
        known = (try_read_json(_known_logs(stamp)) or {}).get("logs")
        others = not stamp.is_file() if known is None else len(set(_logs(folder)) - set(known)) > 1
        if not others:
            return
        newest = max((path.stat().st_mtime for path in folder.glob("*")), default=0.0)
        if time.time() - newest < _BY_HAND_SECONDS and not (folder / CHECKPOINTS[0]).is_file():
            raise StepError(
                f"{folder} changed {time.time() - newest:.0f} s ago outside a workflow: it seems to be in "
                f"training. Wait for it, or end it and try again in {_BY_HAND_SECONDS / 60:.0f} minutes."
            )
        self.say(f"{folder} was trained outside the workflow; its completed epochs are kept.")

    def _move_outdated(self, model: Model, fold: int, made_of: dict[str, str]) -> None:
        """Move folds of a model aside that were trained with other data, plans, splits or another trainer.

        This includes folds other than this one: all share one plans.json, and our trainers refuse to mix topologies.
        """
        base = self.experiment.model_folder(model)
        for stamp in sorted(base.glob("workflow/fold_*.json")):
            before = try_read_json(stamp) or {}
            own = stamp.stem == f"fold_{fold}"
            changed = [
                part for part, value in before.items() if value != made_of.get(part) and (own or part != "split")
            ]
            if not changed:
                continue
            with contextlib.ExitStack() as stack:
                if not own:
                    try:
                        stack.enter_context(hold(stamp.with_suffix(".lock"), wait=False))
                    except LockedError:
                        continue  # the job that trains it handles it
                old = base / stamp.stem
                if old.is_dir():
                    aside = base / "replaced" / f"{stamp.stem}_{datetime.now():%Y%m%d-%H%M%S}"
                    aside.parent.mkdir(exist_ok=True)
                    old.rename(aside)
                    self.say(f"{', '.join(changed)} of {old} changed since it was trained; it is kept as {aside}.")
                stamp.unlink()

    # --- steps after training ---------------------------------------------------------------------------------------

    def predict(self, model: Model, part: int, number_of_gpus: int) -> None:
        """Predict one part of the test cases; predictions appear when the whole part is done."""
        experiment = self.experiment
        trained = [records.training_record(experiment, model, fold) for fold in experiment.folds]
        made_of = [try_read_json(path) for path in trained] + [
            try_read_json(experiment.records / "test.json"),
            try_read_json(experiment.records / "options" / "predict.json"),
            experiment.probabilities,
        ]
        folder = experiment.predictions(model.name)
        partial = experiment.predictions(f".{model.name}_part_{part}")
        command = commands.predict(experiment, model, part, str(partial), max(1, (self.threads - 1) // 2))
        with hold(folder / f".part_{part}.lock") as descriptor:
            # remove predictions by other checkpoints or for other test cases
            for stamp in folder.glob(".part_*.json"):
                before = try_read_json(stamp) or {}
                if before.get("made_of") != digest(made_of):
                    for name in before.get("files", []):
                        (experiment.work / name).unlink(missing_ok=True)
                    stamp.unlink(missing_ok=True)
            stamp = folder / f".part_{part}.json"
            if self._is_done(stamp, made_of):
                return
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with gpus(experiment, number_of_gpus) as (variables, descriptors):
                run(command, self.log, keep=[descriptor, *descriptors], environment=variables)
            self._publish(partial, folder, made_of, stamp)

    def ensemble(self) -> None:
        """Make an ensemble's predictions; they appear when all are done."""
        experiment, name = self.experiment, self.record.stem
        folder, partial = experiment.predictions(name), experiment.predictions(f".{name}")
        members = next(members for members in experiment.ensembles if ensemble_name(members) == name)
        command = commands.ensemble(experiment, members, str(partial), self.threads)
        of_what = [f"predict/{member}/part_*.json" for member in members]
        made_of = [_whatever_processes(command), self._contents(of_what)]
        with hold(partial.with_name(f"{partial.name}.lock")) as descriptor:
            if self._is_done(folder / ".made.json", made_of):
                return
            shutil.rmtree(partial, ignore_errors=True)
            run(command, self.log, keep=[descriptor])
            self._publish(partial, folder, made_of, folder / ".made.json")

    def postprocess(self) -> None:
        """Choose a model's post-processing; the result replaces an earlier one when it is complete."""
        name = self.record.stem
        file = self.experiment.postprocessing(name)
        command = commands.postprocess(self.experiment, self.experiment.model(name), self.threads)
        made_of = [_whatever_processes(command), self._contents([f"train/{name}/fold_*.json"])]
        stamp = file.with_name(f".{file.name}")
        # no leading dot, to differ from the command's own lock
        with hold(file.with_name(f"{file.stem}.lock")) as descriptor:
            if self._is_done(stamp, made_of):
                return
            run(command, self.log, keep=[descriptor])
            self._record([file], made_of, stamp)

    def package(self) -> None:
        """Write the folder that a model's container is built from; an earlier one is removed first."""
        name = self.record.stem
        folder = self.experiment.package(name)
        command = commands.package(self.experiment, self.experiment.model(name))
        of_what = [f"train/{name}/fold_*.json", f"postprocess/{name}.json", "options/package.json"]
        made_of = [command, self._contents(of_what)]
        stamp = folder.with_name(f".{name}.json")
        with hold(folder.with_name(f"{name}.lock")) as descriptor:
            if self._is_done(stamp, made_of):
                return
            if stamp.is_file():
                shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():  # otherwise the workflow did not write it, and the command refuses it
                write_if_changed(stamp, _UNFINISHED)
            run(command, self.log, keep=[descriptor])
            self._record(sorted(path for path in folder.rglob("*") if path.is_file()), made_of, stamp)

    def compare(self) -> None:
        """Write a report; it replaces an earlier one when it is complete."""
        folder = self.experiment.work / "report" / self.record.stem
        if self.record.stem == "folds":
            compare, of_what = commands.compare_folds, ["train/*/*.json"]
        else:
            compare, of_what = commands.compare_test, ["predict/*/*.json", "ensemble/*.json", "test.json"]
        command = compare(self.experiment, str(folder), self.threads)
        made_of = [_whatever_processes(command), self._contents([*of_what, "postprocess/*.json"])]
        stamp = folder / ".made.json"
        with hold(folder.with_name(f"{folder.name}.lock")) as descriptor:
            if self._is_done(stamp, made_of):
                return
            stamp.unlink(missing_ok=True)
            run(command, self.log, keep=[descriptor])
            files = [folder / "report.html", folder / "report.json"]
            for path in files:
                if not path.is_file():
                    raise StepError(f"{path} was not written; see {self.log}")
            self._record(files, made_of, stamp)

    def _contents(self, patterns: Iterable[str]) -> dict[str, Any]:
        """Return the records that match any of the patterns, by name."""
        folder = self.experiment.records
        found = records.find_records(folder, patterns)
        return {str(path.relative_to(folder)): try_read_json(path) for path in found}

    def _is_done(self, stamp: Path, made_of: Any) -> bool:
        """Return whether complete files from the same inputs exist; if so, write their record again.

        This happens if a step continued after Snakemake was killed, or if Snakemake runs a finished step again.
        """
        before = try_read_json(stamp) or {}
        files = [self.experiment.work / name for name in before.get("files", [])]
        if before.get("made_of") != digest(made_of) or not all(path.is_file() for path in files):
            return False
        if before.get("content") != self._content_of(files):
            return False
        self.say(f"{stamp.parent} is done.")
        write_if_changed(self.record, before)
        return True

    def _content_of(self, files: Sequence[Path]) -> str:
        return digest({str(path.relative_to(self.experiment.work)): records.file_digest(path) for path in files})

    def _record(self, files: Sequence[Path], made_of: Any, stamp: Path) -> None:
        names = [str(path.relative_to(self.experiment.work)) for path in files]
        record = {"made_of": digest(made_of), "content": self._content_of(files), "files": names}
        write_if_changed(stamp, record)
        write_if_changed(self.record, record)

    def _publish(self, partial: Path, folder: Path, made_of: Any, stamp: Path) -> None:
        """Move finished files to their folder one by one, remove earlier ones, and record the new ones."""
        folder.mkdir(parents=True, exist_ok=True)
        before = (try_read_json(stamp) or {}).get("files", [])
        names = sorted(path.name for path in partial.iterdir())
        for name in names:
            os.replace(partial / name, folder / name)
        partial.rmdir()
        for earlier in {self.experiment.work / name for name in before} - {folder / name for name in names}:
            earlier.unlink(missing_ok=True)
        # nnU-Net's JSON files on how it predicted have the same names for all parts
        self._record([folder / name for name in names if not name.endswith(".json")], made_of, stamp)


def _known_logs(stamp: Path) -> Path:
    """Return the file that lists a fold's logs at the start of this workflow's last attempt to train it."""
    return stamp.with_suffix(".logs")


def _logs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("training_log_*.txt"))


def _whatever_processes(command: Sequence[str]) -> list[str]:
    """Return a command without its number of processes, which does not affect the result."""
    position = command.index("-np")
    return [*command[:position], *command[position + 2 :]]


# --- the command line -------------------------------------------------------------------------------------------------


def read_experiment(path: Path) -> Experiment:
    """Read the experiment that the workflow saved."""
    content = json.loads(path.read_text())
    return parse_config(content["content"], Path(content["base"]), str(path))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a step.

    Returns:
        The exit code: 1 if the step failed, with the reason on stderr.
    """
    parser = argparse.ArgumentParser(prog="nnunet_conres.workflow.step", description="A step of the workflow.")
    parser.add_argument("experiment", type=Path)
    parser.add_argument("step")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model")
    parser.add_argument("--fold", type=int)
    parser.add_argument("--part", type=int)
    parser.add_argument("--plans")
    parser.add_argument("--configuration")
    parser.add_argument("--gpus", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        experiment = read_experiment(arguments.experiment)
    except InputError as error:
        print(f"{MARK} error: {error}", file=sys.stderr)
        return 1
    # the configuration overrides inherited variables
    os.environ.update(experiment.environment)
    os.environ[CHECKPOINT_VARIABLE] = f"{experiment.checkpoint_minutes:g}"
    step = Step(experiment, arguments.record, arguments.threads)
    try:
        steps: dict[str, Callable[[], None]] = {
            "convert": step.convert,
            "test_cases": step.test_cases,
            "fingerprint": step.fingerprint,
            "split": step.split,
            "plan": lambda: step.plan(arguments.plans, arguments.configuration),
            "preprocess": lambda: step.preprocess(arguments.plans, arguments.configuration),
            "memory": step.memory,
            "train": lambda: step.train(experiment.model(arguments.model), arguments.fold, arguments.gpus),
            "predict": lambda: step.predict(experiment.model(arguments.model), arguments.part, arguments.gpus),
            "ensemble": step.ensemble,
            "postprocess": step.postprocess,
            "compare": step.compare,
            "package": step.package,
        }
        steps[arguments.step]()
    except InputError as error:
        with contextlib.suppress(OSError):
            print(*step.log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:], sep="\n", file=sys.stderr)
        print(f"{MARK} error: {error}", file=sys.stderr)
        _note_failure(step.log, str(error))
        return 1
    except Exception as error:
        _note_failure(step.log, f"{type(error).__name__}: {error}")
        raise
    return 0


def _note_failure(log: Path, text: str) -> None:
    """Write the reason to the log, where `status` reads it; errors of the file system are ignored."""
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"{MARK} failed: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
