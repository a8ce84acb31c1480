"""nnU-Net's augmentation on the training device. Worker processes draw the parameters, the device applies transforms.

Every transform of batchgeneratorsv2 has two parts. ``get_parameters`` draws random numbers and needs only the shape of
the image. It is called unchanged, so that the distributions are nnU-Net's. ``apply`` changes the images. If it works
only on the CPU, a function of this module replaces it; otherwise it is called unchanged.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from acvl_utils.morphology.morphology_helper import label_with_component_sizes
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import (
    ApplyRandomBinaryOperatorTransform,
    binary_closing_torch,
    binary_dilation_torch,
    binary_erosion_torch,
    binary_opening_torch,
)
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform, _build_kernel
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
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from skimage.morphology import ball, disk
from torch import Tensor
from torch.nn.functional import pad

from nnunet_conres.augmentation.bspline import BSplineSpatialTransform
from nnunet_conres.augmentation.channel_dropout import ChannelDropoutTransform
from nnunet_conres.augmentation.histogram import OUTSIDE, HistogramMatchingTransform
from nnunet_conres.augmentation.mirror_outside import MirrorOutsideTransform
from nnunet_conres.augmentation.spatial_on_device import (
    INDICATOR_VOXELS,
    Interval,
    SpatialDraws,
    apply_spatial,
    is_crop,
    reach,
)

Data = dict[str, Any]
Parameters = dict[str, Any]

# Range of scalings for which nnU-Net chooses the size of the initial patch.
_SCALES = (0.85, 1.25)
# Name of the parameter with the random seed of ``apply``.
SEED = "seed"


def _as_it_is(transform: BasicTransform, data: Data, parameters: Parameters) -> Data:
    return transform.apply(data, **parameters)


def _drawn_where_applied(transform: BasicTransform, data: Data, parameters: Parameters) -> Data:
    """Apply a transform that draws nothing: its parameters follow from the data."""
    return transform(**data)


def _with_numbers(transform: BasicTransform, data: Data, parameters: Parameters) -> Data:
    """Apply a transform that computes with single entries of its parameters, which are tensors on the CPU."""
    numbers = {n: v.tolist() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in parameters.items()}
    return transform.apply(data, **numbers)


def add_noise(transform: GaussianNoiseTransform, data: Data, parameters: Parameters) -> Data:
    """Apply GaussianNoiseTransform with a random generator on the image's device, not PyTorch's global one."""
    image, channels = data["image"], parameters["apply_idx"].tolist()
    generator = torch.Generator(image.device).manual_seed(parameters[SEED])
    if channels:
        noise = torch.empty((len(channels), *image.shape[1:]), device=image.device, dtype=image.dtype)
        noise.normal_(generator=generator)
        sigmas = parameters["sigmas"]
        for index, channel in enumerate(channels):
            sigma = sigmas if transform.synchronize_channels else sigmas[index]
            image[channel].add_(noise[index], alpha=float(sigma))
    return data


def blur(transform: GaussianBlurTransform, data: Data, parameters: Parameters) -> Data:
    """Apply GaussianBlurTransform as sums of shifted images: CUDA may round the factors of a convolution to 10 bits."""
    image = data["image"]
    channels = np.flatnonzero(np.asarray(parameters["apply_to_channel"]))
    for index, channel in enumerate(channels):
        sigmas = parameters["sigmas"] if transform.synchronize_channels else parameters["sigmas"][index]
        blurred = image[channel]
        for axis, sigma in enumerate(sigmas):
            blurred = _blur_along(blurred, axis, _build_kernel(sigma, truncate=6).tolist())
        image[channel] = blurred
    return data


def _blur_along(image: Tensor, axis: int, kernel: Sequence[float]) -> Tensor:
    """Blur one channel along an axis, mirrored at its borders without repeating the outermost voxel."""
    n, half = image.shape[axis], len(kernel) // 2
    if half >= n:
        raise ValueError(
            f"A Gaussian kernel of {len(kernel)} voxels does not fit an image of {n} voxels along an axis."
        )
    mirrored = torch.arange(-half, n + half, device=image.device).abs_()
    mirrored = torch.minimum(mirrored, 2 * (n - 1) - mirrored)
    padded = image.index_select(axis, mirrored)
    result = padded.narrow(axis, 0, n) * kernel[0]
    for shift, weight in enumerate(kernel[1:], start=1):
        result.add_(padded.narrow(axis, shift, n), alpha=weight)
    return result


def move_to_image(transform: MoveSegAsOneHotToDataTransform, data: Data, parameters: Parameters) -> Data:
    """Apply MoveSegAsOneHotToDataTransform, whose own tensor is always on the CPU."""
    image, segmentation = data["image"], data["segmentation"]
    source = segmentation[transform.source_channel_idx]
    labels = torch.tensor(list(transform.all_labels), device=image.device, dtype=source.dtype)
    one_hot = source == labels.reshape(-1, *[1] * source.ndim)
    data["image"] = torch.cat((image, one_hot.to(image.dtype)))
    if transform.remove_channel_from_source:
        remaining = [c for c in range(len(segmentation)) if c != transform.source_channel_idx]
        data["segmentation"] = segmentation[remaining]
    return data


def convert_to_regions(transform: ConvertSegmentationToRegionsTransform, data: Data, parameters: Parameters) -> Data:
    """Apply ConvertSegmentationToRegionsTransform, whose lists of labels are on the CPU."""
    labels = data["segmentation"][transform.channel_in_seg]
    regions = torch.zeros((len(transform.regions), *labels.shape), dtype=torch.bool, device=labels.device)
    for region, members in zip(regions, transform.regions, strict=True):
        for label in members.tolist():
            region |= labels == label
    data["segmentation"] = regions
    return data


def apply_binary_operators(transform: ApplyRandomBinaryOperatorTransform, data: Data, parameters: Parameters) -> Data:
    """Apply ApplyRandomBinaryOperatorTransform, whose structuring element is on the CPU."""
    image = data["image"]
    drawn = zip(parameters["apply_to_channels"], parameters["operators"], parameters["strel_size"], strict=True)
    for channel, operator, size in drawn:
        before = image[channel].bool()
        element = torch.from_numpy((disk if before.ndim == 2 else ball)(size, dtype=bool)).to(image.device)
        after = _BINARY_OPERATORS[operator](before, element)
        # Masks instead of indices, here and below: for indices the CPU would wait for the device.
        added = after & ~before
        for other in parameters["channels"]:
            if other != channel:
                image[other].masked_fill_(added, 0)
        image[channel] = after
    return data


def _dilate(mask: Tensor, element: Tensor) -> Tensor:
    """Dilate a mask, by counting its voxels under the structuring element with a Fourier transform.

    batchgeneratorsv2 multiplies the Fourier transforms as matrices, which CUDA may round to 10 bits.
    """
    size = [n + k - 1 for n, k in zip(mask.shape, element.shape, strict=True)]
    before = [(k - 1) // 2 for k in element.shape]
    # Correlation: the count at voxel i is over the mask under the element that begins at i - before.
    spectrum = torch.fft.rfftn(mask.float(), s=size) * torch.fft.rfftn(element.float(), s=size).conj()
    counts = torch.fft.irfftn(spectrum, s=size)
    counts = counts.roll(before, tuple(range(mask.ndim)))
    return counts[tuple(slice(n) for n in mask.shape)] > 0.5


def _erode(mask: Tensor, element: Tensor) -> Tensor:
    return ~_dilate(~mask, element)


_BINARY_OPERATORS: dict[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]] = {
    binary_dilation_torch: _dilate,
    binary_erosion_torch: _erode,
    binary_opening_torch: lambda mask, element: _dilate(_erode(mask, element), element),
    binary_closing_torch: lambda mask, element: _erode(_dilate(mask, element), element),
}


def remove_components(
    transform: RemoveRandomConnectedComponentFromOneHotEncodingTransform, data: Data, parameters: Parameters
) -> Data:
    """Apply RemoveRandomConnectedComponentFromOneHotEncodingTransform; the components are found on the CPU."""
    image, random = data["image"], np.random.RandomState(parameters[SEED])
    for channel in parameters["apply_to_channels"]:
        labelled, sizes = label_with_component_sizes(image[channel].bool().cpu().numpy())
        largest = labelled.size * transform.dont_do_if_covers_more_than_x_percent
        candidates = [component for component, size in sizes.items() if size < largest]
        if not candidates:
            continue
        removed = torch.from_numpy(labelled == random.choice(candidates)).to(image.device)
        image[channel].masked_fill_(removed, 0)
        others = [c for c in parameters["channels"] if c != channel]
        if random.uniform() < transform.fill_with_other_class_p and others:
            image[random.choice(others)].masked_fill_(removed, 1)
    return data


def match_histogram(transform: HistogramMatchingTransform, data: Data, parameters: Parameters) -> Data:
    """Apply HistogramMatchingTransform; the mask of voxels to map is computed on the device."""
    inside = data["segmentation"][0] != OUTSIDE if data.get("segmentation") is not None else None
    return transform.apply(data, maps=parameters["maps"], inside=inside)


_APPLY: dict[type[BasicTransform], Callable[..., Data]] = {
    MultiplicativeBrightnessTransform: _with_numbers,
    ContrastTransform: _with_numbers,
    GammaTransform: _with_numbers,
    SimulateLowResolutionTransform: _as_it_is,
    MirrorTransform: _as_it_is,
    ChannelDropoutTransform: _as_it_is,
    MirrorOutsideTransform: _as_it_is,
    Convert3DTo2DTransform: _drawn_where_applied,
    Convert2DTo3DTransform: _drawn_where_applied,
    MaskImageTransform: _drawn_where_applied,
    RemoveLabelTransform: _drawn_where_applied,
    DownsampleSegForDSTransform: _drawn_where_applied,
    GaussianNoiseTransform: add_noise,
    GaussianBlurTransform: blur,
    MoveSegAsOneHotToDataTransform: move_to_image,
    ConvertSegmentationToRegionsTransform: convert_to_regions,
    ApplyRandomBinaryOperatorTransform: apply_binary_operators,
    RemoveRandomConnectedComponentFromOneHotEncodingTransform: remove_components,
    HistogramMatchingTransform: match_histogram,
    SpatialTransform: apply_spatial,
    BSplineSpatialTransform: apply_spatial,
}
# Their get_parameters reads the image itself, so they can only come first.
_LOOK_AT_THE_IMAGE = (HistogramMatchingTransform, MirrorOutsideTransform)
_SHUFFLE_THEIR_CHANNELS = (
    ApplyRandomBinaryOperatorTransform,
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
_DRAW_IN_APPLY = (GaussianNoiseTransform, RemoveRandomConnectedComponentFromOneHotEncodingTransform)


def _is_known(transform: BasicTransform) -> bool:
    """Return whether a transform can be split: drawn in a worker process, and applied on the device."""
    if type(transform) is RandomTransform:
        # The region needs a spatial transform that is always applied. Histogram matching must see every patch.
        excluded = (SpatialTransform, *_LOOK_AT_THE_IMAGE)
        return _is_known(transform.transform) and not isinstance(transform.transform, excluded)
    if type(transform) not in _APPLY:
        return False
    if isinstance(transform, SpatialTransform) and transform.align_corners:
        return False
    operators = transform.any_of_these if isinstance(transform, ApplyRandomBinaryOperatorTransform) else ()
    if not set(operators) <= set(_BINARY_OPERATORS):
        return False
    # A function that draws a number may read the image; nnU-Net's own, BGContrast, doesn't.
    return all(type(value) is BGContrast or not callable(value) for value in vars(transform).values())


def _flat(transforms: Sequence[BasicTransform]) -> list[BasicTransform]:
    """Return all transforms, including those of nested pipelines."""
    return [t for one in transforms for t in (_flat(one.transforms) if type(one) is ComposeTransforms else [one])]


@dataclass(frozen=True)
class Draws:
    """The random draws for one sample.

    Attributes:
        parameters: Parameters of every transform; None if it is not applied.
        region: The voxels of the initial patch that are read, an interval along each axis; None for all.
        is_crop: Whether the spatial transform only crops.
    """

    parameters: list[Parameters | None]
    region: list[Interval] | None
    is_crop: bool = True


class DevicePipeline:
    """A pipeline of nnU-Net, split into a part for the worker processes and a part for the training device.

    The worker processes apply all transforms up to the last one that is not known to run on the device. nnU-Net's
    pipeline and those of this package have no such transform.

    Args:
        pipeline: The pipeline from a trainer's ``get_training_transforms`` or ``get_validation_transforms``.

    Attributes:
        on_cpu: Transforms that the workers apply, in order.
        unknown: Names of the transforms among them that can't run on the device.
        on_device: Transforms that follow on the device.
        looks_at_the_image: Whether the first of ``on_device`` draws its parameters from the image.
        spatial: The spatial transform among ``on_device`` that determines the region, if there is one.
    """

    def __init__(self, pipeline: BasicTransform) -> None:
        transforms = _flat([pipeline])
        unknown = [index for index, transform in enumerate(transforms) if not _is_known(transform)]
        unknown += [i for i, t in enumerate(transforms) if isinstance(t, _LOOK_AT_THE_IMAGE) and i > 0]
        spatial = [i for i, t in enumerate(transforms) if isinstance(t, SpatialTransform)]
        unknown += spatial[:-1]  # all but the last: a region is chosen for only one
        first = max(unknown, default=-1) + 1
        self.on_cpu, self.on_device = transforms[:first], transforms[first:]
        self.unknown = [type(getattr(transforms[i], "transform", transforms[i])).__name__ for i in sorted(set(unknown))]
        self.looks_at_the_image = bool(self.on_device) and isinstance(self.on_device[0], _LOOK_AT_THE_IMAGE)
        self.spatial: SpatialTransform | None = next(
            (t for t in self.on_device if isinstance(t, SpatialTransform)), None
        )
        self._spatial_draws = None if self.spatial is None else SpatialDraws(self.spatial)

    def draw(self, image: Tensor, segmentation: Tensor | None = None) -> Draws:
        """Draw the parameters of all transforms on the device, with their own ``get_parameters``.

        Args:
            image: The initial patch, (C, *spatial). Its values matter only if ``looks_at_the_image``; otherwise a
                `stand_in` is enough.
            segmentation: As ``image``.

        Returns:
            The draws.
        """
        drawn: list[Parameters | None] = []
        initial, region, only_crops = image.shape[1:], None, True
        channels = len(image)
        for transform in self.on_device:
            if type(transform) is RandomTransform:
                if not transform.get_parameters(image=image)["apply_transform"]:
                    drawn.append(None)
                    continue
                transform = transform.transform
            if isinstance(transform, SpatialTransform):
                assert self._spatial_draws is not None
                parameters = self._spatial_draws(image)
                shape, only_crops = image.shape[1:], is_crop(parameters)
                intervals = reach(transform, parameters, shape)
                # with dummy-2D augmentation the first axis is among the channels
                intervals = [(0, n) for n in initial[: len(initial) - len(shape)]] + intervals
                region = None if self.looks_at_the_image else intervals
                image = stand_in(len(image), transform.patch_size)
            else:
                parameters = _draw(transform, image, segmentation)
                if isinstance(transform, Convert3DTo2DTransform):
                    channels = len(image)
                    image = stand_in(channels * image.shape[1], image.shape[2:])
                elif isinstance(transform, Convert2DTo3DTransform):
                    image = stand_in(channels, (len(image) // channels, *image.shape[1:]))
                elif isinstance(transform, MoveSegAsOneHotToDataTransform):
                    image = stand_in(len(image) + len(transform.all_labels), image.shape[1:])
            drawn.append(parameters)
        return Draws(drawn, region, only_crops)

    def apply(
        self,
        data: Data,
        parameters: Sequence[Parameters | None],
        *,
        shape: Sequence[int],
        box: Sequence[Interval],
        labels: Sequence[int],
        sticks_out: bool,
    ) -> Data:
        """Apply the transforms on the device to one sample.

        Args:
            data: ``image`` and ``segmentation``, channels first, on their device.
            parameters: Parameters from ``draw``.
            shape: Shape of the initial patch.
            box: The part of the initial patch that ``data`` contains, an interval along each axis.
            labels: All labels of the segmentation, ascending.
            sticks_out: Whether the spatial transform may read beyond the box.

        Returns:
            ``data`` after the pipeline.
        """
        for transform, drawn in zip(self.on_device, parameters, strict=True):
            if drawn is None:
                continue
            inner = transform.transform if type(transform) is RandomTransform else transform
            if isinstance(inner, SpatialTransform):
                axes = slice(-len(inner.patch_size), None)  # without the first one with dummy-2D augmentation
                data = apply_spatial(
                    inner, data, drawn, shape=shape[axes], box=box[axes], labels=labels, sticks_out=sticks_out
                )
            else:
                data = _APPLY[type(inner)](inner, data, drawn)
        return data


def device_memory(patch: Sequence[int], batch_size: int, channels: int, target_bytes: int) -> int:
    """Return the bytes that augmentation needs on the device at most, in addition to the batch of the training step.

    Two batches, of training and validation, are waiting or in preparation, and one sample is being processed. It is
    largest with the largest rotation and scaling, when it is the whole initial patch. Its image is resampled before its
    labels.

    Args:
        patch: Patch size in voxels.
        batch_size: Number of samples.
        channels: Number of image channels.
        target_bytes: Bytes per voxel of the target at full size.
    """
    angle = np.pi / (6 if len(patch) == 3 else 2)
    initial = int(np.prod(get_patch_size(list(patch), angle, angle, angle, _SCALES).astype(np.int64)))
    voxels, dim = int(np.prod(np.array(patch, dtype=np.int64))), len(patch)
    image, label, number = 4 * channels, 2, 4
    images = (image + label + 1) * initial + (number * dim + image) * voxels
    indicators = max(number * initial, min(number * INDICATOR_VOXELS, 4 * number * initial))
    labels = (label + 1) * initial + 2 * indicators + (number * dim + image + 6 * number) * voxels
    with_scales = target_bytes * 8 / 7  # each scale of deep supervision has an eighth of the one before
    return max(images, labels) + round(2 * batch_size * (image + with_scales) * voxels)


def stand_in(channels: int, size: Sequence[int]) -> Tensor:
    """Return an image of the given shape that takes the memory of one number."""
    return torch.zeros(()).expand(channels, *size)


def _draw(transform: BasicTransform, image: Tensor, segmentation: Tensor | None) -> Parameters:
    if _APPLY[type(transform)] is _drawn_where_applied:
        return {}
    parameters = transform.get_parameters(image=image, segmentation=segmentation)
    if isinstance(transform, HistogramMatchingTransform):
        del parameters["inside"]  # as large as the patch
    if isinstance(transform, _SHUFFLE_THEIR_CHANNELS):
        parameters["channels"] = list(transform.channel_idx)
    if isinstance(transform, _DRAW_IN_APPLY):
        parameters[SEED] = np.random.randint(2**32, dtype=np.uint64).item()
    return parameters


def packed(parameters: Sequence[Parameters | None]) -> bytes:
    """Pickle parameters for another process: by value, because every shared tensor takes a file descriptor."""
    return pickle.dumps(list(parameters), pickle.HIGHEST_PROTOCOL)


def unpacked(parameters: bytes) -> list[Parameters | None]:
    """Undo ``packed``."""
    return pickle.loads(parameters)


def padded(tensor: Tensor, margins: Sequence[tuple[int, int]], value: float) -> Tensor:
    """Pad a tensor along its last axes; ``margins`` are the numbers of voxels (before, after) along each of them."""
    if not any(map(any, margins)):
        return tensor
    return pad(tensor, [n for margin in reversed(margins) for n in margin], value=value)
