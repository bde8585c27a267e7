"""Rows of metrics.jsonl, what TensorBoard's own reader finds, figures of speed, progress lines."""

import logging
import sys
import time

import pytest
import torch

from swin_scale.engine.metrics import (
    STEP_KEYS,
    MetricWriter,
    Progress,
    StepClock,
    image_grid,
    memory_gb,
    peak_flops,
    step_tags,
    to_numbers,
)  # fmt: skip
from swin_scale.log import read_events, read_metrics


def make_row(step: int, **values) -> dict:
    row = {
        "step": step, "epoch": 0, "samples": 8 * step, "loss": torch.tensor(0.1 * step), "lr": 1e-3,
        "grad_norm": torch.tensor(1.5), "loss_scale": 1.0, "skipped": torch.tensor(False), "images_per_s": 10.0,
        "mfu": None, "data_wait_s": 0.0, "step_s": 0.8, "mem_gb": 0.5, "batch_digest": "00ff",
    }  # fmt: skip
    return {**row, **values}


def test_rows_have_the_documented_keys_and_keep_every_bit(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.add(make_row(step))
        assert not read_metrics(tmp_path / "metrics.jsonl")  # pending until flush: no host sync in the step
        assert [row["step"] for row in writer.flush()] == [1, 2, 3]
        rows = read_metrics(tmp_path / "metrics.jsonl")
        assert list(rows) == [1, 2, 3] and tuple(rows[1]) == STEP_KEYS
        assert rows[3]["loss"] == torch.tensor(0.1 * 3).item()
        assert rows[1]["skipped"] is False and rows[1]["mfu"] is None
        writer.add(make_row(4, loss=torch.tensor(float("nan")), **{"moe/dropped": 0.25}))
        writer.event("eval", 4, weights="master", top1=91.5)
    assert read_metrics(tmp_path / "metrics.jsonl")[4]["loss"] is None
    assert read_metrics(tmp_path / "metrics.jsonl")[4]["moe/dropped"] == 0.25
    (event,) = read_events(tmp_path / "metrics.jsonl")
    assert (event["event"], event["step"], event["top1"]) == ("eval", 4, 91.5)
    assert not (tmp_path / "tb").exists()


def test_other_ranks_write_nothing(tmp_path):
    with MetricWriter(tmp_path, enabled=False) as writer:
        writer.add(make_row(1))
        assert writer.flush() == []
        writer.event("checkpoint", 1)
        writer.images("batch", torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_row_without_a_documented_key_is_our_own_slip(tmp_path):
    row = make_row(1)
    del row["batch_digest"]
    with MetricWriter(tmp_path, tensorboard=False) as writer, pytest.raises(AssertionError, match="batch_digest"):
        writer.add(row)


def test_tensors_become_numbers_of_their_kind():
    (row,) = to_numbers([{"a": torch.tensor(3), "b": torch.tensor(True), "c": torch.tensor([0.5]), "d": "text"}])
    assert row == {"a": 3, "b": True, "c": 0.5, "d": "text"}
    assert [type(row[key]) for key in "abc"] == [int, bool, float]


def test_tensorboard_shows_the_same_numbers_and_the_first_batch(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.images("first_batch", torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
        for step in (1, 2):
            writer.add(make_row(step))
        writer.event("eval", 2, weights="ema", top1=91.5, path="x")
    with MetricWriter(tmp_path) as writer:  # resumed from step 1: step 2 is repeated
        writer.add(make_row(2, loss=torch.tensor(7.0)))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {"train/loss", "train/lr", "train/grad_norm", "speed/images_per_s", "eval_ema/top1"} <= set(
        seen.Tags()["scalars"]
    )
    assert [(event.step, round(event.value, 6)) for event in seen.Scalars("train/loss")] == [(1, 0.1), (2, 7.0)]
    (picture,) = seen.Images("first_batch")
    assert (picture.height, picture.width) == (2 + 2 * 10, 2 + 3 * 10)


def test_tensorboard_hides_what_a_run_that_goes_back_does_again(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.add(make_row(step, loss=torch.tensor(float(step))))
        writer.flush()
        writer.go_back(2)
        writer.event("rolled_back", 3, to_step=1)  # of a later step than the first that comes again
        writer.add(make_row(2, loss=torch.tensor(20.0)))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in seen.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl").values()] == [1.0, 20.0, 3.0]


def test_without_tensorboard_the_rows_are_still_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with MetricWriter(tmp_path) as writer, caplog.at_level(logging.WARNING):
        writer.add(make_row(1))
        writer.flush()
        writer.event("eval", 1, top1=1.0)
    assert [record.getMessage() for record in caplog.records if "TensorBoard" in record.getMessage()] != []
    assert len(caplog.records) == 1
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [1]


def test_tags_are_grouped():
    tags = step_tags(make_row(1, **{"loss": 2.0, "grad_norm": 1.0, "skipped": True, "moe/dropped": 0.25}))
    assert tags["train/loss"] == 2.0 and tags["speed/step_s"] == 0.8 and tags["moe/dropped"] == 0.25
    assert tags["train/skipped"] == 1.0
    assert "speed/mfu" not in tags and not any("step" in tag and tag != "speed/step_s" for tag in tags)


@pytest.mark.parametrize(("count", "shape"), [(1, (3, 7, 8)), (2, (3, 7, 14)), (5, (3, 12, 20)), (9, (3, 12, 14))])
def test_image_grid(count, shape):
    """3 x 4 pixels, frames of 2, at most 4 pictures."""
    limit = 4 if count == 9 else 64
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 3, 3, 4)
    grid = image_grid(images, limit=limit)
    assert (grid.shape, grid.dtype) == (shape, torch.uint8)
    kept = min(count, limit)
    values, counts = grid[0].unique(return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist()))[kept - 1] == 12  # every picture is whole
    assert grid[0, 2, 2] == 0 and grid[0, 0, 0] == 255


def test_clock_adds_up():
    clock = StepClock(device=torch.device("cpu"), flops_per_image=1e9)
    with clock.waiting():
        time.sleep(0.03)
    time.sleep(0.02)
    figures = clock.step(100)
    assert 0.03 <= figures["data_wait_s"] <= figures["step_s"] - 0.02 + 1e-3
    assert figures["images_per_s"] == pytest.approx(100 / figures["step_s"])
    assert figures["mfu"] is None
    time.sleep(0.3)
    clock.restart()
    assert clock.step(100)["step_s"] < 0.25


def test_mfu_is_the_share_of_the_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2_000_000_000)
    device = torch.device("cuda", 0)
    figures = StepClock(device=device, ranks=2, flops_per_image=6e9).step(64)
    assert figures["mfu"] == pytest.approx(figures["images_per_s"] * 6e9 / (2 * 312e12))
    assert figures["mem_gb"] == 2.0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Other Card")
    assert StepClock(device=device, flops_per_image=6e9).step(64)["mfu"] is None
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(device) == peak


def test_memory_of_this_process():
    before = memory_gb(torch.device("cpu"))
    held = torch.ones(25_000_000)
    assert memory_gb(torch.device("cpu")) - before == pytest.approx(0.1, abs=0.03)
    del held


def test_progress_is_a_line_per_interval_off_a_terminal(caplog, capsys):
    row = {"loss": 2.5, "lr": 1e-3, "grad_norm": float("inf"), "images_per_s": 1234.5, "epoch": 3}
    with caplog.at_level(logging.INFO), Progress(1000, initial=100, terminal=False) as progress:
        progress.update(200, row)
        progress.update(300, row)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("step 200/1000  epoch 3  loss 2.5000  lr 1.00e-03  norm inf  1234 img/s  0:00:0")
    assert second.startswith("step 300/1000")
    with Progress(1000, initial=100, terminal=True) as progress:
        progress.update(200, row)
    assert "200/1000" in capsys.readouterr().err
