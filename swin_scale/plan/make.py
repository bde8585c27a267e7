"""From a config and names of hardware to a plan, and what to say where it does not fit."""

from __future__ import annotations

from swin_scale.config import Config
from swin_scale.errors import UserError
from swin_scale.plan.hardware import find_gpu, find_interconnect
from swin_scale.plan.report import Plan
from swin_scale.plan.request import read_request
from swin_scale.plan.settings import STORAGE, fewest_gpus, forecast, saving, search
from swin_scale.plan.traffic import Cluster


def make_plan(
    config: Config,
    *,
    ranks: int,
    gpu: str,
    gpus_per_node: int = 8,
    interconnect: str | None = None,
    samples: int | None = None,
    storage: float = STORAGE,
    searching: bool = False,
) -> Plan:
    """What `config` needs on `ranks` GPUs of that name. Nothing is allocated and no shards are needed.

    Args:
        interconnect: between nodes; None: the usual one of the GPU.
        samples: training images of an epoch; None: by the manifests, or by the number of classes.
        storage: bytes/s at which a node writes checkpoints.
        searching: also look for all settings that fit.

    Raises UserError for unknown names, counts that do not divide, and models that cannot be.
    """
    kind = find_gpu(gpu)
    for option, value in (("--gpus", ranks), ("--gpus-per-node", gpus_per_node)):
        if value < 1:
            raise UserError(f"{option} is {value}; give at least 1")
    if storage <= 0:
        raise UserError(f"--storage is {storage / 1e9:g} GB/s; give what a node writes, above 0")
    nodes = -(-ranks // gpus_per_node)
    if nodes > 1 and ranks % gpus_per_node:
        near = sorted({max(1, ranks // gpus_per_node) * gpus_per_node, nodes * gpus_per_node})
        raise UserError(
            f"--gpus {ranks} does not fill nodes of {gpus_per_node}; give {' or '.join(map(str, near))}, or "
            "--gpus-per-node"
        )
    cluster = Cluster(gpu=kind, gpus_per_node=gpus_per_node, link=find_interconnect(interconnect, kind))
    request = read_request(config, samples=samples)
    return Plan(
        request=request,
        cluster=cluster,
        ranks=ranks,
        nodes=nodes,
        chosen=forecast(request, cluster, ranks),
        saving=saving(request, ranks=ranks, nodes=nodes, storage=storage),
        found=search(request, cluster, ranks) if searching else (),
    )


def refusal(plan: Plan) -> str | None:
    """What to say of a plan whose setting does not fit its GPUs: what would; None if it fits."""
    chosen = plan.chosen
    if chosen.fits:
        return None
    short = (
        f"a rank needs {chosen.memory.peak / 1e9:.1f} GB and a {plan.cluster.gpu.name} has "
        f"{chosen.usable / 1e9:.1f} GB to use"
    )
    found = plan.found or search(plan.request, plan.cluster, plan.ranks)
    if found:
        return f"{short}; what fits and costs least: {found[0].keys}"
    more = fewest_gpus(plan.request, plan.cluster, plan.ranks)
    if more is not None:
        return f"{short}, and no ZeRO stage, micro-batch, recomputation or offload fits {plan.ranks}; take {more} GPUs"
    return f"{short}, and nothing fits up to {64 * plan.ranks} of them; take GPUs with more memory, or a smaller model"
