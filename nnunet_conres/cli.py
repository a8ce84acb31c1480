"""The command `nnunet-conres`: parses its arguments and calls what does the work.

A subcommand is a function `_add_NAME` that describes its arguments and a function `_NAME` that is called with them and
returns the exit code; `_SUBCOMMANDS` lists them. What a subcommand needs is imported in its `_NAME`, so that `--help`
and `info` answer at once.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nnunet_conres import __version__

if TYPE_CHECKING:
    from nnunet_conres.planning.commands import PlanOptions

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# nnU-Net's, for the number of processes where a command does not say.
_PROCESSES_VARIABLE = "nnUNet_def_n_proc"

_ARCHITECTURES = ("conresnet", "vnet", "unet3d")


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

    done = convert_brats(
        arguments.i,
        arguments.d,
        held_out_folders=arguments.held_out,
        dataset_name=arguments.name,
        schemes=arguments.scheme,
        image_mode=arguments.images,
        processes=_processes(arguments.np),
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


def _processes(given: int | None) -> int:
    """Number of processes, nnU-Net's own default where the command does not say."""
    import os

    return int(os.environ.get(_PROCESSES_VARIABLE, "8")) if given is None else given


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


def _add_sparsify(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "sparsify",
        help="make a data set in which only some slices are annotated",
        description="Makes, from a data set in $nnUNet_raw that is labelled throughout, a new one in which only some "
        "slices keep their labels; all other voxels get nnU-Net's ignore label. Images are linked, not copied. All "
        "files are checked before anything is written.",
    )
    parser.add_argument("-d", metavar="SOURCE", required=True, help="data set name or id to start from")
    parser.add_argument("-o", metavar="ID", type=int, required=True, help="id of the new data set, for example 601")
    parser.add_argument(
        "-name", metavar="NAME", help="its name after the id (default: the source's with Sparse behind)"
    )
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--every", metavar="N", type=int, help="annotate one slab in each N slices")
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
        help="neighbouring slices annotated together (default: %(default)s; ConResNet's residual needs 2)",
    )
    parser.add_argument(
        "--axis",
        type=lambda text: int(text) if text.isdigit() else text,
        default="slice",
        metavar="AXIS",
        help="axis of the slices, 0, 1 or 2, in arrays as nnU-Net reads them (z, y, x for most formats); or slice, the "
        "one of the largest median spacing, which nnU-Net brings to the front (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", metavar="S", type=int, default=0, help="another seed annotates other slices (default: %(default)s)"
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
        processes=_processes(arguments.np),
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


def _add_densify(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "densify",
        help="complete sparsely annotated training cases with a model's predictions",
        description="Writes dense labels for the training cases of a sparsely annotated data set: annotated voxels as "
        "they are, all others as predicted by a model that was trained on that data set. Geometry and format are "
        "those of the annotation. For new cases use nnUNetv2_predict.",
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
        type=_fold,
        default=[0, 1, 2, 3, 4],
        help="folds whose predictions are averaged (default: 0 1 2 3 4)",
    )
    parser.add_argument(
        "--cross-validation",
        action="store_true",
        help="predict each case with the fold that had it in its validation set only; for measuring, where the "
        "average over all folds is better for use",
    )
    parser.add_argument(
        "-chk", metavar="FILE", default="checkpoint_final.pth", help="checkpoint's name (default: %(default)s)"
    )
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default: %(default)s")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, less accurate")
    parser.add_argument(
        "-step_size", metavar="S", type=float, default=0.5, help="sliding window's step in patches (default: 0.5)"
    )
    parser.add_argument(
        "-prev_stage_predictions", metavar="FOLDER", help="for a cascade, predictions of the stage before"
    )
    whether = parser.add_mutually_exclusive_group()
    whether.add_argument("--overwrite", action="store_true", help="write to an output folder that is not empty")
    whether.add_argument(
        "--continue", dest="go_on", action="store_true", help="go on where the same command was interrupted"
    )
    parser.add_argument(
        "--figures", metavar="N", type=_count, default=0, help="draw the first N cases, to figures in the output folder"
    )
    parser.add_argument("-ref", "--ref", metavar="FOLDER", help="dense labels to draw beside, if there are any")
    parser.add_argument(
        "-npp", metavar="N", type=int, default=3, help="processes for preprocessing, 0 for none (default: %(default)s)"
    )
    parser.add_argument(
        "-nps", metavar="N", type=int, default=3, help="processes for writing, 0 for none (default: %(default)s)"
    )
    parser.set_defaults(handler=_densify)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of cases; expected 0 or more")
    return int(text)


def _fold(text: str) -> int | str:
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no fold; expected a number or all")
    return text if text == "all" else int(text)


def _densify(arguments: argparse.Namespace) -> int:
    from nnunet_conres.datasets.densify import Model, densify

    done = densify(
        arguments.d,
        Model(arguments.tr, arguments.p, arguments.c, tuple(arguments.f), arguments.chk),
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

        from nnunet_conres.evaluation.figures import SparseCase, write_sparse_annotation_figures

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


def _add_plan(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "plan",
        help="plan ConResNet, V-Net or 3D U-Net for the memory there is",
        description="Plans data sets for a network of this package, as nnUNetv2_plan_experiment does for nnU-Net's "
        "own: patch, batch and checkpointing are chosen by the memory that the network takes. Fingerprints have to be "
        "there.",
    )
    _add_planning_options(parser)
    parser.set_defaults(handler=_plan)


def _add_planning_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", metavar="ID", type=int, nargs="+", required=True, help="data set ids, for example 501")
    parser.add_argument(
        "-a", metavar="NETWORK", choices=_ARCHITECTURES, required=True, help=f"one of {', '.join(_ARCHITECTURES)}"
    )
    parser.add_argument(
        "-gpu_memory_target",
        metavar="GB",
        type=float,
        default=8.0,
        help="memory that a training step may take, in GiB, units of 2^30 bytes (default: 8)",
    )
    parser.add_argument(
        "-overwrite_target_spacing",
        metavar=("A", "B", "C"),
        type=float,
        nargs=3,
        help="voxel size of 3d_fullres and 3d_cascade_fullres in mm, in the order in which nnU-Net reads the axes: z, "
        "y, x for most formats (default: found by nnU-Net)",
    )
    parser.add_argument(
        "-overwrite_plans_name",
        metavar="NAME",
        help="name of the plans (default: nnUNetConResNetPlans, nnUNetVNetPlans or nnUNetUNet3DPlans)",
    )
    parser.add_argument(
        "-preprocessor_name",
        metavar="CLASS",
        default="DefaultPreprocessor",
        help="preprocessor in nnunetv2.preprocessing (default: %(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="show what nnU-Net prints while it plans")


def _plan_options(arguments: argparse.Namespace) -> "PlanOptions":
    from nnunet_conres.planning.commands import PlanOptions

    return PlanOptions(
        arguments.a,
        gpu_memory_target=arguments.gpu_memory_target,
        overwrite_target_spacing=arguments.overwrite_target_spacing,
        plans_name=arguments.overwrite_plans_name,
        preprocessor_name=arguments.preprocessor_name,
        verbose=arguments.verbose,
    )


def _plan(arguments: argparse.Namespace) -> int:
    from nnunet_conres.planning.commands import plan

    for planned in plan(arguments.d, _plan_options(arguments)):
        print(planned.as_text())
    return 0


def _add_plan_and_preprocess(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "plan_and_preprocess",
        help="take fingerprints, plan, and preprocess what is missing",
        description="Takes fingerprints where there are none, plans as plan does, and preprocesses. Preprocessed data "
        "are shared with nnU-Net's own plans where they would be the same, and complete cases are never removed or "
        "made again.",
    )
    _add_planning_options(parser)
    parser.add_argument(
        "-c",
        metavar="CONFIGURATION",
        nargs="+",
        default=["3d_fullres", "3d_lowres"],
        help="configurations to preprocess; those that a data set does not have are skipped (default: 3d_fullres "
        "3d_lowres)",
    )
    parser.add_argument(
        "-np",
        metavar="N",
        type=int,
        nargs="+",
        help="processes for preprocessing: one number, or one per configuration (default: $nnUNet_def_n_proc, else "
        "nnU-Net's 8 for 2d and 3d_lowres, 4 for others)",
    )
    parser.add_argument(
        "-npfp", metavar="N", type=int, help="processes for fingerprints (default: $nnUNet_def_n_proc, else 8)"
    )
    parser.add_argument(
        "-fpe",
        metavar="CLASS",
        default="DatasetFingerprintExtractor",
        help="fingerprint extractor in nnunetv2.experiment_planning (default: %(default)s)",
    )
    parser.add_argument(
        "--verify_dataset_integrity", action="store_true", help="let nnU-Net check the raw data; recommended once"
    )
    parser.add_argument("--no_pp", action="store_true", help="do not preprocess")
    parser.add_argument(
        "--clean", action="store_true", help="take fingerprints again, as after a change of the data set"
    )
    parser.add_argument("--no_pbar", action="store_true", help="show no progress bars")
    parser.set_defaults(handler=_plan_and_preprocess)


def _plan_and_preprocess(arguments: argparse.Namespace) -> int:
    import os

    from nnunet_conres.planning.commands import plan_and_preprocess

    processes = arguments.np
    if processes is None and _PROCESSES_VARIABLE in os.environ:
        processes = [_processes(None)]
    for planned in plan_and_preprocess(
        arguments.d,
        _plan_options(arguments),
        configurations=arguments.c,
        processes=processes,
        fingerprint_extractor=arguments.fpe,
        fingerprint_processes=_processes(arguments.npfp),
        verify_dataset_integrity=arguments.verify_dataset_integrity,
        clean=arguments.clean,
        preprocess=not arguments.no_pp,
        progress=not arguments.no_pbar,
    ):
        print(planned.as_text())
    return 0


def _add_memory(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "memory",
        help="tell how much memory a training takes, and which patches fit",
        description="Estimates the peak memory of a training step from the plans, part by part, without running it, "
        "and the largest patches that fit given budgets.",
    )
    parser.add_argument("-d", metavar="DATASET", required=True, help="data set name or id")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument("-c", metavar="CONFIGURATION", default="3d_fullres", help="default: %(default)s")
    parser.add_argument(
        "-tr", metavar="TRAINER", help="trainer of this package; may be left out where the plans name the network"
    )
    parser.add_argument("--batch_size", metavar="B", type=int, help="another batch than the plans'")
    parser.add_argument(
        "--patch_size", metavar=("X", "Y", "Z"), type=int, nargs=3, help="another patch than the plans', in voxels"
    )
    parser.add_argument(
        "--budget",
        metavar="GB",
        type=float,
        nargs="*",
        default=[8, 12, 16, 24, 40, 80],
        help="find the largest patches for these budgets, in GiB (default: 8 12 16 24 40 80)",
    )
    parser.add_argument("-device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--float32", action="store_true", help="without mixed precision")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(handler=_memory)


def _memory(arguments: argparse.Namespace) -> int:
    from nnunet_conres.planning.memory_report import report_memory

    trainer = None
    if arguments.tr is not None:
        from nnunet_conres import trainers

        if arguments.tr not in trainers.__all__:
            raise ValueError(f"{arguments.tr} is no trainer of this package; it has {', '.join(trainers.__all__)}.")
        trainer = getattr(trainers, arguments.tr)
    # nnU-Net has things to say of old plans, which must not get among the JSON
    with contextlib.redirect_stdout(sys.stderr):
        report = report_memory(
            arguments.d,
            arguments.p,
            arguments.c,
            resolve=None if trainer is None else trainer.resolve,
            trainer_name=arguments.tr,
            optimizer="sgd" if trainer is None else trainer.optimizer_kind,
            patch_size=arguments.patch_size,
            batch_size=arguments.batch_size,
            device=arguments.device,
            mixed_precision=not arguments.float32,
            budgets=arguments.budget,
        )
    if arguments.json:
        import json

        print(json.dumps(report.as_json(), indent=2))
    else:
        print(report.as_text())
    return 0


_SUBCOMMANDS: tuple[Callable[["Subparsers"], None], ...] = (
    _add_info,
    _add_brats_convert,
    _add_plan,
    _add_plan_and_preprocess,
    _add_memory,
    _add_sparsify,
    _add_densify,
    _add_summary,
    _add_overlay,
    _add_phantom,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; `handler` of what it returns is the function to call."""
    parser = argparse.ArgumentParser(
        prog="nnunet-conres",
        description="Tools around the ConResNet, V-Net and 3D U-Net trainers for nnU-Net. Training and prediction are "
        "nnU-Net's own commands, for example: nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerConResNet",
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
