import json
from dataclasses import asdict
from typing import get_args

import pytest
import torch

from swin_scale.errors import UserError
from swin_scale.kernels import tuning
from swin_scale.kernels.tuning import Chip, Shape, Tiles

CHIP = Chip("NVIDIA H200", processors=132, l2_bytes=50 << 20)
SHAPE = Shape(144, 32, torch.float16)


@pytest.fixture
def no_tables(monkeypatch):
    """Tables are read once; each of these tests starts and leaves without any."""

    def forget():
        tuning.tiles.cache_clear()
        tuning._tables.cache_clear()

    monkeypatch.delenv(tuning.TABLE, raising=False)
    forget()
    yield
    forget()


@pytest.mark.parametrize("kernel", get_args(tuning.Kernel))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_heuristics_serve_every_window(kernel, dtype):
    for tokens in range(1, 1025):
        for head_dim in (16, 24, 32, 64, 96, 128):
            tiles = tuning.heuristic(kernel, Shape(tokens, head_dim, dtype))
            for value in (tiles.rows, tiles.columns, tiles.warps):
                assert value & (value - 1) == 0
            assert 16 <= tiles.rows <= 128 and 16 <= tiles.columns <= 128 and 1 <= tiles.warps <= 16
            if tokens <= tuning.WHOLE_WINDOW:
                assert tiles.rows == tiles.columns >= tokens


@pytest.mark.parametrize("tokens", [144, 196, 256, 400, 576, 784, 1024])
def test_padding_of_large_square_windows_is_bounded(tokens):
    """Padded to powers of two, 144 tokens would be 3.2 times as many logits, and 576 as many."""
    tiles = tuning.heuristic("forward", Shape(tokens, 32, torch.float16))
    rows, columns = (-(-tokens // size) * size for size in (tiles.rows, tiles.columns))
    assert rows * columns <= 1.5 * tokens**2


@pytest.mark.parametrize(("n", "expected"), [(1, 16), (16, 16), (17, 32), (24, 32), (64, 64), (65, 128)])
def test_power_of_two(n, expected):
    assert tuning.power_of_two(n) == expected


@pytest.mark.parametrize(("windows", "heads"), [(1, 3), (8192, 3), (2048, 128), (5, 2000)])
def test_slots_fill_the_chip_but_never_exceed_windows(windows, heads):
    slots = tuning.window_slots(windows, heads, CHIP)
    assert 1 <= slots <= windows
    assert slots == windows or slots * heads >= CHIP.processors * 8 - heads or slots == 1
    assert 1 <= tuning.window_group(windows, 4 * heads, CHIP) <= windows


def test_a_group_of_windows_fits_the_cache():
    assert tuning.window_group(10**6, 1 << 16, CHIP) * (1 << 16) <= CHIP.l2_bytes


@pytest.mark.usefixtures("no_tables")
def test_tables_go_before_heuristics_and_the_users_before_ours(monkeypatch, tmp_path):
    heuristic = tuning.heuristic("forward", SHAPE)
    measured, mine = Tiles(32, 16, 2, 3), Tiles(16, 16, 1, 1, registers=96)
    assert tuning.tiles("forward", SHAPE, CHIP) == heuristic

    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    tuning.write_table(tmp_path / "NVIDIA_H200.json", CHIP, {SHAPE.key("forward"): measured})
    assert tuning.tiles("forward", SHAPE, CHIP) == heuristic, "a table that appears later must not change tiles"
    tuning.tiles.cache_clear()
    tuning._tables.cache_clear()
    assert tuning.tiles("forward", SHAPE, CHIP) == measured
    assert tuning.tiles("forward", SHAPE, Chip("NVIDIA B200", 148, 1)) == heuristic

    tuning.write_table(tmp_path / "mine.json", CHIP, {SHAPE.key("forward"): mine})
    monkeypatch.setenv(tuning.TABLE, str(tmp_path / "mine.json"))
    tuning.tiles.cache_clear()
    assert tuning.tiles("forward", SHAPE, CHIP) == mine
    assert tuning.tiles("backward_rows", SHAPE, CHIP) == tuning.heuristic("backward_rows", SHAPE)


def test_shipped_tables_can_be_read():
    for path in tuning.TABLES.glob("*.json"):
        assert tuning.read_table(path, path.stem.replace("_", " "))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no table of tiles"),
        ('{"tiles": {}}', "chip"),
        ('{"chip": "NVIDIA A100", "tiles": {}}', "measured on NVIDIA A100, this is NVIDIA H200"),
        ('{"chip": "NVIDIA H200", "tiles": {"a": {"rows": 16}}}', "columns"),
    ],
)
def test_a_bad_table_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        tuning.read_table(path, CHIP.name)
    assert str(path) in str(error.value) or "this is" in words


@pytest.mark.parametrize(("field", "value"), [("rows", 48), ("columns", 8), ("warps", 3)])
def test_impossible_tiles_are_refused_by_name(tmp_path, field, value):
    path = tmp_path / "table.json"
    row = asdict(Tiles(64, 32, 4, 2)) | {field: value}
    path.write_text(json.dumps({"chip": CHIP.name, "tiles": {"forward N=144 d=32 float16": row}}))
    with pytest.raises(UserError, match=f"forward N=144 d=32 float16: {field} is {value}"):
        tuning.read_table(path, CHIP.name)


def test_a_cpu_is_a_chip_of_one_processor():
    assert tuning.chip_of(torch.device("cpu")) == tuning.HOST
