"""Which tiles the Triton kernels of window attention use: a pure function of kernel, shape and chip.

    tiles(kernel, shape, chip) = the user's table, else the table measured on that chip, else a heuristic

The same shape gets the same tiles always, in a process and from run to run: nothing is timed behind the user's back,
so results do not change either. A table is a JSON file, made by ``swin-scale bench tune``, read when `TABLE` names it:

    {"chip": "NVIDIA H200",
     "tiles": {"forward N=144 d=32 float16": {"rows": 64, "columns": 32, "warps": 4, "stages": 2}}}

Tables of chips that were measured lie in `tables/` beside this file, named after the chip (`NVIDIA_H200.json`).
None has been measured yet.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from swin_scale.errors import UserError
from swin_scale.files import write_atomic

TABLE = "SWIN_SCALE_TILES"
"""Environment variable: the path of a table that goes before everything else."""
TABLES = Path(__file__).parent / "tables"
WHOLE_WINDOW = 64
"""Windows of up to so many tokens are one tile: a program then has all of its window, and loops over windows."""

Kernel = Literal["forward", "backward", "backward_rows", "backward_columns", "backward_bias"]
"""`backward` serves whole windows; of larger ones, `backward_rows` makes dq, `backward_columns` dk and dv,
`backward_bias` the gradient of the bias."""


@dataclass(frozen=True)
class Shape:
    """What tiles depend on of a call: tokens of a window, channels of a head, dtype of the activations."""

    tokens: int
    head_dim: int
    dtype: torch.dtype

    def key(self, kernel: Kernel) -> str:
        """Its name in a table."""
        return f"{kernel} N={self.tokens} d={self.head_dim} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Chip:
    """What tiles depend on of a device."""

    name: str
    processors: int
    """Streaming multiprocessors."""
    l2_bytes: int


@dataclass(frozen=True)
class Tiles:
    """`rows` (queries) by `columns` (keys) of logits at a time; powers of two of at least 16."""

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None
    """Limit of a thread's registers, to have more programs on a processor; None: as many as the compiler likes."""

    def for_dropout(self) -> "Tiles":
        """For a kernel that draws random numbers besides, which take registers: up to eight warps and no limit."""
        return replace(self, warps=max(self.warps, min(8, 2 * self.warps)), registers=None)

    def options(self) -> dict[str, int]:
        """How Triton's launcher wants to be told."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options if self.registers is None else options | {"maxnreg": self.registers}


HOST = Chip("the host", processors=1, l2_bytes=1 << 20)
"""Stands for a chip under Triton's interpreter: one processor, so that programs are few and loop."""


@cache
def chip_of(device: torch.device) -> Chip:
    """The chip behind a device; asks the driver once and waits for nothing."""
    if device.type != "cuda":
        return HOST
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.name, properties.multi_processor_count, properties.L2_cache_size)


@cache
def tiles(kernel: Kernel, shape: Shape, chip: Chip) -> Tiles:
    """The tiles of a kernel. Raises UserError for a table that cannot be read."""
    key = shape.key(kernel)
    for table in _tables(os.environ.get(TABLE), chip.name):
        if key in table:
            return table[key]
    return heuristic(kernel, shape)


def heuristic(kernel: Kernel, shape: Shape) -> Tiles:
    """Tiles by shape alone: little padding, and no spills on chips of compute capability 8.0, 9.0 and 10.0."""
    N, lanes, wide = shape.tokens, power_of_two(shape.head_dim), shape.dtype == torch.float32
    if N <= WHOLE_WINDOW:
        side = power_of_two(N)
        warps = {16: 1, 32: 2, 64: 4}[side]
        if kernel == "forward" and wide:
            # Products in fp32 have their operands in registers, so a tile is spread over more threads.
            return Tiles(side, side, warps * (2 if lanes <= 32 else 4), stages=1)
        if kernel == "forward":
            # 128 registers: four programs on a processor. Tiles that mask padding take more and would spill.
            limit = 128 if side == N and shape.head_dim == lanes <= 32 else None
            return Tiles(side, side, warps * (1 if lanes <= 32 else 2), stages=2, registers=limit)
        # Backward of a tile that is padded, or in fp32, has no registers left for a pipeline. Of a padded one the
        # assembler would spill a few bytes to run more programs at once; told that it may have all, it does not.
        warps *= 2 if wide or lanes > 64 else 1
        limit = 255 if side != N and not wide else None
        return Tiles(side, side, warps, stages=2 if side == N and not wide else 1, registers=limit)
    rows = _largest((128, 64, 32), N, padding=1 / 3)
    columns = _largest((64, 32, 16), N, padding=1 / 7)
    if kernel == "forward" and not wide and lanes <= 32:
        # 128 registers let a processor have 16 warps. Without the limit a few more are taken, and it has 8 or 12.
        return Tiles(rows, columns, warps=rows // 16, stages=2, registers=128)
    if kernel == "backward_bias":
        # Two products and no third: warps share the tile both ways.
        if wide or lanes > 64:
            return Tiles(32, 32, warps=8, stages=2)
        return Tiles(min(rows, 64), max(columns, 32), warps=4, stages=2)
    rows, columns = min(rows, 64), min(columns, 32)
    if kernel == "forward":
        return Tiles(rows, columns, warps=rows // (8 if wide else 16), stages=1 if wide else 2)
    if kernel == "backward_columns":
        # Tiles of the transpose: the keys lie where warps share them out.
        rows, columns = columns, rows
    return Tiles(rows, columns, warps=max(rows, columns) // (8 if wide else 16), stages=2)


def power_of_two(n: int) -> int:
    """The smallest power of two from 16 on that is not less than `n`."""
    return max(16, 1 << (n - 1).bit_length())


def window_slots(windows: int, heads: int, chip: Chip, per_processor: int = 8) -> int:
    """How many programs share the windows of one head, for kernels that loop over windows.

    Enough programs over all heads to fill the chip with `per_processor` on each processor, and never more than windows.
    """
    return max(1, min(windows, chip.processors * per_processor // heads))


def window_group(windows: int, bytes_of_window: int, chip: Chip) -> int:
    """How many windows to visit before going on to the next rows of the same head.

    All of them read one strip of the bias, which so stays in the caches next to the processors, while what every strip
    reads of those windows still fits half of the L2 cache.
    """
    return max(1, min(windows, chip.l2_bytes // 2 // bytes_of_window))


@contextlib.contextmanager
def using_table(path: Path) -> Iterator[None]:
    """Within, the table at `path` goes before all else, as if `TABLE` named it: for whoever measures tiles."""
    before = os.environ.get(TABLE)
    os.environ[TABLE] = str(path)
    tiles.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ[TABLE]
        else:
            os.environ[TABLE] = before
        tiles.cache_clear()


def write_table(path: Path, chip: Chip, table: Mapping[str, Tiles]) -> None:
    """Write a table for `TABLE`; its keys are made by `Shape.key`."""
    rows = {key: asdict(value) for key, value in sorted(table.items())}
    write_atomic(path, (json.dumps({"chip": chip.name, "tiles": rows}, indent=1) + "\n").encode())


@cache
def _tables(user: str | None, chip: str) -> tuple[dict[str, Tiles], ...]:
    measured = TABLES / f"{chip.replace(' ', '_')}.json"
    found = [read_table(measured, chip)] if measured.exists() else []
    return (*([read_table(Path(user), chip)] if user else []), *found)


def read_table(path: Path, chip: str) -> dict[str, Tiles]:
    """The table in a file. Raises UserError where it is unreadable, of another chip, or holds impossible tiles."""
    try:
        content = json.loads(path.read_text())
        table = {key: Tiles(**row) for key, row in content["tiles"].items()}
        measured_on = content["chip"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{TABLE}: {path} is no table of tiles ({error}); write it with `swin-scale bench tune`"
        ) from error
    if measured_on != chip:
        raise UserError(f"{TABLE}: {path} was measured on {measured_on}, this is {chip}; unset {TABLE} or tune again")
    for key, row in table.items():
        for name, value, least in (("rows", row.rows, 16), ("columns", row.columns, 16), ("warps", row.warps, 1)):
            if value < least or value & (value - 1):
                raise UserError(f"{TABLE}: {path}: {key}: {name} is {value}, not a power of two from {least} on")
    return table


def _largest(sizes: tuple[int, ...], tokens: int, *, padding: float) -> int:
    """The first of falling `sizes` whose multiples cover `tokens` with at most that share of padding, else the last."""
    return next((size for size in sizes if -tokens % size <= padding * tokens), sizes[-1])
