"""Parsing and defaults of arguments that several subcommands share."""

import argparse
import os

from nnunet_conres.errors import InputError

# nnU-Net's variable for the default number of processes.
PROCESSES_VARIABLE = "nnUNet_def_n_proc"


def number_of_processes(given: int | None) -> int:
    """Return the number of processes; by default nnU-Net's own default."""
    if given is not None:
        if given < 1:
            raise InputError(f"-np is {given}; expected a number of processes, 1 or more.")
        return given
    text = os.environ.get(PROCESSES_VARIABLE, "8")
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"The environment variable {PROCESSES_VARIABLE} is {text!r}; expected a number of processes.")
    return int(text)


def count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of cases; expected 0 or more")
    return int(text)


def fold(text: str) -> int | str:
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a fold; expected a number or all")
    return text if text == "all" else int(text)
