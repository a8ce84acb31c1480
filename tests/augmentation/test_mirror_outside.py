import pickle

import numpy as np
import pytest
import torch

from nnunet_conres.augmentation.mirror_outside import MirrorOutsideTransform


def padded(before: tuple[int, ...], size: tuple[int, ...], after: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Return a volume as padded by nnU-Net's loader, and the expected result from NumPy."""
    image, labels = torch.randn(2, *size), torch.randint(0, 3, (1, *size), dtype=torch.int16)
    margins = [(0, 0), *zip(before, after, strict=True)]
    given = [
        torch.from_numpy(np.pad(x.numpy(), margins, constant_values=fill)) for x, fill in ((image, 0), (labels, -1))
    ]
    expected = [torch.from_numpy(np.pad(x.numpy(), margins, mode="symmetric")) for x in (image, labels)]
    return *given, *expected


@pytest.mark.parametrize(
    ("before", "size", "after"),
    [
        ((0, 0, 0), (4, 5, 6), (0, 0, 0)),
        ((2, 0, 1), (4, 5, 6), (1, 3, 0)),
        ((9, 0, 7), (4, 5, 3), (0, 11, 20)),  # more padding than there is to mirror
        ((1, 2, 3), (1, 1, 1), (3, 2, 1)),
        ((3, 1), (4, 5), (0, 2)),
    ],
)
def test_equals_numpys_symmetric_padding(
    before: tuple[int, ...], size: tuple[int, ...], after: tuple[int, ...]
) -> None:
    image, labels, expected_image, expected_labels = padded(before, size, after)
    done = MirrorOutsideTransform()(image=image, segmentation=labels, regression_target=image.clone())
    assert torch.equal(done["image"], expected_image)
    assert torch.equal(done["segmentation"], expected_labels)
    assert torch.equal(done["regression_target"], expected_image)


def test_holes_within_the_volume_stay_and_are_mirrored() -> None:
    labels = torch.tensor([[[-1, 1, -1, 2, -1, -1]]])
    done = MirrorOutsideTransform()(image=torch.arange(6.0).view(1, 1, 6), segmentation=labels)
    assert done["segmentation"].flatten().tolist() == [1, 1, -1, 2, 2, -1]
    assert done["image"].flatten().tolist() == [1, 1, 2, 3, 3, 2]


def test_nothing_of_the_volume_is_left_alone() -> None:
    image, labels = torch.randn(1, 3, 3, 3), torch.full((1, 3, 3, 3), -1)
    done = MirrorOutsideTransform()(image=image.clone(), segmentation=labels)
    assert torch.equal(done["image"], image)


def test_pickles() -> None:
    assert isinstance(pickle.loads(pickle.dumps(MirrorOutsideTransform())), MirrorOutsideTransform)
