"""What a batch script runs on its first node: starts the tasks, passes signals on, and queues the job again.

``python -m launcher.batch RUN_DIR CONFIG --restart requeue|chain|never``, started by ``slurm/train.sbatch``. In order:
refuse to start a chain that was stopped or does not advance; run the tasks (`step`); when they ended, find the first
cause and the node to blame, decide (`chain.decide`) what follows, and keep the next job away from bad nodes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from launcher import blame, chain, slurm
from launcher.render import REQUEUE, Requeue
from launcher.revision import code_revision, describe
from launcher.step import Generation, Step, output_file, output_size
from swin_scale.errors import EXIT_PREEMPTED, PeerLostError, SwinScaleError, UserError
from swin_scale.log import Row
from swin_scale.run_dir import stop_file

logger = logging.getLogger("launcher.batch")

T = TypeVar("T")


@dataclass
class Supervisor:
    """One generation of a job, from the decision to start it to what follows it."""

    run_dir: Path
    command: Sequence[str]
    """What each task runs."""
    generation: Generation
    restart: Requeue
    environ: Mapping[str, str]
    received: list[int] = field(default_factory=list)
    """Signals, in order; the handler does nothing else."""
    bad_node_limit: int = blame.DEFAULT_LIMIT
    """Interruptions by one node, from which on the next job keeps away from it; 0: never."""

    def run(self) -> int:
        """Start, watch, decide; returns the exit code of the batch script."""
        me = self.generation
        rows, step = chain.read_chain(self.run_dir), chain.newest_step(self.run_dir)
        refusal = self._refusal(rows, step)
        if refusal is not None:
            logger.error("%s", refusal)
            chain.record(
                self.run_dir, "ended", me.job, restart=me.restart, code=0, cause=refusal, step=step, action="end"
            )
            return 0
        revision = code_revision()
        self._compare_code(rows, revision)
        self._blame_the_silent(rows)
        started = {"restart": me.restart, "nodes": me.nodelist, "step": step, "revision": revision}
        chain.record(self.run_dir, "started", me.job, **started)
        successor = self._chain_successor() if self.restart == "chain" else None
        if successor is not None:
            self._keep_away(successor)
        before, began, said = _exit_record(self.run_dir), time.time(), output_size(self.run_dir, me.job)
        tasks = Step(self.run_dir, self.command, me, self.environ, self.received)
        code = tasks.run()
        code, cause = first_cause(code, before, _exit_record(self.run_dir))
        facts = self._facts()
        # Requeued by hand, by a preemption, or because Slurm lost this node (not its processes): the job has a next
        # generation already, which must not be touched.
        replaced = facts is not None and (facts.restarts > me.restart or facts.is_queued)
        step = chain.newest_step(self.run_dir)
        verdict = chain.decide(
            code=code,
            cause=cause,
            warned=tasks.warned,
            stop_asked=stop_file(self.run_dir).exists(),
            cancelled=self._was_cancelled(facts, tasks) and not replaced,
            stalled=chain.stalled_restarts(chain.read_chain(self.run_dir), step),
            step=step,
            may_restart=self.restart != "never",
        )
        logger.info("tasks ended with code %d at step %d: %s (%s)", code, step, verdict.reason, verdict.action)
        if verdict.action == "again" and code != EXIT_PREEMPTED and not tasks.warned:
            self._blame(began, said)
        ended = {"restart": me.restart, "code": code, "cause": verdict.reason, "step": step, "action": verdict.action}
        chain.record(self.run_dir, "ended", me.job, **ended)
        if verdict.action != "again" and successor is not None:
            self._cancel(successor)
        if verdict.action == "again":
            if self.restart == "requeue" and not replaced:
                successor = self._requeue()
            elif self.restart == "chain" and successor is None:
                successor = self._chain_successor()  # Slurm did not take it before; this job has not ended yet
            self._keep_away(successor or me.job)
        return verdict.code

    def _refusal(self, rows: Sequence[Row], step: int) -> str | None:
        """Why nothing is to be started; None to go on."""
        if stop_file(self.run_dir).exists():
            return "the run was asked to stop while the job waited; submit it again to go on"
        # Restarts that ended without a word, with their node for instance, are noticed here. This one is not recorded.
        starts: list[Row] = [*rows, {"event": "started", "step": step}]
        stalled = chain.stalled_restarts(starts, step)
        if stalled > chain.MAX_STALLED:
            return chain.no_progress(stalled - 1, step, chain.last_cause(rows))
        return None

    def _compare_code(self, rows: Sequence[Row], now: dict[str, str | None]) -> None:
        """A restart runs the code that is there by then; if that is not what was submitted, the log says so."""
        then = next(
            (row["revision"] for row in reversed(rows) if row["event"] == "submitted" and row.get("revision")), now
        )
        if then != now:
            logger.warning("the code has changed: submitted was %s, this is %s", describe(then), describe(now))

    def _cancel(self, job: str) -> None:
        try:
            slurm.patiently(lambda: slurm.cancel([job]))
        except slurm.SlurmError as error:
            logger.error("%s; cancel job %s by hand", error, job)

    def _chain_successor(self) -> str | None:
        """Submit the job that follows unless this one ends well. Before the tasks start: a lost node tells nobody."""
        me = self.generation
        facts = self._facts()
        exclude = facts.excluded if facts is not None else ""
        try:
            successor = slurm.submit(self.run_dir / "submit.sbatch", after=me.job, exclude=exclude)
        except UserError as error:
            logger.error("no job follows this one: %s", error)
            return None
        chain.record(self.run_dir, "submitted", successor, after=me.job)
        return successor

    def _was_cancelled(self, facts: slurm.JobFacts | None, tasks: Step) -> bool:
        """By hand. A preemption that cancels looks the same, but was announced."""
        return signal.SIGTERM in self.received and not tasks.warned and facts is not None and facts.was_cancelled

    def _facts(self) -> slurm.JobFacts | None:
        return _asked(lambda: slurm.patiently(lambda: slurm.look_up(self.generation.job)))

    def _requeue(self) -> str | None:
        """Queue this job again, or submit one that follows it where that is not allowed; that one's id."""
        try:
            slurm.patiently(lambda: slurm.requeue(self.generation.job))
        except slurm.SlurmError as error:
            logger.warning("%s", error)
            facts = self._facts()
            if facts is not None and (facts.is_queued or facts.restarts > self.generation.restart):
                return None  # it was heard, and only the answer was lost
            successor = self._chain_successor()
            if successor is not None:
                logger.info("job %s follows this one", successor)
            return successor
        return None

    def _blame(self, began: float, said: int) -> None:
        """Record the node that interrupted the tasks, if it can be told; `began`, `said`: when, and after which byte
        of the output, they started."""
        me = self.generation
        nodes = _asked(lambda: slurm.host_names(me.nodelist)) or []
        found = blame.blamed_by_verdict(self.run_dir, since=began, nodes=nodes, tasks_per_node=me.tasks_per_node)
        if found is None:
            lost = _asked(lambda: slurm.lost_nodes(me.nodelist)) or []
            found = blame.Blame(node=lost[0], why="lost by Slurm") if len(lost) == 1 else None
        if found is None and signal.SIGTERM not in self.received:
            found = blame.blamed_by_srun(_text_from(output_file(self.run_dir, me.job), said))
        if found is not None:
            logger.warning("node %s is to blame: %s", found.node, found.why)
            chain.record(self.run_dir, "blamed", me.job, restart=me.restart, node=found.node, why=found.why)

    def _blame_the_silent(self, rows: Sequence[Row]) -> None:
        """A generation that left no word went with the node that this script ran on: see whether Slurm lost it."""
        before = next((row for row in reversed(rows) if row["event"] in ("started", "ended")), None)
        if before is None or before["event"] == "ended" or not before.get("nodes"):
            return
        for node in _asked(lambda: slurm.lost_nodes(str(before["nodes"]))) or []:
            logger.warning("node %s is to blame for the end of start %s", node, before.get("restart"))
            row = {"restart": before.get("restart"), "node": node, "why": "lost by Slurm"}
            chain.record(self.run_dir, "blamed", str(before["job"]), **row)

    def _keep_away(self, job: str) -> None:
        """Tell Slurm not to use, for `job`, which waits, the nodes that are to blame too often."""
        me = self.generation
        blamed = blame.counts(chain.read_chain(self.run_dir))
        if not self.bad_node_limit or max(blamed.values(), default=0) < self.bad_node_limit:
            return
        try:
            facts = self._facts()
            if facts is None:
                return
            excluded = slurm.host_names(facts.excluded) if facts.excluded else []
            usable = set(slurm.nodes_of(facts.partition)) - set(excluded)
            bad = blame.to_avoid(blamed, limit=self.bad_node_limit, usable=usable, needed=me.nodes)
            new = sorted(set(bad) - set(excluded))
            if not new:
                return
            slurm.patiently(lambda: slurm.keep_away(job, [*excluded, *new]))
        except (slurm.SlurmError, UserError) as error:
            logger.warning("job %s may meet bad nodes again: %s", job, error)
            return
        logger.warning("job %s keeps away from %s, which interrupted this run too often", job, ", ".join(new))
        chain.record(self.run_dir, "excluded", job, nodes=new)


def first_cause(code: int, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> tuple[int, str]:
    """Exit code and message of the rank that failed first.

    srun's own `code` is that of a task it ended itself; ``exit.json`` has the first one's, if it was written since.
    Nor does 0 mean that the run is done: so ends a srun whose node Slurm has lost, tasks and all.
    """
    news = after if after is not None and after != before and isinstance(after.get("code"), int) else None
    # Rank 0 says 0 after the last save: whatever another rank dies of on its way out, the run is done.
    if news is not None and (code != 0 or news["code"] == 0):
        return int(news["code"]), str(news.get("cause", ""))
    if code == 0:
        return PeerLostError.exit_code, "srun ended without an error, and rank 0 without a word"
    if code == EXIT_PREEMPTED:
        return code, "preempted and saved"
    if code > 128:
        number = code - 128
        known = number in {one.value for one in signal.Signals}
        name = signal.Signals(number).name if known else f"signal {number}"
        return code, f"a task was ended by {name} before any rank could say why"
    return code, f"a task ended with exit code {code} and no record; see its log"


def _exit_record(run_dir: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((run_dir / "exit.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _asked(call: Callable[[], T]) -> T | None:
    """What ``call()`` returns, a question to Slurm; None where it has no answer."""
    try:
        return call()
    except (slurm.SlurmError, UserError) as error:
        logger.warning("%s", error)
        return None


def _text_from(path: Path, start: int) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(1 << 24).decode(errors="replace")
    except OSError:
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise one job; returns its exit code."""
    parser = argparse.ArgumentParser(prog="launcher.batch", description="The body of a batch script.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--restart", choices=REQUEUE, default="requeue")
    parser.add_argument("--exclude-after", type=int, default=blame.DEFAULT_LIMIT, metavar="K")
    parser.add_argument("--allow-change", action="store_true", help="handed to `train`")
    arguments = parser.parse_intermixed_args(argv)
    command = [sys.executable, "-m", "swin_scale", "train", arguments.config, *arguments.overrides]
    received: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        received.append(number)

    # SIGTERM comes with a time limit, a requeue, a preemption or scancel: the tasks get it too, and have KillWait to
    # save; this process is needed until they ended.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, remember)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    try:
        supervisor = Supervisor(
            run_dir=arguments.run_dir,
            command=command + ["--allow-change"] * arguments.allow_change,
            generation=Generation.from_environment(os.environ),
            restart=arguments.restart,
            environ=os.environ,
            received=received,
            bad_node_limit=arguments.exclude_after,
        )
        return supervisor.run()
    except SwinScaleError as error:
        logger.error("%s", error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
