"""Swin-MoE beside a checkout of the official repository (SWIN_OFFICIAL) with Tutel: whole models on the same weights.

Weights load strictly both ways; logits and auxiliary loss agree to 1e-5, in eval and in training mode, where Tutel and
the native layer draw the same gate noise from torch's generator. Dropout and drop path, whose draws differ, are off.
"""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from swin_scale.models import create_model, list_models, variant
from tests.models.official import CHECKOUT, WITHOUT_CHECKOUT, build_official, perturb, split_derived

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(not CHECKOUT, reason=WITHOUT_CHECKOUT),
    pytest.mark.skipif(importlib.util.find_spec("tutel") is None, reason="Tutel is not installed"),
]
EVAL_CAPACITY = 1.25
"""The official code evaluates with the capacity it trained with."""
# A pair of the largest needs 8 GB and minutes; what sets them apart from these is the number of experts alone.
NAMES = [
    "swin_moe_small_patch4_window12_192_8expert_22k",
    "swin_moe_small_patch4_window12_192_cosine_router_32expert_22k",
    "swin_moe_base_patch4_window12_192_8expert_22k",
]


def official_stem(name):
    """The config's stem, which has the number of GPUs in it, as a glob."""
    return re.sub(r"(\d+expert)_22k", r"\1_*gpu_22k", name)


def pair(name, gshard=False, noise=1.0):
    """(official, ours) with the same weights, loaded strictly both ways, and without dropout of any kind."""
    v = variant(name)
    changes = {
        "MODEL.DROP_PATH_RATE": 0.0,
        "MODEL.SWIN_MOE.MOE_DROP": 0.0,
        "MODEL.SWIN_MOE.NUM_LOCAL_EXPERTS": v.moe.num_experts,
        "MODEL.SWIN_MOE.IS_GSHARD_LOSS": gshard,
        "MODEL.SWIN_MOE.GATE_NOISE": noise,
    }
    official = build_official(official_stem(name), v.num_classes, changes)
    perturb(official, torch.Generator().manual_seed(1))
    weights, derived = split_derived(official.state_dict())
    moe = {
        "drop": 0.0,
        "eval_capacity_factor": EVAL_CAPACITY,
        "gate_noise": noise,
        "balance": "gshard" if gshard else "load_importance",
    }
    ours = create_model(name, drop_path_rate=0.0, moe=moe)
    ours.load_state_dict(weights, strict=True)
    official.load_state_dict(ours.state_dict() | derived, strict=True)
    return official, ours


def assert_agree(official, ours, mode, capsys):
    size = ours.variant.img_size
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    results = []
    with torch.no_grad():
        for model, options in ((official, {}), (ours, {"stats": True})):
            torch.manual_seed(3)
            results.append(model.train(mode == "train")(x, **options))
    (expected, expected_aux), (got, aux, stats) = results
    difference = (expected - got).abs().max().item()
    dropped = sum(int(s.dropped) for s in stats.values())
    capsys.readouterr()
    with capsys.disabled():
        sys.stdout.write(
            f"\n{mode}: logits to {expected.abs().max():.2f}, largest difference {difference:.1e}; aux {aux:.6f}, "
            f"difference {abs(aux - expected_aux):.1e}; {dropped} choices dropped"
        )
    assert dropped > 0, "weights too even to tell capacities apart"
    assert difference <= 1e-5 and abs(aux - expected_aux) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_published_model_in_eval_and_with_the_same_gate_noise(name, process_group, capsys):
    official, ours = pair(name)
    for mode in ("eval", "train"):
        assert_agree(official, ours, mode, capsys)


def test_training_without_noise(process_group, capsys):
    """Tutel's load needs noise, so without it the balance loss is GShard's."""
    assert_agree(*pair(NAMES[0], gshard=True, noise=0.0), "train", capsys)


def official_files():
    return {re.sub(r"_\d+gpu", "", path.stem): path for path in Path(CHECKOUT, "configs", "swinmoe").glob("*.yaml")}


def test_every_official_config_has_a_name_with_its_values():
    files = official_files()
    assert len(files) == 11 and files.keys() <= set(list_models())
    for name, path in files.items():
        v, model = variant(name), yaml.safe_load(path.read_text())["MODEL"]
        swin = model["SWIN_MOE"]
        blocks = tuple(() if stage == [-1] else tuple(stage) for stage in swin["MOE_BLOCKS"])
        assert v.moe_blocks == (blocks if v.moe else ())
        assert (v.embed_dim, v.window_size) == (swin["EMBED_DIM"], swin["WINDOW_SIZE"])
        assert (list(v.depths), list(v.num_heads)) == (swin["DEPTHS"], swin["NUM_HEADS"])
        assert (v.drop_path_rate, v.mlp_fc2_bias) == (model["DROP_PATH_RATE"], swin["MLP_FC2_BIAS"])
        assert v.init_std == swin.get("INIT_STD", 0.02)
        if v.moe is None:
            assert not any(blocks)
            continue
        # The signed count of the files: experts of a rank, or minus the ranks that share one.
        ranks, local = int(re.search(r"(\d+)gpu", path.stem)[1]), swin["NUM_LOCAL_EXPERTS"]
        assert v.moe.num_experts == (ranks * local if local > 0 else ranks // -local)
        assert (v.moe.top_k, v.moe.capacity_factor) == (swin["TOP_VALUE"], swin["CAPACITY_FACTOR"])
        assert (v.moe.drop, v.moe.aux_weight) == (swin["MOE_DROP"], swin["AUX_LOSS_WEIGHT"])
        assert (v.moe.router == "cosine") == swin.get("COSINE_ROUTER", False)
        assert (v.moe.balance == "gshard") == swin["IS_GSHARD_LOSS"] and not v.moe.fc2_bias
