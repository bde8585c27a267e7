"""How far an op is from exact: at most twice as far as torch is with the definition, in the same dtype."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def results(op: Callable[..., Any], inputs: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """The outputs of op(*inputs, *rest) and the gradients of `inputs`, under upstream gradients that are always so."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = op(*leaves, *rest)
    outputs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def exact(op: Callable[..., Any], inputs: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """`results` of the definition `op` in fp64, inputs and upstream gradients as rounded to their own dtype."""
    dtype = inputs[0].dtype

    def rounded(*args: Any) -> Any:
        out = op(*args)
        return tuple(map(_Upstream(dtype), out)) if isinstance(out, tuple) else _Upstream(dtype)(out)

    return results(rounded, [x.double() for x in inputs], *rest)


class _Upstream:
    """The identity, whose gradient is rounded to `dtype` on its way back."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        x = x.view_as(x)
        x.register_hook(lambda grad: grad.to(self.dtype).to(grad.dtype))
        return x


def assert_at_most_twice(
    ours: Sequence[Tensor], torchs: Sequence[Tensor], exact: Sequence[Tensor], *, addends: int = 0
) -> None:
    """Shapes and dtypes are torch's; so are errors, up to a factor of two in the mean square and in the largest.

    One rounding of the largest value is let pass: of a few values, which of two errors is larger is chance. Where
    vectors of a few values are sums of `addends` numbers around one, so are the roundings of adding them up in fp32:
    torch may hit the exact sum in the order in which its threads happen to add.
    """
    for number, (a, b, e) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), number
        if not a.numel():
            continue
        mine, theirs = (a.double() - e).abs(), (b.double() - e).abs()
        rounding = torch.finfo(a.dtype).eps / 2 * float(e.abs().max())
        if a.ndim == 1 and a.numel() < 256:
            rounding += torch.finfo(torch.float32).eps * addends**0.5
        assert float(mine.max()) <= 2 * float(theirs.max()) + rounding, number
        allowed = 2 * float(theirs.square().mean().sqrt()) + (rounding if a.numel() < 256 else 0.0)
        assert float(mine.square().mean().sqrt()) <= allowed, number
