"""Plans of the study's networks: one plans file each, on the same preprocessed data, patch and batch."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from recipe import STOCK

HERE = Path(__file__).resolve().parent


def plans_name(network: str) -> str:
    """Name of the plans of a network of runs.yaml."""
    return f"study_{network}"


def prepare_plans(study: dict[str, Any], networks: Sequence[str]) -> Path:
    """Writes the plans of networks beside the stock plans that they are made from; those that are there stay.

    Stock plans, preprocessed data and folds are made as by nnU-Net's commands where they are missing.

    Returns:
        nnU-Net's folder of the preprocessed data set.

    Raises:
        RuntimeError: If plans of such a name are there and differ, or there is no such data set.
    """
    protocol = study["protocol"]
    number, configuration = protocol["dataset"], protocol["configuration"]
    found = sorted(Path(os.environ["nnUNet_raw"]).glob(f"Dataset{number:03d}_*"))
    if len(found) != 1:
        raise RuntimeError(f"nnUNet_raw holds {len(found)} data sets {number}; expected one, in nnU-Net's raw format.")
    listed = (HERE / "cases.txt").read_text().split()
    ending = json.loads((found[0] / "dataset.json").read_text())["file_ending"]
    here = sorted(file.name.removesuffix(ending) for file in (found[0] / "labelsTr").glob(f"*{ending}"))
    if here != listed:
        missing, more = sorted(set(listed) - set(here)), sorted(set(here) - set(listed))
        raise RuntimeError(
            f"{found[0]} holds other cases than the study: {len(missing)} of cases.txt are missing ({missing[:3]} ...) "
            f"and {len(more)} are not in it ({more[:3]} ...). Give the study a data set with its cases alone."
        )
    folder = Path(os.environ["nnUNet_preprocessed"]) / found[0].name
    if not (folder / f"{protocol['plans']}.json").is_file():
        subprocess.run(["nnUNetv2_plan_and_preprocess", "-d", str(number), "-c", configuration], check=True)
    splits = folder / "splits_final.json"
    if not splits.is_file():  # those that nnU-Net's first training would make; the workflow's own would be others
        folds = generate_crossval_split(here)
        splits.write_text(json.dumps([{k: list(map(str, v)) for k, v in fold.items()} for fold in folds], indent=4))
    for network in dict.fromkeys(networks):
        plans = plans_of(study, network, study["networks"][network], folder)
        file = folder / f"{plans['plans_name']}.json"
        if file.is_file() and json.loads(file.read_text()) != plans:
            raise RuntimeError(f"{file} is there and differs from what runs.yaml asks for: rename the network.")
        if not file.is_file():
            file.write_text(json.dumps(plans, indent=4) + "\n")
    return folder


def plans_of(study: dict[str, Any], network: str, entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Plans of one network: the protocol's stock plans, with its batch.

    Args:
        study: Content of runs.yaml.
        network: Name of the network.
        entry: What runs.yaml says of it.
        folder: nnU-Net's folder of the preprocessed data set.
    """
    protocol = study["protocol"]
    configuration = protocol["configuration"]
    plans = json.loads((folder / f"{protocol['plans']}.json").read_text())
    plans["plans_name"] = plans_name(network)
    settings = plans["configurations"][configuration]
    settings["batch_size"] = protocol["batch_size"]
    trainer = entry.get("trainer", STOCK)
    if trainer != STOCK:
        maker = getattr(import_module("nnunet_conres.trainers"), trainer)
        settings["architecture"] = deepcopy(maker.architecture(PlansManager(plans).get_configuration(configuration)))
    architecture = settings["architecture"]
    architecture["network_class_name"] = entry.get("network_class", architecture["network_class_name"])
    arguments = architecture["arch_kwargs"] | entry.get("architecture", {})
    architecture["arch_kwargs"] = {name: value for name, value in arguments.items() if value != "left out"}
    return plans
