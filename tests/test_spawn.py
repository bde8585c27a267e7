"""The process helper itself: results in order, failures with their traceback, deaths that were foreseen."""

import os
import signal
import time

import pytest

from tests.spawn import spawn


def _rank_times(factor: int) -> int:
    return int(os.environ["RANK"]) * factor


def _fail_on(rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        raise ValueError("only here")
    time.sleep(600)


def _die_on(rank: int) -> str:
    if os.environ["RANK"] == str(rank):
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def test_results_in_rank_order():
    assert spawn(3, _rank_times, 10) == [0, 10, 20]


def test_a_failure_carries_its_traceback_and_does_not_wait_for_the_others():
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 0: no result in time.*rank 1: .*ValueError: only here"):
        spawn(2, _fail_on, 1, timeout=300)
    assert time.monotonic() - start < 200  # with the start of the server


def test_a_death_that_was_foreseen_is_a_result():
    assert spawn(2, _die_on, 0, may_die=[0]) == [-signal.SIGKILL, "alive"]
    with pytest.raises(AssertionError, match="rank 0: ended with exit code -9"):
        spawn(2, _die_on, 0)
