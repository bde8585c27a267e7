"""The fused kernels on a GPU: against fp64, bit for bit again, under graphs and the compiler, and their memory."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from swin_scale import kernels
from swin_scale.bench.kernel_peers import build
from swin_scale.bench.measure import captured, peak_bytes
from swin_scale.bench.model_gate import randomise
from swin_scale.bench.region import Shape, draw
from swin_scale.kernels import reference
from swin_scale.kernels.attention import fused_window_attention
from swin_scale.models import create_model

pytestmark = pytest.mark.gpu

ALL = (torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16,)

# (height, width) of map, window and shift; heads, channels of one; score. Odd window counts, H != W, N of no tile size.
CASES = {
    "w4": ((8, 12), (4, 4), (2, 2), 3, 32, "cosine"),
    "w6, one window": ((6, 6), (6, 6), (0, 0), 3, 32, "cosine"),
    "w7": ((14, 21), (7, 7), (3, 3), 3, 32, "cosine"),
    "w8": ((24, 16), (8, 8), (4, 4), 3, 32, "cosine"),
    "w8, unshifted": ((24, 16), (8, 8), (0, 0), 3, 32, "cosine"),
    "w12": ((24, 36), (12, 12), (6, 6), 2, 32, "cosine"),
    "w16": ((32, 48), (16, 16), (8, 8), 2, 32, "cosine"),
    "w24": ((48, 24), (24, 24), (12, 0), 2, 32, "cosine"),
    "w32": ((32, 64), (32, 32), (0, 16), 1, 32, "cosine"),
    "6 x 10": ((12, 30), (6, 10), (3, 5), 2, 32, "cosine"),
    "w7, V1": ((14, 21), (7, 7), (3, 3), 3, 32, "dot"),
    "w12, V1": ((24, 36), (12, 12), (6, 6), 2, 32, "dot"),
    "16 channels": ((16, 16), (8, 8), (4, 4), 2, 16, "cosine"),
    "88 channels": ((16, 16), (8, 8), (4, 4), 2, 88, "cosine"),
    "128 channels": ((24, 24), (12, 12), (6, 6), 1, 128, "dot"),
}
IN_ALL_DTYPES = ("w8", "w12", "w24")
GRID = [(name, dtype) for name in CASES for dtype in (ALL if name in IN_ALL_DTYPES else HALF)]


@pytest.fixture
def device():
    return "cuda"


@pytest.fixture(autouse=True)
def fp32_is_fp32():
    """torch's products too: they are what ours is judged by."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def attention_inputs(name, dtype, device, batch=2, sharp=1.0):
    """qkv, scale and bias whose values `dtype` holds exactly, an upstream gradient, and the rest of the arguments."""
    hw, window, shift, heads, d, score = CASES[name]
    N = window[0] * window[1]
    generator = torch.Generator().manual_seed(0)
    qkv, upstream = (torch.randn(batch, *hw, n * heads * d, generator=generator) for n in (3, 1))
    spread = torch.rand(heads, 1, 1, generator=generator)
    scale = sharp * 30 * spread if score == "cosine" else torch.full((heads, 1, 1), d**-0.5)
    bias = 16 * torch.randn(heads, N, N, generator=generator).sigmoid()
    tensors = [part.to(dtype) for part in (qkv, scale, bias)]
    return [part.to(device) for part in tensors], upstream.to(device, dtype), (window, shift, score == "cosine")


def outcome(function, inputs, upstream):
    """Output and gradients of function(*inputs)."""
    leaves = [part.detach().clone().requires_grad_() for part in inputs]
    y = function(*leaves)
    outputs = y if isinstance(y, tuple) else (y,)
    upstream = upstream if isinstance(upstream, tuple) else (upstream,)
    return [part.detach() for part in (*outputs, *torch.autograd.grad(outputs, leaves, upstream))]


def assert_at_most_twice(ours, torchs, exact):
    """Errors of ours against those of torch."""
    for number, (a, b, e) in enumerate(zip(ours, torchs, exact, strict=True)):
        mine, theirs = (float((part.double() - e).norm()) for part in (a, b))
        assert mine <= 2 * theirs, (number, mine, theirs, float(e.norm()))


def check_attention(name, dtype, device, *, dropout=0.0, sharp=1.0, deterministic=True):
    """Raises unless output and gradients err at most twice as much as torch's.

    The gradient of the scale is one number a head, a sum of many terms of either sign, in which luck decides: it gets
    twice two standard deviations of torch's error, known from the errors of its addends, one for each row of logits.
    """
    (qkv, scale, bias), upstream, rest = attention_inputs(name, dtype, device, sharp=sharp)
    noise = {"dropout": dropout, "seed": torch.tensor(1234567890123, device=device) if dropout else None}
    fused = partial(_attend, fused_window_attention, rest, {**noise, "deterministic": deterministic})
    torchs = partial(_attend, reference.window_attention, rest, noise)
    heads, N, _ = bias.shape
    rows = scale.expand(qkv[..., 0].numel() // N, heads, N, 1)
    # Ours computes scale and bias in fp32, torch's version in the dtype; their values are the same.
    ours = outcome(fused, (qkv, scale.float(), bias.float()), upstream)
    own = outcome(torchs, (qkv, rows, bias), upstream)
    exact = outcome(torchs, (qkv.double(), rows.double(), bias.double()), upstream.double())
    assert ours[0].dtype == ours[1].dtype == dtype and ours[2].dtype == ours[3].dtype == torch.float32
    assert_at_most_twice(*([found[i] for i in (0, 1, 3)] for found in (ours, own, exact)))
    spread = (own[2].double() - exact[2]).square().sum((0, 2)).sqrt().view(scale.shape)
    assert ((ours[2] - exact[2].sum((0, 2)).view(scale.shape)).abs() <= 4 * spread).all()


def _attend(function, rest, options, qkv, scale, bias):
    return function(qkv, scale, bias, *rest, **options)


@pytest.mark.parametrize(("name", "dtype"), GRID, ids=str)
def test_attention_and_its_gradients_are_as_exact_as_torchs(name, dtype, device):
    check_attention(name, dtype, device)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("name", ["w8", "w12"])
def test_attention_at_the_largest_scale(name, dtype, device):
    check_attention(name, dtype, device, sharp=100 / 30)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize("name", ["w7", "w12"])
def test_rows_without_a_direction_have_no_gradient(name, dtype, limit, device):
    (qkv, scale, bias), upstream, rest = attention_inputs(name, dtype, device)
    qkv[0, 0, 0], qkv[-1, -1, -1] = 0.0, 1e-8
    ours = outcome(partial(_attend, fused_window_attention, rest, {}), (qkv, scale.float(), bias.float()), upstream)
    exact = outcome(
        partial(_attend, reference.window_attention, rest, {}),
        [p.double() for p in (qkv, scale, bias)],
        upstream.double(),
    )
    for a, e in zip(ours, exact, strict=True):
        assert (a.double() - e).norm() <= limit * e.norm()
    d_q_and_k = ours[1][..., : 2 * upstream.shape[-1]]
    assert not d_q_and_k[0, 0, 0].any() and not d_q_and_k[-1, -1, -1].any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["w7", "w12", "6 x 10"])
def test_dropout_drops_what_the_reference_drops(name, dtype, device):
    check_attention(name, dtype, device, dropout=0.3)


@pytest.mark.parametrize("name", ["w8", "w16"])
def test_atomic_sums_of_the_bias_are_as_exact(name, device):
    check_attention(name, torch.float16, device, deterministic=False)


@pytest.mark.parametrize("name", ["w8", "w12", "w24"])
def test_gradients_are_the_same_bits_over_ten_runs(name, device):
    (qkv, scale, bias), upstream, rest = attention_inputs(name, torch.float16, device, batch=16)
    results = [
        outcome(partial(_attend, fused_window_attention, rest, {}), (qkv, scale.float(), bias.float()), upstream)
        for _ in range(10)
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# -- norms, merging, token moves ---------------------------------------------------------------------------------------


def _norm(op, C, dtype, device):
    generator = torch.Generator().manual_seed(0)
    maps = 1 if op == "patch_merge" else 2
    channels = 4 * C if op == "patch_merge" else C
    inputs = [torch.randn(3, 8, 6, C, generator=generator) for _ in range(maps)]
    inputs += [torch.randn(channels, generator=generator) for _ in range(2)]
    return [part.to(device, dtype) for part in inputs]


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("C", [96, 352])
@pytest.mark.parametrize("op", ["residual_norm", "add_norm", "patch_merge"])
def test_norms_and_their_gradients_are_as_exact_as_torchs(op, C, dtype, device):
    inputs = _norm(op, C, dtype, device)
    keep = () if op == "patch_merge" else (torch.tensor([1.25, 0.0, 1.25], device=device),)

    def fused(*leaves):
        return getattr(kernels, op)(*leaves, *keep, kernels="triton")

    def definition(*leaves):
        return getattr(reference, op)(*leaves, *keep)

    with torch.no_grad():
        outputs = definition(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    upstream = tuple(torch.randn(y.shape, generator=generator).to(device, dtype) for y in outputs)
    exact = outcome(definition, [part.double() for part in inputs], tuple(part.double() for part in upstream))
    assert_at_most_twice(outcome(fused, inputs, upstream), outcome(definition, inputs, upstream), exact)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
def test_tokens_go_to_their_experts_and_back(top_k, dtype, device):
    T, D, E = 300, 96, 8
    generator = torch.Generator().manual_seed(0)
    expert = torch.rand(T, E, generator=generator).topk(top_k).indices.flatten()
    # Every seventh choice is dropped: -1, and no row.
    kept = torch.arange(T * top_k) % 7 != 0
    choice = expert.argsort(stable=True)
    choice = choice[kept[choice]]
    slot = torch.full((T * top_k,), -1).scatter_(0, choice, torch.arange(len(choice))).view(T, top_k)
    choice, slot = choice.to(device), slot.to(device)
    x = torch.randn(T, D, generator=generator).to(device, dtype)
    y = torch.randn(len(choice), D, generator=generator).to(device, dtype)
    gate = torch.rand(T, top_k, generator=generator).to(device)
    rows, sums = (torch.randn(n, D, generator=generator).to(device) for n in (len(choice), T))
    cases = [
        (lambda of, more: lambda x: of.permute(x, choice, slot, **more), (x,), rows.to(dtype)),
        (lambda of, more: lambda y, gate: of.unpermute(y, gate, choice, slot, **more), (y, gate), sums),
    ]
    for function, inputs, upstream in cases:
        exact = outcome(function(reference, {}), [part.double() for part in inputs], upstream.double())
        torchs = outcome(function(reference, {}), inputs, upstream)
        assert_at_most_twice(outcome(function(kernels, {"kernels": "triton"}), inputs, upstream), torchs, exact)


# -- graphs, the compiler, memory, whole models ------------------------------------------------------------------------


def test_a_captured_graph_computes_what_calls_do():
    (qkv, scale, bias), upstream, rest = attention_inputs("w12", torch.float16, "cuda")
    leaves = [part.requires_grad_() for part in (qkv, scale.float(), bias.float())]
    y = torch.empty_like(upstream)
    grads = [torch.empty_like(leaf) for leaf in leaves]

    def step():
        out = fused_window_attention(*leaves, *rest)
        y.copy_(out.detach())
        for kept, found in zip(grads, torch.autograd.grad(out, leaves, upstream)):
            kept.copy_(found)

    replay = captured(step)
    # Other values in the same place: a graph reads memory, not what was there when it was made.
    with torch.no_grad():
        qkv.copy_(qkv.flip(0)).mul_(0.5)
    replay()
    replayed = [part.clone() for part in (y, *grads)]
    step()
    assert all(torch.equal(a, b) for a, b in zip(replayed, (y, *grads)))


def check_compiled(device, dtype, backend):
    (qkv, scale, bias), upstream, rest = attention_inputs("w8", dtype, device)
    generator = torch.Generator().manual_seed(1)
    weight, offset = (torch.randn(qkv.shape[-1] // 3, generator=generator).to(device, dtype) for _ in range(2))

    def block(qkv, scale, bias, weight, offset):
        y = kernels.window_attention(qkv, scale, bias, *rest, kernels="triton")
        return kernels.residual_norm(2 * y, y, weight, offset, kernels="triton")

    inputs = (qkv, scale.float(), bias.float(), weight, offset)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    eager, found = outcome(block, inputs, upstream), outcome(compiled, inputs, upstream)
    # The additions of two gradients may be rounded once less when they are fused.
    for a, b in zip(found, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * float(b.abs().max()))


def test_the_compiler_takes_the_ops_without_a_break(device):
    check_compiled(device, torch.float16, "inductor")


SMALL = {"embed_dim": 64, "depths": (2, 2, 1), "num_heads": (2, 4, 8), "num_classes": 11, "drop_path_rate": 0.0}
MODELS = {
    "swinv2_nano_patch4_window4_32": {**SMALL, "img_size": 96, "window_size": 12},
    "swin_nano_patch4_window4_32": {**SMALL, "img_size": 112, "window_size": 7},
}


def model_outcome(model, x, labels):
    logits = model(x)
    F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels).backward()
    grads = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    return [logits.detach().double(), grads]


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_kernels_is_as_exact_as_one_without(name, dtype, device):
    values = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, values["img_size"], values["img_size"], generator=generator).to(device, dtype)
    labels = torch.tensor([3, 7], device=device)

    def run(mode, dtype):
        model = randomise(create_model(name, **values, kernels=mode)).to(device, dtype).train()
        return model_outcome(model, x.to(dtype), labels)

    exact, torchs, ours = run("reference", torch.float64), run("reference", dtype), run("triton", dtype)
    for a, b, e in zip(ours, torchs, exact, strict=True):
        assert (a - e).norm() <= 2 * (b - e).norm()


@pytest.mark.parametrize(("window", "share"), [(16, 1 / 8), (24, 1 / 20)])
def test_memory_of_forward_and_backward_is_a_small_part_of_the_official_chains(window, share, record_property):
    side = 4 * window
    shape = Shape(name="memory", hw=(side, side), dim=96, heads=3, window=(window,) * 2, shift=(window // 2,) * 2)
    device = torch.device("cuda")
    inputs = draw(shape, 16, torch.float16, device, 0)
    found, _ = build(shape, torch.float16, device, only=("official-amp",))
    peaks = {}
    for region in found:
        call = partial(region.gradients, region.leaves(inputs), inputs.upstream)
        call()
        peaks[region.name] = peak_bytes(call, device)
    record_property(f"memory share, window {window}", peaks["ours"] / peaks["official-amp"])
    assert peaks["ours"] <= share * peaks["official-amp"], peaks
