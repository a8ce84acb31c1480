"""The one error that the command line shows without a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """An input, a setting or the environment does not allow what was asked for, and the user can change that.

    Everything else that is raised is an error of this package and keeps its traceback.

    Args:
        faults: The message, or a list of errors that were found together before anything was written. Each names the
            file or value, says what was expected and what to do.

    Attributes:
        faults: One message per error.
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        if isinstance(faults, str):
            self.faults: tuple[str, ...] = (faults,)
            super().__init__(faults)
            return
        self.faults = tuple(faults)
        noun = "error" if len(faults) == 1 else "errors"
        lines = "\n".join(f"  - {fault}" for fault in faults)
        super().__init__(f"Nothing was written: {len(faults)} {noun} found.\n{lines}")

    def __reduce__(self) -> tuple[type[InputError], tuple[str | tuple[str, ...]]]:
        # worker processes send it back; BaseException would call the class with the finished message
        return type(self), (self.faults[0] if str(self) == self.faults[0] else self.faults,)
