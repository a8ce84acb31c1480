"""Trained models for a BraTS challenge: check that they can predict its cases, and export their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nnunet_conres.datasets.brats_export import one_scheme, read_tissues
from nnunet_conres.datasets.brats_scheme_files import Scheme
from nnunet_conres.datasets.brats_schemes import SCHEMES, Selection
from nnunet_conres.datasets.brats_write import MISSING_ENTRY, SCHEMES_ENTRY
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.postprocessing import Postprocessing, check_labels, load_postprocessing
from nnunet_conres.families import find_trainer
from nnunet_conres.files import read_json, written_whole
from nnunet_conres.unpickling import read_checkpoint

FILE_ENDING: Final = ".nii.gz"

# Entries of a checkpoint that nnU-Net's predictor reads, besides init_args.
_NEEDED: Final = ("network_weights", "trainer_name", "inference_allowed_mirroring_axes")


@dataclass(frozen=True)
class Challenge:
    """A challenge and its relation to a model that predicts its cases.

    Attributes:
        scheme: The challenge's scheme.
        selection: The scheme, and all schemes that files are recognised by.
        tissues: Tissue of each label of the model.
        table: Maps labels of the model to labels of the challenge; labels without a counterpart are absent.
        missing: Channels that are zero images in some of the model's training cases.
        warnings: Messages for the user.
    """

    scheme: Scheme
    selection: Selection
    tissues: Mapping[int, str]
    table: Mapping[int, int]
    missing: tuple[str, ...]
    warnings: tuple[str, ...]


def challenge_of(folder: Path, scheme: str | None) -> Challenge:
    """Return the challenge whose cases a model is to predict.

    Args:
        folder: nnU-Net's folder of the model.
        scheme: Name of a scheme, or a TOML file that describes one; None for the scheme of the model's data set.

    Raises:
        InputError: The model cannot predict such cases: they have other channels or other tissues, or its labels are
            not BraTS labels. Lists all errors.
    """
    path = folder / "dataset.json"
    content = read_json(path)
    if scheme is None:
        scheme = _own_scheme(path, content)
    challenge, selection, errors = one_scheme(scheme)
    tissues, found = read_tissues(path, challenge)
    errors += found
    if challenge is not None:
        errors += _channel_errors(path, content, challenge)
        tissue_errors, warnings = _tissue_messages(path, list(tissues.values()), challenge)
        errors += tissue_errors
    if content.get("file_ending") != FILE_ENDING:
        errors.append(f"{path} has file_ending {content.get('file_ending')}; expected {FILE_ENDING}, as brats-convert.")
    if errors or challenge is None:
        raise InputError(errors)
    values = {tissue: value for value, tissue in challenge.labels.items()}
    return Challenge(
        scheme=challenge,
        selection=selection,
        tissues=tissues,
        table={0: 0, **{label: values[tissue] for label, tissue in tissues.items() if tissue in values}},
        missing=tuple(content.get(MISSING_ENTRY, ())),
        warnings=tuple(warnings),
    )


def _own_scheme(path: Path, content: Mapping[str, Any]) -> str:
    """Return the scheme of a model's data set."""
    names = content.get(SCHEMES_ENTRY) or []
    if len(names) == 1 and names[0] in SCHEMES:
        return str(names[0])
    what = f"is of the schemes {', '.join(names)}" if names else f"does not name its scheme ({SCHEMES_ENTRY})"
    raise InputError([f"{path} {what}; name the challenge of the cases with --scheme."])


def _channel_errors(path: Path, content: Mapping[str, Any], scheme: Scheme) -> list[str]:
    names = content.get("channel_names", {})
    try:
        channels = tuple(str(name) for _, name in sorted((int(number), name) for number, name in names.items()))
    except (AttributeError, ValueError):
        return [f"{path} has channel_names {names}; expected a name for every number."]
    if channels == scheme.layout.channels:
        return []
    fitting = [other.name for other in SCHEMES.values() if other.layout.channels == channels]
    advice = f"the --scheme is one of {', '.join(fitting)}" if fitting else "no scheme of this package fits"
    return [
        f"{path}: the model was trained with the channels {', '.join(channels)}; cases of {scheme.called} have "
        f"{', '.join(scheme.layout.channels)}. For this model {advice}; for these cases, take a model "
        f"trained on a data set of nnunet-conres brats-convert {scheme.option}."
    ]


def _tissue_messages(path: Path, tissues: Sequence[str], scheme: Scheme) -> tuple[list[str], list[str]]:
    """Return errors and warnings about a model's tissues.

    It is an error if the model has a tissue that the challenge lacks and the challenge has one that the model lacks. If
    only one of them does, it is a warning: a model trained on several years may have a cavity label that its challenge
    does not ask for. A paediatric model divides the tumour core differently and belongs to another challenge.
    """
    beyond = [tissue for tissue in tissues if tissue not in scheme.labels.values()]
    lacking = [tissue for tissue in scheme.labels.values() if tissue not in tissues]
    if beyond and lacking:
        message = (
            f"{path}: the model was trained with the tissues {', '.join(tissues)}; {scheme.called} has "
            f"{', '.join(scheme.labels.values())}. Choose the --scheme whose tissues the model was trained on, or take "
            f"a model trained on a data set of nnunet-conres brats-convert {scheme.option}."
        )
        return [message], []
    warnings = []
    if beyond:
        warnings.append(
            f"{path}: the model predicts {' and '.join(beyond)}, for which {scheme.called} has no label. Cases with "
            f"such predictions will fail."
        )
    if lacking and tissues:
        warnings.append(f"{path}: the model does not predict {' and '.join(lacking)}, which {scheme.called} requires.")
    return [], warnings


def postprocessing_for(path: str | Path, folder: Path) -> Postprocessing:
    """Return the post-processing of a model's label maps.

    Args:
        path: File written by ``nnunet-conres postprocess fit``.
        folder: nnU-Net's folder of the model.

    Raises:
        InputError: The file can't be read, or was fitted to other labels.
    """
    postprocessing = load_postprocessing(path)
    check_labels(postprocessing, read_json(folder / "dataset.json"), folder / "dataset.json")
    return postprocessing


def drops_channels(trainer_name: str) -> bool:
    """Return whether a trainer drops channels in training, so that its models can predict cases that lack any of them.

    Args:
        trainer_name: Name of a class that nnU-Net finds.
    """
    return getattr(find_trainer(trainer_name), "p_channel_dropout", 0) > 0


def write_weights(source: Path, target: Path) -> None:
    """Write the entries of a checkpoint that nnU-Net's predictor needs, without the optimiser's state.

    The new file contains only tensors and plain values, so ``torch.load`` accepts it with ``weights_only=True``.

    Args:
        source: A checkpoint of nnU-Net.
        target: The new file.

    Raises:
        InputError: The checkpoint is damaged, or contains objects other than plain values and tensors.
    """
    import torch

    read_checkpoint(source)  # checked first: torch.load below would run code in it
    checkpoint = torch.load(source, map_location="cpu", weights_only=False)
    arguments = checkpoint["init_args"]
    content = {key: checkpoint[key] for key in _NEEDED if key in checkpoint}
    # Weights are not copied: nnU-Net's decoders list the encoder's weights again, which share their memory.
    content["init_args"] = {"configuration": str(arguments["configuration"]), "fold": arguments.get("fold")}
    with written_whole(target) as partial:
        torch.save(content, partial)
