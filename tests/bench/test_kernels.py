import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module

from swin_scale.bench import KERNEL_PEERS, ceilings, kernel_ops, kernel_peers, kernels, measure
from swin_scale.bench.kernel_gate import allowance, excess, gate, luck_of_scale
from swin_scale.bench.kernels import bench_kernels
from swin_scale.bench.region import QUANTITIES, Floor, Shape, draw, floors, judged_images, shapes
from swin_scale.errors import SwinScaleError, UserError

CPU = torch.device("cpu")
NANO = "swinv2_nano_patch4_window4_32"
TINY = Shape(name="tiny", hw=(8, 12), dim=32, heads=2, window=(4, 4), shift=(2, 2))
PEERS = ("official", "sdpa")

# Name -> geometry (side, channels, heads, N, whether the stage shifts), GFLOP and least GB of forward and of backward,
# at batch 128 in half precision: counted kernel by kernel from the official models.
TABLE = {
    "T w8 s1": (64, 96, 3, 64, True, 13, 32, 0.403, 0.705),
    "T w8 s2": (32, 192, 6, 64, True, 6, 16, 0.201, 0.352),
    "T w8 s3": (16, 384, 12, 64, True, 3, 8, 0.101, 0.176),
    "T w8 s4": (8, 768, 24, 64, False, 2, 4, 0.050, 0.088),
    "T w16 s1": (64, 96, 3, 256, True, 52, 129, 0.403, 0.705),
    "T w16 s3": (16, 384, 12, 256, False, 13, 32, 0.101, 0.176),
    "B 192 w12 s1": (48, 128, 4, 144, True, 22, 54, 0.302, 0.528),
    "B 192 w12 s3": (12, 512, 16, 144, False, 5, 14, 0.075, 0.132),
    "B 192 w12 s4": (6, 1024, 32, 36, False, 1, 2, 0.038, 0.066),
    "B w16 s1": (64, 128, 4, 256, True, 69, 172, 0.537, 0.940),
    "L 384 w24 s1": (96, 192, 6, 576, True, 522, 1305, 1.81, 3.17),
    "L 384 w24 s3": (24, 768, 24, 576, False, 130, 326, 0.453, 0.793),
    "G 192 w12 s1": (48, 512, 16, 144, True, 87, 217, 1.21, 2.11),
    "G 192 w12 s3": (12, 2048, 64, 144, False, 22, 54, 0.302, 0.528),
}


def test_floors_are_those_of_the_published_geometries():
    assert {shape.name for shape in shapes()} == set(TABLE)
    for shape in shapes():
        side, dim, heads, tokens, shifts, gflop_f, gflop_b, gb_f, gb_b = TABLE[shape.name]
        assert (shape.hw, shape.dim, shape.heads, shape.tokens) == ((side, side), dim, heads, tokens)
        assert shape.head_dim == 32 and (shifts or not shape.shifted)
        least = floors(shape, 128, torch.float16)
        forward, both = least["forward"], least["forward+backward"]
        # As many digits as are printed above.
        for found, wanted in ((forward.bytes, gb_f), (both.bytes - forward.bytes, gb_b)):
            assert found / 1e9 == pytest.approx(wanted, abs=6e-4 if wanted < 1 else 6e-3)
        assert forward.flops / 1e9 == pytest.approx(gflop_f, abs=0.6)
        assert (both.flops - forward.flops) / 1e9 == pytest.approx(gflop_b, abs=0.6)
        assert floors(shape, 128, torch.float32)["forward"].bytes == 2 * forward.bytes


def test_floors_in_seconds_on_the_roofs_of_an_h200():
    (shape,) = (shape for shape in shapes(["L 384 w24 s1"]) if shape.shifted)
    least = floors(shape, 128, torch.float16)
    forward = least["forward"].seconds(4.3e12, 3.7e12, 790e12)
    both = least["forward+backward"].seconds(4.3e12, 3.7e12, 790e12)
    assert [1e3 * forward[kind] for kind in ("memory", "matmul", "softmax")] == pytest.approx(
        [0.421, 0.661, 1.10], rel=0.01
    )
    assert [1e3 * (both[kind] - forward[kind]) for kind in ("memory", "matmul", "softmax")] == pytest.approx(
        [0.737, 1.65, 1.93], rel=0.01
    )
    assert least["forward"].seconds(1.0, None, 1.0)["softmax"] is None


def test_shifted_shapes_come_first_and_every_shape_unshifted_too():
    found = shapes()
    kinds = [shape.shifted for shape in found]
    assert kinds == sorted(kinds, reverse=True)
    assert [shape.name for shape in found[:4]] == ["T w8 s1", "B 192 w12 s1", "T w16 s1", "L 384 w24 s1"]
    assert sum(not shifted for shifted in kinds) == len(TABLE)
    assert [shape.title for shape in shapes(["B 192 w12 s4"])] == ["B 192 w12 s4"]
    assert [shape.title for shape in shapes(["T w8 s1"], shifts=("shifted",))] == ["T w8 s1, shifted"]
    with pytest.raises(UserError, match="--shapes 'T w9 s1' is not one of 'T w8 s1'"):
        shapes(["T w9 s1"])


@pytest.mark.parametrize(
    ("batch", "most", "images"),
    [
        (128, 1 << 26, [0, 1, 2, 3, 124, 125, 126, 127]),
        (2, 1 << 26, [0, 1]),
        (128, 3 * TINY.scores(1), [0, 126, 127]),
        (5, 1, [4]),
    ],
)
def test_fp64_judges_the_first_and_the_last_images(batch, most, images):
    assert judged_images(TINY, batch, most) == images


def regions(shape, dtype, *names):
    found, missing = kernel_peers.build(shape, dtype, CPU, only=names)
    assert list(missing) == ["ours-fused"]
    return found


@pytest.mark.parametrize("shift", [(2, 2), (0, 0)], ids=["shifted", "unshifted"])
def test_all_ways_to_compute_the_region_pass_the_gate(shift):
    shape = replace(TINY, shift=shift)
    errors = gate(shape, regions(shape, torch.float32, *PEERS), draw(shape, 3, torch.float32, CPU, 0))
    assert list(errors) == ["ours", *PEERS]
    assert all(set(found) == set(QUANTITIES) and max(found.values()) < 3e-6 for found in errors.values()), errors


def test_under_amp_only_the_products_are_in_half_precision():
    errors = gate(
        TINY, regions(TINY, torch.bfloat16, "official-amp", "official"), draw(TINY, 3, torch.bfloat16, CPU, 0)
    )
    assert errors["official-amp"]["output"] < 0.7 * errors["official"]["output"] < 0.1
    assert errors["ours"]["output"] < errors["official-amp"]["output"]
    allowed = allowance(errors, torch.bfloat16, 0.01)
    assert allowed["q"] == errors["official-amp"]["q"] and allowed["scale"] == 0.01
    assert excess(errors["ours"], allowed) is None


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.bfloat16, 1e-3, 0.2), (torch.float32, 1e-8, 1e-4)], ids=str)
def test_the_gradient_of_the_scale_may_err_as_far_as_chance_takes_the_official_chain(dtype, low, high):
    inputs = draw(TINY, 3, dtype, CPU, 0)
    errors = gate(TINY, regions(TINY, dtype, "official"), inputs)
    luck = luck_of_scale(TINY, inputs)
    assert low < luck < high and errors["ours"]["scale"] <= luck


def test_flex_attention_computes_the_region(monkeypatch):
    # Uncompiled: a CPU has no compiled version of it with gradients.
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    run = kernel_peers.flexible(TINY, CPU)
    inputs = draw(TINY, 2, torch.float32, CPU, 0)
    with torch.no_grad():
        _, y = run(inputs.x, inputs.qkv_windows, inputs.scale, inputs.bias)
        _, wanted = kernel_peers.eager(
            TINY,
            kernel_peers.mask_of(TINY, torch.float32, CPU),
            inputs.x,
            inputs.qkv_windows,
            inputs.scale,
            inputs.bias,
        )
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


def broken(how):
    """Our attention with a fault, in place of the right one."""
    right = kernel_peers.chunked.window_attention

    def wrong(qkv, scale, bias, window, shift, cosine):
        if how == "no shift mask":
            rolled = right(qkv.roll((-shift[0], -shift[1]), (1, 2)), scale, bias, window, (0, 0), cosine)
            return rolled.roll(shift, (1, 2))
        if how == "no gradient of the bias":
            return right(qkv, scale, bias.detach() + 0 * bias, window, shift, cosine)
        if how == "last image left out":
            y = right(qkv, scale, bias, window, shift, cosine)
            return torch.cat([y[:-1], torch.zeros_like(y[-1:])])
        return right(qkv, scale * torch.tensor([1.0, 1.001]).view(2, 1, 1), bias, window, shift, cosine)

    return wrong


@pytest.mark.parametrize(
    ("how", "quantity"),
    [
        ("no shift mask", "the output"),
        ("no gradient of the bias", "the gradient of bias"),
        ("last image left out", "the output"),
        ("a scale off by a thousandth", "the output"),
    ],
)
def test_the_gate_catches_a_wrong_kernel_and_nothing_of_its_shape_is_timed(how, quantity, monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_peers.chunked, "window_attention", broken(how))
    monkeypatch.setattr(kernels, "measure", None)
    monkeypatch.setattr(kernels, "shapes", lambda *_: [TINY])
    out = tmp_path / "kernels.json"
    with pytest.raises(
        SwinScaleError, match=f"ours failed its gate and was not timed: tiny, shifted, fp32: {quantity}"
    ):
        bench_kernels(batch=2, rounds=1, threads=1, only=PEERS, device="cpu", out=str(out))
    (case,) = json.loads(out.read_text())["cases"]
    assert case["failed"].startswith(quantity) and "launches" not in case


def test_a_kernel_that_raises_fails_its_shape_and_not_the_run(monkeypatch):
    monkeypatch.setattr(kernel_peers.chunked, "window_attention", lambda *_: [][0])
    monkeypatch.setattr(kernels, "shapes", lambda *_: [TINY, replace(TINY, shift=(0, 0))])
    with pytest.raises(SwinScaleError, match=r"tiny, shifted, fp32: IndexError: .*; tiny, fp32: IndexError"):
        bench_kernels(batch=2, rounds=1, threads=1, only=("official",), device="cpu")


def test_a_peer_that_computes_something_else_or_raises_is_named_and_not_timed(monkeypatch):
    monkeypatch.setattr(kernels, "shapes", lambda *_: [TINY])
    right = kernel_peers.eager
    monkeypatch.setattr(kernel_peers, "eager", lambda shape, mask, *rest: right(shape, None, *rest))
    monkeypatch.setattr(kernel_peers, "sdpa", lambda *_: [][0])
    only = ("official", "sdpa", "flex", "fwa-2", "official-code", "official-amp")
    (case,) = bench_kernels(batch=2, rounds=1, threads=1, only=only, device="cpu").figures["cases"]
    assert list(case["launches"]["calls"]["forward"]["seconds"]) == ["ours", "ours again"]
    missing = case["missing"]
    assert "the output is off" in missing["official"] and missing["sdpa"].startswith("IndexError")
    assert "on a CPU" in missing["flex"] and "--fwa DIR" in missing["fwa-2"]
    assert "--official DIR" in missing["official-code"] and "half precision" in missing["official-amp"]


OFFICIAL = """
import torch
import torch.nn as nn
import torch.nn.functional as F

def window_partition(x, size):
    B, H, W, C = x.shape
    return x.view(B, H // size, size, W // size, size, C).transpose(2, 3).reshape(-1, size, size, C)

def window_reverse(windows, size, H, W):
    x = windows.view(-1, H // size, W // size, size, size, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, H, W, windows.shape[-1])

class WindowAttention(nn.Module):
    def __init__(self, dim, window_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.logit_scale = nn.Parameter(torch.zeros(num_heads, 1, 1))
        self.cpb_mlp = nn.Linear(2, num_heads)
        self.register_buffer("relative_coords_table", torch.zeros(1, 3, 3, 2))
        self.register_buffer("relative_position_index", torch.zeros(1, dtype=torch.long))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        B_, N, C = x.shape
        qkv = F.linear(input=x, weight=self.qkv.weight, bias=None)
        q, k, v = qkv.view(B_, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = 16 * torch.sigmoid(table[self.relative_position_index.view(-1)].view(N, N, -1).permute(2, 0, 1))
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.logit_scale.exp() + bias
        if mask is not None:
            logits = (logits.view(-1, len(mask), *logits.shape[1:]) + mask[:, None]).view_as(logits)
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B_, N, C))
"""


def test_the_module_of_a_checkout_is_run_without_its_two_products(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/swin_transformer_v2.py").write_text(OFFICIAL)
    for shape in (TINY, replace(TINY, shift=(0, 0))):
        region = kernel_peers.official_region(shape, torch.float32, CPU, str(tmp_path))
        errors = gate(shape, [*regions(shape, torch.float32), region], draw(shape, 2, torch.float32, CPU, 0))
        assert max(errors["official-code"].values()) < 1e-5, errors


def test_a_checkout_that_cannot_be_imported_is_a_missing_peer(tmp_path):
    package = tmp_path / "flash_win_attn_v2"
    with pytest.raises(kernel_peers.PeerMissing, match="no flash_win_attn_v2/__init__"):
        kernel_peers._load("flash_win_attn_v2", str(tmp_path), "flash_window_attention_v2")
    package.mkdir()
    (package / "__init__.py").write_text("import there_is_no_such_package\n")
    with pytest.raises(kernel_peers.PeerMissing, match="there_is_no_such_package"):
        kernel_peers._load("flash_win_attn_v2", str(tmp_path), "flash_window_attention_v2")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "kernels.json"
    result = bench_kernels(
        models=[NANO], batch=2, rounds=1, threads=1, only=PEERS, parts=("attention", "ops"), device="cpu", out=str(out)
    )
    return result, json.loads(out.read_text()), out.with_suffix(".svg").read_text()


def test_a_run_on_the_cpu_writes_every_field_and_says_so(result):
    result, figures, _ = result
    assert set(figures) == {
        *("schema", "bench", "command", "hardware", "versions"),
        *("settings", "ceilings", "cases", "ops", "left_out"),
    }
    assert "CPU variants" in figures["settings"]["note"] and "CPU variants" in str(result)
    assert figures["command"].startswith(
        "swin-scale bench kernels --batch 2 --rounds 1 --threads 1 --parts attention ops"
    )
    assert f"--models {NANO}" in figures["command"] and figures["left_out"] == []
    rates = figures["ceilings"]["fp32"]
    assert min(rates[key] for key in ("copy_bytes_per_s", "matmul_flops", "exp_per_s")) > 1e6
    assert [case["title"] for case in figures["cases"]] == [f"{NANO} s1, shifted", f"{NANO} s1", f"{NANO} s2"]
    for case in figures["cases"]:
        assert set(case["gate"]) == {"ours", *PEERS} and case["memory"] is None and case["sets"] == 1
        assert case["ours"] == "torch in cache-sized pieces" and "CUDA" in case["missing"]["ours-fused"]
        check_times(case, {"ours", *PEERS, "ours again"}, {"memory", "softmax", "matmul"})
    assert [op["title"] for op in figures["ops"]] == [
        *("residual norm", "add norm", "patch merging and norm", "patch merging", "permute", "unpermute")
    ]
    for op in figures["ops"]:
        check_times(op, {"ours", "eager", "ours again"}, {"memory"})
    assert "not a claim: 2 pairs" in str(result)


def check_times(case, names, floor_kinds):
    assert set(case["launches"]) == {"calls"} and set(case["launches"]["calls"]) == set(measure.MODES)
    for mode, measured in case["launches"]["calls"].items():
        assert set(measured["seconds"]) == names and set(measured["ratios"]) == names - {"ours"}
        for name, achieved in measured["achieved"].items():
            seconds = measured["seconds"][name]["median"]
            assert achieved["bytes_per_s"] == pytest.approx(case["floors"][mode]["bytes"] / seconds)
            assert set(achieved["of_floor"]) == floor_kinds and min(achieved["of_floor"].values()) > 0


def test_the_picture_has_a_bar_for_each_ratio(result):
    _, figures, picture = result
    root = ElementTree.fromstring(picture)
    titles = [found.text for found in root.iter("{http://www.w3.org/2000/svg}title")][1:]
    ratios = [
        (name, ratio["median"])
        for case in figures["cases"] + figures["ops"]
        for measured in case["launches"]["calls"].values()
        for name, ratio in measured["ratios"].items()
        if name != "ours again"
    ]
    assert sorted(titles) == sorted(title for title in titles if any(title.startswith(name) for name, _ in ratios))
    assert len(titles) == len(ratios) and all(any(f"{name}: {r:.3g} (" in t for t in titles) for name, r in ratios)
    texts = [found.text for found in root.iter("{http://www.w3.org/2000/svg}text")]
    assert f"{NANO} s1, shifted, fp32" in texts and "forward+backward" in texts and "1" in texts


def test_shapes_after_the_budget_are_named():
    figures = bench_kernels(
        ["T w8 s4"], batch=1, rounds=1, threads=1, only=PEERS, budget=0.0, parts=("attention", "ops"), device="cpu"
    ).figures
    assert figures["cases"] == figures["ops"] == []
    assert figures["left_out"] == ["T w8 s4, fp32", "norms, patch merging and token moves, fp32"]


def test_an_op_that_errs_more_than_twice_as_much_as_eager_torch_is_not_timed(monkeypatch):
    right = kernel_ops.kernels.residual_norm
    monkeypatch.setattr(kernel_ops.kernels, "residual_norm", lambda x, *rest: right(x, *rest) * 1.0001)
    monkeypatch.setattr(kernel_ops, "measure", None)
    op = kernel_ops._residual_norm(torch.float32, 1, CPU)
    rates = {"l2_bytes": None, "copy_bytes_per_s": 1.0}
    case = kernel_ops._case(op, "fp32", CPU, ("calls",), 1, rates, compiled=False)
    assert "output 0 is off" in case["failed"] and "launches" not in case


def candidates(log, *names):
    return [
        measure.Candidate(
            name=name, calls={mode: lambda i, name=name: log.append(f"{name}{i}") for mode in measure.MODES}
        )
        for name in names
    ]


def test_a_pass_goes_through_all_sets_and_a_time_is_that_of_one_call():
    log = []
    found, _ = measure.measure(
        candidates(log, "A", "B"), modes=("forward",), launches=("calls",), sets=3, rounds=1, device=CPU
    )
    assert log[:9] == ["A0", "A1", "A2", "B0", "B1", "B2", "A0", "A1", "A2"]
    assert list(found["calls"]["forward"].seconds) == ["A", "B", "ours again"]


@pytest.mark.parametrize(("fails", "timed"), [("B", True), ("A", False)])
def test_what_cannot_be_captured_is_named(fails, timed, monkeypatch):
    def capture(call, pool):
        log.clear()
        call()
        if log[0].startswith(fails):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return call

    log = []
    monkeypatch.setattr(measure, "captured", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    found, missing = measure.measure(
        candidates(log, "A", "B"), modes=("forward",), launches=("graphs",), sets=1, rounds=1, device=CPU
    )
    assert missing == {f"{fails}, forward, graphs": "RuntimeError: operation not permitted when stream is capturing"}
    assert ("forward" in found["graphs"]) is timed
    if timed:
        assert list(found["graphs"]["forward"].seconds) == ["A", "ours again"]


def test_who_raises_only_without_gradients_is_named_too():
    a, b = candidates([], "A", "B")
    b.calls["forward"] = lambda _: [][0]
    found, missing = measure.measure([a, b], modes=measure.MODES, launches=("calls",), sets=1, rounds=1, device=CPU)
    assert missing == {"B, forward, calls": "IndexError: list index out of range"}
    assert "B" in found["calls"]["forward+backward"].seconds


def test_ceilings_are_work_over_seconds(monkeypatch):
    monkeypatch.setattr(ceilings, "seconds_of", lambda call, *_: call() is not None and 0.5)
    rates = ceilings.ceilings(torch.float32, CPU)
    assert rates["copy_bytes_per_s"] == 4 * ceilings.COPY_BYTES["cpu"]
    assert rates["matmul_flops"] == 4 * ceilings.MATMUL_SIDE["cpu"] ** 3
    assert rates["exp_per_s"] == 2 * ceilings.EXP_VALUES["cpu"] and rates["peak_flops"] is rates["l2_bytes"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": ("int8",)}, "--dtypes int8 is not one of fp16, bf16, fp32"),
        ({"only": ("jax",)}, f"--peers jax is not one of {KERNEL_PEERS[0]}"),
        ({"launches": ("graphs",)}, "CUDA graphs need a CUDA device"),
        ({"names": ("s1",)}, "--shapes 's1' is not one of"),
    ],
)
def test_wrong_requests_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        bench_kernels(**options, device="cpu")


def test_bars_are_those_of_the_lower_bound_and_of_the_floor_that_binds():
    measured = measure.compare({name: lambda: None for name in ("ours", "official-amp", "sdpa")}, rounds=1)
    measured.pairs["official-amp"] = [(1.0, 10.1)] * 2 + [(1.0, 12.0)] * 2
    # The median is above the bar, the lower bound is not.
    measured.pairs["sdpa"] = [(1.0, 1.7)] * 2 + [(1.0, 2.0)] * 2
    measured.seconds["ours"] = [2.0]
    rates = {"copy_bytes_per_s": 1.0, "exp_per_s": 1.0, "matmul_flops": 1.0}
    floor = Floor(bytes=1, exponentials=1.2, flops=1)
    for shape, ours in (
        (TINY, {"at_least": 0.6, "of": "memory", "reached": False}),
        (replace(TINY, window=(16, 16)), {"at_least": 0.5, "of": "softmax", "reached": True}),
    ):
        bars = kernels._described(measured, "forward", floor, rates, shape, has_bars=True)["bars"]
        assert bars["ours"] == ours
        assert bars["official-amp"] == {"at_least": 10, "reached": True}
        assert bars["sdpa"] == {"at_least": 1.8, "reached": False}
    assert kernels._described(measured, "forward", floor, rates, TINY, has_bars=False)["bars"] == {}
