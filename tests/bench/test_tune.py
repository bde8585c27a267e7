"""Measuring tiles: the search, who may not take part, and that a table found is the one that kernels then use."""

import math
from dataclasses import replace

import pytest
import torch

from swin_scale.bench import tune as module
from swin_scale.bench.region import Shape, draw
from swin_scale.errors import UserError
from swin_scale.kernels import tuning
from swin_scale.kernels.tuning import HOST, Tiles
from tests.kernels.interpreter import interpreted  # noqa: F401

SHAPE = Shape(name="tiny", hw=(8, 4), dim=16, heads=1, window=(4, 4), shift=(2, 0))
START = tuning.heuristic("forward", tuning.Shape(16, 16, torch.float32))


def test_search_finds_the_minimum_of_a_separable_time_and_never_takes_what_may_not_run():
    def seconds(tiles: Tiles) -> float:
        if tiles.stages == 3:
            return math.inf
        distance = [math.log2(a / b) ** 2 for a, b in ((tiles.rows, 128), (tiles.columns, 16), (tiles.warps, 2))]
        return sum(distance) + (0 if tiles.registers == 168 else 1) - tiles.stages

    start = Tiles(32, 64, 8, stages=1)
    found = module.search(start, module.variations("forward", 256, start), seconds)
    assert found == Tiles(128, 16, 2, stages=2, registers=168)


def test_tiles_of_whole_windows_keep_their_side():
    found = [tiles for step in module.variations("backward", 64, START) for tiles in step(START)]
    assert found and all((tiles.rows, tiles.columns) == (START.rows, START.columns) for tiles in found)


@pytest.fixture
def clock(monkeypatch):
    """Eight warps take half the time of others; what is timed is run once, so that its tiles are those of the table."""
    used: list[Tiles] = []
    ask = tuning.tiles

    def tiles(kernel, shape, chip):
        used.append(ask(kernel, shape, chip))
        return used[-1]

    tiles.cache_clear = ask.cache_clear  # type: ignore[attr-defined]
    monkeypatch.setattr(tuning, "tiles", tiles)

    def seconds_of(call, inner=1, device=None, clock=None):
        call()
        return 1.0 if used[-1].warps == 8 else 2.0

    monkeypatch.setattr(module, "seconds_of", seconds_of)
    monkeypatch.setattr("swin_scale.bench.timing.seconds_of", seconds_of)
    monkeypatch.setattr(module, "LOOKS", 1)
    return used


@pytest.mark.usefixtures("interpreted")
def test_what_is_found_is_in_the_table_and_the_kernels_use_the_table(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "shapes", lambda names: [SHAPE])
    monkeypatch.setattr(module, "kernels_of", lambda shape: ("forward",))
    out = tmp_path / "tiles.json"
    result = module.bench_tune(batch=1, dtypes=("fp32",), device="cpu", out=str(out))
    key = "forward N=16 d=16 float32"
    assert tuning.read_table(out, HOST.name) == {key: replace(START, warps=8)}
    assert "2.000x (2.000 to 2.000, 40 pairs)" in str(result)
    with tuning.using_table(out):
        assert tuning.tiles("forward", tuning.Shape(16, 16, torch.float32), HOST).warps == 8
    assert tuning.tiles("forward", tuning.Shape(16, 16, torch.float32), HOST) == START


@pytest.mark.usefixtures("interpreted")
def test_tiles_that_give_wrong_results_or_fail_to_compile_cannot_win(clock, monkeypatch):
    region = module.fused("ours", SHAPE, torch.float32, torch.device("cpu"))

    def run(x, *rest):
        (y,) = region.run(x, *rest)
        if clock[-1].warps == 8:
            return (y * 1.01,)
        if clock[-1].warps == 4:
            raise RuntimeError("no room for so many")
        return (y,)

    monkeypatch.setattr(module, "fused", lambda *_: replace(region, run=run))
    inputs = draw(SHAPE, 1, torch.float32, torch.device("cpu"), seed=0)
    found, gain, refused = module.tune("forward", SHAPE, inputs, HOST, rounds=20)
    assert found is None and gain is None
    reasons = {tiles: reason for tiles, reason in refused.items() if "warps=8" in tiles or "warps=4" in tiles}
    assert set(reasons.values()) == {
        "its output errs more than with the tiles in use",
        "RuntimeError: no room for so many",
    }


def test_without_a_gpu_it_says_so():
    with pytest.raises(UserError, match="bench tune measures Triton kernels, and there is no CUDA device"):
        module.bench_tune(["T w8 s1"], device="cpu")
