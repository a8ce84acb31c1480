"""Errors in nnU-Net's commands that the user can correct: one line on stderr and exit code 1, without a traceback.

nnU-Net's commands catch nothing. So looking up a trainer of this package, or one that nnU-Net does not know, sets
Python's hook for uncaught errors. It shows our own refusals, and those of nnU-Net's errors that a mistyped name or a
forgotten option causes.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from pathlib import Path
from types import TracebackType
from typing import Final

from nnunet_conres.errors import InputError
from nnunet_conres.families import no_trainer
from nnunet_conres.nnunet import PREPROCESSED, dataset_names, folder_from_environment, no_dataset, plans_names
from nnunet_conres.text import did_you_mean, no_device

# What torch says where there is no such device; the first one with a build for the CPU only.
_NO_DEVICE: Final = re.compile(
    r"not compiled with (CUDA)|no NVIDIA driver|No (CUDA) GPUs|Cannot access accelerator|(MPS) backend is not|"
    r"not linked with support for (mps)"
)
_CHANNELS: Final = re.compile(r"expected input\[.*\] to have (\d+) channels, but got (\d+) channels instead")
_TRAINER: Final = re.compile(r"Could not find requested nnunet trainer (\S+) in")
_DATASET: Final = re.compile(r"Could not find a dataset with the ID (\d+)\.")
_CONFIGURATION: Final = re.compile(
    r"(?:The|Requested) configuration (\S+) (?:does not exist in the plans|not found in plans).*\[(.*)\]"
)
# The end of what torch shows of an error in one of the processes of a training on several GPUs.
_OF_A_PROCESS: Final = re.compile(rf"^{InputError.__module__}\.{InputError.__name__}: (.+)\Z", re.MULTILINE | re.DOTALL)
_OTHER_NETWORK: Final = "The checkpoint belongs to another network"


def show_in_one_line() -> None:
    """Sets the hook in a command of nnU-Net, and in no other program. Errors of programs keep their traceback."""
    before = sys.excepthook
    if getattr(before, "shows_refusals", False) or not Path(sys.argv[0]).name.startswith("nnUNetv2_"):
        return

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        message = message_of(error)
        if message is None:
            before(kind, error, traceback)
        else:
            for worker in multiprocessing.active_children():
                if worker.daemon:  # it would end with an error when nobody takes its results any more
                    worker.kill()
            print(f"nnunet-conres: error: {message}", file=sys.stderr)

    show.shows_refusals = True  # type: ignore[attr-defined]
    sys.excepthook = show


def message_of(error: BaseException) -> str | None:
    """What to tell the user of an error; None for an error of a program."""
    text = str(error)
    if isinstance(error, InputError) or (isinstance(error, RuntimeError) and text.startswith(_OTHER_NETWORK)):
        return text
    if type(error).__name__ == "ProcessRaisedException" and (found := _OF_A_PROCESS.search(text)):
        return found[1].strip()
    if isinstance(error, FileNotFoundError):
        return _missing_plans(Path(os.fsdecode(error.filename))) if error.filename else None
    if found := _NO_DEVICE.search(text):
        return no_device(next(filter(None, found.groups()), "cuda"))
    if found := _CHANNELS.search(text):
        expected, given = map(int, found.groups())
        return (
            f"The model was trained on cases of {expected} image channels, but a case here has {given}. Every case "
            f"needs the files CASE_0000 to CASE_{expected - 1:04d}, in the order of channel_names in the model's "
            f"dataset.json."
        )
    if found := _TRAINER.search(text):
        return no_trainer(found[1])
    if found := _DATASET.search(text):
        return no_dataset(found[1])
    if found := _CONFIGURATION.search(text):
        known = re.findall(r"'([^']+)'", found[2])
        return (
            f"The plans have no configuration {found[1]}{did_you_mean(found[1], known)} They have {', '.join(known)}."
        )
    return None


def _missing_plans(file: Path) -> str | None:
    """The message for plans that nnU-Net does not find among its preprocessed data."""
    preprocessed = folder_from_environment(PREPROCESSED)
    if preprocessed is None or file.suffix != ".json" or file.parent.parent != preprocessed:
        return None
    dataset = file.parent.name
    known = plans_names(file.parent)
    if not known:
        if dataset not in dataset_names():
            return no_dataset(dataset)
        return f"{dataset} is not planned: {file} does not exist. Run: nnUNetv2_plan_and_preprocess -d {dataset[7:10]}"
    return f"There are no plans {file.stem} for {dataset}{did_you_mean(file.stem, known)} There are {', '.join(known)}."
