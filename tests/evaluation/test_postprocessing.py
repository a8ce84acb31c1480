import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (as everybody calls it)
from scipy.ndimage import gaussian_filter

from nnunet_conres import cli
from nnunet_conres.datasets.brats_schemes import SCHEMES
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.metrics import MetricOptions
from nnunet_conres.evaluation.postprocessing import Postprocessing, RegionSteps, Scheme, load_postprocessing
from nnunet_conres.evaluation.postprocessing_files import apply_to_folder
from nnunet_conres.evaluation.postprocessing_fit import Together, _evidence, _scorer, best_value, notes_on_losses
from nnunet_conres.evaluation.rules import read_rules
from nnunet_conres.evaluation.scoring import ScoringJob, score_cases
from nnunet_conres.evaluation.statistics import Interval

REGIONS = {
    "labels": {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": 3, "cavity": 4},
    "regions_class_order": [1, 2, 3, 4],
    "file_ending": ".nii.gz",
}
LABELS = {"labels": {"background": 0, "necrosis": 2, "oedema": 1, "enhancing": 3}, "file_ending": ".nii.gz"}
SPACING = (2.5, 1.0, 0.8)  # voxels of 2 mm³


def of(dataset_json: dict[str, Any], less: dict[str, str] | None = None, **steps: RegionSteps) -> Postprocessing:
    return Postprocessing(Scheme.of(dataset_json, less), steps)


def probabilities(channels: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([gaussian_filter(rng.random((6, 9, 10)), 0.5) for _ in range(channels)]).astype(np.float32)


class TestScheme:
    def test_regions(self) -> None:
        scheme = Scheme.of(REGIONS)
        assert scheme.has_regions
        assert scheme.around == {"whole_tumor": 0, "tumor_core": 1, "enhancing_tumor": 2, "cavity": 0}

    def test_labels(self) -> None:
        scheme = Scheme.of(LABELS, {"enhancing": "necrosis"})
        assert not scheme.has_regions
        assert scheme.around == {"necrosis": 0, "oedema": 0, "enhancing": 2}

    @pytest.mark.parametrize(("content", "channels"), [(REGIONS, 4), (LABELS, 4)])
    def test_label_maps_are_nnunets_own(self, content: dict[str, Any], channels: int) -> None:
        from nnunetv2.utilities.label_handling.label_handling import LabelManager

        manager = LabelManager(content["labels"], content.get("regions_class_order"))
        values = probabilities(channels)
        if content is LABELS:
            values /= values.sum(0)
        expected = manager.convert_probabilities_to_segmentation(values)
        np.testing.assert_array_equal(Scheme.of(content).labels_of(values, {}), expected)

    def test_thresholds_of_regions(self) -> None:
        values = probabilities(4)
        labels = Scheme.of(REGIONS).labels_of(values, {"tumor_core": 0.6})
        expected = np.where(values[0] > 0.5, 1, 0)
        for channel, threshold in ((1, 0.6), (2, 0.5), (3, 0.5)):
            expected[values[channel] > threshold] = channel + 1
        np.testing.assert_array_equal(labels, expected)

    def test_threshold_of_one_label(self) -> None:
        values = probabilities(1)
        one = {"labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"}
        labels = Scheme.of(one).labels_of(np.concatenate([1 - values, values]), {"tumour": 0.55})
        np.testing.assert_array_equal(labels, values[0] > 0.55)

    def test_other_channels(self) -> None:
        with pytest.raises(InputError, match="expected 4 channels of regions"):
            Scheme.of(REGIONS).labels_of(probabilities(3), {})

    def test_no_labels(self) -> None:
        with pytest.raises(InputError, match="no usable labels"):
            Scheme.of({"labels": {"background": 0, "whole": [1, 2]}, "regions_class_order": [1, 2]})


class TestApply:
    def test_small_components(self) -> None:
        mask = gaussian_filter(np.random.default_rng(1).standard_normal((20, 24, 26)), 1.0) > 0.3
        labels = mask.astype(np.uint8)
        one = {"labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"}
        found = of(one, tumour=RegionSteps(smallest_component=24)).apply(labels, None, SPACING)
        numbers = sitk.ConnectedComponent(sitk.GetImageFromArray(labels), True)
        expected = sitk.GetArrayFromImage(sitk.RelabelComponent(numbers, minimumObjectSize=12)) > 0  # voxels of 2 mm³
        assert found.dtype == labels.dtype
        assert 0 < expected.sum() < mask.sum()
        np.testing.assert_array_equal(found, expected)

    def test_holes(self) -> None:
        mask = gaussian_filter(np.random.default_rng(3).standard_normal((12, 20, 20)), 1.2) > -0.35
        mask[[0, -1]] = mask[:, [0, -1]] = mask[:, :, [0, -1]] = False
        one = {"labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"}
        found = of(one, tumour=RegionSteps(fill_holes=True)).apply(mask.astype(np.uint8), None, SPACING)
        expected = sitk.GetArrayFromImage(sitk.BinaryFillhole(sitk.GetImageFromArray(mask.astype(np.uint8))))
        assert expected.sum() > mask.sum()
        np.testing.assert_array_equal(found, expected)

    def test_of_a_region_what_lies_around_takes_its_place(self) -> None:
        labels = np.zeros((8, 20, 20), np.uint8)
        labels[1:7, 1:9, 1:9] = 1
        labels[2, 2, 2] = 2  # a small core in a large tumour
        labels[4:6, 4:8, 4:8] = 3
        labels[2, 15, 15:17] = 1, 3  # a small tumour, with some enhancement
        found = of(REGIONS, tumor_core=RegionSteps(smallest_component=10)).apply(labels, None, SPACING)
        assert (found[2, 2, 2], found[2, 15, 16]) == (1, 1)
        assert (found == 3).sum() == 32
        found = of(REGIONS, whole_tumor=RegionSteps(smallest_component=10)).apply(labels, None, SPACING)
        assert not found[2, 15].any()
        np.testing.assert_array_equal(found[:, :10], labels[:, :10])
        assert labels[2, 15, 16] == 3

    def test_outer_regions_come_first(self) -> None:
        labels = np.zeros((4, 9, 9), np.uint8)
        labels[1, 1, 1:4] = 3
        steps = {"enhancing_tumor": RegionSteps(smallest_total=100), "whole_tumor": RegionSteps(smallest_component=100)}
        assert not of(REGIONS, **steps).apply(labels, None, SPACING).any()

    @pytest.mark.parametrize(("voxels", "expected"), [(4, 2), (5, 3)])
    @pytest.mark.parametrize("content", [REGIONS, LABELS])
    def test_little_enhancement_becomes_core(self, content: dict[str, Any], voxels: int, expected: int) -> None:
        labels = np.zeros((4, 9, 9), np.uint8)
        labels[1, 1, 1 : 1 + voxels] = 3
        labels[2, 5:8, 5:8] = 2
        name, less = ("enhancing_tumor", None) if content is REGIONS else ("enhancing", {"enhancing": "necrosis"})
        found = of(content, less, **{name: RegionSteps(smallest_total=10)}).apply(labels, None, SPACING)
        np.testing.assert_array_equal(found, np.where(labels == 3, expected, labels))

    def test_no_hole_is_filled_where_something_else_is(self) -> None:
        labels = np.ones((5, 5, 5), np.uint8)
        labels[2, 2, 2] = 4
        filled = of(REGIONS, whole_tumor=RegionSteps(fill_holes=True)).apply(labels, None, SPACING)
        np.testing.assert_array_equal(filled, labels)
        labels[2, 2, 2] = 0
        assert (of(REGIONS, whole_tumor=RegionSteps(fill_holes=True)).apply(labels, None, SPACING) == 1).all()
        labels[:] = 3
        labels[2, 2, 2] = 1
        filled = of(REGIONS, tumor_core=RegionSteps(fill_holes=True)).apply(labels, None, SPACING)
        assert filled[2, 2, 2] == 2

    def test_nothing_to_do(self) -> None:
        labels = np.random.default_rng(0).integers(0, 5, (4, 5, 6)).astype(np.uint8)
        nothing = of(REGIONS, whole_tumor=RegionSteps())
        assert nothing.does_nothing
        np.testing.assert_array_equal(nothing.apply(labels, None, SPACING), labels)

    def test_thresholds_need_probabilities(self) -> None:
        steps = of(REGIONS, whole_tumor=RegionSteps(threshold=0.4))
        assert steps.needs_probabilities
        labels = np.zeros((6, 9, 10), np.uint8)
        with pytest.raises(InputError, match=r"thresholds for whole_tumor.*--save_probabilities"):
            steps.apply(labels, None, SPACING)
        with pytest.raises(InputError, match=r"expected \(6, 9, 10\)"):
            steps.apply(labels, probabilities(4)[:, :5], SPACING)
        found = steps.apply(labels, probabilities(4), SPACING)
        np.testing.assert_array_equal(found, steps.scheme.labels_of(probabilities(4), {"whole_tumor": 0.4}))

    def test_folds_have_their_own(self) -> None:
        scheme = Scheme.of(LABELS)
        steps = Postprocessing(scheme, {}, {0: {"oedema": RegionSteps(smallest_component=5)}})
        assert steps.of_fold(0).steps == {"oedema": RegionSteps(smallest_component=5)}
        assert steps.of_fold(1) is steps.of_fold(None) is steps


class TestLoadRules:
    def write(self, path: Path, **changes: Any) -> Path:
        steps = of(REGIONS, whole_tumor=RegionSteps(0.4, 50.0, True, 0.0))
        path.write_text(json.dumps({**steps.as_json(), "dataset_json": REGIONS, **changes}))
        return path

    def test_round_trip(self, tmp_path: Path) -> None:
        read = load_postprocessing(self.write(tmp_path / "p.json"))
        assert read.steps == {"whole_tumor": RegionSteps(0.4, 50.0, True, 0.0)}
        assert read.scheme == Scheme.of(REGIONS)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": 2}, "not a post-processing of format 1"),
            ({"steps": {"whole_tumor": {"smallest": 3}}}, "is damaged.*smallest"),
            ({"steps": {"liver": {}}}, "steps of liver, which its labels do not have"),
            (
                {"steps": {"cavity": {"threshold": 1, "smallest_component": -1}}},
                r"(?s)cavity: threshold is 1.*cavity: smallest_component is -1",
            ),
        ],
    )
    def test_errors(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_postprocessing(self.write(tmp_path / "p.json", **changes))


def apply(predictions: Path, postprocessing: Path, output: Path) -> int:
    """Run the command and return its exit code."""
    options = {"-i": predictions, "--postprocessing": postprocessing, "-o": output, "-np": 1}
    return cli.main(["postprocess", "apply", *(str(part) for option in options.items() for part in option)])


def test_labels_above_255_stay_what_they_are(tmp_path: Path) -> None:
    labels = np.zeros((6, 7, 8), np.uint16)
    labels[:4, 1:4], labels[5, 5, 5] = 300, 1
    (tmp_path / "in").mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(tmp_path / "in" / "a.nii.gz"))
    dataset = {"labels": {"background": 0, "one": 1, "last": 300}, "file_ending": ".nii.gz"}
    (tmp_path / "in" / "dataset.json").write_text(json.dumps(dataset))
    steps = {"one": {"smallest_component": 2.0}}
    (tmp_path / "p.json").write_text(json.dumps({"format": 1, "dataset_json": dataset, "steps": steps}))
    apply_to_folder(tmp_path / "in", tmp_path / "out", tmp_path / "p.json", progress=False)
    labels[5, 5, 5] = 0
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "a.nii.gz"))), labels)


class TestChoice:
    def test_what_both_lack_is_right_by_all_rules(self) -> None:
        """The 2026 rules define no score here; without one, removing a false lesion would gain nothing."""
        dataset = SCHEMES["2025-MET"].label_set.dataset_json("regions")
        empty = np.zeros((4, 5, 6), np.int32)
        false = empty.copy()
        false[1, 1, 1] = dataset["labels"]["resection_cavity"]
        for rules in (None, read_rules("2026-MET")):
            scorer = _scorer(Scheme.of(dataset), dataset, rules)
            assert scorer("resection_cavity", empty, empty, (1.0, 1.0, 1.0)) == 1
            assert scorer("resection_cavity", empty, false, (1.0, 1.0, 1.0)) == 0

    def test_best_value(self) -> None:
        scores = [{None: 0.5, 10: 0.6, 50: 0.7, 100: 0.7}, {None: 0.5, 10: 0.5, 50: 0.5, 100: 0.5}]
        assert best_value(scores) == 50
        assert best_value([{None: 0.5, 10: 0.5}]) is None
        assert best_value([]) is None

    def test_values_of_a_fold_come_from_the_others(self) -> None:
        """Compare with loops; patients have cases in two folds."""
        rng = np.random.default_rng(0)
        values = (None, 10, 50, 100)
        scores = {f"c{n}": dict(zip(values, rng.random(4), strict=True)) for n in range(12)}
        folds = {case: n % 3 for n, case in enumerate(scores)}
        groups = {case: f"p{n // 2}" for n, case in enumerate(scores)}
        found = _evidence("whole", "smallest_component", scores, folds, groups)
        gains = []
        for fold in range(3):
            mine = {groups[case] for case in scores if folds[case] == fold}
            others = [case for case in scores if groups[case] not in mine]
            best = max(values, key=lambda value: sum(scores[case][value] for case in others))
            assert found.by_fold[fold] == best
            gains += [scores[case][best] - scores[case][None] for case in scores if folds[case] == fold]
        assert found.gain == pytest.approx(np.mean(gains))
        assert (found.better, found.worse) == (sum(g > 0 for g in gains), sum(g < 0 for g in gains))

    @pytest.mark.parametrize(("helps", "kept"), [(0.0, False), (0.3, True)])
    def test_what_helps_by_chance_is_left_off(self, helps: float, kept: bool) -> None:
        rng = np.random.default_rng(2)
        scores = {}
        for n in range(40):
            off = rng.uniform(0.3, 0.6)
            scores[f"c{n}"] = {None: off, **{value: off + helps + rng.normal(0, 0.1) for value in range(8)}}
        folds = {case: n % 5 for n, case in enumerate(scores)}
        found = _evidence("whole", "smallest_component", scores, folds, {case: case for case in scores})
        # One of the eight values is better on these cases, even if only by chance.
        assert found.chosen is not None
        assert found.kept is kept


def test_regions_that_lose_by_the_steps_of_others_are_named() -> None:
    gains = {"whole": Interval(0.1, 0.2), "core": Interval(-0.2, -0.1), "inner": Interval(-0.1, 0.1)}
    (note,) = notes_on_losses([Together(region, 0.5, 0.5, interval) for region, interval in gains.items()])
    assert "lower the score of core, because" in note
    assert notes_on_losses([Together("whole", 0.5, 0.6, gains["whole"])]) == []


class TestCommands:
    """From trained folds to post-processed files."""

    def fit(self, tmp_path: Path, *more: str) -> int:
        arguments = ["postprocess", "fit", "-d", "801", "-f", "0", "1", "-np", "1", *more]
        return cli.main([*arguments, "-o", str(tmp_path / "fit" / "p.json")])

    @pytest.mark.parametrize("kind", ["regions", "labels"])
    def test_from_folds_to_predictions(
        self, lab: Callable[..., Any], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = lab(kind)
        made.add(folds=(0, 1), blur=0.255 if kind == "regions" else 0.4)
        assert self.fit(tmp_path) == 0
        told = capsys.readouterr().out
        outer, inner = ("whole", "core") if kind == "regions" else ("oedema", "core")
        content = json.loads((tmp_path / "fit" / "p.json").read_text())
        rows = {(row["region"], row["step"]): row for row in content["evidence"]}
        # Noise produces single-voxel components; removing them helps.
        component = rows[inner, "smallest_component"]
        assert component["kept"]
        assert component["interval"]["low"] > 0
        assert content["steps"][inner]["smallest_component"] == component["chosen"]
        assert set(content["folds"]) == {"0", "1"}
        assert ((inner, "smallest_total") in rows) == (kind == "regions")
        assert (outer, "threshold") in rows
        for row in rows.values():
            assert row["kept"] == (row["chosen"] is not None and row["interval"]["low"] > 0)
            if not row["kept"]:
                assert content["steps"][row["region"]][row["step"]] == (0.5 if row["step"] == "threshold" else 0)
        assert "left off" in told
        assert "All kept steps" in told

        rules = load_postprocessing(tmp_path / "fit" / "p.json")
        predictions = made.root / "predictions"
        made.write_predictions(predictions, made.cases[:2], 0.3, 5)
        (predictions / "dataset.json").write_text(json.dumps(made.dataset_json))
        assert apply(predictions, tmp_path / "fit" / "p.json", tmp_path / "out") == 0
        for case in made.cases[:2]:
            image = sitk.ReadImage(str(tmp_path / "out" / f"{case}.nii.gz"))
            before = sitk.ReadImage(str(predictions / f"{case}.nii.gz"))
            assert image.GetSpacing() == before.GetSpacing()
            values = np.load(predictions / f"{case}.npz")["probabilities"]
            spacing = before.GetSpacing()[::-1]
            expected = rules.apply(sitk.GetArrayFromImage(before), values, spacing)
            np.testing.assert_array_equal(sitk.GetArrayFromImage(image), expected)
        assert (tmp_path / "out" / "dataset.json").is_file()

    def test_compared_by_the_other_folds(
        self, lab: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = lab("regions")
        made.add(folds=(0, 1), blur=0.255)
        assert self.fit(tmp_path) == 0
        rules = load_postprocessing(tmp_path / "fit" / "p.json")
        shutil.rmtree(made.root / "raw" / "Dataset801_Models" / "imagesTr")  # the comparison works without images
        arguments = [
            "compare",
            "-d",
            "801",
            "-tr",
            "nnUNetTrainer",
            "-f",
            "0",
            "1",
            "-np",
            "1",
            "-o",
            str(tmp_path / "r"),
        ]
        file = tmp_path / "fit" / "p.json"
        # One file per model, assigned by the model's name.
        assert cli.main([*arguments, "--postprocessing", f"nnUNetTrainer={file}", f"Other={file}", "B=none.json"]) == 2
        told = capsys.readouterr().err
        assert "names Other, which is not compared; expected one of nnUNetTrainer" in told
        assert "none.json cannot be read" in told
        assert cli.main([*arguments, "--postprocessing", f"nnUNetTrainer={file}"]) == 0
        content = json.loads((tmp_path / "r" / "report.json").read_text())
        assert [model["name"] for model in content["models"]] == ["nnUNetTrainer", "nnUNetTrainer, post-processed"]
        fitted = json.loads((tmp_path / "fit" / "p.json").read_text())
        for row in fitted["together"]:
            for key, model in (("before", "m0"), ("after", "p0")):
                assert content["summary"][model][row["region"]]["dice"]["mean"] == pytest.approx(row[key])
        for case in content["cases"]:
            path = made.added[0] / f"fold_{case['fold']}" / "validation" / f"{case['id']}.nii.gz"
            labels = sitk.ReadImage(str(path))
            values = np.load(path.with_name(f"{case['id']}.npz"))["probabilities"]
            spacing = labels.GetSpacing()[::-1]
            expected = rules.of_fold(case["fold"]).apply(sitk.GetArrayFromImage(labels), values, spacing)
            written = sitk.ReadImage(str(tmp_path / "r" / "postprocessed" / "m0" / f"{case['id']}.nii.gz"))
            np.testing.assert_array_equal(sitk.GetArrayFromImage(written), expected)

        # One file for all models; post-processing without steps adds no second model.
        nothing = tmp_path / "nothing.json"
        steps = Postprocessing(rules.scheme, {}).as_json()
        nothing.write_text(json.dumps({**steps, "dataset_json": made.dataset_json}))
        assert cli.main([*arguments, "--postprocessing", str(nothing)]) == 0
        content = json.loads((tmp_path / "r" / "report.json").read_text())
        assert [model["name"] for model in content["models"]] == ["nnUNetTrainer"]
        assert any("nothing.json has no active step: nnUNetTrainer" in text for text in content["warnings"])

    def test_without_probabilities(
        self, lab: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lab().add(folds=(0, 1), npz=False)
        assert self.fit(tmp_path) == 0
        content = json.loads((tmp_path / "fit" / "p.json").read_text())
        assert not any(row["step"] == "threshold" for row in content["evidence"])
        assert "No thresholds are tried." in capsys.readouterr().out
        assert "--val --npz" in content["notes"][0]

    def test_by_the_rules_of_a_challenge(self, lab: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
        made = lab("regions")
        labels = {"background": 0, "whole_tumor": [1, 2], "tumor_core": 2}
        dataset_json = made.dataset_json | {"labels": labels}
        monkeypatch.setattr(type(made), "dataset_json", property(lambda _: dataset_json))
        made.add(folds=(0, 1), npz=False)
        assert self.fit(tmp_path, "--rules", "2023-MET") == 0
        content = json.loads((tmp_path / "fit" / "p.json").read_text())
        assert (content["rules"], content["metric"]) == ("2023-MET", "lesion-wise Dice (2023-MET)")
        references = made.root / "raw" / "Dataset801_Models" / "labelsTr"
        jobs = [
            ScoringJob("m", path.name, references / path.name, path)
            for path in made.added[0].glob("fold_*/validation/*.nii.gz")
        ]
        options = MetricOptions(rules=read_rules("2023-MET"))
        scores = score_cases(jobs, dataset_json, options=options, progress=False).values["m"].values()
        before = {row["region"]: row["before"] for row in content["together"]}
        for name, region in (("whole_tumor", "WT"), ("tumor_core", "TC")):
            assert before[name] == pytest.approx(np.mean([case[region]["lesion_dice"] for case in scores]))

    def test_one_fold_is_not_enough(
        self, lab: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lab().add(folds=(0,))
        arguments = ["postprocess", "fit", "-d", "801", "-f", "0", "-o", str(tmp_path / "p.json")]
        assert cli.main(arguments) == 2
        assert "expected two or more" in capsys.readouterr().err
        assert not (tmp_path / "p.json").exists()

    def test_all_that_is_wrong_at_once(
        self, lab: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = lab("regions")
        steps = Postprocessing(Scheme.of(made.dataset_json), {"whole": RegionSteps(threshold=0.4)})
        content = {**steps.as_json(), "dataset_json": made.dataset_json}
        (tmp_path / "p.json").write_text(json.dumps(content))
        predictions = made.root / "predictions"
        made.write_predictions(predictions, made.cases[:2], 0.3, 5, npz=False)
        other = {**made.dataset_json, "labels": {"background": 0, "whole": [1, 2], "inner": 2}}
        (predictions / "dataset.json").write_text(json.dumps(other))
        assert apply(predictions, tmp_path / "p.json", tmp_path / "out") == 2
        told = capsys.readouterr().err
        assert "was fitted to the labels" in told
        assert all(f"{case}.npz does not exist" in told for case in made.cases[:2])

        (predictions / "dataset.json").unlink()
        assert apply(predictions, tmp_path / "p.json", tmp_path / "out") == 2
        assert f"{predictions} has no dataset.json" in capsys.readouterr().err

        (predictions / "dataset.json").write_text(json.dumps(made.dataset_json))
        rng = np.random.default_rng(0)
        np.savez_compressed(predictions / "case_0.npz", probabilities=rng.random((2, 3, 3, 3)))
        (predictions / "case_1.npz").write_bytes(b"PK")
        assert apply(predictions, tmp_path / "p.json", tmp_path / "out") == 2
        told = capsys.readouterr().err
        assert "case_0.nii.gz: The probabilities have shape (3, 3, 3); expected" in told
        assert "case_1.npz can't be read" in told
        assert not (tmp_path / "out").exists()
