"""MoE layers side by side: ours against a dense MLP of equal tokens, Tutel, DeepSpeed and one-hot einsum.

For each case, in this order: all layers get the same weights -> correctness gate against the formula in fp64 (output,
and gradients of everything) -> paired timings of forward (eval, inference mode) and forward + backward (training mode,
with the gate's noise where a layer has it and with its auxiliary loss). Without noise no token is dropped, so that all
compute the same. A peer that fails the gate is listed with its error; when ours does, nothing is timed. At last, the
memory of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swin_scale.bench import MOE_PEERS, moe_memory, moe_peers
from swin_scale.bench.model import PEER_LIMIT
from swin_scale.bench.moe_peers import DTYPES, MODES, Layer, Sizes, Weights
from swin_scale.bench.peers import PeerMissing
from swin_scale.bench.result import Result, describe, fixed_threads
from swin_scale.bench.timing import Comparison, compare, seconds_of
from swin_scale.errors import SwinScaleError, UserError

MEMORY_BAR = 0.15
"""Part of the one-hot form's memory that a pass of ours may take."""

GATE_FACTOR = 2.0
"""Our error may be this many times that of the dense MLP of the same dtype, its gradients included."""

SPREAD = 0.25
"""Experts get 0.75 to 1.25 times their mean of tokens: the widest spread of which capacity factor 1.25 drops nothing.

Codes that pad every expert to the fullest one pay for it; with even loads, the kindest case to them, they do not.
"""

SAMPLE_S = 0.02
"""On a GPU, calls of ours shorter than this are repeated within one measurement, and so are the others'."""

HIDDEN = 4
"""Hidden units per channel."""

CONTROL = "ours again"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer of so many experts, whom it is compared with, and how many times as fast it is to be at least."""

    name: str
    experts: int
    tokens: int
    factor: float
    bars: Mapping[str, float | None]
    spread: float = SPREAD


def cases(tokens: int, many_tokens: int) -> list[Case]:
    """The comparisons; a bar of 1 / n allows n times the peer's seconds, None is for information."""
    return [
        Case(
            name="dropless",
            experts=8,
            tokens=tokens,
            factor=0.0,
            bars={"dense": 1 / 1.15, "tutel": 1.1, "deepspeed": 1.1},
        ),
        Case(
            name="dropless, even loads",
            experts=8,
            tokens=tokens,
            factor=0.0,
            spread=0.0,
            bars={"dense": 1 / 1.15, "tutel": None, "deepspeed": None},
        ),
        Case(
            name="capacity 1.25",
            experts=8,
            tokens=tokens,
            factor=1.25,
            bars={"dense": 1 / 1.4, "tutel": 1.1, "deepspeed": 1.1, "one-hot": 4.0},
        ),
        Case(name="64 experts", experts=64, tokens=many_tokens, factor=0.0, bars={"dense": 1 / 1.5}),
    ]


def bench_moe(
    *,
    dim: int = 384,
    tokens: int = 4096,
    many_tokens: int = 16384,
    memory_tokens: int = 32768,
    rounds: int = 20,
    threads: int = 2,
    precision: str = "fp32",
    only: Sequence[str] = MOE_PEERS,
    device: str | None = None,
    out: str | None = None,
) -> Result:
    """Speed ratios of a top-1 MoE layer to its peers, above 1 where ours is faster, and its share of memory.

    Args:
        dim: channels; experts have four times as many hidden units.
        tokens, many_tokens: of the cases with 8 and with 64 experts.
        memory_tokens: of the comparison of memory; 0 leaves it out.
        rounds: see `timing.compare`; 20 give the 40 pairs that a claim needs.
        threads: of torch on the CPU.
        precision: a key of `moe_peers.DTYPES`.
        only: the peers to compare with, of `MOE_PEERS`.
        device: default: the first CUDA device, or the CPU.
        out: file for the result as JSON.

    Raises UserError for a precision unknown or tokens that do not divide, SwinScaleError when ours fails the gate.
    """
    if precision not in DTYPES:
        raise UserError(f"--precision {precision} is not one of {', '.join(DTYPES)}")
    for flag, count, experts in (
        ("tokens", tokens, 8),
        ("many-tokens", many_tokens, 64),
        ("memory-tokens", memory_tokens, 8),
    ):
        if count % experts or count < 0:
            raise UserError(f"--{flag} {count} is not a multiple of the {experts} experts")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    measured = {}
    with fixed_threads(threads):
        for case in cases(tokens, many_tokens):
            measured[case.name] = _measure(case, dim, DTYPES[precision], where, rounds, only)
        memory = moe_memory.compare(dim, memory_tokens, precision, threads, where) if memory_tokens else None
        command = (
            f"swin-scale bench moe --dim {dim} --tokens {tokens} --many-tokens {many_tokens} --memory-tokens "
            f"{memory_tokens} --rounds {rounds} --threads {threads} --precision {precision} --peers {' '.join(only)}"
        )
        figures = describe("moe", command, where)
    figures |= {
        "settings": {"dim": dim, "hidden": HIDDEN * dim, "precision": precision, "rounds": rounds, "top_k": 1},
        "cases": measured,
        "memory": memory and memory | {"at_most": MEMORY_BAR, "reached": _reached(memory)},
    }
    result = Result(figures=figures, table=table(figures))
    if out is not None:
        result.write(out)
    return result


def _reached(memory: Mapping[str, Any]) -> bool:
    return bool(memory["share"]) and max(memory["share"].values()) <= MEMORY_BAR


def _measure(
    case: Case, dim: int, dtype: torch.dtype, device: torch.device, rounds: int, only: Sequence[str]
) -> dict[str, Any]:
    """Gate, timings and bars of one case."""
    sizes = Sizes(experts=case.experts, dim=dim, hidden=HIDDEN * dim, factor=case.factor)
    generator = torch.Generator().manual_seed(0)
    weights = moe_peers.random_weights(sizes, generator)
    load_E = moe_peers.loads(case.tokens, case.experts, case.spread)
    x = moe_peers.tokens_for(weights["gate"], load_E, generator)
    x, upstream = x.to(device, dtype), torch.randn(x.shape, generator=generator).to(device, dtype)
    layers, missing = _layers(sizes, [name for name in case.bars if name in only], device)
    for layer in layers:
        layer.take(weights)
        layer.module.to(device, dtype)
    gate = correctness(layers, {name: w.to(device, dtype) for name, w in weights.items()}, x, upstream)
    layers = _admitted(layers, gate, missing, PEER_LIMIT[dtype])
    modes: dict[str, Any] = {}
    for mode in MODES:
        calls = {layer.name: _call(layer, mode, x, upstream) for layer in layers}
        modes[mode] = _with_bars(_timed(calls, rounds, device), case.bars)
    return {
        "experts": case.experts,
        "tokens": case.tokens,
        "capacity_factor": case.factor,
        "loads": load_E,
        "gate": gate,
        "missing": missing,
        "modes": modes,
    }


def _layers(sizes: Sizes, peers: Sequence[str], device: torch.device) -> tuple[list[Layer], dict[str, str]]:
    """Ours, each peer that can take part, and ours again; the others with the reason."""
    builders: dict[str, Callable[[], Layer]] = {
        "dense": lambda: moe_peers.dense(sizes),
        "tutel": lambda: moe_peers.tutel(sizes),
        "deepspeed": lambda: moe_peers.deepspeed(sizes, device.type == "cuda"),
        "one-hot": lambda: moe_peers.one_hot(sizes),
    }
    found, missing = [moe_peers.ours(sizes)], {}
    for name in peers:
        try:
            found.append(builders[name]())
        except PeerMissing as reason:
            missing[name] = str(reason)
    found.append(moe_peers.ours(sizes, CONTROL))
    return found, missing


def correctness(layers: Sequence[Layer], weights: Weights, x: Tensor, upstream: Tensor) -> dict[str, dict[str, Any]]:
    """Relative error of each layer's output and gradients (all of them together) against the formula in fp64.

    Layers are in eval mode and the auxiliary losses, of which there are several kinds, are left out. A peer that raises
    has its error under `failed` instead.
    """
    found: dict[str, dict[str, Any]] = {}
    formulas = {
        "dense": _formula(moe_peers.dense_reference, {n: w[:1] for n, w in weights.items() if n != "gate"}, x, upstream)
    }
    routed = _formula(moe_peers.reference, weights, x, upstream)
    for layer in layers:
        wanted = formulas.get(layer.name, routed)
        try:
            got = _outcome(layer, x, upstream)
        except RuntimeError as error:
            # A peer may not support a dtype or a device; ours has to.
            if layer.name.startswith("ours"):
                raise
            found[layer.name] = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
            continue
        gradients = [name for name in wanted if name != "output"]
        each = {name: _relative(got[name], wanted[name]) for name in wanted}
        worst = max(gradients, key=each.__getitem__)
        found[layer.name] = {
            "output": each["output"],
            "gradients": _relative(*(torch.cat([of[name].flatten() for name in gradients]) for of in (got, wanted))),
            "worst_gradient": each[worst],
            "worst_weight": worst,
        }
    return found


def _formula(
    formula: Callable[[Tensor, Weights], Tensor], weights: Weights, x: Tensor, upstream: Tensor
) -> dict[str, Tensor]:
    """`output` and the gradients of a formula in fp64, on the CPU."""
    leaf = x.double().requires_grad_()
    leaves = {name: w.double().requires_grad_() for name, w in weights.items()}
    y = formula(leaf, leaves)
    y.backward(upstream.double())
    grads = {name: w.grad for name, w in leaves.items()} | {"x": leaf.grad}
    return {"output": y.detach().cpu()} | {name: grad.cpu() for name, grad in grads.items() if grad is not None}


def _outcome(layer: Layer, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """The same of a layer."""
    layer.module.eval().zero_grad()
    leaf = x.clone().requires_grad_()
    y, _ = layer.forward(leaf)
    y.backward(upstream)
    assert leaf.grad is not None
    return {"output": y.detach().double().cpu(), "x": leaf.grad.double().cpu(), **layer.gradients()}


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def _admitted(
    layers: Sequence[Layer], gate: Mapping[str, Mapping[str, Any]], missing: dict[str, str], limit: float
) -> list[Layer]:
    """Who may be timed; the others go to `missing`. Raises SwinScaleError when ours is not good enough."""
    allowed = {"output": limit, "gradients": limit}
    if "dense" in gate:
        allowed = {key: GATE_FACTOR * gate["dense"][key] for key in allowed}
    for key, most in allowed.items():
        if not gate["ours"][key] <= most:
            raise SwinScaleError(
                f"our {key} is off by {gate['ours'][key]:.3g} (relative, against fp64), more than {most:.3g}; "
                "nothing was timed"
            )
    for layer in layers:
        errors = gate[layer.name]
        if "failed" in errors:
            missing[layer.name] = errors["failed"]
        elif not max(errors["output"], errors["gradients"]) <= limit:
            missing[layer.name] = f"it computes something else: relative errors {dict(errors)} with our weights"
    return [layer for layer in layers if layer.name not in missing]


def _call(layer: Layer, mode: str, x: Tensor, upstream: Tensor) -> Callable[[], object]:
    """What is timed: the output in inference mode, or output, auxiliary loss and gradients in training mode."""
    if mode == "forward":

        def forward() -> object:
            if layer.module.training:
                layer.module.eval()
            with torch.inference_mode():
                return layer.forward(x)

        return forward

    leaf = x.clone().requires_grad_()

    def forward_backward() -> None:
        if not layer.module.training:
            layer.module.train()
        layer.module.zero_grad(set_to_none=True)
        leaf.grad = None
        moe_peers.backward(layer, leaf, upstream)

    return forward_backward


def _timed(calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> Comparison:
    inner = 1
    if device.type == "cuda":
        for _ in range(3):
            calls["ours"]()
        inner = max(1, round(SAMPLE_S / seconds_of(calls["ours"], 3, device)))
    return compare(dict(calls), rounds=rounds, inner=inner, device=device, control=CONTROL)


def _with_bars(comparison: Comparison, bars: Mapping[str, float | None]) -> dict[str, Any]:
    """What was measured, and whether the lower bound of each ratio reaches its bar."""
    reached = {
        name: {"at_least": bar, "reached": comparison.ratio(name).lower >= bar}
        for name, bar in bars.items()
        if bar is not None and name in comparison.pairs
    }
    return {**comparison.as_dict(), "bars": reached}


def table(figures: Mapping[str, Any]) -> str:
    """One line per layer, case and mode, with what was wanted; then memory, and who is missing and why."""
    settings, machine = figures["settings"], figures["hardware"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
    lines = [
        f"top-1 MoE layer  C {settings['dim']}  hidden {settings['hidden']}  {settings['precision']}  {where}",
        f"{'':<32}{'layer':<12}{'median ms':>10}{'ours is':>9}  95 % interval    wanted           error",
    ]
    claims = True
    for title, case in figures["cases"].items():
        lines.append(f"{title}: {case['experts']} experts, {case['tokens']} tokens")
        for mode, measured in case["modes"].items():
            for name, times in measured["seconds"].items():
                error = case["gate"][name]["gradients" if mode.endswith("backward") else "output"]
                line = f"  {mode:<30}{name:<12}{times['median'] * 1e3:>10.2f}"
                ratio, bar = measured["ratios"].get(name), measured["bars"].get(name)
                found = f"{ratio['median']:>8.3f}x  {ratio['lower']:.3f} to {ratio['upper']:.3f}" if ratio else ""
                wanted = f"{bar['at_least']:.3f} {'reached' if bar['reached'] else 'NOT reached'}" if bar else ""
                lines.append(f"{line}{found:<26}  {wanted:<18}{error:.1e}")
                claims &= ratio is None or name == CONTROL or ratio["is_claim"]
        lines += [f"  missing: {name}: {reason}" for name, reason in case["missing"].items()]
    if figures["memory"]:
        lines += moe_memory.table(figures["memory"])
    if not claims:
        lines.append(f"not a claim: {2 * settings['rounds']} pairs, 40 are needed (--rounds 20)")
    return "\n".join(lines)
