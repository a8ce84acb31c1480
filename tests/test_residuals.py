"""Inter-slice residuals against brute-force loops."""

import numpy as np
import pytest
import torch

from nnunet_conres.residuals import (
    has_neighbours,
    inter_slice_residual,
    label_residual,
    max_pool_to,
    residual_mask,
    residual_pyramid,
)


def loop_residual(volume: np.ndarray, slice_axis: int) -> np.ndarray:
    """|v[k] - v[k-1]| slice by slice, in Python integers or floats."""
    expected = np.zeros(volume.shape, dtype=np.float64)
    axis = slice_axis % (volume.ndim - 2) + 2
    moved, result = np.moveaxis(volume, axis, 0), np.moveaxis(expected, axis, 0)
    for k in range(1, moved.shape[0]):
        for index in np.ndindex(moved.shape[1:]):
            result[(k, *index)] = abs(float(moved[(k, *index)]) - float(moved[(k - 1, *index)]))
    return expected


def random_labels(*shape: int, n_labels: int = 4) -> torch.Tensor:
    return torch.randint(0, n_labels, shape, dtype=torch.int16)


class TestInterSliceResidual:
    @pytest.mark.parametrize("slice_axis", [0, 1, 2, -1])
    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.uint8, torch.int16, torch.int64]
    )
    def test_equals_loop(self, dtype: torch.dtype, slice_axis: int) -> None:
        volume = torch.randint(0, 2 if dtype == torch.bool else 200, (2, 3, 4, 5, 3)).to(dtype)
        expected = loop_residual(volume.double().numpy(), slice_axis)
        residual = inter_slice_residual(volume, slice_axis)
        assert residual.dtype == dtype
        np.testing.assert_array_equal(residual.double().numpy(), expected)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint16])
    def test_integers_do_not_wrap(self, dtype: torch.dtype) -> None:
        volume = torch.tensor([100, 3, 90]).to(dtype).view(1, 1, 3, 1, 1)
        assert inter_slice_residual(volume).flatten().tolist() == [0, 97, 87]

    def test_single_slice_is_zero(self) -> None:
        assert not inter_slice_residual(torch.rand(1, 2, 1, 4, 4)).any()

    def test_works_on_views_without_touching_them(self) -> None:
        storage = torch.rand(1, 2, 6, 6, 6)
        before = storage.clone()
        view = storage.transpose(2, 4)[:, :, ::2]
        np.testing.assert_allclose(inter_slice_residual(view).numpy(), loop_residual(view.numpy(), 0), atol=1e-6)
        assert torch.equal(storage, before)

    def test_gradient_equals_numerical(self) -> None:
        volume = torch.rand(1, 1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(inter_slice_residual, (volume,))

    def test_keeps_half_precision_under_autocast(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert inter_slice_residual(torch.rand(1, 1, 3, 2, 2).bfloat16()).dtype == torch.bfloat16

    @pytest.mark.parametrize("slice_axis", [3, -4])
    def test_refuses_an_axis_that_is_not_there(self, slice_axis: int) -> None:
        with pytest.raises(ValueError, match="out of range"):
            inter_slice_residual(torch.rand(1, 1, 3, 2, 2), slice_axis)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
    def test_compiles_without_graph_break(self, dtype: torch.dtype) -> None:
        volume = torch.randint(0, 2, (1, 2, 4, 3, 3)).to(dtype)
        compiled = torch.compile(inter_slice_residual, fullgraph=True, backend="eager")
        assert torch.equal(compiled(volume), inter_slice_residual(volume))


class TestLabelResidual:
    @pytest.mark.parametrize("slice_axis", [0, 2])
    def test_of_labels_and_regions_equals_loop(self, slice_axis: int) -> None:
        target = random_labels(2, 1, 5, 4, 3)
        classes = [1, (2, 3), [1, 2, 3], np.int64(3)]
        residual, mask = label_residual(target, classes=classes, slice_axis=slice_axis)
        assert mask is None
        assert residual.dtype == torch.bool
        for channel, members in enumerate(classes):
            members = [members] if np.isscalar(members) else list(members)
            one_hot = np.isin(target.numpy(), members).astype(float)
            np.testing.assert_array_equal(residual[:, [channel]].numpy(), loop_residual(one_hot, slice_axis))

    @pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.float32, torch.uint8])
    def test_any_label_dtype(self, dtype: torch.dtype) -> None:
        target = random_labels(1, 1, 4, 3, 3)
        expected, _ = label_residual(target, classes=[1, 2])
        assert torch.equal(label_residual(target.to(dtype), classes=[1, 2])[0], expected)

    def test_of_region_channels(self) -> None:
        target = torch.rand(2, 3, 5, 4, 4) > 0.5
        residual, mask = label_residual(target)
        assert mask is None
        np.testing.assert_array_equal(residual.numpy(), loop_residual(target.numpy().astype(float), 0))

    def test_ignore_label_is_defined_only_between_annotated_slices(self) -> None:
        target = random_labels(1, 1, 6, 4, 4, n_labels=3)
        target[0, 0, 2] = 3  # a slice without annotation
        target[0, 0, 4, 1, 1] = 3  # a voxel without annotation
        residual, mask = label_residual(target, classes=[1, 2], ignore_label=3)
        annotated = target.numpy()[0, 0] != 3
        for k, y, x in np.ndindex(6, 4, 4):
            defined = k > 0 and annotated[k, y, x] and annotated[k - 1, y, x]
            assert mask[0, 0, k, y, x].item() == defined
            for channel, label in enumerate([1, 2]):
                changes = defined and (target[0, 0, k, y, x] == label) != (target[0, 0, k - 1, y, x] == label)
                assert residual[0, channel, k, y, x].item() == changes

    def test_ignore_channel_of_regions_agrees_with_ignore_label(self) -> None:
        target = random_labels(1, 1, 6, 5, 4, n_labels=4)
        regions = torch.cat([target > 0, target > 1, target == 3], 1)
        regions[:, :2] &= target != 3
        from_labels = label_residual(target, classes=[(1, 2), 2], ignore_label=3)
        from_regions = label_residual(regions, ignore_label=3)
        for ours, theirs in zip(from_regions, from_labels, strict=True):
            assert torch.equal(ours, theirs)

    def test_nothing_annotated_defines_nothing(self) -> None:
        residual, mask = label_residual(torch.full((1, 1, 4, 3, 3), 2), classes=[1], ignore_label=2)
        assert not residual.any()
        assert not mask.any()

    def test_single_slice_with_ignore_label_defines_nothing(self) -> None:
        assert not residual_mask(torch.ones(1, 1, 1, 3, 3, dtype=torch.bool)).any()

    def test_refuses_a_label_map_of_several_channels(self) -> None:
        with pytest.raises(ValueError, match="one channel"):
            label_residual(torch.zeros(1, 2, 3, 3, 3), classes=[1])

    def test_compiles_without_graph_break(self) -> None:
        target = random_labels(1, 1, 5, 4, 4, n_labels=4)

        def both(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            residual, mask = label_residual(labels, classes=[1, (1, 2)], ignore_label=3)
            return residual_pyramid(residual, mask, [(3, 2, 2)])[0]

        compiled = torch.compile(both, fullgraph=True, backend="eager")
        for ours, theirs in zip(compiled(target), both(target), strict=True):
            assert torch.equal(ours, theirs)


class TestMaxPool:
    @pytest.mark.parametrize(
        ("full", "size"), [((8, 6, 4), (4, 3, 4)), ((7, 9, 5), (4, 5, 3)), ((5, 12, 7), (5, 3, 2))]
    )
    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
    def test_equals_loop_over_blocks(self, full: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype) -> None:
        mask = (torch.rand(2, 2, *full) > 0.8).to(dtype)
        window = [-(-f // s) for f, s in zip(full, size, strict=True)]
        pooled = max_pool_to(mask, size)
        assert pooled.shape == (2, 2, *size)
        assert pooled.dtype == dtype
        for b, c, *block in np.ndindex(2, 2, *size):
            covered = tuple(slice(i * w, (i + 1) * w) for i, w in zip(block, window, strict=True))
            assert pooled[(b, c, *block)] == mask[(b, c, *covered)].max()

    def test_border_of_one_voxel_survives_where_nearest_neighbour_loses_it(self) -> None:
        border = torch.zeros(1, 1, 16, 16, 16)
        border[:, :, 5] = 1
        nearest = torch.nn.functional.interpolate(border, (4, 4, 4), mode="nearest-exact")
        assert not nearest.any()
        assert max_pool_to(border, (4, 4, 4))[0, 0, 1].all()

    def test_size_that_no_stride_makes(self) -> None:
        mask = torch.zeros(1, 1, 10, 10, 10, dtype=torch.bool)
        mask[0, 0, 9, 0, 4] = True
        pooled = max_pool_to(mask, (7, 7, 7))
        assert pooled.shape[2:] == (7, 7, 7)
        assert pooled.any()

    @pytest.mark.parametrize("size", [(5, 4, 4), (0, 4, 4), (4, 4)])
    def test_refuses_to_enlarge(self, size: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="must not be larger"):
            max_pool_to(torch.zeros(1, 1, 4, 4, 4), size)

    def test_pyramid_pools_residual_and_mask_and_shares_equal_sizes(self) -> None:
        residual, mask = torch.rand(1, 2, 8, 8, 8) > 0.9, torch.rand(1, 1, 8, 8, 8) > 0.5
        levels = residual_pyramid(residual, mask, [(8, 8, 8), (8, 8, 8), (4, 4, 4), (2, 4, 4)])
        assert levels[0][0] is residual
        assert levels[1][0] is residual
        assert torch.equal(levels[2][0], max_pool_to(residual, (4, 4, 4)))
        assert torch.equal(levels[2][1], max_pool_to(mask, (4, 4, 4)))
        assert torch.equal(levels[3][0], max_pool_to(residual, (2, 4, 4)))
        assert residual_pyramid(residual, None, [(2, 2, 2)])[0][1] is None

    def test_pyramid_of_odd_sizes_covers_what_strided_convolutions_cover(self) -> None:
        """9 -> 5 -> 3 voxels at stride 2: coarse voxel i covers voxels 4i to 4i + 3."""
        for border in range(9):
            residual = torch.zeros(1, 1, 9, 9, 9, dtype=torch.bool)
            residual[:, :, border] = True
            coarse = residual_pyramid(residual, None, [(9, 9, 9), (5, 5, 5), (3, 3, 3)])[2][0]
            assert torch.nonzero(coarse[0, 0, :, 0, 0]).flatten().tolist() == [border // 4]


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_has_neighbours_equals_looking_at_every_pair(slice_axis: int) -> None:
    rng = np.random.default_rng(0)
    found = []
    for density in (0.0, 0.005, 0.02, 0.5, 1.0):
        for _ in range(20):
            annotated = rng.random((4, 5, 6)) < density
            slices = np.moveaxis(annotated, slice_axis, 0)
            expected = any((slices[k] & slices[k - 1]).any() for k in range(1, len(slices)))
            assert has_neighbours(annotated, slice_axis) == expected
            found.append(expected)
    assert any(found)
    assert not all(found)


def test_has_neighbours_along_another_axis_do_not_count() -> None:
    annotated = np.zeros((4, 5, 6), dtype=bool)
    annotated[2] = True
    assert [has_neighbours(annotated, axis) for axis in range(3)] == [False, True, True]
