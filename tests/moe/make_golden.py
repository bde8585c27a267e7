"""Write golden.npz beside this file from a real Tutel: outputs, losses and all gradients of small layers, fp32, CPU.

    PYTHONPATH=<where Tutel is installed> python -m tests.moe.make_golden

Tutel is called directly, not through `swin_scale.moe.tutel`. Written with Tutel 0.3, commit 82af7aa of 2025-01-18,
torch 2.13.0. Its "dropless" (factor 0 and below) is taken without batch-prioritised routing: with it, Tutel drops, as
the outputs of `DROPPING` show.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swin_scale.moe.config import MoEConfig
from tests.moe.cases import DIM, EXPERTS, HIDDEN, fill, inputs

FILE = Path(__file__).with_name("golden.npz")
COSINE_DIM = 6
NOISE_SEED = 11


@dataclass(frozen=True)
class Case:
    router: str
    top_k: int
    factor: float
    batch_prioritized: bool
    training: bool = False

    @property
    def gshard(self) -> bool:
        return self.top_k == 2 and self.batch_prioritized

    @property
    def name(self) -> str:
        order = "prioritized" if self.batch_prioritized else "plain"
        return f"{self.router} k{self.top_k} f{self.factor} {order}{' training' if self.training else ''}"

    def config(self) -> MoEConfig:
        return MoEConfig(
            num_experts=EXPERTS,
            top_k=self.top_k,
            router=self.router,
            capacity_factor=self.factor,
            eval_capacity_factor=self.factor,
            batch_prioritized=self.batch_prioritized,
            normalize_gate=self.gshard,
            balance="gshard" if self.gshard else "load_importance",
            aux_weight=1.0,
            cosine_dim=COSINE_DIM,
            drop=0.0,
        )


CASES = [
    Case(router, top_k, factor, prioritized)
    for router in ("linear", "cosine")
    for top_k in (1, 2)
    for factor in (0.5, 1.0, 1.25, 2.0)
    for prioritized in (False, True)
]
CASES += [
    Case(router, top_k, factor, False) for router in ("linear", "cosine") for top_k in (1, 2) for factor in (0, -1.0)
]
CASES += [Case(router, top_k, 1.25, True, training=True) for router in ("linear", "cosine") for top_k in (1, 2)]
DROPPING = [Case(router, top_k, 0, True) for router in ("linear", "cosine") for top_k in (1, 2)]


def tutel_layer(case: Case) -> torch.nn.Module:
    from tutel.moe import moe_layer

    gate = {"type": "top", "k": case.top_k, "capacity_factor": case.factor, "gate_noise": 1.0, "fp32_gate": True}
    if case.router == "cosine":
        gate |= {"type": "cosine_top", "proj_dim": COSINE_DIM}
    experts = {
        "type": "ffn",
        "num_experts_per_device": EXPERTS,
        "hidden_size_per_expert": HIDDEN,
        "activation_fn": F.gelu,
    }
    return moe_layer(
        gate_type=gate,
        model_dim=DIM,
        experts=experts,
        batch_prioritized_routing=case.batch_prioritized,
        normalize_gate=case.gshard,
        is_gshard_loss=case.gshard,
    ).train(case.training)


def record(case: Case) -> np.ndarray:
    """y, aux and the gradients of one case as one array, in the order of `flat`."""
    module = tutel_layer(case)
    fill(module)
    x, upstream = (t.float() for t in inputs())
    x.requires_grad_()
    torch.manual_seed(NOISE_SEED)
    y = module(x)
    ((y * upstream).sum() + y.l_aux).backward()
    return flat(y, y.l_aux, {name: p.grad for name, p in module.named_parameters()} | {"x": x.grad})


def flat(y: Tensor, aux: Tensor, grads: dict[str, Tensor]) -> np.ndarray:
    """y, aux, then gradients by sorted name, as one fp32 array."""
    parts = [y, aux, *(grads[name] for name in sorted(grads))]
    return torch.cat([part.detach().flatten().float() for part in parts]).numpy()


def given(router: str) -> dict[str, np.ndarray]:
    """The inputs and parameters of every case with `router`, stored so that no generator has to agree."""
    module = tutel_layer(Case(router, 1, 1.0, False))
    fill(module)
    arrays = {name: p.detach().numpy() for name, p in module.named_parameters()}
    arrays["x"], arrays["upstream"] = (t.float().numpy() for t in inputs())
    return {f"{router}/{name}": value for name, value in arrays.items()}


def main() -> None:
    recorded = {case.name: record(case) for case in CASES + DROPPING}
    np.savez_compressed(FILE, **given("linear"), **given("cosine"), **recorded)


if __name__ == "__main__":
    main()
