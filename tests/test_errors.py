import errno
import gzip
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_conres.errors import InputError, file_errors, grouped, writing_errors
from nnunet_conres.locks import LockedError


@pytest.mark.parametrize("errors", ["The id is 0.", ["The id is 0."], ["The id is 0.", "There is no folder."]])
def test_comes_back_whole_from_a_worker_process(errors):
    error = InputError(errors)
    returned = pickle.loads(pickle.dumps(error))
    assert (type(returned), str(returned), returned.errors) == (InputError, str(error), error.errors)


def test_one_message_is_shown_as_it_is():
    assert str(InputError("The id is 0.")) == "The id is 0."


def test_a_list_is_counted():
    error = InputError(["The id is 0.", "There is no folder."])
    assert "2 errors found" in str(error)
    assert all(message in str(error) for message in error.errors)


def attempt(do: Callable[[], object], path: Path) -> str:
    """Return the message of the error that the call raises."""
    with pytest.raises(InputError) as caught, file_errors(path):
        do()
    return str(caught.value)


class TestFileErrors:
    def test_names_the_file_and_what_to_do(self, tmp_path: Path) -> None:
        path = tmp_path / "gone" / "labels.json"
        message = f"{path}: No such file or directory. Check the name, and that its folder exists."
        assert attempt(path.read_text, tmp_path) == message
        assert "Is a directory" in attempt(tmp_path.read_text, tmp_path)
        (tmp_path / "file").touch()
        assert "one of its folders is a file" in attempt((tmp_path / "file" / "below").read_text, tmp_path)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
    def test_a_full_disk_names_the_file_that_the_system_does_not_name(self) -> None:
        path = Path("/dev/full")
        assert attempt(lambda: path.write_text("much"), path) == (
            "/dev/full: No space left on device. Free some space, or choose another place; then run the command again."
        )

    def test_what_a_file_holds(self, tmp_path: Path) -> None:
        path = tmp_path / "image.nii.gz"
        path.write_bytes(b"no gzip")

        def read() -> bytes:
            with gzip.open(path) as file:
                return file.read()

        assert attempt(read, path) == f"{path}: Not a gzipped file (b'no')"

    def test_of_a_temporary_path_as_the_user_knows_it(self) -> None:
        for errors in ("/a/.b.partial-0/c: no", ["/a/.b.partial-0/c: no"]):
            error = LockedError(errors).naming(Path("/a/b"), instead_of=Path("/a/.b.partial-0"))
            assert type(error) is LockedError
            assert error.errors == ("/a/b/c: no",)
            assert str(error) == str(LockedError(errors)).replace(".b.partial-0", "b")

    @pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.EBADF, "x"), BrokenPipeError(errno.EPIPE, "x")])
    def test_everything_else_passes(self, error: Exception) -> None:
        with pytest.raises(type(error)) as caught, file_errors("file"):
            raise error
        assert caught.value is error


class TestGrouped:
    def test_few_are_left_as_they_are(self) -> None:
        messages = ["/a/b1.nii is missing.", "/a/b2.nii is missing.", "The id is 0."]
        assert grouped(messages) == messages

    def test_many_of_a_kind_are_counted(self) -> None:
        missing = [f"/a/case_{number}.nii is missing; a case needs it." for number in range(170)]
        wrong = [f"/a/case_{number}.nii has size 3 x {number}; expected 3 x 3." for number in range(6)]
        # The kinds are mixed, because errors are found case by case.
        lines = grouped([*missing[:2], *wrong, *missing[2:], "The id is 0."])
        assert lines == [
            *missing[:5],
            "... and 165 more errors of this kind, 170 in all.",
            *wrong[:5],
            "... and 1 more errors of this kind, 6 in all.",
            "The id is 0.",
        ]
        assert "170 errors found" in str(InputError(missing))
        assert len(str(InputError(missing)).splitlines()) == 7
        assert len(InputError(missing).errors) == 170

    def test_many_kinds_are_counted(self) -> None:
        words = [f"{chr(97 + first)}{chr(97 + second)}" for first in range(10) for second in range(10)]
        lines = grouped(words)
        assert lines == [*words[:20], "... and 80 more errors, of 80 other kinds."]


class TestWritingErrors:
    """For third-party code that reads and writes files."""

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (OSError(errno.ENOSPC, "x"), "target: No space left on device. Free some space"),
            (OSError(errno.EFBIG, "x"), r"target: File too large. Raise the limit of a file's size \(ulimit -f\)"),
            (FileNotFoundError(errno.ENOENT, "x", "input"), "input: No such file"),
        ],
    )
    def test_names_what_could_not_be_written(self, error: OSError, message: str) -> None:
        with pytest.raises(InputError, match=message), writing_errors("target"):
            raise error

    @pytest.mark.parametrize("error", [OSError("what a file holds"), OSError(errno.EIO, "read"), ValueError("x")])
    def test_everything_else_passes(self, error: Exception) -> None:
        with pytest.raises(type(error)) as caught, writing_errors("target"):
            raise error
        assert caught.value is error
