"""Measure the effect of overlapping tiles: error against distance from the borders between tiles.

A trained model predicts the same images without overlap, and with nnU-Net's half-overlapping tiles with and without
Gaussian weights. All predictions use nnU-Net's own predictor, in preprocessed space, without mirroring. Writes
overlap_tile.png and overlap_tile.json. docs/explanation/overlap_tile.md explains the figure.

    python scripts/overlap_tile.py -m MODEL -i IMAGES -ref LABELS -o OUT -f 0 -splits SPLITS_JSON -tile 24 24 24
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from scipy.ndimage import distance_transform_edt
from tiles import (
    bootstrap_rate,
    count_by_distance,
    internal_border_distance,
    take_range,
    tile_figure,
    whole_tiles,
)
from tqdm import tqdm

from nnunet_conres.folders import list_files

BASELINE = "half overlap, Gaussian"


@dataclass
class Mode:
    """A prediction mode and its errors.

    Attributes:
        tile: Size of a tile in voxels.
        step: Step from tile to tile, as a fraction of a tile.
        gaussian: Whether tiles have Gaussian weights.
        tiles: Number of tiles per case.
        wrong: Number of wrong voxels at every distance, per case.
    """

    tile: tuple[int, ...]
    step: float
    gaussian: bool
    tiles: list[int] = field(default_factory=list)
    wrong: list[np.ndarray] = field(default_factory=list)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", type=Path, required=True, metavar="FOLDER", help="trained model, with its fold_X folders")
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="images, named CASE_0000 and so on")
    parser.add_argument("-ref", type=Path, required=True, metavar="FOLDER", help="label maps of the cases")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="gets overlap_tile.png and .json")
    parser.add_argument("-f", default="0", metavar="FOLD", help="fold whose network predicts, or all (default: 0)")
    parser.add_argument(
        "-chk", default="checkpoint_final.pth", metavar="NAME", help="checkpoint (default: %(default)s)"
    )
    parser.add_argument("-splits", type=Path, metavar="FILE", help="splits_final.json: only cases held out of FOLD")
    parser.add_argument("-tile", type=int, nargs=3, metavar="SIZE", help="tile, in the axis order of the plans' patch")
    parser.add_argument(
        "-band",
        type=float,
        default=3,
        metavar="VOXELS",
        help="count voxels within this distance of the object (default: 3)",
    )
    parser.add_argument("-n", type=int, metavar="CASES", help="the first CASES cases only")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="(default: cuda)")
    return parser.parse_args()


def find_cases(arguments: argparse.Namespace) -> dict[str, tuple[list[str], str]]:
    """Return image files and label map of the cases to predict, by case.

    Raises:
        ValueError: Files are missing; the message lists all of them.
    """
    model = arguments.m
    needed = [model / name for name in ("plans.json", "dataset.json", f"fold_{arguments.f}/{arguments.chk}")]
    needed += [path for path in (arguments.i, arguments.ref, arguments.splits) if path is not None]
    errors = [f"{path} does not exist." for path in needed if not path.exists()]
    if errors:
        raise ValueError("\n".join(errors))
    dataset = json.loads((model / "dataset.json").read_text(encoding="utf-8"))
    ending, channels = dataset["file_ending"], len(dataset["channel_names"])
    if arguments.splits is None:
        names = [path.name[: -len(ending)] for path in list_files(arguments.ref, ending)]
    else:
        splits = json.loads(arguments.splits.read_text(encoding="utf-8"))
        if not (arguments.f.isdigit() and int(arguments.f) < len(splits)):
            raise ValueError(f"{arguments.splits} has no fold {arguments.f}; it has {len(splits)} folds.")
        names = sorted(splits[int(arguments.f)]["val"])
    cases = {}
    for name in names[: arguments.n]:
        images = [arguments.i / f"{name}_{channel:04d}{ending}" for channel in range(channels)]
        label = arguments.ref / f"{name}{ending}"
        errors += [f"{path} does not exist." for path in (*images, label) if not path.is_file()]
        cases[name] = ([str(path) for path in images], str(label))
    if not cases:
        errors.append(f"{arguments.ref} has no file ending in {ending}.")
    if errors:
        raise ValueError("\n".join(errors))
    return cases


def set_tiles(predictor: nnUNetPredictor, mode: Mode) -> None:
    predictor.configuration_manager.configuration["patch_size"] = list(mode.tile)
    predictor.tile_step_size, predictor.use_gaussian = mode.step, mode.gaussian


def measure(
    predictor: nnUNetPredictor,
    cases: dict[str, tuple[list[str], str]],
    modes: dict[str, Mode],
    tile: tuple[int, ...],
    band: float,
) -> dict[str, Any]:
    """Predict all cases in all modes, and add the errors to the modes.

    Args:
        predictor: Predictor with a trained model.
        cases: Image files and label map, by case.
        modes: Prediction modes, by name.
        tile: Size of the tiles; distances are measured from their borders.
        band: Voxels at most this far from the object are counted.

    Returns:
        Voxels per case and distance, image sizes, and the share of the object outside the predicted range.
    """
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    ignored = predictor.label_manager.ignore_label
    preprocessor = configuration.preprocessor_class(verbose=False)
    voxels, shapes, lost, present = [], [], 0, 0
    for images, label in tqdm(cases.values(), desc="Predicting", unit="case"):
        image, reference, _ = preprocessor.run_case(images, label, plans, configuration, predictor.dataset_json)
        # nnU-Net labels voxels outside its nonzero mask -1.
        reference = np.maximum(reference[0], 0)
        known = np.ones(reference.shape, bool) if ignored is None else reference != ignored
        foreground = (reference > 0) & known
        near = known & (distance_transform_edt(~foreground) <= band) if foreground.any() else np.zeros_like(known)
        ranges = whole_tiles(reference.shape, tile)
        shapes.append(reference.shape)
        present += int(foreground.sum())
        lost += int(foreground.sum() - take_range(foreground, ranges).sum())
        image, reference, near = (take_range(array, ranges) for array in (image, reference, near))
        starts = compute_steps_for_sliding_window(reference.shape, tile, 1.0)
        distance = internal_border_distance(reference.shape, tile, starts)
        data = torch.from_numpy(image)
        total = None
        for mode in modes.values():
            set_tiles(predictor, mode)
            logits = predictor.predict_logits_from_preprocessed_data(data)
            predicted = np.asarray(predictor.label_manager.convert_logits_to_segmentation(logits.float()))
            wrong, total = count_by_distance(predicted != reference, distance, near, max(tile))
            mode.wrong.append(wrong)
            padded = [max(size, length) for size, length in zip(reference.shape, mode.tile, strict=True)]
            mode.tiles.append(len(predictor._internal_get_sliding_window_slicers(tuple(padded))))
        voxels.append(total)
    return {"voxels": np.array(voxels), "shapes": shapes, "lost": lost / max(present, 1)}


def as_table(result: dict[str, Any]) -> str:
    """Format errors in per cent, and their differences from the baseline in percentage points, as a Markdown table."""
    shown = [distance for distance in (0, 1, 2, 4) if distance < len(result["voxels"]) and result["voxels"][distance]]
    heads = ["", "tiles per case", "error", "less baseline", *(f"at {d}" for d in shown), "less baseline at 0"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]

    def difference(curve: dict[str, list[float]] | None, at: int = 0) -> str:
        if curve is None:
            return ""
        return f"{100 * curve['rate'][at]:+.2f} ({100 * curve['low'][at]:+.2f} to {100 * curve['high'][at]:+.2f})"

    for name, mode in result["modes"].items():
        cells = [name, f"{mode['tiles_per_case']:.1f}", f"{100 * mode['error_overall']['rate'][0]:.2f}"]
        cells.append(difference(mode["excess_overall"]))
        cells += [f"{100 * mode['error']['rate'][distance]:.2f}" for distance in shown]
        cells.append(difference(mode["excess"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    try:
        cases = find_cases(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device(arguments.device), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(arguments.m), (arguments.f,), arguments.chk)
    patch = tuple(int(size) for size in predictor.configuration_manager.patch_size)
    if len(patch) != 3:
        sys.exit(f"error: {arguments.m} is a 2D model; expected one with three-dimensional tiles.")
    if predictor.configuration_manager.previous_stage_name is not None:
        sys.exit(f"error: {arguments.m} is the second stage of a cascade; expected a model that needs images alone.")
    tile = tuple(arguments.tile) if arguments.tile else patch
    modes = {
        "no overlap": Mode(tile, 1.0, False),
        "half overlap, no weights": Mode(tile, 0.5, False),
        BASELINE: Mode(tile, 0.5, True),
    }
    if tile != patch:
        modes[f"half overlap, Gaussian, tile {' x '.join(map(str, patch))}"] = Mode(patch, 0.5, True)
    found = measure(predictor, cases, modes, tile, arguments.band)
    voxels = found["voxels"]
    if not voxels.any():
        sys.exit(f"error: no border between tiles lies in any image near the object; choose -tile below {tile}.")

    counts = {name: np.array(mode.wrong) for name, mode in modes.items()}
    others = [name for name in modes if name != BASELINE]
    errors = {name: bootstrap_rate(counts[name], voxels) for name in modes}
    excess = {name: bootstrap_rate(counts[name] - counts[BASELINE], voxels) for name in others}
    everywhere = voxels.sum(1, keepdims=True)
    overall = {name: bootstrap_rate(counts[name].sum(1, keepdims=True), everywhere) for name in modes}
    overall_excess = {
        name: bootstrap_rate((counts[name] - counts[BASELINE]).sum(1, keepdims=True), everywhere) for name in others
    }

    axis = int(np.argmax(tile))
    centre = tuple(slice(None) if i == axis else size // 2 for i, size in enumerate(tile))
    weights = compute_gaussian(tile, value_scaling_factor=10, device=torch.device("cpu"))[centre].double().numpy() / 10
    size = " x ".join(map(str, tile))
    title = f"{predictor.trainer_name}, tile {size}, {len(cases)} cases, intervals of 95 % over cases"
    # A mode with another tile size has other borders, and its curve would set the scale.
    compared = {name: curve for name, curve in excess.items() if modes[name].tile == tile}
    figure = tile_figure(errors, compared, voxels.sum(0), weights=weights, baseline=BASELINE, title=title)

    result = {
        "model": arguments.m.resolve().name,
        "fold": arguments.f,
        "checkpoint": arguments.chk,
        "cases": list(cases),
        "image_shapes": [list(map(int, shape)) for shape in found["shapes"]],
        "tile": list(tile),
        "patch": list(patch),
        "band": arguments.band,
        "foreground_outside_tiles": found["lost"],
        "voxels": voxels.sum(0).tolist(),
        "weight_at_face": float(weights[0]),
        "modes": {
            name: {
                "tile": list(mode.tile),
                "step": mode.step,
                "gaussian": mode.gaussian,
                "tiles_per_case": float(np.mean(mode.tiles)),
                "error": errors[name].as_json(),
                "error_overall": overall[name].as_json(),
                "excess": excess[name].as_json() if name in excess else None,
                "excess_overall": overall_excess[name].as_json() if name in excess else None,
            }
            for name, mode in modes.items()
        },
    }
    arguments.o.mkdir(parents=True, exist_ok=True)
    picture, numbers = arguments.o / ".overlap_tile.partial.png", arguments.o / ".overlap_tile.partial.json"
    figure.savefig(picture, dpi=110)
    numbers.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    picture.replace(arguments.o / "overlap_tile.png")
    numbers.replace(arguments.o / "overlap_tile.json")
    print(as_table(result))
    print(arguments.o / "overlap_tile.png", arguments.o / "overlap_tile.json", sep="\n")


if __name__ == "__main__":
    main()
