"""The sample stream: from shards on disk to uint8 batches in an order that no worker or rank count can change.

In the order in which a sample meets them: `order` (which sample, when), `exclusions` (which are left out), `reader`
(its bytes), `decode` (its pixels), `augment`, `resample` and `randaugment` (its random view), `masking` (what SimMIM
hides of it), `worker` and `loader` (in which process), `streams` (the public face), and on the device `device`
(normalise, erase) and `mixup`. Files up to `worker` import no torch, and names are looked up here on first use, so that
loader processes start in a fraction of a second.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swin_scale.data.augment import EvalTransform, TrainTransform
    from swin_scale.data.decode import decode_rgb
    from swin_scale.data.device import finish
    from swin_scale.data.exclusions import Exclusions, LeftOut
    from swin_scale.data.loader import Batch, Batches
    from swin_scale.data.masking import Masking
    from swin_scale.data.mixup import Mix, draw_mix, mix_batch
    from swin_scale.data.order import as_bad, batch_digest
    from swin_scale.data.reader import BadSample, open_shard_sets
    from swin_scale.data.streams import EvalStream, SkipLedger, TrainStream
    from swin_scale.data.webstream import open_stream
    from swin_scale.data.worker import Skipped

_HOMES = {
    "augment": ("EvalTransform", "TrainTransform"),
    "decode": ("decode_rgb",),
    "device": ("finish",),
    "exclusions": ("Exclusions", "LeftOut"),
    "loader": ("Batch", "Batches"),
    "masking": ("Masking",),
    "mixup": ("Mix", "draw_mix", "mix_batch"),
    "order": ("as_bad", "batch_digest"),
    "reader": ("BadSample", "open_shard_sets"),
    "streams": ("EvalStream", "SkipLedger", "TrainStream"),
    "webstream": ("open_stream",),
    "worker": ("Skipped",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "BadSample",
    "Batch",
    "Batches",
    "EvalStream",
    "EvalTransform",
    "Exclusions",
    "LeftOut",
    "Masking",
    "Mix",
    "SkipLedger",
    "Skipped",
    "TrainStream",
    "TrainTransform",
    "as_bad",
    "batch_digest",
    "decode_rgb",
    "draw_mix",
    "finish",
    "mix_batch",
    "open_shard_sets",
    "open_stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    return value
