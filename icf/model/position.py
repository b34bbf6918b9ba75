"""Where the pixels of a map are: coordinates, and their encoding for attention."""
from __future__ import annotations

import math

import torch
from torch import Tensor


def pixel_centers(h: int, w: int, device: torch.device) -> Tensor:
    """x and y of the centres of an h x w map, row by row, in 0..1: [h*w, 2] float32."""
    y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (h, w))
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).flatten(0, 1)


def sine_position(h: int, w: int, dim: int, device: torch.device) -> Tensor:
    """Sines and cosines of the normalised y (first half) and x of each pixel, as DETR's: [h*w, dim] float32."""
    wave = 10000 ** (-4 * torch.arange(dim // 4, device=device) / dim)                                  # [dim/4]
    angles = pixel_centers(h, w, device).flip(-1)[..., None] * (2 * math.pi) * wave                   # [h*w, 2, dim/4]
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
