"""Metadata, and the names of files beside it."""
from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from icf.data.avsbench import COLUMNS, METADATA, SPLITS, Record, find_manifest, read_metadata
from icf.data.check.findings import Finding
from icf.data.folder import LABEL_FOLDERS, PICTURES, unused_labels
from icf.data.folder import METADATA as OWN

COUNTS = {
    "s4": {"s4": (3452, 740, 740)},
    "ms3": {"ms3": (296, 64, 64)},
    "avss": {"v1s": (3452, 740, 740), "v1m": (296, 64, 64), "v2": (4750, 500, 750)},
}
LABELS = tuple(COUNTS["avss"])
SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini")
DERIVED = ("processed_frames", "processed_labels", "processed_labels_semantic", "processed_labels_rgb", "audio.pkl")


def check_metadata(folder: Path, subset: str, records: list[Record]) -> Iterator[Finding]:
    where = METADATA.get(subset, OWN)
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
    if subset in COUNTS and not find_manifest(folder):
        found = Counter((record.source, record.split) for record in records)
        for source, counts in COUNTS[subset].items():
            for split, count in zip(SPLITS, counts, strict=True):
                if found[source, split] != count:
                    yield Finding("metadata", "warning", where,
                                  f"{found[source, split]} clips of {source} {split}, the published set has {count}")


def check_surplus(folder: Path, subset: str, records: list[Record]) -> Iterator[Finding]:
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


def check_own_surplus(root: Path, records: list[Record], semantic: bool) -> Iterator[Finding]:
    """Files and folders below the root of own clips that nothing reads, and labels that are not of the picture of their
    second; and splits without any label."""
    clips = {record.name: record for record in records}
    known = {OWN, *(["label2idx.json"] if semantic else []), *clips}
    for path in sorted(root.iterdir()):
        if path.name not in known:
            yield Finding("files", "warning", path.name, f"folder of no clip in {OWN}") if path.is_dir() else _stranger(
                path, root)
    for record in records:
        folder = record.sound.parent
        for path in sorted(folder.iterdir()):
            if path != record.sound and path.name not in ("frames", *LABEL_FOLDERS):
                yield _stranger(path, root)
        for path in sorted((folder / "frames").iterdir()):
            if path.suffix.lower() not in PICTURES:
                yield _stranger(path, root)
        if unused := unused_labels(record):
            yield Finding("labels", "warning", str(unused[0].relative_to(root)),
                          f"{len(unused)} labels of pictures that are not on show 15/16 s into their second, not used; "
                          "the first one")
    for split in sorted({record.split for record in records}):
        if not any(path for record in records if record.split == split for path in record.masks):
            yield Finding("labels", "error", split, "no picture of this split has a label")


def _stranger(path: Path, folder: Path) -> Finding:
    where = str(path.relative_to(folder))
    if path.name in SYSTEM or path.name.startswith("._"):
        return Finding("files", "note", where, "file of an operating system, ignored")
    if path.name in DERIVED:
        return Finding("derived", "note", where, "derived by other code, not used")
    return Finding("files", "warning", where, "surplus file, not used")


def _files(record: Record, subset: str) -> Iterator[Path]:
    yield from record.frames
    yield from label_paths(record)
    yield record.sound
    if record.log_mel is not None:
        yield record.log_mel
    if subset == "avss":
        yield from (coloured_path(path) for path in label_paths(record))


def label_paths(record: Record) -> list[Path]:
    return [path for path in record.masks[:record.labelled] if path is not None]


def coloured_path(label: Path) -> Path:
    return label.parent.with_name("labels_rgb") / label.name
