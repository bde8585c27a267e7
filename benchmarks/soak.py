"""A run of 2,200 steps that is killed, stopped, robbed of nodes, room and its newest checkpoint, and ends the same.

    sudo .venv/bin/python benchmarks/soak.py [--steps 2200] [--faults 26] [--seed 0] [--out FILE]
    .venv/bin/python benchmarks/soak.py --local

On a real Slurm (three nodes on this machine, `tests/slurm/cluster.sh`) the run is submitted once, through ``swin-scale
launch slurm``, on two of the nodes. From then on nobody but Slurm and the injector of faults (`soak_faults.py`) touches
it, and it has to finish by itself. Before, the same run goes through undisturbed. All steps' losses, norms and samples,
the evaluations, and every fragment of the last checkpoint must be the same, bit for bit. What it cost is printed: the
goodput, by the run's own ledger, of which at most 1 % of the time may be unattributed.

``--local`` does the same without Slurm and without root: ``swin-scale launch local`` is started again whenever it ends
with code 6 or 75 or by a signal. Some 15 minutes on two quiet cores. The run directory lies on a tmpfs of its own where
one can be mounted; elsewhere there is no full disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import soak_places  # noqa: E402
from soak_faults import WEIGHTS, Ended, Fault, Injector, plan  # noqa: E402

from data_prep.digits import write_digit_folders  # noqa: E402
from data_prep.write import write_shards  # noqa: E402
from swin_scale import goodput  # noqa: E402
from swin_scale.bench.result import describe  # noqa: E402
from swin_scale.checkpoint import Checkpoint, step_directory  # noqa: E402
from swin_scale.errors import CheckpointError  # noqa: E402
from swin_scale.files import write_atomic  # noqa: E402
from swin_scale.log import read_events, read_metrics  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "cpu-soak.json"
CONFIG = ROOT / "configs" / "demo.yaml"
DISK_BYTES = 96 << 20
EVERY = 22
"""Steps between saves: of an evaluation, every 374 steps, there is a save just before."""
UNATTRIBUTED = 0.01
SETTINGS = {
    "augment.mixup": 0.2,
    "checkpoint.every_minutes": "null",
    "checkpoint.every_steps": EVERY,
    "checkpoint.keep": 4,
    "engine.hang_timeout_s": 10,
    "engine.threads": 1,
    "engine.timeout_s": 60,
    "model.drop_path_rate": 0.1,
    "optim.ema_decay": 0.99,
    "schedule.warmup_steps": 20,
    "train.epochs": 1000,
    "train.eval_every_epochs": 2,
    "train.global_batch": 24,
    "train.log_every": 5,
}
"""Over the demo's: saves often, has a moving average, and randomness of every kind there is."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", action="store_true", help="without Slurm")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--faults", type=int, default=26)
    parser.add_argument("--kinds", nargs="+", choices=WEIGHTS, help="only these kinds of faults")
    parser.add_argument("--save-every", type=int, default=EVERY, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--minutes", type=float, default=30, help="after which the run is given up")
    parser.add_argument(
        "--work", type=Path, help="keep shards and the runs' small files here; default: nothing is kept"
    )
    parser.add_argument("--out", type=Path, default=RESULT, help=f"default: {RESULT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the cluster and the disk go, too
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak.")))
        train, val = write_data(work.absolute())
        disk = stack.enter_context(small_disk())  # before the nodes, which see no later mounts
        place = stack.enter_context(soak_places.Local() if arguments.local else soak_places.Slurm())
        rng = random.Random(arguments.seed)
        kinds = [kind for kind in arguments.kinds or place.kinds if kind != "full_disk" or disk is not None]
        faults = plan(kinds, arguments.faults, arguments.steps, rng)
        runs = disk or work.absolute()
        settings = {**SETTINGS, "data.train": f"[{train}]", "data.val": f"[{val}]"}
        settings.update({"train.max_steps": arguments.steps, "schedule.total_steps": arguments.steps})
        settings["checkpoint.every_steps"] = arguments.save_every
        whole, _ = soak(place, runs / "undisturbed", settings, [], rng, arguments.minutes)
        if not whole["finished"]:
            raise SystemExit(f"the undisturbed run did not finish: {place.said()}")
        figures, done = soak(place, runs / "soak", settings, faults, rng, arguments.minutes)
        equal = compare(runs / "undisturbed", runs / "soak", arguments.steps)
        rows = [row | followed(runs / "soak", row, figures["lives"]) for row in done]
        if arguments.work is not None:
            keep_small_files(runs, work)
        result = {
            **describe("soak", " ".join(["python benchmarks/soak.py", *sys.argv[1:]]), torch.device("cpu")),
            "place": place.name,
            "settings": {"steps": arguments.steps, "seed": arguments.seed, **SETTINGS}
            | {"checkpoint.every_steps": arguments.save_every},
            "undisturbed": whole,
            "soak": figures,
            "planned": len(faults),
            "kinds": by_kind(rows),
            "faults": rows,
            "equal": equal,
        }
    result["passed"] = verdict(result)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out, (json.dumps(result, indent=1) + "\n").encode())
    print(table(result))
    return int(not result["passed"])


def write_data(work: Path) -> tuple[Path, Path]:
    """Shards of 4,500 real digits, and of 500 held out; written once."""
    shards = work / "shards"
    if not (shards / "val" / "manifest.json").exists():
        train, val = write_digit_folders(work / "images")
        write_shards(train, shards / "train", workers=1, samples_per_shard=1000)
        write_shards(val, shards / "val", workers=1)
    return shards / "train", shards / "val"


@contextlib.contextmanager
def small_disk() -> Iterator[Path | None]:
    """A small file system that can be filled; None where nothing can be mounted."""
    where = Path(tempfile.mkdtemp(prefix="soak-disk."))
    where.chmod(0o755)
    argv = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(where)]
    mounted = shutil.which("mount") is not None and subprocess.run(argv, capture_output=True).returncode == 0
    try:
        yield where if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(where)], check=True)
        where.rmdir()


def soak(
    place: soak_places.Home,
    run_dir: Path,
    settings: dict[str, Any],
    faults: Sequence[Fault],
    rng: random.Random,
    minutes: float,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Start the run, bring the `faults` over it, and wait for its end: its figures, and what was done to it."""
    began = time.monotonic()
    place.start(run_dir, CONFIG, [f"{key}={value}" for key, value in {**settings, "run.dir": run_dir}.items()])
    injector = Injector(
        place=place, run_dir=run_dir, rng=rng, filler=run_dir.parent / "filler", began=began,
        deadline=began + 60 * minutes,
    )  # fmt: skip
    problem = None
    try:
        for fault in faults:
            injector.inject(fault)
            print(injector.done[-1], file=sys.stderr, flush=True)
        injector.wait_for_end()
    except Ended as error:
        problem = f"{error}, at fault {len(injector.done)} of {len(faults)}: {place.said()}"
        print(problem, file=sys.stderr, flush=True)
        place.give_up()
    wall = time.monotonic() - began
    rows = read_metrics(run_dir / "metrics.jsonl")
    figures = {
        "finished": place.finished() and max(rows, default=0) == settings["train.max_steps"],
        "problem": problem,
        "wall_s": round(wall, 1),
        "median_step_s": statistics.median([row["step_s"] for row in rows.values()] or [0.0]),
        "lives": place.lives(),
        "events": Counter(row["event"] for row in read_events(run_dir / "metrics.jsonl")),
        "ledger": account(run_dir),
    }
    return figures, injector.done


def account(run_dir: Path) -> dict[str, Any]:
    """What the run's own ledger says became of its time."""
    figures = goodput.read(run_dir)
    if figures is None:
        return {}
    found = figures.as_dict()
    return {**found, "unattributed_share": found["seconds"]["unattributed"] / found["wall_s"]}


def compare(one: Path, other: Path, steps: int) -> dict[str, Any]:
    """What of two runs is equal, bit for bit: every step's row, the evaluations, the last checkpoint."""
    first, second = trajectory(one), trajectory(other)
    figures: dict[str, Any] = {
        "trajectory": first == second and [row[0] for row in first] == list(range(1, steps + 1)),
        "steps_compared": len(first),
        "first_difference": next((row[0] for row, twin in zip(first, second) if row != twin), None),
        "evaluations": evaluations(one) == evaluations(other),
        "evaluations_compared": len(evaluations(one)),
    }
    try:
        with (
            Checkpoint.open(step_directory(one / "checkpoints", steps)) as whole,
            Checkpoint.open(step_directory(other / "checkpoints", steps)) as mended,
        ):
            figures |= compare_checkpoints(whole, mended)
    except CheckpointError as error:
        figures |= {"checkpoint": False, "problem": str(error)}
    return figures


def compare_checkpoints(one: Checkpoint, other: Checkpoint) -> dict[str, Any]:
    """Weights, moments and averages of two checkpoints by their bits, and their states but for the time they took."""
    different, numbers = [], 0
    same_kinds = one.kinds() == other.kinds()
    for kind in one.kinds() if same_kinds else ():
        twins = other.load_full(kind)
        for name, values in one.load_full(kind).items():
            numbers += values.numel()
            if not same_bits(values, twins[name]):
                different.append(f"{kind} of {name}")
    states = [{key: value for key, value in each.state.items() if key != "elapsed_s"} for each in (one, other)]
    odd = sorted(key for key in states[0].keys() | states[1].keys() if states[0].get(key) != states[1].get(key))
    return {
        "checkpoint": same_kinds and not different,
        "kinds": list(one.kinds()),
        "numbers_compared": numbers,
        "different": different,
        "state": not odd,
        "state_differs_in": odd,
    }


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """NaN equals NaN here, and 0 is not -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def trajectory(run_dir: Path) -> list[tuple[int, float, float, str]]:
    """(step, loss, gradient norm, batch digest) of every step, the last row of a step winning."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [(step, row["loss"], row["grad_norm"], row["batch_digest"]) for step, row in rows.items()]


def evaluations(run_dir: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """Figures by step and weights, the last of each winning."""
    rows = [row for row in read_events(run_dir / "metrics.jsonl") if row["event"] == "eval"]
    return {(row["step"], row["weights"]): {k: row[k] for k in ("loss", "top1", "top5") if k in row} for row in rows}


def followed(run_dir: Path, fault: dict[str, Any], lives: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What came of a fault: how the life ended that it struck, where the next one began, what the run said."""
    at, until = fault["time"], fault["time"] + fault.get("back_s", math.inf)
    struck = [life for life in lives if life["time"] <= at][-1:]
    after = [life for life in lives if at < life["time"] <= until]
    news = [row for row in read_events(run_dir / "metrics.jsonl") if at < row.get("time", 0.0) <= until]
    figures: dict[str, Any] = {"lives": len(after)}
    if after:
        ended = {key: struck[0].get(key) for key in ("code", "cause")} if struck else {}
        # The last of them began where the run says: the newest checkpoint by name, which a life counts, may be damaged.
        begun = [row["step"] for row in news if row["event"] == "start"] or [after[-1]["step"]]
        figures |= {**ended, "resumed_from": begun[-1], "steps_lost": max(0, fault["step"] - begun[-1])}
    for name in ("save_failed", "fell_back"):
        said = [str(row.get("problem")) for row in news if row["event"] == name]
        figures |= {name: [text.replace(f"{run_dir}/", "") for text in said]} if said else {}
    return figures


def by_kind(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per kind: how many, seconds until the run was past the step again, steps done twice."""
    table = {}
    for kind in sorted({row["kind"] for row in rows}):
        mine = [row for row in rows if row["kind"] == kind]
        table[kind] = {
            "faults": len(mine),
            "back_s": [row.get("back_s") for row in mine],
            "steps_lost": [row.get("steps_lost", 0) for row in mine],
        }
    return table


def verdict(result: dict[str, Any]) -> bool:
    """Whether the run came through every fault, to the same end, with its time accounted for."""
    equal = result["equal"]
    same = all(equal.get(key) is True for key in ("trajectory", "evaluations", "checkpoint", "state"))
    share = result["soak"]["ledger"].get("unattributed_share")
    whole = result["undisturbed"]["finished"] and result["soak"]["finished"]
    return whole and same and len(result["faults"]) == result["planned"] and share is not None and share <= UNATTRIBUTED


def keep_small_files(runs: Path, work: Path) -> None:
    """Logs, rows and crash bundles of both runs, without checkpoints."""
    for run_dir in (runs / "undisturbed", runs / "soak"):
        if run_dir.parent != work.absolute():
            shutil.rmtree(work / run_dir.name, ignore_errors=True)
            shutil.copytree(run_dir, work / run_dir.name, ignore=shutil.ignore_patterns("checkpoints", "tb"))


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    soaked, whole, equal, ledger = result["soak"], result["undisturbed"], result["equal"], result["soak"]["ledger"]
    lines = [
        result["place"],
        f"{result['settings']['steps']} steps {'finished' if soaked['finished'] else 'NOT finished'} in "
        f"{soaked['wall_s']:.0f} s, with {len(result['faults'])} of {result['planned']} faults and "
        f"{len(soaked['lives'])} lives; undisturbed in {whole['wall_s']:.0f} s",
        f"{'fault':<12} {'times':>5}  {'back after s (each)':<32} steps done again (each)",
    ]
    for kind, row in result["kinds"].items():
        back, lost = (" ".join(map(str, row[key])) for key in ("back_s", "steps_lost"))
        lines.append(f"{kind:<12} {row['faults']:>5}  {back:<32} {lost}")
    what = {"trajectory": "steps", "evaluations": "evaluations", "checkpoint": "weights and moments", "state": "state"}
    said = ", ".join(f"{words} {'equal' if equal.get(key) is True else 'DIFFERENT'}" for key, words in what.items())
    lines.append(f"{said} ({equal['steps_compared']} steps, {equal.get('numbers_compared', 0):,} numbers)")
    if ledger:
        lines.append(
            f"goodput {ledger['goodput']:.1%} (undisturbed {whole['ledger'].get('goodput', 0):.1%}), effective "
            f"training time {ledger['ettr']:.1%} of {ledger['wall_s']:.0f} s; "
            f"unattributed {ledger['unattributed_share']:.2%}"
        )
        spent = sorted(ledger["seconds"].items(), key=lambda item: -item[1])
        lines.append(
            ", ".join(f"{goodput.BUCKETS[name]} {seconds:.1f} s" for name, seconds in spent if seconds >= 0.05)
        )
    lines.append("passed" if result["passed"] else "NOT passed")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
