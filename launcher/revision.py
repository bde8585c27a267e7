"""Which code a run was submitted with, so that a restart with other code is seen."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_GIT_TIMEOUT_S = 30.0


def code_revision(root: Path = ROOT) -> dict[str, str | None]:
    """Package version, interpreter, git commit and, of what differs from it, a digest; None where there is no git.

    Files that git does not track count by name and content, ignored ones do not.
    """
    try:
        version: str | None = metadata.version("swin_scale")
    except metadata.PackageNotFoundError:
        version = None
    commit = _git(root, "rev-parse", "HEAD")
    return {
        "version": version,
        "python": sys.version.split()[0],
        "commit": commit.decode().strip() if commit else None,
        "dirty": _dirt(root) if commit else None,
    }


def describe(revision: dict[str, str | None]) -> str:
    """One line for people."""
    commit = (revision.get("commit") or "no git commit")[:12]
    changes = f", with changes {revision['dirty']}" if revision.get("dirty") else ""
    return f"version {revision.get('version')}, {commit}{changes}"


def _dirt(root: Path) -> str | None:
    """A short digest of what differs from the commit; None for a clean tree."""
    difference = _git(root, "diff", "HEAD", "--binary") or b""
    untracked = sorted(
        filter(None, (_git(root, "ls-files", "--others", "--exclude-standard", "-z") or b"").split(b"\0"))
    )
    if not difference and not untracked:
        return None
    digest = hashlib.sha256(difference)
    for name in untracked:
        digest.update(b"\0" + name + b"\0")
        try:
            digest.update((root / name.decode(errors="surrogateescape")).read_bytes())
        except OSError:
            continue  # gone since, or a link to nowhere
    return digest.hexdigest()[:12]


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, timeout=_GIT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
