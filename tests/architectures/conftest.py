"""Outputs of the authors' published ConResNet code, and the same graph as plain functions."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class AuthorsNetwork:
    """Facts about the authors' code: parameter names and shapes, and outputs for synthetic weights and input."""

    facts: Mapping[str, Any]

    @staticmethod
    def formula(number: int, shape: list[int]) -> np.ndarray:
        """Return synthetic values from -1 to 1 for tensor number ``number``, float64."""
        index = np.arange(math.prod(shape), dtype=np.float64)
        u = np.sin(12.9898 * (index + 1) + 78.233 * (number + 1)) * 43758.5453
        return (2 * (u - np.floor(u)) - 1).reshape(shape)

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """Weights by the formula in float64, including those that no output depends on."""
        weights = {}
        for number, (name, shape) in enumerate(self.facts["parameters"]):
            values = self.formula(number, shape)
            if len(shape) > 1:
                values = 0.3 * values
            else:
                values = 1 + 0.5 * values if name.endswith("weight") else 0.5 * values
            weights[name] = torch.from_numpy(values)
        return weights

    def random_state_dict(self, input_channels: int, num_classes: int) -> dict[str, Tensor]:
        """Return random weights for another number of channels and classes, float32."""
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for name, shape in self.facts["parameters"]:
            shape = list(shape)
            if "_cls." in name:
                shape[0] = num_classes
            if name == "conv_4_32.0.weight" or "conv_mp_first" in name:
                shape[1] = input_channels
            weights[name] = torch.randn(shape, generator=generator)
        return weights

    def image(self) -> Tensor:
        """Return the input by the formula, float64."""
        return torch.from_numpy(2 * self.formula(999, self.facts["input_shape"]))

    def check_outputs(self, outputs: list[Tensor], tolerance: float) -> None:
        """Compare outputs with those of the authors' code, relative to the largest value of each output."""
        assert len(outputs) == len(self.facts["outputs"])
        points = torch.tensor(self.facts["points_b_c_z_y_x"]).T
        for output, (name, values) in zip(outputs, self.facts["outputs"].items(), strict=True):
            expected = torch.tensor(values, dtype=torch.float64)
            largest = float(expected.abs().max())
            found = output.double()[tuple(points)]
            assert float((found - expected).abs().max()) <= tolerance * largest, name
            assert abs(float(output.double().mean()) - self.facts["mean"][name]) <= tolerance * largest, name
            # the source does not state the divisor of its standard deviation; the choices differ by 1 in 10^6
            assert abs(float(output.double().std(correction=0)) - self.facts["std"][name]) <= 1e-5 * largest, name


@pytest.fixture(scope="session")
def authors() -> AuthorsNetwork:
    return AuthorsNetwork(json.loads((Path(__file__).parent / "authors_outputs.json").read_text()))


def plain_graph(w: Mapping[str, Tensor], image: Tensor) -> list[Tensor]:
    """Compute the authors' graph with PyTorch's functions on their weights, without modules or custom functions.

    ``test_plain_graph_gives_the_authors_outputs`` compares it with the authors' outputs.
    """

    def standardised(kernel: Tensor) -> Tensor:
        centred = kernel - kernel.mean((1, 2, 3, 4), keepdim=True)
        return centred / torch.sqrt(torch.var(centred.flatten(1), 1) + 1e-12).view(-1, 1, 1, 1, 1)

    def conv(name: str, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        kernel = w[f"{name}.weight"]
        return F.conv3d(x, standardised(kernel), None, stride, dilation * (kernel.shape[-1] // 2), dilation)

    def head(name: str, x: Tensor) -> Tensor:
        return F.conv3d(x, w[f"{name}.weight"], w[f"{name}.bias"])

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
    size = image.shape[2:]
    return [
        head("seg_cls.0", seg),
        head("res_cls.0", res1),
        head("resx2_cls.0", grow(res2, size)),
        head("resx4_cls.0", grow(res4, size)),
    ]


@pytest.fixture(scope="session", name="plain_graph")
def _plain_graph() -> Any:
    return plain_graph
