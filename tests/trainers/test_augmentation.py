"""Changes to nnU-Net's pipeline. The tests fail if a new version of nnU-Net breaks them."""

from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_conres.augmentation.bspline import BSplineSpatialTransform
from nnunet_conres.trainers.augmentation import with_deformation, with_spatial, without_intensity_transforms


def stock_pipeline(is_cascaded: bool = False) -> ComposeTransforms:
    return nnUNetTrainer.get_training_transforms(
        (8, 16, 16),
        (-0.3, 0.3),
        [[1, 1, 1]],
        (0, 1, 2),
        False,
        is_cascaded=is_cascaded,
        foreground_labels=[1, 2],
        ignore_label=3,
    )


def names(pipeline: ComposeTransforms) -> list[str]:
    return [type(getattr(t, "transform", t)).__name__ for t in pipeline.transforms]


def test_without_intensity_transforms_only_those_are_missing() -> None:
    left = names(without_intensity_transforms(stock_pipeline(is_cascaded=True)))
    assert left == [
        "SpatialTransform",
        "MirrorTransform",
        "RemoveLabelTransform",
        "MoveSegAsOneHotToDataTransform",
        "ApplyRandomBinaryOperatorTransform",  # of the cascade
        "RemoveRandomConnectedComponentFromOneHotEncodingTransform",
        "DownsampleSegForDSTransform",
    ]


def test_those_to_keep_stay() -> None:
    left = without_intensity_transforms(stock_pipeline(), keep=(GammaTransform,))
    assert names(left).count("GammaTransform") == names(stock_pipeline()).count("GammaTransform") == 2
    assert sum(isinstance(t, RandomTransform) for t in left.transforms) == 2


def test_the_deformation_takes_over_everything_else_of_nnunets_transform() -> None:
    pipeline = with_spatial(
        stock_pipeline(), lambda t: with_deformation(t, p_deformation=0.5, grid_spacing=8, sigma=1, p_scaling=1)
    )
    (stock,) = [t for t in stock_pipeline().transforms if isinstance(t, SpatialTransform)]
    (ours,) = [t for t in pipeline.transforms if isinstance(t, SpatialTransform)]
    assert names(pipeline) == [
        "BSplineSpatialTransform" if name == "SpatialTransform" else name for name in names(stock_pipeline())
    ]
    assert isinstance(ours, BSplineSpatialTransform)
    assert ours.p_scaling == 1
    # every attribute that nnU-Net sets, in this or later versions, is either carried over or replaced on purpose
    replaced = {name for name in vars(stock) if "elastic" in name or "def_scale" in name} | {"p_scaling", "_grid_cache"}
    for name, value in vars(stock).items():
        if name not in replaced:
            assert getattr(ours, name) == value, name
