import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

from nnunet_conres.errors import InputError
from nnunet_conres.evaluation import scoring
from nnunet_conres.evaluation.lesions import challenge_scores
from nnunet_conres.evaluation.metrics import MetricOptions, measure
from nnunet_conres.evaluation.rules import read_rules
from nnunet_conres.evaluation.scoring import Scores, ScoringJob, score_cases

REGIONS = {
    "labels": {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": [3], "ignore": 4},
    "file_ending": ".nii.gz",
}
LABELS = {"labels": {"background": 0, "Anterior": 1, "Posterior": 2}, "file_ending": ".nii.gz"}
SPACING = (2.5, 0.9, 1.1)


def save(path: Path, array: np.ndarray, spacing: tuple[float, ...] = SPACING) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    SimpleITK.WriteImage(image, str(path))
    return path


def label_maps(seed: int, highest: int, *, ignore: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.integers(0, highest + 1, (6, 7, 8))
    prediction = np.where(rng.random(reference.shape) < 0.7, reference, rng.integers(0, highest + 1, reference.shape))
    if ignore:
        reference[rng.random(reference.shape) < 0.2] = 4
    return reference.astype(np.uint8), prediction.astype(np.uint8)


def make_jobs(folder: Path, cases: int = 3, model: str = "A", highest: int = 2) -> list[ScoringJob]:
    jobs = []
    for number in range(cases):
        reference, prediction = label_maps(number, highest)
        jobs.append(
            ScoringJob(
                model,
                f"case_{number}",
                save(folder / "labels" / f"case_{number}.nii.gz", reference),
                save(folder / model / f"case_{number}.nii.gz", prediction),
            )
        )
    return jobs


def score(jobs: list[ScoringJob], dataset_json: dict[str, Any] = LABELS, **keywords: Any) -> Scores:
    return score_cases(jobs, dataset_json, progress=False, **keywords)


class TestScoreCases:
    def test_dice_and_iou_equal_nnunets_own(self, tmp_path: Path) -> None:
        from nnunetv2.evaluation.evaluate_predictions import compute_metrics
        from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

        jobs = []
        # The second case has no enhancing tumour, neither true nor predicted.
        for number, highest in enumerate((3, 2)):
            reference, prediction = label_maps(number, highest, ignore=True)
            paths = [
                save(tmp_path / kind / f"c{number}.nii.gz", array)
                for kind, array in (("labels", reference), ("A", prediction))
            ]
            jobs.append(ScoringJob("A", f"c{number}", *paths))
        scores = score(jobs, REGIONS, options=MetricOptions(empty="nan"))
        for job in jobs:
            expected = compute_metrics(
                str(job.reference), str(job.prediction), SimpleITKIO(), [(1, 2, 3), (2, 3), (3,)], 4
            )["metrics"]
            found = scores.values["A"][job.case_id]
            assert list(found) == ["whole_tumor", "tumor_core", "enhancing_tumor", "mean"]
            for name, values in zip(found, expected.values(), strict=False):
                assert found[name]["dice"] == pytest.approx(values["Dice"], abs=1e-12, nan_ok=True)
                assert found[name]["iou"] == pytest.approx(values["IoU"], abs=1e-12, nan_ok=True)
                millilitres = math.prod(SPACING) / 1000
                assert found[name]["reference_volume"] == pytest.approx(values["n_ref"] * millilitres)
                assert found[name]["predicted_volume"] == pytest.approx(values["n_pred"] * millilitres)
        assert math.isnan(scores.values["A"]["c1"]["enhancing_tumor"]["dice"])
        assert score(jobs, REGIONS).values["A"]["c1"]["enhancing_tumor"]["dice"] == 1

    def test_spacing_is_that_of_the_files(self, tmp_path: Path) -> None:
        reference, prediction = np.zeros((2, 6, 7, 8), np.uint8)
        reference[1, 2, 3] = prediction[3, 2, 3] = 1
        job = ScoringJob("A", "c", save(tmp_path / "r.nii.gz", reference), save(tmp_path / "p.nii.gz", prediction))
        assert score([job]).values["A"]["c"]["Anterior"]["hd95"] == pytest.approx(5.0)

    def test_other_file_formats(self, tmp_path: Path) -> None:
        from skimage.io import imsave

        rng = np.random.default_rng(0)
        paths = [tmp_path / name for name in ("r.png", "p.png")]
        maps = [rng.integers(0, 3, (20, 24)).astype(np.uint8) for _ in paths]
        for path, array in zip(paths, maps, strict=True):
            imsave(path, array, check_contrast=False)
        scores = score([ScoringJob("A", "c", *paths)], LABELS | {"file_ending": ".png"}).values["A"]["c"]
        one, other = (array == 2 for array in maps)
        assert scores["Posterior"]["dice"] == pytest.approx(2 * (one & other).sum() / (one.sum() + other.sum()))
        np.testing.assert_equal(scores["Posterior"], measure(one, other, (1.0, 1.0)))

    def test_mean_over_regions(self, tmp_path: Path) -> None:
        reference, prediction = np.zeros((2, 6, 7, 8), np.uint8)
        reference[0:2, 0:4, 0:4] = 1
        prediction[0:2, 0:4, 0:6] = 1  # 50 % too large
        reference[4:6, 0:4, 0:4] = 2
        prediction[4:6, 0:4, 0:2] = 2  # 50 % too small
        job = ScoringJob("A", "c", save(tmp_path / "r.nii.gz", reference), save(tmp_path / "p.nii.gz", prediction))
        scores = score([job]).values["A"]["c"]
        assert scores["mean"]["dice"] == pytest.approx((2 * 32 / (32 + 48) + 2 * 16 / (32 + 16)) / 2)
        assert [scores[name]["relative_volume_error"] for name in scores] == pytest.approx([50, -50, 50])
        single = {"labels": {"background": 0, "all": [1, 2]}, "file_ending": ".nii.gz"}
        assert list(score([job], single).values["A"]["c"]) == ["all"]

    def test_regions_without_a_value_are_left_out_of_the_mean(self, tmp_path: Path) -> None:
        reference = np.zeros((6, 7, 8), np.uint8)
        reference[2:4, 2:4, 2:4] = 1
        path = save(tmp_path / "r.nii.gz", reference)
        scores = score([ScoringJob("A", "c", path, path)], options=MetricOptions(empty="nan")).values["A"]["c"]
        assert math.isnan(scores["Posterior"]["dice"])
        assert scores["mean"]["dice"] == 1

    @pytest.mark.parametrize("change", ["origin", "direction"])
    def test_predictions_that_lie_elsewhere_are_reported(self, tmp_path: Path, change: str) -> None:
        jobs = make_jobs(tmp_path, 2)
        image = SimpleITK.ReadImage(str(jobs[1].prediction))
        if change == "origin":
            image.SetOrigin((5.0, 0.0, 0.0))
        else:
            image.SetDirection((-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
        SimpleITK.WriteImage(image, str(jobs[1].prediction))
        for _ in range(2):  # the second time from the cache
            assert score(jobs, cache_folder=tmp_path / "cache").displaced == (jobs[1].prediction,)

    def test_processes_do_not_matter(self, tmp_path: Path) -> None:
        jobs = [*make_jobs(tmp_path, 2), *make_jobs(tmp_path / "more", 2, "B")][::-1]
        one, two = score(jobs), score(jobs, processes=2)
        assert one == two
        assert list(one.values) == ["B", "A"]
        assert list(one.values["A"]) == ["case_1", "case_0"]


class TestErrors:
    def test_missing_and_twice(self, tmp_path: Path) -> None:
        job = make_jobs(tmp_path, 1)[0]
        gone = [ScoringJob(m, "x", tmp_path / "no.nii.gz", tmp_path / f"no{m}.nii.gz") for m in "AB"]
        with pytest.raises(InputError, match="expected a label file") as caught:
            score([job, job, *gone], processes=0)
        lines = caught.value.errors
        assert len(lines) == 5  # a duplicate, one missing reference, two missing predictions, and the processes
        assert "is a second prediction of case case_0 by A" in lines[0]

    def test_all_that_do_not_fit_at_once(self, tmp_path: Path) -> None:
        good = np.ones((6, 7, 8), np.uint8)
        with_nan = good.astype(np.float32)
        with_nan[0, 0, 0] = math.nan
        reference = save(tmp_path / "reference.nii.gz", good)
        files = {
            "good": save(tmp_path / "good.nii.gz", good),
            "shape": save(tmp_path / "shape.nii.gz", good[:-1]),
            "spacing": save(tmp_path / "spacing.nii.gz", good, (2.5, 0.9, 1.0)),
            "label": save(tmp_path / "label.nii.gz", good * 7),
            "nan": save(tmp_path / "nan.nii.gz", with_nan),
            "nrrd": save(tmp_path / "nrrd.nrrd", with_nan),
            "text": tmp_path / "text.nii.gz",
            "cut": tmp_path / "cut.nii.gz",
        }
        files["text"].write_text("no image")
        whole = save(tmp_path / "whole.nii.gz", np.random.default_rng(0).integers(0, 3, (40, 40, 40)).astype(np.uint8))
        files["cut"].write_bytes(whole.read_bytes()[:-3000])
        with pytest.raises(InputError, match=r"dataset\.json does not name") as caught:
            score([ScoringJob("A", case, reference, path) for case, path in files.items()], cache_folder=tmp_path / "c")
        lines = str(caught.value).splitlines()
        assert [Path(line.split(" ")[0]).name.split(".")[0] for line in lines] == list(files)[1:]
        assert "(5, 7, 8); expected (6, 7, 8) like" in lines[0]
        assert "2.5 x 0.9 x 1 mm; expected 2.5 x 0.9 x 1.1 mm" in lines[1]
        assert "does not name: 7; expected 0, 1, 2" in lines[2]
        # ITK reads NaN in NIfTI files as zero, which would be background.
        assert "nan.nii.gz has 1 voxels that are NaN or infinite; expected labels." in lines[3]
        assert "nrrd.nrrd has 1 voxels that are NaN or infinite; expected labels." in lines[4]
        assert all("cannot be read" in line for line in lines[5:])
        # The result of the valid file is cached.
        assert len(list((tmp_path / "c").iterdir())) == 1

    def test_ignore_is_for_references(self, tmp_path: Path) -> None:
        path = save(tmp_path / "r.nii.gz", np.full((6, 7, 8), 4, np.uint8))
        with pytest.raises(InputError, match="does not name: 4; expected 0, 1, 2, 3") as caught:
            score([ScoringJob("A", "c", path, path)], REGIONS)
        assert len(str(caught.value).splitlines()) == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"file_ending": ".nii.gz"}, "no usable labels"),
            ({"labels": {"background": 0, "a": 1}}, "no file_ending"),
            ({"labels": {"background": 0, "ignore": 1}, "file_ending": ".nii.gz"}, "no label beside"),
            ({"labels": {"background": 0, "mean": 1}, "file_ending": ".nii.gz"}, "called 'mean'"),
        ],
    )
    def test_dataset_json(self, tmp_path: Path, content: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            score(make_jobs(tmp_path, 1), content)

    def test_nothing_to_score(self) -> None:
        with pytest.raises(InputError, match="no prediction to score"):
            score([])

    def test_a_cache_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "c").write_text("")
        with pytest.raises(InputError, match=r"/c: File exists"):
            score(make_jobs(tmp_path, 1), cache_folder=tmp_path / "c")


class TestCache:
    def test_what_is_known_is_not_measured_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = tmp_path / "deep" / "cache"
        jobs = make_jobs(tmp_path)
        first = score(jobs, cache_folder=cache)
        assert (first.cached, len(list(cache.glob("*.json")))) == (0, 3)
        monkeypatch.setattr(scoring, "measure", lambda *_, **__: pytest.fail("measured again"))
        # The cache identifies files by content, not by path.
        moved = tmp_path / "elsewhere.nii.gz"
        moved.write_bytes(jobs[2].prediction.read_bytes())
        jobs[2] = ScoringJob("B", "other", jobs[2].reference, moved)
        second = score(jobs, cache_folder=cache)
        assert second.cached == 3
        np.testing.assert_equal(second.values["B"]["other"], first.values["A"]["case_2"])
        np.testing.assert_equal(second.values["A"]["case_0"], first.values["A"]["case_0"])

    @pytest.mark.parametrize("what", ["prediction", "reference", "options", "regions", "metrics"])
    def test_what_changed_is(self, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
        jobs = make_jobs(tmp_path, 2)
        score(jobs, cache_folder=tmp_path / "cache")
        keywords: dict[str, Any] = {}
        if what in ("prediction", "reference"):
            save(getattr(jobs[1], what), label_maps(9, 2)[0])
        elif what == "options":
            keywords["options"] = MetricOptions(tolerance=2)
        elif what == "regions":
            keywords["dataset_json"] = LABELS | {"labels": {"background": 0, "Anterior": 1, "Posterior": [1, 2]}}
        else:
            monkeypatch.setattr(scoring, "METRIC_VERSION", -1)
        again = score(jobs, cache_folder=tmp_path / "cache", **keywords)
        assert again.cached == (1 if what in ("prediction", "reference") else 0)
        fresh = score(jobs, **keywords)
        np.testing.assert_equal(again.values, fresh.values)

    @pytest.mark.parametrize(
        "rest", ["", "{", "[]", "null", '{"scores": {}}', '{"scores": {"Anterior": {}, "Posterior": {}}}']
    )
    def test_damaged_entries_are_made_again(self, tmp_path: Path, rest: str) -> None:
        jobs = make_jobs(tmp_path, 1)
        first = score(jobs, cache_folder=tmp_path / "cache")
        entry = next((tmp_path / "cache").glob("*.json"))
        whole = entry.read_text()
        entry.write_text(rest)
        again = score(jobs, cache_folder=tmp_path / "cache")
        assert again.cached == 0
        np.testing.assert_equal(again.values, first.values)
        assert entry.read_text() == whole
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [entry.name]

    def test_nan_survives(self, tmp_path: Path) -> None:
        path = save(tmp_path / "r.nii.gz", np.zeros((6, 7, 8), np.uint8))
        options = MetricOptions(empty="nan")
        both = [score([ScoringJob("A", "c", path, path)], options=options, cache_folder=tmp_path) for _ in "12"]
        assert both[1].cached == 1
        np.testing.assert_equal(both[0].values, both[1].values)
        assert math.isnan(both[1].values["A"]["c"]["mean"]["dice"])

    def test_goes_on_after_a_stop(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        jobs = make_jobs(tmp_path)
        calls = []

        def stopped(*arguments: Any, **keywords: Any) -> dict[str, float]:
            calls.append(1)
            if len(calls) > 4:  # two labels per case
                raise KeyboardInterrupt
            return measure(*arguments, **keywords)

        monkeypatch.setattr(scoring, "measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            score(jobs, cache_folder=tmp_path / "cache")
        monkeypatch.undo()
        assert score(jobs, cache_folder=tmp_path / "cache").cached == 2


class TestRules:
    BRATS: dict[str, Any] = {  # noqa: RUF012
        "labels": {"background": 0, "NETC": 1, "SNFH": 2, "ET": 3, "ignore": 4},
        "file_ending": ".nii.gz",
    }

    @pytest.mark.parametrize("like", [False, True])
    def test_regions_are_the_challenges(self, tmp_path: Path, like: bool) -> None:
        rules = read_rules("2026-GoAT")
        options = MetricOptions(rules=rules, like_brats_evaluation=like)
        reference, prediction = label_maps(1, 3, ignore=True)
        reference[0], prediction[0] = 0, 3  # no lesion in the first slice, but all of it predicted as ET
        paths = [save(tmp_path / f"{name}.nii.gz", array) for name, array in (("r", reference), ("p", prediction))]
        job = ScoringJob("A", "c", *paths)
        keywords = {"options": options, "cache_folder": tmp_path / "cache"}
        scores = score([job], self.BRATS, **keywords)
        ignored = reference == 4
        expected = challenge_scores(
            np.where(ignored, 0, reference),
            np.where(ignored, 0, prediction),
            tuple(float(np.float32(step)) for step in SPACING),
            rules,
            {"ET": (3,), "TC": (1, 3), "WT": (1, 2, 3)},
            like_brats_evaluation=like,
        )
        found = scores.values["A"]["c"]
        assert list(found) == ["ET", "TC", "WT", "mean"]
        for region, values in expected.items():
            assert list(found[region]) == list(options.measured)
            assert found[region] == pytest.approx(values, nan_ok=True)
        again = score([job], self.BRATS, **keywords)
        assert again.cached == 1
        np.testing.assert_equal(again.values, scores.values)

    def test_missing_regions(self, tmp_path: Path) -> None:
        content = {"labels": {"background": 0, "whole_tumor": [1, 2]}, "file_ending": ".nii.gz"}
        scores = score(make_jobs(tmp_path, 1), content, options=MetricOptions(rules=read_rules("2023-GLI")))
        assert list(scores.values["A"]["case_0"]) == ["WT"]
        assert scores.missing_regions == ("ET", "TC")
        with pytest.raises(InputError, match="Anterior, Posterior"):
            score(make_jobs(tmp_path, 1), options=MetricOptions(rules=read_rules("2023-GLI")))
