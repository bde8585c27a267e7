"""What can be known of a run from its files and, where there is one, from Slurm. Nothing is written."""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher import blame, chain, slurm
from swin_scale import goodput
from swin_scale.errors import SwinScaleError, UserError
from swin_scale.interval import RECENT_SAVES, save_took_s
from swin_scale.log import Row
from swin_scale.run_dir import STAGES_NAME, read_stages, stop_file
from swin_scale.run_lock import judge, owners, this_process

RECENT_STEPS = 50
RECENT_EVENTS = 8
_DAILY = frozenset({"eval", "checkpoint", "skipped_sample", "routing", "stragglers"})


def require_run(run_dir: Path) -> None:
    """Raises UserError unless `run_dir` holds a run, or one that waits for its job."""
    if not any((run_dir / name).exists() for name in ("config.yaml", "jobs.jsonl", "metrics.jsonl", STAGES_NAME)):
        raise UserError(f"{run_dir} holds no run: neither config.yaml nor jobs.jsonl; name a run.dir")


def survey(run_dir: Path, *, look_up: Callable[[str], slurm.JobFacts | None] = slurm.look_up) -> dict[str, Any]:
    """State, progress, chain and events of a run, as plain values; raises UserError when there is no run.

    Slurm is asked for the jobs that did not tell their own end; without Slurm their state is ``unknown``.
    """
    require_run(run_dir)
    part = _current_part(run_dir)
    rows, events = _tail(part / "metrics.jsonl")
    rows_of_chain = chain.read_chain(run_dir)
    jobs = _jobs(rows_of_chain, look_up)
    state = _state(run_dir, jobs)
    waits = state.partition(" ")[0].upper() in slurm.QUEUED
    figures = goodput.read(run_dir, until=time.time() if waits else None)
    progress = _progress(rows, events, figures.pace if figures is not None else 0.0)
    step = chain.newest_step(part)
    saves = [row for row in events if row["event"] == "checkpoint"]
    return {
        "run": str(run_dir),
        "state": state,
        "stage": part.name if part != run_dir else None,
        **progress,
        "goodput": figures and figures.as_dict(),
        "checkpoint": step or None,
        "checkpoint_time": saves[-1].get("time") if saves else None,
        "exit": _json(run_dir / "exit.json"),
        "stop_asked": stop_file(run_dir).exists(),
        "jobs": jobs,
        "blamed": dict(blame.counts(rows_of_chain).most_common()),
        "excluded": sorted({node for row in rows_of_chain if row["event"] == "excluded" for node in row["nodes"]}),
        "events": [row for row in events if row["event"] not in _DAILY][-RECENT_EVENTS:],
    }


def save_seconds(run_dir: Path) -> float | None:
    """The longest of the run's recent saves; None when nothing was saved yet."""
    _, events = _tail(_current_part(run_dir) / "metrics.jsonl")
    saves = [row for row in events if row["event"] == "checkpoint" and _is_number(row.get("seconds"))]
    return max(map(save_took_s, saves[-RECENT_SAVES:]), default=None)


def live_jobs(run_dir: Path) -> list[slurm.JobFacts]:
    """The chain's jobs that run or wait. Raises SlurmError or UserError when Slurm cannot be asked."""
    asked = [row["job"] for row in _jobs(chain.read_chain(run_dir), lambda job: None) if not row["over"]]
    found = [slurm.look_up(job) for job in asked]
    return [facts for facts in found if facts is not None and not facts.is_over]


def text_of(facts: Mapping[str, Any], now: float | None = None) -> str:
    """`survey` for people: a few lines."""
    now = time.time() if now is None else now
    lines = [f"run     {facts['run']}: {facts['state']}" + (" (asked to stop)" if facts["stop_asked"] else "")]
    if facts["step"] is not None:
        share = (
            f" of {facts['total_steps']} ({facts['step'] / facts['total_steps']:.1%})" if facts["total_steps"] else ""
        )
        loss = "" if facts["loss"] is None else f", loss {facts['loss']:.4g}"
        stage = f" of stage {facts['stage']}" if facts["stage"] else ""
        lines.append(f"step    {facts['step']}{share}{stage}{loss}")
        if facts["step_s"] is not None:
            lines.append(f"speed   {facts['step_s']:.3g} s a step, {facts['images_per_s'] or 0:.0f} images/s")
        if facts["eta_s"]:
            lines.append(f"left    {duration(facts['eta_s'])} at this speed{' and goodput' * bool(facts['goodput'])}")
    if facts["goodput"] is not None:
        lines += _goodput_lines(facts["goodput"])
    if facts["checkpoint"] is not None:
        age = "" if facts["checkpoint_time"] is None else f", {duration(now - facts['checkpoint_time'])} ago"
        lines.append(f"saved   step {facts['checkpoint']}{age}")
    for job in facts["jobs"]:
        starts = f", started {job['starts']} times" if job["starts"] > 1 else ""
        where = f" on {job['nodes']}" if job["nodes"] else ""
        cause = f": {job['cause']}" if job["cause"] else ""
        lines.append(f"job     {job['job']} {job['state']}{where}{starts}{cause}")
    for node, times in facts["blamed"].items():
        away = "; jobs keep away from it" if node in facts["excluded"] else ""
        lines.append(f"node    {node} interrupted the run {times} time{'s' * (times > 1)}{away}")
    for event in facts["events"]:
        rest = {k: v for k, v in event.items() if k not in ("event", "step", "time", "environment")}
        said = ", ".join(f"{key} {value}" for key, value in rest.items() if value is not None)
        lines.append(f"event   step {event.get('step')}: {event['event']}{' ' if said else ''}{said[:160]}")
    return "\n".join(lines)


def _goodput_lines(found: Mapping[str, Any]) -> list[str]:
    """What became of the wall time, largest share first."""
    lives = f"{found['lives']} {'life' if found['lives'] == 1 else 'lives'}"
    failures = f", a failure every {duration(found['mtbf_s'])}" if found["mtbf_s"] else ""
    lost = f", {found['lost_steps']} steps done again" if found["lost_steps"] else ""
    stall = f", a save stalls {found['stall_s']:.3g} s" if found["stall_s"] is not None else ""
    first = f"goodput {found['goodput']:.1%} of {duration(found['wall_s'])}, steps that count {found['ettr']:.1%}"
    known = ((seconds, key) for key, seconds in found["seconds"].items() if seconds)
    shares = sorted(
        (one for one in known if one[0] >= 5e-4 * found["wall_s"] or one[1] == "unattributed"), reverse=True
    )
    words = [f"{goodput.BUCKETS[key]} {duration(seconds)} ({seconds / found['wall_s']:.1%})" for seconds, key in shares]
    return [f"{first}; {lives}{failures}{lost}{stall}", f"time    {', '.join(words)}"]


def duration(seconds: float) -> str:
    """``3 d 4 h``, ``2 h 5 min`` or ``40 s``."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _current_part(run_dir: Path) -> Path:
    """The stage that a run in stages has come to; of any other run its own directory."""
    begun = [stage for stage in read_stages(run_dir) if (stage / "metrics.jsonl").exists()]
    return begun[-1] if begun else run_dir


def _tail(path: Path) -> tuple[list[Row], list[Row]]:
    """The last step rows, and all events, of a ``metrics.jsonl``; a million rows take a second or two."""
    recent: deque[bytes] = deque(maxlen=RECENT_STEPS)
    events = []
    try:
        with open(path, "rb") as file:
            for line in file:
                if line.startswith(b'{"event"'):
                    events.append(line)
                else:
                    recent.append(line)
    except OSError:
        return [], []
    rows = [row for row in map(_row, recent) if row is not None and isinstance(row.get("step"), int)]
    return rows, [row for row in map(_row, events) if row is not None]


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None  # torn by a kill
    return row if isinstance(row, dict) else None


def _progress(rows: list[Row], events: list[Row], pace: float) -> dict[str, Any]:
    """`pace`: share of the time to come that steps will have, by the ledger; 0: it says nothing, so all of it."""
    last = rows[-1] if rows else {}
    totals = [row["total_steps"] for row in events if row["event"] == "start" and row.get("total_steps")]
    total = int(totals[-1]) if totals else None
    step = last.get("step")

    def median(key: str) -> float | None:
        values = [row[key] for row in rows if _is_number(row.get(key))]
        return statistics.median(values) if values else None

    step_s = median("step_s")
    left = None if total is None or step is None or step_s is None else max(0, total - step) * step_s / (pace or 1.0)
    return {
        "step": step,
        "total_steps": total,
        "epoch": last.get("epoch"),
        "loss": median("loss"),
        "lr": last.get("lr"),
        "step_s": step_s,
        "images_per_s": median("images_per_s"),
        "data_wait_s": median("data_wait_s"),
        "eta_s": left,
    }


def _jobs(rows: list[Row], look_up: Callable[[str], slurm.JobFacts | None]) -> list[dict[str, Any]]:
    """One entry per job: what it recorded itself, and Slurm's word where it recorded no end."""
    jobs = []
    for job in chain.jobs_of(rows):
        own = [row for row in rows if row["job"] == job]
        starts = [row for row in own if row["event"] == "started"]
        end = own[-1] if own[-1]["event"] == "ended" else None
        over = end is not None and (end.get("action") in ("done", "end"))
        entry = {
            "job": job,
            "state": "",
            "over": over,
            "nodes": starts[-1].get("nodes") if starts else None,
            "starts": len(starts),
            "first_step": starts[0].get("step") if starts else None,
            "code": end.get("code") if end else None,
            "cause": str(end.get("cause")) if end else None,
        }
        if end is not None and over:
            entry["state"] = "done" if end["action"] == "done" else "ended"
        else:
            entry["state"], entry["over"] = _ask(job, look_up)
        jobs.append(entry)
    return jobs


def _ask(job: str, look_up: Callable[[str], slurm.JobFacts | None]) -> tuple[str, bool]:
    try:
        facts = look_up(job)
    except SwinScaleError:
        return "unknown", False
    if facts is None:
        return "unknown", False
    reason = f" ({facts.reason})" if facts.reason and not facts.is_over else ""
    return f"{facts.state}{reason}", facts.is_over


def _state(run_dir: Path, jobs: list[dict[str, Any]]) -> str:
    """One word or two: the newest job's state, or that of the process that has the run, or how it ended."""
    live = [job for job in jobs if not job["over"] and job["state"] != "unknown"]
    if live:
        return next((job["state"] for job in live if job["state"] == "RUNNING"), live[-1]["state"]).lower()
    me = this_process()
    verdicts = [judge(owner, me, lock_is_ours=None) for owner in owners(run_dir)]
    if "alive" in verdicts:
        return "running"
    end = _json(run_dir / "exit.json")
    if end is not None:
        return "done" if end.get("code") == 0 else f"ended with code {end.get('code')}: {end.get('cause')}"
    if "unknown" in verdicts or any(job["state"] == "unknown" for job in jobs):
        return "unknown; it can be seen where its job ran"
    return "ended without a word" if (_current_part(run_dir) / "metrics.jsonl").exists() else "never started"


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
