"""Cubic B-spline free-form deformation, composed with rotation and scaling into one resampling.

A free-form deformation samples the image at ``x + u(x)`` for a voxel at ``x``, where ``u`` is a cubic B-spline with a
coarse lattice of control points, each with a displacement. Two properties of the spline make it nearly free of cost. It
is separable: evaluating it on a whole patch is one small matrix product per axis. And it reproduces linear functions:
with the positions of the control points as coefficients it returns ``x`` itself. So rotation, scaling, shift and the
units of ``grid_sample`` are applied to the few control points, and one evaluation gives the sampling grid of the patch.

Coordinates are voxels relative to the centre of the patch: voxel i of n lies at ``i - (n - 1) / 2``.

Source: Rueckert et al., "Nonrigid registration using free-form deformations", IEEE TMI 18(8), 1999, equations 1 to 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from batchgeneratorsv2.helpers.scalar_type import RandomScalar, sample_scalar
from batchgeneratorsv2.transforms.spatial.spatial import (
    SpatialTransform,
    create_affine_matrix_2d,
    create_affine_matrix_3d,
)
from torch import Tensor

FloatArray = npt.NDArray[np.floating[Any]]

# A fold-free deformation leaves every voxel at least this fraction of its volume. Above 0, because the determinant is
# checked on a lattice and is slightly lower between its points.
MIN_DETERMINANT = 0.1
# Points per control-point spacing of that lattice, and the factor by which a folding deformation is damped per step.
_POINTS_PER_CELL = 4
_DAMPING = 0.95

# Arguments of SpatialTransform that have no meaning here, besides those with "elastic" in their name.
_REPLACED = ("p_synchronize_def_scale_across_axes", "align_corners")


def cubic_bspline(t: npt.ArrayLike) -> FloatArray:
    """Evaluate the cubic B-spline.

    Args:
        t: Distance to the control point in units of the control-point spacing, any shape.

    Returns:
        Weights in 0..2/3, 0 where ``|t| >= 2``, same shape.

    Source: Rueckert et al. 1999, below equation 1.
    """
    distance = np.abs(np.asarray(t, dtype=np.float64))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far)


def cubic_bspline_derivative(t: npt.ArrayLike) -> FloatArray:
    """Evaluate the first derivative of the cubic B-spline.

    Args:
        t: Distance to the control point in units of the control-point spacing, any shape.

    Returns:
        Derivative with respect to ``t``, in -2/3..2/3, 0 where ``|t| >= 2``, same shape.
    """
    t = np.asarray(t, dtype=np.float64)
    distance = np.abs(t)
    near = distance * (1.5 * distance - 2)
    far = -(np.clip(2 - distance, 0, None) ** 2) / 2
    return np.sign(t) * np.where(distance < 1, near, far)


def _per_axis(name: str, value: float | Sequence[float], dim: int) -> tuple[float, ...]:
    """Convert one number for all axes, or one per axis, to a tuple."""
    values = (value,) * dim if np.ndim(value) == 0 else tuple(value)  # type: ignore[arg-type, unused-ignore]
    if len(values) != dim:
        raise ValueError(f"{name} must be one number or have {dim} entries, one per axis of the patch; got {value!r}.")
    return tuple(float(v) for v in values)  # type: ignore[arg-type, unused-ignore]


def _evaluate(coefficients: Tensor, bases: Sequence[FloatArray]) -> Tensor:
    """Sum (K_0, ..., K_d, C) coefficients over the control points, weighted by one (n, K) basis matrix per axis."""
    field = coefficients
    # Last axis first: the intermediate results stay small, the first axis makes one large product, and the result is
    # contiguous in the order that grid_sample reads.
    for axis in reversed(range(len(bases))):
        basis = torch.from_numpy(bases[axis]).to(field)
        leading, trailing = field.shape[:axis], field.shape[axis + 1 :]
        product = torch.matmul(basis, field.reshape(*leading, field.shape[axis], -1))
        field = product.reshape(*leading, len(basis), *trailing)
    return field


def _determinant(matrices: Tensor) -> Tensor:
    """Compute determinants of (..., 2, 2) or (..., 3, 3) matrices, ten times as fast as LAPACK for this many."""
    m = matrices.unbind(-1)
    if len(m) == 2:
        return m[0][..., 0] * m[1][..., 1] - m[0][..., 1] * m[1][..., 0]
    return (m[0] * torch.linalg.cross(m[1], m[2])).sum(-1)


class BSplineGrid:
    """The lattice of control points of a cubic B-spline over a patch.

    A mesh of cells, centred on the patch, covers it from the outer border of its first voxel to that of its last. Along
    each axis the mesh has cells + 1 corners, and the spline needs one more control point on both sides of these, which
    makes cells + 3. With ``grid_size`` the mesh ends where the patch ends, as in SimpleITK with this value as
    TransformDomainMeshSize. With ``grid_spacing`` it has as many cells as cover the patch, and extends evenly beyond
    both sides.

    Args:
        size: Size of the patch in voxels, two or three axes.
        grid_spacing: Distance between control points in voxels, > 0, one number or one per axis.
        grid_size: Cells per axis, >= 1, one number or one per axis. Either this or ``grid_spacing``.

    Attributes:
        size: Size of the patch in voxels.
        cells: Cells of the mesh per axis.
        spacing: Distance between control points per axis in voxels.
        shape: Control points per axis, cells + 3.

    Raises:
        ValueError: If both or neither of ``grid_spacing`` and ``grid_size`` are given, have the wrong length or are not
            positive, or the patch has neither two nor three axes.
    """

    def __init__(
        self,
        size: Sequence[int],
        *,
        grid_spacing: float | Sequence[float] | None = None,
        grid_size: int | Sequence[int] | None = None,
    ) -> None:
        self.size = tuple(int(n) for n in size)
        dim = len(self.size)
        if dim not in (2, 3) or min(self.size) < 1:
            raise ValueError(f"A patch has two or three axes of at least one voxel; got size {tuple(size)!r}.")
        if (grid_spacing is None) == (grid_size is None):
            raise ValueError(
                f"Give either grid_spacing (voxels between control points) or grid_size (cells across the patch); got "
                f"grid_spacing={grid_spacing!r} and grid_size={grid_size!r}."
            )
        if grid_size is not None:
            cells = _per_axis("grid_size", grid_size, dim)
            if not all(c >= 1 and c == int(c) for c in cells):
                raise ValueError(f"grid_size must be whole numbers of at least 1; got {grid_size!r}.")
            self.cells = tuple(int(c) for c in cells)
            self.spacing = tuple(n / c for n, c in zip(self.size, self.cells, strict=True))
        else:
            assert grid_spacing is not None
            self.spacing = _per_axis("grid_spacing", grid_spacing, dim)
            if not all(0 < s < math.inf for s in self.spacing):
                raise ValueError(f"grid_spacing must be positive numbers of voxels; got {grid_spacing!r}.")
            self.cells = tuple(math.ceil(n / s) for n, s in zip(self.size, self.spacing, strict=True))
        self.shape = tuple(c + 3 for c in self.cells)
        # NumPy arrays, a few kB: they travel to worker processes with plain pickle.
        self._bases = [self._basis(axis, self._voxels(axis)) for axis in range(dim)]

    def _voxels(self, axis: int) -> FloatArray:
        """Return the centres of the patch's voxels along an axis."""
        n = self.size[axis]
        return np.arange(n) - (n - 1) / 2

    def _control_positions(self, axis: int) -> FloatArray:
        """Return the positions of the control points along an axis; the second is the first corner of the mesh."""
        return (np.arange(self.shape[axis]) - 1 - self.cells[axis] / 2) * self.spacing[axis]

    def _basis(self, axis: int, positions: FloatArray, derivative: bool = False) -> FloatArray:
        """Return the weight of every control point at every position along an axis, (positions, control points)."""
        t = (positions[:, None] - self._control_positions(axis)) / self.spacing[axis]
        return cubic_bspline_derivative(t) / self.spacing[axis] if derivative else cubic_bspline(t)

    def positions(self) -> Tensor:
        """Return the positions of the control points in voxels from the patch centre, float64, (*shape, dim)."""
        axes = [torch.from_numpy(self._control_positions(axis)) for axis in range(len(self.size))]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)

    def evaluate(self, control_points: Tensor) -> Tensor:
        """Evaluate the spline at every voxel of the patch.

        Args:
            control_points: Coefficients, shape (*shape, C). Displacements in voxels give the displacement field in
                voxels; their sum with ``positions()`` gives the position from which each voxel is sampled.

        Returns:
            Tensor of shape (*size, C), contiguous, same dtype.

        Raises:
            ValueError: If the control points have another shape.
        """
        self._check(control_points)
        return _evaluate(control_points, self._bases)

    def mean(self, control_points: Tensor) -> Tensor:
        """Compute the mean of the spline over the voxels of the patch, shape (C,), without evaluating the voxels."""
        self._check(control_points)
        return _evaluate(control_points, [basis.mean(0, keepdims=True) for basis in self._bases]).reshape(-1)

    def jacobian_determinant(self, displacements: Tensor) -> Tensor:
        """Compute the Jacobian determinant of x -> x + u(x) at every voxel, from the derivative of the spline.

        It is the factor by which the deformation changes the volume of what it samples: 1 without deformation, <= 0
        where it folds.

        Args:
            displacements: Displacements of the control points in voxels, shape (*shape, dim).

        Returns:
            Tensor of shape ``size``, same dtype.

        Raises:
            ValueError: If the displacements have another shape.
        """
        identity = torch.eye(len(self.size), dtype=displacements.dtype)
        return _determinant(identity + self._gradient(displacements, [self._voxels(a) for a in range(len(self.size))]))

    def without_folds(self, displacements: Tensor, minimum: float = MIN_DETERMINANT) -> Tensor:
        """Damp all displacements together until the deformation does not fold.

        They shrink in steps of 5 % until the Jacobian determinant is at least ``minimum`` on a lattice of four points
        per control-point spacing (or at every voxel, if that is fewer points). Deformations that fulfil this already
        stay as they are. (A limit of 0.4 spacings for each displacement would guarantee it without a check, but forbids
        most deformations that do not fold.)

        Args:
            displacements: Displacements of the control points in voxels, shape (*shape, dim).
            minimum: Smallest determinant, in 0..1 excluding 1.

        Returns:
            Tensor of the same shape and dtype.

        Raises:
            ValueError: If the displacements have another shape, or ``minimum`` is out of range.

        Source: the bound of 0.4 spacings is that of Choi and Lee, "Injectivity conditions of 2D and 3D uniform cubic
        B-spline functions", Graphical Models 62, 2000.
        """
        if not 0 <= minimum < 1:
            raise ValueError(f"minimum must be in 0..1, excluding 1; got {minimum}.")
        gradient = self._gradient(displacements, [self._lattice(axis) for axis in range(len(self.size))])
        identity = torch.eye(len(self.size), dtype=gradient.dtype)
        factor = 1.0
        while _determinant(identity + factor * gradient).min() < minimum:
            factor *= _DAMPING
        return displacements * factor

    def _lattice(self, axis: int) -> FloatArray:
        """Return the points that ``without_folds`` checks along an axis, evenly from the first to the last voxel."""
        voxels = self._voxels(axis)
        points = math.ceil(self.size[axis] / self.spacing[axis] * _POINTS_PER_CELL) + 1
        return voxels if points >= len(voxels) else np.linspace(voxels[0], voxels[-1], points)

    def _gradient(self, displacements: Tensor, points: Sequence[FloatArray]) -> Tensor:
        """Compute the derivative of every displacement component along every axis, (*points, component, axis)."""
        self._check(displacements, len(self.size))
        columns = []
        for along in range(len(self.size)):
            bases = [self._basis(axis, p, derivative=axis == along) for axis, p in enumerate(points)]
            columns.append(_evaluate(displacements, bases))
        return torch.stack(columns, -1)

    def _check(self, control_points: Tensor, channels: int | None = None) -> None:
        expected = (*self.shape, "C" if channels is None else channels)
        if control_points.shape[:-1] != self.shape or channels not in (None, control_points.shape[-1]):
            raise ValueError(
                f"Control points of shape {tuple(control_points.shape)} do not fit a grid over a patch of "
                f"{self.size}: expected ({', '.join(map(str, expected))})."
            )


class BSplineSpatialTransform(SpatialTransform):
    """batchgeneratorsv2's SpatialTransform with a B-spline deformation in place of its elastic one.

    Deforms first, then scales, then rotates, all in one resampling. Image, segmentation and regression target share
    the parameters and the grid. With ``p_deformation=0`` it draws the same rotations, scalings and crops as
    SpatialTransform from the same seed. If nothing was drawn, the patch is cropped, not resampled.

    For nnU-Net's dummy-2D augmentation pass the values of the two in-plane axes (patch size, spacing or grid size,
    sigma), as nnU-Net does with the patch size: all slices get the same deformation within their plane.

    Args:
        patch_size: Size of the output patch in voxels, two or three axes.
        patch_center_dist_from_border: Minimum distance in voxels between a random centre and the border of the image,
            one number or one per axis.
        random_crop: Whether to draw the centre of the patch; otherwise it is the centre of the image.
        p_deformation: Probability of a deformation, 0..1.
        grid_spacing: Distance between control points in voxels, > 0, one number or one per axis.
        grid_size: Cells of the control-point mesh across the patch, >= 1, one number or one per axis (V-Net: 2). Either
            this or ``grid_spacing``.
        sigma: Standard deviation of the normally distributed displacements of the control points in voxels, >= 0, one
            number or one per axis; 0 leaves an axis undeformed. Displacements of voxels are smaller, about a third of
            sigma in 3D and half of it in 2D, because each is an average over control points nearby.
        fold_free: Whether to damp displacements that would fold the patch, see ``BSplineGrid.without_folds``.
        p_rotation, rotation, p_rot_per_axis, p_scaling, scaling, p_synchronize_scaling_across_axes,
            bg_style_seg_sampling, mode_seg, border_mode_seg, mode_image, padding_mode_image, padding_value_seg,
            padding_value_image: As in SpatialTransform; angles in radians, scalings > 1 make objects smaller,
            ``"reflection"`` mirrors at the border of the image.
        center_deformation: Whether to subtract the mean displacement of the patch, as SpatialTransform does, so that
            the deformation does not shift the patch as a whole.
        others: Other arguments of SpatialTransform, except those of its elastic deformation and ``align_corners``,
            which the grid does not support.

    Raises:
        TypeError: If an unsupported argument of SpatialTransform is given.
        ValueError: If both or neither of ``grid_spacing`` and ``grid_size`` are given, or a value has the wrong length
            or is out of range.

    Source: Rueckert et al. 1999; as an augmentation: Milletari et al., "V-Net", 3DV 2016 (2 cells, "2x2x2").
    """

    def __init__(
        self,
        patch_size: Sequence[int],
        patch_center_dist_from_border: int | Sequence[int],
        random_crop: bool,
        p_rotation: float = 0,
        rotation: RandomScalar = (0, 2 * np.pi),
        p_rot_per_axis: float = 1,
        p_scaling: float = 0,
        scaling: RandomScalar = (0.7, 1.3),
        p_synchronize_scaling_across_axes: float = 0,
        bg_style_seg_sampling: bool = False,
        mode_seg: str = "bilinear",
        border_mode_seg: str = "zeros",
        center_deformation: bool = True,
        mode_image: str = "bilinear",
        padding_mode_image: str = "zeros",
        padding_value_seg: float = 0,
        padding_value_image: float = 0,
        *,
        p_deformation: float,
        grid_spacing: float | Sequence[float] | None = None,
        grid_size: int | Sequence[int] | None = None,
        sigma: float | Sequence[float],
        fold_free: bool = False,
        **others: Any,
    ) -> None:
        unknown = [name for name in others if "elastic" in name or name in _REPLACED]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(unknown)}.")
        super().__init__(
            patch_size=tuple(patch_size),
            patch_center_dist_from_border=patch_center_dist_from_border,
            random_crop=random_crop,
            p_rotation=p_rotation,
            rotation=rotation,
            p_rot_per_axis=p_rot_per_axis,
            p_scaling=p_scaling,
            scaling=scaling,
            p_synchronize_scaling_across_axes=p_synchronize_scaling_across_axes,
            bg_style_seg_sampling=bg_style_seg_sampling,
            mode_seg=mode_seg,
            border_mode_seg=border_mode_seg,
            center_deformation=center_deformation,
            mode_image=mode_image,
            padding_mode_image=padding_mode_image,
            padding_value_seg=padding_value_seg,
            padding_value_image=padding_value_image,
            **others,
        )
        self.control_grid = BSplineGrid(patch_size, grid_spacing=grid_spacing, grid_size=grid_size)
        self.sigma = _per_axis("sigma", sigma, len(self.control_grid.size))
        if not all(0 <= s < math.inf for s in self.sigma):
            raise ValueError(f"sigma must be numbers of voxels >= 0; got {sigma!r}.")
        if not 0 <= p_deformation <= 1:
            raise ValueError(f"p_deformation must be a probability in 0..1; got {p_deformation!r}.")
        self.p_deformation = p_deformation
        self.fold_free = fold_free

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Draw affine, displacements and centre, and build the sampling grid that image and labels share.

        Returns:
            ``grid``, float32, shape (*patch_size, dim), in grid_sample's units and axis order, or None if the patch
            is only cropped; ``center_location_in_pixels``; ``affine``, (dim, dim) array or None;
            ``control_displacements`` in voxels, float64, shape (*control_grid.shape, dim) or None.

        Raises:
            ValueError: If the image has another number of axes than the patch.
        """
        parameters = self.draw(data_dict["image"])
        control_points, grid = self.control_positions(parameters), None
        if control_points is not None:
            extent = torch.tensor(data_dict["image"].shape[1:], dtype=torch.float64)
            control_points += torch.tensor(parameters["center_location_in_pixels"], dtype=torch.float64) - extent / 2
            # grid_sample: -1..1 between the outer borders of the image, last axis first
            control_points = (control_points / (extent / 2)).flip(-1)
            grid = self.control_grid.evaluate(control_points.float())
        return parameters | {"grid": grid}

    def draw(self, image: Tensor) -> dict[str, Any]:
        """Draw the parameters of ``get_parameters``, without building the grid.

        Args:
            image: The image, (C, *spatial). Only its shape is used.

        Returns:
            ``center_location_in_pixels``, ``affine`` and ``control_displacements``, as ``get_parameters``.

        Raises:
            ValueError: If the image has another number of axes than the patch.
        """
        shape = image.shape[1:]
        if len(shape) != len(self.patch_size):
            raise ValueError(
                f"An image of shape {tuple(image.shape)} has {len(shape)} spatial axes, the patch {self.patch_size} "
                f"has {len(self.patch_size)}."
            )
        # in SpatialTransform's order, so that the same seed draws the same rotations, scalings and crops
        do_rotation = np.random.uniform() < self.p_rotation
        do_scale = np.random.uniform() < self.p_scaling
        do_deform = np.random.uniform() < self.p_deformation
        affine = self._draw_affine(image, do_rotation, do_scale) if do_rotation or do_scale else None
        displacements = self._draw_displacements() if do_deform else None
        center = self._draw_center(shape)
        return {
            "center_location_in_pixels": center,
            "affine": affine,
            "control_displacements": displacements,
        }

    def control_positions(self, parameters: dict[str, Any]) -> Tensor | None:
        """Return the positions of the moved control points, in voxels from the centre of the patch.

        Args:
            parameters: Parameters from ``draw``.

        Returns:
            Tensor of float64, shape (*control_grid.shape, dim); None if nothing moves.
        """
        affine, displacements = parameters["affine"], parameters["control_displacements"]
        if affine is None and displacements is None:
            return None
        control_points = self.control_grid.positions()
        if displacements is not None:
            control_points += displacements
        return control_points if affine is None else control_points @ torch.from_numpy(affine.T)

    def _draw_affine(self, image: Tensor, do_rotation: bool, do_scale: bool) -> FloatArray:
        dim = len(self.patch_size)
        angles: list[float] = [0] * dim
        scales: list[float] = [1] * dim
        if do_rotation:
            angles = [sample_scalar(self.rotation, image=image, dim=axis) for axis in range(dim)]
            if self.p_rot_per_axis < 1:
                angles = [0 if np.random.uniform() > self.p_rot_per_axis else angle for angle in angles]
        if do_scale:
            if np.random.uniform() <= self.p_synchronize_scaling_across_axes:
                scales = [sample_scalar(self.scaling, image=image, dim=None)] * dim
            else:
                scales = [sample_scalar(self.scaling, image=image, dim=axis) for axis in range(dim)]
        return create_affine_matrix_3d(angles, scales) if dim == 3 else create_affine_matrix_2d(angles[-1], scales)

    def _draw_displacements(self) -> Tensor | None:
        """Draw the displacements of the control points; None if sigma is 0 along all axes."""
        if not any(self.sigma):
            return None
        noise = np.random.normal(size=(*self.control_grid.shape, len(self.sigma)))
        displacements = torch.from_numpy(noise * np.array(self.sigma))
        if self.fold_free:
            displacements = self.control_grid.without_folds(displacements)
        if self.center_deformation:
            # From all control points alike: the spline's weights add up to 1 everywhere.
            displacements -= self.control_grid.mean(displacements)
        return displacements

    def _draw_center(self, shape: Sequence[int]) -> list[float]:
        if not self.random_crop:
            return [extent / 2 for extent in shape]
        center = []
        for extent, margin in zip(shape, self.patch_center_dist_from_border, strict=True):
            fits = margin <= extent - margin
            center.append(np.random.uniform(margin, extent - margin) if fits else extent / 2)
        return center
