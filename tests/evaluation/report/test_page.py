import base64
import hashlib
import html.parser
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_conres.evaluation.report import report_page
from nnunet_conres.evaluation.report.cases import CaseVolumes, pack_case

Make = Callable[..., dict[str, Any]]
MakeVolumes = Callable[..., CaseVolumes]

# Elements without an end tag.
VOID = {"meta", "link", "input", "br", "hr", "img", "wbr"}


def write_report(
    comparison: dict[str, Any], volumes: Sequence[CaseVolumes], path: Path, *, slices_per_case: int = 64
) -> Path:
    page = report_page(comparison, [pack_case(of_case, slices_per_case) for of_case in volumes])
    path.write_text(page, encoding="utf-8")
    return path


class Page(html.parser.HTMLParser):
    """The elements, attributes and texts of a page; fails if elements are not nested properly."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.source)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            attributes, before = self.scripts[-1]
            self.scripts[-1] = attributes, before + data
        elif self._open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, make_comparison: Make, make_volumes: MakeVolumes) -> Page:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return Page(write_report(make_comparison(with_ensemble=True), [make_volumes()], path))


class TestSelfContained:
    def test_refers_to_nothing_outside(self, page: Page) -> None:
        assert not re.findall(r"(?i)\b(?:https?|wss?|ftp):", page.source)
        assert not re.findall(r"url\((?!#)", page.source)
        assert "@import" not in page.source
        for _, attributes in page.elements:
            for name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster"):
                assert (attributes.get(name) or "#").startswith(("#", "data:"))

    def test_allows_its_own_script_only(self, page: Page) -> None:
        (policy,) = [
            meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
        ]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        (script,) = [text for attributes, text in page.scripts if "type" not in attributes]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert rules["default-src"] == "'none'"
        assert rules["script-src"] == f"'sha256-{digest}'"
        assert rules["img-src"] == "data:"
        assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]

    def test_has_every_name_once(self, page: Page) -> None:
        names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(names) == len(set(names))
        for link in page.all("a"):
            assert link["href"][1:] in names
        for label in page.all("label"):
            assert label.get("for", "metric") in names

    def test_leaves_nothing_else_behind(self, page: Page) -> None:
        assert [path.name for path in page.path.parent.iterdir()] == ["report.html"]

    def test_charts_take_their_colours_from_the_page(self, page: Page) -> None:
        charts = re.findall(r'<svg class="chart".*?</svg>', page.source, flags=re.S)
        # 3 regions and their mean: 4 metrics, 3 of which are compared; and 7 charts of curves
        assert len(charts) == 4 * 4 + 3 * 4 + 7
        for chart in charts:
            assert not re.search(r"#[0-9a-f]{6}|rgb\(|font-family|<style|<use|clip-path", chart)
            assert 'aria-label="' in chart


class TestContent:
    def test_summary_has_means_with_intervals(self, tmp_path: Path, make_small_comparison: Make) -> None:
        comparison = make_small_comparison()
        comparison["summary"]["m1"]["tumor_core"]["dice"] |= {"mean": 0.87654, "low": 0.8512, "high": 0.8961}
        text = Page(write_report(comparison, [], tmp_path / "report.html")).text
        assert "0.877" in text
        assert "0.851 to 0.896" in text
        assert comparison["conclusions"][0] in text
        assert comparison["warnings"][0] in text

    @pytest.mark.parametrize(
        ("p", "difference", "better", "bold"),
        [(0.01, 0.02, "higher", True), (0.2, 0.02, "higher", False), (0.01, -0.02, "higher", False),
         (0.01, -0.02, "lower", True), (None, 0.02, "higher", False)],
    )  # fmt: skip
    def test_the_best_is_bold_only_if_significant(
        self, tmp_path: Path, make_small_comparison: Make, p: float | None, difference: float, better: str, bold: bool
    ) -> None:
        comparison = make_small_comparison()
        comparison["metrics"] = [comparison["metrics"][0] | {"better": better}]
        for row in comparison["comparisons"]:
            row |= {"p_holm": p, "mean_difference": difference, "median_difference": difference}
        means = {"m0": 0.5, "m1": 0.6 if better == "higher" else 0.4}
        for key, mean in means.items():
            for region in comparison["summary"][key].values():
                region["dice"]["mean"] = mean
        source = Page(write_report(comparison, [], tmp_path / "report.html")).source
        assert (f"<strong>{means['m1']:.3f}</strong>" in source) == bold
        assert "<strong>0.500</strong>" not in source

    def test_the_baseline_is_bold_where_all_others_are_worse(self, tmp_path: Path, make_small_comparison: Make) -> None:
        comparison = make_small_comparison(("first", "second", "third"))
        comparison["metrics"] = comparison["metrics"][:1]
        for row in comparison["comparisons"]:
            row["conclusion"] = "worse"
        for key, mean in (("m0", 0.7), ("m1", 0.6), ("m2", 0.5)):
            for region in comparison["summary"][key].values():
                region["dice"]["mean"] = mean
        assert "<strong>0.700</strong>" in Page(write_report(comparison, [], tmp_path / "report.html")).source
        comparison["comparisons"][0]["conclusion"] = "none"
        before = "<strong>0.700</strong>"
        source = Page(write_report(comparison, [], tmp_path / "report.html")).source
        # the first comparison is of whole_tumor, in the table by regions
        assert source.count(before) == 3 + 1

    def test_missing_numbers_are_dashes_with_an_explanation(self, tmp_path: Path, make_small_comparison: Make) -> None:
        comparison = make_small_comparison()
        comparison["models"][0]["cost"]["epoch_seconds"] = None
        comparison["summary"]["m0"]["whole_tumor"]["dice"] = {"n": 0, "mean": math.nan, "low": None, "high": None}
        page = Page(write_report(comparison, [], tmp_path / "report.html"))
        assert "nan" not in page.text.lower().replace("nannan", "")
        assert page.source.count('title="not available"') >= 2
        assert "A dash" in page.text

    def test_means_of_counts_have_a_decimal(self, tmp_path: Path, make_small_comparison: Make) -> None:
        comparison = make_small_comparison()
        comparison["metrics"] = [comparison["metrics"][0] | {"name": "Lesions found", "decimals": 0}]
        comparison["summary"]["m0"]["whole_tumor"]["dice"] |= {"mean": 1.7, "low": 1.2, "high": 2.2}
        page = Page(write_report(comparison, [], tmp_path / "report.html"))
        assert "1.7" in page.text
        assert "1.2 to 2.2" in page.text

    def test_no_folder_of_this_machine(self, tmp_path: Path, make_small_comparison: Make) -> None:
        comparison = make_small_comparison()
        comparison["dataset"]["reference"] = "/home/Jane Doe/nnUNet_raw/Dataset501_BraTS/labels of mine"
        comparison["warnings"] = [
            "A: /home/me/results/fold_0/checkpoint_final.pth holds no log.",
            "B: C:\\Users\\me\\fold_1 is empty, 1/2 of them.",
            "nnUNetv2_predict -i '/home/Jane Doe/imagesTs' -o /home/me/out and /home/me/other",
        ]
        page = Page(write_report(comparison, [], tmp_path / "report.html"))
        assert "\N{HORIZONTAL ELLIPSIS}/Dataset501_BraTS/labels of mine" in page.text
        assert "\N{HORIZONTAL ELLIPSIS}/fold_0/checkpoint_final.pth holds no log." in page.text
        assert "\N{HORIZONTAL ELLIPSIS}/me/fold_1 is empty, 1/2 of them." in page.text
        assert "-i '\N{HORIZONTAL ELLIPSIS}/Jane Doe/imagesTs' -o \N{HORIZONTAL ELLIPSIS}/me/out and" in page.text
        assert "/home" not in page.source
        assert "Users" not in page.source

    def test_times_are_left_out_where_they_do_not_compare(self, tmp_path: Path, make_small_comparison: Make) -> None:
        comparison = make_small_comparison()
        assert "62.0 s" in Page(write_report(comparison, [], tmp_path / "report.html")).text
        comparison["models"][1]["cost"]["precision"] = "float32"
        page = Page(write_report(comparison, [], tmp_path / "report.html"))
        assert "62.0 s" not in page.text
        assert "Times are left out" in page.text

    def test_costs_have_units(self, page: Page) -> None:
        for expected in (
            "31.2 M",
            "531",
            "128 \N{MULTIPLICATION SIGN} 128 \N{MULTIPLICATION SIGN} 128",
            "62.0 s",
            "51.7 min",
            "1.90 s",
            "bfloat16",
            "Muon, learning rate 0.03",
        ):
            assert expected in page.text

    def test_data_for_the_script_are_the_scores(self, page: Page, make_comparison: Make) -> None:
        comparison = make_comparison(with_ensemble=True)
        (data,) = [json.loads(text) for attributes, text in page.scripts if attributes.get("id") == "data"]
        for place, case in enumerate(comparison["cases"]):
            assert data["cases"][place]["id"] == case["id"]
            for key, regions in case["scores"].items():
                for region, values in regions.items():
                    for metric, value in values.items():
                        found = data["scores"][metric][region][key][place]
                        assert found == (None if value is None else pytest.approx(value, rel=1e-6))

    def test_names_are_text_whatever_they_are(
        self, tmp_path: Path, make_small_comparison: Make, make_volumes: MakeVolumes
    ) -> None:
        evil = "</script><script>alert('1')</script><img src=x onerror=\"alert(1)\"> $x$ ${title} & <!--"
        comparison = make_small_comparison(("nnUNetTrainer", evil))
        for entry in (comparison["cases"][0], comparison["disagreements"][0]):
            entry["id"] = evil
        comparison["disagreements"][0]["reason"] = comparison["disagreements"][1]["reason"] = evil
        comparison["warnings"] = comparison["conclusions"] = [evil]
        comparison["dataset"] |= {"name": evil, "reference": evil}
        comparison["metrics"][0] = comparison["metrics"][0] | {"name": evil, "unit": evil, "description": evil}
        for key in ("trainer", "plans", "configuration"):
            comparison["models"][1][key] = evil
        comparison["models"][1]["cost"]["device"] = evil
        page = Page(write_report(comparison, [make_volumes(evil, channels=(evil,) * 4)], tmp_path / "report.html"))
        assert not page.all("img")
        assert len(page.scripts) == 3
        for attributes, text in page.scripts:
            if attributes.get("type") == "application/json":
                json.loads(text)
        assert evil in page.text

    def test_what_is_not_there_has_no_section(self, tmp_path: Path, make_small_comparison: Make) -> None:
        comparison = make_small_comparison(("alone",), 1, with_curves=False, number_of_disagreements=0)
        comparison |= {"warnings": [], "conclusions": []}
        comparison["models"][0]["cost"] = None
        page = Page(write_report(comparison, [], tmp_path / "report.html"))
        names = {section.get("id") for section in page.all("section")}
        assert names == {"summary", "scores", "cases", "about"}

    def test_disagreements_without_pictures_are_listed(self, tmp_path: Path, make_small_comparison: Make) -> None:
        page = Page(write_report(make_small_comparison(), [], tmp_path / "report.html"))
        assert "case_2: Dice (mean) of" in page.text
        assert not page.all("canvas")

    def test_numpy_numbers_do(self, tmp_path: Path, make_small_comparison: Make) -> None:
        comparison = make_small_comparison()
        comparison["cases"][0]["fold"] = np.int64(0)
        comparison["cases"][0]["scores"]["m0"]["mean"]["dice"] = np.float64(0.5)
        comparison["cases"][1]["scores"]["m0"]["mean"]["dice"] = float("inf")
        page = Page(write_report(comparison, [], tmp_path / "report.html"))
        (data,) = [json.loads(text) for attributes, text in page.scripts if attributes.get("id") == "data"]
        assert data["scores"]["dice"]["mean"]["m0"][:2] == [0.5, None]


class TestErrors:
    def test_all_are_named_and_nothing_is_written(self, tmp_path: Path, make_small_comparison: Make) -> None:
        comparison = make_small_comparison() | {"format": 2, "models": "m0", "summary": []}
        del comparison["cases"]
        with pytest.raises(ValueError, match="'format' is 2") as error:
            write_report(comparison, [], tmp_path / "report.html")
        for key in ("'models' is str", "'summary' is list", "'cases' is NoneType"):
            assert key in str(error.value)
        assert not list(tmp_path.iterdir())

    def test_entries_are_looked_at(self, tmp_path: Path, make_small_comparison: Make) -> None:
        comparison = make_small_comparison()
        del comparison["metrics"][0]["decimals"]
        comparison["models"][1]["key"] = "m0"
        comparison["models"][1]["baseline"] = True
        comparison["regions"] = []
        with pytest.raises(ValueError, match="decimals") as error:
            write_report(comparison, [], tmp_path / "report.html")
        for message in ("'regions' is empty", "'m0' more than once", "2 models are the baseline"):
            assert message in str(error.value)

    def test_volumes_must_belong(self, tmp_path: Path, make_small_comparison: Make, make_volumes: MakeVolumes) -> None:
        volumes = [make_volumes("nowhere"), make_volumes("case_1", ("m0", "other")), make_volumes("case_2")]
        with pytest.raises(ValueError, match="nowhere has volumes") as error:
            write_report(make_small_comparison(), [*volumes, volumes[-1]], tmp_path / "report.html")
        assert "predictions of other" in str(error.value)
        with pytest.raises(ValueError, match="case_2 has volumes more than once"):
            write_report(make_small_comparison(), [volumes[-1], volumes[-1]], tmp_path / "report.html")
        assert not list(tmp_path.iterdir())

    def test_an_old_report_stays_if_a_new_one_fails(
        self, tmp_path: Path, make_small_comparison: Make, make_volumes: MakeVolumes
    ) -> None:
        path = tmp_path / "report.html"
        path.write_text("old")
        with pytest.raises(ValueError, match="slices_per_case"):
            write_report(make_small_comparison(), [make_volumes()], path, slices_per_case=0)
        assert path.read_text() == "old"
