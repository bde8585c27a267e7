import json

import pytest
import torch

from swin_scale.bench import model as bench
from swin_scale.bench import peers
from swin_scale.bench.model import bench_model
from swin_scale.bench.peers import PeerMissing
from swin_scale.errors import SwinScaleError, UserError

NAME = "swinv2_nano_patch4_window4_32"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "result.json"
    result = bench_model(NAME, batch=2, rounds=1, threads=1, out=str(path), device="cpu")
    return result, json.loads(path.read_text())


def test_result_file_says_what_ran_where_and_what_came_out(result):
    _, figures = result
    assert set(figures) == {
        "schema",
        "bench",
        "command",
        "hardware",
        "versions",
        "settings",
        "gate",
        "missing",
        "modes",
    }
    assert figures["bench"] == "model" and figures["settings"]["batch"] == 2
    assert figures["command"].startswith(f"swin-scale bench model --model {NAME} --batch 2 --rounds 1 --threads 1")
    assert figures["hardware"]["threads"] == 1 and figures["hardware"]["gpu"] is None
    assert figures["versions"]["torch"] == torch.__version__
    assert set(figures["modes"]) == {"forward", "forward+backward"}
    for measured in figures["modes"].values():
        assert list(measured["seconds"]) == ["ours", "timm", "huggingface", "ours again"]
        assert set(measured["ratios"]) == {"timm", "huggingface", "ours again"}
        for name, ratio in measured["ratios"].items():
            assert ratio["pairs"] == 2 == len(measured["pairs"][name]) and not ratio["is_claim"]
            assert 0 < ratio["lower"] <= ratio["median"] <= ratio["upper"]


def test_a_missing_peer_is_named_with_its_reason(result):
    result, figures = result
    assert list(figures["missing"]) == ["official"]
    assert "missing: official: no checkout given; pass --official DIR" in str(result)
    assert "not a claim: 2 pairs" in str(result)


def test_all_contestants_compute_the_same_function(result):
    _, figures = result
    for name, errors in figures["gate"].items():
        assert errors["logits"] < 1e-5 and errors["gradients"] < 1e-5, name


def test_forward_only_leaves_gradients_out():
    figures = bench_model(NAME, batch=1, rounds=1, threads=1, backward=False, device="cpu").figures
    assert list(figures["modes"]) == ["forward"] and "gradients" not in figures["gate"]["ours"]


def only_timm(monkeypatch):
    def absent(*_):
        raise PeerMissing("left out")

    monkeypatch.setattr(peers, "huggingface", absent)


def test_when_ours_is_wrong_nothing_is_timed(monkeypatch):
    only_timm(monkeypatch)
    build = bench._contestants

    def broken(*arguments):
        found, missing = build(*arguments)
        with torch.no_grad():
            found[0].module.head.bias.add_(0.1)
        return found, missing

    monkeypatch.setattr(bench, "_contestants", broken)
    monkeypatch.setattr(bench, "compare", None)
    with pytest.raises(SwinScaleError, match=r"our logits are off by .* times the error of timm; nothing was timed"):
        bench_model(NAME, batch=1, rounds=1, threads=1, backward=False, device="cpu")


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    only_timm(monkeypatch)
    build = peers.timm

    def broken(v):
        one = build(v)
        one.module.norm.eps = 1.0
        return one

    monkeypatch.setattr(peers, "timm", broken)
    figures = bench_model(NAME, batch=1, rounds=1, threads=1, backward=False, device="cpu").figures
    assert "computes something else" in figures["missing"]["timm"]
    assert list(figures["modes"]["forward"]["seconds"]) == ["ours", "ours again"]


@pytest.mark.parametrize("precision", ["bf16", "amp-bf16"])
def test_half_precisions_pass_the_gate_on_the_cpu(precision, monkeypatch):
    only_timm(monkeypatch)
    figures = bench_model(NAME, batch=1, rounds=1, threads=1, precision=precision, device="cpu").figures
    assert 1e-4 < figures["gate"]["ours"]["logits"] < 0.1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("swin_nano_patch4_window4_32", {}, "compares SwinV2"),
        (NAME, {"precision": "int8"}, "amp-fp16"),
        ("swinv2_nano", {}, "did you mean"),
    ],
)
def test_wrong_requests_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        bench_model(name, **options)
