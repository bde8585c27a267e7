"""What SimMIM costs beside supervised training: a step of each, on the same encoder, the same images, in one process.

The supervised step: forward with the head, cross-entropy, backward, AdamW. The SimMIM step: masks drawn as the loader
draws them, the encoder with hidden tokens replaced, the decoder, the error on hidden pixels, backward, AdamW. The cost
is the second over the first, paired as `timing` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swin_scale.bench.measure import CONTROL
from swin_scale.bench.model import PRECISIONS
from swin_scale.bench.model_step import TrainingStep
from swin_scale.bench.peers import Contestant
from swin_scale.bench.result import Result, describe, fixed_threads
from swin_scale.bench.timing import Comparison, compare
from swin_scale.data.masking import Masking
from swin_scale.errors import UserError
from swin_scale.models import create_model, create_simmim, variant
from swin_scale.models.geometry import pair

SUPERVISED, MASKED = "supervised", "simmim"
BAR = 1.05
"""The most that a SimMIM step may cost, in supervised steps."""
RATIO = 0.6


def bench_simmim(
    name: str,
    *,
    batch: int = 4,
    rounds: int = 20,
    threads: int = 2,
    precision: str = "fp32",
    mask_patch_size: int = 32,
    norm_target: int | None = None,
    device: str | None = None,
    out: str | None = None,
    **overrides: Any,
) -> Result:
    """Cost of a SimMIM step in supervised steps of the same encoder.

    Args:
        name: of `list_models()`; `overrides` change it as in `create_model`. Its classes are those of its name.
        rounds: see `timing.compare`; 20 give the 40 pairs that a claim needs.
        precision: `fp32`, `bf16` or `fp16`, of parameters and activations.
        mask_patch_size, norm_target: as in `create_simmim`.
        device: default: the first CUDA device, or the CPU.
        out: file for the result as JSON.

    Raises UserError for a model that SimMIM is not defined for, or with experts.
    """
    if precision not in ("fp32", "bf16", "fp16"):
        raise UserError(f"--precision {precision} is not one of fp32, bf16, fp16")
    dtype = PRECISIONS[precision][0]
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    v = variant(name, **overrides)
    if v.moe is not None:
        raise UserError(f"bench simmim compares dense encoders; {name} has experts")
    with fixed_threads(threads), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        masking = Masking(ratio=RATIO, cell=mask_patch_size, patch=v.patch_size)
        masked = create_simmim(name, mask_patch_size=mask_patch_size, norm_target=norm_target, **overrides)
        contestants = (
            Contestant(name=SUPERVISED, module=create_model(name, **overrides), dtype=dtype),
            _Masked(name=MASKED, module=masked, dtype=dtype, masking=masking),
        )
        for one in contestants:
            one.place(where)
        supervised, simmim = map(TrainingStep, contestants)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, v.in_chans, *pair(v.img_size), generator=generator).to(where)
        labels = torch.randint(v.num_classes, (batch,), generator=generator).to(where)
        calls: dict[str, Callable[[], object]] = {
            SUPERVISED: lambda: supervised(x, labels),
            MASKED: lambda: simmim(x, labels),
        }
        calls[CONTROL] = calls[SUPERVISED]
        found = compare(calls, rounds=rounds, device=where, control=CONTROL)
        command = (
            f"swin-scale bench simmim --model {name} --batch {batch} --rounds {rounds} --threads {threads} --precision "
            f"{precision}" + (f" --norm-target {norm_target}" if norm_target else "")
        )
        figures = describe("simmim", command, where)
    figures |= {
        "settings": {
            "model": name,
            "batch": batch,
            "precision": precision,
            "classes": v.num_classes,
            "mask_patch_size": mask_patch_size,
            "norm_target": norm_target,
            "rounds": rounds,
        },
        **_cost(found),
    }
    result = Result(figures=figures, table=table(figures))
    if out is not None:
        result.write(out)
    return result


@dataclass(frozen=True, kw_only=True)
class _Masked(Contestant):
    """SimMIM, which draws the masks of its images itself, new ones each time, on the CPU as a loader does."""

    masking: Masking

    def forward_backward(self, x: Tensor, labels: Tensor) -> None:
        """Gradients of the error on hidden pixels of images in fp32; labels are not read."""
        if not self.module.training:
            self.module.train()
        self.module.zero_grad(set_to_none=True)
        self.module(x, _masks(self.masking, x)).backward()


def _masks(masking: Masking, x: Tensor) -> Tensor:
    """New masks for images (B, C, H, W), keyed at random."""
    height, width = x.shape[2:]
    epoch = int(torch.randint(1 << 31, ()))
    masks = [masking.draw(height, width, epoch=epoch, sample=i) for i in range(len(x))]
    return torch.stack([torch.from_numpy(mask) for mask in masks]).to(x.device)


def _cost(found: Comparison) -> dict[str, Any]:
    """Times, ratios and the verdict: the whole 95 % interval of the cost must lie at or below the bar."""
    cost = found.ratio(MASKED)
    return {**found.as_dict(), "bar": {"at_most": BAR, "reached": cost.upper <= BAR}}


def table(figures: dict[str, Any]) -> str:
    """Each step's time, the cost with its interval, and the same of a supervised step against itself."""
    settings, machine, seconds = figures["settings"], figures["hardware"], figures["seconds"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
    cost, noise, bar = figures["ratios"][MASKED], figures["ratios"][CONTROL], figures["bar"]
    few = "" if cost["is_claim"] else f"; {cost['pairs']} pairs are no basis for a claim"
    verdict = f"at most {bar['at_most']:g} {'reached' if bar['reached'] else 'NOT reached'}{few}"
    head = f"{settings['model']}  batch {settings['batch']}  {settings['precision']}  {settings['classes']} classes"
    return "\n".join(
        [
            f"{head}  {where}",
            *(f"{name + ' step':<18}{seconds[name]['median']:9.4f} s" for name in (SUPERVISED, MASKED)),
            f"SimMIM costs      {cost['median']:9.3f} supervised steps, 95 % {_interval(cost)}, {verdict}",
            f"supervised again  {noise['median']:9.3f}, 95 % {_interval(noise)}: the machine's noise",
        ]
    )


def _interval(ratio: dict[str, Any]) -> str:
    return f"{ratio['lower']:.3f} to {ratio['upper']:.3f}"
