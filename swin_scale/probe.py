"""How good the features of a frozen model are: nearest neighbours, a linear classifier, one from a few images a class.

weights -> pooled features of the training and validation shards -> a classifier on them -> top-1 and top-5

The model is never trained, and its own head, if it has one, is not used; classes are those of the shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_scale.convert import model_from_weights
from swin_scale.data import EvalStream, finish, open_shard_sets
from swin_scale.engine.losses import accuracy_counts
from swin_scale.errors import DataError, UserError
from swin_scale.models.swin import Swin

Method = Literal["knn", "linear", "few-shot"]

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of the weighted vote in Wu et al., arXiv 1805.01978, section 3.4."""
RIDGES = [10.0**power for power in range(-6, 7)]
"""Penalties that the few-shot classifier chooses from, in units of the features' mean square."""
DECAYS = [10.0**power for power in range(-6, 0)]
"""Penalties that the linear classifier chooses from."""
HELD_OUT = 10
"""Of the training features every so manieth judges the penalties."""


def probe(
    weights: str,
    train: Sequence[str],
    val: Sequence[str],
    *,
    method: Method,
    shots: int = 5,
    model: str | None = None,
    kind: str = "master",
    img_size: int | None = None,
    crop: bool | None = None,
    batch: int = 64,
    workers: int = 2,
) -> dict[str, Any]:
    """Top-1 and top-5 in percent on the shards `val` of a classifier made from the shards `train`.

    Memory holds all features, 4 bytes a channel: 5 GB for ImageNet-1K at 1,024 channels.

    Args:
        weights, model, kind: see `convert.model_from_weights`.
        train, val: shard directories with the same classes.
        shots: images of each class, the first in stored order, that `few-shot` learns from.
        img_size, crop, batch, workers: of the evaluation stream; see `evaluate_weights`.

    Raises UserError for a Swin-MLP or a class with fewer than `shots` usable images, DataError for classes that differ.
    """
    overrides = {} if img_size is None else {"img_size": img_size}
    network, info = model_from_weights(weights, model=model, kind=kind, **overrides)
    if not hasattr(network, "forward_pooled"):
        raise UserError(f"{weights} holds {info.name}, which has no pooled features to probe")
    sets = open_shard_sets([*train, *val], key="--train and --data")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).eval()

    def of(sources: Sequence[Any]) -> tuple[Tensor, Tensor]:
        streams = [
            EvalStream(source, global_batch=batch, img_size=network.variant.img_size, augment=info.fixed_view(crop))
            for source in sources
        ]
        return features(network, streams, workers=workers)

    x, y = of(sets[: len(train)])
    classes = len(sets[0].manifest.classes)
    chosen: dict[str, Any] = {}
    if method == "few-shot":
        kept = first_of_each(y, classes, shots)
        x, y = x[kept], y[kept]
    x_val, y_val = of(sets[len(train) :])
    if method == "knn":
        scores = nearest(x, y, x_val, classes)
    else:
        mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
        x, x_val = (x - mean) / deviation, (x_val - mean) / deviation
        if method == "few-shot":
            matrix, chosen["penalty"] = ridge(x, y, classes)
        else:
            matrix, chosen["penalty"] = logistic(x, y, classes)
        scores = x_val @ matrix[:-1] + matrix[-1]
    counts = accuracy_counts(scores, y_val, torch.ones_like(y_val, dtype=torch.bool))
    return {
        "method": method,
        "top1": 100 * float(counts["top1"]) / len(y_val),
        "top5": 100 * float(counts["top5"]) / len(y_val),
        "samples": len(y_val),
        "train_samples": len(y),
        **chosen,
    }


@torch.no_grad()
def features(network: Swin, streams: Sequence[EvalStream], *, workers: int) -> tuple[Tensor, Tensor]:
    """(n, C) fp32 pooled features and (n,) int64 labels of all usable samples, on the device of `network`."""
    device = network.norm.weight.device
    found: list[Tensor] = []
    labels: list[Tensor] = []
    with network.frozen_position_bias():
        for stream in streams:
            with stream.batches(workers=workers) as batches:
                for part in batches:
                    images = finish(part.images[part.valid].to(device))
                    if len(images):
                        found.append(network.forward_pooled(images).float())
                        labels.append(part.labels[part.valid].to(device).long())
    if not found:
        raise DataError(f"none of the samples in {', '.join(str(s.sources[0].directory) for s in streams)} is usable")
    return torch.cat(found), torch.cat(labels)


def first_of_each(y: Tensor, classes: int, shots: int) -> Tensor:
    """Indices of the first `shots` entries of each class in `y`, ascending."""
    counts = torch.bincount(y, minlength=classes)
    if shots < 1 or int(counts.min()) < shots:
        raise UserError(f"--shots: {shots} images of each class are wanted, class {int(counts.argmin())} has "
                        f"{int(counts.min())} usable ones in --train")  # fmt: skip
    order = y.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    return order[(starts[:, None] + torch.arange(shots, device=y.device)).flatten()].sort().values


def nearest(
    x: Tensor, y: Tensor, queries: Tensor, classes: int, *, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> Tensor:
    """(n, classes): the votes of the k nearest of `x` by cosine, each weighing exp(cosine / temperature)."""
    x, k = F.normalize(x, dim=1), min(k, len(x))
    votes = []
    for part in F.normalize(queries, dim=1).split(1024):
        cosine, at = (part @ x.t()).topk(k, dim=1)
        votes.append(
            torch.zeros(len(part), classes, device=x.device).scatter_add_(1, y[at], (cosine / temperature).exp())
        )
    return torch.cat(votes)


def ridge(x: Tensor, y: Tensor, classes: int, penalties: Sequence[float] = RIDGES) -> tuple[Tensor, float]:
    """Least squares from standardised x (n, C) to +1 for the class and -1 for the others, (C + 1, classes), bias last.

    The penalty is the one of `penalties` with the least leave-one-out error, which has a closed form: with the hat
    matrix H, a left-out residual is the residual over 1 - H_ii (Allen, 1974).
    """
    x = x.double()
    target = F.one_hot(y, classes).double() * 2 - 1
    mean, centre = target.mean(0), x.mean(0)
    left, singular, right = torch.linalg.svd(x - centre, full_matrices=False)
    along, unit = left.t() @ (target - mean), x.square().mean() * len(x)
    best: tuple[float, float, Tensor] | None = None
    for penalty in penalties:
        shrunk = singular.square() / (singular.square() + penalty * unit)
        residual = target - mean - left @ (shrunk[:, None] * along)
        hat = (left.square() * shrunk).sum(1) + 1 / len(x)
        error = float((residual / (1 - hat).clamp_min(1e-9)[:, None]).square().mean())
        if best is None or error < best[0]:
            best = error, penalty, right.t() @ ((shrunk / singular.clamp_min(1e-12))[:, None] * along)
    assert best is not None, "at least one penalty"
    _, penalty, matrix = best
    return torch.cat((matrix, (mean - centre @ matrix)[None])).float(), penalty


def logistic(x: Tensor, y: Tensor, classes: int, penalties: Sequence[float] = DECAYS) -> tuple[Tensor, float]:
    """Multinomial logistic regression on standardised x (n, C), (C + 1, classes), bias last, by L-BFGS.

    The penalty, of half the weights' mean square sum, is the one with the least loss on every `HELD_OUT`-th sample;
    the classifier is then fitted to all.
    """
    judges = torch.arange(len(y), device=y.device) % HELD_OUT == 0
    matrix = x.new_zeros(x.shape[1] + 1, classes)
    losses = {}
    for penalty in sorted(penalties, reverse=True):
        matrix = _fit_logistic(x[~judges], y[~judges], matrix, penalty)
        losses[penalty] = float(F.cross_entropy(x[judges] @ matrix[:-1] + matrix[-1], y[judges]))
    penalty = min(losses, key=losses.__getitem__)
    return _fit_logistic(x, y, matrix, penalty), penalty


def _fit_logistic(x: Tensor, y: Tensor, start: Tensor, penalty: float) -> Tensor:
    matrix = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([matrix], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ matrix[:-1] + matrix[-1], y) + penalty / 2 * matrix[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return matrix.detach()
