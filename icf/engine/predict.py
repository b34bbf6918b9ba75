"""Segment what sounds in a video, or in a folder of pictures with a sound file, of any length in flat memory."""
from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import chain, islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from icf import __version__
from icf.config import Config
from icf.data import Clip, collate
from icf.data.audio import RATE, log_mel_examples
from icf.data.avsbench import class_palette, find_root, read_classes
from icf.data.folder import FrameFolder, open_frames
from icf.data.transforms import resize_frame
from icf.data.video import Video, open_video, read_sound, write_sound, write_video
from icf.engine.masks import class_map
from icf.machine import ahead
from icf.ops import use_backend

RECORD = "predictions.json"
OUTPUTS = ("masks", "overlay.mp4", "contact_sheet.png", RECORD)  # the record last: it marks a finished prediction
UNFINISHED = "unfinished"  # folder of what a prediction that failed had found out by then
FOREGROUND = (230, 40, 60)  # RGB of a binary mask in the overlay


@dataclass
class Second:
    """What is kept of one second: its place, the time of its picture, the picture for the model and a small one."""

    index: int
    time: float
    frame: Tensor  # [3,size,size] uint8
    thumbnail: Image.Image


@torch.inference_mode()
def predict(
    model: nn.Module, cfg: Config, source: Path, out: Path, *, device: torch.device | str = "cpu",
    threshold: float | None = None, silent_ok: bool = False, overlap: int = 0, batch: int = 1, amp: str = "no",
    progress: bool = True,
    classes: Sequence[str] | None = None, strict: bool = False,
) -> dict:
    """Segment `source` second by second and write masks, an overlay video, a contact sheet and a record to `out`.

    The source goes through the model in windows of `cfg.data.frames` seconds: pictures i + 15/16 s and their sound. The
    last window is completed by repeating its last picture with silence, and what the model says of that is dropped.
    Memory does not depend on the length of the source.

    `out` receives `masks/00000.png` ... (source size; 0 and 255, or class indices with a palette), `overlay.mp4` (every
    picture of the source under the mask of its second, with the sound), `contact_sheet.png` and `predictions.json`.
    They appear when all is done; those of an earlier prediction are replaced. Where something fails after seconds have
    been segmented, their masks and their record stay in `out/unfinished`. What the sound of the overlay needs is tried
    before the first second.

    Args:
        model: gives for a `Batch` in eval mode logits [B,T,1,h,w], or class scores [B,T,C,h,w].
        cfg: of the model: `data.size`, `data.frames`, `data.subset`, `data.audio_timing`, `eval.threshold`, `backend`.
        source: a video file, or a folder of pictures (one per second) with one sound file.
        out: folder, made if missing.
        threshold: of the probability of foreground, in 0..1; None for `cfg.eval.threshold`.
        silent_ok: take a source without sound track as silent.
        overlap: seconds that neighbouring windows share; their probabilities are averaged.
        batch: windows per step of the model.
        amp: `bf16` runs the model in mixed precision, which moves a few pixels of the masks; `no` does not.
        progress: show progress bars on stderr, and in the end say where the results are.
        classes: names of the classes from index 0 (background) on, for the record and the contact sheet; None for those
            of the data at `cfg.data.root`, or numbers where that is missing.
        strict: refuse a source with damaged pictures or sound, which are else left out with a warning.

    Returns:
        What is written to `predictions.json`.

    Raises:
        ValueError: one line, where the source is missing, broken or without sound, an argument is out of range,
            `out` holds other things under the names of the outputs, or `cfg.backend` cannot run here.
    """
    threshold = cfg.eval.threshold if threshold is None else threshold
    window = cfg.data.frames
    if not 0 <= overlap < window:
        raise ValueError(f"overlap: expected 0 to {window - 1} seconds for windows of {window}, got {overlap}")
    if batch < 1 or not 0 < threshold < 1:
        raise ValueError(f"batch and threshold: expected at least 1 and in 0..1, got {batch} and {threshold}")
    if amp not in ("no", "bf16"):
        raise ValueError(f"amp: expected no or bf16, got {amp}")
    source, out = Path(source), Path(out)
    material = open_frames(source, silent_ok) if source.is_dir() else open_video(source, silent_ok, strict)
    if source.resolve() == out.resolve():
        raise ValueError(f"{out}: the results need a folder of their own, not the one of the source")
    binary = cfg.model.classes == 1
    names = list(classes or _class_names(cfg))
    if len(names) != max(2, cfg.model.classes):
        raise ValueError(f"classes: expected {max(2, cfg.model.classes)} names with background, got {len(names)}")
    palette = np.array([(0, 0, 0), FOREGROUND], np.uint8) if binary else class_palette(len(names))  # [classes,3]
    model = model.to(device).eval()

    began, rows = perf_counter(), []
    record = {"version": __version__, "source": str(source), "width": material.width, "height": material.height,
              "sound": material.sound is not None, "window": window, "overlap": overlap, "threshold": threshold,
              "classes": names, "complete": False, "seconds": rows}
    with use_backend(cfg.backend), _staged(out, record) as folder, _bars(progress) as bar:
        (folder / "masks").mkdir()
        sound = folder / "sound.mp4" if material.sound else None
        if sound:
            write_sound(sound, material.sound, material.start, strict)
        sheet = ContactSheet(palette, names)
        seconds = _seconds(material, cfg.data.size)
        scores = _scores(model, cfg, material, seconds, overlap, batch, device, amp)
        for second, score in bar(scores, "segment", material.duration):
            mask, found = _mask(score, material.height, material.width, threshold, names)
            name = f"masks/{second.index:05d}.png"
            _save_mask(folder / name, mask, palette, binary)
            sheet.add(second, mask, found)
            rows.append({"second": second.index, "time": second.time, "mask": name,
                         "area": float((mask > 0).mean()), "classes": found})
        frames = ahead(_painted(material, folder, len(rows), palette), depth=4)
        total = material.duration and material.duration * float(material.frame_rate)
        write_video(folder / "overlay.mp4", bar(frames, "overlay", total), material.frame_rate, material.time_base,
                    sound, aspect=material.aspect)
        sheet.save(folder / "contact_sheet.png")
        record["complete"] = True
        _write_record(folder, record)
    if progress:
        print(f"{source}: {in_words(record)}; {len(rows) / (perf_counter() - began):.1f} s of video a second\n"
              f"  {out}: {', '.join(OUTPUTS)}")
    return record


def output_folders(sources: Sequence[Path], out: Path | None) -> list[Path]:
    """A folder for each source in `out`, or `predictions`: its name without ending where that tells them apart."""
    stems = Counter(source.stem for source in sources)
    names = [source.stem if stems[source.stem] == 1 else source.name for source in sources]
    if len({*names}) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"predict: several sources are named {twice!r}; predict them one by one, each with --output")
    return [(out or Path("predictions")) / name for name in names]


def in_words(record: dict) -> str:
    """What a prediction found: `sound seen in 7 of 12 s, 14 % of the picture`, and which classes for how long."""
    rows = record["seconds"]
    seen = [row for row in rows if row["area"]]
    words = f"sound seen in {len(seen)} of {len(rows)} s"
    if seen:
        words += f", {100 * sum(row['area'] for row in seen) / len(seen):.0f} % of the picture"
    counts = Counter(item["name"] for row in rows for item in row["classes"])
    if len(record["classes"]) > 2:
        words += "".join(f"; {name} {count} s" for name, count in counts.most_common())
    return words


def _write_record(folder: Path, record: dict) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _seconds(material: Video | FrameFolder, size: int) -> Iterator[Second]:
    for index, (time, picture) in enumerate(material.sampled()):
        image = Image.fromarray(picture)
        thumbnail = image.copy()
        thumbnail.thumbnail(ContactSheet.TILE)
        yield Second(index, float(time), resize_frame(image, size), thumbnail)


def _scores(
    model: nn.Module, cfg: Config, material: Video | FrameFolder, seconds: Iterable[Second], overlap: int, batch: int,
    device: torch.device | str, amp: str,
) -> Iterator[tuple[Second, Tensor]]:
    """Every second with its foreground probability [1,h,w] or class scores [C,h,w], averaged over the windows."""
    step = cfg.data.frames - overlap
    pending: dict[int, list] = {}  # second -> [Second, sum of scores, number of windows]
    sounds = _sound_windows(material, cfg.data.frames, step)
    windows = ((window, _clip(cfg, window, sound))
               for window, sound in zip(_windows(seconds, cfg.data.frames, step), sounds, strict=False))
    windows = ahead(windows, depth=batch)
    while group := list(islice(windows, batch)):
        inputs = collate([clip for _, clip in group]).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp == "bf16"):
            scores = model(inputs).float()                                    # [B,T,C,h,w]
        if scores.shape[2] == 1:
            scores = scores.sigmoid()
        for (window, _), score in zip(group, scores, strict=True):
            for second, value in zip(window, score, strict=False):            # without the repeated pictures
                entry = pending.setdefault(second.index, [second, 0, 0])
                entry[1], entry[2] = entry[1] + value, entry[2] + 1
            for index in range(window[0].index, min(window[0].index + step, window[-1].index + 1)):
                second, total, count = pending.pop(index)
                yield second, total / count
    for second, total, count in pending.values():
        yield second, total / count


def _windows(seconds: Iterable[Second], size: int, step: int) -> Iterator[list[Second]]:
    """Up to `size` seconds every `step`; a shorter last one only where it holds a second that is in no other."""
    held: list[Second] = []
    for second in seconds:
        held.append(second)
        if len(held) == size:
            yield held
            held = held[step:]
    if held and (held[0].index == 0 or len(held) > size - step):
        yield held


def _sound_windows(material: Video | FrameFolder, size: int, step: int) -> Iterator[np.ndarray]:
    """Sound [16000 * size] every `step` seconds, without end: silence follows the sound."""
    pieces = chain(read_sound(material.sound, material.start) if material.sound else (),
                   repeat(np.zeros(RATE, np.float32)))
    held: list[np.ndarray] = []
    while True:
        while sum(map(len, held)) < RATE * size:
            held.append(next(pieces))
        sound = np.concatenate(held)
        yield sound[:RATE * size]
        held = [sound[RATE * step:]]


def _clip(cfg: Config, window: list[Second], sound: np.ndarray) -> Clip:
    """The model's view of a window, completed by its last picture and silence."""
    length = cfg.data.frames
    frames = torch.stack([second.frame for second in window + window[-1:] * (length - len(window))])  # [T,3,size,size]
    waveform = torch.from_numpy(sound).clone()
    waveform[RATE * len(window):] = 0
    pad = "zero" if cfg.data.subset == "avss" else "repeat"
    real = torch.ones(length, dtype=torch.bool)
    return Clip(frames=frames, log_mel=log_mel_examples(waveform, cfg.data.audio_timing, length, pad),
                masks=torch.zeros(length, *frames.shape[2:], dtype=torch.uint8), frame_mask=real, label_mask=~real,
                name=f"{window[0].index:05d}")


def _mask(
    score: Tensor, height: int, width: int, threshold: float, names: Sequence[str]
) -> tuple[np.ndarray, list[dict]]:
    """Mask [height,width] uint8 of foreground probability [1,h,w] or class scores [C,h,w], and what it shows.

    Scores are enlarged bilinearly before the decision, of the classes that win somewhere; so outlines are smooth, and
    enlarging brings up no further class.
    """
    if len(score) == 1:
        candidates = torch.tensor([1])
        full = _enlarge(score, height, width)                                 # [1,height,width]
        mask = (full[0] > threshold).to(torch.uint8)
    else:
        candidates = class_map(score[None]).unique().long()                   # [K]
        full = _enlarge(score[candidates.to(score.device)], height, width)    # [K,height,width]
        mask = candidates.to(torch.uint8).to(score.device)[full.argmax(0)]
    found = []
    for index, channel in zip(candidates.tolist(), full, strict=True):
        inside = mask == index
        area = inside.sum().item()
        if index and area:
            found.append({"index": index, "name": names[index], "area": area / mask.numel(),
                          "score": channel[inside].mean().item()})
    return mask.cpu().numpy(), sorted(found, key=lambda item: -item["area"])


def _enlarge(score: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(score[None], (height, width), mode="bilinear", align_corners=False)[0]


def _class_names(cfg: Config) -> list[str]:
    """Names from the data that the model was made for, where they are at hand, else numbers."""
    if cfg.model.classes == 1:
        return ["background", "sounding"]
    try:
        names = read_classes(find_root(cfg.data.root, "avss") if cfg.data.subset == "avss" else Path(cfg.data.root))
    except (FileNotFoundError, ValueError):
        names = []
    return names if len(names) == cfg.model.classes else [
        "background", *(f"class {index}" for index in range(1, cfg.model.classes))]


def _save_mask(path: Path, mask: np.ndarray, palette: np.ndarray, binary: bool) -> None:
    if binary:
        Image.fromarray(mask * np.uint8(255)).save(path)
        return
    image = Image.fromarray(mask).convert("P")
    image.putpalette(palette.tobytes())
    image.save(path)


class Paint:
    """The colours of one mask, laid over pictures: half transparent, with a solid outline.

    Args:
        mask: [height,width] uint8, index into `palette`, 0 for nothing.
        palette: [classes,3] uint8.
    """

    def __init__(self, mask: np.ndarray, palette: np.ndarray) -> None:
        reach, inside = max(1, min(mask.shape) // 240), mask > 0
        outline = inside & (_spread(mask, reach, np.maximum) != _spread(mask, reach, np.minimum))
        bits = np.stack([~inside, inside & ~outline]) * np.uint8(255)           # [2,height,width], 255 where it is so
        self.clear, self.half = bits.repeat(3, axis=2).reshape(2, *mask.shape, 3)
        self.add = np.take(palette, mask, axis=0)                              # [height,width,3]
        self.add >>= self.half & 1

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """A painted copy of [height,width,3] uint8."""
        painted = picture >> 1  # whole arrays and one number: loops that numpy vectorises
        painted &= self.half
        painted |= picture & self.clear
        painted += self.add
        return painted


def _spread(mask: np.ndarray, reach: int, pick: np.ufunc) -> np.ndarray:
    """The largest (`np.maximum`) or smallest value within `reach` pixels of each, in the square: [height,width]."""
    for _ in range(2):  # columns, then rows, as columns of the turned mask
        padded, height = np.pad(mask, ((reach, reach), (0, 0)), "edge"), len(mask)
        mask = reduce(pick, (padded[place:place + height] for place in range(2 * reach + 1))).T
    return mask


def _painted(material: Video | FrameFolder, folder: Path, seconds: int, palette: np.ndarray) -> Iterator[tuple]:
    """All pictures with their times under the mask of their second; the last mask stays for what follows it."""
    current, paint = -1, None
    for time, picture in material.frames():
        second = min(int(time), seconds - 1)
        if second != current:
            with Image.open(folder / "masks" / f"{second:05d}.png") as image:
                mask = np.minimum(image, len(palette) - 1)  # 255 of a binary mask is 1
            current, paint = second, Paint(mask, palette)
        yield time, paint(picture)


class ContactSheet:
    """Picture | overlay pairs with their times and what was found, at most `LIMIT` of them, evenly spread however many
    are added, under a legend of the colours.

    Args:
        palette: [classes,3] uint8.
        names: of the classes.
    """

    TILE, LIMIT, COLUMNS = (240, 180), 24, 3  # pixels; pairs; pairs in a row
    GAP, SPACE, LINE = 6, 18, 18  # pixels between picture and overlay, around a pair, of a line of text
    WIDTH = 420  # pixels that the head needs

    def __init__(self, palette: np.ndarray, names: Sequence[str]) -> None:
        self.palette, self.names, self.every, self.pairs, self.seen = palette, names, 1, [], {}

    def add(self, second: Second, mask: np.ndarray, found: list[dict]) -> None:
        self.seen.update({item["index"]: None for item in found})
        if second.index % self.every:
            return
        small = np.asarray(Image.fromarray(mask).resize(second.thumbnail.size, Image.Resampling.NEAREST))
        picture = np.asarray(second.thumbnail)
        caption = f"{second.time:.2f} s: " + (", ".join(
            f"{item['name'] if len(self.palette) > 2 else ''} {100 * item['area']:.0f} %".strip() for item in found)
            or "nothing sounds")
        gap = np.full((picture.shape[0], self.GAP, 3), 255, np.uint8)
        self.pairs.append((caption, np.hstack((picture, gap, Paint(small, self.palette)(picture)))))
        if len(self.pairs) > self.LIMIT:
            self.pairs, self.every = self.pairs[::2], self.every * 2

    def save(self, path: Path) -> None:
        height, width = self.pairs[0][1].shape[:2]
        columns = min(self.COLUMNS, len(self.pairs))
        rows = -(-len(self.pairs) // columns)
        step_x, step_y, top = width + self.SPACE, height + self.LINE + self.SPACE, self.SPACE + 2 * self.LINE
        sheet = Image.new("RGB", (max(columns * step_x + self.SPACE, self.WIDTH), rows * step_y + top), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
        draw.text((self.SPACE, self.SPACE // 2), "picture and what sounds in it, second by second", "black", font)
        x, y = self.SPACE, self.SPACE // 2 + self.LINE
        for index in sorted(self.seen):
            draw.rectangle((x, y + 2, x + 12, y + 14), fill=tuple(self.palette[index].tolist()))
            draw.text((x + 18, y), self.names[index], "black", font)
            x += 36 + draw.textlength(self.names[index], font)
        for place, (text, pair) in enumerate(self.pairs):
            x, y = self.SPACE + place % columns * step_x, top + place // columns * step_y
            while draw.textlength(text, font) > width + self.SPACE // 2:
                text = text[:-2].rstrip("…") + "…"
            draw.text((x, y), text, "black", font)
            sheet.paste(Image.fromarray(pair), (x, y + self.LINE))
        sheet.save(path)


@contextmanager
def _staged(out: Path, record: dict) -> Iterator[Path]:
    """A temporary folder in `out`, whose `OUTPUTS` move to `out` when the block ends well. Otherwise they vanish, but
    for the masks of the seconds that are in `record`, which move to `UNFINISHED` with it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a folder, got a file")
    taken = [name for name in OUTPUTS if (out / name).exists()]
    if taken and not (out / RECORD).is_file():
        raise ValueError(f"{out}: holds {taken[0]} but no {RECORD}, so no earlier prediction; name another folder")
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=".partial-", dir=out) as folder:
            try:
                yield Path(folder)
            except BaseException:
                if record["seconds"]:
                    _write_record(Path(folder), record)
                    _replace(Path(folder), out / UNFINISHED, ("masks", RECORD))
                    warnings.warn(f"{out / UNFINISHED} holds the {len(record['seconds'])} s that had been segmented",
                                  stacklevel=3)
                raise
            (out / RECORD).unlink(missing_ok=True)
            _replace(Path(folder), out, OUTPUTS)
            shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    except BaseException:
        if new and not any(out.iterdir()):
            out.rmdir()
        raise


def _replace(folder: Path, out: Path, names: Iterable[str]) -> None:
    """Move files and folders of these names to `out`, in their order, in place of those that are there."""
    out.mkdir(exist_ok=True)
    for name in names:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        os.replace(folder / name, out / name)


@contextmanager
def _bars(show: bool) -> Iterator[Callable]:
    """A function `bar(items, text, total)` that passes items through and shows how many of `total` (or None) went."""
    columns = (TextColumn("{task.description:>8}"), BarColumn(), TextColumn("{task.completed:.0f}"),
               TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as display:

        def bar(items: Iterable, text: str, total: float | None) -> Iterator:
            task = display.add_task(text, total=total)
            for item in items:
                yield item
                display.advance(task)
            display.update(task, total=display.tasks[task].completed)

        yield bar
