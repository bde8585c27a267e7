"""How a run ended: the first cause stays, and the end of it all replaces whatever else was said."""

import contextlib
import json
import os
import time

import pytest

from swin_scale.errors import DataError, PeerLostError
from swin_scale.run_dir import LOOKED, ExitRecord, deadline_file, stop_file, take, write_deadline


def end(run_dir, rank, error=None):
    record = ExitRecord(run_dir, rank, quiet=True)
    record.start()
    if error is None:
        with record:
            pass
    else:
        with pytest.raises(type(error)), record:
            raise error
    path = run_dir / "exit.json"
    return json.loads(path.read_text())["code"] if path.exists() else None


def test_the_first_cause_stays(tmp_path):
    assert end(tmp_path, 1, DataError("no shard")) == 3
    assert end(tmp_path, 2, PeerLostError("rank 1")) == 3
    assert end(tmp_path, 0, PeerLostError("rank 1")) == 6  # rank 0 begins anew: what was there is of an earlier life


@pytest.mark.fault(26, "a rank of a replaced generation records its end in the new one's directory")
def test_done_is_done_whatever_a_straggler_wrote(tmp_path):
    record = ExitRecord(tmp_path, 0)
    record.start()
    with record:
        assert end(tmp_path, 1, PeerLostError("rank 0")) == 6
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 0
    assert end(tmp_path, 1) == 0  # only rank 0 says so


def test_requests_of_an_earlier_life_are_forgotten_and_new_ones_are_not(tmp_path, monkeypatch):
    """What comes while this process imports is meant for it, by the file system's clock alone."""
    now, began = time.time(), time.monotonic() - 10.0
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    both = ["deadline.json", "stop"]
    for age, looked, left in ((60, False, []), (5, False, both), (60, True, both)):  # a batch script has looked before
        monkeypatch.delenv(LOOKED, raising=False)
        if looked:
            monkeypatch.setenv(LOOKED, "1")
        stop_file(tmp_path).touch()
        write_deadline(tmp_path, now + 30, "a test")
        for request in (stop_file(tmp_path), deadline_file(tmp_path)):
            os.utime(request, (now - age, now - age))
        with contextlib.ExitStack() as stack:
            assert take(tmp_path, stack, began) is None
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == left
