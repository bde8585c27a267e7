"""What is asked for: the model that a config names, its parameters, and how many steps its data make."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from swin_scale.config import Config
from swin_scale.config_check import check_experts
from swin_scale.engine.optimizers import state_layout
from swin_scale.errors import DataError, UserError
from swin_scale.models import Variant, create_model, create_simmim, variant
from swin_scale.models.variants import IN1K_CLASSES, IN22K_CLASSES
from swin_scale.moe.config import MoEConfig
from swin_scale.plan.memory import Parameters
from swin_scale.shards import MANIFEST_NAME, Manifest

KNOWN_SAMPLES = {IN1K_CLASSES: ("ImageNet-1K", 1_281_167), IN22K_CLASSES: ("ImageNet-22K", 14_197_122)}
"""Training images of the data sets that a number of classes stands for, where no shards are at hand."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A config read without its data: shards need not exist."""

    config: Config
    network: Variant
    simmim: bool
    parameters: Parameters
    moments: int
    """Tensors that the optimizer keeps for each parameter."""
    samples: int | None
    """Of one epoch; None where nothing tells."""
    samples_from: str

    @property
    def steps_per_epoch(self) -> int | None:
        """None where nothing tells."""
        if self.samples is None:
            return None
        batch = self.config.train.global_batch
        return self.samples // batch if self.config.data.drop_last else -(-self.samples // batch)

    @property
    def steps(self) -> int | None:
        """Of the whole run; None where nothing tells."""
        train, per_epoch = self.config.train, self.steps_per_epoch
        total = None if per_epoch is None else train.epochs * per_epoch
        return min(x for x in (total, train.max_steps) if x is not None) if total or train.max_steps else None


def read_request(config: Config, *, samples: int | None = None) -> Request:
    """Build the model of `config` on the meta device and count its data; `samples` goes before what shards say.

    Raises UserError for a model, or options of one, that cannot be.
    """
    manifests = _manifests(config)
    base = variant(config.model.name)
    check_experts(config, None if base.moe is None else config.moe.experts or base.moe.num_experts)
    overrides = {k: v for k, v in dataclasses.asdict(config.model).items() if k != "name" and v is not None}
    if config.data.img_size is not None:
        overrides["img_size"] = config.data.img_size
    if base.moe is not None:
        keys = {f.name: "experts" if f.name == "num_experts" else f.name for f in dataclasses.fields(MoEConfig)}
        given = {name: getattr(config.moe, key) for name, key in keys.items()}
        overrides["moe"] = {name: value for name, value in given.items() if value is not None}
    simmim = config.task == "simmim"
    with torch.device("meta"):
        if simmim:
            overrides.pop("num_classes", None)
            cells, target = config.simmim.mask_patch_size, config.simmim.norm_target
            model: torch.nn.Module = create_simmim(
                config.model.name, mask_patch_size=cells, norm_target=target, **overrides
            )
            network = variant(config.model.name, num_classes=0, **overrides)
        else:
            if manifests:
                overrides.setdefault("num_classes", len(manifests[0].classes))
            model = create_model(config.model.name, **overrides)
            network = variant(config.model.name, **overrides)
    named = dict(model.named_parameters())
    parameters = Parameters(
        shapes={name: tuple(p.shape) for name, p in named.items()},
        trained={name: p.requires_grad for name, p in named.items()},
    )
    count, source = _samples(config, network if not simmim else base, manifests, samples)
    return Request(
        config=config,
        network=network,
        simmim=simmim,
        parameters=parameters,
        moments=len(state_layout(config.optim).moments),
        samples=count,
        samples_from=source,
    )


def _manifests(config: Config) -> list[Manifest]:
    """Those of data.train, if all are there; a damaged one is for `doctor` to speak of."""
    if not all((Path(directory) / MANIFEST_NAME).is_file() for directory in config.data.train):
        return []
    try:
        return [Manifest.load(directory) for directory in config.data.train]
    except DataError:
        return []


def _samples(config: Config, network: Variant, manifests: list[Manifest], given: int | None) -> tuple[int | None, str]:
    if given is not None:
        if given < 1:
            raise UserError(f"--samples is {given}; give the training images of one epoch")
        return given, "--samples"
    if manifests:
        weights = config.data.weights or (1.0,) * len(manifests)
        return sum(round(w * m.samples) for w, m in zip(weights, manifests, strict=True)), "the manifests of data.train"
    if network.num_classes in KNOWN_SAMPLES:
        name, count = KNOWN_SAMPLES[network.num_classes]
        return count, f"{name}, by its {network.num_classes} classes"
    return None, f"unknown for {network.num_classes} classes; give --samples"
