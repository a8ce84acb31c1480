"""Sparse cases completed by a model that was trained on them, against nnU-Net's prediction."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_conres import cli
from nnunet_conres.datasets.densify import Densification, TrainedModel, densify, merge
from nnunet_conres.errors import InputError
from nnunet_conres.folders import writing
from nnunet_conres.registration import TRAINER_FOLDER, VARIABLE
from nnunet_conres.trainers import nnUNetTrainerConResNet

NAME = nnUNetTrainerConResNet.__name__
IGNORE = 3


@pytest.fixture(autouse=True)
def _found_by_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find the trainers even if the package is in a checkout and not installed."""
    monkeypatch.setenv(VARIABLE, TRAINER_FOLDER)


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(path))


def labels_of(dataset: str) -> Path:
    return Path(os.environ["nnUNet_raw"]) / dataset / "labelsTr"


@pytest.fixture
def sparse(preprocessed: Callable[[str], Path]) -> Callable[[str], str]:
    """Function that returns the name of a data set annotated on slices 2, 3, 10 and 11 only."""

    def make(kind: str) -> str:
        dataset = preprocessed(kind).name
        for path in labels_of(dataset).iterdir():
            image = sitk.ReadImage(path)
            labels = sitk.GetArrayFromImage(image)
            # The data set's third tissue has the ignore label's value.
            labels[labels == IGNORE] = 2
            labels[[index for index in range(len(labels)) if index not in (2, 3, 10, 11)]] = IGNORE
            changed = sitk.GetImageFromArray(labels)
            changed.SetSpacing((1.0, 1.0, 1.0))
            changed.SetOrigin((5.0, -3.0, 2.0))
            sitk.WriteImage(changed, path)
            # Trainers refuse labels that changed after preprocessing, so this copy is changed, too.
            shutil.copy2(path, preprocessed(kind) / "gt_segmentations" / path.name)
        return dataset

    return make


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for trained models, which tests copy before use."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def train(make_trainer: Callable[..., Any], results: Path, models: Path) -> Callable[..., Path]:
    """Function that trains a fold of a data set briefly and returns the model's folder."""

    def make(kind: str, fold: int | str = 0, configuration: str = "3d_fullres") -> Path:
        trainer = make_trainer(nnUNetTrainerConResNet, kind, configuration, fold)
        model, copy = Path(trainer.output_folder_base), models / f"{kind}_{configuration}_{fold}"
        if copy.is_dir():
            shutil.copytree(copy, model, dirs_exist_ok=True)
        else:
            trainer.num_epochs = 1
            trainer.run_training()
            if configuration == "3d_lowres":
                trainer.perform_actual_validation()
            shutil.copytree(
                model,
                copy,
                ignore=lambda folder, names: {
                    n for n in names if n in {f"fold_{f}" for f in (0, 1, "all")} - {f"fold_{fold}"}
                },
            )
        return model

    return make


def run(dataset: str, output: Path, folds: tuple[Any, ...] = (0,), **arguments: Any) -> Densification:
    configuration = arguments.pop("configuration", "3d_fullres")
    defaults = {"device": "cpu", "preprocessing_processes": 0, "export_processes": 0, "progress": False}
    return densify(dataset, TrainedModel(NAME, "nnUNetPlans", configuration, folds), output, **defaults | arguments)


def errors_of(*positional: Any, **arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        run(*positional, **arguments)
    return "\n".join(caught.value.errors)


def predict(model: Path, dataset: str, output: Path, folds: tuple[Any, ...]) -> Path:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    output.mkdir()
    images = str(Path(os.environ["nnUNet_raw"]) / dataset / "imagesTr")
    predictor.predict_from_files_sequential(images, str(output))
    return output


class TestMerge:
    def test_annotated_voxels_are_kept(self) -> None:
        rng = np.random.default_rng(0)
        labels, prediction = rng.integers(0, 4, (4, 5, 6)).astype(np.float32), rng.integers(0, 3, (4, 5, 6), np.uint8)
        merged = merge(labels, prediction, 3)
        assert merged.dtype == np.uint8
        for position in np.ndindex(labels.shape):
            assert merged[position] == (prediction if labels[position] == 3 else labels)[position]

    def test_refuses_what_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"shape \(1, 2, 3\), the prediction \(1, 2, 4\)"):
            merge(np.zeros((1, 2, 3)), np.zeros((1, 2, 4)), 3)
        with pytest.raises(ValueError, match="has the ignore label, 3"):
            merge(np.full((1, 2, 3), 3), np.full((1, 2, 3), 3), 3)


@pytest.mark.parametrize("kind", ["ignore", pytest.param("ignored_regions", marks=pytest.mark.slow)])
def test_annotation_is_kept_and_the_rest_is_nnunets_prediction(
    kind: str,
    sparse: Callable[[str], str],
    train: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = sparse(kind)
    model = train(kind)
    train(kind, fold=1)
    predicted = predict(model, dataset, tmp_path / "predicted", (0, 1))
    done = run(dataset, tmp_path / "dense", (0, 1))
    assert len(done.written) == len(done.cases) == 6
    changed = 0
    for case_id, path in done.files.items():
        annotated, expected = read(labels_of(dataset) / path.name), read(predicted / path.name)
        dense = read(path)
        known = annotated != IGNORE
        np.testing.assert_array_equal(dense[known], annotated[known])
        np.testing.assert_array_equal(dense[~known], expected[~known])
        assert known.any()
        assert IGNORE not in dense
        changed += int((expected[known] != annotated[known]).sum())
        before, after = sitk.ReadImage(labels_of(dataset) / path.name), sitk.ReadImage(path)
        for part in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection", "GetPixelID"):
            assert getattr(before, part)() == getattr(after, part)(), case_id
    assert changed

    # nnUNetv2_evaluate_folder can read the output folder.
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2

    compute_metrics_on_folder2(
        *(str(path) for path in (done.output_folder, done.output_folder)),
        *(str(done.output_folder / f"{part}.json") for part in ("dataset", "plans")),
        num_processes=1,
    )
    summary = json.loads((done.output_folder / "summary.json").read_text())
    assert summary["foreground_mean"]["Dice"] == pytest.approx(1)
    content = json.loads((done.output_folder / "dataset.json").read_text())
    assert "ignore" not in content["labels"]
    assert content.get("regions_class_order") == ([1, 2] if kind == "ignored_regions" else None)
    assert sorted(path.name for path in done.output_folder.iterdir()) == sorted(
        [*(path.name for path in done.files.values()), "dataset.json", "densify.json", "plans.json", "summary.json"]
    )


@pytest.fixture
def trained(sparse: Callable[[str], str], train: Callable[..., Path]) -> tuple[str, Path]:
    """Return a data set and a model with fold 0."""
    dataset = sparse("ignore")
    return dataset, train("ignore")


def test_interrupted_and_continued(
    trained: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnunet_conres.datasets import densify as module

    dataset, _ = trained
    output = tmp_path / "dense"
    write, calls = module._write_case, []

    def full(job: Any) -> str:
        calls.append(job.case.case_id)
        if len(calls) == 3:
            raise OSError("No space left on device")
        return write(job)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_case", full)
        with pytest.raises(OSError, match="No space"):
            run(dataset, output)
    complete = sorted(output.glob("case_*"))
    assert [path.name for path in complete] == ["case_0.nii.gz", "case_1.nii.gz"]
    times = [path.stat().st_mtime_ns for path in complete]
    with writing(output):
        (output / ".case_2.nii.partial-0123abcd.gz").mkdir()
        assert f"{output} is being written by process" in errors_of(dataset, output, existing="continue")
    assert (output / ".case_2.nii.partial-0123abcd.gz").exists()
    assert "is not empty" in errors_of(dataset, output)
    assert "mirroring True there, False now" in errors_of(dataset, output, existing="continue", mirroring=False)
    done = run(dataset, output, existing="continue")
    assert done.written == ("case_2", "case_3", "case_4", "case_5")
    assert [path.stat().st_mtime_ns for path in complete] == times
    assert not list(output.glob(".*"))
    assert run(dataset, output, existing="continue").written == ()

    # Overwriting removes the old files first, so that continuing does not mistake them for new ones.
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_case", full)
        with pytest.raises(OSError, match="No space"):
            run(dataset, output, existing="overwrite")
    assert [path.name for path in sorted(output.glob("case_*"))] == ["case_0.nii.gz", "case_1.nii.gz"]
    # A model that was retrained under the same name counts as another model.
    checkpoint = trained[1] / "fold_0" / "checkpoint_final.pth"
    written = checkpoint.stat().st_mtime
    os.utime(checkpoint, (written + 60, written + 60))
    assert "trained {" in errors_of(dataset, output, existing="continue")
    os.utime(checkpoint, (written, written))
    assert len(run(dataset, output, existing="continue").written) == 4

    # Run the command with worker processes, overwriting everything, and with pictures.
    command = ["densify", "-d", dataset, "-o", str(output), "-tr", NAME, "-c", "3d_fullres", "-f", "0"]
    options = ["-device", "cpu", "--overwrite", "--disable_tta", "-npp", "1", "-nps", "1"]
    before = [read(path) for path in complete]
    reference = tmp_path / "reference"
    shutil.copytree(output, reference)
    assert cli.main([*command, *options, "--figures", "1", "-ref", str(reference)]) == 0
    printed = capsys.readouterr().out
    assert "cases: 6, 6 of them written now" in printed
    assert str(output / "figures" / "case_0.png") in printed
    assert (output / "figures" / "case_0.png").stat().st_size > 10_000
    assert not all((read(path) == array).all() for path, array in zip(complete, before, strict=True))


def test_first_case_failing_leaves_nothing(
    trained: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunet_conres.datasets import densify as module

    def full(job: Any) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_write_case", full)
    with pytest.raises(OSError, match="No space"):
        run(trained[0], tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_cross_validation_uses_the_fold_that_has_not_seen_the_case(
    trained: tuple[str, Path], train: Callable[..., Path], preprocessed: Callable[[str], Path], tmp_path: Path
) -> None:
    dataset, model = trained
    splits = json.loads((preprocessed("ignore") / "splits_final.json").read_text())
    output = tmp_path / "dense"
    errors = errors_of(dataset, output, cross_validation=True)
    assert errors.count("is not a validation case of any of the folds 0") == 6 - len(splits[0]["val"])
    for fold in range(1, 5):
        shutil.copytree(model / "fold_0", model / f"fold_{fold}")
        checkpoint = torch.load(model / f"fold_{fold}/checkpoint_final.pth", weights_only=False)
        for key, value in checkpoint["network_weights"].items():
            if value.is_floating_point():
                checkpoint["network_weights"][key] = value * (1 + 0.2 * fold)
        torch.save(checkpoint, model / f"fold_{fold}/checkpoint_final.pth")
    done = run(dataset, output, (0, 1, 2, 3, 4), cross_validation=True)
    for fold in (0, 3):
        predicted = predict(model, dataset, tmp_path / str(fold), (fold,))
        for case_id in splits[fold]["val"]:
            unknown = read(labels_of(dataset) / f"{case_id}.nii.gz") == IGNORE
            np.testing.assert_array_equal(
                read(done.files[case_id])[unknown], read(predicted / f"{case_id}.nii.gz")[unknown]
            )


@pytest.mark.slow
def test_cascade(sparse: Callable[[str], str], train: Callable[..., Path], results: Path, tmp_path: Path) -> None:
    dataset = sparse("ignore")
    lowres = train("ignore", fold="all", configuration="3d_lowres")
    stage = predict(lowres, dataset, tmp_path / "stage", ("all",))
    train("ignore", configuration="3d_cascade_fullres")
    arguments = {"configuration": "3d_cascade_fullres"}
    errors = errors_of(dataset, tmp_path / "dense", **arguments)
    assert "3d_cascade_fullres is a cascade and needs predictions of 3d_lowres" in errors
    done = run(dataset, tmp_path / "dense", previous_stage_folder=stage, **arguments)
    assert len(done.written) == 6


class TestBadInput:
    def test_everything_at_once(self, trained: tuple[str, Path], tmp_path: Path) -> None:
        dataset, model = trained
        (model / "fold_1").mkdir()
        (model / "fold_1" / "checkpoint_best.pth").touch()
        (tmp_path / "reference").mkdir()
        raw = Path(os.environ["nnUNet_raw"]) / dataset
        hidden = [raw / "imagesTr/case_1_0001.nii.gz", raw / "labelsTr/case_2.nii.gz"]
        for path in hidden:
            path.rename(tmp_path / path.name)
        try:
            errors = errors_of(
                *(dataset, tmp_path / "dense", (0, 1, 2)),
                device="abacus",
                step_size=2.0,
                previous_stage_folder=tmp_path,
                reference_folder=tmp_path / "reference",
            )
        finally:
            for path in hidden:
                (tmp_path / path.name).rename(path)
        for part in (
            "The device is 'abacus'",
            "The step size is 2;",
            f"Fold 1 has no checkpoint_final.pth in {model}, only checkpoint_best.pth",
            f"Fold 2 is not trained: {model / 'fold_2'} has no checkpoint_final.pth. "
            f"Run: nnUNetv2_train {dataset} 3d_fullres 2 -tr {NAME} -p nnUNetPlans",
            "imagesTr/case_1_0001.nii.gz is missing",
            "labelsTr/case_2.nii.gz is missing",
            "3d_fullres is not a cascade",
            "reference/case_0.nii.gz is missing; expected the reference",
        ):
            assert part in errors
        assert not (tmp_path / "dense").exists()

    def test_output_in_the_raw_folder(self, trained: tuple[str, Path]) -> None:
        other = Path(os.environ["nnUNet_raw"]) / "Dataset001_Other" / "labelsTr"
        assert "contains files of a data set" in errors_of(trained[0], other, existing="overwrite")
        assert not other.exists()

    def test_a_case_that_is_gone_altogether(self, trained: tuple[str, Path], tmp_path: Path) -> None:
        raw = Path(os.environ["nnUNet_raw"]) / trained[0]
        hidden = [*raw.glob("imagesTr/case_3_*"), raw / "labelsTr/case_3.nii.gz"]
        for path in hidden:
            path.rename(tmp_path / path.name)
        try:
            errors = errors_of(trained[0], tmp_path / "dense")
        finally:
            for path in hidden:
                (tmp_path / path.name).rename(path)
        assert "has 5 training cases, but numTraining in its dataset.json is 6" in errors

    def test_no_cuda(self, trained: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no CUDA device" in errors_of(trained[0], tmp_path / "dense", device="cuda")

    def test_another_model(self, trained: tuple[str, Path], tmp_path: Path) -> None:
        dataset, model = trained
        for file, key, value, message in (
            ("plans", "dataset_name", "Dataset001_Other", "was trained on Dataset001_Other"),
            ("plans", "plans_name", "otherPlans", "was trained with the plans otherPlans"),
            ("dataset", "labels", {"background": 0}, "was trained when dataset.json had labels {'background': 0}"),
        ):
            path = model / f"{file}.json"
            text = path.read_text()
            path.write_text(json.dumps(json.loads(text) | {key: value}))
            assert message in errors_of(dataset, tmp_path / "dense")
            path.write_text(text)

    def test_damaged_checkpoint(self, trained: tuple[str, Path], tmp_path: Path) -> None:
        dataset, model = trained
        (model / "fold_0/checkpoint_final.pth").write_bytes(b"nothing")
        assert "fold_0/checkpoint_final.pth cannot be read as a checkpoint" in errors_of(dataset, tmp_path / "dense")
        assert not (tmp_path / "dense").exists()

    def test_output_is_the_data_sets_own(self, trained: tuple[str, Path]) -> None:
        errors = errors_of(trained[0], labels_of(trained[0]), existing="overwrite")
        assert "contains files of a data set in" in errors

    def test_no_ignore_label(self, trained: tuple[str, Path], tmp_path: Path) -> None:
        path = labels_of(trained[0]).parent / "dataset.json"
        text = path.read_text()
        content = json.loads(text)
        del content["labels"]["ignore"]
        path.write_text(json.dumps(content))
        try:
            assert "nothing to densify" in errors_of(trained[0], tmp_path / "dense")
        finally:
            path.write_text(text)

    def test_a_word_for_a_fold(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            cli.main(["densify", "-d", "1", "-o", "x", "-c", "3d_fullres", "-f", "first"])
        assert "'first' is not a fold" in capsys.readouterr().err
