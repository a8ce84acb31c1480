"""nnU-Net's predictor for a trained model. The model folder is checked before any code in it can run."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nnunet_conres.errors import InputError
from nnunet_conres.nnunet import architecture_errors
from nnunet_conres.registration import TRAINER_FOLDER, VARIABLE, folders, is_active
from nnunet_conres.text import no_device, short_message
from nnunet_conres.unpickling import read_checkpoint

if TYPE_CHECKING:
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

DEFAULT_CHECKPOINT: Final = "checkpoint_final.pth"
DEVICES: Final = ("cuda", "cpu", "mps")


def load_predictor(
    folder: Path,
    folds: Sequence[int | str],
    checkpoint: str = DEFAULT_CHECKPOINT,
    *,
    device: str = "cuda",
    mirroring: bool = True,
    step_size: float = 0.5,
    progress: bool = True,
) -> nnUNetPredictor:
    """Return nnU-Net's predictor with a trained model.

    Args:
        folder: nnU-Net's model folder, with plans.json, dataset.json and a folder for each fold.
        folds: Folds whose predictions are averaged.
        checkpoint: File name in the folders of the folds.
        device: One of `DEVICES`.
        mirroring: Whether to average predictions of mirrored images, if the model was trained with mirroring.
        step_size: Step of the sliding window as a fraction of the patch: above 0, at most 1.
        progress: Whether to show a progress bar over the tiles of a case.

    Raises:
        InputError: There is no such model, it contains more than plain values and tensors, or it cannot be loaded.
    """
    errors = [*model_errors(folder, folds, checkpoint), *settings_errors(device, step_size)]
    if errors:
        raise InputError(errors)
    errors += architecture_errors(folder / "plans.json")
    for fold in folds:
        try:  # nnU-Net's own loading would run code in a checkpoint
            read_checkpoint(folder / f"fold_{fold}" / checkpoint)
        except InputError as error:
            errors.append(str(error))
    if errors:
        raise InputError(errors)

    if not is_active():  # Python was started without the start-up file
        os.environ[VARIABLE] = os.pathsep.join([*folders(), TRAINER_FOLDER])
    # nnU-Net prints which of its variables are not set, where it searches for the trainer, and that it turns off an
    # option that is not on.
    with contextlib.redirect_stdout(io.StringIO()):
        import torch
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        predictor = nnUNetPredictor(
            tile_step_size=step_size,
            use_mirroring=mirroring,
            perform_everything_on_device=device == "cuda",
            device=torch.device(device),
            allow_tqdm=progress,
        )
        try:
            predictor.initialize_from_trained_model_folder(str(folder), tuple(folds), checkpoint)
        except (RuntimeError, KeyError, ValueError) as error:
            raise InputError([f"{folder} cannot be loaded: {short_message(error)}."]) from error
    return predictor


def predict_logits(predictor: nnUNetPredictor, data: torch.Tensor, where: object) -> torch.Tensor:
    """Return the logits of a preprocessed image.

    nnU-Net stops at infinite logits, but turns NaN into background.

    Args:
        predictor: The predictor from `load_predictor`.
        data: The image, (C, z, y, x).
        where: The file or folder of the image, for messages.

    Returns:
        Logits, (classes or regions, z, y, x), on the CPU.

    Raises:
        InputError: Some logits are NaN or infinite.
    """
    logits: torch.Tensor = predictor.predict_logits_from_preprocessed_data(data).cpu()
    if not logits.isfinite().all():
        raise InputError(
            f"{where}: the model predicts NaN. Try -device cpu, which computes in float32. If that does not help, "
            f"choose another checkpoint: the training of this one failed."
        )
    return logits


def model_errors(folder: Path, folds: Sequence[int | str], checkpoint: str) -> Iterator[str]:
    """Yield a message for each missing part of a model folder."""
    missing = [name for name in ("plans.json", "dataset.json") if not (folder / name).is_file()]
    if missing:
        yield (
            f"{folder} is not a trained model: it has no {' and no '.join(missing)}. Expected nnU-Net's folder "
            f"TRAINER__PLANS__CONFIGURATION."
        )
        return
    if not folds:
        yield "No fold given; expected one or more, or all."
    for fold in folds:
        path = folder / f"fold_{fold}" / checkpoint
        if not path.is_file():
            others = sorted(other.name for other in path.parent.glob("checkpoint_*.pth"))
            have = f"only {', '.join(others)}; choose with -chk" if others else "and there is no other checkpoint"
            yield f"{path} does not exist, {have}."


def trained_folds(folder: Path, checkpoint: str = DEFAULT_CHECKPOINT) -> tuple[int | str, ...]:
    """Return the folds of a model that have a checkpoint; fold ``all`` only if there is no other, as in nnU-Net."""
    names = [path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}")]
    folds = tuple(sorted(int(name) for name in names if name.isdecimal()))
    return folds or (("all",) if "all" in names else ())


def settings_errors(device: str, step_size: float) -> Iterator[str]:
    """Yield a message for a device that is unknown or not available, and for a step size that is out of range."""
    import torch

    if device not in DEVICES:
        yield f"The device is {device!r}; expected {', '.join(DEVICES[:-1])} or {DEVICES[-1]}."
    elif (device == "cuda" and not torch.cuda.is_available()) or (
        device == "mps" and not torch.backends.mps.is_available()
    ):
        yield no_device(device, "predict")
    if not 0 < step_size <= 1:
        yield f"The step size is {step_size:g}; expected above 0 and at most 1."
