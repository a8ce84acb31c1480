"""nnU-Net's files of probabilities: what their channels stand for, read one channel at a time."""

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
# Resampling and 32-bit numbers may leave a probability this far outside 0 to 1.
_ROUNDING: Final = 1e-3


@dataclass(frozen=True)
class Channels:
    """What the channels of a file of probabilities stand for.

    Attributes:
        count: Number of channels.
        exclusive: Whether they are labels, of which a voxel has one (softmax, the background first); else regions, each
            for itself (sigmoid).
        regions: Label values of every label or region by name, without the background.
        place: Channel of every label or region by name.
        painted: The label that each channel becomes in a segmentation, in the order of painting.
    """

    count: int
    exclusive: bool
    regions: Mapping[str, tuple[int, ...]]
    place: Mapping[str, int]
    painted: tuple[int, ...]

    @classmethod
    def of_dataset(cls, dataset_json: Mapping[str, Any]) -> Channels:
        """The channels that nnU-Net writes for a data set.

        Args:
            dataset_json: Content of the dataset.json that the model was trained with.

        Raises:
            InputError: It has no usable labels.

        Source:
            nnU-Net's LabelManager: regions if any entry has two labels or more, else labels in ascending order.
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
        """A message if a file's probabilities do not belong to these channels, or to an image of that shape."""
        if tuple(shape) != (self.count, *voxels):
            what = f"{self.count} {'labels with the background' if self.exclusive else 'regions'}"
            yield (
                f"{path} has probabilities of shape {format_shape(shape)}; expected "
                f"{format_shape((self.count, *voxels))} for {what} and the voxels of {like}. Predict the case again."
            )


def read_shape(path: Path) -> tuple[int, ...]:
    """Shape (C, z, y, x) of a file's probabilities; reads no voxel.

    Raises:
        InputError: The file can't be read as nnU-Net's probabilities.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as stream:
            return _header(stream)[0]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from error


def iterate_channels(path: Path) -> Iterator[NDArray[np.float32]]:
    """The channels (z, y, x) of a file of probabilities, one after the other, so that no more is in memory.

    Axes are those that nnU-Net's reader gives the segmentation beside the file; both cover the whole image, what was
    cropped away included.

    Args:
        path: The .npz file that nnU-Net writes with --npz or --save_probabilities.

    Yields:
        Probabilities, 0 to 1.

    Raises:
        InputError: The file can't be read, or holds something else than probabilities.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as stream:
            shape, fortran_order, dtype = _header(stream)
            if fortran_order:  # a single channel whose axes nnU-Net has turned, for example
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
    """All channels (C, z, y, x) of a file of probabilities; raises what `iterate_channels` does."""
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
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN is neither
        raise InputError(
            f"{path} has values from {low:g} to {high:g}; expected probabilities, 0 to 1. Predict the case again."
        )
    return np.clip(channel, 0, 1, dtype=np.float32)


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = "it holds no array named probabilities" if isinstance(error, KeyError) else short_message(error)
    return InputError(f"{path} can't be read as nnU-Net's probabilities: {reason}. Predict the case again.")


class Painter:
    """Makes the segmentation that nnU-Net makes, of channels that come one after the other.

    Args:
        meaning: What the channels stand for.

    Attributes:
        labels: Label map (z, y, x).
        best: Highest probability of a label so far (z, y, x); of exclusive channels only.
    """

    def __init__(self, meaning: Channels) -> None:
        self._meaning = meaning
        self._next = 0
        self.labels: NDArray[Any] = np.empty(0, np.uint8)
        self.best: NDArray[np.float32] = np.empty(0, np.float32)

    def add(self, channel: NDArray[np.float32]) -> None:
        """The next channel (z, y, x)."""
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
