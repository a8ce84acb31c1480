"""B-spline deformation against batchgeneratorsv2's transforms and SimpleITK's.

Contenders take turns, so that other load on the machine affects all of them alike. Ratios are between times of the same
round; the report has their medians over the rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import SimpleITK
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

from benchmarks import machine
from benchmarks.arguments import add_turns
from benchmarks.report import as_text, milliseconds, ratio_table, ratios_as_json, table
from benchmarks.timing import BenchmarkError, Clock, Phases, Ratio, in_turn, spread, totals
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
    """Return the timed functions, by name. Each call transforms one patch of one channel with four labels."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--edge", type=int, default=128, metavar="N", help="edge of the cubic patch in voxels (default: %(default)s)"
    )
    add_turns(parser, rounds=7, warmup=1)


class Turns:
    """A contender; all contenders draw the same random numbers in a round, so rotations and scalings are the same.

    Args:
        call: Function to time.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.turn = 0

    def __call__(self) -> Phases:
        np.random.seed(self.turn)
        torch.manual_seed(self.turn)
        self.turn += 1
        clock = Clock(torch.device("cpu"))
        self.call()
        clock.lap("transform")
        return clock.seconds()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure transforms and return the report."""
    if arguments.edge < 8:
        raise BenchmarkError(f"--edge must be at least 8, got {arguments.edge}.")
    if arguments.device.type != "cpu":
        raise BenchmarkError("Augmentation runs on the CPU. Use --device cpu.")
    about = machine.describe(arguments.device)
    threads = torch.get_num_threads()
    on = "one thread" if threads == 1 else f"{threads} threads"
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    runs = {name: Turns(call) for name, call in contestants(arguments.edge).items()}
    times = in_turn(dict(runs), arguments.rounds, arguments.warmup)
    seconds = {name: totals(phases) for name, phases in times.items()}
    ratios = [
        Ratio.median_of_rounds(name, seconds[contestant], seconds[reference], limit)
        for name, contestant, reference, limit in TARGETS
    ]
    return {
        "benchmark": "bspline",
        "title": f"Patch {arguments.edge}^3, one channel, four labels, {on}; medians of {arguments.rounds} rounds",
        "machine": about,
        "edge": arguments.edge,
        "rounds": arguments.rounds,
        "warmup": arguments.warmup,
        "contenders": {name: {"seconds": spread(values)} for name, values in seconds.items()},
        "ratios": ratios_as_json(ratios),
    }


def as_table(report: dict[str, Any]) -> str:
    """Format the report as text."""
    rows = [[name, milliseconds(entry["seconds"])] for name, entry in report["contenders"].items()]
    return as_text(report, table(["", "ms"], rows), ratio_table(report["ratios"]))
