"""Joining and the host-side exchanges, on real gloo processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed

import swin_scale.engine.dist as dist_module
from swin_scale.engine.devices import choose_device, device_index, mismatch, place
from swin_scale.engine.dist import Dist, init, is_peer_loss, peer_loss, read_env
from swin_scale.engine.layout import Layout
from swin_scale.errors import PeerLostError, UserError
from tests.spawn import free_port, spawn, spawn_dist, torchrun_environment


def _exchange(dist: Dist) -> dict:
    report = {
        "gathered": dist.gather_json("shards", {"rank": dist.rank, "text": "é"}),
        "broadcast": dist.broadcast_json("plan", {"seed": 7} if dist.is_main else None),
        "ints": dist.sum_ints([dist.rank, 2**40]),
        "floats": dist.sum_floats([0.1 * (dist.rank + 1)]),
        "rows": dist.all_gather_ints([dist.rank, -dist.rank]),
        "agree": [dist.all_agree(True), dist.all_agree(dist.rank == 0)],
        "any": [dist.any_rank(False), dist.any_rank(dist.rank == 0)],
    }
    for number in range(20):
        dist.barrier(f"commit {number}")
    tensor = torch.full((3,), float(dist.rank))
    torch.distributed.all_reduce(tensor)
    report["reduced"] = tensor.tolist()
    dist.barrier("last")
    # Only rank 0 deletes what it collected, so only it is sure to be done with it.
    report["keys"] = [key for key in dist.store.list_keys() if "goodbye" not in key and "swin_scale" in key]
    return report


def test_exchanges_of_three_ranks():
    reports = spawn_dist(3, _exchange)
    assert reports[0]["gathered"] == [{"rank": rank, "text": "é"} for rank in range(3)]
    assert [report["gathered"] for report in reports[1:]] == [None, None]
    for report in reports:
        assert report["broadcast"] == {"seed": 7}
        assert report["ints"] == [3, 3 * 2**40]
        assert report["floats"] == [0.1 + 0.2 + 0.1 * 3]
        assert report["rows"] == [[0, 0], [1, -1], [2, -2]]
        assert report["agree"] == [True, False]
        assert report["any"] == [False, True]
        assert report["reduced"] == [3.0] * 3


def _leave_keys(dist: Dist) -> int:
    for number in range(50):
        dist.gather_json("a", number)
        dist.broadcast_json("b", number)
        dist.barrier("c")
    dist.sum_ints([0])
    time.sleep(0.2)  # the last reader deletes after rank 0 went on
    return sum("swin_scale" in key for key in dist.store.list_keys())


def test_keys_are_deleted_after_use():
    # What may be left: the readers that were still on their way out of the last exchange.
    assert max(spawn_dist(2, _leave_keys)) <= 2


def test_one_process_needs_no_port(monkeypatch):
    monkeypatch.setattr(torch.distributed, "TCPStore", None)
    with init(read_env({}), timeout_s=5, device="cpu") as dist:
        assert (dist.rank, dist.world, dist.backend) == (0, 1, "gloo")
        assert torch.distributed.is_initialized()
        tensor = torch.ones(2)
        torch.distributed.all_reduce(tensor)
        assert tensor.tolist() == [1.0, 1.0]
        assert dist.gather_json("tag", {"a": 1}) == [{"a": 1}]
        assert dist.broadcast_json("tag", [1]) == [1]
        assert dist.sum_floats([0.5]) == [0.5]
        assert dist.all_agree(True) and not dist.any_rank(False)
        dist.barrier("tag")
    assert not torch.distributed.is_initialized()


def _lose_one(dist: Dist) -> list[str]:
    dist_module.GOODBYE_S = 0.1  # nobody is left to say it
    if dist.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    messages = []
    # A rank that a busy machine keeps for longer than these short times is not the one to be named.
    if dist.rank == 0:
        dist.store.wait(["rank 2 has sent"])
        with pytest.raises(PeerLostError) as caught:
            dist.gather_json("fragments", 0, timeout_s=0.5)
        messages.append(str(caught.value))
        dist.store.set("rank 0 has given up", "")
    else:
        dist.gather_json("fragments", 0, timeout_s=0.5)
        dist.store.set("rank 2 has sent", "")
        dist.store.wait(["rank 0 has given up"])
    for call in (lambda: dist.barrier("commit", timeout_s=5), lambda: dist.sum_ints([1])):
        with pytest.raises(PeerLostError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_a_dead_rank_is_named():
    first, _, third = spawn_dist(3, _lose_one, may_die=[1])
    assert first[0].startswith("gathering 'fragments': no answer from rank 1 within 0.5 s")
    assert first[1].startswith("barrier 'commit': no answer from rank 1 within 5 s")
    assert third[0].startswith("barrier 'commit': no answer from rank 1 within 5 s")
    assert "another rank died or hung" in first[2]
    assert "another rank died or hung" in third[1]


def _lose_the_first(dist: Dist) -> str:
    dist.sum_ints([1])  # all are through `init`
    if dist.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLostError) as caught:
        dist.broadcast_json("plan", None, timeout_s=20)
    return str(caught.value)


def test_the_death_of_the_store_is_noticed_at_once():
    start = time.monotonic()
    _, message = spawn_dist(2, _lose_the_first, may_die=[0])
    assert message.startswith("broadcast of 'plan': another rank died or hung")
    assert time.monotonic() - start < 15


def _join_alone(rank: str) -> str | None:
    if os.environ["RANK"] != rank:
        return None
    with pytest.raises(PeerLostError) as caught:
        init(read_env(os.environ), timeout_s=1)
    return str(caught.value)


def test_a_rank_that_never_came_is_named():
    assert spawn(3, _join_alone, "0")[0].startswith("joining the run: no answer from rank 1, 2 within 1 s")
    assert "rank 1 could not reach rank 0 at 127.0.0.1:" in spawn(2, _join_alone, "1")[1]


def test_a_taken_port_and_an_unknown_master_are_the_users_to_fix(monkeypatch):
    port = free_port()
    store = torch.distributed.TCPStore("127.0.0.1", port, 1, True)
    environ = torchrun_environment(0, 2, port)
    with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use"):
        init(read_env(environ), timeout_s=2, device="cpu")
    del store
    with pytest.raises(UserError, match=r"MASTER_ADDR 'no-such-host\.invalid' does not resolve"):
        init(read_env({**environ, "MASTER_ADDR": "no-such-host.invalid"}), timeout_s=0.5, device="cpu")


def test_device_of_a_local_rank():
    assert [device_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert device_index(3, 1) == 0  # each task sees only its own GPU
    with pytest.raises(UserError, match="start at most 2 processes"):
        device_index(2, 2)


def test_fp32_is_fp32_and_repeats_itself_on_a_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with torch.backends.cudnn.flags(allow_tf32=True, deterministic=False):
        assert choose_device(Layout(local_rank=1, local_world=2), "cpu").type == "cpu" and not chosen
        assert torch.backends.cudnn.allow_tf32 and not torch.backends.cudnn.deterministic
        assert [choose_device(Layout(local_rank=1, local_world=2), None)] == chosen == [torch.device("cuda", 1)]
        assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic


def test_devices_that_do_not_go_together():
    assert mismatch([("a", "cpu"), ("a", "cpu"), ("b", "cpu")]) is None
    assert mismatch([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1")]) is None
    shared = mismatch([("a", "GPU-1"), ("b", "GPU-2"), ("b", "GPU-3"), ("b", "GPU-2")])
    assert isinstance(shared, UserError)
    assert str(shared) == "ranks 1 and 3 on b share one GPU; start one process per GPU"
    lost = mismatch([("a", "GPU-1"), ("b", "cpu"), ("b", "cpu")])
    assert isinstance(lost, PeerLostError)
    assert str(lost).startswith("rank 1 on b sees no GPU, nor do 1 more, while other ranks have one; check nvidia-smi")
    host, name = place(torch.device("cpu"))
    assert host and name == "cpu"


def _join_with(places: list) -> tuple[str, str] | None:
    environment = read_env(os.environ)
    dist_module.place = lambda device: tuple(places[environment.rank])
    try:
        init(environment, timeout_s=20, device="cpu").close()
    except (UserError, PeerLostError) as error:
        return type(error).__name__, str(error)


def test_every_rank_hears_that_devices_do_not_go_together_before_a_backend_is_made():
    assert spawn(2, _join_with, [["a", "cpu"], ["a", "cpu"]]) == [None, None]
    began = time.monotonic()
    shared = ("UserError", "ranks 0 and 1 on a share one GPU; start one process per GPU")
    assert spawn(2, _join_with, [["a", "GPU-1"], ["a", "GPU-1"]]) == [shared] * 2
    first, second = spawn(2, _join_with, [["a", "GPU-1"], ["b", "cpu"]])
    assert first == second and first[0] == "PeerLostError" and first[1].startswith("rank 1 on b sees no GPU, while")
    assert time.monotonic() - began < 15, "nobody waits for a timeout"


def test_only_errors_of_peers_are_translated():
    with pytest.raises(PeerLostError, match="step 3: another rank died"), peer_loss("step 3"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError, match="shapes"), peer_loss("step 3"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(PeerLostError, match=r"step 3: the GPU of this rank on .* failed \(CUDA"), peer_loss("step 3"):
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    memory = r"^step 3: not enough GPU memory on .*\(CUDA out of memory\); set a smaller train.micro_batch"
    with pytest.raises(UserError, match=memory) as caught, peer_loss("step 3"):
        raise torch.OutOfMemoryError("CUDA out of memory\nmuch more")
    words = ("engine.activation_checkpointing=block", "engine.zero_stage", "plan --search")
    assert all(word in str(caught.value) for word in words)
    for said in ("invalid usage", "invalid argument"):
        misuse = torch.distributed.DistBackendError(f"NCCL error in: x.cpp:1, {said} (run with NCCL_DEBUG=WARN)\nmore")
        assert not is_peer_loss(misuse)
        with pytest.raises(torch.distributed.DistBackendError, match=said), peer_loss("step 3"):
            raise misuse
    system = "NCCL error in: x.cpp:1, unhandled system error\nncclSystemError: invalid argument"
    assert is_peer_loss(torch.distributed.DistBackendError(system))
    assert is_peer_loss(PeerLostError("x"))
    assert not is_peer_loss(ValueError("timed out"))


@pytest.mark.proof
def test_under_torchrun(tmp_path):
    """torchrun serves the store itself: rank 0 joins it as a client, and a restarted attempt finds clean keys."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from swin_scale.engine.dist import init, read_env\n"
        "with init(read_env(os.environ), timeout_s=30, device='cpu') as dist:\n"
        "    dist.barrier('start')\n"
        "    total = dist.sum_ints([dist.rank + 1])\n"
        "    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        sys.exit(3)\n"
        "    gathered = dist.gather_json('ranks', dist.rank)\n"
        "    if dist.is_main:\n"
        f"        open({str(tmp_path / 'out')!r}, 'w').write(f'{{dist.serves_store}} {{total}} {{gathered}}')\n"
    )
    options = ["--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.2", f"--master-port={free_port()}"]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(script)],
        check=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
    )
    assert (tmp_path / "out").read_text() == "False [3] [0, 1]"
