"""Whether what several ranks hold alike is alike, bit for bit: a digest of it is compared every so many steps.

Which copies there are, and for how long damage stays in them:

- ZeRO-0: parameters, their moments aside, are whole on every rank, and every rank updates its own: a flipped bit stays.
- ZeRO-1 and 2: the parameters that the forward pass reads are whole on every rank, and written anew by each update
  from the masters' owners. Damage is seen if it lies between an update and a comparison, comes back (a stuck bit), or
  is made on the way (an exchange that gave ranks different bits); what an update wiped away is not, though a gradient
  was taken with it. Frozen parameters are never written again. Masters and moments have one owner each: there is no
  copy to compare, and a damaged master is everybody's.
- ZeRO-3: none; even the small parameters that it keeps whole are gathered anew at each update.
- Experts that are spread over ranks: as above, among the ranks that hold the same ones.
- Buffers (tables of positions) are made once on every rank and never written again: each rank compares its own with
  what they were at the start, which needs nobody else and names the rank even among two.

All ranks come to the same answer. It ends the run, before anything is saved, with the exit code of a lost peer: started
again, it goes on from the newest checkpoint, and each of these was compared just before it was written.

Cost: `digest` moves about 40 bytes of device memory per element. That is 0.03 s for the 3.0e9 parameters of the largest
shipped model at 4.8 TB/s, and 0.1 s at 1.5 TB/s: at one comparison in 1,000 steps of a second or more at most 0.01 % of
the time. Between ranks, three numbers each.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from swin_scale.engine.dist import Dist
from swin_scale.engine.pieces import Fragments
from swin_scale.errors import PeerLostError

CHUNK = 1 << 22
"""Elements that are digested at a time: 64 MiB of int64 numbers beside them."""
MAX_NAMES = 8
"""Parameters that are named."""
_WORDS = {1: torch.uint8, 2: torch.int16}


class ReplicasDifferError(PeerLostError):
    """Ranks hold other bits of what they share; started again, a run goes on from its newest checkpoint."""


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """0-d int64 on the device of `tensor`: the sum of (2 i + 1) x bits of element i as an integer, modulo 2^64.

    Exact and independent of the order of summation. The weights are odd and distinct, the words at most 32 bits wide:
    so any one or two flipped bits and any two exchanged elements change it, for certain up to 2^29 elements.
    """
    words = tensor.detach().contiguous().view(-1)
    words = words.view(_WORDS.get(words.element_size(), torch.int32))
    count = words.numel()
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    weights = torch.arange(1, 2 * min(CHUNK, count) + 1, 2, dtype=torch.int64, device=words.device)
    for first in range(0, count, CHUNK):
        part = words[first : first + CHUNK].to(torch.int64)
        total += 2 * first * part.sum()
        total += part.mul_(weights[: part.numel()]).sum()
    return total


def digests(tensors: Sequence[Tensor]) -> list[int]:
    """`digest` of each, with one wait for the device."""
    if not tensors:
        return []
    found = [digest(tensor) for tensor in tensors]
    numbers: list[int] = torch.stack([value.to(found[0].device) for value in found]).tolist()
    return numbers


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Ranks that hold other bits than they should."""

    ranks: tuple[int, ...]
    """The odd ones; where no majority tells who that is, all of them."""
    hosts: tuple[str, ...]
    """Of these ranks, in the same order."""
    names: tuple[str, ...]
    """Parameters and buffers that differ."""
    certain: bool
    """Whether each of `ranks` is known to be damaged."""

    def row(self) -> dict[str, Any]:
        """As an event."""
        few = list(self.names[:MAX_NAMES])
        return {
            "ranks": list(self.ranks),
            "hosts": list(self.hosts),
            "parameters": few,
            "count": len(self.names),
            "certain": self.certain,
        }

    def __str__(self) -> str:
        more = f" and {len(self.names) - MAX_NAMES} more" if len(self.names) > MAX_NAMES else ""
        where = ", ".join(f"rank {rank} on {host}" for rank, host in zip(self.ranks, self.hosts))
        who = f"{where} differ from all others" if self.certain else f"{where} differ from each other, any may be wrong"
        return (
            f"{who} in {', '.join(self.names[:MAX_NAMES])}{more}, which must be the same bits. Nothing of it is saved. "
            "Start the same command again: it goes on from the newest checkpoint; if it comes again, leave that node "
            "out and have its memory checked (health.replicas_every=0 compares no more)"
        )


class Replicas:
    """What this rank holds as others do. Every method is called by all ranks together."""

    def __init__(self, module: nn.Module, fragments: Fragments, dist: Dist, *, every: int) -> None:
        """To be made when the weights are those to go on from; `every`: steps, 0 never compares."""
        self._module, self._fragments, self._dist, self._every = module, fragments, dist, every
        self._constants = digests(self._buffers()) if every else []

    def due(self, step: int) -> bool:
        """Whether it is time after `step` steps; before a save it always is."""
        return self._every > 0 and step % self._every == 0

    def compare(self) -> Difference | None:
        """What differs now, the same on all ranks; None if nothing does, or nothing is to be compared."""
        if not self._every:
            return None
        held = self._fragments.replicas()
        values = digests([tensor for _, tensor, _ in held])
        place = next((part.start for _, _, part in held if part is not None), 0)
        dense = [value for value, (_, _, part) in zip(values, held) if part is None]
        experts = [value for value, (_, _, part) in zip(values, held) if part is not None]
        buffers = digests(self._buffers())
        own = [_join(dense), _join([place, *experts]), place, int(buffers != self._constants)]
        rows = self._dist.all_gather_ints(own)
        verdicts = [Verdict.of(rows, 0, range(self._dist.world))]
        for start in sorted({row[2] for row in rows}):
            verdicts.append(Verdict.of(rows, 1, [rank for rank, row in enumerate(rows) if row[2] == start]))
        changed = [rank for rank, row in enumerate(rows) if row[3]]
        verdicts.append(Verdict(ranks=tuple(changed), certain=True))
        odd = sorted({rank for verdict in verdicts for rank in verdict.ranks})
        if not odd:
            return None
        names = [name for name, _ in self._module.named_buffers()]
        damaged = [name for name, now, then in zip(names, buffers, self._constants) if now != then]
        certain = all(verdict.certain for verdict in verdicts)
        return self._name(odd, certain, place, dict(zip((name for name, _, _ in held), values)), damaged)

    def _name(
        self, odd: list[int], certain: bool, place: int, values: Mapping[str, int], buffers: list[str]
    ) -> Difference:
        """Who and what it is, by every rank's digests of single parameters."""
        spread = {name for name, _, part in self._fragments.replicas() if part is not None}
        told = {"host": socket.gethostname(), "place": place, "values": dict(values), "buffers": buffers}
        facts = self._dist.gather_json("replicas", told)
        found: dict[str, Any] = {}
        if facts is not None:
            names = {name: None for fact in facts for name in fact["buffers"]}
            for name in values:
                places: dict[int, set[int]] = {}
                for fact in facts:
                    places.setdefault(fact["place"] if name in spread else 0, set()).add(fact["values"][name])
                if any(len(different) > 1 for different in places.values()):
                    names[name] = None
            found = {"names": list(names), "hosts": [facts[rank]["host"] for rank in odd]}
        found = self._dist.broadcast_json("replicas differ", found)
        return Difference(ranks=tuple(odd), hosts=tuple(found["hosts"]), names=tuple(found["names"]), certain=certain)

    def _buffers(self) -> list[Tensor]:
        return [buffer for _, buffer in self._module.named_buffers()]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Who is odd among ranks that should agree."""

    ranks: tuple[int, ...]
    certain: bool

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], column: int, ranks: Sequence[int]) -> Verdict:
        """Of `ranks`, those that do not say what most say; all of them if no value has more votes than any other."""
        votes: dict[int, list[int]] = {}
        for rank in ranks:
            votes.setdefault(rows[rank][column], []).append(rank)
        first, *others = sorted(votes.values(), key=len, reverse=True)
        if others and len(others[0]) == len(first):
            return cls(ranks=tuple(ranks), certain=False)
        return cls(ranks=tuple(sorted(rank for group in others for rank in group)), certain=True)


def _join(values: Sequence[int]) -> int:
    """63 bits that depend on all of `values` and their order."""
    return xxhash.xxh3_64_intdigest(np.array(values, np.int64).tobytes()) >> 1
