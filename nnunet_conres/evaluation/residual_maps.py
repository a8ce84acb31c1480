"""Inter-slice residuals of image, label and prediction files, as NIfTI in the file's geometry and as figures."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.case_ids import unsafe_ids
from nnunet_conres.datasets.sparse import Axis, slice_axis
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.figures import Legend, read_legend, save_figure
from nnunet_conres.evaluation.residual_figures import (
    Slicing,
    image_residual_figure,
    label_residual_figure,
    mean_per_slice,
)
from nnunet_conres.evaluation.summary import dataset_json_near
from nnunet_conres.files import write_json
from nnunet_conres.folders import list_files, writing
from nnunet_conres.images.nifti import whole_numbers
from nnunet_conres.images.volumes import affine_of, read_labels, read_volume, reader_of_file, reversed_axes, write_map
from nnunet_conres.text import first_few

Kind = Literal["image", "labels"]

Intensities = Literal["zscore", "raw"]

ENDINGS: Final = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".gipl", ".gipl.gz")
"""File endings that are searched for in a folder: formats with a geometry that SimpleITK reads."""

RECORD: Final = "residuals.json"
"""File in the output folder that lists the written files."""

# Label maps are unlikely to have more distinct values, and images have more.
_MOST_LABELS: Final = 32
_LARGEST_LABEL: Final = 255

# nnU-Net normalises within the non-zero voxels if cropping to them leaves less than this share of the volume.
_MASKED_NORMALISATION_BELOW: Final = 0.75


@dataclass(frozen=True)
class FileLook:
    """Properties of a file, found by reading it.

    Attributes:
        path: The file.
        reader: nnU-Net's reader for the file.
        kind: Image or labels.
        shape: Number of voxels along the axes of nnU-Net's arrays: z, y, x.
        spacing: Voxel size along these axes, mm.
        values: The values of a label file, ascending.
        errors: A message for every error. If there are any, the other attributes have no meaning.
    """

    path: Path
    reader: type | None = None
    kind: Kind = "image"
    shape: tuple[int, ...] = (0, 0, 0)
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    values: tuple[int, ...] = ()
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileResiduals:
    """The files written for one input file.

    Attributes:
        source: The input file.
        kind: Image or labels.
        maps: Residual map of every label or region, by name. An image has one map, named residual.
        figure: The figure.
        means: Mean residual of every slice, by the names of `maps`.
    """

    source: Path
    kind: Kind
    maps: Mapping[str, Path]
    figure: Path
    means: Mapping[str, tuple[float, ...]]

    def as_json(self) -> dict[str, Any]:
        """Return the entry of `RECORD`; paths are file names in the output folder."""
        return {
            "source": str(self.source),
            "kind": self.kind,
            "maps": {name: path.name for name, path in self.maps.items()},
            "figure": self.figure.name,
            "mean_per_slice": {name: list(values) for name, values in self.means.items()},
        }


@dataclass(frozen=True)
class ResidualMaps:
    """Result of `write_residual_maps`.

    Attributes:
        axis: Axis of the slices in nnU-Net's arrays.
        axis_reason: Why this axis was chosen.
        files: The written files, by input file.
        warnings: Messages for the user.
    """

    axis: int
    axis_reason: str
    files: tuple[FileResiduals, ...]
    warnings: tuple[str, ...] = ()


def write_residual_maps(
    source: str | Path,
    output_folder: str | Path,
    *,
    axis: Axis = "slice",
    kind: Kind | None = None,
    intensities: Intensities = "zscore",
    dataset_json: str | Path | None = None,
    progress: bool = True,
) -> ResidualMaps:
    """Write the inter-slice residual of each file, as NIfTI in the file's geometry and as a figure.

    Args:
        source: An image or label file, or a folder of them: a BraTS case, imagesTr, labelsTr, predictions.
        output_folder: Receives NAME_residual.nii.gz for images (float32), NAME_residual_REGION.nii.gz for labels (0 or
            1), NAME_residual.png, and `RECORD`; created if necessary.
        axis: Axis of the slices in the arrays that nnU-Net's readers return: z, y, x. "slice" chooses the axis that
            nnU-Net would move to the front if the files were its data set: the one with the largest median spacing,
            the first of several.
        kind: Image or labels. By default the folder name determines it, otherwise the values do.
        intensities: For images: "zscore", normalised as nnU-Net does by default, in standard deviations; or "raw".
        dataset_json: dataset.json with the names of labels and regions. By default the one next to a file or up to two
            folders above. Without one, every label has a separate residual.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The written files.

    Raises:
        InputError: Files or arguments are invalid. Lists all errors.
    """
    from tqdm import tqdm

    paths, errors = find_files(Path(source))
    errors += output_errors(Path(output_folder), paths)
    if axis not in ("slice", 0, 1, 2):
        errors.append(f"The axis is {axis!r}; expected slice, 0, 1 or 2.")
    if kind not in (None, "image", "labels"):
        errors.append(f"The kind is {kind!r}; expected image or labels.")
    if intensities not in ("zscore", "raw"):
        errors.append(f"The intensities are {intensities!r}; expected zscore or raw.")
    looks = [look_at_file(path, kind) for path in tqdm(paths, desc="Checking", unit="file", disable=not progress)]
    errors += [error for look in looks for error in look.errors]
    readable = [look for look in looks if not look.errors]
    chosen = 0
    if readable and axis in ("slice", 0, 1, 2):
        chosen = slice_axis([look.spacing for look in readable]) if axis == "slice" else int(axis)
        errors += [error for look in readable for error in slice_errors(look, chosen)]
    legends: dict[Path, Legend | None] = {}
    warnings: list[str] = []
    for look in readable:
        if look.kind == "labels":
            legends[look.path], found, noted = _legend_of(look, dataset_json)
            errors += found
            warnings += noted
    if errors:
        raise InputError(errors)

    output = Path(output_folder)
    with writing(output):
        done = []
        for look in tqdm(looks, desc="Residuals", unit="file", disable=not progress):
            if look.kind == "image":
                done.append(_write_image_residual(look, output, chosen, intensities))
            else:
                regions, ignore_label = regions_of(look.values, legends[look.path])
                done.append(_write_label_residuals(look, output, chosen, regions, ignore_label))
                if not any(any(values) for values in done[-1].means.values()):
                    warnings.append(f"{look.path} has no residual: its labels do not change between slices.")
        spacing = ", ".join(f"{value:g}" for value in np.median([look.spacing for look in looks], axis=0))
        result = ResidualMaps(
            axis=chosen,
            axis_reason=f"the first with the largest spacing ({spacing} mm)" if axis == "slice" else "as requested",
            files=tuple(done),
            warnings=tuple(warnings),
        )
        content = {"axis": chosen, "intensities": intensities, "files": [one.as_json() for one in done]}
        write_json(output / RECORD, content)
        return result


def residual_of_image(voxels: NDArray[Any], axis: int) -> NDArray[np.float32]:
    """Return the absolute difference of every slice to the previous one; 0 in the first slice.

    Args:
        voxels: Three axes, any intensities.
        axis: Axis of the slices.

    Returns:
        Array of the same shape.
    """
    import torch

    from nnunet_conres.residuals import inter_slice_residual

    volume = torch.from_numpy(np.ascontiguousarray(voxels, dtype=np.float32))[None, None]
    return inter_slice_residual(volume, axis)[0, 0].numpy()


def residual_of_labels(
    labels: NDArray[Any], regions: Mapping[str, Sequence[int]], axis: int, ignore_label: int | None = None
) -> dict[str, NDArray[np.bool_]]:
    """Return where the mask of each region differs from the previous slice; False in the first slice.

    Args:
        labels: Label map with three axes.
        regions: Label values of every label or region, by name.
        axis: Axis of the slices.
        ignore_label: Value of voxels that are not annotated. At such a voxel, and at its neighbour in the next slice,
            the residual is unknown and set to False.

    Returns:
        Arrays of the same shape, by name.
    """
    import torch

    from nnunet_conres.residuals import label_residual

    target = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int32))[None, None]
    residual, _ = label_residual(
        target, classes=[tuple(values) for values in regions.values()], ignore_label=ignore_label, slice_axis=axis
    )
    return dict(zip(regions, residual[0].numpy(), strict=True))


def normalise(voxels: NDArray[Any]) -> NDArray[np.float32]:
    """Subtract the mean and divide by the standard deviation, as nnU-Net does by default, without resampling.

    As in nnU-Net, the statistics are computed after cropping to the non-zero region. If this leaves less than three
    quarters of the volume, they are those of the non-zero voxels (holes filled), and the background stays 0.

    Args:
        voxels: Three axes, any intensities.

    Returns:
        Array of the same shape.
    """
    from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask

    image = voxels.astype(np.float32)
    mask = create_nonzero_mask(image[None])
    if not mask.any():
        return image
    box = tuple(
        slice(int(occupied[0]), int(occupied[-1]) + 1)
        for axis in range(3)
        for occupied in [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))]
    )
    masked = image[box].size < _MASKED_NORMALISATION_BELOW * image.size
    counted = image[mask] if masked else image[box]
    normalised = (image - counted.mean()) / max(float(counted.std()), 1e-8)
    if masked:
        normalised[~mask] = 0
    return normalised


# --- files ----------------------------------------------------------------------------------------------------------


def find_files(source: Path) -> tuple[list[Path], list[str]]:
    """Return the file itself, or a folder's files with an ending in `ENDINGS`, and a message for every error."""
    if source.is_file():
        return [source], unsafe_ids([stem(source)], source)
    if not source.is_dir():
        return [], [f"{source} does not exist; expected an image or label file, or a folder of such files."]
    paths = list_files(source, ENDINGS, ignore_case=True)
    if not paths:
        return [], [f"{source} has no file that ends in {', '.join(ENDINGS)}; expected images or labels there."]
    twice = [name for name, times in Counter(stem(path).casefold() for path in paths).items() if times > 1]
    errors = [f"{source} has several files called {name}, with different endings; keep one." for name in twice]
    return paths, errors + unsafe_ids(map(stem, paths), source)


def stem(path: Path) -> str:
    """Return a file's name without its ending; .nii.gz counts as one ending."""
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.stem


def output_errors(output: Path, paths: Sequence[Path]) -> Iterator[str]:
    """Yield a message if the output folder can't be used."""
    if output.exists() and not output.is_dir():
        yield f"{output} is not a folder; expected an output folder."
    elif any(path.parent.resolve() == output.resolve() for path in paths):
        yield f"{output} is the folder of the input; choose another -o."


def look_at_file(path: Path, kind: Kind | None = None, reader: type | None = None) -> FileLook:
    """Read a file and check that it is a volume with finite values.

    Args:
        path: The file.
        kind: Image or labels. By default the folder name determines it, otherwise the values do.
        reader: nnU-Net's reader for the file. By default the one that a nearby dataset.json names, or one that can
            read the file.

    Returns:
        The file's properties or errors.
    """
    try:
        reader = reader or reader_of_file(path, _dataset_json_of(path))
        volume = read_volume(path, reader)
    except InputError as error:
        return FileLook(path, errors=error.errors)
    voxels, properties = volume.voxels, volume.properties
    axes = len(properties["sitk_stuff"]["spacing"]) if "sitk_stuff" in properties else 3
    if voxels.shape[0] != 1 and axes == 3:
        return FileLook(path, errors=(f"{path} has {voxels.shape[-1]} values per voxel (colours?); expected one.",))
    if axes != 3 or voxels.shape[0] != 1:
        return FileLook(
            path,
            errors=(
                f"{path} has {axes} axes; expected a volume with three. A residual is between slices, and each channel "
                f"needs a separate file.",
            ),
        )
    if affine_of(properties) is None:
        return FileLook(path, errors=(f"{path} has no geometry; expected a format that has one, like .nii.gz.",))
    if volume.not_finite:
        return FileLook(
            path, errors=(f"{path} has {volume.not_finite} voxels that are NaN or infinite; expected numbers.",)
        )
    values = _label_values(whole_numbers(voxels, volume.intercept))
    found = kind or _kind(path, values)
    if found == "labels" and values is None:
        return FileLook(path, errors=(f"{path} is not a label file: its values are not integers from 0, or too many.",))
    known = values if found == "labels" and values else ()
    return FileLook(path, reader, found, tuple(voxels.shape[1:]), volume.spacing, known)


def _dataset_json_of(path: Path) -> Mapping[str, Any] | None:
    """Return the content of the dataset.json near a file; None if there is no readable one."""
    near = dataset_json_near(path)
    try:
        content = None if near is None else json.loads(near.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, Mapping) else None


def _label_values(voxels: NDArray[Any]) -> tuple[int, ...] | None:
    """Return the distinct values if they may be labels, otherwise None."""
    values = np.unique(voxels)
    if len(values) > _MOST_LABELS or values[0] < 0 or values[-1] > _LARGEST_LABEL or (values % 1 != 0).any():
        return None
    return tuple(int(value) for value in values)


def _kind(path: Path, values: tuple[int, ...] | None) -> Kind:
    folder = path.resolve().parent.name.lower()
    if folder.startswith("images") or values is None:
        return "image"
    if folder.startswith("labels"):
        return "labels"
    # a volume with a single value may be either; the names of nnU-Net's images end in the channel number
    return "image" if len(values) < 2 and re.search(r"_\d{4}$", stem(path)) else "labels"


def slice_errors(look: FileLook, axis: int) -> Iterator[str]:
    """Yield a message if a file has too few slices along an axis for a residual."""
    if look.shape[axis] < 2:
        yield (
            f"{look.path} has a single slice along axis {axis} (shape {look.shape}), but a residual needs two slices; "
            f"choose another --axis, or leave it out."
        )


def file_parts(names: Iterable[str]) -> dict[str, str]:
    """Return a part of a file name for each region name. The parts are unique, ignoring case."""
    parts: dict[str, str] = {}
    for name in names:
        part = re.sub(r"[^A-Za-z0-9.+-]+", "_", name)
        taken = {other.lower() for other in parts.values()}
        candidates = (part if number == 1 else f"{part}_{number}" for number in itertools.count(1))
        parts[name] = next(candidate for candidate in candidates if candidate.lower() not in taken)
    return parts


def _legend_of(look: FileLook, dataset_json: str | Path | None) -> tuple[Legend | None, list[str], list[str]]:
    """Return the names of a label file's values, errors and warnings."""
    path = Path(dataset_json) if dataset_json is not None else dataset_json_near(look.path)
    if path is None:
        return None, [], []
    try:
        legend = read_legend(path)
    except (OSError, ValueError) as error:
        return None, [str(error)], []
    known = {0, *(value for values in legend.regions.values() for value in values)}
    strange = [str(value) for value in look.values if value not in known | {legend.ignore_label}]
    if not strange:
        return legend, [], []
    problem = f"{look.path} has labels that {path} does not name: {first_few(strange)}"
    if dataset_json is not None:
        return None, [f"{problem}; pass the dataset.json of its data set."], []
    return None, [], [f"{problem}. Each label gets a residual; for regions, pass the right file with -djfile."]


def regions_of(values: Sequence[int], legend: Legend | None) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """Return the labels or regions to compute residuals of, by name, and the ignore label."""
    if legend is not None:
        return dict(legend.regions), legend.ignore_label
    return {f"label_{value}": (value,) for value in values if value} or {"label_1": (1,)}, None


def _write_image_residual(look: FileLook, output: Path, axis: int, intensities: Intensities) -> FileResiduals:
    assert look.reader is not None, "files that can't be read are refused"
    image = read_volume(look.path, look.reader)
    voxels = image.voxels[0]
    residual = residual_of_image(normalise(voxels) if intensities == "zscore" else voxels, axis)
    name = stem(look.path)
    means = mean_per_slice(residual, axis)
    figure = image_residual_figure(
        voxels,
        residual,
        means,
        slicing=Slicing(axis, look.spacing, reversed_axes(image.properties), name),
        unit="standard deviations" if intensities == "zscore" else "intensity",
    )
    return FileResiduals(
        look.path,
        "image",
        {"residual": write_map(output / f"{name}_residual.nii.gz", residual, image.properties)},
        save_figure(figure, output / f"{name}_residual.png"),
        {"residual": means},
    )


def _write_label_residuals(
    look: FileLook, output: Path, axis: int, regions: Mapping[str, Sequence[int]], ignore_label: int | None
) -> FileResiduals:
    assert look.reader is not None, "files that can't be read are refused"
    labels = read_labels(look.path, look.reader)
    residuals = residual_of_labels(labels.voxels, regions, axis, ignore_label)
    name = stem(look.path)
    means = {region: mean_per_slice(residual, axis) for region, residual in residuals.items()}
    figure = label_residual_figure(
        labels.voxels,
        residuals,
        means,
        regions=regions,
        slicing=Slicing(axis, look.spacing, reversed_axes(labels.properties), name),
    )
    parts = file_parts(residuals)
    maps = {
        region: write_map(
            output / f"{name}_residual_{parts[region]}.nii.gz", residual.astype(np.uint8), labels.properties
        )
        for region, residual in residuals.items()
    }
    return FileResiduals(look.path, "labels", maps, save_figure(figure, output / f"{name}_residual.png"), means)
