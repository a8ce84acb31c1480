"""The whole comparison, from the folders that nnU-Net writes to the HTML, CSV and JSON files."""

import csv
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (as everybody calls it)
import torch

from nnunet_conres import cli
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.comparison import Comparison, compare
from nnunet_conres.evaluation.finding import CompareOptions, find_cross_validation, find_test_set
from nnunet_conres.evaluation.metrics import MetricOptions
from nnunet_conres.evaluation.predictions import NamedModel
from nnunet_conres.evaluation.statistics import mean_intervals
from nnunet_conres.folders import writing

NAME = "Dataset801_Models"
QUIET = CompareOptions(progress=False)
STOCK, OURS = "nnUNetTrainer", "nnUNetTrainerConResNet"


def names(*trainers: str) -> list[NamedModel]:
    return [NamedModel(trainer, "nnUNetPlans", "3d_fullres") for trainer in trainers]


def compare_cross_validation(
    dataset_name: str, models: list[NamedModel], folds: list[int], output: Path, options: CompareOptions
) -> Comparison:
    return compare(find_cross_validation(dataset_name, models, folds, options), output, options)


def compare_test_set(
    predictions: dict[str, Path],
    references: Path,
    dataset_json: Path,
    output: Path,
    options: CompareOptions,
    images: Path | None = None,
) -> Comparison:
    return compare(find_test_set(predictions, references, dataset_json, options, images=images), output, options)


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * float((first & second).sum()) / float(first.sum() + second.sum())


def voxels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.fixture(params=["labels", "regions"])
def two(lab: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    """Add two models with two folds each; ours is better."""
    made = lab(request.param)
    made.add(STOCK, folds=(0, 1), blur=0.45, seed=1)
    made.add(OURS, folds=(0, 1), blur=0.35, seed=2)
    return made


class TestCrossValidation:
    def test_scores_are_those_of_a_loop(self, two: Any, tmp_path: Path) -> None:
        done = compare_cross_validation(NAME, names(STOCK, OURS), [0, 1], tmp_path / "out", QUIET)
        assert not list((tmp_path / "out").glob(".*"))
        with writing(tmp_path / "out"), pytest.raises(InputError, match="out is being written by process"):
            compare_cross_validation(NAME, names(STOCK, OURS), [0, 1], tmp_path / "out", QUIET)
        content = json.loads(done.json.read_text())
        assert [model["name"] for model in content["models"]] == [STOCK, OURS, f"{STOCK} + {OURS}"]
        assert [model["key"] for model in content["models"] if model["baseline"]] == ["m0"]
        assert content["dataset"]["number_of_cases"] == 8
        assert content["dataset"]["folds"] == [0, 1]
        members = {"labels": {"oedema": [1], "core": [2]}, "regions": {"whole": [1, 2], "core": [2]}}[two.kind]
        assert content["regions"] == list(members)
        differences = []
        for case in content["cases"]:
            truth = voxels(tmp_path / "raw" / NAME / "labelsTr" / f"{case['id']}.nii.gz")
            overall = []
            for model, folder in zip(("m0", "m1"), two.added, strict=True):
                (path,) = folder.glob(f"fold_*/validation/{case['id']}.nii.gz")
                assert path.parent.parent.name == f"fold_{case['fold']}"
                predicted = voxels(path)
                expected = [dice(np.isin(truth, m), np.isin(predicted, m)) for m in members.values()]
                found = case["scores"][model]
                assert [found[region]["dice"] for region in members] == pytest.approx(expected)
                assert found["mean"]["dice"] == pytest.approx(np.mean(expected))
                overall.append(np.mean(expected))
            differences.append(overall[1] - overall[0])
        (row,) = [
            row
            for row in content["comparisons"]
            if (row["model"], row["region"], row["metric"]) == ("m1", "mean", "dice")
        ]
        assert row["mean_difference"] == pytest.approx(np.mean(differences))
        assert row["wins"] == sum(difference > 0 for difference in differences)
        assert row["n"] == 8
        assert content["summary"]["m0"]["mean"]["dice"]["n"] == 8
        volume_errors = [abs(case["scores"]["m0"]["core"]["volume_error"]) for case in content["cases"]]
        assert content["summary"]["m0"]["core"]["volume_error"]["mean"] == pytest.approx(np.mean(volume_errors))
        expected_order = sorted(zip(differences, content["cases"], strict=True), key=lambda pair: -abs(pair[0]))
        assert content["disagreements"][0]["id"] == expected_order[0][1]["id"]

    def test_files(self, two: Any, tmp_path: Path) -> None:
        done = compare_cross_validation(NAME, names(STOCK, OURS), [0, 1], tmp_path / "out", QUIET)
        content = json.loads(done.json.read_text())
        rows = list(csv.DictReader(done.csv.open()))
        assert len(rows) == 8 * 3 * 3  # cases, models including the ensemble, regions including their mean
        row = next(row for row in rows if (row["case"], row["model"], row["region"]) == ("case_4", OURS, "mean"))
        case = next(case for case in content["cases"] if case["id"] == "case_4")
        assert float(row["dice"]) == case["scores"]["m1"]["mean"]["dice"]
        page = done.report.read_text()
        assert OURS in page
        assert NAME in page
        assert "NaN" not in done.json.read_text()
        assert OURS in done.as_text()

    @pytest.mark.parametrize("two", ["labels"], indirect=True)
    def test_a_second_time_nothing_heavy_is_imported(self, two: Any, tmp_path: Path) -> None:
        script = (
            "import sys\nfrom nnunet_conres import cli\n"
            f"assert cli.main(['compare', '-d', '801', '-tr', {STOCK!r}, {OURS!r}, '-f', '0', '1', '-np', '1', "
            f"'--no_ensembles', '-o', {str(tmp_path / 'out')!r}]) == 0\n"
            "print({'torch', 'SimpleITK', 'matplotlib', 'PIL'} & set(sys.modules))"
        )
        runs = [
            subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in "12"
        ]
        assert runs[1].stdout.splitlines()[-1] == "set()"

    def test_costs_and_conditions(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        made.add(STOCK)
        made.add(OURS, precision="bfloat16 mixed", epochs=4)
        content = compare_cross_validation(NAME, names(STOCK, OURS), [0], tmp_path / "out", QUIET).content
        first, second, ensemble = content["models"]
        assert first["cost"]["precision"] == "float32"
        assert second["cost"]["epochs"] == 4
        assert ensemble["cost"]["parameters"] == first["cost"]["parameters"] + second["cost"]["parameters"]
        assert second["curves"]["0"]["series"]["train_losses"][1] == -0.1
        warnings = " ".join(content["warnings"])
        assert "precision" in warnings
        assert "number of epochs" in warnings
        assert "Only fold 0" in warnings

    def test_a_second_time_nothing_is_scored_again(
        self, two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = compare_cross_validation(NAME, names(STOCK, OURS), [0, 1], tmp_path / "out", QUIET).content
        monkeypatch.setattr("nnunet_conres.evaluation.scoring.measure", lambda *_, **__: pytest.fail("scored again"))
        second = compare_cross_validation(NAME, names(STOCK, OURS), [0, 1], tmp_path / "out", QUIET).content
        assert second["cases"] == first["cases"]
        assert second["comparisons"] == first["comparisons"]

    def test_without_probabilities(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        for trainer in (STOCK, OURS):
            made.add(trainer, folds=(0, 1), npz=trainer == STOCK)
        done = compare_cross_validation(NAME, names(STOCK, OURS), [0, 1], tmp_path / "out", QUIET)
        assert len(done.content["models"]) == 2
        (warning,) = [warning for warning in done.content["warnings"] if f"No ensemble with {OURS}" in warning]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        commands = [
            f"nnUNetv2_train {NAME} 3d_fullres {fold} -tr {OURS} -p nnUNetPlans -device {device} --val --npz"
            for fold in (0, 1)
        ]
        assert warning.splitlines()[1:] == commands
        assert set(commands) <= set(done.as_text().splitlines())
        assert set(commands) <= set(re.split(r"\n|<li>|</li>", done.report.read_text()))

    def test_time_points_count_as_one_patient(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        for folder in ("imagesTr", "labelsTr"):
            for number, case in enumerate(made.cases):
                for path in (tmp_path / "raw" / NAME / folder).glob(f"{case}*"):
                    path.rename(path.with_name(path.name.replace(case, f"BraTS-GLI-0000{number // 2}-00{number % 2}")))
        renamed = [f"BraTS-GLI-0000{number // 2}-00{number % 2}" for number in range(8)]
        for trainer, seed in ((STOCK, 1), (OURS, 2)):
            validation = made.add(trainer, seed=seed) / "fold_0" / "validation"
            for case, new in zip(made.cases, renamed, strict=True):
                for path in validation.glob(f"{case}.*"):
                    path.rename(path.with_name(path.name.replace(case, new)))
            made.write_summary(validation, renamed)
        content = compare_cross_validation(NAME, names(STOCK, OURS), [0], tmp_path / "out", QUIET).content
        assert {row["n"] for row in content["comparisons"] if row["metric"] == "dice"} == {4}
        dice = {case["id"]: case["scores"]["m0"]["mean"]["dice"] for case in content["cases"]}
        (expected,) = mean_intervals([list(dice.values())], [[case[:-4] for case in dice]])
        summary = content["summary"]["m0"]["mean"]["dice"]
        assert (summary["low"], summary["high"]) == (expected.low, expected.high)

    def test_one_model_alone(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        lab().add(STOCK)
        content = compare_cross_validation(NAME, names(STOCK), [0], tmp_path / "out", QUIET).content
        assert content["comparisons"] == []
        assert content["disagreements"] == []

    def test_all_errors_and_nothing_written(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        lab().add(STOCK)
        with pytest.raises(InputError) as error:
            compare_cross_validation(NAME, names(STOCK, OURS, "Another"), [0, 1], tmp_path / "out", QUIET)
        assert len(error.value.errors) == 5
        assert not (tmp_path / "out").exists()

    def test_other_splits_are_reported(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        made.add(STOCK, folds=(0, 1))
        made.add(OURS, folds=(1, 0))
        with pytest.raises(InputError, match="different splits"):
            compare_cross_validation(NAME, names(STOCK, OURS), [0, 1], tmp_path / "out", QUIET)
        options = CompareOptions(intersection=True, progress=False)
        content = compare_cross_validation(NAME, names(STOCK, OURS), [0, 1], tmp_path / "out", options).content
        assert any(f"{OURS}: trained on other splits" in warning for warning in content["warnings"])

    def test_predictions_that_are_gone(
        self, lab: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = lab()
        for trainer, case in ((STOCK, "case_2"), (OURS, "case_3")):
            folder = made.add(trainer, folds=(0, 1), npz=False)
            (path,) = folder.glob(f"fold_*/validation/{case}.nii.gz")
            path.unlink()
        arguments = ["compare", "-d", "801", "-tr", STOCK, OURS, "-f", "0", "1", "-np", "1", "-device", "cpu"]
        arguments += ["-o", str(tmp_path / "out")]
        assert cli.main(arguments) == 2
        reported = capsys.readouterr().err
        for trainer, fold, case in ((STOCK, 0, "case_2"), (OURS, 1, "case_3")):
            command = f"nnUNetv2_train {NAME} 3d_fullres {fold} -tr {trainer} -p nnUNetPlans -device cpu --val --npz"
            assert f"{trainer}, fold {fold}, has no prediction of {case}, which" in reported
            assert f"Run: {command}" in reported
        assert not (tmp_path / "out").exists()

        assert cli.main([*arguments, "--intersection"]) == 0
        content = json.loads((tmp_path / "out" / "report.json").read_text())
        assert content["dataset"]["number_of_cases"] == 6
        assert content["dataset"]["left_out"] == ["case_2", "case_3"]
        assert [case["id"] for case in content["cases"]] == [f"case_{number}" for number in (0, 1, 4, 5, 6, 7)]
        for text in ("\n".join(content["warnings"]), (tmp_path / "out" / "report.html").read_text()):
            assert f"{STOCK}, fold 0, has no prediction of case_2, which its summary.json lists. Left out" in text
            assert f"{OURS}, fold 1, has no prediction of case_3, which its summary.json lists. Left out" in text

    def test_folds_are_those_of_the_compared_cases(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        first, second = (made.add(name, folds=(0, 1), npz=False) / "fold_1" / "validation" for name in (STOCK, OURS))
        for path in (*first.glob("case_[13].nii.gz"), *second.glob("case_[57].nii.gz")):
            path.unlink()
        options = CompareOptions(intersection=True, progress=False)
        content = compare_cross_validation(NAME, names(STOCK, OURS), [0, 1], tmp_path / "out", options).content
        assert content["dataset"]["folds"] == [0]
        assert content["dataset"]["number_of_cases"] == 4
        assert any("Only fold 0 is compared" in warning for warning in content["warnings"])

    @pytest.mark.parametrize("intersection", [False, True])
    def test_models_from_zips(
        self, lab: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intersection: bool
    ) -> None:
        """nnU-Net's export contains summary.json, but not the predictions."""
        made = lab()
        for trainer in (STOCK, OURS):
            made.add(trainer, folds=(0, 1))
        from nnunetv2.model_sharing import model_export, model_import

        for module in (model_export, model_import):
            monkeypatch.setattr(module, "nnUNet_results", str(tmp_path / "results"))
        monkeypatch.setattr("nnunetv2.utilities.file_path_utilities.nnUNet_results", str(tmp_path / "results"))
        for variable in ("raw", "preprocessed", "results"):
            for module in ("nnunetv2.utilities.dataset_name_id_conversion", "nnunetv2.paths"):
                monkeypatch.setattr(f"{module}.nnUNet_{variable}", str(tmp_path / variable), raising=False)
        zips = []
        for folder, trainer in zip(made.added, (STOCK, OURS), strict=True):
            for file in (folder / "dataset_fingerprint.json", *(folder / f"fold_{f}" / "progress.png" for f in (0, 1))):
                file.write_text("")
            zips.append(tmp_path / f"{trainer}.zip")
            model_export.export_pretrained_model(NAME, str(zips[-1]), ("3d_fullres",), trainer, folds=(0, 1))
            shutil.rmtree(folder)
        for file in zips:
            model_import.install_model_from_zip_file(str(file))
        options = CompareOptions(intersection=intersection, device="cpu", progress=False)
        with pytest.raises(InputError) as error:
            compare_cross_validation(NAME, names(STOCK, OURS), [0, 1], tmp_path / "out", options)
        assert len(error.value.errors) == 4
        for (trainer, fold), message in zip(itertools.product((STOCK, OURS), (0, 1)), error.value.errors, strict=True):
            assert f"{trainer}, fold {fold}, has none of the 4 predictions" in message
            command = f"nnUNetv2_train {NAME} 3d_fullres {fold} -tr {trainer} -p nnUNetPlans -device cpu --val --npz"
            assert message.endswith(f"Run: {command}")
        assert not (tmp_path / "out").exists()

    def test_images_that_do_not_fit_cost_the_pictures_only(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        for trainer, seed in ((STOCK, 1), (OURS, 2)):
            made.add(trainer, npz=False, seed=seed)
        images = tmp_path / "raw" / NAME / "imagesTr"
        sitk.WriteImage(sitk.Image([5, 6, 7], sitk.sitkFloat32), str(images / "case_0_0000.nii.gz"))
        (images / "case_1_0000.nii.gz").write_bytes(b"no image")
        done = compare_cross_validation(NAME, names(STOCK, OURS), [0], tmp_path / "out", QUIET)
        for case in ("case_0", "case_1"):
            assert any(
                f"No pictures of {case}: " in warning for warning in json.loads(done.json.read_text())["warnings"]
            )
        page = done.report.read_text()
        assert "No pictures of case_0" in page
        assert page.count('class="volumes"') == 6

    def test_no_case_has_a_value(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        for trainer in (STOCK, OURS):
            made.add(trainer)
        for path in [*tmp_path.rglob("case_*.nii.gz"), *tmp_path.rglob("case_*.npz")]:
            if path.parent.name == "imagesTr":
                continue
            if path.suffix == ".npz":
                probabilities = np.zeros((3, *np.load(path)["probabilities"].shape[1:]), np.float32)
                probabilities[0] = 1
                np.savez_compressed(path, probabilities=probabilities)
            else:
                image = sitk.ReadImage(str(path))
                sitk.WriteImage(image * 0, str(path))
        options = CompareOptions(metrics=MetricOptions(empty="nan"), progress=False)
        content = compare_cross_validation(NAME, names(STOCK, OURS), [0], tmp_path / "out", options).content
        assert content["summary"]["m0"]["mean"]["dice"]["mean"] is None
        assert content["disagreements"] == []

    def test_other_labels_are_not_compared(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        made.add(STOCK)
        path = made.add(OURS) / "dataset.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"labels": {"background": 0, "core": 1, "oedema": 2}})
        )
        with pytest.raises(InputError, match=f"{OURS} was trained with the labels"):
            compare_cross_validation(NAME, names(STOCK, OURS), [0], tmp_path / "out", QUIET)


class TestRun:
    def test_makes_what_is_missing(
        self, lab: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = lab()
        made.add(STOCK)
        folder = made.add(OURS, npz=False)
        spare = tmp_path / "spare"
        made.write_predictions(spare, made.cases, 0.3, 1)
        # A stand-in for nnU-Net's command, which writes the same files.
        expected = [NAME, "3d_fullres", "0", "-tr", OURS, "-p", "nnUNetPlans", "-device", "cpu", "--val", "--npz"]
        command = tmp_path / "bin" / "nnUNetv2_train"
        command.parent.mkdir()
        command.write_text(
            f"#!{sys.executable}\nimport pathlib, shutil, sys\n"
            f"assert sys.argv[1:] == {expected!r}, sys.argv\n"
            f"for path in pathlib.Path({str(spare)!r}).glob('*.[np][pk]*'):\n"
            f"    shutil.copy(path, {str(folder / 'fold_0' / 'validation')!r})\n"
        )
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
        options = CompareOptions(run=True, device="cpu", progress=False)
        content = compare_cross_validation(NAME, names(STOCK, OURS), [0], tmp_path / "out", options).content
        assert len(content["models"]) == 3

    def test_probabilities_of_one_beside_a_validation_of_the_other(
        self, lab: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = lab()
        made.add(STOCK, npz=False)
        folder = made.add(OURS)
        summary = folder / "fold_0" / "validation" / "summary.json"
        content = summary.read_text()
        summary.unlink()
        command = tmp_path / "bin" / "nnUNetv2_train"
        command.parent.mkdir()
        command.write_text(
            f"#!{sys.executable}\nimport pathlib, sys\n"
            f"with open({str(tmp_path / 'called')!r}, 'a') as file:\n"
            f"    print(sys.argv[5], file=file)\n"
            f"pathlib.Path({str(summary)!r}).write_text({content!r})\n"
        )
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
        compare_cross_validation(
            NAME, names(STOCK, OURS), [0], tmp_path / "out", CompareOptions(run=True, progress=False)
        )
        assert sorted((tmp_path / "called").read_text().split()) == [STOCK, OURS]

    def test_a_command_that_is_not_known_is_not_run(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        for name in ("a", "b"):
            made.write_predictions(tmp_path / name, made.cases, 0.4, 1, npz=False)
        raw = tmp_path / "raw" / NAME
        with pytest.raises(InputError, match=r"(?s)cannot complete this command.*--model"):
            compare_test_set(
                {"A": tmp_path / "a", "B": tmp_path / "b"},
                raw / "labelsTr",
                raw / "dataset.json",
                tmp_path / "out",
                CompareOptions(run=True, progress=False),
            )

    def test_a_command_that_fails(
        self, lab: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = lab()
        made.add(STOCK)
        made.add(OURS, npz=False)
        command = tmp_path / "bin" / "nnUNetv2_train"
        command.parent.mkdir()
        command.write_text("#!/bin/sh\nexit 3\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
        with pytest.raises(InputError, match="exit code 3"):
            compare_cross_validation(NAME, names(STOCK, OURS), [0], tmp_path / "out", CompareOptions(run=True))


class TestTestSet:
    def test_folders(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab("regions")
        for name, seed in (("a", 1), ("b", 2)):
            made.write_predictions(tmp_path / name, made.cases, 0.4, seed)
            (tmp_path / name / "dataset.json").write_text(json.dumps(made.dataset_json))
            (tmp_path / name / "plans.json").write_text(json.dumps(made.plans))
        raw = tmp_path / "raw" / NAME
        done = compare_test_set(
            {"A": tmp_path / "a", "B": tmp_path / "b"},
            raw / "labelsTr",
            raw / "dataset.json",
            tmp_path / "out",
            QUIET,
            images=raw / "imagesTr",
        )
        assert done.content["dataset"]["kind"] == "test"
        assert [model["name"] for model in done.content["models"]] == ["A", "B", "A + B"]
        assert done.content["cases"][0]["fold"] is None
        assert not done.content["warnings"]

    def test_command_and_intersection(
        self, lab: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = lab()
        made.write_predictions(tmp_path / "a", made.cases[:6], 0.4, 1, npz=False)
        made.write_predictions(tmp_path / "b", made.cases[1:], 0.4, 2, npz=False)
        raw = tmp_path / "raw" / NAME
        arguments = ["compare", "--predictions", f"A={tmp_path / 'a'}", f"B={tmp_path / 'b'}", "-np", "1"]
        arguments += ["--reference", str(raw / "labelsTr"), "-djfile", str(raw / "dataset.json")]
        arguments += ["-o", str(tmp_path / "out")]
        assert cli.main(arguments) == 2
        assert "--intersection" in capsys.readouterr().err
        assert cli.main([*arguments, "--intersection"]) == 0
        assert "5 common cases" in capsys.readouterr().out
        assert len(json.loads((tmp_path / "out" / "report.json").read_text())["cases"]) == 5

    def test_empty_regions(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        for name in ("a", "b"):
            made.write_predictions(tmp_path / name, made.cases, 0.4, 2, npz=False)
        raw = tmp_path / "raw" / NAME
        for path in (raw / "labelsTr" / "case_0.nii.gz", tmp_path / "a" / "case_0.nii.gz"):
            image = sitk.ReadImage(str(path))
            empty = sitk.Image(image.GetSize(), sitk.sitkUInt8)
            empty.CopyInformation(image)
            sitk.WriteImage(empty, str(path))
        done = compare_test_set(
            {"A": tmp_path / "a", "B": tmp_path / "b"}, raw / "labelsTr", raw / "dataset.json", tmp_path / "out", QUIET
        )
        case = done.content["cases"][0]["scores"]
        assert case["m0"]["core"]["dice"] == 1
        assert case["m1"]["core"]["dice"] == 0
        diagonal = math.dist((0, 0, 0), [s * n for s, n in zip((2.5, 1, 1), (10, 14, 12), strict=True)])
        assert case["m1"]["core"]["hd95"] == pytest.approx(diagonal)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected either -d with -tr"),
        (["-d", "801"], "-d needs -tr"),
        (["--predictions", "A=a"], "--predictions needs --reference"),
        (["--predictions", "A", "--reference", "r", "-djfile", "f"], "is not NAME=FOLDER"),
        (["-d", "801", "-tr", "A:"], "is not a model"),
        (["-d", "801", "-tr", "A", "-i", "images", "--model", "A=a"], "-i, --model: only with --predictions"),
        (["-d", "899", "-tr", "A"], "There is no data set 899"),
        (
            ["--predictions", "A=a", "--reference", "r", "-djfile", "nothing.json"],
            "nothing.json cannot be read: No such file",
        ),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, lab: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab()
    assert cli.main(["compare", "-o", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class TestRules:
    @pytest.fixture
    def arguments(self, tmp_path: Path) -> list[str]:
        """Return arguments that compare predictions of two paediatric cases; the second prediction is empty."""
        rng = np.random.default_rng(0)
        for number in range(2):
            labels = np.repeat(np.repeat(rng.integers(0, 5, (4, 5, 6)), 2, 1), 2, 2).astype(np.uint8)
            for folder, array in (("ref", labels), ("pred", np.roll(labels, 1, 1) * (1 - number))):
                (tmp_path / folder).mkdir(exist_ok=True)
                image = sitk.GetImageFromArray(array)
                image.SetSpacing((0.5, 0.8, 3.0))
                sitk.WriteImage(image, str(tmp_path / folder / f"BraTS-PED-0000{number}-000.nii.gz"))
        labels = {"background": 0, "ET": 1, "NETC": 2, "CC": 3, "ED": 4}
        (tmp_path / "dataset.json").write_text(json.dumps({"name": "P", "labels": labels, "file_ending": ".nii.gz"}))
        predictions = ["compare", "--predictions", f"My net={tmp_path / 'pred'}", "--reference", str(tmp_path / "ref")]
        return [*predictions, "-djfile", str(tmp_path / "dataset.json"), "-o", str(tmp_path / "out"), "-np", "1"]

    def test_tables_like_brats_evaluation(
        self, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([*arguments, "--rules", "2026-ped", "--like-brats-evaluation"]) == 0
        assert "BraTS 2026, paediatric (2026-PED), as brats-evaluation 0.0.10 prints" in capsys.readouterr().out
        content = json.loads((tmp_path / "out" / "report.json").read_text())
        assert content["options"]["rules"]["name"] == "2026-PED"
        assert "(2026-PED)" in (tmp_path / "out" / "report.html").read_text()
        assert content["regions"] == ["ET", "NETC", "CC", "ED", "TC", "WT"]
        with (tmp_path / "out" / "brats_evaluation" / "My_net.csv").open() as file:
            first, second, mean, deviation, median = csv.DictReader(file)
        assert [row["subject_id"] for row in (first, mean, deviation, median)] == [
            "BraTS-PED-00000-000.nii.gz",
            "mean",
            "std",
            "median",
        ]
        scores = content["cases"][0]["scores"]["m0"]["NETC"]
        assert float(first["lesionwise_nsd_mean_netc"]) == scores["lesion_surface_dice"]
        assert float(first["all_instance_fn_wt"]) == content["cases"][0]["scores"]["m0"]["WT"]["lesions_missed"]
        # No lesion is matched: the distance is infinite and has no standard deviation.
        assert (second["lesionwise_hd95_mean_et"], second["lesionwise_hd95_std_et"]) == ("inf", "")
        assert (second["global_hd95_et"], mean["lesionwise_hd95_mean_et"]) == ("373.0", "inf")
        pair = [float(row["global_dsc_et"]) for row in (first, second)]
        assert float(mean["global_dsc_et"]) == pytest.approx(np.mean(pair))
        assert float(deviation["global_dsc_et"]) == pytest.approx(np.std(pair, ddof=1))
        assert float(median["global_dsc_et"]) == pytest.approx(np.median(pair))

    def test_rules_without_the_tool(self, arguments: list[str], tmp_path: Path) -> None:
        assert cli.main([*arguments, "--rules", "2024-PED", "--tolerance", "0.5"]) == 0
        content = json.loads((tmp_path / "out" / "report.json").read_text())
        assert content["options"]["tolerance"] == 0.5
        assert "lesion_surface_dice" in {metric["key"] for metric in content["metrics"]}
        assert not (tmp_path / "out" / "brats_evaluation").exists()

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--rules", "2025-MET"], "how lesions were matched was not found"),
            (["--like-brats-evaluation"], "needs --rules of a challenge of 2026"),
            (["--rules", "2023-GLI", "--like-brats-evaluation"], "challenges of 2026 only"),
            (
                ["--rules", "2023-GLI", "--penalty", "3", "--empty", "nan"],
                "--empty, --penalty: set by --rules 2023-GLI",
            ),
            (["--rules", "2026-MET", "--like-brats-evaluation", "--tolerance", "1"], "--tolerance: set by"),
        ],
    )
    def test_what_does_not_fit(
        self, arguments: list[str], tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
