"""A few random samples of data.train: there, as their digests say, and decodable."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from swin_scale.data import open_shard_sets
from swin_scale.data.decode import decode_rgb
from swin_scale.data.reader import BadSample, ImageReader, check_index
from swin_scale.doctor.finding import Finding, ok, refuse, warn
from swin_scale.errors import DataError, UserError

SAMPLES = 32
NO_CHANCE = 1e-4
"""What is less probable than this is no accident: a data set that is good enough must not be refused for bad luck,
since the same samples are looked at every time."""


def check_data(
    paths: Sequence[str],
    *,
    key: str = "data.train",
    labelled: bool = True,
    samples: int = SAMPLES,
    seed: int = 0,
    max_bad_rate: float = 0.01,
    retry_delays_s: Sequence[float] = (0.1,),
) -> list[Finding]:
    """Open the shard sets of `paths`, check their index, and read and decode random samples, the same for one seed.

    Bad samples are a warning, as they only leave their slots empty; a refusal where there are more of them than
    `max_bad_rate` of all could explain, as the run would stop itself. `labelled`: each sample needs a label.
    `retry_delays_s`: waits before what could not be read is read again.
    """
    try:
        sources = open_shard_sets(paths, key=key, labelled=labelled)
        for source in sources:
            check_index(source, labelled=labelled)
    except (DataError, UserError) as error:
        what, _, fix = str(error).rpartition("; ")
        return [refuse(key, what or str(error), fix or "see `swin-scale shards verify`", data=True)]
    total = sum(map(len, sources))
    reader = ImageReader(sources, retry_delays_s=retry_delays_s)
    bad = []
    chosen = random.Random(seed).sample(range(total), min(samples, total))
    try:
        for number in chosen:
            try:
                decode_rgb(reader.read(number).data)
            except BadSample as error:
                directory, shard, name = reader.describe(number)
                bad.append(f"{directory}/{shard} {name}: {error}")
    except DataError as error:
        return [refuse(key, str(error), "restore it, or leave the set out", data=True)]
    finally:
        reader.close()
    seen = f"{total} samples in {len(sources)} sets; {len(chosen)} read and decoded"
    if not bad:
        return [ok(key, seen)]
    text, fix = f"{seen}, {len(bad)} bad: {bad[0]}", f"find all with `swin-scale shards verify {paths[0]}`"
    if chance(len(bad), len(chosen), max_bad_rate) < NO_CHANCE:
        return [refuse(key, f"{text} (data.max_bad_rate {max_bad_rate:g})", fix, data=True)]
    return [warn(key, text, fix)]


def chance(bad: int, looked_at: int, rate: float) -> float:
    """Probability of so many bad samples, or more, among those looked at, where `rate` of all are bad."""
    return sum(math.comb(looked_at, k) * rate**k * (1 - rate) ** (looked_at - k) for k in range(bad, looked_at + 1))
