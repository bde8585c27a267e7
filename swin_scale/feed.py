"""A run's training batches on one rank, attended: started again after a rollback, given up when the run must end."""

from __future__ import annotations

from collections.abc import Iterator

from swin_scale.data import Batch, Batches
from swin_scale.engine.dist import Dist
from swin_scale.engine.guard import Guard
from swin_scale.engine.preempt import Attended, EndRequests
from swin_scale.job import Job


class Feed(Iterator[Batch]):
    """This rank's batches from a step to the last, without what is left out; can be started again from another step."""

    def __init__(self, job: Job, dist: Dist, guard: Guard, requests: EndRequests, step: int) -> None:
        self._job, self._dist, self._guard, self._requests = job, dist, guard, requests
        self._batches = self._from(step)
        self._attended = Attended(requests, self._batches)

    @property
    def given_up(self) -> bool:
        """The last batch is an empty one: this rank no longer waits for its data, as somebody asks to end."""
        return self._attended.given_up

    def restart(self, step: int) -> None:
        """Go on from `step`, without what the guard has left out since."""
        self._batches.close()
        self._batches = self._from(step)
        self._attended = Attended(self._requests, self._batches)

    def _from(self, step: int) -> Batches:
        config, dist = self._job.config, self._dist
        return self._job.stream.batches(
            step,
            stop_step=self._job.stop_step,
            rank=dist.rank,
            world=dist.world,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            timeout_s=config.engine.timeout_s,
            left_out=self._guard.left_out,
        )

    def __next__(self) -> Batch:
        return next(self._attended)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._batches.close()
