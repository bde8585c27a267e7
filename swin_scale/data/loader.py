"""Batches from loader processes, in order, without copies: the processes write pixels into memory shared with tensors.

Every batch is cut into chunks of neighbouring slots, which any worker may do, since a sample's pixels depend on its id
alone. Hence the number of workers changes nothing but speed, and the first batch after a resume is as quick as the
machine allows. Memory is anonymous (memfd): it needs no room in /dev/shm and cannot outlive the processes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import send_handle
from typing import Any

import numpy as np
import torch

from swin_scale.data.order import EMPTY, as_bad
from swin_scale.data.worker import SIGNALS, Chunk, ChunkResult, Producer, Recipe, Skipped
from swin_scale.errors import DataError, PeerLostError, SwinScaleError
from swin_scale.files import anonymous_file

MIN_CHUNK, MAX_CHUNK = 8, 32
"""Slots per message: enough to drown its cost (0.1 ms) for tiny images, few enough to share a batch out evenly."""
MAX_ASKED = 32
"""Chunks that wait in the socket of one worker."""
CLOSE_GRACE_S = 5.0
# Not `-m`: messages must be instances of the importable classes, not of those in a second copy named __main__.
_WORKER_PROGRAM = "import sys; from swin_scale.data.worker import main; sys.exit(main())"


@dataclass(frozen=True)
class Request:
    """The slots of one global step that belong to this rank."""

    step: int
    epoch: int
    ids: np.ndarray
    copies: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)
    """Why samples are left out, by id; their ids in `ids` are coded by `as_bad`."""

    def chunk(self, memory: int, row: int, size: int) -> Chunk:
        """`size` slots from `row` on, with their own reasons: those of a whole batch could outgrow a socket."""
        ids, copies = self.ids[row : row + size], self.copies[row : row + size]
        left_out = [int(as_bad(code)) for code in ids.tolist() if code < EMPTY]
        return Chunk(self.epoch, ids, copies, memory, row, {sample: self.reasons[sample] for sample in left_out})


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's part of one global batch. Its memory is reused once no tensor refers to it any more."""

    step: int
    """Global step, 0-based over the run."""
    epoch: int
    images: torch.Tensor
    """(B, 3, H, W) uint8, zeros in empty slots."""
    labels: torch.Tensor
    """(B,) int64, -1 in empty slots."""
    ids: torch.Tensor
    """(B,) int64 global sample ids; -1 for a slot past the end of the epoch, -(id + 2) for a sample of bad content
    or left out on purpose."""
    boxes: torch.Tensor
    """(B, n, 4) int16 rows (top, left, height, width) to erase; zeros where unused."""
    noise_keys: torch.Tensor
    """(B,) int64 keys of the erasing noise."""
    masks: torch.Tensor
    """(B, H / patch, W / patch) uint8, 1 where a token is hidden, zeros in empty slots; (B, 0, 0) if not asked for."""
    skipped: list[Skipped]
    """The samples of bad content and those left out on purpose, in slot order."""
    wait_s: float
    """Seconds that the caller waited for this batch."""

    @property
    def valid(self) -> torch.Tensor:
        """(B,) bool: the slot holds an image."""
        return self.ids >= 0


@dataclass
class _Pending:
    """A batch being made: its results come in by chunk, in any order."""

    request: Request
    images: np.ndarray
    started: list[Chunk]
    results: dict[int, ChunkResult] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.results) == len(self.started)


@dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection[Any, Any]
    # (batch, chunk number) in the order they were sent; answers come in the same order.
    asked: deque[tuple[_Pending, int]] = field(default_factory=deque)


class WorkerPool:
    """Loader processes and the memory they share with this one."""

    def __init__(self, recipe: Recipe, workers: int, rows: int, *, timeout_s: float) -> None:
        """`rows`: images per batch. `timeout_s`: silence after which a worker counts as hung."""
        self._shape = (rows, 3, recipe.transform.height, recipe.transform.width)
        self._timeout_s = timeout_s
        self._silent_s = 0.0
        self._free: deque[int] = deque()
        self._memories: list[mmap.mmap] = []
        self._workers: list[_Worker] = []
        self._backlog: deque[tuple[_Pending, int]] = deque()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for _ in range(workers):
                self._workers.append(_start_worker())
            for worker in self._workers:
                self._send(worker, recipe)
            undo.pop_all()

    def memory(self) -> tuple[int, np.ndarray]:
        """Number and array, (rows, 3, H, W) uint8, of memory nobody uses; comes back when the array is collected."""
        if not self._free:
            self._grow()
        number = self._free.popleft()
        array = np.frombuffer(self._memories[number], np.uint8).reshape(self._shape)
        # Tensors keep their array alive, whichever view of them the caller holds on to.
        weakref.finalize(array, self._free.append, number).atexit = False
        return number, array

    def ask(self, pending: _Pending, number: int) -> None:
        """Have chunk `number` of a batch made."""
        self._backlog.append((pending, number))
        self._share_out()

    def collect(self, within_s: float = math.inf) -> bool:
        """Wait for at least one answer and file it; whether one came within so many seconds.

        Raises the worker's error, DataError when one ended by itself, and PeerLostError when one was killed or hangs:
        that is nothing the data are to blame for, and the same command goes on.
        """
        busy = {worker.connection: worker for worker in self._workers if worker.asked}
        patience_s = min(within_s, max(0.0, self._timeout_s - self._silent_s))
        ready = wait(busy, patience_s)
        self._silent_s = 0.0 if ready else self._silent_s + patience_s
        if not ready and self._silent_s < self._timeout_s:
            return False
        if not ready:
            pids = ", ".join(str(worker.process.pid) for worker in busy.values())
            raise PeerLostError(
                f"no loader worker (pid {pids}) answered for {self._timeout_s:.0f} s; the file system of the shards "
                f"may be stalled. Start the same command again to resume"
            )
        for worker in [worker for connection, worker in busy.items() if connection in ready]:
            try:
                answer = worker.connection.recv()
            except (EOFError, OSError) as error:
                raise self._death(worker) from error
            if isinstance(answer, SwinScaleError):
                raise answer
            pending, number = worker.asked.popleft()
            pending.results[number] = answer
        self._share_out()
        return True

    def close(self) -> None:
        """End the workers: closing their sockets is enough, unless one is stuck."""
        for worker in self._workers:
            worker.connection.close()
        deadline = time.monotonic() + CLOSE_GRACE_S
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._workers.clear()

    def _share_out(self) -> None:
        """Send chunks to the workers with the least to do. Bounded, so that neither end of a full socket blocks."""
        while self._backlog:
            worker = min(self._workers, key=lambda worker: len(worker.asked))
            if len(worker.asked) >= MAX_ASKED:
                return
            pending, number = self._backlog.popleft()
            worker.asked.append((pending, number))
            self._send(worker, pending.started[number])

    def _grow(self) -> None:
        size = int(np.prod(self._shape))
        descriptor = anonymous_file("swin_scale.batch")
        try:
            os.ftruncate(descriptor, size)
            self._memories.append(mmap.mmap(descriptor, size))
            number = len(self._memories) - 1
            for worker in self._workers:
                self._send(worker, ("memory", number, size))
                try:
                    send_handle(worker.connection, descriptor, worker.process.pid)
                except OSError as error:
                    raise self._death(worker) from error
        finally:
            os.close(descriptor)
        self._free.append(number)

    def _send(self, worker: _Worker, message: object) -> None:
        try:
            worker.connection.send(message)
        except OSError as error:
            raise self._death(worker) from error

    def _death(self, worker: _Worker) -> SwinScaleError:
        # One that fails says why, and may have ended before it was listened to, while it was sent more.
        with contextlib.suppress(EOFError, OSError):
            while worker.connection.poll():
                if isinstance(said := worker.connection.recv(), SwinScaleError):
                    return said
        try:
            code = worker.process.wait(CLOSE_GRACE_S)
        except subprocess.TimeoutExpired:
            return PeerLostError(f"loader worker {worker.process.pid} closed its connection")
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (out of memory? lower data.workers or data.prefetch)"
        else:
            how = f"ended with code {code}; its traceback is in this log"
        kind = PeerLostError if code < 0 else DataError
        return kind(f"loader worker {worker.process.pid} {how}. Start the same command again to resume")


def _start_worker() -> _Worker:
    ours, theirs = Pipe()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Blocked signals stay blocked across exec, so none can end the worker before it has decided to ignore them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER_PROGRAM, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    return _Worker(process, ours)


class Batches(Iterator[Batch]):
    """Iterator over batches; close it, or use it as a context manager, to end its workers."""

    def __init__(
        self, recipe: Recipe, requests: Iterator[Request], *, rows: int, workers: int, prefetch: int, timeout_s: float
    ) -> None:
        """`prefetch`: batches made ahead of the one in use. `workers` 0 makes them in this process, on demand."""
        self._recipe, self._requests, self._rows = recipe, requests, rows
        self._ahead: deque[_Pending] = deque()
        self._maker: WorkerPool | Producer = (
            WorkerPool(recipe, workers, rows, timeout_s=timeout_s) if workers else Producer(recipe)
        )
        self._chunk = min(max(-(-rows // max(1, workers)), MIN_CHUNK), MAX_CHUNK)
        # Small batches: enough of them to give every worker a chunk to do and one to come.
        self._prefetch = max(1, prefetch, -(-2 * workers * self._chunk // rows))
        # Also at interpreter exit and when the iterator is dropped half-way.
        self._finalizer = weakref.finalize(self, self._maker.close)
        self._asked_at: float | None = None

    def arrives(self, within_s: float) -> bool:
        """Whether `next` would not wait: the next batch, or the end, is there within so many seconds.

        Without workers, which make a batch when it is asked for, the answer is always yes. Raises what `next` would.
        """
        self._began()
        pool = self._maker
        if isinstance(pool, Producer):
            return True
        deadline = time.perf_counter() + within_s
        try:
            self._order(pool)
            while self._ahead and not self._ahead[0].complete:
                left = deadline - time.perf_counter()
                if left <= 0 or not pool.collect(left):
                    return False
        except SwinScaleError:
            self.close()
            raise
        return True

    def stand_ins(self) -> Iterator[Batch]:
        """Empty ones for all batches left, which come no more: for a rank that waits no longer but keeps step."""
        left = itertools.chain([pending.request for pending in self._ahead], self._requests)
        self._requests = iter(())
        self._ahead.clear()
        transform, masks = self._recipe.transform, self._recipe.mask_shape
        for request in left:
            yield Batch(
                step=request.step,
                epoch=request.epoch,
                images=torch.zeros((self._rows, 3, transform.height, transform.width), dtype=torch.uint8),
                labels=torch.full((self._rows,), -1),
                ids=torch.full((self._rows,), EMPTY),
                boxes=torch.zeros((self._rows, transform.boxes, 4), dtype=torch.int16),
                noise_keys=torch.zeros(self._rows, dtype=torch.int64),
                masks=torch.zeros((self._rows, *masks), dtype=torch.uint8),
                skipped=[],
                wait_s=0.0,
            )

    def __next__(self) -> Batch:
        began = self._began()
        self._asked_at = None
        pool = self._maker
        if isinstance(pool, Producer):
            return self._make_here(pool, began)
        try:
            self._order(pool)
            if not self._ahead:
                raise StopIteration
            while not self._ahead[0].complete:
                pool.collect()
            pending = self._ahead.popleft()
            # The caller computes on this batch next; meanwhile the workers must not run dry.
            self._order(pool)
        except (SwinScaleError, StopIteration):
            self.close()
            raise
        results = [pending.results[number] for number in range(len(pending.started))]
        return _batch(pending.request, pending.images, results, time.perf_counter() - began)

    def close(self) -> None:
        """End the workers. Batches handed out stay valid."""
        self._requests = iter(())
        self._ahead.clear()
        self._finalizer()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _began(self) -> float:
        """When the caller began to wait for the next batch."""
        self._asked_at = self._asked_at or time.perf_counter()
        return self._asked_at

    def _order(self, pool: WorkerPool) -> None:
        """Hand out requests until enough batches are being made."""
        while len(self._ahead) < self._prefetch:
            request = next(self._requests, None)
            if request is None:
                return
            number, images = pool.memory()
            chunks = [request.chunk(number, row, self._chunk) for row in range(0, self._rows, self._chunk)]
            pending = _Pending(request, images, chunks)
            self._ahead.append(pending)
            for chunk in range(len(chunks)):
                pool.ask(pending, chunk)

    def _make_here(self, producer: Producer, began: float) -> Batch:
        request = next(self._requests)
        transform = self._recipe.transform
        images = np.empty((self._rows, 3, transform.height, transform.width), np.uint8)
        result = producer.fill(Chunk(request.epoch, request.ids, request.copies, 0, 0, request.reasons), images)
        return _batch(request, images, [result], time.perf_counter() - began)


def _batch(request: Request, images: np.ndarray, results: list[ChunkResult], wait_s: float) -> Batch:
    def joined(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(result, name) for result in results]))

    return Batch(
        step=request.step,
        epoch=request.epoch,
        images=torch.from_numpy(images),
        labels=joined("labels"),
        ids=joined("ids"),
        boxes=joined("boxes"),
        noise_keys=joined("noise_keys"),
        masks=joined("masks"),
        skipped=[record for result in results for record in result.skipped],
        wait_s=wait_s,
    )
