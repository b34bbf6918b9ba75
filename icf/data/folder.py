"""Own material in folders: pictures with a sound file to predict on."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".m4a")


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


def list_files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Files of `folder` with one of `endings`, in natural order (2 before 10); [] where there is no such folder."""
    if not folder.is_dir():
        return []
    files = (path for path in folder.iterdir() if path.suffix.lower() in endings and not path.name.startswith("."))
    return sorted(files, key=lambda path: [int(part) if part.isdigit() else part for part in _NUMBER.split(path.name)])


_NUMBER = re.compile(r"(\d+)", re.ASCII)


def read_picture(path: Path) -> np.ndarray:
    """[height, width, 3] uint8 RGB. Raises ValueError, naming the file, where it is no picture."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from error
