"""Position tables of Swin V1, and absolute positions, for windows and maps of another size."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swin_scale.errors import CheckpointError


def resized(name: str, tensor: Tensor, wanted: Tensor, where: str, *, geometric: bool = False) -> tuple[Tensor, str]:
    """The table or embedding called `name` in the shape of `wanted`, and how; itself and "" if it is neither.

    Tables are (side * side, heads), embeddings (1, side * side, C). As in official fine-tuning both are resized
    bicubically, but with `geometric`, for weights of SimMIM, tables that grow are resampled by `geometric_matrix`.
    Raises CheckpointError unless both are square.
    """
    is_table = name.endswith("relative_position_bias_table") and tensor.dim() == wanted.dim() == 2
    is_grid = name.endswith("absolute_pos_embed") and tensor.dim() == wanted.dim() == 3
    if not ((is_table and tensor.shape[1] == wanted.shape[1]) or (is_grid and tensor.shape[2] == wanted.shape[2])):
        return tensor, ""
    lengths = [t.shape[0 if is_table else 1] for t in (tensor, wanted)]
    old, new = map(math.isqrt, lengths)
    if [old * old, new * new] != lengths or not old:
        shapes = f"{tuple(tensor.shape)} cannot be resized to {tuple(wanted.shape)}"
        raise CheckpointError(f"{where}: {name} of {shapes}: only square windows and maps can")
    image = tensor.float().view(old, old, -1).permute(2, 0, 1)
    if geometric and is_table and 5 <= old < new:
        matrix = torch.from_numpy(geometric_matrix(old, new)).to(image)
        image, how = matrix @ image @ matrix.t(), "geometric"
    else:
        image, how = F.interpolate(image[None], size=(new, new), mode="bicubic", align_corners=False)[0], "bicubic"
    values = image.permute(1, 2, 0).reshape(wanted.shape).to(tensor.dtype)
    return values, f"{how} from {old} x {old} to {new} x {new}"


def geometric_ratio(old: int, new: int) -> float:
    """The q for which 1 + q + ... + q^(old // 2 - 1) is new // 2, by the bisection of the official code: in
    [1.01, 1.5], to 1e-6. Sides are odd."""
    low, high, q = 1.01, 1.5, 1.01
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q ** (old // 2)) / (1 - q) > new // 2:
            high = q
        else:
            low = q
    return q


def geometric_matrix(old: int, new: int) -> np.ndarray:
    """(new, old) float64: values at the offsets -(new // 2) ... new // 2 from values at 0, +-1, +-(1 + q), ...

    The rule for weights of SimMIM: offsets near the centre, where the table varies most, keep their values, the outer
    ones move apart by a factor `geometric_ratio` each. In between runs the cubic spline through all values.
    """
    half = np.cumsum(geometric_ratio(old, new) ** np.arange(old // 2))
    return spline_matrix(np.concatenate((-half[::-1], [0.0], half)), np.arange(new) - float(new // 2))


def spline_matrix(at: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(len(wanted), len(at)) float64: the cubic spline through values at the ascending points `at`, not-a-knot at both
    ends, as a linear map of these values. At least four points; beyond the ends the outer polynomials go on."""
    knots = np.concatenate((np.repeat(at[0], 4), at[2:-2], np.repeat(at[-1], 4)))
    inverse = np.linalg.inv(_cubics(knots, at))
    return _cubics(knots, wanted) @ inverse


def _cubics(knots: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(len(x), len(knots) - 4): the cubic B-splines at x, by the recursion of Cox and de Boor."""
    intervals = np.clip(np.searchsorted(knots, x, side="right") - 1, 3, len(knots) - 5)
    values = np.eye(len(knots) - 1)[intervals]
    for degree in (1, 2, 3):
        rise, fall = knots[degree:-1] - knots[: -degree - 1], knots[degree + 1 :] - knots[1:-degree]
        up = (x[:, None] - knots[: -degree - 1]) * _over(rise)
        down = (knots[degree + 1 :] - x[:, None]) * _over(fall)
        values = up * values[:, :-1] + down * values[:, 1:]
    return values


def _over(widths: np.ndarray) -> np.ndarray:
    """1 / widths, and 0 where knots coincide."""
    return np.divide(1.0, widths, out=np.zeros_like(widths), where=widths > 0)
