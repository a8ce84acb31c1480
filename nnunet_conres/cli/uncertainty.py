"""Arguments of `nnunet-conres uncertainty`."""

import argparse
from typing import TYPE_CHECKING

from nnunet_conres.cli.arguments import number_of_processes
from nnunet_conres.errors import InputError

if TYPE_CHECKING:
    from nnunet_conres.cli import Subparsers


def add_uncertainty(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "uncertainty",
        help="write uncertainty maps of predictions, and measure how well folds or models agree",
        description="Writes entropy and disagreement maps of predicted cases as NIfTI, a picture of each case, and a "
        "table with the entropy within the segmentation and the Dice between members. Members are prediction folders "
        "(-i), such as one per fold, or trained models (-d, -tr) with the predictions of their held-out cases.",
    )
    folders = parser.add_argument_group("prediction folders")
    folders.add_argument(
        "-i",
        metavar="FOLDER",
        nargs="+",
        help="predictions of nnUNetv2_predict with --save_probabilities: one folder, or several of the same images",
    )
    folders.add_argument("-djfile", metavar="FILE", help="dataset.json (default: the one in or above the first folder)")
    folders.add_argument("--images", metavar="FOLDER", help="images, named as for nnU-Net, for the pictures")
    trained = parser.add_argument_group("held-out cases of trained models")
    trained.add_argument("-d", metavar="DATASET", help="data set name or id")
    trained.add_argument(
        "-tr", metavar="[NAME=]TRAINER[:PLANS[:CONFIGURATION]]", nargs="+", help="trainers, one or more"
    )
    trained.add_argument(
        "-p",
        metavar="PLANS",
        nargs="+",
        default=["nnUNetPlans"],
        help="plans: one for all trainers or one for each (default: nnUNetPlans)",
    )
    trained.add_argument(
        "-c",
        metavar="CONFIGURATION",
        nargs="+",
        default=["3d_fullres"],
        help="configuration: one for all trainers or one for each (default: 3d_fullres)",
    )
    trained.add_argument(
        "-f", metavar="FOLD", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="folds (default: 0 1 2 3 4)"
    )
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder")
    parser.add_argument("-np", metavar="N", type=int, help="number of processes (default: $nnUNet_def_n_proc, else 8)")
    parser.set_defaults(handler=_uncertainty)


def _uncertainty(arguments: argparse.Namespace) -> int:
    from nnunet_conres.evaluation.uncertainty import find_held_out, find_predicted, write_uncertainty

    processes = number_of_processes(arguments.np)
    if arguments.i and arguments.d is None:
        if arguments.tr:
            raise InputError("-tr needs -d. Leave it out with -i, which names folders with predictions.")
        predicted = find_predicted(arguments.i, dataset_json=arguments.djfile, images=arguments.images)
    elif arguments.d is not None and not arguments.i:
        if not arguments.tr:
            raise InputError("-d needs -tr, the trainers whose predictions to use.")
        given = {"-djfile": arguments.djfile, "--images": arguments.images}
        unused = [option for option, value in given.items() if value]
        if unused:
            raise InputError(f"{', '.join(unused)}: only with -i. Leave out with -d, which uses nnU-Net's folders.")
        from nnunet_conres.evaluation.finding import available_device
        from nnunet_conres.evaluation.predictions import parse_model_names
        from nnunet_conres.nnunet import dataset_name_of

        names, errors = parse_model_names(arguments.tr, arguments.p, arguments.c)
        if errors:
            raise InputError(errors)
        device = available_device(certain=False)
        predicted = find_held_out(dataset_name_of(arguments.d), names, arguments.f, device=device)
    else:
        raise InputError("Expected either -i with prediction folders, or -d with -tr.")
    print(write_uncertainty(predicted, arguments.o, processes=processes).as_text())
    return 0
