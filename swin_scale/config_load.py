"""From YAML files and ``a.b=c`` overrides to a `Config`, with the origin of every value.

Order of data: `base:` chain of files -> the file -> overrides -> typed dataclasses -> `validate`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from swin_scale.config import Config
from swin_scale.config_check import validate
from swin_scale.errors import UserError
from swin_scale.strict_yaml import parse_yaml

MAX_BASE_DEPTH = 16
STAGES = "stages"
"""Top-level key of a run in stages, which `staged` reads."""
TASK_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "classify": {},
    "simmim": {
        "augment.crop": "resized",
        "augment.crop_scale": (0.67, 1.0),
        "augment.interpolation": "bilinear",
        "augment.auto_augment": "none",
        "augment.color_jitter": 0.0,
        "augment.reprob": 0.0,
        "augment.mixup": 0.0,
        "augment.cutmix": 0.0,
        "optim.label_smoothing": 0.0,
    },
}
"""Defaults that follow the task, over those of the dataclasses: the official transform of SimMIM, nothing of labels."""


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A validated config and where each of its values came from (``a.b`` -> file:line, override or default)."""

    config: Config
    origin: Mapping[str, str]

    @property
    def configs(self) -> tuple[Config, ...]:
        """All that is to be run; a run in stages has several."""
        return (self.config,)

    def dump(self) -> str:
        """YAML text of the resolved config, each line annotated with its origin."""
        return dump_config(self.config, self.origin)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read `path` (and what its ``base:`` names), apply ``a.b=c`` overrides, check; raises UserError."""
    values, origin = read_tree(path)
    if STAGES in values:
        raise UserError(f"{path} has {STAGES}, and one config is wanted here; name a recipe of one of them")
    apply_overrides(values, origin, overrides)
    return config_from_values(values, origin)


def read_tree(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The nested values of `path` over those of its ``base:``, and the origin of each leaf; raises UserError."""
    return _read_tree(Path(path), ())


def apply_overrides(values: dict[str, Any], origin: dict[str, str], overrides: Sequence[str]) -> None:
    """Put ``a.b=c`` over `values`, in place; raises UserError."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} is not of the form section.key=value")
        where = f"override {override!r}"
        set_leaf(values, origin, key, parse_yaml(text, f"override {key}"), "command line", where=where)


def set_leaf(
    values: dict[str, Any], origin: dict[str, str], key: str, value: Any, label: str, *, where: str = ""
) -> None:
    """Set the dotted `key`, in place; `label` is its origin, `where` what errors name, if that is another."""
    _set(values, key, value, where or label)
    _forget_below(origin, key)
    origin[key] = label


def config_from_values(values: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> LoadedConfig:
    """Build and validate a Config from nested plain values."""
    given = dict(origin or {})
    config = _build(Config, _with_task_defaults(values, given), "")
    validate(config)
    complete = {key: _origin_of(key, given) for key, _ in flatten(config)}
    return LoadedConfig(config=config, origin=complete)


def _with_task_defaults(values: Mapping[str, Any], origin: dict[str, str]) -> dict[str, Any]:
    """`values` with the defaults of their task where they leave keys unset; adds to `origin`."""
    task = values.get("task")
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key, value in TASK_DEFAULTS.get(task, {}).items() if isinstance(task, str) else ():
        section, _, name = key.partition(".")
        keys = merged.setdefault(section, {})
        if isinstance(keys, dict) and name not in keys:
            keys[name] = value
            origin[key] = f"task {task}"
    return merged


def config_from_text(text: str, where: str) -> Config:
    """Parse the resolved ``config.yaml`` of a run or checkpoint."""
    values = parse_yaml(text, where)
    if not isinstance(values, dict):
        raise UserError(f"{where} holds {type(values).__name__}, expected a mapping of sections")
    return config_from_values(values).config


def _read_tree(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The nested values of one file over those of its ``base:``, and the origin of each leaf."""
    path = path.resolve()
    if path in seen or len(seen) >= MAX_BASE_DEPTH:
        raise UserError(f"base: {path} is reached twice or nested deeper than {MAX_BASE_DEPTH}: {[*map(str, seen)]}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from error
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"config {path} holds {type(tree).__name__}, expected a mapping of sections")
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    base = tree.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base is {base!r}; name one file, relative to this one")
        values, origin = _read_tree(path.parent / base, (*seen, path))
        if STAGES in values:
            raise UserError(f"{path}: base {base} is a run in {STAGES}; name a plain config")
    for key, value in leaves(tree):
        set_leaf(values, origin, key, value, path.name, where=str(path))
    return values, origin


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping as a YAML file gives it."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set(values: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{where}: {dotted} names a key below {section!r}, which holds a plain value")
    values[last] = value


def _forget_below(origin: dict[str, str], key: str) -> None:
    for known in [k for k in origin if k == key or k.startswith(f"{key}.")]:
        del origin[known]


def _origin_of(key: str, origin: Mapping[str, str]) -> str:
    while key:
        if key in origin:
            return origin[key]
        key = key.rpartition(".")[0]
    return "default"


# -- plain values to typed dataclasses ---------------------------------------------------------------------------------


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix.rstrip('.')} is {values!r}; it is a section with keys {_names(cls)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key {prefix}{key}{_did_you_mean(f'{prefix}{key}')}")
    built = {}
    for name, spec in fields.items():
        key = f"{prefix}{name}"
        if name in values:
            hint = hints[name]
            section = dataclasses.is_dataclass(hint)
            built[name] = _build(hint, values[name], f"{key}.") if section else _convert(values[name], hint, key)
        elif dataclasses.is_dataclass(hints[name]) and spec.default_factory is dataclasses.MISSING:
            built[name] = _build(hints[name], {}, f"{key}.")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise UserError(f"{key} is missing; it has no default")
    return cls(**built)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as type `hint`, without guessing: an int serves as a float, a scalar as a list of one; nothing else."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(value, option, key)
            except UserError:
                continue
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
        if isinstance(value, str):
            near = difflib.get_close_matches(value, [str(a) for a in arguments], n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{key} is {value!r}; it is one of {', '.join(map(str, arguments))}{hint_text}")
    elif origin is tuple:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if arguments[-1] is Ellipsis:
            return tuple(_convert(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(items))
        if len(items) == len(arguments) and isinstance(value, (list, tuple)):
            return tuple(_convert(item, arguments[i], f"{key}[{i}]") for i, item in enumerate(items))
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{key} is {value!r} ({type(value).__name__}); expected {_type_name(hint)}")


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list of {_type_name(arguments[0])}"
        return f"a list of {len(arguments)} {_type_name(arguments[0])}"
    return {float: "a number", int: "a whole number", str: "text", bool: "true or false", type(None): "null"}[hint]


def _names(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def all_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the tree."""
    keys: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            keys += all_keys(hint, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _did_you_mean(key: str) -> str:
    keys = all_keys()
    sections = [f.name for f in dataclasses.fields(Config)]
    near = difflib.get_close_matches(key, keys + sections, n=3, cutoff=0.6)
    last = key.rpartition(".")[2]
    near += [k for k in keys if k.rpartition(".")[2] == last and k not in near]
    return f"; did you mean {' or '.join(near[:3])}?" if near else f"; the sections are {', '.join(sections)}"


# -- text ------------------------------------------------------------------------------------------------------------


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf, in the order of the tree."""
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", value


def dump_config(config: Config, origin: Mapping[str, str] | None = None) -> str:
    """YAML text of `config` that `load_config` reads back to an equal Config."""
    lines: list[str] = []
    section = None
    for key, value in flatten(config):
        head, _, name = key.rpartition(".")
        if head != section and head:
            lines.append(f"{head}:")
        section = head
        line = f"{'  ' if head else ''}{name}: {scalar(value)}"
        lines.append(f"{line:<60}  # {origin[key]}" if origin else line)
    return "\n".join(lines) + "\n"


def scalar(value: Any) -> str:
    """`value` as YAML."""
    if isinstance(value, tuple):
        return "[" + ", ".join(scalar(item) for item in value) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text or "e" in text else f"{text}.0"
    if isinstance(value, int):
        return str(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
