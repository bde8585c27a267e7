"""What follows from a shipped recipe without a shard of its data: config, model, cost. Golden files are made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from swin_scale.config import BatchPlan, Config, batch_plan
from swin_scale.config_load import TASK_DEFAULTS, LoadedConfig, config_from_values, flatten
from swin_scale.engine.schedule import Schedule
from swin_scale.job import MOE_FIELDS
from swin_scale.models import Variant, variant
from swin_scale.models.simmim import SimMIM
from swin_scale.models.swin import Swin
from swin_scale.recipes import recipes as paths
from swin_scale.staged import Staged
from swin_scale.staged import load as load_staged
from swin_scale.tasks import TASKS

DATASETS = {
    "demo/shards/train": (4_500, 10),
    "shards/imagenet1k/train": (1_281_167, 1_000),
    "shards/imagenet22k/train": (14_197_122, 21_841),
    "shards/imagenet22k_ext/train": (70_000_000, 21_841),
    "shards/cub200/train": (5_994, 200),
}
"""Images and classes of the first directory of a recipe's `data.train`. ImageNet-22K-ext has about 70 million images by
the paper; its classes are taken to be those of ImageNet-22K."""
H100_BF16 = 989e12
UTILISATION = 0.25
"""Share of the peak that headers reckon with."""
NOT_DEFAULTED = ("run.dir", "data.train", "model.name", "optim.lr", "train.global_batch")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A shipped config, or one stage of a shipped run in stages."""

    name: str
    """Path below ``configs/`` without the suffix; of a stage, a colon and its name follow."""
    path: Path
    config: Config

    @property
    def room(self) -> str:
        """Directory below ``configs/``; the top is ``top``."""
        return self.name.partition("/")[0] if "/" in self.name else "top"

    @property
    def images(self) -> int:
        return DATASETS[self.config.data.train[0]][0]

    @property
    def steps_per_epoch(self) -> int:
        batch = self.config.train.global_batch
        return self.images // batch if self.config.data.drop_last else -(-self.images // batch)

    @property
    def plan(self) -> BatchPlan:
        """On the fewest ranks the recipe takes."""
        return batch_plan(self.config, self.config.moe.ep_size)

    @property
    def schedule(self) -> Schedule:
        return Schedule.from_config(self.config, self.steps_per_epoch)

    @property
    def overrides(self) -> dict[str, Any]:
        """Of the named variant, as a checkpoint of the run describes its model."""
        model = self.config.model
        given = {k: v for k, v in dataclasses.asdict(model).items() if k != "name" and v is not None}
        classes = DATASETS[self.config.data.train[0]][1] if TASKS[self.config.task].labelled else 0
        default = variant(model.name)
        given |= {"num_classes": classes, "img_size": self.config.data.img_size or default.img_size}
        if default.moe is not None:
            mixture = {name: getattr(self.config.moe, key) for key, name in MOE_FIELDS.items()}
            given["moe"] = {name: value for name, value in mixture.items() if value is not None}
        return given

    @property
    def network(self) -> Variant:
        return variant(self.config.model.name, **self.overrides)

    @property
    def macs(self) -> int:
        return TASKS[self.config.task](self.config).flops(self.network)

    @property
    def cost(self) -> str:
        """As headers say it: forward and backward of every image seen, two operations to a multiply-add."""
        operations = 6 * self.macs * self.images * self.config.train.epochs
        hours = operations / (UTILISATION * H100_BF16) / 3600
        shown = f"{hours:,.0f}" if hours >= 0.95 else f"{hours:.1f}"
        return f"{operations:.1e} FLOP, {shown} GPU-hours at 25 % of the bf16 peak of an H100".replace("e+", "e")

    def build(self) -> Swin | SimMIM:
        """The model on the meta device."""
        with torch.device("meta"):
            return TASKS[self.config.task](self.config).create(self.config.model.name, **self.overrides)


@cache
def recipes() -> tuple[Recipe, ...]:
    """Every config, and every stage of the runs in stages."""
    return tuple(recipe for name, path in paths().items() for recipe in _recipes(name, path))


def _recipes(name: str, path: Path) -> Iterator[Recipe]:
    loaded = load_staged(path)
    if isinstance(loaded, Staged):
        for stage in loaded.stages:
            yield Recipe(name=f"{name}:{stage.name}", path=path, config=stage.loaded.config)
    else:
        yield Recipe(name=name, path=path, config=loaded.config)


def models() -> dict[tuple[str, Variant], Recipe]:
    """A recipe for each different model: those that differ in rates, lengths or weights share theirs."""
    return {_model(recipe): recipe for recipe in recipes()}


def _model(recipe: Recipe) -> tuple[str, Variant]:
    return recipe.config.task, dataclasses.replace(recipe.network, drop_path_rate=0.0)


def parameters(recipe: Recipe) -> int:
    """Of its model."""
    return _count(models()[_model(recipe)])


@cache
def _count(recipe: Recipe) -> int:
    model = recipe.build()
    assert all(parameter.is_meta for parameter in model.parameters())
    return sum(parameter.numel() for parameter in model.parameters())


def defaults(task: str = "classify") -> dict[str, Any]:
    """Value of every key that a config does not set; keys of `NOT_DEFAULTED` have none."""
    required = {"run": {"dir": "-"}, "data": {"train": ["-"]}, "model": {"name": "-"}, "optim": {"lr": 1.0}}
    loaded: LoadedConfig = config_from_values({**required, "train": {"global_batch": 1}, "task": task})
    return {key: value for key, value in flatten(loaded.config) if key not in NOT_DEFAULTED}


def facts(recipe: Recipe) -> dict[str, Any]:
    """What a golden file holds of a recipe: keys that differ from the defaults, and what follows from them."""
    usual = defaults()
    given = {key: value for key, value in flatten(recipe.config) if key not in usual or usual[key] != value}
    blank = {spec.name: spec.default for spec in dataclasses.fields(Variant)}
    model = {key: value for key, value in dataclasses.asdict(recipe.network).items() if blank[key] != value}
    schedule, steps = recipe.schedule, recipe.steps_per_epoch
    ends = [schedule.lr(step) for step in (0, schedule.warmup, schedule.total // 2, schedule.total - 1)]
    return {
        **{key: value for key, value in given.items() if value is not None},
        "-> model": model,
        "-> parameters": parameters(recipe),
        "-> multiply-adds": recipe.macs,
        "-> steps": {"epoch": steps, "warm-up": schedule.warmup, "total": schedule.total},
        "-> learning rate at start, after warm-up, half way, end": [float(f"{rate:.6g}") for rate in ends],
    }


def task_defaults() -> dict[str, dict[str, Any]]:
    """What other tasks have for defaults."""
    usual = defaults()
    return {
        task: {key: value for key, value in defaults(task).items() if value != usual[key]}
        for task in TASK_DEFAULTS
        if task != "classify"
    }
