"""Pictures and the report: colours where they belong, every score with its mode, nothing fetched from elsewhere."""
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from icf.engine.curves import curves
from icf.engine.pictures import FALSE, MISSED, RIGHT, Sample, contact_sheet, mel_picture, overlay, strips
from icf.engine.report import page, write_report
from icf.engine.score_tables import score_sections, score_tables

T, SIDE = 3, 40
HISTORY = {"steps": [{"step": i, "loss": 1 / i, "bce": 0.5 / i, "lr": 1e-3} for i in range(1, 40)],
           "evaluations": [{"epoch": 1, "step": 20, "J": 0.4, "F": 0.5}, {"epoch": 2, "step": 39, "J": 0.5, "F": 0.6}]}
PIXELS = {"mIoU/zero": 0.61, "FDR": 0.07}


def sample(name="clip", rank="worst", prediction=None):
    truth = torch.zeros(T, SIDE, SIDE, dtype=torch.uint8)
    truth[:, 10:30, 10:30] = 1
    prediction = truth.clone() if prediction is None else prediction
    return Sample(name, torch.full((T, 3, SIDE, SIDE), 100, dtype=torch.uint8), torch.zeros(T, 1, 96, 64), truth,
                  torch.ones(T, dtype=torch.bool), prediction, 0.25, None, rank, ("conflicting",))


def results(**changes):
    j = {f"{empty}/{mean}": 0.5 + 0.01 * i for i, (empty, mean) in enumerate(
        (empty, mean) for empty in ("background", "strict", "skip") for mean in ("frame", "batch:4"))}
    f = {f"{group}/{empty}": 0.7 + 0.01 * i for i, (group, empty) in enumerate(
        (group, empty) for group in ("per_video", "batch:2", "batch:4", "dataset") for empty in ("skip", "zero"))}
    silence = {"FPR": 0.0123, "strict": 0.9, "J": 0.1, "F": 0.1, "sensitivity": 0.4, "change": 0.2}
    classes = [{"class": name, "clips": 3, "J": value, "F": 0.5} for name, value in (("violin", 0.9), ("dog", 0.1))]
    return {"split": "test", "subset": "s4", "J": 0.5, "F": 0.7, "J&F": 0.6,
            "default_modes": {"J": "background/frame", "F": "per_video/skip"},
            "scores": {"J": {**j, "false_positive/empty": None}, "F": f, "pixels": PIXELS},
            "groups": {"aligned": {"clips": 3, "J": 0.9, "F": 0.9, "J&F": 0.9},
                       "conflicting": {"clips": 4, "J": 0.2, "F": 0.3, "J&F": 0.25}},
            "gap": {"J": 0.7, "F": 0.6, "J&F": 0.65}, "oracles": {"salience": {"J": 0.4321}}, "combined": 0.8765,
            "negatives": {"silence": silence}, "classes": classes, "counts": {"clips": 7, "scored_frames": 35},
            "settings": {"resolution": 224, "toy": None}, **changes}


def semantic_results():
    modes = {f"{key}/{divide}/{frames}/{background}": 0.3 for key in "JF" for divide in ("all", "seen")
             for frames in ("real", "padded") for background in ("include", "exclude", "public")}
    scores = {"AVSS": {**modes, "J/all/padded/include": 0.3456}, "AVSS, at least 16 pixels": modes,
              "J of the foreground": {"background/frame": 0.8, "strict/frame": 0.7}, "pixels": PIXELS}
    return results(subset="avss", scores=scores, default_modes={"J": "J/all/real/include", "F": "F/all/real/include"})


# pictures

def test_overlay_colours_the_mask_and_nothing_else():
    frame, mask = np.full((12, 16, 3), 100, np.uint8), np.zeros((12, 16), np.uint8)
    mask[3:9, 4:12], mask[0] = 1, 255
    picture = np.asarray(overlay(frame, mask, (200, 0, 0), alpha=0.5, dim=0.25))
    assert picture[5, 6].tolist() == [150, 50, 50], "inside, half of each"
    assert picture[3, 4].tolist() == [200, 0, 0], "outline, solid"
    assert picture[11, 0].tolist() == picture[0, 5].tolist() == [75, 75, 75], "outside and ignored, dimmed"
    assert np.array_equal(picture, overlay(frame.transpose(2, 0, 1), mask, (200, 0, 0), dim=0.25))
    assert np.array_equal(frame, np.full((12, 16, 3), 100)), "the frame itself is left alone"


def test_overlay_takes_a_colour_per_class():
    mask = np.zeros((9, 18), np.uint8)
    mask[:, :9], mask[:, 9:] = 1, 2
    picture = np.asarray(overlay(np.zeros((3, 9, 18), np.uint8), mask, [(9, 9, 9), (200, 0, 0), (0, 0, 100)]))
    assert picture[4, 4].tolist() == [100, 0, 0] and picture[4, 14].tolist() == [0, 0, 50]


def test_overlay_refuses_a_mask_of_another_size():
    with pytest.raises(ValueError, match=r"\(8, 9\)"):
        overlay(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9), np.uint8), (1, 2, 3))


def test_prediction_shows_what_is_right_false_and_missed():
    prediction = torch.zeros(T, SIDE, SIDE, dtype=torch.uint8)
    prediction[:, 10:30, 20:40] = 1
    picture = np.asarray(strips(sample(prediction=prediction), ())["prediction"]).astype(int)
    scale = picture.shape[0] // SIDE
    for column, color in ((15, MISSED), (25, RIGHT), (35, FALSE)):
        expected = (np.array(color) + 100) / 2                     # opacity one half over a grey of 100
        assert np.abs(picture[20 * scale, column * scale] - expected).max() <= 2


def test_mel_picture_has_time_to_the_right_and_low_tones_below():
    log_mel = torch.full((2, 1, 96, 64), -4.6)
    log_mel[1, :, :, 5] = 4
    picture = np.asarray(mel_picture(log_mel)).astype(int).sum(2)
    assert picture.shape == (64, 192)
    assert picture[63 - 5, 140] == picture.max() and picture[63 - 5, 50] < picture.max() / 5


def test_contact_sheet_holds_all_clips():
    one, two = (contact_sheet([sample()] * n).size for n in (1, 2))
    assert one[0] == two[0] and two[1] - 12 == 2 * (one[1] - 12)


@pytest.mark.parametrize("history", [
    pytest.param(HISTORY, id="whole run"),
    pytest.param({**HISTORY, "evaluations": []}, id="before the first evaluation"),
    pytest.param({"steps": HISTORY["steps"][:1]}, id="one step"),
    pytest.param({"steps": []}, id="nothing yet"),
])
def test_curves_of_a_run_at_any_time(history):
    image = np.asarray(Image.open(io.BytesIO(curves(history))))
    assert image.shape[2] == 4 and image[0, 0, 3] == 0, "transparent, for light and dark pages"
    assert image[..., 3].max() > 200


# scores

def test_rows_start_with_the_published_modes():
    title, _, rows = score_sections(results())[0]
    assert title == "Comparable with published numbers"
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("J", 0.5, "AVSBench, AVSegFormer, COMBO"), ("F", 0.75, "AVSBench"), ("F", 0.73, "AVSegFormer"),
        ("F", 0.71, "COMBO"), ("F", 0.77, "")]
    assert score_sections(semantic_results())[0][2][0] == (
        "J", "all classes, padding too, with background", 0.3456, "AVSBench, AVSegFormer")


@pytest.mark.parametrize("make", [results, semantic_results])
def test_every_score_is_printed_with_its_mode(make):
    console = Console(width=160, file=io.StringIO())
    console.print(score_tables(make()))
    text = console.file.getvalue()
    for _, _, rows in score_sections(make()):
        for score, mode, value, _ in rows:
            shown = "-" if value is None else f"{value:.4f}"
            assert re.search(rf"{re.escape(score)}\s+│ {re.escape(mode)}\s+│\s+{shown}", text), (score, mode)
    assert "0.4321" in text and "0.0123" in text and "0.8765" in text


# the page

@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    write_report(out, results(), [sample("worst <b>clip"), sample("second", "best")], history=HISTORY)
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


def test_page_of_classes_without_pictures():
    html = page(semantic_results(), [], ["background", "dog"])
    assert "<img" not in html and "all classes, padding too, with background" in html
