import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_conres import families, registration
from nnunet_conres.registration import TRAINER_FOLDER, VARIABLE, folders, is_active

OTHER = os.path.join(os.path.abspath(os.sep), "somebody", "trainers")


class TestIsActive:
    @pytest.mark.parametrize("value", ["", " ", os.pathsep, OTHER, TRAINER_FOLDER + "_of_mine"])
    def test_not_without_our_folder(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv(VARIABLE, value)
        assert not is_active()

    def test_not_without_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(VARIABLE, raising=False)
        assert not is_active()
        assert folders() == []

    @pytest.mark.parametrize("end", ["", "/", "/.", "//", "/../external_trainers"])
    def test_with_our_folder_however_it_is_spelled(self, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
        monkeypatch.setenv(VARIABLE, os.pathsep.join([OTHER, "", TRAINER_FOLDER + end]))
        assert is_active()
        assert folders() == [OTHER, TRAINER_FOLDER + end]


def test_registration_imports_nothing_heavy(repository_root: Path) -> None:
    code = """
import sys
import nnunet_conres.registration.info
import nnunet_conres.cli
import nnunet_conres
nnunet_conres.cli.build_parser().format_help()
print(sorted({"torch", "numpy", "SimpleITK", "matplotlib", "nnunetv2", "batchgenerators"} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=repository_root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_trainers_are_those_that_the_package_exports() -> None:
    from nnunet_conres import trainers

    assert sorted(families.TRAINERS) == sorted(trainers.__all__)
    for name in families.TRAINERS:
        # the results folder and checkpoints contain the name, by which a prediction finds the class
        assert getattr(trainers, name).__name__ == name


def test_oldest_nnunet_is_the_one_that_the_package_requires(repository_root: Path) -> None:
    needed = ".".join(map(str, registration.MINIMUM_NNUNET))
    following = registration.MINIMUM_NNUNET[0] + 1
    assert f'"nnunetv2>={needed},<{following}"' in (repository_root / "pyproject.toml").read_text(encoding="utf-8")
