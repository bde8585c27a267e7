"""Shards of real digits for whole runs, and the table of injected faults at the end of a test run."""

import shutil
from collections import Counter

import pytest

FAULT = "fault"


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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Carry a test's fault in its report, which is what xdist sends home."""
    for mark in item.iter_markers(FAULT):
        number, what = mark.args
        item.user_properties.append((FAULT, (number, what)))


def pytest_terminal_summary(terminalreporter):
    """One line per injected fault: its number, what was injected, and how its tests ended."""
    outcomes: dict[tuple[int, str], Counter[str]] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            for key, value in report.user_properties:
                if key == FAULT:
                    outcomes.setdefault(tuple(value), Counter())[outcome] += 1
    if outcomes:
        terminalreporter.section("injected faults")
    for (number, what), counts in sorted(outcomes.items()):
        ended = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        terminalreporter.line(f"fault {number:>2}  {what}: {ended}")
