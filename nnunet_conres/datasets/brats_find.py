"""BraTS cases in folders, by the names of their files alone."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_conres.case_ids import unsafe_ids
from nnunet_conres.datasets.brats_schemes import (
    AUTO,
    LAYOUTS,
    SCHEMES,
    Layout,
    Scheme,
    allowed_schemes,
    choose_scheme,
    common_label_set,
)
from nnunet_conres.datasets.raw import some
from nnunet_conres.folders import is_hidden
from nnunet_conres.images.nifti import is_nifti, stem


@dataclass(frozen=True)
class Case:
    """The files of one case.

    Attributes:
        case_id: As in the file names, which nnU-Net keeps.
        scheme: Name of the scheme that the files follow.
        images: File of each channel, in the order of `CHANNELS`; or one file that has them all.
        labels: Label file, or None.
        held_out: Whether the case came from a folder of held-out cases.
    """

    case_id: str
    scheme: str
    images: tuple[Path, ...]
    labels: Path | None
    held_out: bool

    @property
    def trains(self) -> bool:
        """Whether the case goes to imagesTr."""
        return self.labels is not None and not self.held_out

    @property
    def grade(self) -> str | None:
        """HGG or LGG, where the case lies in a folder that is called so."""
        grades = [part.upper() for part in self.images[0].parent.parts if part.upper() in ("HGG", "LGG")]
        return grades[-1] if grades else None


@dataclass
class Found:
    """What `find_cases` found.

    Attributes:
        cases: The complete cases, sorted by id, those with ids met more than once among them.
        faults: What forbids converting any of them.
        bad: What is wrong with single cases, or with files that belong to none, by what would be left out.
        doubled: Ids met more than once, in lower case.
    """

    cases: list[Case] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    bad: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    doubled: set[str] = field(default_factory=set)


def find_cases(
    folders: Sequence[str | Path],
    *,
    held_out_folders: Sequence[str | Path] = (),
    schemes: Sequence[str] = (AUTO,),
) -> Found:
    """Collect the cases below some folders by their file names, without opening a file.

    Args:
        folders: Searched with all their subfolders; hidden files are passed over.
        held_out_folders: Like `folders`; their cases are marked as held out.
        schemes: Names of the schemes that files may follow; more than one allows a mixture. ("auto",) takes any, but
            only one.

    Returns:
        Cases and faults.
    """
    found = Found()
    parts: dict[tuple[bool, Path, str, Layout], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    owners: dict[Path, bool] = {}
    for held_out, roots in ((False, folders), (True, held_out_folders)):
        for root in roots:
            if not Path(root).is_dir():
                found.faults.append(f"{root} is not a folder; expected a folder with BraTS cases.")
                continue
            shared = []
            for path in nifti_files(Path(root)):
                # One folder inside another, or named twice, is not a second copy of its cases.
                itself = path.resolve()
                first = itself not in owners
                if owners.setdefault(itself, held_out) != held_out:
                    shared.append(str(path))
                    continue
                named = _unwrapped(path)
                place = _place(named)
                if place is None:
                    found.bad[str(path)].append(
                        f"{path} fits no naming scheme of BraTS, so it is unclear what it is. Expected "
                        f"{_expected_names(schemes)}; rename it, or move it out of the folder."
                    )
                elif first:
                    layout, case_id, part = place
                    parts[held_out, _case_folder(named, layout), case_id, layout][part].append(path)
            if shared:
                found.faults.append(
                    f"{some(shared)}: among both the input and the held-out folders; leave {root} or what holds it out "
                    f"of one."
                )

    reasons: dict[str, list[str]] = defaultdict(list)
    for (held_out, folder, case_id, layout), files in parts.items():
        unsafe = unsafe_ids([case_id], folder)
        if unsafe:
            found.bad[ascii(str(folder / case_id))] += unsafe
            continue
        scheme, reason = choose_scheme(layout, case_id, schemes)
        if scheme is None:
            reasons[reason].append(str(folder / case_id))
            continue
        problems = list(_file_faults(scheme, folder, case_id, files))
        if problems:
            found.bad[str(folder / case_id)] += problems
            continue
        images = tuple(files[part][0] for part in layout.image_parts)
        labels = files.get(layout.label_part)
        found.cases.append(Case(case_id, scheme.name, images, labels[0] if labels else None, held_out))
    for reason, places in reasons.items():
        more = f" and {len(places) - 5} more cases" if len(places) > 5 else ""
        found.faults.append(f"{', '.join(places[:5])}{more}: {reason}.")
    found.cases.sort(key=lambda case: case.case_id)

    for twins in _duplicates(parts):
        listed = ", ".join(str(folder / case_id) for case_id, folder in twins)
        fault = f"Case id {twins[0][0]} occurs {len(twins)} times: {listed}; ids must differ, rename or remove."
        found.bad[", ".join(sorted({case_id for case_id, _ in twins}))].append(fault)
        found.doubled.add(twins[0][0].casefold())
    found.faults += _mixture_faults({case.scheme for case in found.cases}, schemes)
    if not parts and not found.faults and not found.bad:
        listed = ", ".join(str(folder) for folder in (*folders, *held_out_folders)) or "no folder"
        found.faults.append(f"No BraTS case found in {listed}. Expected files named {_expected_names(schemes)}.")
    return found


def nifti_files(root: Path) -> Iterator[Path]:
    """All NIfTI files below a folder that are not hidden, sorted."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        # A link may lead back to a folder above it.
        if os.path.realpath(folder) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(Path(name)))
        for name in sorted(names):
            path = Path(folder, name)
            if is_nifti(path):
                yield path


def image_of(path: Path) -> str | None:
    """Id of the case that a file is an image of, by BraTS's names or nnU-Net's, else None."""
    place = _place(_unwrapped(path))
    if place is not None:
        layout, case_id, part = place
        return case_id if part in layout.image_parts else None
    match = re.fullmatch(r"(.+)_\d{4}\.nii(?:\.gz)?", path.name, re.IGNORECASE)
    return None if match is None else match[1]


def names_image(path: Path) -> bool:
    """Whether a file's name is that of an image in BraTS, such as CASE_flair.nii.gz."""
    place = _place(_unwrapped(path))
    return place is not None and place[2] in place[0].image_parts and place[1] != stem(path)


def collection(case: Case) -> Path:
    """The folder that holds the case's own folder, or its files where it has none."""
    folder = _unwrapped(case.images[0]).parent
    return folder.parent if folder.name == case.case_id else folder


def _unwrapped(path: Path) -> Path:
    """Where a file would lie if no unpacker had put it into a folder with its name.

    Kaggle's copies of BraTS are unpacked to `CASE_flair.nii/00000057_brain_flair.nii`: a folder that is called as a
    NIfTI file is and holds that one file, under another name.
    """
    folder = path.parent
    if not is_nifti(folder):
        return path
    others = [other for other in folder.iterdir() if other.name != path.name and is_nifti(other)]
    return path if others else folder


def _place(path: Path) -> tuple[Layout, str, str] | None:
    """Layout, case id and file part that a file's name says, or None."""
    for layout in LAYOUTS:
        split = layout.split(path.parent.name, path.name)
        if split is not None:
            return (layout, *split)
    return None


def _case_folder(path: Path, layout: Layout) -> Path:
    """Where the files of a case lie together."""
    return path.parent if layout.modalities else path.parent.parent


def _expected_names(schemes: Sequence[str]) -> str:
    layouts = dict.fromkeys(scheme.layout.expected() for scheme in allowed_schemes(schemes))
    return " or ".join(layouts)


def _file_faults(scheme: Scheme, folder: Path, case_id: str, files: Mapping[str, Sequence[Path]]) -> Iterator[str]:
    layout = scheme.layout
    for part in (*layout.image_parts, layout.label_part):
        paths = files.get(part, ())
        if not paths and part != layout.label_part:
            needed = ", ".join(layout.image_parts)
            yield f"{folder / layout.expected(case_id, part)} is missing; a case needs all of {needed}."
        elif len(paths) > 1:
            names = ", ".join(sorted(path.name for path in paths))
            yield f"{case_id} has {len(paths)} files for {part} in {folder}: {names}; keep one."


def _duplicates(places: Iterable[tuple[bool, Path, str, Layout]]) -> Iterator[list[tuple[str, Path]]]:
    """Ids met more than once, also when they differ in upper and lower case only, as some file systems do not."""
    folders: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for _, folder, case_id, _ in places:
        folders[case_id.casefold()].append((case_id, folder))
    yield from (found for found in folders.values() if len(found) > 1)


def _mixture_faults(met: set[str], schemes: Sequence[str]) -> Iterator[str]:
    names = [name for name in SCHEMES if name in met]
    listed = " and ".join(f"{SCHEMES[name].title} (--scheme {name})" for name in names)
    if len(names) > 1 and common_label_set(names) is None:
        yield (
            f"The folders mix {listed}, whose labels do not mean the same tissues: no one set of labels can hold them. "
            f"Convert them apart."
        )
    elif len(names) > 1 and AUTO in schemes:
        yield (
            f"The folders mix {listed}. If that is meant, say so with --scheme {' '.join(names)}; mind that BraTS has "
            f"released many patients again in later years, under other ids."
        )
