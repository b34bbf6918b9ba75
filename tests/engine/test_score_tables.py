"""Scores as rows and for a terminal: every one with its mode."""
import io
import re

import pytest
from rich.console import Console

from icf.engine.score_tables import score_sections, score_tables


def test_rows_start_with_the_published_modes(make_results, make_semantic_results):
    title, _, rows = score_sections(make_results())[0]
    assert title == "Comparable with published numbers"
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("J", 0.5, "AVSBench, AVSegFormer, COMBO"), ("F", 0.75, "AVSBench"), ("F", 0.73, "AVSegFormer"),
        ("F", 0.71, "COMBO"), ("F", 0.77, "")]
    assert score_sections(make_semantic_results())[0][2][0] == (
        "J", "all classes, padding too, with background", 0.3456, "AVSBench, AVSegFormer")


@pytest.mark.parametrize("kind", ["make_results", "make_semantic_results"])
def test_every_score_is_printed_with_its_mode(kind, request):
    make = request.getfixturevalue(kind)
    console = Console(width=160, file=io.StringIO())
    console.print(score_tables(make()))
    text = console.file.getvalue()
    for _, _, rows in score_sections(make()):
        for score, mode, value, _ in rows:
            shown = "-" if value is None else f"{value:.4f}"
            assert re.search(rf"{re.escape(score)}\s+│ {re.escape(mode)}\s+│\s+{shown}", text), (score, mode)
    assert "0.4321" in text and "0.0123" in text and "0.8765" in text
