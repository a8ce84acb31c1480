"""The study behind docs/results.md: trains what is missing of a stage of runs.yaml, compares, and writes the tables.

    python scripts/study/study.py data FOLDER                        # the study's cases of the Decathlon's Task04
    python scripts/study/study.py run screen --work STUDY            # preprocess, train, compare; can be interrupted
    python scripts/study/study.py steps --work STUDY                 # time of a training step, on a quiet machine
    python scripts/study/study.py begin --work STUDY --networks stock stream      # how the loss falls at the start
    python scripts/study/study.py look thick --work STUDY            # what trained networks make of the residual stream
    python scripts/study/study.py table                              # docs/results.md from scripts/study/results

nnUNet_raw, nnUNet_preprocessed and nnUNet_results must be set, and the data set of the protocol be in nnUNet_raw;
others are made from it or made up, where a stage needs them. What trains is `nnunet-conres workflow`; its options
(--dry-run, --profile slurm, ...) can be given to run, behind --. With options no results are saved: run the stage once
more without them, which trains nothing that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nnunet_conres.files import write_json

if TYPE_CHECKING:
    from runs import Run, Setting

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCUMENT = HERE.parents[1] / "docs" / "results.md"
BASELINE = "stock"  # what times of steps are told against


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{data,run,steps,begin,look,table}")
    data = commands.add_parser("data", help="copy the study's cases of a larger data set to nnUNet_raw")
    data.add_argument("source", type=Path, help="Task04_Hippocampus of the Decathlon, in nnU-Net's raw format")
    run = commands.add_parser("run", help="train what is missing of a stage, and compare")
    run.add_argument("stage", help="a stage of runs.yaml")
    steps = commands.add_parser("steps", help="measure the time of a training step of each network")
    steps.add_argument("--networks", nargs="+", help="networks of runs.yaml (default: all); stock is always measured")
    steps.add_argument("--dataset", help="data set of runs.yaml (default: that of the protocol)")
    steps.add_argument("--batch", type=int, help="patches per step (default: that of the protocol)")
    steps.add_argument("--rounds", type=int, default=9, help="steps of each network, in turns (default: %(default)s)")
    begin = commands.add_parser("begin", help="print how the loss of each network falls at the start")
    begin.add_argument("--networks", nargs="+", help="networks of runs.yaml (default: all)")
    begin.add_argument("--iterations", type=int, default=100, help="(default: %(default)s)")
    look = commands.add_parser(
        "look", help="print what trained networks of a stage make of their residual stream, on its first fold, on a CPU"
    )
    look.add_argument("stage", help="a stage of runs.yaml that was run")
    look.add_argument("--networks", nargs="+", help="networks of the stage (default: all)")
    look.add_argument("--batches", type=int, default=16, help="of validation patches (default: %(default)s)")
    for command in (steps, begin):
        command.add_argument(
            "-device", help="cpu or cuda (default: that of the protocol); a stage to run names its own"
        )
    for command in (run, steps, begin, look):
        command.add_argument("--work", type=Path, default=Path("study"), help="folder for files (default: %(default)s)")
        command.add_argument("--threads", type=int, default=2, help="of a CPU training (default: %(default)s)")
    commands.add_parser("table", help="write the tables of docs/results.md")
    given = list(sys.argv[1:] if arguments is None else arguments)
    at = given.index("--") if "--" in given else len(given)
    parsed = parser.parse_args(given[:at])
    parsed.options = given[at + 1 :]
    if parsed.options and parsed.command != "run":
        parser.error("options behind -- are those of the workflow, which only run starts")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    from runs import read_study

    try:
        study = read_study()
        if parsed.command == "table":
            _table(study)
            return
        others = () if parsed.command == "data" else ("nnUNet_preprocessed", "nnUNet_results")
        needed = ("nnUNet_raw", *others)
        unset = [name for name in needed if not os.environ.get(name)]
        if unset:
            raise RuntimeError(f"set {', '.join(unset)}, nnU-Net's folders.")
        if parsed.command == "data":
            from data import copy_cases, folder_of

            copy_cases(parsed.source, Path(os.environ["nnUNet_raw"]) / folder_of(study, study["protocol"]["dataset"]))
            return
        for kind, given in (("networks", getattr(parsed, "networks", None)), ("datasets", [_dataset(study, parsed)])):
            unknown = set(given or ()) - set(study[kind])
            if unknown:
                has = f"it has {', '.join(study[kind])}"
                raise RuntimeError(f"runs.yaml has none of its {kind} called {', '.join(sorted(unknown))}; {has}.")
        os.environ.setdefault("OMP_NUM_THREADS", str(parsed.threads))
        _train_or_measure(study, parsed)
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


def _table(study: dict[str, Any]) -> None:
    from tables import draw_curves, write_tables

    write_tables(study, RESULTS, DOCUMENT)
    for stage, image in study["figures"].items():
        saved = RESULTS / f"{stage}.json"
        if saved.is_file():
            draw_curves(json.loads(saved.read_text()), DOCUMENT.parent / "images" / image)


def _dataset(study: dict[str, Any], parsed: argparse.Namespace) -> str:
    from runs import dataset_of

    if parsed.command not in ("run", "look"):
        return getattr(parsed, "dataset", None) or study["protocol"]["dataset"]
    if parsed.stage not in study["stages"]:
        raise RuntimeError(f"runs.yaml has no stage {parsed.stage}; it has {', '.join(study['stages'])}.")
    return dataset_of(study, parsed.stage)


def _train_or_measure(study: dict[str, Any], parsed: argparse.Namespace) -> None:
    from plans import prepare_plans
    from runs import Setting, runs_of, setting_of

    work = parsed.work.resolve()
    if parsed.command == "run":
        networks = [run.network for run in runs_of(study, parsed.stage)]
        prepare_plans(study, networks, setting_of(study, parsed.stage))
        _run(study, parsed, work)
    if parsed.command == "look":
        _look(study, parsed, work)
        return
    networks = parsed.networks or list(study["networks"])
    if parsed.command == "steps":
        networks = list(dict.fromkeys([BASELINE, *networks]))
    protocol = study["protocol"]
    batch_size = getattr(parsed, "batch", None) or protocol["batch_size"]
    setting = Setting(_dataset(study, parsed), batch_size, parsed.device or protocol["device"])
    folder = prepare_plans(study, networks, setting)
    (_steps if parsed.command == "steps" else _begin)(study, networks, folder, setting, parsed, work)


def _run(study: dict[str, Any], parsed: argparse.Namespace, work: Path) -> NoReturn:
    from runs import write_stage

    config = write_stage(study, parsed.stage, work, parsed.threads)
    command = [sys.executable, "-m", "nnunet_conres.cli", "workflow", str(config), *parsed.options]
    code = subprocess.run(command, check=False).returncode
    report = work / parsed.stage / "report" / "folds" / "report.json"
    if code == 0 and parsed.options:
        print(f"With options nothing is saved; run {parsed.stage} without them, when its trainings are there.")
    elif code == 0 and report.is_file():
        from tables import save_results

        saved = RESULTS / f"{parsed.stage}.json"
        save_results(study, parsed.stage, json.loads(report.read_text()), saved, _curves(study, parsed.stage))
        print(f"Saved {saved}; `study.py table` writes it into {DOCUMENT.name}.")
    elif code == 0:
        sys.exit(f"error: there is no {report}; nothing was saved.")
    sys.exit(code)


def _curves(study: dict[str, Any], stage: str) -> dict[str, list[float]]:
    """By a run's name, the mean Dice of its validation patches by epoch, averaged over the stage's folds."""
    import torch
    from runs import runs_of

    curves = {}
    for run in runs_of(study, stage):
        model = _model(study, stage, run)
        folds = []
        for fold in study["stages"][stage]["folds"]:
            file = model / f"fold_{fold}" / "checkpoint_final.pth"
            if file.is_file():
                folds.append(torch.load(file, map_location="cpu", weights_only=False)["logging"]["mean_fg_dice"])
        curves[run.name] = [statistics.fmean(map(float, values)) for values in zip(*folds, strict=True)]
    return curves


def _steps(
    study: dict[str, Any], networks: list[str], folder: Path, setting: Setting, parsed: argparse.Namespace, work: Path
) -> None:
    from steps import measure
    from tables import read_steps

    times = measure(study, networks, folder, setting, parsed.threads, parsed.rounds, work)
    medians = {network: statistics.median(seconds) for network, seconds in times.items()}
    baseline = medians[BASELINE]
    for network, seconds in medians.items():
        print(f"{network:24} {1000 * seconds:7.0f} ms  {seconds / baseline:.2f}")
    file = RESULTS / "steps.json"
    known = read_steps(file)
    known.setdefault(setting.name, {}).update(
        {
            network: {"ms": round(1000 * seconds, 1), "baseline_ms": round(1000 * baseline, 1)}
            for network, seconds in medians.items()
        }
    )
    write_json(file, known)


def _begin(
    study: dict[str, Any], networks: list[str], folder: Path, setting: Setting, parsed: argparse.Namespace, work: Path
) -> None:
    from steps import begin

    losses = begin(study, networks, folder, setting, parsed.threads, parsed.iterations, work)
    for network, values in losses.items():
        means = [statistics.fmean(values[start : start + 10]) for start in range(0, len(values), 10)]
        print(f"{network:24} " + " ".join(f"{mean:6.2f}" for mean in means))


def _look(study: dict[str, Any], parsed: argparse.Namespace, work: Path) -> None:
    from dataclasses import replace

    import torch
    from look import look
    from plans import prepare_plans
    from runs import runs_of, setting_of

    setting, fold = replace(setting_of(study, parsed.stage), device="cpu"), study["stages"][parsed.stage]["folds"][0]
    networks = [run.network for run in runs_of(study, parsed.stage)]
    unknown = set(parsed.networks or ()) - set(networks)
    if unknown:
        raise RuntimeError(f"stage {parsed.stage} has no {', '.join(sorted(unknown))}; it has {', '.join(networks)}.")
    runs = [run for run in runs_of(study, parsed.stage) if run.network in (parsed.networks or networks)]
    checkpoints = [_model(study, parsed.stage, run) / f"fold_{fold}" / "checkpoint_final.pth" for run in runs]
    missing = [str(checkpoint) for checkpoint in checkpoints if not checkpoint.is_file()]
    if missing:
        raise RuntimeError(f"there is no {', nor '.join(missing)}: run the stage {parsed.stage}.")
    folder = prepare_plans(study, [run.network for run in runs], setting)
    torch.set_num_threads(parsed.threads)
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        found = look(study, run, folder, setting, fold, parsed.batches, checkpoint, work)
        print(f"{run.name}, fold {fold}")
        for name, value in found.items():
            print(f"  {name}: {_written(value)}")


def _model(study: dict[str, Any], stage: str, run: Run) -> Path:
    """nnU-Net's folder of a run's trainings."""
    from data import folder_of
    from runs import plans_name, setting_of

    setting = setting_of(study, stage)
    plans = plans_name(study, run.network, setting.batch_size)
    name = f"{run.trainer}__{plans}__{study['protocol']['configuration']}"
    return Path(os.environ["nnUNet_results"]) / folder_of(study, setting.dataset) / name


def _written(value: Any) -> str:
    if isinstance(value, dict):
        named = [f"without {name} {_written(v)}" if name else _written(v) for name, v in value.items()]
        return ", ".join(named)
    if isinstance(value, list):
        return ", ".join(f"{mean:.3f} +- {deviation:.3f}" for mean, deviation in value)
    return f"{value:.4g}"


if __name__ == "__main__":
    main()
