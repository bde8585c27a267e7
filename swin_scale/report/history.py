"""What the files of a run directory say about the run: columns of numbers, events, skipped samples, config, end.

Only files are read, and every one may be missing, torn or written by somebody else: what cannot be used is left out.
A run of a million steps takes seconds and 8 bytes a number, since rows become columns while they are read.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swin_scale.goodput import Goodput
from swin_scale.goodput import read as read_goodput
from swin_scale.log import Row, iter_jsonl

COLUMNS = (
    "samples", "loss", "aux_loss", "lr", "grad_norm", "loss_scale", "skipped", "images_per_s", "data_wait_s", "step_s",
    "mem_gb", "mfu",
)  # fmt: skip
"""Numbers of a step row that are drawn or summed up."""

ROUTING = ("load_cv", "load_max", "rank_load_max", "dropped", "entropy", "dead", "confidence", "a2a_share")
"""Figures of MoE layers that are drawn, ``moe/{block}/{figure}`` in a row that ends a log interval."""

ORDINARY = frozenset({"eval", "checkpoint", "picture", "save_interval", "skipped_sample"})
"""Events of a run that goes well, and those that `skipped.jsonl` tells better."""

MAX_EVENTS = 10_000
MAX_MAPS = 500
MAX_ROUTING_ROWS = 20_000
LISTED_SKIPS = 100
_LARGEST = 1e100
_CONFIG_LINE = re.compile(r"(?P<indent> *)(?P<key>[\w.-]+):(?: (?P<value>.*?))?(?: +# (?P<origin>[^\"]*))?")


@dataclass(frozen=True, kw_only=True)
class Skips:
    """Samples that could not be used, each counted once an epoch however often its step was repeated."""

    count: int
    by_shard: tuple[tuple[str, str, int], ...]
    """(shard, reason, samples), the most frequent first."""
    first: tuple[Row, ...]
    steps: np.ndarray
    """(count,) int64, not sorted."""


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """One MoE layer in a ``routing`` event."""

    load: np.ndarray
    """(E,): share of the choices that fell on each expert."""
    dropped: np.ndarray
    """(H, W): share of choices dropped at each place of the images; (0, 0) where nothing was dropped."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What was recorded of MoE layers; empty for a dense model."""

    steps: np.ndarray
    """(n,) int64, rising: the ends of log intervals, thinned where there are very many."""
    figures: Mapping[str, Mapping[str, np.ndarray]]
    """Name of `ROUTING` -> block -> (n,) float64, NaN where there is no number."""
    maps: tuple[tuple[int, int, Mapping[str, LayerMap]], ...]
    """(first step, last step, layer by block), rising."""


@dataclass(frozen=True, kw_only=True)
class History:
    """All that a report shows."""

    directory: Path
    steps: np.ndarray
    """(n,) int64, rising; the last row of a step counts."""
    columns: Mapping[str, np.ndarray]
    """Name of `COLUMNS` -> (n,) float64, NaN where a row has no finite number."""
    repeated: int
    """Rows of steps that a resumed run did again."""
    events: tuple[Row, ...]
    """In the order in which they happened, less skipped samples."""
    skips: Skips
    routing: Routing
    config: tuple[tuple[str, str, str], ...]
    """(key, value, where it came from) as text."""
    exit: Row | None
    """`code`, `rank`, `cause`, `time`; None where the run has recorded no end."""
    checkpoints: tuple[str, ...]
    """Names of the committed checkpoints, the newest last."""
    goodput: Goodput | None
    """What became of the wall time; None without a ledger."""

    def named(self, name: str) -> list[Row]:
        """The events of one name."""
        return [event for event in self.events if event["event"] == name]


def read_history(directory: Path) -> History:
    """Read a run directory; a file that is missing is an empty one. Raises OSError for one that cannot be read."""
    steps, columns, repeated, events, routing = _read_metrics(directory / "metrics.jsonl")
    return History(
        directory=directory,
        steps=steps,
        columns=columns,
        repeated=repeated,
        events=tuple(events),
        skips=_read_skips(directory / "skipped.jsonl"),
        routing=routing.read(),
        config=read_config(_text(directory / "config.yaml")),
        exit=_read_exit(_text(directory / "exit.json")),
        checkpoints=_checkpoints(directory / "checkpoints"),
        goodput=read_goodput(directory),
    )


class _RoutingRows:
    """Routing figures on their way into columns; where they get too many, every second row is let go."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._columns: dict[str, array[float]] = {}
        self._seen, self._stride = 0, 1
        self._maps: dict[int, tuple[int, int, dict[str, LayerMap]]] = {}

    def add(self, step: int, row: Row) -> None:
        self._seen += 1
        if self._seen % self._stride:
            return
        for key, value in row.items():
            block, _, figure = key.removeprefix("moe/").rpartition("/")
            if key.startswith("moe/") and block and figure in ROUTING:
                column = self._columns.setdefault(f"{figure}/{block}", array("d"))
                column.extend([math.nan] * (len(self._steps) - len(column)))
                column.append(number(value))
        self._steps.append(step)
        if len(self._steps) >= MAX_ROUTING_ROWS:
            self._stride *= 2
            self._steps = self._steps[1::2]
            for key, column in self._columns.items():
                self._columns[key] = column[1::2]

    def add_maps(self, step: int, row: Row) -> None:
        layers, span = row.get("layers"), row.get("steps")
        first = span[0] if isinstance(span, list) and span and type(span[0]) is int else step
        if isinstance(layers, dict) and len(self._maps) < MAX_MAPS:
            found = {str(name): one for name, body in layers.items() if (one := _layer_map(body)) is not None}
            self._maps[step] = (min(max(first, 1), step), step, found)

    def read(self) -> Routing:
        steps = np.array(self._steps, dtype=np.int64)
        kept = _last_of_each(steps)
        figures: dict[str, dict[str, np.ndarray]] = {}
        for key, column in self._columns.items():
            figure, _, block = key.partition("/")
            padded = np.full(len(steps), np.nan)
            padded[: len(column)] = column
            figures.setdefault(figure, {})[block] = padded[kept]
        return Routing(steps=steps[kept], figures=figures, maps=tuple(self._maps[step] for step in sorted(self._maps)))


def _layer_map(body: Any) -> LayerMap | None:
    if not isinstance(body, dict):
        return None
    load, dropped = _table(body.get("load"), 1), _table(body.get("dropped"), 2)
    return None if load is None else LayerMap(load=load, dropped=np.zeros((0, 0)) if dropped is None else dropped)


def _table(value: Any, dimensions: int) -> np.ndarray | None:
    """A list, or a list of lists, of numbers from 0 to 1 as an array; None for anything else."""
    try:
        table = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    sound = table.ndim == dimensions and 0 < table.size <= 1 << 14 and bool(((table >= 0) & (table <= 1)).all())
    return table if sound else None


def _read_metrics(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray], int, list[Row], _RoutingRows]:
    steps = array("q")
    numbers = array("d")
    events: list[Row] = []
    routing = _RoutingRows()
    for row in iter_jsonl(path):
        step = row.get("step")
        if type(step) is not int or not 0 <= step < 1 << 53:
            continue
        if "event" in row:
            if row["event"] == "routing":
                routing.add_maps(step, row)
            elif row["event"] not in ("skipped_sample", "stragglers") and len(events) < MAX_EVENTS:
                events.append({**row, "event": str(row["event"])})
            continue
        if "moe/a2a_share" in row:
            routing.add(step, row)
        steps.append(step)
        values = [math.nan if value is None else value for value in map(row.get, COLUMNS)]
        try:
            # A million times; NaN and infinities, which JSON's reader takes for numbers, are sorted out below.
            numbers.extend(values)
        except (TypeError, OverflowError):
            del numbers[len(COLUMNS) * (len(steps) - 1) :]
            numbers.extend(map(number, values))
    kept = _last_of_each(np.array(steps, dtype=np.int64))
    table = np.frombuffer(numbers, dtype=np.float64).reshape(-1, len(COLUMNS))[kept].T
    columns = dict(zip(COLUMNS, np.clip(np.where(np.isfinite(table), table, np.nan), -_LARGEST, _LARGEST)))
    return np.array(steps, dtype=np.int64)[kept], columns, len(steps) - len(kept), events, routing


def number(value: Any) -> float:
    """`value` as a finite float, NaN for all else; numbers that no float32 reaches are brought into range."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return math.nan
    elif not isinstance(value, int):
        return math.nan
    return float(min(max(value, -_LARGEST), _LARGEST))


def _last_of_each(steps: np.ndarray) -> np.ndarray:
    """Indices that sort `steps`, with the last of every value only."""
    order = np.argsort(steps, kind="stable")
    ordered = steps[order]
    return order[np.append(ordered[1:] != ordered[:-1], True)] if len(order) else order


def _read_skips(path: Path) -> Skips:
    seen: set[tuple[str, ...]] = set()
    counts: Counter[tuple[str, str]] = Counter()
    first: list[Row] = []
    steps = array("q")
    for row in iter_jsonl(path):
        identity = tuple(str(row.get(key)) for key in ("epoch", "source", "shard", "key"))
        if identity in seen:
            continue
        seen.add(identity)
        counts[str(row.get("shard")), str(row.get("reason"))] += 1
        if len(first) < LISTED_SKIPS:
            first.append(row)
        steps.append(int(number(row.get("step", 0)) if number(row.get("step")) >= 0 else 0))
    return Skips(
        count=len(seen),
        by_shard=tuple((shard, reason, n) for (shard, reason), n in counts.most_common()),
        first=tuple(first),
        steps=np.array(steps, dtype=np.int64),
    )


def read_config(text: str) -> tuple[tuple[str, str, str], ...]:
    """(dotted key, value, origin) of each line of a resolved ``config.yaml``; lines of another form are left out."""
    rows, section = [], ""
    for line in text.splitlines():
        match = _CONFIG_LINE.fullmatch(line.rstrip())
        if match is None:
            continue
        if not match["indent"]:
            section = ""
        if match["value"] is None:
            section = f"{match['key']}."
        else:
            rows.append((section + match["key"], match["value"].strip(), match["origin"] or ""))
    return tuple(rows)


def _read_exit(text: str) -> Row | None:
    try:
        body = json.loads(text)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _checkpoints(root: Path) -> tuple[str, ...]:
    try:
        names = [entry.name for entry in root.iterdir() if re.fullmatch(r"step_\d{8,}", entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return tuple(sorted(names, key=lambda name: (len(name), name)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
