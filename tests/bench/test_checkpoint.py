import json

import pytest
import torch

from swin_scale.bench import checkpoint as bench
from swin_scale.bench.checkpoint import bench_checkpoint, check_equal, model_of, parameters_of, save_checkpoint, watched
from swin_scale.checkpoint import Checkpoint, save_safetensors
from swin_scale.errors import SwinScaleError, UserError


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    place = tmp_path_factory.mktemp("bench")
    out = str(place / "result.json")
    result = bench_checkpoint(params=2e5, rounds=1, ranks=1, threads=1, directory=str(place), out=out)
    return result, json.loads((place / "result.json").read_text()), place


def test_result_file_says_what_was_measured(result):
    _, figures, _ = result
    assert {"schema", "bench", "command", "hardware", "versions", "settings", "save", "load", "convert"} == set(figures)
    flags = "--part save convert --params 200000 --rounds 1 --ranks 1 --zero-stage 2 --threads 1"
    assert figures["command"] == f"swin-scale bench checkpoint {flags}"
    assert figures["settings"]["parameters"] == pytest.approx(2e5, rel=0.01)
    assert list(figures["save"]["ratios"]) == ["torch.save", "safetensors", "ours again"]
    assert list(figures["load"]["ratios"]) == ["ours, digests not checked", "torch.load", "safetensors", "ours again"]
    assert figures["save"]["bytes"] == 4 * figures["settings"]["parameters"]
    for what in ("save", "load", "convert"):
        for ratio in figures[what]["ratios"].values():
            assert ratio["pairs"] == 2 and 0 < ratio["lower"] <= ratio["median"] <= ratio["upper"]


def test_a_real_zero_checkpoint_was_converted_by_both_to_the_same_bits(result):
    _, figures, _ = result
    convert = figures["convert"]
    # fp32 master weights and two moments, and bf16 weights beside them.
    assert convert["source_bytes"] > 14 * figures["settings"]["parameters"]
    assert convert["bytes"] > 4 * figures["settings"]["parameters"] and convert["equal_bit_for_bit"]
    for memory in convert["memory"].values():
        assert 0 <= memory["extra_gb"]["min"] <= memory["extra_gb"]["median"] <= memory["extra_gb"]["max"] < 1
    assert set(convert["bars"]) == {"speed", "memory"}


def test_the_table_reads(result):
    text = str(result[0])
    for words in ("torch.save", "digests not checked", "zero_to_fp32", "extra memory", "not a claim on speed: 2 pairs"):
        assert words in text
    assert text.count("reached") == 2


def test_nothing_is_left_behind(result):
    assert [path.name for path in result[2].iterdir()] == ["result.json"]


def test_a_part_alone_says_so(tmp_path):
    result = bench_checkpoint(params=2e5, parts=["save"], rounds=1, threads=1, directory=str(tmp_path))
    assert "convert" not in result.figures and {"save", "load"} < set(result.figures)
    assert "--part save --params" in result.figures["command"] and "zero_to_fp32" not in str(result)


def test_the_stall_and_the_writing_of_a_save_in_the_background(tmp_path):
    result = bench_checkpoint(params=2e5, parts=["async"], rounds=1, threads=1, directory=str(tmp_path))
    figures = result.figures
    assert list(figures["stall"]["ratios"]) == ["torch.save", "torch.save, fsync", "ours again"]
    assert list(figures["write"]["ratios"]) == ["raw", "ours again"]
    assert set(figures["stall"]["bars"]) == {"stall beside torch.save", "stall beside torch.save, fsync"}
    assert figures["write"]["bytes"] == 4 * figures["settings"]["parameters"] and "bar      write" in str(result)
    assert "--part async --params" in figures["command"] and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"GB free, 400000.0 GB are needed; use --dir"):
        bench_checkpoint(params=1e13, directory=str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("params", [2e5, 1e7, 3e7, 3e8])
def test_the_model_has_the_size_asked_for(params):
    name, overrides = model_of(params)
    assert parameters_of(name, overrides) == pytest.approx(params, rel=0.01)


def test_too_small_a_model_is_refused():
    with pytest.raises(UserError, match="below the smallest"):
        model_of(1000)


def test_what_is_saved_is_what_is_read(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(())}
    with Checkpoint.open(save_checkpoint(tmp_path, tensors)) as checkpoint:
        loaded = checkpoint.load_full()
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"a": torch.tensor([0.0, 1.0])}, "a is not the same, bit for bit"),
        ({"a": torch.tensor([-0.0, 1.0], dtype=torch.float64)}, "a is not the same"),
        ({"a": torch.tensor([[-0.0, 1.0]])}, "a is not the same"),
        ({"b": torch.tensor([-0.0, 1.0])}, "differ in 2 names"),
    ],
)
def test_files_that_differ_in_a_bit_are_not_timed(tmp_path, theirs, message):
    save_safetensors(tmp_path / "ours", {"a": torch.tensor([-0.0, 1.0])})
    save_safetensors(tmp_path / "peer", theirs)
    with pytest.raises(SwinScaleError, match=message):
        check_equal(tmp_path / "ours", tmp_path / "peer")
    check_equal(tmp_path / "ours", tmp_path / "ours")


def test_memory_of_a_job_is_its_peak_above_the_start(tmp_path, monkeypatch):
    """A job that holds 200 MB of its own and maps 100 MB for a moment."""
    from swin_scale.bench import zero_jobs

    memory = bench._memory

    def look(pid):
        holds = (tmp_path / "holds").exists()
        found = memory(pid)
        if holds:
            (tmp_path / "holds").unlink()  # it has been seen, and may end
        return found

    (tmp_path / "mapped").write_bytes(bytes(102_000_000))
    monkeypatch.setattr(zero_jobs, "_PROGRAM", PROGRAM)
    monkeypatch.setattr(bench, "_memory", look)
    found = watched("hold", str(tmp_path))
    assert 0.2 <= found["extra_gb"] < 0.25 and 0.1 <= found["mapped_gb"] < 0.12 and found["seconds"] > 0.05


PROGRAM = """
import mmap, time
from pathlib import Path
from swin_scale.bench import zero_jobs

def hold(directory):
    def work():
        held = bytearray(b"x") * 204_000_000  # the kernel's count of pages is not exact
        with open(Path(directory, "mapped"), "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        sum(mapped[i] for i in range(0, len(mapped), 4096))
        seen = Path(directory, "holds")
        seen.touch()
        while seen.exists():
            time.sleep(0.05)
    return work

zero_jobs.JOBS = {"hold": hold}
zero_jobs.main()
"""


def test_a_job_that_fails_is_told_with_its_words():
    with pytest.raises(SwinScaleError, match=r"(?s)ended with code 1.*no_such_place"):
        watched("convert", "/no_such_place", "/no_such_place/out", "swinv2_nano_patch4_window4_32", 1)
    assert bench.SPEED_BAR == 3 and pytest.approx(1 / 3) == bench.MEMORY_BAR
