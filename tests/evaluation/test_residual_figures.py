from __future__ import annotations

import numpy as np
import pytest

from nnunet_conres.evaluation.residual_figures import predicted_residual_figure


@pytest.mark.parametrize("shown", [False, True])
def test_attention_where_there_is_none(shown: bool) -> None:
    shape = (6, 8, 8)
    labels = np.zeros(shape, np.uint8)
    labels[2:4, 2:6, 2:6] = 1
    residual = {"tumour": np.diff(labels, axis=0, prepend=0) != 0}
    factors = np.ones(shape, np.float32)
    factors[3, 4, 4] = 1.5
    figure = predicted_residual_figure(
        [np.random.default_rng(0).normal(size=shape)],
        labels,
        {"tumour": residual["tumour"].astype(np.float32)},
        factors if shown else None,
        residual,
        regions={"tumour": [1]},
    )
    titles = [axes.get_title() for axes in figure.axes]
    assert any("predicted residual" in title for title in titles)
    assert any("attention" in title for title in titles) == shown
