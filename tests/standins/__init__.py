"""Packages that stand in for those that cannot be installed here.

`nvidia`: NVIDIA Apex, with the signatures, the state and the documented arithmetic of the parts used, in plain torch.
`web`: the web toolkit on PyPI that is called apex too, which fails as it is imported beside a current pyramid.
"""

import sys
from pathlib import Path

NVIDIA = Path(__file__).parent / "nvidia"
WEB = Path(__file__).parent / "web"


def install_apex() -> None:
    """NVIDIA's stand-in on the path of this process, which is a test's own."""
    sys.path.insert(0, str(NVIDIA))


def forget_apex() -> None:
    """What was imported of a stand-in, once its directory has left the path."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("apex", "fused_layer_norm_cuda", "amp_C"):
            del sys.modules[name]


def install_fused_adam_op() -> None:
    """DeepSpeed's FusedAdam without its CUDA op: the same update of lists of tensors in plain torch."""
    from types import SimpleNamespace

    from deepspeed.ops.adam import fused_adam

    op = SimpleNamespace(multi_tensor_adam=_multi_tensor_adam)
    fused_adam.FusedAdamBuilder = lambda: SimpleNamespace(load=lambda: op)


def _multi_tensor_adam(chunk, noop, lists, lr, beta1, beta2, eps, step, decoupled, bias_correction, weight_decay):
    assert decoupled and bias_correction
    for grad, parameter, m, v in zip(*lists, strict=True):
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps) + weight_decay * parameter
        parameter.add_(update, alpha=-lr)
