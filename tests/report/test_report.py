"""The page as text: what it holds, what it must never hold, how large it gets."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from swin_scale.errors import UserError
from swin_scale.report import environment, write_report
from swin_scale.report.history import read_history
from swin_scale.report.pictures import pictures
from tests.report import rundir

HOSTILE = "</script></style><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&\ud800"


class Page(HTMLParser):
    """Tags with their attributes, and all text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def render(run):
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    run = rundir.full(tmp_path_factory.mktemp("report") / "run")
    return run, render(run)


def test_every_picture_of_a_full_run_is_drawn_with_words(full):
    run, page = full
    keys = [picture.key for picture in pictures(read_history(run))]
    assert keys == ["loss", "aux", "accuracy", "lr", "norm", "rate", "wait", "scale", "memory", "mfu"]
    svgs = page.of("svg")
    assert [svg["id"] for svg in svgs] == [f"p-{key}" for key in (*keys, "events")]
    titles = {attrs["id"] for tag, attrs in page.tags if tag in ("title", "desc") and "id" in attrs}
    for svg in svgs:
        assert svg["role"] == "img" and set(svg["aria-labelledby"].split()) <= titles
        if svg["id"] != "p-events":
            cells = json.loads(svg["data-hover"])
            assert len(cells) > 4 and all(len(cell) == 3 for cell in cells)


def test_summary_and_tables_say_what_happened(full):
    _, page = full
    for text in (
        "finished (exit 0)", "600", "50 done again after a resume", "73.00 %", "ema at step 600", "step 600",
        "throughout", "Skipped updates", "fell_back", "step_00000300 is damaged", "top-5, ema", "from step 250",
        "swinv2_tiny", "command line", "000001.tar", "Dashed upright lines: fell_back, resumed.",
    ):  # fmt: skip
        assert text in page.text, text


def test_the_page_asks_for_nothing_and_runs_only_its_own_script(full):
    run, page = full
    text = (run / "report.html").read_text()
    assert len(page.of("script")) == 1 and not page.of("link") and not page.of("img")
    assert not any(name in attrs for _, attrs in page.tags for name in ("src", "href", "style", "onclick"))
    assert not re.search(r"url\(|@import|https?://", text)
    policy = page.of("meta")[1]["content"]
    assert policy.startswith("default-src 'none'; ") and "script-src 'sha256-" in policy


def test_hostile_text_stays_text(tmp_path):
    rows = [rundir.event(HOSTILE, 1), rundir.event("start", 2, environment={HOSTILE: HOSTILE}, checkpoint=HOSTILE)]
    rows += [rundir.event("eval", 2, weights=HOSTILE, top1=HOSTILE, top5=3.0), rundir.row(1), rundir.row(2)]
    run = rundir.write(tmp_path / "a<b>&'run", rows)
    (run / "skipped.jsonl").write_text(json.dumps({"step": 1, "shard": HOSTILE, "key": HOSTILE, "reason": HOSTILE}))
    (run / "exit.json").write_text(json.dumps({"code": 3, "rank": HOSTILE, "cause": HOSTILE}))
    (run / "config.yaml").write_text(f"model:\n  name: {HOSTILE[:-1]}  # {HOSTILE[:-3]}\n")
    page = render(run)
    assert len(page.of("script")) == 1 and not page.of("img")
    assert page.text.count("document.title='owned'") > 8


@pytest.mark.parametrize(("code", "words"), [(3, "stopped: data (exit 3)"), (75, "preempted and saved"), (1, "error")])
def test_a_run_that_failed_says_why(tmp_path, code, words):
    run = rundir.write(tmp_path / "run", [rundir.row(1)])
    (run / "exit.json").write_text(json.dumps({"code": code, "rank": 1, "cause": "DataError: it broke"}))
    page = render(run)
    assert words in page.text and "DataError: it broke" in page.text


@pytest.mark.parametrize(
    "files", [{"exit.json": "{"}, {"metrics.jsonl": '{"step": 1, "lo'}, {"config.yaml": "\x00: ["}]
)
def test_whatever_is_on_disk_makes_a_page(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    page = render(tmp_path)
    assert "No step was recorded" in page.text and "no end recorded" in page.text


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_nan_null_and_missing_steps_are_gaps(tmp_path):
    """Steps 1 to 9 without 3 (null), 5 (NaN in the file) and 7 (no row): the line has four pieces."""
    lines = [json.dumps(rundir.row(s, loss=None if s == 3 else float("nan") if s == 5 else 2.0 + s / 9))
             for s in range(1, 10) if s != 7]  # fmt: skip
    run = rundir.write(tmp_path / "run", [])
    (run / "metrics.jsonl").write_text("\n".join(lines))
    text = write_report(run).read_text()
    svg = text[text.index('<svg id="p-loss"') : text.index("</svg>")]
    assert re.search(r'class="line" d="([^"]+)"', svg)[1].count("M") == 4


def test_one_step_and_no_steps(tmp_path):
    assert len(render(rundir.write(tmp_path / "one", [rundir.row(1)])).of("svg")) > 4
    assert "No step was recorded" in render(rundir.write(tmp_path / "none", [])).text


def columns_of(path, key):
    """(x, y) of the corners of the band of one picture."""
    text = path.read_text()
    svg = text[text.index(f'<svg id="p-{key}"') :]
    corners = re.search(r'class="band" d="([^"]+)"', svg)[1]
    return np.array([pair.split() for pair in re.findall(r"[\d.]+ [\d.]+", corners)], dtype=float)


def long_run(directory, steps, spike):
    run = rundir.write(directory, [])
    template = json.dumps(rundir.row(0)).replace('"step": 0,', '"step": {},', 1)
    assert "{}" in template
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            line = template.replace("{}", str(step), 1)
            file.write((line.replace('"grad_norm": 3.0', '"grad_norm": 9.5') if step == spike else line) + "\n")
    return run


@pytest.mark.parametrize("steps", [20_000, pytest.param(1_000_000, marks=pytest.mark.proof)])
def test_a_long_run_stays_small_and_keeps_a_spike_of_one_step(tmp_path, steps):
    spike = steps // 3
    path = write_report(long_run(tmp_path / "run", steps, spike))
    assert path.stat().st_size < (2 << 20)
    corners = columns_of(path, "norm")
    top = corners[np.argmin(corners[:, 1])]
    assert (corners[:, 1] == top[1]).sum() == 1, "the spike is one cell wide"
    assert top[0] == pytest.approx(50 + 422 / 3, abs=1.5) and corners[:, 1].max() - top[1] > 100


def test_a_report_needs_neither_torch_nor_deepspeed(tmp_path):
    run = rundir.write(tmp_path / "run", [rundir.row(1)])
    program = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "deepspeed", "yaml", "webdataset"):
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
from swin_scale.report import environment, write_report
assert environment(ranks=1, nodes=1, device="cpu")["torch"]
write_report({str(run)!r})
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0 and (run / "report.html").exists(), result.stderr


def test_environment_is_text_with_versions_and_layout():
    facts = environment(ranks=8, nodes=2, device="NVIDIA H100")
    assert {"swin_scale", "python", "torch", "deepspeed", "host of rank 0", "system"} <= facts.keys()
    assert (facts["ranks"], facts["nodes"], facts["device"]) == ("8", "2", "NVIDIA H100")
    assert all(isinstance(value, str) for value in facts.values()) and "tutel" not in facts
