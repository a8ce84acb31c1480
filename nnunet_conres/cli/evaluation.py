"""Arguments of the commands that show results."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunet_conres.cli import Subparsers


def add_summary(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "summary",
        help="print the scores in nnU-Net's summary.json by region",
        description="Prints the scores of nnUNetv2_evaluate_folder or of a validation with the names of labels and "
        "regions. A dash means that neither reference nor prediction contains the region.",
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


def add_overlay(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "overlay",
        help="draw predictions and references on the images",
        description="Writes one picture per case: the most informative slices with the outlines of prediction and "
        "reference.",
    )
    parser.add_argument("-i", metavar="FOLDER", required=True, help="images, named as for nnU-Net")
    parser.add_argument("--predictions", metavar="FOLDER", required=True, help="predictions")
    parser.add_argument("-ref", metavar="FOLDER", help="reference segmentations (default: none)")
    parser.add_argument("-djfile", metavar="FILE", required=True, help="dataset.json of the data set")
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder for the pictures")
    parser.set_defaults(handler=_overlay)


def _overlay(arguments: argparse.Namespace) -> int:
    from nnunet_conres.evaluation.figures import read_legend
    from nnunet_conres.evaluation.overlays import write_overlays

    written = write_overlays(
        arguments.i,
        arguments.predictions,
        arguments.o,
        legend=read_legend(arguments.djfile),
        reference_folder=arguments.ref,
    )
    for path in written:
        print(path)
    return 0
