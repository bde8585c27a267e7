"""Mixture-of-experts layers: gate, dispatch, experts, and what a layer tells of its routing.

A layer is arithmetic plus explicit process groups; `None` is one process. Order of a pass:
`layer.MoEMlp` -> `router.Router` (who goes where) -> `dispatch` (rows to experts and back) -> `experts.Experts`.
"""

from swin_scale.moe.config import MoEConfig
from swin_scale.moe.layer import MoEMlp
from swin_scale.moe.stats import RoutingStats
from swin_scale.moe.tutel import TutelMoEMlp

__all__ = ["MoEConfig", "MoEMlp", "RoutingStats", "TutelMoEMlp"]
