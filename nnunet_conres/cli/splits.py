"""Arguments of `nnunet-conres split`."""

import argparse
import sys
from typing import TYPE_CHECKING

from nnunet_conres.cli.arguments import number_of_processes

if TYPE_CHECKING:
    from nnunet_conres.cli import Subparsers


def add_split(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "split",
        help="split by patient into folds, balanced by tumour volume and grade",
        description="Writes splits_final.json into the data set's preprocessed folder, before or after planning. Time "
        "points of a patient (BraTS 2023 and later) stay in one fold; tumour volume, and the grade if known, are "
        "balanced over the folds.",
    )
    parser.add_argument("-d", metavar="DATASET", required=True, help="data set name or id, in $nnUNet_raw")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--folds", metavar="K", type=int, default=5, help="number of folds (default: %(default)s)")
    how.add_argument(
        "--validation", metavar="FILE", help="make one fold that holds out the cases in this text file, one id per line"
    )
    parser.add_argument(
        "--stratify",
        choices=("both", "grade", "volume", "none"),
        default="both",
        help="what to balance over the folds; both uses the grade where it is known (default: %(default)s)",
    )
    parser.add_argument(
        "--grades",
        metavar="FILE",
        help="CSV with a column Grade and a column of ids, such as BraTS's name_mapping.csv (default: the grades in "
        "the data set's cases.json)",
    )
    parser.add_argument(
        "--group",
        metavar="REGEX",
        help="keep cases together whose ids have the same match (of the first group in parentheses, if any), for "
        r"example 'Brats18_(TCIA\d+|CBICA|2013)_' for the sites of BraTS 2018 (default: the patient)",
    )
    parser.add_argument(
        "--seed", metavar="S", type=int, default=12345, help="another seed gives other folds (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace existing splits")
    parser.add_argument("-np", metavar="N", type=int, help="number of processes (default: $nnUNet_def_n_proc, else 8)")
    parser.set_defaults(handler=_split)


def _split(arguments: argparse.Namespace) -> int:
    from nnunet_conres.datasets.splits import format_table, split

    done = split(
        arguments.d,
        folds=arguments.folds,
        balance=arguments.stratify,
        seed=arguments.seed,
        group=arguments.group,
        validation_file=arguments.validation,
        grades_file=arguments.grades,
        force=arguments.force,
        processes=number_of_processes(arguments.np),
    )
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for training in done.other_trainings:
        print(f"warning: trained on other splits: {training}", file=sys.stderr)
    print(f"{done.path}{' (unchanged)' if done.unchanged else ''}")
    print(format_table(done))
    return 0
