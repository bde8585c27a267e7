"""SimMIM as a task: masks that no layout changes, evaluation by hand, pictures that show what was hidden."""

import numpy as np
import pytest
import torch

from swin_scale.convert import load_weights
from swin_scale.data import finish
from swin_scale.data.masking import FIXED_EPOCH, draw_mask
from swin_scale.data.order import as_bad
from swin_scale.models import create_simmim
from swin_scale.tasks.simmim import GREY, fitted, to_pixels
from tests.spawn import spawn_dist
from tests.tasks.test_config import loaded, request

V2, MOE = "swinv2_nano_patch4_window4_32", "swin_moe_nano_patch4_window4_32"
KEY = {"ratio": 0.6, "cell": 8, "patch": 4}


def masks_by_sample(stream, world, workers, **options):
    """(epoch, id) -> mask, of the slots of all ranks."""
    found = {}
    for rank in range(world):
        with stream.batches(rank=rank, world=world, workers=workers, **options) as batches:
            for batch in batches:
                assert batch.masks.dtype == torch.uint8
                for number, mask in zip(batch.ids.tolist(), batch.masks.numpy(), strict=True):
                    assert number >= 0 or not mask.any()
                    found[batch.epoch, number] = mask.copy()
    return found


@pytest.mark.parametrize(("world", "workers"), [(2, 0), pytest.param(3, 2, marks=pytest.mark.proof)])
def test_masks_are_a_function_of_seed_epoch_and_sample_alone(tmp_path, digits, world, workers):
    """Over an epoch's end, for any number of ranks and workers; those of evaluation for ever the same."""
    job = request(tmp_path, digits, run__seed=3, data__val=f"[{digits[1]}]")
    whole = masks_by_sample(job.stream, 1, 0, start_step=12, stop_step=15)
    assert {epoch for epoch, _ in whole} == {0, 1}
    for (epoch, sample), mask in whole.items():
        if sample >= 0:
            assert np.array_equal(mask, draw_mask(32, 32, **KEY, seed=3, epoch=epoch, sample=sample))
    cut = masks_by_sample(job.stream, world, workers, start_step=12, stop_step=15)
    assert cut.keys() == whole.keys() and all(np.array_equal(mask, whole[key]) for key, mask in cut.items())
    for (_, sample), mask in masks_by_sample(job.val[0], 1, 0).items():
        if sample >= 0:
            assert np.array_equal(mask, draw_mask(32, 32, **KEY, seed=0, epoch=FIXED_EPOCH, sample=sample))


def test_streams_that_are_not_asked_for_masks_have_none(tmp_path, digits):
    job = request(tmp_path, digits, task="classify", simmim__mask_patch_size=32, augment__mixup_prob=0)
    with job.stream.batches(stop_step=1) as batches:
        assert next(batches).masks.shape == (24, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_hold_images_in_fp32_whatever_the_engine(tmp_path, digits, dtype):
    job = request(tmp_path, digits, train__micro_batch=8)
    with job.stream.batches(stop_step=1) as batches:
        batch = next(batches)
    micros = list(job.task.micro_batches(batch, job.plan, device=torch.device("cpu"), dtype=dtype))
    assert [len(micro.inputs) for micro in micros] == [8, 8, 8]
    assert torch.equal(torch.cat([micro.inputs for micro in micros]), finish(batch.images))
    assert torch.equal(torch.cat([micro.targets for micro in micros]), batch.masks)
    assert torch.cat([micro.valid for micro in micros]).all()


def test_targets_are_not_rounded_with_the_encoder():
    """In bf16 the loss of a model that draws zeros is that of the image in fp32, which bf16 would get wrong."""
    model = create_simmim(V2, mask_patch_size=8).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, 8, 8)
    assert model(x, mask).item() == pytest.approx(x.abs().mean().item(), rel=1e-6)
    assert abs(model(x.bfloat16(), mask).item() - x.abs().mean().item()) > 1e-6


def evaluate_case(dist, found, ranks, name):
    from swin_scale.job import prepare

    job = prepare(found, ranks)
    model = create_simmim(name, mask_patch_size=8, norm_target=7).eval()
    with torch.no_grad():
        return job.task.evaluate(model, job.val, dist, dtype=torch.float32, workers=0)


@pytest.mark.parametrize("name", [V2, pytest.param(MOE, marks=pytest.mark.proof)])
def test_evaluation_is_the_mean_over_all_hidden_pixels_on_any_number_of_ranks(tmp_path, digits, name):
    """50 images in batches of 24: of which the last is not full."""
    settings = {"data__val": f"[{digits[1]}]", "model__name": name, "simmim__norm_target": 7}
    job = request(tmp_path, digits, **settings)
    images, masks = [], []
    with job.val[0].batches() as batches:
        for batch in batches:
            images.append(batch.images[batch.valid].clone())
            masks.append(batch.masks[batch.valid].clone())
    model = create_simmim(name, mask_patch_size=8, norm_target=7).eval()
    with torch.no_grad():
        found = model(finish(torch.cat(images)), torch.cat(masks))
    wanted = float(found[0] if isinstance(found, tuple) else found)
    config = loaded(tmp_path, digits, **settings, train__eval_batch=6)
    for world in (1, 2, 3):
        for figures in spawn_dist(world, evaluate_case, config, world, name):
            assert figures == {"loss": pytest.approx(wanted, rel=1e-6), "samples": 50, "unusable": 0}


def test_a_picture_shows_images_what_is_seen_of_them_and_what_is_drawn_where_nothing_is(tmp_path, digits):
    job = request(tmp_path, digits, data__val=f"[{digits[1]}]", simmim__pictures=5)
    with job.shown.batches() as batches:
        batch = next(batches)
    # The second image cannot be used: it has no place on the picture.
    batch.ids[1] = as_bad(int(batch.ids[1]))
    kept = batch.valid

    def draws_white(x, mask, output):
        assert output == "drawing" and x.shape == (5, 3, 32, 32)
        return torch.full_like(x, 1e9)

    picture = job.task.draw(draws_white, batch, torch.device("cpu"))
    assert picture.dtype == torch.uint8 and picture.shape == (3, 3 * 98 + 2, 4 * 98 + 2)
    rows = picture[:, 2:, 2:].unflatten(1, (3, 98)).unflatten(3, (4, 98))[:, :, :96, :, :96].permute(1, 3, 0, 2, 4)
    images, seen, drawn = rows[..., ::3, ::3]
    hidden = batch.masks[kept].bool().repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(images)
    assert torch.equal(images, batch.images[kept])
    assert torch.equal(seen[~hidden], images[~hidden]) and (seen[hidden] == GREY).all()
    assert torch.equal(drawn[~hidden], images[~hidden]) and (drawn[hidden] == 255).all()


def test_pixels_come_back_from_normalised_images():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_pixels(finish(images)), images)
    assert to_pixels(torch.tensor([torch.nan, 1e9, -1e9]).view(1, 1, 1, 3).expand(1, 3, 1, 3)).unique().tolist() == [
        0,
        255,
    ]


@pytest.mark.parametrize(("side", "wanted"), [(32, 96), (96, 96), (192, 192), (384, 192), (640, 213)])
def test_images_on_pictures_are_neither_tiny_nor_huge(side, wanted):
    assert fitted(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[-1] == wanted


@pytest.mark.parametrize("name", [V2, MOE])
def test_pre_training_may_start_from_weights_of_pre_training(tmp_path, name):
    """An official file: every key is accounted for and nothing is new, the decoder included."""
    source, target = (create_simmim(name, mask_patch_size=8, seed=seed) for seed in (1, 2))
    torch.save({"model": source.state_dict()}, tmp_path / "pretrained.pth")
    report = load_weights(target, tmp_path / "pretrained.pth")
    assert not report.dropped and not report.created and len(report.copied) == len(source.state_dict())
    assert all(torch.equal(value, target.get_parameter(key)) for key, value in source.named_parameters())
