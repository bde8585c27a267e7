"""Small checkpoints cut into fragments in any way, and the tensors they were cut from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from swin_scale.checkpoint import Fragment, begin, commit, write_rank_file

SHAPES = {"embed.weight": (6, 3), "norm.bias": (7,), "scale": (), "block.0.fc1.weight": (5, 11), "frozen": (4,)}


def make_tensors(seed: int = 0, kinds: Sequence[str] = ("master", "exp_avg")) -> dict[str, dict[str, Tensor]]:
    """Per kind, the full tensor of every parameter; moments leave out the frozen one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: {
            name: torch.randn(shape, generator=generator)
            for name, shape in SHAPES.items()
            if kind in ("master", "ema") or name != "frozen"
        }
        for kind in kinds
    }


def parameters_of(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, dict[str, object]]:
    return {name: {"shape": list(shape), "dtype": "F32", "trained": name != "frozen"} for name, shape in shapes.items()}


def cut(tensors: Mapping[str, Mapping[str, Tensor]], ranks: int) -> list[list[Fragment]]:
    """Fragments per rank: each kind flattened end to end and cut into `ranks` even ranges, as ZeRO does."""
    cuts: list[list[Fragment]] = [[] for _ in range(ranks)]
    for kind, table in tensors.items():
        total = sum(tensor.numel() for tensor in table.values())
        bounds = [total * rank // ranks for rank in range(ranks + 1)]
        offset = 0
        for name, tensor in table.items():
            for rank in range(ranks):
                low, high = max(bounds[rank], offset) - offset, min(bounds[rank + 1], offset + tensor.numel()) - offset
                if low < high:
                    data = tensor.reshape(-1)[low:high]
                    cuts[rank].append(Fragment(name=name, kind=kind, shape=tuple(tensor.shape), start=low, data=data))
            offset += tensor.numel()
    return cuts


def save(root: Path, step: int, cuts: Sequence[Sequence[Fragment]], **changes: object) -> Path:
    """Write and commit one checkpoint as the ranks of a run would."""
    temporary = begin(root, step)
    files = [write_rank_file(temporary, rank, fragments) for rank, fragments in enumerate(cuts)]
    fields = {
        "state": {"step": step, "cursor": [1, 2]},
        "config_text": f"run: {{seed: {step}}}\n",
        "parameters": parameters_of(),
        "model": {"name": "toy", "overrides": {}},
    }
    return commit(temporary, step=step, rank_files=files, **{**fields, **changes})
