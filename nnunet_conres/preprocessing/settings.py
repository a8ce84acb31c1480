"""The entries of plans that determine a configuration's preprocessed data."""

from typing import Final

OF_CONFIGURATIONS: Final = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
"""Entries of a configuration that determine its data; the others are about network and batch."""
