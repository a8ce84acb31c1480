"""The list of runs, and a stage of it as a configuration of `nnunet-conres workflow`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from recipe import EPOCH

HERE = Path(__file__).resolve().parent
_STAGE_ENTRIES = {"dataset", "folds", "iterations", "runs", "seeds", "device", "batch_size", "epoch", "workers"}


@dataclass(frozen=True)
class Run:
    """One training of a stage, on each of the stage's folds.

    Attributes:
        network: Name in runs.yaml.
        iterations: Training steps.
        seed: Of initial weights, patches and augmentation.
        epoch: Training steps of an epoch.
    """

    network: str
    iterations: int
    seed: int
    epoch: int = EPOCH

    @property
    def trainer(self) -> str:
        name = f"nnUNetTrainerStudy_{self.network}_{self.iterations}it_seed{self.seed}"
        return name if self.epoch == EPOCH else f"{name}_epoch{self.epoch}"

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{self.network}-{self.iterations}-seed{self.seed}"


@dataclass(frozen=True)
class Setting:
    """What all runs of a stage have in common, and the times of their steps depend on.

    Attributes:
        dataset: Name in runs.yaml.
        batch_size: Of the plans.
        device: Where to train.
    """

    dataset: str
    batch_size: int
    device: str

    @property
    def name(self) -> str:
        """What its times of steps are kept under."""
        return f"{self.dataset}, {self.device}, batch {self.batch_size}"


def read_study() -> dict[str, Any]:
    """Content of runs.yaml.

    Raises:
        ValueError: If a network has a form without a trainer; if a stage has an entry that is not known, no worker, a
            data set or a run of a network that is not described, a run of a length that is no whole number of epochs,
            or a single run; if a contrast is of stages that there are not, or two tables have one name.
    """
    study = yaml.safe_load((HERE / "runs.yaml").read_text(encoding="utf-8"))
    compared = [run for pairs in study["pairs"].values() for pair in pairs for run in pair]
    compared += [run for runs in study["contrasts"].values() for run in runs]
    in_contrasts = {run.split("/")[0] for run in compared}
    for stage, entry in study["stages"].items():
        dataset = dataset_of(study, stage)
        if dataset not in study["datasets"]:
            raise ValueError(f"Stage {stage}: no data set {dataset}; expected {', '.join(study['datasets'])}.")
        unknown = set(entry) - _STAGE_ENTRIES
        if unknown:
            known = ", ".join(sorted(_STAGE_ENTRIES))
            raise ValueError(f"Stage {stage}: {', '.join(sorted(unknown))}; expected {known}.")
        if entry.get("workers", 1) < 1:
            raise ValueError(f"Stage {stage}: {entry['workers']} workers; expected 1 or more.")
        if len(runs_of(study, stage)) < 2:
            raise ValueError(f"Stage {stage} has nothing to compare; expected two runs or more.")
        for run in runs_of(study, stage):
            if run.network not in study["networks"]:
                raise ValueError(f"Stage {stage}: no network {run.network}; expected {', '.join(study['networks'])}.")
            if run.iterations % run.epoch:
                raise ValueError(f"Stage {stage}: {run.iterations} iterations are no whole number of epochs.")
    for stage in [*in_contrasts, *study["figures"]]:
        if stage not in study["stages"]:
            raise ValueError(f"A contrast, a pair or a figure is of a stage {stage}, which there is not.")
    for network, entry in study["networks"].items():
        if "form" in entry and "trainer" not in entry:
            raise ValueError(f"Network {network} has a form, which needs a trainer of this package to come before.")
    names = [*study["stages"], *study["contrasts"], *study["pairs"]]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))}: the table of each stage, contrast and pairs needs its own name.")
    return study


def runs_of(study: dict[str, Any], stage: str) -> list[Run]:
    """The runs of a stage, the baseline first."""
    entry = study["stages"][stage]
    runs = []
    for given in entry["runs"]:
        given = {"network": given} if isinstance(given, str) else given
        for seed in entry.get("seeds", [0]):
            iterations, epoch = given.get("iterations", entry["iterations"]), entry.get("epoch", EPOCH)
            runs.append(Run(given["network"], iterations, given.get("seed", seed), epoch))
    return runs


def dataset_of(study: Mapping[str, Any], stage: str) -> str:
    """Name of a stage's data set in runs.yaml."""
    return study["stages"][stage].get("dataset", study["protocol"]["dataset"])


def plans_name(study: Mapping[str, Any], network: str, batch_size: int) -> str:
    """Name of the plans of a network of runs.yaml."""
    name = f"study_{network}"
    return name if batch_size == study["protocol"]["batch_size"] else f"{name}_batch{batch_size}"


def setting_of(study: Mapping[str, Any], stage: str) -> Setting:
    """What a stage is trained on."""
    entry, protocol = study["stages"][stage], study["protocol"]
    given = (entry.get(key, protocol[key]) for key in ("batch_size", "device"))
    return Setting(dataset_of(study, stage), *given)


def write_stage(study: dict[str, Any], stage: str, work: Path, threads: int) -> Path:
    """Writes the trainers of a stage, a module each, and the configuration of its workflow.

    Args:
        study: Content of runs.yaml.
        stage: Which stage.
        work: Folder for all files of the study.
        threads: Of a training on a CPU.

    Returns:
        The configuration.
    """
    protocol, runs, setting = study["protocol"], runs_of(study, stage), setting_of(study, stage)
    trainers = work / "trainers"
    trainers.mkdir(parents=True, exist_ok=True)
    on_cpu = setting.device == "cpu"
    # With one the order of the batches is settled. A stage on a GPU, which may have to wait for one, has nnU-Net's own
    # number where it says nothing else.
    workers = study["stages"][stage].get("workers", 1 if on_cpu else None)
    recipe, forms = (hashlib.sha256((HERE / f).read_bytes()).hexdigest() for f in ("recipe.py", "forms.py"))
    for run in runs:
        made_by = f"{recipe} {forms}" if "form" in study["networks"][run.network] else recipe
        # The workflow trains anew where this text has changed: it says all that makes the run what it is, but for the
        # architecture, which is in the plans.
        text = (
            f"# {made_by}\nfrom recipe import study_trainer\n\n\nclass {run.trainer}(\n"
            f"    study_trainer({run.trainer!r}, __name__, {study['networks'][run.network]!r}, {run.iterations}, "
            f"{run.seed}, {run.epoch})\n):\n    pass\n"
        )
        file = trainers / f"{run.trainer}.py"
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)
    config = {
        "work": str(work / stage),
        "data": {"id": study["datasets"][dataset_of(study, stage)]["id"]},
        "models": {
            run.name: {
                "trainer": run.trainer,
                "plans": plans_name(study, run.network, setting.batch_size),
                "configuration": protocol["configuration"],
            }
            for run in runs
        },
        "plans": {plans_name(study, run.network, setting.batch_size): {"planner": "none"} for run in runs},
        "folds": study["stages"][stage]["folds"],
        "ensembles": "none",
        "device": setting.device,
        "environment": {
            "nnUNet_extTrainer": str(trainers),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": threads,
            **({"nnUNet_n_proc_DA": workers} if workers else {}),
        },
    }
    if on_cpu:  # a GPU wants more workers and memory: what the workflow takes by itself
        config["resources"] = {"default": {"cpus": 2, "memory_gb": 4, "minutes": 60}, "train": {"cpus": threads}}
    file = work / f"{stage}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file
