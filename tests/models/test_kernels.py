"""Whole models with Triton kernels, under its interpreter, and with torch: the same logits, loss and gradients."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from swin_scale.errors import UserError
from swin_scale.models import create_model
from tests.kernels.interpreter import interpreted  # noqa: F401

V1, V2, MOE1, MOE2, MLP = (
    f"{family}_nano_patch4_window4_32" for family in ("swin", "swinv2", "swin_moe", "swinv2_moe", "swin_mlp")
)
NOISE = {"drop_path_rate": 0.4, "attn_drop_rate": 0.2, "drop_rate": 0.1}
WINDOW_7 = {"img_size": (56, 112), "window_size": 7, "extra_norm_interval": 2}
"""Windows of 49 tokens, which fill no tile, on maps of 14 x 28 and 7 x 14."""
ONE_STAGE = {"depths": (2,), "num_heads": (2,)}


def proof(*values):
    return pytest.param(*values, marks=pytest.mark.proof)


def build(name, kernels, dtype=torch.float32, **options):
    """The model with weights away from their initial zeros and ones; the same for any `kernels`."""
    model = create_model(name, kernels=kernels, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2 if p.ndim == 1 else 0.05)
    return model.to(dtype)


def images(model, batch=2):
    height, width = (model.variant.img_size,) * 2 if isinstance(model.variant.img_size, int) else model.variant.img_size
    x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(4))
    return x.to(model.head.weight.dtype)


def step(model):
    """Logits, loss and the gradient of every parameter by name, from one seed of all noise."""
    torch.manual_seed(5)
    outputs = model.train()(images(model))
    logits, aux = outputs if isinstance(outputs, tuple) else (outputs, 0.0)
    loss = F.cross_entropy(logits.float(), torch.arange(len(logits))) + aux
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": loss.detach(), **grads}


def far(got, wanted, limit):
    """What differs by more than `limit` of its norm."""
    assert got.keys() == wanted.keys()
    error = {key: ((got[key] - value).norm() / value.norm().clamp(min=1e-12)).item() for key, value in wanted.items()}
    return {key: value for key, value in error.items() if not value <= limit}


class Calls(TorchDispatchMode):
    """Counts calls of our operators by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "swin_scale":
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (V1, NOISE),
        (V2, NOISE),
        proof(MOE1, NOISE),
        (MOE2, NOISE | ONE_STAGE | {"moe_blocks": ((1,),)}),
        proof(MOE2, NOISE),
        (MLP, {"drop_path_rate": 0.4}),
        proof(V1, WINDOW_7),
        (V2, WINDOW_7),
    ],
)
def test_models_agree_in_every_gradient(name, options):
    """With the same drop-path, dropout and attention dropout: both versions draw the same."""
    fused, plain = (build(name, kernels, **options) for kernels in ("triton", "reference"))
    with Calls() as calls:
        got = step(fused)
    wanted = step(plain)
    assert far(got, wanted, 1e-5) == {}
    blocks = sum(fused.variant.depths)
    attentions = 0 if name == MLP else blocks
    assert calls.count["fused_window_attention"] == attentions
    assert not calls.count["window_attention"]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", [proof(V1), V2])
def test_models_agree_in_half_precision(name):
    """As far from fp64 as torch is, within a factor: both round alike, in other places."""
    exact = step(build(name, "reference", torch.float64, **ONE_STAGE))
    errors = []
    for kernels in ("triton", "reference"):
        got = {key: value.double() for key, value in step(build(name, kernels, torch.float16, **ONE_STAGE)).items()}
        errors.append(torch.stack([(got[key] - value).norm() / value.norm() for key, value in exact.items()]))
    assert errors[0].mean() <= 1.25 * errors[1].mean() < 0.05
    assert (errors[0] <= 2 * errors[1] + 2e-3).all()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        (V2, "selective", ONE_STAGE),
        *(proof(name, mode, {}) for name in (V1, V2, MOE2) for mode in ("block", "selective")),
    ],
)
def test_checkpointing_changes_no_bit_and_keeps_what_attention_gave(name, mode, options):
    """Nothing is lost by recomputing, and under `selective` no attention runs forward a second time."""
    plain = build(name, "triton", **NOISE, **options)
    wanted, blocks = step(plain), sum(plain.variant.depths)
    with Calls() as calls:
        got = step(build(name, "triton", activation_checkpointing=mode, **NOISE, **options))
    assert all(torch.equal(got[key], value) for key, value in wanted.items())
    assert calls.count["fused_window_attention"] == (2 * blocks if mode == "block" else blocks)
    assert calls.count["fused_window_attention_backward"] == blocks


@pytest.mark.usefixtures("interpreted")
def test_models_agree_without_gradients():
    fused, plain = (build(V2, kernels, **ONE_STAGE).eval() for kernels in ("triton", "reference"))
    with torch.inference_mode():
        assert torch.allclose(fused(images(fused)), plain(images(plain)), rtol=1e-5, atol=1e-5)


def test_triton_is_refused_where_it_cannot_serve():
    model = build(V2, "triton")
    with pytest.raises(UserError, match=r"engine.kernels is triton, but there is no CUDA device.*engine.kernels=auto"):
        model(images(model))


@pytest.mark.parametrize(
    ("name", "mode", "backend"),
    [
        (V2, "off", "eager"),
        (V1, "selective", "eager"),
        *(proof(name, mode, "aot_eager") for name in (V1, V2, MLP) for mode in ("off", "selective")),
    ],
)
def test_dense_models_compile_without_a_break(name, mode, backend):
    torch.compiler.reset()
    options = {"activation_checkpointing": mode}
    model, plain = build(name, "auto", **options), build(name, "auto", **options)
    model.compile(fullgraph=True, backend=backend)
    assert far(step(model), step(plain), 1e-5) == {}
    with torch.no_grad():
        assert torch.allclose(model.eval()(images(model)), plain.eval()(images(plain)), atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("error:Dynamo detected a call")
@pytest.mark.parametrize(("name", "backend"), [(V2, "eager"), proof(V1, "aot_eager"), proof(V2, "aot_eager")])
def test_kernels_compile_without_a_break(name, backend):
    torch.compiler.reset()
    model, plain = (build(name, "triton", **NOISE, **ONE_STAGE) for _ in range(2))
    model.compile(fullgraph=True, backend=backend)
    assert far(step(model), step(plain), 1e-6) == {}
