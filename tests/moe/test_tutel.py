"""The native layer against numbers from a real Tutel and, where it is installed, against Tutel itself."""

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch

from swin_scale.errors import UserError
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.layer import MoEMlp
from swin_scale.moe.tutel import TutelMoEMlp
from tests.models.golden import image, sequence
from tests.moe.cases import DIM, HIDDEN, TOKENS, fill, inputs, run
from tests.moe.make_golden import CASES, DROPPING, FILE, NOISE_SEED, flat
from tests.spawn import spawn_dist

has_tutel = importlib.util.find_spec("tutel") is not None
needs_tutel = pytest.mark.skipif(not has_tutel, reason="Tutel is not installed; golden numbers stand in for it")
PREFIX = "_moe_layer."


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as arrays:
        return dict(arrays)


def given(golden, case):
    """A native layer with the golden case's parameters, its inputs and its upstream gradient."""
    stored = {k.partition("/")[2]: torch.from_numpy(v) for k, v in golden.items() if k.startswith(f"{case.router}/")}
    x, upstream = stored.pop("x"), stored.pop("upstream")
    module = MoEMlp(case.config(), DIM, HIDDEN)
    module.load_state_dict({PREFIX + name: value for name, value in stored.items()})
    return module.train(case.training), x, upstream


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_losses_and_all_gradients_are_tutels(golden, case):
    module, x, upstream = given(golden, case)
    torch.manual_seed(NOISE_SEED)
    result = run(module, x, upstream)
    got = flat(result.y, result.aux, {name.removeprefix(PREFIX): grad for name, grad in result.grads.items()})
    want = golden[case.name]
    scale = max(1.0, np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("case", DROPPING, ids=lambda case: case.name)
def test_where_tutel_drops_though_told_not_to_ours_does_not(golden, case):
    module, x, upstream = given(golden, case)
    result = run(module, x, upstream)
    theirs = torch.from_numpy(golden[case.name][: TOKENS * DIM]).view(TOKENS, DIM)
    lost = ((theirs - result.y).abs() > 1e-6).any(1)
    assert int(result.stats.dropped) == 0 and 0 < int(lost.sum()) < TOKENS
    if case.top_k == 1:
        assert not theirs[lost].any(), "what Tutel drops comes out as 0"


# Figures of Tutel 82af7aa on a CPU. Gate, top_k, factor, prioritised, normalised, balance -> loss, mean, std, dropped.
APPENDIX = [
    ("linear", 1, 1.25, True, False, "load_importance", 0.0000210, -0.0058828, 0.0285096, 0),
    ("linear", 1, 1.25, False, False, "load_importance", 0.0000210, -0.0058828, 0.0285096, 0),
    ("linear", 1, 1.25, True, False, "gshard", 1.0006603, -0.0058828, 0.0285096, 0),
    ("linear", 1, 0.5, True, False, "load_importance", 0.0000210, -0.0025774, 0.0201434, 32),
    ("linear", 1, 0.5, False, False, "load_importance", 0.0000210, -0.0027372, 0.0199518, 32),
    ("linear", 2, 1.0, True, True, "gshard", 1.0006603, -0.0176381, 0.0688263, None),
    ("linear", 2, 1.0, True, False, "load_importance", 0.0000312, -0.0098856, 0.0386509, None),
    ("linear", 2, 0, False, True, "gshard", 1.0006603, -0.0182830, 0.0692642, 0),
    ("linear", 2, 0, True, True, "gshard", 1.0006603, -0.0182830, 0.0692642, 0),
    ("cosine", 1, 1.25, True, False, "load_importance", 0.0445082, -0.0071432, 0.0375486, 15),
]


@pytest.mark.parametrize("row", APPENDIX, ids=lambda row: " ".join(map(str, row[:6])))
def test_published_numbers_and_no_drops_where_tutels_dropless_drops(row):
    """In the last linear row Tutel, told to drop nothing, drops under prioritised routing."""
    router, top_k, factor, prioritized, normalize, balance, loss, mean, std, dropped = row
    config = MoEConfig(
        num_experts=4,
        top_k=top_k,
        router=router,
        eval_capacity_factor=factor,
        batch_prioritized=prioritized,
        normalize_gate=normalize,
        balance=balance,
        cosine_dim=8,
    )
    module = MoEMlp(config, 16, 32).eval()
    with torch.no_grad():
        for name, p in module.named_parameters():
            name = name.removeprefix(PREFIX)
            v = sequence(p.numel(), sum(map(ord, name)) % 1000).view_as(p)
            p.copy_(math.log(2) + 0.5 * v if "temperature" in name else 0.15 * v)
        y, aux, stats = module(image(3, 20, 16, key=7).float())
    assert float(stats.balance_loss) == pytest.approx(loss, abs=1e-7)
    assert float(aux) == pytest.approx(0.01 * loss, abs=1e-8)
    assert float(y.mean()) == pytest.approx(mean, abs=1e-6) and float(y.std()) == pytest.approx(std, abs=1e-6)
    assert dropped is None or int(stats.dropped) == dropped


@needs_tutel
@pytest.mark.parametrize("case", [c for c in CASES if c.factor in (1.25, 0, -1.0)], ids=lambda case: case.name)
def test_weights_go_across_both_ways_and_results_agree(case):
    native, tutel = (kind(case.config(), DIM, HIDDEN).train(case.training) for kind in (MoEMlp, TutelMoEMlp))
    fill(native)
    tutel.load_state_dict(native.state_dict())
    assert tutel.state_dict().keys() == native.state_dict().keys()
    native.load_state_dict(tutel.state_dict())
    x, upstream = (t.float() for t in inputs())
    results = []
    for module in (native, tutel):
        torch.manual_seed(NOISE_SEED)
        results.append(run(module, x, upstream))
    ours, theirs = results
    np.testing.assert_allclose(
        flat(ours.y, ours.aux, ours.grads), flat(theirs.y, theirs.aux, theirs.grads), rtol=1e-5, atol=2e-6
    )
    assert torch.equal(ours.stats.kept_TK, theirs.stats.kept_TK)
    assert torch.equal(ours.stats.expert_TK, theirs.stats.expert_TK)


@needs_tutel
def test_dropless_under_prioritised_routing_drops_nothing_through_our_door():
    config = MoEConfig(num_experts=4, batch_prioritized=True, drop=0)
    native, tutel = (kind(config, DIM, HIDDEN).eval() for kind in (MoEMlp, TutelMoEMlp))
    fill(native)
    tutel.load_state_dict(native.state_dict())
    x = inputs()[0].float()
    torch.testing.assert_close(native(x)[0], tutel(x)[0])


def both_on_this_rank(d, factor):
    """Differences between native and Tutel's layer with experts over all ranks: (largest, what is compared)."""
    group = torch.distributed.group.WORLD
    config = MoEConfig(num_experts=4, top_k=2, eval_capacity_factor=factor, drop=0, aux_weight=1.0)
    native, tutel = (kind(config, DIM, HIDDEN, ep_group=group).eval() for kind in (MoEMlp, TutelMoEMlp))
    fill(native, seed=native.experts.first)
    tutel.load_state_dict(native.state_dict())
    x, upstream = (t.float() for t in inputs(seed=d.rank))
    ours, theirs = (run(module, x, upstream) for module in (native, tutel))
    assert torch.equal(ours.stats.kept_TK, theirs.stats.kept_TK)
    flats = [flat(result.y, result.aux, result.grads) for result in (ours, theirs)]
    return float(np.abs(flats[0] - flats[1]).max()), len(flats[0])


@needs_tutel
@pytest.mark.parametrize("factor", [0, 1.0])
def test_expert_parallel_layers_agree(factor):
    for difference, compared in spawn_dist(2, both_on_this_rank, factor):
        assert difference < 5e-6 and compared > 400


@needs_tutel
@pytest.mark.parametrize("options", [{"z_weight": 0.1}, {"gate_noise": 0.0}])
def test_what_tutel_cannot_do_is_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        TutelMoEMlp(MoEConfig(num_experts=4, **options), DIM, HIDDEN)


def test_without_tutel_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tutel", None)
    monkeypatch.setitem(sys.modules, "tutel.moe", None)
    with pytest.raises(UserError, match=r"not on PyPI.*NO_CUDA=1.*moe\.backend=native"):
        TutelMoEMlp(MoEConfig(num_experts=4), DIM, HIDDEN)
