"""The data sets of the study: cropped, downsampled, planned by nnU-Net, optionally with a smaller patch and network.

An entry "data" of a list of runs:

    source          folder of the raw data set, within the folder of --source
    id              number of the new data set
    crop            share of rows and columns to keep, around the centre (default: 1)
    thin            factor by which rows and columns are downsampled: images by the mean of a block, labels by its
                    majority (default: 1)
    patch           patch, in nnU-Net's order of axes; the topology follows nnU-Net's rule (default: nnU-Net's plans)
    features        features of the first stage (default: 32, nnU-Net's)
    patches         further patches, added by `nnunet-conres variants`
    group           regular expression for the patient in a case id, as in `nnunet-conres split` (default: the id)
    picked          number of cases, the first by id, that fold 2 holds out
    sparse          number of a second data set with one slab of 2 in 10 slices annotated, by `nnunet-conres sparsify`

Fold 0 trains on one half of the patients and is validated on the other half; fold 1 swaps the halves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from nnunet_conres.errors import InputError

PLANS = ("nnUNetPlans", "nnUNetResEncUNetMPlans")
SPARSE_EVERY = 10
DEFAULTS: dict[str, Any] = {
    "crop": 1,
    "thin": 1,
    "patch": None,
    "features": 32,
    "patches": [],
    "group": None,
    "picked": 0,
    "sparse": None,
}


def names(data: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the data sets to make, by kind."""
    name = data["source"].partition("_")[2]
    found = {"dense": f"Dataset{data['id']:03d}_{name}"}
    return found | ({"sparse": f"Dataset{data['sparse']:03d}_{name}Sparse"} if data["sparse"] else {})


def check(data: Mapping[str, Any], source: Path, work: Path) -> None:
    """Check that the source exists, and that the work folder was not made from other data.

    Raises:
        InputError: If the source is missing, or the folder was made from other data.
    """
    done = work / "data.json"
    if done.is_file() and json.loads(done.read_text()) != data:
        raise InputError(f"{done} was made from other data than the list has; use those, or another --work.")
    if not (source / data["source"] / "dataset.json").is_file():
        raise InputError(f"There is no data set {source / data['source']}; --source says where the raw data sets are.")


def prepare(data: Mapping[str, Any], source: Path, work: Path, processes: int = 1) -> None:
    """Make the data sets, plans, folds and preprocessed cases; resume after an interruption.

    Args:
        data: The entry "data" with all defaults.
        source: Folder of raw data sets.
        work: Folder for all files, nnU-Net's three folders among them.
        processes: Number of processes.

    Raises:
        InputError: If a label lies outside the crop.
    """
    done, prepared = work / "data.json", work / "prepared"
    if prepared.is_file():
        return
    done.write_text(json.dumps(data))
    # slow to import, and they read nnU-Net's folders on import
    from nnunet_conres.datasets.sparse import SlabRule, sparsify
    from nnunet_conres.datasets.splits import split
    from nnunet_conres.planning.variants import add_variants

    raw, preprocessed, made = work / "nnUNet_raw", work / "nnUNet_preprocessed", names(data)
    for kind, name in made.items():
        if (preprocessed / name / "complete").is_file():
            continue
        for folder in (raw / name, preprocessed / name):
            shutil.rmtree(folder, ignore_errors=True)
        if kind == "dense":
            reduce_raw(source / data["source"], raw / name, data["crop"], data["thin"])
        else:
            sparsify(made["dense"], data["sparse"], SlabRule(every=SPARSE_EVERY), target_name=name[11:])
        _plan_and_preprocess(name, data, processes)
        for patch in data["patches"] if kind == "dense" else []:
            add_variants(name, PLANS[0], [patch])
        (preprocessed / name / "complete").touch()
    folds = split(made["dense"], folds=2, balance="volume", group=data["group"], force=True, progress=False).path
    entries = json.loads(folds.read_text())[:2]
    if data["picked"]:
        cases = sorted(entries[0]["train"] + entries[0]["val"])
        entries.append({"train": cases[data["picked"] :], "val": cases[: data["picked"]]})
    for name in made.values():
        (preprocessed / name / folds.name).write_text(json.dumps(entries, indent=1))
    prepared.touch()


def _plan_and_preprocess(name: str, data: Mapping[str, Any], processes: int) -> None:
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
        nnUNetPlannerResEncM,
    )
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprint_dataset,
        plan_experiment_dataset,
        preprocess_dataset,
    )
    from nnunetv2.paths import nnUNet_preprocessed

    number = int(name[7:10])
    extract_fingerprint_dataset(number, num_processes=processes)
    for planner in (ExperimentPlanner, nnUNetPlannerResEncM):
        plan_experiment_dataset(number, planner)
    for plans_name in PLANS:
        file = Path(nnUNet_preprocessed, name, f"{plans_name}.json")
        file.write_text(
            json.dumps(reduce_plans(json.loads(file.read_text()), data["patch"], data["features"]), indent=1)
        )
    preprocess_dataset(number, PLANS[0], ("3d_fullres",), [processes])


def reduce_plans(plans: Mapping[str, Any], patch: Sequence[int] | None, features: int) -> dict[str, Any]:
    """Return plans with only the full resolution, another patch and other features.

    The topology follows nnU-Net's rule.
    """
    from nnunet_conres.planning.variants import derive_architecture

    entry = deepcopy(plans["configurations"]["3d_fullres"])
    entry["architecture"]["arch_kwargs"]["features_per_stage"] = [features]
    entry["architecture"], patch = derive_architecture(
        entry["architecture"], entry["spacing"], patch or entry["patch_size"]
    )
    return {**plans, "configurations": {"3d_fullres": entry | {"patch_size": list(patch)}}}


def reduce_raw(source: Path, target: Path, crop: float, thin: int) -> None:
    """Make a cropped and downsampled data set in NIfTI.

    Args:
        source: Folder of a raw data set with NIfTI files, slices along the last axis.
        target: Folder of the new data set; a link to the source if nothing changes.
        crop: Share of rows and columns to keep.
        thin: Factor by which rows and columns are downsampled.

    Raises:
        InputError: If a label lies outside the crop.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if crop == 1 and thin == 1:
        target.unlink(missing_ok=True)
        target.symlink_to(source.resolve(), target_is_directory=True)
        return
    for name in ("imagesTr", "labelsTr"):
        (target / name).mkdir(parents=True)
        for file in sorted((source / name).glob("*.nii.gz")):
            volume = nibabel.load(file)
            array = np.asanyarray(volume.dataobj)
            kept = _kept(array.shape, crop, thin)
            affine = volume.affine.copy()
            affine[:3, 3] = (volume.affine @ [*(of.start + (thin - 1) / 2 for of in kept), 0, 1])[:3]
            affine[:3, :2] *= thin
            if name == "labelsTr":
                if (array[kept] > 0).sum() != (array > 0).sum():
                    raise InputError(f"{file} has labels outside the central {crop:g} of its rows and columns.")
                array = majority(array[kept], thin).astype(np.uint8)
            else:
                array = _blocks(array[kept], thin).mean((1, 3)).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(array, affine), target / name / file.name)
    shutil.copyfile(source / "dataset.json", target / "dataset.json")


def _kept(shape: Sequence[int], crop: float, thin: int) -> tuple[slice, slice]:
    extents = [min(extent // thin, round(crop * extent / thin)) * thin for extent in shape[:2]]
    first, second = ((whole - extent) // 2 for whole, extent in zip(shape, extents, strict=False))
    return slice(first, first + extents[0]), slice(second, second + extents[1])


def _blocks(array: np.ndarray, thin: int) -> np.ndarray:
    rows, columns, *rest = array.shape
    return array.reshape(rows // thin, thin, columns // thin, thin, *rest)


def majority(labels: np.ndarray, thin: int) -> np.ndarray:
    """Return the most frequent label of every block of rows and columns; of equally frequent ones the lowest.

    Args:
        labels: Label map, three axes.
        thin: Number of rows and columns of a block.
    """
    values = np.unique(labels)
    counts = np.stack([_blocks(labels == value, thin).sum((1, 3)) for value in values])
    return values[counts.argmax(0)]
