"""The list of runs, and a stage of it as a configuration of `nnunet-conres workflow`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from recipe import StudyRecipe

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Run:
    """One training of a stage, on each of the stage's folds.

    Attributes:
        network: Name in runs.yaml.
        iterations: Training steps.
        seed: Of initial weights, patches and augmentation.
    """

    network: str
    iterations: int
    seed: int

    @property
    def trainer(self) -> str:
        return f"nnUNetTrainerStudy_{self.network}_{self.iterations}it_seed{self.seed}"

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{self.network}-{self.iterations}-seed{self.seed}"


def read_study() -> dict[str, Any]:
    """Content of runs.yaml.

    Raises:
        ValueError: If a stage has a data set or a run of a network that is not described, a run of a length that is no
            whole number of epochs, or a single run; if a contrast is of stages that there are not, or two tables have
            one name.
    """
    study = yaml.safe_load((HERE / "runs.yaml").read_text(encoding="utf-8"))
    for stage in study["stages"]:
        dataset = dataset_of(study, stage)
        if dataset not in study["datasets"]:
            raise ValueError(f"Stage {stage}: no data set {dataset}; expected {', '.join(study['datasets'])}.")
        if len(runs_of(study, stage)) < 2:
            raise ValueError(f"Stage {stage} has nothing to compare; expected two runs or more.")
        for run in runs_of(study, stage):
            if run.network not in study["networks"]:
                raise ValueError(f"Stage {stage}: no network {run.network}; expected {', '.join(study['networks'])}.")
            if run.iterations % StudyRecipe.study_iterations:
                raise ValueError(f"Stage {stage}: {run.iterations} iterations are no whole number of epochs.")
    compared = [run for pairs in study["pairs"].values() for pair in pairs for run in pair]
    compared += [run for runs in study["contrasts"].values() for run in runs]
    for stage in [run.split("/")[0] for run in compared] + list(study["figures"]):
        if stage not in study["stages"]:
            raise ValueError(f"A contrast, a pair or a figure is of a stage {stage}, which there is not.")
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
            runs.append(Run(given["network"], given.get("iterations", entry["iterations"]), given.get("seed", seed)))
    return runs


def dataset_of(study: Mapping[str, Any], stage: str) -> str:
    """Name of a stage's data set in runs.yaml."""
    return study["stages"][stage].get("dataset", study["protocol"]["dataset"])


def write_stage(study: dict[str, Any], stage: str, work: Path, device: str, threads: int) -> Path:
    """Writes the trainers of a stage, a module each, and the configuration of its workflow.

    Args:
        study: Content of runs.yaml.
        stage: Which stage.
        work: Folder for all files of the study.
        device: Where to train.
        threads: Of a training on a CPU.

    Returns:
        The configuration.
    """
    from plans import plans_name

    protocol, runs = study["protocol"], runs_of(study, stage)
    trainers = work / "trainers"
    trainers.mkdir(parents=True, exist_ok=True)
    recipe = hashlib.sha256((HERE / "recipe.py").read_bytes()).hexdigest()
    for run in runs:
        # The workflow trains anew where this text has changed: it says all that makes the run what it is, but for the
        # architecture, which is in the plans.
        text = (
            f"# {recipe}\nfrom recipe import study_trainer\n\n\nclass {run.trainer}(\n"
            f"    study_trainer({run.trainer!r}, __name__, {study['networks'][run.network]!r}, {run.iterations}, "
            f"{run.seed})\n):\n    pass\n"
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
                "plans": plans_name(run.network),
                "configuration": protocol["configuration"],
            }
            for run in runs
        },
        "plans": {plans_name(run.network): {"planner": "none"} for run in runs},
        "folds": study["stages"][stage]["folds"],
        "ensembles": "none",
        "device": device,
        "environment": {
            "nnUNet_extTrainer": str(trainers),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
            # one worker, so that the order of the batches is settled
            "nnUNet_n_proc_DA": 1,
            "OMP_NUM_THREADS": threads,
        },
        "resources": {"default": {"cpus": 2, "memory_gb": 4, "minutes": 60}, "train": {"cpus": threads}},
    }
    file = work / f"{stage}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file
