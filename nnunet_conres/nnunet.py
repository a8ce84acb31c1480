"""nnU-Net's folders, and its names of data sets and models."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nnunet_conres.errors import InputError

# The first holds the raw data sets.
FOLDER_VARIABLES: Final = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def folder_from_environment(variable: str) -> Path | None:
    """The folder that one of nnU-Net's environment variables names, None where it is not set."""
    value = os.environ.get(variable)
    return Path(value) if value else None


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
        raise InputError([f"{dataset} is no data set: {reason}."]) from error


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
    def of_folder(cls, folder: Path) -> Model | None:
        """The model of a folder that has nnU-Net's name and plans.json; None for another folder."""
        parts = folder.resolve().name.split("__")
        return Model(*parts) if len(parts) == 3 and (folder / "plans.json").is_file() else None

    @property
    def folder_name(self) -> str:
        """Name of its folder among the results of a data set."""
        return f"{self.trainer}__{self.plans}__{self.configuration}"

    def folder(self, dataset_name: str) -> Path | None:
        """Its folder in nnUNet_results, None if that is not set."""
        results = folder_from_environment(FOLDER_VARIABLES[2])
        return None if results is None else results / dataset_name / self.folder_name

    def training_command(self, dataset_name: str, fold: int | str, *options: str) -> tuple[str, ...]:
        """The command that trains a fold."""
        named = (dataset_name, self.configuration, str(fold), "-tr", self.trainer, "-p", self.plans)
        return ("nnUNetv2_train", *named, *options)
