"""The page of the report, from a comparison and the pictures of some of its cases."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any, Final

from nnunet_conres.evaluation.report import sections
from nnunet_conres.evaluation.report.calibration import calibration
from nnunet_conres.evaluation.report.sections import asset
from nnunet_conres.evaluation.report.text import escape, script_data

REPORT_FORMAT: Final = 1
"""Of report.json."""


def report_page(comparison: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]] = ()) -> str:
    """A comparison of models as one HTML page.

    Args:
        comparison: The content of report.json. NaN and infinities are taken for None.
        pictures: Cases to look at slice by slice, as `pack_case` makes them, in the order to show them in.

    Returns:
        The page.
    """
    style, script, page = (asset(name) for name in ("report.css", "report.js", "page.html"))
    parts = [
        ("summary", "Summary", "Summary", sections.summary(comparison)),
        ("costs", "Costs", "Costs", sections.costs(comparison)),
        ("scores", "Scores", "Scores by region", sections.distributions(comparison)),
        ("differences", "Differences", "Paired differences", sections.differences(comparison)),
        ("calibration", "Calibration", "Calibration of probabilities", calibration(comparison)),
        ("training", "Training", "Training", sections.training(comparison)),
        ("disagreements", "Disagreements", "Largest disagreements", sections.viewer(comparison, pictures)),
        ("cases", "Cases", "All cases", sections.cases(comparison)),
        ("about", "Reading", "How to read this", sections.about(comparison)),
    ]
    shown = [part for part in parts if part[-1]]
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{content}</section>'
        for key, _, title, content in shown
    )
    links = "".join(f'<a href="#{key}">{link}</a>' for key, link, _, _ in shown)
    data = f'<script type="application/json" id="data">{script_data(sections.data(comparison))}</script>' + "".join(
        f'<script type="application/json" class="volumes">{script_data(case)}</script>' for case in pictures
    )
    # No script but the page's own is run, and nothing at all is fetched: pictures are in the page.
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
