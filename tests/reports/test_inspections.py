"""What a net confuses, on the page of a report."""

from __future__ import annotations

import pytest

from reports.conftest import report
from reports.test_browser import CHROMIUM, probed

NAMES = ["gear", "nut", "a bolt with a very long name", "<b>washer</b>"]


@pytest.fixture
def model(make, tmp_path):
    return make.model(tmp_path / "net")


def page_of(tmp_path, *models):
    found = report(models, out=tmp_path / "report", force=True)
    return found, (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_page_shows_counts_mistakes_and_map(make, tmp_path, model):
    make.inspection(model, classes=NAMES)
    found, page = page_of(tmp_path, model)
    (inspection,) = found["inspections"]
    assert inspection["in_words"] == (
        "The linear probe takes 4 of 40 held-out images for another class, most often gear for nut (1)."
    )
    assert "36 of 40 on the diagonal" in page
    assert page.count("data:image/jpeg;base64,") == 4
    assert "taken for &lt;b&gt;washer&lt;/b&gt;, 90" in page
    assert "<b>washer" not in page
    assert "4 held-out images by their features, PCA" in page
    # The pictures are on the page alone.
    assert "picture" not in str(found)


def test_of_many_classes_those_confused_most_are_drawn(make, tmp_path, model):
    make.inspection(model, classes=[f"class {number}" for number in range(30)])
    _, page = page_of(tmp_path, model)
    assert page.count("Of 30 classes the 20 that are confused most") == 2


def test_a_random_net_and_one_of_another_time_are_not_shown(make, tmp_path, model):
    random = make.model(tmp_path / "random", origin="random")
    make.inspection(random, classes=NAMES)
    make.inspection(model, classes=NAMES)
    make.model(model, linear=50.0, step=7)  # carved anew
    found, _ = page_of(tmp_path, model, random)
    assert found["inspections"] == []
    assert any("inspection.json was made from" in note for note in found["notes"])


def test_what_is_no_picture_does_nothing(make, tmp_path, model):
    make.inspection(model, classes=NAMES, picture='"><script>alert(1)</script>')
    assert "<script" not in page_of(tmp_path, model)[1]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize("width", [1200, 500])
def test_it_fits_the_page(make, tmp_path, model, width):
    make.inspection(model, classes=[*NAMES, *(f"class number {number}" for number in range(30))])
    page_of(tmp_path, model)
    dom = probed(tmp_path / "report", tmp_path, width)
    assert 'data-wide="0"' in dom
    assert 'data-texts="[]"' in dom
