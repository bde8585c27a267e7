import random

import numpy as np
import pytest
from PIL import Image

from swin_scale.data.randaugment import FILL, OPERATIONS, RandAugment
from tests.data.conftest import photo
from tests.peers import timm


def test_same_operations_in_the_same_order_as_timm():
    assert tuple(OPERATIONS) == tuple(timm.data.auto_augment.rand_augment_choices("", increasing=True))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0.0, 3.3, 9.0, 10.0])
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_operation_equals_timm(name, magnitude, resample, monkeypatch):
    """Same argument from the same magnitude and sign, and the same pixels from the same argument."""
    peer = timm.data.auto_augment
    hparams = {"img_mean": FILL, "translate_const": 28, "interpolation": resample}
    theirs = peer.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
    operation, argument = OPERATIONS[name]
    for seed in range(4):
        image = photo(seed, 50, 37)
        monkeypatch.setattr(peer, "random", random.Random(seed))
        ours = operation(image, argument(magnitude, random.Random(seed)), resample)
        if (name, magnitude) == ("PosterizeIncreasing", 10.0):
            # timm lets Pillow decide, which masks all bits in old releases and raises in new ones.
            assert not np.asarray(ours).any()
            continue
        assert np.array_equal(np.asarray(ours), np.asarray(theirs(image)))


def test_fill_is_the_one_timm_derives():
    assert tuple(min(255, round(255 * x)) for x in timm.data.IMAGENET_DEFAULT_MEAN) == FILL


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("rand-m9-mstd0.5-inc1", RandAugment(9.0, 0.5, 2, 0.5)),
        ("rand-inc1", RandAugment(10.0, 0.0, 2, 0.5)),
        ("rand-m7-n3-p1-inc1", RandAugment(7.0, 0.0, 3, 1.0)),
    ],
)
def test_parse(recipe, expected):
    assert RandAugment.parse(recipe) == expected


def test_half_of_the_operations_are_applied():
    image = photo(0)
    policy = RandAugment(layers=1)
    changed = sum(policy(image, random.Random(seed)) is not image for seed in range(1000))
    assert 440 < changed < 560
