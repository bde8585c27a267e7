"""One training step under DeepSpeed ZeRO, and the state that a checkpoint holds.

Order inside `Engine.train_step`: seed -> (forward -> loss -> backward) per micro-batch -> one global norm, skip or
update agreed by all ranks -> moving average -> `StepResult`. What is trained for is not known here: a `LossFunction` of
the task (`swin_scale.tasks`) calls the model and returns a loss per sample. The loss is the mean over the valid samples
of the global batch, so a run over any number of ranks and micro-batches follows the same gradients. What a model with
experts returns to keep them busy is added as the mean over micro-batches: each judges the balance of its own tokens.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import nn

from swin_scale.checkpoint import Checkpoint, Fragment
from swin_scale.config import BatchPlan, Config
from swin_scale.engine.dist import Dist
from swin_scale.engine.ds_config import to_deepspeed
from swin_scale.engine.experts import ExpertParallel, has_experts
from swin_scale.engine.fragments import (
    FRAGMENTS,
    LossScale,
    experts_declared,
    import_deepspeed,
    local_rank_set,
    materialize,
    release,
)
from swin_scale.engine.optim import describe_groups, param_groups
from swin_scale.engine.optimizers import build_optimizer, state_layout
from swin_scale.engine.pieces import Start
from swin_scale.engine.schedule import Schedule
from swin_scale.errors import UserError
from swin_scale.models.init import initial_values
from swin_scale.models.simmim import SimMIM
from swin_scale.models.swin import Swin
from swin_scale.moe.stats import RoutingStats, RoutingTally
from swin_scale.sections import Section, Sections

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward's worth of prepared samples, on the device."""

    inputs: torch.Tensor
    """(b, 3, H, W) normalised, of a dtype that the task chooses."""
    targets: torch.Tensor
    """(b, ...), what the task's loss needs beside them: probabilities of classes (b, classes) in fp32, or a mask."""
    valid: torch.Tensor
    """(b,) bool; empty slots weigh nothing."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a model gave for one micro-batch."""

    samples: torch.Tensor
    """(b,) fp32: the loss of each sample; those of empty slots are left out by the engine."""
    aux: torch.Tensor | None = None
    """0-d: the weighted auxiliary loss of a model with experts, None of a dense one."""
    routing: Mapping[str, RoutingStats] = field(default_factory=dict)
    """By the block's name, what each MoE layer did."""


Forward = Callable[..., Any]
"""The model's forward, through DeepSpeed; a model with experts is asked for its routing, as a third value, as well."""

LossFunction = Callable[[Forward, MicroBatch], Losses]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step tells; tensors stay on the device until they are logged."""

    loss: torch.Tensor
    """0-d fp32: mean over the valid samples of the global batch, without `aux_loss`, the same on all ranks."""
    sample_losses: torch.Tensor
    """(B,) fp32: of each of this rank's samples; those of empty slots mean nothing."""
    valid_samples: torch.Tensor
    """0-d fp32: valid samples of the global batch; where there is none, nothing was updated."""
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
        *,
        losses: LossFunction,
        sections: Sections | None = None,
    ) -> None:
        """Wrap `model`; all ranks call this together.

        Args:
            model: anywhere; under ZeRO-3 best on the meta device, so that no rank ever holds all of it.
            values: (name, value) of every parameter of a model on the meta device, in the order of
                `named_parameters`; read on rank 0 alone. Default: the initial values of `run.seed`.
            experts: how the experts of `model`, which was built with it, are spread over ranks; None: each has all.
            losses: calls the model on a micro-batch.
            sections: told what a step is doing.
        """
        self.config = config
        self.dist = dist
        self.schedule = schedule
        self._group = torch.distributed.group.WORLD
        self._micro_batches = plan.accumulation
        self._has_experts = has_experts(model)
        self._losses = losses
        self._sections = sections or Sections()
        held = experts.held(model) if experts is not None else {}
        self.dtype = DTYPES[config.engine.precision]
        stage = config.engine.zero_stage
        on_gpu = dist.device.type == "cuda"
        # Each task may see one GPU alone: the device, not the local rank, is what DeepSpeed must select.
        device_number = dist.device.index or 0 if on_gpu else dist.local_rank
        deepspeed = import_deepspeed(on_gpu)
        if config.engine.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise UserError("engine.precision is fp16, which this device does not support; use bf16 or fp32")
        # Grouped by shape, so before ZeRO-3 cuts parameters up.
        groups = param_groups(model, config.optim, experts=held)
        self.groups_table = describe_groups(groups)
        settings = to_deepspeed(config, plan, on_gpu=on_gpu)
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            stack.enter_context(_silent_stdout())
            stack.enter_context(local_rank_set(device_number))
            warnings.simplefilter("ignore")
            if any(parameter.is_meta for parameter in model.parameters()):
                assert stage == 3, "only ZeRO-3 takes a model on the meta device"
                assert isinstance(model, Swin | SimMIM)
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
        self._environment = contextlib.ExitStack()
        if stage == 3:  # compares the order of its parameters over ranks after the first passes, too
            self._environment.enter_context(local_rank_set(device_number))
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

    def train_step(
        self, step: int, micro_batches: Iterable[MicroBatch], valid_samples: int, *, loss_limit: float = math.inf
    ) -> StepResult:
        """Consume global batch number `step` (from 0).

        Args:
            step: global batches consumed before this one.
            micro_batches: this rank's part, `accumulation` of them; read lazily, so one at a time is on the device.
            valid_samples: valid samples of this rank's part.
            loss_limit: a loss of the global batch above it updates nothing, as one that is not finite.
        """
        with self._sections(Section.FORWARD):  # what is neither backward nor update
            return self._train_step(step, micro_batches, valid_samples, loss_limit)

    def _train_step(
        self, step: int, micro_batches: Iterable[MicroBatch], valid_samples: int, loss_limit: float
    ) -> StepResult:
        dist = self.dist
        total = torch.full((1,), float(valid_samples), device=dist.device)  # filled there: a copy would be waited for
        with self._sections(Section.SYNC):
            torch.distributed.all_reduce(total, group=self._group)
        valid = total.squeeze(0)
        # DeepSpeed averages gradients over ranks; the mean wanted is over valid samples.
        weight = dist.world / total.clamp(min=1.0)
        lr = self._set_learning_rate(step)
        self.module.train()
        sums = torch.zeros(2, device=dist.device)
        routing = RoutingTally()
        samples: list[torch.Tensor] = []
        for i, micro in enumerate(micro_batches):
            torch.manual_seed(noise_seed(self.config.run.seed, step, i, dist.rank))
            losses = self._losses(self._forward, micro)
            samples.append(losses.samples.detach())
            if losses.routing:
                routing.add(losses.routing)
            aux = sums.new_zeros(()) if losses.aux is None else losses.aux
            sums += torch.stack([_valid_sum(losses.samples, micro.valid), aux.float()]).detach()
            sound = sums.isfinite().all()
            if i + 1 == self._micro_batches:
                # The loss of all ranks, before the update that it decides on; the device is not waited for.
                with self._sections(Section.SYNC):
                    torch.distributed.all_reduce(sums, group=self._group)
                mean = sums[0] / valid.clamp(min=1.0)
                sound = sound & (mean <= loss_limit) & (valid > 0)
            # A non-finite loss makes every gradient non-finite, on all ranks after the reduction: all skip together.
            # Then empty slots count too, for where a micro-batch has nothing else no gradient would become so.
            loss = _valid_sum(losses.samples, micro.valid | ~sound) * weight.squeeze(0) + aux / self._micro_batches
            loss = loss * torch.where(sound, 1.0, torch.nan)
            with self._sections(Section.BACKWARD):
                self._deepspeed.backward(loss, scale_wrt_gas=False)
            scale = float(getattr(self._zero, "loss_scale", None) or 1.0)
            with self._sections(Section.OPTIMIZER):
                self._deepspeed.step()
                self._loss_scale.grow()
        skipped = bool(self._zero.overflow)
        if not skipped:
            with self._sections(Section.OPTIMIZER):
                self.fragments.update_ema()
        norm = self._deepspeed.get_global_grad_norm()
        if norm is None:  # stage 0
            norm = self._zero.grad_norm
        return StepResult(
            loss=mean,
            sample_losses=torch.cat(samples),
            valid_samples=valid,
            grad_norm=torch.as_tensor(norm, dtype=torch.float32, device=dist.device),
            lr=lr,
            loss_scale=scale,
            skipped=skipped,
            aux_loss=sums[1] / (dist.world * self._micro_batches) if self._has_experts else None,
            routing=routing,
        )

    def undo_skipped(self) -> None:
        """Take back what the last step, which updated nothing, left nevertheless: a lower loss scale."""
        self._loss_scale.undo()

    @torch.no_grad()
    def sample_losses(self, step: int, micro_batches: Iterable[MicroBatch]) -> torch.Tensor:
        """(B,) fp32: the losses of this rank's samples in global batch number `step`, computed as `train_step` does,
        with nothing updated; all ranks call this together.
        """
        self.module.train()
        found = []
        for i, micro in enumerate(micro_batches):
            torch.manual_seed(noise_seed(self.config.run.seed, step, i, self.dist.rank))
            found.append(self._losses(self._forward, micro).samples)
        return torch.cat(found)

    @property
    def _forward(self) -> Forward:
        return partial(self._deepspeed, stats=True) if self._has_experts else self._deepspeed

    def _set_learning_rate(self, step: int) -> float:
        for group in self._zero.param_groups:
            group["lr"] = self.schedule.group_lr(step, group["lr_scale"])
        return self.schedule.lr(step)

    def close(self) -> None:
        """Let go of all memory, which DeepSpeed's hooks would hold on to; the engine is of no use afterwards."""
        with _silent_stdout():
            release(self._deepspeed, self._zero)
        self._environment.close()

    @contextlib.contextmanager
    def evaluating(self, *, ema: bool = False) -> Iterator[nn.Module]:
        """The bare module in eval mode, carrying the moving average if asked; all ranks enter together."""
        averaged = self.fragments.averaged_weights() if ema else contextlib.nullcontext()
        network = self.module
        beats = network.register_forward_pre_hook(lambda *_: self._sections.alive())
        frozen = network.frozen_position_bias() if isinstance(network, Swin | SimMIM) else contextlib.nullcontext()
        self.module.eval()
        try:
            with averaged, frozen, torch.inference_mode(False), torch.no_grad():
                yield self.module
        finally:
            beats.remove()
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

    def start(self) -> Start:
        """What this rank's state is before the first step, for `rewind`; in host memory."""
        return self.fragments.start()

    def rewind(self, start: Start) -> None:
        """Begin again; all ranks call this together."""
        self.fragments.rewind(start)

    def not_finite(self) -> list[str]:
        """Names of the parameters of which something is not finite on this rank; waits for the device."""
        return self.fragments.not_finite()


def _valid_sum(losses: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """0-d fp32: without the (b,) losses of empty slots, which may be anything."""
    return torch.where(valid, losses, 0.0).sum()


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
