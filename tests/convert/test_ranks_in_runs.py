"""A run's sharded experts to files of ranks, and a run on two processes that starts from them."""

import pytest
import torch

from swin_scale.convert import convert, model_from_weights
from tests import runs
from tests.convert.moe_files import MOE
from tests.convert.test_ranks import assert_same

pytestmark = pytest.mark.proof
SETTINGS = {"model__name": MOE, "moe__drop": 0, "optim__ema_decay": 0.9, "nproc": 2, "moe__ep_size": 2}


def run(directory, digits, **settings):
    values = {"data__val": f"[{digits[1]}]", **SETTINGS, **settings}
    result = runs.run(directory, digits[0], timeout=300, **values)
    assert result.returncode == 0, result.stderr
    return runs.trajectory(directory)


def test_a_run_starts_from_files_of_ranks_as_from_the_run_itself(digits, tmp_path):
    run(tmp_path / "first", digits, train__max_steps=2)
    for kind in ("master", "ema"):
        convert(tmp_path / "first", tmp_path / f"{kind}.zip", to="tutel-ep16", kind=kind)
        expected, _ = model_from_weights(tmp_path / "first", kind=kind)
        got, info = model_from_weights(tmp_path / f"{kind}.zip")
        assert_same(got.state_dict(), expected.state_dict())
        assert info.name == MOE
    assert not torch.equal(got.head.weight, model_from_weights(tmp_path / "first")[0].head.weight)  # ema is not master
    losses = [
        run(tmp_path / name, digits, train__max_steps=2, init__weights=tmp_path / source)
        for name, source in (("a", "first"), ("b", "master.zip"))
    ]
    assert losses[0] == losses[1]
