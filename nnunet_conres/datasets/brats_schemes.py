"""Schemes of the BraTS challenges: choose the scheme of a case, and map its labels to nnU-Net's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.datasets.brats_scheme_files import LabelSet, Layout, Scheme, builtin_schemes, read_scheme
from nnunet_conres.errors import InputError
from nnunet_conres.text import did_you_mean, first_few, number_text

AUTO: Final = "auto"
"""Value of `--scheme` that chooses the scheme by file names."""

SCHEMES: Final[Mapping[str, Scheme]] = builtin_schemes()
"""The package's own schemes, by name."""


@dataclass(frozen=True)
class Selection:
    """The schemes that `--scheme` allows.

    Attributes:
        allowed: The schemes that the user named; for auto, all of the package's own.
        known: The allowed schemes, then the package's others. Files are recognised by all of them.
        auto: Whether the user named no scheme, so that the case ids determine it.
    """

    allowed: tuple[Scheme, ...]
    known: tuple[Scheme, ...]
    auto: bool

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """All known layouts, those of allowed schemes first."""
        return tuple(dict.fromkeys(scheme.layout for scheme in self.known))

    @property
    def options(self) -> str:
        """The command-line option that selects the allowed schemes."""
        return " ".join(["--scheme", *(scheme.option.split(" ", 1)[1] for scheme in self.allowed)])


ANY: Final = Selection(tuple(SCHEMES.values()), tuple(SCHEMES.values()), auto=True)


def select_schemes(names: Sequence[str]) -> tuple[Selection, list[str]]:
    """Return the schemes that `--scheme` names.

    Args:
        names: Names of the package's schemes, TOML files that describe others, or auto alone.

    Returns:
        The schemes, and a message for every invalid name.
    """
    if AUTO in names:
        more = [f"--scheme {AUTO} cannot be combined with others; name all that are allowed, or {AUTO} alone."]
        return ANY, more if len(names) > 1 else []
    errors: list[str] = []
    allowed: dict[str, Scheme] = {}
    for name in names:
        scheme = next((known for known in SCHEMES.values() if name in (known.name, *known.other_names)), None)
        if scheme is None and (name.lower().endswith(".toml") or Path(name).is_file()):
            try:
                scheme = read_scheme(name)
            except InputError as error:
                errors += error.errors
                continue
            taken = [known for known in SCHEMES.values() if scheme.name in (known.name, *known.other_names)]
            if taken or scheme.name in (AUTO, *allowed):
                errors.append(f"{name}: a scheme {scheme.name} exists already; give the file another name.")
        if scheme is None:
            errors.append(
                f"The scheme is {name}{did_you_mean(name, SCHEMES)} Expected {AUTO} or any of {', '.join(SCHEMES)}, or "
                f"a TOML file that describes another scheme."
            )
        else:
            allowed[scheme.name] = scheme
    if not names:
        errors.append(f"The scheme is missing; expected {AUTO} or any of {', '.join(SCHEMES)}, or a TOML file.")
    own = (scheme for scheme in SCHEMES.values() if scheme.name not in allowed)
    return Selection(tuple(allowed.values()), (*allowed.values(), *own), auto=False), errors


def choose_scheme(
    layout: Layout, case_id: str, selection: Selection, folders: Sequence[str] = ()
) -> tuple[Scheme | None, str]:
    """Choose the scheme of a case by the layout of its files and its id.

    Args:
        layout: Layout of its file names.
        case_id: Id of the case.
        selection: The schemes that are allowed.
        folders: Names of the folders that contain the case. They decide only between schemes that the user named.

    Returns:
        The scheme and an empty string; or None and the reason, as the end of a sentence that begins with the case.
    """
    of_layout = [scheme for scheme in selection.known if scheme.layout == layout]
    claiming = [scheme for scheme in of_layout if scheme.claims(case_id)]
    alike = [scheme for scheme in of_layout if scheme.may_be(case_id)]
    if selection.auto:
        if len(claiming) == 1:
            return claiming[0], ""
        listed = _listed(claiming or alike or of_layout)
        return None, f"could be of {listed}, with different labels; name the right one with --scheme"

    named = [scheme for scheme in selection.allowed if scheme.layout == layout]
    fitting = [scheme for scheme in named if scheme in alike or scheme in claiming]
    # The user may name several years for one id: then the form of the id decides, or else the archive.
    owning = [scheme for scheme in fitting if any(map(scheme.owns_folder, folders))]
    for options in ([scheme for scheme in fitting if scheme in claiming], fitting, owning):
        if len(options) == 1:
            return options[0], ""
    if fitting:
        return None, f"could be of {_listed(fitting)}, with different labels; convert them separately"
    if len(named) == 1 and not alike:
        return named[0], ""
    return None, (
        f"is named as in {_listed(alike or of_layout)}, which {selection.options} does not allow; move it out of the "
        f"folder, or name its scheme"
    )


def archive_of_another(scheme: Scheme, folders: Sequence[str], known: Iterable[Scheme]) -> tuple[str, str] | None:
    """Return a folder whose name marks it as the archive of another challenge than the case's scheme.

    Folder names never choose a scheme by themselves, but they can contradict one: different years may use the same
    label values for different tissues.

    Args:
        scheme: Scheme of the case.
        folders: Names of the folders that contain the case, outermost first.
        known: All schemes.

    Returns:
        The folder and the schemes of its archive, for messages; or None.
    """
    # The innermost archive counts: it may have been unpacked into any folder.
    for folder in reversed(folders):
        owners = [other for other in known if other.layout == scheme.layout and other.owns_folder(folder)]
        if owners:
            return None if scheme in owners else (folder, _listed(owners))
    return None


def _listed(schemes: Iterable[Scheme]) -> str:
    return " or ".join(scheme.called for scheme in schemes)


def common_label_set(schemes: Iterable[Scheme]) -> LabelSet | None:
    """Return the label set that contains the tissues of all these schemes, None if they contradict each other."""
    sets = [scheme.label_set for scheme in schemes]
    return next((candidate for candidate in sets if all(candidate.contains(other) for other in sets)), None)


def to_nnunet_labels(labels: NDArray[Any], scheme: Scheme) -> NDArray[np.uint8]:
    """Map a scheme's label values to nnU-Net's.

    Args:
        labels: Label map of any shape, with the scheme's values only.
        scheme: Its scheme.

    Returns:
        Array of the same shape, with 0 for background and the labels of the scheme's label set.

    Raises:
        ValueError: A value is not one of the scheme's.
    """
    table = scheme.to_nnunet()
    strange = labels_outside(labels, tuple(table))
    if strange:
        raise ValueError(label_message("The label map", strange, scheme))
    return map_labels(labels, table)


def map_labels(labels: NDArray[Any], table: Mapping[int, int]) -> NDArray[np.uint8]:
    """Map every value of a label map; each must be in the table, and all must lie between 0 and 255."""
    lookup = bytes(table.get(value, 0) for value in range(256))
    small = labels.astype(np.uint8, copy=False)
    order: Literal["C", "F"] = "F" if small.flags.f_contiguous else "C"
    # bytes.translate is several times as fast as indexing.
    mapped = small.tobytes(order=order).translate(lookup)
    return np.frombuffer(bytearray(mapped), np.uint8).reshape(labels.shape, order=order)


def labels_outside(labels: NDArray[Any], known: Iterable[int]) -> dict[float, int]:
    """Return the values of a label map that are not known, with their number of voxels."""
    strange = np.ones(labels.shape, bool, order="F" if labels.flags.f_contiguous else "C")
    for value in known:
        strange &= labels != value
    if not strange.any():
        return {}
    values, counts = np.unique(labels[strange], return_counts=True)
    return {float(value): int(count) for value, count in zip(values, counts, strict=True)}


def label_message(where: object, strange: Mapping[float, int], scheme: Scheme) -> str:
    """Return a message about label values outside a scheme. It names the schemes that have these values."""
    found = first_few([f"{number_text(value)} ({count} voxels)" for value, count in strange.items()])
    others = [
        other.name
        for other in SCHEMES.values()
        if other.layout == scheme.layout and other.prefix == scheme.prefix and strange.keys() <= other.labels.keys()
    ]
    what = f"If they are of another year, use --scheme {' or '.join(others)}" if others else "Correct the labels"
    return (
        f"{where} has labels {found}; {scheme.called} has 0 background, "
        f"{scheme.known_labels}. {what}, or leave the case out."
    )
