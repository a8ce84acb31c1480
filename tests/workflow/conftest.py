"""An experiment of two models in two folds, and stand-ins for all commands, which write the same files."""

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_conres.workflow.config import Experiment, parse_config

# Each call appends a line to calls.txt. Calls that contain the text of FAIL fail midway. Calls that contain the text of
# SLEEP stop midway too, and go on once a file called wake exists.
FAKE_COMMAND = """#!{python}
import json, os, sys, time, zipfile
from pathlib import Path

name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
call = " ".join([name, *arguments])
with open(os.environ["CALLS"], "a") as file:
    file.write(call + "\\n")
fails = bool(os.environ.get("FAIL")) and os.environ["FAIL"] in call
DATASET = "Dataset501_BraTS"
KINDS = ("raw", "preprocessed", "results")
raw, preprocessed, results = (Path(os.environ["nnUNet_" + kind]) / DATASET for kind in KINDS)
CASES = ["a", "b", "c", "d"]


def after(flag):
    return arguments[arguments.index(flag) + 1]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def save(path, **content):
    write(path, json.dumps(content))


if call.startswith("nnunet-conres brats-convert"):
    if not raw.parent.is_dir():
        sys.exit("error: nnUNet_raw does not exist")
    for case in CASES:
        write(raw / "labelsTr" / (case + ".nii.gz"), "labels")
        write(raw / "imagesTr" / (case + "_0000.nii.gz"), "image")
    for case in "xyz":
        write(raw / "imagesTs" / (case + "_0000.nii.gz"), "image")
        write(raw / "labelsTs" / (case + ".nii.gz"), "labels")
    save(raw / "dataset.json", file_ending=".nii.gz")
elif name == "nnUNetv2_extract_fingerprint":
    save(preprocessed / "dataset_fingerprint.json", cases=len(list((raw / "labelsTr").iterdir())))
elif call.startswith("nnunet-conres split"):
    folds = [dict(train=CASES[2:], val=CASES[:2]), dict(train=CASES[:2], val=CASES[2:])]
    write(preprocessed / "splits_final.json", json.dumps(folds))
elif name == "nnUNetv2_plan_experiment" or call.startswith("nnunet-conres plan"):
    fullres = dict(data_identifier="nnUNetPlans_3d_fullres", spacing=[1, 1, 1], patch_size=[8, 8, 8])
    save(preprocessed / (after("-overwrite_plans_name") + ".json"), configurations={{"3d_fullres": fullres}})
elif name == "nnUNetv2_preprocess":
    for case in CASES[:2] if fails else CASES:
        for ending in (".b2nd", ".pkl"):
            write(preprocessed / "nnUNetPlans_3d_fullres" / (case + ending), "data")
elif call.startswith("nnunet-conres memory"):
    print(json.dumps(dict(total=3 * 2**30)))
elif name == "nnUNetv2_train":
    number, configuration, fold = arguments[:3]
    folder = results / "__".join([after("-tr"), after("-p"), configuration]) / ("fold_" + fold)
    log = "2026-01-01 00:00:00.5: Epoch 0\\n2026-01-01 00:01:00.5: Epoch time: 60.0 s\\n"
    write(folder / "training_log_1.txt", log)
    with zipfile.ZipFile(folder / "checkpoint_latest.pth", "w") as archive:
        archive.writestr("weights", call)
    wake = Path(os.environ["CALLS"]).with_name("wake")
    until = time.monotonic() + 120  # should the test fail before it wakes this
    while os.environ.get("SLEEP") and os.environ["SLEEP"] in call and not wake.exists() and time.monotonic() < until:
        time.sleep(0.05)
    if not fails:
        (folder / "checkpoint_latest.pth").rename(folder / "checkpoint_final.pth")
        cases = json.loads((preprocessed / "splits_final.json").read_text())[int(fold)]["val"]
        scored = [dict(prediction_file="x/" + case + ".nii.gz") for case in cases]
        save(folder / "validation" / "summary.json", metric_per_case=scored, foreground_mean=dict(Dice=0.5))
    else:
        print("RuntimeError: CUDA out of memory")
elif name == "nnUNetv2_predict":
    output, part, parts = Path(after("-o")), int(after("-part_id")), int(after("-num_parts"))
    cases = sorted(path.name[0] for path in Path(after("-i")).iterdir())[part::parts]
    for case in cases[:1] if fails else cases:
        write(output / (case + ".nii.gz"), call)
        write(output / (case + ".npz"), call)
elif name == "nnUNetv2_ensemble":
    first = Path(after("-i"))
    for path in first.glob("*.npz"):
        write(Path(after("-o")) / (path.stem + ".nii.gz"), "ensemble")
elif call.startswith("nnunet-conres postprocess fit"):
    write(Path(after("-o")), "half" if fails else call)
elif call.startswith("nnunet-conres package"):
    folder = Path(after("-o"))
    if folder.exists():
        sys.exit("error: " + str(folder) + " exists already")
    write(folder / "Dockerfile", call)
    if not fails:
        write(folder / "model" / "plans.json", call)
elif call.startswith("nnunet-conres compare"):
    for file in ("report.html", "report.json"):
        write(Path(after("-o")) / file, call)
else:
    sys.exit("unexpected: " + call)
sys.exit(1 if fails else 0)
"""
COMMANDS = (
    "nnunet-conres",
    "nnUNetv2_extract_fingerprint",
    "nnUNetv2_plan_experiment",
    "nnUNetv2_preprocess",
    "nnUNetv2_train",
    "nnUNetv2_predict",
    "nnUNetv2_ensemble",
)


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """Return the content of the experiment's YAML configuration."""
    for folder in ("brats", "held_out"):
        (tmp_path / folder).mkdir()
    return {
        "work": "work",
        "folders": {f"nnUNet_{kind}": f"nn/{kind}" for kind in ("raw", "preprocessed", "results")},
        "data": {"id": 501, "brats": ["brats"], "held_out": ["held_out"]},
        "test": {"parts": 2},
        "models": {"stock": {}, "ours": {"trainer": "nnUNetTrainerConResNet", "plans": "nnUNetConResNetPlans"}},
        "folds": [0, 1],
        "splits": {"folds": 2},
        "device": "cpu",
        "retries": 0,
        "resources": {"default": {"cpus": 1, "memory_gb": 0.1}},
    }


@pytest.fixture
def experiment(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    experiment = parse_config(content, tmp_path)
    for variable, value in experiment.environment.items():
        monkeypatch.setenv(variable, value)
    return experiment


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Put the stand-ins on PATH; return a function that returns the calls since its last call."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in COMMANDS:
        path = folder / name
        path.write_text(FAKE_COMMAND.format(python=sys.executable))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    file = tmp_path / "calls.txt"
    file.touch()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(file))
    for variable in ("FAIL", "SLURM_JOB_ID", "nnUNet_extTrainer"):
        monkeypatch.delenv(variable, raising=False)

    def since_last() -> list[str]:
        lines = file.read_text().splitlines()
        file.write_text("")
        return lines

    return since_last
