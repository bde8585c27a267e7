"""Where the run of `soak.py` lives: a real Slurm of three nodes on this machine, or two processes of a launcher here.

A place starts the run once and says when it is over. `Slurm` never touches it again; `Local` does what a person without
a cluster would: starts the same command again when the exit code says so.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from soak_faults import MARK, RANKS, WEIGHTS, Place, find

from launcher import chain, slurm
from swin_scale.errors import EXIT_PREEMPTED, PeerLostError
from swin_scale.log import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
NODES = 3
SETTINGS = {
    "CLUSTER_NODES": NODES,
    "CLUSTER_CPUS": 8,
    "CLUSTER_KILLWAIT": 12,
    "CLUSTER_PORT": 27817,
    # Ranks meet at a port made of the job's number: those of another such cluster here must be other ones.
    "CLUSTER_FIRST_JOB": 7501,
}
ASK_S = 0.5
MAX_STALLED = chain.MAX_STALLED


class Home(Place, Protocol):
    """A place, and how a run begins and ends there."""

    name: str
    kinds: Sequence[str]

    def start(self, run_dir: Path, config: Path, settings: Sequence[str]) -> None:
        """Start a run; the one before is over."""

    def finished(self) -> bool:
        """Whether the run that is over did all it had to."""

    def said(self) -> str:
        """State and last words, for people."""

    def give_up(self) -> None:
        """End a run that does not end by itself."""

    def lives(self) -> list[dict[str, Any]]:
        """Every start of the run: ``time``, ``step``, ``nodes``; where known, ``end_time``, ``code`` and ``cause``."""


class Slurm:
    """One job of two tasks on two of three nodes."""

    kinds = tuple(WEIGHTS)

    def __init__(self) -> None:
        # Not below a directory that only its owner may enter: munge refuses such a place for its socket.
        self._directory = Path(tempfile.mkdtemp(prefix="soak-slurm."))
        self._directory.chmod(0o755)
        self._run_dir = self._directory
        self._job = ""
        self._asked, self._over = 0.0, False
        self.name = ""

    def __enter__(self) -> Slurm:
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, self._directory, ignore_errors=True)
            self._cluster("start")
            undo.pop_all()
        os.environ["SLURM_CONF"] = str(self._directory / "slurm.conf")
        self.name = f"{_output(['sinfo', '--version']).strip()}, {RANKS} of {NODES} nodes on one machine, a task each"
        return self

    def __exit__(self, *_: object) -> None:
        del os.environ["SLURM_CONF"]
        self._cluster("stop")
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self, run_dir: Path, config: Path, settings: Sequence[str]) -> None:
        # Faults are spread over the nodes at random: none is to blame, and none is to be kept away from.
        options = ["--nodes", str(RANKS), "--tasks-per-node", "1", "--mem", "1000", "--exclude-after", "0"]
        argv = [sys.executable, "-m", "swin_scale", "launch", "slurm", *options, str(config), *settings]
        self._job = _output(argv, env=environment(run_dir)).strip()
        self._run_dir, self._over = run_dir, False

    def ended(self) -> bool:
        now = time.monotonic()
        if not self._over and now - self._asked >= ASK_S:
            self._asked = now
            try:
                facts = slurm.look_up(self._job)
            except slurm.SlurmError:
                return False  # a busy controller
            self._over = facts is None or facts.is_over
        return self._over

    def finished(self) -> bool:
        ends = [row["action"] for row in chain.read_chain(self._run_dir) if row["event"] == "ended"]
        return ends[-1:] == ["done"]

    def said(self) -> str:
        return f"{slurm.look_up(self._job)}; {_tail(self._run_dir / 'logs' / f'slurm-{self._job}.out')}"

    def give_up(self) -> None:
        if not self._over:
            slurm.cancel([self._job])

    def lives(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for row in chain.read_chain(self._run_dir):
            if row["event"] == "started":
                found.append({key: row.get(key) for key in ("time", "step", "nodes")})
            elif row["event"] == "ended" and found:
                found[-1].update(end_time=row["time"], code=row["code"], cause=row["cause"])
        return found

    def warn(self) -> str:
        subprocess.run(["scancel", "--batch", "--signal=USR1", self._job], check=True)
        return "SIGUSR1 to the batch script"

    def requeue(self) -> str:
        slurm.requeue(self._job)
        return "scontrol requeue"

    def lose_node(self, rng: random.Random) -> str:
        facts = slurm.look_up(self._job)
        assert facts is not None, "Slurm forgot the job"
        name = rng.choice(slurm.host_names(facts.nodes))
        self._cluster("kill-node", name)
        return name

    def return_node(self, name: str) -> None:
        self._cluster("start-node", name)

    def _cluster(self, *arguments: str) -> None:
        settings = {**SETTINGS, "CLUSTER_DIR": self._directory}
        _output([str(CLUSTER), *arguments], env={**os.environ, **{key: str(value) for key, value in settings.items()}})


class Local:
    """``swin-scale launch local``, started again when it ends with code 6 or 75, or by a signal."""

    name = f"{RANKS} processes on one machine, without Slurm"
    kinds = tuple(kind for kind in WEIGHTS if kind not in ("requeue", "lose_node"))

    def __init__(self) -> None:
        self._run_dir, self._argv = Path(), [""]
        self._process: subprocess.Popen[bytes] | None = None
        self._lives: list[dict[str, Any]] = []
        self._code: int | None = None

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def start(self, run_dir: Path, config: Path, settings: Sequence[str]) -> None:
        arguments = ["launch", "local", "--nproc", str(RANKS), str(config), *settings]
        self._run_dir, self._argv = run_dir, [sys.executable, "-m", "swin_scale", *arguments]
        self._lives, self._code = [], None
        run_dir.mkdir(parents=True, exist_ok=True)
        self._begin()

    def _begin(self) -> None:
        step = chain.newest_step(self._run_dir)
        self._lives.append({"time": time.time(), "step": step, "nodes": ""})
        with open(self._run_dir / "launch.log", "ab") as log:
            self._process = subprocess.Popen(
                self._argv, env=environment(self._run_dir), stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )

    def ended(self) -> bool:
        if self._process is None or self._code is not None:
            return True
        code = self._process.poll()
        if code is None:
            return False
        self._lives[-1].update(end_time=time.time(), code=code, cause=_cause(self._run_dir))
        again = code in (PeerLostError.exit_code, EXIT_PREEMPTED) or code < 0 or code > 128
        starts = [life["step"] for life in self._lives[-1 - MAX_STALLED :]]
        if not again or starts == [chain.newest_step(self._run_dir)] * (MAX_STALLED + 1):
            self._code = code
            return True
        self._begin()
        return False

    def finished(self) -> bool:
        return self._code == 0

    def said(self) -> str:
        return f"code {self._code}; {_tail(self._run_dir / 'launch.log')}"

    def give_up(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # ranks end with their launcher
            self._process.wait()

    def lives(self) -> list[dict[str, Any]]:
        return [dict(life) for life in self._lives]

    def warn(self) -> str:
        number = signal.SIGUSR1
        for process in find(self._run_dir):
            if process.role == "rank":
                process.signal(number)
                return f"{number.name} to {process}"
        return "nobody was there to warn"

    def requeue(self) -> str:
        raise NotImplementedError("only Slurm has a queue")

    def lose_node(self, rng: random.Random) -> str:
        raise NotImplementedError("there is one machine")

    def return_node(self, name: str) -> None:
        raise NotImplementedError("there is one machine")


def environment(run_dir: Path) -> dict[str, str]:
    """Of all processes of the run in `run_dir`."""
    return {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(run_dir)}


def _output(argv: Sequence[str], *, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv[:5])} ended with code {done.returncode}: {done.stderr}")
    return done.stdout


def _cause(run_dir: Path) -> str | None:
    rows = read_jsonl(run_dir / "exit.json")
    return str(rows[0].get("cause")) if rows else None


def _tail(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[-2000:]
    except OSError:
        return "no output"
