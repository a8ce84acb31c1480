"""Trainers without residual maps in nnU-Net's code. test_conresnet.py tests what all trainers share."""

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.architectures.network import ResidualMapsMixin
from nnunet_conres.augmentation.bspline import BSplineSpatialTransform
from nnunet_conres.augmentation.histogram import HistogramMatchingTransform
from nnunet_conres.augmentation.mirror_outside import MirrorOutsideTransform
from nnunet_conres.families import PLANNED, load, load_trainer
from nnunet_conres.losses import SquaredDiceLoss, VoxelWeightedCrossEntropyLoss
from nnunet_conres.trainers import (
    nnUNetTrainerConResNet,
    nnUNetTrainerUNet3D,
    nnUNetTrainerUNet3DPaper,
    nnUNetTrainerVNet,
    nnUNetTrainerVNetPaper,
)

FAMILIES = {
    load_trainer(family.trainer_name): load(family.networks[0])
    for family in PLANNED.values()
    if not issubclass(load(family.networks[0]), ResidualMapsMixin)
}
DYNAMIC = pytest.mark.parametrize("trainer_class", list(FAMILIES))
PAPER = pytest.mark.parametrize("trainer_class", [nnUNetTrainerVNetPaper, nnUNetTrainerUNet3DPaper])


def run_briefly(trainer: nnUNetTrainer) -> None:
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    trainer.run_training()


@pytest.mark.parametrize(
    ("kind", "trainer_class"),
    [
        ("labels", nnUNetTrainerVNet),
        ("ignored_regions", nnUNetTrainerVNet),
        ("regions", nnUNetTrainerUNet3D),
        ("ignore", nnUNetTrainerUNet3D),
        pytest.param("ignore", nnUNetTrainerVNetPaper, marks=pytest.mark.slow),
        pytest.param("ignored_regions", nnUNetTrainerUNet3DPaper, marks=pytest.mark.slow),
    ],
)
def test_trains_validates_and_predicts(make_trainer: Callable[..., Any], kind: str, trainer_class: type) -> None:
    trainer = make_trainer(trainer_class, kind)
    trainer.run_training()
    log = trainer.logger.local_logger.my_fantastic_logging
    assert all(len(values) == 2 for values in log.values())
    assert np.isfinite(log["train_losses"]).all()
    assert np.isfinite(log["val_losses"]).all()
    folder = Path(trainer.output_folder)
    assert (folder / "progress.png").is_file()

    trainer.perform_actual_validation(save_probabilities=True)
    assert (folder / "validation" / "summary.json").is_file()
    case = next((folder / "validation").glob("*.npz"))
    assert np.load(case)["probabilities"].shape[0] == trainer.label_manager.num_segmentation_heads

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), ("0",))
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    patch = torch.randn(1, trainer.num_input_channels, *trainer.configuration_manager.patch_size)
    with torch.no_grad():
        torch.testing.assert_close(predictor.network.eval()(patch), trainer.network(patch))


@DYNAMIC
class TestDynamic:
    def test_saved_plans_name_the_network_with_all_arguments(
        self, make_trainer: Callable[..., Any], trainer_class: type
    ) -> None:
        trainer = make_trainer(trainer_class)
        run_briefly(trainer)
        plans = json.loads((Path(trainer.output_folder_base) / "plans.json").read_text())
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        assert architecture["network_class_name"].rpartition(".")[2] == FAMILIES[trainer_class].__name__
        takes = set(inspect.signature(FAMILIES[trainer_class]).parameters)
        assert set(architecture["arch_kwargs"]) == takes - {"input_channels", "num_classes", "deep_supervision"}

    def test_stock_trainer_trains_plans_that_name_it(
        self, make_trainer: Callable[..., Any], stock_plans: dict[str, Any], trainer_class: type
    ) -> None:
        configuration = make_trainer(trainer_class).configuration_manager
        stock_plans["configurations"]["3d_fullres"].update(trainer_class.resolve(configuration, "3d_fullres"))
        trainer = make_trainer(nnUNetTrainer, plans=stock_plans)
        run_briefly(trainer)
        assert isinstance(trainer.network, FAMILIES[trainer_class])
        assert math.isfinite(trainer.logger.get_value("train_losses", -1))

    def test_without_deep_supervision(self, make_trainer: Callable[..., Any], trainer_class: type) -> None:
        trainer = make_trainer(trainer_class)
        trainer.enable_deep_supervision = False
        run_briefly(trainer)
        assert math.isfinite(trainer.logger.get_value("val_losses", -1))

    def test_cascade(self, make_trainer: Callable[..., Any], trainer_class: type) -> None:
        lowres = make_trainer(trainer_class, configuration="3d_lowres", fold="all")
        run_briefly(lowres)
        lowres.perform_actual_validation()
        cascade = make_trainer(trainer_class, configuration="3d_cascade_fullres")
        run_briefly(cascade)
        assert cascade.num_input_channels == 2 + 3
        assert math.isfinite(cascade.logger.get_value("val_losses", -1))

    def test_continues(self, make_trainer: Callable[..., Any], trainer_class: type) -> None:
        trainer = make_trainer(trainer_class)
        trainer.checkpoint_interval_minutes = 0
        trainer.num_epochs = 1
        trainer.on_train_start()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        for _ in range(2):
            trainer.train_step(next(trainer.dataloader_train))
        resumed = make_trainer(trainer_class, continue_training=True)
        maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
        resumed.num_epochs = 1
        resumed.run_training()
        assert "Continuing this epoch after iteration 2 of 3" in Path(resumed.log_file).read_text()
        assert len(resumed.logger.get_value("train_losses", None)) == 1


@pytest.mark.parametrize("trainer_class", [nnUNetTrainerConResNet, nnUNetTrainerVNet, nnUNetTrainerUNet3D])
def test_trains_plans_with_checkpointing(
    make_trainer: Callable[..., Any], stock_plans: dict[str, Any], trainer_class: type
) -> None:
    configuration = make_trainer(trainer_class).configuration_manager
    entries = trainer_class.resolve(configuration, "3d_fullres")
    entries["architecture"]["arch_kwargs"]["checkpointing"] = "full"
    stock_plans["configurations"]["3d_fullres"].update(entries)
    trainer = make_trainer(trainer_class, plans=stock_plans)
    run_briefly(trainer)
    assert trainer.network.encoder.checkpointing
    assert trainer.network.decoder.checkpointing
    assert math.isfinite(trainer.logger.get_value("train_losses", -1))
    saved = json.loads((Path(trainer.output_folder_base) / "plans.json").read_text())
    kwargs = saved["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert kwargs["checkpointing"] == "full"


@pytest.mark.parametrize(
    ("kind", "trainer_class"),
    [
        ("labels", nnUNetTrainerConResNet),
        ("ignored_regions", nnUNetTrainerConResNet),
        ("labels", nnUNetTrainerUNet3D),
        ("regions", nnUNetTrainerVNet),
        ("ignore", nnUNetTrainerVNetPaper),
        ("ignore", nnUNetTrainerUNet3DPaper),
    ],
)
def test_loss_compiles_without_graph_break(make_trainer: Callable[..., Any], kind: str, trainer_class: type) -> None:
    torch.compiler.reset()
    trainer = make_trainer(trainer_class, kind)
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    with torch.no_grad():
        outputs = [output.detach() for output in trainer.network(batch["data"])]
        expected = trainer.loss(outputs, batch["target"])
        compiled = torch.compile(trainer.loss, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(outputs, batch["target"]), expected)


@PAPER
class TestPaper:
    def test_single_output_and_finite_steps(self, make_trainer: Callable[..., Any], trainer_class: type) -> None:
        trainer = make_trainer(trainer_class, "ignored_regions")
        run_briefly(trainer)
        assert len(trainer.network.decoder.seg_layers) == 1
        assert trainer.loss.loss.weight_factors == (1.0,)
        assert trainer.inference_allowed_mirroring_axes is None
        assert math.isfinite(trainer.logger.get_value("train_losses", -1))
        assert math.isfinite(trainer.logger.get_value("val_losses", -1))

    def test_under_the_other_trainer(
        self, make_trainer: Callable[..., Any], stock_plans: dict[str, Any], trainer_class: type
    ) -> None:
        """Plans may name the paper's network. nnU-Net's recipe then trains its single head."""
        entries = trainer_class.resolve(make_trainer(trainer_class).configuration_manager, "3d_fullres")
        arguments = entries["architecture"]["arch_kwargs"]
        arguments["features_per_stage"] = [4 + 2 * i for i in range(arguments["n_stages"])]
        stock_plans["configurations"]["3d_fullres"].update(entries)
        trainer = make_trainer(trainer_class.__base__, plans=stock_plans)
        run_briefly(trainer)
        assert math.isfinite(trainer.logger.get_value("train_losses", -1))
        assert trainer.loss.loss.weight_factors == (1.0,)


def spatial_and_others(trainer_class: type, **kwargs: Any) -> tuple[BSplineSpatialTransform, list[Any]]:
    pipeline = trainer_class.get_training_transforms(
        (16, 24, 32), kwargs.pop("rotation", (0.0, 0.0)), [[1, 1, 1]], None, kwargs.pop("dummy_2d", False), **kwargs
    )
    (spatial,) = [t for t in pipeline.transforms if isinstance(t, BSplineSpatialTransform)]
    return spatial, [t for t in pipeline.transforms if t is not spatial]


class TestVNetPaper:
    def test_is_the_papers(self, make_trainer: Callable[..., Any]) -> None:
        trainer = make_trainer(nnUNetTrainerVNetPaper)
        assert trainer.configuration_manager.patch_size == [16, 32, 32]  # 64 x 128 x 128 would be mostly padding
        assert trainer.configuration_manager.batch_size == 2
        assert trainer.num_epochs == 120 or nnUNetTrainerVNetPaper.training_epochs == 120
        trainer = make_trainer(nnUNetTrainerVNetPaper)
        trainer.num_iterations_per_epoch = trainer._full_epoch_iterations = 250
        trainer.initialize()
        assert isinstance(trainer.loss.loss.loss, SquaredDiceLoss)
        group = trainer.optimizer.param_groups[0]
        assert (group["momentum"], group["nesterov"]) == (0.99, False)
        rates = []
        for epoch in (0, 99, 100, 119):
            trainer.lr_scheduler.step(epoch)
            rates.append(group["lr"])
        # divided by 10 after iteration 25,000 = 100 epochs
        np.testing.assert_allclose(rates, [1e-4, 1e-4, 1e-5, 1e-5])

    def test_augments_by_histogram_matching_and_deformation_only(self, make_trainer: Callable[..., Any]) -> None:
        spatial, others = spatial_and_others(nnUNetTrainerVNetPaper)
        assert spatial.p_rotation == spatial.p_scaling == 0
        assert spatial.p_deformation == 1
        # cells of half a patch; a sigma of 15 of 64 voxels
        np.testing.assert_allclose(spatial.sigma, np.array([8, 12, 16]) * 15 / 64)
        assert isinstance(others[0], HistogramMatchingTransform)
        assert not any(isinstance(t, (RandomTransform, MirrorTransform)) for t in others)
        flat, _ = spatial_and_others(nnUNetTrainerVNetPaper, dummy_2d=True)
        assert len(flat.sigma) == 2
        trainer = make_trainer(nnUNetTrainerVNetPaper)
        *_, initial_patch_size, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        assert list(initial_patch_size) == [16 + 2 * 2, 32 + 2 * 4, 32 + 2 * 4]
        assert mirror_axes is None

    def test_plans_that_name_it_keep_their_patch(
        self, make_trainer: Callable[..., Any], stock_plans: dict[str, Any]
    ) -> None:
        entries = nnUNetTrainerVNetPaper.resolve(make_trainer(nnUNetTrainerVNetPaper).configuration_manager, "x")
        stock_plans["configurations"]["3d_fullres"].update(entries | {"patch_size": [8, 20, 20], "batch_size": 3})
        trainer = make_trainer(nnUNetTrainerVNetPaper, plans=stock_plans)
        assert trainer.configuration_manager.patch_size == [8, 20, 20]
        assert trainer.configuration_manager.batch_size == 3


class TestUNet3DPaper:
    def test_is_the_papers(self, make_trainer: Callable[..., Any]) -> None:
        trainer = make_trainer(nnUNetTrainerUNet3DPaper, "ignore")
        trainer.initialize()
        loss = trainer.loss.loss.loss
        assert isinstance(loss, VoxelWeightedCrossEntropyLoss)
        assert loss.background_weight < 1 < loss.foreground_weight
        assert loss.ignore_label == 3
        norms = [m for m in trainer.network.modules() if type(m).__name__.endswith(("Norm3d", "Norm"))]
        assert {type(m) for m in norms} == {torch.nn.BatchNorm3d}
        assert nnUNetTrainerUNet3DPaper.training_epochs * 250 == 70_000

    def test_augments_by_rotation_scaling_deformation_and_grey_values(self, make_trainer: Callable[..., Any]) -> None:
        trainer = make_trainer(nnUNetTrainerUNet3DPaper)
        rotation, *_, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        assert mirror_axes is None
        assert np.rad2deg(rotation).tolist() == pytest.approx([-30, 30])
        spatial, others = spatial_and_others(nnUNetTrainerUNet3DPaper, rotation=rotation)
        assert spatial.p_rotation == spatial.p_scaling == spatial.p_deformation == 1
        assert spatial.sigma == (4.0, 4.0, 4.0)
        assert spatial.padding_mode_image == spatial.border_mode_seg == "reflection"
        assert isinstance(others[0], MirrorOutsideTransform)
        kept = {type(t.transform).__name__ for t in others if isinstance(t, RandomTransform)}
        assert kept == {"MultiplicativeBrightnessTransform", "ContrastTransform", "GammaTransform"}


@pytest.mark.usefixtures("nothing_is_written")
class TestRefusals:
    """Trainings that cannot work are refused before a folder is created."""

    @pytest.mark.parametrize("trainer_class", [nnUNetTrainerVNetPaper, nnUNetTrainerUNet3D])
    def test_2d(self, make_trainer: Callable[..., Any], trainer_class: type) -> None:
        with pytest.raises(ValueError, match="supports 3D configurations only, but configuration 2d is 2D"):
            make_trainer(trainer_class, configuration="2d")

    @DYNAMIC
    def test_plans_that_the_network_cannot_realise(
        self, make_trainer: Callable[..., Any], stock_plans: dict[str, Any], trainer_class: type
    ) -> None:
        arguments = stock_plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        arguments["kernel_sizes"] = [[4, 4, 4]] * arguments["n_stages"]
        with pytest.raises(ValueError, match=r"3d_fullres asks for can't be built: kernel_sizes must be odd, and 1"):
            make_trainer(trainer_class, plans=stock_plans)

    def test_arguments_that_the_network_does_not_have(
        self, make_trainer: Callable[..., Any], stock_plans: dict[str, Any]
    ) -> None:
        architecture = stock_plans["configurations"]["3d_fullres"]["architecture"]
        architecture["network_class_name"] = "nnunet_conres.architectures.vnet.VNet"
        architecture["arch_kwargs"]["dilation"] = 2
        with pytest.raises(ValueError, match=r"can't be built: .*unexpected keyword argument 'dilation'"):
            make_trainer(nnUNetTrainerVNet, plans=stock_plans)
