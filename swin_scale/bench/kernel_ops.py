"""The smaller ops of `bench kernels`: residual norms, patch merging, MoE token moves; against eager and compiled torch.

Eager means the few torch calls that define the op, in the dtype of the activations throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_scale import kernels
from swin_scale.bench.measure import MODES, Candidate, failure, measure, peer_errors

FACTOR = 2.0
"""Our error may be this many times eager torch's."""

KEEP = 0.8
"""Of samples, by drop-path."""

SETS, CACHES = 3, 3
EXPERTS = 8

Function = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Op:
    """An op on `leaves` (which take gradients) and `constants`, and the bytes it must move."""

    title: str
    what: str
    ours: Function
    eager: Function
    leaves: Callable[[int], tuple[Tensor, ...]]
    """Of the set of inputs of that number."""
    constants: tuple[Tensor, ...] = ()
    forward_bytes: int
    backward_bytes: int


def bench_ops(
    name: str,
    dtype: torch.dtype,
    batch: int,
    device: torch.device,
    launches: Sequence[str],
    rounds: int,
    rates: dict[str, Any],
    *,
    compiled: bool = True,
) -> list[dict[str, Any]]:
    """Gate and timings of all ops in `dtype`, called `name`, in the sizes of SwinV2-B and Swin-MoE-S stages."""
    return [_case(op, name, device, launches, rounds, rates, compiled) for op in ops(dtype, batch, device)]


def ops(dtype: torch.dtype, batch: int, device: torch.device) -> list[Op]:
    """The ops at stage 1 of SwinV2-B at 192 pixels (48 x 48 tokens, 128 channels), and at Swin-MoE-S's stage 3."""
    return [_residual_norm(dtype, batch, device), _add_norm(dtype, batch, device), _merge(dtype, batch, device, True),
            _merge(dtype, batch, device, False), *_moves(dtype, batch, device)]  # fmt: skip


SIDE, DIM = 48, 128


def _map(dtype: torch.dtype, batch: int, device: torch.device, maps: int) -> Callable[[int], tuple[Tensor, ...]]:
    """`maps` feature maps, and the weight and bias of a norm."""

    def leaves(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        made = [
            torch.randn((batch, SIDE, SIDE, DIM), generator=generator, device=device, dtype=dtype) for _ in range(maps)
        ]
        return *made, *_affine(DIM, generator, device, dtype)

    return leaves


def _affine(dim: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, bias = (torch.randn((dim,), generator=generator, device=device, dtype=dtype) for _ in range(2))
    return weight.mul_(0.2).add_(1), bias.mul_(0.1)


def _keep(batch: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return (torch.rand((batch,), generator=generator, device=device) < KEEP).float() / KEEP


def _times(keep: Tensor, branch: Tensor) -> Tensor:
    return keep.to(branch.dtype).view(-1, 1, 1, 1) * branch


def _residual_norm(dtype: torch.dtype, batch: int, device: torch.device) -> Op:
    one = batch * SIDE * SIDE * DIM * dtype.itemsize

    def ours(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
        return kernels.residual_norm(x, branch, weight, bias, keep)

    def eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
        return x + _times(keep, F.layer_norm(branch, weight.shape, weight, bias))

    return Op(
        title="residual norm",
        what="x + keep * LN(branch)",
        ours=ours,
        eager=eager,
        leaves=_map(dtype, batch, device, 2),
        constants=(_keep(batch, device),),
        # x, branch, y; then dy, branch and the gradient of branch, as that of x is dy.
        forward_bytes=3 * one,
        backward_bytes=3 * one,
    )


def _add_norm(dtype: torch.dtype, batch: int, device: torch.device) -> Op:
    one = batch * SIDE * SIDE * DIM * dtype.itemsize

    def ours(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.add_norm(x, branch, weight, bias, keep)

    def eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        total = x + _times(keep, branch)
        return total, F.layer_norm(total, weight.shape, weight, bias)

    return Op(
        title="add norm",
        what="total = x + keep * branch, and LN(total)",
        ours=ours,
        eager=eager,
        leaves=_map(dtype, batch, device, 2),
        constants=(_keep(batch, device),),
        # x, branch, both results; then both their gradients, total, and the gradients of x and branch.
        forward_bytes=4 * one,
        backward_bytes=5 * one,
    )


def _merge(dtype: torch.dtype, batch: int, device: torch.device, normed: bool) -> Op:
    one = batch * SIDE * SIDE * DIM * dtype.itemsize

    def leaves(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn((batch, SIDE, SIDE, DIM), generator=generator, device=device, dtype=dtype)
        return (x, *_affine(4 * DIM, generator, device, dtype)) if normed else (x,)

    def ours(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return kernels.patch_merge(x, weight, bias)

    def eager(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        y = torch.cat(parts, -1)
        return y if weight is None else F.layer_norm(y, weight.shape, weight, bias)

    return Op(
        title="patch merging and norm" if normed else "patch merging",
        what="2 x 2 neighbours into one row" + ", and LN of it" * normed,
        ours=ours,
        eager=eager,
        leaves=leaves,
        forward_bytes=2 * one,
        backward_bytes=(3 if normed else 2) * one,
    )


def _moves(dtype: torch.dtype, batch: int, device: torch.device) -> list[Op]:
    tokens, dim, top_k = 144 * batch, 384, 2
    generator = torch.Generator().manual_seed(0)
    expert_TK = torch.rand((tokens, EXPERTS), generator=generator).topk(top_k).indices
    order_R = expert_TK.flatten().argsort(stable=True)
    slot_TK = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R))).view(tokens, top_k)
    choice_R, slot_TK = order_R.to(device), slot_TK.to(device)
    row = dim * dtype.itemsize
    rows = top_k * tokens

    def x_TD(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        return (torch.randn((tokens, dim), generator=generator, device=device, dtype=dtype),)

    def y_RD(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        y = torch.randn((rows, dim), generator=generator, device=device, dtype=dtype)
        # The gate computes in fp32, whatever the activations are.
        return y, torch.rand((tokens, top_k), generator=generator, device=device, dtype=_wide(dtype)).softmax(-1)

    def permute(x: Tensor, choice: Tensor, slot: Tensor) -> Tensor:
        return kernels.permute(x, choice, slot)

    def permute_eager(x: Tensor, choice: Tensor, slot: Tensor) -> Tensor:
        return x.index_select(0, choice // slot.shape[1])

    def unpermute(y: Tensor, gate: Tensor, choice: Tensor, slot: Tensor) -> Tensor:
        return kernels.unpermute(y, gate, choice, slot)

    def unpermute_eager(y: Tensor, gate: Tensor, choice: Tensor, slot: Tensor) -> Tensor:
        taken = y.index_select(0, slot.flatten()).view(*slot.shape, -1)
        return (taken.to(gate.dtype) * gate.unsqueeze(-1)).sum(1)

    what = f"{tokens} tokens of {dim} channels, top-{top_k} of {EXPERTS}"
    wide = dim * _wide(dtype).itemsize
    return [
        Op(
            title="permute",
            what=f"{what}, to their experts",
            ours=permute,
            eager=permute_eager,
            leaves=x_TD,
            constants=(choice_R, slot_TK),
            forward_bytes=(tokens + rows) * row,
            backward_bytes=(tokens + rows) * row,
        ),
        Op(
            title="unpermute",
            what=f"{what}, back and weighted by their gates",
            ours=unpermute,
            eager=unpermute_eager,
            leaves=y_RD,
            constants=(choice_R, slot_TK),
            # Rows in, weighted sums out in the gate's dtype; then their gradient and the rows in, the rows' out.
            forward_bytes=rows * row + tokens * wide,
            backward_bytes=tokens * wide + 2 * rows * row,
        ),
    ]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _case(
    op: Op,
    name: str,
    device: torch.device,
    launches: Sequence[str],
    rounds: int,
    rates: dict[str, Any],
    compiled: bool,
) -> dict[str, Any]:
    torch.compiler.reset()
    cache = rates["l2_bytes"]
    sets = max(SETS, -(-CACHES * cache // op.forward_bytes)) if cache else 1
    inputs = [tuple(leaf.requires_grad_() for leaf in op.leaves(seed)) for seed in range(sets)]
    functions: dict[str, Function] = {"ours": op.ours, "eager": op.eager}
    if compiled:
        functions["compile"] = torch.compile(op.eager, fullgraph=True, dynamic=False)
    upstream = [tuple(torch.randn_like(y) for y in _tuple(op.eager(*leaves, *op.constants))) for leaves in inputs]
    errors = _gate(op, functions, inputs[0], upstream[0])
    case: dict[str, Any] = {
        "title": op.title,
        "what": op.what,
        "dtype": name,
        "sets": sets,
        "gate": errors,
        "missing": {name: found["failed"] for name, found in errors.items() if "failed" in found},
        "floors": {
            "forward": {"bytes": op.forward_bytes},
            "forward+backward": {"bytes": op.forward_bytes + op.backward_bytes},
        },
    }
    if "failed" in errors["ours"]:
        return case | {"failed": errors["ours"]["failed"]}
    for key, found in errors["ours"].items():
        if not found <= FACTOR * errors["eager"][key]:
            most = FACTOR * errors["eager"][key]
            return case | {"failed": f"{key} is off by {found:.3g}, allowed is {most:.3g}, twice eager torch's error"}
    candidates = [
        Candidate(name=one, calls=_calls(function, inputs, op.constants, upstream))
        for one, function in functions.items()
        if one not in case["missing"]
    ]
    measured, untimed = measure(candidates, modes=MODES, launches=launches, sets=sets, rounds=rounds, device=device)
    case["missing"] |= untimed
    case["launches"] = {}
    for launch, modes in measured.items():
        case["launches"][launch] = {}
        for mode, comparison in modes.items():
            figures = comparison.as_dict()
            least = case["floors"][mode]["bytes"]
            figures["achieved"] = {
                one: {
                    "bytes_per_s": least / times["median"],
                    "of_floor": {"memory": least / rates["copy_bytes_per_s"] / times["median"]},
                }
                for one, times in figures["seconds"].items()
            }
            case["launches"][launch][mode] = figures | {"bars": {}}
    return case


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _both(
    function: Function, leaves: tuple[Tensor, ...], constants: tuple[Tensor, ...], upstream: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    outputs = _tuple(function(*leaves, *constants))
    return outputs, torch.autograd.grad(outputs, leaves, upstream)


def _calls(
    function: Function,
    inputs: Sequence[tuple[Tensor, ...]],
    constants: tuple[Tensor, ...],
    upstream: Sequence[tuple[Tensor, ...]],
) -> dict[str, Callable[[int], object]]:
    return {
        "forward": lambda i: function(*inputs[i], *constants),
        "forward+backward": lambda i: _both(function, inputs[i], constants, upstream[i]),
    }


def _gate(
    op: Op, functions: dict[str, Function], leaves: tuple[Tensor, ...], upstream: tuple[Tensor, ...]
) -> dict[str, dict[str, Any]]:
    """Relative error of the outputs and of each gradient against eager torch in fp64, for each code."""
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    constants = tuple(part.double() if part.is_floating_point() else part for part in op.constants)
    outputs, grads = _both(op.eager, exact, constants, tuple(part.double() for part in upstream))
    names = [f"output {i}" for i in range(len(outputs))] + [f"gradient {i}" for i in range(len(grads))]
    wanted = {key: part.detach() for key, part in zip(names, [*outputs, *grads], strict=True)}
    found: dict[str, dict[str, Any]] = {}
    for name, function in functions.items():
        try:
            outputs, grads = _both(function, leaves, op.constants, upstream)
        except peer_errors() as error:
            if name == "eager":
                raise
            found[name] = {"failed": failure(error)}
            continue
        got = {key: part.detach().double() for key, part in zip(names, [*outputs, *grads], strict=True)}
        found[name] = {key: float((got[key] - value).norm() / value.norm()) for key, value in wanted.items()}
    return found
