import json
import multiprocessing.dummy
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile

from nnunet_conres import cli
from nnunet_conres.datasets import sparse
from nnunet_conres.datasets.sparse import SIDECAR, SlabRule, Sparsification, slice_axis, sparsify
from nnunet_conres.errors import InputError

LABELS = {"background": 0, "oedema": 1, "necrosis": 2}
REGIONS = {"background": 0, "whole tumor": [1, 2], "tumor core": 2}
SHAPE = (14, 12, 10)
SOURCE = "Dataset007_Thing"


def write_volume(path: Path, array: np.ndarray, spacing: tuple[float, ...] = (1, 1, 1)) -> None:
    """Write a volume with this spacing along (z, y, x), and an origin and oblique direction that must be kept."""
    if path.suffix == ".tif":
        tifffile.imwrite(path, array)
        stem = path.stem if path.parent.name.startswith("labels") else path.stem[:-5]
        path.with_name(f"{stem}.json").write_text(json.dumps({"spacing": list(spacing)}))
        return
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((-11.5, 7.25, 100.0))
    image.SetDirection((0.0, -1.0, 0.0, 0.8, 0.0, -0.6, 0.6, 0.0, 0.8))
    sitk.WriteImage(image, path)


def write_source(
    raw: Path,
    *,
    cases: int = 3,
    ending: str = ".nii.gz",
    labels: dict[str, Any] = LABELS,
    spacing: tuple[float, ...] = (1, 1, 1),
    shape: tuple[int, ...] = SHAPE,
    name: str = SOURCE,
    **dataset: Any,
) -> Path:
    folder = raw / name
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    for number in range(cases):
        rng = np.random.default_rng(number)
        for channel in range(2):
            image = rng.normal(size=shape).astype(np.float32)
            write_volume(folder / f"imagesTr/case_{number}_{channel:04d}{ending}", image, spacing)
        write_volume(folder / f"labelsTr/case_{number}{ending}", rng.integers(0, 3, shape).astype(np.uint8), spacing)
    content = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": labels,
        "numTraining": cases,
        "file_ending": ending,
    } | dataset
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def read(path: Path) -> np.ndarray:
    return tifffile.imread(path) if path.suffix == ".tif" else sitk.GetArrayFromImage(sitk.ReadImage(path))


def run(rule: SlabRule | None = None, source: int | str = 7, target: int = 8, **arguments: Any) -> Sparsification:
    return sparsify(source, target, rule or SlabRule(every=5), progress=False, **arguments)


def errors_of(rule: SlabRule | None = None, **arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        run(rule, **arguments)
    return "\n".join(caught.value.errors)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / "nn" / name).mkdir(parents=True)
        monkeypatch.setenv(name, str(tmp_path / "nn" / name))
    return tmp_path / "nn" / "nnUNet_raw"


def slabs_of(slices: tuple[int, ...]) -> list[int]:
    """Return the thickness of each run of neighbouring slices."""
    gaps = [0, *(number for number, (a, b) in enumerate(pairwise(slices), start=1) if b != a + 1), len(slices)]
    return [b - a for a, b in pairwise(gaps)]


class TestSlabRule:
    @pytest.mark.parametrize("slab", [1, 2, 3])
    @pytest.mark.parametrize("every", [4, 5, 9])
    def test_every(self, every: int, slab: int) -> None:
        firsts = set()
        for case in range(60):
            depth = 30 + case % 3
            slices = SlabRule(every=every, slab=slab).annotated_slices(f"case {case}", depth)
            starts = slices[::slab]
            firsts.add(starts[0])
            assert slices == tuple(start + offset for start in starts for offset in range(slab))
            assert all(b - a == every for a, b in pairwise(starts))
            assert starts[0] < every
            assert depth - (slices[-1] + 1) < every
        assert firsts == set(range(every))

    @pytest.mark.parametrize(("slices", "slab"), [(1, 1), (3, 1), (2, 2), (3, 2), (6, 2), (7, 2), (9, 3), (29, 2)])
    def test_slices_are_exactly_so_many_in_whole_slabs(self, slices: int, slab: int) -> None:
        for case in range(30):
            chosen = SlabRule(slices=slices, slab=slab).annotated_slices(str(case), 30)
            assert len(chosen) == slices
            assert list(chosen) == sorted(set(chosen))
            assert chosen[0] >= 0
            assert chosen[-1] < 30
            assert min(slabs_of(chosen)) >= slab

    def test_slices_at_most_all(self) -> None:
        assert SlabRule(slices=8).annotated_slices("a", 5) == (0, 1, 2, 3, 4)

    def test_slices_are_spread(self) -> None:
        """Four slabs of 2 in 40 slices. Each is drawn from the middle half of its quarter, which limits the gaps."""
        firsts = set()
        for case in range(50):
            starts = np.array(SlabRule(slices=8).annotated_slices(str(case), 40)[::2])
            firsts.add(int(starts[0]))
            assert np.diff(starts).min() >= 2 + 33 // 8
            assert np.diff(starts).max() <= 2 + 33 * 3 // 8 + 1
            assert starts[0] <= 6
            assert starts[-1] >= 40 - 9
        assert firsts == {2, 3, 4, 5}

    @pytest.mark.parametrize(
        ("fraction", "slab", "depth", "expected"),
        [(0.2, 2, 40, 8), (0.1, 2, 40, 4), (0.01, 2, 40, 2), (0.25, 1, 40, 10), (0.99, 3, 10, 9), (0.3, 2, 25, 8)],
    )
    def test_fraction_is_rounded_to_whole_slabs(self, fraction: float, slab: int, depth: int, expected: int) -> None:
        slices = SlabRule(fraction=fraction, slab=slab).annotated_slices("a", depth)
        assert len(slices) == expected
        assert min(slabs_of(slices)) >= slab

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_a_case_no_thicker_than_a_slab_keeps_all(self, depth: int) -> None:
        for rule in (SlabRule(every=9, slab=3), SlabRule(slices=3, slab=3), SlabRule(fraction=0.1, slab=3)):
            assert rule.annotated_slices("a", depth) == tuple(range(depth))

    def test_same_seed_same_slices_for_ever(self) -> None:
        """Other versions of Python, NumPy and this package must draw these same slices."""
        assert SlabRule(every=10).annotated_slices("hippocampus_001", 35) == (2, 3, 12, 13, 22, 23, 32, 33)
        assert SlabRule(every=10, seed=1).annotated_slices("hippocampus_001", 35) != (2, 3, 12, 13, 22, 23, 32, 33)

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            (SlabRule(), "None given; expected exactly one"),
            (SlabRule(every=5, slices=4), "every, slices given; expected exactly one"),
            (SlabRule(every=5, slab=0), "The slab is 0 slices"),
            (SlabRule(every=2), "in every 2 slices annotates all slices; expected more than 2"),
            (SlabRule(every=-3, slab=1), "in every -3 slices"),
            (SlabRule(slices=1), "1 slices per case are fewer than a slab of 2"),
            (SlabRule(fraction=0.0), "The fraction is 0; expected above 0 and below 1"),
            (SlabRule(fraction=1.0), "The fraction is 1;"),
            (SlabRule(fraction=float("nan")), "The fraction is nan;"),
            (SlabRule(every=5, seed=-1), "The seed is -1"),
        ],
    )
    def test_what_is_wrong(self, rule: SlabRule, message: str) -> None:
        assert message in "\n".join(rule.errors())
        with pytest.raises(ValueError, match="expected"):
            rule.annotated_slices("a", 20)


class TestSliceAxis:
    @pytest.mark.parametrize(
        ("spacings", "axis"),
        [
            ([(1, 1, 1)], 0),
            ([(1, 3, 1)], 1),
            ([(1, 2, 2)], 1),
            ([(5, 1, 1), (1, 1, 2), (1, 1, 2)], 2),
            ([(999, 1, 1)], 0),
        ],
    )
    def test_largest_median_spacing(self, spacings: list[tuple[float, ...]], axis: int) -> None:
        assert slice_axis(spacings) == axis


class TestSparsify:
    @pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".tif"])
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_annotated_slices_keep_their_labels_and_all_others_have_none(
        self, raw: Path, ending: str, axis: int
    ) -> None:
        source = write_source(raw, ending=ending, spacing=(2.0, 1.0, 0.5))
        done = run(axis=axis)
        assert done.dataset_folder == raw / "Dataset008_ThingSparse"
        for number in range(3):
            before = read(source / f"labelsTr/case_{number}{ending}")
            after = read(done.dataset_folder / f"labelsTr/case_{number}{ending}")
            kept = done.annotated[f"case_{number}"]
            assert 2 <= len(kept) < SHAPE[axis]
            for position in np.ndindex(SHAPE):
                assert after[position] == (before[position] if position[axis] in kept else 3)

    @pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
    def test_geometry(self, raw: Path, ending: str) -> None:
        source = write_source(raw, ending=ending, spacing=(2.0, 1.0, 0.5))
        done = run()
        before, after = (
            sitk.ReadImage(folder / f"labelsTr/case_0{ending}") for folder in (source, done.dataset_folder)
        )
        for part in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(after, part)() == pytest.approx(getattr(before, part)(), abs=1e-6)
        assert after.GetPixelID() == sitk.sitkUInt8

    def test_images_are_links(self, raw: Path) -> None:
        source = write_source(raw)
        for name in ("imagesTs", "labelsTs"):
            (source / name).mkdir()
            write_volume(source / name / "case_9_0000.nii.gz", np.zeros(SHAPE, np.uint8))
        done = run()
        for name in ("imagesTr", "imagesTs", "labelsTs"):
            assert listing(done.dataset_folder / name) == listing(source / name)
            for path in (source / name).iterdir():
                assert path.samefile(done.dataset_folder / name / path.name)
        assert done.transfers == {"linked": 8, "copied": 0}

    def test_copies_where_linking_fails(self, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = write_source(raw)

        def no_links(*_: Any) -> None:
            raise OSError("another drive")

        monkeypatch.setattr(os, "link", no_links)
        done = run()
        assert done.transfers == {"linked": 0, "copied": 6}
        image = "imagesTr/case_1_0001.nii.gz"
        assert (done.dataset_folder / image).read_bytes() == (source / image).read_bytes()
        assert not (done.dataset_folder / image).samefile(source / image)

    def test_spacing_of_tiff_images_goes_with_them(self, raw: Path) -> None:
        write_source(raw, ending=".tif", spacing=(1.0, 4.0, 1.0))
        done = run()
        assert done.axis == 1
        for folder in ("imagesTr", "labelsTr"):
            spacing = json.loads((done.dataset_folder / folder / "case_0.json").read_text())["spacing"]
            assert spacing == [1.0, 4.0, 1.0]

    @pytest.mark.parametrize("labels", [LABELS, REGIONS])
    def test_dataset_json(self, raw: Path, labels: dict[str, Any]) -> None:
        from nnunetv2.utilities.label_handling.label_handling import LabelManager

        extra = {"regions_class_order": [1, 2]} if labels is REGIONS else {}
        kept = {"overwrite_image_reader_writer": "SimpleITKIO", "licence": "none"} | extra
        write_source(raw, labels=labels, name=SOURCE, numTraining=77, **kept)
        content = json.loads((run(target_name="Other").dataset_folder / "dataset.json").read_text())
        assert (
            content
            == {
                "channel_names": {"0": "T1", "1": "T2"},
                "labels": labels | {"ignore": 3},
                "numTraining": 3,
                "file_ending": ".nii.gz",
            }
            | kept
        )
        manager = LabelManager(content["labels"], content.get("regions_class_order"))
        assert manager.ignore_label == 3
        assert manager.has_regions == (labels is REGIONS)
        assert manager.num_segmentation_heads == (2 if labels is REGIONS else 3)

    def test_sidecar(self, raw: Path) -> None:
        write_source(raw)
        done = run(SlabRule(slices=4, seed=5))
        content = json.loads((done.dataset_folder / SIDECAR).read_text())
        assert content["source"] == SOURCE
        assert content["arguments"] == {
            "every": None,
            "slices": 4,
            "fraction": None,
            "slab": 2,
            "seed": 5,
            "axis": "slice",
        }
        assert (content["axis"], content["ignore_label"]) == (0, 3)
        labels = read(done.dataset_folder / "labelsTr/case_2.nii.gz")
        known = np.flatnonzero((labels != 3).any(axis=(1, 2))).tolist()
        assert content["cases"]["case_2"] == {"slices": 14, "annotated": known}

    def test_files_listed_in_dataset_json(self, raw: Path, tmp_path: Path) -> None:
        source = write_source(raw)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        for path in source.glob("*Tr/*"):
            path.rename(elsewhere / path.name.replace("case", "scan"))
        content = json.loads((source / "dataset.json").read_text())
        content["dataset"] = {
            "one": {
                "images": [str(elsewhere / f"scan_1_{channel:04d}.nii.gz") for channel in (1, 0)],
                "label": str(elsewhere / "scan_1.nii.gz"),
            }
        }
        (source / "dataset.json").write_text(json.dumps(content))
        done = run()
        written = done.dataset_folder
        assert listing(written) == [
            "dataset.json",
            "imagesTr",
            "imagesTr/one_0000.nii.gz",
            "imagesTr/one_0001.nii.gz",
            "labelsTr",
            "labelsTr/one.nii.gz",
            SIDECAR,
        ]
        assert (written / "imagesTr/one_0000.nii.gz").samefile(elsewhere / "scan_1_0001.nii.gz")
        content = json.loads((written / "dataset.json").read_text())
        assert "dataset" not in content
        assert content["numTraining"] == 1

    def test_same_slices_whatever_else_there_is(self, raw: Path) -> None:
        """The slices depend on the seed, but not on other cases or the number of processes."""
        write_source(raw, cases=4)
        write_source(raw, cases=2, name="Dataset017_Fewer")
        rule = SlabRule(fraction=0.3)
        all_four = run(rule)
        assert {case: all_four.annotated[case] for case in ("case_0", "case_1")} == run(rule, 17, 18).annotated
        in_two = run(rule, target=9, processes=2)
        for path in sorted((all_four.dataset_folder / "labelsTr").iterdir()):
            np.testing.assert_array_equal(read(path), read(in_two.dataset_folder / "labelsTr" / path.name))
        assert run(SlabRule(fraction=0.3, seed=1), target=10).annotated != all_four.annotated

    @pytest.mark.parametrize("labels", [LABELS, REGIONS])
    def test_nnunet_finds_no_error(self, raw: Path, labels: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        from nnunetv2.experiment_planning import verify_dataset_integrity as integrity

        write_source(raw, labels=labels, regions_class_order=[1, 2])
        done = run()
        with pytest.MonkeyPatch.context() as patch:
            # Threads instead of processes, which take seconds for imports.
            threads = SimpleNamespace(get_context=lambda _: multiprocessing.dummy)
            patch.setattr(integrity, "multiprocessing", threads)
            integrity.verify_dataset_integrity(str(done.dataset_folder), 1)
        assert "verify_dataset_integrity Done" in capsys.readouterr().out

    @pytest.mark.parametrize("spacing", [(1.0, 3.0, 1.0), (1.0, 1.0, 2.5), (1.0, 1.0, 1.0), (0.5, 2.0, 2.0)])
    def test_nnunet_brings_the_same_axis_to_the_front(
        self, raw: Path, spacing: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as planner

        # The planner starts a dozen processes to list the files. The axis does not depend on them.
        monkeypatch.setattr(planner, "get_filenames_of_train_images_and_targets", lambda *_: {})
        write_source(raw, spacing=spacing)
        done = run()
        fingerprint = Path(os.environ["nnUNet_preprocessed"]) / done.dataset_folder.name / "dataset_fingerprint.json"
        fingerprint.parent.mkdir()
        fingerprint.write_text(json.dumps({"spacings": [spacing] * 3, "shapes_after_crop": [SHAPE] * 3}))
        assert planner.ExperimentPlanner(8).determine_transpose()[0][0] == done.axis == int(np.argmax(spacing))

    def test_source_by_name(self, raw: Path) -> None:
        write_source(raw)
        assert run(source=SOURCE).dataset_folder.is_dir()

    def test_warnings(self, raw: Path) -> None:
        source = write_source(raw)
        assert run().warnings == ()
        labels = np.zeros(SHAPE, np.uint8)
        kept = SlabRule(every=5, slab=1).annotated_slices("case_0", SHAPE[0])
        labels[[index for index in range(SHAPE[0]) if index not in kept]] = 1
        write_volume(source / "labelsTr/case_0.nii.gz", labels)
        write_volume(source / "labelsTr/case_1.nii.gz", np.zeros(SHAPE, np.uint8))
        for part in ("imagesTr/case_2_0000", "imagesTr/case_2_0001", "labelsTr/case_2"):
            write_volume(source / f"{part}.nii.gz", np.ones((1, 12, 10), np.uint8))
        warnings = run(SlabRule(every=5, slab=1), target=9).warnings
        assert len(warnings) == 3
        assert "residual loss needs two annotated neighbours" in warnings[0]
        assert "1 of 3 cases have too few slices and keep all their labels: case_2" in warnings[1]
        assert "1 of 3 cases have foreground, but none on their annotated slices: case_0" in warnings[2]

    def test_single_slices_across_the_slice_axis_have_neighbours_along_it(self, raw: Path) -> None:
        write_source(raw)
        assert run(SlabRule(every=5, slab=1), axis=2).warnings == ()


class TestBadInput:
    @pytest.fixture(autouse=True)
    def source(self, raw: Path) -> Path:
        return write_source(raw)

    @pytest.fixture(autouse=True)
    def _nothing_is_left_behind(self, raw: Path) -> Any:
        yield
        assert [path.name for path in raw.iterdir() if "008" in path.name] == []

    def test_all_errors_at_once(self, source: Path) -> None:
        (source / "labelsTr/case_0.nii.gz").unlink()
        (source / "imagesTr/case_1_0001.nii.gz").unlink()
        write_volume(source / "labelsTr/case_2.nii.gz", np.full(SHAPE, 5, np.uint8))
        errors = errors_of(SlabRule(fraction=2.0), axis=3, target_name="a b", processes=0)
        for part in (
            "The fraction is 2;",
            "The axis is 3; expected slice, 0, 1 or 2",
            "The data set name is 'a b'",
            "The number of processes is 0",
            "labelsTr/case_0.nii.gz is missing",
            "imagesTr/case_1_0001.nii.gz is missing",
            "labelsTr/case_2.nii.gz has labels that dataset.json does not name: 5; expected 0, 1, 2",
        ):
            assert part in errors

    @pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
    @pytest.mark.parametrize("name", ["Dataset009_Taken", "Dataset009_ThingSparse"])
    def test_target_id_taken(self, variable: str, name: str) -> None:
        Path(os.environ[variable], name).mkdir()
        assert str(Path(os.environ[variable], name)) in errors_of(target=9)
        assert listing(Path(os.environ[variable], name)) == []

    def test_target_is_source(self) -> None:
        assert "Data set id 7 is taken by" in errors_of(target=7)

    def test_has_an_ignore_label(self, raw: Path) -> None:
        write_source(raw, name="Dataset070_Sparse", labels=LABELS | {"ignore": 3})
        assert "has the label 'ignore': the data set is already sparsely annotated" in errors_of(source=70)

    def test_no_such_source(self, raw: Path) -> None:
        assert "There is no data set 33" in errors_of(source=33)
        assert "Dataset033_No does not exist" in errors_of(source="Dataset033_No")
        (raw / "Dataset033_No").mkdir()
        assert "dataset.json is missing" in errors_of(source=33)

    def test_raw_folder_not_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("nnUNet_raw")
        assert "nnUNet_raw is not set" in errors_of()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "cannot be read"),
            ("[]", "has no labels and no file_ending"),
            ('{"labels": {"a": 1}, "file_ending": ".nii.gz"}', "Background label not declared"),
            ('{"labels": ["background", "a"], "file_ending": ".nii.gz"}', "expected their names, each with its value"),
            ('{"labels": {"background": 0, "a": 2}, "file_ending": ".nii.gz"}', "without gaps"),
            ('{"labels": {"background": 0, "a": [1, 2]}, "file_ending": ".nii.gz"}', "regions_class_order"),
        ],
    )
    def test_damaged_dataset_json(self, source: Path, content: str, message: str) -> None:
        (source / "dataset.json").write_text(content)
        assert message in errors_of()

    def test_labels_are_no_integers(self, source: Path) -> None:
        write_volume(source / "labelsTr/case_1.nii.gz", np.full(SHAPE, 0.5, np.float32))
        assert "case_1.nii.gz has values that are not integers: 0.5" in errors_of()

    def test_shapes_differ(self, source: Path) -> None:
        write_volume(source / "labelsTr/case_1.nii.gz", np.zeros((14, 12, 9), np.uint8))
        assert "case_1.nii.gz has shape (14, 12, 9); expected (14, 12, 10)" in errors_of()

    @pytest.mark.parametrize("file", ["imagesTr/case_0_0001", "labelsTr/case_1"])
    def test_truncated_file(self, source: Path, file: str) -> None:
        """ITK reads such files silently and fills the missing part with zeros, which mean annotated background."""
        path = source / f"{file}.nii.gz"
        path.write_bytes(path.read_bytes()[:-20])
        assert f"{file}.nii.gz cannot be read: it is cut short" in errors_of()

    @pytest.mark.parametrize("file", ["imagesTr/case_0_0000", "imagesTr/case_0_0001", "labelsTr/case_1"])
    def test_damaged_file(self, source: Path, file: str, capfd: pytest.CaptureFixture[str]) -> None:
        (source / f"{file}.nii.gz").write_bytes(b"no image")
        assert f"{file}.nii.gz cannot be read" in errors_of()
        assert "Traceback" not in capfd.readouterr().err

    def test_strange_file_name(self, source: Path) -> None:
        write_volume(source / "imagesTr/odd.nii.gz", np.zeros(SHAPE, np.uint8))
        assert "odd.nii.gz is not named as nnU-Net expects" in errors_of()

    @pytest.mark.parametrize("case_id", ["../../../victim/thesis", "/victim/thesis", "..", "-rf", ".a", "a\0b", "a\\b"])
    def test_ids_in_dataset_json_that_lead_elsewhere(self, source: Path, tmp_path: Path, case_id: str) -> None:
        victim = tmp_path / "victim" / "thesis.nii.gz"
        victim.parent.mkdir()
        victim.write_text("ten years")
        content = json.loads((source / "dataset.json").read_text())
        case = {"images": [f"imagesTr/case_0_{channel:04d}.nii.gz" for channel in range(2)]}
        content["dataset"] = {case_id: case | {"label": "labelsTr/case_0.nii.gz"}}
        (source / "dataset.json").write_text(json.dumps(content))
        assert f"dataset.json has the case id {case_id!a}, which" in errors_of()
        assert [path.read_text() for path in victim.parent.iterdir()] == ["ten years"]

    def test_ids_of_files_that_are_no_names(self, source: Path) -> None:
        for channel in range(2):
            name = f"case_0_{channel:04d}.nii.gz"
            (source / "imagesTr" / name).rename(source / "imagesTr" / f"-{name}")
        (source / "labelsTr" / "case_0.nii.gz").rename(source / "labelsTr" / "-case_0.nii.gz")
        assert "has the case id '-case_0', which begins with -" in errors_of()

    @pytest.mark.parametrize("ending", ["/../../../thesis.nii.gz", "nii.gz", "", 7, None, ".nii/.gz"])
    def test_a_file_ending_that_is_none(self, source: Path, ending: Any) -> None:
        content = json.loads((source / "dataset.json").read_text())
        (source / "dataset.json").write_text(json.dumps(content | {"file_ending": ending}))
        assert f"has the file_ending {ending!r}; expected one such as .nii.gz" in errors_of()

    @pytest.mark.parametrize("listed", [{"case_0": {"images": []}}, ["case_0"], {"case_0": {"images": 3, "label": 4}}])
    def test_a_list_of_cases_that_is_none(self, source: Path, listed: Any) -> None:
        content = json.loads((source / "dataset.json").read_text())
        (source / "dataset.json").write_text(json.dumps(content | {"dataset": listed}))
        assert "has a 'dataset' that does not list cases" in errors_of()

    def test_hidden_files_are_passed_over(self, source: Path) -> None:
        for folder in ("imagesTr", "labelsTr"):
            (source / folder / ".DS_Store").write_bytes(b"macOS")
            (source / folder / "._case_0.nii.gz").write_bytes(b"macOS")
        made = run().dataset_folder
        assert not [path for path in made.rglob(".*")]
        shutil.rmtree(made)

    def test_nothing_would_be_left_out(self, raw: Path) -> None:
        assert "no case has more than 14 slices along axis 0" in errors_of(SlabRule(slices=14))
        write_source(raw, name="Dataset071_Flat", shape=(1, 12, 10))
        assert "the images are 2D" in errors_of(source=71)
        assert "the images are 2D" in errors_of(source=71, axis=0)

    @pytest.mark.parametrize("broken", ["_write_case", "_sidecar"])
    def test_a_failed_write_leaves_nothing(self, raw: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
        def full(*_: Any) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(sparse, broken, full)
        with pytest.raises(OSError, match="No space"):
            run()
        assert [path.name for path in raw.iterdir()] == [SOURCE]


KILLED = """
import sys, time
from nnunet_conres.datasets import sparse

write = sparse._write_case

def slow(job):
    written = write(job)
    print("written", flush=True)
    time.sleep(60)
    return written

sparse._write_case = slow
sparse.sparsify(7, 8, sparse.SlabRule(every=5), progress=False)
"""


def test_killed_in_the_middle(raw: Path, repository_root: Path) -> None:
    write_source(raw)
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, cwd=repository_root)
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [path.name for path in raw.glob("Dataset*")] == [SOURCE]
    left = sorted(path.name.split("-")[0] for path in raw.glob(".*"))
    assert left == [".Dataset008.lock", ".Dataset008_ThingSparse.partial"]
    done = run()
    assert len(listing(done.dataset_folder / "labelsTr")) == 3
    assert sorted(path.name for path in raw.iterdir()) == [SOURCE, done.dataset_folder.name]


class TestCommand:
    def test_tells_what_it_did(self, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_source(raw)
        command = ["sparsify", "-d", "7", "-o", "8", "--slices", "5", "--slab", "1", "-name", "Few", "-np", "1"]
        assert cli.main([*command, "--axis", "2", "--seed", "3"]) == 0
        output, errors = capsys.readouterr()
        assert str(raw / "Dataset008_Few") in output
        assert "axis:             2, as requested" in output
        assert "annotated slices: 15 of 30 (50.0%)" in output
        assert "6 linked, 0 copied" in output
        assert "nnUNetv2_plan_and_preprocess -d 8" in output
        assert "warning" not in errors

    @pytest.mark.parametrize(("axis", "warned"), [("slice", True), ("2", False)])
    def test_warns_of_slices_without_neighbours(
        self, axis: str, warned: bool, raw: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # Slices across another axis have neighbours along the axis of ConResNet's residuals.
        write_source(raw)
        command = ["sparsify", "-d", "7", "-o", "8", "--slices", "2", "--slab", "1", "-np", "1"]
        assert cli.main([*command, "--axis", axis]) == 0
        assert ("warning: Slabs of a single slice" in capsys.readouterr().err) == warned

    def test_an_error_is_reported(self, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_source(raw)
        assert cli.main(["sparsify", "-d", "7", "-o", "8", "--every", "5", "--axis", "x", "-np", "1"]) == 2
        assert "The axis is 'x'; expected slice, 0, 1 or 2" in capsys.readouterr().err

    @pytest.mark.parametrize("options", [[], ["--every", "5", "--slices", "3"]])
    def test_exactly_one_rule(self, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main(["sparsify", "-d", "7", "-o", "8", *options])
        assert stop.value.code == 2
        assert "--every" in capsys.readouterr().err
