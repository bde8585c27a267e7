"""This rank's half of a save in the background: memory to copy its state into, and the process that writes it.

The buffer holds the file byte for byte, header included. It is allocated once, shared with the writer by file
descriptor and not by name, so nothing is left behind by a kill and the size of ``/dev/shm`` is no limit; its pages are
touched, and on a GPU pinned, before the first save. While the writer reads it, nobody may copy into it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import logging
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from swin_scale.checkpoint import RankFile, RankLayout
from swin_scale.disk_writer import IGNORED
from swin_scale.errors import CheckpointError
from swin_scale.host_memory import free_memory

logger = logging.getLogger(__name__)

ROOM_SHARE = 0.8
"""Of the memory that is free, the buffers of a machine's ranks may take this part."""
PIECE_BYTES = 8 << 20
"""Most bytes that one thread copies at a time; of larger pieces the last one is waited for by the others."""
KILL_S = 5.0
"""How long a writer that was killed may take to end; one that waits for a disk that does not answer never does."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a file: its summary and the seconds it took, or why there is none."""

    file: RankFile | None = None
    seconds: float = 0.0
    problem: str | None = None


def no_room(size: int, local_world: int) -> str | None:
    """Why a machine cannot have a buffer of `size` bytes for each of its ranks; None if it can."""
    if not hasattr(os, "memfd_create"):
        return f"{sys.platform} has no memory that two processes share without a name"
    free = free_memory()
    if free is not None and size * local_world > ROOM_SHARE * free:
        return (
            f"{local_world} staging buffers of {size / 1e9:.2f} GB are more than {ROOM_SHARE:.0%} of the "
            f"{free / 1e9:.2f} GB of memory that are free"
        )
    return None


class Staging:
    """A buffer of fixed size and its writer, one file at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Allocate `size` bytes for copies from `device`; raises OSError where there is no such memory."""
        self.size = size
        self._device = device
        self._descriptor = os.memfd_create("swin_scale staging")
        try:
            os.posix_fallocate(self._descriptor, 0, size)  # an error here, not a SIGBUS at the first write
            self._map = mmap.mmap(self._descriptor, size)
        except OSError:
            os.close(self._descriptor)
            raise
        self._buffer = torch.frombuffer(self._map, dtype=torch.uint8)
        self._buffer[:: mmap.PAGESIZE] = 0
        self._pinned = device.type == "cuda" and _pin(self._buffer)
        self._writer: subprocess.Popen[bytes] | None = None
        self._layout: RankLayout | None = None
        self._said = b""

    @property
    def writing(self) -> bool:
        """Whether the buffer is the writer's now."""
        return self._layout is not None

    def prepare(self) -> None:
        """Have a writer that waits for work; raises CheckpointError where one that was killed has not ended yet."""
        if self._writer is not None and self._writer.poll() is None and not self.writing:
            return
        self.drop()
        # What is blocked here stays so in the new process until it ignores it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            self._writer = subprocess.Popen(
                [sys.executable, "-m", "swin_scale.disk_writer", *map(str, (self._descriptor, self.size, os.getpid()))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                cwd=Path(__file__).resolve().parents[2],  # from where this package can be imported, installed or not
                pass_fds=(self._descriptor,),
            )
        except OSError as error:
            raise CheckpointError(f"no process for writing checkpoints can be started: {error.strerror}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self._writer.stdout is not None
        os.set_blocking(self._writer.stdout.fileno(), False)

    def copy(self, layout: RankLayout) -> None:
        """Copy the file of `layout` into the buffer; returns when all of it is there."""
        assert not self.writing and layout.bytes <= self.size
        self._map[: len(layout.header)] = layout.header
        plain: list[tuple[int, int, int]] = []
        for name, tensor in layout.tensors:
            begin, size = layout.offsets[name], tensor.numel() * tensor.element_size()
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                plain += _pieces(self._buffer.data_ptr() + begin, tensor.data_ptr(), size)
            else:
                self._buffer[begin : begin + size].view(tensor.dtype).copy_(tensor, non_blocking=True)
        _move(plain, torch.get_num_threads())
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def write(self, directory: Path, layout: RankLayout) -> None:
        """Have what was copied written to its file in `directory`; raises CheckpointError for a writer that is gone."""
        writer = self._writer
        assert writer is not None and writer.stdin is not None and not self.writing
        path = os.path.abspath(directory / layout.name)
        job = {"path": path, "bytes": layout.bytes, "since": time.monotonic()}
        try:
            writer.stdin.write(json.dumps(job).encode() + b"\n")
        except OSError as error:
            raise CheckpointError(f"{layout.name}: {_gone(writer)}") from error
        self._layout, self._said = layout, b""

    def poll(self) -> Answer | None:
        """The writer's answer, once it is there; does not wait for it."""
        layout, writer = self._layout, self._writer
        assert layout is not None and writer is not None and writer.stdout is not None
        try:
            said = os.read(writer.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return None
        self._said += said
        if said and not self._said.endswith(b"\n"):
            return None
        self._layout = None
        if not said:
            return Answer(problem=f"{layout.name}: {_gone(writer)}")
        answer = json.loads(self._said)
        if "problem" in answer:
            return Answer(problem=answer["problem"])
        assert answer["bytes"] == layout.bytes
        return Answer(file=layout.written(answer["xxh3_128"]), seconds=answer["seconds"])

    def drop(self) -> None:
        """End the writer at once; what it was writing is lost. Raises CheckpointError if it outlives SIGKILL."""
        writer = self._writer
        if writer is None:
            return
        writer.kill()
        try:
            writer.wait(KILL_S)
        except subprocess.TimeoutExpired:
            raise CheckpointError(
                f"process {writer.pid}, which writes checkpoints, was killed and still waits for the disk"
            ) from None
        for stream in (writer.stdin, writer.stdout):
            assert stream is not None
            stream.close()
        self._writer = self._layout = None

    def close(self) -> None:
        """End the writer and give the memory back."""
        try:
            self.drop()
        except CheckpointError as error:
            logger.error("%s", error)
        if self._pinned:
            _unpin(self._buffer)
        del self._buffer
        with contextlib.suppress(BufferError):  # someone's view of it keeps the memory until it goes
            self._map.close()
        os.close(self._descriptor)


def _pieces(target: int, source: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(target, source, bytes) of moves of at most `PIECE_BYTES` that make up one."""
    for start in range(0, size, PIECE_BYTES):
        yield target + start, source + start, min(PIECE_BYTES, size - start)


def _move(pieces: Sequence[tuple[int, int, int]], threads: int) -> None:
    """Copy memory by `threads` threads, each of which takes the next piece when it is done with one.

    Not by torch's copy: its threads wait for each other after every tensor, which on busy cores took ten times as long,
    and what it writes goes through the cache.
    """
    left, move = iter(pieces), _mover()

    def work() -> None:
        for piece in left:  # the interpreter's lock hands out one at a time, and is let go while memory moves
            move(*piece)

    helpers = [threading.Thread(target=work, name="staging") for _ in range(min(threads, len(pieces)) - 1)]
    for helper in helpers:
        helper.start()
    try:
        work()
    finally:  # an interrupt too: nobody may write into memory that is given back
        for helper in helpers:
            helper.join()


@functools.cache
def _mover() -> Callable[[int, int, int], object]:
    """``move(target, source, bytes)``: past the cache (1.4 times as fast) where that was built, else C's own."""
    spec = importlib.util.find_spec("swin_scale.engine._stream")
    if spec is None or spec.origin is None:
        return ctypes.memmove
    try:
        move = ctypes.CDLL(spec.origin).swin_scale_stream
    except (OSError, AttributeError) as error:
        logger.debug("memory is copied through the cache: %s", error)
        return ctypes.memmove
    move.argtypes, move.restype = [ctypes.c_size_t] * 3, None
    return move


def _gone(writer: subprocess.Popen[bytes]) -> str:
    """How a writer ended whose pipe is closed."""
    code = writer.wait()
    if code >= 0:
        return f"process {writer.pid}, which was writing it, ended with exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    lack = " (by hand, or for lack of memory: see dmesg)" if code == -signal.SIGKILL else ""
    return f"process {writer.pid}, which was writing it, was killed by {name}{lack}"


def _pin(buffer: torch.Tensor) -> bool:
    """Lock the pages for the GPU's copies; without, copies take about three times as long, and nothing else changes."""
    code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
    if code:
        logger.warning("the staging buffer of %d bytes cannot be pinned (CUDA error %d)", buffer.numel(), code)
        # It stays this thread's last error, which the next launch would raise as its own: this one takes it away.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")
    return not code


def _unpin(buffer: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
