"""A request to train, judged before any process group exists: what follows from the model's name and the data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swin_scale.checkpoint import list_steps
from swin_scale.config import BatchPlan, Config, batch_plan
from swin_scale.config_check import check_experts
from swin_scale.config_load import LoadedConfig, config_from_text
from swin_scale.convert.infer import CONTINUOUS
from swin_scale.convert.load import own_windows, trained_windows
from swin_scale.convert.source import EVAL_AUGMENT
from swin_scale.data import EvalStream, TrainStream, open_shard_sets
from swin_scale.engine.kernel_choice import check_kernels
from swin_scale.engine.optimizers import check_optimizer
from swin_scale.kernels.apex import require_apex
from swin_scale.models import Variant, variant
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.tutel import TutelMoEMlp
from swin_scale.tasks import TASKS, Task

MOE_FIELDS = {
    "experts" if field.name == "num_experts" else field.name: field.name for field in dataclasses.fields(MoEConfig)
}
"""Keys of `Config.moe` that say what a model is, and their names in `MoEConfig`; the others say how it is run."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request that was judged sound: concrete config, open shard sets, batch arithmetic."""

    config: Config
    config_text: str
    plan: BatchPlan
    task: Task
    stream: TrainStream
    val: tuple[EvalStream, ...]
    shown: EvalStream | None
    """Images to draw pictures of; None for none."""
    model: dict[str, Any]
    """What a checkpoint says about its model: name, overrides, class names, and how it is shown images to judge."""

    @property
    def total_steps(self) -> int:
        return self.config.train.epochs * self.stream.steps_per_epoch

    @property
    def stop_step(self) -> int:
        return min(self.total_steps, self.config.train.max_steps or self.total_steps)


def prepare(loaded: LoadedConfig, ranks: int) -> Job:
    """Fill in what follows from the model's name and the data; raises UserError or DataError before anything starts."""
    config, origin = loaded.config, dict(loaded.origin)
    plan = batch_plan(config, ranks)
    default = variant(config.model.name)
    config = _with_experts(config, origin, default.moe)
    check_optimizer(config.optim)
    if config.engine.layer_norm == "apex":
        require_apex("normalization", key="engine.layer_norm", value="apex", instead="torch")
    kind = TASKS[config.task]
    sources = open_shard_sets(config.data.train, labelled=kind.labelled)
    val_paths = [*config.data.train[:1], *config.data.val]
    val_sources = open_shard_sets(val_paths, key="data.val", labelled=kind.labelled)[1:]
    if config.data.img_size is None:
        config = _replace(config, "data", img_size=default.img_size)
        origin["data.img_size"] = config.model.name
    config = _with_windows(kind.resolved(config, origin, sources), origin)
    task = kind(config)
    overrides = {k: v for k, v in dataclasses.asdict(config.model).items() if k != "name" and v is not None}
    overrides.setdefault("num_classes", 0)
    overrides["img_size"] = config.data.img_size
    if default.moe is not None:
        overrides["moe"] = {name: getattr(config.moe, key) for key, name in MOE_FIELDS.items()}
    with torch.device("meta"):
        task.create(config.model.name, **overrides)
    check_kernels(config, variant(config.model.name, **overrides))
    if config.moe.backend == "tutel":
        # Not on the meta device: Tutel reads a tensor as it builds. Any size tells whether it is there and can follow.
        network = variant(config.model.name, **overrides)
        assert network.moe is not None
        TutelMoEMlp(network.moe, 2, 2)
    eval_batch = (config.train.eval_batch or plan.micro) * ranks
    augment = {key: getattr(config.augment, key) for key in EVAL_AUGMENT}
    model = {"name": config.model.name, "overrides": overrides, "augment": augment, **task.describe(sources)}
    text = LoadedConfig(config=config, origin=origin).dump()
    return Job(
        config=config,
        config_text=text,
        plan=plan,
        task=task,
        stream=task.train_stream(sources, plan),
        val=tuple(task.eval_stream(source, eval_batch) for source in val_sources),
        shown=task.shown(sources, val_sources),
        model=model,
    )


def _with_experts(config: Config, origin: dict[str, str], default: MoEConfig | None) -> Config:
    """`config.moe` without blanks, for a model with experts; raises UserError where keys and model do not fit."""
    if default is not None:
        blank = [key for key in MOE_FIELDS if getattr(config.moe, key) is None]
        config = _replace(config, "moe", **{key: getattr(default, MOE_FIELDS[key]) for key in blank})
        origin.update({f"moe.{key}": config.model.name for key in blank})
    check_experts(config, None if default is None else config.moe.experts)
    return config


def _with_windows(config: Config, origin: dict[str, str]) -> Config:
    """A SwinV2 that starts from weights goes on to scale its coordinates by the windows that these were trained with.

    Config and name may say otherwise. A resumed run does as it began: it needs its first weights no more.
    """
    start, model = config.init, config.model
    given = {k: v for k, v in dataclasses.asdict(model).items() if k != "name" and v is not None}
    network = variant(model.name, **given | {"img_size": config.data.img_size})
    if start.weights is None or network.family not in CONTINUOUS or network.pretrained_window_sizes:
        return config
    run_dir = Path(config.run.dir)
    before = run_dir / "config.yaml"
    if list_steps(run_dir / "checkpoints") and before.exists():
        windows = config_from_text(before.read_text(encoding="utf-8"), str(before)).model.pretrained_window_sizes
    elif Path(start.weights).exists():
        windows = trained_windows(start.weights, kind="ema" if start.ema else "master")
        windows = None if windows == own_windows(network) else windows
    else:
        return config  # a stage that is still to come, or an error when they are read
    if windows is None:
        return config
    origin["model.pretrained_window_sizes"] = start.weights
    return _replace(config, "model", pretrained_window_sizes=windows)


def architecture(job: Job) -> Variant:
    """The model's variant with the job's overrides."""
    return variant(job.model["name"], **job.model["overrides"])


def _replace(config: Config, section: str, **values: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
