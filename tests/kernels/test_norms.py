"""Residual norms and patch merging under Triton's interpreter: outputs and every gradient against fp64."""

import inspect

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swin_scale.kernels import norms, reference
from tests.kernels.interpreter import interpreted  # noqa: F401
from tests.kernels.precision import assert_at_most_twice, exact, results

pytestmark = pytest.mark.usefixtures("interpreted")

OPS = {
    "post": (norms.fused_residual_norm, reference.residual_norm),
    "pre": (norms.fused_add_norm, reference.add_norm),
    "merge": (norms.fused_patch_merge, reference.patch_merge),
}
KEEP = torch.tensor([1.25, 0.0, 1.25])
DTYPES = [torch.float32, torch.float16]


def drawn(kind, C, hw=(4, 6), dtype=torch.float32, batch=3, seed=0):
    """Inputs of an op of C channels, for which a merged row of 4 C has a weight too."""
    generator = torch.Generator().manual_seed(seed)
    channels = 4 * C if kind == "merge" else C
    shapes = [(batch, *hw, C)] * (1 if kind == "merge" else 2) + [(channels,)] * 2
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def compare(kind, inputs, *rest, addends=0):
    """Raises unless the fused op is as exact as torch; returns its outputs and gradients."""
    fused, definition = OPS[kind]
    ours = results(fused, inputs, *rest)
    assert_at_most_twice(ours, results(definition, inputs, *rest), exact(definition, inputs, *rest), addends=addends)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C", "hw"), [(24, (12, 10)), (96, (4, 6)), (352, (2, 6)), (1000, (4, 2))])
@pytest.mark.parametrize(("kind", "keep"), [("post", None), ("post", KEEP), ("pre", None), ("pre", KEEP), ("merge", 0)])
def test_output_and_every_gradient(kind, keep, C, hw, dtype):
    inputs = drawn(kind, C, hw, dtype)
    compare(kind, inputs, *(() if kind == "merge" else (keep,)))


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_a_program_are_read_in_pieces(monkeypatch, kind, dtype):
    """In pieces of 64, the last of them half empty: 160 channels, or 4 x 40."""
    monkeypatch.setattr(norms, "MAX_BLOCK", 64)
    inputs = drawn(kind, 40 if kind == "merge" else 160, (6, 4), dtype)
    compare(kind, inputs, *(() if kind == "merge" else (KEEP,)))


@pytest.mark.parametrize(("warps", "programs"), [(4, 1), (1 << 10, 36)])
def test_however_many_programs_share_the_rows(monkeypatch, warps, programs):
    """36 rows, one a program: one program that loops over all, or more partial sums than are added at once."""
    monkeypatch.setattr(norms, "WARPS_PER_PROCESSOR", warps)
    x, *_ = inputs = drawn("post", 1000, (2, 6))
    block_r, _, each = norms.tile(1000, norms.BACKWARD_VALUES)
    assert min(x[..., 0].numel() // block_r, warps // each) == programs
    compare("post", inputs, KEEP)


def test_the_longest_row_of_the_models():
    compare("merge", drawn("merge", 2816, (2, 4), torch.float16, batch=1))


def test_pieces_agree_far_from_zero(monkeypatch):
    """Mean squares minus squared means would lose every digit here."""
    monkeypatch.setattr(norms, "MAX_BLOCK", 64)
    inputs = drawn("post", 160)
    inputs[1] += 100
    compare("post", inputs, None)


@st.composite
def calls(draw):
    kind = draw(st.sampled_from([*OPS]))
    hw = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    if kind == "merge":
        hw = (2 * hw[0], 2 * hw[1])
    inputs = drawn(
        kind,
        draw(st.integers(1, 70)),
        hw,
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 2**32)),
    )
    keep = draw(st.none() | st.just(KEEP[: len(inputs[0])]))
    return kind, inputs, (() if kind == "merge" else (keep,)), draw(st.sampled_from([16, 32, norms.MAX_BLOCK]))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls())
def test_any_shape(call):
    kind, inputs, rest, block = call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "MAX_BLOCK", block)
        compare(kind, inputs, *rest, addends=inputs[0][..., 0].numel())


def test_patches_are_merged_down_a_column_first_and_split_again():
    x = torch.arange(2 * 4 * 6 * 3.0).view(2, 4, 6, 3)
    merged = norms.fused_patch_merge(x)
    assert torch.equal(merged[1, 1, 2], torch.cat([x[1, 2, 4], x[1, 3, 4], x[1, 2, 5], x[1, 3, 5]]))
    assert torch.equal(merged, reference.patch_merge(x))
    # The gradient puts each value back where it came from: that of merging is splitting, and so the identity is whole.
    leaf = x.clone().requires_grad_()
    norms.fused_patch_merge(leaf).backward(merged)
    assert torch.equal(leaf.grad, x)


@pytest.mark.parametrize("kind", OPS)
def test_inputs_and_gradients_may_lie_anyhow(kind):
    """Channels first in memory, weights with gaps, an upstream gradient of one value: as the contiguous ones."""
    straight = drawn(kind, 24, dtype=torch.float16)
    bent = [x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if x.ndim == 4 else x for x in straight]
    bent[-2] = torch.stack([bent[-2], bent[-2]], 1)[:, 0]
    rest = () if kind == "merge" else (KEEP,)
    values = []
    for inputs in (straight, bent):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = OPS[kind][0](*leaves, *rest)
        outputs = out if isinstance(out, tuple) else (out,)
        values.append([*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), leaves)])
    assert not bent[0].is_contiguous() and not bent[-2].is_contiguous()
    assert all(map(torch.equal, *values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_row_has_the_gradient_of_its_mean_alone(dtype):
    """A row without variance norms to 0; eps bounds the slope by 1 / sqrt(eps)."""
    x, branch, weight, bias = drawn("post", 24, dtype=dtype)
    branch[1] = 0.75
    y, _, d_branch, d_weight, _ = compare("post", [x, branch, weight, bias], None)
    assert torch.equal(y[1], (x[1].float() + bias.float()).to(dtype))
    largest = d_branch[1].float().abs().max()
    assert largest > 50 * d_branch[0].float().abs().max() and torch.isfinite(d_branch).all()
    assert torch.isfinite(d_weight).all()


@pytest.mark.parametrize("kind", ["post", "pre"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_branch_changes_nothing_and_learns_nothing(kind, dtype):
    x, *_ = inputs = drawn(kind, 24, dtype=dtype)
    out, *others = results(OPS[kind][0], inputs, KEEP)
    d_branch = others[-3]
    assert torch.equal(out[1], x[1]) and not torch.equal(out[0], x[0])
    assert not d_branch[1].any() and d_branch[0].all()


@pytest.mark.parametrize("kind", ["post", "pre"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_shows_even_in_a_dropped_branch(kind, value):
    """keep multiplies, as in the definition: 0 times infinity is NaN, and a broken step is seen to be broken."""
    inputs = drawn(kind, 24)
    inputs[1][1, 2, 3, 4] = value
    fused, definition = OPS[kind]
    for a, b in zip(results(fused, inputs, KEEP), results(definition, inputs, KEEP), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
    assert not results(fused, inputs, KEEP)[0].isfinite().all()


@pytest.mark.parametrize("kind", OPS)
def test_weights_may_be_wider_than_activations(kind):
    inputs = drawn(kind, 24, dtype=torch.float16)
    inputs[-2:] = [w.float() for w in inputs[-2:]]
    ours = compare(kind, inputs, *(() if kind == "merge" else (KEEP,)))
    assert [g.dtype for g in ours[-2:]] == [torch.float32] * 2 and ours[0].dtype == torch.float16


def test_the_gradient_of_the_residual_is_handed_on_and_not_spoilt():
    """The same tensor goes to x and onwards: adding another gradient to x leaves it as it was."""
    x, branch, weight, bias = (t.requires_grad_() for t in drawn("post", 24))
    y = norms.fused_residual_norm(x, branch, weight, bias, KEEP)
    upstream = torch.ones_like(y)
    torch.autograd.backward([y, x], [upstream, torch.ones_like(x)])
    assert torch.equal(upstream, torch.ones_like(y)) and torch.equal(x.grad, torch.full_like(x, 2.0))
    both = drawn("post", 24)[0]
    a, b = (results(lambda z, op=op: op(z, z, weight.detach(), bias.detach()), [both]) for op in OPS["post"])
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_of_a_pre_norm_may_go_unused(used):
    x, branch, *affine = drawn("pre", 24)
    ours, torchs = (
        results(lambda x, branch, op=op: op(x, branch, *affine, KEEP)[used], [x, branch]) for op in OPS["pre"]
    )
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("kind", OPS)
def test_no_images_at_all(kind):
    rest = () if kind == "merge" else (KEEP[:0],)
    *_, d_weight, d_bias = results(OPS[kind][0], drawn(kind, 24, batch=0), *rest)
    assert not d_weight.any() and not d_bias.any()


@pytest.mark.parametrize("kind", OPS)
def test_runs_are_equal_in_every_bit(kind):
    inputs = drawn(kind, 96, (4, 6), torch.float16)
    rest = () if kind == "merge" else (KEEP,)
    assert all(map(torch.equal, *(results(OPS[kind][0], inputs, *rest) for _ in range(2))))


def operators(kind, C=24):
    """(operator, arguments) pairs of a kind, backward included."""
    inputs, ops = drawn(kind, C), torch.ops.swin_scale
    leaves = [t.requires_grad_() for t in inputs]
    stats = torch.rand(2, 72 if kind != "merge" else 18)
    if kind == "post":
        return [
            (ops.fused_residual_norm.default, (*leaves, KEEP, 1e-5)),
            (ops.fused_residual_norm_backward.default, (inputs[0].detach(), *_detached(inputs[1:3]), KEEP, stats)),
        ]
    if kind == "pre":
        x, branch, weight, _ = _detached(inputs)
        return [
            (ops.fused_add_norm.default, (*leaves, None, 1e-5)),
            (ops.fused_add_norm_backward.default, (x, branch, x, weight, KEEP, stats)),
            (ops.fused_add_norm_backward.default, (x, branch, x, weight, None, stats)),
        ]
    x, weight, _ = _detached(inputs)
    merged = reference.patch_merge(x)
    return [
        (ops.fused_patch_merge_norm.default, (*leaves, 1e-5)),
        (ops.fused_patch_merge_norm_backward.default, (merged, x, weight, stats)),
        (ops.fused_patch_merge.default, (leaves[0],)),
        (ops.fused_patch_split.default, (merged.requires_grad_(),)),
    ]


def _detached(tensors):
    return [t.detach() for t in tensors]


@pytest.mark.parametrize("kind", OPS)
def test_operators_are_well_formed(kind):
    for op, args in operators(kind):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("kind", OPS)
def test_compiles_without_graph_breaks(kind):
    inputs = drawn(kind, 24)
    rest = () if kind == "merge" else (KEEP,)
    compiled = torch.compile(OPS[kind][0], backend="aot_eager", fullgraph=True)
    for a, b in zip(results(compiled, inputs, *rest), results(OPS[kind][0], inputs, *rest), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", OPS)
def test_arguments_are_those_of_the_definition(kind):
    ours, definition = (inspect.signature(op) for op in OPS[kind])
    assert ours == definition


def test_shapes_that_do_not_fit_are_refused_and_not_read_beyond():
    x, branch, weight, bias = drawn("post", 24)
    with pytest.raises(AssertionError, match="one shape"):
        norms.fused_residual_norm(x, branch[:, :2], weight, bias)
    with pytest.raises(AssertionError, match="per sample"):
        norms.fused_residual_norm(x, branch, weight, bias, KEEP[:2])
    with pytest.raises(AssertionError, match="per channel"):
        norms.fused_add_norm(x, branch, weight[:12], bias[:12])
    with pytest.raises(AssertionError, match="two by two"):
        norms.fused_patch_merge(x[:, :3])
