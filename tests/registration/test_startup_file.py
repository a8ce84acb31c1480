"""The start-up files, read by fresh interpreters from a folder that is treated like site-packages.

All tests run twice: with ``nnunet_conres.pth`` as in this Python, and with ``nnunet_conres.start`` as in Python 3.15.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_conres.registration import TRAINER_FOLDER, VARIABLE

PACKAGE = Path(TRAINER_FOLDER).parent.parent
STARTUP_FILES = PACKAGE / "registration" / "site_packages"
REPORT = f"import os; print(os.environ.get({VARIABLE!r}))"
# another start of Python after the files were read once
AGAIN = "del sys.modules['_nnunet_conres_startup']; addsitedir(sys.argv[1])\n"
# first lines of a program that runs without the real site-packages, in which the package may be installed
PEP_829 = Path(__file__).with_name("pep829.py").read_text(encoding="utf-8")
READ_BY = {
    "pth": "import sys; from site import addsitedir; addsitedir(sys.argv[1])\n",
    "start": f"import sys; exec({PEP_829!r}); addsitedir(sys.argv[1])\n",
}


@pytest.fixture(params=READ_BY)
def read_by(request: pytest.FixtureRequest) -> str:
    """Return which of the two files is read."""
    return request.param


Start = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def start(read_by: str) -> Start:
    """Function that starts Python with a site-packages folder, runs code in it, and returns the finished process."""

    def start(site_packages: Path, code: str = REPORT, value: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {key: text for key, text in os.environ.items() if key != VARIABLE}
        if value is not None:
            environment[VARIABLE] = value
        command = [sys.executable, "-I", "-S", "-c", READ_BY[read_by] + code, str(site_packages)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return start


@pytest.fixture
def regular(tmp_path: Path) -> Path:
    """A site-packages folder as a regular installation leaves it."""
    site_packages = tmp_path / "site packages"
    without = shutil.ignore_patterns("__pycache__", STARTUP_FILES.name)
    shutil.copytree(PACKAGE, site_packages / "nnunet_conres", ignore=without)
    shutil.copytree(STARTUP_FILES, site_packages, dirs_exist_ok=True)
    return site_packages


@pytest.fixture
def editable(tmp_path: Path) -> Path:
    """A site-packages folder as an editable installation leaves it."""
    site_packages = tmp_path / "editable"
    shutil.copytree(STARTUP_FILES, site_packages)
    (site_packages / "_nnunet_conres.pth").write_text(str(PACKAGE.parent))
    return site_packages


def folder_in(site_packages: Path) -> str:
    return str(site_packages / "nnunet_conres" / "registration" / "external_trainers")


def test_activates_a_regular_installation(start: Start, regular: Path) -> None:
    run = start(regular)
    assert (run.stdout, run.stderr) == (folder_in(regular) + "\n", "")
    assert os.path.isdir(run.stdout.strip())


def test_activates_an_editable_installation(start: Start, editable: Path) -> None:
    run = start(editable)
    assert (run.stdout, run.stderr) == (TRAINER_FOLDER + "\n", "")


@pytest.mark.parametrize("users", [["/mine"], ["/mine/../of mine/ ", "relative", "/mine//"]])
@pytest.mark.parametrize("end", ["", os.pathsep])
def test_keeps_what_a_user_has_first(start: Start, regular: Path, users: list[str], end: str) -> None:
    # a user's path must stay unchanged, however unusual it is
    run = start(regular, value=os.pathsep.join(users) + end)
    assert run.stdout.rstrip("\n").split(os.pathsep) == [*users, folder_in(regular)]


@pytest.mark.parametrize(
    "end", ["", "/", "/.", "//", "/../external_trainers", "/../../registration/external_trainers/"]
)
def test_is_never_there_twice(start: Start, regular: Path, end: str) -> None:
    value = os.pathsep.join([folder_in(regular) + end, "/mine"])
    assert start(regular, value=value).stdout.strip() == value


def test_a_folder_that_only_looks_alike_is_not_ours(start: Start, regular: Path) -> None:
    value = folder_in(regular) + "_of_mine"
    assert start(regular, value=value).stdout.strip() == os.pathsep.join([value, folder_in(regular)])


@pytest.mark.parametrize("value", ["", " ", os.pathsep, os.pathsep * 3])
def test_a_value_without_folders_counts_as_none(start: Start, regular: Path, value: str) -> None:
    assert start(regular, value=value).stdout.strip() == folder_in(regular)


def test_a_child_process_has_it_once(start: Start, regular: Path, read_by: str) -> None:
    code = f"""
import subprocess
child = [sys.executable, "-I", "-S", "-c", {READ_BY[read_by] + REPORT!r}, sys.argv[1]]
subprocess.run(child, check=True)
"""
    run = start(regular, code=code, value="/mine")
    assert run.stdout.strip().split(os.pathsep) == ["/mine", folder_in(regular)], run.stderr


def test_two_environments_are_both_searched(start: Start, regular: Path, editable: Path) -> None:
    run = start(editable, value=start(regular).stdout.strip())
    assert run.stdout.strip().split(os.pathsep) == [folder_in(regular), TRAINER_FOLDER]


def test_can_be_read_twice(start: Start, regular: Path) -> None:
    run = start(regular, code="addsitedir(sys.argv[1]); " + REPORT)
    assert run.stdout.strip() == folder_in(regular)


def test_a_program_gets_its_own_copy_of_the_package(start: Start, regular: Path, tmp_path: Path) -> None:
    (tmp_path / "checkout" / "nnunet_conres").mkdir(parents=True)
    (tmp_path / "checkout" / "nnunet_conres" / "__init__.py").touch()
    code = "print([name for name in sys.modules if 'nnunet' in name])\n"
    code += f"sys.path.insert(0, {str(tmp_path / 'checkout')!r}); import nnunet_conres; print(nnunet_conres.__file__)"
    loaded, file = start(regular, code=code).stdout.splitlines()
    assert loaded == "['_nnunet_conres_startup']"
    assert file == str(tmp_path / "checkout" / "nnunet_conres" / "__init__.py")


def test_it_is_known_which_file_was_read(start: Start, regular: Path, read_by: str) -> None:
    run = start(regular, code="import _nnunet_conres_startup as startup; print(startup.activated_by)")
    assert run.stdout == f"nnunet_conres.{read_by}\n"


def test_the_files_hold_nothing_but_comments_and_one_line() -> None:
    lines = {
        suffix: (STARTUP_FILES / f"nnunet_conres{suffix}").read_text("ascii").splitlines()
        for suffix in (".pth", ".start")
    }
    code = {suffix: [line for line in found if not line.startswith("#")] for suffix, found in lines.items()}
    assert [line[:7] for line in code[".pth"]] == ["import "]
    assert code[".start"] == ["_nnunet_conres_startup:activate"]


@pytest.mark.parametrize("part", ["nnunet_conres", "nnunet_conres/registration"])
def test_a_package_removed_by_half_neither_raises_nor_prints(start: Start, regular: Path, part: str) -> None:
    shutil.rmtree(regular / part)
    run = start(regular)
    assert (run.returncode, run.stdout, run.stderr) == (0, "None\n", "")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="a superuser can read everything")
def test_an_unreadable_package_neither_raises_nor_prints(start: Start, regular: Path) -> None:
    (regular / "nnunet_conres").chmod(0)
    run = start(regular)
    (regular / "nnunet_conres").chmod(0o700)
    assert (run.returncode, run.stdout, run.stderr) == (0, "None\n", "")


@pytest.mark.parametrize("error", ["OSError('no memory')", "ValueError('too long')", "RecursionError"])
def test_a_variable_that_cannot_be_set_is_left_alone(start: Start, regular: Path, error: str) -> None:
    code = f"""
import os
class FullEnvironment(dict):
    def __setitem__(self, key, value):
        raise {error}
os.environ = FullEnvironment()
{AGAIN}
print(os.environ)
"""
    run = start(regular, code=code)
    assert (run.returncode, run.stdout, run.stderr) == (0, "{}\n", "")


def test_does_not_look_at_other_folders(start: Start, regular: Path) -> None:
    # They may lie on a network file system that is slow or gone.
    code = """
import os
looked_at = []
def watch(name):
    function = getattr(os, name)
    setattr(os, name, lambda path, *rest, **more: (looked_at.append(path), function(path, *rest, **more))[1])
for name in ("stat", "lstat", "readlink", "listdir", "scandir"):
    watch(name)
AGAIN
print(len(looked_at) > 0, "/mine" in looked_at)
"""
    run = start(regular, code=code.replace("AGAIN", AGAIN), value="/mine")
    assert (run.stdout, run.stderr) == ("True False\n", "")


@pytest.mark.parametrize("value", [os.pathsep * 3, "\udcff\udcfe", "x" * 100_000, "\n", "*?\"'$(date)"])
def test_odd_values_neither_raise_nor_print(start: Start, regular: Path, value: str) -> None:
    code = f"import os; sys.stdout.buffer.write(os.fsencode(os.environ[{VARIABLE!r}].split(os.pathsep)[-1]))"
    run = start(regular, code=code, value=value)
    assert (run.returncode, run.stdout, run.stderr) == (0, folder_in(regular), "")


def test_an_odd_sys_path_neither_raises_nor_prints(start: Start, regular: Path) -> None:
    run = start(regular, code="sys.path.append(None); " + AGAIN)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    code = "sys.path.insert(0, None); import _nnunet_conres_startup as startup; startup.activated_by = None; "
    run = start(regular, code=code + "startup.activate(); print(startup.activated_by)")
    assert (run.returncode, run.stdout, run.stderr) == (0, "None\n", "")


def test_a_checkout_that_was_moved_neither_raises_nor_prints(start: Start, editable: Path, tmp_path: Path) -> None:
    (editable / "_nnunet_conres.pth").write_text(str(tmp_path / "moved"))
    run = start(editable)
    assert (run.returncode, run.stdout, run.stderr) == (0, "None\n", "")


class TestNNUNetTooOld:
    """nnU-Net before 2.8 ignores our folder. Only a message at the start of its commands can explain the failure."""

    @pytest.fixture(autouse=True)
    def _starts(self, read_by: str) -> None:
        self.starts = READ_BY[read_by]

    def run(self, site_packages: Path, version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        metadata = site_packages / f"nnunetv2-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: nnunetv2\nVersion: {version}\n")
        script = site_packages / arguments[0]
        script.write_text(self.starts.replace("sys.argv[1]", repr(str(site_packages))) + "print('ran')")
        command = [sys.executable, "-I", "-S", str(script), *arguments[1:]]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    def test_a_command_with_one_of_our_trainers_tells(self, regular: Path) -> None:
        run = self.run(regular, "2.7.0", "nnUNetv2_train", "501", "3d_fullres", "0", "-tr", "nnUNetTrainerConResNet")
        assert run.stdout == "ran\n"
        (line,) = run.stderr.splitlines()
        assert line.startswith("nnunet-conres: error: nnU-Net 2.7.0 is too old, nnunet-conres needs nnunetv2 >= 2.8.")
        assert 'pip install --upgrade "nnunetv2>=2.8,<3"' in line

    @pytest.mark.parametrize("text", ["def broken(:", "raise OSError('unreadable')", "import no_such_module", ""])
    def test_a_broken_package_neither_raises_nor_prints(self, regular: Path, text: str) -> None:
        (regular / "nnunet_conres" / "registration" / "nnunet_version.py").write_text(text)
        run = self.run(regular, "2.7.0", "nnUNetv2_train", "-tr", "nnUNetTrainerConResNet")
        assert (run.stdout, run.stderr) == ("ran\n", "")

    @pytest.mark.parametrize(
        ("version", "arguments"),
        [
            ("2.8.1", ("nnUNetv2_train", "-tr", "nnUNetTrainerConResNet")),
            ("2.7.0", ("nnUNetv2_train", "-tr", "nnUNetTrainerOfSomebody")),
            ("2.7.0", ("nnUNetv2_train",)),
            ("2.7.0", ("another_program", "nnUNetTrainerConResNet", "with nnUNetv2_train")),
        ],
    )
    def test_every_other_process_is_silent(self, regular: Path, version: str, arguments: tuple[str, ...]) -> None:
        run = self.run(regular, version, *arguments)
        assert (run.stdout, run.stderr) == ("ran\n", "")


def test_costs_less_than_a_millisecond(regular: Path) -> None:
    # Minimum processor time over several fresh interpreters, so that other work of the machine does not count. The
    # first interpreter also compiles.
    code = f"""
import os, sys, time
sys.path.append(sys.argv[1])
begin = time.process_time()
import _nnunet_conres_startup; _nnunet_conres_startup.activate()
end = time.process_time()
assert {VARIABLE!r} in os.environ
print(end - begin)
"""
    environment = {key: text for key, text in os.environ.items() if key != VARIABLE}
    command = [sys.executable, "-I", "-S", "-c", code, str(regular)]
    seconds = [
        float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        for _ in range(7)
    ]
    assert min(seconds) < 1e-3
