"""Figures of routing by hand, over ranks as on one process, maps, and when the alarm goes."""

import math

import numpy as np
import pytest
import torch

from swin_scale.engine.routing import (
    FIGURES,
    MAP_SIDE,
    MAPS,
    PATIENCE,
    CollapseWatch,
    LayerSums,
    RoutingLog,
    figures,
    pool,
)
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.stats import LayerTally, RoutingTally, largest_variation
from tests.moe.cases import DIM, inputs, layer
from tests.spawn import spawn_dist

CONFIG = MoEConfig(num_experts=4, top_k=2, eval_capacity_factor=1.0, drop=0)


def sums(routed, kept=None, *, ep_size=1, grid=(), maps=None, tokens=None, scalars=(0, 0, 0, 0), waited_s=0.0):
    """One step per row of `routed`, one choice per token."""
    routed = np.array(routed, dtype=np.float64)
    kept = routed if kept is None else np.array(kept, dtype=np.float64)
    rows = np.concatenate([routed.sum(1, keepdims=True), np.tile(scalars, (len(routed), 1)), routed, kept], axis=1)
    tally = LayerTally(num_experts=routed.shape[1], top_k=1, ep_size=ep_size, grid=grid)
    maps = np.zeros(routed.shape[1] + math.prod(grid) * bool(grid)) if maps is None else np.array(maps, dtype=float)
    return LayerSums(tally=tally, steps=rows, maps=maps, waited_s=waited_s)


def test_figures_by_hand():
    """8 tokens on 4 experts in each of two steps, the second step even; experts 0 and 1 are on the first EP rank."""
    made = figures(
        sums(
            [[5, 3, 0, 0], [2, 2, 2, 2]],
            [[4, 3, 0, 0], [2, 2, 2, 2]],
            ep_size=2,
            grid=(1, 2),
            maps=[1, 1, 1, 1, 1, 0],
            scalars=(6, 4, 16, 8),
            waited_s=0.5,
        ),
        seconds=2.0,
    )
    assert tuple(made) == FIGURES
    assert made["load_cv"] == pytest.approx(np.std([5, 3, 0, 0]) / 2 / 2)
    assert made["load_max"] == pytest.approx((5 / 2 + 1) / 2)
    assert made["rank_load_max"] == pytest.approx((7 / 3.5 + 1) / 2)
    assert made["dropped"] == pytest.approx(1 / 8 / 2) and made["dropped_worst"] == pytest.approx(1 / 8)
    assert (made["confidence"], made["entropy"], made["z"], made["balance_loss"]) == (6 / 8, 4 / 8, 16 / 8, 8 / 8)
    assert made["dead"] == 0 and made["a2a_share"] == 0.25


def test_limits():
    """All tokens on one expert is the largest variation; an even load has none; 1 % of an even share is death."""
    worst = figures(sums([[0, 64, 0, 0, 0, 0, 0, 0]]), 1.0)
    assert worst["load_cv"] == pytest.approx(largest_variation(8, 1)) and (worst["load_max"], worst["dead"]) == (8, 7)
    even = figures(sums([[8] * 8]), 1.0)
    assert (even["load_cv"], even["load_max"], even["dead"], even["rank_load_max"]) == (0, 1, 0, 1)
    assert figures(sums([[1000] * 7 + [8]]), 1.0)["dead"] == 1 and figures(sums([[1000] * 7 + [9]]), 1.0)["dead"] == 0
    nothing = figures(sums([[0, 0]]), 0.0)
    assert nothing["dropped"] == 0 and nothing["a2a_share"] == 0


@pytest.mark.parametrize(
    ("load", "top_k", "bad"),
    [
        ([1, 0, 0, 0, 0, 0, 0, 0], 1, True),
        ([0.6, 0.4, 0, 0, 0, 0, 0, 0], 1, True),  # CV 1.8 is within bounds, 6 of 8 dead are not
        ([0.9, *[0.1 / 7] * 7], 1, True),  # nobody dead
        ([0.5, *[0.5 / 7] * 7], 1, False),
        ([0.25] * 4 + [0] * 4, 1, False),
        ([0.5, 0.5, 0, 0], 2, True),  # the worst that two distinct choices can be
        ([1, 1], 2, False),
        ([1], 1, False),
    ],
)
def test_what_counts_as_collapsed(load, top_k, bad):
    row = figures(sums([np.array(load) * 1e6]), 1.0)
    watch = CollapseWatch()
    said = [watch.judge("block", row, len(load), top_k) for _ in range(PATIENCE)]
    assert said[:-1] == [None] * (PATIENCE - 1) and (said[-1] is not None) == bad


def test_the_alarm_goes_once_and_recovery_is_told_once():
    bad, good = figures(sums([[8, 0, 0, 0]]), 1.0), figures(sums([[2, 2, 2, 2]]), 1.0)
    watch = CollapseWatch()

    words = []

    def names(*rows):
        alarms = [alarm for row in rows if (alarm := watch.judge("block", row, 4, 1))]
        words.extend(alarm.problem for alarm in alarms)
        return [alarm.name for alarm in alarms]

    assert names(*[bad] * (PATIENCE - 1), good, *[bad] * (PATIENCE - 1)) == []
    assert names(bad, *[bad] * 9) == ["router_collapse"]
    again = CollapseWatch()
    again.restore(watch.state())
    watch = again  # a resumed run does not repeat it
    assert names(bad, bad, bad, bad) == [] and names(*[good] * (PATIENCE - 1), bad) == []
    assert names(*[good] * 9) == ["router_recovered"] and names(*[bad] * 9) == ["router_collapse"]
    assert "router of block has collapsed: load CV 1.73 of at most 1.73, 3 of 4 experts" in words[0]


def part_of_batch(dist, steps, ep):
    """Each rank's part of the same 8 images of 2 x 3 tokens, routed in two micro-batches."""
    group = torch.distributed.group.WORLD if ep else None
    module = layer(CONFIG, ep_group=group)
    log = RoutingLog(torch.distributed.group.WORLD, total_steps=100)
    for step in range(steps):
        images = inputs(48, seed=step)[0].view(4, 2, 2, 3, DIM)[dist.rank :: dist.world]
        tally = RoutingTally()
        for micro in images:
            tally.add({"block": module(micro)[2]})
        log.add(tally)
    record = log.flush(steps, 1.0)
    return record and (record.row, record.maps)


def on_one_process(dist):
    return part_of_batch(dist, 3, False), flushed(dist, 4 * MAPS, 2)


class Waited:
    """Waiting that took as long as it is told."""

    def __init__(self, seconds):
        self.seconds = lambda: seconds


def waited(dist):
    """Rank 0 waited for 1 s, rank 1 for 3, of 4 that the step took."""
    log, tally = RoutingLog(torch.distributed.group.WORLD, total_steps=1), RoutingTally()
    tally.add({"block": layer(CONFIG)(inputs(12)[0])[2]})
    tally.layers["block"].waits.append(Waited(1.0 + 2 * dist.rank))
    log.add(tally)
    record = log.flush(1, 4.0)
    return record and record.row["moe/block/a2a_share"]


def on_two(dist):
    return part_of_batch(dist, 3, False), part_of_batch(dist, 3, True), waited(dist)


@pytest.fixture(scope="module")
def one_process():
    return spawn_dist(1, on_one_process)[0]


def test_ranks_add_up_to_one_process(one_process):
    """Capacity is each pass's own, so the same passes on 1 rank and on 2 drop the same."""
    alone, _ = one_process
    (two, share, waiting), other = spawn_dist(2, on_two)
    assert other == (None, None, None) and two[1] == alone[1] and waiting == 0.5
    row, twice = alone[0], two[0]
    assert {key for key in row if key.startswith("moe/block/")} == {f"moe/block/{name}" for name in FIGURES}
    assert row["moe/block/dropped"] > 0.05
    for key in row:
        if key != "moe/telemetry_s":
            assert twice[key] == pytest.approx(row[key], rel=1e-5), key
    share = share[0]
    assert share["moe/block/rank_load_max"] > 1 == row["moe/block/rank_load_max"]
    assert share["moe/block/load_cv"] == row["moe/block/load_cv"]
    assert share["moe/a2a_share"] == share["moe/block/a2a_share"] > 0 == row["moe/a2a_share"]


def flushed(dist, total, every):
    module = layer(CONFIG)
    log = RoutingLog(torch.distributed.group.WORLD, total_steps=total)
    made = []
    for step in range(1, total + 1):
        tally = RoutingTally()
        tally.add({"block": module(inputs(12, seed=step)[0].view(2, 2, 3, DIM))[2]})
        log.add(tally)
        if step % every == 0 and (record := log.flush(step, 1.0)).maps:
            made.append(record.maps)
    dense = RoutingLog(torch.distributed.group.WORLD, total_steps=total)
    dense.add(RoutingTally())
    assert dense.flush(1, 1.0) is None and log.flush(total, 1.0) is None
    return made


def test_maps_come_every_so_often_and_cover_every_step(one_process):
    _, made = one_process
    assert len(made) == MAPS + 1
    first, last = zip(*[maps["steps"] for maps in made])
    assert first == (1, *(step + 1 for step in last[:-1])) and last[0] == 2 and last[-1] == 4 * MAPS
    block = made[1]["layers"]["block"]
    assert (block["experts"], block["top_k"], block["ep_size"], block["grid"]) == (4, 2, 1, [2, 3])
    assert sum(block["load"]) == pytest.approx(1, abs=1e-3) == sum(block["importance"])
    assert np.shape(block["dropped"]) == (2, 3) and 0 < np.mean(block["dropped"]) < 1


def test_pooled_maps_keep_their_mean():
    values = np.random.default_rng(0).random((40, 64))
    pooled = pool(values, MAP_SIDE)
    assert pooled.shape == (20, 32) and pooled.mean() == pytest.approx(values.mean())
    assert pooled[0, 0] == pytest.approx(values[:2, :2].mean())
    odd = pool(np.ones((33, 5)), MAP_SIDE)
    assert odd.shape == (17, 3) and (odd == 1).all()
    assert pool(values[:3, :3], MAP_SIDE) is not None and (pool(values[:3, :3], MAP_SIDE) == values[:3, :3]).all()
    assert pool(np.zeros((0, 0)), MAP_SIDE).size == 0
