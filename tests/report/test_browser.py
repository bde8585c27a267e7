"""The page in a real browser: every curve is drawn in its colour, nothing is asked for, no script of others runs."""

import json

import numpy as np
import pytest

from swin_scale.report import write_report
from tests.report import rundir
from tests.report.browser import Browser, find_chromium

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
