"""Trainings of a few steps through nnU-Net's own code, on data that nnU-Net planned and preprocessed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

import nnunet_conres.trainers
from nnunet_conres import __version__
from nnunet_conres.architectures.conresnet import ConResNet
from nnunet_conres.architectures.conresnet_paper import ConResNetPaper
from nnunet_conres.architectures.residual_map_unet import ResidualMapUNet
from nnunet_conres.augmentation.bspline import BSplineSpatialTransform
from nnunet_conres.errors import InputError
from nnunet_conres.trainers import (
    nnUNetTrainerConResNet,
    nnUNetTrainerConResNet_NoMirroring,
    nnUNetTrainerConResNetBSpline,
    nnUNetTrainerConResNetPaper,
    nnUNetTrainerConResNetSharedEncoder,
    nnUNetTrainerResidualMaps,
)
from nnunet_conres.trainers.logger import FIGURE_NAME

CURVES = tuple(f"{phase}_{part}_losses" for phase in ("train", "val") for part in ("segmentation", "residual"))


def checkpoint_of(trainer: nnUNetTrainer, name: str = "checkpoint_final.pth") -> dict[str, Any]:
    return torch.load(Path(trainer.output_folder) / name, weights_only=False)


def saved_architecture(trainer: nnUNetTrainer) -> dict[str, Any]:
    plans = json.loads((Path(trainer.output_folder_base) / "plans.json").read_text())
    return plans["configurations"][trainer.configuration_name]["architecture"]


def conresnet_paper_plans() -> dict[str, Any]:
    """Return the plans entry that the documentation gives for the paper's network."""
    return {
        "network_class_name": "nnunet_conres.architectures.conresnet_paper.ConResNetPaper",
        "arch_kwargs": {},
        "_kw_requires_import": [],
    }


class TestTraining:
    @pytest.mark.parametrize(
        ("kind", "trainer_class"),
        [
            ("labels", nnUNetTrainerConResNet),
            ("regions", nnUNetTrainerConResNet),
            ("ignore", nnUNetTrainerConResNet),
            ("labels", nnUNetTrainerResidualMaps),
            ("regions", nnUNetTrainerResidualMaps),
            pytest.param("ignored_regions", nnUNetTrainerConResNet, marks=pytest.mark.slow),
            pytest.param("labels", nnUNetTrainerConResNetSharedEncoder, marks=pytest.mark.slow),
            pytest.param("regions", nnUNetTrainerConResNetPaper, marks=pytest.mark.slow),
        ],
    )
    def test_trains_validates_and_predicts(
        self, make_trainer: Callable[..., Any], kind: str, trainer_class: type
    ) -> None:
        trainer = make_trainer(trainer_class, kind)
        trainer.run_training()
        for curve in CURVES:
            values = trainer.logger.get_value(curve, None)
            assert len(values) == 2
            assert all(math.isfinite(v) for v in values), curve
        checkpoint = checkpoint_of(trainer)
        assert checkpoint["logging"]["train_residual_losses"] == trainer.logger.get_value("train_residual_losses", None)
        assert checkpoint["init_args"]["plans"]["nnunet_conres"]["version"] == __version__
        total, seg, res = (
            np.array(trainer.logger.get_value(f"train_{name}losses", None))
            for name in ("", "segmentation_", "residual_")
        )
        np.testing.assert_allclose(total, seg + trainer.residual_weight * res, rtol=1e-3)

        folder = Path(trainer.output_folder)
        assert {"progress.png", FIGURE_NAME, "checkpoint_final.pth"} <= {p.name for p in folder.iterdir()}
        assert not list(folder.glob("*.partial"))
        log = next(folder.glob("training_log*.txt")).read_text()
        assert "residual loss: train" in log
        assert f"{trainer.region_names[0]} 0." in log

        trainer.perform_actual_validation(save_probabilities=True)
        assert (folder / "validation" / "summary.json").is_file()
        case = next((folder / "validation").glob("*.npz"))
        expected = trainer.label_manager.num_segmentation_heads
        assert np.load(case)["probabilities"].shape[0] == expected

        # from the folder alone, like nnUNetv2_predict
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
        predictor.initialize_from_trained_model_folder(str(folder.parent), ("0",))
        trainer.set_deep_supervision_enabled(False)
        trainer.network.eval()
        patch = torch.randn(1, trainer.num_input_channels, *trainer.configuration_manager.patch_size)
        with torch.no_grad():
            torch.testing.assert_close(predictor.network.eval()(patch), trainer.network(patch))

    def test_region_names_follow_nnunets_order(self, make_trainer: Callable[..., Any]) -> None:
        assert make_trainer(nnUNetTrainerConResNet, "labels").region_names == ["oedema", "necrosis", "enhancing"]
        names = make_trainer(nnUNetTrainerConResNet, "ignored_regions").region_names
        assert names == ["whole tumor", "tumor core"]

    def test_saved_plans_hold_every_resolved_argument(self, make_trainer: Callable[..., Any]) -> None:
        trainer = make_trainer(nnUNetTrainerConResNetSharedEncoder)
        trainer.num_epochs = 1
        trainer.run_training()
        architecture = saved_architecture(trainer)
        assert architecture["network_class_name"].endswith("ConResNet")
        assert architecture["arch_kwargs"]["shared_encoder"] is True
        assert architecture["arch_kwargs"]["background_class"] is True
        assert {"slice_axis", "checkpointing", "n_blocks_per_stage"} <= set(architecture["arch_kwargs"])

    @pytest.mark.parametrize(
        ("trainer_class", "network_class"),
        [
            (nnUNetTrainerConResNet, ConResNet),
            (nnUNetTrainerConResNetPaper, ConResNetPaper),
            (nnUNetTrainerResidualMaps, ResidualMapUNet),
        ],
    )
    def test_stock_trainer_trains_plans_that_name_our_networks(
        self,
        make_trainer: Callable[..., Any],
        stock_plans: dict[str, Any],
        trainer_class: type,
        network_class: type,
    ) -> None:
        entries = trainer_class.resolve(make_trainer(trainer_class).configuration_manager, "3d_fullres")
        stock_plans["configurations"]["3d_fullres"].update(entries)
        trainer = make_trainer(nnUNetTrainer, plans=stock_plans)
        trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
        trainer.run_training()
        assert isinstance(trainer.network, network_class)
        assert math.isfinite(trainer.logger.get_value("train_losses", -1))

    def test_without_deep_supervision_says_so(self, make_trainer: Callable[..., Any]) -> None:
        trainer = make_trainer(nnUNetTrainerConResNet)
        trainer.enable_deep_supervision = False
        with pytest.raises(ValueError, match="enable_deep_supervision"):
            trainer.initialize()

    def test_with_a_loss_of_the_users_own(self, make_trainer: Callable[..., Any]) -> None:
        class OnlySegmentation(nn.Module):
            def __init__(self, segmentation: nn.Module) -> None:
                super().__init__()
                self.segmentation = segmentation

            def forward(self, outputs: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
                return self.segmentation(outputs[: len(targets)], targets)

        class Own(nnUNetTrainerConResNet):
            def _build_loss(self) -> nn.Module:
                return OnlySegmentation(super()._build_loss().segmentation)

        trainer = make_trainer(Own)
        trainer.num_epochs = 1
        trainer.run_training()
        assert math.isnan(trainer.logger.get_value("train_residual_losses", -1))
        assert math.isfinite(trainer.logger.get_value("train_losses", -1))

    def test_pretrained_weights_and_val(self, make_trainer: Callable[..., Any]) -> None:
        """From three classes to two, and --val afterwards, as nnUNetv2_train calls them."""
        source = make_trainer(nnUNetTrainerConResNet, "labels")
        source.num_epochs = 1
        source.run_training()
        file = str(Path(source.output_folder) / "checkpoint_final.pth")
        target = make_trainer(nnUNetTrainerConResNet, "ignore")
        maybe_load_checkpoint(target, False, False, pretrained_weights_file=file)
        assert torch.equal(
            target.network.encoder.stem.convs[0].conv.weight, source.network.encoder.stem.convs[0].conv.weight
        )
        target.num_epochs = 1
        target.run_training()
        again = make_trainer(nnUNetTrainerConResNet, "ignore")
        maybe_load_checkpoint(again, False, True)
        again.perform_actual_validation()
        assert (Path(again.output_folder) / "validation" / "summary.json").is_file()

    def test_two_stages(self, make_trainer: Callable[..., Any], stock_plans: dict[str, Any]) -> None:
        """nnU-Net leaves out the coarsest scale of deep supervision, which is the only one here."""
        arguments = stock_plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        arguments["n_stages"] = 2
        for name in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
            arguments[name] = arguments[name][:2]
        trainer = make_trainer(nnUNetTrainerConResNet, plans=stock_plans)
        trainer.num_epochs = 1
        trainer.run_training()
        assert math.isfinite(trainer.logger.get_value("train_segmentation_losses", -1))

    def test_cascade(self, make_trainer: Callable[..., Any]) -> None:
        lowres = make_trainer(nnUNetTrainerConResNet, configuration="3d_lowres", fold="all")
        lowres.num_epochs = 1
        lowres.run_training()
        lowres.perform_actual_validation()
        cascade = make_trainer(nnUNetTrainerConResNet, configuration="3d_cascade_fullres")
        cascade.num_epochs = 1
        cascade.run_training()
        assert cascade.num_input_channels == 2 + 3  # one more channel for every foreground label of the previous stage
        assert cascade.network.encoder.stem.convs[0].conv.in_channels == 5
        assert math.isfinite(cascade.logger.get_value("val_residual_losses", -1))

    def test_no_mirroring(self, make_trainer: Callable[..., Any]) -> None:
        trainer = make_trainer(nnUNetTrainerConResNet_NoMirroring)
        *_, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        assert mirror_axes is None
        assert trainer.inference_allowed_mirroring_axes is None

    def test_training_lengths(self) -> None:
        lengths = {
            name: getattr(nnunet_conres.trainers, name).training_epochs for name in nnunet_conres.trainers.__all__
        }
        for name, epochs in lengths.items():
            if name.endswith(("epoch", "epochs")):
                assert name.rsplit("_", 1)[1].removesuffix("s").removesuffix("epoch") == str(epochs)
        assert lengths["nnUNetTrainerConResNet"] == 1000
        assert lengths["nnUNetTrainerConResNetPaper"] * 250 == 40_000


class TestSparseAnnotation:
    """Patches of nnU-Net's loader reach beyond the volume. Voxels there must not count as annotated."""

    @staticmethod
    def annotate(monkeypatch: pytest.MonkeyPatch, trainer: Any, slices: list[int]) -> None:
        load_case = nnUNetDatasetBlosc2.load_case

        def sparse(self: Any, identifier: str) -> tuple[Any, ...]:
            data, labels, previous, properties = load_case(self, identifier)
            labels = np.array(labels)
            hidden = [index for index in range(labels.shape[1]) if index not in slices]
            labels[:, hidden] = trainer.label_manager.ignore_label
            return data, labels, previous, properties

        monkeypatch.setattr(nnUNetDatasetBlosc2, "load_case", sparse)

    def test_without_neighbouring_slices_says_so_once_and_logs_nan(
        self,
        make_trainer: Callable[..., Any],
        preprocessed: Callable[[str], Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        plans = json.loads((preprocessed("ignore") / "nnUNetPlans.json").read_text())
        plans["configurations"]["3d_fullres"]["patch_size"] = [24, 24, 24]  # the images have 16 slices
        trainer = make_trainer(nnUNetTrainerConResNet, "ignore", plans=plans)
        self.annotate(monkeypatch, trainer, [3, 8, 12])
        trainer.run_training()
        log = trainer.logger.local_logger.my_fantastic_logging
        for phase in ("train", "val"):
            assert np.isnan(log[f"{phase}_residual_losses"]).tolist() == [True, True]
            assert np.isfinite(log[f"{phase}_segmentation_losses"]).all()
        assert log["train_losses"] == pytest.approx(log["train_segmentation_losses"], rel=1e-3)
        assert Path(trainer.log_file).read_text().count("two neighbouring slices annotated") == 1

    def test_with_neighbouring_slices_says_nothing(
        self, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = make_trainer(nnUNetTrainerConResNet, "ignore")
        self.annotate(monkeypatch, trainer, [7, 8])
        trainer.num_epochs = 1
        trainer.run_training()
        assert "neighbouring slices" not in Path(trainer.log_file).read_text()
        assert math.isfinite(trainer.logger.get_value("train_residual_losses", -1))


def test_bspline_variant_deforms_as_often_as_nnunet_rotates(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(nnUNetTrainerConResNetBSpline)
    trainer.num_epochs = 1
    trainer.run_training()
    for dummy_2d in (False, True):
        stock = nnUNetTrainer.get_training_transforms((16, 24, 24), (-0.5, 0.5), [[1, 1, 1]], (0,), dummy_2d)
        ours = nnUNetTrainerConResNetBSpline.get_training_transforms(
            (16, 24, 24), (-0.5, 0.5), [[1, 1, 1]], (0,), dummy_2d
        )
        assert len(ours.transforms) == len(stock.transforms)
        (before,) = [t for t in stock.transforms if isinstance(t, SpatialTransform)]
        (after,) = [t for t in ours.transforms if isinstance(t, SpatialTransform)]
        assert isinstance(after, BSplineSpatialTransform)
        assert len(after.patch_size) == (2 if dummy_2d else 3)
        assert after.p_deformation == before.p_rotation == 0.2
        for name in ("rotation", "scaling", "p_scaling", "border_mode_seg", "padding_value_seg", "patch_size"):
            assert getattr(after, name) == getattr(before, name), name


class TestPaperTrainer:
    def test_is_the_papers(self, make_trainer: Callable[..., Any]) -> None:
        trainer = make_trainer(nnUNetTrainerConResNetPaper, "regions")
        trainer.num_epochs = 1
        rates: list[float] = []
        trainer.on_train_start()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        for _ in range(3):
            trainer.train_step(next(trainer.dataloader_train))
            rates.append(trainer.optimizer.param_groups[0]["lr"])
        # poly decay of 1e-4 with power 0.9, by iteration
        np.testing.assert_allclose(rates, [1e-4 * (1 - i / 3) ** 0.9 for i in range(3)])
        assert isinstance(trainer.optimizer, torch.optim.Adam)
        assert trainer.optimizer.param_groups[0]["weight_decay"] == 5e-4
        assert trainer.configuration_manager.patch_size == [16, 24, 24]  # 80 x 160 x 160 would be mostly padding
        assert trainer.configuration_manager.batch_size == 2
        network = trainer.network
        assert isinstance(network, ConResNetPaper)
        assert network.decoder.seg_layers.segmentation[0].out_channels == 3
        assert network.decoder.seg_layers.residual[0].out_channels == 3
        assert trainer.loss.residual_weight * 0.5 == 1  # 1 : 0.5 : 0.5, unnormalised

    def test_augments_by_scaling_and_mirroring_only(self, make_trainer: Callable[..., Any]) -> None:
        trainer = make_trainer(nnUNetTrainerConResNetPaper)
        rotation, dummy_2d, _, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        assert rotation == (0.0, 0.0)
        pipeline = trainer.get_training_transforms((16, 24, 24), rotation, [[1, 1, 1]], mirror_axes, dummy_2d)
        spatial, mirror = pipeline.transforms[:2]
        assert isinstance(spatial, SpatialTransform)
        assert isinstance(mirror, MirrorTransform)
        assert not any(isinstance(t, RandomTransform) for t in pipeline.transforms)
        drawn = [
            spatial.get_parameters(image=torch.zeros(1, 20, 28, 28), segmentation=torch.zeros(1, 20, 28, 28))["affine"]
            for _ in range(50)
        ]
        scales = np.array([np.linalg.svd(a, compute_uv=False) for a in drawn])
        assert np.ptp(scales, axis=1).max() < 1e-6  # one factor for all axes
        for matrix, scale in zip(drawn, scales[:, 0], strict=True):
            np.testing.assert_allclose(matrix, np.eye(3) * scale, atol=1e-6)  # no rotation
        assert 0.9 - 1e-6 <= scales.min() < 0.95 < 1.05 < scales.max() <= 1 / 0.9 + 1e-6

    def test_cascade_keeps_its_own_augmentation(self, make_trainer: Callable[..., Any]) -> None:
        pipeline = nnUNetTrainerConResNetPaper.get_training_transforms(
            (16, 24, 24), (0.0, 0.0), [[1, 1, 1]], (0, 1, 2), False, is_cascaded=True, foreground_labels=[1, 2]
        )
        assert sum(isinstance(t, RandomTransform) for t in pipeline.transforms) == 2

    def test_own_patch_of_plans_that_name_its_network(
        self, make_trainer: Callable[..., Any], stock_plans: dict[str, Any]
    ) -> None:
        fullres = stock_plans["configurations"]["3d_fullres"]
        fullres["architecture"] = conresnet_paper_plans()
        fullres["patch_size"] = [8, 16, 16]
        trainer = make_trainer(nnUNetTrainerConResNetPaper, plans=stock_plans)
        assert trainer.configuration_manager.patch_size == [8, 16, 16]
        fullres["patch_size"] = [10, 16, 16]
        with pytest.raises(ValueError, match=r"divisible by 8.*\[10, 16, 16\]. Use for example \[16, 16, 16\]"):
            make_trainer(nnUNetTrainerConResNetPaper, plans=stock_plans)

    def test_scaling_of_a_subclass(self, make_trainer: Callable[..., Any]) -> None:
        class Stronger(nnUNetTrainerConResNetPaper):
            scaling = (0.5, 2.0)

        pipeline = Stronger.get_training_transforms((16, 24, 24), (0.0, 0.0), [[1, 1, 1]], (0, 1, 2), False)
        assert pipeline.transforms[0].scaling == (0.5, 2.0)

    @pytest.mark.parametrize("trainer_class", [nnUNetTrainerConResNet, nnUNetTrainerResidualMaps])
    def test_its_plans_under_other_trainers_are_refused(
        self, make_trainer: Callable[..., Any], stock_plans: dict[str, Any], trainer_class: type
    ) -> None:
        stock_plans["configurations"]["3d_fullres"]["architecture"] = conresnet_paper_plans()
        with pytest.raises(ValueError, match=r"Cannot derive .* from these plans: their network .*ConResNetPaper"):
            make_trainer(trainer_class, plans=stock_plans)


@pytest.mark.usefixtures("nothing_is_written")
class TestRefusals:
    """Trainings that cannot work are refused before a folder is created."""

    @pytest.mark.parametrize("trainer_class", [nnUNetTrainerConResNet, nnUNetTrainerConResNetPaper])
    def test_2d(self, make_trainer: Callable[..., Any], trainer_class: type) -> None:
        with pytest.raises(ValueError, match="supports 3D configurations only, but configuration 2d is 2D"):
            make_trainer(trainer_class, configuration="2d")

    @pytest.mark.parametrize("trainer_class", [nnUNetTrainerConResNet, nnUNetTrainerConResNetPaper])
    def test_single_slice(
        self, make_trainer: Callable[..., Any], stock_plans: dict[str, Any], trainer_class: type
    ) -> None:
        stock_plans["configurations"]["3d_fullres"]["patch_size"] = [1, 32, 32]
        with pytest.raises(ValueError, match="single slice"):
            make_trainer(trainer_class, plans=stock_plans)

    def test_data_that_were_not_preprocessed(
        self, make_trainer: Callable[..., Any], stock_plans: dict[str, Any]
    ) -> None:
        stock_plans["configurations"]["3d_fullres"]["data_identifier"] = "nnUNetPlans_5G_3d_fullres"
        with pytest.raises(InputError, match=r"nnUNetPlans_5G_3d_fullres does not exist. Run: nnUNetv2_preprocess"):
            make_trainer(nnUNetTrainerConResNet, plans=stock_plans)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_cuda_where_there_is_none(self, stock_plans: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="-device cpu"):
            nnUNetTrainerConResNet(stock_plans, "3d_fullres", 0, {"labels": {}}, torch.device("cuda"))

    def test_networks_without_stages(self, make_trainer: Callable[..., Any], stock_plans: dict[str, Any]) -> None:
        stock_plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].pop("strides")
        with pytest.raises(ValueError, match="Cannot derive ConResNet"):
            make_trainer(nnUNetTrainerConResNet, plans=stock_plans)


class TestContinuing:
    def test_in_mid_epoch_loses_nothing(self, make_trainer: Callable[..., Any]) -> None:
        """A checkpoint after every step; the training ends after 2 of 3 steps of the second epoch."""
        trainer = make_trainer(nnUNetTrainerConResNet)
        trainer.checkpoint_interval_minutes = 0
        steps = 0
        original = nnUNetTrainer.train_step
        seen: list[float] = []

        class KilledError(Exception):
            pass

        def counting(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
            nonlocal steps
            if steps == 5:
                raise KilledError
            steps += 1
            output = original(self, batch)
            seen.append(float(output["loss"]))
            return output

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nnUNetTrainer, "train_step", counting)
            with pytest.raises(KilledError):
                trainer.run_training()
            steps = -100
            resumed = make_trainer(nnUNetTrainerConResNet, continue_training=True)
            maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
            assert resumed.current_epoch == 1
            for name, value in trainer.network.state_dict().items():
                assert torch.equal(value, resumed.network.state_dict()[name])
            log = resumed.logger.local_logger.my_fantastic_logging
            first_epoch = {key: list(values) for key, values in log.items()}
            resumed.run_training()
        assert len(seen) == 6  # 3 + 2, and the missing one
        assert all(len(values) == 1 for values in first_epoch.values())
        for key, values in resumed.logger.local_logger.my_fantastic_logging.items():
            assert len(values) == 2, key
            assert values[0] == first_epoch[key][0], key
        assert resumed.logger.get_value("train_losses", 1) == pytest.approx(np.mean(seen[3:]), rel=1e-5)
        assert "Continuing this epoch after iteration 2 of 3" in Path(resumed.log_file).read_text()
        assert resumed.num_iterations_per_epoch == 3

    def test_a_changed_default_does_not_change_a_started_training(
        self, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = make_trainer(nnUNetTrainerConResNet)
        trainer.num_epochs = 1
        trainer.run_training()
        tomorrow = nnUNetTrainerConResNet.resolve.__func__

        def with_more_blocks(cls: type, configuration: Any, name: str) -> dict[str, Any]:
            entries = tomorrow(cls, configuration, name)
            arguments = entries["architecture"]["arch_kwargs"]
            arguments["n_blocks_per_stage"] = [n + 1 for n in arguments["n_blocks_per_stage"]]
            return entries

        monkeypatch.setattr(nnUNetTrainerConResNet, "resolve", classmethod(with_more_blocks))
        resumed = make_trainer(nnUNetTrainerConResNet, continue_training=True)
        assert resumed.configuration_manager.network_arch_init_kwargs["n_blocks_per_stage"][0] == 2
        maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
        assert resumed.configuration_manager.network_arch_init_kwargs["n_blocks_per_stage"][0] == 1
        resumed.run_training()  # saves its plans again
        assert saved_architecture(resumed)["arch_kwargs"]["n_blocks_per_stage"][0] == 1

    def test_damaged_checkpoint(self, make_trainer: Callable[..., Any]) -> None:
        trainer = make_trainer(nnUNetTrainerConResNet)
        file = Path(trainer.output_folder) / "checkpoint_latest.pth"
        file.write_bytes(b"PK\x03\x04 cut off")
        with pytest.raises(InputError, match=r"checkpoint_latest.pth is damaged.*Move it away"):
            maybe_load_checkpoint(trainer, True, False)

    def test_other_folds_share_what_the_first_was_trained_with(
        self, make_trainer: Callable[..., Any], stock_plans: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All folds of a model have one plans.json, from which nnU-Net rebuilds the network."""
        first = make_trainer(nnUNetTrainerConResNet, fold=0)
        first.num_epochs = 1
        first.run_training()
        today = saved_architecture(first)
        tomorrow = nnUNetTrainerConResNet.resolve.__func__

        def without_bias(cls: type, configuration: Any, name: str) -> dict[str, Any]:
            entries = tomorrow(cls, configuration, name)
            entries["architecture"]["arch_kwargs"]["conv_bias"] = False
            return entries

        monkeypatch.setattr(nnUNetTrainerConResNet, "resolve", classmethod(without_bias))
        second = make_trainer(nnUNetTrainerConResNet, fold=1)
        assert second.configuration_manager.configuration["architecture"] == today
        again = make_trainer(nnUNetTrainerConResNet, fold=0)  # from scratch: no other fold depends on it
        assert again.configuration_manager.network_arch_init_kwargs["conv_bias"] is False
        stock_plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"][0] = 8
        with pytest.raises(InputError, match=r"fold_0 in .* another network.*features_per_stage"):
            make_trainer(nnUNetTrainerConResNet, fold=1, plans=stock_plans)

    def test_the_latest_checkpoint_never_gets_old(
        self, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Even if every epoch is shorter than the interval and writes a new best checkpoint."""
        clock = 0.0
        monkeypatch.setattr("nnunet_conres.trainers.resume.time.monotonic", lambda: clock)
        trainer = make_trainer(nnUNetTrainerConResNet)
        trainer.num_epochs = 6
        latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
        written: list[float] = [0.0]
        save, step = trainer.save_checkpoint, nnUNetTrainer.train_step

        def saving(filename: str) -> None:
            save(filename)
            if filename == str(latest):
                written.append(clock)

        def ticking(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
            nonlocal clock
            clock += 60.0
            self._best_ema = -1.0  # the next epoch is the best so far, as in most of the first ones
            return step(self, batch)

        trainer.save_checkpoint = saving
        monkeypatch.setattr(nnUNetTrainer, "train_step", ticking)
        trainer.run_training()
        assert clock == 18 * 60
        assert np.diff([*written, clock]).max() <= trainer.checkpoint_interval_minutes * 60

    def test_in_mid_validation(self, make_trainer: Callable[..., Any]) -> None:
        trainer = make_trainer(nnUNetTrainerConResNet)
        trainer.num_epochs = 1
        trainer.checkpoint_interval_minutes = math.inf

        def killed(self: Any, outputs: Any) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                nnUNetTrainer, "on_validation_epoch_start", lambda self: setattr(self, "checkpoint_interval_minutes", 0)
            )
            patch.setattr(nnUNetTrainer, "on_validation_epoch_end", killed)
            with pytest.raises(KeyboardInterrupt):
                trainer.run_training()
        resumed = make_trainer(nnUNetTrainerConResNet, continue_training=True)
        resumed.num_epochs = 1
        maybe_load_checkpoint(resumed, True, False)
        weights = {k: v.clone() for k, v in resumed.network.state_dict().items()}
        resumed.run_training()
        assert all(torch.equal(v, weights[k]) for k, v in resumed.network.state_dict().items())  # no step was repeated
        assert all(len(v) == 1 for v in resumed.logger.local_logger.my_fantastic_logging.values())

    def test_checkpoint_of_another_topology(
        self, make_trainer: Callable[..., Any], stock_plans: dict[str, Any]
    ) -> None:
        trainer = make_trainer(nnUNetTrainerConResNet)
        trainer.num_epochs = 1
        trainer.run_training()
        stock_plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"][0] = 8
        other = make_trainer(nnUNetTrainerConResNet, plans=stock_plans)
        with pytest.raises(InputError, match=r"another network.*features_per_stage: \[4, .* there, \[8, .* here"):
            other.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))

    def test_a_training_that_is_killed_goes_on(self, preprocessed: Callable[[str], Path], results: Path) -> None:
        """SIGKILL to the process in mid-epoch, then --c, through nnU-Net's entry point."""
        preprocessed("labels")
        script = (
            "import sys, time\n"
            "import nnunet_conres.trainers as t\n"
            "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
            "from nnunetv2.run import run_training as r\n"
            "class Small(t.nnUNetTrainerConResNet):\n"
            "    training_epochs = 2\n"
            "    checkpoint_interval_minutes = 0.0\n"
            "    steps = 0\n"
            "    def initialize(self):\n"
            "        super().initialize()\n"
            "        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 8, 1\n"
            "    def train_step(self, batch):\n"
            "        self.steps += self.current_epoch\n"
            "        if 'wait' in sys.argv and self.steps > 4:\n"
            "            time.sleep(600)\n"
            "        return super().train_step(batch)\n"
            "r.recursive_find_trainer_class_by_name = lambda name: Small\n"
            "import torch\n"
            "r.run_training('900', '3d_fullres', 0, 'Small', device=torch.device('cpu'),\n"
            "               continue_training='resume' in sys.argv)\n"
        )
        command = [sys.executable, "-c", script]
        folder = results / "Dataset900_labels" / "Small__nnUNetPlans__3d_fullres" / "fold_0"
        latest = folder / "checkpoint_latest.pth"
        process = subprocess.Popen([*command, "wait"], stdout=subprocess.DEVNULL, env=dict(os.environ))
        try:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and process.poll() is None:
                if latest.is_file() and self._unfinished(latest) >= 3:
                    break
                time.sleep(0.3)
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = self._unfinished(latest)
        assert 3 <= done < 8
        before = torch.load(latest, weights_only=False)["logging"]
        subprocess.run([*command, "resume"], check=True, stdout=subprocess.DEVNULL, timeout=300, env=dict(os.environ))
        after = torch.load(folder / "checkpoint_final.pth", weights_only=False)["logging"]
        for key, values in after.items():
            assert len(values) == 2, key
            assert values[:1] == before[key][:1], key
        newest = max(folder.glob("training_log*"), key=lambda file: file.stat().st_mtime)
        assert f"Continuing this epoch after iteration {done} of 8" in newest.read_text()
        assert (folder / "validation" / "summary.json").is_file()

    @staticmethod
    def _unfinished(latest: Path) -> int:
        """Return the steps of the second epoch in the checkpoint, which is complete because its writes are atomic."""
        logging = torch.load(latest, weights_only=False)["logging"]
        unfinished = logging.get("unfinished_epoch") or {"epoch": 0}
        return len(unfinished["outputs"]) if unfinished["epoch"] == 1 else 0

    def test_disabled_checkpoints_stay_disabled(self, make_trainer: Callable[..., Any]) -> None:
        trainer = make_trainer(nnUNetTrainerConResNet)
        trainer.disable_checkpointing = True
        trainer.checkpoint_interval_minutes = 0
        trainer.num_epochs = 1
        trainer.run_training()
        assert not list(Path(trainer.output_folder).glob("checkpoint*"))


class TestPrecision:
    @pytest.mark.parametrize(("value", "dtype"), [("1", torch.bfloat16), ("0", torch.float32)])
    def test_steps_on_a_cpu(
        self, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, value: str, dtype: torch.dtype
    ) -> None:
        monkeypatch.setattr("nnunet_conres.trainers.precision.cpu_has_bfloat16", lambda: True)
        monkeypatch.setenv("nnUNet_conres_cpu_bf16", value)
        trainer = make_trainer(nnUNetTrainerConResNet)
        trainer.on_train_start()
        seen: set[torch.dtype] = set()
        trainer.network.encoder.stages[1].register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        trainer.train_step(next(trainer.dataloader_train))
        trainer.validation_step(next(trainer.dataloader_val))
        assert seen == {dtype}
        assert {p.dtype for p in trainer.network.parameters()} == {torch.float32}

    def test_autocast_around_the_whole_step_gives_the_gradients_of_one_around_forward_and_loss(
        self, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """PyTorch advises against backward passes under autocast; here they change nothing."""
        monkeypatch.setattr("nnunet_conres.trainers.precision.cpu_has_bfloat16", lambda: True)
        trainer = make_trainer(nnUNetTrainerConResNet)
        trainer.on_train_start()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        batch = next(trainer.dataloader_train)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = trainer.loss(trainer.network(batch["data"]), batch["target"])
        loss.backward()
        nn.utils.clip_grad_norm_(trainer.network.parameters(), 12)
        expected = {name: p.grad.clone() for name, p in trainer.network.named_parameters() if p.grad is not None}
        trainer.train_step(batch)
        for name, parameter in trainer.network.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


def test_a_batch_without_foreground_leaves_everything_finite(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(nnUNetTrainerConResNet)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    batch["target"] = [torch.zeros_like(target) for target in batch["target"]]
    outputs = trainer.train_step(batch)
    assert all(np.isfinite(value) for name, value in outputs.items() if name.endswith("loss"))
    assert not outputs["skipped"]
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())
