import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnunet_conres import cli
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.residual_maps import (
    ResidualMaps,
    file_parts,
    look_at_file,
    normalise,
    residual_of_image,
    residual_of_labels,
    write_residual_maps,
)

SHAPE = (6, 8, 10)
SPACING = (1.5, 0.75, 2.0)  # x, y, z
REGIONS = {"background": 0, "whole tumor": [1, 2, 3], "core": [2, 3], "enhancing": 3}
DIRECTION = (0.0, -1.0, 0.0, 0.8, 0.0, -0.6, 0.6, 0.0, 0.8)


def save(path: Path, array: np.ndarray, spacing: tuple[float, ...] = SPACING) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin((-11.5, 7.25, 100.0))
    image.SetDirection(DIRECTION)
    SimpleITK.WriteImage(image, str(path))
    return path


def read(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def some_labels(seed: int = 0, highest: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, highest + 1, SHAPE).astype(np.uint8)


def some_image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)


def brute_force(volume: np.ndarray, axis: int) -> np.ndarray:
    """Compute the residual voxel by voxel."""
    residual = np.zeros(volume.shape, np.float64)
    for position in np.ndindex(volume.shape):
        if position[axis] > 0:
            before = list(position)
            before[axis] -= 1
            residual[position] = abs(float(volume[position]) - float(volume[tuple(before)]))
    return residual


def write_json(folder: Path, labels: dict[str, object]) -> Path:
    content = {"channel_names": {"0": "T1"}, "labels": labels, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder / "dataset.json"


def run(source: Path, output: Path, **arguments: object) -> ResidualMaps:
    return write_residual_maps(source, output, progress=False, **arguments)  # type: ignore[arg-type]


def errors_of(source: Path, output: Path, **arguments: object) -> str:
    with pytest.raises(InputError) as error:
        run(source, output, **arguments)
    assert not output.exists() or output == source
    return str(error.value)


@pytest.mark.parametrize("axis", [0, 1, 2])
class TestResiduals:
    def test_of_an_image(self, axis: int) -> None:
        np.testing.assert_allclose(residual_of_image(some_image(), axis), brute_force(some_image(), axis), rtol=1e-5)

    def test_of_regions(self, axis: int) -> None:
        labels = some_labels()
        found = residual_of_labels(labels, {"whole": (1, 2, 3), "core": (2, 3)}, axis)
        for name, values in (("whole", (1, 2, 3)), ("core", (2, 3))):
            np.testing.assert_array_equal(found[name], brute_force(np.isin(labels, values), axis))

    def test_beside_ignored_voxels_it_is_unknown(self, axis: int) -> None:
        labels = some_labels()
        found = residual_of_labels(labels, {"one": (1,)}, axis, ignore_label=3)["one"]
        expected = brute_force(labels == 1, axis)
        touches = (labels == 3) | (np.roll(labels == 3, 1, axis))
        expected[touches] = 0
        np.testing.assert_array_equal(found, expected)
        assert (brute_force(labels == 1, axis) != expected).any()


class TestNormalise:
    @pytest.mark.parametrize("thickness", [0, 3])
    def test_as_nnunet_does(self, thickness: int) -> None:
        from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
        from nnunetv2.preprocessing.normalization.default_normalization_schemes import ZScoreNormalization

        image = np.pad(some_image(), thickness)
        image[thickness : thickness + 2, thickness : thickness + 2, thickness] = 0  # a corner of the box
        cropped, seg, box = crop_to_nonzero(image[None])
        masked = cropped.size < 0.75 * image.size
        assert masked == (thickness > 0)
        scheme = ZScoreNormalization(use_mask_for_norm=masked, intensityproperties={})
        inside = tuple(slice(*extent) for extent in box)
        np.testing.assert_allclose(normalise(image)[inside], scheme.run(cropped[0].copy(), seg[0]), atol=1e-4)
        if masked:
            assert not normalise(image)[:thickness].any()

    def test_nothing_but_zeros(self) -> None:
        assert not normalise(np.zeros(SHAPE)).any()


class TestLookAtFile:
    def test_folder_tells_first_then_values(self, tmp_path: Path) -> None:
        assert look_at_file(save(tmp_path / "imagesTr" / "a_0000.nii.gz", some_labels())).kind == "image"
        assert look_at_file(save(tmp_path / "case" / "a_seg.nii.gz", some_labels())).kind == "labels"
        assert look_at_file(save(tmp_path / "case" / "a_t1.nii.gz", some_image())).kind == "image"
        assert look_at_file(save(tmp_path / "case" / "int.nii.gz", some_image().astype(np.int16))).kind == "image"
        assert look_at_file(save(tmp_path / "case" / "a_0001.nii.gz", 0 * some_labels())).kind == "image"
        assert look_at_file(save(tmp_path / "case" / "pred.nii.gz", 0 * some_labels())).kind == "labels"
        assert look_at_file(tmp_path / "case" / "a_seg.nii.gz", "image").kind == "image"
        assert look_at_file(tmp_path / "case" / "a_seg.nii.gz").values == (0, 1, 2, 3)


class TestWriteResidualMaps:
    @pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
    def test_geometry_is_that_of_the_source(self, tmp_path: Path, ending: str) -> None:
        source = save(tmp_path / "in" / f"case.1_t1{ending}", some_image())
        (done,) = run(source, tmp_path / "out", intensities="raw").files
        assert done.maps["residual"] == tmp_path / "out" / "case.1_t1_residual.nii.gz"
        before, after = SimpleITK.ReadImage(str(source)), SimpleITK.ReadImage(str(done.maps["residual"]))
        assert after.GetSize() == before.GetSize()
        for quantity in ("GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(after, quantity)(), getattr(before, quantity)(), atol=1e-5)
        np.testing.assert_allclose(read(done.maps["residual"]), brute_force(some_image(), 0), rtol=1e-5)
        assert after.GetPixelID() == SimpleITK.sitkFloat32

    def test_image_is_normalised_unless_asked(self, tmp_path: Path) -> None:
        (done,) = run(save(tmp_path / "in" / "a.nii.gz", some_image()), tmp_path / "out").files
        image = some_image()
        expected = brute_force((image - image.mean()) / image.std(), 0)
        np.testing.assert_allclose(read(done.maps["residual"]), expected, atol=1e-4)
        np.testing.assert_allclose(done.means["residual"], expected.mean((1, 2)), rtol=1e-4)

    def test_a_file_per_region_with_its_name(self, tmp_path: Path) -> None:
        labels = save(tmp_path / "data" / "labelsTr" / "a.nii.gz", some_labels())
        write_json(tmp_path / "data", REGIONS)
        result = run(labels, tmp_path / "out")
        (done,) = result.files
        assert {name: path.name for name, path in done.maps.items()} == {
            "whole tumor": "a_residual_whole_tumor.nii.gz",
            "core": "a_residual_core.nii.gz",
            "enhancing": "a_residual_enhancing.nii.gz",
        }
        np.testing.assert_array_equal(read(done.maps["core"]), brute_force(some_labels() > 1, 0))
        content = json.loads((tmp_path / "out" / "residuals.json").read_text())
        assert content["axis"] == result.axis == 0
        assert content["files"][0]["maps"]["core"] == "a_residual_core.nii.gz"
        np.testing.assert_allclose(
            content["files"][0]["mean_per_slice"]["core"], brute_force(some_labels() > 1, 0).mean((1, 2))
        )
        assert done.figure.read_bytes()[:4] == b"\x89PNG"
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            *(path.name for path in done.maps.values()), "a_residual.png", "residuals.json"
        }  # fmt: skip

    def test_labels_by_themselves_without_names(self, tmp_path: Path) -> None:
        (done,) = run(save(tmp_path / "x" / "seg.nii.gz", some_labels(highest=2)), tmp_path / "out").files
        assert list(done.maps) == ["label_1", "label_2"]
        np.testing.assert_array_equal(read(done.maps["label_2"]), brute_force(some_labels(highest=2) == 2, 0))

    def test_names_that_do_not_fit(self, tmp_path: Path) -> None:
        labels = save(tmp_path / "data" / "seg.nii.gz", some_labels(highest=4))
        names = write_json(tmp_path / "data", REGIONS)
        result = run(labels, tmp_path / "out")
        assert "does not name: 4" in result.warnings[0]
        assert list(result.files[0].maps) == ["label_1", "label_2", "label_3", "label_4"]
        text = errors_of(labels, tmp_path / "other", dataset_json=names)
        assert "does not name: 4; pass the dataset.json of its data set" in text

    def test_ignore_label(self, tmp_path: Path) -> None:
        labels = save(tmp_path / "data" / "seg.nii.gz", some_labels(highest=3))
        write_json(tmp_path / "data", {"background": 0, "a": 1, "b": 2, "ignore": 3})
        (done,) = run(labels, tmp_path / "out").files
        assert list(done.maps) == ["a", "b"]
        annotated = some_labels() != 3
        assert not read(done.maps["a"])[~annotated].any()

    def test_case_without_tumour(self, tmp_path: Path) -> None:
        labels = save(tmp_path / "data" / "labelsTr" / "a.nii.gz", 0 * some_labels())
        write_json(tmp_path / "data", REGIONS)
        result = run(labels, tmp_path / "out")
        assert "has no residual" in result.warnings[0]
        for path in result.files[0].maps.values():
            assert not read(path).any()
        assert list(run(labels, tmp_path / "o2", dataset_json=None).files[0].maps) == list(result.files[0].maps)

    def test_brats_case_folder(self, tmp_path: Path) -> None:
        for part in ("t1", "t1ce", "t2", "flair"):
            save(tmp_path / "B_1" / f"B_1_{part}.nii.gz", some_image())
        save(tmp_path / "B_1" / "B_1_seg.nii.gz", np.where(some_labels() == 3, 4, some_labels()).astype(np.uint8))
        (tmp_path / "B_1" / "notes.txt").touch()
        done = run(tmp_path / "B_1", tmp_path / "out").files
        assert [file.kind for file in done] == ["image", "labels", "image", "image", "image"]
        assert list(done[1].maps) == ["label_1", "label_2", "label_4"]

    def test_axis(self, tmp_path: Path) -> None:
        source = save(tmp_path / "in" / "a.nii.gz", some_image(), spacing=(3.0, 1.0, 1.0))
        result = run(source, tmp_path / "out", intensities="raw")
        assert result.axis == 2
        assert "1, 1, 3 mm" in result.axis_reason
        np.testing.assert_allclose(read(result.files[0].maps["residual"]), brute_force(some_image(), 2), rtol=1e-5)
        result = run(source, tmp_path / "out", intensities="raw", axis=1)
        np.testing.assert_allclose(read(result.files[0].maps["residual"]), brute_force(some_image(), 1), rtol=1e-5)

    def test_one_axis_for_a_folder(self, tmp_path: Path) -> None:
        for name, spacing in (("a", (3.0, 1.0, 1.0)), ("b", (1.0, 1.0, 2.0)), ("c", (1.0, 1.0, 2.0))):
            save(tmp_path / "in" / f"{name}.nii.gz", some_image(), spacing=spacing)
        assert run(tmp_path / "in", tmp_path / "out").axis == 0


class TestErrors:
    def test_of_files_are_listed_together(self, tmp_path: Path) -> None:
        folder = tmp_path / "in"
        image = some_image()
        image[1, 2, 3] = np.nan
        save(folder / "nan.nii.gz", image)
        save(folder / "one.nii.gz", some_image()[:1])
        rgb = SimpleITK.GetImageFromArray(np.zeros((*SHAPE, 3), np.uint8), isVector=True)
        SimpleITK.WriteImage(rgb, str(folder / "rgb.mha"))
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(some_image()[0]), str(folder / "flat.mha"))
        four = SimpleITK.GetImageFromArray(np.zeros((2, *SHAPE), np.uint8), isVector=False)
        SimpleITK.WriteImage(four, str(folder / "four.nii"))
        (folder / "broken.nii.gz").write_bytes(b"nothing")
        fine = save(folder / "fine.nii.gz", some_image())
        (folder / "cut.nii.gz").write_bytes(fine.read_bytes()[:-200])
        text = errors_of(folder, tmp_path / "out")
        assert "7 errors" in text
        assert "nan.nii.gz has 1 voxels that are NaN or infinite" in text
        assert "one.nii.gz has a single slice along axis 0 (shape (1, 8, 10))" in text
        assert "rgb.mha has 3 values per voxel" in text
        assert "flat.mha has 2 axes" in text
        assert "four.nii has 4 axes" in text
        assert "broken.nii.gz cannot be read" in text
        assert "cut.nii.gz cannot be read" in text

    def test_missing_and_empty(self, tmp_path: Path) -> None:
        assert "nothing.nii.gz does not exist" in errors_of(tmp_path / "nothing.nii.gz", tmp_path / "out")
        (tmp_path / "empty").mkdir()
        assert "has no file that ends in" in errors_of(tmp_path / "empty", tmp_path / "out")

    def test_same_name_twice(self, tmp_path: Path) -> None:
        save(tmp_path / "in" / "a.nii.gz", some_image())
        save(tmp_path / "in" / "a.mha", some_image())
        assert "several files called a" in errors_of(tmp_path / "in", tmp_path / "out")

    def test_output_is_not_the_input(self, tmp_path: Path) -> None:
        save(tmp_path / "in" / "a.nii.gz", some_image())
        assert "is the folder of the input" in errors_of(tmp_path / "in", tmp_path / "in")

    def test_arguments(self, tmp_path: Path) -> None:
        source = save(tmp_path / "in" / "a.nii.gz", some_image())
        text = errors_of(source, tmp_path / "out", axis=3, kind="video", intensities="log")
        assert "The axis is 3" in text
        assert "The kind is 'video'" in text
        assert "The intensities are 'log'" in text

    def test_image_taken_for_labels(self, tmp_path: Path) -> None:
        source = save(tmp_path / "in" / "a.nii.gz", some_image())
        assert "is not a label file" in errors_of(source, tmp_path / "out", kind="labels")


class TestCommand:
    def test_files_are_listed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = save(tmp_path / "in" / "a.nii.gz", some_image())
        assert cli.main(["residuals", "-i", str(source), "-o", str(tmp_path / "out"), "--axis", "1"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "axis 1, as requested",
            str(tmp_path / "out" / "a_residual.nii.gz"),
            str(tmp_path / "out" / "a_residual.png"),
        ]

    def test_options_of_the_other_kind(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["residuals", "-i", "x", "-o", "y"]
        assert cli.main([*command, "-ref", "z"]) == 2
        assert "-ref needs --model" in capsys.readouterr().err
        assert cli.main([*command, "--model", "m", "--axis", "0", "-djfile", "d"]) == 2
        assert "--axis, -djfile" in capsys.readouterr().err


def test_names_that_files_cannot_tell_apart() -> None:
    assert file_parts(["whole tumour", "whole/tumour", "Core", "core"]) == {
        "whole tumour": "whole_tumour",
        "whole/tumour": "whole_tumour_2",
        "Core": "Core",
        "core": "core_2",
    }
