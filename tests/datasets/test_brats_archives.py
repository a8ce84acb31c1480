"""The archives of BraTS 2024 to 2026, from their layout to a data set and back to the challenge's files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from nnunet_conres import cli
from nnunet_conres.datasets.brats import Conversion, ConversionError, convert_brats
from nnunet_conres.datasets.brats_export import export_brats
from nnunet_conres.datasets.splits import split

# Grids of the challenges with a tenth of the voxels per axis: SRI24, adult glioma 2024, and native scanner grids.
SRI24 = ((24, 24, 15), np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 239], [0, 0, 1.0, 0], [0, 0, 0, 1]]))
POST = ((18, 21, 18), np.array([[1.0, 0, 0, -90], [0, 1.0, 0, -126], [0, 0, 1.0, -72], [0, 0, 0, 1]]))
NATIVE = ((20, 17, 9), np.array([[0.8, 0, 0, -70.25], [0, 0.78, 0.5, -90], [0, -0.1, 3.9, 11.5], [0, 0, 0, 1]]))
RADIOTHERAPY = ((26, 19, 7), np.array([[-0.5, 0, 0, 100], [0, 0.5, 0, -120], [0, 0, 2.0, -30], [0, 0, 0, 1]]))


@dataclass(frozen=True)
class Archive:
    """A challenge's archive.

    Attributes:
        scheme: Value of `--scheme`.
        cases: Folder of each labelled case below the archive's parent, and its grid.
        unlabelled: The same for the cases of the validation archive.
        values: nnU-Net's label for each label value except 0, worked out by hand.
        parts: File parts of the channels in nnU-Net's order, and of the labels.
    """

    scheme: str
    cases: dict[str, tuple[tuple[int, ...], np.ndarray]]
    unlabelled: dict[str, tuple[tuple[int, ...], np.ndarray]]
    values: dict[int, int]
    parts: tuple[str, ...] = field(default=("-t2f", "-t1n", "-t1c", "-t2w", "-seg"))


GLIOMA, CAVITY, CHILDREN = {1: 2, 2: 1, 3: 3}, {1: 2, 2: 1, 3: 3, 4: 4}, {1: 4, 2: 2, 3: 3, 4: 1}
ARCHIVES = {
    "GLI 2025": Archive(
        "2025-GLI",
        {
            "BraTS2025-GLI-PRE-Challenge-TrainingData/BraTS-GLI-00005-000": SRI24,
            "BraTS2024-BraTS-GLI-TrainingData/training_data1_v2/BraTS-GLI-00005-100": POST,
            "BraTS2024-BraTS-GLI-AdditionalTrainingData/training_data_additional/BraTS-GLI-02111-105": POST,
        },
        {"BraTS2024-BraTS-GLI-ValidationData/validation_data/BraTS-GLI-03000-100": POST},
        CAVITY,
    ),
    "MET 2025": Archive(
        "2026-MET",
        {
            "MICCAI-LH-BraTS2025-MET-Challenge-TrainingData_batch1/Training/BraTS-MET-00001-000": SRI24,
            "MICCAI-LH-BraTS2025-MET-Challenge-TrainingData_batch1/UCSD - Training/BraTS-MET-01000-000": NATIVE,
            "MICCAI-LH-BraTS2025-MET-Challenge-TrainingData_batch1/UCSD - Training/BraTS-MET-01000-001": NATIVE,
        },
        {"MICCAI-LH-BraTS2025-MET-Challenge-ValidationData_batch1/BraTS-MET-02000-000": NATIVE},
        CAVITY,
    ),
    "MEN-RT 2024": Archive(
        "2024-MEN-RT",
        {
            "BraTS2024-MEN-RT-TrainingData/BraTS-MEN-RT-Train-v2/BraTS-MEN-RT-0402-1": RADIOTHERAPY,
            "BraTS2024-MEN-RT-TrainingData/BraTS-MEN-RT-Train-v2/BraTS-MEN-RT-0402-2": NATIVE,
        },
        {"BraTS2024-MEN-RT-ValidationData/BraTS-MEN-RT-Val-v1/BraTS-MEN-RT-0600-1": RADIOTHERAPY},
        {1: 1},
        ("_t1c", "_gtv"),
    ),
    "PED 2024": Archive(
        "2024-PED",
        {
            "BraTS-PEDs2024_Training/BraTS-PED-00001-000": SRI24,
            "BraTS-PEDs2024_Training/BraTS-PED-00255-000": SRI24,
        },
        {},
        CHILDREN,
    ),
    "PED 2026": Archive(
        "2026-PED",
        {
            "BraTS26_PED_training_Complete/BraTS-PED-00001-000": SRI24,
            "BraTS-PEDs_Batch2_Release/BraTS-PED-00301-000": SRI24,
        },
        {"BraTS26_PED_validation/BraTS-PED-00400-000": SRI24},
        CHILDREN,
    ),
    "GoAT 2025": Archive(
        "auto",
        {
            "MICCAI2024-BraTS-GoAT-TrainingData-With-GroundTruth/BraTS-GoAT-00001": SRI24,
            "MICCAI2024-BraTS-GoAT-TrainingData-With-GroundTruth/BraTS-GoAT-00002": SRI24,
        },
        {"MICCAI2024-BraTS-GoAT-TrainingData-WithOut-GroundTruth/BraTS-GoAT-01352": SRI24},
        GLIOMA,
    ),
    "SSA 2024": Archive(
        "auto",
        {"ASNR-MICCAI-BraTS2023-SSA-Challenge-TrainingData_V2/BraTS-SSA-00002-000": SRI24},
        {"BraTS2024-SSA-Challenge-ValidationData/BraTS-SSA-00190-000": SRI24},
        GLIOMA,
    ),
    "MEN 2023": Archive(
        "auto",
        {"ASNR-MICCAI-BraTS2023-MEN-Challenge-TrainingData/BraTS-MEN-Train/BraTS-MEN-00004-000": SRI24},
        {"ASNR-MICCAI-BraTS2023-MEN-Challenge-ValidationData/BraTS-MEN-00010-000": SRI24},
        GLIOMA,
    ),
}


def save(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def load(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def write_case(
    folder: Path, archive: Archive, grid: tuple[tuple[int, ...], np.ndarray], *, labelled: bool, seed: int = 0
) -> None:
    """Write a case whose channels have distinct intensities: hundreds 1 to 4 for FLAIR, T1, T1ce, T2."""
    rng = np.random.default_rng(seed)
    shape, affine = grid
    for number, part in enumerate(archive.parts[:-1], start=1):
        image = (100 * number + rng.integers(0, 50, shape)).astype(np.int16)
        save(folder / f"{folder.name}{part}.nii.gz", image, affine)
    if labelled:
        labels = rng.choice([0, *archive.values], shape).astype(np.uint8)
        save(folder / f"{folder.name}{archive.parts[-1]}.nii.gz", labels, affine)


def write(root: Path, name: str) -> Archive:
    archive = ARCHIVES[name]
    for seed, (folder, grid) in enumerate(archive.cases.items()):
        write_case(root / folder, archive, grid, labelled=True, seed=seed)
    for seed, (folder, grid) in enumerate(archive.unlabelled.items(), start=50):
        write_case(root / folder, archive, grid, labelled=False, seed=seed)
    return archive


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path / "raw"


def convert(source: Path, scheme: str, **arguments: Any) -> Conversion:
    schemes = (scheme,) if isinstance(scheme, str) else scheme
    raw = source.parent / "raw"
    return convert_brats([source], 501, schemes=schemes, raw_folder=raw, progress=False, **arguments)


def errors_of(source: Path, scheme: str, **arguments: Any) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        convert(source, scheme, **arguments)
    assert list((source.parent / "raw").iterdir()) == []
    return caught.value.errors


@pytest.mark.usefixtures("raw")
class TestRoundTrip:
    @pytest.mark.parametrize("name", ARCHIVES)
    def test_voxel_for_voxel(self, source: Path, tmp_path: Path, name: str) -> None:
        archive = write(source, name)
        done = convert(source, archive.scheme)
        assert {*done.training_ids} == {Path(folder).name for folder in archive.cases}
        assert {*done.test_ids} == {Path(folder).name for folder in archive.unlabelled}
        for folder, part in (*((f, "Tr") for f in archive.cases), *((f, "Ts") for f in archive.unlabelled)):
            case_id = Path(folder).name
            for channel, ending in enumerate(archive.parts[:-1]):
                original = nibabel.load(source / folder / f"{case_id}{ending}.nii.gz")
                written = nibabel.load(done.dataset_folder / f"images{part}/{case_id}_{channel:04d}.nii.gz")
                np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(original.dataobj))
                np.testing.assert_array_equal(written.affine, original.affine)
        for folder in archive.cases:
            case_id = Path(folder).name
            original = load(source / folder / f"{case_id}{archive.parts[-1]}.nii.gz")
            written = load(done.dataset_folder / f"labelsTr/{case_id}.nii.gz")
            np.testing.assert_array_equal(written, np.vectorize({0: 0, **archive.values}.get)(original))

        # The export of a perfect prediction equals the challenge's label file.
        scheme = {"GoAT 2025": "2026-GoAT", "SSA 2024": "2025-SSA", "MEN 2023": "2025-MEN"}.get(name, archive.scheme)
        export_brats(
            done.dataset_folder / "labelsTr",
            tmp_path / "out",
            scheme,
            dataset_json=done.dataset_folder / "dataset.json",
            reference_folder=source,
            progress=False,
        )
        assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{case}.nii.gz" for case in done.training_ids}
        for folder in archive.cases:
            case_id = Path(folder).name
            original = nibabel.load(source / folder / f"{case_id}{archive.parts[-1]}.nii.gz")
            exported = nibabel.load(tmp_path / f"out/{case_id}.nii.gz")
            np.testing.assert_array_equal(np.asarray(exported.dataobj), np.asarray(original.dataobj))
            np.testing.assert_array_equal(exported.affine, original.affine)
            assert exported.header.get_zooms() == original.header.get_zooms()

    def test_radiotherapy_has_one_channel_and_one_label(self, source: Path) -> None:
        write(source, "MEN-RT 2024")
        content = json.loads((convert(source, "auto").dataset_folder / "dataset.json").read_text())
        assert content["channel_names"] == {"0": "T1ce"}
        assert content["labels"] == {"background": 0, "gross_tumor_volume": 1}
        assert "regions_class_order" not in content
        from nnunetv2.utilities.label_handling.label_handling import LabelManager

        assert not LabelManager(content["labels"], None).has_regions

    def test_an_empty_mask_is_a_warning(self, source: Path) -> None:
        write(source, "MET 2025")
        (path,) = source.rglob("BraTS-MET-00001-000-seg.nii.gz")
        save(path, np.zeros(SRI24[0], np.uint8), SRI24[1])
        (warning,) = convert(source, "2026-MET").warnings
        assert "BraTS-MET-00001-000-seg.nii.gz is all background" in warning

    def test_radiotherapy_and_others_have_different_channels(self, source: Path) -> None:
        write(source, "MEN-RT 2024")
        write(source, "MEN 2023")
        (error,) = errors_of(source, ("2023-MEN", "2024-MEN-RT"))
        assert "which have different channels" in error


@pytest.mark.usefixtures("raw")
class TestPatients:
    def test_before_and_after_treatment_stay_in_one_fold(self, source: Path) -> None:
        write(source, "GLI 2025")
        convert(source, "2025-GLI")
        done = split(501, folds=2, progress=False)
        for fold in done.folds:
            assert len({"BraTS-GLI-00005-000", "BraTS-GLI-00005-100"} & set(fold.validation)) != 1

    def test_of_a_scheme_in_a_file(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "ours.toml").write_text("like = '2023'\ntitle = 'Ours'\nprefix = 'H'\npatient = 'H\\d{3}'\n")
        ids = [f"H{patient:03d}{time}" for patient in range(6) for time in "ab"]
        for seed, case_id in enumerate(ids):
            write_case(source / case_id, ARCHIVES["MEN 2023"], SRI24, labelled=True, seed=seed)
        done = convert(source, str(tmp_path / "ours.toml"))
        known = json.loads((done.dataset_folder / "cases.json").read_text())
        assert {case_id: facts["patient"] for case_id, facts in known.items()} == {case: case[:-1] for case in ids}
        for fold in split(501, folds=3, progress=False).folds:
            assert len(fold.validation) == 2 * len({case_id[:-1] for case_id in fold.validation})

    def test_held_out_and_trained_on_is_a_warning(self, source: Path, tmp_path: Path) -> None:
        write(source, "GLI 2025")
        moved = tmp_path / "held_out" / "BraTS-GLI-00005-100"
        moved.parent.mkdir()
        (source / "BraTS2024-BraTS-GLI-TrainingData/training_data1_v2/BraTS-GLI-00005-100").rename(moved)
        warnings = convert(source, "2025-GLI", held_out_folders=[moved.parent]).warnings
        assert any(
            "BraTS-GLI-00005-100: held out, but other time points of the same patients are training cases" in text
            for text in warnings
        )


@pytest.mark.usefixtures("raw")
class TestMissing:
    @pytest.fixture
    def absent(self, source: Path) -> list[str]:
        """Remove T2 from a training and a validation case, both on native scanner grids. Return their ids."""
        write(source, "MET 2025")
        ids = ["BraTS-MET-01000-000", "BraTS-MET-02000-000"]
        for case_id in ids:
            (path,) = source.rglob(f"{case_id}-t2w.nii.gz")
            path.unlink()
        return ids

    def test_is_refused_and_all_are_named(self, source: Path, absent: list[str]) -> None:
        errors = errors_of(source, "2025-MET")
        assert len(errors) == len(absent)
        for case_id, error in zip(absent, sorted(errors, key=lambda error: "02000" in error), strict=True):
            assert f"{case_id}-t2w.nii.gz is missing" in error
            assert "--missing zero" in error

    def test_many_are_all_named(self, source: Path) -> None:
        ids = [f"BraTS-MET-{number:05d}-000" for number in range(1, 13)]
        for number, case_id in enumerate(ids):
            write_case(source / case_id, ARCHIVES["MET 2025"], SRI24, labelled=True)
            (source / case_id / f"{case_id}-{'t2w' if number else 't1c'}.nii.gz").unlink()
        with pytest.raises(ConversionError) as caught:
            convert(source, "2025-MET")
        line = str(caught.value).splitlines()[-1]
        assert f"Without t1c: {ids[0]}. Without t2w: {', '.join(ids[1:])}. 12 cases or files have errors" in line

    def test_becomes_a_zero_image_on_the_cases_grid(self, source: Path, absent: list[str]) -> None:
        done = convert(source, "2025-MET", missing="zero")
        assert done.missing == {case_id: ("T2",) for case_id in absent}
        for case_id, part in zip(absent, ("Tr", "Ts"), strict=True):
            zeros = nibabel.load(done.dataset_folder / f"images{part}/{case_id}_0003.nii.gz")
            image = nibabel.load(done.dataset_folder / f"images{part}/{case_id}_0000.nii.gz")
            assert zeros.shape == image.shape == NATIVE[0]
            np.testing.assert_array_equal(zeros.affine, image.affine)
            assert not np.asarray(zeros.dataobj).any()
            assert set(load(done.dataset_folder / f"images{part}/{case_id}_0002.nii.gz").ravel() // 100) == {3}
        known = json.loads((done.dataset_folder / "cases.json").read_text())
        assert {case: facts["missing"] for case, facts in known.items() if "missing" in facts} == {
            case_id: ["T2"] for case_id in absent
        }
        assert json.loads((done.dataset_folder / "dataset.json").read_text())["missing_channels"] == ["T2"]
        assert not done.warnings

    def test_the_first_modality_too(self, source: Path) -> None:
        write(source, "PED 2024")
        (source / "BraTS-PEDs2024_Training/BraTS-PED-00255-000/BraTS-PED-00255-000-t2f.nii.gz").unlink()
        done = convert(source, "2024-PED", missing="zero")
        assert done.missing == {"BraTS-PED-00255-000": ("FLAIR",)}
        written = nibabel.load(done.dataset_folder / "labelsTr/BraTS-PED-00255-000.nii.gz")
        np.testing.assert_array_equal(written.affine, SRI24[1])

    def test_a_case_without_any_is_refused(self, source: Path) -> None:
        write(source, "PED 2024")
        for path in source.rglob("BraTS-PED-00255-000-t*"):
            path.unlink()
        errors = errors_of(source, "2024-PED", missing="zero")
        assert len(errors) == 4
        assert all("is missing" in error and "--missing" not in error for error in errors)

    def test_nnunet_takes_the_zeros(self, source: Path, absent: list[str]) -> None:
        """Read with nnU-Net's reader and normalised with its scheme for MR images."""
        from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
        from nnunetv2.preprocessing.normalization.default_normalization_schemes import ZScoreNormalization

        folder = convert(source, "2025-MET", missing="zero").dataset_folder
        files = [str(folder / f"imagesTr/{absent[0]}_{channel:04d}.nii.gz") for channel in range(4)]
        images, _ = SimpleITKIO().read_images(files)
        normalised = ZScoreNormalization(False, {}).run(images[3].astype(np.float32), None)
        assert not normalised.any()

    def test_command(self, source: Path, absent: list[str], raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["brats-convert", "-i", str(source), "-d", "501", "--scheme", "2026-MET", "-np", "1"]
        assert cli.main(arguments) == 2
        assert not list(raw.iterdir())
        assert cli.main([*arguments, "--missing", "zero"]) == 0
        assert "zero images:    in 2 cases without a modality: BraTS-MET-01000-000" in capsys.readouterr().out


@pytest.mark.usefixtures("raw")
class TestCorrected:
    LABELS = "MICCAI-LH-BraTS2025-MET-Challenge-corrected-labels_batch1"

    @pytest.fixture
    def corrected(self, source: Path) -> np.ndarray:
        """Write corrected labels of a case that also has labels in the archive, and return them."""
        write(source, "MET 2025")
        labels = np.random.default_rng(9).choice([0, 1, 4], NATIVE[0]).astype(np.uint8)
        save(source / self.LABELS / "BraTS-MET-01000-000-seg.nii.gz", labels, NATIVE[1])
        return labels

    def test_take_the_place_of_others(self, source: Path, corrected: np.ndarray) -> None:
        done = convert(source, "2025-MET", corrected_folders=[source / self.LABELS])
        assert len(done.training_ids) == 3
        written = load(done.dataset_folder / "labelsTr/BraTS-MET-01000-000.nii.gz")
        np.testing.assert_array_equal(written, np.vectorize({0: 0, **CAVITY}.get)(corrected))
        known = json.loads((done.dataset_folder / "cases.json").read_text())
        assert {case: facts.get("corrected") for case, facts in known.items() if facts.get("corrected")} == {
            "BraTS-MET-01000-000": ["seg"]
        }

    def test_are_not_taken_unasked(self, source: Path, corrected: np.ndarray) -> None:
        (error,) = errors_of(source, "2025-MET")
        assert "BraTS-MET-01000-000-seg.nii.gz has no images beside it" in error
        assert "--corrected" in error

    def test_without_a_case_are_refused(self, source: Path, corrected: np.ndarray) -> None:
        save(source / self.LABELS / "BraTS-MET-07777-000-seg.nii.gz", corrected, NATIVE[1])
        (error,) = errors_of(source, "2025-MET", corrected_folders=[source / self.LABELS])
        assert "no case BraTS-MET-07777-000 in the input" in error

    def test_on_another_grid_are_refused(self, source: Path, corrected: np.ndarray) -> None:
        affine = NATIVE[1].copy()
        affine[2, 3] += 2e-3
        save(source / self.LABELS / "BraTS-MET-01000-000-seg.nii.gz", corrected, affine)
        (error,) = errors_of(source, "2025-MET", corrected_folders=[source / self.LABELS])
        assert "do not lie on the same voxel grid: origin" in error


OTHER_YEARS = (
    pytest.param("PED 2024", "2023-PED", "an archive of BraTS 2024 to 2026, paediatric", id="PED 2024 as 2023"),
    pytest.param("PED 2026", "2023-PED", "has labels 4 (", id="PED 2026 as 2023, by labels"),
    pytest.param("MET 2025", "2024-MET", "an archive of BraTS 2025 and 2026, metastases", id="MET 2025 as 2024"),
    pytest.param("MET 2025", "auto", "2023-MET) or BraTS 2025 and 2026, metastases", id="MET 2025 unsaid"),
    pytest.param("PED 2026", "auto", "2023-PED) or BraTS 2024 to 2026, paediatric", id="PED 2026 unsaid"),
    pytest.param("GLI 2025", "2023", "an archive of BraTS 2025, adult glioma", id="GLI 2025 as 2023"),
    pytest.param("GoAT 2025", "2024-PED", "is named as in BraTS 2024 to 2026, general", id="GoAT as PED"),
    pytest.param("MEN-RT 2024", "2023-MEN", "is named as in BraTS 2024 and 2025, mening", id="MEN-RT as MEN"),
)


@pytest.mark.usefixtures("raw")
class TestErrors:
    @pytest.mark.parametrize(("name", "scheme", "message"), OTHER_YEARS)
    def test_an_archive_of_another_year(self, source: Path, name: str, scheme: str, message: str) -> None:
        write(source, name)
        errors = errors_of(source, scheme)
        assert any(message in error and "--scheme" in error for error in errors), errors

    def test_children_of_goat_are_labelled_as_adults(self, source: Path) -> None:
        """Value 1 is enhancing tumour in PED since 2024, but necrosis in GoAT, also for cases with ids of PED."""
        archive = ARCHIVES["GoAT 2025"]
        folder = source / "MICCAI2024-BraTS-GoAT-TrainingData-With-GroundTruth/BraTS-PED-00001-000"
        write_case(folder, archive, SRI24, labelled=True)
        assert any(
            "which is an archive of BraTS 2024 to 2026, general" in error for error in errors_of(source, "2024-PED")
        )
        assert any("does not allow" in error for error in errors_of(source, "2024-GoAT"))

    def test_all_are_listed_together(self, source: Path) -> None:
        archive = write(source, "MET 2025")
        first, second, third = (source / folder for folder in archive.cases)
        save(first / f"{first.name}-t1c.nii", np.ones(SRI24[0], np.int16), SRI24[1])
        moved = NATIVE[1].copy()
        moved[0, 3] += 2e-3
        save(second / f"{second.name}-t2w.nii.gz", np.ones(NATIVE[0], np.int16), moved)
        save(third / f"{third.name}-seg.nii.gz", np.full(NATIVE[0], 5, np.uint8), NATIVE[1])
        save(third / f"{third.name}-t1n.nii.gz", np.full(NATIVE[0], np.nan, np.float32), NATIVE[1])
        cut = third / f"{third.name}-t2f.nii.gz"
        cut.write_bytes(cut.read_bytes()[:-300])
        (fourth,) = (source / folder for folder in archive.unlabelled)
        (fourth / f"{fourth.name}-t2w.nii.gz").unlink()
        text = "\n".join(errors_of(source, "2025-MET"))
        for part in (
            f"{first.name} has 2 files for t1c",
            f"{second.name}-t2w.nii.gz and {second.name}-t2f.nii.gz do not lie on the same voxel grid: origin",
            f"{third.name}-seg.nii.gz has labels 5 (",
            f"{third.name}-t1n.nii.gz has {np.prod(NATIVE[0])} voxels that are NaN",
            f"{third.name}-t2f.nii.gz cannot be read",
            f"{fourth.name}-t2w.nii.gz is missing",
        ):
            assert part in text

    def test_a_scheme_file_that_is_wrong(self, source: Path, tmp_path: Path) -> None:
        write(source, "PED 2024")
        (tmp_path / "ours.toml").write_text("like = '2024-PED'\nlabels = 3\n")
        (error,) = errors_of(source, str(tmp_path / "ours.toml"))
        assert "ours.toml: labels is 3; expected a table" in error


@pytest.mark.usefixtures("raw")
class TestSchemeFile:
    def test_a_file_of_the_archive_that_the_scheme_lacks(self, source: Path, tmp_path: Path) -> None:
        """The file must not be taken for a second case of a known challenge."""
        write(source, "PED 2024")
        names = {"t2f": "FLAIR", "t1n": "T1", "t1c": "T1ce", "seg": "labels"}
        lines = [f"'{{id}}-{part}' = '{content}'" for part, content in names.items()]
        (tmp_path / "ours.toml").write_text("\n".join(["like = '2024-PED'", "[files]", *lines]))
        errors = errors_of(source, str(tmp_path / "ours.toml"))
        n_cases = len({path.name.removesuffix("-t2w.nii.gz") for path in source.rglob("*-t2w.nii.gz")})
        assert n_cases > 0
        assert sum("-t2w.nii.gz is not a file of" in error for error in errors) == n_cases
        assert not any("occurs" in error or "not allow" in error for error in errors)

    def test_converts_and_exports(self, source: Path, tmp_path: Path) -> None:
        """A challenge unknown to this release, with two channels and its own tissues and file names."""
        (tmp_path / "2027-ABC.toml").write_text(
            "title = 'BraTS 2027, ABC'\n"
            "prefix = 'ABC'\n"
            "[files]\n'{id}.post' = 'T1ce'\n'{id}.flair' = 'FLAIR'\n'{id}.truth' = 'labels'\n"
            "[labels]\n3 = 'bleeding'\n8 = 'lesion'\n"
            "[regions]\nall = ['lesion', 'bleeding']\nbleeding = ['bleeding']\n"
        )
        archive = Archive("", {}, {}, {3: 2, 8: 1}, (".post", ".flair", ".truth"))
        for seed, case_id in enumerate(("ABC-1", "ABC-2")):
            write_case(source / case_id, archive, NATIVE, labelled=True, seed=seed)
        scheme = str(tmp_path / "2027-ABC.toml")
        done = convert(source, scheme, processes=2)
        content = json.loads((done.dataset_folder / "dataset.json").read_text())
        assert content["channel_names"] == {"0": "T1ce", "1": "FLAIR"}
        assert content["labels"] == {"background": 0, "all": [1, 2], "bleeding": 2}
        assert content["regions_class_order"] == [1, 2]
        assert content["brats_schemes"] == ["2027-ABC"]
        export_brats(
            done.dataset_folder / "labelsTr",
            tmp_path / "out",
            scheme,
            dataset_json=done.dataset_folder / "dataset.json",
            reference_folder=source,
            processes=2,
            progress=False,
        )
        for case_id in done.training_ids:
            original = load(source / case_id / f"{case_id}.truth.nii.gz")
            np.testing.assert_array_equal(load(tmp_path / f"out/{case_id}.nii.gz"), original)

    def test_small_enhancing_tumour_needs_a_tissue_in_its_place(self, source: Path, tmp_path: Path) -> None:
        write(source, "MEN-RT 2024")
        done = convert(source, "auto")
        with pytest.raises(ValueError, match=r"does not define a replacement of small enhancing tumour"):
            export_brats(
                done.dataset_folder / "labelsTr",
                tmp_path / "out",
                "2025-MEN-RT",
                dataset_json=done.dataset_folder / "dataset.json",
                et_min_voxels=9,
                progress=False,
            )
