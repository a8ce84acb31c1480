"""What our networks make of nnU-Net's plans."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_conres.planning.architectures import (
    CONRESNET,
    UNET3D,
    VNET,
    conresnet_architecture,
    conresnet_paper_architecture,
    has_auxiliary_heads,
    unet3d_architecture,
    unet3d_paper_architecture,
    vnet_architecture,
    vnet_paper_architecture,
)
from nnunet_conres.trainers.plans import configuration_of, with_configuration

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
            "checkpointing": "none",
            "residual_stream": False,
            "residual_features_per_stage": None,
            "attention": "paper",
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
        arguments = resolved(plans(), residual_input="shared_encoder")
        assert (arguments["residual_input"], arguments["residual_stream"]) == ("shared_encoder", True)

    def test_residual_stream(self) -> None:
        assert resolved(plans(), residual_stream=True)["residual_stream"] is True
        # plans older than the argument mean the network that they were made for
        older = plans(CONRESNET, n_conv_per_stage="left out", n_blocks_per_stage=[1, 2, 2])
        assert resolved(older)["residual_stream"] is True
        without = plans(CONRESNET, n_conv_per_stage="left out", n_blocks_per_stage=[1, 2, 2], residual_stream=False)
        assert resolved(without)["residual_stream"] is False
        assert resolved(without, residual_stream=True)["residual_stream"] is True
        assert resolved(without, residual_input="shared_encoder")["residual_stream"] is True
        both = plans(CONRESNET, n_conv_per_stage="left out", residual_input="shared_encoder")
        assert resolved(both)["residual_stream"] is True

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


RESIDUAL_ENCODER = {
    "class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "n_conv_per_stage": "left out",
    "n_blocks_per_stage": [1, 3, 4],
    "n_conv_per_stage_decoder": [1, 1],
}


def fullres(some_plans: dict) -> Any:
    return configuration_of(some_plans, "3d_fullres")


class TestVNetArchitecture:
    def test_kernels_of_five_and_half_of_the_features(self) -> None:
        arguments = vnet_architecture(fullres(plans()))["arch_kwargs"]
        assert arguments["kernel_sizes"] == [[1, 5, 5], [5, 5, 5], [5, 5, 5]]
        assert arguments["features_per_stage"] == [16, 32, 64]
        assert arguments["n_conv_per_stage"] == [1, 2, 3]
        assert arguments["n_conv_per_stage_decoder"] == [2, 1]
        assert arguments["nonlin"] == "torch.nn.PReLU"
        for carried in ("n_stages", "strides", "norm_op", "norm_op_kwargs", "conv_bias"):
            assert arguments[carried] == STOCK[carried]

    def test_one_number_for_all_stages(self) -> None:
        arguments = vnet_architecture(fullres(plans(features_per_stage=8, kernel_sizes=3)))["arch_kwargs"]
        assert arguments["features_per_stage"] == [4, 4, 4]
        assert arguments["kernel_sizes"] == [[5, 5, 5]] * 3

    def test_paper(self) -> None:
        arguments = vnet_paper_architecture(fullres(plans()))["arch_kwargs"]
        assert arguments["features_per_stage"] == [16, 32, 64, 128, 256]
        assert arguments["n_conv_per_stage"] == [1, 2, 3, 3, 3]
        assert arguments["n_conv_per_stage_decoder"] == [3, 3, 2, 1]
        assert arguments["norm_op"] is None


class TestUNet3DArchitecture:
    def test_pairs_of_convolutions(self) -> None:
        arguments = unet3d_architecture(fullres(plans()))["arch_kwargs"]
        assert {k: arguments[k] for k in STOCK} == STOCK
        assert arguments["downsampling"] == "strided_conv"

    def test_pairs_for_residual_encoder_plans_too(self) -> None:
        arguments = unet3d_architecture(fullres(plans(**RESIDUAL_ENCODER)))["arch_kwargs"]
        assert arguments["n_conv_per_stage"] == [2, 2, 2]
        assert arguments["n_conv_per_stage_decoder"] == [2, 2]

    def test_paper_keeps_the_downsampling_of_plans_that_name_it(self) -> None:
        assert unet3d_paper_architecture(fullres(plans()))["arch_kwargs"]["downsampling"] == "strided_conv"
        pooling = plans(UNET3D, downsampling="max_pool")
        assert unet3d_paper_architecture(fullres(pooling))["arch_kwargs"]["downsampling"] == "max_pool"


@pytest.mark.parametrize(
    ("derive", "class_name"),
    [(vnet_architecture, VNET), (unet3d_architecture, UNET3D), (conresnet_architecture, CONRESNET)],
)
class TestAllFamilies:
    @pytest.mark.parametrize("stock", [{}, RESIDUAL_ENCODER])
    def test_builds_the_network(self, derive: Any, class_name: str, stock: dict[str, Any]) -> None:
        entry = derive(fullres(plans(**stock)))
        assert entry["network_class_name"] == class_name
        arguments = entry["arch_kwargs"] | {"features_per_stage": [4, 8, 8]}
        network = get_network_from_plans(class_name, arguments, entry["_kw_requires_import"], 1, 2)
        assert type(network).__name__ == class_name.rpartition(".")[2]

    def test_resolving_twice_changes_nothing(self, derive: Any, class_name: str) -> None:
        once = derive(fullres(plans()))
        assert derive(fullres(with_configuration(plans(), "3d_fullres", architecture=once))) == once

    def test_refuses_networks_without_stages(self, derive: Any, class_name: str) -> None:
        with pytest.raises(ValueError, match=r"Primus has no n_stages, strides"):
            derive(fullres(plans("architectures.primus.Primus", n_stages="left out", strides="left out")))


def test_papers_have_a_single_head() -> None:
    def heads(entry: dict[str, Any]) -> bool:
        return has_auxiliary_heads(fullres(with_configuration(plans(), "3d_fullres", architecture=entry)))

    configuration = fullres(plans())
    assert has_auxiliary_heads(configuration)
    for paper in (vnet_paper_architecture, unet3d_paper_architecture, conresnet_paper_architecture):
        assert not heads(paper(configuration))
    for dynamic in (vnet_architecture, unet3d_architecture, conresnet_architecture):
        assert heads(dynamic(configuration))


def naming(entry: dict[str, Any], **patch: Any) -> Any:
    """A configuration whose plans hold this architecture."""
    return fullres(with_configuration(plans(), "3d_fullres", architecture=entry, **patch))


PAPERS = {
    VNET: vnet_paper_architecture,
    UNET3D: unet3d_paper_architecture,
    CONRESNET: conresnet_paper_architecture,
}


class TestPlansOfOtherFamilies:
    @pytest.mark.parametrize("theirs", list(PAPERS))
    @pytest.mark.parametrize("ours", list(PAPERS))
    def test_papers_are_the_papers_whatever_the_plans_name(self, theirs: str, ours: str) -> None:
        stock = PAPERS[ours](fullres(plans()))
        assert PAPERS[ours](naming(PAPERS[theirs](fullres(plans())))) == stock

    @pytest.mark.parametrize(
        ("derive", "theirs"),
        [
            (vnet_architecture, UNET3D),
            (vnet_architecture, CONRESNET),
            (unet3d_architecture, VNET),
            (unet3d_architecture, CONRESNET),
            (conresnet_architecture, VNET),
            (conresnet_architecture, UNET3D),
        ],
    )
    def test_nothing_is_derived_from_another_networks_paper_form(self, derive: Any, theirs: str) -> None:
        with pytest.raises(ValueError, match=r"Cannot derive .*a paper's own, or has no nonlinearity"):
            derive(naming(PAPERS[theirs](fullres(plans()))))

    def test_single_headed_plans_of_the_own_network_keep_their_arguments(self) -> None:
        for derive, paper in ((vnet_architecture, PAPERS[VNET]), (unet3d_architecture, PAPERS[UNET3D])):
            entry = derive(fullres(plans()))
            entry["arch_kwargs"]["auxiliary_heads"] = False
            assert paper(naming(entry)) == entry


@pytest.mark.parametrize(("derive", "class_name"), [(vnet_architecture, VNET), (unet3d_architecture, UNET3D)])
def test_what_plans_leave_out_is_spelled_out_as_the_constructor_has_it(derive: Any, class_name: str) -> None:
    partial = {
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": 3,
        "strides": [1, 2],
    }
    given = {"network_class_name": class_name, "arch_kwargs": partial, "_kw_requires_import": ["conv_op"]}
    entry = derive(naming(given))
    assert entry["arch_kwargs"]["strides"] == [[1, 1, 1], [2, 2, 2]]  # as nnU-Net reads them
    assert entry["arch_kwargs"]["kernel_sizes"] == [[3, 3, 3]] * 2
    networks = [
        get_network_from_plans(class_name, e["arch_kwargs"], e["_kw_requires_import"], 1, 2) for e in (given, entry)
    ]
    assert str(networks[0]) == str(networks[1])
    signature = inspect.signature(type(networks[0]).__init__).parameters
    assert set(signature) - {"self", "input_channels", "num_classes", "deep_supervision"} == set(entry["arch_kwargs"])


@pytest.mark.parametrize(
    ("derive", "class_name"),
    [
        (conresnet_architecture, CONRESNET),
        (conresnet_paper_architecture, CONRESNET),
        (vnet_architecture, VNET),
        (vnet_paper_architecture, VNET),
        (unet3d_architecture, UNET3D),
        (unet3d_paper_architecture, UNET3D),
    ],
)
def test_checkpointing_stays_with_its_network(derive: Callable[..., dict[str, Any]], class_name: str) -> None:
    own = configuration_of(plans(class_name, checkpointing="full"), "3d_fullres")
    assert derive(own)["arch_kwargs"]["checkpointing"] == "full"
    assert derive(configuration_of(plans(), "3d_fullres"))["arch_kwargs"]["checkpointing"] == "none"
