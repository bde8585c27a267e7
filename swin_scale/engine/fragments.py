"""ZeRO's shards as fragments with global coordinates, and back. The one file that uses DeepSpeed's private names.

DeepSpeed 0.19 keeps, per parameter, the piece of its fp32 master copy and moments that this rank owns
(``param._hp_mapping``). A fragment is that piece under the parameter's own name and flat range, so whatever is saved
here can be read by any number of ranks.

Private names used: ``_hp_mapping`` (``lp_fragment_address``, ``hp_fragment``, ``optim_fragment``),
``_hp_optimizer_states_linked``, ``_lazy_init_hp_params_optimizer_state``, ``check_grad_overflow``, ``loss_scaler``,
``deepspeed.ops.__compatible_ops__``, ``deepspeed.runtime.zero.muon.original_muon``; `tests/engine/test_fragments.py`
is the contract test.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import nn

from swin_scale.checkpoint import Checkpoint, Fragment
from swin_scale.errors import CheckpointError, UserError

SUPPORTED = ((0, 19, 8), (0, 20))
MOMENTS = {"AdamW": ("exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",)}
LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
GATHER_BYTES = 256 << 20


def import_deepspeed(on_gpu: bool, local_rank: int) -> Any:
    """DeepSpeed, checked for its version and kept from compiling CPU kernels at start; raises UserError."""
    os.environ["LOCAL_RANK"] = str(local_rank)
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"deepspeed cannot be imported ({error}); pip install 'deepspeed>=0.19.8,<0.20'") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch is about to rename; nothing a user could act on.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    seen = tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:3])
    if not SUPPORTED[0] <= seen < SUPPORTED[1]:
        raise UserError(f"deepspeed is {deepspeed.__version__}; pip install 'deepspeed>=0.19.8,<0.20'")
    # Its shared-memory collectives serve CPU inference only, and cost a C++ build at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon_uncompiled()
    return deepspeed


def _import_muon_uncompiled() -> None:
    """DeepSpeed's Muon, unused here, is compiled as it is imported: 3 s of loading torch's inductor per process."""

    def leave(function: Any = None, **_: Any) -> Any:
        return leave if function is None else function

    compile_function = torch.compile
    torch.compile = leave  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compile_function


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of one parameter whose master copy this rank owns."""

    name: str
    parameter: nn.Parameter
    start: int
    master: torch.Tensor
    """(length,) fp32 view into ZeRO's flat partition."""
    moments: Mapping[str, torch.Tensor]


class Fragments:
    """The fragments of one DeepSpeed ZeRO-1 or ZeRO-2 engine, and optionally their moving average."""

    def __init__(self, module: nn.Module, optimizer: Any, rank: int, group: Any, ema_decay: float = 0.0) -> None:
        self._module = module
        self._zero = optimizer
        self._rank = rank
        self._group = group
        self._ema_decay = ema_decay
        # Non-finite gradients skip the update on all ranks in every precision, not only in fp16.
        self._zero.check_grad_overflow = True
        self._ema = [piece.master.clone() for piece in self.pieces()] if ema_decay else []

    def pieces(self) -> list[Piece]:
        """What this rank owns, in the order of `named_parameters`."""
        found = []
        for name, parameter in self._module.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                found.append(
                    Piece(
                        name=name,
                        parameter=parameter,
                        start=mapping.lp_fragment_address.start,
                        master=mapping.hp_fragment,
                        moments=mapping.optim_fragment or {},
                    )
                )
        return found

    # -- saving --------------------------------------------------------------------------------------------------------

    def local(self) -> Iterator[Fragment]:
        """This rank's fragments: masters, moments, moving averages; frozen parameters come from rank 0. No copies."""
        self._link_moments()
        for i, piece in enumerate(self.pieces()):
            parts = {"master": piece.master, **piece.moments}
            if self._ema:
                parts["ema"] = self._ema[i]
            shape = tuple(piece.parameter.shape)
            for kind, data in parts.items():
                yield Fragment(name=piece.name, kind=kind, shape=shape, start=piece.start, data=data.detach())
        if self._rank == 0:
            for name, parameter in self._module.named_parameters():
                if not parameter.requires_grad:
                    data = parameter.detach().reshape(-1)
                    yield Fragment(name=name, kind="master", shape=tuple(parameter.shape), start=0, data=data)

    def state(self) -> dict[str, Any]:
        """What is the same on all ranks: applied updates and the loss scaler."""
        steps = [float(entry["step"]) for entry in self._zero.optimizer.state.values() if "step" in entry]
        scaler = getattr(self._zero, "loss_scaler", None)
        scaling = {key: getattr(scaler, key) for key in LOSS_SCALER_STATE if hasattr(scaler, key)}
        return {"optimizer_step": max(steps, default=0.0), "loss_scaler": scaling}

    # -- loading -------------------------------------------------------------------------------------------------------

    def load(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        """Take masters, moments, moving averages and scaler from any checkpoint of the same parameters."""
        ours = {name: tuple(p.shape) for name, p in self._module.named_parameters()}
        theirs = {name: tuple(entry["shape"]) for name, entry in checkpoint.parameters.items()}
        if ours != theirs:
            odd = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            raise CheckpointError(f"{checkpoint.path} holds another model; parameters differ: {', '.join(odd[:8])}")
        kinds = set(checkpoint.kinds())
        self._create_moments(float(state["optimizer_step"]))
        for i, piece in enumerate(self.pieces()):
            length = piece.master.numel()
            targets = {"master": piece.master, **piece.moments}
            for kind, target in targets.items():
                if kind not in kinds:
                    raise CheckpointError(f"{checkpoint.path} has no {kind}; it was saved with another optim.name")
                checkpoint.read(kind, piece.name, piece.start, length, out=target)
            if self._ema:
                # A run that turns its moving average on starts it from the weights.
                kind = "ema" if "ema" in kinds else "master"
                checkpoint.read(kind, piece.name, piece.start, length, out=self._ema[i])
        for name, parameter in self._module.named_parameters():
            if not parameter.requires_grad:
                parameter.data.copy_(checkpoint.read("master", name).view_as(parameter))
        scaler = getattr(self._zero, "loss_scaler", None)
        for key, value in state["loss_scaler"].items():
            if hasattr(scaler, key):
                setattr(scaler, key, value)
        self._fill_parameters(None)

    def _create_moments(self, step: float) -> None:
        """Give every flat partition the state its optimizer makes lazily at the first update."""
        base = self._zero.optimizer
        names = MOMENTS[type(base).__name__]
        for group in base.param_groups:
            for flat in group["params"]:
                entry = base.state[flat]
                entry.update({name: torch.zeros_like(flat) for name in names if name not in entry})
                if "exp_avg" in names:
                    # torch keeps the count on the parameter's device when its update runs there (fused, capturable).
                    on_device = group.get("fused") or group.get("capturable")
                    device = flat.device if on_device else torch.device("cpu")
                    entry["step"] = torch.tensor(step, dtype=torch.float32, device=device)
        self._link_moments()

    def _link_moments(self) -> None:
        # DeepSpeed links state after the first group has stepped; the other groups' moments would stay unknown.
        if all(flat in self._zero.optimizer.state for g in self._zero.optimizer.param_groups for flat in g["params"]):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    # -- moving average ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the average towards the masters; call after an update that was applied."""
        if self._ema:
            masters = [piece.master for piece in self.pieces()]
            torch._foreach_lerp_(self._ema, masters, 1.0 - self._ema_decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The module carries the moving average inside the context (all ranks enter together)."""
        self._fill_parameters(self._ema)
        try:
            yield
        finally:
            self._fill_parameters(None)

    @torch.no_grad()
    def _fill_parameters(self, sources: list[torch.Tensor] | None) -> None:
        """Write `sources` (None: the masters) into the low-precision parameters of every rank.

        Each element has one owner, so summing pieces over zeros is exact.
        """
        owned: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for i, piece in enumerate(self.pieces()):
            data = piece.master if sources is None else sources[i]
            owned.setdefault(id(piece.parameter), []).append((piece.start, data))
        for bucket in _buckets([p for p in self._module.parameters() if p.requires_grad]):
            for parameter in bucket:
                parameter.data.zero_()
                flat = parameter.data.view(-1)
                for start, data in owned.get(id(parameter), ()):
                    flat[start : start + data.numel()].copy_(data)
            joined = torch.cat([parameter.data.view(-1) for parameter in bucket])
            torch.distributed.all_reduce(joined, group=self._group)
            for parameter, values in zip(bucket, joined.split([p.numel() for p in bucket]), strict=True):
                parameter.data.copy_(values.view_as(parameter))


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
