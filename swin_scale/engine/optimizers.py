"""The optimizers that `optim.name` selects: what each needs, what it keeps between updates, how it is built.

| name | update | computed by | state |
|---|---|---|---|
| `adamw` | AdamW | torch's fused kernels, on CUDA and CPU | any stage, offloaded too |
| `fused_adam` | AdamW | DeepSpeed's FusedAdam, one CUDA kernel for many tensors | any stage |
| `apex_fused_adam` | AdamW | NVIDIA Apex's FusedAdam, of which DeepSpeed's is a copy | stages 0 to 2 |
| `apex_fused_lamb` | LAMB (You et al., 2020) | NVIDIA Apex's FusedLAMB | stage 0 |
| `sgd` | Nesterov momentum | torch's fused kernels, on CUDA and CPU | any stage, offloaded too |

All follow one convention: decay is decoupled and scaled by the learning rate (of `sgd`: added to the gradient), eps is
added to the root of the corrected second moment, and DeepSpeed or `Guarded` has clipped before, so FusedLAMB's own
clipping is off. The three of AdamW keep the same state, so a run may change from one to another.

LAMB scales the update of each decayed tensor by |w| / |update| (the experts of a layer are one tensor). ZeRO gives an
optimizer one flat piece of many tensors, another on each rank: the ratio would be of something else and would change
with the number of ranks. So it is refused there, as DeepSpeed by default refuses its own FusedLamb.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from swin_scale.config import Optim
from swin_scale.engine.optim import ParamGroup
from swin_scale.errors import UserError
from swin_scale.kernels.apex import import_apex, require_apex


@dataclass(frozen=True, kw_only=True)
class StateLayout:
    """What an optimizer keeps, and where it counts its updates."""

    moments: tuple[str, ...]
    """Names of the tensors shaped like the parameter; a checkpoint's kinds."""
    count: Literal["tensor", "number", "group", "nowhere"]
    """A tensor or a number beside a parameter's moments, or a number in the options of the parameter's group."""


_ADAM = ("exp_avg", "exp_avg_sq")
_LAYOUTS: Mapping[str, StateLayout] = {
    "adamw": StateLayout(moments=_ADAM, count="tensor"),
    "fused_adam": StateLayout(moments=_ADAM, count="number"),
    "apex_fused_adam": StateLayout(moments=_ADAM, count="group"),
    "apex_fused_lamb": StateLayout(moments=_ADAM, count="group"),
    "sgd": StateLayout(moments=("momentum_buffer",), count="nowhere"),
}


def state_layout(optim: Optim) -> StateLayout:
    """Of the optimizer that `optim` selects."""
    if optim.name == "sgd" and not optim.momentum:
        return StateLayout(moments=(), count="nowhere")
    return _LAYOUTS[optim.name]


def check_optimizer(optim: Optim) -> None:
    """Raise UserError, saying what to install or set, where this machine cannot run the optimizer of `optim`."""
    if optim.name in ("apex_fused_adam", "apex_fused_lamb"):
        require_apex("optimizers", key="optim.name", value=optim.name, instead="adamw")
    elif optim.name == "fused_adam":
        reason = _why_not_fused_adam()
        if reason is not None:
            raise UserError(f"optim.name is fused_adam, but {reason}; or set optim.name=adamw")


def _why_not_fused_adam() -> str | None:
    """What keeps DeepSpeed's FusedAdam from running here; None if nothing does. Imports no DeepSpeed."""
    if not torch.cuda.is_available():
        return "DeepSpeed's FusedAdam computes on CUDA devices only, and none is usable here"
    spec = importlib.util.find_spec("deepspeed")
    built = [str(Path(place, "ops", "adam")) for place in (spec.submodule_search_locations or ())] if spec else []
    if PathFinder.find_spec("deepspeed.ops.adam.fused_adam_op", built) is not None:
        return None
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        return (
            "DeepSpeed compiles its FusedAdam at the first start, and there is no CUDA toolkit here (install one with "
            "nvcc and set CUDA_HOME, or install DeepSpeed with DS_BUILD_FUSED_ADAM=1)"
        )
    return None


def build_optimizer(
    groups: Sequence[ParamGroup], optim: Optim, *, deepspeed: Any = None, guarded_by: ProcessGroup | None = None
) -> torch.optim.Optimizer:
    """The optimizer of `optim` over `groups`; the schedule sets the learning rate before every update.

    torch's kernels are fused on CUDA and CPU alike: one pass over memory (6 to 20 times faster than the loops on a
    CPU), and every element gets the same bits wherever it lies in a shard and however many threads there are.

    Args:
        groups: of `param_groups`.
        deepspeed: the module, for `fused_adam`.
        guarded_by: the group of all ranks, if the optimizer itself is to take the norm, clip and skip (see `Guarded`),
            as ZeRO's wrappers do.
    """
    options: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0}
    kind: type[torch.optim.Optimizer]
    if optim.name == "sgd":
        kind = torch.optim.SGD
        options |= {"momentum": optim.momentum, "nesterov": optim.momentum > 0, "fused": True}
    else:
        options |= {"betas": optim.betas, "eps": optim.eps}
        if optim.name == "adamw":
            kind = torch.optim.AdamW
            options |= {"fused": True}
        elif optim.name == "fused_adam":
            kind = deepspeed.ops.adam.FusedAdam
            options |= {"adam_w_mode": True}
        elif optim.name == "apex_fused_adam":
            kind = import_apex("optimizers").FusedAdam
            options |= {"adam_w_mode": True}
        else:
            kind = import_apex("optimizers").FusedLAMB
            options |= {"adam_w_mode": True, "max_grad_norm": float("inf")}
    if guarded_by is None:
        return kind(list(groups), **options)
    optimizer = guarded(kind)(list(groups), **options)
    optimizer.group, optimizer.clip_grad = guarded_by, optim.clip_grad
    return optimizer


def ensure_state(
    optimizer: torch.optim.Optimizer,
    layout: StateLayout,
    options: dict[str, Any],
    parameter: Tensor,
    step: float | None = None,
) -> None:
    """Make the state of `parameter` that the first update would make, where there is none yet.

    Args:
        options: the group of `parameter`.
        step: if given, the count of applied updates is set to it.
    """
    entry = optimizer.state[parameter]
    entry.update({name: torch.zeros_like(parameter) for name in layout.moments if name not in entry})
    counts = options if layout.count == "group" else entry
    if layout.count == "nowhere" or (step is None and "step" in counts):
        return
    if layout.count == "tensor":
        # torch keeps the count on the parameter's device when its update runs there (fused, capturable).
        on_device = options.get("fused") or options.get("capturable")
        device = parameter.device if on_device else torch.device("cpu")
        counts["step"] = torch.tensor(step or 0.0, dtype=torch.float32, device=device)
    else:
        counts["step"] = int(step or 0)


def applied_updates(optimizer: torch.optim.Optimizer, layout: StateLayout) -> float:
    """Updates counted so far; 0 for an optimizer that does not count."""
    places = optimizer.param_groups if layout.count == "group" else optimizer.state.values()
    return max((float(place["step"]) for place in places if "step" in place), default=0.0)


class Guarded(torch.optim.Optimizer):
    """An optimizer over whole parameters whose gradients are already the same on all ranks.

    `step` leaves the global norm in `grad_norm` and scales gradients down to `clip_grad` (0: off). When the norm is not
    finite on any rank of `group` it updates nothing on all of them, sets `overflow`, and `grad_norm` is inf.
    """

    group: ProcessGroup | None = None
    clip_grad: float = 0.0
    overflow: bool = False
    grad_norm: torch.Tensor | float = 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        # The norm is agreed, too: chips of another kind may round its sum otherwise, and would clip to other weights.
        agreed = torch.stack([norm.isfinite().to(norm.dtype), norm.nan_to_num(0.0, 0.0, 0.0)])
        torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN, group=self.group)
        finite, norm = agreed.unbind()
        self.overflow = not bool(finite)
        self.grad_norm = float("inf") if self.overflow else norm
        if self.overflow:
            return
        if self.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        super().step()


def guarded(kind: type[torch.optim.Optimizer]) -> type[Any]:
    """The optimizer class `kind`, guarded."""
    return type(f"Guarded{kind.__name__}", (Guarded, kind), {})
