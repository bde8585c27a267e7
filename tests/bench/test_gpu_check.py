"""What `make gpu-check` would run, as far as a machine without a GPU can tell."""

import argparse
import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch

from swin_scale.bench.cli import add_parser
from swin_scale.bench.region import shapes
from swin_scale.models import variant

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks/gpu_check.py")
gpu_check = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu_check)

COMMANDS = {
    stem: options for cases in gpu_check.CASES.values() for stem, options in cases.items() if options[0] != "large"
}


@pytest.mark.parametrize("stem", COMMANDS)
def test_the_command_line_understands_what_a_part_runs(stem):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["bench", *COMMANDS[stem], "--out", "result.json"])
    assert callable(arguments.handler)
    if arguments.name in ("model", "train"):
        assert variant(arguments.model).family == "swinv2"
    if arguments.name == "kernels" and "attention" in arguments.parts:
        assert shapes(arguments.shapes, arguments.models, arguments.shifts)


def test_result_files_have_names_of_their_own_and_every_tested_part_has_tests():
    stems = [stem for cases in gpu_check.CASES.values() for stem in cases]
    assert len(stems) == len(set(stems)) and not set(stems) & set(gpu_check.CASES)
    for part in gpu_check.TESTED:
        assert part in gpu_check.CASES and (ROOT / f"tests/gpu/test_{part}.py").is_file()


@pytest.mark.parametrize(
    ("left_out", "outcome"),
    [([], "done"), (["L 384 w24 s1, fp16", "T w8 s4, fp16"], "left out, no time: L 384 w24 s1, fp16; T w8 s4, fp16")],
)
def test_what_a_benchmark_had_no_time_for_is_named(left_out, outcome, tmp_path, monkeypatch):
    path = tmp_path / "kernels.json"

    def run(command, deadline):
        path.write_text(json.dumps({"left_out": left_out}))
        return 0, 1.0

    monkeypatch.setattr(gpu_check, "run", run)
    found = gpu_check.run_bench(["kernels"], path, time.monotonic() + 100)
    assert found == {"outcome": outcome, "seconds": 1.0}
    assert gpu_check.run_bench(["kernels"], path, time.monotonic() + 10) == {"outcome": "left out: no time"}
    assert not path.exists()


SKIPPED = '<skipped type="pytest.skip" message="{}"/>'


@pytest.mark.parametrize(
    ("reasons", "passed", "optional"),
    [
        ([None, None], True, {}),
        ([None, "optional: NVIDIA Apex is not installed"], True, {"t1": "NVIDIA Apex is not installed"}),
        ([None, "optional: no nvcc", "no CUDA device"], False, {"t1": "no nvcc"}),
        (["optional: no nvcc"], False, {"t0": "no nvcc"}),
    ],
)
def test_only_tests_of_optional_packages_may_be_skipped(reasons, passed, optional, monkeypatch):
    cases = "".join(
        f'<testcase name="t{i}">{"" if reason is None else SKIPPED.format(reason)}</testcase>'
        for i, reason in enumerate(reasons)
    )
    skipped = sum(reason is not None for reason in reasons)
    counts = f'tests="{len(reasons)}" failures="0" errors="0" skipped="{skipped}"'

    def run(command, deadline):
        [report] = [word.partition("=")[2] for word in command if word.startswith("--junitxml=")]
        Path(report).write_text(f"<testsuites><testsuite {counts}>{cases}</testsuite></testsuites>")
        return 0, 1.0

    monkeypatch.setattr(gpu_check, "run", run)
    found = gpu_check.run_tests("train", time.monotonic() + 100)
    assert (found["passed"], found["optional"], found["skipped"]) == (passed, optional, skipped)


def test_without_a_gpu_it_ends_at_once(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "kernels"])
    assert gpu_check.main() == 2
    assert "no CUDA device" in capsys.readouterr().err
