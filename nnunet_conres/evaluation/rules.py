"""Scoring rules of challenges and the regions that they score.

Each challenge has a TOML file in the folder challenges. `docs/reference/challenge-rules.md` states the rules and their
sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from nnunet_conres.errors import InputError
from nnunet_conres.files import read_toml
from nnunet_conres.nnunet import label_values

_FOLDER: Final = Path(__file__).with_name("challenges")
_UNKNOWN: Final = _FOLDER / "unknown.toml"

TISSUES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "ET": ("enhancing",),
        "NETC": ("necrosis",),
        "SNFH": ("oedema",),
        "ED": ("oedema",),
        "RC": ("resection_cavity",),
        "CC": ("cyst",),
        "TC": ("enhancing", "necrosis", "cyst"),
        "WT": ("enhancing", "necrosis", "cyst", "oedema"),
        "GTV": ("gross_tumor_volume",),
    }
)
"""Tissues of each region that challenges score. A challenge may have only some of them."""

# Names of these regions in data sets, in lower case with underscores.
_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "ET": ("et", "enhancing", "enhancing_tumor", "enhancing_tumour"),
    "NETC": ("netc", "ncr", "net", "necrosis", "necrotic_core", "nonenhancing", "nonenhancing_tumor", "non_enhancing"),
    "SNFH": ("snfh", "ed", "oedema", "edema"),
    "RC": ("rc", "resection_cavity"),
    "CC": ("cc", "cyst", "cystic_component"),
    "TC": ("tc", "tumor_core", "tumour_core"),
    "WT": ("wt", "whole_tumor", "whole_tumour"),
    "GTV": ("gtv", "gross_tumor_volume", "gross_tumour_volume"),
}


@dataclass(frozen=True)
class Rules:
    """How a challenge scores a case.

    Attributes:
        name: Year and task, such as 2024-GLI; the user's choice if the challenge has several names.
        title: Display name.
        sources: Where the rules are published.
        matching: "dilation": lesions that nearly touch count as one, and a lesion is compared with all predicted
            components near it. "one-to-one": each lesion is matched with at most one predicted lesion, so that the sum
            of the Dice values is highest.
        regions: The scored regions, by the challenge's names.
        penalty: Distance in mm that a missed or false region or lesion counts; None for the diagonal of the image in
            voxels.
        dilation: Voxels by which each region is dilated.
        smallest_volume: True lesions of each region up to this volume (mm³) are ignored.
        group_predictions: "voxels" or "mm3" if predicted components that nearly touch count as one too and the
            smallest of these are removed: the unit in which `smallest_volume` limits their size. Empty for neither.
        joined_by: By region, the regions whose lesions join the lesions that touch them.
        count_false: Whether false lesions count.
        large_volume: Volume (mm³) from which a lesion is large; None if lesions are not scored by size.
        found_from_dice: Lowest Dice from which a large or small lesion counts as found.
        table: The brats-evaluation table of the challenge's server, "seg" or "mets"; empty if none.
    """

    name: str
    title: str
    sources: tuple[str, ...]
    matching: Literal["dilation", "one-to-one"]
    regions: tuple[str, ...]
    penalty: float | None
    dilation: Mapping[str, int]
    smallest_volume: Mapping[str, float]
    group_predictions: Literal["", "voxels", "mm3"] = ""
    joined_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    count_false: bool = True
    large_volume: float | None = None
    found_from_dice: float = 0.0
    table: Literal["", "seg", "mets"] = ""

    @property
    def masks(self) -> tuple[str, ...]:
        """The regions that scoring needs: the scored regions, and those that join their lesions."""
        return tuple(dict.fromkeys((*self.regions, *(other for others in self.joined_by.values() for other in others))))


@cache
def known_rules() -> Mapping[str, Path]:
    """Return the TOML file of each challenge with rules, by all names of the challenge, sorted."""
    found: dict[str, Path] = {}
    for path in _FOLDER.glob("*.toml"):
        if path != _UNKNOWN:
            found |= dict.fromkeys((path.stem, *read_toml(path).get("other_names", ())), path)
    return MappingProxyType(dict(sorted(found.items())))


def read_rules(name: str) -> Rules:
    """Read the rules of a challenge.

    Args:
        name: Year and task, such as 2024-GLI; upper or lower case.

    Raises:
        InputError: There are no rules of this name. The message lists the known names.
    """
    found = next((known for known in known_rules() if known.lower() == name.lower()), None)
    if found is None:
        why = {unknown.lower(): reason for unknown, reason in read_toml(_UNKNOWN).items()}.get(name.lower())
        raise InputError(
            f"There are no rules {name}{f': {why}' if why else ''}. Expected one of {', '.join(known_rules())}."
        )
    content = read_toml(known_rules()[found])
    regions = tuple(content["regions"])
    penalty = content["penalty"]
    return Rules(
        name=found,
        title=content["title"],
        sources=tuple(content["sources"]),
        matching=content["matching"],
        regions=regions,
        penalty=None if penalty == "voxel diagonal" else float(penalty),
        dilation=_by_region(content.get("dilation", 0), regions),
        smallest_volume=_by_region(content.get("smallest_volume", 0), regions),
        joined_by={region: tuple(others) for region, others in content.get("joined_by", {}).items()},
        **{
            key: content[key]
            for key in ("group_predictions", "count_false", "large_volume", "found_from_dice", "table")
            if key in content
        },
    )


def _by_region(value: Any, regions: Sequence[str]) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else dict.fromkeys(regions, value)


def rules_text(options: Mapping[str, Any]) -> str:
    """Return a sentence about the rules that scores were computed by.

    Args:
        options: The entry ``options`` of report.json, with rules.
    """
    rules = options["rules"]
    text = f"Scores by the rules of {rules['title']} ({rules['name']})"
    if options["like_brats_evaluation"]:
        return f"{text}, as brats-evaluation 0.0.10 prints them where it differs from the rules."
    return f"{text}; surface Dice within {options['tolerance']:g} mm."


# --- regions of a data set ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegionLabels:
    """Label values in a data set of the regions that rules need.

    Attributes:
        labels: By region, for the regions of `Rules.masks` that the data set has.
        missing: Scored regions that the data set's labels do not distinguish.
    """

    labels: Mapping[str, tuple[int, ...]]
    missing: tuple[str, ...] = ()


def labels_of_regions(rules: Rules, labels: Mapping[str, Any]) -> RegionLabels:
    """Find the labels of a challenge's regions in a data set.

    The tissue of each label follows from the labels and regions with BraTS names. With a whole tumour, a tumour core
    and an enhancing tumour, for example, the remaining labels are oedema and necrosis.

    Args:
        rules: The challenge's rules.
        labels: The entry ``labels`` of dataset.json.

    Raises:
        InputError: The data set has none of the regions. The message lists the names that are understood.
    """
    values = label_values(labels)
    # Only some challenges have cysts as a separate region; in the others they are part of the non-enhancing tumour.
    tissues = {
        tissue
        for region in rules.masks
        for tissue in TISSUES[region]
        if tissue not in TISSUES["CC"] or "CC" in rules.masks
    }
    known = {
        region: values[name]
        for name in values
        for region, names in _NAMES.items()
        if name.lower().replace(" ", "_").replace("-", "_") in names
    }
    fitting = {
        value: {
            tissue
            for tissue in tissues
            if known and all((value in of_region) == (tissue in TISSUES[region]) for region, of_region in known.items())
        }
        for value in sorted({value for of_region in values.values() for value in of_region})
    }
    regions: dict[str, tuple[int, ...]] = {}
    for region in rules.masks:
        # A region is known if every label's possible tissues are all inside it or all outside it.
        inside = {value: may_be <= set(TISSUES[region]) for value, may_be in fitting.items() if may_be}
        if all(inside[value] or not fitting[value] & set(TISSUES[region]) for value in inside):
            regions[region] = tuple(value for value, is_inside in inside.items() if is_inside)
    for region, of_region in known.items():
        same = "ED" if region == "SNFH" and "ED" in rules.masks else region
        if same in rules.masks:
            regions[same] = tuple(sorted(of_region))
    complete = {region: of_region for region, of_region in regions.items() if of_region}
    if not any(region in complete for region in rules.regions):
        names = "; ".join(f"{region}: {', '.join(_NAMES.get(region, ('ed',)))}" for region in rules.regions)
        raise InputError(
            f"dataset.json has the labels {', '.join(values)}; the rules {rules.name} score regions that are called "
            f"({names}). Rename the labels in dataset.json, or compare without --rules."
        )
    return RegionLabels(complete, tuple(region for region in rules.regions if region not in complete))
