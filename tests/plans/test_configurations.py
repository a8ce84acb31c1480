"""Entries that trainers write into plans."""

from copy import deepcopy
from typing import Any

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_conres import __version__
from nnunet_conres.plans.configurations import (
    configuration_of,
    differences_in_topology,
    with_configuration,
    with_paper_patch,
)


def plans() -> dict[str, Any]:
    """Return minimal plans: a configuration, and one that inherits from it."""
    fullres = {"patch_size": [20, 64, 64], "batch_size": 2, "architecture": {"network_class_name": "a.UNet"}}
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    return {"configurations": {"3d_fullres": fullres, "3d_cascade_fullres": cascade}}


@pytest.mark.parametrize(
    ("median_shape", "expected"),
    [
        ([137.0, 173.0, 139.0], [80, 160, 144]),
        ([36.0, 50.0, 35.0], [40, 56, 40]),
        ([500.0, 512.0, 512.0], [80, 160, 160]),
    ],
)
def test_patch_is_the_papers_but_no_larger_than_the_images(median_shape: list[float], expected: list[int]) -> None:
    entries = {"architecture": {}, "patch_size": [8, 8, 8], "median_image_size_in_voxels": median_shape}
    configuration = ConfigurationManager(entries)
    found = with_paper_patch({"architecture": {}}, configuration, (80, 160, 160), 2, 8)
    assert found == {"architecture": {}, "patch_size": expected, "batch_size": 2}


class TestWithConfiguration:
    def test_hides_what_is_inherited_and_leaves_the_parent_alone(self) -> None:
        before = plans()
        after = with_configuration(deepcopy(before), "3d_cascade_fullres", architecture={"a": 1}, patch_size=[8, 8, 8])
        manager = PlansManager(after)
        assert manager.get_configuration("3d_cascade_fullres").configuration["architecture"] == {"a": 1}
        assert manager.get_configuration("3d_cascade_fullres").patch_size == [8, 8, 8]
        assert manager.get_configuration("3d_fullres").configuration == before["configurations"]["3d_fullres"]

    def test_notes_the_version_and_leaves_the_original_untouched(self) -> None:
        before = plans()
        copy = deepcopy(before)
        assert with_configuration(before, "3d_fullres", batch_size=9)["nnunet_conres"] == {"version": __version__}
        assert before == copy

    def test_unknown_configuration(self) -> None:
        with pytest.raises(RuntimeError, match="not found in plans"):
            configuration_of(plans(), "3d_lowres")


class TestDifferencesInTopology:
    def test_names_what_differs(self) -> None:
        ours = {"network_class_name": "a.UNet3D", "arch_kwargs": {"n_stages": 3, "downsampling": "strided_conv"}}
        assert differences_in_topology(ours, deepcopy(ours)) == []
        theirs = deepcopy(ours)
        theirs["arch_kwargs"]["downsampling"] = "max_pool"
        assert differences_in_topology(theirs, ours) == ["downsampling: max_pool there, strided_conv here"]
        theirs["network_class_name"] = "a.VNet"
        assert differences_in_topology(theirs, ours) == ["a.VNet there, a.UNet3D here"]

    def test_what_a_trainer_chooses_is_no_difference(self) -> None:
        ours = {"network_class_name": "a.VNet", "arch_kwargs": {"n_stages": 4, "checkpointing": "none"}}
        theirs = {"network_class_name": "a.VNet", "arch_kwargs": {"n_stages": 4, "checkpointing": "full"}}
        assert differences_in_topology(theirs, ours) == []
