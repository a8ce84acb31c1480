"""Ids that would point outside a folder or be mistaken for something else."""

import pytest

from nnunet_conres.case_ids import unsafe_ids, why_unsafe


@pytest.mark.parametrize(
    "case_id",
    ["BraTS20_Training_001", "BraTS-GLI-00005-100", "patient_0001", "a.b", "Prostata Größe 3", "x_0000", "a-b", "日本"],
)
def test_ids_that_are_safe(case_id: str) -> None:
    assert not why_unsafe(case_id)


@pytest.mark.parametrize(
    ("case_id", "reason"),
    [
        ("", "is empty"),
        ("../../../victim/thesis", "contains /"),
        ("/etc/passwd", "contains /"),
        ("a\\b", r"contains \,"),
        ("..", "contains .."),
        ("a..b", "contains .."),
        (".hidden", "begins with ."),
        ("-rf", "begins with -"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("a\x1b[31mb", "control character"),
        ("a\u2028b", "line break"),
        (b"a\xff".decode("utf-8", "surrogateescape"), "not UTF-8"),
    ],
)
def test_ids_that_are_not(case_id: str, reason: str) -> None:
    assert reason in why_unsafe(case_id)
    (error,) = unsafe_ids([case_id, "a"], "dataset.json")
    assert error.startswith("dataset.json has the case id ")
    assert error.isprintable()


def test_many_are_one_message() -> None:
    ids = [f"-{number}" for number in range(12)]
    (error,) = unsafe_ids([*ids, "fine"], "labelsTr")
    assert error == (
        "labelsTr has 12 case ids, each of which begins with -, as options of commands do: "
        "'-0', '-1', '-2', '-3', '-4' and 7 more; rename the cases."
    )
