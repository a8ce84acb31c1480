"""Calibration against scikit-learn, and against a loop over a comparison's files."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (as everybody calls it)
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from sklearn.calibration import calibration_curve

from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.calibration import BINS, boundary, measure_calibration, reliability
from nnunet_conres.evaluation.comparison import Comparison, compare
from nnunet_conres.evaluation.finding import CompareOptions, find_cross_validation
from nnunet_conres.evaluation.predictions import Contender, NamedModel
from nnunet_conres.evaluation.probabilities import Channels, Painter, iterate_channels

NAME = "Dataset801_Models"
STOCK, OURS = "nnUNetTrainer", "nnUNetTrainerConResNet"


def sample(seed: int, size: int = 400_000) -> tuple[np.ndarray, np.ndarray]:
    """Draw probabilities like a network's, most of them near 0 and 1, and a truth for which they are overconfident."""
    rng = np.random.default_rng(seed)
    probability = (1 / (1 + np.exp(-rng.normal(0, 5, size)))).astype(np.float32)
    return probability, rng.uniform(size=size) < 0.2 + 0.6 * probability


def error_of(truth: np.ndarray, probability: np.ndarray) -> float:
    """Compute the expected calibration error from scikit-learn's curve, which leaves out empty bins."""
    frequency, mean = calibration_curve(truth, probability, n_bins=BINS)
    share = np.histogram(probability, np.linspace(0, 1, BINS + 1))[0] / probability.size
    return float((share[share > 0] * np.abs(frequency - mean)).sum())


class TestReliability:
    def test_is_scikit_learns(self) -> None:
        probability, truth = sample(0)
        found = reliability(probability, truth)
        frequency, mean = calibration_curve(truth, probability, n_bins=BINS)
        curve = found.as_curve()
        np.testing.assert_allclose(curve["frequency"], frequency, rtol=1e-12)
        np.testing.assert_allclose(curve["probability"], mean, rtol=1e-5)  # scikit-learn sums in float32
        assert found.error == pytest.approx(error_of(truth, probability), rel=1e-5)
        assert sum(curve["voxels"]) == truth.size

    def test_values_on_an_edge_are_where_scikit_learn_has_them(self) -> None:
        probability = np.repeat(np.linspace(0, 1, BINS + 1), 10)
        truth = np.arange(probability.size) % 3 == 0
        found = reliability(probability, truth)
        frequency, _ = calibration_curve(truth, probability, n_bins=BINS)
        assert [value for value in found.as_curve()["frequency"] if value is not None] == pytest.approx(frequency)

    def test_perfect_and_worst(self) -> None:
        truth = np.arange(90) % 2 == 0
        assert reliability(truth.astype(np.float32), truth).error == 0
        assert reliability((~truth).astype(np.float32), truth).error == 1
        assert np.isnan(reliability(truth.astype(np.float32), truth, np.zeros(90, bool)).error)

    def test_mask_and_sum(self) -> None:
        probability, truth = sample(1)
        mask = np.random.default_rng(2).uniform(size=truth.size) < 0.3
        inside, outside = (reliability(probability, truth, of) for of in (mask, ~mask))
        assert inside.error == pytest.approx(error_of(truth[mask], probability[mask]), rel=1e-5)
        assert (inside + outside).error == pytest.approx(reliability(probability, truth).error)


def test_boundary_is_that_of_a_loop() -> None:
    region = np.random.default_rng(3).uniform(size=(5, 9, 8)) < 0.1
    expected = np.zeros_like(region)
    for index in np.ndindex(region.shape):
        for axis in range(3):
            for step in (-2, -1, 1, 2):
                other = list(index)
                other[axis] += step
                if 0 <= other[axis] < region.shape[axis]:
                    expected[index] |= region[tuple(other)] != region[index]
    assert np.array_equal(boundary(region), expected)


class TestFiles:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("count", [1, 3])
    def test_channels_of_turned_axes(self, tmp_path: Path, count: int, dtype: type) -> None:
        written = np.random.default_rng(4).uniform(size=(count, 4, 5, 6)).astype(dtype).transpose(0, 3, 1, 2)
        np.savez_compressed(tmp_path / "case.npz", probabilities=written)
        assert np.array_equal(np.stack(list(iterate_channels(tmp_path / "case.npz"))), written.astype(np.float32))

    @pytest.mark.parametrize(
        "labels",
        [
            {"background": 0, "b": 2, "a": 1, "c": 3, "ignore": 4},
            {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3},
        ],
    )
    def test_segmentation_is_nnunets(self, labels: dict[str, Any]) -> None:
        order = [1, 2, 3]
        manager = LabelManager(labels, order)
        meaning = Channels.of_dataset({"labels": labels, "regions_class_order": order})
        assert meaning.count == manager.num_segmentation_heads
        probabilities = np.random.default_rng(5).dirichlet(np.ones(meaning.count), (4, 5, 6)).astype(np.float32)
        probabilities = np.moveaxis(probabilities, -1, 0).copy() * (1 if meaning.exclusive else 2)
        painter = Painter(meaning)
        for channel in probabilities:
            painter.add(channel)
        assert np.array_equal(painter.labels, manager.convert_probabilities_to_segmentation(probabilities))
        for name, place in meaning.place.items():
            values = manager.foreground_regions if manager.has_regions else manager.foreground_labels
            expected = values[place] if manager.has_regions else values[place - 1]
            assert np.atleast_1d(expected).tolist() == list(meaning.regions[name])


@pytest.fixture(params=["labels", "regions"])
def two(lab: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    return with_two(lab(request.param))


def with_two(made: Any) -> Any:
    made.add(STOCK, folds=(0, 1), blur=0.45, seed=1)
    made.add(OURS, folds=(0, 1), blur=0.35, seed=2)
    return made


def run(output: Path, *trainers: str, ensembles: bool = True) -> Comparison:
    options = CompareOptions(progress=False, ensembles=ensembles)
    names = [NamedModel(trainer, "nnUNetPlans", "3d_fullres") for trainer in trainers]
    return compare(find_cross_validation(NAME, names, [0, 1], options), output, options)


class TestComparison:
    def test_is_that_of_scikit_learn_case_by_case_and_pooled(
        self, two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = run(tmp_path / "out", STOCK, OURS)
        found = json.loads(done.json.read_text())["calibration"]
        regions = {"labels": {"oedema": 1, "core": 2}, "regions": {"whole": 0, "core": 1}}[two.kind]
        members = {"oedema": [1], "core": [2], "whole": [1, 2]}
        pooled: dict[tuple[str, str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
        for case in two.cases:
            truth = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "raw" / NAME / "labelsTr" / f"{case}.nii.gz")))
            of_model = {}
            for model, folder in zip(("m0", "m1"), two.added, strict=True):
                (path,) = folder.glob(f"fold_*/validation/{case}.npz")
                of_model[model] = np.load(path)["probabilities"]
            of_model["e0"] = (of_model["m0"] + of_model["m1"]) / 2
            for model, probabilities in of_model.items():
                scores = found["cases"][model][case]
                for key in ("ece", "ece_boundary"):
                    errors = []
                    for name, place in regions.items():
                        region = np.isin(truth, members[name])
                        mask = boundary(region) if key == "ece_boundary" else np.ones_like(region)
                        pair = (region[mask], probabilities[place][mask])
                        errors.append(error_of(*pair))
                        pooled.setdefault((model, name, key), []).append(pair)
                        assert scores[name][key] == pytest.approx(errors[-1], rel=1e-5)
                    assert scores["mean"][key] == pytest.approx(np.mean(errors), rel=1e-5)
        for (model, name, key), pairs in pooled.items():
            truth, probability = (np.concatenate(of) for of in zip(*pairs, strict=True))
            curve = found["pooled"][model][name][key]
            assert curve["error"] == pytest.approx(error_of(truth, probability), rel=1e-5)
            frequency, mean = calibration_curve(truth, probability, n_bins=BINS)
            assert [value for value in curve["frequency"] if value is not None] == pytest.approx(list(frequency))
            assert [value for value in curve["probability"] if value is not None] == pytest.approx(list(mean))
        values = [found["cases"]["m1"][case]["core"]["ece"] for case in two.cases]
        base = [found["cases"]["m0"][case]["core"]["ece"] for case in two.cases]
        assert found["summary"]["m1"]["core"]["ece"]["mean"] == pytest.approx(np.mean(values))
        (row,) = [
            row for row in found["comparisons"] if (row["model"], row["region"], row["metric"]) == ("m1", "core", "ece")
        ]
        assert row["mean_difference"] == pytest.approx(np.mean(np.subtract(values, base)), abs=1e-8)
        assert row["wins"] == sum(np.subtract(values, base) < 0)

        rows = list(csv.DictReader((tmp_path / "out" / "calibration.csv").open()))
        assert len(rows) == 8 * 3 * 3  # cases, models including the ensemble, regions including their mean
        written = next(row for row in rows if (row["case"], row["model"], row["region"]) == ("case_4", OURS, "core"))
        assert float(written["ece"]) == found["cases"]["m1"]["case_4"]["core"]["ece"]
        assert len(list(csv.DictReader((tmp_path / "out" / "reliability.csv").open()))) == 3 * 2 * 2 * BINS
        page = done.report.read_text()
        assert 'id="calibration"' in page
        assert "No probabilities" not in page
        # A second run reads no files.
        monkeypatch.setattr("nnunet_conres.evaluation.calibration._measure", None)
        assert run(tmp_path / "out", STOCK, OURS).content["calibration"] == found

    def test_without_probabilities_it_says_so(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        two = with_two(lab("labels"))
        lost = two.added[0] / "fold_1" / "validation" / "case_1.npz"
        lost.unlink()
        done = run(tmp_path / "out", STOCK, OURS)
        found = done.content["calibration"]
        assert list(found["pooled"]) == ["m1"]
        assert found["without"] == [{"model": "m0", "name": STOCK, "cases": ["case_1"]}]
        assert found["comparisons"] == []
        page = done.report.read_text()
        assert f"No probabilities of {STOCK}" in page
        assert "--val --npz" in page
        for path in two.added[1].glob("fold_*/validation/*.npz"):
            path.unlink()
        done = run(tmp_path / "out", STOCK, OURS)
        assert done.content["calibration"]["pooled"] == {}
        assert f"No probabilities of {STOCK} (1 case), {OURS} (8 cases)" in done.report.read_text()
        assert not (tmp_path / "out" / "calibration.csv").exists()

    def test_a_post_processed_model_is_left_out(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        """Post-processing changes the label maps, not the probabilities."""
        lab("labels").add(STOCK, folds=(0, 1))
        names = [NamedModel(STOCK, "nnUNetPlans", "3d_fullres")]
        found = find_cross_validation(NAME, names, [0, 1], CompareOptions(progress=False))
        (model,) = found.models
        moved = {
            case: replace(one, labels=tmp_path / "postprocessed" / one.labels.name)
            for case, one in model.predictions.items()
        }
        made = Contender("p0", f"{model.name}, post-processed", moved, members=("m0",))
        found = replace(found, models=[model, made])
        measured = measure_calibration(found, tmp_path / "cache", "SimpleITKIO", CompareOptions(progress=False))
        assert list(measured["pooled"]) == ["m0"]
        assert measured["without"] == []

    def test_ignored_voxels_do_not_count(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        made.add(STOCK, folds=(0, 1))
        content = made.dataset_json | {"labels": made.dataset_json["labels"] | {"ignore": 3}}
        (made.added[0] / "dataset.json").write_text(json.dumps(content))
        path = tmp_path / "raw" / NAME / "labelsTr" / "case_0.nii.gz"
        image = sitk.ReadImage(str(path))
        truth = sitk.GetArrayFromImage(image)
        truth[:4] = 3
        written = sitk.GetImageFromArray(truth)
        written.CopyInformation(image)
        sitk.WriteImage(written, str(path))
        found = run(tmp_path / "out", STOCK).content["calibration"]
        probabilities = np.load(made.added[0] / "fold_0" / "validation" / "case_0.npz")["probabilities"]
        expected = error_of(truth[4:].ravel() == 2, probabilities[2, 4:].ravel())
        assert found["cases"]["m0"]["case_0"]["core"]["ece"] == pytest.approx(expected, rel=1e-5)

    def test_unusable_files_are_all_named(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        two = with_two(lab("labels"))
        folder = two.added[0] / "fold_0" / "validation"
        (folder / "case_0.npz").write_bytes(b"PK nonsense")
        np.savez_compressed(folder / "case_2.npz", probabilities=np.zeros((5, 10, 14, 12), np.float32))
        shape = np.load(folder / "case_4.npz")["probabilities"].shape
        np.savez_compressed(folder / "case_4.npz", probabilities=np.full(shape, np.nan, np.float32))
        with pytest.raises(InputError) as caught:
            run(tmp_path / "out", STOCK, OURS, ensembles=False)
        text = str(caught.value)
        for case, reason in (("case_0", "can't be read"), ("case_2", "shape 5 x 10"), ("case_4", "from nan to nan")):
            assert any(
                case in line and reason in line and "Predict the case again" in line for line in text.split("\n")
            )
