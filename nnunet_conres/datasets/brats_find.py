"""Find BraTS cases in folders by file name only."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from nnunet_conres.case_ids import unsafe_ids
from nnunet_conres.datasets.brats_scheme_files import LABELS, Content, Layout, Scheme
from nnunet_conres.datasets.brats_schemes import (
    ANY,
    Selection,
    archive_of_another,
    choose_scheme,
    common_label_set,
)
from nnunet_conres.folders import is_hidden
from nnunet_conres.images.nifti import is_nifti, stem
from nnunet_conres.text import first_few

Missing = Literal["refuse", "zero"]
"""Treatment of cases that lack a modality: refuse them, or use a zero image in its place."""


# Names of folders whose cases are not for training.
_HELD_OUT: Final = re.compile(
    r"h[eo]ld.?out|validation|(?:^|[^a-z])(?:val|test(?:ing)?)(?:[^a-z]|data|set|cases|$)", re.IGNORECASE
)


@dataclass(frozen=True)
class Case:
    """The files of one case.

    Attributes:
        case_id: Case id from the file names. nnU-Net uses the same id.
        scheme: The scheme that the files follow.
        images: One path for each of the scheme's image files, None if the file is missing. At least one is present.
        labels: Label file, or None.
        held_out: Whether the case came from a folder of held-out cases.
        corrected: Names of the parts, such as t2w or seg, that came from a folder of corrected files.
    """

    case_id: str
    scheme: Scheme
    images: tuple[Path | None, ...]
    labels: Path | None
    held_out: bool
    corrected: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether the case goes to imagesTr."""
        return self.labels is not None and not self.held_out

    @property
    def first_image(self) -> Path:
        """The first image present. Its voxel grid is that of the case."""
        return next(image for image in self.images if image is not None)

    @property
    def missing(self) -> tuple[str, ...]:
        """The channels without an image file."""
        pairs = zip(self.images, self.scheme.layout.images, strict=True)
        return tuple(channel for image, channels in pairs if image is None for channel in channels)

    @property
    def patient(self) -> str:
        """The patient, from the case id."""
        return self.scheme.patient_of(self.case_id)

    @property
    def grade(self) -> str | None:
        """HGG or LGG if the case lies in a folder of that name, else None."""
        grades = [part.upper() for part in self.first_image.parent.parts if part.upper() in ("HGG", "LGG")]
        return grades[-1] if grades else None


@dataclass
class Found:
    """Result of `find_cases`.

    Attributes:
        cases: The complete cases, sorted by id, including cases with duplicate ids.
        errors: Errors that prevent the conversion of all cases.
        bad: Errors of single cases, or of files without a case, by the case or file that would be left out.
        foreign: Cases that follow none of the schemes, by reason. A reason is the end of a sentence.
        doubled: Duplicate ids, in lower case.
        incomplete: Ids of cases that lack some images, by the missing parts, such as t2w.
    """

    cases: list[Case] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    bad: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    foreign: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    doubled: set[str] = field(default_factory=set)
    incomplete: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def foreign_errors(self) -> list[str]:
        """One message for every reason why cases follow none of the schemes."""
        return [f"{first_few(named)}: {reason}." for reason, named in self.foreign.items()]


@dataclass(frozen=True)
class _Place:
    """The folder of a case's files, and the case id and layout of their names."""

    held_out: bool
    folder: Path
    case_id: str
    layout: Layout


_Files = dict[Content, list[Path]]


def find_cases(
    folders: Sequence[str | Path],
    *,
    held_out_folders: Sequence[str | Path] = (),
    corrected_folders: Sequence[str | Path] = (),
    selection: Selection = ANY,
    missing: Missing = "refuse",
) -> Found:
    """Collect the cases in folders by their file names, without opening a file.

    Args:
        folders: Folders to search, with all subfolders; hidden files are ignored.
        held_out_folders: Like `folders`; their cases are marked as held out.
        corrected_folders: Like `folders`; each file replaces the file of the same case and part in `folders` or
            `held_out_folders`.
        selection: The schemes that files may follow.
        missing: "zero" accepts cases that lack some of their images.

    Returns:
        Cases and errors.
    """
    found = Found()
    owners: dict[Path, str] = {}
    # Collect corrected files first, because they may lie in an input folder.
    corrections = _collect(corrected_folders, "corrected", owners, selection, found)
    places = {
        _Place(held_out, *key): files
        for held_out, roots in ((False, folders), (True, held_out_folders))
        for key, files in _collect(roots, "held-out" if held_out else "input", owners, selection, found).items()
    }
    roots = [Path(root).resolve() for root in (*folders, *held_out_folders)]
    corrected = _correct(places, corrections, found)
    no_cases = {*_labels_alone(places, found), *_files_beside(places, selection, found)}

    others: dict[tuple[str, str, Scheme], list[str]] = defaultdict(list)
    for place, files in places.items():
        folder, case_id, layout = place.folder, place.case_id, place.layout
        if place in no_cases:
            continue
        unsafe = unsafe_ids([case_id], folder)
        if unsafe:
            found.bad[ascii(str(folder / case_id))] += unsafe
            continue
        above = _folder_names(folder, roots)
        scheme, reason = choose_scheme(layout, case_id, selection, above)
        if scheme is None:
            found.foreign[reason].append(str(folder / case_id))
            continue
        other = archive_of_another(scheme, above, selection.known)
        if other is not None:
            others[(*other, scheme)].append(case_id)
        problems = list(_file_errors(scheme, folder, case_id, files, missing))
        if problems:
            absent = [layout.part(content) for content in layout.images if content not in files]
            if 0 < len(absent) < len(layout.images) and missing == "refuse":
                found.incomplete[" and ".join(absent)].append(case_id)
            found.bad[str(folder / case_id)] += problems
            continue
        images = tuple(files[content][0] if content in files else None for content in layout.images)
        labels = files.get(LABELS)
        parts = tuple(layout.part(content) for content in corrected.get(place, ()))
        found.cases.append(Case(case_id, scheme, images, labels[0] if labels else None, place.held_out, parts))
    for (name, owner, scheme), ids in others.items():
        found.errors.append(
            f"{first_few(ids)}: in a folder {name}, which is an archive of {owner}, and not of {scheme.called}. "
            f"Say which it is with --scheme, or rename the folder if its name is wrong."
        )
    found.cases.sort(key=lambda case: case.case_id)

    found.errors += _held_out_errors(found.cases, roots)
    for twins in _duplicates(place for place in places if place not in no_cases):
        listed = ", ".join(str(folder / case_id) for case_id, folder in twins)
        error = f"Case id {twins[0][0]} occurs {len(twins)} times: {listed}; ids must be unique: rename or remove one."
        found.bad[", ".join(sorted({case_id for case_id, _ in twins}))].append(error)
        found.doubled.add(twins[0][0].casefold())
    found.errors += _mixture_errors(list(dict.fromkeys(case.scheme for case in found.cases)), selection)
    if not places and not found.errors and not found.bad:
        listed = ", ".join(str(folder) for folder in (*folders, *held_out_folders)) or "no folder"
        found.errors.append(f"No BraTS case found in {listed}. Expected files named {_expected_names(selection)}.")
    return found


def _collect(
    roots: Sequence[str | Path], kind: str, owners: dict[Path, str], selection: Selection, found: Found
) -> dict[tuple[Path, str, Layout], _Files]:
    """Collect the files in folders of one kind (corrected, input or held-out), by folder, case id and layout.

    `owners` records the kind of every file seen so far. `found` gets an error for every file that fits no naming
    scheme, every path that is not a readable folder, and files in both input and held-out folders.
    """
    cases: dict[tuple[Path, str, Layout], _Files] = defaultdict(lambda: defaultdict(list))

    def unreadable(error: OSError) -> None:
        where = str(error.filename)
        found.bad[where] = [f"{where} cannot be read ({error.strerror}); make it readable."]

    for root in roots:
        if not Path(root).is_dir():
            found.errors.append(f"{root} is not a folder; expected a folder with BraTS cases.")
            continue
        shared = []
        for path in nifti_files(Path(root), unreadable):
            # A folder that is given twice, or inside another one, does not add its cases a second time.
            itself = path.resolve()
            first = itself not in owners
            owner = owners.setdefault(itself, kind)
            if owner != kind:
                if owner != "corrected":
                    shared.append(str(path))
                continue
            named = _unwrapped(path)
            place = _place(named, selection.layouts)
            if place is None:
                found.bad[str(path)].append(
                    f"{path} fits no naming scheme of BraTS, so it is unclear what it is. Expected "
                    f"{_expected_names(selection)}; rename it, or move it out of the folder."
                )
            elif first:
                layout, case_id, content = place
                cases[_case_folder(named, layout), case_id, layout][content].append(path)
        if shared:
            found.errors.append(
                f"{first_few(shared)}: in both the input and the held-out folders. Give {root}, or the folder that "
                f"contains it, in one of the two only."
            )
    return cases


def _correct(
    places: Mapping[_Place, _Files], corrections: Mapping[tuple[Path, str, Layout], _Files], found: Found
) -> dict[_Place, list[Content]]:
    """Replace files in `places` by corrected ones, and return the replaced contents of each case.

    A corrected file without a case, or a second one for the same part, is an error.
    """
    by_id = {(place.case_id, place.layout): place for place in places}
    corrected: dict[_Place, list[Content]] = defaultdict(list)
    for (_, case_id, layout), files in corrections.items():
        place = by_id.get((case_id, layout))
        for content, paths in files.items():
            if place is None:
                found.errors.append(
                    f"{paths[0]}: no case {case_id} in the input; expected corrected files of its cases. Add "
                    f"the folder with the case to -i, or move this file out of --corrected."
                )
            elif len(paths) > 1 or content in corrected[place]:
                found.errors.append(f"{case_id} has more than one corrected file for {layout.part(content)}; keep one.")
            else:
                places[place][content] = paths
                corrected[place].append(content)
    return corrected


def _labels_alone(places: Mapping[_Place, _Files], found: Found) -> Iterator[_Place]:
    """Yield places with only the labels of a case whose images lie elsewhere, and add an error for each to `found`."""
    with_images = {
        (place.case_id, place.layout): place for place, files in places.items() if any(c != LABELS for c in files)
    }
    for place, files in places.items():
        other = with_images.get((place.case_id, place.layout))
        if set(files) == {LABELS} and other is not None:
            found.bad[str(place.folder / place.case_id)].append(
                f"{files[LABELS][0]} has no images beside it, and case {place.case_id} lies in {other.folder}. If "
                f"these are corrected labels, name their folder with --corrected; else remove them."
            )
            yield place


def _files_beside(places: Mapping[_Place, _Files], selection: Selection, found: Found) -> Iterator[_Place]:
    """Yield places with files next to a case whose allowed scheme has no such files, and add an error for each."""
    layouts = {scheme.layout: scheme for scheme in selection.allowed}
    schemes = {
        (place.held_out, place.folder, place.case_id): layouts[place.layout]
        for place in places
        if place.layout in layouts
    }
    for place, files in places.items():
        scheme = schemes.get((place.held_out, place.folder, place.case_id))
        if scheme is not None and place.layout not in layouts:
            names = first_few([path.name for paths in files.values() for path in paths])
            found.bad[str(place.folder / place.case_id)].append(
                f"{place.folder / place.case_id}: {names} is not a file of {scheme.called}. "
                f"Add it to [files] of the scheme, or move it out of the folder."
            )
            yield place


def _folder_names(folder: Path, roots: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of a folder and its parents, from the input folder downwards."""
    itself = folder.resolve()
    for root in roots:
        if itself.is_relative_to(root):
            return (root.name, *itself.relative_to(root).parts)
    return (itself.name,)


def nifti_files(root: Path, on_error: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Yield all NIfTI files below a folder that are not hidden, in sorted order.

    Args:
        root: The folder.
        on_error: Called for each folder that cannot be read; by default such folders are skipped.
    """
    seen = set()
    for folder, subfolders, names in os.walk(root, onerror=on_error, followlinks=True):
        # A symbolic link may lead back to a parent folder.
        if os.path.realpath(folder) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(Path(name)))
        for name in sorted(names):
            path = Path(folder, name)
            if is_nifti(path):
                yield path


def image_of(path: Path, layouts: Sequence[Layout] = ANY.layouts) -> str | None:
    """Return the case id if a file is named as an image in BraTS or nnU-Net, else None."""
    place = _place(_unwrapped(path), layouts)
    if place is not None:
        _, case_id, content = place
        return None if content == LABELS else case_id
    match = re.fullmatch(r"(.+)_\d{4}\.nii(?:\.gz)?", path.name, re.IGNORECASE)
    return None if match is None else match[1]


def names_image(path: Path, layouts: Sequence[Layout] = ANY.layouts) -> bool:
    """Return whether a file is named as an image in BraTS, such as CASE_flair.nii.gz."""
    place = _place(_unwrapped(path), layouts)
    return place is not None and place[2] != LABELS and place[1] != stem(path)


def collection(case: Case) -> Path:
    """Return the parent of the case's folder, or the folder of its files if no folder is named after the case."""
    folder = _unwrapped(case.first_image).parent
    return folder.parent if folder.name == case.case_id else folder


def _unwrapped(path: Path) -> Path:
    """Return the path that a file would have without a folder that unpacking added.

    Kaggle's copies of BraTS unpack to `CASE_flair.nii/00000057_brain_flair.nii`: a folder with the name of a NIfTI
    file, which contains only this file under another name.
    """
    folder = path.parent
    if not is_nifti(folder):
        return path
    others = [other for other in folder.iterdir() if other.name != path.name and is_nifti(other)]
    return path if others else folder


def _place(path: Path, layouts: Sequence[Layout]) -> tuple[Layout, str, Content] | None:
    """Return layout, case id and content from a file name, or None if it fits no layout."""
    for layout in layouts:
        split = layout.split(path.parent.name, path.name)
        if split is not None:
            return (layout, *split)
    return None


def _case_folder(path: Path, layout: Layout) -> Path:
    """Return the common folder of a case's files."""
    return path.parent.parent if layout.has_folders else path.parent


def _expected_names(selection: Selection) -> str:
    layouts = dict.fromkeys(scheme.layout.expected() for scheme in selection.allowed)
    return " or ".join(layouts)


def _file_errors(
    scheme: Scheme, folder: Path, case_id: str, files: Mapping[Content, Sequence[Path]], missing: Missing
) -> Iterator[str]:
    layout = scheme.layout
    absent = [content for content in layout.images if not files.get(content)]
    if missing == "refuse" or len(absent) == len(layout.images):
        needed = ", ".join(layout.part(content) for content in layout.images)
        advice = "; --missing zero puts a zero image in its place" if len(absent) < len(layout.images) else ""
        for content in absent:
            yield f"{folder / layout.expected(case_id, content)} is missing; a case needs all of {needed}{advice}."
    for content, paths in files.items():
        if len(paths) > 1:
            names = ", ".join(sorted(path.name for path in paths))
            yield f"{case_id} has {len(paths)} files for {layout.part(content)} in {folder}: {names}; keep one."


def _duplicates(places: Iterable[_Place]) -> Iterator[list[tuple[str, Path]]]:
    """Yield the folders of each duplicate id. Upper and lower case are equal, as in some file systems."""
    folders: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for place in places:
        folders[place.case_id.casefold()].append((place.case_id, place.folder))
    yield from (found for found in folders.values() if len(found) > 1)


def _held_out_errors(cases: Iterable[Case], roots: Sequence[Path]) -> Iterator[str]:
    """Yield an error for labelled cases in a subfolder of the input whose name says that they are not for training.

    This happens if the input folder is one level too high. A folder that is itself given as input is accepted.
    """
    inside: dict[Path, list[str]] = defaultdict(list)
    for case in cases:
        folder = collection(case).resolve()
        depth = max((len(root.parts) for root in roots if folder.is_relative_to(root)), default=len(folder.parts))
        within = [above for above in (folder, *folder.parents) if len(above.parts) > depth]
        named = next((above for above in reversed(within) if _HELD_OUT.search(above.name)), None)
        if case.trains and named is not None:
            inside[named].append(case.case_id)
    for folder, ids in inside.items():
        yield (
            f"{len(ids)} labelled cases lie in {folder}, whose name says that they are not for training: "
            f"{first_few(ids)}. Name the folder with --held-out, and the folders for training with -i. To train on "
            f"these cases as well, name the folder itself with -i."
        )


def _mixture_errors(met: Sequence[Scheme], selection: Selection) -> Iterator[str]:
    schemes = [scheme for scheme in selection.known if scheme in met]
    listed = " and ".join(scheme.called for scheme in schemes)
    if len({scheme.layout.channels for scheme in schemes}) > 1:
        yield f"The folders mix {listed}, which have different channels. Convert them separately."
    elif len(schemes) > 1 and common_label_set(schemes) is None:
        yield (
            f"The folders mix {listed}, whose labels stand for different tissues and can't be combined. "
            f"Convert them separately."
        )
    elif len(schemes) > 1 and selection.auto:
        yield (
            f"The folders mix {listed}. To allow this mixture, add --scheme "
            f"{' '.join(scheme.name for scheme in schemes)}; note that BraTS has released many patients again in later "
            f"years, under other ids."
        )
