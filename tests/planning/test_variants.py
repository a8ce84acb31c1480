"""Configurations with other patches: nnU-Net's planner determines each topology, and the data are shared."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.resencUNet_planner import ResEncUNetPlanner
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_conres import cli
from nnunet_conres.errors import InputError
from nnunet_conres.planning import variants
from nnunet_conres.planning.commands import PlanOptions, plan
from nnunet_conres.planning.planners import MIN_EDGE
from nnunet_conres.planning.variants import add_variants
from nnunet_conres.text import format_shape
from nnunet_conres.trainers import nnUNetTrainerResidualMaps

NAME = "Dataset701_Made"
ANISOTROPIC = {"shape": (20, 320, 300), "spacing": (6.0, 0.8, 0.8)}


@pytest.fixture
def plans_file(tmp_path: Path, make: Callable[..., None]) -> Path:
    """Return stock plans for thick slices and 8 GB."""
    make(ANISOTROPIC)
    ExperimentPlanner("Dataset701_Made").plan_experiment()
    return tmp_path / "preprocessed" / NAME / "nnUNetPlans.json"


def planned_by_nnunet(planner: type[ExperimentPlanner], gigabytes: float) -> dict[str, Any]:
    """Return 3d_fullres as nnU-Net plans it for another memory target, and so for another patch."""
    made = planner(NAME, gigabytes, plans_name=f"at_{gigabytes:g}")
    made.plan_experiment()
    path = Path(os.environ["nnUNet_preprocessed"], NAME, f"at_{gigabytes:g}.json")
    return json.loads(path.read_text())["configurations"]["3d_fullres"]


class TestTopology:
    @pytest.mark.parametrize(
        ("planner", "gigabytes"),
        [
            (ExperimentPlanner, 1.5),
            (ResEncUNetPlanner, 24),
            pytest.param(ExperimentPlanner, 24, marks=pytest.mark.slow),
            pytest.param(ResEncUNetPlanner, 1.5, marks=pytest.mark.slow),
        ],
    )
    def test_is_what_the_planner_gives_that_patch(
        self, plans_file: Path, planner: type[ExperimentPlanner], gigabytes: float
    ) -> None:
        planner(NAME, 8, plans_name="base").plan_experiment()
        expected = planned_by_nnunet(planner, gigabytes)
        added = add_variants(NAME, "base", [expected["patch_size"]])
        plans = json.loads(plans_file.with_name("base.json").read_text())
        assert plans["configurations"]["3d_fullres"]["patch_size"] != expected["patch_size"]
        assert plans["configurations"][added.variants[0].name]["architecture"] == expected["architecture"]
        assert added.variants[0].patch_size == tuple(expected["patch_size"])

    def test_rounds_up_and_says_so(self, plans_file: Path) -> None:
        added = add_variants(NAME, "nnUNetPlans", [(17, 250, 250)])
        (variant,) = added.variants
        assert variant.wanted == (17, 250, 250)
        assert all(
            extent >= wanted and extent % total == 0
            for extent, wanted, total in zip(
                variant.patch_size,
                variant.wanted,
                torch.tensor(variant.strides).prod(0).tolist(),
                strict=True,
            )
        )
        assert "17 x 250 x 250 was rounded up" in added.as_text()

    def test_keeps_the_network_of_our_plans(self, plans_file: Path) -> None:
        plan([701], PlanOptions("residual_maps", gpu_memory_target=6))
        added = add_variants(NAME, "nnUNetResidualMapsPlans", [(8, 64, 64)])
        (variant,) = added.variants
        assert f"{variant.name} 0 -tr nnUNetTrainerResidualMaps -p nnUNetResidualMapsPlans" in added.as_text()
        plans = PlansManager(str(plans_file.with_name("nnUNetResidualMapsPlans.json")))
        configuration = plans.get_configuration(variant.name)
        assert configuration.network_arch_class_name.endswith("ResidualMapUNet")
        network = nnUNetTrainerResidualMaps.build_network_architecture(plans, configuration, 1, 3, False)
        assert network(torch.zeros(1, 1, 8, 64, 64)).shape == (1, 3, 8, 64, 64)


class TestPlans:
    def test_stock_trainers_build_them_and_share_the_data(self, plans_file: Path) -> None:
        added = add_variants(NAME, "nnUNetPlans", [(16, 160, 160), (8, 80, 80)], batch_sizes=[2, 8])
        plans = PlansManager(str(plans_file))
        base = plans.get_configuration("3d_fullres")
        for variant, batch in zip(added.variants, (2, 8), strict=True):
            configuration = plans.get_configuration(variant.name)
            assert configuration.data_identifier == base.data_identifier
            assert configuration.spacing == base.spacing
            assert configuration.batch_size == batch
            assert tuple(configuration.patch_size) == variant.patch_size
            with torch.device("meta"):
                network = nnUNetTrainer.build_network_architecture(plans, configuration, 1, 3, True)
                outputs = network(torch.empty(1, 1, *variant.patch_size))
            assert tuple(outputs[0].shape[2:]) == variant.patch_size

    def test_everything_else_stays(self, plans_file: Path) -> None:
        before = json.loads(plans_file.read_text())
        (variant,) = add_variants(NAME, "nnUNetPlans", [(8, 80, 80)]).variants
        after = json.loads(plans_file.read_text())
        del after["configurations"][variant.name]
        assert after == before

    def test_twice_is_once(self, plans_file: Path) -> None:
        add_variants(NAME, "nnUNetPlans", [(8, 80, 80)])
        content = plans_file.read_text()
        assert add_variants(NAME, "nnUNetPlans", [(8, 80, 80)]).variants[0].was_there
        assert plans_file.read_text() == content

    def test_two_commands_at_once_add_both(self, plans_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second command starts when the first has read the plans but not written them yet."""
        write, second = variants.write_json, []

        def late(path: Path, content: Any) -> None:
            if not second:
                second.append(threading.Thread(target=add_variants, args=(NAME, "nnUNetPlans", [(16, 160, 160)])))
                second[0].start()
                time.sleep(0.3)
            write(path, content)

        monkeypatch.setattr(variants, "write_json", late)
        add_variants(NAME, "nnUNetPlans", [(8, 80, 80)])
        second[0].join()
        assert {"3d_fullres_8x80x80", "3d_fullres_16x160x160"} <= set(
            PlansManager(str(plans_file)).plans["configurations"]
        )
        assert not list(plans_file.parent.glob(".*"))

    def test_a_lowres_variant_does_not_feed_the_cascade(self, plans_file: Path) -> None:
        plans = json.loads(plans_file.read_text())
        plans["configurations"]["3d_lowres"] = {"inherits_from": "3d_fullres", "next_stage": "3d_cascade_fullres"}
        plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        plans_file.write_text(json.dumps(plans))
        (variant,) = add_variants(NAME, "nnUNetPlans", [(8, 80, 80)], base="3d_lowres").variants
        assert PlansManager(str(plans_file)).get_configuration(variant.name).next_stage_names is None


class TestRefused:
    def test_all_errors_together_and_nothing_written(self, plans_file: Path) -> None:
        content = plans_file.read_text()
        with pytest.raises(InputError) as error:
            add_variants(NAME, "nnUNetPlans", [(4, 5, 4), (80, 80), (8, 80, 80)], batch_sizes=[0])
        assert len(error.value.errors) == 3
        assert "too small" in str(error.value)
        assert "80 x 80; expected 3" in str(error.value)
        assert "batch size is 0" in str(error.value)
        assert plans_file.read_text() == content

    @pytest.mark.parametrize("patch", [(2, 64, 64), (64, 64, 3), (3, 3, 64)])
    def test_edges_that_no_planner_gives(self, patch: tuple[int, ...], plans_file: Path) -> None:
        content = plans_file.read_text()
        with pytest.raises(InputError, match=rf"Patch {format_shape(patch)} is too small: expected {MIN_EDGE} voxels"):
            add_variants(NAME, "nnUNetPlans", [patch])
        assert plans_file.read_text() == content

    def test_slips(self, plans_file: Path) -> None:
        base = json.loads(plans_file.read_text())["configurations"]["3d_fullres"]["patch_size"]
        with pytest.raises(InputError) as error:
            add_variants(NAME, "nnUNetPlans", [(8, 8000, 80), base])
        assert len(error.value.errors) == 2
        assert "far beyond the images" in str(error.value)
        assert "is the same as 3d_fullres" in str(error.value)

    def test_another_configuration_of_that_name(self, plans_file: Path) -> None:
        plans = json.loads(plans_file.read_text())
        plans["configurations"]["3d_fullres_8x80x80"] = {"inherits_from": "3d_fullres"}
        plans_file.write_text(json.dumps(plans))
        with pytest.raises(InputError, match="another configuration 3d_fullres_8x80x80"):
            add_variants(NAME, "nnUNetPlans", [(8, 80, 80)])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["-p", "nothing"], "nothing.json can't be read"),
            (["-c", "3d_other"], "no configuration 3d_other"),
            (["--batch_size", "1", "2"], "2 batch sizes for 1 patches"),
        ],
    )
    @pytest.mark.usefixtures("plans_file")
    def test_command(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["variants", "-d", "701", "--patch_size", "8", "80", "80", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("plans_file")
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["variants", "-d", "701", "--patch_size", "8", "80", "80", "--patch_size", "16", "160", "160"]) == 0
    out = capsys.readouterr().out
    assert "nnUNetv2_train 701 3d_fullres_8x80x80 0 -tr nnUNetTrainerConResNet" in out
    assert "derived for each patch" in out
