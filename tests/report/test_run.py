"""Runs through the command line: each leaves its report, whatever its end."""

import pytest

from swin_scale.report.history import read_history
from tests import runs


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """Six steps on one process, then the same command again with two more."""
    run_dir = tmp_path_factory.mktemp("report") / "run"
    for steps in (6, 8):
        result = runs.run(run_dir, digits[0], nproc=1, train__max_steps=steps, data__val=f"[{digits[1]}]")
        assert result.returncode == 0, result.stderr
    return run_dir


def test_a_run_ends_with_its_report(run):
    text = (run / "report.html").read_text()
    assert "finished (exit 0)" in text and 'id="p-loss"' in text and "resumed" in text
    first, again = read_history(run).named("start")
    assert (first["step"], first["checkpoint"], again["step"]) == (0, None, 6)
    assert again["checkpoint"] == "step_00000006"
    assert first["environment"]["device"] == "CPU" and first["environment"]["ranks"] == "1"


def test_a_run_that_fails_leaves_a_report_with_the_cause(run, digits):
    result = runs.run(run, digits[0], nproc=1, train__max_steps=10, optim__weight_decay=0.5)
    assert result.returncode == 2, result.stderr
    text = (run / "report.html").read_text()
    assert "stopped: wrong input (exit 2)" in text and "optim.weight_decay" in text


def test_a_report_that_cannot_be_written_fails_nothing(run, digits):
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    result = runs.run(run, digits[0], nproc=1, train__max_steps=9, data__val=f"[{digits[1]}]")
    assert result.returncode == 0 and "no report: " in result.stderr
    assert runs.exit_record(run)["code"] == 0
