"""Weights are shown images as their run was, by every verb that shows them any."""

import dataclasses
import json
import shutil
import typing

import pytest

import swin_scale.probe
from swin_scale.checkpoint.manifest import MANIFEST_NAME, Manifest
from swin_scale.cli import main
from swin_scale.config import Augment
from swin_scale.convert import Source, convert, inspect_path, model_from_weights
from swin_scale.convert.source import EVAL_AUGMENT, eval_augment
from swin_scale.errors import CheckpointError
from tests import runs


def train(run_dir, digits, steps):
    settings = {"augment__crop": "resized", "augment__eval_crop": "false", "augment__interpolation": "bilinear"}
    settings |= {"data__val": f"[{digits[1]}]", "data__workers": 0, "train__max_steps": steps}
    result = runs.run(run_dir, digits[0], nproc=1, **settings)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def squashed(digits, tmp_path_factory):
    """A run that squashed its images, as the 384 px recipes do; without ``crop`` 32 px would be padded."""
    run_dir = tmp_path_factory.mktemp("squashed") / "run"
    train(run_dir, digits, 6)
    convert(run_dir, run_dir.parent / "w.safetensors", to="safetensors")
    convert(run_dir.parent / "w.safetensors", run_dir.parent / "again.safetensors", to="safetensors")
    convert(run_dir, run_dir.parent / "w.pth", to="official")
    return run_dir


def test_eval_follows_the_run_of_the_weights(squashed, digits, capsys):
    def loss(weights, *options):
        arguments = ["eval", "--weights", str(weights), "--data", str(digits[1]), "--workers", "0", *options]
        assert main(arguments) == 0
        return json.loads(capsys.readouterr().out)["loss"]

    [training] = runs.events(squashed, "eval")
    for weights in (squashed, squashed.parent / "again.safetensors"):
        assert loss(weights) == loss(weights, "--squash") == pytest.approx(training["loss"], rel=1e-5)
        assert abs(loss(weights, "--no-squash") - training["loss"]) > 1e-4
        assert "augment.eval_crop=False" in inspect_path(weights)


def test_predict_follows_the_run_of_the_weights(squashed, digits, capsys):
    image = str(next((digits[0].parent / "images/val/7").iterdir()))

    def guesses(*options):
        assert main(["predict", "--weights", str(squashed), image, "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["predictions"]

    assert guesses() == guesses("--squash") != guesses("--no-squash")


def test_probe_follows_the_run_of_the_weights(squashed, digits, monkeypatch):
    class SeenError(Exception):
        pass

    def stream(*_, augment, **__):
        raise SeenError(augment)

    monkeypatch.setattr(swin_scale.probe, "EvalStream", stream)
    for crop in (None, False, True):
        with pytest.raises(SeenError) as seen:
            swin_scale.probe.probe(str(squashed), [str(digits[0])], [str(digits[1])], method="knn", crop=crop)
        assert seen.value.args[0] == Augment(crop="resized", eval_crop=bool(crop), interpolation="bilinear")


def test_files_that_do_not_tell_are_cropped(squashed):
    _, info = model_from_weights(squashed.parent / "w.pth")
    assert info.augment == Augment() and info.fixed_view(False) == Augment(eval_crop=False)
    before = Source(path=squashed, format="checkpoint", kind="master", model={"name": "x", "overrides": {}})
    assert eval_augment(before) == Augment()


def test_a_checkpoint_of_before_is_resumed(squashed, digits, tmp_path):
    run_dir = shutil.copytree(squashed, tmp_path / "run")
    for step in (run_dir / "checkpoints").glob("step_*"):
        manifest = Manifest.load(step)
        model = {key: value for key, value in manifest.model.items() if key != "augment"}
        (step / MANIFEST_NAME).write_bytes(dataclasses.replace(manifest, model=model).encode())
    assert "augment." not in inspect_path(run_dir)
    train(run_dir, digits, 7)
    assert [event["step"] for event in runs.events(run_dir, "start")] == [0, 6]
    assert "step_00000007" in (shown := inspect_path(run_dir)) and "augment.eval_crop=False" in shown


def test_a_file_that_tells_nonsense_is_refused(tmp_path):
    for augment in ({"eval_crop": "no"}, {"crop": []}, {"interpolation": "nearest"}):
        odd = Source(path=tmp_path, format="safetensors", kind="master", model={"augment": augment})
        with pytest.raises(CheckpointError, match=rf"augment\.{next(iter(augment))} is "):
            eval_augment(odd)


def test_the_values_known_are_those_of_the_config():
    def values(hint):
        if hint in (bool, type(None)):
            return {True, False} if hint is bool else {None}
        arguments = typing.get_args(hint)
        return set(arguments) if typing.get_origin(hint) is typing.Literal else set().union(*map(values, arguments))

    hints = typing.get_type_hints(Augment)
    assert all(set(known) == values(hints[key]) for key, known in EVAL_AUGMENT.items())
