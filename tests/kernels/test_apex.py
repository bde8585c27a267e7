"""NVIDIA Apex found, told from its namesake, named in messages, and computing LayerNorms: beside stand-ins for both."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from swin_scale.errors import UserError
from swin_scale.kernels import ops
from swin_scale.kernels.apex import layer_norm, require_apex, why_not_apex
from swin_scale.models import create_model
from tests.standins import NVIDIA, WEB, forget_apex


@pytest.fixture
def beside(monkeypatch):
    """beside(directory): its packages can be imported during the test, and are forgotten after it."""
    yield lambda directory: monkeypatch.syspath_prepend(str(directory))
    forget_apex()


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("part", ["normalization", "optimizers"])
def test_missing(part, gpu):
    reason = why_not_apex(part)
    assert "not installed" in reason and "not on PyPI" in reason and "https://github.com/NVIDIA/apex" in reason


def test_a_checkout_is_no_installation(beside, gpu, tmp_path):
    (tmp_path / "apex" / "apex" / "normalization").mkdir(parents=True)
    beside(tmp_path)
    assert "not installed" in why_not_apex()


@pytest.mark.parametrize("part", ["normalization", "optimizers"])
def test_the_namesake_is_named_and_not_run(part, beside, gpu):
    beside(WEB)
    reason = why_not_apex(part)
    assert str(WEB) in reason and "web toolkit" in reason and "pip uninstall apex" in reason
    assert "apex" not in sys.modules
    with pytest.raises(
        UserError, match=r"engine\.layer_norm is apex, but .* web toolkit .* set engine\.layer_norm=torch"
    ):
        require_apex(part, key="engine.layer_norm", value="apex", instead="torch")


@pytest.mark.parametrize(("part", "extension"), [("normalization", "fused_layer_norm_cuda"), ("optimizers", "amp_C")])
def test_built_without_extensions(part, extension, beside, gpu, tmp_path):
    """What `pip install .` gives in a checkout of Apex: Python files only."""
    (tmp_path / "apex").symlink_to(NVIDIA / "apex")
    beside(tmp_path)
    assert f"built without {extension}" in why_not_apex(part)


def test_built_for_another_torch(beside, gpu, tmp_path):
    (tmp_path / "apex").symlink_to(NVIDIA / "apex")
    (tmp_path / "amp_C.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    beside(tmp_path)
    assert why_not_apex("optimizers") is None
    with pytest.raises(UserError, match=r"optim\.name is apex_fused_adam, but NVIDIA Apex does not load \(undefined"):
        require_apex("optimizers", key="optim.name", value="apex_fused_adam", instead="adamw")


def test_found(beside, gpu, monkeypatch):
    beside(NVIDIA)
    assert why_not_apex("normalization") is None and why_not_apex("optimizers") is None
    assert "apex" not in sys.modules
    require_apex("optimizers", key="optim.name", value="apex_fused_lamb", instead="adamw")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA devices only" in why_not_apex()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layer_norm_has_the_dtype_of_its_input(dtype, beside):
    """Weights of another dtype are cast, which Apex's kernel does not do."""
    beside(NVIDIA)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 24, generator=generator).to(dtype)
    weight, bias = torch.rand(2, 24, generator=generator)
    y = layer_norm(x, weight, bias, 1e-3)
    assert y.dtype == dtype
    expected = F.layer_norm(x.double(), (24,), weight.to(dtype).double(), bias.to(dtype).double(), 1e-3)
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("name", "norms"),
    [
        # Per block two and per merging one; those of the patch embedding, the main branch and the end.
        ("swin_nano_patch4_window4_32", 4 * 2 + 1 + 2),
        ("swinv2_nano_patch4_window4_32", 4 * 2 + 1 + 2 + 4),
        ("swin_moe_nano_patch4_window4_32", 4 * 2 + 1 + 2),
        ("swin_mlp_nano_patch4_window4_32", 4 * 2 + 1 + 2),
    ],
)
def test_every_norm_of_a_model_without_triton(name, norms, dtype, beside, monkeypatch):
    """Same names, values and gradients; where kernels of ours do not serve, Apex's serve all."""
    beside(NVIDIA)
    fused = importlib.import_module("apex.normalization.fused_layer_norm")
    calls = []
    compute = fused.fused_layer_norm_affine
    monkeypatch.setattr(fused, "fused_layer_norm_affine", lambda *a: (calls.append(a[3]), compute(*a))[1])
    extra = {"extra_norm_interval": 1} if "swinv2" in name else {}
    plain = create_model(name, **extra).to(dtype).eval()
    ours = create_model(name, layer_norm="apex", kernels="reference", **extra).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    ours.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=generator).to(dtype)
    results = []
    for model in (plain, ours):
        out = model(images)
        logits = out[0] if isinstance(out, tuple) else out
        results.append((logits, torch.autograd.grad(logits.float().square().sum(), model.norm.weight)[0]))
    assert len(calls) == norms
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_triton_comes_before_apex(beside, monkeypatch):
    """A fused residual norm reads the branch once where Apex's LayerNorm and the sum read and write it twice."""
    beside(NVIDIA)
    monkeypatch.setattr(ops, "use_triton", lambda *a, **k: True)
    monkeypatch.setitem(
        sys.modules, "swin_scale.kernels.norms", SimpleNamespace(fused_residual_norm=lambda *a: "fused")
    )
    x = torch.ones(2, 3, 8)
    assert ops.residual_norm(x, x, x[0, 0], x[0, 0], by="apex") == "fused"
    assert "apex" not in sys.modules
