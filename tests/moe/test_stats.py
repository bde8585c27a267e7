"""Sums of routing statistics, and the time spent waiting for other ranks."""

import contextlib
import time

import pytest
import torch

from swin_scale.moe.comm import Waits
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.stats import RoutingTally, collect, largest_variation
from tests.moe.cases import DIM, inputs, layer
from tests.spawn import spawn_dist

CONFIG = MoEConfig(num_experts=4, top_k=2, eval_capacity_factor=0.5, drop=0)


def image_stats(batch: int, seed: int = 7):
    x = inputs(batch * 6, seed=seed)[0].view(batch, 2, 3, DIM)
    return layer(CONFIG)(x)[2]


def test_places_of_an_image_are_where_tokens_were_dropped():
    stats = image_stats(4)
    assert stats.shape == (4, 2, 3) and stats.tokens == 24
    dropped = stats.dropped_by_position()
    by_hand = torch.zeros(2, 3, dtype=torch.int64)
    for token, kept in enumerate(stats.kept_TK.tolist()):
        by_hand[token % 6 // 3, token % 3] += kept.count(False)
    assert torch.equal(dropped, by_hand) and int(dropped.sum()) == int(stats.dropped) > 0


def test_sums_over_micro_batches_are_those_of_all_tokens_and_nothing_per_token_is_kept():
    began = time.perf_counter()
    parts = [image_stats(2, seed) for seed in (1, 2, 3)]
    tally = RoutingTally()
    for stats in parts:
        tally.add({"block": stats})
    took = time.perf_counter() - began
    ((name, made),) = tally.layers.items()
    assert (name, made.num_experts, made.top_k, made.ep_size, made.grid) == ("block", 4, 2, 1, (2, 3))
    assert made.top_k == 2 and all(
        t.numel() <= 6 for t in (*made.scalars, *made.loads, *made.importance, *made.dropped)
    )
    (sums,), maps = collect([made])
    tokens, confidence, entropy, z, balance, *loads = sums.tolist()
    assert tokens == 36 and sums.dtype == torch.float64
    for got, name in ((confidence, "confidence"), (entropy, "entropy"), (z, "z")):
        assert got == pytest.approx(sum(float(getattr(stats, name)) for stats in parts))
    assert balance == pytest.approx(sum(12 * float(stats.balance_loss) for stats in parts))
    assert loads == sum(torch.cat([s.routed_E, s.kept_E]) for s in parts).tolist() and sum(loads[:4]) == 72
    torch.testing.assert_close(maps[:4], sum(stats.importance_E for stats in parts))
    assert maps[4:].tolist() == sum(s.dropped_by_position() for s in parts).flatten().tolist()
    assert 0 < tally.seconds < took


def test_tokens_without_an_image_have_no_map():
    tally = RoutingTally()
    tally.add({"block": layer(CONFIG)(inputs(24)[0])[2]})
    assert tally.layers["block"].grid == () and len(collect([*tally.layers.values()])[1]) == 4


def test_dropless_layers_have_a_map_of_zeros():
    x = inputs(24)[0].view(4, 2, 3, DIM)
    tally = RoutingTally()
    tally.add({"block": layer(MoEConfig(num_experts=4, drop=0))(x)[2]})
    assert collect([*tally.layers.values()])[1][4:].tolist() == [0] * 6


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (128, 1), (8, 2), (4, 4)])
def test_the_largest_variation_is_that_of_k_experts_sharing_everything(experts, top_k):
    load = torch.zeros(experts, dtype=torch.float64)
    load[:top_k] = 10
    assert largest_variation(experts, top_k) == pytest.approx(float(load.std(correction=0) / load.mean()))


def test_waits_add_up():
    waits, began = Waits(), time.perf_counter()
    for _ in range(2):
        with waits.timed(torch.device("cpu")):
            time.sleep(0.01)
    assert 0.02 <= waits.seconds() == waits.seconds() < time.perf_counter() - began


def test_waits_are_told():
    told = []

    @contextlib.contextmanager
    def waiting():
        told.append("begins")
        yield
        told.append("ends")

    with Waits(waiting).timed(torch.device("cpu")):
        told.append("waits")
    assert told == ["begins", "waits", "ends"]


def late_rank(dist):
    """Rank 1 begins forward, and later backward, when rank 0 has waited for it for 0.4 s; each took it how long."""
    direction = "forward"

    @contextlib.contextmanager
    def waiting():
        if dist.is_main:
            dist.store.set(f"waits in {direction}", "")
        yield

    def begin():
        if not dist.is_main:
            dist.store.wait([f"waits in {direction}"])
            time.sleep(0.4)
        return time.perf_counter()

    module = layer(MoEConfig(num_experts=4, drop=0), ep_group=torch.distributed.group.WORLD, waiting=waiting)
    x = inputs(40)[0].requires_grad_()
    began = begin()
    y, _, stats = module(x)
    forward, forward_took = stats.waits.seconds(), time.perf_counter() - began
    torch.distributed.barrier(group=dist.cpu_group)
    direction = "backward"
    began = begin()
    y.sum().backward()
    return stats.ep_size, forward, stats.waits.seconds() - forward, forward_took, time.perf_counter() - began


def test_waiting_for_a_late_rank_is_measured_in_forward_and_backward():
    for rank, (size, *waited, forward_took, backward_took) in enumerate(spawn_dist(2, late_rank)):
        assert size == 2
        for seconds, took in zip(waited, (forward_took, backward_took), strict=True):
            assert (0 if rank else 0.4) < seconds < took
