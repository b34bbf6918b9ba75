"""Own clips: what lies in a folder is what comes out of the data set."""
import json
from fractions import Fraction

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from icf.config import DataConfig
from icf.data import build_dataset, collate
from icf.data.audio import log_mel_examples
from icf.data.folder import import_clip, import_clips, open_frames
from icf.data.video import write_video

RATE = 16000
SIZE = 32


def noise(seconds, rate=RATE, seed=0):
    return np.random.default_rng(seed).uniform(-0.3, 0.3, round(seconds * rate)).astype(np.float32)


def write_clip(root, name, frames, labels=(), sound=None, rate=RATE, first=0, size=(SIZE, SIZE)):
    """A clip whose frame i is grey of level 10 i; `labels` are (frame, array)."""
    for folder in ("frames", "labels"):
        (root / name / folder).mkdir(parents=True)
    for i in range(frames):
        image = Image.fromarray(np.full((*size, 3), 10 * i % 250, np.uint8))
        image.save(root / name / "frames" / f"shot{i + first}.png")
    for i, label in labels:
        Image.fromarray(label).save(root / name / "labels" / f"shot{i + first}.png")
    soundfile.write(root / name / "audio.wav", noise(frames) if sound is None else sound, rate, subtype="FLOAT")


def half(value):
    """A label whose left half is `value`."""
    label = np.zeros((SIZE, SIZE), np.uint8)
    label[:, :SIZE // 2] = value
    return label


def dataset(root, split="train", **options):
    return build_dataset(DataConfig(root=root, subset="folder", size=SIZE, **options), split)


def clips_csv(root, *rows, header="name, split, fps, category"):
    (root / "clips.csv").write_text("\n".join([header, *rows]) + "\n")


def test_binary_clips(tmp_path):
    """Eleven seconds in natural order (shot10 after shot9), labels 0/255 and 0/1, one of them missing."""
    write_clip(tmp_path, "a", 3, [(0, half(255)), (2, half(1))])
    write_clip(tmp_path, "b", 11)
    write_clip(tmp_path, "c", 1)
    clips_csv(tmp_path, "a, train,, drum", "b, val", "c, train")
    data = dataset(tmp_path)
    assert (data.names, data.classes, data.split, data.subset, len(data)) == (["a", "c"], [], "train", "folder", 2)
    clip = data[0]
    assert clip.frames.shape == (5, 3, SIZE, SIZE) and clip.frames.dtype == torch.uint8
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 10, 20, 0, 0]
    assert clip.frame_mask.tolist() == [True, True, True, False, False]
    assert clip.label_mask.tolist() == [True, False, True, False, False]
    expected = torch.from_numpy(half(1))
    assert clip.masks.dtype == torch.uint8 and torch.equal(clip.masks[0], expected)
    assert torch.equal(clip.masks[2], expected) and not clip.masks[[1, 3, 4]].any()
    assert (clip.name, clip.categories, data[1].categories) == ("a", ("drum",), ())
    assert collate([data[0], data[1]]).labelled.tolist() == [0, 2]
    longer = dataset(tmp_path, "val", frames=11)
    assert longer[0].frames[:, 0, 0, 0].tolist() == list(range(0, 110, 10)) and not longer[0].label_mask.any()
    assert longer.frame_path(0, 10).name == "shot10.png"


def test_supervision_can_be_cut_to_the_first_label(tmp_path):
    write_clip(tmp_path, "a", 4, [(1, half(255)), (3, half(255))])
    clips_csv(tmp_path, "a, train")
    assert dataset(tmp_path).records[0].labelled == 4
    clip = dataset(tmp_path, supervision="first")[0]
    assert clip.label_mask.tolist() == [False, True, False, False, False]
    assert clip.masks[1].any() and not clip.masks[3].any()


def test_semantic_clips(tmp_path):
    label = half(2)
    label[:4] = 255
    write_clip(tmp_path, "a", 2, [(0, label), (1, half(1))])
    clips_csv(tmp_path, "a, test")
    (tmp_path / "label2idx.json").write_text(json.dumps({"dog": 2, "background": 0, "cat": 1}))
    data = dataset(tmp_path, "test")
    assert data.classes == ["background", "cat", "dog"]
    assert torch.equal(data[0].masks[0], torch.from_numpy(label)) and data[0].masks[1].max() == 1
    (tmp_path / "a" / "labels" / "shot1.png").unlink()
    Image.fromarray(half(3)).save(tmp_path / "a" / "labels" / "shot1.png")
    with pytest.raises(ValueError, match="shot1.png: expected class indices below 3, got 3"):
        dataset(tmp_path, "test")[0]


@pytest.mark.parametrize("fps, frames, expected", [
    ("4", 12, [3, 7, 11]), ("2.5", 10, [2, 4, 7, 9]), ("30000/1001", 60, [28, 58]), ("25", 10, [9]), ("1", 2, [0, 1])])
def test_one_frame_a_second_is_the_one_on_show_at_fifteen_sixteenths(tmp_path, fps, frames, expected):
    write_clip(tmp_path, "a", frames, [(expected[-1], half(255))])
    clips_csv(tmp_path, f"a, train, {fps}")
    clip, record = dataset(tmp_path)[0], dataset(tmp_path).records[0]
    assert [path.stem for path in record.frames] == [f"shot{i}" for i in expected]
    assert clip.frame_mask.sum() == len(expected) and clip.label_mask.nonzero().tolist() == [[len(expected) - 1]]


def test_sound_passes_the_common_front_end(tmp_path):
    sound = noise(3)
    write_clip(tmp_path, "a", 3, sound=np.stack([sound, np.zeros_like(sound)], 1))
    clips_csv(tmp_path, "a, train")
    data = dataset(tmp_path)
    waveform, rate = data.waveform(0)
    assert rate == RATE and torch.allclose(waveform, torch.from_numpy(sound / 2), atol=1e-6)  # the mean of the channels
    assert torch.equal(data[0].log_mel[:3], log_mel_examples(waveform, frames=3))
    other = torch.from_numpy(noise(3, seed=1))
    assert torch.equal(data.with_audio(0, other).log_mel[:3], log_mel_examples(other, frames=3))
    assert not torch.equal(data.with_audio(0, other).log_mel, data[0].log_mel)


def break_clips(root, what):
    rows = {"split": "a, practice", "name": ", train", "fps": "a, train, fast", "zero": "a, train, 0"}
    clips_csv(root, rows.get(what, "a, train"), *(["a, val"] if what == "twice" else []))
    if what == "csv":
        (root / "clips.csv").unlink()
    elif what == "frames":
        for path in (root / "a" / "frames").iterdir():
            path.unlink()
    elif what == "label":
        Image.fromarray(half(1)).save(root / "a" / "labels" / "shot7.png")
    elif what == "sound":
        (root / "a" / "audio.wav").unlink()
    elif what == "empty":
        clips_csv(root, "a, val")


@pytest.mark.parametrize("what, error, reason", [
    ("csv", FileNotFoundError, "data.root: no own clips here, expected .*clips.csv"),
    ("split", ValueError, "clips.csv: row 1: expected a name and a split of .*, got 'a', 'practice'"),
    ("name", ValueError, "clips.csv: row 1: expected a name"), ("twice", ValueError, "row 2: 'a' is named twice"),
    ("fps", ValueError, "row 1: expected an fps such as .* got 'fast'"), ("zero", ValueError, "an fps .* got '0'"),
    ("frames", FileNotFoundError, "frames: no pictures"), ("sound", FileNotFoundError, "audio.wav"),
    ("label", ValueError, "shot7.png: no picture of that name"), ("empty", ValueError, "no clip of split 'train'")])
def test_what_is_wrong_is_named(tmp_path, what, error, reason):
    write_clip(tmp_path, "a", 2)
    break_clips(tmp_path, what)
    with pytest.raises(error, match=reason):
        dataset(tmp_path)[0]


def make_video(path, seconds=3):
    soundfile.write(path.with_suffix(".wav"), noise(seconds), RATE)
    frames = ((Fraction(i, 4), np.full((36, 64, 3), 20 * (i // 4), np.uint8)) for i in range(4 * seconds))
    write_video(path, frames, Fraction(4), Fraction(1, 1000), path.with_suffix(".wav"))


def test_videos_with_masks_become_clips(tmp_path):
    make_video(tmp_path / "film.mp4")
    (tmp_path / "masks").mkdir()
    mask = np.zeros((36, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "00002.png")
    root = tmp_path / "own"
    import_clip(root, tmp_path / "film.mp4", "train", tmp_path / "masks", category="drum")
    import_clip(root, tmp_path / "film.mp4", "val", name="again")
    assert sorted(path.name for path in root.iterdir()) == ["again", "clips.csv", "film"]
    clip = dataset(root)[0]
    assert clip.name == "film" and clip.categories == ("drum",) and clip.frame_mask.sum() == 3
    assert np.abs(clip.frames[:3].float().mean((1, 2, 3)).numpy() - [0, 20, 40]).max() < 3
    assert clip.label_mask.tolist() == [False, False, True, False, False]
    assert torch.equal(clip.masks[2], torch.from_numpy(half(1)))
    waveform, _ = dataset(root, "val").waveform(0)
    assert len(waveform) / RATE == pytest.approx(3, abs=0.1) and 0.1 < waveform.std() < 0.25


def test_imported_labels_may_have_every_format_and_the_classes_of_the_root(tmp_path):
    make_video(tmp_path / "film.mp4")
    root = tmp_path / "own"
    for folder in ("own", "masks"):
        (tmp_path / folder).mkdir()
    (root / "label2idx.json").write_text(json.dumps({"background": 0, "dog": 1, "cat": 2}))
    Image.fromarray(np.full((36, 64), 2, np.uint8)).save(tmp_path / "masks/0.bmp")
    import_clip(root, tmp_path / "film.mp4", "train", tmp_path / "masks")
    assert (root / "film/labels/0.bmp").read_bytes() == (tmp_path / "masks/0.bmp").read_bytes()
    assert (dataset(root)[0].masks[0] == 2).all()
    Image.fromarray(np.full((36, 64), 3, np.uint8)).save(tmp_path / "masks/0.bmp")
    with pytest.raises(ValueError, match="0.bmp: .*3"):
        import_clip(root, tmp_path / "film.mp4", "train", tmp_path / "masks", name="wrong")
    assert not (root / "wrong").exists()


def test_a_listed_name_and_a_list_without_names_are_refused(tmp_path):
    """A second row of a name would make all clips unreadable."""
    make_video(tmp_path / "film.mp4")
    (tmp_path / "own").mkdir()
    for text, reason in (("split, name\ntrain, film\n", "name: expected a new file name"),
                         ("clip, split\nx, train\n", "clips.csv: expected a first line with name and split")):
        (tmp_path / "own/clips.csv").write_text(text)
        with pytest.raises(ValueError, match=reason):
            import_clip(tmp_path / "own", tmp_path / "film.mp4", "train")
        assert (tmp_path / "own/clips.csv").read_text() == text
    with pytest.raises(ValueError, match=r"no videos \(.mp4, .*\) in this folder"):
        import_clip(tmp_path / "fresh", tmp_path / "own", "train")


@pytest.mark.parametrize("options, reason", [
    ({"split": "practice"}, "split: expected one of"), ({"name": "a/b"}, "name: expected a new file name"),
    ({"name": "taken"}, "name: expected a new file name below .*, got 'taken'"),
    ({"labels": "empty"}, r"labels: expected files \(.png"), ({"labels": "late"}, "3.png: .*film.mp4 has 3 seconds"),
    ({"labels": "small"}, "1.png: expected 64x36 pixels, as .*film.mp4 has, got 32x32"),
    ({"labels": "absent"}, "labels: no such folder"), ({"labels": "lossy"}, "1.jpg: no label; expected one of .png"),
    ({"labels": "unnumbered"}, "shot1.png: expected labels named by their second"),
    ({"labels": "twice"}, "1.png: 01.png is a label of the same second"),
    ({"labels": "values"}, "0.png: holds 0, 2, expected 0 and 255")])
def test_an_import_that_fails_changes_nothing(tmp_path, options, reason):
    make_video(tmp_path / "film.mp4")
    root = tmp_path / "own"
    (root / "taken").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for folder, second, size in (("late", 3, (64, 36)), ("small", 1, (32, 32))):
        (tmp_path / folder).mkdir()
        Image.new("L", size, 255).save(tmp_path / folder / f"{second}.png")
    for folder, *names in (("lossy", "1.jpg"), ("unnumbered", "0.png", "shot1.png"), ("twice", "1.png", "01.png")):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.new("L", (64, 36), 255).save(tmp_path / folder / name)
    (tmp_path / "values").mkdir()
    Image.fromarray(np.eye(36, 64, dtype=np.uint8) * 2).save(tmp_path / "values" / "0.png")
    if "labels" in options:
        options = {"labels": tmp_path / options["labels"]}
    with pytest.raises(ValueError, match=reason):
        import_clip(root, tmp_path / "film.mp4", **{"split": "train", **options})
    assert [path.name for path in root.iterdir()] == ["taken"]


def test_pictures_may_lie_in_frames_beside_the_sound(tmp_path):
    write_clip(tmp_path, "a", 12)
    folder = open_frames(tmp_path / "a")
    assert (folder.width, folder.height, folder.duration, folder.sound.name) == (SIZE, SIZE, 12, "audio.wav")
    assert [(int(time), int(image[0, 0, 0])) for time, image in folder.frames()] == [(i, 10 * i) for i in range(12)]


def save_label(root, ending, values, mode=None, **options):
    """A clip of one picture with one label, whose folder is `labels`."""
    write_clip(root, "a", 1)
    clips_csv(root, "a, train")
    image = Image.fromarray(values)
    image = image if mode is None else image.convert(mode)
    image.save(root / f"a/labels/shot0.{ending}", **options)


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "tiff", "gif", "webp"])
@pytest.mark.parametrize("folder", ["labels", "masks"])
def test_labels_in_every_format_that_keeps_them(tmp_path, ending, folder):
    save_label(tmp_path, ending, half(255), **({"lossless": True} if ending == "webp" else {}))
    (tmp_path / "a/labels").rename(tmp_path / "a" / folder)
    clip = dataset(tmp_path)[0]
    assert torch.equal(clip.masks[0], torch.from_numpy(half(1))) and clip.label_mask.tolist() == [True] + [False] * 4


def paletted(colours):
    """A label whose right half has index 0, its left half 1."""
    image = Image.fromarray(half(1)).convert("P")
    image.putpalette(colours)
    return image


@pytest.mark.parametrize("image", [
    pytest.param(Image.fromarray(half(1)), id="0 and 1"),
    pytest.param(Image.fromarray(half(255)).convert("1"), id="one bit"),
    pytest.param(Image.fromarray(half(255).astype(np.uint16) * 257), id="16 bits"),
    pytest.param(Image.fromarray(half(255)).convert("RGB"), id="RGB"),
    pytest.param(Image.merge("RGB", [Image.fromarray(half(v)) for v in (200, 30, 0)]), id="one colour"),
    pytest.param(Image.merge("LA", [Image.new("L", (SIZE, SIZE), 90), Image.fromarray(half(255))]), id="alpha"),
    pytest.param(paletted([0, 0, 0, 128, 0, 0]), id="palette of VOC"),
    pytest.param(paletted([255, 255, 255, 0, 0, 0]).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
                 id="palette that begins with the object"),
])
def test_a_binary_label_means_what_it_shows(tmp_path, image):
    write_clip(tmp_path, "a", 1)
    clips_csv(tmp_path, "a, train")
    image.save(tmp_path / "a/labels/shot0.png")
    assert torch.equal(dataset(tmp_path)[0].masks[0], torch.from_numpy(half(1)))


def thirds(*values):
    return np.repeat(np.array(values, np.uint8), 12)[None].repeat(SIZE, 0)[:, :SIZE]


@pytest.mark.parametrize("values, found", [
    (half(2), "0, 2"), (thirds(0, 1, 2), "0, 1, 2"), (thirds(0, 128, 255), "0, 128, 255"), (half(254), "0, 254"),
    (np.full((SIZE, SIZE), 7, np.uint8), "7"), (np.stack([thirds(0, 200, 90)] * 3, 2), r"\(0, 0, 0\), \(90, 90, 90\)")])
def test_a_label_whose_values_are_not_certain_is_refused(tmp_path, values, found):
    save_label(tmp_path, "png", values)
    with pytest.raises(ValueError, match=f"shot0.png: holds {found}.*, expected 0 and 255; .* label2idx.json"):
        dataset(tmp_path)[0]


def test_labels_that_lose_values_and_other_files_among_them_are_refused(tmp_path):
    save_label(tmp_path, "png", half(255))
    for name, reason in (("shot0.jpg", "no label; expected one of"), ("shot0.npy", "no label"),
                         ("shot0.bmp", "shot0.bmp is a label of the same picture")):
        Image.fromarray(half(255)).save(tmp_path / "a/labels" / name, format="JPEG" if name.endswith("jpg") else "BMP")
        with pytest.raises(ValueError, match=reason):
            dataset(tmp_path)
        (tmp_path / "a/labels" / name).unlink()
    (tmp_path / "a/masks").mkdir()
    with pytest.raises(ValueError, match="expected one folder of labels, got labels and masks"):
        dataset(tmp_path)


def test_several_videos_are_imported_at_once_and_say_what_they_became(tmp_path, capsys):
    """Labels by the name of the video; one that cannot be read does not stop the others."""
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", ((Fraction(i), np.full((SIZE, SIZE, 3), 50 * i, np.uint8))
                                                 for i in range(3)), Fraction(1), Fraction(1, 1000))
    (tmp_path / "bad.mp4").write_text("no video")
    (tmp_path / "masks/1").mkdir(parents=True)
    Image.fromarray(half(255)).save(tmp_path / "masks/1/2.png")
    videos = [tmp_path / name for name in ("0.mp4", "bad.mp4", "1.mp4")]
    records, failed = import_clips(tmp_path / "own", videos, "train", tmp_path / "masks", silent_ok=True)
    assert [record.name for record in records] == ["0", "1"] and len(failed) == 1 and "bad.mp4" in failed[0]
    assert [sum(mask is not None for mask in record.masks) for record in records] == [0, 1]
    assert f"{tmp_path / 'own/1'}: 3 s of train, as many pictures of {SIZE}x{SIZE}, 1 labels" in capsys.readouterr().out
    with pytest.raises(ValueError, match="name: expected none for 3 videos"):
        import_clips(tmp_path / "own", videos, "train", name="x")
    with pytest.raises(ValueError, match="labels: expected folders named as the videos, such as 0/"):
        import_clips(tmp_path / "own", videos, "train", tmp_path)
    [alone], _ = import_clips(tmp_path / "alone", videos[2:], "train", tmp_path / "masks", silent_ok=True)
    assert sum(mask is not None for mask in alone.masks) == 1


def test_a_split_without_clips_is_named_with_those_that_have_some(tmp_path):
    write_clip(tmp_path, "a", 1)
    clips_csv(tmp_path, "a, train")
    with pytest.raises(ValueError, match="names no clip of split 'test'; the column split of its metadata holds train"):
        dataset(tmp_path, "test")
