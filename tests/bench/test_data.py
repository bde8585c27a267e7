import json

import numpy as np
import pytest
from PIL import Image

from swin_scale.bench import data as bench
from swin_scale.config import Augment
from swin_scale.data.augment import TrainTransform
from swin_scale.errors import SwinScaleError, UserError


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(bench, "CROPS", 3)


def test_both_are_timed_by_cpu_time_on_the_same_crops(tmp_path, few):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save(tmp_path / "a.png")
    result = bench.bench_data(str(tmp_path), img_size=64, rounds=2, out=str(tmp_path / "data.json"))
    figures = json.loads((tmp_path / "data.json").read_text())
    assert {"schema", "bench", "command", "hardware", "versions", "settings", "gate", "modes"} < set(figures)
    assert figures["gate"] == {"mean": 0.0, "max": 0} and figures["settings"]["jpegs"] == 1
    assert figures["versions"]["libjpeg_turbo"]
    for mode in (bench.CROP, bench.FULL):
        ratios = figures["modes"][mode]["ratios"]
        assert set(ratios) == {bench.PEER, bench.CONTROL} and ratios[bench.PEER]["pairs"] == 4
        for name, rate in figures["images_per_cpu_s"][mode].items():
            assert rate == pytest.approx(3 / figures["modes"][mode]["seconds"][name]["median"])
    assert "images per CPU-s" in str(result) and "not a claim" in str(result)


def test_pixels_that_are_not_pillows_are_not_timed(few, monkeypatch):
    real = bench.crop_resize
    monkeypatch.setattr(bench, "crop_resize", lambda *arguments: real(*arguments) ^ 1)
    with pytest.raises(SwinScaleError, match=r"grey levels on average.*nothing was timed"):
        bench.bench_data(img_size=32, rounds=1)


def test_the_bench_does_what_the_loader_does():
    """`ours` and `vary` are the training transform, split in two."""
    import random

    from swin_scale.data.decode import decode_rgb

    transform = TrainTransform.create(Augment(auto_augment="none", color_jitter=0, hflip=0), 64)
    task = bench._Task(bench._encode(bench._made_up(1), 90), 5)
    expected, _ = transform(decode_rgb(task.jpeg), random.Random(5))
    assert np.array_equal(bench.ours(task, transform), expected)
    assert np.array_equal(bench.peer(task, transform), expected)


def test_no_images(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.jpg"):
        bench.bench_data(str(tmp_path))


def test_photographs_of_foolbox_are_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "foolbox" / "data").mkdir(parents=True)
    (tmp_path / "foolbox" / "__init__.py").write_text("raise RuntimeError")
    for name in ("imagenet_00_243.jpg", "mnist_00_7.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / "foolbox" / "data" / name)
    monkeypatch.syspath_prepend(tmp_path)
    photos, source = bench._photos(None)
    assert [photo.size for photo in photos] == [(500, 375)] and "foolbox" in source
