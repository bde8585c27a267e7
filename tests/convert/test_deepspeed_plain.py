"""DeepSpeed checkpoints without ZeRO: one file with everything."""

import pytest
import torch

from swin_scale.convert import convert, inspect_path, model_from_weights, open_weights, read_state_dict
from swin_scale.errors import CheckpointError
from tests.convert import zero_worker
from tests.spawn import spawn

V1 = "swin_nano_patch4_window4_32"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    runs = [
        {"name": "fp32", "stage": 0, "precision": "fp32", "model": V1},
        {"name": "bf16", "stage": 0, "precision": "bf16", "model": V1},
    ]
    spawn(2, zero_worker.write, str(root), runs, timeout=120)
    return root


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_0_is_one_file(written, tmp_path, precision):
    path = written / precision
    stored = torch.load(path / "global_step2" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    state, source = read_state_dict(path)
    assert (source.format, source.step) == ("deepspeed", 2)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in state.items()) and state.keys() == stored.keys()
    network, _ = model_from_weights(path, model=V1)
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in network.state_dict().items())
    report = convert(path, tmp_path / "w.safetensors", to="safetensors", model=V1)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    assert f"without ZeRO, weights as they were trained with, in {dtype}" in str(report)
    assert "DeepSpeed" in inspect_path(path) and "step 2" in inspect_path(path)
    with pytest.raises(CheckpointError, match="leave ema out"):
        open_weights(path, kind="ema")


def test_zero_without_its_optimizer_files_is_not_taken_for_it(written, tmp_path):
    """Its model file names the shapes of the weights that are elsewhere."""
    content = torch.load(written / "fp32" / "global_step2" / "mp_rank_00_model_states.pt", weights_only=False)
    torch.save({**content, "param_shapes": [{}]}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"\*_optim_states\.pt with the fp32 weights are missing"):
        open_weights(tmp_path)
