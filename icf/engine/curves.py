"""Training curves, and what figures of matplotlib have in common: colours for light and dark pages, no window system.

matplotlib is imported where it draws, with a canvas of its own, so that no global state is used.
"""
from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np

INK = "#808a96"                                                          # of curves; readable on white and on black


GROUPS = {
    "segmentation": ("loss", "bce", "dice", "focal", "ce", "mix"),
    "contrast": ("va", "al", "vl", "al_cf", "vl_cf", "al_batch", "vl_batch"),
    "counterfactuals: losses": ("cf", "eps", "rec", "ortho", "hinge", "target", "vq"),
    "counterfactuals: how hard": ("cosine", "closer_a", "closer_v", "degree", "degree_kept"),
}
"""Which terms and statistics of a step are drawn together; others have a panel of their own kind."""
PLAIN = ("counterfactuals: how hard", "statistics")                      # without a logarithmic axis


def curves(history: dict) -> bytes:
    """Training curves as PNG, a panel for each group of terms, the learning rate, and J and F of the validation split.

    Args:
        history: `metrics.json` of a run: `steps` [{step, loss, lr, ...}], `evaluations` [{step, J, F, ...}]. Steps need
            not have the same terms.
    """
    from matplotlib.figure import Figure

    steps, evaluations = history.get("steps", []), history.get("evaluations", [])
    panels = grouped({key: None for row in steps for key in row})
    columns = min(3, len(panels) + 2)
    rows = -(-(len(panels) + 2) // columns)
    figure = Figure(figsize=(11, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, keys) in zip(axes, panels.items(), strict=False):
        for rank, key in enumerate(keys):
            points = [(row["step"], row[key]) for row in steps if key in row]
            axis.plot([step for step, _ in points], _smooth(np.array([value for _, value in points], dtype=float)),
                      label=key.split("/")[1] if "/" in key else key, lw=2 if key == "loss" else 1,
                      color=f"C{rank % 10}", ls="-" if rank < 10 else "--", zorder=3 if key == "loss" else 2)
        if title not in PLAIN and all(row[key] > 0 for row in steps for key in keys if key in row):
            axis.set_yscale("log")
        tint(axis, title, "step")
    rate, scores = axes[len(panels):len(panels) + 2]
    rate.plot([row["step"] for row in steps], [row["lr"] for row in steps], color="C4")
    for key in ("J", "F", "J other sound"):
        points = [(row["step"], row[key]) for row in evaluations if key in row]
        if points:
            scores.plot(*zip(*points, strict=True), "o-", ms=3, label=key)
    tint(rate, "learning rate", "step")
    tint(scores, "validation", "step")
    for axis in axes:
        axis.grid(alpha=0.25, color=INK)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False, labelcolor=INK, ncols=2)
    for axis in axes[len(panels) + 2:]:
        axis.remove()
    return png(figure)


def grouped(keys: Iterable[str]) -> dict[str, list[str]]:
    """Terms of a step by the panel they are drawn in."""
    known = {key: title for title, group in GROUPS.items() for key in group}
    panels: dict[str, list[str]] = {title: [] for title in GROUPS}
    for key in keys:
        if key.startswith("grad/"):
            panels.setdefault(f"gradient norms: {key.split('/')[-1]}", []).append(key)
        elif key not in ("step", "lr"):
            panels.setdefault(known.get(key, "statistics"), []).append(key)
    return {title: found for title, found in panels.items() if found}


def tint(axis, title: str, label: str) -> None:
    """Give an axis of matplotlib its title, the label below it, and colours that suit light and dark pages."""
    axis.set_title(title, color=INK, fontsize=10)
    axis.set_xlabel(label, color=INK, fontsize=9)
    axis.tick_params(which="both", colors=INK, labelsize=8)
    axis.set_facecolor("none")
    for spine in axis.spines.values():
        spine.set_color(INK)
        spine.set_alpha(0.4)


def png(figure) -> bytes:
    """A figure of matplotlib as PNG, its background clear."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.patch.set_alpha(0)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over the last n/20 values."""
    window = max(len(values) // 20, 1)
    padded = np.concatenate([np.full(window - 1, values[0]), values]) if len(values) else values
    return np.convolve(padded, np.full(window, 1 / window), mode="valid") if len(values) else values
