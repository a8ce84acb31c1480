"""Where a step spends its time: in which operations beside the convolutions, and in which of those."""

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
    """Profiles one call.

    Args:
        run: What is called, once.
        device: Device that does the work.
        most: How many operations are listed.

    Returns:
        Seconds in all operations (``seconds``) and in convolutions (``convolutions``), and the ``operations`` beside
        those that take longest: name, calls, seconds.
    """
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiled:
        run()
        if on_cuda:
            torch.cuda.synchronize()
    entries = []
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        # on CUDA kernels are listed beside the operations that start them, with the same time
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
    """What ``hotspots`` found, for readers."""
    rows = [("convolutions", "", found["convolutions"])]
    rows += [(entry["name"], str(entry["calls"]), entry["seconds"]) for entry in found["operations"]]
    return table(
        [f"one step of {name}, profiled", "calls", "ms", "share"],
        [[what, calls, f"{1000 * s:.2f}", f"{100 * s / found['seconds']:.1f} %"] for what, calls, s in rows],
    )


def slowest(convolutions: Sequence[Convolution], device: torch.device, most: int, repeats: int = 3) -> list[Any]:
    """Times each convolution by itself, forward and backward; equal ones once.

    Args:
        convolutions: As recorded.
        device: Device that does the work.
        most: How many are listed.
        repeats: Calls that count, after one to warm up.

    Returns:
        Those that take longest together with their like: what they are, how many, seconds and FLOPs of one.
    """
    entries = []
    for convolution, count in Counter(convolutions).items():
        alone = ConvolutionsAlone([convolution], device)
        seconds = spread(totals([alone() for _ in range(repeats + 1)][1:]))["median"]
        flops = convolution.forward_flops + convolution.backward_flops
        entries.append({"convolution": str(convolution), "count": count, "seconds": seconds, "flops": flops})
    return sorted(entries, key=lambda entry: -entry["seconds"] * entry["count"])[:most]


def slowest_table(name: str, entries: list[Any]) -> str:
    """What ``slowest`` found, for readers."""
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
