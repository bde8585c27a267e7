"""Who serves a call, and the sentence that says why Triton does not."""

import importlib.metadata
import subprocess
import sys

import pytest
import torch

from swin_scale.errors import UserError
from swin_scale.kernels import choice, use_triton, why_not_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    """No answer of before is remembered, nor one of here afterwards."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice._ask.cache_clear()
    yield
    choice._ask.cache_clear()


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with one H100 and gcc, as far as can be asked; returns what it is asked from."""
    facts = {"capability": (9, 0), "asked": 0}

    def capability(device):
        facts["asked"] += 1
        return facts["capability"]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Chip X")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.6.0")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(choice.shutil, "which", {"gcc": "/usr/bin/gcc"}.get)
    monkeypatch.setattr(choice.sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    (tmp_path / "Python.h").touch()
    return facts


def test_nothing_is_in_the_way_on_a_gpu(gpu):
    assert why_not_triton(CUDA, torch.bfloat16, head_dim=32, tokens=64) is None
    assert use_triton("auto", CUDA, torch.bfloat16, head_dim=32, tokens=64)
    assert use_triton("triton", CUDA, torch.float16)
    assert not use_triton("reference", CUDA, torch.float16)
    assert gpu["asked"] == 2, "the device is asked once for each dtype, then never"


@pytest.mark.parametrize(
    ("dtype", "shape", "words"),
    [
        (torch.float64, {}, ["float64", "float16, bfloat16, float32"]),
        (torch.float16, {"head_dim": 8, "tokens": 64}, ["8 channels", "16 to 128"]),
        (torch.float16, {"head_dim": 36, "tokens": 64}, ["36 channels", "multiples of 8"]),
        (torch.float16, {"head_dim": 136, "tokens": 64}, ["136 channels"]),
        (torch.float16, {"head_dim": 32, "tokens": 1600}, ["1600 tokens", "1024"]),
    ],
)
def test_types_and_shapes_that_no_kernel_takes(gpu, dtype, shape, words):
    reason = why_not_triton(CUDA, dtype, **shape)
    assert all(word in reason for word in words)
    assert not use_triton("auto", CUDA, dtype, **shape)
    with pytest.raises(UserError, match=r"engine.kernels is triton, but .*; set engine.kernels=auto"):
        use_triton("triton", CUDA, dtype, **shape)


def test_limits_themselves_are_served(gpu):
    for head_dim in (16, 24, 128):
        assert use_triton("auto", CUDA, torch.float16, head_dim=head_dim, tokens=1024)


def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("where", "name", "value", "words"),
    [
        (torch.cuda, "get_device_capability", lambda device: (7, 5), ["Chip X", "7.5", "8.0"]),
        (torch.cuda, "is_available", lambda: False, ["CUDA"]),
        (torch.version, "hip", "6.2", ["NVIDIA", "AMD"]),
        (importlib.metadata, "version", lambda name: "3.5.1", ["triton 3.5.1", "3.6"]),
        (importlib.metadata, "version", absent, ["not installed", "pip install triton"]),
    ],
)
def test_machines_that_cannot(monkeypatch, gpu, where, name, value, words):
    monkeypatch.setattr(where, name, value)
    reason = why_not_triton(CUDA, torch.float16)
    assert all(word in reason for word in words)
    assert not use_triton("auto", CUDA, torch.float16)


def test_what_triton_compiles_its_stub_with_is_looked_for_before_the_first_launch(monkeypatch, gpu, tmp_path):
    def reason():
        choice._ask.cache_clear()
        return why_not_triton(CUDA, torch.float16)

    assert reason() is None
    monkeypatch.setenv("CC", "icx")  # Triton takes this one and looks no further
    assert "CC=icx is none" in reason() and "C compiler" in reason()
    assert not use_triton("auto", CUDA, torch.float16)
    monkeypatch.setenv("CC", "gcc")
    assert reason() is None
    monkeypatch.delenv("CC")
    for compilers in ({"clang": "/usr/bin/clang"}, {}):
        monkeypatch.setattr(choice.shutil, "which", compilers.get)
        assert (reason() is None) == bool(compilers)
    assert "CC is not set" in reason() and "gcc or clang" in reason()
    monkeypatch.setattr(choice.shutil, "which", {"gcc": "/usr/bin/gcc"}.get)
    (tmp_path / "Python.h").unlink()
    assert f"{tmp_path}/Python.h" in reason() and "python3-dev" in reason()
    with pytest.raises(UserError, match=r"engine.kernels is triton, but .*Python.h.*; set engine.kernels=auto"):
        use_triton("triton", CUDA, torch.float16)


@pytest.mark.parametrize(
    ("version", "capability", "dtype", "fits"),
    [
        ("3.7.1", (10, 0), torch.bfloat16, False),
        ("3.8.0", (12, 0), torch.float16, False),
        ("3.7.1", (10, 0), torch.float32, True),
        ("3.7.1", (9, 0), torch.bfloat16, True),
        ("3.9.0", (10, 0), torch.bfloat16, True),
    ],
)
def test_a_compiler_that_fails_on_newer_gpus_is_not_asked_to(monkeypatch, gpu, version, capability, dtype, fits):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    gpu["capability"] = capability
    reason = why_not_triton(CUDA, dtype)
    assert (reason is None) is fits
    assert fits or (version in reason and "3.9" in reason)


def test_later_versions_are_compared_as_numbers(monkeypatch, gpu):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.10.0+git1")
    assert use_triton("auto", CUDA, torch.float16)


def test_on_a_cpu_only_the_interpreter_and_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.6.0")
    with pytest.raises(UserError, match=r"no CUDA device.*TRITON_INTERPRET"):
        use_triton("triton", CPU, torch.float32)
    assert not use_triton("auto", CPU, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton("triton", CPU, torch.float32)
    assert not use_triton("auto", CPU, torch.float32)
    assert "bfloat16" in why_not_triton(CPU, torch.bfloat16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET" in why_not_triton(CPU, torch.float32)


def test_other_devices():
    assert "meta" in why_not_triton(torch.device("meta"), torch.float32)


def test_the_compiler_takes_the_answer_as_a_constant():
    def marked():
        """Carries what torch.compiler puts there."""

    torch.compiler.assume_constant_result(marked)
    assert vars(marked).items() <= vars(choice._why_not_here).items()


def test_models_run_without_triton():
    """Importing brings in none of it, and a step on a CPU no kernel of ours (torch itself may import it then)."""
    program = """
import sys, torch
import swin_scale.kernels, swin_scale.moe.layer
from swin_scale.models import create_model
model = create_model("swin_moe_nano_patch4_window4_32", attn_drop_rate=0.1, activation_checkpointing="selective")
print([name for name in sys.modules if name.partition(".")[0] == "triton"])
logits, aux = model(torch.randn(2, 3, 32, 32))
(logits.sum() + aux).backward()
ours = {name: vars(module) for name, module in sys.modules.items() if name.startswith("swin_scale.kernels")}
print([name for name, names in ours.items() if {"triton", "tl"} & names.keys()])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["[]", "[]"], result.stdout + result.stderr
