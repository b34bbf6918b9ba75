"""Video files in and out through PyAV (FFmpeg's libraries), frame by frame, in memory that does not grow with length.

Time 0 is the first picture of a file. Pictures and sound are placed by their time stamps, never by counting, so that
variable frame rates, a late sound track and gaps in it come out right. Sound is 16 kHz mono float32 in -1..1.
"""
from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, repeat
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from icf.data.clock import LONGEST, read_clock

SOUND_RATE = 16000
MAX_PIXELS = 2**26  # of a picture: twice those of 8K
SOUND_JUMP = Fraction(1, 20)  # seconds between two pieces of sound from which the time stamps are believed: a gap
COLOURS = {1: "ITU709", 4: "FCC", 7: "SMPTE240M"}  # by FFmpeg's number, which older PyAV overlook
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
COPIED_SOUND = {"aac", "mp3", "mp3float", "ac3", "eac3", "opus", "flac", "alac"}  # what players accept inside an mp4


@dataclass(frozen=True)
class Video:
    """A video file as `open_video` found it.

    Attributes:
        path: the file.
        width, height: of a picture, in pixels, with the rotation of the file applied.
        duration: seconds as the file declares them, None where it does not.
        frame_rate: mean pictures per second.
        time_base: seconds per tick of the time stamps.
        start: time stamp of the first picture, in seconds of the file's clock.
        sound: the file with the sound track, None where there is none.
        aspect: width of a pixel by its height, as it is to be shown.
        strict: refuse damaged pictures, which are else left out with a warning.
    """

    path: Path
    width: int
    height: int
    duration: float | None
    frame_rate: Fraction
    time_base: Fraction
    start: Fraction
    sound: Path | None
    aspect: Fraction = Fraction(1)
    strict: bool = False

    def frames(self) -> Iterator[tuple[Fraction, np.ndarray]]:
        """All pictures in order: time in seconds since the first, and [height, width, 3] uint8 RGB, upright.

        Pictures whose size differs from the first are scaled to it, one without a later time stamp than the one before
        follows it at the mean rate. Raises ValueError where the file cannot be decoded or ends long before its declared
        end.
        """
        scaler = VideoReformatter()
        for time, frame, size, _ in _decoded(self.path, self.strict):
            yield time, _upright(frame, scaler, size)

    def sampled(
        self, fps: Fraction | float = 1, offset: Fraction | float = Fraction(15, 16)
    ) -> Iterator[tuple[Fraction, np.ndarray]]:
        """The picture on show at (i + offset) / fps seconds for i = 0, 1, ...: its own time, [height, width, 3] uint8.

        The defaults are those of AVSBench: one picture a second, 15/16 s into it. A last interval that is cut short
        gives its last picture when at least half of it is there; the first interval always gives one.

        Raises:
            ValueError: as `frames`, or an argument out of range.
        """
        fps, offset = Fraction(fps), Fraction(offset)
        if fps <= 0 or not 0 <= offset < 1:
            raise ValueError(f"fps and offset: expected above 0 and in 0..1, got {float(fps)} and {float(offset)}")
        index, shown, end, scaler = 0, None, Fraction(0), VideoReformatter()
        for time, frame, size, step in _decoded(self.path, self.strict):
            while shown is not None and time > (index + offset) / fps:
                yield shown[0], _upright(shown[1], scaler, shown[2])
                index += 1
            shown, end = (time, frame, size), time + step
        while index == 0 or end > (index + offset) / fps or end * fps - index >= Fraction(1, 2):
            yield shown[0], _upright(shown[1], scaler, shown[2])
            index += 1


def open_video(path: Path, silent_ok: bool = False, strict: bool = False) -> Video:
    """Look at a file and decode its first picture.

    Args:
        path: any video that FFmpeg reads.
        silent_ok: accept a file without a sound track.
        strict: refuse damaged pictures, when they are read.

    Raises:
        ValueError: one line naming the file, when it is missing or broken or lacks pictures or sound.
    """
    path = Path(path)
    with _opened(path) as container:
        stream = _picture_stream(container, path)
        frame = next(_frames(container, stream, path, None, strict), None)
        if frame is None:
            raise ValueError(f"{path}: the video stream holds no picture")
        if not container.streams.audio and not silent_ok:
            raise ValueError(f"{path}: no sound track; allow silence (silent_ok) to go on without sound")
        height, width = _upright(frame, VideoReformatter()).shape[:2]
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        return Video(path, width, height, _declared(container, stream), _rate(stream), stream.time_base,
                     start=_time(frame) or Fraction(0), sound=path if container.streams.audio else None,
                     aspect=1 / aspect if round(frame.rotation / 90) % 2 else aspect, strict=strict)


def read_sound(path: Path, start: Fraction | float = 0, strict: bool = False) -> Iterator[np.ndarray]:
    """Sound of a video or sound file in pieces of float32 [n], 16 kHz mono, beginning at `start` of the file's clock.

    What the time stamps leave out, before the first piece or within, is filled with zeros, and so is what is damaged.

    Args:
        strict: refuse damaged sound.

    Raises:
        ValueError: one line naming the file, when it has no sound track or it cannot be decoded.
    """
    for piece in _sound(path, start, SOUND_RATE, None, strict):
        yield piece.mean(axis=0)  # FFmpeg's own mixing to mono would make two equal channels louder by 3 dB


def _sound(path: Path, start: Fraction | float, rate: int, layout: str | None, strict: bool) -> Iterator[np.ndarray]:
    """As `read_sound`, in pieces of float32 [channels, n] at a rate; layout: None for that of the file."""
    with _opened(path) as container:
        track = _sound_track(container, path)
        clock, resampler, coding, surplus = Fraction(start), None, None, 0  # surplus: samples from before `start`
        channels = 1 if layout in (None, "mono") else 2
        for frame in chain(_frames(container, track, path, start, strict), [None]):
            pieces, time, now = [], clock, None
            if frame is not None:
                time = clock if frame.pts is None else _within(_time(frame), start, path)
                now = (frame.format.name, frame.layout.name, frame.sample_rate)
            if resampler is not None and (now != coding or time - clock > SOUND_JUMP):
                pieces += [_samples(piece) for piece in resampler.resample(None)]
                resampler = None
            if frame is not None:
                if resampler is None:
                    resampler, coding = av.AudioResampler("flt", layout or frame.layout, rate), now
                    samples = round((time - clock) * rate)
                    pieces += repeat(np.zeros((channels, rate), np.float32), max(samples, 0) // rate)
                    pieces.append(np.zeros((channels, max(samples, 0) % rate), np.float32))
                    surplus += max(-samples, 0)
                pieces += [_samples(piece) for piece in resampler.resample(frame)]
                clock = time + Fraction(frame.samples, frame.sample_rate)
            for piece in pieces:
                if not np.isfinite(piece).all():
                    raise ValueError(f"{path}: holds sound that is not finite")
                if piece.shape[1] > surplus:
                    yield piece[:, surplus:]
                surplus = max(surplus - piece.shape[1], 0)


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """[channels, n]; interleaved, as PyAV reads planes of no more than eight channels."""
    return frame.to_ndarray().reshape(-1, len(frame.layout.channels)).T


def write_video(
    out: Path, frames: Iterable[tuple[Fraction, np.ndarray]], frame_rate: Fraction, time_base: Fraction,
    sound: Path | None = None, sound_start: Fraction = Fraction(0), aspect: Fraction = Fraction(1),
) -> None:
    """Write an H.264 mp4 of all `frames` at their own times, with the sound of another file.

    The sound is copied bit for bit where mp4 players accept its coding, and becomes AAC otherwise. An odd width or
    height, which H.264 lacks, is made even by repeating the last column or row. The file appears under its name when
    it is complete.

    Args:
        out: where to write.
        frames: time in seconds, increasing, and [height, width, 3] uint8 RGB, all of one size.
        frame_rate: pictures per second; the last one is shown for 1 / frame_rate.
        time_base: seconds per tick, fine enough for the times.
        sound: a file with a sound track.
        sound_start: the moment of that file's clock that belongs to time 0.
        aspect: width of a pixel by its height.

    Raises:
        ValueError: there is no frame, or the sound cannot be read.
        RuntimeError: PyAV was built without an H.264 encoder.
    """
    if "libx264" not in av.codecs_available:
        raise RuntimeError("write_video: this build of PyAV has no libx264; the wheels of `pip install av` have it")
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{out}: there is no frame to write")
    partial, track = (out.with_name(f".{out.name}.{part}") for part in ("part", "sound"))
    try:
        if sound is not None:
            write_sound(track, sound, sound_start)
        with av.open(f"file:{partial}", "w", format="mp4", options={"movflags": "faststart"}) as container:
            height, width = first[1].shape[:2]
            picture = _picture_encoder(container, width + width % 2, height + height % 2, frame_rate, time_base)
            picture.codec_context.sample_aspect_ratio = aspect
            source, scaler = iter(()) if sound is None else _packets(container, track), VideoReformatter()
            packet = next(source, None)
            for time, image in chain([first], frames):
                while packet is not None and packet.dts * packet.time_base <= time:
                    container.mux(packet)
                    packet = next(source, None)
                container.mux(_encoded(picture, scaler, time, image))
            container.mux(picture.encode(None))
            container.mux([] if packet is None else [packet])
            for packet in source:
                container.mux(packet)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
        track.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path):
    """The container of `path`; whatever FFmpeg dislikes becomes one ValueError that names the file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with av.open(f"file:{path}") as container:  # a colon in a name is no protocol
            yield container
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path}: cannot be read as video or sound ({reason})") from error


def _picture_stream(container, path: Path):
    streams = [stream for stream in container.streams.video  # but for the cover of a sound file
               if stream.codec_context and not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise ValueError(f"{path}: no video stream")
    stream = _default(streams)
    stream.thread_type = "AUTO"
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def _sound_track(container, path: Path) -> av.AudioStream:
    if not container.streams.audio:
        raise ValueError(f"{path}: no sound track")
    return _default(container.streams.audio)


def _default(streams: Sequence[av.stream.Stream]) -> av.stream.Stream:
    """The track that players show: the one marked as default, else the first."""
    return next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])


def _decoded(path: Path, strict: bool = False) -> Iterator[tuple[Fraction, av.VideoFrame, tuple[int, int], Fraction]]:
    """Time since the first picture, the picture, (width, height) of the first as stored, and seconds per picture.

    A picture without a time stamp of its own, none or that of one before it, follows the one before it at the mean
    rate."""
    with _opened(path) as container:
        stream = _picture_stream(container, path)
        step = 1 / _rate(stream)
        start = last = size = None
        for frame in _frames(container, stream, path, None, strict):
            time = _time(frame)
            if last is not None and (time is None or time <= last):
                time = last + step
            last = time = time or Fraction(0)
            if start is None:
                start, size = time, (frame.width, frame.height)
            _within(time, start, path)
            yield time - start, frame, size, step
        if start is None:
            raise ValueError(f"{path}: the video stream holds no picture")
        jumps = stream.index in read_clock(path).shifts
        declared = stream.duration and not jumps and float(stream.duration * stream.time_base)
        found = float(last - start + step)
        if declared and found < 0.9 * declared - 1:  # ends of edited files are often a little off
            raise ValueError(f"{path}: is cut off: its pictures end at {found:.1f} s of {declared:.1f} s")


def _frames(container, track, path: Path, start: Fraction | None, strict: bool) -> Iterator[av.frame.Frame]:
    """The frames of a track. What is damaged is left out, and told in one warning when all has been read.

    Args:
        start: of the file's clock, None for the first frame's.

    Raises:
        ValueError: something is damaged, and reading `strict`. FFmpegError: nothing can be decoded.
    """
    damaged: list[float] = []
    first_error, kind, stamp = None, "pictures" if track.type == "video" else "sound", 0
    for packet in read_clock(path).packets(container, track):
        stamp = next((x for x in (packet.pts, packet.dts) if x is not None), stamp)
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            time = float(stamp * Fraction(track.time_base) - (start or 0))
            if strict:
                raise ValueError(f"{path}: damaged {kind} at {time:.1f} s ({error.strerror})") from error
            damaged.append(time)
            first_error = first_error or error
            continue
        for frame in frames:
            start = _time(frame) if start is None else start
            yield frame
    if first_error is not None and start is None:
        raise first_error
    if damaged:
        warnings.warn(f"{path}: {kind} damaged, and left out, at {_spans(damaged)}", stacklevel=2)


def _spans(times: list[float]) -> str:
    """Moments in seconds as spans, `1.2, 3.0-3.4 s`; those less than half a second apart are one."""
    spans: list[list[float]] = []
    for time in sorted(times):
        if spans and time - spans[-1][1] < 0.5:
            spans[-1][1] = time
        else:
            spans.append([time, time])
    return ", ".join("-".join(dict.fromkeys(f"{time:.1f}" for time in span)) for span in spans) + " s"


def _declared(container, stream) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _rate(stream) -> Fraction:
    return Fraction(stream.average_rate or stream.guessed_rate or 25)


def _time(frame) -> Fraction | None:
    return None if frame.pts is None else frame.pts * Fraction(frame.time_base)


def _within(time: Fraction, start: Fraction, path: Path) -> Fraction:
    if time - start > LONGEST:
        raise ValueError(f"{path}: its time stamps reach {float(time - start):.0f} s, beyond the limit of {LONGEST} s")
    return time


def _upright(frame: av.VideoFrame, scaler: VideoReformatter, size: tuple[int, int] | None = None) -> np.ndarray:
    """[height, width, 3] uint8 RGB, turned as the file asks. `scaler` keeps its tables from picture to picture."""
    width, height = size or (frame.width, frame.height)
    known = COLOURS.get(frame.colorspace)
    colours = {"src_colorspace": known, "dst_colorspace": "DEFAULT"} if known else {}
    image = scaler.reformat(frame, width, height, "rgb24", threads=1, **colours).to_ndarray()
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))


def _picture_encoder(container, width: int, height: int, frame_rate: Fraction, time_base: Fraction):
    stream = container.add_stream("libx264", rate=frame_rate, options={"crf": "18", "preset": "veryfast"})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.time_base = stream.codec_context.time_base = time_base
    stream.thread_type = "FRAME"  # less work than slices, and smaller files
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1  # BT.709, limited range
    return stream


def _encoded(stream, scaler: VideoReformatter, time: Fraction, image: np.ndarray) -> list[av.Packet]:
    height, width = image.shape[:2]
    if (width, height) != (stream.width, stream.height):
        image = np.pad(image, ((0, stream.height - height), (0, stream.width - width), (0, 0)), "edge")
    frame = av.VideoFrame.from_ndarray(image, "rgb24")
    frame = scaler.reformat(frame, format="yuv420p", dst_colorspace="ITU709", threads=1)
    frame.time_base = stream.codec_context.time_base
    frame.pts = round(time / frame.time_base)
    return stream.encode(frame)


def write_sound(out: Path, sound: Path, start: Fraction = Fraction(0), strict: bool = False) -> None:
    """Write the sound track of a file as an mp4 whose time 0 is the moment `start` of the file's clock.

    It is copied bit for bit where mp4 players accept its coding and it is whole, and becomes AAC otherwise: at the
    nearest rate that AAC has, mono or stereo, with zeros where its time stamps leave something out.

    Raises:
        ValueError: one line naming the file, when it has no sound track, cannot be decoded, or, `strict`, is damaged.
    """
    partial = out.with_name(f".{out.name}.part")
    try:
        with _opened(sound) as source:
            track = _sound_track(source, sound)
            rate, layout = min(AAC_RATES, key=lambda x: (abs(x - track.rate), -x)), _players_layout(track.channels)
            copied = track.codec_context.name in COPIED_SOUND and not read_clock(sound).shifts.get(track.index)
        if not (copied and _copy_sound(partial, sound, start)):
            with av.open(f"file:{partial}", "w", format="mp4") as container:
                target = container.add_stream("aac", rate=rate, layout=layout)
                for frame in _as_frames(_sound(sound, start, rate, layout, strict), rate, layout):
                    container.mux(target.encode(frame))
                container.mux(target.encode(None))
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _copy_sound(out: Path, path: Path, start: Fraction) -> bool:
    """Whether the packets of a sound track could be copied: each can be decoded, and an mp4 takes it."""
    try:
        with av.open(f"file:{path}") as source, av.open(f"file:{out}", "w", format="mp4") as container:
            track = _sound_track(source, path)
            target = container.add_stream_from_template(track)
            shift = round(start / track.time_base)
            for packet in source.demux(track):
                packet.decode()
                if packet.dts is not None:
                    packet.pts = (packet.dts if packet.pts is None else packet.pts) - shift
                    packet.dts, packet.stream = packet.dts - shift, target
                    container.mux(packet)
        return True
    except (av.error.FFmpegError, ValueError):
        return False


def _as_frames(pieces: Iterable[np.ndarray], rate: int, layout: str) -> Iterator[av.AudioFrame]:
    place = 0
    for piece in pieces:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), "fltp", layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), place
        place += piece.shape[1]
        yield frame


def _players_layout(channels: int) -> str:
    return "mono" if channels == 1 else "stereo"


def _packets(container, sound: Path) -> Iterator[av.Packet]:
    """Those of a file of `write_sound`, for a track that the first step adds to `container`."""
    with av.open(f"file:{sound}") as source:
        track = source.streams.audio[0]
        target = container.add_stream_from_template(track)
        for packet in source.demux(track):
            if packet.dts is not None:
                packet.stream = target
                yield packet
