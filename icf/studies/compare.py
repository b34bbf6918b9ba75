"""Runs side by side: their scores, what their features look like, and the clips on which they differ most.

scikit-learn is imported where it computes.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from icf.config import Config
from icf.data import Batch, Clip, build_dataset, collate
from icf.data.avsbench import read_manifest
from icf.engine.checkpoint import WEIGHTS, load_model
from icf.engine.conditions import UNHEARD, build_loader
from icf.engine.curves import INK, png, tint
from icf.engine.masks import foreground
from icf.engine.pages import render
from icf.engine.pictures import THUMB, Sample, legend, strips
from icf.engine.predictors import Prediction, model_predictor
from icf.engine.results import RESULTS, Results, read_results
from icf.engine.score_tables import Rows, modes_named
from icf.engine.tally import BINARY_DEFAULT, SEMANTIC_DEFAULT, Tally
from icf.files import write_atomic
from icf.objective.cdcl import pool

# Of the data, for runs to be comparable.
SAME = ("subset", "size", "frames", "audio_source", "audio_timing", "toy", "compose")
COLUMNS = ("J", "F", "J&F")
PERPLEXITY = 30.0
TAB10_GREY = 7                          # place of the grey in matplotlib's tab10, too close to INK
NAMED = 24                              # labels that a legend still has room for


@dataclass
class Run:
    """A trained model, in eval mode.

    Args:
        results: what `icf evaluate` left of the same clips; None where there is none, and `remark` says why.
    """

    name: str
    model: nn.Module
    cfg: Config
    results: Results | None = None
    remark: str = ""


@dataclass
class Features:
    """What a model makes of the N real seconds of some clips once sight and sound have met in its decoder.

    Args:
        visual: [N,C] float32, mask features averaged where the model sees something that sounds.
        audio: [N,C] float32, the sound; None where the model's queries hear nothing.
        clip, second: [N] int64, place of the clip among those shown to the model, and of the second in it.
    """

    visual: Tensor
    audio: Tensor | None
    clip: Tensor
    second: Tensor


def compare(sources: Sequence[Path], out: Path, *, names: Sequence[str] | None = None, split: str = "test",
            clips: int = 64, rows: int = 8, root: Path | None = None, device: torch.device | str = "cpu",
            progress: bool = True) -> Path:
    """Show the same clips to the models of several runs and write `out/compare.html`, which needs nothing but itself.

    Args:
        sources: run folders or weights files.
        names: of the runs, as the page calls them; None for those of the folders.
        split: `train`, `val` or `test`.
        clips: how many clips of the split the models are shown at most, evenly spaced.
        rows: how many of these the gallery shows: those on which the runs differ most.
        root: of the data; None for that of the first run.

    Returns:
        The path of `compare.html`.

    Raises:
        ValueError: the runs are of different data or their names are alike, or `clips` or `rows` is below 1.
        FileNotFoundError: there are no weights, or no data.
    """
    if min(clips, rows) < 1:
        raise ValueError(f"clips and rows: expected at least 1, got {clips} and {rows}")
    runs = load_runs(sources, names, device)
    data = runs[0].cfg.data
    data.root = data.root if root is None else root
    dataset = build_dataset(data, split)
    for run, source in zip(runs, sources, strict=True):
        run.results, run.remark = find_results(Path(source), dataset)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(clips, len(dataset))).round().astype(int)).tolist()
    subset = Subset(dataset, chosen)

    seen = [examine(run, subset, device, progress) for run in runs]
    j = np.array([run_j for _, run_j in seen])                                                # [runs, clips]
    sounds = sounding(dataset, chosen)
    html = render(
        "compare.html", "icf.studies", dataset=dataset, runs=[run.name for run in runs], shown_clips=len(chosen),
        scores=score_table(runs), modes=modes_named(SEMANTIC_DEFAULT if dataset.classes else BINARY_DEFAULT),
        features=feature_section([run.name for run in runs], [features for features, _ in seen], sounds,
                                 [dataset.names[index] for index in chosen]),
        **gallery(runs, subset, j, most_different(j)[:rows], device))
    write_atomic(out / "compare.html", lambda path: path.write_text(html, encoding="utf-8"))
    return out / "compare.html"


# Runs


def load_runs(sources: Sequence[Path], names: Sequence[str] | None, device: torch.device | str) -> list[Run]:
    """The models of runs that can be compared; see `compare` for errors."""
    names = [_name(Path(source).resolve()) for source in sources] if names is None else list(names)
    if len(names) != len(sources) or len(set(names)) < len(names):
        raise ValueError(f"names: expected {len(sources)} different names, one per run, got {', '.join(names)}")
    runs = [Run(name, *load_model(Path(source), device)) for name, source in zip(names, sources, strict=True)]
    for run in runs[1:]:
        for field in SAME:
            first, other = getattr(runs[0].cfg.data, field), getattr(run.cfg.data, field)
            if first != other:
                raise ValueError(f"runs: expected runs of the same data, got data.{field}={first!r} in {runs[0].name} "
                                 f"and {other!r} in {run.name}")
    return runs


def _name(source: Path) -> str:
    return f"{source.parent.name}/{source.stem}" if source.is_file() else source.name


def find_results(source: Path, dataset: Dataset) -> tuple[Results | None, str]:
    """What `icf evaluate` left beside the weights, if it is of the clips of `dataset`, and why not otherwise."""
    if source.is_file() and source.name != WEIGHTS:
        return None, f"results are of {WEIGHTS}"
    folder = source.parent if source.is_file() else source
    path = (folder if dataset.split == "test" else folder / dataset.split) / RESULTS
    if not path.is_file():
        return None, f"no {RESULTS}"
    results = read_results(path)
    expected = dataset.subset, dataset.split, list(dataset.names)
    return (results, "") if (results.subset, results.split, results.clips) == expected else (
        None, f"{RESULTS} is of other clips")


def score_table(runs: Sequence[Run]) -> Rows:
    """A row per run; scores that are missing are None, with the reason beside."""
    rows = []
    for run in runs:
        scores, negatives = (run.results.scores, run.results.false_positives) if run.results else ({}, {})
        rows.append([run.name, *map(scores.get, COLUMNS), *map(negatives.get, UNHEARD), run.remark])
    return Rows(["run", *COLUMNS, *(f"FPR {kind}" for kind in UNHEARD), ""], rows)


# Features


@torch.no_grad()
def observe(model: nn.Module, batch: Batch, classes: int,
            device: torch.device | str) -> tuple[Prediction, Tensor, Tensor | None]:
    """A model's prediction and the features behind it, `visual` and `audio` of `Features` for the batch; `classes` is
    0 for binary masks."""
    caught = []
    handle = model.decoder.register_forward_hook(lambda module, args, decoded: caught.append(decoded))
    try:
        prediction = model_predictor(model, classes, device)(batch)
    finally:
        handle.remove()
    decoded, where = caught[0], probability(prediction).flatten(0, 1)[batch.real.to(prediction.masks.device)]
    audio = None if decoded.audio is None else decoded.audio[:, 0].float().cpu()
    return prediction, pool(decoded.pixels.float(), where).cpu(), audio


def probability(prediction: Prediction) -> Tensor:
    """[B,T,1,H,W] that a pixel belongs to what sounds; of class scores, the share that is not background."""
    scores = prediction.scores
    return scores if scores.shape[2] == 1 else 1 - scores[:, :, :1] / scores.sum(2, keepdim=True).clamp(min=1e-6)


def examine(run: Run, dataset: Subset, device: torch.device | str, progress: bool) -> tuple[Features, list[float]]:
    """The features of all clips, and the J of each."""
    classes = dataset.dataset.classes
    tally = Tally(len(dataset), classes, run.cfg, device)
    visual, audio, places = [], [], []
    loader = build_loader([dataset], run.cfg)
    for index, (batch,) in track(loader, f"{run.name:>12}", console=Console(stderr=True), disable=not progress):
        prediction, seen, heard = observe(run.model, batch, len(classes), device)
        tally.add(prediction.masks, batch, index)
        steps = batch.frame_mask.shape[1]
        visual.append(seen)
        audio.append(heard)
        places.append(torch.stack([index[batch.real // steps], batch.real % steps]))
    clip, second = torch.cat(places, 1)
    sound = None if audio[0] is None else torch.cat(audio)
    return Features(torch.cat(visual), sound, clip, second), tally.per_clip()[0]


def sounding(dataset: Dataset, indices: Sequence[int]) -> list[list[frozenset[str]]]:
    """What is seen and heard in every second of the clips: by the manifest of a toy or composed benchmark, by labels
    where there are classes, else what is known to sound somewhere in the clip. Empty where it is not known, and where
    by the manifest something sounds off the screen too."""
    if getattr(dataset, "groups", {}):
        clips = {clip["name"]: clip for clip in read_manifest(dataset.root)["clips"]
                 if clip["split"] == dataset.split}
        return [_in_the_picture(clips[dataset.names[index]]) for index in indices]
    if dataset.classes:
        return [[frozenset(dataset.classes[c] for c in mask.unique().tolist() if 0 < c < len(dataset.classes))
                 for mask in dataset[index].masks] for index in indices]
    known = dataset.sounding_classes()
    return [[frozenset(known[index])] * dataset.frame_count(index) for index in indices]


def _in_the_picture(clip: dict) -> list[frozenset[str]]:
    elsewhere = np.array([sound["sounding"] for sound in clip["off_screen"]], dtype=bool)
    return [frozenset() if len(elsewhere) and elsewhere[:, t].any() else
            frozenset(shape["class"] for shape in clip["shapes"] if shape["sounding"][t])
            for t in range(len(clip["shapes"][0]["sounding"]))]


def feature_section(names: Sequence[str], features: Sequence[Features], sounds: Sequence[Sequence[frozenset[str]]],
                    clips: Sequence[str]) -> dict:
    """The features of every run as a picture and in numbers: `kind` of the labels, `picture`, `rows`.

    Args:
        sounds: what sounds in every second of every clip; seconds of one class are coloured by it. Where nothing is
            known, all are coloured by clip.
        clips: their names.
    """
    known = any(second for clip in sounds for second in clip)
    labels = [[_only(sounds[clip][second]) if known else clips[clip]
               for clip, second in zip(own.clip.tolist(), own.second.tolist(), strict=True)] for own in features]
    values = [measures(own, own_labels, across=known) for own, own_labels in zip(features, labels, strict=True)]
    rows = [(name, *row.values()) for name, row in zip(names, values, strict=True)]
    return {"kind": "class" if known else "clip", "picture": scatter(names, features, labels, values), "rows": rows}


def _only(sounds: frozenset[str]) -> str | None:
    return next(iter(sounds)) if len(sounds) == 1 else None


def centred(features: Tensor) -> np.ndarray:
    """Unit vectors [N,C] from the mean of one modality: how sight as a whole differs from sound does not count."""
    return torch.nn.functional.normalize(features - features.mean(0), dim=1).numpy()


def measures(features: Features, labels: Sequence[str | None], across: bool) -> dict[str, float | None]:
    """Numbers for what the picture shows, from all dimensions of the centred features.

    Args:
        labels: of the N seconds; those without are left out.
        across: compare with seconds of other clips only, as a clip's own sound and sight have met in the decoder.

    Returns:
        `sight`, `sound`: silhouettes by label with cosine distance, in [-1,1]; `sight to sound`, `sound to sight`:
        share of seconds to which the nearest one of the other modality has their label; `chance`: that share for one
        picked at random. None where it is not defined.
    """
    from sklearn.metrics import silhouette_score

    kept = np.array([place for place, label in enumerate(labels) if label is not None], dtype=int)
    codes = np.unique([labels[place] for place in kept], return_inverse=True)[1]
    points = {"sight": centred(features.visual)[kept]}
    if features.audio is not None:
        points["sound"] = centred(features.audio)[kept]
    values = dict.fromkeys(("sight", "sound", "sight to sound", "sound to sight", "chance"))
    if 2 <= len(set(codes.tolist())) < len(codes):
        values.update({name: float(silhouette_score(x, codes, metric="cosine")) for name, x in points.items()})
    clip = features.clip.numpy()[kept]
    allowed = clip[:, None] != clip if across else np.ones((len(kept), len(kept)), dtype=bool)
    if len(points) == 2 and len(kept) and allowed.any(1).all():
        similarity, same = points["sight"] @ points["sound"].T, codes[:, None] == codes
        for name, matrix in (("sight to sound", similarity), ("sound to sight", similarity.T)):
            nearest = np.where(allowed, matrix, -np.inf).argmax(1)
            values[name] = float((codes[nearest] == codes).mean())
        values["chance"] = float(((same & allowed).sum(1) / allowed.sum(1)).mean())
    return values


def embed(features: Features) -> np.ndarray:
    """t-SNE of sight and, below it, sound: [N,2], or [2N,2]. The same for the same features."""
    from sklearn.manifold import TSNE

    points = np.concatenate([centred(x) for x in (features.visual, features.audio) if x is not None])
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", metric="cosine", random_state=0).fit_transform(points)


def scatter(names: Sequence[str], features: Sequence[Features], labels: Sequence[Sequence[str | None]],
            values: Sequence[dict[str, float | None]]) -> bytes:
    """t-SNE of every run as PNG: a panel each, colour by label, marker by modality, numbers below."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shown = sorted({label for own in labels for label in own if label is not None})
    colors = {label: colormaps["tab10"](i) if len(shown) < TAB10_GREY else colormaps["hsv"](i / len(shown))
              for i, label in enumerate(shown)}
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(11, 11 / max(columns, 2) * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, name, own, own_labels, numbers in zip(axes, names, features, labels, values, strict=False):
        points = embed(own)
        for marker, place in (("o", points[:len(own_labels)]), ("^", points[len(own_labels):])):
            axis.scatter(*place.T, s=14, marker=marker, linewidths=0, alpha=0.8,
                         c=[colors.get(label, INK) for label in own_labels[:len(place)]])
        sight, sound, right, chance = ("-" if numbers[key] is None else f"{numbers[key]:.2f}"
                                       for key in ("sight", "sound", "sight to sound", "chance"))
        tint(axis, name, f"silhouette: sight {sight}, sound {sound}\nnearest sound right: {right} (chance {chance})")
        axis.set(xticks=[], yticks=[])
    for axis in axes[len(names):]:
        axis.remove()
    entries = [("sight", "o", INK), ("sound", "^", INK)]
    if len(shown) <= NAMED:
        entries += [(label, "s", colors[label]) for label in shown]
    if any(label is None for own in labels for label in own):
        entries.append(("several or none", "s", INK))
    handles = [Line2D([], [], marker=marker, ls="", color=color, label=label) for label, marker, color in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=9, fontsize=8, frameon=False, labelcolor=INK)
    return png(figure)


# Gallery


def most_different(j: np.ndarray) -> list[int]:
    """Clips by how far the runs' J [runs,clips] lie apart, the farthest first; of equals, the worst first. Clips
    without a score come last."""
    gap, worst, scored = np.ptp(j, axis=0), j.min(0), ~np.isnan(j).any(0)
    order = sorted(np.flatnonzero(scored).tolist(), key=lambda clip: (-gap[clip], worst[clip], clip))
    return order + np.flatnonzero(~scored).tolist()


def gallery(runs: Sequence[Run], dataset: Subset, j: np.ndarray, places: Sequence[int],
            device: torch.device | str) -> dict:
    """One second of each of the clips at `places`, as every run sees it: `gallery`, an item per clip, and `legend`."""
    classes, clips, samples = dataset.dataset.classes, [], []
    for place in places:
        own, maps, second = look(runs, dataset[place], j[:, place], len(classes), device)
        samples.extend(own)
        looks = [{"run": run.name, "prediction": strips(sample, classes)["prediction"], "probability": heat,
                  "j": sample.j} for run, sample, heat in zip(runs, own, maps, strict=True)]
        clips.append({"name": own[0].name, "second": second, "pictures": strips(own[0], classes), "looks": looks})
    return {"gallery": clips, "legend": legend(samples, classes)}


@torch.no_grad()
def look(runs: Sequence[Run], clip: Clip, j: Sequence[float], classes: int,
         device: torch.device | str) -> tuple[list[Sample], list[Image.Image], int]:
    """One second of a clip with the prediction of every run, maps of their probability, and which second it is: of the
    labelled ones, that on which the runs' probabilities differ most."""
    batch = collate([clip])
    seen = [model_predictor(run.model, classes, device)(batch) for run in runs]
    maps = torch.stack([probability(prediction)[0, :, 0].cpu() for prediction in seen])       # [runs,T,H,W]
    differ = (maps.amax(0) - maps.amin(0)).mean((1, 2))
    second = int(torch.where(clip.label_mask & clip.frame_mask, differ, -1.0).argmax())
    samples = []
    for run, prediction, score in zip(runs, seen, j, strict=True):
        masks = prediction.masks if classes else foreground(prediction.masks, run.cfg.eval.threshold)
        one = slice(second, second + 1)
        samples.append(Sample(
            clip.name, clip.frames[one], clip.log_mel[one], clip.masks[one], clip.label_mask[one],
            masks[0, one].to("cpu", torch.uint8), None if np.isnan(score) else float(score), None, ""))
    return samples, [heat(own[second]) for own in maps], second


def heat(share: Tensor) -> Image.Image:
    """A map [H,W] in [0,1] as a picture, dark to bright."""
    from matplotlib import colormaps

    picture = (colormaps["magma"](share.numpy())[..., :3] * 255).astype(np.uint8)
    return Image.fromarray(picture).resize((THUMB, THUMB), Image.Resampling.BILINEAR)
