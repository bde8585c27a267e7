"""Choices, capacity, order and losses: worked by hand, by conservation and by symmetry."""

import math

import pytest
import torch

from swin_scale.errors import UserError
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.router import Router, capacity, choose, gshard, load, plan, variation
from tests.moe.cases import DIM, fill, inputs


def router(**options):
    module = Router(MoEConfig(num_experts=4, **options), DIM).double()
    fill(module)
    return module


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.25, 2 * 18), (0.5, 2 * 7), (1.0, 2 * 15), (-1.25, 2 * 18), (0, None), (0.01, 0)]
)
def test_capacity_is_tutels_formula(factor, expected):
    assert capacity(58, 4, 2, factor) == expected  # ceil(58 / 4) = 15


def rows(routing, num_choices=1):
    """The (token, choice) pairs each expert took, in order."""
    pairs = [divmod(int(c), num_choices) for c in routing.choice_R]
    return list(_split(pairs, routing.count_E.tolist()))


def _split(items, counts):
    start = 0
    for count in counts:
        yield items[start : start + count]
        start += count


def test_overflow_by_hand_in_token_order_and_by_priority():
    expert = torch.tensor([[0], [0], [1], [0], [0]])
    gate = torch.tensor([[0.4], [0.9], [0.5], [0.7], [0.6]])
    early = plan(expert, gate, 3, 2, None)
    assert rows(early) == [[(0, 0), (1, 0)], [(2, 0)], []]
    assert early.slot_TK.flatten().tolist() == [0, 1, 2, -1, -1]
    assert early.gate_TK.flatten().tolist() == pytest.approx([0.4, 0.9, 0.5, 0, 0])
    best = plan(expert, gate, 3, 2, gate.squeeze(1))
    assert rows(best) == [[(1, 0), (3, 0)], [(2, 0)], []]
    assert best.slot_TK.flatten().tolist() == [-1, 0, 2, 1, -1]


def test_first_choices_come_before_second_choices_even_of_better_tokens():
    expert = torch.tensor([[1, 0], [0, 1], [0, 1]])
    gate = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    taken = plan(expert, gate, 2, 2, gate[:, 0])
    assert rows(taken, 2) == [[(1, 0), (2, 0)], [(0, 0), (1, 1)]]
    assert taken.slot_TK.tolist() == [[2, -1], [0, 3], [1, -1]]


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 0, 3, 1000])
@pytest.mark.parametrize("prioritized", [False, True])
def test_routed_and_dropped_make_all_and_capacity_holds_exactly(top_k, limit, prioritized):
    score = torch.randn(37, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    expert, gate = choose(score, top_k, normalize=False)
    routing = plan(expert, gate, 5, limit, score.amax(1) if prioritized else None)
    wanted = torch.bincount(expert.flatten(), minlength=5)
    assert torch.equal(routing.count_E, wanted if limit is None else wanted.clamp_max(limit))
    kept = routing.slot_TK >= 0
    assert int(kept.sum()) == len(routing.choice_R) == int(routing.count_E.sum())
    assert torch.equal(routing.slot_TK.flatten()[routing.choice_R], torch.arange(len(routing.choice_R)))
    assert torch.equal(routing.gate_TK, gate * kept)
    in_rows = expert.flatten()[routing.choice_R]
    assert torch.equal(in_rows, torch.arange(5).repeat_interleave(routing.count_E))


def test_counts_are_int64_for_no_tokens_and_one_expert_too():
    for tokens, experts in ((0, 3), (5, 1)):
        expert = torch.zeros(tokens, 1, dtype=torch.int64)
        routing = plan(expert, expert.float(), experts, None, None)
        assert routing.count_E.dtype is torch.int64 and routing.count_E.tolist() == [tokens] + [0] * (experts - 1)


def test_gate_values_are_raw_or_sum_to_one():
    score = torch.tensor([[0.5, 0.3, 0.2]])
    assert choose(score, 2, normalize=False)[1].tolist() == [pytest.approx([0.5, 0.3])]
    assert choose(score, 2, normalize=True)[1].tolist() == [pytest.approx([0.625, 0.375])]
    assert choose(score, 1, normalize=True)[1].tolist() == [[0.5]], "one choice is never divided by itself"


def test_losses_by_hand():
    assert float(variation(torch.tensor([1.0, 3.0]))) == pytest.approx(2 / 4)
    assert float(variation(torch.tensor([5.0]))) == 0, "one expert is always balanced"
    even = gshard(torch.full((4,), 5.0), torch.full((4,), 5.0), torch.tensor(20.0))
    assert float(even) == pytest.approx(1.0)
    all_in_one = gshard(torch.tensor([20.0, 0, 0, 0]), torch.tensor([20.0, 0, 0, 0]), torch.tensor(20.0))
    assert float(all_in_one) == pytest.approx(4.0)
    chance = load(torch.tensor([[0.5, 0.2]]), torch.tensor([0.3]), 0.1)
    assert chance.tolist() == pytest.approx([0.5 * (1 + math.erf(s / math.sqrt(2))) for s in (2, -1)])


def test_z_loss_is_the_mean_squared_log_partition():
    x, _ = inputs()
    plain, with_z = (router(aux_weight=1.0, z_weight=z).eval() for z in (0.0, 0.5))
    logits = plain.logits(x)
    difference = with_z(x)[1] - plain(x)[1]
    torch.testing.assert_close(difference, 0.5 * logits.exp().sum(1).log().square().mean())


def test_without_noise_importance_stands_alone():
    x, _ = inputs()
    module = router(gate_noise=0.0, aux_weight=1.0)
    torch.testing.assert_close(module(x)[1], variation(module.logits(x).softmax(1).sum(0)))


def test_noise_is_drawn_in_training_only_and_from_the_generator_given():
    x, _ = inputs()
    module = router(gate_noise=8.0)

    def gates(seed):
        return module(x, generator=torch.Generator().manual_seed(seed))[0].gate_TK

    assert torch.equal(gates(1), gates(1)) and not torch.equal(gates(1), gates(2))
    torch.manual_seed(5)
    assert torch.equal(module(x)[0].gate_TK, gates(5)), "the default generator draws the same numbers"
    module.eval()
    assert torch.equal(gates(1), gates(2))


def test_evaluation_has_its_own_capacity():
    x = inputs(64)[0]
    module = router(capacity_factor=0.5, eval_capacity_factor=0.25)
    for training, limit in ((True, 8), (False, 4)):
        stats = module.train(training)(x)[2]
        assert int(stats.kept_E.max()) == limit and int(stats.dropped) == 64 - int(stats.kept_E.sum())
    assert int(router(capacity_factor=0.5).eval()(x)[2].dropped) == 0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_gate_computes_in_fp32_from_half_precision_weights_even_under_autocast(kind):
    x = inputs()[0].bfloat16()
    module = router(router=kind, cosine_dim=6).bfloat16().eval()
    with torch.autocast("cpu", torch.bfloat16):
        routing, aux, _ = module(x)
    assert routing.gate_TK.dtype == aux.dtype == torch.float32
    exact, want, _ = module.float()(x.float())
    torch.testing.assert_close(routing.gate_TK, exact.gate_TK)
    torch.testing.assert_close(aux, want)


def test_the_cosine_gate_is_scaled_cosine_similarity():
    module = router(router="cosine", cosine_dim=6)
    x, _ = inputs()
    point = x @ module.cosine_projector.weight.t() + module.cosine_projector.bias
    cosine = torch.cosine_similarity(point[:, :, None], module.sim_matrix[None], dim=1)
    torch.testing.assert_close(module.logits(x), cosine * module.temperature.exp())
    with torch.no_grad():
        module.temperature.fill_(9.0)
    torch.testing.assert_close(module.logits(x), cosine * 100)


def test_statistics_tell_what_happened():
    x, _ = inputs(50)
    module = router(top_k=2, eval_capacity_factor=0.5).eval()
    _, aux, stats = module(x)
    prob = module.logits(x).softmax(1)
    assert int(stats.routed_E.sum()) == 100 and int(stats.tokens) == 50
    assert int(stats.dropped) == int((~stats.kept_TK).sum()) > 0
    torch.testing.assert_close(stats.importance_E, prob.sum(0))
    torch.testing.assert_close(stats.entropy, -(prob * prob.log()).sum())
    torch.testing.assert_close(stats.confidence, prob.amax(1).sum())
    torch.testing.assert_close(aux, 0.01 * stats.balance_loss)
    assert torch.equal(stats.expert_TK, prob.topk(2, 1).indices)
    tensors = [value for value in vars(stats).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 9 and not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "moe.top_k: 5 is not possible; choose 1 to 4"),
        ({"router": "hash"}, "moe.router: 'hash' is not possible; choose one of linear, cosine"),
        ({"balance": "none"}, "moe.balance"),
        ({"gate_noise": -1.0}, "moe.gate_noise"),
        ({"drop": 1.0}, "moe.drop"),
        ({"a2a_chunks": 0}, "moe.a2a_chunks"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        MoEConfig(num_experts=4, **options)
