"""User errors in nnU-Net's commands: one line on stderr and exit code 1, without a traceback.

nnU-Net's commands catch no exceptions. So the lookup of a trainer of this package, or of one that nnU-Net does not
know, sets Python's hook for uncaught exceptions. The hook shows the errors of this package, and errors of nnU-Net that
a mistyped name or a forgotten option causes.
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

# Messages of torch for a missing device; the first one comes from a build for the CPU only.
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
# The end of torch's message for an error in one process of a training on several GPUs.
_OF_A_PROCESS: Final = re.compile(rf"^{InputError.__module__}\.{InputError.__name__}: (.+)\Z", re.MULTILINE | re.DOTALL)
_OTHER_NETWORK: Final = "The checkpoint belongs to another network"


def show_in_one_line() -> None:
    """Set the hook in nnU-Net's commands, and in no other program. Programming errors keep their traceback."""
    before = sys.excepthook
    if getattr(before, "shows_refusals", False) or not Path(sys.argv[0]).name.startswith("nnUNetv2_"):
        return

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        message = message_of(error)
        if message is None:
            before(kind, error, traceback)
        else:
            for worker in multiprocessing.active_children():
                if worker.daemon:  # otherwise it fails when its results are no longer read
                    worker.kill()
            print(f"nnunet-conres: error: {message}", file=sys.stderr)

    show.shows_refusals = True  # type: ignore[attr-defined]
    sys.excepthook = show


def message_of(error: BaseException) -> str | None:
    """Return the message for the user; None for a programming error."""
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
    """Return the message for missing plans in nnU-Net's preprocessed data; None for any other file."""
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
