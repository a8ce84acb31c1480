"""Checks of a training before nnU-Net creates a folder, so that a refusal leaves nothing to clean up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_conres.errors import InputError
from nnunet_conres.nnunet import PREPROCESSED, Model, folder_from_environment
from nnunet_conres.plans.configurations import configuration_of, differences_in_topology
from nnunet_conres.text import no_device


def check_device(device: torch.device) -> None:
    """Refuse a device that is not available.

    Raises:
        InputError: If torch can't use it.
    """
    for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        if device.type == kind and not backend.is_available():
            raise InputError(no_device(kind, "train"))


def check_is_3d(configuration: ConfigurationManager, name: str, network: str) -> None:
    """Refuse 2D configurations.

    Raises:
        InputError: If the patch is 2D.
    """
    patch_size = [int(extent) for extent in configuration.patch_size]
    if len(patch_size) != 3:
        raise InputError(
            f"{network} supports 3D configurations only, but configuration {name} is 2D (patch {patch_size}). Use a 3D "
            f"configuration such as 3d_fullres, or a stock trainer such as nnUNetTrainer."
        )


def check_slice_axis(configuration: ConfigurationManager, name: str, network: str) -> None:
    """Refuse 3D configurations whose patch has no two slices to compute residuals from.

    Raises:
        InputError: If the patch is a single slice.
    """
    patch_size = [int(extent) for extent in configuration.patch_size]
    slice_axis = configuration.network_arch_init_kwargs.get("slice_axis", 0)
    if patch_size[slice_axis] < 2:
        raise InputError(
            f"{network} learns from differences between slices, but the patch {patch_size} of configuration {name} is "
            f"a single slice. Plan a patch of at least 2 slices along axis {slice_axis}."
        )


def check_network(architecture: Mapping[str, Any], name: str) -> None:
    """Refuse an architecture that the network's constructor refuses.

    Raises:
        InputError: With the constructor's own message.
    """
    try:
        with torch.device("meta"):  # shapes only: no memory, no time
            get_network_from_plans(
                architecture["network_class_name"],
                architecture["arch_kwargs"],
                architecture["_kw_requires_import"],
                input_channels=1,
                output_channels=2,
                deep_supervision=True,
            )
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The network that configuration {name} asks for can't be built: {error} Its architecture in the plans: "
            f"{architecture['network_class_name']}."
        ) from error


def check_preprocessed(plans: dict[str, Any], configuration: str) -> None:
    """Refuse to train on data that were not preprocessed for these plans.

    Raises:
        InputError: If the folder with the data is missing.
    """
    root = folder_from_environment(PREPROCESSED)
    if root is None:
        return  # nnU-Net reports this itself
    folder = root / plans["dataset_name"] / configuration_of(plans, configuration).data_identifier
    if not folder.is_dir():
        raise InputError(
            f"There are no preprocessed data for configuration {configuration}: {folder} does not exist. Run: "
            f"nnUNetv2_preprocess -d {plans['dataset_name']} -plans_name {plans['plans_name']} -c {configuration}"
        )


def as_in_other_folds(
    entries: dict[str, Any], trainer: str, plans: dict[str, Any], configuration: str, fold: int | str
) -> dict[str, Any]:
    """Return the entries of a fold, with the values that other folds of the same model were trained with.

    All folds share one plans.json, from which the network is rebuilt for prediction. A fold trained after a default
    changed would change the predictions of the earlier folds.

    Args:
        entries: Entries of the configuration that the trainer would write.
        trainer: Name of the trainer.
        plans: The plans.
        configuration: Name of the configuration.
        fold: The fold to train.

    Raises:
        InputError: If other folds were trained with another network.
    """
    model = Model(trainer, plans["plans_name"], configuration).folder(plans["dataset_name"])
    if model is None:
        return entries  # nnU-Net reports this itself
    trained = sorted({path.parent.name for path in model.glob("fold_*/checkpoint_*.pth")} - {f"fold_{fold}"})
    if not trained or not (model / "plans.json").is_file():
        return entries
    existing = configuration_of(load_json(str(model / "plans.json")), configuration).configuration
    different = differences_in_topology(existing["architecture"], entries["architecture"])
    if different:
        raise InputError(
            f"{', '.join(trained)} in {model} were trained with another network than this fold would be: "
            f"{'; '.join(different)}. All folds of a model share one plans.json. Train all folds with the plans "
            f"of the existing ones, use another plans name, or move the existing folds away."
        )
    return entries | {key: existing[key] for key in entries if key != "batch_size"}
