"""What autograd really keeps: sums over distinct storages, with no memory behind them where the device is `meta`."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swin_scale.engine.losses import soft_target_cross_entropy


class Live(TorchDispatchMode):
    """Bytes of the storages that operators made and that are alive, now and at most, less those of `model` itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known = _own(model)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def _own(model: nn.Module) -> set[int]:
    return {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}


@contextmanager
def saved_storages(model: nn.Module) -> Iterator[list[int]]:
    """Inside, a list that gets the size of every storage autograd saves, once, less those of the model itself."""
    own = _own(model)
    held, sizes = {}, []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in held:
            held[storage._cdata] = storage
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def loss_of(model: nn.Module, batch: int, dtype: torch.dtype, device: str) -> Tensor:
    """The training loss of a forward over `batch` images of no particular content."""
    v = model.variant
    x = torch.zeros(batch, 3, v.img_size, v.img_size, device=device, dtype=dtype)
    if not v.num_classes:
        side = v.img_size // v.patch_size
        return model.losses(x, torch.ones(batch, side, side, device=device))[0].sum()
    if device == "cpu":
        x.normal_()
    logits, *aux = out if isinstance(out := model(x), tuple) else (out,)
    return soft_target_cross_entropy(logits, torch.zeros(batch, v.num_classes, device=device)).sum() + sum(aux)
