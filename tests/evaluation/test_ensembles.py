"""Averaged probabilities, against nnU-Net's ensemble of two models and a loop over any number."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (as everybody calls it)
from nnunetv2.ensembling.ensemble import ensemble_folders

from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.ensembles import build_ensemble, ensemble_members, settings_differences
from nnunet_conres.evaluation.predictions import Contender, NamedModel, search_cross_validation

NAME = "Dataset801_Models"


@pytest.fixture(params=["labels", "regions"])
def trained(lab: Callable[..., Any], request: pytest.FixtureRequest) -> tuple[Any, list[Contender]]:
    made = lab(request.param)
    names = []
    for number, trainer in enumerate(("A", "B", "C")):
        made.add(trainer, blur=0.6, seed=number)
        names.append(NamedModel(trainer, "nnUNetPlans", "3d_fullres"))
    return made, search_cross_validation(NAME, names, [0], device="cpu").models


def voxels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def build(made: Any, members: list[Contender], folder: Path, **kwargs: Any) -> Contender:
    return build_ensemble("e0", members, made.cases, folder, settings_folder=made.added[0], progress=False, **kwargs)


class TestAverage:
    def test_of_three_is_the_mean(self, trained: tuple[Any, list[Contender]], tmp_path: Path) -> None:
        made, models = trained
        ensemble = build(made, models, tmp_path / "e")
        assert ensemble.members == ("m0", "m1", "m2")
        assert ensemble.name == "A + B + C"
        differs = 0
        for case in made.cases:
            mean = sum(made.probabilities(case, 0.6, seed).astype(np.float64) for seed in range(3)) / 3
            written = voxels(ensemble.predictions[case].labels)
            np.testing.assert_array_equal(written, made.labels_of(mean))
            differs += int((written != voxels(models[0].predictions[case].labels)).sum())
        assert differs > 0

    def test_of_two_is_nnunets_own(self, trained: tuple[Any, list[Contender]], tmp_path: Path) -> None:
        made, models = trained
        ensemble = build(made, models[:2], tmp_path / "e")
        folders = [str(folder / "fold_0" / "validation") for folder in made.added[:2]]
        settings = made.added[0]
        ensemble_folders(
            folders,
            str(tmp_path / "theirs"),
            num_processes=1,
            dataset_json_file_or_dict=str(settings / "dataset.json"),
            plans_json_file_or_dict=str(settings / "plans.json"),
        )
        for case in made.cases:
            ours, theirs = (sitk.ReadImage(str(f / f"{case}.nii.gz")) for f in (tmp_path / "e", tmp_path / "theirs"))
            np.testing.assert_array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs))
            assert ours.GetSpacing() == theirs.GetSpacing()
            assert case in ensemble.predictions

    def test_all_pairs_and_the_whole(self, trained: tuple[Any, list[Contender]]) -> None:
        _, models = trained
        members = [tuple(model.name for model in chosen) for chosen in ensemble_members(models)]
        assert members == [("A", "B"), ("A", "C"), ("B", "C"), ("A", "B", "C")]
        assert len(ensemble_members(models[:2])) == 1
        assert ensemble_members(models[:1]) == []


class TestResumed:
    def test_only_what_changed_is_made_again(self, trained: tuple[Any, list[Contender]], tmp_path: Path) -> None:
        made, models = trained
        ensemble = build(made, models[:2], tmp_path / "e")
        times = {case: ensemble.predictions[case].labels.stat().st_mtime_ns for case in made.cases}
        ensemble.predictions["case_3"].labels.unlink()
        made.write_predictions(made.added[0] / "fold_0" / "validation", ["case_5"], 0.9, 7)
        again = build(made, models[:2], tmp_path / "e")
        changed = {case for case in made.cases if again.predictions[case].labels.stat().st_mtime_ns != times[case]}
        assert changed == {"case_3", "case_5"}
        mean = (made.probabilities("case_5", 0.9, 7).astype(np.float64) + made.probabilities("case_5", 0.6, 1)) / 2
        np.testing.assert_array_equal(voxels(again.predictions["case_5"].labels), made.labels_of(mean))

    def test_a_label_map_that_was_damaged_is_made_again(
        self, trained: tuple[Any, list[Contender]], tmp_path: Path
    ) -> None:
        made, models = trained
        path = build(made, models[:2], tmp_path / "e").predictions["case_1"].labels
        whole = voxels(path)
        path.write_bytes(b"")
        build(made, models[:2], tmp_path / "e")
        np.testing.assert_array_equal(voxels(path), whole)

    def test_a_broken_note_of_what_was_done(self, trained: tuple[Any, list[Contender]], tmp_path: Path) -> None:
        made, models = trained
        build(made, models[:2], tmp_path / "e")
        (tmp_path / "e" / "sources.json").write_text("{")
        assert len(build(made, models[:2], tmp_path / "e").predictions) == len(made.cases)


class TestRefused:
    @pytest.mark.parametrize("what", ["shape", "nan", "truncated", "no properties"])
    def test_unfit_probabilities(self, lab: Callable[..., Any], tmp_path: Path, what: str) -> None:
        made = lab()
        names = []
        for trainer in ("A", "B"):
            made.add(trainer)
            names.append(NamedModel(trainer, "nnUNetPlans", "3d_fullres"))
        path = made.added[1] / "fold_0" / "validation" / "case_2.npz"
        if what == "shape":
            np.savez_compressed(path, probabilities=np.zeros((3, 4, 4, 4), np.float32))
        elif what == "nan":
            np.savez_compressed(path, probabilities=np.full((3, 10, 14, 12), np.nan, np.float32))
        elif what == "truncated":
            path.write_bytes(path.read_bytes()[:200])
        else:
            path = made.added[0] / "fold_0" / "validation" / "case_2.pkl"
            path.unlink()
        models = search_cross_validation(NAME, names, [0], device="cpu").models
        with pytest.raises(InputError, match=path.name):
            build(made, models, tmp_path / "e")
        assert not (tmp_path / "e" / "case_2.nii.gz").exists()

    def test_a_pickle_that_runs_code(self, trained: tuple[Any, list[Contender]], tmp_path: Path) -> None:
        made, models = trained

        class Touch:
            def __reduce__(self) -> Any:
                return os.mknod, (str(tmp_path / "made"),)

        path = made.added[0] / "fold_0" / "validation" / "case_2.pkl"
        path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | {"more": Touch()}))
        with pytest.raises(InputError, match=r"case_2.pkl contains posix.mknod"):
            build(made, models, tmp_path / "e")
        assert not (tmp_path / "made").exists()
        assert not (tmp_path / "e" / "case_2.nii.gz").exists()

    @pytest.mark.parametrize(
        ("file", "entry", "value"),
        [
            ("dataset.json", "labels", {"background": 0, "core": 1, "oedema": 2}),
            ("plans.json", "image_reader_writer", "NibabelIO"),
        ],
    )
    def test_other_meanings(self, lab: Callable[..., Any], file: str, entry: str, value: Any) -> None:
        made = lab()
        names = [NamedModel(trainer, "nnUNetPlans", "3d_fullres") for trainer in ("A", "B")]
        for name in names:
            made.add(name.trainer)
        path = made.added[1] / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
        models = search_cross_validation(NAME, names, [0], device="cpu").models
        (error,) = settings_differences(models, {model.key: model.folder for model in models})
        assert entry in error
        path.unlink()
        (error,) = settings_differences(models, {model.key: model.folder for model in models})
        assert file in error
