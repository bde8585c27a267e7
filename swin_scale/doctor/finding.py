"""What a check says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from swin_scale.errors import DataError, UserError

Verdict = Literal["ok", "warn", "refuse"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line."""

    check: str
    verdict: Verdict
    text: str
    """What was seen."""
    fix: str = ""
    """What to do about it; empty for ok."""
    data: bool = False
    """It is about shards, so that a refusal ends in exit code 3."""

    def __str__(self) -> str:
        return f"{self.verdict:<6}  {self.check:<12}  {self.text}" + (f"; {self.fix}" if self.fix else "")


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check=check, verdict="ok", text=text)


def warn(check: str, text: str, fix: str) -> Finding:
    """A run would work, but worse than it could."""
    return Finding(check=check, verdict="warn", text=text, fix=fix)


def refuse(check: str, text: str, fix: str, *, data: bool = False) -> Finding:
    """A run would fail, or lose its work."""
    return Finding(check=check, verdict="refuse", text=text, fix=fix, data=data)


def raise_refusals(findings: Iterable[Finding]) -> None:
    """Raise UserError for the refusals among `findings`, DataError where all are about shards; nothing for none."""
    bad = [finding for finding in findings if finding.verdict == "refuse"]
    if bad:
        text = "; ".join(f"{finding.check}: {finding.text}; {finding.fix}" for finding in bad)
        raise (DataError if all(finding.data for finding in bad) else UserError)(text)
