"""The engine and the main job on one GPU with NCCL, world 1."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from swin_scale.config import Optim
from swin_scale.engine.fragments import import_deepspeed
from swin_scale.engine.optimizers import check_optimizer
from swin_scale.errors import UserError
from swin_scale.kernels.apex import layer_norm, why_not_apex
from tests.engine.test_optimizers import RULES, check_update_rule
from tests.spawn import spawn

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
NANO, BASE = "swinv2_nano_patch4_window4_32", "swinv2_base_patch4_window12_192_22k"
HALVES = ("fp16", "bf16")


def engine_steps(name, precision, batch, steps, poisoned):
    """Steps on a fixed batch, with an infinite pixel in those of `poisoned`: (loss, skipped, scale, update) of each."""
    from swin_scale.config import batch_plan
    from swin_scale.config_load import config_from_values
    from swin_scale.engine.dist import init
    from swin_scale.engine.engine import Engine, MicroBatch
    from swin_scale.engine.layout import Layout
    from swin_scale.engine.losses import smooth_targets
    from swin_scale.engine.schedule import Schedule
    from swin_scale.models import create_model, variant
    from swin_scale.tasks.classify import losses

    v = variant(name)
    config = config_from_values(
        {
            "run": {"dir": "r"},
            "data": {"train": ["d"]},
            "model": {"name": name},
            "optim": {"lr": 5e-4},
            "schedule": {"warmup_steps": 0, "total_steps": 100},
            "train": {"global_batch": batch},
            "engine": {"precision": precision},
        }
    ).config
    with init(Layout(), timeout_s=120, device="cuda") as dist:
        assert dist.backend == "nccl"
        engine = Engine(
            create_model(name, drop_path_rate=0.0),
            config,
            batch_plan(config, 1),
            Schedule.from_config(config, 10),
            dist,
            losses=losses,
        )
        torch.manual_seed(0)
        images = torch.randn(batch, 3, v.img_size, v.img_size, device="cuda", dtype=engine.dtype)
        labels = torch.randint(v.num_classes, (batch,), device="cuda")
        targets = smooth_targets(labels, v.num_classes, 0.0)
        valid = torch.ones(batch, dtype=torch.bool, device="cuda")
        results = []
        for step in range(steps):
            inputs = images.clone()
            if step in poisoned:
                inputs[0, 0, 0, 0] = torch.inf
            before = [p.detach().clone() for p in engine.module.parameters()]
            r = engine.train_step(step, [MicroBatch(inputs=inputs, targets=targets, valid=valid)], batch)
            after = engine.module.parameters()
            moved = not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
            results.append((float(r.loss), r.skipped, r.loss_scale, moved))
        return results


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize(("name", "batch"), [(NANO, 64), (BASE, 16)])
def test_loss_falls_on_one_batch(name, batch, precision):
    [results] = spawn(1, engine_steps, name, precision, batch, 12, (), timeout=120)
    taken = [loss for loss, skipped, *_ in results if not skipped]
    assert len(taken) >= 8, results
    assert all(map(math.isfinite, taken)) and taken[-1] < taken[0] - 0.1, results


@pytest.mark.parametrize("precision", HALVES)
def test_a_forced_overflow_skips_exactly_that_update(precision):
    [results] = spawn(1, engine_steps, NANO, precision, 16, 12, (8,), timeout=120)
    loss, skipped, scale, moved = results[8]
    assert skipped and not moved and not math.isfinite(loss)
    for loss, skipped, _, moved in (results[7], *results[9:]):
        assert not skipped and moved and math.isfinite(loss), results
    if precision == "fp16":
        assert results[9][2] == scale / 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """96 images of 4 classes whose colours tell them apart."""
    from PIL import Image

    from data_prep.write import write_shards

    root = tmp_path_factory.mktemp("gpu")
    generator = np.random.default_rng(0)
    for i in range(96):
        folder = root / "images" / f"class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 60, (40, 40, 3), dtype=np.uint8)
        pixels[..., i % 3] += np.uint8(40 * (i % 4))
        Image.fromarray(pixels).save(folder / f"{i}.png")
    write_shards(root / "images", root / "shards", samples_per_shard=32, workers=1)
    return root / "shards"


def train(run_dir, shards, precision, stop):
    """`swin-scale train` for `stop` steps of 12; returns the step rows, the last of each step."""
    config = {
        "run": {"dir": str(run_dir)},
        "data": {"train": [str(shards)], "workers": 1},
        "model": {"name": NANO, "drop_path_rate": 0.0},
        "optim": {"lr": 5e-4},
        "schedule": {"warmup_steps": 2, "total_steps": 12},
        "train": {"global_batch": 24, "epochs": 3, "max_steps": stop, "tensorboard": False},
        "engine": {"precision": precision},
    }
    path = run_dir.with_suffix(".yaml")
    path.write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "swin_scale", "train", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in rows if "event" not in row}


@pytest.mark.parametrize("precision", HALVES)
def test_a_resumed_run_sees_the_same_batches_and_losses(precision, shards, tmp_path, record_property):
    whole = train(tmp_path / "whole", shards, precision, 12)
    train(tmp_path / "parts", shards, precision, 5)
    parts = train(tmp_path / "parts", shards, precision, 12)
    assert list(whole) == list(parts) == list(range(1, 13))
    assert [r["batch_digest"] for r in whole.values()] == [r["batch_digest"] for r in parts.values()]
    assert [r["loss_scale"] for r in whole.values()] == [r["loss_scale"] for r in parts.values()]
    losses = {name: [r["loss"] for r in rows.values()] for name, rows in (("whole", whole), ("parts", parts))}
    # Sums by atomic additions (the gradient of a gather) need not be the same twice on a GPU.
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-2, nan_ok=True)
    record_property(f"{precision}_losses_bit_for_bit", losses["parts"] == losses["whole"])


def state_after_load(config_values, path):
    """Train, save, load into a fresh engine: whether every fragment and the step state came back bit for bit."""
    from swin_scale.checkpoint import Checkpoint
    from swin_scale.config import batch_plan
    from swin_scale.config_load import config_from_values
    from swin_scale.engine.dist import init
    from swin_scale.engine.engine import Engine, MicroBatch
    from swin_scale.engine.layout import Layout
    from swin_scale.engine.saving import save
    from swin_scale.engine.schedule import Schedule
    from swin_scale.models import create_model
    from swin_scale.tasks.classify import losses

    config = config_from_values(config_values).config
    with init(Layout(), timeout_s=120, device="cuda") as dist:
        engines = [
            Engine(
                create_model(NANO, seed=seed, drop_path_rate=0.0),
                config,
                batch_plan(config, 1),
                Schedule.from_config(config, 10),
                dist,
                losses=losses,
            )
            for seed in (0, 1)
        ]
        first, second = engines
        micro = MicroBatch(
            inputs=torch.randn(8, 3, 32, 32, device="cuda", dtype=first.dtype),
            targets=torch.full((8, 10), 0.1, device="cuda"),
            valid=torch.ones(8, dtype=torch.bool, device="cuda"),
        )
        for step in range(3):
            first.train_step(step, [micro], 8)
        saved = save(
            Path(path), first, dist, step=3, state={}, config_text="{}", model={"name": NANO, "overrides": {}}, keep=1
        )
        with Checkpoint.open(saved) as checkpoint:
            second.load(checkpoint, checkpoint.state)
        fragments = [{(f.name, f.kind, f.start): f.data.cpu() for f in e.local_fragments()} for e in engines]
        assert fragments[0].keys() == fragments[1].keys()
        different = [key for key in fragments[0] if not torch.equal(fragments[0][key], fragments[1][key])]
        weights = [[p.detach().cpu() for p in e.module.parameters()] for e in engines]
        equal = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
        return different, equal, first.state() == second.state()


@pytest.mark.parametrize("precision", HALVES)
def test_saved_and_loaded_state_is_equal_bit_for_bit(precision, tmp_path):
    config = {
        "run": {"dir": "r"},
        "data": {"train": ["d"]},
        "model": {"name": NANO},
        "optim": {"lr": 5e-4, "ema_decay": 0.9},
        "schedule": {"warmup_steps": 0, "total_steps": 100},
        "train": {"global_batch": 8},
        "engine": {"precision": precision},
    }
    [(different, weights_equal, state_equal)] = spawn(1, state_after_load, config, str(tmp_path / "ck"), timeout=120)
    assert different == [] and weights_equal and state_equal


@pytest.mark.parametrize("name", RULES)
def test_an_optimizer_follows_its_formula(name):
    """Apex's where it is installed, DeepSpeed's compiled here."""
    try:
        check_optimizer(Optim(lr=1.0, name=name))
    except UserError as error:
        pytest.skip(f"optional: {error}")
    spawn(1, rule_on_gpu, name, timeout=240)


def rule_on_gpu(name):
    check_update_rule(name, import_deepspeed(on_gpu=True), "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_layer_norm_of_apex_where_it_is_installed(dtype):
    """Output and gradients at most twice as far from fp64 as torch's."""
    if (reason := why_not_apex("normalization")) is not None:
        pytest.skip(f"optional: {reason}")
    generator = torch.Generator("cuda").manual_seed(0)
    x, grad = torch.randn(2, 512, 768, generator=generator, device="cuda").mul(3).add(1).to(dtype)
    weight, bias = torch.rand(2, 768, generator=generator, device="cuda").to(dtype)

    def run(norm, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = norm(*inputs)
        return [t.double() for t in (y, *torch.autograd.grad(y, inputs, grad.to(dtype)))]

    def by_torch(x, weight, bias):
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-5)

    exact = run(by_torch, torch.float64)
    for ours, theirs, value in zip(run(layer_norm, dtype), run(by_torch, dtype), exact, strict=True):
        assert (ours - value).norm() <= 2 * (theirs - value).norm() + 1e-12 * value.norm()
