"""The calibration section of the report, as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunet_conres.evaluation.report.charts import Line, reliability_chart
from nnunet_conres.evaluation.report.tables import (
    MEAN,
    difference_table,
    model_name,
    region_name,
    scroll_box,
    summary_table,
)
from nnunet_conres.evaluation.report.text import escape, number, readable, without_folders


def calibration(comparison: Mapping[str, Any]) -> str:
    """Return the section on the calibration of probabilities; empty if calibration was not requested.

    Args:
        comparison: Content of report.json.
    """
    found = comparison.get("calibration")
    if not found:
        return ""
    without = _without(found)
    if not found["pooled"]:
        return without
    places = {model["key"]: (index, model) for index, model in enumerate(comparison["models"])}
    shown = [key for key in places if key in found["pooled"]]
    regions = list(found["pooled"][shown[0]])
    parts = []
    for metric in found["metrics"]:
        charts = []
        for region in regions:
            curves = {key: found["pooled"][key][region][metric["key"]] for key in shown}
            lines = [
                Line(places[key][0], curve["probability"], curve["frequency"], bool(places[key][1].get("members")))
                for key, curve in curves.items()
            ]
            title = f"Observed frequency over predicted probability, {readable(region)}, {metric['name']}"
            chart = reliability_chart(lines, title=title)
            charts.append(f"<figure><figcaption>{region_name(region)}</figcaption>{chart}</figure>")
        parts.append(
            f"<h3>{escape(metric['name'])}</h3>"
            f'<p class="note">{escape(metric["description"])} Curves: all cases together. Lower is better.</p>'
            f'<div class="charts many">{"".join(charts)}</div>'
            f"{_tables(comparison, found, metric, regions, shown)}"
        )
    keys = "".join(f"<li>{model_name(*places[key])}</li>" for key in shown)
    return (
        f'{without}<ul class="legend">{keys}</ul>'
        '<p class="note">Expected calibration error (ECE): voxels are sorted by their predicted probability of the '
        f"region into {found['bins']} equal bins; the error is the mean over the voxels of the distance between mean "
        "probability and observed frequency of their bin, 0 to 1. On the dashed diagonal both agree. Below it, "
        "a model overestimates the probability of the region; above it, it underestimates it. Bins with few voxels "
        f"are noisy; reliability.csv has their numbers.</p>{''.join(parts)}"
    )


def _tables(
    comparison: Mapping[str, Any],
    found: Mapping[str, Any],
    metric: Mapping[str, Any],
    regions: list[str],
    shown: list[str],
) -> str:
    """Return tables of the mean over the cases, the error over all cases' voxels, and the paired differences."""
    # The same tables as for the other metrics, restricted to models with probabilities.
    of_calibration = {**comparison, "summary": found["summary"], "comparisons": found["comparisons"]}
    columns = [*regions, MEAN] if len(regions) > 1 else regions
    summary = summary_table(
        of_calibration,
        [(region_name(region), region, metric) for region in columns],
        "Mean over the cases, with its 95 % interval",
        f"{metric['name']} of every model and region",
    )
    rows = []
    for index, model in enumerate(comparison["models"]):
        if model["key"] in shown:
            errors = [found["pooled"][model["key"]][region][metric["key"]]["error"] for region in regions]
            cells = "".join(f'<td class="figure">{number(error, metric["decimals"])}</td>' for error in errors)
            rows.append(f'<tr><th scope="row">{model_name(index, model)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col" class="figure">{region_name(region)}</th>' for region in regions)
    table = f'<table><thead><tr><th scope="col">Model</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    pooled = f'<p class="caption">All cases together</p>{scroll_box(table, "Error of all voxels together")}'
    return summary + pooled + difference_table(of_calibration, metric)


def _without(found: Mapping[str, Any]) -> str:
    """Return a list of the models without probabilities and the commands that make them; empty if there are none."""
    if not found["without"]:
        return ""
    models = ", ".join(
        f"{escape(model['name'])} ({len(model['cases'])} case{'' if len(model['cases']) == 1 else 's'})"
        for model in found["without"]
    )
    remedies = "".join(f"<li>{escape(without_folders(remedy))}</li>" for remedy in found["remedies"])
    commands = f"<p>To create them:</p><ul>{remedies}</ul>" if remedies else ""
    return f"<p>No probabilities of {models}.</p>{commands}"
