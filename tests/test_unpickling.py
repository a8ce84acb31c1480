"""Pickles of plain values are read as by `pickle` and PyTorch. All others are refused before they call anything."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_conres.errors import InputError
from nnunet_conres.optimizers import Muon
from nnunet_conres.unpickling import read_checkpoint, read_pickle

PROPERTIES: dict[str, Any] = {
    "sitk_stuff": {"spacing": (1.0, 1.0, 2.5), "origin": (0.0, -3.0, 1e9), "direction": (1.0,) * 9},
    "nibabel_stuff": {"original_affine": np.arange(16.0).reshape(4, 4)},
    "spacing": [np.float64(2.5), np.float32(1.5), 1],
    "bbox_used_for_cropping": [[0, np.int64(10)], [0, 14]],
    "class_locations": {1: np.arange(12, dtype=np.uint16).reshape(3, 4).T, (1, 2): np.zeros((0, 4), np.int64)},
    "names": np.array(["a", "bc"]),
    "mixed": np.array([1, None, "x"], dtype=object),
    "nothing": None,
    "flag": np.bool_(True),
    "bytes": b"\x00\xff",
}


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.path),)


def same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    return first == second


class TestPickle:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_values_of_every_protocol(self, tmp_path: Path, protocol: int) -> None:
        path = tmp_path / "case.pkl"
        # older protocols call a builtin function to make bytes
        path.write_bytes(pickle.dumps(PROPERTIES, protocol))
        assert same(read_pickle(path), pickle.loads(path.read_bytes()))

    @pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
    def test_names_of_every_numpy(self, tmp_path: Path, module: str) -> None:
        content = pickle.dumps({"a": np.arange(3), "b": np.float32(2)}, 0)
        for other in (b"numpy.core", b"numpy._core"):
            content = content.replace(other, b"MODULE")
        path = tmp_path / "case.pkl"
        path.write_bytes(content.replace(b"MODULE", module.encode()))
        found = read_pickle(path)
        assert found["a"].tolist() == [0, 1, 2]
        assert found["b"] == 2

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_functions_are_not_called(self, tmp_path: Path, protocol: int) -> None:
        made, path = tmp_path / "made", tmp_path / "case.pkl"
        path.write_bytes(pickle.dumps({"spacing": [1.0], "more": Touch(made)}, protocol))
        with pytest.raises(InputError, match=r"case.pkl contains posix.mknod; expected plain values"):
            read_pickle(path)
        assert not made.exists()
        pickle.loads(path.read_bytes())
        assert made.exists()

    @pytest.mark.parametrize(
        "named",
        [
            b"cbuiltins\neval\n",
            b"cbuiltins\ngetattr\n",
            b"cnumpy\nload\n",
            b"cnumpy.core.multiarray\nfromfile\n",
            b"cnumpy.testing\nmeasure\n",
            b"ctorch.hub\nload\n",
            b"ccollections\nOrderedDict\n",
            b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93",
        ],
    )
    def test_other_names(self, tmp_path: Path, named: bytes) -> None:
        path = tmp_path / "case.pkl"
        path.write_bytes(named + b".")
        with pytest.raises(InputError, match="could run code"):
            read_pickle(path)

    @pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(PROPERTIES)[:40], b"cnumpy\nndarray\n(tR."])
    def test_damaged(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "case.pkl"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"case.pkl is damaged"):
            read_pickle(path)

    def test_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"case.pkl cannot be read: No such file"):
            read_pickle(tmp_path / "case.pkl")


def checkpoint() -> dict[str, Any]:
    """Return a checkpoint as written by nnU-Net's save_checkpoint."""
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.BatchNorm3d(2))
    optimizer = Muon(network.parameters(), 0.03)
    network(torch.ones(1, 1, 4, 4, 4)).sum().backward()
    optimizer.step()
    return {
        "network_weights": network.state_dict() | {"half": torch.ones(3, dtype=torch.bfloat16)},
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": torch.amp.GradScaler("cpu").state_dict(),
        "logging": {"mean_fg_dice": [np.float64(0.5), 0.25], "dice_per_class_or_region": [[np.float32(0.5)]]},
        "_best_ema": np.float64(0.1),
        "current_epoch": 3,
        "init_args": {"plans": {"a": [1, None]}, "fold": 0, "device": torch.device("cuda", 1), "dtype": torch.float16},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
        "size": torch.Size([1, 2]),
    }


class TestCheckpoint:
    def test_all_but_tensors(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint_final.pth"
        written = checkpoint()
        torch.save(written, path)
        found = read_checkpoint(path)
        assert list(found) == list(written)
        assert list(found["network_weights"]) == list(written["network_weights"])
        assert set(found["network_weights"].values()) == {None}
        for key in ("logging", "_best_ema", "trainer_name", "current_epoch", "inference_allowed_mirroring_axes"):
            assert same(found[key], written[key])
        assert found["init_args"]["plans"] == written["init_args"]["plans"]
        assert found["init_args"]["device"] == "cuda:1"
        assert found["init_args"]["dtype"] == "torch.float16"
        assert found["size"] == (1, 2)

    def test_functions_are_not_called(self, tmp_path: Path) -> None:
        made, path = tmp_path / "made", tmp_path / "checkpoint_final.pth"
        torch.save(checkpoint() | {"more": Touch(made)}, path)
        with pytest.raises(InputError, match=r"contains posix.mknod; expected plain values"):
            read_checkpoint(path)
        assert not made.exists()
        torch.load(path, weights_only=False)
        assert made.exists()

    @pytest.mark.parametrize(
        "named", [b"ctorch.hub\nload\n", b"ctorch\nload\n", b"ctorch.storage\n_load_from_bytes\n", b"cos\nsystem\n"]
    )
    def test_other_names(self, tmp_path: Path, named: bytes) -> None:
        path = tmp_path / "checkpoint_final.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", named + b".")
        with pytest.raises(InputError, match="could run code"):
            read_checkpoint(path)

    def test_a_second_pickle_for_pytorch(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint_final.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/DATA.pkl", pickle.dumps(Touch(tmp_path / "made")))
            archive.writestr("archive/data.pkl", pickle.dumps({}))
        with pytest.raises(InputError, match=r"expected one data.pkl"):
            read_checkpoint(path)

    def test_a_torchscript(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint_final.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}))
            archive.writestr("archive/constants.pkl", b"")
        with pytest.raises(InputError, match="no code"):
            read_checkpoint(path)

    @pytest.mark.parametrize("how", ["text", "cut", "no dictionary"])
    def test_damaged(self, tmp_path: Path, how: str) -> None:
        path = tmp_path / "checkpoint_final.pth"
        torch.save(checkpoint() if how == "cut" else [1], path)
        if how == "text":
            path.write_text("no checkpoint")
        elif how == "cut":
            path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(InputError, match=r"checkpoint_final.pth"):
            read_checkpoint(path)
