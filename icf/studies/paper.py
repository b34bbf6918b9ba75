"""What the paper reports, to stand beside what is measured: its ablations (Table 2) and sweeps (Figure 5), with PVT-v2.

Scores are J&F, J and F in per cent; M3 is the paper's name of MS3.
"""
from __future__ import annotations

from typing import NamedTuple

Scores = tuple[float, float, float]


class Row(NamedTuple):
    """A row of Table 2, or an ablation of this package that the paper has not: `m3` and `avss` are then None.

    Args:
        block, setting: as the table calls it.
        ablation: the preset in `configs/ablations/`; rows that are one and the same network share it.
    """

    block: str
    setting: str
    ablation: str
    m3: Scores | None = None
    avss: Scores | None = None


TABLE_2 = (
    Row("components", "baseline", "baseline", (64.51, 59.13, 69.88), (41.86, 38.48, 45.23)),
    Row("components", "MIT", "mit", (66.64, 61.44, 71.83), (44.10, 40.83, 47.37)),
    Row("components", "CDCL", "cdcl", (65.84, 60.77, 70.90), (43.72, 39.99, 47.45)),
    Row("components", "MIT + SC", "mit_sc", (68.03, 62.94, 73.11), (45.66, 42.55, 48.76)),
    Row("components", "MIT + CDCL", "mit_cdcl", (67.63, 62.48, 72.78), (46.04, 42.96, 49.11)),
    Row("components", "MIT + SC + CDCL", "icf", (69.89, 64.38, 75.39), (48.16, 45.03, 51.28)),
    Row("granularity", "frame", "granularity_frame", (65.07, 59.89, 70.25), (42.34, 38.89, 45.79)),
    Row("granularity", "frame + video", "granularity_frame_video", (65.68, 60.43, 70.92), (43.11, 39.77, 46.45)),
    Row("granularity", "frame + video + segment", "mit", (66.64, 61.44, 71.83), (44.10, 40.83, 47.37)),
    Row("dimension", "feature level", "feature_counterfactual", (67.21, 61.96, 72.45), (45.84, 42.43, 49.24)),
    Row("dimension", "latent, inter-sample", "inter", (68.87, 63.52, 74.22), (47.33, 44.47, 50.19)),
    Row("dimension", "latent, intra-sample", "intra", (68.82, 63.83, 73.81), (47.07, 44.11, 50.02)),
    Row("dimension", "latent, both", "icf", (69.89, 64.38, 75.39), (48.16, 45.03, 51.28)),
    Row("space", "discrete (VQ-VAE)", "vqvae", (68.51, 63.13, 73.88), (46.83, 43.85, 49.81)),
    Row("space", "continuous", "continuous", (69.18, 63.86, 74.49), (47.31, 44.28, 50.33)),
    Row("space", "continuous + L_ortho", "icf", (69.89, 64.38, 75.39), (48.16, 45.03, 51.28)),
    Row("strategy", "pair swap", "pair_swap", (68.16, 62.89, 73.42), (46.56, 43.71, 49.40)),
    Row("strategy", "audio replacement", "audio_replacement", (68.35, 63.05, 73.64), (46.61, 43.45, 49.77)),
    Row("strategy", "text revision", "text_revision", (68.44, 63.31, 73.56), (46.91, 43.95, 49.86)),
    Row("contrast pairs", "v-l", "pairs_vl", (68.69, 63.42, 73.96), (46.73, 43.80, 49.66)),
    Row("contrast pairs", "v-l + a-l", "pairs_vl_al", (69.32, 63.85, 74.78), (47.24, 44.29, 50.19)),
    Row("contrast pairs", "v-l + a-l + v-a", "icf", (69.89, 64.38, 75.39), (48.16, 45.03, 51.28)),
    Row("contrast kind", "prototype", "prototype", (68.32, 63.12, 73.52), (46.22, 43.26, 49.17)),
    Row("contrast kind", "feature", "feature", (68.59, 63.19, 73.99), (46.90, 43.79, 50.01)),
    Row("contrast kind", "distribution", "icf", (69.89, 64.38, 75.39), (48.16, 45.03, 51.28)),
    Row("not in the paper", "residual sound", "residual"),
    Row("not in the paper", "random dropout", "dropout"),
    Row("not in the paper", "MIT + SC + CDCL, sounds that belong to nothing", "icf_negatives"),
)


class Sweep(NamedTuple):
    """A panel of Figure 5, read off the drawing to about 0.02, on M3.

    Args:
        name: of the swept quantity.
        axis: what the panel is labelled with.
        values: where it was measured; None for undisturbed sound. An interval of alpha is (low, high).
        curves: scores by ablation, one for each value, as rows of J&F, J and F.
        trained: a network was trained for each value; else trained ones were evaluated under a disturbance.
    """

    name: str
    axis: str
    values: tuple
    curves: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]]
    trained: bool


FIGURE_5 = (
    Sweep("keep", "counterfactuals kept", (0, 2, 4, 6, 8, 10, 12), {"icf": (
        (67.63, 67.95, 68.45, 69.18, 69.88, 70.05, 70.18), (62.48, 62.69, 63.12, 63.77, 64.38, 64.59, 64.72),
        (72.78, 73.21, 73.78, 74.59, 75.39, 75.51, 75.64))}, trained=True),
    Sweep("alpha", "interval of alpha", (0, *((i / 10, (i + 1) / 10) for i in range(10))), {"icf": (
        (67.63, 67.87, 68.10, 68.55, 68.73, 69.05, 69.43, 69.73, 69.88, 69.61, 69.44),
        (62.48, 62.73, 62.99, 63.33, 63.19, 63.51, 63.75, 64.02, 64.38, 64.08, 63.88),
        (72.78, 73.01, 73.22, 73.77, 74.28, 74.59, 75.12, 75.44, 75.39, 75.14, 75.00))}, trained=True),
    Sweep("start", "diffusion step", (0, 50, 100, 150, 200, 250, 300), {"icf": (
        (67.63, 68.61, 69.29, 69.51, 69.88, 68.80, 68.14), (62.48, 63.11, 63.75, 64.00, 64.38, 63.45, 63.00),
        (72.78, 74.12, 74.83, 75.03, 75.39, 74.15, 73.28))}, trained=True),
    Sweep("snr_db", "signal-to-noise ratio of the sound, dB", (20, 25, 30, 35, 40, None), {
        "baseline": ((55.84, 59.02, 60.65, 62.60, 63.44, 64.50), (51.49, 54.62, 56.18, 57.42, 58.44, 59.13),
                     (60.19, 63.43, 65.12, 67.79, 68.44, 69.88)),
        "icf": ((63.59, 66.08, 67.89, 68.83, 69.37, 69.88), (59.74, 61.00, 62.00, 63.45, 64.00, 64.38),
                (67.44, 71.16, 73.79, 74.22, 74.75, 75.39))}, trained=False),
    Sweep("frame_mix", "exchanged frames in a quarter of the clips", (0, 1, 2, 3, 4), {
        "baseline": ((64.50, 59.45, 54.87, 51.54, 46.16), (59.12, 54.11, 49.99, 47.44, 42.14),
                     (69.87, 64.77, 59.73, 55.63, 50.17)),
        "icf": ((69.88, 66.65, 63.05, 60.08, 55.24), (64.37, 61.18, 58.09, 54.97, 49.47),
                (75.38, 72.10, 67.99, 65.18, 60.99))}, trained=False),
)
