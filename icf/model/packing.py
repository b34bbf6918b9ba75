"""Clips of different lengths as one batch of their real frames, and what padded frames come out as."""
from __future__ import annotations

import torch
from torch import Tensor

SILENT = -20.0
"""Logit of a pixel of a padded frame."""


class Packing:
    """The real frames of B clips of T frames: [B,T,...] to [N,...] and back; free where all frames are real.

    Args:
        real: [N] their places among the B*T, ascending.
        frame_mask: [B,T] bool, the same as a mask.
    """

    def __init__(self, real: Tensor, frame_mask: Tensor):
        self.shape, self.real = frame_mask.shape, real
        self.mask = None if real.shape[0] == frame_mask.numel() else frame_mask

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.mask is None else x.flatten(0, 1)[self.real]

    def unpack(self, x: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        """Frames that are not real are `fill`."""
        if self.mask is not None:
            out = x.new_empty(self.mask.numel(), *x.shape[1:])
            out.copy_(fill) if isinstance(fill, Tensor) else out.fill_(fill)
            x = out.index_copy(0, self.real, x)
        return x.unflatten(0, self.shape)

    def find(self, frames: Tensor) -> Tensor:
        """Places among the N packed frames of real frames, given by their places among the B*T."""
        return frames if self.mask is None else torch.searchsorted(self.real, frames)


def background(classes: int) -> Tensor:
    """What a pixel of a padded frame comes out as, [K,1,1]."""
    value = [SILENT] if classes == 1 else [1.0] + [0.0] * (classes - 1)
    return torch.tensor(value)[:, None, None]
