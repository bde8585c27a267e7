import subprocess
import sys

import pytest
import torch

from swin_scale.errors import UserError
from swin_scale.models import create_model, flops, list_models, variant
from swin_scale.models.geometry import stages

# name: (parameters, GFLOPs as printed), from the official code.
PUBLISHED = {
    "swin_tiny_patch4_window7_224": (28_288_354, 4.494),
    "swin_small_patch4_window7_224": (49_606_258, 8.747),
    "swin_base_patch4_window7_224": (87_768_224, 15.438),
    "swin_base_patch4_window12_384_finetune": (87_903_584, 47.105),
    "swin_large_patch4_window7_224_22kto1k_finetune": (196_532_476, 34.487),
    "swin_large_patch4_window12_384_22kto1k_finetune": (196_735_516, 103.952),
    "swin_base_patch4_window7_224_22k": (109_130_249, 15.460),
    "swin_large_patch4_window7_224_22k": (228_565_093, 34.519),
    "swin_tiny_c24_patch4_window8_256": (28_306_432, 5.926),
    "swinv2_tiny_patch4_window8_256": (28_347_154, 5.926),
    "swinv2_tiny_patch4_window16_256": (28_347_154, 6.605),
    "swinv2_small_patch4_window8_256": (49_728_418, 11.515),
    "swinv2_small_patch4_window16_256": (49_728_418, 12.647),
    "swinv2_base_patch4_window8_256": (87_918_816, 20.286),
    "swinv2_base_patch4_window16_256": (87_918_816, 21.796),
    "swinv2_base_patch4_window12_192_22k": (109_280_841, 11.782),
    "swinv2_large_patch4_window12_192_22k": (228_772_549, 25.997),
    "swinv2_base_patch4_window12to16_192to256_22kto1k_ft": (87_918_816, 21.796),
    "swinv2_base_patch4_window12to24_192to384_22kto1k_ft": (87_918_816, 54.748),
    "swinv2_large_patch4_window12to16_192to256_22kto1k_ft": (196_739_932, 47.491),
    "swinv2_large_patch4_window12to24_192to384_22kto1k_ft": (196_739_932, 115.417),
    "swin_mlp_tiny_c24_patch4_window8_256": (20_386_632, 4.032),
    "swin_mlp_tiny_c12_patch4_window8_256": (21_152_072, 4.032),
    "swin_mlp_tiny_c6_patch4_window8_256": (22_682_952, 4.032),
    "swin_mlp_base_patch4_window7_224": (60_659_416, 10.420),
}


# Swin-MoE: (trainable parameters with all experts in millions, GFLOPs), from the official code.
_SMALL, _BASE = "swin_moe_small_patch4_window12_192_", "swin_moe_base_patch4_window12_192_"
PUBLISHED_MOE = {
    _SMALL + "densebaseline_22k": (65.76, 6.756),
    _SMALL + "8expert_22k": (173.26, 7.181),
    _SMALL + "16expert_22k": (296.11, 7.181),
    _SMALL + "32expert_22k": (541.81, 7.181),
    _SMALL + "cosine_router_32expert_22k": (542.85, 7.181),
    _BASE + "densebaseline_22k": (109.28, 11.782),
    _BASE + "8expert_22k": (300.33, 12.537),
    _BASE + "16expert_22k": (518.66, 12.537),
    _BASE + "32expert_22k": (955.31, 12.537),
    _BASE + "cosine_router_32expert_22k": (956.66, 12.537),
}


def parameters(name, **overrides):
    """Trainable parameters; only the second biases of experts, frozen at zero in the published models, are not."""
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **overrides).parameters() if p.requires_grad)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters_and_flops(name):
    count, gflops = PUBLISHED[name]
    assert parameters(name) == count
    assert round(flops(variant(name)) / 1e9, 3) == gflops


@pytest.mark.parametrize("name", PUBLISHED_MOE)
def test_published_parameters_and_flops_with_experts(name):
    count, gflops = PUBLISHED_MOE[name]
    assert round(parameters(name) / 1e6, 2) == count
    assert round(flops(variant(name)) / 1e9, 3) == gflops


def test_parameters_grow_by_the_experts_alone():
    counts = {e: parameters(f"{_SMALL}{e}expert_22k") for e in (8, 16, 32, 64, 128)}
    each = (counts[16] - counts[8]) // 8
    # Nine layers of width 384 and one of 768: two matrices, the first bias and a row of the gate.
    assert each == sum(n * (8 * c * c + 4 * c + c) for n, c in ((9, 384), (1, 768)))
    assert all(counts[e] == counts[8] + (e - 8) * each for e in counts)
    # What one token of the published 32-expert model passes through, all gates included.
    gates = 9 * 384 + 768
    assert round((counts[32] - 31 * (each - gates)) / 1e6, 2) == 65.89
    # On blocks of SwinV2 the mixture costs the same.
    assert (
        parameters("swinv2_moe_small_patch4_window12_192_16expert_22k")
        - parameters("swinv2_moe_small_patch4_window12_192_8expert_22k")
        == 8 * each
    )


def test_a_mixture_counts_as_the_mlps_it_runs():
    name = "swinv2_moe_nano_patch4_window4_32"

    def of(**moe):
        return flops(variant(name, moe=moe))

    dense, one = flops(variant(name, moe=None)), of(capacity_factor=0)
    assert one == dense and of(capacity_factor=1.0) == dense and of(capacity_factor=-1.0) == dense
    # Two MoE blocks, each MLP of 2 * tokens * C * 4C.
    mlps = 2 * (64 * 32 * 128 + 16 * 64 * 256)
    assert of(capacity_factor=0, top_k=2) == dense + mlps and of(capacity_factor=1.5, top_k=2) == dense + 2 * mlps


@pytest.mark.parametrize(
    ("name", "headless", "headed", "last_digit"),
    [
        ("swinv2_huge_patch4_window12_192", 655.21e6, 658.03e6, 1e4),
        ("swinv2_giant1b_patch4_window12_192", 1.0610e9, 1.0646e9, 1e5),
        ("swinv2_g3b_patch4_window12_192", 2.998e9, 3.002e9, 1e6),
    ],
)
def test_billion_parameter_models(name, headless, headed, last_digit):
    head = (8 * variant(name).embed_dim + 1) * 1000
    count = parameters(name)
    assert abs(count - headed) < last_digit
    assert abs(count - head - headless) < last_digit


def test_every_name_builds_and_is_sorted():
    names = list_models()
    assert names == sorted(names) and {*PUBLISHED, *PUBLISHED_MOE} < set(names) and len(names) == 59
    for name in names:
        assert stages(variant(name)) and flops(variant(name)) > 0


def test_values_of_the_official_configs():
    v = variant("swinv2_base_patch4_window12to24_192to384_22kto1k_ft")
    assert (v.img_size, v.window_size, v.pretrained_window_sizes) == (384, 24, (12, 12, 12, 6))
    assert (v.drop_path_rate, v.num_classes) == (0.2, 1000)
    v = variant("swin_tiny_patch4_window7_224_22k")
    assert (v.img_size, v.drop_path_rate, v.num_classes) == (224, 0.1, 21841)


def test_flops_at_another_size_scale_with_the_tokens():
    v = variant("swinv2_tiny_patch4_window8_256")
    assert flops(v, (256, 512)) == pytest.approx(2 * flops(v), rel=1e-3)
    assert flops(v, 256) == flops(v)


def test_clamp_rule():
    def of(img, window):
        s = stages(variant("swinv2_nano_patch4_window4_32", img_size=img, window_size=window))[0]
        return s.window_size, s.shift_size

    assert of(32, 4) == ((4, 4), (2, 2))
    assert of(32, 8) == ((8, 8), (0, 0))  # a window as large as the map is not shifted
    assert of(32, 16) == ((8, 8), (0, 0))
    assert of((32, 64), 8) == ((8, 8), (0, 4))
    assert of((16, 64), 8) == ((4, 8), (0, 4))
    assert of(48, 3) == ((3, 3), (1, 1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"img_size": 200}, "img_size.*200.*window_size 8.*valid near 200: 64, 128, 256, 512"),
        ({"img_size": (256, 250)}, "width.*valid near 250: 64, 128, 256, 512"),
        ({"img_size": 1}, "valid near 1: 32"),
        ({"num_heads": (3, 6)}, "num_heads.*2 entries for 4 stages"),
        ({"num_heads": (5, 6, 12, 24)}, "num_heads.*96 channels of stage 0"),
        ({"pretrained_window_sizes": (8,)}, "pretrained_window_sizes.*4 entries"),
        ({"window_size": 0}, "window_size: 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"num_classes": -1}, "num_classes"),
        ({"activation_checkpointing": "full"}, "activation_checkpointing.*off, block or selective"),
        ({"windowsize": 8}, "windowsize.*did you mean window_size"),
        ({"family": "swin"}, "unknown model override 'family'"),
    ],
)
def test_refusals_name_the_key_the_value_and_the_fix(overrides, message):
    with pytest.raises(UserError, match=message):
        create_model("swinv2_tiny_patch4_window8_256", **overrides)


def test_unknown_name_lists_the_nearest():
    with pytest.raises(UserError, match=r"window9_256.*did you mean.*swinv2_tiny_patch4_window8_256"):
        create_model("swinv2_tiny_patch4_window9_256")


def test_named_sizes_of_refusals_are_valid():
    from swin_scale.models.geometry import valid_sizes

    v = variant("swin_tiny_patch4_window7_224")
    for size in valid_sizes(300, 7, v):
        stages(variant("swin_tiny_patch4_window7_224", img_size=size))


def test_the_table_needs_no_torch():
    code = (
        "import sys, swin_scale.models as m; m.flops(m.variant(m.list_models()[0])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
