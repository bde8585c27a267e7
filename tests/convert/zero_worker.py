"""Checkpoints really written by DeepSpeed, for the tests of their reader."""

from pathlib import Path
from typing import Any

import torch
from torch import nn


class Odd(nn.Module):
    """Sizes that no number of ranks divides, frozen and shared parameters, and buffers of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = nn.Linear(7, 5)
        self.frozen = nn.Linear(5, 3, bias=False)
        self.second = nn.Linear(3, 7)
        self.scale = nn.Parameter(torch.ones(1))
        self.tied = nn.Linear(7, 5, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.tied.weight = self.first.weight
        self.frozen.weight.requires_grad = False
        self.register_buffer("mean", torch.randn(3, generator=generator))
        self.register_buffer("index", torch.arange(6).reshape(2, 3))
        self.register_buffer("turned", torch.randn(2, 3, generator=generator).t())
        self.register_buffer("fleeting", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.first(x)) + self.mean.to(x.dtype)
        return (self.tied(self.second(x)) * self.scale).square().mean()


def write(root: str, runs: list[dict[str, Any]]) -> None:
    """On every rank: for each of `runs` (name, stage, precision, and options), two steps and a saved checkpoint."""
    from swin_scale.engine.fragments import import_deepspeed

    torch.distributed.init_process_group("gloo")
    deepspeed = import_deepspeed(False)
    for run in runs:
        _write(deepspeed, Path(root) / run["name"], **{k: v for k, v in run.items() if k != "name"})
    torch.distributed.destroy_process_group()


def _write(deepspeed: Any, path: Path, stage: int, precision: str, model: str = "odd", **options: Any) -> None:
    from swin_scale import create_model

    module = Odd() if model == "odd" else create_model(model, seed=3)
    dims = [[p for p in module.parameters() if p.requires_grad and (p.dim() > 1) == wide] for wide in (True, False)]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "sub_group_size": 40, **options},
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    groups = [{"params": dims[0], "weight_decay": 0.1}, {"params": dims[1], "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(model=module, optimizer=torch.optim.AdamW(groups, lr=0.05), config=config)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(torch.distributed.get_rank())
    shape = (2, 7) if model == "odd" else (2, 3, 32, 32)
    for _ in range(2):
        loss = engine(torch.randn(shape, dtype=dtype))
        engine.backward(loss if model == "odd" else loss.float().square().mean())
        engine.step()
    engine.save_checkpoint(str(path))
    engine.destroy()
