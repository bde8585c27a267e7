"""The process that writes for a rank: what it writes, what it answers, what ends it and what does not."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import xxhash

from swin_scale.disk_writer import IGNORED, write
from tests.writers import is_writer, writers

PARENT = """
import sys, time
from pathlib import Path
import torch
from swin_scale.engine.staging import Staging
staging = Staging(1 << 20, torch.device("cpu"))
staging.prepare()
print("there", flush=True)
time.sleep(60)
"""


def test_a_file_is_hashed_synced_and_never_written_over(tmp_path, monkeypatch):
    data = os.urandom(3 << 20) + b"odd"
    answer = write(tmp_path / "f", memoryview(data), time.monotonic())
    assert answer.pop("seconds") > 0
    assert answer == {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    assert (tmp_path / "f").read_bytes() == data
    assert "f cannot be written: File exists" in write(tmp_path / "f", memoryview(b"x"), 0.0)["problem"]
    assert (tmp_path / "f").read_bytes() == data
    assert "cannot be written: No such file" in write(tmp_path / "none" / "f", memoryview(b"x"), 0.0)["problem"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device; free space" in write(tmp_path / "g", memoryview(data), 0.0)["problem"]
    assert not (tmp_path / "g").exists()


@pytest.fixture
def parent():
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "there\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.fault(10, "signals that a scheduler sends to all processes of a job, from the writer's first moment on")
def test_only_its_rank_ends_it(parent):
    [writer] = writers(parent.pid)
    for number in IGNORED:
        os.kill(writer, number)
    time.sleep(0.3)  # as long as its start may take
    for number in IGNORED:
        os.kill(writer, number)
    assert is_writer(writer)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 50  # its rank would have lived for a minute
    while is_writer(writer):
        assert time.monotonic() < deadline, "it outlived its rank"
        time.sleep(0.01)


def test_it_needs_no_torch():
    code = "import swin_scale.disk_writer, sys; print(sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.replace("'", '"')) == []


def test_a_rank_that_is_gone_already_gets_none(tmp_path):
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, 4096)
    command = [sys.executable, "-m", "swin_scale.disk_writer", str(descriptor), "4096", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(descriptor,)) as process:
        assert process.wait(60) == 0
    os.close(descriptor)
    assert signal.SIGTERM in IGNORED
