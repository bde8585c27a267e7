"""One rank is asked to end: all leave at the same point, whichever it was, whenever, and whatever they wait for."""

import itertools
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from swin_scale.end_signals import END_SIGNALS, EndSignals
from swin_scale.engine import preempt
from swin_scale.engine.preempt import Attended, EndAgreedError, EndRequests, Poll
from swin_scale.run_dir import stop_file
from tests.spawn import spawn_dist


def until_agreed(dist, directory, asked, step_s):
    """(step, reason) at which this rank learned of it; `asked`: rank, step, and the signal or None for the file."""
    preempt.PERIOD_S = 0.2
    who, when, number = asked
    with EndSignals() as signals, EndRequests(Path(directory), dist, signals) as requests:
        poll = Poll(requests)
        for step in range(1, 1000):
            time.sleep(step_s * (1 + dist.rank))  # ranks differ in speed, and meet in the step's own sum
            if dist.rank == who and step == when:
                if number is None:
                    stop_file(Path(directory)).touch()
                else:
                    os.kill(os.getpid(), number)
                    os.kill(os.getpid(), number)  # Slurm sends SIGTERM twice at times
            dist.sum_ints([step])
            reason = poll()
            if reason is not None:
                return step, reason
    return None


@pytest.mark.fault(10, "a signal to one rank, or the stop file")
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ((1, 1, signal.SIGUSR1), "SIGUSR1 on 1 ranks"),
        ((0, 1, signal.SIGUSR2), "SIGUSR2 on 1 ranks"),
        ((0, 30, signal.SIGTERM), "SIGTERM on 1 ranks"),
        ((1, 30, None), "the stop file"),
    ],
)
def test_all_ranks_learn_of_it_after_the_same_step(tmp_path, asked, reason):
    step_s = 0.005
    learned = spawn_dist(2, until_agreed, str(tmp_path), asked, step_s)
    assert learned[0] == learned[1]
    step, words = learned[0]
    assert words == reason
    # At once in the first step, later within a period (0.2 s): 20 steps of the slower rank, and room for busy machines.
    assert step == 1 if asked[1] == 1 else 30 <= step <= 30 + 40


class Slow:
    """Batches, in the order of numbers, of which the one numbered `never` does not come, nor any after it."""

    def __init__(self, count, never=None):
        self._left, self._count, self._never, self._next = None, count, never, 0

    def arrives(self, within_s):
        if self._next != self._never:
            return True
        time.sleep(within_s)
        return False

    def __iter__(self):
        return self

    def __next__(self):
        if self._next == self._count:
            raise StopIteration
        self._next += 1
        return self._next - 1

    def stand_ins(self):
        return itertools.repeat("empty", self._count - self._next)


def evaluation(dist, directory, asked, waits):
    """Batches that this rank went through, and what ended it; rank `waits` gets no fourth one."""
    preempt.PERIOD_S = preempt.PATIENCE_S = 0.05
    seen, end = [], None
    with EndSignals() as signals, EndRequests(Path(directory), dist, signals) as requests:
        try:
            for batch in requests.attend(Slow(40, never=3 if dist.rank == waits else None)):
                seen.append(batch)
                time.sleep(0.002)
                dist.sum_ints([1])  # experts and sharded parameters make ranks wait for each other in a forward
                if dist.rank == asked and batch == 2:  # the last that all have
                    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        except EndAgreedError as agreed:
            end = str(agreed)
        return seen, end, requests.known()


@pytest.mark.fault(10, "a signal to one rank while one waits for data for ever, the other for it")
@pytest.mark.parametrize(("asked", "waits"), [(0, 0), (0, 1), (1, 0)])
def test_a_wait_for_data_is_given_up_by_all(tmp_path, asked, waits):
    """Also where the rank that is asked is deep in a collective at that time, where no handler of Python's runs."""
    learned = spawn_dist(2, evaluation, str(tmp_path), asked, waits)
    assert [end for _, end, _ in learned] == ["SIGUSR1 on 1 ranks"] * 2
    waited, other = learned[waits][0], learned[1 - waits][0]
    assert len(waited) == len(other)
    assert waited[:3] == [0, 1, 2]
    assert set(waited[3:]) == {"empty"}
    assert [known for *_, known in learned] == [True, True]


def undisturbed(dist, directory):
    with EndSignals() as signals, EndRequests(Path(directory), dist, signals) as requests:
        return list(requests.attend(Slow(5))), requests.known(), Attended(requests, Slow(1)).given_up


def test_nobody_asks(tmp_path):
    assert spawn_dist(2, undisturbed, str(tmp_path)) == [([0, 1, 2, 3, 4], False, False)] * 2


def asked_before(dist, directory, signals_before):
    with EndSignals() as signals:
        if dist.rank == 1:
            for number in signals_before:
                os.kill(os.getpid(), number)
        with EndRequests(Path(directory), dist, signals) as requests:
            dist.barrier("both are here")
            return requests.known(), requests.agreed()


def test_what_came_before_the_ranks_joined_is_known_to_all(tmp_path):
    known = spawn_dist(2, asked_before, str(tmp_path), [signal.SIGTERM, signal.SIGUSR2])
    assert known == [(True, "SIGUSR2 on 1 ranks, SIGTERM on 1 ranks")] * 2


def test_afterwards_sigterm_ends_the_process_and_a_warning_does_not(tmp_path):
    ignored, default = signal.SIG_IGN, signal.SIG_DFL
    assert spawn_dist(1, handlers, str(tmp_path)) == [[ignored, ignored, default]]


def handlers(dist, directory):
    with EndSignals() as signals, EndRequests(Path(directory), dist, signals) as requests:
        assert requests.agreed() is None
    os.kill(os.getpid(), signal.SIGUSR1)
    return [signal.getsignal(number) for number in END_SIGNALS]


def test_signals_that_were_blocked_before_are_remembered():
    """As the launcher starts its processes: what comes before they listen waits."""
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    # To this thread: the process may have others by now, which block nothing.
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    with EndSignals() as signals:
        assert signals.received == [0, 0, 1]
