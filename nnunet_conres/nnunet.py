"""nnU-Net's folders, names of data sets and models, and what is in its JSON files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar

from nnunet_conres.errors import InputError
from nnunet_conres.files import read_json
from nnunet_conres.text import did_you_mean, first_few

_Model = TypeVar("_Model", bound="Model")

_HOLDS: Final = {
    "nnUNet_raw": "raw data sets",
    "nnUNet_preprocessed": "preprocessed data sets, plans and splits",
    "nnUNet_results": "trained models",
}
FOLDER_VARIABLES: Final = tuple(_HOLDS)
RAW, PREPROCESSED, RESULTS = FOLDER_VARIABLES

SPLITS_FILE: Final = "splits_final.json"
"""In a data set's preprocessed folder."""

NO_PLANS: Final = ("dataset", "dataset_fingerprint", "splits_final")
"""Names of JSON files there that hold no plans."""

CHECKPOINTS: Final = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
"""Of a fold, in the order in which --c goes on from them."""


def folder_from_environment(variable: str) -> Path | None:
    """The folder that one of nnU-Net's environment variables names, None where it is not set."""
    value = os.environ.get(variable)
    return Path(value) if value else None


def not_set(variable: str) -> str:
    """The message for one of nnU-Net's environment variables that names no folder."""
    return f"The environment variable {variable} is not set; set it to the folder of nnU-Net's {_HOLDS[variable]}."


def required_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's environment variables names.

    Raises:
        InputError: It is not set.
    """
    folder = folder_from_environment(variable)
    if folder is None:
        raise InputError([not_set(variable)])
    return folder


def dataset_names() -> list[str]:
    """Names of all data sets in nnU-Net's folders, raw, preprocessed or among the results."""
    folders = filter(None, map(folder_from_environment, FOLDER_VARIABLES))
    found = (path for folder in folders if folder.is_dir() for path in folder.glob("Dataset[0-9][0-9][0-9]_*"))
    return sorted({path.name for path in found if path.is_dir()})


def plans_names(folder: Path) -> list[str]:
    """Names of the plans in the preprocessed folder of a data set."""
    return sorted(
        path.stem
        for path in folder.glob("*.json")
        if path.stem not in NO_PLANS and '"plans_name"' in path.read_text(errors="replace")
    )


def no_dataset(dataset: int | str) -> str:
    """The message for a data set that is not there."""
    known = dataset_names()
    wanted = f"Dataset{int(dataset):03d}" if str(dataset).isdigit() else str(dataset)
    listed = f"There are {first_few(known, 10)}." if known else "There is none in nnU-Net's folders."
    return f"There is no data set {dataset}{did_you_mean(wanted, known)} {listed}"


def stock_trainers() -> list[str]:
    """Names of nnU-Net's own trainers, from its source: importing them all takes seconds."""
    package = find_spec("nnunetv2")
    names: list[str] = []
    for root in (package and package.submodule_search_locations) or ():
        for path in sorted(Path(root, "training", "nnUNetTrainer").rglob("*.py")):
            names += re.findall(r"^class (nnUNetTrainer\w*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return names


def switch_from_environment(variable: str) -> bool | None:
    """What an environment variable of this package switches: 0 off, 1 on; None where it is not set.

    Raises:
        InputError: It is neither.
    """
    text = os.environ.get(variable, "").strip().lower()
    if text not in ("", "0", "false", "f", "1", "true", "t"):
        raise InputError(f"{variable} is {text!r}; expected 1 (on) or 0 (off).")
    return text[0] in "1t" if text else None


def dataset_name_of(dataset: int | str) -> str:
    """Whole name of a data set that nnU-Net finds by its number or name, raw, preprocessed or among the results.

    Raises:
        InputError: There is none, or more than one.
    """
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        return str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).split(". ")[0]  # after it nnU-Net lists its folders
        raise InputError([reason + "." if reason.startswith("More than one") else no_dataset(dataset)]) from error


@dataclass(frozen=True)
class Model:
    """A model as nnU-Net names it.

    Attributes:
        trainer: Name of the trainer's class.
        plans: Name of the plans.
        configuration: For example 3d_fullres.
    """

    trainer: str
    plans: str
    configuration: str

    @classmethod
    def of_folder(cls: type[_Model], folder: Path) -> _Model | None:
        """The model of a folder that has nnU-Net's name and plans.json; None for another folder."""
        parts = folder.resolve().name.split("__")
        return cls(*parts) if len(parts) == 3 and (folder / "plans.json").is_file() else None

    @property
    def folder_name(self) -> str:
        """Name of its folder among the results of a data set."""
        return f"{self.trainer}__{self.plans}__{self.configuration}"

    def folder(self, dataset_name: str) -> Path | None:
        """Its folder in nnUNet_results, None if that is not set."""
        results = folder_from_environment(RESULTS)
        return None if results is None else results / dataset_name / self.folder_name

    def training_command(self, dataset_name: str, fold: int | str, *options: str) -> tuple[str, ...]:
        """The command that trains a fold."""
        named = (dataset_name, self.configuration, str(fold), "-tr", self.trainer, "-p", self.plans)
        return ("nnUNetv2_train", *named, *options)


def default_device() -> str:
    """The device to train and predict on here: cuda, mps or cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_option() -> str:
    """What a suggested command of nnU-Net needs on this machine: nothing where there is its default, a CUDA device."""
    device = default_device()
    return "" if device == "cuda" else f" -device {device}"


# --- dataset.json and plans.json -------------------------------------------------------------------------------------


def label_values(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Label values of every label or region but background and ignore, by name, in the file's order.

    Args:
        labels: The entry ``labels`` of dataset.json.

    Raises:
        TypeError, ValueError, AttributeError: It is none.
    """
    return {
        str(name): tuple(int(value) for value in (values if isinstance(values, (list, tuple)) else (values,)))
        for name, values in labels.items()
        if name not in ("background", "ignore")
    }


def ignore_label(labels: Mapping[str, Any]) -> int | None:
    """The label of voxels that are not annotated, None where there is none.

    Args:
        labels: The entry ``labels`` of dataset.json.
    """
    return None if labels.get("ignore") is None else int(labels["ignore"])


def resolved_configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration of plans with what it inherits.

    Raises:
        KeyError: The plans have none of that name, or not the one that it inherits from.
    """
    own = dict(plans["configurations"][name])
    parent = own.pop("inherits_from", None)
    return (resolved_configuration(plans, parent) if parent else {}) | own


def architecture_errors(plans_file: Path) -> list[str]:
    """What a model's plans name as network or layer that is none, and would be called when the network is built.

    Args:
        plans_file: The plans.json of a model, which other people may have made.

    Returns:
        A message for every such name.

    Raises:
        InputError: The file cannot be read, or holds no plans.
    """
    import pydoc

    from torch import nn

    names: list[Any] = []
    content = read_json(plans_file)
    try:
        for configuration in content["configurations"].values():
            architecture = configuration.get("architecture", {})
            arguments = architecture.get("arch_kwargs", {})
            names += [architecture.get("network_class_name")]
            names += [arguments.get(key) for key in architecture.get("_kw_requires_import", ())]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{plans_file} holds no plans of nnU-Net: {error!r}.") from error
    errors = []
    for name in dict.fromkeys(name for name in names if isinstance(name, str)):
        found = pydoc.locate(name)  # as nnU-Net finds it
        if found is not None and not (isinstance(found, type) and issubclass(found, nn.Module)):
            errors.append(f"{plans_file} names {name} as part of a network; expected a class of torch.nn.Module.")
    return errors
