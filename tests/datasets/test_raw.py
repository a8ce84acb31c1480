"""Raw data sets."""

from pathlib import Path

from nnunet_conres.datasets.raw import target_errors


class TestTarget:
    def test_a_raw_folder_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (error,) = target_errors(tmp_path / "file" / "raw", 501, "BraTS")
        assert str(tmp_path / "file") in error

    def test_a_raw_folder_that_is_not_there(self, tmp_path: Path) -> None:
        """A mistyped folder must not be created."""
        (error,) = target_errors(tmp_path / "new" / "raw", 501, "BraTS")
        assert f"nnUNet_raw is {tmp_path / 'new' / 'raw'}, which does not exist" in error
