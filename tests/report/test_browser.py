"""The page in a real browser: every curve is drawn in its colour, nothing is asked for, no script of others runs."""

import json

import numpy as np
import pytest

from swin_scale.report import write_report
from swin_scale.report.survey_page import survey_page
from tests.report import rundir
from tests.report.browser import Browser, find_chromium
from tests.report.surveys import layer, survey

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no chromium on this machine")

BOXES = """[...document.querySelectorAll("svg")].map(svg => {
  const box = svg.getBoundingClientRect();
  const drawn = [...svg.querySelectorAll(".line, .tick")].map(path => {
    const own = path.getBoundingClientRect();
    return [getComputedStyle(path).stroke, own.left + scrollX, own.top + scrollY, own.right + scrollX,
            own.bottom + scrollY, path.getTotalLength()];
  });
  return {id: svg.id, left: box.left, right: box.right, drawn};
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(rundir.full(tmp_path_factory.mktemp("run") / "run"))


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False)])
def test_every_picture_is_drawn_in_its_colours(browser, report, width, dark):
    browser.open(report, width=width, dark=dark)
    seen = browser.picture()
    boxes = browser.value(BOXES)
    assert len(boxes) == 11
    for box in boxes:
        assert 0 <= box["left"] < box["right"] <= width and box["drawn"]
        for colour, left, top, right, bottom, length in box["drawn"]:
            wanted = np.array([int(part) for part in colour[4:-1].split(",")])
            part = seen[int(top) - 2 : int(bottom) + 3, int(left) - 2 : int(right) + 3].astype(int)
            near = (np.abs(part - wanted).max(axis=2) < 40).sum()
            assert near > 4 and near > 0.2 * min(length, right - left), (box["id"], colour, near)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.requests() == [report.resolve().as_uri()] and browser.complaints() == []


CELLS = """[...document.querySelectorAll("svg[data-cells]")].map(svg => {
  const box = svg.getBoundingClientRect(), map = JSON.parse(svg.dataset.cells);
  const unit = box.width / svg.viewBox.baseVal.width;
  const at = [...Array(map.values.length).keys()].filter(i => map.values[i] !== null);
  const best = at.reduce((a, b) => map.values[b] > map.values[a] ? b : a), columns = map.columns.length;
  const x = box.left + (map.area[0] + (best % columns + 0.5) * map.area[2] / columns) * unit;
  const y = box.top + (map.area[1] + (Math.floor(best / columns) + 0.5) * map.area[3] / map.rows.length) * unit;
  return {id: svg.id, left: box.left, right: box.right, x: x + scrollX, y: y + scrollY, value: map.values[best],
          colour: [...svg.querySelectorAll(".cells path")].map(path => getComputedStyle(path).fill).at(-1)};
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """(page, heat maps on it): a run with MoE layers, and a look at a trained model."""
    root = tmp_path_factory.mktemp("routing")
    look = root / "routing.html"
    look.write_text(survey_page(survey(layer(), layer("layers.3.blocks.1", experts=32, side=12, drop=0.3)), 0.0))
    return (write_report(rundir.routed(root / "run")), 4), (look, 1 + 8 + 2 + 32)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False)])
def test_heat_maps_are_drawn_and_the_fullest_cell_has_the_colour_of_its_level(browser, pages, width, dark):
    for page, count in pages:
        browser.open(page, width=width, dark=dark)
        seen = browser.picture()
        maps = browser.value(CELLS)
        assert len(maps) == count
        for one in maps:
            assert 0 <= one["left"] < one["right"] <= width
            wanted = [int(part) for part in one["colour"][4:-1].split(",")]
            assert np.abs(seen[int(one["y"]), int(one["x"])].astype(int) - wanted).max() < 12, one
        if count == 4:  # runs' maps have their largest value at the end of the scale, which turns with the page
            assert max(wanted) < 100 if not dark else min(wanted) > 200
        assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.requests() == [page.resolve().as_uri()] and browser.complaints() == []


@pytest.mark.parametrize("width", [1280, 360])
def test_cells_tell_their_row_column_and_value(browser, pages, width):
    browser.open(pages[1][0], width=width)
    one = next(one for one in browser.value(CELLS) if one["id"] == "p-classes-1")
    browser.value(f"scrollTo(0, {one['y']} - 300)")
    y = one["y"] - browser.value("scrollY")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=one["x"], y=y)
    tip = "document.querySelector('#p-classes-1 ~ .tip:not([hidden])')"
    row, column, value = browser.value(f"{tip}.textContent").split("\n")
    assert row.startswith("class kind ") and column.startswith("expert ") and value == f"{one['value']:g} %"
    assert browser.value(f"{tip}.getBoundingClientRect().right") <= width
    assert browser.value("document.documentElement.scrollWidth") <= width


def test_values_show_under_the_pointer(browser, report):
    browser.open(report)
    x, y = browser.value(
        "(() => { const b = document.querySelector('#p-loss').getBoundingClientRect();"
        " return [b.left + b.width / 2, b.top + b.height / 2]; })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    words = browser.value("document.querySelector('#p-loss ~ .tip:not([hidden])').textContent")
    assert words.startswith("step 27") and "training 2." in words


def test_no_script_of_others_runs(browser, tmp_path):
    """Not even when the escaping is taken away: the page's policy allows one script, by its digest."""
    attack = (
        "<script>document.title='owned'</script><img src='http://203.0.113.1/x' onerror=\"document.title='owned'\">"
    )
    run = rundir.write(tmp_path / "run", [rundir.row(1)])
    (run / "exit.json").write_text(json.dumps({"code": 3, "rank": 0, "cause": attack}))
    path = write_report(run)
    browser.open(path)
    assert browser.value("document.title") == "run: run report"
    assert browser.value("document.querySelectorAll('script').length") == 1 and browser.complaints() == []
    bare = tmp_path / "bare.html"
    bare.write_text(path.read_text().replace("<footer>", f"{attack}<footer>"))
    browser.open(bare)
    assert browser.value("document.querySelectorAll('script').length") == 2
    assert browser.value("document.title") == "run: run report"
    assert len(browser.complaints()) >= 2
