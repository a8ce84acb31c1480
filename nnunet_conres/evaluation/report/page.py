"""The report's HTML page, built from a comparison and the pictures of some of its cases."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from string import Template
from typing import Any, Final

from nnunet_conres.evaluation.report import sections
from nnunet_conres.evaluation.report.calibration import calibration
from nnunet_conres.evaluation.report.sections import asset
from nnunet_conres.evaluation.report.text import escape, script_data

REPORT_FORMAT: Final = 1
"""Format version of report.json."""

# Required entries of report.json.
_DICTIONARIES: Final = ("dataset", "summary")
_LISTS: Final = ("regions", "metrics", "models", "comparisons", "conclusions", "warnings", "cases", "disagreements")


def report_page(comparison: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the HTML page of a comparison of models.

    Args:
        comparison: Content of report.json, format 1. Any number in it may be None; NaN and infinities count as None.
        pictures: Cases for the slice viewer, from `pack_case`, in display order.

    Returns:
        The page.

    Raises:
        ValueError: The comparison is incomplete or contradicts itself, or pictures do not belong to it.
    """
    if errors := list(_errors(comparison)):
        raise ValueError("\n".join(["The comparison cannot be shown:", *errors]))
    if errors := list(_picture_errors(comparison, pictures)):
        raise ValueError("\n".join(["The cases cannot be shown:", *errors]))
    return _page(comparison, pictures)


def _errors(comparison: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for every error that prevents showing a comparison."""
    if comparison.get("format") != REPORT_FORMAT:
        yield f"'format' is {comparison.get('format')!r}; expected {REPORT_FORMAT}."
    wrong = {key: "a dictionary" for key in _DICTIONARIES if not isinstance(comparison.get(key), Mapping)}
    wrong |= {key: "a list" for key in _LISTS if not isinstance(comparison.get(key), list | tuple)}
    yield from (f"{key!r} is {type(comparison.get(key)).__name__}; expected {kind}." for key, kind in wrong.items())
    if wrong:
        return
    for name in ("regions", "metrics", "models", "cases"):
        if not comparison[name]:
            yield f"{name!r} is empty; expected one or more."
    for name, needed in (
        ("metrics", {"key", "name", "decimals"}),
        ("models", {"key", "name"}),
        ("cases", {"id", "scores"}),
        ("comparisons", {"model", "region", "metric"}),
        ("disagreements", {"id"}),
    ):
        for place, entry in enumerate(comparison[name]):
            if missing := sorted(needed - set(entry)):
                yield f"{name}[{place}] has no {', '.join(missing)}."
    for name, key in (("metrics", "key"), ("models", "key"), ("cases", "id")):
        keys = [entry.get(key) for entry in comparison[name]]
        for twice in sorted({str(found) for found in keys if keys.count(found) > 1}):
            yield f"{name!r} has {twice!r} more than once; expected unique names."
    baselines = sum(bool(model.get("baseline")) for model in comparison["models"])
    if baselines > 1:
        yield f"{baselines} models are the baseline; expected one at most."


def _picture_errors(comparison: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a message for every error that prevents showing pictures."""
    cases = {case["id"] for case in comparison["cases"]}
    models = {model["key"] for model in comparison["models"]}
    ids = [picture["id"] for picture in pictures]
    for picture in pictures:
        if picture["id"] not in cases:
            yield f"{picture['id']} has volumes, but is not a case of the comparison."
        if unknown := sorted(set(picture["labels"]) - models - {"reference"}):
            yield f"{picture['id']} has predictions of {', '.join(unknown)}, not among the models of the comparison."
    yield from (f"{case} has volumes more than once." for case in dict.fromkeys(ids) if ids.count(case) > 1)


def _page(comparison: Mapping[str, Any], volumes: Sequence[Mapping[str, Any]]) -> str:
    style, script, page = (asset(name) for name in ("report.css", "report.js", "page.html"))
    parts = [
        ("summary", "Summary", "Summary", sections.summary(comparison)),
        ("costs", "Costs", "Costs", sections.costs(comparison)),
        ("scores", "Scores", "Scores by region", sections.distributions(comparison)),
        ("differences", "Differences", "Paired differences", sections.differences(comparison)),
        ("calibration", "Calibration", "Calibration of probabilities", calibration(comparison)),
        ("training", "Training", "Training", sections.training(comparison)),
        ("disagreements", "Disagreements", "Largest disagreements", sections.viewer(comparison, volumes)),
        ("cases", "Cases", "All cases", sections.cases(comparison)),
        ("about", "How to read", "How to read this report", sections.about(comparison)),
    ]
    shown = [part for part in parts if part[-1]]
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{content}</section>'
        for key, _, title, content in shown
    )
    links = "".join(f'<a href="#{key}">{link}</a>' for key, link, _, _ in shown)
    data = f'<script type="application/json" id="data">{script_data(sections.data(comparison))}</script>' + "".join(
        f'<script type="application/json" class="volumes">{script_data(case)}</script>' for case in volumes
    )
    # Only the page's own script may run, and nothing is fetched: pictures are embedded in the page.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(page).substitute(
        policy=policy,
        title=escape(sections.title(comparison)),
        style=style,
        heading=escape(sections.title(comparison)),
        what=sections.what(comparison),
        warnings=sections.warnings(comparison),
        links=links,
        metrics=sections.metric_choice(comparison),
        body=body,
        footer=sections.footer(comparison),
        data=data,
        script=script,
    )
