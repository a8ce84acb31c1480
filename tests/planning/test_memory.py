"""The memory model against a count of live storages, and that count against steps that are really taken."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from nnunet_conres import cli
from nnunet_conres.planning import architectures
from nnunet_conres.planning.ledger import FLOAT32, HALF, Ledger, Parameter
from nnunet_conres.planning.memory import estimate_memory
from nnunet_conres.planning.memory_report import GIB, largest_patch
from nnunet_conres.planning.tracker import CudaAutocast, LiveStorages, measure_training_step
from nnunet_conres.planning.training_step import TrainingStep

ISOTROPIC = ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]], [[3, 3, 3]] * 4, [16, 32, 64, 128])
ANISOTROPIC = ([[1, 1, 1], [1, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3]], [16, 32, 64])
TWO_STAGES = ([[1, 1, 1], [2, 2, 2]], [[3, 3, 3]] * 2, [16, 32])
SIX_STAGES = ([[1, 1, 1], *[[2, 2, 2]] * 5], [[3, 3, 3]] * 6, [16, 32, 64, 128, 160, 160])


def conresnet_with(**arguments: Any) -> Callable[[ConfigurationManager], dict[str, Any]]:
    """ConResNet of a configuration with other arguments than the trainer's own."""

    def architecture(plans: ConfigurationManager) -> dict[str, Any]:
        entry = architectures.conresnet_architecture(plans)
        entry["arch_kwargs"] |= arguments
        return entry

    return architecture


FAMILIES: dict[str, Callable[[ConfigurationManager], dict[str, Any]]] = {
    "conresnet": architectures.conresnet_architecture,
    "shared_encoder": lambda plans: architectures.conresnet_architecture(plans, "shared_encoder"),
    "stream": conresnet_with(residual_stream=True),
    "narrow_identity": conresnet_with(residual_stream=True, residual_features_per_stage=8, attention="identity"),
    "narrow_none": conresnet_with(residual_stream=True, residual_features_per_stage=8, attention="none"),
    "conresnet_paper": architectures.conresnet_paper_architecture,
    "vnet": architectures.vnet_architecture,
    "vnet_paper": architectures.vnet_paper_architecture,
    "unet3d": architectures.unet3d_architecture,
    "unet3d_paper": architectures.unet3d_paper_architecture,
}


def stock(topology: tuple[Any, ...]) -> ConfigurationManager:
    strides, kernels, features = topology
    n_stages = len(strides)
    arguments = {
        "n_stages": n_stages,
        "features_per_stage": features,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": kernels,
        "strides": strides,
        "n_conv_per_stage": [2] * n_stages,
        "n_conv_per_stage_decoder": [2] * (n_stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    entry = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    return ConfigurationManager({"architecture": entry})


def step(
    family: str,
    topology: tuple[Any, ...] = ISOTROPIC,
    checkpointing: str = "none",
    patch_size: tuple[int, int, int] = (32, 48, 48),
    **changes: Any,
) -> TrainingStep:
    architecture = FAMILIES[family](stock(topology))
    architecture["arch_kwargs"]["checkpointing"] = checkpointing
    given: dict[str, Any] = {"batch_size": 2, "input_channels": 1, "output_channels": 3, "device": "cpu"} | changes
    return TrainingStep(architecture, patch_size, **given)


PLANS = [
    step("stream"),
    step("stream", device="cuda"),
    step("stream", mixed_precision=False),
    step("stream", ANISOTROPIC, input_channels=4, has_regions=True),
    step("stream", SIX_STAGES, "full", (64, 64, 64), device="cuda"),
    step("stream", checkpointing="decoder"),
    step("shared_encoder", ANISOTROPIC, device="cuda"),
    step("shared_encoder", checkpointing="full"),
    step("stream", ANISOTROPIC, checkpointing="decoder", device="cuda"),
    step("conresnet"),
    step("conresnet", optimizer="muon"),
    step("conresnet", SIX_STAGES, patch_size=(64, 64, 64), device="cuda", optimizer="muon"),
    # so small patches that the optimiser takes most
    step("conresnet", patch_size=(16, 16, 16), batch_size=1, optimizer="muon"),
    step("conresnet", patch_size=(16, 16, 16), batch_size=1, device="cuda", optimizer="muon"),
    step("stream", ANISOTROPIC, patch_size=(8, 16, 16), batch_size=1, device="cuda", optimizer="muon"),
    step("stream", ANISOTROPIC, optimizer="muon"),
    step("conresnet", ANISOTROPIC, checkpointing="full", input_channels=4, has_regions=True, device="cuda"),
    step("narrow_identity"),
    step("narrow_identity", ANISOTROPIC, checkpointing="decoder", device="cuda"),
    step("narrow_none", mixed_precision=False),
    step("narrow_none", device="cuda"),
    step("conresnet_paper", input_channels=4, has_regions=True, optimizer="adam"),
    step("conresnet_paper", checkpointing="decoder", device="cuda"),
    step("conresnet_paper", checkpointing="full", input_channels=4, has_regions=True, device="cuda", batch_size=1),
    step("vnet", TWO_STAGES),
    step("vnet", ANISOTROPIC, input_channels=4, device="cuda"),
    step("vnet", SIX_STAGES, "full", (64, 64, 64)),
    step("vnet_paper", checkpointing="decoder"),
    step("unet3d", mixed_precision=False),
    step("unet3d", ANISOTROPIC, "decoder", input_channels=4, has_regions=True),
    step("unet3d", TWO_STAGES, "full", device="cuda", batch_size=1),
    step("unet3d_paper", device="cuda"),
    step("unet3d_paper", checkpointing="full"),
    # many labels, whose logits and losses weigh as much as the network; unannotated voxels
    step("stream", TWO_STAGES, output_channels=14),
    step("vnet", TWO_STAGES, output_channels=14, device="cuda"),
    step("unet3d", TWO_STAGES, output_channels=6, has_regions=True, has_ignore_label=True),
    step("stream", TWO_STAGES, output_channels=6, has_regions=True, has_ignore_label=True, device="cuda"),
    # sizes that the strides don't divide
    step("stream", patch_size=(31, 45, 50)),
    step("unet3d", patch_size=(31, 45, 50)),
]


def name(value: TrainingStep) -> str:
    arguments = value.arguments
    network = value.architecture["network_class_name"].rpartition(".")[2]
    return f"{network}-{arguments['n_stages']}-{arguments['checkpointing']}-{value.device}-{value.mixed_precision}"


class TestModel:
    @pytest.mark.parametrize("plans", PLANS, ids=name)
    def test_within_five_per_cent_of_what_is_counted(self, plans: TrainingStep) -> None:
        counted, predicted = measure_training_step(plans), estimate_memory(plans)
        assert predicted.peak == pytest.approx(counted.peak, rel=0.05)
        assert predicted.parameters + predicted.optimizer + predicted.batch == pytest.approx(counted.before, rel=1e-3)

    @pytest.mark.parametrize("checkpointing", ["none", "full"])
    @pytest.mark.parametrize("mixed", [False, True])
    def test_parts_add_up_to_what_is_kept(self, checkpointing: str, mixed: bool) -> None:
        plans = step("conresnet", checkpointing=checkpointing, mixed_precision=mixed)
        estimate, counted = estimate_memory(plans), measure_training_step(plans)
        assert list(estimate.activations) == [f"encoder stage {i}" for i in range(4)] + [
            f"decoder level {i}" for i in (2, 1, 0)
        ]
        assert sum(estimate.activations.values()) + estimate.loss == pytest.approx(counted.kept, rel=0.01)
        assert estimate.total == estimate.peak + estimate.workspace > estimate.peak

    def test_is_fast(self) -> None:
        plans = step("conresnet", SIX_STAGES, "full", (160, 160, 160))
        started = time.process_time()
        for _ in range(10):
            estimate_memory(plans)
        assert time.process_time() - started < 1  # the planner asks a hundred times

    def test_grows_with_patch_and_batch(self) -> None:
        sizes = [
            estimate_memory(step("conresnet", patch_size=patch, batch_size=batch)).peak
            for patch, batch in (((32, 32, 32), 1), ((32, 32, 32), 2), ((32, 64, 64), 2))
        ]
        assert sizes[0] < sizes[1] < sizes[2]

    def test_a_network_of_another_package(self) -> None:
        plans = TrainingStep(stock(ISOTROPIC).configuration["architecture"], (32, 32, 32), 2, 1, 3)
        with pytest.raises(ValueError, match="PlainConvUNet cannot be estimated"):
            estimate_memory(plans)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"device": "tpu"}, "device is 'tpu'"),
            ({"optimizer": "lion"}, "optimiser is 'lion'"),
            ({"patch_size": (32, 32)}, "expected three numbers"),
            ({"batch_size": 0}, "expected 1 or more"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(step("vnet"), **change)

    @pytest.mark.parametrize(
        ("checkpointing", "device", "limit"),
        [("none", "cpu", 3.4), ("none", "cuda", 5.5), ("full", "cpu", 2.2), ("full", "cuda", 3.2)],
    )
    def test_paper_topology_at_the_papers_patch(self, checkpointing: str, device: str, limit: float) -> None:
        plans = step(
            "conresnet_paper",
            checkpointing=checkpointing,
            patch_size=(80, 160, 160),
            batch_size=1,
            input_channels=4,
            has_regions=True,
            device=device,
        )
        assert estimate_memory(plans).peak < limit * GIB
        assert measure_training_step(plans).peak < limit * GIB


class TestTracker:
    @pytest.mark.parametrize("family", ["conresnet", "conresnet_paper", "vnet", "unet3d"])
    @pytest.mark.parametrize("checkpointing", ["none", "full"])
    def test_without_data_as_with_them(self, family: str, checkpointing: str) -> None:
        plans = step(family, TWO_STAGES, checkpointing, (16, 16, 16))
        fake, real = measure_training_step(plans), measure_training_step(plans, fake=False)
        assert fake.before == real.before
        assert fake.peak == pytest.approx(real.peak, rel=0.01)
        assert fake.kept == pytest.approx(real.kept, rel=0.01)

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
        assert (live.current, live.peak) == (0, 6800)

    def test_cuda_autocast_on_a_cpu(self) -> None:
        # without data, for some of these have no float16 on a CPU
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
    @pytest.mark.parametrize("family", list(FAMILIES))
    def test_close_to_what_a_gpu_takes(self, family: str) -> None:
        from nnunet_conres.planning.training_step import RunningStep

        plans = step(family, patch_size=(64, 96, 96), device="cuda")
        running = RunningStep(plans, torch.device("cuda"))
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            running.run(lambda: torch.autocast("cuda", torch.float16))
        # what kernels ask for themselves is not seen; on an H200 it was 12 and 14 % of the whole with the U-Nets
        unseen = 0.15 if family.startswith("unet3d") else 0.1
        assert estimate_memory(plans).peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=unseen)


class TestLedger:
    def test_kept_and_freed(self) -> None:
        ledger = Ledger(mixed=False, cuda=False)
        weight = Parameter(8)
        x = ledger.tensor((1, 2, 4, 4, 4), FLOAT32)
        assert ledger.current == 512
        y = ledger.convolution(x, weight, None, (1, 4, 4, 4, 4))
        loss = ledger.output((1,), FLOAT32, [(y.node, y.nbytes)])
        del x, y
        assert ledger.current == 512 + 4  # the convolution keeps its input
        ledger.backward(loss)
        del loss
        assert ledger.current == 8 * 4  # the gradient of the weight
        # loss and its gradient; input, gradients of output and weight
        assert ledger.peak == max(512 + 1024 + 4, 512 + 4 + 4 + 1024, 512 + 4 + 1024 + 32)

    def test_checkpointed_region_keeps_its_input(self) -> None:
        ledger = Ledger(mixed=True, cuda=True)
        weights = [Parameter(4), Parameter(4)]
        shape = (1, 2, 8, 8, 8)
        x = ledger.convolution(ledger.tensor(shape, HALF), Parameter(4), None, shape)

        def region(x: Any) -> Any:
            for weight in weights:
                x = ledger.nonlinearity(ledger.convolution(x, weight, None, shape))
            return x

        kept = {}
        for enabled in (False, True):
            before = ledger.current
            (y,) = ledger.checkpoint(enabled, region, x)
            kept[enabled] = ledger.current - before
            del y
            ledger._nodes = ledger._nodes[:2]
            ledger.end_of_autocast()
        assert kept[True] < kept[False]


def test_largest_patch_fits_and_the_next_does_not() -> None:
    plans = step("conresnet", patch_size=(32, 64, 64), device="cuda")
    patch = largest_patch(plans, 4 * GIB)
    assert patch is not None
    assert all(extent % 8 == 0 for extent in patch)
    assert estimate_memory(dataclasses.replace(plans, patch_size=patch)).total <= 4 * GIB
    larger = [extent + 8 for extent in patch]
    assert estimate_memory(dataclasses.replace(plans, patch_size=larger)).total > 4 * GIB
    assert 1.6 < patch[1] / patch[0] < 2.5
    assert largest_patch(plans, 2**20) is None


def test_largest_patch_can_be_trained() -> None:
    # an instance norm needs more than one voxel at the bottleneck
    plans = step("conresnet", SIX_STAGES, patch_size=(128, 128, 128), device="cpu")
    for megabytes in range(40, 400, 20):
        patch = largest_patch(plans, megabytes * 2**20)
        assert patch is None or min(patch) >= 128
    assert largest_patch(plans, 4 * GIB) is not None


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
        ours["configurations"]["3d_fullres"]["architecture"] = FAMILIES["vnet"](stock(ISOTROPIC))
        (folders["preprocessed"] / "ours.json").write_text(json.dumps(ours))
        return folders["preprocessed"]

    def test_tells_the_parts_and_what_fits(self, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["memory", "-d", "701", "-tr", "nnUNetTrainerConResNet", "--budget", "4", "0.1"]) == 0
        output = capsys.readouterr().out
        assert "nnUNetTrainerConResNet: ConResNet" in output
        for part in (
            "parameters",
            "gradients",
            "optimiser (muon)",
            "encoder stage 3",
            "decoder level 0",
            "loss",
            "peak",
        ):
            assert f"  {part} " in output
        assert "  0.1 GiB  none" in output

    def test_json_of_plans_that_name_the_network(self, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["memory", "-d", "701", "-p", "ours", "--batch_size", "3", "--budget", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["batch_size"] == 3
        assert report["total"] == report["peak"] + report["workspace"]
        expected = step("vnet", patch_size=(32, 64, 64), batch_size=3, output_channels=2, device="cuda")
        assert report["peak"] == estimate_memory(expected).peak

    def test_paper_trainer_brings_patch_and_optimiser(self, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["memory", "-d", "701", "-tr", "nnUNetTrainerVNetPaper", "--budget", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["batch_size"] == 2
        arguments = ["memory", "-d", "701", "-tr", "nnUNetTrainerConResNetPaper", "--patch_size", "32", "32", "32"]
        assert cli.main([*arguments, "--budget"]) == 0
        assert "optimiser (adam)" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "PlainConvUNet cannot be estimated"),
            (["-tr", "nnUNetTrainer"], "is no trainer of this package"),
            (["-p", "other"], "There are no plans other"),
            (["-c", "3d_lowres"], "has no configuration 3d_lowres, only"),
            (["-c", "2d"], "is 2D"),
            (["-p", "ours", "--batch_size", "0"], "expected 1 or more"),
            (["-p", "ours", "--budget", "8", "inf"], "A budget is inf GiB"),
            (["-p", "ours", "--budget", "-1"], "A budget is -1 GiB"),
        ],
    )
    def test_faults_are_told(
        self, arguments: list[str], message: str, dataset: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["memory", "-d", "701", *arguments]) == 2
        assert message in capsys.readouterr().err
