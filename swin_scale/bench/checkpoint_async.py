"""What a save in the background costs the step that waits for it, and how fast it is written.

- stall: all that a run of one rank does before it goes on (directory, layout, copy, order to the writer), beside
  `torch.save` of the same tensors to the same disk, which ends in the page cache, or on the disk.
- write: from that order until the file is on the disk, hashed, while nothing else runs, beside a loop that writes the
  same bytes from ordinary memory and syncs, as ``dd bs=1M conv=fsync`` does.

Between any two measurements the disk is given time to finish what the last one left.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swin_scale.bench import zero_jobs
from swin_scale.bench.timing import Comparison, compare
from swin_scale.checkpoint import Fragment, RankLayout, rank_layout
from swin_scale.checkpoint.tensorfile import bytes_of
from swin_scale.engine.background import BackgroundSaves
from swin_scale.engine.dist import Layout, init
from swin_scale.engine.saving import Contents, Retention
from swin_scale.engine.staging import Staging
from swin_scale.errors import SwinScaleError
from swin_scale.hashed_file import CHUNK_BYTES

STALL_BAR = 0.1
"""The stall is to be at most this part of `torch.save`."""
WRITE_BAR = 0.9
"""The background is to reach at least this part of raw speed."""
CONTROL = "ours again"
TIMEOUT_S = 600.0
_PAUSE_S = 0.001


@dataclass(frozen=True)
class _State:
    """Stands in for an engine: what one rank saves."""

    tensors: Mapping[str, Tensor]

    def local_fragments(self) -> Iterator[Fragment]:
        for name, tensor in self.tensors.items():
            yield Fragment(name=name, kind="master", shape=tuple(tensor.shape), start=0, data=tensor.view(-1))


def measure(tensors: Mapping[str, Tensor], work: Path, rounds: int) -> dict[str, Any]:
    """``stall`` and ``write``, each as `Comparison.as_dict` with ``bytes`` and ``bars``; all files are below `work`.

    Raises SwinScaleError when a save fails.
    """
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    stall = _stalls(tensors, work, rounds)
    write = _writes(tensors, work, rounds)
    peers = [name for name in stall.pairs if name != CONTROL]
    return {
        "stall": {
            "bytes": total,
            **stall.as_dict(),
            "bars": {
                f"stall beside {name}": {
                    "at_most": STALL_BAR,
                    "share": 1 / stall.ratio(name).lower,
                    "reached": 1 / stall.ratio(name).lower <= STALL_BAR,
                }
                for name in peers
            },
        },
        "write": {
            "bytes": total,
            **write.as_dict(),
            "bars": {
                "write": {
                    "at_least": WRITE_BAR,
                    "share": write.ratio("raw").lower,
                    "reached": write.ratio("raw").lower >= WRITE_BAR,
                }
            },
        },
    }


def _stalls(tensors: Mapping[str, Tensor], work: Path, rounds: int) -> Comparison:
    contents = Contents(
        step=1,
        state={"step": 1},
        config_text="",
        parameters={n: {"shape": list(t.shape), "dtype": "float32", "trained": True} for n, t in tensors.items()},
        model={},
    )
    root, path = work / "ours", work / "torch.pth"
    root.mkdir()
    layout = Layout(rank=0, world=1, local_rank=0, local_world=1)
    with init(layout, timeout_s=TIMEOUT_S, device="cpu") as dist:
        saves = BackgroundSaves(root, _State(tensors), dist, timeout_s=TIMEOUT_S)

        def ours() -> float:
            os.sync()
            began = time.perf_counter()
            saves.begin(contents, Retention(keep=1))
            seconds = time.perf_counter() - began
            outcome = saves.settle()
            if outcome is None or outcome.problem is not None:
                raise SwinScaleError(f"a save failed: {outcome and outcome.problem}")
            return seconds

        def stock(*, to_the_disk: bool) -> float:
            path.unlink(missing_ok=True)
            os.sync()
            began = time.perf_counter()
            torch.save(dict(tensors), path)
            if to_the_disk:
                zero_jobs.fsync(path)
            return time.perf_counter() - began

        candidates: dict[str, Callable[[], float]] = {
            "ours": ours,
            "torch.save": lambda: stock(to_the_disk=False),
            "torch.save, fsync": lambda: stock(to_the_disk=True),
            CONTROL: ours,
        }
        try:
            return compare(candidates, rounds=rounds, control=CONTROL, timed=True)
        finally:
            saves.close()
            path.unlink(missing_ok=True)
            shutil.rmtree(root)


def _writes(tensors: Mapping[str, Tensor], work: Path, rounds: int) -> Comparison:
    layout = rank_layout(0, list(_State(tensors).local_fragments()))
    staging = Staging(layout.bytes, torch.device("cpu"))
    staging.prepare()
    staging.copy(layout)
    plain = bytes_of(torch.cat([tensor.view(-1) for _, tensor in layout.tensors]))
    candidates: dict[str, Callable[[], float]] = {
        "ours": lambda: _written(staging, layout, work),
        "raw": lambda: _raw(plain, work / "raw"),
        CONTROL: lambda: _written(staging, layout, work),
    }
    try:
        return compare(candidates, rounds=rounds, control=CONTROL, timed=True)
    finally:
        staging.close()
        (work / "raw").unlink(missing_ok=True)
        (work / layout.name).unlink(missing_ok=True)


def _written(staging: Staging, layout: RankLayout, work: Path) -> float:
    (work / layout.name).unlink(missing_ok=True)
    os.sync()
    began = time.perf_counter()
    staging.write(work, layout)
    while (answer := staging.poll()) is None:
        time.sleep(_PAUSE_S)
    seconds = time.perf_counter() - began
    if answer.problem is not None:
        raise SwinScaleError(answer.problem)
    return seconds


def _raw(data: memoryview, path: Path) -> float:
    path.unlink(missing_ok=True)
    os.sync()
    began = time.perf_counter()
    with open(path, "xb", buffering=0) as file:
        for start in range(0, len(data), CHUNK_BYTES):
            view = data[start : start + CHUNK_BYTES]
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return time.perf_counter() - began
