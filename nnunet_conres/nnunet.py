"""nnU-Net's folders, names of data sets and models, and the content of its JSON files."""

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
"""Name of the file with the splits in the preprocessed folder of a data set."""

NO_PLANS: Final = ("dataset", "dataset_fingerprint", "splits_final")
"""Names of JSON files in that folder that are not plans."""

CHECKPOINTS: Final = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
"""Checkpoints of a fold, in the order in which --c prefers them."""


def folder_from_environment(variable: str) -> Path | None:
    """Return the folder that one of nnU-Net's environment variables names, None if it is not set."""
    value = os.environ.get(variable)
    return Path(value) if value else None


def not_set(variable: str) -> str:
    """Return the message for one of nnU-Net's environment variables that is not set."""
    return f"The environment variable {variable} is not set; set it to the folder of nnU-Net's {_HOLDS[variable]}."


def required_folder(variable: str) -> Path:
    """Return the folder that one of nnU-Net's environment variables names.

    Raises:
        InputError: The variable is not set.
    """
    folder = folder_from_environment(variable)
    if folder is None:
        raise InputError([not_set(variable)])
    return folder


def dataset_names() -> list[str]:
    """Return the names of all data sets in nnU-Net's folders: raw, preprocessed or results."""
    folders = filter(None, map(folder_from_environment, FOLDER_VARIABLES))
    found = (path for folder in folders if folder.is_dir() for path in folder.glob("Dataset[0-9][0-9][0-9]_*"))
    return sorted({path.name for path in found if path.is_dir()})


def plans_names(folder: Path) -> list[str]:
    """Return the names of the plans in the preprocessed folder of a data set."""
    return sorted(
        path.stem
        for path in folder.glob("*.json")
        if path.stem not in NO_PLANS and '"plans_name"' in path.read_text(errors="replace")
    )


def no_dataset(dataset: int | str) -> str:
    """Return the message for a data set that does not exist."""
    known = dataset_names()
    wanted = f"Dataset{int(dataset):03d}" if str(dataset).isdigit() else str(dataset)
    listed = f"There are {first_few(known, 10)}." if known else "There is none in nnU-Net's folders."
    return f"There is no data set {dataset}{did_you_mean(wanted, known)} {listed}"


def stock_trainers() -> list[str]:
    """Return the names of nnU-Net's own trainers, read from its source: importing them all takes seconds."""
    package = find_spec("nnunetv2")
    names: list[str] = []
    for root in (package and package.submodule_search_locations) or ():
        for path in sorted(Path(root, "training", "nnUNetTrainer").rglob("*.py")):
            names += re.findall(r"^class (nnUNetTrainer\w*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return names


def switch_from_environment(variable: str) -> bool | None:
    """Return the value of an on/off environment variable, None if it is not set.

    0, false and f mean off; 1, true and t mean on.

    Raises:
        InputError: It has any other value.
    """
    text = os.environ.get(variable, "").strip().lower()
    if text not in ("", "0", "false", "f", "1", "true", "t"):
        raise InputError(f"{variable} is {text!r}; expected 1 (on) or 0 (off).")
    return text[0] in "1t" if text else None


def dataset_name_of(dataset: int | str) -> str:
    """Return the full name of a data set that nnU-Net finds by number or name: raw, preprocessed or results.

    Raises:
        InputError: There is no such data set, or more than one.
    """
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        return str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).split(". ")[0]  # nnU-Net lists its folders after it
        raise InputError([reason + "." if reason.startswith("More than one") else no_dataset(dataset)]) from error


@dataclass(frozen=True)
class Model:
    """A model, by the names that identify it in nnU-Net.

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
        """Return the model of a folder with nnU-Net's form of name and plans.json; None for any other folder."""
        parts = folder.resolve().name.split("__")
        return cls(*parts) if len(parts) == 3 and (folder / "plans.json").is_file() else None

    @property
    def folder_name(self) -> str:
        """Name of its folder in the results of a data set."""
        return f"{self.trainer}__{self.plans}__{self.configuration}"

    def folder(self, dataset_name: str) -> Path | None:
        """Return its folder in nnUNet_results, None if that variable is not set."""
        results = folder_from_environment(RESULTS)
        return None if results is None else results / dataset_name / self.folder_name

    def training_command(self, dataset_name: str, fold: int | str, *options: str) -> tuple[str, ...]:
        """Return the command that trains a fold."""
        named = (dataset_name, self.configuration, str(fold), "-tr", self.trainer, "-p", self.plans)
        return ("nnUNetv2_train", *named, *options)


def default_device() -> str:
    """Return the device for training and prediction on this machine: cuda, mps or cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_option() -> str:
    """Return the device option for suggested nnU-Net commands; empty if this machine has nnU-Net's default, CUDA."""
    device = default_device()
    return "" if device == "cuda" else f" -device {device}"


# --- dataset.json and plans.json -------------------------------------------------------------------------------------


def label_values(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the values of every label or region except background and ignore, by name, in the file's order.

    Args:
        labels: The entry ``labels`` of dataset.json.

    Raises:
        TypeError, ValueError, AttributeError: The entry is not valid.
    """
    return {
        str(name): tuple(int(value) for value in (values if isinstance(values, (list, tuple)) else (values,)))
        for name, values in labels.items()
        if name not in ("background", "ignore")
    }


def ignore_label(labels: Mapping[str, Any]) -> int | None:
    """Return the label of unannotated voxels, None if there is none.

    Args:
        labels: The entry ``labels`` of dataset.json.
    """
    return None if labels.get("ignore") is None else int(labels["ignore"])


def resolved_configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration of plans, including the entries that it inherits.

    Raises:
        KeyError: The plans lack this configuration, or one that it inherits from.
    """
    own = dict(plans["configurations"][name])
    parent = own.pop("inherits_from", None)
    return (resolved_configuration(plans, parent) if parent else {}) | own


def architecture_errors(plans_file: Path) -> list[str]:
    """Check that a model's plans name nothing but network modules as network and layers.

    Anything else that they name would be called when the network is built.

    Args:
        plans_file: The plans.json of a model, possibly from an untrusted source.

    Returns:
        A message for every name of something that is not a network module.

    Raises:
        InputError: The file cannot be read, or does not contain plans.
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
        raise InputError(f"{plans_file} does not contain nnU-Net's plans: {error!r}.") from error
    errors = []
    for name in dict.fromkeys(name for name in names if isinstance(name, str)):
        found = pydoc.locate(name)  # as nnU-Net finds it
        if found is not None and not (isinstance(found, type) and issubclass(found, nn.Module)):
            errors.append(f"{plans_file} names {name} as part of a network; expected a class of torch.nn.Module.")
    return errors
