"""The start-up file, as Python reads it: in fresh interpreters, from a folder that is treated like site-packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_conres.registration import TRAINER_FOLDER, VARIABLE

PACKAGE = Path(TRAINER_FOLDER).parent.parent
STARTUP_FILE = PACKAGE / "registration" / "nnunet_conres.pth"

# Runs without the real site-packages, in which the package may be installed, then reads the given one.
AS_PYTHON_STARTS = "import site, sys; site.addsitedir(sys.argv[1]); "
REPORT = f"import os; print(os.environ.get({VARIABLE!r}))"


def start(site_packages: Path, code: str = REPORT, value: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: text for key, text in os.environ.items() if key != VARIABLE}
    if value is not None:
        environment[VARIABLE] = value
    command = [sys.executable, "-I", "-S", "-c", AS_PYTHON_STARTS + code, str(site_packages)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def regular(tmp_path: Path) -> Path:
    """A site-packages folder as a regular installation leaves it."""
    site_packages = tmp_path / "site packages"
    shutil.copytree(PACKAGE, site_packages / "nnunet_conres", ignore=shutil.ignore_patterns("__pycache__", "*.pth"))
    shutil.copy(STARTUP_FILE, site_packages)
    return site_packages


@pytest.fixture
def editable(tmp_path: Path) -> Path:
    """A site-packages folder as an editable installation leaves it."""
    site_packages = tmp_path / "editable"
    site_packages.mkdir()
    (site_packages / "_nnunet_conres.pth").write_text(str(PACKAGE.parent))
    shutil.copy(STARTUP_FILE, site_packages)
    return site_packages


def folder_in(site_packages: Path) -> str:
    return str(site_packages / "nnunet_conres" / "registration" / "external_trainers")


def test_activates_a_regular_installation(regular: Path) -> None:
    run = start(regular)
    assert (run.stdout, run.stderr) == (folder_in(regular) + "\n", "")
    assert os.path.isdir(run.stdout.strip())


def test_activates_an_editable_installation(editable: Path) -> None:
    run = start(editable)
    assert (run.stdout, run.stderr) == (TRAINER_FOLDER + "\n", "")


@pytest.mark.parametrize("users", [["/mine"], ["/mine/../of mine/ ", "relative", "/mine//"]])
@pytest.mark.parametrize("end", ["", os.pathsep])
def test_keeps_what_a_user_has_first(regular: Path, users: list[str], end: str) -> None:
    # a path as odd as a user may have it is not to be tidied up
    run = start(regular, value=os.pathsep.join(users) + end)
    assert run.stdout.rstrip("\n").split(os.pathsep) == [*users, folder_in(regular)]


@pytest.mark.parametrize(
    "end", ["", "/", "/.", "//", "/../external_trainers", "/../../registration/external_trainers/"]
)
def test_is_never_there_twice(regular: Path, end: str) -> None:
    value = os.pathsep.join([folder_in(regular) + end, "/mine"])
    assert start(regular, value=value).stdout.strip() == value


def test_a_folder_that_only_looks_alike_is_not_ours(regular: Path) -> None:
    value = folder_in(regular) + "_of_mine"
    assert start(regular, value=value).stdout.strip() == os.pathsep.join([value, folder_in(regular)])


@pytest.mark.parametrize("value", ["", " ", os.pathsep, os.pathsep * 3])
def test_a_value_without_folders_counts_as_none(regular: Path, value: str) -> None:
    assert start(regular, value=value).stdout.strip() == folder_in(regular)


def test_a_child_process_has_it_once(regular: Path) -> None:
    code = f"""
import subprocess
child = [sys.executable, "-I", "-S", "-c", {AS_PYTHON_STARTS + REPORT!r}, sys.argv[1]]
subprocess.run(child, check=True)
"""
    run = start(regular, code=code, value="/mine")
    assert run.stdout.strip().split(os.pathsep) == ["/mine", folder_in(regular)], run.stderr


def test_two_environments_are_both_searched(regular: Path, editable: Path) -> None:
    run = start(editable, value=start(regular).stdout.strip())
    assert run.stdout.strip().split(os.pathsep) == [folder_in(regular), TRAINER_FOLDER]


def test_can_be_read_twice(regular: Path) -> None:
    run = start(regular, code="site.addsitedir(sys.argv[1]); " + REPORT)
    assert run.stdout.strip() == folder_in(regular)


def test_leaves_no_module_loaded(regular: Path) -> None:
    run = start(regular, code="print([name for name in sys.modules if 'nnunet' in name])")
    assert run.stdout.strip() == "[]"


def test_holds_nothing_but_comments_and_one_import_line() -> None:
    lines = STARTUP_FILE.read_text(encoding="ascii").splitlines()
    assert [line[:7] for line in lines if not line.startswith("#")] == ["import "]


@pytest.mark.parametrize("part", ["nnunet_conres", "nnunet_conres/registration"])
def test_a_package_removed_by_half_neither_raises_nor_prints(regular: Path, part: str) -> None:
    shutil.rmtree(regular / part)
    run = start(regular)
    assert (run.returncode, run.stdout, run.stderr) == (0, "None\n", "")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="a superuser can read everything")
def test_an_unreadable_package_neither_raises_nor_prints(regular: Path) -> None:
    (regular / "nnunet_conres").chmod(0)
    run = start(regular)
    (regular / "nnunet_conres").chmod(0o700)
    assert (run.returncode, run.stdout, run.stderr) == (0, "None\n", "")


@pytest.mark.parametrize("error", ["OSError('no memory')", "ValueError('too long')", "RecursionError"])
def test_a_variable_that_cannot_be_set_is_left_alone(regular: Path, error: str) -> None:
    code = f"""
import os
class FullEnvironment(dict):
    def __setitem__(self, key, value):
        raise {error}
del sys._nnunet_conres_activated
os.environ = FullEnvironment()
site.addsitedir(sys.argv[1])
print(os.environ)
"""
    run = start(regular, code=code)
    assert (run.returncode, run.stdout, run.stderr) == (0, "{}\n", "")


def test_does_not_look_at_other_folders(regular: Path) -> None:
    # They may lie on a network file system that is slow or gone.
    code = """
import os
looked_at = []
def watch(name):
    function = getattr(os, name)
    setattr(os, name, lambda path, *rest, **more: (looked_at.append(path), function(path, *rest, **more))[1])
for name in ("stat", "lstat", "readlink", "listdir", "scandir"):
    watch(name)
del sys._nnunet_conres_activated
site.addsitedir(sys.argv[1])
print(len(looked_at) > 0, "/mine" in looked_at)
"""
    run = start(regular, code=code, value="/mine")
    assert (run.stdout, run.stderr) == ("True False\n", "")


@pytest.mark.parametrize("value", [os.pathsep * 3, "\udcff\udcfe", "x" * 100_000, "\n", "*?\"'$(date)"])
def test_odd_values_neither_raise_nor_print(regular: Path, value: str) -> None:
    code = f"import os; sys.stdout.buffer.write(os.fsencode(os.environ[{VARIABLE!r}].split(os.pathsep)[-1]))"
    run = start(regular, code=code, value=value)
    assert (run.returncode, run.stdout, run.stderr) == (0, folder_in(regular), "")


def test_an_odd_sys_path_neither_raises_nor_prints(regular: Path) -> None:
    run = start(
        regular, code="sys.path.insert(0, None); del sys._nnunet_conres_activated; site.addsitedir(sys.argv[1])"
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


class TestNNUNetTooOld:
    """An nnU-Net before 2.8 never looks into our folder: only the start of its commands can tell why none is found."""

    def run(self, site_packages: Path, version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        metadata = site_packages / f"nnunetv2-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: nnunetv2\nVersion: {version}\n")
        script = site_packages / arguments[0]
        script.write_text(AS_PYTHON_STARTS.replace("sys.argv[1]", repr(str(site_packages))) + "print('ran')")
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
    # The best of some fresh interpreters: what else the machine is doing does not count.
    line = STARTUP_FILE.read_text(encoding="ascii").splitlines()[-1]
    code = f"""
import os, sys, time
sys.path.append(sys.argv[1])
begin = time.perf_counter()
exec({line!r})
end = time.perf_counter()
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
