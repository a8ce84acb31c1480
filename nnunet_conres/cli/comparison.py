"""Arguments of `nnunet-conres compare`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_conres.cli.arguments import number_of_processes
from nnunet_conres.errors import InputError

if TYPE_CHECKING:
    from nnunet_conres.cli import Subparsers
    from nnunet_conres.evaluation.metrics import MetricOptions


def add_compare(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "compare",
        help="compare models, and their ensembles, in a report",
        description="Compares models case by case: of a cross-validation (-d, -tr), by the cases that their folds held "
        "out; or of a test set (--predictions, --reference). The first model is the baseline. Probabilities of the "
        "models, where they are there, are averaged, and the ensembles compared as well. Writes report.html, "
        "report.json and cases.csv. Scores are kept and only made again for files that have changed.",
    )
    trained = parser.add_argument_group("cross-validation")
    trained.add_argument("-d", metavar="DATASET", help="data set name or id")
    trained.add_argument(
        "-tr",
        metavar="[NAME=]TRAINER[:PLANS[:CONFIGURATION]]",
        nargs="+",
        help="trainers, the baseline first; each may name its plans, its configuration and its name in the report",
    )
    trained.add_argument(
        "-p", metavar="PLANS", nargs="+", default=["nnUNetPlans"], help="plans: one for all trainers or one for each"
    )
    trained.add_argument(
        "-c", metavar="CONFIGURATION", nargs="+", default=["3d_fullres"], help="likewise (default: 3d_fullres)"
    )
    trained.add_argument(
        "-f", metavar="FOLD", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="folds (default: 0 1 2 3 4)"
    )
    test = parser.add_argument_group("test set")
    test.add_argument(
        "--predictions", metavar="NAME=FOLDER", nargs="+", help="what nnUNetv2_predict wrote, the baseline first"
    )
    test.add_argument("--reference", metavar="FOLDER", help="the true label maps")
    test.add_argument("-djfile", metavar="FILE", help="dataset.json of the data set")
    test.add_argument("-i", metavar="FOLDER", help="images, for the pictures of the report")
    test.add_argument(
        "--model",
        metavar="NAME=FOLDER",
        nargs="+",
        default=[],
        help="trained model folders of names in --predictions, for costs and training curves; only plain values are "
        "read of their checkpoints",
    )
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder")
    parser.add_argument("--no_ensembles", action="store_true", help="do not average probabilities")
    parser.add_argument("--no_calibration", action="store_true", help="do not measure how reliable probabilities are")
    parser.add_argument(
        "--intersection",
        action="store_true",
        help="compare on the common cases where models have different ones, or where predictions are gone; the report "
        "names what is left out",
    )
    parser.add_argument(
        "--run",
        action="store_true",
        help="run the commands of nnU-Net that make missing validations and probabilities; nothing is trained. nnU-Net "
        "runs code that a checkpoint holds: only with models that you trust",
    )
    parser.add_argument(
        "-device",
        choices=("cuda", "cpu", "mps"),
        help="of the commands that are named or run (default: cuda where there is a GPU, else cpu)",
    )
    parser.add_argument(
        "--group",
        metavar="REGEX",
        help="cases with the same match (of its first group, if any) count as one in statistics, such as the time "
        "points of a patient (default: the patients of BraTS's ids since 2023; none for other ids)",
    )
    parser.add_argument(
        "--postprocessing",
        metavar="[NAME=]FILE",
        nargs="+",
        help="what postprocess fit wrote: compare models with themselves post-processed, too; one file for all, or one "
        "for each NAME",
    )
    parser.add_argument(
        "--rules",
        metavar="NAME",
        help="score as a challenge does, by lesions of its regions: 2023-GLI, 2024-MET, 2026-PED ..., see "
        "docs/reference/challenge-rules.md",
    )
    parser.add_argument(
        "--like-brats-evaluation",
        action="store_true",
        help="with --rules of 2026: the organisers' numbers where their tool differs from the rules, and its tables",
    )
    parser.add_argument("--tolerance", metavar="MM", type=float, help="of the surface Dice, mm (default: 1)")
    parser.add_argument(
        "--empty",
        choices=("brats", "nan"),
        help="score of a region that is missing in reference, prediction or both: as in BraTS, or none, as in nnU-Net "
        "(default: brats)",
    )
    parser.add_argument(
        "--penalty",
        metavar="MM",
        type=float,
        help="distance that a missed or falsely found region or lesion counts, mm (default: the image's diagonal, "
        "373.1 in BraTS, where the challenge takes 374)",
    )
    parser.add_argument(
        "--lesion_dilation",
        metavar="VOXELS",
        type=int,
        help="how far apart parts of one lesion may be, see docs/reference/metrics.md (default: 3)",
    )
    parser.add_argument(
        "--lesion_volume",
        metavar="MM3",
        type=float,
        help="true lesions up to this volume are ignored, mm³ (default: 50)",
    )
    parser.add_argument("-np", metavar="N", type=int, help="number of processes (default: $nnUNet_def_n_proc, else 8)")
    parser.set_defaults(handler=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from nnunet_conres.evaluation.comparison import compare
    from nnunet_conres.evaluation.finding import CompareOptions, find_cross_validation, find_test_set

    options = CompareOptions(
        intersection=arguments.intersection,
        ensembles=not arguments.no_ensembles,
        calibration=not arguments.no_calibration,
        run=arguments.run,
        device=arguments.device,
        metrics=_metric_options(arguments),
        postprocessing=_postprocessing(arguments.postprocessing),
        group_pattern=arguments.group,
        processes=number_of_processes(arguments.np),
    )
    if arguments.d is not None and arguments.predictions is None:
        if not arguments.tr:
            raise InputError("-d needs -tr, the trainers to compare.")
        given = {"--reference": arguments.reference, "-djfile": arguments.djfile, "-i": arguments.i}
        unused = [option for option, value in {**given, "--model": arguments.model}.items() if value]
        if unused:
            raise InputError(f"{', '.join(unused)}: for --predictions only; with -d nnU-Net's folders have them.")
        from nnunet_conres.evaluation.predictions import parse_model_names
        from nnunet_conres.nnunet import dataset_name_of

        names, errors = parse_model_names(arguments.tr, arguments.p, arguments.c)
        if errors:
            raise InputError(errors)
        found = find_cross_validation(dataset_name_of(arguments.d), names, arguments.f, options)
    elif arguments.predictions is not None and arguments.d is None:
        if arguments.reference is None or arguments.djfile is None:
            raise InputError("--predictions needs --reference and -djfile.")
        found = find_test_set(
            _named("--predictions", arguments.predictions, "FOLDER"),
            arguments.reference,
            arguments.djfile,
            options,
            images=arguments.i,
            model_folders=_named("--model", arguments.model, "FOLDER"),
        )
    else:
        raise InputError("Expected either -d with -tr, or --predictions with --reference and -djfile.")
    print(compare(found, arguments.o, options).as_text())
    return 0


def _metric_options(arguments: argparse.Namespace) -> "MetricOptions":
    from nnunet_conres.evaluation.metrics import MetricOptions
    from nnunet_conres.evaluation.rules import read_rules

    names = ("tolerance", "empty", "penalty", "lesion_dilation", "lesion_volume")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    like = arguments.like_brats_evaluation
    if arguments.rules is None:
        if like:
            raise InputError("--like-brats-evaluation needs --rules of a challenge of 2026, such as --rules 2026-MET.")
        return MetricOptions(**given)
    unused = [f"--{name}" for name in given if name != "tolerance" or like]
    if unused:
        raise InputError(f"{', '.join(unused)}: set by --rules {arguments.rules}{', as in the tool' * like}.")
    return MetricOptions(**given, rules=read_rules(arguments.rules), like_brats_evaluation=like)


def _postprocessing(given: list[str] | None) -> "Path | dict[str, Path] | None":
    if given is None:
        return None
    if len(given) == 1 and ("=" not in given[0] or Path(given[0]).exists()):
        return Path(given[0])
    return {name: Path(file) for name, file in _named("--postprocessing", given, "FILE").items()}


def _named(option: str, given: list[str], what: str) -> dict[str, str]:
    folders: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise InputError(f"{option} {text} is not NAME={what}.")
        if name in folders:
            raise InputError(f"{option} names {name} twice; expected every name once.")
        folders[name] = folder
    return folders
