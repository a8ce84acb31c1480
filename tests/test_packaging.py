"""Built distributions, and their installation in empty virtual environments."""

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from nnunet_conres import __version__
from nnunet_conres.registration import VARIABLE

pytest.importorskip("hatchling", reason="needs what builds the package: pip install hatchling")

STARTUP_FILES = ("_nnunet_conres_startup.py", "nnunet_conres.pth", "nnunet_conres.start")
REPORT = f"import os; print(os.environ.get({VARIABLE!r}))"


def build(repository_root: Path, target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(command, cwd=repository_root, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(repository_root, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def editable_wheel(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel that `pip install --editable` builds and installs."""
    folder = tmp_path_factory.mktemp("editable")
    code = "import sys; from hatchling.build import build_editable; build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=repository_root, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


class TestWheel:
    def test_has_the_startup_files_at_its_top_and_nowhere_else(self, wheel: Path, repository_root: Path) -> None:
        folder = repository_root / "nnunet_conres" / "registration" / "site_packages"
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if Path(name).name in STARTUP_FILES]
            assert sorted(names) == sorted(STARTUP_FILES)
            for name in STARTUP_FILES:
                assert archive.read(name) == (folder / name).read_bytes()
        assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(STARTUP_FILES)

    def test_has_all_modules_and_nothing_but_the_package(self, wheel: Path, repository_root: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        info = f"nnunet_conres-{__version__}.dist-info"
        assert {name.split("/")[0] for name in names} == {"nnunet_conres", *STARTUP_FILES, info}
        modules = {
            path.relative_to(repository_root).as_posix() for path in (repository_root / "nnunet_conres").rglob("*.py")
        }
        at_the_top = {name for name in modules if name.split("/")[-1] in STARTUP_FILES}
        assert {name for name in names if name.endswith(".py") and "/" in name} == modules - at_the_top
        assert "nnunet_conres/py.typed" in names
        for name in ("page.html", "viewer.html", "report.css", "report.js"):
            assert f"nnunet_conres/evaluation/report/{name}" in names
        schemes = (repository_root / "nnunet_conres/datasets/schemes").glob("*.toml")
        assert {path.name for path in schemes} == {Path(name).name for name in names if "/datasets/schemes/" in name}
        assert f"{info}/licenses/LICENSE" in names

    def test_metadata(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            info = f"nnunet_conres-{__version__}.dist-info"
            metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
            assert b"nnunet-conres = nnunet_conres.cli:main" in archive.read(f"{info}/entry_points.txt")
        assert metadata["Name"] == "nnunet-conres"
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Requires-Python"] == ">=3.10"
        assert "nnunetv2<3,>=2.8" in metadata.get_all("Requires-Dist", [])

    def test_an_editable_one_is_read_after_its_path_file(self, editable_wheel: Path, repository_root: Path) -> None:
        with zipfile.ZipFile(editable_wheel) as archive:
            path_files = sorted(name for name in archive.namelist() if name.endswith(".pth"))
            assert path_files == ["_nnunet_conres.pth", "nnunet_conres.pth"]
            assert {*STARTUP_FILES} < {*archive.namelist()}
            assert Path(archive.read(path_files[0]).decode().strip()) == repository_root


def test_source_distribution_has_what_belongs_to_the_project(repository_root: Path, tmp_path: Path) -> None:
    with tarfile.open(build(repository_root, "sdist", tmp_path)) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames()]
    tops = {name.split("/")[0] for name in names}
    needed = {"nnunet_conres", "tests", "LICENSE", "README.md", "pyproject.toml"}
    # hatchling adds .gitignore and PKG-INFO by itself
    pages = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"}
    assert needed | pages <= tops <= needed | pages | {"scripts", "docs", "mkdocs.yml", ".gitignore", "PKG-INFO"}
    assert not [name for name in names if name.endswith((".pyc", ".nii.gz", ".npz", ".zip"))]


class Environment:
    """A virtual environment, and Python in it."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.folder = folder
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        # With the last package, pip would also remove the folder of the packages.
        site_packages = self.python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        Path(site_packages, "another_package.py").touch()

    def python(self, *arguments: str, **variables: str) -> str:
        left_out = {VARIABLE, "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONSTARTUP"}
        environment = {key: value for key, value in os.environ.items() if key not in left_out}
        run = subprocess.run(
            [str(self.bin / "python"), *arguments],
            env={**environment, **variables},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stderr == ""
        return run.stdout.strip()

    def pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self.bin / "python")]
        subprocess.run([*command, *arguments], check=True, capture_output=True)

    def files(self) -> set[Path]:
        return set(self.folder.rglob("*"))


@pytest.mark.parametrize("kind", ["wheel", "editable_wheel"])
class TestInstallation:
    @pytest.fixture
    def built(self, kind: str, request: pytest.FixtureRequest) -> Path:
        pytest.importorskip("pip", reason="needs pip")
        return request.getfixturevalue(kind)

    def test_lives_and_leaves_nothing(self, built: Path, tmp_path: Path) -> None:
        environment = Environment(tmp_path / "environment")
        before = environment.files()
        environment.pip("install", "--no-deps", str(built))

        folder = environment.python("-c", REPORT)
        assert Path(folder, "nnunet_conres_trainers.py").is_file()
        assert environment.python("-c", REPORT, **{VARIABLE: "/mine"}) == os.pathsep.join(["/mine", folder])
        assert environment.python("-c", REPORT, **{VARIABLE: folder}) == folder

        # imports, also by nnU-Net's search, make Python write compiled files
        search = f"import sys; sys.path.insert(0, {folder!r}); import nnunet_conres_trainers"
        environment.python("-c", search + ", nnunet_conres.cli, nnunet_conres.registration.info")

        environment.pip("uninstall", "--yes", "nnunet-conres")
        assert environment.files() == before
        assert environment.python("-c", REPORT) == "None"

    def test_python_3_15_reads_the_other_startup_file(self, built: Path, tmp_path: Path, repository_root: Path) -> None:
        environment = Environment(tmp_path / "environment")
        environment.pip("install", "--no-deps", str(built))
        report = f"import _nnunet_conres_startup; print(_nnunet_conres_startup.activated_by); {REPORT}"
        before = environment.python("-c", report).splitlines()
        assert before[0] == ("nnunet_conres.pth" if sys.version_info < (3, 15) else "nnunet_conres.start")

        site_packages = environment.python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        pep_829 = (repository_root / "tests" / "registration" / "pep829.py").read_text(encoding="utf-8")
        code = f"exec({pep_829!r}); addsitedir({site_packages!r}); {report}"
        after = environment.python("-S", "-c", code).splitlines()
        assert after == ["nnunet_conres.start", before[1]]

    def test_command_runs(self, built: Path, tmp_path: Path) -> None:
        environment = Environment(tmp_path / "environment")
        environment.pip("install", "--no-deps", str(built))
        environment_without = {key: value for key, value in os.environ.items() if key not in (VARIABLE, "PYTHONPATH")}
        run = subprocess.run(
            [str(environment.bin / "nnunet-conres"), "info"],
            env=environment_without,
            capture_output=True,
            text=True,
            check=False,
        )
        # nnU-Net is not in this environment, but the command is, and discovery is active
        assert run.returncode == 1
        assert "nnU-Net is not installed" in run.stdout
        startup_file = f"nnunet_conres.{'pth' if sys.version_info < (3, 15) else 'start'}"
        assert f"discovery           active ({startup_file})\n" in run.stdout


def test_an_environment_that_inherits_the_folder_is_not_harmed(wheel: Path, tmp_path: Path) -> None:
    first = Environment(tmp_path / "first")
    first.pip("install", "--no-deps", str(wheel))
    folder = first.python("-c", REPORT)
    second = Environment(tmp_path / "second")
    look_up = "import sys; sys.path.insert(0, sys.argv[1]); import nnunet_conres_trainers as module; "
    report = "print(hasattr(module, 'nnUNetTrainerConResNet'))"
    assert second.python("-c", look_up + report, folder, **{VARIABLE: folder}) == "False"
