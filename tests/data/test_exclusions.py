"""Samples that are left out: empty slots from their step on, listed with the reason, and nothing else moves."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swin_scale.config import Augment
from swin_scale.data.exclusions import Exclusions, LeftOut
from swin_scale.data.loader import Request
from swin_scale.data.order import as_bad, batch_digest
from swin_scale.data.streams import SkipLedger, TrainStream
from swin_scale.errors import UserError

RECIPE = {"seed": 3, "global_batch": 12, "img_size": 32, "augment": Augment(crop="resized")}
FIELDS = ("images", "labels", "ids", "boxes", "noise_keys")


def test_ids_are_left_out_from_their_step_on_and_steps_once():
    exclusions = Exclusions(
        [
            LeftOut(step=5, ids=(7, 8), reason="late"),
            LeftOut(step=2, ids=(7,), reason="early"),
            LeftOut(step=4, ids=None, reason="all"),
        ]
    )
    ids = np.array([7, -1, 8, 9, -12])
    assert exclusions.apply(1, ids)[1] == {}
    at_2, reasons = exclusions.apply(2, ids)
    assert at_2.tolist() == [-9, -1, 8, 9, -12] and reasons == {7: "early"}
    at_4, reasons = exclusions.apply(4, ids)
    assert at_4.tolist() == [-9, -1, -10, -11, -12] and reasons == {7: "all", 8: "all", 9: "all"}
    at_5, reasons = exclusions.apply(5, ids)
    assert at_5.tolist() == [-9, -1, -10, 9, -12] and reasons == {7: "early", 8: "late"}


def test_a_chunk_is_told_the_reasons_of_its_own_slots():
    ids, reasons = Exclusions([LeftOut(step=4, ids=None, reason="all")]).apply(4, np.array([7, -1, 8, 9]))
    request = Request(step=4, epoch=0, ids=ids, copies=np.zeros(4, np.uint8), reasons=reasons)
    assert [request.chunk(0, row, 2).reasons for row in (0, 2)] == [{7: "all"}, {8: "all", 9: "all"}]


@given(st.lists(st.integers(-1, 40), min_size=1), st.sets(st.integers(0, 40)), st.integers(0, 3), st.integers(0, 3))
def test_what_is_left_out_is_a_function_of_step_and_id(ids, chosen, since, step):
    ids = np.array(ids)
    coded, reasons = Exclusions([LeftOut(step=since, ids=tuple(chosen), reason="r")]).apply(step, ids)
    hit = np.isin(ids, list(chosen)) & (step >= since)
    assert (coded == np.where(hit, as_bad(ids), ids)).all()
    assert set(reasons) == set(ids[hit].tolist())


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (0, 2), (1, 3)])
def test_left_out_samples_are_empty_slots_and_shift_nothing(shards, workers, world):
    whole = list(TrainStream([shards], **RECIPE).batches(stop_step=10))
    often, late = (int(i) for i in whole[0].ids[:2])
    stream = TrainStream([shards], exclude=[often], **RECIPE)
    left_out = [LeftOut(step=3, ids=(late,), reason="because"), LeftOut(step=6, ids=None, reason="all of it")]
    records = []
    for rank in range(world):
        rows = slice(rank * 12 // world, (rank + 1) * 12 // world)
        options = {"rank": rank, "world": world, "workers": workers, "left_out": left_out}
        with stream.batches(stop_step=10, **options) as batches:
            for a, b in zip(whole, batches, strict=True):
                ids = a.ids[rows]
                hole = (ids == often) | ((ids == late) & (a.step >= 3)) | ((ids >= 0) & (a.step == 6))
                assert torch.equal(b.ids, torch.where(hole, as_bad(ids), ids))
                assert not b.images[hole].any() and (b.labels[hole] == -1).all() and not b.valid[hole].any()
                for field in FIELDS:
                    assert torch.equal(getattr(a, field)[rows][~hole], getattr(b, field)[~hole])
                assert [record.id for record in b.skipped] == ids[hole].tolist()
                assert all(record.excluded for record in b.skipped)
                records += [(a.step, record) for record in b.skipped]
    reasons = {(step, record.id): record.reason for step, record in records}
    assert reasons[0, often] == "left out by data.exclude" and (0, late) not in reasons
    [(again, _)] = [(s, i) for s, i in reasons if i == late and s != 6] or [(None, None)]
    assert again is not None and again >= 5 and reasons[again, late] == "because"
    assert all(reason == "all of it" for (step, _), reason in reasons.items() if step == 6)
    assert all(record.key == f"{record.id:08d}" for _, record in records)


def test_only_the_digest_of_a_step_with_a_left_out_sample_changes(shards):
    stream = TrainStream([shards], **RECIPE)
    victim = int(stream.order.batch(2)[0][4])
    plain = [batch_digest(batch.ids.numpy()) for batch in stream.batches(stop_step=4)]
    holed = stream.batches(stop_step=4, left_out=[LeftOut(step=2, ids=(victim,), reason="r")])
    assert [a == batch_digest(b.ids.numpy()) for a, b in zip(plain, holed)] == [True, True, False, True]


def test_the_ledger_lists_what_is_left_out_and_does_not_count_it(shards, tmp_path):
    from swin_scale.log import read_jsonl

    batch = next(TrainStream([shards], **RECIPE).batches(left_out=[LeftOut(step=0, ids=None, reason="r")]))
    ledger = SkipLedger(tmp_path / "skipped.jsonl", max_rate=0.0, tolerated=0)
    ledger.add(1, 0, 12, batch.skipped)
    ledger.close()
    assert (ledger.seen, ledger.bad) == (12, 0)
    rows = read_jsonl(tmp_path / "skipped.jsonl")
    assert len(rows) == 12 and all(row["excluded"] and row["reason"] == "r" for row in rows)


def test_ids_that_no_sample_has_are_refused(shards):
    with pytest.raises(UserError, match=r"data\.exclude holds 53, but data\.train has 53 samples"):
        TrainStream([shards], exclude=[2, 53], **RECIPE)
