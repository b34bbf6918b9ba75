"""The validator: what is wrong with a data set on disk, file by file, before a run stumbles over it."""
from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile

from icf.data import IGNORE
from icf.data.audio import fit_examples, load_log_mel, load_wav, log_mel_examples, read_waveform
from icf.data.avsbench import (
    COLUMNS,
    FOLDERS,
    MANIFEST,
    METADATA,
    SPLITS,
    Record,
    class_palette,
    find_root,
    open_picture,
    read_classes,
    read_index,
    read_label,
    read_metadata,
)

CHECKS = ("metadata", "classes", "files", "frames", "labels", "colours", "audio", "log-mel", "derived", "leakage")
LEVELS = ("error", "warning", "note")
COUNTS = {
    "s4": {"s4": (3452, 740, 740)},
    "ms3": {"ms3": (296, 64, 64)},
    "avss": {"v1s": (3452, 740, 740), "v1m": (296, 64, 64), "v2": (4750, 500, 750)},
}
LABELS = tuple(COUNTS["avss"])
CLASSES = 71  # of AVSS, with background
SIDE = 224  # pixels of S4's and MS3's frames
SHORTEST = {5: 4.815, 10: 9.615}  # s of sound that give an example for each of so many frames
SILENCE = 10 ** (-60 / 20)  # root mean square
STRAY = 16  # pixels, below which a component of a label is stray
FAR = 0.3  # mean distance of a log-mel file from our front end; rounding to 16 bits stays far below
SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini")
DERIVED = ("processed_frames", "processed_labels", "processed_labels_semantic", "processed_labels_rgb", "audio.pkl")
SHOWN = 10  # findings printed per check and level; the JSON file has all


@dataclass(frozen=True)
class Finding:
    """One thing found: `error` breaks reading, `warning` may, `note` is for information."""

    check: str
    level: str
    where: str
    what: str


@dataclass
class Report:
    """Everything that was found and counted."""

    root: str
    subset: str
    deep: bool
    findings: list[Finding] = field(default_factory=list)
    facts: dict = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0: clean, 1: warnings only, 2: errors."""
        levels = {finding.level for finding in self.findings}
        return 2 if "error" in levels else int("warning" in levels)

    def print(self) -> None:
        """Counts, and per check the findings of each level with their number and the first ten."""
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Column, Table

        console = Console()
        facts = Table("fact", "value", title=f"{self.subset} in {self.root}", box=box.SIMPLE)
        for name, value in self.facts.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {number}" for key, number in value.items())
            facts.add_row(name, escape(str(value)))
        console.print(facts)
        table = Table("check", "level", "count", Column("first findings", overflow="fold"), box=box.SIMPLE)
        groups = defaultdict(list)
        for finding in self.findings:
            groups[finding.check, finding.level].append(escape(f"{finding.where}: {finding.what}"))
        for check in CHECKS:
            found = [(level, groups[check, level]) for level in LEVELS if groups[check, level]]
            for level, lines in found or [("ok", [])]:
                table.add_row(check, level, str(len(lines)), "\n".join(lines[:SHOWN]))
        console.print(table)
        result = ("clean", "usable, with warnings", "errors: some clips cannot be read")[self.exit_code]
        console.print(f"{result}{'' if self.deep else '; --deep opens every file'}", highlight=False)

    def write(self, path: Path | str) -> None:
        """All findings and counts as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps({**asdict(self), "exit_code": self.exit_code}, indent=1), encoding="utf-8")
        os.replace(partial, path)


@dataclass
class Clip:
    """What was found in the files of one clip, to be summed up over all."""

    findings: list[Finding] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    pixels: Counter = field(default_factory=Counter)  # of every class
    distance: tuple[float, float] | None = None  # of the log-mel file: greatest and mean
    first: str = ""  # hash of the first frame

    def add(self, check: str, level: str, where: Path | str, what: str) -> None:
        self.findings.append(Finding(check, level, str(where), what))


def check(root: Path | str, subset: str, deep: bool = False, progress: bool = True) -> Report:
    """Validate a data set.

    Args:
        root: as `data.root`.
        subset: `s4`, `ms3`, `avss` or `folder`.
        deep: decode every file; otherwise files are looked for and their headers read.
        progress: show a bar.

    Returns:
        The report; it never raises for what the data set is like. Missing clips are normal for partial copies and a
        warning, files that the metadata names and that are missing or broken are errors.
    """
    if subset not in (*FOLDERS, "folder"):
        raise ValueError(f"subset: expected one of {(*FOLDERS, 'folder')}, got {subset!r}")
    report = Report(str(root), subset, deep)
    try:
        folder, records, classes = _index(Path(root), subset, report)
    except (FileNotFoundError, ValueError, KeyError) as error:
        report.findings.append(Finding("metadata", "error", str(root), str(error)))
        return report
    report.findings += _metadata(folder, subset, records)
    if subset != "folder":
        report.findings += _surplus(folder, subset, records)
    with ThreadPoolExecutor() as pool:
        clips = pool.map(lambda record: _examine(record, folder, subset, classes, deep), records)
        clips = list(_bar(clips, len(records), f"checking {subset}", progress))
    report.findings += [finding for clip in clips for finding in clip.findings]
    _summarise(report, folder, records, clips, classes)
    order = {name: i for i, name in enumerate((*CHECKS, *LEVELS))}
    report.findings.sort(key=lambda f: (order[f.check], order[f.level]))
    return report


def _bar(items: Iterable, total: int, title: str, show: bool) -> Iterable:
    if not show:
        return items
    from rich.progress import track

    return track(items, title, total)


def _index(root: Path, subset: str, report: Report) -> tuple[Path, list[Record], list[str]]:
    """Folder, clips and classes; raises what makes all further checks impossible."""
    if subset == "folder":
        from icf.data.folder import read_clips

        return root, read_clips(root), read_classes(root) if (root / "label2idx.json").is_file() else []
    folder = find_root(root, subset)
    classes = []
    if subset == "avss":
        try:
            classes = read_classes(folder)
            if len(classes) != CLASSES and not _is_toy(folder):
                report.findings.append(Finding("classes", "warning", "label2idx.json",
                                               f"{len(classes)} classes, the published set has {CLASSES}"))
        except (FileNotFoundError, ValueError) as error:
            report.findings.append(Finding("classes", "error", "label2idx.json", str(error)))
    return folder, read_index(folder, subset), classes


def _is_toy(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


# ---- Metadata and file names ----


def _metadata(folder: Path, subset: str, records: list[Record]) -> Iterator[Finding]:
    where = METADATA.get(subset, "clips.csv")
    if subset != "folder":
        missing = [column for column in COLUMNS[subset] if column not in read_metadata(folder, subset)[0]]
        if missing:
            yield Finding("metadata", "note", where, f"without columns {', '.join(missing)}, which are not needed")
    for split, count in Counter(record.split for record in records).items():
        if split not in SPLITS:
            yield Finding("metadata", "error", where, f"{count} clips of split {split!r}, which is none of {SPLITS}")
    splits = defaultdict(list)
    for record in records:
        splits[record.source, record.sound.parent if subset == "avss" else record.name].append(record)
    for same in splits.values():
        if len(same) > 1:
            names = " and ".join(record.split for record in same)
            yield Finding("metadata", "error", where, f"{same[0].name} is named {len(same)} times, in {names}")
    if subset in COUNTS and not _is_toy(folder):
        found = Counter((record.source, record.split) for record in records)
        for source, counts in COUNTS[subset].items():
            for split, count in zip(SPLITS, counts, strict=True):
                if found[source, split] != count:
                    yield Finding("metadata", "warning", where,
                                  f"{found[source, split]} clips of {source} {split}, the published set has {count}")


def _surplus(folder: Path, subset: str, records: list[Record]) -> Iterator[Finding]:
    """Files that the metadata does not name, each folder without any named file as one."""
    expected = {path for record in records for path in _files(record, subset)}
    folders = {parent for path in expected for parent in path.parents}
    if subset == "avss":
        tops = [folder / label for label in LABELS]
    else:
        base = folder / f"{subset}_data"
        tops = [base / name for name in ("visual_frames", "gt_masks", "audio_wav", "audio_log_mel")]
    for top in (path for path in tops if path.is_dir()):
        for parent, names, files in os.walk(top):
            here = Path(parent)
            for name in sorted(names):
                if here / name not in folders:
                    derived = name in DERIVED
                    yield Finding("derived" if derived else "files", "note" if derived else "warning",
                                  str((here / name).relative_to(folder)),
                                  "derived by other code, not used" if derived else "folder of no clip in the metadata")
            names[:] = [name for name in names if here / name in folders]
            for name in sorted(files):
                if here / name not in expected:
                    yield _stranger(here / name, folder)


def _stranger(path: Path, folder: Path) -> Finding:
    where = str(path.relative_to(folder))
    if path.name in SYSTEM or path.name.startswith("._"):
        return Finding("files", "note", where, "file of an operating system, ignored")
    if path.name in DERIVED:
        return Finding("derived", "note", where, "derived by other code, not used")
    return Finding("files", "warning", where, "surplus file, not used")


def _files(record: Record, subset: str) -> Iterator[Path]:
    yield from record.frames
    yield from _labels(record)
    yield record.sound
    if record.log_mel is not None:
        yield record.log_mel
    if subset == "avss":
        yield from (_coloured(path) for path in _labels(record))


def _labels(record: Record) -> list[Path]:
    return [path for path in record.masks[:record.labelled] if path is not None]


def _coloured(label: Path) -> Path:
    return label.parent.with_name("labels_rgb") / label.name


# ---- One clip ----


def _examine(record: Record, folder: Path, subset: str, classes: list[str], deep: bool) -> Clip:
    clip = Clip()

    def present(path: Path, check: str, level: str = "error") -> bool:
        if not path.is_file():
            elsewhere = [label for label in LABELS if (folder / label / record.sound.parent.name).is_dir()]
            hint = f"missing; the clip is in {elsewhere[0]}" if subset == "avss" and elsewhere and \
                record.source not in elsewhere else "missing"
            clip.add(check, level, _relative(path, folder), hint)
        return path.is_file()

    sizes = {}
    for path in record.frames:
        if present(path, "files"):
            sizes[path.stem] = _frame(path, folder, subset, deep, clip)
    for path in _labels(record):
        if present(path, "files"):
            size, values = _label(path, record, folder, classes, deep, clip)
            frame = sizes.get(path.stem)
            if subset not in ("s4", "ms3") and size and frame and size != frame:
                clip.add("labels", "error", _relative(path, folder), f"is {size[0]}x{size[1]}, its frame "
                                                                     f"{frame[0]}x{frame[1]}")
            if subset == "avss" and present(_coloured(path), "colours", "warning") and values is not None:
                _colours(_coloured(path), values, folder, len(classes), clip)
    if present(record.sound, "files"):
        _sound(record, folder, deep, clip)
    if record.log_mel is not None and record.log_mel.is_file():
        clip.counts["log-mel files"] += 1
        if deep:
            _log_mel(record, folder, clip)
    return clip


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _reason(error: Exception) -> str:
    """The message without the path in front."""
    return str(error).partition(": ")[2]


def _frame(path: Path, folder: Path, subset: str, deep: bool, clip: Clip) -> tuple[int, int] | None:
    """Width and height, or None for a broken file."""
    where = _relative(path, folder)
    try:
        with open_picture(path) as image:
            if deep:
                image.load()
                clip.first = clip.first or hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
            size, mode = image.size, image.mode
    except ValueError as error:
        clip.add("frames", "error", where, _reason(error))
        return None
    clip.counts["frames"] += 1
    if mode != "RGB":
        clip.add("frames", "warning", where, f"has mode {mode}, expected RGB")
    if subset in ("s4", "ms3") and size != (SIDE, SIDE):
        clip.add("frames", "warning", where, f"is {size[0]}x{size[1]}, expected {SIDE}x{SIDE}")
    return size


def _label(path: Path, record: Record, folder: Path, classes: list[str], deep: bool,
           clip: Clip) -> tuple[tuple[int, int] | None, np.ndarray | None]:
    """Width and height, None for a broken file, and the values where they are looked at."""
    where = _relative(path, folder)
    try:
        if not deep:
            with open_picture(path) as image:
                size = image.size
            clip.counts["labels"] += 1
            return size, None
        values = read_label(path)
    except ValueError as error:
        clip.add("labels", "error", where, _reason(error))
        return None, None
    clip.counts["labels"] += 1
    if classes or record.source in LABELS:
        _indices(values, where, classes, clip)
    else:
        _binary(values, where, record, clip)
    return values.shape[1::-1], values


def _binary(values: np.ndarray, where: str, record: Record, clip: Clip) -> None:
    if values.ndim == 3:
        values = values.max(axis=2)
    other = ~np.isin(values, (0, 1) if values.max() == 1 else (0, 255))
    if other.any():
        clip.add("labels", "warning", where, f"{other.mean():.2%} of the values are neither 0 nor 255")
    if not values.any():
        clip.counts[f"empty labels {record.split}"] += 1
        if record.source == "s4":
            clip.add("labels", "warning", where, "nothing is labelled")


def _indices(values: np.ndarray, where: str, classes: list[str], clip: Clip) -> None:
    if values.ndim != 2:
        clip.add("labels", "error", where, f"{values.shape[2]} channels, expected one of class indices")
        return
    counts = np.bincount(values.reshape(-1))
    present = np.flatnonzero(counts).tolist()
    clip.pixels.update({i: int(counts[i]) for i in present})
    if wrong := [i for i in present if i >= len(classes) and i != IGNORE and classes]:
        clip.add("labels", "error", where, f"holds {wrong}, expected indices below {len(classes)}")
    stray = stray_components(values)
    if stray:
        names = ", ".join(sorted({classes[i] if i < len(classes) else str(i) for i in stray}))
        clip.counts["stray components"] += len(stray)
        clip.add("labels", "warning", where, f"{len(stray)} components below {STRAY} pixels, of {names}")


def stray_components(values: np.ndarray) -> list[int]:
    """Value of every component of equal, non-zero values [H,W] that has fewer than `STRAY` pixels (8 neighbours)."""
    starts = np.ones(values.shape, dtype=bool)
    starts[:, 1:] = values[:, 1:] != values[:, :-1]
    row, begin = np.nonzero(starts)
    end = np.append(begin[1:], 0)
    end[np.append(row[1:] != row[:-1], True)] = values.shape[1]
    value = values[row, begin]
    kept = np.flatnonzero(value)  # runs of one value within a row
    row, begin, end, value = row[kept], begin[kept], end[kept], value[kept]
    parent = list(range(len(kept)))

    def top(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    bounds = np.searchsorted(row, np.arange(values.shape[0] + 1)).tolist()
    for (first, middle), (_, last) in pairwise(pairwise(bounds)):
        above = first
        for below in range(middle, last):
            while above < middle and end[above] < begin[below]:
                above += 1
            for i in range(above, middle):
                if begin[i] > end[below]:
                    break
                if value[i] == value[below]:
                    parent[top(below)] = top(i)
    roots = [top(i) for i in range(len(kept))]
    areas = np.bincount(roots, weights=end - begin, minlength=len(kept))
    return [int(value[i]) for i in range(len(kept)) if 0 < areas[i] < STRAY]


def _colours(path: Path, index: np.ndarray, folder: Path, classes: int, clip: Clip) -> None:
    """Compare `labels_rgb` with the class indices in both orders of the channels, where these differ."""
    try:
        colours = read_label(path)
    except ValueError as error:
        clip.add("colours", "warning", _relative(path, folder), f"cannot be compared: {_reason(error)}")
        return
    if index.ndim != 2 or index.dtype != np.uint8 or colours.shape != (*index.shape, 3):
        clip.add("colours", "warning", _relative(path, folder), f"has shape {list(colours.shape)}, its labels "
                                                                f"{list(index.shape)}")
        return
    rgb, bgr = _class_codes()
    codes = _codes(colours)
    telling = (rgb != bgr)[index]
    clip.counts["coloured pixels"] += codes.size
    clip.counts["unknown colours"] += codes.size - int(_known_codes(classes)[codes].sum())
    clip.counts["telling"] += int(telling.sum())
    clip.counts["RGB"] += int(((codes == rgb[index]) & telling).sum())
    clip.counts["BGR"] += int(((codes == bgr[index]) & telling).sum())


def _codes(colours: np.ndarray) -> np.ndarray:
    """Colours [...,3] uint8 as single numbers."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


@lru_cache(maxsize=1)
def _class_codes() -> tuple[np.ndarray, np.ndarray]:
    """The colour of every index [256], as RGB and as BGR."""
    palette = class_palette(256)
    return _codes(palette), _codes(palette[:, ::-1])


@lru_cache(maxsize=1)
def _known_codes(classes: int) -> np.ndarray:
    """Whether a colour is that of a class, in either order of the channels [2**24]."""
    known = np.zeros(2**24, dtype=bool)
    for codes in _class_codes():
        known[codes[:max(classes, 1)]] = True
    return known


def _sound(record: Record, folder: Path, deep: bool, clip: Clip) -> None:
    where, shortest = _relative(record.sound, folder), SHORTEST.get(len(record.frames))
    try:
        info = soundfile.info(record.sound)
    except soundfile.LibsndfileError as error:
        clip.add("audio", "error", where, f"cannot be read ({error})")
        return
    clip.counts["sounds"] += 1
    clip.counts[f"rate {info.samplerate} Hz, {info.channels} channels"] += 1
    if shortest and info.duration < shortest:
        clip.add("audio", "warning", where, f"lasts {info.duration:.3f} s, less than the {shortest} s that "
                                            f"{len(record.frames)} examples need")
    if not deep:
        return
    try:
        waveform, _ = load_wav(record.sound)
    except ValueError as error:
        clip.add("audio", "error", where, _reason(error))
        return
    if waveform.square().mean().sqrt() < SILENCE:
        clip.add("audio", "warning", where, "is silent (below -60 dBFS)")
    elif waveform.abs().max() > 1:
        clip.add("audio", "warning", where, f"has a peak of {waveform.abs().max():.2f}, expected at most 1")


def _log_mel(record: Record, folder: Path, clip: Clip) -> None:
    where, count = _relative(record.log_mel, folder), len(record.frames)
    try:
        examples = load_log_mel(record.log_mel)
    except (ValueError, FileNotFoundError) as error:
        clip.add("log-mel", "error", where, _reason(error))
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


# ---- Everything together ----


def _summarise(report: Report, folder: Path, records: list[Record], clips: list[Clip], classes: list[str]) -> None:
    """Counts over all clips, and what only they show."""
    total = sum((clip.counts for clip in clips), Counter())
    report.facts["clips"] = dict(Counter(f"{record.source} {record.split}" for record in records))
    colours = {key: total.pop(key, 0) for key in ("coloured pixels", "unknown colours", "telling", "RGB", "BGR")}
    report.facts |= dict(sorted(total.items()))
    distances = [clip.distance for clip in clips if clip.distance]
    if distances:
        report.facts["log-mel distance"] = {"greatest": round(max(d[0] for d in distances), 4),
                                            "mean": round(sum(d[1] for d in distances) / len(distances), 5)}
    if pixels := sum((clip.pixels for clip in clips), Counter()):
        report.facts["pixels"] = {classes[i] if i < len(classes) else str(i): n for i, n in sorted(pixels.items())}
    named = [record.log_mel for record in records if record.log_mel]
    if missing := len(named) - total["log-mel files"]:
        level = "warning" if missing < len(named) else "note"
        report.findings.append(Finding("log-mel", level, "audio_log_mel",
                                       f"{missing} of {len(named)} missing; only data.audio_source=pkl needs them"))
    if colours["telling"]:
        report.facts["labels_rgb"] = {order: f"{colours[order] / colours['telling']:.2%}" for order in ("RGB", "BGR")}
        if colours["BGR"] > colours["RGB"]:
            report.findings.append(Finding("colours", "warning", "labels_rgb", "the channels are in the order BGR"))
        elif colours["RGB"] < colours["telling"]:
            report.findings.append(Finding("colours", "warning", "labels_rgb",
                                           f"{1 - colours['RGB'] / colours['telling']:.2%} of the pixels differ from "
                                           "labels_semantic, which is what is read"))
    if colours["unknown colours"]:
        share = colours["unknown colours"] / colours["coloured pixels"]
        report.findings.append(Finding("colours", "warning", "labels_rgb", f"{share:.2%} of the pixels have no class' "
                                                                           "colour"))
    same = defaultdict(list)
    for record, clip in zip(records, clips, strict=True):
        if clip.first:
            same[clip.first].append(record)
    for group in same.values():
        if len({record.split for record in group}) > 1:
            names = ", ".join(f"{record.split} {record.name}" for record in group)
            report.findings.append(Finding("leakage", "note", names, "the first frames are the same picture"))


