"""The files of the toy benchmark: clips in the layouts of AVSBench, their metadata, and the manifest."""
from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from icf.data.audio import RATE, fit_examples, resample
from icf.data.avsbench import MANIFEST, class_palette, read_manifest
from icf.data.layouts import bar, binary_score, class_score, parallel, summarise, write_metadata, write_sound
from icf.data.toy.pictures import draw
from icf.data.toy.scene import CLASSES, FOLDERS, LABELS, MOMENT, SECONDS, SHORT, SPLITS, WIDE, Scene, Settings, compose
from icf.data.toy.sounds import examples, hear, play

if TYPE_CHECKING:
    from icf.config import ToyConfig

VERSION = 1


@dataclass(frozen=True)
class Task:
    """One clip to be written into the folder of a subset."""

    settings: Settings
    subset: str
    source: str
    split: str
    index: int
    folder: Path

    @property
    def name(self) -> str:
        """Video id: unique over all sources and splits."""
        return f"{self.source}_{self.split}_{self.index:05d}"


def write_clip(task: Task) -> dict:
    """Draw a clip and write its files; returns its entry in the manifest."""
    rng = np.random.default_rng((task.settings.seed, sorted(SECONDS).index(task.source), SPLITS.index(task.split),
                                 task.index))
    scene = compose(task.settings, task.source, task.split, rng)
    sound = play(scene, rng)[:SHORT[scene.seconds] if task.index == 0 else None]
    pictures, owners = zip(*(draw(scene, i + MOMENT) for i in range(scene.seconds)), strict=True)
    log_mel = examples(sound)
    write = _write_avss if task.subset == "avss" else _write_binary
    name = write(task, scene, np.stack(pictures), np.stack(owners), sound, log_mel)
    truth = [{k for k, shape in enumerate(scene.shapes) if shape.sounding[i]} for i in range(scene.seconds)]
    salient = [{k for k, shape in enumerate(scene.shapes) if shape.salient}] * scene.seconds
    ears = hear(log_mel, 1 if task.source == "s4" else 3)
    ears += ears[-1:] * (scene.seconds - len(ears))  # the sound that ends early
    audio = [{k for k, shape in enumerate(scene.shapes) if shape.kind in heard} for heard in ears]
    return {
        "name": name,
        "split": task.split,
        "label": LABELS[task.source],
        "group": "aligned" if scene.aligned else "conflicting",
        "shapes": [{"class": shape.kind, "salient": shape.salient, "sounding": [int(on) for on in shape.sounding],
                    "boxes": [_box(owner == k) for owner in owners]} for k, shape in enumerate(scene.shapes)],
        "off_screen": [{"class": kind, "sounding": [int(on) for on in flags]} for kind, flags in scene.elsewhere],
        "sha256": {"frames": _sha(np.stack(pictures)), "sound": _sha(sound),
                   "masks": _sha(np.stack([_mask(o, shapes) for o, shapes in zip(owners, truth, strict=True)]))},
        "salience": _scores(task.subset, scene, owners, truth, salient),
        "audio": _scores(task.subset, scene, owners, truth, audio),
    }


def _sha(array: NDArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _mask(owner: NDArray, shapes: set[int]) -> NDArray:
    return np.isin(owner, list(shapes))


def _box(mask: NDArray) -> list[int]:
    """x0, y0, x1, y1 of what is seen of a shape, the ends exclusive; zeros where all of it is hidden."""
    if not mask.any():
        return [0, 0, 0, 0]
    ys, xs = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return [int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1]


def _scores(subset: str, scene: Scene, owners, truth, shown) -> list[list[float | None]]:
    """Of every second, as `binary_score` or `class_score`."""
    if subset == "avss":
        return [class_score(_indices(scene, owner, true), _indices(scene, owner, predicted), len(CLASSES) + 1)
                for owner, true, predicted in zip(owners, truth, shown, strict=True)]
    return [binary_score(_mask(owner, true), _mask(owner, predicted))
            for owner, true, predicted in zip(owners, truth, shown, strict=True)]


def _indices(scene: Scene, owner: NDArray, shapes: set[int]) -> NDArray:
    """Class index of every pixel: 1.. where one of the shapes is seen, else 0."""
    table = [1 + CLASSES.index(shape.kind) if k in shapes else 0 for k, shape in enumerate(scene.shapes)]
    return np.array([*table, 0], dtype=np.uint8)[owner]  # the last for owner -1


def _write_binary(task: Task, scene: Scene, pictures, owners, sound, log_mel) -> str:
    """A clip in the layout of S4 or MS3."""
    base, name = task.folder / f"{task.subset}_data", task.name
    if task.subset == "s4":
        clip = Path(task.split, _category(scene), name)
        frames, stem, labelled = base / "visual_frames" / clip, name, 1 if task.split == "train" else scene.seconds
    else:
        clip = Path(task.split, name)
        frames, stem, labelled = base / "visual_frames" / name, f"{name}.mp4", scene.seconds
    masks = base / "gt_masks" / clip
    for folder in (frames, masks):
        folder.mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(frames / f"{stem}_{i + 1}.png", compress_level=3)
        if i < labelled:
            mask = _mask(owners[i], {k for k, shape in enumerate(scene.shapes) if shape.sounding[i]})
            _save_mask(masks / f"{name}_{i + 1}.png", mask, palette=task.subset == "ms3" and task.index % 2 == 1)
    if task.index == 3:
        (masks / ".DS_Store").write_bytes(b"")
    _write_sound(base / "audio_wav" / clip.with_name(f"{name}.wav"), sound, task.index)
    if task.settings.size != "small":
        path = base / "audio_log_mel" / clip.with_name(f"{name}.pkl")
        path.parent.mkdir(parents=True, exist_ok=True)
        tensor = fit_examples(torch.from_numpy(log_mel), scene.seconds).requires_grad_()
        path.write_bytes(pickle.dumps(tensor))
    return name


def _category(scene: Scene) -> str:
    return next(shape.kind for shape in scene.shapes if any(shape.sounding))


def _save_mask(path: Path, mask: NDArray, palette: bool) -> None:
    if palette:
        image = Image.fromarray(mask.astype(np.uint8), mode="P")
        image.putpalette([0, 0, 0, 255, 255, 255])
    else:
        image = Image.fromarray(mask.astype(np.uint8) * 255)
    image.save(path, compress_level=3)


def _write_sound(path: Path, sound: NDArray, index: int) -> None:
    """16-bit sound: one clip per split is stereo, one at 44.1 kHz."""
    rate = RATE
    if index == 1:
        sound = np.stack([sound, sound], axis=1)
    elif index == 2:
        rate = 44100
        faster = resample(torch.from_numpy(sound / 32768), RATE, rate)
        sound = (faster * 32768).round().clamp(-32768, 32767).short().numpy()
    write_sound(path, sound, rate)


def _write_avss(task: Task, scene: Scene, pictures, owners, sound, log_mel) -> str:
    """A clip in the layout of AVSS, reduced to 320x180."""
    uid = task.name if task.source == "ms3" else f"{task.name}_0_{scene.seconds * 1000}"
    clip = task.folder / LABELS[task.source] / uid
    for name in ("frames", "labels_semantic", "labels_rgb"):
        (clip / name).mkdir(parents=True)
    labelled = 1 if task.source == "s4" and task.split == "train" else scene.seconds
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).resize(WIDE, Image.Resampling.BILINEAR).save(clip / "frames" / f"{i}.jpg", quality=95)
        if i < labelled:
            sounding = {k for k, shape in enumerate(scene.shapes) if shape.sounding[i]}
            label = Image.fromarray(_indices(scene, owners[i], sounding)).resize(WIDE, Image.Resampling.NEAREST)
            label.save(clip / "labels_semantic" / f"{i}.png", compress_level=3)
            coloured = class_palette(len(CLASSES) + 1)[np.asarray(label)]
            Image.fromarray(coloured).save(clip / "labels_rgb" / f"{i}.png", compress_level=3)
    if task.index == 3:
        (clip / "labels_semantic" / ".DS_Store").write_bytes(b"")
    _write_sound(clip / "audio.wav", sound, task.index)
    return uid


def generate(root: Path | str, size: str = "small", seed: int = 0, bias: float = 0.9, visible: Sequence[int] = (2, 3),
             subsets: Sequence[str] = ("s4", "ms3", "avss"), workers: int | None = None, progress: bool = True, *,
             gap: float = 1.0, val_bias: float | None = None, clips: Sequence[int] | None = None) -> dict[str, dict]:
    """Write the toy benchmark below `root`, each subset as a whole or not at all.

    Args:
        root: the folder that will hold `Single-source/`, `Multi-sources/` and `AVSBench_semantic/`.
        size: `tiny` (tests), `small` (an experiment on a CPU; all subsets below 200 MB, for which the log-mel files are
            left out) or `full` (as many clips as AVSBench has).
        seed: every clip is drawn from (seed, source, split, index).
        bias: probability that the salient shape sounds in the training split, and in the validation split unless
            `val_bias` says otherwise. In the test split it is left to chance.
        visible: smallest and largest number of shapes in a clip, within 1..5.
        subsets: which of `s4`, `ms3` and `avss` to write.
        workers: processes; None for one per available core.
        progress: show a bar.
        gap: how much the salient shape stands out, from 0 (all alike) to 1 (the others are half as large, weak in
            contrast and slow).
        clips: numbers of train, val and test clips per subset in place of those of `size`.

    Returns:
        The manifest of every subset in `subsets`, also written as `toy_manifest.json` into its folder: `settings`,
        `oracles` per split and `clips` (name, group `aligned` or `conflicting`, shapes, sounds, SHA-256 of the arrays).

    Raises:
        ValueError: a setting is out of range.
        FileExistsError: there is a folder of a subset already, and it was not made with these settings.
    """
    settings = Settings(size, seed, bias, tuple(visible), gap, val_bias, None if clips is None else tuple(clips))
    for subset in subsets:
        if subset not in FOLDERS:
            raise ValueError(f"toy.subsets: expected some of {tuple(FOLDERS)}, got {subset!r}")
    missing = [subset for subset in subsets if not _exists(Path(root), subset, settings)]
    if missing:
        Path(root).mkdir(parents=True, exist_ok=True)
    for subset in missing:
        _generate_subset(Path(root), subset, settings, workers, progress)
    return {subset: load_manifest(root, subset) for subset in subsets}


def _exists(root: Path, subset: str, settings: Settings) -> bool:
    """Whether the subset is there, made with these settings."""
    folder = root / FOLDERS[subset]
    if not folder.exists():
        return False
    if not (folder / MANIFEST).is_file():
        raise FileExistsError(f"{folder} is there already and is no toy benchmark: choose another root, or read it "
                              "as it is by leaving data.toy unset")
    found = load_manifest(root, subset)
    version, made_with = found.get("version"), found.get("settings")
    if (version, made_with) != (VERSION, json.loads(json.dumps(asdict(settings)))):  # JSON knows no tuples
        raise FileExistsError(f"{folder} holds a toy benchmark of version {version} with {made_with}, not of version "
                              f"{VERSION} with {asdict(settings)}: choose another root or delete it")
    return True


def _generate_subset(root: Path, subset: str, settings: Settings, workers: int | None, progress: bool) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f".{FOLDERS[subset]}-", dir=root))
    try:
        tasks = [Task(settings, subset, source, split, index, partial)
                 for source, counts in settings.counts(subset).items()
                 for split, count in zip(SPLITS, counts, strict=True) for index in range(count)]
        clips = list(bar(parallel(write_clip, tasks, workers), len(tasks), f"toy {subset}", progress))
        write_metadata(partial, subset, clips, CLASSES)
        manifest = {
            "version": VERSION, "subset": subset, "classes": list(CLASSES), "settings": asdict(settings),
            "oracles": {split: summarise(subset, [c for c in clips if c["split"] == split], ("salience", "audio"))
                        for split in SPLITS},
            "clips": [{key: clip[key] for key in clip if key not in ("salience", "audio")} for clip in clips],
        }
        (partial / MANIFEST).write_text(json.dumps(manifest))
        partial.chmod(0o755)  # mkdtemp makes folders that nobody else may read
        try:
            partial.rename(root / FOLDERS[subset])
        except OSError:
            if not _exists(root, subset, settings):  # else another process of the same run was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_manifest(root: Path | str, subset: str) -> dict:
    """The manifest that `generate` wrote. Raises FileNotFoundError where there is none, ValueError for another file."""
    return read_manifest(Path(root) / FOLDERS[subset])


def ensure(root: Path | str, subset: str, toy: ToyConfig) -> None:
    """Generate a subset unless it is there; raises FileExistsError where something else is."""
    if subset not in FOLDERS:
        raise ValueError(f"data.subset: the toy benchmark has {tuple(FOLDERS)}, not {subset!r}")
    generate(root, subsets=(subset,), **asdict(toy))
