"""Peak memory of a training step."""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch

from benchmarks import machine
from benchmarks.arguments import add_task, task_of
from benchmarks.networks import NETWORKS, Task, build
from benchmarks.report import as_text, ratio_table, ratios_as_json, table
from benchmarks.timing import BenchmarkError, Ratio
from benchmarks.training import PRECISIONS, TimedStep, check_precision

DEFAULT = ("plainconvunet", "conresnet", "conresnet_paper")


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
        "--precision",
        choices=tuple(PRECISIONS),
        help="float32, bfloat16 (autocast) or mixed (CUDA: float16 as nnU-Net trains) (default: mixed on CUDA)",
    )
    add_task(parser)


def measure(name: str, task: Task, precision: str, device: torch.device) -> dict[str, int]:
    """Bytes of a training step, by the means that the device offers.

    Args:
        name: Which network.
        task: What it segments.
        precision: As ``TimedStep`` takes it.
        device: Device that does the work.

    Returns:
        ``peak``, and ``between_steps``: what stays allocated when a step is over.

    Raises:
        BenchmarkError: If there is no means.
    """
    if device.type == "cuda":
        return _measure_on_cuda(name, task, precision, device)
    raise BenchmarkError("Memory is what PyTorch's CUDA allocator counts. Use --device cuda.")


def _measure_on_cuda(name: str, task: Task, precision: str, device: torch.device) -> dict[str, int]:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = TimedStep(build(name, task, device), device, precision)
    # the first makes the optimiser's state, the second runs with all that cuDNN needed to choose its algorithms
    for _ in range(2):
        step.as_trained()
    torch.cuda.synchronize()
    between = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.as_trained()
    torch.cuda.synchronize()
    return {"peak": torch.cuda.max_memory_allocated() - before, "between_steps": between - before}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures memory and returns the report."""
    device, task = arguments.device, task_of(arguments)
    precision = arguments.precision or ("mixed" if device.type == "cuda" else "float32")
    check_precision(precision, device)
    found = {name: measure(name, task, precision, device) for name in dict.fromkeys(arguments.contenders)}
    baseline = next(iter(found))
    ratios = [
        Ratio(f"{name} / {baseline}", found[name]["peak"] / found[baseline]["peak"])
        for name in found
        if name != baseline
    ]
    return {
        "benchmark": "memory",
        "title": f"Peak memory of a training step, {task}, {precision}",
        "machine": machine.describe(device),
        "task": vars(task),
        "precision": precision,
        "contenders": found,
        "ratios": ratios_as_json(ratios),
    }


def as_table(report: dict[str, Any]) -> str:
    """The report for readers."""
    rows = [
        [name, f"{entry['peak'] / 2**20:.0f}", f"{entry['between_steps'] / 2**20:.0f}"]
        for name, entry in report["contenders"].items()
    ]
    return as_text(report, table(["", "peak MiB", "between steps MiB"], rows), ratio_table(report["ratios"]))
