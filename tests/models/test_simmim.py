"""SimMIM against golden numbers of the official code, and what follows from its definition."""

import pytest
import torch

from swin_scale import create_simmim
from swin_scale.errors import UserError
from swin_scale.models.simmim import local_moments, standardised
from tests.kernels.interpreter import interpreted  # noqa: F401
from tests.models.golden import fill, image

SMALL = {"img_size": 64, "embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 4}
NAMES = {"v1": "swin_tiny_patch4_window7_224", "v2": "swinv2_tiny_patch4_window8_256"}


def checkered() -> torch.Tensor:
    """Cells of 8 x 8 tokens, hidden like the dark squares of a chess board; the same for two images."""
    row = torch.arange(16) // 8
    return ((row[:, None] + row) % 2 == 0).long().expand(2, 16, 16)


@pytest.mark.parametrize(
    ("family", "norm_target", "wanted"),
    [("v1", None, 0.93246085), ("v2", None, 0.91486635), ("v1", 47, 1.15243673), ("v2", 47, 1.13907236)],
)
def test_golden_losses(family, norm_target, wanted):
    model = fill(create_simmim(NAMES[family], norm_target=norm_target, drop_path_rate=0.0, **SMALL))
    assert model(image(2, 3, 64, 64), checkered()).item() == pytest.approx(wanted, abs=1e-7)


def test_golden_targets():
    target = standardised(image(2, 3, 64, 64), 47)
    assert target.mean().item() == pytest.approx(-0.0017348, abs=1e-6)
    assert target.std().item() == pytest.approx(1.0003422, abs=1e-6)
    first = torch.tensor([1.410959, -1.613931, 0.142195, -0.501559, -0.220848], dtype=torch.float64)
    assert torch.allclose(target.flatten()[:5], first, rtol=0, atol=1e-6)


def test_moments_are_those_of_the_neighbourhood_cut_at_the_border():
    x = image(1, 2, 9, 7)
    mean, variance = local_moments(x, 5)
    for row, column in ((0, 0), (4, 3), (8, 6), (1, 5)):
        near = x[..., max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3].flatten(2)
        assert torch.allclose(mean[..., row, column], near.mean(2), atol=1e-12)
        assert torch.allclose(variance[..., row, column], near.var(2), atol=1e-12)


@pytest.mark.parametrize("name", NAMES.values())
def test_hidden_pixels_are_not_seen_and_seen_ones_are_not_asked_for(name):
    model = fill(create_simmim(name, drop_path_rate=0.0, **SMALL))
    x, mask = image(2, 3, 64, 64), checkered()
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].bool()
    other = torch.where(hidden, image(2, 3, 64, 64, key=5), x)
    assert torch.equal(model.reconstruct(x, mask), model.reconstruct(other, mask))
    assert model(x, mask) != model(other, mask)
    # The loss is that of the drawn pixels under the mask and of no others.
    drawn = model.reconstruct(x, mask)
    wanted = ((drawn - x).abs() * hidden).sum() / (hidden.double().sum() + 1e-5) / 3
    assert model(x, mask).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_losses_of_images_have_the_batch_loss_as_their_mean():
    model = fill(create_simmim(NAMES["v2"], norm_target=47, drop_path_rate=0.0, **SMALL))
    x, mask = image(2, 3, 64, 64), checkered()
    losses, aux = model.losses(x, mask)
    assert aux is None and losses.shape == (2,)
    assert losses.mean().item() == pytest.approx(model(x, mask).item(), rel=1e-7)
    assert losses[1].item() == pytest.approx(model(x[1:], mask[1:]).item(), rel=1e-12)


def test_a_standardised_target_is_drawn_on_the_scale_of_the_image():
    """A decoder that draws the target exactly gives the image back."""
    model = fill(create_simmim(NAMES["v2"], norm_target=47, drop_path_rate=0.0, **SMALL))
    x = image(2, 3, 64, 64)
    model.decoder.forward = lambda features: standardised(x, 47)
    assert torch.allclose(model.reconstruct(x, checkered()), x, atol=1e-5)
    assert model(x, checkered()).item() == 0


def test_rectangular_images_and_experts():
    """A mixture of experts adds its auxiliary loss; sides need not be equal."""
    model = create_simmim("swin_moe_nano_patch4_window4_32", img_size=(32, 64), mask_patch_size=8)
    mask = torch.zeros(2, 8, 16)
    mask[:, :4] = 1
    loss, aux = model(torch.randn(2, 3, 32, 64), mask)
    assert loss.shape == aux.shape == () and aux > 0
    loss.backward()
    assert model.encoder.mask_token.grad.abs().sum() > 0


def test_parameters_are_those_of_the_official_base_model():
    with torch.device("meta"):
        model = create_simmim("swinv2_base_patch4_window12_192_22k", drop_path_rate=0.1)
    state = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert state["encoder.mask_token"] == (1, 1, 128) and state["decoder.0.weight"] == (3072, 1024, 1, 1)
    assert sum(p.numel() for p in model.decoder.parameters()) == 3_148_800
    assert not any("head" in name for name in state)


def test_weights_follow_the_seed_and_hidden_tokens_start_small():
    first, again, other = (create_simmim(NAMES["v2"], seed=seed, **SMALL) for seed in (1, 1, 2))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not torch.equal(first.encoder.mask_token, other.encoder.mask_token)
    assert 0.005 < first.encoder.mask_token.std() < 0.04


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_target": 46}, "norm_target: 46"),
        ({"mask_patch_size": 48}, "mask_patch_size: 48 .* multiple of 32"),
        ({"num_classes": 10}, "num_classes"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        create_simmim(NAMES["v2"], **SMALL, **options)


def test_a_mask_of_another_size_is_refused():
    model = create_simmim(NAMES["v2"], **SMALL)
    with pytest.raises(UserError, match="one entry for each patch of 4 pixels"):
        model(torch.zeros(2, 3, 64, 64), torch.zeros(2, 8, 8))


V2_NANO = "swinv2_nano_patch4_window4_32"


def gradients(model):
    """The loss and the gradient of every parameter, from one seed of all noise."""
    torch.manual_seed(5)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(64).view(8, 8) // 2 % 2).expand(2, 8, 8)
    loss = model.train()(x, mask, output="losses")
    loss.sum().backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def perturbed(**options):
    """A nano model with weights away from their initial zeros and ones, the same ones for any options."""
    model = create_simmim(V2_NANO, mask_patch_size=8, drop_path_rate=0.4, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2 if p.ndim == 1 else 0.05)
    return model


@pytest.mark.usefixtures("interpreted")
def test_triton_kernels_give_the_same_gradients():
    small = {"depths": (2,), "num_heads": (2,)}
    got, wanted = (gradients(perturbed(kernels=kernels, **small)) for kernels in ("triton", "reference"))
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm().clamp(min=1e-6), name


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_recomputing_changes_no_bit(mode):
    got, wanted = (gradients(perturbed(activation_checkpointing=how)) for how in (mode, "off"))
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_routing_comes_out_by_block_and_only_of_experts():
    model = create_simmim("swin_moe_nano_patch4_window4_32", mask_patch_size=8)
    x, mask = torch.randn(2, 3, 32, 32), torch.ones(2, 8, 8)
    losses, aux, routing = model(x, mask, output="losses", stats=True)
    assert losses.shape == (2,) and aux.shape == () and list(routing) == ["layers.0.blocks.1", "layers.1.blocks.1"]
    assert routing["layers.0.blocks.1"].tokens == 2 * 64
    with pytest.raises(UserError, match="routes nothing"):
        create_simmim(V2_NANO, mask_patch_size=8)(x, mask, stats=True)
