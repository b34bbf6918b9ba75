"""The toy benchmark: deterministic, biased as asked, and true to what its manifest says."""
import itertools

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from icf.data import toy
from icf.data.audio import load_log_mel
from icf.data.avsbench import binary_mask, class_palette, read_index, read_label
from icf.data.toy import files
from icf.data.toy.scene import EXTENT, INSIDE, MOMENT, SIDE, Settings, compose, covers
from icf.data.toy.sounds import examples, hear, play, timbre


def scenes(source, split, count, **settings):
    settings = Settings(**settings)
    return [compose(settings, source, split, np.random.default_rng((9, index))) for index in range(count)]


def generate(root, subset, **settings):
    return toy.generate(root, subsets=(subset,), progress=False,
                        **{"size": "tiny", "clips": (2, 1, 2), "workers": 1, **settings})[subset]


def test_same_seed_gives_the_same_files_whatever_the_processes(tmp_path):
    one, two = generate(tmp_path / "a", "s4"), generate(tmp_path / "b", "s4", workers=2)
    assert one == two
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*") if path.is_file()]
    for name in files:
        if name.suffix == ".pkl":  # whose bytes hold an address
            assert torch.equal(load_log_mel(tmp_path / "a" / name), load_log_mel(tmp_path / "b" / name))
        else:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(files) == 5 * 7 + 2 * 1 + 3 * 5 + 2  # frames, sound, log-mel; first masks; all masks; table, manifest


def test_a_clip_depends_on_its_seed_and_place_only(tmp_path):
    few, more = generate(tmp_path / "a", "ms3"), generate(tmp_path / "b", "ms3", clips=(3, 2, 3))
    by_name = {clip["name"]: clip for clip in more["clips"]}
    assert all(by_name[clip["name"]] == clip for clip in few["clips"])
    other = generate(tmp_path / "c", "ms3", seed=1)
    assert all(a["sha256"]["frames"] != b["sha256"]["frames"]
               for a, b in zip(few["clips"], other["clips"], strict=True))


def test_avss_shows_the_clips_of_s4_and_ms3(toy_root):
    drawn = {clip["name"]: clip["sha256"]["sound"] for subset in ("s4", "ms3")
             for clip in toy.load_manifest(toy_root, subset)["clips"]}
    again = {clip["name"].removesuffix("_0_5000"): clip["sha256"]["sound"]
             for clip in toy.load_manifest(toy_root, "avss")["clips"] if clip["label"] != "v2"}
    common = drawn.keys() & again.keys()
    assert len(common) >= 10 and all(drawn[name] == again[name] for name in common)


@pytest.mark.parametrize("split, settings, expected", [
    ("train", {"bias": 0.9}, 0.9), ("train", {"bias": 0.5}, 0.5), ("val", {"bias": 0.9}, 0.9),
    ("val", {"bias": 0.9, "val_bias": 0.0}, 0.0), ("test", {"visible": (2, 2)}, 1 / 2),
    ("test", {"visible": (4, 4)}, 1 / 4), ("train", {"bias": 1.0}, 1.0)])
def test_share_of_clips_in_which_the_salient_shape_sounds(split, settings, expected):
    share = np.mean([scene.aligned for scene in scenes("s4", split, 100, **settings)])
    assert abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / 100)


@pytest.mark.parametrize("source", ["s4", "ms3", "v2"])
def test_shapes_of_a_clip(source):
    y, x = np.mgrid[:SIDE, :SIDE]
    for scene in scenes(source, "train", 8, visible=(1, 4)):
        assert len({shape.kind for shape in scene.shapes} | {kind for kind, _ in scene.elsewhere}) == \
            len(scene.shapes) + len(scene.elsewhere)
        assert [shape.salient for shape in scene.shapes].count(True) == 1
        for second in range(scene.seconds):
            masks = [covers(shape, x, y, second + MOMENT) for shape in scene.shapes]
            assert not any(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any() for mask in masks)
            for a, b in itertools.combinations(masks, 2):
                assert (a & b).sum() <= 0.33 * min(a.sum(), b.sum())  # 0.3 as judged on a coarser grid


@pytest.mark.parametrize("kind, share", [("disc", np.pi), ("square", 2.82), ("triangle", 1.87), ("ring", 2.67),
                                         ("cross", 2.41), ("star", None)])
def test_area_of_a_shape(kind, share):
    y, x = (np.mgrid[:400, :400] - 200) / 100
    area = INSIDE[kind](x, y).mean() * 16
    assert area == pytest.approx(share or 5 * 1.2 * 0.55 * np.sin(np.pi / 5), rel=0.02)
    assert np.hypot(x, y)[INSIDE[kind](x, y)].max() <= EXTENT + 0.01


def test_salient_shape_stands_out_as_far_as_asked():
    for gap, ratio in ((1.0, (1.38, 3.0)), (0.0, (0.6, 1.5))):
        for scene in scenes("s4", "train", 10, gap=gap, visible=(2, 2)):
            salient, other = sorted(scene.shapes, key=lambda shape: not shape.salient)
            assert ratio[0] <= salient.radius / other.radius <= ratio[1]
            contrast = [np.abs(shape.tones - scene.background.mean((0, 1))).mean() for shape in (salient, other)]
            assert contrast[0] > (2 * contrast[1] if gap else 0.5 * contrast[1])


@pytest.mark.parametrize("source", ["ms3", "v2"])
def test_sounds_switch_on_and_off_for_two_seconds_at_least(source):
    drawn = scenes(source, "train", 80)
    together = []
    for scene in drawn:
        flags = [shape.sounding for shape in scene.shapes if any(shape.sounding)]
        assert 1 <= len(flags) <= (2 if source == "ms3" else 3)
        together.append(tuple(map(any, zip(*flags, strict=True))))
        for schedule in [*flags, *(sounding for _, sounding in scene.elsewhere), together[-1]]:
            assert all(len(list(run)) >= 2 for _, run in itertools.groupby(schedule))
    assert 0.10 < np.mean([not all(schedule) for schedule in together]) < 0.42
    assert 0.03 < np.mean([bool(scene.elsewhere) for scene in drawn]) < 0.30


@pytest.mark.parametrize("kind", toy.CLASSES)
def test_timbre_is_told_by_ear(kind):
    for seed in range(3):
        sound = 0.1 * timbre(kind, 80000, np.random.default_rng(seed))
        assert np.sqrt(np.mean(sound**2)) == pytest.approx(0.1)
        assert hear(examples(sound), most=2) == [{kind}] * 5


def test_sound_keeps_its_levels(toy_root):
    for seed in range(6):
        scene = compose(Settings(), "ms3", "train", np.random.default_rng(seed))
        sound = play(scene, np.random.default_rng(seed)) / 32768
        assert np.abs(sound).max() <= 10 ** (-1 / 20)
        for second in range(5):
            level = np.sqrt(np.mean(sound[16000 * second + 400:16000 * second + 15600] ** 2))
            sources = [shape.sounding for shape in scene.shapes] + [flags for _, flags in scene.elsewhere]
            assert level > 0.02 if any(flags[second] for flags in sources) else level < 0.0015


def test_manifest_tells_when_a_mask_is_empty_and_where_its_shapes_are(toy_root):
    manifest = {clip["name"]: clip for clip in toy.load_manifest(toy_root, "ms3")["clips"]}
    empty = 0
    for record in read_index(toy_root / "Multi-sources", "ms3"):
        for second, path in enumerate(record.masks):
            mask = binary_mask(read_label(path))
            boxes = [shape["boxes"][second] for shape in manifest[record.name]["shapes"] if shape["sounding"][second]]
            inside = np.zeros_like(mask)
            for x0, y0, x1, y1 in boxes:
                inside[y0:y1, x0:x1] = 1
                assert mask[y0:y1, x0:x1].any(axis=0).all() and mask[y0:y1, x0:x1].any(axis=1).all()
            assert not (mask & ~inside.astype(bool)).any()
            empty += not boxes
    assert empty


def test_oracles_bracket_what_a_model_can_reach(toy_root):
    for subset in ("s4", "ms3", "avss"):
        manifest = toy.load_manifest(toy_root, subset)
        for split, found in manifest["oracles"].items():
            clips = [clip for clip in manifest["clips"] if clip["split"] == split]
            assert found["aligned"] == sum(clip["group"] == "aligned" for clip in clips)
            assert found["audio"]["J"] >= found["salience"]["J"]
            if subset == "s4":  # all or nothing, as one shape sounds throughout
                assert found["salience"]["J"] == pytest.approx(found["aligned"] / len(clips))
                assert found["audio"]["J"] == 1
    strict = toy.load_manifest(toy_root, "ms3")["oracles"]["test"]["salience"]
    assert strict["J_strict"] < strict["J"]


def test_quirks_are_there(toy_root):
    for split in ("train", "val", "test"):
        infos = [soundfile.info(toy_root / f"Multi-sources/ms3_data/audio_wav/{split}/ms3_{split}_{i:05d}.wav")
                 for i in range(3)]
        assert [(info.frames, info.channels, info.samplerate) for info in infos] == \
            [(76960, 1, 16000), (80000, 2, 16000), (220500, 1, 44100)]
    masks = sorted((toy_root / "Multi-sources/ms3_data/gt_masks").rglob("*_1.png"))
    assert {Image.open(path).mode for path in masks} == {"L", "P"}
    assert len(list(toy_root.rglob(".DS_Store"))) == 6
    assert "off-the-screen" in (toy_root / "AVSBench_semantic/metadata.csv").read_text()
    assert len(list(toy_root.glob("Single-source/s4_data/gt_masks/train/*/*/*.png"))) == 5


def test_labels_rgb_are_the_labels_in_colour(toy_root):
    for label in sorted((toy_root / "AVSBench_semantic").glob("v2/*/labels_semantic/9.png")):
        colours = np.asarray(Image.open(label.parent.with_name("labels_rgb") / label.name))
        assert np.array_equal(colours, class_palette(7)[np.asarray(Image.open(label))])


def test_generation_never_touches_what_is_there(tmp_path):
    (tmp_path / "Single-source").mkdir()
    (tmp_path / "Single-source/s4_meta_data.csv").write_text("name,split\n")
    with pytest.raises(FileExistsError, match="is no toy benchmark"):
        generate(tmp_path, "s4")
    assert [path.name for path in tmp_path.rglob("*")] == ["Single-source", "s4_meta_data.csv"]
    first = generate(tmp_path, "ms3", clips=(1, 1, 1))
    assert generate(tmp_path, "ms3", clips=(1, 1, 1)) == first
    with pytest.raises(FileExistsError, match="choose another root or delete it"):
        generate(tmp_path, "ms3", clips=(1, 1, 1), bias=0.5)


def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(task):
        if task.index == 1:
            raise KeyboardInterrupt
        return written(task)

    written = files.write_clip
    monkeypatch.setattr(files, "write_clip", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, "s4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings, said", [
    ({"size": "huge"}, "toy.size: expected one of"), ({"bias": 1.5}, "toy.bias: expected 0 to 1, got 1.5"),
    ({"visible": (3, 2)}, "toy.visible"), ({"visible": (2, 6)}, "toy.visible"), ({"gap": -1}, "toy.gap"),
    ({"clips": (0, 1, 1)}, "toy.clips"), ({"clips": (1, 1)}, "toy.clips"), ({"val_bias": 2}, "toy.val_bias")])
def test_settings_out_of_range_are_named(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        toy.generate(tmp_path, **settings)
    with pytest.raises(ValueError, match="toy.subsets"):
        toy.generate(tmp_path, subsets=("s5",))
