"""Models trained with earlier versions predict the same: what their plans.json says, and logits recorded then.

None of this may change. A new default gets a new constructor argument, whose value for plans that lack it is the old
behaviour.
"""

import math
from typing import Any

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_conres import trainers

# The architecture entries of saved plans, and eight logits of the network below: version, trainer, plans, logits.
DYNAMIC_0_1_0: dict[str, Any] = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 16],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
    "residual_input": "decoder",
    "slice_axis": 0,
    "topology": "dynamic",
    "n_blocks_per_stage": [1, 1, 1],
    "n_conv_per_stage_decoder": [1, 1],
}
PAPER_0_1_0: dict[str, Any] = {
    "n_stages": 4,
    "features_per_stage": [32, 64, 128, 256],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    "topology": "paper",
    "residual_input": "decoder",
    "slice_axis": 0,
}
RECORDED = {
    "0.1.0 nnUNetTrainerConResNet": (
        DYNAMIC_0_1_0,
        [-0.272324, -0.122453, -0.172668, 1.751148, 1.748228, 1.673341, -0.810094, -0.766622],
    ),
    "0.1.0 nnUNetTrainerConResNetSharedEncoder": (
        DYNAMIC_0_1_0 | {"residual_input": "shared_encoder"},
        [-0.569252, -0.182901, -0.1454, -0.974852, -0.980706, -0.875624, -1.231285, -1.443176],
    ),
    "0.1.0 nnUNetTrainerConResNetPaper": (
        PAPER_0_1_0,
        [-86.353899, -159.059239, -139.992986, 244.033127, 274.196362, 155.329018, -331.297559, -327.946647],
    ),
}


def saved_model(trainer: str, arguments: dict[str, Any]) -> torch.nn.Module:
    """The network as nnU-Net rebuilds it for prediction, with weights that are computed, not drawn."""
    imports = [name for name in ("conv_op", "norm_op", "dropout_op", "nonlin") if name in arguments]
    architecture = {
        "network_class_name": "nnunet_conres.architectures.conresnet.ConResNet",
        "arch_kwargs": arguments,
        "_kw_requires_import": imports,
    }
    plans = PlansManager({"configurations": {"3d_fullres": {"patch_size": [8, 8, 8], "architecture": architecture}}})
    network = getattr(trainers, trainer).build_network_architecture(
        plans, plans.get_configuration("3d_fullres"), 2, 3, enable_deep_supervision=False
    )
    state = network.state_dict()
    for number, (name, tensor) in enumerate(sorted(state.items())):
        positions = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
        state[name] = (torch.sin(positions * 0.7 + number) / math.sqrt(max(1, tensor[0].numel()))).float()
    network.load_state_dict(state)
    return network.eval()


@pytest.mark.parametrize("case", RECORDED)
def test_predicts_what_it_did(case: str) -> None:
    arguments, recorded = RECORDED[case]
    image = torch.cos(torch.arange(2 * 8 * 8 * 8, dtype=torch.float64) * 0.37).float().view(1, 2, 8, 8, 8)
    with torch.no_grad():
        logits = saved_model(case.split()[1], arguments)(image)
    picked = logits.flatten()[:: logits.numel() // 8][:8]
    torch.testing.assert_close(picked, torch.tensor(recorded), rtol=1e-4, atol=1e-5)
