"""Norms, patch merging and MoE permutation compiled for A100, H100/H200 and B200: no spills, shared memory in limits.

Widths are those of every model of the table, each with the op that a model uses there.
"""

import pytest
import torch

from swin_scale.kernels import norms, permutation
from swin_scale.models.geometry import stages
from swin_scale.models.variants import list_models, variant
from tests.kernels import aot

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
IMAGES = 8


def widths():
    """(op, channels) of all models: post-norms, pre-norms, mergings with a norm and without, mixtures of experts."""
    found = set()
    for name in list_models():
        v = variant(name)
        all_stages = stages(v)
        found |= {("post" if v.post_norm else "pre", stage.dim) for stage in all_stages}
        found |= {("merge" if v.post_norm else "merge_norm", 4 * stage.dim) for stage in all_stages[:-1]}
        found |= {("experts", stage.dim) for stage in all_stages if stage.moe_blocks}
    return sorted(found)


def tensor(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(op, C, dtype):
    """The launches of an op of C channels, backward included: forward with drop-path, two choices per token."""
    from swin_scale.kernels import norm_kernels, permutation_kernels

    if op == "experts":
        tokens, gate = tensor(256, C, dtype=dtype), tensor(256, 2, dtype=torch.float32)
        slot, choice = tensor(256, 2, dtype=torch.int64), tensor(400, dtype=torch.int64)
        rows = tensor(400, C, dtype=dtype)
        with aot.recording(permutation_kernels) as calls:
            permutation.launch_spread(tokens, choice, 2, rows)
            permutation.launch_spread(tokens, choice, 2, rows, (gate, rows, gate))
            permutation.launch_collect(rows, slot, gate, tokens)
            permutation.launch_collect(rows, slot, None, tokens)
        return calls
    affine, keep = tensor(C, dtype=dtype), tensor(IMAGES, dtype=torch.float32)
    x = tensor(IMAGES, 8, 8, C, dtype=dtype)
    stats = tensor(2, IMAGES * 64, dtype=torch.float32)
    with aot.recording(norm_kernels) as calls:
        if op == "post":
            norms.launch_forward(x, x, affine, affine, keep, None, x, stats, 1e-5)
            norms.launch_backward(x, None, x, affine, keep, stats, x, None)
        elif op == "pre":
            norms.launch_forward(x, x, affine, affine, keep, x, x, stats, 1e-5)
            norms.launch_backward(x, x, x, affine, keep, stats, x, x)
        else:
            tokens = tensor(IMAGES, 16, 16, C // 4, dtype=dtype)
            if op == "merge":
                norms.launch_move(tokens, x, merge=True)
                norms.launch_move(tokens, x, merge=False)
            else:
                norms.launch_forward(tokens, None, affine, affine, None, None, x, stats, 1e-5, 8)
                norms.launch_backward(x, None, tokens, affine, None, stats, tokens, None, 8)
    return calls


def problems(cases, done):
    """What is wrong with the kernels of the cases (op, channels, dtype, chip); prints their figures, and keeps them in
    `done` by kernel."""
    found = []
    with aot.compiling():
        for op, C, dtype, capability in cases:
            for call in launches(op, C, dtype):
                if (capability, call.key()) in done:
                    continue
                figures = done[capability, call.key()] = aot.compile_call(call, capability)
                name = f"{op} {call.kernel.__name__} C={C} {str(dtype).removeprefix('torch.')} sm_{capability}"
                warps = call.options["num_warps"]
                print(f"{name}: {figures.registers} registers, {warps} warps, {figures.shared} B shared")  # noqa: T201
                found += [f"{name}: {problem}" for problem in figures.problems(capability)]
                if "atomic" in figures.ttir:
                    found.append(f"{name}: atomics")
    return found


def test_the_table_has_models_of_every_kind():
    table = widths()
    assert {("post", 96), ("post", 4096), ("post", 2816), ("pre", 1536), ("experts", 768)} <= set(table)
    assert {("merge", 8192), ("merge_norm", 3072)} <= set(table)


def test_the_extremes_of_the_table_compile_without_spills():
    """Each op at small and large widths, dtypes and chips taken in turn; and rows too long for one program."""
    half, brain, single = DTYPES
    cases = [
        ("post", 96, half, 90),
        ("post", 2816, brain, 100),
        ("post", 4096, single, 80),
        ("pre", 1536, half, 80),
        ("merge", 8192, brain, 90),
        ("merge_norm", 4 * 2816, single, 100),
        ("experts", 1024, brain, 80),
    ]
    assert problems(cases, {}) == []


def test_a_tile_too_large_is_seen_to_spill(monkeypatch):
    monkeypatch.setattr(norms, "BACKWARD_VALUES", 64)
    assert any("spills" in problem for problem in problems([("post", 4096, torch.float32, 90)], {}))


@pytest.mark.proof
@pytest.mark.parametrize("capability", aot.TARGETS)
def test_every_width_of_the_table_compiles_without_spills(capability):
    """Dtypes change from width to width and from chip to chip: all three at every width, all nine pairs in the grid."""
    turn = aot.TARGETS.index(capability)
    cases = [(op, C, DTYPES[(turn + at) % 3], capability) for at, (op, C) in enumerate(widths())]
    done = {}
    assert problems(cases, done) == []
    print(aot.summary("norms, merging and token moves", capability, done.values()))  # noqa: T201
