"""Label spaces of ImageNet: WordNet ids in label order, with their names.

``imagenet22k.tsv`` is the sorted list of 21,843 ids whose positions are the labels of the official ImageNet-22K
weights; those weights have 21,841 classes because the last two ids are folded into others (big_transfer, issue 7).
``imagenet1k.tsv`` is the sorted list of ILSVRC-2012. Names are WordNet lemmas (WORDNET_LICENSE.txt).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

CLASSES_22K = 21841
"""Classes of the official 22K weights."""

FOLDED_22K: Mapping[int, int] = {21841: 9205, 21842: 15027}
"""Labels of the 22K list beyond the classes, and the class that holds their images."""

TEDDY_BEAR = ("n04399382", 5564)
"""The one ILSVRC-2012 id absent from the 22K list, and the class the official map takes for it."""


@dataclass(frozen=True)
class LabelSpace:
    """WordNet ids and display names in label order."""

    name: str
    wnids: tuple[str, ...]
    classes: tuple[str, ...]


@cache
def _table(file: str) -> tuple[tuple[str, str], ...]:
    text = files(__name__).joinpath(file).read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines())
    return tuple((wnid, name) for wnid, name in rows)


def imagenet1k() -> LabelSpace:
    """The 1,000 classes of ILSVRC-2012."""
    table = _table("imagenet1k.tsv")
    return LabelSpace("imagenet1k", tuple(w for w, _ in table), tuple(name for _, name in table))


def imagenet22k() -> LabelSpace:
    """The 21,841 classes of the official ImageNet-22K weights."""
    table = _table("imagenet22k.tsv")[:CLASSES_22K]
    return LabelSpace("imagenet22k", tuple(w for w, _ in table), tuple(name for _, name in table))


def by_count(classes: int) -> LabelSpace | None:
    """The space the official weights of that many classes use, or None."""
    return {1000: imagenet1k, CLASSES_22K: imagenet22k}.get(classes, lambda: None)()


def map_22k_to_1k() -> tuple[int, ...]:
    """The 22K class of each of the 1,000 classes, in order: what the official fine-tuning takes the head rows by."""
    position = {wnid: label for label, (wnid, _) in enumerate(_table("imagenet22k.tsv"))}
    position[TEDDY_BEAR[0]] = TEDDY_BEAR[1]
    labels = (position[wnid] for wnid in imagenet1k().wnids)
    return tuple(FOLDED_22K.get(label, label) for label in labels)
