import math

import numpy as np
import pytest
import torch

from swin_scale.config import Augment
from swin_scale.data.mixup import Mix, cut_mix, draw_mix, mix_batch
from tests.peers import timm

peer = timm.data.mixup
BOTH = Augment()
VALID = torch.ones(8, dtype=torch.bool)


def batch(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 16, 20, generator=g), torch.randint(0, 7, (8,), generator=g)


def soft_targets(labels: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """Smoothed one-hot rows, zeros for an empty slot."""
    rows = torch.nn.functional.one_hot(labels.clamp(min=0), num_classes).float()
    return (rows * (1 - smoothing) + smoothing / num_classes) * (labels >= 0)[:, None]


def as_timm_pairs(x: torch.Tensor) -> torch.Tensor:
    """timm mixes i with B - 1 - i: put slots 0, 2, 4, 6 first and their partners behind, reversed."""
    return torch.cat([x[0::2], x[1::2].flip(0)])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_equals_timm_in_batch_mode(kind, smoothing, monkeypatch):
    for seed in range(10):
        images, labels = batch(seed)
        draws = np.random.default_rng(seed)
        lam, y, x = draws.beta(1, 1), int(draws.integers(16)), int(draws.integers(20))
        monkeypatch.setattr(np.random, "rand", lambda: 0.0)
        monkeypatch.setattr(np.random, "beta", lambda *_, lam=lam: lam)
        centres = iter((y, x))
        monkeypatch.setattr(np.random, "randint", lambda *_, centres=centres, **__: next(centres))
        alphas = (
            {"mixup_alpha": 0.8, "cutmix_alpha": 0.0} if kind == "mixup" else {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}
        )
        theirs = peer.Mixup(**alphas, label_smoothing=smoothing, num_classes=7)
        expected, expected_targets = theirs(as_timm_pairs(images), as_timm_pairs(labels))
        mix = Mix(lam) if kind == "mixup" else cut_mix(16, 20, lam, y, x)
        mixed, targets = mix_batch(images, soft_targets(labels, 7, smoothing), VALID, mix)
        torch.testing.assert_close(as_timm_pairs(mixed), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(as_timm_pairs(targets), expected_targets, rtol=0, atol=1e-6)
        monkeypatch.undo()


def test_cut_mix_region_equals_timm(monkeypatch):
    draws = np.random.default_rng(1)
    for _ in range(300):
        height, width = draws.integers(4, 100, 2).tolist()
        lam, y, x = float(draws.random()), int(draws.integers(height)), int(draws.integers(width))
        centres = iter((y, x))
        monkeypatch.setattr(np.random, "randint", lambda *_, centres=centres, **__: next(centres))
        box, expected = peer.cutmix_bbox_and_lam((3, height, width), lam)
        mix = cut_mix(height, width, lam, y, x)
        assert mix.region == tuple(box) and math.isclose(mix.lam, expected, abs_tol=1e-12)


def test_draws_are_keyed_by_seed_and_step():
    draw = lambda seed, step: draw_mix(BOTH, seed=seed, step=step, height=64, width=64)  # noqa: E731
    assert draw(1, 5) == draw(1, 5) != draw(1, 6) != draw(2, 6)


def test_share_and_distribution_of_draws():
    mixes = [draw_mix(BOTH, seed=0, step=step, height=1024, width=1024) for step in range(4000)]
    cut = [m for m in mixes if m.region]
    assert 1850 < len(cut) < 2150
    lams = np.array([m.lam for m in mixes if not m.region])
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 alpha + 1)).
    assert abs(lams.mean() - 0.5) < 0.02 and abs(lams.var() - 1 / 10.4) < 0.006
    none = [draw_mix(Augment(mixup_prob=0.25), seed=0, step=s, height=8, width=8) == Mix() for s in range(1000)]
    assert 0.7 < np.mean(none) < 0.8
    for off in (Augment(mixup=0, cutmix=0), Augment(mixup_prob=0)):
        assert draw_mix(off, seed=0, step=0, height=8, width=8) == Mix()
    only = [draw_mix(Augment(mixup=0), seed=0, step=s, height=64, width=64).region for s in range(50)]
    assert None not in only
    only = [draw_mix(Augment(cutmix=0), seed=0, step=s, height=64, width=64).region for s in range(50)]
    assert set(only) == {None}


@pytest.mark.parametrize("mix", [Mix(0.3), cut_mix(16, 20, 0.4, 7, 3)])
def test_any_even_cut_of_the_batch_gives_the_same(mix):
    images, labels = batch()
    targets = soft_targets(labels, 7, 0.1)
    whole = mix_batch(images, targets, VALID, mix)
    for size in (2, 4):
        parts = [mix_batch(images[i : i + size], targets[i : i + size], VALID[:size], mix) for i in range(0, 8, size)]
        assert torch.equal(torch.cat([p[0] for p in parts]), whole[0])
        assert torch.equal(torch.cat([p[1] for p in parts]), whole[1])


@pytest.mark.parametrize("mix", [Mix(0.3), cut_mix(16, 20, 0.4, 7, 3)])
def test_partner_of_an_empty_slot_stays_itself(mix):
    images, labels = batch()
    valid = VALID.clone()
    valid[3] = valid[6] = valid[7] = False
    labels[~valid] = -1
    images[~valid] = 0
    targets = soft_targets(labels, 7, 0.1)
    mixed, mixed_targets = mix_batch(images, targets, valid, mix)
    for alone in (2, 3, 6, 7):
        assert torch.equal(mixed[alone], images[alone]) and torch.equal(mixed_targets[alone], targets[alone])
    assert not torch.equal(mixed[0], images[0])
    torch.testing.assert_close(mixed_targets.sum(1), valid.float())
