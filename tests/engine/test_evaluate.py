"""Evaluation of a small data set whose right answers are known: a square that sounds in some of the seconds."""
import csv
import json
import socket
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import icf.engine.evaluate
from icf.config import Config, DataConfig, EvalConfig
from icf.data import Clip
from icf.data.avsbench import class_palette
from icf.engine.evaluate import evaluate, evaluate_masks, hearing, validate
from icf.engine.trackers import track_pictures

SIZE, SECONDS, CLIPS, RATE = 32, 3, 7, 16000
CLASSES = ["background", "disc", "square"]


class Squares(torch.utils.data.Dataset):
    """One bright square per clip. Clip i is labelled, and sounds, in its seconds below `loud(i)`; of clip 3 one second
    is padding. With classes, the square is class 1 + i % 2, which its colour shows."""

    split, groups = "test", {"clip 0": "aligned", "clip 1": "conflicting", "clip 2": "conflicting"}
    records = [SimpleNamespace(source="v1s" if i < 4 else "v2") for i in range(CLIPS)]

    def __init__(self, root, subset="s4"):
        self.root, self.subset, self.names = root, subset, [f"clip {i}" for i in range(CLIPS)]
        self.classes = CLASSES if subset == "avss" else []

    def __len__(self):
        return CLIPS

    def __getitem__(self, index):
        return self.with_audio(index, self.waveform(index)[0])

    def loud(self, index):
        return SECONDS - index % 2

    def waveform(self, index):
        sound = torch.zeros(SECONDS * RATE)
        sound[:self.loud(index) * RATE] = 0.5
        return sound, RATE

    def sounding_classes(self):
        return [{"disc", "square"} - {CLASSES[1 + i % 2]} for i in range(CLIPS)]

    def with_audio(self, index, waveform):
        frames = torch.zeros(SECONDS, 3, SIZE, SIZE, dtype=torch.uint8)
        masks = torch.zeros(SECONDS, SIZE, SIZE, dtype=torch.uint8)
        kind, place = 1 + index % 2, np.s_[4 + index:14 + index, 6:20]
        for second in range(SECONDS):
            frames[second, kind][place] = 255
            masks[second][place] = (kind if self.classes else 1) if second < self.loud(index) else 0
        real = torch.arange(SECONDS) < (2 if index == 3 else 3)
        frames[~real], masks[~real] = 0, 0
        level = waveform.reshape(SECONDS, -1).square().mean(1).sqrt()
        log_mel = level.view(SECONDS, 1, 1, 1).expand(SECONDS, 1, 96, 64).clone()
        return Clip(frames, log_mel, masks, real, real.clone(), self.names[index], (CLASSES[kind],))


class Listener(nn.Module):
    """Segments the square in seconds with sound; `deaf`, in all of them."""

    def __init__(self, classes=1, deaf=False):
        super().__init__()
        self.scale, self.classes, self.deaf = nn.Parameter(torch.tensor(9.0)), classes, deaf

    def forward(self, batch):
        assert not self.training
        seen = batch.frames.float() / 255                                                     # [B,T,3,H,W]
        heard = (batch.log_mel.mean((2, 3, 4)) > 0.01)[..., None, None, None] | self.deaf
        if self.classes == 1:
            return self.scale * (2 * (seen.amax(2, keepdim=True) * heard) - 1)
        return torch.cat([0.5 * torch.ones_like(seen[:, :, :1]), (seen * heard)[:, :, 1:]], 2) * self.scale


@pytest.fixture
def squares(monkeypatch, tmp_path):
    oracle = {"test": {"clips": CLIPS, "salience": {"J": 0.25}}}
    (tmp_path / "toy_manifest.json").write_text(json.dumps({"oracles": oracle}))
    monkeypatch.setattr(icf.engine.evaluate, "build_dataset", lambda data, split: Squares(tmp_path, data.subset))
    return Squares(tmp_path)


def config(**changes):
    data = DataConfig(size=SIZE, frames=SECONDS, workers=0)
    return Config(data=replace(data, **changes), eval=EvalConfig(batch=3))


def run(model, out, cfg=None, **options):
    return evaluate(model, cfg or config(), "test", out, progress=False, **{"report": False, **options})


@pytest.mark.filterwarnings("ignore:offscreen")
def test_who_listens_scores_full_and_stays_quiet_in_silence(squares, tmp_path):
    results = run(Listener(), tmp_path)
    assert results["J"] == pytest.approx(1, abs=1e-6) and results["F"] == pytest.approx(1, abs=1e-6)
    assert results["scores"]["J"]["strict/frame"] == pytest.approx(1, abs=1e-6)
    silence, noise = results["negatives"]["silence"], results["negatives"]["noise"]
    assert silence["FPR"] == 0 and silence["strict"] == 1
    empty, frames = 2, 20                          # clips 1 and 5 end in silence, clip 3's last second is padding
    assert results["counts"]["scored_frames"] == frames and results["counts"]["empty_frames"] == empty
    assert silence["sensitivity"] == pytest.approx(1 - empty / frames, abs=1e-6)
    area = 10 * 14 / SIZE**2
    assert noise["FPR"] == pytest.approx(area, abs=1e-6) and noise["strict"] == 0
    assert results["combined"] == pytest.approx((1 + 1 + 0 + results["negatives"]["offscreen"]["strict"]) / 4, abs=1e-6)


@pytest.mark.filterwarnings("ignore:offscreen")
def test_who_does_not_listen_has_no_sensitivity(squares, tmp_path):
    results = run(Listener(deaf=True), tmp_path)
    assert all(scores["sensitivity"] == scores["change"] == 0 for scores in results["negatives"].values())
    area = 10 * 14 / SIZE**2
    assert results["J"] == pytest.approx((18 + 2 * (1 - area)) / 20, abs=1e-6)
    assert results["scores"]["J"]["strict/frame"] == pytest.approx(18 / 20, abs=1e-6)
    assert results["scores"]["J"]["false_positive/empty"] == pytest.approx(area, abs=1e-6)
    aligned, conflicting = results["groups"]["aligned"], results["groups"]["conflicting"]
    assert (aligned["clips"], conflicting["clips"]) == (1, 2)
    assert conflicting["J"] == pytest.approx((5 + 1 - area) / 6, abs=1e-6)
    assert results["gap"]["J"] == pytest.approx(aligned["J"] - conflicting["J"], abs=1e-6)
    assert results["oracles"] == {"salience": {"J": 0.25}}


@pytest.mark.filterwarnings("ignore:offscreen")
def test_written_tables_hold_the_results(squares, tmp_path):
    results = run(Listener(), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    clips = list(csv.DictReader((tmp_path / "per_clip.csv").open()))
    assert [row["name"] for row in clips] == [f"clip {i}" for i in range(CLIPS)]
    assert float(clips[1]["J"]) == pytest.approx(1, abs=1e-6) and float(clips[1]["FPR silence"]) == 0
    classes = {row["class"]: row for row in csv.DictReader((tmp_path / "per_class.csv").open())}
    assert int(classes["disc"]["clips"]) == 4 and int(classes["square"]["clips"]) == 3
    pairing = json.loads((tmp_path / "pairing" / "shuffled.json").read_text())
    assert sorted(pairing["sounds"]) == sorted(pairing["sounds"].values()) == [f"clip {i}" for i in range(CLIPS)]


def test_semantic_scores_and_their_padding(squares, tmp_path):
    cfg = config(subset="avss")
    cfg.eval.negatives = ("silence",)
    results = run(Listener(classes=3), tmp_path, cfg)
    assert results["J"] == pytest.approx(1, abs=1e-6) and results["negatives"]["silence"]["FPR"] == 0
    assert results["counts"]["padding_frames"] == 1
    assert {name: results["groups"][name]["clips"] for name in ("v1s", "v2")} == {"v1s": 4, "v2": 3}
    rows = {row["class"]: row for row in results["classes"]}
    assert rows["disc"]["frames"] == 12 and rows["square"]["frames"] == 6 and rows["background"]["frames"] == 20


@pytest.mark.parametrize("subset", ["s4", "avss"])
def test_saved_masks_score_as_the_model_that_made_them(squares, tmp_path, subset):
    cfg, classes = config(subset=subset), 3 if subset == "avss" else 1
    cfg.eval.negatives = ()
    made = run(Listener(classes, deaf=True), tmp_path / "a", cfg, save_masks=True)
    image = Image.open(tmp_path / "a/masks/clip 1/2.png")
    values = np.unique(np.array(image)).tolist()
    assert values == ([0, 2] if classes > 1 else [0, 255])
    if classes > 1:
        assert image.getpalette()[6:9] == class_palette(3)[2].tolist()
    scored = evaluate_masks(tmp_path / "a/masks", cfg, "test", tmp_path / "b", progress=False, report=False)
    assert scored["scores"] == made["scores"]
    assert len(list((tmp_path / "a/masks/clip 3").iterdir())) == 2, "padding has no mask"


def test_missing_masks_are_named(squares, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate_masks(tmp_path / "nowhere", config(), "test", tmp_path, progress=False)
    (tmp_path / "masks/clip 0").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="expected 3 numbered .png files in .*clip 0, found 0"):
        evaluate_masks(tmp_path / "masks", config(), "test", tmp_path, progress=False)


def test_a_model_that_gives_no_numbers_or_other_classes_is_refused(squares, tmp_path):
    cfg, model = config(), Listener()
    cfg.eval.negatives = ()
    model.scale.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="clip 0, clip 1, clip 2"):
        run(model, tmp_path, cfg)
    with pytest.raises(ValueError, match=r"expected scores \[B,T,1,H,W\], got \(3, 3, 3, 32, 32\)"):
        run(Listener(classes=3), tmp_path, cfg)


def test_validate_gives_the_default_modes_and_leaves_the_model_in_training(squares, tmp_path):
    cfg, model = config(), Listener(deaf=True).train()
    cfg.eval.negatives = ()
    scores = validate(model, squares, cfg)
    results = run(model, tmp_path, cfg)
    assert scores == {key: results[key] for key in ("J", "F", "J&F")} and model.training


@pytest.mark.parametrize("subset", ["s4", "avss"])
def test_pictures_of_training_need_no_gradient(tmp_path, subset):
    """Classes are chosen in place, which autograd refuses."""
    data, seen = Squares(tmp_path, subset), []
    tracker = SimpleNamespace(name="other", log_images=lambda pictures, step: seen.append(pictures))
    accelerator = SimpleNamespace(trackers=[tracker], is_main_process=True, device="cpu", unwrap_model=lambda x: x)
    track_pictures(accelerator, Listener(len(CLASSES) if subset == "avss" else 1).train(), data, config(), 3)
    assert seen[0]["test/clips"].ndim == 4


@pytest.mark.parametrize("most", [64, 3])
def test_what_j_loses_with_another_sound_tells_who_listens(squares, monkeypatch, most):
    monkeypatch.setattr(icf.engine.evaluate, "LISTENERS", most)
    deaf, listens = (hearing(Listener(deaf=deaf), squares, config()) for deaf in (True, False))
    assert deaf["J heard"] == 0 < listens["J heard"] == pytest.approx(1 - listens["J other sound"])


def test_report_shows_the_worst_clips_first(squares, tmp_path):
    cfg = config()
    cfg.eval.negatives = ()
    run(Listener(deaf=True), tmp_path, cfg, report=True)
    html = (tmp_path / "report.html").read_text()
    assert html.index(">clip 1 ") < html.index(">clip 0 ")      # clip 1 has a false alarm in its silent second


def _process(rank, port, out, clips):
    torch.set_num_threads(1)                      # the forked process has none of the parent's threads
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    seen, original = [], Squares.__getitem__
    Squares.__getitem__ = lambda self, index: (seen.append(index), original(self, index))[1]
    cfg = config()
    cfg.eval.negatives = ("silence",)
    results = run(Listener(deaf=True), out, cfg)
    clips[rank].extend(seen)
    assert validate(Listener(deaf=True), Squares(out), cfg) == {key: results[key] for key in ("J", "F", "J&F")}
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_clips_and_agree_with_one(squares, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.get_context("fork").Manager() as manager:
        clips = [manager.list(), manager.list()]
        torch.multiprocessing.start_processes(_process, (port, tmp_path / "two", clips), 2, start_method="fork")
        assert [list(own) for own in clips] == [[0, 2, 4, 6], [1, 3, 5]]
    cfg = config()
    cfg.eval.negatives = ("silence",)
    assert json.loads((tmp_path / "two/results.json").read_text()) == run(Listener(deaf=True), tmp_path / "one", cfg)
