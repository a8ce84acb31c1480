"""The steps, with stand-ins for the commands, and which results count as done."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_conres.errors import InputError
from nnunet_conres.files import temporary_beside, try_read_json, write_if_changed
from nnunet_conres.locks import hold, holder
from nnunet_conres.workflow import commands, records
from nnunet_conres.workflow.config import Experiment, parse_config
from nnunet_conres.workflow.status import status
from nnunet_conres.workflow.step import Step, StepError, gpus, main, run

pytest.importorskip("fcntl", reason="needs an operating system with flock")

Calls = Callable[[], list[str]]


def step(experiment: Experiment, name: str, threads: int = 1) -> Step:
    return Step(experiment, experiment.records / name, threads)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that keeps the files of `prepared` for the next test."""
    return tmp_path_factory.mktemp("template")


@pytest.fixture
def prepared(experiment: Experiment, calls: Calls, tmp_path: Path, template: Path) -> Experiment:
    """Return an experiment whose steps before training are done."""
    if any(template.iterdir()):
        shutil.copytree(template, tmp_path, dirs_exist_ok=True)
        return experiment
    records.refresh(experiment)
    step(experiment, "raw.json").convert()
    step(experiment, "fingerprint.json").fingerprint()
    step(experiment, "splits/fold_0.json").split()
    for model in experiment.models:
        name = f"{model.plans}__3d_fullres.json"
        step(experiment, f"plans/{name}").plan(model.plans, "3d_fullres")
        preprocess(experiment, model.plans)
    calls()
    for folder in ("work", "nn"):
        shutil.copytree(tmp_path / folder, template / folder)
    return experiment


def preprocess(experiment: Experiment, plans: str) -> None:
    step(experiment, f"preprocessed/{plans}__3d_fullres.json").preprocess(plans, "3d_fullres")


def train(experiment: Experiment, model: int = 0, fold: int = 0) -> None:
    which = experiment.models[model]
    step(experiment, f"train/{which.name}/fold_{fold}.json").train(which, fold, 0)


def write_zip(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights", "1")


class TestPreparation:
    def test_is_done_once(self, prepared: Experiment, calls: Calls) -> None:
        step(prepared, "raw.json").convert()
        step(prepared, "fingerprint.json").fingerprint()
        step(prepared, "splits/fold_0.json").split()
        preprocess(prepared, "nnUNetPlans")
        assert calls() == []

    def test_a_changed_data_set_is_looked_at_anew(self, prepared: Experiment, calls: Calls) -> None:
        (prepared.raw / "labelsTr" / "a.nii.gz").write_text("corrected")
        records.refresh(prepared)
        step(prepared, "fingerprint.json").fingerprint()
        step(prepared, "splits/fold_0.json").split()
        preprocess(prepared, "nnUNetPlans")
        made = calls()
        assert [call.split()[0] for call in made] == [
            "nnUNetv2_extract_fingerprint", "nnunet-conres", "nnUNetv2_preprocess"
        ]  # fmt: skip
        assert made[0].endswith("--clean")
        assert made[1].endswith("--force")

    def test_a_half_preprocessed_one_does_not_count(
        self, prepared: Experiment, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (prepared.preprocessed / "nnUNetPlans_3d_fullres" / "d.pkl").unlink()
        monkeypatch.setenv("FAIL", "nnUNetv2_preprocess")
        with pytest.raises(StepError, match="exit code 1"):
            preprocess(prepared, "nnUNetPlans")
        monkeypatch.delenv("FAIL")
        preprocess(prepared, "nnUNetPlans")
        assert len(calls()) == 2

    def test_one_that_was_killed_does_not_count_though_all_cases_seem_to_be_there(
        self, prepared: Experiment, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut_short = prepared.preprocessed / "nnUNetPlans_3d_fullres" / "d.pkl"
        cut_short.unlink()
        monkeypatch.setenv("FAIL", "nnUNetv2_preprocess")
        with pytest.raises(StepError, match="exit code 1"):
            preprocess(prepared, "nnUNetPlans")
        monkeypatch.delenv("FAIL")
        cut_short.write_text("d")
        preprocess(prepared, "nnUNetPlans")
        assert len(calls()) == 2

    def test_a_fingerprint_that_was_to_be_renewed_is_renewed(
        self, prepared: Experiment, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (prepared.raw / "labelsTr" / "a.nii.gz").write_text("corrected")
        records.refresh(prepared)
        monkeypatch.setenv("FAIL", "nnUNetv2_extract_fingerprint")
        fingerprint = step(prepared, "fingerprint.json").fingerprint
        with pytest.raises(StepError, match="exit code 1"):
            fingerprint()
        monkeypatch.delenv("FAIL")
        calls()
        fingerprint()
        (call,) = calls()
        # without --clean, nnU-Net keeps the old fingerprint
        assert call.endswith("--clean")

    def test_a_case_that_is_gone_from_the_preprocessed_ones_is_noticed(self, prepared: Experiment) -> None:
        data = records.data_record(prepared, prepared.models[0])
        records.refresh(prepared)
        assert data.is_file()
        (prepared.preprocessed / "nnUNetPlans_3d_fullres" / "c.b2nd").unlink()
        records.refresh(prepared)
        assert not data.is_file()

    @pytest.mark.parametrize("what", ["splits", "plans"])
    def test_what_is_trained_on_is_not_replaced_by_a_workflow_that_wants_another(
        self, prepared: Experiment, calls: Calls, what: str
    ) -> None:
        """Two workflows with different options share one data set."""
        file = {"splits": "splits_final.json", "plans": "nnUNetPlans.json"}[what]
        before = (prepared.preprocessed / file).read_text()
        option = {"splits": "splits", "plans": "plans_nnUNetPlans"}[what]
        write_if_changed(prepared.records / "options" / f"{option}.json", {"other": "options"})

        def make() -> None:
            if what == "splits":
                step(prepared, "splits/fold_0.json").split()
            else:
                step(prepared, "p.json").plan("nnUNetPlans", "3d_fullres")

        with (
            hold(prepared.fold_lock(prepared.models[0], 1)),
            pytest.raises(StepError, match="must be rebuilt, but process"),
        ):
            make()
        assert calls() == []
        assert (prepared.preprocessed / file).read_text() == before
        # trainings with other plans don't use these plans; all trainings use the folds
        with hold(prepared.fold_lock(prepared.models[1], 1)):
            if what == "plans":
                make()
            else:
                with pytest.raises(StepError, match="must be rebuilt, but process"):
                    make()
        make()
        assert len(calls()) == 1

    def test_data_that_are_trained_on_are_not_removed(self, prepared: Experiment, calls: Calls) -> None:
        (prepared.preprocessed / "nnUNetPlans_3d_fullres" / "d.pkl").unlink()
        with (
            hold(prepared.fold_lock(prepared.models[1], 1)),
            pytest.raises(StepError, match=r"must be rebuilt, but process"),
        ):
            preprocess(prepared, "nnUNetPlans")
        assert calls() == []

    def test_plans_and_splits_made_by_hand_are_kept(self, experiment: Experiment, calls: Calls) -> None:
        records.refresh(experiment)
        step(experiment, "raw.json").convert()
        experiment.preprocessed.mkdir(parents=True)
        splits = [{"train": ["a"], "val": ["b", "c", "d"]}, {"train": ["b"], "val": ["a"]}]
        (experiment.preprocessed / "splits_final.json").write_text(json.dumps(splits))
        plans = {"configurations": {"mine": {"data_identifier": "x", "inherits_from": "3d_fullres"}, "3d_fullres": {}}}
        (experiment.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
        calls()
        step(experiment, "splits/fold_0.json").split()
        step(experiment, "plans/p.json").plan("nnUNetPlans", "mine")
        assert calls() == []
        assert try_read_json(records.split_record(experiment, 0))["validation"] == ["b", "c", "d"]
        with pytest.raises(StepError, match="no configuration other; it has mine, 3d_fullres"):
            step(experiment, "plans/p.json").plan("nnUNetPlans", "other")

    def test_splits_with_too_few_folds_are_refused(self, prepared: Experiment) -> None:
        (prepared.preprocessed / "workflow" / "splits.json").unlink()
        (prepared.preprocessed / "splits_final.json").write_text('[{"train": ["a"], "val": ["b"]}]')
        with pytest.raises(StepError, match="split the missing ones at random"):
            step(prepared, "splits/fold_0.json").split()


class TestTrain:
    def test_goes_on_from_a_checkpoint(
        self, prepared: Experiment, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FAIL", "nnUNetv2_train")
        with pytest.raises(StepError, match="exit code 1"):
            train(prepared)
        monkeypatch.delenv("FAIL")
        train(prepared)
        first, second = calls()
        assert second == f"{first} --c"
        train(prepared)
        assert calls() == []

    def test_only_validates_what_is_trained(self, prepared: Experiment, calls: Calls) -> None:
        train(prepared)
        calls()
        (prepared.fold_folder(prepared.models[0], 0) / "validation" / "summary.json").write_text('{"metric_per_')
        train(prepared)
        (call,) = calls()
        assert call.endswith("--val")

    def test_a_checkpoint_that_was_cut_short_is_put_aside(self, prepared: Experiment, calls: Calls) -> None:
        train(prepared)
        calls()
        folder = prepared.fold_folder(prepared.models[0], 0)
        (folder / "checkpoint_final.pth").write_bytes(b"PK\x03\x04 cut")
        (folder / "validation" / "summary.json").unlink()
        train(prepared)
        (call,) = calls()
        assert not call.endswith(("--c", "--val"))
        assert (folder / "checkpoint_final.pth.damaged").is_file()

    @pytest.mark.parametrize("part", ["plans", "trainer"])
    def test_what_it_depends_on_changed(self, prepared: Experiment, calls: Calls, part: str) -> None:
        for fold in (0, 1):
            train(prepared, fold=fold)
        train(prepared, model=1)
        calls()
        if part == "plans":
            path = prepared.preprocessed / "nnUNetPlans.json"
            path.write_text(path.read_text().replace("[8, 8, 8]", "[16, 8, 8]"))
            records.refresh(prepared)
            preprocess(prepared, "nnUNetPlans")
        else:
            write_if_changed(records.trainer_record(prepared, prepared.models[0]), {"source": "new"})
        train(prepared)
        train(prepared, model=1)
        (call,) = calls()
        assert "-p nnUNetPlans" in call
        assert not call.endswith("--c")
        base = prepared.model_folder(prepared.models[0])
        # the old folds are kept elsewhere; an old fold_1 next to the new fold_0 would mix trainings
        assert {path.name[:6] for path in (base / "replaced").iterdir()} == {"fold_0", "fold_1"}
        assert not (base / "fold_1").exists()

    @pytest.mark.parametrize("file", ["splits_final.json", "nnUNetPlans.json"])
    def test_what_changed_since_the_workflow_began_is_not_trained_on(
        self, prepared: Experiment, calls: Calls, file: str
    ) -> None:
        path = prepared.preprocessed / file
        path.write_text(path.read_text().replace('"b"', '"d"').replace("[8, 8, 8]", "[16, 8, 8]"))
        with pytest.raises(StepError, match=rf"{file} changed after"):
            train(prepared)
        assert calls() == []

    def test_one_that_somebody_goes_on_with_by_hand_is_left_alone(
        self, prepared: Experiment, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FAIL", "nnUNetv2_train")
        with pytest.raises(StepError, match="exit code 1"):
            train(prepared)
        monkeypatch.delenv("FAIL")
        folder = prepared.fold_folder(prepared.models[0], 0)
        (folder / "training_log_2.txt").write_text("by hand")
        with pytest.raises(StepError, match="seems to be in training"):
            train(prepared)
        for path in folder.iterdir():
            os.utime(path, (time.time() - 3600,) * 2)
        train(prepared)
        assert len(calls()) == 2

    def test_what_was_trained_before_the_workflow_counts(self, prepared: Experiment, calls: Calls) -> None:
        train(prepared)
        records.stamp_of_fold(prepared, prepared.models[0], 0).unlink()
        calls()
        train(prepared)
        assert calls() == []

    def test_one_that_runs_by_hand_is_left_alone(self, prepared: Experiment, calls: Calls) -> None:
        folder = prepared.fold_folder(prepared.models[0], 0)
        write_zip(folder / "checkpoint_best.pth")
        with pytest.raises(StepError, match="seems to be in training"):
            train(prepared)
        os.utime(folder / "checkpoint_best.pth", (time.time() - 3600,) * 2)
        train(prepared)
        (call,) = calls()
        assert call.endswith("--c")

    def test_a_validation_that_lacks_cases_is_not_done(self, prepared: Experiment) -> None:
        train(prepared)
        folder = prepared.fold_folder(prepared.models[0], 0)
        assert records.missing_validation(folder, ["a", "b"]) is None
        assert records.missing_validation(folder, ["a", "b", "e"]) == "validation/summary.json does not list e"


class TestRun:
    def test_a_signal_ends_all_that_the_command_started(self, tmp_path: Path) -> None:
        code = "from nnunet_conres.workflow.step import run; from pathlib import Path; import sys\n"
        code += "run(['sh', '-c', 'sleep 60 & echo $!; sleep 60'], Path(sys.argv[1]))"
        log = tmp_path / "log"
        process = subprocess.Popen([sys.executable, "-c", code, str(log)])
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 1):
            time.sleep(0.05)
        child = int(log.read_text().splitlines()[1])
        process.terminate()
        assert process.wait(15) == 128 + 15  # no grace period if the command ends at once
        assert log.read_text().splitlines()[-1].endswith("killed by signal 15")
        while Path(f"/proc/{child}").exists() and _state_of(child) != "Z" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{child}").exists() or _state_of(child) == "Z"

    def test_a_signal_while_the_command_starts_ends_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        popen, started = subprocess.Popen, []

        def start(*arguments: Any, **options: Any) -> subprocess.Popen:
            started.append(popen(*arguments, **options))
            os.kill(os.getpid(), signal.SIGTERM)
            return started[0]

        monkeypatch.setattr(subprocess, "Popen", start)
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # without a handler, the signal would end the tests
        try:
            with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
                run(["sleep", "60"], tmp_path / "log")
        finally:
            signal.signal(signal.SIGTERM, before)
        assert started[0].poll() == -signal.SIGTERM
        assert (tmp_path / "log").read_text().splitlines()[-1].endswith("killed by signal 15")

    def test_a_command_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(StepError, match="nnUNetv2_nothing was not found"):
            run(["nnUNetv2_nothing"], tmp_path / "log")


def _state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class TestPredict:
    def predict(self, experiment: Experiment, part: int) -> None:
        model = experiment.models[0]
        step(experiment, f"predict/{model.name}/part_{part}.json").predict(model, part, 0)

    @pytest.fixture
    def trained(self, prepared: Experiment) -> Experiment:
        for fold in (0, 1):
            train(prepared, fold=fold)
        step(prepared, "test.json").test_cases()
        return prepared

    def test_parts_make_one_folder(self, trained: Experiment) -> None:
        for part in (0, 1):
            self.predict(trained, part)
        folder = trained.predictions("stock")
        assert sorted(path.name for path in folder.glob("*.nii.gz")) == ["x.nii.gz", "y.nii.gz", "z.nii.gz"]
        assert [path.name for path in folder.parent.iterdir()] == ["stock"]

    def test_half_of_a_part_is_not_there(self, trained: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FAIL", "nnUNetv2_predict")
        with pytest.raises(StepError):
            self.predict(trained, 0)
        assert list(trained.predictions("stock").glob("*.nii.gz")) == []

    def test_what_is_whole_is_not_predicted_again(self, trained: Experiment, calls: Calls) -> None:
        for part in (0, 1):
            self.predict(trained, part)
        calls()
        record = trained.records / "predict" / "stock" / "part_0.json"
        before = record.read_text()
        record.unlink()  # as Snakemake does before it runs a step
        self.predict(trained, 0)
        assert calls() == []
        assert record.read_text() == before
        (trained.predictions("stock") / "x.npz").write_text("cut")
        self.predict(trained, 0)
        assert len(calls()) == 1

    def test_ensembles_and_reports_are_made_once_and_follow_what_they_are_made_of(
        self, trained: Experiment, calls: Calls
    ) -> None:
        def make(threads: int = 1) -> list[str]:
            step(trained, "ensemble/stock+ours.json", threads).ensemble()
            step(trained, "compare/test.json", threads).compare()
            return [call.split()[0] for call in calls()]

        for part in (0, 1):
            self.predict(trained, part)
        calls()
        assert make() == ["nnUNetv2_ensemble", "nnunet-conres"]
        assert make(threads=2) == []
        assert trained.test_images is not None
        (trained.test_images / "x_0000.nii.gz").unlink()
        records.refresh(trained)
        for part in (0, 1):
            self.predict(trained, part)
        calls()
        assert make() == ["nnUNetv2_ensemble", "nnunet-conres"]
        # the removed case is removed here too
        assert sorted(path.name for path in trained.predictions("stock+ours").glob("*.gz")) == ["y.nii.gz", "z.nii.gz"]

    def test_postprocessing_and_packages_are_made_once_and_follow_their_folds(
        self,
        trained: Experiment,
        content: dict[str, Any],
        tmp_path: Path,
        calls: Calls,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        experiment = parse_config(content | {"postprocess": True, "package": {"models": "stock"}}, tmp_path)
        records.refresh(experiment)

        def make() -> list[str]:
            step(experiment, "postprocess/stock.json").postprocess()
            step(experiment, "package/stock.json").package()
            return [" ".join(call.split()[:2]) for call in calls()]

        calls()
        # partial output of a failed command does not count as complete
        monkeypatch.setenv("FAIL", "nnunet-conres package")
        with pytest.raises(StepError):
            make()
        monkeypatch.delenv("FAIL")
        calls()
        assert make() == ["nnunet-conres package"]
        assert make() == []
        folder = experiment.package("stock")
        recorded = json.loads((experiment.records / "package/stock.json").read_text())["files"]
        assert recorded == ["packages/stock/Dockerfile", "packages/stock/model/plans.json"]
        steps = status(experiment).steps
        assert (steps["post-processing"], steps["packages"]) == ("1 of 2 done", "1 of 1 done")
        # a deleted file
        (folder / "Dockerfile").unlink()
        records.refresh(experiment)
        assert not (experiment.records / "package/stock.json").exists()
        assert make() == ["nnunet-conres package"]
        # a new training
        write_if_changed(records.training_record(experiment, experiment.models[0], 0), {"checkpoint": "another"})
        assert make() == ["nnunet-conres postprocess", "nnunet-conres package"]
        # a folder that the workflow did not create
        shutil.rmtree(folder.parent)
        folder.mkdir(parents=True)
        for _ in range(2):  # a second attempt doesn't remove it either
            with pytest.raises(StepError, match="exit code 1"):
                make()
            assert folder.is_dir()

    def test_a_case_that_is_gone_goes_from_the_predictions(self, trained: Experiment) -> None:
        for part in (0, 1):
            self.predict(trained, part)
        assert trained.test_images is not None
        (trained.test_images / "x_0000.nii.gz").unlink()
        records.refresh(trained)
        for part in (0, 1):
            self.predict(trained, part)
        names = sorted(path.name for path in trained.predictions("stock").glob("*.nii.gz"))
        assert names == ["y.nii.gz", "z.nii.gz"]


class TestErrors:
    @pytest.fixture(autouse=True)
    def _failing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(commands, "convert", lambda experiment, processes: ["false"])

    def main(self, experiment: Experiment, content: dict, tmp_path: Path) -> int:
        noted = tmp_path / "experiment.json"
        noted.write_text(json.dumps({"base": str(tmp_path), "content": content}))
        return main([str(noted), "convert", "--record", str(experiment.records / "raw.json")])

    def test_one_of_the_users_is_a_line(
        self, experiment: Experiment, content: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        log = experiment.logs / "raw.log"
        assert self.main(experiment, content, tmp_path) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("[workflow] error: false ended with exit code 1")
        assert log.read_text().splitlines()[-1].startswith("[workflow] failed: false ended with exit code 1")

    def test_one_of_ours_keeps_its_traceback(
        self, experiment: Experiment, content: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def convert(self: Step) -> None:
            raise ValueError("ours")

        monkeypatch.setattr(Step, "convert", convert)
        with pytest.raises(ValueError, match="ours"):
            self.main(experiment, content, tmp_path)
        # nnunet-conres workflow --status reads this line
        assert (experiment.logs / "raw.log").read_text() == "[workflow] failed: ValueError: ours\n"

    def test_a_log_that_cannot_be_written_is_named(
        self, experiment: Experiment, content: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        experiment.work.mkdir()
        experiment.logs.touch()
        assert self.main(experiment, content, tmp_path) == 1
        assert f"[workflow] error: {experiment.logs}" in capsys.readouterr().err

    def test_a_full_disk_names_the_record_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def write_text(path: Path, text: str, **_: str) -> None:
            path.write_bytes(text[:3].encode())
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_text", write_text)
        with pytest.raises(InputError, match=r"raw\.json: No space left on device\. Free some space"):
            write_if_changed(tmp_path / "raw.json", {"a": 1})
        assert list(tmp_path.iterdir()) == []

    def test_a_record_that_is_being_written_is_no_record(self, tmp_path: Path) -> None:
        record = tmp_path / "compare" / "folds.json"
        write_if_changed(record, {})
        write_if_changed(temporary_beside(record), {})
        assert records.find_records(tmp_path, ["compare/*.json", "compare/folds.json"]) == [record]


class TestGpus:
    def test_two_jobs_get_different_ones(
        self, content: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Calls
    ) -> None:
        from nnunet_conres.workflow.config import parse_config

        experiment = parse_config(content | {"device": "cuda"}, tmp_path)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        with gpus(experiment, 1) as (first, _), gpus(experiment, 2) as (second, held):
            assert first == {"CUDA_VISIBLE_DEVICES": "3"}
            assert second == {"CUDA_VISIBLE_DEVICES": "5,6"}
            assert len(held) == 2

    def test_one_for_two_workflows_is_used_by_one_at_a_time(
        self, content: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from nnunet_conres.workflow.config import parse_config

        experiment = parse_config(content | {"device": "cuda"}, tmp_path)
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        with gpus(experiment, 1) as (variables, _):
            assert variables == {"CUDA_VISIBLE_DEVICES": "4"}
            (lock,) = tmp_path.glob("nnunet-conres-gpus-*/*.lock")
            assert holder(lock) is not None
        with pytest.raises(StepError, match="2 GPUs are needed, but this machine has 1: 4"), gpus(experiment, 2):
            pass

    @pytest.mark.parametrize("what", ["folder", "file"])
    def test_another_users_link_is_not_followed(
        self, content: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        from nnunet_conres.workflow.config import parse_config

        experiment = parse_config(content | {"device": "cuda"}, tmp_path)
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        victim = tmp_path / "victim"
        victim.mkdir()
        (victim / "gpu_4.lock").write_text("years of work")
        folder = tmp_path / f"nnunet-conres-gpus-{os.getuid()}"
        if what == "folder":
            folder.symlink_to(victim)
        else:
            folder.mkdir(mode=0o700)
            (folder / "gpu_4.lock").symlink_to(victim / "gpu_4.lock")
        with pytest.raises(InputError, match="nnunet-conres-gpus-"), gpus(experiment, 1):
            pass
        assert (victim / "gpu_4.lock").read_text() == "years of work"

    def test_a_scheduler_has_chosen_already(
        self, content: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from nnunet_conres.workflow.config import parse_config

        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        with gpus(parse_config(content | {"device": "cuda"}, tmp_path), 1) as (variables, _):
            assert variables == {}
