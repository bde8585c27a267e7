"""What a run trains for. All that differs between tasks is in their files here; engine, data and `train` know none."""

from __future__ import annotations

from collections.abc import Mapping

from swin_scale.tasks.classify import Classify
from swin_scale.tasks.simmim import MaskedImages
from swin_scale.tasks.task import Task

TASKS: Mapping[str, type[Task]] = {"classify": Classify, "simmim": MaskedImages}
"""By the value of ``task`` in a config."""

__all__ = ["TASKS", "Classify", "MaskedImages", "Task"]
