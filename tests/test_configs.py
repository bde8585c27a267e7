"""Every shipped recipe: what it resolves to, its model, its DeepSpeed config, its schedule and its header."""

import dataclasses
import difflib
import json
import re
import subprocess
import sys

import pytest

from swin_scale.cli import main
from swin_scale.config_load import config_from_text, dump_config
from swin_scale.engine.ds_config import to_deepspeed
from swin_scale.recipes import recipes as paths
from swin_scale.tasks import MaskedImages
from tests.golden_configs import write
from tests.recipes import DATASETS, parameters, recipes

RECIPES = {recipe.name: recipe for recipe in recipes()}
OFFICIAL_TAGS = {
    # The names that the official repositories give these files; the others have theirs.
    "simmim/pretrain_swin_base_window6_192_800ep": "simmim_pretrain__swin_base__img192_window6__800ep",
    "simmim/pretrain_swinv2_base_window12_192_800ep": "simmim_pretrain__swinv2_base__img192_window12__800ep",
    "simmim/finetune_swin_base_window7_224_800ep": "simmim_finetune__swin_base__img224_window7__800ep",
    "simmim/finetune_swinv2_base_window14_224": "simmim_finetune__swinv2_base__img224_window14__800ep",
}


def test_golden_files():
    """No default, rate or size changes silently. Every model is built on the meta device for it."""
    golden, found = write.texts(), {path.name: path.read_text() for path in write.HERE.glob("*.yaml")}
    changed = []
    for name in sorted(golden.keys() | found.keys()):
        before, after = found.get(name, "").splitlines(), golden.get(name, "").splitlines()
        changed += difflib.unified_diff(before, after, f"golden {name}", f"now {name}", lineterm="", n=1)
    shown = changed[:60] + [f"... and {len(changed) - 60} lines more"] * (len(changed) > 60)
    assert not changed, f"recipes resolve otherwise now; if that is meant, {write.RENEW}\n" + "\n".join(shown)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_follows(name):
    """Its batch is cut, its DeepSpeed config and its schedule follow, its YAML reads back."""
    recipe = RECIPES[name]
    config, plan = recipe.config, recipe.plan
    settings = to_deepspeed(config, plan, on_gpu=True)
    assert settings["train_batch_size"] == plan.micro * plan.accumulation * plan.ranks == config.train.global_batch
    json.dumps(settings)
    schedule = recipe.schedule
    samples = range(0, schedule.total, max(1, schedule.total // 1000))
    assert max(map(schedule.lr, samples)) == pytest.approx(schedule.peak_lr, rel=0.15)
    assert schedule.lr(0) == schedule.warmup_lr
    assert all(schedule.lr(step) > 0 for step in samples)
    assert config_from_text(dump_config(config), name) == config
    if config.task == "simmim":
        sized = dataclasses.replace(config, data=dataclasses.replace(config.data, img_size=recipe.network.img_size))
        MaskedImages.resolved(sized, {}, ())  # cells fit the decoder and leave something to see


@pytest.mark.parametrize("name", paths())
def test_header(name):
    """What it is, command, cost, expectation, rank counts; the command names this file, the cost is what follows."""
    text = paths()[name].read_text()
    header = re.match(r"(#.*\n)+", text)
    assert header, "a recipe begins with a comment"
    lines = header[0].splitlines()
    assert re.fullmatch(r"# \S.*[.:]", lines[0]) and len(lines[0]) <= 122, lines[0]
    command = re.search(r"^# command:.* (?:train|--nproc \d+) (\S+)", header[0], re.M)
    assert command and command[1].removeprefix("configs/").removesuffix(".yaml") == name
    own = [recipe for recipe in RECIPES.values() if recipe.name.partition(":")[0] == name]
    if own[0].config.data.train[0].startswith("demo/") or ":" in own[0].name:
        return
    (recipe,) = own
    assert re.search(r"^# expected: \S", header[0], re.M)
    cost = re.search(r"^# cost: +(.*)", header[0], re.M)
    assert cost and cost[1] == recipe.cost
    size = re.search(r"^# ranks: +any count that divides (\d+)", header[0], re.M)
    assert size is None or int(size[1]) == recipe.config.train.global_batch


def test_base_and_run_directory_are_its_own():
    """A thin file that forgot `run.dir` would write into the run of its base."""
    directories = [recipe.config.run.dir for recipe in RECIPES.values()]
    assert len(set(directories)) == len(directories)
    stems = [path.stem for path in paths().values()]
    assert len(set(stems)) == len(stems)


def test_where_fine_tuning_starts_is_a_recipe_too():
    """`init.weights` of a recipe is the run of another, of the same model, or a file that is named as published."""
    runs = {recipe.config.run.dir: recipe for recipe in RECIPES.values()}
    starts = {recipe.name: recipe for recipe in RECIPES.values() if recipe.config.init.weights}
    assert len(starts) > 20
    for name, recipe in starts.items():
        weights = recipe.config.init.weights
        if weights.endswith(".pth"):
            continue
        source, ours = runs[weights].network, recipe.network
        assert (source.family, source.embed_dim, source.depths) == (ours.family, ours.embed_dim, ours.depths), name
        trained = [source.window_size] * (len(source.depths) - 1) + [min(source.window_size, source.img_size // 32)]
        if ours.family == "swinv2" and ours.window_size != source.window_size and ":" not in name:
            assert list(ours.pretrained_window_sizes) == trained, name


# -- what the official configs say -------------------------------------------------------------------------------------


def test_every_official_config_has_its_recipe():
    """15 of Swin V1, 12 of V2, 4 of Swin-MLP, 11 of Swin-MoE, 4 of SimMIM, as in the official repository."""
    rooms = {room: [name for name in RECIPES if RECIPES[name].room == room] for room in ("imagenet", "moe", "simmim")}
    families = [RECIPES[name].network.family for name in rooms["imagenet"]]
    assert [families.count(family) for family in ("swin", "swinv2", "swin_mlp")] == [15, 12, 4]
    released = {"8expert", "16expert", "32expert", "densebaseline"}
    assert {f"moe/swin_moe_{size}_{what}_22k" for size in ("small", "base") for what in released} <= set(RECIPES)
    assert set(OFFICIAL_TAGS) <= set(rooms["simmim"])
    grid = {f"simmim/pretrain_swinv2_{size}_window12_192_{steps}k" for size in ("small", "base", "large", "huge",
            "giant1b") for steps in (125, 250, 500)}  # fmt: skip
    assert grid <= set(RECIPES)


@pytest.mark.parametrize("steps", [125, 250, 500])
@pytest.mark.parametrize("size", ["small", "base", "large", "huge", "giant1b"])
def test_the_grid_has_its_lengths(size, steps):
    """Epochs of ImageNet-1K at 2,048 images are 625 steps; the rate falls to a tenth at 7/8, warm-up is 10 epochs."""
    recipe = RECIPES[f"simmim/pretrain_swinv2_{size}_window12_192_{steps}k"]
    schedule = recipe.schedule
    assert schedule.total == steps * 1000 and schedule.warmup == 6250
    drop = schedule.total * 7 // 8
    rates = [schedule.lr(step) for step in (0, 6250, drop - 1, drop, schedule.total - 1)]
    assert rates == pytest.approx([2e-6, 4e-4, 4e-4, 4e-5, 4e-5])
    assert recipe.config.simmim.norm_target == 47 and recipe.network.window_size == 12
    stated = re.search(r"epochs=(\d+) train\.max_steps=(\d+)\n.*multisteps=\[([\d.]+)\]", recipe.path.read_text())
    if size == "small":
        assert stated is None  # not published on ImageNet-22K
        return
    assert stated
    per_epoch = DATASETS["shards/imagenet22k/train"][0] // 2048
    assert int(stated[2]) == schedule.total <= int(stated[1]) * per_epoch < schedule.total + per_epoch
    assert float(stated[3]) * per_epoch == pytest.approx(drop, abs=per_epoch / 100)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # (epoch, absolute rate): the curves of the official schedulers at the official batches.
        ("imagenet/swin_tiny_patch4_window7_224", [(0, 1e-6), (10, 5.005e-4), (20, 9.8918e-4), (300, 1e-5)]),
        ("imagenet/swinv2_base_patch4_window12_192_22k", [(0, 1e-6), (2.5, 5.005e-4), (5, 9.9248e-4), (90, 1e-5)]),
        ("imagenet/swinv2_base_patch4_window12to24_192to384_22kto1k_ft", [(0, 4e-8), (5, 3.7347e-5), (30, 4e-7)]),
        ("moe/swin_moe_small_8expert_22k", [(0, 1e-6), (10, 9.7015e-4), (90, 1e-5)]),
        ("simmim/pretrain_swinv2_base_window12_192_800ep", [(0, 2e-6), (10, 4e-4), (699, 4e-4), (700, 4e-5)]),
        ("simmim/pretrain_swin_base_window6_192_100ep", [(0, 4e-6), (10, 7.8142e-4), (100, 4e-5)]),
        ("simmim/finetune_swinv2_base_window14_224", [(0, 1e-6), (20, 4.52264e-3), (50, 2.5005e-3), (100, 1e-6)]),
        ("giant/swinv2_g3b_stage1_simmim", [(0, 1.4e-6), (20, 1.4e-5)]),
    ],
)
def test_learning_rates(name, rates):
    recipe = RECIPES[name]
    found = [recipe.schedule.lr(round(epoch * recipe.steps_per_epoch)) for epoch, _ in rates]
    assert found == pytest.approx([rate for _, rate in rates], rel=1e-3)


def test_published_sizes():
    """Parameters and GFLOPs of the official tables."""
    for name, count, gflops in (
        ("imagenet/swin_tiny_patch4_window7_224", 28_288_354, 4.494),
        ("imagenet/swinv2_large_patch4_window12to24_192to384_22kto1k_ft", 196_739_932, 115.417),
        ("imagenet/swin_mlp_base_patch4_window7_224", 60_659_416, 10.420),
        ("imagenet/swinv2_base_patch4_window12_192_22k", 109_280_841, 11.782),
    ):
        assert parameters(RECIPES[name]) == count
        assert RECIPES[name].macs / 1e9 == pytest.approx(gflops, abs=5e-4)
    head, mask_token, decoder = 21_841 * 1025, 128, 3_148_800
    simmim = RECIPES["simmim/pretrain_swinv2_base_window12_192_800ep"]
    assert parameters(simmim) == 109_280_841 - head + mask_token + decoder


# -- the verbs ---------------------------------------------------------------------------------------------------------


def test_list_groups_and_says_what_each_is(capsys):
    assert main(["configs", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, path in paths().items():
        what = path.read_text().partition("\n")[0].removeprefix("# ")
        assert any(line.split() == [name, *what.split()] for line in lines), name
    groups = [line for line in lines if line and not line.startswith(" ")]
    assert len(groups) == len({name.partition("/")[0] if "/" in name else "" for name in paths()})


def test_show_names_origins(capsys):
    assert main(["configs", "show", "demo", "train.epochs=3"]) == 0
    shown = capsys.readouterr().out
    assert "epochs: 3" in shown
    assert any("epochs: 3" in line and "# command line" in line for line in shown.splitlines())


def test_an_unknown_name_is_told_the_nearest():
    wrong = subprocess.run(
        [sys.executable, "-m", "swin_scale", "configs", "show", "dmeo"], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "did you mean demo" in wrong.stderr
