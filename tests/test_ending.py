"""How a run ends in the time it has, and what the next one finds in its diary."""

import json
from types import SimpleNamespace

import pytest

from swin_scale import ending
from swin_scale.ending import Ending, look_back
from swin_scale.errors import PreemptedError
from swin_scale.interval import RECENT_SAVES
from swin_scale.run_dir import write_deadline

STEP, SAVE_S, LEFT_S = 9, 4.0, 10.0


def saved(step, seconds, **figures):
    return {"event": "checkpoint", "step": step, "seconds": seconds, **figures}


def evaluated(step, weights):
    return {"event": "eval", "step": step, "weights": weights, "top1": 50.0}


def test_an_evaluation_counts_when_it_followed_the_last_time_its_step_was_done(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert look_back(metrics, 7) == ([], [])

    def after(*rows):
        with open(metrics, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return look_back(metrics, 7)

    assert after({"step": 6, "loss": 1.0}, {"step": 7, "loss": 1.0}) == ([], [])
    assert after(saved(7, 0.5, write_seconds=1.5), evaluated(7, "master")) == (["master"], [2.0])
    assert after(evaluated(7, "ema"), {"step": 17, "loss": 1.0}, evaluated(17, "ema")) == (["ema", "master"], [2.0])
    # The newest checkpoints were damaged, and step 7 is done once more.
    assert after({"event": "fell_back", "step": 4, "problem": "x"}, {"step": 7, "loss": 1.0}) == ([], [2.0])
    with open(metrics, "a") as file:
        file.write('{"event": "eval", "step": 7, "weigh')  # torn by a kill
    assert after() == ([], [2.0])
    assert after({}, evaluated(7, "master"), saved(8, 3.0, waited_seconds=1.0)) == (["master"], [2.0, 2.0])
    # Of a bad hour in which saves took long, nothing is left after as many good ones.
    _, took_s = after(saved(9, 1200.0), *[saved(10 + n, 3.0) for n in range(RECENT_SAVES)])
    assert took_s == [3.0] * RECENT_SAVES


class Disk:
    """A saver whose saves take `SAVE_S`, with one under way that is over in `ready_s`, and the clock it goes by."""

    def __init__(self, writing, ready_s, sound):
        self.now, self.took_s, self.saved_step, self.begun = 0.0, [SAVE_S], 2, []
        self.writing_step, self._ready, self._sound = writing, ready_s, sound

    def settle(self, wait_s):
        if self.writing_step is None:
            return
        if wait_s < self._ready - self.now:
            self.now += wait_s
            return
        self.now = max(self.now, self._ready)
        self.saved_step = self.writing_step if self._sound else self.saved_step
        self.writing_step = None

    def save(self, _, step):
        self.begun.append(step)
        self.now += SAVE_S
        self.saved_step = step

    def time(self):
        return self.now

    monotonic = time


@pytest.mark.parametrize(
    ("left_s", "writing", "ready_s", "sound", "saved", "begun"),
    [
        (LEFT_S, None, 0, True, STEP, [STEP]),
        (3.0, None, 0, True, 2, []),
        (None, 8, 1000, True, STEP, [STEP]),
        (LEFT_S, 8, 2, True, STEP, [STEP]),
        (LEFT_S, 8, 7, True, 8, []),
        (LEFT_S, 8, 1000, True, 2, []),
        (3.0, 8, 0.5, True, 8, []),
        (LEFT_S, STEP, 7, True, STEP, []),
        (LEFT_S, STEP, 1000, True, 2, []),
        (LEFT_S, STEP, 2, False, STEP, [STEP]),
        (LEFT_S, STEP, 7, False, 2, []),
    ],
    ids=[
        "there is time", "there is too little", "nobody says how much", "after an earlier save",
        "an earlier save leaves too little", "an earlier save hangs", "an earlier save alone",
        "its own save is under way", "its own save hangs", "its own save fails early", "its own save fails late",
    ],
)  # fmt: skip
@pytest.mark.fault(11, "so many seconds left when a save, of this step or an earlier one, is under way")
def test_what_fits_into_the_time_left_is_saved(tmp_path, monkeypatch, left_s, writing, ready_s, sound, saved, begun):
    """Nothing goes on beyond it, and nothing is begun that would."""
    disk = Disk(writing, ready_s, sound)
    monkeypatch.setattr(ending, "time", disk)
    monkeypatch.setattr(ending, "predicted_bytes", lambda *_: 0)
    if left_s is not None:
        write_deadline(tmp_path, left_s, "a test")
    rows = []
    dist = SimpleNamespace(is_main=True, world=1, local_world=1, broadcast_json=lambda _, value: value)
    job = SimpleNamespace(config=SimpleNamespace(run=SimpleNamespace(dir=str(tmp_path))))
    log = SimpleNamespace(event=lambda name, step, **fields: rows.append((name, fields)))
    way_out = Ending(job, dist, None, log, SimpleNamespace(directory=tmp_path), disk, None, save=disk.save)
    with pytest.raises(PreemptedError, match="is saved" if saved == STEP else "is not saved"):
        way_out.end(STEP, "SIGTERM on 1 ranks", during="step")
    assert (disk.saved_step, disk.begun) == (saved, begun)
    assert left_s is None or disk.now <= left_s
    names = ["preempted"] if saved == STEP else ["no_time_to_save", "preempted"]
    assert [name for name, _ in rows] == names and rows[-1][1]["saved"] == (saved == STEP)
