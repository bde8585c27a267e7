"""engine.kernels from the config to the model: agreed by all ranks, told in one line, refused with the key's name."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from swin_scale.config_diff import diff_configs
from swin_scale.engine import kernel_choice
from swin_scale.engine.construct import build_model
from swin_scale.engine.kernel_choice import check_kernels, choose_kernels, describe_kernels
from swin_scale.errors import UserError
from swin_scale.models import variant
from tests import runs
from tests.engine.test_engine import make_config
from tests.spawn import spawn_dist

NAME = "swinv2_nano_patch4_window4_32"
CUDA = torch.device("cuda", 0)


def config(kernels="auto", precision="fp32"):
    return make_config(engine={"kernels": kernels, "precision": precision})


@pytest.fixture
def able(monkeypatch):
    """Every device can run Triton."""
    monkeypatch.setattr(kernel_choice, "why_not_triton", lambda device, dtype: None)


def test_the_line_says_who_computes_and_why(able):
    network = variant(NAME)
    assert describe_kernels("auto", network, CUDA, torch.bfloat16).text == "Triton"
    assert "engine.kernels is reference" in describe_kernels("reference", network, CUDA, torch.bfloat16).text
    large = variant(NAME, img_size=320, window_size=40)
    text = describe_kernels("auto", large, CUDA, torch.bfloat16).text
    large = "windows have 1600 tokens, and the kernels take up to 1024"
    assert text == f"Triton; torch for attention in stage 0, as {large}; torch for attention in stage 1, as {large}"
    assert describe_kernels("auto", variant("swin_mlp_nano_patch4_window4_32"), CUDA, torch.float32).text == "Triton"


def test_what_is_certain_is_refused_before_ranks_join(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"engine\.kernels is triton, but there is no CUDA device"):
        check_kernels(config("triton"), variant(NAME))
    check_kernels(config("auto"), variant(NAME))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_kernels(config("triton"), variant(NAME))
    with pytest.raises(UserError, match=r"4 channels.*\(stage 1\)"):
        check_kernels(config("triton"), variant(NAME, num_heads=(2, 16)))


def test_the_choice_may_change_at_a_resume():
    changes = diff_configs(config("auto"), config("reference"))
    assert [(change.key, change.grade) for change in changes] == [("engine.kernels", "safe")]


@pytest.mark.parametrize("agreed", ["triton", "reference", None])
def test_the_model_is_built_with_what_was_agreed(agreed):
    model, _ = build_model(config("auto"), SimpleNamespace(is_main=True), {}, kernels=agreed)
    assert {module.kernels for module in model.modules() if hasattr(module, "kernels")} == {agreed or "auto"}


def chosen_case(dist, kernels, obstacles):
    """What this rank ends with when rank r can run Triton unless `obstacles[r]` says why not."""
    device = dataclasses.replace(dist, device=CUDA)
    kernel_choice.why_not_triton = lambda device, dtype: obstacles[dist.rank]
    try:
        result = choose_kernels(config(kernels), device, variant(NAME))
    except UserError as error:
        return str(error)
    return result.mode, result.text


@pytest.mark.parametrize(
    ("kernels", "obstacles", "outcome"),
    [
        ("auto", (None, None), ("auto", "Triton")),
        ("triton", (None, None), ("triton", "Triton")),
        ("auto", (None, "it is old"), ("reference", "torch, as it is old (rank 1)")),
        ("auto", ("it is old", "it is old"), ("reference", "torch, as it is old")),
        ("triton", (None, "it is old"), "engine.kernels is triton, but it is old (rank 1); set engine.kernels=auto"),
        ("reference", (None, "it is old"), ("reference", "torch, as engine.kernels is reference")),
    ],
)
def test_ranks_agree(kernels, obstacles, outcome):
    for got in spawn_dist(2, chosen_case, kernels, obstacles):
        assert got == outcome or (isinstance(got, str) and got.startswith(outcome))


def test_a_run_logs_and_records_its_choice_and_resumes_with_another(digits, tmp_path):
    options = {"nproc": 1, "train__global_batch": 4, "checkpoint__every_steps": 1}
    for steps, kernels in ((1, "reference"), (2, "auto")):
        result = runs.run(tmp_path / "run", digits[0], engine__kernels=kernels, train__max_steps=steps, **options)
        assert result.returncode == 0, result.stderr
    first, second = (row["environment"]["kernels"] for row in runs.events(tmp_path / "run", "start"))
    assert first == "torch, as engine.kernels is reference"
    assert second == "torch, as there is no CUDA device"
    log = (tmp_path / "run/logs/rank0.log").read_text()
    assert re.findall(r"kernels: (torch.*)", log) == [first, second]
    assert 'engine.kernels: "reference" -> "auto" (safe)' in log


def test_a_run_that_cannot_have_triton_is_refused(digits, tmp_path):
    result = runs.run(tmp_path / "run", digits[0], nproc=1, engine__kernels="triton", model__attn_drop_rate=0.1)
    assert result.returncode == 2
    assert "engine.kernels is triton, but there is no CUDA device" in result.stderr
    assert "set engine.kernels=auto" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.proof
def test_a_run_on_triton_follows_the_losses_of_torch(digits, tmp_path, monkeypatch):
    """Through the command line under the interpreter, with drop-path and attention dropout, and over a resume."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    small = {"model__name": "swin_nano_patch4_window4_32", "model__depths": "[2]", "model__num_heads": "[2]"}
    noise = {"model__drop_path_rate": 0.2, "model__attn_drop_rate": 0.1}
    options = {"nproc": 1, "train__global_batch": 2, "checkpoint__every_steps": 1, **small, **noise}
    plans = {"torch": [(2, "reference")], "triton": [(1, "triton"), (2, "triton")]}
    rows = {}
    for name, parts in plans.items():
        for steps, kernels in parts:
            options |= {"engine__kernels": kernels, "train__max_steps": steps}
            # The interpreter is chosen as Triton is imported.
            result = runs.run(tmp_path / name, digits[0], cold=name == "triton", **options)
            assert result.returncode == 0, result.stderr
        rows[name] = [value for _, loss, norm, _ in runs.trajectory(tmp_path / name) for value in (loss, norm)]
    assert runs.events(tmp_path / "triton", "start")[0]["environment"]["kernels"] == "Triton"
    assert rows["triton"] == pytest.approx(rows["torch"], rel=1e-5)
    print(f"proof: losses and gradient norms on torch {rows['torch']}, on Triton {rows['triton']}")  # noqa: T201
