"""SwinV2 against the official code, timm and Hugging Face: same weights, same inputs, one process.

In this order: build all -> correctness gate against our model in fp64 -> paired timings of the forward pass (eval,
inference mode), of forward + backward (training mode, no dropout of any kind) and of a training step, with AdamW, on a
batch that stays on the device. A model that fails the gate is not timed: if it is a peer, it is listed with its error;
if it is ours, nothing is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swin_scale.bench import PEERS, peers
from swin_scale.bench.measure import CONTROL, LAUNCHES, Candidate, failure, measure, peak_bytes
from swin_scale.bench.model_gate import PEER_LIMIT, admitted, correctness, randomise
from swin_scale.bench.model_step import TrainingStep
from swin_scale.bench.peers import Contestant, PeerMissing
from swin_scale.bench.result import Result, describe, fixed_threads
from swin_scale.engine.metrics import peak_flops
from swin_scale.errors import UserError
from swin_scale.models import create_model, flops, variant

__all__ = ["PEER_LIMIT", "PRECISIONS", "bench_model", "randomise"]

PRECISIONS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "amp-bf16": (torch.float32, torch.bfloat16),
    "amp-fp16": (torch.float32, torch.float16),
}
"""Name -> (dtype of weights and images, autocast dtype or None)."""

MODES = {
    "forward": ("forward",),
    "both": ("forward", "forward+backward"),
    "step": ("step",),
    "all": ("forward", "forward+backward", "step"),
}
FLOPS_PER_MAC = {"forward": 2, "forward+backward": 6, "step": 6}

GATE_BATCH = 2
INFERENCE_WARMUP, INFERENCE_CALLS = 50, 30
"""Of the official throughput protocol: calls before the clock starts, and those it is stopped after."""

BARS: dict[str, dict[str, float]] = {
    "swinv2_tiny_patch4_window8_256": {"official-amp": 2.5, "timm+compile": 1.25},
    "swinv2_tiny_patch4_window16_256": {"official-amp": 4.0, "timm+compile": 1.25},
    "swinv2_base_patch4_window12_192_22k": {"official-amp": 3.0, "timm+compile": 1.25},
    "swinv2_large_patch4_window12to24_192to384_22kto1k_ft": {"official-amp": 4.5, "timm+compile": 1.25},
}
"""How many times as fast as these our training step in half precision is to be on an H200."""

INFERENCE_BAR = 4.0
"""The same of inference at batch 32, against the official code in fp16."""


def bench_model(
    name: str,
    *,
    batch: int | None = None,
    rounds: int = 20,
    threads: int = 2,
    official: str | None = None,
    only: Sequence[str] = (),
    mode: str = "both",
    inference: bool = False,
    precision: str = "fp32",
    compiled: bool = False,
    launches: Sequence[str] = LAUNCHES[:1],
    device: str | None = None,
    out: str | None = None,
    **overrides: Any,
) -> Result:
    """Speed ratios of a SwinV2 model to its peers, above 1 where ours is faster.

    Args:
        name: a SwinV2 of `list_models()`; `overrides` change it as in `create_model`.
        batch: images; default 8, or 32 for inference.
        rounds: see `timing.compare`; 20 give the 40 pairs that a claim needs.
        threads: of torch on the CPU.
        official: a checkout of microsoft/Swin-Transformer.
        only: the peers to compare with, of `PEERS`; default: all codes of others and, on a GPU, the rest too.
        mode: a key of `MODES`.
        inference: by the official throughput protocol instead: after 50 forward passes, the mean of 30.
        precision: a key of `PRECISIONS`, for ours and all peers but `official-amp`.
        compiled: also time `torch.compile(timm)`.
        launches: of `measure.LAUNCHES`; with `graphs`, each call as a CUDA graph too.
        device: default: the first CUDA device, or the CPU.
        out: file for the result as JSON.

    Raises UserError for a model that the peers do not have, SwinScaleError when ours fails the correctness gate.
    """
    v = variant(name, **overrides)
    if v.family != "swinv2":
        raise UserError(f"bench model compares SwinV2; {name} is of the family {v.family}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    mode = "forward" if inference else mode
    _check(precision, mode, only, launches, where)
    batch = batch or (32 if inference else 8)
    modes = MODES[mode]
    if not only:
        only = PEERS if where.type == "cuda" and PRECISIONS[precision][0] is not torch.float32 else PEERS[:3]
    # fp32 is fp32: cuDNN would take TF32 for the patch embedding.
    with fixed_threads(threads), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        overrides |= {"drop_path_rate": 0.0, "drop_rate": 0.0}
        reference = randomise(create_model(name, kernels="reference", **overrides)).double()
        weights = dict(reference.named_parameters())
        x, labels = _inputs(reference, batch)
        contestants, missing = _contestants(name, overrides, weights, official, only, compiled, precision)
        for one in contestants:
            one.place(where)
        # Exact in every dtype that takes part, so that nobody errs by having been handed it.
        x, labels = x.to(where, contestants[0].arithmetic).float(), labels.to(where)
        gate = correctness(
            reference.to(where), contestants, x[:GATE_BATCH], labels[:GATE_BATCH], backward=mode != "forward"
        )
        del reference
        contestants = admitted(contestants, gate, missing)
        frozen = _frozen(contestants) if inference else contextlib.nullcontext()
        with frozen:
            measured, memory = _measured(contestants, modes, launches, x, labels, rounds, inference, missing)
        command = _command(name, batch, rounds, threads, precision, official, only, mode, inference, compiled, launches)
        figures = describe("model", command, where)
    figures |= {
        "settings": {
            "model": name,
            "batch": batch,
            "precision": precision,
            "rounds": rounds,
            "device": where.type,
            "inference": inference,
        },
        "gate": gate,
        "missing": missing,
        "memory": memory,
    }
    peak = peak_flops(where) if contestants[0].arithmetic is not torch.float32 else None
    bars = _bars(name, inference, where, contestants[0])
    for launch, by_mode in measured.items():
        figures["modes" if launch == "calls" else "graphs"] = {
            mode: _with_rates(comparison.as_dict(), mode, batch, flops(v), peak, bars)
            for mode, comparison in by_mode.items()
        }
    result = Result(figures=figures, table=table(figures))
    if out is not None:
        result.write(out)
    return result


def _check(precision: str, mode: str, only: Sequence[str], launches: Sequence[str], device: torch.device) -> None:
    for flag, values, known in (
        ("precision", [precision], PRECISIONS),
        ("mode", [mode], MODES),
        ("peers", only, PEERS),
        ("launches", launches, LAUNCHES),
    ):
        for value in values:
            if value not in known:
                raise UserError(f"--{flag} {value} is not one of {', '.join(known)}")
    if "graphs" in launches and device.type != "cuda":
        raise UserError("--launches graphs: CUDA graphs need a CUDA device; use --launches calls")


def _contestants(
    name: str,
    overrides: dict[str, Any],
    weights: Mapping[str, Tensor],
    checkout: str | None,
    only: Sequence[str],
    compiled: bool,
    precision: str,
) -> tuple[list[Contestant], dict[str, str]]:
    """Ours and every peer wanted and at hand, all with `weights`; and why a peer is missing."""
    v = variant(name, **overrides)
    dtype, autocast = PRECISIONS[precision]

    def ours(kernels: str) -> Contestant:
        return Contestant(name="ours", module=create_model(name, kernels=kernels, **overrides))

    def official_amp() -> Contestant:
        if dtype is torch.float32:
            raise PeerMissing("it is for --precision fp16 and bf16; --precision amp-fp16 puts all under AMP")
        return peers.official(v, checkout)

    builders: dict[str, Callable[[], Contestant]] = {
        "ours": lambda: ours("auto"),
        "reference": lambda: ours("reference"),
        "official-amp": official_amp,
        "official": lambda: peers.official(v, checkout),
        "timm": lambda: peers.timm(v),
        "huggingface": lambda: peers.huggingface(v),
        "timm+compile": lambda: peers.timm(v),
    }
    wanted = ("ours", *only, *(["timm+compile"] if compiled else []))
    found: list[Contestant] = []
    missing: dict[str, str] = {}
    for peer in (peer for peer in builders if peer in wanted):
        try:
            one = replace(builders[peer](), name=peer, dtype=dtype, autocast=autocast)
            one.take(weights)
        except PeerMissing as reason:
            missing[peer] = str(reason)
            continue
        if peer == "official-amp":
            one = replace(one, dtype=torch.float32, autocast=dtype)
        if peer.endswith("+compile"):
            one.module.compile()
        found.append(one)
    return found, missing


def _measured(
    contestants: Sequence[Contestant],
    modes: Sequence[str],
    launches: Sequence[str],
    x: Tensor,
    labels: Tensor,
    rounds: int,
    inference: bool,
    missing: dict[str, str],
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Comparisons by launch and mode, and each contestant's peak memory above all models in the last of the modes."""
    candidates, peaks = [], {}
    for one in contestants:
        images = x.to(one.dtype or x.dtype)
        calls: dict[str, Callable[[], object]] = {
            "forward": partial(one.forward, images),
            "forward+backward": partial(one.forward_backward, images, labels),
        }
        if "step" in modes:
            calls["step"] = partial(TrainingStep(one), images, labels)
        try:
            calls[modes[-1]]()
            peaks[one.name] = peak_bytes(calls[modes[-1]], x.device)
        except RuntimeError as error:
            if one is contestants[0]:
                raise
            missing[one.name] = failure(error)
            continue
        one.module.zero_grad(set_to_none=True)
        candidates.append(Candidate(name=one.name, calls={mode: _once(call) for mode, call in calls.items()}))
    protocol = {"warmup": INFERENCE_WARMUP, "inner": INFERENCE_CALLS} if inference else {}
    found, untimed = measure(
        candidates, modes=modes, launches=launches, sets=1, rounds=rounds, device=x.device, **protocol
    )
    missing |= untimed
    memory = {"mode": modes[-1], "bytes": peaks} if x.device.type == "cuda" else None
    return found, memory


def _once(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda _: call()


@contextlib.contextmanager
def _frozen(contestants: Sequence[Contestant]) -> Any:
    """Ours compute the position bias once, as where weights are known not to change."""
    with contextlib.ExitStack() as stack:
        for one in contestants:
            freeze: Any = getattr(one.module, "frozen_position_bias", None)
            if freeze is not None:
                stack.enter_context(freeze())
        yield


def _bars(name: str, inference: bool, device: torch.device, ours: Contestant) -> dict[str, dict[str, float]]:
    """Mode -> peer -> ratio wanted."""
    if device.type != "cuda" or ours.dtype is torch.float32:
        return {}
    return {"forward": {"official": INFERENCE_BAR}} if inference else {"step": BARS.get(name, {})}


def _with_rates(
    figures: dict[str, Any],
    mode: str,
    batch: int,
    macs: int,
    peak: float | None,
    bars: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Times with images per second, MFU (`FLOPS_PER_MAC` over the data sheet's dense peak), and bars."""
    for times in figures["seconds"].values():
        times["images_per_s"] = batch / times["median"]
        times["mfu"] = FLOPS_PER_MAC[mode] * macs * times["images_per_s"] / peak if peak else None
    figures["bars"] = {
        peer: {"at_least": bar, "reached": figures["ratios"][peer]["lower"] >= bar}
        for peer, bar in bars.get(mode, {}).items()
        if peer in figures["ratios"]
    }
    return figures


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
    mode: str,
    inference: bool,
    compiled: bool,
    launches: Sequence[str],
) -> str:
    parts = [f"swin-scale bench model --model {name} --batch {batch} --rounds {rounds} --threads {threads}"]
    parts += [f"--precision {precision}", "--inference" if inference else f"--mode {mode}"]
    parts += ["--official DIR"] * (official is not None) + ["--compile"] * compiled
    parts += [f"--peers {' '.join(only)}"]
    parts += [f"--launches {' '.join(launches)}"] * (tuple(launches) != LAUNCHES[:1])
    return " ".join(parts)


def table(figures: Mapping[str, Any]) -> str:
    """One line per candidate and mode, then who is missing and why."""
    settings, machine = figures["settings"], figures["hardware"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
    what = "  inference: mean of 30 passes after 50" if settings["inference"] else ""
    lines = [
        f"{settings['model']}  batch {settings['batch']}  {settings['precision']}  {where}{what}",
        f"{'':<26}{'candidate':<14}{'median s':>10}{'img/s':>9}{'mfu':>7}{'ours is':>9}  "
        f"{'95 % interval':<17} {'wanted':<17}error",
    ]
    few = set()
    for key, launch in (("modes", ""), ("graphs", ", as graphs")):
        for mode, measured in figures.get(key, {}).items():
            for name, times in measured["seconds"].items():
                errors = figures["gate"].get(name, figures["gate"]["ours"])
                ratio, bar = measured["ratios"].get(name), measured["bars"].get(name)
                line = f"{mode + launch:<26}{name:<14}{times['median']:>10.4f}{times['images_per_s']:>9.2f}"
                line += f"{times['mfu']:>7.1%}" if times["mfu"] is not None else " " * 7
                found = f"{ratio['median']:>8.3f}x  {ratio['lower']:.3f} to {ratio['upper']:.3f}" if ratio else ""
                wanted = f"{bar['at_least']:g} {'reached' if bar['reached'] else 'NOT reached'}" if bar else ""
                error = errors["logits" if mode == "forward" else "gradients"]
                lines.append(f"{line}{found:<28} {wanted:<17}{error:.1e}")
                if ratio is not None and name != CONTROL and not ratio["is_claim"]:
                    few.add(ratio["pairs"])
    if figures["memory"]:
        peaks = ", ".join(f"{name} {peak / 1e9:.2f}" for name, peak in figures["memory"]["bytes"].items())
        lines.append(f"peak GB above the models, {figures['memory']['mode']}: {peaks}")
    lines += [f"missing: {name}: {reason}" for name, reason in figures["missing"].items()]
    if few:
        lines.append(f"not a claim: {max(few)} pairs, 40 are needed (--rounds 20)")
    return "\n".join(lines)
