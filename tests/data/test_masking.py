"""SimMIM's masks: how much they hide, where, and that they are a function of the sample alone."""

import math

import numpy as np
import pytest

from swin_scale.data.masking import draw_mask

RECIPE = {"ratio": 0.6, "cell": 32, "patch": 4, "seed": 0, "epoch": 3}


@pytest.mark.parametrize("size", [(192, 192), (224, 224), (192, 256), (256, 64)])
def test_the_share_is_exact_and_cells_are_whole(size):
    rows, columns = size[0] // 32, size[1] // 32
    mask = draw_mask(*size, **RECIPE, sample=7)
    assert mask.shape == (size[0] // 4, size[1] // 4) and set(np.unique(mask)) == {0, 1}
    cells = mask.reshape(rows, 8, columns, 8)
    assert (cells == cells[:, :1, :, :1]).all()
    assert cells[:, 0, :, 0].sum() == math.ceil(0.6 * rows * columns)


def test_the_published_share_at_192_pixels():
    mask = draw_mask(192, 192, **RECIPE, sample=0)
    assert mask.sum() == 22 * 64 and mask.mean() == pytest.approx(0.6111, abs=1e-4)


def test_sides_that_do_not_divide_are_covered_to_the_border():
    mask = draw_mask(48, 80, ratio=1.0, cell=32, patch=4, seed=0, epoch=0, sample=0)
    assert mask.shape == (12, 20) and mask.all()


def test_every_cell_is_hidden_as_often_as_any_other():
    """2,000 masks of 36 cells: the count of each is within five standard deviations of its mean."""
    masks = np.stack([draw_mask(192, 192, **RECIPE, sample=sample)[::8, ::8] for sample in range(2000)])
    share = 22 / 36
    assert np.abs(masks.sum(0) - 2000 * share).max() < 5 * math.sqrt(2000 * share * (1 - share))
    # Two cells are hidden together as often as drawing without replacement has it.
    pair = (masks[:, 0, 0] & masks[:, 3, 4]).mean()
    assert pair == pytest.approx(share * 21 / 35, abs=5 * math.sqrt(0.25 / 2000))


def test_a_mask_is_a_function_of_seed_epoch_and_sample():
    first = draw_mask(192, 192, **RECIPE, sample=7)
    assert np.array_equal(first, draw_mask(192, 192, **RECIPE, sample=7))
    for change in ({"seed": 1}, {"epoch": 4}, {"sample": 8}):
        assert not np.array_equal(first, draw_mask(192, 192, **{**RECIPE, "sample": 7, **change})), change
