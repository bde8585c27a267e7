"""A request to train, judged before any process group exists: what follows from the model's name and the data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from swin_scale.config import BatchPlan, Config, batch_plan
from swin_scale.config_check import check_experts
from swin_scale.config_load import LoadedConfig
from swin_scale.data import EvalStream, TrainStream, open_shard_sets
from swin_scale.engine.kernel_choice import check_kernels
from swin_scale.engine.optimizers import check_optimizer
from swin_scale.errors import UserError
from swin_scale.kernels.apex import require_apex
from swin_scale.models import Variant, create_model, variant
from swin_scale.moe.config import MoEConfig
from swin_scale.moe.tutel import TutelMoEMlp

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
    stream: TrainStream
    val: tuple[EvalStream, ...]
    model: dict[str, Any]
    """What a checkpoint says about its model: name, overrides, class names."""

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
    sources = open_shard_sets(config.data.train)
    val_sources = open_shard_sets([*config.data.train[:1], *config.data.val], key="data.val")[1:]
    classes = sources[0].manifest.classes
    if config.model.num_classes not in (None, len(classes)):
        raise UserError(
            f"model.num_classes is {config.model.num_classes}, but {config.data.train[0]} has {len(classes)} classes; "
            "leave it out to follow the data"
        )
    if config.data.img_size is None:
        config = _replace(config, "data", img_size=default.img_size)
        origin["data.img_size"] = config.model.name
    if config.model.num_classes is None:
        config = _replace(config, "model", num_classes=len(classes))
        origin["model.num_classes"] = config.data.train[0]
    img_size = config.data.img_size
    assert img_size is not None
    overrides = {k: v for k, v in dataclasses.asdict(config.model).items() if k != "name" and v is not None}
    overrides["img_size"] = img_size
    if default.moe is not None:
        overrides["moe"] = {name: getattr(config.moe, key) for key, name in MOE_FIELDS.items()}
    with torch.device("meta"):
        create_model(config.model.name, **overrides)
    check_kernels(config, variant(config.model.name, **overrides))
    if config.moe.backend == "tutel":
        # Not on the meta device: Tutel reads a tensor as it builds. Any size tells whether it is there and can follow.
        network = variant(config.model.name, **overrides)
        assert network.moe is not None
        TutelMoEMlp(network.moe, 2, 2)
    stream = TrainStream(
        sources,
        seed=config.run.seed,
        global_batch=plan.global_batch,
        img_size=img_size,
        augment=config.augment,
        weights=config.data.weights,
        drop_last=config.data.drop_last,
        block=config.data.block,
        max_pixels=config.data.max_pixels,
    )
    eval_batch = (config.train.eval_batch or plan.micro) * ranks
    val = tuple(
        EvalStream(
            source,
            global_batch=eval_batch,
            img_size=img_size,
            augment=config.augment,
            max_pixels=config.data.max_pixels,
        )
        for source in val_sources
    )
    model = {
        "name": config.model.name,
        "overrides": overrides,
        "classes": list(classes),
        "wnids": list(sources[0].manifest.wnids or ()) or None,
    }
    text = LoadedConfig(config=config, origin=origin).dump()
    return Job(config=config, config_text=text, plan=plan, stream=stream, val=val, model=model)


def _with_experts(config: Config, origin: dict[str, str], default: MoEConfig | None) -> Config:
    """`config.moe` without blanks, for a model with experts; raises UserError where keys and model do not fit."""
    if default is not None:
        blank = [key for key in MOE_FIELDS if getattr(config.moe, key) is None]
        config = _replace(config, "moe", **{key: getattr(default, MOE_FIELDS[key]) for key in blank})
        origin.update({f"moe.{key}": config.model.name for key in blank})
    check_experts(config, None if default is None else config.moe.experts)
    return config


def architecture(job: Job) -> Variant:
    """The model's variant with the job's overrides."""
    return variant(job.model["name"], **job.model["overrides"])


def _replace(config: Config, section: str, **values: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
