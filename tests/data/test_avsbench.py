"""The loaders against the toy benchmark, whose manifest says what was drawn, and against damaged copies of it."""
import csv
import hashlib
import json
import pickle

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from icf.config import DataConfig
from icf.data import IGNORE, build_dataset, collate, toy
from icf.data.avsbench import binary_mask, class_palette, read_classes, read_index, read_label
from icf.data.transforms import combo


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def entry(root, subset, name):
    return next(clip for clip in toy.load_manifest(root, subset)["clips"] if clip["name"] == name)


@pytest.mark.parametrize("subset, source, split, real, labelled", [
    ("s4", "s4", "train", 5, 1), ("s4", "s4", "val", 5, 5), ("s4", "s4", "test", 5, 5),
    ("ms3", "ms3", "train", 5, 5), ("ms3", "ms3", "val", 5, 5), ("ms3", "ms3", "test", 5, 5),
    ("avss", "v1s", "train", 5, 1), ("avss", "v1s", "val", 5, 5), ("avss", "v1s", "test", 5, 5),
    ("avss", "v1m", "train", 5, 5), ("avss", "v1m", "test", 5, 5),
    ("avss", "v2", "train", 10, 10), ("avss", "v2", "test", 10, 10)])
def test_supervision_of_a_subset(load, subset, source, split, real, labelled):
    dataset = load(subset, split)
    index = next(i for i, record in enumerate(dataset.records) if record.source == source)
    clip, steps = dataset[index], torch.arange(10 if subset == "avss" else 5)
    assert torch.equal(clip.frame_mask, steps < real) and torch.equal(clip.label_mask, steps < labelled)
    assert not clip.frames[real:].any() and clip.frames[:real].flatten(1).any(1).all()
    assert not clip.masks[labelled:].any() and not clip.log_mel[real:].any()


@pytest.mark.parametrize("subset", ["s4", "ms3"])
def test_pictures_masks_and_sounds_are_those_that_were_drawn(load, toy_root, subset):
    dataset = load(subset, "test", size=224)
    for index, name in enumerate(dataset.names):
        clip, drawn = dataset[index], entry(toy_root, subset, name)["sha256"]
        assert sha(clip.frames.permute(0, 2, 3, 1).numpy()) == drawn["frames"]
        assert sha(clip.masks.bool().numpy()) == drawn["masks"]
        waveform, rate = dataset.waveform(index)
        assert rate == 16000
        if index != 2:  # which went through 44.1 kHz
            assert sha((waveform * 32768).short().numpy()) == drawn["sound"]


def test_s4_names_its_category_and_avss_its_classes(load, toy_root):
    s4, avss = load("s4", "test"), load("avss", "test")
    assert s4.classes == [] and s4[0].categories == (s4.records[0].frames[0].parts[-3],)
    assert avss.classes == ["background", *toy.CLASSES]
    for index, name in enumerate(avss.names[-3:], len(avss) - 3):
        shapes = entry(toy_root, "avss", name)["shapes"]
        sounding = {avss.classes.index(s["class"]) for s in shapes if any(s["sounding"])}
        assert set(avss[index].masks.unique().tolist()) - {0} == sounding


def test_44100_hz_and_stereo_sound_like_the_log_mel_files_of_the_original(load):
    for subset in ("s4", "ms3"):
        wav, pkl = load(subset, "train"), load(subset, "train", audio_source="pkl")
        for index in range(4):
            difference = (wav[index].log_mel - pkl[index].log_mel).abs().mean()
            assert difference < (0.02 if index == 2 else 1e-5)


def test_sound_that_ends_early_repeats_its_last_example_or_ends_in_zeros(load):
    assert torch.equal(load("s4", "train")[0].log_mel[3], load("s4", "train")[0].log_mel[4])
    semantic = load("avss", "train")
    index = [record.source for record in semantic.records].index("v2")
    assert semantic[index].log_mel[8].any() and not semantic[index].log_mel[9].any()


@pytest.mark.parametrize("supervision, labelled", [("first", [1, 1]), ("all", [1, 5]), ("auto", [1, 5])])
def test_supervision_can_be_forced(load, supervision, labelled):
    if supervision == "all":
        with pytest.raises(FileNotFoundError, match="_2.png: missing"):
            load("s4", "train", supervision="all")[0]
        labelled = [5, 5]
        splits = ("val", "test")
    else:
        splits = ("train", "val")
    assert [int(load("s4", split, supervision=supervision)[0].label_mask.sum()) for split in splits] == labelled


def test_root_may_be_the_folder_itself_or_its_parent(load, toy_root, tmp_path):
    (tmp_path / "avs_released").symlink_to(toy_root / "AVSBench_semantic")
    for root in (toy_root / "AVSBench_semantic", tmp_path):
        assert load("avss", "val", root=root).names == load("avss", "val").names
    with pytest.raises(FileNotFoundError, match="data.root: no AVSBench ms3 here, expected .*ms3_meta_data.csv"):
        load("ms3", "val", root=tmp_path)


def rewrite(path, change):
    with path.open(newline="") as file:
        rows = change(list(csv.reader(file)))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.mark.parametrize("change", [
    lambda rows: rows[1:],
    lambda rows: [["id", "from", "kind", "split"], *rows[1:]],
    lambda rows: [[f" {cell} " for cell in row] for row in rows],
    lambda rows: [[row[2], row[0], row[3], row[1]] for row in rows],
    lambda rows: [["name", "start", "category", "split"], *rows[1:]],
    lambda rows: [*rows, [], ["", "", "", ""]],
], ids=["no header", "by position", "spaces", "other order", "other start", "empty lines"])
def test_metadata_is_read_by_name_or_position(own_root, change):
    root = own_root("s4")
    expected = read_index(root, "s4")
    rewrite(root / "s4_meta_data.csv", change)
    assert read_index(root, "s4") == expected


def test_metadata_with_too_few_values_names_the_row(own_root):
    root = own_root("ms3")
    rewrite(root / "ms3_meta_data.csv", lambda rows: [*rows[:4], rows[4][:1], *rows[5:]])
    with pytest.raises(ValueError, match="row 4 has 1 values, expected name, split"):
        read_index(root, "ms3")


def test_ms3_frames_may_lack_the_mp4_of_their_names(own_root, load):
    root = own_root("ms3")
    original = load("ms3", "val", root=root)[0].frames
    paths = sorted(root.glob("ms3_data/visual_frames/*/*.mp4_*.png"))
    assert paths
    for path in paths:
        path.rename(path.with_name(path.name.replace(".mp4_", "_")))
    assert torch.equal(load("ms3", "val", root=root)[0].frames, original)


TRUTH = np.array([[1, 0], [0, 1]], dtype=np.uint8)


def picture(mode):
    grey = Image.fromarray(TRUTH * 255)
    if mode == "P":
        image = Image.fromarray(TRUTH, mode="P")
        image.putpalette([200, 0, 0, 10, 10, 10])
        return image
    if mode == "I;16":
        return Image.fromarray(TRUTH.astype(np.uint16) * 65535)
    if mode == "one channel":
        return Image.merge("RGB", [Image.new("L", (2, 2)), grey, Image.new("L", (2, 2))])
    return Image.fromarray(TRUTH) if mode == "0 and 1" else grey.convert(mode)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "I;16", "0 and 1", "one channel"])
def test_binary_mask_of_any_mode(tmp_path, mode):
    picture(mode).save(tmp_path / "mask.png")
    assert np.array_equal(binary_mask(read_label(tmp_path / "mask.png")), TRUTH)


def test_binary_mask_is_foreground_above_127_and_may_be_empty():
    assert binary_mask(np.array([[127, 128], [0, 255]], np.uint8)).tolist() == [[0, 1], [0, 1]]
    assert not binary_mask(np.zeros((2, 2), np.uint8)).any()


def test_palette_is_that_of_the_published_colours():
    palette = class_palette(71)
    expected = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 5: (128, 0, 128),
                8: (64, 0, 0), 28: (64, 64, 128), 49: (128, 64, 64), 70: (32, 128, 128)}
    assert {index: tuple(palette[index].tolist()) for index in expected} == expected
    colours = {tuple(colour) for colour in palette.tolist()}
    assert len(colours) == 71 and sum(colour[::-1] in colours for colour in colours) == 64
    assert sum(colour == colour[::-1] for colour in colours) == 16


def test_classes_that_start_at_one_are_refused(tmp_path):
    (tmp_path / "label2idx.json").write_text(json.dumps({"background": 0, "accordion": 2, "airplane": 3}))
    with pytest.raises(ValueError, match="expected background 0 and indices without gap"):
        read_classes(tmp_path)
    (tmp_path / "label2idx.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object"):
        read_classes(tmp_path)


def test_avss_is_cut_from_the_middle_in_training_and_squeezed_otherwise(own_root, load):
    root = own_root("avss")
    record = next(r for r in read_index(root, "avss") if r.split == "train")
    gradient = np.tile(np.linspace(0, 255, 320, dtype=np.uint8), (180, 1))
    label = np.zeros((180, 320), np.uint8)
    label[:, 160:] = 3
    Image.fromarray(np.stack([gradient] * 3, -1)).save(record.frames[0], quality=95)
    Image.fromarray(label).save(record.masks[0])
    cut = load("avss", "train", root=root, size=96)
    clip = cut[cut.names.index(record.name)]
    assert (clip.frames[0, 0, 48, [0, 47, 95]].float() - torch.tensor([56.0, 127.0, 199.0])).abs().max() < 5
    assert clip.masks[0, 0, [0, 46, 50, 95]].tolist() == [0, 0, 3, 3]
    rewrite(root / "metadata.csv", lambda rows: [[*row[:5], "test" if row[1] == record.name else row[5], row[6]]
                                                 for row in rows])
    squeezed = load("avss", "test", root=root, size=96)
    clip = squeezed[squeezed.names.index(record.name)]
    assert (clip.frames[0, 0, 48, [0, 47, 95]].float() - torch.tensor([1.0, 127.0, 254.0])).abs().max() < 5


def test_large_jpeg_decoded_at_half_size_stays_close_to_the_whole(tmp_path):
    from icf.data.transforms import resize_frame

    y, x = np.mgrid[:720, :1280]
    smooth = np.stack([x / 5, y / 3, (x + y) / 8], -1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        got = resize_frame(image, 224)
    whole = np.asarray(Image.fromarray(smooth).resize((224, 224), Image.Resampling.BILINEAR))
    assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - whole).mean() < 1


def test_missing_and_broken_files_are_named(own_root, load):
    root = own_root("avss")
    record = next(r for r in read_index(root, "avss") if r.split == "val" and r.source == "v2")
    dataset = load("avss", "val", root=root, cache=False)
    index = dataset.names.index(record.name)

    def fails(error, said):
        with pytest.raises(error, match=said):
            dataset[index]

    whole = record.frames[2].read_bytes()
    record.frames[2].write_bytes(whole[:len(whole) // 2])
    fails(ValueError, "frames/2.jpg: cannot be read as a picture")
    record.frames[2].unlink()
    fails(FileNotFoundError, "frames/2.jpg: missing")
    record.frames[2].write_bytes(whole)
    Image.fromarray(np.full((180, 320), 7, np.uint8)).save(record.masks[1])
    fails(ValueError, "labels_semantic/1.png: expected class indices below 7, got 7")
    Image.fromarray(np.full((180, 320), IGNORE, np.uint8)).save(record.masks[1])
    assert (dataset[index].masks[1] == IGNORE).all()
    Image.fromarray(np.zeros((180, 320, 3), np.uint8)).save(record.masks[1])
    fails(ValueError, "labels_semantic/1.png: expected one channel")
    record.sound.write_bytes(b"RIFF")
    fails(ValueError, "audio.wav: not a readable sound file")


def test_two_clips_of_one_uid_get_names_of_their_own(own_root, load):
    root = own_root("avss")
    rewrite(root / "metadata.csv", lambda rows: [*rows, [*rows[-1][:6], "v1m"]])
    names = load("avss", "test", root=root).names
    assert len(set(names)) == len(names) and {names[-1], f"v1s_{names[-1][4:]}"} <= set(names)
    assert names[-1].startswith("v1m_s4_test")


@pytest.mark.parametrize("settings, said", [
    ({"subset": "avss", "audio_source": "pkl"}, "pkl needs data.subset s4 or ms3"),
    ({"audio_source": "pkl", "audio_timing": "aligned"}, "data.audio_timing vggish"),
    ({"split": "dev"}, "split: expected one of"), ({"subset": "s5"}, "data.subset: expected one of")])
def test_settings_that_do_not_fit_are_named(load, settings, said):
    with pytest.raises(ValueError, match=said):
        load(**{"subset": "s4", "split": "val", **settings})


def test_size_and_frames_can_be_chosen(load):
    clip = load("s4", "val", size=96, frames=7)[0]
    assert clip.frames.shape == (7, 3, 96, 96) and clip.masks.shape == (7, 96, 96)
    assert clip.frame_mask.tolist() == [True] * 5 + [False] * 2 and not clip.log_mel[5:].any()
    assert load("avss", "test", frames=3)[-1].label_mask.tolist() == [True] * 3


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("frames", "log_mel", "masks"))


def test_what_workers_have_read_is_in_the_memory_of_all(own_root, load):
    root = own_root("s4")
    dataset = load("s4", "test", root=root)
    loader = torch.utils.data.DataLoader(dataset, 2, num_workers=2, collate_fn=collate)
    batch = next(iter(loader))
    for _ in loader:
        pass
    for path in root.rglob("*.png"):
        path.unlink()
    assert torch.equal(dataset[1].frames, batch.frames[1]) and torch.equal(dataset[1].log_mel, batch.log_mel[1])
    with pytest.raises(FileNotFoundError):
        load("s4", "test", root=root)[1]


def test_memory_changes_nothing_and_cannot_be_changed_from_outside(load):
    kept, read = load("s4", "test"), load("s4", "test", cache=False)
    first = kept[2]
    first.frames.zero_(), first.masks.zero_(), first.log_mel.zero_()
    assert same(kept[2], read[2]) and same(pickle.loads(pickle.dumps(kept))[2], read[2])


def test_other_sound_passes_the_same_front_end(load):
    dataset = load("s4", "test")
    assert same(dataset.with_audio(3, dataset.waveform(3)[0]), dataset[3])
    changed = dataset.with_audio(3, dataset.waveform(4)[0])
    assert torch.equal(changed.log_mel, dataset[4].log_mel) and torch.equal(changed.frames, dataset[3].frames)


def test_augmentation_is_drawn_from_seed_epoch_and_clip(load):
    plain, dataset = load("s4", "train"), load("s4", "train", augmentation="combo")
    first = dataset[0]
    assert not torch.equal(first.frames, plain[0].frames) and same(first, dataset[0])
    dataset.set_epoch(1)
    assert not torch.equal(dataset[0].frames, first.frames)
    dataset.set_epoch(0)
    assert same(first, dataset[0])
    dataset.seed = 1
    assert not torch.equal(dataset[0].frames, first.frames)
    assert same(load("s4", "test", augmentation="combo")[0], load("s4", "test")[0])


@pytest.mark.parametrize("scale", [True, False])
def test_augmentation_moves_masks_with_their_frames(scale):
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[:, 8:30, 36:60] = 1
    frames = (masks * 160 + 40)[:, None].repeat(1, 3, 1, 1)
    flips = filled = 0
    for seed in range(20):
        changed, moved = combo(frames, masks, torch.Generator().manual_seed(seed), scale=scale)
        assert changed.shape == frames.shape and moved.shape == masks.shape and torch.equal(moved[0], moved[1])
        filled += bool((moved == IGNORE).any())
        if (moved == 1).any() and (moved == 0).any():
            brightness = changed.float().mean(1)
            assert brightness[moved == 1].median() > brightness[moved == 0].median() + 30
        flips += torch.equal(moved, masks.flip(-1))
    assert 0 < filled < 20 if scale else 2 < flips < 18 and not filled


def test_collate_stacks_and_refuses_different_sizes(load):
    clips = [load("s4", "val")[0], load("s4", "val")[1]]
    batch = collate(clips).to("cpu")
    assert len(batch) == 2 and batch.frames.shape == (2, 5, 3, 64, 64) and batch.names == [c.name for c in clips]
    assert torch.equal(batch.log_mel[1], clips[1].log_mel) and batch.categories[0] == clips[0].categories
    with pytest.raises(ValueError, match="one shape of frames"):
        collate([clips[0], load("s4", "val", size=96)[0]])


@pytest.mark.parametrize("key, value", [
    ("shapes", 5), ("shapes", None), ("shapes", [3]), ("shapes", [{"class": 1, "sounding": []}]),
    ("shapes", [{"class": "disc", "sounding": 1}]), ("off_screen", {"class": "disc"}), ("off_screen", [[]]),
    ("categories", "disc"), ("in_sight", [1]), ("name", None)])
def test_a_manifest_of_other_content_is_refused_in_a_line(own_root, load, key, value):
    root = own_root("ms3")
    manifest = json.loads((root / "toy_manifest.json").read_text())
    manifest["clips"][0][key] = value
    (root / "toy_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="toy_manifest.json: expected what icf data toy writes"):
        load("ms3", "train", root=root)


def test_toy_benchmark_is_made_when_it_is_missing(tmp_path, monkeypatch):
    from icf.config import ToyConfig

    data = DataConfig(root=tmp_path / "toy", subset="s4", size=64, toy=ToyConfig("tiny", seed=1, clips=(1, 1, 1)))
    dataset = build_dataset(data, "train")
    assert len(dataset) == 1 and dataset.groups.keys() == set(dataset.names)
    monkeypatch.setattr("icf.data.toy.files.write_clip", None)  # nothing is written twice
    assert same(build_dataset(data, "train")[0], dataset[0])
    data.toy.seed = 2
    with pytest.raises(FileExistsError, match="holds a toy benchmark .* choose another root or delete it"):
        build_dataset(data, "train")


def test_waveform_of_float_files_is_kept(own_root, load):
    root = own_root("s4")
    record = next(r for r in read_index(root, "s4") if r.split == "val")
    sound = 0.3 * np.sin(np.arange(80000) / 7).astype(np.float32)
    soundfile.write(record.sound, sound, 16000, subtype="FLOAT")
    assert np.array_equal(load("s4", "val", root=root).waveform(0)[0].numpy(), sound)


def write_replacements(folder, dataset, captions=2):
    """Other sounds and captions for every clip of a data set: settings of `DataConfig`."""
    for index, name in enumerate(dataset.names):
        soundfile.write(folder / f"{name}.wav", dataset.waveform(-1 - index)[0].numpy(), 16000, "FLOAT")
    texts = {name: [f"{name} says {i}" for i in range(captions)] for name in dataset.names}
    (folder / "captions.json").write_text(json.dumps(texts))
    return {"replaced_audio": folder, "captions": folder / "captions.json"}


@pytest.mark.parametrize("subset", ["ms3", "avss"])
def test_replaced_sounds_and_captions_come_with_training_clips_alone(load, tmp_path, subset):
    plain = load(subset, "train")
    given = write_replacements(tmp_path, plain)
    dataset = load(subset, "train", **given)
    for index, name in enumerate(dataset.names):
        clip, expected = dataset[index], dataset.with_audio(index, plain.waveform(-1 - index)[0]).log_mel
        assert torch.equal(clip.replaced_log_mel, expected)
        assert clip.captions == (f"{name} says 0", f"{name} says 1")
        assert torch.equal(clip.log_mel, plain[index].log_mel)
    batch = collate([dataset[0], dataset[1]])
    assert batch.replaced_log_mel.shape == batch.log_mel.shape and batch.captions[1] == dataset[1].captions
    test = load(subset, "test", **given)[0]
    assert test.replaced_log_mel is None and test.captions is None


@pytest.mark.parametrize("damage, message", [
    (lambda folder, names: (folder / f"{names[1]}.wav").unlink(), r"data.replaced_audio: .* 1 are missing, the first"),
    (lambda folder, names: (folder / "captions.json").unlink(), "data.captions: .* there is no file"),
    (lambda folder, names: (folder / "captions.json").write_text("{"), "data.captions: .* is not JSON"),
    (lambda folder, names: (folder / "captions.json").write_text("[1]"), "data.captions: .* lacks 5 of 5 clips"),
    (lambda folder, names: (folder / "captions.json").write_text(json.dumps({name: "a" for name in names})),
     "data.captions: .* has 'a' for"),
    (lambda folder, names: (folder / "captions.json").write_text(
        json.dumps({name: ["a"] * (1 + (name == names[2])) for name in names})),
     "data.captions: .* 1 for .* and 2 for"),
])
def test_missing_replacements_are_named(load, tmp_path, damage, message):
    dataset = load("ms3", "train")
    given = write_replacements(tmp_path, dataset)
    damage(tmp_path, dataset.names)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load("ms3", "train", **given)
