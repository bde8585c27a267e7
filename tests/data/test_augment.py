import random

import numpy as np
import pytest
from PIL import Image

from swin_scale.config import Augment
from swin_scale.data.augment import EvalTransform, TrainTransform, color_jitter, erase_boxes, resized_crop_box
from swin_scale.data.keyed import scalar_rng
from swin_scale.errors import UserError
from tests.data.conftest import photo
from tests.peers import timm, torchvision

OFF = Augment(
    crop_scale=(1, 1), crop_ratio=(1, 1), hflip=0, auto_augment="none", color_jitter=0, reprob=0, mixup=0, cutmix=0
)
SIZES = [(48, 40), (200, 31), (30, 220), (64, 64)]


@pytest.mark.parametrize("size", SIZES)
def test_crop_box_draws_as_timm(size):
    from timm.data.transforms import RandomResizedCropAndInterpolation

    for seed in range(200):
        random.seed(seed)
        theirs = RandomResizedCropAndInterpolation.get_params(Image.new("RGB", size), (0.08, 1.0), (3 / 4, 4 / 3))
        assert resized_crop_box(*size, (0.08, 1.0), (3 / 4, 4 / 3), random.Random(seed)) == theirs


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", [(32, 32), (96, 64)])
def test_erase_boxes_draw_as_timm(shape, count):
    import torch
    from timm.data.random_erasing import RandomErasing

    for seed in range(100):
        random.seed(seed)
        erased = torch.ones(1, *shape)
        RandomErasing(0.5, mode="const", max_count=count, device="cpu")(erased)
        ours = torch.ones(1, *shape)
        for top, left, height, width in erase_boxes(*shape, 0.5, count, random.Random(seed)):
            ours[:, top : top + height, left : left + width] = 0
        assert torch.equal(erased, ours)


class Draws:
    """Stands in for the `random` module and the few numpy and torch draws of the peers, all fed by one generator."""

    def __init__(self, seed, monkeypatch):
        import timm.data.auto_augment
        import timm.data.transforms
        import torch

        self.rng = random.Random(seed)
        monkeypatch.setattr(timm.data.auto_augment, "random", self.rng)
        monkeypatch.setattr(timm.data.transforms, "random", self.rng)
        monkeypatch.setattr(
            np.random, "choice", lambda ops, n, **_: [ops[self.rng.randrange(len(ops))] for _ in range(n)]
        )
        monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor([self.rng.random()], dtype=torch.float64))


@pytest.mark.parametrize("img_size", [64, (64, 96)])
@pytest.mark.parametrize("size", SIZES)
def test_whole_training_view_equals_timm(img_size, size, monkeypatch):
    """Same random numbers in, same pixels out: crop, flip and RandAugment as timm's own factory composes them."""
    recipe = Augment(reprob=0)
    theirs = timm.data.create_transform(
        img_size, is_training=True, auto_augment=recipe.auto_augment, interpolation="bicubic", normalize=False
    )
    ours = TrainTransform.create(recipe, img_size)
    for seed in range(60):
        image = photo(seed, *size)
        with monkeypatch.context() as patch:
            Draws(seed, patch)
            expected = theirs(image).permute(1, 2, 0).numpy()
        pixels, boxes = ours(image, random.Random(seed))
        assert boxes == [] and np.array_equal(pixels, expected), seed


def test_small_images_are_padded_and_cropped():
    image = photo(0, 32, 32)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
    transform = TrainTransform.create(Augment(hflip=0, auto_augment="none", color_jitter=0, reprob=0), 32)
    seen = set()
    for seed in range(300):
        rng = random.Random(seed)
        pixels, _ = transform(image, random.Random(seed))
        top, left = rng.randint(0, 8), rng.randint(0, 8)
        assert np.array_equal(pixels, padded[top : top + 32, left : left + 32])
        seen.add((top, left))
    assert len(seen) > 70
    digit, _ = transform(photo(1, 28, 28), random.Random(0))
    assert digit.shape == (32, 32, 3)
    assert transform(photo(1, 7, 9), random.Random(0))[0].shape == (32, 32, 3)
    resized = TrainTransform.create(Augment(crop="resized"), 32)(photo(1, 7, 9), random.Random(0))[0]
    assert resized.shape == (32, 32, 3)


def test_everything_off_is_the_identity():
    image = photo(3, 64, 64)
    pixels, boxes = TrainTransform.create(OFF, 64)(image, random.Random(0))
    assert np.array_equal(pixels, np.asarray(image)) and boxes == []


def test_view_depends_on_its_key_alone():
    transform = TrainTransform.create(Augment(), 64)
    views = [transform(photo(0), scalar_rng("augment", 1, epoch, 5, copy)) for epoch in (0, 1) for copy in (0, 1)]
    again = transform(photo(0), scalar_rng("augment", 1, 0, 5, 0))
    assert np.array_equal(views[0][0], again[0]) and views[0][1] == again[1]
    assert len({pixels.tobytes() for pixels, _ in views}) == 4


def test_color_jitter_operations_equal_torchvision():
    import torchvision.transforms.functional as F

    for seed in range(20):
        rng = random.Random(seed)
        expected = photo(seed)
        order = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
        rng.shuffle(order)
        for change in order:
            expected = change(expected, rng.uniform(0.6, 1.4))
        assert np.array_equal(color_jitter(photo(seed), 0.4, random.Random(seed)), expected)


@pytest.mark.parametrize("size", [*SIZES, (333, 501), (500, 375)])
@pytest.mark.parametrize("img_size", [64, 192, 224])
@pytest.mark.parametrize("crop", [True, False])
def test_eval_view_equals_the_official_one(size, img_size, crop):
    """torchvision's Resize and CenterCrop, as the official loader composes them."""
    T = torchvision.transforms
    bicubic = T.InterpolationMode.BICUBIC
    if crop:
        steps = [T.Resize(int(256 / 224 * img_size), interpolation=bicubic), T.CenterCrop(img_size)]
    else:
        steps = [T.Resize((img_size, img_size), interpolation=bicubic)]
    image = photo(4, *size)
    ours, _ = EvalTransform.create(Augment(eval_crop=crop), img_size)(image)
    assert np.array_equal(ours, np.asarray(T.Compose(steps)(image)))


def test_eval_view_of_other_shapes():
    assert EvalTransform.create(Augment(), (64, 128))(photo(5, 100, 90))[0].shape == (64, 128, 3)
    small = np.asarray(photo(5, 28, 28))
    view = EvalTransform.create(Augment(), 32)(photo(5, 28, 28))[0]
    assert np.array_equal(view[2:30, 2:30], small) and view.sum() == small.sum()


@pytest.mark.parametrize("recipe", ["rand-m9-mstd0.5", "augmix-m3", "rand-q4-inc1", "rand-m9-inc0"])
def test_unknown_recipes_are_refused(recipe):
    with pytest.raises(UserError, match=r"augment\.auto_augment"):
        TrainTransform.create(Augment(auto_augment=recipe), 64)


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match=r"data\.img_size"):
        TrainTransform.create(Augment(), (0, 5))
