import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nnunet_conres.architectures.conresnet import ConResNet

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# Where Python looks for modules when it is given a script of either folder.
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "study")]


@pytest.fixture
def network_of() -> Callable[..., ConResNet]:
    """Makes a small network for two image channels and three labels, in a form of the study, with a stream or without,
    and with further arguments of ConResNet.

    Kernels are flat at full resolution, as in plans of thick slices. Its weights are the same each time.
    """

    def make(form: str | None, stream: bool, **arguments: Any) -> ConResNet:
        import forms

        change: Any = getattr(forms, form) if form else forms.Form
        torch.manual_seed(0)
        network = ConResNet(
            input_channels=2 * change.inputs_per_channel,
            n_stages=3,
            features_per_stage=[8, 16, 16],
            conv_op=nn.Conv3d,
            kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]],
            strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]],
            num_classes=3,
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=True,
            residual_outputs=True,
            residual_stream=stream,
            **arguments,
        )
        network.apply(network.initialize)
        change.change(network)
        return network

    return make
