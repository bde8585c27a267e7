"""The same layer on 1, 2 and 4 gloo processes: outputs, gradients and losses do not depend on where experts live."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist

from swin_scale.moe.comm import Flight, all_reduce_sum
from swin_scale.moe.config import MoEConfig
from tests.moe.cases import DIM, inputs, layer, run
from tests.spawn import spawn_dist

CONFIGS = {
    "linear": MoEConfig(num_experts=4, capacity_factor=0, gate_noise=1.0, drop=0, aux_weight=1.0, z_weight=0.1),
    "cosine k2": MoEConfig(
        num_experts=8, top_k=2, router="cosine", cosine_dim=6, drop=0, aux_weight=1.0, normalize_gate=True, a2a_chunks=3
    ),
    "gshard": MoEConfig(num_experts=4, top_k=2, balance="gshard", drop=0, aux_weight=1.0, a2a_chunks=1),
}
TOKENS = 24


def ep_group(world, ep_size):
    """This rank's group among runs of `ep_size` consecutive ranks."""
    groups = [dist.new_group(list(range(first, first + ep_size))) for first in range(0, world, ep_size)]
    return groups[dist.get_rank() // ep_size]


def share(world, rank, uneven):
    """This rank's tokens of the global batch: equal parts, or 1 token for rank 0 and the rest for the others."""
    bounds = np.linspace(0, TOKENS, world + 1).astype(int)
    if uneven:
        bounds[1:-1] = np.linspace(1, TOKENS, world).astype(int)[:-1]
    return slice(int(bounds[rank]), int(bounds[rank + 1]))


def on_ranks(d, name, ep_size, uneven):
    x, upstream = inputs(TOKENS)
    mine = share(d.world, d.rank, uneven)
    module = layer(CONFIGS[name], ep_group=ep_group(d.world, ep_size), aux_group=dist.group.WORLD)
    one = run(module, x[mine], upstream[mine])
    return module.experts.first, one.arrays()


def gathered(results, ep_size):
    """One process's arrays from those of all ranks, gradients summed as data parallelism does."""
    world = len(results)
    whole = {}
    for key in results[0][1]:
        parts = [arrays[key] for _, arrays in results]
        if key in ("y", "grad x"):
            whole[key] = np.concatenate(parts)
        elif key == "aux":
            assert np.ptp(parts) == 0, "all ranks see the same global loss"
            whole[key] = parts[0]
        elif ".experts." in key:
            sums = [sum(parts[rank] for rank in range(p, world, ep_size)) for p in range(ep_size)]
            whole[key] = np.concatenate(sums)
        else:
            whole[key] = sum(parts)
    return whole


def expected(name, world, x=None, upstream=None):
    """One process over the whole batch; each of `world` ranks' losses carries the global loss once."""
    if x is None:
        x, upstream = inputs(TOKENS)
    module = layer(CONFIGS[name])
    x = x.requires_grad_()
    y, aux, stats = module(x)
    ((y * upstream).sum() + world * aux).backward()
    grads = {f"grad {k}": p.grad.numpy() for k, p in module.named_parameters()}
    return (
        {"y": y.detach().numpy(), "aux": aux.detach().numpy(), "kept_E": stats.kept_E.numpy()}
        | grads
        | {"grad x": x.grad.numpy()}
    )


@pytest.mark.parametrize(
    ("name", "world", "ep_size", "uneven"),
    [
        ("linear", 2, 2, False),
        ("linear", 4, 2, True),
        ("cosine k2", 2, 1, False),
        ("cosine k2", 4, 4, True),
        ("gshard", 4, 4, False),
    ],
)
def test_outputs_gradients_and_losses_do_not_depend_on_the_layout(name, world, ep_size, uneven):
    results = spawn_dist(world, on_ranks, name, ep_size, uneven)
    got, want = gathered(results, ep_size), expected(name, world)
    assert got.keys() == want.keys()
    for key in want:
        np.testing.assert_allclose(got[key], want[key], rtol=1e-9, atol=1e-10, err_msg=key)


def in_half_precision(d):
    config = MoEConfig(num_experts=4, top_k=2, drop=0, aux_weight=1.0)
    x, upstream = inputs(TOKENS)
    mine = share(d.world, d.rank, True)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        module = layer(config, ep_group=dist.group.WORLD, aux_group=dist.group.WORLD).bfloat16().to(dtype)
        results.append(run(module, x[mine].bfloat16().to(dtype), upstream[mine].to(dtype)).y.float().numpy())
    return results


def test_rows_travel_in_half_precision():
    for half, full in spawn_dist(2, in_half_precision):
        np.testing.assert_allclose(half, full, atol=0.02 * np.abs(full).max())


def one_flight(d):
    send = [[1, 3], [0, 2]][d.rank]
    receive = [[1, 0], [3, 2]][d.rank]
    x = (torch.arange(sum(send) * 2.0).view(2, sum(send)).t() + 100 * d.rank).requires_grad_()  # not contiguous
    flight = Flight(send, receive, dist.group.WORLD)
    y = flight.finish(flight.start(x))
    weight = torch.arange(len(y), dtype=torch.float32)[:, None].expand(-1, 2) + 10 * d.rank
    (y * weight).sum().backward()
    return x.detach().numpy(), y.detach().numpy(), x.grad.numpy()


def test_a_flight_takes_rows_to_their_ranks_and_gradients_back():
    (x0, y0, g0), (x1, y1, g1) = spawn_dist(2, one_flight)
    np.testing.assert_array_equal(y0, x0[:1])
    np.testing.assert_array_equal(y1, np.concatenate([x0[1:], x1]))
    np.testing.assert_array_equal(g0[:, 0], [0, 10, 11, 12])
    np.testing.assert_array_equal(g1[:, 0], [13, 14])


EIGHT = {
    "even": [3] * 8,
    "uneven": [1, 9, 2, 0, 5, 0, 0, 7],
    "all on one rank": [0, 0, 0, 24, 0, 0, 0, 0],
}
"""Tokens of each of 8 ranks, of the same TOKENS."""


def alike(x):
    """Tokens that all choose the same experts: most experts, and the ranks that hold them, get no row from anyone."""
    return x[:1] + 1e-3 * x


def on_eight(d):
    """Every split of the batch at EP 2, 4 and 8, spread over experts and not: arrays, all-to-alls, the formula's."""
    groups = {ep_size: ep_group(d.world, ep_size) for ep_size in (2, 4, 8)}
    found = {}
    for ep_size, group in groups.items():
        module = layer(CONFIGS["cosine k2"], ep_group=group, aux_group=dist.group.WORLD)
        for split, counts in EIGHT.items():
            mine = slice(sum(counts[: d.rank]), sum(counts[: d.rank + 1]))
            for kind in ("spread", "alike"):
                x, upstream = inputs(TOKENS)
                x = alike(x) if kind == "alike" else x
                with counted_all_to_alls() as sent:
                    one = run(module, x[mine], upstream[mine])
                found[ep_size, split, kind] = one.arrays(), sent, formula(module, one.stats, group)
    return found


@contextmanager
def counted_all_to_alls():
    """What this rank hands to all_to_all_single: the bytes of each message."""
    sent = []
    real = dist.all_to_all_single

    def spy(output, source, *args, **kwargs):
        sent.append(source.numel() * source.element_size())
        return real(output, source, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", spy)
        yield sent


def formula(module, stats, group):
    """(messages, bytes) of `dispatch.exchange`'s docstring: 1 + 4 C, and 8 C E + 2 (R + S) D itemsize."""
    C, E = module.config.a2a_chunks, module.config.num_experts
    total_E = stats.kept_E.clone()
    dist.all_reduce(total_E, group=group)
    mine = slice(module.experts.first, module.experts.first + module.num_local_experts)
    R, S = int(stats.kept_E.sum()), int(total_E[mine].sum())
    return 1 + 4 * C, 8 * C * E + 2 * (R + S) * DIM * 8


def test_eight_ranks_with_few_or_no_tokens_for_each_other_are_one_process_and_send_what_the_formula_says():
    results = spawn_dist(8, on_eight, timeout=120)
    wanted = {}
    for kind in ("spread", "alike"):
        x, upstream = inputs(TOKENS)
        wanted[kind] = expected("cosine k2", 8, alike(x) if kind == "alike" else x, upstream)
    assert sum(wanted["alike"]["kept_E"] > 0) == 2, "six experts of eight get nothing"
    for key in results[0]:
        ep_size, _, kind = key
        got = gathered([(0, found[key][0]) for found in results], ep_size)
        for name, want in wanted[kind].items():
            np.testing.assert_allclose(got[name], want, rtol=1e-9, atol=1e-10, err_msg=f"{key} {name}")
        for rank, found in enumerate(results):
            _, sent, formulated = found[key]
            assert (len(sent), sum(sent)) == formulated, (key, rank)


def checkpointed(d):
    module = layer(CONFIGS["cosine k2"], ep_group=dist.group.WORLD, aux_group=dist.group.WORLD).train()
    x, upstream = inputs(TOKENS)
    mine = share(2, d.rank, True)
    results = []
    for recompute in (False, True):
        torch.manual_seed(d.rank)
        module.zero_grad()
        leaf = x[mine].clone().requires_grad_()
        y, aux, _ = torch.utils.checkpoint.checkpoint(module, leaf, use_reentrant=False) if recompute else module(leaf)
        ((y * upstream[mine]).sum() + aux).backward()
        results.append([leaf.grad.numpy(), *[p.grad.clone().numpy() for p in module.parameters()]])
    return results


def test_activation_checkpointing_routes_the_same_noise_included():
    for plain, recomputed in spawn_dist(2, checkpointed):
        for a, b in zip(plain, recomputed):
            np.testing.assert_array_equal(a, b)


def summed(d):
    x = torch.tensor([1.0 + d.rank, 2.0]).requires_grad_()
    total = all_reduce_sum(x, dist.group.WORLD)
    (total.square().sum() * (d.rank + 1)).backward()
    return total.detach().numpy(), x.grad.numpy()


def test_the_gradient_of_a_sum_over_ranks_is_that_of_all_their_losses():
    for total, grad in spawn_dist(2, summed):
        np.testing.assert_array_equal(total, [3, 4])
        np.testing.assert_array_equal(grad, [3 * 2 * 3, 3 * 2 * 4])
