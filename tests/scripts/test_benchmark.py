"""The benchmark on tiny inputs: its timings mean nothing, but its counts and ratios must be right."""

import json
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark import main
from benchmarks import epochs, plans, step
from benchmarks.convolutions import ConvolutionsAlone, record, training_flops
from benchmarks.networks import NETWORKS, Task, build, make_batch, stock_plans
from benchmarks.timing import BenchmarkError, Ratio, in_turn, totals
from benchmarks.training import TimedStep
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nnunet_conres.trainers import graphs

CPU = torch.device("cpu")
SMALL = Task((8, 16, 16), 1, 1, 2)
SMALL_ARGUMENTS = ["--patch", "8", "16", "16", "--batch", "1", "--threads", "1", "--rounds", "2", "--warmup", "1"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Use one thread, and restore the number of threads afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measure(folder: Path, *arguments: str) -> dict[str, Any]:
    file = folder / "report.json"
    main([*arguments, "-o", str(file)])
    assert list(folder.iterdir()) == [file]
    return json.loads(file.read_text(encoding="utf-8"))


def median(entry: dict[str, Any]) -> float:
    assert entry["seconds"]["median"] == pytest.approx(np.median(entry["seconds"]["rounds"]))
    return entry["seconds"]["median"]


class TestConvolutions:
    def test_flops_of_one_convolution(self) -> None:
        network = nn.Conv3d(3, 5, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        image = torch.zeros(2, 3, 4, 6, 8)
        (convolution,) = record(lambda: network(image).sum().backward())
        # 2 images, 4 x 3 x 4 output voxels, 3 input and 5 output channels, 9 kernel positions; no gradient of the image
        forward = 2 * 2 * (4 * 3 * 4) * 5 * 3 * 9
        assert training_flops([convolution]) == {"forward": forward, "backward": forward, "step": 2 * forward}
        assert (convolution.weight_gradient, convolution.input_gradient) == (True, False)

        (convolution,) = record(lambda: network(image.requires_grad_()).sum().backward())
        assert training_flops([convolution])["step"] == 3 * forward

    @pytest.mark.parametrize("inference", [False, True])
    def test_transposed_grouped_and_functional_ones_count(self, inference: bool) -> None:
        up = nn.ConvTranspose3d(4, 6, 2, 2)

        def run() -> None:
            with torch.inference_mode(inference):
                F.conv3d(up(torch.zeros(1, 4, 2, 3, 4)), torch.zeros(6, 1, 3, 3, 3), padding="same", groups=6)

        found = record(run)
        assert [convolution.forward_flops for convolution in found] == [2 * 24 * 4 * 6 * 8, 2 * 24 * 8 * 6 * 27]
        assert training_flops(found)["backward"] == 0

    def test_what_checkpointing_repeats_counts_once(self) -> None:
        network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Conv3d(2, 1, 3))
        image = torch.zeros(1, 1, 6, 6, 6)
        plain = record(lambda: network(image).sum().backward())
        again = record(lambda: checkpoint(network, image, use_reentrant=False).sum().backward())
        assert again == plain
        assert len(plain) == 2

    @pytest.mark.parametrize("name", ["conresnet", "conresnet_paper"])
    def test_flops_of_a_step_are_those_that_pytorch_counts(self, name: str) -> None:
        step = TimedStep(build(name, SMALL, CPU), CPU, "float32")
        with FlopCounterMode(display=False) as counter:
            step.as_trained()
        counted = counter.get_flop_counts()["Global"].items()
        # Muon's matrix products are not convolutions
        assert training_flops(record(step))["step"] == sum(n for what, n in counted if "convolution" in str(what))

    def test_alone_they_are_the_same(self) -> None:
        found = record(TimedStep(build("plainconvunet", SMALL, CPU), CPU, "bfloat16"))
        assert {convolution.dtype for convolution in found} == {torch.bfloat16}
        assert record(ConvolutionsAlone(found, CPU)) == found


def test_small_patches_have_graphs_where_trainers_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, Any]] = []
    marks: list[int] = []

    def note(model: Any, **given: Any) -> Any:
        options.append(given)
        return model

    monkeypatch.setattr(torch, "compile", note)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    monkeypatch.setattr(graphs, "_DEVICES", {"cpu"})
    for name in ("residual_maps", "residual_maps_contiguous"):
        TimedStep(build(name, SMALL, CPU), CPU, "float32", compiled=True).as_trained()
    plain = {"fullgraph": True}
    assert options == [{**plain, "mode": "reduce-overhead", "dynamic": False}, plain, plain, plain]
    assert len(marks) == 1


class TestNetworks:
    def test_stock_plans_are_those_of_the_hippocampus(self) -> None:
        arguments = stock_plans(Task((40, 56, 40), 2, 1, 2))["configurations"]["3d_fullres"]["architecture"]
        arguments = arguments["arch_kwargs"]
        assert arguments["features_per_stage"] == [32, 64, 128, 256]
        assert arguments["strides"] == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
        assert arguments["kernel_sizes"] == [[3, 3, 3]] * 4
        assert (arguments["n_conv_per_stage"], arguments["n_conv_per_stage_decoder"]) == ([2] * 4, [2] * 3)

    @pytest.mark.parametrize(("patch", "instead"), [((40, 50, 40), "40 x 56 x 40"), ((8, 8, 8), "16 x 16 x 16")])
    def test_unfit_patches_are_refused(self, patch: tuple[int, ...], instead: str) -> None:
        with pytest.raises(BenchmarkError, match=instead):
            stock_plans(Task(patch, 2, 1, 2))

    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize("regions", [None, 3])
    def test_losses_take_outputs_and_targets(self, name: str, regions: int | None) -> None:
        task = Task((8, 16, 16), 1, 2, 2, regions)
        model = build(name, task, CPU)
        images, targets = make_batch(model, CPU)
        assert images.shape == (1, 2, 8, 16, 16)
        assert targets[0].shape == (1, regions or 1, 8, 16, 16)
        with torch.no_grad():
            assert torch.isfinite(model.loss(model.network(images), targets))


class TestTiming:
    def test_contenders_take_turns(self) -> None:
        calls: list[str] = []

        def contender(name: str) -> Any:
            return lambda: calls.append(name) or {"one": 1.0, "other": 2.0}

        times = in_turn({"a": contender("a"), "b": contender("b")}, rounds=2, warmup=1)
        assert calls == ["a", "b"] * 3
        assert {name: totals(phases) for name, phases in times.items()} == {"a": [3.0, 3.0], "b": [3.0, 3.0]}

    def test_ratios(self) -> None:
        ratio = Ratio.of_medians("", [1, 2, 9], [1, 4, 4], at_most=0.6, flops=(10, 20))
        assert (ratio.measured, ratio.per_flop, ratio.met) == (0.5, 1.0, True)
        ratio = Ratio.median_of_rounds("", [1, 2, 9], [1, 4, 4], at_most=0.6)
        assert (ratio.measured, ratio.met) == (1.0, False)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a report of training steps."""
    contenders = ["plainconvunet", "conresnet", "conresnet_convolutions"]
    arguments = ["--contenders", *contenders, "--precision", "float32", "bfloat16", "--matmul_edge", "64"]
    return measure(tmp_path_factory.mktemp("step"), "step", *arguments, "--hotspots", "2", *SMALL_ARGUMENTS)


@pytest.mark.slow
class TestStep:
    def test_machine_and_conditions(self, report: dict[str, Any]) -> None:
        assert report["machine"]["threads"] == 1
        assert {"torch", "nnunetv2", "nnunet-conres"} <= report["machine"]["versions"].keys()
        assert report["task"] == {"patch": [8, 16, 16], "batch": 1, "channels": 1, "classes": 2, "regions": None}
        assert report["matmul_flops_per_second"].keys() == {"float32", "bfloat16"}

    def test_phases_make_up_the_step(self, report: dict[str, Any]) -> None:
        entry = report["contenders"]["conresnet float32"]
        phases = [phase["rounds"] for phase in entry["phases"].values()]
        assert [*entry["phases"]] == ["forward", "loss forward", "loss backward", "backward", "optimiser"]
        np.testing.assert_allclose(np.sum(phases, 0), entry["seconds"]["rounds"])
        np.testing.assert_allclose(entry["loss"]["rounds"], np.add(phases[1], phases[2]))
        assert median(entry) / entry["flops"]["step"] == pytest.approx(entry["seconds_per_flop"])
        assert [*report["contenders"]["conresnet_convolutions float32"]["phases"]] == ["forward", "backward"]

    def test_ratios_are_those_of_the_medians(self, report: dict[str, Any]) -> None:
        found = report["contenders"]
        limits = {
            ("conresnet float32", "plainconvunet float32"): 1.6,
            ("conresnet bfloat16", "conresnet float32"): 0.55,
            ("conresnet float32", "conresnet_convolutions float32"): None,
        }
        for (one, other), limit in limits.items():
            ratio = report["ratios"][f"{one} / {other}"]
            assert ratio["measured"] == pytest.approx(median(found[one]) / median(found[other]))
            assert ratio["at_most"] == limit
            assert ratio["met"] == (None if limit is None else ratio["measured"] <= limit)
        ratio = report["ratios"]["loss / step, conresnet float32"]
        entry = found["conresnet float32"]
        assert ratio["measured"] == pytest.approx(entry["loss"]["median"] / median(entry))
        assert ratio["at_most"] == 0.05

    def test_ratios_per_flop(self, report: dict[str, Any]) -> None:
        one, other = (report["contenders"][f"{name} float32"] for name in ("conresnet", "plainconvunet"))
        ratio = report["ratios"]["conresnet float32 / plainconvunet float32"]
        assert ratio["per_flop"] == pytest.approx(one["seconds_per_flop"] / other["seconds_per_flop"])
        alone = report["contenders"]["conresnet_convolutions float32"]
        assert alone["flops"] == one["flops"]

    def test_table_of_a_gpu(self, report: dict[str, Any]) -> None:
        report = deepcopy(report)
        entry = report["contenders"]["conresnet float32"]
        entry |= {"seconds_per_flop": 5.0e-15, "peak_bytes": 3 * 2**20}
        lines = step.as_table(report).splitlines()
        assert any(line.endswith("| conv TFLOP/s | peak MiB |") for line in lines)
        assert any(line.startswith("| conresnet float32 |") and line.endswith("| 200 | 3 |") for line in lines)

    def test_hotspots(self, report: dict[str, Any]) -> None:
        found = report["contenders"]["conresnet float32"]["hotspots"]
        assert len(found["operations"]) == 2
        assert 0 < found["convolutions"] < found["seconds"]
        slowest = report["contenders"]["conresnet_convolutions float32"]["slowest"]
        assert slowest[0]["count"] * slowest[0]["seconds"] >= slowest[1]["count"] * slowest[1]["seconds"]


def test_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = measure(tmp_path, "predict", "--case", "8", "16", "20", *SMALL_ARGUMENTS)
    one, other = report["contenders"]["conresnet"], report["contenders"]["plainconvunet"]
    ratio = report["ratios"]["conresnet / plainconvunet"]
    assert ratio["measured"] == pytest.approx(median(one) / median(other))
    assert ratio["at_most"] == 1.5
    assert one["patches"] == other["patches"] == 2
    network = build("conresnet", SMALL, CPU, deep_supervision=False).network
    assert one["flops"] == 2 * training_flops(record(lambda: network(torch.zeros(1, 1, 8, 16, 16))))["forward"]
    assert "| conresnet / plainconvunet |" in capsys.readouterr().out


def test_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--contenders",
        "plainconvunet",
        "vnet",
        "--checkpointing",
        "none",
        "full",
        "--patch",
        "16",
        "16",
        "16",
    ]
    figure = tmp_path / "figures" / "memory.png"
    figure.parent.mkdir()
    main(["memory", *arguments, "--policies", "cpu_bfloat16", "-o", str(tmp_path / "m.json"), "--figure", str(figure)])
    found = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))["contenders"]
    assert set(found) == {"plainconvunet cpu_bfloat16", "vnet cpu_bfloat16", "vnet cpu_bfloat16 full"}
    plain, full = found["vnet cpu_bfloat16"], found["vnet cpu_bfloat16 full"]
    assert plain["predicted"] == pytest.approx(plain["counted"], rel=1e-3)
    assert full["kept"] < plain["kept"]
    stock = found["plainconvunet cpu_bfloat16"]
    assert stock["predicted"] == pytest.approx(stock["counted"], rel=1e-3)
    assert figure.stat().st_size > 0
    assert "Largest error of the prediction" in capsys.readouterr().out


def test_bspline(tmp_path: Path) -> None:
    report = measure(tmp_path, "bspline", "--edge", "16", "--rounds", "3")
    found = report["contenders"]
    rounds = [
        found[name]["seconds"]["rounds"] for name in ("B-spline whole, linear", "batchgeneratorsv2 affine, linear")
    ]
    ratio = report["ratios"]["whole / rotation and scaling, labels linear"]
    assert ratio["measured"] == pytest.approx(np.median(np.divide(*rounds)))
    assert ratio["at_most"] == 1.25
    assert report["machine"]["threads"] == 1


class TestPlans:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small = replace(plans.DATA_SETS["brats"], shape=(20, 24, 40), cases=10)
        monkeypatch.setitem(plans.DATA_SETS, "brats", small)
        monkeypatch.setenv("nnUNet_raw", "as it was")

    def test_of_a_network(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options = ["--data", "brats", "--networks", "unet3d", "--targets", "2", "0.25", "--threads", "1"]
        report = measure(tmp_path, "plans", *options)
        stock, ours, _, refused = report["data"]["brats"]["plans"]
        assert (stock["network"], ours["network"]) == ("nnU-Net", "3D U-Net")
        assert stock["patch"] == ours["patch"] == [20, 24, 40]
        assert ours["checkpointing"] == "none"
        assert ours["memory"] <= 2 * 2**30
        assert refused["needs"] > refused["target"]
        printed = capsys.readouterr().out
        assert "| 2 | 3D U-Net | 20 x 24 x 40 | 2 | none |" in printed
        assert f"| 0.25 | 3D U-Net | does not fit, needs {refused['needs']:g} |" in printed
        assert os.environ["nnUNet_raw"] == "as it was"


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["step", "--patch", "40", "50", "40"], "Use 40 x 56 x 40"),
            (["step", "--precision", "mixed"], "for CUDA only"),
            (["step", "-o", "missing/report.json"], "The folder of missing/report.json does not exist"),
            (["predict", "--step_size", "2"], "--step_size must be above 0"),
            (["bspline", "--edge", "4"], "--edge must be at least 8"),
            (["plans", "--targets", "8", "0"], "--targets must be above 0"),
        ],
    )
    def test_are_told_in_a_line(self, arguments: list[str], message: str) -> None:
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            main(arguments)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_cuda(self) -> None:
        with pytest.raises(SystemExit, match="no CUDA device"):
            main(["step", "--device", "cuda"])

    def test_unknown_contender(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["step", "--contenders", "transformer"])
        assert "invalid choice: 'transformer'" in capsys.readouterr().err


@pytest.mark.gpu
class TestOnAGpu:
    def test_step(self, tmp_path: Path) -> None:
        arguments = ["--device", "cuda", "--contenders", "plainconvunet", "conresnet", "conresnet_convolutions"]
        report = measure(tmp_path, "step", *arguments, "--matmul_edge", "512", *SMALL_ARGUMENTS)
        assert report["contenders"]["conresnet mixed"]["share_of_matmul_rate"] > 0

    def test_small_patches(self, tmp_path: Path) -> None:
        names = ["plainconvunet", "residual_maps", "residual_maps_contiguous"]
        report = measure(tmp_path, "step", "--device", "cuda", "--compile", "--contenders", *names, *SMALL_ARGUMENTS)
        ratio = report["ratios"]["residual_maps mixed compiled / residual_maps_contiguous mixed compiled"]
        assert ratio["at_most"] == 0.667

    def test_memory(self, tmp_path: Path) -> None:
        report = measure(tmp_path, "memory", "--device", "cuda", "--policies", "cuda_float16", *SMALL_ARGUMENTS[:6])
        found = report["contenders"]
        assert all(entry["measured"] > entry["between_steps"] > 0 for entry in found.values())


class TestData:
    def test_divides_what_it_says(self, tmp_path: Path) -> None:
        sizes = ["--patch", "16", "16", "16", "--shape", "24", "28", "26", "--channels", "2", "--cases", "2"]
        report = measure(tmp_path, "data", *sizes, "--rounds", "3", "--warmup", "0")
        seconds = {name: phases["processor"] for name, phases in report["seconds"].items()}
        for name, what in (("loading alone", "loading alone"), ("loading and augmentation",) * 2):
            expected = seconds[f"draw first, {what}"] / seconds[f"nnU-Net, {what}"]
            assert report["ratios"][name]["measured"] == pytest.approx(expected)
        # two float32 channels, and three Boolean regions at five scales, each with an eighth of the previous voxels
        finished = 16**3 * (2 * 4 + 3 * (1 + 1 / 8 + 1 / 64 + 1 / 512 + 1 / 4096)) / 1e6
        assert report["megabytes_sent"]["nnU-Net, loading and augmentation"] == pytest.approx(finished)
        assert report["machine"]["device"] == "cpu"
        assert report["machine"]["cores"] == os.cpu_count()

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [(["--trainers", "nnUNetTrainer"], "needs --workers"), (["--epochs", "1", "2", "1"], "2 or more")],
    )
    def test_epochs_that_could_not_be_timed(self, arguments: list[str], reason: str) -> None:
        with pytest.raises(SystemExit, match=reason):
            main(["data", *arguments])

    @pytest.mark.slow
    def test_trains_whole_epochs(self, tmp_path: Path) -> None:
        sizes = ["--patch", "16", "16", "16", "--shape", "24", "28", "26", "--channels", "1", "--cases", "4"]
        trained = ["--workers", "1", "--trainers", "nnUNetTrainer", "nnUNetTrainerMuon", "--epochs", "2", "2", "1"]
        report = measure(tmp_path, "data", *sizes, "--rounds", "2", "--warmup", "0", *trained)
        assert [(entry["trainer"], len(entry["epochs"])) for entry in report["epochs"]] == [
            ("nnUNetTrainer", 1),
            ("nnUNetTrainerMuon", 1),
        ]
        assert all(entry["epochs"][0] > 0 and entry["busy"] is None for entry in report["epochs"])

    @pytest.mark.slow
    def test_a_failed_training_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(BenchmarkError, match="training of nnUNetTrainer with 1 workers failed"):
            epochs.measure(tmp_path, ["nnUNetTrainer"], [1], CPU, (2, 1, 1))


def test_epochs_are_compared_with_stocks_with_most_workers() -> None:
    def entry(trainer: str, workers: int, seconds: float) -> dict[str, Any]:
        return {"trainer": trainer, "workers": workers, "epochs": [seconds, seconds]}

    found = [entry("nnUNetTrainer", 4, 90.0), entry("nnUNetTrainer", 12, 40.0), entry("nnUNetTrainerMuon", 4, 10.0)]
    ratios = epochs.ratios(found)
    assert [(ratio.measured, ratio.at_most) for ratio in ratios] == [(90 / 40, None), (10 / 40, 0.35)]
    assert epochs.ratios(found[2:]) == []


def test_utilisation_is_that_between_two_times() -> None:
    utilisation = epochs.Utilisation(CPU)
    utilisation._found = [(1.0, 0.1), (2.0, 0.5), (3.0, 0.7), (4.0, 0.0)]
    assert utilisation.share(2, 3) == pytest.approx(0.6)
    assert utilisation.share(5, 6) is None
