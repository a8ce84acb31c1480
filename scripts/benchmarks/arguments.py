"""Command-line arguments that subcommands share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.networks import Task
from benchmarks.timing import BenchmarkError


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def _device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text} is neither cpu nor cuda")
    return torch.device(text)


def add_common(parser: argparse.ArgumentParser, threads: int | None = None) -> None:
    """Add the arguments of all subcommands."""
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write the report to this file, as JSON")
    parser.add_argument("--device", type=_device, default="cpu", metavar="cpu|cuda", help="(default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=positive,
        default=threads,
        metavar="N",
        help="threads of the CPU (default: " + ("as many as PyTorch takes)" if threads is None else "%(default)s)"),
    )


def add_turns(parser: argparse.ArgumentParser, rounds: int, warmup: int = 2) -> None:
    """Add the numbers of rounds."""
    parser.add_argument(
        "--rounds", type=positive, default=rounds, metavar="N", help="rounds that count (default: %(default)s)"
    )
    parser.add_argument(
        "--warmup", type=int, default=warmup, metavar="N", help="rounds before them (default: %(default)s)"
    )


def add_task(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the task."""
    parser.add_argument(
        "--patch",
        type=positive,
        nargs=3,
        metavar="SIZE",
        help="patch in voxels (default: 40 56 40 on a CPU, 128 128 128 on CUDA)",
    )
    parser.add_argument("--batch", type=positive, default=2, metavar="N", help="patches (default: %(default)s)")
    parser.add_argument("--channels", type=positive, metavar="N", help="of images (default: 1 on a CPU, 4 on CUDA)")
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument("--classes", type=positive, metavar="N", help="foreground labels (default: 2 on a CPU)")
    targets.add_argument("--regions", type=positive, metavar="N", help="regions instead of labels (default: 3 on CUDA)")


def task_of(arguments: argparse.Namespace) -> Task:
    """Return the task that the arguments state."""
    patch, channels, classes, regions = arguments.patch, arguments.channels, arguments.classes, arguments.regions
    on_cuda = arguments.device.type == "cuda"
    if classes is None and regions is None and on_cuda:
        regions = 3
    defaults = ((128, 128, 128), 4) if on_cuda else ((40, 56, 40), 1)
    return Task(tuple(patch or defaults[0]), arguments.batch, channels or defaults[1], classes or 2, regions)


def check(arguments: argparse.Namespace) -> None:
    """Check the arguments before any work is done.

    Raises:
        BenchmarkError: All errors, one per line.
    """
    errors = []
    output: Path | None = arguments.output
    if output is not None and not output.resolve().parent.is_dir():
        errors.append(f"The folder of {output} does not exist.")
    if output is not None and output.is_dir():
        errors.append(f"{output} is a folder; expected a file.")
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        errors.append("PyTorch finds no CUDA device. Use --device cpu.")
    if getattr(arguments, "warmup", 0) < 0:
        errors.append("--warmup must not be negative.")
    if errors:
        raise BenchmarkError("\n".join(errors))
