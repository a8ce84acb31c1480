"""Commands, trainers, variables, files and links in README and docs, against the code.

`scripts/docs.sh` checks the links between the pages of docs. This module checks those in files of the root folder.
"""

import argparse
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2

import nnunet_conres
from nnunet_conres.cli import build_parser, main
from nnunet_conres.datasets.phantom import write_brats_phantoms
from nnunet_conres.families import TRAINERS

ROOT = Path(__file__).parent.parent


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs_site, notebook = _script("docs_site"), _script("notebook")
command_parsers = docs_site.command_parsers
ROOT_PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = [*ROOT_PAGES, *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = {parser.prog.partition(" ")[2]: parser for parser in command_parsers(build_parser())}
GENERATED = {f"docs/{page}" for page in (docs_site.COMMAND_LINE, *docs_site.FROM_ROOT)}


def shell_lines(text: str) -> Iterator[str]:
    """Yield the lines of shell code blocks, with continued lines joined."""
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language in ("bash", "sh"):
            yield from re.sub(r"\\\n\s*", " ", block).splitlines()
        elif language == "console":
            yield from (line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ "))


def commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of every `nnunet-conres`. Shell variables become 1, which is valid as a number and a name."""
    for line in shell_lines(text):
        words = shlex.split(re.sub(r"\$\{?\w+\}?", "1", line.replace("$DEVICE", "cpu")), comments=True)
        if words[:1] == ["nnunet-conres"]:
            end = next((place for place, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))
            yield [word for word in words[1:end] if word not in ("[FOLDER", "...]", "...")]


def parse(arguments: list[str]) -> None:
    parsed, others = build_parser().parse_known_args(arguments)
    # the workflow passes unknown arguments to Snakemake
    assert not others or arguments[0] == "workflow", f"nnunet-conres {shlex.join(arguments)}: unknown {others}"
    assert parsed.handler


DOCUMENTED = [
    pytest.param(found, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, found in enumerate(commands(page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("arguments", DOCUMENTED)
def test_documented_commands_are_understood(arguments: list[str]) -> None:
    parse(arguments)


def test_the_commands_are_found() -> None:
    named = {found.values[0][0] for found in DOCUMENTED}
    assert named >= {"brats-convert", "plan_and_preprocess", "densify", "compare", "workflow"}
    code = "```bash\nnnunet-conres memory -d 4 \\\n    -tr X | less  # note\nnnunet-conres -x\n```\n"
    text = code + "```json\nnnunet-conres\n```"
    assert list(commands(text)) == [["memory", "-d", "4", "-tr", "X"], ["-x"]]


# Cheap commands as they stand in README and docs, in an order in which one prepares the next.
RUN = (
    "brats-convert -i /data/MICCAI_BraTS_2018_Data_Training -d 501",
    "split -d 501",
    "split -d 501 --seed 2 --force",
    "sparsify -d 4 -o 604 --every 10 --slab 2",
    "residuals -i CASE_OR_FOLDER -o OUT",
    "overlay -i IMAGES --predictions PREDICTIONS -ref LABELS -djfile PREDICTIONS/dataset.json -o PICTURES",
    "summary PREDICTIONS/summary.json",
    "compare --predictions nnU-Net=PRED_A ConResNet=PRED_B --reference LABELS -djfile PRED_A/dataset.json "
    "-i IMAGES -o REPORT",
    "brats-export -i PREDICTIONS -o SUBMISSION --scheme 2018",
    "workflow --example brats",
    "info",
)


def test_cheap_commands_of_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    documented = [found.values[0] for found in DOCUMENTED]
    monkeypatch.chdir(tmp_path)
    for name in ("raw", "preprocessed", "results"):
        Path(name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    write_brats_phantoms(tmp_path / "cases", training_cases=5, held_out_cases=0, shape=(24, 24, 20))
    dataset = tmp_path / "raw" / "Dataset501_BraTS"
    replaced = {
        "/data/MICCAI_BraTS_2018_Data_Training": str(tmp_path / "cases" / "training"),
        "CASE_OR_FOLDER": str(dataset / "imagesTr"),
        "IMAGES": str(dataset / "imagesTr"),
        "LABELS": str(dataset / "labelsTr"),
    }
    for line in RUN:
        words = shlex.split(line)
        assert words in documented, f"{line} is not in the documentation"
        assert main([replaced.get(word, word) for word in words]) == 0, capsys.readouterr().err
        if line == RUN[0]:
            shutil.copytree(dataset, tmp_path / "raw" / "Dataset004_Other")
            for name in ("PREDICTIONS", "PRED_A", "PRED_B"):
                shutil.copytree(dataset / "labelsTr", tmp_path / name)
                shutil.copy(dataset / "dataset.json", tmp_path / name)
            plans = tmp_path / "PREDICTIONS" / "plans.json"
            plans.write_text(json.dumps({"image_reader_writer": "SimpleITKIO"}))
            compute_metrics_on_folder2(
                *(str(path) for path in (dataset / "labelsTr", tmp_path / "PREDICTIONS")),
                str(tmp_path / "PREDICTIONS" / "dataset.json"),
                str(plans),
                str(tmp_path / "PREDICTIONS" / "summary.json"),
                num_processes=1,
            )
    assert (tmp_path / "REPORT" / "report.html").is_file()
    assert len(list((tmp_path / "SUBMISSION").glob("*.nii.gz"))) == 5


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_an_example_that_is_understood(name: str) -> None:
    first = COMMANDS[name].format_help().splitlines()[0]
    found = re.fullmatch(r"example: nnunet-conres (.*)", first)
    assert found is not None, f"add an example of {name} to nnunet_conres.cli._EXAMPLES"
    assert found[1].startswith(name)
    if not found[1].endswith("--help"):
        parse(shlex.split(found[1]))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help(name: str) -> None:
    actions = [action for action in COMMANDS[name]._actions if not isinstance(action, argparse._SubParsersAction)]
    assert [action.dest for action in actions if not action.help] == []


@pytest.mark.parametrize("option", ["--patch_size", "--patch-size"])
def test_options_are_understood_in_both_spellings(option: str) -> None:
    arguments = build_parser().parse_args(["variants", "-d", "501", option, "80", "160", "160"])
    assert arguments.patch_size == [[80, 160, 160]]


def test_named_trainers_exist() -> None:
    import nnunetv2

    folder = Path(nnunetv2.__path__[0], "training", "nnUNetTrainer")
    sources = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    nnunets = set(re.findall(r"^class (nnUNetTrainer\w*)", sources, re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        known = nnunets | {*TRAINERS} | set(re.findall(r"^class (nnUNetTrainer\w*)", text, re.MULTILINE))
        if page.name == "results_longer.md":
            known.add("nnUNetTrainerConResNetStream")  # a former name
        # names of model folders also contain plans and configuration, which are cut off
        assert {name.partition("__")[0] for name in re.findall(r"nnUNetTrainer\w*", text)} <= known, page


def test_variables_are_in_their_table() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "nnunet_conres").rglob("*.py"))
    named = set(re.findall(r'"(nnUNet_[A-Za-z0-9_]+)"', sources))
    assert len(named) >= 8
    table = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    assert {name for name in named if f"`{name}`" not in table} == set()
    for page in PAGES:
        assert not re.search(r"NNUNET_CONRES_\w+", page.read_text(encoding="utf-8")) or page.name == "CHANGELOG.md", (
            page
        )


def test_named_scripts_and_tests_exist() -> None:
    for page in PAGES:
        for path in re.findall(r"\b((?:scripts|tests|nnunet_conres)/[\w/.-]+\.\w+)", page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page}: {path}"


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ROOT_PAGES, ids=lambda page: page.name)
def test_links_from_the_root(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        there = ROOT / target if target else page
        assert there.exists() or target in GENERATED, target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


def test_the_command_line_reference_has_every_command() -> None:
    page = docs_site.command_line_reference()
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == list(COMMANDS)
    assert "usage: nnunet-conres compare" in page


def test_the_navigation_names_no_page_twice() -> None:
    for _, pages in docs_site.SECTIONS.values():
        assert len(pages) == len({*pages})


def test_the_notebook_is_that_of_the_tutorial() -> None:
    """If this fails, run: python scripts/notebook.py"""
    nbformat = pytest.importorskip("nbformat")
    text = (ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8")
    assert text == notebook.notebook((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    nbformat.validate(nbformat.reads(text, as_version=4))


class TestRelease:
    def test_readme_and_changelog_are_short(self) -> None:
        assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
        latest = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1]
        assert latest.startswith(nnunet_conres.__version__)
        assert len(latest.splitlines()) <= 50

    def test_citation_has_the_version(self) -> None:
        text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
        assert f"\nversion: {nnunet_conres.__version__}\n" in text
