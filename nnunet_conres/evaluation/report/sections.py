"""The sections of the report, as HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any, Final

from nnunet_conres.evaluation.report.charts import (
    Line,
    Row,
    colour_of,
    curve_chart,
    difference_chart,
    distribution_chart,
    summary_note,
)
from nnunet_conres.evaluation.report.tables import (
    MEAN,
    badge,
    cost_table,
    difference_table,
    direction,
    metric_title,
    model_name,
    model_table,
    region_name,
    summary_table,
)
from nnunet_conres.evaluation.report.text import (
    breakable,
    escape,
    is_number,
    letter,
    plain_number,
    readable,
    short_path,
    shortened,
    without_folders,
)
from nnunet_conres.evaluation.rules import rules_text

# Titles of curves, by their log key without "train_" or "val_" and "_losses".
_CURVE_TITLES: Final = {
    "losses": "Loss",
    "segmentation": "Segmentation loss",
    "residual": "Residual loss",
    "ema_fg_dice": "Pseudo Dice, moving average",
    "mean_fg_dice": "Pseudo Dice",
}


# The two terms of a loss that includes a residual loss.
_PARTS: Final = frozenset({"segmentation", "residual"})


def asset(name: str) -> str:
    """Read a file of the page from this package's folder."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def title(comparison: Mapping[str, Any]) -> str:
    """Return the page's title, as plain text."""
    name = comparison["dataset"].get("name") or "comparison"
    singles = [model["name"] for model in comparison["models"] if not model.get("members")]
    if len(singles) == 2:
        return f"{name}: {singles[1]} against {singles[0]}"
    return f"{name}: {singles[0] if len(singles) == 1 else f'{len(singles)} models compared'}"


def what(comparison: Mapping[str, Any]) -> str:
    """Return the description of the compared cases and models."""
    dataset = comparison["dataset"]
    number = dataset.get("number_of_cases")
    number = number if is_number(number) else len(comparison["cases"])
    cases = f"{number} case{'' if number == 1 else 's'}"
    folds = ", ".join(escape(fold) for fold in dataset.get("folds") or ())
    if dataset.get("kind") == "cross-validation":
        said = f"Cross-validation: the {cases} that fold{'s' if ',' in folds else ''} {folds} held out"
        what = said if folds else f"Cross-validation: {cases}"
    else:
        what = f"Test set: {cases}"
    reference = (
        f", against the reference in <code>{escape(short_path(dataset['reference']))}</code>"
        if dataset.get("reference")
        else ""
    )
    options = comparison.get("options") or {}
    rules = f"<p>{escape(rules_text(options))}</p>" if options.get("rules") else ""
    return f'<p class="lead">{what}{reference}.</p>{rules}{model_table(comparison)}'


def warnings(comparison: Mapping[str, Any]) -> str:
    """Return the warnings; empty if there are none."""
    if not comparison["warnings"]:
        return ""
    items = "".join(f"<li>{escape(without_folders(warning))}</li>" for warning in comparison["warnings"])
    return (
        '<section class="warnings" aria-labelledby="warnings-title"><h2 id="warnings-title">Warnings</h2>'
        f"<ul>{items}</ul></section>"
    )


def _regions(comparison: Mapping[str, Any]) -> list[str]:
    """Return the regions to show, followed by their mean if there are several regions."""
    regions = [str(region) for region in comparison["regions"]]
    has_mean = any(MEAN in (scores or {}) for case in comparison["cases"] for scores in case["scores"].values())
    return [*regions, MEAN] if has_mean and len(regions) > 1 else regions


def _overall(comparison: Mapping[str, Any]) -> str:
    """Return the region key that stands for a case as a whole."""
    return _regions(comparison)[-1]


def metric_choice(comparison: Mapping[str, Any]) -> str:
    """Return the control that selects the metric to show."""
    options = "".join(
        f'<option value="{escape(metric["key"])}">{metric_title(metric)}</option>' for metric in comparison["metrics"]
    )
    return f'<label for="metric">Metric</label> <select id="metric">{options}</select>'


def _by_metric(comparison: Mapping[str, Any], content: Mapping[str, str]) -> str:
    """Return one part per metric. The page shows one at a time, or all of them without scripts."""
    return "".join(
        f'<div data-metric="{escape(metric["key"])}">{content[metric["key"]]}</div>'
        for metric in comparison["metrics"]
        if content.get(metric["key"])
    )


def summary(comparison: Mapping[str, Any]) -> str:
    """Return the mean scores per model and the conclusions."""
    regions = _regions(comparison)
    several = len(comparison["models"]) > 1
    bold = (
        "Bold: the best mean, if it differs significantly from the baseline. If the baseline is the best, it is bold "
        "if all others differ significantly from it. "
        '<span class="mark">\N{BLACK UP-POINTING TRIANGLE}\N{BLACK DOWN-POINTING TRIANGLE}</span> mark a model that is '
        "significantly better or worse than the baseline."
        if several
        else ""
    )
    tables = {
        metric["key"]: summary_table(
            comparison,
            [(region_name(region), region, metric) for region in regions],
            f"{metric_title(metric)}: mean over the cases, with its 95 % interval <small>{direction(metric)}</small>",
            f"{metric['name']} of every model and region",
        )
        for metric in comparison["metrics"]
    }
    overall = _overall(comparison)
    glance = summary_table(
        comparison,
        [(metric_title(metric), overall, metric) for metric in comparison["metrics"]],
        f"{_capital(region_name(overall))}: mean over the cases, with its 95 % interval",
        "All metrics at a glance",
        turned=True,
    )
    conclusions = "".join(f"<li>{escape(sentence)}</li>" for sentence in comparison["conclusions"])
    concluded = f'<h3>Conclusions</h3><ul class="conclusions">{conclusions}</ul>' if conclusions else ""
    note = f'<p class="note">{bold}</p>' if bold else ""
    return f"{_by_metric(comparison, tables)}{note}{concluded}<h3>All metrics at a glance</h3>{glance}"


def costs(comparison: Mapping[str, Any]) -> str:
    """Return each model's costs; empty if no costs are known."""
    if not any(model.get("cost") for model in comparison["models"]):
        return ""
    return (
        cost_table(comparison)
        + '<p class="note">GFLOP: all convolutions in one forward pass of a patch. For an ensemble: the sum over its '
        "members, where known. Times are comparable only for the same device and precision.</p>"
    )


def _values(comparison: Mapping[str, Any], model: str, region: str, metric: str) -> list[float | None]:
    """Return a model's score in every case; None if undefined."""
    values = []
    for case in comparison["cases"]:
        value = ((case["scores"].get(model) or {}).get(region) or {}).get(metric)
        values.append(value if is_number(value) else None)
    return values


def _charts(title: str, charts: Mapping[str, str]) -> str:
    """Return charts side by side, each below the name of its region."""
    figures = "".join(
        f"<figure><figcaption>{region_name(region)}</figcaption>{chart}</figure>" for region, chart in charts.items()
    )
    return f'<h3>{title}</h3><div class="charts">{figures}</div>'


def distributions(comparison: Mapping[str, Any]) -> str:
    """Return charts of every case's score, per metric, region and model."""
    parts = {}
    for metric in comparison["metrics"]:
        charts = {}
        for region in _regions(comparison):
            rows = []
            for index, model in enumerate(comparison["models"]):
                found = _values(comparison, model["key"], region, metric["key"])
                values = [value for value in found if value is not None]
                rows.append(Row(index, model["name"], values, summary_note(values, metric["decimals"])))
            charts[region] = distribution_chart(
                rows, axis=_axis(metric), title=f"{metric['name']} of every case, {readable(region)}, per model"
            )
        said = f" {escape(metric['description'])}" if metric.get("description") else ""
        parts[metric["key"]] = (
            _charts(f"{metric_title(metric)}, {direction(metric)}", charts)
            + f'<p class="note">{said} Each point is a case. Boxes (five cases or more) show the quartiles and the '
            "median. Whiskers reach to the farthest case within 1.5 times the length of the box. Each region has a "
            "separate scale.</p>"
        )
    return _by_metric(comparison, parts)


def _axis(metric: Mapping[str, Any]) -> str:
    return metric["name"] + (f" ({metric['unit']})" if metric.get("unit") else "")


def _baseline(comparison: Mapping[str, Any]) -> int:
    return next((index for index, model in enumerate(comparison["models"]) if model.get("baseline")), 0)


def differences(comparison: Mapping[str, Any]) -> str:
    """Return every case's difference to the baseline and the paired statistics; empty if there is only one model."""
    models = comparison["models"]
    if len(models) < 2:
        return ""
    base = _baseline(comparison)
    statistics = {(row["model"], row["region"], row["metric"]): row for row in comparison["comparisons"]}
    parts = {}
    for metric in comparison["metrics"]:
        if not metric.get("better"):
            parts[metric["key"]] = (
                f'<p class="note">{metric_title(metric)} describes the cases: neither high nor low values are better, '
                "so models are not compared.</p>"
            )
            continue
        zero = metric["better"] == "zero"
        charts = {}
        for region in _regions(comparison):
            of_baseline = _values(comparison, models[base]["key"], region, metric["key"])
            rows = []
            for index, model in enumerate(models):
                if index == base:
                    continue
                pairs = [
                    (abs(own) - abs(other) if zero else own - other, case["id"])
                    for own, other, case in zip(
                        _values(comparison, model["key"], region, metric["key"]),
                        of_baseline,
                        comparison["cases"],
                        strict=True,
                    )
                    if own is not None and other is not None
                ]
                row = statistics.get((model["key"], region, metric["key"]), {})
                rows.append(
                    Row(
                        index,
                        model["name"],
                        [difference for difference, _ in pairs],
                        _extremes(pairs, metric["decimals"]),
                        row.get("mean_difference"),
                        row.get("low"),
                        row.get("high"),
                    )
                )
            name = f"absolute {metric['name'][0].lower()}{metric['name'][1:]}" if zero else metric["name"]
            unit = f" ({metric['unit']})" if metric.get("unit") else ""
            charts[region] = difference_chart(
                rows,
                axis=f"difference of {name}{unit}",
                better="higher" if metric["better"] == "higher" else "lower",
                title=f"Difference of {name} to the baseline in every case, {readable(region)}, per model",
            )
        parts[metric["key"]] = (
            _charts(f"{metric_title(metric)}: every case's difference to the baseline", charts)
            + '<p class="note">Each point is a case: the value of the model minus the value of the baseline'
            + (" (absolute values)" if zero else "")
            + ". Vertical bar: median. Round marker below: mean, with its 95 % interval.</p>"
            + difference_table(comparison, metric)
        )
    return _by_metric(comparison, parts)


def _extremes(pairs: Sequence[tuple[float, str]], decimals: int) -> str:
    """Return a note that names the cases with the lowest and the highest difference."""
    if not pairs:
        return "no case with both values"
    low, high = min(pairs), max(pairs)
    ends = [(high, "highest")] if low == high else [(low, "lowest"), (high, "highest")]
    return ", ".join(
        f"{word} {plain_number(value, decimals, signed=True)} in {shortened(str(case), 15)}"
        for (value, case), word in ends
    )


def training(comparison: Mapping[str, Any]) -> str:
    """Return the logged training curves of all models on the same axes; empty if there are none."""
    panels: dict[str, list[Line]] = {}
    logged = []
    has_parts = False
    for index, curves in _curves(comparison):
        logged.append(index)
        has_parts = has_parts or not _PARTS.isdisjoint(_panel_of(key) for key in curves["series"])
        for name, dashed, values in _comparable(curves["series"]):
            epochs = curves.get("epochs") or list(range(len(values)))
            panels.setdefault(name, []).append(Line(index, epochs, values, dashed))
    if not has_parts:
        panels.pop("segmentation", None)
    if not panels:
        return ""
    order = list(_CURVE_TITLES)
    charts = []
    for name in sorted(panels, key=lambda name: order.index(name) if name in order else len(order)):
        title = _CURVE_TITLES.get(name) or _capital(readable(name))
        charts.append(f"<figure>{curve_chart(panels[name], axis=title, title=f'{title} over the epochs')}</figure>")
    keys = "".join(f"<li>{model_name(index, comparison['models'][index])}</li>" for index in dict.fromkeys(logged))
    missing = [
        escape(model["name"])
        for index, model in enumerate(comparison["models"])
        if index not in logged and not model.get("members")
    ]
    without = f" No training log of {', '.join(missing)}." if missing else ""
    return (
        f'<ul class="legend">{keys}<li><span class="line"></span> training loss, and Dice</li>'
        '<li><span class="line dashed"></span> validation loss</li></ul>'
        f'<div class="charts many">{"".join(charts)}</div>'
        '<p class="note">Several lines of one colour are the folds of a model. Losses are comparable only between '
        "models with the same loss. Without a residual loss, the segmentation loss is the total loss. Dice is the "
        "pseudo Dice in nnU-Net's training log: it is computed on validation patches, not on whole cases."
        f"{without}</p>"
    )


def _curves(comparison: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the log of every fold, with the model's position in the comparison."""
    for index, model in enumerate(comparison["models"]):
        for curves in (model.get("curves") or {}).values():
            if curves and curves.get("series"):
                yield index, curves


def _comparable(series: Mapping[str, Sequence[float | None]]) -> Iterator[tuple[str, bool, Sequence[float | None]]]:
    """Yield the curves of a log to show: panel, whether it is a validation curve, and values.

    The Dice is left out if its moving average is logged. A loss without parts is shown as segmentation loss too.
    """
    has_parts = not _PARTS.isdisjoint(_panel_of(key) for key in series)
    for key, values in series.items():
        if not any(is_number(value) for value in values or ()) or (key == "mean_fg_dice" and "ema_fg_dice" in series):
            continue
        dashed = key.startswith("val_")
        yield _panel_of(key), dashed, values
        if _panel_of(key) == "losses" and not has_parts:
            yield "segmentation", dashed, values


def _panel_of(key: str) -> str:
    """Return the panel of a log's curve; training and validation curves share a panel."""
    name = key.removeprefix("train_").removeprefix("val_")
    return name.removesuffix("_losses")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def viewer(comparison: Mapping[str, Any], volumes: Sequence[Mapping[str, Any]]) -> str:
    """Return the case viewer and a list of the disagreements without pictures; empty if there are neither."""
    reasons = {entry["id"]: entry.get("reason") or "" for entry in comparison["disagreements"]}
    embedded = {case["id"] for case in volumes}
    without = "".join(
        f"<li>{escape(case)}{f': {escape(reason)}' if reason else ''}</li>"
        for case, reason in reasons.items()
        if case not in embedded
    )
    listed = f"<p>Cases without pictures in this file:</p><ul>{without}</ul>" if without else ""
    if not volumes:
        return listed
    options = "".join(f'<option value="{place}">{escape(case["id"])}</option>' for place, case in enumerate(volumes))
    outlines = "".join(
        f'<label class="toggle outline"><input type="checkbox" data-outline="{index}"> '
        f'<svg class="dash" viewBox="0 0 34 10" aria-hidden="true"><path d="M1 5H33" data-dash="{index}" '
        f'style="stroke: var(--image-{colour_of(index)[6:-1]})"/></svg> '
        f"{badge(index)} <span>{breakable(model['name'])}</span></label>"
        for index, model in enumerate(comparison["models"])
    )
    residuals = "".join(
        f'<option value="{escape(model["key"])}">of {letter(index)}, {escape(model["name"])}</option>'
        for index, model in enumerate(comparison["models"])
    )
    return Template(asset("viewer.html")).substitute(
        options=options, outlines=outlines, residuals=residuals, listed=listed
    )


def cases(comparison: Mapping[str, Any]) -> str:
    """Return the empty table of all cases, which the page's script fills."""
    regions = _regions(comparison)
    options = "".join(
        f'<option value="{escape(region)}"{" selected" if region == regions[-1] else ""}>{region_name(region)}</option>'
        for region in regions
    )
    return (
        "<noscript><p>This table and the pictures need the page's script; all numbers are in cases.csv.</p></noscript>"
        f'<div class="controls scripted"><label for="case-region">Region</label> <select id="case-region">{options}'
        '</select> <label for="case-search">Find</label> <input id="case-search" type="search" placeholder="case" '
        'autocomplete="off"> <output id="case-count" for="case-search"></output></div>'
        '<div class="scroll tall" tabindex="0" role="region" aria-label="All cases"><table id="case-table">'
        "<caption></caption><thead></thead><tbody></tbody></table></div>"
        '<p class="note scripted">Click a heading to sort by its column, click it again to reverse the order. Cases '
        "without a value come last. Click a case to show its pictures.</p>"
    )


def about(comparison: Mapping[str, Any]) -> str:
    """Return the explanation of tables and charts."""
    metrics = "".join(
        f"<dt>{metric_title(metric)}</dt><dd>{escape(metric.get('description') or '')} "
        f"<span class='muted'>{_capital(direction(metric))}.</span></dd>"
        for metric in comparison["metrics"]
    )
    return (
        f"<dl>{metrics}</dl>"
        "<p>A dash (\N{EN DASH}) means that a value is not defined or was not recorded. For example, the distance "
        "between two surfaces is not defined if one of them is missing. Means and comparisons leave out such cases, "
        "so the numbers of cases can differ.</p>"
        "<p>Intervals are 95 % bootstrap intervals of the mean. Models are compared with the baseline case by case. p "
        "is the p value of the two-sided Wilcoxon signed-rank test; <q>p (Holm)</q> corrects it for the number of "
        "comparisons, and below 0.05 a difference counts as significant. The effect size is the matched-pairs "
        "rank-biserial correlation: 1 if the model is better in every case, \N{MINUS SIGN}1 if it is worse in every "
        "case.</p>"
    )


def footer(comparison: Mapping[str, Any]) -> str:
    """Return the date of the page and the versions of nnunet-conres and nnU-Net."""
    parts = [f"Created {escape(comparison['created'])}" if comparison.get("created") else "Created"]
    named = (("nnunet_conres", "nnunet-conres"), ("nnunetv2", "nnU-Net"))
    versions = [f"{name} {escape(comparison[key])}" for key, name in named if comparison.get(key)]
    return " with ".join(filter(None, [*parts, " and ".join(versions)]))


def data(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data for the page's script. Scores are lists over the cases, by metric, region and model."""
    models = comparison["models"]
    base = _baseline(comparison)
    return {
        "metrics": [
            {
                "key": metric["key"],
                "name": _axis(metric),
                "better": metric.get("better"),
                "decimals": metric["decimals"],
            }
            for metric in comparison["metrics"]
        ],
        "models": [
            {"key": model["key"], "name": model["name"], "letter": letter(index), "baseline": index == base}
            for index, model in enumerate(models)
        ],
        "regions": [
            {"key": region, "name": "mean of regions" if region == MEAN else readable(region)}
            for region in _regions(comparison)
        ],
        "cases": [{"id": str(case["id"]), "fold": case.get("fold")} for case in comparison["cases"]],
        "scores": {
            metric["key"]: {
                region: {
                    model["key"]: [
                        None if value is None else float(f"{value:.7g}")
                        for value in _values(comparison, model["key"], region, metric["key"])
                    ]
                    for model in models
                }
                for region in _regions(comparison)
            }
            for metric in comparison["metrics"]
        },
        "reasons": {str(entry["id"]): entry.get("reason") or "" for entry in comparison["disagreements"]},
    }
