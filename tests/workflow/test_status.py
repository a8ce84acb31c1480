"""Status and resources, from synthetic folders."""

import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from nnunet_conres.locks import hold
from nnunet_conres.workflow import resources
from nnunet_conres.workflow.config import Experiment, parse_config
from nnunet_conres.workflow.status import duration, status

pytest.importorskip("fcntl", reason="needs an operating system with flock")

LOG = """
#######################################################################
Please cite the following paper when using nnU-Net
2026-11-23 01:00:00.000000: Epoch 0
2026-11-23 01:00:00.000000: Current learning rate: 0.01
2026-11-23 01:01:00.000000: train_loss -0.1
2026-11-23 01:01:00.000000: Pseudo dice [np.float32(0.5), np.float32(0.7), nan]
2026-11-23 01:01:00.000000: Epoch time: 60.0 s
2026-11-23 01:01:00.000000: Epoch 1
2026-11-23 01:03:00.000000: Pseudo dice [np.float32(0.25), np.float32(0.75)]
2026-11-23 01:03:00.000000: Epoch time: 120.0 s
2026-11-23 01:03:00.000000: Epoch 2
"""
ATTEMPT = """[workflow] 2026-11-23 01:00:00 on node: nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainer
Traceback (most recent call last):
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
[workflow] 2026-11-23 01:05:00 ended with exit code 1
[workflow] failed: nnUNetv2_train ended with exit code 1; its output: here
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def standing(experiment: Experiment) -> Experiment:
    """Return trainings: stock fold 0 done, 1 waiting after two epochs; ours fold 0 failed, 1 not started."""
    write(experiment.preprocessed / "splits_final.json", json.dumps([{"train": [], "val": ["a"]}] * 2))
    stock, ours = experiment.models
    done = experiment.fold_folder(stock, 0)
    write(done / "checkpoint_final.pth", "")
    summary = {"metric_per_case": [{"prediction_file": "/x/a.nii.gz"}], "foreground_mean": {"Dice": 0.875}}
    write(done / "validation" / "summary.json", json.dumps(summary))
    write(experiment.fold_folder(stock, 1) / "training_log_2026_11_23.txt", LOG)
    write(experiment.training_log(ours, 0), ATTEMPT * 2)
    return experiment


def row(experiment: Experiment, model: str, fold: int) -> dict[str, Any]:
    (found,) = [one for one in status(experiment).folds if (one.model, one.fold) == (model, fold)]
    return dataclasses.asdict(found)


class TestStatus:
    def test_done(self, standing: Experiment) -> None:
        assert row(standing, "stock", 0) | {"state": "done", "dice": 0.875, "epoch": 1000} == row(standing, "stock", 0)

    def test_waiting_with_what_is_done_of_it(self, standing: Experiment) -> None:
        found = row(standing, "stock", 1)
        assert (found["state"], found["epoch"], found["dice"]) == ("waiting", 2, 0.5)

    def test_running(self, standing: Experiment) -> None:
        with hold(standing.fold_lock(standing.models[0], 1)):
            found = row(standing, "stock", 1)
        assert (found["state"], found["epoch"], found["epochs"]) == ("running", 2, 1000)
        # the upper median of 60 and 120 s per epoch, minus the elapsed part of the current epoch
        assert 997 * 120 <= found["seconds_left"] <= 998 * 120
        assert socket.gethostname() in found["where"]

    def test_failed_with_the_last_error(self, standing: Experiment) -> None:
        found = row(standing, "ours", 0)
        assert (found["state"], found["attempts"]) == ("failed", 2)
        assert found["where"] == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."

    def test_a_new_attempt_is_no_longer_failed(self, standing: Experiment) -> None:
        write(standing.training_log(standing.models[1], 0), ATTEMPT + ATTEMPT.splitlines()[0] + "\n")
        assert row(standing, "ours", 0)["state"] == "waiting"

    def test_one_that_was_killed(self, standing: Experiment) -> None:
        killed = "[workflow] 2026-11-23 01:05:00 killed by signal 15\n"
        write(standing.training_log(standing.models[1], 1), ATTEMPT.splitlines()[0] + "\n" + killed)
        found = row(standing, "ours", 1)
        assert (found["state"], found["where"]) == ("waiting", "killed by signal 15")

    def test_one_that_ended_without_a_word(self, standing: Experiment) -> None:
        write(standing.training_log(standing.models[1], 1), ATTEMPT.splitlines()[0] + "\n")
        found = row(standing, "ours", 1)
        assert (found["state"], found["attempts"]) == ("waiting", 1)
        assert found["where"] == "its last attempt ended without a message: it was killed, or its node failed"

    def test_one_in_the_queue(self, standing: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A failed training that was submitted again counts as queued too."""
        (tmp_path / "bin").mkdir()
        squeue = tmp_path / "bin" / "squeue"
        squeue.write_text(
            "#!/bin/sh\n"
            "echo '14|work_0a1b|PENDING|Resources|rule_train_wildcards_ours_0'\n"
            "echo '15|other_0a1b|PENDING|Priority|rule_train_wildcards_ours_1'\n"
            "echo '18|work_two_0a1b|PENDING|Priority|rule_train_wildcards_ours_1'\n"
            "echo '16|work_0a1b|PENDING|Priority|rule_predict_wildcards_ours_1'\n"
            "echo '17|work_0a1b|RUNNING|None|rule_train_wildcards_stock_1'\n"
        )
        squeue.chmod(0o755)
        monkeypatch.setenv("PATH", f"{squeue.parent}:/usr/bin:/bin")
        found = row(standing, "ours", 0)
        assert (found["state"], found["where"]) == ("waiting", "SLURM job 14, pending (Resources)")
        assert row(standing, "ours", 1)["where"] == ""
        # it waits for a lock, or has just started
        assert row(standing, "stock", 1)["where"] == "SLURM job 17, running"
        squeue.write_text("#!/bin/sh\nexit 1\n")
        assert row(standing, "ours", 0)["state"] == "failed"

    def test_parts_that_are_no_longer_wanted_do_not_count(self, standing: Experiment) -> None:
        for name in ("stock/part_0", "stock/part_5", "gone/part_0"):
            write(standing.records / "predict" / f"{name}.json", "{}")
        assert status(standing).steps["predictions"] == "1 of 4 parts done"

    def test_a_summary_in_halves_is_not_done(self, standing: Experiment) -> None:
        path = standing.fold_folder(standing.models[0], 0) / "validation" / "summary.json"
        path.write_text(path.read_text()[:40])
        assert row(standing, "stock", 0)["state"] == "waiting"

    def test_text(self, standing: Experiment) -> None:
        text = status(standing).as_text()
        assert "trainings: 1 done, 1 failed, 2 waiting" in text
        assert "stock: 50 epochs (1.7 h), or those since the last best checkpoint" in text
        assert "ours: 5 min" in text

    def test_nothing_there_at_all(self, experiment: Experiment) -> None:
        assert {one.state for one in status(experiment).folds} == {"waiting"}

    @pytest.mark.parametrize(
        ("seconds", "text"), [(5, "5 s"), (300, "5 min"), (7500, "2 h 05 min"), (200_000, "2 d 7 h")]
    )
    def test_duration(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text


class TestResources:
    def test_epochs_that_were_measured_decide_the_time(self, standing: Experiment) -> None:
        stock = standing.models[0]
        assert resources.epoch_seconds(standing, stock) == 120
        minutes = resources.estimated_minutes(standing, stock, 1)
        assert minutes == pytest.approx(1.3 * (998 * 2 + 30))
        # the queue allows one day
        assert resources.of_training(standing, stock, 1)["runtime"] == 24 * 60

    def test_enough_retries_for_the_time_limit(self, content: dict[str, Any], tmp_path: Path) -> None:
        content["models"] = {"slow": {"epoch_seconds": 360}}
        content |= {"time_limit_hours": 24, "retries": 5}
        # 1000 epochs of 6 min plus 30 min: 130.7 h with the margin, 6 jobs of one day, 5 of which hit the time limit
        assert resources.training_retries(parse_config(content, tmp_path)) == 5 + 5

    def test_on_a_cpu_the_network_is_in_the_machines_memory(self, content: dict[str, Any], tmp_path: Path) -> None:
        del content["resources"]
        experiment = parse_config(content, tmp_path)
        write(experiment.records / "memory" / "ours.json", json.dumps({"total_bytes": 3 * 2**30}))
        found = resources.of_training(experiment, experiment.models[1], 0)
        assert (found["mem_mb"], found["gpu"]) == (11000, 0)

    def test_gpus(self, content: dict[str, Any], tmp_path: Path) -> None:
        content |= {"device": "cuda", "environment": {"nnUNet_n_proc_DA": 6}}
        content["models"]["ours"]["gpus"] = 2
        content["resources"] = {"train": {"gpu_types": {"large": 80, "small": 11, "middle": 24}}}
        experiment = parse_config(content, tmp_path)
        write(experiment.records / "memory" / "ours.json", json.dumps({"total_bytes": 12 * 2**30}))
        found = resources.of_training(experiment, experiment.models[1], 0)
        assert (found["gpu"], found["gpu_model"], found["threads"]) == (2, "middle", 14)
        assert resources.of_training(experiment, experiment.models[0], 0)["gpu_model"] == "small"
        assert resources.of_rule(experiment, "predict")["gpu"] == 1
        assert resources.of_rule(experiment, "ensemble")["gpu"] == 0

    def test_a_network_too_large_for_any_gpu(self, content: dict[str, Any], tmp_path: Path) -> None:
        content |= {"device": "cuda", "resources": {"train": {"gpu_types": {"small": 4}}}}
        experiment = parse_config(content, tmp_path)
        with pytest.raises(ValueError, match=r"stock needs about 8\.0 GiB"):
            resources.of_training(experiment, experiment.models[0], 0)

    def test_what_is_given_wins(self, content: dict[str, Any], tmp_path: Path) -> None:
        content["resources"] = {"default": {"cpus": 3, "partition": "p"}, "plan": {"cpus": 5, "minutes": 7}}
        experiment = parse_config(content, tmp_path)
        assert resources.of_rule(experiment, "split")["threads"] == 3
        found = resources.of_rule(experiment, "plan")
        assert (found["threads"], found["runtime"], found["slurm_partition"]) == (5, 7, "p")
