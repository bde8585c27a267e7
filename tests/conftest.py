"""Shards of real digits for whole runs; what a test run says at its end: faults injected, figures proven, failures."""

import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

import hypothesis
import pytest

FAULT = "fault"
PROOF = "proof: "
"""Begins the lines of a test's output that tell a figure; the end of a run shows those of the tests that passed."""


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """(train, val) shard sets of a few hundred real digits: 300 in three shards, and 50."""
    from data_prep.digits import write_digit_folders
    from data_prep.write import write_shards

    root = tmp_path_factory.mktemp("digits")
    train, val = write_digit_folders(root / "images", val_per_class=470)
    write_shards(train, root / "train", workers=1, samples_per_shard=100)
    few = root / "few"
    for folder in sorted(val.iterdir()):
        (few / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:5]:
            shutil.copy(image, few / folder.name)
    write_shards(few, root / "val", workers=1)
    return root / "train", root / "val"


def pytest_configure(config):
    """Properties draw the same examples every time, none of which a busy machine has a deadline for."""
    hypothesis.settings.register_profile("swin_scale", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("swin_scale")


def pytest_collection_modifyitems(items):
    """Tests that take minutes begin first, so that no core waits for one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Carry a test's fault in its report, which is what xdist sends home."""
    for mark in item.iter_markers(FAULT):
        number, what = mark.args
        item.user_properties.append((FAULT, (number, what)))
    _seed(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    _seed(2)  # whether its fixtures were made for it or before


def _seed(number: int) -> None:
    """What a test draws of torch must not depend on the tests that xdist let run before it in the same process."""
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(number)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """Skips by reason, faults injected, figures proven, and last, where an eye or a cut-off log finds them, failures in
    a line each."""
    reports = terminalreporter.stats
    _section(terminalreporter, "skipped", _skips(reports.get("skipped", ())))
    _section(terminalreporter, "injected faults", _faults(reports))
    _section(terminalreporter, "proven", _figures(reports.get("passed", ())))
    _section(terminalreporter, "failed", map(_failure, [*reports.get("failed", ()), *reports.get("error", ())]))


def _section(terminalreporter, title: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    if lines:
        terminalreporter.section(title)
    for line in lines:
        terminalreporter.line(line)


def _skips(reports) -> Iterator[str]:
    """One line per reason, with how many tests it kept from running."""
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)
    yield from (f"{count:>4}  {reason}" for reason, count in sorted(reasons.items()))


def _faults(reports) -> Iterator[str]:
    """One line per injected fault: its number, what was injected, and how its tests ended."""
    outcomes: dict[tuple[int, str], Counter[str]] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in reports.get(outcome, ()):
            for key, value in report.user_properties:
                if key == FAULT:
                    outcomes.setdefault(tuple(value), Counter())[outcome] += 1
    for (number, what), counts in sorted(outcomes.items()):
        ended = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        yield f"fault {number:>2}  {what}: {ended}"


def _figures(reports) -> Iterator[str]:
    """What passed tests printed of their figures, in the order of the files."""
    for report in sorted(reports, key=lambda report: report.nodeid):
        yield from (line for line in report.capstdout.splitlines() if line.startswith(PROOF))


def _failure(report) -> str:
    """A test, and the first and the last line of its error: a rank's own error ends what its parent raises."""
    text = report.longreprtext.splitlines()
    error = [line[1:].strip() for line in text if line.startswith("E ")] or text[-1:]
    error = [line for line in error if line and not line.startswith("Use -v")]
    ends = [line[:300] for line in (error[:1] + error[1:][-1:])]
    return f"{report.nodeid}: {' ... '.join(ends)}"
