"""Window attention in other people's ways, over the region that `region` describes, written here from the formulae.

Each is a function of (x, qkv, scale, bias) in its own order and dtypes; FWA-2 and the official code, which are not, are
run from the user's checkouts.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from swin_scale.bench.peers import PeerMissing, official_code
from swin_scale.bench.region import QUANTITIES, Inputs, Shape
from swin_scale.kernels import chunked
from swin_scale.kernels.choice import why_not_triton
from swin_scale.kernels.reference import shift_mask, shift_regions, window_partition, window_reverse

Run = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""(x, qkv, scale, bias) to the tensors that take an upstream gradient, the output image last."""

Scope = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Region:
    """A code in the comparison, and the form in which it takes its inputs."""

    name: str
    run: Run
    windows: bool = True
    """Whether it takes x and qkv in windows; ours takes qkv alone, in image layout."""
    stream: torch.dtype | None = None
    """Of x, if it is not that of qkv: under AMP the residual stream is fp32."""
    small: torch.dtype | None = None
    """Of scale and bias, if they are not fp32."""
    scope: Scope = contextlib.nullcontext

    def leaves(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """x (where it takes part), qkv, scale and bias as this code takes them, sharing memory where they can."""
        qkv = inputs.qkv_windows if self.windows else inputs.qkv
        small = [part.to(self.small or part.dtype) for part in (inputs.scale, inputs.bias)]
        x = (inputs.x.to(self.stream or inputs.x.dtype),) if self.windows else ()
        return tuple(part.detach().requires_grad_() for part in (*x, qkv, *small))

    def upstream(self, leaves: tuple[Tensor, ...], image: Tensor) -> tuple[Tensor, ...]:
        """Gradients of what `outputs` returns: of the output image, and of the windows of x some values or other."""
        if not self.windows:
            return (image,)
        x, qkv = leaves[:2]
        return x.detach().view(*qkv.shape[:2], x.shape[-1]), image

    def outputs(self, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with self.scope():
            # Ours has no use for x.
            return self.run(*leaves) if self.windows else self.run(leaves[0], *leaves)

    def gradients(self, leaves: tuple[Tensor, ...], image: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Outputs, and the gradients of all leaves."""
        outputs = self.outputs(leaves)
        return outputs, torch.autograd.grad(outputs, leaves, self.upstream(leaves, image))

    def quantities(self, shape: Shape, inputs: Inputs, image: Tensor, images: Sequence[int]) -> dict[str, Tensor]:
        """`region.QUANTITIES` under the upstream gradient `image`, in fp64, output and q, k, v of some `images`."""
        outputs, grads = self.gradients(self.leaves(inputs), image)
        d_qkv, d_scale, d_bias = grads[-3:]
        if self.windows:
            d_qkv = window_reverse(d_qkv, shape.window, shape.shift, shape.hw)
        at = torch.tensor(images, device=image.device)
        y, d_qkv = outputs[-1].detach().index_select(0, at), d_qkv.index_select(0, at)
        found = (y, *d_qkv.chunk(3, -1), d_scale, d_bias)
        return {name: part.double() for name, part in zip(QUANTITIES, found, strict=True)}


def build(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    only: Sequence[str],
    official: str | None = None,
    fwa: str | None = None,
) -> tuple[list[Region], dict[str, str]]:
    """`ours` first, fused where Triton serves; then those of `only` that can take part here; why the others cannot."""
    half = dtype is not torch.float32
    plain = partial(eager, shape, mask_of(shape, dtype, device))
    masked = partial(sdpa, shape, mask_of(shape, dtype, device))
    autocast = partial(torch.autocast, device.type, dtype)
    builders: dict[str, Callable[[], Region]] = {
        "ours-atomic": lambda: fused("ours-atomic", shape, dtype, device, False),
        "ours-chunked": lambda: _chunked("ours-chunked", shape),
        "official-amp": lambda: Region(
            name="official-amp",
            run=partial(eager, shape, mask_of(shape, torch.float32, device)),
            stream=torch.float32,
            small=None,
            scope=autocast,
        ),
        "official": lambda: Region(name="official", run=plain, small=dtype),
        "official-code": lambda: official_region(shape, dtype, device, official),
        "sdpa": lambda: Region(name="sdpa", run=masked, small=dtype, scope=_pinned(device)),
        "sdpa-compile": lambda: Region(name="sdpa-compile", run=_compiled(masked), small=dtype, scope=_pinned(device)),
        "compile": lambda: Region(name="compile", run=_compiled(plain), small=dtype),
        "autotuned": lambda: Region(
            name="autotuned", run=_compiled(plain, mode="max-autotune-no-cudagraphs"), small=dtype
        ),
        "flex": lambda: flex(shape, dtype, device),
        "fwa-2": lambda: fwa_2(shape, dtype, device, fwa),
    }
    missing: dict[str, str] = {}
    try:
        found = [fused("ours", shape, dtype, device)]
    except PeerMissing as reason:
        missing["ours-fused"] = str(reason)
        found = [_chunked("ours", shape)]
    for name in only:
        try:
            if name.startswith("ours-") and missing:
                raise PeerMissing("ours is not fused here")
            if name == "official-amp" and not half:
                raise PeerMissing("AMP is for half precision")
            found.append(builders[name]())
        except PeerMissing as reason:
            missing[name] = str(reason)
    return found, missing


def mask_of(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """(nW, N, N), kept as a buffer by all codes that add it."""
    if not shape.shifted:
        return None
    return shift_mask(shift_regions(shape.hw, shape.window, shape.shift, device), dtype)


# -- ours --------------------------------------------------------------------------------------------------------------


def fused(name: str, shape: Shape, dtype: torch.dtype, device: torch.device, deterministic: bool = True) -> Region:
    """Ours by Triton kernels. Raises PeerMissing where none serves."""
    reason = why_not_triton(device, dtype, head_dim=shape.head_dim, tokens=shape.tokens)
    if reason is not None:
        raise PeerMissing(reason)
    attention = importlib.import_module("swin_scale.kernels.attention").fused_window_attention

    def run(_: Tensor, qkv: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y = attention(
            qkv, scale, bias, shape.window, shape.shift, True, dropout=0.0, seed=None, deterministic=deterministic
        )
        return (y,)

    return Region(name=name, run=run, windows=False)


def _chunked(name: str, shape: Shape) -> Region:
    def run(_: Tensor, qkv: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (chunked.window_attention(qkv, scale, bias, shape.window, shape.shift, True),)

    return Region(name=name, run=run, windows=False)


# -- eager and compiled ------------------------------------------------------------------------------------------------


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B_, N, 3C) to q, k, v of (B_, heads, N, d), taken one by one as the official model does."""
    windows, tokens, channels = qkv.shape
    parts = qkv.reshape(windows, tokens, 3, heads, channels // 3 // heads).permute(2, 0, 3, 1, 4)
    return parts[0], parts[1], parts[2]


def _image(shape: Shape, y: Tensor) -> Tensor:
    """(B_, heads, N, d) to (B, H, W, C)."""
    y = y.transpose(1, 2).reshape(-1, shape.tokens, shape.dim)
    return window_reverse(y, shape.window, shape.shift, shape.hw)


def eager(
    shape: Shape, mask: Tensor | None, x: Tensor, qkv: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The chain of operations that the official SwinV2 runs (section 3.2 of its paper; dropout off)."""
    windows = window_partition(x, shape.window, shape.shift)
    q, k, v = _heads(qkv, shape.heads)
    logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    logits = logits * scale + bias.unsqueeze(0)
    if mask is not None:
        by_image = logits.view(-1, len(mask), *logits.shape[1:]) + mask.unsqueeze(1).unsqueeze(0)
        logits = by_image.view(-1, *logits.shape[1:])
    return windows, _image(shape, logits.softmax(-1) @ v)


def _compiled(run: Callable[..., tuple[Tensor, ...]], mode: str | None = None) -> Run:
    # A partial is no function of its own; the compiler wants one.
    def whole(x: Tensor, qkv: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return run(x, qkv, scale, bias)

    return torch.compile(whole, fullgraph=True, dynamic=False, mode=mode)


# -- torch's fused attentions ------------------------------------------------------------------------------------------


def sdpa(
    shape: Shape, mask: Tensor | None, x: Tensor, qkv: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """`F.scaled_dot_product_attention` with bias and shift mask as its additive mask, in the dtype of q.

    The scale is folded into q. With a shift, the images are the batch and (window, head) are the heads, so that the
    mask is broadcast over images with stride 0 and not written out for each.
    """
    windows = window_partition(x, shape.window, shape.shift)
    q, k, v = _heads(qkv, shape.heads)
    q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
    if mask is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0), scale=1.0)
    else:
        added = (bias + mask.unsqueeze(1)).view(1, -1, shape.tokens, shape.tokens)
        images = len(q) // len(mask)
        parts = [part.reshape(images, -1, *part.shape[2:]) for part in (q, k, v)]
        added = added.expand(images, -1, -1, -1)
        y = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=added, scale=1.0)
    return windows, _image(shape, y.reshape(q.shape))


def _pinned(device: torch.device) -> Scope:
    """On a GPU the memory-efficient backend: cuDNN's has misread additive masks, and flash attention takes none."""
    if device.type != "cuda":
        return contextlib.nullcontext
    return partial(sdpa_kernel, [SDPBackend.EFFICIENT_ATTENTION])


def flex(shape: Shape, dtype: torch.dtype, device: torch.device) -> Region:
    """FlexAttention, compiled."""
    if device.type != "cuda":
        raise PeerMissing("FlexAttention has no backward pass on a CPU")
    return Region(name="flex", run=_compiled(flexible(shape, device)), small=dtype)


def flexible(shape: Shape, device: torch.device) -> Run:
    """FlexAttention: bias and regions are captured by its score function, the scale is folded into q."""
    from torch.nn.attention.flex_attention import flex_attention

    regions = shift_regions(shape.hw, shape.window, shape.shift, device) if shape.shifted else None

    def run(x: Tensor, qkv: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        windows = window_partition(x, shape.window, shape.shift)
        q, k, v = _heads(qkv, shape.heads)
        q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            s = s + bias[h, i, j]
            if regions is None:
                return s
            window = b % regions.shape[0]
            return torch.where(regions[window, i] == regions[window, j], s, s - 100.0)

        y = flex_attention(q.contiguous(), k.contiguous(), v.contiguous(), score_mod=score, scale=1.0)
        return windows, _image(shape, y)

    return run


# -- code of others ----------------------------------------------------------------------------------------------------


def fwa_2(shape: Shape, dtype: torch.dtype, device: torch.device, checkout: str | None) -> Region:
    """Flash Window Attention V2, a Triton kernel for SwinV2's attention on partitioned windows."""
    if checkout is None:
        raise PeerMissing("no checkout given; pass --fwa DIR, a clone of emiledgl/flash-window-attention-v2")
    if device.type != "cuda":
        raise PeerMissing("FWA-2 runs on CUDA devices only")
    attention = _load("flash_win_attn_v2", checkout, "flash_window_attention_v2").FlashWindowAttentionV2.apply
    mask = mask_of(shape, dtype, device)

    def run(x: Tensor, qkv: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        windows = window_partition(x, shape.window, shape.shift)
        q, k, v = _heads(qkv, shape.heads)
        # It takes the logarithm, and exponentiates it within.
        return windows, _image(shape, attention(q, k, v, scale.log(), bias, mask))

    return Region(name="fwa-2", run=run, small=dtype)


def _load(package: str, checkout: str, module: str) -> ModuleType:
    """A module of a package that lies in a checkout, imported under the package's own name."""
    path = Path(checkout) / package / "__init__.py"
    if not path.is_file():
        raise PeerMissing(f"there is no {package}/__init__.py in the checkout given")
    try:
        if package not in sys.modules:
            spec = importlib.util.spec_from_file_location(package, path, submodule_search_locations=[str(path.parent)])
            assert spec is not None and spec.loader is not None
            sys.modules[package] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[package])
        return importlib.import_module(f"{package}.{module}")
    except (ImportError, AttributeError) as error:
        sys.modules.pop(package, None)
        raise PeerMissing(f"{package} cannot be imported ({type(error).__name__}: {error})") from error


def official_region(shape: Shape, dtype: torch.dtype, device: torch.device, checkout: str | None) -> Region:
    """The official `WindowAttention` itself, in half precision throughout (or fp32), less its two products.

    For the qkv product it is handed the product's result, proj is the identity, and the position-bias MLP gives back
    the values whose sigmoid is the bias wanted; sigmoid and gather are the model's own and are timed with it.
    """
    code = official_code(checkout)
    module = code.WindowAttention(shape.dim, shape.window, shape.heads)
    module.to(device, dtype)
    given: dict[str, Tensor] = {}
    module.proj = torch.nn.Identity()
    module.cpb_mlp = _Give(given)
    del module.logit_scale, module.relative_position_index
    module.relative_position_index = torch.arange(shape.tokens**2, device=device).view(shape.tokens, shape.tokens)
    mask = mask_of(shape, dtype, device)
    wh, ww = shape.window

    def run(x: Tensor, qkv: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if shape.shifted:
            x = torch.roll(x, shifts=(-shape.shift[0], -shape.shift[1]), dims=(1, 2))
        windows = code.window_partition(x, wh).view(-1, shape.tokens, shape.dim)
        given["bias"] = torch.logit(bias / 16).permute(1, 2, 0)
        module.logit_scale = scale.log()
        vars(code)["F"] = SimpleNamespace(linear=lambda input, weight, bias: qkv, normalize=F.normalize)
        try:
            y = module(windows, mask=mask)
        finally:
            vars(code)["F"] = F
        image = code.window_reverse(y.view(-1, wh, ww, shape.dim), wh, *shape.hw)
        return windows, torch.roll(image, shifts=shape.shift, dims=(1, 2)) if shape.shifted else image

    return Region(name="official-code", run=run, small=dtype)


class _Give(torch.nn.Module):
    """In place of the position-bias MLP."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        super().__init__()
        self.given = given

    def forward(self, _: Tensor) -> Tensor:
        return self.given["bias"]
