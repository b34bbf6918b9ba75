"""What `predict` writes, second by second, from models that are simple enough to know the answer."""
import json
import os
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import nn

from icf.config import Config
from icf.data.audio import SILENCE
from icf.data.avsbench import class_palette
from icf.data.folder import find_sources
from icf.data.video import open_video, read_sound, write_video
from icf.engine.predict import FOREGROUND, Paint, in_words, output_folders, predict

RATE = 16000


class Bright(nn.Module):
    """Foreground is what is bright, in seconds that are loud; with C classes the class is 1 + red // 64."""

    def __init__(self, classes=1):
        super().__init__()
        self.classes, self.seen = classes, []

    def forward(self, batch):
        assert not self.training
        self.seen.append(batch)
        loud = batch.log_mel.mean((2, 3, 4)) > SILENCE + 2                                    # [B,T]
        bright = (batch.frames[:, :, 1] > 100) & loud[..., None, None]                          # [B,T,H,W]
        if self.classes == 1:
            return (bright.float() * 16 - 8)[:, :, None]
        index = torch.where(bright, 1 + batch.frames[:, :, 0] // 64, 0).long()
        return nn.functional.one_hot(index, self.classes).movedim(-1, 2).float()


def config(size=64, frames=5, classes=1):
    cfg = Config()
    cfg.data.size, cfg.data.frames, cfg.model.classes = size, frames, classes
    return cfg


def picture(second, height=64, width=64):
    """A bright block of 16 x 16 whose place tells the second."""
    image = np.full((height, width, 3), 20, np.uint8)
    y, x = 16 * (second // 4 % 4), 16 * (second % 4)
    image[y:y + 16, x:x + 16] = (64 * (second % 4) + 32, 200, 200)
    return image


def block(second, height=64, width=64):
    return picture(second, height, width)[..., 1] > 100


def noise(loud):
    """Sound whose second i is loud where loud[i]."""
    sound = np.random.default_rng(0).uniform(-0.3, 0.3, len(loud) * RATE)
    return sound * np.repeat(np.asarray(loud, float), RATE)


def make_video(path, seconds, fps=4, loud=None, height=64, width=64, longer=0):
    """An mp4 by `write_video`; its picture changes with every second, its sound is `longer` seconds longer."""
    wav = path.with_suffix(".wav")
    length = seconds + longer
    soundfile.write(wav, noise(loud or [True] * round(length + 0.5))[:round(length * RATE)], RATE)
    frames = ((Fraction(i, fps), picture(i // fps, height, width)) for i in range(round(seconds * fps)))
    write_video(path, frames, Fraction(fps), Fraction(1, 1000), wav)
    wav.unlink()
    return path


def make_folder(path, seconds, height=97, width=175):
    path.mkdir()
    for second in range(seconds):
        Image.fromarray(picture(second, height, width)).save(path / f"shot_{second + 1}.png")  # 10 comes after 9
    soundfile.write(path / "sound.wav", noise([True] * seconds), RATE)
    return path


def read_mask(out, second):
    return np.asarray(Image.open(out / "masks" / f"{second:05d}.png"))


@pytest.mark.parametrize("overlap, batch", [(0, 1), (0, 3), (2, 1), (4, 2)])
def test_every_second_gets_its_mask(tmp_path, overlap, batch):
    """23.5 s: 24 masks, pixel for pixel those of picture and sound of their second, however the windows lie."""
    loud = [second % 6 < 3 for second in range(24)]
    source = make_video(tmp_path / "a.mp4", 23.5, loud=loud)
    record = predict(Bright(), config(), source, tmp_path / "out", overlap=overlap, batch=batch, progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "contact_sheet.png", "masks", "overlay.mp4", "predictions.json"]
    assert len(list((tmp_path / "out" / "masks").iterdir())) == len(record["seconds"]) == 24
    for second, row in enumerate(record["seconds"]):
        expected = block(second) if loud[second] else np.zeros((64, 64), bool)
        assert np.array_equal(read_mask(tmp_path / "out", second), expected * 255)
        assert row["second"] == second and row["mask"] == f"masks/{second:05d}.png"
        assert row["time"] == (second + 0.75 if second < 23 else 23.25)  # the pictures shown at 15/16 s, and the last
        assert row["area"] == expected.mean() and [found["name"] for found in row["classes"]] == ["sounding"] * any(
            expected.flat)
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == record


def test_the_last_window_is_completed_by_its_last_picture_and_silence(tmp_path):
    model = Bright()
    record = predict(model, config(), make_video(tmp_path / "a.mp4", 7, longer=3), tmp_path / "out", progress=False)
    first, last = model.seen
    assert len(record["seconds"]) == 7 and first.frames.shape == last.frames.shape == (1, 5, 3, 64, 64)
    assert (last.frames[0, 2:] == last.frames[0, 1]).all() and (last.frames[0, 0] != last.frames[0, 1]).any()
    assert last.log_mel[0, 3:].max() == pytest.approx(SILENCE) and last.log_mel[0, :2].mean() > SILENCE + 1
    assert last.frame_mask.all() and not last.label_mask.any()


def test_windows_that_overlap_are_averaged(tmp_path):
    """A model that says 0, 1, 2, ... for its windows: second 3 lies in windows 0 and 1 of 4 s every 3 s."""

    class Counting(nn.Module):
        calls = 0

        def forward(self, batch):
            score = torch.zeros(1, 4, 2, 64, 64)
            score[:, :, 1] = 1 + self.calls
            self.calls += 1
            return score

    source = make_video(tmp_path / "a.mp4", 8)
    record = predict(Counting(), config(frames=4, classes=2), source, tmp_path / "out", overlap=1, progress=False)
    assert [row["classes"][0]["score"] for row in record["seconds"]] == [1, 1, 1, 1.5, 2, 2, 2.5, 3]


@pytest.mark.parametrize("threshold, area", [(None, 1), (0.55, 1), (0.65, 0)])
def test_the_threshold_is_of_the_probability(tmp_path, threshold, area):

    class Sure(nn.Module):
        def forward(self, batch):
            return torch.full((1, 5, 1, 64, 64), 0.6).logit()

    source, out = make_folder(tmp_path / "clip", 1), tmp_path / "out"
    row, = predict(Sure(), config(), source, out, threshold=threshold, progress=False)["seconds"]
    assert row["area"] == area and read_mask(out, 0).max() == 255 * area
    assert [found["score"] for found in row["classes"]] == [pytest.approx(0.6)] * area


def test_the_overlay_shows_every_picture_under_the_mask_of_its_second(tmp_path):
    source = make_video(tmp_path / "a.mp4", 3.5, height=128, width=128)
    predict(Bright(), config(size=128), source, tmp_path / "out", progress=False)
    before, after = open_video(source), open_video(tmp_path / "out" / "overlay.mp4")
    for (time, image), (time_after, painted) in zip(before.frames(), after.frames(), strict=True):
        inside = block(int(time), 128, 128)
        core = inside & np.roll(inside, (5, 5), (0, 1)) & np.roll(inside, (-5, -5), (0, 1))  # coded colours bleed
        assert time_after == time and core.any()
        assert np.abs(painted[core].astype(int).mean(0) - (image[core] // 2 + (115, 20, 30)).mean(0)).max() < 15
        far = np.ones_like(inside)
        ys, xs = np.nonzero(inside)
        far[max(ys.min() - 8, 0):ys.max() + 9, max(xs.min() - 8, 0):xs.max() + 9] = False
        assert np.abs(painted[far].astype(int) - image[far]).max() < 25
    sounds = [np.concatenate(list(read_sound(video.sound, video.start))) for video in (before, after)]
    assert np.array_equal(*sounds) and len(sounds[0]) == pytest.approx(3.5 * RATE, abs=RATE / 10)


@pytest.mark.parametrize("height, reach", [(24, 1), (480, 2)])
def test_paint_is_solid_on_the_outline_and_half_transparent_inside(height, reach):
    mask = np.zeros((height, height), np.uint8)
    mask[8:16, :9], mask[8:16, 9:18] = 1, 2  # two classes side by side, one at the border of the picture
    palette = np.array([(0, 0, 0), (201, 0, 255), (7, 90, 1)], np.uint8)
    picture = np.random.default_rng(0).integers(0, 256, (height, height, 3), np.uint8)
    expected = picture.copy()
    for colour, left, inner in ((1, 0, slice(0, 9 - reach)), (2, 9, slice(9 + reach, 18 - reach))):
        expected[8:16, left:left + 9] = palette[colour]
        place = slice(8 + reach, 16 - reach), inner
        expected[place] = picture[place] // 2 + palette[colour] // 2
    assert np.array_equal(Paint(mask, palette)(picture), expected)


def test_classes_are_written_as_indices_with_the_palette_of_the_benchmark(tmp_path):
    source = make_folder(tmp_path / "clip", 6, 64, 64)
    names = ["background", "cat", "dog", "drum", "violin", "bell", "man"]
    out = tmp_path / "out"
    record = predict(Bright(7), config(classes=7), source, out, progress=False, classes=names)
    for second, row in enumerate(record["seconds"]):
        index = 1 + (64 * (second % 4) + 32) // 64
        with Image.open(out / row["mask"]) as mask:
            assert mask.mode == "P" and np.array_equal(np.asarray(mask), block(second) * np.uint8(index))
            assert np.array_equal(np.asarray(mask.convert("RGB")), class_palette(7)[np.asarray(mask)])
        found, = row["classes"]
        assert (found["index"], found["name"], found["area"]) == (index, names[index], 1 / 16)
        assert 0.8 < found["score"] <= 1
    cfg = config(classes=7)
    cfg.data.root, cfg.data.subset = tmp_path, "avss"
    assert predict(Bright(7), cfg, source, out, progress=False)["classes"][1:3] == ["class 1", "class 2"]
    (tmp_path / "metadata.csv").write_text("vid, uid, s_min, s_sec, a_obj, split, label\n")
    (tmp_path / "label2idx.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    assert predict(Bright(7), cfg, source, out, progress=False)["classes"] == names
    with pytest.raises(ValueError, match="classes: expected 7 names with background, got 2"):
        predict(Bright(7), config(classes=7), source, out, progress=False, classes=["background", "cat"])


def test_a_folder_of_odd_sized_pictures_with_a_wav(tmp_path):
    """11 pictures of 175 x 97: masks of that size, numbered in the order of the numbers, and a film of one a second."""
    source, out = make_folder(tmp_path / "clip", 11), tmp_path / "out"
    record = predict(Bright(), config(size=224), source, out, progress=False)
    assert (record["width"], record["height"]) == (175, 97)
    assert [row["time"] for row in record["seconds"]] == list(range(11))
    for second in range(11):
        mask = read_mask(out, second)
        assert mask.shape == (97, 175) and set(np.unique(mask)) == {0, 255}
        wrong = (mask > 0) != block(second, 97, 175)
        assert wrong.sum() <= 64  # at most one pixel along the outline of 16 x 16
    film = open_video(out / "overlay.mp4")
    assert [float(time) for time, _ in film.frames()] == list(range(11)) and film.duration == 11
    assert (film.width, film.height) == (176, 98)
    assert len(np.concatenate(list(read_sound(film.sound)))) == pytest.approx(11 * RATE, abs=RATE / 10)


def test_the_contact_sheet_pairs_pictures_and_overlays_and_stays_small(tmp_path):
    predict(Bright(), config(), make_video(tmp_path / "a.mp4", 2), tmp_path / "two", progress=False)
    sheet = np.asarray(Image.open(tmp_path / "two" / "contact_sheet.png").convert("RGB")).astype(int)
    pair = sheet[72:72 + 64, 18:18 + 134]  # below the head of 54 and a caption of 18, beside a margin of 18
    assert np.abs(pair[:, :64] - picture(0)).max() < 25 and (pair[:, 64:70] == 255).all()
    assert (pair[4:12, 74:82, 0] > pair[4:12, 4:12, 0] + 50).all() and (sheet[54:72, 18:80] < 100).any()
    assert (sheet[29:41, 18:30] == FOREGROUND).all(2).mean() > 0.9, "the legend shows the colour"
    predict(Bright(), config(), make_video(tmp_path / "b.mp4", 61), tmp_path / "many", progress=False)
    with Image.open(tmp_path / "many" / "contact_sheet.png") as many:
        assert many.size == (3 * (134 + 18) + 18, 6 * (64 + 36) + 54)  # every fourth of 61 seconds: 16


def test_a_source_without_sound_is_silent_when_allowed(tmp_path):
    write_video(tmp_path / "a.mp4", [(Fraction(i), picture(i)) for i in range(2)], Fraction(1), Fraction(1, 1000))
    with pytest.raises(ValueError, match="a.mp4: no sound track"):
        predict(Bright(), config(), tmp_path / "a.mp4", tmp_path / "out", progress=False)
    model = Bright()
    record = predict(model, config(), tmp_path / "a.mp4", tmp_path / "out", silent_ok=True, progress=False)
    assert not record["sound"] and torch.allclose(model.seen[0].log_mel, torch.tensor(SILENCE))
    with av.open(str(tmp_path / "out" / "overlay.mp4")) as film:
        assert len(film.streams.video) == 1 and not film.streams.audio


def test_an_earlier_prediction_is_replaced_as_a_whole(tmp_path):
    out = tmp_path / "out"
    predict(Bright(), config(), make_video(tmp_path / "a.mp4", 6), out, progress=False)
    (out / "notes.txt").write_text("mine")
    predict(Bright(), config(), make_video(tmp_path / "b.mp4", 2), out, progress=False)
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["00000.png", "00001.png"]
    assert (out / "notes.txt").read_text() == "mine" and len(list(out.iterdir())) == 5


class Failing(Bright):
    def __init__(self, after):
        super().__init__()
        self.after = after

    def forward(self, batch):
        if len(self.seen) == self.after:
            raise KeyboardInterrupt
        return super().forward(batch)


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_nothing_behind_and_nothing_changed(tmp_path, existing):

    out, source = tmp_path / "out", make_video(tmp_path / "a.mp4", 7)
    if existing:
        predict(Bright(), config(), source, out, progress=False)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(KeyboardInterrupt):
        predict(Failing(0), config(), source, out, progress=False)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert out.exists() == existing


@pytest.mark.filterwarnings("ignore:.*unfinished holds the 5 s")
def test_what_had_been_segmented_survives_a_failure_beside_an_earlier_prediction(tmp_path):
    out, source = tmp_path / "out", make_video(tmp_path / "a.mp4", 7)
    predict(Bright(), config(), source, out, progress=False)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(KeyboardInterrupt):
        predict(Failing(1), config(), source, out, progress=False)
    kept = out / "unfinished"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and kept not in path.parents} == before
    record = json.loads((kept / "predictions.json").read_text())
    assert not record["complete"] and len(record["seconds"]) == len(list((kept / "masks").iterdir())) == 5
    assert (read_mask(kept, 3) == read_mask(out, 3)).all()
    assert predict(Bright(), config(), source, out, progress=False)["complete"] and not kept.exists()


def test_sound_that_no_overlay_can_have_is_found_before_the_first_second(tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("a.mp4: sound")

    monkeypatch.setattr("icf.engine.predict.write_sound", fail)
    model = Bright()
    with pytest.raises(ValueError, match="a.mp4: sound"):
        predict(model, config(), make_video(tmp_path / "a.mp4", 7), tmp_path / "out", progress=False)
    assert not model.seen


def test_what_was_found_is_said_in_words():
    rows = [{"area": 0.2, "classes": [{"name": "dog"}]}, {"area": 0.0, "classes": []},
            {"area": 0.1, "classes": [{"name": "dog"}, {"name": "cat"}]}]
    assert in_words({"seconds": rows, "classes": ["background", "sounding"]}) == (
        "sound seen in 2 of 3 s, 15 % of the picture")
    assert in_words({"seconds": rows, "classes": ["background", "dog", "cat"]}).endswith("; dog 2 s; cat 1 s")
    assert in_words({"seconds": rows[1:2], "classes": ["background", "sounding"]}) == "sound seen in 0 of 1 s"


def test_sources_are_files_folders_of_pictures_folders_of_videos_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "b.mkv", "[x].mp4", "videos/10.mp4", "videos/9.mov", "videos/notes.txt", "shots/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path) for path in find_sources(["[x].mp4", "videos", "shots", "*.mp4", "b.mkv", "a.mp4"])]
    assert found == ["[x].mp4", "videos/9.mov", "videos/10.mp4", "shots", "a.mp4", "b.mkv"]
    with pytest.raises(ValueError, match=r"none/\*.mp4: no such file, and nothing matches"):
        find_sources(["none/*.mp4"])
    folders = output_folders([tmp_path / "a.mp4", tmp_path / "a.mkv", tmp_path / "b.mp4"], tmp_path)
    assert [path.name for path in folders] == ["a.mp4", "a.mkv", "b"]
    with pytest.raises(ValueError, match="several sources are named 'a.mp4'"):
        output_folders([tmp_path / "x/a.mp4", tmp_path / "y/a.mp4"], None)


def test_an_interrupted_replacement_has_no_record(tmp_path, monkeypatch):
    """`predictions.json` goes first and comes last, so it never stands beside files of another prediction."""
    out, source = tmp_path / "out", make_video(tmp_path / "a.mp4", 2)
    predict(Bright(), config(), source, out, progress=False)
    replace = os.replace

    def fail(old, new):
        if new == out / "overlay.mp4":
            raise OSError("disk full")
        replace(old, new)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        predict(Bright(), config(), source, out, progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["contact_sheet.png", "masks", "overlay.mp4"]


def test_other_peoples_files_are_not_overwritten(tmp_path):
    source, out = make_folder(tmp_path / "clip", 1), tmp_path / "out"
    (out / "masks").mkdir(parents=True)
    with pytest.raises(ValueError, match="out: holds masks but no predictions.json"):
        predict(Bright(), config(), source, out, progress=False)
    with pytest.raises(ValueError, match="clip: the results need a folder of their own"):
        predict(Bright(), config(), source, source, progress=False)
    with pytest.raises(ValueError, match="notes: expected a folder, got a file"):
        (tmp_path / "notes").write_text("")
        predict(Bright(), config(), source, tmp_path / "notes", progress=False)


@pytest.mark.parametrize("argument, value", [("overlap", 5), ("overlap", -1), ("batch", 0), ("threshold", 1.0)])
def test_arguments_out_of_range_are_named(tmp_path, argument, value):
    with pytest.raises(ValueError, match=f"{argument}.*{value}"):
        predict(Bright(), config(), tmp_path, tmp_path / "out", progress=False, **{argument: value})


def spoil(folder, what):
    if what == "no pictures":
        for path in folder.glob("*.png"):
            path.unlink()
    elif what == "no sound":
        (folder / "sound.wav").unlink()
    elif what == "two sounds":
        (folder / "other.wav").write_bytes((folder / "sound.wav").read_bytes())
    elif what == "broken sound":
        (folder / "sound.wav").write_text("no sound")
    elif what == "broken picture":
        (folder / "shot_2.png").write_bytes((folder / "shot_2.png").read_bytes()[:80])
    elif what == "another size":
        Image.fromarray(picture(0, 80, 80)).save(folder / "shot_2.png")


@pytest.mark.parametrize("what, reason", [
    ("no pictures", "clip: no pictures"), ("no sound", "clip: expected one sound file .* found none; allow silence"),
    ("two sounds", "found other.wav, sound.wav"), ("broken sound", "sound.wav: cannot be read as video or sound"),
    ("broken picture", "shot_2.png: cannot be read as a picture"),
    ("another size", "shot_2.png: expected 64x64 pixels as in shot_1.png, got 80x80")])
def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path, what, reason):
    source = make_folder(tmp_path / "clip", 3, 64, 64)
    spoil(source, what)
    with pytest.raises(ValueError, match=reason) as refusal:
        predict(Bright(), config(), source, tmp_path / "out", progress=False)
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("amp, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_mixed_precision_reaches_the_model(tmp_path, amp, dtype):
    class Product(Bright):
        def forward(self, batch):
            self.dtype = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
            return super().forward(batch)

    model = Product()
    predict(model, config(), make_video(tmp_path / "a.mp4", 2), tmp_path / "out", amp=amp, progress=False)
    assert model.dtype == dtype


def test_memory_does_not_grow_with_the_length(tmp_path):
    """20 s more must not take 2 MB more; their pictures alone would take 5 MB."""
    peaks = []
    for seconds in (26, 46):
        source = make_video(tmp_path / f"{seconds}.mp4", seconds, fps=1, height=240, width=320)
        tracemalloc.start()
        predict(Bright(), config(), source, tmp_path / "out", progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2e6
