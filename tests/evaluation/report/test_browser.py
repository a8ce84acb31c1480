"""The report in headless Chromium: it loads, and its controls work."""

import base64
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nnunet_conres.evaluation.metrics import METRICS
from nnunet_conres.evaluation.report import report_page
from nnunet_conres.evaluation.report.cases import CaseVolumes, pack_case

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")

pytestmark = pytest.mark.browser

Make = Callable[..., dict[str, Any]]
MakeVolumes = Callable[..., CaseVolumes]

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def write_report(
    comparison: dict[str, Any], volumes: Sequence[CaseVolumes], path: Path, *, slices_per_case: int = 64
) -> Path:
    page = report_page(comparison, [pack_case(of_case, slices_per_case) for of_case in volumes])
    path.write_text(page, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=found, headless=True, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, make_comparison: Make, make_volumes: MakeVolumes) -> Path:
    """Write a report of 30 cases, two with pictures and one with HTML as its name; two models and their ensemble."""
    comparison = make_comparison(number_of_cases=30, with_ensemble=True, number_of_metrics=2)
    evil = "</script><script>document.title = 'bad'</script>"
    comparison["cases"][4]["id"] = comparison["disagreements"][2]["id"] = evil
    keys = ("m0", "m1", "m0+m1")
    volumes = [make_volumes("case_2", keys), make_volumes(evil, keys, seed=1, channels=("T1", "T2"))]
    return write_report(comparison, volumes, tmp_path_factory.mktemp("report") / "report.html", slices_per_case=10)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that opens files; fail if a page logs anything, shows a dialog or requests another address."""
    contexts, complaints = [], []

    def opened(path: Path, width: int = 1280, height: int = 900, colours: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=colours)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        url = path.as_uri()
        page.on("request", lambda request: request.url in (url,) or request.url.startswith("data:")
                or complaints.append(request.url))  # fmt: skip
        page.goto(url)
        settle(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def settle(page: Any) -> None:
    """Wait until the canvas shows the latest selection."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)))")
    page.wait_for_function(
        """() => { const canvas = document.getElementById("canvas");
                   if (!canvas) return true;
                   const before = window.lastDrawn; window.lastDrawn = canvas.dataset.drawn;
                   return canvas.dataset.drawn !== undefined && before === canvas.dataset.drawn; }""",
        polling=60,
    )


def drawn(page: Any) -> np.ndarray:
    """Return the canvas as (rows, columns, RGB)."""
    settle(page)
    source = page.evaluate("document.getElementById('canvas').toDataURL('image/png')")
    image = Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1])))
    return np.asarray(image.convert("RGB")).astype(int)


def coloured(image: np.ndarray) -> np.ndarray:
    """Return where a picture is not grey."""
    return np.ptp(image, axis=2) > 60


def column(page: Any, place: int) -> list[str]:
    return page.locator(f"#case-table tbody tr > :nth-child({place + 1})").all_inner_texts()


def contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """Compute the contrast ratio of WCAG 2.2."""
    luminances = []
    for colour in (first, second):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour[:3])]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


class TestPage:
    def test_loads_without_a_complaint_or_a_request(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report)
        assert page.title() == "Dataset501_BraTS: nnUNetTrainerConResNet against nnUNetTrainer"
        assert page.locator("#case-table tbody tr").count() == 30

    def test_shows_one_metric_at_a_time(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report)
        shown = page.locator("#summary [data-metric]:visible")
        assert "Dice: mean over" in shown.inner_text()
        page.select_option("#metric", "hd95")
        assert "HD95 (mm): mean over" in shown.inner_text()
        assert page.locator("#scores [data-metric]:visible .chart").count() == 4
        assert page.locator("#case-table caption").inner_text() == "HD95 (mm), mean of regions"
        assert page.locator("#case-scores caption").inner_text() == "HD95 (mm)"

    def test_no_table_scrolls_sideways_on_a_laptop(
        self, open_page: Callable[..., Any], make_comparison: Make, tmp_path: Path
    ) -> None:
        """Five models and all metrics of the package."""
        names = ("nnUNetTrainer", "nnUNetTrainerMuon", "nnUNetTrainerConResNet", "nnUNetTrainerVNet")
        comparison = make_comparison(names, with_ensemble=True)
        for metric in METRICS.values():
            if metric.key not in {of["key"] for of in comparison["metrics"]}:
                comparison["metrics"].append(asdict(metric) | {"better": None})
        page = open_page(write_report(comparison, [], tmp_path / "report.html"), width=1280)
        wide = "(boxes) => boxes.filter((box) => box.scrollWidth > box.clientWidth).map((box) => box.ariaLabel)"
        assert page.locator(".scroll").evaluate_all(wide) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280

    def test_has_no_sideways_scrolling_on_a_phone(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report, width=375, height=700)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        box = page.locator("#summary .scroll:visible").first
        assert box.evaluate("(box) => box.scrollWidth > box.clientWidth")
        assert drawn(page).shape[1] <= 375

    @pytest.mark.parametrize("colours", ["light", "dark"])
    def test_colours_stand_out(self, open_page: Callable[..., Any], report: Path, colours: str) -> None:
        page = open_page(report, colours=colours)
        found = page.evaluate(
            """() => { const probe = document.body.appendChild(document.createElement("i"));
                       const rgb = (name) => { probe.style.color = `var(${name})`;
                         return getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number); };
                       const names = ["--page", "--surface", "--ink", "--muted", "--link", "--edge", "--focus"];
                       for (let model = 0; model < 7; model += 1) names.push(`--model-${model}`);
                       return Object.fromEntries(names.map((name) => [name, rgb(name)])); }"""
        )
        assert (sum(found["--surface"][:3]) > 600) == (colours == "light")
        for background in ("--page", "--surface"):
            for name in ("--ink", "--muted", "--link"):
                assert contrast(found[name], found[background]) >= 4.5
        for name in ("--edge", "--focus", *(f"--model-{model}" for model in range(7))):
            assert contrast(found[name], found["--surface"]) >= 3
        # the colour that the charts' texts really have
        ink = page.locator("#scores [data-metric]:visible svg.chart text").first.evaluate(
            "(text) => getComputedStyle(text).fill.match(/[\\d.]+/g).map(Number)"
        )
        assert contrast(ink, found["--surface"]) >= 4.5

    def test_is_printed_in_light_colours(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report, colours="dark")
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--surface')") == "#ffffff"
        assert page.locator(".bar").is_hidden()

    def test_begins_with_a_link_past_the_navigation(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report)
        page.keyboard.press("Tab")
        skip = page.locator("a:focus")
        assert skip.inner_text() == "Skip to the results"
        assert skip.bounding_box()["x"] >= 0
        assert skip.evaluate("(link) => getComputedStyle(link).outlineStyle") != "none"
        page.keyboard.press("Enter")
        page.wait_for_url("**#summary")

    def test_shows_everything_without_its_script(self, browser: Any, report: Path) -> None:
        context = browser.new_context(java_script_enabled=False)
        page = context.new_page()
        page.goto(report.as_uri())
        assert page.locator("#summary [data-metric]:visible").count() == 2
        assert page.locator("#viewer").is_hidden()
        assert page.locator("#cases noscript").is_visible()
        context.close()


class TestSmallReports:
    @pytest.mark.parametrize("with_pictures", [False, True])
    def test_one_model_and_one_case(
        self,
        open_page: Callable[..., Any],
        make_small_comparison: Make,
        make_volumes: MakeVolumes,
        tmp_path: Path,
        with_pictures: bool,
    ) -> None:
        comparison = make_small_comparison(("alone",), 1, number_of_disagreements=0)
        volumes = [make_volumes("case_1", ("m0",))] if with_pictures else []
        page = open_page(write_report(comparison, volumes, tmp_path / "report.html"))
        assert column(page, 0) == ["case_1"]
        assert page.locator("#case-table thead th").count() == 3
        if with_pictures:
            assert drawn(page).any()
            assert page.locator("#next-case").is_disabled()


class TestViewer:
    def test_slider_moves_through_the_slices(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report)
        before = drawn(page)
        slider = page.locator("#slice")
        text = page.locator("#slice-text").inner_text()
        slider.fill("1")
        assert (drawn(page) != before).any()
        assert page.locator("#slice-text").inner_text() != text
        assert slider.get_attribute("max") == "9"

    def test_arrow_keys_move_it(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report)
        slider = page.locator("#slice")
        slider.fill("4")
        first = drawn(page)
        slider.focus()
        page.keyboard.press("ArrowRight")
        assert slider.input_value() == "5"
        second = drawn(page)
        assert (first != second).any()
        page.keyboard.press("ArrowLeft")
        np.testing.assert_array_equal(drawn(page), first)
        assert slider.get_attribute("aria-valuetext").startswith("slice ")

    def test_channels_differ(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report)
        before = drawn(page)
        page.select_option("#channel", "FLAIR")
        assert (drawn(page) != before).any()

    def test_outlines_are_where_the_labels_are(
        self, open_page: Callable[..., Any], make_small_comparison: Make, tmp_path: Path
    ) -> None:
        images = np.full((1, 5, 40, 30), 100.0)
        images[:, :, 0, 0] = 0
        # each model in a separate corner, and no reference
        labels = {"m0": np.zeros((5, 40, 30), int), "m1": np.zeros((5, 40, 30), int)}
        labels["m0"][1:4, 5:15, 4:10] = 1
        labels["m1"][1:4, 22:35, 12:28] = 1
        case = CaseVolumes("case_1", images, ("T1",), None, labels, {"lesion": (1,)}, (1.0, 1.0, 2.0))
        page = open_page(write_report(make_small_comparison(), [case], tmp_path / "report.html"))
        assert page.locator("#reference-toggle").is_hidden()
        page.locator("[data-outline='1']").uncheck()
        for model, rows, columns in ((0, (5, 15), (4, 10)), (1, (22, 35), (12, 28))):
            image = drawn(page)
            # voxels are twice as wide as high
            scale = image.shape[0] / 40, image.shape[1] / 30
            assert scale[1] == pytest.approx(2 * scale[0], rel=0.01)
            y, x = np.nonzero(coloured(image))
            np.testing.assert_allclose([y.min(), y.max()], np.multiply(rows, scale[0]), atol=3)
            np.testing.assert_allclose([x.min(), x.max()], np.multiply(columns, scale[1]), atol=3)
            inside = coloured(image)[y.min() + 6 : y.max() - 6, x.min() + 6 : x.max() - 6]
            assert not inside.any()
            page.locator(f"[data-outline='{model}']").uncheck()
            assert not coloured(drawn(page)).any()
            page.locator("[data-outline='1']").check()

    def test_residual_map_covers_what_differs_from_the_slice_before(
        self, open_page: Callable[..., Any], make_small_comparison: Make, tmp_path: Path
    ) -> None:
        images = np.full((1, 4, 40, 40), 100.0)
        images[:, :, 0, 0] = 0
        labels = np.zeros((4, 40, 40), int)
        labels[1, 10:30, 10:30] = 1
        labels[2, 10:30, 18:38] = 1
        case = CaseVolumes("case_1", images, ("T1",), labels, {"m0": labels}, {"lesion": (1,)})
        page = open_page(write_report(make_small_comparison(), [case], tmp_path / "report.html"))
        for box in page.locator("[data-outline]:visible").all():
            box.uncheck()
        page.locator("#slice").fill("2")
        assert not coloured(drawn(page)).any()
        page.select_option("#residual", "m0")
        image = drawn(page)
        centres = np.rint((np.arange(40) + 0.5) * image.shape[0] / 40).astype(int)
        voxels = coloured(image)[np.ix_(centres, centres)]
        np.testing.assert_array_equal(voxels, (labels[2] == 1) != (labels[1] == 1))
        page.locator("#slice").fill("0")
        assert not coloured(drawn(page)).any()

    def test_regions_can_be_chosen(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report)
        whole = coloured(drawn(page)).sum()
        page.select_option("#outlined", label="enhancing tumor")
        enhancing = coloured(drawn(page)).sum()
        page.select_option("#outlined", label="all of them")
        everything = coloured(drawn(page)).sum()
        assert 0 < enhancing < whole <= everything

    def test_cases_follow_each_other(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report)
        before = drawn(page)
        assert page.locator("#previous-case").is_disabled()
        page.locator("#next-case").click()
        assert (drawn(page) != before).any()
        assert page.locator("#channel option").all_inner_texts() == ["T1", "T2"]
        assert page.locator("#next-case").is_disabled()
        assert "</script>" in page.locator("#shown-case option:checked").inner_text()
        assert page.locator("#reason").inner_text().startswith("Dice (mean) of")


class TestCaseTable:
    def test_sorts_numbers_as_numbers_with_missing_ones_last(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report)
        page.select_option("#metric", "hd95")
        page.select_option("#case-region", "enhancing_tumor")
        for direction in ("ascending", "descending"):
            page.locator("#case-table [data-column='2']").click()
            heading = page.locator("#case-table thead th").nth(2)
            assert heading.get_attribute("aria-sort") == direction
            assert page.locator("#case-table [data-column='2']").evaluate("(b) => b === document.activeElement")
            *values, last = column(page, 2)
            assert last == "–"  # noqa: RUF001
            numbers = [float(value) for value in values]
            assert numbers == sorted(numbers, reverse=direction == "descending")
            assert max(numbers) >= 10 > min(numbers)
        others = page.locator("#case-table thead th[aria-sort='none']").count()
        assert others == page.locator("#case-table thead th").count() - 1

    def test_sorts_names_by_their_numbers(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report)
        button = page.locator("#case-table [data-column='0']")
        button.focus()
        page.keyboard.press("Enter")
        names = [name for name in column(page, 0) if name.startswith("case_")]
        assert names == [f"case_{number}" for number in range(1, 31) if number != 5]

    def test_differences_are_those_to_the_baseline(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report)
        assert page.locator("#case-table thead th").nth(5).inner_text() == "B \N{MINUS SIGN} A"
        numbers = [[float(text.replace("\N{MINUS SIGN}", "-")) for text in column(page, place)] for place in (2, 3, 5)]
        np.testing.assert_allclose(np.subtract(numbers[1], numbers[0]), numbers[2], atol=0.0011)

    def test_finds_cases(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report)
        page.locator("#case-search").fill("CASE_3")
        assert column(page, 0) == ["case_3", "case_30"]
        assert page.locator("#case-count").inner_text() == "2 of 30 cases"

    def test_jumps_to_the_pictures_of_a_case(self, open_page: Callable[..., Any], report: Path) -> None:
        page = open_page(report)
        before = drawn(page)
        buttons = page.locator("#case-table tbody button")
        assert buttons.count() == 2
        buttons.nth(1).click()
        assert (drawn(page) != before).any()
        assert "</script>" in page.locator("#shown-case option:checked").inner_text()
        assert page.locator("#slice").evaluate("(slider) => slider === document.activeElement")
        page.wait_for_function(
            "() => Math.abs(document.getElementById('disagreements').getBoundingClientRect().top) < 200"
        )
