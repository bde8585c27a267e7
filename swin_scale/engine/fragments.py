"""ZeRO's shards as fragments with global coordinates, and back. The one file that uses DeepSpeed's private names.

DeepSpeed 0.19 keeps, per parameter, the piece of its fp32 master copy and moments that this rank owns. A fragment is
that piece under the parameter's own name and flat range, so whatever is saved here can be read by any number of ranks.

Private names used, with `tests/engine/test_fragments.py` as the contract test:

- everywhere: ``deepspeed.ops.__compatible_ops__``, ``deepspeed.runtime.zero.muon.original_muon``, ``loss_scaler``
  (``update_scale``, ``cur_scale``, ``raise_error_at_min_scale``)
- experts: ``groups._EXPERT_PARALLEL_GROUP``, ``_EXPERT_DATA_PARALLEL_GROUP`` and their ``_RANKS``; of a parameter
  ``allreduce`` and ``group_name``, of an optimizer's group ``moe`` and ``name``
- stages 1 and 2: ``_hp_mapping`` (``lp_fragment_address``, ``hp_fragment``, ``optim_fragment``),
  ``check_grad_overflow``, ``_hp_optimizer_states_linked``, ``_lazy_init_hp_params_optimizer_state``
- stage 3: ``zero.Init._convert_to_zero_parameters``; of a parameter ``ds_tensor``, ``ds_numel``, ``ds_shape``,
  ``ds_zero_partition_rank``; of the optimizer ``grad_position``, ``get_param_id``, ``fp32_partitioned_groups_flat``,
  ``sub_group_to_group_id``, ``parameter_offload.partition_all_parameters``
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swin_scale.engine.experts import ExpertParallel, Held
from swin_scale.engine.pieces import LOSS_SCALER_STATE, Fragments, Piece, ReplicatedFragments
from swin_scale.errors import UserError

SUPPORTED = ((0, 19, 8), (0, 20))


def import_deepspeed(on_gpu: bool) -> Any:
    """DeepSpeed, checked for its version and kept from compiling CPU kernels at start; raises UserError."""
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
    if not on_gpu:
        # Its shared-memory collectives serve CPU inference only, and cost a C++ build at the first start. On a GPU they
        # are not asked for, and naming this table would probe all operators, compilers included.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon_uncompiled()
    return deepspeed


@contextmanager
def local_rank_set(local_rank: int) -> Iterator[None]:
    """The variable LOCAL_RANK, from which DeepSpeed takes its device, is `local_rank`; afterwards what it was before.

    Left behind, it would be half of torchrun's variables to whoever reads the environment next.
    """
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(local_rank)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("LOCAL_RANK", None)
        else:
            os.environ["LOCAL_RANK"] = before


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


class LossScale:
    """DeepSpeed's dynamic loss scale, which here grows after an update and ends no run.

    DeepSpeed doubles the scale between the backward pass and the division of its gradients by the scale: at each growth
    an update would be made with half the gradient, and ZeRO-3 would report half the norm. And an overflow at the
    smallest scale raises a bare Exception there, where `train.max_skips` is to decide.
    """

    def __init__(self, optimizer: Any) -> None:
        """`optimizer`: DeepSpeed's, of any precision; one that scales no loss is left alone."""
        self._scaler: Any = getattr(optimizer, "loss_scaler", None)
        self._grown: float | None = None
        self._before: dict[str, Any] = {}
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False
            self._update = self._scaler.update_scale
            self._scaler.update_scale = self._hold_back

    def _hold_back(self, overflow: bool) -> None:
        before = self._scaler.cur_scale
        self._before = {key: getattr(self._scaler, key) for key in LOSS_SCALER_STATE if hasattr(self._scaler, key)}
        self._update(overflow)
        if self._scaler.cur_scale > before:
            self._grown, self._scaler.cur_scale = self._scaler.cur_scale, before

    def grow(self) -> None:
        """By as much as is due; to be called after every step of DeepSpeed's."""
        if self._grown is not None:
            self._scaler.cur_scale, self._grown = self._grown, None

    def undo(self) -> None:
        """The last step never was: its overflow says nothing of the scale."""
        for key, value in self._before.items():
            setattr(self._scaler, key, value)


@contextmanager
def experts_declared(
    model: nn.Module,
    experts: ExpertParallel,
    held: Mapping[nn.Parameter, Held],
    groups: Sequence[dict[str, Any]],
) -> Iterator[None]:
    """While DeepSpeed wraps `model`, it knows which parameters are spread over ranks, and their `groups`.

    It looks for layers of its own class: one without parameters stands in `model` for that time. The gradients of these
    parameters are then summed over the ranks that hold them and divided by all ranks, as each got the tokens of many.
    """
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups as known

    class Sign(MoE):
        num_experts = 0

        def __init__(self) -> None:
            nn.Module.__init__(self)

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups exist already, with the run's time limit."""

    name = f"ep_size_{experts.size}"
    for groups_by_name, ranks_by_name, group in (
        (known._EXPERT_PARALLEL_GROUP, known._EXPERT_PARALLEL_GROUP_RANKS, experts.group),
        (known._EXPERT_DATA_PARALLEL_GROUP, known._EXPERT_DATA_PARALLEL_GROUP_RANKS, experts.data_group),
    ):
        groups_by_name[name] = group
        ranks_by_name[name] = torch.distributed.get_process_group_ranks(group)
    for parameter in held:
        parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]
    for options in groups:
        if options["params"][0] in held:
            options.update(moe=True, name=name)
    model.add_module("_sign", Sign())
    try:
        yield
    finally:
        del model._sign


class ZeroFragments(Fragments):
    """Stages 1 and 2: DeepSpeed maps each parameter to its part of this rank's flat partition."""

    def __init__(self, module: nn.Module, optimizer: Any, **options: Any) -> None:
        super().__init__(module, optimizer, **options)
        # Non-finite gradients skip the update on all ranks in every precision, not only in fp16.
        optimizer.check_grad_overflow = True

    def pieces(self) -> list[Piece]:
        found = []
        for name, parameter in self._module.named_parameters():
            mapping, held = getattr(parameter, "_hp_mapping", None), self._held.get(parameter)
            first = self._rank == 0 if held is None else held.first
            if mapping is not None:
                start, master = mapping.lp_fragment_address.start, mapping.hp_fragment
                moments = mapping.optim_fragment or {}
            elif not parameter.requires_grad and first:
                # A frozen parameter is whole on every rank that has it, and saved by the first.
                start, master, moments = 0, parameter.data.view(-1), {}
            else:
                continue
            origin = 0 if held is None else held.start
            piece = Piece(name=name, parameter=parameter, start=start, master=master, moments=moments, origin=origin)
            found.append(piece)
        return found

    def _flat(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for options in self._base.param_groups:
            for flat in options["params"]:
                yield options, flat

    def _create_moments(self, step: float | None = None) -> None:
        super()._create_moments(step)
        # DeepSpeed links state after the first group has stepped; the other groups' moments would stay unknown.
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()


class ShardedFragments(Fragments):
    """Stage 3: every parameter is cut evenly over the ranks, the last part padded.

    What is in the padding is whatever memory held, NaN as well: it is never saved, read or looked at.
    """

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        cut: Any = parameter
        return tuple(cut.ds_shape)

    def pieces(self) -> list[Piece]:
        zero, state = self._optimizer, self._base.state
        names = self._layout.moments
        found = []
        for name, parameter in self._module.named_parameters():
            start, length = _extent(parameter)
            if not length:
                continue
            if parameter.requires_grad:
                i, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
                flat = zero.fp32_partitioned_groups_flat[i]
                entry = state.get(flat, {})
                master = flat.detach().narrow(0, offset, length)
                moments = {kind: entry[kind].narrow(0, offset, length) for kind in names if kind in entry}
            else:
                master, moments = _part(parameter), {}
            found.append(Piece(name=name, parameter=parameter, start=start, master=master, moments=moments))
        return found

    def replicas(self) -> list[tuple[str, Tensor, Held | None]]:
        # Parameters below its threshold stay whole on every rank, but each update gathers them anew from their parts.
        return []

    def _values(self) -> list[tuple[str, Tensor]]:
        # What is gathered for now counts by both.
        parts = [(name, _part(parameter)) for name, parameter in self._module.named_parameters()]
        return super()._values() + parts

    def _flat(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        zero = self._optimizer
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            yield self._base.param_groups[zero.sub_group_to_group_id[i]], flat

    @torch.no_grad()
    def _fill(self, sources: Sequence[Tensor]) -> None:
        """Write `sources` into the parts that parameters are gathered from; gathered ones are let go before."""
        self._optimizer.parameter_offload.partition_all_parameters()
        for piece, source in zip(self.pieces(), sources, strict=True):
            cut: Any = piece.parameter
            cut.ds_tensor.data[: source.numel()].copy_(source)


def _extent(parameter: Any) -> tuple[int, int]:
    """(first element, number of elements) of a parameter that this rank keeps under ZeRO-3, without padding."""
    start = parameter.ds_tensor.ds_numel * parameter.ds_zero_partition_rank
    return start, max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))


def _part(parameter: Any) -> Tensor:
    """1-d view of these elements."""
    part: Tensor = parameter.ds_tensor.data.narrow(0, 0, _extent(parameter)[1])
    return part


FRAGMENTS: Mapping[int, type[Fragments]] = {
    0: ReplicatedFragments,
    1: ZeroFragments,
    2: ZeroFragments,
    3: ShardedFragments,
}


@torch.no_grad()
def materialize(
    deepspeed: Any,
    model: nn.Module,
    values: Iterator[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
) -> None:
    """Give a model on the meta device its parameters for ZeRO-3, each cut over the ranks before the next is made.

    Args:
        model: on the meta device; its parameters stay the same objects. Buffers are left alone.
        values: (name, value) in the order of `named_parameters`; read on rank 0 alone and sent to the others.
        dtype: of the parameters, which DeepSpeed derives its fp32 masters from.
    """
    deepspeed.init_distributed(dist_init_required=False)
    cutter = deepspeed.zero.Init(dtype=dtype, mem_efficient_linear=False)
    parameters = list(model.named_parameters())
    # One buffer for all: whole parameters, allocated and freed between parts that stay, would leave the heap in holes.
    buffer = torch.empty(max(parameter.numel() for _, parameter in parameters), dtype=dtype, device=device)
    for name, parameter in parameters:
        full = buffer[: parameter.numel()].view(parameter.shape)
        if rank == 0:
            given, value = next(values)
            assert given == name, f"the value of {given} came for {name}"
            full.copy_(value)
        torch.utils.swap_tensors(parameter, nn.Parameter(full, requires_grad=parameter.requires_grad))
        cutter._convert_to_zero_parameters([parameter])


def release(engine: Any, optimizer: Any) -> None:
    """Free what DeepSpeed's engine and its optimizer hold: they and the parameters refer to each other through nodes of
    the autograd graph, where Python's collector does not see it."""
    parameters = list(engine.module.parameters())
    engine.destroy()
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(0)
        vars(parameter).clear()
    vars(optimizer).clear()
    vars(engine).clear()
