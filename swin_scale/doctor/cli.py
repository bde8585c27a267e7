"""The verb `doctor`: look, print, and answer by the exit code: 0, 2 for a refusal, 3 for one of data alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swin_scale.errors import DataError, UserError


def add_parser(verbs: Any, load: Callable[[argparse.Namespace], Any], find: Callable[[str], Path]) -> None:
    """Add `doctor` to the verbs; imports nothing heavy."""
    doctor = verbs.add_parser("doctor", help="checks of machine, disk, data and peers before step 1")
    doctor.add_argument("config", nargs="?", help="YAML file, or the name of a shipped recipe; default: that of --run")
    doctor.add_argument("overrides", nargs="*", metavar="a.b=c", help="values to set over the file's")
    doctor.add_argument("--run", metavar="DIR", help="run directory; default: the config's run.dir")
    doctor.add_argument(
        "--nproc", type=int, default=1, help="look from so many processes here, as `launch local` would"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON array")
    doctor.set_defaults(handler=lambda arguments: run(arguments, load, find))


def run(arguments: argparse.Namespace, load: Callable[[argparse.Namespace], Any], find: Callable[[str], Path]) -> int:
    """Look and print on rank 0; the same exit code on all ranks."""
    own = Path(arguments.run, "config.yaml") if arguments.run else None
    if arguments.config is None and own is not None and own.is_file():
        arguments.config = str(own)
    if arguments.nproc != 1:
        return _launch(arguments, find)
    from swin_scale.doctor.examine import examine
    from swin_scale.engine.dist import init, read_env

    configs = load(arguments).configs if arguments.config else ()
    layout = read_env(os.environ)
    run_dir = Path(arguments.run) if arguments.run else None
    if layout.world == 1:
        findings = examine(configs, run_dir=run_dir)
        _show(findings, arguments.json)
        return exit_code(findings)
    with init(layout, timeout_s=configs[0].engine.timeout_s if configs else 600.0) as dist:
        findings = examine(configs, run_dir=run_dir, dist=dist)
        code = dist.broadcast_json("exit code", exit_code(findings) if dist.is_main else None)
        if dist.is_main:
            _show(findings, arguments.json)
        return int(code)


def exit_code(findings: Sequence[Any]) -> int:
    """0 without refusals, 3 where all of them are about data, else 2."""
    bad = [finding for finding in findings if finding.verdict == "refuse"]
    if not bad:
        return 0
    return DataError.exit_code if all(finding.data for finding in bad) else UserError.exit_code


def _launch(arguments: argparse.Namespace, find: Callable[[str], Path]) -> int:
    from launcher.local import launch_local

    config = [str(find(arguments.config)), *arguments.overrides] if arguments.config else []
    options = [*(["--run", arguments.run] if arguments.run else []), *["--json"] * arguments.json]
    return launch_local(arguments.nproc, ["doctor", *config, *options])


def _show(findings: Sequence[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
        return
    for finding in findings:
        print(finding)
    worst = [sum(f.verdict == verdict for f in findings) for verdict in ("refuse", "warn")]
    print(f"{len(findings)} checks: {worst[0]} refused, {worst[1]} warnings")
