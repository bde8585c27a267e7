"""How the tokens of a run were routed: figures for each MoE layer, maps by expert and place, alarms of collapse.

`RoutingLog.add` keeps the sums of a step as tensors. `RoutingLog.flush`, once a log interval, adds them up over all
ranks in one reduction and makes numbers of them on rank 0; nothing waits for the device before.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.distributed import ProcessGroup

from swin_scale.moe.stats import LayerTally, RoutingTally, collect, largest_variation

PREFIX = "moe/"
FIGURES = (
    "load_cv", "load_max", "rank_load_max", "dropped", "dropped_worst", "entropy", "dead", "confidence", "z",
    "balance_loss", "a2a_share",
)  # fmt: skip
"""Figures of a layer, ``moe/{block}/{figure}`` in a row; see `figures`."""

DEAD_SHARE = 0.01
"""An expert is dead when it gets less than this part of an even share."""
PATIENCE = 3
"""Log intervals in a row after which a router counts as collapsed, or as recovered."""
MAPS = 50
"""Times per run that maps are written."""
MAP_SIDE = 32
"""Most rows and columns of a written map; larger ones are pooled."""


@dataclass(frozen=True, kw_only=True)
class LayerSums:
    """One layer over the S steps of an interval and all ranks, as float64 numbers."""

    tally: LayerTally
    """Of the first step: what does not change."""
    steps: np.ndarray
    """(S, 5 + 2E), the first of `moe.stats.collect`."""
    maps: np.ndarray
    """(E + H * W,), the second."""
    waited_s: float
    """Time that a rank, on average, waited in all-to-alls."""

    @property
    def routed_SE(self) -> np.ndarray:
        return self.steps[:, 5 : 5 + self.tally.num_experts]

    @property
    def kept_SE(self) -> np.ndarray:
        return self.steps[:, 5 + self.tally.num_experts :]

    @property
    def importance_E(self) -> np.ndarray:
        return self.maps[: self.tally.num_experts]

    @property
    def dropped_HW(self) -> np.ndarray:
        """Share of choices dropped at each place of the images, (H, W); (0, 0) where there are none."""
        if not self.tally.grid:
            return np.zeros((0, 0))
        dropped = self.maps[self.tally.num_experts :].reshape(self.tally.grid)
        return dropped / max(self.steps[:, 0].sum() * self.tally.top_k / dropped.size, 1.0)


def figures(layer: LayerSums, seconds: float) -> dict[str, float]:
    """`FIGURES` of an interval of `seconds`; all but `dead`, the maps' and the times' are means over its steps.

    load_cv: standard deviation over mean of the experts' choices. load_max: the largest over the mean.
    rank_load_max: the same over the ranks of an EP group, of choices computed. dropped: share of choices.
    dropped_worst: the same at the place of an image where it is largest. entropy: nats per token. dead: experts with
    less than `DEAD_SHARE` of an even share. confidence: mean largest probability. z: mean squared log-partition.
    a2a_share: time waiting in all-to-alls over the time of the steps.
    """
    tokens = np.maximum(layer.steps[:, 0], 1.0)
    routed, kept = layer.routed_SE, layer.kept_SE
    choices = np.maximum(routed.sum(1), 1.0)
    share = routed / choices[:, None]
    experts = share.shape[1]
    ranks = kept.reshape(len(kept), layer.tally.ep_size, -1).sum(2)
    total = routed.sum(0)
    return {
        "load_cv": float(np.sqrt(np.maximum(experts * (share**2).sum(1) - 1, 0)).mean()),
        "load_max": float((share.max(1) * experts).mean()),
        "rank_load_max": float((ranks.max(1) / np.maximum(ranks.mean(1), 1.0)).mean()),
        "dropped": float(((routed - kept).sum(1) / choices).mean()),
        "dropped_worst": float(layer.dropped_HW.max(initial=0.0)),
        "entropy": float((layer.steps[:, 2] / tokens).mean()),
        "dead": int((total < DEAD_SHARE * total.mean()).sum()),
        "confidence": float((layer.steps[:, 1] / tokens).mean()),
        "z": float((layer.steps[:, 3] / tokens).mean()),
        "balance_loss": float((layer.steps[:, 4] / tokens).mean()),
        "a2a_share": layer.waited_s / seconds if seconds else 0.0,
    }


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A router collapsed, or recovered."""

    name: str
    """``router_collapse`` or ``router_recovered``."""
    layer: str
    fields: Mapping[str, Any]
    problem: str


class CollapseWatch:
    """Judges each layer's figures once a log interval, and speaks when they were bad, or good again, `PATIENCE` times.

    Bad is a squared load variation above half its maximum E / K - 1, or more than half of the experts dead. With
    shares p of the load, 1 / sum(p^2) is the number of experts that share it evenly (it is E / (1 + CV^2)): the first
    bound says that fewer than the harmonic mean of K and E are left, 1.8 of 8 and 2.0 of 128 at K = 1. The second sees
    a router that keeps several experts, but only a minority.
    """

    def __init__(self) -> None:
        self._collapsed: dict[str, bool] = {}
        self._against: dict[str, int] = {}

    def judge(self, name: str, row: Mapping[str, float], experts: int, top_k: int) -> Alarm | None:
        """What there is to say about layer `name`, of so many experts and choices per token."""
        most = largest_variation(experts, top_k)
        bad = experts > top_k and (2 * row["load_cv"] ** 2 > most**2 or 2 * row["dead"] > experts)
        before = self._collapsed.get(name, False)
        self._against[name] = self._against.get(name, 0) + 1 if bad != before else 0
        if self._against[name] < PATIENCE:
            return None
        self._collapsed[name], self._against[name] = bad, 0
        what = (
            f"load CV {row['load_cv']:.2f} of at most {most:.2f}, {row['dead']:g} of {experts} experts get less than "
            f"{DEAD_SHARE:.0%} of an even share, for {PATIENCE} log intervals"
        )
        advice = "; lower optim.lr, or raise moe.aux_weight or moe.gate_noise" if bad else ""
        return Alarm(
            name="router_collapse" if bad else "router_recovered",
            layer=name,
            fields={
                "load_cv": _rounded(row["load_cv"]),
                "load_cv_max": _rounded(most),
                "dead": row["dead"],
                "experts": experts,
            },
            problem=f"the router of {name} {'has collapsed' if bad else 'has recovered'}: {what}{advice}",
        )

    def state(self) -> dict[str, list[int]]:
        """JSON for a checkpoint."""
        return {name: [int(self._collapsed.get(name, False)), n] for name, n in self._against.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up `state` of a checkpoint."""
        self._collapsed = {name: bool(pair[0]) for name, pair in state.items()}
        self._against = {name: int(pair[1]) for name, pair in state.items()}


@dataclass(frozen=True, kw_only=True)
class RoutingRecord:
    """What a log interval adds to the diary."""

    row: dict[str, float]
    """Keys for the interval's last step row."""
    alarms: list[Alarm]
    maps: dict[str, Any] | None
    """Fields of a ``routing`` event where one is due: see `describe`."""


@dataclass
class _Since:
    """Sums of one layer since the last maps."""

    layer: LayerSums
    routed_E: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.routed_E = self.layer.routed_SE.sum(0)

    def add(self, layer: LayerSums) -> None:
        self.routed_E = self.routed_E + layer.routed_SE.sum(0)
        steps = np.concatenate([self.layer.steps.sum(0, keepdims=True), layer.steps.sum(0, keepdims=True)])
        waited = self.layer.waited_s + layer.waited_s
        self.layer = LayerSums(tally=layer.tally, steps=steps, maps=self.layer.maps + layer.maps, waited_s=waited)


class RoutingLog:
    """Sums of steps on their way into the diary. `add` and `flush` are called by all ranks of `group` together."""

    def __init__(self, group: ProcessGroup, *, total_steps: int) -> None:
        self._group = group
        self._rank, self._world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        self._steps: list[RoutingTally] = []
        self._since: dict[str, _Since] = {}
        self._first = 0
        self._next_maps, self._total = 0, total_steps
        self._own_s = 0.0
        self.watch = CollapseWatch()

    def add(self, step: RoutingTally) -> None:
        """Keep one step's sums."""
        self._steps.append(step)

    @contextlib.contextmanager
    def on_account(self) -> Iterator[None]:
        """Time spent in here is telemetry's too: the next row's ``moe/telemetry_s`` has it."""
        start = time.perf_counter()
        yield
        self._own_s += time.perf_counter() - start

    def flush(self, step: int, seconds: float) -> RoutingRecord | None:
        """What the steps since the last call, up to `step`, amount to; `seconds` is how long they took.

        None on other ranks than 0, and where there are no steps or no MoE layers.
        """
        start = time.perf_counter()
        steps, self._steps = self._steps, []
        if not steps or not steps[0].layers:
            return None
        vector = self._reduced(steps)
        if self._rank:
            return None
        layers = self._layers(vector.cpu().numpy(), steps)
        rows = {name: figures(layer, seconds) for name, layer in layers.items()}
        alarms = [
            alarm
            for name, row in rows.items()
            if (alarm := self.watch.judge(name, row, layers[name].tally.num_experts, layers[name].tally.top_k))
        ]
        maps = self._maps(step, len(steps), layers)
        self._own_s += time.perf_counter() - start + sum(one.seconds for one in steps)
        own_s, self._own_s = self._own_s, 0.0
        row = {f"{PREFIX}{name}/{key}": value for name, row in rows.items() for key, value in row.items()}
        row |= {f"{PREFIX}a2a_share": sum(r["a2a_share"] for r in rows.values()), f"{PREFIX}telemetry_s": own_s}
        return RoutingRecord(row={key: _rounded(value) for key, value in row.items()}, alarms=alarms, maps=maps)

    def _reduced(self, steps: list[RoutingTally]) -> torch.Tensor:
        """The sums of all ranks: of each layer those of every step, then its maps; then each layer's waiting time."""
        parts = []
        for name in steps[0].layers:
            sums, maps = collect([step.layers[name] for step in steps])
            parts += [sums.flatten(), maps]
        waited = [
            sum(waits.seconds() for step in steps for waits in step.layers[name].waits) for name in steps[0].layers
        ]
        parts.append(torch.tensor(waited, dtype=torch.float64, device=parts[0].device))
        vector = torch.cat(parts)
        if self._world > 1:
            torch.distributed.all_reduce(vector, group=self._group)
        return vector

    def _layers(self, numbers: np.ndarray, steps: list[RoutingTally]) -> dict[str, LayerSums]:
        found, at, first = {}, 0, steps[0].layers
        waited = numbers[len(numbers) - len(first) :] / self._world
        for index, (name, tally) in enumerate(first.items()):
            size = len(steps) * (5 + 2 * tally.num_experts)
            tail = tally.num_experts + math.prod(tally.grid) * bool(tally.grid)
            found[name] = LayerSums(
                tally=tally,
                steps=numbers[at : at + size].reshape(len(steps), -1),
                maps=numbers[at + size : at + size + tail],
                waited_s=float(waited[index]),
            )
            at += size + tail
        return found

    def _maps(self, step: int, steps: int, layers: Mapping[str, LayerSums]) -> dict[str, Any] | None:
        """Sum up; every so often, and at the last step, what was summed is handed out."""
        self._first = self._first or step - steps + 1
        for name, layer in layers.items():
            if name in self._since:
                self._since[name].add(layer)
            else:
                self._since[name] = _Since(layer)
        if step < self._next_maps and step != self._total:
            return None
        self._next_maps = step + max(1, self._total // MAPS)
        made = {name: describe(since.layer, since.routed_E) for name, since in self._since.items()}
        first, self._since, self._first = self._first, {}, 0
        return {"steps": [first, step], "layers": made}


def describe(layer: LayerSums, routed_E: np.ndarray) -> dict[str, Any]:
    """A layer as a ``routing`` event has it: `load` and `importance` are shares of the experts; `dropped` is the share
    of choices dropped at each place, rows of at most `MAP_SIDE` pooled places, or None where nothing was dropped."""
    tally, importance = layer.tally, layer.importance_E
    dropped = pool(layer.dropped_HW, MAP_SIDE)
    return {
        "experts": tally.num_experts,
        "top_k": tally.top_k,
        "ep_size": tally.ep_size,
        "load": [_rounded(v, 4) for v in (routed_E / max(routed_E.sum(), 1.0)).tolist()],
        "importance": [_rounded(v, 4) for v in (importance / max(importance.sum(), 1e-30)).tolist()],
        "grid": list(tally.grid),
        "dropped": [[_rounded(v, 3) for v in row] for row in dropped.tolist()] if dropped.any() else None,
    }


def pool(values: np.ndarray, side: int) -> np.ndarray:
    """Means of equal squares, the least that leave at most `side` rows and columns of a map (H, W)."""
    size = -(-max(values.shape, default=0) // side)
    if size <= 1:
        return values
    starts = [np.arange(0, length, size) for length in values.shape]
    counts = [np.diff(np.append(start, length)) for start, length in zip(starts, values.shape)]
    sums = np.add.reduceat(np.add.reduceat(values, starts[0], axis=0), starts[1], axis=1)
    return sums / np.outer(*counts)


def _rounded(value: float, digits: int = 6) -> float:
    return value if isinstance(value, int) or not math.isfinite(value) else float(f"{value:.{digits}g}")
