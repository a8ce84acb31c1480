"""Atomic writes of folders, by one process at a time."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_conres.errors import InputError, file_errors
from nnunet_conres.folders import being_written, check_complete, list_files, new_folder, visible, writing

# Writes into a folder, and waits for input before it finishes the folder.
WRITE = """
import sys, time
from pathlib import Path
from nnunet_conres.folders import new_folder, writing

target = Path(sys.argv[2])
with {"new": new_folder, "existing": writing}[sys.argv[1]](target) as folder:
    (folder or target).joinpath("file").write_text("first")
    print(folder or target, flush=True)
    sys.stdin.readline()
"""


def start(kind: str, target: Path) -> tuple["subprocess.Popen[str]", Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, kind, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


class TestList:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("b.nii.gz", "a.nii.gz", "._a.nii.gz", ".DS_Store", "C.NII.GZ", "notes.txt"):
            (tmp_path / name).touch()
        (tmp_path / "folder.nii.gz").mkdir()
        return tmp_path

    def test_passes_over_what_is_hidden(self, folder: Path) -> None:
        assert [path.name for path in visible(folder)] == [
            "C.NII.GZ",
            "a.nii.gz",
            "b.nii.gz",
            "folder.nii.gz",
            "notes.txt",
        ]
        assert [path.name for path in list_files(folder, ".nii.gz")] == ["a.nii.gz", "b.nii.gz"]
        found = list_files(folder, (".nii.gz", ".txt"), ignore_case=True)
        assert [path.name for path in found] == ["C.NII.GZ", "a.nii.gz", "b.nii.gz", "notes.txt"]

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="gone: No such file"):
            list_files(tmp_path / "gone")


class TestNewFolder:
    def test_appears_when_it_is_whole(self, tmp_path: Path) -> None:
        target = tmp_path / "above" / "new"
        with new_folder(target) as partial:
            (partial / "file").write_text("content")
            assert not target.exists()
        assert (target / "file").read_text() == "content"
        assert list(target.parent.iterdir()) == [target]
        target.parent.joinpath("other").mkdir()
        assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(target.parent.joinpath("other").stat().st_mode)

    def test_replaces_an_empty_one(self, tmp_path: Path) -> None:
        (tmp_path / "new").mkdir()
        with new_folder(tmp_path / "new") as partial:
            (partial / "file").touch()
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]

    def test_leaves_nothing_when_it_fails(self, tmp_path: Path) -> None:
        def fail() -> None:
            with new_folder(tmp_path / "new") as partial:
                (partial / "file").touch()
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert not list(tmp_path.iterdir())

    def test_does_not_replace_what_came_meanwhile(self, tmp_path: Path) -> None:
        def be_late() -> None:
            with new_folder(tmp_path / "new"):
                (tmp_path / "new").mkdir()
                (tmp_path / "new" / "theirs").touch()

        with pytest.raises(InputError, match="new: Directory not empty"):
            be_late()
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["new", "new/theirs"]

    def test_refuses_a_second_process_while_the_first_one_lives(self, tmp_path: Path) -> None:
        target = tmp_path / "new"
        process, partial = start("new", target)

        (message,) = being_written(target)
        assert f"{target} is being written by process {process.pid} on" in message
        with pytest.raises(InputError, match="is being written"), new_folder(target):
            pass
        assert (partial / "file").read_text() == "first"
        process.communicate("\n")
        assert process.returncode == 0
        assert (target / "file").read_text() == "first"
        assert not list(being_written(target))
        assert list(tmp_path.iterdir()) == [target]

    def test_clears_what_a_killed_process_left_but_nothing_of_others(self, tmp_path: Path) -> None:
        target, others = tmp_path / "new", tmp_path / "new.partial-0123abcd"
        killed, left = start("new", target)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        lives, partial = start("new", others)
        assert left.is_dir()
        with new_folder(target) as own:
            (own / "file").write_text("second")
        assert (target / "file").read_text() == "second"
        assert not left.exists()
        assert partial.is_dir()
        lives.communicate("\n")
        assert sorted(tmp_path.iterdir()) == [target, others]

    def test_many_processes_make_one_folder(self, tmp_path: Path) -> None:
        target = tmp_path / "new"
        code = """
import sys, time
from pathlib import Path
from nnunet_conres.errors import InputError
from nnunet_conres.folders import new_folder
while time.time() < float(sys.argv[2]):
    pass
try:
    with new_folder(Path(sys.argv[1])) as partial:
        for number in range(200):
            (partial / str(number)).write_text(sys.argv[3])
    print("made", sys.argv[3])
except InputError as error:
    print(error)
"""
        begin = str(time.time() + 2)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(target), begin, str(number)], stdout=subprocess.PIPE, text=True
            )
            for number in range(6)
        ]
        said = [process.communicate()[0] for process in processes]
        made = [line.split()[1] for line in said if line.startswith("made")]
        assert len(made) == 1, said
        assert {path.read_text() for path in target.iterdir()} == set(made)
        assert len(list(target.iterdir())) == 200
        assert list(tmp_path.iterdir()) == [target]

    def test_errors_name_what_the_user_asked_for(self, tmp_path: Path) -> None:
        def fail() -> None:
            with new_folder(tmp_path / "new") as partial:
                (partial / "file").write_text("there")
                with file_errors(partial):
                    (partial / "file" / "below").touch()

        with pytest.raises(InputError) as caught:
            fail()
        assert caught.value.errors[0].startswith(f"{tmp_path / 'new' / 'file' / 'below'}: Not a directory")

    def test_the_message_names_what_is_written_under_the_same_lock(self, tmp_path: Path) -> None:
        lock = tmp_path / ".lock"
        with new_folder(tmp_path / "one", lock=lock):
            (message,) = being_written(tmp_path / "two", lock)
            assert message.startswith(f"{tmp_path / 'one'} is being written by process {os.getpid()} on ")
            assert message.endswith("Wait until it has ended.")
            with pytest.raises(InputError) as caught, new_folder(tmp_path / "two", lock=lock):
                pass
            assert str(caught.value) == message

    def test_the_current_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        with new_folder(Path()) as partial:
            (partial / "file").touch()
        assert [path.name for path in (tmp_path / "here").iterdir()] == ["file"]

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_may_not_be_written_to(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(InputError, match="Permission denied"), new_folder(tmp_path / "new"):
            pass

    def test_a_folder_above_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="file"), new_folder(tmp_path / "file" / "new"):
            pass


class TestWriting:
    def test_refuses_a_second_process_while_the_first_one_lives(self, tmp_path: Path) -> None:
        target = tmp_path / "existing"
        process, _ = start("existing", target)
        with pytest.raises(InputError, match=f"existing is being written by process {process.pid} on"), writing(target):
            pass
        process.communicate("\n")
        assert [path.name for path in target.iterdir()] == ["file"]
        with writing(target):
            pass

    def test_clears_what_a_killed_process_left(self, tmp_path: Path) -> None:
        code = """
import sys
from pathlib import Path
from nnunet_conres.files import written_whole
from nnunet_conres.folders import partial_folder, writing
with writing(Path(sys.argv[1])), partial_folder(Path(sys.argv[1], "labels.nii.gz")) as folder:
    with written_whole(Path(sys.argv[1], "a.json")) as file:
        file.touch()
        print("written", flush=True)
        sys.stdin.readline()
"""
        with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, stdin=-1) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.kill()
        (tmp_path / ".kept.json").touch()
        assert len(list(tmp_path.iterdir())) == 4
        with writing(tmp_path, lock=".other"):
            assert len(list(tmp_path.iterdir())) == 5
        with writing(tmp_path):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [".kept.json"]

    def test_removes_what_it_made_in_vain(self, tmp_path: Path) -> None:
        with writing(tmp_path / "one" / "two"):
            pass
        assert not list(tmp_path.iterdir())
        (tmp_path / "one").mkdir()
        with writing(tmp_path / "one" / "two"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_files_that_are_gone(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a").touch()
    check_complete(tmp_path, ["labels/a"])
    with pytest.raises(InputError, match="2 files are missing, labels/b among them"):
        check_complete(tmp_path, ["labels/a", "labels/b", "labels/c"])
