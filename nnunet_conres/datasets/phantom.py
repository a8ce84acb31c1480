"""Synthetic brain tumour cases in BraTS's file layout, for trying the whole pipeline without patient data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.folders import new_folder
from nnunet_conres.images.nifti import header_of, write_nifti

Grade = Literal["HGG", "LGG"]
FloatVolume = NDArray[np.float32]
BoolVolume = NDArray[np.bool_]

MODALITIES: Final = ("flair", "t1", "t1ce", "t2")
"""File name endings of the four modalities, in the order of `make_phantom`'s channels."""

DEFAULT_SHAPE: Final = (64, 64, 48)
"""Voxels along x, y, z; with `DEFAULT_SPACING` a field of view of 192 x 192 x 144 mm, about the size of a head."""

DEFAULT_SPACING: Final = (3.0, 3.0, 3.0)
"""Voxel size along x, y, z in mm."""

NECROSIS, OEDEMA, ENHANCING = 1, 2, 4
"""BraTS's label values up to 2021."""

# Half-axes of the brain as fractions of the field of view along z, y, x: a head is longer than it is wide.
_BRAIN_HALF_AXES: Final = (0.45, 0.44, 0.36)

_MINIMUM_EDGE: Final = 16

# One case in four has no enhancing tumour, about the share of low-grade cases in BraTS 2018's training set.
_LOW_GRADE_EVERY: Final = 4

# Mean intensity per tissue and modality, in scanner units, in the order of MODALITIES. The order of brightness within
# each modality matters: oedema and cerebrospinal fluid are both bright on T2, but only oedema is bright on FLAIR;
# vessels are as bright as enhancing tumour on T1ce; necrosis looks like fluid on T1 and T1ce.
_TISSUE_INTENSITY: Final[dict[str, tuple[float, float, float, float]]] = {
    "white": (200.0, 340.0, 345.0, 290.0),
    "grey": (235.0, 270.0, 280.0, 390.0),
    "fluid": (70.0, 120.0, 125.0, 880.0),
    "caps": (300.0, 310.0, 315.0, 400.0),
    "vessel": (150.0, 260.0, 600.0, 230.0),
    "oedema": (350.0, 285.0, 290.0, 560.0),
    "necrosis": (190.0, 175.0, 170.0, 760.0),
    "enhancing": (290.0, 280.0, 610.0, 480.0),
    "solid": (365.0, 215.0, 225.0, 660.0),
}


@dataclass(frozen=True)
class PhantomSet:
    """Folders and case ids written by `write_brats_phantoms`.

    Attributes:
        training: Folder with `HGG` and `LGG`, one folder per labelled training case in each.
        held_out: Folder of the same layout with labelled cases that training must not see.
        training_ids: Case ids in `training`.
        held_out_ids: Case ids in `held_out`.
    """

    training: Path
    held_out: Path
    training_ids: tuple[str, ...]
    held_out_ids: tuple[str, ...]


def make_phantom(
    shape: Sequence[int], seed: int | Sequence[int], *, grade: Grade = "HGG"
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Make one skull-stripped head with one or two tumour-like lesions.

    All structures are placed relative to the field of view, so the same seed gives a similar head at any resolution.
    The heads are not identical, because the voxel noise differs.

    Args:
        shape: Voxels along (z, y, x), each at least 16.
        seed: Any seed that `numpy.random.default_rng` accepts; the same seed gives the same voxels.
        grade: "HGG" has a necrotic core in an enhancing rim with oedema around it; "LGG" has a solid core that does not
            enhance, and no label 4.

    Returns:
        Images (4, z, y, x), int16, in the order FLAIR, T1, T1ce, T2, exactly 0 outside the brain and at least 1 inside;
        and labels (z, y, x), uint8, with 0 background, 1 necrosis or non-enhancing core, 2 oedema, 4 enhancing.

    Raises:
        InputError: The shape is not three-dimensional or too small.
        ValueError: The grade is unknown.
    """
    size = _checked_shape(shape)
    if grade not in ("HGG", "LGG"):
        raise ValueError(f"grade is {grade!r}; expected 'HGG' or 'LGG'.")
    rng = np.random.default_rng(seed)

    half_axes = np.array(_BRAIN_HALF_AXES) * rng.uniform(0.94, 1.02, 3)
    position = _brain_coordinates(size, half_axes)
    tissue, brain = _anatomy(position, rng)
    labels = _lesions(position, tissue, brain, rng, grade)
    return _images(tissue, brain, labels, rng, grade), labels


def write_brats_phantoms(
    output_folder: str | Path,
    *,
    training_cases: int = 10,
    held_out_cases: int = 3,
    shape: Sequence[int] = DEFAULT_SHAPE,
    spacing: Sequence[float] = DEFAULT_SPACING,
    seed: int = 0,
) -> PhantomSet:
    """Write labelled synthetic cases in the layout of BraTS 2018's training data.

    A case depends only on the seed, its part (training or held out) and its number, not on the number of cases. Every
    fourth case of a part is low-grade.

    Args:
        output_folder: Gets `training/` and `held_out/`, each with `HGG/` and, if there are low-grade cases, `LGG/`.
            Must not exist, or be empty.
        training_cases: Number of cases in `training/`, 0 to 999.
        held_out_cases: Number of cases in `held_out/`, 0 to 999.
        shape: Voxels along (x, y, z), as NIfTI has it, each at least 16.
        spacing: Voxel size along (x, y, z) in mm.
        seed: Seed of the whole set, 0 or more.

    Returns:
        The folders and case ids written.

    Raises:
        InputError: A number, the shape, the spacing or the seed is out of range, or the files can't be written.
    """
    for name, count in (("training_cases", training_cases), ("held_out_cases", held_out_cases)):
        if not 0 <= count <= 999:
            raise InputError(f"{name} is {count}; expected 0 to 999.")
    if seed < 0:
        raise InputError(f"seed is {seed}; expected 0 or more.")
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise InputError(f"spacing is {tuple(spacing)}; expected three positive numbers (x, y, z) in mm.")
    size = _checked_shape(tuple(shape)[::-1])

    output = Path(output_folder)
    parts = (("training", "PHANTOM", training_cases), ("held_out", "PHANTOMHELDOUT", held_out_cases))
    ids: dict[str, list[str]] = {}
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not an empty folder; remove it, or choose another -o.")
    with new_folder(output) as partial:
        for stream, (part, site, count) in enumerate(parts):
            ids[part] = []
            for number in range(1, count + 1):
                grade: Grade = "LGG" if number % _LOW_GRADE_EVERY == 0 else "HGG"
                case_id = f"Brats18_{site}_{number:03d}_1"
                images, labels = make_phantom(size, (seed, stream, number), grade=grade)
                folder = partial / part / grade / case_id
                with file_errors(folder):
                    _write_case(folder, case_id, images, labels, spacing)
                ids[part].append(case_id)
    return PhantomSet(output / "training", output / "held_out", tuple(ids["training"]), tuple(ids["held_out"]))


def _checked_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or any(int(s) != s or s < _MINIMUM_EDGE for s in shape):
        raise InputError(f"shape is {tuple(shape)}; expected three whole numbers of at least {_MINIMUM_EDGE} voxels.")
    z, y, x = (int(s) for s in shape)
    return z, y, x


def _brain_coordinates(shape: tuple[int, int, int], half_axes: NDArray[np.float64]) -> FloatVolume:
    """Return voxel positions, (3, z, y, x), in units of the brain's half-axes: its surface is at distance about 1."""
    axes = [((np.arange(n) + 0.5) / n - 0.5) / h for n, h in zip(shape, half_axes, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


def _smooth_noise(position: FloatVolume, period: float, rng: np.random.Generator) -> FloatVolume:
    """Return a smooth random field of zero mean and unit variance with bumps about `period` brain half-axes wide.

    White noise on a coarse grid is interpolated with a Gaussian kernel, axis by axis. This is cheap for any period,
    looks the same at any resolution, and has no preferred direction, unlike splines on so few grid points.
    """
    lines = [position[0, :, 0, 0], position[1, 0, :, 0], position[2, 0, 0, :]]
    cell = 0.58 * period
    weights = []
    for line in lines:
        place = line / cell + rng.uniform()
        first = int(np.floor(place[0])) - 3
        last = int(np.ceil(place[-1])) + 3
        distance = place[:, None] - np.arange(first, last + 1)[None, :]
        weights.append(np.exp(-0.5 * distance**2).astype(np.float32))
    field = rng.standard_normal([weight.shape[1] for weight in weights], dtype=np.float32)
    for axis, weight in enumerate(weights):
        field = np.moveaxis(np.tensordot(weight, field, axes=(1, axis)), 0, axis)
    # The squared weights of each axis sum to sqrt(pi) for any voxel position between two grid points.
    return (field / np.pi**0.75).astype(np.float32)


def _anatomy(position: FloatVolume, rng: np.random.Generator) -> tuple[dict[str, BoolVolume], BoolVolume]:
    """Return masks of the healthy tissues, and of the whole brain."""
    z, y, x = position
    radius = np.sqrt((position**2).sum(0)) + 0.03 * _smooth_noise(position, 0.5, rng)
    brain = radius < 1.0

    # The cortex: a ribbon that folds in and out, with fluid in the furrows.
    folding = _smooth_noise(position, 0.16, rng)
    fluid = (radius > 0.93) & (folding > 0.9)
    fluid |= (np.abs(x + 0.02 * folding) < 0.03) & (radius > 0.62) & (z > -0.3)
    grey = radius + 0.11 * folding > 0.80
    for side in (-1.0, 1.0):
        nucleus = ((x - side * 0.3) / 0.16) ** 2 + ((y + 0.02) / 0.26) ** 2 + ((z + 0.08) / 0.2) ** 2
        grey |= nucleus < 1.0 + 0.2 * folding

    # The lateral ventricles: a pair of bent tubes beside the midline, whose width varies between cases.
    width = rng.uniform(0.8, 1.25)
    bend = 0.1 + 0.14 * (y + 0.15) ** 2
    ventricle_distance = np.full_like(x, np.inf)
    for side in (-1.0, 1.0):
        ventricle = ((x - side * bend) / (0.075 * width)) ** 2 + (y / 0.46) ** 2
        ventricle += ((z - 0.14 + 0.3 * y**2) / (0.13 * width)) ** 2
        ventricle_distance = np.minimum(ventricle_distance, ventricle)
    ventricles = ventricle_distance < 1.0

    # Bright rims at the ventricles' ends on FLAIR, and vessels on T1ce: a threshold would count them as tumour.
    caps = (ventricle_distance < 1.9) & (np.abs(y) > 0.3) & ~ventricles
    vessel = (np.abs(_smooth_noise(position, 0.3, rng)) < 0.10) & (np.abs(_smooth_noise(position, 0.3, rng)) < 0.22)
    vessel &= radius > 0.5

    tissue = {
        "grey": brain & grey,
        "caps": brain & caps,
        "vessel": brain & vessel,
        "fluid": brain & (fluid | ventricles),
        "ventricles": brain & ventricles,
    }
    return tissue, brain


def _lesions(
    position: FloatVolume,
    tissue: dict[str, BoolVolume],
    brain: BoolVolume,
    rng: np.random.Generator,
    grade: Grade,
) -> NDArray[np.uint8]:
    """Return the label map of one lesion or, with probability 0.3, two lesions."""
    labels = np.zeros(brain.shape, np.uint8)
    deep = ndimage.binary_erosion(brain, iterations=max(1, min(brain.shape) // 16))
    candidates = np.flatnonzero(deep & ~tissue["ventricles"])
    count = 2 if rng.random() < 0.3 else 1
    for lesion in range(count):
        centre_index = np.unravel_index(candidates[rng.integers(candidates.size)], brain.shape)
        centre = position[(slice(None), *centre_index)]
        # In units of the brain's half-axes, about 70 mm: cores of 14 to 25 mm radius; a second lesion is smaller.
        core_radius = rng.uniform(0.2, 0.36) * (1.0 if lesion == 0 else 0.6)
        stretch = rng.uniform(0.8, 1.25, 3).astype(np.float32)
        offset = (position - centre[:, None, None, None]) * stretch[:, None, None, None]
        distance = np.sqrt((offset**2).sum(0)) / core_radius
        distance += 0.19 * _smooth_noise(position, 0.9 * core_radius, rng)

        # Oedema follows white matter: it spares the cortex, ends at the ventricles and has finger-like extensions.
        reach = rng.uniform(1.2, 1.6)
        spread = distance + 0.22 * _smooth_noise(position, 1.3 * core_radius, rng) + 0.25 * tissue["grey"]
        oedema = brain & (spread < reach) & ~tissue["ventricles"]
        core = brain & (distance < 1.0)
        labels[oedema & (labels == 0)] = OEDEMA
        if grade == "LGG":
            labels[core] = NECROSIS
            continue
        # Necrosis leaves a rim of uneven thickness around it.
        inner = rng.uniform(0.5, 0.75) + 0.14 * _smooth_noise(position, 0.8 * core_radius, rng)
        inner = np.minimum(inner, 0.85)
        labels[core] = ENHANCING
        labels[core & (distance < inner)] = NECROSIS
    return labels


def _images(
    tissue: dict[str, BoolVolume],
    brain: BoolVolume,
    labels: NDArray[np.uint8],
    rng: np.random.Generator,
    grade: Grade,
) -> NDArray[np.int16]:
    """Return the four modalities of a labelled head, int16 (4, z, y, x)."""
    layers = [(name, tissue[name]) for name in ("grey", "caps", "vessel", "fluid")]
    layers += [("oedema", labels == OEDEMA), ("enhancing", labels == ENHANCING)]
    layers += [("solid" if grade == "LGG" else "necrosis", labels == NECROSIS)]

    position = _brain_coordinates((brain.shape[0], brain.shape[1], brain.shape[2]), np.array(_BRAIN_HALF_AXES))
    # Fraction of the lesion's full contrast per voxel: tumours are patchy, with the same patches in all modalities.
    patches = np.clip(0.85 + 0.22 * _smooth_noise(position, 0.2, rng), 0.35, 1.25)
    lesion = labels > 0

    images = np.zeros((len(MODALITIES), *brain.shape), np.int16)
    for channel in range(len(MODALITIES)):
        normal = np.full(brain.shape, _TISSUE_INTENSITY["white"][channel], np.float32)
        for name, mask in layers[:4]:
            normal[mask] = _TISSUE_INTENSITY[name][channel]
        image = normal.copy()
        for name, mask in layers[4:]:
            image[mask] = _TISSUE_INTENSITY[name][channel]
        image = np.where(lesion, normal + patches * (image - normal), normal)
        # Blur for partial volume at borders, then add texture, a smooth bias field and noise.
        image = ndimage.gaussian_filter(image, 0.55)
        image *= 1.0 + 0.05 * _smooth_noise(position, 0.15, rng)
        image *= np.exp(0.07 * _smooth_noise(position, 1.2, rng))
        noise_level = 0.045 * _TISSUE_INTENSITY["white"][channel]
        image = np.hypot(
            image + noise_level * rng.standard_normal(brain.shape, dtype=np.float32),
            noise_level * rng.standard_normal(brain.shape, dtype=np.float32),
        )
        # The gain differs between scanners and images.
        image *= rng.uniform(0.75, 1.3)
        images[channel] = np.where(brain, np.clip(np.rint(image), 1, np.iinfo(np.int16).max), 0).astype(np.int16)
    return images


def _write_case(
    folder: Path,
    case_id: str,
    images: NDArray[np.int16],
    labels: NDArray[np.uint8],
    spacing: Sequence[float],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for modality, image in zip(MODALITIES, images, strict=True):
        _write_nifti(folder / f"{case_id}_{modality}.nii.gz", image, spacing)
    _write_nifti(folder / f"{case_id}_seg.nii.gz", labels, spacing)


def _write_nifti(path: Path, array: NDArray[Any], spacing: Sequence[float]) -> None:
    """Write a (z, y, x) array with BraTS's geometry: x to the left, y to the back, the last row at y = 0."""
    affine = np.diag([-float(spacing[0]), -float(spacing[1]), float(spacing[2]), 1.0])
    affine[1, 3] = (array.shape[1] - 1) * float(spacing[1])
    write_nifti(path, array.T, header_of(affine))
