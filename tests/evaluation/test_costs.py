"""Costs computed by hand: parameters, operations, seconds."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_conres.evaluation.costs import Cost, ensemble_cost, model_cost, times_compare, unlike_conditions
from nnunet_conres.evaluation.predictions import Contender, NamedModel, search_cross_validation
from nnunet_conres.optimizers import Muon

NAME = "Dataset801_Models"


def find(trainer: str = "nnUNetTrainer", folds: tuple[int, ...] = (0,)) -> Contender:
    (model,) = search_cross_validation(
        NAME, [NamedModel(trainer, "nnUNetPlans", "3d_fullres")], folds, device="cpu"
    ).models
    return model


class TestNetwork:
    def test_parameters_and_operations(self, lab: Callable[..., Any]) -> None:
        lab().add()
        cost, _, notes = model_cost(find())
        assert not notes
        # stage 1: conv 1 to 4, norm; stage 2: conv 4 to 8, norm; up 8 to 4, conv 8 to 4, norm; head 4 to 3
        convs = {"enc1": 1 * 4 * 27 + 4, "enc2": 4 * 8 * 27 + 8, "up": 8 * 4 * 8 + 4, "dec": 8 * 4 * 27 + 4}
        assert cost.parameters == sum(convs.values()) + 2 * (4 + 8 + 4) + (4 * 3 + 3)
        full, half = 8 * 12 * 8, 4 * 6 * 4
        by_hand = 2 * (full * 1 * 4 * 27 + half * 4 * 8 * 27 + half * 8 * 4 * 8 + full * 8 * 4 * 27 + full * 4 * 3)
        assert cost.conv_gflops_per_patch == pytest.approx(by_hand / 1e9)
        assert cost.patch_size == (8, 12, 8)
        assert cost.batch_size == 2

    def test_our_own_trainer_is_found(self, lab: Callable[..., Any]) -> None:
        lab().add("nnUNetTrainerVNet")
        cost, _, notes = model_cost(find("nnUNetTrainerVNet"))
        assert not notes
        assert cost.parameters is not None
        assert cost.parameters > 1000

    def test_a_trainer_that_is_not_here(self, lab: Callable[..., Any]) -> None:
        lab().add("nnUNetTrainerOfSomebodyElse")
        cost, _, (note,) = model_cost(find("nnUNetTrainerOfSomebodyElse"))
        assert cost.parameters is None
        assert cost.epochs == 3
        assert "nnUNetTrainerOfSomebodyElse" in note

    def test_plans_that_run_code(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        path = lab().add() / "plans.json"
        plans = json.loads(path.read_text())
        arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        arguments |= {"nonlin": "os.system", "nonlin_kwargs": {"command": f"touch {tmp_path / 'made'}"}}
        path.write_text(json.dumps(plans))
        cost, _, (note,) = model_cost(find())
        assert cost.parameters is None
        assert "names os.system as part of a network" in note
        assert not (tmp_path / "made").exists()


class TestLogs:
    def test_seconds(self, lab: Callable[..., Any]) -> None:
        lab().add(folds=(0, 1))
        cost, curves, _ = model_cost(find(folds=(0, 1)))
        assert cost.epochs == 3
        assert cost.epoch_seconds == 11  # 10, 11 and 12 s in each fold
        assert cost.training_seconds == 33
        assert cost.prediction_seconds_per_case == 2  # from the first case; the last also waits for exports and scores
        assert curves["0"]["epochs"] == [0, 1, 2]
        assert curves["1"]["series"]["train_losses"] == [0, -0.1, -0.2]
        assert curves["0"]["series"]["dice core"] == [0.25] * 3
        assert "lrs" not in curves["0"]["series"]

    def test_dice_is_named_by_label_not_by_place(self, lab: Callable[..., Any]) -> None:
        made = lab()
        path = made.add() / "dataset.json"
        content = made.dataset_json | {"labels": {"background": 0, "core": 2, "oedema": 1}}
        path.write_text(json.dumps(content))
        series = model_cost(find())[1]["0"]["series"]
        assert series["dice oedema"] == [0.5] * 3
        assert series["dice core"] == [0.25] * 3

    def test_dice_of_regions_is_named_by_place(self, lab: Callable[..., Any]) -> None:
        made = lab("regions")
        path = made.add() / "dataset.json"
        content = made.dataset_json | {"labels": {"background": 0, "core": 2, "whole": [1, 2]}}
        path.write_text(json.dumps(content))
        assert model_cost(find())[1]["0"]["series"]["dice core"] == [0.5] * 3

    def test_damaged_checkpoint(self, lab: Callable[..., Any]) -> None:
        folder = lab().add()
        (folder / "fold_0" / "checkpoint_final.pth").write_bytes(b"no checkpoint")
        cost, curves, (note,) = model_cost(find())
        assert cost.epochs is None
        assert not curves
        assert "fold 0" in note
        assert "checkpoint_final.pth cannot be read as a checkpoint" in note

    def test_a_checkpoint_that_runs_code(self, lab: Callable[..., Any], tmp_path: Path) -> None:
        folder = lab().add()

        class Touch:
            def __reduce__(self) -> Any:
                return os.mknod, (str(tmp_path / "made"),)

        path = folder / "fold_0" / "checkpoint_final.pth"
        torch.save(torch.load(path, weights_only=False) | {"more": Touch()}, path)
        cost, curves, (note,) = model_cost(find())
        assert not (tmp_path / "made").exists()
        assert cost.epochs is None
        assert not curves
        assert "checkpoint_final.pth contains posix.mknod" in note

    def test_peak_memory(self, lab: Callable[..., Any]) -> None:
        folder = lab().add()
        log = next((folder / "fold_0").glob("training_log_*.txt"))
        lines = [
            f"2026-01-01 10:00:0{number}.000000: Peak GPU memory: {peak} GiB" for number, peak in ((1, 7.5), (2, 8))
        ]
        log.write_text("\n".join(lines))
        assert model_cost(find())[0].peak_memory_gib == 8

    @pytest.mark.parametrize(
        ("device", "stated", "expected"),
        [
            ("cpu", None, ("cpu", "float32")),
            ("cpu", "bfloat16 mixed", ("cpu", "bfloat16 mixed")),
            ("cuda:0", None, ("cuda", "float16 mixed")),
        ],
    )
    def test_device_and_precision(
        self, lab: Callable[..., Any], device: str, stated: str | None, expected: tuple[str, str]
    ) -> None:
        lab().add(device=device, precision=stated)
        cost = model_cost(find())[0]
        assert (cost.device, cost.precision) == expected

    @pytest.mark.parametrize(
        ("optimizer", "expected"),
        [
            (torch.optim.SGD([torch.zeros(1)], 0.01, momentum=0.99), "SGD, learning rate 0.01"),
            (Muon([torch.zeros(2)], 0.03), "Muon, learning rate 0.03"),
            (torch.optim.Adam([torch.zeros(1)], 1e-4), "Adam, learning rate 0.0001"),
        ],
    )
    def test_optimiser(self, lab: Callable[..., Any], optimizer: torch.optim.Optimizer, expected: str) -> None:
        """nnU-Net writes the text of the optimiser, here after a scheduler was attached."""
        folder = lab().add()
        PolyLRScheduler(optimizer, optimizer.param_groups[0]["lr"], 10)
        optimizer.param_groups[0]["lr"] = 0.5
        (folder / "fold_0" / "debug.json").write_text(json.dumps({"device": "cpu", "optimizer": str(optimizer)}))
        assert model_cost(find())[0].optimizer == expected

    def test_name_of_the_gpu(self, lab: Callable[..., Any]) -> None:
        folder = lab().add()
        (folder / "fold_0" / "debug.json").write_text(json.dumps({"device": "cuda:0", "gpu_name": "GPU X"}))
        assert model_cost(find())[0].device == "cuda (GPU X)"

    def test_folds_on_different_devices(self, lab: Callable[..., Any]) -> None:
        folder = lab().add(folds=(0, 1))
        (folder / "fold_1" / "debug.json").write_text(json.dumps({"device": "cuda:0"}))
        notes = model_cost(find(folds=(0, 1)))[2]
        assert any("different devices: cpu, cuda" in note for note in notes)
        assert any("different precisions" in note for note in notes)

    def test_nothing_known(self) -> None:
        assert model_cost(Contender("m0", "A", {})) == (Cost(), {}, [])


def test_conditions_that_differ() -> None:
    costs = {
        "A": Cost(precision="float32", device="cpu", epochs=5),
        "B": Cost(precision="bfloat16 mixed", device="cpu"),
    }
    (warning,) = unlike_conditions(costs)
    assert "precision" in warning
    assert "A: float32; B: bfloat16 mixed" in warning


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({}, True),
        ({"device": "cuda (A)"}, False),
        ({"precision": "bfloat16 mixed"}, False),
        ({"cpu_share": 0.85}, True),
        ({"cpu_share": 0.5}, False),  # other processes took half of the cores' time
        ({"device": None, "precision": None, "cpu_share": None}, True),  # an ensemble
    ],
)
def test_times_compare_under_the_same_conditions(other: dict[str, Any], expected: bool) -> None:
    cost = Cost(device="cpu", precision="float32", cpu_share=0.9)
    costs = {"A": cost, "B": replace(cost, **other)}
    assert times_compare([asdict(of_model) for of_model in costs.values()]) is expected
    warned = " ".join(unlike_conditions(costs))
    assert ("Share of the CPU cores used: A: 0.90; B: 0.50" in warned) is ("cpu_share" in other and not expected)


def test_times_on_a_busy_machine_do_not_compare() -> None:
    assert not times_compare([{"cpu_share": 0.17}, {"cpu_share": 0.12}])


def test_optimisers_that_differ() -> None:
    costs = {"A": Cost(optimizer="SGD, learning rate 0.01"), "B": Cost(optimizer="Muon, learning rate 0.03")}
    (warning,) = unlike_conditions(costs)
    assert "differ in their optimiser" in warning
    assert "A: SGD, learning rate 0.01; B: Muon, learning rate 0.03" in warning


def test_an_ensemble_costs_its_members() -> None:
    members = [
        Cost(parameters=5, prediction_seconds_per_case=1.5, training_seconds=10),
        Cost(parameters=7, prediction_seconds_per_case=2.0),
    ]
    cost = ensemble_cost(members)
    assert (cost.parameters, cost.prediction_seconds_per_case, cost.training_seconds) == (12, 3.5, None)
