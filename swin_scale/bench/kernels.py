"""Window attention, norms and token moves against how others do them: same inputs, one process.

For each shape, in this order: inputs that are exact in the dtype -> correctness gate against fp64 at the batch that is
timed -> peak memory -> paired timings. A code that fails the gate is listed with its errors and not timed; when ours
does, nothing of that shape is. Beside each ratio stand the bytes per second that the least traffic of the op comes to,
and how near that is to what the same run measured this machine to be able to do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from swin_scale.bench import KERNEL_PEERS, kernel_ops, kernel_peers
from swin_scale.bench.ceilings import ceilings
from swin_scale.bench.kernel_gate import PEER_LIMIT, allowance, excess, gate, luck_of_scale
from swin_scale.bench.kernel_peers import Region
from swin_scale.bench.kernel_report import picture, table
from swin_scale.bench.measure import LAUNCHES, MODES, Candidate, measure, peak_bytes
from swin_scale.bench.region import (
    SHIFTS,
    Floor,
    Inputs,
    Shape,
    draw,
    floors,
    shapes,
)
from swin_scale.bench.result import Result, describe, fixed_threads
from swin_scale.bench.timing import Comparison
from swin_scale.errors import SwinScaleError, UserError
from swin_scale.files import write_atomic

PARTS = ("attention", "ops")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

SETS, CACHES = 3, 3
"""At least so many sets of inputs, and so many that they exceed the second cache so many times."""

BARS: dict[str, dict[str, float]] = {
    "forward": {"official-amp": 10, "official": 6, "compile": 2.5, "sdpa": 1.8, "flex": 1.8},
    "forward+backward": {
        **{"official-amp": 12, "official": 7, "compile": 3, "sdpa": 2, "flex": 2},
        # The same bits every time may cost a tenth.
        "ours-atomic": 1 / 1.1,
    },
}
"""How many times as fast as these ours is to be on an H200 at batch 128, in half precision."""

FLOOR_BARS = {"forward": {"memory": 0.6, "softmax": 0.5}, "forward+backward": {"memory": 0.45, "softmax": 0.45}}
"""Part of its floor that ours is to reach: of memory with windows up to `SMALL_WINDOW` tokens, else of softmax."""
SMALL_WINDOW = 144
MEMORY_BARS = {256: 1 / 8, 576: 1 / 20}
"""Part of the official chain's peak memory that ours may take, by tokens of a window."""


def bench_kernels(
    names: Sequence[str] = (),
    *,
    models: Sequence[str] = (),
    batch: int | None = None,
    dtypes: Sequence[str] = (),
    only: Sequence[str] = (),
    launches: Sequence[str] = (),
    rounds: int = 20,
    budget: float | None = None,
    shifts: Sequence[str] = SHIFTS,
    parts: Sequence[str] = (),
    official: str | None = None,
    fwa: str | None = None,
    threads: int = 2,
    device: str | None = None,
    out: str | None = None,
) -> Result:
    """Speed ratios of our kernels to their peers, above 1 where ours are faster.

    Args:
        names: shapes of `region.shapes`; default: all of its table, unless `models` are named.
        models: all stages of these models of `list_models()`.
        batch: images; default 128 on a GPU, 2 on a CPU.
        dtypes: of `DTYPES`; default fp16 and bf16 on a GPU, fp32 on a CPU.
        only: codes to compare with, of `KERNEL_PEERS`; default: all that can run there, without the autotuned compile.
        launches: `calls`, `graphs` or both (default) on a GPU; a CPU has calls.
        rounds: see `timing.compare`; 20 give the 40 pairs that a claim needs.
        budget: seconds after which no further shape is begun; those left out are named.
        shifts: of `region.SHIFTS`.
        parts: `attention`, `ops` (norms, patch merging, MoE token moves) or both; default: both on a GPU, where ours
            are not torch's own.
        official: a checkout of microsoft/Swin-Transformer; fwa: one of emiledgl/flash-window-attention-v2.
        threads: of torch on the CPU.
        device: default: the first CUDA device, or the CPU.
        out: file for the result as JSON; a picture of it is written beside it as SVG.

    Raises UserError for unknown names, SwinScaleError, after all else has been written, when ours failed a gate.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = where.type == "cuda"
    batch = batch or (128 if gpu else 2)
    dtypes = tuple(dtypes) or (("fp16", "bf16") if gpu else ("fp32",))
    launches = tuple(launches) or (LAUNCHES if gpu else LAUNCHES[:1])
    only = tuple(only) or tuple(
        name for name in KERNEL_PEERS if name != "autotuned" and (gpu or name in ("official", "official-code", "sdpa"))
    )
    _check(dtypes, only, launches, gpu)
    parts = tuple(parts) or (PARTS if gpu else PARTS[:1])
    wanted = shapes(names, models, shifts) if "attention" in parts else []
    deadline = None if budget is None else time.monotonic() + budget
    cases: list[dict[str, Any]] = []
    left_out: list[str] = []
    rates: dict[str, Any] = {}
    with fixed_threads(threads):
        for dtype in dtypes:
            rates[dtype] = ceilings(DTYPES[dtype], where)
        for shape in wanted:
            for dtype in dtypes:
                if deadline is not None and time.monotonic() > deadline:
                    left_out.append(f"{shape.title}, {dtype}")
                    continue
                cases.append(_case(shape, dtype, batch, where, only, launches, rounds, rates[dtype], official, fwa))
        measured_ops = []
        for dtype in dtypes if "ops" in parts else ():
            if deadline is not None and time.monotonic() > deadline:
                left_out.append(f"norms, patch merging and token moves, {dtype}")
                continue
            measured_ops += kernel_ops.bench_ops(
                dtype, DTYPES[dtype], batch, where, launches, rounds, rates[dtype], compiled="compile" in only
            )
        figures = describe(
            "kernels",
            _command(names, models, shifts, parts, batch, dtypes, only, launches, rounds, official, fwa, threads),
            where,
        )
    figures |= {
        "settings": {
            "batch": batch,
            "rounds": rounds,
            "dtypes": list(dtypes),
            "launches": list(launches),
            "device": where.type,
            "note": ""
            if gpu
            else "CPU variants: ours in cache-sized pieces, the official chain and SDPA, in eager mode",
        },
        "ceilings": rates,
        "cases": cases,
        "ops": measured_ops,
        "left_out": left_out,
    }
    result = Result(figures=figures, table=table(figures))
    if out is not None:
        result.write(out)
        write_atomic(Path(out).with_suffix(".svg"), picture(figures).encode())
    wrong = [f"{one['title']}, {one['dtype']}: {one['failed']}" for one in cases + measured_ops if "failed" in one]
    if wrong:
        raise SwinScaleError(f"{result}\nours failed its gate and was not timed: {'; '.join(wrong)}")
    return result


def _case(
    shape: Shape,
    dtype: str,
    batch: int,
    device: torch.device,
    only: Sequence[str],
    launches: Sequence[str],
    rounds: int,
    rates: Mapping[str, Any],
    official: str | None,
    fwa: str | None,
) -> dict[str, Any]:
    """Gate, memory and timings of one shape; `failed` instead of the last two when ours is wrong."""
    # What was compiled for another shape counts against the compiler's limit on variants of one function.
    torch.compiler.reset()
    moved = 4 * shape.elements(batch) * DTYPES[dtype].itemsize
    cache = rates["l2_bytes"]
    sets = max(SETS, -(-CACHES * cache // moved)) if cache else 1
    inputs = [draw(shape, batch, DTYPES[dtype], device, seed) for seed in range(sets)]
    regions, missing = kernel_peers.build(shape, DTYPES[dtype], device, only=only, official=official, fwa=fwa)
    errors = gate(shape, regions, inputs[0])
    allowed = allowance(errors, DTYPES[dtype], luck_of_scale(shape, inputs[0]))
    least = floors(shape, batch, DTYPES[dtype])
    case: dict[str, Any] = {
        "title": shape.title,
        "shape": shape.as_dict(),
        "dtype": dtype,
        "batch": batch,
        "sets": sets,
        "ours": "torch in cache-sized pieces" if "ours-fused" in missing else "fused",
        "gate": errors,
        "allowed": allowed,
        "missing": missing,
        "floors": {mode: {"bytes": floor.bytes, "flops": floor.flops} for mode, floor in least.items()},
    }
    worst = errors["ours"].get("failed") or excess(errors["ours"], allowed)
    if worst is not None:
        return case | {"failed": worst}
    regions = _admitted(regions, errors, allowed, missing, PEER_LIMIT[DTYPES[dtype]])
    case["memory"] = _memory(shape, regions, inputs[0], device)
    candidates = [Candidate(name=region.name, calls=_calls(region, inputs)) for region in regions]
    measured, untimed = measure(candidates, modes=MODES, launches=launches, sets=sets, rounds=rounds, device=device)
    missing |= untimed
    has_bars = device.type == "cuda" and dtype != "fp32"
    case["launches"] = {
        launch: {
            mode: _described(comparison, mode, least[mode], rates, shape, has_bars=has_bars)
            for mode, comparison in modes.items()
        }
        for launch, modes in measured.items()
    }
    return case


def _calls(region: Region, inputs: Sequence[Inputs]) -> dict[str, Any]:
    leaves = [region.leaves(one) for one in inputs]
    return {
        "forward": lambda i: region.outputs(leaves[i]),
        "forward+backward": lambda i: region.gradients(leaves[i], inputs[i].upstream),
    }


# -- who may be timed, and what goes beside the times ------------------------------------------------------------------


def _admitted(
    regions: Sequence[Region],
    errors: Mapping[str, Mapping[str, Any]],
    allowed: Mapping[str, float],
    missing: dict[str, str],
    limit: float,
) -> list[Region]:
    """Who may be timed; the others go to `missing`."""
    for region in regions:
        found = errors[region.name]
        bound = allowed if region.name.startswith("ours") else dict.fromkeys(allowed, limit)
        reason = found["failed"] if "failed" in found else excess(found, bound)
        if reason is not None:
            missing[region.name] = reason
    return [region for region in regions if region.name not in missing]


def _memory(shape: Shape, regions: Sequence[Region], inputs: Inputs, device: torch.device) -> dict[str, Any] | None:
    """Peak bytes of forward + backward above the inputs, and ours as a part of the official chain's under AMP."""
    if device.type != "cuda":
        return None
    peaks: dict[str, int | None] = {}
    for region in regions:
        leaves = region.leaves(inputs)
        try:
            peaks[region.name] = peak_bytes(partial(region.gradients, leaves, inputs.upstream), device)
        except torch.OutOfMemoryError:
            # What was left over from the gate is gone, but memory may be in pieces; it is then not timed either.
            continue
    theirs, ours = peaks.get("official-amp"), peaks.get("ours")
    share = ours / theirs if ours is not None and theirs else None
    bar = MEMORY_BARS.get(shape.tokens)
    reached = None if share is None or bar is None else share <= bar
    return {"bytes": peaks, "share": share, "at_most": bar, "reached": reached}


def _described(
    comparison: Comparison, mode: str, floor: Floor, rates: Mapping[str, Any], shape: Shape, *, has_bars: bool
) -> dict[str, Any]:
    """Times and ratios, what rate each code comes to, how near to its floors, and which bars were reached."""
    figures = comparison.as_dict()
    least = floor.seconds(rates["copy_bytes_per_s"], rates["exp_per_s"], rates["matmul_flops"])
    figures["achieved"] = {
        name: {
            "bytes_per_s": floor.bytes / times["median"],
            "of_floor": {kind: value / times["median"] for kind, value in least.items() if value is not None},
        }
        for name, times in figures["seconds"].items()
    }
    figures["floor_seconds"] = least
    figures["bars"] = {
        name: {"at_least": bar, "reached": comparison.ratio(name).lower >= bar}
        for name, bar in BARS[mode].items()
        if has_bars and name in comparison.pairs
    }
    kind = "memory" if shape.tokens <= SMALL_WINDOW else "softmax"
    reached, bar = figures["achieved"]["ours"]["of_floor"].get(kind), FLOOR_BARS[mode][kind]
    if has_bars and reached is not None:
        figures["bars"]["ours"] = {"at_least": bar, "of": kind, "reached": reached >= bar}
    return figures


def _check(dtypes: Sequence[str], only: Sequence[str], launches: Sequence[str], gpu: bool) -> None:
    for flag, values, known in (
        ("dtypes", dtypes, tuple(DTYPES)),
        ("peers", only, KERNEL_PEERS),
        ("launches", launches, LAUNCHES),
    ):
        for value in values:
            if value not in known:
                raise UserError(f"--{flag} {value} is not one of {', '.join(known)}")
    if "graphs" in launches and not gpu:
        raise UserError("--launches graphs: CUDA graphs need a CUDA device; use --launches calls")


def _command(
    names: Sequence[str],
    models: Sequence[str],
    shifts: Sequence[str],
    parts: Sequence[str],
    batch: int,
    dtypes: Sequence[str],
    only: Sequence[str],
    launches: Sequence[str],
    rounds: int,
    official: str | None,
    fwa: str | None,
    threads: int,
) -> str:
    words = ["swin-scale bench kernels", f"--batch {batch} --rounds {rounds} --threads {threads}"]
    for flag, values in (
        ("parts", parts),
        ("shapes", [f"'{name}'" for name in names]),
        ("models", models),
        ("shifts", shifts),
        ("dtypes", dtypes),
        ("launches", launches),
        ("peers", only),
    ):
        words += [f"--{flag} {' '.join(values)}"] * bool(values)
    words += ["--official DIR"] * (official is not None) + ["--fwa DIR"] * (fwa is not None)
    return " ".join(words)
