"""Weights in files of ``torch.save``: the table of tensors at the top, or under a usual name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from swin_scale.convert.pickles import LazyTensor, Placeholder
from swin_scale.convert.torchfile import TorchFile
from swin_scale.convert.weights import Source, Weights
from swin_scale.errors import CheckpointError

_MASTER = ("model", "state_dict", "module")
_EMA = ("model_ema", "state_dict_ema", "ema")


class TorchWeights(Weights):
    """The table of tensors in a file of ``torch.save``."""

    def __init__(self, path: Path, kind: str) -> None:
        self._file = TorchFile(path)
        try:
            top = _table(self._file.content)
            if top is None:
                raise CheckpointError(f"{path} holds a {type(self._file.content).__name__}, not a table of tensors")
            if {"param_shapes", "buffer_names"} <= top.keys() and top["param_shapes"] is not None:
                raise CheckpointError(f"{path} is one file of a DeepSpeed checkpoint; give the directory it is in")
            table, kind = _choose(top, kind, path)
            self._lazy = table
            self.tensors = {name: self._file.meta(lazy) for name, lazy in table.items()}
        except CheckpointError:
            self._file.close()
            raise
        self.source = Source(
            path=path,
            format="torch",
            kind=kind,
            beside=() if table is top else tuple(str(name) for name in top if _table(top[name]) is not table),
            mentioned=tuple(sorted(self._file.mentioned)),
        )

    def read(self, name: str) -> Tensor:
        return self._file.read(self._lazy[name])

    def checksum(self, name: str) -> int | None:
        """The CRC-32 that the file states of the bytes the tensor lies in; None where it states none."""
        found = self._file.extent(self._lazy[name])
        return None if found is None else found[0].crc

    def close(self) -> None:
        self._file.close()


def _choose(top: dict[Any, Any], kind: str, path: Path) -> tuple[dict[str, LazyTensor], str]:
    """The table of weights, and its kind: a file with nothing but a moving average gives that."""
    averages, masters = ([(key, t) for key in keys if (t := _table(top.get(key)))] for keys in (_EMA, _MASTER))
    if kind == "ema":
        if not averages:
            raise CheckpointError(f"{path} has no {' or '.join(_EMA)} and does not say that it is ema; leave ema out")
        found = averages[0]
    elif kind == "master":
        found = next(iter([*masters, *averages]), ("", top))
    else:
        raise CheckpointError(f"{path} holds master or ema weights, not {kind}")
    key, table = found
    wrong = [name for name, value in table.items() if not isinstance(value, LazyTensor) or not isinstance(name, str)]
    if wrong or not table:
        raise CheckpointError(
            f"{path}: no table of tensors found at the top or under {', '.join((*_MASTER, *_EMA))}; "
            f"at the top are {', '.join(map(str, list(top)[:8])) or 'no entries'}"
        )
    return table, "ema" if key in _EMA else kind


def _table(content: Any) -> dict[Any, Any] | None:
    if isinstance(content, Placeholder):
        content = content.items
    return content if isinstance(content, dict) else None
