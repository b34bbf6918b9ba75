"""The sound of a clip of the toy benchmark: a timbre for each class, and an ear that knows them."""
from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from icf.data.audio import OFFSET, RATE, log_mel_examples
from icf.data.toy.scene import CLASSES, Scene


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
