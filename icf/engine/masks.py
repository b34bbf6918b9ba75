"""From what a model gives to masks, to files and back. Apart from the metrics, whose library is slow to import."""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from icf.data import Batch
from icf.data.avsbench import binary_mask, class_palette, read_label, semantic_mask
from icf.data.transforms import resize_label
from icf.files import write_atomic


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


def read_mask(path: Path, classes: int, size: int) -> Tensor:
    """A saved mask as uint8 [size,size]: class indices, or 0/1 where `classes` is 0."""
    values = read_label(path)
    mask = semantic_mask(values, classes, path) if classes else binary_mask(values)
    return resize_label(mask, size)


def write_masks(folder: Path, masks: Tensor, batch: Batch, classes: Sequence[str], threshold: float) -> None:
    """`folder/<clip>/<frame>.png` for every real frame: 0/255, or class indices with the palette of AVSBench."""
    masks = (masks if classes else foreground(masks, threshold) * 255).to("cpu", torch.uint8).numpy()
    palette = class_palette(len(classes)).tobytes() if classes else None
    for clip, name in enumerate(batch.names):
        for frame in batch.frame_mask[clip].nonzero().flatten().tolist():
            image = Image.fromarray(masks[clip, frame])
            if palette:
                image.putpalette(palette)
            write_atomic(folder / name / f"{frame}.png", partial(image.save, format="PNG"))
