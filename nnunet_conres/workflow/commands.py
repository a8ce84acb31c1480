"""The commands that the steps run: those of nnU-Net, and `nnunet-conres`."""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_conres.workflow.config import Experiment, Model, ensemble_name

OWN_COMMAND = "nnunet-conres"


def convert(experiment: Experiment, processes: int) -> list[str]:
    """Return the command that converts BraTS folders to a data set."""
    command = [OWN_COMMAND, "brats-convert", "-i", *map(str, experiment.brats), "-d", str(experiment.dataset_id)]
    command += ["-name", experiment.dataset[11:], "--scheme", *experiment.scheme, "-np", str(processes)]
    for option, folders in (("--held-out", experiment.held_out), ("--corrected", experiment.corrected)):
        if folders:
            command += [option, *map(str, folders)]
    if experiment.missing != "refuse":
        command += ["--missing", experiment.missing]
    return command


def fingerprint(experiment: Experiment, processes: int) -> list[str]:
    """Return the command that checks the data set's integrity and extracts its fingerprint."""
    number = str(experiment.dataset_id)
    return ["nnUNetv2_extract_fingerprint", "-d", number, "--verify_dataset_integrity", "-np", str(processes)]


def split(experiment: Experiment, processes: int) -> list[str]:
    """Return the command that makes the folds."""
    splits = experiment.splits
    command = [OWN_COMMAND, "split", "-d", experiment.dataset, "--folds", str(splits.folds), "--stratify"]
    command += [splits.stratify, "--seed", str(splits.seed), "-np", str(processes)]
    if splits.group is not None:
        command += ["--group", splits.group]
    if splits.grades is not None:
        command += ["--grades", str(splits.grades)]
    return command


def plan(experiment: Experiment, plans_name: str) -> list[str]:
    """Return the command that makes plans; empty if they are made by hand."""
    plans = experiment.plans[plans_name]
    if plans.planner == "none":
        return []
    number = str(experiment.dataset_id)
    if plans.is_own:
        command = [OWN_COMMAND, "plan", "-d", number, "-a", plans.planner]
    else:
        command = ["nnUNetv2_plan_experiment", "-d", number, "-pl", plans.planner]
    if plans.gpu_memory_target is not None:
        command += ["-gpu_memory_target", f"{plans.gpu_memory_target:g}"]
    return [*command, "-overwrite_plans_name", plans.name]


def preprocess(experiment: Experiment, plans_name: str, configuration: str, processes: int) -> list[str]:
    """Return the command that preprocesses one configuration."""
    command = ["nnUNetv2_preprocess", "-d", str(experiment.dataset_id), "-plans_name", plans_name]
    return [*command, "-c", configuration, "-np", str(processes)]


def memory(experiment: Experiment, model: Model) -> list[str]:
    """Return the command that estimates the memory of a training."""
    command = [OWN_COMMAND, "memory", "-d", experiment.dataset, "-p", model.plans, "-c", model.configuration]
    command += ["-tr", model.trainer, "-device", "cuda" if experiment.device == "cuda" else "cpu"]
    return [*command, "--json", "--budget"]


def train(experiment: Experiment, model: Model, fold: int) -> list[str]:
    """Return the command that trains and validates one fold."""
    command = ["nnUNetv2_train", str(experiment.dataset_id), model.configuration, str(fold), "-tr", model.trainer]
    command += ["-p", model.plans, "-device", experiment.device]
    if model.gpus > 1:
        command += ["-num_gpus", str(model.gpus)]
    return [*command, "--npz"] if experiment.probabilities else command


def predict(experiment: Experiment, model: Model, part: int, folder: str, processes: int) -> list[str]:
    """Return the command that predicts one part of the test cases with all folds of a model together."""
    command = ["nnUNetv2_predict", "-i", str(experiment.test_images), "-o", folder, "-d", str(experiment.dataset_id)]
    command += ["-tr", model.trainer, "-p", model.plans, "-c", model.configuration, "-f", *map(str, experiment.folds)]
    command += ["-num_parts", str(experiment.parts), "-part_id", str(part), "-device", experiment.device]
    command += ["-npp", str(processes), "-nps", str(processes), "--disable_progress_bar"]
    return [*command, "--save_probabilities"] if experiment.probabilities else command


def ensemble(experiment: Experiment, members: Sequence[str], folder: str, processes: int) -> list[str]:
    """Return the command that makes an ensemble's predictions from its members' probabilities."""
    folders = [str(experiment.predictions(name)) for name in members]
    return ["nnUNetv2_ensemble", "-i", *folders, "-o", folder, "-np", str(processes)]


def compare_folds(experiment: Experiment, folder: str, processes: int) -> list[str]:
    """Return the command that writes the report on the cross-validation."""
    names = [f"{model.name}={model.trainer}:{model.plans}:{model.configuration}" for model in experiment.models]
    command = [OWN_COMMAND, "compare", "-d", experiment.dataset, "-tr", *names, "-f", *map(str, experiment.folds)]
    command += ["-o", folder, "-np", str(processes), *_rules(experiment), *_postprocessing(experiment)]
    return command if experiment.ensembles else [*command, "--no_ensembles"]


def compare_test(experiment: Experiment, folder: str, processes: int) -> list[str]:
    """Return the command that writes the report on the test cases."""
    names = [model.name for model in experiment.models] + [ensemble_name(members) for members in experiment.ensembles]
    command = [OWN_COMMAND, "compare", "--predictions", *(f"{n}={experiment.predictions(n)}" for n in names)]
    command += ["--model", *(f"{model.name}={experiment.model_folder(model)}" for model in experiment.models)]
    command += ["--reference", str(experiment.test_labels), "-i", str(experiment.test_images)]
    command += ["-djfile", str(experiment.raw / "dataset.json"), "-o", folder, "-np", str(processes)]
    command += [*_rules(experiment), *_postprocessing(experiment)]
    # the workflow's own ensembles are among the predictions
    return [*command, "--no_ensembles"]


def _rules(experiment: Experiment) -> list[str]:
    return [] if experiment.rules is None else ["--rules", experiment.rules]


def _postprocessing(experiment: Experiment) -> list[str]:
    if not experiment.postprocess:
        return []
    return [
        "--postprocessing",
        *(f"{model.name}={experiment.postprocessing(model.name)}" for model in experiment.models),
    ]


def postprocess(experiment: Experiment, model: Model, processes: int) -> list[str]:
    """Return the command that chooses a model's post-processing from its folds."""
    command = [OWN_COMMAND, "postprocess", "fit", "-d", experiment.dataset, *_named(model)]
    command += ["-f", *map(str, experiment.folds), "-o", str(experiment.postprocessing(model.name))]
    return [*command, "-np", str(processes), *_rules(experiment)]


def package(experiment: Experiment, model: Model) -> list[str]:
    """Return the command that writes the folder that a model's container is built from."""
    command = [OWN_COMMAND, "package", "-d", experiment.dataset, *_named(model)]
    command += ["-f", *map(str, experiment.folds), "-o", str(experiment.package(model.name))]
    if experiment.package_scheme is not None:
        command += ["--scheme", experiment.package_scheme]
    if experiment.package_missing is not None:
        command += ["--missing", experiment.package_missing]
    if experiment.postprocess:
        command += ["--postprocessing", str(experiment.postprocessing(model.name))]
    return command


def _named(model: Model) -> list[str]:
    return ["-tr", model.trainer, "-p", model.plans, "-c", model.configuration]
