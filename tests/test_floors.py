"""The architecture, held by its imports: floors are not climbed, no circles, one home per heavy dependency."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOOR_0 = {
    "config",
    "config_check",
    "config_diff",
    "config_load",
    "end_signals",
    "disk_writer",
    "strict_yaml",
    "errors",
    "files",
    "heartbeat",
    "hashed_file",
    "host_memory",
    "goodput",
    "interval",
    "ledger",
    "recipes",
    "run_dir",
    "run_lock",
    "scores",
    "sections",
    "shards",
    "staged",
    "log",
    "labels",
    "__init__",
}
FLOOR_1 = {"models", "moe", "kernels", "checkpoint"}
FLOOR_2 = {"engine", "data", "convert", "report"}
FLOOR_3 = {
    "cli", "health", "job", "train", "ending", "feed", "room", "resume", "saver", "staged_run", "evaluate", "predictor",
    "probe", "routing", "plan", "doctor", "tasks", "bench", "__main__",
}  # fmt: skip
HOMES = {
    "deepspeed": {"swin_scale/engine/fragments.py"},
    "webdataset": {"swin_scale/data"},
    "triton": {"swin_scale/kernels"},
    "tutel": {"swin_scale/moe/tutel.py"},
    "apex": {"swin_scale/kernels/apex.py"},
}
TORCH_FREE = ("launcher", "data_prep", *(f"swin_scale.{name}" for name in FLOOR_0 - {"__init__"}), "swin_scale")


def sources():
    return sorted(p for top in ("swin_scale", "launcher", "data_prep") for p in (ROOT / top).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, *, top_level_only=False):
    """(imported module, at module level) of one file; `from a import b` counts as a.b where that is a module."""
    tree = ast.parse(path.read_text())
    found = []
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = (ROOT / (full.replace(".", "/") + ".py")).exists() or (
                    ROOT / full.replace(".", "/")
                ).is_dir()
                found.append(full if is_module else node.module)
    return found


def floor_of(module):
    top, _, rest = module.partition(".")
    if top in ("launcher", "data_prep"):
        return 0
    room = rest.partition(".")[0] or "__init__"
    for floor, rooms in enumerate((FLOOR_0, FLOOR_1, FLOOR_2, FLOOR_3)):
        if room in rooms:
            return floor
    raise AssertionError(f"{module} stands on no floor; add its room to this test")


def test_no_file_imports_from_a_higher_floor():
    climbs = []
    for path in sources():
        if path == ROOT / "swin_scale/__init__.py":
            continue  # its names are looked up on first use: test_import_of_the_package_is_light
        for imported in imports(path):
            ours = imported.partition(".")[0] in ("swin_scale", "launcher", "data_prep")
            if ours and floor_of(imported) > floor_of(module_name(path)):
                climbs.append(f"{path.relative_to(ROOT)} -> {imported}")
    assert climbs == []


def test_no_import_circles():
    names = {module_name(path): path for path in sources()}
    graph = {
        name: {i for i in imports(path, top_level_only=True) if i in names and i != name}
        for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, f"import circle: {' -> '.join([*trail, name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("dependency", HOMES)
def test_each_heavy_dependency_has_one_home(dependency):
    users = {
        path.relative_to(ROOT).as_posix()
        for path in sources()
        if any(i.partition(".")[0] == dependency for i in imports(path))
    }
    assert all(any(user == home or user.startswith(f"{home}/") for home in HOMES[dependency]) for user in users), users


def run_blocked(blocked, code):
    """Run `code` in a fresh interpreter in which importing any of `blocked` fails."""
    program = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(blocked)!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
{code}
"""
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_floor_0_launcher_and_data_prep_import_without_torch():
    modules = [module_name(p) for p in sources() if floor_of(module_name(p)) == 0]
    assert len(modules) > 8
    result = run_blocked(
        ["torch", "deepspeed", "webdataset", "triton", "tensorboard"], "\n".join(f"import {m}" for m in modules)
    )
    assert result.returncode == 0, result.stderr


def test_import_of_the_package_is_light():
    result = run_blocked([], "import swin_scale; print([m for m in ('torch', 'numpy', 'yaml') if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_checkpoint_and_convert_need_no_deepspeed():
    result = run_blocked(["deepspeed"], "import swin_scale.checkpoint, swin_scale.convert, swin_scale.models")
    assert result.returncode == 0, result.stderr


def test_help_is_quick_and_imports_no_torch():
    code = "import time; t = time.perf_counter(); import swin_scale.cli as c; c.build_parser().format_help()\n"
    code += "print(time.perf_counter() - t, [m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    result = run_blocked(["torch", "numpy"], code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split(maxsplit=1)[1].strip() == "[]"


def test_no_file_of_the_sources_is_over_400_lines():
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}
