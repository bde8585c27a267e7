"""GPU tests and benchmarks of one part, on a machine that has a GPU: ``python benchmarks/gpu_check.py PART``.

Each part takes at most 8 minutes, the most telling first; what no longer fits is named as left out. `kernels-more` and
`model-more` go on where `kernels` and `model` end, without their tests. Everything runs in processes of
their own with this interpreter, from the repository's root. Results are small JSON files below --out, with
``PART.json`` saying what passed. Exit codes: 0 all passed, 1 something failed or was left out, 2 no CUDA device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BUDGET_S = 450.0
SHAPE_S = 75.0
"""What the last shape that a benchmark of kernels begins may take, its compilation included."""
OPTIONAL = "optional: "
"""How the reason begins by which a test is skipped for want of a package that users need not have either."""
TESTED = ("kernels", "model", "moe", "train")

W8, W16, W12, W24 = (
    "swinv2_tiny_patch4_window8_256",
    "swinv2_tiny_patch4_window16_256",
    "swinv2_base_patch4_window12_192_22k",
    "swinv2_large_patch4_window12to24_192to384_22kto1k_ft",
)
BASE_W16 = "swinv2_base_patch4_window16_256"
NANO = "swinv2_nano_patch4_window4_32"

G3B = "swinv2_g3b_patch4_window12_192"
MOE_TOKENS = ("--tokens", "32768", "--many-tokens", "65536")

MAIN_SHAPES = ("T w8 s1", "B 192 w12 s1", "T w16 s1", "L 384 w24 s1")
EAGER = ("official-amp", "official", "sdpa")
# Batches that leave the official code under AMP room in 80 GB.
STEP = ("--precision", "fp16", "--mode", "step", "--compile", "--peers", "official-amp", "official")
INFERENCE = ("--precision", "fp16", "--inference", "--compile", "--peers", "official")

# File stem -> arguments of `swin-scale bench`, or of large_step.py, most telling first.
CASES: dict[str, dict[str, list[str]]] = {
    "train": {
        "train-base-w12-bf16": ["train", "--model", W12, "--precision", "bf16", "--batch", "64"],
        "train-base-w12-fp16": ["train", "--model", W12, "--precision", "fp16", "--batch", "64", "--warmup", "12"],
        "train-base-w12-bf16-zero2": ["train", "--model", W12, "--batch", "64", "--zero-stage", "2"],
        "train-base-w12-bf16-zero3": ["train", "--model", W12, "--batch", "64", "--zero-stage", "3"],
        "train-base-w12-bf16-block": ["train", "--model", W12, "--batch", "64", "--activation-checkpointing", "block"],
        "train-nano-bf16": ["train", "--model", NANO, "--precision", "bf16", "--batch", "256"],
        "train-nano-fp16": ["train", "--model", NANO, "--precision", "fp16", "--batch", "256", "--warmup", "12"],
    },
    "kernels": {
        "kernels-fp16": [
            *("kernels", "--parts", "attention", "--shapes", *MAIN_SHAPES, "--shifts", "shifted", "--dtypes", "fp16"),
            *("--launches", "graphs", "--peers", *EAGER, "compile", "flex", "fwa-2", "ours-atomic"),
        ],
        "kernels-ops-fp16": ["kernels", "--parts", "ops", "--dtypes", "fp16", "--launches", "graphs"],
    },
    "kernels-more": {
        "kernels-bf16": [
            *("kernels", "--parts", "attention", "--shapes", *MAIN_SHAPES, "--shifts", "shifted", "--dtypes", "bf16"),
            *("--launches", "graphs", "--peers", *EAGER, "compile"),
        ],
        "kernels-calls": [
            *("kernels", "--parts", "attention", "--shapes", *MAIN_SHAPES, "--shifts", "shifted", "--dtypes", "fp16"),
            *("--launches", "calls", "--peers", *EAGER, "official-code", "ours-chunked"),
        ],
        "kernels-all-shapes": [
            *("kernels", "--parts", "attention", "--dtypes", "fp16", "--launches", "graphs", "--peers", *EAGER),
        ],
        "kernels-ops-bf16": ["kernels", "--parts", "ops", "--dtypes", "bf16", "--launches", "graphs"],
    },
    # Its file is a table of tiles: what it gains is in `bench kernels` with SWIN_SCALE_TILES naming it.
    "tune": {"tiles-fp16": ["tune", "--shapes", *MAIN_SHAPES, "--dtypes", "fp16"]},
    "model": {
        "step-tiny-w8": ["model", "--model", W8, "--batch", "128", *STEP, "--launches", "calls", "graphs"],
        "step-large-w24": ["model", "--model", W24, "--batch", "24", *STEP],
        "step-base-w12": ["model", "--model", W12, "--batch", "128", *STEP],
        "step-tiny-w16": ["model", "--model", W16, "--batch", "96", *STEP],
        "inference-tiny-w8": ["model", "--model", W8, *INFERENCE],
        "inference-large-w24": ["model", "--model", W24, *INFERENCE],
    },
    "model-more": {
        "model-tiny-w8-amp-bf16": ["model", "--model", W8, "--batch", "64", "--precision", "amp-bf16"],
        "model-tiny-w8-fp32": ["model", "--model", W8, "--batch", "64", "--precision", "fp32"],
        "model-tiny-w16-bf16": ["model", "--model", W16, "--batch", "64", "--precision", "bf16"],
        "step-base-w12-bf16": [
            *("model", "--model", W12, "--batch", "128", "--precision", "bf16", "--mode", "step"),
            *("--compile", "--peers", "official-amp", "reference", "huggingface"),
        ],
        "inference-base-w16": ["model", "--model", BASE_W16, *INFERENCE],
    },
    # A block of Swin-MoE-S on 128 images has 18,432 tokens; with few, launches are all there is to time.
    "moe": {
        f"moe-{precision}": [*("moe", "--precision", precision, "--memory-tokens", "32768", *MOE_TOKENS)]
        for precision in ("bf16", "fp16", "fp32")
    },
    # 75 GB of files: TMPDIR must hold them.
    "large": {
        "large-g3b-w12-bf16": [
            *("large", "--model", G3B, "--steps", "10", "--batch", "32"),
            *("engine.zero_stage=1", "engine.precision=bf16", "data.workers=4"),
        ],
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=sorted(CASES))
    parser.add_argument("--official", metavar="DIR", help="a checkout of microsoft/Swin-Transformer to compare with")
    parser.add_argument("--fwa", metavar="DIR", help="a checkout of emiledgl/flash-window-attention-v2, for kernels")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    parser.add_argument("--rounds", type=int, default=20, help="of the model and MoE benchmarks")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for the whole part")
    arguments = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device on this machine; nothing was tested", file=sys.stderr)
        return 2
    from swin_scale.bench.result import hardware, versions

    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + arguments.budget
    summary: dict[str, Any] = {
        "part": arguments.part,
        "hardware": hardware(torch.device("cuda")),
        "versions": versions(),
        "tests": run_tests(arguments.part, deadline) if arguments.part in TESTED else {"passed": True, "tests": 0},
        "benchmarks": {},
    }
    for stem, options in CASES[arguments.part].items():
        if options[0] in ("kernels", "tune", "model", "moe"):
            options = [*options, "--rounds", str(arguments.rounds)]
        if options[0] in ("kernels", "model") and arguments.official:
            options += ["--official", str(Path(arguments.official).resolve())]
        if options[0] in ("kernels", "tune"):
            # It names what it has no time for, where a process that is ended would leave nothing.
            options += ["--budget", f"{max(1.0, deadline - time.monotonic() - SHAPE_S):.0f}"]
        if options[0] == "kernels" and arguments.fwa:
            options += ["--fwa", str(Path(arguments.fwa).resolve())]
        summary["benchmarks"][stem] = run_bench(options, out / f"{stem}.json", deadline)
    summary["passed"] = summary["tests"]["passed"] and all(
        case["outcome"] == "done" for case in summary["benchmarks"].values()
    )
    (out / f"{arguments.part}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"gpu-check: part={arguments.part} passed={summary['passed']} results={arguments.out}")
    return 0 if summary["passed"] else 1


def run_tests(part: str, deadline: float) -> dict[str, Any]:
    """Run the part's GPU tests; their counts, and what they recorded as properties."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [f"tests/gpu/test_{part}.py", *["tests/gpu/test_plan.py"] * (part == "train")]
        command = ["-m", "pytest", "-m", "gpu", *files, f"--junitxml={report}"]
        if part == "kernels" and importlib.util.find_spec("xdist"):
            # Most of their time goes into compiling kernels, on the CPU.
            command += ["-n", str(min(8, max(1, (os.cpu_count() or 1) // 2)))]
        code, seconds = run(command, deadline)
        if not report.exists():
            return {"passed": False, "seconds": seconds, "outcome": f"pytest gave no report (exit code {code})"}
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    optional = {
        str(case.get("name")): str(skip.get("message")).removeprefix(OPTIONAL)
        for suite in suites
        for case in suite.iter("testcase")
        for skip in case.iter("skipped")
        if str(skip.get("message")).startswith(OPTIONAL)
    }
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    properties = {found.get("name"): found.get("value") for suite in suites for found in suite.iter("property")}
    # A skipped test proves nothing here, except that a package is not there which need not be.
    passed = code == 0 and counts["tests"] > counts["skipped"] and counts["skipped"] == len(optional)
    return {"passed": passed, "seconds": seconds, **counts, "optional": optional, "recorded": properties}


def run_bench(options: list[str], path: Path, deadline: float) -> dict[str, Any]:
    """One benchmark; its file is absent unless it ended well."""
    path.unlink(missing_ok=True)
    if time.monotonic() > deadline - 20:
        print(f"left out, no time: {path.stem}")
        return {"outcome": "left out: no time"}
    program = ["-m", "swin_scale", "bench"]
    if options[0] == "large":
        program, options = ["benchmarks/large_step.py"], options[1:]
    code, seconds = run([*program, "--out", str(path), *options], deadline)
    if code != 0 or not path.exists():
        return {"outcome": f"failed (exit code {code})", "seconds": seconds}
    left_out = json.loads(path.read_text(encoding="utf-8")).get("left_out")
    return {"outcome": "done" if not left_out else f"left out, no time: {'; '.join(left_out)}", "seconds": seconds}


def run(command: list[str], deadline: float) -> tuple[int | None, float]:
    """Run this interpreter on `command` until `deadline`; exit code (None if it ran out of time) and seconds."""
    began = time.monotonic()
    try:
        code = subprocess.run(
            [sys.executable, *command], cwd=ROOT, timeout=max(1.0, deadline - began), check=False
        ).returncode
    except subprocess.TimeoutExpired:
        code = None
        print("out of time:", *command)
    return code, round(time.monotonic() - began, 1)


if __name__ == "__main__":
    sys.exit(main())
