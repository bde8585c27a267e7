"""Every shipped recipe: it resolves, its model builds on the meta device, its DeepSpeed config and schedule follow."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swin_scale.config import batch_plan
from swin_scale.config_load import load_config
from swin_scale.engine.ds_config import to_deepspeed
from swin_scale.engine.schedule import Schedule
from swin_scale.models import create_model

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_builds(path):
    assert path.read_text().startswith("# ")
    config = load_config(path).config
    overrides = {k: v for k, v in dataclasses.asdict(config.model).items() if k != "name" and v is not None}
    with torch.device("meta"):
        model = create_model(config.model.name, **overrides)
    assert all(parameter.is_meta for parameter in model.parameters())
    for ranks in (config.moe.ep_size, 2 * config.moe.ep_size):
        plan = batch_plan(config, ranks)
        settings = to_deepspeed(config, plan, on_gpu=True)
        assert settings["train_batch_size"] == (
            settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"] * ranks
        )
        json.dumps(settings)
    schedule = Schedule.from_config(config, steps_per_epoch=100)
    rates = [schedule.lr(step) for step in range(schedule.total)]
    assert max(rates) == pytest.approx(schedule.peak_lr, rel=0.02)
    assert rates[0] == schedule.warmup_lr


def test_configs_verbs_name_recipes_and_origins():
    listed = subprocess.run(
        [sys.executable, "-m", "swin_scale", "configs", "list"], capture_output=True, text=True, check=True
    ).stdout
    assert len(listed.splitlines()) == len(CONFIGS)
    shown = subprocess.run(
        [sys.executable, "-m", "swin_scale", "configs", "show", "demo", "train.epochs=3"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "epochs: 3" in shown
    assert any("epochs: 3" in line and "# command line" in line for line in shown.splitlines())
    wrong = subprocess.run(
        [sys.executable, "-m", "swin_scale", "configs", "show", "dmeo"], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "did you mean demo" in wrong.stderr


def test_official_recipe_reaches_the_published_rates():
    """1.25e-4 per 512 at a batch of 4096 is 1e-3 (official README)."""
    path = next(path for path in CONFIGS if path.stem == "swinv2_base_patch4_window12_192_22k")
    assert Schedule.from_config(load_config(path).config, 3464).peak_lr == pytest.approx(1e-3)
