"""Layers start the same whatever the ranks their experts are spread over."""

import math

import torch

from swin_scale.moe.config import MoEConfig
from swin_scale.moe.experts import Experts
from swin_scale.moe.initial import initial_value
from swin_scale.moe.router import Router


def values(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    named = [name for name, _ in module.named_parameters(recurse=False)]
    return {name: initial_value(module, name, 0.02, generator) for name in named}, generator.get_state()


def test_an_expert_starts_the_same_on_any_rank():
    whole, state = values(Experts(6, 6, 0, 4, 8, 0.0, True))
    for first in (0, 2, 4):
        part, same = values(Experts(6, 2, first, 4, 8, 0.0, True))
        assert torch.equal(same, state), "what is drawn next is the same too"
        for name, value in part.items():
            assert torch.equal(value, whole[name][first : first + 2])


def test_weights_are_normal_biases_zero_and_the_cosine_gate_as_tutels():
    experts, _ = values(Experts(4, 4, 0, 64, 256, 0.0, True))
    assert not experts["batched_fc1_bias"].any() and not experts["batched_fc2_bias"].any()
    for name in ("batched_fc1_w", "batched_fc2_w"):
        assert abs(float(experts[name].std()) / 0.02 - 1) < 0.02 and abs(float(experts[name].mean())) < 5e-4
    gate, _ = values(Router(MoEConfig(num_experts=32, router="cosine", cosine_init_t=0.25), 8))
    assert float(gate["temperature"]) == float(torch.tensor(math.log(4)))
    assert abs(float(gate["sim_matrix"].std()) / 0.01 - 1) < 0.05


def test_other_modules_are_none_of_its_business():
    assert initial_value(torch.nn.Linear(2, 2), "weight", 0.02, torch.Generator()) is None
