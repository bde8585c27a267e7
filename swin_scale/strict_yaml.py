"""YAML that means what a person expects, and can do nothing but hold values."""

from __future__ import annotations

import re
from typing import Any

import yaml

from swin_scale.errors import UserError

MAX_CONFIG_BYTES = 1 << 18
MAX_DEPTH = 64
"""Levels of nesting; the parser's time grows with their square."""


class _Loader(yaml.SafeLoader):
    """SafeLoader in which 1e-3 is a float, 010, on and 12:30:00 are text, and duplicate keys are errors."""


# The class's own empty table: none of SafeLoader's resolvers apply.
_Loader.yaml_implicit_resolvers = {}


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:0|[1-9][0-9_]*)\.[0-9_]*|\.[0-9]+|(?:0|[1-9][0-9]*)(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UserError(f"line {line}: key {key!r} is not text")
        if key in mapping:
            raise UserError(f"line {line}: key {key!r} appears twice; remove one")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value.replace("_", "")))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document without tags, aliases, duplicate keys or great depth; raises UserError naming `where`."""
    if len(text) > MAX_CONFIG_BYTES:
        raise UserError(f"{where} has {len(text)} characters; a config has at most {MAX_CONFIG_BYTES}")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise UserError(f"{where} is nested deeper than {MAX_DEPTH} levels")
            place = f"{where}, line {event.start_mark.line + 1}" if event.start_mark else where
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{place}: YAML aliases are not allowed; use base:")
            tag = getattr(event, "tag", None)
            if tag is not None:
                raise UserError(f"{place}: YAML tag {tag!r} is not allowed")
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(where) else f"{where}, {message}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
