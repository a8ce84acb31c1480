"""Losses: inter-slice residual maps beside nnU-Net's segmentation loss, V-Net's Dice, 3D U-Net's cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from nnunet_conres.residuals import LabelOrRegion, label_residual, residual_pyramid

# Weight of the residual-map loss in the objective, relative to the segmentation loss.
RESIDUAL_WEIGHT = 0.5
# The paper sums its three scales 1 : 0.5 : 0.5; this weight undoes their normalisation to a sum of 1.
PAPER_RESIDUAL_WEIGHT = 2.0


def residual_scale_weights(n_scales: int) -> list[float]:
    """Return the weights 1, 1/2, 1/2, ... of the residual maps from finest to coarsest, normalised to a sum of 1.

    Source: Zhang et al. 2021, section III-E (full, half and quarter resolution).
    """
    weights = [1.0] + [0.5] * (n_scales - 1)
    return [weight / sum(weights) for weight in weights]


class ResidualMapLoss(nn.Module):
    """Binary cross-entropy with logits between residual maps and the inter-slice residual of the annotation.

    The rare positive class of every channel is weighted by log(N / (P + 1)), with P positive voxels among N defined
    voxels of the whole batch, separately at each scale. Scales are weighted 1, 1/2, 1/2, ..., normalised.

    In distributed training (``ddp``), P and N are summed over all processes, so that the average of their gradients is
    the gradient of one process on the joined batch.

    Args:
        classes: Foreground labels of a label map, or None if targets are regions.
        ignore_label: Label of unannotated voxels, None if everything is annotated. For region targets any value but
            None means that their last channel marks unannotated voxels.
        slice_axis: Spatial axis along which slices follow each other.
        ddp: Whether to reduce counts over the processes of the default group.

    Source: Zhang et al. 2021, section III-E. The authors' released code feeds raw outputs to the cross-entropy after
        clamping them as if they were probabilities; the form with logits is what the paper describes.
    """

    def __init__(
        self,
        classes: Sequence[LabelOrRegion] | None,
        ignore_label: int | None = None,
        slice_axis: int = 0,
        ddp: bool = False,
    ) -> None:
        super().__init__()
        self.classes = None if classes is None else list(classes)
        self.ignore_label = ignore_label
        self.slice_axis = slice_axis
        self.ddp = ddp

    def forward(self, residual_logits: Sequence[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss.

        Args:
            residual_logits: Residual maps, finest first, shape (B, C, x, y, z) each, at full or lower resolution, with
                one channel for each foreground class or region.
            target: Annotation at full resolution, (B, 1, X, Y, Z) labels or (B, R[+1], X, Y, Z) regions.

        Returns:
            The loss, a scalar >= 0 (0 where no residual is defined), and the number of voxels at the finest scale on
            which a residual is defined.

        Raises:
            ValueError: If the number of channels of the maps is not the number of classes or regions.
        """
        with torch.no_grad():
            residual, mask = self.residual_of(target)
            targets = residual_pyramid(residual, mask, [logits.shape[2:] for logits in residual_logits])
            counts = torch.stack([self._counts(*scale) for scale in targets])
            world_size = 1
            if self.ddp:
                distributed.all_reduce(counts)
                world_size = distributed.get_world_size()

        loss = counts.new_zeros(())
        for weight, logits, (scale_target, scale_mask), count in zip(
            residual_scale_weights(len(residual_logits)), residual_logits, targets, counts, strict=True
        ):
            if logits.shape[1] != scale_target.shape[1]:
                raise ValueError(
                    f"Residual maps have {logits.shape[1]} channels, the annotation has "
                    f"{scale_target.shape[1]} classes or regions."
                )
            defined, positive = count[0].clamp(min=1), count[1:]
            # The logarithm is negative if nearly all voxels are positive; a weight must not be negative.
            positive_weight = torch.log(defined / (positive + 1)).clamp(min=0)
            summed = F.binary_cross_entropy_with_logits(
                logits.float(),
                scale_target.float(),
                weight=None if scale_mask is None else scale_mask.float(),
                pos_weight=positive_weight.view(-1, 1, 1, 1),
                reduction="sum",
            )
            loss = loss + weight * summed * (world_size / (defined * len(positive)))
        return loss, counts[0, 0]

    def residual_of(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the residual of an annotation and the mask of defined voxels, see ``label_residual``."""
        return label_residual(target, classes=self.classes, ignore_label=self.ignore_label, slice_axis=self.slice_axis)

    @staticmethod
    def _counts(residual: Tensor, mask: Tensor | None) -> Tensor:
        """Count defined voxels, then the positive voxels of every channel; float32, shape (1 + C,)."""
        dims = (0, *range(2, residual.ndim))
        positive = residual.sum(dims, dtype=torch.float32)
        if mask is None:
            defined = positive.new_full((1,), residual.numel() / residual.shape[1])
        else:
            defined = mask.sum(dtype=torch.float32).view(1)
        return torch.cat((defined, positive))


class ConResLoss(nn.Module):
    """Objective of networks with residual maps: a segmentation loss plus the weighted residual-map loss.

    Args:
        segmentation: Takes the lists of segmentation logits and targets, largest first; `SegmentationLoss` around
            nnU-Net's own loss.
        residual: Takes residual maps and the full-resolution target.
        n_segmentation_outputs: Number of segmentation logits, which come first in the network's outputs.
        residual_weight: Weight of the residual part.

    Attributes:
        parts: Parts of the objective in the last call, by name, detached: ``segmentation``, and ``residual`` before
            weighting, which is NaN if no residual is defined in the whole batch.
        has_residuals: False if no annotation defines a residual, even if a batch seems to define one. The residual part
            is then NaN in ``parts`` and adds nothing to the objective.

    Source: Zhang et al. 2021, section III-E.
    """

    def __init__(
        self,
        segmentation: nn.Module,
        residual: ResidualMapLoss,
        n_segmentation_outputs: int,
        residual_weight: float = RESIDUAL_WEIGHT,
    ) -> None:
        super().__init__()
        self.segmentation = segmentation
        self.residual = residual
        self.n_segmentation_outputs = n_segmentation_outputs
        self.residual_weight = residual_weight
        self.parts: dict[str, Tensor] = {}
        self.has_residuals = True

    def forward(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Compute the objective.

        Args:
            outputs: Outputs of a network with ``residual_outputs``: as many segmentation logits as targets, then
                residual maps.
            targets: Annotations at the plans' scales, full resolution first.

        Returns:
            Scalar; finite also for a batch without annotation, without foreground, or with a single slice.
        """
        segmentation = self.segmentation(outputs[: self.n_segmentation_outputs], targets)
        residual, defined = self.residual(outputs[self.n_segmentation_outputs :], targets[0])
        self.parts = {
            "segmentation": segmentation.detach(),
            "residual": torch.where((defined > 0) & self.has_residuals, residual.detach(), torch.nan),
        }
        if not self.has_residuals:
            residual = 0 * residual  # keeps zero gradients: on several GPUs every parameter must have a gradient
        return segmentation + self.residual_weight * residual


class SegmentationLoss(nn.Module):
    """A loss on float32 logits, with targets resized to the logits.

    Args:
        loss: Takes logits and target, or lists of them if it is wrapped in nnU-Net's ``DeepSupervisionWrapper``.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor]) -> Tensor:
        """Compute the loss.

        Args:
            outputs: Logits (B, C, X, Y, Z), or with deep supervision a list of them, full resolution first.
            targets: Annotation, or a list of the same length, at the plans' scales.

        Returns:
            The loss, a scalar.
        """
        # float32 keeps sums over a patch exact enough. It costs little, because logits are small beside the features.
        if isinstance(outputs, Tensor):
            return self.loss(outputs.float(), targets)
        logits = [output.float() for output in outputs]
        matching = [
            target if target.shape[2:] == output.shape[2:] else _shrink_labels(targets[0], output.shape[2:])
            for output, target in zip(logits, targets, strict=True)
        ]
        return self.loss(logits, matching)


def _shrink_labels(target: Tensor, size: Sequence[int]) -> Tensor:
    """Shrink labels by nearest neighbour.

    Needed if strides don't divide the patch, because nnU-Net rounds sizes differently from convolutions.
    """
    return F.interpolate(target.float(), size=tuple(size), mode="nearest-exact").to(target.dtype)


def _split_target(target: Tensor, regions: bool, ignore_label: int | None) -> tuple[Tensor, Tensor | None]:
    """Return the annotation without its ignore label, and the mask of annotated voxels (B, 1, ...), None for all.

    Labels stay one channel, (B, 1, ...) int64, and unannotated voxels become background. Regions become (B, R, ...)
    float32.
    """
    if regions:
        if ignore_label is None:
            return target.float(), None
        return target[:, :-1].float(), ~target[:, -1:].bool()
    if ignore_label is None:
        return target.long(), None
    annotated = target != ignore_label
    return torch.where(annotated, target, 0).long(), annotated


class SquaredDiceLoss(nn.Module):
    """V-Net's objective: minus the Dice coefficient with squared denominators, 2 sum(p g) / (sum(p^2) + sum(g^2)).

    It is computed separately for every volume of the batch and every foreground class or region, over annotated voxels,
    then averaged. A class that is absent from both prediction and annotation counts as 1.

    Args:
        regions: Whether targets are regions (a sigmoid each) rather than labels (a softmax over all).
        ignore_label: Label of unannotated voxels, None if everything is annotated. For region targets any value but
            None means that their last channel marks unannotated voxels.
        smooth: Added to numerator and denominator, so that neither is 0.

    Source: Milletari et al. 2016, section 3.
    """

    def __init__(self, regions: bool, ignore_label: int | None = None, smooth: float = 1e-5) -> None:
        super().__init__()
        self.regions = regions
        self.ignore_label = ignore_label
        self.smooth = smooth

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss, a scalar from -1 (perfect) to 0.

        Args:
            logits: (B, C, X, Y, Z), with labels the background first.
            target: (B, 1, X, Y, Z) labels, or (B, R[+1], X, Y, Z) regions.
        """
        target, annotated = _split_target(target, self.regions, self.ignore_label)
        if self.regions:
            probabilities, truth = torch.sigmoid(logits), target
        else:
            probabilities = torch.softmax(logits, 1)[:, 1:]
            truth = torch.zeros_like(logits).scatter_(1, target, 1)[:, 1:]
        if annotated is not None:
            probabilities, truth = probabilities * annotated, truth * annotated
        axes = tuple(range(2, logits.ndim))
        overlap = (probabilities * truth).sum(axes)
        squares = probabilities.square().sum(axes) + truth.sum(axes)  # 0 and 1 equal their squares
        return -((2 * overlap + self.smooth) / (squares + self.smooth)).mean()


class VoxelWeightedCrossEntropyLoss(nn.Module):
    """3D U-Net's objective: cross-entropy with a weight for every voxel, 0 where nothing is annotated.

    The sum over voxels is divided by the sum of their weights. In distributed training (``ddp``), the weights are
    summed over all processes, so that the average of their gradients is the gradient of one process on the joined
    batch.

    Args:
        regions: Whether targets are regions (a sigmoid each, their mean is taken) rather than labels (a softmax).
        ignore_label: Label of unannotated voxels, None if everything is annotated. For region targets any value but
            None means that their last channel marks unannotated voxels.
        background_weight: Weight of voxels annotated as background.
        foreground_weight: Weight of voxels of any other label, or of any region.
        ddp: Whether to reduce the weights over the processes of the default group.

    Raises:
        ValueError: If a weight is negative or both are 0.

    Source: Çiçek et al. 2016, section 2 (weighted softmax) and 3.2 (reduced background weight).
    """

    def __init__(
        self,
        regions: bool,
        ignore_label: int | None = None,
        background_weight: float = 1.0,
        foreground_weight: float = 1.0,
        ddp: bool = False,
    ) -> None:
        super().__init__()
        if min(background_weight, foreground_weight) < 0 or background_weight == foreground_weight == 0:
            raise ValueError(
                f"Weights must not be negative, nor all 0; got background {background_weight}, foreground "
                f"{foreground_weight}."
            )
        self.regions = regions
        self.ignore_label = ignore_label
        self.background_weight = background_weight
        self.foreground_weight = foreground_weight
        self.ddp = ddp

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss, a scalar >= 0 (0 if nothing is annotated).

        Args:
            logits: (B, C, X, Y, Z), with labels the background first.
            target: (B, 1, X, Y, Z) labels, or (B, R[+1], X, Y, Z) regions.
        """
        target, annotated = _split_target(target, self.regions, self.ignore_label)
        if self.regions:
            entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1, keepdim=True)
            foreground = target.amax(1, keepdim=True) > 0
        else:
            entropy = F.cross_entropy(logits, target[:, 0], reduction="none")[:, None]
            foreground = target > 0
        weights = torch.where(foreground, self.foreground_weight, self.background_weight)
        if annotated is not None:
            weights = weights * annotated
        total, world_size = weights.sum(), 1
        if self.ddp:
            distributed.all_reduce(total)
            world_size = distributed.get_world_size()
        # Not clamped to a tiny value: gradients that a GradScaler has scaled up would overflow, and inf * 0 is NaN.
        return (entropy * weights).sum() * world_size / torch.where(total > 0, total, 1)
