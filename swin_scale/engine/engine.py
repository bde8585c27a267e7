"""One training step under DeepSpeed ZeRO, and the state that a checkpoint holds.

Order inside `Engine.train_step`: seed -> (forward -> loss -> backward) per micro-batch -> one global norm, skip or
update agreed by all ranks -> moving average -> `StepResult`. The loss is the mean over the valid samples of the global
batch, so a run over any number of ranks and micro-batches follows the same gradients. What a model with experts returns
to keep them busy is added as the mean over micro-batches: each judges the balance of its own tokens.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import nn

from swin_scale.checkpoint import Checkpoint, Fragment
from swin_scale.config import BatchPlan, Config
from swin_scale.engine.dist import Dist
from swin_scale.engine.ds_config import to_deepspeed
from swin_scale.engine.experts import ExpertParallel, has_experts
from swin_scale.engine.fragments import FRAGMENTS, LossScale, experts_declared, import_deepspeed, materialize
from swin_scale.engine.losses import soft_target_cross_entropy
from swin_scale.engine.optim import describe_groups, param_groups
from swin_scale.engine.optimizers import build_optimizer, state_layout
from swin_scale.engine.schedule import Schedule
from swin_scale.errors import UserError
from swin_scale.models.init import initial_values
from swin_scale.models.swin import Swin
from swin_scale.moe.stats import RoutingTally

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward's worth of prepared samples, on the device."""

    inputs: torch.Tensor
    """(b, 3, H, W) normalised, in the engine's dtype."""
    targets: torch.Tensor
    """(b, classes) fp32, rows sum to 1."""
    valid: torch.Tensor
    """(b,) bool; empty slots weigh nothing."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step tells; tensors stay on the device until they are logged."""

    loss: torch.Tensor
    """0-d fp32: mean over the valid samples of the global batch, without `aux_loss`, the same on all ranks."""
    grad_norm: torch.Tensor
    """0-d fp32: global norm before clipping; inf when the update was skipped."""
    lr: float
    loss_scale: float
    skipped: bool
    aux_loss: torch.Tensor | None = None
    """0-d fp32: the weighted auxiliary loss, mean over micro-batches and ranks, the same on all ranks; None: dense."""
    routing: RoutingTally = field(default_factory=RoutingTally)
    """By the block's name, what each MoE layer did with the tokens: sums over this rank's micro-batches, not reduced
    over ranks. Empty if dense."""


class Engine:
    """A model wrapped by DeepSpeed: `train_step`, evaluation weights, and fragments to save and load."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        plan: BatchPlan,
        schedule: Schedule,
        dist: Dist,
        values: Iterator[tuple[str, torch.Tensor]] | None = None,
        experts: ExpertParallel | None = None,
    ) -> None:
        """Wrap `model`; all ranks call this together.

        Args:
            model: anywhere; under ZeRO-3 best on the meta device, so that no rank ever holds all of it.
            values: (name, value) of every parameter of a model on the meta device, in the order of
                `named_parameters`; read on rank 0 alone. Default: the initial values of `run.seed`.
            experts: how the experts of `model`, which was built with it, are spread over ranks; None: each has all.
        """
        self.config = config
        self.dist = dist
        self.schedule = schedule
        self._group = torch.distributed.group.WORLD
        self._micro_batches = plan.accumulation
        self._has_experts = has_experts(model)
        held = experts.held(model) if experts is not None else {}
        self.dtype = DTYPES[config.engine.precision]
        stage = config.engine.zero_stage
        on_gpu = dist.device.type == "cuda"
        # Each task may see one GPU alone: the device, not the local rank, is what DeepSpeed must select.
        deepspeed = import_deepspeed(on_gpu, dist.device.index or 0 if on_gpu else dist.local_rank)
        if config.engine.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise UserError("engine.precision is fp16, which this device does not support; use bf16 or fp32")
        # Grouped by shape, so before ZeRO-3 cuts parameters up.
        groups = param_groups(model, config.optim, experts=held)
        self.groups_table = describe_groups(groups)
        settings = to_deepspeed(config, plan, on_gpu=on_gpu)
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            stack.enter_context(_silent_stdout())
            warnings.simplefilter("ignore")
            if any(parameter.is_meta for parameter in model.parameters()):
                assert stage == 3 and isinstance(model, Swin), "only ZeRO-3 takes a model on the meta device"
                values = values or initial_values(model, config.run.seed)
                materialize(deepspeed, model, values, dtype=self.dtype, device=dist.device, rank=dist.rank)
                model.rebuild_buffers(dist.device)
            else:
                model.to(dist.device)
            if experts is not None and held:
                stack.enter_context(experts_declared(model, experts, held, groups))
            guarded_by = None if stage else self._group
            self._deepspeed, self._zero, _, _ = deepspeed.initialize(
                model=model,
                optimizer=build_optimizer(groups, config.optim, deepspeed=deepspeed, guarded_by=guarded_by),
                config=settings,
                dist_init_required=False,
            )
        self._loss_scale = LossScale(self._zero)
        self.module: nn.Module = self._deepspeed.module
        self.fragments = FRAGMENTS[stage](
            self.module,
            self._zero,
            layout=state_layout(config.optim),
            rank=dist.rank,
            world=dist.world,
            group=self._group,
            held=held,
            ema_decay=config.optim.ema_decay,
        )

    def train_step(self, step: int, micro_batches: Iterable[MicroBatch], valid_samples: int) -> StepResult:
        """Consume global batch number `step` (from 0).

        Args:
            step: global batches consumed before this one.
            micro_batches: this rank's part, `accumulation` of them; read lazily, so one at a time is on the device.
            valid_samples: valid samples of this rank's part.
        """
        dist = self.dist
        total = torch.tensor([float(valid_samples)], device=dist.device)
        torch.distributed.all_reduce(total, group=self._group)
        # DeepSpeed averages gradients over ranks; the mean wanted is over valid samples.
        weight = dist.world / total.clamp(min=1.0)
        lr = self._set_learning_rate(step)
        self.module.train()
        sums = torch.zeros(2, device=dist.device)
        routing = RoutingTally()
        for i, micro in enumerate(micro_batches):
            torch.manual_seed(noise_seed(self.config.run.seed, step, i, dist.rank))
            if self._has_experts:
                logits, aux, stats = self._deepspeed(micro.inputs, stats=True)
                routing.add(stats)
            else:
                logits, aux = self._deepspeed(micro.inputs), sums.new_zeros(())
            losses = soft_target_cross_entropy(logits, micro.targets)
            loss = torch.where(micro.valid, losses, 0.0).sum()
            sums += torch.stack([loss.detach(), aux.detach().float()])
            loss = loss * weight.squeeze(0) + aux / self._micro_batches
            # A non-finite loss makes every gradient non-finite, on all ranks after the reduction: all skip together.
            loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
            self._deepspeed.backward(loss, scale_wrt_gas=False)
            scale = float(getattr(self._zero, "loss_scale", None) or 1.0)
            self._deepspeed.step()
            self._loss_scale.grow()
        torch.distributed.all_reduce(sums, group=self._group)
        loss_sum, aux_sum = sums
        skipped = bool(self._zero.overflow)
        if not skipped:
            self.fragments.update_ema()
        norm = self._deepspeed.get_global_grad_norm()
        if norm is None:  # stage 0
            norm = self._zero.grad_norm
        return StepResult(
            loss=loss_sum / total.squeeze(0).clamp(min=1.0),
            grad_norm=torch.as_tensor(norm, dtype=torch.float32, device=dist.device),
            lr=lr,
            loss_scale=scale,
            skipped=skipped,
            aux_loss=aux_sum / (dist.world * self._micro_batches) if self._has_experts else None,
            routing=routing,
        )

    def _set_learning_rate(self, step: int) -> float:
        for group in self._zero.param_groups:
            group["lr"] = self.schedule.group_lr(step, group["lr_scale"])
        return self.schedule.lr(step)

    @contextlib.contextmanager
    def evaluating(self, *, ema: bool = False) -> Iterator[nn.Module]:
        """The bare module in eval mode, carrying the moving average if asked; all ranks enter together."""
        averaged = self.fragments.averaged_weights() if ema else contextlib.nullcontext()
        frozen = self.module.frozen_position_bias() if isinstance(self.module, Swin) else contextlib.nullcontext()
        self.module.eval()
        try:
            with averaged, frozen, torch.inference_mode(False), torch.no_grad():
                yield self.module
        finally:
            self.module.train()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def local_fragments(self) -> Iterator[Fragment]:
        """What this rank saves."""
        return self.fragments.local()

    def parameters_table(self) -> dict[str, dict[str, Any]]:
        """Name, full shape and role of every parameter, for the manifest."""
        return {
            name: {"shape": list(self.fragments.shape(p)), "dtype": "float32", "trained": p.requires_grad}
            for name, p in self.module.named_parameters()
        }

    def state(self) -> dict[str, Any]:
        """What is the same on all ranks and belongs in ``state.json``."""
        return self.fragments.state()

    def load(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        """Continue from `checkpoint`, written by any number of ranks; all ranks call this together."""
        self.fragments.load(checkpoint, state)


def noise_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """63-bit seed of drop-path and dropout: a pure function of its arguments, so no RNG state is ever saved.

    A multiply-xor mix in the manner of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    mask = (1 << 64) - 1
    value = 0
    for part in (seed, step, micro_batch, rank):
        value = (value + part + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value >> 1


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """DeepSpeed prints progress of its set-up to stdout; results of our commands go there."""
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        yield
