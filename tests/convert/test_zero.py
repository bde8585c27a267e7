"""ZeRO checkpoints written by DeepSpeed itself: the same bits as its own script, and clear words about broken ones."""

import os
import shutil
import time

import pytest
import safetensors.torch
import torch
from deepspeed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
)

from swin_scale import create_model, load_weights
from swin_scale.checkpoint.tensorfile import bytes_of
from swin_scale.convert import convert, inspect_path, open_weights, read_state_dict
from swin_scale.errors import CheckpointError, UserError
from tests.convert import zero_worker
from tests.spawn import spawn

WORLDS = (1, 2, 4)
NANO = "swinv2_nano_patch4_window4_32"
STAGES = [{"name": f"stage{stage}", "stage": stage, "precision": "bf16"} for stage in (1, 2, 3)]
MORE = [
    {"name": "fp32", "stage": 2, "precision": "fp32"},
    {"name": "robin", "stage": 2, "precision": "bf16", "round_robin_gradients": True},
    {"name": "aligned", "stage": 1, "precision": "bf16", "parameter_alignment": True},
    {"name": "offload", "stage": 3, "precision": "fp32", "offload_optimizer": {"device": "cpu"}},
    {"name": "swin", "stage": 3, "precision": "bf16", "model": NANO},
]
CASES = [(w, run["name"]) for w in WORLDS for run in STAGES] + [(2, run["name"]) for run in MORE]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """world / run: what `engine.save_checkpoint` wrote."""
    root = tmp_path_factory.mktemp("zero")
    for world in WORLDS:
        runs = STAGES + MORE * (world == 2)
        spawn(world, zero_worker.write, str(root / str(world)), runs, timeout=120)
    return root


@pytest.mark.parametrize(("world", "run"), CASES)
def test_the_same_bits_as_zero_to_fp32(checkpoints, tmp_path, world, run):
    path = checkpoints / str(world) / run
    convert_zero_checkpoint_to_fp32_state_dict(str(path), str(tmp_path / "theirs"))
    theirs = torch.load(tmp_path / "theirs" / "pytorch_model.bin")
    if run in ("stage1", "aligned"):  # frozen parameters are listed nowhere and left out there; the model file has them
        theirs["frozen.weight"] = zero_worker.Odd().frozen.weight.detach().bfloat16().float()
    report = convert(path, tmp_path / "ours.safetensors", to="safetensors", model=NANO if run == "swin" else None)
    ours = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    read, source = read_state_dict(path)
    assert ours.keys() == theirs.keys() == read.keys() and len(ours) >= 10
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype, name
    assert (source.format, source.step, f"{world} ranks" in str(report)) == ("deepspeed", 2, True)
    assert ("the model is not known" in str(report)) == (run != "swin")


def test_master_weights_are_those_of_training_not_their_rounding(checkpoints):
    """The low-precision copy in the model file would pass most comparisons of names and shapes."""
    state, _ = read_state_dict(checkpoints / "2" / "stage2")
    assert not torch.equal(state["first.weight"], state["first.weight"].bfloat16().float())
    assert torch.equal(state["tied.weight"], state["first.weight"])
    assert torch.equal(state["index"], torch.arange(6).reshape(2, 3)) and "fleeting" not in state


@pytest.mark.parametrize("size", [8, 24, 1 << 20])
def test_pieces_give_the_same_bytes_whatever_their_size(checkpoints, size):
    """Also when they are kept until the next is asked for, while more are being read."""
    with open_weights(checkpoints / "4" / "stage3") as weights:
        wholes = {name: bytes(bytes_of(weights.read(name).contiguous())) for name in weights.tensors}
        together = weights.pieces(list(wholes), size)
        for name, whole in wholes.items():
            assert b"".join(map(bytes, weights.pieces([name], size))) == whole, name
            while whole:
                piece = next(together)
                time.sleep(0.001)
                assert len(piece) and whole.startswith(bytes(piece)), name
                whole = whole[len(piece) :]
        assert list(together) == []


def test_models_load_from_the_directory(checkpoints):
    path = checkpoints / "2" / "swin"
    model = create_model(NANO)
    report = load_weights(model, path)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(path))
    assert len(report.copied) == len(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    text = inspect_path(path)
    assert all(words in text for words in ("DeepSpeed ZeRO", "stage 3, 2 ranks", "step 2", "none was loaded")), text
    with pytest.raises(CheckpointError, match="does not say that it is ema"):
        read_state_dict(path, kind="ema")


@pytest.fixture
def copy(checkpoints, tmp_path):
    def make(world, run):
        target = tmp_path / f"{world}{run}"
        shutil.copytree(checkpoints / str(world) / run, target)
        return target, next(target.glob("global_step*"))

    return make


def refused(path, *words):
    """Reading fails with all of `words`, and a conversion leaves no file behind."""
    out = path.parent / "out.safetensors"
    for action in (lambda: read_state_dict(path), lambda: convert(path, out, to="safetensors")):
        with pytest.raises(CheckpointError) as caught:
            action()
        assert all(word in str(caught.value) for word in words), caught.value
    assert not [file for file in path.parent.iterdir() if "out.safetensors" in file.name]


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("stage1", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("stage2", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("stage2", "mp_rank_00_model_states.pt"),
        ("stage3", "zero_pp_rank_2_mp_rank_00_model_states.pt"),
        ("stage3", "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt"),
    ],
)
def test_a_missing_file_is_named(copy, run, name):
    path, files = copy(4, run)
    os.unlink(files / name)
    refused(path, name, "is missing")


@pytest.mark.parametrize("run", ["stage1", "stage3"])
def test_files_of_two_worlds(copy, checkpoints, run):
    """Four ranks saved over two, or two over four."""
    path, files = copy(4, run)
    other = next((checkpoints / "2" / run).glob("global_step*"))
    for rank in (0, 1):
        shutil.copy(other / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", files)
    refused(path, "bf16_zero_pp_rank_", "of another run", "on 2 ranks")
    path, files = copy(2, run)
    other = next((checkpoints / "4" / run).glob("global_step*"))
    shutil.copy(other / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", files)
    refused(path, "bf16_zero_pp_rank_1", "on 4 ranks", "on 2")


@pytest.mark.parametrize("run", ["stage2", "stage3"])
def test_a_flipped_bit_in_any_storage_is_noticed(copy, run):
    path, files = copy(2, run)
    file = files / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = file.read_bytes()
    weights = torch.load(file, weights_only=False)["optimizer_state_dict"]
    groups = weights.get("single_partition_of_fp32_groups") or weights["fp32_flat_groups"]
    for group in groups:
        if group.numel() > 4:
            at = whole.index(group.detach().numpy().tobytes())
            file.write_bytes(whole[: at + 5] + bytes([whole[at + 5] ^ 1]) + whole[at + 6 :])
            refused(path, file.name, "damaged")
    file.write_bytes(whole[: len(whole) // 2])
    refused(path, file.name, "damaged")


def rewrite(file, change):
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


@pytest.mark.parametrize(
    ("run", "name", "change", "words"),
    [
        ("stage2", "mp_rank_00_model_states.pt", lambda c: c.pop("param_shapes"), ["param_shapes"]),
        ("stage2", "mp_rank_00_model_states.pt", lambda c: c["param_shapes"].pop(), ["names 1"]),
        (
            "stage2",
            "mp_rank_00_model_states.pt",
            lambda c: c["param_shapes"][0].update({"extra": torch.Size([9])}),
            ["param_alignment_paddings", "do not fit 3 parameters"],
        ),
        (
            "stage3",
            "zero_pp_rank_0_mp_rank_00_model_states.pt",
            lambda c: c["param_shapes"][1].update({"extra": torch.Size([9])}),
            ["zero_pp_rank_0", "end before extra"],
        ),
        (
            "stage3",
            "zero_pp_rank_0_mp_rank_00_model_states.pt",
            lambda c: c["param_shapes"][1].popitem(),
            ["bytes of weights"],
        ),
        (
            "stage3",
            "zero_pp_rank_1_mp_rank_00_model_states.pt",
            lambda c: c.update(global_steps=7),
            ["zero_pp_rank_1", "of step 7"],
        ),
        (
            "stage3",
            "zero_pp_rank_1_mp_rank_00_model_states.pt",
            lambda c: c["frozen_param_fragments"].clear(),
            ["zero_pp_rank_1", "frozen.weight"],
        ),
        (
            "stage2",
            "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            lambda c: c["optimizer_state_dict"].pop("single_partition_of_fp32_groups"),
            ["bf16_zero_pp_rank_0", "no fp32 weights"],
        ),
        (
            "stage2",
            "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            lambda c: c["optimizer_state_dict"].update(partition_count=[2, 1]),
            ["bf16_zero_pp_rank_0", "expert parallelism"],
        ),
        (
            "stage2",
            "mp_rank_00_model_states.pt",
            lambda c: c["shared_params"].update({f"copy{i}": "first.weight" for i in range(5000)}),
            ["share bytes"],
        ),
    ],
)
def test_contents_that_do_not_fit(copy, run, name, change, words):
    path, files = copy(2, run)
    rewrite(files / name, change)
    refused(path, *words)


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_code_in_a_pickle_is_refused_and_has_not_run(copy, tmp_path, name):
    path, files = copy(2, "stage2")
    canary = tmp_path / "canary"
    rewrite(files / name, lambda content: content.update(ds_config=[Evil(canary)]))
    refused(path, name, "refused, nothing was run")
    assert not canary.exists()


def test_deepspeed_objects_stay_records(checkpoints):
    with open_weights(checkpoints / "2" / "stage2") as weights:
        assert any(name.startswith("deepspeed.") for name in weights.source.mentioned)


def test_latest_is_a_name_and_not_a_path(copy, tmp_path):
    path, files = copy(1, "stage1")
    for text in ("../1stage1/" + files.name, "nowhere", ""):
        (path / "latest").write_text(text)
        refused(path, "latest")
    (path / "latest").unlink()
    assert len(read_state_dict(files)[0]) == 10
    with pytest.raises(CheckpointError, match="give the directory"):
        read_state_dict(files / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="existing directory"):
        convert(files, tmp_path / "no" / "w", to="safetensors")
