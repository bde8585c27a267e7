"""Rows go to their experts and back by index: against a one-hot form written down as the papers have it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swin_scale.moe.dispatch import combine, forward_experts, gather, in_chunks
from swin_scale.moe.router import choose, plan
from tests.moe.cases import inputs


def routed(top_k, limit, tokens=23, experts=5):
    score = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)
    expert, gate = choose(score, top_k, normalize=False)
    return expert, gate, plan(expert, gate, experts, limit, score.amax(1))


def scale_by_expert(x_RD, count_E):
    """An expert multiplies its rows by its number plus one."""
    return x_RD * torch.arange(1, len(count_E) + 1).repeat_interleave(count_E)[:, None]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("limit", [None, 4, 0])
def test_equals_the_one_hot_form_with_its_gradients(top_k, limit):
    expert, gate, _ = routed(top_k, limit)
    x, upstream = inputs(23)
    results = []
    for one_hot in (False, True):
        leaf, gates = x.clone().requires_grad_(), gate.clone().requires_grad_()
        mine = plan(expert, gates, 5, limit, None if limit is None else gate[:, 0])
        if one_hot:
            weight = torch.nn.functional.one_hot(expert, 5) * (mine.slot_TK >= 0)[..., None]  # (T, K, E)
            by_expert = leaf[None] * torch.arange(1.0, 6)[:, None, None]
            y = torch.einsum("tke,tk,etd->td", weight.double(), gates, by_expert)
        else:
            y = forward_experts(leaf, mine, scale_by_expert, None, 1)
        (y * upstream).sum().backward()
        results.append([y.detach(), leaf.grad, gates.grad])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("top_k", "limit"), [(1, None), (2, 4), (3, None)])
def test_gradients_are_exact(top_k, limit):
    expert, gate, _ = routed(top_k, limit)
    x, _ = inputs(23, dim=2)

    def through(x, gate):
        routing = plan(expert, gate, 5, limit, None)
        return combine(gather(x, routing).sin(), routing)

    assert torch.autograd.gradcheck(through, (x.requires_grad_(), gate.requires_grad_()))


def test_what_is_not_finite_reaches_no_dropped_choice():
    _, _, routing = routed(2, 4)
    y = torch.ones(len(routing.choice_R), 3)
    y[0] = torch.inf
    assert (routing.slot_TK < 0).any()
    finite = combine(y, routing).isfinite().all(1)
    assert torch.equal(finite, (routing.slot_TK != 0).all(1))


def test_an_expanded_upstream_gradient_is_taken():
    _, _, routing = routed(2, None)
    x = inputs(23)[0].requires_grad_()
    combine(gather(x, routing), routing).sum().backward()
    torch.testing.assert_close(x.grad, routing.gate_TK.sum(1, keepdim=True).expand_as(x))


@pytest.mark.parametrize("chunks", [1, 2, 3, 50])
def test_chunks_hold_the_same_rows_in_nearly_equal_parts_of_every_expert(chunks):
    expert, _, routing = routed(2, 6)
    cut, count_CE = in_chunks(routing, chunks)
    assert torch.equal(count_CE.sum(0), routing.count_E)
    assert int((count_CE.amax(0) - count_CE.amin(0)).max()) <= 1
    assert sorted(cut.choice_R.tolist()) == sorted(routing.choice_R.tolist())
    wanted = torch.arange(5).repeat(chunks).repeat_interleave(count_CE.flatten())
    assert torch.equal(expert.flatten()[cut.choice_R], wanted)
    kept = routing.slot_TK >= 0
    assert torch.equal(cut.slot_TK >= 0, kept)
    assert torch.equal(cut.slot_TK.flatten()[cut.choice_R], torch.arange(len(cut.choice_R)))


def test_no_tokens_at_all():
    x = torch.zeros(0, 3, requires_grad=True)
    empty = torch.zeros(0, 2)
    routing = plan(empty.long(), empty, 5, None, None)
    y = forward_experts(x, routing, scale_by_expert, None, 1)
    y.sum().backward()
    assert y.shape == (0, 3) and x.grad is not None


@st.composite
def routings(draw):
    """(expert choices, gates, priority or None, limit or None, routing) of up to 30 tokens, several without any."""
    experts = draw(st.integers(1, 6))
    tokens, top_k = draw(st.integers(0, 30)), draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    # Few distinct scores: ties among tokens are common. A factor leaves some experts without any token.
    score = torch.randint(1, 4, (tokens, experts), generator=generator).double()
    score = (score * draw(st.sampled_from([0.0, 2.0])) * torch.arange(experts)).add(score).softmax(1)
    expert, gate = choose(score, top_k, normalize=draw(st.booleans()))
    limit = draw(st.none() | st.integers(0, 8))
    priority = draw(st.sampled_from([None, score.amax(1)]))
    return expert, gate, priority, limit, plan(expert, gate, experts, limit, priority)


def places_by_hand(expert, priority, limit):
    """Rows of each expert as a queue: first choices of all tokens, then second ones, each by priority."""
    tokens = range(len(expert)) if priority is None else sorted(range(len(expert)), key=lambda t: -priority[t])
    queues = {}
    for k in range(expert.shape[1]):
        for t in tokens:
            queue = queues.setdefault(int(expert[t, k]), [])
            if limit is None or len(queue) < limit:
                queue.append(t * expert.shape[1] + k)
    return [choice for e in sorted(queues) for choice in queues[e]]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(routings(), st.integers(1, 4))
def test_dispatch_identities(drawn, chunks):
    expert, gate, priority, limit, routing = drawn
    tokens, top_k = expert.shape
    assert routing.choice_R.tolist() == places_by_hand(expert, priority, limit), "who goes where, in which order"
    kept = routing.slot_TK >= 0
    assert int(kept.sum()) == int(routing.count_E.sum()) and (limit is None or int(routing.count_E.max()) <= limit)
    x = torch.randn(tokens, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = gather(x, routing)
    assert torch.equal(rows, x[routing.choice_R // top_k])
    y = combine(rows, routing)
    torch.testing.assert_close(y, x * (gate * kept).sum(1, keepdim=True), msg="there and back is the gates' sum")
    # Backward is the transpose: <A x, r> = <x, A' r>, of gathering and of combining.
    for forward, start in ((gather, x), (combine, rows)):
        leaf = start.clone().requires_grad_()
        out = forward(leaf, routing)
        other = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        out.backward(other)
        torch.testing.assert_close((out.detach() * other).sum(), (start * leaf.grad).sum())
    cut, count_CE = in_chunks(routing, chunks)
    assert torch.equal(count_CE.sum(0), routing.count_E)
    torch.testing.assert_close(combine(gather(x, cut), cut), y, msg="chunks are a reordering of rows")
