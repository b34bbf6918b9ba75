"""The toy benchmark: moving shapes with a timbre each, written in the layouts of AVSBench, quirks included.

It carries the problem of the paper in small. One shape of every clip is salient: large, of strong contrast and fast. In
the training and validation splits it is nearly always the salient shape that sounds, in the test split it is so by
chance only; a model that ignores the sound and segments what stands out does well on the one and badly on the other.

Quirks on purpose, which `icf data check` reports: in every split one sound ends early, one is stereo, one at 44.1 kHz,
and one folder of labels holds a `.DS_Store`; the rest of a shape that another one hides may be a stray component.

Every clip is drawn from (seed, source, split, index) alone, so that neither the order nor the number of processes
matters. A source is what a clip is made like: `s4` (one shape sounds throughout), `ms3` (several sound, with pauses and
sounds from off the screen) or `v2` (the same for 10 s). AVSS holds clips of all three, as AVSBench-semantic does.
"""
from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from PIL import Image

from icf.data.audio import OFFSET, RATE, fit_examples, log_mel_examples, resample
from icf.data.avsbench import MANIFEST, class_palette, read_manifest

if TYPE_CHECKING:
    from icf.config import ToyConfig

VERSION = 1
SPLITS = ("train", "val", "test")
CLASSES = ("cross", "disc", "ring", "square", "star", "triangle")  # alphabetical, as in AVSBench-semantic
FOLDERS = {"s4": "Single-source", "ms3": "Multi-sources", "avss": "AVSBench_semantic"}
SECONDS = {"s4": 5, "ms3": 5, "v2": 10}
LABELS = {"s4": "v1s", "ms3": "v1m", "v2": "v2"}  # of a source within AVSS
SOURCES = {"s4": ("s4",), "ms3": ("ms3",), "avss": ("s4", "ms3", "v2")}

# Clips of train, val and test. `small` keeps all three subsets below 200 MB, most of which is sound; the published
# layouts hold about 0.3 MB of sound and log-mel for a clip, whatever the pictures are like.
SIZES = {
    "tiny": {"s4": {"s4": (24, 8, 12)}, "ms3": {"ms3": (16, 6, 8)},
             "avss": {"s4": (12, 4, 6), "ms3": (6, 3, 4), "v2": (12, 4, 6)}},
    "small": {"s4": {"s4": (288, 40, 80)}, "ms3": {"ms3": (80, 16, 32)},
              "avss": {"s4": (32, 6, 10), "ms3": (16, 4, 8), "v2": (40, 8, 12)}},
    "full": {"s4": {"s4": (3452, 740, 740)}, "ms3": {"ms3": (296, 64, 64)},
             "avss": {"s4": (3452, 740, 740), "ms3": (296, 64, 64), "v2": (4750, 500, 750)}},
}

SIDE = 224  # pixels of S4's and MS3's frames
WIDE = (320, 180)  # width and height of AVSS' frames
MOMENT = 15 / 16  # s into its second at which a frame is taken, as in AVSBench
EXTENT = 1.2  # no shape reaches farther than this many radii
OVERLAP = 0.3  # of the smaller of two shapes, at most
SHORT = {5: int(4.81 * RATE), 10: int(9.61 * RATE)}  # samples of the one clip per split whose sound ends early
SILENT, OFF_SCREEN = 0.25, 0.15  # shares of clips with pauses and with sounds from elsewhere

# radius in pixels, speed in pixels per second, contrast of the weaker and of the stronger tone
SALIENT = {"radius": (36, 52), "speed": (15, 25), "contrast": ((0.50, 0.55), (0.60, 0.75))}
PLAIN = {"radius": (18, 26), "speed": (3, 8), "contrast": ((0.10, 0.14), (0.18, 0.25))}


@dataclass(frozen=True)
class Settings:
    """What a subset is drawn from; see `generate`."""

    size: str = "small"
    seed: int = 0
    bias: float = 0.9
    visible: tuple[int, int] = (2, 3)
    gap: float = 1.0
    val_bias: float | None = None
    clips: tuple[int, int, int] | None = None

    def __post_init__(self):
        object.__setattr__(self, "visible", tuple(self.visible))
        object.__setattr__(self, "clips", None if self.clips is None else tuple(self.clips))
        lowest, highest = self.visible
        for ok, name, expected in (
            (self.size in SIZES, "size", f"one of {tuple(SIZES)}"),
            (0 <= self.bias <= 1, "bias", "0 to 1"),
            (self.val_bias is None or 0 <= self.val_bias <= 1, "val_bias", "0 to 1"),
            (0 <= self.gap <= 1, "gap", "0 to 1"),
            (1 <= lowest <= highest < len(CLASSES), "visible", f"two numbers within 1..{len(CLASSES) - 1}"),
            (self.clips is None or (len(self.clips) == 3 and min(self.clips) >= 1), "clips", "three counts from 1"),
        ):
            if not ok:
                raise ValueError(f"toy.{name}: expected {expected}, got {getattr(self, name)}")

    def counts(self, subset: str) -> dict[str, tuple[int, ...]]:
        """Clips of every source and split; given `clips` are shared out among the sources of AVSS."""
        if self.clips is None:
            return SIZES[self.size][subset]
        sources = SOURCES[subset]
        return {s: tuple(-(-(n - i) // len(sources)) for n in self.clips) for i, s in enumerate(reversed(sources))}

    def chance(self, split: str, sounding: int, visible: int) -> float:
        """Probability that the salient shape is among those that sound."""
        if split == "test":
            return sounding / visible
        return self.bias if split == "train" or self.val_bias is None else self.val_bias


# ---- What a clip shows and plays ----


@dataclass
class Shape:
    """One shape: its form, its way and its look."""

    kind: str
    salient: bool
    radius: float
    angle: float
    start: NDArray  # [2] x, y in pixels
    velocity: NDArray  # [2] pixels per second
    tones: NDArray  # [2,3] in 0..1
    texture: str
    period: float
    grid: NDArray  # [16,16] of 0 and 1, for the texture `noise`
    sounding: tuple[bool, ...] = ()

    def centre(self, time: float) -> NDArray:
        """Straight motion, reflected where the shape would leave the frame."""
        low, high = EXTENT * self.radius, SIDE - EXTENT * self.radius
        way = (self.start + self.velocity * time - low) % (2 * (high - low))
        return low + np.minimum(way, 2 * (high - low) - way)


@dataclass
class Scene:
    """A clip: shapes from back to front, sounds from off the screen, and the picture behind."""

    shapes: list[Shape]
    elsewhere: list[tuple[str, tuple[bool, ...]]]
    background: NDArray  # [SIDE,SIDE,3] in 0..1
    seconds: int

    @property
    def aligned(self) -> bool:
        return all(any(shape.sounding) for shape in self.shapes if shape.salient)


def compose(settings: Settings, source: str, split: str, rng: np.random.Generator) -> Scene:
    """Draw a clip."""
    seconds = SECONDS[source]
    visible = int(rng.integers(settings.visible[0], settings.visible[1] + 1))
    kinds = [CLASSES[i] for i in rng.permutation(len(CLASSES))]
    sounding = int(rng.integers(1, max(1, min(visible - 1, 2 if source == "ms3" else 3)) + 1)) if source != "s4" else 1
    others = (1 + rng.permutation(visible - 1)).tolist()  # shape 0 is the salient one
    heard = rng.random() < settings.chance(split, sounding, visible) or visible == 1
    chosen = [0, *others[:sounding - 1]] if heard else others[:sounding]

    schedules = _schedules(source, sounding, rng)
    background, base = _background(rng)
    shapes = [_shape(kinds[i], i == 0, settings.gap, base, rng) for i in range(visible)]
    for i, shape in enumerate(shapes):
        shape.sounding = schedules[chosen.index(i)] if i in chosen else (False,) * seconds
    elsewhere = []
    if source != "s4" and rng.random() < OFF_SCREEN:
        elsewhere = [(kinds[visible], _patterns(seconds)[rng.integers(len(_patterns(seconds)))])]
    shapes = [shapes[i] for i in rng.permutation(visible)]
    _place(shapes, seconds, rng)
    return Scene(shapes, elsewhere, background, seconds)


def _shape(kind: str, salient: bool, gap: float, base: NDArray, rng: np.random.Generator) -> Shape:
    look = SALIENT if salient else _between(SALIENT, PLAIN, gap)
    angle = rng.uniform(0, 2 * np.pi)
    speed = rng.uniform(*look["speed"])
    # The salient shape's tones go where there is room for its contrast, the others' up or down at will.
    up = base < 0.5 if salient else rng.random(3) < 0.5
    amounts = np.array([rng.uniform(*span) for span in look["contrast"]])
    tones = np.clip(base + np.where(up, 1, -1) * amounts[:, None], 0, 1)
    return Shape(
        kind=kind, salient=salient, radius=rng.uniform(*look["radius"]), angle=rng.uniform(-0.2, 0.2),
        start=np.zeros(2), velocity=speed * np.array([np.cos(angle), np.sin(angle)]), tones=tones,
        texture=("stripes", "checks", "dots", "noise")[rng.integers(4)], period=rng.uniform(6, 12),
        grid=rng.integers(0, 2, (16, 16)))


def _between(a, b, share: float):
    """`a` at 0, `b` at 1, in dictionaries and tuples of numbers."""
    if isinstance(a, dict):
        return {key: _between(a[key], b[key], share) for key in a}
    if isinstance(a, tuple):
        return tuple(_between(x, y, share) for x, y in zip(a, b, strict=True))
    return a + share * (b - a)


def _background(rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """Smooth noise [SIDE,SIDE,3] in few levels, which keeps the files small, and its mean colour [3]."""
    base = rng.uniform(0.35, 0.65, 3)
    knots = rng.uniform(-0.1, 0.1, (5, 5, 3))
    where = np.linspace(0, 4, SIDE)
    left = np.minimum(where.astype(int), 3)
    share = where - left
    share = share * share * (3 - 2 * share)
    weights = np.zeros((SIDE, 5))
    weights[np.arange(SIDE), left], weights[np.arange(SIDE), left + 1] = 1 - share, share
    noise = np.einsum("yi,xj,ijc->yxc", weights, weights, knots, optimize=True)
    return np.round((base + noise) * 48) / 48, base


def _place(shapes: list[Shape], seconds: int, rng: np.random.Generator) -> None:
    """Choose starts such that no two shapes overlap by more than `OVERLAP`, with less speed where there is no room."""
    for attempt in itertools.count(1):
        for shape in shapes:
            shape.start = rng.uniform(EXTENT * shape.radius, SIDE - EXTENT * shape.radius, 2)
            if attempt % 40 == 0:
                shape.velocity = shape.velocity / 2
        times = [second + MOMENT for second in range(seconds)]
        if all(_apart(a, b, time) for a, b in itertools.combinations(shapes, 2) for time in times):
            return


def _apart(a: Shape, b: Shape, time: float) -> bool:
    """Whether two shapes overlap by no more than `OVERLAP`, judged on every fourth pixel."""
    if np.hypot(*(a.centre(time) - b.centre(time))) > EXTENT * (a.radius + b.radius):
        return True
    y, x = np.mgrid[2:SIDE:4, 2:SIDE:4]
    one, two = covers(a, x, y, time), covers(b, x, y, time)
    return (one & two).sum() <= OVERLAP * min(one.sum(), two.sum())


@lru_cache(maxsize=4)
def _patterns(seconds: int) -> list[tuple[bool, ...]]:
    """All ways of sounding in some of the seconds with runs of at least two seconds on and off."""
    every = itertools.product((False, True), repeat=seconds)
    return [p for p in every if any(p) and all(len(list(run)) >= 2 for _, run in itertools.groupby(p))]


def _schedules(source: str, sounding: int, rng: np.random.Generator) -> list[tuple[bool, ...]]:
    """Who sounds when: throughout in S4; else with a pause of all in a share `SILENT` of the clips."""
    seconds = SECONDS[source]
    if source == "s4":
        return [(True,) * seconds]
    pause = rng.random() < SILENT
    patterns = _patterns(seconds)
    while True:
        drawn = [patterns[i] for i in rng.integers(len(patterns), size=sounding)]
        together = tuple(map(any, zip(*drawn, strict=True)))
        if together in patterns and all(together) != pause:
            return drawn


# ---- Pictures ----


def _local(shape: Shape, x: NDArray, y: NDArray, time: float) -> tuple[NDArray, NDArray]:
    """Coordinates in pixels from the centre of the shape, along its axes."""
    cx, cy = shape.centre(time)
    c, s = np.cos(shape.angle), np.sin(shape.angle)
    return c * (x - cx) + s * (y - cy), c * (y - cy) - s * (x - cx)


def covers(shape: Shape, x: NDArray, y: NDArray, time: float) -> NDArray:
    """Which of the points the shape covers, without anti-aliasing."""
    u, v = _local(shape, x, y, time)
    return INSIDE[shape.kind](u / shape.radius, v / shape.radius)


def _star(u, v):
    """Five points: outside radius 1.2, inside 0.55; the angle is folded onto half a point."""
    fold = np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + fold) % (2 * fold) - fold)
    rho = np.hypot(u, v)
    px, py = rho * np.cos(angle), rho * np.sin(angle)
    ix, iy = 0.55 * np.cos(fold), 0.55 * np.sin(fold)
    return (ix - 1.2) * py - iy * (px - 1.2) >= 0


INSIDE = {
    "disc": lambda u, v: u * u + v * v <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.84,
    "triangle": lambda u, v: np.maximum(v, np.abs(u) * np.sqrt(0.75) - v / 2) <= 0.6,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.85) <= 0.25,
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) <= 0.32) & (np.maximum(np.abs(u), np.abs(v)) <= 1.1),
    "star": _star,
}


def _texture(shape: Shape, u: NDArray, v: NDArray) -> NDArray:
    """0 or 1 for every point: which of the two tones it has."""
    u, v = u / shape.period, v / shape.period
    if shape.texture == "stripes":
        return np.floor(u + v).astype(int) % 2
    if shape.texture == "checks":
        return (np.floor(u) + np.floor(v)).astype(int) % 2
    if shape.texture == "dots":
        return (np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.32).astype(int)
    return shape.grid[np.floor(2 * u).astype(int) % 16, np.floor(2 * v).astype(int) % 16]


def draw(scene: Scene, time: float) -> tuple[NDArray, NDArray]:
    """The picture [SIDE,SIDE,3] uint8 at a time in s, and the shape seen at every pixel [SIDE,SIDE] int, or -1."""
    image = scene.background.copy()
    seen = np.full((SIDE, SIDE), -1)
    for index, shape in enumerate(scene.shapes):
        reach = EXTENT * shape.radius
        (x0, y0), (x1, y1) = ((shape.centre(time) + d).round().astype(int) for d in (-reach - 1, reach + 2))
        window = np.s_[max(y0, 0):min(y1, SIDE), max(x0, 0):min(x1, SIDE)]
        y, x = np.mgrid[window]
        inside = covers(shape, x, y, time)
        image[window][inside] = shape.tones[_texture(shape, *_local(shape, x, y, time))[inside]]
        seen[window][inside] = index
    return np.round(image * 255).astype(np.uint8), seen


# ---- Sounds ----


def timbre(kind: str, samples: int, rng: np.random.Generator, jitter: float = 0.03) -> NDArray:
    """The sound of a class [samples] at 16 kHz, of root mean square 1; `jitter` varies its pitch."""
    time = np.arange(samples) / RATE
    pitch = 1 + jitter * rng.uniform(-1, 1)

    def partials(f0, orders):
        return sum(np.sin(2 * np.pi * (n * f0 * pitch * time + rng.random())) / n for n in orders)

    if kind == "disc":
        sound = partials(220, range(1, 9))
    elif kind == "square":
        sound = partials(330, range(1, 16, 2))
    elif kind == "triangle":  # a bell by frequency modulation, struck four times per second
        strike = np.exp(-12 * (time % 0.25))
        carrier = 2 * np.pi * 880 * pitch * time
        sound = strike * np.sin(carrier + 5 * strike * np.sin(1.4 * carrier))
    elif kind == "ring":  # noise between 2 and 4 kHz that swells eight times per second
        spectrum = np.fft.rfft(rng.standard_normal(samples))
        frequency = np.fft.rfftfreq(samples, 1 / RATE) / pitch
        spectrum[(frequency < 2000) | (frequency > 4000)] = 0
        sound = np.fft.irfft(spectrum, samples) * (1 + 0.9 * np.sin(2 * np.pi * 8 * time))
    elif kind == "cross":  # clicks of 2 ms, twelve per second
        sound = np.where(time * 12 * pitch % 1 < 0.002 * 12 * pitch, rng.uniform(-1, 1, samples), 0)
    else:  # star: a sweep from 400 to 3000 Hz every half second
        rise = np.log(3000 / 400) / 0.5
        sound = np.sin(2 * np.pi * 400 * pitch * np.expm1(rise * (time % 0.5)) / rise)
    return sound / np.sqrt(np.mean(sound**2))


def play(scene: Scene, rng: np.random.Generator) -> NDArray:
    """The sound of a clip, int16 [seconds * 16000]: every source from -20 to -14 dBFS over a floor of -60 dBFS."""
    samples = scene.seconds * RATE
    mix = 10 ** (-60 / 20) * rng.standard_normal(samples)
    ramp = np.ones(RATE // 100) / (RATE // 100)  # 10 ms
    for kind, sounding in [(shape.kind, shape.sounding) for shape in scene.shapes] + scene.elsewhere:
        if any(sounding):
            gate = np.convolve(np.repeat(sounding, RATE).astype(float), ramp, mode="same")
            mix += 10 ** (rng.uniform(-20, -14) / 20) * gate * timbre(kind, samples, rng)
    mix *= min(1, 10 ** (-1 / 20) / np.abs(mix).max())
    return np.round(mix * 32767).astype(np.int16)


@lru_cache(maxsize=1)
def _spectra() -> NDArray:
    """Mean mel spectrum of every timbre at -20 dBFS and without jitter [64,6]."""
    sounds = [0.1 * timbre(kind, 5 * RATE, np.random.default_rng(0), jitter=0) for kind in CLASSES]
    return np.stack([_mel(examples(sound)).mean(axis=0) for sound in sounds], axis=1)


def examples(sound: NDArray) -> NDArray:
    """Log-mel examples [n,1,96,64] of a sound, int16 or floating point, by the front end that training uses."""
    if sound.dtype == np.int16:
        sound = sound / 32768
    return log_mel_examples(torch.from_numpy(sound)).numpy()


def _mel(log_mel: NDArray) -> NDArray:
    """Mean mel magnitudes [n,64] of log-mel examples [n,1,96,64]."""
    return np.exp(log_mel[:, 0].astype(np.float64)).mean(axis=1) - OFFSET


def hear(log_mel: NDArray, most: int) -> list[set[str]]:
    """The classes that sound in every example [n,1,96,64], judged by ear: those at most `most` timbres whose spectra,
    each at its best level, add up to the example's. The weights make weak bands count and the 0.2 per timbre keeps
    timbres out that explain next to nothing; what lies 10 dB below -20 dBFS is not taken for a source."""
    timbres, heard = _spectra(), []
    for spectrum in _mel(log_mel):
        weight = 1 / (np.sqrt(np.maximum(spectrum, 0)) + 0.05)
        best, chosen = np.square(weight * spectrum).sum(), ()
        for n in range(1, most + 1):
            for some in itertools.combinations(range(len(CLASSES)), n):
                parts = timbres[:, some] * weight[:, None]
                levels = np.linalg.lstsq(parts, spectrum * weight, rcond=None)[0]
                error = np.square(spectrum * weight - parts @ levels).sum() + 0.2 * n
                if error < best and levels.min() > 10 ** (-10 / 20):
                    best, chosen = error, some
        heard.append({CLASSES[i] for i in chosen})
    return heard


# ---- Files ----


@dataclass(frozen=True)
class Task:
    """One clip to be written into the folder of a subset."""

    settings: Settings
    subset: str
    source: str
    split: str
    index: int
    folder: Path

    @property
    def name(self) -> str:
        """Video id: unique over all sources and splits."""
        return f"{self.source}_{self.split}_{self.index:05d}"


def write_clip(task: Task) -> dict:
    """Draw a clip and write its files; returns its entry in the manifest."""
    rng = np.random.default_rng((task.settings.seed, sorted(SECONDS).index(task.source), SPLITS.index(task.split),
                                 task.index))
    scene = compose(task.settings, task.source, task.split, rng)
    sound = play(scene, rng)[:SHORT[scene.seconds] if task.index == 0 else None]
    pictures, owners = zip(*(draw(scene, i + MOMENT) for i in range(scene.seconds)), strict=True)
    log_mel = examples(sound)
    write = _write_avss if task.subset == "avss" else _write_binary
    name = write(task, scene, np.stack(pictures), np.stack(owners), sound, log_mel)
    truth = [{k for k, shape in enumerate(scene.shapes) if shape.sounding[i]} for i in range(scene.seconds)]
    salient = [{k for k, shape in enumerate(scene.shapes) if shape.salient}] * scene.seconds
    ears = hear(log_mel, 1 if task.source == "s4" else 3)
    ears += ears[-1:] * (scene.seconds - len(ears))  # the sound that ends early
    audio = [{k for k, shape in enumerate(scene.shapes) if shape.kind in heard} for heard in ears]
    score = _class_scores if task.subset == "avss" else _binary_scores
    return {
        "name": name,
        "split": task.split,
        "label": LABELS[task.source],
        "group": "aligned" if scene.aligned else "conflicting",
        "shapes": [{"class": shape.kind, "salient": shape.salient, "sounding": [int(on) for on in shape.sounding],
                    "boxes": [_box(owner == k) for owner in owners]} for k, shape in enumerate(scene.shapes)],
        "off_screen": [{"class": kind, "sounding": [int(on) for on in flags]} for kind, flags in scene.elsewhere],
        "sha256": {"frames": _sha(np.stack(pictures)), "sound": _sha(sound),
                   "masks": _sha(np.stack([_mask(o, shapes) for o, shapes in zip(owners, truth, strict=True)]))},
        "salience": score(scene, owners, truth, salient),
        "audio": score(scene, owners, truth, audio),
    }


def _sha(array: NDArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _mask(owner: NDArray, shapes: set[int]) -> NDArray:
    return np.isin(owner, list(shapes))


def _box(mask: NDArray) -> list[int]:
    """x0, y0, x1, y1 of what is seen of a shape, the ends exclusive; zeros where all of it is hidden."""
    if not mask.any():
        return [0, 0, 0, 0]
    ys, xs = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return [int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1]


def _binary_scores(scene: Scene, owners, truth, shown) -> list[list[float]]:
    """[J as published, J strict] of every second; they differ where nothing sounds."""
    scores = []
    for owner, true, predicted in zip(owners, truth, shown, strict=True):
        y, p = _mask(owner, true), _mask(owner, predicted)
        strict = (y & p).sum() / (y | p).sum() if (y | p).any() else 1.0
        scores.append([strict if y.any() else 1 - p.mean(), strict])
    return np.round(scores, 6).tolist()


def _class_scores(scene: Scene, owners, truth, shown) -> list[list[float | None]]:
    """IoU of every class in every second, None where a class is neither true nor predicted; the first is background."""
    scores = []
    for owner, true, predicted in zip(owners, truth, shown, strict=True):
        y, p = (_indices(scene, owner, shapes) for shapes in (true, predicted))
        unions = [((y == c) | (p == c)).sum() for c in range(len(CLASSES) + 1)]
        scores.append([round(float(((y == c) & (p == c)).sum() / n), 6) if n else None for c, n in enumerate(unions)])
    return scores


def _indices(scene: Scene, owner: NDArray, shapes: set[int]) -> NDArray:
    """Class index of every pixel: 1.. where one of the shapes is seen, else 0."""
    table = [1 + CLASSES.index(shape.kind) if k in shapes else 0 for k, shape in enumerate(scene.shapes)]
    return np.array([*table, 0], dtype=np.uint8)[owner]  # the last for owner -1


def _write_binary(task: Task, scene: Scene, pictures, owners, sound, log_mel) -> str:
    """A clip in the layout of S4 or MS3."""
    base, name = task.folder / f"{task.subset}_data", task.name
    if task.subset == "s4":
        clip = Path(task.split, _category(scene), name)
        frames, stem, labelled = base / "visual_frames" / clip, name, 1 if task.split == "train" else scene.seconds
    else:
        clip = Path(task.split, name)
        frames, stem, labelled = base / "visual_frames" / name, f"{name}.mp4", scene.seconds
    masks = base / "gt_masks" / clip
    for folder in (frames, masks):
        folder.mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(frames / f"{stem}_{i + 1}.png", compress_level=3)
        if i < labelled:
            mask = _mask(owners[i], {k for k, shape in enumerate(scene.shapes) if shape.sounding[i]})
            _save_mask(masks / f"{name}_{i + 1}.png", mask, palette=task.subset == "ms3" and task.index % 2 == 1)
    if task.index == 3:
        (masks / ".DS_Store").write_bytes(b"")
    _write_sound(base / "audio_wav" / clip.with_name(f"{name}.wav"), sound, task.index)
    if task.settings.size != "small":
        path = base / "audio_log_mel" / clip.with_name(f"{name}.pkl")
        path.parent.mkdir(parents=True, exist_ok=True)
        tensor = fit_examples(torch.from_numpy(log_mel), scene.seconds).requires_grad_()
        path.write_bytes(pickle.dumps(tensor))
    return name


def _category(scene: Scene) -> str:
    return next(shape.kind for shape in scene.shapes if any(shape.sounding))


def _save_mask(path: Path, mask: NDArray, palette: bool) -> None:
    if palette:
        image = Image.fromarray(mask.astype(np.uint8), mode="P")
        image.putpalette([0, 0, 0, 255, 255, 255])
    else:
        image = Image.fromarray(mask.astype(np.uint8) * 255)
    image.save(path, compress_level=3)


def _write_sound(path: Path, sound: NDArray, index: int) -> None:
    """16-bit sound: one clip per split is stereo, one at 44.1 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = RATE
    if index == 1:
        sound = np.stack([sound, sound], axis=1)
    elif index == 2:
        rate = 44100
        faster = resample(torch.from_numpy(sound / 32768), RATE, rate)
        sound = (faster * 32768).round().clamp(-32768, 32767).short().numpy()
    file = io.BytesIO()  # soundfile would wait for the disk after every file
    soundfile.write(file, sound, rate, subtype="PCM_16", format="WAV")
    path.write_bytes(file.getvalue())


def _write_avss(task: Task, scene: Scene, pictures, owners, sound, log_mel) -> str:
    """A clip in the layout of AVSS, reduced to 320x180."""
    uid = task.name if task.source == "ms3" else f"{task.name}_0_{scene.seconds * 1000}"
    clip = task.folder / LABELS[task.source] / uid
    for name in ("frames", "labels_semantic", "labels_rgb"):
        (clip / name).mkdir(parents=True)
    labelled = 1 if task.source == "s4" and task.split == "train" else scene.seconds
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).resize(WIDE, Image.Resampling.BILINEAR).save(clip / "frames" / f"{i}.jpg", quality=95)
        if i < labelled:
            sounding = {k for k, shape in enumerate(scene.shapes) if shape.sounding[i]}
            label = Image.fromarray(_indices(scene, owners[i], sounding)).resize(WIDE, Image.Resampling.NEAREST)
            label.save(clip / "labels_semantic" / f"{i}.png", compress_level=3)
            coloured = class_palette(len(CLASSES) + 1)[np.asarray(label)]
            Image.fromarray(coloured).save(clip / "labels_rgb" / f"{i}.png", compress_level=3)
    if task.index == 3:
        (clip / "labels_semantic" / ".DS_Store").write_bytes(b"")
    _write_sound(clip / "audio.wav", sound, task.index)
    return uid


def _a_obj(clip: dict) -> str:
    """The objects as AVSBench's metadata lists them, for people to read."""
    heard = [shape["class"] for shape in clip["shapes"] if any(shape["sounding"])]
    return "_".join(["background", *sorted(heard), *(["off-the-screen"] if clip["off_screen"] else [])])


def _write_metadata(folder: Path, subset: str, clips: list[dict]) -> None:
    if subset == "s4":
        header = ["name", "start_time(s)", "category", "split"]
        heard = [next(shape["class"] for shape in clip["shapes"] if any(shape["sounding"])) for clip in clips]
        rows = [[clip["name"], 0, category, clip["split"]] for clip, category in zip(clips, heard, strict=True)]
    elif subset == "ms3":
        header = ["name", "split"]
        rows = [[clip["name"], clip["split"]] for clip in clips]
    else:
        header = ["vid", "uid", "s_min", "s_sec", "a_obj", "split", "label"]
        rows = [["_".join(clip["name"].split("_")[:3]), clip["name"], 0, 0, _a_obj(clip), clip["split"], clip["label"]]
                for clip in clips]
        names = {name: index for index, name in enumerate(("background", *CLASSES))}
        (folder / "label2idx.json").write_text(json.dumps(names, indent=1))
    path = folder / ("metadata.csv" if subset == "avss" else f"{subset}_meta_data.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def _oracles(subset: str, clips: list[dict]) -> dict:
    """J of whom always segments the salient shape, and of whom segments the shapes whose timbre it hears."""
    result = {"clips": len(clips), "aligned": sum(clip["group"] == "aligned" for clip in clips)}
    for oracle in ("salience", "audio"):
        scores = np.array([second for clip in clips for second in clip[oracle]], dtype=float)
        if subset == "avss":
            counted = np.maximum((~np.isnan(scores)).sum(axis=0), 1)
            result[oracle] = {"J": float((np.nansum(scores, axis=0) / counted).mean())}
        else:
            result[oracle] = dict(zip(("J", "J_strict"), scores.mean(axis=0).tolist(), strict=True))
    return result


def generate(root: Path | str, size: str = "small", seed: int = 0, bias: float = 0.9, visible: Sequence[int] = (2, 3),
             subsets: Sequence[str] = ("s4", "ms3", "avss"), workers: int | None = None, progress: bool = True, *,
             gap: float = 1.0, val_bias: float | None = None, clips: Sequence[int] | None = None) -> dict[str, dict]:
    """Write the toy benchmark below `root`, each subset as a whole or not at all.

    Args:
        root: the folder that will hold `Single-source/`, `Multi-sources/` and `AVSBench_semantic/`.
        size: `tiny` (tests), `small` (an experiment on a CPU; all subsets below 200 MB, for which the log-mel files are
            left out) or `full` (as many clips as AVSBench has).
        seed: every clip is drawn from (seed, source, split, index).
        bias: probability that the salient shape sounds in the training split, and in the validation split unless
            `val_bias` says otherwise. In the test split it is left to chance.
        visible: smallest and largest number of shapes in a clip, within 1..5.
        subsets: which of `s4`, `ms3` and `avss` to write.
        workers: processes; None for one per available core.
        progress: show a bar.
        gap: how much the salient shape stands out, from 0 (all alike) to 1 (the others are half as large, weak in
            contrast and slow).
        clips: numbers of train, val and test clips per subset in place of those of `size`.

    Returns:
        The manifest of every subset in `subsets`, also written as `toy_manifest.json` into its folder: `settings`,
        `oracles` per split and `clips` (name, group `aligned` or `conflicting`, shapes, sounds, SHA-256 of the arrays).

    Raises:
        ValueError: a setting is out of range.
        FileExistsError: there is a folder of a subset already, and it was not made with these settings.
    """
    settings = Settings(size, seed, bias, tuple(visible), gap, val_bias, None if clips is None else tuple(clips))
    for subset in subsets:
        if subset not in FOLDERS:
            raise ValueError(f"toy.subsets: expected some of {tuple(FOLDERS)}, got {subset!r}")
    missing = [subset for subset in subsets if not _exists(Path(root), subset, settings)]
    if missing:
        Path(root).mkdir(parents=True, exist_ok=True)
    for subset in missing:
        _generate_subset(Path(root), subset, settings, workers, progress)
    return {subset: load_manifest(root, subset) for subset in subsets}


def _exists(root: Path, subset: str, settings: Settings) -> bool:
    """Whether the subset is there, made with these settings."""
    folder = root / FOLDERS[subset]
    if not folder.exists():
        return False
    if not (folder / MANIFEST).is_file():
        raise FileExistsError(f"{folder} is there already and is no toy benchmark: choose another root, or read it "
                              "as it is by leaving data.toy unset")
    found = load_manifest(root, subset)
    version, made_with = found.get("version"), found.get("settings")
    if (version, made_with) != (VERSION, json.loads(json.dumps(asdict(settings)))):  # JSON knows no tuples
        raise FileExistsError(f"{folder} holds a toy benchmark of version {version} with {made_with}, not of version "
                              f"{VERSION} with {asdict(settings)}: choose another root or delete it")
    return True


def _generate_subset(root: Path, subset: str, settings: Settings, workers: int | None, progress: bool) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f".{FOLDERS[subset]}-", dir=root))
    try:
        tasks = [Task(settings, subset, source, split, index, partial)
                 for source, counts in settings.counts(subset).items()
                 for split, count in zip(SPLITS, counts, strict=True) for index in range(count)]
        clips = list(_progress(_run(tasks, workers), len(tasks), f"toy {subset}", progress))
        _write_metadata(partial, subset, clips)
        manifest = {
            "version": VERSION, "subset": subset, "classes": list(CLASSES), "settings": asdict(settings),
            "oracles": {split: _oracles(subset, [c for c in clips if c["split"] == split]) for split in SPLITS},
            "clips": [{key: clip[key] for key in clip if key not in ("salience", "audio")} for clip in clips],
        }
        (partial / MANIFEST).write_text(json.dumps(manifest))
        partial.chmod(0o755)  # mkdtemp makes folders that nobody else may read
        try:
            partial.rename(root / FOLDERS[subset])
        except OSError:
            if not _exists(root, subset, settings):  # else another process of the same run was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run(tasks: list[Task], workers: int | None) -> Iterator[dict]:
    """Entries of the manifest in the order of the tasks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or cores or 1
    if workers == 1:
        yield from map(write_clip, tasks)
        return
    # One thread each: they share the cores, and OpenMP does not survive a fork otherwise.
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(write_clip, tasks, chunksize=4)


def _progress(items: Iterator[dict], total: int, title: str, show: bool) -> Iterator[dict]:
    if not show:
        return items
    from rich.progress import track

    return track(items, title, total)


def load_manifest(root: Path | str, subset: str) -> dict:
    """The manifest that `generate` wrote. Raises FileNotFoundError where there is none, ValueError for another file."""
    return read_manifest(Path(root) / FOLDERS[subset])


def ensure(root: Path | str, subset: str, toy: ToyConfig) -> None:
    """Generate a subset unless it is there; raises FileExistsError where something else is."""
    if subset not in FOLDERS:
        raise ValueError(f"data.subset: the toy benchmark has {tuple(FOLDERS)}, not {subset!r}")
    generate(root, subsets=(subset,), **asdict(toy))
