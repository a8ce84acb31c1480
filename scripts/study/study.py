"""Train a list of runs on equal terms, and score every validation case.

    python scripts/study/study.py scripts/study/runs_lgg.yaml --source RAW --work WORK [--jobs 2]
    python scripts/study/tables.py WORK... --output TABLES

A list has the entries "data" (see study_data.py), "seeds", "models", and "study" with the settings of all runs. A model
may have the entries "trainer" (default: nnUNetTrainer), "plans" (nnUNetPlans or nnUNetResEncUNetMPlans),
"configuration", "fold" (default: 0), "data" (dense or sparse), and its own "study", which takes precedence:

    iterations            training iterations, or equal_time: as many as take the time of the first model. Steps are
                          timed before the first run, on a CPU in processor time (default: 1000)
    epochs                number of epochs, of equal numbers of iterations (default: 10)
    batch_size            (default: that of the plans)
    width                 factor on the features of all stages (default: 1)
    settings              attributes of the trainer, set before it is initialised, for example {initial_lr: 0.03}
    environment           environment variables, for example {nnUNet_conres_fast_step: 0}

All runs, including those of nnU-Net's own trainer, use the same precision, augmentation (nnU-Net's, without mirroring)
and batches. On a GPU, networks are compiled and augmentation runs on the GPU. An interrupted run resumes at its last
epoch; a run whose entries changed is trained again. A run that fails is started once more after the others; a second
failure becomes a row of the tables.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import study_data as data_sets
import yaml

from nnunet_conres.errors import InputError
from nnunet_conres.families import TRAINERS
from nnunet_conres.files import write_json
from nnunet_conres.text import markdown_table

HERE = Path(__file__).resolve().parent
STOCK = "nnUNetTrainer"
ATTEMPTS = 2
EQUAL_TIME = "equal_time"
ROUNDS = 2
"""How often the time of steps is measured, one model after another."""
STUDY: dict[str, Any] = {
    "iterations": 1000,
    "epochs": 10,
    "batch_size": None,
    "width": 1,
    "settings": {},
    "environment": {},
}
MODEL: dict[str, Any] = {
    "trainer": STOCK,
    "plans": data_sets.PLANS[0],
    "configuration": "3d_fullres",
    "fold": 0,
    "data": "dense",
}


def complete(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the entry "data" with all defaults, and the runs: every model with every seed, in the order of training.

    Args:
        content: The list, as described above.

    Raises:
        InputError: With all unknown or inconsistent entries.
    """
    errors: list[str] = []
    data = data_sets.DEFAULTS | content["data"]
    errors += _unknown("data", data, [*data_sets.DEFAULTS, "source", "id"])
    models = []
    for name, given in content["models"].items():
        study = STUDY | content.get("study", {}) | given.get("study", {})
        model = MODEL | {key: value for key, value in given.items() if key != "study"}
        errors += _unknown(f"{name}: study", study, STUDY) + _unknown(name, model, MODEL)
        if not name.isidentifier():
            errors.append(f"{name}: expected a name of letters, digits and underscores.")
        if model["trainer"] not in (STOCK, *TRAINERS, *_form_names()):
            errors.append(f"{name}: trainer {model['trainer']}; expected {STOCK} or one of this package's.")
        if model["plans"] not in data_sets.PLANS:
            errors.append(f"{name}: plans {model['plans']}; expected {' or '.join(data_sets.PLANS)}.")
        if model["data"] not in data_sets.names(data):
            errors.append(f"{name}: data {model['data']}; expected {' or '.join(data_sets.names(data))}.")
        if study["iterations"] == EQUAL_TIME:
            if not models:
                errors.append(f"{name}: {EQUAL_TIME} for the first model; expected iterations.")
        elif study["iterations"] < 1 or study["iterations"] % study["epochs"]:
            errors.append(f"{name}: {study['iterations']} iterations; expected a multiple of {study['epochs']}.")
        models.append(model | {"model": name, "study": study})
    if errors:
        raise InputError(errors)
    # All models with the first seed come first, so that an interruption later leaves a complete comparison.
    return data, [model | {"study": model["study"] | {"seed": seed}} for seed in content["seeds"] for model in models]


def _unknown(where: str, given: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any]) -> list[str]:
    names = sorted(set(given) - set(known))
    return [f"{where} has {', '.join(names)}; expected some of {', '.join(known)}."] if names else []


def _form_names() -> list[str]:
    """Return the names of the trainers in forms.py, which is slow to import."""
    lines = (HERE / "forms.py").read_text(encoding="utf-8").splitlines()
    return [line[6:].partition("(")[0] for line in lines if line.startswith("class nnUNetTrainer")]


def run_name(run: Mapping[str, Any]) -> str:
    """Return the name of a run, which is part of file names."""
    return f"{run['model']}_seed{run['study']['seed']}"


def make_trainer(run: Mapping[str, Any], data: Mapping[str, Any], work: Path, device: str) -> Any:
    """Build the trainer of a run."""
    import torch
    from recipe import trainer

    folder = work / "nnUNet_preprocessed" / data_sets.names(data)[run["data"]]
    plans = json.loads((folder / f"{run['plans']}.json").read_text())
    dataset_json = json.loads((folder / "dataset.json").read_text())
    made = trainer(run["trainer"], run["study"], f"nnUNetTrainerStudy_{run_name(run)}")
    plans["continue_training"] = False
    return made(plans, run["configuration"], run["fold"], dataset_json, torch.device(device))


def train(run: Mapping[str, Any], data: Mapping[str, Any], work: Path, device: str) -> None:
    """Train or resume a run, predict its validation cases, and write their scores."""
    os.environ |= {name: str(value) for name, value in run["study"]["environment"].items()}
    os.environ["nnUNet_conres_seed"] = str(run["study"]["seed"])
    made = make_trainer(run, data, work, device)
    output = Path(made.output_folder)
    noted = output / "run.json"
    if noted.is_file() and json.loads(noted.read_text()) != run:
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(noted, run)
    final, latest = output / "checkpoint_final.pth", output / "checkpoint_latest.pth"
    for checkpoint in (final, latest):
        if checkpoint.is_file():
            made.initialize()
            made.load_checkpoint(str(checkpoint))
            break
    if not final.is_file():
        made.run_training()
    made.perform_actual_validation()
    labels = work / "nnUNet_raw" / data_sets.names(data)["dense"] / "labelsTr"
    classes = {name: label for name, label in made.dataset_json["labels"].items() if label != 0 and name != "ignore"}
    write_json(
        work / "scores" / f"{run_name(run)}.json",
        {
            "run": run,
            "data": data["source"].partition("_")[2],
            "group": data["group"],
            "step_seconds": float(np.median(made.step_seconds)) if made.step_seconds else None,
            "parameters": sum(parameter.numel() for parameter in made.network.parameters()),
            "cases": {
                file.name[: -len(".nii.gz")]: score(labels / file.name, file, classes)
                for file in sorted((output / "validation").glob("*.nii.gz"))
            },
        },
    )
    shutil.rmtree(output / "validation")


def score(reference: Path, prediction: Path, classes: Mapping[str, int]) -> dict[str, dict[str, float | None]]:
    """Return Dice, HD95 in mm, and Dice in end and middle slices, per class and as mean; None where undefined."""
    import SimpleITK

    from nnunet_conres.evaluation.metrics import measure

    image = SimpleITK.ReadImage(str(reference))
    truth = SimpleITK.GetArrayFromImage(image)
    found = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(prediction)))
    spacing = image.GetSpacing()[::-1]
    scores: dict[str, dict[str, float]] = {}
    for name, label in classes.items():
        measured = measure(truth == label, found == label, spacing, lesions=False)
        ends, middle = end_and_middle_dice(truth == label, found == label, int(np.argmax(spacing)))
        scores[name] = {"dice": measured["dice"], "hd95": measured["hd95"], "dice_ends": ends, "dice_middle": middle}
    means = {key: [of[key] for of in scores.values()] for key in next(iter(scores.values()))}
    scores["mean"] = {
        key: float(np.nanmean(values)) if not np.isnan(values).all() else np.nan for key, values in means.items()
    }
    return {name: {key: None if np.isnan(value) else value for key, value in of.items()} for name, of in scores.items()}


def end_and_middle_dice(truth: np.ndarray, found: np.ndarray, axis: int = 0) -> tuple[float, float]:
    """Return the Dice where a structure ends, and between its ends.

    The ends are the structure's first and last slice and all slices beyond them.

    Args:
        truth: True mask, three axes.
        found: Predicted mask, same shape.
        axis: Axis of the slices.

    Returns:
        Dice over the voxels of the end slices, and of the others; NaN where the structure is absent, or has no slice
        between its ends.
    """
    truth, found = np.moveaxis(truth, axis, 0), np.moveaxis(found, axis, 0)
    slices = np.flatnonzero(truth.any((1, 2)))
    if not len(slices):
        return np.nan, np.nan
    middle = np.zeros(len(truth), bool)
    middle[slices[0] + 1 : slices[-1]] = True

    def dice(chosen: np.ndarray) -> float:
        a, b = truth[chosen], found[chosen]
        sizes = a.sum() + b.sum()
        return float(2 * (a & b).sum() / sizes) if sizes else np.nan

    return dice(~middle), dice(middle)


def measure_steps(run: Mapping[str, Any], data: Mapping[str, Any], work: Path, device: str, steps: int) -> None:
    """Add the times of training steps on random patches to ``steps.json``; on a CPU processor time."""
    import torch

    torch.manual_seed(0)
    made = make_trainer({**run, "model": "measured"}, data, work, device)
    made.study = {**made.study, "iterations": made.study["epochs"]}
    made.initialize()
    made.set_deep_supervision_enabled(True)
    patch = made.configuration_manager.patch_size
    scales = made._get_deep_supervision_scales()
    target = torch.randint(0, 2, (made.batch_size, 1, *patch)).float()
    batch = {
        "data": torch.randn(made.batch_size, made.num_input_channels, *patch),
        "target": [target[..., :: round(1 / s[0]), :: round(1 / s[1]), :: round(1 / s[2])] for s in scales],
    }
    for _ in range(steps + 2):
        made.train_step(batch)
    known, key = step_seconds(work), _step_key(run)
    write_json(work / "steps.json", known | {key: known.get(key, []) + made.step_seconds[2:]})


def step_seconds(work: Path) -> dict[str, list[float]]:
    """Read the measured times of steps."""
    file = work / "steps.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def measure_all(
    runs: Sequence[Mapping[str, Any]], data: Mapping[str, Any], work: Path, device: str, steps: int
) -> None:
    """Measure the steps of all runs whose steps differ, in rounds; resume after an interruption."""
    distinct = {_step_key(run): run for run in runs}
    for number in range(1, ROUNDS + 1):
        for key, run in distinct.items():
            if len(step_seconds(work).get(key, [])) < number * steps:
                log = work / "logs" / "steps.log"
                os.waitpid(in_child(lambda run=run: measure_steps(run, data, work, device, steps), log), 0)


def with_equal_time(runs: Sequence[Mapping[str, Any]], seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return the runs with ``equal_time`` replaced by numbers of iterations, in whole epochs.

    Raises:
        InputError: If the steps of a run could not be measured.
    """
    filled, errors = [], []
    for run in runs:
        study = dict(run["study"])
        if study["iterations"] == EQUAL_TIME:
            missing = [of["model"] for of in (runs[0], run) if not seconds.get(_step_key(of))]
            errors += [f"{name}: no step could be measured." for name in missing]
            if not missing:
                ratio = float(np.median(seconds[_step_key(run)]) / np.median(seconds[_step_key(runs[0])]))
                epochs = study["epochs"]
                study["iterations"] = epochs * max(1, round(runs[0]["study"]["iterations"] / ratio / epochs))
        filled.append({**run, "study": study})
    if errors:
        raise InputError(errors)
    return filled


def _step_key(run: Mapping[str, Any]) -> str:
    """Return a key that is equal for runs whose steps take the same time."""
    study = run["study"]
    keys = [run[key] for key in ("trainer", "plans", "configuration", "data")]
    return json.dumps([*keys, study["batch_size"], study["width"]])


def in_child(function: Callable[[], None], log: Path) -> int:
    """Start a function in a forked process, which has all modules already; its output goes to a file.

    Returns:
        The process id.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # end with the process that started it
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train_all(runs: Sequence[Mapping[str, Any]], data: Mapping[str, Any], work: Path, device: str, jobs: int) -> int:
    """Train the runs that are not done, several at a time.

    Returns:
        Number of runs that failed for good.
    """

    def scores_file(run: Mapping[str, Any]) -> Path:
        return work / "scores" / f"{run_name(run)}.json"

    def is_done(run: Mapping[str, Any]) -> bool:
        file = scores_file(run)
        return file.is_file() and json.loads(file.read_text())["run"] == run

    waiting, running, failures = [run for run in runs if not is_done(run)], {}, {}
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done.", flush=True)
    (work / "scores").mkdir(exist_ok=True)
    failed = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            run = waiting.pop(0)
            log = work / "logs" / f"{run_name(run)}.log"
            running[in_child(lambda run=run: train(run, data, work, device), log)] = run
        process, status = os.wait()
        run = running.pop(process)
        name = run_name(run)
        if status == 0:
            print(f"{name}: done, {len(waiting) + len(running)} to go.", flush=True)
            continue
        failures[name] = failures.get(name, 0) + 1
        print(f"{name}: failed, see {work / 'logs' / name}.log.", flush=True)
        if failures[name] < ATTEMPTS:
            waiting.append(run)
        else:
            failed += 1
            content = {"run": run, "data": data["source"].partition("_")[2], "failed": True, "cases": {}}
            write_json(scores_file(run), content)
    return failed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the list, a YAML file")
    parser.add_argument("--work", type=Path, default=Path("study"), help="folder for all files (default: %(default)s)")
    parser.add_argument("--source", type=Path, help="folder of the raw data sets (default: $nnUNet_raw)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="for preprocessing (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each run on a CPU (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="train only these models")
    parser.add_argument("--measure", type=int, metavar="STEPS", help="train nothing, measure the time of steps")
    parsed = parser.parse_args(arguments)
    source = parsed.source or Path(os.environ.get("nnUNet_raw", "."))
    work = parsed.work.resolve()
    try:
        data, runs = complete(yaml.safe_load(parsed.runs.read_text(encoding="utf-8")))
        work.mkdir(parents=True, exist_ok=True)
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(work / f"nnUNet_{name}")
            (work / f"nnUNet_{name}").mkdir(exist_ok=True)
        os.environ |= {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1"}
        if parsed.device == "cpu":
            os.environ |= {"nnUNet_compile": "f", "nnUNet_conres_cpu_bf16": "0"}
        data_sets.check(data, source, work)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    log = work / "logs" / "prepare.log"
    process = in_child(lambda: data_sets.prepare(data, source.resolve(), work, parsed.processes), log)
    if os.waitpid(process, 0)[1]:
        sys.exit(f"error: the data could not be prepared, see {log}")
    # On a CPU, a run draws its batches itself. On a GPU, worker processes deliver batches in a fixed order. Either way,
    # all runs with the same seed get the same batches.
    os.environ["nnUNet_n_proc_DA"] = "0" if parsed.device == "cpu" else "2"
    import recipe  # noqa: F401  (for the children)
    import torch

    torch.set_num_threads(parsed.threads)
    if parsed.measure or any(run["study"]["iterations"] == EQUAL_TIME for run in runs):
        measure_all(runs, data, work, parsed.device, parsed.measure or 5)
        try:
            runs = with_equal_time(runs, step_seconds(work))
        except InputError as error:
            sys.exit(f"error: {error}")
        print(steps_table(step_seconds(work), runs), flush=True)
    if not parsed.measure:
        runs = [run for run in runs if not parsed.only or run["model"] in parsed.only]
        sys.exit(1 if train_all(runs, data, work, parsed.device, max(1, parsed.jobs)) else 0)


def steps_table(seconds: Mapping[str, Sequence[float]], runs: Sequence[Mapping[str, Any]]) -> str:
    """Format the time of a step, iterations, and minutes of all steps as a Markdown table."""
    first = float(np.median(seconds[_step_key(runs[0])]))
    rows = []
    for run in (run for run in runs if run["study"]["seed"] == runs[0]["study"]["seed"]):
        step, iterations = float(np.median(seconds.get(_step_key(run), np.nan))), run["study"]["iterations"]
        numbers = [f"{step:.3f}", f"{step / first:.2f}", str(iterations), f"{iterations * step / 60:.1f}"]
        rows.append([run["model"], *numbers])
    return markdown_table(["run", "step, s", "against the first", "iterations", "minutes"], rows)


if __name__ == "__main__":
    main()
