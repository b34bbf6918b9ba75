"""Inputs, and a second definition, for tests and benchmarks.

Shapes are (B, Q, M, D, P, H1, W1, H2, W2, ..., where the points are).

Gradients jump where a point crosses the centre line of pixels, so the points of tests keep a quarter of a pixel away.
"""
from functools import partial

import torch
from torch.nn.functional import grid_sample

from .._common.testing import Cases


def make_inputs(shape, dtype, device, fused=False):
    B, Q, M, D, P, *sizes, points = shape
    sizes = list(zip(sizes[::2], sizes[1::2], strict=True))
    S, L = sum(h * w for h, w in sizes), len(sizes)
    generator = torch.Generator().manual_seed(0)
    rand, randn = (partial(f, generator=generator, dtype=torch.float64) for f in (torch.rand, torch.randn))
    extent = torch.tensor([[[w, h]] for h, w in sizes], dtype=torch.float64)  # [L, 1, 2]
    value = randn(B, S, M, D)
    logits = randn(B, Q, M, L, P)
    reference = rand(B, Q, 1, 1, 1, 2)
    if points == "raster":  # as in an encoder: every pixel a query, its points within a few pixels
        centres = [torch.stack([(x + 0.5) / w, (y + 0.5) / h], -1) for h, w in sizes
                   for y, x in [(i.flatten() for i in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))]]
        reference = torch.cat(centres).double()[None, :Q, None, None, None].expand(B, -1, -1, -1, -1, -1)
        pixels = reference * extent - 0.5 + 2 * randn(B, Q, M, L, P, 2)
    elif points == "uniform":
        pixels = rand(B, Q, M, L, P, 2) * extent - 0.5
    else:  # "apart" from where the gradient jumps; some of them, and half of some, are outside
        pixels = (rand(B, Q, M, L, P, 2) * (extent + 2) - 1.5).floor() + 0.25 + 0.5 * rand(B, Q, M, L, P, 2)
    if not fused:
        tensors = (pixels + 0.5) / extent, logits.flatten(-2).softmax(-1).view_as(logits)
    else:
        reference = reference.to(dtype).double()
        offsets = pixels + 0.5 - reference * extent
        reference = reference[:, :, 0].expand(-1, -1, L, -1, -1)[..., 0, :]  # [B, Q, L, 2]
        if points == "boxes":
            box = (0.3 + rand(B, Q, L, 2)).to(dtype).double()
            offsets = offsets * (2 * P) / (box[:, :, None, :, None] * extent)
            reference = torch.cat([reference, box], -1)
        tensors = reference, offsets.flatten(2), logits.flatten(2)
    value, first, *tensors = (tensor.to(device, dtype).contiguous() for tensor in (value, *tensors))
    return value, sizes, *([first] if fused else [None, first]), *tensors


def by_grid_sample(value, sizes, _, locations, weights):
    """The composition that Deformable DETR publishes: what those use who have no kernel."""
    (B, _, M, D), (Q, L, P) = value.shape, locations.shape[1:2] + locations.shape[3:5]
    maps, samples = value.split([h * w for h, w in sizes], 1), []
    for level, (h, w) in enumerate(sizes):
        image = maps[level].flatten(2).transpose(1, 2).reshape(B * M, D, h, w)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # [B*M, Q, P, 2]
        samples.append(grid_sample(image, grid, padding_mode="zeros", align_corners=False))  # [B*M, D, Q, P]
    weights = weights.transpose(1, 2).reshape(B * M, 1, Q, L * P)
    return (torch.stack(samples, -2).flatten(-2) * weights).sum(-1).view(B, M * D, Q).transpose(1, 2)


def composed(value, sizes, points, offsets, logits):
    """The arguments of the plain operator for those of the fused one, as Deformable DETR composes them."""
    (B, Q, M), n, L = (*offsets.shape[:2], value.shape[2]), points.shape[-1], len(sizes)
    offsets = offsets.reshape(B, Q, M, L, -1, 2)
    P = offsets.shape[4]
    extent = torch.tensor([[[w, h]] for h, w in sizes], device=value.device, dtype=value.dtype)
    points = points[:, :, None, :, None]
    scale = 1 / extent if n == 2 else points[..., 2:] * 0.5 / P
    weights = logits.reshape(B, Q, M, -1).softmax(-1).view(B, Q, M, L, P)
    return value, sizes, None, points[..., :2] + offsets * scale, weights


SHAPES = [(2, 2, 2, 2, 2, 3, 2, 1, 2), (1, 5, 8, 32, 4, 6, 5, 3, 4, 2, 2), (2, 7, 1, 71, 1, 5, 4),
          (3, 9, 3, 40, 3, 1, 1, 1, 5, 7, 1), (1, 67, 2, 64, 4, 8, 8, 4, 4), (2, 2, 2, 40, 2, 7, 8),
          (2, 0, 2, 8, 2, 3, 3), (0, 3, 2, 8, 2, 3, 3)]
LEVELS = (28, 28, 14, 14, 7, 7)  # of a frame of 224 x 224, at strides 8, 16, 32
DETR = (100, 167, 50, 84, 25, 42, 13, 21)  # of an image of 800 x 1333
BENCHMARKS = {
    **{f"encoder-{B}-{points}": (B, 1029, 8, 32, 4, *LEVELS, points)
       for B in (5, 40) for points in ("uniform", "raster")},
    "detr-encoder": (1, 22223, 8, 32, 4, *DETR, "raster"),
    "detr-decoder": (1, 300, 8, 32, 4, *DETR, "uniform"),
}
CASES = {
    "ms_deform_attn": Cases(make_inputs, [(*shape, "apart") for shape in SHAPES], BENCHMARKS),
    "ms_deform_attn_fused": Cases(partial(make_inputs, fused=True),
                                  [(*shape, points) for shape in SHAPES for points in ("apart", "boxes")], BENCHMARKS),
}
