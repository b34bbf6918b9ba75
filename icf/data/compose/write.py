"""The files of a composed data set: clips in the layouts of AVSBench, the manifest, and where everything is from."""
from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from icf.data import IGNORE
from icf.data.avsbench import COMPOSED, FOLDERS, SPLITS, VOID, class_palette, read_manifest
from icf.data.compose.classes import read_class_map
from icf.data.compose.clip import Composed, compose
from icf.data.compose.plan import Task, counts, plan
from icf.data.compose.stock import Materials, gather
from icf.data.layouts import bar, binary_score, class_score, parallel, summarise, write_metadata, write_sound
from icf.files import read_json, write_atomic

if TYPE_CHECKING:
    from icf.config import ComposeConfig

VERSION = 1
LABEL = "v1m"  # of the clips within AVSS: several sources, 5 s, all seconds labelled
ORACLES = ("salience", "can_sound")
STEP = 7  # of the values of PNG frames: as noise it is far below that of a JPEG, and it halves the files
DONE = ".done"  # folder with the entries of the clips that are written
SOURCES = ("clip", "split", "use", "class", "data set", "recording", "file", "terms")
Row = dict[str, str]


@dataclass(frozen=True)
class Job:
    """A clip to be written into a folder. `classes` are those that sound in the data set."""

    task: Task
    layout: str
    side: int
    folder: Path
    classes: tuple[str, ...]


def generate(root: Path | str, layout: str, config: ComposeConfig, workers: int | None = None,
             progress: bool = True) -> dict:
    """Compose a data set below `root`, as a whole or not at all; one that was interrupted is gone on with.

    Args:
        root: the folder that will hold `Single-source/`, `Multi-sources/` or `AVSBench_semantic/`.
        layout: `s4`, `ms3` or `avss`.
        config: see `icf.config.ComposeConfig`.
        workers: processes; None for one per available core. The result does not depend on it.
        progress: show bars.

    Returns:
        The manifest, also written as `composed_manifest.json`: `settings`, `classes` that sound, `left_out` by reason,
        `oracles` by split, and `clips` (name, group, what is in sight and what sounds when, SHA-256 of the arrays).
        The oracles know all masks: `salience` segments the object that stands out, `can_sound` all that can sound.

    Raises:
        ValueError: a setting is out of range, or the pictures or sounds are not what is needed.
        FileNotFoundError: a folder is missing.
        FileExistsError: there is a data set already that was not made with these settings.
    """
    _check(layout, config)
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected 1 or more, got {workers}")
    root = Path(root)
    if _exists(root / FOLDERS[layout][0], describe(layout, config)):
        return read_manifest(root / FOLDERS[layout][0])
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f".{FOLDERS[layout][0]}.lock")  # of several processes one composes, the others wait for it
    try:
        with lock:
            return _generate(root, layout, config, workers, progress)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        if not any(root.iterdir()):
            root.rmdir()


def _generate(root: Path, layout: str, config: ComposeConfig, workers: int | None, progress: bool) -> dict:
    folder, settings = root / FOLDERS[layout][0], describe(layout, config)
    if _exists(folder, settings):
        return read_manifest(folder)
    for name in ("pictures", "sounds"):
        if getattr(config, name) is None:
            raise ValueError(f"compose.{name}: expected a folder to compose {folder} of, which does not exist yet")

    class_map = read_class_map(config.classes)
    materials = gather(config, class_map, lambda function, items, title: bar(
        parallel(function, items, workers, chunk=16), len(items), title, progress))
    tasks = [task for split, count in zip(SPLITS, config.clips, strict=True)
             for task in plan(materials.stocks[split], split, count, config.bias, layout == "s4", config.seed,
                              class_map)]
    partial_folder = root / f".{FOLDERS[layout][0]}.partial"
    classes = tuple(materials.classes)
    jobs = [Job(task, layout, config.size, partial_folder, classes) for task in tasks]
    _begin(partial_folder, settings, tasks)
    missing = [job for job in jobs if not _entry(job).is_file()]
    for _ in bar(parallel(write_clip, missing, workers), len(missing), f"composing {layout}", progress):
        pass
    _finish(partial_folder, layout, settings, jobs, materials, config)
    os.replace(partial_folder, folder)
    return read_manifest(folder)


def ensure(root: Path | str, layout: str, config: ComposeConfig) -> None:
    """Compose a data set unless it is there. Raises as `generate`."""
    if layout not in FOLDERS:
        raise ValueError(f"data.subset: clips are composed as one of {tuple(FOLDERS)}, not {layout!r}")
    generate(root, layout, config)


def describe(layout: str, config: ComposeConfig) -> dict:
    """What a data set was made with, but for the folders its files were in."""
    own = None if config.classes is None else hashlib.sha256(Path(config.classes).read_bytes()).hexdigest()[:16]
    return {"layout": layout, "clips": list(config.clips), "size": config.size, "seed": config.seed,
            "bias": config.bias, "classes": own}


def _check(layout: str, config: ComposeConfig) -> None:
    for ok, name, expected in (
        (layout in FOLDERS, "layout", f"one of {tuple(FOLDERS)}"),
        (len(config.clips) == 3 and min(config.clips) >= 0 and sum(config.clips) > 0, "clips",
         "numbers of train, val and test clips"),
        (32 <= config.size <= 2048, "size", "32 to 2048 pixels"),
        (config.seed >= 0, "seed", "0 or more"),
        (0 <= config.bias <= 1, "bias", "0 to 1"),
        (config.classes is None or Path(config.classes).is_file(), "classes", "a YAML file"),
    ):
        if not ok:
            raise ValueError(f"compose.{name}: expected {expected}, "
                             f"got {layout if name == 'layout' else getattr(config, name)}")


def _exists(folder: Path, settings: dict) -> bool:
    if not folder.exists():
        return False
    found = read_manifest(folder) if (folder / COMPOSED).is_file() else {}
    version, made_with = found.get("version"), found.get("settings")
    if (version, made_with) != (VERSION, settings):
        what = f"clips of version {version} composed with {made_with}" if found else "something else"
        raise FileExistsError(f"{folder} holds {what}, not of version {VERSION} with {settings}: choose another root "
                              "or delete it")
    return True


def _begin(folder: Path, settings: dict, tasks: list[Task]) -> None:
    """Make the folder, or keep it if it was begun with the same plan."""
    text = json.dumps({"version": VERSION, **settings, "plan": hashlib.sha256(repr(tasks).encode()).hexdigest()})
    note = folder / DONE / "plan.json"
    if not note.is_file() or note.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomic(note, lambda path: path.write_text(text))


def _entry(job: Job) -> Path:
    return job.folder / DONE / f"{job.task.name}.json"


def write_clip(job: Job) -> None:
    """Compose a clip and write its files, and at last its entry."""
    task = job.task
    try:
        clip = compose(task, job.side, job.layout == "s4")
    except (OSError, ValueError) as error:  # it could be read when it was examined
        raise ValueError(f"{task.name}: a file of it has changed: {error}") from error
    truth = clip.truth()
    write = _write_avss if job.layout == "avss" else _write_binary
    write(job, clip, truth)
    objects = [{"class": name, "salient": name == task.scene.salient,
                "sounding": clip.sounding.get(name, np.zeros(len(truth), bool)).astype(int).tolist(),
                "area": [round(float((labels == 1 + clip.classes.index(name)).mean()), 6) for labels in clip.labels]}
               for name in task.scene.objects]
    off_screen = [{"class": sound.category, "sounding": on.astype(int).tolist()}
                  for sound, on in zip(task.off_screen, clip.off_screen, strict=True)]
    entry = {
        "name": task.name, "split": task.split, "label": LABEL, "group": "aligned" if task.aligned else "conflicting",
        "categories": sorted(clip.sounding), "in_sight": sorted(task.scene.seen.area),
        "shapes": objects, "off_screen": off_screen,
        "sha256": {name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
                   for name, array in (("frames", clip.frames), ("sound", clip.sound), ("masks", truth))},
        **{oracle: [_score(job, clip, truth[t], clip.shown(names, t)) for t in range(len(truth))]
           for oracle, names in (("salience", [task.scene.salient]), ("can_sound", list(task.scene.able)))},
        "provenance": list(_provenance(task, clip)),
    }
    write_atomic(_entry(job), lambda path: path.write_text(json.dumps(entry)))


def _score(job: Job, clip: Composed, true: NDArray, shown: NDArray) -> list:
    shown = np.where(shown == IGNORE, 0, shown)
    if job.layout != "avss":
        return binary_score(true, shown)
    return class_score(_indices(job, clip, true), _indices(job, clip, shown), len(job.classes) + 1)


def _indices(job: Job, clip: Composed, labels: NDArray) -> NDArray:
    """The label of a picture as places in the classes of the data set, which are fewer than a picture may show."""
    table = np.zeros(256, np.uint8)
    table[IGNORE] = IGNORE
    for value, name in enumerate(clip.classes, start=1):
        table[value] = 1 + job.classes.index(name) if name in job.classes else 0
    return table[labels]


def _write_binary(job: Job, clip: Composed, truth: NDArray) -> None:
    """A clip in the layout of S4 or MS3."""
    task, base, name = job.task, job.folder / f"{job.layout}_data", job.task.name
    if job.layout == "s4":
        own = Path(task.split, next(iter(clip.sounding)), name)
        frames, stem, labelled = base / "visual_frames" / own, name, 1 if task.split == "train" else len(truth)
    else:
        own = Path(task.split, name)
        frames, stem, labelled = base / "visual_frames" / name, f"{name}.mp4", len(truth)
    for t, frame in enumerate((clip.frames.astype(np.uint16) + STEP // 2) // STEP * STEP, start=1):
        _save(frame.clip(max=255).astype(np.uint8), frames / f"{stem}_{t}.png")
    for t, mask in enumerate(truth[:labelled], start=1):
        grey = np.where(mask == IGNORE, VOID, np.where(mask > 0, 255, 0)).astype(np.uint8)
        _save(grey, base / "gt_masks" / own / f"{name}_{t}.png")
    write_sound(base / "audio_wav" / own.with_name(f"{name}.wav"), clip.sound)


def _write_avss(job: Job, clip: Composed, truth: NDArray) -> None:
    """A clip in the layout of AVSS."""
    own, palette = job.folder / LABEL / job.task.name, class_palette(256)
    for t, (frame, mask) in enumerate(zip(clip.frames, truth, strict=True)):
        _save(frame, own / "frames" / f"{t}.jpg", quality=92)
        indices = _indices(job, clip, mask)
        _save(indices, own / "labels_semantic" / f"{t}.png")
        _save(palette[indices], own / "labels_rgb" / f"{t}.png")
    write_sound(own / "audio.wav", clip.sound)


def _save(array: NDArray, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def _provenance(task: Task, clip: Composed) -> Iterator[Row]:
    """A row for every file that a clip was made of."""
    picture = task.scene.picture
    rows = [("picture", " ".join(task.scene.objects), picture.source, picture.name, path, picture.terms)
            for path in clip.files]
    heard = [("sound", name, sound) for name, sound in task.sounds]
    heard += [("off-screen sound", sound.category, sound) for sound in task.off_screen]
    rows += [(use, name, sound.source, sound.recording, sound.path, sound.terms) for use, name, sound in heard]
    for row in rows:
        yield dict(zip(SOURCES, (task.name, task.split, *map(str, row)), strict=True))


def _finish(folder: Path, layout: str, settings: dict, jobs: list[Job], materials: Materials,
            config: ComposeConfig) -> None:
    """Write the metadata, the provenance and the manifest."""
    clips = [read_json(_entry(job)) for job in jobs]
    write_metadata(folder, layout, clips, materials.classes)
    roots = [(f"{Path(root).absolute()}{os.sep}", name)
             for root, name in ((config.pictures, "pictures/"), (config.sounds, "sounds/"))]
    write_atomic(folder / "provenance.csv", partial(_write_provenance, clips, roots))
    oracles = {}
    for split in SPLITS:
        own = counts([job.task for job in jobs if job.task.split == split])
        oracles[split] = {**summarise(layout, [clip for clip in clips if clip["split"] == split], ORACLES),
                          "several objects": own["several"], "of these aligned": own["aligned"]}
    manifest = {
        "version": VERSION, "subset": layout, "classes": materials.classes, "settings": settings, "void": VOID,
        "left_out": {kind: dict(reasons.most_common()) for kind, reasons in materials.left_out.items()},
        "oracles": oracles,
        "clips": [{key: clip[key] for key in clip if key not in (*ORACLES, "provenance")} for clip in clips],
    }
    write_atomic(folder / COMPOSED, lambda path: path.write_text(json.dumps(manifest)))
    shutil.rmtree(folder / DONE)


def _write_provenance(clips: list[dict], roots: list[tuple[str, str]], path: Path) -> None:
    """Files below the folder of pictures or sounds are named from there."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, SOURCES)
        writer.writeheader()
        for row in (row for clip in clips for row in clip["provenance"]):
            for root, name in roots:
                if row["file"].startswith(root):
                    row["file"] = name + row["file"].removeprefix(root)
                    break
            writer.writerow(row)


def show(manifest: dict) -> None:
    """Print what was composed, and what was left out and why."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("split", "clips", "of several objects", "of these aligned", *(f"J of {name}" for name in ORACLES),
                  title=f"{manifest['subset']}: {', '.join(manifest['classes'])}", box=box.SIMPLE)
    for split, found in manifest["oracles"].items():
        scores = (f"{found[name]['J']:.3f}" if name in found else "" for name in ORACLES)
        table.add_row(split, *(str(found[key]) for key in ("clips", "several objects", "of these aligned")), *scores)
    console.print(table)
    for kind, reasons in manifest["left_out"].items():
        for reason, count in reasons.items():
            console.print(f"{kind} left out: {count} {reason}", highlight=False)
