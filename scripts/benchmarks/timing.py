"""Contenders taking turns, and what their times say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

Phases = dict[str, float]


class BenchmarkError(ValueError):
    """What was asked for can't be measured; the message is for whoever asked."""


class Clock:
    """Seconds of consecutive phases; starts when it is made.

    On CUDA the phases are marked in the stream, so that nothing waits between them.

    Args:
        device: Device that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._names: list[str] = []
        if self._on_cuda:
            torch.cuda.synchronize()
        self._marks = [self._mark()]

    def _mark(self) -> Any:
        if not self._on_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, phase: str) -> None:
        """Ends a phase; the next one begins."""
        self._names.append(phase)
        self._marks.append(self._mark())

    def seconds(self) -> Phases:
        """Seconds of every phase, in order."""
        pairs = list(zip(self._marks[:-1], self._marks[1:], strict=True))
        if self._on_cuda:
            torch.cuda.synchronize()
            durations = [start.elapsed_time(end) / 1000 for start, end in pairs]
        else:
            durations = [end - start for start, end in pairs]
        return dict(zip(self._names, durations, strict=True))


def in_turn(runs: Mapping[str, Callable[[], Phases]], rounds: int, warmup: int) -> dict[str, list[Phases]]:
    """Runs every contender once per round, so that whatever else the machine does hits all of them.

    Args:
        runs: What is timed, by name; returns the seconds of its phases.
        rounds: Rounds that count.
        warmup: Rounds before them that don't.

    Returns:
        The phases' seconds, by contender and round.
    """
    times: dict[str, list[Phases]] = {name: [] for name in runs}
    for turn in tqdm(range(warmup + rounds), desc="Rounds", unit="round"):
        for name, run in runs.items():
            phases = run()
            if turn >= warmup:
                times[name].append(phases)
    return times


def totals(times: Sequence[Phases]) -> list[float]:
    """Seconds of all phases together, per round."""
    return [sum(phases.values()) for phases in times]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles over rounds, with the rounds themselves."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "quartiles": [float(low), float(high)], "rounds": [float(v) for v in values]}


@dataclass(frozen=True)
class Ratio:
    """How long one contender took, in times of another.

    Attributes:
        name: What is divided by what.
        measured: The ratio.
        quartiles: Of the ratios within rounds; None where there are no rounds.
        at_most: What it should be at most; None where nothing is asked.
        per_flop: The same of the time per convolution FLOP; None where that says nothing.
    """

    name: str
    measured: float
    quartiles: tuple[float, float] | None = None
    at_most: float | None = None
    per_flop: float | None = None

    @classmethod
    def of_medians(
        cls,
        name: str,
        values: Sequence[float],
        reference: Sequence[float],
        at_most: float | None = None,
        flops: tuple[float, float] | None = None,
    ) -> Ratio:
        """Median divided by median.

        Args:
            name: What is divided by what.
            values: Seconds per round.
            reference: Those of the other contender, same rounds.
            at_most: What the ratio should be at most.
            flops: Convolution FLOPs of both.
        """
        measured = float(np.median(values) / np.median(reference))
        low, high = np.percentile(np.divide(values, reference), (25, 75))
        per_flop = None if flops is None else measured * flops[1] / flops[0]
        return cls(name, measured, (float(low), float(high)), at_most, per_flop)

    @classmethod
    def median_of_rounds(
        cls, name: str, values: Sequence[float], reference: Sequence[float], at_most: float | None = None
    ) -> Ratio:
        """Median of the ratios of times that were measured in the same round. Takes what ``of_medians`` takes."""
        low, measured, high = np.percentile(np.divide(values, reference), (25, 50, 75))
        return cls(name, float(measured), (float(low), float(high)), at_most)

    @property
    def met(self) -> bool | None:
        """Whether the ratio is as small as it should be; None where nothing is asked."""
        return None if self.at_most is None else self.measured <= self.at_most

    def as_json(self) -> dict[str, Any]:
        """What goes into the report."""
        return {
            "measured": self.measured,
            "quartiles": self.quartiles,
            "per_flop": self.per_flop,
            "at_most": self.at_most,
            "met": self.met,
        }
