import json

import numpy as np
import pytest
import torch

from swin_scale.config import Augment
from swin_scale.data.augment import EvalTransform
from swin_scale.data.decode import decode_rgb
from swin_scale.data.streams import EvalStream, SkipLedger, TrainStream
from swin_scale.data.worker import Skipped
from swin_scale.errors import DataError, UserError
from tests.data.conftest import encode, photo, write_shards


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_eval_sees_every_sample_once_on_any_layout(shards, world, workers):
    stream = EvalStream(shards, global_batch=12, img_size=40, augment=Augment())
    assert stream.steps_per_epoch == 5 and stream.num_classes == 5
    seen = {}
    for rank in range(world):
        with stream.batches(rank=rank, world=world, workers=workers) as batches:
            parts = list(batches)
        assert len(parts) == 5
        for batch in parts:
            for i in torch.nonzero(batch.valid).flatten().tolist():
                assert int(batch.ids[i]) not in seen
                seen[int(batch.ids[i])] = (batch.images[i], int(batch.labels[i]))
    assert sorted(seen) == list(range(53))
    transform = EvalTransform.create(Augment(), 40)
    for i in (0, 17, 52):
        expected, _ = transform(decode_rgb(encode(photo(i))))
        assert np.array_equal(seen[i][0].permute(1, 2, 0).numpy(), expected) and seen[i][1] == i % 5


def test_refusals(shards):
    recipe = {"seed": 0, "global_batch": 12, "img_size": 32, "augment": Augment()}
    with pytest.raises(UserError, match=r"data\.weights has 2 numbers for 1"):
        TrainStream([shards], weights=[1, 2], **recipe)
    with pytest.raises(UserError, match="12 cannot be split over 5 ranks"):
        TrainStream([shards], **recipe).batches(world=5)


def test_labels_outside_the_manifest_are_refused(tmp_path):
    bad = write_shards(tmp_path, [encode(photo(0))], [3], classes=3)
    with pytest.raises(DataError, match="label 3 is out of range"):
        EvalStream(bad, global_batch=1, img_size=32, augment=Augment())


def record(i: int) -> Skipped:
    return Skipped(i, "/shards", "a.tar", f"key{i}", "zero bytes")


def test_ledger_writes_lines_and_stops_past_the_rate(tmp_path):
    ledger = SkipLedger(tmp_path / "skipped.jsonl", max_rate=0.1, tolerated=4)
    ledger.add(0, 0, 8, [record(0), record(1), record(2), record(3)])
    ledger.add(1, 0, 90, [])
    ledger.add(2, 0, 8, [record(4)])
    with pytest.raises(
        DataError, match=r"12 of 114 samples.*data\.max_bad_rate 0\.1.*key11 in /shards/a\.tar: zero bytes"
    ):
        ledger.add(3, 1, 8, [record(i) for i in range(5, 12)])
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(12))
    assert lines[-1] == {
        "step": 3, "epoch": 1, "id": 11, "source": "/shards", "shard": "a.tar", "key": "key11", "reason": "zero bytes"
    }  # fmt: skip


def test_package_names_resolve_without_torch_until_needed():
    import subprocess
    import sys

    import swin_scale.data

    for name in swin_scale.data.__all__:
        assert getattr(swin_scale.data, name).__name__ == name
    with pytest.raises(AttributeError):
        swin_scale.data.nothing  # noqa: B018
    probe = "import sys; from swin_scale.data import BadSample, decode_rgb; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", probe], text=True).strip() == "False"
