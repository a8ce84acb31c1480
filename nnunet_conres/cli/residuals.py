"""Arguments of the command that shows what changes from slice to slice."""

import argparse
import sys
from typing import TYPE_CHECKING

from nnunet_conres.cli.arguments import fold
from nnunet_conres.errors import InputError

if TYPE_CHECKING:
    from nnunet_conres.cli import Subparsers


def add_residuals(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "residuals",
        help="what changes from slice to slice, in images, labels, predictions, and as a model predicts it",
        description="Writes inter-slice residuals as NIfTI in the geometry of their source, and pictures of them. "
        "With --model, those that a trained network predicts, and ConResNet's attention.",
    )
    parser.add_argument(
        "-i",
        metavar="CASE_OR_FOLDER",
        required=True,
        help="image or label file, or a folder of such; with --model images named as for nnU-Net, CASE_0000",
    )
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder")
    files = parser.add_argument_group("of files")
    files.add_argument(
        "--axis",
        type=lambda text: int(text) if text.isdigit() else text,
        metavar="AXIS",
        help="axis of the slices, 0, 1 or 2, in arrays as nnU-Net reads them (z, y, x); or slice, the one of the "
        "largest spacing (default: slice)",
    )
    files.add_argument(
        "--kind", choices=("image", "labels"), help="what the files are (default: as their folder or values tell)"
    )
    files.add_argument(
        "--intensities",
        choices=("zscore", "raw"),
        help="of images: normalised, as networks see them, or as they are (default: zscore)",
    )
    files.add_argument(
        "-djfile", metavar="FILE", help="dataset.json for labels and regions (default: the one beside or above a file)"
    )
    model = parser.add_argument_group("of a trained network")
    model.add_argument(
        "--model",
        metavar="FOLDER",
        help="trained model, nnU-Net's TRAINER__PLANS__CONFIGURATION; its checkpoints are refused where they hold more "
        "than weights and plain values, so that nothing in them is run",
    )
    model.add_argument("-f", metavar="FOLD", nargs="+", type=fold, default=[0], help="folds to average (default: 0)")
    model.add_argument(
        "-chk", metavar="FILE", default="checkpoint_final.pth", help="checkpoint's name (default: %(default)s)"
    )
    model.add_argument(
        "--level", metavar="L", type=int, default=0, help="decoder level, 0 for full resolution (default: %(default)s)"
    )
    model.add_argument("-ref", metavar="FILE_OR_FOLDER", help="reference labels, for the true residual")
    model.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default: %(default)s")
    model.add_argument(
        "-step_size", metavar="S", type=float, default=0.5, help="sliding window's step in patches (default: 0.5)"
    )
    parser.set_defaults(handler=_residuals)


def _residuals(arguments: argparse.Namespace) -> int:
    if arguments.model is not None:
        return _of_model(arguments)
    if arguments.ref is not None:
        raise InputError("-ref is for --model; the residual of reference labels alone: give them with -i.")
    from nnunet_conres.evaluation.residual_maps import write_residual_maps

    done = write_residual_maps(
        arguments.i,
        arguments.o,
        axis="slice" if arguments.axis is None else arguments.axis,
        kind=arguments.kind,
        intensities=arguments.intensities or "zscore",
        dataset_json=arguments.djfile,
    )
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"axis {done.axis}, {done.axis_reason}")
    for file in done.files:
        for path in (*file.maps.values(), file.figure):
            print(path)
    return 0


def _of_model(arguments: argparse.Namespace) -> int:
    given = {name: getattr(arguments, name) for name in ("axis", "kind", "intensities", "djfile")}
    unused = [f"{'-' if name == 'djfile' else '--'}{name}" for name, value in given.items() if value is not None]
    if unused:
        raise InputError(f"With --model the model tells what {', '.join(unused)} would; leave it out.")
    from nnunet_conres.evaluation.residual_predictions import ResidualPredictor, write_predicted_residuals

    predictor = ResidualPredictor(
        arguments.model,
        arguments.f,
        checkpoint=arguments.chk,
        level=arguments.level,
        device=arguments.device,
        step_size=arguments.step_size,
    )
    done = write_predicted_residuals(arguments.i, arguments.o, predictor, reference=arguments.ref)
    print(f"axis {predictor.slice_axis}, the model's own")
    for case in done:
        for maps in (case.predicted, case.of_prediction, case.of_reference):
            for path in maps.values():
                print(path)
        for written in (case.segmentation, case.attention, case.figure):
            if written is not None:
                print(written)
    return 0
