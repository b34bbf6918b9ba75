"""Spatio-temporal channel attention, Eq. 1-2 of the paper."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelAttention(nn.Module):
    """`F := F + (A V^T)^T`, `A = softmax(Q K^T / tau)` over the T*C channel rows of a window of T frames.

    Q, K, V and the result pass through 1x1 convolutions between `channels` and `dim`. The last one starts at zero, so
    that the features of a pretrained encoder are whole at the start. `tau` is sqrt(H*W) times a learned factor.

    Args:
        channels: of the map.
        dim: channels attended over, per frame (ours; the paper attends over all of them).
        literal_product: `V A` as printed, whose columns do not sum to one, instead of `(A V^T)^T`.
    """

    def __init__(self, channels: int, dim: int, literal_product: bool = False):
        super().__init__()
        self.literal_product = literal_product
        self.reduce = nn.Conv2d(channels, dim, 1)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.expand = nn.Conv2d(dim, channels, 1)
        self.log_tau = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor, frames: int = 1, frame_mask: Tensor | None = None) -> Tensor:
        """The residual of Eq. 2, to be added to `x`.

        Args:
            x: [B*T,C,H,W], the T = `frames` frames of each window after one another.
            frame_mask: [B,T] bool, real frames; the others are seen by none. None: all are real.
        """
        n, _, h, w = x.shape
        windows = n // frames
        tau = self.log_tau.exp() * math.sqrt(h * w)
        q, k, v = (part.reshape(windows, -1, h * w) for part in self.qkv(self.reduce(x)).chunk(3, 1))  # [B, T*d, HW]
        rows = None if frame_mask is None else frame_mask.repeat_interleave(q.shape[1] // frames, 1)   # [B, T*d]
        mixed = self._printed(q / tau, k, v, rows) if self.literal_product else _attend(q / tau, k, v, rows)
        return self.expand(mixed.reshape(n, -1, h, w))

    @staticmethod
    def _printed(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        scores = q @ k.transpose(1, 2)
        if rows is not None:
            scores = scores.masked_fill(~rows[:, None], -torch.inf)
            v = v * rows[..., None]
        return scores.softmax(-1).transpose(1, 2) @ v


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
    mask = None if rows is None else rows[:, None, None]
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], mask, scale=1.0)[:, 0]


class VisualContext(nn.Module):
    """Adds to the two coarsest maps what channel attention over the clip (`video`) and within a frame finds.

    Args:
        channels: of the two maps.
        levels: `video`, `frame` or both; their residuals are summed.
        dim, literal_product: of `ChannelAttention`.
    """

    def __init__(self, channels: Sequence[int], levels: Sequence[str], dim: int, literal_product: bool = False):
        super().__init__()
        self.levels = nn.ModuleDict({
            level: nn.ModuleList(ChannelAttention(c, dim, literal_product) for c in channels) for level in levels})

    def forward(self, maps: Sequence[Tensor], frames: int, frame_mask: Tensor | None = None) -> list[Tensor]:
        """maps: res4, res5 [B*T,C,H,W] with T = `frames`; frame_mask: [B,T] bool, None if all are real -> the same."""
        out = list(maps)
        for level, blocks in self.levels.items():
            window = (frames, frame_mask) if level == "video" else (1, None)
            for i, (block, x) in enumerate(zip(blocks, maps, strict=True)):
                out[i] = out[i] + block(x, *window)
        return out
