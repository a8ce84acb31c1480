"""The losses in the operations of `ledger`: nnU-Net's Dice with cross-entropy, and ConResNet's residual maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nnunet_conres.planning.ledger import FLOAT32, HALF, Ledger, Sized, Storage
from nnunet_conres.planning.training_step import TrainingStep, target_sizes


class Loss:
    """What training under nnU-Net's recipe minimises.

    The annotation is part of the batch: it is alive from the start.
    """

    def __init__(self, step: TrainingStep, ledger: Ledger) -> None:
        self.step = step
        self.ledger = ledger
        self.targets = [ledger.storage(self._target_bytes(size)) for size in target_sizes(step)]

    def _target_bytes(self, size: Sequence[int]) -> int:
        voxels = self.step.batch_size * math.prod(size)
        if self.step.has_regions:
            return voxels * (self.step.output_channels + self.step.has_ignore_label)
        return voxels * 2  # int16

    def forward(self, outputs: Sequence[Sized]) -> Sized:
        """The scalar that backward starts from."""
        ledger, n_segmentation = self.ledger, self.step.n_segmentation_outputs
        with ledger.within("loss"):
            logits = [ledger.cast(output, FLOAT32) for output in outputs[:n_segmentation]]
            # nnU-Net leaves the coarsest of several scales out
            used = logits if n_segmentation == 1 else logits[:-1]
            scalars = [self._dice_and_cross_entropy(x) for x in used]
            if self.step.is_conresnet:
                scalars += self._residual_maps(outputs[n_segmentation:])
            return ledger.output((1,), FLOAT32, [(scalar.node, FLOAT32) for scalar in scalars])

    def _scalar(self, x: Sized, kept: Sequence[Storage], temporary: int = 0) -> Sized:
        return self.ledger.output((1,), FLOAT32, [(x.node, x.nbytes)], kept, temporary=temporary)

    def _dice_and_cross_entropy(self, x: Sized) -> Sized:
        ledger, step = self.ledger, self.step
        voxels = x.shape[0] * math.prod(x.size)
        foreground = x.nbytes if step.has_regions else x.nbytes - voxels * FLOAT32
        mask = ledger.storage(voxels) if step.has_ignore_label else None
        masks = [] if mask is None else [mask]
        if mask is not None and not step.has_regions:
            replaced = ledger.storage(voxels * 2)
            masks.append(replaced)
        # Dice: probabilities, the annotation in as many channels, and products that are summed at once
        probabilities = ledger.output(x.shape, FLOAT32, [(x.node, x.nbytes)], keep_output=True)
        one_hot = ledger.storage(x.nbytes)
        if not step.has_regions:
            index = ledger.storage(voxels * 8)
            del index
        product = ledger.storage(foreground)
        del product
        kept = [one_hot, *masks]
        if mask is not None:
            product = ledger.storage(foreground)
            masked = ledger.storage(foreground)
            del masked, product
        if not step.has_regions:
            probabilities = self._without_background(probabilities)
        # two sums of probabilities have gradients, which are added in memory of their own
        dice = self._scalar(probabilities, kept, temporary=foreground * (1 if mask is None else 2))
        del probabilities, kept
        # cross-entropy
        if step.has_regions:
            annotation = ledger.storage(x.nbytes)
            entropy = self._scalar(x, [x.storage, annotation, *masks], temporary=x.nbytes if masks else 0)
        else:
            labels = ledger.storage(voxels * 8)
            log_probabilities = ledger.output(x.shape, FLOAT32, [(x.node, x.nbytes)], keep_output=True)
            entropy = self._scalar(log_probabilities, [labels, log_probabilities.storage])
        return ledger.output((1,), FLOAT32, [(dice.node, FLOAT32), (entropy.node, FLOAT32)])

    def _residual_maps(self, maps: Sequence[Sized]) -> list[Sized]:
        ledger, step = self.ledger, self.step
        channels = step.output_channels - (0 if step.has_regions else 1)
        full = step.batch_size * math.prod(step.patch_size)
        membership = ledger.storage(full * channels)
        residual = ledger.storage(full * channels)
        del membership
        pyramid: dict[tuple[int, ...], Storage] = {maps[0].size: residual}
        previous = full * channels
        for x in maps:
            if x.size not in pyramid:
                floating = ledger.storage(previous * HALF)
                previous = x.shape[0] * channels * math.prod(x.size)
                pooled = ledger.storage(previous * HALF)
                pyramid[x.size] = ledger.storage(previous)
                del floating, pooled
        scalars = []
        for x in maps:
            wide = ledger.cast(x if step.has_regions else self._without_background(x), FLOAT32)
            target = ledger.storage(wide.nbytes)
            # what backward of cross-entropy with weighted positives makes on the way
            scalars.append(self._scalar(wide, [wide.storage, target], temporary=5 * wide.nbytes))
            del wide, target
        return scalars

    def _without_background(self, x: Sized) -> Sized:
        """A view of all channels but the first, whose backward makes a gradient of all."""
        node = self.ledger.record([(x.node, x.nbytes)], [])
        return Sized((x.shape[0], x.channels - 1, *x.size), x.itemsize, x.storage, node)
