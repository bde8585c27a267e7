import subprocess
import sys

import torch

from swin_scale.models import layers


def test_mlp_in_pieces_equals_the_mlp_at_once(monkeypatch):
    mlp = layers.Mlp(6, 24, 0.0).double()
    for p in mlp.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)

    def run():
        y = mlp(x)
        return [y, *torch.autograd.grad(y.sin().sum(), [x, *mlp.parameters()])]

    at_once = run()
    monkeypatch.setattr(layers, "MLP_PIECE", 7 * 24)
    for a, b in zip(run(), at_once, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_residual_with_drop_path_zero_or_in_eval_is_the_sum():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(layers.residual(x, y, 0.0, True), x + y)
    assert torch.equal(layers.residual(x, y, 0.9, False), x + y)


def test_a_model_on_the_meta_device_is_built_without_torchs_compiler():
    """Its import takes seconds, in every process that only wants names and shapes."""
    program = "import sys, torch\nfrom swin_scale.models import create_model\n"
    program += f"with torch.device('meta'): create_model({'swinv2_nano_patch4_window4_32'!r})\n"
    program += "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
