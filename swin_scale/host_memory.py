"""How much memory this machine, or the part of it that a container or a job is given, has left."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def free_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that can still be used without swapping; None where the system does not say.

    The least of what the kernel calls available and what every control group above this process has left under its
    limit, pages of files that it could drop counted as free.
    """
    found = [
        room
        for room in (_available(proc / "meminfo"), *(_room(group) for group in _groups(proc, cgroups)))
        if room is not None
    ]
    return min(found, default=None)


def _available(meminfo: Path) -> int | None:
    for line in _text(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _groups(proc: Path, cgroups: Path) -> list[Path]:
    """Directories of this process's control groups (version 2, and the memory controller of version 1), innermost
    first."""
    found = []
    for line in _text(proc / "self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers not in ("", "memory"):
            continue
        top = cgroups / controllers
        path = PurePosixPath(name.lstrip("/"))
        found += [top / part for part in (path, *path.parents)]
    return found


def _room(group: Path) -> int | None:
    """What is left under the limit of one group; None where there is no limit, or no such group."""
    for limit_name, used_name, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _number(_text(group / limit_name)), _number(_text(group / used_name))
        if limit is None or used is None:
            continue
        stat = dict(line.split(maxsplit=1) for line in _text(group / "memory.stat").splitlines() if " " in line)
        return max(0, limit - used + (_number(stat.get(cached, "0")) or 0))
    return None


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None  # "max" is no limit


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
