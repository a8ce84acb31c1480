"""The entries of an experiment's YAML file, as pydantic models.

Checks that need several entries, or nnU-Net's classes, are in nnunet_conres.workflow.config.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from nnunet_conres.evaluation.rules import read_rules

# Options of sbatch that Snakemake's plugin sets itself and rejects in slurm_extra, and what to use instead, or why.
_NOT_EXTRA: Final = {
    option: instead
    for options, instead in (
        ("--account -A", "expected account instead"),
        ("--partition -p", "expected partition instead"),
        ("--qos", "expected qos instead"),
        ("--constraint -C", "expected constraint instead"),
        ("--mem --mem-per-cpu", "expected memory_gb instead"),
        ("--time -t", "expected minutes instead"),
        ("--cpus-per-task -c --ntasks -n --cpus-per-gpu --ntasks-per-gpu", "expected cpus instead"),
        ("--gres --gpus", "expected gpus or gpu_types instead"),
        ("--nodes -N", "a job always runs on one node"),
        ("--output -o --error -e", "the workflow sets the paths of the logs"),
        ("--comment", "the workflow sets it to step, model and fold"),
        ("--export", "expected environment, at the top, instead"),
        ("--workdir -D", "expected work, at the top, instead"),
        ("--clusters", "Snakemake's plugin does not support it"),
        ("--job-name -J", "Snakemake's plugin finds its jobs by their names"),
    )
    for option in options.split()
}


# --- kinds of values --------------------------------------------------------------------------------------------------


def _passable(value: str) -> str:
    """A text that can be part of a path, an argument or an environment variable."""
    try:
        if b"\0" not in value.encode():
            return value
    except UnicodeEncodeError:
        pass
    raise ValueError("expected a text without NUL and without lone surrogates")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a text")
    return _passable(value)


def _name(value: Any) -> str:
    """A name of a model, trainer, plans or the like: part of file names and commands. YAML reads some as numbers."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", text):
        raise ValueError("expected letters, digits and . _ -")
    return text


def _dataset_name(value: Any) -> str:
    text = _text(value)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", text):
        raise ValueError("expected letters, digits, - and _ only")
    return text


def _path(value: Any, info: ValidationInfo) -> Path:
    """An absolute path; relative ones are relative to the folder of the file."""
    base: Path = info.context  # type: ignore[assignment]
    return (base / Path(os.path.expandvars(_text(value))).expanduser()).absolute()


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    return path


def _file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    return path


def _scheme(value: Any, info: ValidationInfo) -> str:
    """A scheme's name, such as 2021 (a number in YAML), or the path of a file that describes one."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)
    return str(_file(_path(text, info))) if text.lower().endswith(".toml") else text


def _as_tuple(value: Any) -> Any:
    return value if isinstance(value, tuple) else tuple(value) if isinstance(value, list) else (value,)


def _expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"expected a regular expression ({error})") from error
    return value


def _slurm_extra(value: str) -> str:
    for option in (word.strip("'\"").partition("=")[0] for word in value.split()):
        if option in _NOT_EXTRA:
            raise ValueError(f"{option} is not allowed; {_NOT_EXTRA[option]}")
    return value


def _variable(value: Any) -> str:
    """A value of an environment variable."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        raise ValueError("expected a text or a number")
    return _passable(value)


def _variable_name(value: Any) -> str:
    text = _text(value)
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError("expected letters, digits and _")
    return text


def _not_empty(folders: tuple[Path, ...]) -> tuple[Path, ...]:
    if not folders:
        raise ValueError("expected at least one folder; to have none, remove the line")
    return folders


def _ensembles(value: Any) -> Any:
    if isinstance(value, bool) or value in ("all", "pairs", "none"):
        return value
    if isinstance(value, list) and value and all(isinstance(members, list) for members in value):
        return [[_name(member) for member in members] for members in value]
    raise ValueError("expected all, pairs, none, or a list of lists of models")


def _rules(value: Any) -> str:
    return read_rules(_text(value)).name


def _schemes(values: tuple[str, ...]) -> tuple[str, ...]:
    # imported here, because only experiments with schemes need it
    from nnunet_conres.datasets.brats_schemes import select_schemes

    _, errors = select_schemes(list(values))
    if errors:
        raise ValueError(" ".join(errors))
    return values


def _one_scheme(value: str) -> str:
    from nnunet_conres.datasets.brats_schemes import AUTO

    if value == AUTO:
        raise ValueError("expected one scheme, such as 2026-MET")
    return _schemes((value,))[0]


Text = Annotated[str, BeforeValidator(_text)]
Name = Annotated[str, BeforeValidator(_name)]
AnyPath = Annotated[Path, BeforeValidator(_path)]
Folder = Annotated[AnyPath, AfterValidator(_folder)]
Folders = Annotated[tuple[Folder, ...], BeforeValidator(_as_tuple)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


# --- sections ---------------------------------------------------------------------------------------------------------


class Section(BaseModel):
    """A group of optional entries; an entry without a value counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_empty(cls, value: Any) -> Any:
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return {key: entry for key, entry in value.items() if entry is not None}
        return value


class NnUNetFolders(Section):
    """nnU-Net's three folders, instead of its environment variables."""

    nnUNet_raw: AnyPath | None = None  # noqa: N815
    nnUNet_preprocessed: AnyPath | None = None  # noqa: N815
    nnUNet_results: AnyPath | None = None  # noqa: N815


class Data(Section):
    """The data set: one in nnUNet_raw, or BraTS folders to convert."""

    id: Annotated[int, Field(ge=1, le=999)] | None = None
    name: Annotated[str, BeforeValidator(_dataset_name)] | None = None
    brats: Annotated[Folders, AfterValidator(_not_empty)] = ()
    held_out: Folders = ()
    corrected: Folders = ()
    scheme: Annotated[
        tuple[Annotated[str, BeforeValidator(_scheme)], ...], BeforeValidator(_as_tuple), AfterValidator(_schemes)
    ] = ("auto",)
    missing: Literal["refuse", "zero"] = "refuse"


class Test(Section):
    """Test cases, named as nnU-Net expects."""

    images: Folder | None = None
    labels: Folder | None = None
    parts: Count = 1


class ModelEntries(Section):
    """A model to train."""

    trainer: Name = "nnUNetTrainer"
    plans: Name = "nnUNetPlans"
    configuration: Name = "3d_fullres"
    epochs: Count | None = None
    gpus: Count = 1
    epoch_seconds: Positive | None = None


class PlansEntries(Section):
    """How plans are made."""

    planner: Name | None = None
    gpu_memory_target: Positive | None = None


class Package(Section):
    """Folders from which containers are built; see `nnunet-conres package`."""

    models: Annotated[tuple[Name, ...], BeforeValidator(_as_tuple), Field(min_length=1)] | None = None
    scheme: Annotated[str, BeforeValidator(_scheme), AfterValidator(_one_scheme)] | None = None
    missing: Literal["refuse", "zero"] | None = None


class Splits(Section):
    """How the folds are chosen; see `nnunet-conres split`."""

    folds: Annotated[int, Field(ge=2)] = 5
    stratify: Literal["both", "grade", "volume", "none"] = "both"
    seed: Annotated[int, Field(ge=0)] = 12345
    group: Annotated[Text, AfterValidator(_expression)] | None = None
    grades: Annotated[AnyPath, AfterValidator(_file)] | None = None


SLURM_TEXTS: Final = ("account", "partition", "qos", "constraint", "slurm_extra")


class RuleResources(Section):
    """Resources that the jobs of a rule request; `SLURM_TEXTS` are passed to SLURM unchanged."""

    cpus: Count | None = None
    memory_gb: Positive | None = None
    minutes: Positive | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    gpu_types: dict[Text, Positive] | None = None
    account: Text | None = None
    partition: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    slurm_extra: Annotated[Text, AfterValidator(_slurm_extra)] | None = None


Rule = Literal[
    "default", "convert", "fingerprint", "split", "plan", "preprocess", "memory", "train", "predict", "ensemble",
    "postprocess", "compare", "package",
]  # fmt: skip


class ExperimentFile(Section):
    """The whole file."""

    work: AnyPath | None = None
    folders: NnUNetFolders = NnUNetFolders()
    data: Data = Data()
    test: Test | None = None
    models: dict[Name, ModelEntries] = {}
    plans: dict[Name, PlansEntries] = {}
    folds: list[int] | None = None
    splits: Splits = Splits()
    epochs: Count = 1000
    device: Literal["cuda", "cpu", "mps"] = "cuda"
    checkpoint_minutes: Positive = 5.0
    retries: Annotated[int, Field(ge=0)] = 5
    time_limit_hours: Positive = 24.0
    ensembles: Annotated[Any, BeforeValidator(_ensembles)] = None
    rules: Annotated[str, BeforeValidator(_rules)] | None = None
    postprocess: bool = False
    package: Package | None = None
    environment: dict[
        Annotated[str, BeforeValidator(_variable_name)],
        Annotated[str, BeforeValidator(_variable)],
    ] = {}
    resources: dict[Rule, RuleResources] = {}


# --- reading ----------------------------------------------------------------------------------------------------------


def read(content: Mapping[str, Any], base: Path) -> tuple[ExperimentFile, list[str], set[str]]:
    """Check the entries of a file one by one.

    Args:
        content: Content of the YAML file.
        base: Folder that relative paths are relative to.

    Returns:
        The valid entries, a message for each invalid one, and the places of the invalid ones: the first name in their
        path, such as "models", and the first two, such as "models, stock".
    """
    errors: list[str] = []
    wrong: set[str] = set()
    remaining: Any = _with_text_keys(content)
    while True:
        try:
            return ExperimentFile.model_validate(remaining, context=base), errors, wrong
        except ValidationError as error:
            places: dict[tuple[str, ...], str] = {}
            for entry in error.errors(include_url=False):
                place = _place(entry["loc"], remaining)
                places.setdefault(place, _message(entry, place))
            before = remaining
            for place, message in places.items():
                errors.append(message)
                wrong |= {", ".join(place[:1]), ", ".join(place[:2])}
                remaining = _without(remaining, place)
            if remaining == before:  # nothing was removed, so the loop would never end
                raise


def _with_text_keys(content: Any) -> Any:
    """Convert the names of entries to strings: YAML reads ``1:`` as a number and ``on:`` as true."""
    if not isinstance(content, Mapping):
        return content
    return {str(key): _with_text_keys(value) for key, value in content.items()}


def _place(location: tuple[int | str, ...], content: Any) -> tuple[str, ...]:
    """Return the entry that an error is about, without the list positions and union members that pydantic adds."""
    place: list[str] = []
    for key in location:
        if not isinstance(content, Mapping) or key not in content:
            break
        place.append(str(key))
        content = content[key]
    return tuple(place)


def _message(error: Any, place: tuple[str, ...]) -> str:
    where = ", ".join(place).encode(errors="backslashreplace").decode()
    kind, limits = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{where} is not known{_instead(place)}"
    if kind == "value_error":
        expected = str(limits["error"]).rstrip(".")
    elif kind in _EXPECTED:
        expected = f"expected {_EXPECTED[kind].format(**limits)}"
    else:  # as in "Input should be 'cuda', 'cpu' or 'mps'"
        expected = error["msg"].replace("Input should be", "expected")
    if error["loc"][-1:] == ("[key]",):
        return f"{where}: not a valid name; {expected}"
    return f"{where} is {error['input']!r}; {expected}"


_EXPECTED: Final = {
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "{le} or less",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "model_type": "entries",
    "dict_type": "entries",
    "list_type": "a list",
    "too_short": "at least {min_length}",
    "bool_type": "true or false",
}

_SECTIONS: Final[dict[str, type[Section]]] = {
    "folders": NnUNetFolders,
    "data": Data,
    "test": Test,
    "models": ModelEntries,
    "plans": PlansEntries,
    "package": Package,
    "splits": Splits,
    "resources": RuleResources,
}


def _instead(place: tuple[str, ...]) -> str:
    section = ExperimentFile if len(place) == 1 else _SECTIONS.get(place[0])
    return "" if section is None else f"; expected {', '.join(section.model_fields)}"


def _without(content: Any, place: tuple[str, ...]) -> Any:
    """Return the entries without the one at a place."""
    if not place:
        return {}
    key = place[0]
    if key not in content:  # already removed with its parent
        return content
    rest = {name: value for name, value in content.items() if name != key}
    if len(place) > 1 and isinstance(content[key], Mapping):
        rest[key] = _without(content[key], place[1:])
    return rest
