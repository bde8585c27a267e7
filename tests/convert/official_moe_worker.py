"""One rank of the official Swin-MoE code with a real Tutel: saves its files, or loads ours and answers."""

import importlib
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from tests import peers  # noqa: F401 - timm, which the official models import, needs its shim

SIZES = {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 10}
LOGGER = logging.getLogger("official")


def official_modules():
    sys.path.insert(0, os.environ["SWIN_OFFICIAL"])
    try:
        return importlib.import_module("models.swin_transformer_moe"), importlib.import_module("utils_moe")
    finally:
        sys.path.pop(0)


def build(models, local_experts, cosine):
    """The official model of the nano sizes; no token is ever dropped. Shared weights agree, experts differ by rank."""
    model = models.SwinTransformerMoE(
        **SIZES,
        mlp_fc2_bias=False,
        moe_blocks=[[1], [1]],
        num_local_experts=local_experts,
        capacity_factor=16.0,
        cosine_router=cosine,
        cosine_router_dim=16,
        is_gshard_loss=False,
        pretrained_window_sizes=[0, 0],
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
        if ".experts." not in name:
            dist.broadcast(parameter.data, 0)  # as DistributedDataParallel does at the start
        if parameter.requires_grad and getattr(parameter, "skip_allreduce", False):
            model.add_param_to_skip_allreduce(name)
    return model.eval()


def logits(model):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(images)[0].numpy()


def save(directory: Path, local_experts: int, cosine: bool) -> np.ndarray:
    """Both forms of files, `final` as published and `1` as during training; the model's logits."""
    dist.init_process_group("gloo")
    models, utils = official_modules()
    model = build(models, local_experts, cosine)
    config = SimpleNamespace(OUTPUT=str(directory), TRAIN=SimpleNamespace(MOE=SimpleNamespace(SAVE_MASTER=False)))
    stateful = SimpleNamespace(state_dict=lambda: {"step": torch.zeros(3)})
    for epoch, final in (("final", True), (1, False)):
        utils.save_checkpoint(config, epoch, model, 0.0, stateful, stateful, stateful, LOGGER, zero_redundancy=final)
    result = logits(model)
    dist.destroy_process_group()
    return result


def load(path: Path, local_experts: int, cosine: bool, resume: bool) -> np.ndarray:
    """Logits of the official model after its own loading of ``path``."""
    dist.init_process_group("gloo")
    models, utils = official_modules()
    model = build(models, local_experts, cosine)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan") if parameter.requires_grad else 0.0)
    moe = SimpleNamespace(MOE=SimpleNamespace(SAVE_MASTER=False))
    model_config = SimpleNamespace(PRETRAINED=str(path), RESUME=str(path))
    config = SimpleNamespace(MODEL=model_config, TRAIN=moe, EVAL_MODE=True)
    if resume:
        utils.load_checkpoint(config, model, None, None, None, LOGGER)
    else:
        utils.load_pretrained(config, model, LOGGER)
    result = logits(model)
    dist.destroy_process_group()
    return result
