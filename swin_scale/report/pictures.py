"""Which pictures a run has, and what is on each: curves over steps, points of evaluations, marks of events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from swin_scale.log import Row
from swin_scale.report.history import ORDINARY, History, number

LOSS_UNITS = {"classify": "cross-entropy, nats", "simmim": "mean absolute error of hidden pixels"}
"""By task."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve or row of points. `steps` (n,) int64 rising, `values` (n,) float64 with NaN for gaps."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    colour: int
    """1 to 4 of the style sheet."""
    kind: str = "curve"
    """``curve`` (raw, with a smooth line over it), ``line`` (as it is) or ``points``."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A plot over steps."""

    key: str
    title: str
    unit: str
    series: tuple[Series, ...]
    log: bool = True
    """Whether the axis may be logarithmic, where values ask for it."""
    from_zero: bool = False
    top: float = float("inf")


def pictures(history: History) -> list[Picture]:
    """The pictures of a run, less those that nothing was recorded for."""
    columns, steps = history.columns, history.steps

    def of(name: str, label: str, colour: int = 1, kind: str = "curve") -> Series:
        return Series(label=label, steps=steps, values=columns[name], colour=colour, kind=kind)

    task = {key: value for key, value, _ in history.config}.get("task", '"classify"').strip('"')
    scale = columns["loss_scale"]
    scaled = len(np.unique(scale[np.isfinite(scale)])) > 1 or bool((scale > 1).any())
    drawn = [
        Picture(
            key="loss",
            title="Loss",
            unit=LOSS_UNITS.get(task, "mean over samples"),
            series=(of("loss", "training"), *evaluations(history, {"loss": "evaluation"})),
        ),
        Picture(key="aux", title="Auxiliary loss", unit="weighted", series=(of("aux_loss", "auxiliary", 4),)),
        Picture(
            key="accuracy",
            title="Accuracy",
            unit="% of evaluated images",
            series=evaluations(history, {"top1": "top-1", "top5": "top-5"}),
            log=False,
            top=100.0,
        ),
        Picture(
            key="lr", title="Learning rate", unit="per update", series=(of("lr", "learning rate", 3, "line"),),
            log=False, from_zero=True,
        ),
        Picture(key="norm", title="Gradient norm", unit="L2, before clipping", series=(of("grad_norm", "norm", 2),)),
        Picture(
            key="rate", title="Throughput", unit="images/s, all ranks", series=(of("images_per_s", "images/s", 3),),
            log=False, from_zero=True,
        ),
        Picture(
            key="wait", title="Step time and data wait", unit="seconds",
            series=(of("step_s", "step", 1), of("data_wait_s", "waiting for data", 2)),
        ),
        Picture(
            key="scale", title="Loss scale", unit="factor",
            series=(of("loss_scale", "loss scale", 4, "line"),) if scaled else (),
        ),
        Picture(
            key="memory", title="Memory", unit="GB, rank 0: peak on a GPU, resident on a CPU",
            series=(of("mem_gb", "memory", 4, "line"),), log=False, from_zero=True,
        ),
        Picture(
            key="mfu", title="Model FLOPs utilisation", unit="fraction of the peak", series=(of("mfu", "mfu", 3),),
            log=False, from_zero=True,
        ),
    ]  # fmt: skip
    kept = []
    for picture in drawn:
        series = tuple(one for one in picture.series if np.isfinite(one.values).any())
        if series:
            kept.append(Picture(**{**vars(picture), "series": series}))
    return kept


def evaluations(history: History, labels: Mapping[str, str]) -> tuple[Series, ...]:
    """Points of the evaluations for each figure of `labels`, and of the moving average's where there is one."""
    found = []
    rows = history.named("eval")
    kinds = ["master", "ema"] if any(row.get("weights") == "ema" for row in rows) else ["master"]
    for at, (key, label) in enumerate(labels.items()):
        for kind in kinds:
            by_step = {row["step"]: number(row.get(key)) for row in rows if row.get("weights", "master") == kind}
            steps = np.array(sorted(by_step), dtype=np.int64)
            found.append(
                Series(
                    label=f"{label}, {kind}" if len(kinds) > 1 else label,
                    steps=steps,
                    values=np.array([by_step[step] for step in steps.tolist()], dtype=np.float64),
                    # The loss of an evaluation stands beside the training loss, which has the first colour.
                    colour=1 + (2 * at + kinds.index(kind) + (key == "loss")) % 4,
                    kind="points",
                )
            )
    return tuple(found)


def event_name(event: Row) -> str:
    """What people call it: a start after the first step is a resume."""
    return "resumed" if event["event"] == "start" and event["step"] > 0 else str(event["event"])


def is_remarkable(event: Row) -> bool:
    """Whether an event belongs on every picture: all but what a good run is made of."""
    return event["event"] not in ORDINARY and not (event["event"] == "start" and event["step"] == 0)


def lanes(history: History) -> list[tuple[str, np.ndarray]]:
    """(name, steps) for each kind of thing that happened, in the order of its first time; skipped ones at the end."""
    found: dict[str, list[int]] = {}
    for event in history.events:
        found.setdefault(event_name(event), []).append(event["step"])
    rows = [(name, np.array(sorted(steps), dtype=np.int64)) for name, steps in found.items()]
    updates = history.steps[history.columns["skipped"] == 1]
    rows += [("skipped update", updates)] * bool(len(updates))
    rows += [("skipped sample", np.sort(history.skips.steps))] * bool(history.skips.count)
    return rows[:12]
