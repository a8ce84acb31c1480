"""A loader that draws augmentation parameters first and then loads only the voxels they need, and its batches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from threadpoolctl import threadpool_limits
from torch import Tensor

from nnunet_conres.augmentation.on_device import DevicePipeline, packed, padded, stand_in, unpacked
from nnunet_conres.augmentation.spatial_on_device import (
    PADDED_IMAGE,
    PADDED_LABEL,
    Interval,
    labels_in,
    pads_like_the_loader,
)

Array = np.ndarray[Any, Any]
Sample = dict[str, Any]
"""Tensors under ``image`` and ``segmentation``, and plain values, so that pin_memory and queues can handle it."""


class DrawFirstLoader(nnUNetDataLoader):
    """nnU-Net's loader without transforms: its batches are lists of samples for `DevicePipeline`.

    Case, position and oversampling are drawn by nnU-Net's own methods.

    Attributes:
        pipeline: Draws the parameters.
    """

    pipeline: DevicePipeline

    @classmethod
    def of(cls, loader: nnUNetDataLoader, pipeline: DevicePipeline) -> DrawFirstLoader:
        """Return a loader with the settings of another one, whose transforms are those of the pipeline."""
        made = cls.__new__(cls)
        made.__dict__.update(vars(loader))
        # The copied method is bound to the other loader.
        made.get_do_oversample = getattr(made, loader.get_do_oversample.__name__)
        made.transforms = None
        made.pipeline = pipeline
        return made

    def generate_train_batch(self) -> dict[str, Any]:
        """Return ``samples``, a list with one sample for each of ``keys``, and ``keys``."""
        keys = self.get_indices()
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            samples = [self._sample(key, self.get_do_oversample(number)) for number, key in enumerate(keys)]
        return {"samples": samples, "keys": keys}

    def _sample(self, key: str, force_foreground: bool) -> Sample:
        images, labels, previous, properties = self._data.load_case(key)
        lower, upper = self.get_bbox(images.shape[1:], force_foreground, properties["class_locations"])
        patch = [(int(low), int(high)) for low, high in zip(lower, upper, strict=True)]
        case = _Case(images, [labels] if previous is None else [labels, previous[None]], self.patch_size_was_2d)
        pipeline = self.pipeline
        if pipeline.on_cpu:
            image, segmentation = case.read(patch)
            done = ComposeTransforms(pipeline.on_cpu)(image=image.float(), segmentation=segmentation.short())
            image, segmentation = done["image"], done["segmentation"]
            draws = pipeline.draw(stand_in(len(image), image.shape[1:]))
            shape = tuple(image.shape[1:])
            return _sample(image, segmentation, draws.parameters, shape, _whole(shape), draws.is_crop)
        shape = tuple(high - low for low, high in patch)[self.patch_size_was_2d :]
        if pipeline.looks_at_the_image:
            image, segmentation = case.read(patch)
            draws = pipeline.draw(image.float(), segmentation.short())
            return _sample(image, segmentation, draws.parameters, shape, _whole(shape), draws.is_crop)
        draws = pipeline.draw(stand_in(images.shape[0], shape))
        region = draws.region or _whole(shape)
        box = [(max(low, 0), min(high, extent)) for (low, high), extent in zip(region, shape, strict=True)]
        spatial = pipeline.spatial
        if spatial is not None and pads_like_the_loader(spatial):
            # The transform pads beyond the case along its own axes, so nothing is loaded there.
            at_hand, dim = case.inside(box, patch), len(spatial.patch_size)
            box = box if at_hand is None else box[:-dim] + at_hand[-dim:]
        if any(low >= high for low, high in box):
            box = [(0, 1)] * len(shape)  # nothing is read
        slices, axes = patch[: self.patch_size_was_2d], patch[self.patch_size_was_2d :]
        in_case = [(low + start, high + start) for (low, high), (start, _) in zip(box, axes, strict=True)]
        image, segmentation = case.read(slices + in_case)
        sticks_out = any(low < start or high > end for (low, high), (start, end) in zip(region, box, strict=True))
        return _sample(image, segmentation, draws.parameters, shape, box, draws.is_crop, sticks_out)


@dataclass(frozen=True)
class _Case:
    """A preprocessed case. Reading from it returns copies."""

    images: Any
    segmentations: Sequence[Any]
    is_2d: bool

    def inside(self, box: Sequence[Interval], patch: Sequence[Interval]) -> list[Interval] | None:
        """Return the part of a box, relative to the patch, that is within the case; None if there is none."""
        patch, extents = patch[self.is_2d :], self.images.shape[1 + self.is_2d :]
        found = [
            (max(low, -start), min(high, extent - start))
            for (low, high), (start, _), extent in zip(box, patch, extents, strict=True)
        ]
        return None if any(low >= high for low, high in found) else found

    def read(self, box: Sequence[Interval]) -> tuple[Tensor, Tensor]:
        """Read image and segmentations in a box of the case, padded as in nnU-Net's loader, in narrow types."""
        extents = self.images.shape[1:]
        valid = [(max(low, 0), min(high, extent)) for (low, high), extent in zip(box, extents, strict=True)]
        if any(low >= high for low, high in valid):
            valid = [(0, 0)] * len(valid)
            margins = [(0, high - low) for low, high in box]
        else:
            margins = [(start - low, high - end) for (low, high), (start, end) in zip(box, valid, strict=True)]
        where = (slice(None), *(slice(low, high) for low, high in valid))
        image = padded(torch.from_numpy(_owned(self.images[where])), margins, PADDED_IMAGE)
        labels = np.concatenate([_narrow(np.asarray(one[where])) for one in self.segmentations])
        segmentation = padded(torch.from_numpy(labels), margins, PADDED_LABEL)
        return (image[:, 0], segmentation[:, 0]) if self.is_2d else (image, segmentation)


def _owned(array: Array) -> Array:
    """Return the array, or a contiguous copy if it does not own its memory, for example because a file does."""
    array = np.asarray(array)
    return array if array.flags.owndata and array.flags.c_contiguous else np.array(array)


def _narrow(labels: Array) -> Array:
    """Convert labels to 8 bits if they fit, else to nnU-Net's 16."""
    if labels.dtype == np.int8:
        return labels
    fits = labels.dtype.itemsize == 1 and (labels.size == 0 or labels.max() <= np.iinfo(np.int8).max)
    return labels.astype(np.int8 if fits else np.int16)


def _whole(shape: Sequence[int]) -> list[Interval]:
    return [(0, int(extent)) for extent in shape]


def _sample(
    image: Tensor,
    segmentation: Tensor | list[Tensor],
    parameters: Sequence[dict[str, Any] | None],
    shape: Sequence[int],
    box: Sequence[Interval],
    is_crop: bool,
    sticks_out: bool = True,
) -> Sample:
    known = [] if is_crop or isinstance(segmentation, list) else labels_in(segmentation.numpy())
    return {
        "image": image,
        "segmentation": segmentation,
        "parameters": packed(parameters),
        "shape": tuple(shape),
        "box": tuple(box),
        "labels": known,
        "sticks_out": sticks_out,
    }


def finish(batch: dict[str, Any], pipeline: DevicePipeline, device: torch.device) -> dict[str, Any]:
    """Augment a batch of `DrawFirstLoader` on a device.

    Args:
        batch: ``samples`` and ``keys``.
        pipeline: The loader's pipeline.
        device: The device.

    Returns:
        nnU-Net's batch: ``data``, float32, (B, C, *patch_size); ``target``, a tensor or a list of them; ``keys``.
    """
    data: Tensor | None = None
    targets: list[Tensor] = []
    for number, sample in enumerate(batch["samples"]):
        image, target = _finish_sample(sample, pipeline, device)
        several = target if isinstance(target, list) else [target]
        if data is None:
            size = len(batch["samples"])
            data = torch.empty((size, *image.shape), device=device)
            targets = [torch.empty((size, *one.shape), dtype=one.dtype, device=device) for one in several]
            is_list = isinstance(target, list)
        data[number] = image
        for all_of_them, one in zip(targets, several, strict=True):
            all_of_them[number] = one
    return {"data": data, "target": targets if is_list else targets[0], "keys": batch["keys"]}


def _finish_sample(sample: Sample, pipeline: DevicePipeline, device: torch.device) -> tuple[Tensor, Any]:
    segmentation = sample["segmentation"]
    if isinstance(segmentation, list):  # the worker has applied the whole pipeline
        segmentation = [one.to(device, non_blocking=True) for one in segmentation]
    else:
        segmentation = segmentation.to(device, non_blocking=True)
        segmentation = segmentation if segmentation.dtype == torch.bool else segmentation.short()
    done = pipeline.apply(
        {"image": sample["image"].to(device, non_blocking=True).float(), "segmentation": segmentation},
        unpacked(sample["parameters"]),
        shape=sample["shape"],
        box=sample["box"],
        labels=sample["labels"],
        sticks_out=sample["sticks_out"],
    )
    return done["image"], done["segmentation"]


class DeviceBatches:
    """Batches of `DrawFirstLoader`, augmented on a device.

    On CUDA a thread prepares one batch in a separate stream, while the training step runs on the previous batch. Other
    devices are kept busy by the step, so there a batch is prepared when it is requested.

    Args:
        source: Iterator over batches of samples.
        pipeline: The loader's pipeline.
        device: The device.
        ahead: Whether to prepare a batch ahead; by default on CUDA.
    """

    def __init__(
        self,
        source: Iterator[dict[str, Any]],
        pipeline: DevicePipeline,
        device: torch.device,
        ahead: bool | None = None,
    ) -> None:
        self.source, self.pipeline, self.device = source, pipeline, device
        self._ahead = (device.type == "cuda") if ahead is None else ahead
        self._thread: threading.Thread | None = None

    def __iter__(self) -> DeviceBatches:
        return self

    def __next__(self) -> dict[str, Any]:
        if not self._ahead:
            return self._make(next(self.source))
        if self._thread is None:
            self._start()
        self._wanted.put(True)
        batch, event, error = self._made.get()
        if error is not None:
            self.close()
            raise error
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            targets = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
            for tensor in (batch["data"], *targets):
                tensor.record_stream(stream)  # its memory belongs to the other stream
        return batch

    def _make(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            with torch.no_grad():
                return finish(batch, self.pipeline, self.device)
        except Exception as error:
            raise DeviceAugmentationError(self.device, error) from error

    def _start(self) -> None:
        self._made: queue.Queue[Any] = queue.Queue()
        self._wanted: queue.Queue[bool] = queue.Queue()
        self._wanted.put(True)  # one ahead
        self._thread = threading.Thread(target=self._run, name="augmentation", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            while self._wanted.get():
                try:
                    batch = self._make(next(self.source))
                    event = None if stream is None else stream.record_event()
                    self._made.put((batch, event, None))
                except Exception as error:
                    self._made.put((None, None, error))
                    return

    def close(self) -> None:
        """End the thread and the worker processes, and free the prepared batches."""
        if self._thread is not None:
            self._wanted.put(False)
            self._thread.join(timeout=10)
            self._thread = None
            del self._made
        finish_workers = getattr(self.source, "_finish", None)
        if finish_workers is not None:
            finish_workers()


class DeviceAugmentationError(RuntimeError):
    """Augmentation failed on the device."""

    def __init__(self, device: torch.device, error: Exception) -> None:
        reason = str(error).strip().splitlines() or [""]
        super().__init__(
            f"Augmentation on {device} failed: {type(error).__name__}: {reason[0]} Set the environment variable "
            f"nnUNet_conres_device_augmentation=0 to augment on the CPU, as nnU-Net does, and continue with --c."
        )
