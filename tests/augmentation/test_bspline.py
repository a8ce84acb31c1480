"""B-spline deformation against SimpleITK, SciPy, brute-force sums and batchgeneratorsv2's own transform."""

import copy
import itertools
import pickle
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from scipy.ndimage import gaussian_filter, map_coordinates

from nnunet_conres.augmentation.bspline import (
    BSplineGrid,
    BSplineSpatialTransform,
    cubic_bspline,
    cubic_bspline_derivative,
)

# Patches and lattices of all kinds: cubic, anisotropic, one voxel thick, smaller than the spacing, spacings that do not
# divide the patch, two axes.
GRIDS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((16, 16, 16), {"grid_spacing": 8}),
    ((12, 17, 9), {"grid_spacing": (3.5, 20, 4)}),
    ((12, 17, 9), {"grid_size": 2}),
    ((1, 10, 11), {"grid_size": (1, 2, 3)}),
    ((1, 6, 5), {"grid_spacing": 32}),
    ((14, 9), {"grid_spacing": (4, 6)}),
    ((14, 9), {"grid_size": (3, 2)}),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    np.random.seed(0)
    torch.manual_seed(0)


def random_displacements(grid: BSplineGrid, sigma: float = 2) -> torch.Tensor:
    return torch.randn(*grid.shape, len(grid.size), dtype=torch.float64) * sigma


def smooth(shape: tuple[int, ...], sigma: float = 2, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    image = gaussian_filter(noise, sigma)
    return (image / image.std()).astype(np.float32)


def voxel_coordinates(size: tuple[int, ...]) -> np.ndarray:
    """Return coordinates relative to the centre of the patch, (*size, dim)."""
    return np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in size], indexing="ij"), -1)


def grid_in_voxels(grid: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Convert a grid for grid_sample to voxel indices of an image of this shape, in the order of its axes."""
    return (grid.double().numpy()[..., ::-1] + 1) / 2 * shape - 0.5


def make(patch: tuple[int, ...], **arguments: Any) -> BSplineSpatialTransform:
    defaults: dict[str, Any] = {"p_deformation": 1, "grid_spacing": 8, "sigma": 2}
    if "grid_size" in arguments:
        del defaults["grid_spacing"]
    return BSplineSpatialTransform(patch, 0, False, **{**defaults, **arguments})


class TestCubicBSpline:
    def test_values_of_the_textbook(self) -> None:
        np.testing.assert_allclose(cubic_bspline([-2, -1, 0, 1, 2, 3]), [0, 1 / 6, 2 / 3, 1 / 6, 0, 0], atol=1e-15)
        np.testing.assert_allclose(cubic_bspline_derivative([-2, -1, 0, 1, 2]), [0, 0.5, 0, -0.5, 0], atol=1e-15)

    def test_derivative_equals_finite_differences(self) -> None:
        t, h = np.linspace(-2.5, 2.5, 101), 1e-6
        expected = (cubic_bspline(t + h) - cubic_bspline(t - h)) / (2 * h)
        np.testing.assert_allclose(cubic_bspline_derivative(t), expected, atol=1e-8)


class TestBSplineGrid:
    @pytest.mark.parametrize(("size", "lattice"), GRIDS)
    def test_equals_sum_over_control_points(self, size: tuple[int, ...], lattice: dict[str, Any]) -> None:
        grid = BSplineGrid(size, **lattice)
        control_points = torch.randn(*grid.shape, 2, dtype=torch.float64)
        positions = grid.positions().numpy()
        expected = np.zeros((*size, 2))
        for index in np.ndindex(*size):
            offset = (np.array(index) - (np.array(size) - 1) / 2 - positions) / grid.spacing
            weights = cubic_bspline(offset).prod(-1)
            assert weights.sum() == pytest.approx(1)
            expected[index] = (weights[..., None] * control_points.numpy()).sum(tuple(range(len(size))))
        field = grid.evaluate(control_points)
        assert field.is_contiguous()
        np.testing.assert_allclose(field.numpy(), expected, atol=1e-12)
        single = grid.evaluate(control_points.float())
        assert single.dtype == torch.float32
        np.testing.assert_allclose(single.numpy(), expected, atol=1e-5)
        mean = expected.mean(tuple(range(len(size))))
        np.testing.assert_allclose(grid.mean(control_points).numpy(), mean, atol=1e-12)

    @pytest.mark.parametrize(("size", "lattice"), GRIDS)
    def test_equals_scipy(self, size: tuple[int, ...], lattice: dict[str, Any]) -> None:
        grid = BSplineGrid(size, **lattice)
        displacements = random_displacements(grid)
        # voxel positions relative to the first control point, in units of the control-point spacing
        first = grid.positions()[(0,) * len(size)].numpy()
        steps = np.moveaxis((voxel_coordinates(size) - first) / grid.spacing, -1, 0)
        field = grid.evaluate(displacements.float()).numpy()
        for axis in range(len(size)):
            # SciPy mirrors beyond the first and last coefficient; padding keeps voxels away from there
            padded = np.pad(displacements[..., axis].numpy(), 3)
            expected = map_coordinates(padded, steps + 3, order=3, prefilter=False)
            np.testing.assert_allclose(field[..., axis], expected, atol=1e-4)

    @pytest.mark.parametrize(("size", "lattice"), GRIDS)
    def test_equals_simpleitk(self, size: tuple[int, ...], lattice: dict[str, Any]) -> None:
        grid = BSplineGrid(size, **lattice)
        displacements = random_displacements(grid, 4)
        dim = len(size)
        # SimpleITK's axes have the reverse order; its coordinates are voxel indices
        cells, spacing = np.array(grid.cells), np.array(grid.spacing)
        transform = SimpleITK.BSplineTransform(dim, 3)
        transform.SetTransformDomainMeshSize(cells[::-1].tolist())
        transform.SetTransformDomainOrigin(((np.array(size) - 1) / 2 - cells * spacing / 2)[::-1].tolist())
        transform.SetTransformDomainPhysicalDimensions((cells * spacing)[::-1].tolist())
        transform.SetParameters(np.concatenate([displacements[..., a].numpy().ravel() for a in reversed(range(dim))]))
        field = grid.evaluate(displacements.float()).numpy()
        assert np.abs(field).max() > 1
        for index in itertools.islice(np.ndindex(*size), 0, None, 3):
            point = [float(i) for i in reversed(index)]
            moved = np.subtract(transform.TransformPoint(point), point)[::-1]
            np.testing.assert_allclose(field[index], moved, atol=1e-3)

    def test_mesh_is_that_of_simpleitk_for_an_image(self) -> None:
        size = (40, 30, 20)
        image = SimpleITK.Image(size[::-1], SimpleITK.sitkFloat32)
        reference = SimpleITK.BSplineTransformInitializer(image, [2, 2, 2], 3)
        grid = BSplineGrid(size, grid_size=2)
        assert grid.shape == (5, 5, 5) == tuple(reference.GetCoefficientImages()[0].GetSize())
        # SimpleITK's mesh extends beyond the image by an eighth of a voxel
        np.testing.assert_allclose(grid.spacing[::-1], reference.GetCoefficientImages()[0].GetSpacing(), atol=0.2)

    @pytest.mark.parametrize(("size", "lattice"), GRIDS)
    def test_reproduces_linear_functions(self, size: tuple[int, ...], lattice: dict[str, Any]) -> None:
        grid = BSplineGrid(size, **lattice)
        np.testing.assert_allclose(grid.evaluate(grid.positions()).numpy(), voxel_coordinates(size), atol=1e-12)

    @pytest.mark.parametrize(("size", "lattice"), GRIDS)
    def test_jacobian_equals_finite_differences(self, size: tuple[int, ...], lattice: dict[str, Any]) -> None:
        grid = BSplineGrid(size, **lattice)
        displacements = random_displacements(grid)
        dim, h = len(size), 1e-5
        first = grid.positions()[(0,) * dim].numpy()

        def moved(at: np.ndarray) -> np.ndarray:
            steps = np.moveaxis((at - first) / grid.spacing, -1, 0) + 3
            columns = [
                map_coordinates(np.pad(displacements[..., a].numpy(), 3), steps, order=3, prefilter=False)
                for a in range(dim)
            ]
            return at + np.stack(columns, -1)

        x = voxel_coordinates(size)
        columns = [(moved(x + h * e) - moved(x - h * e)) / (2 * h) for e in np.eye(dim)]
        expected = np.linalg.det(np.stack(columns, -1))
        np.testing.assert_allclose(grid.jacobian_determinant(displacements).numpy(), expected, atol=1e-6)

    @pytest.mark.parametrize(("size", "lattice"), GRIDS)
    @pytest.mark.parametrize("sigma", [0.1, 3, 30])
    def test_without_folds(self, size: tuple[int, ...], lattice: dict[str, Any], sigma: float) -> None:
        grid = BSplineGrid(size, **lattice)
        for _ in range(5):
            displacements = random_displacements(grid, sigma)
            damped = grid.without_folds(displacements)
            determinant = grid.jacobian_determinant(damped)
            assert determinant.min() > 0
            factor = (damped / displacements).flatten()
            assert factor.max() - factor.min() < 1e-9
            if grid.jacobian_determinant(displacements).min() > 0.2:
                assert torch.equal(damped, displacements)

    def test_without_folds_keeps_as_much_as_it_can(self) -> None:
        grid = BSplineGrid((40, 40, 40), grid_spacing=10)
        displacements = random_displacements(grid, 20)
        assert grid.jacobian_determinant(displacements).min() < -1
        damped = grid.without_folds(displacements)
        assert 0 < grid.jacobian_determinant(damped).min() < 0.2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "either grid_spacing"),
            ({"grid_spacing": 8, "grid_size": 2}, "either grid_spacing"),
            ({"grid_spacing": 0}, "grid_spacing must be positive.*got 0"),
            ({"grid_spacing": (8, -1, 8)}, "grid_spacing must be positive"),
            ({"grid_spacing": float("nan")}, "grid_spacing must be positive"),
            ({"grid_spacing": float("inf")}, "grid_spacing must be positive"),
            ({"grid_spacing": (8, 8)}, r"grid_spacing must be one number or have 3 entries.*\(8, 8\)"),
            ({"grid_size": 0}, "grid_size must be whole numbers"),
            ({"grid_size": (2, 2.5, 2)}, "grid_size must be whole numbers"),
            ({"grid_size": [2, 2, 2, 2]}, "grid_size must be one number or have 3 entries"),
        ],
    )
    def test_names_what_is_wrong(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BSplineGrid((16, 16, 16), **arguments)

    def test_refuses_other_shapes(self) -> None:
        with pytest.raises(ValueError, match="two or three axes"):
            BSplineGrid((16,), grid_size=2)
        grid = BSplineGrid((16, 16), grid_size=2)
        with pytest.raises(ValueError, match=r"expected \(5, 5, C\)"):
            grid.evaluate(torch.zeros(5, 4, 2))
        with pytest.raises(ValueError, match=r"expected \(5, 5, 2\)"):
            grid.jacobian_determinant(torch.zeros(5, 5, 3))
        with pytest.raises(ValueError, match="minimum"):
            grid.without_folds(torch.zeros(5, 5, 2), 1)


class TestGrid:
    """The sampling grid of BSplineSpatialTransform."""

    @pytest.mark.parametrize("random_crop", [False, True])
    @pytest.mark.parametrize(("patch", "shape"), [((12, 10, 9), (20, 15, 11)), ((12, 10), (12, 17)), ((9, 8), (5, 6))])
    def test_without_deformation_is_that_of_spatial_transform(
        self, patch: tuple[int, ...], shape: tuple[int, ...], random_crop: bool
    ) -> None:
        arguments: dict[str, Any] = {
            "p_rotation": 0.7,
            "rotation": (-1, 1),
            "p_rot_per_axis": 0.6,
            "p_scaling": 0.7,
            "scaling": (0.5, 2),
            "p_synchronize_scaling_across_axes": 0.5,
        }
        ours = BSplineSpatialTransform(patch, 3, random_crop, p_deformation=0, grid_spacing=5, sigma=3, **arguments)
        theirs = SpatialTransform(patch, 3, random_crop, **arguments)
        image = torch.zeros(1, *shape)
        for seed in range(20):
            np.random.seed(seed)
            actual = ours.get_parameters(image=image)
            np.random.seed(seed)
            expected = theirs.get_parameters(image=image)
            assert actual["center_location_in_pixels"] == expected["center_location_in_pixels"]
            assert (actual["grid"] is None) == (expected["grid"] is None)
            if expected["grid"] is not None:
                assert actual["grid"].shape == expected["grid"].shape
                assert actual["grid"].dtype == torch.float32
                difference = grid_in_voxels(actual["grid"], shape) - grid_in_voxels(expected["grid"], shape)
                assert np.abs(difference).max() < 1e-4

    @pytest.mark.parametrize("center_deformation", [False, True])
    @pytest.mark.parametrize(("patch", "shape"), [((12, 10, 9), (20, 15, 11)), ((12, 10), (12, 17))])
    def test_deforms_then_rotates_then_crops(
        self, patch: tuple[int, ...], shape: tuple[int, ...], center_deformation: bool
    ) -> None:
        transform = BSplineSpatialTransform(
            patch,
            2,
            True,
            p_rotation=1,
            rotation=(-1, 1),
            p_scaling=1,
            scaling=(0.5, 2),
            center_deformation=center_deformation,
            p_deformation=1,
            grid_spacing=6,
            sigma=3,
        )
        for _ in range(5):
            drawn = transform.get_parameters(image=torch.zeros(1, *shape))
            control_grid = transform.control_grid
            displacement = np.zeros((*patch, len(patch)))
            positions = control_grid.positions().numpy()
            for index in np.ndindex(*patch):
                x = np.array(index) - (np.array(patch) - 1) / 2
                weights = cubic_bspline((x - positions) / control_grid.spacing).prod(-1)
                displacement[index] = np.tensordot(weights, drawn["control_displacements"].numpy(), len(patch))
            moved = (voxel_coordinates(patch) + displacement) @ drawn["affine"].T
            expected = moved + drawn["center_location_in_pixels"] - 0.5
            actual = grid_in_voxels(drawn["grid"], shape)
            np.testing.assert_allclose(actual, expected, atol=1e-4)
            mean = displacement.mean(tuple(range(len(patch))))
            assert (np.abs(mean).max() < 1e-9) == center_deformation

    def test_standard_deviation_of_control_points_is_sigma(self) -> None:
        transform = make((16, 16, 16), sigma=(0, 2, 5), grid_spacing=2, center_deformation=False)
        drawn = transform.get_parameters(image=torch.zeros(1, 16, 16, 16))["control_displacements"]
        std = drawn.std((0, 1, 2)).tolist()
        assert std[0] == 0
        assert std[1:] == pytest.approx([2, 5], rel=0.1)
        # "about a third of it", says the documentation
        assert transform.control_grid.evaluate(drawn)[..., 2].std() == pytest.approx(5 / 3, rel=0.1)

    def test_same_seed_same_draw(self) -> None:
        transform = make((8, 8, 8))
        grids = []
        for seed in (1, 1, 2):
            np.random.seed(seed)
            grids.append(transform.get_parameters(image=torch.zeros(1, 8, 8, 8))["grid"])
        assert torch.equal(grids[0], grids[1])
        assert not torch.equal(grids[0], grids[2])

    def test_fold_free(self) -> None:
        image = torch.zeros(1, 24, 24, 24)
        for fold_free in (False, True):
            transform = make((24, 24, 24), sigma=12, fold_free=fold_free)
            folds = []
            for _ in range(5):
                drawn = transform.get_parameters(image=image)["control_displacements"]
                folds.append(bool(transform.control_grid.jacobian_determinant(drawn).min() <= 0))
            assert folds == [not fold_free] * 5


class TestBSplineSpatialTransform:
    def test_image_equals_scipy(self) -> None:
        image = smooth((14, 16, 18))
        transform = make((14, 16, 18), p_rotation=1, rotation=(-0.3, 0.3), padding_mode_image="border")
        drawn = transform.get_parameters(image=torch.from_numpy(image)[None])
        result = transform.apply({"image": torch.from_numpy(image)[None]}, **drawn)["image"][0]
        at = np.moveaxis(grid_in_voxels(drawn["grid"], image.shape), -1, 0)
        expected = map_coordinates(image, at, order=1, mode="nearest")
        np.testing.assert_allclose(result.numpy(), expected, atol=1e-4)

    @pytest.mark.parametrize("mode_seg", ["nearest", "bilinear"])
    def test_mirrored_outside(self, mode_seg: str) -> None:
        image = smooth((14, 16, 18))
        labels = np.digitize(smooth((14, 16, 18), 3, seed=1), [-0.5, 0.5]).astype(np.int16)
        transform = make(
            (14, 16, 18),
            sigma=12,
            p_scaling=1,
            scaling=(1.5, 1.5),
            mode_seg=mode_seg,
            padding_mode_image="reflection",
            border_mode_seg="reflection",
        )
        data = {"image": torch.from_numpy(image)[None], "segmentation": torch.from_numpy(labels)[None]}
        drawn = transform.get_parameters(**data)
        result = transform.apply(data, **drawn)
        at = np.moveaxis(grid_in_voxels(drawn["grid"], image.shape), -1, 0)
        assert at.min() < -5  # some positions lie outside the image
        # SciPy's "reflect" mirrors at the outer border of the first voxel
        expected = map_coordinates(image, at, order=1, mode="reflect")
        np.testing.assert_allclose(result["image"][0].numpy(), expected, atol=1e-4)
        scores = [map_coordinates((labels == u).astype(float), at, order=1, mode="reflect") for u in range(3)]
        best, second = np.sort(scores, 0)[:-3:-1]
        clear = best - second > 0.01
        actual = result["segmentation"][0].numpy()
        if mode_seg == "bilinear":
            np.testing.assert_array_equal(actual[clear], np.argmax(scores, 0)[clear])
        else:
            # not halfway between two voxels, where the nearest one is ambiguous
            clear = (np.abs(at - np.floor(at) - 0.5) > 1e-3).all(0)
            np.testing.assert_array_equal(actual[clear], map_coordinates(labels, at, order=0, mode="reflect")[clear])
        assert clear.mean() > 0.9

    def test_image_labels_and_target_share_one_draw(self) -> None:
        image = torch.from_numpy(smooth((20, 20, 20), 3))[None]
        data = {"image": image, "segmentation": (image > 0).to(torch.int16), "regression_target": image.clone()}
        result = make((20, 20, 20), sigma=6, p_rotation=1, padding_mode_image="border", border_mode_seg="border")(
            **data
        )
        assert torch.equal(result["image"], result["regression_target"])
        clear = result["image"].abs() > 0.25
        assert clear.float().mean() > 0.5
        agree = (result["image"] > 0) == (result["segmentation"] == 1)
        assert agree[clear].float().mean() > 0.99

    @pytest.mark.parametrize("mode_seg", ["nearest", "bilinear"])
    @pytest.mark.parametrize("labels", [(-1, 0, 1, 4), (0, 3), (-1, 7)])
    def test_makes_no_new_labels(self, labels: tuple[int, ...], mode_seg: str) -> None:
        segmentation = torch.tensor(labels, dtype=torch.int16)[torch.randint(len(labels), (2, 12, 12, 12))]
        transform = make(
            (12, 12, 12), sigma=5, p_rotation=1, mode_seg=mode_seg, border_mode_seg="constant", padding_value_seg=-1
        )
        result = transform(image=torch.zeros(1, 12, 12, 12), segmentation=segmentation)["segmentation"]
        assert result.dtype == torch.int16
        assert set(result.unique().tolist()) <= {*labels, -1}
        assert len(result.unique()) >= len(labels)

    @pytest.mark.parametrize(("shape", "patch"), [((12, 12, 12), (12, 12, 12)), ((13, 15, 9), (8, 6, 9))])
    def test_zero_sigma_changes_nothing(self, shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
        image = torch.rand(1, *shape)
        drawn = make(patch, sigma=0).get_parameters(image=image)
        assert drawn["grid"] is None
        expected = SpatialTransform(patch, 0, False)(image=image)["image"]
        assert torch.equal(make(patch, sigma=0)(image=image)["image"], expected)

    def test_tiny_sigma_changes_next_to_nothing(self) -> None:
        image = torch.from_numpy(smooth((12, 12, 12)))[None]
        result = make((12, 12, 12), sigma=1e-6, padding_mode_image="border")(image=image)["image"]
        torch.testing.assert_close(result, image, atol=1e-4, rtol=0)

    def test_axis_with_zero_sigma_stays(self) -> None:
        # every slice along the first axis has a different grey value
        image = torch.arange(10.0).view(1, 10, 1, 1).expand(1, 10, 12, 14).contiguous()
        result = make((10, 12, 14), sigma=(0, 5, 5), padding_mode_image="border")(image=image)["image"]
        torch.testing.assert_close(result, image, atol=1e-4, rtol=0)

    def test_dummy_2d_deforms_within_slices_and_all_alike(self) -> None:
        shape = (5, 24, 20)
        plane = torch.from_numpy(smooth(shape[1:], 2))
        image = torch.stack([plane, -plane])[:, None] + 10 * torch.arange(5.0).view(1, 5, 1, 1)
        segmentation = (plane > 0).to(torch.int16).expand(1, *shape).contiguous()
        data: dict[str, Any] = {"image": image.clone(), "segmentation": segmentation}
        transform = make(shape[1:], grid_spacing=(8, 10), sigma=(3, 2), p_rotation=1, padding_mode_image="border")
        for step in (Convert3DTo2DTransform(), transform, Convert2DTo3DTransform()):
            data = step(**data)
        assert data["image"].shape == (2, *shape)
        deformed = data["image"] - 10 * torch.arange(5.0).view(1, 5, 1, 1)
        torch.testing.assert_close(deformed, deformed[:, :1].expand_as(deformed), atol=1e-4, rtol=0)
        torch.testing.assert_close(deformed[0], -deformed[1], atol=1e-4, rtol=0)
        assert (deformed[0, 0] - plane).abs().max() > 0.1

    def test_patch_of_one_voxel_along_an_axis(self) -> None:
        image = torch.from_numpy(smooth((1, 16, 16), 2))[None]
        result = make((1, 16, 16), sigma=(0, 3, 3), grid_spacing=(1, 8, 8), fold_free=True)(image=image)["image"]
        assert result.shape == image.shape
        assert result.isfinite().all()
        assert not torch.allclose(result, image)

    def test_pickled_and_copied_transforms_draw_alike(self) -> None:
        transform = make((10, 10, 10), p_rotation=1, fold_free=True)
        image = torch.rand(1, 10, 10, 10)
        results = []
        for version in (transform, pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform)):
            np.random.seed(5)
            results.append(version(image=image)["image"])
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sigma": -1}, "sigma.*-1"),
            ({"sigma": (1, 2)}, r"sigma must be one number or have 3 entries.*\(1, 2\)"),
            ({"sigma": float("nan")}, "sigma"),
            ({"p_deformation": 1.5}, "p_deformation.*1.5"),
            ({"grid_spacing": -4}, "grid_spacing.*-4"),
            ({"grid_spacing": None}, "either grid_spacing"),
        ],
    )
    def test_names_what_is_wrong(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make((16, 16, 16), **arguments)

    @pytest.mark.parametrize("argument", ["p_elastic_deform", "align_corners"])
    def test_refuses_arguments_that_it_replaces(self, argument: str) -> None:
        with pytest.raises(TypeError, match=argument):
            make((16, 16, 16), **{argument: 1})

    def test_passes_on_other_arguments(self) -> None:
        with pytest.raises(ValueError, match="seg_tiebreak"):
            make((16, 16, 16), seg_tiebreak="coin")

    def test_refuses_image_with_other_axes(self) -> None:
        with pytest.raises(ValueError, match="3 spatial axes, the patch"):
            make((16, 16))(image=torch.zeros(1, 4, 16, 16))


@pytest.mark.slow
class TestSpeed:
    """At 128^3 on one thread. The two transforms run alternately, and each ratio comes from one such turn."""

    @pytest.fixture(autouse=True)
    def _one_thread(self):
        before = torch.get_num_threads(), SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()
        torch.set_num_threads(1)
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        yield
        torch.set_num_threads(before[0])
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(before[1])

    @staticmethod
    def ratio(contestant: Any, reference: Any, rounds: int) -> float:
        ratios = []
        for turn in range(rounds + 1):
            seconds = []
            for run in (contestant, reference):
                np.random.seed(turn)
                start = perf_counter()
                run()
                seconds.append(perf_counter() - start)
            if turn:
                ratios.append(seconds[0] / seconds[1])
        return float(np.median(ratios))

    def test_field_takes_a_twentieth_of_the_elastic_one(self) -> None:
        size, image = (128,) * 3, torch.zeros(1, 128, 128, 128)
        ours = make(size, grid_spacing=32, sigma=4)
        theirs = SpatialTransform(size, 0, False, p_elastic_deform=1, elastic_deform_scale=0.2)
        ratio = self.ratio(lambda: ours.get_parameters(image=image), lambda: theirs.get_parameters(image=image), 3)
        assert ratio <= 1 / 20

    def test_whole_transform(self) -> None:
        size = (128,) * 3
        image = torch.from_numpy(np.tile(smooth((64,) * 3), (2, 2, 2)))[None]
        labels = torch.bucketize(image, torch.tensor([0.0, 0.7, 1.4])).to(torch.int16)
        affine: dict[str, Any] = {"p_rotation": 1, "rotation": (-0.5, 0.5), "p_scaling": 1, "scaling": (0.7, 1.4)}
        ours = make(size, grid_spacing=32, sigma=4, **affine)
        theirs = SpatialTransform(size, 0, False, **affine)
        itk_images = [SimpleITK.GetImageFromArray(volume[0].numpy()) for volume in (image, labels)]
        itk = SimpleITK.BSplineTransformInitializer(itk_images[0], [4, 4, 4], 3)
        itk.SetParameters(np.random.normal(0, 4, len(itk.GetParameters())))

        def resample() -> None:
            modes = (SimpleITK.sitkLinear, SimpleITK.sitkLabelLinear)
            for volume, mode in zip(itk_images, modes, strict=True):
                SimpleITK.Resample(volume, itk, mode)

        def whole(transform: SpatialTransform) -> Any:
            return lambda: transform(image=image, segmentation=labels)

        assert self.ratio(whole(ours), whole(theirs), 5) <= 1.25
        assert self.ratio(whole(ours), resample, 3) <= 1 / 3
