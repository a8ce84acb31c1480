import gzip
import json
import re
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from nnunet_conres import cli
from nnunet_conres.datasets.splits import (
    UNKNOWN,
    CaseFacts,
    balanced_parts,
    format_table,
    group_cases,
    patient_of,
    split,
)
from nnunet_conres.errors import InputError

SPACING = (1.0, 2.0, 2.5)  # x, y, z: a voxel has 5 mm3
SITES = r"Brats18_(TCIA\d+|CBICA|2013)_"


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    SimpleITK.WriteImage(image, str(path))


def make_dataset(root: Path, voxels: dict[str, int], *, ignore: bool = False) -> Path:
    """Write a raw data set whose cases have the given numbers of labelled voxels."""
    folder = root / "raw" / "Dataset501_BraTS"
    for case_id, count in voxels.items():
        labels = np.zeros((4, 8, 8), np.uint8)
        labels.flat[:count] = 1 + np.arange(count) % 2
        if ignore:
            labels.flat[count:] = 3
        save(folder / "labelsTr" / f"{case_id}.nii.gz", labels)
        save(folder / "imagesTr" / f"{case_id}_0000.nii.gz", labels.astype(np.float32))
    names = {"background": 0, "whole_tumor": [1, 2], "core": 2} | ({"ignore": 3} if ignore else {})
    content = {"channel_names": {"0": "T1"}, "labels": names, "regions_class_order": [1, 2], "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content | {"numTraining": len(voxels)}))
    return folder


@pytest.fixture
def nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


@pytest.fixture
def dataset(nnunet: Path) -> Path:
    return make_dataset(nnunet, {f"case_{number:02d}": 5 * number for number in range(12)})


def errors_of(*args: object, **kwargs: object) -> str:
    with pytest.raises(InputError) as error:
        split(*args, progress=False, **kwargs)  # type: ignore[arg-type]
    return str(error.value)


def held_out(folder: Path, number: int, cases: list[str], summary: bool = False) -> None:
    """Write the files that nnU-Net leaves after training a fold."""
    fold = folder / f"fold_{number}"
    (fold / "validation").mkdir(parents=True)
    (fold / "checkpoint_final.pth").touch()
    for case_id in cases:
        (fold / "validation" / f"{case_id}.nii.gz").touch()
    if summary:
        entries = [{"prediction_file": f"D:\\results\\validation\\{case_id}.nii.gz"} for case_id in cases]
        (fold / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": entries}))


def synthetic_cases(number: int, seed: int, *, most_times: int = 1) -> list[CaseFacts]:
    """Return cases of patients with up to `most_times` time points, and volumes as skewed as those of tumours."""
    rng = np.random.default_rng(seed)
    cases: list[CaseFacts] = []
    while len(cases) < number:
        patient, volume, grade = f"p{len(cases):04d}", rng.lognormal(3.5, 0.8), "HGG" if rng.random() < 0.73 else "LGG"
        for time in range(rng.integers(1, most_times + 1)):
            cases.append(CaseFacts(f"{patient}-{time}", patient, volume * rng.lognormal(0, 0.3), grade))
    return cases


class TestPatientOf:
    @pytest.mark.parametrize(
        ("case_id", "patient"),
        [
            ("BraTS-GLI-00005-000", "BraTS-GLI-00005"),
            ("BraTS-GLI-00005-100", "BraTS-GLI-00005"),
            ("BraTS-MEN-00004-000", "BraTS-MEN-00004"),
            ("BraTS-MET-00001-001", "BraTS-MET-00001"),
            ("BraTS-PED-00002-000", "BraTS-PED-00002"),
            ("BraTS-SSA-00002-000", "BraTS-SSA-00002"),
            ("BraTS-MEN-RT-0012-1", "BraTS-MEN-RT-0012"),
            ("BraTS-GoAT-00012", "BraTS-GoAT-00012"),
            ("BraTS2021_00000", "BraTS2021_00000"),
            ("Brats18_TCIA01_131_1", "Brats18_TCIA01_131_1"),
            ("hippocampus_001", "hippocampus_001"),
        ],
    )
    def test_time_point_is_left_out_where_there_is_one(self, case_id: str, patient: str) -> None:
        assert patient_of(case_id) == patient


class TestGroupCases:
    def test_sites_of_2018(self) -> None:
        ids = ["Brats18_TCIA01_131_1", "Brats18_TCIA01_2_1", "Brats18_CBICA_AAB_1", "Brats18_2013_0_1"]
        groups, errors = group_cases(ids, re.compile(SITES))
        assert list(groups.values()) == ["TCIA01", "TCIA01", "CBICA", "2013"]
        assert errors == []

    def test_whole_match_without_parentheses(self) -> None:
        assert group_cases(["a1_x", "a1_y"], re.compile(r"^a\d"))[0] == {"a1_x": "a1", "a1_y": "a1"}

    def test_ids_without_a_match_are_listed(self) -> None:
        groups, (error,) = group_cases(["Brats18_CBICA_AAB_1", "odd", "strange"], re.compile(SITES))
        assert "2 of 3 cases: odd, strange" in error
        assert "odd" not in groups


class TestBalancedParts:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    @pytest.mark.parametrize("most_times", [1, 4])
    def test_as_even_as_the_best_of_many_random_ones(self, seed: int, most_times: int) -> None:
        cases = synthetic_cases(120, seed, most_times=most_times)
        parts = balanced_parts(cases, 5, "both", seed)
        facts = {case.case_id: case for case in cases}
        patients = sorted({case.group for case in cases})

        def worst(divided: list[set[str]]) -> tuple[float, float]:
            """Return the largest relative deviation of a part's mean volume, and the largest of its share of HGG."""
            means = [np.mean([facts[case_id].volume for case_id in part]) for part in divided]
            shares = [np.mean([facts[case_id].grade == "HGG" for case_id in part]) for part in divided]
            overall = np.mean([case.volume for case in cases])
            share = np.mean([case.grade == "HGG" for case in cases])
            return max(abs(np.array(means) / overall - 1)), max(abs(np.array(shares) - share))

        rng = np.random.default_rng(seed)
        by_chance = []
        for _ in range(100):
            number = dict(zip(patients, rng.permutation(len(patients)) % 5, strict=True))
            by_chance.append(worst([{c.case_id for c in cases if number[c.group] == n} for n in range(5)]))
        volume, grade = worst(parts)
        assert volume < 0.5 * np.median([one for one, _ in by_chance])
        assert volume < 0.08
        assert grade < 0.5 * np.median([one for _, one in by_chance])

        assert sorted(case_id for part in parts for case_id in part) == sorted(facts)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= most_times - (most_times > 1)
        for part in parts:
            inside = {facts[case_id].group for case_id in part}
            assert part == {case.case_id for case in cases if case.group in inside}

    @pytest.mark.parametrize("number", [5, 7, 23, 64])
    @pytest.mark.parametrize("balance", ["both", "grade", "volume", "none"])
    def test_sizes_differ_by_one_at_most(self, number: int, balance: str) -> None:
        parts = balanced_parts(synthetic_cases(number, 0), 5, balance, 0)  # type: ignore[arg-type]
        assert set(map(len, parts)) <= {number // 5, -(-number // 5)}

    def test_each_balance_does_what_it_says(self) -> None:
        cases = synthetic_cases(100, 3)
        facts = {case.case_id: case for case in cases}

        def spread(balance: str) -> tuple[int, float]:
            parts = balanced_parts(cases, 5, balance, 0)  # type: ignore[arg-type]
            grades = [sum(facts[case_id].grade == "HGG" for case_id in part) for part in parts]
            return max(grades) - min(grades), float(np.std([sum(facts[i].volume for i in part) for part in parts]))

        (both_g, both_v), (grade_g, grade_v), (volume_g, volume_v), (none_g, none_v) = map(
            spread, ("both", "grade", "volume", "none")
        )
        assert both_g <= 1
        assert grade_g <= 1
        assert volume_g > 1
        assert none_g > 1
        assert max(both_v, volume_v) < 0.05 * min(grade_v, none_v)

    def test_same_for_the_same_seed_in_any_order_and_other_for_another(self) -> None:
        cases = synthetic_cases(40, 0)
        first = balanced_parts(cases, 5, "both", 7)
        assert balanced_parts(cases[::-1], 5, "both", 7) == first
        assert balanced_parts(cases, 5, "both", 8) != first

    def test_one_group_per_part(self) -> None:
        cases = [CaseFacts(f"{site}{n}", site, 1.0 + n) for site, size in zip("abc", (9, 2, 1), strict=True)
                 for n in range(size)]  # fmt: skip
        parts = balanced_parts(cases, 3, "both", 0)
        assert sorted(map(len, parts)) == [1, 2, 9]

    def test_no_volume_at_all(self) -> None:
        parts = balanced_parts([CaseFacts(str(n), str(n)) for n in range(6)], 3, "both", 0)
        assert list(map(len, parts)) == [2, 2, 2]

    @pytest.mark.parametrize(("number", "most_times"), [(30, 1), (100, 1), (100, 3), (1251, 1)])
    def test_volumes_are_more_even_than_by_scikit_learn(self, number: int, most_times: int) -> None:
        """`StratifiedGroupKFold` is not enough: it balances classes only, and volumes vary within classes."""
        from sklearn.model_selection import StratifiedGroupKFold

        cases = synthetic_cases(number, 1, most_times=most_times)
        volumes = np.array([case.volume for case in cases])
        # two volume classes, split at the median; finer classes have too few cases in small data sets
        classes = [f"{case.grade} {case.volume > np.median(volumes)}" for case in cases]
        splitter = StratifiedGroupKFold(5, shuffle=True, random_state=0)
        theirs = [test for _, test in splitter.split(volumes, classes, [case.group for case in cases])]
        ours = [[case.case_id in part for case in cases] for part in balanced_parts(cases, 5, "both", 0)]

        def spread(parts: list) -> float:
            means = [volumes[part].mean() for part in parts]
            return max(means) / min(means) - 1

        assert spread(ours) < 0.2 * spread(theirs)


@pytest.mark.usefixtures("dataset")
class TestSplit:
    def test_nnunet_reads_it(self, nnunet: Path) -> None:
        done = split(501, folds=4, progress=False)
        assert done.path == nnunet / "preprocessed" / "Dataset501_BraTS" / "splits_final.json"
        content = json.loads(done.path.read_text())
        assert [sorted(fold) for fold in content] == [["train", "val"]] * 4
        every = [f"case_{number:02d}" for number in range(12)]
        assert sorted(case_id for fold in content for case_id in fold["val"]) == every
        for fold in content:
            assert sorted(fold["train"] + fold["val"]) == every
            assert len(fold["val"]) == 3
        assert list(done.path.parent.iterdir()) == [done.path]

    def test_volume_is_in_millilitres(self) -> None:
        facts = split(501, progress=False).cases["case_10"]
        assert facts.volume == pytest.approx(50 * 5 / 1000)
        assert facts.grade == UNKNOWN

    def test_ignored_voxels_are_no_tumour(self, nnunet: Path) -> None:
        make_dataset(nnunet, {f"case_{number:02d}": 5 * number for number in range(12)}, ignore=True)
        assert split(501, progress=False).cases["case_10"].volume == pytest.approx(50 * 5 / 1000)

    def test_time_points_stay_together(self, nnunet: Path, dataset: Path) -> None:
        for case_id in [f"BraTS-GLI-{patient:05d}-{time:03d}" for patient in range(6) for time in (0, 100)]:
            for folder, ending in (("imagesTr", "_0000"), ("labelsTr", "")):
                source = dataset / folder / f"case_05{ending}.nii.gz"
                (dataset / folder / f"{case_id}{ending}.nii.gz").write_bytes(source.read_bytes())
        for fold in split(501, folds=3, progress=False).folds:
            seen = {patient_of(case_id) for case_id in fold.validation}
            assert not seen & {patient_of(case_id) for case_id in fold.training}
            assert len(fold.validation) == 8

    def test_grades_of_the_converter(self, dataset: Path) -> None:
        known = {f"case_{n:02d}": {"grade": "LGG" if n % 3 else "HGG", "source": "HGG/x"} for n in range(12)}
        (dataset / "cases.json").write_text(json.dumps(known))
        done = split(501, folds=4, progress=False)
        for fold in done.folds:
            assert Counter(done.cases[case_id].grade for case_id in fold.validation) == {"LGG": 2, "HGG": 1}
        assert "HGG" in format_table(done).splitlines()[0]

    def test_grades_of_a_table_win(self, dataset: Path, tmp_path: Path) -> None:
        (dataset / "cases.json").write_text(json.dumps({"case_00": {"grade": "HGG"}}))
        table = tmp_path / "name_mapping.csv"
        rows = [f"{'LGG' if n % 2 else 'HGG'},old_{n},case_{n:02d}" for n in range(11)]
        table.write_text("\n".join(["\ufeffGrade,BraTS_2017_subject_ID,BraTS_2018_subject_ID", *rows, "NA,,case_11"]))
        done = split(501, folds=3, grades_file=table, progress=False)
        assert Counter(case.grade for case in done.cases.values()) == {"HGG": 6, "LGG": 5, UNKNOWN: 1}
        assert done.cases["case_03"].grade == "LGG"
        assert done.warnings == ("The grade of 1 of 12 cases is not known: case_11.",)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("id,age\ncase_00,3", "has no column Grade, but id, age"),
            ("", "has no column Grade, but nothing"),
            ("Grade;ID\nHGG;other", "no column with ids of the data set such as case_00, case_01; its columns are ID"),
            ("Grade,ID\nHGG,case_00\nLGG,case_00", "gives 1 cases more than one grade: case_00"),
        ],
    )
    def test_tables_that_do_not_fit(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "grades.csv").write_text(text)
        assert message in errors_of(501, grades_file=tmp_path / "grades.csv")

    def test_grade_alone_wants_grades(self) -> None:
        assert "No grade is known" in errors_of(501, balance="grade")

    def test_unknown_ids_of_a_group_expression(self) -> None:
        assert "finds no group for 12 of 12 cases: case_00" in errors_of(501, group=SITES)
        assert "is not a regular expression" in errors_of(501, group="(")

    def test_too_few_groups(self) -> None:
        assert "make 2 groups (0, 1), which are too few for 5 folds" in errors_of(501, group=r"_(\d)")

    def test_arguments_are_checked_together(self) -> None:
        text = errors_of(501, folds=1, balance="age", seed=-1, processes=0)  # type: ignore[arg-type]
        assert "4 errors" in text

    def test_unreadable_labels_are_named(self, dataset: Path) -> None:
        (dataset / "labelsTr" / "case_03.nii.gz").write_bytes(b"no image")
        (dataset / "imagesTr" / "case_04_0000.nii.gz").unlink()
        text = errors_of(501)
        assert "labelsTr/case_03.nii.gz cannot be read" in text
        assert "case_04_0000.nii.gz is missing" in text

    def test_labels_with_a_scale_factor(self, dataset: Path) -> None:
        """1 is stored as 32000 and read as 0.99999285. It is a label, but nnU-Net's training would truncate it."""
        path = dataset / "labelsTr" / "case_03.nii.gz"
        before = split(501, folds=2, progress=False)
        stored = nibabel.load(path)
        labels = np.asarray(stored.dataobj)
        scaled = nibabel.Nifti1Image(np.rint((labels + 319.0) / 0.01).astype(np.int16), stored.affine)
        scaled.header.set_slope_inter(0.01, -319.0)
        path.write_bytes(gzip.compress(scaled.to_bytes()))
        assert np.asarray(nibabel.load(path).dataobj).max() != labels.max()
        done = split(501, folds=2, progress=False)
        assert done.cases == before.cases
        (warning,) = set(done.warnings) - set(before.warnings)
        assert "1 cases, case_03, have labels that nnU-Net's SimpleITKIO reads as" in warning
        assert "its training truncates them" in warning

    def test_nothing_is_overwritten_unless_asked_for(self) -> None:
        first = split(501, progress=False)
        before = first.path.read_bytes()
        again = split(501, progress=False)
        assert again.unchanged
        assert not first.unchanged
        assert "exists already and has other splits; add --force" in errors_of(501, seed=1)
        assert first.path.read_bytes() == before
        assert not split(501, seed=1, force=True, progress=False).unchanged
        assert first.path.read_bytes() != before

    def test_damaged_file_is_not_overwritten_either(self) -> None:
        done = split(501, progress=False)
        done.path.write_text("[")
        assert "add --force" in errors_of(501)

    def test_splits_in_the_raw_folder_would_stop_planning(self, dataset: Path) -> None:
        (dataset / "splits_final.json").write_text("[]")
        assert "nnU-Net's planning stops" in split(501, progress=False).warnings[0]

    def test_group_that_separates_time_points(self, nnunet: Path) -> None:
        cases = {f"BraTS-GLI-{patient:05d}-{time:03d}": 5 for patient in range(100, 103) for time in (0, 1)}
        make_dataset(nnunet, cases)
        for path in (nnunet / "raw" / "Dataset501_BraTS").glob("*/case_*"):
            path.unlink()
        done = split(501, folds=2, group=".+", progress=False)
        assert "time points of 3 patients into different groups" in done.warnings[0]


@pytest.mark.usefixtures("dataset")
class TestValidationFile:
    def test_single_fold(self, tmp_path: Path) -> None:
        (tmp_path / "held.txt").write_text("# by hand\ncase_07\n\n case_02 \n")
        (fold,) = split(501, validation_file=tmp_path / "held.txt", progress=False).folds
        assert fold.validation == ("case_02", "case_07")
        assert len(fold.training) == 10

    def test_errors_are_listed_together(self, tmp_path: Path) -> None:
        (tmp_path / "held.txt").write_text("case_07\ncase_07\ncase_99\ncase_01_0000.nii.gz\n")
        text = errors_of(501, validation_file=tmp_path / "held.txt")
        assert "names 2 cases that are not in the data set: case_99, case_01_0000.nii.gz; expected ids such as" in text
        assert "more than once: case_07" in text

    @pytest.mark.parametrize(
        ("cases", "message"), [([], "names no case"), ([f"case_{n:02d}" for n in range(12)], "names all 12 cases")]
    )
    def test_none_and_all(self, tmp_path: Path, cases: list[str], message: str) -> None:
        (tmp_path / "held.txt").write_text("\n".join(cases))
        assert message in errors_of(501, validation_file=tmp_path / "held.txt")

    def test_patient_on_both_sides(self, tmp_path: Path) -> None:
        (tmp_path / "held.txt").write_text("case_07\n")
        text = errors_of(501, validation_file=tmp_path / "held.txt", group=r"case_\d")
        assert "9 training cases are of the same patient or group as held-out ones" in text
        assert "case_00" in text

    def test_missing_file(self, tmp_path: Path) -> None:
        assert "none.txt cannot be read" in errors_of(501, validation_file=tmp_path / "none.txt")


@pytest.mark.usefixtures("dataset")
class TestOtherTrainings:
    def test_folds_that_held_out_other_cases_are_named(self, nnunet: Path) -> None:
        folds = split(501, folds=3, progress=False).folds
        results = nnunet / "results" / "Dataset501_BraTS"
        same, other = results / "nnUNetTrainerA__nnUNetPlans__3d_fullres", results / "nnUNetTrainerB__p__3d_fullres"
        held_out(same, 0, list(folds[0].validation))
        held_out(same, 1, list(folds[1].validation), summary=True)
        held_out(other, 0, list(folds[1].validation), summary=True)
        held_out(other, 2, ["case_00"])
        held_out(other, 4, ["case_00"])
        (other / "fold_all").mkdir()
        (other / "fold_1" / "validation").mkdir(parents=True)  # started, but without a checkpoint
        reported = split(501, folds=3, progress=False).other_trainings
        assert [text.partition(" in ")[0] for text in reported] == [
            "nnUNetTrainerB__p__3d_fullres, fold 0",
            "nnUNetTrainerB__p__3d_fullres, fold 4",
        ]
        assert "held out other cases (validation/summary.json): 4, of which 0 are among the 4" in reported[0]
        assert "is not a fold of the new splits, which have 3" in reported[1]

        (results.parents[1] / "preprocessed" / "Dataset501_BraTS" / "splits_final.json").unlink()
        assert any("fold 2" in text for text in split(501, folds=3, progress=False).other_trainings)

    def test_without_validation_the_old_splits_tell(self, nnunet: Path) -> None:
        split(501, folds=3, progress=False)
        model = nnunet / "results" / "Dataset501_BraTS" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
        held_out(model, 0, [])
        assert "Already trained: nnUNetTrainer__nnUNetPlans__3d_fullres, fold 0" in errors_of(501, folds=3, seed=3)
        (reported,) = split(501, folds=3, seed=3, force=True, progress=False).other_trainings
        assert "the previous splits file" in reported

    def test_unknown_splits(self, nnunet: Path) -> None:
        held_out(nnunet / "results" / "Dataset501_BraTS" / "nnUNetTrainer__nnUNetPlans__3d_fullres", 0, [])
        (reported,) = split(501, progress=False).other_trainings
        assert "was trained on unknown splits" in reported


@pytest.mark.usefixtures("dataset")
class TestCommand:
    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["split", "-d", "501", "--folds", "3", "-np", "1"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith("splits_final.json")
        assert lines[1].split() == ["fold", "training", "validation", "groups", "mean", "volume"]
        assert lines[2].split()[:4] == ["0", "8", "4", "4"]
        assert lines[5].split() == ["all", "12", "12", "0.1", "ml"]

    def test_folds_and_validation_exclude_each_other(self) -> None:
        with pytest.raises(SystemExit):
            cli.main(["split", "-d", "501", "--folds", "3", "--validation", "x"])

    def test_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["split", "-d", "501", "--folds", "50", "-np", "1"]) == 2
        assert "too few for 50 folds" in capsys.readouterr().err
