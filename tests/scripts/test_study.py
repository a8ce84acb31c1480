"""The study of defaults: its list of runs, what it hands to the workflow, and its tables."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

yaml = pytest.importorskip("yaml", reason="needs the extra [workflow]")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "study"))

from branches import BULB, VESSEL, make_branches  # noqa: E402
from data import HERE, copy_cases, folds_of, prepare_raw  # noqa: E402
from recipe import SeededTransform, StudyRecipe, study_trainer  # noqa: E402
from runs import dataset_of, read_study, runs_of, setting_of, write_stage  # noqa: E402
from scipy import ndimage  # noqa: E402
from scipy.stats import wilcoxon  # noqa: E402
from tables import contrast, draw_curves, find_run, save_results, write_tables  # noqa: E402

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
    for entry in study["datasets"].values():
        (tmp_path / "nnUNet_raw" / f"Dataset{entry['id']:03d}_{entry['name']}").mkdir(parents=True)
    for stage, entry in study["stages"].items():
        experiment = read_config(write_stage(study, stage, tmp_path, 2))
        assert [model.trainer for model in experiment.models] == [run.trainer for run in runs_of(study, stage)]
        assert experiment.folds == tuple(entry["folds"])
        assert experiment.dataset.endswith(study["datasets"][dataset_of(study, stage)]["name"])
        assert experiment.ensembles == ()


def test_a_stage_may_have_device_batch_and_epochs_of_its_own(study: dict[str, Any], tmp_path: Path) -> None:
    study["stages"]["here"] = {"folds": [0], "iterations": 200, "runs": ["stock", "plain"]}
    there = {"device": "cuda", "batch_size": 5, "epoch": 50}
    study["stages"]["there"] = study["stages"]["here"] | there
    here, elsewhere = (yaml.safe_load(write_stage(study, s, tmp_path, 1).read_text()) for s in ("here", "there"))
    assert (here["device"], elsewhere["device"]) == ("cpu", "cuda")
    assert here["environment"]["nnUNet_n_proc_DA"] == 1
    assert "nnUNet_n_proc_DA" not in elsewhere["environment"]
    study["stages"]["settled"] = study["stages"]["there"] | {"workers": 1}
    settled = yaml.safe_load(write_stage(study, "settled", tmp_path, 1).read_text())
    assert settled["environment"]["nnUNet_n_proc_DA"] == 1
    assert list(here["plans"]) == ["study_stock", "study_plain"]
    assert list(elsewhere["plans"]) == ["study_stock_batch5", "study_plain_batch5"]
    run = runs_of(study, "there")[0]
    assert run.trainer == "nnUNetTrainerStudy_stock_200it_seed0_epoch50"
    assert "200, 0, 50)" in (tmp_path / "trainers" / f"{run.trainer}.py").read_text()
    assert setting_of(study, "there").name == "hippocampus, cuda, batch 5"
    assert setting_of(study, "here").name == "hippocampus, cpu, batch 2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": ["stock"]}, "wrong has nothing to compare"),
        ({"worker": 1}, "wrong: worker; expected"),
        ({"workers": 0}, "wrong: 0 workers"),
    ],
)
def test_stages_that_are_wrong(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("runs.HERE", tmp_path)
    study["stages"]["wrong"] = {"folds": [0], "iterations": 200, "runs": ["stock", "plain"]} | changes
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(ValueError, match=message):
        read_study()


def test_a_form_needs_a_trainer(study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.HERE", tmp_path)
    study["networks"]["shapeless"] = {"form": "Signed"}
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(ValueError, match="shapeless has a form"):
        read_study()


def test_a_run_with_a_form_is_trained_anew_where_the_forms_change(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("recipe.py", "forms.py"):
        shutil.copy(HERE / name, tmp_path / name)
    monkeypatch.setattr("runs.HERE", tmp_path)

    def written() -> dict[str, str]:
        write_stage(study, "finest", tmp_path, 1)
        return {file.stem: file.read_text() for file in (tmp_path / "trainers").glob("*.py")}

    before = written()
    (tmp_path / "forms.py").write_text("# other forms\n")
    changed = [name for name, text in written().items() if text != before[name]]
    assert changed == ["nnUNetTrainerStudy_stream_finest_400it_seed0"]


@pytest.mark.parametrize(("workers", "seeded"), [("1", True), ("4", False)])
def test_batches_are_settled_with_one_worker_only(workers: str, seeded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", workers)
    trainer: Any = object.__new__(study_trainer("nnUNetTrainerStudy_a", __name__, {}, 1000, 3))
    trainer.current_epoch, trainer.batch_size = 2, 5
    pipeline = trainer._seeded(lambda **sample: sample, 100)
    assert isinstance(pipeline, SeededTransform) == seeded
    if seeded:
        assert (pipeline.seed, pipeline.samples) == (3, 1000)


def test_a_trainer_is_written_again_only_where_it_changes(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workflow trains anew where the text of a trainer has changed."""
    write_stage(study, "screen", tmp_path, 2)
    files = sorted((tmp_path / "trainers").iterdir())
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "trainers"))
    assert "source" in trainer_state(files[0].stem)
    before = [file.read_text() for file in files]
    study["networks"]["another"] = {}
    write_stage(study, "screen", tmp_path, 2)
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
    longer_epochs = study_trainer("nnUNetTrainerStudy_c", __name__, {}, 1000, 3, 250)
    assert (stock.study_epochs, stock.study_iterations) == (10, 100)
    assert (longer_epochs.study_epochs, longer_epochs.study_iterations) == (4, 250)
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
    (tmp_path / "results" / "steps.json").write_text(
        json.dumps(
            {
                "hippocampus, cpu, batch 2": {
                    "stock": {"ms": 485.3, "baseline_ms": 485.3},
                    "stock_lr3": {"ms": 555.4, "baseline_ms": 485.3},
                }
            }
        )
    )
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- study: screen -->\nold\n<!-- end -->\nbehind\n")
    write_tables(study, tmp_path / "results", document)
    text = document.read_text()
    assert text.startswith("before\n<!-- study: screen -->\n| network |")
    assert text.endswith("|\n\n(`study.py run screen`)\n<!-- end -->\nbehind\n")
    assert "old" not in text
    assert "| `stock` | 50.00 |  |  |  | 1.50 |  | 1.00 |" in text
    assert re.search(r"\| `stock_lr3` \|.*\| 1.14 \|\n", text)  # rounded once, not to 1.145 and then to 1.15
    assert "+1.20 (-0.10 to +2.00) | < 0.001 | 7 of 1 | 1.50 | < 0.001 |" in text
    write_tables(study, tmp_path / "results", document)
    assert document.read_text() == text


def test_a_document_without_marks_is_refused(study: dict[str, Any], tmp_path: Path) -> None:
    save_results(study, "screen", made_up_report(study, "screen"), tmp_path / "results" / "screen.json")
    document = tmp_path / "results.md"
    document.write_text("nothing\n")
    with pytest.raises(RuntimeError, match="study: screen"):
        write_tables(study, tmp_path / "results", document)


def test_contrasts_are_of_runs_that_there_are(study: dict[str, Any]) -> None:
    stages = {
        stage: {
            "rows": [
                {"network": run.network, "iterations": run.iterations, "seed": run.seed}
                for run in runs_of(study, stage)
            ]
        }
        for stage in study["stages"]
    }
    compared = [*study["contrasts"].values(), *(pair for pairs in study["pairs"].values() for pair in pairs)]
    for runs in compared:
        for run in runs:
            assert find_run(run, stages)["network"] == re.split("[/@#]", run)[1]


def test_a_contrast_takes_the_common_cases_of_two_stages() -> None:
    rng = np.random.default_rng(0)
    scores = {name: rng.uniform(0.7, 0.9, 12) for name in ("a", "b")}
    stages = {
        name: {
            "rows": [
                {
                    "network": "net",
                    "iterations": 100,
                    "seed": 0,
                    "cases": {f"c{n}": [dice, None] for n, dice in enumerate(values)},
                }
            ]
        }
        for name, values in scores.items()
    }
    del stages["a"]["rows"][0]["cases"]["c3"]
    content = contrast(["a/net", "b/net"], stages)
    expected = np.delete(scores["b"] - scores["a"], 3)
    difference = content["rows"][1]["dice_difference"]
    assert content["cases"] == 11
    assert difference["mean_difference"] == pytest.approx(expected.mean())
    assert difference["wins"] == (expected > 0).sum()
    with pytest.raises(ValueError, match="0 runs a/net@200"):
        contrast(["a/net@200", "b/net"], stages)
    with pytest.raises(ValueError, match="no run; expected"):
        contrast(["a/net", "b"], stages)


def test_pairs_are_corrected_over_their_table(study: dict[str, Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    first = rng.uniform(0.7, 0.9, (2, 12))
    second = first + np.stack((np.full(12, 0.01), rng.normal(0, 0.01, 12))) + rng.normal(0, 1e-4, (2, 12))
    study["stages"] = {}
    results = tmp_path / "results"
    results.mkdir()
    for number, stage in enumerate(("one", "two")):
        study["stages"][stage] = {"folds": [0], "iterations": 100, "runs": ["stock", "plain"]}
        rows = [
            {"network": network, "iterations": 100, "seed": 0, "dice": {"mean": 0.5}, "hd95": {"mean": 1.0}}
            | {"cases": {f"c{case}": [float(value), 1.0] for case, value in enumerate(values[number])}}
            for network, values in (("stock", first), ("plain", second))
        ]
        setting = {"dataset": "hippocampus", "batch_size": 2, "device": "cpu", "epoch": 100}
        (results / f"{stage}.json").write_text(
            json.dumps({"folds": [0], "cases": 12, "setting": setting, "rows": rows})
        )
    study["contrasts"], study["pairs"] = {}, {"both": [["one/stock", "one/plain"], ["two/stock", "two/plain"]]}
    (results / "steps.json").write_text(
        json.dumps(
            {
                "hippocampus, cpu, batch 2": {
                    "stock": {"ms": 100, "baseline_ms": 100},
                    "plain": {"ms": 450, "baseline_ms": 300},  # measured on a slower machine
                }
            }
        )
    )
    document = tmp_path / "results.md"
    document.write_text("".join(f"<!-- study: {name} -->\n<!-- end -->\n" for name in ("one", "two", "both")))
    write_tables(study, results, document)
    lines = [line.split(" | ") for line in document.read_text().splitlines() if line.startswith("| hippocampus")]
    p = [wilcoxon(second[number] - first[number]).pvalue for number in range(2)]
    assert p[0] < p[1]
    assert [line[5] for line in lines] == ["< 0.001", f"{p[1]:.3f}"]
    assert lines[0][4].startswith("+1.00 (")
    assert lines[0][-1] == "1.50 |"


def test_the_tables_of_the_document_are_those_of_the_saved_results(study: dict[str, Any], tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    shutil.copyfile(HERE.parents[1] / "docs" / "results.md", document)
    before = document.read_text()
    write_tables(study, HERE / "results", document)
    assert document.read_text() == before


@pytest.mark.parametrize(
    "change",
    [
        {"runs": ["stock", "plain"]},
        {"batch_size": 4},
        {"device": "cuda"},
        {"epoch": 50},
        {"dataset": "thick"},
        {"folds": [3]},
    ],
)
def test_results_of_other_runs_are_refused(study: dict[str, Any], tmp_path: Path, change: dict[str, Any]) -> None:
    save_results(study, "screen", made_up_report(study, "screen"), tmp_path / "results" / "screen.json")
    study["stages"]["screen"].update(change)
    (tmp_path / "results.md").write_text("<!-- study: screen -->\n<!-- end -->\n")
    with pytest.raises(RuntimeError, match="run the stage screen"):
        write_tables(study, tmp_path / "results", tmp_path / "results.md")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"setting": {}, "folds": [], "cases": 1, "rows": [{}]}'])
def test_damaged_results_are_told_by_name(study: dict[str, Any], tmp_path: Path, content: str) -> None:
    (tmp_path / "screen.json").write_text(content)
    (tmp_path / "results.md").write_text("")
    with pytest.raises(RuntimeError, match=r"screen\.json is damaged"):
        write_tables(study, tmp_path, tmp_path / "results.md")


def test_curves_are_drawn(tmp_path: Path) -> None:
    row = {"network": "net", "iterations": 200, "validation_dice": [0.5, 0.7]}
    draw_curves({"rows": [row, {"network": "without"}]}, tmp_path / "images" / "curves.png")
    assert (tmp_path / "images" / "curves.png").stat().st_size > 5000


@pytest.fixture
def hippocampus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set with the study's cases: 16 slices, the label's size telling the slice."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = tmp_path / "Dataset004_Hippocampus"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    labels = np.zeros((16, 5, 20), dtype=np.uint8)
    for number in range(16):
        labels[number, 2, :number] = 1
    volume = SimpleITK.GetImageFromArray(labels)
    volume.SetSpacing((1.0, 1.5, 2.0))
    SimpleITK.WriteImage(volume, str(tmp_path / "volume.nii.gz"))
    content = (tmp_path / "volume.nii.gz").read_bytes()
    for case in (HERE / "cases.txt").read_text().split():
        (folder / "imagesTr" / f"{case}_0000.nii.gz").write_bytes(content)
        (folder / "labelsTr" / f"{case}.nii.gz").write_bytes(content)
    described = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
        "numTraining": 200,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


def test_thick_slices_are_every_third_one(study: dict[str, Any], hippocampus: Path) -> None:
    folder = prepare_raw(study, "thick")
    assert folder.name == "Dataset941_StudyThick"
    assert folds_of(folder) == folds_of(hippocampus)
    case = folds_of(folder)[0]["val"][0]
    for file in (f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz"):
        volume = SimpleITK.ReadImage(str(folder / file))
        assert volume.GetSpacing() == (1.0, 1.5, 6.0)
        assert SimpleITK.GetArrayFromImage(volume).sum((1, 2)).tolist() == [0, 3, 6, 9, 12, 15]


def test_slabs_are_annotated_alone_but_where_they_judge(study: dict[str, Any], hippocampus: Path) -> None:
    folder = prepare_raw(study, "slabs")
    assert json.loads((folder / "dataset.json").read_text())["labels"]["ignore"] == 3
    folds = folds_of(folder)[1]
    for case in folds["train"][:5]:
        labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "labelsTr" / f"{case}.nii.gz")))
        annotated = [slice_number for slice_number in range(16) if (labels[slice_number] != 3).any()]
        assert len(annotated) in (2, 4)
        assert annotated[1] == annotated[0] + 1
        for slice_number in annotated:
            assert (labels[slice_number] == 1).sum() == slice_number
    for case in folds["val"]:
        labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "labelsTr" / f"{case}.nii.gz")))
        assert (labels != 3).all()
    assert prepare_raw(study, "slabs") == folder  # left as it is


def test_a_data_set_made_by_another_entry_is_refused(study: dict[str, Any], hippocampus: Path) -> None:
    prepare_raw(study, "thick")
    study["datasets"]["thick"]["every"] = 2
    with pytest.raises(RuntimeError, match="another entry"):
        prepare_raw(study, "thick")
    study["datasets"]["thick"]["name"] = "Other"
    with pytest.raises(RuntimeError, match="941 is taken"):
        prepare_raw(study, "thick")


def test_the_studys_cases_are_copied_from_a_larger_data_set(study: dict[str, Any], hippocampus: Path) -> None:
    larger = hippocampus.rename(hippocampus.parent / "larger")
    for part, name in (("imagesTr", "hippocampus_999_0000.nii.gz"), ("labelsTr", "hippocampus_999.nii.gz")):
        (larger / part / name).write_bytes(b"")
    copy_cases(larger, hippocampus)
    assert prepare_raw(study, "hippocampus") == hippocampus
    assert json.loads((hippocampus / "dataset.json").read_text())["numTraining"] == 200
    with pytest.raises(RuntimeError, match="is there already"):
        copy_cases(larger, hippocampus)
    with pytest.raises(RuntimeError, match=r"no dataset\.json"):
        copy_cases(larger / "imagesTr", hippocampus)


def test_a_data_set_of_other_cases_is_refused(study: dict[str, Any], hippocampus: Path) -> None:
    next((hippocampus / "labelsTr").iterdir()).unlink()
    with pytest.raises(RuntimeError, match=r"1 of cases\.txt are missing"):
        prepare_raw(study, "thick")
    assert not (hippocampus.parent / "Dataset941_StudyThick").exists()


@pytest.mark.parametrize("name", ["tumours", "branches"])
def test_made_up_data_sets_are_in_the_raw_format(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    study["datasets"][name]["cases"] = 3
    folder = prepare_raw(study, name)
    described = json.loads((folder / "dataset.json").read_text())
    assert described["numTraining"] == len(list((folder / "labelsTr").glob("*.nii.gz"))) == 3
    images = sorted((folder / "imagesTr").glob("*.nii.gz"))
    assert len(images) == 3 * len(described["channel_names"])
    assert SimpleITK.ReadImage(str(images[0])).GetSize() == tuple(
        study["datasets"][name]["shape"][:: 1 if name == "tumours" else -1]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


def test_branches_are_thin_and_change_between_slices() -> None:
    image, labels = make_branches((40, 48, 48), 0)
    again = make_branches((40, 48, 48), 0)
    assert (image == again[0]).all()
    assert (labels == again[1]).all()
    assert image.shape == labels.shape == (40, 48, 48)
    assert set(np.unique(labels)) == {0, VESSEL, BULB}
    width = 2 * ndimage.distance_transform_edt(labels == VESSEL).max()
    assert width < 5
    foreground = labels > 0
    assert 0.005 < foreground.mean() < 0.05
    slices = foreground[foreground.any((1, 2))]
    changed = (slices[1:] ^ slices[:-1]).sum() / foreground.sum()
    assert changed > 0.5
    assert image[foreground].mean() - image[~foreground].mean() > 1
    with pytest.raises(ValueError, match="at least 24"):
        make_branches((40, 48, 20), 0)
