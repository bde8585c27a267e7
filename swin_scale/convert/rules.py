"""How a foreign layout says what the official one says: tables of rules, read in both directions.

A rule names one or several official keys and the foreign keys that hold the same numbers. ``{i}`` stands for a stage,
``{i+1}`` or ``{2i+1}`` for a number that follows from it, ``{j}`` for a block, ``{p}`` for weight or bias, ``{x}`` for
any rest and ``{last}`` for the index of the last stage. Reading and writing use the same table, so a round trip gives
the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from swin_scale.convert.report import Line
from swin_scale.convert.weights import Change, Step

_HOLE = re.compile(r"\{(?:(?P<factor>\d*)i(?:\+(?P<add>\d+))?|(?P<name>j|p|x|last))\}")
_PATTERNS = {"i": r"\d{1,6}", "j": r"\d{1,6}", "p": r"weight|bias", "x": r".+", "last": r"\d{1,6}"}


@dataclass(frozen=True, eq=False)
class Rule:
    """`official` and `foreign` keys hold the same numbers; where more than the names differ, `out` makes foreign values
    of official ones, `back` the reverse, and `reason` says what is done."""

    official: tuple[str, ...]
    foreign: tuple[str, ...]
    out: Change | None = None
    back: Change | None = None
    reason: str = ""


def same(official: str, foreign: str) -> Rule:
    """One key under another name."""
    return Rule((official,), (foreign,))


def split(official: str, *foreign: str) -> Rule:
    """One official tensor whose rows are those of several foreign ones of equal length."""
    return Rule(
        (official,),
        foreign,
        out=lambda values: values[0].chunk(len(foreign)),
        back=lambda values: [torch.cat(list(values))],
        reason="one tensor here, query, key and value there",
    )


@dataclass(frozen=True, eq=False)
class Layout:
    """The keys of one foreign format (and model family)."""

    rules: tuple[Rule, ...]
    marks: Callable[[Collection[str]], bool]
    """Whether a set of keys is in this layout."""
    dropped: tuple[tuple[str, str], ...] = ()
    """(pattern, reason): foreign keys that are left out when read."""
    aliases: tuple[tuple[str, str], ...] = ()
    """(pattern, replacement): other names the format has had, put into those of the rules first."""

    def inbound(self, keys: Collection[str]) -> tuple[list[Step], list[Line]]:
        """Steps from foreign to official keys, and the lines of what is left out.

        Keys that no rule knows, and parts of a group that is not complete, keep their names for `fit` to complain of.
        """
        known: dict[str, str] = {}
        used: set[str] = set()
        dropped, steps = [], []
        for key in keys:
            if reason := next((reason for pattern, reason in self.dropped if re.search(pattern, key)), ""):
                dropped.append(Line(key, None, reason))
            else:
                known[self._current(key)] = key
        for name, key in known.items():
            if name in used:
                continue
            official, foreign, rule = next(
                (filled for filled in self._filled(name, foreign=True) if set(filled[1]) <= known.keys()),
                ((name,), (name,), None),
            )
            used.update(foreign)
            sources = tuple(known[part] for part in foreign)
            steps.append(Step(sources, official, rule.back, rule.reason) if rule else Step((key,), (key,)))
        return steps, dropped

    def official_name(self, key: str) -> str | None:
        """What a foreign key would be called officially by a rule about its name alone; None if there is none."""
        filled = self._filled(self._current(key), foreign=True)
        return next((official[0] for official, _, rule in filled if rule.out is None), None)

    def outbound(self, keys: Collection[str]) -> tuple[list[Step], list[str]]:
        """Steps from official to foreign keys, and the keys that the format has no place for."""
        last = max((int(key.split(".")[1]) for key in keys if key.startswith("layers.")), default=0)
        used: set[str] = set()
        steps, homeless = [], []
        for key in keys:
            if key in used:
                continue
            filled = next((f for f in self._filled(key, foreign=False, last=last) if set(f[0]) <= set(keys)), None)
            if filled is None:
                homeless.append(key)
            else:
                official, foreign, rule = filled
                used.update(official)
                steps.append(Step(official, foreign, rule.out, rule.reason))
        return steps, homeless

    def _current(self, key: str) -> str:
        for pattern, replacement in self.aliases:
            key = re.sub(pattern, replacement, key)
        return key

    def _filled(self, key: str, *, foreign: bool, last: int = 0) -> list[tuple[tuple[str, ...], tuple[str, ...], Rule]]:
        """The rules one of whose names on one side is `key`, with the names of both sides."""
        found = []
        for rule in self.rules:
            for template in rule.foreign if foreign else rule.official:
                values = _match(template, key)
                if values is not None:
                    values.setdefault("last", str(last))
                    names = [tuple(_put(t, values) for t in side) for side in (rule.official, rule.foreign)]
                    found.append((names[0], names[1], rule))
                    break
        return found


def _match(template: str, key: str) -> dict[str, str] | None:
    """Values of the holes with which `template` is `key`; None if there are none."""
    found = _compiled(template).fullmatch(key)
    if found is None:
        return None
    values = found.groupdict()
    hole = next((hole for hole in _HOLE.finditer(template) if hole["name"] is None), None)
    if hole is not None:
        stage, rest = divmod(int(values["i"]) - int(hole["add"] or 0), int(hole["factor"] or 1))
        if stage < 0 or rest:
            return None
        values["i"] = str(stage)
    return values


@lru_cache(maxsize=1024)
def _compiled(template: str) -> re.Pattern[str]:
    text, position = "", 0
    for hole in _HOLE.finditer(template):
        name = hole["name"] or "i"
        text += f"{re.escape(template[position : hole.start()])}(?P<{name}>{_PATTERNS[name]})"
        position = hole.end()
    return re.compile(text + re.escape(template[position:]))


def _put(template: str, values: Mapping[str, str]) -> str:
    def value(hole: re.Match[str]) -> str:
        if hole["name"] is not None:
            return values[hole["name"]]
        return str(int(values["i"]) * int(hole["factor"] or 1) + int(hole["add"] or 0))

    return _HOLE.sub(value, template)
