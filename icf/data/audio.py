"""Sound: reading, resampling, the log-mel front end of VGGish, and the log-mel files that come with the benchmarks.

Constants of the front end: Hershey et al., CNN architectures for large-scale audio classification, ICASSP 2017, and the
code released with it. `tests/data/test_audio.py` holds reference values.
"""
from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

RATE = 16000  # Hz
WINDOW, HOP, FFT = 400, 160, 512  # samples: 25 ms, 10 ms
BANDS, LOW, HIGH = 64, 125.0, 7500.0  # mel bands between two frequencies in Hz
EXAMPLE = 96  # STFT frames: 0.96 s
OFFSET = 0.01  # added before the logarithm: digital silence is ln 0.01
SILENCE = math.log(OFFSET)

ZEROS, ROLLOFF, BETA = 64, 0.9475937167399596, 14.769656459379492
RESAMPLER = f"Kaiser-windowed sinc, {ZEROS} zero crossings, roll-off {ROLLOFF:.4f}, beta {BETA:.2f}"
RATES = 4000, 768_000  # Hz, beyond which the header of a file is not believed
LOUDEST = 2.0**16  # sample beyond which a file of floating point numbers is not believed; full scale is 1
MAX_SAMPLES = 2**28  # of a sound that is read as a whole: 1 GiB, 93 minutes at 48 kHz
BLOCK = 2**16  # samples read at a time
MAX_PICKLE = 16 * 2**20  # bytes; the distributed files have 0.12 MB


def load_wav(path: Path | str) -> tuple[Tensor, int]:
    """Sound of a file as (float32 [n] in [-1,1], rate in Hz); 16-bit samples are divided by 32768, channels averaged.

    Raises FileNotFoundError where there is no such file and ValueError where it holds no sound, or one of absurd
    length, rate or samples.
    """
    import soundfile

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such sound file")
    pieces = []
    try:
        with soundfile.SoundFile(path) as file:  # by blocks: the length in its header may be a lie
            rate = file.samplerate
            while len(block := file.read(BLOCK, "float32", always_2d=True)) and len(pieces) <= MAX_SAMPLES // BLOCK:
                pieces.append(torch.from_numpy(block).mean(dim=1))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: not a readable sound file ({error})") from error
    if not pieces:
        raise ValueError(f"{path}: the sound file is empty")
    waveform = torch.cat(pieces)
    if len(waveform) > MAX_SAMPLES:
        raise ValueError(f"{path}: the sound is longer than {MAX_SAMPLES} samples; cut it into clips")
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"{path}: expected a rate of {RATES[0]} to {RATES[1]} Hz, got {rate}")
    if not (waveform.abs() <= LOUDEST).all():
        raise ValueError(f"{path}: holds values that are not finite, or beyond {LOUDEST:.0f} times full scale")
    return waveform, rate


def read_waveform(path: Path | str) -> Tensor:
    """Sound of a file at 16 kHz, float32 [n]. Raises as `load_wav`, and for a rate that `resample` refuses."""
    waveform, rate = load_wav(path)
    try:
        return resample(waveform, rate)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@lru_cache(maxsize=8)
def _resampling_kernel(down: int, up: int) -> tuple[Tensor, int]:
    """Filters [up,1,down+2*width], one per output sample of a period of `down` input samples, and the width."""
    scale = min(1.0, up / down)  # of the lower rate to that of the source
    width = math.ceil(ZEROS / scale)
    offsets = torch.arange(-width, width + down, dtype=torch.float64)  # [taps]
    phases = torch.arange(up, dtype=torch.float64) * down / up  # [up]
    time = (offsets - phases[:, None]) * scale  # in zero crossings at the lower rate; the taper has no roll-off in it
    shape = torch.special.i0(BETA * (1 - (time / ZEROS).square()).clamp(min=0).sqrt())  # Kaiser, up to a factor
    shape /= torch.special.i0(torch.tensor(BETA, dtype=torch.float64))
    kernel = scale * ROLLOFF * torch.sinc(ROLLOFF * time) * shape * (time.abs() < ZEROS)
    return kernel.float()[:, None], width


def resample(waveform: Tensor, rate: int, target: int = RATE) -> Tensor:
    """Sound [n] at `rate` Hz as [ceil(n * target / rate)] at `target` Hz, by a polyphase Kaiser-windowed sinc.

    The filter is `kaiser_best` of resampy 0.2.2, with which the published features were computed: the same to rounding
    where the ratio of the rates is a power of two. At others resampy goes through its table in steps that are rounded
    down, which moves the filter by up to half a percent, and we do not. Raises ValueError for rates whose ratio needs
    an unreasonably large filter bank (16001 Hz, say).
    """
    if rate <= 0 or target <= 0:
        raise ValueError(f"resample: rates must be above 0, got {rate} and {target}")
    if rate == target:
        return waveform
    down, up = rate // math.gcd(rate, target), target // math.gcd(rate, target)
    if up * down > 2**23:
        raise ValueError(f"resample: {rate} Hz has the awkward ratio {down}:{up} to {target} Hz; convert it first")
    kernel, width = _resampling_kernel(down, up)
    length = math.ceil(len(waveform) * up / down)
    padded = F.pad(waveform.float(), (width, width + down))
    return F.conv1d(padded[None, None], kernel, stride=down)[0].T.reshape(-1)[:length]


@lru_cache(maxsize=1)
def mel_matrix() -> Tensor:
    """[257,64] float32: triangles on the HTK mel scale, linear in mel, over FFT bins; the row of DC is zero."""

    def mel(frequency):
        return 1127.0 * torch.log1p(frequency / 700.0)

    edges = torch.linspace(*mel(torch.tensor([LOW, HIGH], dtype=torch.float64)).tolist(), BANDS + 2,
                           dtype=torch.float64)
    bins = mel(torch.linspace(0, RATE / 2, FFT // 2 + 1, dtype=torch.float64))[:, None]
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    weights = torch.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre)).clamp(min=0)
    weights[0] = 0
    return weights.float()


def log_mel_spectrogram(waveform: Tensor) -> Tensor:
    """ln(mel + 0.01) [1 + (n - 400) // 160, 64] of a sound [n] at 16 kHz; magnitudes, no padding at the ends."""
    if len(waveform) < WINDOW:
        return waveform.new_zeros(0, BANDS)
    windows = waveform.float().unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW, periodic=True)  # [frames,400]
    return torch.log(torch.fft.rfft(windows, FFT).abs() @ mel_matrix() + OFFSET)


def log_mel_examples(waveform: Tensor, timing: str = "vggish", frames: int | None = None,
                     pad: str = "repeat") -> Tensor:
    """The log-mel examples of a sound at 16 kHz.

    Args:
        waveform: [n], n >= 1, floating point in [-1,1].
        timing: `vggish`: example i starts at 0.96 i s and incomplete ones are dropped, as published. `aligned`: example
            i starts at i s, one per started second of which at least half is there, completed by zeros.
        frames: number of examples to return; None for as many as there are.
        pad: what completes too few: `repeat` the last one (S4, MS3) or `zero` rows (AVSS). A sound without any complete
            example is first completed by silence.

    Returns:
        [frames,1,96,64] float32, axes time and mel.
    """
    if timing not in ("vggish", "aligned"):
        raise ValueError(f"log_mel_examples: timing must be vggish or aligned, got {timing!r}")
    if pad not in ("repeat", "zero"):
        raise ValueError(f"log_mel_examples: pad must be repeat or zero, got {pad!r}")
    if waveform.ndim != 1 or not len(waveform):
        raise ValueError(f"log_mel_examples: waveform must be [n] with n >= 1, got {list(waveform.shape)}")
    samples = (EXAMPLE - 1) * HOP + WINDOW  # of one example
    if timing == "vggish":
        step, least = EXAMPLE, samples
    else:
        step = RATE // HOP
        least = (max(1, round(len(waveform) / RATE)) - 1) * RATE + samples
    spectrogram = log_mel_spectrogram(F.pad(waveform, (0, max(0, least - len(waveform)))))
    examples = spectrogram.unfold(0, EXAMPLE, step).transpose(1, 2)[:, None]  # [n,1,96,64]
    return fit_examples(examples, frames, pad)


def fit_examples(examples: Tensor, frames: int | None, pad: str = "repeat") -> Tensor:
    """Cut examples [n,1,96,64], n >= 1, to `frames`, or complete them as `log_mel_examples` says."""
    if frames is None or len(examples) == frames:
        return examples.contiguous()
    if len(examples) < frames:
        more = (frames - len(examples), -1, -1, -1)
        tail = examples[-1:] if pad == "repeat" else torch.zeros_like(examples[-1:])
        examples = torch.cat((examples, tail.expand(more)))
    return examples[:frames].contiguous()


def load_log_mel(path: Path | str) -> Tensor:
    """A distributed log-mel file (a pickled tensor) as [n,1,96,64] float32.

    The file is read by an unpickler that knows how to rebuild a tensor and nothing else, so that a hostile file can
    neither run code nor ask for more memory than it has bytes.

    Raises FileNotFoundError, or ValueError where the file holds anything but finite log-mel examples.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such log-mel file")
    if path.stat().st_size > MAX_PICKLE:
        raise ValueError(f"{path}: expected a log-mel file of at most {MAX_PICKLE} bytes, got {path.stat().st_size}")
    data = path.read_bytes()
    try:
        _check_places(data)
        examples = _TensorUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError,
            AssertionError, OverflowError, ImportError, struct.error, MemoryError) as error:
        raise ValueError(f"{path}: not a pickled tensor ({str(error) or 'it asks for too much memory'})") from error
    if not isinstance(examples, Tensor) or examples.shape[1:] != (1, EXAMPLE, BANDS) or not len(examples):
        got = list(examples.shape) if isinstance(examples, Tensor) else type(examples).__name__
        raise ValueError(f"{path}: expected a tensor [n,1,{EXAMPLE},{BANDS}], got {got}")
    examples = examples.detach().float()
    if not examples.isfinite().all():
        raise ValueError(f"{path}: log-mel values are not finite")
    return examples


def _check_places(data: bytes) -> None:
    """Refuse a place in the unpickler's memory beyond what the file can fill: all places before it would be made."""
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name and not 0 <= argument <= len(data):
            raise pickle.UnpicklingError(f"{opcode.name} {argument} is not part of a tensor")


class _TensorUnpickler(pickle.Unpickler):
    """Unpickler whose every global is one of the functions below, never what the file names."""

    def find_class(self, module, name):
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a tensor") from None


def _storage(data: bytes) -> torch.TypedStorage:
    """What `torch.storage._load_from_bytes` does, but without trust in `data`; what a tensor is pickled to is no zip
    archive, whose entries could be much larger than the file."""
    if data.startswith(b"PK"):
        raise pickle.UnpicklingError("a zip archive is not part of a tensor")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage, offset, size, stride, *_) -> Tensor:
    """What `torch._utils._rebuild_tensor_v2` does, without gradients, hooks and growth of the storage."""
    flat = torch.empty(0, dtype=storage.dtype).set_(storage)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if offset < 0 or min(size, default=1) < 0 or min(stride, default=0) < 0 or last >= len(flat) or (
            math.prod(size) > MAX_PICKLE):
        raise pickle.UnpicklingError("the tensor reaches beyond its storage")
    return torch.as_strided(flat, size, stride, offset)


def _parameter(tensor, *_) -> Tensor:
    return tensor


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 and older write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding} is not part of a tensor")
    return text.encode(encoding)


_GLOBALS = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
}
