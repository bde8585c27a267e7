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
