"""Objectives: inter-slice residual maps beside nnU-Net's segmentation loss, V-Net's Dice, 3D U-Net's cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from nnunet_conres.residuals import LabelOrRegion, label_residual, residual_pyramid

# Weight of the residual maps in the objective, relative to the segmentation's.
RESIDUAL_WEIGHT = 0.5
# The paper sums its three scales 1 : 0.5 : 0.5; this weight undoes their normalisation to a sum of 1.
PAPER_RESIDUAL_WEIGHT = 2.0


def residual_scale_weights(n_scales: int) -> list[float]:
    """Weights 1, 1/2, 1/2, ... of the residual maps from finest to coarsest, normalised to a sum of 1.

    Source: Zhang et al. 2021, section III-E (full, half and quarter resolution).
    """
    weights = [1.0] + [0.5] * (n_scales - 1)
    return [weight / sum(weights) for weight in weights]


class ResidualMapLoss(nn.Module):
    """Binary cross-entropy with logits between residual maps and the inter-slice residual of the annotation.

    The rare positive class of every channel is weighted by log(N / (P + 1)), with P positive among N defined voxels of
    the whole batch, at each scale for itself. Scales are weighted 1, 1/2, 1/2, ..., normalised.

    Where processes train together (``ddp``), P and N are summed over all of them, so that the average of their
    gradients is the gradient of one process on the joined batch.

    Args:
        classes: Foreground labels of a label map, or None when targets are regions.
        ignore_label: Label of unannotated voxels, None where everything is annotated. For region targets any value but
            None says that their last channel marks such voxels.
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
        """Computes the loss.

        Args:
            residual_logits: Residual maps, finest first, shape (B, C, x, y, z) each, at full or lower resolution, with
                one channel for each foreground class or region.
            target: Annotation at full resolution, (B, 1, X, Y, Z) labels or (B, R[+1], X, Y, Z) regions.

        Returns:
            The loss, a scalar >= 0 (0 where no residual is defined), and the number of voxels at the finest scale on
            which a residual is defined.

        Raises:
            ValueError: If the maps have another number of channels than there are classes or regions.
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
            # Negative where nearly all voxels are positive; a weight must not be.
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
        """The residual of an annotation and where it is defined, as of ``label_residual``."""
        return label_residual(target, classes=self.classes, ignore_label=self.ignore_label, slice_axis=self.slice_axis)

    @staticmethod
    def _counts(residual: Tensor, mask: Tensor | None) -> Tensor:
        """Number of defined voxels, then the positive ones of every channel; float32, shape (1 + C,)."""
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
            nnU-Net's own.
        residual: Takes residual maps and the full-resolution target.
        n_segmentation_outputs: How many of the network's outputs, from the front, are segmentation logits.
        residual_weight: Weight of the residual part.

    Attributes:
        parts: After a call, its parts by name, detached: ``segmentation``, and ``residual`` before weighting, NaN where
            no residual is defined in the whole batch.
        has_residuals: False where the annotation defines no residual at all, whatever batches seem to say: that part is
            then NaN among the parts and adds nothing.

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
        """Computes the objective.

        Args:
            outputs: What a network with residual maps returns with ``residual_outputs``: segmentation logits, as many
                as targets, then residual maps.
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
            residual = 0 * residual  # and no gradients but zeros, which every parameter has to have on several GPUs
        return segmentation + self.residual_weight * residual


class SegmentationLoss(nn.Module):
    """A loss on logits in float32, with targets at the logits' sizes.

    Args:
        loss: Takes logits and target, or the lists of them where nnU-Net's ``DeepSupervisionWrapper`` is around it.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor]) -> Tensor:
        """Computes the loss.

        Args:
            outputs: Logits (B, C, X, Y, Z), or with deep supervision a list of them, full resolution first.
            targets: Annotation, or a list of as many, at the plans' scales.

        Returns:
            What the loss returns, a scalar.
        """
        # Half-precision logits are small beside the features; float32 keeps sums over a patch exact enough.
        if isinstance(outputs, Tensor):
            return self.loss(outputs.float(), targets)
        logits = [output.float() for output in outputs]
        matching = [
            target if target.shape[2:] == output.shape[2:] else _shrink_labels(targets[0], output.shape[2:])
            for output, target in zip(logits, targets, strict=True)
        ]
        return self.loss(logits, matching)


def _shrink_labels(target: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest-neighbour shrinking, for strides that don't divide the patch: nnU-Net rounds other than convolutions."""
    return F.interpolate(target.float(), size=tuple(size), mode="nearest-exact").to(target.dtype)


def _split_target(target: Tensor, regions: bool, ignore_label: int | None) -> tuple[Tensor, Tensor | None]:
    """The annotation without its ignore label, and where it is annotated (B, 1, ...), None where it is everywhere.

    Labels stay one channel, (B, 1, ...) int64, unannotated voxels becoming background; regions become (B, R, ...)
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

    It is taken for every volume of the batch and every foreground class or region by itself, over annotated voxels,
    then averaged. A class that neither prediction nor annotation has counts as 1.

    Args:
        regions: Whether targets are regions (a sigmoid each) rather than labels (a softmax over all).
        ignore_label: Label of unannotated voxels, None where everything is annotated. For region targets any value but
            None says that their last channel marks such voxels.
        smooth: Added to numerator and denominator, so that neither is 0.

    Source: Milletari et al. 2016, section 3.
    """

    def __init__(self, regions: bool, ignore_label: int | None = None, smooth: float = 1e-5) -> None:
        super().__init__()
        self.regions = regions
        self.ignore_label = ignore_label
        self.smooth = smooth

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Computes the loss, a scalar from -1 (perfect) to 0.

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
        squares = probabilities.square().sum(axes) + truth.sum(axes)  # of 0 and 1, the square is the number itself
        return -((2 * overlap + self.smooth) / (squares + self.smooth)).mean()


class VoxelWeightedCrossEntropyLoss(nn.Module):
    """3D U-Net's objective: cross-entropy with a weight for every voxel, 0 where nothing is annotated.

    The sum over voxels is divided by the sum of their weights. Where processes train together (``ddp``) that sum is
    taken over all of them, so that the average of their gradients is the gradient of one process on the joined batch.

    Args:
        regions: Whether targets are regions (a sigmoid each, their mean is taken) rather than labels (a softmax).
        ignore_label: Label of unannotated voxels, None where everything is annotated. For region targets any value but
            None says that their last channel marks such voxels.
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
        """Computes the loss, a scalar >= 0 (0 where nothing is annotated).

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
        # not clamped to something tiny: gradients that a GradScaler has scaled up would overflow, and inf * 0 is NaN
        return (entropy * weights).sum() * world_size / torch.where(total > 0, total, 1)
