import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swin_scale.report.curves import Axis, Span, axis_for, envelope, linear_ticks, log_ticks, short, smooth


def test_a_one_step_spike_among_a_million_is_in_the_envelope():
    steps = np.arange(1, 1_000_001)
    values = np.ones(len(steps))
    values[654_321], values[123_456] = 50.0, -3.0
    span = Span(first=1, last=1_000_000, most=420)
    cells = envelope(steps, values, span)
    assert cells.high.max() == 50 and cells.low.min() == -3
    assert int(np.argmax(cells.high)) == span.at(np.array([654_322]))[0]
    assert np.isfinite(cells.low).all()


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=60), st.integers(1, 20))
def test_the_envelope_is_the_slow_one(values, most):
    """Against cells filled one value at a time."""
    steps = np.arange(5, 5 + len(values))
    span = Span(first=5, last=4 + len(values), most=most)
    cells = envelope(steps, np.array(values), span)
    for cell in range(span.cells):
        here = [v for s, v in zip(steps, values) if span.at(np.array([s]))[0] == cell and v == v]
        if here:
            assert (cells.low[cell], cells.high[cell]) == (min(here), max(here))
            assert cells.mean[cell] == pytest.approx(sum(here) / len(here), abs=1e-6)
        else:
            assert np.isnan([cells.low[cell], cells.high[cell], cells.mean[cell]]).all()


@given(st.integers(1, 10**6), st.integers(1, 3000), st.integers(1, 420))
def test_every_cell_has_a_step(first, length, most):
    """So that an empty cell is a gap in the data, never one of the grid."""
    span = Span(first=first, last=first + length - 1, most=most)
    assert np.array_equal(np.unique(span.at(np.arange(first, first + length))), np.arange(span.cells))


def test_a_smooth_line_keeps_constants_and_gaps_and_lies_within():
    values = np.where(np.arange(50) % 9 == 4, np.nan, 2.5)
    line = smooth(values, 6)
    assert np.array_equal(np.isnan(line), np.isnan(values)) and np.allclose(line[np.isfinite(line)], 2.5)
    rough = np.random.default_rng(0).normal(size=200)
    assert smooth(rough, 8).std() < 0.5 * rough.std() and smooth(rough, 8).max() <= rough.max()


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_linear_ticks_are_round_and_inside(low, size):
    if abs(low) > 1e6 * size:
        return
    ticks = linear_ticks(low, low + size)
    assert 3 <= len(ticks) <= 7
    assert all(low - 1e-6 * size <= tick <= low + size * (1 + 1e-6) for tick in ticks)
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    assert f"{step:.3e}"[:4] in ("1.00", "2.00", "2.50", "5.00")


@given(st.floats(-12, 9), st.floats(0.1, 20))
def test_log_ticks_are_few_and_inside(exponent, decades):
    low, high = 10.0**exponent, 10.0 ** (exponent + decades)
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 8 and all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)


def test_an_axis_has_room_for_all_and_turns_logarithmic_over_decades():
    flat, wide = np.array([1.0, 2.0, np.nan]), np.array([0.01, 5.0, 300.0])
    assert not axis_for([flat]).log and axis_for([wide]).log and not axis_for([wide], log=False).log
    for values in (flat, wide, np.array([-4.0, 1e9]), np.array([0.0, 0.0])):
        axis = axis_for([values])
        here = values[np.isfinite(values)]
        assert axis.low <= here.min() and axis.high >= here.max() and axis.low < axis.high
    assert axis_for([np.array([50.0, 99.9])], log=False, top=100.0).high == 100
    assert axis_for([np.array([3.0])], from_zero=True).low == 0


def test_zero_on_a_logarithmic_axis_is_at_the_bottom():
    axis = axis_for([np.array([0.0, 1e-3, 1.0])])
    assert axis.log and axis.fraction(np.array([0.0]))[0] == 0 < axis.fraction(np.array([1e-3]))[0]
    assert np.isnan(Axis(low=1, high=2, log=True).fraction(np.array([np.nan]))).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0004, "4e-4"), (5e-7, "5e-7"), (12.3456, "12.35"), (1234.0, "1234"), (50_000, "50k"),
     (1_250_000, "1.25M"), (-3e9, "-3G"), (1e20, "1e20"), (math.nan, "none")],
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert short(value) == text
