"""The processes of a run: joining them, and the few host-side exchanges that are not tensor collectives.

Tensors move in DeepSpeed's groups. Everything here is small host data: JSON goes through the TCPStore that the
processes met on (no collective, so a checkpoint commit or a lost peer can be handled while tensor groups are stuck),
numbers go through a gloo group. World 1 needs neither port nor network.
"""

from __future__ import annotations

import itertools
import json
import logging
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from swin_scale.engine.devices import choose_device, mismatch, place
from swin_scale.engine.layout import Layout, expand_nodelist, read_env
from swin_scale.errors import PeerLostError, UserError

__all__ = ["Dist", "Layout", "expand_nodelist", "init", "is_peer_loss", "peer_loss", "read_env"]

logger = logging.getLogger(__name__)

GOODBYE_S = 10.0
"""How long rank 0 keeps its store open for ranks that have not closed yet."""
_PEER_LOSS = (
    "gloo/transport",
    "connection closed by peer",
    "connection reset by peer",
    "timed out waiting",
    "socket timeout",
    "broken pipe",
    "nccl communicator was aborted",
    "ncclremoteerror",
    "ncclsystemerror",
)
"""Parts of the messages by which gloo, NCCL and the store report a peer, in lower case."""
_MISUSE = ("invalid usage", "invalid argument")
"""What NCCL says in its first line of a call that is wrong on this rank, and would be again."""


@dataclass(frozen=True, kw_only=True)
class Dist:
    """This process among its peers. Every method is called by all ranks, in the same order."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    backend: str
    """Backend of the default process group: `nccl` on CUDA, `gloo` on CPU."""
    store: torch.distributed.Store
    cpu_group: torch.distributed.ProcessGroup
    """gloo group of all ranks, for host-side collectives."""
    timeout_s: float
    serves_store: bool = False
    """This process is the TCPStore's server, so it must be the last to leave."""
    _calls: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def layout(self) -> Layout:
        """Where this process stands, without the way by which it joined."""
        return Layout(rank=self.rank, world=self.world, local_rank=self.local_rank, local_world=self.local_world)

    def gather_json(self, tag: str, obj: Any, timeout_s: float | None = None) -> list[Any] | None:
        """Collect one JSON value per rank on rank 0 (in rank order; None elsewhere) through the store.

        Only rank 0 waits; it raises PeerLostError naming the ranks that did not answer within `timeout_s`.
        """
        prefix = self._prefix(tag)
        if self.world == 1:
            return [json.loads(json.dumps(obj))]
        with peer_loss(f"gathering {tag!r}"):
            self.store.set(f"{prefix}/{self.rank}", json.dumps(obj))
            if not self.is_main:
                return None
            keys = [f"{prefix}/{rank}" for rank in range(self.world)]
            _collect(self.store, keys, f"gathering {tag!r}", self._limit(timeout_s))
            values = [json.loads(value) for value in self.store.multi_get(keys)]
            _delete(self.store, keys)
            return values

    def broadcast_json(self, tag: str, obj: Any, timeout_s: float | None = None) -> Any:
        """Rank 0's JSON value on every rank, through the store; `obj` is ignored elsewhere."""
        prefix = self._prefix(tag)
        text = json.dumps(obj) if self.is_main else ""
        if self.world > 1:
            with peer_loss(f"broadcast of {tag!r}"):
                what = f"broadcast of {tag!r}"
                text = _publish(self.store, prefix, self.rank, self.world, text, what, self._limit(timeout_s))
        return json.loads(text)

    def key(self, tag: str) -> str:
        """A key of `store` that no other exchange uses; the same on all ranks."""
        return self._prefix(tag)

    def barrier(self, tag: str, timeout_s: float | None = None) -> None:
        """Wait through the store until all ranks arrived; PeerLostError on every rank names those that did not."""
        prefix = self._prefix(tag)
        if self.world > 1:
            with peer_loss(f"barrier {tag!r}"):
                _barrier(self.store, prefix, self.rank, self.world, f"barrier {tag!r}", self._limit(timeout_s))

    def all_agree(self, flag: bool) -> bool:
        """Whether `flag` is true on all ranks."""
        return self.sum_ints([int(not flag)])[0] == 0

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one rank."""
        return self.sum_ints([int(flag)])[0] > 0

    def sum_ints(self, values: Sequence[int]) -> list[int]:
        """Elementwise sums over the ranks, exact in int64."""
        return self._sum(torch.tensor(values, dtype=torch.int64)).tolist()

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums over the ranks in float64, added in rank order: the same bits on every rank."""
        return [sum(column) for column in zip(*self.all_gather_floats(values))]

    def all_gather_floats(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's equally long list of floats, in rank order, on every rank."""
        return self._all_gather(torch.tensor(values, dtype=torch.float64))

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's equally long list of int64 numbers, in rank order, on every rank."""
        return self._all_gather(torch.tensor(values, dtype=torch.int64))

    def close(self, *, failed: bool = False) -> None:
        """Leave the process groups. Pass `failed` on the way out of an error: then nobody is waited for."""
        if self.world > 1 and not failed:
            _say_goodbye(self.store, self.world, self.serves_store)
        # Destroying an NCCL group waits for collectives that a lost peer will never finish; exiting ends them.
        if torch.distributed.is_initialized() and not (failed and self.backend == "nccl"):
            torch.distributed.destroy_process_group()

    def __enter__(self) -> Dist:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _prefix(self, tag: str) -> str:
        return f"swin_scale/{next(self._calls)}/{tag}"

    def _limit(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else timeout_s

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            with peer_loss("summing over ranks"):
                torch.distributed.all_reduce(tensor, group=self.cpu_group)
        return tensor

    def _all_gather(self, tensor: torch.Tensor) -> list[Any]:
        if self.world == 1:
            return [tensor.tolist()]
        gathered = [torch.empty_like(tensor) for _ in range(self.world)]
        with peer_loss("gathering from ranks"):
            torch.distributed.all_gather(gathered, tensor, group=self.cpu_group)
        return [part.tolist() for part in gathered]


def init(layout: Layout, *, timeout_s: float, device: str | None = None) -> Dist:
    """Join the run: meet on a TCPStore, create the default process group (and a gloo group beside NCCL).

    `device` is `cuda` or `cpu`; unset takes CUDA when there is one. DeepSpeed finds torch.distributed initialised then.
    Raises UserError for a master name that does not resolve, a taken port, a missing or a shared device, and
    PeerLostError, naming them, when not all ranks arrive within `timeout_s` seconds or some alone have no GPU.
    """
    chosen = choose_device(layout, device)
    timeout = timedelta(seconds=timeout_s)
    serves = layout.world > 1 and layout.rank == 0 and not layout.agent_store
    store = _meet(layout, timeout_s) if layout.world > 1 else torch.distributed.HashStore()
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    with peer_loss("joining the run"):
        if layout.world > 1:
            _barrier(store, "swin_scale/hello", layout.rank, layout.world, "joining the run", timeout_s)
            _compare_devices(store, layout, chosen, timeout_s)
        torch.distributed.init_process_group(
            backend, store=store, rank=layout.rank, world_size=layout.world, timeout=timeout
        )
        cpu_group = torch.distributed.group.WORLD
        if backend != "gloo":
            cpu_group = torch.distributed.new_group(backend="gloo", timeout=timeout)
    assert cpu_group is not None
    return Dist(
        rank=layout.rank,
        world=layout.world,
        local_rank=layout.local_rank,
        local_world=layout.local_world,
        device=chosen,
        backend=backend,
        store=store,
        cpu_group=cpu_group,
        timeout_s=timeout_s,
        serves_store=serves,
    )


def is_peer_loss(error: BaseException) -> bool:
    """Whether an error of a collective or the store says that another process died or hung."""
    if isinstance(error, torch.distributed.DistBackendError):
        return not any(sign in str(error).partition("\n")[0].lower() for sign in _MISUSE)
    if isinstance(error, PeerLostError | torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _PEER_LOSS)


@contextmanager
def peer_loss(what: str) -> Iterator[None]:
    """Turn the errors by which torch reports a dead or hung peer into PeerLostError; `what` says what was going on.

    The same for an error of this rank's own GPU, such as uncorrectable memory. One that comes back on every GPU ends a
    chain of jobs too: three restarts without a newer checkpoint are its last. Too little GPU memory is a UserError.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                f"{what}: not enough GPU memory on {socket.gethostname()} ({reason}); set a smaller train.micro_batch "
                "(auto is all of a rank's share), engine.activation_checkpointing=block or a higher engine.zero_stage; "
                "`swin-scale plan --search` names what fits"
            ) from error
        if isinstance(error, torch.AcceleratorError):
            raise PeerLostError(
                f"{what}: the GPU of this rank on {socket.gethostname()} failed ({reason}); start the same command "
                "again, without that machine if it fails again"
            ) from error
        if not is_peer_loss(error):
            raise
        raise PeerLostError(f"{what}: another rank died or hung ({reason}); start the same command again") from error


# -- exchanges over the store ------------------------------------------------------------------------------------------


def _barrier(store: torch.distributed.Store, prefix: str, rank: int, world: int, what: str, timeout_s: float) -> None:
    """All ranks announce themselves to rank 0, which then lets them go; each can name who is missing."""
    keys = [f"{prefix}/{other}" for other in range(world)]
    store.set(keys[rank], "here")
    if rank == 0:
        _collect(store, keys, what, timeout_s)
    try:
        _publish(store, prefix, rank, world, "go", what, timeout_s)
    except PeerLostError:
        # Rank 0 may be waiting, as this rank did, for a third one.
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        raise _lost(what, missing or [0], timeout_s) from None
    if rank == 0:
        _delete(store, keys)


def _publish(
    store: torch.distributed.Store, prefix: str, rank: int, world: int, text: str, what: str, timeout_s: float
) -> str:
    """Rank 0 sets a text that the others wait for; whoever reads it last deletes it."""
    value, readers = f"{prefix}/value", f"{prefix}/readers"
    if rank == 0:
        store.set(value, text)
        return text
    if not _poll(store, [value], timeout_s):
        raise _lost(what, [0], timeout_s)
    text = store.get(value).decode()
    if store.add(readers, 1) == world - 1:
        _delete(store, [value, readers])
    return text


def _collect(store: torch.distributed.Store, keys: Sequence[str], what: str, timeout_s: float) -> None:
    """Wait for one key per rank; raises PeerLostError naming the ranks whose key is missing."""
    if not _poll(store, keys, timeout_s):
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if missing:
            raise _lost(what, missing, timeout_s)


def _poll(store: torch.distributed.Store, keys: Sequence[str], timeout_s: float) -> bool:
    """Wait until all keys are set; false when time ran out.

    Polls instead of `store.wait`, which cannot be interrupted by a signal and logs a stack when it times out.
    """
    deadline = time.monotonic() + timeout_s
    pause = 0.0005
    while not store.check(list(keys)):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return True


def _delete(store: torch.distributed.Store, keys: Sequence[str]) -> None:
    for key in keys:
        store.delete_key(key)


def _lost(what: str, ranks: Sequence[int], timeout_s: float) -> PeerLostError:
    names = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return PeerLostError(f"{what}: no answer from rank {names} within {timeout_s:g} s; start the same command again")


def _say_goodbye(store: torch.distributed.Store, world: int, serves: bool) -> None:
    """Tell rank 0 that the store is no longer needed here; whoever serves it waits for the others."""
    try:
        if not serves:
            store.add("swin_scale/goodbye", 1)
            return
        deadline = time.monotonic() + GOODBYE_S
        while store.add("swin_scale/goodbye", 0) < world - 1 and time.monotonic() < deadline:
            time.sleep(0.005)
    except RuntimeError as error:
        logger.debug("store gone before goodbye: %s", error)


# -- joining -----------------------------------------------------------------------------------------------------------


def _compare_devices(store: torch.distributed.Store, layout: Layout, device: torch.device, timeout_s: float) -> None:
    """Rank 0 hears what each rank computes on, and all raise what is wrong with that."""
    what, prefix = "comparing devices", "swin_scale/devices"
    keys = [f"{prefix}/{rank}" for rank in range(layout.world)]
    store.set(keys[layout.rank], json.dumps(place(device)))
    verdict = ""
    if layout.rank == 0:
        _collect(store, keys, what, timeout_s)
        error = mismatch([tuple(json.loads(value)) for value in store.multi_get(keys)])
        verdict = json.dumps(None if error is None else (isinstance(error, UserError), str(error)))
        _delete(store, keys)
    found = json.loads(_publish(store, prefix, layout.rank, layout.world, verdict, what, timeout_s))
    if found is not None:
        _say_goodbye(store, layout.world, layout.rank == 0 and not layout.agent_store)  # all hear it before it is gone
        raise (UserError if found[0] else PeerLostError)(found[1])


def _meet(layout: Layout, timeout_s: float) -> torch.distributed.Store:
    """Create (rank 0) or join (others) the TCPStore at the master address."""
    host, port = layout.master_addr, layout.master_port
    assert host is not None and port is not None, layout
    _resolve(host, min(timeout_s, 60.0))
    serves = layout.rank == 0 and not layout.agent_store

    try:
        store = torch.distributed.TCPStore(
            host, port, layout.world, is_master=serves, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {port} on {host} is in use, so rank 0 cannot serve its peers; set MASTER_PORT to a free one"
            ) from error
        raise PeerLostError(
            f"rank {layout.rank} could not reach rank 0 at {host}:{port} within {timeout_s:g} s; check that rank 0 "
            "runs and that MASTER_ADDR is reachable from this machine"
        ) from error
    # The keys of the attempt before would let ranks run past each other.
    return torch.distributed.PrefixStore(f"attempt_{layout.attempt}", store) if layout.attempt else store


def _resolve(host: str, timeout_s: float) -> None:
    """Wait until `host` resolves: TCPStore itself would retry in silence until its own timeout."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"MASTER_ADDR {host!r} does not resolve on {socket.gethostname()} ({error.strerror}); set "
                    "MASTER_ADDR to an address that every machine can reach"
                ) from error
        time.sleep(0.2)
