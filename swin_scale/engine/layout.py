"""Which process of which run this is, read from the environment: torchrun's variables, a Slurm step's, or neither.

Pure functions of a mapping: no torch, no network, so that every cluster's environment can be a test case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from swin_scale.errors import UserError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Slurm numbers the steps that no `srun` started (batch shell, interactive shell, extern, pending) from here on.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where this process stands among its peers. `master_addr` and `master_port` are unset when world is 1."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Rank among the processes on this machine."""
    local_world: int = 1
    """Processes on this machine."""
    master_addr: str | None = None
    """Name or address of rank 0's machine."""
    master_port: int | None = None
    agent_store: bool = False
    """torchrun's agent already serves the store at the master address; rank 0 joins it as a client."""
    attempt: int = 0
    """How often torchrun restarted the processes of this one machine in the store that it goes on serving."""
    source: str = "plain"
    """`plain`, `torchrun` or `slurm`: whose variables these are."""


def read_env(environ: Mapping[str, str]) -> Layout:
    """Read the layout of this process; raises UserError for partial or contradictory variables.

    torchrun's variables win, so that torchrun inside `srun` works. Slurm's count only inside a step: a batch shell has
    SLURM_PROCID=0 too, and is world 1. MASTER_ADDR and MASTER_PORT override Slurm's node list and job id.
    """
    in_step = _in_slurm_step(environ)
    if "RANK" in environ or (not in_step and any(name in environ for name in _TORCHRUN)):
        layout = _from_torchrun(environ, in_step)
    elif in_step:
        layout = _from_slurm(environ)
    else:
        layout = Layout()
    fits = layout.rank < layout.world and layout.local_rank < layout.local_world <= layout.world
    if not fits or layout.local_rank > layout.rank:
        raise UserError(
            f"{layout.source} variables contradict each other: rank {layout.rank} of {layout.world}, local rank "
            f"{layout.local_rank} of {layout.local_world}; unset what another launcher left behind"
        )
    return layout


def _from_torchrun(environ: Mapping[str, str], in_step: bool) -> Layout:
    needed = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
    if environ.get("WORLD_SIZE") != "1":
        needed += ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if name not in environ]
    if missing:
        seen = [f"{name}={environ[name]}" for name in (*_TORCHRUN, "MASTER_ADDR", "MASTER_PORT") if name in environ]
        raise UserError(
            f"the environment has {', '.join(seen)} but not {', '.join(missing)}; set all of them (torchrun and "
            "`swin-scale launch` do), or unset all of them for a single process"
        )
    world = _integer(environ, "WORLD_SIZE")
    if "LOCAL_WORLD_SIZE" in environ:
        local_world = _integer(environ, "LOCAL_WORLD_SIZE")
    elif in_step:
        local_world = _tasks_on_this_node(environ, None)
    elif world == 1:
        local_world = 1
    else:
        raise UserError("LOCAL_WORLD_SIZE is not set beside RANK and WORLD_SIZE; set it to the processes per machine")
    agent_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # Over several machines restarts are counted apart, and each round has a new store.
    same_store = agent_store and local_world == world and "TORCHELASTIC_RESTART_COUNT" in environ
    return Layout(
        rank=_integer(environ, "RANK"),
        world=world,
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_world=local_world,
        master_addr=environ["MASTER_ADDR"] if world > 1 else None,
        master_port=_port(environ) if world > 1 else None,
        agent_store=agent_store,
        attempt=_integer(environ, "TORCHELASTIC_RESTART_COUNT") if same_store else 0,
        source="torchrun",
    )


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def _from_slurm(environ: Mapping[str, str]) -> Layout:
    """A task started by `srun` (variables of sbatch(1) and srun(1), section OUTPUT ENVIRONMENT VARIABLES)."""
    world_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    world = _integer(environ, world_name)
    local_rank, local_world = _integer(environ, "SLURM_LOCALID"), _tasks_on_this_node(environ, world)
    for name, value in (("WORLD_SIZE", world), ("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", local_world)):
        if name in environ and _integer(environ, name) != value:
            raise UserError(
                f"{name}={environ[name]} contradicts this Slurm step, which gives {value}; unset {name}, or set "
                f"{', '.join(_TORCHRUN)} in each task"
            )
    master_addr = master_port = None
    if world > 1:
        master_addr = environ.get("MASTER_ADDR") or _first_node(environ)
        if "MASTER_PORT" in environ:
            master_port = _port(environ)
        else:
            # Below Linux's ephemeral range (32768 up); two steps of one job must not meet, nor may two generations of
            # a requeued job, whose steps count from 0 again.
            job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID")
            restart = _integer(environ, "SLURM_RESTART_COUNT") if environ.get("SLURM_RESTART_COUNT") else 0
            master_port = 12000 + (job + 101 * step + 4999 * restart) % 20000
    return Layout(
        rank=_integer(environ, "SLURM_PROCID"),
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        master_addr=master_addr,
        master_port=master_port,
        source="slurm",
    )


def _first_node(environ: Mapping[str, str]) -> str:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(name):
            return expand_nodelist(environ[name])[0]
    raise UserError("SLURM_STEP_NODELIST is not set in this Slurm step; set MASTER_ADDR to rank 0's machine")


def _tasks_on_this_node(environ: Mapping[str, str], world: int | None) -> int:
    """This node's entry of SLURM_STEP_TASKS_PER_NODE, written ``2(x3),1``; `world` is what they must add up to."""
    name = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in environ else "SLURM_TASKS_PER_NODE"
    text = environ.get(name)
    if text is None:
        raise UserError(f"{name} is not set in this Slurm step; start the tasks with `srun`")
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"{name} is {text!r}; expected counts like 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    if world is not None and len(set(counts)) > 1:
        raise UserError(
            f"{name}={text} places tasks unevenly, which `srun` does without being told otherwise; start them with "
            "--ntasks-per-node, one task per GPU"
        )
    if world is not None and sum(counts) != world:
        raise UserError(f"{name}={text} adds up to {sum(counts)} tasks, but this step has {world}; unset it")
    node = _integer(environ, "SLURM_NODEID")
    if node >= len(counts):
        raise UserError(f"SLURM_NODEID is {node}, but {name}={text} names {len(counts)} nodes")
    return counts[node]


def expand_nodelist(text: str) -> list[str]:
    """Host names of a Slurm node list, in order: ``n[1-2,07],m`` gives n1, n2, n07, m; raises UserError.

    Numbers keep their zeros; several brackets in one name multiply (``r[1-2]n[1-2]``), the last varying fastest.
    """
    # Commas inside brackets separate numbers, those outside separate names.
    names = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not names or ",".join(names) != text:
        raise UserError(f"cannot read the Slurm node list {text!r}; expected the form n[1-2,7],m3")
    hosts: list[str] = []
    for name in names:
        expanded = [""]
        for piece in re.findall(r"[^\[\]]+|\[[^\[\]]*\]", name):
            options = _expand_numbers(piece[1:-1], text) if piece.startswith("[") else [piece]
            expanded = [head + option for head in expanded for option in options]
        hosts += expanded
    return hosts


def _expand_numbers(ranges: str, text: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"cannot read {part!r} in the Slurm node list {text!r}; expected a number or a range")
        first, last = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _integer(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    if value is None:
        raise UserError(f"{name} is not set; start the processes with torchrun, `srun` or `swin-scale launch`")
    if not value.isdecimal():
        raise UserError(f"{name} is {value!r}; expected a whole number from 0")
    return int(value)


def _port(environ: Mapping[str, str]) -> int:
    port = _integer(environ, "MASTER_PORT")
    if not 1 <= port < 65536:
        raise UserError(f"MASTER_PORT is {port}; expected 1 to 65535")
    return port
