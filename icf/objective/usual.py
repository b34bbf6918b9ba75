"""What features usually are: means, and means of squares, that follow the batches of training."""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTUM = 0.1


@torch.no_grad()
def follow(usual: Tensor, x: Tensor, real: Tensor | None) -> Tensor:
    """Move running means [2,k], of x [B,N,k] and of its square, towards those of a batch, the clips of all processes
    together; the first is taken as is. What is not finite, or has no finite square, is left out; returns how many of
    the B N of all processes are."""
    finite = x.square().isfinite().all(-1, keepdim=True)                                        # [B, N, 1]
    real = torch.ones_like(finite) if real is None else real[..., None].expand(len(x), -1, 1)
    weight, x = (real & finite).to(x.dtype), x.where(finite, 0)
    ones, lost = torch.ones_like(x), (real & ~finite).to(x.dtype).expand_as(x)
    sums = torch.stack([*((y * weight).sum((0, 1)) for y in (x, x.square(), ones)), lost.sum((0, 1))])  # [4, k]
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    now = torch.where(sums[2] > 0, sums[:2] / sums[2].clamp(min=1), usual)
    now = torch.where(now.isfinite(), now, usual)                           # large ones may still overflow together
    usual.lerp_(now, torch.where(usual.any(), MOMENTUM, 1.0))
    return sums[3, 0]
