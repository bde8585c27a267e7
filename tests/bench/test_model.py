import json

import pytest
import torch

from swin_scale.bench import measure, model_step, peers
from swin_scale.bench import model as bench
from swin_scale.bench.model import bench_model
from swin_scale.bench.peers import PeerMissing
from swin_scale.errors import SwinScaleError, UserError

NAME = "swinv2_nano_patch4_window4_32"
OFFICIAL_PROTOCOL = (bench.INFERENCE_WARMUP, bench.INFERENCE_CALLS)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "result.json"
    result = bench_model(NAME, batch=2, rounds=1, threads=1, mode="all", out=str(path), device="cpu")
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
        "memory",
        "modes",
    }
    assert figures["bench"] == "model" and figures["settings"]["batch"] == 2
    assert figures["command"].startswith(f"swin-scale bench model --model {NAME} --batch 2 --rounds 1 --threads 1")
    assert figures["hardware"]["threads"] == 1 and figures["hardware"]["gpu"] is None
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["memory"] is None and not figures["settings"]["inference"]
    assert set(figures["modes"]) == {"forward", "forward+backward", "step"}
    for measured in figures["modes"].values():
        assert list(measured["seconds"]) == ["ours", "timm", "huggingface", "ours again"]
        assert set(measured["ratios"]) == {"timm", "huggingface", "ours again"}
        for times in measured["seconds"].values():
            assert times["images_per_s"] == pytest.approx(2 / times["median"]) and times["mfu"] is None
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
    figures = bench_model(NAME, batch=1, rounds=1, threads=1, mode="forward", device="cpu").figures
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
    monkeypatch.setattr(measure, "compare", None)
    with pytest.raises(SwinScaleError, match=r"our logits are off by .* times the error of timm; nothing was timed"):
        bench_model(NAME, batch=1, rounds=1, threads=1, mode="forward", device="cpu")


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    only_timm(monkeypatch)
    build = peers.timm

    def broken(v):
        one = build(v)
        one.module.norm.eps = 1.0
        return one

    monkeypatch.setattr(peers, "timm", broken)
    figures = bench_model(NAME, batch=1, rounds=1, threads=1, mode="forward", device="cpu").figures
    assert "computes something else" in figures["missing"]["timm"]
    assert list(figures["modes"]["forward"]["seconds"]) == ["ours", "ours again"]


def test_the_official_protocol_takes_the_mean_of_thirty_passes_after_fifty(monkeypatch):
    only_timm(monkeypatch)
    monkeypatch.setattr(bench, "INFERENCE_WARMUP", 3)
    monkeypatch.setattr(bench, "INFERENCE_CALLS", 2)
    asked = []

    def recording(calls, **options):
        asked.append(options)
        return measure_compare(calls, **options)

    measure_compare = measure.compare
    monkeypatch.setattr(measure, "compare", recording)
    result = bench_model(NAME, batch=1, rounds=1, threads=1, inference=True, mode="all", device="cpu")
    assert [(options["warmup"], options["inner"]) for options in asked] == [(3, 2)]
    assert list(result.figures["modes"]) == ["forward"] and "gradients" not in result.figures["gate"]["ours"]
    assert "--inference" in result.figures["command"] and "inference" in str(result)
    assert OFFICIAL_PROTOCOL == (50, 30)


def test_inference_computes_the_position_bias_once_and_leaves_nothing_frozen(monkeypatch):
    only_timm(monkeypatch)
    monkeypatch.setattr(bench, "INFERENCE_WARMUP", 1)
    monkeypatch.setattr(bench, "INFERENCE_CALLS", 1)
    models, build, compare = [], bench.create_model, measure.compare
    monkeypatch.setattr(bench, "create_model", lambda *a, **k: models.append(build(*a, **k)) or models[-1])
    seen = []

    def looking(calls, **options):
        seen.append(models[-1].layers[0].blocks[0].attn.frozen_bias)
        return compare(calls, **options)

    monkeypatch.setattr(measure, "compare", looking)
    bench_model(NAME, batch=1, rounds=1, threads=1, inference=True, device="cpu")
    assert seen == [True] and not models[-1].layers[0].blocks[0].attn.frozen_bias


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
        (NAME, {"mode": "backward"}, "forward, both, step, all"),
        (NAME, {"only": ("jax",)}, "--peers jax"),
        (NAME, {"launches": ("graphs",), "device": "cpu"}, "CUDA graphs need a CUDA device"),
        ("swinv2_nano", {}, "did you mean"),
    ],
)
def test_wrong_requests_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        bench_model(name, **options)


def test_half_precision_takes_amp_and_our_own_reference_into_the_comparison(tmp_path, monkeypatch):
    only_timm(monkeypatch)
    monkeypatch.setattr(peers, "official", lambda v, _: peers.timm(v))
    only = ("official", "official-amp", "reference")
    figures = bench_model(NAME, batch=2, rounds=1, threads=1, precision="bf16", mode="step", only=only).figures
    assert list(figures["modes"]["step"]["seconds"]) == ["ours", "reference", "official-amp", "official", "ours again"]
    # fp32 between the products: nearer to fp64 than bf16 throughout.
    assert figures["gate"]["official-amp"]["gradients"] < figures["gate"]["official"]["gradients"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_adamw_on_fp32_values_of_the_parameters(dtype, monkeypatch):
    monkeypatch.setattr(model_step, "LEARNING_RATE", 1e-2)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).to(dtype)
    plain = [p.detach().float().clone().requires_grad_() for p in module.parameters()]
    optimizer = torch.optim.AdamW(plain, lr=1e-2, weight_decay=0.05)
    step = model_step.TrainingStep(peers.Contestant(name="linear", module=module, dtype=dtype))
    x, labels = torch.randn(4, 3, 2, 2).to(dtype), torch.tensor([0, 1, 2, 1])
    for _ in range(3):
        step(x, labels)
        for p, parameter in zip(plain, module.parameters()):
            p.grad = parameter.grad.float()
        optimizer.step()
    for p, parameter in zip(plain, module.parameters()):
        torch.testing.assert_close(parameter, p.to(dtype), rtol=0, atol=1e-6 if dtype is torch.float32 else 0)
