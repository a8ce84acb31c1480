import base64
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nnunet_conres.evaluation.report.cases import CaseVolumes, pack_case


def pixels(picture: str) -> np.ndarray:
    assert picture.startswith("data:image/")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.split(",", 1)[1]))).convert("L"))


def unpacked(packed: dict[str, Any], picture: str) -> np.ndarray:
    """Cut a picture into its slices (n, y, x), one by one."""
    sheet = pixels(picture)
    rows, columns = packed["size"]
    slices = []
    for position in range(len(packed["slices"])):
        top, left = position // packed["columns"] * rows, position % packed["columns"] * columns
        slices.append(sheet[top : top + rows, left : left + columns])
    return np.stack(slices)


def small_case(labels: np.ndarray, predictions: dict[str, np.ndarray], regions: dict[str, tuple[int, ...]]) -> Any:
    """Return a case whose images are background in the first voxel only, so that nothing is cropped."""
    images = np.random.default_rng(0).uniform(100, 200, (1, *labels.shape))
    images[0, 0, 0, 0] = 0
    return CaseVolumes("case", images, ("T1",), labels, predictions, regions, (3.0, 1.0, 2.0))


class TestPackCase:
    def test_keeps_labels_as_they_are(self) -> None:
        rng = np.random.default_rng(0)
        labels, prediction = rng.integers(0, 4, (2, 9, 13, 11))
        regions = {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
        packed = pack_case(small_case(labels, {"m0": prediction}, regions))
        assert packed["slices"] == list(range(9))
        assert (packed["size"], packed["depth"], packed["spacing"]) == ([13, 11], 9, [1.0, 2.0])
        for key, label_map in (("reference", labels), ("m0", prediction)):
            (picture,) = packed["labels"][key]
            expected = (label_map > 0) * 1 + (label_map > 1) * 2 + (label_map > 2) * 4
            np.testing.assert_array_equal(unpacked(packed, picture), expected)

    def test_more_than_eight_regions_take_a_second_picture(self) -> None:
        labels = np.random.default_rng(0).integers(0, 11, (3, 6, 5))
        packed = pack_case(small_case(labels, {}, {f"organ {value}": (value,) for value in range(1, 11)}))
        first, second = (unpacked(packed, picture) for picture in packed["labels"]["reference"])
        for value in range(1, 11):
            plane, bit = (first, value - 1) if value <= 8 else (second, value - 9)
            np.testing.assert_array_equal(plane >> bit & 1, labels == value)

    def test_residuals_are_those_of_the_volume_also_where_slices_are_left_out(self) -> None:
        labels = np.random.default_rng(1).integers(0, 3, (40, 6, 7))
        packed = pack_case(small_case(labels, {}, {"any": (1, 2), "two": (2,)}), slices_per_case=10)
        assert len(packed["slices"]) == 10
        (picture,) = packed["residuals"]["reference"]
        found = unpacked(packed, picture)
        for position, index in enumerate(packed["slices"]):
            for y in range(6):
                for x in range(7):
                    value, before = labels[index, y, x], labels[max(0, index - 1), y, x]
                    expected = ((value > 0) != (before > 0)) + 2 * ((value == 2) != (before == 2))
                    assert found[position, y, x] == expected

    def test_slices_are_those_with_labels_at_even_distances(self) -> None:
        labels = np.zeros((155, 8, 8), int)
        labels[50:101, 3:5, 3:5] = 1
        prediction = np.roll(labels, -20, axis=0)
        case = small_case(labels, {"m0": prediction}, {"any": (1,)})
        every = pack_case(case, 200)["slices"]
        assert every == list(range(30 - 3, 100 + 3 + 1))
        some = pack_case(case, 20)["slices"]
        assert (len(some), some[0], some[-1]) == (20, 27, 103)
        assert set(np.diff(some)) <= {4}

    def test_begins_where_the_models_differ_most(self) -> None:
        labels = np.zeros((12, 8, 8), int)
        labels[2:10, 2:6, 2:6] = 1
        prediction = labels.copy()
        prediction[7] = 0
        packed = pack_case(small_case(labels, {"m0": prediction}, {"any": (1,)}))
        assert packed["slices"][packed["start"]] == 7

    def test_crops_to_the_head_but_never_a_label(self, make_volumes: Callable[..., CaseVolumes]) -> None:
        case = make_volumes(shape=(12, 60, 50))
        images = np.zeros((4, 12, 60, 50))
        images[:, :, 20:40, 15:35] = case.images[:, :, 20:40, 15:35] + 1
        labels = np.zeros((12, 60, 50), int)
        labels[5, 30, 20] = 1
        stray = labels.copy()
        stray[6, 2, 20] = 1
        inside = replace(case, images=images, reference=labels, predictions={"m0": labels})
        outside = replace(inside, predictions={"m0": stray})
        assert pack_case(inside)["size"] == [24, 24]
        rows, columns = pack_case(outside)["size"]
        assert rows > 24
        assert columns == 24
        packed = pack_case(outside)
        assert unpacked(packed, packed["labels"]["m0"][0]).sum() == 2 * 1

    def test_images_look_as_before(self, make_volumes: Callable[..., CaseVolumes]) -> None:
        case = make_volumes()
        packed = pack_case(case)
        assert [channel["name"] for channel in packed["channels"]] == ["T1", "T1ce", "T2", "FLAIR"]
        rows, columns = packed["size"]
        for image, channel in zip(case.images, packed["channels"], strict=True):
            found = unpacked(packed, channel["picture"]).astype(float)
            head = image[image > 0]
            low, high = min(np.percentile(head, 0.5), np.median(head)), np.percentile(head, 99.7)
            windowed = 255 * np.clip((image[packed["slices"]] - low) / (high - low), 0, 1)
            # The head touches no border here, so the crop is in the middle.
            top, left = (image.shape[1] - rows) // 2, (image.shape[2] - columns) // 2
            expected = windowed[:, top : top + rows, left : left + columns]
            assert np.abs(found - expected).mean() < 8

    def test_without_reference_and_without_labels(self) -> None:
        labels = np.zeros((7, 6, 6), int)
        case = replace(small_case(labels, {"m0": labels}, {"any": (1,)}), reference=None)
        packed = pack_case(case)
        assert list(packed["labels"]) == ["m0"]
        assert packed["slices"] == list(range(7))

    def test_names_all_errors(self) -> None:
        labels = np.zeros((7, 6, 6), int)
        case = small_case(labels, {"m0": labels[1:], "m1": labels[:, 1:]}, {})
        with pytest.raises(ValueError, match="expected") as error:
            pack_case(replace(case, channels=("T1", "T2"), spacing=(1.0, 0.0, 1.0)))
        for message in ("2 names of channels", "prediction of m0", "prediction of m1", "no regions", "spacing of case"):
            assert message in str(error.value)
