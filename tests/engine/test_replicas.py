"""A flipped bit in what ranks hold alike is seen, for certain, and its rank is named where that can be known."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from swin_scale.engine import replicas
from swin_scale.engine.replicas import Difference, Replicas, digest, digests
from tests.engine.test_engine import make_config, make_engine, train
from tests.spawn import spawn_dist


def bits(tensor):
    """The same memory as integers."""
    return tensor.view(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}[tensor.element_size()])


def flip(tensor, element, bit):
    words = bits(tensor)
    width = 8 * words.element_size()
    words[element] ^= 1 << bit if bit < width - 1 or words.dtype == torch.uint8 else -(1 << bit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_any_one_or_two_flipped_bits_change_it(dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    plain, width = int(digest(tensor)), 8 * bits(tensor).element_size()
    places = list(itertools.product(range(bits(tensor).numel()), range(width)))
    for chosen in [*((place,) for place in places), *itertools.combinations(places[:: 1 if width == 8 else 7], 2)]:
        damaged = tensor.clone()
        for element, bit in chosen:
            flip(damaged, element, bit)
        assert int(digest(damaged)) != plain, chosen
    assert int(digest(tensor.clone())) == plain


def test_any_two_exchanged_elements_change_it():
    tensor = torch.randn(24, generator=torch.Generator().manual_seed(0))
    tensor[5], tensor[6] = 0.0, -0.0  # equal as numbers, not as bits
    plain = int(digest(tensor))
    for i, j in itertools.combinations(range(24), 2):
        exchanged = tensor.clone()
        exchanged[[i, j]] = exchanged[[j, i]]
        assert int(digest(exchanged)) != plain


def test_it_is_the_sum_that_it_says_in_any_chunks(monkeypatch):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    words = tensor.view(torch.int32).tolist()
    total = sum((2 * i + 1) * word for i, word in enumerate(words)) % (1 << 64)
    expected = total - (1 << 64) if total >> 63 else total
    for chunk in (1 << 22, 1000, 999, 64, 1):
        monkeypatch.setattr(replicas, "CHUNK", chunk)
        assert int(digest(tensor)) == expected
    assert int(digest(tensor.view(10, 100).t())) != expected  # the order of elements, not that of memory
    assert digests([]) == [] and digests([tensor[:0], tensor]) == [0, expected]


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.experts = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.arange(4))


def compare(dist, damages):
    """`Difference`s of four ranks, of which 0 and 2 hold one set of experts, 1 and 3 another; `damages`: (rank, what)
    lists."""
    found = []
    for damage in damages:
        module = Toy()
        place = dist.rank % 2
        module.experts.data += place
        held = SimpleNamespace(start=3 * place)
        fragments = SimpleNamespace(
            replicas=lambda m=module, h=held: [("dense", m.dense.data, None), ("experts", m.experts.data, h)]
        )
        watched = Replicas(module, fragments, dist, every=5)
        assert watched.due(10) and not watched.due(11)
        for rank, what in damage:
            if rank == dist.rank:
                flip(getattr(module, what).data, 1, 3)
        found.append(watched.compare())
    assert Replicas(module, fragments, dist, every=0).compare() is None
    return found


@pytest.mark.fault(16, "a bit flipped in one copy of a parameter, an expert, a table")
def test_the_rank_is_named():
    damages = {
        (): None,
        ((2, "dense"),): ((2,), ("dense",), True),
        ((0, "dense"), (3, "dense")): ((0, 1, 2, 3), ("dense",), False),  # two against two
        ((1, "dense"), (1, "experts")): ((1, 3), ("dense", "experts"), False),  # of two sets of experts, which?
        ((3, "experts"),): ((1, 3), ("experts",), False),
        ((1, "table"),): ((1,), ("table",), True),
        ((0, "table"), (2, "dense")): ((0, 2), ("table", "dense"), True),
    }
    everybody = spawn_dist(4, compare, [list(damage) for damage in damages])
    assert everybody[0] == everybody[1] == everybody[2] == everybody[3]
    for difference, expected in zip(everybody[0], damages.values(), strict=True):
        assert (difference and (difference.ranks, difference.names, difference.certain)) == expected


def test_what_is_said():
    known = {"hosts": ("node1",), "names": tuple(f"layer{i}" for i in range(9))}
    text = str(Difference(ranks=(4,), certain=True, **known))
    assert text.startswith("rank 4 on node1 differ") and "layer7 and 1 more" in text and "newest checkpoint" in text
    text = str(Difference(ranks=(0, 1), hosts=("a", "b"), names=("x",), certain=False))
    assert "rank 0 on a, rank 1 on b differ from each other, any may be wrong" in text


def damaged_run(dist, stage):
    """What is found before and after a bit is flipped in a weight of rank 1, after one more step, and in a table."""
    engine, plan = make_engine(dist, make_config(engine={"zero_stage": stage}))
    train(engine, plan, dist, 0, 2)
    watched = Replicas(engine.module, engine.fragments, dist, every=1)
    found = [watched.compare()]
    weight = engine.module.get_parameter("head.weight")
    if dist.rank == 1 and weight.numel():
        flip(weight.data, 3, 20)
    found.append(watched.compare())
    train(engine, plan, dist, 2, 3)
    found.append(watched.compare())
    name, table = next(iter(engine.module.named_buffers()))
    if dist.rank == 1:
        flip(table, 2, 1)
    found.append(watched.compare())
    engine.close()
    return [difference and (difference.ranks, difference.certain) for difference in found], found[1], name


@pytest.mark.parametrize("stage", [0, 1, *(pytest.param(stage, marks=pytest.mark.proof) for stage in (2, 3))])
@pytest.mark.fault(16, "a bit flipped in one replica's weights, under each ZeRO stage")
def test_how_long_damage_stays_under_each_stage(stage):
    (found, difference, _), (other, *_) = spawn_dist(2, damaged_run, stage)
    both = ((0, 1), False)
    assert found == other
    if stage == 3:  # nothing is held twice but tables
        assert found == [None, None, None, ((1,), True)]
        return
    assert difference.names == ("head.weight",)
    # The masters' owners write the weights anew at each update, where there are such owners.
    assert found == ([None, both, both, both] if stage == 0 else [None, both, None, ((1,), True)])
