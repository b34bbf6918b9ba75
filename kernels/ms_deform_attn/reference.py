"""The definition, in plain PyTorch. Every backend is held to it.

Made of gathers rather than `grid_sample`: differentiable any number of times, exportable, and exact about what lies
outside of a map.
"""
import math

import torch
from torch import Tensor


def ms_deform_attn(value: Tensor, spatial_shapes, level_start_index, sampling_locations: Tensor,
                   attention_weights: Tensor, im2col_step: int | None = None) -> Tensor:
    dtype = _compute_dtype(value, sampling_locations, attention_weights)
    pixels = sampling_locations.to(dtype) * _sizes(spatial_shapes, value.device, dtype) - 0.5  # [B, Q, M, L, P, 2]
    return _attend(value, spatial_shapes, pixels, attention_weights.to(dtype))


def ms_deform_attn_fused(value: Tensor, spatial_shapes, reference_points: Tensor, sampling_offsets: Tensor,
                         attention_logits: Tensor) -> Tensor:
    (B, _, M, _), L, Q = value.shape, len(spatial_shapes), sampling_offsets.shape[1]
    P = math.prod(sampling_offsets.shape[2:]) // (M * L * 2)
    dtype = _compute_dtype(value, reference_points, sampling_offsets, attention_logits)
    sizes = _sizes(spatial_shapes, value.device, dtype)  # [L, 1, 2]
    reference = reference_points.to(dtype)[:, :, None, :, None]  # [B, Q, 1, L, 1, 2 or 4]
    offsets = sampling_offsets.to(dtype).reshape(B, Q, M, L, P, 2)
    if reference.shape[-1] == 4:
        offsets = offsets * (reference[..., 2:] * sizes * (0.5 / P))  # in halves of the box
    weights = attention_logits.to(dtype).reshape(B, Q, M, L * P).softmax(-1).view(B, Q, M, L, P)
    return _attend(value, spatial_shapes, reference[..., :2] * sizes + offsets - 0.5, weights)


def _compute_dtype(*tensors):
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _sizes(spatial_shapes, device, dtype):
    return torch.tensor([[[w, h]] for h, w in spatial_shapes], device=device, dtype=dtype)  # [L, 1, 2]


def _attend(value, spatial_shapes, pixels, weights):
    """Sum over levels and points of weight * bilinear sample. `pixels` [B, Q, M, L, P, 2] are (x, y), integer at the
    centre of a pixel; what is outside of the map, or not a number, is zero."""
    B, S, M, D = value.shape
    Q, P = weights.shape[1], weights.shape[-1]
    rows = value.to(weights.dtype).reshape(B * S * M, D)
    b, m = torch.arange(B, device=value.device).view(-1, 1, 1), torch.arange(M, device=value.device).view(-1, 1)
    out, start = 0, 0
    for level, (H, W) in enumerate(spatial_shapes):
        size = torch.tensor([W, H], device=value.device)
        xy = pixels[:, :, :, level].transpose(1, 2).reshape(B, M, Q * P, 2)
        touches = ((xy >= -1) & (xy < size)).all(-1, keepdim=True)
        xy = torch.where(touches, xy, -2)
        low = xy.detach().floor()
        fraction = xy - low
        weight = weights[:, :, :, level].transpose(1, 2).reshape(B, M, Q * P)
        for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
            corner = torch.tensor(corner, device=value.device)
            x, y = (low.long() + corner).unbind(-1)
            inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
            place = (b * S + torch.where(inside, start + y * W + x, 0)) * M + m  # [B, M, Q*P]
            row = rows.index_select(0, place.flatten()).view(B, M, Q * P, D)
            share = torch.where(corner.bool(), fraction, 1 - fraction).prod(-1) * weight
            sample = torch.where(inside[..., None], row, 0) * share[..., None]
            out = out + sample.view(B, M, Q, P, D).sum(3)
        start += H * W
    return out.transpose(1, 2).reshape(B, Q, M * D).to(value.dtype)
