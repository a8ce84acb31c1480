from typing import Any

import pytest

from nnunet_conres.datasets.brats_schemes import SCHEMES
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.rules import known_rules, labels_of_regions, read_rules

# Year and task: dilation, smallest lesion in mm³, penalty in mm, from the challenges' papers and code.
DILATION = {
    "2023-GLI": (3, 50, 374),
    "2023-SSA": (3, 50, 374),
    "2023-PED": (3, 50, 374),
    "2023-MEN": (1, 50, 374),
    "2023-MET": (1, 2, 374),
    "2024-PED": (5, 10, 374),
    "2025-PED": (5, 10, 374),
    "2024-SSA": (3, 50, 374),
    "2025-SSA": (3, 50, 374),
    "2024-MET": (1, 2, 374),
    "2024-MEN-RT": (1, 50, None),
    "2025-MEN-RT": (1, 50, None),
    "2025-MEN": (1, 50, 374),
}


class TestReadRules:
    @pytest.mark.parametrize("name", DILATION)
    def test_values(self, name: str) -> None:
        rules = read_rules(name)
        dilation, smallest, penalty = DILATION[name]
        assert (rules.matching, rules.penalty) == ("dilation", penalty)
        assert set(rules.dilation) == set(rules.smallest_volume) == set(rules.regions)
        assert set(rules.dilation.values()) == {dilation}
        assert set(rules.smallest_volume.values()) == {smallest}
        assert rules.count_false == ("MEN-RT" not in name)
        grouped = "" if name[:4] == "2023" or name == "2025-MEN" else "mm3" if "MEN-RT" in name else "voxels"
        assert rules.group_predictions == grouped

    def test_values_by_region(self) -> None:
        rules = read_rules("2024-GLI")
        assert rules.dilation == {"ET": 3, "NETC": 5, "SNFH": 3, "RC": 5, "TC": 3, "WT": 3}
        assert rules.smallest_volume == {"ET": 10, "NETC": 20, "SNFH": 20, "RC": 20, "TC": 20, "WT": 20}
        assert (rules.penalty, read_rules("2025-GLI").penalty) == (337, 337)

    @pytest.mark.parametrize(
        ("name", "table", "large", "dice"),
        [("2026-MET", "mets", 27, 0.2), ("2026-PED", "seg", None, 0), ("2026-GoAT", "seg", None, 0)],
    )
    def test_one_to_one(self, name: str, table: str, large: float | None, dice: float) -> None:
        rules = read_rules(name)
        assert (rules.matching, rules.table, rules.penalty) == ("one-to-one", table, 373)
        assert (rules.large_volume, rules.found_from_dice) == (large, dice)

    def test_every_file_is_read_and_names_its_source(self) -> None:
        assert {*DILATION, "2024-GLI", "2025-GLI", "2026-MET", "2026-PED", "2026-GoAT"} == set(known_rules())
        for name in known_rules():
            rules = read_rules(name)
            assert rules.name == name
            assert all(source.startswith("https://") for source in rules.sources)
            assert rules.sources

    def test_upper_and_lower_case(self) -> None:
        assert read_rules("2026-goat").name == "2026-GoAT"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("2025-MET", r"2025-MET: it was scored with panoptica, .*was not found\. Expected one of 2023-GLI, "),
            ("2025-goat", "table that is not published"),
            ("2026-GLI", "no such task"),
            ("2022-GLI", r"There are no rules 2022-GLI\. Expected one of"),
        ],
    )
    def test_others_are_refused(self, name: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_rules(name)


class TestLabelsOfRegions:
    @pytest.mark.parametrize("mode", ["regions", "labels"])
    @pytest.mark.parametrize(
        ("scheme", "rules"),
        [
            ("2018", "2023-GLI"),
            ("2023", "2023-GLI"),
            ("2023-MET", "2024-MET"),
            ("2024", "2024-GLI"),
            ("2025-MET", "2026-MET"),
            ("2024-PED", "2026-PED"),
            ("2024-GoAT", "2026-GoAT"),
            ("2024-MEN-RT", "2024-MEN-RT"),
        ],
    )
    def test_of_converted_data_sets(self, scheme: str, rules: str, mode: Any) -> None:
        tissues = SCHEMES[scheme].label_set.tissues
        found = labels_of_regions(read_rules(rules), SCHEMES[scheme].label_set.dataset_json(mode)["labels"])
        inner = {tissue: value for tissue, value in tissues.items() if tissue not in ("oedema", "resection_cavity")}
        expected = {
            "ET": {tissues.get("enhancing")},
            "NETC": {tissues.get("necrosis", tissues.get("nonenhancing"))},
            "SNFH": {tissues.get("oedema")},
            "ED": {tissues.get("oedema")},
            "CC": {tissues.get("cyst")},
            "RC": {tissues.get("resection_cavity")},
            "TC": set(inner.values()),
            "WT": {*inner.values(), tissues.get("oedema")},
            "GTV": {1},
        }
        assert not found.missing
        assert {region: set(values) for region, values in found.labels.items()} == {
            region: expected[region] for region in read_rules(rules).masks
        }

    def test_names_of_other_data_sets(self) -> None:
        labels = {"background": 0, "ET": 3, "TC": [1, 3], "WT": [1, 2, 3], "RC": 4}
        found = labels_of_regions(read_rules("2024-GLI"), labels)
        assert found.labels == {"ET": (3,), "NETC": (1,), "SNFH": (2,), "RC": (4,), "TC": (1, 3), "WT": (1, 2, 3)}

    def test_what_is_not_told_apart_is_missing(self) -> None:
        found = labels_of_regions(read_rules("2024-GLI"), {"background": 0, "whole tumor": [1, 2, 3]})
        assert found.labels == {"WT": (1, 2, 3)}
        assert found.missing == ("ET", "NETC", "SNFH", "RC", "TC")

    def test_a_label_of_unknown_tissue_is_in_no_region(self) -> None:
        found = labels_of_regions(read_rules("2023-GLI"), {"background": 0, "enhancing": 3, "edema": 2, "other": 1})
        # It may be necrosis, so the core and the whole tumour are unknown.
        assert found.labels["ET"] == (3,)
        assert "TC" not in found.labels or found.labels["TC"] == (1, 3)

    def test_no_region_at_all(self) -> None:
        with pytest.raises(InputError, match=r"labels liver.*whole_tumor.*without --rules"):
            labels_of_regions(read_rules("2023-GLI"), {"background": 0, "liver": 1})
