"""The routing page as text: what it says, what it must never hold, how large it gets."""

import re

import numpy as np
import pytest

from swin_scale.report.survey_page import MAX_BANDS, survey_page
from tests.report.surveys import layer, survey
from tests.report.test_report import HOSTILE, Page


def render(*layers, **changes):
    return Page(survey_page(survey(*layers, **changes), 1_790_000_000.0))


def test_every_layer_has_its_pictures_and_its_row():
    page = render(layer(), layer("layers.3.blocks.1", experts=4, drop=0.5, top_k=2))
    ids = [svg["id"] for svg in page.of("svg") if "id" in svg]
    assert ids[:3] == ["p-load-0", "p-confidence-0", "p-classes-0"] and ids[3:11] == [
        f"p-places-0-{e}" for e in range(8)
    ]
    assert ids[11:15] == ["p-load-1", "p-confidence-1", "p-classes-1", "p-dropped-1"] and len(ids) == 11 + 8
    assert len(set(ids)) == len(ids)
    titles = {attrs["id"] for tag, attrs in page.tags if tag in ("title", "desc") and "id" in attrs}
    assert all(set(svg["aria-labelledby"].split()) <= titles for svg in page.of("svg") if "id" in svg)
    for text in (
        "of 250",
        "4 / 8",
        "1 / 2",
        "4 × 4",
        "kind 3 (7",
        "an even share, 12.5 %",
        "1.50 of 2.08 nats",
        "0.40",
    ):
        assert text in page.text, text


def test_the_figures_are_those_of_the_counts():
    one = layer(classes=8, experts=8)
    page = render(one)
    load = one.by_class.sum(0) / one.by_class.sum()
    assert f"{load.std() / load.mean():.2f} of 2.65" in page.text
    assert f"expert {load.argmax()} with {100 * load.max():.3g} %" in page.text
    tells = re.search(r"nats([\d.]+) %([\d.]+) %", page.text)
    # H(E) - H(E|C) of a class that is at home with 3/4: by hand, in parts of ln 8.
    wanted = 1 + (0.75 * np.log(0.75) + 0.25 * np.log(0.25 / 7)) / np.log(8)
    assert float(tells[1]) / 100 == pytest.approx(wanted, abs=0.02)


def test_all_classes_of_22k_and_128_experts_fit_a_small_file():
    text = survey_page(survey(layer(classes=21_841, experts=128, side=56, drop=0.2)), 0.0)
    assert len(text) < 600_000
    page = Page(text)
    assert "a row is the mean of 218 or 219 classes" in page.text and "80 least used experts are left out" in page.text
    assert "Places are pooled to 14 × 14" in page.text and page.text.count("kind ") == 128 * 5
    (bands,) = (svg for svg in page.of("svg") if svg.get("id") == "p-classes-0")
    assert bands["data-cells"].count('"classes kind ') == MAX_BANDS


@pytest.mark.parametrize("experts", [1, 2])
def test_the_least_that_can_be(experts):
    page = render(layer(classes=1, experts=experts, side=1), names=["only"])
    assert "only" in page.text and "nan" not in page.text.lower()
    idle = layer(classes=3, experts=2)
    idle.by_class[:, 1] = idle.first_choices[1] = 0
    assert "nan" not in render(idle).text.lower()


def test_the_page_asks_for_nothing_and_hostile_names_stay_text():
    page = render(layer(HOSTILE), names=[HOSTILE] * 10, title=HOSTILE, weights=HOSTILE, data=(HOSTILE,))
    assert len(page.of("script")) == 1 and not page.of("img") and not page.of("link")
    assert not any(name in attrs for _, attrs in page.tags for name in ("src", "href", "style", "onclick", "onerror"))
    assert page.of("meta")[1]["content"].startswith("default-src 'none'; ")
