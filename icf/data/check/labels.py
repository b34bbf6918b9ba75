"""Labels: binary, as class indices, and in colours."""
from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from icf.data import IGNORE
from icf.data.avsbench import Record, class_palette, open_picture, read_label
from icf.data.check.findings import Clip, reason, relative
from icf.data.check.layout import LABELS
from icf.data.folder import read_own_label

STRAY = 16  # pixels, below which a component of a label is stray


def check_label(path: Path, record: Record, folder: Path, classes: list[str], deep: bool, clip: Clip,
                void: int | None) -> tuple[tuple[int, int] | None, np.ndarray | None]:
    """Width and height, None for a broken file, and the values where they are looked at. `void`: the value of ignored
    pixels of binary labels, if there is one."""
    where = relative(path, folder)
    try:
        if record.source == "folder":  # their values were made by hand: always looked at
            mask = read_own_label(path, len(classes))
            clip.counts["labels"] += 1
            clip.counts[f"empty labels {record.split}"] += not mask.any()
            if classes:
                _indices(mask, where, classes, clip)
            return mask.shape[::-1], mask
        if not deep:
            with open_picture(path) as image:
                size = image.size
            clip.counts["labels"] += 1
            return size, None
        values = read_label(path)
    except ValueError as error:
        clip.add("labels", "error", where, reason(error))
        return None, None
    clip.counts["labels"] += 1
    if classes or record.source in LABELS:
        _indices(values, where, classes, clip)
    else:
        _binary(values, where, record, clip, void)
    return values.shape[1::-1], values


def _binary(values: np.ndarray, where: str, record: Record, clip: Clip, void: int | None) -> None:
    if values.ndim == 3:
        values = values.max(axis=2)
    if void is not None:
        values = values[values != void]
    other = ~np.isin(values, (0, 1) if values.max(initial=0) == 1 else (0, 255))
    if other.any():
        clip.add("labels", "warning", where, f"{other.mean():.2%} of the values are neither 0 nor 255")
    if not values.any():
        clip.counts[f"empty labels {record.split}"] += 1
        if record.source == "s4":
            clip.add("labels", "warning", where, "nothing is labelled")


def _indices(values: np.ndarray, where: str, classes: list[str], clip: Clip) -> None:
    if values.ndim != 2:
        clip.add("labels", "error", where, f"{values.shape[2]} channels, expected one of class indices")
        return
    counts = np.bincount(values.reshape(-1))
    present = np.flatnonzero(counts).tolist()
    clip.pixels.update({i: int(counts[i]) for i in present})
    if wrong := [i for i in present if i >= len(classes) and i != IGNORE and classes]:
        clip.add("labels", "error", where, f"holds {wrong}, expected indices below {len(classes)}")
    stray = stray_components(np.where(values == IGNORE, 0, values))
    if stray:
        names = ", ".join(sorted({classes[i] if i < len(classes) else str(i) for i in stray}))
        clip.counts["stray components"] += len(stray)
        clip.add("labels", clip.quirk, where, f"{len(stray)} components below {STRAY} pixels, of {names}")


def stray_components(values: np.ndarray) -> list[int]:
    """Value of every component of equal, non-zero values [H,W] that has fewer than `STRAY` pixels (8 neighbours)."""
    starts = np.ones(values.shape, dtype=bool)
    starts[:, 1:] = values[:, 1:] != values[:, :-1]
    row, begin = np.nonzero(starts)
    end = np.append(begin[1:], 0)
    end[np.append(row[1:] != row[:-1], True)] = values.shape[1]
    value = values[row, begin]
    kept = np.flatnonzero(value)  # runs of one value within a row
    row, begin, end, value = row[kept], begin[kept], end[kept], value[kept]
    parent = list(range(len(kept)))

    def top(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    bounds = np.searchsorted(row, np.arange(values.shape[0] + 1)).tolist()
    for (first, middle), (_, last) in pairwise(pairwise(bounds)):
        above = first
        for below in range(middle, last):
            while above < middle and end[above] < begin[below]:
                above += 1
            for i in range(above, middle):
                if begin[i] > end[below]:
                    break
                if value[i] == value[below]:
                    parent[top(below)] = top(i)
    roots = [top(i) for i in range(len(kept))]
    areas = np.bincount(roots, weights=end - begin, minlength=len(kept))
    return [int(value[i]) for i in range(len(kept)) if 0 < areas[i] < STRAY]


def check_colours(path: Path, index: np.ndarray, folder: Path, classes: int, clip: Clip) -> None:
    """Compare `labels_rgb` with the class indices in both orders of the channels, where these differ."""
    try:
        colours = read_label(path)
    except ValueError as error:
        clip.add("colours", "warning", relative(path, folder), f"cannot be compared: {reason(error)}")
        return
    if index.ndim != 2 or index.dtype != np.uint8 or colours.shape != (*index.shape, 3):
        clip.add("colours", "warning", relative(path, folder), f"has shape {list(colours.shape)}, its labels "
                                                                f"{list(index.shape)}")
        return
    rgb, bgr = _class_codes()
    codes = _codes(colours)
    telling = (rgb != bgr)[index]
    clip.counts["coloured pixels"] += codes.size
    clip.counts["unknown colours"] += codes.size - int(_known_codes(classes)[codes].sum())
    clip.counts["telling"] += int(telling.sum())
    clip.counts["RGB"] += int(((codes == rgb[index]) & telling).sum())
    clip.counts["BGR"] += int(((codes == bgr[index]) & telling).sum())


def _codes(colours: np.ndarray) -> np.ndarray:
    """Colours [...,3] uint8 as single numbers."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


@lru_cache(maxsize=1)
def _class_codes() -> tuple[np.ndarray, np.ndarray]:
    """The colour of every index [256], as RGB and as BGR."""
    palette = class_palette(256)
    return _codes(palette), _codes(palette[:, ::-1])


@lru_cache(maxsize=1)
def _known_codes(classes: int) -> np.ndarray:
    """Whether a colour is that of a class, in either order of the channels [2**24]."""
    known = np.zeros(2**24, dtype=bool)
    for codes in _class_codes():
        known[codes[[*range(max(classes, 1)), IGNORE]]] = True
    return known
