"""What is read is what is shown: pictures turned, levels and tracks chosen, pixels in shape, whatever a file's name."""
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from av.stream import Disposition
from PIL import ExifTags, Image

from icf.config import DataConfig
from icf.data import build_dataset
from icf.data.check import check
from icf.data.folder import open_frames, read_picture
from icf.data.transforms import resize_frame
from icf.data.video import open_video, read_sound, write_video

TURNS = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
         6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a)}


def quarters(height=24, width=40):
    """A picture of four colours."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:height // 2, :width // 2], image[:height // 2, width // 2:] = (250, 20, 20), (20, 250, 20)
    image[height // 2:, :width // 2], image[height // 2:, width // 2:] = (20, 20, 250), (240, 240, 240)
    return image


def save_turned(path, image, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(image).save(path, exif=exif)
    return path


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", TURNS)
def test_pictures_are_turned_as_their_exif_data_ask(tmp_path, orientation, ending):
    shown = TURNS[orientation](quarters())
    read = read_picture(save_turned(tmp_path / f"1.{ending}", quarters(), orientation))
    assert read.shape == shown.shape
    for y in (0.25, 0.75):
        for x in (0.25, 0.75):
            place = int(y * shown.shape[0]), int(x * shown.shape[1])
            assert np.abs(read[place].astype(int) - shown[place]).max() < 30


def own_clips(root, orientation, side):
    for split in ("train", "val", "test"):
        for folder in ("frames", "labels"):
            (root / split / folder).mkdir(parents=True)
        save_turned(root / split / "frames" / "1.png", quarters(side, side), orientation)
        shown = TURNS.get(orientation, np.asarray)(quarters(side, side)[..., 0]) > 200
        Image.fromarray(shown.astype(np.uint8) * 255).save(root / split / "labels" / "1.png")
        soundfile.write(root / split / "audio.wav", np.zeros(16000), 16000)
    (root / "clips.csv").write_text("name,split\ntrain,train\nval,val\ntest,test\n")


def test_a_turned_picture_and_its_label_match_and_the_check_tells_of_it(tmp_path):
    own_clips(tmp_path, 6, 32)
    clip = build_dataset(DataConfig(root=tmp_path, subset="folder", size=32, frames=1), "train")[0]
    red = (clip.frames[0, 0] > 200)
    assert (red == (clip.masks[0] == 1)).float().mean() > 0.95
    found = check(tmp_path, "folder", deep=True, progress=False)
    assert found.exit_code == 1 and sum("stored turned" in finding.what for finding in found.findings) == 3


def test_a_folder_of_turned_pictures_is_predicted_upright(tmp_path):
    save_turned(tmp_path / "1.jpg", quarters(), 6)
    save_turned(tmp_path / "2.jpg", quarters(), 8)
    found = open_frames(tmp_path, silent_ok=True)
    assert (found.width, found.height) == (24, 40) and [image.shape for _, image in found.frames()] == [(40, 24, 3)] * 2


def test_grey_of_sixteen_bits_keeps_its_levels(tmp_path):
    levels = np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "1.png")
    assert np.abs(read_picture(tmp_path / "1.png")[..., 0] - levels / 257).max() <= 1
    with Image.open(tmp_path / "1.png") as image:
        assert np.abs(resize_frame(image, 16)[0].numpy() - levels / 257).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_other_kinds_look_the_same(tmp_path, mode):
    ending = "jpg" if mode == "CMYK" else "png"
    grey = np.where(quarters()[..., :1] > 100, 255, 0).astype(np.uint8).repeat(3, 2)
    Image.fromarray(grey).convert(mode).save(tmp_path / f"1.{ending}")
    assert np.abs(read_picture(tmp_path / f"1.{ending}").astype(int) - grey).mean() < 3


def make_tracks(path, default):
    """Sound and picture in two tracks each, of levels 0.1 and 0.5 and grey 50 and 200; `default`: places of those that
    are marked."""
    with av.open(str(path), "w") as container:
        pictures = [container.add_stream("libx264", rate=10) for _ in range(2)]
        sounds = [container.add_stream("pcm_s16le", rate=16000, layout="mono") for _ in range(2)]
        for place, (picture, sound) in enumerate(zip(pictures, sounds, strict=True)):
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
            for stream in (picture, sound):
                stream.disposition = Disposition.default if place == default else Disposition(0)
        for picture, level in zip(pictures, (50, 200), strict=True):
            for i in range(10):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), "rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 10)
                container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        for sound, level in zip(sounds, (0.1, 0.5), strict=True):
            frame = av.AudioFrame.from_ndarray(np.full((1, 16000), level * 32767, np.int16), "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path


@pytest.mark.parametrize("default, place", [(0, 0), (1, 1), (None, 0)])
def test_the_track_marked_as_default_is_read(tmp_path, default, place):
    path = make_tracks(tmp_path / "two.mkv", default)
    assert np.concatenate([*read_sound(path)])[4000:12000].mean() == pytest.approx((0.1, 0.5)[place], abs=0.01)
    _, picture = next(open_video(path).frames())
    assert abs(int(picture.mean()) - (50, 200)[place]) < 6
    video = open_video(path)
    write_video(tmp_path / "out.mp4", video.frames(), video.frame_rate, video.time_base, path)
    assert np.concatenate([*read_sound(tmp_path / "out.mp4")])[4000:12000].mean() == pytest.approx(
        (0.1, 0.5)[place], abs=0.03)


@pytest.mark.parametrize("name", ["12:30 x.mkv", "http:clip.mkv", "-clip.mkv", "clip %d %03d.mkv", "Жук 犬.mkv"])
def test_a_name_is_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make_tracks(tmp_path / "clip.mkv", 0).rename(tmp_path / name)
    video = open_video(Path(name))
    out = Path(name).with_suffix(".mp4")
    write_video(out, video.frames(), video.frame_rate, video.time_base, video.sound)
    assert len([*open_video(out).frames()]) == 10 and (tmp_path / out).is_file()
    assert sum(map(len, read_sound(Path(name)))) == 16000


@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(1, 2), Fraction(1)])
def test_pixels_keep_their_shape(tmp_path, aspect):
    frames = [(Fraction(i, 5), np.full((32, 64, 3), 40 * i, np.uint8)) for i in range(5)]
    write_video(tmp_path / "a.mp4", frames, Fraction(5), Fraction(1, 1000), aspect=aspect)
    found = open_video(tmp_path / "a.mp4", silent_ok=True)
    assert found.aspect == aspect
    write_video(tmp_path / "b.mp4", found.frames(), found.frame_rate, found.time_base, aspect=found.aspect)
    assert open_video(tmp_path / "b.mp4", silent_ok=True).aspect == aspect
