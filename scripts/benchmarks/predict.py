"""Prediction of one case by nnU-Net's own predictor: sliding window, half overlap, Gaussian weights, no mirroring."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from benchmarks import machine
from benchmarks.arguments import add_task, add_turns, positive, task_of
from benchmarks.convolutions import record
from benchmarks.networks import NETWORKS, Task, build
from benchmarks.report import as_text, milliseconds_with_quartiles, ratio_table, ratios_as_json, table
from benchmarks.timing import BenchmarkError, Clock, Phases, Ratio, in_turn, spread, totals

DEFAULT = ("plainconvunet", "residual_maps", "conresnet")
LIMITS = {
    "cpu": {("conresnet", "plainconvunet"): 1.5, ("residual_maps", "plainconvunet"): 1.5},
    "cuda": {("conresnet", "plainconvunet"): 1.0},
}


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
        "--case",
        type=positive,
        nargs=3,
        metavar="SIZE",
        help="size of the case in voxels (default: twice the patch on every axis, which takes 27 patches)",
    )
    parser.add_argument("--step_size", type=float, default=0.5, help="step in patches (default: %(default)s)")
    add_task(parser)
    add_turns(parser, rounds=5, warmup=1)


def like(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments of a prediction with the same task as steps."""
    contenders = ("plainconvunet", "plainconvunet_muon", "residual_maps", "conresnet")
    given = {"contenders": contenders, "case": None, "step_size": 0.5, "rounds": 3, "warmup": 1}
    return argparse.Namespace(**(vars(arguments) | given))


class Prediction:
    """A network with nnU-Net's predictor; every call predicts the case.

    Args:
        name: Name of the network.
        task: The task of the network.
        device: Device that does the work.
        step_size: Step of the sliding window in patches.
        case: Preprocessed images, shape (C, X, Y, Z).
    """

    def __init__(self, name: str, task: Task, device: torch.device, step_size: float, case: torch.Tensor) -> None:
        self.device, self.case = device, case
        self.patches = 0
        model = build(name, task, device, deep_supervision=False)
        with redirect_stdout(StringIO()):  # without CUDA it always prints a notice
            self.predictor = nnUNetPredictor(
                tile_step_size=step_size, use_gaussian=True, use_mirroring=False, device=device, allow_tqdm=False
            )
        self.predictor.manual_initialization(
            model.network, model.plans, model.configuration, None, task.dataset_json, name, None
        )
        count = model.network.register_forward_hook(self._count)
        self.flops = sum(convolution.forward_flops for convolution in record(self))
        count.remove()

    def _count(self, module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        self.patches += len(inputs[0])

    def __call__(self) -> Phases:
        clock = Clock(self.device)
        self.predictor.predict_sliding_window_return_logits(self.case)
        clock.lap("prediction")
        return clock.seconds()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure predictions and return the report."""
    if not 0 < arguments.step_size <= 1:
        raise BenchmarkError(f"--step_size must be above 0 and at most 1, got {arguments.step_size}.")
    device, task = arguments.device, task_of(arguments)
    about = machine.describe(device)
    size = tuple(arguments.case or (2 * extent for extent in task.patch))
    case = torch.randn(task.channels, *size, generator=torch.Generator().manual_seed(0))
    runs = {
        name: Prediction(name, task, device, arguments.step_size, case) for name in dict.fromkeys(arguments.contenders)
    }
    calls: dict[str, Callable[[], Phases]] = dict(runs)
    times = in_turn(calls, arguments.rounds, arguments.warmup)

    found = {}
    for name, prediction in runs.items():
        seconds = spread(totals(times[name]))
        found[name] = {
            "contender": name,
            "patches": prediction.patches,
            "flops": prediction.flops,
            "seconds": seconds,
            "seconds_per_flop": seconds["median"] / prediction.flops,
        }
    return {
        "benchmark": "predict",
        "title": (
            f"Prediction of a case of {' x '.join(map(str, size))}, {task}, step {arguments.step_size}, mirroring off; "
            f"milliseconds, medians of {arguments.rounds} rounds"
        ),
        "machine": about,
        "task": vars(task),
        "case": size,
        "step_size": arguments.step_size,
        "precision": "mixed" if device.type == "cuda" else "float32",
        "rounds": arguments.rounds,
        "warmup": arguments.warmup,
        "contenders": found,
        "ratios": ratios_as_json(_ratios(runs, times, LIMITS[device.type])),
    }


def _ratios(
    runs: dict[str, Prediction], times: dict[str, list[Phases]], limits: dict[tuple[str, str], float]
) -> list[Ratio]:
    baseline = next(iter(runs))
    pairs = [pair for pair in limits if set(pair) <= runs.keys()]
    pairs += [(name, baseline) for name in runs if name != baseline]
    return [
        Ratio.of_medians(
            f"{one} / {other}",
            totals(times[one]),
            totals(times[other]),
            limits.get((one, other)),
            (runs[one].flops, runs[other].flops),
        )
        for one, other in pairs
    ]


def as_table(report: dict[str, Any]) -> str:
    """Format the report as text."""
    rows = [
        [
            name,
            milliseconds_with_quartiles(entry["seconds"]),
            str(entry["patches"]),
            f"{entry['flops'] / 1e9:.1f}",
            f"{1e12 * entry['seconds_per_flop']:.3g}",
        ]
        for name, entry in report["contenders"].items()
    ]
    head = ["", "case (quartiles)", "patches", "conv GFLOP", "ps per FLOP"]
    return as_text(report, table(head, rows), ratio_table(report["ratios"]))
