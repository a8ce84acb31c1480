"""Residual maps and attention that a trained network predicts besides the segmentation, in the case's geometry."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_conres.architectures.blocks import crop, resize
from nnunet_conres.architectures.network import ResidualMapsMixin
from nnunet_conres.case_ids import unsafe_ids
from nnunet_conres.errors import InputError
from nnunet_conres.evaluation.figures import save_figure
from nnunet_conres.evaluation.probabilities import Channels
from nnunet_conres.evaluation.residual_figures import Slicing, predicted_residual_figure
from nnunet_conres.evaluation.residual_maps import (
    ENDINGS,
    RECORD,
    FileLook,
    file_parts,
    look_at_file,
    output_errors,
    residual_of_labels,
    slice_errors,
)
from nnunet_conres.files import write_json
from nnunet_conres.folders import list_files, writing
from nnunet_conres.images.volumes import read_labels, read_volume, reversed_axes, write_map
from nnunet_conres.predictor import DEFAULT_CHECKPOINT, load_predictor
from nnunet_conres.text import first_few

# The neutral value, for the part of the image that is cropped away before prediction.
_NO_ATTENTION: Final = 1.0


@dataclass(frozen=True)
class Prediction:
    """A model's prediction of a case: arrays with axes z, y, x and the shape of the case's image.

    Attributes:
        segmentation: Label map.
        residuals: Predicted residual of every label or region by name, float32, 0 to 1.
        attention: The factor that the segmentation features were multiplied with, mean over the channels, float32, 1
            to 2. None if the network has no attention.
    """

    segmentation: NDArray[Any]
    residuals: Mapping[str, NDArray[np.float32]]
    attention: NDArray[np.float32] | None


@dataclass(frozen=True)
class CaseResiduals:
    """The files written for one case.

    Attributes:
        case_id: The case.
        segmentation: The predicted label map.
        attention: The attention map; None if the network has no attention.
        predicted: Predicted residual of every label or region, by name.
        of_prediction: Residual of the predicted labels, by name.
        of_reference: Residual of the reference labels, by name; empty without a reference.
        figure: The figure.
    """

    case_id: str
    segmentation: Path
    attention: Path | None
    predicted: Mapping[str, Path]
    of_prediction: Mapping[str, Path]
    of_reference: Mapping[str, Path]
    figure: Path

    def as_json(self) -> dict[str, Any]:
        """Return the entry of `RECORD`; paths are file names in the output folder."""

        def names(paths: Mapping[str, Path]) -> dict[str, str]:
            return {name: path.name for name, path in paths.items()}

        return {
            "case": self.case_id,
            "segmentation": self.segmentation.name,
            "attention": None if self.attention is None else self.attention.name,
            "predicted": names(self.predicted),
            "of_prediction": names(self.of_prediction),
            "of_reference": names(self.of_reference),
            "figure": self.figure.name,
        }


class ResidualNetwork(nn.Module):
    """A network that returns segmentation, residual maps and attention of one level as a single tensor.

    Args:
        network: A network with residual maps. Its residual outputs are switched on, its deep supervision off.
        level: Decoder level, 0 for full resolution, 1 for the next coarser one.

    Attributes:
        has_attention: Whether the level multiplies its features with an attention.
    """

    def __init__(self, network: Any, level: int) -> None:
        super().__init__()
        self.network = network
        self.level = level
        network.decoder.deep_supervision = False
        network.residual_outputs = True
        self.has_attention = hasattr(network.decoder.stages[-(level + 1)], "attention")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, X, Y, Z) to (B, N + M + 1, X, Y, Z), or N + M channels without attention.

        The channels are the N logits of the segmentation, the M logits of the residual maps, and the attention.
        """
        stage = self.network.decoder.stages[-(self.level + 1)]
        streams: list[Tensor] = []
        with contextlib.ExitStack() as hooks:
            if self.has_attention:
                hook = stage.register_forward_hook(lambda module, inputs, outputs: streams.append(outputs[1]))
                hooks.callback(hook.remove)
            segmentation, *residuals = self.network(x)
        maps = [segmentation, residuals[self.level]]
        maps += [stage.attention(stream).mean(1, keepdim=True) for stream in streams]
        return torch.cat([self._full_size(one, x.shape[2:]).to(segmentation.dtype) for one in maps], 1)

    def _full_size(self, x: Tensor, size: torch.Size) -> Tensor:
        if x.shape[2:] == size:
            return x
        if getattr(self.network.decoder, "full_size_residuals", False):
            return resize(x, size)  # as the network itself does
        # A coarse voxel is centred on the fine voxels it covers, even where the image ends before the last of them.
        factors = np.prod(self.network.strides[: self.level + 1], axis=0)
        return crop(F.interpolate(x, scale_factor=tuple(map(float, factors)), mode="trilinear"), size)


class ResidualPredictor:
    """A trained network with residual maps, loaded and run by nnU-Net's predictor.

    Uses a sliding window with nnU-Net's weights, but no mirroring. The residual is the difference to the previous
    slice, not to the next one, so the residuals of mirrored images do not match.

    Args:
        model_folder: nnU-Net's folder of a trained model, with plans.json, dataset.json and the folders of its folds.
        folds: Folds whose predictions are averaged.
        checkpoint: Name of the checkpoint file in a fold's folder.
        level: Decoder level of the residual maps and the attention, 0 for full resolution.
        device: cuda, cpu or mps.
        step_size: Step size of the sliding window, as a share of the patch size.
        progress: Whether to show a progress bar over the tiles of a case.

    Attributes:
        regions: Label values of every label or region, by name, in the order of the network's channels.
        slice_axis: Axis of the slices in the arrays that the model's reader returns.
        reader: The model's reader.
        has_attention: Whether the network has an attention.

    Raises:
        InputError: There is no such model, or it is not supported, for example because it predicts no residual maps.
    """

    def __init__(
        self,
        model_folder: str | Path,
        folds: Sequence[int | str] = (0,),
        *,
        checkpoint: str = DEFAULT_CHECKPOINT,
        level: int = 0,
        device: str = "cuda",
        step_size: float = 0.5,
        progress: bool = True,
    ) -> None:
        folder = Path(model_folder)
        predictor: Any = load_predictor(
            folder, folds, checkpoint, device=device, mirroring=False, step_size=step_size, progress=progress
        )
        network = getattr(predictor.network, "_orig_mod", predictor.network)
        plans = predictor.plans_manager
        errors = list(_network_errors(folder, network, predictor, level))
        self.reader: type = plans.image_reader_writer_class
        self.file_ending = str(predictor.dataset_json["file_ending"])
        if self.file_ending not in ENDINGS:
            errors.append(f"{folder} reads {self.file_ending} files; expected a format with a geometry, like .nii.gz.")
        if errors:
            raise InputError(errors)
        self._predictor = predictor
        self._network = network
        self._wrapped = ResidualNetwork(network, level)
        self.has_attention = self._wrapped.has_attention
        self._labels = predictor.label_manager
        self._progress = progress
        self.number_of_channels = len(predictor.dataset_json["channel_names"])
        names = predictor.dataset_json["channel_names"]
        self.channels = tuple(names[number] for number in sorted(names, key=int))
        self.slice_axis = int(plans.transpose_forward[getattr(network, "slice_axis", 0)])
        channels = Channels.of_dataset(predictor.dataset_json)
        self.regions = {name: channels.regions[name] for name in sorted(channels.place, key=channels.place.__getitem__)}
        self.ignore_label: int | None = self._labels.ignore_label

    def predict(self, images: Sequence[str | Path]) -> Prediction:
        """Predict a case.

        Args:
            images: One file per channel, in order.

        Returns:
            Maps with the shape of the image. In the part that was cropped away before prediction, the residual is 0
            and the attention 1.
        """
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

        predictor, plans = self._predictor, self._predictor.plans_manager
        configuration = predictor.configuration_manager
        preprocessor = configuration.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case(
            [str(path) for path in images], None, plans, configuration, predictor.dataset_json
        )
        logits = self._sliding_window(torch.from_numpy(data))
        heads = self._labels.num_segmentation_heads
        segmentation = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits[:heads], plans, configuration, self._labels, properties
        )

        spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
        shape = properties["shape_after_cropping_and_before_resampling"]
        maps = configuration.resampling_fn_probabilities(logits[heads:], shape, configuration.spacing, spacing)
        maps = np.asarray(maps, dtype=np.float32)
        likely = torch.sigmoid(torch.from_numpy(np.ascontiguousarray(maps[: len(self.regions)]))).numpy()
        residuals = {name: self._put_back(one, properties, 0.0) for name, one in zip(self.regions, likely, strict=True)}
        attention = None
        if self.has_attention:
            # The clip removes rounding errors of the interpolation only.
            attention = self._put_back(np.clip(maps[-1], 1, 2), properties, _NO_ATTENTION)
        return Prediction(segmentation, residuals, attention)

    def _sliding_window(self, data: Tensor) -> Tensor:
        """Return segmentation logits, residual logits and attention at the size of the preprocessed image.

        The tiles and weights are nnU-Net's, but the sum is in single precision. In nnU-Net's half precision the small
        weights at a tile's corners are lost. This rarely changes the predicted label, but it is visible in the maps.
        """
        from acvl_utils.cropping_and_padding.padding import pad_nd_image
        from nnunetv2.inference.sliding_window_prediction import compute_gaussian
        from tqdm import tqdm

        predictor, device = self._predictor, self._predictor.device
        patch_size = tuple(predictor.configuration_manager.patch_size)
        padded, inside = pad_nd_image(data, patch_size, "constant", {"value": 0}, True, None)
        tiles = predictor._internal_get_sliding_window_slicers(padded.shape[1:])
        weights = compute_gaussian(
            patch_size, sigma_scale=1 / 8, value_scaling_factor=10, dtype=torch.float32, device=torch.device("cpu")
        )
        total: Tensor | None = None
        weight = torch.zeros(padded.shape[1:])
        wrapped = self._wrapped.to(device).eval()
        steps = len(tiles) * len(predictor.list_of_parameters)
        with torch.inference_mode(), tqdm(total=steps, desc="Tiles", unit="tile", disable=not self._progress) as bar:
            for parameters in predictor.list_of_parameters:
                self._network.load_state_dict(parameters)
                for tile in tiles:
                    # As in nnU-Net, mixed precision is used on a GPU only.
                    with torch.autocast("cuda", enabled=device.type == "cuda"):
                        maps = wrapped(padded[tile][None].to(device))[0]
                    if total is None:
                        total = torch.zeros((len(maps), *padded.shape[1:]))
                    total[tile] += maps.float().cpu() * weights
                    weight[tile[1:]] += weights
                    bar.update()
        assert total is not None  # every image has a tile
        return (total / weight)[(slice(None), *inside[1:])]

    def _put_back(self, values: NDArray[Any], properties: Mapping[str, Any], outside: float) -> NDArray[np.float32]:
        """Undo the cropping and the transposition; voxels outside the crop get the value `outside`."""
        full = np.full(properties["shape_before_cropping"], outside, dtype=np.float32)
        full[tuple(slice(first, last) for first, last in properties["bbox_used_for_cropping"])] = values
        return np.ascontiguousarray(full.transpose(self._predictor.plans_manager.transpose_backward))


def write_predicted_residuals(
    source: str | Path,
    output_folder: str | Path,
    predictor: ResidualPredictor,
    *,
    reference: str | Path | None = None,
    progress: bool = True,
) -> list[CaseResiduals]:
    """Write a model's predicted residual maps and attention, and the residuals of its segmentation and the reference.

    Args:
        source: A folder of images with nnU-Net's names, CASE_0000 and so on, or one of the files of a case.
        output_folder: Receives, all in the geometry of the case, CASE_predicted_residual_REGION.nii.gz (0 to 1),
            CASE_attention.nii.gz (1 to 2) if the network has attention, CASE_segmentation.nii.gz and its residual
            CASE_segmentation_residual_REGION.nii.gz (0 or 1), CASE_reference_residual_REGION.nii.gz if there is a
            reference; and CASE_residual.png and `RECORD`.
        predictor: The model.
        reference: A label file, or a folder of label files named after the cases, if there are any.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The written files, by case.

    Raises:
        InputError: Files are missing or invalid. Lists all errors.
    """
    from tqdm import tqdm

    cases, errors = find_cases(Path(source), predictor.file_ending, predictor.number_of_channels)
    paths = [path for images in cases.values() for path in images]
    output = Path(output_folder)
    errors += output_errors(output, paths)
    references, found = _references(reference, cases, predictor.file_ending)
    errors += found
    looks: dict[Path, FileLook] = {}
    for path in tqdm(paths, desc="Checking", unit="file", disable=not progress):
        looks[path] = look_at_file(path, "image", predictor.reader)
        errors += looks[path].errors or slice_errors(looks[path], predictor.slice_axis)
    for case_id, path in references.items():
        errors += _reference_errors(path, looks[cases[case_id][0]], predictor)
    if errors:
        raise InputError(errors)

    done = []
    with writing(output):
        for case_id, images in tqdm(cases.items(), desc="Predicting", unit="case", disable=not progress):
            done.append(_write_case(case_id, images, references.get(case_id), output, predictor))
        content = {"axis": predictor.slice_axis, "cases": [case.as_json() for case in done]}
        write_json(output / RECORD, content)
    return done


def _write_case(
    case_id: str, images: Sequence[Path], reference: Path | None, output: Path, predictor: ResidualPredictor
) -> CaseResiduals:
    volumes = [read_volume(path, predictor.reader) for path in images]
    properties = volumes[0].properties
    axis, regions = predictor.slice_axis, predictor.regions
    predicted = predictor.predict(images)
    of_prediction = residual_of_labels(predicted.segmentation, regions, axis)
    labels = None if reference is None else read_labels(reference, predictor.reader).voxels
    of_reference = {} if labels is None else residual_of_labels(labels, regions, axis, predictor.ignore_label)

    def write(maps: Mapping[str, NDArray[Any]], what: str, kind: type) -> dict[str, Path]:
        parts = file_parts(maps)
        return {
            name: write_map(output / f"{case_id}_{what}_{parts[name]}.nii.gz", one.astype(kind), properties)
            for name, one in maps.items()
        }

    figure = predicted_residual_figure(
        [volume.voxels[0] for volume in volumes],
        predicted.segmentation,
        predicted.residuals,
        predicted.attention,
        of_prediction,
        reference=labels,
        of_reference=of_reference,
        regions=regions,
        channels=predictor.channels,
        slicing=Slicing(axis, volumes[0].spacing, reversed_axes(properties), case_id),
    )
    return CaseResiduals(
        case_id=case_id,
        segmentation=write_map(output / f"{case_id}_segmentation.nii.gz", predicted.segmentation, properties),
        attention=(
            None
            if predicted.attention is None
            else write_map(output / f"{case_id}_attention.nii.gz", predicted.attention, properties)
        ),
        predicted=write(predicted.residuals, "predicted_residual", np.float32),
        of_prediction=write(of_prediction, "segmentation_residual", np.uint8),
        of_reference=write(of_reference, "reference_residual", np.uint8),
        figure=save_figure(figure, output / f"{case_id}_residual.png"),
    )


# --- files and checks -----------------------------------------------------------------------------------------------


def find_cases(source: Path, ending: str, channels: int) -> tuple[dict[str, tuple[Path, ...]], list[str]]:
    """Find the images of all complete cases; return them by case id, with a message for every error.

    Args:
        source: A folder of images named CASE_0000 and so on, or one such file.
        ending: File ending of the images.
        channels: Number of files per case.
    """
    expected = f"images named as nnU-Net wants them, CASE_0000{ending} and so on"
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}")
    if source.is_file():
        match = pattern.fullmatch(source.name)
        if match is None:
            return {}, [f"{source} is not named as nnU-Net names images; expected {expected}."]
        names = [f"{match[1]}_{channel:04d}{ending}" for channel in range(channels)]
        found = {match[1]: {number: source.with_name(name) for number, name in enumerate(names)}}
    elif source.is_dir():
        found = defaultdict(dict)
        for path in list_files(source, ending):
            match = pattern.fullmatch(path.name)
            if match:
                found[match[1]][int(match[2])] = path
    else:
        return {}, [f"{source} does not exist; expected a folder of {expected}, or one such file."]
    if not found:
        return {}, [f"{source} has no {expected}. BraTS's own names: nnunet-conres brats-convert."]
    errors = unsafe_ids(found, source)
    cases = {}
    for case_id, images in found.items():
        folder = next(iter(images.values())).parent
        wanted = [folder / f"{case_id}_{channel:04d}{ending}" for channel in range(channels)]
        missing = [path for path in wanted if not path.is_file()]
        errors += [f"{path} is missing; the model was trained with {channels} channels." for path in missing]
        if not missing:
            cases[case_id] = tuple(wanted)
    return cases, errors


def _references(
    reference: str | Path | None, cases: Mapping[str, Sequence[Path]], ending: str
) -> tuple[dict[str, Path], list[str]]:
    if reference is None:
        return {}, []
    path = Path(reference)
    if path.is_dir():
        found = {case_id: path / f"{case_id}{ending}" for case_id in cases}
    elif len(cases) == 1:
        found = dict.fromkeys(cases, path)
    else:
        return {}, [f"{path} is not a folder; expected a folder with the labels of all {len(cases)} cases."]
    missing = [one for one in found.values() if not one.is_file()]
    existing = {case_id: one for case_id, one in found.items() if one.is_file()}
    return existing, [f"{one} does not exist; expected the reference labels there." for one in missing]


def _reference_errors(path: Path, image: FileLook, predictor: ResidualPredictor) -> Iterator[str]:
    look = look_at_file(path, "labels", predictor.reader)
    if look.errors or image.errors:
        yield from look.errors
        return
    if look.shape != image.shape:
        yield f"{path} has shape {look.shape}; expected {image.shape} like {image.path}."
    known = {0, predictor.ignore_label, *(value for values in predictor.regions.values() for value in values)}
    strange = [str(value) for value in look.values if value not in known]
    if strange:
        yield f"{path} has labels that the model does not know: {first_few(strange)}."


def _network_errors(folder: Path, network: nn.Module, predictor: Any, level: int) -> Iterator[str]:
    if not isinstance(network, ResidualMapsMixin):
        yield (
            f"{folder} was trained with {predictor.trainer_name}, whose {type(network).__name__} predicts no residual "
            f"maps; expected a ConResNet or a ResidualMapUNet. For the residual of its predictions, omit --model and "
            f"pass them with -i."
        )
        return
    levels = len(network.decoder.stages)  # type: ignore[arg-type]
    if not 0 <= level < levels:
        yield f"The level is {level}; {folder} has the levels 0 (full resolution) to {levels - 1}."
    previous = predictor.configuration_manager.previous_stage_name
    if previous is not None:
        yield f"{folder} is the second stage of a cascade, which is not supported; take {previous}."
