"""Runs in stages: what the file says, what is refused before the first step, and kills at every place."""

import json
import re
import shutil

import pytest

from swin_scale.checkpoint import Checkpoint, step_directory
from swin_scale.cli import CONFIGS, main
from swin_scale.config_diff import diff_configs
from swin_scale.config_load import LoadedConfig, load_config
from swin_scale.convert import Source, judge_weights, open_weights
from swin_scale.convert.weights import Loaded
from swin_scale.errors import CheckpointError, PeerLostError, UserError
from swin_scale.staged import Staged, load
from tests import runs, warm
from tests.recipes import recipes
from tests.spawn import free_port, torchrun_environment

SMALL, LARGE = "1_px32", "2_px48"
STEPS = {SMALL: 6, LARGE: 5}
PROGRESSIVE = """
run: {{dir: {root}/run}}
data: {{train: ["{train}"], workers: 1}}
model: {{name: swinv2_nano_patch4_window4_32}}
optim: {{lr: 1e-3, ema_decay: 0.9, eps: 1e-6}}
schedule: {{total_steps: 20, warmup_steps: 2}}
engine: {{precision: fp32, threads: 1, timeout_s: 60}}
augment: {{auto_augment: none, mixup: 0.0, cutmix: 0.0}}
train: {{global_batch: 24, eval_every_epochs: 0, log_every: 1, tensorboard: false, max_steps: 6}}
checkpoint: {{every_steps: 2, every_minutes: null}}
stages:
- name: px32
- name: px48
  data: {{img_size: 48}}
  model: {{window_size: 6, pretrained_window_sizes: [4, 4]}}
  init: {{ema: true}}
  train: {{max_steps: 5}}
"""


def write(root, digits, text=PROGRESSIVE):
    root.mkdir(parents=True, exist_ok=True)
    path = root / "staged.yaml"
    path.write_text(text.format(root=root, train=digits[0]))
    return path


def train(config, *overrides, nproc=2, program=warm.CLI, code=0):
    """Run `train` on the config as the launcher would start it."""
    env = {**runs.environment(), "GLOO_SOCKET_IFNAME": "lo"}
    port = free_port()
    ranks = [{**env, **torchrun_environment(rank, nproc, port)} for rank in range(nproc)] if nproc > 1 else [env]
    result = warm.run(["train", str(config), *overrides], ranks, program=program)
    assert result.returncode == code, result.stderr
    return result.stderr


# -- the file ----------------------------------------------------------------------------------------------------------


def resolved(tmp_path, text, *overrides):
    path = tmp_path / "staged.yaml"
    path.write_text(text)
    staged = load(path, overrides)
    assert isinstance(staged, Staged)
    return [stage.loaded for stage in staged.stages]


SHORT = """
base: base.yaml
run: {dir: home}
optim: {weight_decay: 0.2}
stages:
- {name: a, base: recipe.yaml, train: {epochs: 5}}
- {name: b, optim: {lr: 0.1}}
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "data: {train: [x]}\nmodel: {name: m}\noptim: {lr: 1.0, weight_decay: 0.1}\n"
        "train: {global_batch: 8, epochs: 2}\ninit: {weights: start.pth}\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "run: {dir: elsewhere, seed: 7}\ndata: {train: [y]}\noptim: {eps: 0.5}\ninit: {weights: other.pth}\n"
    )
    return tmp_path


def test_values_come_from_the_nearest_place_and_say_so(files):
    a, b = resolved(files, SHORT, "train.global_batch=16", "stages.b.optim.lr=0.3", "optim.lr=0.2")
    assert (a.config.run.seed, b.config.run.seed) == (7, 0)
    assert (a.config.optim.eps, b.config.optim.eps) == (0.5, 1e-8)
    assert a.config.data.train == ("x",)  # what stages share stands above a stage's recipe
    assert (a.config.train.epochs, b.config.train.epochs) == (5, 2)
    assert a.config.optim.weight_decay == b.config.optim.weight_decay == 0.2
    assert (a.config.optim.lr, b.config.optim.lr) == (0.2, 0.3)
    assert a.config.train.global_batch == b.config.train.global_batch == 16
    assert (a.config.run.dir, b.config.run.dir) == ("home/1_a", "home/2_b")
    assert a.origin["train.epochs"] == "staged.yaml, a"
    assert a.origin["data.train"] == "base.yaml"
    assert b.origin["optim.lr"] == "command line"


def test_the_first_stage_starts_where_the_run_does_and_the_others_from_the_one_before(files):
    a, b = resolved(files, SHORT)
    assert (a.config.init.weights, b.config.init.weights) == ("start.pth", "home/1_a")
    assert b.origin["init.weights"] == "stage 1_a"
    a, b = resolved(files, SHORT, "init.weights=line.pth")
    assert (a.config.init.weights, b.config.init.weights) == ("line.pth", "home/1_a")
    a, b = resolved(files, SHORT, "stages.b.init.weights=null")
    assert (a.config.init.weights, b.config.init.weights) == ("start.pth", None)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("run: {dir: home}\nstages: {a: 1}\n", (), "list the stages in order"),
        ("run: {dir: home}\nstages: []\n", (), "list the stages in order"),
        ("run: {dir: home}\nstages: [{name: a b}]\n", (), "item 1: its name is 'a b'"),
        ("run: {dir: home}\nstages: [{name: a}, {name: a}]\n", (), "two stages are called a"),
        ("stages: [{name: a, base: recipe.yaml}]\n", (), "run.dir is None"),
        (SHORT, ("stages.c.optim.lr=1",), "one of a, b"),
        (SHORT, ("stages.b.run.dir=other",), "stage b: run.dir is 'other'"),
        (SHORT, ("stages.b.optim.lrr=1",), "stage b: unknown key optim.lrr; did you mean optim.lr"),
        (SHORT, ("stages.b.optim.eps=-1",), "stage b: optim.eps is -1"),
        (SHORT.replace("recipe.yaml", "staged.yaml"), (), "stage a: base staged.yaml is a run in stages"),
    ],
)
def test_what_cannot_be_read_names_stage_and_key(files, text, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolved(files, text, *overrides)


def test_a_plain_config_stays_one_and_a_staged_one_is_no_base(files):
    (files / "staged.yaml").write_text(SHORT)
    (files / "child.yaml").write_text("base: staged.yaml\n")
    assert isinstance(load(CONFIGS / "demo.yaml"), LoadedConfig)
    for path in ("staged.yaml", "child.yaml"):
        with pytest.raises(UserError, match="stages"):
            load_config(files / path)


@pytest.mark.parametrize("path", sorted((CONFIGS / "staged").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_runs_in_stages_resolve_and_show_every_stage(path, tmp_path, capsys):
    assert path.read_text().startswith("# ")
    assert main(["configs", "show", f"staged/{path.stem}"]) == 0
    staged = load(path)
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("# stage")] == [
        f"# stage {stage.label}" for stage in staged.stages
    ]
    (tmp_path / "shown.yaml").write_text(shown)
    assert load(tmp_path / "shown.yaml").configs == staged.configs


STAGES = {recipe.name: recipe for recipe in recipes() if ":" in recipe.name}


@pytest.mark.parametrize("path", sorted((CONFIGS / "staged").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_stages_take_each_others_weights(path):
    """By shapes, on the meta device, whatever the size of the model."""
    first, second = (STAGES[f"staged/{path.stem}:{stage.name}"] for stage in load(path).stages)
    origin = Source(path=path, format="checkpoint", kind="master",
                    model={"name": first.config.model.name, "overrides": first.overrides})  # fmt: skip
    report = judge_weights(second.build(), Loaded(first.build().state_dict(), origin), head=second.config.init.head)
    assert not any(line.target and not line.target.startswith("head.") for line in report.created)


def test_arms_of_the_label_benchmark_differ_by_where_they_start():
    benchmarks = CONFIGS.parent / "benchmarks"
    _, tuned = load(benchmarks / "simmim_labels.yaml", ["run.dir=run"]).configs
    alone = load_config(benchmarks / "simmim_labels_tune.yaml").config
    assert {change.key for change in diff_configs(alone, tuned)} == {"run.dir", "init.weights"}


# -- refused before the first step -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["stages.px48.model.embed_dim=48"], 2, "stage 2_px48: init.weights: stage 1_px32: .* has shape"),
        (["stages.px48.model.pretrained_window_sizes=null"], 2, "stage 2_px48: init.weights: .*window_sizes"),
        (["stages.px48.data.img_size=33"], 2, "stage 2_px48: .*33"),
        (["optim.ema_decay=0"], 2, "stage 2_px48: init.ema is true, but stage 1_px32 keeps no moving average"),
        (["stages.px48.data.train=[nowhere]"], 3, "stage 2_px48: nowhere"),
        (["stages.px48.init.weights=nowhere.pth"], 4, "stage 2_px48: .*nowhere.pth"),
        (["stages.px48.train.global_batch=25"], 2, "stage 2_px48: train.global_batch 25 does not divide over 2 ranks"),
    ],
)  # fmt: skip
def test_every_stage_is_judged_before_the_first_begins(digits, tmp_path, overrides, code, message):
    error = train(write(tmp_path, digits), *overrides, nproc=2 if "25" in message else 1, code=code)
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """Both stages on two processes that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole")
    train(write(root, digits))
    return root / "run"


def assert_same(run_dir, whole):
    """Losses, norms and batch digests, and the bytes of the last checkpoints."""
    for stage, steps in STEPS.items():
        assert runs.trajectory(run_dir / stage) == runs.trajectory(whole / stage)
        assert [row[0] for row in runs.trajectory(whole / stage)] == list(range(1, steps + 1))
        last = [step_directory(root / stage / "checkpoints", steps) for root in (run_dir, whole)]
        ours, theirs = (sorted(directory.glob("rank*.safetensors")) for directory in last)
        assert len(ours) == len(theirs) == 2
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs))


def test_a_stage_is_the_run_that_its_config_makes_alone(digits, whole, tmp_path):
    """The second stage, trained by itself from the first one's moving average, is the same to the bit."""
    text = write(tmp_path, digits).read_text()
    shared, own = text.partition("stages:")[0], "data: {img_size: 48}\n"
    base = tmp_path / "base.yaml"
    base.write_text(shared)
    alone = tmp_path / "alone.yaml"
    alone.write_text(
        f"base: base.yaml\n{own}model: {{window_size: 6, pretrained_window_sizes: [4, 4]}}\n"
        f"init: {{weights: {whole / SMALL}, ema: true}}\ntrain: {{max_steps: 5}}\n"
    )
    train(alone, f"run.dir={tmp_path / 'alone'}")
    assert runs.trajectory(tmp_path / "alone") == runs.trajectory(whole / LARGE)


def test_the_directory_holds_the_stages_and_verbs_take_the_last(digits, whole, capsys):
    assert json.loads((whole / "stages.json").read_text()) == {"stages": [SMALL, LARGE]}
    assert runs.exit_record(whole)["code"] == 0
    for stage in (SMALL, LARGE):
        assert {"config.yaml", "metrics.jsonl", "exit.json", "report.html"} <= {
            p.name for p in (whole / stage).iterdir()
        }
    with open_weights(whole) as weights:
        assert weights.source.path == step_directory(whole / LARGE / "checkpoints", STEPS[LARGE])
    assert main(["inspect", str(whole)]) == 0
    shown = capsys.readouterr().out
    assert "a run in 2 stages" in shown
    assert "1_px32  step 6" in shown
    assert "img_size=48" in shown
    page = (whole / "report.html").read_text()
    assert f'href="{SMALL}/report.html"' in page
    assert f'href="{LARGE}/report.html"' in page
    assert (whole / "config.yaml").exists() is False
    assert "1_px32" in (whole / LARGE / "config.yaml").read_text()


DIES = """
import os, signal, sys
from swin_scale import cli, staged_run
from swin_scale.engine.engine import Engine
from swin_scale.run_dir import ExitRecord

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

step = Engine.train_step

def dying_step(self, at, *rest, **options):
    if (os.path.basename(self.config.run.dir), at) == {place!r}:
        die()
    return step(self, at, *rest, **options)

run = staged_run.run

def dying_run(loaded, **options):
    if (os.path.basename(loaded.config.run.dir), "start") == {place!r}:
        die()
    return run(loaded, **options)

leave = ExitRecord.__exit__

def dying_exit(self, *error):
    if (self._path.parent.name, "exit") == {place!r}:
        die()
    return leave(self, *error)

Engine.train_step, staged_run.run, ExitRecord.__exit__ = dying_step, dying_run, dying_exit
sys.exit(cli.main())
"""
PLACES = {
    "in the second": (LARGE, 3),
    "in the first": (SMALL, 3),
    "between them": (LARGE, "start"),
    "before the first's end is recorded": (SMALL, "exit"),
    "before the second's first step": (LARGE, 0),
}


def kill(config, place):
    train(config, program=DIES.format(place=place), code=PeerLostError.exit_code)


@pytest.mark.parametrize("place", ["in the second", *(pytest.param(p, marks=pytest.mark.proof) for p in [*PLACES][1:])])
@pytest.mark.fault(9, "a run in stages: killed in and between its stages, same command again")
def test_kills_anywhere_change_no_bit(digits, whole, tmp_path, place):
    config = write(tmp_path, digits)
    kill(config, PLACES[place])
    began = (tmp_path / "run" / LARGE / "checkpoints").exists()
    assert began == (PLACES[place][0] == LARGE and PLACES[place][1] != "start")
    train(config)
    assert_same(tmp_path / "run", whole)


@pytest.mark.proof
@pytest.mark.fault(9, "a run in stages: killed in turn at five places, same command each time")
def test_many_kills_change_no_bit(digits, whole, tmp_path):
    config = write(tmp_path, digits)
    for place in ("in the first", "before the first's end is recorded", "between them",
                  "before the second's first step", "in the second"):  # fmt: skip
        kill(config, PLACES[place])
    train(config)
    assert_same(tmp_path / "run", whole)
    print("proof: 5 kills in and between two stages: losses, norms, digests and files bit-equal")  # noqa: T201


ONE_AT_A_TIME = """
import gc, sys, torch
from swin_scale import cli
from swin_scale.engine.engine import Engine

begin, seen = Engine.__init__, []

def held():
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not o.is_meta]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

def first(self, model, *rest, **options):
    # Its own weights are there, of the stage before: under ZeRO-3 in a model that they are cut from.
    seen.append((held(), sum(4 * p.numel() for p in model.parameters())))
    begin(self, model, *rest, **options)

Engine.__init__ = first
code = cli.main()
[_, (left, model_bytes)] = seen
print(f"{left} bytes for a model of {model_bytes}", file=sys.stderr)
sys.exit(code or 10 * (left > 1.25 * model_bytes))
"""


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.proof)])
def test_a_stage_leaves_its_memory_to_the_next(digits, tmp_path, stage):
    """Without `Engine.close` DeepSpeed would keep weights, gradients and moments: five times the model and more."""
    overrides = ["train.max_steps=1", "stages.px48.train.max_steps=1", "data.workers=0", f"engine.zero_stage={stage}"]
    train(write(tmp_path, digits), *overrides, nproc=1, program=ONE_AT_A_TIME)


# -- what is done is done ----------------------------------------------------------------------------------------------


@pytest.fixture
def half(digits, whole, tmp_path):
    """(config, run directory) of a run whose first stage is done and whose second has not begun."""
    config = write(tmp_path, digits)
    shutil.copytree(whole / SMALL, tmp_path / "run" / SMALL)
    return config, tmp_path / "run"


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.fault(4, "a run in stages: a flipped bit in the checkpoint that the next stage starts from")
def test_a_stage_whose_end_is_damaged_is_not_done(whole, half):
    config, run_dir = half
    flip(run_dir / SMALL / "checkpoints/step_00000006/rank00001.safetensors")
    error = train(config)
    assert "stage 1_px32 has lost its end" in error
    assert_same(run_dir, whole)


def test_what_the_next_stage_no_longer_reads_may_go(digits, whole, half, tmp_path):
    config, run_dir = half
    shutil.copytree(whole / LARGE, run_dir / LARGE)
    shutil.rmtree(run_dir / SMALL / "checkpoints")
    train(config, "stages.px48.train.max_steps=6", "stages.px32.data.workers=0")
    assert [row[0] for row in runs.trajectory(run_dir / LARGE)] == list(range(1, 7))
    assert len(runs.trajectory(run_dir / SMALL)) == STEPS[SMALL]


def test_changes_to_a_stage_that_is_done_are_refused_with_their_grade(digits, whole, half):
    config, run_dir = half
    error = train(config, "stages.px32.optim.lr=5e-4", "--allow-change", nproc=1, code=2)
    assert "stage 1_px32 is done" in error
    assert "optim.lr: 0.001 -> 0.0005 (needs --allow-change)" in error
    shutil.copytree(whole / LARGE, run_dir / LARGE)
    error = train(config, "stages.px32.train.max_steps=8", nproc=1, code=2)
    assert "train.max_steps: 6 -> 8" in error
    (run_dir / SMALL / "exit.json").unlink()
    assert "does not say that stage 1_px32 is done" in train(config, nproc=1, code=2)
    config.write_text(config.read_text().replace("name: px32", "name: other"))
    assert "1_px32 is a stage that this run does not have" in train(config, nproc=1, code=2)


def test_the_last_stage_without_a_checkpoint_names_the_choices(half):
    _, run_dir = half
    (run_dir / "stages.json").write_text(json.dumps({"stages": [SMALL, LARGE]}))
    with pytest.raises(CheckpointError, match=rf"2_px48, has no checkpoint yet; name a stage of its own: .*{SMALL}"):
        open_weights(run_dir)
    with Checkpoint.open(step_directory(run_dir / SMALL / "checkpoints", 6)) as checkpoint:
        assert checkpoint.step == 6
