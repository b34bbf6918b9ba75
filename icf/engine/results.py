"""Results of evaluation and training: put together from the metrics, written as tables, read again."""
from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset

from icf import __version__
from icf.config import Config
from icf.data.audio import RESAMPLER
from icf.data.avsbench import read_manifest
from icf.engine.checkpoint import WEIGHTS, read_config
from icf.engine.conditions import SEED, UNHEARD
from icf.engine.metrics import combined_score
from icf.engine.tally import BINARY_DEFAULT, SEMANTIC_DEFAULT, Negative, Tally
from icf.files import read_json, write_atomic

SCORES = ("J&F", "J", "F")
HISTORY = "metrics.json"                        # of a training run, in its folder
RESULTS = "results.json"                        # of an evaluation, in its folder


def scores_folder(source: Path, cfg: Config, split: str, masks: Path | None = None) -> Path:
    """Where the scores of an evaluation belong. The folder of a run holds the test of its best weights with its own
    settings, a folder in it those of its other splits; whatever differs from that has a folder of its own, by name.

    Args:
        source: a run folder or weights file.
        cfg: that the evaluation has.
        masks: that are scored instead of the model's.
    """
    run = source if source.is_dir() else source.parent
    other = [] if source.is_dir() or source.name == WEIGHTS else [source.stem]
    other += [] if masks is None else [f"masks={masks}"]
    other += [f"{key}={here}" for key, (_, here) in cfg.differences(read_config(source)).items()
              if split == "test" or not key.startswith("eval.")]             # the run itself scores no other split
    if not other:
        return run if split == "test" else run / split
    name = ",".join(other)
    words = re.sub(r"[^\w.,=-]+", "_", name)[:60].strip("_,.")
    return run / "evaluations" / f"{split},{words}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


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
    data = cfg.to_dict()["data"]
    return {"resolution": cfg.data.size, "threshold": cfg.eval.threshold, "audio_source": cfg.data.audio_source,
            "audio_timing": cfg.data.audio_timing, "resampler": RESAMPLER, "snr_db": cfg.eval.snr_db,
            "frame_mix": cfg.eval.frame_mix, "seed": SEED, "toy": data["toy"], "compose": data["compose"],
            "root": str(cfg.data.root), "icf": __version__, "torch": torch.__version__,
            **({} if "masks" in notes else _model(cfg)), **notes}


def _model(cfg: Config) -> dict:
    """What was trained, in words."""
    objective = cfg.objective
    parts = [name for name in ("mit", "sc", "cdcl") if getattr(objective, name).enabled]
    return {"network": cfg.model.network, "encoders": f"{cfg.model.visual.name}, {cfg.model.audio.name}",
            "objective": " + ".join(parts).upper() if objective.enabled else "none, the baseline",
            "training seed": cfg.train.seed}


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
    """Places of the clips of each group: aligned and conflicting where a manifest tells, v1s, v1m and v2 in AVSS."""
    groups: dict[str, list[int]] = {}
    named = getattr(dataset, "groups", {})
    for index, name in enumerate(dataset.names):
        if name in named:
            groups.setdefault(named[name], []).append(index)
        if dataset.subset == "avss":
            groups.setdefault(dataset.records[index].source, []).append(index)
    return dict(sorted(groups.items()))


def oracles(dataset: Dataset) -> dict:
    """J of whom segments what stands out, what is heard or all that can sound, where a manifest tells."""
    if not getattr(dataset, "groups", {}):
        return {}
    found = read_manifest(dataset.root)["oracles"].get(dataset.split) or {}
    return {name: scores for name, scores in found.items() if isinstance(scores, dict)}


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


def _write_csv(rows: Sequence[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["class"])
        writer.writeheader()
        writer.writerows({key: " ".join(value) if isinstance(value, list) else value for key, value in row.items()}
                         for row in rows)


def _plain(value):
    """JSON's values: what is not defined (a mean over nothing) becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
