"""Memory of a training step: predicted by the memory model, counted on fake tensors, and measured on a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from tqdm import tqdm

from benchmarks import machine
from benchmarks.arguments import add_task, task_of
from benchmarks.networks import CONFIGURATION, NETWORKS, OUR_NETWORKS, Task, stock_plans
from benchmarks.report import as_text, ratio_table, ratios_as_json, table
from benchmarks.timing import Ratio
from nnunet_conres.architectures.network import CHECKPOINTINGS
from nnunet_conres.planning.memory import MemoryModel
from nnunet_conres.planning.tracker import measure_training_step
from nnunet_conres.planning.training_step import RunningStep, TrainingStep
from nnunet_conres.plans.configurations import configuration_of
from nnunet_conres.trainers.base import PluginTrainer

DEFAULT = ("plainconvunet", "residual_maps", "conresnet", "conresnet_paper", "vnet", "unet3d")
POLICIES = {"cpu_float32": ("cpu", False), "cpu_bfloat16": ("cpu", True), "cuda_float16": ("cuda", True)}

# All kinds of plans: isotropic and anisotropic, few and many stages, one and four channels, labels and regions.
_CALIBRATION_TASKS = {
    "4 stages": ((32, 64, 64), None, Task((32, 64, 64), 2, 1, 2)),
    "6 stages": ((128, 128, 128), None, Task((128, 128, 128), 2, 4, 3, 3)),
    "2 stages": ((32, 32, 32), 2, Task((64, 64, 64), 2, 1, 13)),
    "anisotropic": ((96, 96, 96), 4, Task((16, 160, 160), 2, 2, 1)),
}
_ANISOTROPIC = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]], [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=tuple(NETWORKS),
        default=DEFAULT,
        metavar="NAME",
        help=f"networks, the first being the baseline, among {', '.join(NETWORKS)} (default: {' '.join(DEFAULT)})",
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=tuple(POLICIES),
        default=tuple(POLICIES),
        metavar="POLICY",
        help=f"precision of the operations, among {', '.join(POLICIES)} (default: all); with --device cuda, "
        "cuda_float16 is also measured on the GPU",
    )
    parser.add_argument(
        "--checkpointing",
        nargs="+",
        choices=CHECKPOINTINGS,
        default=("none",),
        metavar="WHAT",
        help=f"among {', '.join(CHECKPOINTINGS)} (default: none); nnU-Net's own networks have none",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="all our networks on four kinds of plans, under all policies and checkpointings, instead of one patch",
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw predicted against counted")
    add_task(parser)


def _steps(arguments: argparse.Namespace) -> Iterator[tuple[str, TrainingStep]]:
    if not arguments.calibrate:
        task = task_of(arguments)
        plans = {residual: stock_plans(task, residual_encoder=residual) for residual in (False, True)}
        for name in dict.fromkeys(arguments.contenders):
            for checkpointing in arguments.checkpointing if name in OUR_NETWORKS else ("none",):
                for policy in arguments.policies:
                    label = f"{name} {policy}" + ("" if checkpointing == "none" else f" {checkpointing}")
                    yield label, _step(name, plans[name == "resenc"], task, checkpointing, policy)
        return
    for kind, (planned_patch, n_stages, task) in _CALIBRATION_TASKS.items():
        plans = stock_plans(Task(planned_patch, task.batch, task.channels, task.classes))
        kwargs = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
        if n_stages is not None:
            kwargs["n_stages"] = n_stages
            for argument in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
                kwargs[argument] = kwargs[argument][:n_stages]
            kwargs["n_conv_per_stage_decoder"] = kwargs["n_conv_per_stage_decoder"][: n_stages - 1]
        if kind == "anisotropic":
            kwargs["strides"], kwargs["kernel_sizes"] = _ANISOTROPIC
        for name in OUR_NETWORKS:
            for checkpointing in CHECKPOINTINGS:
                for policy in POLICIES:
                    yield (
                        f"{kind}, {name}, {checkpointing}, {policy}",
                        _step(name, plans, task, checkpointing, policy),
                    )


def _step(name: str, plans: dict[str, Any], task: Task, checkpointing: str, policy: str) -> TrainingStep:
    configuration = configuration_of(plans, CONFIGURATION)
    architecture = configuration.configuration["architecture"]
    trainer = NETWORKS[name]
    if issubclass(trainer, PluginTrainer):
        architecture = trainer.architecture(configuration)
    if name in OUR_NETWORKS:
        architecture["arch_kwargs"]["checkpointing"] = checkpointing
    device, mixed = POLICIES[policy]
    return TrainingStep(
        trainer=trainer,
        architecture=architecture,
        patch_size=task.patch,
        batch_size=task.batch,
        input_channels=task.channels,
        labels=LabelManager(task.dataset_json["labels"], task.dataset_json.get("regions_class_order")),
        device=device,
        mixed_precision=mixed,
    )


def _measured_on_cuda(step: TrainingStep) -> int:
    """Return the bytes that PyTorch's allocator provides at the peak of a step."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    running = RunningStep(step, torch.device("cuda"))
    for _ in range(3):  # until cuDNN has chosen its algorithms
        torch.cuda.reset_peak_memory_stats()
        running.run(lambda: torch.autocast("cuda", torch.float16))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Count memory and return the report."""
    found: dict[str, dict[str, Any]] = {}
    ratios = []
    for label, step in tqdm(list(_steps(arguments)), desc="Counting", unit="step"):
        counted = measure_training_step(step)
        entry: dict[str, Any] = {
            "counted": counted.peak,
            "kept": sum(counted.kept.values()),
            "between_steps": sum(counted.before.values()),
        }
        # like a planner, predict from executions with another patch
        model = MemoryModel()
        model.total(dataclasses.replace(step, patch_size=[2 * extent for extent in step.patch_size]))
        entry["predicted"] = model.peak(step)
        ratios.append(Ratio(f"predicted / counted, {label}", entry["predicted"] / counted.peak, at_most=1.001))
        if arguments.device.type == "cuda" and step.device == "cuda":
            entry["measured"] = _measured_on_cuda(step)
            ratios.append(Ratio(f"measured / counted, {label}", entry["measured"] / counted.peak))
        found[label] = entry
    report = {
        "benchmark": "memory",
        "title": _title(arguments),
        "machine": machine.describe(arguments.device),
        "contenders": found,
        "ratios": ratios_as_json(ratios),
    }
    errors = [abs(e["predicted"] / e["counted"] - 1) for e in found.values()]
    report["largest_error"] = max(errors, default=None)
    if arguments.figure is not None:
        _draw(found, arguments.figure)
    return report


def _title(arguments: argparse.Namespace) -> str:
    if arguments.calibrate:
        return "Peak memory of a training step, four kinds of plans"
    return f"Peak memory of a training step, {task_of(arguments)}"


def as_table(report: dict[str, Any]) -> str:
    """Format the report as text."""
    is_measured = any("measured" in entry for entry in report["contenders"].values())
    head = ["", "predicted MiB", "counted MiB", *(["measured MiB"] if is_measured else []), "kept MiB", "before MiB"]
    rows = []
    for name, entry in report["contenders"].items():
        keys = ["predicted", "counted", *(["measured"] if is_measured else []), "kept", "between_steps"]
        rows.append([name, *("" if entry.get(key) is None else f"{entry[key] / 2**20:.0f}" for key in keys)])
    error = report["largest_error"]
    summary = "" if error is None else f"Largest error of the prediction: {error:.2%}"
    # for dozens of plans, the table of memory is enough
    ratios = ratio_table(report["ratios"]) if len(rows) <= len(NETWORKS) * len(POLICIES) else ""
    return as_text(report, table(head, rows), ratios, summary)


def _draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    for name in OUR_NETWORKS:
        points = [
            (entry["counted"] / 2**30, entry["predicted"] / 2**30)
            for label, entry in found.items()
            if name in label.replace(",", " ").split()
        ]
        if points:
            axes.loglog(*zip(*points, strict=True), "o", label=name, markersize=5, alpha=0.6)
    limits = [min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])]
    axes.plot(limits, limits, color="black", linewidth=0.8, zorder=0)
    axes.fill_between(
        limits, [0.95 * x for x in limits], [1.05 * x for x in limits], color="0.85", zorder=-1, label="within 5 %"
    )
    axes.set(xlim=limits, ylim=limits, xlabel="counted, GiB", ylabel="predicted, GiB", aspect="equal")
    axes.set_title("Peak memory of a training step", fontsize="medium")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
