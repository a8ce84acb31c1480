"""The folder that a container is built from: its content, and that it predicts the same as the model."""

import email
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

import nnunet_conres
from nnunet_conres import cli
from nnunet_conres.errors import InputError
from nnunet_conres.nnunet import Model
from nnunet_conres.submission.package import package_model
from nnunet_conres.submission.predict import predict_brats
from nnunet_conres.submission.wheel import pinned_requirements, write_wheel

MODEL = Model("nnUNetTrainerMuon", "nnUNetPlans", "3d_fullres")
WHEEL = f"nnunet_conres-{nnunet_conres.__version__}-py3-none-any.whl"
CASE = "BraTS-MET-00001-000"


@pytest.fixture
def results(shared_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("nnUNet_results", str(shared_model.parents[1]))
    return shared_model.parents[1]


@pytest.fixture
def installed() -> None:
    """Skip the test if this version of the package is not installed, because the installed package is packed."""
    try:
        if version("nnunet-conres") == nnunet_conres.__version__:
            return
    except ModuleNotFoundError:
        pass
    pytest.skip("needs an installation of this package")


@pytest.mark.usefixtures("installed")
class TestPackage:
    def test_what_is_in_it(
        self,
        results: Path,
        shared_model: Path,
        tmp_path: Path,
        write_case: Callable[..., Path],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder = tmp_path / "a package"
        command = ["package", "-d", "950", "-tr", MODEL.trainer, "-f", "0", "1", "-o", str(folder)]
        assert cli.main([*command, "--scheme", "2026-MET", "--missing", "zero"]) == 0
        assert f"docker build -t submission '{folder}'" in capsys.readouterr().out
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        checkpoints = {f"model/fold_{fold}/checkpoint_final.pth" for fold in (0, 1)}
        texts = {"Dockerfile", "apptainer.def", "README.md", "package.json", "requirements.txt"}
        assert files == texts | checkpoints | {WHEEL, "model/dataset.json", "model/plans.json"}

        for name in checkpoints:
            original = shared_model / Path(name).relative_to("model")
            assert (folder / name).stat().st_size < original.stat().st_size * 0.55
            weights = torch.load(folder / name, weights_only=True)
            assert weights["trainer_name"] == MODEL.trainer
            expected = torch.load(original, weights_only=False)["network_weights"]
            assert weights["network_weights"].keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(weights["network_weights"][key], value, rtol=0, atol=0)

        entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", (folder / "Dockerfile").read_text(), re.MULTILINE)[1])
        home = "/opt/nnunet-conres"
        expected = [
            "nnunet-conres",
            "predict-brats",
            "-m",
            f"{home}/model",
            "--scheme",
            "2025-MET",
            "--missing",
            "zero",
        ]
        assert entry == expected
        assert json.loads((folder / "package.json").read_text())["command"] == expected
        assert " ".join(expected) in (folder / "apptainer.def").read_text()

        # All files copied into the container exist, and every line of the Dockerfile begins with an instruction.
        dockerfile = re.sub(r"\\\n", " ", (folder / "Dockerfile").read_text())
        instructions = [line.split() for line in dockerfile.splitlines() if line and not line.startswith("#")]
        assert {words[0] for words in instructions} == {"ARG", "FROM", "ENV", "COPY", "RUN", "ENTRYPOINT", "CMD"}
        copied = {source for words in instructions if words[0] == "COPY" for source in words[1:-1]}
        assert copied == {"requirements.txt", WHEEL, "model"}
        section = (folder / "apptainer.def").read_text().partition("%files\n")[2].partition("\n\n")[0]
        assert {line.split()[0] for line in section.splitlines()} == copied

        # The entry point predicts the same as the model.
        write_case(tmp_path / "input" / CASE, parts=("t2f", "t1n", "t1c"))
        arguments = [str(folder / "model") if word == f"{home}/model" else word for word in entry[1:]]
        packed, direct = tmp_path / "packed", tmp_path / "direct"
        assert cli.main([*arguments, "-i", str(tmp_path / "input"), "-o", str(packed), "-device", "cpu"]) == 0
        predict_brats(tmp_path / "input", direct, shared_model, missing="zero", device="cpu", progress=False)
        one, other = (np.asarray(nibabel.load(place / f"{CASE}.nii.gz").dataobj) for place in (packed, direct))
        np.testing.assert_array_equal(one, other)

    @pytest.mark.parametrize(
        ("name", "copy"), [("2027-MET.toml", "2027-MET.toml"), ('our "2027" MET.toml', "our_2027_MET.toml")]
    )
    def test_a_scheme_of_the_users_own(self, results: Path, tmp_path: Path, name: str, copy: str) -> None:
        scheme = tmp_path / name
        scheme.write_text('like = "2025-MET"\ntitle = "BraTS 2027, metastases"\n')
        done = package_model("Dataset950_Tiny", MODEL, [0], tmp_path / "package", scheme=str(scheme))
        assert (done.folder / copy).read_bytes() == scheme.read_bytes()
        assert done.command[-2:] == ("--scheme", f"/opt/nnunet-conres/{copy}")
        assert f"COPY {copy} /opt/nnunet-conres/" in (done.folder / "Dockerfile").read_text()
        assert done.model_bytes < done.checkpoint_bytes * 0.55

    def test_postprocessing(
        self, results: Path, tmp_path: Path, postprocessing_file: Path, write_case: Callable[..., Path]
    ) -> None:
        done = package_model(950, MODEL, [0], tmp_path / "package", postprocessing=postprocessing_file)
        assert done.command[-2:] == ("--postprocessing", "/opt/nnunet-conres/postprocessing.json")
        assert (done.folder / "postprocessing.json").read_bytes() == postprocessing_file.read_bytes()
        assert "COPY postprocessing.json /opt/nnunet-conres/" in (done.folder / "Dockerfile").read_text()
        postprocessing_file.write_text("{}")
        with pytest.raises(InputError, match="is not a post-processing of format 1"):
            package_model(950, MODEL, [0], tmp_path / "other", postprocessing=postprocessing_file)

    def test_versions_are_those_installed(self, results: Path, tmp_path: Path) -> None:
        done = package_model(950, MODEL, [0], tmp_path / "package")
        lines = (done.folder / "requirements.txt").read_text().split()
        pinned = dict(line.split("==") for line in lines)
        for name in ("nnunetv2", "batchgenerators", "numpy", "nibabel", "simpleitk"):
            assert pinned[name] == version(name)
        # Package indexes have no local versions such as 2.8.0+cpu.
        assert pinned["torch"] == version("torch").split("+")[0]
        assert not [name for name in pinned if name.startswith(("nvidia-", "nnunet-conres"))]
        assert f"python:{'.'.join(map(str, sys.version_info[:3]))}-slim" in (done.folder / "Dockerfile").read_text()


@pytest.mark.usefixtures("installed")
class TestRefusals:
    @staticmethod
    def errors(folder: Path, *arguments: Any, model: Model = MODEL, **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            package_model(*arguments, folder, **options) if arguments else package_model(
                950, model, [0], folder, **options
            )
        assert not list(folder.parent.glob(f".{folder.name}*"))
        return "\n".join(caught.value.errors)

    def test_all_together(self, results: Path, tmp_path: Path) -> None:
        (tmp_path / "package").mkdir()
        (tmp_path / "package/mine").touch()
        errors = self.errors(tmp_path / "package", 950, MODEL, [0, 4, 4], scheme="2024-MEN-RT")
        for what in (
            "exists already and is not an empty folder",
            "fold_4/checkpoint_final.pth does not exist",
            "expected each only once",
            "the model was trained with the channels FLAIR, T1, T1ce, T2; cases of BraTS 2024",
        ):
            assert what in errors
        assert [path.name for path in (tmp_path / "package").iterdir()] == ["mine"]

    def test_no_such_model(self, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        other = Model("nnUNetTrainer", "nnUNetPlans", "3d_fullres")
        assert "nnUNetTrainer__nnUNetPlans__3d_fullres is not a trained model" in self.errors(
            tmp_path / "p", model=other
        )
        monkeypatch.delenv("nnUNet_results")
        assert "nnUNet_results is not set" in self.errors(tmp_path / "p")
        assert not (tmp_path / "p").exists()

    def test_another_trainer_than_the_folder_says(
        self, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("nnUNet_results", str(tmp_path))
        make_model(tmp_path / "Dataset950_Tiny" / MODEL.folder_name, trainer="nnUNetTrainerVNet")
        assert "was trained by nnUNetTrainerVNet; expected a checkpoint" in self.errors(tmp_path / "package")

    def test_a_trainer_of_the_users_own(
        self, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "trainers").mkdir()
        (tmp_path / "trainers/mine.py").write_text(
            "from nnunet_conres.trainers import nnUNetTrainerMuon\n\n\nclass MyTrainer(nnUNetTrainerMuon):\n    pass\n"
        )
        monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "trainers"))
        monkeypatch.setenv("nnUNet_results", str(tmp_path))
        mine = Model("MyTrainer", "nnUNetPlans", "3d_fullres")
        make_model(tmp_path / "Dataset950_Tiny" / mine.folder_name, trainer="MyTrainer")
        errors = self.errors(tmp_path / "package", model=mine)
        assert "The trainer MyTrainer is in mine, which the container would not have" in errors


@pytest.mark.usefixtures("installed")
class TestWheel:
    def test_is_as_hatchling_builds_it(self, tmp_path: Path, repository_root: Path) -> None:
        pytest.importorskip("hatchling", reason="needs what builds the package")
        command = [
            sys.executable,
            "-m",
            "hatchling",
            "build",
            "--target",
            "wheel",
            "--directory",
            str(tmp_path / "built"),
        ]
        subprocess.run(command, cwd=repository_root, check=True, capture_output=True)
        info = f"nnunet_conres-{nnunet_conres.__version__}.dist-info"
        varying = {f"{info}/{name}" for name in ("RECORD", "WHEEL", "METADATA")}
        contents = []
        for wheel in (write_wheel(tmp_path), next((tmp_path / "built").iterdir())):
            with zipfile.ZipFile(wheel) as archive:
                assert archive.testzip() is None
                names = archive.namelist()
                assert varying <= set(names)
                metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
                assert metadata["Name"] == "nnunet-conres"
                contents.append({name: archive.read(name) for name in names if name not in varying})
        assert contents[0] == contents[1]

    @pytest.mark.slow
    def test_pip_installs_it(self, tmp_path: Path) -> None:
        environment = tmp_path / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
        python = environment / "bin/python"
        wheel = write_wheel(tmp_path)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True, capture_output=True)
        run = subprocess.run([python, "-m", "nnunet_conres.cli", "info"], cwd=tmp_path, capture_output=True, text=True)
        assert "discovery           active (nnunet_conres.pth)\n" in run.stdout

    def test_requirements_are_complete(self) -> None:
        lines, _ = pinned_requirements()
        names = {line.split("==")[0] for line in lines}
        assert {"nnunetv2", "torch", "scipy", "acvl-utils", "dynamic-network-architectures", "einops"} <= names
        assert len(names) == len(lines)


@pytest.mark.container
@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_podman_builds_and_runs_it(
    results: Path, shared_model: Path, tmp_path: Path, write_case: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    """With the base image of --container-base, which may have the requirements installed already."""
    podman = shutil.which("podman")
    base = request.config.getoption("--container-base")
    if podman is None or base is None:
        pytest.skip("needs podman, and --container-base IMAGE with Python and pip")
    package = package_model(950, MODEL, [0, 1], tmp_path / "package").folder
    image = "localhost/nnunet-conres-test"
    build = [podman, "build", "--network", "host", "--build-arg", f"BASE={base}", "-t", image, str(package)]
    subprocess.run(build, check=True)
    write_case(tmp_path / "input" / CASE)
    (tmp_path / "output").mkdir()
    mounts = ["-v", f"{tmp_path}/input:/input:ro", "-v", f"{tmp_path}/output:/output"]
    subprocess.run(
        [podman, "run", "--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp", *mounts, image], check=True
    )
    predict_brats(tmp_path / "input", tmp_path / "direct", shared_model, device="cpu", progress=False)
    one, other = (np.asarray(nibabel.load(tmp_path / d / f"{CASE}.nii.gz").dataobj) for d in ("output", "direct"))
    np.testing.assert_array_equal(one, other)
