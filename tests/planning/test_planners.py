"""Plans for our networks: patch, batch and checkpointing by memory; data are shared and never written twice."""

import inspect
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_conres import cli
from nnunet_conres.errors import InputError
from nnunet_conres.families import PLANNED, load, load_trainer
from nnunet_conres.nnunet import default_device, device_option
from nnunet_conres.planning import planners
from nnunet_conres.planning.commands import PlanOptions, plan, plan_and_preprocess
from nnunet_conres.planning.memory import UntrainableError
from nnunet_conres.planning.planners import GIB, PLANNERS
from nnunet_conres.planning.training_step import TrainingStep
from nnunet_conres.preprocessing.dataset import PreprocessedDataset

TRAINERS = {key: load_trainer(family.trainer_name) for key, family in PLANNED.items()}
FAMILIES = list(PLANNERS)
NAME = "Dataset701_Made"
ISOTROPIC = {"shape": (150, 160, 140), "spacing": (1.0, 1.0, 1.0)}
ANISOTROPIC = {"shape": (20, 320, 300), "spacing": (6.0, 0.8, 0.8)}
LARGE = {"shape": (300, 400, 400), "spacing": (1.0, 0.8, 0.8)}
TINY = {"shape": (12, 16, 20), "spacing": (1.0, 1.0, 1.0)}


def bytes_of(voxels: float, batch: int, channels: int = 1, checkpointing: str = "none") -> int:
    """Compute a simple memory model: fixed bytes per voxel, fewer with checkpointing, more per channel."""
    saved = {"none": 1.0, "decoder": 0.75, "full": 0.5}[checkpointing]
    return int(saved * batch * voxels * (900 + 100 * channels))


class FakeModel:
    """A stand-in for the planners' memory model."""

    def __init__(self, total: Callable[[TrainingStep], int], execute: Callable[[TrainingStep], int] | None = None):
        self.total, self.execute = total, execute or total

    def __call__(self, progress: Callable[[], None]) -> "FakeModel":
        return self


def fake_memory(step: TrainingStep) -> int:
    checkpointing = step.architecture["arch_kwargs"]["checkpointing"]
    voxels = int(np.prod(step.patch_size))
    return bytes_of(voxels, step.batch_size, step.input_channels, checkpointing)


@pytest.fixture
def _fake_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planners, "MemoryModel", FakeModel(fake_memory))


def plans_of(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / "preprocessed" / NAME / f"{name}.json").read_text())


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Function that plans the data set and returns the plans as they were written."""

    def do(architecture: str = "conresnet", gib: float = 8, **kwargs: Any) -> dict[str, Any]:
        options = PlanOptions(architecture, gpu_memory_target=gib, **kwargs)
        plan([701], options)
        return plans_of(tmp_path, options.resolved_plans_name)

    return do


def stock() -> dict[str, Any]:
    return ExperimentPlanner(701).plan_experiment()


def memory_of(plans: dict[str, Any], configuration: str, channels: int = 1) -> int:
    resolved = PlansManager(plans).get_configuration(configuration)
    checkpointing = resolved.network_arch_init_kwargs["checkpointing"]
    return bytes_of(np.prod(resolved.patch_size), resolved.batch_size, channels, checkpointing)


@pytest.mark.usefixtures("_fake_memory")
class TestPlans:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_name_our_network_and_all_of_its_arguments(self, family: str, make: Any, planned: Any) -> None:
        make(ISOTROPIC)
        architecture = planned(family)["configurations"]["3d_fullres"]["architecture"]
        assert architecture["network_class_name"] == PLANNED[family].networks[0]
        arguments = set(inspect.signature(load(PLANNED[family].networks[0]).__init__).parameters)
        arguments -= {"self", "input_channels", "num_classes", "deep_supervision", "residual_outputs"}
        assert arguments - {"n_conv_per_stage"} <= set(architecture["arch_kwargs"]) <= arguments

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_trainer_changes_nothing_and_builds_them(self, family: str, make: Any, planned: Any) -> None:
        make(LARGE, channels=2)
        plans = planned(family, gib=0.4)
        manager = PlansManager(plans)
        dataset_json = {"labels": {"background": 0, "organ": 1, "tumor": 2}, "channel_names": {"0": "a", "1": "b"}}
        assert set(plans["configurations"]) == {"2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"}
        for name in ("3d_lowres", "3d_fullres", "3d_cascade_fullres"):
            configuration = manager.get_configuration(name)
            architecture = configuration.configuration["architecture"]
            assert TRAINERS[family].resolve(configuration, name) == {"architecture": architecture}
            channels = determine_num_input_channels(manager, configuration, dataset_json)
            with torch.device("meta"):
                ours = TRAINERS[family].build_network_architecture(manager, configuration, channels, 3, True)
                theirs = nnUNetTrainer.build_network_architecture(manager, configuration, channels, 3, True)
            assert isinstance(ours, type(theirs))
            ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
            assert {key: value.shape for key, value in ours_state.items()} == {
                key: value.shape for key, value in theirs_state.items()
            }

    def test_2d_is_nnunets_own(self, make: Any, planned: Any) -> None:
        make(ISOTROPIC)
        ours, theirs = planned(), json.loads(json.dumps(stock()))
        del ours["configurations"]["2d"]["data_identifier"], theirs["configurations"]["2d"]["data_identifier"]
        assert ours["configurations"]["2d"] == theirs["configurations"]["2d"]

    def test_what_is_preprocessed_is_nnunets_own(self, make: Any, planned: Any) -> None:
        make(ANISOTROPIC)
        ours, theirs = planned(), json.loads(json.dumps(stock()))
        fullres, stock_fullres = (plans["configurations"].pop("3d_fullres") for plans in (ours, theirs))
        for entry in ("patch_size", "batch_size", "architecture", "data_identifier", "batch_dice"):
            del fullres[entry], stock_fullres[entry]
        assert fullres == stock_fullres
        for key in ("transpose_forward", "transpose_backward", "image_reader_writer", "label_manager"):
            assert ours[key] == theirs[key]

    def test_anisotropic_spacing(self, make: Any, planned: Any) -> None:
        make(ANISOTROPIC)
        fullres = planned("vnet", gib=2)["configurations"]["3d_fullres"]
        arguments = fullres["architecture"]["arch_kwargs"]
        assert arguments["strides"][1] == [1, 2, 2]
        assert arguments["kernel_sizes"][0] == [1, 5, 5]
        assert fullres["patch_size"][0] * 4 < fullres["patch_size"][1]

    def test_spacing_and_name_can_be_chosen(self, make: Any, planned: Any) -> None:
        make(ISOTROPIC)
        plans = planned(overwrite_target_spacing=[2, 1, 1], plans_name="nnUNetCoarse")
        assert plans["plans_name"] == "nnUNetCoarse"
        assert plans["configurations"]["3d_fullres"]["spacing"] == [2.0, 1.0, 1.0]
        assert plans["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetCoarse_3d_fullres"

    def test_nnunets_own_function_takes_the_planner(self, make: Any) -> None:
        make(ISOTROPIC)
        plans, name = plan_experiment_dataset(701, PLANNERS["conresnet"])
        assert (plans["plans_name"], name) == ("nnUNetConResNetPlans", "nnUNetConResNetPlans")

    def test_own_configurations_are_kept_and_outdated_ones_are_not(
        self, make: Any, planned: Any, tmp_path: Path
    ) -> None:
        make(LARGE)
        plans = planned(gib=0.4)
        assert "3d_lowres" in plans["configurations"]
        plans["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 3}
        (tmp_path / "preprocessed" / NAME / "nnUNetConResNetPlans.json").write_text(json.dumps(plans))
        again = planned(gib=1000)
        assert set(again["configurations"]) == {"2d", "3d_fullres", "mine"}


@pytest.mark.usefixtures("_fake_memory")
class TestMemory:
    def test_patch_shrinks_with_the_target_and_never_exceeds_it(self, make: Any, planned: Any) -> None:
        make(ISOTROPIC)
        sizes = []
        for gib in (4, 1, 0.25, 0.05):
            plans = planned(gib=gib)
            assert memory_of(plans, "3d_fullres") <= gib * GIB
            patch = plans["configurations"]["3d_fullres"]["patch_size"]
            assert max(patch) <= 1.5 * min(patch)  # the images' proportions
            sizes.append(np.prod(patch))
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == len(sizes)

    @pytest.mark.parametrize(
        ("of_need", "checkpointing", "is_reached"),
        [
            (1.01, "none", True),
            (0.99, "decoder", True),
            (0.76, "decoder", True),
            (0.74, "full", True),
            (0.1, "full", False),
        ],
    )
    def test_checkpointing_is_the_least_under_which_nnunets_own_patch_fits(
        self, of_need: float, checkpointing: str, is_reached: bool, make: Any, planned: Any, monkeypatch: Any
    ) -> None:
        make(ISOTROPIC)
        gib = 2
        stock_plans = ExperimentPlanner(701, gpu_memory_target_in_gb=gib).plan_experiment()
        wanted = np.prod(stock_plans["configurations"]["3d_fullres"]["patch_size"])
        factor = gib * GIB / of_need / bytes_of(wanted, 2)

        monkeypatch.setattr(planners, "MemoryModel", FakeModel(lambda step: int(factor * fake_memory(step))))
        fullres = planned(gib=gib)["configurations"]["3d_fullres"]
        assert fullres["architecture"]["arch_kwargs"]["checkpointing"] == checkpointing
        assert (np.prod(fullres["patch_size"]) >= wanted) == is_reached

    def test_batch_is_rounded_down(self, make: Any, planned: Any) -> None:
        make(ISOTROPIC, cases=1000)
        voxels = np.prod(planned(gib=1000)["configurations"]["3d_fullres"]["patch_size"])
        for batches, expected in ((2.9, 2), (3.0, 3), (7.99, 7)):
            fullres = planned(gib=batches * bytes_of(voxels, 1) / GIB + 1e-6)["configurations"]["3d_fullres"]
            assert fullres["batch_size"] == expected

    def test_batch_is_a_twentieth_of_the_data_at_most(self, make: Any, planned: Any) -> None:
        make(ISOTROPIC, cases=100)
        fullres = planned(gib=1000)["configurations"]["3d_fullres"]
        share = 0.05 * 100 * np.prod(ISOTROPIC["shape"]) / np.prod(fullres["patch_size"])
        assert fullres["batch_size"] == int(share)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_refused_below_the_smallest_patch(self, family: str, make: Any, planned: Any, tmp_path: Path) -> None:
        make(ISOTROPIC)
        with pytest.raises(ValueError, match=r"in 0\.00 GiB: the smallest patch, \d+ x \d+ x \d+ voxels, takes 0\.0"):
            planned(family, gib=1e-5)
        assert not list((tmp_path / "preprocessed" / NAME).glob("*Plans.json"))

    def test_the_target_that_the_refusal_names_is_what_it_takes(
        self, make: Any, planned: Any, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(planners, "MemoryModel", FakeModel(lambda step: 1000 * fake_memory(step)))
        make(ISOTROPIC)
        gib = 0.01
        for what in ("batch 2 with checkpointing full. ", "in the cascade"):
            with pytest.raises(ValueError, match=what) as refusal:
                planned(gib=gib)
            gib = float(str(refusal.value).split("-gpu_memory_target to at least ")[1].rstrip("."))
        assert planned(gib=gib)["configurations"]["3d_cascade_fullres"]["batch_size"] == 2

    def test_a_target_that_nothing_fits_is_refused_after_one_execution(
        self, make: Any, planned: Any, monkeypatch: Any
    ) -> None:
        executed = []

        def execute(step: TrainingStep) -> int:
            executed.append(step)
            return fake_memory(step)

        def search(step: TrainingStep) -> int:
            raise AssertionError("the search for the largest patch is long")

        make(LARGE)
        monkeypatch.setattr(planners, "MemoryModel", FakeModel(search, execute))
        with pytest.raises(InputError, match=r"takes 0\.\d+ GiB at batch 2 with checkpointing full\. Set"):
            planned(gib=1e-5)
        assert len(executed) == 1
        assert executed[0].batch_size == 2

    def test_spacing_that_is_too_coarse(self, make: Any, planned: Any) -> None:
        make(ISOTROPIC)
        with pytest.raises(ValueError, match=r"too small for V-Net at a voxel size of 500 x 500 x 500 mm"):
            planned("vnet", overwrite_target_spacing=[500.0, 500.0, 500.0])

    def test_images_that_are_too_small(self, make: Any, planned: Any) -> None:
        make({"shape": (6, 6, 6), "spacing": (1.0, 1.0, 1.0)})
        with pytest.raises(InputError, match=r"too small for ConResNet: a patch of 6 x 6 x 6 voxels"):
            planned()

    def test_every_patch_survives_nnunets_augmentation(self, make: Any, planned: Any, tmp_path: Path) -> None:
        """For thin volumes of all kinds, nnU-Net's blur at its strongest can process the planned patch."""
        rng = np.random.default_rng(0)
        thin = [(3, 64, 64), (64, 64, 1), (2, 40, 40), (40, 2, 64), (3, 12, 12), (2, 2, 64)]
        kinds = [(shape, (1.0, 1.0, 1.0)) for shape in thin]
        for _ in range(12):
            shape = tuple(int(extent) for extent in 2 ** rng.uniform(1, 7, 3))
            kinds.append((shape, tuple(2 ** rng.uniform(-1, 3, 3))))
        refused = []
        for shape, spacing in kinds:
            shutil.rmtree(tmp_path / "raw" / NAME, ignore_errors=True)
            shutil.rmtree(tmp_path / "preprocessed" / NAME, ignore_errors=True)
            make({"shape": shape, "spacing": spacing})
            try:
                fullres = planned("vnet")["configurations"]["3d_fullres"]
            except InputError as error:
                assert "too small" in str(error)  # noqa: PT017  (not all are refused)
                refused.append(shape)
                continue
            blur = GaussianBlurTransform(
                blur_sigma=(1.0, 1.0), synchronize_channels=True, synchronize_axes=True, p_per_channel=1
            )
            image = blur(image=torch.zeros(1, *fullres["patch_size"]))["image"]
            assert image.shape[1:] == tuple(fullres["patch_size"])
            strides = fullres["architecture"]["arch_kwargs"]["strides"]
            assert len(strides) >= 2
            assert sorted(fullres["median_image_size_in_voxels"]) == sorted(shape) or spacing != (1.0, 1.0, 1.0)
        assert len(refused) < len(kinds) / 3
        assert not set(refused) & set(thin[:5])

    def test_2d_images(self, make: Any, planned: Any) -> None:
        make({"shape": (1, 300, 300), "spacing": (99.0, 1.0, 1.0)})
        with pytest.raises(ValueError, match="single slices, and V-Net is a 3D network"):
            planned("vnet")

    def test_regions_and_ignore_label_are_told_to_the_model(
        self, make: Any, planned: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[TrainingStep] = []

        def note(step: TrainingStep) -> int:
            steps.append(step)
            return fake_memory(step)

        monkeypatch.setattr(planners, "MemoryModel", FakeModel(note))
        make(ISOTROPIC, channels=4, labels={"background": 0, "whole": [1, 2], "core": 2, "ignore": 3})
        dataset = Path(os.environ["nnUNet_raw"], NAME, "dataset.json")
        dataset.write_text(json.dumps(json.loads(dataset.read_text()) | {"regions_class_order": [1, 2]}))
        planned()
        assert {
            (s.input_channels, s.labels.num_segmentation_heads, s.labels.has_regions, s.labels.has_ignore_label)
            for s in steps
        } == {(4, 2, True, True)}

    def test_what_takes_more_than_the_model_says_is_planned_again(
        self, make: Any, planned: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The model underestimates large patches until it has executed them."""
        executed: dict[tuple[int, ...], int] = {}

        def total(step: TrainingStep) -> int:
            known = executed.get((*step.patch_size, step.batch_size))
            return fake_memory(step) // 2 if known is None else known

        def execute(step: TrainingStep) -> int:
            return executed.setdefault((*step.patch_size, step.batch_size), fake_memory(step))

        monkeypatch.setattr(planners, "MemoryModel", FakeModel(total, execute))
        make(ISOTROPIC)
        plans = planned(gib=1)
        assert len(executed) > 1
        assert memory_of(plans, "3d_fullres") <= GIB

    def test_a_step_that_cannot_be_taken_is_refused(
        self, make: Any, planned: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def execute(_: TrainingStep) -> int:
            raise UntrainableError("can't train it")

        monkeypatch.setattr(planners, "MemoryModel", FakeModel(fake_memory, execute))
        make(ISOTROPIC)
        with pytest.raises(InputError, match="can't train it"):
            planned()
        assert not list((tmp_path / "preprocessed" / NAME).glob("*Plans.json"))


@pytest.mark.usefixtures("_fake_memory")
class TestCascade:
    LABELS = {"background": 0} | {f"organ {number}": number for number in range(1, 6)}

    def test_has_a_patch_of_its_own_where_its_channels_need_it(self, make: Any, planned: Any) -> None:
        make(LARGE, labels=self.LABELS)
        plans = planned(gib=0.5)
        cascade = plans["configurations"]["3d_cascade_fullres"]
        assert set(cascade) == {"inherits_from", "previous_stage", "batch_size", "patch_size", "architecture"}
        fullres = plans["configurations"]["3d_fullres"]
        assert np.prod(cascade["patch_size"]) < np.prod(fullres["patch_size"])
        assert memory_of(plans, "3d_cascade_fullres", channels=1 + 5) <= 0.5 * GIB
        resolved = PlansManager(plans).get_configuration("3d_cascade_fullres")
        assert [len(resolved.pool_op_kernel_sizes)] == [cascade["architecture"]["arch_kwargs"]["n_stages"]]
        strides = np.prod(resolved.pool_op_kernel_sizes, axis=0)
        assert not np.any(np.asarray(resolved.patch_size) % strides)

    def test_inherits_where_they_fit(self, make: Any, planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model = FakeModel(lambda step: int(np.prod(step.patch_size)) * step.batch_size)
        monkeypatch.setattr(planners, "MemoryModel", model)
        make(LARGE, labels=self.LABELS)
        plans = planned(gib=0.001)
        assert plans["configurations"]["3d_cascade_fullres"] == {
            "inherits_from": "3d_fullres",
            "previous_stage": "3d_lowres",
        }

    def test_lowres_is_as_nnunet_makes_it(self, make: Any, planned: Any) -> None:
        make(LARGE)
        configurations = planned(gib=0.5)["configurations"]
        lowres, fullres = configurations["3d_lowres"], configurations["3d_fullres"]
        assert lowres["next_stage"] == "3d_cascade_fullres"
        assert lowres["data_identifier"] == "nnUNetConResNetPlans_3d_lowres"
        assert np.prod(lowres["spacing"]) > 2 * np.prod(fullres["spacing"])
        assert np.prod(lowres["patch_size"]) >= 0.25 * np.prod(lowres["median_image_size_in_voxels"])
        assert (lowres["batch_dice"], fullres["batch_dice"]) == (False, True)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.fixture
def small(make: Any) -> None:
    """A data set whose images are as its fingerprint says."""
    make(TINY, cases=3)


def complete(**kwargs: Any) -> list[Any]:
    options = PlanOptions(kwargs.pop("architecture", "conresnet"), **kwargs.pop("options", {}))
    defaults: dict[str, Any] = {"configurations": ["3d_fullres"], "processes": [1], "progress": False}
    return plan_and_preprocess([701], options, **(defaults | kwargs))


@pytest.mark.usefixtures("_fake_memory", "small")
class TestData:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path / "preprocessed" / NAME

    @pytest.fixture
    def stock_data(self, folder: Path, tmp_path: Path) -> Path:
        """Write the preprocessed data of stock plans."""
        with pytest.MonkeyPatch.context() as patch:  # the memory of stock networks doesn't matter here
            patch.setattr(ExperimentPlanner, "static_estimate_VRAM_usage", staticmethod(lambda *_: 10**8))
            stock()
        PreprocessedDataset(tmp_path / "raw" / NAME, folder, "nnUNetPlans").complete({"3d_fullres": 1}, progress=False)
        return folder / "nnUNetPlans_3d_fullres"

    def test_without_stock_plans_they_are_its_own(self, folder: Path) -> None:
        (done,) = complete()
        assert done.preprocessed[0].folder == folder / "nnUNetConResNetPlans_3d_fullres"
        assert done.preprocessed[0].written == ("case_0", "case_1", "case_2")
        names = {f"case_{n}{end}" for n in range(3) for end in (".b2nd", "_seg.b2nd", ".pkl")}
        assert {path.name for path in done.preprocessed[0].folder.iterdir()} == names
        assert {path.name for path in (folder / "gt_segmentations").iterdir()} == {f"case_{n}.nii.gz" for n in range(3)}
        assert not list(folder.glob(".*"))

    def test_are_nnunets_own(self, stock_data: Path, tmp_path: Path) -> None:
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

        plans = PlansManager(str(stock_data.parent / "nnUNetPlans.json"))
        raw = tmp_path / "raw" / NAME
        image, labels, _ = DefaultPreprocessor(verbose=False).run_case(
            [str(raw / "imagesTr" / "case_1_0000.nii.gz")],
            str(raw / "labelsTr" / "case_1.nii.gz"),
            plans,
            plans.get_configuration("3d_fullres"),
            str(raw / "dataset.json"),
        )
        found_image, found_labels, _, _ = nnUNetDatasetBlosc2(str(stock_data), ["case_1"]).load_case("case_1")
        np.testing.assert_array_equal(found_image[:], image)
        np.testing.assert_array_equal(found_labels[:], labels)

    def test_are_shared_with_stock_plans_and_left_alone(self, stock_data: Path) -> None:
        before = snapshot(stock_data)
        labels = snapshot(stock_data.parent / "gt_segmentations")
        for family in FAMILIES:
            (done,) = complete(architecture=family)
            assert done.preprocessed[0].folder == stock_data
            assert done.preprocessed[0].written == ()
        assert snapshot(stock_data) == before
        assert snapshot(stock_data.parent / "gt_segmentations") == labels

    def test_our_plans_share_among_each_other(self, folder: Path) -> None:
        complete(architecture="vnet")
        (done,) = complete(architecture="unet3d")
        assert done.preprocessed[0].folder == folder / "nnUNetVNetPlans_3d_fullres"
        assert done.preprocessed[0].written == ()
        (again,) = complete(architecture="vnet")
        assert again.preprocessed[0].folder == folder / "nnUNetVNetPlans_3d_fullres"

    def test_data_that_are_there_come_before_those_of_plans_without_data(self, folder: Path) -> None:
        complete()
        stock()  # plans without preprocessed data
        for family in ("vnet", "conresnet"):
            (done,) = complete(architecture=family)
            assert done.preprocessed[0].folder == folder / "nnUNetConResNetPlans_3d_fullres"
            assert done.preprocessed[0].written == ()

    @pytest.mark.parametrize(
        "options",
        [
            {"overwrite_target_spacing": [2.0, 1.0, 1.0]},
            {"overwrite_target_spacing": [1.001, 1.0, 1.0]},
        ],
    )
    def test_are_not_shared_where_they_differ(self, options: dict[str, Any], stock_data: Path) -> None:
        before = snapshot(stock_data)
        (done,) = complete(options=options)
        assert done.preprocessed[0].folder.name == "nnUNetConResNetPlans_3d_fullres"
        assert len(done.preprocessed[0].written) == 3
        assert snapshot(stock_data) == before

    def test_are_not_shared_where_normalisation_differs(self, stock_data: Path) -> None:
        plans = json.loads((stock_data.parent / "nnUNetPlans.json").read_text())
        plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
        (stock_data.parent / "nnUNetPlans.json").write_text(json.dumps(plans))
        (done,) = complete()
        assert done.preprocessed[0].folder.name == "nnUNetConResNetPlans_3d_fullres"

    def test_what_is_missing_is_completed(self, stock_data: Path) -> None:
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            for damaged in (lambda _: None, lambda content: content[:-7], lambda _: b""):
                file = stock_data / f"case_1{ending}"
                content = damaged(file.read_bytes())
                file.unlink()
                if content is not None:
                    file.write_bytes(content)
                before = snapshot(stock_data)
                (done,) = complete()
                assert done.preprocessed[0].written == ("case_1",)
                after = snapshot(stock_data)
                assert len(after) == 9
                assert {name: after[name] for name in after if "case_1" not in name} == {
                    name: before[name] for name in before if "case_1" not in name
                }
        assert complete()[0].preprocessed[0].written == ()

    def test_an_interrupted_run_goes_on(self, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        broken = tmp_path / "raw" / NAME / "imagesTr" / "case_1_0000.nii.gz"
        content = broken.read_bytes()
        broken.write_bytes(b"no image")
        os.utime(folder / "dataset_fingerprint.json", (2e9, 2e9))  # newer than the raw files, so it is kept
        with pytest.raises(InputError, match=r"Case case_1 can't be preprocessed for configuration 3d_fullres"):
            complete()
        data = folder / "nnUNetConResNetPlans_3d_fullres"
        before = snapshot(data)
        assert {name.split(".")[0].removesuffix("_seg") for name in before} == {"case_0"}
        assert not list(folder.glob(".*"))
        broken.write_bytes(content)
        (done,) = complete()
        assert done.preprocessed[0].written == ("case_1", "case_2")
        assert {name: snapshot(data)[name] for name in before} == before

    def test_older_format(self, stock_data: Path) -> None:
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

        for number in range(3):
            image, labels, _, properties = nnUNetDatasetBlosc2(str(stock_data)).load_case(f"case_{number}")
            arrays = image[:], labels[:]
            for path in stock_data.glob(f"case_{number}*"):
                path.unlink()
            nnUNetDatasetNumpy.save_case(*arrays, properties, str(stock_data / f"case_{number}"))
        before = snapshot(stock_data)
        assert complete()[0].preprocessed[0].written == ()
        assert snapshot(stock_data) == before
        (stock_data / "case_2.npz").write_bytes((stock_data / "case_2.npz").read_bytes()[:-30])
        assert complete()[0].preprocessed[0].written == ("case_2",)
        assert {path.suffix for path in stock_data.iterdir()} == {".npz", ".pkl"}
        nnUNetDatasetNumpy(str(stock_data)).load_case("case_2")
        (stock_data / "case_0.b2nd").touch()
        with pytest.raises(ValueError, match=r"both \.npz and \.b2nd"):
            complete()

    def test_data_of_former_plans_are_neither_used_nor_removed(self, folder: Path) -> None:
        complete()
        data = folder / "nnUNetConResNetPlans_3d_fullres"
        before, plans = snapshot(data), (folder / "nnUNetConResNetPlans.json").read_bytes()
        with pytest.raises(ValueError, match=r"preprocessed with another spacing than configuration 3d_fullres"):
            complete(options={"overwrite_target_spacing": [2.0, 1.0, 1.0]})
        assert snapshot(data) == before
        assert (folder / "nnUNetConResNetPlans.json").read_bytes() == plans
        (done,) = complete(options={"overwrite_target_spacing": [2.0, 1.0, 1.0], "plans_name": "nnUNetCoarse"})
        assert len(done.preprocessed[0].written) == 3

    def test_data_that_other_plans_share_are_kept_for_them(self, folder: Path) -> None:
        complete(architecture="vnet")
        complete(architecture="unet3d")
        shutil.rmtree(folder / "nnUNetVNetPlans_3d_fullres")
        with pytest.raises(ValueError, match=r"is also for data of nnUNetUNet3DPlans, which are preprocessed with"):
            complete(architecture="vnet", options={"overwrite_target_spacing": [2.0, 1.0, 1.0]})

    def test_stock_plans_that_changed_are_followed(self, stock_data: Path, tmp_path: Path) -> None:
        complete()
        plans = json.loads((stock_data.parent / "nnUNetPlans.json").read_text())
        plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
        (stock_data.parent / "nnUNetPlans.json").write_text(json.dumps(plans))
        with pytest.raises(ValueError, match=r"by these plans and 1 more\)\. Remove that folder\."):
            complete(options={"overwrite_target_spacing": [2.0, 1.0, 1.0]})
        shutil.rmtree(stock_data)
        assert len(complete(options={"overwrite_target_spacing": [2.0, 1.0, 1.0]})[0].preprocessed[0].written) == 3
        assert stock_data.is_dir()

    def test_data_that_no_plans_describe_any_more_are_recognised(self, folder: Path) -> None:
        complete(options={"overwrite_target_spacing": [2.0, 1.0, 1.0]})
        (folder / "nnUNetConResNetPlans.json").unlink()
        with pytest.raises(ValueError, match=r"case_0 has shape \(1, 6, 16, 20\), but \(1, 12, 16, 20\) by"):
            complete()

    def test_only_the_configurations_asked_for(self, folder: Path) -> None:
        (done,) = complete(configurations=["2d", "3d_lowres"], processes=[1])
        assert [data.configuration for data in done.preprocessed] == ["2d"]
        assert done.skipped == ("3d_lowres",)
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
            "gt_segmentations",
            "nnUNetConResNetPlans_2d",
        ]
        assert done.next_commands[0] == (
            "nnunet-conres plan_and_preprocess with the same options: 3 cases of 3d_fullres are missing"
        )

    @pytest.mark.slow
    def test_fingerprint_is_taken_where_there_is_none(self, folder: Path) -> None:
        fingerprint = folder / "dataset_fingerprint.json"
        before = fingerprint.read_bytes()
        complete(preprocess=False)
        assert fingerprint.read_bytes() == before
        complete(preprocess=False, clean=True, fingerprint_processes=1)
        assert fingerprint.read_bytes() != before
        shutil.rmtree(folder)
        complete(preprocess=False, fingerprint_processes=1, verify_dataset_integrity=True)
        assert fingerprint.is_file()

    def test_labels_that_changed_are_copied_again(self, folder: Path, tmp_path: Path) -> None:
        complete()
        source, copy = tmp_path / "raw" / NAME / "labelsTr" / "case_0.nii.gz", folder / "gt_segmentations"
        before = snapshot(copy)
        os.utime(source, (2e9, 2e9))
        os.utime(folder / "dataset_fingerprint.json", (3e9, 3e9))  # newer than the raw files, so it is kept
        complete()
        after = snapshot(copy)
        assert {name for name in after if after[name] != before[name]} == {"case_0.nii.gz"}


def _run_but_train_nothing(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a suggested command as a user would who copies it, up to the first epoch."""
    from nnunetv2.run import run_training

    trained = []
    monkeypatch.setattr(nnUNetTrainer, "run_training", lambda self: trained.append(self))
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda self, npz: None)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    run_training.run_training_entry()
    (trainer,) = trained
    assert type(trainer).__name__ in command
    assert trainer.device.type == default_device()


@pytest.mark.usefixtures("_fake_memory")
class TestCommands:
    def test_plan(self, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
        make(LARGE)
        assert cli.main(["plan", "-d", "701", "-a", "conresnet", "-gpu_memory_target", "0.5"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{NAME}: nnUNetConResNetPlans for ConResNet"
        rows = {line.split()[0]: line for line in lines[2:6]}
        assert set(rows) == {"2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"}
        assert "full" in rows["3d_fullres"]
        assert "GiB" in rows["3d_fullres"]
        assert "nnU-Net's own" in rows["2d"]
        command = "nnUNetv2_train 701 3d_fullres 0 -tr nnUNetTrainerConResNet -p nnUNetConResNetPlans"
        assert lines[-1] == f"Next: {command}{device_option()}"

    def test_plan_and_preprocess(
        self, make: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make(TINY, cases=3)
        command = ["plan_and_preprocess", "-d", "701", "-a", "vnet", "-np", "1", "-npfp", "1", "--no_pbar"]
        assert cli.main(command) == 0
        captured = capsys.readouterr()
        assert "%|" not in captured.err
        lines = captured.out.splitlines()
        assert "Data of 3d_fullres: 3 cases written, 0 existed already" in lines
        assert "Data of 3d_lowres: none, the images don't need this configuration" in lines
        command_to_train = lines[-1].removeprefix("Next: ")
        assert command_to_train == (
            f"nnUNetv2_train 701 3d_fullres 0 -tr nnUNetTrainerVNet -p nnUNetVNetPlans{device_option()}"
        )
        _run_but_train_nothing(command_to_train, monkeypatch)
        assert cli.main([*command, "--no_pp"]) == 0
        assert "Data of" not in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["-gpu_memory_target", "0"], "The memory target is 0 GiB"),
            (["-overwrite_target_spacing", "1", "0", "1"], "The target spacing is 1 0 1"),
            (["-overwrite_plans_name", "nnUNetPlans"], "which is nnU-Net's own"),
            (["-overwrite_plans_name", "a__b"], "The plans name is 'a__b'"),
            (["-overwrite_plans_name", "splits_final"], "splits_final.json is not a file of plans"),
            (["-preprocessor_name", "Nobodys"], "The preprocessor is 'Nobodys'"),
            (["-overwrite_plans_name", "nnUNetVNetPlans"], "was made by VNetPlanner; ConResNetPlanner would"),
            (["-c", "3d_fulres"], "'3d_fulres' is not a configuration"),
            (["-np", "1", "2", "3"], "-np has 3 numbers"),
            (["-np", "0"], "below 1"),
            (["-fpe", "Nobodys"], "The fingerprint extractor is 'Nobodys'"),
        ],
    )
    def test_errors_are_told_before_anything_is_written(
        self, options: list[str], message: str, make: Any, planned: Any, capsys: Any, tmp_path: Path
    ) -> None:
        make(ISOTROPIC)
        planned("vnet")
        before = snapshot(tmp_path / "preprocessed" / NAME)
        assert cli.main(["plan_and_preprocess", "-d", "701", "-a", "conresnet", *options]) == 2
        assert message in capsys.readouterr().err
        assert snapshot(tmp_path / "preprocessed" / NAME) == before

    def test_missing_and_damaged_fingerprints(self, make: Any, capsys: Any, tmp_path: Path) -> None:
        make(ISOTROPIC)
        fingerprint = tmp_path / "preprocessed" / NAME / "dataset_fingerprint.json"
        fingerprint.write_text("{")
        assert cli.main(["plan", "-d", "701", "-a", "vnet"]) == 2
        assert "nnUNetv2_extract_fingerprint -d 701 --clean" in capsys.readouterr().err
        fingerprint.unlink()
        assert cli.main(["plan", "-d", "701", "-a", "vnet"]) == 2
        assert f"{fingerprint} is missing" in capsys.readouterr().err

    def test_unknown_data_set_and_faulty_dataset_json(self, make: Any, capsys: Any, tmp_path: Path) -> None:
        make(ISOTROPIC)
        path = tmp_path / "raw" / NAME / "dataset.json"
        content = json.loads(path.read_text())
        del content["numTraining"]
        path.write_text(json.dumps(content))
        assert cli.main(["plan", "-d", "701", "702", "-a", "vnet"]) == 2
        error = capsys.readouterr().err
        assert "has no numTraining" in error
        assert "There is no data set 702" in error

    def test_refusal_is_told_without_a_traceback(self, make: Any, capsys: Any) -> None:
        make(ISOTROPIC)
        assert cli.main(["plan", "-d", "701", "-a", "unet3d", "-gpu_memory_target", "0.00001"]) == 2
        error = capsys.readouterr().err
        assert "nnunet-conres: error: 3D U-Net can't be planned for Dataset701_Made" in error
        assert "Traceback" not in error


@pytest.mark.parametrize(
    ("kind", "family", "gib"),
    [
        # the others take up to a minute
        pytest.param(
            kind,
            family,
            gib,
            id=f"{name}-{family}-{gib}",
            marks=[pytest.mark.slow] * ((name, family, gib) != ("anisotropic", "unet3d", 4)),
        )
        for name, kind in (("isotropic", ISOTROPIC), ("anisotropic", ANISOTROPIC))
        for family in FAMILIES
        for gib in (4, 24)
    ],
)
def test_plans_fit_by_the_memory_model_itself(family: str, kind: dict[str, Any], gib: int, make: Any) -> None:
    make(kind, channels=4)
    (done,) = plan([701], PlanOptions(family, gpu_memory_target=gib))
    for configuration in done.configurations:
        assert configuration.memory is None or configuration.memory <= gib * GIB
