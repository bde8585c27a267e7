"""Parameter groups of the real models against the official rules."""

import re

import pytest
import torch
from torch import nn

from swin_scale.config import Optim
from swin_scale.engine.optim import decays, describe_groups, layer_id, param_groups, stage_depths
from swin_scale.errors import UserError
from swin_scale.models import create_model

# The kinds of parameters that the official lists leave undecayed, one pattern a kind.
UNDECAYED = re.compile(
    r"\.bias$|norm\d?\.weight$|\.enorm\.weight$|\.q_bias$|\.v_bias$|logit_scale$|\.cpb_mlp\.|_bias_table$|absolute_pos_embed$"
)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("swin_nano_patch4_window4_32", {"ape": True}),
        ("swinv2_nano_patch4_window4_32", {"ape": True, "extra_norm_interval": 1}),
        ("swin_mlp_nano_patch4_window4_32", {}),
    ],
)
def test_two_groups_by_the_official_lists(name, overrides):
    model = create_model(name, **overrides)
    decay, rest = param_groups(model, Optim(lr=1e-3, weight_decay=0.05))
    assert (decay["name"], decay["weight_decay"], decay["lr_scale"]) == ("decay", 0.05, 1.0)
    assert (rest["name"], rest["weight_decay"], rest["lr_scale"]) == ("no_decay", 0.0, 1.0)
    names = [parameter for parameter, _ in model.named_parameters()]
    assert decay["names"] == [parameter for parameter in names if not UNDECAYED.search(parameter)]
    assert rest["names"] == [parameter for parameter in names if UNDECAYED.search(parameter)]
    own = dict(model.named_parameters())
    for group in (decay, rest):
        assert all(own[key] is parameter for key, parameter in zip(group["names"], group["params"], strict=True))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.0.blocks.1.attn.qkv.weight", (96, 32), True),
        ("head.weight", (10, 32), True),
        ("layers.0.blocks.0.attn.cpb_mlp.2.weight", (2, 512), False),
        ("encoder.layers.0.blocks.0.attn.logit_scale", (2, 1, 1), False),
        ("encoder.mask_token", (1, 1, 32), False),
        ("encoder.absolute_pos_embed", (1, 64, 32), False),
        ("decoder.0.weight", (3072, 64, 1, 1), True),
        ("layers.1.blocks.1.mlp._moe_layer.experts.batched_fc1_w", (4, 128, 32), True),
        ("layers.1.blocks.1.mlp._moe_layer.experts.batched_fc1_bias", (4, 128), False),
        ("layers.1.blocks.1.mlp._moe_layer.gates.0.wg.weight", (4, 32), True),
        ("layers.1.blocks.1.mlp._moe_layer.gates.0.cosine_projector.weight", (256, 32), False),
        ("layers.1.blocks.1.mlp._moe_layer.gates.0.sim_matrix", (256, 4), False),
        ("layers.1.blocks.1.mlp._moe_layer.gates.0.temperature", (1,), False),
    ],
)
def test_decay_rule(name, shape, expected):
    assert decays(name, torch.empty(shape)) is expected


def test_layer_decay_of_a_base_model():
    """Depths 2, 2, 18, 2 at 0.8: the numbers of the official fine-tuning of SimMIM weights."""
    with torch.device("meta"):
        model = create_model("swinv2_base_patch4_window8_256")
    groups = param_groups(model, Optim(lr=1.25e-3, layer_decay=0.8))
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert len(scale) == len(list(model.parameters()))
    assert scale["patch_embed.proj.weight"] == pytest.approx(0.003778, abs=5e-7)
    assert scale["layers.0.blocks.0.norm1.bias"] == pytest.approx(0.004722, abs=5e-7)
    assert scale["layers.3.blocks.1.mlp.fc2.weight"] == pytest.approx(0.8)
    assert scale["norm.weight"] == scale["head.weight"] == 1.0
    for stage, block in ((0, 1), (1, 1), (2, 17)):
        of_block = scale[f"layers.{stage}.blocks.{block}.attn.proj.weight"]
        assert scale[f"layers.{stage}.downsample.reduction.weight"] == of_block
        assert scale[f"layers.{stage}.downsample.norm.weight"] == of_block
    keys = [tuple(re.fullmatch(r"layer_(\d+)_(\w+)", group["name"]).groups()) for group in groups]
    assert keys == sorted(keys, key=lambda key: (int(key[0]), key[1] != "decay"))
    assert [int(layer) for layer, _ in keys] == [layer for layer in range(26) for _ in range(2)]


@pytest.mark.parametrize("layer_decay", [1.0, 0.8])
def test_spread_experts_are_groups_of_their_own(layer_decay):
    """Each with its layer's rate and decay; gates and everything else stay where they are."""
    optim = Optim(lr=1.0, weight_decay=0.1, layer_decay=layer_decay)
    with torch.device("meta"):
        model = create_model("swin_moe_nano_patch4_window4_32")
    experts = [parameter for name, parameter in model.named_parameters() if "._moe_layer.experts." in name]
    together, apart = param_groups(model, optim), param_groups(model, optim, experts)

    def options(groups):
        return {n: (g["weight_decay"], g["lr_scale"]) for g in groups for n in g["names"]}

    assert options(apart) == options(together)
    for group in apart:
        kinds = {"._moe_layer.experts." in name for name in group["names"]}
        assert kinds == {group["name"].endswith("_experts")}
    order = [name.removesuffix("_experts") for name in (group["name"] for group in apart)]
    assert list(dict.fromkeys(order)) == [group["name"] for group in together]


def test_layer_ids_of_the_rest():
    depths = (2, 2, 18, 2)
    assert layer_id("encoder.mask_token", depths) == layer_id("patch_embed.norm.bias", depths) == 0
    assert layer_id("encoder.layers.2.blocks.17.enorm.weight", depths) == 22
    assert layer_id("absolute_pos_embed", depths) == layer_id("decoder.0.weight", depths) == 25
    assert stage_depths(["encoder.layers.1.blocks.10.x", "encoder.layers.0.blocks.1.x", "head.weight"]) == (2, 11)


def test_frozen_and_shared_parameters():
    model = create_model("swinv2_nano_patch4_window4_32")
    model.patch_embed.requires_grad_(False)
    names = [name for group in param_groups(model, Optim(lr=1.0)) for name in group["names"]]
    assert not any(name.startswith("patch_embed.") for name in names)
    assert len(names) == sum(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        param_groups(model, Optim(lr=1.0))
    tied = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    tied["b"].weight = tied["a"].weight
    groups = param_groups(tied, Optim(lr=1.0))
    assert [name for group in groups for name in group["names"]] == ["a.weight", "a.bias", "b.bias"]


def test_table():
    groups = param_groups(create_model("swinv2_nano_patch4_window4_32"), Optim(lr=1.0, weight_decay=0.1))
    head, decay, rest = describe_groups(groups).splitlines()
    assert head.split()[:3] == ["group", "tensors", "parameters"]
    total = sum(int(line.split()[2].replace(",", "")) for line in (decay, rest))
    assert total == sum(parameter.numel() for parameter in create_model("swinv2_nano_patch4_window4_32").parameters())
    assert decay.split()[3:5] == ["0.1", "1"]
    assert "patch_embed.proj.weight" in decay and "patch_embed.proj.bias" in rest
