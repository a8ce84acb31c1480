"""Architecture entries that our networks derive from nnU-Net's plans."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.conresnet_paper import ConResNetPaper
from nnunet_conres.architectures.residual_map_unet import ResidualMapUNet
from nnunet_conres.architectures.unet3d import UNet3D
from nnunet_conres.architectures.vnet import VNet
from nnunet_conres.families import PLANNED
from nnunet_conres.plans import conresnet, residual_maps, unet3d, vnet
from nnunet_conres.plans.configurations import configuration_of, with_configuration
from nnunet_conres.plans.entries import class_path, has_auxiliary_heads, set_background_class, stages_of
from tests.small_networks import plain_unet

CONRESNET, CONRESNET_PAPER, RESIDUAL_MAP_UNET, VNET, UNET3D = map(
    class_path, (ConResNet, ConResNetPaper, ResidualMapUNet, VNet, UNet3D)
)
STOCK = plain_unet(((1, 1, 1), (1, 2, 2), (2, 2, 2)), ((1, 3, 3), (3, 3, 3), (3, 3, 3)), (32, 64, 128), convolutions=2)[
    "arch_kwargs"
]


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


def fullres(some_plans: dict) -> Any:
    return configuration_of(some_plans, "3d_fullres")


@pytest.mark.parametrize(
    ("derive", "class_name", "own"),
    [
        (conresnet.architecture, CONRESNET, {"slice_axis": 0, "shared_encoder": False}),
        (residual_maps.architecture, RESIDUAL_MAP_UNET, {}),
    ],
)
class TestNetworksWithResidualMaps:
    def test_carry_the_topology_over_and_spell_out_the_rest(
        self, derive: Callable[..., Any], class_name: str, own: dict[str, Any]
    ) -> None:
        entry = derive(fullres(plans()))
        assert entry["network_class_name"] == class_name
        arguments = entry["arch_kwargs"]
        carried = set(STOCK) - {"n_conv_per_stage", "n_conv_per_stage_decoder"}
        assert {k: arguments[k] for k in carried} == {k: STOCK[k] for k in carried}
        assert {k: arguments[k] for k in set(arguments) - carried} == {
            "n_blocks_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "background_class": False,
            "checkpointing": "none",
            **own,
        }

    def test_take_the_blocks_of_residual_encoder_plans(
        self, derive: Callable[..., Any], class_name: str, own: dict[str, Any]
    ) -> None:
        residual_encoder = plans(
            "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
            n_conv_per_stage="left out",
            n_blocks_per_stage=[1, 3, 4],
        )
        assert derive(fullres(residual_encoder))["arch_kwargs"]["n_blocks_per_stage"] == [1, 3, 4]

    def test_plans_that_name_them_keep_their_arguments(
        self, derive: Callable[..., Any], class_name: str, own: dict[str, Any]
    ) -> None:
        ours = plans(
            class_name, n_conv_per_stage="left out", n_blocks_per_stage=[1, 2, 2], checkpointing="full", future=7
        )
        arguments = derive(fullres(ours))["arch_kwargs"]
        assert arguments["n_blocks_per_stage"] == [1, 2, 2]
        assert arguments["n_conv_per_stage_decoder"] == [2, 2]
        assert arguments["checkpointing"] == "full"
        assert arguments["future"] == 7  # kept, so that the constructor refuses it; nothing is dropped silently


class TestConResNetArchitecture:
    def test_shared_encoder(self) -> None:
        assert conresnet.architecture(fullres(plans()), shared_encoder=True)["arch_kwargs"]["shared_encoder"] is True
        named = plans(CONRESNET, n_conv_per_stage="left out", n_blocks_per_stage=[1, 2, 2], shared_encoder=True)
        for wanted in (True, False):  # the trainer decides, not the plans
            assert conresnet.architecture(fullres(named), wanted)["arch_kwargs"]["shared_encoder"] is wanted

    def test_plans_of_one_network_with_residual_maps_become_the_other(self) -> None:
        ours = with_configuration(plans(), "3d_fullres", architecture=residual_maps.architecture(fullres(plans())))
        assert conresnet.architecture(fullres(ours)) == conresnet.architecture(fullres(plans()))


class TestPaperArchitecture:
    def test_has_the_arguments_of_its_network(self) -> None:
        entry = conresnet.paper_architecture(fullres(plans()))
        assert entry == {
            "network_class_name": CONRESNET_PAPER,
            "arch_kwargs": {
                "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
                "background_class": False,
                "slice_axis": 0,
                "checkpointing": "none",
            },
            "_kw_requires_import": [],
        }

    def test_plans_that_name_it_keep_their_other_arguments(self) -> None:
        ours = plans()
        ours["configurations"]["3d_fullres"]["architecture"] = {
            "network_class_name": CONRESNET_PAPER,
            "arch_kwargs": {"slice_axis": 2},
            "_kw_requires_import": [],
        }
        arguments = conresnet.paper_architecture(fullres(ours))["arch_kwargs"]
        assert arguments["slice_axis"] == 2
        assert not has_auxiliary_heads(fullres(ours))


@pytest.mark.parametrize("has_regions", [True, False])
def test_the_background_has_no_residual_map(has_regions: bool) -> None:
    entry = conresnet.architecture(fullres(plans()))
    set_background_class(entry, has_regions)
    assert entry["arch_kwargs"]["background_class"] is not has_regions
    stock = plans()["configurations"]["3d_fullres"]["architecture"]
    set_background_class(stock, has_regions)
    assert "background_class" not in stock["arch_kwargs"]


def test_strides_and_kernels_of_every_stage() -> None:
    strides, kernels = stages_of(fullres(plans(strides=[1, [1, 2, 2], 2])))
    assert strides == [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    assert kernels == STOCK["kernel_sizes"]
    paper = with_configuration(plans(), "3d_fullres", architecture=conresnet.paper_architecture(fullres(plans())))
    assert stages_of(fullres(paper)) == ([[1, 1, 1]] + [[2, 2, 2]] * 3, [[3, 3, 3]] * 4)
    assert stages_of(fullres(plans("architectures.primus.Primus", n_stages="left out"))) == ([], [])


RESIDUAL_ENCODER = {
    "class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "n_conv_per_stage": "left out",
    "n_blocks_per_stage": [1, 3, 4],
    "n_conv_per_stage_decoder": [1, 1],
}


class TestVNetArchitecture:
    def test_kernels_of_five_and_half_of_the_features(self) -> None:
        arguments = vnet.architecture(fullres(plans()))["arch_kwargs"]
        assert arguments["kernel_sizes"] == [[1, 5, 5], [5, 5, 5], [5, 5, 5]]
        assert arguments["features_per_stage"] == [16, 32, 64]
        assert arguments["n_conv_per_stage"] == [1, 2, 3]
        assert arguments["n_conv_per_stage_decoder"] == [2, 1]
        assert arguments["nonlin"] == "torch.nn.PReLU"
        for carried in ("n_stages", "strides", "norm_op", "norm_op_kwargs", "conv_bias"):
            assert arguments[carried] == STOCK[carried]

    def test_one_number_for_all_stages(self) -> None:
        arguments = vnet.architecture(fullres(plans(features_per_stage=8, kernel_sizes=3)))["arch_kwargs"]
        assert arguments["features_per_stage"] == [4, 4, 4]
        assert arguments["kernel_sizes"] == [[5, 5, 5]] * 3

    def test_paper(self) -> None:
        arguments = vnet.paper_architecture(fullres(plans()))["arch_kwargs"]
        assert arguments["features_per_stage"] == [16, 32, 64, 128, 256]
        assert arguments["n_conv_per_stage"] == [1, 2, 3, 3, 3]
        assert arguments["n_conv_per_stage_decoder"] == [3, 3, 2, 1]
        assert arguments["norm_op"] is None


class TestUNet3DArchitecture:
    def test_pairs_of_convolutions(self) -> None:
        arguments = unet3d.architecture(fullres(plans()))["arch_kwargs"]
        assert {k: arguments[k] for k in STOCK} == STOCK
        assert arguments["downsampling"] == "strided_conv"

    def test_pairs_for_residual_encoder_plans_too(self) -> None:
        arguments = unet3d.architecture(fullres(plans(**RESIDUAL_ENCODER)))["arch_kwargs"]
        assert arguments["n_conv_per_stage"] == [2, 2, 2]
        assert arguments["n_conv_per_stage_decoder"] == [2, 2]

    def test_paper_keeps_the_downsampling_of_plans_that_name_it(self) -> None:
        assert unet3d.paper_architecture(fullres(plans()))["arch_kwargs"]["downsampling"] == "strided_conv"
        pooling = plans(UNET3D, downsampling="max_pool")
        assert unet3d.paper_architecture(fullres(pooling))["arch_kwargs"]["downsampling"] == "max_pool"


@pytest.mark.parametrize(
    ("derive", "class_name"),
    [(family.plans.architecture, family.networks[0]) for family in PLANNED.values()],
    ids=PLANNED,
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
    for family in PLANNED.values():
        assert heads(family.plans.architecture(configuration))
        if hasattr(family.plans, "paper_architecture"):
            assert not heads(family.plans.paper_architecture(configuration))


def naming(entry: dict[str, Any], **patch: Any) -> Any:
    """Return a configuration whose plans name this architecture."""
    return fullres(with_configuration(plans(), "3d_fullres", architecture=entry, **patch))


PAPERS = {
    family.networks[-1]: family.plans.paper_architecture
    for family in PLANNED.values()
    if hasattr(family.plans, "paper_architecture")
}
DYNAMIC = {family.networks[0]: family.plans.architecture for family in PLANNED.values()}


class TestPlansOfOtherFamilies:
    @pytest.mark.parametrize("theirs", list(PAPERS))
    @pytest.mark.parametrize("ours", list(PAPERS))
    def test_papers_are_the_papers_whatever_the_plans_name(self, theirs: str, ours: str) -> None:
        stock = PAPERS[ours](fullres(plans()))
        assert PAPERS[ours](naming(PAPERS[theirs](fullres(plans())))) == stock

    @pytest.mark.parametrize(("ours", "theirs"), [(one, other) for one in DYNAMIC for other in PAPERS if one != other])
    def test_nothing_is_derived_from_another_networks_paper_form(self, ours: str, theirs: str) -> None:
        with pytest.raises(ValueError, match=r"Cannot derive .*a paper's own"):
            DYNAMIC[ours](naming(PAPERS[theirs](fullres(plans()))))

    def test_single_headed_plans_of_the_own_network_keep_their_arguments(self) -> None:
        for derive, paper in ((vnet.architecture, PAPERS[VNET]), (unet3d.architecture, PAPERS[UNET3D])):
            entry = derive(fullres(plans()))
            entry["arch_kwargs"]["auxiliary_heads"] = False
            assert paper(naming(entry)) == entry


@pytest.mark.parametrize(("derive", "class_name"), [(vnet.architecture, VNET), (unet3d.architecture, UNET3D)])
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
    [*((derive, name) for name, derive in (DYNAMIC | PAPERS).items()), (conresnet.paper_architecture, CONRESNET)]
    + [(DYNAMIC[name], name) for name in PAPERS if name in DYNAMIC],
)
def test_checkpointing_stays_with_its_network(derive: Callable[..., dict[str, Any]], class_name: str) -> None:
    own = configuration_of(plans(class_name, checkpointing="full"), "3d_fullres")
    assert derive(own)["arch_kwargs"]["checkpointing"] == "full"
    assert derive(configuration_of(plans(), "3d_fullres"))["arch_kwargs"]["checkpointing"] == "none"
