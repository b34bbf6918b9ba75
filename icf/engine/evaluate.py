"""Evaluation of one split: every mode of every score, negative sounds, tables, pictures of the worst clips.

A clip belongs to one process (every n-th of the data set) and is scored once; the metrics hold one row per clip and add
the rows of all processes up, so the scores are those of a single process.
"""
from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from icf import __version__
from icf.config import Config
from icf.data import Batch, Clip, build_dataset, collate
from icf.data.audio import RESAMPLER
from icf.data.avsbench import binary_mask, class_palette, read_label, read_manifest, semantic_mask
from icf.data.disturb import Disturbed
from icf.data.folder import list_files
from icf.data.transforms import resize_label
from icf.engine.masks import class_map, foreground
from icf.engine.metrics import (
    FalsePositives,
    FScore,
    Jaccard,
    MeanChange,
    PixelScores,
    SemanticScores,
    combined_score,
)
from icf.engine.report import Sample, score_tables, write_report
from icf.files import read_json, write_atomic
from icf.ops import use_backend

SCORES = ("J&F", "J", "F")
UNHEARD = ("silence", "noise", "offscreen")     # negative sounds that nothing in the picture makes
HISTORY = "metrics.json"                        # of a training run, in its folder
RESULTS = "results.json"                        # of an evaluation, in its folder
SEED = 42                                       # pairing of clips and sounds
MIN_PIXELS = 16                                 # of the forgiving variant of the AVSS scores
PICTURED = (8, 4)                               # clips of the report: worst, best
BINARY_DEFAULT = {"J": "background/frame", "F": "per_video/skip"}
SEMANTIC_DEFAULT = {"J": "J/all/real/include", "F": "F/all/real/include"}


@dataclass
class Prediction:
    """What a method says of a batch.

    Args:
        masks: [B,T,H,W], probability of the foreground, or class index.
        scores: [B,T,C,H,W], the probabilities (C = 1) or class scores behind it; None where only masks are known.
    """

    masks: Tensor
    scores: Tensor | None = None


Predictor = Callable[[Batch], Prediction]


@torch.no_grad()
def evaluate(
    model: nn.Module, cfg: Config, split: str = "test", out: Path | None = None,
    device: torch.device | str | None = None, accelerator: Accelerator | None = None, save_masks: bool = False,
    progress: bool = True, report: bool = True,
) -> dict:
    """Score `model` on a split under the true sound and under negative sounds.

    Writes to `out`: `results.json` (everything), `per_class.csv`, `per_clip.csv`, `pairing.json` (which sound replaced
    which), `report.html` with the pictures behind it, and, on request, `masks/<clip>/<frame>.png` at `data.size`, which
    `evaluate_masks` reads again. With several processes all have to call this; the first one writes.

    Args:
        model: gives for a `Batch` in eval mode logits [B,T,1,H,W], or scores [B,T,C,H,W] of C classes.
        split: `train`, `val` or `test`.
        out: folder, made if missing; None for `cfg.out`.
        device: None for that of the model's parameters.
        accelerator: what prepared the model, if anything did. The processes of torch.distributed share the work.
        save_masks: write the predicted masks.
        progress: show a progress bar and print the table of scores.
        report: write `report.html`.

    Returns:
        What `results.json` holds; `J`, `F` and `J&F` are the default modes, `scores` has all of them.

    Raises:
        FloatingPointError: the model gave a value that is not finite. ValueError: its channels do not fit the classes,
            or `cfg.backend` cannot run here.
    """
    dataset = build_dataset(cfg.data, split)
    model = accelerator.unwrap_model(model) if accelerator else model
    device = device or next(model.parameters()).device
    predict = model_predictor(model, len(dataset.classes), device)
    with use_backend(cfg.backend):
        return _evaluate(predict, dataset, cfg, Path(out or cfg.out), device, {"weights_sha256": weights_hash(model)},
                         save_masks, progress, report, cfg.eval.negatives)


def evaluate_masks(masks: Path, cfg: Config, split: str, out: Path, progress: bool = True, report: bool = True) -> dict:
    """Score the saved masks of any method: `masks/<clip>/*.png` in numeric order, one per frame of the clip.

    Binary masks are 0/255 or 0/1, class masks hold the index, with a palette or not; masks of another size are resized
    to `data.size` by nearest neighbour. F is computed from 0/1 maps, which have one threshold, and there are no
    negative sounds. Files and return value as of `evaluate`.

    Raises:
        FileNotFoundError: a clip has no masks, or too few. ValueError: a file is no mask.
    """
    dataset = build_dataset(cfg.data, split)
    predict = saved_predictor(Path(masks), len(dataset.classes), cfg.data.size)
    notes = {"masks": str(masks), "F": "of 0/1 maps"}
    return _evaluate(predict, dataset, cfg, Path(out), "cpu", notes, progress=progress, report=report)


@torch.no_grad()
def validate(
    model: nn.Module, dataset: Dataset, cfg: Config, accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """J, F and J&F of a model on a data set in their default modes, nothing written; all processes get the result."""
    model = accelerator.unwrap_model(model) if accelerator else model
    device = next(model.parameters()).device
    predict = model_predictor(model, len(dataset.classes), device)
    tally = Tally(len(dataset), dataset.classes, cfg, device)
    for index, (batch,) in build_loader([dataset], cfg):
        tally.add(predict(batch).masks, batch, index)
    with tally.synchronised():
        return tally.summary()


def model_predictor(model: nn.Module, classes: int, device: torch.device | str) -> Predictor:
    """Predictions of a model; `classes` is 0 for binary masks. The model is in eval mode during each call only."""
    model = model.to(device)

    def predict(batch: Batch) -> Prediction:
        training = model.training
        scores = model.eval()(batch.to(device, non_blocking=True)).float()                   # [B,T,C,H,W]
        model.train(training)
        if scores.dim() != 5 or scores.shape[2] != max(classes, 1):
            raise ValueError(f"model: expected scores [B,T,{max(classes, 1)},H,W], got {tuple(scores.shape)}")
        if not scores.sum().isfinite():
            raise FloatingPointError(f"the model gave values that are not finite for one of {', '.join(batch.names)}")
        if not classes:
            scores = scores.sigmoid()
            return Prediction(scores[:, :, 0], scores)
        return Prediction(class_map(scores.flatten(0, 1)).unflatten(0, scores.shape[:2]), scores)

    return predict


def saved_predictor(folder: Path, classes: int, size: int) -> Predictor:
    """Predictions read from `folder/<clip>/*.png`; `classes` is 0 for binary masks."""
    if not folder.is_dir():
        raise FileNotFoundError(f"masks: no folder {folder}")

    def predict(batch: Batch) -> Prediction:
        masks = torch.zeros(batch.masks.shape, dtype=torch.uint8)
        for clip, name in enumerate(batch.names):
            files = list_files(folder / name, (".png",))
            frames = int(batch.frame_mask[clip].sum())
            if len(files) != frames:
                raise FileNotFoundError(f"masks: expected {frames} numbered .png files in {folder / name}, "
                                        f"found {len(files)}")
            for frame, path in enumerate(files):
                masks[clip, frame] = read_mask(path, classes, size)
        return Prediction(masks if classes else masks.float())

    return predict


def read_mask(path: Path, classes: int, size: int) -> Tensor:
    """A saved mask as uint8 [size,size]: class indices, or 0/1 where `classes` is 0."""
    values = read_label(path)
    mask = semantic_mask(values, classes, path) if classes else binary_mask(values)
    return resize_label(mask, size)


class Tally:
    """All scores of one condition.

    Args:
        clips: number of clips of the data set.
        classes: their names with background, or none for binary masks.
    """

    def __init__(self, clips: int, classes: Sequence[str], cfg: Config, device: torch.device | str) -> None:
        self.semantic = bool(classes)
        threshold = cfg.eval.threshold
        self.threshold = threshold
        self.jaccard = Jaccard(clips, threshold)           # of the foreground as a whole, for classes too
        self.pixels = PixelScores(clips, max(len(classes), 2))
        if self.semantic:
            self.classes = SemanticScores(clips, len(classes))
            self.forgiving = SemanticScores(clips, len(classes), MIN_PIXELS)
        else:
            self.f = FScore(clips)
        self.metrics = [metric.to(device) for metric in vars(self).values() if isinstance(metric, nn.Module)]

    def add(self, masks: Tensor, batch: Batch, index: Tensor) -> None:
        """Args: masks [B,T,H,W] as in `Prediction`; batch on the CPU; index int64 [B], places in the data set."""
        places = (batch.frame_mask & batch.label_mask).flatten().nonzero().flatten()          # [N] scored frames
        clip = index.repeat_interleave(batch.frame_mask.shape[1])[places]
        prediction = masks.flatten(0, 1)[places.to(masks.device)]                             # [N,H,W]
        target, clip = (x.to(masks.device) for x in (batch.masks.flatten(0, 1)[places], clip))
        self.jaccard.update(prediction, target, clip)
        if self.semantic:
            self.classes.update(prediction, target, clip)
            self.forgiving.update(prediction, target, clip)
            self.classes.pad((~batch.frame_mask).sum(1), index.to(masks.device))
            self.pixels.update(prediction, target, clip)
        else:
            self.f.update(prediction, target, clip)
            self.pixels.update(foreground(prediction, self.threshold), target, clip)

    def synchronised(self) -> ExitStack:
        """Within it, the metrics hold the rows of all processes."""
        stack = ExitStack()
        for metric in self.metrics:
            stack.enter_context(metric.sync_context())
        return stack

    def scores(self, rows: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """Every mode, by family of scores."""
        families = {"AVSS": self.classes, f"AVSS, at least {MIN_PIXELS} pixels": self.forgiving,
                    "J of the foreground": self.jaccard} if self.semantic else {"J": self.jaccard, "F": self.f}
        return {name: _floats(metric.scores(rows)) for name, metric in {**families, "pixels": self.pixels}.items()}

    def summary(self, rows: Sequence[int] | None = None) -> dict[str, float]:
        """J, F and their mean in the default modes."""
        if self.semantic:
            scores = self.classes.scores(rows)
            j, f = (float(scores[SEMANTIC_DEFAULT[key]]) for key in "JF")
        else:
            j = float(self.jaccard.scores(rows)[BINARY_DEFAULT["J"]])
            f = float(self.f.scores(rows)[BINARY_DEFAULT["F"]])
        return {"J": j, "F": f, "J&F": (j + f) / 2}

    def per_clip(self) -> tuple[list[float], list[float]]:
        j, f = self.classes.per_clip() if self.semantic else (self.jaccard.per_clip(), self.f.per_clip())
        return j.tolist(), f.tolist()


class Negative:
    """Scores under a sound that was put in place of the true one, on the original labels and on empty ones."""

    def __init__(self, clips: int, classes: Sequence[str], cfg: Config, device: torch.device | str) -> None:
        self.tally = Tally(clips, classes, cfg, device)
        self.false, self.change = FalsePositives(clips, cfg.eval.threshold).to(device), MeanChange(clips).to(device)

    def add(self, prediction: Prediction, true: Prediction, batch: Batch, index: Tensor) -> None:
        self.tally.add(prediction.masks, batch, index)
        clip = index.repeat_interleave(batch.frame_mask.shape[1])[batch.real].to(prediction.masks.device)
        real = batch.real.to(prediction.masks.device)
        self.false.update(prediction.masks.flatten(0, 1)[real], clip)
        self.change.update(prediction.scores.flatten(0, 1)[real], true.scores.flatten(0, 1)[real], clip)

    def synchronised(self) -> ExitStack:
        stack = self.tally.synchronised()
        stack.enter_context(self.false.sync_context())
        stack.enter_context(self.change.sync_context())
        return stack

    def scores(self, true: dict[str, float], rows: Sequence[int] | None = None) -> dict[str, float]:
        """FPR, share of frames without prediction, J and F on the original labels, what they lose, change of p."""
        summary = self.tally.summary(rows)
        return {**_floats(self.false.scores(rows)), **{key: summary[key] for key in "JF"},
                "sensitivity": true["J"] - summary["J"], **_floats(self.change.scores(rows))}


class Conditions(Dataset):
    """Clips of several data sets of the same names, side by side: (index, one clip of each)."""

    def __init__(self, datasets: Sequence[Dataset], indices: Sequence[int]) -> None:
        self.datasets, self.indices = datasets, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple:
        index = self.indices[place]
        return index, [dataset[index] for dataset in self.datasets]


def build_loader(datasets: Sequence[Dataset], cfg: Config) -> DataLoader:
    """Batches (index int64 [B], one `Batch` per data set) of this process' clips, none of them twice."""
    rank, processes = process()
    clips = Conditions(datasets, range(rank, len(datasets[0]), processes))
    workers = cfg.data.workers if cfg.data.workers is not None else min(4, (os.cpu_count() or 1) // 2)
    return DataLoader(clips, cfg.eval.batch, num_workers=workers, collate_fn=_collate,
                      pin_memory=torch.cuda.is_available())


def process() -> tuple[int, int]:
    """Number of this process, and of all that share the work."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(items: dict) -> dict:
    """The items of all processes together."""
    rank, processes = process()
    if processes == 1:
        return items
    parts = [None] * processes
    dist.all_gather_object(parts, items)
    return {key: value for part in parts for key, value in part.items()}


def _collate(items: list[tuple]) -> tuple[Tensor, list[Batch]]:
    indices, clips = zip(*items, strict=True)
    return torch.tensor(indices), [collate(list(condition)) for condition in zip(*clips, strict=True)]


def _evaluate(
    predict: Predictor, dataset: Dataset, cfg: Config, out: Path, device: torch.device | str, notes: dict,
    save_masks: bool = False, progress: bool = True, report: bool = True, kinds: Sequence[str] = (),
) -> dict:
    true_set, disturbed = conditions(dataset, cfg, kinds)
    main = process()[0] == 0
    tally = Tally(len(dataset), dataset.classes, cfg, device)
    negatives = {kind: Negative(len(dataset), dataset.classes, cfg, device) for kind in disturbed}
    categories: dict[int, tuple[str, ...]] = {}
    history = read_history(out / HISTORY) if report and (out / HISTORY).is_file() else None
    loader = build_loader([true_set, *disturbed.values()], cfg)
    bar = Console(stderr=True)
    for index, (batch, *others) in track(loader, f"scoring {dataset.split}", console=bar, disable=not progress * main):
        prediction = predict(batch)
        tally.add(prediction.masks, batch, index)
        categories.update(zip(index.tolist(), batch.categories, strict=True))
        if save_masks:
            write_masks(out / "masks", prediction.masks, batch, dataset.classes, cfg.eval.threshold)
        for negative, other in zip(negatives.values(), others, strict=True):
            negative.add(predict(other), prediction, other, index)
    categories = gather(categories)
    with ExitStack() as stack:
        for item in (tally, *negatives.values()):
            stack.enter_context(item.synchronised())
        results = assemble(tally, negatives, dataset, cfg, categories, notes)
    if main:
        write_tables(results, out)
        for kind, other in disturbed.items():
            write_atomic(out / "pairing" / f"{kind}.json", other.save_pairing)
        if report:
            pictured = samples(predict, true_set, results, cfg.eval.threshold)
            write_report(out, results, pictured, dataset.classes, history)
        if progress:
            Console().print(score_tables(results))
    if process()[1] > 1:
        dist.barrier()
    return results


def conditions(dataset: Dataset, cfg: Config, kinds: Sequence[str]) -> tuple[Dataset, dict[str, Dataset]]:
    """The data set under the sound that `cfg.eval` asks for (noise, mixed frames), and under each negative sound."""
    true_set = dataset
    if cfg.eval.frame_mix:
        true_set = Disturbed(true_set, f"mix:{cfg.eval.frame_mix}", seed=SEED)
    if cfg.eval.snr_db is not None:
        true_set = Disturbed(true_set, f"snr:{cfg.eval.snr_db}", seed=SEED)
    return true_set, {kind: Disturbed(dataset, kind, seed=SEED) for kind in kinds}


def assemble(
    tally: Tally, negatives: dict[str, Negative], dataset: Dataset, cfg: Config,
    categories: dict[int, tuple[str, ...]], notes: dict,
) -> dict:
    """All results as plain values; the metrics have to be synchronised."""
    summary, (j, f), groups = tally.summary(), tally.per_clip(), clip_groups(dataset)
    groups_of = [[] for _ in dataset.names]
    for name, rows in groups.items():
        for i in rows:
            groups_of[i].append(name)
    under = {kind: negative.false.per_clip().tolist() for kind, negative in negatives.items()}
    clips = [{"name": name, "groups": groups_of[i], "categories": list(categories[i]), "J": j[i], "F": f[i],
              **{f"FPR {kind}": share[i] for kind, share in under.items()}} for i, name in enumerate(dataset.names)]
    results = {
        "split": dataset.split, "subset": dataset.subset, **summary,
        "default_modes": SEMANTIC_DEFAULT if tally.semantic else BINARY_DEFAULT, "scores": tally.scores(),
        "oracles": oracles(dataset),
        "groups": {name: {"clips": len(rows), **tally.summary(rows)} for name, rows in groups.items()},
        "negatives": {kind: negative.scores(summary) for kind, negative in negatives.items()},
        "counts": counts(tally, len(dataset)), "settings": describe(cfg, notes),
        "classes": class_rows(tally, dataset.classes, categories), "clips": clips}
    if {"aligned", "conflicting"} <= groups.keys():
        aligned, conflicting = results["groups"]["aligned"], results["groups"]["conflicting"]
        results["gap"] = {key: aligned[key] - conflicting[key] for key in ("J", "F", "J&F")}
    if unheard := [results["negatives"][kind]["strict"] for kind in UNHEARD if kind in negatives]:
        results["combined"] = combined_score(float(tally.jaccard.scores()["strict/frame"]), unheard)
    return _plain(results)


def counts(tally: Tally, clips: int) -> dict:
    """How many clips, frames and pixels the scores rest on, and which were left out."""
    empty, occupied = int(tally.jaccard.empty.sum()), int(tally.jaccard.occupied.sum())
    rest = {"padding_frames": int(tally.classes.padding.sum())} if tally.semantic else {
        "groups_without_object": tally.f.skipped()}
    return {"clips": clips, "scored_frames": empty + occupied, "empty_frames": empty,
            "ignored_pixels": int(tally.pixels.ignored.sum()), **rest}


def describe(cfg: Config, notes: dict) -> dict:
    """What a reader needs to compare the scores with others."""
    return {"resolution": cfg.data.size, "threshold": cfg.eval.threshold, "audio_source": cfg.data.audio_source,
            "audio_timing": cfg.data.audio_timing, "resampler": RESAMPLER, "snr_db": cfg.eval.snr_db,
            "frame_mix": cfg.eval.frame_mix, "seed": SEED, "toy": cfg.to_dict()["data"]["toy"],
            "root": str(cfg.data.root), "icf": __version__, "torch": torch.__version__, **notes}


def class_rows(tally: Tally, classes: Sequence[str], categories: dict[int, tuple[str, ...]]) -> list[dict]:
    """A row per class; for binary masks a row per category of clips, where the data set tells categories."""
    if not tally.semantic:
        members: dict[str, list[int]] = {}
        for index, names in categories.items():
            for name in names:
                members.setdefault(name, []).append(index)
        return [{"class": name, "clips": len(rows), **tally.summary(rows)} for name, rows in sorted(members.items())]
    columns = {**dict(zip(("J", "F", "frames"), tally.classes.per_class(), strict=True)),
               **dict(zip(("IoU of all", "FDR", "predicted pixels", "labelled pixels"),
                          tally.pixels.per_class(), strict=True))}
    return [{"class": name, **{key: float(column[i]) for key, column in columns.items()}}
            for i, name in enumerate(classes)]


def clip_groups(dataset: Dataset) -> dict[str, list[int]]:
    """Places of the clips of each group: aligned and conflicting in the toy benchmark, v1s, v1m and v2 in AVSS."""
    groups: dict[str, list[int]] = {}
    named = getattr(dataset, "groups", {})
    for index, name in enumerate(dataset.names):
        if name in named:
            groups.setdefault(named[name], []).append(index)
        if dataset.subset == "avss":
            groups.setdefault(dataset.records[index].source, []).append(index)
    return dict(sorted(groups.items()))


def oracles(dataset: Dataset) -> dict:
    """J of whom segments what stands out, and of whom segments what is heard; known for the toy benchmark only."""
    if not getattr(dataset, "groups", {}):
        return {}
    found = read_manifest(dataset.root)["oracles"].get(dataset.split) or {}
    return {name: scores for name, scores in found.items() if isinstance(scores, dict)}


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_masks(folder: Path, masks: Tensor, batch: Batch, classes: Sequence[str], threshold: float) -> None:
    """`folder/<clip>/<frame>.png` for every real frame: 0/255, or class indices with the palette of AVSBench."""
    masks = (masks if classes else foreground(masks, threshold) * 255).to("cpu", torch.uint8).numpy()
    palette = class_palette(len(classes)).tobytes() if classes else None
    for clip, name in enumerate(batch.names):
        for frame in batch.frame_mask[clip].nonzero().flatten().tolist():
            image = Image.fromarray(masks[clip, frame])
            if palette:
                image.putpalette(palette)
            write_atomic(folder / name / f"{frame}.png", partial(image.save, format="PNG"))


def write_tables(results: dict, out: Path) -> None:
    """`results.json`, `per_class.csv` and `per_clip.csv`."""
    write_atomic(out / RESULTS, lambda path: path.write_text(json.dumps(results, indent=1, allow_nan=False)))
    write_atomic(out / "per_class.csv", partial(_write_csv, results["classes"]))
    write_atomic(out / "per_clip.csv", partial(_write_csv, results["clips"]))


@dataclass(frozen=True)
class Results:
    """What others read of a `results.json`.

    Args:
        clips: names of the clips scored, in their order.
        scores: J, F and J&F in their default modes; None where no clip has an object.
        false_positives: share of pixels under each sound that nothing in the picture makes.
        settings: of the evaluation.
    """

    subset: str
    split: str
    clips: list[str]
    scores: dict[str, float | None]
    false_positives: dict[str, float | None]
    settings: dict


def read_results(path: Path) -> Results:
    """Raises FileNotFoundError, or ValueError for what `evaluate` does not write."""
    values = read_json(path)
    try:
        return Results(str(values["subset"]), str(values["split"]), [str(clip["name"]) for clip in values["clips"]],
                       {key: _score(values[key]) for key in SCORES},
                       {kind: _score(negative["FPR"]) for kind, negative in values["negatives"].items()
                        if kind in UNHEARD},
                       dict(values["settings"]))
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: is not what icf evaluate writes ({type(error).__name__}: {error})") from None


def read_history(path: Path) -> dict[str, list[dict[str, float]]]:
    """The losses and validation scores of a training run. Raises ValueError for what `train` does not write."""
    values = read_json(path)
    try:
        history = {part: [{str(key): float(value) for key, value in row.items()} for row in values[part]]
                   for part in ("steps", "evaluations")}
        needed = {"steps": {"step", "loss", "lr"}, "evaluations": {"step", "J", "F"}}
        if lacking := {key for part in history for row in history[part] for key in needed[part] - row.keys()}:
            raise KeyError(*sorted(lacking))
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: is not what icf train writes ({type(error).__name__}: {error})") from None
    return history


def _score(value: object) -> float | None:
    return None if value is None else float(value)


def samples(predict: Predictor, dataset: Dataset, results: dict, threshold: float) -> list[Sample]:
    """The worst clips of the data set, then the best ones, each with its prediction."""
    rows = results["clips"]
    order = sorted((i for i, row in enumerate(rows) if row["J"] is not None), key=lambda i: (rows[i]["J"], i))
    worst, best = order[:PICTURED[0]], order[PICTURED[0]:][-PICTURED[1]:][::-1]
    return [sample(predict, dataset[i], rows[i], rank, bool(dataset.classes), threshold)
            for rank, places in (("worst", worst), ("best", best)) for i in places]


def sample(predict: Predictor, clip: Clip, row: dict, rank: str, semantic: bool, threshold: float) -> Sample:
    """A clip's real frames, its prediction and its scores."""
    masks = predict(collate([clip])).masks[0].cpu()                                           # [T,H,W]
    masks = masks if semantic else foreground(masks, threshold)
    real = clip.frame_mask
    return Sample(clip.name, clip.frames[real], clip.log_mel[real], clip.masks[real], clip.label_mask[real],
                  masks[real].to(torch.uint8), row["J"], row["F"], rank, row["groups"])


def _write_csv(rows: Sequence[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["class"])
        writer.writeheader()
        writer.writerows({key: " ".join(value) if isinstance(value, list) else value for key, value in row.items()}
                         for row in rows)


def _floats(scores: dict[str, Tensor]) -> dict[str, float]:
    return {key: float(value) for key, value in scores.items()}


def _plain(value):
    """JSON's values: what is not defined (a mean over nothing) becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
