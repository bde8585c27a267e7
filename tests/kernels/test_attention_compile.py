"""Kernels of window attention, compiled ahead of time for chips that need not be here: A100, H100 and H200, B200.

Each must keep to its registers and the chip's shared memory, multiply fp32 in full precision and address activations
with 64 bits. Host code runs on tensors of the meta device for it, so it neither waits for the device nor allocates by
data: what CUDA graphs need.
"""

import re
from dataclasses import dataclass, replace

import pytest
import torch

from swin_scale.kernels import attention, tuning
from swin_scale.models.geometry import stages
from swin_scale.models.variants import list_models, variant
from tests.kernels import aot

CHIPS = {
    80: tuning.Chip("NVIDIA A100-SXM4-80GB", processors=108, l2_bytes=40 << 20),
    90: tuning.Chip("NVIDIA H200", processors=132, l2_bytes=50 << 20),
    100: tuning.Chip("NVIDIA B200", processors=148, l2_bytes=126 << 20),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """What tells one attention of a model from another, once compiled."""

    window: tuple[int, int]
    shifted: bool
    head_dim: int
    cosine: bool
    dropout: float = 0.0


def model_table():
    """Every distinct attention of every model there is a name for."""
    cases = set()
    for name in list_models():
        v = variant(name)
        if v.family == "swin_mlp":
            continue
        for stage in stages(v):
            for shifted in {False, any(stage.shift_size) and stage.depth > 1}:
                cosine = v.family in ("swinv2", "swinv2_moe")
                cases.add(Case(stage.window_size, shifted, stage.dim // stage.heads, cosine))
    return sorted(cases, key=repr)


def launches(case, dtype, capability, monkeypatch):
    """(forward, backward) launches of an attention of that kind with three heads on a map of 2 x 2 windows."""
    from swin_scale.kernels import attention_backward, attention_forward, attention_gradients

    monkeypatch.setattr(tuning, "chip_of", lambda device: CHIPS[capability])
    heads, N = 3, case.window[0] * case.window[1]
    with torch.device("meta"):
        qkv = torch.empty(2, 2 * case.window[0], 2 * case.window[1], 3 * heads * case.head_dim, dtype=dtype)
        scale, bias = torch.empty(heads, 1, 1), torch.empty(heads, N, N)
        seed = torch.empty((), dtype=torch.int64) if case.dropout else None
    shift = [side // 2 for side in case.window] if case.shifted else [0, 0]
    rest = list(case.window), shift, case.cosine, case.dropout, seed
    out, log_sum = attention.empty_outputs(qkv, bias)
    with aot.recording(attention_forward) as forward:
        attention.launch_forward(qkv, scale, bias, out, log_sum, *rest)
    with aot.recording(attention_gradients) as backward:
        attention_backward.launch(out, qkv, scale, bias, out, log_sum, *rest)
    return forward, backward


def judge(call, case, dtype, capability, done):
    """Compile a launch unless the same code was; print its figures, and keep them in `done`; what is wrong with it."""
    if call.key() in done:
        return []
    figures = aot.compile_call(call, capability)
    name = f"{call.kernel.__name__} {case.window[0]}x{case.window[1]} d={case.head_dim} {dtype} sm_{capability}"
    print(f"{name}: {figures.registers} registers, {figures.shared} B shared")  # noqa: T201
    done[call.key()] = figures
    return [f"{name}: {problem}" for problem in (*figures.problems(capability), *narrow(figures))]


def narrow(figures):
    """Addresses of half-precision tiles, which are the activations, that are computed with 32 bits."""
    offsets = re.findall(r"tt\.addptr .*: tensor<\d+x\d+x!tt\.ptr<b?f16>>, tensor<\d+x\d+x(i\d+)>", figures.ttir)
    return ["32-bit addresses"] if "i32" in offsets else []


CHOSEN = [
    (Case((8, 8), True, 32, True), "fp16", 90),
    (Case((7, 7), False, 32, False), "fp32", 80),
    (Case((24, 24), False, 32, True), "bf16", 100),
    (Case((12, 12), True, 32, True), "fp32", 90),
]


@pytest.mark.parametrize(("case", "dtype", "capability"), CHOSEN, ids=lambda value: getattr(value, "window", value))
def test_chosen_kernels_fit(case, dtype, capability, monkeypatch):
    with aot.compiling():
        forward, backward = launches(case, DTYPES[dtype], capability, monkeypatch)
        done = {}
        assert [p for call in (*forward, *backward) for p in judge(call, case, dtype, capability, done)] == []


@pytest.mark.proof
@pytest.mark.long
@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", aot.TARGETS)
def test_kernels_of_every_model_fit(capability, dtype, direction, monkeypatch):
    table = model_table()
    assert {case.window[0] for case in table} == {4, 6, 7, 8, 12, 16, 24}
    problems, done = [], {}
    with aot.compiling():
        for case in table:
            for call in launches(case, DTYPES[dtype], capability, monkeypatch)[direction]:
                problems += judge(call, case, dtype, capability, done)
    assert problems == []
    print(aot.summary(f"attention {('forward', 'backward')[direction]} {dtype}", capability, done.values()))  # noqa: T201


@pytest.mark.proof
@pytest.mark.long
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(16, "fp32"), (32, "fp16"), (48, "fp16"), (64, "fp32"), (96, "fp16"), (128, "fp16")]
)
def test_forward_of_heads_of_any_width_and_dropout_fit(head_dim, dtype, monkeypatch):
    """Not fp32 heads of more than 64 channels in windows that are one tile: those spill on some chips."""
    problems, done = [], {}
    with aot.compiling():
        for case in (Case((8, 8), True, head_dim, True, 0.1), Case((12, 12), True, head_dim, True)):
            for call in launches(case, DTYPES[dtype], 80, monkeypatch)[0]:
                problems += judge(call, case, dtype, 80, done)
    assert problems == []


def test_spills_are_seen(monkeypatch):
    """The kernel of 8 x 8 windows in half the registers it wants."""
    with aot.compiling():
        (call,), _ = launches(CHOSEN[0][0], torch.float16, 90, monkeypatch)
        squeezed = replace(call, options=dict(call.options) | {"maxnreg": 64})
        assert any("spills" in problem for problem in aot.compile_call(squeezed, 90).problems(90))


def test_tf32_and_large_tiles_are_seen():
    with aot.compiling():
        import triton
        import triton.language as tl

        @triton.jit
        def product(x, PRECISION: tl.constexpr):
            at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
            tile = tl.load(x + at)
            tl.store(x + at, tl.dot(tile, tile, input_precision=PRECISION))

        kinds = {"x": "*fp32", "PRECISION": "constexpr"}
        exact, rounded = (
            aot.compile_kernel(product, kinds, {"PRECISION": precision}, 80) for precision in ("ieee", "tf32")
        )
    assert exact.problems(80) == []
    assert rounded.problems(80) == ["dots in TF32"]
    assert replace(exact, shared=200 << 10).problems(90) == []
    assert "shared memory" in replace(exact, shared=200 << 10).problems(80)[0]
