"""Clips with another sound, added noise or exchanged frames: what a model says to them shows whether it listens.

Every sound passes through the same front end as the true one, so that it can be told apart by listening only.
"""
from __future__ import annotations

import json
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from icf.data import Clip
from icf.data.audio import RATE

REPLACED = ("silence", "noise", "offscreen", "shuffled")
NUMBERED = ("snr", "mix")
SILENT = 10 ** (-60 / 20)  # root mean square below which a clip counts as silent
LEVEL = 10 ** (-20 / 20)  # of the noise that replaces a silent clip


UNRELATED = ("silence", "white", "pink", "babble", "offscreen")
LEVELS = (-40, -30, -20, -10)  # decibels of full scale of the sounds that belong to nothing
TRIES = 20  # other clips that are looked at for one of other classes


class Disturbed(torch.utils.data.Dataset):
    """A data set whose clips are disturbed, the same way every time; labels, names and all else stay as they are.

    Args:
        dataset: what `build_dataset` returns, or another `Disturbed`.
        kind: `silence`; `noise`, white Gaussian at the root mean square of the clip (-20 dBFS for silent clips);
            `offscreen`, the sound of a clip that shares no class with this one; `shuffled`, the sound of any other
            clip, each used once; `snr:X`, white Gaussian noise added at a signal-to-noise ratio of X dB (silence stays
            silent); `mix:N`, in a quarter of the clips N frames are replaced by frames of other clips, whose objects
            the labels do not show.
        seed: of pairs, noise and frames.

    Raises:
        ValueError: the kind is none of these, there is no other clip, or the sounds are read from log-mel files, which
            cannot be disturbed.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, kind: str, seed: int = 42):
        name, _, number = kind.partition(":")
        if not (kind in REPLACED or name in NUMBERED and _is_number(number)):
            raise ValueError(f"kind: expected one of {REPLACED}, snr:DECIBEL or mix:FRAMES, got {kind!r}")
        if name != "mix" and getattr(getattr(dataset, "data", None), "audio_source", "wav") != "wav":
            raise ValueError(f"kind: {kind} needs data.audio_source wav, got {dataset.data.audio_source}")
        if len(dataset) < 2 and name in ("offscreen", "shuffled", "mix"):
            raise ValueError(f"kind: {kind} needs at least two clips, got {len(dataset)}")
        self.dataset, self.kind, self.seed = dataset, name, seed
        self.amount = float(number) if number else 0.0
        self.partners: list[int] = []
        self.exchanged: dict[int, list[tuple[int, int, int]]] = {}  # frame, other clip, its frame
        rng = self._rng(0)
        if name == "shuffled":
            order = rng.permutation(len(dataset))
            self.partners = order[np.argsort(np.roll(order, 1))].tolist()
        elif name == "offscreen":
            self.partners = self._strangers(rng)
        elif name == "mix":
            self._exchange(rng)

    def __getattr__(self, name: str):
        if name == "dataset":  # not there yet while it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Clip:
        if self.kind == "mix":
            return self._mixed(index, self.dataset[index])
        return self.dataset.with_audio(index, self.waveform(index)[0])

    def with_audio(self, index: int, waveform: Tensor) -> Clip:
        """A clip with the sound [n] at 16 kHz, its frames disturbed."""
        return self._mixed(index, self.dataset.with_audio(index, waveform))

    def waveform(self, index: int) -> tuple[Tensor, int]:
        """The disturbed sound of a clip: float32 [n] and 16000."""
        sound = self.dataset.waveform(index)[0]
        rms = sound.square().mean().sqrt()
        if self.kind == "silence":
            sound = torch.zeros_like(sound)
        elif self.kind == "noise":
            sound = self._noise(index, sound) * (rms if rms > SILENT else LEVEL)
        elif self.kind == "snr":
            sound = sound + self._noise(index, sound) * rms * 10 ** (-self.amount / 20)
        elif self.partners:
            other = self.dataset.waveform(self.partners[index])[0]
            sound = other.repeat(-(-len(sound) // len(other)))[:len(sound)]
        return sound, RATE

    @property
    def pairing(self) -> dict:
        """Whose sound, or which frames, every clip got, by names."""
        names = self.dataset.names
        pairs = {names[i]: names[j] for i, j in enumerate(self.partners)}
        frames = {names[i]: [{"frame": t, "clip": names[j], "its_frame": u} for t, j, u in swaps]
                  for i, swaps in self.exchanged.items()}
        return {"kind": self.kind, "amount": self.amount, "seed": self.seed, "subset": self.dataset.subset,
                "split": self.dataset.split, "sounds": pairs, "frames": frames}

    def save_pairing(self, path: Path | str) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.pairing, indent=1), encoding="utf-8")

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, zlib.crc32(self.kind.encode()), index))

    def _noise(self, index: int, sound: Tensor) -> Tensor:
        return torch.from_numpy(self._rng(index).standard_normal(len(sound), dtype=np.float32))

    def _strangers(self, rng: np.random.Generator) -> list[int]:
        """For every clip another one of whose sounding classes it shows none, or as few as possible."""
        classes = getattr(self.dataset, "sounding_classes", list)()
        visible = getattr(self.dataset, "visible_classes", lambda: classes)()
        if not any(classes):
            warnings.warn(f"offscreen: the classes of {self.dataset.subset}'s clips are not known, so any other clip's "
                          "sound is taken; the column category of clips.csv, or the AVSS metadata beside AVSBench's "
                          "other subsets, would tell them", stacklevel=3)
            classes = visible = [frozenset()] * len(self.dataset)
        names = sorted(frozenset().union(*classes))
        table = np.array([[name in own for name in names] for own in classes], dtype=np.int32).reshape(len(classes), -1)
        partners, shared = [], 0
        for index, own in enumerate(visible):
            common = table @ np.array([name in own for name in names], dtype=np.int32)
            common[index] = len(names) + 1
            partners.append(int(rng.choice(np.flatnonzero(common == common.min()))))
            shared += common.min() > 0
        if shared:
            warnings.warn(f"offscreen: {shared} of {len(classes)} clips share a class with every other", stacklevel=3)
        return partners

    def _exchange(self, rng: np.random.Generator) -> None:
        count, length = len(self.dataset), self.dataset.frame_count
        for index in sorted(rng.permutation(count)[:round(count / 4)].tolist()):
            places = rng.permutation(length(index))[:int(self.amount)]
            others = (index + rng.integers(1, count, len(places))) % count
            self.exchanged[index] = [(int(t), int(j), int(rng.integers(length(int(j)))))
                                     for t, j in zip(places, others, strict=True)]

    def _mixed(self, index: int, clip: Clip) -> Clip:
        for t, j, u in self.exchanged.get(index, ()):
            clip.frames[t] = self.dataset[j].frames[u]
        return clip


def unrelated_sound(dataset: torch.utils.data.Dataset, index: int, rng: np.random.Generator) -> Tensor:
    """A sound that nothing in a clip makes, as long as its frames, [n] float32 at 16 kHz.

    One of `UNRELATED` at one of `LEVELS`: silence, white or pink noise, 3 to 5 other clips at once, or one other clip.
    Other clips sound like nothing that is heard or seen in this one where classes are known, and are not taken alone
    where they are not; white noise stands in where there are none.

    Args:
        dataset: of `build_dataset`, with the methods `waveform`, `frame_count`, `sounding` and `visible`.
        rng: all that is random.
    """
    length, own = dataset.frame_count(index) * RATE, dataset.sounding(index) | dataset.visible(index)
    kind = rng.choice(UNRELATED if own else UNRELATED[:-1])
    level, wanted = 10 ** (rng.choice(LEVELS) / 20), int(rng.integers(3, 6)) if kind == "babble" else 1
    if kind == "silence":
        return torch.zeros(length)
    sound = torch.from_numpy(rng.standard_normal(length, dtype=np.float32))
    if kind == "pink":
        spectrum = torch.fft.rfft(sound)
        sound = torch.fft.irfft(spectrum / torch.arange(1, len(spectrum) + 1).sqrt(), length)
    elif kind != "white":
        found = [dataset.waveform(other)[0] for other in _unrelated_clips(dataset, index, own, wanted, rng)]
        found = [x.repeat(-(-length // len(x)))[:length] for x in found if x.square().mean().sqrt() > SILENT]
        if len(found) == wanted:
            sound = torch.stack([x / x.square().mean().sqrt() for x in found]).sum(0)
    return sound * (level / sound.square().mean().sqrt().clamp(min=SILENT))


def _unrelated_clips(dataset, index: int, own: frozenset[str], wanted: int, rng: np.random.Generator) -> list[int]:
    """Up to `wanted` other clips that share no class with `own`; any others where that is empty, not known."""
    found: list[int] = []
    for other in rng.permutation(len(dataset))[:TRIES].tolist():
        classes = dataset.sounding(other) if own else frozenset()
        if other != index and bool(classes) == bool(own) and not classes & own and len(found) < wanted:
            found.append(other)
    return found


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False
