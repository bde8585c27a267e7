"""The count of kept tensors is what autograd keeps: exactly where nothing is routed, nearly where something is."""

import pytest
import torch

from swin_scale.engine.ds_config import STAGE3_RESIDENT_NUMEL
from swin_scale.kernels import chunked, ops, tuning
from swin_scale.models import attention, create_model, create_simmim, flops
from swin_scale.models import layers as model_layers
from swin_scale.plan import activations, memory
from swin_scale.plan.activations import kept_bytes, layers, peak_bytes
from swin_scale.plan.memory import Parameters
from tests.plan.tracking import Live, loss_of, saved_storages

NANO = "swinv2_nano_patch4_window4_32"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(name, *, device="meta", dtype="fp32", simmim=False, **overrides):
    create = create_simmim if simmim else create_model
    with torch.device(device):
        model = create(name, **overrides)
    return model.to(DTYPES[dtype]).train()


def predicted(model, batch, dtype, *, backend="torch", mode="off", simmim=False):
    itemsize = DTYPES[dtype].itemsize
    return layers(model.variant, batch=batch, itemsize=itemsize, backend=backend, mode=mode, simmim=simmim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (NANO, {}),
        ("swin_nano_patch4_window4_32", {}),
        ("swin_mlp_nano_patch4_window4_32", {}),
        ("swinv2_huge_patch4_window12_192", {"depths": (1, 1, 6, 1), "drop_path_rate": 0.1}),
        ("swinv2_base_patch4_window12to24_192to384_22kto1k_ft", {"depths": (2, 2, 2, 2)}),
        ("swin_tiny_patch4_window7_224", {"patch_norm": False, "num_classes": 21841}),
    ],
)
def test_saved_tensors_are_those_counted(name, overrides, dtype):
    model = build(name, dtype=dtype, **overrides)
    with saved_storages(model) as saved:
        loss_of(model, 2, DTYPES[dtype], "meta")
    # Scales of attention, one number a head, and keeps of drop-path, one an image, are not counted.
    assert kept_bytes(predicted(model, 2, dtype)) == pytest.approx(sum(saved), rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [NANO, "swin_nano_patch4_window4_32", "swinv2_tiny_patch4_window16_256"])
def test_saved_tensors_of_the_kernels(name, dtype, monkeypatch):
    monkeypatch.setattr(ops, "use_triton", lambda *_, **__: True)
    model = build(name, dtype=dtype)
    with saved_storages(model) as saved:
        loss_of(model, 2, DTYPES[dtype], "meta")
    assert kept_bytes(predicted(model, 2, dtype, backend="triton")) == pytest.approx(sum(saved), rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("swin_moe_nano_patch4_window4_32", {}),
        ("swinv2_moe_nano_patch4_window4_32", {"moe": {"capacity_factor": 0.0, "drop": 0.1}}),
        ("swinv2_moe_nano_patch4_window4_32", {"moe": {"router": "cosine", "top_k": 2, "gate_noise": 0.0}}),
        (NANO, {"drop_rate": 0.1}),
    ],
)
def test_saved_tensors_of_mixtures_and_dropout(name, overrides, dtype):
    model = build(name, device="cpu", dtype=dtype, **overrides)
    with saved_storages(model) as saved:
        loss_of(model, 16, DTYPES[dtype], "cpu")
    assert kept_bytes(predicted(model, 16, dtype, backend="cpu")) == pytest.approx(sum(saved), rel=0.03)


@pytest.mark.parametrize(
    ("name", "dtype", "mode", "simmim"),
    [
        (NANO, "fp32", "off", False),
        (NANO, "bf16", "block", False),
        (NANO, "fp32", "selective", False),
        ("swin_tiny_patch4_window7_224", "bf16", "block", False),
        ("swin_tiny_patch4_window7_224", "fp32", "selective", False),
        ("swin_mlp_nano_patch4_window4_32", "fp32", "block", False),
        (NANO, "fp32", "off", True),
        (NANO, "bf16", "selective", True),
    ],
)
def test_what_is_alive_after_forward_and_at_most(name, dtype, mode, simmim, monkeypatch):
    monkeypatch.setattr(ops, "use_triton", lambda *_, **__: True)
    model = build(name, dtype=dtype, simmim=simmim, activation_checkpointing=mode)
    batch = 64 if "nano" in name else 4
    found = predicted(model, batch, dtype, backend="triton", mode=mode, simmim=simmim)
    with Live(model) as live:
        loss = loss_of(model, batch, DTYPES[dtype], "meta")
        kept = live.bytes
        loss.backward()
    assert kept_bytes(found) == pytest.approx(kept, rel=0.01)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    counts = Parameters(shapes=shapes, trained={}).by_layer(found, 1)
    assert sum(counts) == sum(p.numel() for p in model.parameters())
    assert peak_bytes(found, [DTYPES[dtype].itemsize * n for n in counts]) == pytest.approx(live.peak, rel=0.08)


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_mixtures_recomputed(mode):
    model = build("swin_moe_nano_patch4_window4_32", device="cpu", activation_checkpointing=mode)
    found = predicted(model, 64, "fp32", backend="cpu", mode=mode)
    with Live(model) as live:
        loss = loss_of(model, 64, torch.float32, "cpu")
        assert kept_bytes(found) == pytest.approx(live.bytes, rel=0.01)
        loss.backward()
    assert live.peak == pytest.approx(peak_bytes(found), rel=0.15)


def test_recomputation_orders_memory():
    kept = {}
    for mode in ("off", "selective", "block"):
        found = layers(build(NANO).variant, batch=8, itemsize=2, mode=mode)
        kept[mode] = kept_bytes(found)
        assert peak_bytes(found) >= kept[mode]
        assert sum(layer.kept + layer.recomputed for layer in found) == pytest.approx(
            kept_bytes(layers(build(NANO).variant, batch=8, itemsize=2))
        )
    assert kept["off"] > kept["selective"] > kept["block"] > 0


@pytest.mark.parametrize(
    "name",
    ["swinv2_tiny_patch4_window8_256", "swin_base_patch4_window12_384_finetune", "swinv2_huge_patch4_window12_192"],
)
def test_multiply_adds_are_the_published_count(name):
    # Which counts norms and the pooling too, a few thousandths at most.
    v = build(name).variant
    assert sum(layer.macs for layer in layers(v, batch=3, itemsize=2)) == pytest.approx(3 * flops(v), rel=2e-3)


def test_constants_are_those_of_the_code():
    assert activations.CPB_HIDDEN == attention.CPB_HIDDEN
    assert activations.MLP_PIECE == model_layers.MLP_PIECE
    assert activations.WHOLE_WINDOW == tuning.WHOLE_WINDOW
    assert activations.CHUNKS == {"cpu": chunked.CHUNK, "torch": chunked.DEVICE_CHUNK}
    assert memory.STAGE3_RESIDENT == STAGE3_RESIDENT_NUMEL
