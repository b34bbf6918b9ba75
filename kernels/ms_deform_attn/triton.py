"""The kernels in Triton: a program owns a block of queries of one image and head, with all their channels."""
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.backend import INTERPRET

TILE = 16384 if INTERPRET else 1024  # queries times channels; the interpreter pays for programs, not for elements
FORWARD_PARTS, BACKWARD_PARTS = (1, 2), (2, 8)  # into which it is divided, in float32 and in float64
PIXELS, PIXEL_QUERIES, PIXEL_CHANNELS = (256, 64, 4096) if INTERPRET else (64, 32, 64)  # where a program owns pixels


@triton.jit
def _axis(reference, which: tl.constexpr, extent, active, R: tl.constexpr, P: tl.constexpr):
    """Scale, base and whole cell of pixel = raw * scale + base + cell - 0.5, as in ms_deform_attn_math.h."""
    if R == 0:
        scale, base, cell = extent, tl.zeros_like(extent), tl.zeros_like(extent)
    else:
        at = tl.load(reference + which, mask=active, other=0) * extent
        cell = tl.floor(at)
        base = at - cell
        scale = tl.zeros_like(at) + 1
        if R == 4:
            scale = tl.load(reference + 2 + which, mask=active, other=0) * extent * 0.5 / P
    return scale, base, cell


@triton.jit
def _locate(coordinates, reference, level_ptr, i, active, ACC: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """Of sample i: rows of the corners, -1 outside of the map, then fractions, coordinates and scales."""
    one = tl.arange(0, 1)  # the interpreter does not combine scalars with blocks
    height, width, start = tl.load(level_ptr + one), tl.load(level_ptr + 1 + one), tl.load(level_ptr + 2 + one)
    x = tl.load(coordinates + 2 * i, mask=active, other=0).to(ACC)
    y = tl.load(coordinates + 2 * i + 1, mask=active, other=0).to(ACC)
    scale_x, base_x, cell_x = _axis(reference, 0, width.to(ACC), active, R, P)
    scale_y, base_y, cell_y = _axis(reference, 1, height.to(ACC), active, R, P)
    floor_x, floor_y = tl.floor(x * scale_x + base_x - 0.5), tl.floor(y * scale_y + base_y - 0.5)
    left, top = floor_x + cell_x, floor_y + cell_y
    touches = active & (left >= -1) & (left < width.to(ACC)) & (top >= -1) & (top < height.to(ACC))
    s = tl.where(touches, x * scale_x - (floor_x + 0.5) + base_x, 0.0)
    t = tl.where(touches, y * scale_y - (floor_y + 0.5) + base_y, 0.0)
    column, line = tl.where(touches, left, 0.0).to(tl.int32), tl.where(touches, top, 0.0).to(tl.int32)
    x0, x1 = touches & (column >= 0), touches & (column + 1 < width)
    y0, y1 = line >= 0, line + 1 < height
    first = start + line * width + column
    rows = (tl.where(x0 & y0, first, -1), tl.where(x1 & y0, first + 1, -1),
            tl.where(x0 & y1, first + width, -1), tl.where(x1 & y1, first + width + 1, -1))
    return rows, s, t, x, y, scale_x, scale_y


@triton.jit
def _corner_weights(s, t, a):
    return (1 - t) * (1 - s) * a, (1 - t) * s * a, t * (1 - s) * a, t * s * a


@triton.jit
def _softmax(weights, active, ACC: tl.constexpr, n: tl.constexpr, R: tl.constexpr):
    """Largest logit and inverse sum of each query."""
    largest = tl.load(weights, mask=active, other=0).to(ACC)
    total = tl.zeros_like(largest)
    if R:
        for i in range(1, n):
            largest = tl.maximum(largest, tl.load(weights + i, mask=active, other=0).to(ACC))
        for i in range(n):
            total += tl.exp(tl.load(weights + i, mask=active, other=0).to(ACC) - largest)
    return largest, 1 / total


@triton.jit
def _weight(weights, i, active, largest, inverse, ACC: tl.constexpr, R: tl.constexpr):
    a = tl.load(weights + i, mask=active, other=0).to(ACC)
    if R:
        a = tl.exp(a - largest) * inverse
    return a


@triton.jit
def _corner(value, row, stride, c, D, ACC: tl.constexpr):
    mask = (row >= 0)[:, None] & (c < D)[None, :]
    return tl.load(value + row.to(tl.int64)[:, None] * stride + c[None, :], mask=mask, other=0).to(ACC)


@triton.jit
def _queries(pid, Q, M, BLOCK_Q: tl.constexpr):
    """Image, head and queries of a program."""
    tiles = tl.cdiv(Q, BLOCK_Q)
    head = (pid // tiles).to(tl.int64)
    return head // M, head % M, (pid % tiles).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)


@triton.jit
def _fwd_kernel(value_ptr, levels_ptr, reference_ptr, coordinates_ptr, weights_ptr, out_ptr, Q, M, D,
                value_b, value_s, value_m, reference_b, reference_q, reference_l, coordinates_b, coordinates_q,
                weights_b, weights_q, ACC: tl.constexpr, R: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
                BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    b, m, q = _queries(tl.program_id(0), Q, M, BLOCK_Q)
    active, c = q < Q, tl.arange(0, BLOCK_D)
    value = value_ptr + b * value_b + m * value_m
    reference = reference_ptr + b * reference_b + q * reference_q
    coordinates = coordinates_ptr + b * coordinates_b + q * coordinates_q + m * (L * P * 2)
    weights = weights_ptr + b * weights_b + q * weights_q + m * (L * P)
    largest, inverse = _softmax(weights, active, ACC, L * P, R)
    out = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    for i in range(L * P):
        level = i // P
        rows, s, t, _, _, _, _ = _locate(coordinates, reference + level * reference_l, levels_ptr + 3 * level, i,
                                         active, ACC, R, P)
        shares = _corner_weights(s, t, _weight(weights, i, active, largest, inverse, ACC, R))
        for k in tl.static_range(4):
            out += shares[k][:, None] * _corner(value, rows[k], value_s, c, D, ACC)
    to = out_ptr + ((b * Q + q) * M + m)[:, None] * D + c[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=active[:, None] & (c < D)[None, :])


@triton.jit
def _bwd_kernel(grad_ptr, value_ptr, levels_ptr, reference_ptr, coordinates_ptr, weights_ptr, grad_value_ptr,
                share_ptr, grad_coordinates_ptr, raw_ptr, grad_weights_ptr, softmax_ptr, S, Q, M, D,
                value_b, value_s, value_m, reference_b, reference_q, reference_l, coordinates_b, coordinates_q,
                weights_b, weights_q, ATOMIC: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
                P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    """All gradients but, where not ATOMIC, that of value. raw holds those of the softmax's results in between."""
    b, m, q = _queries(tl.program_id(0), Q, M, BLOCK_Q)
    active, c = q < Q, tl.arange(0, BLOCK_D)
    value = value_ptr + b * value_b + m * value_m
    reference = reference_ptr + b * reference_b + q * reference_q
    coordinates = coordinates_ptr + b * coordinates_b + q * coordinates_q + m * (L * P * 2)
    weights = weights_ptr + b * weights_b + q * weights_q + m * (L * P)
    largest, inverse = _softmax(weights, active, ACC, L * P, R)
    query, own = (b * Q + q) * M + m, (b * M + m) * Q + q
    grad_value = grad_value_ptr + (b * S * M + m) * D
    if R:
        tl.store(softmax_ptr + 2 * own, largest, mask=active)
        tl.store(softmax_ptr + 2 * own + 1, inverse, mask=active)
    grad = tl.load(grad_ptr + query[:, None] * D + c[None, :], mask=active[:, None] & (c < D)[None, :], other=0).to(ACC)
    mean = tl.zeros((BLOCK_Q,), ACC)
    for level in range(L):
        sum_x, sum_y = tl.zeros((BLOCK_Q,), ACC), tl.zeros((BLOCK_Q,), ACC)
        sum_w, sum_h = tl.zeros((BLOCK_Q,), ACC), tl.zeros((BLOCK_Q,), ACC)
        for i in range(level * P, level * P + P):
            rows, s, t, x, y, scale_x, scale_y = _locate(
                coordinates, reference + level * reference_l, levels_ptr + 3 * level, i, active, ACC, R, P)
            a = _weight(weights, i, active, largest, inverse, ACC, R)
            d0 = tl.sum(grad * _corner(value, rows[0], value_s, c, D, ACC), 1)
            d1 = tl.sum(grad * _corner(value, rows[1], value_s, c, D, ACC), 1)
            d2 = tl.sum(grad * _corner(value, rows[2], value_s, c, D, ACC), 1)
            d3 = tl.sum(grad * _corner(value, rows[3], value_s, c, D, ACC), 1)
            grad_x = a * ((1 - t) * (d1 - d0) + t * (d3 - d2))
            grad_y = a * ((1 - s) * (d2 - d0) + s * (d3 - d1))
            grad_a = (1 - t) * ((1 - s) * d0 + s * d1) + t * ((1 - s) * d2 + s * d3)
            mean += a * grad_a
            sum_x, sum_y, sum_w, sum_h = sum_x + grad_x, sum_y + grad_y, sum_w + grad_x * x, sum_h + grad_y * y
            to = grad_coordinates_ptr + 2 * (query * (L * P) + i)
            tl.store(to, (grad_x * scale_x).to(grad_coordinates_ptr.dtype.element_ty), mask=active)
            tl.store(to + 1, (grad_y * scale_y).to(grad_coordinates_ptr.dtype.element_ty), mask=active)
            tl.store(raw_ptr + query * (L * P) + i, grad_a.to(raw_ptr.dtype.element_ty), mask=active)
            if ATOMIC:
                shares = _corner_weights(s, t, a)
                for k in tl.static_range(4):
                    mask = (rows[k] >= 0)[:, None] & (c < D)[None, :]
                    tl.atomic_add(grad_value + rows[k].to(tl.int64)[:, None] * M * D + c[None, :],
                                  shares[k][:, None] * grad, mask=mask, sem="relaxed")
        if R:
            one = tl.arange(0, 1)
            height, width = tl.load(levels_ptr + 3 * level + one), tl.load(levels_ptr + 3 * level + 1 + one)
            to = share_ptr + (own * L + level) * R
            tl.store(to, sum_x * width.to(ACC), mask=active)
            tl.store(to + 1, sum_y * height.to(ACC), mask=active)
            if R == 4:
                tl.store(to + 2, sum_w * width.to(ACC) * 0.5 / P, mask=active)
                tl.store(to + 3, sum_h * height.to(ACC) * 0.5 / P, mask=active)
    if R:
        tl.debug_barrier()  # other threads may have stored what these read
        for i in range(L * P):
            a = _weight(weights, i, active, largest, inverse, ACC, R)
            at = query * (L * P) + i
            grad_logit = a * (tl.load(raw_ptr + at, mask=active, other=0) - mean)
            tl.store(grad_weights_ptr + at, grad_logit.to(grad_weights_ptr.dtype.element_ty), mask=active)


@triton.jit
def _pixels_kernel(grad_ptr, levels_ptr, reference_ptr, coordinates_ptr, weights_ptr, softmax_ptr, grad_value_ptr,
                   S, Q, M, D, reference_b, reference_q, reference_l, coordinates_b, coordinates_q, weights_b,
                   weights_q, ACC: tl.constexpr, R: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
                   BLOCK_S: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    """The gradient of value without atomics: a program owns pixels and looks at all queries, in order."""
    b, m, pixel = _queries(tl.program_id(0), S, M, BLOCK_S)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_S, BLOCK_D), ACC)
    for start in range(0, Q, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q).to(tl.int64)
        active = q < Q
        reference = reference_ptr + b * reference_b + q * reference_q
        coordinates = coordinates_ptr + b * coordinates_b + q * coordinates_q + m * (L * P * 2)
        weights = weights_ptr + b * weights_b + q * weights_q + m * (L * P)
        own = (b * M + m) * Q + q
        largest = tl.load(softmax_ptr + 2 * own, mask=active & (R > 0), other=0)
        inverse = tl.load(softmax_ptr + 2 * own + 1, mask=active & (R > 0), other=0)
        share = tl.zeros((BLOCK_S, BLOCK_Q), ACC)  # of each query in each pixel
        for i in range(L * P):
            level = i // P
            rows, s, t, _, _, _, _ = _locate(coordinates, reference + level * reference_l, levels_ptr + 3 * level, i,
                                             active, ACC, R, P)
            shares = _corner_weights(s, t, _weight(weights, i, active, largest, inverse, ACC, R))
            for k in tl.static_range(4):
                share += tl.where(rows[k][None, :] == pixel[:, None], shares[k][None, :], 0.0)
        mask = active[:, None] & (c < D)[None, :]
        grad = tl.load(grad_ptr + ((b * Q + q) * M + m)[:, None] * D + c[None, :], mask=mask, other=0).to(ACC)
        total = tl.dot(share, grad, total, input_precision="ieee", out_dtype=ACC)
    to = grad_value_ptr + ((b * S + pixel) * M + m)[:, None] * D + c[None, :]
    tl.store(to, total.to(grad_value_ptr.dtype.element_ty), mask=(pixel < S)[:, None] & (c < D)[None, :])


@lru_cache(maxsize=64)
def _levels(sizes, device):
    """[L, 3] int32 on the device: height, width and first row of each level."""
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    starts = [sum(h * w for h, w in pairs[:level]) for level in range(len(pairs))]
    return torch.tensor([[h, w, start] for (h, w), start in zip(pairs, starts, strict=True)], dtype=torch.int32,
                        device=device)


def _tile(D, parts=1):
    """Queries and channels of a program, for `parts` times the registers per element."""
    width = max(triton.next_power_of_2(D), 16)
    return max(TILE // width // parts, 1), width


def _points(value, sizes, reference, coordinates, weights):
    """Arguments of all kernels: tensors and strides of the points, and compile-time constants."""
    levels = _levels(tuple(sizes), value.device)
    tensors = levels, levels if reference is None else reference, coordinates, weights
    strides = (*((0, 0, 0) if reference is None else reference.stride()[:3]), *coordinates.stride()[:2],
               *weights.stride()[:2])
    return tensors, strides, dict(ACC=tl.float64 if value.dtype == torch.float64 else tl.float32, L=len(sizes) // 2,
                                  R=0 if reference is None else reference.shape[-1], P=weights.shape[-1])


def _forward(value, sizes, reference, coordinates, weights):
    B, Q, M, D = *weights.shape[:3], value.shape[3]
    out = value.new_empty(B, Q, M * D)
    tensors, strides, constants = _points(value, sizes, reference, coordinates, weights)
    BLOCK_Q, BLOCK_D = _tile(D, FORWARD_PARTS[value.dtype == torch.float64])
    if out.numel():
        _fwd_kernel[(B * M * triton.cdiv(Q, BLOCK_Q),)](
            value, *tensors, out, Q, M, D, *value.stride()[:3], *strides, **constants, BLOCK_Q=BLOCK_Q, BLOCK_D=BLOCK_D)
    return out


def _backward(grad, value, sizes, reference, coordinates, weights, deterministic):
    (B, S, M, D), Q, n = value.shape, weights.shape[1], weights.shape[3] * weights.shape[4]
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    tensors, strides, constants = _points(value, sizes, reference, coordinates, weights)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    sums = grad_value if deterministic else torch.zeros(value.shape, dtype=wide, device=value.device)
    grad_coordinates, grad_weights = (t.new_empty(t.shape) for t in (coordinates, weights))
    raw = grad_weights if reference is None or weights.dtype == wide else weights.new_empty(weights.shape, dtype=wide)
    shares = value.new_empty((B, M, Q, len(sizes) // 2, constants["R"]), dtype=wide)
    softmax = value.new_empty((B, M, Q, 2 if reference is not None else 0), dtype=wide)
    BLOCK_Q, BLOCK_D = _tile(D, BACKWARD_PARTS[value.dtype == torch.float64])
    if B and Q and n:
        _bwd_kernel[(B * M * triton.cdiv(Q, BLOCK_Q),)](
            grad, value, *tensors, sums, shares, grad_coordinates, raw, grad_weights, softmax, S, Q, M, D,
            *value.stride()[:3], *strides, ATOMIC=not deterministic, **constants, BLOCK_Q=BLOCK_Q, BLOCK_D=BLOCK_D)
    if deterministic and grad_value.numel():
        channels = min(BLOCK_D, PIXEL_CHANNELS)
        _pixels_kernel[(B * M * triton.cdiv(S, PIXELS), triton.cdiv(D, channels))](
            grad, *tensors, softmax, grad_value, S, Q, M, D, *strides, **constants, BLOCK_S=PIXELS,
            BLOCK_Q=PIXEL_QUERIES, BLOCK_D=channels)
    return sums.to(value.dtype), shares.sum(1), grad_coordinates, grad_weights


def ms_deform_attn(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return _forward(value, sizes, None, locations, weights)


def ms_deform_attn_backward(grad: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor,
                            deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad_value, _, *grads = _backward(grad, value, sizes, None, locations, weights, deterministic)
    return grad_value, *grads


def ms_deform_attn_fused(value: Tensor, sizes: list[int], reference_points: Tensor, offsets: Tensor,
                         logits: Tensor) -> Tensor:
    return _forward(value, sizes, reference_points, offsets, logits)


def ms_deform_attn_fused_backward(grad: Tensor, value: Tensor, sizes: list[int], reference_points: Tensor,
                                  offsets: Tensor, logits: Tensor,
                                  deterministic: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(grad, value, sizes, reference_points, offsets, logits, deterministic)


def _aot():
    strides = dict.fromkeys(("reference_b", "reference_q", "reference_l", "coordinates_b", "coordinates_q", "weights_b",
                             "weights_q"), "i32")
    maps, counts = dict.fromkeys(("value_b", "value_s", "value_m"), "i32"), dict.fromkeys(("Q", "M", "D"), "i32")
    for value, points, R, D in (("fp32", "fp32", 0, 32), ("fp32", "fp32", 2, 32), ("bf16", "bf16", 2, 32),
                                ("fp16", "fp32", 4, 30), ("fp64", "fp64", 4, 71)):
        value, points, wide = f"*{value}", f"*{points}", "*fp64" if value == "fp64" else "*fp32"
        inputs = dict(levels_ptr="*i32", reference_ptr=wide, coordinates_ptr=points, weights_ptr=points)
        constants = dict(ACC=tl.float64 if wide == "*fp64" else tl.float32, R=R, L=3, P=4)
        tiles = (_tile(D, parts[wide == "*fp64"]) for parts in (FORWARD_PARTS, BACKWARD_PARTS))
        forward, backward = (constants | dict(BLOCK_Q=queries, BLOCK_D=channels) for queries, channels in tiles)
        yield _fwd_kernel, dict(value_ptr=value, **inputs, out_ptr=value, **counts, **maps, **strides), forward
        for atomic in (True, False):
            yield _bwd_kernel, dict(
                grad_ptr=value, value_ptr=value, **inputs, grad_value_ptr=wide if atomic else value, share_ptr=wide,
                grad_coordinates_ptr=points, raw_ptr=wide if R else points, grad_weights_ptr=points, softmax_ptr=wide,
                S="i32", **counts, **maps, **strides), dict(ATOMIC=atomic) | backward
        yield _pixels_kernel, dict(grad_ptr=value, **inputs, softmax_ptr=wide, grad_value_ptr=value, S="i32", **counts,
                                   **strides), constants | dict(BLOCK_S=PIXELS, BLOCK_Q=PIXEL_QUERIES,
                                                                BLOCK_D=min(forward["BLOCK_D"], PIXEL_CHANNELS))


AOT = [*_aot()]  # compiled by the tests without a GPU: kernel, types of its arguments, compile-time constants
