"""Arguments of the commands that make or complete data sets."""

import argparse
import sys
from typing import TYPE_CHECKING

from nnunet_conres.cli.arguments import count, fold, number_of_processes

if TYPE_CHECKING:
    from nnunet_conres.cli import Subparsers


def add_sparsify(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "sparsify",
        help="make a data set with few annotated slices",
        description="Makes a copy of a densely labelled data set in $nnUNet_raw in which only some slices keep their "
        "labels; all other voxels get nnU-Net's ignore label. Images are hard links. The command checks all files "
        "before it writes the data set.",
    )
    parser.add_argument("-d", metavar="SOURCE", required=True, help="name or id of the dense data set")
    parser.add_argument("-o", metavar="ID", type=int, required=True, help="id of the new data set, for example 601")
    parser.add_argument(
        "-name", metavar="NAME", help="data set name after the id (default: the source's name with Sparse appended)"
    )
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--every", metavar="N", type=int, help="annotate one slab in every N slices")
    rule.add_argument(
        "--slices", metavar="K", type=int, help="annotate exactly K slices per case, in slabs spread over the case"
    )
    rule.add_argument(
        "--fraction", metavar="F", type=float, help="annotate about this share of the slices, above 0 and below 1"
    )
    parser.add_argument(
        "--slab",
        metavar="T",
        type=int,
        default=2,
        help="number of neighbouring slices in a slab (default: %(default)s; ConResNet's residual needs 2)",
    )
    parser.add_argument(
        "--axis",
        type=lambda text: int(text) if text.isdigit() else text,
        default="slice",
        metavar="AXIS",
        help="axis of the slices: 0, 1 or 2 in arrays as nnU-Net reads them (z, y, x for most formats), or slice for "
        "the one with the largest median spacing (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", metavar="S", type=int, default=0, help="seed of the slices' positions (default: %(default)s)"
    )
    parser.add_argument("-np", metavar="N", type=int, help="number of processes (default: $nnUNet_def_n_proc, else 8)")
    parser.set_defaults(handler=_sparsify)


def _sparsify(arguments: argparse.Namespace) -> int:
    from nnunet_conres.datasets.sparse import SlabRule, sparsify

    done = sparsify(
        arguments.d,
        arguments.o,
        SlabRule(
            every=arguments.every,
            slices=arguments.slices,
            fraction=arguments.fraction,
            slab=arguments.slab,
            seed=arguments.seed,
        ),
        target_name=arguments.name,
        axis=arguments.axis,
        processes=number_of_processes(arguments.np),
    )
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    annotated, slices = sum(map(len, done.annotated.values())), sum(done.depths.values())
    print(f"{done.dataset_folder}")
    print(f"  training cases:   {len(done.annotated)}")
    print(f"  axis:             {done.axis}, {done.axis_reason}")
    print(f"  annotated slices: {annotated} of {slices} ({annotated / slices:.1%}), see sparse_annotation.json")
    print(f"  ignore label:     {done.ignore_label}")
    print("  files:            " + ", ".join(f"{count} {how}" for how, count in done.transfers.items()))
    print(f"Next: nnUNetv2_plan_and_preprocess -d {arguments.o} -c 3d_fullres --verify_dataset_integrity")
    return 0


def add_densify(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "densify",
        help="predict the missing labels of sparsely annotated training cases",
        description="Writes dense labels for the training cases of a sparsely annotated data set: annotated voxels "
        "keep their labels, a model trained on this data set predicts all others. Geometry and format are those of the "
        "annotation. For new cases use nnUNetv2_predict.",
    )
    parser.add_argument("-d", metavar="DATASET", required=True, help="data set name or id, with an ignore label")
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder")
    parser.add_argument("-tr", metavar="TRAINER", default="nnUNetTrainer", help="trainer (default: %(default)s)")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument("-c", metavar="CONFIGURATION", required=True, help="configuration, for example 3d_fullres")
    parser.add_argument(
        "-f",
        metavar="FOLD",
        nargs="+",
        type=fold,
        default=[0, 1, 2, 3, 4],
        help="folds whose predictions are averaged (default: 0 1 2 3 4)",
    )
    parser.add_argument(
        "--cross_validation",
        action="store_true",
        help="predict each case only with the fold that held it out, to measure quality; to use the labels, the "
        "average over all folds is better",
    )
    parser.add_argument(
        "-chk", metavar="FILE", default="checkpoint_final.pth", help="name of the checkpoint (default: %(default)s)"
    )
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="device (default: %(default)s)")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, less accurate")
    parser.add_argument(
        "-step_size",
        metavar="S",
        type=float,
        default=0.5,
        help="sliding-window step in patches (default: %(default)s)",
    )
    parser.add_argument(
        "-prev_stage_predictions", metavar="FOLDER", help="for a cascade: predictions of the previous stage"
    )
    whether = parser.add_mutually_exclusive_group()
    whether.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    whether.add_argument("--continue", dest="go_on", action="store_true", help="resume an interrupted run")
    parser.add_argument(
        "--figures", metavar="N", type=count, default=0, help="draw the first N cases, to FOLDER/figures"
    )
    parser.add_argument("-ref", "--ref", metavar="FOLDER", help="dense labels to show in the figures (default: none)")
    parser.add_argument(
        "-npp", metavar="N", type=int, default=3, help="processes for preprocessing, 0 for none (default: %(default)s)"
    )
    parser.add_argument(
        "-nps", metavar="N", type=int, default=3, help="processes for writing, 0 for none (default: %(default)s)"
    )
    parser.set_defaults(handler=_densify)


def _densify(arguments: argparse.Namespace) -> int:
    from nnunet_conres.datasets.densify import TrainedModel, densify

    done = densify(
        arguments.d,
        TrainedModel(arguments.tr, arguments.p, arguments.c, tuple(arguments.f), arguments.chk),
        arguments.o,
        device=arguments.device,
        mirroring=not arguments.disable_tta,
        step_size=arguments.step_size,
        cross_validation=arguments.cross_validation,
        previous_stage_folder=arguments.prev_stage_predictions,
        reference_folder=arguments.ref,
        existing="overwrite" if arguments.overwrite else "continue" if arguments.go_on else "refuse",
        preprocessing_processes=arguments.npp,
        export_processes=arguments.nps,
    )
    print(f"{done.output_folder}")
    print(f"  cases: {len(done.cases)}, {len(done.written)} of them written now")
    if arguments.figures > 0:
        from pathlib import Path

        from nnunet_conres.evaluation.sparse_figures import SparseCase, write_sparse_annotation_figures

        drawn = [
            SparseCase(
                case.case_id,
                case.images,
                case.labels,
                done.files[case.case_id],
                Path(arguments.ref, done.files[case.case_id].name) if arguments.ref else None,
            )
            for case in done.cases[: arguments.figures]
        ]
        for path in write_sparse_annotation_figures(
            drawn, done.output_folder / "figures", dataset_json=done.dataset_folder / "dataset.json"
        ):
            print(f"  {path}")
    return 0
