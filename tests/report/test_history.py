import json

import numpy as np

from swin_scale.report.history import number, read_config, read_history
from tests.report import rundir


def test_the_last_row_of_a_step_counts_and_repeated_ones_are_counted(tmp_path):
    rows = [rundir.row(s, loss=float(s)) for s in (1, 2, 3, 4)] + [rundir.row(s, loss=10.0 * s) for s in (3, 4, 5)]
    history = read_history(rundir.write(tmp_path / "run", rows))
    assert history.steps.tolist() == [1, 2, 3, 4, 5] and history.repeated == 2
    assert history.columns["loss"].tolist() == [1, 2, 30, 40, 50]


def test_what_cannot_be_used_is_left_out(tmp_path):
    rows = [
        rundir.row(1, loss=None),
        rundir.row(2, loss="7", grad_norm=True),
        rundir.row(3, loss=10**400),
        rundir.row(-4),
        {**rundir.row(5), "step": "5"},
        {**rundir.row(6), "step": 2**70},
        {"event": ["x"], "step": 3},
        {"event": "eval", "step": None},
    ]
    history = read_history(rundir.write(tmp_path / "run", rows, tail='[1]\n{"step": 7, "loss": NaN}\n{"step": 8, "lo'))
    assert history.steps.tolist() == [1, 2, 3, 7]
    assert np.isnan(history.columns["loss"][[0, 1, 3]]).all() and history.columns["loss"][2] == 1e100
    assert history.columns["grad_norm"][1] == 1 and np.isnan(history.columns["lr"][3])
    assert [event["event"] for event in history.events] == ["['x']"]


def test_an_empty_directory_is_an_empty_history(tmp_path):
    history = read_history(tmp_path)
    assert (len(history.steps), history.events, history.skips.count, history.config, history.exit) == (
        0,
        (),
        0,
        (),
        None,
    )


def test_a_sample_skipped_again_after_a_resume_counts_once(tmp_path):
    sample = {"step": 3, "epoch": 0, "id": 9, "source": "d", "shard": "0.tar", "key": "k", "reason": "torn"}
    rows = [sample, {**sample, "key": "l"}, sample, {**sample, "epoch": 1, "step": 99}, {"step": "x"}]
    (tmp_path / "skipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    skips = read_history(tmp_path).skips
    assert skips.count == 4 and skips.by_shard[0] == ("0.tar", "torn", 3)
    assert skips.steps.tolist() == [3, 3, 99, 0]


def test_config_lines_say_where_each_value_came_from():
    from swin_scale.config_load import config_from_values

    loaded = config_from_values(
        {"run": {"dir": 'a # "b'}, "data": {"train": ["x: y", "z"]}, "model": {"name": "n"}, "optim": {"lr": 1e-3},
         "train": {"global_batch": 8}},
        {"run.dir": "command line", "data.train": "my run.yaml"},
    )  # fmt: skip
    rows = {key: (value, origin) for key, value, origin in read_config(loaded.dump())}
    assert len(rows) == len(loaded.origin) == len(loaded.dump().splitlines()) - loaded.dump().count(":\n")
    assert rows["run.dir"] == (r'"a # \"b"', "command line")
    assert rows["data.train"] == ('["x: y", "z"]', "my run.yaml")
    assert rows["task"] == ('"classify"', "default")
    assert {key: origin for key, (_, origin) in rows.items()} == dict(loaded.origin)


def test_numbers_are_finite_floats_or_nan():
    assert number(True) == 1 and number(-(10**400)) == -1e100
    assert all(np.isnan(number(value)) for value in (None, "1", [1], float("inf"), float("nan")))
