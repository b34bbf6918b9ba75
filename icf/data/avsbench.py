"""AVSBench as people have it on disk: S4 (single source), MS3 (multiple sources) and AVSS (semantic)."""
from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from icf.data import IGNORE, Clip
from icf.data.audio import RATE, fit_examples, load_log_mel, log_mel_examples, read_waveform
from icf.data.disturb import unrelated_sound
from icf.data.transforms import combo, flip, resize_frame, resize_label
from icf.files import read_csv, read_json

if TYPE_CHECKING:
    from icf.config import DataConfig

SPLITS = ("train", "val", "test")
FOLDERS = {"s4": ("Single-source",), "ms3": ("Multi-sources",), "avss": ("AVSBench_semantic", "avs_released")}
METADATA = {"s4": "s4_meta_data.csv", "ms3": "ms3_meta_data.csv", "avss": "metadata.csv"}
COLUMNS = {"s4": ("name", "start_time(s)", "category", "split"), "ms3": ("name", "split"),
           "avss": ("vid", "uid", "s_min", "s_sec", "a_obj", "split", "label")}
SECONDS = {"s4": 5, "ms3": 5, "v1s": 5, "v1m": 5, "v2": 10}
PATHS = ("name", "category", "uid", "split", "label")  # columns that are parts of paths
MANIFEST, COMPOSED = "toy_manifest.json", "composed_manifest.json"  # of benchmarks that are made here
VOID = 127  # in their binary labels: ignored; background to a reader that does not know of it
NO_MANIFEST = {"oracles": {}, "clips": [], "settings": {}, "void": None}
PICTURES = ("PNG", "JPEG", "BMP", "WEBP")  # Pillow's decoders of many more formats see less use
SLIMMEST = 100  # long edge of a picture by its short one
NEGATIVE = 0x9E3779B9  # keeps the draws of sounds that belong to nothing apart from others of the same seed
CACHE_LIMIT = 2**30  # bytes of each kind of array that a data set keeps in memory


@dataclass(frozen=True)
class Record:
    """Where a clip lies: a picture and a label per second, of which the first `labelled` labels are used.

    Args:
        name: unique within the split.
        source: `s4`, `ms3`, or the folder of AVSS: `v1s`, `v1m`, `v2`.
        log_mel: the distributed log-mel file, which AVSS has not.
    """

    name: str
    split: str
    source: str
    frames: tuple[Path, ...]
    masks: tuple[Path | None, ...]
    labelled: int
    sound: Path
    log_mel: Path | None = None
    categories: tuple[str, ...] = ()


def find_root(root: Path | str, subset: str) -> Path:
    """The folder with the metadata of a subset: `root` itself or what AVSBench calls it below `root`.

    Raises FileNotFoundError, naming what is looked for.
    """
    root = Path(root)
    candidates = [root, *(root / name for name in FOLDERS[subset])]
    for folder in candidates:
        if (folder / METADATA[subset]).is_file():
            return folder
    wanted = " or ".join(str(folder / METADATA[subset]) for folder in candidates)
    raise FileNotFoundError(f"data.root: no AVSBench {subset} here, expected {wanted}")


def read_metadata(folder: Path, subset: str) -> list[dict[str, str]]:
    """Rows of the metadata by the names of `COLUMNS`, spaces trimmed. A file without these names in its first line is
    read by position. Raises ValueError where a row has too few values, or one that leads out of the data set."""
    path, columns = folder / METADATA[subset], COLUMNS[subset]
    lines = read_csv(path)
    if not lines:
        raise ValueError(f"{path}: the file is empty")
    header = ["start_time(s)" if cell.lower().startswith("start") else cell.lower() for cell in lines[0]]
    if "split" in header:
        lines = lines[1:]
    if not set(columns) - {"start_time(s)", "vid", "s_min", "s_sec", "a_obj"} <= set(header):
        header = list(columns)
    rows = []
    for number, line in enumerate(lines, start=1):
        if len(line) < len(header):
            raise ValueError(f"{path}: row {number} has {len(line)} values, expected {', '.join(header)}")
        row = dict(zip(header, line, strict=False))
        for column in PATHS:
            if column in row and not is_file_name(row[column]):
                raise ValueError(f"{path}: row {number}: {column} must do as a file name, got {row[column][:60]!r}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: names no clip")
    return rows


def is_file_name(text: str) -> bool:
    """Whether a file or folder can have this name, with an ending, and lies where it seems to."""
    return text not in ("", ".", "..") and len(text.encode()) <= 200 and text.isprintable() and not {*text} & {*"/\\"}


def read_index(folder: Path, subset: str) -> list[Record]:
    """All clips that the metadata of a subset names, with the paths where their files should be."""
    rows = read_metadata(folder, subset)
    if subset != "avss":
        return [_binary_record(folder / f"{subset}_data", subset, row) for row in rows]
    twice = {key for key, n in Counter((row["split"], row["uid"]) for row in rows).items() if n > 1}
    return [_semantic_record(folder, row, (row["split"], row["uid"]) in twice) for row in rows]


def _binary_record(base: Path, subset: str, row: dict[str, str]) -> Record:
    name, split, seconds = row["name"], row["split"], range(1, SECONDS[subset] + 1)
    if subset == "s4":
        clip = Path(split, row["category"], name)
        frames, stem = base / "visual_frames" / clip, name
    else:
        clip = Path(split, name)
        frames = base / "visual_frames" / name
        stem = name if (frames / f"{name}_1.png").exists() else f"{name}.mp4"  # re-packed copies lack the `.mp4`
    return Record(
        name=name, split=split, source=subset,
        frames=tuple(frames / f"{stem}_{i}.png" for i in seconds),
        masks=tuple(base / "gt_masks" / clip / f"{name}_{i}.png" for i in seconds),
        labelled=1 if (subset, split) == ("s4", "train") else len(seconds),
        sound=base / "audio_wav" / clip.with_name(f"{name}.wav"),
        log_mel=base / "audio_log_mel" / clip.with_name(f"{name}.pkl"),
        categories=(row["category"],) if subset == "s4" else ())


def _semantic_record(folder: Path, row: dict[str, str], ambiguous: bool) -> Record:
    label, uid = row["label"], row["uid"]
    if label not in SECONDS:
        raise ValueError(f"{folder / METADATA['avss']}: label of {uid} must be v1s, v1m or v2, got {label!r}")
    clip, seconds = folder / label / uid, range(SECONDS[label])
    return Record(
        name=f"{label}_{uid}" if ambiguous else uid, split=row["split"], source=label,
        frames=tuple(clip / "frames" / f"{i}.jpg" for i in seconds),
        masks=tuple(clip / "labels_semantic" / f"{i}.png" for i in seconds),
        labelled=1 if (label, row["split"]) == ("v1s", "train") else len(seconds),
        sound=clip / "audio.wav")


def read_classes(folder: Path) -> list[str]:
    """Class names in the order of their indices, from AVSS' `label2idx.json`. Raises ValueError unless background is 0
    and the indices, of which a mask holds 255, have no gap, as in a copy that is known to start at 1."""
    path = folder / "label2idx.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, it numbers the classes of AVSS")
    numbers = read_json(path)
    if not isinstance(numbers, dict) or not numbers or not all(isinstance(n, int) for n in numbers.values()):
        raise ValueError(f"{path}: expected an object of class names with their indices")
    names = sorted(numbers, key=numbers.get)
    if numbers.get("background") != 0 or [numbers[name] for name in names] != list(range(len(names))):
        raise ValueError(f"{path}: expected background 0 and indices without gap, got background "
                         f"{numbers.get('background')} and {min(numbers.values())}..{max(numbers.values())} "
                         f"for {len(names)} names")
    if len(names) > IGNORE:
        raise ValueError(f"{path}: expected at most {IGNORE} classes, got {len(names)}")
    return names


def find_manifest(folder: Path) -> Path | None:
    """The file in which the toy benchmark, or a composed one, tells what it is; AVSBench has none."""
    return next((folder / name for name in (MANIFEST, COMPOSED) if (folder / name).is_file()), None)


def read_manifest(folder: Path) -> dict:
    """What a benchmark that was made here says of itself: `oracles` by split, `clips`, what they were made by, and
    `void`, the value of ignored pixels in its binary labels, if there are any. Raises FileNotFoundError, or ValueError
    where the file was not written by `icf data toy` or `icf data compose`."""
    path = find_manifest(folder) or folder / MANIFEST
    found = read_json(path)
    manifest = {**NO_MANIFEST, **found} if isinstance(found, dict) else {}
    if not all((isinstance(manifest.get("oracles"), dict), isinstance(manifest.get("settings"), dict),
                isinstance(manifest.get("clips"), list), type(manifest.get("void")) in (int, type(None)))) or not all(
            map(_is_entry, manifest["clips"])):
        raise ValueError(f"{path}: expected what icf data {'compose' if path.name == COMPOSED else 'toy'} writes; "
                         "delete the folder to have it written again")
    return manifest


def _is_entry(clip: object) -> bool:
    """Whether it is an entry of a manifest. Those of composed clips have two more lists: classes that sound, and all
    that are to be seen; those of the toy tell them by its shapes."""
    def lists(key: str, is_item: Callable[[object], bool]) -> bool:
        return isinstance(clip.get(key, []), list) and all(map(is_item, clip.get(key, [])))

    def is_name(x: object) -> bool:
        return isinstance(x, str)

    def is_source(x: object) -> bool:
        return isinstance(x, dict) and is_name(x.get("class")) and isinstance(x.get("sounding"), list)

    return (isinstance(clip, dict) and all(is_name(clip.get(key)) for key in ("name", "group", "split"))
            and all(lists(key, is_name) for key in ("categories", "in_sight"))
            and all(lists(key, is_source) for key in ("shapes", "off_screen")))


def class_palette(classes: int) -> np.ndarray:
    """Colours [classes,3] uint8 RGB of AVSBench's `labels_rgb`, for at most 256 classes: the bits of the class index go
    to red, green and blue in turn, most significant bit first."""
    index = np.arange(classes)
    colours = np.zeros((classes, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


@contextmanager
def open_picture(path: Path, upright: bool = True, formats: Sequence[str] = PICTURES) -> Iterator[Image.Image]:
    """An opened picture, decoded when its pixels are used; turned as its EXIF data ask, if not `upright` as stored.
    formats: by Pillow's names.

    Raises FileNotFoundError, or ValueError for one that is broken, of more pixels than Pillow finds safe, or so slim
    that squaring it by its short edge would take GB."""
    try:
        with Image.open(path, formats=formats) as image:
            if max(image.size) > SLIMMEST * min(image.size) or image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels")
            if upright and stored_turned(image):
                ImageOps.exif_transpose(image, in_place=True)
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; `icf data check` lists all that is") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error,
            Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({str(error) or type(error).__name__})") from error


def stored_turned(image: Image.Image) -> bool:
    """Whether an opened picture's EXIF data ask to turn it. Pillow decodes a PNG whole to look for them behind it."""
    return (image.format != "PNG" or "exif" in image.info) and image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def read_label(path: Path, formats: Sequence[str] = PICTURES) -> np.ndarray:
    """Values of a label [H,W], or [H,W,channels] without alpha; a palette file is read by index."""
    with open_picture(path, formats=formats) as image:
        values = np.array(image)
        return values[..., :-1] if image.mode in ("LA", "RGBA") else values


def binary_mask(values: np.ndarray, void: int | None = None) -> np.ndarray:
    """A label of any kind as [H,W] uint8 of 0 and 1: the largest channel above 127, or above 0 in files of 0 and 1.
    Pixels of the value `void` become `IGNORE`."""
    if values.ndim == 3:
        values = values.max(axis=2)
    mask = (values > (0 if values.max() == 1 else 127)).astype(np.uint8)
    return mask if void is None else np.where(values == void, np.uint8(IGNORE), mask)


def semantic_mask(values: np.ndarray, classes: int, path: Path) -> np.ndarray:
    """A label of class indices as [H,W] uint8. Raises ValueError for several channels or an index that is no class."""
    if values.ndim != 2:
        raise ValueError(f"{path}: expected one channel of class indices, got {values.shape[2]} channels")
    if (highest := values.max(initial=0, where=values != IGNORE)) >= classes:
        raise ValueError(f"{path}: expected class indices below {classes}, got {highest}")
    return values.astype(np.uint8)


def known_classes(entry: dict) -> dict:
    """A clip's entry of a manifest with what is `in_sight` and, as `categories`, what of it sounds, which the toy tells
    by its shapes."""
    shapes = entry.get("shapes", ())
    return {"in_sight": sorted({shape["class"] for shape in shapes}),
            "categories": sorted({shape["class"] for shape in shapes if any(shape["sounding"])}), **entry}


class Memory:
    """One tensor of the same shape per clip, computed once, in memory that forked loader processes share.

    Anonymous shared pages rather than tensors of torch.multiprocessing: they need no room in /dev/shm, of which
    containers have little. A process started in another way begins with a memory of its own.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.arguments = count, shape, dtype
        size = count * dtype.itemsize * int(np.prod(shape))
        self.known = self.values = None
        if 0 < size <= CACHE_LIMIT:
            self.known = torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)
            self.values = torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(count, *shape)

    def __reduce__(self):
        return Memory, self.arguments

    def get(self, index: int, compute: Callable[[], Tensor]) -> Tensor:
        """What was stored for the clip, else the result of `compute`; free to be changed by the caller."""
        if self.values is None:
            return compute()
        if not self.known[index]:
            self.values[index] = compute()
            self.known[index] = 1
        return self.values[index].clone()


class AVSBench(torch.utils.data.Dataset):
    """One split of S4, MS3 or AVSS.

    Frames are `data.size` square: S4 and MS3 as they are (or resized), AVSS by the shorter edge and the middle in
    training, squeezed otherwise, as the published loaders do. Clips with fewer than `data.frames` frames are padded and
    say so in `frame_mask`.

    Args:
        data: see `icf.config.DataConfig`.
        split: `train`, `val` or `test`.

    Attributes:
        classes: names by index, the first `background`; [] for binary masks.
        names: of the clips, in the order of the metadata.
        manifest: what the toy or a composed benchmark says of itself; without clips for other data.
        groups: `aligned` or `conflicting` for every clip of these, else {}.
        seed: of the augmentation and of `data.negatives`, which are drawn from (seed, epoch, index).

    Raises:
        FileNotFoundError: root, metadata, or later a file that they name, is missing.
        ValueError: a setting is out of range, or a file does not hold what it should.
    """

    def __init__(self, data: DataConfig, split: str):
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
        if data.audio_source == "pkl" and (data.subset not in ("s4", "ms3") or data.audio_timing != "vggish"):
            raise ValueError("data.audio_source: pkl needs data.subset s4 or ms3, for which such files were published, "
                             f"and data.audio_timing vggish, got {data.subset} and {data.audio_timing}")
        self.data, self.subset, self.split, self.seed = data, data.subset, split, 0
        self.root, records, self.classes = self._find()
        self.records = [record for record in records if record.split == split]
        if not self.records:
            others = ", ".join(sorted({record.split for record in records})) or "nothing"
            raise ValueError(f"data.root: {self.root} names no clip of split {split!r}; the column split of its "
                             f"metadata holds {others}")
        self.names = [record.name for record in self.records]
        self.manifest = read_manifest(self.root) if find_manifest(self.root) else NO_MANIFEST
        self._entries = {clip["name"]: known_classes(clip) for clip in self.manifest["clips"] if clip["split"] == split}
        self.records = [replace(record, categories=tuple(self._listed(record.name, "categories", record.categories)))
                        for record in self.records]
        self.augmentation = data.augmentation if split == "train" else "none"
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # loader processes see it change
        count, side = len(self.records) if data.cache else 0, (data.size, data.size)
        self._log_mels = Memory(count, (data.frames, 1, 96, 64), torch.float32)
        self._frames = Memory(count, (data.frames, 3, *side), torch.uint8)
        self._masks = Memory(count, (data.frames, *side), torch.uint8)
        training = split == "train"
        self.negatives = data.negatives if training else 0.0
        self._captions = read_captions(data.captions, self.names) if training and data.captions else None
        self._sounds = find_replaced(data.replaced_audio, self.names) if training and data.replaced_audio else None
        self._replaced = Memory(count if self._sounds else 0, (data.frames, 1, 96, 64), torch.float32)

    def _find(self) -> tuple[Path, list[Record], list[str]]:
        """Where the data lie, the clips of all splits with the labels that are used, and the classes."""
        data = self.data
        if data.subset not in FOLDERS:
            raise ValueError(f"data.subset: expected one of {tuple(FOLDERS)}, got {data.subset!r}")
        root = find_root(data.root, data.subset)
        records = [_supervise(record, data.supervision) for record in read_index(root, data.subset)]
        return root, records, read_classes(root) if data.subset == "avss" else []

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Clip:
        clip = self._clip(index, self._log_mels.get(index, lambda: self._examples(index)))
        if not self.negatives:
            return clip
        rng = np.random.default_rng((self.seed % 2**32, NEGATIVE, self._epoch.item(), index))
        if rng.random() >= self.negatives:
            return replace(clip, negative=False)
        sound = unrelated_sound(self, index, rng)
        return replace(clip, negative=True, own_log_mel=clip.log_mel, log_mel=self._examples(index, sound),
                       masks=torch.zeros_like(clip.masks))

    def files(self) -> Iterator[Path]:
        """Every file that reading all clips would open."""
        for record in self.records:
            yield from record.frames[:self.data.frames]
            yield from (path for path in record.masks[:min(record.labelled, self.data.frames)] if path is not None)
            yield record.log_mel if self.data.audio_source == "pkl" else record.sound

    @property
    def groups(self) -> dict[str, str]:
        return {name: clip["group"] for name, clip in self._entries.items()}

    def _listed(self, name: str, key: str, otherwise: Iterable[str]) -> Iterable[str]:
        """What the manifest lists of a clip, if it does."""
        return self._entries.get(name, {}).get(key, otherwise)

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of the augmentation, for loaders that are running as well."""
        self._epoch.fill_(epoch)

    def frame_count(self, index: int) -> int:
        """Frames of a clip that are not padding."""
        return min(len(self.records[index].frames), self.data.frames)

    def sounding_classes(self) -> list[frozenset[str]]:
        """Classes that sound in every clip: by the labels where there are classes (which are read for this), by the
        metadata of AVSS for MS3 if that lies beside, else by category; empty where they are not known. Benchmarks
        that are made here list them, sounds from off the screen too."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.sounding, range(len(self))))

    def sounding(self, index: int) -> frozenset[str]:
        """`sounding_classes` of one clip."""
        elsewhere = frozenset(sound["class"] for sound in self._listed(self.names[index], "off_screen", ())
                              if any(sound["sounding"]))
        if self.classes:
            return self._labelled_classes(index) | elsewhere
        if self.subset == "ms3" and not any(record.categories for record in self.records):
            return self._objects[index]
        return frozenset(self.records[index].categories) | elsewhere

    def visible_classes(self) -> list[frozenset[str]]:
        """Classes to be seen in every clip, whether they sound or not, as benchmarks that are made here list them; of
        other data, those that sound."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.visible, range(len(self))))

    def visible(self, index: int) -> frozenset[str]:
        """`visible_classes` of one clip."""
        if not any("in_sight" in clip for clip in self._entries.values()):
            return self.sounding(index)
        return frozenset(self._listed(self.names[index], "in_sight", ()))

    def _labelled_classes(self, index: int) -> frozenset[str]:
        masks = self._masks.get(index, lambda: self._read_masks(self.records[index]))
        return frozenset(self.classes[i] for i in masks.unique().tolist() if 0 < i < len(self.classes))

    @cached_property
    def _objects(self) -> list[frozenset[str]]:
        try:
            rows = read_metadata(find_root(self.root.parent, "avss"), "avss")
        except FileNotFoundError:
            rows = []
        objects = {row["uid"]: frozenset(row.get("a_obj", "").replace("off-the-screen", "").split("_"))
                   - {"", "background"} for row in rows if row["label"] == "v1m"}
        return [objects.get(name, frozenset()) for name in self.names]

    def frame_path(self, index: int, t: int) -> Path:
        return self.records[index].frames[t]

    def waveform(self, index: int) -> tuple[Tensor, int]:
        """The sound of a clip: float32 [n] and its rate, always 16000 Hz."""
        return read_waveform(self.records[index].sound), RATE

    def with_audio(self, index: int, waveform: Tensor) -> Clip:
        """A clip with another sound, [n] at 16 kHz, through the front end of all clips."""
        return self._clip(index, self._examples(index, waveform))

    def _clip(self, index: int, log_mel: Tensor) -> Clip:
        record, steps = self.records[index], torch.arange(self.data.frames)
        frames = self._frames.get(index, lambda: self._read_frames(record))
        masks = self._masks.get(index, lambda: self._read_masks(record))
        if self.augmentation != "none":
            # Draws of neighbouring seeds are alike in torch's generator; a multiplier keeps the seeds apart.
            seed = ((self.seed * 1_000_003 + self._epoch.item()) * 1_000_003 + index) * 0x9E3779B97F4A7C15 % 2**63
            generator = torch.Generator().manual_seed(seed)
            frames, masks = flip(frames, masks, generator) if self.augmentation == "flip" else combo(
                frames, masks, generator, scale=self.subset != "avss")
        real = steps < len(record.frames)
        frames[~real], masks[~real] = 0, 0
        return Clip(frames, log_mel, masks, real, steps < record.labelled, record.name, record.categories,
                    None if self._sounds is None else self._replaced.get(index, lambda: self._replaced_examples(index)),
                    None if self._captions is None else self._captions[index])

    def _replaced_examples(self, index: int) -> Tensor:
        return self._examples(index, read_waveform(self._sounds[index]))

    def _examples(self, index: int, waveform: Tensor | None = None) -> Tensor:
        """[T,1,96,64]: as many examples as there are frames, completed as the subset wants it, then zeros."""
        record = self.records[index]
        if waveform is None and self.data.audio_source == "pkl":
            examples = load_log_mel(record.log_mel)
        else:
            waveform = self.waveform(index)[0] if waveform is None else waveform
            examples = log_mel_examples(waveform, self.data.audio_timing)
        real = self.frame_count(index)
        examples = fit_examples(examples, real, "zero" if self.subset == "avss" else "repeat")
        return fit_examples(examples, self.data.frames, "zero")

    @property
    def _crop(self) -> bool:
        return self.subset == "avss" and self.split == "train"

    def _read_frames(self, record: Record) -> Tensor:
        size = self.data.size
        frames = torch.zeros(self.data.frames, 3, size, size, dtype=torch.uint8)
        for i, path in enumerate(record.frames[:self.data.frames]):
            with open_picture(path) as image:
                frames[i] = resize_frame(image, size, self._crop)
        return frames

    def _read_masks(self, record: Record) -> Tensor:
        size = self.data.size
        masks = torch.zeros(self.data.frames, size, size, dtype=torch.uint8)
        for i, path in enumerate(record.masks[:min(record.labelled, self.data.frames)]):
            if path is None:  # own clips may lack some labels
                continue
            masks[i] = resize_label(self._read_label(path), size, self._crop)
        return masks

    def _read_label(self, path: Path) -> np.ndarray:
        values = read_label(path)
        return semantic_mask(values, len(self.classes), path) if self.classes else binary_mask(
            values, self.manifest["void"])


def find_replaced(folder: Path, names: list[str]) -> list[Path]:
    """The sound files `<clip>.wav` of `folder` that could sound instead of those of the clips.

    Raises FileNotFoundError where the folder, or the file of a clip, is missing.
    """
    files = [Path(folder, f"{name}.wav") for name in names]
    if missing := [path for path in files if not path.is_file()]:
        raise FileNotFoundError(f"data.replaced_audio: expected <clip>.wav for each of {len(names)} training clips, "
                                f"{len(missing)} are missing, the first is {missing[0]}")
    return files


def read_captions(path: Path, names: list[str]) -> list[tuple[str, ...]]:
    """Revised captions of the clips from a JSON file `{clip: [caption, ...]}`, equally many each.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or lacks a clip.
    """
    expected = "data.captions: expected {clip: [caption, ...]}, as many captions for every training clip"
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{expected}; there is no file {path}")
    try:
        captions = read_json(path)
    except ValueError as error:
        raise ValueError(f"{expected}; {error}") from None
    lacking = [name for name in names if name not in captions] if isinstance(captions, dict) else names
    if lacking:
        raise ValueError(f"{expected}; {path} lacks {len(lacking)} of {len(names)} clips, the first is {lacking[0]!r}")
    first = captions[names[0]]
    for name in names:
        own = captions[name]
        if not (isinstance(own, list) and own and all(isinstance(text, str) for text in own)):
            raise ValueError(f"{expected}; {path} has {own!r} for {name!r}")
        if len(own) != len(first):
            raise ValueError(f"{expected}; {path} has {len(first)} for {names[0]!r} and {len(own)} for {name!r}")
    return [tuple(captions[name]) for name in names]


def _supervise(record: Record, supervision: str) -> Record:
    if supervision == "auto":
        return record
    return replace(record, labelled=1 if supervision == "first" else len(record.frames))
