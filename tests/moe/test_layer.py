"""The layer as a whole: names, limits and symmetries."""

import pytest
import torch
import torch.nn.functional as F

from swin_scale.errors import UserError
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.layer import MoEMlp, local_experts
from tests.moe.cases import DIM, HIDDEN, fill, inputs, layer, run

EXPERT_SHAPES = {
    "_moe_layer.experts.batched_fc1_w": (4, HIDDEN, DIM),
    "_moe_layer.experts.batched_fc2_w": (4, HIDDEN, DIM),
    "_moe_layer.experts.batched_fc1_bias": (4, HIDDEN),
    "_moe_layer.experts.batched_fc2_bias": (4, DIM),
}


@pytest.mark.parametrize(
    ("router", "gate"),
    [
        ("linear", {"wg.weight": (4, DIM)}),
        (
            "cosine",
            {
                "temperature": (1,),
                "sim_matrix": (256, 4),
                "cosine_projector.weight": (256, DIM),
                "cosine_projector.bias": (256,),
            },
        ),
    ],
)
def test_names_and_shapes_are_tutels(router, gate):
    state = MoEMlp(MoEConfig(num_experts=4, router=router), DIM, HIDDEN).state_dict()
    wanted = EXPERT_SHAPES | {f"_moe_layer.gates.0.{name}": shape for name, shape in gate.items()}
    assert {name: tuple(value.shape) for name, value in state.items()} == wanted


def test_one_expert_is_the_dense_mlp():
    module = layer(MoEConfig(num_experts=1, drop=0)).train()
    x, upstream = inputs()
    result = run(module, x, upstream)
    w1, w2, b1, b2 = (p.detach()[0].requires_grad_() for p in module.experts.parameters())
    leaf = x.clone().requires_grad_()
    want = F.linear(F.gelu(F.linear(leaf, w1, b1)), w2.t(), b2)
    (want * upstream).sum().backward()
    torch.testing.assert_close(result.y, want.detach())
    torch.testing.assert_close(result.grads["x"], leaf.grad)
    torch.testing.assert_close(result.grads["_moe_layer.experts.batched_fc2_w"][0], w2.grad)
    assert float(result.aux) == 0


@pytest.mark.parametrize("factor", [0, 0.5])
def test_permuting_tokens_permutes_outputs(factor):
    """Under prioritised routing with a capacity too: who is dropped depends on scores, not on places."""
    module = layer(MoEConfig(num_experts=4, top_k=2, eval_capacity_factor=factor, drop=0))
    x, upstream = inputs()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    straight, shuffled = run(module, x, upstream), run(module, x[order], upstream[order])
    torch.testing.assert_close(shuffled.y, straight.y[order])
    torch.testing.assert_close(shuffled.grads.pop("x"), straight.grads.pop("x")[order])
    torch.testing.assert_close(shuffled.grads, straight.grads)
    assert (int(straight.stats.dropped) > 0) == (factor > 0)


def test_a_dropped_token_gives_zero_and_an_image_map_keeps_its_shape():
    module = layer(MoEConfig(num_experts=4, eval_capacity_factor=0.5, drop=0))
    x = inputs(24)[0].view(2, 3, 4, DIM)
    y, _, stats = module(x)
    assert y.shape == x.shape
    kept = stats.kept_TK.view(2, 3, 4)
    assert torch.equal((y != 0).any(-1), kept) and not kept.all()


def test_evaluation_does_not_depend_on_the_rest_of_the_batch():
    module = layer(MoEConfig(num_experts=4))
    x, _ = inputs()
    torch.testing.assert_close(module(x)[0][:3], module(x[:3])[0])


def test_half_precision_in_half_precision_out_and_the_loss_in_fp32():
    module = layer(MoEConfig(num_experts=4)).bfloat16()
    y, aux, _ = module(inputs()[0].bfloat16())
    assert y.dtype == torch.bfloat16 and aux.dtype == torch.float32 and aux.shape == ()


def test_runs_are_bitwise_repeatable():
    module = layer(MoEConfig(num_experts=4, top_k=2, drop=0.5)).train()
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(run(module, *inputs()))
    assert torch.equal(results[0].y, results[1].y)
    assert all(torch.equal(results[0].grads[name], grad) for name, grad in results[1].grads.items())


def test_no_tensor_of_tokens_times_capacity_exists():
    """The largest tensor of a pass has as many values as the hidden rows, far fewer than the one-hot form's."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor):
                    self.size = max(self.size, value.numel())
            return out

    module = MoEMlp(MoEConfig(num_experts=16, capacity_factor=1.25), DIM, HIDDEN)
    fill(module)
    x = torch.randn(4096, DIM, requires_grad=True)
    with Largest() as largest:
        y, aux, _ = module(x)
        (y.sum() + aux).backward()
    assert largest.size <= 4096 * 16


def test_experts_must_divide_over_ranks():
    with pytest.raises(UserError, match=r"moe.ep_size 3 does not divide moe.experts 8; choose one of \[1, 2, 4, 8\]"):
        local_experts(8, 3)
