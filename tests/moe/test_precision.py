"""Half precision costs the MoE layer no more than it costs torch's own dense MLP."""

import pytest

from swin_scale.moe.config import MoEConfig
from tests.moe.precision import HALVES, dense_errors, layer_errors

FACTOR = 2.0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2, "router": "cosine", "eval_capacity_factor": 1.0}, {"top_k": 2, "normalize_gate": True}]
)
def test_errors_are_at_most_twice_the_dense_mlps(dtype, options):
    ours, dense = layer_errors(MoEConfig(num_experts=8, **options), dtype, "cpu"), dense_errors(dtype, "cpu")
    assert all(0 < ours[key] <= FACTOR * dense[key] for key in dense), (ours, dense)
