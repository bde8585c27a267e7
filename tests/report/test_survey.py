"""Arithmetic of a look at the routing: what explains a choice, and an order in which structure shows."""

import numpy as np
import pytest

from swin_scale.report.survey import arrange, banded, explained, named, shares, top_classes

RNG = np.random.default_rng(0)


def test_information_at_its_limits():
    own = np.repeat(np.eye(4, dtype=np.int64), 3, axis=0) * 1000
    assert explained(own) == pytest.approx(1, abs=0.01)
    assert explained(np.full((12, 4), 1000)) == 0
    assert explained(np.array([[5, 0], [9, 0]])) == 0 and explained(np.zeros((3, 4), dtype=np.int64)) == 0
    # Half of the classes keep to one of two experts, the others use both alike: half a bit of one, by hand.
    half = np.array([[1000, 0], [0, 1000], [500, 500], [500, 500]])
    assert explained(half) == pytest.approx(0.5, abs=0.01)


def test_few_counts_explain_nothing():
    """Without the correction, 2 choices of each of 500 classes among 8 experts would explain a third of them."""
    chance = RNG.multinomial(2, [1 / 8] * 8, size=500)
    part, mean = chance / 2, chance.sum(0) / 1000
    raw = (part[part > 0] * np.log((part / mean)[part > 0])).sum() / 500 / np.log(8)
    assert raw > 0.3
    thousand = RNG.multinomial(1000, [1 / 8] * 8, size=500)
    assert explained(thousand) < 0.001


@pytest.mark.parametrize("classes", [12, 300])
def test_a_shuffled_block_structure_comes_out_as_blocks(classes):
    """Six experts in three pairs, each class more or less at home with one; then classes and experts are shuffled."""
    home = np.arange(classes) % 3
    counts = np.full((classes, 6), 2)
    for pair in (0, 1):
        counts[np.arange(classes), 2 * home + pair] = RNG.integers(50, 150, classes)
    order, new = RNG.permutation(classes), RNG.permutation(6)
    rows, experts = arrange(counts[order][:, new])
    arranged = counts[order][:, new][rows][:, experts]
    pairs = new[experts] // 2
    assert (pairs[::2] == pairs[1::2]).all()
    homes = home[order][rows]
    assert (np.diff(np.flatnonzero(np.diff(homes))) > 0).all() and len(np.flatnonzero(np.diff(homes))) == 2
    assert sorted(rows.tolist()) == list(range(classes)) and arranged.sum() == counts.sum()


def test_classes_without_tokens_are_left_out():
    rows, experts = arrange(np.array([[0, 0], [3, 1], [0, 0], [1, 3]]))
    assert sorted(rows.tolist()) == [1, 3] and sorted(experts.tolist()) == [0, 1]
    assert arrange(np.zeros((3, 2), dtype=np.int64))[0].size == 0
    assert np.isnan(shares(np.zeros((1, 2)))).all()


def test_bands_hold_every_class_once():
    bands = banded(np.arange(21_841), 64)
    assert len(bands) == 64 and {len(band) for band in bands} == {341, 342}
    assert np.concatenate(bands).tolist() == list(range(21_841))
    assert [len(band) for band in banded(np.arange(3), 64)] == [1, 1, 1] and banded(np.arange(0), 64) == []


def test_the_best_classes_of_an_expert_have_enough_tokens():
    counts = np.array([[9, 1], [1, 0], [50, 50], [0, 100]])
    assert top_classes(counts, 2, least=5)[0] == [(0, 0.9), (2, 0.5)]
    assert top_classes(counts, 9, least=1)[0][0] == (1, 1.0) and len(top_classes(counts, 9, 1)) == 2
    names = ["cat, puss", "dog", "owl", "eel"]
    assert named(names, [0, 1, 2, 3]) == "cat, dog, owl and 1 more" and named(names, [0]) == "cat"
