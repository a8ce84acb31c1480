"""Arguments of `nnunet-conres workflow`."""

import argparse
import importlib.util
from typing import TYPE_CHECKING

from nnunet_conres.errors import InputError

if TYPE_CHECKING:
    from nnunet_conres.cli import Subparsers


def add_workflow(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "workflow",
        help="run a whole experiment on this machine or on a cluster",
        description="Runs an experiment from raw data to reports: conversion, integrity check, fingerprint, plans, "
        "preprocessing, every fold of every model, test cases, ensembles, post-processing, comparison, the folder of a "
        "BraTS container. After an interruption or a change, run it again: finished results are kept, trainings resume "
        "from their checkpoints.",
        epilog="Other options, after CONFIG.yaml, are passed to Snakemake, for example: --jobs 20 --until train",
        allow_abbrev=False,
    )
    parser.add_argument(
        "config", metavar="CONFIG.yaml", nargs="?", help="the experiment's configuration, see --example"
    )
    parser.add_argument(
        "--example",
        metavar="NAME",
        choices=("brats", "laptop"),
        help="print an example configuration: %(choices)s",
    )
    parser.add_argument("--snakefile", action="store_true", help="print the path of the Snakefile, for plain snakemake")
    parser.add_argument("--status", action="store_true", help="show the progress and run nothing")
    parser.add_argument("--json", action="store_true", help="with --status: print JSON, for programs")
    parser.add_argument("--dry-run", "-n", action="store_true", help="show the steps that would run, and run none")
    parser.add_argument(
        "--profile",
        metavar="NAME",
        default="local",
        help="local, slurm, or a Snakemake profile's folder (default: local)",
    )
    # Unknown options are passed on to Snakemake (see `main`).
    parser.set_defaults(handler=_workflow, options=[])


def _workflow(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from nnunet_conres.workflow.launch import EXAMPLES, SNAKEFILE, launch

    if arguments.example is not None:
        print(EXAMPLES[arguments.example].read_text(), end="")
        return 0
    if arguments.snakefile:
        print(SNAKEFILE)
        return 0
    if arguments.config is None:
        raise InputError(
            "Expected an experiment's configuration. To get one: nnunet-conres workflow --example brats > brats.yaml"
        )
    if importlib.util.find_spec("pydantic") is None or importlib.util.find_spec("yaml") is None:
        raise InputError("The packages of the workflow are missing. Run: pip install 'nnunet-conres[workflow]'")
    from nnunet_conres.workflow.config import read_config

    config = Path(arguments.config)
    if not config.is_file():
        # For example the 2 in --cores 2 CONFIG.yaml.
        raise InputError(f"{arguments.config} is not a file; expected the configuration first, then the options.")
    experiment = read_config(config)
    if arguments.status:
        from nnunet_conres.workflow.status import status

        found = status(experiment)
        if arguments.json:
            import dataclasses
            import json

            print(json.dumps(dataclasses.asdict(found), indent=2))
        else:
            print(found.as_text())
        return 0
    return launch(experiment, config, arguments.profile, arguments.options, dry_run=arguments.dry_run)
