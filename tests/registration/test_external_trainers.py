"""The module that nnU-Net imports from our folder, in this environment and in others that inherited the folder."""

import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_conres.families import TRAINERS
from nnunet_conres.registration import TRAINER_FOLDER, VARIABLE

PACKAGE = Path(TRAINER_FOLDER).parent.parent

# Looks up a trainer like nnU-Net, but without it: imports the module by its bare name and gets the trainer from it.
LOOK_UP = """
import sys
sys.path.insert(0, sys.argv[1])
import nnunet_conres_trainers as module
print(hasattr(module, sys.argv[2]))
"""


def look_up(
    name: str, *search_path: Path, folder: Path = Path(TRAINER_FOLDER), code: str = LOOK_UP
) -> subprocess.CompletedProcess[str]:
    # -S hides installed packages, so that only those of the test are found
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search_path))}
    command = [sys.executable, "-S", "-c", code, str(folder), name]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def add_nnunet(folder: Path, version: str) -> None:
    """Make nnU-Net look installed in a folder."""
    metadata = folder / f"nnunetv2-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: nnunetv2\nVersion: {version}\n")


def add_package(folder: Path, trainers: str) -> Path:
    """Copy this package into a folder, with other trainers."""
    package = folder / "nnunet_conres"
    package.mkdir(parents=True)
    for file in ("__init__.py", "errors.py", "families.py", "files.py", "nnunet.py", "refusals.py", "text.py"):
        shutil.copy(PACKAGE / file, package)
    shutil.copytree(PACKAGE / "registration", package / "registration")
    (package / "trainers").mkdir()
    (package / "trainers" / "__init__.py").write_text(trainers)
    return package


class TestFolder:
    def test_holds_one_module_with_a_name_of_our_own(self) -> None:
        # nnU-Net imports every module of the folder by its bare name
        assert [module.name for module in pkgutil.iter_modules([TRAINER_FOLDER])] == ["nnunet_conres_trainers"]

    def test_is_no_package(self) -> None:
        assert not os.path.exists(os.path.join(TRAINER_FOLDER, "__init__.py"))


class TestInThisEnvironment:
    def test_finds_a_trainer(self, tmp_path: Path) -> None:
        package = add_package(tmp_path, "class nnUNetTrainerConResNet: pass")
        add_nnunet(tmp_path, "2.8.1")
        run = look_up("nnUNetTrainerConResNet", tmp_path, folder=package / "registration" / "external_trainers")
        assert (run.stdout, run.stderr) == ("True\n", "")

    @pytest.mark.parametrize(
        "trainers",
        [
            "import no_such_module",
            "from nnunet_conres import no_such_name",
            "import sys; sys.no_such_attribute",
            "1 / 0",
            "class nnUNetTrainerConResNetOfYesterday: pass",
        ],
    )
    def test_an_error_of_our_own_is_not_swallowed(self, tmp_path: Path, trainers: str) -> None:
        package = add_package(tmp_path, trainers)
        add_nnunet(tmp_path, "2.8.1")
        run = look_up("nnUNetTrainerConResNet", tmp_path, folder=package / "registration" / "external_trainers")
        assert run.returncode == 1
        assert "ImportError: nnUNetTrainerConResNet could not be loaded from" in run.stderr

    def test_an_error_of_our_own_disturbs_nobody_else(self, tmp_path: Path) -> None:
        package = add_package(tmp_path, "1 / 0")
        add_nnunet(tmp_path, "2.8.1")
        run = look_up("nnUNetTrainerOfSomebody", tmp_path, folder=package / "registration" / "external_trainers")
        assert (run.stdout, run.stderr) == ("False\n", "")

    @pytest.mark.parametrize("version", ["2.7.9", "2.6", "1.7.1"])
    def test_an_nnunet_too_old_is_reported(self, tmp_path: Path, version: str) -> None:
        package = add_package(tmp_path, "class nnUNetTrainerConResNet: pass")
        add_nnunet(tmp_path, version)
        run = look_up("nnUNetTrainerConResNet", tmp_path, folder=package / "registration" / "external_trainers")
        assert run.stdout == "False\n"
        assert len(run.stderr.splitlines()) == 1
        for part in (f"nnU-Net {version} is too old", "nnunetv2 >= 2.8", 'pip install --upgrade "nnunetv2>=2.8,<3"'):
            assert part in run.stderr


class TestInAnotherEnvironment:
    def test_without_the_package_nothing_is_defined(self) -> None:
        run = look_up("nnUNetTrainerConResNet")
        assert (run.returncode, run.stdout, run.stderr) == (0, "False\n", "")

    def test_a_version_that_lacks_the_trainer_defines_nothing(self, tmp_path: Path) -> None:
        package = add_package(tmp_path, "")
        (package / "families.py").write_text("FAMILIES, TRAINERS, load, no_trainer = (), {}, None, None\n")
        run = look_up("nnUNetTrainerConResNet", tmp_path)
        assert (run.returncode, run.stdout, run.stderr) == (0, "False\n", "")

    def test_a_version_of_its_own_serves_its_own_trainer(self, tmp_path: Path) -> None:
        add_package(tmp_path, "class nnUNetTrainerConResNet: pass")
        add_nnunet(tmp_path, "2.8.1")
        run = look_up("nnUNetTrainerConResNet", tmp_path)
        assert (run.stdout, run.stderr) == ("True\n", "")

    def test_without_what_the_package_needs_nothing_is_defined(self, tmp_path: Path) -> None:
        add_package(tmp_path, "import torch")
        add_nnunet(tmp_path, "2.8.1")
        run = look_up("nnUNetTrainerConResNet", tmp_path)
        assert (run.returncode, run.stdout) == (0, "False\n")
        assert run.stderr.startswith("nnunet-conres: warning: nnUNetTrainerConResNet could not be loaded from")
        assert "No module named 'torch'" in run.stderr

    def test_what_is_left_of_a_package_defines_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "nnunet_conres" / "trainers").mkdir(parents=True)
        run = look_up("nnUNetTrainerConResNet", tmp_path)
        assert (run.returncode, run.stdout) == (0, "False\n")

    def test_other_trainers_are_looked_up_without_a_trace_of_us(self, tmp_path: Path) -> None:
        add_package(tmp_path, "raise SystemExit('imported')")
        code = LOOK_UP + "print([name for name in sys.modules if name.startswith('nnunet_conres.trainers')])"
        run = look_up("nnUNetTrainerOfSomebody", tmp_path, code=code)
        assert (run.stdout, run.stderr) == ("False\n[]\n", "")


class TestWithNNUNet:
    def test_its_search_finds_every_trainer(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

        for name in TRAINERS:
            trainer = recursive_find_python_class(
                TRAINER_FOLDER, name, None, base_folder=TRAINER_FOLDER, cleanup_imports_from_base_folder=True
            )
            # A worker process, which never ran the search, unpickles the class from its `__module__`.
            assert getattr(sys.modules[trainer.__module__], name) is trainer

    def test_the_users_folder_comes_first(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

        (tmp_path / "trainers_of_mine.py").write_text(
            "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
            "class nnUNetTrainerConResNet(nnUNetTrainer): mine = True\n"
        )
        monkeypatch.setenv(VARIABLE, os.pathsep.join([str(tmp_path), TRAINER_FOLDER]))
        assert recursive_find_trainer_class_by_name("nnUNetTrainerConResNet").mine
        trainer = recursive_find_trainer_class_by_name("nnUNetTrainerConResNetPaper")
        assert trainer.__module__.startswith("nnunet_conres.trainers")
