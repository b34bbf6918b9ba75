"""What a clip of the toy benchmark shows and plays: its settings, its shapes and their ways, who sounds when."""
from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from icf.data.audio import RATE

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


def local(shape: Shape, x: NDArray, y: NDArray, time: float) -> tuple[NDArray, NDArray]:
    """Coordinates in pixels from the centre of the shape, along its axes."""
    cx, cy = shape.centre(time)
    c, s = np.cos(shape.angle), np.sin(shape.angle)
    return c * (x - cx) + s * (y - cy), c * (y - cy) - s * (x - cx)


def covers(shape: Shape, x: NDArray, y: NDArray, time: float) -> NDArray:
    """Which of the points the shape covers, without anti-aliasing."""
    u, v = local(shape, x, y, time)
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
