"""Arguments of the commands for plans and memory."""

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from nnunet_conres.cli.arguments import PROCESSES_VARIABLE, number_of_processes
from nnunet_conres.families import PLANNED

if TYPE_CHECKING:
    from nnunet_conres.cli import Subparsers
    from nnunet_conres.planning.commands import PlanOptions

_TITLES = [family.title for family in PLANNED.values()]


def add_plan(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "plan",
        help=f"plan {', '.join(_TITLES[:-1])} or {_TITLES[-1]} for the memory of your GPU",
        description="Plans data sets for a network of this package, as nnUNetv2_plan_experiment does for nnU-Net's. "
        "Chooses patch size, batch size and checkpointing by the GPU memory that the network needs. The data sets need "
        "fingerprints (nnUNetv2_extract_fingerprint).",
    )
    _add_planning_options(parser)
    parser.set_defaults(handler=_plan)


def _add_planning_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", metavar="ID", type=int, nargs="+", required=True, help="data set ids, for example 501")
    parser.add_argument(
        "-a", metavar="NETWORK", choices=list(PLANNED), required=True, help=f"one of {', '.join(PLANNED)}"
    )
    parser.add_argument(
        "-gpu_memory_target",
        metavar="GB",
        type=float,
        default=8.0,
        help="memory of a training step in GiB (2^30 bytes) (default: 8)",
    )
    parser.add_argument(
        "-overwrite_target_spacing",
        metavar=("A", "B", "C"),
        type=float,
        nargs=3,
        help="voxel size of 3d_fullres and 3d_cascade_fullres in mm, in nnU-Net's order of axes: z, y, x for most "
        "formats (default: nnU-Net's choice)",
    )
    parser.add_argument(
        "-overwrite_plans_name",
        metavar="NAME",
        help="name of the plans (default: depends on the network, for example nnUNetConResNetPlans)",
    )
    parser.add_argument(
        "-preprocessor_name",
        metavar="CLASS",
        default="DefaultPreprocessor",
        help="preprocessor in nnunetv2.preprocessing (default: %(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="show nnU-Net's output")
    parser.add_argument("--no_pbar", action="store_true", help="show no progress bars")


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

    for planned in plan(arguments.d, _plan_options(arguments), progress=not arguments.no_pbar):
        print(planned.as_text())
    return 0


def add_plan_and_preprocess(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "plan_and_preprocess",
        help="compute fingerprints, plan, and preprocess what is missing",
        description="Computes missing or outdated fingerprints, plans as the command plan does, and preprocesses. If "
        "nnU-Net's plans need the same preprocessed data, both share them. Complete cases are preprocessed again only "
        "if their raw files changed.",
    )
    _add_planning_options(parser)
    parser.add_argument(
        "-c",
        metavar="CONFIGURATION",
        nargs="+",
        default=["3d_fullres", "3d_lowres"],
        help="configurations to preprocess; those that the plans do not have are skipped (default: 3d_fullres "
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
        "--verify_dataset_integrity",
        action="store_true",
        help="let nnU-Net check the raw data; do it once",
    )
    parser.add_argument("--no_pp", action="store_true", help="do not preprocess")
    parser.add_argument(
        "--clean",
        action="store_true",
        help="recompute fingerprints, and remove preprocessed cases whose raw data are gone",
    )
    parser.set_defaults(handler=_plan_and_preprocess)


def _plan_and_preprocess(arguments: argparse.Namespace) -> int:
    import os

    from nnunet_conres.planning.commands import plan_and_preprocess

    processes = arguments.np
    if processes is None and PROCESSES_VARIABLE in os.environ:
        processes = [number_of_processes(None)]
    for planned in plan_and_preprocess(
        arguments.d,
        _plan_options(arguments),
        configurations=arguments.c,
        processes=processes,
        fingerprint_extractor=arguments.fpe,
        fingerprint_processes=number_of_processes(arguments.npfp),
        verify_dataset_integrity=arguments.verify_dataset_integrity,
        clean=arguments.clean,
        preprocess=not arguments.no_pp,
        progress=not arguments.no_pbar,
    ):
        print(planned.as_text())
    return 0


def add_memory(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "memory",
        help="estimate the memory of a training and the patches that fit",
        description="Estimates the peak memory of a training step, part by part, by executing it on tensors without "
        "data, and finds the largest patches for given budgets. Works for any trainer and plans that nnU-Net finds.",
    )
    parser.add_argument("-d", metavar="DATASET", required=True, help="data set name or id")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument(
        "-c", metavar="CONFIGURATION", default="3d_fullres", help="configuration (default: %(default)s)"
    )
    parser.add_argument(
        "-tr", metavar="TRAINER", default="nnUNetTrainer", help="trainer, as for nnUNetv2_train (default: %(default)s)"
    )
    parser.add_argument("--batch_size", metavar="B", type=int, help="batch size (default: as in the plans)")
    parser.add_argument(
        "--patch_size",
        metavar="N",
        type=int,
        nargs="+",
        help="patch size in voxels, in the plans' order of axes (default: as in the plans)",
    )
    parser.add_argument(
        "--budget",
        metavar="GB",
        type=float,
        nargs="*",
        default=[8, 12, 16, 24, 40, 80],
        help="find the largest patch for each budget in GiB (default: 8 12 16 24 40 80)",
    )
    parser.add_argument("-device", choices=("cuda", "cpu"), default="cuda", help="device (default: %(default)s)")
    parser.add_argument("--float32", action="store_true", help="no mixed precision")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(handler=_memory)


def _memory(arguments: argparse.Namespace) -> int:
    from nnunet_conres.planning.memory_report import report_memory

    # nnU-Net prints messages about old plans, which must not mix with the JSON output.
    with contextlib.redirect_stdout(sys.stderr):
        report = report_memory(
            arguments.d,
            arguments.p,
            arguments.c,
            arguments.tr,
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


def add_variants(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "variants",
        help="add configurations with other patch sizes to plans",
        description="Adds configurations with other patch sizes to plans, for nnU-Net's commands. They share the "
        "preprocessed data of the configuration that they inherit from. The network topology is derived for each "
        "patch size.",
    )
    parser.add_argument("-d", metavar="DATASET", required=True, help="data set name or id")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument(
        "-c", metavar="CONFIGURATION", default="3d_fullres", help="configuration to inherit from (default: %(default)s)"
    )
    parser.add_argument(
        "--patch_size",
        metavar="N",
        type=int,
        nargs="+",
        action="append",
        required=True,
        help="patch size in voxels, in the plans' order of axes; repeat the option for several patch sizes",
    )
    parser.add_argument(
        "--batch_size",
        metavar="B",
        type=int,
        nargs="+",
        help="batch size: one for all patch sizes, or one for each (default: as in the configuration of -c)",
    )
    parser.set_defaults(handler=_variants)


def _variants(arguments: argparse.Namespace) -> int:
    from nnunet_conres.nnunet import dataset_name_of
    from nnunet_conres.planning.variants import add_variants

    added = add_variants(
        dataset_name_of(arguments.d),
        arguments.p,
        arguments.patch_size,
        base=arguments.c,
        batch_sizes=arguments.batch_size,
    )
    print(added.as_text())
    return 0
