import time

import numpy as np
import pytest

from swin_scale.bench.timing import CLAIM_PAIRS, compare, ratio_of


@pytest.fixture
def clock(monkeypatch):
    """A wall clock that only its `spend` moves, so that a busy machine cannot fail these tests."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    return spend


def recorder(log, name):
    return lambda: log.append(name)


def test_each_other_candidate_sits_in_an_abba_and_odd_rounds_run_backwards():
    log = []
    measured = compare({name: recorder(log, name) for name in "ABC"}, rounds=2, warmup=2)
    assert "".join(log) == "AABBCC" + "ABBACCA" + "ACCABBA"
    assert {name: len(pairs) for name, pairs in measured.pairs.items()} == {"B": 4, "C": 4}
    assert {name: len(times) for name, times in measured.seconds.items()} == {"A": 6, "B": 4, "C": 4}
    # The pairs of B are its neighbours: (first A, first B), (second B, the A after it).
    assert measured.pairs["B"][0] == (measured.seconds["A"][0], measured.seconds["B"][0])
    assert measured.pairs["B"][1] == (measured.seconds["A"][1], measured.seconds["B"][1])


def test_the_control_takes_part_in_even_rounds_only():
    log = []
    measured = compare({name: recorder(log, name) for name in "ABC"}, rounds=3, warmup=0, control="C")
    assert "".join(log) == "ABBACCA" + "ABBA" + "ABBACCA"
    assert {name: len(pairs) for name, pairs in measured.pairs.items()} == {"B": 6, "C": 4}


def test_a_candidate_that_takes_twice_as_long_has_ratio_two_and_an_equal_one_has_one(clock):
    generator = np.random.default_rng(0)

    def taking(seconds):
        return lambda: clock(seconds * generator.lognormal(0, 0.05))

    measured = compare({"ours": taking(0.1), "peer": taking(0.2), "again": taking(0.1)}, rounds=12)
    slow, same = measured.ratio("peer"), measured.ratio("again")
    assert slow.lower <= 2 <= slow.upper and slow.median == pytest.approx(2, rel=0.05)
    assert same.lower <= 1 <= same.upper and same.median == pytest.approx(1, rel=0.05)
    assert not slow.is_claim
    figures = measured.as_dict()
    assert set(figures) == {"seconds", "ratios", "pairs"}
    assert figures["ratios"]["peer"]["pairs"] == len(figures["pairs"]["peer"]) == 24


def test_a_machine_that_slows_down_steadily_does_not_bend_the_ratio(clock):
    """1 % slower with every call: A BB A cancels it, A before B alone would read 1 % too much."""
    calls = [0]

    def call():
        calls[0] += 1
        clock(0.1 * 1.01 ** calls[0])

    measured = compare({"A": call, "B": call}, rounds=20, warmup=0)
    assert measured.ratio("B").median == pytest.approx(1, abs=1e-6)


def test_inner_calls_are_averaged(clock):
    log = []

    def call():
        log.append("A")
        clock(len(log))

    measured = compare({"A": call, "B": recorder(log, "B")}, rounds=1, warmup=0, inner=3)
    assert "".join(log) == "AAABBBBBBAAA"
    assert measured.seconds["A"] == [2.0, 11.0]


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
