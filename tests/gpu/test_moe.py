"""The MoE layer on a GPU against itself in fp64 on the CPU, its ways to run experts, and NCCL with one rank."""

import pytest
import torch
import torch.distributed as dist

from swin_scale.engine.dist import init
from swin_scale.engine.layout import Layout
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.dispatch import forward_experts
from swin_scale.moe.experts import grouped_mlp
from swin_scale.moe.layer import MoEMlp
from tests.moe.cases import fill
from tests.moe.precision import HALVES, dense_errors, layer_errors
from tests.moe.test_experts import COUNTS, given, plain
from tests.spawn import spawn

pytestmark = pytest.mark.gpu

CONFIGS = {
    "published": MoEConfig(num_experts=8),
    "capacity": MoEConfig(num_experts=8, eval_capacity_factor=1.25),
    "dropping": MoEConfig(num_experts=8, eval_capacity_factor=0.5, top_k=2),
    "cosine": MoEConfig(num_experts=16, router="cosine", top_k=2, normalize_gate=True),
}
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
METHODS = [
    ("padded", torch.float32),
    ("padded", torch.float16),
    ("padded", torch.bfloat16),
    ("grouped", torch.bfloat16),
    ("loop", torch.float32),
]


@pytest.fixture
def device():
    return "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_gradients_agree_with_fp64(name, dtype, device):
    errors = layer_errors(CONFIGS[name], dtype, device)
    assert max(errors.values()) <= LIMITS[dtype], errors


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_a_dense_mlp(dtype, device):
    ours, dense = layer_errors(CONFIGS["published"], dtype, device), dense_errors(dtype, device)
    assert all(ours[key] <= 2 * dense[key] for key in dense), (ours, dense)


@pytest.mark.parametrize("counts", [*COUNTS, [300, 1, 0, 211, 64, 0, 8, 128]], ids=str)
@pytest.mark.parametrize(("method", "dtype"), METHODS, ids=str)
def test_every_method_is_an_mlp_per_expert_with_its_gradients(method, dtype, counts, device):
    leaves, upstream = given(dtype, counts, dim=64, hidden=128)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = plain(exact[0], counts, *exact[1:])
    wanted = torch.autograd.grad((want * upstream.double()).sum(), exact)
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
    got = grouped_mlp(leaves[0], torch.tensor(counts, device=device), *leaves[1:], method=method)
    grads = torch.autograd.grad(got, leaves, upstream.to(device))
    for ours, theirs in zip([got, *grads], [want, *wanted]):
        assert (ours.double().cpu() - theirs).norm() <= LIMITS[dtype] * theirs.norm()


def test_training_is_bitwise_repeatable(device):
    module = MoEMlp(MoEConfig(num_experts=8, top_k=2, drop=0.1), 64, 256).to(device, torch.bfloat16)
    fill(module)
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        module.zero_grad()
        y, aux, _ = module(x)
        (y.float().square().mean() + aux).backward()
        results.append([y.detach(), *(parameter.grad.clone() for parameter in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def through_the_group(device, dtype):
    """Outputs and gradients of tokens, straight to the experts and by way of all-to-alls with oneself."""
    with init(Layout(), timeout_s=120, device=device):
        module = MoEMlp(MoEConfig(num_experts=8, top_k=2, drop=0.0), 64, 256).to(device, dtype).eval()
        fill(module)
        generator = torch.Generator().manual_seed(1)
        x, upstream = torch.randn(2, 512, 64, generator=generator).to(device, dtype)
        results = []
        for group in (None, dist.group.WORLD):
            leaf = x.clone().requires_grad_()
            routing = module._moe_layer.gates[0](leaf)[0]
            y = forward_experts(leaf, routing, module.experts, group, chunks=3)
            y.backward(upstream)
            results.append([t.detach().float().cpu().numpy() for t in (y, leaf.grad)])
        return results


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_rows_come_back_from_all_to_alls_as_they_were(dtype, device):
    [(straight, there_and_back)] = spawn(1, through_the_group, device, dtype, timeout=120)
    for a, b in zip(straight, there_and_back):
        # Chunks change the sizes of products, and so their rounding.
        assert abs(a - b).max() <= 4 * LIMITS[dtype] * abs(a).max()
