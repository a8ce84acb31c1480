"""Memory of training steps on fake tensors, compared with real steps, and interpolation between executed sizes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from nnunet_conres import cli, trainers
from nnunet_conres.errors import InputError
from nnunet_conres.families import find_trainer
from nnunet_conres.planning.memory import MemoryModel, UntrainableError, estimate_memory
from nnunet_conres.planning.memory_report import GIB, largest_patch
from nnunet_conres.planning.tracker import CudaAutocast, LiveStorages, measure_training_step
from nnunet_conres.planning.training_step import RunningStep, TrainingStep
from tests.small_networks import plain_unet

ISOTROPIC = ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]], [[3, 3, 3]] * 4, [16, 32, 64, 128])
ANISOTROPIC = ([[1, 1, 1], [1, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3]], [16, 32, 64])
TWO_STAGES = ([[1, 1, 1], [2, 2, 2]], [[3, 3, 3]] * 2, [16, 32])


LABELS = {
    "labels": LabelManager({"background": 0, "organ": 1, "tumor": 2}, None),
    "ignore": LabelManager({"background": 0, "organ": 1, "tumor": 2, "ignore": 3}, None),
    "regions": LabelManager({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [1, 2, 3]),
    "ignored_regions": LabelManager({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2]),
    "many": LabelManager({"background": 0} | {f"organ {number}": number for number in range(1, 14)}, None),
}
OURS = [name for name in trainers.__all__ if not name.endswith(("epoch", "epochs"))]


def stock(topology: tuple[Any, ...]) -> ConfigurationManager:
    return ConfigurationManager({"architecture": plain_unet(*topology, convolutions=2)})


def step(
    trainer: str | type[nnUNetTrainer] = "nnUNetTrainerConResNet",
    topology: tuple[Any, ...] = ISOTROPIC,
    checkpointing: str = "none",
    patch_size: tuple[int, int, int] = (32, 48, 48),
    labels: str = "labels",
    **changes: Any,
) -> TrainingStep:
    found = find_trainer(trainer) if isinstance(trainer, str) else trainer
    configuration = stock(topology)
    architecture = configuration.configuration["architecture"]
    if found.__module__.startswith("nnunet_conres."):
        architecture = found.architecture(configuration)
        if checkpointing != "none":
            architecture["arch_kwargs"]["checkpointing"] = checkpointing
    given: dict[str, Any] = {"batch_size": 2, "input_channels": 1, "labels": LABELS[labels], "device": "cpu"} | changes
    return TrainingStep(found, architecture, patch_size, **given)


class TestModel:
    """Interpolated peaks, compared with those of executed steps."""

    @pytest.mark.parametrize(
        ("model_of", "others"),
        [
            (step(topology=TWO_STAGES), [{"batch_size": 5}, {"patch_size": (96, 96, 96), "batch_size": 3}]),
            (
                step(topology=TWO_STAGES, device="cuda", labels="regions"),
                [{"patch_size": (64, 96, 96), "batch_size": 1}],
            ),
            (step("nnUNetTrainerVNet", ANISOTROPIC, "full", device="cuda"), [{"patch_size": (32, 96, 160)}]),
            (step("nnUNetTrainerUNet3D", checkpointing="decoder"), [{"patch_size": (128, 160, 64)}]),
            # the first size is so small that the optimiser takes most; at the second, the activations do
            (step("nnUNetTrainerMuon", patch_size=(16, 16, 16), device="cuda"), [{"patch_size": (128, 128, 128)}]),
            (step(nnUNetTrainer, labels="many", device="cuda"), [{"patch_size": (64, 96, 128), "batch_size": 4}]),
            (step(patch_size=(31, 64, 48), topology=TWO_STAGES), [{"batch_size": 3}]),
        ],
    )
    def test_as_executed(self, model_of: TrainingStep, others: list[dict[str, Any]]) -> None:
        model = MemoryModel()
        model.total(model_of)
        for other in others:
            changed = dataclasses.replace(model_of, **other)
            assert model.total(changed) == pytest.approx(estimate_memory(changed).total, rel=3e-3)

    def test_two_executions_serve_a_topology(self) -> None:
        executed: list[None] = []
        model = MemoryModel(progress=lambda: executed.append(None))
        for patch in ((32, 48, 48), (64, 48, 48), (128, 128, 128)):
            for batch in (2, 7):
                model.total(step(nnUNetTrainer, TWO_STAGES, patch_size=patch, batch_size=batch))
        assert len(executed) == 2
        model.total(step(nnUNetTrainer, ANISOTROPIC))
        assert len(executed) == 4
        model.execute(step(nnUNetTrainer, TWO_STAGES, patch_size=(64, 64, 64)))
        model.execute(step(nnUNetTrainer, TWO_STAGES, patch_size=(64, 64, 64)))
        assert len(executed) == 5

    def test_what_was_executed_is_known(self) -> None:
        model = MemoryModel()
        plans = step(topology=TWO_STAGES, patch_size=(64, 64, 64), batch_size=3)
        assert model.execute(plans) == model.total(plans) == estimate_memory(plans).total

    def test_grows_with_patch_and_batch(self) -> None:
        model = MemoryModel()
        sizes = [
            model.total(step(topology=TWO_STAGES, patch_size=patch, batch_size=batch))
            for patch, batch in (((32, 32, 32), 1), ((32, 32, 32), 2), ((32, 64, 64), 2))
        ]
        assert sizes[0] < sizes[1] < sizes[2]

    def test_a_bottleneck_of_one_voxel_is_refused(self) -> None:
        with pytest.raises(UntrainableError, match=r"patch of 8 x 8 x 8 voxels and a batch of 2: Expected more than 1"):
            MemoryModel().total(step(nnUNetTrainer, patch_size=(8, 8, 8)))

    def test_sizes_that_the_strides_do_not_divide(self) -> None:
        """nnU-Net rounds the target sizes of deep supervision; strided convolutions round up."""
        with pytest.raises(UntrainableError, match="patch of 31 x 45 x 50 voxels"):
            estimate_memory(step(nnUNetTrainer, patch_size=(31, 45, 50)))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"device": "tpu"}, "device is 'tpu'"),
            ({"patch_size": (32,)}, "expected three numbers"),
            ({"batch_size": 0}, "expected 1 or more"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            dataclasses.replace(step(), **change)

    @pytest.mark.parametrize(
        ("checkpointing", "device", "limit"),
        [("none", "cuda", 5.5), ("full", "cpu", 2.2)],
    )
    def test_paper_topology_at_the_papers_patch(self, checkpointing: str, device: str, limit: float) -> None:
        plans = step(
            "nnUNetTrainerConResNetPaper",
            checkpointing=checkpointing,
            patch_size=(80, 160, 160),
            batch_size=1,
            input_channels=4,
            labels="regions",
            device=device,
        )
        assert measure_training_step(plans).peak < limit * GIB


class TestStep:
    """Network, loss and optimiser are the trainer's own."""

    @pytest.mark.parametrize("labels", [pytest.param("labels", marks=pytest.mark.slow), "ignored_regions"])
    @pytest.mark.parametrize("trainer", [*OURS, "nnUNetTrainer", "nnUNetTrainerAdam"])
    def test_of_every_trainer(self, trainer: str, labels: str) -> None:
        plans = step(trainer, TWO_STAGES, patch_size=(16, 32, 32), labels=labels)
        measured = measure_training_step(plans)
        parameters = measured.before["parameters"]
        assert 0 < measured.gradients <= parameters
        assert sum(measured.before.values()) < measured.peak
        # SGD keeps one momentum, Muon one momentum or two moments, Adam two or three moments
        assert 0.99 * parameters < measured.before["optimizer"] < 3.01 * parameters

    def test_muon_keeps_less_than_adam(self) -> None:
        kept = {}
        for trainer in ("nnUNetTrainer", "nnUNetTrainerMuon", "nnUNetTrainerAdam"):
            before = measure_training_step(step(trainer, TWO_STAGES, patch_size=(16, 16, 16))).before
            kept[trainer] = before["optimizer"] / before["parameters"]
        assert kept["nnUNetTrainer"] == 1
        assert 1 < kept["nnUNetTrainerMuon"] < 1.1
        assert kept["nnUNetTrainerAdam"] > 2

    def test_without_deep_supervision(self) -> None:
        with torch.device("cpu"):
            running = RunningStep(step(nnUNetTrainerNoDeepSupervision, patch_size=(16, 16, 16)), torch.device("cpu"))
        assert isinstance(running.network(running.data), torch.Tensor)
        assert isinstance(running.targets, torch.Tensor)

    def test_in_2d(self) -> None:
        architecture = json.loads(json.dumps(stock(ISOTROPIC).configuration["architecture"]).replace("3d", "2d"))
        arguments = architecture["arch_kwargs"]
        arguments |= {"conv_op": "torch.nn.modules.conv.Conv2d"}
        arguments |= {"norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d"}
        arguments["strides"] = [stride[1:] for stride in arguments["strides"]]
        arguments["kernel_sizes"] = [kernel[1:] for kernel in arguments["kernel_sizes"]]
        plans = TrainingStep(nnUNetTrainer, architecture, (64, 96), 4, 1, LABELS["labels"], "cpu", False)
        fake, real = measure_training_step(plans), measure_training_step(plans, fake=False)
        assert fake.peak == pytest.approx(real.peak, rel=0.01)

    def test_unknown_trainer(self) -> None:
        with pytest.raises(InputError, match="There is no trainer nnUNetTrainerNobody"):
            find_trainer("nnUNetTrainerNobody")


class TestTracker:
    @pytest.mark.parametrize(
        "plans",
        [
            pytest.param(
                step(trainer, TWO_STAGES, checkpointing, (16, 16, 16), labels, mixed_precision=mixed),
                marks=[pytest.mark.slow] * (trainer == "nnUNetTrainerConResNetPaper"),  # slow: fixed width
            )
            for trainer, checkpointing, labels, mixed in (
                ("nnUNetTrainerConResNet", "none", "labels", True),
                ("nnUNetTrainerConResNet", "full", "regions", True),
                ("nnUNetTrainerConResNet", "decoder", "ignore", False),
                ("nnUNetTrainerConResNetPaper", "full", "labels", True),
                ("nnUNetTrainerVNet", "none", "ignored_regions", True),
                ("nnUNetTrainerUNet3D", "full", "labels", False),
                (nnUNetTrainer, "none", "regions", True),
            )
        ],
    )
    def test_without_data_as_with_them(self, plans: TrainingStep) -> None:
        fake, real = measure_training_step(plans), measure_training_step(plans, fake=False)
        assert fake.before == real.before
        assert fake.gradients == real.gradients
        assert fake.peak == pytest.approx(real.peak, rel=0.01)
        assert sum(fake.kept.values()) == pytest.approx(sum(real.kept.values()), rel=0.01)

    def test_parts_are_modules_of_the_network(self) -> None:
        kept = measure_training_step(step(nnUNetTrainer)).kept
        assert {f"encoder.stages.{stage}" for stage in range(4)} < set(kept)
        assert {"decoder.stages.0", "loss"} < set(kept)
        # two convolutions: the output and the normalised output of each are kept; 16 channels in bfloat16
        assert kept["encoder.stages.0"] == pytest.approx(2 * 2 * (2 * 32 * 48 * 48) * 16 * 2, rel=0.15)

    def test_counts_storages_not_views(self) -> None:
        with LiveStorages() as live:
            x = torch.zeros(10, 100)
            view = x[3:].t()
            assert live.current == 4000
            y = view + 1
            assert live.current == 4000 + 2800
            del x, view
            assert live.current == 2800
            del y
        assert (live.current, live.live) == (0, [4000, 6800])

    def test_cuda_autocast_on_a_cpu(self) -> None:
        # on fake tensors, because some of these operations have no float16 on a CPU
        with FakeTensorMode(), CudaAutocast(), torch.autocast("cpu", torch.float16):
            half = nn.Conv3d(2, 2, 3)(torch.randn(1, 2, 5, 5, 5))
            assert half.dtype == torch.float16
            assert F.group_norm(half, 1).dtype == torch.float32
            assert F.interpolate(half, size=(6, 6, 6), mode="trilinear").dtype == torch.float32
            assert F.avg_pool3d(half, 3).dtype == torch.float16
            assert F.prelu(half, torch.tensor([0.25, 0.25])).dtype == torch.float16
            assert F.pad(half, [0, 1] * 3, mode="replicate").dtype == torch.float16
            assert torch.softmax(half, 1).dtype == torch.float32
            assert F.instance_norm(half).dtype == torch.float16

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("trainer", [*OURS, "nnUNetTrainer"])
    def test_close_to_what_a_gpu_takes(self, trainer: str) -> None:
        plans = step(trainer, patch_size=(64, 96, 96), device="cuda")
        running = RunningStep(plans, torch.device("cuda"))
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            running.run(lambda: torch.autocast("cuda", torch.float16))
        # the workspaces of kernels are not seen; on an H200 they took 12 and 14 % of the total with the U-Nets
        unseen = 0.15 if "UNet3D" in trainer else 0.1
        assert estimate_memory(plans).peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=unseen)


def test_largest_patch_fits_and_the_next_does_not() -> None:
    plans, model = step(patch_size=(32, 64, 64), device="cuda"), MemoryModel()
    patch = largest_patch(plans, 4 * GIB, model)
    assert patch is not None
    assert all(extent % 8 == 0 for extent in patch)
    assert estimate_memory(dataclasses.replace(plans, patch_size=patch)).total <= 4 * GIB
    larger = [extent + 8 for extent in patch]
    assert estimate_memory(dataclasses.replace(plans, patch_size=larger)).total > 4 * GIB
    assert 1.6 < patch[1] / patch[0] < 2.5
    assert largest_patch(plans, 2**20, model) is None


def test_largest_patch_can_be_trained() -> None:
    # an instance norm needs more than one voxel at the bottleneck
    plans, model = step(nnUNetTrainer, patch_size=(64, 64, 64)), MemoryModel()
    for megabytes in range(10, 200, 10):
        patch = largest_patch(plans, megabytes * 2**20, model)
        assert patch is None or min(patch) >= 32
    assert largest_patch(plans, 4 * GIB, model) is not None


class TestCommand:
    @pytest.fixture
    def dataset(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folders = {kind: tmp_path / kind / "Dataset701_Thing" for kind in ("raw", "preprocessed")}
        for kind, folder in folders.items():
            folder.mkdir(parents=True)
            monkeypatch.setenv(f"nnUNet_{kind}", str(folder.parent))
        dataset = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "organ": 1},
            "numTraining": 1,
            "file_ending": ".nii.gz",
        }
        (folders["raw"] / "dataset.json").write_text(json.dumps(dataset))
        fullres = {"patch_size": [32, 64, 64], "batch_size": 2, "data_identifier": "x", "spacing": [1, 1, 1]}
        fullres |= {"architecture": stock(ISOTROPIC).configuration["architecture"], "previous_stage": None}
        plans = {
            "dataset_name": "Dataset701_Thing",
            "plans_name": "nnUNetPlans",
            "configurations": {
                "3d_fullres": fullres,
                "2d": fullres | {"patch_size": [64, 64]},
            },
        }
        (folders["preprocessed"] / "nnUNetPlans.json").write_text(json.dumps(plans))
        ours = plans | {"plans_name": "ours", "configurations": {"3d_fullres": dict(fullres)}}
        ours["configurations"]["3d_fullres"]["architecture"] = step("nnUNetTrainerVNet").architecture
        (folders["preprocessed"] / "ours.json").write_text(json.dumps(ours))
        return folders["preprocessed"]

    def test_tells_the_parts_and_what_fits(self, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["memory", "-d", "701", "-tr", "nnUNetTrainerConResNet", "--budget", "4", "0.1"]) == 0
        output = capsys.readouterr().out
        assert "nnUNetTrainerConResNet: ConResNet" in output
        parts = ("parameters", "gradients", "optimiser", "encoder.stages.0", "loss", "smaller parts", "peak")
        for part in parts:
            assert f"{part} " in output
        assert "  0.1 GiB  none" in output

    @pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainerMuon"])
    def test_of_nnunets_own_network(self, trainer: str, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["memory", "-d", "701", "-tr", trainer, "--budget", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        expected = step(trainer, patch_size=(32, 64, 64), labels="labels", device="cuda")
        expected = dataclasses.replace(expected, labels=LabelManager({"background": 0, "organ": 1}, None))
        assert report["peak"] == measure_training_step(expected).peak

    def test_json_of_plans_that_name_the_network(self, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["memory", "-d", "701", "-p", "ours", "--batch_size", "3", "--budget", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["batch_size"] == 3
        assert report["total"] == report["peak"] + report["workspace"]
        expected = dataclasses.replace(
            step("nnUNetTrainerVNet", patch_size=(32, 64, 64), batch_size=3, device="cuda"),
            trainer=nnUNetTrainer,
            labels=LabelManager({"background": 0, "organ": 1}, None),
        )
        assert report["peak"] == measure_training_step(expected).peak

    def test_paper_trainer_brings_patch_and_batch(self, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["memory", "-d", "701", "-tr", "nnUNetTrainerVNetPaper", "--budget", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["batch_size"] == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["-tr", "nnUNetTrainerNobody"], "There is no trainer nnUNetTrainerNobody"),
            (["-p", "other"], "There are no plans other"),
            (["-c", "3d_lowres"], "has no configuration 3d_lowres, only"),
            (["-c", "2d", "-tr", "nnUNetTrainerVNet"], "is 2D"),
            (["--patch_size", "32", "32"], "The patch has 2 numbers; expected 3"),
            (["--patch_size", "8", "8", "8"], "Expected more than 1"),
            (["-p", "ours", "--batch_size", "0"], "expected 1 or more"),
            (["-p", "ours", "--budget", "8", "inf"], "A budget is inf GiB"),
            (["-p", "ours", "--budget", "-1"], "A budget is -1 GiB"),
        ],
    )
    def test_errors_are_reported(
        self, arguments: list[str], message: str, dataset: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["memory", "-d", "701", *arguments]) == 2
        assert message in capsys.readouterr().err
