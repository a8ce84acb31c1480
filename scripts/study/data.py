"""The study's data sets: one that is given, and others made from it or made up."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import SimpleITK
from branches import make_branches
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_conres.datasets.brats import convert_brats
from nnunet_conres.datasets.phantom import write_brats_phantoms
from nnunet_conres.datasets.raw import folder_name, target_faults
from nnunet_conres.datasets.sparse import SlabRule, keep_slices
from nnunet_conres.files import write_json

HERE = Path(__file__).resolve().parent
ENDING = ".nii.gz"
MADE_BY = "study.json"  # in the folder of a data set that was made: its entry of runs.yaml


def folder_of(study: Mapping[str, Any], dataset: str) -> str:
    """What nnU-Net calls a data set of runs.yaml."""
    entry = study["datasets"][dataset]
    return folder_name(entry["id"], entry["name"])


def prepare_raw(study: Mapping[str, Any], dataset: str) -> Path:
    """Makes a data set of runs.yaml in nnUNet_raw, or checks that one that cannot be made is there.

    Data sets are made from the same ones, with the same seeds, and get their name only when complete. What one was made
    by is kept in it.

    Args:
        study: Content of runs.yaml.
        dataset: Name of the data set there.

    Returns:
        Its folder in nnUNet_raw.

    Raises:
        RuntimeError: If the data set is given and is missing, or has other cases than the study's; if one was made by
            another entry of runs.yaml, or another data set has its number.
    """
    entry = study["datasets"][dataset]
    raw = Path(os.environ["nnUNet_raw"])
    folder = raw / folder_of(study, dataset)
    if "made" not in entry:
        _check_given(folder)
        return folder
    if not folder.is_dir():
        faults = list(target_faults(raw, entry["id"], entry["name"]))
        if faults:
            raise RuntimeError(" ".join(faults))
        raw.mkdir(parents=True, exist_ok=True)
        source = prepare_raw(study, entry["from"]) if "from" in entry else None
        with tempfile.TemporaryDirectory(dir=raw, prefix=".study") as temporary:
            new = Path(temporary) / folder.name
            _MAKERS[entry["made"]](entry, source, new)
            write_json(new / MADE_BY, entry)
            new.rename(folder)
    elif json.loads((folder / MADE_BY).read_text()) != entry:
        raise RuntimeError(
            f"{folder} was made by another entry of runs.yaml; remove it, or give the data set a new id."
        )
    return folder


def copy_cases(source: Path, folder: Path) -> None:
    """Copies the study's cases of a data set that has more, as the Decathlon's Task04 has.

    Args:
        source: Folder of the larger data set, in nnU-Net's raw format.
        folder: Where to, a folder that is not there yet.

    Raises:
        RuntimeError: If that is no data set, cases are missing, or there is something in the way.
    """
    if not (source / "dataset.json").is_file():
        raise RuntimeError(f"{source} has no dataset.json; expected a data set in nnU-Net's raw format.")
    listed, here = _listed_cases(), _cases(source)
    missing = sorted(set(listed) - set(here))
    if missing:
        raise RuntimeError(f"{source} has no case {missing[0]}, and {len(missing)} of the study's are missing in all.")
    if folder.exists():
        raise RuntimeError(f"{folder} is there already.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".study") as temporary:
        new = Path(temporary) / folder.name
        for part, channel in (("imagesTr", "_0000"), ("labelsTr", "")):
            (new / part).mkdir(parents=True)
            for case in listed:
                shutil.copyfile(source / part / f"{case}{channel}{ENDING}", new / part / f"{case}{channel}{ENDING}")
        described = json.loads((source / "dataset.json").read_text())
        write_json(new / "dataset.json", described | {"numTraining": len(listed)})
        new.rename(folder)


def folds_of(folder: Path) -> list[dict[str, list[str]]]:
    """nnU-Net's folds: those that its first training of the data set would make.

    Args:
        folder: Folder of the data set in nnUNet_raw.
    """
    folds = generate_crossval_split(_cases(folder))
    return [{part: [str(case) for case in cases] for part, cases in fold.items()} for fold in folds]


def _cases(folder: Path) -> list[str]:
    ending = json.loads((folder / "dataset.json").read_text())["file_ending"]
    return sorted(file.name.removesuffix(ending) for file in (folder / "labelsTr").glob(f"*{ending}"))


def _listed_cases() -> list[str]:
    return (HERE / "cases.txt").read_text().split()


def _check_given(folder: Path) -> None:
    how = f"`study.py data FOLDER` makes {folder.name} of the Decathlon's Task04 in nnU-Net's raw format."
    if not (folder / "dataset.json").is_file():
        raise RuntimeError(f"There is no {folder}. {how}")
    listed, here = _listed_cases(), _cases(folder)
    if here != listed:
        missing, more = sorted(set(listed) - set(here)), sorted(set(here) - set(listed))
        raise RuntimeError(
            f"{folder} holds other cases than the study: {len(missing)} of cases.txt are missing ({missing[:3]} ...) "
            f"and {len(more)} are not in it ({more[:3]} ...). {how}"
        )


def _make_thick(entry: Mapping[str, Any], source: Path | None, new: Path) -> None:
    """Every so many slices of the source, from the first one on; what is between is dropped, in images and labels."""
    assert source is not None
    for part in ("imagesTr", "labelsTr"):
        (new / part).mkdir(parents=True)
        for file in sorted((source / part).glob(f"*{ENDING}")):
            # SimpleITK's slicing sets the spacing, too. Its last axis is the first of nnU-Net's arrays.
            thick = SimpleITK.ReadImage(str(file))[:, :, :: entry["every"]]
            SimpleITK.WriteImage(thick, str(new / part / file.name))
    shutil.copyfile(source / "dataset.json", new / "dataset.json")


def _make_slabs(entry: Mapping[str, Any], source: Path | None, new: Path) -> None:
    """Labels in slabs alone, but for the validation cases of one fold, which are judged on all of their slices."""
    assert source is not None
    rule = SlabRule(every=entry["every"], slab=entry["slab"])
    dense = folds_of(source)[entry["dense_fold"]]["val"]
    described = json.loads((source / "dataset.json").read_text())
    ignore = max(described["labels"].values()) + 1
    shutil.copytree(source / "imagesTr", new / "imagesTr")
    (new / "labelsTr").mkdir()
    for case in _cases(source):
        image = SimpleITK.ReadImage(str(source / "labelsTr" / f"{case}{ENDING}"))
        labels = SimpleITK.GetArrayFromImage(image)
        if case not in dense:
            labels = keep_slices(labels, 0, rule.annotated_slices(case, len(labels)), ignore)
        sparse = SimpleITK.GetImageFromArray(labels)
        sparse.CopyInformation(image)
        SimpleITK.WriteImage(sparse, str(new / "labelsTr" / f"{case}{ENDING}"))
    described["labels"]["ignore"] = ignore
    write_json(new / "dataset.json", described)


def _make_tumours(entry: Mapping[str, Any], source: Path | None, new: Path) -> None:
    """Made-up brain tumours, with BraTS's regions, of the quickstart's size."""
    brats = new.parent / "brats"
    made = write_brats_phantoms(
        brats,
        training_cases=entry["cases"],
        held_out_cases=0,
        shape=entry["shape"],
        spacing=entry["spacing"],
        seed=0,
    )
    convert_brats(
        [made.training],
        entry["id"],
        dataset_name=entry["name"],
        image_mode="copy",
        raw_folder=new.parent,
        progress=False,
    )


def _make_branches(entry: Mapping[str, Any], source: Path | None, new: Path) -> None:
    """Made-up trees of thin vessels, with bulbs on some of them."""
    for part in ("imagesTr", "labelsTr"):
        (new / part).mkdir(parents=True)
    for number in range(entry["cases"]):
        image, labels = make_branches(entry["shape"], (0, number))
        for part, channel, volume in (("imagesTr", "_0000", image), ("labelsTr", "", labels)):
            file = new / part / f"tree_{number:03d}{channel}{ENDING}"
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume), str(file))
    described = {
        "channel_names": {"0": "image"},
        "labels": {"background": 0, "vessel": 1, "bulb": 2},
        "numTraining": entry["cases"],
        "file_ending": ENDING,
    }
    write_json(new / "dataset.json", described)


_MAKERS: dict[str, Callable[[Mapping[str, Any], Path | None, Path], None]] = {
    "thick": _make_thick,
    "slabs": _make_slabs,
    "tumours": _make_tumours,
    "branches": _make_branches,
}
