"""Whole runs through the command line with one thing broken: what the run does, what it says, what is left."""

import math
import random
import shutil
import signal
import subprocess
import time

import pytest

from swin_scale.checkpoint import MAX_ATTEMPTS, Checkpoint, LoadAttempts
from swin_scale.cli import main
from swin_scale.data.streams import SkipLedger
from swin_scale.data.worker import Skipped
from swin_scale.log import read_jsonl, read_metrics
from tests import runs
from tests.checkpoint.test_store import FILES, damage
from tests.disks import fill, small_disks

SINGLE = {"nproc": 1, "data__workers": 0}


@pytest.fixture(scope="module")
def sixteen(digits, tmp_path_factory):
    """16 undisturbed steps on two ranks; checkpoints at 8, 12 and 16."""
    run_dir = tmp_path_factory.mktemp("sixteen") / "run"
    result = runs.run(run_dir, digits[0], train__max_steps=16)
    assert result.returncode == 0, result.stderr
    return run_dir


@pytest.fixture
def copy(sixteen, tmp_path):
    shutil.copytree(sixteen, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def rng(request):
    return random.Random(request.node.name)


def fell_back(run_dir):
    """(problem, step) of every event that says so."""
    return [(event["problem"], event["step"]) for event in runs.events(run_dir, "fell_back")]


def digests(run_dir):
    """What does not depend on the number of ranks."""
    return [(step, digest) for step, _, _, digest in runs.trajectory(run_dir)]


# -- 4: damaged files --------------------------------------------------------------------------------------------------


@pytest.mark.proof
@pytest.mark.fault(4, "two newest checkpoints: a flipped bit in state.json, fragments.npy cut short")
def test_two_damaged_checkpoints_are_named_and_passed_over(digits, sixteen, copy, rng):
    damage(copy / "checkpoints/step_00000016/state.json", "flip", rng)
    damage(copy / "checkpoints/step_00000012/fragments.npy", "truncate", rng)
    result = runs.run(copy, digits[0], train__max_steps=17)
    assert result.returncode == 0, result.stderr
    [(first, at), (second, then)] = fell_back(copy)
    assert "step_00000016/state.json is damaged" in first and "step_00000012/fragments.npy is damaged" in second
    assert at == then == 8
    assert runs.trajectory(copy)[:16] == runs.trajectory(sixteen)


@pytest.mark.proof
@pytest.mark.parametrize("how", ["flip", "truncate"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.fault(4, "every kind of file in turn: a flipped bit, cut short")
def test_damage_of_each_kind_proof(digits, sixteen, copy, rng, name, how):
    damage(copy / "checkpoints/step_00000016" / name, how, rng)
    result = runs.run(copy, digits[0], train__max_steps=17)
    assert result.returncode == 0, result.stderr
    [(problem, step)] = fell_back(copy)
    assert f"step_00000016/{name}" in problem and step == 12
    assert runs.trajectory(copy)[:16] == runs.trajectory(sixteen)


# -- 5: a checkpoint that ends the process that loads it ---------------------------------------------------------------


def crash(run_dir, train, kind, **settings):
    result = runs.run(run_dir, train, fault=f"{kind}:16", train__max_steps=17, **settings)
    assert result.returncode == (-signal.SIGKILL if settings else 6), result.stderr
    assert fell_back(run_dir) == []


@pytest.mark.fault(5, "process dies in the third load of one checkpoint")
def test_a_checkpoint_that_crashes_loads_is_passed_over(digits, sixteen, copy):
    attempts, newest = LoadAttempts(copy / "checkpoints"), copy / "checkpoints/step_00000016"
    for _ in range(MAX_ATTEMPTS - 1):
        attempts.begin(newest)
    crash(copy, digits[0], "crash_on_load", **SINGLE)
    assert attempts.count(newest) == MAX_ATTEMPTS
    result = runs.run(copy, digits[0], fault="crash_on_load:16", train__max_steps=17, **SINGLE)
    assert result.returncode == 0, result.stderr
    [(problem, step)] = fell_back(copy)
    assert "step_00000016 ended the run 3 times in a row while it was loaded" in problem and step == 12
    assert "3 times in a row" in result.stderr
    assert digests(copy)[:16] == digests(sixteen)
    assert attempts.count(copy / "checkpoints/step_00000012") == 0
    assert runs.steps(copy)[-1] == 17


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["crash_on_load", "crash_after_load"])
@pytest.mark.fault(5, "process dies in every load, or in the first step after it, until no checkpoint is left")
def test_crashing_loads_proof(digits, copy, kind):
    shutil.rmtree(copy / "checkpoints/step_00000008")
    for _ in range(MAX_ATTEMPTS):
        crash(copy, digits[0], kind)
    for _ in range(MAX_ATTEMPTS):
        assert runs.run(copy, digits[0], fault=f"{kind}:12", train__max_steps=17).returncode == 6
    result = runs.run(copy, digits[0], train__max_steps=17)
    assert result.returncode == 4, result.stderr
    assert "none of the 2 checkpoints" in result.stderr and "remove load_attempts.json" in result.stderr
    assert runs.exit_record(copy)["code"] == 4
    (copy / "checkpoints/load_attempts.json").unlink()
    assert runs.run(copy, digits[0], train__max_steps=17).returncode == 0


# -- 6, 7: full, small and read-only disks -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    with small_disks(tmp_path) as mount:
        yield mount


@pytest.mark.parametrize(
    ("options", "what"),
    [
        pytest.param("size=24m", "bytes", marks=pytest.mark.fault(6, "run: disk full from step 6 to 10")),
        pytest.param(
            "size=24m,nr_inodes=120",
            "inodes",
            marks=[pytest.mark.fault(6, "run: no inodes from step 6 to 10"), pytest.mark.proof],
        ),
    ],
)
def test_a_full_disk_costs_a_save_and_nothing_else(digits, small_disk, sixteen, options, what):
    disk = small_disk(options)
    run_dir = disk / "run"
    settings = {"train__max_steps": 12, "train__tensorboard": "true", **SINGLE}
    result = runs.run(run_dir, digits[0], fault=f"full_disk:6:11:{disk / 'filler'}:{what}", **settings)
    assert result.returncode == 0, result.stderr
    [failed] = runs.events(run_dir, "save_failed")
    assert failed["step"] == 8 and "No space left on device" in failed["problem"]
    assert "step 8 was not saved" in result.stderr
    assert runs.steps(run_dir) == [4, 12]
    # Steps 6 to 10 had no room; their rows waited for it.
    assert digests(run_dir) == digests(sixteen)[:12]
    assert runs.exit_record(run_dir)["code"] == 0
    if what == "bytes":
        # The ledger's few rows may have had room left in the file's last page.
        for name, least in (("metrics.jsonl", 1), ("goodput.jsonl", 0)):
            waited, came = (result.stderr.count(f"{name} {words}") for words in ("cannot be written", "is written"))
            assert least <= waited == came <= 1
        assert read_jsonl(run_dir / "goodput.jsonl")[-1]["end"] == 0


@pytest.mark.proof
@pytest.mark.fault(6, "run: disk full when the last save begins, with room again seconds later")
def test_a_last_save_is_tried_again_once_there_is_room(digits, small_disk, sixteen):
    disk = small_disk("size=24m")
    run_dir = disk / "run"
    fault = f"full_disk:11:pause:{disk / 'filler'}:bytes"
    result = runs.run(run_dir, digits[0], fault=fault, train__max_steps=12, **SINGLE)
    assert result.returncode == 0, result.stderr
    assert "the last save is tried again in 5 s" in result.stderr and "in 25 s" not in result.stderr
    assert runs.steps(run_dir) == [4, 8, 12]
    assert digests(run_dir) == digests(sixteen)[:12]


@pytest.mark.proof
@pytest.mark.fault(6, "run: disk that holds one checkpoint, found before the first step and met at the second save")
def test_a_disk_too_small_is_predicted_and_ends_in_one_message(digits, small_disk):
    disk = small_disk("size=3m")
    result = runs.run(disk / "run", digits[0], train__max_steps=12, **SINGLE)
    assert result.returncode == 4, result.stderr
    [predicted] = runs.events(disk / "run", "doctor")
    assert predicted["check"] == "space" and predicted["step"] == 0 and "lower checkpoint.keep" in predicted["problem"]
    assert [event["step"] for event in runs.events(disk / "run", "save_failed")] == [8, 12]
    assert runs.steps(disk / "run") == [4]
    assert [row[0] for row in runs.trajectory(disk / "run")] == list(range(1, 13))
    assert "Traceback" not in result.stderr and "No space left on device" in result.stderr


def immutable(path, on):
    return subprocess.run(["chattr", "+i" if on else "-i", path], capture_output=True).returncode == 0


@pytest.mark.proof
@pytest.mark.fault(7, "run: directory of checkpoints made immutable from step 6 to 10")
def test_a_directory_that_turns_read_only_costs_a_save(digits, tmp_path):
    run_dir = tmp_path / "run"
    checkpoints = run_dir / "checkpoints"
    checkpoints.mkdir(parents=True)
    if shutil.which("chattr") is None or not (immutable(checkpoints, True) and immutable(checkpoints, False)):
        pytest.skip("chattr +i does not work here: it needs root and a file system that has it")
    try:
        result = runs.run(run_dir, digits[0], fault=f"read_only:6:11:{checkpoints}", **SINGLE)
    finally:
        immutable(checkpoints, False)
    assert result.returncode == 0, result.stderr
    [failed] = runs.events(run_dir, "save_failed")
    assert failed["step"] == 8 and "Operation not permitted" in failed["problem"]
    assert runs.steps(run_dir) == [4, 12]
    assert "Traceback" not in result.stderr


@pytest.mark.fault(6, "skipped.jsonl on a disk without room, until there is some")
def test_the_ledger_waits_for_room(small_disk):
    disk = small_disk("size=64k")
    ledger = SkipLedger(disk / "skipped.jsonl", max_rate=0.5, tolerated=1000)
    ledger.add(1, 0, 10, [record(1)])
    fill(disk / "filler")
    for step in range(2, 400):
        ledger.add(step, 0, 10, [record(step)])
    (disk / "filler").unlink()
    ledger.close()
    assert [row["id"] for row in read_jsonl(disk / "skipped.jsonl")] == list(range(1, 400))
    assert ledger.bad == 399


def record(sample):
    return Skipped(id=sample, source="s", shard="t.tar", key=str(sample), reason="text instead of an image")


@pytest.mark.fault(7, "run: read-only file system at the start")
def test_a_read_only_run_directory_is_refused_at_the_start(digits, small_disk):
    disk = small_disk("size=1m")
    command = runs.command(disk / "run", digits[0], **SINGLE)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    result = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 2, result.stderr
    assert f"run.dir {disk / 'run'} cannot be written: Read-only file system; make it writable" in result.stderr
    assert "Traceback" not in result.stderr


# -- 15: numbers that are not finite -----------------------------------------------------------------------------------


@pytest.mark.fault(15, "run, no guard: NaN loss at 3, infinite gradient at 6, NaN parameter from 9, on one rank of two")
def test_what_is_not_finite_on_one_rank_updates_none(digits, sixteen, tmp_path):
    run_dir = tmp_path / "run"
    fault = "nan_loss:3;inf_gradient:6;nan_parameter:9"
    options = {"train__max_skips": 3, "train__max_steps": 16, "guard__enabled": "false"}
    result = runs.run(run_dir, digits[0], fault=fault, **options)
    assert result.returncode == 5, result.stderr
    assert "3 updates in a row were skipped" in result.stderr
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [step for step, row in rows.items() if row["skipped"]] == [3, 6, 9, 10, 11]
    assert rows[3]["loss"] is None and math.isfinite(rows[6]["loss"]) and rows[9]["loss"] is None
    before = runs.trajectory(sixteen)
    assert runs.trajectory(run_dir)[:2] == before[:2]
    # The step after a skipped one starts from the same weights: the loss is that of the step before, on new images.
    assert all(math.isfinite(row["loss"]) for step, row in rows.items() if step in (4, 5, 7, 8))
    assert runs.exit_record(run_dir)["code"] == 5
    with Checkpoint.open(run_dir / "checkpoints/step_00000008") as checkpoint:
        assert all(t.isfinite().all() for kind in checkpoint.kinds() for t in checkpoint.load_full(kind).values())


# -- 22, 23: hostile input at the command line -------------------------------------------------------------------------


@pytest.mark.fault(22, "a checkpoint that holds a link instead of a file, at the command line")
def test_a_hostile_checkpoint_is_refused_by_name_at_the_command_line(copy, capsys):
    newest = copy / "checkpoints/step_00000016"
    victim = newest / "rank00001.safetensors"
    victim.rename(copy / "moved")
    victim.symlink_to(copy / "moved")
    assert main(["eval", "--weights", str(newest), "--data", "nowhere"]) == 4
    assert "rank00001.safetensors is not a plain file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: !!python/object/apply:os.system ['touch CANARY']\n", "tag"),
        ("run: {dir: a}\nrun: {dir: b}\n", "'run' appears twice"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("run: {dri: a}\n", "run.dir"),
        ("run: {dir: 12:30:00, seed: 010}\n", "run.seed is '010'"),
        ("run: {dir: a}\ndata: {train: [a], drop_last: on}\n", "data.drop_last is 'on'"),
        ("[" * 100_000, "nested deeper"),
        ("a: " + "x" * (1 << 20), "at most"),
    ],
)
@pytest.mark.fault(23, "YAML at the command line: tags, aliases, duplicates, typos, 010, on, depth, size")
def test_yaml_traps_end_with_exit_2_and_the_key(tmp_path, capsys, text, message):
    canary = tmp_path / "canary"
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("CANARY", str(canary)))
    assert main(["configs", "show", str(config)]) == 2
    assert message in capsys.readouterr().err
    assert not canary.exists()


# -- 26: clocks, names, nodes, leftovers, two runs at once -------------------------------------------------------------


@pytest.mark.fault(26, "run: clock a year ahead, then behind; host renamed; 1+1 instead of 2 ranks a node; leftovers")
def test_a_run_depends_on_no_clock_host_or_leftover(digits, sixteen, tmp_path):
    run_dir = tmp_path / "run"
    for leftover in (".step_00000003.tmp", ".step_00000002.old"):
        (run_dir / "checkpoints" / leftover).mkdir(parents=True)
        (run_dir / "checkpoints" / leftover / "rank00000.safetensors").write_text("half")
    (run_dir / ".config.yaml.77.tmp").write_text("half")
    (run_dir / "lock").mkdir()
    (run_dir / "lock/.gone.tmp").write_text("half")
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "lo')
    (run_dir / "exit.json").write_text('{"code": 1}')
    result = runs.run(run_dir, digits[0], fault="clock_jumps:3", train__max_steps=10)
    assert result.returncode == 0, result.stderr
    assert runs.run_nodes(run_dir, digits[0], (1, 1), fault="renamed_host:elsewhere", train__max_steps=16) == 0
    assert runs.trajectory(run_dir) == runs.trajectory(sixteen)
    assert fell_back(run_dir) == [] and runs.exit_record(run_dir)["code"] == 0
    assert [path.name for path in run_dir.glob(".*")] == []
    assert list((run_dir / "checkpoints").glob(".*")) == []


@pytest.mark.fault(26, "two runs started in one run directory")
def test_the_second_run_in_a_directory_is_refused_and_touches_nothing(digits, sixteen, tmp_path):
    run_dir = tmp_path / "run"
    settings = {**SINGLE, "train__max_steps": 12}
    first = runs.start(run_dir, digits[0], fault=f"held:3:{tmp_path / 'go on'}", **settings)
    try:
        wait_for(lambda: (run_dir / "metrics.jsonl").exists(), first)
        second = runs.run(run_dir, digits[0], **settings)
        assert second.returncode == 2, second.stderr
        assert f"run.dir {run_dir} is in use by process {first.pid} on" in second.stderr
        assert first.poll() is None and not (run_dir / "exit.json").exists()
        (tmp_path / "go on").touch()
        assert first.wait(timeout=240) == 0
    finally:
        first.kill()
    assert digests(run_dir) == digests(sixteen)[:12]
    assert runs.exit_record(run_dir)["code"] == 0
    assert list((run_dir / "lock").glob("*.json")) == []


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
