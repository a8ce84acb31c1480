"""Reader of nnU-Net's probability files, one channel at a time, and the meaning of their channels."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from nnunet_conres.errors import InputError
from nnunet_conres.nnunet import label_values
from nnunet_conres.text import format_shape, short_message

_MEMBER: Final = "probabilities.npy"
# Resampling and 32-bit rounding may move a probability this far outside 0 to 1.
_ROUNDING: Final = 1e-3


@dataclass(frozen=True)
class Channels:
    """The meaning of the channels of a probability file.

    Attributes:
        count: Number of channels.
        exclusive: Whether the channels are mutually exclusive labels (softmax, background first); otherwise they are
            independent regions (sigmoid).
        regions: Label values of every label or region by name, without the background.
        place: Channel of every label or region by name.
        painted: The label value that each channel gets in a segmentation, in channel order. Of regions, later channels
            overwrite earlier ones.
    """

    count: int
    exclusive: bool
    regions: Mapping[str, tuple[int, ...]]
    place: Mapping[str, int]
    painted: tuple[int, ...]

    @classmethod
    def of_dataset(cls, dataset_json: Mapping[str, Any]) -> Channels:
        """Return the channels that nnU-Net writes for a data set.

        Args:
            dataset_json: Content of the dataset.json that the model was trained with.

        Raises:
            InputError: The dataset.json has no usable labels.

        Source:
            nnU-Net's LabelManager: regions if any entry has two or more labels, otherwise labels in ascending order.
        """
        try:
            regions = label_values(dataset_json["labels"])
            if not regions:
                raise ValueError("only background and ignore")
            if any(len(values) > 1 for values in regions.values()):
                names = list(regions)
                painted = tuple(int(label) for label in dataset_json["regions_class_order"])
                if len(painted) != len(names):
                    raise ValueError(f"{len(names)} regions, but {len(painted)} entries in regions_class_order")
                place = {name: channel for channel, name in enumerate(names)}
                return cls(len(names), False, regions, place, painted)
            painted = (0, *sorted({value for values in regions.values() for value in values}))
            place = {name: painted.index(values[0]) for name, values in regions.items()}
            return cls(len(painted), True, regions, place, painted)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(
                f"The dataset.json has no usable labels ({error!r}); expected that of an nnU-Net data set."
            ) from error

    def shape_errors(self, path: Path, shape: Sequence[int], voxels: Sequence[int], like: Path) -> Iterator[str]:
        """Yield a message if the shape of a file's probabilities does not match these channels and the image."""
        if tuple(shape) != (self.count, *voxels):
            what = f"{self.count} {'labels with the background' if self.exclusive else 'regions'}"
            yield (
                f"{path} has probabilities of shape {format_shape(shape)}; expected "
                f"{format_shape((self.count, *voxels))} for {what} and the voxels of {like}. Predict the case again."
            )


def read_shape(path: Path) -> tuple[int, ...]:
    """Read the shape (C, z, y, x) of a file's probabilities from its header; no voxel is read.

    Raises:
        InputError: The file can't be read as nnU-Net's probabilities.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as stream:
            return _header(stream)[0]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from error


def iterate_channels(path: Path) -> Iterator[NDArray[np.float32]]:
    """Read the channels (z, y, x) of a probability file one by one, so that only one is in memory.

    The axes are those of the segmentation next to the file as nnU-Net's reader returns it. Both cover the whole image,
    including the part that was cropped away before prediction.

    Args:
        path: The .npz file that nnU-Net writes with --npz or --save_probabilities.

    Yields:
        Probabilities, 0 to 1.

    Raises:
        InputError: The file can't be read, or its values are not probabilities.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as stream:
            shape, fortran_order, dtype = _header(stream)
            if fortran_order:  # for example, a single channel whose axes nnU-Net has transposed
                whole = np.frombuffer(stream.read(), dtype).reshape(shape, order="F")
                for channel in whole:
                    yield _checked(path, channel)
                return
            size = math.prod(shape[1:]) * dtype.itemsize
            for _ in range(shape[0]):
                content = stream.read(size)
                if len(content) < size:
                    raise EOFError("it is cut short")
                yield _checked(path, np.frombuffer(content, dtype).reshape(shape[1:]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        raise _unreadable(path, error) from error


def read_probabilities(path: Path) -> NDArray[np.float32]:
    """Read all channels (C, z, y, x) of a probability file.

    Raises:
        InputError: As for `iterate_channels`.
    """
    return np.stack(list(iterate_channels(path)))


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(stream)
    if len(shape) != 4 or dtype.kind != "f":
        raise ValueError(f"it has numbers of type {dtype} and shape {format_shape(shape)}")
    return shape, fortran_order, dtype


def _checked(path: Path, channel: NDArray[Any]) -> NDArray[np.float32]:
    low, high = float(channel.min()), float(channel.max())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # also true for NaN
        raise InputError(
            f"{path} has values from {low:g} to {high:g}; expected probabilities, 0 to 1. Predict the case again."
        )
    return np.clip(channel, 0, 1, dtype=np.float32)


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = "it has no array named probabilities" if isinstance(error, KeyError) else short_message(error)
    return InputError(f"{path} can't be read as nnU-Net's probabilities: {reason}. Predict the case again.")


class Painter:
    """Computes nnU-Net's segmentation from channels that are added one by one.

    Args:
        meaning: Meaning of the channels.

    Attributes:
        labels: Label map (z, y, x).
        best: Highest probability of a label so far (z, y, x); only for exclusive channels.
    """

    def __init__(self, meaning: Channels) -> None:
        self._meaning = meaning
        self._next = 0
        self.labels: NDArray[Any] = np.empty(0, np.uint8)
        self.best: NDArray[np.float32] = np.empty(0, np.float32)

    def add(self, channel: NDArray[np.float32]) -> None:
        """Add the next channel (z, y, x)."""
        label = self._meaning.painted[self._next]
        if self._next == 0:
            self.labels = np.zeros(channel.shape, np.uint8 if max(self._meaning.painted) < 256 else np.uint16)
            self.best = channel.copy() if self._meaning.exclusive else self.best
        if not self._meaning.exclusive:
            self.labels[channel > 0.5] = label
        elif self._next:
            higher = channel > self.best
            self.labels[higher] = label
            np.maximum(self.best, channel, out=self.best)
        self._next += 1
