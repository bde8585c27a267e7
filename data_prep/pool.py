"""Run one function over many jobs in processes: bounded memory, no orphans, the first failure stops the rest."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_sentinel
from typing import TypeVar

from swin_scale.errors import DataError, UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]
"""Called with (shards done, shards in all) after each shard."""


def default_workers() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0))


def map_jobs(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int | None) -> Iterator[Result]:
    """Yield `function(job)` for every job, in order of completion; `jobs` is consumed as processes become free.

    One worker means this process. Raises what `function` raises, DataError when a process dies.
    """
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise UserError(f"workers is {workers}; use 1 or more")
    if workers == 1:
        yield from map(function, jobs)
        return
    # Not fork: the caller may hold threads, and their locks would be copied in whatever state they are.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_exit_with_parent)
    pending: set[Future[Result]] = set()
    try:
        for job in jobs:
            pending.add(pool.submit(function, job))
            # Two jobs per process: one at work, one waiting.
            if len(pending) >= 2 * workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died (killed, or out of memory); run the same command again, with fewer workers if it "
            "was memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _exit_with_parent() -> None:
    """Leave when the parent is gone: an orphan would wait for work for ever, its own pipe end kept open by itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_sentinel([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
