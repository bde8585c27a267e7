"""Surveys made up: classes with a home expert, places with a favourite, any size."""

import numpy as np

from swin_scale.report.survey import BINS, LayerSurvey, Survey


def layer(name="layers.2.blocks.1", *, classes=10, experts=8, side=4, top_k=1, drop=0.0, seed=0) -> LayerSurvey:
    """Three quarters of a class's choices fall on its home expert, the class's number modulo experts."""
    rng = np.random.default_rng(seed)
    weight = np.full((classes, experts), 0.25 / max(experts - 1, 1))
    weight[np.arange(classes), np.arange(classes) % experts] = 0.75
    by_class = rng.multinomial(400, weight / weight.sum(1, keepdims=True))
    by_place = rng.gamma(1, 1, (side, side, experts))
    by_place = (by_place / by_place.sum() * by_class.sum()).astype(np.int64)
    tokens = int(by_class.sum()) // top_k
    first = by_class.sum(0)
    return LayerSurvey(
        name=name,
        top_k=top_k,
        tokens=tokens,
        by_class=by_class,
        by_place=by_place,
        dropped=(drop * rng.random((side, side)) * tokens / side**2).astype(np.int64),
        confidence=rng.integers(1, 1000, BINS),
        confidence_sum=0.4 * tokens,
        confidence_by_expert=0.5 * first,
        first_choices=first,
        entropy_sum=1.5 * tokens,
    )


def survey(*layers: LayerSurvey, names=None, **changes) -> Survey:
    classes = len(layers[0].by_class)
    fields = {
        "title": "a model", "model": "8 experts", "weights": "run", "data": ("val",), "images": 100, "available": 250,
        "unusable": 0, "classes": tuple(names or (f"kind {i}, other name" for i in range(classes))),
        "capacity_factor": 0.0, "layers": layers, **changes,
    }  # fmt: skip
    return Survey(**fields)
