"""The verb `plan`: parse, forecast, print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from swin_scale.errors import UserError

if TYPE_CHECKING:
    from swin_scale.config import Config

Load = Callable[[argparse.Namespace], Any]
"""The arguments' config, loaded, as `swin_scale.cli` does for every verb."""


def add_parser(verbs: Any, config_arguments: Callable[[argparse.ArgumentParser], None], load: Load) -> None:
    """Add `plan` to the verbs; imports nothing heavy."""
    plan = verbs.add_parser("plan", help="memory, traffic, time and cost of a run, before anything is queued")
    config_arguments(plan)
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the whole run")
    plan.add_argument("--gpu", required=True, metavar="NAME", help="h200, h100, a100-40g, a100-80g or b200")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="N")
    plan.add_argument(
        "--interconnect", metavar="NAME", help="ib-100 to ib-800, eth-100, nvlink; default: the usual one"
    )
    plan.add_argument("--samples", type=int, metavar="N", help="training images of an epoch, if no shards tell")
    plan.add_argument("--storage", type=float, default=1.0, metavar="GB/S", help="a node's write speed")
    plan.add_argument("--search", action="store_true", help="the settings that fit, cheapest first")
    plan.add_argument("--json", action="store_true", help="one JSON object, an array of them for a run in stages")
    plan.set_defaults(handler=lambda arguments: run(arguments, load))


def run(arguments: argparse.Namespace, load: Load) -> int:
    """Print the plan, one for each stage of a run in stages; raises UserError, after that, where one does not fit."""
    from swin_scale.plan.make import make_plan, refusal

    plans = [
        make_plan(
            config,
            ranks=arguments.gpus,
            gpu=arguments.gpu,
            gpus_per_node=arguments.gpus_per_node,
            interconnect=arguments.interconnect,
            samples=arguments.samples,
            storage=arguments.storage * 1e9,
            searching=arguments.search,
        )
        for config in load(arguments).configs
    ]
    if arguments.json:
        told = [plan.as_dict() for plan in plans]
        print(json.dumps(told if len(told) > 1 else told[0], indent=1))
    else:
        print("\n\n".join(map(str, plans)))
    problems = [problem for problem in map(refusal, plans) if problem is not None]
    if problems:
        raise UserError("; ".join(problems))
    return 0


def forecast(configs: Sequence[Config], ranks: int, gpus_per_node: int, gpu: str | None) -> str:
    """The plan of each config as `launch` shows it, with a warning where one does not fit; how to get one, if `gpu`,
    the kind, is not known. Raises UserError for models that cannot be.
    """
    from swin_scale.plan.hardware import GPUS

    name = (gpu or "").lower().replace("_", "-")
    if name not in GPUS:
        seen = f"GPU {gpu} is not known" if gpu else "the kind of GPU is not known"
        return f"plan    {seen}; --gpu forecasts memory and time for {', '.join(GPUS)}"
    from swin_scale.plan.make import make_plan, refusal

    plans = [make_plan(config, ranks=ranks, gpu=name, gpus_per_node=gpus_per_node) for config in configs]
    problems = [f"warning: {problem}" for plan in plans if (problem := refusal(plan)) is not None]
    return "\n\n".join(map(str, [*plans, *problems]))
