"""What must change together when the number of GPUs or the global batch does, and what must not."""

from __future__ import annotations

from swin_scale.config import Config, batch_plan, learning_rate_scale
from swin_scale.errors import UserError


def invariants(config: Config, ranks: int, steps: int | None) -> list[str]:
    """Sentences about this config, with its numbers; `steps` of the whole run, None if unknown."""
    plan = batch_plan(config, ranks)
    batch, rate = plan.global_batch, _peak_rate(config)
    lines = [
        f"global batch {batch} = {ranks} ranks x {plan.accumulation} micro-batches x {plan.micro} images: with another "
        "number of GPUs keep train.global_batch, and no sample, step or learning rate changes",
        _counts(config, ranks),
    ]
    if config.optim.lr_per_512 is not None:
        lines.append(
            f"twice the global batch: the peak learning rate follows by itself, {rate:g} to {2 * rate:g} "
            f"(optim.lr_per_512 {config.optim.lr_per_512:g} x batch / 512)"
        )
    else:
        lines.append(
            f"twice the global batch: set optim.lr from {rate:g} to {2 * rate:g} yourself; "
            "schedule.warmup_lr and min_lr are in its unit"
        )
    halved = [
        f"{key} {value} to {value // 2}"
        for key, value in (
            ("train.max_steps", config.train.max_steps),
            ("schedule.total_steps", config.schedule.total_steps),
            ("schedule.warmup_steps", config.schedule.warmup_steps),
            ("checkpoint.every_steps", config.checkpoint.every_steps),
        )
        if value is not None
    ]
    epochs = "lengths in epochs stay" + (f" ({steps} steps become {steps // 2})" if steps else "")
    lines.append(
        f"and halve what counts steps: {', '.join(halved)}" if halved else f"and nothing counts steps: {epochs}"
    )
    if config.optim.ema_decay:
        lines.append(
            f"and square optim.ema_decay, {config.optim.ema_decay:g} to {config.optim.ema_decay**2:g}: it is per step"
        )
    lines.append(
        "at a resume train.global_batch cannot change; ranks, micro-batch, ZeRO stage, EP and recomputation can"
    )
    if config.augment.mixes:
        lines.append(f"mixup pairs neighbours: the micro-batch stays even ({plan.micro})")
    return lines


def _peak_rate(config: Config) -> float:
    given = config.optim.lr if config.optim.lr is not None else config.optim.lr_per_512
    assert given is not None
    return given * learning_rate_scale(config)


def _counts(config: Config, ranks: int) -> str:
    """The numbers of GPUs around `ranks` that this batch can be cut over."""
    batch, good = config.train.global_batch, []
    for n in range(1, min(batch, 8 * ranks) + 1):
        try:
            batch_plan(config, n)
        except UserError:
            continue
        good.append(n)
    near = [n for n in good if ranks / 8 <= n]
    return f"GPUs that this batch and micro-batch divide over, near {ranks}: {', '.join(map(str, near[:16]))}"
