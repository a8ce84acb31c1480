"""Training steps: time per phase, and the ratio to the time of the convolutions alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import machine, predict
from benchmarks.arguments import add_task, add_turns, task_of
from benchmarks.convolutions import Convolution, ConvolutionsAlone, MatrixProduct, record, training_flops
from benchmarks.hotspots import hotspot_table, hotspots, slowest, slowest_table
from benchmarks.networks import CONTIGUOUS, NETWORKS, OURS, build
from benchmarks.report import as_text, milliseconds, milliseconds_with_quartiles, ratio_table, ratios_as_json, table
from benchmarks.timing import BenchmarkError, Phases, Ratio, in_turn, spread, totals
from benchmarks.training import LOSS_PHASES, PRECISIONS, TimedStep, check_precision

ALONE = "_convolutions"
CONTENDERS = (*NETWORKS, *(name + ALONE for name in NETWORKS), *(name + CONTIGUOUS for name in OURS))
DEFAULT = ("plainconvunet", "residual_maps", "conresnet", "conresnet_paper", "conresnet_paper_convolutions")
_OTHERS = ("conresnet_paper", "vnet", "unet3d")
CUDA_DEFAULT = (
    *("plainconvunet", "plainconvunet_muon", "residual_maps", "conresnet"),
    *(name + form for name in _OTHERS for form in ("", CONTIGUOUS)),
)

# largest accepted ratios: for float32 on a CPU, and for compiled mixed precision on CUDA
LIMITS = {
    "cpu": {
        ("conresnet", "plainconvunet"): 1.6,
        ("residual_maps", "plainconvunet"): 1.6,
        ("conresnet_paper", "conresnet_paper" + ALONE): 1.25,
    },
    "cuda": {
        ("plainconvunet_muon", "plainconvunet"): 0.75,
        ("residual_maps", "plainconvunet"): 0.8,
        ("conresnet", "plainconvunet"): 1.05,
        **{(name, name + CONTIGUOUS): 0.75 for name in _OTHERS},
    },
}
SMALL_PATCH_LIMIT = 0.667  # a network with CUDA graphs / the same network as nnU-Net's own trainer computes it
BFLOAT16_LIMIT = 0.55
LOSS_LIMITS = {"cpu": 0.05, "cuda": 0.01}
STATED_FOR = (
    "Limits are stated for float32 on a CPU, 2 threads, batch 2, patch 40 x 56 x 40, and for compiled steps on CUDA, "
    "mixed precision, batch 2, patch 128 x 128 x 128; for compiled steps of small patches they apply to "
    f"NAME / NAME{CONTIGUOUS}."
)


@dataclass(frozen=True)
class Variant:
    """A contender in a precision, compiled or not."""

    contender: str
    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.contender} {self.precision}" + (" compiled" if self.compiled else "")


@dataclass(frozen=True)
class Entrant:
    """A variant ready to run, and the convolutions of its network."""

    variant: Variant
    run: TimedStep | ConvolutionsAlone
    convolutions: list[Convolution]

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs of the convolutions: forward, backward, step."""
        return training_flops(self.convolutions)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        metavar="NAME",
        help=f"networks, the first being the baseline, among {', '.join(NETWORKS)}; with {ALONE} after the name its "
        f"convolutions alone, with {CONTIGUOUS} one of ours as nnU-Net's own trainer computes it "
        f"(default: {' '.join(DEFAULT)}; on CUDA {' '.join(CUDA_DEFAULT)})",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=tuple(PRECISIONS),
        help="one or more: float32, bfloat16 (autocast), mixed (CUDA: float16 as nnU-Net trains) (default: float32 on "
        "a CPU, mixed on CUDA)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also time each network compiled, with its loss; a graph break is an error. On CUDA, time compiled "
        "networks only, and also measure peak memory and one predicted case",
    )
    parser.add_argument(
        "--hotspots",
        type=int,
        default=0,
        metavar="N",
        help="also profile one step of each network and list the N operations other than convolutions that take "
        f"longest; for NAME{ALONE} the N convolutions (default: %(default)s)",
    )
    parser.add_argument(
        "--matmul_edge",
        type=int,
        metavar="N",
        help="size of the square matrices whose product gives the device's rate (default: 1024 on a CPU, 8192 on CUDA)",
    )
    add_task(parser)
    add_turns(parser, rounds=9)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure steps and return the report."""
    device, task = arguments.device, task_of(arguments)
    on_cuda = device.type == "cuda"
    precisions = list(dict.fromkeys(arguments.precision or ["mixed" if on_cuda else "float32"]))
    for precision in precisions:
        check_precision(precision, device)
    about = machine.describe(device)
    if on_cuda:
        # cuDNN's benchmark as in nnU-Net; float32 products in the default precision of convolutions (TF32)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")

    entrants = _entrants(arguments, precisions)
    edge = arguments.matmul_edge or (8192 if on_cuda else 1024)
    products = {precision: MatrixProduct(PRECISIONS[precision], device, edge) for precision in precisions}
    runs: dict[str, Callable[[], Phases]] = {str(entrant.variant): entrant.run for entrant in entrants}
    runs |= {f"product {precision}": product for precision, product in products.items()}
    try:
        # Muon's steps are captured in a CUDA graph from the fourth on
        times = in_turn(runs, arguments.rounds, arguments.warmup + (4 if on_cuda and arguments.compile else 0))
    except torch._dynamo.exc.Unsupported as error:
        raise BenchmarkError(f"torch.compile breaks the graph: {error}") from error
    rates = {p: product.flops / spread(totals(times[f"product {p}"]))["median"] for p, product in products.items()}
    report = {
        "benchmark": "step",
        "title": f"Training steps, {task}; milliseconds, medians of {arguments.rounds} rounds",
        "machine": about,
        "task": vars(task),
        "rounds": arguments.rounds,
        "warmup": arguments.warmup,
        "matmul_flops_per_second": rates,
        "contenders": {
            str(e.variant): _entry(e, times[str(e.variant)], rates[e.variant.precision], device, arguments.hotspots)
            for e in entrants
        },
        "ratios": ratios_as_json(_ratios(entrants, times, device)),
    }
    if on_cuda and arguments.compile:
        for entrant in entrants:
            if isinstance(entrant.run, TimedStep):
                report["contenders"][str(entrant.variant)]["peak_bytes"] = entrant.run.peak_bytes()
        report["prediction"] = predict.run(predict.like(arguments))
    return report


def _entrants(arguments: argparse.Namespace, precisions: list[str]) -> list[Entrant]:
    device, task = arguments.device, task_of(arguments)
    entrants = []
    for precision in precisions:
        for contender in dict.fromkeys(arguments.contenders or (CUDA_DEFAULT if device.type == "cuda" else DEFAULT)):
            model = build(contender.removesuffix(ALONE), task, device)
            step = TimedStep(model, device, precision)
            convolutions = record(step)
            if contender.endswith(ALONE):
                alone = ConvolutionsAlone(convolutions, device)
                entrants.append(Entrant(Variant(contender, precision), alone, convolutions))
                continue
            if device.type != "cuda" or not arguments.compile:
                entrants.append(Entrant(Variant(contender, precision), step, convolutions))
            if arguments.compile:
                # compiled code may use other convolutions; the FLOPs are those of the network as written
                step = TimedStep(build(contender, task, device), device, precision, compiled=True)
                entrants.append(Entrant(Variant(contender, precision, True), step, convolutions))
    return entrants


def _entry(
    entrant: Entrant, times: list[Phases], matmul_rate: float, device: torch.device, n_hotspots: int
) -> dict[str, Any]:
    variant, seconds = entrant.variant, spread(totals(times))
    per_flop = seconds["median"] / entrant.flops["step"]
    entry: dict[str, Any] = {
        "contender": variant.contender,
        "precision": variant.precision,
        "compiled": variant.compiled,
        "convolutions": len(entrant.convolutions),
        "flops": entrant.flops,
        "seconds": seconds,
        "phases": {phase: spread([phases[phase] for phases in times]) for phase in times[0]},
        "seconds_per_flop": per_flop,
        "share_of_matmul_rate": 1 / per_flop / matmul_rate,
    }
    if isinstance(entrant.run, TimedStep):
        entry["parameters"] = sum(parameter.numel() for parameter in entrant.run.parameters)
        entry["loss"] = spread(_loss_seconds(times))
        if n_hotspots and not variant.compiled:
            entry["hotspots"] = hotspots(entrant.run, device, n_hotspots)
    elif n_hotspots:
        entry["slowest"] = slowest(entrant.convolutions, device, n_hotspots)
    return entry


def _loss_seconds(times: list[Phases]) -> list[float]:
    return [sum(phases[phase] for phase in LOSS_PHASES) for phases in times]


def _ratios(entrants: list[Entrant], times: dict[str, list[Phases]], device: torch.device) -> list[Ratio]:
    """Return the ratios of each contender to its references; those to the baseline come last."""
    ratios = []
    flops = {entrant.variant: entrant.flops["step"] for entrant in entrants}
    variants, limits = list(flops), LIMITS[device.type]
    if any(isinstance(entrant.run, TimedStep) and entrant.run.has_graphs for entrant in entrants):
        limits = {(name, name + CONTIGUOUS): SMALL_PATCH_LIMIT for name in OURS}

    def compare(one: Variant, other: Variant, at_most: float | None) -> None:
        if one == other or other not in flops:
            return
        # convolutions alone have the FLOPs of their network, so a ratio per FLOP would add nothing
        alone = any(variant.contender.endswith(ALONE) for variant in (one, other))
        both = None if alone else (flops[one], flops[other])
        seconds, reference = totals(times[str(one)]), totals(times[str(other)])
        ratios.append(Ratio.of_medians(f"{one} / {other}", seconds, reference, at_most, both))

    for variant in variants:
        name, precision = variant.contender, variant.precision
        limited = (precision, variant.compiled) == (("mixed", True) if device.type == "cuda" else ("float32", False))
        compare(variant, Variant(name + ALONE, precision), limits.get((name, name + ALONE)) if limited else None)
        for one, other in limits:
            if one == name and not other.endswith(ALONE):
                limit = limits[one, other] if limited else None
                compare(variant, Variant(other, precision, variant.compiled), limit)
        if precision != "float32":
            limit = BFLOAT16_LIMIT if name in OURS and precision == "bfloat16" else None
            compare(variant, Variant(name, "float32", variant.compiled), limit)
        if variant.compiled:
            compare(variant, Variant(name, precision), None)
        if not name.endswith(ALONE):
            limit = LOSS_LIMITS[device.type] if limited and name in OURS else None
            rounds = times[str(variant)]
            ratios.append(Ratio.of_medians(f"loss / step, {variant}", _loss_seconds(rounds), totals(rounds), limit))
    for variant in variants:
        compare(variant, Variant(variants[0].contender, variant.precision, variant.compiled), None)
    return ratios


def as_table(report: dict[str, Any]) -> str:
    """Format the report as text."""
    phases = ("forward", *LOSS_PHASES, "backward", "optimiser")
    rows = []
    for name, entry in report["contenders"].items():
        row = [name, milliseconds_with_quartiles(entry["seconds"])]
        row += [milliseconds(entry["phases"][phase]) if phase in entry["phases"] else "" for phase in phases]
        row += [f"{entry['flops']['step'] / 1e9:.1f}", f"{1e12 * entry['seconds_per_flop']:.3g}"]
        row.append(f"{100 * entry['share_of_matmul_rate']:.0f} %")
        if "peak_bytes" in entry:
            row += [f"{1e-12 / entry['seconds_per_flop']:.0f}", f"{entry['peak_bytes'] / 2**20:.0f}"]
        rows.append(row)
    head = ["", "step (quartiles)", *phases, "conv GFLOP", "ps per FLOP", "of matmul rate"]
    if any("peak_bytes" in entry for entry in report["contenders"].values()):
        head += ["conv TFLOP/s", "peak MiB"]
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {p}" for p, rate in report["matmul_flops_per_second"].items())
    found = report["contenders"].items()
    details = [hotspot_table(name, entry["hotspots"]) for name, entry in found if "hotspots" in entry]
    details += [slowest_table(name, entry["slowest"]) for name, entry in found if "slowest" in entry]
    details += [predict.as_table(report["prediction"])] if "prediction" in report else []
    ratios = ratio_table(report["ratios"])
    return as_text(report, table(head, rows), f"Matrix products: {rates}. {STATED_FOR}", ratios, *details)
