"""Losses and counts against timm and against counting by hand."""

from importlib import import_module

import pytest
import torch

from swin_scale.engine.losses import accuracy_counts, smooth_targets, soft_target_cross_entropy
from tests.peers import timm

peer_losses = import_module(f"{timm.__name__}.loss")  # a submodule that `import timm` leaves out


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 7, generator=generator) * 3, torch.randint(0, 7, (16,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_smoothed_labels_equal_timm(batch, smoothing):
    logits, labels = batch
    losses = soft_target_cross_entropy(logits, smooth_targets(labels, 7, smoothing))
    expected = peer_losses.LabelSmoothingCrossEntropy(smoothing)(logits, labels)
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    mixup = timm.data.mixup.mixup_target(labels, 7, lam=1.0, smoothing=smoothing)
    torch.testing.assert_close(smooth_targets(labels, 7, smoothing), mixup, rtol=1e-6, atol=1e-7)


def test_soft_targets_equal_timm(batch):
    logits, _ = batch
    targets = torch.rand(16, 7, generator=torch.Generator().manual_seed(1)).softmax(-1)
    expected = peer_losses.SoftTargetCrossEntropy()(logits, targets)
    assert soft_target_cross_entropy(logits, targets).mean().item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_hand_worked_value():
    """Two classes, logits (0, ln 3): probabilities 1/4 and 3/4."""
    logits = torch.tensor([[0.0, 3.0]]).log()
    logits[0, 0] = 0.0
    loss = soft_target_cross_entropy(logits, torch.tensor([[0.5, 0.5]]))
    assert loss.item() == pytest.approx(0.8369882168)  # (ln 4 + ln 4/3) / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_summed_in_fp32(batch, dtype):
    logits, labels = batch
    low = logits.to(dtype)
    targets = smooth_targets(labels, 7, 0.1)
    losses = soft_target_cross_entropy(low, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, soft_target_cross_entropy(low.float(), targets), rtol=0, atol=0)


def test_empty_slots_have_targets_that_stay_finite():
    targets = smooth_targets(torch.tensor([2, -1]), 4, 0.1)
    assert targets[0].tolist() == pytest.approx([0.025, 0.025, 0.925, 0.025])
    assert targets[1].tolist() == pytest.approx([0.025] * 4)


def test_counts_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [9.0, 0.0, 0.0]])
    labels, valid = torch.tensor([0, 1, 0, 0]), torch.tensor([True, True, True, False])
    counts = accuracy_counts(logits, labels, valid, topk=(1, 2, 5))
    assert {key: value.item() for key, value in counts.items() if key != "loss"} == {
        "samples": 3, "top1": 1, "top2": 2, "top5": 3,
    }  # fmt: skip
    expected = torch.nn.functional.cross_entropy(logits[:3], labels[:3], reduction="sum")
    assert counts["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_counts_equal_timm(batch):
    logits, labels = batch
    counts = accuracy_counts(logits, labels, torch.ones(16, dtype=torch.bool))
    top1, top5 = timm.utils.accuracy(logits, labels, topk=(1, 5))
    assert counts["top1"].item() / 16 * 100 == pytest.approx(top1.item())
    assert counts["top5"].item() / 16 * 100 == pytest.approx(top5.item())


def test_counts_add_up_over_any_split(batch):
    logits, labels = batch
    valid = torch.arange(16) % 5 != 0
    whole = accuracy_counts(logits, labels, valid)
    for size in (1, 3, 8):
        parts = [
            accuracy_counts(*part) for part in zip(logits.split(size), labels.split(size), valid.split(size))
        ]  # fmt: skip
        for key in ("samples", "top1", "top5"):
            assert sum(part[key].item() for part in parts) == whole[key].item()
        assert sum(part["loss"].item() for part in parts) == pytest.approx(whole["loss"].item(), rel=1e-9)


def test_ties_and_nan_are_not_hits():
    tied = torch.zeros(3, 3)
    counts = accuracy_counts(tied, torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.bool), topk=(1, 2))
    assert (counts["top1"].item(), counts["top2"].item()) == (1, 2)  # the lower index wins a tie
    broken = torch.tensor([[float("nan"), 0.0], [0.0, float("nan")], [float("nan")] * 2])
    counts = accuracy_counts(broken, torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool), topk=(1, 5))
    assert (counts["top1"].item(), counts["top5"].item()) == (0, 1)
