"""State of an experiment: which steps of every model and fold are done, running, waiting or failed.

Snakemake's `--summary` lists records; it shows neither epochs nor running trainings.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nnunet_conres.files import try_read_json
from nnunet_conres.locks import holder
from nnunet_conres.nnunet import SPLITS_FILE
from nnunet_conres.text import aligned
from nnunet_conres.workflow import records
from nnunet_conres.workflow.config import Experiment, Model, ensemble_name, iterate_trainings
from nnunet_conres.workflow.launch import job_name
from nnunet_conres.workflow.resources import (
    epoch_seconds,
    lost_at_most,
    number_of_epochs,
    read_training_log,
    training_retries,
)

State = Literal["waiting", "running", "done", "failed"]
_ERROR_LINE = re.compile(r"^(\w+(\.\w+)*(Error|Exception|Interrupt)\b|.*[Ee]rror:|.*CUDA out of memory|slurmstepd: )")
_MARK = "[workflow] "
_SECONDS_TO_ANSWER = 10.0
_ENDED = " ended with exit code "


@dataclass(frozen=True)
class FoldStatus:
    """State of the training of a fold.

    Attributes:
        model: Name of the model.
        fold: The fold.
        state: done: complete with validation; running: a process holds its lock; failed: the last attempt failed and
            nothing runs; waiting: otherwise, also between two attempts.
        epoch: Number of completed epochs.
        epochs: Total number of epochs.
        dice: Validation Dice when done, otherwise mean pseudo Dice after the last epoch; None if there is none.
        seconds_left: Estimate for a running training, without validation; None if unknown.
        attempts: Number of times that the training was started.
        where: The process that runs it, the queued job, or how the last attempt ended.
    """

    model: str
    fold: int
    state: State
    epoch: int
    epochs: int
    dice: float | None = None
    seconds_left: float | None = None
    attempts: int = 0
    where: str = ""


@dataclass(frozen=True)
class Status:
    """State of an experiment.

    Attributes:
        folds: Every fold of every model.
        steps: Progress of the steps other than training.
        losses: Training time that a killed training loses at most, by model.
        retries: Maximum number of restarts of a training.
    """

    folds: Sequence[FoldStatus]
    steps: dict[str, str]
    losses: dict[str, str]
    retries: int

    def as_text(self) -> str:
        """Return the state as readable tables."""
        head = ("model", "fold", "state", "epoch", "Dice", "left", "attempts", "")
        rows = [
            (
                one.model,
                str(one.fold),
                one.state,
                f"{one.epoch}/{one.epochs}",
                "" if one.dice is None else f"{one.dice:.3f}",
                "" if one.seconds_left is None else duration(one.seconds_left),
                str(one.attempts or ""),
                one.where,
            )
            for one in self.folds
        ]
        lines = aligned([head, *rows])
        counts = {state: sum(one.state == state for one in self.folds) for state in ("done", "running", "failed")}
        counts["waiting"] = len(self.folds) - sum(counts.values())
        lines += ["", "trainings: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)]
        lines += [f"{step}: {done}" for step, done in self.steps.items()]
        lines += ["", f"A killed training is restarted up to {self.retries} times. It loses at most:"]
        lines += [f"  {model}: {loss}" for model, loss in self.losses.items()]
        return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float) -> str:
    """Format a duration in at most two units, such as 2 h 05 min."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    days, hours, rest = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {rest:02d} min" if hours else f"{rest} min"


def status(experiment: Experiment) -> Status:
    """Return the state of an experiment. Changes nothing, and works whether or not the experiment is running."""
    splits = try_read_json(experiment.preprocessed / SPLITS_FILE)
    cases = records.split_states(splits, experiment.folds) or {}
    jobs = _jobs_of_trainings(experiment)
    folds = [
        _fold_status(experiment, model, fold, cases.get(fold, {}).get("validation", []), jobs.get((model.name, fold)))
        for model, fold in iterate_trainings(experiment)
    ]
    return Status(
        folds=folds,
        steps=_steps(experiment),
        losses={model.name: lost_at_most(experiment, model) for model in experiment.models},
        retries=training_retries(experiment),
    )


def _fold_status(experiment: Experiment, model: Model, fold: int, cases: Sequence[str], job: str | None) -> FoldStatus:
    folder = experiment.fold_folder(model, fold)
    log = read_training_log(folder)
    epochs = number_of_epochs(experiment, model)
    attempts, error, note = _attempts(experiment.training_log(model, fold))
    common: dict[str, Any] = {"model": model.name, "fold": fold, "epochs": epochs, "attempts": attempts}
    running = holder(experiment.fold_lock(model, fold))
    if running is not None:
        seconds = epoch_seconds(experiment, model)
        left = None if seconds is None else (epochs - log.epochs) * seconds
        if left is not None and log.last is not None and log.epochs < epochs:
            left = max(0.0, left - min(seconds or 0.0, time.time() - log.last.timestamp()))
        where = str(running) if log.epochs < epochs else f"validation, {running}"
        return FoldStatus(
            state="running", epoch=log.epochs, dice=log.dice, seconds_left=left, where=where, **common
        )  # fmt: skip
    if not records.missing_validation(folder, cases):
        summary = try_read_json(folder / "validation" / "summary.json")
        return FoldStatus(state="done", epoch=epochs, dice=summary["foreground_mean"].get("Dice"), **common)
    if job is not None:
        return FoldStatus(state="waiting", epoch=log.epochs, dice=log.dice, where=job, **common)
    if error is not None:
        return FoldStatus(state="failed", epoch=log.epochs, dice=log.dice, where=error, **common)
    return FoldStatus(state="waiting", epoch=log.epochs, dice=log.dice, where=note, **common)


def _jobs_of_trainings(experiment: Experiment) -> dict[tuple[str, int], str]:
    """Return the trainings in SLURM's queue, by model and fold; empty without SLURM.

    The SLURM plugin gives all jobs of a run the same name. The job's comment contains rule and wildcards.
    """
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--me", "--noheader", "--format=%i|%j|%T|%r|%k"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS_TO_ANSWER)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    trainings = {
        f"rule_train_wildcards_{model.name}_{fold}": (model.name, fold) for model, fold in iterate_trainings(experiment)
    }
    # a full match: the name of another experiment may start with this one's
    ours = re.compile(re.escape(job_name(experiment)) + "_[0-9a-f-]+")
    found = {}
    for line in asked.stdout.splitlines():
        number, name, state, reason, comment = [*line.split("|", 4), *[""] * 4][:5]
        if comment in trainings and ours.fullmatch(name):
            why = f" ({reason})" if reason not in ("", "None") else ""
            found[trainings[comment]] = f"SLURM job {number}, {state.lower()}{why}"
    return found


def _attempts(log: Path) -> tuple[int, str | None, str]:
    """Read the log of a training's attempts.

    Returns:
        Number of attempts; the error of the last attempt, None if it has not failed; and a note if it was killed from
        outside or ended without a message, otherwise an empty string.
    """
    try:
        lines = log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return 0, None, ""
    starts = [
        number
        for number, line in enumerate(lines)
        if line.startswith(_MARK) and "nnUNetv2_train" in line and " on " in line
    ]
    last = lines[starts[-1] + 1 :] if starts else lines
    failed = [line for line in last if line.startswith(f"{_MARK}failed: ")]
    if not failed:
        killed = [line.split(maxsplit=3)[3] for line in last if line.startswith(_MARK) and " killed by signal " in line]
        if starts and not killed and not any(line.startswith(_MARK) and _ENDED in line for line in last):
            return len(starts), None, "its last attempt ended without a message: it was killed, or its node failed"
        return len(starts), None, killed[-1] if killed else ""
    said = [line.strip() for line in last if not line.startswith(_MARK) and _ERROR_LINE.match(line.strip())]
    return len(starts), said[-1] if said else failed[-1].removeprefix(f"{_MARK}failed: "), ""


def _steps(experiment: Experiment) -> dict[str, str]:
    made = experiment.records
    prepared = {
        "data set": made / "raw.json",
        "fingerprint": made / "fingerprint.json",
        "splits": records.split_record(experiment, experiment.folds[0]),
    } | {
        f"{kind} {model.plans} {model.configuration}": record(experiment, model)
        for kind, record in (("plans", records.plans_record), ("preprocessed", records.data_record))
        for model in experiment.models
    }  # fmt: skip
    missing = [name for name, path in prepared.items() if not path.is_file()]
    found = {"preparation": "done" if not missing else f"waiting for {', '.join(missing)}"}
    if experiment.test_images is not None:
        parts = [
            made / "predict" / model.name / f"part_{part}.json"
            for model in experiment.models
            for part in range(experiment.parts)
        ]
        found["predictions"] = f"{sum(path.is_file() for path in parts)} of {len(parts)} parts done"
        ensembles = [made / "ensemble" / f"{ensemble_name(members)}.json" for members in experiment.ensembles]
        if ensembles:
            found["ensembles"] = f"{sum(path.is_file() for path in ensembles)} of {len(ensembles)} done"
    for kind, names, what in (
        (
            "postprocess",
            [model.name for model in experiment.models] if experiment.postprocess else [],
            "post-processing",
        ),
        ("package", experiment.packaged, "packages"),
    ):
        if names:
            found[what] = f"{sum((made / kind / f'{name}.json').is_file() for name in names)} of {len(names)} done"
    for kind in ("folds", "test"):
        if (made / "compare" / f"{kind}.json").is_file():
            found[f"report ({kind})"] = str(experiment.work / "report" / kind / "report.html")
    return found
