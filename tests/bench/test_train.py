import json

import pytest

from swin_scale.errors import UserError
from swin_scale.models import flops, variant
from tests.spawn import spawn

NAME = "swinv2_nano_patch4_window4_32"


def run(path, options):
    from swin_scale.bench.train import bench_train

    result = bench_train(NAME, batch=2, steps=2, warmup=1, threads=1, device="cpu", out=path, **options)
    return str(result)


@pytest.mark.parametrize("options", [{"precision": "fp32", "accumulation": 2}, {"precision": "bf16", "zero_stage": 3}])
def test_engine_step_is_timed_and_described(tmp_path, options):
    path = tmp_path / "train.json"
    (text,) = spawn(1, run, str(path), options)
    figures = json.loads(path.read_text())
    assert {"schema", "bench", "command", "hardware", "versions", "settings", "engine", "model_alone"} < set(figures)
    assert figures["settings"]["backend"] == "gloo" and figures["mfu"] is None
    images = 2 * options.get("accumulation", 1)
    assert figures["images_per_s"] == pytest.approx(images / figures["engine"]["step_s"]["median"])
    assert figures["engine"]["step_s"]["steps"] == 2 and figures["engine"]["skipped"] == 0
    assert figures["engine"]["memory_gb"] > 0
    assert figures["flop_per_image"] == 6 * flops(variant(NAME))
    assert "engine step" in text and "model alone" in text


def test_stage_0_is_refused_in_half_precision():
    from swin_scale.bench.train import bench_train

    with pytest.raises(UserError, match=r"engine\.zero_stage is 0"):
        bench_train(NAME, zero_stage=0, precision="bf16")


def test_no_steps_is_refused():
    from swin_scale.bench.train import bench_train

    with pytest.raises(UserError, match="at least 1 step"):
        bench_train(NAME, steps=0)
