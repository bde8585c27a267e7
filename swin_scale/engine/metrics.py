"""What a run shows: rows of metrics.jsonl, TensorBoard, a progress bar, and the figures of speed and memory.

A step adds a row whose tensors stay on the device; `MetricWriter.flush` moves all pending ones in one transfer, so the
step itself never waits for the device.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from swin_scale.files import write_atomic
from swin_scale.log import JsonLines, Row
from swin_scale.report.palette import paint

logger = logging.getLogger(__name__)

STEP_KEYS = (
    "step", "epoch", "samples", "loss", "lr", "grad_norm", "loss_scale", "skipped", "images_per_s", "mfu",
    "data_wait_s", "step_s", "mem_gb", "batch_digest",
)  # fmt: skip
"""Keys that every step row has; models add their own, such as routing figures."""
HEAT_MAP_PIXELS = 128
"""At least so many along the longer side of a heat map."""
LOSSLESS_PIXELS = 300_000
"""Of a picture; larger ones are kept at a quality of 85."""
_SPEED_KEYS = ("images_per_s", "mfu", "data_wait_s", "step_s", "mem_gb")
_NOT_DRAWN = ("step", "samples", "batch_digest")


class MetricWriter:
    """Writes ``metrics.jsonl`` and ``tb/`` below a run directory; on ranks that are not `enabled` it does nothing."""

    def __init__(self, run_dir: Path, *, enabled: bool = True, tensorboard: bool = True) -> None:
        self._lines = JsonLines(run_dir / "metrics.jsonl") if enabled else None
        self._tensorboard = _TensorBoard(run_dir / "tb") if enabled and tensorboard else None
        self._pictures = run_dir / "pictures"
        self._pending: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep one step's row (`STEP_KEYS` and more) until `flush`. Values may be 0-d tensors on any device."""
        missing = [key for key in STEP_KEYS if key not in row]
        assert not missing, f"step row without {missing}"
        if self._lines is not None:
            self._pending.append(row)

    def flush(self) -> list[Row]:
        """Write the pending rows and return them as plain numbers (nothing on ranks that are not enabled)."""
        rows = to_numbers(self._pending)
        self._pending = []
        if self._lines is not None and rows:
            self._lines.write(rows)
        if self._tensorboard is not None:
            for row in rows:
                self._tensorboard.scalars(row["step"], step_tags(row))
        return rows

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Write an event row (an evaluation, a checkpoint, something that happened) after the pending step rows."""
        self.flush()
        if self._lines is not None:
            self._lines.write([{"event": name, "step": step, "time": time.time(), **fields}])
        if self._tensorboard is not None:
            numbers = {key: value for key, value in fields.items() if _is_number(value)}
            prefix = "_".join([name, *(value for value in (fields.get("weights"),) if value not in (None, "master"))])
            self._tensorboard.scalars(step, {f"{prefix}/{key}": value for key, value in numbers.items()})

    def figure(self, tag: str, value: float, step: int) -> None:
        """Draw one number in TensorBoard only."""
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, {tag: value})

    def images(self, tag: str, images: torch.Tensor, step: int = 0) -> None:
        """Draw a batch (B, 3, H, W) uint8 as one picture in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.image(tag, image_grid(images), step)

    def picture(self, picture: torch.Tensor, step: int) -> str | None:
        """Keep a picture (3, H, W) uint8 as a file below ``pictures/`` and in TensorBoard; returns its name.

        None on ranks that are not enabled, and where the file cannot be written, which ends no run.
        """
        if self._tensorboard is not None:
            self._tensorboard.image("pictures", picture, step)
        if self._lines is None:
            return None
        path = self._pictures / f"step_{step:08d}.webp"
        try:
            self._pictures.mkdir(exist_ok=True)
            write_atomic(path, encoded(picture))
        except OSError as error:
            logger.error("%s cannot be written (%s)", path, error.strerror or error)
            return None
        return f"{self._pictures.name}/{path.name}"

    def heat_map(self, tag: str, values: np.ndarray, step: int) -> None:
        """Draw a map (H, W) of numbers from 0 up as a picture in TensorBoard: from 0, pale, to its maximum, dark."""
        if self._tensorboard is not None:
            size = -(-HEAT_MAP_PIXELS // max(values.shape))
            picture = paint(values, values.max()).repeat(size, axis=0).repeat(size, axis=1)
            self._tensorboard.image(tag, torch.tensor(picture).permute(2, 0, 1), step)

    def go_back(self, step: int) -> None:
        """Rows from `step` on come again: ``metrics.jsonl`` keeps both, TensorBoard the new ones."""
        if self._tensorboard is not None:
            self._tensorboard.go_back(step)

    def close(self) -> None:
        self.flush()
        if self._lines is not None:
            self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _TensorBoard:
    """TensorBoard's writer, opened at the first value, so that a resumed run hides the steps it repeats.

    When its files cannot be written it stops for the rest of the run: ``metrics.jsonl`` has everything it draws.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None
        self._off = False

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with self._stopping_when_full():
            writer = self._open(step)
            if writer is not None:
                for tag, value in values.items():
                    writer.add_scalar(tag, value, step)

    def image(self, tag: str, image: torch.Tensor, step: int) -> None:
        with self._stopping_when_full():
            writer = self._open(step)
            if writer is not None:
                writer.add_image(tag, image, step)

    def go_back(self, step: int) -> None:
        """What was written for the steps from `step` on is hidden, by a new writer."""
        self.close()
        with self._stopping_when_full():
            self._open(step)

    def close(self) -> None:
        with self._stopping_when_full():
            if self._writer is not None:
                writer, self._writer = self._writer, None
                writer.close()

    @contextlib.contextmanager
    def _stopping_when_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            logger.error("%s cannot be written (%s); TensorBoard stops, metrics.jsonl goes on", self._directory, reason)
            writer, self._writer, self._off = self._writer, None, True
            if writer is not None:
                with contextlib.suppress(OSError):
                    writer.close()

    def _open(self, step: int) -> Any:
        if self._writer is None and not self._off:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                self._off = True
                logger.warning("no TensorBoard (%s): metrics go to metrics.jsonl only; pip install tensorboard", error)
                return None
            self._writer = SummaryWriter(str(self._directory), purge_step=step, flush_secs=10)
        return self._writer


def step_tags(row: Mapping[str, Any]) -> dict[str, float]:
    """TensorBoard tag of every number in a step row: train/loss, speed/images_per_s; keys with a slash stay."""
    tags = {}
    for key, value in row.items():
        if key not in _NOT_DRAWN and _is_number(value):
            group = "speed/" if key in _SPEED_KEYS else "" if "/" in key else "train/"
            tags[group + key] = float(value)
    return tags


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def to_numbers(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """`rows` with every 0-d tensor as a Python number, in one device-to-host transfer per device."""
    places = [(i, key) for i, row in enumerate(rows) for key, value in row.items() if isinstance(value, torch.Tensor)]
    numbers: dict[tuple[int, str], float] = {}
    for device in {rows[i][key].device for i, key in places}:
        here = [(i, key) for i, key in places if rows[i][key].device == device]
        values = torch.stack([rows[i][key].detach().reshape(()).double() for i, key in here]).tolist()
        numbers.update(zip(here, values))
    return [
        {key: _as_dtype(numbers[i, key], value) if (i, key) in numbers else value for key, value in row.items()}
        for i, row in enumerate(rows)
    ]


def _as_dtype(number: float, tensor: torch.Tensor) -> float | int | bool:
    if tensor.dtype == torch.bool:
        return bool(number)
    return number if tensor.is_floating_point() else int(number)


def image_grid(images: torch.Tensor, *, columns: int | None = None, limit: int = 64, gap: int = 2) -> torch.Tensor:
    """The first `limit` of a batch (B, 3, H, W) uint8 as one picture (3, H', W'), row by row, framed in white.

    `columns`: images of a row; default: as many as there are rows.
    """
    images = images[:limit].cpu()
    count, channels, height, width = images.shape
    columns = columns or math.isqrt(max(count - 1, 0)) + 1
    rows = -(-count // columns)
    grid = torch.full((rows * columns, channels, height + gap, width + gap), 255, dtype=torch.uint8)
    grid[:count, :, gap:, gap:] = images
    grid = grid.view(rows, columns, channels, height + gap, width + gap).permute(2, 0, 3, 1, 4)
    picture = grid.reshape(channels, rows * (height + gap), columns * (width + gap))
    return torch.nn.functional.pad(picture, (0, gap, 0, gap), value=255)


def encoded(picture: torch.Tensor) -> bytes:
    """A picture (3, H, W) uint8 as WebP: without loss where it is small, else at a tenth of a PNG's size."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture.cpu().permute(1, 2, 0).contiguous().numpy())
    image.save(buffer, "WEBP", lossless=image.width * image.height <= LOSSLESS_PIXELS, quality=85)
    return buffer.getvalue()


# -- speed and memory --------------------------------------------------------------------------------------------------

# Dense bf16 and fp16 matmul peaks of the vendors' data sheets, in FLOP/s; the first part of a device's name counts.
_PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("GH200", 989e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("A10G", 70e12),
    ("V100", 125e12),
)


def peak_flops(device: torch.device) -> float | None:
    """Dense half-precision peak of a CUDA device in FLOP/s; None on the CPU and for devices not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS if part in name), None)


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process on a CUDA device since its start, or its resident memory on the CPU, in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except FileNotFoundError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


class StepClock:
    """Times the loop on the host: how long a step took in all, and how much of it was spent waiting for data.

    On a GPU the host runs ahead of the device until the queue is full, so single values wander but their mean is right,
    and nothing is synchronised.
    """

    def __init__(self, *, device: torch.device, ranks: int = 1, flops_per_image: float | None = None) -> None:
        """`flops_per_image`: of forward and backward, 6 x the multiply-adds of a forward; None gives no mfu."""
        self._device = device
        peak = peak_flops(device)
        self._mfu_per_image_rate = flops_per_image / (peak * ranks) if flops_per_image and peak else None
        self._waited = 0.0
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def restart(self) -> None:
        """Leave out what happened since the last step, such as an evaluation."""
        self._waited, self._last = 0.0, time.perf_counter()

    def step(self, images: int) -> dict[str, float | None]:
        """Figures of the step that ends now, in which all ranks together consumed `images`."""
        now = time.perf_counter()
        seconds, waited = now - self._last, self._waited
        self._waited, self._last = 0.0, now
        rate = images / seconds
        return {
            "images_per_s": rate,
            "mfu": None if self._mfu_per_image_rate is None else rate * self._mfu_per_image_rate,
            "data_wait_s": waited,
            "step_s": seconds,
            "mem_gb": memory_gb(self._device),
        }


class Progress:
    """A bar on a terminal; elsewhere one log line at each `update`."""

    def __init__(self, total: int, *, initial: int = 0, terminal: bool | None = None) -> None:
        """`total` and `initial` are steps; `terminal` says whether stderr is one, None finds out."""
        self._total = total
        self._start, self._start_time = initial, time.monotonic()
        self._bar: Any = None
        self._stack = contextlib.ExitStack()
        if sys.stderr.isatty() if terminal is None else terminal:
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True)
            self._stack.callback(self._bar.close)
            # Log lines are printed above the bar rather than through it.
            self._stack.enter_context(logging_redirect_tqdm())

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Show that `step` steps are done; `row` is the last step row, as numbers."""
        figures = (
            f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}  {row['images_per_s']:.0f} img/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        done = step - self._start
        left = (time.monotonic() - self._start_time) / done * (self._total - step) if done else 0.0
        logger.info("step %d/%d  epoch %d  %s  %s left", step, self._total, row["epoch"], figures, _duration(left))

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
