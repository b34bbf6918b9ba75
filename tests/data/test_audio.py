"""The log-mel front end against the published values, resampling, reading, and log-mel files from strangers."""
import io
import math
import os
import pickle

import numpy as np
import pytest
import soundfile
import torch

from icf.data.audio import (
    SILENCE,
    load_log_mel,
    load_wav,
    log_mel_examples,
    log_mel_spectrogram,
    mel_matrix,
    resample,
)


def sine(frequency, seconds=5.0, rate=16000, amplitude=0.5):
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    return (amplitude * torch.sin(2 * math.pi * frequency * time)).float()


def test_sine_of_1000_hz_gives_the_published_values():
    examples = log_mel_examples(sine(1000))
    assert examples.shape == (5, 1, 96, 64) and (examples.argmax(-1) == 19).all()
    assert examples[0, 0, 0, 18:22].tolist() == pytest.approx([2.0005, 4.1181, 4.0820, 1.5701], abs=1e-4)
    assert examples[0, 0, 0].max().item() == pytest.approx(4.118052, abs=2e-5)
    assert examples.mean().item() == pytest.approx(-3.657225, abs=1e-4)


def test_sine_of_440_hz_gives_the_published_values():
    first = log_mel_examples(sine(440))[0, 0, 0]
    assert first.argmax() == 8 and first.max().item() == pytest.approx(4.089164, abs=2e-5)


def test_silence_is_the_logarithm_of_the_offset():
    torch.testing.assert_close(log_mel_examples(torch.zeros(80000)), torch.full((5, 1, 96, 64), -4.605170))


def test_mel_matrix_has_no_empty_band():
    matrix = mel_matrix()
    assert matrix.shape == (257, 64) and matrix.sum().item() == pytest.approx(230.9136, abs=1e-3)
    assert matrix[:, 0].nonzero().flatten().tolist() == [5] and (matrix.sum(0) > 0).all() and not matrix[0].any()


@pytest.mark.parametrize("samples, frames, examples", [(80000, 498, 5), (77040, 480, 5), (76800, 478, 4),
                                                       (160000, 998, 10), (153840, 960, 10), (153600, 958, 9)])
def test_examples_for_a_duration(samples, frames, examples):
    sound = torch.zeros(samples)
    assert len(log_mel_spectrogram(sound)) == frames and len(log_mel_examples(sound)) == examples


def test_examples_follow_one_another_or_the_seconds():
    sound = torch.randn(80000, generator=torch.Generator().manual_seed(0)) * 0.1
    spectrogram = log_mel_spectrogram(sound)
    for i in range(5):
        assert torch.equal(log_mel_examples(sound)[i, 0], spectrogram[96 * i:96 * i + 96])
        assert torch.equal(log_mel_examples(sound, "aligned")[i, 0], spectrogram[100 * i:100 * i + 96])


def test_too_few_examples_are_repeated_or_zero():
    sound = sine(700, 4.8)
    repeated, zero = (log_mel_examples(sound, frames=6, pad=pad) for pad in ("repeat", "zero"))
    assert torch.equal(repeated[:4], zero[:4]) and not zero[4:].any()
    assert torch.equal(repeated[4], repeated[3]) and torch.equal(repeated[5], repeated[3])
    assert torch.equal(log_mel_examples(sound, frames=2), zero[:2])


def test_sound_shorter_than_an_example_is_completed_by_silence():
    examples = log_mel_examples(sine(700, 0.3))
    assert len(examples) == 1 and examples[0, 0, 0].max() > 3
    assert (examples[0, 0, -1] == torch.tensor(SILENCE)).all()


@pytest.mark.parametrize("arguments, said", [
    ({"waveform": torch.zeros(0)}, "waveform must be"), ({"waveform": torch.zeros(2, 9)}, "waveform must be"),
    ({"timing": "late"}, "timing must be"), ({"pad": "mirror"}, "pad must be")])
def test_front_end_names_the_bad_argument(arguments, said):
    with pytest.raises(ValueError, match=said):
        log_mel_examples(**{"waveform": torch.zeros(80000), **arguments})


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000])
def test_resampling_keeps_what_is_below_and_removes_what_is_above(rate):
    inner = slice(1000, -1000)
    got = resample(sine(1000, rate=rate), rate)
    torch.testing.assert_close(got[inner], sine(1000)[:len(got)][inner], atol=1e-5, rtol=0)
    assert len(got) == 80000
    if rate > 20000:
        assert resample(sine(9000, rate=rate), rate)[inner].abs().max() < 1e-5


def test_resampling_is_that_of_resampy():
    """What resampy 0.2.2 gives with `kaiser_best`, which it takes by default."""
    sound = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, 4000)).float()
    expected = torch.tensor([-0.52295316, -0.99762431, 0.06082766, -0.20651726, -0.3082556])
    torch.testing.assert_close(resample(sound, 32000)[1000:1005], expected, atol=1e-6, rtol=0)


def test_resampling_at_the_same_rate_changes_nothing_and_odd_rates_are_refused():
    sound = sine(500)
    assert torch.equal(resample(sound, 16000), sound)
    with pytest.raises(ValueError, match="16001 Hz"):
        resample(sound, 16001)
    with pytest.raises(ValueError, match="above 0"):
        resample(sound, 0)


def test_wav_is_scaled_and_its_channels_averaged(tmp_path):
    samples = np.array([[16384, 0], [-32768, -32768], [32767, 1]], dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 22050)
    waveform, rate = load_wav(tmp_path / "a.wav")
    assert rate == 22050 and waveform.tolist() == [0.25, -1.0, 0.5]


def test_wav_that_is_none_is_named(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, dtype=np.int16), 16000)
    for name, error, said in (("gone.wav", FileNotFoundError, "no such sound file"),
                              ("text.wav", ValueError, "not a readable sound file"),
                              ("empty.wav", ValueError, "is empty")):
        with pytest.raises(error, match=f"{name}: .*{said}"):
            load_wav(tmp_path / name)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_log_mel_file_is_read_without_its_gradient(tmp_path, protocol):
    tensor = torch.randn(5, 1, 96, 64, requires_grad=True)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tensor, protocol))
    got = load_log_mel(tmp_path / "a.pkl")
    assert torch.equal(got, tensor) and not got.requires_grad


def test_log_mel_file_may_hold_a_view_or_a_parameter(tmp_path):
    values = torch.randn(64, 96, 1, 5).permute(3, 2, 1, 0)
    for tensor in (values, torch.nn.Parameter(values)):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(tensor))
        assert torch.equal(load_log_mel(tmp_path / "a.pkl"), values)


class Reduced:
    """Pickles to a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def hostile(marker):
    """Files that would make a folder if they were unpickled in the usual way, or read beyond their storage."""
    code = Reduced(os.mkdir, (str(marker),))
    nested = io.BytesIO()
    torch.save(code, nested)
    storage = torch.zeros(4).untyped_storage()
    beyond = Reduced(torch._utils._rebuild_tensor_v2, (torch.storage.TypedStorage(wrap_storage=storage,
                     dtype=torch.float32, _internal=True), 0, (5, 1, 96, 64), (6144, 6144, 64, 1), False, {}))
    return {
        "call": code,
        "call inside a list": [torch.zeros(5, 1, 96, 64), code],
        "evaluation": Reduced(eval, (f"__import__('os').mkdir({str(marker)!r})",)),
        "call inside the bytes of a storage": Reduced(torch.storage._load_from_bytes, (nested.getvalue(),)),
        "tensor beyond its storage": beyond,
    }


@pytest.mark.parametrize("kind", hostile("x"))
def test_hostile_log_mel_file_runs_nothing(tmp_path, kind):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(hostile(tmp_path / "marker")[kind]))
    with pytest.raises(ValueError, match="a.pkl: not a pickled tensor"):
        load_log_mel(tmp_path / "a.pkl")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("content, said", [
    (torch.zeros(5, 96, 64), r"expected a tensor \[n,1,96,64\], got \[5, 96, 64\]"),
    (torch.zeros(0, 1, 96, 64), "expected a tensor"),
    ([1.0, 2.0], "expected a tensor .* got list"),
    (torch.full((5, 1, 96, 64), float("nan")), "not finite")])
def test_log_mel_file_with_something_else_is_named(tmp_path, content, said):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"a.pkl: .*{said}"):
        load_log_mel(tmp_path / "a.pkl")


def test_log_mel_file_that_is_broken_large_or_missing_is_named(tmp_path):
    path = tmp_path / "a.pkl"
    with pytest.raises(FileNotFoundError, match="no such log-mel file"):
        load_log_mel(path)
    whole = pickle.dumps(torch.zeros(5, 1, 96, 64))
    for content in (b"", b"\x80", whole[:1000], b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a pickled tensor"):
            load_log_mel(path)
    with path.open("wb") as file:
        file.truncate(2**25)
    with pytest.raises(ValueError, match="at most"):
        load_log_mel(path)
