import hashlib
import os
from pathlib import Path

import pytest

from swin_scale import labels


def test_the_22k_to_1k_map_is_the_official_one():
    rows = labels.map_22k_to_1k()
    text = "\n".join(map(str, rows))
    assert (len(set(rows)), min(rows), max(rows), sum(rows)) == (1000, 359, 21817, 6_373_512)
    assert rows[:5] == (359, 368, 460, 475, 486) and rows[-3:] == (21200, 21369, 21817)
    assert list(rows) != sorted(rows)
    assert len(text) == 5191
    assert hashlib.md5(text.encode()).hexdigest() == "15de4ae09bca0d5310c4a421b95dc723"


@pytest.mark.skipif("SWIN_OFFICIAL" not in os.environ, reason="SWIN_OFFICIAL names no checkout of the official code")
def test_the_map_equals_the_official_file():
    text = (Path(os.environ["SWIN_OFFICIAL"]) / "data" / "map22kto1k.txt").read_text()
    assert tuple(map(int, text.split())) == labels.map_22k_to_1k()


def test_spaces():
    small, large = labels.imagenet1k(), labels.imagenet22k()
    assert (len(small.wnids), len(large.wnids)) == (1000, 21841)
    for space in (small, large):
        assert list(space.wnids) == sorted(set(space.wnids))
        assert all(space.classes)
    assert small.wnids[0] == "n01440764" and small.classes[0] == "tench, Tinca tinca"
    assert [labels.by_count(n) for n in (1000, 21841, 10)] == [small, large, None]


def test_mapped_rows_have_the_same_synset_except_the_teddy_bear():
    small, large = labels.imagenet1k(), labels.imagenet22k()
    other = [w for w, row in zip(small.wnids, labels.map_22k_to_1k(), strict=True) if large.wnids[row] != w]
    assert other == ["n04399382"]
    assert "n04399382" not in large.wnids
