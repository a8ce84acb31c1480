"""Arguments of the commands around BraTS."""

import argparse
import sys
from typing import TYPE_CHECKING

from nnunet_conres.cli.arguments import number_of_processes

if TYPE_CHECKING:
    from nnunet_conres.cli import Subparsers


def add_brats_convert(subparsers: "Subparsers") -> None:
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

    done = convert_brats(
        arguments.i,
        arguments.d,
        held_out_folders=arguments.held_out,
        dataset_name=arguments.name,
        schemes=arguments.scheme,
        image_mode=arguments.images,
        processes=number_of_processes(arguments.np),
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


def add_phantom(subparsers: "Subparsers") -> None:
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
