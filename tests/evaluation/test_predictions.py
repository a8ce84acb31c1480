"""Which models are compared, and which messages incomplete models cause."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nnunet_conres.evaluation.predictions import (
    NamedModel,
    Search,
    display_names,
    iterate_missing,
    other_splits,
    parse_model_names,
    same_cases,
    search_cross_validation,
    search_test_set,
)

NAME = "Dataset801_Models"
STOCK = NamedModel("nnUNetTrainer", "nnUNetPlans", "3d_fullres")
OURS = NamedModel("nnUNetTrainerConResNet", "nnUNetPlans", "3d_fullres")


def find_held_out(names: Sequence[NamedModel], folds: Sequence[int], device: str = "cuda") -> Search:
    return search_cross_validation(NAME, names, folds, device=device)


class TestNames:
    def test_one_plans_for_all(self) -> None:
        names, errors = parse_model_names(["A", "B"], ["P"], ["3d_fullres"])
        assert not errors
        assert names == [NamedModel("A", "P", "3d_fullres"), NamedModel("B", "P", "3d_fullres")]

    def test_one_for_each(self) -> None:
        names, errors = parse_model_names(["A", "B"], ["P", "Q"], ["2d", "3d_lowres"])
        assert not errors
        assert names == [NamedModel("A", "P", "2d"), NamedModel("B", "Q", "3d_lowres")]

    def test_a_trainer_with_its_own(self) -> None:
        names, errors = parse_model_names(["A", "B:Q", "C:R:2d"], ["P"], ["3d_fullres"])
        assert not errors
        assert names == [
            NamedModel("A", "P", "3d_fullres"),
            NamedModel("B", "Q", "3d_fullres"),
            NamedModel("C", "R", "2d"),
        ]

    def test_same_trainer_with_other_plans_is_another_model(self) -> None:
        names, errors = parse_model_names(["A", "A:Q"], ["P"], ["3d_fullres"])
        assert not errors
        assert display_names(names) == ["A P", "A Q"]

    def test_as_the_user_calls_them(self) -> None:
        names, errors = parse_model_names(["ours=A:Q", "B"], ["P"], ["3d_fullres"])
        assert not errors
        assert names[0].folder_name == "A__Q__3d_fullres"
        assert display_names(names) == ["ours", "B P"]
        assert "B is named twice" in parse_model_names(["B=A", "B"], ["P"], ["3d_fullres"])[1][0]
        assert "x is named twice" in parse_model_names(["x=A", "x=B"], ["P"], ["3d_fullres"])[1][0]

    def test_all_errors(self) -> None:
        _, errors = parse_model_names(["A", "A", "B:", "C:D:E:F", "=G"], ["P", "Q"], ["3d_fullres"])
        assert len(errors) == 4
        assert "-p has 2 values for 5 trainers" in errors[0]
        assert "A__P__3d_fullres" in parse_model_names(["A", "A"], ["P"], ["3d_fullres"])[1][0]

    def test_shown_by_trainer_where_that_tells_them_apart(self) -> None:
        assert display_names([STOCK, OURS]) == ["nnUNetTrainer", "nnUNetTrainerConResNet"]


class TestCrossValidation:
    def test_cases_of_all_folds(self, lab: Callable[..., Any]) -> None:
        made = lab()
        made.add(folds=(0, 1))
        found = find_held_out([STOCK], [0, 1])
        (model,) = found.models
        assert found.errors + found.missing + found.missing_probabilities == []
        assert list(model.predictions) == sorted(made.cases)
        assert {model.predictions[case].fold for case in made.cases} == {0, 1}
        assert all(prediction.labels.is_file() for prediction in model.predictions.values())

    def test_a_fold_that_is_not_trained(self, lab: Callable[..., Any]) -> None:
        lab().add(folds=(0,))
        found = find_held_out([STOCK, OURS], [0, 3], device="cpu")
        assert not found.models
        assert len(found.errors) == 3
        command = f"nnUNetv2_train {NAME} 3d_fullres 3 -tr nnUNetTrainer -p nnUNetPlans -device cpu --npz"
        assert command in found.errors[0]

    def test_plans_that_do_not_exist(self, lab: Callable[..., Any]) -> None:
        lab().add()
        (error,) = find_held_out([NamedModel("nnUNetTrainer", "nope", "3d_fullres")], [0, 1]).errors
        assert "there are no plans nope" in error

    def test_a_trainer_that_is_mistyped(self, lab: Callable[..., Any]) -> None:
        """No training command is suggested: it would fail."""
        lab().add()
        (error,) = find_held_out([NamedModel("nnUNetTrainerConResnet", "nnUNetPlans", "3d_fullres")], [0, 1]).errors
        assert error.endswith("; did you mean nnUNetTrainerConResNet?")
        assert "nnUNetv2_train" not in error

    def test_a_validation_that_was_interrupted(self, lab: Callable[..., Any]) -> None:
        folder = lab().add()
        (folder / "fold_0" / "validation" / "summary.json").unlink()
        found = find_held_out([STOCK], [0])
        assert not found.models
        assert not found.errors
        (missing,) = iterate_missing(found, probabilities=False)
        assert missing.command[0] == "nnUNetv2_train"
        assert missing.command[-2:] == ("--val", "--npz")

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"metric_per_case": 3}'])
    def test_a_summary_that_is_damaged(self, lab: Callable[..., Any], content: str) -> None:
        folder = lab().add()
        (folder / "fold_0" / "validation" / "summary.json").write_text(content)
        (missing,) = find_held_out([STOCK], [0]).missing
        assert "summary.json is missing or damaged" in missing.what

    def test_a_prediction_that_is_gone(self, lab: Callable[..., Any]) -> None:
        folder = lab().add(folds=(0, 1))
        for case in ("case_2", "case_6"):
            (folder / "fold_0" / "validation" / f"{case}.nii.gz").unlink()
        found = find_held_out([STOCK], [0, 1], "cpu")
        (gap,) = found.gaps
        assert not found.missing
        assert gap.cases == ("case_2", "case_6")
        assert "nnUNetTrainer, fold 0, has no prediction of case_2, case_6, which its summary.json lists" in gap.as_text
        assert gap.as_text.endswith(
            f"Run: nnUNetv2_train {NAME} 3d_fullres 0 -tr nnUNetTrainer -p nnUNetPlans -device cpu --val --npz"
        )
        assert gap in iterate_missing(found, probabilities=False)

    def test_a_summary_from_windows(self, lab: Callable[..., Any]) -> None:
        made = lab()
        folder = made.add() / "fold_0" / "validation"
        files = [{"prediction_file": f"C:\\results\\validation\\{case}.nii.gz"} for case in made.cases]
        (folder / "summary.json").write_text(json.dumps({"metric_per_case": files}))
        found = find_held_out([STOCK], [0])
        assert found.errors + found.missing + found.gaps == []
        assert list(found.models[0].predictions) == list(made.cases)

    def test_a_fold_without_any_prediction(self, lab: Callable[..., Any]) -> None:
        folder = lab().add(folds=(0, 1))
        for path in (folder / "fold_1" / "validation").glob("case_*"):
            path.unlink()
        found = find_held_out([STOCK], [0, 1])
        assert not found.models
        (missing,) = found.missing
        assert "fold 1, has none of the 4 predictions" in missing.what
        assert missing.command[3] == "1"
        assert missing.command[-2:] == ("--val", "--npz")

    def test_a_prediction_that_was_not_validated(self, lab: Callable[..., Any]) -> None:
        made = lab()
        folder = made.add() / "fold_0" / "validation"
        made.write_summary(folder, made.cases[1:])
        (missing,) = find_held_out([STOCK], [0]).missing
        assert "has case_0, which its summary.json does not list" in missing.what
        assert not missing.is_known  # a validation would also list cases that the fold did not hold out
        assert "--val --npz" in missing.as_text

    def test_no_checkpoint_to_predict_with(self, lab: Callable[..., Any]) -> None:
        folder = lab().add()
        (folder / "fold_0" / "validation" / "case_1.nii.gz").unlink()
        (folder / "fold_0" / "checkpoint_final.pth").unlink()
        (gap,) = find_held_out([STOCK], [0]).gaps
        assert not gap.is_known
        assert "There is no" in gap.as_text
        assert gap.as_text.endswith("-device cuda --npz")

    def test_a_validation_would_predict_training_cases(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        folder = made.add(folds=(0, 1), npz=False)
        splits = [{"train": made.cases[1::2], "val": made.cases[::2]}, {"train": made.cases[:4], "val": made.cases[4:]}]
        (tmp_path / "preprocessed" / NAME / "splits_final.json").write_text(json.dumps(splits))
        (folder / "fold_0" / "validation" / "case_0.nii.gz").unlink()
        (folder / "fold_1" / "validation" / "case_1.nii.gz").unlink()
        same, other = find_held_out([STOCK], [0, 1]).gaps
        assert same.is_known
        assert not other.is_known
        assert "splits_final.json differs from the splits of the model's training" in other.as_text
        probabilities = find_held_out([STOCK], [0, 1]).missing_probabilities
        assert [missing.is_known for missing in probabilities] == [True, False]

    def test_data_that_are_not_preprocessed_here(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        folder = lab().add()
        (folder / "fold_0" / "validation" / "case_1.nii.gz").unlink()
        (tmp_path / "preprocessed" / NAME / "nnUNetPlans.json").unlink()
        (gap,) = find_held_out([STOCK], [0]).gaps
        assert not gap.is_known
        assert "not preprocessed here" in gap.as_text

    def test_probabilities_that_were_not_kept(self, lab: Callable[..., Any]) -> None:
        lab().add(npz=False)
        found = find_held_out([STOCK], [0])
        assert len(found.models) == 1
        assert not list(iterate_missing(found, probabilities=False))
        (missing,) = iterate_missing(found, probabilities=True)
        assert "--npz" in missing.as_text

    def test_a_case_in_two_folds(self, lab: Callable[..., Any]) -> None:
        made = lab()
        folder = made.add(folds=(0, 1))
        shutil.copy(folder / "fold_0" / "validation" / "case_0.nii.gz", folder / "fold_1" / "validation")
        made.write_summary(folder / "fold_1" / "validation", ["case_0", *made.cases[1::2]])
        assert "case_0 in more than one fold" in find_held_out([STOCK], [0, 1]).errors[0]

    def test_results_not_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("nnUNet_results", raising=False)
        assert "nnUNet_results is not set" in find_held_out([STOCK], [0]).errors[0]


class TestTestSet:
    def test_folders(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        trained = made.add(folds=(0, 2))
        for name in ("a", "b"):
            made.write_predictions(tmp_path / name, made.cases, 0.3, 1, npz=name == "a")
        (tmp_path / "b" / "predict_from_raw_data_args.json").write_text(
            json.dumps({"list_of_lists_or_source_folder": "/images of b"})
        )
        found = search_test_set({"A": tmp_path / "a", "B": tmp_path / "b"}, {"B": trained}, ".nii.gz", device="cuda")
        assert not found.errors
        assert [model.key for model in found.models] == ["m0", "m1"]
        assert found.models[1].model == STOCK
        assert found.models[1].folds == (0, 2)
        (missing,) = found.missing_probabilities
        assert missing.command[0] == "nnUNetv2_predict_from_modelfolder"
        assert "'/images of b'" in missing.as_text
        assert missing.command[-3:] == ("-device", "cuda", "--save_probabilities")
        assert missing.is_known
        (missing,) = search_test_set({"B": tmp_path / "b"}, {}, ".nii.gz", device="cpu").missing_probabilities
        assert "cpu" in missing.command
        assert not missing.is_known

    def test_errors(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        folders = {"A": tmp_path / "none", "B": tmp_path / "empty"}
        errors = search_test_set(folders, {"C": tmp_path}, ".nii.gz", device="cpu").errors
        assert len(errors) == 3

    def test_not_a_model_folder(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        made = lab()
        made.write_predictions(tmp_path / "a", made.cases, 0.3, 1)
        found = search_test_set({"A": tmp_path / "a"}, {"A": tmp_path}, ".nii.gz", device="cpu")
        assert "not the folder of a trained model" in found.errors[0]


class TestSameCases:
    def test_other_splits_are_refused(self, lab: Callable[..., Any]) -> None:
        made = lab()
        made.add(cases=made.cases[:5])
        made.add("nnUNetTrainerConResNet", cases=made.cases[2:])
        models = find_held_out([STOCK, OURS], [0]).models
        cases, errors = same_cases(models, made.cases, intersection=False)
        assert cases == list(made.cases[2:5])
        assert any("trained on different splits" in error for error in errors)
        assert any("case_0" in error for error in errors)
        assert same_cases(models, made.cases, intersection=True) == (list(made.cases[2:5]), [])

    def test_same_cases_in_other_folds(self, lab: Callable[..., Any]) -> None:
        made = lab()
        made.add(folds=(0, 1))
        made.add("nnUNetTrainerConResNet", folds=(1, 0))
        models = find_held_out([STOCK, OURS], [0, 1]).models
        _, (error,) = same_cases(models, made.cases, intersection=False)
        assert "nnUNetTrainerConResNet and nnUNetTrainer held case_0" in error
        assert "--intersection" in error
        assert same_cases(models, made.cases, intersection=True) == (list(made.cases), [])
        assert other_splits(models) == ["nnUNetTrainerConResNet"]
        assert other_splits([models[0], models[0]]) == []

    def test_nothing_in_common(self, lab: Callable[..., Any]) -> None:
        made = lab()
        made.add(cases=made.cases[:4])
        made.add("nnUNetTrainerConResNet", cases=made.cases[4:])
        models = find_held_out([STOCK, OURS], [0]).models
        assert "no case in common" in same_cases(models, made.cases, intersection=True)[1][-1]

    def test_a_reference_is_missing(self, lab: Callable[..., Any]) -> None:
        made = lab()
        made.add()
        models = find_held_out([STOCK], [0]).models
        _, (error,) = same_cases(models, made.cases[1:], intersection=False)
        assert "no reference segmentation for case_0" in error
