"""The configuration of an experiment: read from YAML, checked as a whole."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from nnunet_conres import nnunet
from nnunet_conres.datasets.raw import folder_name
from nnunet_conres.errors import InputError
from nnunet_conres.families import PLANNED, TRAINERS
from nnunet_conres.nnunet import FOLDER_VARIABLES
from nnunet_conres.registration import VARIABLE
from nnunet_conres.text import did_you_mean
from nnunet_conres.workflow import schema
from nnunet_conres.workflow.schema import Splits

# Planners of the plans that need no entry in the configuration: those of nnU-Net, and those of this package.
STOCK_PLANNERS: Final = {
    "nnUNetPlans": "ExperimentPlanner",
    "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM",
    "nnUNetResEncUNetLPlans": "nnUNetPlannerResEncL",
    "nnUNetResEncUNetXLPlans": "nnUNetPlannerResEncXL",
}
OWN_PLANNERS: Final = {family.plans_name: key for key, family in PLANNED.items()}
STOCK_LENGTHS: Final = (1, 5, 10, 20, 50, 100, 250, 500, 2000, 4000, 8000)
_STANDARD_EPOCHS: Final = 1000


@dataclass(frozen=True)
class Model(nnunet.Model):
    """A model to train.

    Attributes:
        name: Name in reports, logs and job names.
        gpus: GPUs of one training (``-num_gpus``).
        epoch_seconds: Seconds of an epoch; None if the configuration does not give them.
    """

    name: str
    gpus: int = 1
    epoch_seconds: float | None = None


@dataclass(frozen=True)
class Plans:
    """How plans are made.

    Attributes:
        name: Name of the plans.
        planner: A planner class of nnU-Net, the name of a network for ``nnunet-conres plan -a``, or ``none`` for
            existing plans that were made by hand.
        gpu_memory_target: GiB; None for the planner's default.
    """

    name: str
    planner: str
    gpu_memory_target: float | None = None

    @property
    def is_own(self) -> bool:
        """Whether `nnunet-conres plan` makes them."""
        return self.planner in OWN_PLANNERS.values()


@dataclass(frozen=True)
class Experiment:
    """An experiment; all paths are absolute.

    Attributes:
        work: Folder for records, logs, predictions and reports.
        dataset: Full name of the data set.
        brats: Folders to convert; empty for an existing data set.
        held_out: Folders whose images and labels are for testing only.
        corrected: Folders of files that replace those of the same cases.
        scheme: Schemes that `nnunet-conres brats-convert` may use, or files that describe one.
        missing: How it treats missing modalities: "refuse" or "zero".
        models: The models, the baseline first.
        plans: The plans that the models need, by name.
        folds: Folds to train.
        splits: How the folds are chosen.
        test_images: Folder with test images; None without a test.
        test_labels: Folder with their labels; None if there are none.
        parts: Number of jobs that predict the test cases of a model.
        ensembles: Names of the models of every ensemble.
        rules: The challenge whose rules the reports apply; None for this package's own metrics.
        postprocess: Whether to choose post-processing for each model, which needs probabilities.
        packaged: Names of the models to write a container's folder for.
        package_scheme: The challenge whose cases the containers predict; None for that of the data set.
        package_missing: How containers treat missing modalities, as in `nnunet-conres package`.
        device: Device for training and prediction.
        checkpoint_minutes: Minutes between two checkpoints of this package's trainers.
        retries: Minimum number of restarts of an unfinished training.
        time_limit_hours: The queue's time limit for a job.
        environment: Additional variables for all commands, including nnU-Net's three folders.
        resources: Resources that replace the estimates, by rule.
    """

    work: Path
    dataset: str
    models: tuple[Model, ...]
    plans: Mapping[str, Plans]
    brats: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()
    corrected: tuple[Path, ...] = ()
    scheme: tuple[str, ...] = ("auto",)
    missing: str = "refuse"
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    splits: Splits = field(default_factory=Splits)
    test_images: Path | None = None
    test_labels: Path | None = None
    parts: int = 1
    ensembles: tuple[tuple[str, ...], ...] = ()
    rules: str | None = None
    postprocess: bool = False
    packaged: tuple[str, ...] = ()
    package_scheme: str | None = None
    package_missing: str | None = None
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
        return bool(self.ensembles) or self.postprocess

    def model(self, name: str) -> Model:
        return next(model for model in self.models if model.name == name)

    def model_folder(self, model: Model) -> Path:
        """Return nnU-Net's folder of a trained model."""
        results = Path(self.environment["nnUNet_results"])
        return results / self.dataset / model.folder_name

    def fold_folder(self, model: Model, fold: int) -> Path:
        return self.model_folder(model) / f"fold_{fold}"

    def fold_lock(self, model: Model, fold: int) -> Path:
        """Return the lock that a training of a fold holds. It is outside the fold's folder, which may be moved."""
        return self.model_folder(model) / "workflow" / f"fold_{fold}.lock"

    def training_log(self, model: Model, fold: int) -> Path:
        """Return the file with the output of all attempts to train a fold."""
        return self.logs / "train" / model.name / f"fold_{fold}.log"

    def predictions(self, name: str) -> Path:
        """Return the folder with the predictions of a model or an ensemble for the test cases."""
        return self.work / "predictions" / name

    def postprocessing(self, name: str) -> Path:
        """Return the file with the post-processing of a model."""
        return self.work / "postprocessing" / f"{name}.json"

    def package(self, name: str) -> Path:
        """Return the folder that a model's container is built from."""
        return self.work / "packages" / name


def ensemble_name(members: tuple[str, ...]) -> str:
    """Return the name of an ensemble, which is also the name of its folder of predictions."""
    return "+".join(members)


def read_config(path: Path) -> Experiment:
    """Read the configuration of an experiment.

    Args:
        path: A YAML file; relative paths in it are relative to its folder.

    Raises:
        InputError: The configuration is invalid. Lists all errors.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Loader that rejects duplicate keys.

        YAML silently keeps the last of two equal keys, which would drop one of two models with the same name.
        """

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            twice = [key for number, key in enumerate(keys) if key in keys[:number]]
            if twice:
                raise yaml.YAMLError(f"{twice[0]} occurs twice in the entries from line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError([f"{path} cannot be read as YAML: {' '.join(str(error).split())}."]) from error
    if not isinstance(content, dict):
        raise InputError([f"{path} contains no configuration; expected entries such as data and models."])
    return parse_config(content, path.resolve().parent, str(path))


def parse_config(content: Mapping[str, Any], base: Path, where: str = "the configuration") -> Experiment:
    """Build an experiment from the content of a YAML file.

    Args:
        content: The entries.
        base: Folder that relative paths are relative to.
        where: Name of the file, for messages.

    Raises:
        InputError: The configuration is invalid. Lists all errors.
    """
    file, errors, wrong = schema.read(content, base)
    reader = _Reader(file, base, errors, wrong)
    experiment = reader.experiment()
    if errors:
        raise InputError([f"{where}: {error}{'' if error.endswith('?') else '.'}" for error in errors])
    return experiment


class _Reader:
    """Build an experiment from entries that passed validation.

    Contradictions between entries are added to `errors`. Entries named in `wrong` already have an error and are not
    reported as missing.
    """

    def __init__(self, file: schema.ExperimentFile, base: Path, errors: list[str], wrong: set[str]) -> None:
        self.file = file
        self.base = base
        self.errors = errors
        self.wrong = wrong

    def experiment(self) -> Experiment:
        file = self.file
        work = file.work or (self.base / "experiment").absolute()
        if re.search("[{}<>]", str(work)):
            self.errors.append(f"work is {work}; expected a folder without {{, }}, < and > in its path, for Snakemake")
        environment = self._environment()
        models = self._models()
        plans = self._plans(models)
        dataset = self._dataset(environment)
        images, labels, parts = self._test(environment, dataset)
        folds = self._folds()
        if file.postprocess and len(folds) < 2:
            self.errors.append("postprocess is true, but there is one fold; expected two or more")
        package = file.package or schema.Package()
        return Experiment(
            work=work,
            dataset=dataset,
            brats=file.data.brats,
            held_out=file.data.held_out,
            corrected=file.data.corrected,
            scheme=file.data.scheme,
            missing=file.data.missing,
            models=tuple(models),
            plans=plans,
            folds=folds,
            splits=file.splits,
            test_images=images,
            test_labels=labels,
            parts=parts,
            ensembles=self._ensembles([model.name for model in models]),
            rules=file.rules,
            postprocess=file.postprocess,
            packaged=self._packaged(models),
            package_scheme=package.scheme,
            package_missing=package.missing,
            device=file.device,
            checkpoint_minutes=file.checkpoint_minutes,
            retries=file.retries,
            time_limit_hours=file.time_limit_hours,
            environment=environment,
            resources={rule: given.model_dump(exclude_unset=True) for rule, given in file.resources.items()},
        )

    def _environment(self) -> dict[str, str]:
        environment = dict(self.file.environment)
        if environment.get("nnUNet_n_proc_DA") == "0":
            self.errors.append("environment, nnUNet_n_proc_DA is 0, with which nnU-Net cannot plan; expected 1 or more")
        for variable in FOLDER_VARIABLES:
            given = environment.get(variable) or os.environ.get(variable)
            folder = getattr(self.file.folders, variable) or (
                given and self.base / Path(os.path.expandvars(given)).expanduser()
            )
            if folder:
                environment[variable] = str(folder.absolute())
            elif "folders" not in self.wrong:
                self.errors.append(f"{variable} is not known; set the environment variable or folders, {variable}")
        return environment

    def _dataset(self, environment: Mapping[str, str]) -> str:
        data = self.file.data
        if data.id is None or "data" in self.wrong:
            if "data" not in self.wrong:
                self.errors.append("data, id is missing; expected nnU-Net's number of the data set, for example 501")
            return ""
        if data.brats:
            return folder_name(data.id, data.name or "BraTS")
        for key in ("held_out", "corrected", "scheme", "missing"):
            if key in data.model_fields_set:
                self.errors.append(f"data, {key} needs brats, which is missing")
        if data.name is not None:
            return folder_name(data.id, data.name)
        found = {
            folder.name
            for variable in FOLDER_VARIABLES[:2]
            if variable in environment
            for folder in Path(environment[variable]).glob(f"Dataset{data.id:03d}_*")
        }
        if len(found) == 1:
            return found.pop()
        what = ", ".join(sorted(found)) or "no data set"
        self.errors.append(f"data, id {data.id}: found {what}; expected one in nnUNet_raw, or data, brats to convert")
        return ""

    def _test(self, environment: Mapping[str, str], dataset: str) -> tuple[Path | None, Path | None, int]:
        test, held_out = self.file.test, self.file.data.held_out
        if test is None and not held_out:
            return None, None, 1
        test = test or schema.Test()
        if test.images is not None:
            return test.images, test.labels, test.parts
        if "test" in self.wrong:
            return None, None, 1
        if test.labels is not None:
            self.errors.append("test, labels needs images, which is missing; data, held_out includes labels")
        elif not held_out and "data" not in self.wrong:
            self.errors.append("test, images is missing; expected the folder with test images")
        raw = Path(environment.get("nnUNet_raw", "")) / dataset
        return raw / "imagesTs", raw / "labelsTs", test.parts

    def _models(self) -> list[Model]:
        if not self.file.models and "models" not in self.wrong:
            self.errors.append("models is missing; expected at least one, such as nnU-Net: {trainer: nnUNetTrainer}")
        models: list[Model] = []
        identities: dict[tuple[str, str, str], str] = {}
        for name, given in self.file.models.items():
            where = f"models, {name}: "
            trainer = self._with_epochs(given, where)
            if "cascade" in given.configuration:
                self.errors.append(
                    f"{where}{given.configuration} needs another model's predictions; train cascades by hand"
                )
            if given.gpus > 1 and self.file.device != "cuda":
                self.errors.append(f"{where}{given.gpus} GPUs, but device is {self.file.device}; expected gpus: 1")
            self._check_class(where, "trainer", given.trainer)
            model = Model(trainer, given.plans, given.configuration, name, given.gpus, given.epoch_seconds)
            identity = (model.trainer, model.plans, model.configuration)
            if f"models, {name}" not in self.wrong:  # an invalid entry was replaced by its default
                if identity in identities:
                    self.errors.append(f"models, {name} and {identities[identity]} are the same: {' '.join(identity)}")
                identities[identity] = name
            models.append(model)
        return models

    def _with_epochs(self, model: schema.ModelEntries, where: str) -> str:
        """Return the name of the trainer's variant for the number of epochs."""
        trainer, epochs = model.trainer, model.epochs or self.file.epochs
        if epochs == _STANDARD_EPOCHS or (re.search(r"_\d+epochs?$", trainer) and model.epochs is None):
            return trainer
        ending = "1epoch" if epochs == 1 else f"{epochs}epochs"
        named = f"{trainer}_{ending}"
        if named in TRAINERS or (trainer == "nnUNetTrainer" and epochs in STOCK_LENGTHS):
            return named
        self.errors.append(
            f"{where}{trainer} has no variant of {epochs} epochs; expected one of "
            f"{', '.join(map(str, STOCK_LENGTHS[:-2]))} for nnUNetTrainer and the plain trainers of this package, or "
            f"epochs: {_STANDARD_EPOCHS}, which keeps the trainer's own number"
        )
        return trainer

    def _plans(self, models: list[Model]) -> dict[str, Plans]:
        used = list(dict.fromkeys(model.plans for model in models))
        for name in self.file.plans:
            if name not in used and "models" not in self.wrong:
                self.errors.append(f"plans, {name}: no model uses these plans")
        plans = {}
        for name in used:
            given = self.file.plans.get(name, schema.PlansEntries())
            planner = given.planner or (STOCK_PLANNERS | OWN_PLANNERS).get(name)
            if planner is None:
                self.errors.append(
                    f"plans, {name}: planner is missing; expected a planner class of nnU-Net's, one of "
                    f"{', '.join(OWN_PLANNERS.values())}, or none for plans that exist already"
                )
                continue
            if planner != "none" and planner not in OWN_PLANNERS.values():
                self._check_class(f"plans, {name}: ", "planner", planner)
            plans[name] = Plans(name, planner, given.gpu_memory_target)
        return plans

    def _check_class(self, where: str, kind: str, name: str) -> None:
        """Add an error for an unknown class, which would otherwise fail only after hours of preprocessing."""
        known = _classes_of_nnunet(kind)
        if not known or name in known or (kind == "trainer" and (name in TRAINERS or self._is_users_own(name))):
            return
        hint = did_you_mean(name, [*known, *(TRAINERS if kind == "trainer" else OWN_PLANNERS.values())]).rstrip(".")
        own = ", and none in the folders of nnUNet_extTrainer" if kind == "trainer" else ""
        self.errors.append(f"{where}nnU-Net and this package have no {kind} called {name}{own}{hint}")

    def _packaged(self, models: list[Model]) -> tuple[str, ...]:
        """Return the names of the models to package.

        A trainer that containers lack is an error here, because packaging would fail only after all trainings.
        """
        if self.file.package is None:
            return ()
        trainers = {model.name: model.trainer for model in models}
        chosen = self.file.package.models or tuple(trainers)
        known = _classes_of_nnunet("trainer")
        for name in dict.fromkeys(chosen):
            if name not in trainers:
                if "models" not in self.wrong:
                    self.errors.append(f"package, models: no model is called {name}")
            elif self._is_users_own(trainers[name]) and trainers[name] not in (*known, *TRAINERS):
                self.errors.append(
                    f"package, models: {name} uses the trainer {trainers[name]} from nnUNet_extTrainer, which a "
                    f"container does not have; expected a model with a trainer of nnU-Net or of this package"
                )
        return tuple(dict.fromkeys(chosen))

    def _is_users_own(self, name: str) -> bool:
        """Return whether a file in nnUNet_extTrainer mentions a class. It may define, generate or import the class."""
        given = self.file.environment.get(VARIABLE) or os.environ.get(VARIABLE, "")
        word = re.compile(rf"\b{re.escape(name)}\b")
        folders = [Path(folder) for folder in given.split(os.pathsep) if folder]
        return any(word.search(path.read_text(errors="replace")) for one in folders for path in one.rglob("*.py"))

    def _folds(self) -> tuple[int, ...]:
        number = self.file.splits.folds
        folds = list(range(number)) if self.file.folds is None else self.file.folds
        if not folds or len(set(folds)) < len(folds) or not set(folds) <= set(range(number)):
            self.errors.append(f"folds is {folds}; expected different numbers from 0 to {number - 1} (splits, folds)")
        return tuple(folds)

    def _ensembles(self, models: list[str]) -> tuple[tuple[str, ...], ...]:
        wanted = self.file.ensembles
        if wanted is None:
            wanted = len(models) > 1
        if wanted in (False, "none"):
            return ()
        if wanted in (True, "all"):
            return (tuple(models),)
        if wanted == "pairs":
            return tuple(combinations(models, 2))
        for members in wanted:
            unknown = [name for name in members if name not in models]
            if unknown:
                self.errors.append(f"ensembles, {members}: no model is called {', '.join(unknown)}")
            elif len(set(members)) < 2 or len(set(members)) != len(members):
                self.errors.append(f"ensembles, {members}: expected at least two different models")
        return tuple(tuple(members) for members in wanted)


@functools.cache
def _classes_of_nnunet(kind: str) -> frozenset[str]:
    """Return the names of nnU-Net's trainers or planners, read from its source files.

    Importing them would load torch, which takes seconds.
    """
    found = importlib.util.find_spec("nnunetv2")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    folder = "training/nnUNetTrainer" if kind == "trainer" else "experiment_planning/experiment_planners"
    files = (Path(found.submodule_search_locations[0]) / folder).rglob("*.py")
    return frozenset(
        name for file in files for name in re.findall(r"^class\s+(\w+)", file.read_text(errors="replace"), re.MULTILINE)
    )


def iterate_trainings(experiment: Experiment) -> Iterator[tuple[Model, int]]:
    """Yield all trainings of an experiment, model by model."""
    for model in experiment.models:
        for fold in experiment.folds:
            yield model, fold
