"""One composed clip: where the camera looks, what sounds when, and the truth about every second."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from icf.data import IGNORE
from icf.data.audio import RATE
from icf.data.check.labels import STRAY
from icf.data.compose.pictures import FPS, DAVISVideo
from icf.data.compose.plan import Task
from icf.data.compose.sounds import read, sounding_part

SECONDS = 5
ZOOM = (0.65, 1.0)  # side of the window by the short edge of the picture
WAY = 0.4  # of a side that the window may go in a clip
TRIES = 48
KEPT, BESIDE = 0.5, 0.25  # share of what sounds, and of the other objects, that stays in sight in every second
COARSE = 96  # pixels of the short edge of the labels by which a window is judged
PAUSE = 0.25  # share of clips in which nothing sounds for a while
LEVEL = (-26, -17)  # dB of full scale, of a sound while it is on
BEHIND = (-32, -20)  # of a sound from off the screen
NOISE = (-65, -38)  # of the noise
PEAK = -1
RAMP = RATE // 100


@dataclass
class Composed:
    """A clip of T seconds.

    Args:
        frames: [T,side,side,3] uint8.
        labels: [T,side,side] uint8, places in `classes` from 1 of all that is seen, 0 and `IGNORE`.
        classes: names of the values of `labels`.
        sounding: by class, whether it sounds [T].
        off_screen: the same for each of the task's sounds from off the screen.
        sound: [T * 16000] int16.
        files: of pictures and labels, without repetition.
    """

    frames: NDArray
    labels: NDArray
    classes: tuple[str, ...]
    sounding: dict[str, NDArray]
    off_screen: list[NDArray]
    sound: NDArray
    files: list

    def truth(self) -> NDArray:
        """`labels` of what sounds; components of next to no pixels are `IGNORE`."""
        truth = np.stack([self.shown([name for name, on in self.sounding.items() if on[t]], t)
                          for t in range(len(self.labels))])
        for mask in truth:
            mask[_stray(mask)] = IGNORE
        return truth

    def shown(self, names: list[str], t: int) -> NDArray:
        """The label of a second without all classes but these."""
        values = [1 + self.classes.index(name) for name in names]
        return np.where(np.isin(self.labels[t], [*values, IGNORE]), self.labels[t], 0).astype(np.uint8)


def compose(task: Task, side: int, single: bool) -> Composed:
    """Draw a clip from its task and seed alone. Raises what reading its files raises."""
    rng = np.random.default_rng((*task.seed, 1))
    moments = _moments(task, rng)
    read_once = {index: task.scene.picture.read(index)[:2] for index in dict.fromkeys(moments)}
    images, labels = zip(*(read_once[index] for index in moments), strict=True)
    classes = task.scene.picture.classes
    wanted = [1 + classes.index(name) for name, _ in task.sounds]
    others = [1 + classes.index(name) for name in task.scene.objects if 1 + classes.index(name) not in wanted]
    windows = _windows(labels, wanted, others, moving=len(read_once) == 1, rng=rng)
    height, width = labels[0].shape
    boxes = [(x, y, min(x + size, width), min(y + size, height)) for x, y, size in windows.tolist()]
    frames = [np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box))
              for image, box in zip(images, boxes, strict=True)]
    masks = [np.asarray(Image.fromarray(label).resize((side, side), Image.Resampling.NEAREST, box))
             for label, box in zip(labels, boxes, strict=True)]
    sounding, off_screen = _schedules(task, single, rng)
    files = list(dict.fromkeys(path for index in moments for path in task.scene.picture.sources(index)))
    return Composed(np.stack(frames), np.stack(masks), classes, sounding, off_screen,
                    _mix(task, sounding, off_screen, rng), files)


# ---- Sight ----


def _moments(task: Task, rng: np.random.Generator) -> list[int]:
    """Which picture is shown in every second. A video goes on from a random start, one second at a time, and backwards
    from its end, as most of DAVIS are shorter than a clip."""
    if not isinstance(task.scene.picture, DAVISVideo):
        return [0] * SECONDS
    last = len(task.scene.picture.frames) - 1
    start = int(rng.integers(max(1, last - (SECONDS - 1) * FPS + 1) if last >= (SECONDS - 1) * FPS else last % FPS + 1))
    steps = min((last - start) // FPS, SECONDS - 1)
    return [start + FPS * (steps - abs(steps - t % (2 * steps))) for t in range(SECONDS)]


def _windows(labels: tuple[NDArray, ...], wanted: list[int], others: list[int], moving: bool,
             rng: np.random.Generator) -> NDArray:
    """Squares [T,3] of x, y and side within the picture that glide and zoom smoothly. The first of `TRIES` draws that
    keeps enough of the wanted classes and of the others in sight is taken, else the one that keeps most."""
    height, width = labels[0].shape
    sums = {id(label): _sums(label, [*wanted, *others]) for label in labels}
    ys, xs = np.nonzero(np.isin(labels[0], wanted))
    share = np.linspace(0, 1, len(labels))
    share = (share * share * (3 - 2 * share))[:, None] if moving else np.zeros((len(labels), 1))
    best, best_score = None, (-1.0, -1.0)
    for attempt in range(TRIES + 1):
        sides = rng.uniform(*ZOOM, 2) * min(height, width) if attempt < TRIES else np.full(2, min(height, width))
        place = rng.integers(len(xs)) if attempt < TRIES else len(xs) // 2
        start = np.array([xs[place], ys[place]]) + rng.uniform(-0.25, 0.25, 2) * sides[0] * (attempt < TRIES)
        way = rng.uniform(-WAY, WAY, 2) * sides.min() * (attempt < TRIES)
        centres = start + share * way
        size = sides[0] + share * (sides[1] - sides[0])
        corner = np.clip(centres - size / 2, 0, np.array([width, height]) - size)
        windows = np.concatenate([corner, size], axis=1)
        kept = np.stack([_kept(sums[id(label)], window) for label, window in zip(labels, windows, strict=True)])
        score = kept[:, :len(wanted)].min(), kept[:, len(wanted):].min(initial=1.0)
        if score[0] >= KEPT and score[1] >= BESIDE:
            return windows
        if (min(score[0], KEPT), score[1]) > (min(best_score[0], KEPT), best_score[1]):
            best, best_score = windows, score
    return best


def _sums(label: NDArray, values: list[int]) -> tuple[NDArray, int]:
    """Counts of each value above and left of every point [values,H+1,W+1] on a coarse grid, and the grid's step."""
    step = max(1, min(label.shape) // COARSE)
    coarse = label[::step, ::step]
    counts = np.cumsum(np.cumsum([coarse == value for value in values], axis=1), axis=2)
    return np.pad(counts, ((0, 0), (1, 0), (1, 0))), step


def _kept(sums: tuple[NDArray, int], window: NDArray) -> NDArray:
    """Share of the pixels of each value that lies in a window."""
    counts, step = sums
    x0, y0, x1, y1 = np.round(np.array([*window[:2], *(window[:2] + window[2])]) / step).astype(int)
    inside = counts[:, y1, x1] - counts[:, y0, x1] - counts[:, y1, x0] + counts[:, y0, x0]
    return inside / np.maximum(counts[:, -1, -1], 1)


def _stray(mask: NDArray) -> NDArray:
    """Whether a pixel belongs to a component of one class of fewer than `STRAY` pixels: a leftover of cutting."""
    stray = np.zeros(mask.shape, dtype=bool)
    for value in np.unique(mask[(mask > 0) & (mask != IGNORE)]):
        parts, _ = ndimage.label(mask == value, structure=np.ones((3, 3)))
        sizes = np.bincount(parts.reshape(-1))
        stray |= (sizes < STRAY)[parts] & (parts > 0)
    return stray


# ---- Sound ----


def _schedules(task: Task, single: bool, rng: np.random.Generator) -> tuple[dict[str, NDArray], list[NDArray]]:
    """Who sounds in which second: the first throughout, or with a pause of all in a share `PAUSE` of the clips; the
    second, and what is off the screen, for some seconds on end."""
    def stretch(least: int, most: int) -> NDArray:
        length = int(rng.integers(least, most + 1))
        begin = int(rng.integers(SECONDS - length + 1))
        return (np.arange(SECONDS) >= begin) & (np.arange(SECONDS) < begin + length)

    first, *more = [name for name, _ in task.sounds]
    sounding = {first: np.ones(SECONDS, dtype=bool)}
    if more:
        sounding = {first: stretch(2, SECONDS), more[0]: stretch(2, SECONDS - 1)}
    if not single and rng.random() < PAUSE:
        pause = stretch(1, SECONDS // 2)
        sounding = {name: on & ~pause if (on & ~pause).any() else on for name, on in sounding.items()}
    return sounding, [stretch(2, SECONDS) for _ in task.off_screen]


def _mix(task: Task, sounding: dict[str, NDArray], off_screen: list[NDArray], rng: np.random.Generator) -> NDArray:
    samples = SECONDS * RATE
    mix = _level(NOISE, rng) * _noise(samples, rng)
    parts = [(sound, sounding[name], LEVEL) for name, sound in task.sounds]
    parts += [(sound, on, BEHIND) for sound, on in zip(task.off_screen, off_screen, strict=True)]
    for sound, on, level in parts:
        gate = np.convolve(np.repeat(on, RATE).astype(np.float32), np.ones(RAMP, np.float32) / RAMP, mode="same")
        mix += _level(level, rng) * gate * _lasting(sounding_part(read(sound)), samples, rng)
    mix *= min(1, 10 ** (PEAK / 20) / np.abs(mix).max())
    return np.round(mix * 32767).astype(np.int16)


def _level(span: tuple[float, float], rng: np.random.Generator) -> float:
    return 10 ** (rng.uniform(*span) / 20)


def _noise(samples: int, rng: np.random.Generator) -> NDArray:
    """Noise of root mean square 1 whose spectrum falls with frequency, from not at all to as that of pink noise."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    spectrum /= np.maximum(np.arange(len(spectrum)), 100) ** (rng.uniform(0, 1) / 2)
    noise = np.fft.irfft(spectrum, samples)
    return noise / np.sqrt(np.mean(noise**2))


def _lasting(sound: NDArray, samples: int, rng: np.random.Generator) -> NDArray:
    """A piece of a sound from a random place, and over and over if it is shorter."""
    return np.resize(np.roll(sound, -int(rng.integers(len(sound)))), samples)
