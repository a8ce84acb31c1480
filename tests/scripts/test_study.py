"""The study of defaults: its list of runs, what it hands to the workflow, and its tables."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

yaml = pytest.importorskip("yaml", reason="needs the extra [workflow]")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "study"))

from recipe import SeededTransform, StudyRecipe, study_trainer  # noqa: E402
from runs import read_study, runs_of, write_stage  # noqa: E402
from tables import save_results, write_tables  # noqa: E402

from nnunet_conres.trainers import nnUNetTrainerConResNet  # noqa: E402
from nnunet_conres.workflow.config import read_config  # noqa: E402
from nnunet_conres.workflow.records import trainer_state  # noqa: E402


@pytest.fixture
def study() -> dict[str, Any]:
    return read_study()


def test_every_stage_is_a_configuration_that_the_workflow_takes(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "nnUNet_raw" / "Dataset004_Hippocampus").mkdir(parents=True)
    for stage, entry in study["stages"].items():
        experiment = read_config(write_stage(study, stage, tmp_path, "cpu", 2))
        assert [model.trainer for model in experiment.models] == [run.trainer for run in runs_of(study, stage)]
        assert experiment.folds == tuple(entry["folds"])
        assert experiment.ensembles == ()


def test_a_trainer_is_written_again_only_where_it_changes(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workflow trains anew where the text of a trainer has changed."""
    write_stage(study, "screen", tmp_path, "cpu", 2)
    files = sorted((tmp_path / "trainers").iterdir())
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "trainers"))
    assert "source" in trainer_state(files[0].stem)
    before = [file.read_text() for file in files]
    study["networks"]["another"] = {}
    write_stage(study, "screen", tmp_path, "cpu", 2)
    assert [file.read_text() for file in files] == before


def test_trainers_differ_in_what_the_list_says() -> None:
    stock = study_trainer("nnUNetTrainerStudy_a", __name__, {}, 1000, 3)
    ours = study_trainer(
        "nnUNetTrainerStudy_b",
        __name__,
        {"trainer": "nnUNetTrainerConResNet", "trainer_attributes": {"study_lr": 0.5}},
        500,
        3,
    )
    assert stock.study_epochs == 10
    assert (ours.study_epochs, ours.study_lr, ours.study_seed) == (5, 0.5, 3)
    assert issubclass(ours, (StudyRecipe, nnUNetTrainerConResNet))
    assert not issubclass(stock, nnUNetTrainerConResNet)


def test_a_continued_training_sees_the_samples_that_would_have_come() -> None:
    def draw(**sample: Any) -> dict[str, Any]:
        return {"number": np.random.rand()}

    whole = SeededTransform(draw, seed=1, samples=0)
    numbers = [whole()["number"] for _ in range(6)]
    continued = SeededTransform(draw, seed=1, samples=4)
    assert [continued()["number"] for _ in range(2)] == numbers[4:]
    assert len(set(numbers)) == 6
    assert SeededTransform(draw, seed=2, samples=0)()["number"] != numbers[0]


def made_up_report(study: dict[str, Any], stage: str) -> dict[str, Any]:
    runs = runs_of(study, stage)
    keys = [f"m{number}" for number in range(len(runs))]
    value = {"mean": 0.5, "low": 0.4, "high": 0.6}
    difference = {
        "mean_difference": 0.012,
        "low": -0.001,
        "high": 0.02,
        "p": 0.01,
        "p_holm": 0.0004,
        "wins": 7,
        "losses": 3,
    }
    return {
        "regions": ["a", "b"],
        "models": [
            {"key": key, "name": run.name, "cost": {"parameters": 5}} for key, run in zip(keys, runs, strict=True)
        ],
        "summary": {key: {"mean": {"dice": value, "hd95": {name: 3 * v for name, v in value.items()}}} for key in keys},
        "comparisons": [
            {"model": key, "region": "mean", "metric": metric, **difference}
            for key in keys[1:]
            for metric in ("dice", "hd95")
        ],
        "dataset": {"folds": [0]},
        "cases": [{"id": "c1", "scores": {key: {"mean": {"dice": 0.5, "hd95": None}} for key in keys}}],
    }


def test_tables_stand_between_their_marks(study: dict[str, Any], tmp_path: Path) -> None:
    save_results(study, "screen", made_up_report(study, "screen"), tmp_path / "results" / "screen.json")
    (tmp_path / "results" / "steps.json").write_text(json.dumps({"stock": {"ms": 100, "ratio": 1.0}}))
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- study: screen -->\nold\n<!-- end -->\nbehind\n")
    write_tables(study, tmp_path / "results", document)
    text = document.read_text()
    assert text.startswith("before\n<!-- study: screen -->\n| network |")
    assert text.endswith("|\n<!-- end -->\nbehind\n")
    assert "old" not in text
    assert "| `stock` | 50.00 |  |  |  | 1.50 |  | 1.00 |" in text
    assert "+1.20 (-0.10 to +2.00) | < 0.001 | 7 of 1 | 1.50 | < 0.001 |" in text
    write_tables(study, tmp_path / "results", document)
    assert document.read_text() == text


def test_a_document_without_marks_is_refused(study: dict[str, Any], tmp_path: Path) -> None:
    save_results(study, "screen", made_up_report(study, "screen"), tmp_path / "results" / "screen.json")
    document = tmp_path / "results.md"
    document.write_text("nothing\n")
    with pytest.raises(RuntimeError, match="study: screen"):
        write_tables(study, tmp_path / "results", document)
