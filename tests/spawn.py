"""Run a function on several real processes, as ordinary unit tests do.

The processes are forked from a server that has torch and deepspeed imported already, so that a spawn costs a fraction
of a second; each runs with one thread, sees torchrun's variables and is killed when it outlives its time.
"""

import faulthandler
import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed", "torch._dynamo", "deepspeed", "setuptools", "numpy.ma", "swin_scale.evaluate",
     "swin_scale.engine.construct", "swin_scale.engine.record", "swin_scale.engine.saving", "swin_scale.report",
     "swin_scale.cli", "swin_scale.doctor", "swin_scale.feed", "swin_scale.saver", "swin_scale.staged",
     "tests.engine.test_engine", "tests.frozen"]
)  # fmt: skip
"""What ranks import (setuptools for DeepSpeed), but not `swin_scale.train`: tests inject faults as it is imported."""


def free_port() -> int:
    """A TCP port nobody listens on, below the range from which outgoing connections take theirs.

    Of two workers of xdist each has ports of its own: between this look and the rank that takes it lies a second.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in random.SystemRandom().sample(range(15000 + worker % 8, 32000, 8), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port among 100 tried")


def torchrun_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set for `rank` of `world` processes on this machine."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def spawn(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 180,
    env: Mapping[str, str] | None = None,
    may_die: Collection[int] = (),
) -> list[Any]:
    """Call ``function(*args)`` on `world` processes with torchrun's variables set; their results in rank order.

    `function` is a module-level function; arguments and results are pickled. `env` is added to every environment. An
    exception or death of a rank, or the timeout (s), fails the call with every rank's traceback; the ranks in
    `may_die` may end without a result, which is then their exit code.
    """
    port = free_port()
    processes, pipes = [], []
    for rank in range(world):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        environment = {**torchrun_environment(rank, world, port), **(env or {})}
        process = CONTEXT.Process(
            target=_run, args=(sender, environment, timeout, function, args), daemon=True, name=f"rank{rank}"
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    results: list[Any] = [None] * world
    failures: dict[int, str] = {}
    waiting: dict[Connection, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout
    try:
        while waiting:
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                failures.update(dict.fromkeys(waiting.values(), "no result in time"))
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    good, results[rank] = pipe.recv()
                except EOFError:
                    processes[rank].join(60)
                    good = rank in may_die
                    code = results[rank] = processes[rank].exitcode
                    if not good:
                        failures[rank] = f"ended with exit code {code} before it gave a result"
                else:
                    if not good:
                        failures[rank] = results[rank]
                if failures:  # the others are probably waiting for this one
                    deadline = min(deadline, time.monotonic() + 3)
    finally:
        for process in processes:
            process.join(0 if failures else 10)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in pipes:
            pipe.close()
    if failures:
        raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
    return results


def spawn_dist(world: int, function: Callable[..., Any], *args: Any, timeout: float = 180, **options: Any) -> list[Any]:
    """As `spawn`, but calls ``function(dist, *args)`` with an initialised `swin_scale.engine.dist.Dist` (gloo)."""
    return spawn(world, _with_dist, function, *args, timeout=timeout, **options)


def _with_dist(function: Callable[..., Any], *args: Any) -> Any:
    from swin_scale.engine.dist import init, read_env

    with init(read_env(os.environ), timeout_s=30, device="cpu") as dist:
        return function(dist, *args)


def _run(
    sender: Connection, environment: Mapping[str, str], timeout: float, function: Callable[..., Any], args: tuple
) -> None:
    os.environ.update(environment)
    # A process whose parent was killed must not wait for its peers for ever.
    faulthandler.dump_traceback_later(timeout + 10, exit=True)
    import torch

    torch.set_num_threads(1)
    try:
        message = (True, function(*args))
    except Exception:  # noqa: BLE001 - reported by the parent
        message = (False, traceback.format_exc())
    sender.send(message)
    sender.close()
