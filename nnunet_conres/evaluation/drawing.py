"""Fourth stage of a comparison: pictures of the cases that the report shows slice by slice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_conres.evaluation.cache import Cache, key_of, state_of
from nnunet_conres.evaluation.finding import Found
from nnunet_conres.nnunet import label_values
from nnunet_conres.text import first_few, short_message


def draw_cases(found: Found, shown: Sequence[str], cache_folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Draw images, reference and predictions.

    Args:
        found: The models and their predictions.
        shown: Ids of the cases.
        cache_folder: Where to cache the pictures.

    Returns:
        The result of `pack_case` for every case that can be shown, and warnings about the others.
    """
    warnings = []
    without = [case for case in shown if case not in found.images]
    if without:
        where = (
            "there are none in imagesTr of the raw data set."
            if found.kind == "cross-validation"
            else "pass their folder with -i."
        )
        warnings.append(f"No images found for {first_few(without)}: {where}")
    cache = Cache(cache_folder)
    pictures = []
    for case in (case for case in shown if case in found.images):
        labels = {model.key: state_of(model.predictions[case].labels) for model in found.models}
        files = [state_of(path) for path in (*found.images[case], found.references[case])]
        key = key_of(found.dataset_json, case, files, labels)
        try:
            pictures.append(cache.kept(key, partial(_pack, found, case)))
        except ValueError as error:
            # Scores and statistics are complete: a case that can't be shown must not lose them.
            warnings.append(f"No pictures of {case}: {short_message(error)}.")
    return pictures, warnings


def _pack(found: Found, case: str) -> dict[str, Any]:
    """Pack a case for the viewer.

    Raises:
        ValueError: Its files can't be read or do not fit each other.
    """
    import numpy as np

    from nnunet_conres.evaluation.report.cases import CaseVolumes, pack_case
    from nnunet_conres.images.volumes import read_standing, read_standing_labels, reader_for

    content = found.dataset_json
    channel_names = content.get("channel_names", content.get("modality", {}))
    reader = reader_for(content, [found.images[case][0]])
    images, spacings = zip(*(read_standing(file, reader) for file in found.images[case]), strict=True)
    volumes = CaseVolumes(
        case,
        np.stack(images),
        [str(channel_names.get(str(number), f"channel {number}")) for number in range(len(images))],
        read_standing_labels(found.references[case], reader),
        {model.key: read_standing_labels(model.predictions[case].labels, reader) for model in found.models},
        label_values(content["labels"]),
        spacings[0],
    )
    if errors := volumes.errors():
        raise ValueError(" ".join(errors))
    return pack_case(volumes)
