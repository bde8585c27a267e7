"""Differentiable collectives over an explicit group: a sum, and an all-to-all split in a start and a finish.

Backward issues the mirrored collectives in the mirrored order: autograd runs nodes last to first, so every rank, whose
graph is the same whatever its number of tokens, issues them in the same order too.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, Work

Waiting = Callable[[], AbstractContextManager[None]]
"""Makes what is entered while rows of other ranks are waited for."""


def all_reduce_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum of `x` over `group`. The gradient is that of the sum of all ranks' losses."""
    return _AllReduceSum.apply(x, group)


class _AllReduceSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def exchange_counts(counts: Tensor, group: ProcessGroup) -> Tensor:
    """counts: (size of group, ...) int64, row r for rank r. Returns the same shape, row r from rank r."""
    received = torch.empty_like(counts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


class Waits:
    """How long one pass of a layer, and later its backward, waited for rows of other ranks.

    On a CPU the wall clock around each wait; on a GPU a pair of events around it, that is, how long the stream stood
    still: nothing is waited for before `seconds` is asked. Recomputation under activation checkpointing is not in it.
    """

    def __init__(self, waiting: Waiting | None = None) -> None:
        """`waiting` is entered for every wait. On a GPU these are the stream's, and the host goes on at once."""
        self._waiting = waiting or nullcontext
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """What is done in here is waiting."""
        if device.type != "cuda":
            start = time.perf_counter()
            with self._waiting():
                yield
            self._seconds += time.perf_counter() - start
            return
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        with self._waiting():
            yield
        after.record()
        self._events.append((before, after))

    def seconds(self) -> float:
        """The sum; on a GPU this waits until the last event has happened."""
        for before, after in self._events:
            after.synchronize()
            self._seconds += before.elapsed_time(after) / 1e3
        self._events.clear()
        return self._seconds


class Flight:
    """Rows on their way between the ranks of a group: the first `send[0]` to rank 0, and so on.

    `start` returns at once and `finish` waits, in forward and, the roles swapped, in backward; `waits` keeps the time.
    """

    def __init__(
        self, send: Sequence[int], receive: Sequence[int], group: ProcessGroup, waits: Waits | None = None
    ) -> None:
        self._send, self._receive, self._group = list(send), list(receive), group
        self._waits = waits or Waits()
        self._work: Work | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None

    def start(self, x: Tensor) -> Tensor:
        """x: (sum(send), D). Returns a token of shape (sum(receive), D) to give to `finish`; do not read it."""
        return _Start.apply(x, self)

    def finish(self, token: Tensor) -> Tensor:
        """The received rows, (sum(receive), D), those of rank 0 first."""
        return _Finish.apply(token, self)

    def launch(self, x: Tensor, *, forward: bool) -> Tensor:
        send, receive = (self._send, self._receive) if forward else (self._receive, self._send)
        # empty_like would keep the strides of a transposed tensor.
        source, target = x.contiguous(), x.new_empty(sum(receive), x.shape[1])
        self._work = dist.all_to_all_single(target, source, receive, send, group=self._group, async_op=True)
        self._buffers = source, target  # kept until the transfer has ended
        return target

    def land(self) -> Tensor:
        assert self._work is not None and self._buffers is not None, "finished before it was started"
        with self._waits.timed(self._buffers[1].device):
            self._work.wait()
        target = self._buffers[1]
        self._work = self._buffers = None
        return target


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.launch(x, forward=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.land(), None


class _Finish(Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.land()
        return token.view_as(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.flight.launch(grad, forward=False)
        return grad, None  # only a token: its shape is what autograd expects, `_Start` returns the rows themselves
