"""Patch, batch and checkpointing that the planners choose for a memory target, beside nnU-Net's own plans.

The data sets are synthetic: they have a fingerprint but no images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from benchmarks import machine
from benchmarks.report import as_text, table
from benchmarks.synthetic import DATA_SETS, DATASET_NAME, DataSet, nnunet_folders
from benchmarks.timing import BenchmarkError
from nnunet_conres.families import find_trainer
from nnunet_conres.planning.memory import MemoryModel
from nnunet_conres.planning.planners import GIB, PLANNERS, TooLittleMemoryError
from nnunet_conres.planning.training_step import TrainingStep

CONFIGURATIONS = ("3d_fullres", "3d_lowres", "3d_cascade_fullres")
TARGETS = (8, 12, 16, 24, 40, 80)
STOCK = "nnU-Net"

NETWORKS = ("residual_maps", "conresnet", "vnet", "unet3d")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--targets",
        type=float,
        nargs="+",
        default=TARGETS,
        metavar="GIB",
        help=f"what a training step may take (default: {' '.join(map(str, TARGETS))})",
    )
    for flag, known, default, what in (
        ("--data", DATA_SETS, tuple(DATA_SETS), "synthetic data sets"),
        ("--networks", PLANNERS, NETWORKS, "networks"),
    ):
        parser.add_argument(
            flag,
            nargs="+",
            choices=tuple(known),
            default=default,
            metavar="NAME",
            help=f"{what}, among {', '.join(known)} (default: {' '.join(default)})",
        )


def _training_steps(
    plans: dict[str, Any],
    data: DataSet,
    trainer_name: str = "nnUNetTrainer",
    architecture: Callable[[ConfigurationManager], Any] | None = None,
) -> dict[str, TrainingStep]:
    """Return training steps by 3D configuration, with the plans' own network or with one derived from it."""
    manager = PlansManager(json.loads(json.dumps(plans)))
    labels = manager.get_label_manager(data.dataset_json)
    steps = {}
    for name in (name for name in CONFIGURATIONS if name in manager.available_configurations):
        found = manager.get_configuration(name)
        steps[name] = TrainingStep(
            trainer=find_trainer(trainer_name),
            architecture=found.configuration["architecture"] if architecture is None else architecture(found),
            patch_size=tuple(found.patch_size),
            batch_size=found.batch_size,
            input_channels=determine_num_input_channels(manager, found, data.dataset_json),
            labels=labels,
        )
    return steps


def plan(data: DataSet, target: float, networks: Sequence[str], model: MemoryModel) -> Iterator[dict[str, Any]]:
    """Plan a data set for nnU-Net's own network and for ours, within ``nnunet_folders``.

    Args:
        data: The data set.
        target: Memory target, GiB.
        networks: Keys of PLANNERS.
        model: Memory model of training steps, shared by all targets.

    Yields:
        For every configuration its plan, with memory in bytes; for a refused network the error message.
    """
    silence = contextlib.redirect_stdout(io.StringIO())
    with silence, torch.device("meta"):  # nnU-Net builds the network for every patch that it tries
        stock = ExperimentPlanner(DATASET_NAME, gpu_memory_target_in_gb=target).plan_experiment()
    for name, step in _training_steps(stock, data).items():
        yield _entry(target, STOCK, name, step)
    for network in networks:
        planner = PLANNERS[network](DATASET_NAME, gpu_memory_target_in_gb=target)
        planner.model, planner.progress = model, False
        try:
            with silence:
                plans = planner.plan_experiment()
        except TooLittleMemoryError as error:
            needs = re.search(r"at least ([\d.]*\d)", str(error))
            yield {
                "target": target,
                "network": planner.family.title,
                "refused": str(error),
                "needs": None if needs is None else float(needs[1]),
            }
            continue
        memory = {planned.name: planned.memory for planned in planner.planned_configurations()}
        at_stock_plan = _training_steps(stock, data, planner.family.trainer_name, planner.family.plans.architecture)
        for name, step in _training_steps(plans, data).items():
            entry = _entry(target, planner.family.title, name, step)
            entry |= {"checkpointing": step.arguments["checkpointing"], "memory": memory[name]}
            if name in at_stock_plan:
                entry["at_stock_plan"] = model.total(at_stock_plan[name])
            yield entry


def _entry(target: float, network: str, configuration: str, step: TrainingStep) -> dict[str, Any]:
    entry = {"target": target, "network": network, "configuration": configuration}
    return {**entry, "patch": list(step.patch_size), "batch": step.batch_size}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan all data sets and return the report."""
    if arguments.device.type != "cpu":
        raise BenchmarkError("Plans are made on the CPU, for a GPU. Use --device cpu.")
    if not all(target > 0 for target in arguments.targets):
        raise BenchmarkError("--targets must be above 0.")
    about = machine.describe(arguments.device)
    report: dict[str, Any] = {"benchmark": "plans", "title": "Plans for a memory target", "machine": about, "data": {}}
    model = MemoryModel()
    rounds = [(name, target) for name in arguments.data for target in arguments.targets]
    for name, target in tqdm(rounds, desc="Plans", unit="target"):
        data = DATA_SETS[name]
        entry = report["data"].setdefault(name, {**asdict(data), "plans": []})
        with nnunet_folders(data):
            entry["plans"] += plan(data, target, arguments.networks, model)
    return report


def as_table(report: dict[str, Any]) -> str:
    """Format the report as text: a table per data set and configuration."""
    return as_text(report, *(part for entry in report["data"].values() for part in _tables(entry)))


def _tables(data: dict[str, Any]) -> Iterator[str]:
    spacing, shape = (" x ".join(f"{extent:g}" for extent in data[key]) for key in ("spacing", "shape"))
    yield f"{data['title']}, {shape} voxels of {spacing} mm, {data['cases']} cases; memory in GiB"
    head = ["target", "network", "patch", "batch", "checkpointing", "memory", "at nnU-Net's plan"]
    for name in CONFIGURATIONS:
        # a refused network has no configurations; it appears in the first table
        entries = [entry for entry in data["plans"] if entry.get("configuration", CONFIGURATIONS[0]) == name]
        if entries:
            yield name
            yield table(head, [_row(entry) for entry in entries])


def _row(entry: dict[str, Any]) -> list[str]:
    row = [f"{entry['target']:g}", entry["network"]]
    if "refused" in entry:
        row.append("does not fit" + ("" if entry["needs"] is None else f", needs {entry['needs']:g}"))
        return row + [""] * 4
    row += [" x ".join(map(str, entry["patch"])), str(entry["batch"]), entry.get("checkpointing", "")]
    return [*row, _gib(entry, "memory"), _gib(entry, "at_stock_plan")]


def _gib(entry: dict[str, Any], key: str) -> str:
    return f"{entry[key] / GIB:.2f}" if key in entry else ""
