"""Histogram matching against scikit-image and NumPy."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from skimage.exposure import match_histograms

from nnunet_conres.augmentation.histogram import HistogramMatchingTransform

SHAPE = (24, 24, 24)
LEVELS = np.linspace(0, 1, 128)


@pytest.fixture(autouse=True)
def _seed() -> None:
    np.random.seed(0)
    torch.manual_seed(0)


def patch(kind: str, channels: int = 1, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """Return grey values of a kind of scan: normally distributed, skewed, or mostly one value."""
    noise = torch.randn(channels, *shape)
    if kind == "skewed":
        return noise.exp() * 40 + 100
    if kind == "clipped":
        return noise.clamp_min(0.3)
    return noise


def matched(image: torch.Tensor, reference: torch.Tensor, **data: Any) -> torch.Tensor:
    """Return the image, matched by a transform that has seen only the reference."""
    transform = HistogramMatchingTransform(p=1)
    transform(image=reference)
    return transform(image=image, **data)["image"]


class TestMatching:
    @pytest.mark.parametrize("kind", ["normal", "skewed"])
    @pytest.mark.parametrize("other", ["normal", "skewed", "clipped"])
    def test_quantiles_become_those_of_the_reference(self, kind: str, other: str) -> None:
        image, reference = patch(kind), patch(other)
        result = matched(image, reference).numpy()
        spread = np.ptp(np.quantile(reference.numpy(), [0.01, 0.99]))
        difference = np.quantile(result, LEVELS) - np.quantile(reference.numpy(), LEVELS)
        # the lowest and highest grey values depend on a few voxels, which the sample may miss
        assert np.abs(difference[2:-2]).max() < 0.03 * spread

    def test_equals_scikit_image_within_sampling(self) -> None:
        image, reference = patch("normal"), patch("skewed")
        expected = match_histograms(image.numpy(), reference.numpy())
        result = matched(image, reference).numpy()
        low, high = np.quantile(image.numpy(), [0.02, 0.98])
        middle = (image.numpy() > low) & (image.numpy() < high)
        assert np.abs(result - expected)[middle].max() < 0.03 * np.ptp(np.quantile(reference.numpy(), [0.01, 0.99]))

    def test_equals_numpy_where_every_voxel_is_sampled(self) -> None:
        shape = (20, 20, 20)  # fewer voxels than are drawn
        image, reference = patch("normal", shape=shape), patch("skewed", shape=shape)
        result = matched(image, reference).numpy()
        expected = np.interp(image.numpy(), np.quantile(image.numpy(), LEVELS), np.quantile(reference.numpy(), LEVELS))
        # the lookup table has 2^14 entries
        np.testing.assert_allclose(result, expected, atol=0.002 * np.ptp(expected))
        assert np.abs(result - expected).mean() < 1e-5 * np.ptp(expected)

    @pytest.mark.parametrize("kind", ["normal", "skewed", "clipped"])
    @pytest.mark.parametrize("other", ["normal", "skewed", "clipped"])
    def test_is_monotone(self, kind: str, other: str) -> None:
        image = patch(kind)
        order = image.flatten().argsort()
        result = matched(image, patch(other)).flatten()[order].double()
        # up to rounding of single precision
        assert torch.diff(result).min() >= -1e-6 * result.abs().max()

    def test_goes_on_with_slope_one_beyond_the_sample(self) -> None:
        image, reference = patch("normal", shape=(40, 40, 40)), patch("skewed")
        image.view(-1)[:3] = torch.tensor([-50.0, 50.0, 51.0])
        transform = HistogramMatchingTransform(p=1, max_voxels=1000)
        transform(image=reference)
        result = transform(image=image)["image"].flatten()
        assert result[2] - result[1] == pytest.approx(1, abs=1e-3)
        assert result[0] == result.min()
        assert result[2] == result.max()

    def test_matching_to_itself_changes_next_to_nothing(self) -> None:
        image = patch("skewed", shape=(20, 20, 20))
        torch.testing.assert_close(matched(image, image), image, rtol=1e-3, atol=1e-2)

    def test_channels_follow_the_same_reference(self) -> None:
        transform = HistogramMatchingTransform(p=1)
        for offset in (0.0, 100.0, 200.0):
            transform(image=torch.stack([patch("normal")[0] + offset, patch("normal")[0] - offset]))
        seen = set()
        for _ in range(20):
            # the copy remembers only the three references above, which have different means
            probe = copy.deepcopy(transform)
            result = probe(image=patch("normal", 2))["image"].mean((1, 2, 3)).tolist()
            assert sum(result) == pytest.approx(0, abs=1)
            seen.add(round(result[0], -2))
            np.random.randint(10)
        assert seen == {0, 100, 200}

    def test_one_extreme_voxel_does_not_blunt_the_rest(self) -> None:
        image, reference = patch("normal", shape=(20, 20, 20)), patch("skewed")
        image.view(-1)[0] = 1e30
        result = matched(image, reference).flatten()
        assert result.isfinite().all()
        expected = np.quantile(reference.numpy(), [0.1, 0.5, 0.9])
        np.testing.assert_allclose(np.quantile(result.numpy(), [0.1, 0.5, 0.9]), expected, rtol=0.03)

    @pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 1.0, 5.0)])
    def test_few_grey_values(self, values: tuple[float, ...]) -> None:
        shape = (20, 20, 20)
        image = torch.tensor(values)[torch.randint(len(values), (1, *shape))]
        reference = patch("skewed", shape=shape)
        result = matched(image, reference)
        for value in values:
            # a value shared by many voxels is mapped to the middle of the quantiles that it covers
            held = np.quantile(reference.numpy(), LEVELS[np.quantile(image.numpy(), LEVELS) == value])
            assert result[image == value].numpy() == pytest.approx((held[0] + held[-1]) / 2, rel=1e-4)

    def test_two_dimensions(self) -> None:
        result = matched(patch("normal", shape=(64, 64)), patch("skewed", shape=(80, 50)))
        assert result.shape == (1, 64, 64)
        assert result.median().item() == pytest.approx(140, rel=0.05)

    def test_input_stays_as_it_is(self) -> None:
        image = patch("normal")
        before = image.clone()
        assert not torch.equal(matched(image, patch("skewed")), before)
        assert torch.equal(image, before)

    def test_view_that_is_not_contiguous(self) -> None:
        storage = patch("normal", shape=(24, 24, 48))
        view = storage[..., ::2].transpose(1, 3)
        reference = patch("skewed")
        np.random.seed(1)
        result = matched(view, reference)
        np.random.seed(1)
        assert torch.equal(result, matched(view.contiguous(), reference))


class TestOutside:
    """Voxels that are padding or outside nnU-Net's nonzero mask."""

    def test_stays_and_takes_no_part(self) -> None:
        image, reference = patch("normal"), patch("skewed")
        outside = torch.zeros(SHAPE, dtype=torch.bool)
        outside[:14] = True
        image[:, outside] = 0
        segmentation = torch.where(outside, -1, 0).to(torch.int16)[None]
        result = matched(image, reference, segmentation=segmentation)
        assert not result[:, outside].any()
        inside = ~outside
        expected = np.quantile(reference.numpy(), [0.25, 0.5, 0.75])
        np.testing.assert_allclose(np.quantile(result[0][inside].numpy(), [0.25, 0.5, 0.75]), expected, rtol=0.02)

    def test_takes_no_part_in_the_reference_either(self) -> None:
        transform = HistogramMatchingTransform(p=1)
        reference = patch("skewed")
        segmentation = torch.zeros(2, *SHAPE, dtype=torch.int16)
        segmentation[0, :20] = -1
        segmentation[1] = -1  # the second channel, the previous stage's segmentation, must not matter
        reference[:, :20] = 0
        transform(image=reference, segmentation=segmentation)
        assert transform.remembered[0].min() > 100

    @pytest.mark.parametrize("inside", [0, 50])
    def test_too_few_voxels(self, inside: int) -> None:
        transform = HistogramMatchingTransform(p=1)
        transform(image=patch("skewed"))
        image = patch("normal")
        segmentation = torch.full((1, *SHAPE), -1, dtype=torch.int16)
        segmentation.view(-1)[:inside] = 0
        assert torch.equal(transform(image=image, segmentation=segmentation)["image"], image)
        assert len(transform.remembered) == 1

    @pytest.mark.parametrize("inside", [150, 21_000])
    def test_small_part_of_a_large_patch(self, inside: int) -> None:
        transform = HistogramMatchingTransform(p=1)
        transform(image=patch("skewed"))
        image = patch("normal", shape=(80, 80, 80))
        segmentation = torch.full((1, 80, 80, 80), -1, dtype=torch.int16)
        segmentation.view(-1)[:inside] = 0
        result = transform(image=image, segmentation=segmentation)["image"].flatten()
        assert result[:inside].median().item() == pytest.approx(140, rel=0.1)
        assert torch.equal(result[inside:], image.flatten()[inside:])


class TestMemory:
    def test_first_patch_stays_as_it_is(self) -> None:
        image = patch("normal")
        assert torch.equal(HistogramMatchingTransform(p=1)(image=image)["image"], image)

    def test_holds_patches_as_they_came_and_drops_the_oldest(self) -> None:
        transform = HistogramMatchingTransform(p=1, memory=3)
        for offset in range(5):
            transform(image=patch("normal") + 100 * offset)
        medians = [round(float(np.median(table)), -2) for table in transform.remembered]
        assert medians == [200, 300, 400]

    def test_remembers_also_what_it_does_not_match(self) -> None:
        transform = HistogramMatchingTransform(p=0)
        image = patch("normal")
        for _ in range(2):
            assert torch.equal(transform(image=image)["image"], image)
        assert len(transform.remembered) == 2

    def test_probability(self) -> None:
        transform = HistogramMatchingTransform(p=0.3, memory=1)
        changed = 0
        for _ in range(200):
            image = patch("normal", shape=(8, 8, 8))
            changed += not torch.equal(transform(image=image)["image"], image)
        assert 40 <= changed <= 80

    def test_patches_with_other_channels_are_no_reference(self) -> None:
        transform = HistogramMatchingTransform(p=1)
        transform(image=patch("skewed", channels=2))
        image = patch("normal")
        assert torch.equal(transform(image=image)["image"], image)

    def test_pickles(self) -> None:
        transform = HistogramMatchingTransform(p=1)
        transform(image=patch("skewed"))
        image = patch("normal")
        results = []
        for version in (pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform), transform):
            np.random.seed(3)
            results.append(version(image=image)["image"])
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[2])
        assert not torch.equal(results[2], image)


class TestNothingToMatch:
    @pytest.mark.parametrize("value", [0.0, 1e6, 1e-38])
    def test_constant_image(self, value: float) -> None:
        image = torch.full((1, *SHAPE), value)
        assert torch.equal(matched(image, patch("skewed")), image)
        almost = image * (1 + 1e-7 * torch.randn(image.shape))
        assert torch.equal(matched(almost, patch("skewed")), almost)

    def test_constant_reference(self) -> None:
        image = patch("normal")
        assert torch.equal(matched(image, torch.zeros(1, *SHAPE)), image)

    def test_one_constant_channel(self) -> None:
        image, reference = patch("normal", 3), patch("skewed", 3)
        image[0], reference[1] = 5, 5
        result = matched(image, reference)
        assert torch.equal(result[:2], image[:2])
        assert result[2].median().item() == pytest.approx(140, rel=0.05)

    def test_almost_all_voxels_alike(self) -> None:
        image = torch.zeros(1, *SHAPE)
        image.view(-1)[:40] = torch.rand(40)
        result = matched(image, patch("skewed"))
        assert result.isfinite().all()

    def test_makes_no_nan(self) -> None:
        image, reference = patch("normal"), patch("skewed")
        image.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30])
        reference.view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
        result = matched(image, reference).flatten()
        assert result.isnan().nonzero().flatten().tolist() == [0]
        assert np.isfinite(result[4:].numpy()).all()

    def test_no_image(self) -> None:
        segmentation = torch.zeros(1, *SHAPE)
        with pytest.raises(KeyError):
            HistogramMatchingTransform(p=1)(segmentation=segmentation)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"p": -0.1}, "p must be a probability.*-0.1"),
            ({"p": 1, "memory": 0}, "memory=0"),
            ({"p": 1, "n_quantiles": 1}, "n_quantiles=1"),
            ({"p": 1, "max_voxels": 10}, "max_voxels=10"),
        ],
    )
    def test_names_what_is_wrong(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HistogramMatchingTransform(**arguments)
