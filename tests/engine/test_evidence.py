"""The batch that tripped the guard, as files: what is blamed first, only what is worth seeing, nothing overwritten."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from swin_scale.config import Augment
from swin_scale.data.streams import TrainStream
from swin_scale.engine import evidence
from swin_scale.engine.dist import Dist
from swin_scale.engine.evidence import save_batch
from swin_scale.engine.guard import Blame, Trouble
from tests.data.conftest import encode, photo, write_shards


@pytest.fixture
def alone():
    store = torch.distributed.HashStore()
    return Dist(
        rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"), backend="gloo", store=store,
        cpu_group=torch.distributed.group.WORLD, timeout_s=5,
    )  # fmt: skip


def test_a_batch_is_saved_with_all_that_is_known_of_it(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(evidence, "MAX_IMAGES", 5)
    shards = write_shards(tmp_path / "shards", [encode(photo(i)) for i in range(11)], [i % 3 for i in range(11)])
    stream = TrainStream([shards], seed=0, global_batch=12, img_size=32, augment=Augment(crop="resized"))
    batch = next(stream.batches())
    losses = np.arange(12) / 10
    losses[[2, 7]] = math.nan, 0.05
    ids = batch.ids.numpy()
    blame = Blame(who="samples", why="w", slots=(2, 7), ids=ids, losses=losses, ranks={})
    trouble = Trouble(step=3, what="loss", value=math.nan)
    for name in ("guard/step_00000003", "guard/step_00000003_2"):
        directory, blamed = save_batch(tmp_path, trouble, blame, batch, stream.sources, alone)
        assert directory == name and [sample["id"] for sample in blamed] == ids[[2, 7]].tolist()
        body = json.loads((tmp_path / name / "batch.json").read_text())
        assert body["step"] == 3 and body["trouble"] == "loss that is not finite" and body["blamed"] == "samples"
        assert [sample["slot"] for sample in body["samples"]] == list(
            range(11)
        )  # the last slot is past the epoch's end
        for sample in body["samples"]:
            assert sample["key"] == f"{sample['id']:08d}" and sample["label"] == sample["id"] % 3
            assert sample["source"] == str(shards.directory) and sample["shard"].startswith("train-")
            assert sample["loss"] == (None if sample["slot"] == 2 else losses[sample["slot"]])
        # Both that are blamed, then the largest losses.
        shown = {sample["slot"]: sample["image"] for sample in body["samples"] if sample["image"]}
        assert sorted(shown) == [2, 7, 8, 9, 10]
        assert sorted(path.name for path in (tmp_path / name).glob("*.png")) == sorted(shown.values())
        for slot, file in shown.items():
            pixels = np.asarray(Image.open(tmp_path / name / file)).transpose(2, 0, 1)
            assert (pixels == batch.images[slot].numpy()).all()


def test_what_cannot_be_written_ends_nothing(tmp_path, alone, caplog):
    shards = write_shards(tmp_path / "shards", [encode(photo(0))], [0])
    stream = TrainStream([shards], seed=0, global_batch=1, img_size=32, augment=Augment(crop="resized"))
    (tmp_path / "guard").write_text("a file where the directory would be")
    blame = Blame(who="batch", why="w", ids=np.array([0]), losses=np.array([1.0]), ranks={})
    trouble = Trouble(step=1, what="loss", value=9.0, limit=2.0)
    save_batch(tmp_path, trouble, blame, next(stream.batches()), stream.sources, alone)
    assert "the batch of step 1 is not wholly in" in caplog.text
