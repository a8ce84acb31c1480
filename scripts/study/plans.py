"""Plans of the study's networks: one plans file each, on the same preprocessed data, patch and batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

from data import folds_of, prepare_raw
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from recipe import STOCK
from runs import Setting, plans_name

from nnunet_conres.files import write_json


def prepare_plans(study: dict[str, Any], networks: Sequence[str], setting: Setting) -> Path:
    """Writes the plans of networks beside the stock plans that they are made from; those that are there stay.

    The data set, stock plans, preprocessed data and folds are made where they are missing, plans and preprocessed data
    by nnU-Net's command.

    Args:
        study: Content of runs.yaml.
        networks: Names of networks there.
        setting: Data set and batch.

    Returns:
        nnU-Net's folder of the preprocessed data set.

    Raises:
        RuntimeError: If plans of such a name or folds are there and differ, or there is no such data set.
    """
    protocol = study["protocol"]
    raw = prepare_raw(study, setting.dataset)
    folder = Path(os.environ["nnUNet_preprocessed"]) / raw.name
    if not (folder / f"{protocol['plans']}.json").is_file():
        number = str(study["datasets"][setting.dataset]["id"])
        # beside the interpreter, whose environment may not be activated
        command = shutil.which("nnUNetv2_plan_and_preprocess", path=str(Path(sys.executable).parent))
        arguments = ["-d", number, "-c", protocol["configuration"], "-np", "2"]
        subprocess.run([command or "nnUNetv2_plan_and_preprocess", *arguments], check=True)
    splits, folds = folder / "splits_final.json", folds_of(raw)
    if not splits.is_file():  # the workflow's own would be others
        write_json(splits, folds)
    elif json.loads(splits.read_text()) != folds:
        raise RuntimeError(f"{splits} has other folds than nnU-Net makes of these cases, which are the study's.")
    for network in dict.fromkeys(networks):
        plans = plans_of(study, network, study["networks"][network], folder, setting.batch_size)
        file = folder / f"{plans['plans_name']}.json"
        if file.is_file() and json.loads(file.read_text()) != plans:
            raise RuntimeError(f"{file} is there and differs from what runs.yaml asks for: rename the network.")
        if not file.is_file():
            write_json(file, plans)
    return folder


def plans_of(
    study: dict[str, Any], network: str, entry: dict[str, Any], folder: Path, batch_size: int
) -> dict[str, Any]:
    """Plans of one network: the protocol's stock plans, with another batch.

    Args:
        study: Content of runs.yaml.
        network: Name of the network.
        entry: What runs.yaml says of it.
        folder: nnU-Net's folder of the preprocessed data set.
        batch_size: Patches per step.
    """
    protocol = study["protocol"]
    configuration = protocol["configuration"]
    plans = json.loads((folder / f"{protocol['plans']}.json").read_text())
    plans["plans_name"] = plans_name(study, network, batch_size)
    settings = plans["configurations"][configuration]
    settings["batch_size"] = batch_size
    trainer = entry.get("trainer", STOCK)
    if trainer != STOCK:
        maker = getattr(import_module("nnunet_conres.trainers"), trainer)
        settings["architecture"] = deepcopy(maker.architecture(PlansManager(plans).get_configuration(configuration)))
    architecture = settings["architecture"]
    architecture["network_class_name"] = entry.get("network_class", architecture["network_class_name"])
    arguments = architecture["arch_kwargs"] | entry.get("architecture", {})
    architecture["arch_kwargs"] = {name: value for name, value in arguments.items() if value != "left out"}
    return plans
