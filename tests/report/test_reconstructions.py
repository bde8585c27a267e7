"""Pictures on the page: in it, few, small, and nothing that is not a picture."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from swin_scale.report import write_report
from swin_scale.report.reconstructions import MAX_BYTES, SHOWN, reconstructions
from tests.report import rundir
from tests.report.test_report import Page


def picture(kind="WEBP", seed=0):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, lossless=True)
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path):
    run = rundir.write(tmp_path / "run", [rundir.row(1), rundir.event("picture", 1, file="pictures/x.webp")])
    (run / "pictures").mkdir()
    return run


def test_pictures_are_in_the_page_itself(run):
    for step, kind in ((5, "WEBP"), (10, "PNG")):
        (run / "pictures" / f"step_{step:08d}.{kind.lower()}").write_bytes(picture(kind, step))
    page = Page(write_report(run).read_text())
    first, second = page.of("img")
    assert first["src"] == "data:image/webp;base64," + base64.b64encode(picture("WEBP", 5)).decode()
    assert second["src"].startswith("data:image/png;base64,") and "after 10 steps" in second["alt"]
    assert "img-src data:;" in page.of("meta")[1]["content"] and "Step 10" in page.text


def test_of_many_the_first_the_last_and_some_between_are_shown(run):
    for step in range(100):
        (run / "pictures" / f"step_{step:08d}.webp").write_bytes(picture())
    section = reconstructions(run)
    assert section.count("<img") == SHOWN and "6 of 100" in section
    assert all(f"Step {step}<" in section for step in (0, 20, 40, 59, 79, 99))


def test_what_is_no_picture_or_too_large_or_elsewhere_is_left_out(run, tmp_path):
    (tmp_path / "secret.webp").write_bytes(picture())
    (run / "pictures" / "step_00000001.webp").write_text("<script>")
    (run / "pictures" / "step_00000002.webp").write_bytes(picture() + bytes(MAX_BYTES))
    (run / "pictures" / "step_00000003.webp").symlink_to(tmp_path / "secret.webp")
    (run / "pictures" / "step_00000004.webp").mkdir()
    (run / "pictures" / "portrait.webp").write_bytes(picture())
    assert reconstructions(run) == ""
    (run / "pictures" / "step_00000005.webp").write_bytes(picture())
    assert reconstructions(run).count("<img") == 1


def test_a_run_without_pictures_has_no_section(run):
    assert reconstructions(run) == "" == reconstructions(run / "nowhere")
