import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from nnunet_conres import cli
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.figures import (
    Legend,
    _border,
    read_legend,
    slices_to_show,
)
from nnunet_conres.evaluation.overlays import overlay_figure, write_overlays

CHANNELS = ("FLAIR", "T1", "T1ce", "T2")
REGIONS = {"whole_tumor": (1, 2, 3), "tumor_core": (2, 3), "enhancing_tumor": (3,)}


def case(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images (4, z, y, x) and nested cuboids: the reference, and the prediction shifted by a voxel."""
    images = np.random.default_rng(seed).integers(1, 500, (4, 10, 16, 12)).astype(np.int16)
    images[:, :, 0] = 0
    labels = np.zeros(images.shape[1:], np.uint8)
    for value, edge in enumerate((2, 3, 4), start=1):
        labels[edge : 10 - edge, edge : 14 - edge, edge : 12 - edge] = value
    return images, labels, np.roll(labels, 1, axis=1)


def lines(figure: Figure, panel: int = 0) -> list[LineCollection]:
    return [item for item in figure.axes[panel].collections if isinstance(item, LineCollection)]


def is_dashed(line: LineCollection) -> bool:
    return line.get_linestyles()[0][1] is not None


def mask_from_paths(paths: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Fill closed paths by the even-odd rule, counting crossings of a ray to the left, voxel by voxel."""
    mask = np.zeros(shape, bool)
    for y in range(shape[0]):
        for x in range(shape[1]):
            crossings = 0
            for path in paths:
                for (x0, y0), (x1, y1) in pairwise(path):
                    crossings += x0 == x1 and x0 < x and min(y0, y1) < y < max(y0, y1)
            mask[y, x] = crossings % 2
    return mask


class TestBorder:
    @pytest.mark.parametrize("seed", range(5))
    def test_encloses_the_mask_and_nothing_else(self, seed: int) -> None:
        mask = np.random.default_rng(seed).random((9, 7)) < 0.5
        paths = _border(mask)
        np.testing.assert_array_equal(mask_from_paths(paths, mask.shape), mask)
        # Each voxel edge between inside and outside occurs once.
        padded = np.pad(mask, 1)
        edges = sum(np.count_nonzero(np.diff(padded.astype(int), axis=axis)) for axis in range(2))
        assert sum(len(path) - 1 for path in paths) == edges
        assert all((path[0] == path[-1]).all() for path in paths)

    def test_one_voxel(self) -> None:
        mask = np.zeros((3, 4), bool)
        mask[1, 2] = True
        (path,) = _border(mask)
        assert {tuple(point) for point in path} == {(1.5, 0.5), (2.5, 0.5), (2.5, 1.5), (1.5, 1.5)}

    def test_nothing(self) -> None:
        assert _border(np.zeros((3, 3), bool)) == []


class TestSlicesToShow:
    def test_largest_area_first_and_kept_apart(self) -> None:
        labels = np.zeros((20, 8, 8), np.uint8)
        for z, area in {2: 3, 9: 7, 10: 8, 11: 7, 16: 4}.items():
            labels[z].flat[:area] = 1
        assert slices_to_show(labels, {"a": (1,)}, number=1) == [10]
        assert slices_to_show(labels, {"a": (1,)}, number=3) == [2, 10, 16]

    def test_reference_counts_too(self) -> None:
        prediction, reference = np.zeros((2, 10, 4, 4), np.uint8)
        prediction[3, 0, 0] = 1
        reference[7, :2] = 1
        assert slices_to_show(prediction, {"a": (1,)}, reference, number=1) == [7]
        assert slices_to_show(prediction, {"a": (1,)}, reference, number=2) == [3, 7]

    def test_only_named_labels_count(self) -> None:
        labels = np.zeros((10, 4, 4), np.uint8)
        labels[1] = 9
        labels[6, 0, 0] = 2
        assert slices_to_show(labels, {"a": (2,)}) == [6]

    def test_slices_with_inner_regions_come_first(self) -> None:
        labels = np.zeros((10, 4, 4), np.uint8)
        labels[2], labels[7, :3] = 1, 3
        assert slices_to_show(labels, {"outer": (1, 3), "inner": (3,)}, number=1) == [7]

    def test_nothing_labelled(self) -> None:
        assert slices_to_show(np.zeros((11, 4, 4), np.uint8), {"a": (1,)}) == [5]


class TestOverlayFigure:
    def test_shows_flair_and_t1ce(self) -> None:
        images, reference, prediction = case()
        figure = overlay_figure(
            images, prediction, regions=REGIONS, reference=reference, channels=CHANNELS, title="case 7"
        )
        shown = slices_to_show(prediction, REGIONS, reference)
        panels = figure.axes
        assert len(panels) == 2 * len(shown)
        for panel, (channel, z) in zip(panels, [(c, z) for c in (0, 2) for z in shown], strict=True):
            np.testing.assert_array_equal(panel.images[0].get_array(), images[channel, z])
            assert [text.get_text() for text in panel.texts] == [f"{CHANNELS[channel]}, slice {z}"]
        assert figure.texts[0].get_text() == "case 7"

    def test_outlines_lie_where_the_regions_are(self) -> None:
        images, reference, prediction = case()
        figure = overlay_figure(images, prediction, regions=REGIONS, reference=reference, number_of_slices=1)
        (z,) = slices_to_show(prediction, REGIONS, reference, 1)
        drawn = [line for line in lines(figure) if to_hex(line.get_colors()[0]) != "#000000"]
        assert len(drawn) == 6
        for line, (values, labels) in zip(
            drawn, [(v, lab) for v in REGIONS.values() for lab in (reference, prediction)], strict=True
        ):
            filled = mask_from_paths([np.asarray(s) for s in line.get_segments()], labels[z].shape)
            np.testing.assert_array_equal(filled, np.isin(labels[z], values))
            assert is_dashed(line) == (labels is prediction)
        assert len({to_hex(line.get_colors()[0]) for line in drawn}) == 3

    def test_dice_in_the_title(self) -> None:
        images, reference, prediction = case()
        figure = overlay_figure(images, prediction, regions=REGIONS, reference=reference)
        true, predicted = reference == 3, prediction == 3
        expected = 2 * (true & predicted).sum() / (true.sum() + predicted.sum())
        assert f"enhancing_tumor {expected:.3f}" in figure.texts[1].get_text()

    def test_a_region_in_neither_has_no_dice(self) -> None:
        images, reference, prediction = case()
        figure = overlay_figure(images, prediction, regions={"other": (7,)}, reference=reference)
        assert figure.texts[1].get_text() == "Dice: other -"

    def test_without_reference(self) -> None:
        images, _, prediction = case()
        figure = overlay_figure(images, prediction, regions=REGIONS, channels=CHANNELS)
        coloured = [line for line in lines(figure) if to_hex(line.get_colors()[0]) != "#000000"]
        assert coloured
        assert all(is_dashed(line) for line in coloured)
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [*REGIONS, "prediction"]

    def test_legend_names_everything(self) -> None:
        images, reference, prediction = case()
        (legend,) = overlay_figure(images, prediction, regions=REGIONS, reference=reference).legends
        assert [text.get_text() for text in legend.get_texts()] == [*REGIONS, "reference", "prediction"]

    def test_one_channel_many_labels_nothing_predicted(self, tmp_path: Path) -> None:
        images, reference, _ = case()
        regions = {f"label {value}": (value,) for value in range(1, 15)}
        figure = overlay_figure(
            images[:1], np.zeros_like(reference), regions=regions, reference=reference, channels=("CT",)
        )
        figure.savefig(tmp_path / "a.png")
        assert figure.axes[0].texts[0].get_text().startswith("CT, slice")

    def test_voxels_keep_their_proportions(self) -> None:
        images, _, prediction = case()
        figure = overlay_figure(images, prediction, regions=REGIONS, spacing=(5.0, 3.0, 1.5))
        assert figure.axes[0].get_aspect() == 2.0

    def test_empty_image(self, tmp_path: Path) -> None:
        images, _, prediction = case()
        figure = overlay_figure(np.zeros_like(images), prediction, regions=REGIONS)
        figure.savefig(tmp_path / "a.png")
        shown = [image.get_array() for panel in figure.axes for image in panel.get_images()]
        assert shown
        assert all(np.isfinite(one).all() for one in shown)

    def test_shapes_must_fit(self) -> None:
        images, reference, prediction = case()
        with pytest.raises(ValueError, match=r"prediction has shape \(9, 16, 12\); expected \(10, 16, 12\)"):
            overlay_figure(images, prediction[1:], regions=REGIONS)
        with pytest.raises(ValueError, match="reference has shape"):
            overlay_figure(images, prediction, regions=REGIONS, reference=reference[:, 1:])
        with pytest.raises(ValueError, match="expected four axes"):
            overlay_figure(images[0], prediction, regions=REGIONS)

    def test_pyplot_knows_nothing_of_it(self) -> None:
        from matplotlib import pyplot

        images, _, prediction = case()
        before = pyplot.get_fignums()
        overlay_figure(images, prediction, regions=REGIONS)
        assert pyplot.get_fignums() == before


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    images, reference, prediction = case()
    for number, image in enumerate(images):
        save(tmp_path / f"images/a_{number:04d}.nii.gz", image)
    save(tmp_path / "references/a.nii.gz", reference)
    save(tmp_path / "predictions/a.nii.gz", prediction)
    content = {
        "channel_names": {str(number): name for number, name in enumerate(CHANNELS)},
        "labels": {"background": 0, **{name: list(values) for name, values in REGIONS.items()}, "ignore": 4},
        "file_ending": ".nii.gz",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return tmp_path


def save(path: Path, array: np.ndarray, direction: tuple[float, ...] = (1, 0, 0, 0, 1, 0, 0, 0, 1)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetDirection(direction)
    SimpleITK.WriteImage(image, str(path))


class TestReadLegend:
    def test_leaves_out_background_and_ignore(self, folders: Path) -> None:
        assert read_legend(folders / "dataset.json") == Legend(CHANNELS, REGIONS, ".nii.gz", 4)

    def test_channels_in_order_of_their_numbers(self, folders: Path) -> None:
        content = json.loads((folders / "dataset.json").read_text())
        content["channel_names"] = {str(n): f"channel {n}" for n in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
        (folders / "dataset.json").write_text(json.dumps(content))
        assert read_legend(folders / "dataset.json").channels[10] == "channel 10"

    def test_another_file(self, folders: Path) -> None:
        (folders / "dataset.json").write_text('{"labels": {}}')
        with pytest.raises(ValueError, match=r"dataset\.json is not the dataset\.json of an nnU-Net data set"):
            read_legend(folders / "dataset.json")

    def test_missing(self, folders: Path) -> None:
        with pytest.raises(InputError, match=r"none\.json does not exist"):
            read_legend(folders / "none.json")


class TestCommand:
    def test_writes_a_picture_per_case(self, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["overlay", "-i", str(folders / "images"), "--predictions", str(folders / "predictions")]
        arguments += ["-djfile", str(folders / "dataset.json"), "-o", str(folders / "out")]
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out.splitlines() == [str(folders / "out" / "a.png")]
        plain = imread(folders / "out" / "a.png")
        assert cli.main([*arguments, "-ref", str(folders / "references")]) == 0
        both = imread(folders / "out" / "a.png")
        # With a reference, scores are written above the slices.
        assert both.shape[0] > plain.shape[0]
        assert both.shape[1] == plain.shape[1]
        assert [path.name for path in (folders / "out").iterdir()] == ["a.png"]

    def test_all_missing_files_are_named(self, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folders / "images/a_0002.nii.gz").unlink()
        (folders / "references/a.nii.gz").unlink()
        arguments = ["overlay", "-i", str(folders / "images"), "--predictions", str(folders / "predictions")]
        arguments += ["-ref", str(folders / "references"), "-djfile", str(folders / "dataset.json")]
        assert cli.main([*arguments, "-o", str(folders / "out")]) == 2
        error = capsys.readouterr().err
        assert str(folders / "images" / "a_0002.nii.gz") in error
        assert str(folders / "references" / "a.nii.gz") in error
        assert not (folders / "out").exists()

    def test_no_prediction(self, folders: Path) -> None:
        legend = read_legend(folders / "dataset.json")
        with pytest.raises(ValueError, match="none: No such file or directory"):
            write_overlays(folders / "images", folders / "none", folders / "out", legend=legend)
        (folders / "none").mkdir()
        (folders / "none" / "._a.nii.gz").write_bytes(b"macOS")
        with pytest.raises(ValueError, match=r"has no file ending in \.nii\.gz"):
            write_overlays(folders / "images", folders / "none", folders / "out", legend=legend)

    def test_hidden_files_are_passed_over(self, folders: Path) -> None:
        (folders / "predictions" / "._a.nii.gz").write_bytes(b"macOS")
        legend = read_legend(folders / "dataset.json")
        written = write_overlays(
            folders / "images", folders / "predictions", folders / "out", legend=legend, progress=False
        )
        assert [path.name for path in written] == ["a.png"]

    def test_ids_that_are_no_names(self, folders: Path) -> None:
        (folders / "predictions/a.nii.gz").rename(folders / "predictions/-a.nii.gz")
        legend = read_legend(folders / "dataset.json")
        with pytest.raises(ValueError, match="has the case id '-a', which begins with -"):
            write_overlays(folders / "images", folders / "predictions", folders / "out", legend=legend)

    def test_sizes_that_do_not_fit_name_the_file(self, folders: Path) -> None:
        save(folders / "predictions/a.nii.gz", np.zeros((3, 4, 5), np.uint8))
        legend = read_legend(folders / "dataset.json")
        with pytest.raises(ValueError, match=r"a\.nii\.gz, its images and its reference do not fit"):
            write_overlays(folders / "images", folders / "predictions", folders / "out", legend=legend, progress=False)

    def test_a_turned_case_gives_the_same_picture(self, folders: Path) -> None:
        """The same head stored with x and y reversed, as BraTS 2023 stores it."""
        legend = read_legend(folders / "dataset.json")
        images, _, prediction = case()
        (first,) = write_overlays(folders / "images", folders / "predictions", folders / "one", legend=legend)
        turned = (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)
        for number, image in enumerate(images):
            save(folders / f"images/a_{number:04d}.nii.gz", image[:, ::-1, ::-1], turned)
        save(folders / "predictions/a.nii.gz", prediction[:, ::-1, ::-1], turned)
        (second,) = write_overlays(folders / "images", folders / "predictions", folders / "two", legend=legend)
        np.testing.assert_array_equal(imread(first), imread(second))
