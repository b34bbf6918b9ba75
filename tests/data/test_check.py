"""The validator: nothing to say about a sound copy, and the right words, level and file for every kind of damage."""
import csv
import json
import pickle
import shutil

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from icf.data import toy
from icf.data.audio import load_wav, log_mel_examples
from icf.data.avsbench import read_index
from icf.data.check import check
from icf.data.check.labels import STRAY, stray_components
from icf.data.check.report import SHOWN


def run(root, subset="s4", deep=True):
    return check(root, subset, deep=deep, progress=False)


def found(report):
    return {(f.check, f.level, f.where, f.what) for f in report.findings}


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory):
    """Fewer clips than elsewhere, as they are copied often: one or two of every kind and split."""
    root = tmp_path_factory.mktemp("toy")
    toy.generate(root, "tiny", seed=4, subsets=("s4", "ms3"), clips=(2, 1, 2), workers=1, progress=False)
    toy.generate(root, "tiny", seed=4, subsets=("avss",), clips=(3, 3, 3), workers=1, progress=False)
    return root


@pytest.fixture(scope="module")
def before(toy_root):
    """What there is to say about the toy benchmark as it is, by subset and depth."""
    return {(subset, deep): found(run(toy_root, subset, deep)) for subset in ("s4", "ms3", "avss")
            for deep in (False, True)}


def clip(root, subset, split="test", place=0, **wanted):
    fits = [record for record in read_index(root, subset) if record.split == split
            and all(getattr(record, key) == value for key, value in wanted.items())]
    return fits[place]


@pytest.mark.parametrize("subset", ["s4", "ms3", "avss"])
def test_toy_benchmark_has_its_documented_quirks_only(before, subset):
    for deep in (False, True):
        seen = {(name, level, what.split(" ")[0]) for name, level, _, what in before[subset, deep]}
        seen -= {("labels", "note", "1"), ("files", "note", "file")}  # a rest of a hidden shape, a .DS_Store
        assert seen == {("audio", "note", "lasts")}  # on purpose: a copy of it is in order


@pytest.mark.parametrize("subset", ["s4", "ms3", "avss"])
@pytest.mark.parametrize("deep", [False, True])
def test_labels_of_another_size_than_their_frame_are_told(own_root, subset, deep):
    root = own_root(subset)
    record = read_index(root, subset)[0]
    with Image.open(record.masks[0]) as image:
        image.resize((40, 30), 0).save(record.masks[0])
    report = run(root, subset, deep)
    assert report.exit_code == (2 if subset == "avss" else 1)
    assert any(finding.check == "labels" and finding.what.startswith("is 40x30, its frame ")
               for finding in report.findings)


def test_paths_are_printed_whole(own_root, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    root = own_root("ms3")
    path = read_index(root, "ms3")[0].masks[0]
    path.unlink()
    run(root, "ms3").print()
    assert f"    {path.relative_to(root)}: missing\n" in capsys.readouterr().out


@pytest.mark.parametrize("subset", ["s4", "ms3", "avss"])
def test_copy_without_quirks_is_clean(own_root, subset):
    root = own_root(subset)
    for record in read_index(root, subset):
        if (seconds := soundfile.info(record.sound).duration) < len(record.frames) - 0.1:
            sound, rate = soundfile.read(record.sound)
            soundfile.write(record.sound, np.pad(sound, (0, round((len(record.frames) - seconds) * rate))), rate)
    report = run(root, subset, deep=False)
    assert report.exit_code == 0 and not [f for f in report.findings if f.level != "note"]
    assert report.facts["frames"] == sum(len(record.frames) for record in read_index(root, subset))


def edit(path, change):
    with path.open(newline="") as file:
        rows = change(list(csv.reader(file)))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def save(path, values):
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def no_manifest(root):
    (root / "toy_manifest.json").unlink()


def bgr(root):
    for path in root.glob("*/*/labels_rgb/*.png"):
        save(path, np.asarray(Image.open(path))[..., ::-1])


def far_log_mel(root):
    path = clip(root, "s4").log_mel
    path.write_bytes(pickle.dumps(torch.zeros(5, 1, 96, 64)))


def repeated_frame(root):
    a, b = clip(root, "s4", "train").frames[0], clip(root, "s4", "test").frames[0]
    shutil.copy(a, b)


def loud(root):
    soundfile.write(clip(root, "ms3", place=1).sound, np.full(80000, 1.5, np.float32), 16000, subtype="FLOAT")


def stray(root):
    path = clip(root, "avss", source="v2").masks[3]
    label = np.zeros((180, 320), np.uint8)
    label[10:50, 10:50], label[100:102, 100:103] = 2, 5
    save(path, label)


META = {"s4": "s4_meta_data.csv", "ms3": "ms3_meta_data.csv", "avss": "metadata.csv"}
DAMAGE = {  # subset, what is done, check, level, part of where, part of what; before that, whether headers suffice
    "missing frame": (True, "s4", lambda r: clip(r, "s4").frames[3].unlink(), "files", "error", "_4.png", "missing"),
    "missing mask": (True, "s4", lambda r: clip(r, "s4").masks[4].unlink(), "files", "error", "gt_masks", "missing"),
    "missing wav": (True, "ms3", lambda r: clip(r, "ms3").sound.unlink(), "files", "error", ".wav", "missing"),
    "missing folder": (True, "avss", lambda r: shutil.rmtree(clip(r, "avss", source="v2").sound.parent),
                       "files", "error", "audio.wav", "missing"),
    "folder of another label": (True, "avss", lambda r: clip(r, "avss", source="v2").sound.parent.rename(
        r / "v1s" / clip(r, "avss", source="v2").sound.parent.name), "files", "error", "v2/", "the clip is in v1s"),
    "missing colours": (True, "avss", lambda r: shutil.rmtree(clip(r, "avss").sound.parent / "labels_rgb"),
                        "colours", "warning", "labels_rgb/0.png", "missing"),
    "missing log-mel": (True, "s4", lambda r: clip(r, "s4").log_mel.unlink(), "log-mel", "warning", "audio_log_mel",
                        "1 of 5 missing"),
    "surplus mask": (True, "s4", lambda r: shutil.copy(*clip(r, "s4", "train").masks[:2]),
                     "files", "warning", "_2.png", "surplus file"),
    "foreign file": (True, "ms3", lambda r: (clip(r, "ms3").frames[0].parent / "notes.txt").write_text("x"),
                     "files", "warning", "notes.txt", "surplus file"),
    "foreign folder": (True, "avss", lambda r: (r / "v1m/somebody").mkdir(), "files", "warning", "v1m/somebody",
                       "folder of no clip"),
    "derived folder": (True, "avss", lambda r: (clip(r, "avss").sound.parent / "processed_frames").mkdir(),
                       "derived", "note", "processed_frames", "derived by other code"),
    "empty frame": (True, "s4", lambda r: clip(r, "s4").frames[0].write_bytes(b""), "frames", "error", "_1.png",
                    "cannot be read"),
    "cut frame": (False, "avss", lambda r: clip(r, "avss").frames[0].write_bytes(
        clip(r, "avss").frames[0].read_bytes()[:3000]), "frames", "error", "frames/0.jpg", "cannot be read"),
    "grey frame": (True, "s4", lambda r: save(clip(r, "s4").frames[0], np.zeros((224, 224))), "frames", "warning",
                   "_1.png", "has mode L"),
    "large frame": (True, "ms3", lambda r: save(clip(r, "ms3").frames[0], np.zeros((512, 512, 3))), "frames", "warning",
                    "_1.png", "is 512x512, expected 224x224"),
    "label of another size": (True, "avss", lambda r: save(clip(r, "avss").masks[0], np.zeros((90, 160))), "labels",
                              "error", "labels_semantic/0.png", "is 160x90, its frame 320x180"),
    "grey values": (False, "s4", lambda r: save(clip(r, "s4").masks[0], np.arange(256).reshape(16, 16)), "labels",
                    "warning", "_1.png", "99.22% of the values"),
    "empty mask in S4": (False, "s4", lambda r: save(clip(r, "s4").masks[0], np.zeros((224, 224))), "labels", "warning",
                         "_1.png", "nothing is labelled"),
    "class out of range": (False, "avss", lambda r: save(clip(r, "avss").masks[0], np.full((180, 320), 9)), "labels",
                           "error", "labels_semantic/0.png", "holds [9], expected indices below 7"),
    "three channels": (False, "avss", lambda r: save(clip(r, "avss").masks[0], np.zeros((180, 320, 3))), "labels",
                       "error", "labels_semantic/0.png", "3 channels"),
    "stray pixels": (False, "avss", stray, "labels", "note", "labels_semantic/3.png",
                     "1 components below 16 pixels, of star"),
    "BGR": (False, "avss", bgr, "colours", "warning", "labels_rgb", "in the order BGR"),
    "other colours": (False, "avss", lambda r: save(clip(r, "avss").sound.parent / "labels_rgb/0.png",
                      np.full((180, 320, 3), 77)), "colours", "warning", "labels_rgb", "have no class' colour"),
    "shifted classes": (True, "avss", lambda r: (r / "label2idx.json").write_text('{"background": 0, "disc": 2}'),
                        "classes", "error", "label2idx.json", "indices without gap"),
    "no classes": (True, "avss", lambda r: (r / "label2idx.json").unlink(), "classes", "error", "label2idx.json",
                   "no such file"),
    "other number of classes": (True, "avss", no_manifest, "classes", "warning", "label2idx.json", "7 classes"),
    "broken wav": (True, "s4", lambda r: clip(r, "s4").sound.write_bytes(b"RIFF0000WAVE"), "audio", "error", ".wav",
                   "cannot be read"),
    "silent wav": (False, "s4", lambda r: soundfile.write(clip(r, "s4").sound, np.zeros(80000), 16000), "audio",
                   "warning", ".wav", "is silent"),
    "loud wav": (False, "ms3", loud, "audio", "warning", ".wav", "peak of 1.50"),
    "NaN": (False, "s4", lambda r: soundfile.write(clip(r, "s4").sound, np.full(80000, np.nan), 16000, subtype="FLOAT"),
            "audio", "error", ".wav", "not finite"),
    "other log-mel": (False, "s4", far_log_mel, "log-mel", "warning", ".pkl", "from our front end"),
    "hostile log-mel": (False, "s4", lambda r: clip(r, "s4").log_mel.write_bytes(pickle.dumps(print)), "log-mel",
                        "error", ".pkl", "not a pickled tensor"),
    "log-mel of another length": (False, "s4", lambda r: clip(r, "s4").log_mel.write_bytes(pickle.dumps(
        log_mel_examples(load_wav(clip(r, "s4").sound)[0])[:3])), "log-mel", "warning", ".pkl", "3 examples for 5"),
    "same picture in two splits": (False, "s4", repeated_frame, "leakage", "note", "train s4_train_00000, test",
                                   "same picture"),
    "named twice": (True, "s4", lambda r: edit(r / META["s4"], lambda rows: [*rows, rows[1]]), "metadata", "error",
                    META["s4"], "named 2 times, in train and train"),
    "in two splits": (True, "ms3", lambda r: edit(r / META["ms3"], lambda rows: [*rows, [rows[1][0], "test"]]),
                      "metadata", "error", META["ms3"], "named 2 times, in train and test"),
    "unknown split": (True, "s4", lambda r: edit(r / META["s4"], lambda rows: [*rows[:-1], [*rows[-1][:3], "dev"]]),
                      "metadata", "error", META["s4"], "split 'dev'"),
    "unknown label": (True, "avss", lambda r: edit(r / META["avss"], lambda rows: [*rows[:-1], [*rows[-1][:6], "v3"]]),
                      "metadata", "error", "", "label of"),
    "partial copy": (True, "ms3", no_manifest, "metadata", "warning", META["ms3"],
                     "2 clips of ms3 train, the published set has 296"),
    "no metadata": (True, "s4", lambda r: (r / META["s4"]).unlink(), "metadata", "error", "", "no AVSBench s4 here"),
    "short row": (True, "s4", lambda r: edit(r / META["s4"], lambda rows: [*rows, ["x"]]), "metadata", "error", "",
                  "row 6 has 1 values"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(own_root, before, damage):
    shallow, subset, do, name, level, where, what = DAMAGE[damage]
    root = own_root(subset)
    do(root)
    for deep in (False, True) if shallow else (True,):
        report = run(root, subset, deep)
        new = found(report) - before[subset, deep]
        assert any(n == name and x == level and where in w and what in t for n, x, w, t in new), new
        assert report.exit_code == ("note", "warning", "error").index(level)
    if not shallow:
        assert not any(n == name and what in t for n, _, _, t in found(run(root, subset, deep=False)))


def test_all_files_are_listed_and_ten_are_printed(own_root, tmp_path, capsys):
    root = own_root("s4")
    for record in read_index(root, "s4"):
        for path in record.frames[2:]:
            path.unlink()
    report = run(root, deep=False)
    missing = [f for f in report.findings if f.level == "error"]
    assert len(missing) == 15 and report.exit_code == 2
    report.print()
    printed = capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert printed.count(":missing") == SHOWN and "error15" in printed
    report.write(tmp_path / "out" / "check.json")
    written = json.loads((tmp_path / "out" / "check.json").read_text())
    assert written["exit_code"] == 2 and written["subset"] == "s4" and written["facts"]["frames"] == 10
    assert sum(finding["what"] == "missing" for finding in written["findings"]) == 15


def test_counts_of_a_deep_check(toy_root):
    report = run(toy_root, "avss")
    assert report.facts["labels_rgb"] == {"RGB": "100.00%", "BGR": "0.00%"}
    assert set(report.facts["pixels"]) <= {"background", "cross", "disc", "ring", "square", "star", "triangle"}
    assert sum(report.facts["pixels"].values()) == report.facts["labels"] * 320 * 180
    near = run(toy_root, "s4").facts["log-mel distance"]
    assert near["greatest"] < 1 and near["mean"] < 0.01
    empty = sum(n for key, n in run(toy_root, "ms3").facts.items() if key.startswith("empty labels"))
    assert empty > 0


def flood(values):
    """Components by search, as the definition says."""
    left = set(zip(*np.nonzero(values), strict=True))
    small = []
    while left:
        value, todo, size = None, [left.pop()], 0
        value = values[todo[0]]
        while todo:
            y, x = todo.pop()
            size += 1
            for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if near in left and values[near] == value:
                    left.remove(near)
                    todo.append(near)
        small += [int(value)] * (size < STRAY)
    return sorted(small)


@pytest.mark.parametrize("seed", range(6))
def test_stray_components_are_those_of_a_flood_fill(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 3, (24, 31), dtype=np.uint8) * (rng.random((24, 31)) < 0.2 + 0.12 * seed)
    values[5:12, 3:20] = 2
    assert sorted(stray_components(values)) == flood(values)
    assert stray_components(np.zeros((3, 4), np.uint8)) == [] and stray_components(np.full((9, 9), 4)) == []


def test_unknown_subset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="subset: expected one of"):
        check(tmp_path, "s5")


def test_own_clips_are_checked_as_well(tmp_path):
    for folder in ("frames", "labels"):
        (tmp_path / "a" / folder).mkdir(parents=True)
    for second in range(2):
        save(tmp_path / f"a/frames/{second}.png", np.full((40, 60, 3), 50 * second))
    save(tmp_path / "a/labels/1.png", np.full((40, 60), 255))
    soundfile.write(tmp_path / "a/audio.wav", 0.1 * np.sin(np.arange(32000)), 16000)
    (tmp_path / "clips.csv").write_text("name,split\na,train\n")
    report = run(tmp_path, "folder")
    assert report.exit_code == 0 and report.facts["frames"] == 2 and report.facts["labels"] == 1
    save(tmp_path / "a/labels/1.png", np.full((20, 30), 3))
    assert {(f.check, f.level, f.where, f.what) for f in run(tmp_path, "folder").findings} == {
        ("labels", "error", "a/labels/1.png", "holds 3, expected 0 and 255; labels of several classes need the file "
                                              "label2idx.json beside clips.csv")}
    save(tmp_path / "a/labels/1.png", np.full((20, 30), 255))
    assert [f.what for f in run(tmp_path, "folder").findings] == ["is 30x20, its frame 60x40"]
    save(tmp_path / "a/labels/1.png", np.full((40, 60), 3))
    (tmp_path / "label2idx.json").write_text(json.dumps({"background": 0, "dog": 1}))
    assert any("expected class indices below 2" in f.what for f in run(tmp_path, "folder").findings)


def test_what_nothing_reads_of_own_clips_is_named(tmp_path):
    for folder in ("a/frames", "a/masks", "b/frames"):
        (tmp_path / folder).mkdir(parents=True)
    for picture in range(4):  # two a second: the second one of each is on show
        save(tmp_path / f"a/frames/{picture}.png", np.full((40, 60, 3), 50 * picture))
        save(tmp_path / f"a/masks/{picture}.png", np.full((40, 60), 255))
    for path in ("a/frames/notes.txt", "a/sound.mp3", "b/frames/0.png", "a/frames/.DS_Store"):
        (tmp_path / path).touch()
    soundfile.write(tmp_path / "a/audio.wav", 0.1 * np.sin(np.arange(5 * 16000)), 16000)
    (tmp_path / "clips.csv").write_text("name,split,fps\na,train,2\n")
    found = {(f.check, f.level, f.where): f.what for f in run(tmp_path, "folder").findings}
    assert found.keys() == {
        ("files", "warning", "b"), ("files", "warning", "a/sound.mp3"), ("files", "warning", "a/frames/notes.txt"),
        ("files", "note", "a/frames/.DS_Store"), ("labels", "warning", "a/masks/0.png"),
        ("audio", "warning", "a/audio.wav")}
    assert "2 labels of pictures that are not on show" in found["labels", "warning", "a/masks/0.png"]
    assert found["audio", "warning", "a/audio.wav"] == "lasts 5.0 s, its pictures 2 s"


def test_a_split_of_own_clips_without_any_label_is_an_error(tmp_path):
    (tmp_path / "a/frames").mkdir(parents=True)
    save(tmp_path / "a/frames/0.png", np.full((40, 60, 3), 50))
    soundfile.write(tmp_path / "a/audio.wav", 0.1 * np.sin(np.arange(16000)), 16000)
    (tmp_path / "clips.csv").write_text("name,split\na,train\n")
    report = run(tmp_path, "folder")
    assert report.exit_code == 2 and [f.what for f in report.findings] == ["no picture of this split has a label"]
