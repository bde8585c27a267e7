"""A table of tiles measured on the GPU at hand, for `kernels.tuning`: ``swin-scale bench tune --out TABLE``.

For each shape, dtype and kernel, from the tiles in use on: one property after the other is varied -> what does not
compile, or errs more than the tiles in use, is out -> the fastest of a quick look goes on. The tiles so found are then
measured against those in use in pairs, and enter the table only where the lower bound of the gain is above `LEAST`, so
a table holds what was faster and nothing that was only luckier.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swin_scale.bench.kernel_peers import Region, fused
from swin_scale.bench.measure import captured, failure, peer_errors
from swin_scale.bench.region import Inputs, Shape, draw, judged_images, outcome, shapes
from swin_scale.bench.result import Result, describe
from swin_scale.bench.timing import Ratio, compare, seconds_of
from swin_scale.errors import UserError
from swin_scale.kernels import tuning
from swin_scale.kernels.choice import why_not_triton
from swin_scale.kernels.tuning import Chip, Kernel, Tiles

LEAST = 1.01
"""Gain of the whole pass, lower bound, that puts tiles into a table."""
ERROR_FACTOR = 1.5
"""Other tiles add in another order: so many times the error of the tiles in use they may have."""
SCALE_FACTOR = 10.0
"""The same for the gradient of the scale, one number a head, whose error is a matter of luck."""
LOOKS = 5

Run = Callable[[], object]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def bench_tune(
    names: Sequence[str] = (),
    *,
    batch: int = 128,
    dtypes: Sequence[str] = ("fp16", "bf16"),
    rounds: int = 20,
    budget: float | None = None,
    device: str = "cuda",
    out: str | None = None,
) -> Result:
    """Measure tiles for shapes of `region.shapes` (default: its whole table), each in its shifted form if it has one.

    Args:
        batch, dtypes, rounds: as of `bench kernels`.
        budget: seconds after which no further kernel is begun; those left out are named.
        out: file for the table, in the format of `tuning`.

    Raises UserError where no Triton kernel serves.
    """
    where = torch.device(device)
    wanted = _distinct(names, dtypes)
    for shape, dtype in wanted:
        if (reason := why_not_triton(where, DTYPES[dtype], head_dim=shape.head_dim, tokens=shape.tokens)) is not None:
            raise UserError(f"bench tune measures Triton kernels, and {reason}")
    chip, deadline = tuning.chip_of(where), None if budget is None else time.monotonic() + budget
    table: dict[str, Tiles] = {}
    lines, left_out = [], []
    for shape, dtype in wanted:
        inputs = draw(shape, batch, DTYPES[dtype], where, seed=0)
        for kernel in kernels_of(shape):
            key = _sized(shape, DTYPES[dtype]).key(kernel)
            if deadline is not None and time.monotonic() > deadline:
                left_out.append(key)
                continue
            found, gain, tried = tune(kernel, shape, inputs, chip, rounds=rounds)
            lines.append(_line(key, found, gain, tried))
            if found is not None:
                table[key] = found
    lines += [f"left out, no time: {key}" for key in left_out]
    command = f"swin-scale bench tune --batch {batch} --rounds {rounds} --dtypes {' '.join(dtypes)}"
    command += f" --shapes {' '.join(map(repr, names))}" if names else ""
    figures = describe("tune", command, where) | {
        "chip": chip.name,
        "tiles": {key: asdict(tiles) for key, tiles in table.items()},
        "found": lines,
        "left_out": left_out,
    }
    result = Result(figures=figures, table="\n".join(lines))
    if out is not None:
        result.write(out)
    return result


def kernels_of(shape: Shape) -> tuple[Kernel, ...]:
    """The kernels that serve windows of this size."""
    if shape.tokens <= tuning.WHOLE_WINDOW:
        return "forward", "backward"
    return "forward", "backward_rows", "backward_columns", "backward_bias"


def variations(kernel: Kernel, tokens: int, start: Tiles) -> Iterator[Callable[[Tiles], list[Tiles]]]:
    """For each property in turn, the other values it may have in tiles that are otherwise as given."""
    whole = tokens <= tuning.WHOLE_WINDOW
    values: dict[str, tuple[Any, ...]] = {} if whole else {"rows": (32, 64, 128), "columns": (16, 32, 64, 128)}
    values |= {"warps": (1, 2, 4, 8, 16), "stages": (1, 2, 3), "registers": (None, 96, 128, 168, 255)}
    for name, choice in values.items():

        def others(tiles: Tiles, name: str = name, choice: tuple[Any, ...] = choice) -> list[Tiles]:
            return [replace(tiles, **{name: value}) for value in choice if value != getattr(tiles, name)]

        yield others


def search(start: Tiles, steps: Iterator[Callable[[Tiles], list[Tiles]]], seconds: Callable[[Tiles], float]) -> Tiles:
    """Coordinate descent: after each step the fastest tiles seen, inf being tiles that may not be used."""
    best, least = start, seconds(start)
    for step in steps:
        for tiles in step(best):
            if (time_of := seconds(tiles)) < least:
                best, least = tiles, time_of
    return best


def tune(
    kernel: Kernel, shape: Shape, inputs: Inputs, chip: Chip, *, rounds: int
) -> tuple[Tiles | None, Ratio | None, dict[str, str]]:
    """(tiles that are faster than those in use, or None; the gain of the pass; who could not take part and why)."""
    region = fused("ours", shape, inputs.qkv.dtype, inputs.qkv.device)
    size, refused = _sized(shape, inputs.qkv.dtype), dict[str, str]()
    start = tuning.tiles(kernel, size, chip)
    images = judged_images(shape, len(inputs.qkv))
    wanted = outcome(shape, inputs, images)
    upstream = torch.zeros_like(inputs.upstream)
    upstream[images] = inputs.upstream[images]
    run = _pass(kernel, region, inputs)

    with tempfile.TemporaryDirectory() as folder:

        def table_of(tiles: Tiles) -> Path:
            path = Path(folder) / ("-".join(map(str, asdict(tiles).values())) + ".json")
            tuning.write_table(path, chip, {size.key(kernel): tiles})
            return path

        def errors(tiles: Tiles) -> dict[str, float]:
            with tuning.using_table(table_of(tiles)):
                got = region.quantities(shape, inputs, upstream, images)
            return {name: float((got[name] - value).norm() / value.norm()) for name, value in wanted.items()}

        allowed = {
            name: error * (SCALE_FACTOR if name == "scale" else ERROR_FACTOR) for name, error in errors(start).items()
        }

        def seconds(tiles: Tiles) -> float:
            try:
                worse = [name for name, error in errors(tiles).items() if not error <= allowed[name]]
                if worse:
                    refused[str(tiles)] = f"its {worse[0]} errs more than with the tiles in use"
                    return float("inf")
                call = ready(run, table_of(tiles), inputs.qkv)
                return min(seconds_of(call, device=inputs.qkv.device) for _ in range(LOOKS))
            except peer_errors() as error:
                refused[str(tiles)] = failure(error)
                return float("inf")

        best = search(start, variations(kernel, shape.tokens, start), seconds)
        if best == start:
            return None, None, refused
        calls = {"found": ready(run, table_of(best), inputs.qkv), "in use": ready(run, table_of(start), inputs.qkv)}
        gain = compare(calls, rounds=rounds, device=inputs.qkv.device).ratio("in use")
    return (best if gain.is_claim and gain.lower > LEAST else None), gain, refused


def ready(run: Run, table: Path, tensor: Tensor) -> Run:
    """`run` with the tiles of a table: as a CUDA graph, which keeps the kernels it was captured with; else by swaps."""

    def swapped() -> None:
        with tuning.using_table(table):
            run()

    if tensor.device.type == "cuda":
        return captured(swapped)
    return swapped


def _pass(kernel: Kernel, region: Region, inputs: Inputs) -> Run:
    leaves = region.leaves(inputs)
    if kernel == "forward":
        return torch.inference_mode()(lambda: region.outputs(leaves))
    return lambda: region.gradients(leaves, inputs.upstream)


def _sized(shape: Shape, dtype: torch.dtype) -> tuning.Shape:
    return tuning.Shape(shape.tokens, shape.head_dim, dtype)


def _distinct(names: Sequence[str], dtypes: Sequence[str]) -> list[tuple[Shape, str]]:
    """One shape, the largest map first, for each entry that a table can have."""
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    if unknown:
        raise UserError(f"--dtypes {unknown[0]} is not one of {', '.join(DTYPES)}")
    found: dict[tuple[int, int, str], tuple[Shape, str]] = {}
    for shape in shapes(names):
        for dtype in dtypes:
            found.setdefault((shape.tokens, shape.head_dim, dtype), (shape, dtype))
    return list(found.values())


def _line(key: str, found: Tiles | None, gain: Ratio | None, refused: Mapping[str, str]) -> str:
    out = f", {len(refused)} tiles could not take part" if refused else ""
    if gain is None:
        return f"{key}: the tiles in use are the fastest{out}"
    bounds = f"{gain.median:.3f}x ({gain.lower:.3f} to {gain.upper:.3f}, {gain.pairs} pairs)"
    if found is None:
        return f"{key}: no gain that can be claimed, {bounds}{out}"
    return f"{key}: {json.dumps(asdict(found))} {bounds}{out}"
