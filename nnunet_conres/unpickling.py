"""Reading untrusted pickles without running code in them.

nnU-Net stores image properties in ``.pkl`` files, and PyTorch stores the structure of a checkpoint in a pickle.
``pickle.load`` calls any function that such a file names.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, Final

from nnunet_conres.errors import InputError

_NUMPY_MODULES: Final = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_TENSOR_FUNCTIONS: Final = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
_TORCH_TYPE: Final = re.compile(r"(bool|u?int\d+|float\d+|bfloat16|complex\d+|\w*Storage)")


class _NotAllowed(pickle.UnpicklingError):
    """The pickle names something that is not a plain value."""


class _ValuesUnpickler(pickle.Unpickler):
    """Unpickler for dictionaries, lists, tuples, sets, text, numbers, None, and NumPy arrays and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        if module in _NUMPY_MODULES:
            # the functions of the installed NumPy, whichever version wrote the file
            array, number = np.zeros(1), np.float64(0)
            functions: tuple[Any, ...] = (array.__reduce__()[0], array.__reduce_ex__(5)[0], number.__reduce__()[0])
            for function in functions:
                if function.__name__ == name:
                    return function
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if name == "bytes" and module in ("builtins", "__builtin__"):
            return _no_bytes
        raise _NotAllowed(f"{module}.{name}")


class _CheckpointUnpickler(_ValuesUnpickler):
    """Unpickler for a checkpoint without its tensors; None replaces each tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in _TENSOR_FUNCTIONS:
            return _no_tensor
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch", "device"):
            return _device
        if module in ("torch", "torch.storage") and _TORCH_TYPE.fullmatch(name):
            return f"{module}.{name}"
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> None:
        """Leave the storage of a tensor in the file."""


def _latin1(text: str, encoding: str) -> bytes:
    """Convert text to bytes: pickles of protocol 0 to 2 store bytes as Latin-1 text."""
    if encoding != "latin1":
        raise _NotAllowed(f"text in {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Return empty bytes, which pickles of protocol 0 to 2 store as a call of ``bytes``."""
    return b""


def _no_tensor(*_: Any) -> None:
    return None


def _device(*parts: Any) -> str:
    return ":".join(map(str, parts))


def read_pickle(path: Path) -> Any:
    """Read a pickle of plain values, such as nnU-Net's properties of an image.

    Args:
        path: The file.

    Returns:
        Dictionaries, lists, tuples, sets, text, numbers, None, and NumPy arrays and numbers.

    Raises:
        InputError: The file cannot be read, is damaged, or contains anything else. None of its code was run.
    """
    try:
        with path.open("rb") as file:
            return _load(_ValuesUnpickler, file, path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a PyTorch checkpoint without its tensors, and without PyTorch.

    Args:
        path: The file, as ``torch.save`` writes it.

    Returns:
        The content; None replaces each tensor, a string each device and data type.

    Raises:
        InputError: The file cannot be read, is damaged, or contains more than tensors and the values that `read_pickle`
            reads. None of its code was run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch ignores the case of names and takes the first match. A TorchScript file contains code.
            names = [name.lower().rpartition("/")[2] for name in archive.namelist()]
            if names.count("data.pkl") != 1 or "constants.pkl" in names:
                raise InputError(f"{path} is not a checkpoint: expected one data.pkl, and no code.")
            with archive.open(archive.namelist()[names.index("data.pkl")]) as file:
                content = _load(_CheckpointUnpickler, file, path)
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"{path} cannot be read as a checkpoint: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a checkpoint: it contains a {type(content).__name__}; expected a dictionary.")
    return content


def _load(unpickler: type[pickle.Unpickler], file: IO[bytes], path: Path) -> Any:
    try:
        return unpickler(file).load()
    except _NotAllowed as error:
        raise InputError(
            f"{path} contains {error}; expected plain values. Loading it could run code, so it was not loaded."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}.") from error
