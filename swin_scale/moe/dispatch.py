"""Rows to their experts and back, by index: on one process a gather each way, over a group two all-to-alls more.

Shapes as in `router`; S = rows of this rank's own experts. Backward is by gather too, never by index_add, so results
and gradients are deterministic and no (tokens, experts, capacity) tensor exists at any time. `kernels` says what moves
the rows on this rank: Triton or torch.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from swin_scale.kernels import Mode, permute, unpermute
from swin_scale.moe.comm import Flight, Waits, exchange_counts
from swin_scale.moe.router import Routing

ExpertFn = Callable[[Tensor, Tensor], Tensor]
"""Rows (S, D) sorted by expert and the rows of each local expert, (E_local,) int64, to rows (S, D)."""


def forward_experts(
    x_TD: Tensor,
    routing: Routing,
    experts: ExpertFn,
    group: ProcessGroup | None,
    chunks: int,
    waits: Waits | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    kernels: Mode = "auto",
) -> Tensor:
    """Each token's gate-weighted sum of its experts' outputs, (T, D) in x's dtype; 0 for a token dropped everywhere.

    Over a `group` of P ranks, rank p owns the p-th of P equal runs of experts, and tokens travel in `chunks` pieces;
    `waits` takes the time spent waiting for them. `norm` is applied to the rows that come back, before they are
    weighted.
    """
    if group is None:
        y_RD = experts(gather(x_TD, routing, kernels), routing.count_E)
    else:
        routing, count_CE = in_chunks(routing, chunks)
        y_RD = exchange(gather(x_TD, routing, kernels), count_CE, experts, group, waits or Waits(), kernels)
    return combine(y_RD if norm is None else norm(y_RD), routing, kernels).to(x_TD.dtype)


def gather(x_TD: Tensor, routing: Routing, kernels: Mode = "auto") -> Tensor:
    """The rows (R, D) that `routing` sends to experts."""
    return permute(x_TD, routing.choice_R, routing.slot_TK, kernels=kernels)


def combine(y_RD: Tensor, routing: Routing, kernels: Mode = "auto") -> Tensor:
    """sum over k of gate_TK[:, k] times the row that serves the choice: (T, D), summed in the gate's dtype."""
    return unpermute(y_RD, routing.gate_TK, routing.choice_R, routing.slot_TK, kernels=kernels)


def in_chunks(routing: Routing, chunks: int) -> tuple[Routing, Tensor]:
    """The rows of every expert cut into `chunks` nearly equal runs, rows ordered by chunk first and expert second.

    Returns that routing and its rows per chunk and expert, (chunks, E) int64.
    """
    count_E = routing.count_E
    device = count_E.device
    bounds = torch.arange(chunks + 1, device=device)[:, None] * count_E // chunks
    count_CE = bounds[1:] - bounds[:-1]
    if chunks == 1:
        return routing, count_CE
    # Rows now lie expert by expert and, within, chunk by chunk: name each row's chunk, then sort by it.
    chunk_R = (
        torch.arange(chunks, device=device)
        .repeat(len(count_E))
        .repeat_interleave(count_CE.t().flatten(), output_size=len(routing.choice_R))
    )
    order_R = chunk_R.argsort(stable=True)
    moved_TK = (
        torch.where(routing.slot_TK < 0, -1, invert(order_R)[routing.slot_TK]) if len(order_R) else routing.slot_TK
    )
    return replace(routing, choice_R=routing.choice_R[order_R], slot_TK=moved_TK), count_CE


def exchange(
    x_RD: Tensor, count_CE: Tensor, experts: ExpertFn, group: ProcessGroup, waits: Waits, kernels: Mode = "auto"
) -> Tensor:
    """What the experts of all ranks make of `x_RD`, whose rows are ordered by chunk, then expert.

    While experts compute on one chunk, the next comes in and the last goes back. Reads the counts back to the host.

    With C chunks, E experts of the layer, R rows sent (token choices kept) and S rows of this rank's own experts, a
    rank issues 1 + 4 C all-to-alls in a pass and hands them 8 C E + 2 (R + S) D itemsize bytes: counts as int64 once,
    rows there and back, and their gradients back and there. What it sends itself is in it: of evenly spread rows, the
    P-th part. Backward repeats the rows only; recomputation under activation checkpointing repeats the forward half.
    """
    P, C = group.size(), len(count_CE)
    send_PCE = count_CE.view(C, P, -1).transpose(0, 1).contiguous()
    with waits.timed(x_RD.device):
        receive_PCE = exchange_counts(send_PCE, group)
    send_CP, receive_CP = send_PCE.sum(2).t().tolist(), receive_PCE.sum(2).t().tolist()
    there = [Flight(send, receive, group, waits) for send, receive in zip(send_CP, receive_CP)]
    back = [Flight(receive, send, group, waits) for send, receive in zip(send_CP, receive_CP)]
    tokens = [flight.start(x) for flight, x in zip(there, x_RD.split([sum(rows) for rows in send_CP]))]
    for c in range(C):
        x_SD = there[c].finish(tokens[c])
        tokens[c] = back[c].start(_by_expert(x_SD, receive_PCE[:, c], experts, kernels))
    return torch.cat([flight.finish(token) for flight, token in zip(back, tokens)])


def invert(order: Tensor) -> Tensor:
    """The inverse of a permutation (n,)."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def _by_expert(x_SD: Tensor, count_PE: Tensor, experts: ExpertFn, kernels: Mode) -> Tensor:
    """Run `experts` on rows ordered by source rank, then local expert."""
    count_E = count_PE.sum(0)
    if len(count_E) == 1:
        return experts(x_SD, count_E)
    expert_S = (
        torch.arange(len(count_E), device=x_SD.device)
        .repeat(len(count_PE))
        .repeat_interleave(count_PE.flatten(), output_size=len(x_SD))
    )
    order_S = expert_S.argsort(stable=True)
    inverse_S = invert(order_S)
    y_SD = experts(permute(x_SD, order_S, inverse_S[:, None], kernels=kernels), count_E)
    return permute(y_SD, inverse_S, order_S[:, None], kernels=kernels)
