"""FusedAdam and FusedLAMB: one count of updates per group, moments in fp32, fp16, bf16 or fp32 parameters."""

import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
    ):
        assert bias_correction and adam_w_mode and not amsgrad
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def step(self, closure=None):
        for group in self.param_groups:
            group["params"][0].device  # noqa: B018 - Apex reads it, so a group without parameters fails
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(_adam(self.state[p], p, p.grad.data.float(), group), alpha=-group["lr"])


class FusedLAMB(torch.optim.Optimizer):
    """LAMB (You et al., 2020) as Apex documents it.

    Gradients are divided by |all gradients| / max_grad_norm where that is above 1. The update u is that of AdamW; it is
    scaled by |p| / |u| (1 if either is 0) for tensors with weight decay, for all with `use_nvlamb`. Gradients are
    overwritten with the updates.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        amsgrad=False,
        adam_w_mode=True,
        grad_averaging=True,
        set_grad_none=True,
        max_grad_norm=1.0,
        use_nvlamb=False,
    ):
        assert bias_correction and adam_w_mode and grad_averaging and not amsgrad
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_grad_norm, self.use_nvlamb = max_grad_norm, use_nvlamb

    def step(self, closure=None):
        grads = [p.grad.data for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        too_long = norm / self.max_grad_norm if norm > self.max_grad_norm else 1.0
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.grad.data.copy_(_adam(self.state[p], p, p.grad.data.float() / too_long, group))
                ratio = 1.0
                if self.use_nvlamb or group["weight_decay"]:
                    weight, update = p.data.norm(), p.grad.data.norm()
                    ratio = float(weight / update) if weight and update else 1.0
                p.data.add_(p.grad.data, alpha=-group["lr"] * ratio)


def _adam(state, p, grad, group):
    """The update of AdamW, decay included, before the learning rate; moments move on."""
    if p.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise RuntimeError("only fp16, bf16 and fp32")
    if not state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.data).float(), torch.zeros_like(p.data).float()
    (beta1, beta2), step = group["betas"], group["step"]
    m = state["exp_avg"].lerp_(grad, 1 - beta1)
    v = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + group["eps"])
    return update + group["weight_decay"] * p.data
