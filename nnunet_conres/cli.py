"""The command `nnunet-conres`: parses its arguments and calls what does the work.

A subcommand is a function `_add_NAME` that describes its arguments and a function `_NAME` that is called with them and
returns the exit code; `_SUBCOMMANDS` lists them. What a subcommand needs is imported in its `_NAME`, so that `--help`
and `info` answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nnunet_conres import __version__

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# nnU-Net's, for the number of processes where a command does not say.
_PROCESSES_VARIABLE = "nnUNet_def_n_proc"


def _add_info(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "info",
        help="tell versions, whether nnU-Net finds the trainers, and which there are",
        description="Tells versions, whether nnU-Net finds the trainers, and which there are. "
        "The exit code is 0 if all is well and 1 if not.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(handler=_info)


def _info(arguments: argparse.Namespace) -> int:
    from nnunet_conres.registration.info import collect

    info = collect()
    if arguments.json:
        import json

        print(json.dumps(info.as_json(), indent=2))
    else:
        print(info.as_text())
    return 0 if info.ok else 1


def _add_phantom(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "phantom",
        help="write made-up brain tumour cases in BraTS's layout",
        description="Writes made-up, labelled brain tumour cases in the layout of BraTS 2018: a folder training and a "
        "folder held_out. For trying things out, not for science.",
    )
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder")
    parser.add_argument("-n", metavar="N", type=int, default=10, help="number of training cases (default: %(default)s)")
    parser.add_argument(
        "--held-out", metavar="N", type=int, default=3, help="number of held-out cases (default: %(default)s)"
    )
    parser.add_argument(
        "--shape", metavar=("X", "Y", "Z"), type=int, nargs=3, help="voxels along each axis (default: 64 64 48)"
    )
    parser.add_argument(
        "--spacing", metavar=("X", "Y", "Z"), type=float, nargs=3, help="voxel size in mm (default: 3 3 3)"
    )
    parser.add_argument(
        "--seed", metavar="S", type=int, default=0, help="the same seed gives the same cases (default: 0)"
    )
    parser.set_defaults(handler=_phantom)


def _phantom(arguments: argparse.Namespace) -> int:
    from nnunet_conres.datasets.phantom import DEFAULT_SHAPE, DEFAULT_SPACING, write_brats_phantoms

    written = write_brats_phantoms(
        arguments.o,
        training_cases=arguments.n,
        held_out_cases=arguments.held_out,
        shape=arguments.shape or DEFAULT_SHAPE,
        spacing=arguments.spacing or DEFAULT_SPACING,
        seed=arguments.seed,
    )
    print(f"{len(written.training_ids)} training cases in {written.training}")
    print(f"{len(written.held_out_ids)} held-out cases in {written.held_out}")
    return 0


def _add_brats_convert(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "brats-convert",
        help="convert BraTS folders to an nnU-Net data set",
        description="Converts BraTS folders to an nnU-Net data set in $nnUNet_raw, with channels FLAIR, T1, T1ce, T2 "
        "and regions whole_tumor, tumor_core, enhancing_tumor for every year. Labelled cases are for training, others "
        "go to imagesTs. All files are checked before anything is written.",
    )
    parser.add_argument(
        "-i", metavar="FOLDER", nargs="+", required=True, help="input folders, searched with subfolders"
    )
    parser.add_argument("-d", metavar="ID", type=int, required=True, help="nnU-Net's data set id, for example 501")
    parser.add_argument(
        "-name", metavar="NAME", default="BraTS", help="data set name after the id (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out",
        metavar="FOLDER",
        nargs="+",
        default=[],
        help="folders with cases never to train on: images to imagesTs, labels to labelsTs",
    )
    parser.add_argument(
        "--scheme",
        metavar="SCHEME",
        nargs="+",
        default=["auto"],
        help="naming and labels: 2018 (for 2017 to 2021), 2023, both to allow a mixture, or auto for either alone "
        "(default: auto)",
    )
    parser.add_argument(
        "--images",
        choices=("link", "copy"),
        default="link",
        help="hard links where possible, or copies of the images (default: %(default)s)",
    )
    parser.add_argument("-np", metavar="N", type=int, help="number of processes (default: $nnUNet_def_n_proc, else 8)")
    parser.set_defaults(handler=_brats_convert)


def _brats_convert(arguments: argparse.Namespace) -> int:
    from nnunet_conres.datasets.brats import convert_brats

    processes = arguments.np
    if processes is None:
        import os

        processes = int(os.environ.get(_PROCESSES_VARIABLE, "8"))
    done = convert_brats(
        arguments.i,
        arguments.d,
        held_out_folders=arguments.held_out,
        dataset_name=arguments.name,
        schemes=arguments.scheme,
        image_mode=arguments.images,
        processes=processes,
    )
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{done.dataset_folder}")
    print(f"  training cases: {len(done.training_ids)}")
    print(f"  test cases:     {len(done.test_ids)}, {len(done.test_label_ids)} of them with labels")
    print("  image files:    " + ", ".join(f"{count} {how}" for how, count in done.transfers.items()))
    print(f"  named as:       {', '.join(done.schemes)}")
    if done.training_ids:
        print(f"Next: nnUNetv2_plan_and_preprocess -d {arguments.d} -c 3d_fullres --verify_dataset_integrity")
    return 0


def _add_summary(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "summary",
        help="print the scores in nnU-Net's summary.json, per region",
        description="Prints the scores that nnUNetv2_evaluate_folder or a validation wrote, with the names of labels "
        "and regions. A dash means that neither reference nor prediction has such a voxel.",
    )
    parser.add_argument("summary", metavar="SUMMARY_JSON", help="nnU-Net's summary.json")
    parser.add_argument(
        "-djfile", metavar="FILE", help="dataset.json for the names (default: the one beside or above the summary)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(handler=_summary)


def _summary(arguments: argparse.Namespace) -> int:
    from nnunet_conres.evaluation.summary import format_table, read_summary

    summary = read_summary(arguments.summary, arguments.djfile)
    if arguments.json:
        import json

        print(json.dumps(summary.as_json(), indent=2))
    else:
        print(format_table(summary))
    return 0


def _add_overlay(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "overlay",
        help="draw predictions, and references, on the images",
        description="Writes a picture per predicted case: the slices that show most, with the outlines of prediction "
        "and reference.",
    )
    parser.add_argument("-i", metavar="FOLDER", required=True, help="images, named as for nnU-Net")
    parser.add_argument("-p", metavar="FOLDER", required=True, help="predictions")
    parser.add_argument("-ref", metavar="FOLDER", help="reference segmentations, if there are any")
    parser.add_argument("-djfile", metavar="FILE", required=True, help="dataset.json of the data set")
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder for the pictures")
    parser.set_defaults(handler=_overlay)


def _overlay(arguments: argparse.Namespace) -> int:
    from nnunet_conres.evaluation.figures import read_legend, write_overlays

    written = write_overlays(
        arguments.i,
        arguments.p,
        arguments.o,
        legend=read_legend(arguments.djfile),
        reference_folder=arguments.ref,
    )
    for path in written:
        print(path)
    return 0


_SUBCOMMANDS: tuple[Callable[["Subparsers"], None], ...] = (
    _add_info,
    _add_brats_convert,
    _add_summary,
    _add_overlay,
    _add_phantom,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; `handler` of what it returns is the function to call."""
    parser = argparse.ArgumentParser(
        prog="nnunet-conres",
        description="Tools around the ConResNet trainers for nnU-Net. Training and prediction are nnU-Net's own "
        "commands, for example: nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerConResNet",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _SUBCOMMANDS:
        add(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: what the subcommand returns, or 2 for an error that the user can do something about, which is
        then told in a line on stderr, without a traceback.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.handler(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"nnunet-conres: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
