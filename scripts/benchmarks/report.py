"""Reports as text tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.machine import in_a_line
from benchmarks.timing import Ratio
from nnunet_conres.text import markdown_table as table


def ratio_table(ratios: dict[str, dict[str, Any]]) -> str:
    """Format ratios beside their limits as a table.

    Args:
        ratios: Result of ``ratios_as_json``.
    """
    with_flops = any(ratio["per_flop"] is not None for ratio in ratios.values())
    head = ["ratio", "measured", "quartiles", *(["per FLOP"] if with_flops else []), "at most", ""]
    rows = []
    for name, ratio in ratios.items():
        low_high = ratio["quartiles"]
        row = [name, f"{ratio['measured']:.3f}", "" if low_high is None else f"{low_high[0]:.3f} - {low_high[1]:.3f}"]
        if with_flops:
            row.append("" if ratio["per_flop"] is None else f"{ratio['per_flop']:.3f}")
        if ratio["at_most"] is None:
            row += ["", ""]
        else:
            row += [f"{ratio['at_most']:.3f}", "met" if ratio["met"] else "MISSED"]
        rows.append(row)
    return table(head, rows)


def ratios_as_json(ratios: Iterable[Ratio]) -> dict[str, dict[str, Any]]:
    """Return ratios as JSON, by name. Of two ratios with the same name, the first is kept."""
    found: dict[str, dict[str, Any]] = {}
    for ratio in ratios:
        found.setdefault(ratio.name, ratio.as_json())
    return found


def as_text(report: dict[str, Any], *parts: str) -> str:
    """Join the machine, the title and the tables into the printed text."""
    return "\n\n".join(["", in_a_line(report["machine"]), report["title"], *(part for part in parts if part)])


def milliseconds(times: dict[str, Any]) -> str:
    """Format the median of times in seconds, as milliseconds."""
    return f"{1000 * times['median']:.1f}"


def milliseconds_with_quartiles(times: dict[str, Any]) -> str:
    """Format the median and the quartiles of times in seconds, as milliseconds."""
    low, high = times["quartiles"]
    return f"{1000 * times['median']:.1f} ({1000 * low:.1f} - {1000 * high:.1f})"


def write(report: dict[str, Any], file: Path) -> None:
    """Write a report as JSON; the write is atomic."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
