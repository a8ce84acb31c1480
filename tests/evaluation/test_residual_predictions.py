"""Residual maps and attention of tiny models, against the network itself and nnU-Net's own predictor."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy import ndimage
from scipy.special import expit

from nnunet_conres import cli, trainers
from nnunet_conres.architectures.network import ResidualMapsMixin
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.residual_predictions import ResidualPredictor, write_predicted_residuals
from nnunet_conres.registration import TRAINER_FOLDER, VARIABLE

PATCH = (8, 16, 12)
LABELS = {"background": 0, "a": 1, "b": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
ARCHITECTURE = {
    "n_stages": 3,
    "features_per_stage": [4, 6, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_blocks_per_stage": [1, 1, 1],
    "n_conv_per_stage_decoder": [1, 1],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
NETWORKS = {
    "conresnet": "nnunet_conres.architectures.conresnet.ConResNet",
    "conresnet_paper": "nnunet_conres.architectures.conresnet_paper.ConResNetPaper",
    "residual_maps": "nnunet_conres.architectures.residual_map_unet.ResidualMapUNet",
    "vnet": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
}
TRAINER = {
    "conresnet": "nnUNetTrainerConResNet",
    "conresnet_paper": "nnUNetTrainerConResNetPaper",
    "residual_maps": "nnUNetTrainerResidualMaps",
    "vnet": "nnUNetTrainerVNet",
}


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Find the trainers even if the package is not installed, and use one thread, which is faster for tiny networks."""
    monkeypatch.setenv(VARIABLE, TRAINER_FOLDER)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(
    folder: Path,
    kind: str = "conresnet",
    *,
    labels: dict[str, Any] | None = None,
    transpose: tuple[int, int, int] = (0, 1, 2),
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    masked: bool = False,
    folds: int = 1,
    **configuration: Any,
) -> Path:
    """Write a model folder as nnU-Net does, with random weights."""
    labels = labels or LABELS
    background = {"background_class": labels is LABELS}
    arguments = {
        "conresnet": ARCHITECTURE | background,
        "conresnet_paper": {"strides": [[1, 1, 1]] + [[2, 2, 2]] * 3} | background,
        "residual_maps": ARCHITECTURE | background,
        "vnet": {key: value for key, value in ARCHITECTURE.items() if not key.startswith("n_blocks")}
        | {"n_conv_per_stage": [2, 2, 2], "dropout_op": None, "dropout_op_kwargs": None},
    }[kind]
    architecture = {
        "network_class_name": NETWORKS[kind],
        "_kw_requires_import": [name for name in ("conv_op", "norm_op", "nonlin") if name in arguments],
        "arch_kwargs": arguments,
    }
    resampling = {
        f"resampling_fn_{what}{suffix}": value
        for what, is_seg in (("data", False), ("seg", True), ("probabilities", False))
        for suffix, value in (
            ("", "resample_data_or_seg_to_shape"),
            ("_kwargs", {"is_seg": is_seg, "order": 1, "order_z": 0, "force_separate_z": None}),
        )
    }
    plans = {
        "dataset_name": "Dataset900_Tiny",
        "plans_name": "nnUNetPlans",
        "transpose_forward": list(transpose),
        "transpose_backward": [int(axis) for axis in np.argsort(transpose)],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}, "1": {}},
        "configurations": {
            "3d_fullres": resampling
            | {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(PATCH),
                "spacing": list(spacing),
                "normalization_schemes": ["ZScoreNormalization"] * 2,
                "use_mask_for_norm": [masked] * 2,
                "architecture": architecture,
            }
            | configuration
        },
    }
    dataset = {"channel_names": {"0": "T1", "1": "T2"}, "labels": labels, "file_ending": ".nii.gz"}
    if labels is not LABELS:
        dataset["regions_class_order"] = [1, 2]
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    manager = PlansManager(plans)
    configured = manager.get_configuration("3d_fullres")
    heads = manager.get_label_manager(dataset).num_segmentation_heads
    channels = determine_num_input_channels(manager, configured, dataset)
    for fold in range(folds):
        torch.manual_seed(fold)
        network = getattr(trainers, TRAINER[kind]).build_network_architecture(
            manager, configured, channels, heads, enable_deep_supervision=False
        )
        for name, parameter in network.named_parameters():
            if "seg_layers" in name and kind != "conresnet_paper":
                torch.nn.init.normal_(parameter, std=1.0)
        (folder / f"fold_{fold}").mkdir()
        checkpoint = {
            "network_weights": network.state_dict(),
            "trainer_name": TRAINER[kind],
            "init_args": {"configuration": "3d_fullres"},
            "inference_allowed_mirroring_axes": (0, 1, 2),
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def synthetic_images(shape: tuple[int, ...] = PATCH, seed: int = 0) -> np.ndarray:
    """Return two smooth channels without zeros."""
    noise = np.random.default_rng(seed).normal(0, 1, (2, *shape))
    return (10 + ndimage.gaussian_filter(noise, (0, 1, 1, 1)) * 5).astype(np.float32)


def save(
    folder: Path, name: str, array: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0), turned: bool = False
) -> Path:
    """Save an image; the spacing is along x, y, z."""
    folder.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    if turned:
        image.SetOrigin((-11.5, 7.25, 100.0))
        image.SetDirection((0.0, -1.0, 0.0, 0.8, 0.0, -0.6, 0.6, 0.0, 0.8))
    path = folder / f"{name}.nii.gz"
    SimpleITK.WriteImage(image, str(path))
    return path


def save_case(folder: Path, images: np.ndarray, case_id: str = "case", **geometry: Any) -> list[Path]:
    return [save(folder, f"{case_id}_{channel:04d}", image, **geometry) for channel, image in enumerate(images)]


def read(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def load(folder: Path, folds: tuple[int, ...] = (0,), **arguments: Any) -> ResidualPredictor:
    return ResidualPredictor(folder, folds, **{"device": "cpu", "progress": False} | arguments)


def nnunets(folder: Path) -> nnUNetPredictor:
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    return predictor


def normalised(images: np.ndarray) -> torch.Tensor:
    """Normalise images without zeros as for the network."""
    mean, deviation = (getattr(images, what)(axis=(1, 2, 3), keepdims=True) for what in ("mean", "std"))
    return torch.from_numpy((images - mean) / deviation)[None]


class TestResidualPredictor:
    @pytest.mark.parametrize("kind", ["conresnet", "conresnet_paper"])
    @pytest.mark.parametrize("level", [0, 1])
    def test_single_patch_is_a_direct_forward_pass(self, tmp_path: Path, kind: str, level: int) -> None:
        model = make_model(tmp_path / "model", kind)
        shape = (8, 16, 16) if kind == "conresnet_paper" else PATCH
        if kind == "conresnet_paper":
            plans = json.loads((model / "plans.json").read_text())
            plans["configurations"]["3d_fullres"]["patch_size"] = list(shape)
            (model / "plans.json").write_text(json.dumps(plans))
        images = synthetic_images(shape)
        found = load(model, level=level).predict(save_case(tmp_path / "in", images))

        network = nnunets(model).network
        assert isinstance(network, ResidualMapsMixin)
        network.eval().residual_outputs = True
        stage = network.decoder.stages[-1 - level]
        seen = {}
        stage.segmentation.register_forward_hook(lambda module, args, out: seen.update(features=out.clone()))
        stage.register_forward_hook(lambda module, args, out: seen.update(attended=out[0].clone()))
        with torch.no_grad():
            segmentation, *residuals = network(normalised(images))
        np.testing.assert_array_equal(found.segmentation, segmentation[0].argmax(0).numpy())

        # features are multiplied by the attention of their own channel
        attention = (seen["attended"] / seen["features"].where(seen["features"] != 0, torch.nan))[0]
        attention = attention.nanmean(0).numpy().astype(np.float64)
        assert np.isfinite(attention).all()
        maps = [residuals[level][0, channel].numpy() for channel in (0, 1)]
        factors = np.array(shape) / attention.shape
        assert (factors > 1).any() == (level > 0)
        if kind == "conresnet":
            # linear interpolation, aligned at the centres of coarse voxels
            maps, (attention,) = (
                [ndimage.zoom(one, factors, order=1, mode="nearest", grid_mode=True) for one in these]
                for these in (maps, [attention])
            )
        else:
            # aligned at the centres of the outermost voxels; the maps are at full size already
            attention = ndimage.zoom(attention, factors, order=1)
        np.testing.assert_allclose(found.attention, attention, atol=1e-4)
        for name, expected in zip(("a", "b"), maps, strict=True):
            np.testing.assert_allclose(found.residuals[name], expit(expected), atol=1e-4)
            assert found.residuals[name].std() > 0.01

    @pytest.mark.parametrize("level", [0, 1])
    def test_a_network_without_attention(self, tmp_path: Path, level: int) -> None:
        model = make_model(tmp_path / "model", "residual_maps")
        images = synthetic_images()
        found = load(model, level=level).predict(save_case(tmp_path / "in", images))
        network = nnunets(model).network
        network.eval().residual_outputs = True
        with torch.no_grad():
            _, *residuals = network(normalised(images))
        factors = np.array(PATCH) / residuals[level].shape[2:]
        for channel, name in enumerate(("a", "b")):
            expected = ndimage.zoom(
                residuals[level][0, channel].numpy(), factors, order=1, mode="nearest", grid_mode=True
            )
            np.testing.assert_allclose(found.residuals[name], expit(expected), atol=1e-4)

    def test_tiles_are_weighted_as_nnunets(self, tmp_path: Path) -> None:
        model = make_model(tmp_path / "model", labels=REGIONS)
        images = synthetic_images((13, 21, 17))
        found = load(model).predict(save_case(tmp_path / "in", images))

        network = nnunets(model).network
        assert isinstance(network, ResidualMapsMixin)
        network.eval().residual_outputs = True
        weights = np.zeros(PATCH)
        weights[tuple(size // 2 for size in PATCH)] = 1
        weights = ndimage.gaussian_filter(weights, [size / 8 for size in PATCH], mode="constant", cval=0)
        total, weight = np.zeros((2, 13, 21, 17)), np.zeros((13, 21, 17))
        for starts in itertools.product((0, 2, 5), (0, 5), (0, 5)):  # half a patch apart at most
            tile = tuple(slice(start, start + size) for start, size in zip(starts, PATCH, strict=True))
            with torch.no_grad():
                logits = network(normalised(images)[(..., *tile)])[1][0].numpy()
            total[(slice(None), *tile)] += logits * weights
            weight[tile] += weights
        for number, name in enumerate(("whole", "core")):
            np.testing.assert_allclose(found.residuals[name], expit(total[number] / weight), atol=1e-4)

    @pytest.mark.parametrize("labels", [LABELS, REGIONS])
    def test_segmentation_is_nnunets_without_mirroring(self, tmp_path: Path, labels: dict[str, Any]) -> None:
        model = make_model(tmp_path / "model", labels=labels, spacing=(1.5, 1.0, 1.0))
        paths = save_case(tmp_path / "in", np.pad(synthetic_images((13, 21, 17)), ((0, 0), (2, 3), (1, 0), (0, 4))))
        found = load(model).predict(paths).segmentation
        expected = nnunets(model).predict_from_files_sequential([[str(path) for path in paths]], None)[0]
        # nnU-Net sums in half precision
        assert (found == expected).mean() > 0.98
        assert len(np.unique(found)) > 1

    def test_folds_are_averaged(self, tmp_path: Path) -> None:
        model = make_model(tmp_path / "model", folds=2)
        paths = save_case(tmp_path / "in", synthetic_images())
        first, second, both = (load(model, folds).predict(paths) for folds in ((0,), (1,), (0, 1)))
        np.testing.assert_allclose(both.attention, (first.attention + second.attention) / 2, atol=1e-4)
        logit = [np.log(one.residuals["a"] / (1 - one.residuals["a"])) for one in (first, second, both)]
        np.testing.assert_allclose(logit[2], (logit[0] + logit[1]) / 2, atol=1e-2)

    def test_axes_are_exchanged_and_put_back(self, tmp_path: Path) -> None:
        images = np.pad(synthetic_images((9, 17, 14)), ((0, 0), (2, 1), (0, 3), (1, 0)))
        straight = load(make_model(tmp_path / "straight", masked=True))
        exchanged = load(make_model(tmp_path / "exchanged", transpose=(2, 0, 1), masked=True))
        assert (straight.slice_axis, exchanged.slice_axis) == (0, 2)
        first = straight.predict(save_case(tmp_path / "in", images))
        # nnU-Net transposes the array's axes 2, 0, 1 to the network's axes 0, 1, 2
        second = exchanged.predict(save_case(tmp_path / "turned", images.transpose(0, 2, 3, 1)))
        for name in ("a", "b"):
            np.testing.assert_allclose(second.residuals[name], first.residuals[name].transpose(1, 2, 0), atol=1e-5)
        np.testing.assert_allclose(second.attention, first.attention.transpose(1, 2, 0), atol=1e-5)

    def test_what_is_cropped_away_has_no_residual(self, tmp_path: Path) -> None:
        images = synthetic_images()
        predictor = load(make_model(tmp_path / "model"))
        whole = predictor.predict(save_case(tmp_path / "in", images))
        padded = predictor.predict(
            save_case(tmp_path / "padded", np.pad(images, ((0, 0), (2, 1), (0, 3), (1, 0))), "padded")
        )
        inside = (slice(2, 10), slice(0, 16), slice(1, 13))
        outside = np.ones(padded.attention.shape, bool)
        outside[inside] = False
        np.testing.assert_allclose(padded.attention[inside], whole.attention, atol=1e-5)
        np.testing.assert_allclose(padded.residuals["b"][inside], whole.residuals["b"], atol=1e-5)
        assert set(padded.attention[outside]) == {1.0}
        assert set(padded.residuals["b"][outside]) == {0.0}

    def test_behaviour_of_the_network_is_not_changed_for_others(self, tmp_path: Path) -> None:
        predictor = load(make_model(tmp_path / "model"))
        predictor.predict(save_case(tmp_path / "in", synthetic_images()))
        assert not any(stage._forward_hooks for stage in predictor._network.decoder.stages)


class TestErrors:
    def test_a_checkpoint_that_runs_code(self, tmp_path: Path) -> None:
        class Touch:
            def __reduce__(self) -> Any:
                return os.mknod, (str(tmp_path / "made"),)

        model = make_model(tmp_path / "model", folds=2)
        path = model / "fold_1" / "checkpoint_final.pth"
        torch.save(torch.load(path, weights_only=False) | {"more": Touch()}, path)
        with pytest.raises(InputError, match=r"fold_1/checkpoint_final.pth contains posix.mknod"):
            load(model, (0, 1))
        assert not (tmp_path / "made").exists()

    def test_plans_that_run_code(self, tmp_path: Path) -> None:
        model = make_model(tmp_path / "model")
        plans = json.loads((model / "plans.json").read_text())
        arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        arguments |= {"nonlin": "os.system", "nonlin_kwargs": {"command": f"touch {tmp_path / 'made'}"}}
        (model / "plans.json").write_text(json.dumps(plans))
        with pytest.raises(InputError, match=r"names os.system as part of a network"):
            load(model)
        assert not (tmp_path / "made").exists()

    def test_network_without_residual_maps(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="nnUNetTrainerVNet, whose VNet predicts no residual maps"):
            load(make_model(tmp_path / "model", "vnet"))

    @pytest.mark.parametrize("level", [-1, 2])
    def test_level(self, tmp_path: Path, level: int) -> None:
        with pytest.raises(InputError, match=r"has the levels 0 .full resolution. to 1"):
            load(make_model(tmp_path / "model"), level=level)

    def test_cascade(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="second stage of a cascade, which is not supported; take 3d_lowres"):
            load(make_model(tmp_path / "model", previous_stage="3d_lowres"))

    def test_files_of_the_model(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"has no plans.json and no dataset.json"):
            load(tmp_path)
        model = make_model(tmp_path / "model")
        with pytest.raises(InputError, match=r"fold_3/checkpoint_final.pth does not exist, and there is no other"):
            load(model, (3,))
        with pytest.raises(InputError, match=r"only checkpoint_final.pth; choose with -chk"):
            load(model, checkpoint="checkpoint_best.pth")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
    def test_device_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="add: -device cpu"):
            load(make_model(tmp_path / "model"), device="cuda")


class TestWrite:
    def test_files_and_their_geometry(self, tmp_path: Path) -> None:
        # thick slices along the array's last axis, which is the network's first
        model = make_model(tmp_path / "model", labels=REGIONS, transpose=(2, 0, 1), spacing=(2.5, 1.0, 1.0))
        images = np.pad(synthetic_images((20, 15, 9)), ((0, 0), (3, 0), (0, 2), (0, 0)))
        geometry: dict[str, Any] = {"spacing": (3.0, 0.8, 1.2), "turned": True}
        source = save_case(tmp_path / "in", images, **geometry)[0]
        labels = np.zeros(images.shape[1:], np.uint8)
        labels[5:12, 4:9, 2:6] = 1
        labels[6:10, 5:8, 3:5] = 2
        save(tmp_path / "labels", "case", labels, **geometry)
        (done,) = write_predicted_residuals(
            tmp_path / "in", tmp_path / "out", load(model), reference=tmp_path / "labels", progress=False
        )
        before = SimpleITK.ReadImage(str(source))
        maps = [*done.predicted.values(), *done.of_prediction.values(), *done.of_reference.values()]
        assert len(maps) == 6
        for path in (*maps, done.segmentation, done.attention):
            after = SimpleITK.ReadImage(str(path))
            assert after.GetSize() == before.GetSize()
            for quantity in ("GetSpacing", "GetOrigin", "GetDirection"):
                np.testing.assert_allclose(getattr(after, quantity)(), getattr(before, quantity)(), atol=1e-5)

        for region, values in (("whole", (1, 2)), ("core", (2,))):
            for truth, maps_of in ((labels, done.of_reference), (read(done.segmentation), done.of_prediction)):
                mask = np.isin(truth, values)
                expected = np.zeros(mask.shape, np.uint8)
                expected[:, :, 1:] = mask[:, :, 1:] != mask[:, :, :-1]
                np.testing.assert_array_equal(read(maps_of[region]), expected)
            predicted = read(done.predicted[region])
            assert predicted.dtype == np.float32
            assert 0 <= predicted.min() < predicted.max() <= 1
        attention = read(done.attention)
        assert 1 <= attention.min() < attention.max() <= 2
        assert done.figure.read_bytes()[:4] == b"\x89PNG"
        record = json.loads((tmp_path / "out" / "residuals.json").read_text())
        assert record["axis"] == 2
        assert record["cases"][0]["predicted"]["core"] == "case_predicted_residual_core.nii.gz"

    def test_errors_are_listed_together_and_nothing_is_written(self, tmp_path: Path) -> None:
        predictor = load(make_model(tmp_path / "model"))
        images = synthetic_images()
        save_case(tmp_path / "in", images, "good")
        images[1, 2, 3, 4] = np.inf
        save_case(tmp_path / "in", images, "bad")
        save(tmp_path / "in", "half_0000", images[0])
        save(tmp_path / "ref", "good", np.full(PATCH, 7, np.uint8))
        with pytest.raises(InputError) as error:
            write_predicted_residuals(
                tmp_path / "in", tmp_path / "out", predictor, reference=tmp_path / "ref", progress=False
            )
        text = str(error.value)
        assert "half_0001.nii.gz is missing; the model was trained with 2 channels" in text
        assert "bad_0001.nii.gz has 1 voxels that are NaN or infinite" in text
        assert "bad.nii.gz does not exist; expected the reference labels" in text
        assert "good.nii.gz has labels that the model does not know: 7" in text
        assert not (tmp_path / "out").exists()

    def test_reference_of_another_shape(self, tmp_path: Path) -> None:
        predictor = load(make_model(tmp_path / "model"))
        source = save_case(tmp_path / "in", synthetic_images())[1]
        reference = save(tmp_path / "ref", "some", np.zeros((8, 16, 11), np.uint8))
        with pytest.raises(InputError, match=r"has shape \(8, 16, 11\); expected \(8, 16, 12\)"):
            write_predicted_residuals(source, tmp_path / "out", predictor, reference=reference, progress=False)

    def test_folder_of_brats(self, tmp_path: Path) -> None:
        predictor = load(make_model(tmp_path / "model"))
        save(tmp_path / "in", "B_t1", synthetic_images()[0])
        with pytest.raises(InputError, match="BraTS's own names: nnunet-conres brats-convert"):
            write_predicted_residuals(tmp_path / "in", tmp_path / "out", predictor, progress=False)


class TestCommand:
    def test_one_case(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = make_model(tmp_path / "model")
        source = save_case(tmp_path / "in", synthetic_images())[0]
        command = ["residuals", "--model", str(model), "-i", str(source), "-o", str(tmp_path / "out")]
        assert cli.main([*command, "-device", "cpu", "--level", "1", "-f", "0"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "axis 0, from the model"
        assert [Path(line).name for line in lines[1:]] == [
            "case_predicted_residual_a.nii.gz",
            "case_predicted_residual_b.nii.gz",
            "case_segmentation_residual_a.nii.gz",
            "case_segmentation_residual_b.nii.gz",
            "case_segmentation.nii.gz",
            "case_attention.nii.gz",
            "case_residual.png",
        ]
        assert all(Path(line).is_file() for line in lines[1:])

    def test_a_network_without_attention(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = save_case(tmp_path / "in", synthetic_images())[0]
        model = make_model(tmp_path / "model", "residual_maps")
        command = ["residuals", "--model", str(model), "-i", str(source), "-o", str(tmp_path / "out")]
        assert cli.main([*command, "-device", "cpu"]) == 0
        assert "attention" not in capsys.readouterr().out
        assert not list((tmp_path / "out").glob("*attention*"))
        assert json.loads((tmp_path / "out" / "residuals.json").read_text())["cases"][0]["attention"] is None
