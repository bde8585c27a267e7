"""Whether models compute the same function: logits and gradients against ours in fp64, before anything is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_scale.bench.peers import Contestant
from swin_scale.errors import SwinScaleError

GATE_FACTOR = 2.0
"""Our error may be this many times the official code's in the same precision."""

PEER_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Relative error past which a peer does not compute the same function, by the dtype of its arithmetic."""


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Weights as after training, on the spot: at initialisation SwinV2's blocks are the identity and test nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.empty(parameter.shape).normal_(generator=generator)
        if name.endswith("logit_scale"):
            parameter.add_(noise.mul_(0.5))
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + noise.mul_(0.2))
        elif name.endswith("bias"):
            parameter.copy_(noise.mul_(0.1))
    return model


def correctness(
    reference: nn.Module,
    contestants: Sequence[Contestant],
    x: Tensor,
    labels: Tensor,
    backward: bool,
) -> dict[str, dict[str, Any]]:
    """Relative error of logits, and of all gradients together, against `reference` in fp64, for each contestant.

    `x` is of values that the dtypes of all contestants hold exactly. The worst single parameter is named too; a peer
    that raises has its error under `failed` instead.
    """
    own = Contestant(name="reference", module=reference.train())
    wanted = own.logits(x.double())
    names = dict(reference.named_parameters())
    F.cross_entropy(wanted, labels).backward()
    wanted_grads = own.gradients(names)
    found: dict[str, dict[str, Any]] = {}
    for one in contestants:
        try:
            one.module.eval()
            with torch.no_grad():
                found[one.name] = {"logits": _relative(one.logits(x).double(), wanted.detach())}
            if backward:
                one.forward_backward(x, labels)
                found[one.name] |= _gradient_errors(one.gradients(names), wanted_grads)
        except RuntimeError as error:
            # A peer may not support a dtype at all; ours has to.
            if one is contestants[0]:
                raise
            found[one.name] = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    return found


def _gradient_errors(grads: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Any]:
    flat = {name: (grads[name].flatten(), wanted[name].flatten()) for name in wanted}
    each = {name: _relative(got, want) for name, (got, want) in flat.items()}
    worst = max(each, key=each.__getitem__)
    overall = _relative(torch.cat([got for got, _ in flat.values()]), torch.cat([want for _, want in flat.values()]))
    return {"gradients": overall, "worst_gradient": each[worst], "worst_parameter": worst}


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def admitted(
    contestants: Sequence[Contestant], gate: Mapping[str, Mapping[str, Any]], missing: dict[str, str]
) -> list[Contestant]:
    """Who may be timed; the others go to `missing`. Raises SwinScaleError when ours is not good enough.

    Ours is judged by the best-known peer in the same precision.
    """
    ours = contestants[0]
    for one in contestants:
        errors = {key: value for key, value in gate[one.name].items() if key in ("logits", "gradients")}
        if "failed" in gate[one.name]:
            missing[one.name] = gate[one.name]["failed"]
        elif not all(value <= PEER_LIMIT[one.arithmetic] for value in errors.values()):
            missing[one.name] = f"it computes something else: relative errors {errors} with our weights"
    judge = next((n for n in ("official", "timm", "huggingface") if n in gate and n not in missing), None)
    for key in ("logits", "gradients"):
        own = gate["ours"].get(key)
        if own is None:
            continue
        allowed = GATE_FACTOR * gate[judge][key] if judge else PEER_LIMIT[ours.arithmetic]
        if not own <= allowed:
            raise SwinScaleError(
                f"our {key} are off by {own:.3g} (relative, against fp64), more than {allowed:.3g}, "
                + (f"{GATE_FACTOR:g} times the error of {judge}" if judge else "the limit without a peer")
                + "; nothing was timed"
            )
    return [one for one in contestants if one.name not in missing]
