"""JSON lines through kills, and where log messages go."""

import errno
import io
import json
import logging

import pytest

from swin_scale.log import JsonLines, finite, read_events, read_jsonl, read_metrics, setup_logging


@pytest.fixture
def clean_logging():
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def test_rows_come_back_in_order(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with JsonLines(path) as lines:
        lines.write([{"step": 1, "name": "é"}, {"step": 2}])
        lines.write([])
        assert read_jsonl(path) == [{"step": 1, "name": "é"}, {"step": 2}]  # nothing waits in a buffer
    assert read_jsonl(tmp_path / "missing") == []


def test_every_cut_of_a_file_loses_at_most_its_last_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": step / 7, "text": "ü{}\n"} for step in range(1, 5)]
    with JsonLines(path) as lines:
        lines.write(rows)
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        read = read_jsonl(path)
        assert read == rows[: len(read)] and whole <= len(read) <= whole + 1
        # A resumed run goes on in the same file, and its rows are not glued to the torn one.
        with JsonLines(path) as lines:
            lines.write([{"step": 9}])
        assert read_jsonl(path) == [*read, {"step": 9}]


def test_metrics_last_row_wins_and_events_are_apart(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as lines:
        lines.write([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "event": "checkpoint"}])
        lines.write([{"step": 2, "loss": 2.5}, {"step": 3, "loss": 1.0}])
    assert read_metrics(path) == {1: {"step": 1, "loss": 3.0}, 2: {"step": 2, "loss": 2.5}, 3: {"step": 3, "loss": 1.0}}
    assert read_events(path) == [{"step": 2, "event": "checkpoint"}]


def test_numbers_json_lacks_become_null(tmp_path):
    row = {"loss": float("nan"), "norm": float("inf"), "nested": [1.5, {"x": -float("inf")}], "step": 3, "ok": True}
    expected = {"loss": None, "norm": None, "nested": [1.5, {"x": None}], "step": 3, "ok": True}
    assert finite(row) == expected
    with JsonLines(tmp_path / "a.jsonl") as lines:
        lines.write([row])
    assert json.loads((tmp_path / "a.jsonl").read_text()) == expected


def test_every_rank_has_its_file_and_only_the_watched_one_speaks(tmp_path, capsys, clean_logging):
    setup_logging(tmp_path, 1, console=False)
    logging.getLogger("swin_scale.engine").info("quiet %d", 1)
    setup_logging(tmp_path, 0, console=True)
    logging.getLogger("swin_scale.engine").info("loud %d", 2)
    logging.getLogger("somelibrary").info("chatter")
    logging.getLogger("somelibrary").warning("matters")
    setup_logging(None, 0, console=True)
    logging.getLogger("swin_scale").info("no file")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.partition(" ")[2] for line in captured.err.splitlines()] == ["loud 2", "matters", "no file"]
    other, own = ((tmp_path / "logs" / f"rank{rank}.log").read_text() for rank in (1, 0))
    assert other.endswith(" I rank1 swin_scale.engine: quiet 1\n") and other.count("\n") == 1
    assert own.endswith(" W rank0 somelibrary: matters\n") and own.count("\n") == 2


@pytest.mark.fault(6, "metrics.jsonl: no room for a while, a row torn in the middle")
def test_rows_wait_for_room_and_come_in_order(tmp_path, monkeypatch, caplog):
    path, room = tmp_path / "metrics.jsonl", [45]
    write = io.FileIO.write

    class Disk(io.FileIO):
        def write(self, data):
            if room[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            count = min(room[0], len(data))
            room[0] -= count
            return write(self, bytes(data[:count]))

    monkeypatch.setattr("builtins.open", lambda path, mode, buffering: Disk(path, "a+"))
    with JsonLines(path) as lines:
        for step in range(1, 6):
            lines.write([{"step": step, "text": "0123456789"}])
        monkeypatch.undo()
        assert len(path.read_bytes()) == 45 and read_jsonl(path) == [{"step": 1, "text": "0123456789"}]
        room[0] = 1 << 20
        lines.write([{"step": 6, "text": "0123456789"}])
        assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4, 5, 6]
    assert [r.message.partition(" ")[2][:30] for r in caplog.records] == [
        "cannot be written (No space le", "is written again",
    ]  # fmt: skip


@pytest.mark.fault(6, "metrics.jsonl: no room until memory runs out of patience, then to the end")
def test_the_oldest_rows_are_dropped_and_the_loss_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("swin_scale.log.MAX_UNWRITTEN", 1000)
    (tmp_path / "full").symlink_to("/dev/full")
    lines = JsonLines(tmp_path / "full")
    for step in range(1000):
        lines.write([{"step": step}])
        assert len(lines._unwritten) <= 1000
    lines.close()
    assert "lacks its last" in caplog.records[-1].message
