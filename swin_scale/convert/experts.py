"""Expert tensors: Tutel's names, the shapes it has given them, and how they lie on ranks.

The shapes here are those of the whole layer: E experts, C channels, H hidden. A rank holds a run of experts or, where
there are more ranks than experts, a slice of the hidden units of one; both are consecutive elements of each expert.

| name | whole | of one rank, n experts | of one of s ranks that share an expert |
|---|---|---|---|
| batched_fc1_w, batched_fc2_w | (E, H, C) | (n, H, C) | (1, H / s, C) |
| batched_fc1_bias | (E, H) | (n, H) | (1, H / s) |
| batched_fc2_bias | (E, C) | (n, C) | (1, ceil(C / s)), padded at its end |

Until August 2022 the biases had a 1 in the middle: (n, 1, H). Tutel's `scatter` tool leaves the 1 of a shared expert
out and cuts another axis; the elements are the same ones, in the same order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_scale.convert.weights import Change, Step, Weights, plain_name
from swin_scale.errors import CheckpointError
from swin_scale.moe.experts import Experts
from swin_scale.moe.layer import MoEMlp
from swin_scale.moe.tutel import TutelMoEMlp

_EXPERT = re.compile(r"(.*\bmlp\._moe_layer\.)experts\.(batched_fc[12]_(?:w|bias))")
COUNT = "._moe_layer._num_global_experts"
COUNT_REASON = "the number of experts, which the gate tells too"


@dataclass(frozen=True)
class Placing:
    """How `experts` experts lie on `ranks` ranks: `local` whole ones on each, or one shared by `sharing` ranks."""

    experts: int
    ranks: int

    @property
    def local(self) -> int:
        return max(1, self.experts // self.ranks)

    @property
    def sharing(self) -> int:
        return max(1, self.ranks // self.experts)

    @property
    def fits(self) -> bool:
        """Whether Tutel can do it: one number divides the other."""
        return self.ranks % self.experts == 0 or self.experts % self.ranks == 0

    def ranks_of(self, start: int, stop: int) -> tuple[int, int]:
        """The ranks [first, last) that hold experts [start, stop)."""
        return start // self.local * self.sharing, -(-stop // self.local) * self.sharing


def match(key: str) -> tuple[str, str] | None:
    """(prefix of the layer, ending in ``_moe_layer.``; Tutel's name of the tensor) of an expert's key."""
    found = _EXPERT.fullmatch(key)
    return (found[1], found[2]) if found else None


def gate_sizes(tensors: Mapping[str, Tensor], prefix: str, where: str) -> tuple[int, int]:
    """(experts, channels) of the layer at `prefix`, by its gate; raises CheckpointError where there is none."""
    linear, cosine = (tensors.get(f"{prefix}gates.0.{name}") for name in ("wg.weight", "sim_matrix"))
    projector = tensors.get(f"{prefix}gates.0.cosine_projector.weight")
    if linear is not None and linear.dim() == 2 and linear.numel():
        return linear.shape[0], linear.shape[1]
    if cosine is not None and projector is not None and cosine.dim() == projector.dim() == 2 and cosine.numel():
        return cosine.shape[1], projector.shape[1]
    raise CheckpointError(
        f"{where} has experts but no gate at {prefix}gates.0, which tells their number; is the .master file missing?"
    )


def whole_shape(name: str, placing: Placing, channels: int, hidden: int) -> tuple[int, ...]:
    """The shape of one of Tutel's tensors over all ranks."""
    if name.endswith("_w"):
        return placing.experts, hidden, channels
    return placing.experts, hidden if name == "batched_fc1_bias" else channels


def part_shape(name: str, placing: Placing, channels: int, hidden: int) -> tuple[int, ...]:
    """The shape of one rank's part, in the present version of Tutel."""
    slices = placing.sharing
    if name.endswith("_w"):
        return placing.local, hidden // slices, channels
    return placing.local, hidden // slices if name == "batched_fc1_bias" else -(-channels // slices)


def is_part(name: str, shape: Sequence[int], wanted: Sequence[int], placing: Placing) -> bool:
    """Whether a rank's tensor of `shape` has the elements of one of `wanted`, in any of Tutel's ways to shape it."""
    if math.prod(shape) != math.prod(wanted):
        return False
    old = (*wanted[:1], 1, *wanted[1:])
    scattered = placing.sharing > 1 and len(shape) == len(wanted) - 1
    return tuple(shape) == tuple(wanted) or (not name.endswith("_w") and tuple(shape) == old) or scattered


def join(parts: Sequence[Tensor], *, shape: tuple[int, ...]) -> Tensor:
    """The parts of consecutive ranks as one tensor of whole experts; what is padded at the end of an expert is left."""
    rows = torch.cat([part.reshape(-1) for part in parts]).view(shape[0], -1)
    return rows[:, : math.prod(shape[1:])].reshape(shape)


def cut(whole: Tensor, name: str, placing: Placing) -> list[Tensor]:
    """The part of every rank, as views: the reverse of `join`."""
    if placing.sharing == 1:
        return list(whole.split(placing.local))
    if name == "batched_fc2_bias":
        width = -(-whole.shape[1] // placing.sharing)
        whole = F.pad(whole, (0, width * placing.sharing - whole.shape[1]))
    width = whole.shape[1] // placing.sharing
    return [part[None] for expert in whole for part in expert.split(width)]


def one_file_steps(weights: Weights) -> tuple[list[Step], dict[str, str]]:
    """Steps to the present shapes for a state dict with all experts in it, and the keys that are left out, with why.

    Raises CheckpointError for shapes that are not those of the layer, such as one rank's part.
    """
    steps, left_out = [], {}
    where = str(weights.source.path)
    for key, tensor in weights.tensors.items():
        found = match(key)
        if key.endswith(COUNT):
            check_count(weights, key, weights.tensors, where)
            left_out[key] = COUNT_REASON
        elif found is None:
            steps.append(Step((key,), (key,)))
        else:
            prefix, name = found
            experts, channels = gate_sizes(weights.tensors, prefix, where)
            placing = Placing(experts, 1)
            hidden = hidden_units(weights.tensors, prefix, placing, channels)
            wanted = whole_shape(name, placing, channels, hidden)
            if not is_part(name, tensor.shape, wanted, placing):
                raise CheckpointError(
                    f"{where}: {key} has shape {tuple(tensor.shape)}, the gate of the layer is for {experts} experts "
                    f"of {channels} channels; if this is one rank's part, give the directory with all ranks"
                )
            change = None if tuple(tensor.shape) == wanted else joining(wanted)
            steps.append(Step((key,), (key,), change, "" if change is None else "shape of an earlier Tutel"))
    return steps, left_out


def check_count(weights: Weights, key: str, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError unless the number at `key` is that of the gate among `tensors`."""
    total, _ = gate_sizes(tensors, key.removesuffix(COUNT) + "._moe_layer.", where)
    stated = weights.tensors[key]
    count = weights.read(key).flatten().tolist() if stated.numel() == 1 else tuple(stated.shape)
    if count != [total]:
        raise CheckpointError(f"{where}: {key} is {count}, the gate is for {total} experts; it is of another model")


def joining(shape: tuple[int, ...]) -> Change:
    """`join` as the change of a step."""
    return partial(_joined, shape=shape)


def cutting(name: str, placing: Placing) -> Change:
    """`cut` as the change of a step."""
    return partial(_cut, name=name, placing=placing)


def _cut(values: Sequence[Tensor], *, name: str, placing: Placing) -> Sequence[Tensor]:
    return cut(values[0], name, placing)


def _joined(values: Sequence[Tensor], *, shape: tuple[int, ...]) -> Sequence[Tensor]:
    return [join(values, shape=shape)]


def hidden_units(tensors: Mapping[str, Tensor], prefix: str, placing: Placing, channels: int) -> int:
    """Hidden units of one expert, by what one rank has of its first weights; 0 where it has none."""
    weight = tensors.get(f"{prefix}experts.batched_fc1_w")
    if weight is None:
        return 0
    own = weight.shape[1] if weight.dim() == 3 else weight.numel() // (placing.local * channels)
    return own * placing.sharing


def held_experts(model: nn.Module) -> dict[str, tuple[range, int]]:
    """Per expert parameter of `model`: the global ids of the experts this process holds, and how many there are."""
    held: dict[str, tuple[range, int]] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, (MoEMlp, TutelMoEMlp)):
            continue
        layer, total = module._moe_layer, module.config.num_experts
        local = len(layer.experts.batched_fc1_w)
        if isinstance(layer.experts, Experts):
            first = layer.experts.first
        else:
            group: Any = layer.group
            first = 0 if local == total else group.rank() * local
        for name, _ in layer.experts.named_parameters():
            key = f"{prefix}._moe_layer.experts.{name}".removeprefix(".")
            held[key] = range(first, first + local), total
    return held


_DENSE = {
    "fc1.weight": "batched_fc1_w",
    "fc1.bias": "batched_fc1_bias",
    "fc2.weight": "batched_fc2_w",
    "fc2.bias": "batched_fc2_bias",
}
_MLP = re.compile(r"(.*\bmlp\.)(fc[12]\.(?:weight|bias))")


def upcycling(tensors: Mapping[str, Tensor], held: Mapping[str, tuple[range, int]]) -> list[Step]:
    """Steps from the dense MLPs among `tensors` to the experts of the blocks that have them, each a copy of its MLP.

    Sparse Upcycling (Komatsuzaki et al., 2023), section 2. `held`: see `held_experts`.
    """
    held = {plain_name(name): share for name, share in held.items()}
    steps = []
    for key in tensors:
        found = _MLP.fullmatch(key)
        name = found and f"{found[1]}_moe_layer.experts.{_DENSE[found[2]]}"
        if found and name and plain_name(name) in held:
            ids, total = held[plain_name(name)]
            change = partial(_copies, count=len(ids), transposed=found[2] == "fc2.weight")
            steps.append(Step((key,), (name,), change, f"a copy of the dense MLP in each of {total} experts"))
    return steps


def _copies(values: Sequence[Tensor], *, count: int, transposed: bool) -> Sequence[Tensor]:
    (value,) = values
    value = value.t() if transposed else value
    return [value.expand(count, *value.shape)]


class Share(Weights):
    """`inner` with the experts of one process only; other experts are not read where the source can help it.

    Raises CheckpointError where the weights have another number of experts than the model.
    """

    def __init__(self, inner: Weights, held: Mapping[str, tuple[range, int]]) -> None:
        """`held`: see `held_experts`."""
        self.inner, self.source = inner, inner.source
        held = {plain_name(name): share for name, share in held.items()}
        self._ids: dict[str, range] = {}
        tensors, steps = {}, []
        for key, tensor in inner.tensors.items():
            ids, total = held.get(plain_name(key), (range(0), 0))
            if total and (not tensor.dim() or len(tensor) != total):
                raise CheckpointError(
                    f"{inner.source.path}: {key} has shape {tuple(tensor.shape)}, the model has {total} experts there; "
                    "set moe.experts to the number the weights were made with"
                )
            if len(ids) == total:
                tensors[key] = tensor
                steps.append(Step((key,), (key,)))
            else:
                self._ids[key] = ids
                tensors[key] = tensor[ids.start : ids.stop]
                what = f"experts {ids.start} to {ids.stop - 1} of {total}, this process's"
                steps.append(Step((key,), (key,), partial(_rows, ids=ids), what))
        self.tensors, self.steps = tensors, steps

    def read(self, name: str) -> Tensor:
        ids = self._ids.get(name)
        return self.inner.read(name) if ids is None else self.inner.rows(name, ids.start, ids.stop)

    def finish(self) -> None:
        self.inner.finish()


def _rows(values: Sequence[Tensor], *, ids: range) -> Sequence[Tensor]:
    return [value[ids.start : ids.stop] for value in values]
