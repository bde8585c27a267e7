"""The training state as fragments with global coordinates: what every ZeRO stage shares, and stage 0.

A `Piece` is the range of one parameter whose fp32 master copy and moments this rank keeps. Whatever is saved by pieces
can be read by any number of ranks under any stage. Stages 1 to 3 keep pieces where DeepSpeed has them
(`fragments.py`); at stage 0 every rank has everything, and the pieces only share out the saving.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from swin_scale.checkpoint import Checkpoint, Fragment
from swin_scale.engine.experts import Held
from swin_scale.engine.optimizers import StateLayout, applied_updates, ensure_state
from swin_scale.errors import CheckpointError, PreemptedError

LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
GATHER_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run began with on this rank, kept in host memory until there is a checkpoint: 4 bytes for each element of
    its pieces."""

    masters: tuple[Tensor, ...]
    state: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of one parameter whose master copy this rank keeps; a frozen parameter's has no moments."""

    name: str
    parameter: nn.Parameter
    start: int
    """First element of the flattened parameter, as this rank holds it."""
    master: Tensor
    """(length,) view of the fp32 master copy; of the parameter itself when that is frozen."""
    moments: Mapping[str, Tensor]
    """The optimizer's state, each a (length,) fp32 view; empty before the first update."""
    origin: int = 0
    """The element of the whole parameter that this rank's begins with: above 0 where earlier ranks hold experts."""

    @property
    def global_start(self) -> int:
        """First element, counted over the experts of all ranks."""
        return self.origin + self.start


class Fragments(ABC):
    """This rank's pieces of a wrapped model, and optionally their moving average: saved, loaded, averaged.

    `optimizer` is what updates the parameters: DeepSpeed's around the one of `optimizers`, or that one itself.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Any,
        *,
        layout: StateLayout,
        rank: int,
        world: int,
        group: Any,
        held: Mapping[nn.Parameter, Held],
        ema_decay: float = 0.0,
    ) -> None:
        """`layout`: of the state of `optimizer`. `held`: the parameters that are not on all ranks of `group`, but
        spread over them by expert.
        """
        self._module = module
        self._optimizer = optimizer
        self._layout = layout
        self._rank, self._world, self._group = rank, world, group
        self._held = held
        self._ema_decay = ema_decay
        # Masters stay where they are for good.
        self._masters = [piece.master for piece in self.pieces()] if ema_decay else []
        self._ema = [master.clone() for master in self._masters]

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """What this rank keeps, in the order of `named_parameters`."""

    @abstractmethod
    def _flat(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """(options, tensor) for every tensor that the optimizer of `optimizers` updates."""

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Full shape of a parameter of the module, wherever its elements are, experts of all ranks included."""
        return self._held[parameter].shape if parameter in self._held else tuple(parameter.shape)

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The optimizer of `optimizers`."""
        base: torch.optim.Optimizer = self._optimizer.optimizer
        return base

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape(parameter) for name, parameter in self._module.named_parameters()}

    # -- saving --------------------------------------------------------------------------------------------------------

    def local(self) -> Iterator[Fragment]:
        """This rank's fragments: masters, moments, moving averages. No copies."""
        self._create_moments()
        for i, piece in enumerate(self.pieces()):
            parts = {"master": piece.master, **piece.moments}
            if self._ema:
                parts["ema"] = self._ema[i]
            shape = self.shape(piece.parameter)
            for kind, data in parts.items():
                yield Fragment(name=piece.name, kind=kind, shape=shape, start=piece.global_start, data=data.detach())

    def state(self) -> dict[str, Any]:
        """What is the same on all ranks: applied updates and the loss scaler."""
        scaler = getattr(self._optimizer, "loss_scaler", None)
        scaling = {key: getattr(scaler, key) for key in LOSS_SCALER_STATE if hasattr(scaler, key)}
        return {"optimizer_step": applied_updates(self._base, self._layout), "loss_scaler": scaling}

    # -- loading -------------------------------------------------------------------------------------------------------

    def load(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        """Take masters, moments, moving averages and scaler from any checkpoint of the same parameters."""
        ours = self._shapes()
        theirs = {name: tuple(entry["shape"]) for name, entry in checkpoint.parameters.items()}
        if ours != theirs:
            odd = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            raise CheckpointError(f"{checkpoint.path} holds another model; parameters differ: {', '.join(odd[:8])}")
        kinds = set(checkpoint.kinds())
        self._create_moments(float(state["optimizer_step"]))
        for piece in self._targets():
            for kind, target in {"master": piece.master, **piece.moments}.items():
                if kind not in kinds:
                    raise CheckpointError(f"{checkpoint.path} has no {kind}; it was saved with another optim.name")
                checkpoint.read(kind, piece.name, piece.global_start, target.numel(), out=target)
        if self._ema:
            # A run that turns its moving average on starts it from the weights.
            kind = "ema" if "ema" in kinds else "master"
            for piece, average in zip(self.pieces(), self._ema, strict=True):
                checkpoint.read(kind, piece.name, piece.global_start, average.numel(), out=average)
        self._scale(state)
        self._publish()

    def _scale(self, state: Mapping[str, Any]) -> None:
        """The loss scaler as `state` has it."""
        scaler = getattr(self._optimizer, "loss_scaler", None)
        for key, value in state["loss_scaler"].items():
            if hasattr(scaler, key):
                setattr(scaler, key, value)

    def start(self) -> Start:
        """To be taken before the first update, for `rewind`."""
        masters = tuple(piece.master.detach().to("cpu", copy=True) for piece in self._targets())
        return Start(masters=masters, state=self.state())

    @torch.no_grad()
    def rewind(self, start: Start) -> None:
        """Masters, moments, moving averages and scaler as they were before the first update."""
        self._create_moments(0.0)
        for piece, master in zip(self._targets(), start.masters, strict=True):
            piece.master.copy_(master)
            for moment in piece.moments.values():
                moment.zero_()
        for average, piece in zip(self._ema, self.pieces()):
            average.copy_(piece.master)
        self._scale(start.state)
        self._publish()

    @torch.no_grad()
    def not_finite(self) -> list[str]:
        """The parameters of which something on this rank is not finite: values, master, moments or average."""
        pieces, held = self.pieces(), self._values()
        held += [(piece.name, part) for piece in pieces for part in (piece.master, *piece.moments.values())]
        held += [(piece.name, average) for piece, average in zip(pieces, self._ema)]
        if not held:
            return []
        # One wait for the device, wherever the tensors are.
        device = held[0][1].device
        sound = torch.stack([tensor.isfinite().all().to(device) for _, tensor in held]).tolist()
        return list(dict.fromkeys(name for (name, _), fine in zip(held, sound) if not fine))

    def replicas(self) -> list[tuple[str, Tensor, Held | None]]:
        """What the forward pass reads and other ranks hold too: (name, values, the part of experts if not of all)."""
        return [(name, p.data, self._held.get(p)) for name, p in self._module.named_parameters()]

    def _values(self) -> list[tuple[str, Tensor]]:
        """What the forward pass reads of each parameter on this rank."""
        return [(name, parameter.data) for name, parameter in self._module.named_parameters()]

    def _targets(self) -> list[Piece]:
        """The pieces that loading fills."""
        return self.pieces()

    def _publish(self) -> None:
        """The module's parameters follow the masters that were loaded."""
        self._fill([piece.master for piece in self.pieces()])

    def _create_moments(self, step: float | None = None) -> None:
        """Make the state that the optimizer makes at its first update; `step` sets its count of updates."""
        for options, flat in self._flat():
            ensure_state(self._base, self._layout, options, flat, step)

    # -- moving average ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the average towards the masters; call after an update that was applied."""
        if self._ema:
            torch._foreach_lerp_(self._ema, self._masters, 1.0 - self._ema_decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The module carries the moving average inside the context (all ranks enter together).

        After an error, the agreed end of the run aside, it goes on carrying it: an error of this rank alone would wait
        for the others here, which are elsewhere, until they all were taken for lost.
        """
        self._fill(self._ema)
        try:
            yield
        except PreemptedError:
            self._publish()
            raise
        self._publish()

    @torch.no_grad()
    def _fill(self, sources: Sequence[Tensor]) -> None:
        """Write `sources`, one per piece, into the parameters of every rank.

        Each element has one owner, so summing pieces over zeros is exact.
        """
        owned: dict[int, list[tuple[int, Tensor]]] = {}
        for piece, source in zip(self.pieces(), sources, strict=True):
            owned.setdefault(id(piece.parameter), []).append((piece.start, source))
        for group, parameters in self._sharers().items():
            for bucket in _buckets(parameters):
                sizes = [parameter.numel() for parameter in bucket]
                joined = bucket[0].new_zeros(sum(sizes))
                for parameter, values in zip(bucket, joined.split(sizes), strict=True):
                    for start, source in owned.get(id(parameter), ()):
                        values[start : start + source.numel()].copy_(source)
                torch.distributed.all_reduce(joined, group=group)
                for parameter, values in zip(bucket, joined.split(sizes), strict=True):
                    parameter.data.copy_(values.view_as(parameter))

    def _sharers(self) -> dict[Any, list[nn.Parameter]]:
        """Groups of ranks, and the parameters that these hold in common; in the same order on all ranks."""
        found: dict[Any, list[nn.Parameter]] = {}
        for parameter in self._module.parameters():
            group = self._held[parameter].group if parameter in self._held else self._group
            found.setdefault(group, []).append(parameter)
        return found


class ReplicatedFragments(Fragments):
    """Stage 0: the parameter is the master; every rank saves an equal share of all elements."""

    @property
    def _base(self) -> torch.optim.Optimizer:
        base: torch.optim.Optimizer = self._optimizer
        return base

    def pieces(self) -> list[Piece]:
        whole = self._targets()
        total = sum(piece.master.numel() for piece in whole)
        first, last = total * self._rank // self._world, total * (self._rank + 1) // self._world
        found, at = [], 0
        for piece in whole:
            size = piece.master.numel()
            part = slice(max(first - at, 0), min(last - at, size))
            if part.start < part.stop:
                moments = {kind: data[part] for kind, data in piece.moments.items()}
                found.append(
                    Piece(
                        name=piece.name,
                        parameter=piece.parameter,
                        start=part.start,
                        master=piece.master[part],
                        moments=moments,
                    )
                )
            at += size
        return found

    def _targets(self) -> list[Piece]:
        names = self._layout.moments
        found = []
        for name, parameter in self._module.named_parameters():
            entry = self._base.state.get(parameter, {})
            moments = {kind: entry[kind].view(-1) for kind in names if kind in entry}
            master = parameter.data.view(-1)
            found.append(Piece(name=name, parameter=parameter, start=0, master=master, moments=moments))
        return found

    def _publish(self) -> None:
        """Nothing: the parameters are the masters."""

    def _flat(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for options in self._base.param_groups:
            for parameter in options["params"]:
                yield options, parameter

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        parameters = [parameter.data for parameter in self._module.parameters()]
        masters = [parameter.clone() for parameter in parameters]
        try:
            with super().averaged_weights():
                yield
        finally:
            torch._foreach_copy_(parameters, masters)


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in runs of one dtype and at most GATHER_BYTES (or one large parameter)."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        nbytes = parameter.numel() * parameter.element_size()
        if bucket and (size + nbytes > GATHER_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += nbytes
    if bucket:
        yield bucket
