"""The verbs ``launch slurm``, ``status``, ``stop``, ``cancel`` and ``logs`` of the command line."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.blame import DEFAULT_LIMIT, counts
from swin_scale.errors import DataError, UserError

Forecast = Callable[[Sequence[Any], int, int, str | None], str]
"""Memory, time and cost as text: of configs, on so many ranks, so many a node, of a kind of GPU where it is known."""
FROZEN = "submit.yaml"
"""The config as it was submitted, in the run directory."""
_FOLLOW_S = 0.5
_LAST_LINES = 200


def add_slurm_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``launch slurm`` beside config and overrides."""
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", metavar="G", help="such as 8 or a100:8; one task each; none: CPU only")
    parser.add_argument("--tasks-per-node", type=int, metavar="N", help="without GPUs: tasks on each node; default 1")
    parser.add_argument("--gpu", metavar="NAME", help="kind of GPU to forecast memory and time for, such as h200")
    parser.add_argument("--time", metavar="T", help="limit of one job, such as 24:00:00; the run goes on in the next")
    for name in ("partition", "account", "qos", "constraint"):
        default = os.environ.get(f"SBATCH_{name.upper()}")
        parser.add_argument(f"--{name}", default=default, help=f"default: SBATCH_{name.upper()}, else the cluster's")
    parser.add_argument("--exclude", metavar="NODES", help="nodes to keep away from")
    parser.add_argument("--mem", metavar="M", help="memory of a node, such as 400G; 0: all of it")
    parser.add_argument("--cpus-per-task", type=int, metavar="C", help="cores for a rank and its loader processes")
    parser.add_argument("--job-name", metavar="NAME", help="default: the run directory's name")
    parser.add_argument(
        "--signal-lead", type=int, metavar="S",
        help="seconds before the time limit at which the ranks save; default: from the run's own saves, 120 or more, "
        "but at most half of --time",
    )  # fmt: skip
    parser.add_argument(
        "--restart", choices=("requeue", "chain", "never"), default="requeue",
        help="after preemption, time limit or a lost node: queue the job again, submit one that follows, or end",
    )  # fmt: skip
    parser.add_argument(
        "--exclude-after", type=int, default=DEFAULT_LIMIT, metavar="K",
        help=f"keep away from a node that interrupted the run K times; 0: never; default {DEFAULT_LIMIT}",
    )  # fmt: skip
    parser.add_argument("--after", metavar="JOB", help="start when that job ended")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="NAME[=VALUE]", help="any other option of sbatch; repeatable"
    )
    parser.add_argument(
        "--skip-data-check", action="store_true", help="submit although shards cannot be seen from here"
    )
    parser.add_argument("--allow-change", action="store_true", help="passed on to `train`")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script; write and submit nothing")


def add_run_verbs(verbs: Any) -> None:
    """Add the verbs that look after a run; each sets ``handler``."""
    status = verbs.add_parser("status", help="a run's jobs, progress and last events")
    status.add_argument("run", type=Path, help="run directory")
    status.add_argument("--json", action="store_true", help="one JSON object")
    status.set_defaults(handler=_status)

    stop = verbs.add_parser("stop", help="ask a run to save and end")
    stop.add_argument("run", type=Path, help="run directory")
    stop.set_defaults(handler=_stop)

    cancel = verbs.add_parser("cancel", help="end a run's jobs, queued or running")
    cancel.add_argument("run", type=Path, help="run directory")
    cancel.set_defaults(handler=_cancel)

    logs = verbs.add_parser("logs", help="what a run's jobs or ranks wrote")
    logs.add_argument("run", type=Path, help="run directory")
    logs.add_argument("--rank", type=int, metavar="R", help="the log of one rank; default: the newest job's output")
    logs.add_argument("-n", "--lines", type=int, default=_LAST_LINES, metavar="N", help="only the last N lines")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it grows, until interrupted")
    logs.set_defaults(handler=_logs)


def launch_slurm(arguments: argparse.Namespace, loaded: Any, forecast: Forecast) -> int:
    """Judge, freeze and submit what was `loaded`, a config or a run in stages; prints the plan.

    Raises UserError for what cannot be, and DataError for shards that are not there, before anything is written.
    """
    from launcher import chain, slurm
    from launcher.render import TEMPLATE, render
    from launcher.revision import code_revision, describe
    from launcher.status import live_jobs
    from swin_scale.config import batch_plan
    from swin_scale.files import write_atomic
    from swin_scale.run_dir import stop_file

    staged = not hasattr(loaded, "config")
    job = _batch_job(arguments, loaded.directory if staged else loaded.config.run.dir)
    run_dir = Path(job.run_dir)
    plans = [batch_plan(config, job.ranks) for config in loaded.configs]
    text = render(job, TEMPLATE.read_text(encoding="utf-8"))
    revision = code_revision()
    step = chain.newest_step(run_dir)
    _say(
        run=f"{run_dir} ({f'goes on from step {step}' if step else 'new'})",
        job=f"{job.nodes} nodes x {job.tasks_per_node} tasks = {job.ranks} ranks, "
        f"{job.gpus_per_node or 'no'} GPUs a node, time {job.time or 'limit of the partition'}",
        batch="; ".join(
            f"global {plan.global_batch} = {plan.ranks} ranks x {plan.micro} x {plan.accumulation} micro-batches"
            for plan in dict.fromkeys(plans)
        ),
        end=f"ranks save {job.signal_lead_s} s before the time limit; after an interruption: {job.restart}",
        code=describe(revision),
    )
    if job.gpus_per_node is not None:
        typed = job.gpus_per_node.rpartition(":")[0]
        print(forecast(loaded.configs, job.ranks, job.tasks_per_node, arguments.gpu or typed or None), file=sys.stderr)
    problems = missing_data(loaded.configs)
    if problems and not (arguments.dry_run or arguments.skip_data_check):
        raise DataError(
            f"{'; '.join(problems)}; the job would wait and then end: mend that, or pass --skip-data-check if only the "
            "nodes see the shards"
        )
    for problem in problems:
        print(f"warning: {problem}; the nodes must see it", file=sys.stderr)
    if arguments.dry_run:
        print(text, end="")
        return 0
    rows = chain.read_chain(run_dir)
    if rows:
        for facts in live_jobs(run_dir):
            raise UserError(
                f"job {facts.job} has {run_dir} ({facts.state}); wait for it, or end it with `swin-scale cancel`"
            )
    for node, times in counts(rows).items():
        print(f"warning: node {node} interrupted this run {times} times; --exclude {node}?", file=sys.stderr)
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        write_atomic(run_dir / FROZEN, loaded.dump().encode())
        write_atomic(run_dir / "submit.sbatch", text.encode())
        stop_file(run_dir).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"run.dir {run_dir} cannot be written: {error.strerror}; set another run.dir") from error
    number = slurm.submit(run_dir / "submit.sbatch")
    chain.record(
        run_dir, "submitted", number, nodes=job.nodes, tasks_per_node=job.tasks_per_node, restart=job.restart,
        revision=revision,
    )  # fmt: skip
    print(number)
    _say(next=f"swin-scale status {run_dir}")
    return 0


def missing_data(configs: Sequence[Any]) -> list[str]:
    """What of the shards that `configs` name cannot be used from here: one line for each shard set, with the file."""
    from swin_scale.shards import ShardSet

    problems = []
    for name in dict.fromkeys(name for config in configs for name in (*config.data.train, *config.data.val)):
        try:
            ShardSet.open(name)
        except DataError as error:
            problems.append(str(error))
        except OSError as error:  # such as a directory that only the nodes may read
            problems.append(f"{error.filename or name} cannot be read: {error.strerror}")
    return problems


def _batch_job(arguments: argparse.Namespace, run: str) -> Any:
    from launcher.render import BatchJob, gpu_count, time_limit_s
    from launcher.status import save_seconds
    from launcher.step import default_lead

    run_dir = Path(run).absolute()
    gpus = gpu_count(arguments.gpus_per_node)
    lead = arguments.signal_lead
    if lead is None:
        try:
            limit = time_limit_s(arguments.time)
        except ValueError:
            limit = None  # refused with a message when the script is rendered
        lead = default_lead(save_seconds(run_dir), limit)
    return BatchJob(
        name=arguments.job_name or run_dir.name,
        run_dir=str(run_dir),
        config=str(run_dir / FROZEN),
        workdir=str(Path.cwd()),
        python=sys.executable,
        nodes=arguments.nodes,
        tasks_per_node=arguments.tasks_per_node if arguments.tasks_per_node is not None else gpus or 1,
        gpus_per_node=arguments.gpus_per_node if gpus else None,
        time=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
        qos=arguments.qos,
        constraint=arguments.constraint,
        exclude=arguments.exclude,
        mem=arguments.mem,
        cpus_per_task=arguments.cpus_per_task,
        signal_lead_s=lead,
        restart=arguments.restart,
        after=arguments.after,
        bad_node_limit=arguments.exclude_after,
        allow_change=arguments.allow_change,
        options=tuple((name, value) for name, _, value in (text.partition("=") for text in arguments.sbatch)),
    )


def _say(**lines: str) -> None:
    """The plan goes to stderr, so that a dry run's script, or a job's number, can be piped on."""
    for name, text in lines.items():
        print(f"{name:<8}{text}", file=sys.stderr)


def _status(arguments: argparse.Namespace) -> int:
    from launcher.status import survey, text_of

    facts = survey(arguments.run)
    print(json.dumps(facts) if arguments.json else text_of(facts))
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    from launcher.stop import stop

    print(stop(arguments.run))
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from launcher.stop import cancel

    print(cancel(arguments.run))
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from launcher.status import require_run

    require_run(arguments.run)
    path = _log_file(arguments.run / "logs", arguments.rank)
    with open(path, "rb") as file:
        lines = file.read().splitlines(keepends=True)
        _show(lines[-max(0, arguments.lines) :] if arguments.lines else [])
        while arguments.follow:
            more = file.read()
            _show([more])
            if not more:
                time.sleep(_FOLLOW_S)
    return 0


def _log_file(directory: Path, rank: int | None) -> Path:
    if rank is not None:
        path = directory / f"rank{rank}.log"
        if not path.is_file():
            found = sorted((p.stem for p in directory.glob("rank*.log")), key=_number)
            raise UserError(f"{path} does not exist; there are {', '.join(found) or 'no logs of ranks yet'}")
        return path
    outputs = sorted(directory.glob("slurm-*.out"), key=lambda path: _number(path.stem))
    if outputs:
        return outputs[-1]
    if (directory / "rank0.log").is_file():
        return directory / "rank0.log"
    raise UserError(f"{directory} holds no logs yet; `swin-scale status` tells whether the run has started")


def _number(name: str) -> int:
    digits = re.sub(r"\D", "", name)
    return int(digits) if digits else -1


def _show(parts: Sequence[bytes]) -> None:
    sys.stdout.write(b"".join(parts).decode(errors="replace"))
    sys.stdout.flush()
