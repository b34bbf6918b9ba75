"""Sounds, and log-mel files that come with them."""
from __future__ import annotations

from pathlib import Path

import soundfile

from icf.data.audio import fit_examples, load_log_mel, load_wav, log_mel_examples, read_waveform
from icf.data.avsbench import Record
from icf.data.check.findings import Clip, reason, relative

LONGER = 1.0  # s of sound beyond the pictures, or of pictures beyond the sound of own clips, from which they do not fit
SHORTEST = {5: 4.815, 10: 9.615}  # s of sound that give an example for each of so many frames
SILENCE = 10 ** (-60 / 20)  # root mean square
FAR = 0.3  # mean distance of a log-mel file from our front end; rounding to 16 bits stays far below


def check_sound(record: Record, folder: Path, deep: bool, clip: Clip) -> None:
    where, shortest = relative(record.sound, folder), SHORTEST.get(len(record.frames))
    try:
        info = soundfile.info(record.sound)
    except soundfile.LibsndfileError as error:
        clip.add("audio", "error", where, f"cannot be read ({error})")
        return
    clip.counts["sounds"] += 1
    clip.counts[f"rate {info.samplerate} Hz, {info.channels} channels"] += 1
    if shortest and info.duration < shortest:
        clip.add("audio", clip.quirk, where, f"lasts {info.duration:.3f} s, less than the "
                 f"{shortest} s that {len(record.frames)} examples need")
    pictures = len(record.frames)
    if info.duration > pictures + LONGER or record.source == "folder" and info.duration < pictures - LONGER:
        clip.add("audio", "warning", where, f"lasts {info.duration:.1f} s, its pictures {pictures} s")
    if not deep:
        return
    try:
        waveform, _ = load_wav(record.sound)
    except ValueError as error:
        clip.add("audio", "error", where, reason(error))
        return
    if waveform.square().mean().sqrt() < SILENCE:
        clip.add("audio", "warning", where, "is silent (below -60 dBFS)")
    elif waveform.abs().max() > 1:
        clip.add("audio", "warning", where, f"has a peak of {waveform.abs().max():.2f}, expected at most 1")


def check_log_mel(record: Record, folder: Path, clip: Clip) -> None:
    where, count = relative(record.log_mel, folder), len(record.frames)
    try:
        examples = load_log_mel(record.log_mel)
    except (ValueError, FileNotFoundError) as error:
        clip.add("log-mel", "error", where, reason(error))
        return
    if len(examples) != count:
        clip.add("log-mel", "warning", where, f"has {len(examples)} examples for {count} frames")
    try:
        ours = log_mel_examples(read_waveform(record.sound), frames=count)
    except (ValueError, FileNotFoundError):
        return  # reported with the sound
    distance = (fit_examples(examples, count) - ours).abs()
    clip.distance = distance.max().item(), distance.mean().item()
    if clip.distance[1] > FAR:
        clip.add("log-mel", "warning", where, f"is {clip.distance[1]:.2f} from our front end on the sound, on average")
