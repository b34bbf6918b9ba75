"""Sounds as people have them: ESC-50, VGGSound, or a folder per class; whatever libsndfile and FFmpeg read."""
from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from icf.data.audio import RATE, log_mel_spectrogram, resample
from icf.data.compose.classes import plain
from icf.data.video import read_sound
from icf.files import read_csv

ENDINGS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".m4a", ".aac", ".wma",
           ".mp4", ".mkv", ".webm", ".mov", ".avi")
SECONDS = 10  # read of a file at most: as long as a clip of VGGSound
STEP = RATE // 20  # samples, over which loudness is judged
MUTE = 10 ** (-60 / 20)  # root mean square
DYNAMICS = 10 ** (-40 / 20)  # of the loudest step, below which a step is a pause
LEAST = 0.25  # seconds of sound that is no pause
ESC, VGG, FOLDERS = "ESC-50", "VGGSound", "folder per class"
TERMS = {ESC: "CC BY-NC 3.0, single recordings under CC licences of their own: github.com/karolpiczak/ESC-50",
         VGG: "list CC BY 4.0, sound under the terms of its video: www.robots.ox.ac.uk/~vgg/data/vggsound",
         FOLDERS: "not stated"}


class Unusable(ValueError):
    """A file that is left out; the message is the reason by which such files are counted."""


@dataclass(frozen=True)
class Sound:
    """A sound file, or `SECONDS` of it.

    Args:
        source: the layout that it was found in.
        recording: what it was cut from; never in two splits.
        start: seconds into the file.
    """

    source: str
    path: Path
    category: str
    recording: str
    start: float = 0.0
    terms: str = ""


def find_sounds(folder: Path, left_out: Counter) -> list[Sound]:
    """All sounds below a folder, sorted, or below the folders in it that have one of the layouts.

    Args:
        folder: of ESC-50 (`meta/esc50.csv`, `audio/`), of VGGSound (`vggsound.csv` and files named by video and
            second), a folder per class, or a folder of such folders.
        left_out: counts what is named and cannot be used, by reason.

    Raises:
        FileNotFoundError: there is no folder.
        ValueError: it has none of the layouts, or a table that is not as published.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"sounds: no folder {folder}")
    for folders in [folder], sorted(path for path in folder.iterdir() if path.is_dir()):
        found = [sound for path in folders for sound in _read_layout(path, left_out)]
        if found:
            return sorted(found, key=lambda sound: (sound.source, sound.path, sound.start, sound.category))
    if left_out:
        raise ValueError(f"sounds: none of those that {folder} names can be used: {reasons(left_out)}")
    found = list(_by_folder(folder))
    if not found:
        raise ValueError(f"sounds: {folder} is no ESC-50 (meta/esc50.csv), no VGGSound (vggsound.csv) and no folder of "
                         "folders with sounds, one per class")
    return found


def reasons(left_out: Counter) -> str:
    """What was left out, most first."""
    return ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())


def terms_of(source: str, folder: Path, known: dict[str, str]) -> str:
    """The terms of a data set: those that it came with, if there is such a file, and what is known of them."""
    files = sorted(path.name for path in folder.iterdir() if re.match(r"(licen[cs]e|terms|copying)", path.name, re.I))
    return "; ".join([known[source], *(f"see {name} in {folder.name}" for name in files[:1])])


def _read_layout(folder: Path, left_out: Counter) -> Iterator[Sound]:
    if (folder / "meta/esc50.csv").is_file():
        yield from _esc50(folder, left_out)
    for path in sorted(folder.glob("vggsound*.csv")):
        yield from _vggsound(folder, path, left_out)


def _esc50(folder: Path, left_out: Counter) -> Iterator[Sound]:
    path, terms = folder / "meta/esc50.csv", terms_of(ESC, folder, TERMS)
    header, *rows = read_csv(path) or [[]]
    if lacking := {"filename", "category", "src_file"} - {*header}:
        raise ValueError(f"sounds: {path}: expected columns filename, category and src_file, "
                         f"{', '.join(sorted(lacking))} missing")
    for row in rows:
        values = dict(zip(header, row, strict=False))
        if not all(values.get(key) for key in ("filename", "category", "src_file")):
            left_out["incomplete row"] += 1
        elif not (file := folder / "audio" / Path(values["filename"]).name).is_file():
            left_out["missing"] += 1
        else:
            yield Sound(ESC, file, plain(values["category"]), values["src_file"], terms=terms)


def _vggsound(folder: Path, path: Path, left_out: Counter) -> Iterator[Sound]:
    """Rows of video, second at which its 10 s start, category, split; without a header, and no end is given. Files may
    hold these 10 s, and are then named by video and second, or the whole video, by whose name alone they go."""
    terms, files = terms_of(VGG, folder, TERMS), _files_by_stem(folder)
    for number, row in enumerate(read_csv(path)):
        if len(row) < 3 or not re.fullmatch(r"\d{1,6}(\.\d+)?", row[1], re.ASCII) or not row[0] or not row[2]:
            left_out.update(["incomplete row"] * (number > 0))  # the first may be a header
            continue
        video, start, category = row[0], float(row[1]), plain(row[2])
        second = int(start)
        names = (f"{video}_{second:06d}", f"{video}_{second}", f"{video}_{second}_{second + 10}",
                 f"{video}_{1000 * second}", f"{video}_{1000 * second}_{1000 * second + 10000}")
        if cut := next((files[name] for name in names if name in files), None):
            yield Sound(VGG, cut, category, video, terms=terms)
        elif video in files:
            yield Sound(VGG, files[video], category, video, start, terms)
        else:
            left_out["missing"] += 1


def _files_by_stem(folder: Path) -> dict[str, Path]:
    """Sound files below a folder by their names without ending; of several of one name, the first ending counts."""
    found = sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names
                   if Path(name).suffix.lower() in ENDINGS and not name.startswith("."))
    found.sort(key=lambda path: ENDINGS.index(path.suffix.lower()), reverse=True)
    return {path.stem: path for path in found}


def _by_folder(folder: Path) -> Iterator[Sound]:
    """The name of a folder is the category of all that lies below it; every file is a recording."""
    for own in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        terms = terms_of(FOLDERS, own, TERMS)
        for path in sorted(own.rglob("*")):
            if path.suffix.lower() in ENDINGS and path.is_file() and not path.name.startswith("."):
                yield Sound(FOLDERS, path, plain(own.name), path.stem, terms=terms)


# ---- What is in a file ----


def read(sound: Sound) -> NDArray:
    """At most `SECONDS` of a sound, float32 [n] at 16 kHz mono. Raises Unusable."""
    try:
        waveform = _read_soundfile(sound)
    except soundfile.LibsndfileError:
        waveform = _read_video(sound)
    if not np.isfinite(waveform).all() or np.abs(waveform).max(initial=0) > 2**16:
        raise Unusable("with samples beyond all bounds")
    return waveform


def _read_soundfile(sound: Sound) -> NDArray:
    with soundfile.SoundFile(sound.path) as file:
        rate = file.samplerate
        file.seek(min(int(sound.start * rate), max(file.frames, 0)))
        samples = file.read(SECONDS * rate, "float32", always_2d=True).mean(axis=1)
    try:
        return resample(torch.from_numpy(samples), rate).numpy()
    except (ValueError, RuntimeError):
        raise Unusable("of a rate that cannot be resampled") from None


def _read_video(sound: Sound) -> NDArray:
    pieces, length, most = [], 0, SECONDS * RATE
    skip = round(sound.start * RATE)
    try:
        for piece in read_sound(sound.path):
            piece, skip = piece[skip:], max(skip - len(piece), 0)
            pieces.append(piece)
            length += len(piece)
            if length >= most:
                break
    except ValueError as error:
        raise Unusable("without a sound track" if "no sound track" in str(error) else "cannot be read") from None
    return np.concatenate(pieces)[:most] if pieces else np.zeros(0, np.float32)


def sounding_part(waveform: NDArray) -> NDArray:
    """What is left of a sound [n] without its pauses, at root mean square 1. Many clips of ESC-50 are a bark of half a
    second and digital silence; a label that says `it sounds` must be true in every second. Raises Unusable."""
    steps = waveform[:len(waveform) // STEP * STEP].reshape(-1, STEP)
    if len(steps) < LEAST * RATE / STEP:
        raise Unusable(f"shorter than {LEAST} s")
    loudness = np.sqrt(np.square(steps, dtype=np.float64).mean(axis=1))
    loud = loudness > max(MUTE, DYNAMICS * loudness.max())
    if not loud.any():
        raise Unusable("mute")
    near = np.convolve(loud, np.ones(3), mode="same") > 0  # what fades in and out belongs to it
    if near.sum() < LEAST * RATE / STEP:
        raise Unusable(f"less than {LEAST} s of it are no pause")
    kept = steps[near].reshape(-1)
    return (kept / np.sqrt(np.square(kept, dtype=np.float64).mean())).astype(np.float32)


def fingerprint(waveform: NDArray) -> NDArray:
    """[256] int8 of a sound [n], alike for a copy in another coding or loudness: whether loudness rises more (1) or
    less (-1) in one of 17 bands than in the next, from one of 17 pieces to the next (Haitsma and Kalker, ISMIR 2002,
    in short); 0 where nothing changes."""
    level = np.sqrt(np.square(waveform, dtype=np.float64).mean())
    spectrum = log_mel_spectrogram(torch.from_numpy(waveform / np.float32(max(level, 1e-9))))
    loudness = torch.log(spectrum.exp() + 0.3).numpy()[:, :51]  # up to 4 kHz, for many files hold no more
    pieces = [piece.mean(axis=0) for piece in np.array_split(loudness, 17)]
    rise = np.diff(np.diff(np.stack(pieces).reshape(17, 17, 3).mean(axis=2), axis=0), axis=1)
    return (np.sign(rise) * (np.abs(rise) > 0.05)).astype(np.int8).reshape(-1)


def examine(sound: Sound) -> NDArray | str:
    """The fingerprint of a sound that can be used, else why it cannot."""
    try:
        waveform = read(sound)
        sounding_part(waveform)
        return fingerprint(waveform)
    except Unusable as reason:
        return str(reason)
    except (OSError, ValueError, MemoryError):
        return "cannot be read"
