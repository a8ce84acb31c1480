"""Checkpoints of the authors' code: names, shapes and errors in files. test_conresnet_paper.py tests the outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_conres.architectures.authors_weights import from_authors_state_dict


@pytest.mark.parametrize(("channels", "classes", "prefix"), [(4, 3, "module."), (1, 2, "")])
def test_any_number_of_channels_and_classes(
    authors: Any, plain_graph: Any, channels: int, classes: int, prefix: str
) -> None:
    weights = {name: weight.double() for name, weight in authors.random_state_dict(channels, classes).items()}
    network = from_authors_state_dict({prefix + k: v for k, v in weights.items()}, residual_outputs=True).double()
    image = torch.randn(1, channels, 8, 24, 16, dtype=torch.float64)
    with torch.no_grad():
        for ours, theirs in zip(network(image), plain_graph(weights, image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_from_a_file(authors: Any, tmp_path: Path) -> None:
    weights = authors.random_state_dict(4, 3)
    torch.save(weights, tmp_path / "authors.pth")
    network = from_authors_state_dict(tmp_path / "authors.pth")
    assert torch.equal(network.encoder.stem.weight, weights["conv_4_32.0.weight"])
    assert not network.residual_outputs
    assert not network.training


@pytest.mark.parametrize("content", [b"no checkpoint", b"e = 1\n", b"", b"\x80\x04garbage", b"PK\x03\x04broken"])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"text.pth is not a state dictionary"):
        from_authors_state_dict(tmp_path / "text.pth")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": Path("anything")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad.pth is not a state dictionary"):
        from_authors_state_dict(tmp_path / "bad.pth")


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        from_authors_state_dict(tmp_path / "absent.pth")


def test_names_what_is_missing_unknown_or_misshapen(authors: Any) -> None:
    weights = authors.random_state_dict(4, 3)
    del weights["layer2.1.gn2.bias"]
    weights["surprise.weight"] = torch.zeros(1)
    weights["seg_x2.0.conv_res1.weight"] = torch.zeros(32, 16, 3, 3, 3)
    weights["seg_x1.0.conv_res2.bias"] = torch.zeros(32)
    weights["module.fusionConv.0.bias"] = torch.zeros(256)
    with pytest.raises(ValueError, match="authors' ConResNet") as error:
        from_authors_state_dict(weights)
    for name in (
        "layer2.1.gn2.bias",
        "surprise.weight",
        "seg_x2.0.conv_res1.weight (32, 16, 3, 3, 3)",
        "seg_x1.0.conv_res2.bias",
        "module.fusionConv.0.bias",
    ):
        assert name in str(error.value)


def test_refuses_what_is_no_state_dictionary() -> None:
    with pytest.raises(ValueError, match="list"):
        from_authors_state_dict([torch.zeros(1)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"conv_4_32.0.weight"):
        from_authors_state_dict({})
