"""Spatio-temporal channel attention, Eq. 1-2 of the paper."""
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

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
        self.log_tau = nn.Parameter(torch.zeros(1))                         # FSDP2 takes no scalars
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
            scores = scores.masked_fill(~_seen(rows)[:, None], -torch.inf)
            v = v * rows[..., None]
        return scores.softmax(-1).transpose(1, 2) @ v


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
    mask = None if rows is None else _seen(rows)[:, None, None]
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], mask, scale=1.0)[:, 0]


def _seen(rows: Tensor) -> Tensor:
    """rows [N,R] bool; where there is nothing to see, all is seen, as a softmax over nothing is not a number."""
    return rows | ~rows.any(-1, keepdim=True)


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


class LevelFeatures(nn.Module):
    """One unit vector for the clip, for each of its segments, and for each frame: what implicit text is matched to.

    Args:
        channels: of the maps.
        dim: of the vectors.
        levels: which of `video`, `segment`, `frame`.
        attended: levels whose frames attend to one another first (Eq. 1-2); the others are averages as they are, for
            maps that have had their context already.
        context_dim, literal_product: of `ChannelAttention`.
        parts, stride: of `segments`.
    """

    def __init__(self, channels: Sequence[int], dim: int, levels: Sequence[str], attended: Sequence[str],
                 context_dim: int = 256, literal_product: bool = False, parts: int = 2, stride: int | None = None):
        super().__init__()
        self.parts, self.stride = parts, stride
        self.blocks = nn.ModuleDict({
            level: nn.ModuleList(ChannelAttention(c, context_dim, literal_product) for c in channels)
            for level in levels if level in attended})
        self.project = nn.ModuleDict({level: nn.Linear(sum(channels), dim) for level in levels})

    def forward(self, maps: Sequence[Tensor],
                frame_mask: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """maps: [B,T,C,h,w] each; frame_mask: [B,T] bool, real frames first, None if all are.

        Returns vectors [B,1,dim], [B,S,dim], [B,T,dim] by level, and which of them, in that order, cover a second:
        [B or 1,T,N] bool.
        """
        steps = maps[0].shape[1]
        features, member = {}, []
        for level, project in self.project.items():
            place, real = self._windows(level, steps, frame_mask, maps[0].device)               # [B or 1, n, w]
            pooled = torch.cat([self._pool(level, i, x, place, real) for i, x in enumerate(maps)], -1)
            features[level] = F.normalize(project(pooled), dim=-1)
            covers = place[..., None] == torch.arange(steps, device=place.device)                # [B or 1, n, w, T]
            member.append((covers if real is None else covers & real[..., None]).any(2).transpose(1, 2))
        return features, torch.cat(member, 2)

    def _pool(self, level: str, scale: int, x: Tensor, place: Tensor, real: Tensor | None) -> Tensor:
        """Means over the frames of each window and their pixels: [B,n,C]."""
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        if level in self.blocks:
            windows = x[rows, place]                                                            # [B, n, w, C, h, w]
            shape, flat = windows.shape[:3], windows.flatten(0, 2)
            seen = None if real is None else real.flatten(0, 1)
            pooled = (flat + self.blocks[level][scale](flat, shape[2], seen)).mean((2, 3)).unflatten(0, shape)
        else:
            pooled = x.mean((3, 4))[rows, place]                                                # [B, n, w, C]
        if real is None:
            return pooled.mean(2)
        weight = real.to(x.dtype) / real.sum(-1, keepdim=True).clamp(min=1)                     # [B, n, w]
        return (pooled * weight[..., None]).sum(2)

    def _windows(self, level: str, steps: int, frame_mask: Tensor | None, device) -> tuple[Tensor, Tensor | None]:
        """Places of the frames of each window of a level, [B or 1,n,w], and which of them are real; None if all are."""
        if level == "segment":
            if frame_mask is None:  # made on the device, for which a list from the host would have to be waited
                window, count = math.ceil(steps / self.parts), len(segments(steps, self.parts, self.stride))
                starts = torch.arange(count, device=device) * min(self.stride or window, window)
                return (starts.clamp(max=steps - window)[:, None] + torch.arange(window, device=device))[None], None
            place, real = (x[frame_mask.sum(1)] for x in _segment_table(steps, self.parts, self.stride, device))
            return place, real
        place = torch.arange(steps, device=device).view((1, 1, -1) if level == "video" else (1, -1, 1))
        if frame_mask is None:
            return place, None
        return place.expand(len(frame_mask), -1, -1), frame_mask.unsqueeze(1 if level == "video" else 2)


def segments(length: int, parts: int, stride: int | None = None) -> list[list[int]]:
    """Frames of each segment of a clip: windows of `length / parts` frames, rounded up, every `stride` frames (their
    length, if None). A last window that would end after the clip is completed with the frames before it."""
    window = math.ceil(length / parts)
    starts = range(0, length, min(stride or window, window)) if length else ()
    ends = sorted({min(start + window, length) for start in starts})
    return [list(range(end - window, end)) for end in ends]


@lru_cache
@torch.inference_mode(False)  # kept for training also
def _segment_table(steps: int, parts: int, stride: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The segments of clips of 0 to `steps` real frames: places and which are real, [steps+1,S,w] each."""
    clips = [segments(length, parts, stride) for length in range(steps + 1)]
    shape = steps + 1, max(map(len, clips)), math.ceil(steps / parts)
    place, real = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for length, windows in enumerate(clips):
        for i, frames in enumerate(windows):
            place[length, i, :len(frames)], real[length, i, :len(frames)] = torch.tensor(frames), True
    return place.to(device), real.to(device)
