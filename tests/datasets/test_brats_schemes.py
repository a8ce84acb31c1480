import re
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_conres.cli import main
from nnunet_conres.datasets.brats_scheme_files import Layout, Mode, read_scheme
from nnunet_conres.datasets.brats_schemes import (
    SCHEMES,
    archive_of_another,
    choose_scheme,
    common_label_set,
    labels_outside,
    select_schemes,
    to_nnunet_labels,
)
from nnunet_conres.errors import InputError

LAYOUT_2017, LAYOUT_2023, LAYOUT_MSD = (SCHEMES[name].layout for name in ("2018", "2023", "MSD"))

# Independent copy of the challenges' label tables.
CHALLENGES = {
    "2018": {1: "necrosis", 2: "oedema", 4: "enhancing"},
    "2021": {1: "necrosis", 2: "oedema", 4: "enhancing"},
    "2023": {1: "necrosis", 2: "oedema", 3: "enhancing"},
    "2023-MEN": {1: "necrosis", 2: "oedema", 3: "enhancing"},
    "2023-MET": {1: "necrosis", 2: "oedema", 3: "enhancing"},
    "2023-SSA": {1: "necrosis", 2: "oedema", 3: "enhancing"},
    "2023-PED": {1: "necrosis", 2: "oedema", 3: "enhancing"},
    "2024": {1: "necrosis", 2: "oedema", 3: "enhancing", 4: "resection_cavity"},
    "2024-GoAT": {1: "necrosis", 2: "oedema", 3: "enhancing"},
    "2024-MEN-RT": {1: "gross_tumor_volume"},
    "2024-PED": {1: "enhancing", 2: "nonenhancing", 3: "cyst", 4: "oedema"},
    "2025-GLI": {1: "necrosis", 2: "oedema", 3: "enhancing", 4: "resection_cavity"},
    "2025-MET": {1: "necrosis", 2: "oedema", 3: "enhancing", 4: "resection_cavity"},
    "MSD": {1: "oedema", 2: "necrosis", 3: "enhancing"},
}
# The challenges' regions in their own label values.
REGIONS = {
    "2018": {"whole_tumor": {1, 2, 4}, "tumor_core": {1, 4}, "enhancing_tumor": {4}},
    "2023": {"whole_tumor": {1, 2, 3}, "tumor_core": {1, 3}, "enhancing_tumor": {3}},
    "2024": {"whole_tumor": {1, 2, 3}, "tumor_core": {1, 3}, "enhancing_tumor": {3}, "resection_cavity": {4}},
    "2024-PED": {
        "whole_tumor": {1, 2, 3, 4},
        "tumor_core": {1, 2, 3},
        "cystic_component": {3},
        "enhancing_tumor": {1},
    },
    "2024-GoAT": {"whole_tumor": {1, 2, 3}, "tumor_core": {1, 3}, "enhancing_tumor": {3}},
    "2024-MEN-RT": {"gross_tumor_volume": {1}},
    "2025-MET": {"whole_tumor": {1, 2, 3}, "tumor_core": {1, 3}, "enhancing_tumor": {3}, "resection_cavity": {4}},
    "MSD": {"whole_tumor": {1, 2, 3}, "tumor_core": {2, 3}, "enhancing_tumor": {3}},
}


def source_labels(scheme: str) -> np.ndarray:
    return np.random.default_rng(0).choice([0, *CHALLENGES[scheme]], (7, 6, 5)).astype(np.uint8)


class TestSchemes:
    def test_tables_agree_with_the_challenges(self) -> None:
        assert {name: dict(scheme.labels) for name, scheme in SCHEMES.items()} == CHALLENGES

    @pytest.mark.parametrize("scheme", list(REGIONS))
    def test_regions_hold_what_the_challenges_do(self, scheme: str) -> None:
        back = {new: old for old, new in SCHEMES[scheme].to_nnunet().items()}
        found = {name: {back[label] for label in labels} for name, labels in SCHEMES[scheme].label_set.regions.items()}
        assert found == REGIONS[scheme]

    @pytest.mark.parametrize("mode", ["regions", "labels"])
    @pytest.mark.parametrize("scheme", list(CHALLENGES))
    def test_nnunet_restores_the_source(self, scheme: str, mode: Mode) -> None:
        """Source labels to nnU-Net's training targets, to its segmentation, and back by the challenge's table."""
        original = source_labels(scheme)
        converted = to_nnunet_labels(original, SCHEMES[scheme])
        content = SCHEMES[scheme].label_set.dataset_json(mode)
        manager = LabelManager(content["labels"], content.get("regions_class_order"))
        assert manager.has_regions == (mode == "regions" and scheme != "2024-MEN-RT")
        targets = manager.foreground_regions if manager.has_regions else manager.all_labels
        probabilities = np.stack([np.isin(converted, target) for target in targets]).astype(float)
        restored = manager.convert_probabilities_to_segmentation(probabilities)
        np.testing.assert_array_equal(restored, converted)
        tissues = {label: tissue for tissue, label in SCHEMES[scheme].label_set.tissues.items()}
        values = {tissue: value for value, tissue in CHALLENGES[scheme].items()}
        back = {0: 0, **{label: values[tissue] for label, tissue in tissues.items() if tissue in values}}
        np.testing.assert_array_equal(np.vectorize(back.get)(restored), original)

    @pytest.mark.parametrize("scheme", list(SCHEMES))
    def test_labels_are_consecutive_and_regions_as_many(self, scheme: str) -> None:
        label_set = SCHEMES[scheme].label_set
        assert list(label_set.tissues.values()) == list(range(1, len(label_set.tissues) + 1))
        assert len(label_set.regions) == len(label_set.tissues)


class TestLayout:
    @pytest.mark.parametrize(
        ("layout", "name", "expected"),
        [
            (LAYOUT_2017, "Brats18_A_1_t1ce.nii.gz", ("Brats18_A_1", ("T1ce",))),
            (LAYOUT_2017, "a_FLAIR.NII", ("a", ("FLAIR",))),
            (LAYOUT_2017, "a-t1n.nii.gz", None),
            (LAYOUT_2023, "BraTS-GLI-00001-000-t2f.nii.gz", ("BraTS-GLI-00001-000", ("FLAIR",))),
            (LAYOUT_2023, "a_t1.nii.gz", None),
        ],
    )
    def test_split(self, layout, name: str, expected: tuple | None) -> None:
        assert layout.split("any", name) == expected

    def test_decathlon_goes_by_folder(self) -> None:
        assert LAYOUT_MSD.split("imagesTs", "BRATS_485.nii.gz") == ("BRATS_485", ("FLAIR", "T1", "T1ce", "T2"))
        assert LAYOUT_MSD.split("labelsTr", "BRATS_001.nii.gz") == ("BRATS_001", ("labels",))
        assert LAYOUT_MSD.split("other", "BRATS_001.nii.gz") is None
        # a case that was converted for nnU-Net
        assert LAYOUT_MSD.split("imagesTr", "BRATS_001_0000.nii.gz") is None


class TestChooseScheme:
    @pytest.mark.parametrize(
        ("layout", "case_id", "schemes", "expected"),
        [
            (LAYOUT_2017, "anything", ("auto",), "2018"),
            (LAYOUT_2017, "BraTS2021_00000", ("auto",), "2021"),
            (LAYOUT_2017, "brats2021_00000", ("2021",), "2021"),
            (LAYOUT_2017, "anything", ("2021",), "2021"),
            (LAYOUT_2017, "BraTS2021_00000", ("2018",), None),
            (LAYOUT_2023, "BraTS-GLI-00000-000", ("auto",), "2023"),
            (LAYOUT_2023, "BraTS-GLI-00000-100", ("auto",), "2024"),
            (LAYOUT_2023, "BraTS-GLI-00000-100", ("2023",), "2023"),
            (LAYOUT_2023, "BraTS-GLI-00000-100", ("2023", "2024"), "2024"),
            (LAYOUT_2023, "BraTS-GLI-00000-000", ("2024",), "2024"),
            (LAYOUT_2023, "BraTS-GLI-00000-000", ("2025-GLI",), "2025-GLI"),
            (LAYOUT_2023, "BraTS-GLI-00000-100", ("2025-GLI",), "2025-GLI"),
            # Schemes with and without a cavity have the same ids.
            (LAYOUT_2023, "BraTS-MET-00000-000", ("auto",), None),
            (LAYOUT_2023, "BraTS-MET-00000-000", ("2024-MET",), "2023-MET"),
            (LAYOUT_2023, "BraTS-MET-00000-000", ("2026-MET",), "2025-MET"),
            (LAYOUT_2023, "BraTS-MEN-00000-000", ("auto",), "2023-MEN"),
            (LAYOUT_2023, "BraTS-SSA-00000-000", ("auto",), "2023-SSA"),
            (LAYOUT_2023, "BraTS-GoAT-00000", ("auto",), "2024-GoAT"),
            (LAYOUT_2023, "BraTS-GoAT-00000-000", ("auto",), None),
            (LAYOUT_2023, "BraTS-PED-00000-000", ("2024-GoAT",), None),
            (LAYOUT_2023, "BraTS-PED-00000-000", ("2026-PED",), "2024-PED"),
            (SCHEMES["2024-MEN-RT"].layout, "BraTS-MEN-RT-0402-1", ("auto",), "2024-MEN-RT"),
            (LAYOUT_2023, "BraTS-MEN-RT-0402-1", ("auto",), None),
            (LAYOUT_2023, "BraTS-PED-00000-000", ("auto",), None),
            (LAYOUT_2023, "BraTS-PED-00000-000", ("2023-PED", "2024-PED"), None),
            (LAYOUT_2023, "BraTS-PED-00000-000", ("2023", "2024-PED"), "2024-PED"),
            (LAYOUT_2023, "mine", ("auto",), None),
            (LAYOUT_2023, "mine", ("2023",), "2023"),
            (LAYOUT_2023, "mine", ("2018", "2023"), "2023"),
            (LAYOUT_2023, "mine", ("2023", "2024"), None),
            (LAYOUT_2023, "mine", ("2018",), None),
            (LAYOUT_MSD, "BRATS_001", ("auto",), "MSD"),
        ],
    )
    def test_by_layout_id_and_what_was_named(self, layout, case_id: str, schemes: tuple, expected: str | None) -> None:
        scheme, reason = choose_scheme(layout, case_id, select_schemes(schemes)[0])
        assert (None if scheme is None else scheme.name) == expected
        assert bool(reason) == (scheme is None)


class TestCommonLabelSet:
    def test_contained_sets_fit(self) -> None:
        found = common_label_set([SCHEMES["2018"], SCHEMES["2024"], SCHEMES["MSD"]])
        assert found == SCHEMES["2024"].label_set

    def test_contradictions_do_not(self) -> None:
        assert common_label_set([SCHEMES["2023-PED"], SCHEMES["2024-PED"]]) is None


class TestToNnunetLabels:
    def test_unknown_value_names_the_scheme_that_has_it(self) -> None:
        with pytest.raises(ValueError, match=r"labels 4 \(1 voxels\); BraTS 2023.*--scheme 2024"):
            to_nnunet_labels(np.array([0, 1, 4]), SCHEMES["2023"])

    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64, ">i2"])
    def test_any_memory_order_and_type(self, order: str, dtype: str) -> None:
        labels, scheme = np.array(source_labels("2018"), dtype=dtype, order=order), SCHEMES["2018"]
        np.testing.assert_array_equal(
            to_nnunet_labels(labels, scheme), np.vectorize({0: 0, 1: 2, 2: 1, 4: 3}.get)(labels)
        )
        # a view in neither memory order
        np.testing.assert_array_equal(
            to_nnunet_labels(labels[:, ::2, 1:], scheme), to_nnunet_labels(labels, scheme)[:, ::2, 1:]
        )


class TestLabelsOutside:
    def test_counts_also_what_is_no_number(self) -> None:
        found = labels_outside(np.array([0.0, 1.0, 0.5, 0.5, -1.0]), (0, 1))
        assert found == {-1.0: 1, 0.5: 2}


class TestArchives:
    """Folder names as published by the challenges."""

    @pytest.mark.parametrize(
        ("folder", "scheme", "fits"),
        [
            ("ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData", "2023", True),
            ("BraTS2024-BraTS-GLI-AdditionalTrainingData", "2024", True),
            ("BraTS2024-BraTS-GLI-TrainingData", "2025-GLI", True),
            ("BraTS2025-GLI-PRE-Challenge-TrainingData", "2025-GLI", True),
            ("BraTS2025-GLI-PRE-Challenge-TrainingData", "2023", False),
            ("ASNR-MICCAI-BraTS2023-MET-Challenge-TrainingData_Additional", "2023-MET", True),
            ("MICCAI-BraTS2024-MET-Challenge-TrainingData_1", "2023-MET", True),
            ("MICCAI-BraTS2024-MET-Challenge-TrainingData_1", "2025-MET", False),
            ("MICCAI-LH-BraTS2025-MET-Challenge-TrainingData_batch1", "2025-MET", True),
            ("MICCAI-LH-BraTS2025-MET-Challenge-TrainingData_batch1", "2023-MET", False),
            ("ASNR-MICCAI-BraTS2023-MEN-Challenge-TrainingData", "2023-MEN", True),
            ("BraTS2024-MEN-RT-TrainingData", "2024-MEN-RT", True),
            ("ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData", "2023-PED", True),
            ("ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData", "2024-PED", False),
            ("BraTS-PEDs2024_Training", "2024-PED", True),
            ("BraTS-PEDs2024_Training", "2023-PED", False),
            ("BraTS26_PED_training_Complete", "2024-PED", True),
            ("BraTS26_PED_training", "2023-PED", False),
            ("BraTS-PEDs_Batch2_Release", "2023-PED", False),
            ("BraTS2024-SSA-Challenge-ValidationData", "2023-SSA", True),
            ("ISBI2024-BraTS-GoAT-TrainingData", "2024-GoAT", True),
            ("MICCAI2024-BraTS-GoAT-TrainingData-With-GroundTruth", "2024-PED", False),
            ("my_data", "2023-PED", True),
        ],
    )
    def test_contradict_another_years_scheme(self, folder: str, scheme: str, fits: bool) -> None:
        found = archive_of_another(SCHEMES[scheme], ("data", folder, "case"), SCHEMES.values())
        assert (found is None) == fits
        assert SCHEMES[scheme].owns_folder(folder) == (fits and folder != "my_data")

    def test_the_innermost_counts(self) -> None:
        folders = ("ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData", "BraTS-PEDs2024_Training", "BraTS-PED-00001-000")
        assert archive_of_another(SCHEMES["2024-PED"], folders, SCHEMES.values()) is None
        found = archive_of_another(SCHEMES["2023-PED"], folders, SCHEMES.values())
        assert found is not None
        assert found[0] == "BraTS-PEDs2024_Training"

    def test_decide_between_schemes_that_were_named_alone(self) -> None:
        arguments = (LAYOUT_2023, "BraTS-MET-00000-000")
        both = select_schemes(("2023-MET", "2025-MET"))[0]
        assert choose_scheme(*arguments, both, ("MICCAI-BraTS2024-MET-Challenge-TrainingData_2",)) == (
            SCHEMES["2023-MET"],
            "",
        )
        assert choose_scheme(*arguments, both, ("MICCAI-LH-BraTS2025-MET-Challenge",)) == (SCHEMES["2025-MET"], "")
        assert choose_scheme(*arguments, both, ("mine",))[0] is None
        auto = select_schemes(("auto",))[0]
        assert choose_scheme(*arguments, auto, ("MICCAI-LH-BraTS2025-MET-Challenge",))[0] is None


OWN = """
title = "Our hospital"
ids = 'H\\d{3}_\\d'
prefix = 'H\\d'
patient = 'H\\d{3}'

[files]
"{id} pre" = "T1"
"{id} post" = "T1ce"
"{id} mask" = "labels"

[labels]
7 = "core"
9 = "rim"

[regions]
lesion = ["rim", "core"]
core = ["core"]
"""


class TestFiles:
    def test_describe_a_scheme(self, tmp_path: Path) -> None:
        (tmp_path / "ours.toml").write_text(OWN)
        scheme = read_scheme(tmp_path / "ours.toml")
        assert (scheme.name, scheme.labels) == ("ours", {7: "core", 9: "rim"})
        assert scheme.layout.channels == ("T1", "T1ce")
        assert scheme.layout.split("any", "H001_2 post.nii.gz") == ("H001_2", ("T1ce",))
        assert scheme.to_nnunet() == {0: 0, 9: 1, 7: 2}
        assert scheme.label_set.regions == {"lesion": (1, 2), "core": (2,)}
        assert scheme.patient_of("H001_2") == "H001"
        assert f"--scheme {tmp_path / 'ours.toml'}" in scheme.called

    def test_take_the_rest_from_a_scheme_that_they_are_like(self, tmp_path: Path) -> None:
        (tmp_path / "2027-MET.toml").write_text("like = '2025-MET'\ntitle = 'BraTS 2027'\nids = ''\n")
        scheme, base = read_scheme(tmp_path / "2027-MET.toml"), SCHEMES["2025-MET"]
        assert (scheme.layout, scheme.labels, scheme.label_set) == (base.layout, base.labels, base.label_set)
        assert (scheme.title, scheme.ids, scheme.other_names, scheme.archives) == ("BraTS 2027", "", (), ())

    def test_as_documented(self, repository_root: Path, tmp_path: Path) -> None:
        """The examples of the how-to: a short one, and a complete one that equals a built-in scheme."""
        page = (repository_root / "docs/how-to/brats.md").read_text(encoding="utf-8")
        short, long = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
        (tmp_path / "2027-MET.toml").write_text(short, encoding="utf-8")
        assert read_scheme(tmp_path / "2027-MET.toml").label_set == SCHEMES["2025-MET"].label_set
        (tmp_path / "long.toml").write_text(long, encoding="utf-8")
        scheme, builtin = read_scheme(tmp_path / "long.toml"), SCHEMES["2024"]
        for name in ("title", "layout", "ids", "prefix", "archives", "labels", "label_set", "less_enhancing"):
            assert getattr(scheme, name) == getattr(builtin, name), name
        assert (
            scheme.patient_of("BraTS-GLI-00005-100") == builtin.patient_of("BraTS-GLI-00005-100") == "BraTS-GLI-00005"
        )

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("title =", "titel =", "titel is unknown"),
            ("title =", "titel =", "title is missing"),
            ("title =", "like = '1999'\ntitle =", "like is '1999'; expected one of 2018"),
            ("'H\\d{3}'", "'H('", "patient is 'H(', which is not a regular expression"),
            ("'H\\d{3}'", "3", "patient is 3; expected text"),
            ("{id} pre", "pre", "[files] has 'pre'; expected a name with {id}"),
            ("{id} pre", "a/b/{id}", "at most one folder"),
            ("{id} pre", "{id:(}", "whose form of {id} is not a regular expression"),
            ('mask" = "labels"', 'mask" = "T2"', "[files] has no labels"),
            ('= "T1ce"', '= ["T1", "T1ce"]', "[files] has T1 in different files"),
            ('= "T1ce"', "= 3", "'{id} post' is 3; expected a channel"),
            ("7 =", "0 =", "[labels] has 0; expected label values from 1 to 255"),
            ("7 =", "x =", "[labels] has x;"),
            ('9 = "rim"', '9 = "core"', "[labels] has core more than once"),
            ('core = ["core"]', 'core = ["rim", "core"]', "[regions] lesion has nothing beyond"),
            ('core = ["core"]', 'core = ["cyst"]', "[regions] core is ['cyst']; expected a list of tissues"),
            ('core = ["core"]', "", "[regions] lesion has core and rim beyond"),
            ('lesion = ["rim", "core"]', "", "[regions] has rim in no region"),
            ("[files]", "[files", "is not valid TOML"),
            ("prefix", "less_enhancing = 'rim'\nprefix", "less_enhancing is rim"),
        ],
    )
    def test_say_what_is_wrong_with_them(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        path = tmp_path / "ours.toml"
        assert old in OWN
        path.write_text(OWN.replace(old, new))
        with pytest.raises(InputError) as caught:
            read_scheme(path)
        assert any(message in error for error in caught.value.errors), caught.value.errors
        assert all(str(path) in error for error in caught.value.errors)

    def test_list_all_that_is_wrong(self, tmp_path: Path) -> None:
        (tmp_path / "ours.toml").write_text(OWN.replace("'H\\d'", "'('").replace("9 =", "999 ="))
        _, errors = select_schemes(["1999", str(tmp_path / "ours.toml"), str(tmp_path / "none.toml")])
        for part in ("is 1999", "prefix is '('", "has 999", "none.toml cannot be read: No such file"):
            assert part in "".join(errors)
        assert len(errors) == 4

    def test_have_names_that_no_other_scheme_has(self, tmp_path: Path) -> None:
        (tmp_path / "2026-MET.toml").write_text(OWN)
        _, (error,) = select_schemes([str(tmp_path / "2026-MET.toml")])
        assert "a scheme 2026-MET exists already" in error

    def test_come_first_where_names_fit_several(self, tmp_path: Path) -> None:
        (tmp_path / "ours.toml").write_text(OWN.replace("{id} post", "{id}_t1c"))
        selection, errors = select_schemes([str(tmp_path / "ours.toml")])
        assert not errors
        assert selection.layouts[0] == selection.allowed[0].layout
        assert isinstance(selection.layouts[0], Layout)


@pytest.mark.parametrize("command", ["brats-convert", "brats-export"])
def test_help_names_all_schemes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    output = "".join(capsys.readouterr().out.split())
    assert [name for name in SCHEMES if name not in output] == []
