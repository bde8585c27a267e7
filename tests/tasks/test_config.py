"""What a task makes of a config: defaults that follow it, keys that belong to another, sizes that do not fit."""

import json

import pytest

from swin_scale.config_diff import diff_configs
from swin_scale.config_load import TASK_DEFAULTS, config_from_text, config_from_values, load_config
from swin_scale.data import Masking
from swin_scale.errors import DataError, UserError
from swin_scale.job import architecture, prepare
from swin_scale.shards import Manifest, load_index, save_index
from tests import runs

NANO = {**{k: v for k, v in runs.NANO.items() if not k.startswith("augment.")}, "simmim.mask_patch_size": 8}


def loaded(directory, shards, **settings):
    """The config of a nano SimMIM run; `settings` are config keys with ``__`` for the dot."""
    values = {**NANO, "task": "simmim", "run.dir": directory / "run", "data.train": f"[{shards[0]}]"}
    values.update({key.replace("__", "."): value for key, value in settings.items()})
    (directory / "c.yaml").write_text("train: {}\n")
    return load_config(directory / "c.yaml", [f"{key}={value}" for key, value in values.items()])


def request(directory, shards, ranks=1, **settings):
    return prepare(loaded(directory, shards, **settings), ranks)


def test_defaults_follow_the_task_and_what_is_set_stays(tmp_path, digits):
    found = loaded(tmp_path, digits, augment__color_jitter=0.1)
    augment = found.config.augment
    assert (augment.crop_scale, augment.interpolation, augment.crop) == ((0.67, 1.0), "bilinear", "resized")
    assert (augment.auto_augment, augment.reprob, augment.hflip) == ("none", 0.0, 0.5) and not augment.mixes
    assert found.config.optim.label_smoothing == 0 and augment.color_jitter == 0.1
    assert (
        found.origin["augment.crop_scale"] == "task simmim" and found.origin["augment.color_jitter"] == "command line"
    )
    # What is resolved says all: reading it back follows no task.
    assert diff_configs(found.config, config_from_text(found.dump(), "config.yaml")) == []


def test_classification_has_the_defaults_it_had():
    base = {"run": {"dir": "r"}, "data": {"train": ["d"]}, "model": {"name": "m"}, "optim": {"lr": 1.0}}
    plain = config_from_values({**base, "train": {"global_batch": 8}})
    named = config_from_values({**base, "train": {"global_batch": 8}, "task": "classify"})
    assert plain.config == named.config and not TASK_DEFAULTS["classify"]
    assert plain.config.augment.mixup == 0.8 and plain.config.optim.label_smoothing == 0.1
    assert plain.origin["augment.mixup"] == "default"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment__mixup": 0.8}, "augment.mixup is 0.8, but task simmim uses no labels"),
        ({"augment__cutmix": 1.0}, "augment.cutmix is 1.0"),
        ({"optim__label_smoothing": 0.1}, "optim.label_smoothing is 0.1"),
        ({"model__num_classes": 10}, "model.num_classes is 10"),
        ({"augment__reprob": 0.25}, "what is erased task simmim would learn to draw"),
        ({"simmim__mask_ratio": 1.0}, "simmim.mask_ratio is 1.0; it must lie between 0 and 1"),
        ({"simmim__norm_target": 46}, "simmim.norm_target is 46; it must be an odd number"),
        ({"simmim__mask_patch_size": 0}, "simmim.mask_patch_size is 0"),
        ({"task": "classify"}, "simmim.mask_patch_size is 8, but task is classify"),
        ({"task": "simmin"}, "did you mean 'simmim'"),
        ({"moe__backend": "tutel", "moe__aux_scope": "rank"}, "set moe.backend=native"),
    ],
)
def test_keys_of_another_task_and_values_without_sense_are_refused(tmp_path, digits, settings, message):
    with pytest.raises(UserError, match=message):
        loaded(tmp_path, digits, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"simmim__mask_patch_size": 12}, "simmim.mask_patch_size is 12, .* multiple of 8, .* set it to 8 or 16"),
        ({"simmim__mask_patch_size": 4}, "set it to 8 or 16"),
        ({"simmim__mask_patch_size": 32}, "of the 1 cells of 32 pixels in 32 x 32 hides them all"),
        ({"model__name": "swin_mlp_nano_patch4_window4_32"}, "SimMIM is defined for"),
    ],
)
def test_cells_that_do_not_fit_the_model_are_refused(tmp_path, digits, settings, message):
    with pytest.raises(UserError, match=message):
        request(tmp_path, digits, **settings)


def test_a_job_knows_masks_and_a_model_without_classes(tmp_path, digits):
    job = request(tmp_path, digits, data__val=f"[{digits[1]}]", run__seed=5)
    assert job.stream.recipe.masking == Masking(ratio=0.6, cell=8, patch=4, seed=5)
    assert job.val[0].recipe.masking == job.shown.recipe.masking == Masking(ratio=0.6, cell=8, patch=4, fixed=True)
    assert json.loads(json.dumps(job.model))["overrides"]["num_classes"] == 0 == architecture(job).num_classes
    assert job.model["classes"] == [] and job.task.flops(architecture(job)) > 0
    assert job.shown.sources[0].directory == digits[1]
    assert request(tmp_path, digits).shown.sources[0].directory == digits[0]
    assert request(tmp_path, digits, simmim__pictures=0).shown is None


@pytest.fixture
def unlabelled(digits, tmp_path):
    """The training shards, indexed without a label and without classes."""
    directory = tmp_path / "unlabelled"
    directory.mkdir()
    for path in digits[0].iterdir():
        (directory / path.name).symlink_to(path)
    rows = load_index(digits[0]).copy()
    rows["label"] = -1
    manifest = Manifest.load(digits[0])
    for name in ("index.npy", "manifest.json"):
        (directory / name).unlink()
    save_index(directory, rows)
    Manifest(shards=manifest.shards, classes=()).save(directory)
    return directory


def test_labels_are_not_needed(tmp_path, unlabelled, digits):
    """Shards without labels train beside labelled ones; classification says what it lacks."""
    job = request(tmp_path, (unlabelled,), data__val=f"[{digits[1]}]")
    both = request(tmp_path, digits, data__train=f"[{digits[0]},{unlabelled}]", data__weights="[1,1]")
    assert both.stream.samples == 2 * job.stream.samples
    with job.stream.batches(stop_step=1) as batches:
        batch = next(batches)
    assert (batch.labels == -1).all() and batch.valid.all()
    assert batch.masks.shape == (24, 8, 8) and (batch.masks.sum((1, 2)) == 10 * 4).all()
    with pytest.raises(DataError, match="300 samples have no label"):
        request(tmp_path, (unlabelled,), task="classify", simmim__mask_patch_size=32, augment__mixup_prob=0)
