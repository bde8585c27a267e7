"""Golden files of the recipes, one for each directory of ``configs/``, and the defaults of all keys beside them.

``python -m tests.golden_configs.write`` renews them; read their diff before you commit it. A recipe has the keys in
which it differs from the defaults, and after an arrow what follows from them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.recipes import defaults, facts, recipes, task_defaults

HERE = Path(__file__).parent
RENEW = "python -m tests.golden_configs.write"


def texts() -> dict[str, str]:
    """Content of every golden file, by name."""
    rooms: dict[str, dict[str, Any]] = {}
    for recipe in recipes():
        rooms.setdefault(f"{recipe.room}.yaml", {})[recipe.name] = facts(recipe)
    rooms["defaults.yaml"] = {"every task": defaults(), **task_defaults()}
    return {name: "\n".join(_section(title, values) for title, values in room.items()) for name, room in rooms.items()}


def _section(title: str, values: dict[str, Any]) -> str:
    return f"{title}:\n" + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in values.items())


def main() -> None:
    """Write them all, and remove those of directories that are gone."""
    wanted = texts()
    for path in HERE.glob("*.yaml"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (HERE / name).write_text(text)


if __name__ == "__main__":
    main()
