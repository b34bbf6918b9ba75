"""Sizes and random changes of pictures and their labels."""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from icf.data import IGNORE

FILL = 128  # grey that frames are padded with, where labels are ignored


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any kind in RGB, 8 bits a channel; Pillow by itself makes grey of 16 bits white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")


def resize_frame(image: Image.Image, size: int, crop: bool = False) -> Tensor:
    """A picture as [3,size,size] uint8 RGB, bilinear with anti-aliasing; `crop` keeps the aspect ratio and cuts out the
    middle, otherwise the picture is squeezed."""
    width, height = _target(image.size, size, crop)
    image.draft("RGB", (width, height))  # a JPEG four times as large is decoded at half its size, twice as fast
    image = to_rgb(image).resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)[_middle(height, size), _middle(width, size)]).permute(2, 0, 1).contiguous()


def resize_label(label: np.ndarray, size: int, crop: bool = False) -> Tensor:
    """A label [H,W] uint8 as [size,size], by the nearest pixel, cut like its frame."""
    width, height = _target(label.shape[::-1], size, crop)
    image = Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(image)[_middle(height, size), _middle(width, size)])


def _target(source: tuple[int, int], size: int, crop: bool) -> tuple[int, int]:
    """Width and height to resize to: square, or with `size` for the shorter edge."""
    return tuple(round(edge * size / min(source)) for edge in source) if crop else (size, size)


def _middle(edge: int, size: int) -> slice:
    start = (edge - size) // 2
    return slice(start, start + size)


def flip(frames: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Left and right exchanged in half of the clips. frames: [T,3,S,S]; masks: [T,S,S]; generator: decides."""
    return (frames.flip(-1), masks.flip(-1)) if torch.rand((), generator=generator) < 0.5 else (frames, masks)


def combo(frames: Tensor, masks: Tensor, generator: torch.Generator, scale: bool) -> tuple[Tensor, Tensor]:
    """The augmentation of COMBO-AVS: flip and colour, and for S4 and MS3 a random `scale` of 0.5 to 2 with a crop.

    Args:
        frames: [T,3,S,S] uint8; all are changed alike.
        masks: [T,S,S] uint8.
        generator: decides.
        scale: where the scaled picture is smaller, frames are filled up with grey and masks with `IGNORE`.
    """
    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    if scale:
        frames, masks = _scale_and_crop(frames, masks, uniform)
    frames, masks = flip(frames, masks, generator)
    return _colour(frames, uniform), masks


def _scale_and_crop(frames: Tensor, masks: Tensor, uniform) -> tuple[Tensor, Tensor]:
    """Resize by 0.5 to 2; cut out a random window of the original size, or fill up at the right and the bottom."""
    size = frames.shape[-1]
    scaled = max(1, round(size * uniform(0.5, 2.0)))
    frames = F.interpolate(frames, (scaled, scaled), mode="bilinear", antialias=True)
    masks = F.interpolate(masks[:, None], (scaled, scaled), mode="nearest-exact")[:, 0]
    if scaled < size:
        missing = (0, size - scaled, 0, size - scaled)
        return F.pad(frames, missing, value=FILL), F.pad(masks, missing, value=IGNORE)
    top, left = (min(int(uniform(0, scaled - size + 1)), scaled - size) for _ in range(2))
    window = (..., slice(top, top + size), slice(left, left + size))
    return frames[window], masks[window]


def _colour(frames: Tensor, uniform) -> Tensor:
    """Brightness, contrast, saturation and hue, each with probability one half, as SSD does."""
    from torchvision.transforms.v2 import functional as tv

    if uniform(0, 1) < 0.5:
        frames = (frames.float() + uniform(-32, 32)).round().clamp(0, 255).to(torch.uint8)
    changes = ((tv.adjust_contrast, 0.5, 1.5), (tv.adjust_saturation, 0.5, 1.5), (tv.adjust_hue, -0.05, 0.05))
    for change, low, high in changes:
        if uniform(0, 1) < 0.5:
            frames = change(frames, uniform(low, high))
    return frames
