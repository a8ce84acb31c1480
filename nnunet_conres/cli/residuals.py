"""Arguments of `nnunet-conres residuals`."""

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
        help="write inter-slice residuals of images, labels and predictions, or those that a model predicts",
        description="Writes inter-slice residuals as NIfTI in the geometry of their source, with pictures. With "
        "--model, writes the residuals that a trained network predicts, and ConResNet's attention.",
    )
    parser.add_argument(
        "-i",
        metavar="CASE_OR_FOLDER",
        required=True,
        help="image or label file, or a folder of them; with --model, images named as for nnU-Net (CASE_0000)",
    )
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder")
    files = parser.add_argument_group("residuals of files")
    files.add_argument(
        "--axis",
        type=lambda text: int(text) if text.isdigit() else text,
        metavar="AXIS",
        help="axis of the slices: 0, 1 or 2 in arrays as nnU-Net reads them (z, y, x), or slice for the one with "
        "the largest spacing (default: slice)",
    )
    files.add_argument(
        "--kind", choices=("image", "labels"), help="type of the files (default: from folder names or values)"
    )
    files.add_argument(
        "--intensities",
        choices=("zscore", "raw"),
        help="images: normalised as for the network, or unchanged (default: zscore)",
    )
    files.add_argument(
        "-djfile", metavar="FILE", help="dataset.json with labels and regions (default: the one beside or above a file)"
    )
    model = parser.add_argument_group("residuals that a trained network predicts")
    model.add_argument(
        "--model",
        metavar="FOLDER",
        help="trained model: nnU-Net's folder TRAINER__PLANS__CONFIGURATION. Checkpoints with more than weights and "
        "plain values are refused, so that no code in them runs",
    )
    model.add_argument("-f", metavar="FOLD", nargs="+", type=fold, default=[0], help="folds to average (default: 0)")
    model.add_argument(
        "-chk", metavar="FILE", default="checkpoint_final.pth", help="name of the checkpoint (default: %(default)s)"
    )
    model.add_argument(
        "--level", metavar="L", type=int, default=0, help="decoder level, 0 for full resolution (default: %(default)s)"
    )
    model.add_argument("-ref", metavar="FILE_OR_FOLDER", help="reference labels, to write their residual too")
    model.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="device (default: %(default)s)")
    model.add_argument(
        "-step_size",
        metavar="S",
        type=float,
        default=0.5,
        help="sliding-window step in patches (default: %(default)s)",
    )
    parser.set_defaults(handler=_residuals)


def _residuals(arguments: argparse.Namespace) -> int:
    if arguments.model is not None:
        return _of_model(arguments)
    if arguments.ref is not None:
        raise InputError("-ref needs --model. For the residual of reference labels alone, pass them with -i.")
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
        raise InputError(f"{', '.join(unused)}: leave out with --model, which determines the values.")
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
    print(f"axis {predictor.slice_axis}, from the model")
    for case in done:
        for maps in (case.predicted, case.of_prediction, case.of_reference):
            for path in maps.values():
                print(path)
        for written in (case.segmentation, case.attention, case.figure):
            if written is not None:
                print(written)
    return 0
