"""Features in standard deviations from what they usually are."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from icf.objective.usual import follow

FLOOR = 0.01


class Standardise(nn.Module):
    """Each of `dim` features minus its usual mean, over its usual deviation, both learned while training.

    The features of a network without training are alike, whatever it hears: those of two sounds of the toy have a
    cosine of .95, so what tells them apart is small beside what they share. A LayerNorm does not see the difference.
    A feature that hardly moves is not blown up: to each variance is added `FLOOR` times their mean.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("usual", torch.zeros(2, dim))
        self.register_buffer("left_out", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor, learn: bool = False) -> Tensor:
        """x: [N,dim]; learn: in training, what is usual follows x."""
        if learn and self.training:
            self.left_out += follow(self.usual, x.detach().float()[None], None)
        mean, square = self.usual
        variance = (square - mean.square()).clamp(min=0)
        return (x - mean) * (variance + FLOOR * variance.mean()).clamp(min=1e-12).rsqrt()
