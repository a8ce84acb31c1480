"""The study: lists of runs, the data made for them, forms of the residual stream, scores and tables."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scipy import stats

yaml = pytest.importorskip("yaml", reason="needs the extra [workflow]")

import forms  # noqa: E402
import torch  # noqa: E402
from recipe import SeededTransform, trainer  # noqa: E402
from study import (  # noqa: E402
    STUDY,
    _form_names,
    _step_key,
    complete,
    end_and_middle_dice,
    main,
    run_name,
    steps_table,
    with_equal_time,
)
from study_data import check, majority, reduce_raw  # noqa: E402
from tables import picked_row, write  # noqa: E402

from nnunet_conres.errors import InputError  # noqa: E402

LISTS = [name + device for name in ("hippocampus", "lgg", "acdc") for device in ("", "_gpu")]


def listed(repository_root: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((repository_root / "scripts" / "study" / f"{name}.yaml").read_text())


class TestLists:
    @pytest.mark.parametrize("name", LISTS)
    def test_are_valid_and_train_every_model_with_two_seeds(self, name: str, repository_root: Path) -> None:
        content = listed(repository_root, f"runs_{name}")
        _, runs = complete(content)
        assert len({run_name(run) for run in runs}) == len(runs) == 2 * len(content["models"])
        assert runs[0]["model"] == "stock"

    @pytest.mark.parametrize("name", LISTS)
    def test_have_the_models_that_are_asked_for(self, name: str, repository_root: Path) -> None:
        models = set(listed(repository_root, f"runs_{name}")["models"])
        asked, of_a_gpu = set(), set()
        for key, question in listed(repository_root, "questions").items():
            pairs = question.get("pairs", []) + ([question["picked"]] if "picked" in question else [])
            (of_a_gpu if key in ("device_augmentation", "fast_step") else asked).update(*pairs)
        assert models <= asked | of_a_gpu
        assert asked <= models or name != "lgg"
        assert of_a_gpu <= models or name != "hippocampus_gpu"

    def test_an_entry_of_a_model_goes_before_that_of_all(self) -> None:
        content = {"data": {"source": "Dataset004_A", "id": 4}, "seeds": [7], "study": {"iterations": 40}}
        content["models"] = {"a": {}, "b": {"study": {"iterations": 20, "width": 1.5}}}
        _, (first, second) = complete(content)
        assert first["study"] == STUDY | {"iterations": 40, "seed": 7}
        assert second["study"] == STUDY | {"iterations": 20, "width": 1.5, "seed": 7}

    def test_all_errors_are_reported_at_once(self, tmp_path: Path) -> None:
        content = {"data": {"source": "Dataset004_A", "id": 4, "thinn": 2}, "seeds": [0]}
        content["models"] = {
            "a": {"trainer": "nnUNetTrainerMoun"},
            "b": {"study": {"iteration": 5}},
            "c": {"study": {"iterations": 155}},
            "d e": {},
            "f": {"data": "sparse"},
        }
        file = tmp_path / "runs.yaml"
        file.write_text(yaml.safe_dump(content))
        with pytest.raises(SystemExit) as stop:
            main([str(file), "--work", str(tmp_path / "work")])
        for message in (
            "data has thinn; expected some of crop,",
            "a: trainer nnUNetTrainerMoun; expected nnUNetTrainer or",
            "b: study has iteration; expected some of iterations,",
            "c: 155 iterations; expected a multiple of 10",
            "d e: expected a name of letters",
            "f: data sparse; expected dense",
        ):
            assert message in str(stop.value)
        assert not (tmp_path / "work").exists()

    def test_know_all_forms(self) -> None:
        assert _form_names() == list(forms.TRAINERS)

    def test_equal_time_is_that_of_the_first(self) -> None:
        content = {"data": {"source": "Dataset004_A", "id": 4}, "seeds": [0], "study": {"iterations": 200}}
        content["models"] = {"stock": {}, "slow": {"study": {"width": 2, "iterations": "equal_time"}}}
        _, runs = complete(content)
        seconds = {_step_key(runs[0]): [0.5, 0.4, 0.6], _step_key(runs[1]): [0.8]}
        with pytest.raises(InputError, match="slow: no step could be measured"):
            with_equal_time(runs, {_step_key(runs[0]): [0.5]})
        runs = with_equal_time(runs, seconds)
        assert [run["study"]["iterations"] for run in runs] == [200, 120]
        line = steps_table(seconds, runs).splitlines()[-1]
        assert [cell.strip() for cell in line.strip("|").split("|")] == ["slow", "0.800", "1.60", "120", "1.6"]


class TestData:
    def test_majority_of_a_block_is_counted_voxel_by_voxel(self) -> None:
        labels = np.random.default_rng(0).integers(0, 3, (6, 4, 5))
        found = majority(labels, 2)
        for index in np.ndindex(found.shape):
            row, column, place = index
            block = labels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2, place]
            assert found[index] == stats.mode(block, axis=None).mode

    def _raw(self, folder: Path, labels: np.ndarray) -> Path:
        affine = np.diag([-2.0, -2.0, 5.0, 1.0])
        for name, array in (("imagesTr/a_0000", labels * 10.0), ("labelsTr/a", labels)):
            (folder / name).parent.mkdir(parents=True)
            nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), affine), folder / f"{name}.nii.gz")
        (folder / "dataset.json").write_text("{}")
        return folder

    def test_voxels_stay_where_they_are(self, tmp_path: Path) -> None:
        labels = np.zeros((16, 12, 4))
        labels[6:10, 4:8, 1:3] = 1
        source, target = self._raw(tmp_path / "source", labels), tmp_path / "target"
        reduce_raw(source, target, 0.75, 2)
        thinned = nibabel.load(target / "labelsTr" / "a.nii.gz")
        assert thinned.shape == (6, 4, 4)
        assert thinned.header.get_zooms() == (4, 4, 5)
        for name in ("imagesTr/a_0000", "labelsTr/a"):
            centres = []
            for root in (source, target):
                volume = nibabel.load(root / f"{name}.nii.gz")
                voxels = np.argwhere(np.asanyarray(volume.dataobj) > 0).mean(0)
                centres.append(nibabel.affines.apply_affine(volume.affine, voxels))
            np.testing.assert_allclose(*centres)

    def test_a_label_that_would_be_lost_is_an_error(self, tmp_path: Path) -> None:
        labels = np.zeros((16, 12, 4))
        labels[0, 5, 1] = 1
        with pytest.raises(InputError, match=r"labels outside the central 0\.75"):
            reduce_raw(self._raw(tmp_path / "source", labels), tmp_path / "target", 0.75, 2)

    def test_a_missing_source_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="Dataset004_A; --source says"):
            check({"source": "Dataset004_A"}, tmp_path, tmp_path)


class TestForms:
    def test_signed_residuals_sum_up_to_the_change(self) -> None:
        target = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (2, 1, 4, 3, 3)))
        signed, _ = forms.SignedResidualMapLoss([1, 2]).residual_of(target)
        for number, label in enumerate((1, 2)):
            mask = (target[:, 0] == label).numpy().astype(int)
            change = signed[:, number].int() - signed[:, 2 + number].int()
            np.testing.assert_array_equal(change[:, 1:], np.diff(mask, axis=1))

    def test_distances_are_those_of_a_loop(self) -> None:
        mask = np.zeros((6, 6, 7), bool)
        mask[1:4, 2:5, 1:6] = True
        target = torch.from_numpy(mask.astype(np.int64))[None, None]
        found = forms.DistanceMapLoss([1]).distances(target)[0, 0].numpy()
        for index in np.ndindex(mask.shape):
            others = np.argwhere(mask != mask[index])
            nearest = np.sqrt(((others - index) ** 2).sum(1)).min() / forms.LARGEST_DISTANCE
            assert found[index] == pytest.approx(min(1, nearest) * (1 if mask[index] else -1))

    def test_perfect_distances_have_no_loss(self) -> None:
        loss = forms.DistanceMapLoss([1])
        target = torch.zeros(1, 1, 4, 4, 4)
        target[..., 2:] = 1
        value, _ = loss([loss.distances(target)], target)
        assert value == 0

    @pytest.mark.parametrize(
        ("where", "expected"), [("middle", (1.0, 0.0)), ("ends", (0.0, 1.0)), ("nowhere", (1.0, 1.0))]
    )
    def test_an_error_counts_where_it_is(self, where: str, expected: tuple[float, float]) -> None:
        truth = np.zeros((4, 7, 4), bool)
        truth[1:3, 1:6, 1:3] = True
        found = truth.copy()
        found[:, {"middle": slice(2, 5), "ends": [1, 5], "nowhere": []}[where]] = False
        assert end_and_middle_dice(truth, found, axis=1) == expected

    def test_slices_beyond_a_structure_are_part_of_its_ends(self) -> None:
        truth = np.zeros((5, 2, 2), bool)
        truth[1:4, 0, 0] = True
        found = truth.copy()
        found[4, 0, 0] = True
        assert end_and_middle_dice(truth, found) == (pytest.approx(4 / 5), 1.0)
        assert np.isnan(end_and_middle_dice(truth[:1], found[:1])).all()


class TestBatches:
    @pytest.mark.parametrize(
        ("workers", "device", "seeded"),
        [("0", "cpu", True), ("1", "cpu", True), ("4", "cpu", False), ("0", "cuda", False)],
    )
    def test_are_the_same_with_one_worker_at_most(
        self, workers: str, device: str, seeded: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("nnUNet_n_proc_DA", workers)
        made: Any = object.__new__(trainer("nnUNetTrainer", STUDY | {"seed": 3}))
        made.current_epoch, made.batch_size, made.device = 2, 5, torch.device(device)
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


class TestTables:
    @pytest.fixture
    def work(self, tmp_path: Path) -> Path:
        """Write scores of two models with two seeds on eight patients with two cases each, and of a failed run."""
        (tmp_path / "scores").mkdir()
        rng = np.random.default_rng(0)
        for model, gain in (("stock", 0.0), ("Muon", 0.02), ("Picked", 0.1), ("ConResNet", 0.0)):
            for seed in (0, 1):
                cases = {}
                for patient in range(8):
                    for frame in (1, 2):
                        scores = {key: 0.8 + gain + 0.05 * rng.random() for key in ("dice", "dice_ends", "hd95")}
                        cases[f"patient{patient}_{frame}"] = {"mean": scores | {"dice_middle": None}}
                study = STUDY | {"seed": seed}
                run = {"model": model, "trainer": "t", "plans": "p", "configuration": "c", "data": "dense", "fold": 0}
                content = {"run": run | {"study": study}, "data": "Hearts", "group": r"patient\d+", "cases": cases}
                if (model, seed) == ("Muon", 1):
                    content |= {"failed": True, "cases": {}}
                (tmp_path / "scores" / f"{model}_{seed}.json").write_text(json.dumps(content))
        return tmp_path

    @staticmethod
    def _dice(file: Path) -> list[float]:
        return [case["mean"]["dice"] for case in json.loads(file.read_text())["cases"].values()]

    def test_say_what_scipy_says(self, work: Path) -> None:
        pairs = [["Muon", "stock"], ["ConResNet", "stock"]]
        write(
            [work],
            {"one": {"title": "One?", "pairs": pairs}, "two": {"title": "Two?", "picked": ["Picked", "ConResNet"]}},
            work,
        )
        with (work / "pairs.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["metric"] == "dice"]
        p_values = []
        for (model, seeds), row in zip((("Muon", [0]), ("ConResNet", [0, 1])), rows, strict=True):
            dice = [
                [self._dice(work / "scores" / f"{name}_{seed}.json") for seed in seeds] for name in (model, "stock")
            ]
            values = 100 * np.subtract(*dice).mean(0).reshape(8, 2).mean(1)
            expected = stats.bootstrap((values,), np.mean, n_resamples=10000, rng=np.random.default_rng(5))
            assert float(row["difference"]) == pytest.approx(values.mean())
            assert float(row["low"]) == pytest.approx(expected.confidence_interval.low, abs=0.1)
            assert float(row["high"]) == pytest.approx(expected.confidence_interval.high, abs=0.1)
            assert (int(row["patients"]), int(row["better"])) == (8, (values > 0).sum())
            p_values.append(stats.wilcoxon(values).pvalue)
        order = np.argsort(p_values)
        corrected = np.maximum.accumulate(np.minimum(1, np.array(p_values)[order] * [2, 1]))
        np.testing.assert_allclose([float(rows[index]["p_holm"]) for index in order], corrected)

    def test_leave_no_run_out(self, work: Path) -> None:
        write([work], {"two": {"title": "Two?", "picked": ["Picked", "ConResNet"]}}, work)
        with (work / "runs.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 8
        assert [(row["model"], row["seed"]) for row in rows if row["status"] == "failed"] == [("Muon", "1")]
        text = (work / "study.md").read_text()
        assert "## Two?" in text
        assert "| Hearts | Muon | 1 |" in text
        assert (work / "two.png").stat().st_size > 1000

    def test_random_cases_spread_as_their_mean_does(self) -> None:
        rng = np.random.default_rng(1)
        dice = rng.normal(0.7, 0.1, 100)
        fold = {"cases": {str(number): {"mean": {"dice": value}} for number, value in enumerate(dice)}}
        picked = {"cases": {str(number): {"mean": {"dice": 0.9}} for number in range(20)}}
        row = picked_row([picked], [fold])
        assert (row["picked"], row["fold"]) == (pytest.approx(90), pytest.approx(100 * dice.mean()))
        error = 100 * dice.std(ddof=1) / np.sqrt(20) * np.sqrt(80 / 100)  # for sampling without replacement
        assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * error, rel=0.05)


def _points(values: Sequence[str], unit: float) -> str:
    if not values[0]:
        return ""
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*(unit * float(value) for value in values))


def _p(text: str) -> str:
    return "" if not text else "< 0.001" if float(text) < 0.001 else f"{float(text):.3f}"


CELLS: dict[str, Callable[[dict[str, str]], str]] = {
    "Dice, %": lambda row: f"{100 * float(row['dice']):.2f}",
    "points": lambda row: _points([row[f"dice_difference{end}"] for end in ("", "_low", "_high")], 100),
    "p": lambda row: _p(row["dice_p_holm"]),
    "better in": lambda row: f"{row['dice_wins']} of {row['cases']}" if row["dice_wins"] else "",
    "HD95, mm": lambda row: f"{float(row['hd95']):.2f}",
    "step": lambda row: f"{float(row['step_ms']) / float(row['baseline_step_ms']):.2f}",
}


def test_tables_of_the_document_are_those_of_the_saved_results(repository_root: Path) -> None:
    with (repository_root / "docs" / "results.csv").open(newline="") as file:
        saved = list(csv.DictReader(file))
    text = (repository_root / "docs" / "results_longer.md").read_text()
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


def test_tables_of_the_results_are_those_of_the_saved_pairs(repository_root: Path) -> None:
    with (repository_root / "docs" / "results_pairs.csv").open(newline="") as file:
        saved = {
            (row["data"], row["model"], row["against"], row["region"], row["metric"]): row
            for row in csv.DictReader(file)
        }

    data, checked, header = "", 0, []
    for line in (repository_root / "docs" / "results.md").read_text().splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")] if line.startswith("| ") else []
        if cells[:1] == ["data"]:
            header = cells
        if not cells or "against" not in header or cells[0] == "data" or cells[0].startswith("---"):
            continue
        shown = dict(zip(header, cells, strict=True))
        region = shown["data"].removeprefix("..., ") if shown["data"].startswith("...") else "mean"
        data = data if region != "mean" else shown["data"]
        dice, ends, middle = (
            saved[data, shown["model"], shown["against"], region, metric]
            for metric in ("dice", "dice_ends", "dice_middle")
        )
        points = [_points([row[key] for key in ("difference", "low", "high")], 1) for row in (dice, ends, middle)]
        expected = {
            "iterations": f"{dice['iterations']} / {dice['against_iterations']}",
            "points of Dice": points[0],
            "p (Holm)": _p(dice["p_holm"]),
            "better in": f"{dice['better']} of {dice['patients']}",
            "at the ends": points[1],
            "in the middle": points[2],
        }
        for name in header[3:]:
            assert shown[name] == expected[name], (line, name)
        checked += 1
    assert checked >= 20
