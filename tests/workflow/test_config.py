from pathlib import Path
from typing import Any

import pytest

from nnunet_conres.errors import InputError
from nnunet_conres.workflow import commands
from nnunet_conres.workflow.config import iterate_trainings, parse_config, read_config
from nnunet_conres.workflow.launch import EXAMPLES

yaml = pytest.importorskip("yaml", reason="needs PyYAML: pip install 'nnunet-conres[workflow]'")


def errors(content: dict[str, Any], base: Path) -> str:
    with pytest.raises(InputError) as error:
        parse_config(content, base)
    return str(error.value)


class TestParse:
    def test_paths_are_relative_to_the_file(self, content: dict[str, Any], tmp_path: Path) -> None:
        file = tmp_path / "experiment.yaml"
        file.write_text(yaml.safe_dump(content))
        experiment = read_config(file)
        assert experiment.work == tmp_path / "work"
        assert experiment.raw == tmp_path / "nn" / "raw" / "Dataset501_BraTS"
        assert experiment.test_images == experiment.raw / "imagesTs"

    def test_archives_of_a_new_year(self, content: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "2027.toml").write_text('like = "2021"\ntitle = "BraTS 2027"\n')
        content["data"] |= {"scheme": ["2027.toml", 2021], "missing": "zero", "corrected": "held_out"}
        command = " ".join(commands.convert(parse_config(content, tmp_path), 2))
        assert f"--scheme {tmp_path / '2027.toml'} 2021 " in command
        assert command.endswith(f"--corrected {tmp_path / 'held_out'} --missing zero")

    def test_every_model_in_every_fold(self, content: dict[str, Any], tmp_path: Path) -> None:
        trainings = [(model.name, fold) for model, fold in iterate_trainings(parse_config(content, tmp_path))]
        assert trainings == [("stock", 0), ("stock", 1), ("ours", 0), ("ours", 1)]

    def test_plans_of_known_names_need_no_description(self, content: dict[str, Any], tmp_path: Path) -> None:
        plans = parse_config(content, tmp_path).plans
        assert {name: (one.planner, one.is_own) for name, one in plans.items()} == {
            "nnUNetPlans": ("ExperimentPlanner", False),
            "nnUNetConResNetPlans": ("conresnet", True),
        }

    @pytest.mark.parametrize(
        ("model", "epochs", "trainer"),
        [
            ({}, 1000, "nnUNetTrainer"),
            ({}, 250, "nnUNetTrainer_250epochs"),
            ({}, 1, "nnUNetTrainer_1epoch"),
            ({"trainer": "nnUNetTrainerVNet"}, 50, "nnUNetTrainerVNet_50epochs"),
            ({"trainer": "nnUNetTrainer_5epochs"}, 250, "nnUNetTrainer_5epochs"),
            ({"epochs": 1000}, 250, "nnUNetTrainer"),
        ],
    )
    def test_length(self, content: dict[str, Any], tmp_path: Path, model: dict, epochs: int, trainer: str) -> None:
        content |= {"models": {"one": model}, "epochs": epochs}
        assert parse_config(content, tmp_path).models[0].trainer == trainer

    @pytest.mark.parametrize(
        ("wanted", "expected"),
        [
            ("all", [("stock", "ours")]),
            ("none", []),
            (True, [("stock", "ours")]),
            ([["ours", "stock"]], [("ours", "stock")]),
        ],
    )
    def test_ensembles(self, content: dict[str, Any], tmp_path: Path, wanted: Any, expected: list) -> None:
        assert list(parse_config(content | {"ensembles": wanted}, tmp_path).ensembles) == expected

    def test_rules_of_a_challenge_go_to_both_reports(self, content: dict[str, Any], tmp_path: Path) -> None:
        experiment = parse_config(content | {"rules": "2024-gli"}, tmp_path)
        for compare in (commands.compare_folds, commands.compare_test):
            command = compare(experiment, "report", 1)
            assert command[command.index("--rules") + 1] == "2024-GLI"
            assert "--rules" not in compare(parse_config(content, tmp_path), "report", 1)

    def test_postprocessing_and_packages(self, content: dict[str, Any], tmp_path: Path) -> None:
        content |= {"postprocess": True, "ensembles": "none", "rules": "2023-GLI"}
        content["package"] = {"models": ["ours"], "scheme": 2023, "missing": "zero"}
        experiment = parse_config(content, tmp_path)
        assert experiment.packaged == ("ours",)
        stock, ours = experiment.models
        assert commands.train(experiment, stock, 0)[-1] == "--npz"  # thresholds need probabilities
        files = {model.name: tmp_path / f"work/postprocessing/{model.name}.json" for model in experiment.models}
        of_ours = "-d Dataset501_BraTS -tr nnUNetTrainerConResNet -p nnUNetConResNetPlans -c 3d_fullres -f 0 1"
        fit = " ".join(commands.postprocess(experiment, ours, 2))
        assert fit == f"nnunet-conres postprocess fit {of_ours} -o {files['ours']} -np 2 --rules 2023-GLI"
        package = " ".join(commands.package(experiment, ours))
        assert package == (
            f"nnunet-conres package {of_ours} -o {tmp_path}/work/packages/ours --scheme 2023 --missing zero "
            f"--postprocessing {files['ours']}"
        )
        for compare in (commands.compare_folds, commands.compare_test):
            command = compare(experiment, "report", 1)
            where = command.index("--postprocessing")
            assert command[where + 1 : where + 3] == [f"{name}={file}" for name, file in files.items()]
        # defaults: all models, with the data set's scheme and treatment of missing modalities
        content |= {"postprocess": False, "package": {}}
        experiment = parse_config(content, tmp_path)
        assert experiment.packaged == ("stock", "ours")
        assert commands.package(experiment, stock)[-2:] == ["-o", f"{tmp_path}/work/packages/stock"]

    def test_a_data_set_that_is_there_needs_its_number_only(self, content: dict[str, Any], tmp_path: Path) -> None:
        content["data"] = {"id": 4}
        del content["test"]
        assert "found no data set" in errors(content, tmp_path)
        (tmp_path / "nn" / "raw" / "Dataset004_Hippocampus").mkdir(parents=True)
        assert parse_config(content, tmp_path).dataset == "Dataset004_Hippocampus"


class TestErrors:
    def test_all_are_told_together(self, content: dict[str, Any], tmp_path: Path) -> None:
        content |= {
            "device": "tpu",
            "folds": [0, 2],
            "retreis": 3,
            "retries": "many",
            "checkpoint_minutes": 0,
            "environment": {"nnUNet_n_proc_DA": 0},
            "ensembles": [["stock", "other"]],
            "resources": {"trian": {}, "train": {"cpus": 0, "gpu": 1}},
            "data": {"id": 501, "brats": ["nowhere"], "held_out": ["held_out"]},
        }
        content["models"] |= {
            "bad name": {},
            "cascade": {"configuration": "3d_cascade_fullres"},
            "paper": {"trainer": "nnUNetTrainerVNetPaper", "epochs": 50},
            "mine": {"plans": "myPlans"},
            "twin": {"trainer": "nnUNetTrainer"},
        }
        reported = errors(content, tmp_path)
        for words in (
            "device is 'tpu'",
            "folds is [0, 2]",
            "retreis is not known",
            "retries is 'many'",
            "checkpoint_minutes is 0",
            "nnUNet_n_proc_DA is 0",
            "no model is called other",
            "trian: not a valid name",
            "train, cpus is 0",
            "train, gpu is not known",
            f"{tmp_path / 'nowhere'} is not a folder",
            "bad name: not a valid name; expected letters, digits and . _ -",
            "train cascades by hand",
            "no variant of 50 epochs",
            "planner is missing",
            "twin and stock are the same",
        ):
            assert words in reported
        assert reported.count("\n  - ") == 16

    def test_nothing_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in ("raw", "preprocessed", "results"):
            monkeypatch.delenv(f"nnUNet_{kind}", raising=False)
        reported = errors({}, tmp_path)
        assert all(
            words in reported for words in ("models is missing", "data, id is missing", "nnUNet_results is not known")
        )

    @pytest.mark.parametrize(
        ("entry", "value", "reported"),
        [
            (("data", "id"), 1000, "expected 999 or less"),
            (("data", "id"), -1, "expected 1 or more"),
            (("data", "brats"), [], "brats is []; expected at least one folder"),
            (("data", "brats"), [None], "data, brats is None; expected a text"),
            (("data", "scheme"), {"2021": 1}, "data, scheme is"),
            (("data", "scheme"), "new.toml", "new.toml is not a file"),
            (("data", "scheme"), [2021, "2026-MTE"], "The scheme is 2026-MTE"),
            (("data", "missing"), "one", "expected 'refuse' or 'zero'"),
            (("work",), "", "work is ''; expected a text"),
            (("checkpoint_minutes",), float("nan"), "checkpoint_minutes is nan"),
            (("rules",), "2024-GIL", "There are no rules 2024-GIL"),
            (("rules",), 2024, "rules is 2024; expected a text"),
            (("postprocess",), "yes", "postprocess is 'yes'; expected true or false"),
            (("package",), True, "package is True; expected entries"),
            (("package",), {"models": []}, "package, models is []; expected at least 1"),
            (("package",), {"models": "theirs"}, "package, models: no model is called theirs"),
            (("package",), {"scheme": "2026-MTE"}, "The scheme is 2026-MTE"),
            (("package",), {"scheme": "auto"}, "package, scheme is 'auto'; expected one scheme"),
            (("package",), {"scheme": "new.toml"}, "new.toml is not a file"),
            (("package",), {"folds": 1}, "package, folds is not known; expected models, scheme, missing"),
            (("time_limit_hours",), float("inf"), "time_limit_hours is inf"),
            (("splits", "seed"), -1, "seed is -1"),
            (("models", "stock"), {"epoch_seconds": 0}, "epoch_seconds is 0"),
            (("models", "stock"), {"gpus": 2}, "stock: 2 GPUs, but device is cpu"),
            (("models", "stock"), {"configuration": "../.."}, "configuration is '../..'"),
            (("work",), "a{}b", "a{}b; expected a folder without {, }, < and >"),
            (("work",), "a<work>/b", "expected a folder without"),
            (("splits", "group"), "(BraTS", "group is '(BraTS'; expected a regular expression (missing )"),
            (("environment",), {"A=B": "c"}, "environment, A=B: not a valid name; expected"),
            (("environment",), {"": "c"}, "environment, : not a valid name; expected a text"),
            (("environment",), {"A": "b\0c"}, "environment, A is 'b\\x00c'; expected a text without NUL"),
            (("environment",), {"A\0": "b"}, "expected a text without NUL"),
            (("work",), "a\ud800", "work is 'a\\ud800'; expected a text without NUL and without lone surrogates"),
            (("data", "brats"), ["brats\0"], "data, brats is 'brats\\x00'; expected a text without NUL"),
            (("resources", "train"), {"cpus": 1.5}, "cpus is 1.5; expected a whole number"),
            (("resources", "train"), {"gpu_types": {"a100": True}}, "gpu_types, a100 is True; expected a number"),
            (("resources", "train"), {"slurm_extra": "'--constraint=a100'"}, "expected constraint instead"),
            (("resources", "default"), {"slurm_extra": "--mail-type=NONE -A me"}, "expected account instead"),
        ],
    )
    def test_values(self, content: dict[str, Any], tmp_path: Path, entry: tuple, value: Any, reported: str) -> None:
        *above, last = entry
        where = content
        for key in above:
            where = where.setdefault(key, {})
        where[last] = value
        assert reported in errors(content, tmp_path)

    def test_entries_with_wrong_names_and_wrong_values(self, content: dict[str, Any], tmp_path: Path) -> None:
        content["models"]["bad name!"] = {"gpus": 0}
        content["plans"] = {"a b": {"gpu_memory_target": -1}}
        content["resources"] = {"nope": {"cpus": "x"}}
        content[True] = 1
        found = errors(content, tmp_path)
        for words in ("bad name!: not a valid name", "gpus is 0; expected 1 or more", "a b: not a valid name",
                      "gpu_memory_target is -1; expected more than 0", "nope: not a valid name", "cpus is 'x'",
                      "True is not known; expected work"):  # fmt: skip
            assert words in found

    def test_no_second_message_about_what_is_wrong_already(self, content: dict[str, Any], tmp_path: Path) -> None:
        content["models"]["other"] = {"trainer": "a b"}
        content["test"] = {"images": "nowhere", "labels": "there"}
        assert errors(content, tmp_path).count("\n  - ") == 3

    def test_values_that_are_right(self, content: dict[str, Any], tmp_path: Path) -> None:
        content["environment"] = {"CUDA_VISIBLE_DEVICES": "", "FLAG": True}
        content["data"]["held_out"] = []
        content["models"] = {1: {}, 2: {"trainer": "nnUNetTrainerConResNet"}}
        content["ensembles"] = [[1, 2]]
        del content["test"]
        experiment = parse_config(content, tmp_path)
        assert experiment.environment["CUDA_VISIBLE_DEVICES"] == ""
        assert experiment.environment["FLAG"] == "true"
        assert experiment.ensembles == (("1", "2"),)

    def test_default_folder_that_snakemake_does_not_take(self, content: dict[str, Any], tmp_path: Path) -> None:
        del content["work"]
        base = tmp_path / "a{b}"
        base.mkdir()
        assert "expected a folder without {, }, < and >" in errors(content, base)

    def test_classes_that_nobody_knows(
        self, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("nnUNet_extTrainer", raising=False)
        content["models"] = {
            "near": {"trainer": "nnUNetTrainerConRestNet"},
            "mine": {"trainer": "Mine"},
            "plans": {"plans": "myPlans"},
        }
        content["plans"] = {"myPlans": {"planner": "nnUNetPlannerResEncS"}}
        reported = errors(content, tmp_path)
        assert "near: nnU-Net and this package have no trainer called nnUNetTrainerConRestNet" in reported
        assert "did you mean nnUNetTrainerConResNet?" in reported
        assert "no planner called nnUNetPlannerResEncS" in reported
        assert reported.count("\n  - ") == 3
        # The configuration names the folder of the trainer, but a container would not have it.
        (tmp_path / "trainers").mkdir()
        (tmp_path / "trainers" / "mine.py").write_text("class Mine: ...")
        content["environment"] = {"nnUNet_extTrainer": str(tmp_path / "trainers")}
        content["package"] = {"models": "mine"}
        reported = errors(content, tmp_path)
        assert "called Mine" not in reported
        assert "mine uses the trainer Mine from nnUNet_extTrainer, which a container does not have" in reported

    def test_postprocessing_by_one_fold(self, content: dict[str, Any], tmp_path: Path) -> None:
        content |= {"folds": [0], "postprocess": True}
        assert "postprocess is true, but there is one fold; expected two" in errors(content, tmp_path)

    def test_one_name_for_two(self, tmp_path: Path) -> None:
        file = tmp_path / "experiment.yaml"
        file.write_text("models:\n  one: {epochs: 5}\n  one: {epochs: 50}\n")
        with pytest.raises(InputError, match="one occurs twice in the entries from line 2"):
            read_config(file)

    def test_a_file_that_is_no_yaml(self, tmp_path: Path) -> None:
        file = tmp_path / "bad.yaml"
        file.write_text("models: [")
        with pytest.raises(InputError, match=r"bad\.yaml cannot be read as YAML"):
            read_config(file)


class TestExamples:
    @pytest.mark.parametrize("name", EXAMPLES)
    def test_is_right(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in ("raw", "preprocessed", "results"):
            monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
        for folder in ("BraTS2021_TrainingData", "phantoms/training", "phantoms/held_out"):
            (tmp_path / folder).mkdir(parents=True)
        file = tmp_path / f"{name}.yaml"
        file.write_text(EXAMPLES[name].read_text())
        experiment = read_config(file)
        trainings = len(list(iterate_trainings(experiment)))
        assert trainings == {"brats": 20, "laptop": 4}[name]
