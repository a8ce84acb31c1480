"""Schemes, which define the file names and labels of a BraTS challenge, and the TOML files that describe them.

The schemes of this package are TOML files in the folder schemes. docs/how-to/brats.md explains the format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from nnunet_conres.errors import InputError
from nnunet_conres.files import read_toml

Mode = Literal["regions", "labels"]

Content = tuple[str, ...]
"""Content of a file: its channels, or `LABELS`."""

LABELS: Final[Content] = ("labels",)

_FOLDER: Final = Path(__file__).with_name("schemes")
_ID: Final = re.compile(r"\{id(?::(.+))?\}")


@dataclass(frozen=True)
class LabelSet:
    """Tissues of a data set with nnU-Net's consecutive labels, and the regions made from them.

    Attributes:
        tissues: nnU-Net's label of each tissue, consecutive from 1, outermost first. Nested regions that are written in
            this order restore the labels.
        regions: Labels of each region. There are as many regions as labels. If the regions are written in order, each
            over the previous ones, the part that remains of region k (counted from 0) is label k+1.
    """

    tissues: Mapping[str, int]
    regions: Mapping[str, tuple[int, ...]]

    @property
    def class_order(self) -> tuple[int, ...]:
        """nnU-Net's regions_class_order: the label that each region is written as, in the regions' order."""
        return tuple(self.tissues.values())

    def dataset_json(self, mode: Mode) -> dict[str, Any]:
        """Return the part of dataset.json about labels."""
        if mode == "labels":
            return {"labels": {"background": 0, **self.tissues}}
        regions = {name: labels[0] if len(labels) == 1 else list(labels) for name, labels in self.regions.items()}
        content: dict[str, Any] = {"labels": {"background": 0, **regions}}
        # If every region has a single label, nnU-Net treats them as labels.
        if any(len(labels) > 1 for labels in self.regions.values()):
            content["regions_class_order"] = list(self.class_order)
        return content

    def contains(self, other: LabelSet) -> bool:
        """Return whether this set has all tissues and regions of another set, with the same labels."""
        return other.tissues.items() <= self.tissues.items() and other.regions.items() <= self.regions.items()


@dataclass(frozen=True)
class Layout:
    """The names of a case's files.

    Attributes:
        files: Pattern of each file name without its ending, and the content of the file. `{id}` in a pattern stands for
            the case id, `{id:REGEX}` for an id of this form. A pattern with a folder, such as `imagesTr/{id}`, matches
            only files in folders of this name.
    """

    files: tuple[tuple[str, Content], ...]

    @cached_property
    def _expressions(self) -> tuple[tuple[re.Pattern[str], Content], ...]:
        return tuple((_expression(pattern), content) for pattern, content in self.files)

    def split(self, folder_name: str, file_name: str) -> tuple[str, Content] | None:
        """Return case id and content of a NIfTI file whose name fits the layout, else None."""
        for expression, content in self._expressions:
            match = expression.fullmatch(f"{folder_name}/{file_name}")
            if match is not None:
                return match["id"], content
        return None

    @cached_property
    def images(self) -> tuple[Content, ...]:
        """The channels in each image file of a case."""
        return tuple(dict.fromkeys(content for _, content in self.files if content != LABELS))

    @property
    def channels(self) -> tuple[str, ...]:
        """Channels of the data set, in order."""
        return tuple(channel for content in self.images for channel in content)

    @property
    def has_folders(self) -> bool:
        """Whether the files of a case lie in different folders, such as imagesTr and labelsTr."""
        return any("/" in pattern for pattern, _ in self.files)

    def part(self, content: Content) -> str:
        """Return the part of a file name that stands for its content, such as t2w."""
        return _ID.sub("", self._pattern(content)).strip("_-./ ")

    def expected(self, case_id: str = "CASE", content: Content | None = None) -> str:
        """Return the expected name of a case's file with this content, or of all its files."""
        if content is not None:
            return _filled(self._pattern(content), case_id)
        names = [_ID.sub("{id}", pattern) for pattern, _ in self.files]
        common = os.path.commonprefix(names)  # noqa: RUF071  names, not paths
        if "{id}" not in common:
            return ", ".join(_filled(name, case_id) for name in names)
        rest = ",".join(name.removeprefix(common) for name in names)
        return f"{common.replace('{id}', case_id)}{{{rest}}}.nii.gz"

    def _pattern(self, content: Content) -> str:
        return next(pattern for pattern, held in self.files if held == content)


def _filled(pattern: str, case_id: str) -> str:
    return f"{_ID.sub(lambda _: case_id, pattern)}.nii.gz"


def _expression(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern, to match `folder/file`."""
    match = _ID.search(pattern)
    assert match is not None, "patterns without an id are refused"
    before, after = re.escape(pattern[: match.start()]), re.escape(pattern[match.end() :])
    folder = "" if "/" in pattern else "[^/]*/"
    return re.compile(rf"{folder}{before}(?P<id>{match[1] or '.+'}){after}\.nii(?:\.gz)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, eq=False)
class Scheme:
    """The file names and labels of a challenge.

    Attributes:
        name: Name for `--scheme`; for a scheme file, the file name without its ending.
        title: Title for messages.
        layout: The names of its files.
        ids: Regular expression (ignoring case) of the case ids that are assigned to this challenge unless `--scheme`
            says otherwise. If several schemes claim an id, only `--scheme` decides. Empty for none.
        prefix: Regular expression (ignoring case) for the beginning of the challenge's ids, including those that `ids`
            leaves to another year.
        labels: Tissue of each label value other than 0, the background.
        label_set: The tissues of those labels, and their regions.
        other_names: Other names that `--scheme` accepts.
        archives: Regular expressions (ignoring case), searched for in the names of folders with cases. A match marks an
            archive of this challenge.
        patient: Regular expression (ignoring case) for the beginning of an id that names the patient; empty if every
            id is a different patient.
        less_enhancing: Tissue that replaces enhancing tumour that is too small to be plausible; empty for none.
        path: The user's scheme file, None for the package's own schemes.
    """

    name: str
    title: str
    layout: Layout
    ids: str
    prefix: str
    labels: Mapping[int, str]
    label_set: LabelSet
    other_names: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()
    patient: str = ""
    less_enhancing: str = ""
    path: Path | None = None

    @property
    def option(self) -> str:
        """The command-line option that selects this scheme."""
        return f"--scheme {self.name if self.path is None else self.path}"

    @property
    def called(self) -> str:
        """Title and option of the scheme, for messages."""
        return f"{self.title} ({self.option})"

    @property
    def known_labels(self) -> str:
        """The labels, for messages."""
        return ", ".join(f"{value} {tissue}" for value, tissue in self.labels.items())

    def claims(self, case_id: str) -> bool:
        """Return whether a case is assigned to this challenge by default."""
        return re.fullmatch(self.ids, case_id, re.IGNORECASE) is not None

    def may_be(self, case_id: str) -> bool:
        """Return whether an id begins like the ids of this challenge."""
        return re.match(self.prefix, case_id, re.IGNORECASE) is not None

    def owns_folder(self, name: str) -> bool:
        """Return whether a folder is named like one of the challenge's archives."""
        return any(re.search(pattern, name, re.IGNORECASE) for pattern in self.archives)

    def patient_of(self, case_id: str) -> str:
        """Return the patient from a case id; by default the id itself."""
        match = re.match(self.patient, case_id, re.IGNORECASE) if self.patient else None
        return match[0] if match and match[0] else case_id

    def to_nnunet(self) -> dict[int, int]:
        """Return nnU-Net's label for each of the challenge's labels."""
        return {0: 0, **{value: self.label_set.tissues[tissue] for value, tissue in self.labels.items()}}


def builtin_schemes() -> dict[str, Scheme]:
    """Return the package's own schemes by name."""
    return {path.stem: _scheme(path.stem, _with_base(path, read_toml(path)), None) for path in _builtin_files()}


def _builtin_files() -> list[Path]:
    return sorted(_FOLDER.glob("*.toml"), key=lambda path: path.stem)


def read_scheme(path: str | Path) -> Scheme:
    """Read a file that describes a scheme.

    Args:
        path: A TOML file. Its name without the ending is the scheme's name.

    Raises:
        InputError: The file can't be read, or does not describe a scheme. Lists all errors.
    """
    path = Path(path)
    try:
        content = read_toml(path)
    except InputError as error:
        expected = "--scheme expects a name such as 2023, or a TOML file that describes a scheme."
        raise InputError(f"{error} {expected}") from error
    content = _with_base(path, content)
    errors = list(_errors(content))
    if errors:
        raise InputError([f"{path}: {error}" for error in errors])
    return _scheme(path.stem, content, path)


def _with_base(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Complete a file's content from the package's scheme that its entry `like` names."""
    if "like" not in content:
        return content
    names = [known.stem for known in _builtin_files()]
    if content["like"] not in names:
        raise InputError(f"{path}: like is {content['like']!r}; expected one of {', '.join(names)}.")
    base = _FOLDER / f"{content['like']}.toml"
    inherited = _with_base(base, read_toml(base))
    own = {key: value for key, value in content.items() if key != "like"}
    # Do not inherit these entries: they identify the other challenge, and two schemes must not claim them.
    left_out = ("other_names", "archives")
    return {**{key: value for key, value in inherited.items() if key not in left_out}, **own}


_TEXTS: Final = ("title", "ids", "prefix", "patient", "less_enhancing")
_LISTS: Final = ("other_names", "archives")
_TABLES: Final = ("files", "labels", "regions")
_NEEDED: Final = ("title", "prefix", *_TABLES)


def _errors(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for every error in the content of a scheme file."""
    unknown = [key for key in content if key not in (*_TEXTS, *_LISTS, *_TABLES)]
    if unknown:
        known = ", ".join(("like", *_TEXTS, *_LISTS, *_TABLES))
        yield f"{', '.join(unknown)} is unknown; expected {known}, the single values before the first [table]."
    missing = [key for key in _NEEDED if key not in content]
    if missing:
        yield f"{', '.join(missing)} is missing; give it, or name a scheme that has it, as in like = '2023'."
    wrong = [
        f"{key} is {content[key]!r}; expected {what}."
        for keys, fits, what in (
            (_TEXTS, lambda value: isinstance(value, str), "text in quotes"),
            (_LISTS, _is_texts, "a list of texts"),
            (_TABLES, lambda value: isinstance(value, dict) and bool(value), "a table with entries"),
        )
        for key in keys
        if key in content and not fits(content[key])
    ]
    yield from wrong
    if missing or wrong:
        return
    for key in ("ids", "prefix", "patient"):
        yield from _expression_errors(key, content.get(key, ""))
    for pattern in content.get("archives", ()):
        yield from _expression_errors("archives", pattern)
    yield from _file_errors(content["files"])
    label_errors = list(_label_errors(content["labels"]))
    yield from label_errors
    if not label_errors:
        yield from _region_errors(content["regions"], list(content["labels"].values()))
        less = content.get("less_enhancing", "")
        if less and not {less, "enhancing"} <= set(content["labels"].values()):
            yield f"less_enhancing is {less}; expected a tissue of [labels], which must have enhancing too."


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _expression_errors(what: str, pattern: str) -> Iterator[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield f"{what} is {pattern!r}, which is not a regular expression: {error}."


def _file_errors(files: Mapping[str, Any]) -> Iterator[str]:
    contents: list[Content] = []
    for pattern, content in files.items():
        if len(_ID.findall(pattern)) != 1 or pattern.count("/") > 1:
            yield f"[files] has {pattern!r}; expected a name with {{id}} for the case id, and at most one folder."
        else:
            try:
                re.compile(_ID.findall(pattern)[0])
                _expression(pattern)
            except re.error as error:
                yield f"[files] has {pattern!r}, whose form of {{id}} is not a regular expression: {error}."
        texts = [content] if isinstance(content, str) else content
        if not _is_texts(texts) or not texts or not all(texts):
            yield f"[files] {pattern!r} is {content!r}; expected a channel, a list of channels, or labels."
        else:
            contents.append(tuple(texts))
    if len(contents) < len(files):
        return
    if LABELS not in contents:
        yield "[files] has no labels; expected one pattern that is 'labels'."
    channels = [channel for content in dict.fromkeys(contents) if content != LABELS for channel in content]
    if not channels:
        yield "[files] has no channel; expected one pattern for every modality."
    twice = sorted({channel for channel in channels if channels.count(channel) > 1 or channel == LABELS[0]})
    if twice:
        yield f"[files] has {', '.join(twice)} in different files; expected each channel in files of one kind."


def _label_errors(labels: Mapping[str, Any]) -> Iterator[str]:
    for value, tissue in labels.items():
        if not re.fullmatch(r"[1-9]\d{0,2}", value) or int(value) > 255:
            yield f"[labels] has {value}; expected label values from 1 to 255 (0 is the background)."
        if not isinstance(tissue, str) or not tissue or tissue == "background":
            yield f"[labels] {value} is {tissue!r}; expected the tissue's name."
    tissues = [tissue for tissue in labels.values() if isinstance(tissue, str)]
    twice = sorted({tissue for tissue in tissues if tissues.count(tissue) > 1})
    if twice:
        yield f"[labels] has {', '.join(twice)} more than once; expected one value for each tissue."


def _region_errors(regions: Mapping[str, Any], tissues: list[str]) -> Iterator[str]:
    strange = [
        f"[regions] {name} is {region!r}; expected a list of tissues of [labels]: {', '.join(tissues)}."
        for name, region in regions.items()
        if not _is_texts(region) or not set(region) <= set(tissues) or name == "background"
    ]
    yield from strange
    if strange:
        return
    for name, left in _innermost(regions).items():
        if len(left) != 1:
            yield (
                f"[regions] {name} has {' and '.join(sorted(left)) or 'nothing'} beyond the regions after it; expected "
                f"one tissue: regions are written one over the other, in this order, and must restore the labels. "
                f"Order them from the outermost inwards."
            )
    lacking = [tissue for tissue in tissues if not any(tissue in region for region in regions.values())]
    if lacking:
        yield f"[regions] has {', '.join(lacking)} in no region; expected every tissue in one."


def _innermost(regions: Mapping[str, list[str]]) -> dict[str, set[str]]:
    """Return the tissues of each region that none of the later regions contains."""
    later: set[str] = set()
    left = {}
    for name, region in reversed(list(regions.items())):
        left[name] = set(region) - later
        later |= set(region)
    return dict(reversed(list(left.items())))


def _scheme(name: str, content: Mapping[str, Any], path: Path | None) -> Scheme:
    """Build a scheme from the content of a file."""
    tissues = {tissue: label for label, (tissue,) in enumerate(_innermost(content["regions"]).values(), start=1)}
    regions = {region: tuple(sorted(tissues[tissue] for tissue in held)) for region, held in content["regions"].items()}
    files = tuple(
        (pattern, (held,) if isinstance(held, str) else tuple(held)) for pattern, held in content["files"].items()
    )
    return Scheme(
        name=name,
        title=content["title"],
        layout=Layout(files),
        ids=content.get("ids", ""),
        prefix=content["prefix"],
        labels={int(value): tissue for value, tissue in content["labels"].items()},
        label_set=LabelSet(tissues, regions),
        other_names=tuple(content.get("other_names", ())),
        archives=tuple(content.get("archives", ())),
        patient=content.get("patient", ""),
        less_enhancing=content.get("less_enhancing", ""),
        path=path,
    )
