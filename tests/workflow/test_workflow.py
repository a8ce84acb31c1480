"""The workflow itself, on this machine: with stand-ins for all commands, and once with the real ones."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_conres import cli
from nnunet_conres.locks import hold
from nnunet_conres.workflow import commands
from nnunet_conres.workflow.config import parse_config, read_config
from nnunet_conres.workflow.launch import job_name

yaml = pytest.importorskip("yaml", reason="needs PyYAML: pip install 'nnunet-conres[workflow]'")
pytest.importorskip("snakemake", reason="needs Snakemake: pip install 'nnunet-conres[workflow]'")

TRAINERS = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.trainers import nnUNetTrainerConResNet


class TinyStock(nnUNetTrainer):
    def initialize(self):
        super().initialize()
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1


class TinyConResNet(nnUNetTrainerConResNet):
    training_epochs = 1

    def initialize(self):
        super().initialize()
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 1
"""


def run(config: Path, *options: str, check: bool = True, timeout: float = 300) -> str:
    """Run `nnunet-conres workflow` in a separate process and return its output."""
    command = [sys.executable, "-m", "nnunet_conres.cli", "workflow", str(config), *options]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ, timeout=timeout
    )
    assert (done.returncode == 0) == check, done.stdout[-5000:]
    return done.stdout


def as_yaml(content: dict[str, Any]) -> str:
    # the first model is the baseline, so the order counts
    return yaml.safe_dump(content, sort_keys=False)


def start(config: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "nnunet_conres.cli", "workflow", str(config), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)


def wait_for(there: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def snakemakes(config: Path) -> list[int]:
    """Return the ids of Snakemake's processes for an experiment, without those of its jobs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode().split("\0")
            if "snakemake" in words and str(config) in words and "--mode" not in words:
                found.append(int(path.parent.name))
    return found


def dry_run(config: Path, *options: str) -> dict[str, list[str]]:
    """Return Snakemake's description of every job it would run, by rule."""
    jobs: dict[str, list[str]] = {}
    for block in run(config, "--dry-run", "--printshellcmds", *options).split("\n\n"):
        if found := re.search(r"^(?:local)?rule (\w+):", block, re.MULTILINE):
            jobs.setdefault(found[1], []).append(block)
    return jobs


def resources_of(job: str) -> list[str]:
    (line,) = re.findall(r"^ +resources: (.*)$", job, re.MULTILINE)
    return line.split(", ")


@pytest.fixture
def config(content: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(as_yaml(content))
    return path


def kinds(calls: list[str]) -> list[str]:
    return sorted(
        {" ".join(call.split()[:2]) if call.startswith("nnunet-conres") else call.split()[0] for call in calls}
    )


class TestWithStandIns:
    def test_texts_that_snakemake_has_a_meaning_for(
        self, config: Path, content: dict[str, Any], tmp_path: Path, calls: Callable[[], list[str]]
    ) -> None:
        group, folder = "^(.{3})_{model}", "bra{fold}ts <work> 'a'"
        (tmp_path / folder).mkdir()
        (tmp_path / "{part}.csv").touch()
        content["data"]["brats"] = [folder]
        content["splits"] |= {"group": group, "grades": "{part}.csv"}
        config.write_text(as_yaml(content))
        run(config, "--cores", "1", "--until", "split")
        convert, split = (call for call in calls() if call.startswith("nnunet-conres"))
        assert f"-i {tmp_path / folder} -d 501" in convert
        assert split.endswith(f"--group {group} --grades {tmp_path / '{part}.csv'}")

    @pytest.mark.parametrize("options", [["--dry-run"], ["-n"], ["--summary"]])
    def test_a_dry_run_leaves_nothing(
        self,
        config: Path,
        content: dict[str, Any],
        tmp_path: Path,
        calls: Callable[[], list[str]],
        options: list[str],
    ) -> None:
        content["work"] = "new/work"
        config.write_text(as_yaml(content))
        before = set(tmp_path.rglob("*"))
        run(config, *options)
        assert set(tmp_path.rglob("*")) == before
        assert calls() == []

    def test_everything_once_and_then_only_what_changed(
        self, config: Path, content: dict[str, Any], tmp_path: Path, calls: Callable[[], list[str]]
    ) -> None:
        # a folder name that a shell would split in two
        content |= {"work": "my work", "postprocess": True, "package": {"models": "ours"}}
        config.write_text(as_yaml(content))
        run(config, "--cores", "2")
        made = calls()
        assert len([call for call in made if call.startswith("nnUNetv2_train")]) == 4
        assert len([call for call in made if call.startswith("nnUNetv2_predict")]) == 4
        assert kinds(made) == [
            "nnUNetv2_ensemble",
            "nnUNetv2_extract_fingerprint",
            "nnUNetv2_plan_experiment",
            "nnUNetv2_predict",
            "nnUNetv2_preprocess",
            "nnUNetv2_train",
            "nnunet-conres brats-convert",
            "nnunet-conres compare",
            "nnunet-conres memory",
            "nnunet-conres package",
            "nnunet-conres plan",
            "nnunet-conres postprocess",
            "nnunet-conres split",
        ]
        assert len([call for call in made if call.startswith("nnunet-conres postprocess")]) == 2
        compared = [call for call in made if call.startswith("nnunet-conres compare")]
        assert all(f"ours={tmp_path}/my work/postprocessing/ours.json" in call for call in compared)
        assert len([call for call in made if call.startswith("nnUNetv2_preprocess")]) == 1  # shared by both plans
        asked = [call.split() for call in made if call.startswith("nnunet-conres memory")]
        assert sorted(call[call.index("-tr") + 1] for call in asked) == ["nnUNetTrainer", "nnUNetTrainerConResNet"]
        order = [call.split()[0] for call in made]
        split = next(number for number, call in enumerate(made) if call.startswith("nnunet-conres split"))
        assert split < order.index("nnUNetv2_train")

        assert "Nothing to be done" in run(config, "--cores", "2")
        assert calls() == []

        # new plans of one model: its trainings and everything that depends on them run again, the other model's do not
        experiment = parse_config(content, tmp_path)
        plans = experiment.preprocessed / "nnUNetConResNetPlans.json"
        plans.write_text(plans.read_text().replace("[8, 8, 8]", "[16, 8, 8]"))
        run(config, "--cores", "2")
        # steps see the models in the configuration's order, which determines the name of an ensemble
        noted = json.loads((experiment.records / "experiment.json").read_text())
        assert list(noted["content"]["models"]) == ["stock", "ours"]
        again = calls()
        assert {call.split()[5] for call in again if call.startswith("nnUNetv2_train")} == {"nnUNetTrainerConResNet"}
        assert kinds(again) == [
            "nnUNetv2_ensemble",
            "nnUNetv2_predict",
            "nnUNetv2_train",
            "nnunet-conres compare",
            "nnunet-conres memory",
            "nnunet-conres package",
            "nnunet-conres postprocess",
        ]
        assert [call.split()[6] for call in again if "postprocess fit" in call] == ["nnUNetTrainerConResNet"]
        assert all("nnUNetTrainerConResNet" in call for call in again if call.startswith("nnUNetv2_predict"))

    @pytest.mark.slow
    def test_a_second_workflow_finds_all_done(
        self, config: Path, content: dict[str, Any], tmp_path: Path, calls: Callable[[], list[str]]
    ) -> None:
        run(config, "--cores", "2", "--until", "train")
        calls()
        other = tmp_path / "other.yaml"
        other.write_text(as_yaml(content | {"work": "other_work"}))
        run(other, "--cores", "2", "--until", "train")
        assert kinds(calls()) == ["nnunet-conres memory"]

    def test_two_at_once_on_one_data_set_share_the_work(
        self, config: Path, content: dict[str, Any], tmp_path: Path, calls: Callable[[], list[str]]
    ) -> None:
        other = tmp_path / "other.yaml"
        other.write_text(as_yaml(content | {"work": "other_work"}))
        processes = [start(one, "--cores", "2", "--until", "train") for one in (config, other)]
        reported = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], reported
        # except for memory, which each workflow estimates itself
        made = [call for call in calls() if not call.startswith("nnunet-conres memory")]
        assert len(set(made)) == len(made)
        assert len([call for call in made if call.startswith("nnUNetv2_train")]) == 4

    @pytest.mark.slow
    def test_a_changed_trainer_and_a_changed_data_set(
        self, config: Path, content: dict[str, Any], tmp_path: Path, calls: Callable[[], list[str]]
    ) -> None:
        trainer = tmp_path / "trainers" / "mine.py"
        trainer.parent.mkdir()
        trainer.write_text("class Mine: ...")
        content["environment"] = {"nnUNet_extTrainer": str(trainer.parent)}
        content["models"] = {"stock": {}, "mine": {"trainer": "Mine"}}
        config.write_text(as_yaml(content))
        run(config, "--cores", "2", "--until", "train")
        calls()
        trainer.write_text("class Mine:\n    initial_lr = 1e-3")
        run(config, "--cores", "2", "--until", "train")
        again = calls()
        assert [call.split()[0] for call in again] == ["nnUNetv2_train"] * 2
        assert all("-tr Mine" in call and not call.endswith("--c") for call in again)

        labels = parse_config(content, tmp_path).raw / "labelsTr" / "a.nii.gz"
        labels.write_text("corrected")
        run(config, "--cores", "2", "--until", "train")
        again = calls()
        assert "nnunet-conres brats-convert" not in kinds(again)
        assert {"nnUNetv2_extract_fingerprint", "nnunet-conres split", "nnUNetv2_preprocess"} <= set(kinds(again))
        assert len([call for call in again if call.startswith("nnUNetv2_train")]) == 4

    @pytest.mark.slow
    def test_a_training_that_fails_is_taken_up_again(
        self, config: Path, content: dict[str, Any], calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config.write_text(as_yaml(content | {"retries": 1, "time_limit_hours": 10_000}))
        monkeypatch.setenv("FAIL", "501 3d_fullres 1 -tr nnUNetTrainerConResNet")
        run(config, "--cores", "2", "--until", "train", check=False)
        attempts = [call for call in calls() if os.environ["FAIL"] in call]
        assert len(attempts) == 2
        assert attempts[1].endswith("--c")
        found = json.loads(run(config, "--status", "--json"))
        assert sorted(one["state"] for one in found["folds"]) == ["done", "done", "done", "failed"]
        assert [one["where"] for one in found["folds"] if one["state"] == "failed"] == [
            "RuntimeError: CUDA out of memory"
        ]

    def test_a_dry_run_tells_and_does_nothing(self, config: Path, calls: Callable[[], list[str]]) -> None:
        reported = run(config, "--dry-run")
        assert "train                4" in reported
        assert calls() == []

    def test_is_not_run_twice_at_once(self, config: Path, tmp_path: Path, calls: Callable[[], list[str]]) -> None:
        with hold(tmp_path / "work" / "workflow.lock"):
            assert "is already running" in run(config, check=False)
        assert calls() == []

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_what_ends_it_ends_its_jobs(
        self,
        config: Path,
        content: dict[str, Any],
        calls: Callable[[], list[str]],
        monkeypatch: pytest.MonkeyPatch,
        number: int,
    ) -> None:
        config.write_text(as_yaml(content | {"retries": 3}))
        monkeypatch.setenv("SLEEP", "nnUNetv2_train")
        process = start(config, "--cores", "1")
        wait_for(lambda: any("nnUNetv2_train" in call for call in calls()))
        process.send_signal(number)
        reported = process.communicate(timeout=60)[0]
        assert process.returncode != 0
        assert reported.count("Interrupted. Snakemake is stopping its jobs") == 1
        assert "Traceback" not in reported
        found = json.loads(run(config, "--status", "--json"))
        assert {one["state"] for one in found["folds"]} == {"waiting"}
        assert [one["where"] for one in found["folds"] if one["attempts"]] == ["killed by signal 2"]
        # no cleanup is needed
        monkeypatch.delenv("SLEEP")
        calls()
        run(config, "--cores", "2", "--until", "train")
        assert [call.endswith("--c") for call in calls() if call.startswith("nnUNetv2_train")].count(True) == 1

    def test_killed_at_once_it_holds_the_experiment_until_snakemake_ends(
        self, config: Path, calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SLEEP", "nnUNetv2_train")
        process = start(config, "--cores", "1")
        wait_for(lambda: any("nnUNetv2_train" in call for call in calls()))
        process.kill()
        process.wait()
        try:
            assert "is already running" in run(config, check=False)
        finally:
            (snakemake,) = snakemakes(config)
            os.kill(snakemake, signal.SIGKILL)
        wait_for(lambda: not snakemakes(config))
        # the training continues on its own, and the next run waits for it
        assert "running" in run(config, "--status")
        monkeypatch.setenv("SLEEP", "nothing")
        (config.parent / "wake").touch()
        run(config, "--cores", "2", "--until", "train")
        assert len([call for call in calls() if call.startswith("nnUNetv2_train")]) == 3

    def test_gpus_and_slurm_resources_reach_the_jobs(
        self, config: Path, content: dict[str, Any], calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # the SLURM plugin would pass on empty values: sbatch --qos=''
        assert not [
            one
            for job in dry_run(config)["train"]
            for one in resources_of(job)
            if re.search("=$", one) and not one.startswith("gpu_")
        ]
        content |= {"device": "cuda", "postprocess": True, "package": {}}
        content["models"]["ours"]["gpus"] = 2
        content["resources"] = {
            "default": {"partition": "cpu", "account": "me", "qos": "long"},
            "train": {"partition": "gpu", "constraint": "nvlink", "slurm_extra": "--mail-type=NONE", "cpus": 9},
        }
        config.write_text(as_yaml(content))
        jobs = dry_run(config)
        rules = ("convert", "fingerprint", "split", "plan", "preprocess", "memory", "ensemble", "compare_folds")
        for rule in (*rules, "postprocess", "package"):
            (*_, job) = jobs[rule]
            assert {"slurm_partition=cpu", "slurm_account=me", "qos=long"} <= set(resources_of(job))
            assert "gpu=0" in resources_of(job)
        for job in jobs["train"]:
            found = resources_of(job)
            assert {"slurm_partition=gpu", "slurm_account=me", "constraint=nvlink"} <= set(found)
            number = 2 if "--model ours" in job else 1
            assert f"gpu={number}" in found
            assert "nodes=1" in found
            assert f"--gpus {number} " in job
        experiment = read_config(config)
        for model in experiment.models:
            command = " ".join(commands.train(experiment, model, 0))
            assert ("-num_gpus 2" in command) == (model.name == "ours")
            assert "-device cuda" in command
        assert all("gpu=1" in resources_of(job) for job in jobs["predict"])
        # with too few GPUs, nothing starts
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        assert "a training needs 2 GPUs, but nvidia-smi and CUDA_VISIBLE_DEVICES list 1" in run(config, check=False)
        # the configuration's environment takes precedence over the shell's
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
        content.setdefault("environment", {})["CUDA_VISIBLE_DEVICES"] = "2"
        config.write_text(as_yaml(content))
        assert "CUDA_VISIBLE_DEVICES list 1" in run(config, check=False)
        assert calls() == []

    def test_plain_snakemake(self, config: Path, tmp_path: Path, calls: Callable[[], list[str]]) -> None:
        snakefile = run(config, "--snakefile").strip()
        command = [sys.executable, "-m", "snakemake", "-s", snakefile, "--configfile", str(config), "--cores", "1"]
        command += ["--until", "split", "--quiet", "--directory", str(tmp_path)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        assert kinds(calls()) == ["nnunet-conres brats-convert", "nnunet-conres split"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [("brats_experiment", "brats_experiment"), ("Ärger im Büro", "rger_im_B_ro"), ("a" * 80, "a" * 50), ("...", None)],
)
def test_names_of_slurm_jobs_are_such_as_the_plugin_takes(
    content: dict[str, Any], tmp_path: Path, folder: str, name: str | None
) -> None:
    assert job_name(parse_config(content | {"work": f"x/{folder}"}, tmp_path)) == (name or "experiment")


class TestCommandLine:
    def test_example(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["workflow", "--example", "brats"]) == 0
        assert set(yaml.safe_load(capsys.readouterr().out)["models"]) == {"nnU-Net", "ResEnc-M", "ConResNet", "V-Net"}

    def test_without_a_configuration(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["workflow"]) == 2
        assert "--example brats" in capsys.readouterr().err

    def test_options_before_the_configuration(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["workflow", "--cores", "2", str(config)]) == 2
        assert "2 is not a file; expected the configuration first" in capsys.readouterr().err

    def test_a_profile_that_is_not_there(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["workflow", str(config), "--profile", "nowhere"]) == 2
        assert "expected local or slurm" in capsys.readouterr().err

    def test_other_commands_know_no_options_of_snakemake(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            cli.main(["info", "--cores", "2"])
        assert "unrecognized arguments: --cores 2" in capsys.readouterr().err


@pytest.mark.slow
def test_with_the_real_commands(tmp_path: Path, content: dict[str, Any]) -> None:
    """Synthetic cases, two models, two folds, epochs of two iterations: from conversion to both reports."""
    phantoms = ["phantom", "-o", str(tmp_path / "phantoms"), "-n", "4", "--held-out", "1"]
    assert cli.main([*phantoms, "--shape", "24", "24", "20", "--spacing", "7", "7", "7"]) == 0
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "tiny_trainers.py").write_text(TRAINERS)
    content |= {
        "postprocess": True,
        "data": {"id": 501, "brats": ["phantoms/training"], "held_out": ["phantoms/held_out"]},
        "test": {"parts": 1},
        "models": {
            "stock": {"trainer": "TinyStock"},
            "ours": {"trainer": "TinyConResNet", "plans": "nnUNetConResNetPlans"},
        },
        "environment": {
            "nnUNet_n_proc_DA": 1,
            "nnUNet_def_n_proc": 1,
            "OMP_NUM_THREADS": 1,
            "nnUNet_extTrainer": str(tmp_path / "trainers"),
        },
    }
    config = tmp_path / "experiment.yaml"
    config.write_text(as_yaml(content))
    run(config, timeout=1500)
    found = json.loads(run(config, "--status", "--json"))
    assert {one["state"] for one in found["folds"]} == {"done"}
    assert found["steps"]["post-processing"] == "2 of 2 done"
    for kind in ("folds", "test"):
        report = json.loads((tmp_path / "work" / "report" / kind / "report.json").read_text())
        assert "stock" in json.dumps(report)
    assert (tmp_path / "work" / "predictions" / "stock+ours").is_dir()
    assert "Nothing to be done" in run(config)
