"""The mean over the seconds of a clip that exist."""
from __future__ import annotations

from torch import Tensor


def average(x: Tensor, real: Tensor | None, dim: int = 1) -> Tensor:
    """Mean over dimension `dim` of x, whose length T becomes 1.

    Args:
        x: [..,T,..], floating.
        real: bool, what counts: of the shape of x up to `dim`, or broadcast to it; None: everything. Where nothing
            counts, the mean is zero.
    """
    if real is None:
        return x.mean(dim, keepdim=True)
    weight = real.to(x.dtype)[(..., *[None] * (x.ndim - 1 - dim % x.ndim))]
    return (x * weight).sum(dim, keepdim=True) / weight.sum(dim, keepdim=True).clamp(min=1)


def clip_average(x: Tensor, frame_mask: Tensor | None) -> Tensor:
    """Mean of x [B,T] over the seconds of each clip, and of these over the clips that have any: 0-dim."""
    means = average(x, frame_mask)[:, 0]
    return means.mean() if frame_mask is None else average(means, frame_mask.any(1), 0)[0]
