import numpy as np
import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_conres.datasets.brats_schemes import (
    LABEL_SETS,
    LAYOUT_2017,
    LAYOUT_2023,
    LAYOUT_MSD,
    SCHEMES,
    Mode,
    choose_scheme,
    common_label_set,
    labels_outside,
    to_nnunet_labels,
)

# The challenges' own tables, written out once more.
CHALLENGES = {
    "2018": {1: "necrosis", 2: "oedema", 4: "enhancing"},
    "2021": {1: "necrosis", 2: "oedema", 4: "enhancing"},
    "2023": {1: "necrosis", 2: "oedema", 3: "enhancing"},
    "2023-MEN": {1: "necrosis", 2: "oedema", 3: "enhancing"},
    "2023-MET": {1: "necrosis", 2: "oedema", 3: "enhancing"},
    "2023-SSA": {1: "necrosis", 2: "oedema", 3: "enhancing"},
    "2023-PED": {1: "necrosis", 2: "oedema", 3: "enhancing"},
    "2024": {1: "necrosis", 2: "oedema", 3: "enhancing", 4: "resection_cavity"},
    "2024-PED": {1: "enhancing", 2: "nonenhancing", 3: "cyst", 4: "oedema"},
    "MSD": {1: "oedema", 2: "necrosis", 3: "enhancing"},
}
# What the challenges' regions hold, of their own label values.
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
        """Labels to what nnU-Net trains on, that to its segmentation, and back by the challenge's table."""
        original = source_labels(scheme)
        converted = to_nnunet_labels(original, scheme)
        content = SCHEMES[scheme].label_set.dataset_json(mode)
        manager = LabelManager(content["labels"], content.get("regions_class_order"))
        assert manager.has_regions == (mode == "regions")
        targets = manager.foreground_regions if manager.has_regions else manager.all_labels
        probabilities = np.stack([np.isin(converted, target) for target in targets]).astype(float)
        restored = manager.convert_probabilities_to_segmentation(probabilities)
        np.testing.assert_array_equal(restored, converted)
        tissues = {label: tissue for tissue, label in SCHEMES[scheme].label_set.tissues.items()}
        values = {tissue: value for value, tissue in CHALLENGES[scheme].items()}
        back = {0: 0, **{label: values[tissue] for label, tissue in tissues.items() if tissue in values}}
        np.testing.assert_array_equal(np.vectorize(back.get)(restored), original)

    @pytest.mark.parametrize("label_set", LABEL_SETS, ids=lambda label_set: label_set.name)
    def test_labels_are_consecutive_and_regions_as_many(self, label_set) -> None:
        assert list(label_set.tissues.values()) == list(range(1, len(label_set.tissues) + 1))
        assert len(label_set.regions) == len(label_set.tissues)


class TestLayout:
    @pytest.mark.parametrize(
        ("layout", "name", "expected"),
        [
            (LAYOUT_2017, "Brats18_A_1_t1ce.nii.gz", ("Brats18_A_1", "t1ce")),
            (LAYOUT_2017, "a_FLAIR.NII", ("a", "flair")),
            (LAYOUT_2017, "a-t1n.nii.gz", None),
            (LAYOUT_2023, "BraTS-GLI-00001-000-t2f.nii.gz", ("BraTS-GLI-00001-000", "t2f")),
            (LAYOUT_2023, "a_t1.nii.gz", None),
        ],
    )
    def test_split(self, layout, name: str, expected: tuple[str, str] | None) -> None:
        assert layout.split("any", name) == expected

    def test_decathlon_goes_by_folder(self) -> None:
        assert LAYOUT_MSD.split("imagesTs", "BRATS_485.nii.gz") == ("BRATS_485", "images")
        assert LAYOUT_MSD.split("labelsTr", "BRATS_001.nii.gz") == ("BRATS_001", "labels")
        assert LAYOUT_MSD.split("other", "BRATS_001.nii.gz") is None
        # nnU-Net's own copy of it is none
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
            (LAYOUT_2023, "BraTS-MET-00000-000", ("auto",), "2023-MET"),
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
        scheme, reason = choose_scheme(layout, case_id, schemes)
        assert (None if scheme is None else scheme.name) == expected
        assert bool(reason) == (scheme is None)


class TestCommonLabelSet:
    def test_contained_sets_fit(self) -> None:
        found = common_label_set(["2018", "2024", "MSD"])
        assert found is not None
        assert found.name == "post-treatment glioma"

    def test_contradictions_do_not(self) -> None:
        assert common_label_set(["2023-PED", "2024-PED"]) is None


class TestToNnunetLabels:
    def test_unknown_value_names_the_scheme_that_has_it(self) -> None:
        with pytest.raises(ValueError, match=r"labels 4 \(1 voxels\); BraTS 2023.*--scheme 2024"):
            to_nnunet_labels(np.array([0, 1, 4]), "2023")

    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64, ">i2"])
    def test_any_memory_order_and_type(self, order: str, dtype: str) -> None:
        labels = np.array(source_labels("2018"), dtype=dtype, order=order)
        np.testing.assert_array_equal(
            to_nnunet_labels(labels, "2018"), np.vectorize({0: 0, 1: 2, 2: 1, 4: 3}.get)(labels)
        )
        # a view that is neither
        np.testing.assert_array_equal(
            to_nnunet_labels(labels[:, ::2, 1:], "2018"), to_nnunet_labels(labels, "2018")[:, ::2, 1:]
        )


class TestLabelsOutside:
    def test_counts_also_what_is_no_number(self) -> None:
        found = labels_outside(np.array([0.0, 1.0, 0.5, 0.5, -1.0]), (0, 1))
        assert found == {-1.0: 1, 0.5: 2}
