"""Loading only the voxels that the draws need, against nnU-Net and batchgeneratorsv2 with the same draws."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_conres.augmentation.bspline import BSplineSpatialTransform
from nnunet_conres.augmentation.loading import DeviceBatches, DrawFirstLoader, finish
from nnunet_conres.augmentation.on_device import DevicePipeline, device_memory, unpacked
from nnunet_conres.planning.tracker import LiveStorages
from nnunet_conres.trainers.conresnet import nnUNetTrainerConResNetBSpline
from nnunet_conres.trainers.unet3d import nnUNetTrainerUNet3DPaper
from nnunet_conres.trainers.vnet import nnUNetTrainerVNetPaper
from tests.augmentation.test_on_device import Twice, assert_equal, blobs, reference, seed, smooth

CPU = torch.device("cpu")
N_CASES = 3
# larger than the patches, smaller than the initial patches along some axes, smaller than the patches
SHAPES = {"large": (30, 40, 36), "medium": (17, 30, 21), "small": (9, 12, 30)}
HUGE = (72, 72, 72)
PATCH, INITIAL = (12, 16, 14), (20, 27, 24)
LABELS = {"background": 0, "one": 1, "two": 2, "three": 3}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Function that returns a data set as preprocessed by nnU-Net: cases of one size with two channels."""

    def make(size: str, cascade: bool = False, ignore: bool = False, stored: str = "b2nd") -> Any:
        name = f"{size}{ignore}{stored}"
        folder, previous = root / name, root / f"{name}_previous"
        if not folder.exists():
            folder.mkdir()
            previous.mkdir()
            for number in range(N_CASES):
                seed(number)
                write(folder, previous, f"case_{number}", SHAPES.get(size, HUGE), ignore, stored)
        dataset = nnUNetDatasetBlosc2 if stored == "b2nd" else nnUNetDatasetNumpy
        return dataset(str(folder), folder_with_segs_from_previous_stage=str(previous) if cascade else None)

    root = tmp_path_factory.mktemp("preprocessed")
    return make


def write(folder: Path, previous: Path, case: str, shape: tuple[int, ...], ignore: bool, stored: str) -> None:
    image = smooth(2, shape).numpy()
    labels = blobs(1, shape, (-1, 0, 1, 2, 3)).numpy().astype(np.int8)
    locations = {
        label: np.argwhere(np.isin(labels, label)) for label in (1, 2, *((tuple([-1, 0, 1, 2]),) if ignore else (3,)))
    }
    chunks = {"chunks": (1, 8, 8, 8), "blocks": (1, 4, 8, 8)}
    dataset = nnUNetDatasetBlosc2 if stored == "b2nd" else nnUNetDatasetNumpy
    dataset.save_case(
        image, labels, {"class_locations": locations}, str(folder / case), **(chunks if stored == "b2nd" else {})
    )
    earlier = blobs(1, shape, (0, 1, 2, 3)).numpy()[0].astype(np.uint8)
    nnUNetDatasetBlosc2.save_seg(earlier, str(previous / case))


def stock_loader(
    dataset: Any,
    pipeline: BasicTransform | None,
    patch: tuple[int, ...] = PATCH,
    initial: tuple[int, ...] = INITIAL,
    ignore: bool = False,
    batch_size: int = 2,
) -> nnUNetDataLoader:
    labels = {**LABELS, "ignore": 3} if ignore else LABELS
    if ignore:
        del labels["three"]
    manager = LabelManager(labels, regions_class_order=None)
    return nnUNetDataLoader(dataset, batch_size, initial, patch, manager, 0.33, transforms=pipeline)


def nnunets(patch: tuple[int, ...] = PATCH, **changes: Any) -> ComposeTransforms:
    arguments: dict[str, Any] = {
        "rotation_for_DA": (-0.5, 0.5),
        "deep_supervision_scales": [[1] * len(patch), [0.5] * len(patch)],
        "mirror_axes": tuple(range(len(patch))),
        "do_dummy_2d_data_aug": False,
        "use_mask_for_norm": [True, False],
        "foreground_labels": [1, 2, 3],
    }
    trainer = changes.pop("trainer", nnUNetTrainer)
    return trainer.get_training_transforms(patch, **(arguments | changes))


def often(pipeline: ComposeTransforms) -> ComposeTransforms:
    """Rotate and scale in most samples, so that a few samples cover all combinations."""
    for transform in pipeline.transforms:
        if type(transform) is SpatialTransform:
            transform.p_rotation = transform.p_scaling = 0.6
    return pipeline


PIPELINES: dict[str, dict[str, Any]] = {
    "labels": {},
    "regions": {"regions": [[1, 2, 3], [2, 3], 3]},
    "ignore": {"ignore_label": 3, "regions": [[1, 2], 2]},
    "cascade": {"is_cascaded": True},
    "dummy-2D": {"do_dummy_2d_data_aug": True},
    "dummy-2D cascade": {"do_dummy_2d_data_aug": True, "is_cascaded": True},
    "B-spline": {"trainer": nnUNetTrainerConResNetBSpline},
    "B-spline dummy-2D": {"trainer": nnUNetTrainerConResNetBSpline, "do_dummy_2d_data_aug": True},
    "V-Net's paper": {"trainer": nnUNetTrainerVNetPaper},
    "3D U-Net's paper": {"trainer": nnUNetTrainerUNet3DPaper},
}


def compare(stock: nnUNetDataLoader, ours: DrawFirstLoader, key: str, number: int, force: bool) -> dict[str, Any]:
    """Check that nnU-Net and we get the same sample from the same draws. Return our sample as it was loaded."""
    pipeline = ours.pipeline
    seed(number)
    sample = ours._sample(key, force)
    mine = finish({"samples": [dict(sample)], "keys": [key]}, pipeline, CPU)

    seed(number)
    data, segmentation, previous, properties = stock._data.load_case(key)
    lower, upper = stock.get_bbox(data.shape[1:], force, properties["class_locations"])
    box = [[int(low), int(high)] for low, high in zip(lower, upper, strict=True)]
    image = torch.from_numpy(crop_and_pad_nd(data, box, 0)).float()
    labels = torch.from_numpy(crop_and_pad_nd(segmentation, box, -1)).short()
    if previous is not None:
        earlier = crop_and_pad_nd(previous, box, -1, cast_cropped_to=np.int16)
        labels = torch.cat((labels, torch.from_numpy(earlier).short()[None]))
    if stock.patch_size_was_2d:
        image, labels = image[:, 0], labels[:, 0]
    theirs: dict[str, Any] = {"image": image, "segmentation": labels}
    for transform, parameters in zip(pipeline.on_device, unpacked(sample["parameters"]), strict=True):
        inner = transform.transform if isinstance(transform, RandomTransform) else transform
        if isinstance(inner, BSplineSpatialTransform):
            with mock.patch.object(inner, "draw", lambda image, drawn=parameters: drawn):
                theirs = inner.apply(theirs, **inner.get_parameters(**theirs))
        elif isinstance(inner, SpatialTransform):
            theirs = inner.apply(theirs, **inner.get_parameters(**theirs))
        elif parameters is not None:
            theirs = reference(inner, theirs, parameters)
    one = {"image": mine["data"][0], "segmentation": [target[0] for target in mine["target"]]}
    assert_equal(one, theirs, tolerance=2e-4)
    return sample


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("name", PIPELINES)
def test_equals_nnunets_loading_for_the_same_draws(cases: Callable[..., Any], name: str, size: str) -> None:
    ignore, cascade = name == "ignore", "cascade" in name
    initial = (PATCH[0], *INITIAL[1:]) if "dummy" in name else INITIAL
    pipeline = often(nnunets(**dict(PIPELINES[name])))
    stock = stock_loader(cases(size, cascade, ignore), None, initial=initial, ignore=ignore)
    ours = DrawFirstLoader.of(stock, DevicePipeline(pipeline))
    assert ours.pipeline.on_cpu == []
    for number in range(6):
        compare(stock, ours, f"case_{number % N_CASES}", number, force=number % 2 == 0)


def test_two_dimensions(cases: Callable[..., Any]) -> None:
    stock = stock_loader(cases("large"), None, patch=(24, 20), initial=(36, 33))
    ours = DrawFirstLoader.of(stock, DevicePipeline(often(nnunets((24, 20)))))
    for number in range(8):
        sample = compare(stock, ours, "case_0", number, force=number % 2 == 0)
        assert sample["image"].ndim == 3


def test_npz_files_and_labels_of_16_bits(cases: Callable[..., Any]) -> None:
    dataset = cases("medium", stored="npz")
    stock = stock_loader(dataset, None)
    ours = DrawFirstLoader.of(stock, DevicePipeline(often(nnunets())))
    for number in range(4):
        assert compare(stock, ours, "case_1", number, force=False)["segmentation"].dtype == torch.int8
    load = dataset.load_case
    dataset.load_case = lambda key: (lambda a, b, c, d: (a, b.astype(np.int16) * 100, c, d))(*load(key))
    assert compare(stock, ours, "case_1", 0, force=False)["segmentation"].dtype == torch.int16


def test_validation_is_the_patch_itself(cases: Callable[..., Any]) -> None:
    validation = nnUNetTrainer.get_validation_transforms([[1, 1, 1], [0.5, 0.5, 0.5]], regions=[[1, 2, 3], 3])
    for size in SHAPES:
        stock = stock_loader(cases(size), validation, initial=PATCH)
        ours = DrawFirstLoader.of(stock, DevicePipeline(validation))
        for number in range(3):
            seed(number)
            theirs = next(stock)
            seed(number)
            mine = finish(next(ours), ours.pipeline, CPU)
            assert torch.equal(mine["data"], theirs["data"])
            assert [t.dtype for t in mine["target"]] == [torch.bool] * 2
            assert all(torch.equal(a, b) for a, b in zip(mine["target"], theirs["target"], strict=True))
            assert list(mine["keys"]) == list(theirs["keys"])


class Recording:
    """An array that counts the voxels that are read from it."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.voxels = array, array.shape, 0

    def __getitem__(self, where: Any) -> Any:
        read = self.array[where]
        self.voxels += read.size
        return read


def test_no_more_is_read_than_the_draws_need(cases: Callable[..., Any]) -> None:
    dataset = cases("large")
    ours = DrawFirstLoader.of(stock_loader(dataset, None), DevicePipeline(nnunets()))
    images, *rest = dataset.load_case("case_0")
    recording = Recording(images)
    dataset.load_case = lambda key: (recording, *rest)
    read = []
    for number in range(60):
        seed(number)
        recording.voxels = 0
        sample = ours._sample("case_0", False)
        assert recording.voxels == sample["image"].numel()
        read.append(recording.voxels / 2)
    assert np.median(read) <= np.prod(PATCH)
    assert max(read) <= np.prod(INITIAL)
    assert np.mean(read) < 0.5 * np.prod(INITIAL)


def test_a_users_transform_sees_what_it_always_saw(cases: Callable[..., Any]) -> None:
    """It comes after nnU-Net's spatial transform. All transforms up to the user's run in the worker."""
    stock_transforms = nnunets().transforms
    pipeline = DevicePipeline(ComposeTransforms([*stock_transforms[:1], Twice(), *stock_transforms[-2:]]))
    stock = stock_loader(cases("large"), ComposeTransforms([*pipeline.on_cpu, *pipeline.on_device]))
    ours = DrawFirstLoader.of(stock, pipeline)
    for number in range(3):
        seed(number)
        theirs = next(stock)
        seed(number)
        mine = finish(next(ours), pipeline, CPU)
        # the device draws no random numbers, so the draws are the same
        assert torch.equal(mine["data"], theirs["data"])
        assert all(torch.equal(a, b) for a, b in zip(mine["target"], theirs["target"], strict=True))


@pytest.mark.parametrize("regions", [None, [[1, 2, 3], [2, 3], 3]], ids=["labels", "regions"])
def test_memory_on_the_device_is_foreseen(
    cases: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, regions: list[Any] | None
) -> None:
    """Memory is counted on the CPU, for the largest rotation and scaling in every sample."""
    # all labels of this small patch would be resampled at once, unlike those of a patch of 128 cubed
    for module in ("spatial_on_device", "on_device"):
        monkeypatch.setattr(f"nnunet_conres.augmentation.{module}.INDICATOR_VOXELS", 0)
    patch, rotation = (24, 24, 24), np.pi / 6
    initial = tuple(map(int, get_patch_size(patch, rotation, rotation, rotation, (0.85, 1.25))))
    pipeline = nnunets(patch, regions=regions, rotation_for_DA=(rotation, rotation))
    for transform in pipeline.transforms:
        if isinstance(transform, SpatialTransform):
            transform.p_rotation, transform.p_scaling, transform.scaling = 1, 1, 1.4
    dataset = cases("huge")
    source = DrawFirstLoader.of(stock_loader(dataset, None, patch, initial), DevicePipeline(pipeline))
    batch, apply = next(source), source.pipeline.apply

    def with_copy(data: dict[str, Any], *drawn: Any, **where: Any) -> dict[str, Any]:
        data["image"] = data["image"].clone()  # a copy, as on another device
        return apply(data, *drawn, **where)

    monkeypatch.setattr(source.pipeline, "apply", with_copy)
    with LiveStorages() as storages:
        finish(batch, source.pipeline, CPU)
    foreseen = device_memory(patch, 2, 2, 2 if regions is None else len(regions))
    assert 0.5 * foreseen < max(storages.live) <= foreseen


class TestBatches:
    """The thread that works ahead on CUDA, here on the CPU."""

    def source(self, cases: Callable[..., Any]) -> DrawFirstLoader:
        return DrawFirstLoader.of(stock_loader(cases("large"), None), DevicePipeline(nnunets()))

    def test_ahead_gives_the_same_batches(self, cases: Callable[..., Any]) -> None:
        batches = []
        for ahead in (False, True):
            seed(0)
            source = self.source(cases)
            made = DeviceBatches(iter(source), source.pipeline, CPU, ahead=ahead)
            batches.append([next(made) for _ in range(4)])
            made.close()
        for one, other in zip(*batches, strict=True):
            assert list(one["keys"]) == list(other["keys"])
            assert torch.equal(one["data"], other["data"])
            assert all(torch.equal(a, b) for a, b in zip(one["target"], other["target"], strict=True))

    def test_one_batch_ahead_and_no_more(self, cases: Callable[..., Any]) -> None:
        source, asked = self.source(cases), threading.Semaphore(0)

        def counting() -> Iterator[dict[str, Any]]:
            while True:
                asked.release()
                yield next(source)

        made = DeviceBatches(counting(), source.pipeline, CPU, ahead=True)
        for _ in range(3):
            next(made)
        number = 0
        while asked.acquire(timeout=1):
            number += 1
        assert number == 4
        made.close()
        assert not any(thread.name == "augmentation" for thread in threading.enumerate())

    @pytest.mark.parametrize("ahead", [False, True])
    def test_an_error_on_the_device_says_how_to_do_without(
        self, cases: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, ahead: bool
    ) -> None:
        source = self.source(cases)

        def out_of_memory(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

        monkeypatch.setattr(source.pipeline, "apply", out_of_memory)
        made = DeviceBatches(iter(source), source.pipeline, CPU, ahead=ahead)
        with pytest.raises(RuntimeError, match=r"Tried to allocate 2 GiB\. .*nnUNet_conres_device_augmentation=0"):
            next(made)

    @pytest.mark.parametrize("ahead", [False, True])
    def test_an_error_in_loading_is_passed_on_as_it_is(self, cases: Callable[..., Any], ahead: bool) -> None:
        source = self.source(cases)

        def broken() -> Iterator[dict[str, Any]]:
            raise OSError("disk")
            yield {}

        with pytest.raises(OSError, match=r"^disk$"):
            next(DeviceBatches(broken(), source.pipeline, CPU, ahead=ahead))


def numbers_of(batches: Iterator[dict[str, Any]], samples: int) -> dict[str, list[float]]:
    """Return every statistic that is compared, one number per sample."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: Any) -> None:
        found.setdefault(name, []).append(float(value))

    while len(found.get("mean 0", ())) < samples:
        batch = next(batches)
        for image, target in zip(batch["data"], batch["target"][0], strict=True):
            for channel, values in enumerate(image):
                deviation = values.std()
                standard = (values - values.mean()) / deviation
                note(f"mean {channel}", values.mean())
                note(f"deviation {channel}", deviation)
                note(f"skewness {channel}", (standard**3).mean())
                note(f"kurtosis {channel}", (standard**4).mean())
                note(f"roughness {channel}", values.diff(dim=-1).abs().mean() / deviation)
                for share in (0.02, 0.25, 0.75, 0.98):
                    note(f"quantile {share} {channel}", torch.quantile(values.flatten(), share))
            for label in range(4):
                note(f"label {label}", (target == label).double().mean())
    return {name: values[:samples] for name, values in found.items()}


def positions_of(batches: Iterator[dict[str, Any]], samples: int) -> dict[str, list[float]]:
    """Return positions and distortions of patches, from images whose values are coordinates."""
    found: dict[str, list[float]] = {}
    while len(found.get("position 0", ())) < samples:
        for image in next(batches)["data"]:
            middle = [extent // 2 for extent in image.shape[1:]]
            for axis in range(3):
                here = image[(axis, *middle)]
                found.setdefault(f"position {axis}", []).append(float(here))
                for along in range(3):
                    there = list(middle)
                    there[along] += 3
                    found.setdefault(f"step {axis} {along}", []).append(float(image[(axis, *there)] - here))
    return {name: values[:samples] for name, values in found.items()}


def assert_same_distributions(one: dict[str, list[float]], other: dict[str, list[float]]) -> None:
    """Check with Kolmogorov-Smirnov tests, at a significance level of 1 % for all comparisons together."""
    values = {name: scipy.stats.ks_2samp(one[name], other[name]).pvalue for name in one}
    worst = min(values, key=values.__getitem__)
    assert values[worst] > 0.01 / len(values), (worst, values[worst])


def with_coordinates(dataset: Any) -> Any:
    load = dataset.load_case

    def load_case(key: str) -> Any:
        images, *rest = load(key)
        axes = [np.arange(extent, dtype=np.float32) for extent in images.shape[1:]]
        return (np.stack(np.meshgrid(*axes, indexing="ij")), *rest)

    dataset.load_case = load_case
    return dataset


@pytest.mark.parametrize("samples", [120, pytest.param(2000, marks=pytest.mark.slow)])
class TestDistributions:
    """nnU-Net's batches and ours have the same distributions. `test_the_tests_notice` checks a real difference."""

    def both(self, dataset: Any, pipeline: ComposeTransforms) -> tuple[Iterator[Any], Iterator[Any]]:
        stock = stock_loader(dataset, pipeline)
        source = DrawFirstLoader.of(stock, DevicePipeline(pipeline))
        return iter(stock), DeviceBatches(iter(source), source.pipeline, CPU)

    def test_intensities_and_labels(self, cases: Callable[..., Any], samples: int) -> None:
        stock, ours = self.both(cases("large"), nnunets())
        assert_same_distributions(numbers_of(stock, samples), numbers_of(ours, samples))

    def test_positions_and_displacements(self, cases: Callable[..., Any], samples: int) -> None:
        pipeline = ComposeTransforms([t for t in nnunets().transforms if not isinstance(t, RandomTransform)][:1])
        stock, ours = self.both(with_coordinates(cases("large")), pipeline)
        stock_numbers, our_numbers = (
            positions_of((one | {"target": [one["target"]]} for one in batches), samples) for batches in (stock, ours)
        )
        assert_same_distributions(stock_numbers, our_numbers)


def test_the_tests_notice(cases: Callable[..., Any]) -> None:
    """The comparison fails for a pipeline that applies all intensity transforms three times as often."""
    changed = nnunets()
    for transform in changed.transforms:
        if isinstance(transform, RandomTransform):
            transform.apply_probability *= 3
    stock, other = (stock_loader(cases("large"), pipeline) for pipeline in (nnunets(), changed))
    with pytest.raises(AssertionError):
        assert_same_distributions(numbers_of(iter(stock), 120), numbers_of(iter(other), 120))
