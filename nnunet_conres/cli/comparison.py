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
        description="Compares models case by case: on the validation cases of a cross-validation (-d, -tr), or on a "
        "test set (--predictions, --reference). The first model is the baseline. If the models' probabilities exist, "
        "they are averaged, and the ensembles are compared as well. Writes report.html, report.json and cases.csv. "
        "Scores are cached: another run scores only files that have changed.",
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
    test = parser.add_argument_group("test set")
    test.add_argument(
        "--predictions",
        metavar="NAME=FOLDER",
        nargs="+",
        help="folders with predictions of nnUNetv2_predict, the baseline first",
    )
    test.add_argument("--reference", metavar="FOLDER", help="folder with the ground truth (label maps)")
    test.add_argument("-djfile", metavar="FILE", help="dataset.json of the data set")
    test.add_argument("-i", metavar="FOLDER", help="images, for the pictures of the report")
    test.add_argument(
        "--model",
        metavar="NAME=FOLDER",
        nargs="+",
        default=[],
        help="folder of the trained model for each NAME in --predictions, for costs and training curves; only plain "
        "values are read from checkpoints",
    )
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder")
    parser.add_argument("--no_ensembles", action="store_true", help="do not average probabilities")
    parser.add_argument("--no_calibration", action="store_true", help="do not measure how reliable probabilities are")
    parser.add_argument(
        "--intersection",
        action="store_true",
        help="if models have different cases, or predictions are missing, compare on the common cases; the report "
        "names the cases that are left out",
    )
    parser.add_argument(
        "--run",
        action="store_true",
        help="run the commands of nnU-Net that create missing validations and probabilities; this does not train. "
        "nnU-Net executes code in checkpoints: use this option only with models that you trust",
    )
    parser.add_argument(
        "-device",
        choices=("cuda", "cpu", "mps"),
        help="device in the commands that are shown, or run with --run (default: cuda where there is a GPU, else cpu)",
    )
    parser.add_argument(
        "--group",
        metavar="REGEX",
        help="cases whose ids have the same match (of the first group in parentheses, if any) count as one case in "
        "statistics, for example all time points of a patient (default: the patient in BraTS's ids since 2023; no "
        "grouping for other ids)",
    )
    parser.add_argument(
        "--postprocessing",
        metavar="[NAME=]FILE",
        nargs="+",
        help="file that postprocess fit wrote: also compare each model with its post-processed predictions; one file "
        "for all models, or one for each NAME",
    )
    parser.add_argument(
        "--rules",
        metavar="NAME",
        help="score by the rules of a challenge, with its regions and lesions: 2023-GLI, 2024-MET, 2026-PED ... (see "
        "Challenge rules in the documentation)",
    )
    parser.add_argument(
        "--like-brats-evaluation",
        action="store_true",
        help="with --rules of 2026: where the organisers' tool differs from the rules, report the tool's numbers; also "
        "write its tables",
    )
    parser.add_argument("--tolerance", metavar="MM", type=float, help="tolerance of the surface Dice, mm (default: 1)")
    parser.add_argument(
        "--empty",
        choices=("brats", "nan"),
        help="score of a region that is missing in the reference, the prediction or both: brats scores it as BraTS "
        "does; nan leaves it without a score where nnU-Net does (default: brats)",
    )
    parser.add_argument(
        "--penalty",
        metavar="MM",
        type=float,
        help="HD95 of a missed or false region or lesion, mm (default: the diagonal of the image, 373.1 mm in BraTS; "
        "the challenge uses 374 mm)",
    )
    parser.add_argument(
        "--lesion_dilation",
        metavar="VOXELS",
        type=int,
        help="dilation that joins the parts of one lesion, see Metrics in the documentation (default: 3)",
    )
    parser.add_argument(
        "--lesion_volume",
        metavar="MM3",
        type=float,
        help="ignore true lesions up to this volume, mm³ (default: 50)",
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
            raise InputError(
                f"{', '.join(unused)}: only with --predictions. Leave out with -d, which uses nnU-Net's folders."
            )
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
        tool = ", as in brats-evaluation" * like
        raise InputError(f"{', '.join(unused)}: set by --rules {arguments.rules}{tool}. Leave the option out.")
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
