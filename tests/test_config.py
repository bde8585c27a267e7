"""The configuration tree and its loading: YAML without surprises, exact types, origins, the graded diff."""

import dataclasses
import random

import pytest

from swin_scale.config import batch_plan, learning_rate_scale
from swin_scale.config_diff import IMPOSSIBLE, SAFE, diff_configs
from swin_scale.config_load import (
    all_keys,
    config_from_text,
    config_from_values,
    dump_config,
    flatten,
    load_config,
)
from swin_scale.errors import UserError
from swin_scale.strict_yaml import parse_yaml

MINIMAL = {
    "run": {"dir": "r"},
    "data": {"train": ["shards"]},
    "model": {"name": "swinv2_nano_patch4_window4_32"},
    "optim": {"lr": 1e-3},
    "train": {"global_batch": 64},
}


def build(**sections):
    values = {name: dict(section) for name, section in MINIMAL.items()}
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return config_from_values(values).config


@pytest.fixture
def write(tmp_path):
    def write(text, name="c.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("5E-4", 5e-4),
        ("1.5e-2", 1.5e-2),
        (".5", 0.5),
        ("1_000_000", 1_000_000),
        ("010", "010"),
        ("0o10", "0o10"),
        ("0x1F", "0x1F"),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("12:30:00", "12:30:00"),
        ("2026-01-01", "2026-01-01"),
        ("true", True),
        ("null", None),
        ("[1, 2.0, a]", [1, 2.0, "a"]),
        ("1.2.3", "1.2.3"),
    ],
)
@pytest.mark.fault(23, "1e-3, on, off, 010, 12:30:00 and the like")
def test_yaml_scalars_mean_what_a_person_expects(text, value):
    parsed = parse_yaml(text, "x")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "'a' appears twice"),
        ("a: &x 1\nb: *x\n", "aliases"),
        ("a: !!python/object/apply:os.system ['touch CANARY']\n", "tag"),
        ("!!python/object:os.system {}", "tag"),
        ("a: !!timestamp 2026-01-01", "tag"),
        ("1: a", "not text"),
        ("a: [", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("- " * 5_000, "nested deeper than 64"),
        ("[" * 100_000, "nested deeper than 64"),
        ("{a: " * 1_000, "nested deeper than 64"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
    ],
)
@pytest.mark.fault(23, "tags that run code, duplicate keys, aliases, broken syntax")
def test_yaml_that_runs_code_or_surprises_is_refused(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        parse_yaml(text.replace("CANARY", str(tmp_path / "canary")), "file.yaml")
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(23, "alias bomb")
def test_alias_bomb_is_refused_before_it_expands():
    levels = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12))
    with pytest.raises(UserError, match="aliases"):
        parse_yaml(f"l0: &l0 x\n{levels}\n", "bomb.yaml")


def test_precedence_and_origin(write):
    write(
        "run: {dir: base}\ndata: {train: [a]}\nmodel: {name: m}\noptim: {lr: 1e-3}\ntrain: {global_batch: 8}\n",
        "b.yaml",
    )
    child = write("base: b.yaml\nrun: {seed: 3}\ntrain: {global_batch: 16, epochs: 2}\n")
    loaded = load_config(child, ["train.epochs=5", "optim.betas=[0.9, 0.95]"])
    config = loaded.config
    assert (config.run.dir, config.run.seed, config.train.global_batch, config.train.epochs) == ("base", 3, 16, 5)
    assert config.optim.betas == (0.9, 0.95)
    origins = {key: loaded.origin[key] for key in ("run.dir", "run.seed", "train.epochs", "optim.betas", "optim.eps")}
    assert origins == {
        "run.dir": "b.yaml",
        "run.seed": "c.yaml",
        "train.epochs": "command line",
        "optim.betas": "command line",
        "optim.eps": "default",
    }


def test_base_cycle_is_refused(write):
    write("base: c.yaml\n", "b.yaml")
    with pytest.raises(UserError, match="reached twice"):
        load_config(write("base: b.yaml\n"))


def test_dump_reads_back_equal_for_every_key():
    config = build(
        data={"img_size": [192, 256], "weights": [2.5]},
        run={"dir": 'quo"te\\and: #hash'},
        schedule={"multisteps": [1, 2.5]},
        model={"depths": [2, 2], "ape": True},
    )
    assert config_from_text(dump_config(config), "x") == config


@pytest.mark.fault(23, "unknown key: one edit away from any key")
@pytest.mark.parametrize("key", [k for k in all_keys() if len(k.rpartition(".")[2]) > 3])
def test_one_edit_typo_of_any_key_names_the_key(key, write):
    rng = random.Random(key)
    head, dot, last = key.rpartition(".")
    typos = [f"{head}{dot}{last[:i]}{last[i + 1 :]}" for i in range(len(last))]
    typo = rng.choice([t for t in typos if t not in all_keys()])
    path = write(dump_config(build()))
    with pytest.raises(UserError) as error:
        load_config(path, [f"{typo}=1"])
    assert f"unknown key {typo}" in str(error.value)
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("train.epochs=many", ["train.epochs", "'many'", "whole number"]),
        ("train.epochs=true", ["train.epochs", "True"]),
        ("train.epochs=1.5", ["train.epochs", "1.5"]),
        ("engine.precision=fp15", ["engine.precision", "fp15", "fp16"]),
        ("engine.zero_stage=4", ["engine.zero_stage", "4", "0, 1, 2, 3"]),
        ("engine.zero_stage=0", ["engine.zero_stage", "fp32", "engine.precision", "bf16"]),
        ("optim.betas=[0.9]", ["optim.betas", "2"]),
        ("optim.lr=.nan", ["optim.lr"]),
        ("optim.lr=-1", ["optim.lr", "above 0"]),
        ("optim.lr_per_512=1e-3", ["optim.lr_per_512", "exactly one"]),
        ("data.train=[]", ["data.train", "empty"]),
        ("data.weights=[1, 2]", ["data.weights", "2 values for 1"]),
        ("augment.hflip=1.5", ["augment.hflip", "between 0 and 1"]),
        ("schedule.name=multistep", ["schedule.multisteps"]),
        ("model=3", ["model", "section"]),
        ("train.epochs.x=3", ["train.epochs"]),
        ("train.epochs", ["train.epochs", "section.key=value"]),
    ],
)
def test_bad_values_name_key_value_and_fix(override, names, write):
    with pytest.raises(UserError) as error:
        load_config(write(dump_config(build())), [override])
    for name in names:
        assert name in str(error.value)


def test_stage_0_has_nothing_to_offload():
    with pytest.raises(UserError, match=r"engine\.offload is optimizer.*engine\.zero_stage=1"):
        build(engine={"zero_stage": 0, "precision": "fp32", "offload": "optimizer"})


def test_missing_required_key():
    with pytest.raises(UserError, match=r"train\.global_batch is missing"):
        config_from_values({**MINIMAL, "train": {}})


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        build().train.epochs = 3


@pytest.mark.parametrize(("ranks", "micro", "expected"), [(1, "auto", (64, 1)), (2, 8, (8, 4)), (4, "auto", (16, 1))])
def test_batch_plan_is_the_product(ranks, micro, expected):
    plan = batch_plan(build(train={"micro_batch": micro}), ranks)
    assert (plan.micro, plan.accumulation) == expected
    assert plan.micro * plan.accumulation * ranks == 64


def test_batch_plan_names_the_nearest_counts():
    with pytest.raises(UserError, match="use 4 or 8 ranks"):
        batch_plan(build(), 5)
    with pytest.raises(UserError, match="nearest that does is 4"):
        batch_plan(build(train={"micro_batch": 5}), 4)
    with pytest.raises(UserError, match="must be even"):
        batch_plan(build(train={"micro_batch": 1}), 4)
    assert batch_plan(build(train={"micro_batch": 1}, augment={"mixup_prob": 0.0}), 4).accumulation == 16


def test_lr_per_512_scales_with_the_global_batch():
    assert learning_rate_scale(build()) == 1.0
    assert learning_rate_scale(build(optim={"lr": None, "lr_per_512": 5e-4}, train={"global_batch": 1024})) == 2.0


@pytest.mark.fault(25, "learning rate, batch, width and window changed: graded")
def test_diff_is_typed_and_graded():
    before = build()
    after = build(
        train={"max_steps": 5, "global_batch": 128}, optim={"lr": 2e-3}, model={"embed_dim": 64, "window_size": 4}
    )
    changes = {change.key: change for change in diff_configs(before, after)}
    assert {key: change.grade for key, change in changes.items()} == {
        "train.max_steps": "safe",
        "optim.lr": "needs --allow-change",
        "model.embed_dim": "impossible",
        "model.window_size": "needs --allow-change",
        "train.global_batch": "impossible",
    }
    assert str(changes["optim.lr"]) == "optim.lr: 0.001 -> 0.002 (needs --allow-change)"
    assert diff_configs(before, before) == []


def test_graded_keys_exist():
    assert set(SAFE) | set(IMPOSSIBLE) <= {key for key, _ in flatten(build())}
    assert not set(SAFE) & set(IMPOSSIBLE)
