"""Routing in a real run (its diary, its alarm, its report) and the page made of what the run saved."""

import re
import shutil

import numpy as np
import pytest
import torch

from swin_scale.config import Augment
from swin_scale.convert import convert, model_from_weights
from swin_scale.data import EvalStream, finish
from swin_scale.engine.routing import FIGURES, PATIENCE
from swin_scale.errors import DataError, UserError
from swin_scale.log import read_metrics
from swin_scale.models import create_model
from swin_scale.report import write_report
from swin_scale.routing import inspect_routing, survey
from swin_scale.shards import ShardSet
from tests import runs

NAME = "swin_moe_nano_patch4_window4_32"
BLOCKS = ("layers.0.blocks.1", "layers.1.blocks.1")
PUSHED, FREED, STEPS, EVERY = 13, 23, 32, 2
RAISED = PUSHED - 1 + EVERY * PATIENCE


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """Two ranks, experts spread over both; gates are pushed before steps 13 to 22 and left alone again."""
    run_dir = tmp_path_factory.mktemp("routing") / "run"
    result = runs.run(
        run_dir,
        digits[0],
        fault=f"push_gates:{PUSHED}:{FREED}",
        model__name=NAME,
        moe__ep_size=2,
        train__max_steps=STEPS,
        train__tensorboard="true",
        checkpoint__every_steps=STEPS,
    )
    assert result.returncode == 0, result.stderr
    return run_dir, result.stderr


def test_rows_that_end_a_log_interval_have_every_figure(run):
    rows = read_metrics(run[0] / "metrics.jsonl")
    assert len(rows) == STEPS and all(row["aux_loss"] >= 0 for row in rows.values())
    wanted = {f"moe/{block}/{figure}" for block in BLOCKS for figure in FIGURES} | {"moe/a2a_share", "moe/telemetry_s"}
    for step, row in rows.items():
        figures = {key: value for key, value in row.items() if key.startswith("moe/")}
        assert figures.keys() == (wanted if step % EVERY == 0 else set()), step
        assert all(isinstance(value, int | float) for value in figures.values())
    last = rows[STEPS]
    assert last["aux_loss"] == pytest.approx(0.01 * sum(last[f"moe/{b}/balance_loss"] for b in BLOCKS), rel=0.5)
    assert 0 < last["moe/a2a_share"] < 1 and last[f"moe/{BLOCKS[0]}/rank_load_max"] >= 1


def test_a_healthy_router_is_silent_a_pushed_one_raises_the_alarm_and_recovers(run):
    run_dir, log = run
    collapsed, recovered = runs.events(run_dir, "router_collapse"), runs.events(run_dir, "router_recovered")
    assert {event["layer"] for event in collapsed} == {event["layer"] for event in recovered} == set(BLOCKS)
    assert len(collapsed) == len(recovered) == 2
    # Steps 14, 16, 18 are the first three that end an interval of pushed gates.
    assert {event["step"] for event in collapsed} == {RAISED}
    assert all(RAISED + EVERY * PATIENCE <= event["step"] <= STEPS for event in recovered)
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert rows[RAISED][f"moe/{BLOCKS[0]}/load_max"] > 3 > rows[PUSHED - 1][f"moe/{BLOCKS[0]}/load_max"]
    for event in collapsed:
        assert event["load_cv"] == rows[RAISED][f"moe/{event['layer']}/load_cv"] and event["experts"] == 8
        assert f"step {RAISED}: {event['problem']}" in log and "moe.aux_weight" in event["problem"]
    logs = (run_dir / "logs/rank1.log").read_text()
    assert "collapsed" not in logs


def test_the_report_and_tensorboard_show_it(run):
    run_dir, _ = run
    text = (run_dir / "report.html").read_text()
    pictures = re.findall(r'<svg id="p-([\w-]+)"', text)
    assert {"moe-load-cv", "moe-dead", "moe-dropped", "moe-a2a-share", "load-0", "load-1", "dropped-0"} <= set(pictures)
    assert "router_collapse, router_recovered" in text and "<td>routing</td>" not in text
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(run_dir / "tb")).Reload()
    assert f"moe/{BLOCKS[0]}/load_cv" in seen.Tags()["scalars"] and "moe/a2a_share" in seen.Tags()["scalars"]
    picture = seen.Images(f"moe/{BLOCKS[0]}/dropped")[-1]
    assert picture.step == STEPS and (picture.width, picture.height) == (128, 128)


@pytest.mark.proof
@pytest.mark.parametrize("ranks", [1, 2])
def test_telemetry_tells_what_it_takes(digits, tmp_path, ranks):
    """Its own clock, on rank 0: observing, adding up, the reduction (waiting for the other rank included), figures,
    events, TensorBoard's pictures. The share is printed, to be judged on a quiet machine: the aim is 1 %."""
    # A checkpoint ends a log interval too, and there shall be one at the end alone.
    settings = {"moe__ep_size": ranks, "train__max_steps": 200, "train__log_every": 10, "train__tensorboard": "true"}
    settings["checkpoint__every_steps"] = 200
    result = runs.run(tmp_path / "run", digits[0], nproc=ranks, model__name=NAME, **settings)
    assert result.returncode == 0, result.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl").values()
    assert len(rows) == 200
    telemetry, total = sum(row.get("moe/telemetry_s", 0) for row in rows), sum(row["step_s"] for row in rows)
    share = f"{telemetry:.3f} s of {total:.1f} s in 200 steps, {telemetry / total:.2%}"
    print(f"proof: routing telemetry on {ranks} ranks: {share}")  # noqa: T201
    told = [row["step"] for row in rows if "moe/telemetry_s" in row]
    assert told == list(range(10, 201, 10)) and 0 < telemetry < total


def test_a_resumed_run_hides_what_it_did_again(run, tmp_path):
    """The last row and the last map of a step count."""
    run_dir, _ = run
    metrics = (run_dir / "metrics.jsonl").read_text()
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "metrics.jsonl").write_text(metrics + metrics)
    pictures = [re.findall(r'<svg id="p-moe-[\w-]+".*?</svg>', write_report(d).read_text()) for d in (run_dir, copy)]
    plain = [[re.sub(r'<path class="mark".*?</path>', "", picture) for picture in part] for part in pictures]
    assert plain[0] == plain[1] and len(plain[0]) == 8


def test_counts_are_those_of_the_model_image_by_image(digits, tmp_path):
    network = create_model(NAME, moe={"top_k": 2, "eval_capacity_factor": 0.75})
    made = survey(network, [str(digits[1])], images=20, batch=8, workers=0)
    stream = EvalStream(ShardSet.open(digits[1]), global_batch=8, img_size=32, augment=Augment())
    assert (made.images, made.available, made.unusable, made.capacity_factor) == (20, 50, 0, 0.75)
    wanted = {name: (np.zeros((10, 8)), np.zeros((side, side, 8)), np.zeros((side, side)))
              for name, side in zip(BLOCKS, (8, 4))}  # fmt: skip
    confidence = dict.fromkeys(BLOCKS, 0.0)
    with stream.batches() as batches, torch.no_grad():
        for start, part in zip((0, 8, 16), batches):
            count = min(8, 20 - start)
            routing = network(finish(part.images[:count]), stats=True)[2]
            for name, (by_class, by_place, dropped) in wanted.items():
                side = len(dropped)
                expert = routing[name].expert_TK.view(count, side, side, 2).numpy()
                kept = routing[name].kept_TK.view(count, side, side, 2).numpy()
                confidence[name] += float(routing[name].confidence_T.sum())
                for b, row, column, k in np.ndindex(*expert.shape):
                    by_class[part.labels[b], expert[b, row, column, k]] += 1
                    by_place[row, column, expert[b, row, column, k]] += 1
                    dropped[row, column] += not kept[b, row, column, k]
    assert [layer.name for layer in made.layers] == list(BLOCKS)
    for layer in made.layers:
        by_class, by_place, dropped = wanted[layer.name]
        assert (layer.by_class == by_class).all() and by_class.sum() == 2 * layer.tokens == 40 * dropped.size
        assert (layer.by_place == by_place).all() and (layer.dropped == dropped).all() and dropped.sum() > 0
        assert layer.confidence_sum == pytest.approx(confidence[layer.name], rel=1e-5)
        assert layer.confidence.sum() == layer.tokens == layer.first_choices.sum()
        assert layer.confidence_by_expert.sum() == pytest.approx(layer.confidence_sum)


def test_a_run_a_checkpoint_and_a_weight_file_give_the_same_page(run, digits, tmp_path, monkeypatch):
    run_dir, _ = run
    file = tmp_path / "weights.safetensors"
    convert(run_dir, file, to="safetensors")
    monkeypatch.chdir(tmp_path)
    pages = []
    for at, weights in enumerate((run_dir, run_dir / "checkpoints" / f"step_{STEPS:08d}", file)):
        path = inspect_routing(str(weights), [str(digits[1])], out=f"{at}.html" if at else None, images=30, workers=0)
        text = path.read_text()
        assert path.name == (f"{at}.html" if at else "routing.html") and len(text) < 200_000
        pages.append(re.sub(r"<header>.*?</header>|Written .*? UTC", "", text, flags=re.DOTALL))
    assert pages[0] == pages[1] == pages[2] and BLOCKS[1] in pages[0] and ">30<" in pages[0]


def test_what_cannot_be_looked_at_is_refused(run, digits, tmp_path):
    data = [str(digits[1])]
    dense = tmp_path / "dense.pth"
    torch.save(create_model("swinv2_nano_patch4_window4_32").state_dict(), dense)
    with pytest.raises(UserError, match="a dense model: it routes nothing"):
        inspect_routing(str(dense), data, out=str(tmp_path / "x.html"))
    with pytest.raises(UserError, match="images is 0"):
        inspect_routing(str(run[0]), data, out=str(tmp_path / "x.html"), images=0)
    with pytest.raises(UserError, match="cannot be written"):
        inspect_routing(str(run[0]), data, out=str(tmp_path / "none" / "x.html"), images=1, workers=0)
    empty = tmp_path / "broken"
    shutil.copytree(digits[1], empty)
    for shard in empty.glob("*.tar"):
        size = shard.stat().st_size
        shard.write_bytes(bytes(size))
    with pytest.raises(DataError):
        inspect_routing(str(run[0]), [str(empty)], out=str(tmp_path / "x.html"), workers=0)
    assert model_from_weights(str(run[0]))[0].is_moe
