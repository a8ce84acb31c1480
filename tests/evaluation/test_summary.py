import json
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnunet_conres import cli
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.summary import format_table, read_summary

REGIONS = {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": 3}


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))


def dice(first: np.ndarray, second: np.ndarray) -> float:
    total = first.sum() + second.sum()
    return 2 * (first & second).sum() / total if total else math.nan


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return a summary.json written by nnU-Net's own evaluation, and the reference and prediction of every case."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    folder = tmp_path_factory.mktemp("evaluated")
    rng = np.random.default_rng(0)
    cases = {}
    for case in ("case_b", "case_a", "case.c"):
        highest = 2 if case == "case_b" else 3  # case_b has no enhancing tumour, neither true nor predicted
        reference = rng.integers(0, highest + 1, (4, 5, 6)).astype(np.uint8)
        prediction = np.where(
            rng.random(reference.shape) < 0.7, reference, rng.integers(0, highest + 1, reference.shape)
        )
        cases[case] = (reference, prediction.astype(np.uint8))
        save(folder / "labels" / f"{case}.nii.gz", reference)
        save(folder / "predictions" / f"{case}.nii.gz", prediction.astype(np.uint8))
    regions = [(1, 2, 3), (2, 3), 3]
    rows = [
        compute_metrics(
            str(folder / f"labels/{c}.nii.gz"), str(folder / f"predictions/{c}.nii.gz"), SimpleITKIO(), regions
        )
        for c in cases
    ]
    measures = rows[0]["metrics"][3]
    mean = {r: {m: float(np.nanmean([row["metrics"][r][m] for row in rows])) for m in measures} for r in regions}
    foreground = {m: float(np.mean([mean[r][m] for r in regions])) for m in measures}
    for row in rows:
        row["metrics"] = {r: {m: float(v) for m, v in values.items()} for r, values in row["metrics"].items()}
    path = folder / "predictions" / "summary.json"
    save_summary_json({"metric_per_case": rows, "mean": mean, "foreground_mean": foreground}, str(path))
    (folder / "predictions" / "dataset.json").write_text(json.dumps({"labels": REGIONS}))
    return path, cases


class TestReadSummary:
    def test_names_order_and_values(self, evaluated: tuple) -> None:
        path, cases = evaluated
        summary = read_summary(path)
        assert list(summary.mean) == ["whole_tumor", "tumor_core", "enhancing_tumor"]
        assert list(summary.cases) == ["case.c", "case_a", "case_b"]
        for name, values in (("whole_tumor", (1, 2, 3)), ("tumor_core", (2, 3)), ("enhancing_tumor", (3,))):
            scores = []
            for case, (reference, prediction) in cases.items():
                true, predicted = np.isin(reference, values), np.isin(prediction, values)
                score = summary.cases[case][name]
                np.testing.assert_allclose(score.dice, dice(true, predicted))
                assert score.false_positives == (predicted & ~true).sum()
                assert score.false_negatives == (true & ~predicted).sum()
                scores.append(dice(true, predicted))
            np.testing.assert_allclose(summary.mean[name].dice, np.nanmean(scores))
            np.testing.assert_allclose(
                summary.mean[name].iou,
                np.nanmean([d / (2 - d) for d in scores]),
            )
            assert summary.scored[name] == sum(not math.isnan(score) for score in scores)
        assert summary.scored["enhancing_tumor"] == 2
        np.testing.assert_allclose(summary.foreground.dice, np.mean([score.dice for score in summary.mean.values()]))

    def test_dataset_json_given(self, evaluated: tuple, tmp_path: Path) -> None:
        named = tmp_path / "dataset.json"
        named.write_text(json.dumps({"labels": {"background": 0, "ET": 3, "TC": [3, 2], "WT": [3, 1, 2]}}))
        assert list(read_summary(evaluated[0], named).mean) == ["ET", "TC", "WT"]

    def test_dataset_json_above(self, evaluated: tuple, tmp_path: Path) -> None:
        """The validation of a training is two folders below its dataset.json."""
        copy = tmp_path / "fold_0" / "validation" / "summary.json"
        copy.parent.mkdir(parents=True)
        copy.write_text(evaluated[0].read_text())
        assert list(read_summary(copy).mean) == ["label 3", "region 2, 3", "region 1, 2, 3"][::-1]
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": REGIONS}))
        assert list(read_summary(copy).mean) == ["whole_tumor", "tumor_core", "enhancing_tumor"]

    def test_plain_labels(self, tmp_path: Path) -> None:
        scores = {"Dice": 0.5, "IoU": 1 / 3, "FP": 1.0, "FN": 2.0}
        content = {
            "mean": {"10": scores, "2": scores},
            "foreground_mean": scores,
            "metric_per_case": [{"prediction_file": "C:\\out\\x.nii.gz", "metrics": {"2": scores, "10": scores}}],
        }
        path = tmp_path / "summary.json"
        path.write_text(json.dumps(content))
        summary = read_summary(path)
        assert list(summary.mean) == ["label 2", "label 10"]
        assert list(summary.cases) == ["x"]

    @pytest.mark.parametrize(
        "content", ["{}", "[]", '{"mean": {"1": {}}, "metric_per_case": [], "foreground_mean": {}}']
    )
    def test_another_file(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "summary.json"
        path.write_text(content)
        with pytest.raises(InputError, match=r"summary\.json is not a summary of nnU-Net's evaluation"):
            read_summary(path)

    def test_not_json(self, tmp_path: Path) -> None:
        path = tmp_path / "summary.json"
        path.write_text("Dice 0.9")
        with pytest.raises(InputError, match=r"summary\.json is not valid JSON"):
            read_summary(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"summary\.json does not exist"):
            read_summary(tmp_path / "summary.json")

    @pytest.mark.parametrize("there", [True, False])
    def test_a_folder(self, tmp_path: Path, there: bool) -> None:
        path = tmp_path / "summary.json"
        if there:
            path.touch()
        with pytest.raises(InputError, match="is a folder; expected a JSON file") as caught:
            read_summary(tmp_path)
        assert (str(path) in str(caught.value)) == there

    def test_another_dataset_json(self, evaluated: tuple, tmp_path: Path) -> None:
        path = tmp_path / "dataset.json"
        path.write_text("{}")
        with pytest.raises(InputError, match=r"dataset\.json has no usable labels"):
            read_summary(evaluated[0], path)


class TestFormatTable:
    def test_layout(self, evaluated: tuple) -> None:
        summary = read_summary(evaluated[0])
        lines = format_table(summary).splitlines()
        assert lines[0].split() == ["Dice", "IoU", "FP", "voxels", "FN", "voxels", "cases"]
        whole = summary.mean["whole_tumor"]
        assert lines[2].split()[:3] == ["whole_tumor", f"{whole.dice:.3f}", f"{whole.iou:.3f}"]
        assert lines[4].split()[-3:] == ["2", "of", "3"]
        assert lines[5].split()[:2] == ["mean", f"{summary.foreground.dice:.3f}"]
        case_b = next(line for line in lines if line.startswith("case_b"))
        assert case_b.split() == [
            "case_b",
            *(f"{summary.cases['case_b'][n].dice:.3f}" for n in list(summary.mean)[:2]),
            "-",
        ]
        assert all(line == line.rstrip() for line in lines)

    def test_columns_are_aligned(self, evaluated: tuple) -> None:
        lines = format_table(read_summary(evaluated[0])).splitlines()
        end = lines[0].index("Dice") + len("Dice")
        for line in lines[2:6]:
            assert line[end - 1].isdigit()
            assert line[end] == " "


class TestCommand:
    def test_table(self, evaluated: tuple, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["summary", str(evaluated[0])]) == 0
        assert capsys.readouterr().out == format_table(read_summary(evaluated[0])) + "\n"

    def test_json_has_no_nan(self, evaluated: tuple, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["summary", str(evaluated[0]), "--json"]) == 0

        def refuse(text: str) -> None:
            raise AssertionError(f"{text} is not JSON")

        content = json.loads(capsys.readouterr().out, parse_constant=refuse)
        assert content["cases"]["case_b"]["enhancing_tumor"]["Dice"] is None
        assert content["mean"]["enhancing_tumor"]["cases"] == 2
        assert content["number_of_cases"] == 3

    def test_error(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["summary", str(tmp_path / "none.json")]) == 2
        assert "does not exist" in capsys.readouterr().err
