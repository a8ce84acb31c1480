"""BraTS's folders into nnU-Net's raw format, whatever the year: one channel order, one set of labels."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.datasets.raw import (
    FOLDER_VARIABLES,
    RAW_NOT_SET,
    InputError,
    folder_from_environment,
    folder_name,
    id_faults,
    link_or_copy,
    map_cases,
    short_message,
    some,
    target_faults,
)

ImageMode = Literal["link", "copy"]
Transfer = Literal["linked", "copied", "compressed"]

CHANNELS: Final = ("FLAIR", "T1", "T1ce", "T2")
"""nnU-Net's channels 0 to 3 for every year, so that one year's model can predict another year's cases."""

TISSUES: Final[Mapping[str, int]] = {"oedema": 1, "necrosis": 2, "enhancing": 3}
"""nnU-Net's consecutive label of each tissue, outermost region first: writing regions in that order restores labels."""

REGIONS: Final[Mapping[str, int | list[int]]] = {
    "background": 0,
    "whole_tumor": [TISSUES["oedema"], TISSUES["necrosis"], TISSUES["enhancing"]],
    "tumor_core": [TISSUES["necrosis"], TISSUES["enhancing"]],
    "enhancing_tumor": TISSUES["enhancing"],
}
REGIONS_CLASS_ORDER: Final = (TISSUES["oedema"], TISSUES["necrosis"], TISSUES["enhancing"])


_NIFTI_HEADER_SIZE: Final = 348
# NIfTI's codes of the voxel types that can hold NaN.
_NIFTI_FLOATS: Final[Mapping[int, str]] = {16: "f4", 64: "f8"}


@dataclass(frozen=True)
class Scheme:
    """How the files of some years are named and labelled. A further year is a further entry in `SCHEMES`.

    Attributes:
        name: What `--scheme` calls it.
        years: For messages.
        separator: Between case id and file part.
        modalities: File part of each channel.
        label_part: File part of the labels.
        labels: Tissue of each label value other than 0, the background.
    """

    name: str
    years: str
    separator: str
    modalities: Mapping[str, str]
    label_part: str
    labels: Mapping[int, str]

    def split(self, file_name: str) -> tuple[str, str] | None:
        """Case id and file part (lower case) of a NIfTI file named after this scheme, else None."""
        parts = "|".join((*self.modalities.values(), self.label_part))
        match = re.fullmatch(rf"(.+){self.separator}({parts})\.nii(?:\.gz)?", file_name, re.IGNORECASE)
        return None if match is None else (match[1], match[2].lower())


SCHEMES: Final[Mapping[str, Scheme]] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="2018",
            years="2017 to 2021",
            separator="_",
            modalities={"FLAIR": "flair", "T1": "t1", "T1ce": "t1ce", "T2": "t2"},
            label_part="seg",
            labels={1: "necrosis", 2: "oedema", 4: "enhancing"},
        ),
        Scheme(
            name="2023",
            years="2023",
            separator="-",
            modalities={"FLAIR": "t2f", "T1": "t1n", "T1ce": "t1c", "T2": "t2w"},
            label_part="seg",
            labels={1: "necrosis", 2: "oedema", 3: "enhancing"},
        ),
    )
}


class ConversionError(InputError):
    """The input or the target does not allow a conversion; nothing was written."""


@dataclass(frozen=True)
class Case:
    """The files of one case.

    Attributes:
        case_id: As in the file names, which nnU-Net keeps.
        scheme: Name of the scheme that the files follow.
        images: One file per channel name.
        labels: Label file, or None.
        held_out: Whether the case came from a folder of held-out cases.
    """

    case_id: str
    scheme: str
    images: Mapping[str, Path]
    labels: Path | None
    held_out: bool

    @property
    def trains(self) -> bool:
        """Whether the case goes to imagesTr."""
        return self.labels is not None and not self.held_out


@dataclass(frozen=True)
class Findings:
    """What checking found: faults forbid the conversion, warnings do not."""

    faults: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """What `convert_brats` wrote.

    Attributes:
        dataset_folder: The new folder in nnUNet_raw.
        training_ids: Cases in imagesTr and labelsTr.
        test_ids: Cases in imagesTs.
        test_label_ids: Those of `test_ids` with labels, in labelsTs.
        schemes: Names of the schemes met.
        transfers: Number of image files linked, copied and compressed.
        warnings: What the user should know and nnU-Net does not mind.
    """

    dataset_folder: Path
    training_ids: tuple[str, ...]
    test_ids: tuple[str, ...]
    test_label_ids: tuple[str, ...]
    schemes: tuple[str, ...]
    transfers: Mapping[Transfer, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def convert_brats(
    input_folders: Sequence[str | Path],
    dataset_id: int,
    *,
    held_out_folders: Sequence[str | Path] = (),
    dataset_name: str = "BraTS",
    schemes: Sequence[str] = ("auto",),
    image_mode: ImageMode = "link",
    processes: int = 1,
    raw_folder: str | Path | None = None,
    progress: bool = True,
) -> Conversion:
    """Convert BraTS folders to one nnU-Net data set with regions whole tumour, tumour core and enhancing tumour.

    Labelled cases of `input_folders` go to imagesTr and labelsTr, all others to imagesTs, the labels of held-out cases
    to labelsTs. Everything is checked before anything is written, and the data set gets its name only when complete.

    Args:
        input_folders: Searched with all their subfolders.
        dataset_id: nnU-Net's number for the data set, 1 to 999.
        held_out_folders: Like `input_folders`, but none of these cases is trained on.
        dataset_name: The part of the data set's name after the number.
        schemes: Names of the schemes the files may follow; more than one allows a mixture. ("auto",) takes any scheme,
            but only one.
        image_mode: "link" makes hard links where the file system can and copies elsewhere; "copy" always copies. Files
            that are not yet compressed are compressed in both cases.
        processes: Number of processes, 1 or more.
        raw_folder: nnU-Net's raw folder; by default the value of the environment variable nnUNet_raw.
        progress: Whether to show progress bars on stderr.

    Returns:
        What was written.

    Raises:
        ConversionError: Something is wrong with the input or the target. Lists all that was found.
    """
    faults = list(_argument_faults(dataset_id, dataset_name, schemes, image_mode, processes))
    raw = folder_from_environment(FOLDER_VARIABLES[0]) if raw_folder is None else Path(raw_folder)
    if raw is None:
        faults.append(RAW_NOT_SET)
    else:
        faults += target_faults(raw, dataset_id, dataset_name)
    cases, found = find_cases(input_folders, held_out_folders=held_out_folders, schemes=schemes)
    faults += found

    # Faulty arguments do not keep the files from being looked at: whoever has to repair both learns of both at once.
    findings = list(map_cases(check_case, cases, max(1, processes), "Checking", progress))
    faults += [fault for finding in findings for fault in finding.faults]
    if faults or raw is None:
        raise ConversionError(faults)
    warnings = [warning for finding in findings for warning in finding.warnings] + _doubts(cases)

    target = raw / folder_name(dataset_id, dataset_name)
    partial = raw / f".{target.name}.partial"
    raw.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    for folder in ("imagesTr", "labelsTr"):
        (partial / folder).mkdir(parents=True)
    if not all(case.trains for case in cases):
        (partial / "imagesTs").mkdir()
    if any(case.held_out and case.labels is not None for case in cases):
        (partial / "labelsTs").mkdir()
    transfers: dict[Transfer, int] = {"linked": 0, "copied": 0, "compressed": 0}
    try:
        jobs = [(case, partial, image_mode) for case in cases]
        for done in map_cases(_write_case, jobs, processes, "Writing", progress):
            for transfer in done:
                transfers[transfer] += 1
        _write_dataset_json(partial, target.name, cases)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

    training = tuple(case.case_id for case in cases if case.trains)
    if not training:
        warnings.append("No case has labels: the data set can be predicted, but not trained on.")
    return Conversion(
        dataset_folder=target,
        training_ids=training,
        test_ids=tuple(case.case_id for case in cases if not case.trains),
        test_label_ids=tuple(case.case_id for case in cases if case.held_out and case.labels is not None),
        schemes=tuple(sorted({case.scheme for case in cases})),
        transfers=transfers,
        warnings=tuple(warnings),
    )


def _doubts(cases: Sequence[Case]) -> list[str]:
    """What may have been meant otherwise, seen over all cases."""
    doubts = []
    labelled_2023 = [case.case_id for case in cases if case.scheme == "2023" and case.labels is not None]
    other = [case_id for case_id in labelled_2023 if not case_id.upper().startswith("BRATS-GLI-")]
    if other:
        doubts.append(
            f"{some(other)}: not named BraTS-GLI-... Other challenges since 2023 use the same file names with other "
            f"meanings of the labels; these were taken for adult glioma (1 necrosis, 2 oedema, 3 enhancing)."
        )
    labelled_folders = {_collection(case) for case in cases if case.trains}
    unlabelled = [case.case_id for case in cases if case.labels is None and _collection(case) in labelled_folders]
    if unlabelled:
        doubts.append(f"{some(unlabelled)}: no labels, beside cases that have them. Went to imagesTs.")
    return doubts


def _collection(case: Case) -> Path:
    """The folder that holds the case's own folder, or its files where it has none."""
    folder = next(iter(case.images.values())).parent
    return folder.parent if folder.name == case.case_id else folder


def find_cases(
    folders: Sequence[str | Path],
    *,
    held_out_folders: Sequence[str | Path] = (),
    schemes: Sequence[str] = ("auto",),
) -> tuple[list[Case], list[str]]:
    """Collect the cases below some folders by their file names, without opening a file.

    Args:
        folders: Searched with all their subfolders; hidden files are passed over.
        held_out_folders: Like `folders`; their cases are marked as held out.
        schemes: As in `convert_brats`.

    Returns:
        The complete cases sorted by id, and a message for every fault.
    """
    faults: list[str] = []
    automatic = "auto" in schemes
    allowed = tuple(SCHEMES) if automatic else tuple(name for name in schemes if name in SCHEMES)
    parts: dict[tuple[bool, Path, str, str], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    owners: dict[Path, bool] = {}
    for held_out, roots in ((False, folders), (True, held_out_folders)):
        for root in roots:
            if not Path(root).is_dir():
                faults.append(f"{root} is not a folder; expected a folder with BraTS cases.")
                continue
            for path in _nifti_files(Path(root)):
                # One folder inside another, or named twice, is not a second copy of its cases.
                if owners.setdefault(path.resolve(), held_out) != held_out:
                    faults.append(f"{path} is among both the input and the held-out folders; leave it out of one.")
                    continue
                place = _place(path)
                if place is None:
                    faults.append(
                        f"{path} fits no naming scheme of BraTS, so it is unclear what it is. Expected "
                        f"{_expected_names(allowed)}; rename it, or move it out of the folder."
                    )
                elif place[0] not in allowed:
                    faults.append(
                        f"{path} is named as BraTS {SCHEMES[place[0]].years} names its files, which --scheme "
                        f"{' '.join(schemes)} does not allow; move it out of the folder, or add --scheme {place[0]}."
                    )
                else:
                    scheme, case_id, part = place
                    paths = parts[held_out, path.parent, case_id, scheme][part]
                    if path.resolve() not in [known.resolve() for known in paths]:
                        paths.append(path)

    cases = []
    for (held_out, folder, case_id, scheme), files in parts.items():
        found = list(_file_faults(SCHEMES[scheme], folder, case_id, files))
        faults += found
        if not found:
            images = {channel: files[part][0] for channel, part in SCHEMES[scheme].modalities.items()}
            label_files = files.get(SCHEMES[scheme].label_part)
            cases.append(Case(case_id, scheme, images, label_files[0] if label_files else None, held_out))
    cases.sort(key=lambda case: case.case_id)

    faults += _duplicate_faults((case_id, folder) for _, folder, case_id, _ in parts)
    met = sorted({scheme for *_, scheme in parts})
    if automatic and len(met) > 1:
        years = " and ".join(f"{SCHEMES[name].years} (--scheme {name})" for name in met)
        faults.append(
            f"The folders mix files named as in BraTS {years}. If that is meant, say so with --scheme {' '.join(met)}."
        )
    if not parts and not faults:
        listed = ", ".join(str(folder) for folder in (*folders, *held_out_folders)) or "no folder"
        faults.append(f"No BraTS case found in {listed}. Expected files named {_expected_names(allowed)}.")
    return cases, faults


def check_case(case: Case) -> Findings:
    """Read all files of a case and report what keeps nnU-Net, or the meaning of the labels, from being right.

    Args:
        case: The case, complete.

    Returns:
        Faults: a file that is unreadable, truncated or not three-dimensional; voxels that are not finite; geometry that
        differs between files; labels outside the scheme. Warnings: labels that are all background, images that are 0.
    """
    faults: list[str] = []
    warnings: list[str] = []
    reference: tuple[Path, Any] | None = None
    paths = [*case.images.values(), *([] if case.labels is None else [case.labels])]
    for path in paths:
        try:
            not_finite = _count_not_finite(path)
            image = _read(path)
            voxels = _voxels(image)
        except (OSError, EOFError, zlib.error, RuntimeError, ValueError) as error:
            faults.append(f"{path} cannot be read: {short_message(error)}. Get the file anew, or leave the case out.")
            continue
        if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
            faults.append(
                f"{path} has {image.GetDimension()} dimensions and {image.GetNumberOfComponentsPerPixel()} values per "
                f"voxel; expected one three-dimensional image."
            )
            continue
        if reference is None:
            reference = (path, image)
        else:
            difference = _geometry_difference(reference[1], image)
            if difference:
                faults.append(
                    f"{path} and {reference[0].name} do not lie on the same voxel grid: {difference}. All files of a "
                    f"case must; resample the odd one, or leave the case out."
                )
        if not_finite:
            faults.append(f"{path} has {not_finite} voxels that are NaN or infinite; expected finite intensities.")
        elif path == case.labels:
            strange = _labels_outside(voxels, SCHEMES[case.scheme])
            if strange:
                faults.append(_label_message(path, strange, SCHEMES[case.scheme]))
            elif not voxels.any():
                warnings.append(f"{path} is all background: the case has no tumour.")
        elif not voxels.any():
            warnings.append(f"{path} is 0 everywhere: the modality is empty.")
    return Findings(tuple(faults), tuple(warnings))


def to_nnunet_labels(labels: NDArray[Any], scheme: str) -> NDArray[np.uint8]:
    """Map a scheme's label values to nnU-Net's.

    Args:
        labels: Label map of any shape, with the scheme's values only.
        scheme: A name in `SCHEMES`.

    Returns:
        Array of the same shape with 0 background, 1 oedema, 2 necrosis or non-enhancing core, 3 enhancing.

    Raises:
        ValueError: A value is not one of the scheme's.
    """
    strange = _labels_outside(labels, SCHEMES[scheme])
    if strange:
        raise ValueError(_label_message("The label map", strange, SCHEMES[scheme]))
    mapped = np.zeros(labels.shape, np.uint8)
    for value, tissue in SCHEMES[scheme].labels.items():
        mapped[labels == value] = TISSUES[tissue]
    return mapped


def _argument_faults(
    dataset_id: int, dataset_name: str, schemes: Sequence[str], image_mode: str, processes: int
) -> Iterator[str]:
    yield from id_faults(dataset_id, dataset_name)
    unknown = [name for name in schemes if name != "auto" and name not in SCHEMES]
    if unknown or not schemes:
        yield f"The scheme is {' '.join(unknown) or 'missing'}; expected auto or any of {', '.join(SCHEMES)}."
    elif "auto" in schemes and len(schemes) > 1:
        yield "--scheme auto cannot be combined with others; name all that are allowed, or auto alone."
    if image_mode not in ("link", "copy"):
        yield f"The image mode is {image_mode!r}; expected link or copy."
    if processes < 1:
        yield f"The number of processes is {processes}; expected 1 or more."


def _nifti_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith((".nii", ".nii.gz")) and not name.startswith("."):
                yield Path(folder, name)


def _place(path: Path) -> tuple[str, str, str] | None:
    """Scheme name, case id and file part that a file's name says, or None."""
    for scheme in SCHEMES.values():
        split = scheme.split(path.name)
        if split is not None:
            return (scheme.name, *split)
    return None


def _expected_names(schemes: Iterable[str]) -> str:
    return " or ".join(
        f"CASE{scheme.separator}{{{','.join((*scheme.modalities.values(), scheme.label_part))}}}.nii.gz"
        for scheme in (SCHEMES[name] for name in schemes)
    )


def _file_faults(scheme: Scheme, folder: Path, case_id: str, files: Mapping[str, Sequence[Path]]) -> Iterator[str]:
    for part in (*scheme.modalities.values(), scheme.label_part):
        paths = files.get(part, ())
        if not paths and part != scheme.label_part:
            yield (
                f"{folder / case_id}{scheme.separator}{part}.nii.gz is missing; a case needs all of "
                f"{', '.join(scheme.modalities.values())}."
            )
        elif len(paths) > 1:
            names = ", ".join(sorted(path.name for path in paths))
            yield f"{case_id} has {len(paths)} files for {part} in {folder}: {names}; keep one."


def _duplicate_faults(places: Iterable[tuple[str, Path]]) -> Iterator[str]:
    """Ids met more than once, also when they differ in upper and lower case only, as some file systems do not."""
    folders: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for case_id, folder in places:
        folders[case_id.casefold()].append((case_id, folder))
    for found in folders.values():
        if len(found) > 1:
            listed = ", ".join(str(folder / case_id) for case_id, folder in found)
            yield f"Case id {found[0][0]} occurs {len(found)} times: {listed}; ids must differ, rename or remove."


def _count_not_finite(path: Path) -> int:
    """Number of NaN and infinite voxels of a NIfTI file; raises if the file is cut short or damaged.

    ITK, with which nnU-Net reads, puts zeros in the place of both and says nothing, so the bytes are gone through here.
    Decompressing them also compares gzip's check sum.
    """
    not_finite = 0
    with _open_nifti(path) as stream:
        header = stream.read(_NIFTI_HEADER_SIZE)
        orders = [order for order in "<>" if header[:4] == struct.pack(f"{order}i", _NIFTI_HEADER_SIZE)]
        if not orders or len(header) < _NIFTI_HEADER_SIZE:
            raise ValueError("it does not begin with a NIfTI-1 header")
        order = orders[0]
        sizes = struct.unpack_from(f"{order}8h", header, 40)
        kind, bits = struct.unpack_from(f"{order}2h", header, 70)
        offset = int(struct.unpack_from(f"{order}f", header, 108)[0])
        expected = offset + math.prod(sizes[1 : 1 + max(0, sizes[0])]) * bits // 8
        length = len(header) + len(stream.read(max(0, offset - len(header))))
        floating = _NIFTI_FLOATS.get(kind)
        # A multiple of every voxel size, so that no voxel is cut in two.
        while chunk := stream.read(1 << 20):
            length += len(chunk)
            if floating is not None:
                values = np.frombuffer(chunk, order + floating, len(chunk) // (bits // 8))
                not_finite += int(np.count_nonzero(~np.isfinite(values)))
    if length < expected:
        raise ValueError(f"it is truncated: {length} bytes where its header promises {expected}")
    return not_finite


def _open_nifti(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _read(path: Path) -> Any:
    import SimpleITK

    return SimpleITK.ReadImage(str(path))


def _voxels(image: Any) -> NDArray[Any]:
    import SimpleITK

    voxels: NDArray[Any] = SimpleITK.GetArrayFromImage(image)
    return voxels


def _geometry_difference(first: Any, second: Any) -> str:
    """What differs between two images' voxel grids, or an empty string."""
    # nnU-Net compares spacings with this tolerance and stops at more; NIfTI stores them, and the origin, as float32.
    if first.GetSize() != second.GetSize():
        return f"size {second.GetSize()}, expected {first.GetSize()}"
    if not np.allclose(first.GetSpacing(), second.GetSpacing(), rtol=1e-5, atol=1e-8):
        return f"spacing {second.GetSpacing()} mm, expected {first.GetSpacing()} mm"
    if not np.allclose(first.GetOrigin(), second.GetOrigin(), rtol=1e-5, atol=1e-3):
        return f"origin {second.GetOrigin()} mm, expected {first.GetOrigin()} mm"
    if not np.allclose(first.GetDirection(), second.GetDirection(), rtol=0, atol=1e-4):
        return f"direction {second.GetDirection()}, expected {first.GetDirection()}"
    return ""


def _labels_outside(labels: NDArray[Any], scheme: Scheme) -> dict[float, int]:
    """Values that the scheme does not have, with their number of voxels."""
    strange = labels != 0
    for value in scheme.labels:
        strange &= labels != value
    if not strange.any():
        return {}
    values, counts = np.unique(labels[strange], return_counts=True)
    return {float(value): int(count) for value, count in zip(values, counts, strict=True)}


def _label_message(where: Path | str, strange: Mapping[float, int], scheme: Scheme) -> str:
    found = ", ".join(f"{value:g} ({count} voxels)" for value, count in list(strange.items())[:5])
    more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
    known = ", ".join(f"{value} {tissue}" for value, tissue in scheme.labels.items())
    return (
        f"{where} has labels {found}{more}; BraTS {scheme.years} (scheme {scheme.name}) has 0 background, {known}. "
        f"Correct the labels, or name the files after the scheme they follow."
    )


def _write_case(job: tuple[Case, Path, ImageMode]) -> list[Transfer]:
    case, dataset, mode = job
    part = "Tr" if case.trains else "Ts"
    transfers = []
    for index, channel in enumerate(CHANNELS):
        target = dataset / f"images{part}" / f"{case.case_id}_{index:04d}.nii.gz"
        transfers.append(_transfer_image(case.images[channel], target, mode))
    if case.labels is not None:
        _write_labels(case, dataset / f"labels{part}" / f"{case.case_id}.nii.gz")
    return transfers


def _transfer_image(source: Path, target: Path, mode: ImageMode) -> Transfer:
    if not source.name.lower().endswith(".gz"):
        # Level 4 is twice as fast as the default and costs a few per cent of space.
        with source.open("rb") as read, gzip.open(target, "wb", compresslevel=4) as write:
            shutil.copyfileobj(read, write, 1 << 20)
        return "compressed"
    if mode == "link":
        return link_or_copy(source, target)
    shutil.copyfile(source, target)
    return "copied"


def _write_labels(case: Case, target: Path) -> None:
    import SimpleITK

    labels = SimpleITK.GetImageFromArray(to_nnunet_labels(_voxels(_read(Path(str(case.labels)))), case.scheme))
    # The image's geometry, equal within tolerance: nnU-Net's own check is stricter than the last bit of a float32.
    labels.CopyInformation(_read(case.images[CHANNELS[0]]))
    SimpleITK.WriteImage(labels, str(target), useCompression=True)


def _write_dataset_json(dataset: Path, name: str, cases: Sequence[Case]) -> None:
    from nnunet_conres import __version__

    content = {
        "name": name,
        "description": "BraTS: whole tumour, tumour core and enhancing tumour as nested regions",
        "channel_names": {str(index): channel for index, channel in enumerate(CHANNELS)},
        "labels": REGIONS,
        "regions_class_order": list(REGIONS_CLASS_ORDER),
        "numTraining": sum(case.trains for case in cases),
        "file_ending": ".nii.gz",
        "converted_by": f"nnunet-conres {__version__}",
        "brats_schemes": sorted({case.scheme for case in cases}),
    }
    (dataset / "dataset.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
