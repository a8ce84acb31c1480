"""What a trained network of the study makes of its residual stream: gradients, attention, and what happens without."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from forms import BorderMapLoss, ModuleForm, border
from runs import Run, Setting
from sklearn.metrics import average_precision_score
from steps import network_trainer, results_in
from torch import Tensor, nn

from nnunet_conres.architectures.context_residual import ContextResidualModule
from nnunet_conres.losses import ConResLoss
from nnunet_conres.residuals import inter_slice_residual


class _Flat(ModuleForm):
    """Attention replaced by its mean over voxels of the batch: it scales channels, and says nothing of where."""

    def attended(self, features: Tensor, residual: Tensor) -> Tensor:
        if not self.attends:
            return features
        return features * self.attention(residual).mean((0, 2, 3, 4), keepdim=True)


class _Untold(ModuleForm):
    """The stream is told nothing of the features' residual."""

    def told(self, features: Tensor) -> Tensor:
        return torch.zeros_like(super().told(features))


WITHOUT: dict[str, type[ModuleForm]] = {"attention over space": _Flat, "the features' residual": _Untold}


def look(
    study: dict[str, Any],
    run: Run,
    folder: Path,
    setting: Setting,
    fold: int,
    batches: int,
    checkpoint: Path,
    work: Path,
) -> dict[str, Any]:
    """What there is to see of one training, on patches of its validation cases that are the same for all networks.

    Args:
        study: Content of runs.yaml.
        run: Which training.
        folder: nnU-Net's folder of the preprocessed data set, with the plans.
        setting: Data set, batch and device.
        fold: Whose validation cases.
        batches: How many.
        checkpoint: Of the training.
        work: Folder for what the trainer writes.

    Returns:
        Medians over batches of ``segmentation_gradient`` and ``residual_gradient``, norms over all parameters of both
        parts' gradients as they are added, and of the ``cosine`` between them in the encoder; ``dice`` over all voxels,
        as trained and by what is taken away; ``attention``, mean and standard deviation over voxels by level, coarsest
        first; ``residual_precision`` and ``segmentation_precision``, average precision of the finest residual maps, and
        of the differences of the predicted segmentation between slices, as predictions of the annotation's residual.
        What the network does not have is left out, also residual maps where their weight is 0 or they are not trained.

    Raises:
        ValueError: If there are labels to ignore, which are not told from background here.
    """
    os.environ["nnUNet_n_proc_DA"] = "1"  # so that the order of the batches is settled
    with results_in(work):
        trainer = network_trainer(study, run.network, folder, setting, fold)
        weights = torch.load(checkpoint, map_location=trainer.device, weights_only=False)["network_weights"]
        trainer.network.load_state_dict(weights)
        trainer.on_train_start()
        drawn = [next(trainer.dataloader_val) for _ in range(batches)]
        for loader in (trainer.dataloader_train, trainer.dataloader_val):
            loader._finish()
    if trainer.label_manager.has_ignore_label:
        raise ValueError("look does not know what to make of labels that are ignored.")
    found: dict[str, Any] = {}
    has_maps = type(trainer.loss) is ConResLoss and trainer.loss.residual_weight > 0
    if has_maps:
        found |= gradients(trainer.network, trainer.loss, drawn)
    trainer.network.eval()
    with torch.no_grad():
        found["dice"] = {"": dice(trainer, drawn)}
        modules = [stage for stage in trainer.network.modules() if isinstance(stage, ContextResidualModule)]
        if modules:
            found["attention"] = attention(trainer.network, modules, drawn)
            for name, module in WITHOUT.items():
                with replaced(trainer.network, module):
                    found["dice"][name] = dice(trainer, drawn)
        if has_maps:
            found |= precision(trainer, drawn)
    return found


def gradients(network: nn.Module, loss: Any, drawn: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Norms of the gradients of both parts of ConResNet's objective and their cosine, as at ``look``."""
    parameters = list(network.parameters())
    encoder = {id(parameter) for parameter in network.encoder.parameters()}
    values: dict[str, list[float]] = {"segmentation_gradient": [], "residual_gradient": [], "cosine": []}
    for batch in drawn:
        outputs, targets = network(batch["data"]), batch["target"]
        segmentation = loss.segmentation(outputs[: loss.n_segmentation_outputs], targets)
        residual = loss.residual_weight * loss.residual(outputs[loss.n_segmentation_outputs :], targets[0])[0]
        of_parts = []
        for part in (segmentation, residual):
            given = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
            of_parts.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, given, strict=True)])
        for name, part in zip(("segmentation_gradient", "residual_gradient"), of_parts, strict=True):
            values[name].append(float(torch.cat([gradient.flatten() for gradient in part]).norm()))
        shared = [
            torch.cat([g.flatten() for p, g in zip(parameters, part, strict=True) if id(p) in encoder])
            for part in of_parts
        ]
        values["cosine"].append(float(torch.cosine_similarity(*shared, dim=0)))
    return {name: statistics.median(numbers) for name, numbers in values.items()}


def dice(trainer: Any, drawn: Sequence[dict[str, Any]]) -> float:
    """Mean over labels or regions of the Dice over all voxels of all patches."""
    regions = trainer.label_manager.has_regions
    overlap = sizes = torch.zeros(())
    for batch in drawn:
        output, target = trainer.network(batch["data"])[0], batch["target"][0]
        if regions:
            predicted, truth = output > 0, target.bool()
        else:
            labels = torch.arange(1, output.shape[1]).view(1, -1, 1, 1, 1)
            predicted, truth = output.argmax(1, keepdim=True) == labels, target == labels
        overlap = overlap + (predicted & truth).sum((0, 2, 3, 4))
        sizes = sizes + predicted.sum((0, 2, 3, 4)) + truth.sum((0, 2, 3, 4))
    return float((2 * overlap / sizes).mean())


def attention(
    network: nn.Module, modules: Sequence[ContextResidualModule], drawn: Sequence[dict[str, Any]]
) -> list[tuple[float, float]]:
    """Mean and standard deviation over voxels, both averaged over channels and batches, of each level's attention."""
    seen: list[list[tuple[float, float]]] = [[] for _ in modules]

    def note(number: int) -> Any:
        def hook(module: ContextResidualModule, _: Any, output: tuple[Tensor, Tensor]) -> None:
            values = module.attention(output[1])
            seen[number].append((float(values.mean()), float(values.std((0, 2, 3, 4)).mean())))

        return hook

    hooks = [module.register_forward_hook(note(number)) for number, module in enumerate(modules)]
    for batch in drawn:
        network(batch["data"])
    for hook in hooks:
        hook.remove()
    return [(statistics.fmean(m for m, _ in level), statistics.fmean(s for _, s in level)) for level in seen]


@contextlib.contextmanager
def replaced(network: Any, form: type[ModuleForm]) -> Iterator[None]:
    """The network with its context residual modules changed as the form says, whatever else they are."""
    modules = [module for module in network.decoder.stages if isinstance(module, ContextResidualModule)]
    before = [type(module) for module in modules]
    for module in modules:
        own = type(module) if isinstance(module, ModuleForm) else ModuleForm
        module.__class__ = form if own is ModuleForm else type("Changed", (form, own), {})
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.__class__ = own


def precision(trainer: Any, drawn: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Average precision of residual maps and of the segmentation's own residual, as at ``look``."""
    loss, axis = trainer.loss, trainer.loss.residual.slice_axis
    background = 1 if loss.residual.background_channel else 0
    truths, maps, derived = [], [], []
    for batch in drawn:
        outputs = trainer.network(batch["data"])
        truth, mask = loss.residual.residual_of(batch["target"][0])
        probability = torch.softmax(outputs[0], 1)[:, 1:] if background else torch.sigmoid(outputs[0])
        defined = torch.ones_like(truth) if mask is None else mask.expand_as(truth)
        of_segmentation = (
            border(probability) if isinstance(loss.residual, BorderMapLoss) else inter_slice_residual(probability, axis)
        )
        predictions = (outputs[loss.n_segmentation_outputs][:, background:], of_segmentation)
        for values, kept in zip((truth, *predictions), (truths, maps, derived), strict=True):
            kept.append([values[:, c][defined[:, c]] for c in range(truth.shape[1])])
    joined = [[torch.cat(parts) for parts in zip(*of_batches, strict=True)] for of_batches in (truths, maps, derived)]

    def score(predicted: Sequence[Tensor]) -> float:
        pairs = zip(joined[0], predicted, strict=True)
        return statistics.fmean(average_precision_score(truth.numpy(), values.numpy()) for truth, values in pairs)

    return {"residual_precision": score(joined[1]), "segmentation_precision": score(joined[2])}
