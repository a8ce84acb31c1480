"""Timing of contenders that take turns, and statistics of their times."""

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
    """The requested benchmark cannot run; the message is for the user."""


class Clock:
    """Clock of consecutive phases; starts when it is created.

    On CUDA, events in the stream mark the phases, so that nothing waits between them.

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
        """End a phase; the next one begins."""
        self._names.append(phase)
        self._marks.append(self._mark())

    def seconds(self) -> Phases:
        """Return the seconds of every phase, in order."""
        pairs = list(zip(self._marks[:-1], self._marks[1:], strict=True))
        if self._on_cuda:
            torch.cuda.synchronize()
            durations = [start.elapsed_time(end) / 1000 for start, end in pairs]
        else:
            durations = [end - start for start, end in pairs]
        return dict(zip(self._names, durations, strict=True))


def in_turn(runs: Mapping[str, Callable[[], Phases]], rounds: int, warmup: int) -> dict[str, list[Phases]]:
    """Run every contender once per round, so that other load on the machine affects all of them alike.

    Args:
        runs: Functions to time, by name; each returns the seconds of its phases.
        rounds: Rounds that count.
        warmup: Rounds before them that do not count.

    Returns:
        The seconds of the phases, by contender and round.
    """
    times: dict[str, list[Phases]] = {name: [] for name in runs}
    for turn in tqdm(range(warmup + rounds), desc="Rounds", unit="round"):
        for name, run in runs.items():
            phases = run()
            if turn >= warmup:
                times[name].append(phases)
    return times


def totals(times: Sequence[Phases]) -> list[float]:
    """Return the seconds of all phases together, per round."""
    return [sum(phases.values()) for phases in times]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median and quartiles over rounds, and the values of all rounds."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "quartiles": [float(low), float(high)], "rounds": [float(v) for v in values]}


@dataclass(frozen=True)
class Ratio:
    """Ratio of the times of two contenders.

    Attributes:
        name: What is divided by what.
        measured: The ratio.
        quartiles: Quartiles of the ratios within rounds; None without rounds.
        at_most: Largest accepted ratio; None without a limit.
        per_flop: The same ratio for the time per convolution FLOP; None where it has no meaning.
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
        """Return the ratio of the medians.

        Args:
            name: What is divided by what.
            values: Seconds per round.
            reference: Seconds of the other contender in the same rounds.
            at_most: Largest accepted ratio.
            flops: Convolution FLOPs of both contenders.
        """
        measured = float(np.median(values) / np.median(reference))
        low, high = np.percentile(np.divide(values, reference), (25, 75))
        per_flop = None if flops is None else measured * flops[1] / flops[0]
        return cls(name, measured, (float(low), float(high)), at_most, per_flop)

    @classmethod
    def median_of_rounds(
        cls, name: str, values: Sequence[float], reference: Sequence[float], at_most: float | None = None
    ) -> Ratio:
        """Return the median of the ratios within rounds. Arguments as in ``of_medians``, without ``flops``."""
        low, measured, high = np.percentile(np.divide(values, reference), (25, 50, 75))
        return cls(name, float(measured), (float(low), float(high)), at_most)

    @property
    def met(self) -> bool | None:
        """Whether the ratio is within its limit; None without a limit."""
        return None if self.at_most is None else self.measured <= self.at_most

    def as_json(self) -> dict[str, Any]:
        """Return the entry of the report."""
        return {
            "measured": self.measured,
            "quartiles": self.quartiles,
            "per_flop": self.per_flop,
            "at_most": self.at_most,
            "met": self.met,
        }
