"""Composed clips: true to their sources, the same for the same seed, without leakage, biased as asked; and what people
have on their disks is read, or counted by the reason why not."""
import csv
import json
import os
import re
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image, ImageOps

from icf.config import ComposeConfig, Config, DataConfig
from icf.data import IGNORE, build_dataset
from icf.data.avsbench import FOLDERS, VOID, class_palette, read_index, read_label
from icf.data.check import check
from icf.data.compose import generate, write
from icf.data.compose.classes import ClassMap, read_class_map
from icf.data.compose.pictures import FPS, VOC_CLASSES, examine, find_pictures
from icf.data.compose.plan import Scene, objects_of
from icf.data.compose.sounds import Unusable, find_sounds, read, sounding_part
from icf.data.compose.split import assign, without_duplicates
from icf.data.disturb import Disturbed
from icf.engine.results import clip_groups, oracles

COLOURS = {"dog": (220, 30, 30), "cat": (30, 220, 30), "horse": (220, 220, 30), "person": (220, 30, 220)}
ESC_HEADER = "filename,fold,target,category,esc10,src_file,take\n"
SIZE = 64
TOGETHER = ({"dog": (10, 10, 70, 60), "cat": (80, 30, 120, 80)}, {"cat": (10, 10, 70, 60), "dog": (80, 30, 120, 80)},
            {"dog": (20, 20, 80, 70)}, {"cat": (20, 20, 80, 70)}, {"horse": (0, 0, 75, 60), "dog": (80, 30, 120, 80)},
            {"dog": (0, 0, 75, 60), "horse": (80, 30, 120, 80)})


# ---- Data sets as people have them, in small ----


def picture(seed, objects, width=128, height=96, void=2):
    """A picture [H,W,3] whose objects have the colours of their classes, and its mask of VOC's indices, void at the
    edges; the rest is blue and different in every picture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9), dtype=np.uint8))
    blue = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    image = np.stack([blue // 4, blue // 4, blue], axis=2).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    for name, (x0, y0, x1, y1) in objects.items():
        texture = Image.fromarray(rng.integers(-15, 16, (9, 9)).astype(np.int32)).resize((x1 - x0, y1 - y0))
        image[y0:y1, x0:x1] = COLOURS[name] + np.asarray(texture)[..., None]
        mask[y0:y1, x0:x1] = IGNORE
        mask[y0 + void:y1 - void, x0 + void:x1 - void] = 1 + VOC_CLASSES.index(name)
    return image, mask


def add_voc(root, name, image, mask, objects=None, photo=None, **options):
    """One photograph; `photo`: what is written instead of `image`."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "SegmentationObject"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    photo = Image.fromarray(image) if photo is None else photo
    photo.save(root / f"JPEGImages/{name}.jpg", quality=95, subsampling=0, **options)
    for folder, values in (("SegmentationClass", mask), ("SegmentationObject", objects)):
        if values is not None:
            label = Image.fromarray(values)
            label.putpalette(class_palette(256).tobytes())
            label.save(root / folder / f"{name}.png")
    with (root / "ImageSets/Segmentation/trainval.txt").open("a") as file:
        file.write(f"{name}\n")


def make_voc(root, photos=36):
    for i in range(photos):
        add_voc(root, f"2007_{i:06d}", *picture(i, TOGETHER[i % len(TOGETHER)]))
    return root


def burst(seed, seconds=5.0, rate=16000, pause=0.5):
    """A sound that is on in the middle of `seconds` for all but a share `pause` of them, and digital silence else."""
    rng = np.random.default_rng(seed)
    sound = rng.standard_normal(int(seconds * rate)) * np.repeat(rng.uniform(0.05, 0.3, 25), int(seconds * rate) // 25)
    sound[:int(len(sound) * pause / 2)] = sound[len(sound) - int(len(sound) * pause / 2):] = 0
    return sound.astype(np.float32).clip(-1, 1)


def make_esc(root, recordings=10, categories=("dog", "cat", "rain", "clock_tick")):
    (root / "audio").mkdir(parents=True)
    (root / "meta").mkdir()
    rows = ESC_HEADER
    for k, category in enumerate(categories):
        for i in range(recordings):
            for take in "AB"[:1 + i % 2]:
                name = f"1-{k}{i:03d}-{take}-{k}.ogg"
                soundfile.write(root / "audio" / name, burst((k, i, ord(take))), 16000)
                rows += f"{name},1,{k},{category},False,{k}{i:03d},{take}\n"
    (root / "meta/esc50.csv").write_text(rows)
    return root


def make_video(path, sound=None, rate=16000):
    """Pictures of 1 s, and sound if given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        pictures = container.add_stream("mpeg4", rate=5)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        track = container.add_stream("aac", rate=rate, layout="mono") if sound is not None else None
        for _ in range(5):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")))
        container.mux(pictures.encode(None))
        if track is not None:
            for begin in range(0, len(sound), 1024):
                frame = av.AudioFrame.from_ndarray(sound[None, begin:begin + 1024], "fltp", "mono")
                frame.sample_rate, frame.pts = rate, begin
                container.mux(track.encode(frame))
            container.mux(track.encode(None))


def make_coco(root, entries, split="val2017", folder="val2017", licences=None):
    """Entries: (file name, image, list of annotations without ids)."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    names = {1: "person", 17: "cat", 18: "dog", 62: "chair"}
    listing = {"images": [], "annotations": [], "licenses": licences or [],
               "categories": [{"id": number, "name": name} for number, name in names.items()]}
    for number, (name, image, annotations) in enumerate(entries, start=1):
        if image is not None:
            Image.fromarray(image).save(root / folder / name, quality=95)
        height, width = (96, 128) if image is None else image.shape[:2]
        listing["images"].append({"id": number, "file_name": name, "height": height, "width": width, "license": 4})
        listing["annotations"] += [{"iscrowd": 0, "image_id": number, **values} for values in annotations]
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(listing))
    return root


def box(x0, y0, x1, y1):
    return {"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]], "area": (x1 - x0) * (y1 - y0)}


def make_davis(root, name, frames, mask):
    """A video whose picture number i has the brightness 2 i; `mask`: from the number to its mask."""
    for folder in ("JPEGImages", "Annotations"):
        (root / folder / "480p" / name).mkdir(parents=True)
    for i in range(frames):
        Image.fromarray(np.full((96, 128, 3), 2 * i, np.uint8)).save(root / f"JPEGImages/480p/{name}/{i:05d}.jpg")
        Image.fromarray(mask(i)).save(root / f"Annotations/480p/{name}/{i:05d}.png")
    return root


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return make_voc(tmp_path_factory.mktemp("VOC2012"))


@pytest.fixture(scope="module")
def esc(tmp_path_factory):
    return make_esc(tmp_path_factory.mktemp("pictures") / "ESC-50")


@pytest.fixture(scope="module")
def composed(voc, esc, tmp_path_factory):
    """Layout -> root and manifest, each of the same clips."""
    found = {}
    for layout in ("ms3", "s4", "avss"):
        root = tmp_path_factory.mktemp(layout)
        found[layout] = root, run(root, voc, esc, layout)
    return found


def run(root, pictures, sounds, layout="ms3", workers=1, **settings):
    settings = {"clips": (12, 4, 8), "size": SIZE, "seed": 3, **settings}
    return generate(root, layout, ComposeConfig(pictures, sounds, **settings), workers, progress=False)


def load(root, layout, split, **settings):
    return build_dataset(DataConfig(root=root, subset=layout, size=SIZE, frames=5, **settings), split)


def provenance(root, layout):
    with (root / FOLDERS[layout][0] / "provenance.csv").open() as file:
        return list(csv.DictReader(file))


def colour_of(frames, masks):
    """Mean colour [3] of the labelled pixels of a clip, and of those of no label."""
    frames = frames.permute(0, 2, 3, 1).float()
    return frames[(masks > 0) & (masks != IGNORE)].mean(0).numpy(), frames[masks == 0].mean(0).numpy()


# ---- The data set ----


@pytest.mark.parametrize("layout", ["ms3", "s4", "avss"])
def test_clips_are_clean_and_can_be_read(composed, layout):
    root, manifest = composed[layout]
    report = check(root, layout, deep=True, progress=False)
    assert report.exit_code == 0, report.findings
    assert {f.level for f in report.findings} <= {"note"}
    for split, count in zip(("train", "val", "test"), (12, 4, 8), strict=True):
        dataset = load(root, layout, split)
        assert len(dataset) == count == len(dataset.groups)
        assert dataset.classes == (["background", "cat", "dog"] if layout == "avss" else [])
        for clip in (dataset[i] for i in range(count)):
            assert clip.frame_mask.all() and clip.label_mask.sum() == (1 if (layout, split) == ("s4", "train") else 5)
            assert set(clip.masks.unique().tolist()) <= {0, 1, 2, IGNORE} - ({2} if layout != "avss" else set())
            assert clip.log_mel.std() > 0.1 and clip.frames.float().std() > 10
    assert manifest["classes"] == ["cat", "dog"] and manifest["settings"]["size"] == SIZE


def test_labels_show_what_sounds_in_every_second_and_void_is_ignored(composed):
    root, manifest = composed["ms3"]
    seen = Counter()
    for split in ("train", "val", "test"):
        dataset = load(root, "ms3", split)
        for index, name in enumerate(dataset.names):
            entry = next(clip for clip in manifest["clips"] if clip["name"] == name)
            clip, sound = dataset[index], dataset.waveform(index)[0].reshape(5, -1)
            on = np.any([shape["sounding"] for shape in entry["shapes"]], axis=0)
            assert ((clip.masks == 1).flatten(1).any(1).numpy() == on).all()
            heard = [any(off["sounding"][t] for off in entry["off_screen"]) for t in range(5)]
            loud = sound.square().mean(1).sqrt().numpy()
            assert (loud[on] > 0.02).all()  # though half of every file is silence
            assert (loud[~on & ~np.array(heard)] < 0.02).all()
            for shape in entry["shapes"]:  # pixels of its colour are labelled while it sounds, or void, never else
                colour = np.array(COLOURS[shape["class"]])
                like = (np.abs(clip.frames.permute(0, 2, 3, 1).numpy() - colour) < 40).all(3)
                for t in range(5):
                    values = clip.masks[t].numpy()[like[t]]
                    assert set(values.tolist()) <= {int(shape["sounding"][t]), IGNORE}
                    seen[shape["sounding"][t]] += (values != IGNORE).sum()
            assert (clip.masks == IGNORE).any()
    assert min(seen[0], seen[1]) > 10_000


def test_semantic_labels_are_the_classes(composed):
    dataset = load(composed["avss"][0], "avss", "test")
    for clip in (dataset[i] for i in range(len(dataset))):
        for value in set(clip.masks.unique().tolist()) - {0, IGNORE}:
            pixels = clip.frames.permute(0, 2, 3, 1)[clip.masks == value].float().mean(0).numpy()
            assert np.abs(pixels - COLOURS[dataset.classes[value]]).max() < 40


def test_the_camera_moves_smoothly_and_keeps_what_sounds_in_sight(composed):
    root, manifest = composed["ms3"]
    for split in ("train", "val", "test"):
        for clip in load(root, "ms3", split):
            frames = clip.frames.float()
            assert frames.std(0).mean() > 1  # over time
            assert (frames[1:] - frames[:-1]).abs().mean() < 75  # two of the pictures are 90 apart
    for shape in (shape for clip in manifest["clips"] for shape in clip["shapes"] if any(shape["sounding"])):
        assert min(shape["area"]) > 0.03


def test_same_seed_same_bytes_whatever_the_processes(composed, voc, esc, tmp_path):
    root, manifest = composed["ms3"]
    assert run(tmp_path / "two", voc, esc, workers=2) == manifest
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*")
                           if path.is_file())
    assert all((root / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    other = run(tmp_path / "other", voc, esc, seed=4)
    assert not {clip["sha256"]["frames"] for clip in other["clips"]} & {
        clip["sha256"]["frames"] for clip in manifest["clips"]}


def test_an_interrupted_command_goes_on_and_leaves_nothing_half_done(composed, voc, esc, tmp_path, monkeypatch):
    done, original = [], write.write_clip

    def stop_after_five(job):
        if len(done) == 5:
            (job.folder / "ms3_data" / "gt_masks").mkdir(parents=True, exist_ok=True)
            raise KeyboardInterrupt
        done.append(job.task.name)
        original(job)

    monkeypatch.setattr(write, "write_clip", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, voc, esc)
    assert not (tmp_path / "Multi-sources").exists()
    again = []
    monkeypatch.setattr(write, "write_clip", lambda job: (again.append(job.task.name), original(job)))
    root, manifest = composed["ms3"]
    assert run(tmp_path, voc, esc) == manifest
    assert not {*again} & {*done} and len(again) + len(done) == 24
    assert [path.name for path in tmp_path.iterdir()] == ["Multi-sources"]
    assert check(tmp_path, "ms3", deep=True, progress=False).exit_code == 0


def test_clips_begun_with_other_settings_are_begun_anew(voc, esc, tmp_path, monkeypatch):
    original = write.write_clip
    monkeypatch.setattr(write, "write_clip", lambda job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, voc, esc)
    stale = tmp_path / ".Multi-sources.partial/ms3_data/stale.png"
    stale.parent.mkdir()
    stale.write_bytes(b"")
    monkeypatch.setattr(write, "write_clip", original)
    run(tmp_path, voc, esc, seed=5)
    assert not list(tmp_path.rglob("stale.png"))


def test_two_processes_may_compose_the_same(composed, voc, esc, tmp_path):
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        config = ComposeConfig(voc, esc, clips=(12, 4, 8), size=SIZE, seed=3)
        found = [pool.submit(generate, tmp_path, "ms3", config, 1, False) for _ in range(2)]
        assert [future.result() for future in found] == [composed["ms3"][1]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["Multi-sources"]
    assert check(tmp_path, "ms3", deep=True, progress=False).exit_code == 0


def test_what_is_there_is_kept(composed, tmp_path):
    root, manifest = composed["ms3"]
    assert run(root, None, None) == manifest  # the sources are not needed any more
    with pytest.raises(FileExistsError, match=r"^\S*Multi-sources holds clips of version 1 composed with"):
        run(root, None, None, seed=4)
    (tmp_path / "Multi-sources").mkdir()
    with pytest.raises(FileExistsError, match="holds something else"):
        run(tmp_path, None, None)


def test_a_configuration_composes_what_is_missing(voc, esc, tmp_path):
    config = ComposeConfig(voc, esc, clips=(2, 1, 1), size=SIZE)
    data = DataConfig(root=tmp_path / "real", subset="ms3", size=SIZE, compose=config)
    assert len(build_dataset(data, "train")) == 2
    assert len(build_dataset(replace(data, compose=replace(config, pictures=None, sounds=None)), "test")) == 1
    assert replace(config, pictures=None) == config  # runs on the same clips can be compared
    with pytest.raises(ValueError, match="^compose.pictures: expected a folder to compose .* of, which does not exist"):
        build_dataset(replace(data, root=tmp_path / "new", compose=replace(config, pictures=None)), "train")
    both = {"data": {"toy": {}, "compose": {}}}
    with pytest.raises(ValueError, match="^data.compose: expected null where data.toy is set"):
        Config.from_dict(both)


# ---- The problem of the paper, and leakage ----


def test_bias_in_training_and_chance_in_the_test_split(voc, esc, tmp_path):
    for bias in (0.0, 0.75, 1.0):
        manifest = run(tmp_path / str(bias), voc, esc, clips=(16, 8, 12), bias=bias)
        for split, expected in (("train", bias), ("val", 0.5), ("test", 0.5)):
            own = [clip for clip in manifest["clips"] if clip["split"] == split]
            several = [clip for clip in own if len(clip["shapes"]) > 1]
            aligned = [any(any(s["sounding"]) for s in clip["shapes"] if s["salient"]) for clip in several]
            assert [clip["group"] == "aligned" for clip in several] == aligned
            assert abs(sum(aligned) - expected * len(several)) < 1 and len(several) > len(own) / 3
            single = [clip["shapes"][1:] for clip in own].index([])
            for group in ("aligned", "conflicting"):  # in each, those in which two can sound come first
                able = [sum(s["class"] in ("dog", "cat") for s in clip["shapes"]) for clip in own[:single]
                        if clip["group"] == group]
                assert able == sorted(able, reverse=True) and 2 in [*able, *[2] * (expected in (0, 1))]


def test_what_stands_out_is_the_largest_single_object(tmp_path):
    image, mask = picture(0, {"dog": (0, 0, 80, 60), "cat": (90, 40, 125, 90)})
    herd = np.where(mask == 1 + VOC_CLASSES.index("dog"), 1 + np.arange(128)[None] // 8, 0).astype(np.uint8)
    for name, objects, salient in (("by_class", None, "dog"), ("by_object", herd + (mask == 8) * 40, "cat")):
        add_voc(tmp_path / name, "photo", image, mask, None if objects is None else objects.astype(np.uint8))
        photo, = find_pictures(tmp_path / name, read_class_map(), Counter())
        seen = examine(photo)
        assert Scene(photo, seen, objects_of(seen), ("dog",)).salient == salient
        assert seen.area == pytest.approx({"dog": 76 * 56 / 12288, "cat": 31 * 46 / 12288})


@pytest.mark.parametrize("layout", ["ms3", "avss"])
def test_oracles_are_what_the_files_give(composed, layout):
    root, manifest = composed[layout]
    dataset = load(root, layout, "test")
    assert set(oracles(dataset)) == {"salience", "can_sound"}
    groups = clip_groups(dataset)
    assert len(groups["aligned"]) + len(groups["conflicting"]) == len(dataset)
    found = oracles(dataset)
    assert 0.2 < found["salience"]["J"] < 0.9 and 0.2 < found["can_sound"]["J"] < 0.9
    if layout == "ms3":
        scores = []
        for index, name in enumerate(dataset.names):
            entry = next(clip for clip in manifest["clips"] if clip["name"] == name)
            salient = np.array(COLOURS[next(s["class"] for s in entry["shapes"] if s["salient"])])
            clip = dataset[index]
            for frame, mask in zip(clip.frames.permute(0, 2, 3, 1).numpy(), clip.masks.numpy(), strict=True):
                shown = ((np.abs(frame - salient) < 60).all(2)) & (mask != IGNORE)
                true = mask == 1
                scores.append((shown & true).sum() / (shown | true).sum() if true.any() else
                              1 - shown.sum() / (mask != IGNORE).sum())
        assert np.mean(scores) == pytest.approx(found["salience"]["J"], abs=0.02)


def test_pictures_and_recordings_are_in_one_split_only(composed):
    for layout, (root, manifest) in composed.items():
        rows = provenance(root, layout)
        assert {row["clip"] for row in rows} == {clip["name"] for clip in manifest["clips"]}
        for use in ("picture", "sound"):
            splits = {}
            for row in rows:
                if row["use"].endswith(use):
                    splits.setdefault(row["recording"], set()).add(row["split"])
            assert len(splits) > 4 and all(len(found) == 1 for found in splits.values())
        assert all(row["terms"] and row["file"].startswith(("pictures/", "sounds/")) for row in rows)
        assert all({row["use"] for row in rows if row["clip"] == clip["name"]} >= {"picture", "sound"}
                   for clip in manifest["clips"])


def test_the_same_recordings_are_in_a_split_whatever_the_numbers_of_clips(composed, voc, esc, tmp_path):
    run(tmp_path, voc, esc, clips=(0, 0, 24))
    trained = {row["recording"] for row in provenance(composed["ms3"][0], "ms3")
               if row["split"] == "train" and "sound" in row["use"]}
    assert not trained & {row["recording"] for row in provenance(tmp_path, "ms3") if "sound" in row["use"]}


@pytest.mark.parametrize("change", ["quality", "size", "brighter", "mirrored", "png"])
def test_a_near_duplicate_of_a_picture_is_left_out_of_other_splits(change, esc, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(24):  # smooth, as photographs are
        coarse = Image.fromarray(rng.integers(0, 200, (7, 9, 3), dtype=np.uint8))
        image = coarse.resize((128, 96), Image.Resampling.BICUBIC)
        _, mask = picture(i, TOGETHER[i % 4])
        again, size = image, (96, 72) if change == "size" else (128, 96)
        if change == "mirrored":
            again, mask_again = ImageOps.mirror(image), np.ascontiguousarray(mask[:, ::-1])
        else:
            again = image.resize(size) if change == "size" else image.point(lambda v: v + 40) if change == "brighter" \
                else image
            mask_again = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        add_voc(tmp_path / "VOC", f"a{i:02d}", None, mask, photo=image)
        add_voc(tmp_path / "VOC", f"b{i:02d}", None, mask_again, photo=again)
        if change == "quality":
            again.save(tmp_path / f"VOC/JPEGImages/b{i:02d}.jpg", quality=30)
    manifest = run(tmp_path / "out", tmp_path / "VOC", esc, clips=(24, 6, 12))
    splits = {}
    for row in provenance(tmp_path / "out", "ms3"):
        if row["use"] == "picture":
            splits.setdefault(row["recording"][1:], set()).add(row["split"])
    assert len(splits) > 15 and all(len(found) == 1 for found in splits.values())
    assert manifest["left_out"]["pictures"]["near-duplicate of one in another split"] >= 4


def test_a_near_duplicate_of_a_sound_is_left_out_of_other_splits(voc, tmp_path):
    for category in ("dog", "cat"):
        for i in range(12):
            sound = burst((i, len(category), category == "dog"), pause=0.2)
            (tmp_path / category).mkdir(exist_ok=True)
            soundfile.write(tmp_path / category / f"a{category}{i}.wav", sound, 16000)
            soundfile.write(tmp_path / category / f"b{category}{i}.ogg", 0.4 * sound, 16000)
    manifest = run(tmp_path / "out", voc, tmp_path, clips=(40, 10, 20))
    splits = {}
    for row in provenance(tmp_path / "out", "ms3"):
        if "sound" in row["use"]:
            splits.setdefault(row["recording"][1:], set()).add(row["split"])
    assert len(splits) > 10 and all(len(found) == 1 for found in splits.values())
    assert manifest["left_out"]["sounds"]["near-duplicate of one in another split"] >= 4


def test_keys_are_shared_out_by_group():
    groups = [(f"g{i % 3}", f"key{i}") for i in range(60)] + [("few", "x"), ("g0", "key1")]
    splits = assign(groups, seed=1)
    assert len(splits) == 61 and splits == assign(reversed(groups[:-1]), seed=1) != assign(groups, seed=2)
    for group in ("g0", "g1", "g2"):
        counts = Counter(splits[key] for own, key in groups[:-1] if own == group)
        assert counts == {"train": 14, "val": 2, "test": 4}
    assert set(assign([("a", "1"), ("a", "2"), ("a", "3")], 0).values()) == {"train", "val", "test"}
    assert set(assign(groups, 1, wanted=(False, False, True)).values()) == {"test"}


def test_duplicates_stay_in_the_test_split():
    a, b, c = np.random.default_rng(0).choice(np.array([-1, 0, 1], np.int8), (3, 256), p=(0.4, 0.2, 0.4))
    near, flat = np.where(np.arange(256) < 40, -a, a), np.where(np.arange(256) < 60, a, 0)
    assert without_duplicates({"test": [a], "train": [flat]})["train"] == [True]  # too little is known of it
    kept = without_duplicates({"train": [a, b], "val": [near], "test": [a, c]})
    assert kept == {"train": [False, True], "val": [False], "test": [True, True]}


def test_off_screen_sounds_are_of_nothing_in_sight(composed):
    root, manifest = composed["ms3"]
    classes = read_class_map()
    found = [(clip, off["class"]) for clip in manifest["clips"] for off in clip["off_screen"]]
    assert found
    for clip, category in found:
        assert not classes.barred(category) & {*clip["in_sight"]}
    dataset = load(root, "ms3", "test")
    partners = Disturbed(dataset, "offscreen").partners
    both = {"cat", "dog"}
    for index, partner in enumerate(partners):
        if not both <= dataset.visible_classes()[index]:
            assert not dataset.visible_classes()[index] & dataset.sounding_classes()[partner]
    assert all(dataset[i].categories for i in range(len(dataset)))


# ---- Pictures as people have them ----


def label_of(photo):
    image, values, _ = photo.read()
    return np.asarray(image), values


@pytest.mark.parametrize("kind", ["plain", "grey", "CMYK", "turned", "turned, mask too", "upside down", "PNG inside"])
def test_photographs_of_every_kind(kind, tmp_path):
    image, mask = picture(1, {"dog": (10, 10, 60, 50), "cat": (70, 40, 120, 90)})
    photo, options = Image.fromarray(image), {}
    if kind == "grey":
        photo = photo.convert("L")
    if kind == "CMYK":
        photo = photo.convert("CMYK")
    if kind.startswith("turned") or kind == "upside down":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6 if kind.startswith("turned") else 3
        turn = Image.Transpose.ROTATE_90 if kind.startswith("turned") else Image.Transpose.ROTATE_180
        photo = photo.transpose(turn)
        if kind == "turned, mask too":
            mask = np.asarray(Image.fromarray(mask).transpose(turn))
    add_voc(tmp_path, "photo", None, mask, photo=photo, **options)
    if kind == "PNG inside":
        Image.fromarray(image).save(tmp_path / "JPEGImages/photo.jpg", format="PNG")
    shown, values = label_of(*find_pictures(tmp_path, read_class_map(), Counter()))
    assert shown.shape == (96, 128, 3) and values.shape == (96, 128)
    for name in ("dog", "cat"):
        own = shown[values == 1 + VOC_CLASSES.index(name)].astype(float)
        expected = np.full(3, np.dot(COLOURS[name], (0.299, 0.587, 0.114))) if kind == "grey" else COLOURS[name]
        assert len(own) > 1000 and np.abs(own.mean(0) - expected).max() < 12


def test_photographs_that_cannot_be_used_are_counted(esc, tmp_path):
    root = make_voc(tmp_path / "VOC", 24)
    image, mask = picture(99, TOGETHER[0])
    add_voc(root, "other_size", image, mask[:-8])
    add_voc(root, "unknown", image, np.where(mask == 8, 33, mask).astype(np.uint8))
    add_voc(root, "empty", image, np.zeros_like(mask))
    add_voc(root, "void_only", image, np.where(mask > 0, IGNORE, 0).astype(np.uint8))
    add_voc(root, "silent", *picture(98, {"horse": (20, 20, 80, 70)}))
    add_voc(root, "broken", image, mask)
    (root / "JPEGImages/broken.jpg").write_bytes((root / "JPEGImages/broken.jpg").read_bytes()[:900])
    add_voc(root, "coloured", image, mask)
    Image.fromarray(class_palette(256)[mask]).save(root / "SegmentationClass/coloured.png")
    add_voc(root, "tiny", image[:24, :120], np.full((24, 120), 12, np.uint8))
    add_voc(root, "objects", image, mask, mask[:, :-2])
    add_voc(root, "gone", image, mask)
    (root / "JPEGImages/gone.jpg").unlink()
    manifest = run(tmp_path / "out", root, esc)
    assert manifest["left_out"]["pictures"] == {
        "with a mask of another size": 2, "without a class in sight": 2, "with a mask of unknown indices": 1,
        "without a class that can sound": 1, "that cannot be read": 1, "smaller than 32 pixels": 1, "missing": 1,
        "with a mask of colours instead of indices": 1}


def test_coco_with_crowds_run_lengths_and_empty_polygons(esc, tmp_path):
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    image, _ = picture(0, {"dog": (10, 10, 60, 50), "cat": (70, 40, 120, 90)})
    crowd = np.zeros((96, 128), np.uint8)
    crowd[:20, 70:120] = 1
    packed = coco.encode(np.asfortranarray(crowd))
    packed["counts"] = packed["counts"].decode()
    runs = [128 * 96 - 96 * 10, 96 * 10]  # by columns: the last ten
    entries = [("a.jpg", image, [
        {"category_id": 18, **box(10, 10, 60, 50)}, {"category_id": 17, **box(70, 40, 120, 90)},
        {"category_id": 62, **box(30, 20, 40, 30)},  # the smaller one lies in front
        {"category_id": 1, "iscrowd": 1, "area": 1000, "segmentation": packed},
        {"category_id": 1, "iscrowd": 1, "area": 960, "segmentation": {"size": [96, 128], "counts": runs}},
        {"category_id": 17, "segmentation": [], "area": 0}, {"category_id": 17, "segmentation": [[5, 5, 5, 5]]},
        {"category_id": 17, "segmentation": [[1, 1, 9, 9, 1, 1, 9, 9]], "area": 0}]),
        ("none.jpg", image, []), ("missing.jpg", None, [{"category_id": 18, **box(10, 10, 60, 50)}])]
    left_out = Counter()
    make_coco(tmp_path, entries, licences=[{"id": 4, "name": "CC BY 2.0", "url": "http://x"}])
    photo, = find_pictures(tmp_path, read_class_map(), left_out)
    assert left_out == {"object without area": 3, "without objects": 1, "missing": 1}
    assert photo.terms.startswith("CC BY 2.0 http://x; ")
    _, values = label_of(photo)
    names = {value: photo.classes[value - 1] for value in np.unique(values) if 0 < value < IGNORE}
    assert sorted(names.values()) == ["cat", "chair", "dog"]
    by_name = {name: values == value for value, name in names.items()}
    assert by_name["chair"][20:30, 30:40].all() and by_name["dog"].sum() == 40 * 50 - 100
    assert ((values == IGNORE) == (crowd > 0) | (np.arange(128) >= 118)).mean() > 0.99
    assert photo.known == pytest.approx({"dog": 2000 / 12288, "cat": 2500 / 12288, "chair": 100 / 12288})


def test_clips_are_composed_of_coco(esc, tmp_path):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    numbers = {"dog": 18, "cat": 17}
    entries = [(f"{i:012d}.jpg", picture(i, objects)[0],
                [{"category_id": numbers[name], **box(*corners)} for name, corners in objects.items()])
               for i in range(20) for objects in [TOGETHER[i % 4]]]
    for folder in ("images/val2017", "val2017", "images", "."):  # where people have unpacked it
        root = make_coco(tmp_path / folder.replace("/", "_").replace(".", "root"), entries, folder=folder)
        manifest = run(tmp_path / "out" / folder.replace("/", "_"), root, esc, clips=(6, 2, 4))
        assert len(manifest["clips"]) == 12 and manifest["classes"] == ["cat", "dog"]
    clip = load(tmp_path / "out/val2017", "ms3", "train")[0]
    assert set(clip.masks.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("frames, expected", [(104, 4), (60, 2), (25, 1)])
def test_davis_shows_real_frames_a_second_apart(frames, expected, esc, tmp_path):
    mask = np.zeros((96, 128), np.uint8)
    mask[20:70, 20:90] = 255
    root = make_davis(tmp_path / "DAVIS", "dog", frames, lambda i: np.roll(mask, i // 8, axis=1))
    make_davis(root, "nobody-knows", 30, lambda i: mask)
    make_davis(root, "drift-turn", 24, lambda i: mask)
    make_davis(root, "bmx-trees", 30, lambda i: mask)  # bicycle and person in one
    manifest = run(tmp_path / "out", root, esc, clips=(0, 0, 3))
    assert manifest["left_out"]["pictures"] == {
        "video whose class is not known": 1, "video of less than 25 pictures with masks": 1,
        "with a mask that joins objects of several classes": 1}
    for clip in load(tmp_path / "out", "ms3", "test"):
        numbers = clip.frames.float().mean((1, 2, 3)).numpy() / 2
        assert np.abs(np.abs(np.diff(numbers)) - FPS).max() < 4  # multiples of 7, halved
        assert len({round(number / FPS) for number in numbers - numbers[0]}) == expected + 1
    assert check(tmp_path / "out", "ms3", deep=True, progress=False).exit_code == 0


def test_davis_2017_tells_objects_apart(tmp_path):
    mask = np.zeros((96, 128), np.uint8)
    mask[10:40, 10:60], mask[50:80, 50:110], mask[0, :] = 1, 2, IGNORE
    video, = find_pictures(make_davis(tmp_path, "horsejump-high", 30, lambda i: mask), read_class_map(), Counter())
    values, _ = video.label(0)
    names = ("", *video.classes)
    assert [names[values[20, 20]], names[values[60, 60]]] == ["horse", "person"] and (values[0] == IGNORE).all()


# ---- Sounds as people have them ----


def test_vggsound_with_all_that_is_wrong_with_it(tmp_path):
    root = tmp_path / "VGGSound"
    beep = burst(1, 10, pause=0)
    make_video(root / "video/-0abc_def_000030.mp4", beep)
    make_video(root / "video/mute_000010.mp4", np.zeros(160000, np.float32))
    make_video(root / "video/nosound_000010.mp4")
    make_video(root / "video/broken_000010.mp4", beep)
    (root / "video/broken_000010.mp4").write_bytes(b"\0" * 5000)
    (root / "audio").mkdir()
    soundfile.write(root / "audio/--whole--.flac", np.concatenate([np.zeros(5 * 8000), beep[:96000]]), 8000)
    soundfile.write(root / "audio/short_000001.wav", beep[:1000], 16000)
    rows = ["youtube_id,start,label,split", "-0abc_def,30,dog barking,train", "mute,10,dog barking,test",
            "nosound,10,dog barking,train", "broken,10,dog barking,train", "--whole--,5,cat meowing,train",
            'lost,0,"bird chirping, tweeting",train', "short,1,cat meowing,train", "half,x,cat meowing,train", "odd"]
    (root / "vggsound.csv").write_text("\n".join(rows))
    left_out = Counter()
    found = {sound.recording: sound for sound in find_sounds(tmp_path, left_out)}  # a folder that holds the data set
    assert left_out == {"missing": 1, "incomplete row": 2}
    assert found["--whole--"].start == 5 and found["-0abc_def"].start == 0
    assert len(read(found["--whole--"])) == pytest.approx(160000, abs=400)  # 10 s, and the csv has no end
    assert len(sounding_part(read(found["-0abc_def"]))) > 150000
    for name, reason in {"mute": "mute", "nosound": "without a sound track", "broken": "cannot be read",
                         "short": "shorter than 0.25 s"}.items():
        with pytest.raises(Unusable, match=f"^{reason}$"):
            sounding_part(read(found[name]))


def test_names_that_begin_with_a_dash_in_the_present_folder(tmp_path, monkeypatch, voc):
    for i in range(8):
        for category, name in (("dog", "dog barking"), ("cat", "cat meowing")):
            make_video(tmp_path / f"-{category}{i}_000010.mp4", burst((i, len(name)), 10, pause=0))
    (tmp_path / "vggsound.csv").write_text("\n".join(f"-{c}{i},10,{c} {v},train" for i in range(8)
                                                     for c, v in (("dog", "barking"), ("cat", "meowing"))))
    monkeypatch.chdir(tmp_path)
    manifest = run(Path("out"), voc, Path("."), clips=(4, 1, 2))
    assert {row["recording"][0] for row in provenance(Path("out"), "ms3") if row["use"] == "sound"} == {"-"}
    assert len(manifest["clips"]) == 7


def test_a_folder_per_class_of_all_formats(tmp_path):
    sound = burst(2, pause=0)
    for name, category in (("a.wav", "Dog"), ("b.flac", "Dog"), ("c.ogg", "car_horn"), ("d.mp3", "airplane")):
        (tmp_path / category).mkdir(exist_ok=True)
        soundfile.write(tmp_path / category / name, np.stack([sound, sound], 1), 16000)
    make_video(tmp_path / "Dog/e.mp4", sound)
    (tmp_path / "Dog/LICENSE.txt").write_text("CC0")
    (tmp_path / "Dog/.hidden.wav").write_bytes(b"")
    found = find_sounds(tmp_path, Counter())
    classes = read_class_map()
    assert Counter(classes.class_of(s.category) for s in found) == {"dog": 3, "car": 1, "aeroplane": 1}
    assert all(len(sounding_part(read(s))) > 70000 for s in found)
    assert {s.terms for s in found if s.category == "dog"} == {"not stated; see LICENSE.txt in Dog"}


# ---- Classes ----


@pytest.mark.parametrize("category, name", [
    ("crying_baby", "person"), ("chirping_birds", "bird"), ("car_horn", "car"), ("dog bow-wow", "dog"), ("cow", "cow"),
    ("cattle, bovinae cowbell", "cow"), ("airplane", "aeroplane"), ("driving motorcycle", "motorbike"),
    ("rain", "rain"), ("rooster", "rooster"), ("siren", "siren"), ("lions roaring", "lions roaring"),
    ("typing on computer keyboard", "keyboard"), ("elephant trumpeting", "elephant")])
def test_built_in_map(category, name):
    assert read_class_map().class_of(category) == name


def test_unclear_sounds_are_not_heard_beside_what_may_make_them():
    classes = read_class_map()
    assert "bird" in classes.barred("hen") and {"car", "bus"} <= classes.barred("ambulance siren")
    assert "person" in classes.barred("playing violin, fiddle") and classes.barred("rain") == {"rain"}


def test_own_classes_extend_or_replace_the_map(voc, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"sounds": {"airplane": ["whoosh"], "horse": ["Neigh_1"]}, "videos": {"x": ["dog"]}}))
    classes = read_class_map(own)
    assert isinstance(classes, ClassMap) and classes.class_of("neigh 1") == "horse"
    assert classes.class_of("whoosh") == classes.class_of("airplane flyby") == "aeroplane"
    assert classes.videos["x"] == ("dog",) and classes.videos["cows"] == ("cow",)
    own.write_text(yaml.safe_dump({"replace": True, "sounds": {"cat": ["rain"]}}))
    classes = read_class_map(own)
    assert classes.class_of("rain") == "cat" and classes.class_of("cat meowing") == "cat meowing"
    make_esc(tmp_path / "esc", categories=("rain", "clock_tick"))
    manifest = run(tmp_path / "out", voc, tmp_path / "esc", classes=own)
    assert manifest["classes"] == ["cat"]


# ---- Errors ----


@pytest.mark.parametrize("settings, error", [
    ({"clips": (0, 0, 0)}, "compose.clips: expected numbers of train, val and test clips, got (0, 0, 0)"),
    ({"clips": (1, -1, 0)}, "compose.clips: expected numbers of train, val and test clips, got (1, -1, 0)"),
    ({"size": 8}, "compose.size: expected 32 to 2048 pixels, got 8"),
    ({"bias": 1.5}, "compose.bias: expected 0 to 1, got 1.5"),
    ({"seed": -1}, "compose.seed: expected 0 or more, got -1"),
    ({"layout": "avs"}, "compose.layout: expected one of ('s4', 'ms3', 'avss'), got avs"),
    ({"classes": Path("no.yaml")}, "compose.classes: expected a YAML file, got no.yaml")])
def test_settings_out_of_range(settings, error, tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        run(tmp_path / "out", tmp_path, tmp_path, **settings)
    assert not (tmp_path / "out").exists()


def damage(folder, what):
    """The pictures, the sounds and the classes of a composition that cannot be."""
    voc, esc, own = folder / "VOC", folder / "ESC", None
    if what == "pictures of no layout":
        voc.mkdir()
    elif what != "no pictures":
        make_voc(voc, 6)
    if what == "sounds of no layout":
        esc.mkdir()
    elif what != "no sounds":
        make_esc(esc, 4)
    if what == "masks of another size":
        for path in (voc / "SegmentationClass").iterdir():
            Image.fromarray(read_label(path)[:50]).save(path)
    if what == "sounds too short":
        for path in (esc / "audio").iterdir():
            soundfile.write(path, np.ones(100), 16000)
    if what == "sounds missing":
        shutil.rmtree(esc / "audio")
    if what == "other columns":
        (esc / "meta/esc50.csv").write_text("a,b\n1,2\n")
    texts = {"no match": {"replace": True, "sounds": {"zebra": ["dog", "cat"]}}, "class map empty": {"replace": True},
             "unknown key": {"sound": {}}, "no lists": {"sounds": {"dog": "bark"}}, "odd replace": {"replace": 3}}
    if what in texts:
        own = folder / "own.yaml"
        own.write_text(yaml.safe_dump(texts[what]))
    return voc, esc, own


@pytest.mark.parametrize("what, error", [
    ("no pictures", "pictures: no folder "), ("no sounds", "sounds: no folder "),
    ("pictures of no layout", r"pictures: \S+ is no Pascal VOC \(JPEGImages, SegmentationClass\), no COCO "),
    ("sounds of no layout", r"sounds: \S+ is no ESC-50 \(meta/esc50.csv\), no VGGSound "),
    ("masks of another size", r"pictures: none of 6 in \S+ can be used: 6 with a mask of another size$"),
    ("sounds too short", r"sounds: none of 24 in \S+ can be used: 24 shorter than 0.25 s$"),
    ("sounds missing", r"sounds: none of those that \S+ names can be used: 24 missing$"),
    ("other columns", r"sounds: \S+esc50.csv: expected columns filename, category and src_file, "),
    ("no match", "classes: no class of the pictures makes one of the sounds; the classes are aeroplane, "),
    ("class map empty", r"classes: \S+ leaves no class with sounds; expected sounds: "),
    ("unknown key", r"classes: \S+: expected replace: true or false, and names, sounds, unclear, videos, got \['sound"),
    ("no lists", r"classes: \S+: expected sounds to be lists of names by name$"),
    ("odd replace", r"classes: \S+: expected replace: true or false, .* got replace: 3$")])
def test_problems_of_the_whole_are_one_line(what, error, tmp_path):
    voc, esc, own = damage(tmp_path, what)
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{error}") as raised:
        run(tmp_path / "out", voc, esc, classes=own)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_splits_without_anything_are_named(esc, tmp_path):
    add_voc(tmp_path / "VOC", "one", *picture(0, TOGETHER[0]))
    with pytest.raises(ValueError, match="^clips: no picture of the val split shows a class that its sounds are of"):
        run(tmp_path / "out", tmp_path / "VOC", esc)
    assert len(run(tmp_path / "out", tmp_path / "VOC", esc, clips=(3, 0, 0))["clips"]) == 3


@pytest.mark.parametrize("text", ["[]", "{}", '{"images": [], "annotations": [{}], "categories": []}', "nothing"])
def test_a_listing_that_is_not_cocos(text, tmp_path):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val2017.json").write_text(text)
    with pytest.raises(ValueError, match="instances_val2017.json: (is not JSON|expected images, categories and annot)"):
        find_pictures(tmp_path, read_class_map(), Counter())


# ---- Real material ----


MATERIAL = Path(os.getenv("ICF_MATERIAL", "../shared/material"))


def part_of(material, folder):
    """An eighth of the photographs, and a fourth of the sounds."""
    for name in ("VOC2012", "ESC"):
        (folder / name).mkdir()
    for path in (*(material / "VOC2012").glob("[JS]*"), material / "ESC/audio"):
        (folder / path.parent.name / path.name).symlink_to(path.resolve())
    for name, step in (("VOC2012/ImageSets/Segmentation/trainval.txt", 8), ("ESC/meta/esc50.csv", 4)):
        (folder / name).parent.mkdir(parents=True)
        lines = (material / name).read_text().splitlines()
        (folder / name).write_text("\n".join([lines[0], *lines[1::step]]))
    return folder / "VOC2012", folder / "ESC"


@pytest.mark.skipif(not MATERIAL.is_dir(), reason=f"ICF_MATERIAL: no folder {MATERIAL}")
def test_real_photographs_sounds_and_videos(tmp_path):
    voc, esc = part_of(MATERIAL, tmp_path)
    manifest = run(tmp_path / "photos", voc, esc, "avss", clips=(24, 6, 12), size=96)
    assert {"cat", "dog", "person"} <= {*manifest["classes"]} <= {"bird", "car", "cat", "cow", "dog", "person", "sheep"}
    assert sum(len(clip["shapes"]) > 1 for clip in manifest["clips"]) > 30
    videos = run(tmp_path / "videos", MATERIAL / "DAVIS", esc, clips=(0, 0, 8), size=96)
    assert {shape["class"] for clip in videos["clips"] for shape in clip["shapes"]} == {"car", "cow", "dog"}
    for root, layout in ((tmp_path / "photos", "avss"), (tmp_path / "videos", "ms3")):
        assert check(root, layout, deep=True, progress=False).exit_code == 0
    clip = load(tmp_path / "videos", "ms3", "test")[0]
    assert (clip.masks == 1).flatten(1).any(1).sum() >= 3


def test_void_is_grey_in_binary_files_and_ignored_by_the_reader(composed):
    root, _ = composed["ms3"]
    values = [read_label(path) for record in read_index(root / "Multi-sources", "ms3") for path in record.masks]
    assert {int(v) for mask in values for v in np.unique(mask)} == {0, VOID, 255}
