"""Training curves, and what figures of matplotlib have in common: colours for light and dark pages, no window system.

matplotlib is imported where it draws, with a canvas of its own, so that no global state is used.
"""
from __future__ import annotations

import io

import numpy as np

INK = "#808a96"                                                          # of curves; readable on white and on black


def curves(history: dict) -> bytes:
    """Training curves as PNG: losses by step, the learning rate, and J and F of the validation split.

    Args:
        history: `metrics.json` of a run: `steps` [{step, loss, lr, ...}], `evaluations` [{step, J, F, ...}].
    """
    from matplotlib.figure import Figure

    steps, evaluations = history.get("steps", []), history.get("evaluations", [])
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    terms = [key for key in steps[0] if key not in ("step", "lr")] if steps else []
    for rank, key in enumerate(terms):
        values = np.array([row.get(key, np.nan) for row in steps], dtype=float)
        axes[0].plot([row["step"] for row in steps], _smooth(values), label=key, lw=2 if key == "loss" else 1,
                     color=f"C{rank}", zorder=3 if key == "loss" else 2)
    axes[1].plot([row["step"] for row in steps], [row["lr"] for row in steps], color="C4")
    for key in ("J", "F"):
        axes[2].plot([row["step"] for row in evaluations], [row[key] for row in evaluations], "o-", ms=3, label=key)
    for axis, title in zip(axes, ("loss, smoothed", "learning rate", "validation"), strict=True):
        tint(axis, title, "step")
        axis.grid(alpha=0.25, color=INK)
        if axis.get_legend_handles_labels()[0]:
            beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if axis is axes[0] else {}  # terms may be many
            axis.legend(fontsize=7, frameon=False, labelcolor=INK, **beside)
    if any(value > 0 for row in steps for value in [row["loss"]]):
        axes[0].set_yscale("log")
    return png(figure)


def tint(axis, title: str, label: str) -> None:
    """Give an axis of matplotlib its title, the label below it, and colours that suit light and dark pages."""
    axis.set_title(title, color=INK, fontsize=10)
    axis.set_xlabel(label, color=INK, fontsize=9)
    axis.tick_params(colors=INK, labelsize=8)
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
