"""Resources of jobs: GPUs, cores, memory, time. From the configuration, else measurements, else default values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from nnunet_conres.errors import InputError
from nnunet_conres.families import TRAINERS
from nnunet_conres.files import try_read_json
from nnunet_conres.workflow.config import STOCK_LENGTHS, Experiment, Model
from nnunet_conres.workflow.schema import SLURM_TEXTS

# Default cores, memory in GB and minutes. They are generous, since jobs over their limits are killed.
DEFAULTS: Final[Mapping[str, tuple[int, float, float]]] = {
    "convert": (4, 8, 240),
    "fingerprint": (4, 16, 240),
    "split": (2, 8, 60),
    "plan": (1, 8, 60),
    "preprocess": (8, 32, 720),
    "memory": (1, 4, 15),
    "train": (8, 24, 1440),
    "predict": (4, 32, 720),
    "ensemble": (4, 24, 240),
    "postprocess": (4, 24, 480),
    "compare": (4, 24, 480),
    "package": (1, 8, 60),
}
# Default memory targets of nnU-Net's planners, in GiB.
STOCK_TARGETS: Final = {"nnUNetPlannerResEncL": 24.0, "nnUNetPlannerResEncXL": 40.0}
_STOCK_TARGET: Final = 8.0
# Seconds of an epoch on a GPU before one has been measured: a conservative guess for nnU-Net's default plans.
EPOCH_SECONDS: Final = 150.0
# Factor on measured times, for other nodes, a busy file system, and validation.
_MARGIN: Final = 1.3
# Options of SLURM that have another name in Snakemake's SLURM plugin.
_PLUGIN_NAMES: Final = {"account": "slurm_account", "partition": "slurm_partition"}
_STOCK_EPOCHS: Final = 1000
_STOCK_SAVE_EVERY: Final = 50
_STAMP: Final = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?): +(.*)$")


@dataclass(frozen=True)
class TrainingLog:
    """Content of nnU-Net's log files of a fold.

    Attributes:
        epochs: Number of completed epochs.
        seconds: Seconds of each completed epoch, in order.
        dice: Mean pseudo Dice after the last completed epoch; None before the first.
        last: Time of the last line.
    """

    epochs: int = 0
    seconds: tuple[float, ...] = ()
    dice: float | None = None
    last: datetime | None = None


def read_training_log(fold_folder: Path) -> TrainingLog:
    """Read nnU-Net's log files of a fold, from all attempts to train it."""
    epoch, ended, dice, last = -1, 0, None, None
    seconds: dict[int, float] = {}
    for path in sorted(fold_folder.glob("training_log_*.txt")):
        for line in path.read_text(errors="replace").splitlines():
            match = _STAMP.match(line)
            if match is None:
                continue
            last, text = datetime.fromisoformat(match[1]), match[2].strip()
            if found := re.fullmatch(r"Epoch (\d+)", text):
                epoch = int(found[1])
                ended = epoch  # lower than before if training resumed from a checkpoint
            elif found := re.match(r"Epoch time: ([\d.]+) s", text):
                seconds[epoch] = float(found[1])
                ended = epoch + 1
            elif text.startswith("Pseudo dice"):
                values = [float(value) for value in re.findall(r"(?<![\w.])\d\.\d+(?:e-?\d+)?", text)]
                dice = sum(values) / len(values) if values else None
    return TrainingLog(ended, tuple(seconds[key] for key in sorted(seconds)), dice, last)


def number_of_epochs(experiment: Experiment, model: Model) -> int:
    """Return a training's number of epochs: as nnU-Net noted it in a fold, otherwise by the trainer's name."""
    for fold in experiment.folds:
        noted = (try_read_json(experiment.fold_folder(model, fold) / "debug.json") or {}).get("num_epochs")
        if noted is not None and str(noted).isdigit():
            return int(noted)
    named = re.search(r"_(\d+)epochs?$", model.trainer)
    return int(named[1]) if named and int(named[1]) in STOCK_LENGTHS else _STOCK_EPOCHS


def epoch_seconds(experiment: Experiment, model: Model) -> float | None:
    """Return the seconds of an epoch: the median measured over a model's folds, otherwise the configured value."""
    measured = [
        second for fold in experiment.folds for second in read_training_log(experiment.fold_folder(model, fold)).seconds
    ]
    if measured:
        # the median is robust against the first epoch, which compiles and warms up
        return sorted(measured)[len(measured) // 2]
    return model.epoch_seconds


def lost_at_most(experiment: Experiment, model: Model) -> str:
    """Describe how much training time a killed training of a model loses at most."""
    if model.trainer in TRAINERS:
        return f"{experiment.checkpoint_minutes:g} min"
    seconds = epoch_seconds(experiment, model)
    hours = f" ({seconds * _STOCK_SAVE_EVERY / 3600:.1f} h)" if seconds else ""
    stock = f"{_STOCK_SAVE_EVERY} epochs{hours}, or those since the last best checkpoint"
    if model.trainer.startswith("nnUNetTrainer"):
        return stock
    return f"{stock}; {experiment.checkpoint_minutes:g} min if your trainer is a subclass of a trainer of this package"


def estimated_minutes(experiment: Experiment, model: Model, fold: int) -> float:
    """Estimate the minutes that the rest of a training may take."""
    seconds = epoch_seconds(experiment, model) or EPOCH_SECONDS
    left = number_of_epochs(experiment, model) - read_training_log(experiment.fold_folder(model, fold)).epochs
    return max(30.0, _MARGIN * (max(0, left) * seconds / 60 + 30))


def training_retries(experiment: Experiment) -> int:
    """Return how often a training may be restarted: the configured retries, plus those that the time limit requires."""
    longest = max(
        estimated_minutes(experiment, model, fold) for model in experiment.models for fold in experiment.folds
    )
    limit = _given(experiment, "train").get("minutes", experiment.time_limit_hours * 60)
    return experiment.retries + max(0, math.ceil(longest / limit) - 1)


def gpu_memory(experiment: Experiment, model: Model) -> float | None:
    """Return the GPU memory of a training in GiB: by the memory model, or the planner's target; None if unknown."""
    known = (try_read_json(experiment.records / "memory" / f"{model.name}.json") or {}).get("total_bytes")
    if known is not None:
        return known / 2**30
    plans = experiment.plans[model.plans]
    if plans.gpu_memory_target is not None:
        return plans.gpu_memory_target
    return None if plans.planner == "none" else STOCK_TARGETS.get(plans.planner, _STOCK_TARGET)


def of_rule(experiment: Experiment, rule: str) -> dict[str, Any]:
    """Return the resources of a rule whose jobs are all alike, as Snakemake names them."""
    cpus, memory, minutes = DEFAULTS[rule]
    found: dict[str, Any] = {"cpus": cpus, "memory_gb": memory, "minutes": minutes, "gpus": 0}
    if rule == "predict":
        found["gpus"] = int(experiment.device == "cuda")
    return _as_snakemake(experiment, found | _given(experiment, rule))


def of_training(experiment: Experiment, model: Model, fold: int) -> dict[str, Any]:
    """Return the resources of a training, as Snakemake names them."""
    cpus, memory, _ = DEFAULTS["train"]
    needed = gpu_memory(experiment, model)
    on_gpu = experiment.device == "cuda"
    workers = experiment.environment.get("nnUNet_n_proc_DA", "")
    if workers.isdigit():
        cpus = int(workers) + 1
    if not on_gpu and needed is not None:
        # without a GPU, the training step is in main memory too
        memory = 8 + needed
    found = {
        "cpus": cpus * model.gpus,
        "memory_gb": memory * model.gpus,
        "minutes": min(estimated_minutes(experiment, model, fold), experiment.time_limit_hours * 60),
        "gpus": model.gpus if on_gpu else 0,
    }
    given = _given(experiment, "train")
    types = given.get("gpu_types", {})
    resources = _as_snakemake(experiment, found | given)
    if on_gpu and needed is not None:
        resources["gpu_memory_gb"] = math.ceil(needed)
        enough = [name for name, size in sorted(types.items(), key=lambda item: item[1]) if size >= needed]
        if types and not enough:
            raise InputError(
                f"{model.name} needs about {needed:.1f} GiB of GPU memory, more than any GPU in resources, train, "
                f"gpu_types has: {types}. Plan for a smaller gpu_memory_target."
            )
        if enough:
            resources["gpu_model"] = enough[0]
    return resources


def names_of_training(experiment: Experiment) -> list[str]:
    """Return the names of all resources other than threads that at least one training requests.

    Unused names must be absent, because the SLURM plugin passes on an empty qos or constraint.
    """
    return list(
        dict.fromkeys(
            name
            for model in experiment.models
            for name in [*of_training(experiment, model, experiment.folds[0]), "gpu_memory_gb", "gpu_model"]
            if name != "threads"
        )
    )


def _given(experiment: Experiment, rule: str) -> dict[str, Any]:
    return {**experiment.resources.get("default", {}), **experiment.resources.get(rule, {})}


def _as_snakemake(experiment: Experiment, found: Mapping[str, Any]) -> dict[str, Any]:
    resources: dict[str, Any] = {
        # otherwise SLURM may assign GPUs on several nodes, but nnU-Net uses only one
        "nodes": 1,
        "threads": max(1, int(found["cpus"])),
        "mem_mb": math.ceil(found["memory_gb"] * 1000),
        "runtime": math.ceil(found["minutes"]),
        "gpu": int(found["gpus"]),
    }
    for key in SLURM_TEXTS:
        if key in found:
            resources[_PLUGIN_NAMES.get(key, key)] = found[key]
    return resources
