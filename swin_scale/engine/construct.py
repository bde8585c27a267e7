"""The model of a run before it is wrapped: whole on every rank, or under ZeRO-3 on the meta device with its values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from swin_scale.config import Config
from swin_scale.convert import load_weights
from swin_scale.engine.dist import Dist
from swin_scale.engine.experts import ExpertParallel
from swin_scale.errors import CheckpointError
from swin_scale.kernels import Mode
from swin_scale.models import create_model
from swin_scale.models.simmim import SimMIM
from swin_scale.models.swin import Swin

logger = logging.getLogger(__name__)

Values = Iterator[tuple[str, torch.Tensor]]


def build_model(
    config: Config,
    dist: Dist,
    overrides: Mapping[str, Any],
    weights: str | None = None,
    experts: ExpertParallel | None = None,
    kernels: Mode | None = None,
    create: Callable[..., Swin | SimMIM] = create_model,
) -> tuple[Swin | SimMIM, Values | None]:
    """(model, values) for `Engine`, initialised from `run.seed`, or from the file `weights` by `init.head`.

    Under ZeRO-3 the model is on the meta device and the values are for the engine to cut up one by one: None means
    those of `run.seed`; with `weights`, rank 0 alone reads them, into a whole model in its host memory.

    Args:
        overrides: of the named variant, as a checkpoint describes its model.
        experts: how its experts are spread over ranks, each of which reads its own.
        kernels: what the ranks agreed on (`choose_kernels`); None: engine.kernels, judged by each rank for itself.
        create: makes the model of its name and options.

    Raises CheckpointError on all ranks when `weights` do not fit.
    """
    recompute = config.engine.activation_checkpointing
    groups = experts.model_options() if experts is not None else {}
    build = partial(
        create,
        config.model.name,
        seed=config.run.seed,
        activation_checkpointing=recompute,
        kernels=kernels or config.engine.kernels,
        layer_norm=config.engine.layer_norm,
        **groups,
        **overrides,
    )

    def build_from_weights() -> Swin | SimMIM:
        model = build()
        if weights is not None:
            kind = "ema" if config.init.ema else "master"
            report = load_weights(model, weights, head=config.init.head, kind=kind, upcycle=config.init.upcycle)
            logger.info("%s", report)
        return model

    if config.engine.zero_stage < 3:
        return build_from_weights(), None
    values: Values | None = None
    problem = None
    if weights is not None and dist.is_main:
        try:
            values = build_from_weights().named_parameters()
        except CheckpointError as error:
            problem = str(error)
    if problem := dist.broadcast_json("initial weights", problem):
        raise CheckpointError(problem)
    with torch.device("meta"):
        return build(), values
