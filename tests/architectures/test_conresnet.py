"""ConResNet against the paper's facts, an independent computation of the authors' graph, and nnU-Net's expectations."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_conres.architectures.blocks import WeightStandardizedConv3d
from nnunet_conres.architectures.conresnet import ConResNet, from_authors_state_dict

CLASS_NAME = "nnunet_conres.architectures.conresnet.ConResNet"


def arguments(**changes: Any) -> dict[str, Any]:
    """Constructor arguments of a small isotropic network in the manner of stock plans."""
    return {
        "input_channels": 2,
        "num_classes": 3,
        "n_stages": 3,
        "features_per_stage": [4, 8, 16],
        "conv_op": nn.Conv3d,
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    } | changes


def shapes(output: Tensor | list[Tensor]) -> list[tuple[int, ...]] | tuple[int, ...]:
    return tuple(output.shape) if isinstance(output, Tensor) else [tuple(x.shape) for x in output]


# --- the authors' network, written down a second time, from the description of its operations -------------------------


def authors_shapes(input_channels: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' checkpoint, the unused layers included."""
    table: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        table[f"{name}.weight"] = table[f"{name}.bias"] = (channels,)

    def conv(name: str, cin: int, cout: int, kernel: int = 3, bias: bool = False) -> None:
        table[f"{name}.weight"] = (cout, cin, kernel, kernel, kernel)
        if bias:
            table[f"{name}.bias"] = (cout,)

    conv("conv_4_32.0", input_channels, 32)
    for cin, cout in ((32, 64), (64, 128), (128, 256)):
        norm(f"conv_{cin}_{cout}.0", cin)
        conv(f"conv_{cin}_{cout}.2", cin, cout)
    for layer, (channels, blocks) in enumerate([(32, 1), (64, 2), (128, 2), (256, 2), (256, 2)]):
        for block in range(blocks):
            for i in (1, 2):
                norm(f"layer{layer}.{block}.gn{i}", channels)
                conv(f"layer{layer}.{block}.conv{i}", channels, channels)
    norm("fusionConv.0", 256)
    conv("fusionConv.3", 256, 128)
    for name, cin, cout in (("seg_x4.0", 128, 64), ("seg_x2.0", 64, 32), ("seg_x1.0", 32, 32)):
        norm(f"{name}.gn_seg", cin)
        conv(f"{name}.conv_seg", cin, cout)
        norm(f"{name}.gn_res", cout)
        conv(f"{name}.conv_res", cout, cout, 1)
        for i in (1, 2):
            norm(f"{name}.gn_res{i}", cout)
            conv(f"{name}.conv_res{i}", cout, cout)
        norm(f"{name}.gn_mp", cin)
        conv(f"{name}.conv_mp_first", input_channels, cout)
        conv(f"{name}.conv_mp", cin, cout)
    for name, cin in (("seg_cls", 32), ("res_cls", 32), ("resx2_cls", 32), ("resx4_cls", 64)):
        conv(f"{name}.0", cin, num_classes, 1, bias=True)
    return table


def authors_state_dict(input_channels: int = 4, num_classes: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(s, generator=generator) for k, s in authors_shapes(input_channels, num_classes).items()}


def authors_forward(w: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    """The authors' graph with plain functions on their weights: no module, no helper of the package."""

    def conv(name: str, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        kernel = w[f"{name}.weight"]
        centred = kernel - kernel.mean(1, True).mean(2, True).mean(3, True).mean(4, True)
        scale = torch.sqrt(torch.var(centred.reshape(len(kernel), -1), 1) + 1e-12).reshape(-1, 1, 1, 1, 1)
        padding = dilation * (kernel.shape[-1] // 2)
        return F.conv3d(x, centred / scale, w.get(f"{name}.bias"), stride, padding, dilation)

    def norm_relu(name: str, x: Tensor) -> Tensor:
        return F.relu(F.group_norm(x, 8, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5))

    def layer(number: int, blocks: int, x: Tensor, dilation: int = 1) -> Tensor:
        for block in range(blocks):
            name = f"layer{number}.{block}"
            inner = conv(f"{name}.conv1", norm_relu(f"{name}.gn1", x), dilation=dilation)
            x = x + conv(f"{name}.conv2", norm_relu(f"{name}.gn2", inner), dilation=dilation)
        return x

    def residual(x: Tensor) -> Tensor:
        slices = [torch.zeros_like(x[:, :, 0])]
        slices += [(x[:, :, k] - x[:, :, k - 1]).abs() for k in range(1, x.shape[2])]
        return torch.stack(slices, 2)

    def grow(x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(x, size=size, mode="trilinear", align_corners=True)

    def module(name: str, seg: Tensor, res: Tensor, first: bool = False) -> tuple[Tensor, Tensor]:
        features = conv(f"{name}.conv_seg", norm_relu(f"{name}.gn_seg", seg))
        context = conv(f"{name}.conv_res", residual(torch.sigmoid(features)))
        if first:
            res = conv(f"{name}.conv_mp_first", res)
        elif res.shape[1] != features.shape[1]:
            res = conv(f"{name}.conv_mp", norm_relu(f"{name}.gn_mp", res))
        res = conv(f"{name}.conv_res1", norm_relu(f"{name}.gn_res1", res + context))
        return features * (1 + torch.sigmoid(res)), res

    full = layer(0, 1, conv("conv_4_32.0", image))
    half = layer(1, 2, conv("conv_32_64.2", norm_relu("conv_32_64.0", full), stride=2))
    quarter = layer(2, 2, conv("conv_64_128.2", norm_relu("conv_64_128.0", half), stride=2))
    deep = layer(3, 2, conv("conv_128_256.2", norm_relu("conv_128_256.0", quarter), stride=2))
    deep = layer(4, 2, deep, dilation=2)
    deep = conv("fusionConv.3", norm_relu("fusionConv.0", deep))

    seg, res4 = module(
        "seg_x4.0",
        grow(deep, quarter.shape[2:]) + quarter,
        grow(residual(image), quarter.shape[2:]),
        first=True,
    )
    seg, res2 = module("seg_x2.0", grow(seg, half.shape[2:]) + half, grow(res4, half.shape[2:]))
    seg, res1 = module("seg_x1.0", grow(seg, full.shape[2:]) + full, grow(res2, full.shape[2:]))
    return [
        conv("seg_cls.0", seg),
        conv("res_cls.0", res1),
        conv("resx2_cls.0", grow(res2, image.shape[2:])),
        conv("resx4_cls.0", grow(res4, image.shape[2:])),
    ]


@pytest.mark.parametrize("kernel", [1, 3])
def test_weight_standardisation_filter_by_filter(kernel: int) -> None:
    conv = WeightStandardizedConv3d(5, 4, kernel, padding=kernel // 2, bias=False).double()
    image = torch.randn(1, 5, 6, 6, 6, dtype=torch.float64)
    filters = []
    for one in conv.weight:
        mean = sum(one.flatten()) / one.numel()
        variance = sum((value - mean) ** 2 for value in one.flatten()) / (one.numel() - 1)
        filters.append((one - mean) / torch.sqrt(variance + 1e-12))
    torch.testing.assert_close(conv(image), F.conv3d(image, torch.stack(filters), padding=kernel // 2))


class TestPaperTopology:
    def test_parameters_of_the_paper_all_with_a_gradient(self) -> None:
        network = ConResNet.paper(4, 3, residual_outputs=True)
        assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 19_018_732
        sum(output.square().mean() for output in network(torch.randn(1, 4, 8, 16, 16))).backward()
        without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []

    def test_residual_outputs_are_four_full_size_maps_in_both_modes(self) -> None:
        network = ConResNet.paper(4, 3)
        image = torch.randn(1, 4, 8, 16, 16)
        assert shapes(network(image)) == (1, 3, 8, 16, 16)
        network.residual_outputs = True
        for mode in (True, False):
            network.train(mode)
            assert shapes(network(image)) == [(1, 3, 8, 16, 16)] * 4
        network.decoder.deep_supervision = True
        assert shapes(network(image)) == [(1, 3, 8, 16, 16)] * 4
        network.residual_outputs = False
        assert shapes(network(image)) == [(1, 3, 8, 16, 16)]

    def test_shared_encoder_has_no_convolution_of_the_image_residual(self) -> None:
        network = ConResNet.paper(4, 3, residual_input="shared_encoder")
        assert network.decoder.stages[0].project.conv.in_channels == 128
        assert shapes(network(torch.randn(1, 4, 8, 16, 16))) == (1, 3, 8, 16, 16)

    def test_refuses_arguments_that_contradict_it(self) -> None:
        with pytest.raises(ValueError, match=r"features_per_stage \[4, 8, 16\] instead of"):
            ConResNet(**arguments(topology="paper"))


class TestAuthorsCheckpoint:
    @pytest.mark.parametrize(("channels", "classes", "prefix"), [(4, 3, ""), (4, 3, "module."), (1, 2, "")])
    def test_is_the_same_function(self, channels: int, classes: int, prefix: str) -> None:
        weights = authors_state_dict(channels, classes)
        network = from_authors_state_dict({prefix + k: v for k, v in weights.items()}, residual_outputs=True)
        image = torch.randn(1, channels, 8, 24, 16)
        with torch.no_grad():
            for ours, theirs in zip(network(image), authors_forward(weights, image), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
            double = authors_forward({k: v.double() for k, v in weights.items()}, image.double())
            network.double()
            for ours, theirs in zip(network(image.double()), double, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
            # in training mode, but without its dropout, the same up to rounding
            network.train().encoder.fusion.dropout.eval()
            for ours, theirs in zip(network(image.double()), double, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)

    def test_counts_of_the_authors_module(self) -> None:
        """19,018,732 parameters in use and 422,464 that no output depends on."""
        total = sum(math.prod(shape) for shape in authors_shapes(4, 3).values())
        assert total == 19_018_732 + 422_464

    def test_from_a_file(self, tmp_path: Path) -> None:
        weights = authors_state_dict()
        torch.save(weights, tmp_path / "authors.pth")
        network = from_authors_state_dict(tmp_path / "authors.pth")
        assert torch.equal(network.encoder.stem.weight, weights["conv_4_32.0.weight"])
        assert not network.residual_outputs
        assert not network.training

    def test_a_file_that_would_run_code_is_refused(self, tmp_path: Path) -> None:
        torch.save({"weights": Path("anything")}, tmp_path / "bad.pth")
        (tmp_path / "text.pth").write_text("no checkpoint")
        for name in ("bad.pth", "text.pth"):
            with pytest.raises(ValueError, match=rf"{name} is not a state dictionary"):
                from_authors_state_dict(tmp_path / name)

    def test_names_what_is_missing_unknown_or_misshapen(self) -> None:
        weights = authors_state_dict()
        del weights["layer2.1.gn2.bias"]
        weights["surprise.weight"] = torch.zeros(1)
        weights["seg_x2.0.conv_res1.weight"] = torch.zeros(32, 16, 3, 3, 3)
        weights["seg_x1.0.conv_res2.bias"] = torch.zeros(32)
        weights["module.fusionConv.0.bias"] = torch.zeros(256)
        with pytest.raises(ValueError, match="authors' ConResNet") as error:
            from_authors_state_dict(weights)
        for name in (
            "layer2.1.gn2.bias",
            "surprise.weight",
            "seg_x2.0.conv_res1.weight (32, 16, 3, 3, 3)",
            "seg_x1.0.conv_res2.bias",
            "module.fusionConv.0.bias",
        ):
            assert name in str(error.value)

    def test_refuses_what_is_no_state_dictionary(self) -> None:
        with pytest.raises(ValueError, match="list"):
            from_authors_state_dict([torch.zeros(1)])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"conv_4_32.0.weight"):
            from_authors_state_dict({})


class TestDynamicTopology:
    # patch, strides, kernels: as planners make them, and odd sizes as hand-edited plans have them
    CASES = (
        ((8, 8, 8), [1, 2], [3, 3]),
        ((4, 16, 12), [1, [1, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3]]),
        ((5, 23, 18), [1, [1, 2, 2], [1, 2, 2], [2, 2, 2]], [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]]),
        ((7, 13, 9), [1, 2, 2, 2], [3, 3, 3, 3]),
        ((9, 10, 11), [1, [3, 2, 2], [1, 1, 2]], [3, [3, 1, 5], 3]),
        ((16, 32, 32), [1, [1, 2, 2], 2, 2, 2, [1, 2, 2]], [[1, 3, 3]] + [3] * 5),
    )

    @pytest.mark.parametrize(("patch", "strides", "kernels"), CASES)
    @pytest.mark.parametrize("residual_input", ["decoder", "shared_encoder"])
    def test_output_shapes_and_gradients(
        self, patch: tuple[int, ...], strides: list[Any], kernels: list[Any], residual_input: str
    ) -> None:
        n_stages = len(strides)
        network = ConResNet(
            **arguments(
                n_stages=n_stages,
                features_per_stage=[4, 8, 16, 16, 16, 16][:n_stages],
                strides=strides,
                kernel_sizes=kernels,
                residual_input=residual_input,
                dropout_op=nn.Dropout3d,
                dropout_op_kwargs={"p": 0.1},
            )
        )
        # a batch of 2, so that instance norm of a single bottleneck voxel in the smallest cases is not refused
        image = torch.randn(2, 2, *patch)
        network.eval()
        scales, size = [], list(patch)
        for stride in strides[:-1]:
            stride = [stride] * 3 if isinstance(stride, int) else stride
            size = [math.ceil(extent / step) for extent, step in zip(size, stride, strict=True)]
            scales.append((2, 3, *size))

        assert shapes(network(image)) == (2, 3, *patch)
        network.decoder.deep_supervision = True
        assert shapes(network(image)) == scales
        network.residual_outputs = True
        outputs = network(image)
        assert shapes(outputs) == scales + scales
        sum(output.square().mean() for output in outputs).backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []
        network.decoder.deep_supervision = False
        assert shapes(network(image)) == [scales[0], *scales]

    @pytest.mark.parametrize(("channels", "classes"), [(1, 1), (4, 3), (6, 105)])
    def test_any_number_of_channels_and_classes(self, channels: int, classes: int) -> None:
        network = ConResNet(**arguments(input_channels=channels, num_classes=classes))
        assert shapes(network(torch.randn(1, channels, 8, 8, 8))) == (1, classes, 8, 8, 8)

    def test_without_norm_nonlinearity_and_bias(self) -> None:
        network = ConResNet(**arguments(norm_op=None, norm_op_kwargs=None, nonlin=None, conv_bias=False))
        network.apply(network.initialize)
        assert torch.isfinite(network(torch.randn(1, 2, 8, 8, 8))).all()

    def test_norm_without_parameters(self) -> None:
        network = ConResNet(**arguments(norm_op_kwargs={"affine": False}))
        network.apply(network.initialize)
        assert torch.isfinite(network(torch.randn(1, 2, 8, 8, 8))).all()

    def test_residual_heads_are_not_computed_unless_asked_for(self) -> None:
        network = ConResNet(**arguments(deep_supervision=True))
        calls: list[int] = []
        for head in network.decoder.seg_layers.residual:
            head.register_forward_hook(lambda *_: calls.append(1))
        network(torch.randn(1, 2, 8, 8, 8))
        assert calls == []
        network.residual_outputs = True
        network(torch.randn(1, 2, 8, 8, 8))
        assert len(calls) == 2

    def test_slices_beyond_the_receptive_field_of_a_change_are_untouched_but_for_the_next(self) -> None:
        """The residual looks back by one slice: a change of slice k shows in the residual at k and k + 1."""
        network = ConResNet(**arguments(kernel_sizes=1, strides=[1, 1, 1], norm_op=None, norm_op_kwargs=None)).eval()
        image = torch.randn(1, 2, 8, 4, 4)
        changed = image.clone()
        changed[:, :, 3] += 1
        with torch.no_grad():
            difference = (network(changed) - network(image)).abs().amax((0, 1, 3, 4))
        touched = torch.nonzero(difference > 1e-7).flatten().tolist()
        assert touched[0] == 3
        assert 4 in touched
        assert len(touched) <= 4

    def test_slice_axis_moves_with_the_data(self) -> None:
        torch.manual_seed(1)
        along_first = ConResNet(**arguments(slice_axis=0)).eval()
        along_last = ConResNet(**arguments(slice_axis=2)).eval()
        weights = {
            k: v.transpose(2, 4) if v.ndim == 5 else v  # the kernels turn as well
            for k, v in along_first.state_dict().items()
        }
        along_last.load_state_dict(weights)
        image = torch.randn(1, 2, 8, 12, 16)
        with torch.no_grad():
            torch.testing.assert_close(along_last(image.transpose(2, 4)).transpose(2, 4), along_first(image))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"residual_input": "encoder"}, "residual_input"),
            ({"topology": "small"}, "topology"),
            ({"slice_axis": 3}, "slice_axis"),
        ],
    )
    def test_refuses_arguments_out_of_range(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ConResNet(**arguments(**changes))

    def test_residual_blocks_learn_from_the_first_step(self) -> None:
        network = ConResNet(**arguments())
        network.apply(network.initialize)
        block = network.encoder.stages[0].blocks[0]
        block(torch.rand(1, 4, 8, 8, 8)).square().mean().backward()
        assert all(parameter.grad is not None for parameter in block.parameters())
        assert float(block.conv1.conv.weight.grad.abs().sum()) > 0


NARROW = [3, 5, 7]
FORMS = {
    "no stream": {"residual_stream": False},
    "narrow, identity": {"residual_features_per_stage": NARROW, "attention": "identity"},
    "narrow, no attention": {"residual_features_per_stage": NARROW, "attention": "none"},
    "whole, identity": {"attention": "identity"},
}


class TestForms:
    """The dynamic topology with other residual streams than the paper's."""

    @pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
    def test_outputs_and_gradients(self, form: dict[str, Any]) -> None:
        network = ConResNet(**arguments(deep_supervision=True, residual_outputs=True, **form))
        outputs = network(torch.randn(2, 2, 8, 12, 16))
        assert shapes(outputs) == [(2, 3, 8, 12, 16), (2, 3, 4, 6, 8)] * 2
        sum(output.square().mean() for output in outputs).backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []
        network.residual_outputs = network.decoder.deep_supervision = False
        assert shapes(network(torch.randn(2, 2, 8, 12, 16))) == (2, 3, 8, 12, 16)

    @pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
    def test_checkpointing_changes_nothing(self, form: dict[str, Any]) -> None:
        gradients = []
        for checkpointing in ("none", "full"):
            torch.manual_seed(3)
            network = ConResNet(**arguments(residual_outputs=True, checkpointing=checkpointing, **form))
            sum(output.square().mean() for output in network(torch.randn(1, 2, 8, 8, 8))).backward()
            gradients.append([p.grad for p in network.parameters()])
        torch.testing.assert_close(gradients[0], gradients[1])

    def test_attention_through_a_gate_starts_as_the_identity(self) -> None:
        torch.manual_seed(0)
        gated = ConResNet(**arguments(attention="identity", residual_features_per_stage=NARROW))
        gated.apply(gated.initialize)
        free = ConResNet(**arguments(attention="none", residual_features_per_stage=NARROW))
        free.load_state_dict({k: v for k, v in gated.state_dict().items() if ".gate." not in k})
        image = torch.randn(1, 2, 8, 8, 8)
        torch.testing.assert_close(gated(image), free(image))

    def test_attention_through_a_gate_voxel_by_voxel(self) -> None:
        network = ConResNet(**arguments(attention="identity", residual_features_per_stage=NARROW)).eval()
        module = network.decoder.stages[-1]
        seen: dict[str, Tensor] = {}
        module.segmentation.register_forward_hook(lambda m, i, output: seen.update(features=output))
        module.register_forward_hook(lambda m, i, output: seen.update(attended=output[0], residual=output[1]))
        with torch.no_grad():
            network(torch.randn(1, 2, 8, 8, 8))
            weight, bias = module.gate.weight[:, :, 0, 0, 0], module.gate.bias
            for voxel in [(0, 0, 0), (1, 2, 3), (3, 3, 3)]:
                at = (0, slice(None), *voxel)
                gate = weight @ seen["residual"][at] + bias
                torch.testing.assert_close(
                    seen["attended"][at], seen["features"][at] * 2 / (1 + torch.exp(-gate)), rtol=1e-5, atol=1e-6
                )

    def test_without_a_stream_no_parameter_is_its_own(self) -> None:
        network = ConResNet(**arguments(residual_stream=False))
        names = {name.split(".")[2] for name, _ in network.named_parameters() if name.startswith("decoder.stages")}
        assert names == {"0", "1"}
        assert not any("residual_up" in name or "merge" in name for name, _ in network.named_parameters())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"attention": "strong"}, "attention must be one of"),
            ({"residual_features_per_stage": NARROW}, "attention 'identity'"),
            ({"residual_features_per_stage": [3, 5], "attention": "none"}, "must be one value or have 3 entries"),
            ({"residual_features_per_stage": 0, "attention": "none"}, "must be 1 or more"),
            ({"residual_stream": False, "residual_input": "shared_encoder"}, "needs the residual stream"),
            ({"residual_stream": False, "attention": "identity"}, "leave attention and"),
            ({"residual_stream": False, "residual_features_per_stage": 4}, "leave attention and"),
            (
                {"residual_features_per_stage": 4, "residual_input": "shared_encoder", "attention": "none"},
                "as wide as the segmentation's",
            ),
        ],
    )
    def test_refuses_what_does_not_fit(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ConResNet(**arguments(**changes))

    @pytest.mark.parametrize("changes", [{"residual_stream": False}, {"attention": "none"}])
    def test_the_paper_topology_has_one_form(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="paper topology"):
            ConResNet.paper(4, 3, **changes)


class TestInNnUNet:
    def plans_arguments(self) -> dict[str, Any]:
        """What stock plans carry: strings for classes, convolutions per stage."""
        stock = arguments(
            conv_op="torch.nn.modules.conv.Conv3d",
            norm_op="torch.nn.modules.instancenorm.InstanceNorm3d",
            nonlin="torch.nn.LeakyReLU",
            n_conv_per_stage=[2, 2, 4],
            n_conv_per_stage_decoder=[2, 2],
            dropout_op=None,
            dropout_op_kwargs=None,
        )
        return {k: v for k, v in stock.items() if k not in ("input_channels", "num_classes")}

    def test_plans_alone_instantiate_it(self) -> None:
        imports = ["conv_op", "norm_op", "dropout_op", "nonlin"]
        network = get_network_from_plans(CLASS_NAME, self.plans_arguments(), imports, 1, 4, deep_supervision=True)
        assert shapes(network(torch.randn(1, 1, 8, 8, 8))) == [(1, 4, 8, 8, 8), (1, 4, 4, 4, 4)]
        assert [len(stage.blocks) for stage in network.encoder.stages] == [1, 1, 2]

    @pytest.mark.parametrize(
        "network",
        [
            ConResNet(**arguments()),
            ConResNet(**arguments(residual_input="shared_encoder")),
            ConResNet.paper(2, 3),
            *(ConResNet(**arguments(**form)) for form in FORMS.values()),
        ],
        ids=["dynamic", "shared encoder", "paper", *FORMS],
    )
    @pytest.mark.parametrize("residual_outputs", [False, True])
    def test_feature_map_size_equals_what_convolutions_put_out(
        self, network: ConResNet, residual_outputs: bool
    ) -> None:
        network.residual_outputs = residual_outputs
        counted = 0

        def count(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            nonlocal counted
            counted += output.numel()

        convolutions = [m for m in network.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))]
        hooks = [m.register_forward_hook(count) for m in convolutions]
        network(torch.randn(1, 2, 8, 16, 16))
        for hook in hooks:
            hook.remove()
        assert network.compute_conv_feature_map_size((8, 16, 16)) == counted

    def test_feature_map_size_refuses_channels(self) -> None:
        with pytest.raises(ValueError, match="only"):
            ConResNet(**arguments()).compute_conv_feature_map_size((1, 8, 8, 8))

    @pytest.mark.parametrize("residual_input", ["decoder", "shared_encoder"])
    def test_pretrained_weights_from_three_to_five_classes(self, tmp_path: Path, residual_input: str) -> None:
        source = ConResNet(**arguments(num_classes=3, residual_input=residual_input))
        target = ConResNet(**arguments(num_classes=5, residual_input=residual_input))
        heads = {k: v.clone() for k, v in target.state_dict().items() if ".seg_layers." in k}
        torch.save({"network_weights": source.state_dict()}, tmp_path / "source.pth")
        load_pretrained_weights(target, str(tmp_path / "source.pth"))
        for name, value in target.state_dict().items():
            assert torch.equal(value, heads[name] if name in heads else source.state_dict()[name])

    def test_checkpoint_of_another_topology_says_so(self) -> None:
        other = ConResNet(**arguments(features_per_stage=[4, 8, 8]))
        with pytest.raises(RuntimeError, match=r"another network than this one \(dynamic topology.*of another shape"):
            ConResNet(**arguments()).load_state_dict(other.state_dict())
        with pytest.raises(RuntimeError, match=r"missing in the checkpoint.*not in this network"):
            ConResNet(**arguments()).load_state_dict(
                PlainConvUNet(
                    **arguments(n_conv_per_stage=2, n_conv_per_stage_decoder=2),
                ).state_dict()
            )

    @pytest.mark.parametrize(
        "network",
        [
            ConResNet(**arguments(deep_supervision=True)),
            ConResNet(**arguments(deep_supervision=True, residual_input="shared_encoder")),
            ConResNet.paper(2, 3),
        ],
        ids=["dynamic", "shared encoder", "paper"],
    )
    def test_compiles_without_graph_break(self, network: ConResNet) -> None:
        network.residual_outputs = True
        network.double().eval()
        image = torch.randn(1, 2, 8, 8, 8, dtype=torch.float64)
        torch.compiler.reset()  # there is a limit to how often one forward is compiled anew
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        for ours, theirs in zip(compiled(image), network(image), strict=True):
            torch.testing.assert_close(ours, theirs)
        network.residual_outputs = network.decoder.deep_supervision = False
        torch.testing.assert_close(compiled(image), network(image))

    @pytest.mark.slow
    @pytest.mark.parametrize("residual_input", ["decoder", "shared_encoder"])
    def test_compiled_code_trains_the_same(self, residual_input: str) -> None:
        """Generated code, forward and backward, on anisotropic stages and odd sizes."""
        network = ConResNet(
            **arguments(strides=[1, [1, 2, 2], 2], kernel_sizes=[[1, 3, 3], 3, 3], residual_input=residual_input),
            deep_supervision=True,
            residual_outputs=True,
        )
        torch.compiler.reset()  # there is a limit to how often one forward is compiled anew
        image = torch.randn(2, 2, 5, 12, 10)
        gradients = []
        for module in (network, torch.compile(network, fullgraph=True)):
            network.zero_grad()
            sum(output.square().mean() for output in module(image)).backward()
            gradients.append([p.grad.clone() for p in network.parameters()])
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    @pytest.mark.gpu
    @pytest.mark.parametrize("topology", ["dynamic", "paper"])
    def test_compiled_mixed_precision_on_a_gpu(self, topology: str) -> None:
        network = ConResNet(**arguments()) if topology == "dynamic" else ConResNet.paper(2, 3)
        network.residual_outputs = network.decoder.deep_supervision = True
        torch.compiler.reset()  # there is a limit to how often one forward is compiled anew
        compiled = torch.compile(network.cuda(), fullgraph=True)
        with torch.autocast("cuda"):
            outputs = compiled(torch.randn(1, 2, 16, 32, 32, device="cuda"))
        sum(output.float().square().mean() for output in outputs).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())

    @pytest.mark.parametrize("topology", ["dynamic", "paper"])
    def test_works_under_bfloat16_autocast(self, topology: str) -> None:
        network = ConResNet(**arguments()) if topology == "dynamic" else ConResNet.paper(2, 3)
        network.residual_outputs = network.decoder.deep_supervision = True
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # not smaller: some processors' gradients are wrong where a kernel is deeper than its input
            outputs = network(torch.randn(1, 2, 32, 32, 32))
        sum(output.float().square().mean() for output in outputs).backward()
        assert all(torch.isfinite(p.grad).all() for p in network.parameters())
