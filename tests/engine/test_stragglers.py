"""Slow ranks are found by what they do alone; noise, however wild, accuses nobody."""

import numpy as np
import pytest

from swin_scale.engine import stragglers
from swin_scale.engine.stragglers import (
    LIMITS,
    PATIENCE,
    SHOWN,
    DevicePace,
    HostPace,
    StragglerWatch,
    find_slow,
    summary,
    trimmed_mean,
)
from swin_scale.sections import Section, Sections
from tests.spawn import spawn_dist

DATA, SYNC, FORWARD, BACKWARD = (
    SHOWN.index(s) for s in (Section.DATA, Section.SYNC, Section.FORWARD, Section.BACKWARD)
)


def synchronous(data, forward, backward=0.2):
    """(ranks, len(SHOWN)) seconds of steps in which all meet after their data, and again after forward and backward.

    `data`, `forward`: (..., ranks) seconds of work.
    """
    data, forward = np.broadcast_arrays(np.asarray(data, float), np.asarray(forward, float))
    table = np.zeros((*data.shape, len(SHOWN)))
    table[..., DATA], table[..., FORWARD] = data, forward
    table[..., SYNC] = data.max(-1, keepdims=True) - data + forward.max(-1, keepdims=True) - forward
    table[..., BACKWARD] = backward
    return table


def hosts(ranks):
    return [f"node{rank // 4}" for rank in range(ranks)]


@pytest.mark.parametrize(
    ("data", "forward", "found"),
    [
        ([0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1], []),
        ([0, 0, 0, 0], [0.1, 0.1, 0.3, 0.1], [(2, "forward", 3.0)]),
        ([0, 0.3, 0, 0], [0.1, 0.1, 0.1, 0.1], [(1, "data", 3000.0)]),
        ([0, 0.4, 0, 0], [0.1, 0.1, 0.3, 0.1], [(1, "data", 4000.0), (2, "forward", 3.0)]),
        ([0, 0, 0, 0], [0.1, 0.3, 0.3, 0.1], [(1, "forward", 3.0), (2, "forward", 3.0)]),
        ([0.2, 0], [0.1, 0.1], [(0, "data", 2000.0)]),
        ([0.3] * 4, [0.1] * 4, []),  # all wait for their data: nobody is slower than others
        ([0, 0, 0, 0], [0.1, 0.1, 0.12, 0.1], []),
    ],
)
def test_the_slow_rank_is_named(data, forward, found):
    slow = find_slow(synchronous(data, forward), hosts(4), LIMITS["cpu"])
    assert [(s.rank, s.section.value, pytest.approx(s.ratio)) for s in slow] == [
        (rank, section, ratio) for rank, section, ratio in found
    ]


def test_a_gpu_that_is_a_fifth_slower_is_found_and_a_core_is_not():
    table = synchronous([0] * 8, [0.4] * 5 + [0.5] + [0.4] * 2, backward=0.6)
    [slow] = find_slow(table, hosts(8), LIMITS["cuda"])
    assert (slow.rank, slow.host, slow.section) == (5, "node1", Section.FORWARD)
    assert slow.lost == pytest.approx(0.1 / 1.1)
    assert "rank 5 on node1 is slow in forward: 0.5 s of each step, 1.2 times the median" in str(slow)
    assert find_slow(table, hosts(8), LIMITS["cpu"]) == []


def test_a_rank_that_costs_nobody_time_is_not_slow():
    """Rank 0 looks for its data while the others still write theirs, and then waits for them as well."""
    table = synchronous([0.3, 0, 0, 0], [0.1] * 4)
    table[:, SYNC] = 0.3
    assert find_slow(table, hosts(4), LIMITS["cpu"]) == []


def test_a_hiccup_is_trimmed_and_a_habit_is_not():
    steps = np.full((100, 1), 0.1)
    steps[3], steps[50:59] = 60.0, 1.0
    assert trimmed_mean(steps) == pytest.approx([0.1])
    steps[::4] = 1.0  # one of four batches comes late
    assert trimmed_mean(steps)[0] > 0.2
    assert trimmed_mean(np.array([[3.0]])) == [3.0]


def test_summary_by_section_and_host():
    table = synchronous([0, 0, 0, 0, 0.3, 0.3, 0.3, 0.5], [0.1] * 8)
    found = summary(table, hosts(8))
    assert found["sections"]["data"] == {"min": 0.0, "median": 0.15, "max": 0.5, "slowest": 7}
    assert found["hosts"] == {
        "node0": {"data": 0.0, "sync": 0.5, "forward": 0.1, "backward": 0.2},
        "node1": {"data": 0.3, "sync": 0.2, "forward": 0.1, "backward": 0.2},
    }
    assert "all_to_all" not in found["sections"]


def test_seconds_of_a_step_by_the_hosts_clock():
    now = [0.0]
    sections = Sections(clock=lambda: now[0])
    pace = HostPace(sections)
    for seconds in (1.0, 2.0):
        with sections(Section.FORWARD):
            now[0] += seconds
            with sections(Section.SYNC):
                now[0] += 0.5
        with sections(Section.RECORD):
            pace.step()
    first, second = pace.take()
    assert (first[FORWARD], first[SYNC], second[FORWARD], second[SYNC]) == (1.0, 0.5, 2.0, 0.5)
    assert pace.take().shape == (0, len(SHOWN))
    with sections(Section.DATA):
        now[0] += 9.0
    pace.restart()  # what was before is no step's
    pace.step()
    assert not pace.take().any()


class Stream:
    """A device that does work later than it is told: events are given times when the stream comes to them."""

    def __init__(self):
        self.now, self.made = 0.0, 0

    def event(self):
        self.made += 1
        return _Event(self)


class _Event:
    def __init__(self, stream):
        self.stream, self.at = stream, None

    def record(self):
        self.at = self.stream.now

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def test_seconds_of_a_step_by_the_devices_clock():
    stream, sections = Stream(), Sections()
    pace = DevicePace(sections, stream.event)
    for report in range(3):
        pace.restart()
        for seconds in (1.0, 2.0):
            with sections(Section.FORWARD):
                stream.now += seconds
                with sections(Section.SYNC):
                    stream.now += 0.5
            with sections(Section.RECORD):
                stream.now += 0.25
                pace.step()
                stream.now += 0.25
        with sections(Section.EVALUATION):
            for _ in range(100):  # says that it goes on
                stream.now += 1.0
                pace._mark(sections.current)
        first, second = pace.take()
        assert (first[FORWARD], first[SYNC], second[FORWARD], second[SYNC]) == (1.0, 0.5, 2.0, 0.5)
        record = SHOWN.index(Section.RECORD)
        assert (first[record], second[record]) == (0.25, 0.5)  # a step ends where it is counted
        if report == 0:
            made = stream.made
    assert stream.made <= made + 4  # events are used again


def noise(rng, steps, ranks):
    """Seconds of data and forward, (steps, ranks) each, as two busy cores give them.

    Recorded from ranks that shared their cores with test suites: work spreads by a third, one step in thirty is several
    times longer, and for tens of steps one rank or another has half of its core.
    """
    forward = 0.04 * rng.lognormal(0, 0.35, (steps, ranks))
    forward *= np.where(rng.random((steps, ranks)) < 0.03, rng.uniform(2, 10, (steps, ranks)), 1)
    data = 0.002 * rng.lognormal(0, 1.0, (steps, ranks))
    data += np.where(rng.random((steps, ranks)) < 0.05, rng.uniform(0, 0.2, (steps, ranks)), 0)
    for _ in range(steps // 50):
        start, length, rank = rng.integers(steps), rng.integers(5, 40), rng.integers(ranks)
        forward[start : start + length, rank] *= 2
    return data, forward


def judged(data, forward, every):
    """The rows of `slow_rank`, each time a rank begins to be slow, of steps with this work."""
    watch = StragglerWatch.__new__(StragglerWatch)
    watch._counts, watch._hosts, watch._limits = {}, hosts(data.shape[1]), LIMITS["cpu"]
    table, begun = synchronous(data, forward, backward=0.08), []
    for first in range(0, len(data) - every + 1, every):
        means = np.array([trimmed_mean(table[first : first + every, rank]) for rank in range(data.shape[1])])
        begun += watch._judge(means, every).begun
    return [(s.rank, s.section.value) for s in begun]


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
@pytest.mark.fault(14, "clean steps on noisy cores: nobody is accused")
def test_no_false_alarm_in_a_thousand_noisy_steps(ranks):
    rng = np.random.default_rng(ranks)
    for _ in range(20 if ranks < 64 else 4):
        assert judged(*noise(rng, 1000, ranks), every=100) == []


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_a_slow_rank_is_found_in_the_same_noise(ranks):
    rng = np.random.default_rng(ranks)
    for what in ("data", "forward"):
        work = dict(zip(("data", "forward"), noise(rng, 600, ranks)))
        work[what][:, 1] += 0.25
        assert judged(work["data"], work["forward"], every=100) == [(1, what)]  # once, however long


def test_one_warning_for_each_time_a_rank_turns_slow():
    data, forward = np.zeros((100, 4)), np.full((100, 4), 0.1)
    forward[10:60, 3] = forward[80:, 3] = 0.3  # in reports 1 to 5, and from 8 on
    forward[70:80, 2] = 0.3  # once is too little
    assert judged(data, forward, every=10) == [(3, "forward"), (3, "forward")]
    assert PATIENCE == 2


def watched(dist, slow, every, steps):
    """What rank 0 reports of steps with 20 ms of work, and 60 more on the rank `slow`, by a clock that nobody stops."""
    now, found = [0.0], []
    sections = Sections(clock=lambda: now[0])
    watch = StragglerWatch(sections, dist, every=every)
    watch.restart()
    for _ in range(steps):
        with sections(Section.FORWARD):
            now[0] += 0.08 if dist.rank == slow else 0.02
        with sections(Section.SYNC):
            now[0] = max(row[0] for row in dist.all_gather_floats([now[0]]))
        watch.step()
        found.append(watch.report())
    return [(report.fields, [s.row() for s in report.begun]) for report in found if report is not None]


@pytest.mark.fault(14, "one rank takes four times as long in its forward pass")
def test_ranks_compare_each_other():
    reports, *others = spawn_dist(3, watched, 2, 4, 12)
    assert others == [[], []] and len(reports) == 3
    [(_, first), (fields, [begun]), (_, third)] = reports
    assert first == third == []
    assert begun["rank"] == 2 and begun["section"] == "forward" and begun["host"] in fields["hosts"]
    assert begun["ratio"] == 4 and fields["slow"] == [begun] and fields["lost"] == begun["lost"]
    assert fields["sections"]["forward"]["slowest"] == 2
    assert spawn_dist(1, watched, 0, 4, 8) == [[]]  # nobody to compare with
    assert stragglers.TRIM < 0.25
