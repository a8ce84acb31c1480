"""Transforms on a device against batchgeneratorsv2 with the same draws and input. Ties between labels may differ."""

from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_conres.augmentation.bspline import BSplineSpatialTransform
from nnunet_conres.augmentation.channel_dropout import ChannelDropoutTransform
from nnunet_conres.augmentation.histogram import HistogramMatchingTransform
from nnunet_conres.augmentation.mirror_outside import MirrorOutsideTransform
from nnunet_conres.augmentation.on_device import DevicePipeline, packed, unpacked
from nnunet_conres.augmentation.spatial_on_device import SpatialDraws, apply_spatial, is_crop, labels_in, reach

SIZES = [(14, 17, 20), (18, 23)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MOST_TIES = 1e-4


def seed(number: int) -> None:
    np.random.seed(number)
    torch.manual_seed(number)


def smooth(channels: int, size: tuple[int, ...]) -> torch.Tensor:
    """Return averaged noise: images with structure."""
    noise = torch.randn(1, channels, *size)
    pool = torch.nn.functional.avg_pool3d if len(size) == 3 else torch.nn.functional.avg_pool2d
    return pool(noise, 3, 1, 1)[0] * 3


def blobs(channels: int, size: tuple[int, ...], labels: tuple[int, ...]) -> torch.Tensor:
    """Return segmentations whose labels form connected blobs."""
    values = smooth(channels, size)
    levels = torch.quantile(values.flatten(), torch.linspace(0, 1, len(labels) + 1)[1:-1])
    return torch.tensor(labels, dtype=torch.int16)[torch.bucketize(values, levels)]


def sample(size: tuple[int, ...], channels: int = 3, labels: tuple[int, ...] = (-1, 0, 1, 2, 3)) -> dict[str, Any]:
    data = {"image": smooth(channels, size), "segmentation": blobs(2, size, labels)}
    if -1 in labels:  # the image ends within the patch
        data["segmentation"][:, :2] = -1
    return data


def copied(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() for name, value in data.items()}


def on(device: str, data: dict[str, Any]) -> dict[str, Any]:
    """Return a sample on another device."""
    return {
        name: [one.to(device) for one in value] if isinstance(value, list) else value.to(device)
        for name, value in data.items()
    }


def reference(transform: BasicTransform, data: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Call batchgeneratorsv2's ``apply`` with these parameters."""
    parameters = dict(parameters)
    if "seed" in parameters:
        seed(parameters.pop("seed"))
    parameters.pop("channels", None)
    if isinstance(transform, (Convert3DTo2DTransform, Convert2DTo3DTransform)):
        parameters = transform.get_parameters(**data)
    if isinstance(transform, HistogramMatchingTransform):
        parameters["inside"] = data["segmentation"][0] != -1
    return transform.apply(data, **parameters)


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    assert ours["image"].dtype == theirs["image"].dtype
    torch.testing.assert_close(ours["image"], theirs["image"], rtol=0, atol=tolerance)
    labels = [one["segmentation"] for one in (ours, theirs)]
    labels = labels if isinstance(labels[0], list) else [[one] for one in labels]
    for mine, other in zip(*labels, strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        assert (mine != other).double().mean() < MOST_TIES


CONTRAST = BGContrast((0.75, 1.25))
TRANSFORMS: dict[str, BasicTransform] = {
    "noise": GaussianNoiseTransform((0.05, 0.3), p_per_channel=0.7, synchronize_channels=True),
    "noise by channel": GaussianNoiseTransform((0.05, 0.3), p_per_channel=0.7),
    "blur": GaussianBlurTransform((0.5, 1.5), p_per_channel=0.7, benchmark=True),
    "blur alike": GaussianBlurTransform(0.8, synchronize_channels=True, synchronize_axes=True, p_per_channel=0.7),
    "brightness": MultiplicativeBrightnessTransform(CONTRAST, False, 0.7),
    "contrast": ContrastTransform(CONTRAST, True, False, 0.7),
    "contrast, any range": ContrastTransform(CONTRAST, False, True, 0.7),
    "low resolution": SimulateLowResolutionTransform((0.3, 1), False, False, (0,), None, 0.7),
    "gamma": GammaTransform(CONTRAST, 0.5, False, 0.7, 0.5),
    "mirroring": MirrorTransform((0, 1)),
    "channel dropout": ChannelDropoutTransform(0.5),
    "mask": MaskImageTransform([0, 2], 0, 0),
    "removal of a label": RemoveLabelTransform(-1, 0),
    "previous stage": MoveSegAsOneHotToDataTransform(1, [1, 2, 3]),
    "regions": ConvertSegmentationToRegionsTransform([[1, 2, 3], [2, 3], 3]),
    "deep supervision": DownsampleSegForDSTransform([[1, 1, 1], [1, 0.5, 0.5]]),
    "histogram": HistogramMatchingTransform(1, max_voxels=1000),
    "mirrored outside": MirrorOutsideTransform(),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=["3D", "2D"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_equals_batchgenerators(name: str, size: tuple[int, ...], device: str) -> None:
    if device == "cuda" and name.startswith("noise"):
        pytest.skip("a GPU draws other noise: see test_noise_of_a_gpu")
    transform = TRANSFORMS[name]
    if name == "deep supervision":
        transform = DownsampleSegForDSTransform([[1] * len(size), [0.5] * len(size)])
    pipeline = DevicePipeline(ComposeTransforms([transform]))
    changed = 0
    for number in range(4):
        seed(number)
        data = sample(size)
        draws = pipeline.draw(data["image"], data["segmentation"])
        (parameters,) = draws.parameters
        assert parameters is not None
        theirs = reference(transform, copied(data), parameters)
        ours = pipeline.apply(
            on(device, copied(data)), unpacked(packed([parameters])), shape=size, box=[], labels=[], sticks_out=True
        )
        assert_equal(on("cpu", ours), theirs)
        changed += any(not isinstance(theirs[key], list) and not torch.equal(theirs[key], data[key]) for key in data)
    assert changed or name == "deep supervision"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["noise", "noise by channel"])
def test_noise_of_a_gpu(name: str) -> None:
    """Other random numbers than on the CPU, with batchgeneratorsv2's channels and standard deviations."""
    pipeline = DevicePipeline(ComposeTransforms([TRANSFORMS[name]]))
    for number in range(4):
        seed(number)
        data = sample((40, 40, 40))
        (parameters,) = pipeline.draw(data["image"]).parameters
        assert parameters is not None
        theirs = reference(TRANSFORMS[name], copied(data), parameters)
        there = on("cuda", copied(data))
        ours = on("cpu", pipeline.apply(there, [parameters], shape=(), box=[], labels=[], sticks_out=True))
        added, expected = (one["image"] - data["image"] for one in (ours, theirs))
        torch.testing.assert_close(added.std((1, 2, 3)), expected.std((1, 2, 3)), rtol=0.03, atol=0)
        assert added.mean((1, 2, 3)).abs().max() < 0.01


def one_hot(size: tuple[int, ...]) -> dict[str, Any]:
    data = sample(size, 2)
    return MoveSegAsOneHotToDataTransform(1, [1, 2, 3])(**data)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=["3D", "2D"])
@pytest.mark.parametrize("number", range(6))
def test_cascades_transforms_equal_batchgenerators(number: int, size: tuple[int, ...], device: str) -> None:
    channels = [-3, -2, -1]
    for transform in (
        ApplyRandomBinaryOperatorTransform(list(channels), strel_size=(1, 4), p_per_label=1),
        RemoveRandomConnectedComponentFromOneHotEncodingTransform(list(channels), 0.5, 0.15, p_per_label=1),
    ):
        seed(number)
        data = one_hot(size)
        pipeline = DevicePipeline(ComposeTransforms([transform]))
        (parameters,) = pipeline.draw(data["image"]).parameters
        assert parameters is not None
        theirs = reference(transform, copied(data), parameters)
        # transforms in other processes shuffle their channels between the draw and its application
        np.random.shuffle(transform.channel_idx)
        there = on(device, copied(data))
        ours = on("cpu", pipeline.apply(there, [parameters], shape=size, box=[], labels=[], sticks_out=True))
        assert_equal(ours, theirs)
        assert not torch.equal(ours["image"], data["image"])


@pytest.mark.parametrize("size", [1.5, 2.0, 3.7])
def test_structuring_elements_of_any_size(size: float) -> None:
    """skimage's element has an even number of voxels per axis for some radii."""
    transform = ApplyRandomBinaryOperatorTransform([0], strel_size=size)
    pipeline = DevicePipeline(ComposeTransforms([transform]))
    for number in range(4):
        seed(number)
        data = {"image": (torch.rand(1, 12, 11, 13) < 0.02).float(), "segmentation": torch.zeros(1, 12, 11, 13)}
        (parameters,) = pipeline.draw(data["image"]).parameters
        assert parameters is not None
        theirs = reference(transform, copied(data), parameters)
        ours = pipeline.apply(copied(data), [parameters], shape=(), box=[], labels=[], sticks_out=True)
        assert torch.equal(ours["image"], theirs["image"])


SPATIAL: dict[str, dict[str, Any]] = {
    "nnU-Net's": {},
    "rotation": {"p_rotation": 1},
    "scaling": {"p_scaling": 1},
    "both": {"p_rotation": 1, "p_scaling": 1},
    "elastic": {"p_rotation": 0.5, "p_elastic_deform": 1, "elastic_deform_magnitude": (2, 5)},
    "labels nearest": {"p_rotation": 1, "p_scaling": 1, "mode_seg": "nearest"},
    "images nearest": {"p_rotation": 1, "mode_image": "nearest"},
    "ties to the lowest": {"p_rotation": 1, "seg_tiebreak": "lowest"},
    "ties to the highest": {"p_rotation": 1, "seg_tiebreak": "highest"},
    "zeros outside": {"p_rotation": 1, "p_scaling": 1, "border_mode_seg": "zeros", "padding_value_seg": 7},
    "constant outside": {"p_rotation": 1, "p_scaling": 1, "padding_mode_image": "constant", "padding_value_image": 2},
    "border": {"p_rotation": 1, "p_scaling": 1, "padding_mode_image": "border", "border_mode_seg": "border"},
    "reflection": {
        "p_rotation": 1,
        "p_scaling": 1,
        "padding_mode_image": "reflection",
        "border_mode_seg": "reflection",
    },
    "random crop": {"p_rotation": 0.5, "random_crop": True, "patch_center_dist_from_border": 4},
}
BSPLINES: dict[str, dict[str, Any]] = {
    "B-spline": {"p_deformation": 1, "grid_spacing": 8.0, "sigma": 2.0},
    "B-spline of cells": {"p_deformation": 1, "grid_size": 2, "sigma": 1.5, "p_rotation": 0, "p_scaling": 0},
    "B-spline, often": {"p_deformation": 0.5, "grid_spacing": 8.0, "sigma": 2.0, "p_rotation": 0.5, "p_scaling": 0.5},
    "B-spline, reflection": {
        **{"p_deformation": 1, "grid_spacing": 8.0, "sigma": 2.0},
        **{"padding_mode_image": "reflection", "border_mode_seg": "reflection"},
    },
}


def make_spatial(name: str, patch: tuple[int, ...]) -> SpatialTransform:
    nnunets: dict[str, Any] = {
        "patch_center_dist_from_border": 0,
        "random_crop": False,
        "p_rotation": 0.2,
        "rotation": (-0.6, 0.6),
        "p_scaling": 0.2,
        "scaling": (0.7, 1.4),
        "p_synchronize_scaling_across_axes": 0.5,
        "border_mode_seg": "constant",
        "padding_value_seg": -1,
    }
    if name in BSPLINES:
        return BSplineSpatialTransform(patch, **(nnunets | {"p_rotation": 1, "p_scaling": 1} | BSPLINES[name]))
    return SpatialTransform(patch, **(nnunets | SPATIAL[name]))


def compare_spatial(
    transform: SpatialTransform, initial: tuple[int, ...], labels: tuple[int, ...], number: int, device: str = "cpu"
) -> tuple[int, int]:
    """Return the number of label voxels that differ and of all. Our transform gets only the region that it requests."""
    seed(number)
    data = sample(initial, labels=labels)
    seed(number)
    theirs = transform(**copied(data))
    seed(number)
    parameters = SpatialDraws(transform)(torch.zeros(()).expand(3, *initial))
    region = reach(transform, parameters, initial)
    box = [(max(low, 0), min(high, extent)) for (low, high), extent in zip(region, initial, strict=True)]
    where = (slice(None), *(slice(low, high) for low, high in box))
    read = {name: value[where].clone() for name, value in data.items()}
    ours = apply_spatial(
        transform,
        on(device, read),
        parameters,
        shape=initial,
        box=box,
        labels=labels_in(read["segmentation"].numpy()),
        sticks_out=any(low < a or high > b for (low, high), (a, b) in zip(region, box, strict=True)),
    )
    ours = on("cpu", ours)
    if is_crop(parameters):
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["segmentation"], theirs["segmentation"])
    assert ours["segmentation"].dtype == theirs["segmentation"].dtype
    torch.testing.assert_close(ours["image"], theirs["image"], rtol=0, atol=1e-4)
    return int((ours["segmentation"] != theirs["segmentation"]).sum()), ours["segmentation"].numel()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("labels", [(0, 1), (-1, 0, 1, 2, 3, 4, 9)], ids=len)
@pytest.mark.parametrize("name", [*SPATIAL, *BSPLINES])
def test_spatial_equals_batchgenerators(name: str, labels: tuple[int, ...], device: str) -> None:
    """Initial patches larger than nnU-Net's, of nnU-Net's size, and too small for the draws."""
    different = total = 0
    for number, (patch, initial) in enumerate(
        [
            ((12, 14, 16), (24, 28, 32)),
            ((12, 14, 16), (11, 14, 17)),
            ((15, 16, 1), (21, 24, 3)),
            ((20, 30), (33, 44)),
            ((20, 30), (20, 29)),
        ]
    ):
        voxels = compare_spatial(make_spatial(name, patch), initial, labels, number, device)
        different, total = different + voxels[0], total + voxels[1]
    assert different / total < MOST_TIES, f"{different} of {total} labels differ"


def test_one_label_everywhere() -> None:
    for initial in ((30, 34, 38), (11, 14, 17)):
        assert compare_spatial(make_spatial("both", (12, 14, 16)), initial, (0,), 0)[0] == 0


def test_most_patches_need_no_more_than_their_own_voxels() -> None:
    """64 % of nnU-Net's patches are neither rotated nor scaled. The others read no more than necessary."""
    transform, initial = make_spatial("nnU-Net's", (32, 32, 32)), (62, 62, 62)
    voxels = []
    for number in range(400):
        seed(number)
        parameters = SpatialDraws(transform)(torch.zeros(()).expand(1, *initial))
        region = reach(transform, parameters, initial)
        assert region == [(15, 47)] * 3 or not is_crop(parameters)
        voxels.append(np.prod([high - low for low, high in region]) / 32**3)
    assert 0.55 < np.mean(np.array(voxels) == 1) < 0.73
    assert np.mean(voxels) < 0.3 * (62 / 32) ** 3


class Twice(ImageOnlyTransform):
    """A user's transform."""

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        return img * 2


WITHOUT_A_GPU = (
    *("mirroring", "channel dropout", "mask", "removal of a label", "previous stage", "regions"),
    *("deep supervision", "histogram", "mirrored outside", "binary operators", *SPATIAL, *BSPLINES),
)


@pytest.mark.parametrize("name", WITHOUT_A_GPU)
def test_nothing_mixes_devices(name: str) -> None:
    """On fake CUDA tensors, which have no data, but a device that every operation checks.

    The other transforms are left out, because they read values.
    """
    size = (20, 22, 24)
    if name in TRANSFORMS:
        transform = TRANSFORMS[name]
    elif name == "binary operators":
        transform = ApplyRandomBinaryOperatorTransform([-1, -2], strel_size=(1, 3))
    else:
        transform = make_spatial(name, (12, 14, 16))
    pipeline = DevicePipeline(ComposeTransforms([transform]))
    data = sample(size)
    pipeline.draw(data["image"], data["segmentation"])  # histogram matching needs an earlier patch
    parameters = pipeline.draw(data["image"], data["segmentation"]).parameters
    where: dict[str, Any] = {"shape": size, "box": [(0, n) for n in size], "labels": [0, 1, 2], "sticks_out": True}
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = {key: torch.empty(value.shape, dtype=value.dtype, device="cuda") for key, value in data.items()}
        done = pipeline.apply(fake, parameters, **where)
    tensors = [t for value in done.values() for t in (value if isinstance(value, list) else [value])]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}


def nnunets_pipeline(**changes: Any) -> ComposeTransforms:
    arguments: dict[str, Any] = {
        "patch_size": (12, 16, 16),
        "rotation_for_DA": (-0.5, 0.5),
        "deep_supervision_scales": [[1, 1, 1], [0.5, 0.5, 0.5]],
        "mirror_axes": (0, 1, 2),
        "do_dummy_2d_data_aug": False,
        "use_mask_for_norm": [True, False],
        "is_cascaded": True,
        "foreground_labels": [1, 2, 3],
        "regions": [[1, 2, 3], [2, 3]],
        "ignore_label": 3,
    }
    return nnUNetTrainer.get_training_transforms(**(arguments | changes))


@pytest.mark.parametrize("dummy_2d", [False, True])
def test_nnunets_whole_pipeline_runs_on_the_device(dummy_2d: bool) -> None:
    """Fails if a new version of nnU-Net has unknown transforms."""
    stock = nnunets_pipeline(do_dummy_2d_data_aug=dummy_2d)
    pipeline = DevicePipeline(stock)
    assert pipeline.on_cpu == pipeline.unknown == []
    assert pipeline.on_device == stock.transforms
    assert DevicePipeline(nnUNetTrainer.get_validation_transforms([[1, 1, 1]], regions=[1, [1, 2]])).on_cpu == []


class TestWhatIsNotKnown:
    def test_a_users_transform_stays_on_the_cpu_with_all_before_it(self) -> None:
        stock = nnunets_pipeline().transforms
        pipeline = DevicePipeline(ComposeTransforms([*stock[:4], RandomTransform(Twice()), *stock[4:]]))
        assert pipeline.unknown == ["Twice"]
        assert len(pipeline.on_cpu) == 5
        assert pipeline.on_device == stock[4:]

    def test_subclasses_and_functions_that_may_look_at_the_image(self) -> None:
        class Other(MirrorTransform):
            pass

        def by_image(image: torch.Tensor, channel: int | None) -> float:
            return float(image.max())

        brightness = MultiplicativeBrightnessTransform(by_image, False)
        for transform, name in ((Other((0,)), "Other"), (brightness, "MultiplicativeBrightnessTransform")):
            assert DevicePipeline(ComposeTransforms([transform])).unknown == [name]

    def test_histogram_matching_only_comes_first(self) -> None:
        matching = HistogramMatchingTransform(1)
        assert DevicePipeline(ComposeTransforms([matching, MirrorTransform((0,))])).unknown == []
        after = DevicePipeline(ComposeTransforms([MirrorTransform((0,)), matching]))
        assert after.unknown == ["HistogramMatchingTransform"]
        assert DevicePipeline(RandomTransform(matching)).unknown == ["HistogramMatchingTransform"]


def test_draws_are_small_to_send() -> None:
    """Parameters of every sample go through a queue. The sampling grid of 128 cubed alone would take 25 MB."""
    pipeline = DevicePipeline(nnunets_pipeline(patch_size=(128, 128, 128)))
    for number in range(30):
        seed(number)
        draws = pipeline.draw(torch.zeros(()).expand(4, 249, 249, 249))
        assert len(packed(draws.parameters)) < 20_000
