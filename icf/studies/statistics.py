"""Whether a difference holds: intervals by bootstrap over seeds and clips, and a signed rank test over seeds."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from icf.engine.results import RESULTS
from icf.files import read_json

DRAWS, SEED, LEVEL = 10_000, 0, 0.95
GREEN, GREY = "#26a69a", "#808a96"
HIGHER = ("J", "F", "J aligned", "J conflicting", "empty silence", "empty noise", "empty offscreen")
"""Scores of which more is better; of the others, less."""


@dataclass(frozen=True)
class Measured:
    """One run.

    Args:
        scores: by name, shares.
        clips: of J and of what can be told clip by clip, [clips].
    """

    scores: dict[str, float]
    clips: dict[str, NDArray]


def read_measured(run: Path) -> Measured:
    """The scores of a run's test split. Raises FileNotFoundError, or ValueError for what `evaluate` does not write."""
    values = read_json(run / RESULTS)
    try:
        scores = {key: values[key] for key in ("J", "F")}
        scores |= {f"J {group}": values["groups"][group]["J"] for group in ("aligned", "conflicting")
                   if group in values["groups"]}
        negatives = values["negatives"]
        if "shuffled" in negatives:
            scores["J other sound"] = negatives["shuffled"]["J"]
        unheard = [kind for kind in ("silence", "noise", "offscreen") if kind in negatives]
        scores |= {f"FPR {kind}": negatives[kind]["FPR"] for kind in unheard}
        scores |= {f"empty {kind}": negatives[kind]["strict"] for kind in unheard}
        clips = {key: np.array([clip[key] for clip in values["clips"]], dtype=float)
                 for key in ("J", *(f"FPR {kind}" for kind in unheard))}
        groups = [set(clip["groups"]) for clip in values["clips"]]
        for group in ("aligned", "conflicting"):
            if f"J {group}" in scores:
                clips[f"J {group}"] = clips["J"][[group in own for own in groups]]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{run / RESULTS}: not what icf evaluate writes ({type(error).__name__}: {error})") from None
    return Measured({key: float(value) for key, value in scores.items()}, clips)


def interval(values: NDArray) -> tuple[float, float]:
    """The 95 % interval of the mean of values [seeds] or [seeds,clips], drawn anew with replacement from both."""
    rng = np.random.default_rng(SEED)
    seeds = rng.integers(0, len(values), (DRAWS, len(values)))
    if values.ndim == 1:
        means = values[seeds].mean(1)
    else:  # the mean over drawn seeds and drawn clips: how often each is drawn, on both sides of the values
        clips = rng.multinomial(values.shape[1], np.full(values.shape[1], 1 / values.shape[1]), DRAWS) / values.shape[1]
        weights = np.stack([np.bincount(row, minlength=len(values)) for row in seeds]) / len(values)
        means = np.einsum("ds,sc,dc->d", weights, values, clips, optimize=True)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def wilcoxon(differences: Sequence[float]) -> float | None:
    """Two-sided p of the signed rank test; None for fewer than five differences, or none but zeros."""
    from scipy.stats import wilcoxon as test

    if len(differences) < 5 or not np.any(differences):
        return None
    return float(test(differences).pvalue)


def summary(runs: Mapping[int, Measured], base: Mapping[int, Measured]) -> dict[str, dict]:
    """Of the runs of a row by seed: mean and interval of every score, and what it gains over the base on the seeds that
    both have.

    Returns:
        By score: `mean`, `interval`, `seeds`, and, where both have a seed, `gain`: `mean`, `interval`, `wilcoxon`,
        `better` (in how many of them) and `seeds`.
    """
    found = {}
    for key in dict.fromkeys(key for run in runs.values() for key in run.scores):
        own = {seed: run for seed, run in runs.items() if key in run.scores}
        values = [run.scores[key] for run in own.values()]
        found[key] = {"mean": float(np.mean(values)), "interval": interval(_table(own.values(), key)),
                      "seeds": [*own], "values": values}
        both = [seed for seed in own if seed in base and key in base[seed].scores]
        if both and base is not runs:
            gains = np.array([runs[seed].scores[key] - base[seed].scores[key] for seed in both])
            table = _table([runs[seed] for seed in both], key) - _table([base[seed] for seed in both], key)
            found[key]["gain"] = {"mean": float(gains.mean()), "interval": interval(table), "wilcoxon": wilcoxon(gains),
                                  "better": int((gains > 0).sum() if key in HIGHER else (gains < 0).sum()),
                                  "seeds": both}
    return found


def _table(runs, key: str) -> NDArray:
    """[seeds,clips] where the score can be told clip by clip, in the same clips; else [seeds]."""
    runs = list(runs)
    if all(key in run.clips and len(run.clips[key]) == len(runs[0].clips[key]) for run in runs):
        return np.stack([run.clips[key] for run in runs])
    return np.array([run.scores[key] for run in runs])


def statistics_table(names: dict[str, str], found: dict[str, dict], title: str) -> str:
    """A row of the method a line: means with intervals, and what J gains over the baseline."""
    keys = list(dict.fromkeys(key for row in found.values() for key in row))
    lines = [["", "seeds", *keys, "J over baseline", "better in", "p"], ["---"] * (len(keys) + 5)]
    for name, row in found.items():
        cells = [f"{row[key]['mean']:.3f} [{row[key]['interval'][0]:.3f}, {row[key]['interval'][1]:.3f}]"
                 if key in row else "" for key in keys]
        gain = row["J"].get("gain")
        told = ["", "", ""] if gain is None else [
            f"{gain['mean']:+.3f} [{gain['interval'][0]:+.3f}, {gain['interval'][1]:+.3f}]",
            f"{gain['better']} of {len(gain['seeds'])}", "" if gain["wilcoxon"] is None else f"{gain['wilcoxon']:.3f}"]
        lines.append([names[name], str(len(row["J"]["seeds"])), *cells, *told])
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{title}; in brackets 95 % by bootstrap over seeds and clips, p by Wilcoxon's signed rank test\n\n{body}"


def draw_seeds(names: dict[str, str], runs: dict[str, dict[int, Measured]], path: Path) -> None:
    """A dot per run, lines between those of a seed, a bar at the mean: J, aligned, conflicting, with another sound."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = [key for key in ("J", "J aligned", "J conflicting", "J other sound")
            if all(key in run.scores for own in runs.values() for run in own.values())]
    figure = Figure(figsize=(1.2 + 0.55 * len(runs) * len(keys), 3.8), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for seed in sorted({seed for own in runs.values() for seed in own}):
            points = [(x, own[seed].scores[key]) for x, own in enumerate(runs.values()) if seed in own]
            axes.plot(*zip(*points, strict=True), "-", color="#80808060", lw=0.8)
        for x, (name, own) in enumerate(runs.items()):
            values = [run.scores[key] for run in own.values()]
            axes.plot([x] * len(values), values, "o", ms=4, color=GREY if name == "baseline" else GREEN)
            axes.hlines(np.mean(values), x - 0.3, x + 0.3, color="black", lw=1.5)
        axes.set_xticks(range(len(runs)), [names[name] for name in runs], rotation=60, ha="right", fontsize=7)
        axes.set_title(key, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=130)
