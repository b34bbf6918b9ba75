"""The report: nothing fetched from elsewhere, names escaped, everything in its order."""
import re

import pytest
from PIL import Image

from icf.engine.report import page, write_report

HISTORY = {"steps": [{"step": i, "loss": 1 / i, "lr": 1e-3} for i in (1, 2)],
           "evaluations": [{"step": 2, "J": 0.4, "F": 0.5}]}


@pytest.fixture(scope="module")
def report(tmp_path_factory, make_sample, make_results):
    out = tmp_path_factory.mktemp("report")
    write_report(out, make_results(), [make_sample("worst <b>clip"), make_sample("second", "best")], history=HISTORY)
    return out


def test_report_needs_nothing_but_itself(report):
    html = (report / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']{0,30})""", html)
    assert len(sources) == 1 + 2 * 4 and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)


def test_report_escapes_names_and_keeps_the_order(report):
    html = (report / "report.html").read_text()
    assert "<b>clip" not in html and "worst &lt;b&gt;clip" in html
    assert html.index("worst &lt;b&gt;clip") < html.index(">second ")
    assert html.index("<td>dog") < html.index("<td>violin"), "the worst category first"


def test_report_shows_scores_groups_negatives_and_settings(report):
    html = (report / "report.html").read_text()
    for text in ("0.6000", "0.0123", "0.4321", "0.8765", "per_video", "resolution", "7 clips, 35 scored frames"):
        assert text in html


def test_pictures_lie_beside_the_report(report):
    assert Image.open(report / "curves.png").format == "PNG" and Image.open(report / "overlays.jpg").format == "JPEG"
    assert sorted(path.name for path in report.iterdir()) == ["curves.png", "overlays.jpg", "report.html"]


def test_page_of_classes_without_pictures(make_semantic_results):
    html = page(make_semantic_results(), [], ["background", "dog"])
    assert "<img" not in html and "all classes, padding too, with background" in html
