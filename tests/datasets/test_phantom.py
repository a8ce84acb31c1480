import errno
import os
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from nnunet_conres.datasets import phantom
from nnunet_conres.datasets.phantom import MODALITIES, make_phantom, write_brats_phantoms
from nnunet_conres.errors import InputError

SHAPE = (36, 48, 48)
FLAIR, T1, T1CE, T2 = range(4)
CASES = range(1, 7)


@pytest.fixture(scope="module")
def high_grade() -> list[tuple[np.ndarray, np.ndarray]]:
    return [make_phantom(SHAPE, (0, 0, case)) for case in CASES]


@pytest.fixture(scope="module")
def low_grade() -> list[tuple[np.ndarray, np.ndarray]]:
    return [make_phantom(SHAPE, (0, 0, case), grade="LGG") for case in CASES]


def best_threshold_dice(image: np.ndarray, target: np.ndarray) -> float:
    """Return the Dice of the threshold that fits the target best, inside the brain."""
    inside = image[image > 0]
    scores = []
    for level in np.percentile(inside, np.linspace(40, 99.5, 80)):
        chosen = image > level
        scores.append(2 * (chosen & target).sum() / (chosen.sum() + target.sum()))
    return max(scores)


class TestMakePhantom:
    def test_types_and_shapes(self, high_grade: list) -> None:
        images, labels = high_grade[0]
        assert images.shape == (4, *SHAPE)
        assert images.dtype == np.int16
        assert labels.shape == SHAPE
        assert labels.dtype == np.uint8

    def test_same_seed_same_voxels_another_seed_others(self) -> None:
        first, again, other = (make_phantom(SHAPE, seed) for seed in (5, 5, 6))
        np.testing.assert_array_equal(first[0], again[0])
        np.testing.assert_array_equal(first[1], again[1])
        assert (first[1] != other[1]).any()

    def test_skull_stripped(self, high_grade: list) -> None:
        for images, labels in high_grade:
            brain = images > 0
            assert (brain == brain[0]).all(), "every modality has the same background"
            assert (images >= 0).all()
            assert 0.25 < brain[0].mean() < 0.6
            assert ndimage.label(brain[0])[1] == 1
            assert not (labels[~brain[0]]).any()

    def test_labels_of_each_grade(self, high_grade: list, low_grade: list) -> None:
        for _, labels in high_grade:
            assert set(np.unique(labels)) == {0, 1, 2, 4}
        for _, labels in low_grade:
            assert set(np.unique(labels)) == {0, 1, 2}

    def test_lesions_have_the_size_of_real_ones(self, high_grade: list) -> None:
        for images, labels in high_grade:
            share = (labels > 0).sum() / (images[0] > 0).sum()
            assert 0.005 < share < 0.3

    def test_regions_are_nested(self, high_grade: list) -> None:
        """Necrosis hardly touches oedema or healthy tissue, as it lies in the enhancing rim."""
        shares = []
        for images, labels in high_grade:
            necrosis = labels == 1
            shell = ndimage.binary_dilation(necrosis) & ~necrosis & (images[0] > 0)
            shares.append((labels[shell] == 4).mean())
        assert np.mean(shares) > 0.85
        # At 4 mm, a thin rim has gaps.
        assert min(shares) > 0.7

    def test_lesions_are_not_spheres(self, high_grade: list) -> None:
        """Of all shapes of one volume, the sphere has the smallest surface, 4.84 volume^(2/3)."""
        surfaces = []
        for _, labels in high_grade:
            lesion = np.pad(labels > 0, 1)
            faces = sum(np.count_nonzero(np.diff(lesion.astype(np.int8), axis=axis)) for axis in range(3))
            surfaces.append(faces / lesion.sum() ** (2 / 3))
        # Counted in voxel faces, a sphere has 1.5 times its surface: 7.25.
        assert np.mean(surfaces) > 8.0

    def test_some_cases_have_two_lesions(self) -> None:
        counts = [
            ndimage.label(np.isin(make_phantom((18, 24, 24), (3, 0, case))[1], (1, 4)), np.ones((3, 3, 3)))[1]
            for case in range(40)
        ]
        assert 3 <= sum(count > 1 for count in counts) <= 25

    @pytest.mark.parametrize(
        ("channel", "bright", "dark"),
        [
            (FLAIR, (2,), (0,)),
            (T2, (2,), (0,)),
            (T1, (0,), (1,)),
            (T1CE, (4,), (0,)),
            (T1CE, (0,), (1,)),
            (T2, (1,), (0,)),
        ],
    )
    def test_contrast_of_each_modality(
        self, high_grade: list, channel: int, bright: tuple[int, ...], dark: tuple[int, ...]
    ) -> None:
        ratios = []
        for images, labels in high_grade:
            image, brain = images[channel], images[0] > 0
            brighter = np.median(image[brain & np.isin(labels, bright)])
            ratios.append(brighter / np.median(image[brain & np.isin(labels, dark)]))
        assert np.mean(ratios) > 1.1
        # The smallest necroses mix with their bright rim.
        assert min(ratios) > 0.95

    def test_low_grade_core_does_not_enhance(self, low_grade: list) -> None:
        for images, labels in low_grade:
            core, healthy = labels == 1, (images[0] > 0) & (labels == 0)
            assert np.median(images[T1CE][core]) < 0.9 * np.median(images[T1CE][healthy])

    def test_no_modality_gives_a_region_away_by_a_threshold(self, high_grade: list) -> None:
        for channel, values in ((FLAIR, (1, 2, 4)), (T2, (1, 4)), (T1CE, (4,))):
            scores = [best_threshold_dice(images[channel], np.isin(labels, values)) for images, labels in high_grade]
            assert np.mean(scores) < 0.85, f"{MODALITIES[channel]} alone tells region {values}"

    def test_the_modalities_together_tell_the_regions(self, high_grade: list) -> None:
        """A normal distribution per tissue, learnt from some cases, finds the tumour in another one."""

        def standardised(images: np.ndarray) -> np.ndarray:
            smooth = np.stack([ndimage.uniform_filter(image.astype(float), 2) for image in images])
            inside = smooth[:, images[0] > 0]
            return (inside - inside.mean(1, keepdims=True)) / inside.std(1, keepdims=True)

        voxels = [(standardised(images), labels[images[0] > 0]) for images, labels in high_grade]
        scores = []
        for held_out, (test, truth) in enumerate(voxels):
            others = [pair for number, pair in enumerate(voxels) if number != held_out]
            features = np.concatenate([v for v, _ in others], axis=1)
            classes = np.concatenate([c for _, c in others])
            likelihoods = []
            for value in (0, 2, 4, 1):
                members = features[:, classes == value]
                centred = test - members.mean(1, keepdims=True)
                covariance = np.cov(members)
                distance = (centred * np.linalg.solve(covariance, centred)).sum(0)
                prior = members.shape[1] / classes.size
                likelihoods.append(np.log(prior) - 0.5 * (distance + np.linalg.slogdet(covariance)[1]))
            predicted = np.argmax(likelihoods, axis=0) > 0
            scores.append(2 * (predicted & (truth > 0)).sum() / (predicted.sum() + (truth > 0).sum()))
        assert np.mean(scores) > 0.6

    def test_quick(self) -> None:
        began = time.process_time()
        make_phantom((48, 64, 64), 0)
        assert time.process_time() - began < 1.0

    @pytest.mark.parametrize("shape", [(48, 64), (8, 64, 64), (48, 64, 64.5)])
    def test_refuses_a_shape(self, shape: tuple) -> None:
        with pytest.raises(ValueError, match="three whole numbers of at least 16"):
            make_phantom(shape, 0)

    def test_refuses_a_grade(self) -> None:
        with pytest.raises(ValueError, match="expected 'HGG' or 'LGG'"):
            make_phantom(SHAPE, 0, grade="III")  # type: ignore[arg-type]


class TestWriteBratsPhantoms:
    def test_layout_and_geometry(self, tmp_path: Path) -> None:
        written = write_brats_phantoms(
            tmp_path, training_cases=4, held_out_cases=1, shape=(20, 24, 16), spacing=(2.0, 2.5, 3.0)
        )
        assert written.training_ids == tuple(f"Brats18_PHANTOM_00{n}_1" for n in (1, 2, 3, 4))
        found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.nii.gz"))
        folders = [f"held_out/HGG/{written.held_out_ids[0]}"]
        folders += [f"training/{'LGG' if '004' in case else 'HGG'}/{case}" for case in written.training_ids]
        endings = (*MODALITIES, "seg")
        assert found == sorted(
            f"{folder}/{folder.split('/')[-1]}_{end}.nii.gz" for folder in folders for end in endings
        )

        image = nibabel.load(tmp_path / found[0])
        assert image.shape == (20, 24, 16)
        # BraTS's LPS grid starts at (0, -239, 0) with 240 rows of 1 mm; NIfTI counts x and y the other way round.
        np.testing.assert_allclose(
            image.affine, [[-2, 0, 0, 0], [0, -2.5, 0, 23 * 2.5], [0, 0, 3, 0], [0, 0, 0, 1]], atol=1e-6
        )

    def test_files_hold_what_make_phantom_makes(self, tmp_path: Path) -> None:
        write_brats_phantoms(tmp_path, training_cases=2, held_out_cases=0, shape=(20, 24, 16), seed=7)
        images, labels = make_phantom((16, 24, 20), (7, 0, 2))
        stem = tmp_path / "training/HGG/Brats18_PHANTOM_002_1/Brats18_PHANTOM_002_1"
        for modality, image in zip(MODALITIES, images, strict=True):
            loaded = nibabel.load(f"{stem}_{modality}.nii.gz")
            assert loaded.get_data_dtype() == np.int16
            np.testing.assert_array_equal(np.asarray(loaded.dataobj), image.T)
        np.testing.assert_array_equal(np.asarray(nibabel.load(f"{stem}_seg.nii.gz").dataobj), labels.T)

    def test_held_out_cases_are_other_cases(self, tmp_path: Path) -> None:
        write_brats_phantoms(tmp_path, training_cases=1, held_out_cases=1, shape=(20, 24, 16))
        first, second = (np.asarray(nibabel.load(path).dataobj) for path in sorted(tmp_path.rglob("*_seg.nii.gz")))
        assert (first != second).any()

    def test_a_full_disk_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = []

        def write(path: Path, *_: object) -> None:
            if files:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            files.append(path)
            path.touch()

        monkeypatch.setattr(phantom, "write_nifti", write)
        with pytest.raises(InputError, match=f"^{tmp_path / 'above' / 'out'}/training/HGG/.*: No space left"):
            write_brats_phantoms(tmp_path / "above" / "out", training_cases=1, shape=(16, 16, 16))
        assert not list(tmp_path.rglob("*.nii.gz"))
        assert not list((tmp_path / "above").iterdir())

    @pytest.mark.parametrize("name", ["file", ".hidden"])
    def test_what_is_there_is_kept(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        with pytest.raises(InputError, match="is not an empty folder; remove it, or choose another -o"):
            write_brats_phantoms(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"training_cases": 1000}, "training_cases is 1000"),
            ({"held_out_cases": -1}, "held_out_cases is -1"),
            ({"spacing": (1.0, 0.0, 1.0)}, "spacing is"),
            ({"spacing": (1.0, 1.0)}, "spacing is"),
            ({"shape": (64, 64, 3)}, "shape is"),
            ({"seed": -1}, "seed is -1"),
        ],
    )
    def test_refuses_bad_arguments_before_writing(self, tmp_path: Path, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            write_brats_phantoms(tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()
