"""Expert parallelism: which ranks share one set of experts, and which part of every expert parameter a rank holds.

Ranks [g * size, (g + 1) * size) share set g, each with an equal run of its experts, in the order of ranks: tokens
travel between them. Ranks with the same place in their sets hold the same experts and sum the gradients of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed
from torch import nn
from torch.distributed import ProcessGroup

from swin_scale.config import MoE
from swin_scale.engine.dist import Dist
from swin_scale.moe.comm import Waiting
from swin_scale.moe.layer import MoEMlp
from swin_scale.moe.tutel import TutelMoEMlp
from swin_scale.sections import Section, Sections


@dataclass(frozen=True, kw_only=True)
class Held:
    """What this rank holds of a parameter of experts that are spread over ranks: a run of its flattened elements."""

    shape: tuple[int, ...]
    """Shape with the experts of all ranks."""
    start: int
    """First element held."""
    group: ProcessGroup
    """The ranks that hold the same."""
    first: bool
    """This rank is the first of them."""


@dataclass(frozen=True, kw_only=True)
class ExpertParallel:
    """This rank's place among the ranks that share experts."""

    size: int
    """Ranks that share one set of experts; at 1 each has all of them."""
    rank: int
    """This rank's place in its set."""
    group: ProcessGroup | None
    """The ranks of the set; None where a layer needs no group."""
    data_group: ProcessGroup | None
    """The ranks that hold the same experts; None at size 1, when these are all."""
    aux_group: ProcessGroup | None
    """The ranks over whose tokens balance is judged; None for this rank alone."""
    backend: str
    """Whose layers they are, ``moe.backend``."""
    waiting: Waiting | None = None
    """Entered while a layer waits for rows of other ranks."""

    @classmethod
    def create(cls, dist: Dist, moe: MoE, sections: Sections | None = None) -> ExpertParallel:
        """Make the groups; all ranks call this together. `moe.ep_size` divides the ranks. `sections` hear of waits."""
        size, world = moe.ep_size, dist.world
        group = data_group = None
        # Tutel takes a missing group for all ranks.
        if size > 1 or (moe.backend == "tutel" and world > 1):
            group = _own_group(dist, [range(first, first + size) for first in range(0, world, size)])
        if size > 1:
            data_group = _own_group(dist, [range(place, world, size) for place in range(size)])
        over_all = moe.aux_scope == "global" and world > 1
        return cls(
            size=size,
            rank=dist.rank % size,
            group=group,
            data_group=data_group,
            aux_group=torch.distributed.group.WORLD if over_all else None,
            backend=moe.backend,
            waiting=None if sections is None else partial(sections, Section.ALL_TO_ALL),
        )

    def model_options(self) -> dict[str, Any]:
        """What `create_model` is told of it."""
        return {
            "ep_group": self.group,
            "aux_group": self.aux_group,
            "moe_backend": self.backend,
            "waiting": self.waiting,
        }

    def held(self, model: nn.Module) -> dict[nn.Parameter, Held]:
        """The part that this rank holds of every expert parameter; empty at size 1."""
        if self.data_group is None:
            return {}
        first = self.data_group.rank() == 0
        return {
            parameter: Held(
                shape=(experts, *parameter.shape[1:]),
                start=self.rank * parameter.numel(),
                group=self.data_group,
                first=first,
            )
            for experts, parameter in expert_parameters(model)
        }


def has_experts(model: nn.Module) -> bool:
    """Whether `model` returns an auxiliary loss and routing statistics beside its logits."""
    return any(isinstance(module, MoEMlp | TutelMoEMlp) for module in model.modules())


def expert_parameters(model: nn.Module) -> Iterator[tuple[int, nn.Parameter]]:
    """(experts of the layer over all ranks, parameter) of every parameter that belongs to single experts."""
    for module in model.modules():
        if isinstance(module, MoEMlp | TutelMoEMlp):
            for parameter in module.get_submodule("_moe_layer.experts").parameters():
                yield module.config.num_experts, parameter


def _own_group(dist: Dist, groups: list[range]) -> ProcessGroup:
    """Make all `groups`, which share no rank, and return the one with this rank."""
    own, _ = torch.distributed.new_subgroups_by_enumeration(
        [list(ranks) for ranks in groups], timeout=timedelta(seconds=dist.timeout_s)
    )
    assert own is not None, "every rank is in one of them"
    return own
