import time

import numpy as np
import pytest
import torch

from swin_scale.bench.timing import CLAIM_PAIRS, compare, ratio_of


def recorder(log, name, seconds=0.0):
    def call():
        log.append(name)
        time.sleep(seconds)

    return call


def test_each_other_candidate_sits_in_an_abba_and_odd_rounds_run_backwards():
    log = []
    measured = compare({name: recorder(log, name) for name in "ABC"}, rounds=2, warmup=2)
    assert "".join(log) == "AABBCC" + "ABBACCA" + "ACCABBA"
    assert {name: len(pairs) for name, pairs in measured.pairs.items()} == {"B": 4, "C": 4}
    assert {name: len(times) for name, times in measured.seconds.items()} == {"A": 6, "B": 4, "C": 4}
    # The pairs of B are its neighbours: (first A, first B), (second B, the A after it).
    assert measured.pairs["B"][0] == (measured.seconds["A"][0], measured.seconds["B"][0])
    assert measured.pairs["B"][1] == (measured.seconds["A"][1], measured.seconds["B"][1])


def test_a_candidate_that_takes_twice_as_long_has_ratio_two_and_an_equal_one_has_one():
    log = []
    calls = {"ours": recorder(log, "o", 0.004), "peer": recorder(log, "p", 0.008), "again": recorder(log, "a", 0.004)}
    measured = compare(calls, rounds=12)
    slow, same = measured.ratio("peer"), measured.ratio("again")
    assert slow.lower <= slow.median <= slow.upper
    assert slow.median == pytest.approx(2, rel=0.15)
    assert same.median == pytest.approx(1, rel=0.15)
    assert not slow.is_claim
    figures = measured.as_dict()
    assert set(figures) == {"seconds", "ratios", "pairs"}
    assert figures["ratios"]["peer"]["pairs"] == len(figures["pairs"]["peer"]) == 24


def test_inner_calls_are_averaged():
    log = []
    measured = compare({"A": recorder(log, "A", 0.002), "B": recorder(log, "B")}, rounds=1, warmup=0, inner=3)
    assert "".join(log) == "AAABBBBBBAAA"
    assert 0.002 <= measured.seconds["A"][0] < 0.006


def test_bounds_of_noiseless_pairs_are_the_ratio_itself():
    ratio = ratio_of([(1.0, 1.5)] * CLAIM_PAIRS)
    assert ratio.is_claim and (ratio.lower, ratio.median, ratio.upper) == pytest.approx((1.5, 1.5, 1.5))
    assert not ratio_of([(1.0, 1.5)] * (CLAIM_PAIRS - 2)).is_claim


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """150 simulated comparisons of 20 rounds with a shared drift within each round: about 95 % of intervals cover."""
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(150):
        drift = np.repeat(generator.normal(0, 0.05, 20), 2)
        b = 1.2 * np.exp(drift + generator.normal(0, 0.1, 40))
        ratio = ratio_of([(1.0, float(t)) for t in b])
        covered += ratio.lower <= 1.2 <= ratio.upper
    assert 0.88 <= covered / 150 <= 0.99


def test_an_outlier_does_not_move_the_ratio():
    pairs = [(1.0, 2.0)] * 38 + [(1.0, 100.0), (50.0, 2.0)]
    assert ratio_of(pairs).median == pytest.approx(2.0)


def test_garbage_collection_is_off_while_timing_and_back_on_after():
    import gc

    seen = []
    compare({"A": lambda: seen.append(gc.isenabled()), "B": lambda: None}, rounds=1, warmup=0)
    assert seen == [False, False] and gc.isenabled()


def test_device_without_cuda_is_timed_by_the_wall_clock():
    measured = compare({"A": lambda: time.sleep(0.002), "B": lambda: None}, rounds=1, device=torch.device("cpu"))
    assert min(measured.seconds["A"]) >= 0.002
