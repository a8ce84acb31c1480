"""What the BraTS challenges call their files and labels, year by year: tables, and what follows from them alone.

A further year is a further entry in `SCHEMES`; one with tissues of its own also needs one in `LABEL_SETS`, one with
file names of its own one in `LAYOUTS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.text import number_text

Mode = Literal["regions", "labels"]

CHANNELS: Final = ("FLAIR", "T1", "T1ce", "T2")
"""nnU-Net's channels 0 to 3 for every year, so that one year's model can predict another year's cases."""

AUTO: Final = "auto"
"""What `--scheme` calls the choice by file names."""


@dataclass(frozen=True)
class LabelSet:
    """Tissues that a data set tells apart, with nnU-Net's consecutive labels, and its regions.

    Attributes:
        name: For messages.
        tissues: nnU-Net's label of each, consecutive from 1, outermost first: written in that order, regions that lie
            within each other restore the labels.
        regions: Labels of each region. As many as there are labels; the region at position k is what label k+1 is left
            of once the regions behind it are written over it.
    """

    name: str
    tissues: Mapping[str, int]
    regions: Mapping[str, tuple[int, ...]]

    @property
    def class_order(self) -> tuple[int, ...]:
        """nnU-Net's regions_class_order: the label that each region is written as, in the regions' order."""
        return tuple(self.tissues.values())

    def dataset_json(self, mode: Mode) -> dict[str, Any]:
        """The part of dataset.json about labels."""
        if mode == "labels":
            return {"labels": {"background": 0, **self.tissues}}
        regions = {name: labels[0] if len(labels) == 1 else list(labels) for name, labels in self.regions.items()}
        return {"labels": {"background": 0, **regions}, "regions_class_order": list(self.class_order)}

    def contains(self, other: LabelSet) -> bool:
        """Whether all tissues of another set are tissues of this one, with the same labels."""
        return other.tissues.items() <= self.tissues.items()


_GLIOMA: Final = LabelSet(
    name="glioma",
    tissues={"oedema": 1, "necrosis": 2, "enhancing": 3},
    regions={"whole_tumor": (1, 2, 3), "tumor_core": (2, 3), "enhancing_tumor": (3,)},
)
_POST_TREATMENT: Final = LabelSet(
    name="post-treatment glioma",
    tissues={**_GLIOMA.tissues, "resection_cavity": 4},
    # The challenge leaves the cavity out of the whole tumour.
    regions={**_GLIOMA.regions, "resection_cavity": (4,)},
)
_PEDIATRIC: Final = LabelSet(
    name="paediatric tumours of 2024",
    tissues={"oedema": 1, "nonenhancing": 2, "cyst": 3, "enhancing": 4},
    regions={
        "whole_tumor": (1, 2, 3, 4),
        "tumor_core": (2, 3, 4),
        "cystic_component": (3,),
        "enhancing_tumor": (4,),
    },
)
LABEL_SETS: Final = (_GLIOMA, _POST_TREATMENT, _PEDIATRIC)


@dataclass(frozen=True, eq=False)
class Layout:
    """How the files of a case are named.

    Attributes:
        separator: Between case id and file part.
        modalities: File part of each channel.
        label_part: File part of the labels.
    """

    separator: str
    modalities: Mapping[str, str]
    label_part: str = "seg"

    def split(self, folder_name: str, file_name: str) -> tuple[str, str] | None:
        """Case id and file part (lower case) of a NIfTI file that is named so, else None."""
        parts = "|".join((*self.modalities.values(), self.label_part))
        match = re.fullmatch(rf"(.+){self.separator}({parts})\.nii(?:\.gz)?", file_name, re.I | re.DOTALL)
        return None if match is None else (match[1], match[2].lower())

    @property
    def image_parts(self) -> tuple[str, ...]:
        """File parts of the images, one per file."""
        return tuple(self.modalities.values())

    def expected(self, case_id: str = "CASE", part: str | None = None) -> str:
        """Name of a case's file, or of all of them."""
        parts = f"{{{','.join((*self.image_parts, self.label_part))}}}" if part is None else part
        return f"{case_id}{self.separator}{parts}.nii.gz"


@dataclass(frozen=True, eq=False)
class FourDimensional(Layout):
    """Files of the Medical Segmentation Decathlon: all channels in one, the folder tells images and labels apart."""

    separator: str = ""
    modalities: Mapping[str, str] = field(default_factory=dict)
    label_part: str = "labels"

    def split(self, folder_name: str, file_name: str) -> tuple[str, str] | None:
        match = re.fullmatch(r"(BRATS_\d+)\.nii(?:\.gz)?", file_name, re.IGNORECASE)
        part = {"imagestr": "images", "imagests": "images", "labelstr": "labels"}.get(folder_name.lower())
        return None if match is None or part is None else (match[1], part)

    @property
    def image_parts(self) -> tuple[str, ...]:
        return ("images",)

    def expected(self, case_id: str = "BRATS_001", part: str | None = None) -> str:
        folder = {None: "{imagesTr,labelsTr,imagesTs}", "images": "imagesTr", "labels": "labelsTr"}[part]
        return f"{folder}/{case_id}.nii.gz"


LAYOUT_2017: Final = Layout("_", {"FLAIR": "flair", "T1": "t1", "T1ce": "t1ce", "T2": "t2"})
LAYOUT_2023: Final = Layout("-", {"FLAIR": "t2f", "T1": "t1n", "T1ce": "t1c", "T2": "t2w"})
# Its channels are FLAIR, T1w, t1gd, T2w: ours, in our order.
LAYOUT_MSD: Final = FourDimensional()
LAYOUTS: Final = (LAYOUT_2017, LAYOUT_2023, LAYOUT_MSD)


@dataclass(frozen=True, eq=False)
class Scheme:
    """The file names and labels of a challenge.

    Attributes:
        name: What `--scheme` calls it.
        title: For messages.
        layout: How its files are named.
        ids: Case ids (a regular expression, case ignored) that are taken for this challenge where `--scheme` does not
            say otherwise. Ids that several schemes claim cannot be told apart, and `--scheme` has to.
        prefix: What the challenge's own ids begin with (a regular expression, case ignored), also those that `ids`
            leaves to another year.
        labels: Tissue of each label value other than 0, the background.
        label_set: The tissues of those labels, and their regions.
        less_enhancing: Tissue that takes the place of enhancing tumour too small to be believed.
    """

    name: str
    title: str
    layout: Layout
    ids: str
    prefix: str
    labels: Mapping[int, str]
    label_set: LabelSet = _GLIOMA
    less_enhancing: str = "necrosis"

    @property
    def known_labels(self) -> str:
        """The labels, for messages."""
        return ", ".join(f"{value} {tissue}" for value, tissue in self.labels.items())

    def claims(self, case_id: str) -> bool:
        """Whether a case is taken for this challenge where nothing else is said."""
        return re.fullmatch(self.ids, case_id, re.IGNORECASE) is not None

    def may_be(self, case_id: str) -> bool:
        """Whether an id is named as this challenge names its own."""
        return re.match(self.prefix, case_id, re.IGNORECASE) is not None

    def to_nnunet(self) -> dict[int, int]:
        """nnU-Net's label of each of the challenge's."""
        return {0: 0, **{value: self.label_set.tissues[tissue] for value, tissue in self.labels.items()}}


_UNTIL_2021: Final = {1: "necrosis", 2: "oedema", 4: "enhancing"}
_SINCE_2023: Final = {1: "necrosis", 2: "oedema", 3: "enhancing"}

SCHEMES: Final[Mapping[str, Scheme]] = {
    scheme.name: scheme
    for scheme in (
        Scheme("2018", "BraTS 2017 to 2020", LAYOUT_2017, r"(?!BraTS2021_).+", r"BraTS(17|18|19|20)_", _UNTIL_2021),
        Scheme("2021", "BraTS 2021", LAYOUT_2017, r"BraTS2021_.+", r"BraTS2021_", _UNTIL_2021),
        # Time points of 2024's post-treatment scans are counted from 100.
        Scheme("2023", "BraTS 2023, adult glioma", LAYOUT_2023, r"BraTS-GLI-\d+-0\d\d", r"BraTS-GLI-", _SINCE_2023),
        Scheme("2023-MEN", "BraTS 2023, meningioma", LAYOUT_2023, r"BraTS-MEN-.+", r"BraTS-MEN-", _SINCE_2023),
        Scheme("2023-MET", "BraTS 2023 and 2024, metastases", LAYOUT_2023, "BraTS-MET-.+", "BraTS-MET-", _SINCE_2023),
        Scheme("2023-SSA", "BraTS 2023 and 2024, Africa", LAYOUT_2023, r"BraTS-SSA-.+", r"BraTS-SSA-", _SINCE_2023),
        Scheme("2023-PED", "BraTS 2023, paediatric", LAYOUT_2023, r"BraTS-PED-.+", r"BraTS-PED-", _SINCE_2023),
        Scheme(
            "2024",
            "BraTS 2024, adult glioma after treatment",
            LAYOUT_2023,
            r"BraTS-GLI-\d+-[1-9]\d\d",
            r"BraTS-GLI-",
            {**_SINCE_2023, 4: "resection_cavity"},
            _POST_TREATMENT,
        ),
        Scheme(
            "2024-PED",
            "BraTS 2024, paediatric",
            LAYOUT_2023,
            r"BraTS-PED-.+",
            r"BraTS-PED-",
            {1: "enhancing", 2: "nonenhancing", 3: "cyst", 4: "oedema"},
            _PEDIATRIC,
            less_enhancing="nonenhancing",
        ),
        Scheme(
            "MSD",
            "Medical Segmentation Decathlon, Task01_BrainTumour",
            LAYOUT_MSD,
            r"BRATS_\d+",
            r"BRATS_\d+$",
            {1: "oedema", 2: "necrosis", 3: "enhancing"},
        ),
    )
}


def allowed_schemes(names: Sequence[str]) -> tuple[Scheme, ...]:
    """Schemes that were named, all of them for ("auto",); names that are none are passed over."""
    return tuple(SCHEMES.values()) if AUTO in names else tuple(SCHEMES[name] for name in names if name in SCHEMES)


def choose_scheme(layout: Layout, case_id: str, names: Sequence[str]) -> tuple[Scheme | None, str]:
    """The scheme of a case, by the layout of its files and its id.

    Args:
        layout: How its files are named.
        case_id: Its id.
        names: The schemes that were named, or ("auto",).

    Returns:
        The scheme, and an empty string; or None, and why: the end of a sentence that begins with the case.
    """
    of_layout = [scheme for scheme in SCHEMES.values() if scheme.layout is layout]
    claiming = [scheme for scheme in of_layout if scheme.claims(case_id)]
    if AUTO in names:
        if len(claiming) == 1:
            return claiming[0], ""
        options = claiming or of_layout
        return None, f"could be of {_options(options)}, with different labels; say which it is"

    named = [scheme for scheme in of_layout if scheme.name in names]
    fitting = [scheme for scheme in named if scheme.may_be(case_id) or scheme.claims(case_id)]
    # Several years' names for one id: what the id looks like decides.
    for options in ([scheme for scheme in fitting if scheme in claiming], fitting):
        if len(options) == 1:
            return options[0], ""
    if fitting:
        return None, f"could be of {_options(fitting)}, with different labels; convert them apart"
    known = [scheme for scheme in of_layout if scheme.may_be(case_id)]
    if len(named) == 1 and not known:
        return named[0], ""
    return None, (
        f"is named as in {_options(known or of_layout)}, which --scheme {' '.join(names)} does not allow; move it out "
        f"of the folder, or name its scheme"
    )


def _options(schemes: Iterable[Scheme]) -> str:
    return " or ".join(f"{scheme.title} (--scheme {scheme.name})" for scheme in schemes)


def common_label_set(names: Iterable[str]) -> LabelSet | None:
    """The label set that holds the tissues of all these schemes, None where they contradict each other."""
    sets = [SCHEMES[name].label_set for name in dict.fromkeys(names)]
    for candidate in sets:
        if all(candidate.contains(other) for other in sets):
            return candidate
    return None


def to_nnunet_labels(labels: NDArray[Any], scheme: str) -> NDArray[np.uint8]:
    """Map a scheme's label values to nnU-Net's.

    Args:
        labels: Label map of any shape, with the scheme's values only.
        scheme: A name in `SCHEMES`.

    Returns:
        Array of the same shape with 0 background and the scheme's label set's labels.

    Raises:
        ValueError: A value is not one of the scheme's.
    """
    table = SCHEMES[scheme].to_nnunet()
    strange = labels_outside(labels, tuple(table))
    if strange:
        raise ValueError(label_message("The label map", strange, SCHEMES[scheme]))
    return map_labels(labels, table)


def map_labels(labels: NDArray[Any], table: Mapping[int, int]) -> NDArray[np.uint8]:
    """Map every value of a label map; each must be in the table, and all must lie between 0 and 255."""
    lookup = bytes(table.get(value, 0) for value in range(256))
    small = labels.astype(np.uint8, copy=False)
    order: Literal["C", "F"] = "F" if small.flags.f_contiguous else "C"
    # Several times as fast as indexing.
    mapped = small.tobytes(order=order).translate(lookup)
    return np.frombuffer(bytearray(mapped), np.uint8).reshape(labels.shape, order=order)


def labels_outside(labels: NDArray[Any], known: Iterable[int]) -> dict[float, int]:
    """Values that a label map should not have, with their number of voxels."""
    strange = np.ones(labels.shape, bool, order="F" if labels.flags.f_contiguous else "C")
    for value in known:
        strange &= labels != value
    if not strange.any():
        return {}
    values, counts = np.unique(labels[strange], return_counts=True)
    return {float(value): int(count) for value, count in zip(values, counts, strict=True)}


def label_message(where: object, strange: Mapping[float, int], scheme: Scheme) -> str:
    """What is wrong with labels that have values outside their scheme, and which scheme has them."""
    found = ", ".join(f"{number_text(value)} ({count} voxels)" for value, count in list(strange.items())[:5])
    more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
    others = [
        other.name
        for other in SCHEMES.values()
        if other.layout is scheme.layout and other.prefix == scheme.prefix and strange.keys() <= other.labels.keys()
    ]
    what = f"If they are of another year, say --scheme {' or '.join(others)}" if others else "Correct the labels"
    return (
        f"{where} has labels {found}{more}; {scheme.title} (--scheme {scheme.name}) has 0 background, "
        f"{scheme.known_labels}. {what}, or leave the case out."
    )
