"""What `optim.name` selects: one step of each against plain fp64, their bits, their state, their refusals.

NVIDIA Apex and the CUDA op of DeepSpeed's FusedAdam are stand-ins (`tests.standins`).
"""

import json

import pytest
import torch
from torch import nn

from swin_scale.checkpoint import Checkpoint
from swin_scale.config import Optim
from swin_scale.config_diff import diff_configs
from swin_scale.config_load import config_from_values
from swin_scale.engine.fragments import import_deepspeed
from swin_scale.engine.optim import param_groups
from swin_scale.engine.optimizers import applied_updates, build_optimizer, check_optimizer, ensure_state, state_layout
from swin_scale.errors import UserError
from tests.engine import test_experts
from tests.engine.test_engine import make_config, proof, resume_case, run_steps
from tests.engine.test_stages import V2, hand_over, leg_case
from tests.spawn import spawn_dist
from tests.standins import NVIDIA, WEB, forget_apex, install_apex, install_fused_adam_op

OPTIM = {"lr": 1.0, "weight_decay": 0.1, "betas": (0.7, 0.9), "eps": 0.05}
LR = 0.01


@pytest.fixture
def standins(monkeypatch):
    """Both stand-ins in this process; gives the module `deepspeed`."""
    deepspeed = import_deepspeed(on_gpu=False)
    from deepspeed.ops.adam import fused_adam

    monkeypatch.setattr(fused_adam, "FusedAdamBuilder", fused_adam.FusedAdamBuilder)
    install_fused_adam_op()
    monkeypatch.syspath_prepend(str(NVIDIA))
    yield deepspeed
    forget_apex()


def adamw_by_hand(p, grads, decay, optim):
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m = optim.betas[0] * m + (1 - optim.betas[0]) * g
        v = optim.betas[1] * v + (1 - optim.betas[1]) * g * g
        update = (m / (1 - optim.betas[0] ** t)) / ((v / (1 - optim.betas[1] ** t)).sqrt() + optim.eps)
        p = p - LR * (update + decay * p)
    return p


def lamb_by_hand(p, grads, decay, optim):
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m = optim.betas[0] * m + (1 - optim.betas[0]) * g
        v = optim.betas[1] * v + (1 - optim.betas[1]) * g * g
        update = (m / (1 - optim.betas[0] ** t)) / ((v / (1 - optim.betas[1] ** t)).sqrt() + optim.eps) + decay * p
        p = p - LR * update * (p.norm() / update.norm() if decay else 1)
    return p


def sgd_by_hand(p, grads, decay, optim):
    buffer = None
    for g in grads:
        g = g + decay * p
        buffer = g if buffer is None else optim.momentum * buffer + g
        p = p - LR * (g + optim.momentum * buffer)
    return p


RULES = {
    "adamw": adamw_by_hand,
    "fused_adam": adamw_by_hand,
    "apex_fused_adam": adamw_by_hand,
    "apex_fused_lamb": lamb_by_hand,
    "sgd": sgd_by_hand,
}


def check_update_rule(name, deepspeed, device="cpu"):
    """Three updates of a decayed and an undecayed parameter, whose gradients are longer than FusedLAMB would allow."""
    optim = Optim(name=name, **OPTIM)
    dtype = torch.float64 if name in ("adamw", "sgd") else torch.float32
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(8, 8, dtype=dtype, device=device)
    start = {key: p.detach().double().clone() for key, p in linear.named_parameters()}
    grads = {
        key: 3 * torch.randn(3, *p.shape, generator=generator).to(device, dtype) for key, p in linear.named_parameters()
    }
    optimizer = build_optimizer(param_groups(linear, optim), optim, deepspeed=deepspeed)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = LR
        for key, p in linear.named_parameters():
            p.grad = grads[key][step].clone()
        optimizer.step()
    for key, p in linear.named_parameters():
        expected = RULES[name](start[key], grads[key].double(), 0.1 if key == "weight" else 0.0, optim)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(p.detach().double(), expected, rtol=tolerance, atol=tolerance)
        assert not torch.allclose(p.detach().double(), start[key], atol=1e-3)
    layout = state_layout(optim)
    kept = {key for entry in optimizer.state.values() for key, value in entry.items() if value is not None} - {"step"}
    assert kept == set(layout.moments)
    assert applied_updates(optimizer, layout) == (0 if name == "sgd" else 3)


@pytest.mark.parametrize("name", RULES)
def test_update_rule(name, standins):
    """Decay, betas and eps mean the same everywhere; long gradients are not clipped a second time."""
    check_update_rule(name, standins)


def test_lamb_by_hand(standins):
    """|w| = 5; the first update is sign(g) + 0.1 w = (1.3, -0.6) of length sqrt(2.05), so w moves 5 % of |w| along it.

    The undecayed bias moves by the learning rate. The gradient, of length 130, is taken whole.
    """
    optim = Optim(name="apex_fused_lamb", lr=1.0, weight_decay=0.1, eps=1e-12)
    w, b = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([7.0]))
    groups = [{"params": [w], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}]
    optimizer = build_optimizer(groups, optim)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    w.grad, b.grad = torch.tensor([50.0, -120.0]), torch.tensor([0.5])
    optimizer.step()
    ratio = 5 / 2.05**0.5
    torch.testing.assert_close(w.detach(), torch.tensor([3 - 0.05 * ratio * 1.3, 4 + 0.05 * ratio * 0.6]))
    torch.testing.assert_close(b.detach(), torch.tensor([6.95]))
    torch.testing.assert_close(optimizer.state[w]["exp_avg"], torch.tensor([5.0, -12.0]))


def test_ranks_that_round_the_norm_otherwise_clip_alike():
    (norm, weights), other = spawn_dist(2, clip_case)
    assert other == (norm, weights)
    assert norm == 2.0, "the smallest"


def clip_case(dist):
    exact = torch.nn.utils.get_total_norm
    torch.nn.utils.get_total_norm = lambda grads: exact(grads) * (1 + dist.rank * 2**-20)
    w = nn.Parameter(torch.zeros(4))
    w.grad = torch.ones(4)
    optim = Optim(name="sgd", lr=1.0, momentum=0.0, clip_grad=1.0)
    optimizer = build_optimizer([{"params": [w]}], optim, guarded_by=torch.distributed.group.WORLD)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    return float(optimizer.grad_norm), w.tolist()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_element_gets_the_same_bits_wherever_it_lies(name):
    """Shards of another world size begin elsewhere, and ranks may have other thread counts."""
    optim = Optim(lr=1.0, name=name)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(5, 100_003, generator=generator)

    def train(offset: int) -> torch.Tensor:
        parameter = nn.Parameter(numbers[0, offset:].clone())
        optimizer = build_optimizer([{"params": [parameter], "weight_decay": 0.05}], optim)
        optimizer.param_groups[0]["lr"] = 1e-3
        for grad in numbers[1:]:
            parameter.grad = grad[offset:].clone()
            optimizer.step()
        return parameter.detach()

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = train(0)
        torch.set_num_threads(2)
        for offset in (0, 1, 5, 1003):
            assert torch.equal(train(offset), whole[offset:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["adamw", "fused_adam", "apex_fused_adam", "apex_fused_lamb"])
def test_state_made_before_an_update_is_what_the_update_would_make(name, standins):
    """With the count of a checkpoint, the bias correction goes on from there."""
    optim = Optim(name=name, **OPTIM)
    layout = state_layout(optim)

    def step_from(count: float | None) -> tuple[torch.Tensor, float]:
        p = nn.Parameter(torch.ones(4))
        optimizer = build_optimizer([{"params": [p], "weight_decay": 0.1}], optim, deepspeed=standins)
        if count is not None:
            ensure_state(optimizer, layout, optimizer.param_groups[0], p, count)
        ensure_state(optimizer, layout, optimizer.param_groups[0], p)
        optimizer.param_groups[0]["lr"] = LR
        p.grad = torch.tensor([0.01, 0.1, 1.0, -1.0])
        optimizer.step()
        return p.detach(), applied_updates(optimizer, layout)

    fresh, one = step_from(None)
    again, also_one = step_from(0.0)
    later, eight = step_from(7.0)
    assert (one, also_one, eight) == (1, 1, 8)
    assert torch.equal(fresh, again) and not torch.equal(fresh, later)


LEGS = [("adamw", 2, 1), ("apex_fused_adam", 1, 2), ("fused_adam", 3, 2)]
MORE = [
    ("fused_adam", 1, 3),
    ("apex_fused_adam", 2, 3),
    ("fused_adam", 0, 2),
    ("adamw", 3, 2),
    ("apex_fused_adam", 0, 2),
]


@pytest.mark.parametrize("legs", [LEGS, proof(MORE)], ids=["some", "others"])
def test_a_run_goes_on_with_any_of_the_adamw(tmp_path, legs):
    """Through checkpoints, stages and ranks on one trajectory; what is loaded and saved again is bit-equal."""
    course, _ = spawn_dist(1, run_steps, make_config(), 2 * len(legs), {})[0]
    losses = []
    for i, (name, stage, world) in enumerate(legs):
        config = make_config(optim={"name": name, "ema_decay": 0.9}, engine={"zero_stage": stage})
        results = spawn_dist(world, with_standins, leg_case, config, tmp_path, 2 * i, 2 * i + 2)
        losses += results[0]
        if i:
            hand_over(tmp_path, 2 * i)
    for (loss, norm, *_), (expected_loss, expected_norm, *_) in zip(losses, course, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-3)
    with Checkpoint.open(tmp_path / f"step_{2 * len(legs):08d}") as checkpoint:
        assert checkpoint.state["optimizer_step"] == 2 * len(legs)


def with_standins(dist, case, *args):
    install_apex()
    install_fused_adam_op()
    return case(dist, *args)


@pytest.mark.proof
@pytest.mark.parametrize("name", ["fused_adam", "apex_fused_adam"])
def test_spread_experts_are_updated_as_on_one_process(name):
    expected = test_experts.run(1, test_experts.moe_config(1, 0), 5)
    config = test_experts.moe_config(2, 2, optim={"name": name})
    results, shares = zip(*spawn_dist(2, with_standins, test_experts.steps_case, config, 5, {}))
    test_experts.assert_same((results[0], test_experts.gathered(shares, 2)), expected)


@pytest.mark.parametrize(
    ("name", "stage", "precision", "micro"),
    [
        ("apex_fused_lamb", 0, "fp32", "auto"),
        proof("apex_fused_adam", 1, "bf16", 3),
        proof("apex_fused_adam", 2, "fp16", "auto"),
        proof("fused_adam", 1, "bf16", 3),
        proof("fused_adam", 3, "fp16", "auto"),
    ],
)
def test_resume_is_bit_equal(tmp_path, name, stage, precision, micro):
    config = make_config(
        engine={"zero_stage": stage, "precision": precision},
        train={"micro_batch": micro},
        optim={"name": name, "ema_decay": 0.9},
    )
    for whole, resumed in spawn_dist(2, with_standins, resume_case, config, tmp_path):
        assert whole[0] == resumed[0]
        for a, b in zip(whole[1:], resumed[1:], strict=True):
            assert a.keys() == b.keys()
            assert all((value == b[key]).all() for key, value in a.items())


def values(**sections):
    base = {"run": {"dir": "r"}, "data": {"train": ["d"]}, "model": {"name": "m"}, "train": {"global_batch": 8}}
    return base | {"optim": {"lr": 1.0} | sections.pop("optim", {})} | sections


@pytest.mark.parametrize(
    ("name", "engine", "said"),
    [
        ("apex_fused_lamb", {}, r"optim\.name is apex_fused_lamb.* whole tensors.*zero_stage 1 .*engine\.zero_stage=0"),
        ("apex_fused_lamb", {"zero_stage": 3}, r"zero_stage 3 .*optim\.name=adamw"),
        ("apex_fused_adam", {"zero_stage": 3}, r"optim\.name is apex_fused_adam.*zero_stage 3.*optim\.name=fused_adam"),
        ("apex_fused_adam", {"offload": "optimizer"}, r"engine\.offload optimizer.*optim\.name=adamw"),
        ("fused_adam", {"offload": "optimizer"}, r"optim\.name is fused_adam.*engine\.offload=none"),
    ],
)
def test_what_an_optimizer_cannot(name, engine, said):
    with pytest.raises(UserError, match=said):
        config_from_values(values(optim={"name": name}, engine=engine))


def test_what_this_machine_lacks(monkeypatch):
    for name in ("adamw", "sgd"):
        check_optimizer(Optim(lr=1.0, name=name))
    with pytest.raises(UserError, match=r"optim\.name is fused_adam, but .*CUDA devices only.* set optim\.name=adamw"):
        check_optimizer(Optim(lr=1.0, name="fused_adam"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(UserError, match=r"fused_adam, but .*no CUDA toolkit.*DS_BUILD_FUSED_ADAM"):
        check_optimizer(Optim(lr=1.0, name="fused_adam"))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    check_optimizer(Optim(lr=1.0, name="fused_adam"))
    with pytest.raises(UserError, match=r"optim\.name is apex_fused_adam, but NVIDIA Apex is not installed"):
        check_optimizer(Optim(lr=1.0, name="apex_fused_adam"))
    monkeypatch.syspath_prepend(str(WEB))
    with pytest.raises(UserError, match=r"optim\.name is apex_fused_lamb, but .* web toolkit"):
        check_optimizer(Optim(lr=1.0, name="apex_fused_lamb"))
    monkeypatch.syspath_prepend(str(NVIDIA))
    try:
        check_optimizer(Optim(lr=1.0, name="apex_fused_lamb"))
    finally:
        forget_apex()


def test_exit_2_before_any_process_group(tmp_path, capsys):
    from swin_scale.cli import main

    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(values(run={"dir": str(tmp_path / "run")}, model={"name": V2})))
    for setting in ("optim.name=fused_adam", "optim.name=apex_fused_adam", "engine.layer_norm=apex"):
        assert main(["train", str(config), setting]) == 2
        assert setting.replace("=", " is ") in capsys.readouterr().err
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("before", "after", "grade"),
    [
        ("adamw", "apex_fused_adam", "safe"),
        ("fused_adam", "adamw", "safe"),
        ("adamw", "sgd", "impossible"),
        ("apex_fused_lamb", "adamw", "impossible"),
    ],
)
def test_changes_of_optimizer_at_a_resume(before, after, grade):
    engine = {"zero_stage": 0, "precision": "fp32"}
    configs = [config_from_values(values(optim={"name": name}, engine=engine)).config for name in (before, after)]
    [change] = diff_configs(*configs)
    assert change.grade == grade
