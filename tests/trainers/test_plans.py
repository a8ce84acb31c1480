"""What trainers write into plans."""

from copy import deepcopy
from typing import Any

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_conres import __version__
from nnunet_conres.trainers.plans import (
    CONRESNET,
    configuration_of,
    conresnet_architecture,
    conresnet_paper_architecture,
    paper_patch_size,
    with_configuration,
)

STOCK = {
    "n_stages": 3,
    "features_per_stage": [32, 64, 128],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}


def plans(class_name: str = "dynamic_network_architectures.architectures.unet.PlainConvUNet", **arguments: Any) -> dict:
    given = {k: v for k, v in (STOCK | arguments).items() if v != "left out"}
    architecture = {
        "network_class_name": class_name,
        "arch_kwargs": given,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    fullres = {"patch_size": [20, 64, 64], "batch_size": 2, "architecture": architecture}
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    return {"configurations": {"3d_fullres": fullres, "3d_cascade_fullres": cascade}}


def resolved(some_plans: dict, **kwargs: Any) -> dict[str, Any]:
    return conresnet_architecture(configuration_of(some_plans, "3d_fullres"), **kwargs)["arch_kwargs"]


class TestConResNetArchitecture:
    def test_carries_the_topology_over_and_spells_out_the_rest(self) -> None:
        arguments = resolved(plans())
        carried = set(STOCK) - {"n_conv_per_stage", "n_conv_per_stage_decoder"}
        assert {k: arguments[k] for k in carried} == {k: STOCK[k] for k in carried}
        assert {k: arguments[k] for k in set(arguments) - carried} == {
            "n_blocks_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "residual_input": "decoder",
            "slice_axis": 0,
            "topology": "dynamic",
        }

    def test_takes_the_blocks_of_residual_encoder_plans(self) -> None:
        residual_encoder = plans(
            "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
            n_conv_per_stage="left out",
            n_blocks_per_stage=[1, 3, 4],
        )
        assert resolved(residual_encoder)["n_blocks_per_stage"] == [1, 3, 4]

    def test_plans_that_name_conresnet_keep_their_arguments(self) -> None:
        ours = plans(CONRESNET, n_conv_per_stage="left out", n_blocks_per_stage=[1, 2, 2], slice_axis=1, future=7)
        arguments = resolved(ours)
        assert arguments["n_blocks_per_stage"] == [1, 2, 2]
        assert arguments["n_conv_per_stage_decoder"] == [2, 2]
        assert arguments["slice_axis"] == 1
        assert arguments["future"] == 7  # the constructor refuses what it doesn't know; nothing is dropped silently

    def test_resolving_twice_changes_nothing(self) -> None:
        once = with_configuration(
            plans(), "3d_fullres", architecture=conresnet_architecture(configuration_of(plans(), "3d_fullres"))
        )
        assert resolved(once) == once["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]

    def test_shared_encoder(self) -> None:
        assert resolved(plans(), residual_input="shared_encoder")["residual_input"] == "shared_encoder"

    def test_refuses_networks_without_stages(self) -> None:
        with pytest.raises(ValueError, match=r"Primus has no n_stages, strides"):
            resolved(plans("architectures.primus.Primus", n_stages="left out", strides="left out"))


class TestPaperArchitecture:
    def test_is_fixed(self) -> None:
        arguments = conresnet_paper_architecture(configuration_of(plans(), "3d_fullres"))["arch_kwargs"]
        assert arguments["features_per_stage"] == [32, 64, 128, 256]
        assert arguments["topology"] == "paper"

    def test_plans_that_name_it_keep_their_other_arguments(self) -> None:
        ours = plans()
        ours["configurations"]["3d_fullres"]["architecture"] = {
            "network_class_name": CONRESNET,
            "arch_kwargs": {"topology": "paper", "residual_input": "shared_encoder"},
            "_kw_requires_import": [],
        }
        arguments = conresnet_paper_architecture(configuration_of(ours, "3d_fullres"))["arch_kwargs"]
        assert arguments["residual_input"] == "shared_encoder"
        assert arguments["n_stages"] == 4

    @pytest.mark.parametrize(
        ("median_shape", "expected"),
        [
            ([137.0, 173.0, 139.0], [80, 160, 144]),
            ([36.0, 50.0, 35.0], [40, 56, 40]),
            ([500.0, 512.0, 512.0], [80, 160, 160]),
        ],
    )
    def test_patch_is_the_papers_but_no_larger_than_the_images(
        self, median_shape: list[float], expected: list[int]
    ) -> None:
        assert paper_patch_size((80, 160, 160), median_shape, 8) == expected


class TestWithConfiguration:
    def test_hides_what_is_inherited_and_leaves_the_parent_alone(self) -> None:
        before = plans()
        after = with_configuration(deepcopy(before), "3d_cascade_fullres", architecture={"a": 1}, patch_size=[8, 8, 8])
        manager = PlansManager(after)
        assert manager.get_configuration("3d_cascade_fullres").configuration["architecture"] == {"a": 1}
        assert manager.get_configuration("3d_cascade_fullres").patch_size == [8, 8, 8]
        assert manager.get_configuration("3d_fullres").configuration == before["configurations"]["3d_fullres"]

    def test_notes_the_version_and_leaves_the_original_untouched(self) -> None:
        before = plans()
        copy = deepcopy(before)
        assert with_configuration(before, "3d_fullres", batch_size=9)["nnunet_conres"] == {"version": __version__}
        assert before == copy

    def test_unknown_configuration(self) -> None:
        with pytest.raises(RuntimeError, match="not found in plans"):
            configuration_of(plans(), "3d_lowres")
