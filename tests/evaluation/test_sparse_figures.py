import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from matplotlib.image import imread

from nnunet_conres.evaluation.sparse_figures import (
    SparseCase,
    sparse_annotation_figure,
    write_sparse_annotation_figures,
)

REGIONS = {"whole": (1, 2), "core": (2,)}
IGNORE = 3
ANNOTATED = (2, 3, 9)


def case(axis: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return image, sparse labels, dense labels and truth; three slices along the axis are annotated."""
    rng = np.random.default_rng(0)
    truth = np.zeros((12, 16, 20), np.uint8)
    truth[1:11, 3:12, 4:17] = 1
    truth[2:10, 5:9, 6:14] = 2
    sparse = np.full_like(truth, IGNORE)
    sparse[list(ANNOTATED)] = truth[list(ANNOTATED)]
    dense = np.where(sparse == IGNORE, np.roll(truth, 1, 1), truth)
    image = (truth + rng.normal(0, 0.2, truth.shape)).astype(np.float32)
    image[:, 0] = image[0, 0, 0]
    return tuple(np.moveaxis(array, 0, axis) for array in (image, sparse, dense, truth))  # type: ignore[return-value]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shows_a_cut_an_annotated_slice_and_one_that_is_not(axis: int) -> None:
    image, sparse, dense, truth = case(axis)
    figure = sparse_annotation_figure(
        image, sparse, dense, ignore_label=IGNORE, regions=REGIONS, truth=truth, axis=axis, title="case 7"
    )
    assert len(figure.axes) == 9
    assert [panel.get_title() for panel in figure.axes[:3]] == ["annotated", "completed", "truth"]
    texts = [panel.texts[0].get_text() for panel in figure.axes[::3]]
    # Slice 6 is three slices from 3 and from 9; no other slice is as far from an annotated one.
    assert texts[:2] == ["cut across the slices", "slice 6, not annotated"]
    assert texts[2] in [f"slice {index}, annotated" for index in ANNOTATED]
    across = np.take(image, 6, axis=axis)
    np.testing.assert_array_equal(figure.axes[3].images[0].get_array(), across)
    # Each row of the cut is one slice.
    assert figure.axes[0].images[0].get_array().shape[0] == 12
    heading, scores = (text.get_text() for text in figure.texts)
    assert heading == "case 7: 3 of 12 slices annotated"
    unknown = sparse == IGNORE
    true, found = (np.isin(labels, (1, 2)) & unknown for labels in (truth, dense))
    assert f"whole {2 * (true & found).sum() / (true.sum() + found.sum()):.3f}" in scores


def test_veil_lies_where_nothing_is_annotated() -> None:
    image, sparse, dense, _ = case()
    figure = sparse_annotation_figure(image, sparse, dense, ignore_label=IGNORE, regions=REGIONS)
    assert len(figure.axes) == 6
    veil = figure.axes[0].images[1].get_array()[..., 3] > 0
    np.testing.assert_array_equal(np.flatnonzero(~veil.all(axis=1)), ANNOTATED)
    assert not veil[list(ANNOTATED)].any()


def test_axes_can_be_reversed() -> None:
    image, sparse, dense, _ = case()
    arguments = {"ignore_label": IGNORE, "regions": REGIONS}
    plain = sparse_annotation_figure(image, sparse, dense, **arguments)
    turned = sparse_annotation_figure(image, sparse, dense, reverse=(True, False, True), **arguments)
    assert turned.axes[0].get_ylim() == plain.axes[0].get_ylim()[::-1]
    assert turned.axes[2].get_ylim() == plain.axes[2].get_ylim()
    assert turned.axes[2].get_xlim() == plain.axes[2].get_xlim()[::-1]


@pytest.mark.parametrize("value", [0, IGNORE])
def test_all_or_nothing_annotated(value: int) -> None:
    image, _, dense, _ = case()
    sparse = np.full_like(dense, value)
    figure = sparse_annotation_figure(image, sparse, dense, ignore_label=IGNORE, regions=REGIONS)
    assert len(figure.axes) == 4


def test_shapes_must_fit() -> None:
    image, sparse, dense, _ = case()
    with pytest.raises(ValueError, match="'completed' have shape"):
        sparse_annotation_figure(image, sparse, dense[1:], ignore_label=IGNORE, regions=REGIONS)
    with pytest.raises(ValueError, match="three axes"):
        sparse_annotation_figure(image[None], sparse, dense, ignore_label=IGNORE, regions=REGIONS)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_from_files(tmp_path: Path, ending: str) -> None:
    files = []
    for name, array in zip(("image_0000", "sparse", "dense", "truth"), case(), strict=True):
        files.append(tmp_path / f"{name}{ending}")
        sitk.WriteImage(sitk.GetImageFromArray(array), files[-1])
    dataset_json = tmp_path / "dataset.json"
    labels = {"background": 0, "a": 1, "b": 2}
    content = {"channel_names": {"0": "MRI"}, "labels": labels | {"ignore": IGNORE}, "file_ending": ending}
    dataset_json.write_text(json.dumps(content))
    one = SparseCase("one", (files[0],), *files[1:])
    (written,) = write_sparse_annotation_figures([one], tmp_path / "out", dataset_json=dataset_json, progress=False)
    assert written == tmp_path / "out" / "one.png"
    assert imread(written).shape[0] > 300
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one.png"]

    dataset_json.write_text(json.dumps(content | {"labels": labels}))
    with pytest.raises(ValueError, match="no label 'ignore'"):
        write_sparse_annotation_figures([one], tmp_path / "out", dataset_json=dataset_json, progress=False)
