"""A whole data set: its clips, and what only all of them together show."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from icf.data.avsbench import (
    FOLDERS,
    NO_MANIFEST,
    Record,
    find_manifest,
    find_root,
    read_classes,
    read_index,
    read_manifest,
)
from icf.data.check.clip import examine
from icf.data.check.findings import CHECKS, LEVELS, Clip, Finding
from icf.data.check.layout import check_metadata, check_own_surplus, check_surplus
from icf.data.check.report import Report

CLASSES = 71  # of AVSS, with background


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
        manifest = read_manifest(folder) if find_manifest(folder) else NO_MANIFEST
    except (FileNotFoundError, ValueError, KeyError) as error:
        report.findings.append(Finding("metadata", "error", str(root), str(error)))
        return report
    report.findings += check_metadata(folder, subset, records)
    report.findings += check_own_surplus(folder, records, bool(classes)) if subset == "folder" else check_surplus(
        folder, subset, records)
    with ThreadPoolExecutor() as pool:
        clips = pool.map(lambda record: examine(record, folder, subset, classes, deep, manifest), records)
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
            if len(classes) != CLASSES and not find_manifest(folder):
                report.findings.append(Finding("classes", "warning", "label2idx.json",
                                               f"{len(classes)} classes, the published set has {CLASSES}"))
        except (FileNotFoundError, ValueError) as error:
            report.findings.append(Finding("classes", "error", "label2idx.json", str(error)))
    return folder, read_index(folder, subset), classes


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
