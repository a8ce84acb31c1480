"""The configuration of an experiment: read from YAML, checked as a whole."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from nnunet_conres.datasets.raw import FOLDER_VARIABLES, folder_name, id_faults
from nnunet_conres.errors import InputError
from nnunet_conres.registration import TRAINERS, VARIABLE

# What rules there are, for `resources`.
RULES: Final = (
    "convert",
    "fingerprint",
    "split",
    "plan",
    "preprocess",
    "memory",
    "train",
    "predict",
    "ensemble",
    "compare",
)
# Of those, what is handed to SLURM as it is.
SLURM_TEXTS: Final = ("account", "partition", "qos", "constraint", "slurm_extra")
RESOURCES: Final = ("cpus", "memory_gb", "minutes", "gpus", "gpu_types", *SLURM_TEXTS)
# What the plugin for SLURM sets by itself, and refuses beside it: here, where it can be told before anything runs.
_NOT_EXTRA: Final = {
    "--account": "account",
    "-A": "account",
    "--partition": "partition",
    "-p": "partition",
    "--qos": "qos",
    "--constraint": "constraint",
    "-C": "constraint",
    "--mem": "memory_gb",
    "--time": "minutes",
    "-t": "minutes",
    "--cpus-per-task": "cpus",
    "-c": "cpus",
    "--gres": "gpus or gpu_types",
    "--gpus": "gpus or gpu_types",
    "--nodes": "nothing, since a job is on one node",
    "-N": "nothing, since a job is on one node",
    "--ntasks": "cpus",
    "-n": "cpus",
    "--mem-per-cpu": "memory_gb",
    "--cpus-per-gpu": "cpus",
    "--ntasks-per-gpu": "cpus",
    "--output": "nothing, since logs have their place",
    "-o": "nothing, since logs have their place",
    "--error": "nothing, since logs have their place",
    "-e": "nothing, since logs have their place",
    "--comment": "nothing, since step, model and fold are in it",
    "--export": "environment, at the top",
    "--workdir": "work, at the top",
    "-D": "work, at the top",
    "--clusters": "nothing, since the plugin has no place for it",
    "--job-name": "nothing, since the plugin finds its jobs by their names",
    "-J": "nothing, since the plugin finds its jobs by their names",
}
# Plans that need not be described: who makes them. The second group are planners of this package.
STOCK_PLANNERS: Final = {
    "nnUNetPlans": "ExperimentPlanner",
    "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM",
    "nnUNetResEncUNetLPlans": "nnUNetPlannerResEncL",
    "nnUNetResEncUNetXLPlans": "nnUNetPlannerResEncXL",
}
OWN_PLANNERS: Final = {
    "nnUNetConResNetPlans": "conresnet",
    "nnUNetResidualMapsPlans": "residual_maps",
    "nnUNetVNetPlans": "vnet",
    "nnUNetUNet3DPlans": "unet3d",
}
STOCK_LENGTHS: Final = (1, 5, 10, 20, 50, 100, 250, 500, 2000, 4000, 8000)
_STANDARD_EPOCHS: Final = 1000
_ENSEMBLE_WORDS: Final = ("all", "pairs", "none")


@dataclass(frozen=True)
class Model:
    """What to train.

    Attributes:
        name: Name in reports, logs and job names.
        trainer: The trainer's whole name, its number of epochs included.
        plans: Name of the plans.
        configuration: Configuration of the plans.
        gpus: GPUs of one training (``-num_gpus``).
        epoch_seconds: How long an epoch takes, where the configuration says so.
    """

    name: str
    trainer: str
    plans: str
    configuration: str = "3d_fullres"
    gpus: int = 1
    epoch_seconds: float | None = None


@dataclass(frozen=True)
class Plans:
    """How plans are made.

    Attributes:
        name: Name of the plans.
        planner: A planner class of nnU-Net's, or ``conresnet``, ``residual_maps``, ``vnet``, ``unet3d``, or ``none``
            for plans that are there already, made by hand.
        gpu_memory_target: GiB; None for the planner's own.
    """

    name: str
    planner: str
    gpu_memory_target: float | None = None

    @property
    def is_own(self) -> bool:
        """Whether `nnunet-conres plan` makes them."""
        return self.planner in OWN_PLANNERS.values()


@dataclass(frozen=True)
class Splits:
    """How the folds are chosen; see `nnunet-conres split`."""

    folds: int = 5
    stratify: str = "both"
    seed: int = 12345
    group: str | None = None
    grades: Path | None = None


@dataclass(frozen=True)
class Experiment:
    """An experiment, all paths absolute.

    Attributes:
        work: Folder for records, logs, predictions and reports.
        dataset: Whole name of the data set.
        brats: Folders to convert; empty for a data set that is there.
        held_out: Folders of which images and labels are for testing only.
        scheme: Schemes that `nnunet-conres brats-convert` may take.
        models: The models, the baseline first.
        plans: The plans that the models need, by name.
        folds: Folds to train.
        splits: How the folds are chosen.
        test_images: Folder with test images, None without a test.
        test_labels: Folder with their labels, None if there are none.
        parts: In how many jobs the test cases of a model are predicted.
        ensembles: Names of the models of every ensemble.
        device: Where to train and predict.
        checkpoint_minutes: How often trainers of this package write a checkpoint.
        retries: How often a training that ended before it was done is taken up again, at least.
        time_limit_hours: What the queue allows a job.
        environment: Further variables for all commands; nnU-Net's three folders among them.
        resources: What rules are given instead of what is estimated, by rule.
    """

    work: Path
    dataset: str
    models: tuple[Model, ...]
    plans: Mapping[str, Plans]
    brats: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()
    scheme: tuple[str, ...] = ("auto",)
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    splits: Splits = field(default_factory=Splits)
    test_images: Path | None = None
    test_labels: Path | None = None
    parts: int = 1
    ensembles: tuple[tuple[str, ...], ...] = ()
    device: str = "cuda"
    checkpoint_minutes: float = 5.0
    retries: int = 5
    time_limit_hours: float = 24.0
    environment: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def dataset_id(self) -> int:
        return int(self.dataset[7:10])

    @property
    def raw(self) -> Path:
        """Folder of the raw data set."""
        return Path(self.environment["nnUNet_raw"]) / self.dataset

    @property
    def preprocessed(self) -> Path:
        """Folder of the preprocessed data set, with plans and splits."""
        return Path(self.environment["nnUNet_preprocessed"]) / self.dataset

    @property
    def records(self) -> Path:
        return self.work / "records"

    @property
    def logs(self) -> Path:
        return self.work / "logs"

    @property
    def probabilities(self) -> bool:
        """Whether predictions are kept as probabilities too."""
        return bool(self.ensembles)

    def model(self, name: str) -> Model:
        return next(model for model in self.models if model.name == name)

    def model_folder(self, model: Model) -> Path:
        """nnU-Net's folder of a trained model."""
        results = Path(self.environment["nnUNet_results"])
        return results / self.dataset / f"{model.trainer}__{model.plans}__{model.configuration}"

    def fold_folder(self, model: Model, fold: int) -> Path:
        return self.model_folder(model) / f"fold_{fold}"

    def fold_lock(self, model: Model, fold: int) -> Path:
        """The lock that a training of a fold holds; beside the fold, which may be moved away."""
        return self.model_folder(model) / "workflow" / f"fold_{fold}.lock"

    def training_log(self, model: Model, fold: int) -> Path:
        """What the attempts to train a fold printed."""
        return self.logs / "train" / model.name / f"fold_{fold}.log"

    def predictions(self, name: str) -> Path:
        """Predictions of a model or an ensemble for the test cases."""
        return self.work / "predictions" / name


def ensemble_name(members: tuple[str, ...]) -> str:
    """Name of an ensemble, also of the folder with its predictions."""
    return "+".join(members)


def read_config(path: Path) -> Experiment:
    """Reads the configuration of an experiment.

    Args:
        path: A YAML file; relative paths in it are meant relative to its folder.

    Raises:
        InputError: With everything that is wrong with it.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML takes the last of two equal keys without a word: one of two models of one name would be gone."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            twice = [key for number, key in enumerate(keys) if key in keys[:number]]
            if twice:
                raise yaml.YAMLError(f"{twice[0]} stands twice in one place, line {node.start_mark.line + 1} and on")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError([f"{path} cannot be read as YAML: {' '.join(str(error).split())}."]) from error
    if not isinstance(content, dict):
        raise InputError([f"{path} holds no configuration; expected entries such as data and models."])
    return parse_config(content, path.resolve().parent, str(path))


def parse_config(content: Mapping[str, Any], base: Path, where: str = "the configuration") -> Experiment:
    """Makes an experiment of what a YAML file holds.

    Args:
        content: The entries.
        base: Folder that relative paths are relative to.
        where: Name of the file, for messages.

    Raises:
        InputError: With everything that is wrong with it.
    """
    reader = _Reader(content, base)
    experiment = reader.experiment()
    if reader.faults or experiment is None:
        raise InputError([f"{where}: {fault}" for fault in reader.faults])
    return experiment


class _Reader:
    """Takes a configuration apart and collects what is wrong with it."""

    _TOP: Final = {
        "work": str, "folders": dict, "data": dict, "test": dict, "models": dict, "plans": dict, "folds": list,
        "splits": dict, "epochs": int, "device": str, "checkpoint_minutes": float, "retries": int,
        "time_limit_hours": float, "ensembles": object, "environment": dict, "resources": dict,
    }  # fmt: skip
    _DATA: Final = {"id": int, "name": str, "brats": object, "held_out": object, "scheme": object}
    _TEST: Final = {"images": str, "labels": str, "parts": int}
    _MODEL: Final = {
        "trainer": str, "plans": str, "configuration": str, "epochs": int, "gpus": int, "epoch_seconds": float,
    }  # fmt: skip
    _PLANS: Final = {"planner": str, "gpu_memory_target": float}
    _SPLITS: Final = {"folds": int, "stratify": str, "seed": int, "group": str, "grades": str}

    def __init__(self, content: Mapping[str, Any], base: Path) -> None:
        self.base = base
        self.faults: list[str] = []
        for where, text in _texts(content):
            if not _can_be_passed_on(text):
                self._fault(f"{where} is {text!r}; expected a text without NUL and without lone surrogates")
        self.can_be_looked_up = not self.faults
        self.content = self._entries(content, self._TOP, "")

    def experiment(self) -> Experiment | None:
        if not self.can_be_looked_up:
            return None
        top = self.content
        environment = self._environment()
        epochs = top.get("epochs", _STANDARD_EPOCHS)
        models = self._models(epochs)
        plans = self._plans(models)
        data, dataset = self._dataset(environment)
        test_images, test_labels, parts = self._test(environment, dataset, bool(data.get("held_out")))
        splits = self._splits()
        folds = self._folds(splits)
        ensembles = self._ensembles([model.name for model in models])
        device = top.get("device", "cuda")
        if device not in ("cuda", "cpu", "mps"):
            self._fault(f"device is {device!r}; expected cuda, cpu or mps")
        numbers = {key: top[key] for key in ("checkpoint_minutes", "retries", "time_limit_hours") if key in top}
        for key, value in numbers.items():
            if value < 0 or (value == 0 and key != "retries"):
                self._fault(f"{key} is {value}; expected more than 0")
        resources = self._resources()
        work = self._path(top.get("work", "experiment"))
        if re.search("[{}<>]", str(work)):
            self._fault(f"work is {work}; expected a folder without {{, }}, < and > in its path, for Snakemake's sake")
        for model in models:
            if model.gpus > 1 and device != "cuda":
                self._fault(f"models, {model.name}: {model.gpus} GPUs, but device is {device}; expected gpus: 1")
        if self.faults:
            return None
        return Experiment(
            work=work,
            dataset=dataset,
            models=tuple(models),
            plans=plans,
            brats=self._paths(data.get("brats")),
            held_out=self._paths(data.get("held_out")),
            scheme=tuple(_as_list(data.get("scheme", "auto"))),
            folds=tuple(folds),
            splits=splits,
            test_images=test_images,
            test_labels=test_labels,
            parts=parts,
            ensembles=ensembles,
            device=device,
            environment=environment,
            resources=resources,
            **numbers,
        )

    # --- parts ------------------------------------------------------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        environment: dict[str, str] = {}
        for key, value in self.content.get("environment", {}).items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(key)):
                self._fault(f"environment, {key!r}: expected a name of letters, digits and _")
            elif isinstance(value, (dict, list)) or value is None:
                self._fault(f"environment, {key} is {value!r}; expected a text or a number")
            else:
                environment[str(key)] = str(value).lower() if isinstance(value, bool) else str(value)
        if environment.get("nnUNet_n_proc_DA") == "0":
            self._fault("environment, nnUNet_n_proc_DA is 0, with which nnU-Net cannot plan; expected 1 or more")
        folders = self._entries(self.content.get("folders", {}), dict.fromkeys(FOLDER_VARIABLES, str), "folders, ")
        for variable in FOLDER_VARIABLES:
            value = folders.get(variable) or environment.get(variable) or os.environ.get(variable)
            if not value:
                self._fault(f"{variable} is not known; set the environment variable or folders, {variable}")
            else:
                environment[variable] = str(self._path(value))
        return environment

    def _dataset(self, environment: Mapping[str, str]) -> tuple[dict[str, Any], str]:
        if "data" not in self.content:
            self._fault("data is missing; expected the id of a data set, or BraTS folders to convert")
            return {}, ""
        data = self._entries(self.content["data"], self._DATA, "data, ")
        number, name = data.get("id"), data.get("name")
        if number is None:
            self._fault("data, id is missing; expected nnU-Net's number of the data set, for example 501")
            return data, ""
        faults = list(id_faults(number, name or "BraTS"))
        self.faults.extend(faults)
        if faults:
            return data, ""
        scheme = _as_list(data.get("scheme"))
        if not all(isinstance(one, (str, int)) and not isinstance(one, bool) for one in scheme):
            self._fault(f"data, scheme is {data['scheme']!r}; expected a scheme of brats-convert or several")
        if "brats" in data:
            for key in ("brats", "held_out"):
                if key in data and not all(isinstance(folder, str) and folder for folder in _as_list(data[key])):
                    self._fault(f"data, {key} is {data[key]!r}; expected a folder or several")
                    return data, ""
            if not _as_list(data["brats"]):
                self._fault("data, brats has no folders; expected at least one, or no such line")
            for key in ("brats", "held_out"):
                for folder in self._paths(data.get(key)):
                    if not folder.is_dir():
                        self._fault(f"data, {key}: {folder} is no folder")
            return data, folder_name(number, name or "BraTS")
        for key in ("held_out", "scheme"):
            if key in data:
                self._fault(f"data, {key} goes with brats, which is missing")
        if name is not None:
            return data, folder_name(number, name)
        found = {
            folder.name
            for variable in FOLDER_VARIABLES[:2]
            if variable in environment
            for folder in Path(environment[variable]).glob(f"Dataset{number:03d}_*")
        }
        if len(found) != 1:
            what = ", ".join(sorted(found)) or "no data set"
            self._fault(f"data, id {number}: found {what}; expected one in nnUNet_raw, or data, brats to make it of")
            return data, ""
        return data, found.pop()

    def _test(
        self, environment: Mapping[str, str], dataset: str, held_out: bool
    ) -> tuple[Path | None, Path | None, int]:
        if "test" not in self.content and not held_out:
            return None, None, 1
        test = self._entries(self.content.get("test", {}), self._TEST, "test, ")
        parts = test.get("parts", 1)
        if parts < 1:
            self._fault(f"test, parts is {parts}; expected 1 or more")
        if "images" in test:
            images = self._path(test["images"])
            labels = self._path(test["labels"]) if "labels" in test else None
            for key, folder in (("images", images), ("labels", labels)):
                if folder is not None and not folder.is_dir():
                    self._fault(f"test, {key}: {folder} is no folder")
            return images, labels, parts
        if not held_out:
            self._fault("test, images is missing; expected the folder with test images")
            return None, None, parts
        if "labels" in test:
            self._fault("test, labels goes with images, which is missing; data, held_out brings labels of its own")
        raw = Path(environment.get("nnUNet_raw", "")) / dataset
        return raw / "imagesTs", raw / "labelsTs", parts

    def _models(self, standard_epochs: int) -> list[Model]:
        models = []
        wanted = self.content.get("models")
        if not wanted:
            self._fault("models is missing; expected at least one, such as nnU-Net: {trainer: nnUNetTrainer}")
            return []
        for name, given in wanted.items():
            where = f"models, {name}: "
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(name)):
                self._fault(f"models, {name!r}: expected a name of letters, digits and . _ -")
                continue
            entries = self._entries(given or {}, self._MODEL, where)
            trainer = entries.get("trainer", "nnUNetTrainer")
            epochs = entries.get("epochs", standard_epochs)
            with_length = self._with_epochs(trainer, epochs, where, said="epochs" in entries)
            configuration = entries.get("configuration", "3d_fullres")
            if "cascade" in configuration:
                self._fault(f"{where}{configuration} needs another model's predictions; train cascades by hand")
            gpus = entries.get("gpus", 1)
            if gpus < 1:
                self._fault(f"{where}gpus is {gpus}; expected 1 or more")
            seconds = entries.get("epoch_seconds")
            if seconds is not None and seconds <= 0:
                self._fault(f"{where}epoch_seconds is {seconds}; expected more than 0")
            plans = entries.get("plans", "nnUNetPlans")
            for key, value in (("trainer", trainer), ("plans", plans), ("configuration", configuration)):
                if not re.fullmatch(r"\w[\w.-]*", value):
                    self._fault(f"{where}{key} is {value!r}; expected a name of letters, digits and . _ -")
            self._check_class(where, "trainer", trainer)
            models.append(Model(str(name), with_length, plans, configuration, gpus, seconds))
        identities: dict[tuple[str, str, str], str] = {}
        for model in models:
            identity = (model.trainer, model.plans, model.configuration)
            if identity in identities:
                self._fault(f"models, {model.name} and {identities[identity]} are the same: {' '.join(identity)}")
            identities[identity] = model.name
        return models

    def _with_epochs(self, trainer: str, epochs: int, where: str, said: bool) -> str:
        """The trainer of a name with a number of epochs, which nnU-Net's and ours have variants for."""
        if epochs == _STANDARD_EPOCHS or (re.search(r"_\d+epochs?$", trainer) and not said):
            return trainer
        ending = "1epoch" if epochs == 1 else f"{epochs}epochs"
        named = f"{trainer}_{ending}"
        if named in TRAINERS or (trainer == "nnUNetTrainer" and epochs in STOCK_LENGTHS):
            return named
        self._fault(
            f"{where}{trainer} has no variant of {epochs} epochs; expected one of "
            f"{', '.join(map(str, STOCK_LENGTHS[:-2]))} for nnUNetTrainer and the plain trainers of this package, or "
            f"epochs: {_STANDARD_EPOCHS}, with which a trainer decides itself"
        )
        return trainer

    def _plans(self, models: list[Model]) -> dict[str, Plans]:
        described = self.content.get("plans", {})
        used = list(dict.fromkeys(model.plans for model in models))
        for name in described:
            if name not in used:
                self._fault(f"plans, {name}: no model has these plans")
        plans = {}
        for name in used:
            entries = self._entries(described.get(name) or {}, self._PLANS, f"plans, {name}: ")
            planner = entries.get("planner", (STOCK_PLANNERS | OWN_PLANNERS).get(name))
            if planner is None:
                self._fault(
                    f"plans, {name}: planner is missing; expected a planner class of nnU-Net's, one of "
                    f"{', '.join(OWN_PLANNERS.values())}, or none for plans that are there already"
                )
                continue
            target = entries.get("gpu_memory_target")
            if planner != "none" and planner not in OWN_PLANNERS.values():
                self._check_class(f"plans, {name}: ", "planner", planner)
            if target is not None and target <= 0:
                self._fault(f"plans, {name}: gpu_memory_target is {target}; expected GiB, more than 0")
            plans[name] = Plans(name, planner, target)
        return plans

    def _check_class(self, where: str, kind: str, name: str) -> None:
        """A name that nobody knows would be noticed behind hours of preprocessing only."""
        known = _classes_of_nnunet(kind)
        if not known or name in known or (kind == "trainer" and (name in TRAINERS or self._is_users_own(name))):
            return
        near = difflib.get_close_matches(name, [*known, *(TRAINERS if kind == "trainer" else OWN_PLANNERS.values())], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        own = ", and none in the folders of nnUNet_extTrainer" if kind == "trainer" else ""
        self._fault(f"{where}nnU-Net and this package have no {kind} called {name}{own}{hint}")

    def _is_users_own(self, name: str) -> bool:
        """Whether a file in nnUNet_extTrainer speaks of a class, which it may also make or import."""
        given = self.content.get("environment", {}).get(VARIABLE)
        word = re.compile(rf"\b{re.escape(name)}\b")
        folders = [Path(folder) for folder in str(given or os.environ.get(VARIABLE, "")).split(os.pathsep) if folder]
        return any(word.search(path.read_text(errors="replace")) for one in folders for path in one.rglob("*.py"))

    def _splits(self) -> Splits:
        entries = self._entries(self.content.get("splits", {}), self._SPLITS, "splits, ")
        if entries.get("folds", 5) < 2:
            self._fault(f"splits, folds is {entries['folds']}; expected 2 or more")
        if entries.get("seed", 0) < 0:
            self._fault(f"splits, seed is {entries['seed']}; expected 0 or more")
        if entries.get("stratify", "both") not in ("both", "grade", "volume", "none"):
            self._fault(f"splits, stratify is {entries['stratify']!r}; expected both, grade, volume or none")
        try:
            re.compile(entries.get("group", ""))
        except re.error as error:
            self._fault(f"splits, group is {entries['group']!r}; expected a regular expression, but: {error}")
        if "grades" in entries:
            entries["grades"] = self._path(entries["grades"])
            if not entries["grades"].is_file():
                self._fault(f"splits, grades: {entries['grades']} is no file")
        return Splits(**entries)

    def _folds(self, splits: Splits) -> list[int]:
        folds = self.content.get("folds", list(range(splits.folds)))
        wrong = [fold for fold in folds if isinstance(fold, bool) or not isinstance(fold, int) or fold < 0]
        wrong += [fold for fold in folds if fold not in wrong and fold >= splits.folds]
        if wrong or not folds or len(set(map(str, folds))) != len(folds):
            self._fault(f"folds is {folds}; expected different numbers from 0 to {splits.folds - 1} (splits, folds)")
            return []
        return folds

    def _ensembles(self, models: list[str]) -> tuple[tuple[str, ...], ...]:
        wanted = self.content.get("ensembles", "all" if len(models) > 1 else "none")
        if isinstance(wanted, bool):
            wanted = "all" if wanted else "none"
        if wanted == "none":
            return ()
        if wanted == "all":
            return (tuple(models),)
        if wanted == "pairs":
            return tuple(combinations(models, 2))
        if not isinstance(wanted, list) or not all(isinstance(members, list) for members in wanted):
            self._fault(f"ensembles is {wanted!r}; expected {', '.join(_ENSEMBLE_WORDS)} or a list of lists of models")
            return ()
        for members in wanted:
            unknown = [name for name in members if name not in models]
            if unknown:
                self._fault(f"ensembles, {members}: no model is called {', '.join(map(str, unknown))}")
            elif len(set(members)) < 2 or len(set(members)) != len(members):
                self._fault(f"ensembles, {members}: expected at least two different models")
        return tuple(tuple(members) for members in wanted)

    def _resources(self) -> dict[str, dict[str, Any]]:
        resources = {}
        for rule, given in self.content.get("resources", {}).items():
            if rule not in RULES and rule != "default":
                self._fault(f"resources, {rule} is no rule; expected default, {', '.join(RULES)}")
            elif not isinstance(given, dict):
                self._fault(f"resources, {rule} is {given!r}; expected entries such as cpus: 4")
            else:
                for key, value in given.items():
                    self._resource_faults(rule, str(key), value)
                resources[rule] = dict(given)
        return resources

    def _resource_faults(self, rule: str, key: str, value: Any) -> None:
        if key not in RESOURCES:
            self._fault(f"resources, {rule}, {key} is not known; expected {', '.join(RESOURCES)}")
        elif key in ("cpus", "memory_gb", "minutes", "gpus"):
            whole = key in ("cpus", "gpus")
            if not _is_a(value, int if whole else float) or value < 0 or (value == 0 and key != "gpus"):
                self._fault(
                    f"resources, {rule}, {key} is {value!r}; expected a {'whole ' if whole else ''}number above 0"
                )
        elif key == "gpu_types":
            if not isinstance(value, dict) or not all(_is_a(size, float) for size in value.values()):
                self._fault(f"resources, {rule}, gpu_types is {value!r}; expected names with GiB, such as a100: 40")
        elif not _is_a(value, str):
            self._fault(f"resources, {rule}, {key} is {value!r}; expected a text")
        elif key == "slurm_extra":
            for option in (word.strip("'\"").partition("=")[0] for word in value.split()):
                if option in _NOT_EXTRA:
                    self._fault(f"resources, {rule}, slurm_extra has {option}; expected {_NOT_EXTRA[option]} instead")

    # --- entries ----------------------------------------------------------------------------------------------------

    def _fault(self, message: str) -> None:
        self.faults.append(f"{message}.")

    def _entries(self, given: Any, expected: Mapping[str, type], where: str) -> dict[str, Any]:
        """The entries that are known and of the right kind; the others are faults."""
        if not isinstance(given, Mapping):
            self._fault(f"{where.rstrip(', :')} is {given!r}; expected entries {', '.join(expected)}")
            return {}
        entries = {}
        for key, value in given.items():
            if key not in expected:
                self._fault(f"{where}{key} is not known; expected {', '.join(expected)}")
            elif value is None:
                continue  # as if it was not there
            elif not _is_a(value, expected[key]):
                self._fault(f"{where}{key} is {value!r}; expected {_KINDS[expected[key]]}")
            else:
                entries[str(key)] = value
        return entries

    def _path(self, text: str) -> Path:
        return (self.base / Path(os.path.expandvars(text)).expanduser()).absolute()

    def _paths(self, given: Any) -> tuple[Path, ...]:
        return tuple(self._path(str(folder)) for folder in _as_list(given))


_KINDS: Final = {
    str: "a text",
    dict: "entries",
    list: "a list",
    int: "a whole number",
    float: "a number",
    object: "something else",
}


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is object
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind) and (kind is not str or bool(str(value).strip()))


@functools.cache
def _classes_of_nnunet(kind: str) -> frozenset[str]:
    """Names of nnU-Net's trainers or planners, read from its files: importing them would take torch, and seconds."""
    found = importlib.util.find_spec("nnunetv2")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    folder = "training/nnUNetTrainer" if kind == "trainer" else "experiment_planning/experiment_planners"
    files = (Path(found.submodule_search_locations[0]) / folder).rglob("*.py")
    return frozenset(
        name for file in files for name in re.findall(r"^class\s+(\w+)", file.read_text(errors="replace"), re.MULTILINE)
    )


def _texts(content: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """All texts in entries, and where they are."""
    if isinstance(content, str):
        yield where, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            entry = f"{where}, {key}".removeprefix(", ")
            yield from _texts(key, f"the name of {entry!r}")
            yield from _texts(value, entry)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _texts(value, where)


def _can_be_passed_on(text: str) -> bool:
    """Whether a text can be part of a path, an argument or a variable of the environment."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def iterate_trainings(experiment: Experiment) -> Iterator[tuple[Model, int]]:
    """All trainings of an experiment, model by model."""
    for model in experiment.models:
        for fold in experiment.folds:
            yield model, fold
