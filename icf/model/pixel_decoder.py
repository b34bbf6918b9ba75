"""Pixel decoder: a deformable transformer over strides 8, 16, 32, and one FPN step to stride 4, as in Mask2Former."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icf.model.position import pixel_centers, sine_position
from icf.ops import MSDeformAttn


class PixelDecoder(nn.Module):
    """Feature maps of an encoder to mask features and three levels for the mask decoder.

    Args:
        channels: of the maps at strides 4, 8, 16, 32.
        dim: width, divisible by 4 and by `heads`.
        layers, ffn, heads, points: of the deformable transformer; `points` is per head and level.
    """

    def __init__(self, channels: Sequence[int], dim: int, layers: int, ffn: int, heads: int, points: int):
        super().__init__()
        self.reduce = nn.ModuleList(nn.Sequential(nn.Conv2d(c, dim, 1), _group_norm(dim)) for c in channels[1:])
        self.level = nn.Parameter(torch.randn(3, dim))
        self.layers = nn.ModuleList(DeformableLayer(dim, ffn, heads, 3, points) for _ in range(layers))
        self.lateral = nn.Sequential(nn.Conv2d(channels[0], dim, 1, bias=False), _group_norm(dim))
        self.smooth = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), _group_norm(dim), nn.ReLU())
        self.mask_features = nn.Conv2d(dim, dim, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """maps: res2..res5 [N,C,H/4,W/4] .. [N,C,H/32,W/32] -> mask features [N,dim,H/4,W/4], levels [N,dim,H/8,W/8] ..
        [N,dim,H/32,W/32]."""
        levels = [reduce(x) for reduce, x in zip(self.reduce, maps[1:], strict=True)]
        shapes = [(x.shape[2], x.shape[3]) for x in levels]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1)                           # [N, S, dim]
        position = torch.cat([sine_position(h, w, tokens.shape[2], tokens.device) + level
                              for (h, w), level in zip(shapes, self.level, strict=True)])               # [S, dim]
        reference = torch.cat([pixel_centers(h, w, tokens.device) for h, w in shapes])[None, :, None]   # [1, S, 1, 2]
        for layer in self.layers:
            tokens = layer(tokens, position, reference, shapes)
        levels = [part.transpose(1, 2).unflatten(2, shape)
                  for part, shape in zip(tokens.split([h * w for h, w in shapes], 1), shapes, strict=True)]
        fine = self.lateral(maps[0])
        fine = fine + F.interpolate(levels[0], size=fine.shape[2:], mode="bilinear", align_corners=False)
        return self.mask_features(self.smooth(fine)), levels


class DeformableLayer(nn.Module):
    """Multi-scale deformable self-attention and a feed-forward network, each with residual and LayerNorm after it."""

    def __init__(self, dim: int, ffn: int, heads: int, levels: int, points: int):
        super().__init__()
        self.attention = MSDeformAttn(dim, levels, heads, points)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.ReLU(), nn.Linear(ffn, dim))

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        tokens = self.norm1(tokens + self.attention(tokens + position, reference, tokens, shapes))
        return self.norm2(tokens + self.ffn(tokens))


def _group_norm(dim: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, dim), dim)
