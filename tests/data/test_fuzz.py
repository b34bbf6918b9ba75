"""Whatever a file holds, its reader gives what it promises or says in one error of its own which file is wrong."""
import csv
import io
import json
import os
import pickle
import re
import struct
import sys
import time
import zlib
from argparse import ArgumentError
from collections import Counter
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
import yaml
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from icf.config import Config, DataConfig, build_config, config_parser
from icf.data import toy
from icf.data.audio import load_log_mel, log_mel_examples, read_waveform
from icf.data.avsbench import AVSBench, open_picture, read_captions, read_classes, read_index
from icf.data.check import CHECKS, LEVELS, check
from icf.data.compose import pictures, sounds
from icf.data.compose.classes import read_class_map
from icf.data.folder import open_frames, read_clips
from icf.data.transforms import resize_frame
from icf.data.video import open_video, read_sound, write_video
from icf.engine.checkpoint import load_state, load_weights, read_config, read_notes, save_state, save_weights
from icf.engine.curves import curves
from icf.engine.masks import read_mask
from icf.engine.results import read_history, read_results
from icf.engine.train import Progress
from icf.objective.towers import text_tower
from icf.weights import read_weights

CLIPS = ("first", "second")


# ---- What is done to a file ----

# How an error begins that is of a field of a configuration.
KEY = re.compile(r"^(argument --config: )?(Parser key|Option|Group|configuration:|out:|backend:|\w+(\.\w+)+:) ")
NUMBERS = (0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
WORDS = (b"", b"0", b"-1", b"1e999", b"nan", b"9" * 30, b"9" * 5000, b"../x", b"/etc/passwd", b"..", b"a\0b", b"\xff",
         "\u00b2\u0663".encode(), b"x" * 300, b"x" * 140_000, b"null", b"true", b"[]", b"{}", b"[" * 3000, b'"', b",",
         b"\n", b"!!python/object/apply:os.mkdir [marker]", b"&a [*a]", b"best", b"train")


def place(draw, data):
    """Often near the beginning, where headers are, or the end, where some formats have their index."""
    near = st.integers(0, min(len(data), 200))
    return draw(st.one_of(near, st.integers(0, len(data)), near.map(lambda back: len(data) - back)))


def cut(draw, data):
    return data[:place(draw, data)]


def bit(draw, data):
    at = place(draw, data)
    return data[:at] + bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in data[at:at + 1]) + data[at + 1:]


def number(draw, data):
    """A field of a header set to a number that is large, negative or zero."""
    field = struct.pack(draw(st.sampled_from("<>")) + "Q", draw(st.sampled_from(NUMBERS)))
    size, at = draw(st.sampled_from((1, 2, 4, 8))), place(draw, data)
    return data[:at] + field[:size] + data[at + size:]


def inserted(draw, data):
    at = place(draw, data)
    return data[:at] + draw(st.binary(max_size=20)) + data[at:]


def removed(draw, data):
    at = place(draw, data)
    return data[:at] + data[at + draw(st.integers(1, 400)):]


def repeated(draw, data):
    first, last = sorted((place(draw, data), place(draw, data)))
    return data[:last] + data[first:last][:5000] * draw(st.sampled_from((1, 2, 20))) + data[last:]


def reworded(draw, data):
    """A name or number in a text, or in the text of a header, exchanged."""
    words = list(re.finditer(rb"[\w./+-]+", data[:5000]))
    if not words:
        return data
    word = draw(st.sampled_from(words))
    return data[:word.start()] + draw(st.sampled_from(WORDS)) + data[word.end():]


CHANGES = (cut, bit, number, inserted, removed, repeated, reworded, reworded)


@st.composite
def spoilt(draw, whole, strangers):
    """A file, damaged in up to three places, or one of `strangers`."""
    data = draw(st.sampled_from(strangers)) if draw(st.integers(0, 9)) == 9 else whole
    for _ in range(draw(st.integers(0, 3))):
        data = draw(st.sampled_from(CHANGES))(draw, data)
    return data


# ---- What readers promise ----


def is_sound(wave):
    assert wave.dtype == torch.float32 and wave.ndim == 1 and 0 < len(wave) < 10**8
    assert log_mel_examples(wave, frames=5).isfinite().all()


def read_log_mel(path):
    examples = load_log_mel(path)
    assert examples.dtype == torch.float32 and examples.shape == (len(examples), 1, 96, 64) and len(examples)
    assert examples.isfinite().all()


def read_film(path):
    video = open_video(path, silent_ok=True)
    for time_, picture in islice(video.sampled(), 20):
        assert picture.shape == (video.height, video.width, 3) and picture.dtype == np.uint8 and 0 <= time_
    last = -1
    for time_, picture in islice(video.frames(), 50):
        assert picture.shape == (video.height, video.width, 3) and last < time_
        last = time_
    if video.sound:
        read_track(path)


def read_track(path):
    for piece in islice(read_sound(path), 200):
        assert piece.dtype == np.float32 and piece.ndim == 1 and len(piece) < 10**7 and np.isfinite(piece).all()


def read_frame(path):
    for crop in (True, False):
        with open_picture(path) as image:
            frame = resize_frame(image, 64, crop)
        assert frame.shape == (3, 64, 64) and frame.dtype == torch.uint8
    _, picture = next(open_frames(path.parent, silent_ok=True).frames())
    assert picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8


def read_binary(path):
    mask = read_mask(path, 0, 64)
    assert mask.shape == (64, 64) and mask.dtype == torch.uint8 and mask.max() <= 1


def read_semantic(path):
    mask = read_mask(path, 7, 64)
    assert mask.shape == (64, 64) and mask.dtype == torch.uint8 and ((mask < 7) | (mask == 255)).all()


def are_records(records, root):
    for record in records:
        paths = (*record.frames, *(path for path in record.masks if path), record.sound)
        assert paths and record.name and all(path.is_relative_to(root) and ".." not in path.parts for path in paths)
        assert 0 < len(record.frames) == len(record.masks) < 1000


def read_metadata_of(subset):
    return lambda path: are_records(read_index(path.parent, subset), path.parent)


def read_names(path):
    classes = read_classes(path.parent)
    assert classes[0] == "background" and len(classes) <= 255 and all(isinstance(name, str) for name in classes)


def read_texts(path):
    captions = read_captions(path, CLIPS)
    assert len(captions) == len(CLIPS) and len({len(texts) for texts in captions}) == 1
    assert all(isinstance(text, str) for texts in captions for text in texts)


def read_manifest(path):
    """By those who generate, read and score."""
    toy.load_manifest(path.parent.parent, "s4")
    data = AVSBench(DataConfig(root=path.parent, subset="s4", size=64), "val")
    assert set(data.groups.values()) <= {"aligned", "conflicting"}


def read_composed(path):
    data = AVSBench(DataConfig(root=path.parent, subset="ms3", size=64), "test")
    assert set(data[0].masks.unique().tolist()) <= {0, 1, 255} and len(data.visible_classes()) == 1


def write_composed(path):
    clip = path.parent / "ms3_data/visual_frames/a"
    write_rows(["name", "split"], ["a", "test"])(path.parent / "ms3_meta_data.csv")
    for folder, stem in ((clip, "a.mp4"), (path.parent / "ms3_data/gt_masks/test/a", "a")):
        folder.mkdir(parents=True)
        for i in range(1, 6):
            Image.fromarray(np.full((64, 64), 127, np.uint8)).save(folder / f"{stem}_{i}.png")
    (path.parent / "ms3_data/audio_wav/test").mkdir(parents=True)
    write_sound(path.parent / "ms3_data/audio_wav/test/a.wav")
    path.write_text(json.dumps({"version": 1, "oracles": {}, "void": 127, "settings": {"size": 64}, "clips": [
        {"name": "a", "split": "test", "group": "aligned", "categories": ["dog"], "in_sight": ["dog", "cat"]}]}))


def write_class_map(path):
    path.write_text("replace: true\nsounds: {dog: [bark, 'bow *']}\nvideos: {a: [dog]}\nnames: {dog: [hound]}\n")


def write_coco(path):
    width, height = 48, 40
    Image.new("RGB", (width, height), "red").save(path.parent.parent / "a.png")
    square = {"segmentation": [[2, 2, 30, 2, 30, 30, 2, 30]], "area": 784}
    crowd = {"segmentation": {"size": [height, width], "counts": [9, width * height - 9]}, "area": 9, "iscrowd": 1}
    path.write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.png", "height": height, "width": width}],
        "annotations": [{"image_id": 1, "category_id": 7, **values} for values in (square, crowd)],
        "categories": [{"id": 7, "name": "dog"}]}))


def read_coco(path):
    for photo in pictures._coco(path.parent.parent, path, read_class_map(), Counter()):
        seen = pictures.examine(photo)
        assert isinstance(seen, str) or 0 < max(seen.area.values()) <= 1


def write_esc(path):
    (path.parent.parent / "audio").mkdir()
    write_sound(path.parent.parent / "audio/a.wav")
    write_rows(["filename", "category", "src_file"], ["a.wav", "dog", "7"], ["a.wav", "cat", "8"])(path)


def write_vgg(path):
    write_sound(path.parent / "-a_000030.wav")
    write_rows(["-a", "30", "dog barking", "train"], ["-a", "31", "cat meowing", "test"])(path)


def read_sounds(read):
    def of(path):
        for sound in read(path):
            assert isinstance(sounds.examine(sound), str) or sound.category
    return of


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("count", torch.tensor(4))


def load_small(path):
    model = Small()
    assert isinstance(read_notes(path), dict) and isinstance(read_config(path), Config)
    load_weights(model, path)
    assert all(p.isfinite().all() for p in model.parameters()) and model.linear.weight.shape == (2, 3)


def read_run(path):
    assert isinstance(read_config(path.parent), Config)


def parse_preset(path):
    parser = config_parser(exit_on_error=False)
    assert isinstance(build_config(parser, parser.parse_args(["--config", str(path)])), Config)


def read_scores(path):
    results = read_results(path)
    assert all(isinstance(name, str) for name in (results.subset, results.split, *results.clips))
    scores = *results.scores.values(), *results.false_positives.values()
    assert all(score is None or isinstance(score, float) for score in scores)


def read_curves(path):
    assert curves(read_history(path)).startswith(b"\x89PNG")


def read_state(path):
    state = read_weights("model.audio.weights", str(path))
    assert all(isinstance(name, str) and value.isfinite().all() for name, value in state.items())


@lru_cache(maxsize=1)
def accelerated():
    """What saves and resumes a run of the small model."""
    accelerator, model = Accelerator(cpu=True), Small()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer = accelerator.prepare(model, optimizer)
    model.linear(torch.ones(1, 3)).sum().backward()
    optimizer.step(), schedule.step()
    return accelerator, schedule


def resume(path):
    accelerator, schedule = accelerated()
    progress = Progress()
    load_state(accelerator, path.parent, schedule=schedule, progress=progress)
    assert type(progress.step) is int and type(progress.steps) is list


def read_tower(kind):
    def read(path):
        tower = text_tower(kind, str(path if kind == "laion_clap" else path.parent))
        features, largest = tower.encode(["a thing"]), max(p.abs().max() for p in tower.parameters())
        assert features.shape == (1, 8) and (features.isfinite().all() or largest > 1e9)
    return read


# ---- Small valid files ----


def write_sound(path):
    soundfile.write(path, np.sin(np.arange(9000) / 9) * [[0.4], [0.2]][0], 22050)


def write_float(path):
    soundfile.write(path, np.sin(np.arange(4000) / 9).astype(np.float32), 16000, subtype="FLOAT")


def write_log_mel(path):
    path.write_bytes(pickle.dumps(torch.linspace(-4, 4, 6144).view(1, 1, 96, 64).repeat(2, 1, 1, 1)))


def write_film(path):
    write_sound(path.with_suffix(".wav"))
    frames = [(Fraction(i, 4), np.full((16, 24, 3), 20 * i, np.uint8)) for i in range(6)]
    write_video(path.with_suffix(".mp4"), frames, Fraction(4), Fraction(1, 1000), path.with_suffix(".wav"))
    path.with_suffix(".wav").unlink()


def write_picture(path):
    Image.fromarray(np.arange(24 * 16 * 3).reshape(16, 24, 3).astype(np.uint8)).save(path)


def write_mask(path):
    Image.fromarray((np.arange(24 * 16) % 2).reshape(16, 24).astype(np.uint8)).save(path)


def write_deep_mask(path):
    Image.fromarray((np.arange(24 * 16) % 6).reshape(16, 24).astype(np.uint16)).save(path)


def write_rows(*rows):
    def write(path):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return write


def write_clips(path):
    write_rows(["name", "split", "fps", "category"], *([name, "train", "2", "dog"] for name in CLIPS))(path)
    for name in CLIPS:
        (path.parent / name / "frames").mkdir(parents=True)
        write_picture(path.parent / name / "frames" / "0.png")


def write_text(text):
    return lambda path: path.write_text(text)


def write_json(values):
    return write_text(json.dumps(values))


def write_manifest(path):
    path.parent.rmdir()
    toy.generate(path.parent.parent, "tiny", subsets=("s4",), clips=(1, 1, 1), workers=1, progress=False)


def write_weights(path):
    save_weights(path, Small().state_dict(), Config(), step=3)


def write_config(path):
    path.write_text(yaml.safe_dump(Config().to_dict(), sort_keys=False))


def write_torch(path):
    torch.save({"state_dict": Small().state_dict(), "epoch": 3}, path)


def write_old_torch(path):
    torch.save(Small().state_dict(), path, _use_new_zipfile_serialization=False)


def write_state(path):
    accelerator, schedule = accelerated()
    path.parent.rmdir()
    progress = Progress(step=3, steps=[{"loss": 0.5}])
    save_state(accelerator, path.parent.parent.parent, 1, schedule=schedule, progress=progress)


def write_tokenizer(folder, tokens, merges, kind):
    (folder / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    return {"vocab_size": len(tokens), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16}


def write_clip(path):
    import transformers
    tokens = [*"athing*", *(f"{letter}</w>" for letter in "athing*"), "th", "<|startoftext|>", "<|endoftext|>"]
    sizes = write_tokenizer(path.parent, tokens, ["t h"], "CLIPTokenizer")
    config = transformers.CLIPTextConfig(**sizes, projection_dim=8, max_position_embeddings=77, eos_token_id=16)
    transformers.CLIPTextModelWithProjection(config).save_pretrained(path.parent)


def write_laion(path):
    import transformers
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *"athing*", "th", "\u0120", "<mask>"]
    config = transformers.RobertaConfig(**write_tokenizer(path.parent, tokens, ["t h"], "RobertaTokenizer"),
                                        max_position_embeddings=80, type_vocab_size=1)
    model = transformers.RobertaModel(config)
    head = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    torch.save({"state_dict": {**{f"text_branch.{name}": x for name, x in model.state_dict().items()},
                               **{f"text_projection.{name}": x for name, x in head.state_dict().items()}}}, path)


READERS = {  # file: how it is written, how it is read
    "sound.wav": (write_sound, lambda path: is_sound(read_waveform(path))),
    "float.wav": (write_float, lambda path: is_sound(read_waveform(path))),
    "sound.flac": (write_sound, lambda path: is_sound(read_waveform(path))),
    "sound.ogg": (write_sound, lambda path: is_sound(read_waveform(path))),
    "log_mel.pkl": (write_log_mel, read_log_mel),
    "film.mp4": (write_film, read_film),
    "frame.png": (write_picture, read_frame),
    "frame.jpg": (write_picture, read_frame),
    "binary.png": (write_mask, read_binary),
    "semantic.png": (write_mask, read_semantic),
    "deep.png": (write_deep_mask, read_semantic),
    "s4_meta_data.csv": (write_rows(["name", "start_time(s)", "category", "split"], ["a", "0", "dog", "train"],
                                    ["b", "0", "cat", "val"]), read_metadata_of("s4")),
    "ms3_meta_data.csv": (write_rows(["name", "split"], ["a", "train"], ["b", "test"]), read_metadata_of("ms3")),
    "metadata.csv": (write_rows(["vid", "uid", "s_min", "s_sec", "a_obj", "split", "label"],
                                ["a", "a_0_5", "0", "0", "dog", "train", "v1s"],
                                ["b", "b_0_9", "0", "0", "cat", "val", "v2"]), read_metadata_of("avss")),
    "clips.csv": (write_clips, lambda path: are_records(read_clips(path.parent), path.parent)),
    "results.json": (write_json({"subset": "s4", "split": "test", "J": 0.5, "F": 0.25, "J&F": None, "settings": {},
                                 "clips": [{"name": name} for name in CLIPS], "negatives": {"silence": {"FPR": 0.1}}}),
                     read_scores),
    "metrics.json": (write_json({"steps": [{"step": step, "loss": 2.5, "lr": 1e-4, "mask": 1} for step in (1, 2)],
                                 "evaluations": [{"epoch": 1, "step": 2, "J": 0.5, "F": 0.75, "J&F": 0.625}]}),
                     read_curves),
    "label2idx.json": (write_json({"background": 0, "cat": 1, "dog": 2}), read_names),
    "captions.json": (write_json({name: ["a cat", "a dog"] for name in CLIPS}), read_texts),
    "Single-source/toy_manifest.json": (write_manifest, read_manifest),
    "Multi-sources/composed_manifest.json": (write_composed, read_composed),
    "classes.yaml": (write_class_map, lambda path: read_class_map(path).barred("bow wow")),
    "meta/esc50.csv": (write_esc, read_sounds(lambda path: sounds._esc50(path.parent.parent, Counter()))),
    "vggsound.csv": (write_vgg, read_sounds(lambda path: sounds._vggsound(path.parent, path, Counter()))),
    **({"annotations/instances_val.json": (write_coco, read_coco)} if find_spec("pycocotools") else {}),
    "best.safetensors": (write_weights, load_small),
    "config.yaml": (write_config, read_run),
    "preset.yaml": (write_config, parse_preset),
    "track.wav": (write_float, read_track),
    "track.flac": (write_sound, read_track),
    **{f"checkpoints/step-00000001/{name}": (write_state, resume)
       for name in ("model.safetensors", "optimizer.bin", "progress.json")},
    **({"laion.pt": (write_laion, read_tower("laion_clap")),
        **{f"clip/{name}": (write_clip, read_tower("clip"))
           for name in ("config.json", "vocab.json", "merges.txt", "model.safetensors")}}
       if find_spec("transformers") else {}),
    "encoder.safetensors": (lambda path: save_file(Small().state_dict(), path), read_state),
    "encoder.pth": (write_torch, read_state),
    "old.pth": (write_old_torch, read_state),
}


class Files(dict):
    __repr__ = object.__repr__  # a failing case is printed with its fixtures


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every file in a folder of its own, and what is in it."""
    files = Files()
    for name, (write, _) in READERS.items():
        path = tmp_path_factory.mktemp("fuzz") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        files[name] = path, path.read_bytes()
    return files


@contextmanager
def bounded(seconds=10, memory=2**30):
    """Fail what takes long, and let what asks for much memory get none of it."""
    start = time.process_time()
    if sys.platform != "linux":
        yield
    else:
        import resource
        before = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < seconds


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_any_file_is_read_well_or_refused_by_name(written, name, data):
    path, whole = written[name]
    path.write_bytes(data.draw(spoilt(whole, [other for _, other in written.values()])))
    with bounded():
        try:
            READERS[name][1](path)
        except (ValueError, FileNotFoundError, ArgumentError) as error:
            assert type(error) in (ValueError, FileNotFoundError, ArgumentError), repr(error)
            assert str(path.parent) in str(error) or KEY.search(str(error)), repr(error)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Data sets of a few clips, and what is in each of their files."""
    root = tmp_path_factory.mktemp("toys")
    toy.generate(root, "tiny", subsets=("s4", "avss"), clips=(1, 1, 1), workers=1, progress=False)
    folders = {subset: root / toy.FOLDERS[subset] for subset in ("s4", "avss")}
    return Files({subset: (folder, {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()})
                  for subset, folder in folders.items()})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subset", ["s4", "avss"])
@given(data=st.data())
def test_the_validator_reports_any_file(toys, subset, data):
    folder, files = toys[subset]
    path = data.draw(st.sampled_from(list(files)))
    path.write_bytes(data.draw(spoilt(files[path], list(files.values()))))
    try:
        with bounded():
            report = check(folder, subset, deep=True, progress=False)
    finally:
        path.write_bytes(files[path])
    assert all(finding.check in CHECKS and finding.level in LEVELS for finding in report.findings)


@pytest.mark.parametrize("name", READERS)
def test_files_as_they_were_written_are_read(written, name):
    path, whole = written[name]
    path.write_bytes(whole)
    READERS[name][1](path)


# ---- What chance seldom makes ----


class Call:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled(*call):
    return lambda path: path.write_bytes(pickle.dumps(Call(*call)))


def write_level(value):
    return lambda path: soundfile.write(path, np.full(9, value), 16000, "FLOAT")


def of_zip_archive(path):
    archive = io.BytesIO()
    torch.save(torch.zeros(1, 1, 96, 64), archive)
    pickled(torch.storage._load_from_bytes, archive.getvalue())(path)


def of_stride_0(path):
    path.write_bytes(pickle.dumps(torch.zeros(1).expand(10**9, 1, 96, 64)))


def picture(width, height, kind="PNG"):
    return lambda path: Image.new("L", (width, height)).save(path, kind)


def claimed(path):
    """The header of a picture of 15 gigapixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 124_000, 124_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))


def late(sound):
    """A film, or a sound, of a moment at its start and one after 12 days."""
    def write(path):
        with av.open(str(path), "w") as container:
            stream = container.add_stream(*(("pcm_s16le", 16000) if sound else ("rawvideo", 1)))
            for second in (0, 10**6):
                frame = av.AudioFrame(layout="mono", samples=1600) if sound else av.VideoFrame(640, 480, "yuv420p")
                if sound:
                    frame.sample_rate = 16000
                frame.time_base, frame.pts = Fraction(1, 16000), second * 16000
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return write


def fps_of(text):
    def write(path):
        write_clips(path)
        write_rows(["name", "split", "fps"], ["first", "train", text])(path)
    return write


def state_with_code(path):
    write_state(path)
    pickled(os.mkdir, str(path.parent / "marker"))(path.parent / "custom_checkpoint_0.pkl")


def long_frame(path):
    """Which the unpickler then takes for the length of what follows."""
    path.write_bytes(pickle.dumps(torch.zeros(5, 1, 96, 64), 4).replace(b"\x80\x04\x95\x4c", b"\x80\x04\x95\x4e"))


def with_setting(setting, value):
    """A text tower whose configuration says so."""
    def write(path):
        write_clip(path)
        path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    return write


HOSTILE = {  # what: file, how it is written, how it is read, what is said
    "one sample a second": ("a.wav", lambda path: soundfile.write(path, np.zeros(9), 1), read_waveform, "got 1"),
    "a rate of no ratio": ("a.wav", lambda path: soundfile.write(path, np.zeros(9), 16001), read_waveform, "awkward"),
    "sound that is not finite": ("a.wav", write_level(np.nan), read_waveform, "not finite"),
    "sound of another scale": ("a.wav", write_level(1e9), read_waveform, "not finite, or beyond"),
    "track that is not finite": ("a.wav", write_level(np.nan), read_track, "not finite"),
    "memory of an unpickler": ("a.pkl", lambda path: path.write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f."), load_log_mel,
                               "LONG_BINPUT"),
    "frame beyond its end": ("a.pkl", long_frame, load_log_mel, "truncated|memory"),
    "one number for 23 TB": ("a.pkl", of_stride_0, load_log_mel, "beyond its storage"),
    "archive in a pickle": ("a.pkl", of_zip_archive, load_log_mel, "zip archive"),
    "slim picture": ("a.png", picture(1, 30_000), read_frame, "1x30000 pixels"),
    "picture of 15 gigapixels": ("a.png", claimed, read_frame, "cannot be read as a picture"),
    "picture of an unusual format": ("a.png", picture(8, 8, "GIF"), read_frame, "cannot be read as a picture"),
    "class beyond a byte": ("a.png", lambda path: Image.fromarray(np.full((8, 8), 256 + 3, np.uint16)).save(path),
                            read_semantic, "below 7, got 259"),
    "picture after 12 days": ("a.mkv", late(sound=False), read_film, "beyond the limit"),
    "sound after 12 days": ("a.mkv", late(sound=True), read_track, "beyond the limit"),
    "clip elsewhere": ("clips.csv", write_rows(["name", "split"], ["../x", "val"]), READERS["clips.csv"][1], "'../x'"),
    "category elsewhere": ("s4_meta_data.csv", write_rows(["a", "0", "/etc", "val"]), read_metadata_of("s4"), "'/etc'"),
    "name too long for a file": ("ms3_meta_data.csv", write_rows(["x" * 300, "val"]), read_metadata_of("ms3"), "name"),
    "header alone": ("ms3_meta_data.csv", write_rows(["name", "split"]), read_metadata_of("ms3"), "names no clip"),
    "a picture for a year": ("clips.csv", fps_of("0.00000003"), READERS["clips.csv"][1], "expected an fps"),
    "no class": ("label2idx.json", write_json({}), read_names, "expected an object"),
    "more classes than a mask holds": ("label2idx.json", write_json(
        {"background": 0, **{str(i): i for i in range(1, 300)}}), read_names, "at most 255"),
    "aliases of aliases": ("config.yaml", write_text("a: &a [1, 1]\nb: &b [*a, *a]\n"), read_run, "aliases"),
    "empty section": ("config.yaml", write_text("train:\n"), read_run, "train.batch: expected a value"),
    "division by nothing": ("config.yaml", write_text("model:\n  decoder:\n    heads: 0\n"), read_run,
                            "divisible by model.decoder.heads"),
    "weights of zeros left out": ("a.pth", lambda path: torch.save({"x": torch.zeros(3).to_sparse()}, path), read_state,
                                  "other than named tensors"),
    "weights that are not finite": ("a.safetensors", lambda path: save_weights(path, {
        name: x / 0 for name, x in Small().state_dict().items()}, Config()), load_small, "does not fit|not finite"),
    **({"text tower without a setting": ("clip/config.json", with_setting("layer_norm_eps", None), read_tower("clip"),
                                         "cannot read a text"),
        "text tower of endless depth": ("clip/config.json", with_setting("num_hidden_layers", 10**30),
                                        read_tower("clip"), "expected at most 200")}
       if find_spec("transformers") else {}),
    "code in a training state": ("checkpoints/step-00000001/model.safetensors", state_with_code, resume,
                                 "cannot be read as a training state of this model"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_would_be_wrong_endless_or_huge_is_refused(tmp_path, what):
    name, write, read, said = HOSTILE[what]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    with bounded(), pytest.raises(ValueError, match=said) as caught:
        read(path)
    assert str(path.parent) in str(caught.value) and not (path.parent / "marker").exists()


def test_numbers_of_other_scripts_in_names_have_an_order(tmp_path):
    names = ["\u00b2.png", "\u0663.png", "x10.png", "x9.png"]
    for name in names:
        write_picture(tmp_path / name)
    assert {path.name for path in open_frames(tmp_path, silent_ok=True).pictures} == {*names}
