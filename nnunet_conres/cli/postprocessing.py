"""Arguments of `nnunet-conres postprocess`."""

import argparse
from typing import TYPE_CHECKING

from nnunet_conres.cli.arguments import number_of_processes

if TYPE_CHECKING:
    from nnunet_conres.cli import Subparsers


def add_postprocess(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "postprocess",
        help="choose post-processing on validation predictions, and apply it",
        description="fit chooses for each region the smallest component to keep, whether to fill holes, the smallest "
        "total volume to keep, and the threshold of probabilities. It uses the held-out cases of a model's folds. "
        "apply post-processes a folder of predictions.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_fit(commands)
    _add_apply(commands)


def _add_fit(commands: "Subparsers") -> None:
    parser = commands.add_parser(
        "fit",
        help="choose the steps on the validation predictions of a model",
        description="The values for the cases of a fold are chosen on the other folds, so that the gain is measured on "
        "cases that did not influence the choice. A step is kept if the 95 % interval of its gain is above zero; "
        "otherwise it is off. Thresholds are tried if all folds have probabilities (nnUNetv2_train ... --val --npz).",
    )
    parser.add_argument("-d", metavar="DATASET", required=True, help="data set name or id")
    parser.add_argument("-tr", metavar="TRAINER", default="nnUNetTrainer", help="trainer (default: %(default)s)")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument(
        "-c", metavar="CONFIGURATION", default="3d_fullres", help="configuration (default: %(default)s)"
    )
    parser.add_argument(
        "-f", metavar="FOLD", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="folds (default: 0 1 2 3 4)"
    )
    parser.add_argument("-o", metavar="FILE", required=True, help="JSON file to write")
    parser.add_argument(
        "--rules",
        metavar="NAME",
        help="use the lesion-wise Dice of a challenge, such as 2024-GLI, instead of the Dice of each region",
    )
    parser.add_argument(
        "--group",
        metavar="REGEX",
        help="groups the cases of a patient, as for compare (default: the patient in BraTS's ids)",
    )
    parser.add_argument("-np", metavar="N", type=int, help="number of processes (default: $nnUNet_def_n_proc, else 8)")
    parser.set_defaults(handler=_fit)


def _fit(arguments: argparse.Namespace) -> int:
    from nnunet_conres.evaluation.finding import CompareOptions, find_cross_validation
    from nnunet_conres.evaluation.postprocessing_fit import fit_postprocessing
    from nnunet_conres.evaluation.predictions import NamedModel
    from nnunet_conres.evaluation.rules import read_rules
    from nnunet_conres.nnunet import dataset_name_of

    rules = None if arguments.rules is None else read_rules(arguments.rules)
    processes = number_of_processes(arguments.np)
    found = find_cross_validation(
        dataset_name_of(arguments.d),
        [NamedModel(arguments.tr, arguments.p, arguments.c)],
        arguments.f,
        CompareOptions(group_pattern=arguments.group),
    )
    print(fit_postprocessing(found, arguments.o, rules=rules, processes=processes).as_text())
    return 0


def _add_apply(commands: "Subparsers") -> None:
    parser = commands.add_parser(
        "apply",
        help="post-process a folder of predictions",
        description="Post-processes predictions of nnUNetv2_predict. If the file sets thresholds, predict with "
        "--save_probabilities.",
    )
    parser.add_argument("-i", metavar="FOLDER", required=True, help="predictions")
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder, new or empty")
    parser.add_argument("--postprocessing", metavar="FILE", required=True, help="file that postprocess fit wrote")
    parser.add_argument("-np", metavar="N", type=int, help="number of processes (default: $nnUNet_def_n_proc, else 8)")
    parser.set_defaults(handler=_apply)


def _apply(arguments: argparse.Namespace) -> int:
    from nnunet_conres.evaluation.postprocessing_files import apply_to_folder

    done = apply_to_folder(
        arguments.i, arguments.o, arguments.postprocessing, processes=number_of_processes(arguments.np)
    )
    changed = {case: voxels for case, voxels in done.changed.items() if voxels}
    print(f"{done.folder}: {len(done.changed)} cases, {len(changed)} of them changed")
    for case, voxels in changed.items():
        print(f"  {case}: {voxels} voxels")
    return 0
