"""Checkpoints against their peers: save and load of the same tensors, and DeepSpeed's sharded files to one file.

In this order: weights of a SwinV2 of the size asked for -> paired timings of saving and of loading them -> a ZeRO
checkpoint of that model, really written by DeepSpeed in processes of its own -> conversions in turn, ours and
`deepspeed.utils.zero_to_fp32`, each in a fresh process -> their two files compared bit for bit.

Everything that is timed ends on the disk (fsync) and begins in the page cache. Memory is what a conversion needs beside
itself: the peak of its process's anonymous pages, less those before it started. Pages of mapped files are not in it
(the system can drop them); they are told apart. This process samples, so the one that works is not slowed down.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from swin_scale.bench import checkpoint_async, zero_jobs
from swin_scale.bench.result import Result, describe, fixed_threads
from swin_scale.bench.timing import Comparison, compare
from swin_scale.checkpoint import Checkpoint, Fragment, begin, commit, load_safetensors, step_directory, write_rank_file
from swin_scale.checkpoint.tensorfile import read_header
from swin_scale.errors import SwinScaleError, UserError
from swin_scale.models import create_model

SPEED_BAR, MEMORY_BAR = 3.0, 1 / 3
"""A conversion is to be at least so many times as fast as the peer's, and to need at most this part of its memory."""

PARTS = ("save", "convert")
"""Saving with loading what was saved, and converting; each takes a while. ``async`` is the third, when it is asked for.
"""

SAMPLE_S = 0.001
_BYTES_ON_DISK = 40
"""Per parameter: three copies saved, or DeepSpeed's fp32 state and moments and two files converted, and some room."""
_BODIES = ("swinv2_large_patch4_window12_192_22k", "swinv2_tiny_patch4_window8_256", "swinv2_nano_patch4_window4_32")
_CONTROL, _PEER = "ours again", "zero_to_fp32"
_OURS, _TORCH, _SAFETENSORS = "ours", "torch.pth", "peer.safetensors"


def bench_checkpoint(
    *,
    params: float = 300e6,
    parts: Collection[str] = PARTS,
    rounds: int = 5,
    ranks: int = 2,
    zero_stage: int = 2,
    threads: int = 2,
    directory: str | None = None,
    out: str | None = None,
) -> Result:
    """Seconds and ratios of saving, loading and converting, above 1 where ours is faster; and memory of converting.

    Args:
        params: parameters of the model; a SwinV2 whose class count fills it up.
        parts: of `PARTS`, or ``async``.
        rounds: ABBA rounds of each comparison; 20 give the 40 pairs that a claim on speed needs.
        ranks: processes that write the ZeRO checkpoint.
        zero_stage: 1, 2 or 3.
        threads: of torch, in every process.
        directory: where files are written, and removed again; default: the system's place for temporary files.
        out: file for the result as JSON.

    Raises UserError when the disk has no room, SwinScaleError when the converted files differ.
    """
    name, overrides = model_of(params)
    place = Path(directory or tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    if free < _BYTES_ON_DISK * params:
        raise UserError(
            f"{place} has {free / 1e9:.1f} GB free, {_BYTES_ON_DISK * params / 1e9:.1f} GB are needed; use --dir"
        )
    with fixed_threads(threads), tempfile.TemporaryDirectory(prefix="swin-bench-", dir=place) as work:
        measured: dict[str, Any] = {}
        if "save" in parts:
            measured["save"], total = _saved(name, overrides, Path(work), rounds)
            measured["load"] = _loaded(Path(work), rounds, total)
        if "async" in parts:
            measured |= checkpoint_async.measure(_weights(name, overrides), Path(work), rounds)
        if "convert" in parts:
            measured["convert"] = _convert(
                name, overrides, Path(work), rounds=rounds, ranks=ranks, stage=zero_stage, threads=threads
            )
        command = f"swin-scale bench checkpoint --part {' '.join(parts)} --params {params:g} --rounds {rounds} "
        command += f"--ranks {ranks} --zero-stage {zero_stage} --threads {threads}"
        figures = describe("checkpoint", command, torch.device("cpu"))
    figures["settings"] = {
        "model": name,
        "overrides": overrides,
        "parameters": parameters_of(name, overrides),
        "rounds": rounds,
        "ranks": ranks,
        "zero_stage": zero_stage,
    }
    figures |= measured
    result = Result(figures=figures, table=table(figures))
    if out is not None:
        result.write(out)
    return result


def model_of(params: float) -> tuple[str, dict[str, Any]]:
    """(name, overrides) of a SwinV2 with nearly `params` parameters: the largest body that fits, and a classifier."""
    for name in _BODIES:
        empty = parameters_of(name, {"num_classes": 0})
        width = parameters_of(name, {"num_classes": 1}) - empty
        classes = round((params - empty) / width)
        if classes >= 1:
            return name, {"num_classes": classes}
    raise UserError(f"--params {params:g} is below the smallest model's {empty + width}")


def parameters_of(name: str, overrides: Mapping[str, Any]) -> int:
    """How many parameters a model has."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create_model(name, **overrides).parameters())


# -- save and load -----------------------------------------------------------------------------------------------------


def _saved(name: str, overrides: dict[str, Any], work: Path, rounds: int) -> tuple[dict[str, Any], float]:
    """Timings of saving a model's weights in three ways, all left below `work`; and the sum that tells them."""
    tensors = _weights(name, overrides)

    def stock(path: Path, write: Callable[[dict[str, Tensor], Path], object]) -> None:
        write(tensors, path)
        zero_jobs.fsync(path)

    savers: dict[str, Callable[[], object]] = {
        "ours": lambda: save_checkpoint(work / _OURS, tensors),
        "torch.save": lambda: stock(work / _TORCH, torch.save),
        "safetensors": lambda: stock(work / _SAFETENSORS, safetensors.torch.save_file),
        _CONTROL: lambda: save_checkpoint(work / _OURS, tensors),
    }
    measured = compare(savers, rounds=rounds, control=_CONTROL)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {"bytes": total, **measured.as_dict()}, _touch(tensors)


def _weights(name: str, overrides: dict[str, Any]) -> dict[str, Tensor]:
    """Random ones, fp32, by parameter name."""
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in create_model(name, **overrides).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    return {key: torch.empty(shape).normal_(generator=generator) for key, shape in shapes.items()}


def _loaded(work: Path, rounds: int, expected: float) -> dict[str, Any]:
    """Timings of loading what `_saved` left, which is removed."""
    step = step_directory(work / _OURS, 1)
    loaders: dict[str, Callable[[], dict[str, Tensor]]] = {
        "ours": lambda: _load_checkpoint(step, verify=True),
        "ours, digests not checked": lambda: _load_checkpoint(step, verify=False),
        "torch.load": lambda: torch.load(work / _TORCH, weights_only=True),
        "safetensors": lambda: safetensors.torch.load_file(work / _SAFETENSORS),
        _CONTROL: lambda: _load_checkpoint(step, verify=True),
    }
    for label, loader in loaders.items():
        if _touch(loader()) != expected:
            raise SwinScaleError(f"what {label} loads is not what was saved; nothing was timed")
    # Values are touched, since a reader that maps its file has read nothing yet.
    calls: dict[str, Callable[[], object]] = {label: partial(_load_and_touch, load) for label, load in loaders.items()}
    measured = compare(calls, rounds=rounds, control=_CONTROL)
    size = (work / _SAFETENSORS).stat().st_size
    shutil.rmtree(work / _OURS)
    (work / _TORCH).unlink()
    (work / _SAFETENSORS).unlink()
    return {"bytes": size, **measured.as_dict()}


def save_checkpoint(root: Path, tensors: Mapping[str, Tensor]) -> Path:
    """What a run of one rank does with its fp32 weights: fragments, digests, manifest, fsync, one rename."""
    temporary = begin(root, 1)
    fragments = [
        Fragment(name=name, kind="master", shape=tuple(tensor.shape), start=0, data=tensor.view(-1))
        for name, tensor in tensors.items()
    ]
    written = write_rank_file(temporary, 0, fragments)
    return commit(
        temporary,
        step=1,
        rank_files=[written],
        state={"step": 1},
        config_text="",
        parameters={n: {"shape": list(t.shape), "dtype": "F32", "trained": True} for n, t in tensors.items()},
        model={},
    )


def _load_checkpoint(step: Path, *, verify: bool) -> dict[str, Tensor]:
    with Checkpoint.open(step, verify=verify) as checkpoint:
        return checkpoint.load_full()


def _load_and_touch(load: Callable[[], dict[str, Tensor]]) -> float:
    return _touch(load())


def _touch(tensors: Mapping[str, Tensor]) -> float:
    """A sum that needs a value of every page."""
    return sum(float(tensors[name].view(-1)[::1024].double().sum()) for name in sorted(tensors))


# -- convert -----------------------------------------------------------------------------------------------------------


def _convert(
    name: str, overrides: dict[str, Any], work: Path, *, rounds: int, ranks: int, stage: int, threads: int
) -> dict[str, Any]:
    source = work / "zero"
    zero_jobs.run_ranks(ranks, "write", str(source), name, overrides, stage, threads)
    ours, peer = work / "ours.safetensors", work / "peer" / "model.safetensors"
    measured: dict[str, list[dict[str, float]]] = {"ours": [], _PEER: []}

    def once(label: str) -> float:
        (ours if label == "ours" else peer).unlink(missing_ok=True)
        os.sync()  # what the last one left to be done on the disk, its removal included, is no part of this one's time
        if label == "ours":
            found = watched("convert", str(source), str(ours), name, threads)
        else:
            found = watched(_PEER, str(source), str(peer.parent), threads)
        measured[label].append(found)
        return found["seconds"]

    for label in measured:
        once(label)
    check_equal(ours, peer)
    measured = {label: [] for label in measured}
    pairs: list[tuple[float, float]] = []
    for _ in range(rounds):
        before, here, again, after = once("ours"), once(_PEER), once(_PEER), once("ours")
        pairs += [(before, here), (after, again)]
    comparison = Comparison(
        seconds={label: [run["seconds"] for run in runs] for label, runs in measured.items()}, pairs={_PEER: pairs}
    )
    memory = {label: _summary(runs) for label, runs in measured.items()}
    # Our worst against the peer's best.
    share = memory["ours"]["extra_gb"]["max"] / memory[_PEER]["extra_gb"]["min"]
    return {
        "source_bytes": sum(path.stat().st_size for path in source.rglob("*") if path.is_file()),
        "bytes": ours.stat().st_size,
        "equal_bit_for_bit": True,
        **comparison.as_dict(),
        "memory": memory,
        "memory_share": share,
        "bars": {
            "speed": {"at_least": SPEED_BAR, "reached": comparison.ratio(_PEER).lower >= SPEED_BAR},
            "memory": {"at_most": MEMORY_BAR, "reached": share <= MEMORY_BAR},
        },
    }


def _summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Least, median and most of each kind of memory."""
    return {
        key: {
            name: float(pick([run[key] for run in runs]))
            for name, pick in (("min", min), ("median", np.median), ("max", max))
        }
        for key in ("extra_gb", "mapped_gb")
    }


def check_equal(ours: Path, peer: Path) -> None:
    """Raise SwinScaleError unless two safetensors files hold the same names, dtypes, shapes and bits."""
    here, there = read_header(ours).entries, read_header(peer).entries
    if here.keys() != there.keys():
        odd = sorted(here.keys() ^ there.keys())
        raise SwinScaleError(
            f"{ours.name} and {peer.name} differ in {len(odd)} names, such as {odd[0]}; nothing was timed"
        )
    for name in here:
        # One at a time: both files are as large as the model.
        (mine, _), (theirs, _) = (load_safetensors(path, name.__eq__) for path in (ours, peer))
        a, b = mine[name], theirs[name]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(_bits(a), _bits(b)):
            raise SwinScaleError(f"{name} is not the same, bit for bit, in {ours} and {peer}; nothing was timed")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def watched(job: str, *arguments: Any) -> dict[str, float]:
    """Run a job of `zero_jobs` in a fresh process: its ``seconds``, and its memory while it ran (1e9 bytes).

    ``extra_gb`` is the peak of anonymous pages above those at its start, ``mapped_gb`` the same of mapped files.
    """
    with zero_jobs.started(job, *arguments) as process:
        assert process.stdin is not None and process.stdout is not None
        zero_jobs.expect(process, "ready")
        base = peak = _memory(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], SAMPLE_S)[0]:
            peak = tuple(map(max, peak, _memory(process.pid)))
        seconds = zero_jobs.answer(process, process.stdout.readline())
    anonymous, mapped = ((most - least) / 1e9 for most, least in zip(peak, base))
    return {"seconds": seconds, "extra_gb": anonymous, "mapped_gb": mapped}


def _memory(pid: int) -> tuple[int, ...]:
    """(anonymous, mapped from files) resident bytes of a process; zeros when it has ended."""
    found = {"RssAnon": 0, "RssFile": 0}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key in found:
                found[key] = 1024 * int(value.split()[0])
    return tuple(found.values())


def table(figures: dict[str, Any]) -> str:
    """One line per candidate of each comparison, then memory."""
    settings, machine = figures["settings"], figures["hardware"]
    lines = [
        f"{settings['model']}  {settings['parameters'] / 1e6:.1f}M parameters  ZeRO-{settings['zero_stage']} on "
        f"{settings['ranks']} ranks  {machine['cpu']}, {machine['threads']} threads",
        f"{'':<9}{'candidate':<27}{'median s':>9}{'GB/s':>7}{'ours is':>9}  95 % interval",
    ]
    claims = []
    for what in ("save", "load", "stall", "write", "convert"):
        if what not in figures:
            continue
        measured = figures[what]
        claims += [ratio["is_claim"] for name, ratio in measured["ratios"].items() if name != _CONTROL]
        for name, times in measured["seconds"].items():
            line = f"{what:<9}{name:<27}{times['median']:>9.3f}{measured['bytes'] / 1e9 / times['median']:>7.2f}"
            ratio = measured["ratios"].get(name)
            lines.append(line)
            if ratio:
                lines[-1] += f"{ratio['median']:>8.2f}x  {ratio['lower']:.2f} to {ratio['upper']:.2f}"
    for what in ("stall", "write"):
        lines += _bars(figures[what]["bars"]) if what in figures else []
    if "convert" in figures:
        lines += _conversion(figures["convert"])
    if not all(claims):
        lines.append(f"not a claim on speed: {2 * settings['rounds']} pairs, 40 are needed (--rounds 20)")
    return "\n".join(lines)


def _conversion(convert: Mapping[str, Any]) -> list[str]:
    """Memory and bars."""
    lines = []
    for name, memory in convert["memory"].items():
        extra, mapped = memory["extra_gb"], memory["mapped_gb"]
        lines.append(
            f"convert  {name:<27}{extra['median']:>9.3f} GB extra memory ({extra['min']:.3f} to {extra['max']:.3f}), "
            f"{mapped['median']:.3f} GB of mapped files"
        )
    lines.append(
        f"convert  equal bit for bit; ours needs {convert['memory_share']:.3f} of the peer's extra memory at most"
    )
    return lines + _bars(convert["bars"])


def _bars(bars: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for name, bar in bars.items():
        limit = " ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in bar.items() if key != "reached")
        lines.append(f"bar      {name}: {limit}, {'reached' if bar['reached'] else 'NOT reached'}")
    return lines
