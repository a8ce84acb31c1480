"""Checkpoints of the authors' published ConResNet code, loaded into `ConResNetPaper`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from nnunet_conres.architectures.conresnet_paper import FEATURES, ConResNetPaper
from nnunet_conres.architectures.network import listing

# The authors' names and ours. Their module has layers that no output depends on. These are listed by name, so that any
# other unknown name is an error.
_AUTHORS_CONV = {"gn_seg": "segmentation.norm", "conv_seg": "segmentation.conv", "conv_res": "feature_residual"} | {
    "gn_res1": "merge.norm",
    "conv_res1": "merge.conv",
}
_AUTHORS_LEVELS = {
    "seg_x4": (0, {"conv_mp_first": "project"}),
    "seg_x2": (1, {"gn_mp": "project.norm", "conv_mp": "project.conv"}),
    "seg_x1": (2, {}),
}
_AUTHORS_UNUSED = re.compile(
    r"seg_x[124]\.0\.((gn_res|gn_res2)\.(weight|bias)|conv_res2\.weight)"
    r"|seg_x[14]\.0\.(gn_mp\.(weight|bias)|conv_mp\.weight)"
    r"|seg_x[12]\.0\.conv_mp_first\.weight"
)


def _authors_modules() -> dict[str, str]:
    """Return our module names by the authors' module names, without .weight and .bias."""
    names = {
        "conv_4_32.0": "encoder.stem",
        "fusionConv.0": "encoder.fusion.norm",
        "fusionConv.3": "encoder.fusion.conv",
    }
    for stage in range(1, len(FEATURES)):
        theirs = f"conv_{FEATURES[stage - 1]}_{FEATURES[stage]}"
        names[f"{theirs}.0"] = f"encoder.stages.{stage}.0.norm"
        names[f"{theirs}.2"] = f"encoder.stages.{stage}.0.conv"
    for layer, (stage, first, n_blocks) in enumerate([(0, 0, 1), (1, 1, 2), (2, 1, 2), (3, 1, 2), (3, 3, 2)]):
        for block in range(n_blocks):
            for number in (1, 2):
                ours = f"encoder.stages.{stage}.{first + block}.conv{number}"
                names[f"layer{layer}.{block}.gn{number}"] = f"{ours}.norm"
                names[f"layer{layer}.{block}.conv{number}"] = f"{ours}.conv"
    for theirs, (level, projection) in _AUTHORS_LEVELS.items():
        for name, ours in (_AUTHORS_CONV | projection).items():
            names[f"{theirs}.0.{name}"] = f"decoder.stages.{level}.{ours}"
    heads = {"seg_cls": "segmentation.0", "resx4_cls": "residual.0", "resx2_cls": "residual.1", "res_cls": "residual.2"}
    return names | {f"{theirs}.0": f"decoder.seg_layers.{ours}" for theirs, ours in heads.items()}


def from_authors_state_dict(
    state_dict: Mapping[str, Tensor] | str | os.PathLike[str], residual_outputs: bool = False
) -> ConResNetPaper:
    """Build the paper topology from a checkpoint of the authors' published code.

    Args:
        state_dict: State dictionary of the authors' network, or the path of a file that contains one (read with
            ``torch.load(weights_only=True)``, so that it cannot run code). Keys may have a ``module.`` prefix. Layers
            that no output of the authors' network depends on are left out.
        residual_outputs: Passed on to ``ConResNetPaper``.

    Returns:
        The network in evaluation mode and in the checkpoint's floating-point type. It computes the same function as the
        authors' network.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a file contains anything but tensors, or entries are missing, unknown or of the wrong shape; the
            message names them.

    Example:
        >>> network = from_authors_state_dict("conresnet_brats.pth")  # doctest: +SKIP
    """
    if isinstance(state_dict, (str, os.PathLike)):
        try:
            state_dict = torch.load(state_dict, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # an unpickler may raise anything for invalid bytes
            raise ValueError(
                f"{state_dict} is not a state dictionary that can be read safely (torch.load with weights_only=True). "
                f"Expected a file written with torch.save(network.state_dict(), ...)."
            ) from error
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"Expected a state dictionary of name and tensor, got {type(state_dict).__name__}.")

    modules = _authors_modules()
    renamed: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for full_name, tensor in state_dict.items():
        name = full_name.removeprefix("module.")
        if _AUTHORS_UNUSED.fullmatch(name):
            continue
        module, _, parameter = name.rpartition(".")
        known = module in modules and parameter in ("weight", "bias") and isinstance(tensor, Tensor)
        ours = f"{modules[module]}.{parameter}" if known else ""
        if known and ours not in renamed:  # a name with and without the prefix is a duplicate
            renamed[ours] = tensor
        else:
            unexpected.append(full_name)

    problems = [listing("of the checkpoint are not known", unexpected, most=10)]
    stem, head = renamed.get("encoder.stem.weight"), renamed.get("decoder.seg_layers.segmentation.0.weight")
    # The shapes of stem and head determine the numbers of channels and classes.
    network = ConResNetPaper(
        input_channels=stem.shape[1] if stem is not None and stem.ndim == 5 else 4,
        num_classes=head.shape[0] if head is not None and head.ndim == 5 else 3,
        residual_outputs=residual_outputs,
    )
    own = network.state_dict()
    theirs = {ours: name for name, ours in modules.items()}

    def authors_name(name: str) -> str:
        module, _, parameter = name.rpartition(".")
        return f"{theirs[module]}.{parameter}"

    problems.append(
        listing("are missing in the checkpoint", [authors_name(k) for k in own if k not in renamed], most=10)
    )
    wrong_shapes = [
        f"{authors_name(k)} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
        for k, v in renamed.items()
        if k in own and v.shape != own[k].shape
    ]
    problems.append(listing("have another shape", wrong_shapes, most=10))
    # a bias where the authors' layer has none
    problems.append(listing("are not known", [authors_name(k) for k in renamed if k not in own], most=10))
    if any(problems):
        raise ValueError("This is not a checkpoint of the authors' ConResNet. " + " ".join(p for p in problems if p))
    network.to(renamed["encoder.stem.weight"].dtype).load_state_dict(renamed)
    return network.eval()
