"""bfloat16 on CPUs that have it, and the switch to float32."""

import pytest
import torch

from nnunet_conres.trainers import precision


@pytest.fixture
def _capable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)


def product_dtype(device: str = "cpu") -> torch.dtype:
    with precision.cpu_autocast(torch.device(device)):
        return torch.nn.functional.conv3d(torch.rand(1, 1, 3, 3, 3), torch.rand(1, 1, 1, 1, 1)).dtype


@pytest.mark.usefixtures("_capable")
def test_on_by_default_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(precision.CPU_BFLOAT16_VARIABLE, raising=False)
    assert product_dtype() == torch.bfloat16


@pytest.mark.usefixtures("_capable")
@pytest.mark.parametrize("value", ["0", "false", "F", " False "])
def test_float32_is_one_switch_away(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(precision.CPU_BFLOAT16_VARIABLE, value)
    assert product_dtype() == torch.float32


def test_off_where_the_processor_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: False)
    assert product_dtype() == torch.float32


@pytest.mark.usefixtures("_capable")
def test_leaves_other_devices_to_nnunet() -> None:
    assert product_dtype("cuda") == torch.float32


@pytest.mark.usefixtures("_capable")
def test_says_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(precision.CPU_BFLOAT16_VARIABLE, raising=False)
    assert precision.training_precision(torch.device("cpu")) == "bfloat16 mixed"
    assert precision.training_precision(torch.device("mps")) == "float32"
    assert precision.training_precision(torch.device("cuda", 1)) == "float16 mixed"  # nnU-Net's own
    monkeypatch.setenv(precision.CPU_BFLOAT16_VARIABLE, "0")
    assert precision.training_precision(torch.device("cpu")) == "float32"


@pytest.mark.parametrize(
    ("capabilities", "expected"), [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx2": True}, False)]
)
def test_reads_capabilities(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision.cpu_has_bfloat16() is expected


def test_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert precision.cpu_has_bfloat16()


@pytest.mark.parametrize(
    ("amx", "depths", "kernels", "expected"),
    [
        (False, [16, 8, 4, 2], [3, 3, 3, 3], True),
        (False, [16, 8, 4, 2], [3, 3, 3, 1], False),
        (False, [40, 20, 10, 5], [5, 5, 5, 5], False),
        (False, [32, 16, 8, 4], [5, 5, 5, 5], True),
        (False, [4, 2, 1], [3, 1, 3], False),  # no failure was observed with a single slice
        (True, [16, 8, 4, 2], [3, 3, 3, 3], False),
    ],
)
def test_knows_where_gradients_are_wrong(
    monkeypatch: pytest.MonkeyPatch, amx: bool, depths: list[int], kernels: list[int], expected: bool
) -> None:
    monkeypatch.setattr(precision, "cpu_has_amx", lambda: amx)
    assert precision.bfloat16_gradients_are_wrong(depths, kernels) is expected
