from itertools import product

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tiles import (
    Curve,
    bootstrap_rate,
    count_by_distance,
    internal_border_distance,
    take_range,
    tile_figure,
    whole_tiles,
)


def distance_voxel_by_voxel(shape, tile, starts) -> np.ndarray:
    """Return each voxel's largest distance, over all tiles, to a tile border inside the image, counted in steps."""
    distance = np.full(shape, -1.0)
    for corner in product(*starts):
        stop = [start + length for start, length in zip(corner, tile, strict=True)]
        for voxel in product(*(range(a, b) for a, b in zip(corner, stop, strict=True))):
            nearest = np.inf
            for axis, direction in product(range(len(shape)), (-1, 1)):
                at, steps = voxel[axis], 0
                while corner[axis] <= at + direction < stop[axis]:
                    at, steps = at + direction, steps + 1
                if 0 <= at + direction < shape[axis]:
                    nearest = min(nearest, steps)
            distance[voxel] = max(distance[voxel], nearest)
    return distance


class TestInternalBorderDistance:
    @pytest.mark.parametrize(
        ("shape", "tile", "starts"),
        [
            ((8, 9, 6), (4, 3, 3), ([0, 4], [0, 3, 6], [0, 3])),
            ((8, 9, 6), (4, 9, 6), ([0, 4], [0], [0])),
            ((7, 10, 5), (4, 4, 4), ([0, 3], [0, 3, 6], [0, 1])),
            ((8, 8, 4), (4, 4, 4), ([0, 2, 4], [0, 2, 4], [0])),
            ((4, 5, 6), (4, 5, 6), ([0], [0], [0])),
            ((9, 7), (3, 4), ([0, 3, 6], [0, 3])),
        ],
    )
    def test_equals_a_search_from_every_voxel(self, shape, tile, starts):
        distance = internal_border_distance(shape, tile, starts)
        np.testing.assert_array_equal(distance, distance_voxel_by_voxel(shape, tile, starts))

    def test_every_voxel_of_half_overlapping_tiles_has_a_quarter_tile_of_context_in_one(self):
        starts = [0, 8, 16, 24]
        distance = internal_border_distance((40, 40, 40), (16, 16, 16), (starts, starts, starts))
        assert distance.min() == 16 / 4

    def test_tiles_out_of_the_image_are_refused(self):
        with pytest.raises(ValueError, match="from 4 to 8 reaches out of axis 1 of size 7"):
            internal_border_distance((4, 7), (4, 4), ([0], [0, 4]))

    def test_uncovered_voxels_are_refused(self):
        with pytest.raises(ValueError, match="No tile covers voxel 3 of axis 0"):
            internal_border_distance((8, 4), (3, 4), ([0, 5], [0]))


class TestWholeTiles:
    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            (48, (0, 48)),
            (50, (1, 49)),
            (53, (2, 50)),
            (54, (3, 51)),
            (55, (-9, 63)),
            (35, (-7, 41)),
            (10, (-7, 17)),
        ],
    )
    def test_at_most_a_quarter_of_a_tile_is_left_out(self, size, expected):
        assert whole_tiles((size, 24), (24, 24)) == (expected, (0, 24))

    def test_take_range_crops_and_pads(self):
        voxels = np.arange(2 * 5 * 3).reshape(2, 5, 3)
        taken = take_range(voxels, ((1, 4), (-1, 4)), fill=-7)
        padded = np.pad(voxels, ((0, 0), (0, 0), (1, 1)), constant_values=-7)
        np.testing.assert_array_equal(taken, padded[:, 1:4])
        assert not np.shares_memory(taken, voxels)


class TestRates:
    def test_counts_equal_a_loop(self):
        rng = np.random.default_rng(1)
        wrong, counted = rng.random((2, 4, 5, 6)) < 0.4
        distance = rng.integers(0, 5, (4, 5, 6)).astype(float)
        distance[0] = np.inf
        got_wrong, got_total = count_by_distance(wrong, distance, counted, 4)
        for at in range(4):
            there = [v for v in np.ndindex(4, 5, 6) if counted[v] and distance[v] == at]
            assert got_total[at] == len(there)
            assert got_wrong[at] == sum(bool(wrong[v]) for v in there)

    def test_rate_is_that_of_all_voxels_and_lies_in_its_interval(self):
        rng = np.random.default_rng(2)
        total = np.tile([100, 1000, 0], (30, 1))
        wrong = rng.binomial(total, 0.3)
        curve = bootstrap_rate(wrong, total)
        np.testing.assert_allclose(curve.rate[:2], wrong.sum(0)[:2] / total.sum(0)[:2])
        assert np.isnan([curve.rate[2], curve.low[2], curve.high[2]]).all()
        # The standard error of the mean over cases, computed from the cases.
        spread = (wrong / np.maximum(total, 1)).std(0, ddof=1)[:2] / np.sqrt(30)
        np.testing.assert_allclose((curve.high - curve.low)[:2], 2 * 1.96 * spread, rtol=0.1)
        assert curve.as_json()["rate"][2] is None

    def test_equal_cases_leave_no_interval(self):
        curve = bootstrap_rate(np.full((5, 1), 3), np.full((5, 1), 12))
        assert (curve.rate[0], curve.low[0], curve.high[0]) == (0.25, 0.25, 0.25)


def test_figure_shows_distances_with_enough_voxels_only():
    rate = np.linspace(0.3, 0.1, 5)
    curve = Curve(rate, rate - 0.02, rate + 0.02)
    voxels = np.array([5000, 4000, 3000, 2000, 10])
    weights = np.exp(-0.5 * ((np.arange(16) - 8) / 2) ** 2)
    figure = tile_figure({"none": curve, "half": curve}, {"none": curve}, voxels, weights=weights, baseline="half")
    FigureCanvasAgg(figure).draw()
    shares, errors, excess = figure.axes
    for line in (*errors.lines, excess.lines[0]):
        np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2, 3])
        np.testing.assert_allclose(line.get_ydata(), 100 * rate[:4])
    assert excess.lines[0].get_color() == errors.lines[0].get_color()
    assert [line.get_xdata()[0] for line in shares.lines if line.get_linestyle() == "--"] == [16, 32]
