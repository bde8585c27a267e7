"""MoE tokens to rows of experts and back under Triton's interpreter: outputs and every gradient against fp64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swin_scale.kernels import permutation, reference
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.layer import MoEMlp
from swin_scale.moe.router import choose, plan
from tests.kernels.interpreter import interpreted  # noqa: F401
from tests.kernels.precision import assert_at_most_twice, exact, results

pytestmark = pytest.mark.usefixtures("interpreted")

DTYPES = [torch.float32, torch.float16]


def routed(tokens, top_k, limit, experts=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    expert, gate = choose(torch.randn(tokens, experts, generator=generator).softmax(1), top_k, normalize=False)
    return plan(expert, gate, experts, limit, None)


def rows(count, D, dtype, seed=1):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(routing, D, dtype):
    """Raises unless both ops and their gradients are as exact as torch."""
    where = routing.choice_R, routing.slot_TK
    tokens = rows(len(routing.slot_TK), D, dtype)
    served = rows(len(routing.choice_R), D, dtype, seed=2)
    for name, inputs in (("permute", [tokens]), ("unpermute", [served, routing.gate_TK])):
        fused, definition = getattr(permutation, f"fused_{name}"), getattr(reference, name)
        values = results(fused, inputs, *where)
        assert_at_most_twice(values, results(definition, inputs, *where), exact(definition, inputs, *where))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [24, 96, 352])
@pytest.mark.parametrize(("top_k", "limit"), [(1, None), (2, 6), (3, None), (2, 0)])
def test_output_and_every_gradient(top_k, limit, D, dtype):
    """Dropless and with drops, tokens dropped everywhere among them, down to no rows at all."""
    routing = routed(40, top_k, limit)
    if limit is not None:
        assert (routing.slot_TK < 0).all(1).any()
    compare(routing, D, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_a_program_are_taken_in_pieces(dtype):
    compare(routed(7, 2, 2), permutation.TILE + 452, dtype)


def test_the_definition_is_the_sum_over_choices():
    """In plain autograd: x[token] for each row, and gates times rows scattered back."""
    routing = routed(23, 3, 9)
    x, gate = rows(23, 8, torch.float64).requires_grad_(), routing.gate_TK.double().requires_grad_()
    token_R = routing.choice_R // 3
    plain = torch.zeros_like(x).index_add(0, token_R, gate.flatten()[routing.choice_R][:, None] * x[token_R].sin())
    where = routing.choice_R, routing.slot_TK
    ours = reference.unpermute(reference.permute(x, *where).sin(), gate, *where)
    upstream = rows(23, 8, torch.float64, seed=5)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(*(torch.autograd.grad(y, (x, gate), upstream) for y in (ours, plain))):
        torch.testing.assert_close(a, b)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 40), st.integers(1, 4), st.none() | st.integers(0, 8), st.integers(1, 70), st.sampled_from(DTYPES)
)
def test_any_shape(tokens, top_k, limit, D, dtype):
    compare(routed(tokens, top_k, limit, seed=tokens), D, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_is_the_identity(dtype):
    routing = routed(40, 1, None)
    where = routing.choice_R, routing.slot_TK
    x = rows(40, 24, dtype)
    there = permutation.fused_permute(x, *where)
    assert not torch.equal(there, x)
    assert torch.equal(permutation.fused_unpermute(there, torch.ones(40, 1), *where), x)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_choices_that_were_dropped_add_nothing_whatever_their_gates():
    """Not even where another row holds what is not finite; the gates of the dropped have no gradient."""
    routing = routed(40, 2, 6)
    where = routing.choice_R, routing.slot_TK
    kept = routing.slot_TK >= 0
    y, gate = rows(len(routing.choice_R), 24, torch.float32), torch.ones(40, 2)
    y[0] = torch.inf
    out, d_y, d_gate = results(permutation.fused_unpermute, [y, gate], *where)
    assert not out[~kept.any(1)].any() and not d_gate[~kept].any()
    owner = int(routing.choice_R[0]) // 2
    assert torch.isfinite(out[torch.arange(40) != owner]).all() and torch.isfinite(d_y).all()


def test_rows_and_gradients_may_lie_anyhow():
    routing = routed(40, 2, 6)
    where = routing.choice_R, routing.slot_TK
    y, gate = rows(len(routing.choice_R), 24, torch.float32), routing.gate_TK
    bent = y.t().contiguous().t(), gate.t().contiguous().t()
    values = []
    for inputs in ((y, gate), bent):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = permutation.fused_unpermute(*leaves, *where)
        values.append([out, *torch.autograd.grad(out.sum(), leaves)])
    assert not bent[0].is_contiguous() and all(map(torch.equal, *values))


def test_operators_are_well_formed():
    routing, ops = routed(40, 2, 6), torch.ops.swin_scale
    x, gate = rows(40, 24, torch.float32), routing.gate_TK
    y = rows(len(routing.choice_R), 24, torch.float32)
    where = routing.choice_R, routing.slot_TK
    for op, args in (
        (ops.fused_permute.default, (x.clone().requires_grad_(), *where)),
        (ops.fused_permute_backward.default, (y, routing.slot_TK)),
        (ops.fused_unpermute.default, (y.clone().requires_grad_(), gate.clone().requires_grad_(), *where)),
        (ops.fused_unpermute_backward.default, (x, y, gate, routing.choice_R)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_compiles_without_graph_breaks():
    routing = routed(40, 2, 6)

    def there_and_back(x, gate, choice_R, slot_TK):
        rows = permutation.fused_permute(x, choice_R, slot_TK)
        return permutation.fused_unpermute(rows * 2, gate, choice_R, slot_TK)

    inputs = [rows(40, 24, torch.float32), routing.gate_TK]
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    where = routing.choice_R, routing.slot_TK
    for a, b in zip(results(compiled, inputs, *where), results(there_and_back, inputs, *where), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layer_built_for_triton_gives_the_results_of_one_built_for_torch(monkeypatch, top_k):
    """The mode reaches the kernels: one launch of each there, and one of each back."""
    launches = []
    for name in ("launch_spread", "launch_collect"):
        launch = getattr(permutation, name)
        monkeypatch.setattr(permutation, name, lambda *a, name=name, launch=launch: launches.append(name) or launch(*a))
    values = []
    for kernels in ("triton", "reference"):
        layer = MoEMlp(MoEConfig(num_experts=4, top_k=top_k, drop=0.0, gate_noise=0.0), 24, 48, kernels=kernels)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_(0, 0.1, generator=generator)
        x = rows(40, 24, torch.float32).view(2, 4, 5, 24).requires_grad_()
        y, aux, _ = layer(x)
        (y.square().sum() + aux).backward()
        values.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*values)
    assert sorted(launches) == ["launch_collect"] * 2 + ["launch_spread"] * 2
