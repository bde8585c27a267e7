import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swin_scale.data import order as order_module
from swin_scale.data.order import EMPTY, BatchOrder, EpochOrder, Source, StoredOrder, as_bad, batch_digest, rank_slots
from swin_scale.errors import UserError

shard_lists = st.lists(st.integers(0, 70), min_size=1, max_size=8).map(tuple)
source_lists = st.lists(shard_lists, min_size=1, max_size=4).filter(lambda lists: sum(map(sum, lists)) > 0)


@pytest.fixture
def in_blocks(monkeypatch):
    """Small epochs go through blocks and lanes, as large ones do."""
    monkeypatch.setattr(order_module, "SHUFFLED_SAMPLES", 0)


def sources_of(shards: list[tuple[int, ...]], weights=None) -> list[Source]:
    return [Source(shard_samples=s, weight=w) for s, w in zip(shards, weights or [1.0] * len(shards))]


@pytest.mark.parametrize("threshold", [0, 1 << 17])
@given(shards=source_lists, seed=st.integers(0, 2**40), epoch=st.integers(0, 1000), block=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_every_sample_exactly_once_per_epoch(threshold, shards, seed, epoch, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "SHUFFLED_SAMPLES", threshold)
        order = EpochOrder(sources_of(shards), seed=seed, epoch=epoch, block=block)
    total = sum(map(sum, shards))
    assert order.samples == total
    assert sorted(order.ids(0, total)) == list(range(total))


@given(
    shards=source_lists,
    weights=st.lists(st.floats(0.05, 3.5), min_size=4, max_size=4),
    epoch=st.integers(0, 50),
    block=st.integers(1, 9),
)
@settings(max_examples=80, deadline=None)
def test_weights_are_exact_per_source(shards, weights, epoch, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "SHUFFLED_SAMPLES", 0)
        sources = sources_of(shards, weights)
        order = EpochOrder(sources, seed=7, epoch=epoch, block=block)
        ids, copies = order.lookup(np.arange(order.samples))
    first = 0
    for source in sources:
        mine = (ids >= first) & (ids < first + source.samples)
        assert mine.sum() == source.samples_per_epoch == int(np.floor(source.weight * source.samples + 0.5))
        counts = np.bincount(ids[mine] - first, minlength=source.samples) if source.samples else np.zeros(1, int)
        assert counts.max() - counts.min() <= 1
        first += source.samples
    # A repeated sample gets another copy number, hence another augmentation.
    assert len(set(zip(ids.tolist(), copies.tolist()))) == len(ids)


def test_fractional_weight_visits_all_before_any_again(in_blocks):
    source = Source(shard_samples=(33, 31, 36), weight=0.25)
    seen = np.concatenate([EpochOrder([source], seed=3, epoch=e, block=8).ids(0, 25) for e in range(4)])
    assert sorted(seen) == list(range(100))


def test_order_is_a_pure_function_and_differs_by_seed_and_epoch(in_blocks):
    source = [Source(shard_samples=(500, 500))]
    base = EpochOrder(source, seed=1, epoch=2).ids(0, 1000)
    assert (EpochOrder(source, seed=1, epoch=2).ids(0, 1000) == base).all()
    assert (EpochOrder(source, seed=1, epoch=2).ids(333, 444) == base[333:444]).all()
    for other in (EpochOrder(source, seed=2, epoch=2), EpochOrder(source, seed=1, epoch=3)):
        assert (other.ids(0, 1000) == base).mean() < 0.02


def test_golden_order():
    """The order is part of every checkpoint's meaning: it must not change with library versions."""
    order = EpochOrder([Source(shard_samples=(6, 4))], seed=0, epoch=0)
    assert order.ids(0, 10).tolist() == [7, 5, 4, 9, 2, 6, 0, 8, 3, 1]
    large = EpochOrder([Source(shard_samples=(10_000,) * 20)], seed=5, epoch=1)
    assert large.lanes == 2048
    assert batch_digest(large.ids(0, 200_000)) == "7e7fcecacdf36c23"


def test_lanes_read_blocks_sequentially():
    order = EpochOrder([Source(shard_samples=(10_000,) * 20)], seed=5, epoch=1, block=16)
    rounds = order.samples // order.lanes
    ids = order.ids(0, rounds * order.lanes).reshape(rounds, order.lanes)
    follows = [np.isin(ids[i] + 1, ids[i + 1]).mean() for i in range(rounds - 1)]
    assert np.mean(follows) > 0.9


@pytest.mark.parametrize("stored", ["sorted", "permuted"])
@pytest.mark.parametrize("shard", [1_000, 9_973])
def test_labels_mix_as_in_a_full_permutation(stored, shard):
    """Class-sorted input: adjacent labels at most 2x as correlated as in full permutations, batches as diverse."""
    rng = np.random.default_rng(0)
    samples, classes, batch = 200_000, 1000, 1024
    labels = np.sort(rng.integers(0, classes, samples))
    if stored == "permuted":
        labels = rng.permutation(labels)
    counts = (shard,) * (samples // shard) + ((samples % shard,) if samples % shard else ())
    ours, full, ours_classes, full_classes = [], [], [], []
    for epoch in range(8):
        sequence = labels[EpochOrder([Source(shard_samples=counts)], seed=11, epoch=epoch).ids(0, samples)]
        ours.append(adjacent_correlation(sequence))
        ours_classes.append(distinct_per_batch(sequence, batch))
        sequence = rng.permutation(labels)
        full.append(adjacent_correlation(sequence))
        full_classes.append(distinct_per_batch(sequence, batch))
    assert np.mean(np.abs(ours)) <= 2 * np.mean(np.abs(full))
    assert np.mean(ours_classes) >= 0.99 * np.mean(full_classes)


def adjacent_correlation(labels: np.ndarray) -> float:
    return float(np.corrcoef(labels[:-1], labels[1:])[0, 1])


def distinct_per_batch(labels: np.ndarray, batch: int) -> float:
    whole = labels[: len(labels) // batch * batch].reshape(-1, batch)
    return float(np.mean([len(np.unique(row)) for row in whole[::10]]))


def test_fourteen_million_samples_stay_small_and_quick():
    order = EpochOrder([Source(shard_samples=(10_000,) * 1419)], seed=0, epoch=0)
    assert order._starts.nbytes + order._ends.nbytes + order._copies.nbytes + order._turns.nbytes < 17e6
    assert order.lanes == 4096
    ids = order.ids(5_000_000, 5_004_096)
    assert len(np.unique(ids // 16)) > 4000


@given(
    shards=source_lists,
    batch=st.integers(1, 40),
    world=st.integers(1, 6),
    drop_last=st.booleans(),
    step=st.integers(0, 500),
)
@settings(max_examples=60, deadline=None)
def test_ranks_share_out_the_global_batch(shards, batch, world, drop_last, step):
    batch *= world
    try:
        order = BatchOrder(sources_of(shards), seed=1, global_batch=batch, drop_last=drop_last)
    except UserError:
        assert drop_last and batch > sum(map(sum, shards))
        return
    whole = order.batch(step)[0]
    parts = [order.batch(step, rank_slots(batch, rank, world))[0] for rank in range(world)]
    assert (np.concatenate(parts) == whole).all()
    epoch, number = divmod(step, order.steps_per_epoch)
    expected = EpochOrder(order.sources, seed=1, epoch=epoch).ids(0, order.samples)[
        number * batch : (number + 1) * batch
    ]
    assert (whole[: len(expected)] == expected).all() and (whole[len(expected) :] == EMPTY).all()
    assert len(expected) == batch or (not drop_last and number == order.steps_per_epoch - 1)


def test_steps_per_epoch_and_refusals():
    source = [Source(shard_samples=(10,))]
    assert BatchOrder(source, seed=0, global_batch=4).steps_per_epoch == 3
    assert BatchOrder(source, seed=0, global_batch=4, drop_last=True).steps_per_epoch == 2
    with pytest.raises(UserError, match="drop_last"):
        BatchOrder(source, seed=0, global_batch=11, drop_last=True)
    with pytest.raises(UserError, match="no samples"):
        BatchOrder([Source(shard_samples=(0,))], seed=0, global_batch=4)
    with pytest.raises(UserError, match=r"12 cannot be split over 5 ranks.* 4 and 6"):
        rank_slots(12, 0, 5)
    with pytest.raises(UserError, match=r"data\.weights"):
        Source(shard_samples=(3,), weight=0.0)


def test_stored_order_covers_each_sample_once():
    order = StoredOrder(10, global_batch=4)
    ids = np.concatenate([order.batch(step)[0] for step in range(order.steps_per_epoch)])
    assert ids.tolist() == [*range(10), EMPTY, EMPTY]


def test_bad_code_is_its_own_inverse_and_never_empty():
    ids = np.arange(5)
    coded = as_bad(ids)
    assert (coded < EMPTY).all() and (as_bad(coded) == ids).all()


def test_batch_digest_is_of_little_endian_int64():
    assert (
        batch_digest(np.array([1, 2], np.int32))
        == batch_digest(np.array([1, 2], ">i8"))
        != batch_digest(np.array([2, 1]))
    )
