"""Resizing of position tables: the geometric rule of SimMIM's fine-tuning, against SciPy and golden ratios."""

import numpy as np
import pytest
import torch
from scipy import interpolate

from swin_scale.convert.fit import fit
from swin_scale.convert.tables import geometric_matrix, geometric_ratio, resized, spline_matrix
from swin_scale.errors import CheckpointError

TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"


@pytest.mark.parametrize(("old", "new", "ratio"), [(11, 13, 1.0912813), (23, 27, 1.0328930)])
def test_golden_ratios(old, new, ratio):
    assert geometric_ratio(old, new) == pytest.approx(ratio, abs=1e-6)


@pytest.mark.parametrize(("old", "new"), [(11, 13), (11, 27), (23, 27), (13, 47)])
def test_it_is_the_spline_of_scipy_through_the_values_moved_apart(old, new):
    q, table = geometric_ratio(old, new), np.random.default_rng(0).normal(size=(old, old, 3))
    half = [sum(q**i for i in range(n + 1)) for n in range(old // 2)]
    at = np.array([-x for x in reversed(half)] + [0.0] + half)
    wanted = np.arange(new) - new // 2
    ours, how = resized(
        TABLE, torch.from_numpy(table.reshape(-1, 3)), torch.empty(new * new, 3), "here", geometric=True
    )
    for head in range(3):
        spline = interpolate.RectBivariateSpline(at, at, table[..., head], kx=3, ky=3, s=0)
        inside = np.abs(wanted) <= half[-1]  # SciPy does not go on beyond the ends, and q is known to 1e-6
        theirs = spline(wanted[inside], wanted[inside])
        mine = ours[:, head].view(new, new).numpy()[np.ix_(inside, inside)]
        assert np.abs(mine - theirs).max() < 2e-6
    assert how == f"geometric from {old} x {old} to {new} x {new}"


def test_a_cubic_is_reproduced_and_the_centre_stays():
    at = np.array([-4.0, -2.5, -1.0, 0.0, 0.3, 2.0, 5.0])
    wanted = np.linspace(-4.2, 5.2, 40)
    assert np.allclose(spline_matrix(at, wanted) @ (at**3 - 2 * at), wanted**3 - 2 * wanted)
    matrix = geometric_matrix(13, 27)
    assert np.allclose(matrix[27 // 2], np.eye(13)[13 // 2], atol=1e-12)
    assert np.allclose(matrix[[12, 14]], np.eye(13)[[5, 7]], atol=1e-12)  # offsets -1 and 1 keep their values
    assert np.allclose(matrix.sum(1), 1)


def test_only_weights_of_simmim_follow_it():
    old, new = torch.randn(11 * 11, 4), torch.empty(13 * 13, 4)
    plain, report = fit({TABLE: old}, {TABLE: new}, where="here", into="model")
    masked, masked_report = fit({f"encoder.{TABLE}": old}, {TABLE: new}, where="here", into="model")
    assert [line.reason for line in report.converted] == ["bicubic from 11 x 11 to 13 x 13"]
    assert [line.reason for line in masked_report.converted] == [
        "encoder of a SimMIM model, geometric from 11 x 11 to 13 x 13"
    ]
    assert not torch.allclose(plain[TABLE], masked[TABLE], atol=1e-2)


def test_tables_of_rectangles_are_refused():
    with pytest.raises(CheckpointError, match="only square windows and maps can"):
        resized(TABLE, torch.empty(11 * 13, 4), torch.empty(13 * 13, 4), "here", geometric=True)
