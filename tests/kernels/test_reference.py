import pytest
import torch

from swin_scale.kernels.reference import (
    MASKED,
    NORM_FLOOR,
    dropout_keep,
    philox_4x32,
    shift_mask,
    shift_regions,
    unit_rows,
    window_attention,
    window_partition,
    window_reverse,
)

SHIFTS = [((4, 4), (0, 0)), ((4, 4), (2, 2)), ((4, 2), (2, 1)), ((2, 4), (0, 2)), ((1, 1), (0, 0)), ((8, 12), (0, 0))]


@pytest.mark.parametrize(("window", "shift"), SHIFTS)
def test_reverse_undoes_partition(window, shift):
    x = torch.randn(3, 8, 12, 5)
    windows = window_partition(x, window, shift)
    assert windows.shape == (3 * 8 * 12 // (window[0] * window[1]), window[0] * window[1], 5)
    assert torch.equal(window_reverse(windows, window, shift, (8, 12)), x)


def test_windows_are_row_major_inside_an_image_and_images_outermost():
    at = torch.arange(2 * 4 * 4).view(2, 4, 4, 1)
    windows = window_partition(at, (2, 2)).squeeze(-1)
    assert windows[:3].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13]]
    assert windows[4].tolist() == [16, 17, 20, 21]
    assert window_partition(at, (2, 2), (1, 1)).squeeze(-1)[0].tolist() == [5, 6, 9, 10]


@pytest.mark.parametrize(("window", "shift"), [((4, 4), (2, 2)), ((4, 2), (2, 1)), ((2, 4), (0, 2))])
def test_shifted_tokens_see_each_other_only_where_the_plain_map_joins_them(window, shift):
    """Tokens of a window may attend unless rolling carried one of them, and not the other, across the border."""
    H, W = 8, 12
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    where = window_partition(torch.stack((y, x), -1)[None], window, shift).float()
    apart = (where[:, :, None] - where[:, None, :]).abs()
    joined = (apart[..., 0] < window[0]) & (apart[..., 1] < window[1])
    mask = shift_mask(shift_regions((H, W), window, shift))
    assert torch.equal(mask == 0, joined)
    assert torch.equal(mask == MASKED, ~joined)


def test_no_shift_masks_nothing():
    assert not shift_mask(shift_regions((8, 8), (4, 4), (0, 0))).any()


def test_unit_rows_of_short_rows_keep_their_value_and_pass_no_gradient():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [NORM_FLOOR / 10, 0.0]], requires_grad=True)
    y = unit_rows(x)
    assert torch.allclose(y, torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]))
    (y * torch.tensor([1.0, 2.0])).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad[0].abs().sum() > 0 and not x.grad[1:].any()


def test_attention_inside_one_window_is_softmax_attention():
    qkv, bias = torch.randn(2, 4, 4, 3 * 6), torch.zeros(2, 16, 16)
    out = window_attention(qkv, torch.full((2, 1, 1), 3**-0.5), bias, (4, 4))
    q, k, v = qkv.view(2, 16, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 4, 4, 6)
    assert torch.allclose(out, expected, atol=1e-6)


def test_cosine_attention_ignores_the_length_of_q_and_k():
    qkv, bias, scale = torch.randn(1, 4, 4, 3 * 6), torch.randn(2, 16, 16), torch.full((2, 1, 1), 10.0)
    longer = qkv * torch.cat((torch.full((12,), 7.0), torch.ones(6)))
    args = (scale, bias, (4, 4), (0, 0), True)
    assert torch.allclose(window_attention(qkv, *args), window_attention(longer, *args), atol=1e-5)


PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0xA4093822, 0x299F31D0), PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_known_answers(key, counter, words):
    """Those of the Random123 library for Philox4x32-10 (Salmon et al., 2011)."""
    got = philox_4x32(tuple(map(torch.tensor, key)), tuple(map(torch.tensor, counter)))
    assert " ".join(f"{int(word):08x}" for word in got) == words


def first_word(key, counter):
    """Philox4x32-10 on Python's integers of any size."""
    (a, b), (x, y, z, w) = key, counter
    for _ in range(10):
        p, q = x * 0xD2511F53, z * 0xCD9E8D57
        x, y, z, w = (q >> 32) ^ y ^ a, q % 2**32, (p >> 32) ^ w ^ b, p % 2**32
        a, b = (a + 0x9E3779B9) % 2**32, (b + 0xBB67AE85) % 2**32
    return x


@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_attention_drops_what_counters_of_place_say(shift):
    """Entry, head, window of the rolled map in row-major order, image; the key is the seed's low and high half."""
    rate, seed, B, heads, N, d = 0.3, (7 << 32) + 2**31 + 5, 2, 2, 8, 3
    qkv, scale, bias = torch.randn(B, 4, 8, 3 * heads * d), torch.rand(heads, 1, 1), torch.randn(heads, N, N)
    out = window_attention(qkv, scale, bias, (2, 4), shift, dropout=rate, seed=torch.tensor(seed))
    windows = window_partition(qkv, (2, 4), shift).view(B, 4, N, 3, heads, d)
    mask = shift_mask(shift_regions((4, 8), (2, 4), shift))
    expected = torch.empty(B, 4, N, heads, d)
    for b, w, h in ((b, w, h) for b in range(B) for w in range(4) for h in range(heads)):
        q, k, v = windows[b, w, :, :, h].unbind(1)
        p = (q @ k.T * scale[h] + bias[h] + mask[w]).softmax(-1)
        for i, j in ((i, j) for i in range(N) for j in range(N)):
            kept = first_word((seed % 2**32, seed >> 32), (i * N + j, h, w, b)) >= int(rate * 2**32)
            p[i, j] *= kept / (1 - rate)
        expected[b, w, :, h] = p @ v
    expected = window_reverse(expected.view(B * 4, N, heads * d), (2, 4), shift, (4, 8))
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.97])
def test_dropout_keeps_its_rate_and_places_are_independent(rate):
    size = 64

    def keep(seed):
        entry, head, window, image = (torch.arange(n) for n in (size * size, 3, 4, 2))
        place = head[:, None], window[:, None, None], image[:, None, None, None]
        return dropout_keep(torch.tensor(seed), rate, entry, *place).double()

    here = keep(11)
    assert torch.equal(here, keep(11))
    kept, count = 1 - rate, here.numel()
    # Five standard deviations of the mean, and of the mean product of independent pairs.
    assert abs(here.mean() - kept) <= 5 * (kept * rate / count) ** 0.5
    others = [here.roll(1, axis) for axis in range(4)] + [here.roll(size, 3), keep(12), keep(11 + (1 << 32))]
    for other in others:
        assert abs((here * other).mean() - kept**2) <= 5 * (kept**2 * (1 - kept**2) / count) ** 0.5 + 1e-12
        assert rate in (0.0,) or not torch.equal(here, other)


def test_attention_dropout_keeps_the_expected_value():
    qkv, bias, scale = torch.randn(1, 4, 4, 3 * 6), torch.randn(2, 16, 16), torch.full((2, 1, 1), 3.0)
    plain = window_attention(qkv, scale, bias, (4, 4), (0, 0), True)
    many = [
        window_attention(qkv, scale, bias, (4, 4), (0, 0), True, dropout=0.25, seed=torch.tensor(seed))
        for seed in range(600)
    ]
    assert (torch.stack(many).mean(0) - plain).abs().max() <= 0.15
