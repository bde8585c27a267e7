"""Beats through shared memory, and what everybody may read of them."""

import json
import mmap
import os

import pytest

from swin_scale import heartbeat
from swin_scale.heartbeat import WARM_UP, Pulse, Status, begin_life, read_beat, read_statuses, write_status
from swin_scale.sections import Section, Sections


@pytest.fixture
def shared():
    descriptor = heartbeat.heartbeat_memory()
    yield descriptor
    os.close(descriptor)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_reader_sees_section_step_and_what_was_learned(shared):
    clock = Clock()
    sections = Sections(clock=clock)
    pulse = Pulse(shared, sections, clock=clock)
    memory = mmap.mmap(shared, heartbeat.SIZE, prot=mmap.PROT_READ)
    assert read_beat(memory).section is None
    for step in range(WARM_UP + 2):
        sections.step = step
        with sections(Section.DATA):
            clock.now += 50.0 if step < WARM_UP else 2.0 + step
    with sections(Section.FORWARD), sections(Section.DATA):
        beat = read_beat(memory)
        assert (beat.section, beat.step, beat.since) == (Section.DATA, WARM_UP + 1, clock.now)
        assert beat.stretches == WARM_UP + 2
        assert beat.longest_s == 2.0 + WARM_UP + 1  # the first ones, of 50 s, say nothing
        count = beat.count
        sections.alive()
        assert read_beat(memory).count == count + 1
    assert not read_beat(memory).ended
    pulse.goodbye()
    assert read_beat(memory).ended


def test_half_a_beat_is_no_beat(shared):
    sections = Sections()
    Pulse(shared, sections)
    memory = mmap.mmap(shared, heartbeat.SIZE)
    assert read_beat(memory) is not None
    memory[3] ^= 1
    assert read_beat(memory) is None
    memory[:64] = bytes(64)
    assert read_beat(memory) is None


def test_another_life_is_not_read(tmp_path):
    begin_life(tmp_path, "old")
    fields = {"host": "n1", "pid": 7, "step": 3, "since": 1.0, "time": 2.0, "ended": False}
    write_status(tmp_path, Status(life="old", rank=0, section="data", **fields))
    write_status(tmp_path, Status(life="new", rank=1, section=None, **fields))
    (tmp_path / "heartbeat" / "rank2.json").write_text('{"life": "old"')
    (tmp_path / "heartbeat" / "rank3.json").write_text(json.dumps({"life": "old", "rank": "3"}))
    assert list(read_statuses(tmp_path)) == [0]
    assert list(read_statuses(tmp_path, "new")) == [1]
    begin_life(tmp_path, "newest")
    assert read_statuses(tmp_path, "old") == {}
    assert read_statuses(tmp_path / "nowhere") == {}
