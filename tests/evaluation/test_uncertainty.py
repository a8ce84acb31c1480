"""Entropy and disagreement against SciPy and loops; files in the geometry of the image; every error at once."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (as everybody calls it)
from matplotlib.image import imread
from scipy.stats import entropy

from nnunet_conres import cli
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.probabilities import Channels
from nnunet_conres.evaluation.uncertainty import find_predicted, region_numbers, uncertainty_maps, write_uncertainty

LABELS = {"labels": {"background": 0, "oedema": 1, "core": 2, "rim": 3}}
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


def draw(content: dict[str, Any], seed: int, members: int = 3) -> tuple[Channels, list[np.ndarray]]:
    """Draw the probabilities of ensemble members for a volume, some of them 0 and 1."""
    rng = np.random.default_rng(seed)
    meaning = Channels.of_dataset(content)
    shape = (4, 5, 6)
    if meaning.exclusive:
        drawn = [np.moveaxis(rng.dirichlet([0.3] * meaning.count, shape), -1, 0) for _ in range(members)]
    else:
        drawn = [rng.beta(0.4, 0.4, (meaning.count, *shape)) for _ in range(members)]
    for each in drawn:
        each[:, 0] = 0
        each[0, 0] = 1
    return meaning, [each.astype(np.float32) for each in drawn]


class TestMaps:
    def test_of_labels_is_scipys(self) -> None:
        meaning, members = draw(LABELS, 0)
        maps = uncertainty_maps(members, meaning)
        mean = np.mean(members, axis=0, dtype=np.float64)
        expected = entropy(mean, axis=0, base=4)  # base 4: divided by the log of the number of labels
        np.testing.assert_allclose(maps.entropy, expected, atol=1e-5)
        assert not maps.entropy[0].any()
        within = np.mean([entropy(each, axis=0, base=4) for each in members], axis=0)
        np.testing.assert_allclose(maps.mutual_information, expected - within, atol=1e-5)
        # mutual information is also the mean divergence of the members from their mean
        divergence = np.mean([entropy(each, mean, axis=0, base=4) for each in members], axis=0)
        np.testing.assert_allclose(maps.mutual_information, divergence, atol=1e-5)
        labels = np.argmax(mean, axis=0)
        assert np.array_equal(maps.segmentation, labels)
        disagreement = np.mean([np.argmax(each, axis=0) != labels for each in members], axis=0)
        np.testing.assert_allclose(maps.disagreement, disagreement, atol=1e-6)
        for name, value in (("oedema", 1), ("core", 2), ("rim", 3)):
            own = mean[value][labels == value]
            binary = entropy(np.stack([own, 1 - own]), axis=0, base=2)
            assert maps.object_entropy[name] == pytest.approx(binary.mean(), rel=1e-5)

    def test_of_regions_is_scipys(self) -> None:
        meaning, members = draw(REGIONS, 1)
        maps = uncertainty_maps(members, meaning)
        mean = np.mean(members, axis=0, dtype=np.float64)

        def binary(probability: np.ndarray) -> np.ndarray:
            return entropy(np.stack([probability, 1 - probability]), axis=0, base=2)

        np.testing.assert_allclose(maps.entropy, binary(mean).mean(axis=0), atol=1e-5)
        within = np.mean([binary(each.astype(np.float64)).mean(axis=0) for each in members], axis=0)
        np.testing.assert_allclose(maps.mutual_information, binary(mean).mean(axis=0) - within, atol=1e-5)
        for place, name in enumerate(("whole", "core")):
            np.testing.assert_allclose(maps.region_entropy[name], binary(mean[place]), atol=1e-5)
            has = np.isin(maps.segmentation, [1, 2] if name == "whole" else [2])
            assert maps.object_entropy[name] == pytest.approx(binary(mean[place][has]).mean(), rel=1e-4)

    @pytest.mark.parametrize("content", [LABELS, REGIONS])
    def test_ends_of_the_scale(self, content: dict[str, Any]) -> None:
        meaning = Channels.of_dataset(content)
        even = np.full((meaning.count, 2, 2, 2), 1 / meaning.count if meaning.exclusive else 0.5, np.float32)
        assert uncertainty_maps([even], meaning).entropy == pytest.approx(1)
        assert uncertainty_maps([even, even], meaning).mutual_information == pytest.approx(0)
        sure = np.zeros_like(even)
        sure[0] = 1
        other = 1 - sure if not meaning.exclusive else np.roll(sure, 1, axis=0)
        apart = uncertainty_maps([sure, other], meaning)
        share = math.log(2) / math.log(meaning.count) if meaning.exclusive else 1
        assert apart.entropy == pytest.approx(share)
        assert apart.mutual_information == pytest.approx(share)

    def test_numbers_are_those_of_a_loop(self) -> None:
        meaning, members = draw(REGIONS, 2)
        maps = uncertainty_maps(members, meaning)
        numbers = region_numbers(maps, meaning, (2.0, 1.0, 3.0))
        for name, values in meaning.regions.items():
            masks = [np.isin(labels, values) for labels in maps.members]
            dice = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in combinations(masks, 2)]
            sizes = [mask.sum() for mask in masks]
            within = np.isin(maps.segmentation, values)
            assert numbers[name]["volume_ml"] == pytest.approx(within.sum() * 6 / 1000)
            assert numbers[name]["dice_mean"] == pytest.approx(np.mean(dice))
            assert numbers[name]["dice_lowest"] == pytest.approx(min(dice))
            assert numbers[name]["volume_cv"] == pytest.approx(np.std(sizes, ddof=1) / np.mean(sizes))
            assert numbers[name]["disagreement"] == pytest.approx(np.mean([~mask[within] for mask in masks]))
            assert numbers[name]["mutual_information"] == pytest.approx(maps.mutual_information[within].mean())


@pytest.fixture(params=["labels", "regions"])
def folders(lab: Callable[..., Any], request: pytest.FixtureRequest) -> tuple[Any, list[Path]]:
    """Write predictions of three folds for the same images, as nnUNetv2_predict does."""
    made = lab(request.param)
    paths = [made.root / "predicted" / f"fold_{fold}" for fold in range(3)]
    for seed, path in enumerate(paths):
        made.write_predictions(path, made.cases[:3], 0.4, seed)
        (path / "dataset.json").write_text(json.dumps(made.dataset_json))
    return made, paths


class TestFiles:
    def test_geometry_table_and_pictures(self, folders: tuple[Any, list[Path]]) -> None:
        made, paths = folders
        turned = sitk.Euler3DTransform((0, 0, 0), 0.1, 0.2, 0.3).GetMatrix()
        for path in paths:
            image = sitk.ReadImage(str(path / "case_1.nii.gz"))
            image.SetDirection(turned)
            image.SetOrigin((10, -20, 30))
            sitk.WriteImage(image, str(path / "case_1.nii.gz"))
        images = made.root / "raw" / "Dataset801_Models" / "imagesTr"
        out = made.root / "out"
        command = ["uncertainty", "-i", *map(str, paths), "--images", str(images), "-o", str(out), "-np", "1"]
        assert cli.main(command) == 0
        assert not list(out.glob(".*"))
        table = json.loads((out / "uncertainty.json").read_text())
        assert [case["id"] for case in table["cases"]] == ["case_0", "case_1", "case_2"]
        assert table["members"] == [str(path) for path in paths]
        source = sitk.ReadImage(str(paths[0] / "case_1.nii.gz"))
        named = table["cases"][1]["files"]
        assert set(named) >= {"segmentation", "entropy", "mutual_information", "disagreement", "picture"}
        assert ("entropy_core" in named) == (made.kind == "regions")
        for kind, name in named.items():
            if kind == "picture":
                assert imread(out / name)[..., :3].std() > 0.05
                continue
            written = sitk.ReadImage(str(out / name))
            for property_ in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
                assert getattr(written, property_)() == pytest.approx(getattr(source, property_)(), abs=1e-5)
        members = [np.load(path / "case_1.npz")["probabilities"] for path in paths]
        mean = np.mean(members, axis=0)
        expected = (
            entropy(mean, axis=0, base=3)
            if made.kind == "labels"
            else entropy(np.stack([mean, 1 - mean]), axis=0, base=2).mean(axis=0)
        )
        found = sitk.GetArrayFromImage(sitk.ReadImage(str(out / named["entropy"])))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        segmentation = sitk.GetArrayFromImage(sitk.ReadImage(str(out / named["segmentation"])))
        assert np.array_equal(segmentation, made.labels_of(mean))
        rows = list(csv.DictReader((out / "uncertainty.csv").open()))
        assert len(rows) == 3 * 2
        assert float(rows[3]["dice_mean"]) == table["cases"][1]["regions"]["core"]["dice_mean"]

    def test_one_folder_has_entropy_only(self, lab: Callable[..., Any]) -> None:
        made = lab()
        made.write_predictions(made.root / "predicted", made.cases[:1], 0.4, 0)
        (made.root / "predicted" / "dataset.json").write_text(json.dumps(made.dataset_json))
        done = write_uncertainty(find_predicted([made.root / "predicted"]), made.root / "out", progress=False)
        case = done.content["cases"][0]
        assert "disagreement" not in case["files"]
        assert case["regions"]["core"]["dice_mean"] is None
        assert case["regions"]["core"]["entropy"] > 0
        assert "entropy" in done.as_text()

    def test_held_out_cases_of_two_models(self, lab: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
        made = lab()
        made.add("nnUNetTrainer", folds=(0, 1), seed=1, cases=made.cases[:3])
        made.add("nnUNetTrainerConResNet", folds=(0, 1), seed=2, cases=made.cases[:3])
        out = made.root / "out"
        command = ["uncertainty", "-d", "801", "-tr", "nnUNetTrainer", "nnUNetTrainerConResNet", "-f", "0", "1"]
        assert cli.main([*command, "-o", str(out), "-np", "1"]) == 0
        table = json.loads((out / "uncertainty.json").read_text())
        assert len(table["cases"]) == 3
        assert table["members"] == ["nnUNetTrainer", "nnUNetTrainerConResNet"]
        assert "Mean Dice between the members" in capsys.readouterr().out


class TestErrors:
    def test_all_are_named_before_anything_is_written(self, folders: tuple[Any, list[Path]]) -> None:
        made, paths = folders
        (paths[0] / "case_0.nii.gz").unlink()
        (paths[1] / "case_1.npz").unlink()
        (paths[1] / "case_2.npz").write_bytes(b"nonsense")
        np.savez_compressed(paths[2] / "case_2.npz", probabilities=np.zeros((7, 10, 14, 12), np.float32))
        other = made.dataset_json | {"labels": dict(reversed(made.dataset_json["labels"].items()))}
        (paths[2] / "dataset.json").write_text(json.dumps(other))
        with pytest.raises(InputError) as caught:
            find_predicted(paths)
        text = str(caught.value)
        for part in (
            f"{paths[0] / 'case_0.nii.gz'} does not exist",
            f"{paths[1]} has no probabilities of case_1",
            f"{paths[1] / 'case_2.npz'} can't be read",
            f"{paths[2] / 'case_2.npz'} has 7 channels",
            f"in {paths[2] / 'dataset.json'}",
        ):
            assert part in text

    def test_folders(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match=r"gone is not a folder(.|\n)*empty is named twice(.|\n)*-djfile"):
            find_predicted([tmp_path / "empty", tmp_path / "gone", tmp_path / "empty"])
        (tmp_path / "empty" / "dataset.json").write_text(json.dumps(LABELS | {"file_ending": ".nii.gz"}))
        with pytest.raises(InputError, match="--save_probabilities"):
            find_predicted([tmp_path / "empty"])

    def test_a_damaged_case_does_not_cost_the_others(self, folders: tuple[Any, list[Path]]) -> None:
        made, paths = folders
        shape = np.load(paths[1] / "case_1.npz")["probabilities"].shape
        np.savez_compressed(paths[1] / "case_1.npz", probabilities=np.full(shape, np.nan, np.float32))
        with pytest.raises(InputError, match=r"2 of 3 cases are in .*\n.*case_1.npz has values from nan"):
            write_uncertainty(find_predicted(paths), made.root / "out", progress=False)
        table = json.loads((made.root / "out" / "uncertainty.json").read_text())
        assert [case["id"] for case in table["cases"]] == ["case_0", "case_2"]
        with pytest.raises(InputError, match="contains the predictions"):
            write_uncertainty(find_predicted(paths), paths[0], progress=False)

    def test_missing_probabilities_come_with_the_command(
        self, lab: Callable[..., Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = lab()
        made.add("nnUNetTrainer", folds=(0,), npz=False)
        assert (
            cli.main(["uncertainty", "-d", "801", "-tr", "nnUNetTrainer", "-f", "0", "-o", str(made.root / "o")]) == 2
        )
        assert "--val --npz" in capsys.readouterr().err
        assert not (made.root / "o").exists()

    def test_images_of_another_shape(self, folders: tuple[Any, list[Path]]) -> None:
        made, paths = folders
        images = made.root / "images"
        shutil.copytree(made.root / "raw" / "Dataset801_Models" / "imagesTr", images)
        sitk.WriteImage(sitk.Image(4, 4, 4, sitk.sitkFloat32), str(images / "case_0_0000.nii.gz"))
        with pytest.raises(InputError, match=r"case_0_0000\.nii\.gz has shape 4 x 4 x 4; expected 10 x 14 x 12"):
            write_uncertainty(find_predicted(paths, images=images), made.root / "out", progress=False)
