"""The shipped recipes by name, in groups: a group is a directory of ``configs/``, what a recipe is its first line."""

from __future__ import annotations

from pathlib import Path

from swin_scale.files import shipped

CONFIGS = shipped("configs")
GROUPS = {
    "": "on two CPU cores, with the digits that `make demo` writes",
    "imagenet": "classification: from scratch, pre-training on 22K, fine-tuning",
    "simmim": "masked-image pre-training, and fine-tuning from it",
    "giant": "SwinV2-G, stage by stage",
    "moe": "mixtures of experts",
    "cub": "fine-grained classification",
    "staged": "several stages in one run",
}
"""What the directories hold, in the order of the list; others follow."""


def recipes() -> dict[str, Path]:
    """Every recipe by its path below ``configs/`` without the suffix."""
    return {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in sorted(CONFIGS.rglob("*.yaml"))}


def catalogue() -> str:
    """The list of recipes, a line for each, below the name of its group."""
    names = recipes()
    width = max(map(len, names))
    rooms: dict[str, list[str]] = {room: [] for room in GROUPS}
    for name, path in names.items():
        what = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        rooms.setdefault(name.rpartition("/")[0], []).append(f"  {name:<{width}}  {what}")
    titles = {room: ": ".join(filter(None, (room or "first steps", GROUPS.get(room)))) for room in rooms}
    return "\n".join("\n".join((titles[room], *lines)) for room, lines in rooms.items() if lines)
