"""Trains a list of runs on equal terms, by `nnunet-conres workflow`, and compares them with the first of the list.

    python scripts/study/study.py scripts/study/runs.yaml --work STUDY [--dry-run, --profile slurm ... of the workflow]

The list is a configuration of the workflow. Its entry "study" says what all runs have in common, and a model's entry
"study" what is different there:

    iterations            training iterations (default: 1000)
    iterations_per_epoch  (default: 100)
    batch_size            (default: that of the plans)
    seed                  of initial weights, patches and augmentation (default: 0)
    settings              attributes of the trainer, set before it is initialised, for example {initial_lr: 0.03}

All runs, nnU-Net's own trainer among them, train with the same precision, augmentation (nnU-Net's, without mirroring)
and, with one worker process (nnUNet_n_proc_DA), batches. A run that was interrupted goes on; a run whose settings
changed is trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nnunet_conres.errors import InputError
from nnunet_conres.families import TRAINERS
from nnunet_conres.text import markdown_table

HERE = Path(__file__).resolve().parent
STOCK = "nnUNetTrainer"
DEFAULTS: dict[str, Any] = {
    "iterations": 1000,
    "iterations_per_epoch": 100,
    "batch_size": None,
    "seed": 0,
    "settings": {},
}


def write_workflow(content: Mapping[str, Any], work: Path) -> Path:
    """Writes a module with a trainer for each run, and the configuration of the workflow.

    Args:
        content: The list of runs, as described above.
        work: Folder for all files.

    Returns:
        The configuration.

    Raises:
        InputError: If a run has an entry or a trainer that is not known, or iterations that make no whole epochs.
    """
    trainers, common, models, errors = work / "trainers", content.get("study", {}), {}, []
    for name, given in content["models"].items():
        study = DEFAULTS | common | given.get("study", {})
        base = given.get("trainer", STOCK)
        unknown = sorted(set(study) - set(DEFAULTS))
        if unknown:
            errors.append(f"{name}: study has {', '.join(unknown)}; expected some of {', '.join(DEFAULTS)}.")
        if base != STOCK and base not in TRAINERS:
            errors.append(f"{name}: trainer {base}; expected {STOCK} or one of this package's.")
        if study["iterations"] < 1 or study["iterations"] % study["iterations_per_epoch"]:
            errors.append(
                f"{name}: {study['iterations']} iterations; expected a multiple of {study['iterations_per_epoch']}."
            )
        run = f"nnUNetTrainerStudy_{name}_{study['iterations']}it_seed{study['seed']}"
        if not run.isidentifier():
            errors.append(f"{name}: expected a name of letters, digits and underscores.")
        # The workflow trains again where this text has changed.
        text = f"from recipe import trainer\n\n\nclass {run}(trainer({base!r}, {study!r})):\n    pass\n"
        models[name] = ({key: value for key, value in given.items() if key != "study"} | {"trainer": run}, text)
    if errors:
        raise InputError(errors)
    trainers.mkdir(parents=True, exist_ok=True)
    for model, text in models.values():
        file = trainers / f"{model['trainer']}.py"
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)
    python_path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = {"nnUNet_extTrainer": str(trainers), "PYTHONPATH": python_path}
    config = {key: value for key, value in content.items() if key != "study"} | {
        "work": str(work),
        "models": {name: model for name, (model, _) in models.items()},
        "environment": content.get("environment", {}) | environment,
    }
    file = work / "workflow.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def table(report: Mapping[str, Any]) -> str:
    """The runs against the first, in Markdown, of a report.json of ``nnunet-conres compare``."""
    summary = report["summary"]
    region = "mean" if "mean" in next(iter(summary.values())) else report["regions"][0]
    rows = []
    for model in report["models"]:
        dice, hd95 = (summary[model["key"]][region][metric]["mean"] for metric in ("dice", "hd95"))
        cells = ["", ""]
        for found in report["comparisons"]:
            if (found["model"], found["region"], found["metric"]) == (model["key"], region, "dice"):
                points = [f"{100 * found[key]:+.2f}" for key in ("mean_difference", "low", "high")]
                p = found["p_holm"]  # None where there are too few cases to test
                cells = [f"{points[0]} ({points[1]} to {points[2]})", "" if p is None else f"{p:.3g}"]
        rows.append([model["name"], f"{100 * dice:.2f}", *cells, f"{hd95:.2f}"])
    return markdown_table(["run", "Dice, %", "against the first, points", "p (Holm)", "HD95, mm"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the list, a YAML file")
    parser.add_argument("--work", type=Path, default=Path("study"), help="folder for all files (default: %(default)s)")
    parsed, options = parser.parse_known_args(arguments)
    if not parsed.runs.is_file():
        parser.error(f"there is no file {parsed.runs}; expected a list of runs such as {HERE / 'runs.yaml'}")
    try:
        config = write_workflow(yaml.safe_load(parsed.runs.read_text(encoding="utf-8")), parsed.work.resolve())
    except InputError as error:
        sys.exit(f"error: {error}")
    code = subprocess.run([sys.executable, "-m", "nnunet_conres.cli", "workflow", str(config), *options]).returncode
    report = config.parent / "report" / "folds" / "report.json"
    if code == 0 and not options and report.is_file():
        print(f"{table(json.loads(report.read_text()))}\n\nThe whole comparison: {report.with_suffix('.html')}")
    sys.exit(code)


if __name__ == "__main__":
    main()
