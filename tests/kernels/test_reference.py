import pytest
import torch

from swin_scale.kernels.reference import (
    MASKED,
    NORM_FLOOR,
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
