"""Profile of a step: the slowest operations other than convolutions, and the slowest convolutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.convolutions import Convolution, ConvolutionsAlone
from benchmarks.report import table
from benchmarks.timing import spread, totals


def hotspots(run: Callable[[], Any], device: torch.device, most: int) -> dict[str, Any]:
    """Profile one call.

    Args:
        run: Function to profile; called once.
        device: Device that does the work.
        most: Number of operations to list.

    Returns:
        Seconds in all operations (``seconds``) and in convolutions (``convolutions``), and the slowest other
        ``operations``: name, calls, seconds.
    """
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiled:
        run()
        if on_cuda:
            torch.cuda.synchronize()
    entries = []
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        # on CUDA, kernels are listed beside the operations that launch them, with the same time
        if microseconds > 0 and (not on_cuda or event.key.startswith("aten::")):
            entries.append({"name": event.key, "calls": event.count, "seconds": microseconds / 1e6})
    others = sorted((e for e in entries if "conv" not in e["name"].lower()), key=lambda e: -e["seconds"])
    total = sum(entry["seconds"] for entry in entries)
    return {
        "seconds": total,
        "convolutions": total - sum(entry["seconds"] for entry in others),
        "operations": others[:most],
    }


def hotspot_table(name: str, found: dict[str, Any]) -> str:
    """Format the result of ``hotspots`` as a table."""
    rows = [("convolutions", "", found["convolutions"])]
    rows += [(entry["name"], str(entry["calls"]), entry["seconds"]) for entry in found["operations"]]
    return table(
        [f"one step of {name}, profiled", "calls", "ms", "share"],
        [[what, calls, f"{1000 * s:.2f}", f"{100 * s / found['seconds']:.1f} %"] for what, calls, s in rows],
    )


def slowest(convolutions: Sequence[Convolution], device: torch.device, most: int, repeats: int = 3) -> list[Any]:
    """Time each distinct convolution by itself, forward and backward.

    Args:
        convolutions: Recorded convolutions.
        device: Device that does the work.
        most: Number of convolutions to list.
        repeats: Timed calls, after one warm-up call.

    Returns:
        The convolutions with the largest total time of all equal calls: description, count, seconds and FLOPs of one.
    """
    entries = []
    for convolution, count in Counter(convolutions).items():
        alone = ConvolutionsAlone([convolution], device)
        seconds = spread(totals([alone() for _ in range(repeats + 1)][1:]))["median"]
        flops = convolution.forward_flops + convolution.backward_flops
        entries.append({"convolution": str(convolution), "count": count, "seconds": seconds, "flops": flops})
    return sorted(entries, key=lambda entry: -entry["seconds"] * entry["count"])[:most]


def slowest_table(name: str, entries: list[Any]) -> str:
    """Format the result of ``slowest`` as a table."""
    return table(
        [f"slowest of {name}, one by one", "number", "ms each", "GFLOP each", "ps per FLOP"],
        [
            [
                entry["convolution"],
                str(entry["count"]),
                f"{1000 * entry['seconds']:.2f}",
                f"{entry['flops'] / 1e9:.2f}",
                f"{1e12 * entry['seconds'] / entry['flops']:.3g}",
            ]
            for entry in entries
        ],
    )
