"""Times B-spline deformation against batchgeneratorsv2 and SimpleITK: python scripts/benchmark_bspline.py

Everything runs on one thread of the CPU. Contestants take turns, so that whatever else the machine does hits all of
them; ratios are medians over the rounds, of times measured in the same round.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import SimpleITK
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from tqdm import tqdm

from nnunet_conres.augmentation.bspline import BSplineSpatialTransform
from nnunet_conres.augmentation.histogram import HistogramMatchingTransform
from nnunet_conres.datasets.phantom import make_phantom

SPACING, SIGMA = 32, 4
# nnU-Net's ranges
AFFINE: dict[str, Any] = {
    "rotation": (-np.pi / 6, np.pi / 6),
    "scaling": (0.7, 1.4),
    "p_synchronize_scaling_across_axes": 1,
}

# (name, contestant, reference, contestant / reference at most)
TARGETS = (
    ("field / elastic field", "B-spline field", "batchgeneratorsv2 elastic field", 1 / 20),
    ("whole / rotation and scaling, labels linear", "B-spline whole, linear", "batchgeneratorsv2 affine, linear", 1.25),
    (
        "whole / rotation and scaling, labels nearest",
        "B-spline whole, nearest",
        "batchgeneratorsv2 affine, nearest",
        1.25,
    ),
    (
        "whole / rotation and scaling, image only",
        "B-spline whole, image only",
        "batchgeneratorsv2 affine, image only",
        1.25,
    ),
    ("whole / SimpleITK, image only", "B-spline whole, image only", "SimpleITK B-spline, image only", 1 / 3),
    ("whole / SimpleITK, labels linear", "B-spline whole, linear", "SimpleITK B-spline, linear", 1 / 3),
    ("whole / SimpleITK, labels nearest", "B-spline whole, nearest", "SimpleITK B-spline, nearest", 1 / 3),
)


def contestants(edge: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: each call transforms one patch of one channel with four labels."""
    size = (edge,) * 3
    images, annotation = make_phantom(size, 0)
    image = torch.from_numpy(images[:1].astype(np.float32))
    labels = torch.from_numpy(annotation.astype(np.int16))[None]
    bspline: dict[str, Any] = {"p_deformation": 1, "grid_spacing": SPACING, "sigma": SIGMA}

    def fields(transform: SpatialTransform) -> Callable[[], Any]:
        return lambda: transform.get_parameters(image=image)

    def whole(transform: SpatialTransform) -> Callable[[], Any]:
        return lambda: transform(image=image, segmentation=labels)

    def image_only(transform: SpatialTransform) -> Callable[[], Any]:
        return lambda: transform(image=image)

    # the same lattice of control points in SimpleITK
    cells = -(-edge // SPACING)
    itk = SimpleITK.BSplineTransform(3, 3)
    itk.SetTransformDomainMeshSize([cells] * 3)
    itk.SetTransformDomainOrigin([(edge - cells * SPACING) / 2 - 0.5] * 3)
    itk.SetTransformDomainPhysicalDimensions([cells * SPACING] * 3)
    itk_image, itk_labels = (
        SimpleITK.GetImageFromArray(image[0].numpy()),
        SimpleITK.GetImageFromArray(labels[0].numpy()),
    )

    def resample(label_mode: int | None) -> Callable[[], Any]:
        def run() -> None:
            itk.SetParameters(np.random.normal(0, SIGMA, len(itk.GetParameters())).tolist())
            SimpleITK.Resample(itk_image, itk_image, itk, SimpleITK.sitkLinear, 0.0)
            if label_mode is not None:
                SimpleITK.Resample(itk_labels, itk_labels, itk, label_mode, 0.0)

        return run

    both: dict[str, Any] = {"p_rotation": 1, "p_scaling": 1, **AFFINE}
    elastic: dict[str, Any] = {"elastic_deform_scale": (0.1, 0.25), "elastic_deform_magnitude": (4, 12)}
    matching = HistogramMatchingTransform(p=1)
    return {
        "B-spline field": fields(BSplineSpatialTransform(size, 0, False, **bspline)),
        "B-spline field, fold-free": fields(BSplineSpatialTransform(size, 0, False, fold_free=True, **bspline)),
        "batchgeneratorsv2 elastic field": fields(SpatialTransform(size, 0, False, p_elastic_deform=1, **elastic)),
        "B-spline whole, linear": whole(BSplineSpatialTransform(size, 0, False, **both, **bspline)),
        "batchgeneratorsv2 affine, linear": whole(SpatialTransform(size, 0, False, **both)),
        "B-spline whole, nearest": whole(
            BSplineSpatialTransform(size, 0, False, mode_seg="nearest", **both, **bspline)
        ),
        "batchgeneratorsv2 affine, nearest": whole(SpatialTransform(size, 0, False, mode_seg="nearest", **both)),
        "B-spline whole, image only": image_only(BSplineSpatialTransform(size, 0, False, **both, **bspline)),
        "batchgeneratorsv2 affine, image only": image_only(SpatialTransform(size, 0, False, **both)),
        "SimpleITK B-spline, image only": resample(None),
        "SimpleITK B-spline, linear": resample(SimpleITK.sitkLabelLinear),
        "SimpleITK B-spline, nearest": resample(SimpleITK.sitkNearestNeighbor),
        "histogram matching": lambda: matching(image=image, segmentation=labels),
    }


def measure(edge: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per contestant and round, after one round to warm up."""
    runs = contestants(edge)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in tqdm(range(rounds + 1), desc="rounds"):
        for name, run in runs.items():
            # the same seed for all in a round: rotations and scalings are then the same
            np.random.seed(turn)
            torch.manual_seed(turn)
            start = perf_counter()
            run()
            if turn:
                seconds[name].append(perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edge", type=int, default=128, help="edge of the cubic patch in voxels (default: 128)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, after one to warm up (default: 7)")
    parser.add_argument("--json", type=Path, help="also write times and ratios to this file")
    args = parser.parse_args()
    if args.edge < 8 or args.rounds < 1:
        parser.error("--edge must be at least 8 and --rounds at least 1")
    torch.set_num_threads(1)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    seconds = measure(args.edge, args.rounds)

    print(f"\nPatch {args.edge}^3, one channel, four labels, one thread; medians of {args.rounds} rounds\n")
    print("| | ms |\n| --- | ---: |")
    for name, times in seconds.items():
        print(f"| {name} | {1000 * np.median(times):.1f} |")
    print("\n| ratio | measured | at most | |\n| --- | ---: | ---: | --- |")
    ratios = {}
    for name, contestant, reference, limit in TARGETS:
        ratio = float(np.median(np.divide(seconds[contestant], seconds[reference])))
        ratios[name] = {"measured": ratio, "at_most": limit, "met": ratio <= limit}
        print(f"| {name} | {ratio:.3f} | {limit:.3f} | {'met' if ratio <= limit else 'MISSED'} |")
    if args.json:
        report = {
            "edge": args.edge,
            "rounds": args.rounds,
            "seconds": seconds,
            "ratios": ratios,
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
        }
        partial = args.json.with_name(args.json.name + ".partial")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        partial.replace(args.json)


if __name__ == "__main__":
    main()
