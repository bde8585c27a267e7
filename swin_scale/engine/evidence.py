"""The batch that tripped the loss guard, for people to look at: pictures, and all that is known of each sample.

Below the run directory: ``guard/step_00000042/batch.json`` (trouble, blame, and of every sample its slot, id, source,
shard, key, label and loss) and ``{slot}_{id}.png``, the pixels as the loader made them: at most `MAX_IMAGES`, those
blamed first, then those of the largest losses.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swin_scale.data import Batch
from swin_scale.data.reader import ImageReader
from swin_scale.engine.dist import Dist
from swin_scale.engine.guard import Blame, Trouble
from swin_scale.errors import DataError
from swin_scale.files import write_atomic
from swin_scale.log import finite
from swin_scale.shards import ShardSet

logger = logging.getLogger(__name__)

MAX_IMAGES = 64
DIRECTORY = "guard"


def save_batch(
    run_dir: Path, trouble: Trouble, blame: Blame, batch: Batch, sources: Sequence[ShardSet], dist: Dist
) -> tuple[str, list[dict[str, Any]]]:
    """Each rank writes the pictures of its own part; all ranks call this together.

    Returns the directory, relative to `run_dir`, and on rank 0 what is known of the blamed samples. What cannot be
    written is logged and ends nothing.
    """
    shown = _worth_seeing(blame)
    name = dist.broadcast_json("evidence", _new_directory(run_dir, trouble.step) if dist.is_main else None)
    directory = run_dir / name
    per_rank = len(batch.ids)
    names = {slot: f"{slot:05d}_{int(blame.ids[slot])}.png" for slot in shown}
    samples: list[dict[str, Any]] = []
    try:
        for slot, file in names.items():
            row = slot - dist.rank * per_rank
            if 0 <= row < per_rank:
                Image.fromarray(batch.images[row].permute(1, 2, 0).numpy()).save(directory / file)
        if dist.is_main:
            samples = _describe(blame, per_rank, names, sources)
            body = {
                "step": trouble.step, "epoch": batch.epoch, "trouble": str(trouble), "blamed": blame.who,
                "why": blame.why, "ranks": dict(blame.ranks), "samples": samples,
            }  # fmt: skip
            write_atomic(directory / "batch.json", json.dumps(finite(body), indent=1, ensure_ascii=False).encode())
    except (OSError, DataError) as error:
        logger.warning("the batch of step %d is not wholly in %s: %s", trouble.step, directory, error)
    return name, [sample for sample in samples if sample["blamed"]]


def _worth_seeing(blame: Blame) -> list[int]:
    slots = np.flatnonzero(blame.ids >= 0)
    losses = np.where(np.isfinite(blame.losses), blame.losses, np.inf)
    blamed = np.isin(slots, blame.slots)
    order = np.lexsort((slots, -losses[slots], ~blamed))
    return sorted(slots[order[:MAX_IMAGES]].tolist())


def _new_directory(run_dir: Path, step: int) -> str:
    """A directory for this step that no earlier trip has filled."""
    first = f"{DIRECTORY}/step_{step:08d}"
    name, again = first, 1
    while (run_dir / name).exists():
        again += 1
        name = f"{first}_{again}"
    try:
        (run_dir / name).mkdir(parents=True)
    except OSError as error:
        logger.warning("%s cannot be made: %s", run_dir / name, error.strerror)
    return name


def _describe(blame: Blame, per_rank: int, names: dict[int, str], sources: Sequence[ShardSet]) -> list[dict[str, Any]]:
    reader = ImageReader(sources)
    samples = []
    try:
        for slot in np.flatnonzero(blame.ids >= 0).tolist():
            sample = int(blame.ids[slot])
            source, shard, key = reader.describe(sample)
            number, row = reader.locate(sample)
            label = int(sources[number].index[row]["label"])
            known = {
                "slot": slot, "rank": slot // per_rank, "id": sample, "source": source, "shard": shard, "key": key,
                "label": label, "loss": float(blame.losses[slot]), "blamed": slot in blame.slots,
                "image": names.get(slot),
            }  # fmt: skip
            samples.append(known)
    finally:
        reader.close()
    return samples
