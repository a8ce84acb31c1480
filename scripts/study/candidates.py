"""Forms of ConResNet's training that were tried and are not part of the package."""

from __future__ import annotations

from torch import Tensor

from nnunet_conres.losses import ResidualMapLoss
from nnunet_conres.residuals import label_residual


class AllAxesResidualMapLoss(ResidualMapLoss):
    """The annotation's border to the previous voxel along any axis instead of the slice axis alone."""

    def residual_of(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        residual, mask = super().residual_of(target)
        for axis in {0, 1, 2} - {self.slice_axis}:
            other, other_mask = label_residual(
                target, classes=self.classes, ignore_label=self.ignore_label, slice_axis=axis
            )
            residual = residual | other
            if mask is not None and other_mask is not None:
                mask = mask & other_mask
        return (residual if mask is None else residual & mask), mask


class BothNeighboursResidualMapLoss(ResidualMapLoss):
    """Where the annotation changes to the previous or to the next slice: symmetric, as mirroring is."""

    def residual_of(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        residual, mask = super().residual_of(target)
        dim, depth = self.slice_axis + 2, target.shape[self.slice_axis + 2]
        if depth > 1:
            residual = residual.clone()
            residual.narrow(dim, 0, depth - 1).logical_or_(residual.narrow(dim, 1, depth - 1).clone())
        return (residual if mask is None else residual & mask), mask
