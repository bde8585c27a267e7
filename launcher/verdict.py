"""Which rank made a run hang, judged from what the watchdogs of all ranks say: a pure function, for every case a test.

When one rank hangs, all do: the others wait for it in a collective. The one to blame is, the surest sign first: a rank
whose watchdog is silent too, so that its machine is frozen or lost; one whose process is stopped; one that waits for a
stopped loader worker; the one that is furthest behind; of those equally far, the one that is in no collective.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

MAX_NAMED = 16
_TOGETHER = ("sync", "all_to_all")
"""Sections in which a rank does nothing but wait for others."""
_BELOW = {"data": "a loader worker", "evaluation": "a loader worker", "checkpoint": "a writer"}
"""Sections in which a rank waits for processes of its own."""


@dataclass(frozen=True, kw_only=True)
class Sign:
    """What the watchdog of a rank says of it."""

    rank: int
    host: str
    pid: int
    section: str | None
    """None between sections."""
    step: int
    """Steps done."""
    count: int = 0
    """Changes of section so far."""
    quiet_s: float = 0.0
    """Seconds without a change."""
    late: bool = False
    """That is longer than it may be."""
    state: str = "S"
    """The letter of ps(1); empty when the process is gone."""
    waiting: bool = False
    """Its stack shows that it waits for other ranks."""
    stopped: tuple[int, ...] = ()
    """Processes below it that are stopped."""
    ended: bool = False
    """It said goodbye."""

    @classmethod
    def parse(cls, text: bytes) -> Sign | None:
        """From JSON; None when it is not whole yet."""
        try:
            fields = json.loads(text)
            return cls(**{**fields, "stopped": tuple(fields["stopped"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def dump(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @property
    def place(self) -> str:
        """Where it is, in words."""
        where = "between sections" if self.section is None else f"in section {self.section}"
        return f"{where} after step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Who is to blame, and one line that says why."""

    text: str
    ranks: tuple[int, ...] = ()
    """Empty: no rank more than another, or nothing that must end the run."""
    host: str | None = None
    """Of the first of `ranks`."""
    section: str | None = None
    step: int = 0
    fatal: bool = True
    """The run has to end; if not, what hung went on by itself."""
    reachable: bool = True
    """The ranks to blame can be ended by their watchdogs, which tells the others."""

    def dump(self) -> bytes:
        """As JSON; `rank` is there when one is to blame."""
        body: dict[str, Any] = dataclasses.asdict(self)
        body["verdict"] = body.pop("text")
        if self.ranks:
            body["rank"] = self.ranks[0]
        return json.dumps(body, indent=1).encode()

    @classmethod
    def parse(cls, raw: bytes) -> Verdict | None:
        """From `dump`; None when it is not whole yet."""
        try:
            body = json.loads(raw)
            body.pop("rank", None)
            text, ranks = body.pop("verdict"), tuple(body.pop("ranks"))
            return cls(text=text, ranks=ranks, **body)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None


def died(sign: Sign) -> Verdict:
    """The verdict on a rank that is gone without a goodbye."""
    how = "was killed, for lack of memory (see dmesg) or from outside"
    return _blaming([sign], f"{_name([sign])} {how}, {sign.place}")


def judge(signs: Mapping[int, Sign], last_seen: Mapping[int, Sign], world: int) -> Verdict:
    """Who made the run hang.

    Args:
        signs: of the ranks whose watchdogs answered, at least one.
        last_seen: what the run directory says of ranks, for those whose watchdogs did not; `quiet_s` is its age.
    """
    gone = [sign for sign in signs.values() if not sign.state and not sign.ended]
    if gone:
        return died(gone[0]) if len(gone) == 1 else _blaming(gone, f"{_name(gone)} were killed, {gone[0].place}")
    left = {rank for rank, sign in last_seen.items() if sign.ended}
    silent = [rank for rank in range(world) if rank not in signs and rank not in left]
    if silent:
        return _silent(silent, last_seen)
    here = [sign for sign in signs.values() if not sign.ended]
    if not here:
        return Verdict(text="every rank had ended before it was known which one hung", fatal=False)
    for find, why in (
        (lambda sign: sign.state in ("T", "t"), "stopped (SIGSTOP, or a debugger)"),
        (lambda sign: sign.stopped and sign.section in _BELOW, ""),
    ):
        found = [sign for sign in here if find(sign)]
        if found:
            first = found[0]
            why = why or f"waiting for {_BELOW[str(first.section)]} that is stopped (process {_numbers(first.stopped)})"
            return _blaming(found, f"{_hung(found)}: {why}{_others(here, found)}")
    if len(here) == 1:
        [only] = here
        return _blaming(here, f"{_hung(here)}{': in uninterruptible sleep, see wchan' if only.state == 'D' else ''}")
    behind = _furthest_behind(here)
    if behind:
        return _blaming(behind, f"{_hung(behind)}{_others(here, behind)}")
    return Verdict(
        text=f"all {len(here)} ranks hung for {max(sign.quiet_s for sign in here):.0f} s {here[0].place}, none of them "
        "behind the others: a collective that does not end",
        section=here[0].section,
        step=here[0].step,
        reachable=False,
    )


def went_on(sign: Sign) -> Verdict:
    """Nobody is to blame: the rank whose watchdog called the others moved before anything was done."""
    return Verdict(
        text=f"{_name([sign])} went on by itself and is now {sign.place}; engine.hang_timeout_s is near what this run "
        "takes at times",
        section=sign.section,
        step=sign.step,
        fatal=False,
    )


def _furthest_behind(signs: list[Sign]) -> list[Sign]:
    """Those that the others wait for; empty when that is nobody."""
    least = min((sign.step, sign.count) for sign in signs)
    behind = [sign for sign in signs if (sign.step, sign.count) == least]
    busy = [sign for sign in behind if not sign.waiting and sign.section not in _TOGETHER]
    ahead = [sign for sign in signs if sign not in behind]
    if 0 < len(busy) < len(signs):
        return busy
    if not ahead:
        return []
    # Most of the ranks wait in one place, and a few are past it: these have left out a collective.
    return ahead if not busy and len(ahead) < len(behind) else behind


def _silent(ranks: list[int], last_seen: Mapping[int, Sign]) -> Verdict:
    known = [last_seen[rank] for rank in ranks if rank in last_seen]
    if not known:
        text = f"{_ranks(ranks)} never gave a sign of life: their machines are frozen, or cannot be reached"
        return Verdict(text=text, ranks=tuple(ranks), reachable=False)
    age = max(sign.quiet_s for sign in known)
    hosts = {sign.host for sign in known}
    they = "its watchdog" if len(ranks) == 1 else "their watchdogs"
    text = (
        f"{_name(known)} gave no sign of life for {age:.0f} s, nor did {they}, last seen {known[0].place}: the "
        f"machine{'s are' if len(hosts) > 1 else ' is'} frozen, or cannot be reached"
    )
    return dataclasses.replace(_blaming(known, text), ranks=tuple(ranks), reachable=False)


def _blaming(signs: list[Sign], text: str) -> Verdict:
    first = signs[0]
    ranks = tuple(sign.rank for sign in signs)
    return Verdict(text=text, ranks=ranks, host=first.host, section=first.section, step=first.step)


def _hung(signs: list[Sign]) -> str:
    return f"{_name(signs)} hung for {max(sign.quiet_s for sign in signs):.0f} s {signs[0].place}"


def _others(signs: list[Sign], blamed: list[Sign]) -> str:
    """Where most of the others are."""
    others = [sign for sign in signs if sign not in blamed]
    if not others:
        return ""
    places = [sign.place for sign in others]
    place = max(places, key=places.count)
    return f"; {_ranks([sign.rank for sign in others if sign.place == place])} waited {place}"


def _name(signs: list[Sign]) -> str:
    hosts = list(dict.fromkeys(sign.host for sign in signs))
    named = ", ".join(hosts[:MAX_NAMED]) + (f" and {len(hosts) - MAX_NAMED} more" if len(hosts) > MAX_NAMED else "")
    return f"{_ranks([sign.rank for sign in signs])} on {named}"


def _ranks(ranks: Collection[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_numbers(ranks)}"


def _numbers(numbers: Collection[int]) -> str:
    shown = ", ".join(map(str, sorted(numbers)[:MAX_NAMED]))
    return shown + (f" and {len(numbers) - MAX_NAMED} more" if len(numbers) > MAX_NAMED else "")
