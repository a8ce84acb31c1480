"""The report's tables, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from nnunet_conres.evaluation.costs import times_compare
from nnunet_conres.evaluation.report.charts import colour_of
from nnunet_conres.evaluation.report.text import (
    NONE,
    breakable,
    duration,
    escape,
    interval,
    is_number,
    letter,
    number,
    probability,
    readable,
    significant_digits,
)
from nnunet_conres.evaluation.scoring import MEAN

_LEVEL: Final = 0.05


def badge(index: int) -> str:
    """Return a model's letter in its colour."""
    return f'<span class="badge" style="--colour: {colour_of(index)}">{letter(index)}</span>'


def model_name(index: int, model: Mapping[str, Any]) -> str:
    """Return a model's letter and name."""
    note = ' <span class="tag">baseline</span>' if model.get("baseline") else ""
    return f'<span class="model">{badge(index)} <span>{breakable(model["name"])}{note}</span></span>'


def region_name(region: str) -> str:
    """Return a region's name for headings."""
    return "mean of regions" if region == MEAN else escape(readable(region))


def metric_title(metric: Mapping[str, Any]) -> str:
    """Return a metric's name with its unit, as HTML."""
    unit = f" ({escape(metric['unit'])})" if metric.get("unit") else ""
    return escape(metric["name"]) + unit


def direction(metric: Mapping[str, Any]) -> str:
    """Return a phrase about which values of a metric are better."""
    directions = {
        "higher": "higher is better",
        "lower": "lower is better",
        "zero": "compared by absolute value; closest to zero is best",
    }
    return directions.get(metric.get("better") or "", "neither high nor low is better")


def goodness(metric: Mapping[str, Any], value: float | None) -> float | None:
    """Return a value with its sign chosen so that higher is better; None without a value or a better direction."""
    if value is None or not is_number(value):
        return None
    better = metric.get("better")
    return {"higher": value, "lower": -value, "zero": -abs(value)}.get(better) if better else None


def mean_decimals(metric: Mapping[str, Any]) -> int:
    """Return the number of decimals of a mean; at least one, because means of counts are not integers."""
    return metric["decimals"] or 1


class Significance:
    """Significance of differences to the baseline: the comparison's conclusion, otherwise p after Holm's correction."""

    def __init__(self, comparison: Mapping[str, Any]) -> None:
        self._models = comparison["models"]
        self._summary = comparison["summary"]
        self._rows = {(row["model"], row["region"], row["metric"]): row for row in comparison["comparisons"]}

    def row(self, model: str, region: str, metric: str) -> Mapping[str, Any] | None:
        """Return a model's comparison with the baseline, if there is one."""
        return self._rows.get((model, region, metric))

    def of(self, model: str, region: str, metric: Mapping[str, Any]) -> str:
        """Return "better" or "worse" than the baseline, or "" if unknown or not significant."""
        row = self.row(model, region, metric["key"])
        if row is None:
            return ""
        if "conclusion" in row:
            return row["conclusion"] if row["conclusion"] in ("better", "worse") else ""
        if not is_number(row.get("p_holm")) or row["p_holm"] >= _LEVEL:
            return ""
        # For a metric that is best at zero, differences are those of absolute values: lower is better.
        sign = {"higher": 1, "lower": -1, "zero": -1}.get(metric.get("better") or "", 0)
        difference = next(
            (row[key] for key in ("mean_difference", "median_difference") if is_number(row.get(key)) and row[key]), 0
        )
        if not sign or not difference:
            return ""
        return "better" if difference * sign > 0 else "worse"

    def best(self, region: str, metric: Mapping[str, Any]) -> str | None:
        """Return the key of the model with the best mean if its difference to the baseline is significant, else None.

        If the baseline has the best mean, every other model has to be significantly worse.
        """
        means = {
            model["key"]: goodness(metric, _cell(self._summary, model["key"], region, metric["key"]).get("mean"))
            for model in self._models
        }
        known = {key: value for key, value in means.items() if value is not None}
        if len(known) < 2:
            return None
        best = max(known, key=lambda key: known[key])
        baseline = next((model["key"] for model in self._models if model.get("baseline")), None)
        if best == baseline:
            others = [key for key in known if key != baseline]
            return best if all(self.of(key, region, metric) == "worse" for key in others) else None
        return best if self.of(best, region, metric) == "better" else None


def scroll_box(table: str, label: str) -> str:
    """Put a table into a scrollable box, which can be scrolled with the keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def summary_table(
    comparison: Mapping[str, Any],
    columns: Sequence[tuple[str, str, Mapping[str, Any]]],
    caption: str,
    label: str,
    *,
    turned: bool = False,
) -> str:
    """Return a table of means and intervals with one row per model and one column per region or metric.

    Args:
        comparison: Content of report.json.
        columns: Heading (HTML), region and metric of every column.
        caption: HTML.
        label: Label of the scrollable box, for screen readers.
        turned: Whether to transpose the table: one row per region or metric, one column per model. For tables with more
            columns than fit on a screen.

    Returns:
        HTML.
    """
    significance = Significance(comparison)
    total = comparison["dataset"].get("number_of_cases")
    best = [significance.best(region, metric) for _, region, metric in columns]
    cells_of = []
    for index, model in enumerate(comparison["models"]):
        cells = []
        for (_, region, metric), winner in zip(columns, best, strict=True):
            cell = _cell(comparison["summary"], model["key"], region, metric["key"])
            decimals = mean_decimals(metric)
            text = number(cell.get("mean"), decimals)
            if winner == model["key"]:
                text = f"<strong>{text}</strong>"
            mark = significance.of(model["key"], region, metric)
            if mark:
                arrow = "\N{BLACK UP-POINTING TRIANGLE}" if mark == "better" else "\N{BLACK DOWN-POINTING TRIANGLE}"
                said = f"significantly {mark} than the baseline"
                text += f'<span class="mark" title="{said}">{arrow}<span class="unseen"> {said}</span></span>'
            low_high = interval(cell.get("low"), cell.get("high"), decimals)
            count = cell.get("n")
            of_cases = f"n = {count}" if is_number(count) and is_number(total) and count != total else ""
            notes = ", ".join(part for part in (low_high, of_cases) if part)
            cells.append(f'<td class="figure">{text}<small>{notes}</small></td>')
        cells_of.append((model_name(index, model), cells))
    table = _grid("Model", [heading for heading, _, _ in columns], cells_of, turned=turned)
    return f'<p class="caption">{caption}</p>{scroll_box(table, label)}'


def difference_table(comparison: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """Return a table of the paired statistics of a metric, one row per model and region.

    Args:
        comparison: Content of report.json.
        metric: An entry of the comparison's list of metrics.

    Returns:
        HTML; empty if there are no comparisons for the metric.
    """
    places = {model["key"]: (index, model) for index, model in enumerate(comparison["models"])}
    significance = Significance(comparison)
    decimals = mean_decimals(metric)
    rows = []
    for row in comparison["comparisons"]:
        if row["metric"] != metric["key"] or row["model"] not in places:
            continue
        mark = significance.of(row["model"], row["region"], metric)
        adjusted = probability(row.get("p_holm"))
        rows.append(
            f'<tr><th scope="row">{model_name(*places[row["model"]])}</th>'
            f"<td>{region_name(row['region'])}</td>"
            f'<td class="figure">{number(row.get("mean_difference"), decimals, signed=True)}'
            f"<small>{interval(row.get('low'), row.get('high'), decimals, signed=True)}</small></td>"
            f'<td class="figure">{number(row.get("median_difference"), decimals, signed=True)}</td>'
            f'<td class="figure">{probability(row.get("p"))}</td>'
            f'<td class="figure">{f"<strong>{adjusted}</strong>" if mark else adjusted}</td>'
            f'<td class="figure">{number(row.get("effect_size"), 2, signed=True)}</td>'
            f'<td class="figure">{_count(row, "wins")} / {_count(row, "ties")} / {_count(row, "losses")}</td>'
            f'<td class="figure">{_count(row, "n")}</td></tr>'
        )
    if not rows:
        return ""
    headings = _headings(
        ("Model", "Region"),
        ("Mean difference", "Median", "p", "p (Holm)", "Effect size", "Better / tie / worse", "Cases"),
    )
    label = f"Paired differences of {metric['name']}"
    table = f"<table><thead><tr>{headings}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return (
        f'<p class="caption">{metric_title(metric)}: difference to the baseline in the same cases, with the 95 % '
        f"interval of its mean</p>{scroll_box(table, label)}"
    )


def cost_table(comparison: Mapping[str, Any]) -> str:
    """Return a table of the costs of training and prediction, one column per model.

    Args:
        comparison: Content of report.json.

    Returns:
        HTML. Times are left out if they are not comparable.
    """
    timed = times_compare([model.get("cost") or {} for model in comparison["models"]])
    columns = []
    for index, model in enumerate(comparison["models"]):
        cost = model.get("cost") or {}
        parameters = cost.get("parameters")
        patch = cost.get("patch_size")
        size = " \N{MULTIPLICATION SIGN} ".join(escape(edge) for edge in patch) if patch else NONE
        batch = f"<small>batch of {escape(cost['batch_size'])}</small>" if cost.get("batch_size") is not None else ""
        epochs = cost.get("epochs")
        note = f"<small>{escape(epochs)} epoch{'' if epochs == 1 else 's'}</small>" if is_number(epochs) else ""
        times = {
            "Epoch": duration(cost.get("epoch_seconds")),
            "Training": duration(cost.get("training_seconds")) + note,
            "Prediction per case": duration(cost.get("prediction_seconds_per_case")),
        }
        lines = {
            "Parameters": NONE if parameters is None else f"{significant_digits(parameters / 1e6)} M",
            "GFLOP per patch": significant_digits(cost.get("conv_gflops_per_patch")),
            "Patch (voxels)": size + batch,
            **(times if timed else {}),
            "Peak memory": _with_unit(cost.get("peak_memory_gib"), "GiB"),
        }
        for heading, key in (("Device", "device"), ("Precision", "precision"), ("Optimiser", "optimizer")):
            lines[heading] = escape(cost[key]) if cost.get(key) else NONE
        cells = [f'<td class="figure">{cell}</td>' for cell in lines.values()]
        columns.append((list(lines), (model_name(index, model), cells)))
    table = _grid("Model", columns[0][0], [column for _, column in columns], turned=True)
    note = (
        "<p class='note'>Times are left out: the models were trained on different devices, in different precision, or "
        "while the machine was busy with other work.</p>"
    )
    return scroll_box(table, "Costs") + ("" if timed else note)


def model_table(comparison: Mapping[str, Any]) -> str:
    """Return a table of the models: trainer, plans, configuration and folds, one row per model.

    Args:
        comparison: Content of report.json.

    Returns:
        HTML.
    """
    models = comparison["models"]
    letters = {model["key"]: badge(index) for index, model in enumerate(models)}
    rows = []
    for index, model in enumerate(models):
        if model.get("members"):
            members = " + ".join(letters.get(key, escape(key)) for key in model["members"])
            made = f'<td colspan="3">Ensemble of {members}: their probabilities averaged</td>'
        else:
            keys = ("trainer", "plans", "configuration")
            made = "".join(f"<td>{escape(model[key]) if model.get(key) else NONE}</td>" for key in keys)
        folds = ", ".join(escape(fold) for fold in model.get("folds") or ()) or NONE
        rows.append(f'<tr><th scope="row">{model_name(index, model)}</th>{made}<td class="figure">{folds}</td></tr>')
    headings = _headings(("Model", "Trainer", "Plans", "Configuration"), ("Folds",))
    return scroll_box(
        f"<table><thead><tr>{headings}</tr></thead><tbody>{''.join(rows)}</tbody></table>", "What was compared"
    )


def _grid(corner: str, headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], *, turned: bool) -> str:
    """Return a table of numbers.

    Args:
        corner: Heading of the first column.
        headings: Headings of the other columns, HTML.
        rows: Heading and cells of every row, HTML with the td elements.
        turned: Whether to transpose the table.
    """
    if turned:
        names, columns = zip(*rows, strict=True)
        corner, rows = "", list(zip(headings, zip(*columns, strict=True), strict=True))
        headings = names
    head = "".join(f'<th scope="col" class="figure">{heading}</th>' for heading in headings)
    body = "".join(f'<tr><th scope="row">{heading}</th>{"".join(cells)}</tr>' for heading, cells in rows)
    return f"<table><thead><tr><th scope='col'>{corner}</th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _headings(*groups: Sequence[str]) -> str:
    """Return column headings. The groups are, in order, text columns, number columns and text columns."""
    kinds = ("", ' class="figure"', "")
    return "".join(
        f'<th scope="col"{kind}>{text}</th>' for group, kind in zip(groups, kinds, strict=False) for text in group
    )


def _cell(summary: Mapping[str, Any], model: str, region: str, metric: str) -> Mapping[str, Any]:
    return ((summary.get(model) or {}).get(region) or {}).get(metric) or {}


def _count(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return f"{value:.0f}" if value is not None and is_number(value) else NONE


def _with_unit(value: float | None, unit: str) -> str:
    return f"{significant_digits(value)} {unit}" if is_number(value) else NONE
