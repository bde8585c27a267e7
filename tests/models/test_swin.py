"""Numbers of the official code, contracts of the public methods, checkpointing, caches, precision."""

import copy

import pytest
import torch
from torch import nn

from swin_scale.errors import UserError
from swin_scale.kernels import shift_mask, shift_regions
from swin_scale.models import create_model
from swin_scale.models.layers import PatchMerging, relative_coords_table, relative_position_index
from swin_scale.models.swin import WindowAttention
from tests.models.golden import fill, image

V1, V2, MLP = (f"{family}_nano_patch4_window4_32" for family in ("swin", "swinv2", "swin_mlp"))
FAMILIES = [V1, V2, MLP]
SMALL = {
    "img_size": 64,
    "num_classes": 10,
    "embed_dim": 16,
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 4, 8),
    "window_size": 4,
}
# Half a unit of the last printed digit, and the 1e-6 that the numbers are promised to.
TOLERANCE = {"rtol": 0, "atol": 1.01e-6}


def assert_golden(y, mean, std, first):
    expected = torch.tensor([mean, std, *first], dtype=torch.float64)
    assert torch.allclose(torch.stack([y.mean(), y.std(), *y.flatten()[: len(first)]]), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "overrides", "mean", "std", "first"),
    [
        (V1, {}, 0.3496198, 0.7212162, (1.450262, -0.227147, -0.000897, 1.030464, 0.648347)),
        (
            V1,
            {"ape": True, "patch_norm": False},
            *(0.5042000, 0.8861046, (2.284642, 0.217927, 0.592217, 1.297441, 0.648361)),
        ),
        (
            V1,
            {"img_size": 224, "window_size": 7},
            0.3928367,
            0.6589979,
            (1.521108, -0.730814, 0.714108, 1.144777, 0.205564),
        ),
        (V2, {}, 0.3529919, 0.6610727, (1.972796, 0.452208, 0.353937, 1.104572, 0.018949)),
        (
            V2,
            {"pretrained_window_sizes": (3, 3, 3, 2)},
            *(0.4086796, 0.5251282, (0.988599, 0.401568, 0.159316, 0.561400, 0.029497)),
        ),
        (MLP, {}, -0.0156229, 0.5717119, (0.668131, 0.068541, 0.109839, 0.169885, 0.263849)),
    ],
)
def test_golden_logits(name, overrides, mean, std, first):
    options = SMALL | overrides
    size = options["img_size"]
    model = fill(create_model(name, **options))
    assert_golden(model(image(2 if size == 64 else 1, 3, size, size)), mean, std, first)


def test_golden_pooled_features():
    model = fill(create_model(V2, **SMALL))
    pooled = model.forward_pooled(image(2, 3, 64, 64))
    assert pooled.shape == (2, 128)
    assert_golden(pooled, -0.0085660, 0.9346936, (0.098120, -0.498169, 0.558196, 0.681808, 0.447364))


@pytest.mark.parametrize(
    ("score", "position", "mean", "std", "first"),
    [
        ("cosine", "sigmoid_cpb", -0.0101254, 0.1179745, (0.281029, 0.008079, 0.121431)),
        ("dot", "table", 0.0114943, 0.0901914, (0.217574, 0.163993, 0.129614)),
    ],
)
def test_golden_window_attention(score, position, mean, std, first):
    attention = fill(WindowAttention(32, (4, 4), 4, score=score, position=position))
    out = attention(image(2, 4, 4, 32, key=7), attention.position_bias())
    assert_golden(out, mean, std, first)


@pytest.mark.parametrize(
    ("post_norm", "mean", "std", "first"),
    [(True, -0.0083711, 1.0049137, (0.752093, 1.216714)), (False, 0.0726146, 0.4713198, (0.400267, 0.688446))],
)
def test_golden_patch_merging(post_norm, mean, std, first):
    assert_golden(fill(PatchMerging(8, post_norm))(image(1, 4, 4, 8, key=7)), mean, std, first)


def test_golden_position_tables():
    assert relative_position_index((2, 2)).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    row = relative_coords_table((8, 8))[0, 0, 8:, 1]
    golden = torch.tensor([0.366512, 0.572069, 0.715614, 0.826016, 0.915745, 0.991335, 1.056642])
    assert torch.allclose(row, golden, rtol=0, atol=1e-6)
    last = {(16, 12): 1.191330, (24, 12): 1.382633, (8, 6): 1.202936, (12, 6): 1.405744}
    for (window, pretrained), value in last.items():
        table = relative_coords_table((window, window), pretrained)
        assert table[0, -1, 0].tolist() == pytest.approx([value, -value], abs=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_of_every_method(name):
    model = create_model(name, img_size=(64, 32), num_classes=7).eval()
    x = torch.randn(2, 3, 64, 32)
    assert model(x).shape == (2, 7)
    assert model.forward_features(x).shape == (2, 64, 8, 4)
    assert model.forward_pooled(x).shape == (2, 64)
    assert [tuple(y.shape) for y in model.forward_intermediates(x)] == [(2, 32, 16, 8), (2, 64, 8, 4)]
    assert torch.allclose(model.forward_features(x).mean((2, 3)), model.forward_pooled(x), atol=1e-6)
    headless = create_model(name, num_classes=0).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(headless(x), headless.forward_pooled(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_transposed_image_and_square_agree_on_a_rectangle_of_one_window(name):
    """A map of one window row is clamped in height alone, and columns still shift."""
    model = create_model(name, img_size=(16, 64), window_size=8)
    stage = model.stages[0]
    assert (stage.resolution, stage.window_size, stage.shift_size) == ((4, 16), (4, 8), (0, 4))
    assert torch.isfinite(model(torch.randn(1, 3, 16, 64))).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options", [{"window_size": 1}, {"img_size": 8}, {"img_size": 8, "window_size": 8}])
def test_window_of_one_token_is_finite_forward_and_backward(name, options):
    model = create_model(name, **options)
    size = options.get("img_size", 32)
    loss = model(torch.randn(2, 3, size, size)).square().sum()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_pretrained_window_of_one_is_finite():
    model = create_model(V2, pretrained_window_sizes=(1, 1))
    assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()


def test_v2_starts_as_the_identity_around_its_blocks():
    model = create_model(V2).eval()
    x = torch.randn(2, 3, 32, 32)
    tokens = model.embed(x).permute(0, 3, 1, 2)
    assert torch.equal(model.forward_intermediates(x)[0], tokens)


def test_extra_norm_sits_after_every_sixth_block_of_a_stage():
    with torch.device("meta"):
        huge = create_model("swinv2_huge_patch4_window12_192")
        giant = create_model("swinv2_g3b_patch4_window12_192")
    for model, blocks in ((huge, (5, 11, 17)), (giant, (5, 11, 17, 23, 29, 35, 41))):
        keys = {key for key in model.state_dict() if "enorm" in key}
        assert keys == {f"layers.2.blocks.{i}.enorm.{kind}" for i in blocks for kind in ("weight", "bias")}
    plain, normed = create_model(V2), create_model(V2, extra_norm_interval=2)
    x = torch.randn(2, 3, 32, 32)
    expected = nn.functional.layer_norm(plain.forward_intermediates(x)[0].permute(0, 2, 3, 1), (32,))
    assert torch.allclose(normed.forward_intermediates(x)[0].permute(0, 2, 3, 1), expected, atol=1e-6)


def training_gradients(model, x):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    model.train()(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["block", "selective"])
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_changes_no_gradient_bit(name, mode):
    options = {"drop_path_rate": 0.5, "drop_rate": 0.1}
    model = create_model(name, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
    saving = create_model(name, activation_checkpointing=mode, **options)
    saving.load_state_dict(model.state_dict())
    x = torch.randn(8, 3, 32, 32)
    expected, got = training_gradients(model, x), training_gradients(saving, x)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("mode", "attentions"), [("off", 4), ("block", 8), ("selective", 4)])
def test_recompute_never_redoes_the_bias_and_redoes_attention_only_per_block(monkeypatch, mode, attentions):
    from torch.utils._python_dispatch import TorchDispatchMode

    counts = {"window_attention": 0, "sigmoid": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in counts:
                counts[name] += 1
            return func(*args, **(kwargs or {}))

    model = create_model(V2, activation_checkpointing=mode)
    with Count():
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert counts == {"window_attention": attentions, "sigmoid": 4}


@pytest.mark.parametrize("name", [V1, V2])
def test_bias_cache_is_used_without_gradients_and_is_never_stale(monkeypatch, name):
    model = create_model(name).eval()
    x = torch.randn(2, 3, 32, 32)
    computed = []
    original = WindowAttention._position_bias
    monkeypatch.setattr(WindowAttention, "_position_bias", lambda self: computed.append(1) or original(self))

    def fresh():
        return copy.deepcopy(model)(x).detach()

    with torch.no_grad():
        first = model(x)
        assert len(computed) == 4
        assert torch.equal(model(x), first) and len(computed) == 4

    def randomise(parameters, write):
        for p in parameters:
            write(p, torch.randn_like(p))

    # The ways in which parameters change: in place, through .data as sharded optimizers do, replaced, loaded, stepped.
    with torch.no_grad():
        randomise(model.parameters(), lambda p, v: p.copy_(v))
        assert torch.equal(model(x), fresh())
        randomise(model.parameters(), lambda p, v: p.data.copy_(v))
        assert torch.equal(model(x), fresh())
        randomise(model.parameters(), lambda p, v: setattr(p, "data", v))
        assert torch.equal(model(x), fresh())
        model.load_state_dict(create_model(name, seed=9).state_dict())
        assert torch.equal(model(x), fresh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        cached = model(x)
        assert torch.equal(cached, fresh())
    assert torch.equal(model(x).detach(), cached)
    assert model(x).requires_grad and not any("cache" in key for key in model.state_dict())


@pytest.mark.parametrize("name", [V1, V2])
def test_a_frozen_bias_is_computed_once_and_only_while_frozen(monkeypatch, name):
    model = create_model(name).eval()
    x = torch.randn(2, 3, 32, 32)
    computed = []
    original = WindowAttention._position_bias
    monkeypatch.setattr(WindowAttention, "_position_bias", lambda self: computed.append(1) or original(self))
    # As on a GPU, where nothing is compared.
    monkeypatch.setattr("swin_scale.models.attention._same", lambda kept, now: False)
    with torch.no_grad():
        free = model(x)
        with model.frozen_position_bias():
            assert torch.equal(model(x), free) and torch.equal(model(x), free)
            assert len(computed) == 8
            with torch.enable_grad():
                assert model(x).requires_grad
            assert len(computed) == 12
        for p in model.parameters():
            p.data.add_(torch.randn_like(p))
        assert torch.equal(model(x), copy.deepcopy(model)(x)) and not torch.equal(model(x), free)


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double])
def test_offsets_of_the_position_bias_stay_exact_in_any_precision(convert):
    model = create_model(V2, img_size=64, window_size=8)
    expected = relative_coords_table((8, 8))
    table = convert(model).layers[0].blocks[0].attn.relative_coords_table
    assert torch.equal(table.float(), expected) and table.dtype.itemsize >= 4


def test_attention_dropout_is_for_training_and_drawn_only_where_there_is_a_rate():
    x = torch.randn(2, 3, 32, 32)
    model = create_model(V1, attn_drop_rate=0.5)
    plain = create_model(V1)

    def draws(m):
        torch.manual_seed(3)
        y = m(x)
        return y, torch.get_rng_state()

    (noisy, _), (again, _), (calm, untouched) = draws(model.train()), draws(model), draws(plain.train())
    assert torch.equal(noisy, again) and not torch.allclose(noisy, calm)
    torch.manual_seed(3)
    assert torch.equal(untouched, torch.get_rng_state())
    assert torch.equal(draws(model.eval())[0], calm)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attn_drop_rate": 1.0}, "attn_drop_rate: 1.0 must be in"),
        ({"kernels": "cuda"}, "kernels: 'cuda' must be auto, triton or reference"),
        ({"layer_norm": "fast"}, "layer_norm: 'fast' must be torch or apex"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(UserError, match=words):
        create_model(V2, **options)
    with pytest.raises(UserError, match="swin_mlp, which has no attention"):
        create_model(MLP, attn_drop_rate=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_meta_to_empty_init_equals_direct_construction(name):
    direct = create_model(name, seed=4)
    with torch.device("meta"):
        model = create_model(name)
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(77)
    model.init_weights(4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), direct.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), direct.buffers(), strict=True))
    other = create_model(name, seed=5)
    assert not torch.equal(other.head.weight, direct.head.weight)


def test_building_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    create_model(V2)
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_values_follow_the_official_rules():
    state = create_model("swinv2_nano_patch4_window4_32", embed_dim=128, num_heads=(4, 8)).state_dict()
    block = "layers.0.blocks.0."
    assert state[block + "mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state[block + "attn.cpb_mlp.0.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert not state[block + "norm1.weight"].any() and not state[block + "norm2.weight"].any()
    assert (state["norm.weight"] == 1).all() and (state["layers.0.downsample.norm.weight"] == 1).all()
    assert torch.allclose(state[block + "attn.logit_scale"], torch.tensor(10.0).log())
    conv = state["patch_embed.proj.weight"]
    assert conv.abs().max() <= 48**-0.5 and conv.std().item() == pytest.approx(48**-0.5 / 3**0.5, rel=0.02)
    assert state["patch_embed.proj.bias"].any()


def test_no_derived_buffer_is_saved():
    for name in FAMILIES:
        keys = set(create_model(name).state_dict())
        assert not any(part in key for key in keys for part in ("relative_position_index", "coords_table", "attn_mask"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_stays_close_to_fp32(name, dtype):
    model = create_model(name)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                p.fill_(1.0)
    half = copy.deepcopy(model).to(dtype)
    rounded = copy.deepcopy(half).float()
    x = torch.randn(4, 3, 32, 32).to(dtype)
    out, exact = half(x), rounded(x.float())
    assert out.dtype == dtype
    assert (out.float() - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()
    out.float().square().sum().backward()
    exact.square().sum().backward()
    for (key, a), b in zip(half.named_parameters(), rounded.parameters(), strict=True):
        assert torch.isfinite(a.grad).all(), key
        assert (a.grad.float() - b.grad).norm() <= 0.12 * b.grad.norm() + 1e-4, key


def test_half_precision_position_bias_is_fp32_of_the_same_weights():
    model = create_model(V2)
    attention = model.layers[0].blocks[0].attn
    half = copy.deepcopy(attention).half()
    assert half.position_bias().dtype == torch.float32
    assert torch.equal(half.position_bias(), copy.deepcopy(half).float().position_bias())


def test_drop_path_keeps_the_expected_value_and_is_off_in_eval():
    model = create_model(V1, drop_path_rate=0.5)
    x = torch.randn(1, 3, 32, 32)
    model.eval()
    assert torch.equal(model(x), model(x))
    torch.manual_seed(0)
    block = model.layers[1].blocks[1].train()
    h = torch.randn(1, 4, 4, 64).expand(4000, -1, -1, -1)
    out = block._add(h, torch.ones_like(h)) - h
    assert set(out.flatten().round(decimals=4).unique().tolist()) == {0.0, 2.0}
    assert out.mean().item() == pytest.approx(1.0, abs=0.06)


def test_shift_regions_give_the_official_mask_shape():
    assert shift_mask(shift_regions((8, 8), (4, 4), (2, 2))).shape == (4, 16, 16)


def test_wrong_input_size_names_both():
    with pytest.raises(UserError, match=r"\(40, 32\).*\(32, 32\)"):
        create_model(V2)(torch.randn(1, 3, 40, 32))
