import pytest

from swin_scale.scores import Scores


def event(step, weights="master", **figures):
    return {"event": "eval", "step": step, "weights": weights, **figures}


def test_the_better_of_weights_and_average_counts_and_the_last_word_wins():
    scores = Scores([event(4, top1=50.0), event(4, "ema", top1=60.0), event(8, top1=55.0), {"event": "checkpoint"}])
    assert scores.figures() == {4: 60.0, 8: 55.0}
    scores.rate(4, "ema", {"top1": 40.0})
    assert scores.figures() == {4: 50.0, 8: 55.0}
    scores.rate(8, "master", {"top1": None})
    assert scores.figures() == {4: 50.0}


def test_without_labels_the_lowest_loss_is_the_best():
    scores = Scores([event(1, loss=0.5), event(2, loss=0.3), event(3, loss=float("nan"))])
    assert scores.figures() == {1: -0.5, 2: -0.3}
    assert scores.is_among_best(2, 1) and not scores.is_among_best(1, 1) and scores.is_among_best(1, 2)
    assert not scores.is_among_best(3, 9) and not scores.is_among_best(2, 0)


def test_of_equal_ones_the_earlier_is_better():
    scores = Scores([event(2, top1=1), event(1, top1=1)])
    assert scores.is_among_best(1, 1) and not scores.is_among_best(2, 1)


@pytest.mark.parametrize("back", [0, 4, 5])
def test_going_back_forgets_what_comes_again(back):
    scores = Scores([event(4, top1=1.0), event(8, top1=2.0)])
    scores.forget_after(back)
    assert list(scores.figures()) == ([4] if back else [])
