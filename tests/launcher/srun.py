"""A supervisor whose srun, and whose Slurm, are what a test says."""

from __future__ import annotations

import subprocess
import time
from types import SimpleNamespace

from launcher import batch, slurm, step
from launcher.step import Generation, Step

DONE = """echo '{"code": 0, "cause": "done"}' > "$RUN/exit.json\""""
KILL_WAIT_S = 20.0


class Tasks:
    """A stand-in for srun: a program that does what `body` says; `DONE` in it is what rank 0 writes in the end.

    What it prints to stderr is where srun's words would be. Signals come once `trap` has been done: before that, they
    would be its end.
    """

    def __init__(self, directory, monkeypatch, body, trap=":"):
        path = directory / "bin" / "srun"
        path.parent.mkdir()
        (directory / "logs").mkdir()
        self._there, self._received, self._signals = directory / "there", [], ()
        begin = f'exec 2>>"$RUN/logs/slurm-7.out"\n{trap}\n: >"$RUN/there"'
        path.write_text(f"#!/bin/bash\n{begin}\n{body.replace('DONE', DONE)}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
        monkeypatch.setattr(step, "subprocess", SimpleNamespace(Popen=self._start))
        self.facts = slurm.JobFacts(job="7", state="RUNNING", partition="gpu")
        self.requeued, self.kept_away, self.lost, self.usable = [], [], [], ["n1", "n2", "n3"]
        monkeypatch.setattr(slurm, "requeue", self.requeued.append)
        monkeypatch.setattr(slurm, "host_names", lambda nodes: {"n[1-2]": ["n1", "n2"]}.get(nodes, nodes.split(",")))
        monkeypatch.setattr(slurm, "look_up", lambda job, *_: self.facts)
        monkeypatch.setattr(slurm, "kill_wait_s", lambda: KILL_WAIT_S)
        monkeypatch.setattr(slurm, "lost_nodes", lambda nodes: self.lost)
        monkeypatch.setattr(slurm, "nodes_of", lambda partition: self.usable)
        monkeypatch.setattr(slurm, "keep_away", lambda job, nodes: self.kept_away.append((job, list(nodes))))
        monkeypatch.setattr(step, "master_address", lambda nodelist: None)

    def supervise(self, run_dir, restart="requeue", generation=0, signals=(), **options):
        """The batch script's exit code; it gets `signals` once the tasks have started."""
        me = Generation(job="7", restart=generation, nodes=2, tasks_per_node=1, nodelist="n[1-2]")
        self._received, self._signals = [], signals
        return batch.Supervisor(
            run_dir=run_dir, command=["train", "x.yaml"], generation=me, restart=restart,
            environ=self._environ(run_dir), received=self._received, **options,
        ).run()  # fmt: skip

    def run(self, run_dir, signals=()):
        """The exit code of the tasks of one generation, with nobody who decides what follows."""
        me = Generation(job="7", restart=0, nodes=2, tasks_per_node=1, nodelist="n[1-2]")
        self._received, self._signals = [], signals
        return Step(run_dir, [], me, self._environ(run_dir), self._received).run()

    def _environ(self, run_dir):
        return {"PATH": f"{run_dir}/bin:/usr/bin:/bin", "RUN": str(run_dir), "RANK": "9"}

    def _start(self, *arguments, **options):
        self._there.unlink(missing_ok=True)
        process = subprocess.Popen(*arguments, **options)
        while process.poll() is None and not self._there.exists():
            time.sleep(0.005)
        self._received.extend(self._signals)
        return process
