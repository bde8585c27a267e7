import subprocess
import sys

import pytest
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
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize("window", [(1, 1), (3, 2), (4, 4), (2, 7)])
def test_the_gradient_of_spread_offsets_is_that_of_a_gather(window):
    """On a GPU it is summed by shearing, in a fixed order."""
    index = layers.relative_position_index(window)
    table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), 3, dtype=torch.float64, requires_grad=True)
    expected, got = layers.spread_offsets(table, index, window), layers._SpreadOffsets.apply(table, index, window)
    assert torch.equal(got, expected)
    weight = torch.randn_like(expected)
    [wanted], [grad] = (torch.autograd.grad(bias, table, weight) for bias in (expected, got))
    assert torch.allclose(grad, wanted, rtol=1e-12, atol=1e-12)


def test_drop_path_keep_is_wide_and_scaled():
    torch.manual_seed(0)
    keep = layers.drop_path_keep(torch.empty(4000, 2, dtype=torch.float16), 0.75, True)
    assert keep.dtype == torch.float32 and keep.shape == (4000,)
    assert set(keep.tolist()) == {0.0, 4.0} and abs(keep.mean() - 1) < 0.15
    assert layers.drop_path_keep(keep, 0.0, True) is None and layers.drop_path_keep(keep, 0.5, False) is None


def test_post_norm_without_a_residual_is_the_norm_alone():
    norm = layers.PostNorm(6)
    torch.nn.init.normal_(norm.weight)
    x, branch, keep = torch.randn(2, 3, 6), torch.randn(2, 3, 6), torch.tensor([0.0, 2.0])
    alone = torch.nn.functional.layer_norm(branch, (6,), norm.weight, norm.bias)
    assert torch.equal(norm(branch), alone)
    assert torch.allclose(norm(branch, x, keep), x + keep.view(2, 1, 1) * alone)
