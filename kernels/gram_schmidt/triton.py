import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.backend import INTERPRET

TILE = 32768 if INTERPRET else 1024  # elements of a program; the interpreter pays for programs, not for elements
EPS = tl.constexpr(1.1920929e-07)  # of float32
LEAST = tl.constexpr(1.1754944e-38)  # the least normal float32
SMALL, LARGE = tl.constexpr(8.3e-25), tl.constexpr(4.8e24)  # squares between need no scaling


@triton.jit
def _with_sign(x, word):
    return (x.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _gaussian_pair(w0, w1):
    """Box-Muller with the polynomials of csrc/gram_schmidt/gram_schmidt_math.h, so that all backends agree."""
    u = ((w0 >> 8) | 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - exponent * 0x800000).to(tl.float32, bitcast=True) - 1.0
    p = 0.08722349 * m - 0.14366840
    p = p * m + 0.14952268
    p = p * m - 0.16562393
    p = p * m + 0.19956833
    p = p * m - 0.25002074
    p = p * m + 0.33334187
    p = p * m - 0.49999988
    p = p * m + 1.0
    radius = tl.sqrt(-0.69314718 * exponent.to(tl.float32) - p * m)
    y = ((w1 << 2).to(tl.int32, bitcast=True) >> 8).to(tl.float32) * 9.362675e-08  # pi/4 2^-23
    t = y * y
    s = y * (((-1.9462112e-4 * t + 8.331585e-3) * t - 0.16666637) * t + 1.0)
    c = ((-1.3585909e-3 * t + 4.1655026e-2) * t - 0.49999857) * t + 1.0
    return _with_sign(radius * (c - s), w1), _with_sign(radius * (c + s), w1 << 1)


@triton.jit
def _interleave(x0, x1, x2, x3, R: tl.constexpr, N: tl.constexpr):
    """[R, N / 4] each to [R, N], x0 to x3 in turn."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (R, N))


@triton.jit
def _words(seed_ptr, row, R: tl.constexpr, N: tl.constexpr, STREAM: tl.constexpr):
    """The words of the first N Philox counters of rows [R] in a stream, four of [R, N]."""
    c0 = tl.broadcast_to(tl.arange(0, N)[None, :], (R, N)).to(tl.uint32)
    c1 = tl.broadcast_to((row & 0xFFFFFFFF).to(tl.uint32)[:, None], (R, N))
    c2 = tl.broadcast_to((row >> 32).to(tl.uint32)[:, None], (R, N))
    return tl.philox(tl.load(seed_ptr), c0, c1, c2, tl.zeros_like(c0) + STREAM, 7)


@triton.jit
def _noise(noise_ptr, row, column, mask, d, KIND: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """Noise of rows [R]: 0 Gaussian and 1 signs of the seed at noise_ptr, or 2 what lies there; zero beyond d."""
    if KIND == 0:
        w0, w1, w2, w3 = _words(noise_ptr, row, R, D // 4, 0)
        x0, x1 = _gaussian_pair(w0, w1)
        x2, x3 = _gaussian_pair(w2, w3)
        x = _interleave(x0, x1, x2, x3, R, D)
    elif KIND == 1:
        w0, w1, w2, w3 = _words(noise_ptr, row, R, D // 128, 0)
        words = _interleave(w0, w1, w2, w3, R, D // 32)
        bits = (words[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1
        x = tl.reshape(1.0 - 2.0 * bits.to(tl.float32), (R, D))
    else:
        x = tl.load(noise_ptr + row[:, None] * d + column, mask=mask, other=0).to(tl.float32)
    return tl.where(mask, x, 0.0)


@triton.jit
def _scaled(x):
    """Rows whose squares would under- or overflow, scaled to a largest element of 1; the squares and the scales."""
    square, largest = tl.sum(x * x, 1), tl.max(tl.abs(x), 1)
    out_of_range = ((square >= SMALL) & (square <= LARGE)) == 0
    possible = (largest > 0) & (largest <= 3.4028234e38)
    scale = tl.where(out_of_range & possible, 1.0 / tl.maximum(largest, LEAST), 1.0)
    x = x * scale[:, None]
    return x, tl.sum(x * x, 1), scale


@triton.jit
def _project(p, z, zz, KIND: tl.constexpr):
    """p = r - kappa z, projected where less than a quarter of its square is orthogonal to z; r.r, kappa, p.p, p.z."""
    rr = tl.sum(p * p, 1)
    if KIND == 2:
        p, rr, _ = _scaled(p)
    pz = tl.sum(p * z, 1)
    needed = (zz > 0) & (rr * zz - pz * pz < rr * zz / 4)
    kappa = tl.where(needed, pz / tl.where(needed, zz, 1.0), 0.0)
    p = p - kappa[:, None] * z
    return p, rr, kappa, tl.sum(p * p, 1), tl.sum(p * z, 1)


@triton.jit
def _terms(ratio, zz, pz, pp, rr, scale):
    """a, b, 1/|z|, 1/n, p.z/|z| and |z| of z' = a z/|z| + b (p - e z/|z|) / n."""
    rho = tl.where(ratio < 0, 0.0, tl.where(ratio > 1, 1.0, ratio))
    inv_z = tl.where(zz == 0, 0.0, 1.0 / tl.sqrt(tl.where(zz == 0, 1.0, zz)))
    e = pz * inv_z
    nn = pp - e * e
    parallel = nn <= rr * (64 * EPS * EPS)  # the tensor first: Triton 3.8 interprets constexpr * tensor wrongly
    inv_n = tl.where(parallel, 0.0, 1.0 / tl.sqrt(tl.where(parallel, 1.0, nn)))
    return tl.sqrt(1.0 - rho), tl.sqrt(rho), inv_z, inv_n, e, zz * inv_z / scale


@triton.jit
def _fwd_kernel(z_ptr, ratio_ptr, noise_ptr, out_ptr, rows, shared, inner, d,
                KIND: tl.constexpr, RESTORE_NORM: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)  # rows of z
    column = tl.arange(0, D)[None, :]
    mask = (i < rows)[:, None] & (column < d)
    z, zz, scale = _scaled(tl.load(z_ptr + i[:, None] * d + column, mask=mask, other=0).to(tl.float32))
    for k in range(shared):
        row = (i // inner * shared + k) * inner + i % inner
        p = _noise(noise_ptr, row, column, mask, d, KIND, R, D)
        p, rr, kappa, pp, pz = _project(p, z, zz, KIND)
        ratio = tl.load(ratio_ptr + row, mask=i < rows, other=0.5)
        a, b, inv_z, inv_n, e, norm = _terms(ratio, zz, pz, pp, rr, scale)
        z_coef, p_coef = (a - b * e * inv_n) * inv_z, b * inv_n
        if RESTORE_NORM:
            z_coef, p_coef = z_coef * norm, p_coef * norm
        out = z_coef[:, None] * z + p_coef[:, None] * p
        tl.store(out_ptr + row[:, None] * d + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(grad_ptr, z_ptr, ratio_ptr, noise_ptr, grad_z_ptr, grad_ratio_ptr, rows, shared, inner, d,
                KIND: tl.constexpr, RESTORE_NORM: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)  # rows of z
    column = tl.arange(0, D)[None, :]
    mask = (i < rows)[:, None] & (column < d)
    z, zz, scale = _scaled(tl.load(z_ptr + i[:, None] * d + column, mask=mask, other=0).to(tl.float32))
    total = tl.zeros((R, D), tl.float32)
    for k in range(shared):
        row = (i // inner * shared + k) * inner + i % inner
        p = _noise(noise_ptr, row, column, mask, d, KIND, R, D)
        p, rr, kappa, pp, pz = _project(p, z, zz, KIND)
        g = tl.load(grad_ptr + row[:, None] * d + column, mask=mask, other=0).to(tl.float32)
        ratio = tl.load(ratio_ptr + row, mask=i < rows, other=0.5)
        a, b, inv_z, inv_n, e, norm = _terms(ratio, zz, pz, pp, rr, scale)
        g_unit = tl.sum(g * z, 1) * inv_z
        gu = (tl.sum(g * p, 1) - e * g_unit) * inv_n
        c = kappa * zz * inv_z + e
        keep, f = a - b * c * inv_n, b * inv_n * (c * inv_n * gu - g_unit)
        size = inv_z * scale
        if RESTORE_NORM:
            size = tl.where(zz == 0, 0.0, 1.0)
        z_coef = -(keep * g_unit + e * f) * inv_z * size
        inside = (ratio > 0) & (ratio < 1)
        grad_ratio = (gu / tl.where(inside, b, 1.0) - g_unit / tl.where(inside, a, 1.0)) / 2
        if RESTORE_NORM:
            z_coef += (a * g_unit + b * gu) * inv_z
            grad_ratio *= norm
        total += (keep * size)[:, None] * g + z_coef[:, None] * z + (f * size)[:, None] * p
        outside = (ratio <= 0) | (ratio >= 1)
        tl.store(grad_ratio_ptr + row, tl.where(outside, 0.0, grad_ratio), mask=i < rows)
    tl.store(grad_z_ptr + i[:, None] * d + column, total.to(grad_z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _hadamard(row, column):
    """Elements of the Hadamard matrix: the parity of the bits that row and column share."""
    x = row & column
    x = x ^ (x >> 16)
    x = x ^ (x >> 8)
    x = x ^ (x >> 4)
    x = x ^ (x >> 2)
    x = x ^ (x >> 1)
    return 1.0 - 2.0 * (x & 1).to(tl.float32)


@triton.jit
def _directions_kernel(z_ptr, seed_ptr, out_ptr, k, d, K: tl.constexpr, D: tl.constexpr):
    """Directions [K] of a row of z, see README.md; each program reflects for itself."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    i = tl.program_id(1) * K + tl.arange(0, K)[:, None]
    column = tl.arange(0, D)[None, :]
    z, zz, _ = _scaled(tl.load(z_ptr + row[:, None] * d + column, mask=column < d, other=0).to(tl.float32))
    unit = z * tl.where(zz == 0, 0.0, 1.0 / tl.sqrt(tl.where(zz == 0, 1.0, zz)))[:, None]
    signs = _noise(seed_ptr, row, column, column < d, d, 1, 1, D) / tl.sqrt(d.to(tl.float32))
    first, step, _, _ = _words(seed_ptr, row, 1, 1, 1)
    last = (d - 1).to(tl.uint32)
    q0 = _hadamard(first & last, column.to(tl.uint32)) * signs
    q = _hadamard((first + (step | 1) * (i + 1).to(tl.uint32)) & last, column.to(tl.uint32)) * signs
    cosine0, cosine = tl.sum(q0 * unit, 1), tl.sum(q * unit, 1)
    w = tl.where((cosine0 > 0)[:, None], -q0, q0) - unit
    out = q + (cosine / (1.0 + tl.abs(cosine0)))[:, None] * w
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row[:, None] * k + i) * d + column, out, mask=(i < k) & (column < d))


def _tile(d, kind):
    """Rows and columns of a program: the columns a power of two, and whole Philox counters."""
    width = max(triton.next_power_of_2(d), 128 if kind == 1 else 16)
    return max(1, TILE // width), width


def _launch(kernel, tensors, z, options):
    kind, shared, inner, restore_norm = options
    d = z.shape[-1]
    rows, (R, D) = z.numel() // d, _tile(d, kind)
    if rows:
        kernel[(triton.cdiv(rows, R),)](*tensors, rows, shared, inner, d, KIND=kind, RESTORE_NORM=bool(restore_norm),
                                        R=R, D=D, num_warps=max(4, D // 512))


def orthogonal_blend(z: Tensor, ratio: Tensor, noise: Tensor, options: list[int]) -> Tensor:
    out = z.new_empty((*ratio.shape, z.shape[-1]))
    _launch(_fwd_kernel, (z, ratio, noise, out), z, options)
    return out


def orthogonal_blend_backward(grad: Tensor, z: Tensor, ratio: Tensor, noise: Tensor,
                              options: list[int]) -> tuple[Tensor, Tensor]:
    grad_z, grad_ratio = torch.empty_like(z), torch.empty_like(ratio)
    _launch(_bwd_kernel, (grad, z, ratio, noise, grad_z, grad_ratio), z, options)
    return grad_z, grad_ratio


def orthogonal_directions(z: Tensor, seed: Tensor, k: int) -> Tensor:
    d = z.shape[-1]
    out, rows, D = z.new_empty((*z.shape[:-1], k, d)), z.numel() // d, max(d, 128)
    if out.numel():
        K = min(triton.next_power_of_2(k), max(1, 4 * TILE // D))
        _directions_kernel[(rows, triton.cdiv(k, K))](z, seed, out, k, d, K=K, D=D, num_warps=max(4, D // 512))
    return out


def _aot():
    sizes = dict(rows="i64", shared="i64", inner="i64", d="i32")
    for kind, d, dtype in ((0, 256, "bf16"), (1, 256, "bf16"), (2, 32, "fp16"), (0, 1024, "fp32")):
        (R, D), noise = _tile(d, kind), "*fp32" if kind == 2 else "*i64"
        constants = dict(KIND=kind, RESTORE_NORM=d == 32, R=R, D=D)
        z, wide = f"*{dtype}", "*fp32"
        yield _fwd_kernel, dict(z_ptr=z, ratio_ptr=wide, noise_ptr=noise, out_ptr=z, **sizes), constants
        yield _bwd_kernel, dict(grad_ptr=z, z_ptr=z, ratio_ptr=wide, noise_ptr=noise, grad_z_ptr=z, grad_ratio_ptr=wide,
                                **sizes), constants
    yield _directions_kernel, dict(z_ptr="*fp32", seed_ptr="*i64", out_ptr="*fp32", k="i32", d="i32"), dict(K=16, D=256)


AOT = [*_aot()]  # compiled by the tests without a GPU: kernel, types of its arguments, compile-time constants
