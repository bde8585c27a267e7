import threading

import pytest

from swin_scale.sections import Section, Sections


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_time_belongs_to_the_innermost_section(clock):
    sections = Sections(clock=clock)
    clock.now += 1  # of no section
    with sections(Section.FORWARD):
        clock.now += 2
        with sections(Section.ALL_TO_ALL):
            clock.now += 4
        clock.now += 8
    clock.now += 16
    with sections(Section.FORWARD):
        clock.now += 32
        seconds = sections.seconds()  # the open one counts
        clock.now += 64
    assert seconds == {**dict.fromkeys(Section, 0.0), Section.FORWARD: 42.0, Section.ALL_TO_ALL: 4.0}
    assert sections.seconds()[Section.FORWARD] == 106.0


def test_an_error_closes_its_sections(clock):
    sections = Sections(clock=clock)

    def fail():
        clock.now += 3
        raise OSError

    with pytest.raises(OSError), sections(Section.DATA), sections(Section.CHECKPOINT):
        fail()
    clock.now += 5
    assert sections.current is None
    assert sum(sections.seconds().values()) == 3.0


def test_a_listener_hears_what_is_being_done(clock):
    heard = []
    sections = Sections(clock=clock)
    sections.listen(heard.append)
    with sections(Section.FORWARD), sections(Section.ALL_TO_ALL):
        assert sections.current is Section.ALL_TO_ALL
    assert heard == [Section.FORWARD, Section.ALL_TO_ALL, Section.FORWARD, None]


def test_outside_of_all_sections_time_is_of_set_up_nobody_and_closing(clock):
    heard = []
    sections = Sections(clock=clock, began=90.0, outside=Section.SET_UP)
    sections.listen(heard.append)
    clock.now += 1
    with sections.bare(then=Section.CLOSE):
        clock.now += 2
        with sections(Section.DATA):
            clock.now += 4
        reading = sections.read()
    clock.now += 8
    assert (reading.age_s, reading.current) == (17.0, None)
    assert {section: spent for section, spent in sections.seconds().items() if spent} == {
        Section.SET_UP: 11.0, Section.DATA: 4.0, Section.CLOSE: 8.0,
    }  # fmt: skip
    assert sections.read().age_s == 25.0
    assert heard == [None, Section.DATA, None, Section.CLOSE]


def test_another_thread_reads_sums_that_fit_the_moment():
    """A reading is of one moment: what it sums up never exceeds its age, and never goes back."""
    sections, done = Sections(outside=Section.SET_UP), threading.Event()

    def work():
        while not done.is_set():
            with sections(Section.FORWARD), sections(Section.BACKWARD):
                pass

    thread = threading.Thread(target=work)
    thread.start()
    before = sections.read()
    for _ in range(2000):
        reading = sections.read()
        assert sum(reading.seconds.values()) == pytest.approx(reading.age_s, abs=1e-6)
        assert all(reading.seconds[section] >= before.seconds[section] for section in Section)
        before = reading
    done.set()
    thread.join()
