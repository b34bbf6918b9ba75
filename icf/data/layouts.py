"""What data sets that are made here share: AVSBench's metadata and sound files, oracles, and work in parallel."""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from icf.data import IGNORE
from icf.data.audio import RATE
from icf.data.avsbench import COLUMNS, METADATA
from icf.machine import processors


def parallel(function: Callable, items: list, workers: int | None, chunk: int = 4) -> Iterator:
    """The results for the items, in their order, of as many processes as there are cores if `workers` is None."""
    workers = min(workers or processors(), max(len(items), 1))
    if workers == 1:
        yield from map(function, items)
        return
    # One thread each: they share the cores, and OpenMP does not survive a fork otherwise.
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(function, items, chunksize=chunk)


def bar(items: Iterable, total: int, title: str, show: bool) -> Iterable:
    """The items, under a progress bar."""
    if not show:
        return items
    from rich.progress import track

    return track(items, title, total)


def write_sound(path: Path, sound: NDArray, rate: int = RATE) -> None:
    """int16 [n] or [n,channels] as a wav file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()  # soundfile would wait for the disk after every file
    soundfile.write(file, sound, rate, subtype="PCM_16", format="WAV")
    path.write_bytes(file.getvalue())


def write_metadata(folder: Path, subset: str, clips: list[dict], classes: Sequence[str]) -> None:
    """AVSBench's table of a subset, and the numbers of its classes.

    Args:
        clips: entries of a manifest: `name`, `split`, `label` (AVSS), `shapes` and `off_screen`.
        classes: without background.
    """
    if subset == "s4":
        heard = [next(shape["class"] for shape in clip["shapes"] if any(shape["sounding"])) for clip in clips]
        rows = [[clip["name"], 0, category, clip["split"]] for clip, category in zip(clips, heard, strict=True)]
    elif subset == "ms3":
        rows = [[clip["name"], clip["split"]] for clip in clips]
    else:
        rows = [["_".join(clip["name"].split("_")[:3]), clip["name"], 0, 0, _a_obj(clip), clip["split"], clip["label"]]
                for clip in clips]
        names = {name: index for index, name in enumerate(("background", *classes))}
        (folder / "label2idx.json").write_text(json.dumps(names, indent=1))
    with (folder / METADATA[subset]).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS[subset], *rows])


def _a_obj(clip: dict) -> str:
    """The objects as AVSBench's metadata lists them, for people to read."""
    heard = [shape["class"] for shape in clip["shapes"] if any(shape["sounding"])]
    return "_".join(["background", *sorted(heard), *(["off-the-screen"] if clip["off_screen"] else [])])


def binary_score(true: NDArray, shown: NDArray) -> list[float]:
    """[J as published, J strict] of one picture; they differ where nothing sounds. Labels [H,W] of any classes, of
    which the true one may hold `IGNORE`."""
    known = true != IGNORE
    y, p = (true > 0) & known, (shown > 0) & known
    strict = (y & p).sum() / (y | p).sum() if (y | p).any() else 1.0
    return np.round([strict if y.any() else 1 - p.sum() / max(known.sum(), 1), strict], 6).tolist()


def class_score(true: NDArray, shown: NDArray, classes: int) -> list[float | None]:
    """IoU of every class in one picture, None where a class is neither true nor shown; the first is background."""
    known = true != IGNORE
    y, p = true[known], shown[known]
    unions = [((y == c) | (p == c)).sum() for c in range(classes)]
    return [round(float(((y == c) & (p == c)).sum() / n), 6) if n else None for c, n in enumerate(unions)]


def summarise(subset: str, clips: list[dict], oracles: Sequence[str]) -> dict:
    """How many clips there are, how many of them aligned, and J of every oracle, whose scores of every second a clip
    has under its name."""
    result = {"clips": len(clips), "aligned": sum(clip["group"] == "aligned" for clip in clips)}
    for oracle in oracles if clips else ():
        scores = np.array([second for clip in clips for second in clip[oracle]], dtype=float)
        if subset == "avss":
            counted = np.maximum((~np.isnan(scores)).sum(axis=0), 1)
            result[oracle] = {"J": float((np.nansum(scores, axis=0) / counted).mean())}
        else:
            result[oracle] = dict(zip(("J", "J_strict"), scores.mean(axis=0).tolist(), strict=True))
    return result
