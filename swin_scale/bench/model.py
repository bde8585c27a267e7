"""SwinV2 against the official code, timm and Hugging Face: same weights, same inputs, one process.

In this order: build all -> correctness gate against our model in fp64 -> paired timings of the forward pass (eval,
inference mode) and of forward + backward (training mode, no dropout of any kind). A model that fails the gate is not
timed: if it is a peer, it is listed with its error; if it is ours, nothing is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_scale.bench import PEERS, peers
from swin_scale.bench.peers import Contestant, PeerMissing
from swin_scale.bench.result import Result, describe, fixed_threads
from swin_scale.bench.timing import Comparison, compare, seconds_of
from swin_scale.errors import SwinScaleError, UserError
from swin_scale.models import create_model, variant

PRECISIONS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "amp-bf16": (torch.float32, torch.bfloat16),
    "amp-fp16": (torch.float32, torch.float16),
}
"""Name -> (dtype of weights and images, autocast dtype or None); the same for every model of a comparison."""

GATE_FACTOR = 2.0
"""Our error may be this many times the official code's."""

PEER_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Relative error past which a peer does not compute the same function, by the dtype of its arithmetic."""

GATE_BATCH = 2
CONTROL = "ours again"
SAMPLE_S = 0.05
"""CUDA calls shorter than this are repeated within one measurement."""


def bench_model(
    name: str,
    *,
    batch: int = 8,
    rounds: int = 20,
    threads: int = 2,
    official: str | None = None,
    only: Sequence[str] = PEERS,
    backward: bool = True,
    precision: str = "fp32",
    compiled: bool = False,
    device: str | None = None,
    out: str | None = None,
    **overrides: Any,
) -> Result:
    """Speed ratios of a SwinV2 model to its peers, above 1 where ours is faster.

    Args:
        name: a SwinV2 of `list_models()`; `overrides` change it as in `create_model`.
        rounds: see `timing.compare`; 20 give the 40 pairs that a claim needs.
        threads: of torch on the CPU.
        official: a checkout of microsoft/Swin-Transformer.
        only: the peers to compare with, of `PEERS`.
        backward: also time forward + backward.
        precision: a key of `PRECISIONS`.
        compiled: also time `torch.compile(timm)`.
        device: default: the first CUDA device, or the CPU.
        out: file for the result as JSON.

    Raises UserError for a model that the peers do not have, SwinScaleError when ours fails the correctness gate.
    """
    v = variant(name, **overrides)
    if v.family != "swinv2":
        raise UserError(f"bench model compares SwinV2; {name} is of the family {v.family}")
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision} is not one of {', '.join(PRECISIONS)}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, autocast = PRECISIONS[precision]
    # fp32 is fp32: cuDNN would take TF32 for the patch embedding.
    with fixed_threads(threads), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        overrides |= {"drop_path_rate": 0.0, "drop_rate": 0.0}
        reference = randomise(create_model(name, **overrides)).double()
        weights = dict(reference.named_parameters())
        x, labels = _inputs(reference, batch)
        contestants, missing = _contestants(name, overrides, weights, official, only, compiled)
        for one in contestants:
            one.module.to(where, dtype)
        x, labels = x.to(where, dtype), labels.to(where)
        scope = partial(torch.autocast, where.type, autocast) if autocast else contextlib.nullcontext
        gate = correctness(reference.to(where), contestants, x[:GATE_BATCH], labels[:GATE_BATCH], scope, backward)
        del reference
        contestants = _admitted(contestants, gate, missing, PEER_LIMIT[autocast or dtype])
        modes: dict[str, Any] = {}
        for mode in ("forward", "forward+backward")[: 1 + backward]:
            calls = {one.name: _call(one, mode, x, labels, scope) for one in contestants}
            modes[mode] = _timed(calls, rounds, where).as_dict()
        figures = describe(
            "model", _command(name, batch, rounds, threads, precision, official, only, backward, compiled), where
        )
    figures |= {
        "settings": {"model": name, "batch": batch, "precision": precision, "rounds": rounds, "device": where.type},
        "gate": gate,
        "missing": missing,
        "modes": modes,
    }
    result = Result(figures=figures, table=table(figures))
    if out is not None:
        result.write(out)
    return result


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
    contestants: list[Contestant],
    x: Tensor,
    labels: Tensor,
    scope: Callable[[], contextlib.AbstractContextManager],
    backward: bool,
) -> dict[str, dict[str, Any]]:
    """Relative error of logits, and of all gradients together, against `reference` in fp64, for each contestant.

    The worst single parameter is named too; a peer that raises has its error under `failed` instead.
    """
    own = Contestant(name="reference", module=reference.train())
    wanted = own.logits(x.double())
    names = dict(reference.named_parameters())
    F.cross_entropy(wanted, labels).backward()
    wanted_grads = own.gradients(names)
    found: dict[str, dict[str, Any]] = {}
    for one in contestants:
        try:
            _call(one, "forward", x, labels, scope)()
            with torch.no_grad(), scope():
                logits = one.logits(x)
            found[one.name] = {"logits": _relative(logits.double(), wanted.detach())}
            if backward:
                _call(one, "forward+backward", x, labels, scope)()
                found[one.name] |= _gradient_errors(one.gradients(names), wanted_grads)
        except RuntimeError as error:
            # A peer may not support a dtype at all; ours has to.
            if one.name.startswith("ours"):
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


def _admitted(
    contestants: list[Contestant], gate: dict[str, dict[str, Any]], missing: dict[str, str], limit: float
) -> list[Contestant]:
    """Who may be timed; the others go to `missing`. Raises SwinScaleError when ours is not good enough."""
    for one in contestants:
        errors = {key: value for key, value in gate[one.name].items() if key in ("logits", "gradients")}
        if "failed" in gate[one.name]:
            missing[one.name] = gate[one.name]["failed"]
        elif not all(value <= limit for value in errors.values()):
            missing[one.name] = f"it computes something else: relative errors {errors} with our weights"
    judge = next((n for n in ("official", "timm", "huggingface") if n in gate and n not in missing), None)
    for key in ("logits", "gradients"):
        own = gate["ours"].get(key)
        if own is None:
            continue
        allowed = GATE_FACTOR * gate[judge][key] if judge else limit
        if not own <= allowed:
            raise SwinScaleError(
                f"our {key} are off by {own:.3g} (relative, against fp64), more than {allowed:.3g}, "
                + (f"{GATE_FACTOR:g} times the error of {judge}" if judge else "the limit without a peer")
                + "; nothing was timed"
            )
    return [one for one in contestants if one.name not in missing]


def _contestants(
    name: str,
    overrides: dict[str, Any],
    weights: Mapping[str, Tensor],
    checkout: str | None,
    only: Sequence[str],
    compiled: bool,
) -> tuple[list[Contestant], dict[str, str]]:
    """Ours, every peer wanted and at hand, and ours again, all with `weights`; and why a peer is missing."""
    v = variant(name, **overrides)
    found, missing = [Contestant(name="ours", module=create_model(name, **overrides))], {}
    builders: dict[str, Callable[[], Contestant]] = {
        "official": lambda: peers.official(v, checkout),
        "timm": lambda: peers.timm(v),
        "huggingface": lambda: peers.huggingface(v),
    }
    builders = {peer: build for peer, build in builders.items() if peer in only}
    if compiled:
        builders["timm+compile"] = lambda: peers.timm(v)
    for peer, build in builders.items():
        try:
            one = replace(build(), name=peer)
            one.take(weights)
        except PeerMissing as reason:
            missing[peer] = str(reason)
            continue
        if peer.endswith("+compile"):
            one.module.compile()
        found.append(one)
    found.append(Contestant(name=CONTROL, module=create_model(name, **overrides)))
    for one in (found[0], found[-1]):
        one.take(weights)
    return found, missing


def _call(
    one: Contestant, mode: str, x: Tensor, labels: Tensor, scope: Callable[[], contextlib.AbstractContextManager]
) -> Callable[[], object]:
    """What is timed: logits in inference mode, or loss and gradients in training mode."""
    if mode == "forward":
        # The training flag is set inside: one module serves both modes.
        def forward() -> Tensor:
            if one.module.training:
                one.module.eval()
            with torch.inference_mode(), scope():
                return one.logits(x)

        return forward

    def forward_backward() -> None:
        if not one.module.training:
            one.module.train()
        one.module.zero_grad(set_to_none=True)
        with scope():
            loss = F.cross_entropy(one.logits(x).float(), labels)
        loss.backward()

    return forward_backward


def _timed(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> Comparison:
    warmup, inner = 1, 1
    if device.type == "cuda":
        for call in calls.values():
            for _ in range(3):
                call()
        shortest = min(seconds_of(call, 3, device) for call in calls.values())
        inner = max(1, round(SAMPLE_S / shortest))
    return compare(calls, rounds=rounds, warmup=warmup, inner=inner, device=device, control=CONTROL)


def _inputs(model: Any, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    height, width = model.stages[0].resolution
    patch, v = model.variant.patch_size, model.variant
    x = torch.randn(batch, v.in_chans, height * patch, width * patch, generator=generator)
    return x, torch.randint(v.num_classes, (batch,), generator=generator)


def _command(
    name: str,
    batch: int,
    rounds: int,
    threads: int,
    precision: str,
    official: str | None,
    only: Sequence[str],
    backward: bool,
    compiled: bool,
) -> str:
    parts = [f"swin-scale bench model --model {name} --batch {batch} --rounds {rounds} --threads {threads}"]
    parts += [f"--precision {precision} --mode {'both' if backward else 'forward'}"]
    parts += ["--official DIR"] * (official is not None) + ["--compile"] * compiled
    parts += [f"--peers {' '.join(only)}"] * (tuple(only) != PEERS)
    return " ".join(parts)


def table(figures: dict[str, Any]) -> str:
    """One line per candidate and mode, then who is missing and why."""
    settings, machine = figures["settings"], figures["hardware"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
    lines = [
        f"{settings['model']}  batch {settings['batch']}  {settings['precision']}  {where}",
        f"{'':<18}{'candidate':<14}{'median s':>10}{'img/s':>9}{'ours is':>9}  95 % interval   error",
    ]
    for mode, measured in figures["modes"].items():
        for name, times in measured["seconds"].items():
            errors = figures["gate"][name]
            error = errors["gradients" if mode.endswith("backward") else "logits"]
            line = f"{mode:<18}{name:<14}{times['median']:>10.4f}{settings['batch'] / times['median']:>9.2f}"
            ratio = measured["ratios"].get(name)
            if ratio is None:
                line += " " * 27
            else:
                line += f"{ratio['median']:>8.3f}x  {ratio['lower']:.3f} to {ratio['upper']:.3f}"
            lines.append(f"{line}  {error:.1e}")
    lines += [f"missing: {name}: {reason}" for name, reason in figures["missing"].items()]
    counts = {
        r["pairs"]
        for m in figures["modes"].values()
        for n, r in m["ratios"].items()
        if n != CONTROL and not r["is_claim"]
    }
    if counts:
        lines.append(f"not a claim: {max(counts)} pairs, 40 are needed (--rounds 20)")
    return "\n".join(lines)
