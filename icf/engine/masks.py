"""From what a model gives to masks. Apart from the metrics, whose library takes seconds to import."""
from __future__ import annotations

import torch
from torch import Tensor


def class_map(scores: Tensor) -> Tensor:
    """Index of the largest score over dim 1, the first one of equals: [N,C,H,W] -> [N,H,W], uint8 up to 256 classes.

    On the CPU a running maximum replaces `argmax`, which is several times slower along a dimension that is not last.
    """
    channels = scores.shape[1]
    if scores.device.type != "cpu" or channels > 256:
        return scores.argmax(1)
    best = scores[:, 0].contiguous().clone()                              # [N,H,W]
    index = torch.zeros(best.shape, dtype=torch.uint8)
    higher = torch.empty(best.shape, dtype=torch.bool)
    for channel in range(1, channels):
        torch.gt(scores[:, channel], best, out=higher)
        torch.maximum(best, scores[:, channel], out=best)
        torch.maximum(index, higher.view(torch.uint8).mul_(channel), out=index)
    return index


def foreground(prediction: Tensor, threshold: float = 0.5) -> Tensor:
    """True where something is predicted: probability above the threshold, or a class index that is not background."""
    return prediction > threshold if prediction.is_floating_point() else prediction != 0
