"""The same layer on 1, 2 and 4 gloo processes: outputs, gradients and losses do not depend on where experts live."""

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


def expected(name, world):
    """One process over the whole batch; each of `world` ranks' losses carries the global loss once."""
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


def no_tokens(d):
    module = layer(CONFIGS["linear"], ep_group=dist.group.WORLD, aux_group=dist.group.WORLD)
    x, upstream = inputs(TOKENS)
    mine = slice(0, 0) if d.rank == 0 else slice(0, TOKENS)
    return run(module, x[mine], upstream[mine]).arrays()


def test_a_rank_without_tokens_does_not_hang_and_changes_nothing():
    empty, full = spawn_dist(2, no_tokens)
    want = expected("linear", 2)
    assert empty["y"].shape == (0, DIM)
    for key in ("y", "grad x", "aux"):
        np.testing.assert_allclose(full[key], want[key], atol=1e-10, err_msg=key)
    gate = "grad _moe_layer.gates.0.wg.weight"
    np.testing.assert_allclose(full[gate] + empty[gate], want[gate], atol=1e-10)


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


def counted(d, chunks):
    """What this rank hands to all_to_all_single in one pass, as (messages, bytes), and what the formula says."""
    sent = []
    real = dist.all_to_all_single

    def spy(output, source, *args, **kwargs):
        sent.append(source.numel() * source.element_size())
        return real(output, source, *args, **kwargs)

    config = MoEConfig(num_experts=16, top_k=2, drop=0, a2a_chunks=chunks)
    module = layer(config, ep_group=dist.group.WORLD)
    x, upstream = inputs(TOKENS + 8 * d.rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", spy)
        stats = run(module, x, upstream).stats
    mine = slice(module.experts.first, module.experts.first + module.num_local_experts)
    total_E = stats.kept_E.clone()
    dist.all_reduce(total_E, group=dist.group.WORLD)
    row = DIM * x.element_size()
    # Out and back, forward and backward: own rows leave twice, those of this rank's experts twice.
    rows = 2 * int(stats.kept_E.sum()) + 2 * int(total_E[mine].sum())
    return (len(sent), sum(sent)), (1 + 4 * chunks, rows * row + chunks * 16 * 8)


@pytest.mark.parametrize(("world", "chunks"), [(2, 3), pytest.param(8, 2, marks=pytest.mark.proof)])
def test_bytes_and_messages_equal_the_formula(world, chunks):
    for got, want in spawn_dist(world, counted, chunks):
        assert got == want


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
