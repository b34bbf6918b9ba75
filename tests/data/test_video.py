"""Pictures and sound come out at the right time and the right way up; what cannot be read is refused in one line."""
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from icf.data.folder import import_clip
from icf.data.video import open_video, read_sound, write_sound, write_video

RATE = 16000


def bursts(seconds, rate):
    """A 440 Hz tone of amplitude 0.5 in the second half of every second."""
    time = np.arange(round(seconds * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * 440 * time) * (time % 1 >= 0.5)


def make_video(path, seconds=3.0, fps=10, times=None, size=(64, 48), sound="aac", rate=44100, layout="stereo", delay=0,
               codec="libx264", bottom=None, **options):
    """A film whose picture at t seconds is grey of level 10 * (10 t % 25), the lower half grey of level `bottom`."""
    with av.open(str(path), "w", options=options) as container:
        pictures = container.add_stream(codec, rate=fps, options={"crf": "1"} if codec == "libx264" else {})
        pictures.width, pictures.height, pictures.pix_fmt = *size, "yuv420p"
        pictures.time_base = pictures.codec_context.time_base = Fraction(1, 1000)
        if sound:
            track = container.add_stream(sound, rate=rate, layout=layout)
            wave = np.tile(bursts(seconds, rate), (track.channels, 1)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(wave, "fltp", layout)
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(delay * rate)
            container.mux(track.encode(frame))
            container.mux(track.encode(None))
        for time in np.arange(round(seconds * fps)) / fps if times is None else times:
            image = np.full((size[1], size[0], 3), round(time * 10) % 25 * 10, np.uint8)
            if bottom is not None:
                image[size[1] // 2:] = bottom
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.time_base, frame.pts = Fraction(1, 1000), round(time * 1000)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
    return path


def rotate(path, matrix):
    """Write a, b, c, d of a display matrix into the track header of the pictures, the first track of an mp4."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    a, b, c, d = (round(x * 65536) for x in matrix)
    data[place:place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def read_all(path, start=0):
    return np.concatenate(list(read_sound(path, start)))


def onsets(sound):
    """Seconds at which a sound becomes loud after at least 0.3 s of quiet."""
    loud = np.flatnonzero(np.abs(sound) > 0.1)
    return loud[np.diff(loud, prepend=-RATE) > 0.3 * RATE] / RATE


def levels(frames):
    return [round(float(image.mean()) / 10) for _, image in frames]


@pytest.mark.parametrize("seconds, expected", [(3, [9, 19, 4]), (2.4, [9, 19]), (2.5, [9, 19, 24]), (0.3, [2])])
def test_one_picture_a_second_and_the_last_half(tmp_path, seconds, expected):
    """Level 9 is the picture of 0.9 s, on show at 15/16 s; half a second more counts, less does not."""
    video = open_video(make_video(tmp_path / "a.mp4", seconds))
    sampled = list(video.sampled())
    assert levels(sampled) == expected
    assert [level % 25 for level in (round(time * 10) for time, _ in sampled)] == expected
    assert video.duration == pytest.approx(seconds) and video.frame_rate == 10


def test_a_picture_is_on_show_from_its_own_time_on(tmp_path):
    """At 16 pictures a second one comes exactly at 15/16 s."""
    frames = [(Fraction(i, 16), np.full((48, 64, 3), 5 * i, np.uint8)) for i in range(32)]
    write_video(tmp_path / "a.mp4", frames, Fraction(16), Fraction(1, 16))
    sampled = open_video(tmp_path / "a.mp4", silent_ok=True).sampled()
    assert [time for time, _ in sampled] == [Fraction(15, 16), Fraction(31, 16)]


def test_rate_and_place_of_sampling_can_be_chosen(tmp_path):
    video = open_video(make_video(tmp_path / "a.mp4", 2))
    assert levels(video.sampled(fps=2, offset=0.5)) == [2, 7, 12, 17]
    with pytest.raises(ValueError, match="fps and offset: expected above 0 and in 0..1, got 0.0"):
        next(video.sampled(fps=0))


def test_variable_frame_rate_goes_by_time_stamps(tmp_path):
    """A film that stands still shows the picture of 0.8 s at 1.9375 and 2.9375 s; counting pictures would not."""
    times = [0, 0.1, 0.2, 0.3, 0.8, 3.2, 3.3, 3.9]
    video = open_video(make_video(tmp_path / "a.mp4", 4, times=times))
    assert levels(video.sampled()) == [8, 8, 8, 39 % 25]
    assert [float(time) for time, _ in video.frames()] == pytest.approx(times)


@pytest.mark.parametrize("matrix, bright", [((1, 0, 0, 1), "bottom"), ((0, 1, -1, 0), "left"),
                                            ((-1, 0, 0, -1), "top"), ((0, -1, 1, 0), "right")])
def test_rotation_of_the_file_is_applied(tmp_path, matrix, bright):
    """(x, y) -> (a x + c y, b x + d y) by the file format: 0 1 -1 0 turns clockwise, the bottom comes to the left."""
    path = make_video(tmp_path / "a.mp4", 1, bottom=240)
    rotate(path, matrix)
    video = open_video(path)
    _, image = next(video.frames())
    assert image.shape == (video.height, video.width, 3)
    assert (video.width, video.height) == ((64, 48) if matrix[0] else (48, 64))
    halves = {"top": image[:20], "bottom": image[-20:], "left": image[:, :20], "right": image[:, -20:]}
    assert max(halves, key=lambda side: halves[side].mean()) == bright and halves[bright].mean() > 200


@pytest.mark.parametrize("name, coding", [
    ("aac.mp4", {}), ("mono.mp4", {"layout": "mono", "rate": 16000}), ("opus.mkv", {"sound": "libopus", "rate": 48000}),
    ("pcm.mov", {"sound": "pcm_s16le"}), ("old.avi", {"sound": "pcm_s16le", "codec": "mpeg4"})])
def test_sound_is_16_khz_mono_in_time(tmp_path, name, coding):
    sound = read_all(make_video(tmp_path / name, **coding))
    assert sound.dtype == np.float32 and len(sound) / RATE == pytest.approx(3, abs=0.05)
    assert onsets(sound) == pytest.approx([0.5, 1.5, 2.5], abs=0.005)
    middle = sound[round(1.6 * RATE):round(1.9 * RATE)]
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.03)  # the mean of the channels, not their sum
    assert np.argmax(np.abs(np.fft.rfft(middle))) / 0.3 == pytest.approx(440, abs=4)


@pytest.mark.parametrize("delay", [0.4, 0])
def test_sound_that_begins_late_stays_late(tmp_path, delay):
    path = make_video(tmp_path / "a.mp4", delay=delay)
    assert onsets(read_all(path)) == pytest.approx([0.5 + delay, 1.5 + delay, 2.5 + delay], abs=0.005)
    assert onsets(read_all(path, 0.7))[-2:] == pytest.approx([0.8 + delay, 1.8 + delay], abs=0.005)


def test_gaps_in_the_sound_are_silent(tmp_path):
    """Two pieces of sound with a hole of 2 s between them in the time stamps."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        track = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for start in (0, 3):
            frame = av.AudioFrame.from_ndarray((bursts(1, RATE) * 32767).astype(np.int16)[None], "s16", "mono")
            frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), start * RATE
            container.mux(track.encode(frame))
    sound = read_all(path)
    assert len(sound) == 4 * RATE and onsets(sound) == pytest.approx([0.5, 3.5], abs=0.005)
    assert not sound[RATE:3 * RATE].any()


def test_a_wav_reads_as_it_is(tmp_path):
    samples = (bursts(1.3, RATE) * 32767).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    assert np.array_equal(read_all(tmp_path / "a.wav"), samples.astype(np.float32) / 32768)


@pytest.mark.parametrize("name, coding, kept", [
    ("a.mp4", {}, "aac"), ("a.mkv", {"sound": "libopus", "rate": 48000, "delay": 0.4}, "opus"),
    ("a.mov", {"sound": "pcm_s16le", "delay": 0.4}, "aac"), ("b.mp4", {"times": [0, 0.1, 0.7, 1.3, 2.9]}, "aac"),
    ("c.mp4", {"sound": None}, None), ("a.avi", {"sound": "libmp3lame", "codec": "mpeg4"}, "mp3float"),
    ("b.avi", {"sound": "adpcm_ms", "codec": "mpeg4"}, "aac"), ("late.mkv", {"times": np.arange(7, 30) / 10}, "aac"),
    ("late.mov", {"times": np.arange(7, 30) / 10, "sound": "pcm_s16le"}, "aac")])
def test_writing_keeps_all_pictures_times_and_sound(tmp_path, name, coding, kept):
    source = open_video(make_video(tmp_path / name, **coding), silent_ok=True)
    out = tmp_path / "out.mp4"
    write_video(out, source.frames(), source.frame_rate, source.time_base, source.sound, source.start)
    again = open_video(out, silent_ok=True)
    for (time, image), (time_again, image_again) in zip(source.frames(), again.frames(), strict=True):
        assert time_again == time and np.abs(image_again.astype(int) - image).max() < 8
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out.mp4"])  # no partial file stays
    if kept is None:
        return
    with av.open(str(out)) as container:
        assert container.streams.audio[0].codec_context.name == kept
    sound, sound_again = read_all(source.path, source.start), read_all(out, again.start)
    assert onsets(sound_again) == pytest.approx(onsets(sound), abs=0.005)
    assert len(sound_again) == pytest.approx(len(sound), abs=0.05 * RATE)
    if kept == "aac" and name.endswith("mp4"):
        assert np.array_equal(sound, sound_again)  # the packets are the same


def test_odd_sizes_get_one_more_column_and_row(tmp_path):
    image = np.zeros((97, 175, 3), np.uint8)
    image[:, 100:] = 200
    write_video(tmp_path / "a.mp4", [(Fraction(i, 5), image) for i in range(5)], Fraction(5), Fraction(1, 1000))
    video = open_video(tmp_path / "a.mp4", silent_ok=True)
    _, again = next(video.frames())
    assert again.shape == (98, 176, 3) and video.duration == 1
    assert np.abs(again[:97, :175].astype(int) - image).mean() < 3 and again[50, 175].mean() > 180


def test_colours_survive(tmp_path):
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (30, 60, 90)], np.uint8)
    image = np.repeat(np.repeat(colours[None], 64, 0), 16, 1)
    write_video(tmp_path / "a.mp4", [(Fraction(0), image)], Fraction(1), Fraction(1, 1000))
    _, again = next(open_video(tmp_path / "a.mp4", silent_ok=True).frames())
    assert np.abs(again[32, 8::16].astype(int) - colours).max() <= 6


def test_a_failure_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "a.mp4").write_text("old")

    def frames():
        yield Fraction(0), np.zeros((48, 64, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", frames(), Fraction(1), Fraction(1, 1000))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_text() == "old"


def broken_video(path, what):
    """A file at `path` that `what` describes."""
    if what == "cut":
        make_video(path, 6)
        path.write_bytes(path.read_bytes()[:-3000])  # the index is at the end of an mp4
    elif what == "cut with index":
        make_video(path, 6, movflags="faststart")
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    elif what == "damaged":
        make_video(path, 6, movflags="faststart")
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        data[len(data) // 2:][::9] ^= 0xFF
        path.write_bytes(data.tobytes())
    elif what == "text":
        path.write_text("this is no video\n" * 100)
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "no sound":
        make_video(path, 1, sound=None)
    elif what == "sound only":
        soundfile.write(path, bursts(1, RATE), RATE, format="WAV")


@pytest.mark.filterwarnings("ignore:.*a.mp4. pictures damaged")
@pytest.mark.parametrize("what, reason", [
    ("missing", "no such file"), ("text", "cannot be read"), ("empty", "cannot be read"), ("cut", "cannot be read"),
    ("cut with index", "is cut off: its pictures end at .* s of 6.0 s|cannot be read"),
    ("damaged", "is cut off: its pictures end at 3.5 s of 6.0 s"), ("no sound", "no sound track; allow silence"),
    ("sound only", "no video stream")])
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, what, reason):
    path = tmp_path / "a.mp4"
    broken_video(path, what)
    with pytest.raises(ValueError, match=reason) as refusal:
        video = open_video(path)
        list(video.sampled())
        list(read_sound(video.sound))
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)


def test_a_video_without_sound_passes_when_allowed(tmp_path):
    broken_video(tmp_path / "a.mp4", "no sound")
    assert open_video(tmp_path / "a.mp4", silent_ok=True).sound is None


def joined(path, *parts):
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def shifted(path, source, shifts):
    """`source` again, packet by packet; `shifts(kind, seconds)`: what is added to a stamp, None for no stamp at all."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        tracks = {track.index: new.add_stream_from_template(track) for track in old.streams}
        for packet in old.demux():
            if packet.dts is None:
                continue
            by = shifts(packet.stream.type, float(packet.pts * packet.time_base))
            packet.stream = tracks[packet.stream_index]
            if by is None:
                packet.pts = packet.dts = None
            else:
                packet.pts += round(by / packet.time_base)
                packet.dts += round(by / packet.time_base)
            new.mux(packet)
    return path


@pytest.mark.parametrize("lengths", [(4, 4), (3, 1, 2), (1,) * 5])
def test_recordings_that_were_joined_run_on(tmp_path, lengths):
    """As much picture as sound, every picture, and every burst in its second."""
    parts = [make_video(tmp_path / f"{i}.ts", seconds) for i, seconds in enumerate(lengths)]
    video = open_video(joined(tmp_path / "joined.ts", *parts))
    total, times = sum(lengths), [float(time) for time, _ in video.frames()]
    assert len(times) == 10 * total and max(np.diff(times)) < 0.3
    assert len(list(video.sampled())) == total
    sound = read_all(video.path, video.start)
    assert len(sound) == pytest.approx(total * RATE, abs=0.15 * len(lengths) * RATE)
    assert onsets(sound) == pytest.approx(np.arange(total) + 0.5, abs=0.1 * len(lengths))
    import_clip(tmp_path / "own", video.path, "train")
    assert len(list((tmp_path / "own/joined/frames").iterdir())) == total
    assert soundfile.info(tmp_path / "own/joined/audio.wav").frames == total * RATE
    write_video(tmp_path / "out.mp4", video.frames(), video.frame_rate, video.time_base, video.sound, video.start)
    again = open_video(tmp_path / "out.mp4")
    assert len(list(again.frames())) == len(times)
    assert onsets(read_all(again.path, again.start)) == pytest.approx(onsets(sound), abs=0.05)


@pytest.mark.parametrize("shifts, pictures, seconds, bursts", [
    pytest.param(lambda kind, t: 3600 if t > 2 else 0, 40, 4, [0.5, 1.5, 2.5, 3.5], id="both jump by an hour"),
    pytest.param(lambda kind, t: 5 if t > 2 else 0, 40, 9, [0.5, 1.5, 7.5, 8.5], id="a pause of five seconds"),
    pytest.param(lambda kind, t: 5 if t > 2 and kind == "audio" else 0, 40, 4, [0.5, 1.5, 7.5, 8.5],
                 id="sound with a gap"),
])
def test_a_clock_that_jumps(tmp_path, shifts, pictures, seconds, bursts):
    video = open_video(shifted(tmp_path / "b.ts", make_video(tmp_path / "a.mp4", 4, bf="0"), shifts))
    assert len(list(video.frames())) == pictures and len(list(video.sampled())) == seconds
    assert onsets(read_all(video.path, video.start)) == pytest.approx(bursts, abs=0.15)


def test_pictures_with_the_same_stamp_follow_one_another(tmp_path):
    """All pictures of half a second have its stamp."""
    source = make_video(tmp_path / "a.mkv", 3, codec="mpeg4")
    video = open_video(shifted(tmp_path / "b.mkv", source, lambda kind, t: t // 0.5 / 2 - t if kind == "video" else 0))
    times = [float(time) for time, _ in video.frames()]
    assert len(times) == 30 and (np.diff(times) > 0).all() and len(list(video.sampled())) == 3


@pytest.mark.parametrize("rate", [7000, 8000, 10000, 11025, 16000, 22222, 44100, 48000, 96000])
@pytest.mark.parametrize("ending, coding", [(".mkv", "pcm_s16le"), (".avi", "pcm_s16le"), (".mov", "pcm_s24le"),
                                            (".mkv", "libmp3lame"), (".mkv", "flac")])
def test_every_sound_gets_into_an_overlay(tmp_path, rate, ending, coding):
    if coding == "libmp3lame" and rate not in av.codec.Codec("libmp3lame", "w").audio_rates:
        pytest.skip(f"mp3 has no {rate} Hz")
    path = tmp_path / f"a{ending}"
    make_video(path, 2, sound=coding, rate=rate, codec="mpeg4", layout="mono")
    video = open_video(path)
    write_sound(tmp_path / "sound.mp4", video.sound, video.start)
    assert onsets(read_all(tmp_path / "sound.mp4")) == pytest.approx(onsets(read_all(path, video.start)), abs=0.02)


@pytest.mark.parametrize("channels", [4, 6, 8, 12])
def test_many_channels_get_into_an_overlay(tmp_path, channels):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.tile(bursts(2, 48000)[:, None], channels), 48000)
    assert onsets(read_all(path)) == pytest.approx([0.5, 1.5], abs=0.02)
    write_sound(tmp_path / "sound.mp4", path)
    with av.open(str(tmp_path / "sound.mp4")) as file:
        assert file.streams.audio[0].channels == 2
    assert onsets(read_all(tmp_path / "sound.mp4")) == pytest.approx([0.5, 1.5], abs=0.02)


def damage(path, kind, numbers):
    """Overwrite the packets of these numbers of a track, in place."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for number, packet in enumerate(container.demux(container.streams.get(**{kind: 0})[0])):
            if number in numbers:
                data[packet.pos:packet.pos + packet.size] = b"\x55" * packet.size
    path.write_bytes(bytes(data))
    return path


def test_damaged_pictures_are_left_out_and_named(tmp_path):
    path = damage(make_video(tmp_path / "a.mp4", 3), "video", {17})
    with pytest.warns(UserWarning, match=r"a.mp4: pictures damaged, and left out, at 1.\d s"):
        times = [float(time) for time, _ in open_video(path).frames()]
    assert len(times) == 29 and max(np.diff(times)) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"a.mp4: damaged pictures at 1.\d s"):
        list(open_video(path, strict=True).frames())


def test_damaged_sound_is_silent_and_named(tmp_path):
    whole = read_all(make_video(tmp_path / "a.mp4", 3))
    path = damage(tmp_path / "a.mp4", "audio", set(range(64, 72)))
    with pytest.warns(UserWarning, match=r"a.mp4: sound damaged, and left out, at 1\.\d-1\.\d s"):
        sound = read_all(path)
    assert len(sound) == pytest.approx(len(whole), abs=200)
    assert onsets(sound)[[0, -1]] == pytest.approx([0.5, 2.5], abs=0.01)
    with pytest.raises(ValueError, match="a.mp4: damaged sound at 1"):
        list(read_sound(path, strict=True))
    with pytest.warns(UserWarning, match="sound damaged"):
        write_sound(tmp_path / "sound.mp4", path)
    assert len(read_all(tmp_path / "sound.mp4")) == pytest.approx(len(whole), abs=2000)
