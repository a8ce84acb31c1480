"""The command `nnunet-conres`: parse the arguments and run the subcommand.

A subcommand consists of a function `add_NAME`, which declares its arguments, and a function `_NAME`, which runs it and
returns the exit code. Both are in the module of their subject, and `_SUBCOMMANDS` lists them in the order of `--help`.
`_NAME` imports the modules of its subcommand, so that `--help` and `info` start quickly.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from nnunet_conres import __version__
from nnunet_conres.cli import (
    brats,
    comparison,
    datasets,
    evaluation,
    planning,
    postprocessing,
    registration,
    residuals,
    splits,
    uncertainty,
    workflow,
)
from nnunet_conres.errors import InputError, file_errors

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_READER_GONE = 141
"""Exit code of a program that was ended by a closed pipe."""

_INTERRUPTED = 130
"""Exit code of a program that was ended by Ctrl-C."""

_EXAMPLES = {
    "info": "nnunet-conres info",
    "brats-convert": "nnunet-conres brats-convert -i /data/BraTS2021_Training -d 501",
    "brats-export": "nnunet-conres brats-export -i PREDICTIONS -o SUBMISSION --scheme 2021",
    "predict-brats": "nnunet-conres predict-brats -i CASES -o PREDICTIONS -m SUBMISSION/model",
    "package": "nnunet-conres package -d 501 -tr nnUNetTrainerConResNet -o SUBMISSION --scheme 2026-MET",
    "split": "nnunet-conres split -d 501",
    "plan": "nnunet-conres plan -d 501 -a conresnet -gpu_memory_target 24",
    "plan_and_preprocess": "nnunet-conres plan_and_preprocess -d 501 -a conresnet -gpu_memory_target 24",
    "memory": "nnunet-conres memory -d 501 -tr nnUNetTrainerConResNet",
    "variants": "nnunet-conres variants -d 501 --patch_size 80 160 160 --batch_size 2",
    "sparsify": "nnunet-conres sparsify -d 501 -o 601 --every 10",
    "densify": "nnunet-conres densify -d 601 -tr nnUNetTrainerConResNet -c 3d_fullres -o DENSE",
    "summary": "nnunet-conres summary PREDICTIONS/summary.json",
    "overlay": "nnunet-conres overlay -i IMAGES --predictions PREDICTIONS -djfile PREDICTIONS/dataset.json -o PICTURES",
    "residuals": "nnunet-conres residuals -i IMAGES -o RESIDUALS",
    "compare": "nnunet-conres compare -d 501 -tr nnUNetTrainer nnUNetTrainerConResNet -o REPORT",
    "uncertainty": "nnunet-conres uncertainty -i PREDICTED/fold_* --images IMAGES -o OUT",
    "workflow": "nnunet-conres workflow experiment.yaml --dry-run",
    "phantom": "nnunet-conres phantom -o CASES -n 10",
    "postprocess": "nnunet-conres postprocess fit --help",
    "postprocess fit": "nnunet-conres postprocess fit -d 501 -tr nnUNetTrainerConResNet -o postprocessing.json",
    "postprocess apply": "nnunet-conres postprocess apply -i PREDICTIONS -o OUT --postprocessing postprocessing.json",
}
"""Example command at the beginning of each subcommand's help."""

_SUBCOMMANDS: tuple[Callable[["Subparsers"], None], ...] = (
    registration.add_info,
    brats.add_brats_convert,
    brats.add_brats_export,
    brats.add_predict_brats,
    brats.add_package,
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
    postprocessing.add_postprocess,
    uncertainty.add_uncertainty,
    workflow.add_workflow,
    brats.add_phantom,
)


class _Subparser(argparse.ArgumentParser):
    """Parser of a subcommand, whose help begins with an example."""

    def format_help(self) -> str:
        example = _EXAMPLES.get(self.prog.partition(" ")[2])
        return f"example: {example}\n\n{super().format_help()}" if example else super().format_help()


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command.

    In the parsed arguments, `handler` is the function to call, and `subparser` the parser of the subcommand.
    """
    parser = argparse.ArgumentParser(
        prog="nnunet-conres",
        description="Tools for the ConResNet, V-Net and 3D U-Net trainers for nnU-Net. To train and predict, use "
        "nnU-Net's commands, for example: nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerConResNet",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers: Subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Subparser
    )
    for add in _SUBCOMMANDS:
        add(subparsers)
    for subparser in subparsers.choices.values():
        subparser.set_defaults(subparser=subparser)
        _accept_both_spellings(subparser)
    return parser


def _accept_both_spellings(parser: argparse.ArgumentParser) -> None:
    """Accept --two_words, nnU-Net's spelling of options, for --two-words, and the other way round."""
    known = parser._option_string_actions
    for name, action in [*known.items()]:
        for other in (name.replace("_", "-"), "--" + name[2:].replace("-", "_")):
            if name.startswith("--"):
                known.setdefault(other, action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code of the subcommand; 2 for an error that the user can correct, which is shown on stderr without a
        traceback; 130 after Ctrl-C; 141 if the reader of the output ended. Errors in this package keep their traceback.
    """
    before = sys.stdout
    output = _Output(before)
    sys.stdout = output
    code = _READER_GONE
    try:
        code = _run(argv)
    except OSError as error:
        if error is not output.error:
            raise
    except KeyboardInterrupt:
        print("nnunet-conres: interrupted", file=sys.stderr)
        code = _INTERRUPTED
    finally:
        sys.stdout = before
        written = output.end()
    return code if written else 2


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    arguments, others = parser.parse_known_args(argv)
    if others and not hasattr(arguments, "options"):
        arguments.subparser.error(f"unrecognized arguments: {' '.join(others)}")
    arguments.options = others
    try:
        return arguments.handler(arguments)
    except InputError as error:
        return _show(error)


def _show(error: InputError) -> int:
    print(f"nnunet-conres: error: {error}", file=sys.stderr)
    return 2


class _Output:
    """Standard output that records its errors (a closed pipe or a full disk), to tell them from all other errors.

    Attributes:
        error: The last error, None if there was none.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._attempt(self._stream.write, text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, do: Callable[..., Any], *arguments: str) -> Any:
        try:
            return do(*arguments)
        except OSError as error:
            self.error = error
            raise

    def end(self) -> bool:
        """Flush the output. Return whether all of it was written; output into a closed pipe counts as written."""
        with contextlib.suppress(OSError):
            self.flush()
        if self.error is None:
            return True
        # Otherwise Python would flush again at exit and show a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        try:
            with file_errors("standard output"):
                raise self.error
        except BrokenPipeError:
            return True
        except InputError as error:
            _show(error)
            return False
