"""The study of defaults: a list of runs, what the workflow gets of it, and the tables of its results."""

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

yaml = pytest.importorskip("yaml", reason="needs the extra [workflow]")

from recipe import EqualTerms, SeededTransform, trainer  # noqa: E402
from study import DEFAULTS, main, table, write_workflow  # noqa: E402

from nnunet_conres.trainers import nnUNetTrainerMuon  # noqa: E402
from nnunet_conres.workflow.config import read_config  # noqa: E402
from nnunet_conres.workflow.records import trainer_state  # noqa: E402


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "nnUNet_raw" / "Dataset004_Hippocampus").mkdir(parents=True)
    return {
        "study": {"iterations": 400, "seed": 3},
        "data": {"id": 4},
        "folds": [1],
        "ensembles": "none",
        "device": "cpu",
        "environment": {"OMP_NUM_THREADS": 2},
        "models": {
            "stock": {"trainer": "nnUNetTrainer"},
            "Muon": {
                "trainer": "nnUNetTrainerMuon",
                "configuration": "3d_lowres",
                "study": {"iterations": 900, "settings": {"initial_lr": 0.5}},
            },
        },
    }


class TestWorkflow:
    def test_takes_the_configuration(self, content: dict[str, Any], tmp_path: Path) -> None:
        experiment = read_config(write_workflow(content, tmp_path / "work"))
        names = ["nnUNetTrainerStudy_stock_400it_seed3", "nnUNetTrainerStudy_Muon_900it_seed3"]
        assert [model.trainer for model in experiment.models] == names
        assert [model.configuration for model in experiment.models] == ["3d_fullres", "3d_lowres"]
        assert experiment.folds == (1,)
        assert experiment.environment["OMP_NUM_THREADS"] == "2"
        assert Path(experiment.environment["nnUNet_extTrainer"]) == tmp_path / "work" / "trainers"

    def test_takes_the_list_of_this_repository(
        self, content: dict[str, Any], tmp_path: Path, repository_root: Path
    ) -> None:
        listed = yaml.safe_load((repository_root / "scripts" / "study" / "runs.yaml").read_text())
        experiment = read_config(write_workflow(listed, tmp_path / "work"))
        assert [model.name for model in experiment.models] == list(listed["models"])

    def test_trains_again_only_what_changed(
        self, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def states() -> list[dict[str, Any]]:
            experiment = read_config(write_workflow(content, tmp_path / "work"))
            monkeypatch.setenv("nnUNet_extTrainer", experiment.environment["nnUNet_extTrainer"])
            return [trainer_state(model.trainer) for model in experiment.models]

        before = states()
        assert all("source" in state for state in before)
        assert states() == before
        content["models"]["Muon"]["study"]["settings"]["initial_lr"] = 0.25
        after = states()
        assert after[0] == before[0]
        assert after[1]["source"] != before[1]["source"]

    def test_the_modules_define_the_trainers(
        self, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_workflow(content, tmp_path / "work")
        monkeypatch.syspath_prepend(str(tmp_path / "work" / "trainers"))
        name = "nnUNetTrainerStudy_Muon_900it_seed3"
        defined = getattr(__import__(name), name)
        monkeypatch.delitem(sys.modules, name)
        assert issubclass(defined, (EqualTerms, nnUNetTrainerMuon))
        assert defined.study == DEFAULTS | {"iterations": 900, "seed": 3, "settings": {"initial_lr": 0.5}}

    def test_all_errors_are_reported_at_once(
        self, content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content["models"] |= {
            "a": {"trainer": "nnUNetTrainerMoun"},
            "b": {"study": {"iteration": 5}},
            "c": {"study": {"iterations": 150}},
            "d e": {},
        }
        file = tmp_path / "runs.yaml"
        file.write_text(yaml.safe_dump(content))
        with pytest.raises(SystemExit) as stop:
            main([str(file), "--work", str(tmp_path / "work")])
        for message in (
            "a: trainer nnUNetTrainerMoun; expected nnUNetTrainer or",
            "b: study has iteration; expected some of iterations,",
            "c: 150 iterations; expected a multiple of 100",
            "d e: expected a name of letters",
        ):
            assert message in str(stop.value)
        assert not (tmp_path / "work").exists()


class TestBatches:
    @pytest.mark.parametrize(("workers", "seeded"), [("1", True), ("4", False)])
    def test_are_the_same_with_one_worker_only(
        self, workers: str, seeded: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("nnUNet_n_proc_DA", workers)
        made: Any = object.__new__(trainer("nnUNetTrainer", DEFAULTS | {"seed": 3}))
        made.current_epoch, made.batch_size = 2, 5
        pipeline = made._seeded(lambda **sample: sample, 100)
        assert isinstance(pipeline, SeededTransform) == seeded
        if seeded:
            assert (pipeline.seed, pipeline.samples) == (3, 1000)

    def test_go_on_as_without_an_interruption(self) -> None:
        def draw(**sample: Any) -> dict[str, Any]:
            return {"number": np.random.rand()}

        whole = SeededTransform(draw, seed=1, samples=0)
        numbers = [whole()["number"] for _ in range(6)]
        continued = SeededTransform(draw, seed=1, samples=4)
        assert [continued()["number"] for _ in range(2)] == numbers[4:]
        assert len(set(numbers)) == 6
        assert SeededTransform(draw, seed=2, samples=0)()["number"] != numbers[0]


def test_table_of_a_report() -> None:
    def score(dice: float) -> dict[str, Any]:
        return {"mean": {"dice": {"mean": dice}, "hd95": {"mean": 1.5}}, "a": {"dice": {"mean": 0}}}

    compared = {"model": "m1", "mean_difference": 0.012, "low": -0.001, "high": 0.02, "p_holm": 0.0421}
    report = {
        "regions": ["a", "b"],
        "models": [{"key": f"m{n}", "name": name} for n, name in enumerate(("stock", "Muon", "untested"))],
        "summary": {"m0": score(0.5), "m1": score(0.512), "m2": score(0.512)},
        "comparisons": [
            compared | {"region": "mean", "metric": "hd95", "p_holm": 1.0},
            compared | {"region": "mean", "metric": "dice"},
            compared | {"region": "a", "metric": "dice", "p_holm": 1.0},
            compared | {"model": "m2", "region": "mean", "metric": "dice", "p_holm": None},
        ],
    }
    lines = table(json.loads(json.dumps(report))).splitlines()
    assert lines[2:] == [
        "| stock | 50.00 |  |  | 1.50 |",
        "| Muon | 51.20 | +1.20 (-0.10 to +2.00) | 0.0421 | 1.50 |",
        "| untested | 51.20 | +1.20 (-0.10 to +2.00) |  | 1.50 |",
    ]


def _points(row: dict[str, str]) -> str:
    if not row["dice_difference"]:
        return ""
    values = (float(row[f"dice_difference{end}"]) for end in ("", "_low", "_high"))
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * value for value in values))


def _p(row: dict[str, str]) -> str:
    text = row["dice_p_holm"]
    return "" if not text else "< 0.001" if float(text) < 0.001 else f"{float(text):.3f}"


CELLS: dict[str, Callable[[dict[str, str]], str]] = {
    "Dice, %": lambda row: f"{100 * float(row['dice']):.2f}",
    "points": _points,
    "p": _p,
    "better in": lambda row: f"{row['dice_wins']} of {row['cases']}" if row["dice_wins"] else "",
    "HD95, mm": lambda row: f"{float(row['hd95']):.2f}",
    "step": lambda row: f"{float(row['step_ms']) / float(row['baseline_step_ms']):.2f}",
}


def test_tables_of_the_document_are_those_of_the_saved_results(repository_root: Path) -> None:
    with (repository_root / "docs" / "results.csv").open(newline="") as file:
        saved = list(csv.DictReader(file))
    text = (repository_root / "docs" / "results.md").read_text()
    header: list[str] = []
    checked = 0
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []
        if not cells or cells[0].startswith("---"):
            continue
        found = re.fullmatch(r"`(\w+)/(\w+?)(?:@(\d+))?`", cells[-1])
        if found is None:
            header = cells
            continue
        (row,) = [
            row
            for row in saved
            if (row["table"], row["run"]) == (found[1], found[2]) and found[3] in (None, row["iterations"])
        ]
        for name, cell in zip(header, cells, strict=True):
            if name in CELLS:
                assert cell == CELLS[name](row), (line, name)
                checked += 1
    assert checked > 150
    for named in re.findall(r"`([a-z_]+/[a-z_]+)`", text):
        assert any(f"{row['table']}/{row['run']}" == named for row in saved), named
