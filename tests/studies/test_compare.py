"""Runs side by side: who is a column, which clip is a row, and what the numbers below the pictures mean."""
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from icf.cli import main
from icf.config import Config, DataConfig
from icf.data import build_dataset
from icf.engine.checkpoint import load_model, save_weights
from icf.engine.evaluate import evaluate
from icf.model.icf import ICF
from icf.studies.compare import (
    Features,
    Run,
    compare,
    embed,
    examine,
    measures,
    most_different,
    scatter,
    sounding,
)

DIM, CLIPS, SECONDS = 16, 8, 5                                             # clips of the tiny MS3 test split
DECODER = {"dim": DIM, "heads": 2, "pixel_ffn": 32, "layers": 1, "ffn": 32, "queries": 4}
DATA = {"subset": "ms3", "size": 64, "workers": 0, "cache": True}


@pytest.fixture(scope="module")
def save_run(small, toy_root):
    """Makes a run folder with the weights of a model that was never trained."""
    def save_run(folder, seed=0, data=None, **decoder):
        torch.manual_seed(seed)
        cfg = small(data={**DATA, "root": str(toy_root), **(data or {})}, model={"decoder": {**DECODER, **decoder}},
                    eval={"negatives": ["silence"]}, out=str(folder))
        save_weights(folder / "best.safetensors", ICF(cfg.model).state_dict(), cfg)
        return folder
    return save_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, save_run):
    """Two runs, the first one evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    first, second = save_run(folder / "plain"), save_run(folder / "no <b>sound", 1, query_mode="learnable")
    evaluate(*load_model(first), out=first, progress=False, report=False)
    return first, second


@pytest.fixture(scope="module")
def html(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    main(["compare", *map(str, runs), "--out", str(out), "--rows", str(CLIPS), "--device", "cpu"])
    assert [path.name for path in out.iterdir()] == ["compare.html"]
    return (out / "compare.html").read_text()


# the page


def test_page_needs_nothing_but_itself(html):
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']{0,30})""", html)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://|<script|<link|@import|url\(", html) and "prefers-color-scheme:dark" in html


def test_every_run_is_a_column_and_every_clip_a_row(html, toy_root):
    table = html[html.index("<table class=gallery>"):]
    assert re.findall("<th>(.*?)</th>", table) == ["clip", "frame", "truth", "plain", "no &lt;b&gt;sound"]
    rows = re.findall("<tr><th scope=row>(.*?)<small>.*?</tr>", table)
    assert sorted(rows) == [f"ms3_test_{i:05d}" for i in range(CLIPS)]
    assert table.count("<img") == CLIPS * (2 + 2 * 2), "frame, truth, and of every run its prediction and probability"
    assert "<b>sound" not in html


def test_scores_are_those_of_the_results_and_missing_ones_are_marked(html, runs):
    results = json.loads((runs[0] / "results.json").read_text())
    rows = {cells[0]: cells[1:] for row in re.findall("<tr>(<td>.*?)</tr>", html)
            if len(cells := re.findall("<td.*?>(.*?)</td>", row)) == 8}
    expected = [results["J"], results["F"], results["J&F"], results["negatives"]["silence"]["FPR"]]
    assert rows["plain"] == [*(f"{value:.4f}" for value in expected), "-", "-", ""]
    assert rows["no &lt;b&gt;sound"] == ["-"] * 6 + ["no results.json"]


def test_scores_of_other_clips_are_not_shown(runs, save_run, tmp_path):
    run = save_run(tmp_path / "run")
    results = json.loads((runs[0] / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**results, "clips": results["clips"][:3], "J": 0.98765}))
    html = compare([run], tmp_path, clips=2, rows=1, progress=False).read_text()
    assert "results.json is of other clips" in html and "0.9877" not in html


@pytest.mark.parametrize("change, message", [
    ({"subset": "s4"}, "data.subset='ms3' in plain and 's4' in other"),
    ({"size": 96}, "data.size=64 in plain and 96 in other"),
])
def test_runs_of_different_data_are_refused(runs, save_run, tmp_path, capsys, change, message):
    other = save_run(tmp_path / "other", data=change)
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(runs[0]), str(other), "--out", str(tmp_path / "out"), "--device", "cpu"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, message", [
    ({"names": ["a"]}, "2 different names, one per run, got a"),
    ({"names": ["a", "a"]}, "2 different names, one per run, got a, a"),
    ({"clips": 0}, "at least 1, got 0 and 8"),
])
def test_options_that_make_no_sense_are_refused(runs, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        compare(runs, tmp_path, progress=False, **options)


# features


def test_features_of_every_second_and_j_of_every_clip(runs):
    model, cfg = load_model(runs[0])
    features, j = examine(Run("plain", model, cfg), subset(cfg), "cpu", progress=False)
    assert features.visual.shape == features.audio.shape == (CLIPS * SECONDS, DIM)
    assert features.visual.isfinite().all() and features.audio.isfinite().all()
    assert features.clip.tolist() == [i // SECONDS for i in range(CLIPS * SECONDS)]
    assert features.second.tolist() == [i % SECONDS for i in range(CLIPS * SECONDS)]
    results = json.loads((runs[0] / "results.json").read_text())
    assert j == pytest.approx([clip["J"] for clip in results["clips"]])


def test_model_that_hears_nothing_has_features_of_sight_alone(runs):
    model, cfg = load_model(runs[1])
    features, _ = examine(Run("deaf", model, cfg), subset(cfg), "cpu", progress=False)
    assert features.audio is None and embed(features).shape == (CLIPS * SECONDS, 2)
    values = measures(features, [str(clip) for clip in features.clip.tolist()], across=False)
    assert values["sight"] is not None and values["sound"] is values["sight to sound"] is values["chance"] is None


def subset(cfg):
    return torch.utils.data.Subset(build_dataset(cfg.data, "test"), range(CLIPS))


def test_sounds_are_those_in_the_picture_of_that_second(toy_root):
    dataset = build_dataset(Config.from_dict({"data": {**DATA, "root": str(toy_root)}}).data, "test")
    for index, seconds in enumerate(sounding(dataset, range(CLIPS))):
        truth = dataset[index].masks.flatten(1).any(1).tolist()
        assert all(seen or not sounds for sounds, seen in zip(seconds, truth, strict=True))
    dataset = build_dataset(DataConfig(root=toy_root, subset="avss", size=64, frames=10), "test")
    seconds = sounding(dataset, [2])[0]
    assert frozenset().union(*seconds) <= dataset.sounding_classes()[2] != frozenset()


def clusters(classes, audio_of=None, noise=0.01):
    """Four clips of three seconds in two classes: sight at one of two places, sound at those of `audio_of`."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.arange(4).repeat_interleave(3)
    places = torch.eye(8)[:2]
    draw = lambda kinds: places[torch.tensor(kinds)[clip]] + noise * torch.randn(12, 8, generator=generator)  # noqa: E731
    return Features(draw(classes), draw(audio_of or classes) + 5, clip, torch.arange(3).repeat(4))


LABELS = ["dog"] * 6 + ["cat"] * 6


def test_measures_of_clear_classes():
    values = measures(clusters([0, 0, 1, 1]), LABELS, across=True)
    assert values["sight"] > 0.9 and values["sound"] > 0.9
    assert values["sight to sound"] == values["sound to sight"] == 1
    assert values["chance"] == pytest.approx(3 / 9), "the own clip's three seconds are left out"


def test_measures_tell_sound_at_the_wrong_place_and_classes_that_mix():
    swapped = measures(clusters([0, 0, 1, 1], [1, 1, 0, 0]), LABELS, across=True)
    assert swapped["sound"] > 0.9 and swapped["sight to sound"] == 0
    mixed = measures(clusters([0, 1, 0, 1]), LABELS, across=True)
    assert mixed["sight"] < 0.1


@pytest.mark.parametrize("labels", [[None] * 12, ["dog"] * 12, ["dog"] + [None] * 11])
def test_measures_that_are_not_defined_are_none(labels):
    values = measures(clusters([0, 0, 1, 1]), labels, across=True)
    assert values["sight"] is None and values["sound"] is None


def test_picture_of_features_is_clear_in_light_and_dark_and_the_same_again():
    features = clusters([0, 0, 1, 1])
    values = measures(features, LABELS, across=True)
    first, second = (scatter(["a", "b"], [features] * 2, [LABELS, [None, *LABELS[1:]]], [values] * 2) for _ in "12")
    image = np.asarray(Image.open(io.BytesIO(first)))
    assert image.shape[2] == 4 and image[0, 0, 3] == 0 and image[..., 3].max() > 200 and first == second


# gallery


def test_gallery_starts_where_the_runs_differ_most():
    j = np.array([[0.5, 0.1, 0.9, np.nan, 0.2], [0.5, 0.8, 0.6, 0.3, 0.2]])
    assert most_different(j) == [1, 2, 4, 0, 3], "equals by the worst, what has no score last"
    assert most_different(j[:1, :3]) == [1, 0, 2], "of one run the worst first"
