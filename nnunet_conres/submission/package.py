"""Write the folder that a container for the cases of a BraTS challenge is built from."""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nnunet_conres.datasets.brats_find import Missing
from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.families import find_trainer
from nnunet_conres.files import read_json, write_json
from nnunet_conres.folders import being_written, check_complete, new_folder
from nnunet_conres.nnunet import RESULTS, Model, dataset_name_of, folder_from_environment, not_set
from nnunet_conres.predictor import DEFAULT_CHECKPOINT, load_predictor, model_errors
from nnunet_conres.submission.models import challenge_of, postprocessing_for, write_weights
from nnunet_conres.submission.wheel import distribution_errors, pinned_requirements, write_wheel
from nnunet_conres.unpickling import read_checkpoint

MODEL: Final = "model"
RECORD: Final = "package.json"
_REQUIREMENTS: Final = "requirements.txt"
_DOCKERFILE: Final = "Dockerfile"
_APPTAINER: Final = "apptainer.def"
_README: Final = "README.md"
_POSTPROCESSING: Final = "postprocessing.json"
# Folder of the package's files in the container.
_HOME: Final = "/opt/nnunet-conres"
_FOLDERS: Final = ("-i", "/input", "-o", "/output")


@dataclass(frozen=True)
class Package:
    """Result of `package_model`.

    Attributes:
        folder: The new folder.
        command: Command that runs in the container, without the input and output folders.
        checkpoint_bytes: Size of the original checkpoints.
        model_bytes: Size of the exported checkpoints.
        warnings: Messages for the user.
    """

    folder: Path
    command: tuple[str, ...]
    checkpoint_bytes: int
    model_bytes: int
    warnings: tuple[str, ...] = ()


def package_model(
    dataset: int | str,
    model: Model,
    folds: Sequence[int | str],
    output_folder: str | Path,
    *,
    scheme: str | None = None,
    missing: Missing | None = None,
    postprocessing: str | Path | None = None,
    checkpoint: str = DEFAULT_CHECKPOINT,
) -> Package:
    """Write a folder from which Docker, Podman or Apptainer builds a container that runs `predict_brats`.

    The folder contains the model without its optimiser's state, this package as a wheel, the versions of its installed
    dependencies, and the files that build the container.

    Args:
        dataset: Number or name of the data set that the model was trained on.
        model: The model, in nnUNet_results.
        folds: Folds whose predictions are averaged.
        output_folder: Must not exist, or must be empty. Its files appear only when all are complete.
        scheme: The challenge, as for `predict_brats`.
        missing: As for `predict_brats`.
        postprocessing: As for `predict_brats`.
        checkpoint: Name of the checkpoint file in a fold's folder.

    Raises:
        InputError: The model cannot predict the challenge's cases, or the output folder is not empty. Lists all errors.
    """
    from nnunet_conres import __version__

    output = Path(output_folder).resolve()
    errors = [*being_written(output), *distribution_errors()]
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        errors.append(f"{output} exists already and is not an empty folder; remove it, or choose another -o.")
    source: Path | None = None
    if folder_from_environment(RESULTS) is None:
        errors.append(not_set(RESULTS))
    else:
        try:
            source = model.folder(dataset_name_of(dataset))
        except InputError as error:
            errors += error.errors
    if source is None:
        raise InputError(errors)
    errors += model_errors(source, folds, checkpoint)
    if len(set(folds)) < len(folds):
        errors.append(f"The folds are {' '.join(map(str, folds))}; expected each only once.")
    if (source / "dataset.json").is_file():
        try:
            challenge = challenge_of(source, scheme)
        except InputError as error:
            errors += error.errors
        if postprocessing is not None:
            try:
                postprocessing_for(postprocessing, source)
            except InputError as error:
                errors += error.errors
    if not errors:
        errors += _trainer_errors(source, model, folds, checkpoint)
    if errors:
        raise InputError(errors)

    own_scheme = challenge.scheme.path
    # No spaces: the files that build the container separate names by spaces.
    scheme_file = "" if own_scheme is None else f"{re.sub('[^A-Za-z0-9-]+', '_', own_scheme.stem)}.toml"
    command = ["nnunet-conres", "predict-brats", "-m", f"{_HOME}/{MODEL}"]
    command += ["--scheme", challenge.scheme.name if own_scheme is None else f"{_HOME}/{scheme_file}"]
    command += [] if missing is None else ["--missing", missing]
    command += [] if postprocessing is None else ["--postprocessing", f"{_HOME}/{_POSTPROCESSING}"]
    requirements, warnings = pinned_requirements()
    with new_folder(output) as partial, file_errors(output):
        weights = [
            (source / f"fold_{fold}" / checkpoint, partial / MODEL / f"fold_{fold}" / DEFAULT_CHECKPOINT)
            for fold in folds
        ]
        for trained, exported in weights:
            exported.parent.mkdir(parents=True)
            write_weights(trained, exported)
        copied = [(source / name, partial / MODEL / name) for name in ("dataset.json", "plans.json")]
        extra = [] if own_scheme is None else [(own_scheme, partial / scheme_file)]
        extra += [] if postprocessing is None else [(Path(postprocessing), partial / _POSTPROCESSING)]
        copied += extra
        for original, copy in copied:
            shutil.copyfile(original, copy)
        wheel = write_wheel(partial)
        (partial / _REQUIREMENTS).write_text("\n".join([*requirements, ""]), encoding="utf-8")
        others = [copy.name for _, copy in extra]
        (partial / _DOCKERFILE).write_text(_dockerfile(wheel.name, others, command), encoding="utf-8")
        (partial / _APPTAINER).write_text(_apptainer(wheel.name, others, command), encoding="utf-8")
        (partial / _README).write_text(_readme(output.name, challenge.scheme.title), encoding="utf-8")
        about = {
            "version": __version__,
            "data_set": source.parent.name,
            "model": model.folder_name,
            "folds": list(folds),
            "checkpoint": checkpoint,
            "scheme": challenge.scheme.name,
            "command": command,
        }
        write_json(partial / RECORD, about)
        # Load the model as the container will, so that no unusable package is completed.
        load_predictor(partial / MODEL, folds, device="cpu", progress=False)
        check_complete(partial, [_DOCKERFILE, _APPTAINER, _README, _REQUIREMENTS, RECORD, wheel.name])
        trained_bytes = sum(trained.stat().st_size for trained, _ in weights)
        exported_bytes = sum(exported.stat().st_size for _, exported in weights)
    return Package(output, tuple(command), trained_bytes, exported_bytes, (*challenge.warnings, *warnings))


def _trainer_errors(source: Path, model: Model, folds: Sequence[int | str], checkpoint: str) -> list[str]:
    """Return errors about a model's trainer, checkpoints and configuration.

    A container has only the trainers of nnU-Net and of this package.
    """
    errors: list[str] = []
    for fold in folds:
        path = source / f"fold_{fold}" / checkpoint
        try:
            content: dict[str, Any] = read_checkpoint(path)
        except InputError as error:
            errors += error.errors
            continue
        trainer = content.get("trainer_name")
        if trainer != model.trainer or not isinstance(content.get("init_args"), dict):
            errors.append(f"{path} was trained by {trainer}; expected a checkpoint of nnU-Net by {model.trainer}.")
    configurations = read_json(source / "plans.json").get("configurations", {})
    if "previous_stage" in configurations.get(model.configuration, {}):
        errors.append(f"{source} is the second stage of a cascade, which is not supported; take another model.")
    try:
        module = find_trainer(model.trainer).__module__
    except InputError as error:
        return [*errors, *error.errors]
    if module.partition(".")[0] not in ("nnunetv2", "nnunet_conres"):
        errors.append(
            f"The trainer {model.trainer} is in {module}, which the container would not have; expected one of nnU-Net "
            f"or of nnunet-conres."
        )
    return errors


# --- the files that build a container -------------------------------------------------------------------------------

_PYTHON: Final = f"python:{platform.python_version()}-slim"


# A container may run as any user, without a home directory, and with only /output and /tmp writable.
_ENVIRONMENT: Final = {
    "HOME": "/tmp",
    "MPLCONFIGDIR": "/tmp/matplotlib",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}


def _dockerfile(wheel: str, others: Sequence[str], command: Sequence[str]) -> str:
    copies = "".join(f"COPY {name} {_HOME}/\n" for name in others)
    environment = " \\\n    ".join(f"{name}={value}" for name, value in _ENVIRONMENT.items())
    return f"""\
# Reads /input/CASE/..., writes /output/CASE.nii.gz. Needs no network once it is built.
ARG BASE={_PYTHON}
FROM ${{BASE}}

ENV {environment}

COPY {_REQUIREMENTS} {wheel} {_HOME}/
RUN pip install --no-cache-dir -r {_HOME}/{_REQUIREMENTS} \\
    && pip install --no-cache-dir --no-deps {_HOME}/{wheel} \\
    && pip check

{copies}COPY {MODEL} {_HOME}/{MODEL}

ENTRYPOINT {json.dumps(command)}
CMD {json.dumps(_FOLDERS)}
"""


def _apptainer(wheel: str, others: Sequence[str], command: Sequence[str]) -> str:
    files = "\n".join(f"    {name} {_HOME}/{name}" for name in (_REQUIREMENTS, wheel, *others, MODEL))
    environment = "\n".join(f"    export {name}={value}" for name, value in _ENVIRONMENT.items() if name != "HOME")
    return f"""\
# Reads /input/CASE/..., writes /output/CASE.nii.gz. Needs no network once it is built.
Bootstrap: docker
From: {_PYTHON}

%files
{files}

%post
    pip install --no-cache-dir -r {_HOME}/{_REQUIREMENTS}
    pip install --no-cache-dir --no-deps {_HOME}/{wheel}
    pip check

%environment
{environment}

%runscript
    if [ "$#" = 0 ]; then set -- {shlex.join(_FOLDERS)}; fi
    exec {shlex.join(command)} "$@"
"""


def _readme(name: str, title: str) -> str:
    image = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "submission"
    return f"""\
# {title}: a container of nnunet-conres

Reads `/input/CASE/...` as the challenge names files, writes `/output/CASE.nii.gz` with the challenge's labels and in
the case's geometry. `/output/predict-brats.json` lists the result of each case. Exit code 0: all cases were written;
1: some cases failed; 2: no case was predicted.

```bash
docker build -t {image} .
docker run --rm --network none --gpus all --memory 16G --shm-size 4G \\
    -v /PATH/CASES:/input:ro -v /PATH/PREDICTIONS:/output {image}
docker save {image} | gzip > {image}.tar.gz
```

Use absolute paths with `-v`: Docker takes a bare name for a volume. For Podman, replace `docker` by `podman`, and
`--gpus all` by `--device nvidia.com/gpu=all`. With Apptainer:

```bash
apptainer build {image}.sif {_APPTAINER}
apptainer run --nv --containall --net --network none -B CASES:/input:ro -B PREDICTIONS:/output {image}.sif
```

Without a GPU, the container predicts on the CPU, which takes much longer. `{_REQUIREMENTS}` pins the versions that the
model was packaged with; `{RECORD}` describes the model.
"""
