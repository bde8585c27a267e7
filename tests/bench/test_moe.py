import json
import sys
from dataclasses import replace

import pytest
import torch

from swin_scale.bench import moe as bench
from swin_scale.bench import moe_memory, moe_peers
from swin_scale.bench.moe import bench_moe
from swin_scale.bench.moe_peers import Sizes
from swin_scale.errors import SwinScaleError, UserError

SMALL = {"dim": 16, "tokens": 128, "many_tokens": 128, "memory_tokens": 0, "rounds": 1, "threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tutel.moe", None)
        result = bench_moe(**SMALL, out=str(path))
    return result, json.loads(path.read_text())


def test_every_case_has_its_ratios_and_bars_in_both_modes(result):
    _, figures = result
    assert figures["bench"] == "moe" and figures["memory"] is None
    cases = figures["cases"]
    assert [(case["experts"], case["tokens"]) for case in cases.values()] == [(8, 128)] * 3 + [(64, 128)]
    two = {"dense", "deepspeed"}
    peers = {"dropless": two, "dropless, even loads": two, "capacity 1.25": {*two, "one-hot"}}
    for name, case in cases.items():
        assert list(case["modes"]) == ["forward", "forward+backward"]
        for measured in case["modes"].values():
            wanted = peers.get(name, {"dense"})
            assert set(measured["ratios"]) == wanted | {"ours again"}
            assert set(measured["bars"]) == (wanted if "even" not in name else {"dense"})
            for peer, bar in measured["bars"].items():
                assert bar["reached"] == (measured["ratios"][peer]["lower"] >= bar["at_least"])


def test_all_compute_the_same_function_and_nothing_is_dropped(result):
    for case in result[1]["cases"].values():
        for name, errors in case["gate"].items():
            assert errors["output"] < 1e-6 and errors["gradients"] < 1e-6 and errors["worst_gradient"] < 1e-5, name


def test_a_peer_that_is_not_installed_is_named(result):
    result, figures = result
    assert list(figures["cases"]["dropless"]["missing"]) == ["tutel"]
    assert "missing: tutel: tutel cannot be imported" in str(result) and "not a claim: 2 pairs" in str(result)


@pytest.mark.parametrize(
    ("experts", "spread", "wanted"), [(8, 0.25, [12, 13, 14, 15, 17, 18, 19, 20]), (8, 0.0, [16] * 8), (1, 0.25, [128])]
)
def test_experts_get_the_loads_asked_for_in_random_order(experts, spread, wanted):
    assert moe_peers.loads(128, experts, spread) == wanted
    generator = torch.Generator().manual_seed(3)
    weights = moe_peers.random_weights(Sizes(experts=experts, dim=16, hidden=32), generator)
    expert = (moe_peers.tokens_for(weights["gate"], wanted, generator) @ weights["gate"].t()).argmax(1)
    assert torch.bincount(expert).tolist() == wanted and (experts == 1 or (expert.diff() < 0).any())


def spoilt(build):
    """The layer `build` makes, its output off by a thousandth."""

    def broken(*arguments):
        layer = build(*arguments)

        def forward(x):
            y, aux = layer.forward(x)
            return y * 1.001, aux

        return replace(layer, forward=forward)

    return broken


def test_when_ours_is_wrong_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(moe_peers, "ours", spoilt(moe_peers.ours))
    monkeypatch.setattr(bench, "compare", None)
    with pytest.raises(SwinScaleError, match=r"our output is off by 0.001 .* nothing was timed"):
        bench_moe(**SMALL, only=("dense",))


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(moe_peers, "one_hot", spoilt(moe_peers.one_hot))
    figures = bench_moe(**SMALL, only=("dense", "one-hot")).figures
    case = figures["cases"]["capacity 1.25"]
    assert case["missing"]["one-hot"].startswith("it computes something else")
    assert set(case["modes"]["forward"]["ratios"]) == {"dense", "ours again"}


def test_memory_of_the_one_hot_form_grows_with_the_square_of_tokens():
    memory = moe_memory.compare(8, 4096, "fp32", 1, torch.device("cpu"))
    tensor = 4 * 4096 * 1.25 * 4096  # combine weights over (tokens, experts, capacity)
    assert 2 * tensor < memory["bytes"]["one-hot"]["forward+backward"] < 4 * tensor
    assert 0 < memory["share"]["forward+backward"] < 0.15


def test_what_does_not_fit_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(moe_memory, "_free", lambda device: 10**6)
    monkeypatch.setattr(moe_memory, "_in_process", lambda *_: {"forward": 1, "forward+backward": 2})
    memory = moe_memory.compare(8, 2048, "fp32", 1, torch.device("cpu"))
    assert memory["share"] == {} and "need up to 0.1 GB, 0.0 GB are free" in memory["missing"]["one-hot"]
    assert "missing: one-hot: 2048 tokens need" in moe_memory.table(memory)[-1]


@pytest.mark.parametrize(
    ("change", "message"), [({"tokens": 100}, "--tokens 100"), ({"precision": "int8"}, "--precision int8")]
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        bench_moe(**SMALL | change)
