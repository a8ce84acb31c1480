"""Draws the pictures in docs/images.

python scripts/figures.py                            all others, from synthetic cases
python scripts/figures.py --models NNUNET CONRESNET  result.png, from trained models of the hippocampus data
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_conres.augmentation.bspline import BSplineGrid
from nnunet_conres.colours import COLOURS
from nnunet_conres.datasets.phantom import make_phantom
from nnunet_conres.evaluation.probabilities import Channels
from nnunet_conres.evaluation.summary import read_summary
from nnunet_conres.evaluation.uncertainty import region_numbers, uncertainty_maps
from nnunet_conres.evaluation.uncertainty_figures import uncertainty_figure
from nnunet_conres.residuals import inter_slice_residual, label_residual

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
T1CE = 2
# Okabe-Ito, safe for colour-blind readers: whole tumour, tumour core, enhancing tumour
REGIONS = (("whole tumour", (1, 2, 4), COLOURS[0]), ("core", (1, 4), COLOURS[1]), ("enhancing", 4, COLOURS[2]))


def residual_figure(seed: int = 8) -> Figure:
    """Neighbouring slices of a case, what changes between them in the image, and in the annotation."""
    images, labels = make_phantom((96, 128, 128), seed)
    image = torch.from_numpy(images[T1CE].astype(np.float32))[None, None]
    annotation = torch.from_numpy(labels.astype(np.int16))[None, None]
    image_residual = inter_slice_residual(image)[0, 0].numpy()
    regions = [members for _, members, _ in REGIONS]
    region_residual = label_residual(annotation, classes=regions)[0][0].numpy()
    k = int(region_residual[2].sum((1, 2)).argmax())

    figure = Figure(figsize=(11, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4)
    axes[0].imshow(images[T1CE, k - 1], cmap="gray")
    axes[0].set_title(f"slice {k - 1}")
    axes[1].imshow(images[T1CE, k], cmap="gray")
    axes[1].set_title(f"slice {k}")
    axes[2].imshow(image_residual[k], cmap="magma")
    axes[2].set_title("image residual")
    axes[3].imshow(np.full((*labels.shape[1:], 3), 0.07))
    axes[3].set_title("annotation residual")
    for axis in axes[:2]:
        for _, members, colour in REGIONS:
            mask = np.isin(labels[k - 1 if axis is axes[0] else k], members)
            axis.contour(mask, levels=[0.5], colors=[colour], linewidths=1.2)
    for (name, _, colour), changed in zip(REGIONS, region_residual[:, k], strict=True):
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        axes[3].imshow(np.dstack([np.full(changed.shape, c) for c in rgb] + [changed * 1.0]), interpolation="nearest")
        axes[3].plot([], [], "s", color=colour, label=name)
    axes[3].legend(loc="lower right", fontsize="x-small", framealpha=0.9)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def network_figure() -> Figure:
    """The two decoders and one context residual module, as boxes."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set(xlim=(0, 22.2), ylim=(0, 9.4))
    axis.axis("off")
    blue, orange, grey = "#cfe3f3", "#fbe3b8", "#e8e8e8"

    def box(x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
        from matplotlib.patches import FancyBboxPatch

        patch = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.05", facecolor=colour, edgecolor="#444444")
        axis.add_patch(patch)
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def arrow(start: tuple[float, float], end: tuple[float, float], text: str = "", style: str = "-") -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "linestyle": style, "color": "#222222"})
        if text:
            axis.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.12, text, ha="center", fontsize=8)

    levels = [(7.2, 3.0, "full"), (4.9, 2.5, "1/2"), (2.6, 2.0, "1/4")]
    for y, width, name in levels:
        box(0.3, y, width, 1.1, f"encoder {name}", grey)
        box(4.6, y, 2.5, 1.1, f"segmentation {name}", blue)
        box(8.2, y, 2.5, 1.1, f"residual {name}", orange)
        arrow((0.3 + width + 0.1, y + 0.55), (4.5, y + 0.55), "skip")
        arrow((7.2, y + 0.8), (8.1, y + 0.8))
        arrow((8.1, y + 0.3), (7.2, y + 0.3))
    box(0.3, 0.3, 1.6, 1.1, "bottleneck", grey)
    for (low, _, _), (high, _, _) in ((levels[1], levels[0]), (levels[2], levels[1])):
        arrow((1.0, high - 0.1), (1.0, low + 1.25))
        arrow((5.85, low + 1.2), (5.85, high - 0.1))
        arrow((9.45, low + 1.2), (9.45, high - 0.1))
    arrow((1.0, 2.5), (1.0, 1.55))
    arrow((2.0, 0.85), (5.85, 2.5))
    arrow((9.45, 1.35), (9.45, 2.5))
    axis.text(9.45, 0.85, "residual of the image", ha="center", va="center", fontsize=9, style="italic")
    axis.text(5.85, 8.75, "segmentation logits", ha="center", fontsize=9, style="italic")
    axis.text(9.45, 8.75, "residual maps (supervised)", ha="center", fontsize=9, style="italic")

    axis.text(16.9, 8.75, "context residual module", ha="center", fontsize=10, weight="bold")
    box(11.7, 6.9, 4.2, 1.1, "F = conv(segmentation)", blue)
    box(11.7, 4.5, 4.2, 1.5, "G = conv 1x1x1 of\n|sigmoid(F)[k] - sigmoid(F)[k-1]|", "#dcefdc")
    box(11.7, 2.1, 4.2, 1.1, "S = conv(residual + G)", orange)
    box(17.3, 6.9, 4.6, 1.1, "segmentation <- F (1 + sigmoid(S))", blue)
    box(17.3, 2.1, 4.6, 1.1, "residual <- S", orange)
    arrow((13.8, 6.8), (13.8, 6.1))
    arrow((13.8, 4.4), (13.8, 3.3))
    arrow((16.0, 7.45), (17.2, 7.45))
    arrow((16.0, 2.65), (17.2, 2.65))
    arrow((16.0, 3.2), (18.8, 6.8), "attention", style="--")
    return figure


def deformation_figure(seed: int = 3) -> Figure:
    """Where a slice of a patch is sampled from under three B-spline deformations, and how volumes change there."""
    size = (128, 128, 128)
    rng = np.random.default_rng(seed)

    def draw(grid: BSplineGrid, sigma: float) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, sigma, (*grid.shape, 3)).astype(np.float32))

    coarse, fine = BSplineGrid(size, grid_spacing=32), BSplineGrid(size, grid_spacing=16)
    folding = draw(fine, 12)
    panels = [
        ("spacing 32, sigma 4", coarse, draw(coarse, 4)),
        ("spacing 16, sigma 12", fine, folding),
        ("the same draw, fold_free=True", fine, fine.without_folds(folding)),
    ]
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    voxels = np.arange(128)
    # the folding deformation and its damped form are shown in one slice, that of the strongest fold
    k_fold = int(fine.jacobian_determinant(folding).amin((1, 2)).argmin())
    for axis, (title, grid, displacements) in zip(axes, panels, strict=True):
        determinant = grid.jacobian_determinant(displacements).numpy()
        k = k_fold if grid is fine else size[0] // 2
        u = grid.evaluate(displacements)[k].numpy()
        y, x = voxels[:, None] + u[..., 1], voxels[None] + u[..., 2]
        mesh = axis.pcolormesh(x, y, determinant[k], shading="gouraud", cmap="PuOr", vmin=-1, vmax=3, rasterized=True)
        folds = np.where(determinant[k] <= 0)
        axis.plot(x[folds], y[folds], "s", color="#D00000", markersize=1.3, markeredgewidth=0, zorder=3)
        axis.plot([], [], "s", color="#D00000", label="folded (determinant <= 0)")
        for line in (*range(0, 127, 4), 127):
            axis.plot(x[line], y[line], color="#222222", linewidth=0.5)
            axis.plot(x[:, line], y[:, line], color="#222222", linewidth=0.5)
        axis.set(xlim=(-14, 141), ylim=(141, -14), aspect="equal", xticks=[], yticks=[])
        corners = np.array([(-0.5, -0.5), (127.5, -0.5), (127.5, 127.5), (-0.5, 127.5), (-0.5, -0.5)])
        axis.plot(*corners.T, "--", color="#0072B2", linewidth=1, label="border of the patch")
        axis.set_title(
            f"{title}\nsmallest Jacobian determinant {determinant.min():.2f}".replace("-", "\N{MINUS SIGN}"),
            fontsize=10,
        )
    axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize="small", frameon=False)
    figure.colorbar(mesh, ax=axes, shrink=0.9, label="Jacobian determinant", ticks=[-1, 0, 1, 2, 3], extend="both")
    return figure


def result_figure(baseline: Path, conresnet: Path, device: str) -> Figure:
    """A slice of a real case: image, ground truth, both predictions of fold 0, and ConResNet's residual maps.

    Args:
        baseline: Model folder of nnU-Net's own trainer on the hippocampus data, with a validated fold 0.
        conresnet: Model folder of ConResNet on the same data.
        device: Where the residual maps are predicted.

    Returns:
        The validation case in which the baseline's Dice is the median, in the slice with the largest hippocampus.
    """
    from nnunet_conres.evaluation.residual_predictions import ResidualPredictor, write_predicted_residuals

    raw = Path(os.environ["nnUNet_raw"], baseline.parent.name)
    dice = {
        folder: {
            case: float(np.mean([score.dice for score in scores.values()]))
            for case, scores in read_summary(folder / "fold_0" / "validation" / "summary.json").cases.items()
        }
        for folder in (baseline, conresnet)
    }
    by_dice = sorted(dice[baseline], key=dice[baseline].__getitem__)
    case = by_dice[len(by_dice) // 2]
    name = f"{case}.nii.gz"

    def read(path: Path) -> np.ndarray:
        return np.asarray(nibabel.load(path).dataobj).T  # slices first

    with tempfile.TemporaryDirectory() as maps:
        source = raw / "imagesTr" / f"{case}_0000.nii.gz"
        write_predicted_residuals(source, Path(maps), ResidualPredictor(conresnet, [0], device=device))
        predicted = sorted(Path(maps).glob("*_predicted_residual_*.nii.gz"))
        residual = np.max([read(path) for path in predicted], axis=0)
        image = read(source)
    truth = read(raw / "labelsTr" / name)
    panels = {"ground truth": truth}
    for title, folder in (("nnU-Net", baseline), ("ConResNet", conresnet)):
        labels = read(folder / "fold_0" / "validation" / name)
        panels[f"{title}, Dice {100 * dice[folder][case]:.1f} %"] = labels
    k = int((truth > 0).sum((1, 2)).argmax())

    figure = Figure(figsize=(12, 3.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 5)
    shown = (("anterior", 1, COLOURS[0]), ("posterior", 2, COLOURS[1]))
    for axis in axes[:4]:
        axis.imshow(image[k], cmap="gray")
    axes[0].set_title("image (T1)")
    for axis, (title, labels) in zip(axes[1:4], panels.items(), strict=True):
        axis.set_title(title)
        for _, label, colour in shown:
            axis.contour(labels[k] == label, levels=[0.5], colors=[colour], linewidths=1.8)
    for title, _, colour in shown:
        axes[0].plot([], [], color=colour, label=title)
    axes[0].legend(loc="lower left", fontsize="small", framealpha=0.9)
    axes[4].imshow(residual[k], cmap="magma", vmin=0, vmax=1)
    axes[4].set_title("predicted residual")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    print(f"{case}, slice {k + 1} of {len(truth)}")
    return figure


def fold_figure(seed: int = 8, folds: int = 5) -> Figure:
    """A case as five folds might predict it: each with a smooth error of a millimetre or two at every border."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    images, labels = make_phantom((96, 128, 128), seed)
    rng = np.random.default_rng(seed)
    regions = {name: list(members) if isinstance(members, tuple) else [members] for name, members, _ in REGIONS}
    meaning = Channels.of_dataset({"labels": {"background": 0, **regions}, "regions_class_order": [2, 1, 4]})
    drawn: list[list[np.ndarray]] = [[] for _ in range(folds)]
    for members in regions.values():
        mask = np.isin(labels, members)
        depth = distance_transform_edt(mask) - distance_transform_edt(~mask)
        for fold in drawn:
            noise = gaussian_filter(rng.normal(size=mask.shape), 4)
            error = 1.5 * noise / noise.std()
            fold.append((1 / (1 + np.exp(-1.2 * (depth + error)))).astype(np.float32))
    maps = uncertainty_maps(drawn, meaning)
    numbers = region_numbers(maps, meaning, (1.0, 1.0, 1.0))
    figure = uncertainty_figure(
        maps.segmentation,
        maps.entropy,
        maps.disagreement,
        regions=meaning.regions,
        image=images[T1CE],
        channel="T1ce",
        title="Synthetic case, five folds",
        subtitle="Dice between members: " + ", ".join(f"{name} {of['dice_mean']:.3f}" for name, of in numbers.items()),
    )
    FigureCanvasAgg(figure)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", metavar="FOLDER", type=Path, nargs=2, help="model folders of nnU-Net and ConResNet with a fold 0"
    )
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default: %(default)s")
    arguments = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    if arguments.models is not None:
        path = IMAGES / "result.png"
        result_figure(*arguments.models, arguments.device).savefig(path, dpi=100)
        print(path)
        return
    figures = {
        "residual": residual_figure,
        "network": network_figure,
        "deformation": deformation_figure,
        "uncertainty": fold_figure,
    }
    for name, draw in figures.items():
        path = IMAGES / f"{name}.png"
        draw().savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    main()
