"""A run in stages: one YAML, one directory, and each stage a run of its own that starts where the one before ended.

    run: {dir: runs/progressive}
    stages:
      - {name: small, base: pretrain.yaml}
      - {name: large, base: finetune.yaml, train: {epochs: 30}}

Order of data, the later over the earlier: the stage's `base:` -> the keys that all stages share, those of the file's
`base:` below them -> the stage's own -> ``a.b=c`` for all stages -> ``stages.NAME.a.b=c`` for one -> what follows from
its place: it runs in ``INDEX_NAME`` below `run.dir`, and from the second on it starts from the stage before, unless its
own keys set `init.weights`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swin_scale.config import Config
from swin_scale.config_load import (
    STAGES,
    LoadedConfig,
    apply_overrides,
    config_from_values,
    leaves,
    load_config,
    read_tree,
    scalar,
    set_leaf,
)
from swin_scale.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage with its whole config."""

    name: str
    loaded: LoadedConfig
    follows: bool
    """It starts from the weights at the end of the stage before."""

    @property
    def directory(self) -> Path:
        """A run directory."""
        return Path(self.loaded.config.run.dir)

    @property
    def label(self) -> str:
        """Index and name, as its directory is called."""
        return self.directory.name


@dataclass(frozen=True, kw_only=True)
class Staged:
    """The stages of a run, in order."""

    directory: Path
    stages: tuple[Stage, ...]

    @property
    def configs(self) -> tuple[Config, ...]:
        """All that is to be run."""
        return tuple(stage.loaded.config for stage in self.stages)

    def dump(self) -> str:
        """YAML text that `load` reads back to the same stages, each line annotated with its origin."""
        home = scalar(str(self.directory))
        return f"run:\n  dir: {home}\nstages:\n" + "\n".join(_dump(stage) for stage in self.stages)


def _dump(stage: Stage) -> str:
    """The stage as an item of ``stages:``, less what follows from its place."""
    implied = {"run.dir", "init.weights"} if stage.follows else {"run.dir"}
    lines, section = [], ""
    for line in stage.loaded.dump().splitlines():
        name = line.partition(":")[0]
        section = section if name.startswith(" ") else name
        if f"{section}.{name.strip()}" not in implied:
            lines.append(f"  {line}\n")
    return f"# stage {stage.label}\n- name: {stage.name}\n{''.join(lines)}"


def load(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig | Staged:
    """Read a config, or a run in stages; raises UserError naming the stage and the key."""
    values, origin = read_tree(path)
    if STAGES not in values:
        return load_config(path, overrides)
    entries = _entries(values.pop(STAGES), str(path))
    common, own = _split(overrides, [str(entry["name"]) for entry in entries])
    home = _home(values, common)
    stages: list[Stage] = []
    for entry in entries:
        name = str(entry["name"])
        try:
            tree, origins = _own_tree(Path(path), entry, values, origin, first=not stages)
            lines = [line for line in common if not stages or line.partition("=")[0] != "init.weights"]
            apply_overrides(tree, origins, [*lines, *own[name]])
            stages.append(_placed(name, home, tree, origins, stages))
        except UserError as error:
            raise UserError(f"stage {name}: {error}") from error
    return Staged(directory=Path(home), stages=tuple(stages))


def _home(values: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """`run.dir` of the whole."""
    whole = copy.deepcopy(dict(values))
    apply_overrides(whole, {}, overrides)
    home = dict(leaves(whole)).get("run.dir")
    if not isinstance(home, str):
        raise UserError(f"run.dir is {home!r}; name the directory of the whole run beside {STAGES}")
    return home


def _own_tree(
    path: Path, entry: Mapping[str, Any], shared: Mapping[str, Any], shared_origin: Mapping[str, str], *, first: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """What files say of one stage: its base, the keys it shares with the others, and its own."""
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if "base" in entry:
        if not isinstance(entry["base"], str):
            raise UserError(f"base is {entry['base']!r}; name one file, relative to {path}")
        values, origin = read_tree(path.parent / entry["base"])
        if STAGES in values:
            raise UserError(f"base {entry['base']} is a run in {STAGES}; name a plain config")
    for key, value in leaves(shared):
        set_leaf(values, origin, key, copy.deepcopy(value), shared_origin.get(key, path.name), where=str(path))
    if not first:
        # Where the whole run starts from, or a recipe when it runs alone.
        if isinstance(values.get("init"), dict):
            values["init"].pop("weights", None)
        origin.pop("init.weights", None)
    for key, value in leaves({key: value for key, value in entry.items() if key not in ("name", "base")}):
        set_leaf(values, origin, key, copy.deepcopy(value), f"{path.name}, {entry['name']}", where=str(path))
    return values, origin


def _placed(name: str, home: str, values: dict[str, Any], origin: dict[str, str], before: Sequence[Stage]) -> Stage:
    """The stage after those `before` it, with what follows from that."""
    given = dict(leaves(values))
    if given["run.dir"] != home:
        raise UserError(f"run.dir is {given['run.dir']!r}; a stage runs below the run.dir of the whole, {home}")
    set_leaf(values, origin, "run.dir", str(Path(home) / f"{len(before) + 1}_{name}"), "its place")
    follows = bool(before) and "init.weights" not in given
    if follows:
        set_leaf(values, origin, "init.weights", str(before[-1].directory), f"stage {before[-1].label}")
    return Stage(name=name, loaded=config_from_values(values, origin), follows=follows)


def _entries(listed: Any, where: str) -> list[Mapping[str, Any]]:
    """The items of ``stages:``, each with a name of its own."""
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{where}: {STAGES} is {listed!r}; list the stages in order, each with a name and its keys")
    names: list[str] = []
    for i, entry in enumerate(listed, 1):
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"{where}: {STAGES}, item {i}: its name is {name!r}; give it one of letters, digits, - and _"
            )
        if name in names:
            raise UserError(f"{where}: two {STAGES} are called {name}; each needs a name of its own")
        names.append(name)
    return listed


def _split(overrides: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Those for all stages, and by name those for one."""
    common: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        head, _, rest = override.partition(".")
        if head != STAGES:
            common.append(override)
            continue
        name, dot, setting = rest.partition(".")
        if name not in own or not dot:
            raise UserError(f"override {override!r} names no stage; write {STAGES}.NAME.section.key=value with one of "
                            f"{', '.join(names)}")  # fmt: skip
        own[name].append(setting)
    return common, own
