"""MoE layers in a run's report: what is drawn of them, whatever the files hold."""

import html
import json
import re

import numpy as np
import pytest

from swin_scale.report import history as history_module
from swin_scale.report import write_report
from swin_scale.report.history import ROUTING, read_history
from swin_scale.report.routing import routing_pictures
from tests.report import rundir
from tests.report.test_report import HOSTILE, render

RAGGED = {"load": [0.5, 0.5], "dropped": [[1, 2], [3]]}
"""A map whose loads can be used and whose drops cannot."""


def cells(text, key):
    return json.loads(html.unescape(re.search(rf'id="p-{key}"[^>]* data-cells="([^"]+)"', text)[1]))


def test_every_figure_has_a_curve_for_each_layer_with_a_point_for_each_interval(tmp_path):
    pictures = routing_pictures(read_history(rundir.routed(tmp_path / "run")))
    assert {picture.key for picture in pictures} == {f"moe-{name.replace('_', '-')}" for name in ROUTING}
    for picture in pictures:
        assert [series.label for series in picture.series] == ["layers.2.blocks.1", "layers.2.blocks.3"]
        for at, series in enumerate(picture.series):
            assert series.steps.tolist() == list(range(10, 201, 10)) and series.kind == "points"
            assert series.values == pytest.approx(0.1 + at + 0.05 * np.sin(series.steps + at))


def test_of_many_layers_the_extremes_and_the_median_are_drawn(tmp_path):
    (load, *_) = routing_pictures(read_history(rundir.routed(tmp_path / "run", layers=9)))
    assert [series.label for series in load.series] == ["highest layer", "median layer", "lowest layer"]
    steps = load.series[0].steps
    table = np.array([0.1 + at + 0.05 * np.sin(steps + at) for at in range(9)])
    for series, wanted in zip(load.series, (table.max(0), np.median(table, 0), table.min(0))):
        assert series.values == pytest.approx(wanted)


def test_what_never_moves_on_one_process_is_left_out(tmp_path):
    rows = [
        rundir.row(
            s, **{"moe/a2a_share": 0.0, "moe/b/a2a_share": 0.0, "moe/b/rank_load_max": 1.0, "moe/b/load_cv": 1.0}
        )
        for s in (1, 2)
    ]
    assert [p.key for p in routing_pictures(read_history(rundir.write(tmp_path / "run", rows)))] == ["moe-load-cv"]


def test_maps_show_loads_in_even_shares_and_the_latest_drops(tmp_path):
    text = write_report(rundir.routed(tmp_path / "run")).read_text()
    load = cells(text, "load-0")
    assert load["columns"] == [f"step {step}" for step in range(20, 201, 20)] and len(load["rows"]) == 8
    assert np.reshape(load["values"], (8, 10))[2, 4] == pytest.approx(1 + np.sin(100 / 30 + 2), abs=0.01)
    assert np.reshape(cells(text, "dropped-1")["values"], (4, 4))[3, 3] == 10 and "steps 181 to 200" in text
    assert "it has collapsed" in text and "Dashed upright lines: router_collapse." in text


def test_a_dense_run_has_no_such_section(tmp_path):
    assert "Routing" not in render(rundir.write(tmp_path / "run", [rundir.row(1)])).text


@pytest.mark.parametrize(
    "layers",
    [
        None, 7, {"a": None}, {"a": {"load": "x"}}, {"a": {"load": []}}, {"a": {"load": [[1]]}},
        {"a": {"load": [-1, 2]}},
        {"a": {"load": [float("nan")]}}, {"a": RAGGED},
        {HOSTILE: {"load": [0.5, 0.5], "dropped": [[0.5]]}}, {"a": {"load": [0.5] * 99_999}},
    ],
)  # fmt: skip
def test_whatever_a_map_holds_makes_a_page(tmp_path, layers):
    rows = [rundir.row(1, **{"moe/a2a_share": HOSTILE, f"moe/{HOSTILE}/load_cv": 1.0, "moe/b/load_cv": [1]})]
    rows += [rundir.event("routing", 1, steps=HOSTILE, layers=layers)]
    rows += [rundir.event("routing", 2, steps=[1, 2], layers={"b": {"load": [0.25] * 4, "dropped": None}})]
    page = render(rundir.write(tmp_path / "run", rows))
    assert len(page.of("script")) == 1 and "Routing" in page.text and "load of each expert" in page.text
    sound = isinstance(layers, dict) and (HOSTILE in layers or layers["a"] == RAGGED)
    assert sum(svg.get("id", "").startswith("p-load-") for svg in page.of("svg")) == 1 + sound


def test_very_many_intervals_are_thinned_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "MAX_ROUTING_ROWS", 50)
    routing = read_history(rundir.routed(tmp_path / "run", steps=1000, every=5)).routing
    assert 25 <= len(routing.steps) < 50 and set(np.diff(routing.steps)) == {40}
    values = routing.figures["load_cv"]["layers.2.blocks.3"]
    assert values == pytest.approx(1.1 + 0.05 * np.sin(routing.steps + 1))


def test_the_last_row_of_a_step_counts(tmp_path):
    run = rundir.routed(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(rundir.row(200, **{"moe/a2a_share": 0.1, "moe/layers.2.blocks.1/load_cv": 9.0})) + "\n")
    routing = read_history(run).routing
    assert routing.steps.tolist() == list(range(10, 201, 10))
    assert routing.figures["load_cv"]["layers.2.blocks.1"][-1] == 9
    assert np.isnan(routing.figures["dead"]["layers.2.blocks.1"][-1])
