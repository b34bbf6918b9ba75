"""Own material in folders: labelled clips to train and evaluate on, and pictures with a sound file to predict on.

Labelled clips lie below one root:

    clips.csv                       name, split[, fps][, category]
    label2idx.json                  semantic labels: the names of the classes and their indices, background 0
    <name>/frames/*.jpg|png         in the order of the numbers in their names, `fps` a second (1 if not given)
    <name>/audio.wav                any rate and number of channels
    <name>/labels/*.png             named as the frames they belong to; frames may lack one; `masks/` will do as well,
                                    and .bmp, .tif, .gif, and .webp without loss

With `label2idx.json` labels are class indices, 255 is ignored. Without it they are binary: black, or transparent, is
background, and one other colour what sounds; a file in grey has 0 and 1, or 0 and the highest value. Anything else is
refused.
"""
from __future__ import annotations

import csv
import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from glob import glob, has_magic
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor

from icf.data import Clip
from icf.data.audio import RATE
from icf.data.avsbench import (
    SPLITS,
    AVSBench,
    Record,
    is_file_name,
    open_picture,
    read_classes,
    read_label,
    semantic_mask,
)
from icf.data.transforms import to_rgb
from icf.data.video import open_video, read_sound
from icf.files import read_csv, read_text

METADATA = "clips.csv"
MOMENT = Fraction(15, 16)  # of its second at which a frame is taken, as in AVSBench
SLOWEST, FASTEST = Fraction(1, 60), 1000  # pictures a second
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".m4a")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m4v", ".mpg", ".mpeg", ".mts", ".m2ts", ".flv", ".wmv",
          ".3gp", ".ogv", ".gif")
LABEL_FOLDERS = ("labels", "masks")
LABELS = (".png", ".bmp", ".tif", ".tiff", ".gif", ".webp")
LABEL_FORMATS = ("PNG", "BMP", "TIFF", "GIF", "WEBP")
SYSTEM = ("thumbs.db", "desktop.ini")  # and what begins with a dot: files of operating systems


@dataclass(frozen=True)
class FrameFolder:
    """Pictures of one size, one per second, and a sound file; the same attributes and methods as `video.Video`."""

    path: Path
    pictures: tuple[Path, ...]
    width: int
    height: int
    sound: Path | None
    frame_rate = Fraction(1)
    time_base = Fraction(1, 1000)
    start = Fraction(0)
    aspect = Fraction(1)

    @property
    def duration(self) -> float:
        return float(len(self.pictures))

    def frames(self) -> Iterator[tuple[Fraction, np.ndarray]]:
        """All pictures: time in seconds and [height, width, 3] uint8 RGB. Raises ValueError for one of another size."""
        for time, path in enumerate(self.pictures):
            image = read_picture(path)
            if image.shape[:2] != (self.height, self.width):
                raise ValueError(f"{path}: expected {self.width}x{self.height} pixels as in {self.pictures[0].name}, "
                                 f"got {image.shape[1]}x{image.shape[0]}")
            yield Fraction(time), image

    sampled = frames


def open_frames(folder: Path, silent_ok: bool = False) -> FrameFolder:
    """The pictures of `folder`, or of `frames/` in it, in the order of the numbers in their names, and its sound file.

    Raises:
        ValueError: there is no picture, no sound file (unless `silent_ok`) or more than one, or a broken picture.
    """
    folder = Path(folder)
    pictures = list_files(folder, PICTURES) or list_files(folder / "frames", PICTURES)
    if not pictures:
        raise ValueError(f"{folder}: no pictures ({', '.join(PICTURES)}) in it or in its folder frames/")
    sounds = list_files(folder, SOUNDS)
    if len(sounds) > 1 or not sounds and not silent_ok:
        found = ", ".join(path.name for path in sounds) or "none; allow silence (silent_ok) to go on without"
        raise ValueError(f"{folder}: expected one sound file ({', '.join(SOUNDS)}), found {found}")
    height, width = read_picture(pictures[0]).shape[:2]
    return FrameFolder(folder, tuple(pictures), width, height, sounds[0] if sounds else None)


def find_sources(given: Sequence[str]) -> list[Path]:
    """Videos and folders of pictures that arguments of the command line name: files and folders as they are, a folder
    of videos as these, a pattern as what it matches. Raises ValueError for a pattern that matches nothing."""
    found: list[Path] = []
    for name in given:
        path = Path(name)
        videos = [] if not path.is_dir() or (path / "frames").is_dir() or list_files(path, PICTURES) else list_files(
            path, VIDEOS)
        matches = [] if path.exists() else sorted(Path(match) for match in glob(name, recursive=True))
        found += videos or matches or [path]
        if has_magic(name) and not path.exists() and not matches:
            raise ValueError(f"{name}: no such file, and nothing matches")
    return list(dict.fromkeys(found))


def list_files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Files of `folder` with one of `endings`, in natural order (2 before 10); [] where there is no such folder."""
    if not folder.is_dir():
        return []
    files = (path for path in folder.iterdir() if path.suffix.lower() in endings and not path.name.startswith("."))
    return sorted(files, key=lambda path: [int(part) if place % 2 else part
                                           for place, part in enumerate(_NUMBER.split(path.name))])


_NUMBER = re.compile(r"(\d+)", re.ASCII)


def read_picture(path: Path) -> np.ndarray:
    """[height, width, 3] uint8 RGB. Raises as `open_picture`."""
    with open_picture(path) as image:
        return np.asarray(to_rgb(image))


class FolderDataset(AVSBench):
    """One split of own labelled clips, as `AVSBench` but for where the files lie.

    A clip gives one frame a second, the one on show at 15/16 s as in AVSBench, and at most `data.frames` of them.
    `label_mask` tells which of these have a label; `data.supervision: first` keeps the first label alone. Labels are
    pixels of the whole frame, which is squeezed into the square.

    Raises:
        FileNotFoundError: `data.root` or `clips.csv`, or later a file of a clip, is missing.
        ValueError: `clips.csv` or a file does not hold what it should.
    """

    def _find(self) -> tuple[Path, list[Record], list[str]]:
        root = Path(self.data.root)
        classes = read_classes(root) if (root / "label2idx.json").is_file() else []
        records = read_clips(root)
        if self.data.supervision == "first":
            records = [replace(record, masks=_first(record.masks)) for record in records]
        return root, records, classes

    def _read_label(self, path: Path) -> np.ndarray:
        return read_own_label(path, len(self.classes))

    def _clip(self, index: int, log_mel: Tensor) -> Clip:
        labelled = [path is not None for path in self.records[index].masks[:self.data.frames]]
        labelled += [False] * (self.data.frames - len(labelled))
        return replace(super()._clip(index, log_mel), label_mask=torch.tensor(labelled))


def read_clips(root: Path) -> list[Record]:
    """All clips that `clips.csv` names, with a picture and, where there is one, a label per second.

    Raises:
        FileNotFoundError: there is no `clips.csv`, or a clip has no pictures.
        ValueError: a row of `clips.csv` is incomplete or repeats a clip, its split or fps is out of range, or a label
            belongs to no picture, or may have lost something (.jpg).
    """
    path = root / METADATA
    if not path.is_file():
        raise FileNotFoundError(f"data.root: no own clips here, expected {path}")
    header, *lines = read_csv(path) or [[]]
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, start=1):
        row = dict(zip(header, line, strict=False))
        name, split, fps = row.get("name", ""), row.get("split", ""), row.get("fps") or "1"
        if not is_file_name(name) or split not in SPLITS:
            raise ValueError(f"{path}: row {number}: expected a name and a split of {SPLITS}, got {name[:60]!r}, "
                             f"{split[:60]!r}")
        if name in records:
            raise ValueError(f"{path}: row {number}: {name!r} is named twice")
        known = re.fullmatch(r"\d{1,9}(\.\d{,9})?|\d{1,9}/[1-9]\d{,8}", fps, re.ASCII)
        if not known or not SLOWEST <= Fraction(fps) <= FASTEST:
            raise ValueError(f"{path}: row {number}: expected an fps such as 25, 29.97 or 30000/1001, got {fps[:60]!r}")
        records[name] = _record(root / name, name, split, Fraction(fps), row.get("category", ""))
    return list(records.values())


def _record(folder: Path, name: str, split: str, fps: Fraction, category: str) -> Record:
    frames = list_files(folder / "frames", PICTURES)
    if not frames:
        raise FileNotFoundError(f"{folder / 'frames'}: no pictures ({', '.join(PICTURES)})")
    labels = _find_labels(folder)
    if strangers := labels.keys() - {path.stem for path in frames}:
        raise ValueError(f"{labels[min(strangers)]}: no picture of that name in {folder / 'frames'}")
    seconds = max(1, round(len(frames) / fps))
    chosen = [frames[min(int((second + MOMENT) * fps), len(frames) - 1)] for second in range(seconds)]
    return Record(name, split, "folder", tuple(chosen), tuple(labels.get(path.stem) for path in chosen),
                  labelled=seconds, sound=folder / "audio.wav", categories=(category,) if category else ())


def _find_labels(folder: Path) -> dict[str, Path]:
    """The labels of a clip by the name of their picture."""
    folders = [folder / name for name in LABEL_FOLDERS if (folder / name).is_dir()]
    if len(folders) > 1:
        raise ValueError(f"{folder}: expected one folder of labels, got {' and '.join(path.name for path in folders)}")
    return _list_labels(folders[0]) if folders else {}


def _list_labels(folder: Path) -> dict[str, Path]:
    """The labels in a folder by their stem. Raises ValueError for a file that is none, or a second one of a stem."""
    labels: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in SYSTEM:
            continue
        if path.suffix.lower() not in LABELS:
            raise ValueError(f"{path}: no label; expected one of {', '.join(LABELS)}, which keep every pixel's value")
        if path.stem in labels:
            raise ValueError(f"{path}: {labels[path.stem].name} is a label of the same picture")
        labels[path.stem] = path
    return labels


def read_own_label(path: Path, classes: int) -> np.ndarray:
    """Mask [H,W] uint8 of a label: 0 and 1, or class indices and 255.

    Args:
        classes: number of classes with background; 0 for binary labels.

    Raises:
        ValueError: what the label's values mean is not certain.
    """
    if classes:
        return semantic_mask(read_label(path, LABEL_FORMATS), classes, path)
    with open_picture(path, formats=LABEL_FORMATS) as image:
        if "transparency" in image.info:
            image = image.convert("RGBA")
        if "A" in image.getbands() and image.getchannel("A").getextrema() != (255, 255):
            image = image.getchannel("A")  # opaque is what sounds
        elif image.mode in ("P", "LA", "RGBA", "CMYK"):  # indices alone do not tell which is the background
            image = image.convert("RGB")
        values = np.array(image)
    values = values.reshape(*values.shape[:2], -1)                          # [H,W,channels]
    colours = np.unique(values.reshape(-1, values.shape[2]), axis=0).tolist()
    shown = [colour for colour in colours if any(colour)]
    full = {1, 255, np.iinfo(values.dtype).max if values.dtype.kind in "ui" else 1}
    if len(shown) > 1 or any(len({*colour}) == 1 and colour[0] not in full for colour in shown):
        found = ", ".join(str(colour[0] if len(colour) == 1 else tuple(colour)) for colour in colours[:4])
        raise ValueError(f"{path}: holds {found}{', ..' if len(colours) > 4 else ''}, expected 0 and 255; labels of "
                         "several classes need the file label2idx.json beside clips.csv")
    return (values != 0).any(2).astype(np.uint8)


def unused_labels(record: Record) -> list[Path]:
    """Labels of pictures of a clip that are not the one of their second."""
    return sorted({*_find_labels(record.sound.parent).values()} - {*record.masks})


def _first(masks: tuple[Path | None, ...]) -> tuple[Path | None, ...]:
    """The masks without those that follow the first."""
    first = next((place for place, path in enumerate(masks) if path is not None), 0)
    return tuple(path if place == first else None for place, path in enumerate(masks))


def import_clips(root: Path, videos: Sequence[Path], split: str, labels: Path | None = None, name: str | None = None,
                 category: str = "", silent_ok: bool = False, strict: bool = False) -> tuple[list[Record], list[str]]:
    """Add videos to the own clips below `root`, as `import_clip` does each; `labels` holds a folder of masks for each
    that has any, named as its file, or the masks of a single video. Says what it wrote of each.

    Returns:
        The clips, and what was wrong with the videos of several that could not be imported.

    Raises:
        ValueError: as `import_clip` where there is one video, or `name` is given to several, or none has `labels`.
    """
    several = len(videos) > 1
    if several and name is not None:
        raise ValueError(f"name: expected none for {len(videos)} videos, which are named as their files, got {name!r}")
    labelled = {video: Path(labels) / Path(video).stem for video in videos} if labels is not None else {}
    labelled = {video: folder for video, folder in labelled.items() if folder.is_dir()}
    if several and labels is not None and not labelled:
        raise ValueError(f"labels: expected folders named as the videos, such as {Path(videos[0]).stem}/, in {labels}")
    records, failed = [], []
    for video in videos:
        own = labelled.get(video, None if several else labels)
        try:
            record = import_clip(root, video, split, own, name, category, silent_ok, strict)
        except ValueError as error:
            if not several:
                raise
            failed.append(str(error))
            continue
        records.append(record)
        with open_picture(record.frames[0]) as image:
            size = "x".join(map(str, image.size))
        count = sum(mask is not None for mask in record.masks)
        print(f"{root / record.name}: {len(record.frames)} s of {split}, as many pictures of {size}, {count} labels")
    return records, failed


def import_clip(root: Path, video: Path, split: str, labels: Path | None = None, name: str | None = None,
                category: str = "", silent_ok: bool = False, strict: bool = False) -> Record:
    """Add a video to the own clips below `root`: one picture a second as PNG, the sound, a row of `clips.csv`.

    Args:
        root: made if missing.
        video: any video that FFmpeg reads.
        split: `train`, `val` or `test`.
        labels: a folder of masks of the size of the video's pictures, named by the second of the video from 0 on, of
            the formats and values of this module's layout; seconds may lack one. `icf predict` writes such folders,
            which can be corrected by hand.
        name: of the clip; the stem of the video's file name if not given.
        category: what sounds, if known.
        silent_ok: accept a video without sound.
        strict: refuse damaged pictures or sound, which are else left out with a warning.

    Returns:
        The record of the clip.

    Raises:
        ValueError: the video cannot be read, the name is taken or no file name, a label has no second, another size
            than the pictures, or values that are not understood.
    """
    root, name = Path(root), name or Path(video).stem
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    header, *rows = (read_csv(root / METADATA) if (root / METADATA).is_file() else []) or [["name"]]
    if "name" not in header:
        raise ValueError(f"{root / METADATA}: expected a first line with name and split, got {','.join(header)[:60]!r}")
    listed = {dict(zip(header, row, strict=False)).get("name") for row in rows}
    if not is_file_name(name) or (root / name).exists() or name in listed:
        raise ValueError(f"name: expected a new file name below {root}, got {name!r}")
    if Path(video).is_dir():
        raise ValueError(f"{video}: no videos ({', '.join(VIDEOS)}) in this folder")
    source = open_video(video, silent_ok, strict)
    classes = read_classes(root) if (root / "label2idx.json").is_file() else []
    masks = _masks_by_second(Path(labels)) if labels else {}
    for path in masks.values():
        height, width = read_own_label(path, len(classes)).shape
        if (width, height) != (source.width, source.height):
            raise ValueError(f"{path}: expected {source.width}x{source.height} pixels, as {video} has, got "
                             f"{width}x{height}")
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".partial-", dir=root) as partial:
        clip = Path(partial, name)
        (clip / "frames").mkdir(parents=True)
        (clip / "labels").mkdir()
        seconds = 0
        for seconds, (_, picture) in enumerate(source.sampled(), start=1):
            Image.fromarray(picture).save(clip / "frames" / f"{seconds - 1}.png")
        if masks and max(masks) >= seconds:
            raise ValueError(f"{masks[max(masks)]}: {video} has {seconds} seconds, numbered from 0")
        for second, path in masks.items():
            shutil.copyfile(path, clip / "labels" / f"{second}{path.suffix}")
        with soundfile.SoundFile(clip / "audio.wav", "w", RATE, 1, "PCM_16") as file:
            left = RATE * seconds  # as much sound as there are pictures
            for piece in chain(read_sound(source.sound, source.start, strict) if source.sound else (),
                               repeat(np.zeros(RATE, np.float32))):
                file.write(piece[:left])
                left -= len(piece[:left])
                if not left:
                    break
        os.replace(clip, root / name)
        _append(root / METADATA, {"name": name, "split": split, "fps": "1", "category": category})
    return _record(root / name, name, split, Fraction(1), category)


def _masks_by_second(folder: Path) -> dict[int, Path]:
    """The masks in a folder by the second that their names tell. Raises ValueError for one that tells none."""
    if not folder.is_dir():
        raise ValueError(f"labels: no such folder: {folder}")
    masks: dict[int, Path] = {}
    for stem, path in _list_labels(folder).items():
        if not re.fullmatch(r"\d{1,9}", stem, re.ASCII):
            raise ValueError(f"{path}: expected labels named by their second, such as 0{path.suffix}")
        if int(stem) in masks:
            raise ValueError(f"{path}: {masks[int(stem)].name} is a label of the same second")
        masks[int(stem)] = path
    if not masks:
        raise ValueError(f"labels: expected files ({', '.join(LABELS)}) named by their second in {folder}")
    return masks


def _append(path: Path, row: dict[str, str]) -> None:
    """Add a row to a CSV file, which is replaced as a whole; columns that the file lacks are left out."""
    rows = read_csv(path) if path.is_file() else []
    text, header = (read_text(path), rows[0]) if rows else (",".join(row) + "\n", list(row))
    line = io.StringIO()
    csv.DictWriter(line, header, extrasaction="ignore", lineterminator="\n").writerow(row)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text.rstrip("\n") + "\n" + line.getvalue(), encoding="utf-8")
    os.replace(partial, path)
