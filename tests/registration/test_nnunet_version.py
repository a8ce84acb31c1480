from importlib import metadata

import pytest

from nnunet_conres.registration import nnunet_version
from nnunet_conres.registration.nnunet_version import installed_version, is_recent_enough, version_problem


@pytest.mark.parametrize(
    "version", ["2.8", "2.8.0", "2.8.1", "2.8.0rc1", "2.8.dev0+gabc", "2.10", "2.10.3", "3", "v2.9", "master"]
)
def test_recent_enough(version: str) -> None:
    assert is_recent_enough(version)


@pytest.mark.parametrize("version", ["2", "2.7", "2.7.99", "2.0.1", "1.7.1", "0.1", " 2.6.2"])
def test_too_old(version: str) -> None:
    assert not is_recent_enough(version)


class TestInstalledVersion:
    def test_is_the_one_in_the_metadata(self) -> None:
        assert installed_version("pytest") == pytest.__version__

    def test_of_what_is_not_installed(self) -> None:
        assert installed_version("no-such-distribution") is None

    def test_of_a_damaged_installation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(name: str) -> str:
            raise KeyError("Version")

        monkeypatch.setattr(metadata, "version", fail)
        assert installed_version("nnunetv2") is None


class TestVersionProblem:
    @pytest.fixture
    def installed(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nnunet_version, "installed_version", lambda name: request.param)

    @pytest.mark.parametrize("installed", ["2.8.1"], indirect=True)
    @pytest.mark.usefixtures("installed")
    def test_none(self) -> None:
        assert version_problem() is None

    @pytest.mark.parametrize("installed", ["2.7.0"], indirect=True)
    @pytest.mark.usefixtures("installed")
    def test_too_old(self) -> None:
        assert version_problem() == (
            "nnU-Net 2.7.0 is too old, nnunet-conres needs nnunetv2 >= 2.8. "
            'Update it: pip install --upgrade "nnunetv2>=2.8,<3"'
        )

    @pytest.mark.parametrize("installed", [None], indirect=True)
    @pytest.mark.usefixtures("installed")
    def test_missing(self) -> None:
        problem = version_problem()
        assert problem is not None
        assert problem.startswith("nnU-Net is not installed")
