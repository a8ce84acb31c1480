"""The command `nnunet-conres`: parses its arguments and calls what does the work.

A subcommand is a function `add_NAME` that describes its arguments and a function `_NAME` that is called with them and
returns the exit code; both stand in the module of their room, and `_SUBCOMMANDS` lists them in the order of `--help`.
What a subcommand needs is imported in its `_NAME`, so that `--help` and `info` answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nnunet_conres import __version__
from nnunet_conres.cli import (
    brats,
    comparison,
    datasets,
    evaluation,
    planning,
    registration,
    residuals,
    splits,
    workflow,
)

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_SUBCOMMANDS: tuple[Callable[["Subparsers"], None], ...] = (
    registration.add_info,
    brats.add_brats_convert,
    brats.add_brats_export,
    splits.add_split,
    planning.add_plan,
    planning.add_plan_and_preprocess,
    planning.add_memory,
    planning.add_variants,
    datasets.add_sparsify,
    datasets.add_densify,
    evaluation.add_summary,
    evaluation.add_overlay,
    residuals.add_residuals,
    comparison.add_compare,
    workflow.add_workflow,
    brats.add_phantom,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command.

    Of what it returns, `handler` is the function to call, and `subparser` the parser that speaks for the subcommand.
    """
    parser = argparse.ArgumentParser(
        prog="nnunet-conres",
        description="Tools around the ConResNet, V-Net and 3D U-Net trainers for nnU-Net. Training and prediction are "
        "nnU-Net's own commands, for example: nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerConResNet",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _SUBCOMMANDS:
        add(subparsers)
    for subparser in subparsers.choices.values():
        subparser.set_defaults(subparser=subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: what the subcommand returns, or 2 for an error that the user can do something about, which is
        then told in a line on stderr, without a traceback.
    """
    parser = build_parser()
    arguments, others = parser.parse_known_args(argv)
    if others and not hasattr(arguments, "options"):
        arguments.subparser.error(f"unrecognized arguments: {' '.join(others)}")
    arguments.options = others
    try:
        return arguments.handler(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"nnunet-conres: error: {error}", file=sys.stderr)
        return 2
