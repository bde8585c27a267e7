"""The cost of a SimMIM step: what is timed is the step, and the verdict is about the whole interval."""

import json

import pytest
import torch

from swin_scale.bench.peers import Contestant
from swin_scale.bench.simmim import CONTROL, MASKED, SUPERVISED, _cost, _Masked, bench_simmim
from swin_scale.bench.timing import Comparison
from swin_scale.data import Masking
from swin_scale.errors import UserError
from swin_scale.models import create_simmim

NAME = "swinv2_nano_patch4_window4_32"


def test_the_result_holds_both_steps_and_the_verdict(tmp_path):
    path = tmp_path / "result.json"
    result = bench_simmim(NAME, batch=2, rounds=1, threads=1, mask_patch_size=8, device="cpu", out=str(path))
    figures = json.loads(path.read_text())
    assert figures["bench"] == "simmim" and figures["settings"]["classes"] == 10
    assert list(figures["seconds"]) == [SUPERVISED, MASKED, CONTROL] and figures["bar"]["at_most"] == 1.05
    assert figures["ratios"][MASKED]["pairs"] == 2 and "2 pairs are no basis for a claim" in str(result)


def test_the_masked_step_is_a_whole_one():
    """Every parameter gets a gradient, the mask token among them, and masks are new each time."""
    model = create_simmim(NAME, mask_patch_size=8, drop_path_rate=0.0)
    one = _Masked(name=MASKED, module=model, masking=Masking(ratio=0.6, cell=8, patch=4))
    x, seen = torch.randn(2, 3, 32, 32), []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    for _ in range(2):
        one.forward_backward(x, torch.zeros(2))
        assert all(p.grad is not None for p in model.parameters())
    assert not torch.equal(*seen) and all(int(mask.sum()) == 2 * 40 for mask in seen)
    assert isinstance(one, Contestant)


@pytest.mark.parametrize(("cost", "reached"), [(1.04, True), (1.06, False)])
def test_the_bar_is_for_the_upper_end_of_the_interval(cost, reached):
    pairs = [(1.0, cost)] * 40
    found = Comparison(seconds={SUPERVISED: [1.0], MASKED: [cost]}, pairs={MASKED: pairs, CONTROL: [(1.0, 1.0)] * 40})
    assert _cost(found)["bar"]["reached"] == reached
    wide = [(1.0, 1.0), (1.0, 1.0)] * 10 + [(1.0, 1.2), (1.0, 1.2)] * 10
    found = Comparison(seconds={SUPERVISED: [1.0], MASKED: [1.0]}, pairs={MASKED: wide, CONTROL: pairs})
    assert not _cost(found)["bar"]["reached"]


def test_what_it_is_not_made_for_is_refused():
    with pytest.raises(UserError, match="has experts"):
        bench_simmim("swin_moe_nano_patch4_window4_32", mask_patch_size=8)
    with pytest.raises(UserError, match="--precision tf32"):
        bench_simmim(NAME, precision="tf32")
