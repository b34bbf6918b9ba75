"""The kernels in Triton. Jacobi walks over columns in memory, a block of pairs wide: registers cannot be indexed."""
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 128  # features at a time
PAIRS = 32  # pairs per program, one to a lane
TILE = 32  # rows and columns of the cross-Gram matrix per program
SWEEPS = 12
SPECTRAL = {"plain": 0, "smooth": 1, "entropic": 2}


@triton.jit
def _valid(ptr, MASKED: tl.constexpr):
    """1 or 0 for a frame, as a block of one: the interpreter does not combine scalars with blocks."""
    return tl.load(ptr + tl.arange(0, 1)).to(tl.int32) if MASKED else tl.full([1], 1, tl.int32)


@triton.jit
def _moments_kernel(frames_ptr, mask_ptr, mean_ptr, factor_ptr, B, T, d, inner, row_stride, MASKED: tl.constexpr,
                    BLOCK: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    factor_ptr += s // B * (T - 1) * B * d + s % B * inner
    count = tl.zeros([1], tl.int32)
    for t in range(T):
        count += _valid(mask_ptr + s * T + t, MASKED)
    total = tl.maximum(count, 1).to(tl.float32)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    base = tl.zeros([BLOCK], tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    before = tl.zeros([1], tl.int32)
    for t in range(T):
        valid = _valid(mask_ptr + s * T + t, MASKED)
        frame = tl.load(frames_ptr + (s * T + t) * d + c, mask=(c < d) & (valid > 0), other=0).to(tl.float32)
        base = tl.where((valid > 0) & (before == 0), frame, base)  # exact zeros in a static clip
        change = tl.where(valid > 0, frame - base, 0.0)
        scale = 1 / tl.sqrt(tl.maximum(before * (before + 1), 1).to(tl.float32) * total)
        row = tl.where((valid > 0) & (before > 0), scale * (summed - before.to(tl.float32) * change), 0.0)
        tl.store(factor_ptr + (t - 1) * row_stride + c, row, mask=(c < d) & (t > 0))
        summed += change
        before += valid
    tl.store(mean_ptr + s * d + c, base + summed / total, mask=c < d)


@triton.jit
def _entropy_kernel(factor_ptr, mask_ptr, trace_ptr, entropy_ptr, inverse_ptr, eps, B, T, d, inner, row_stride,
                    MASKED: tl.constexpr, ENTROPY: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    m = T - 1
    factor_ptr += s // B * m * B * d + s % B * inner
    count = tl.zeros([1], tl.int32)
    for t in range(T):
        count += _valid(mask_ptr + s * T + t, MASKED)
    r = tl.arange(0, M)
    gram = tl.zeros([M, M], tl.float32)
    for start in range(0, d, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(factor_ptr + r[:, None] * row_stride + c[None, :], mask=(r[:, None] < m) & (c[None, :] < d),
                    other=0)
        gram += tl.dot(x, tl.trans(x), input_precision="ieee")
    diagonal = r[:, None] == r[None, :]
    trace = tl.sum(tl.sum(tl.where(diagonal, gram, 0.0), 1), 0)
    tl.store(trace_ptr + s, trace)
    log_det = tl.zeros([1], tl.float64)
    freedom = tl.maximum(count - 1, 1).to(tl.float32)
    if ENTROPY:
        matrix = gram.to(tl.float64) / eps + diagonal.to(tl.float64)
        for k in range(m):  # inversion in place without pivoting
            column = tl.sum(tl.where(r[None, :] == k, matrix, 0.0), 1)[:, None]
            row = tl.sum(tl.where(r[:, None] == k, matrix, 0.0), 0)[None, :]
            pivot = tl.sum(tl.where(r == k, tl.sum(tl.where(r[None, :] == k, matrix, 0.0), 1), 0.0), 0)
            log_det += tl.log(pivot)
            others = tl.where(r[None, :] == k, -column / pivot, matrix - column * row / pivot)
            own = tl.where(r[None, :] == k, 1 / pivot, row / pivot)
            matrix = tl.where(r[:, None] == k, own, others)
        inside = (r[:, None] < m) & (r[None, :] < m)
        tl.store(inverse_ptr + s * m * m + r[:, None] * m + r[None, :], (matrix / (eps * freedom)).to(tl.float32),
                 mask=inside)
    tl.store(entropy_ptr + s + tl.arange(0, 1), (log_det / (2 * freedom)).to(tl.float32))
    if trace - trace != 0:  # the trace marks the pairs of this sample; its factor must not reach others
        for start in range(0, d, BLOCK):
            c = start + tl.arange(0, BLOCK)
            tl.store(factor_ptr + r[:, None] * row_stride + c[None, :], tl.zeros([M, BLOCK], tl.float32),
                     mask=(r[:, None] < m) & (c[None, :] < d))


@triton.jit
def _cross_kernel(x_ptr, y_ptr, out_ptr, rows, cols, d, TILE: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    j = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, d, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + (group * rows + i[:, None]) * d + c[None, :], mask=(i[:, None] < rows) & (c[None, :] < d),
                    other=0)
        y = tl.load(y_ptr + (group * cols + j[:, None]) * d + c[None, :], mask=(j[:, None] < cols) & (c[None, :] < d),
                    other=0)
        total += tl.dot(x, tl.trans(y), input_precision="ieee")
    tl.store(out_ptr + (group * rows + i[:, None]) * cols + j[None, :], total,
             mask=(i[:, None] < rows) & (j[None, :] < cols))


@triton.jit
def _pairs_kernel(x_mean_ptr, y_mean_ptr, x_trace_ptr, y_trace_ptr, a_ptr, v_ptr, polar_ptr, distance_ptr,
                  regularization, pairs, Bx, By, d, mn, rows, cols, row_step, col_step, SPECTRAL: tl.constexpr,
                  POLAR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SWEEPS: tl.constexpr,
                  PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    live = pair < pairs
    i = pair // By
    j = i // Bx * By + pair % By
    rest = tl.zeros([PAIRS], tl.float32)
    for start in range(0, d, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = live[:, None] & (c[None, :] < d)
        x = tl.load(x_mean_ptr + i[:, None] * d + c[None, :], mask=inside, other=0)
        y = tl.load(y_mean_ptr + j[:, None] * d + c[None, :], mask=inside, other=0)
        rest += tl.sum((x - y) * (x - y), 1)
    rest += tl.load(x_trace_ptr + i, mask=live, other=0) + tl.load(y_trace_ptr + j, mask=live, other=0)

    r = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, COLS)[:, None]
    at = i * mn * By + pair % By
    a_in = live[None, :] & (r < rows)
    v_in = live[None, :] & (k < cols)
    a_ptr = a_ptr + at[None, :] + r * row_step
    v_pair_ptr = v_ptr + pair
    v_ptr = v_ptr + pair[None, :] + k * pairs
    polar_ptr = polar_ptr + at[None, :] + r * row_step
    largest = tl.zeros([PAIRS], tl.float32)
    for c in range(cols):
        largest = tl.maximum(largest, tl.max(tl.abs(tl.load(a_ptr + c * col_step, mask=a_in, other=0)), 0))
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1), 253)
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    for c in range(cols):
        tl.store(a_ptr + c * col_step, tl.load(a_ptr + c * col_step, mask=a_in, other=0) * scale[None, :], mask=a_in)
        if POLAR:
            one = tl.where(k == c, 1.0, 0.0) + tl.zeros([COLS, PAIRS], tl.float32)
            tl.store(v_ptr + c * cols * pairs, one, mask=v_in)
    tl.debug_barrier()

    active = 1
    sweep = 0
    while (active > 0) & (sweep < SWEEPS):
        active = 0
        for p in range(cols - 1):
            for q in range(p + 1, cols):
                x = tl.load(a_ptr + p * col_step, mask=a_in, other=0)
                y = tl.load(a_ptr + q * col_step, mask=a_in, other=0)
                a = tl.sum(x * x, 0)
                b = tl.sum(y * y, 0)
                g = tl.sum(x * y, 0)
                turning = g * g > 5.6843419e-14 * a * b + 1e-36  # |g| / sqrt(a b) above 2 units in the last place
                difference = b - a
                root = tl.sqrt(difference * difference + 4 * g * g)
                divisor = tl.where(difference < 0, difference - root, difference + root)
                tangent = tl.where(turning, 2 * g / tl.where(turning, divisor, 1.0), 0.0)
                cosine = 1 / tl.sqrt(1 + tangent * tangent)
                sine = (cosine * tangent)[None, :]
                cosine = cosine[None, :]
                if tl.max(turning.to(tl.int32), 0) > 0:
                    active = 1
                    tl.store(a_ptr + p * col_step, cosine * x - sine * y, mask=a_in)
                    tl.store(a_ptr + q * col_step, sine * x + cosine * y, mask=a_in)
                    if POLAR:
                        x = tl.load(v_ptr + p * cols * pairs, mask=v_in, other=0)
                        y = tl.load(v_ptr + q * cols * pairs, mask=v_in, other=0)
                        tl.store(v_ptr + p * cols * pairs, cosine * x - sine * y, mask=v_in)
                        tl.store(v_ptr + q * cols * pairs, sine * x + cosine * y, mask=v_in)
                    tl.debug_barrier()
        sweep += 1

    maximum = tl.zeros([PAIRS], tl.float32)
    for c in range(cols):
        x = tl.load(a_ptr + c * col_step, mask=a_in, other=0)
        maximum = tl.maximum(maximum, tl.sum(x * x, 0))
    rank_cut = tl.sqrt(maximum) * (1.1920929e-7 * rows)
    total = tl.zeros([PAIRS], tl.float32)
    for c in range(cols):
        x = tl.load(a_ptr + c * col_step, mask=a_in, other=0)
        square = tl.sum(x * x, 0)
        if SPECTRAL == 0:
            sigma = tl.sqrt(square)
            total += 2 * sigma
            weight = tl.where(sigma > rank_cut, 2 / tl.where(sigma > rank_cut, sigma, 1.0), 0.0)
        elif SPECTRAL == 1:
            width = regularization * scale
            root = tl.sqrt(square + width * width)
            total += 2 * square / (root + width)
            weight = 2 / root
        else:
            width = tl.minimum(regularization * scale, 3e38)  # infinite beside a cross term of about 0
            both = tl.sqrt(4 * square + width * width) + width
            u = 4 * square / both
            z = u / (2 * width)
            w = 1 + z
            log_w = tl.where(w == 1, z, tl.log(w) * z / tl.where(w == 1, 1.0, w - 1))  # exact where z is small
            total += u - width * log_w
            weight = 4 / both
        if POLAR:
            tl.store(a_ptr + c * col_step, x * (weight + (rest - rest))[None, :], mask=a_in)  # NaN marks the result
    tl.store(distance_ptr + pair, rest - total / scale, mask=live)
    if POLAR:
        tl.debug_barrier()
        for c in range(cols):
            out = tl.zeros([ROWS, PAIRS], tl.float32)
            for e in range(cols):
                right = tl.load(v_pair_ptr + (e * cols + c) * pairs, mask=live, other=0)
                out += tl.load(a_ptr + e * col_step, mask=a_in, other=0) * right[None, :]
            tl.store(polar_ptr + c * col_step, out, mask=a_in)


@triton.jit
def _weights_kernel(grad_ptr, polar_ptr, out_ptr, By, mn, n, BLOCK: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad_ptr + e // (mn * By) * By + e % By, mask=e < n, other=0)
    polar = tl.load(polar_ptr + e, mask=e < n, other=0)
    tl.store(out_ptr + e, tl.where(g == 0, 0.0, -g * polar), mask=e < n)


@triton.jit
def _frames_kernel(grad_ptr, grad_entropy_ptr, mean_ptr, other_mean_ptr, factor_ptr, inverse_ptr, grad_factor_ptr,
                   mask_ptr, out_ptr, B, T, d, inner, row_stride, others, own_stride, other_stride,
                   MASKED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = T - 1
    group = s // B
    at = group * m * B * d + s % B * inner
    grad_ptr += group * B * others + s % B * own_stride
    count = tl.zeros([1], tl.int32)
    for t in range(T):
        count += _valid(mask_ptr + s * T + t, MASKED)
    mean = tl.load(mean_ptr + s * d + c, mask=c < d, other=0)
    grad_mean = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([1], tl.float32)
    for j in range(others):
        g = 2 * tl.load(grad_ptr + j * other_stride + tl.arange(0, 1))
        other = tl.load(other_mean_ptr + (group * others + j) * d + c, mask=c < d, other=0)
        grad_mean += tl.where(g == 0, 0.0, g * (mean - other))  # the NaN of a pair left out of the loss stays out
        total += g
    valid_frames = tl.maximum(count, 1).to(tl.float32)
    grad_mean = grad_mean / valid_frames
    later = tl.zeros([BLOCK], tl.float32)
    before = count
    for back in range(T):
        t = m - back
        valid = _valid(mask_ptr + s * T + t, MASKED)
        before -= valid
        turn = (valid > 0) & (before > 0)
        row = at + (t - 1) * row_stride + c
        grad = tl.load(grad_factor_ptr + row, mask=(c < d) & turn, other=0)
        grad += total * tl.load(factor_ptr + row, mask=(c < d) & turn, other=0)
        if ENTROPY:
            grad_entropy = tl.load(grad_entropy_ptr + s)
            for q in range(m):
                inverse = tl.load(inverse_ptr + (s * m + t - 1) * m + q + tl.arange(0, 1), mask=turn, other=0)
                other = tl.load(factor_ptr + at + q * row_stride + c, mask=(c < d) & turn, other=0)
                grad += grad_entropy * inverse * other
        scale = 1 / tl.sqrt(tl.maximum(before * (before + 1), 1).to(tl.float32) * valid_frames)
        out = tl.where(valid > 0, later + grad_mean, 0.0) - tl.where(turn, before.to(tl.float32) * scale * grad, 0.0)
        tl.store(out_ptr + (s * T + t) * d + c, out.to(out_ptr.dtype.element_ty), mask=c < d)
        later += tl.where(turn, scale * grad, 0.0)


def _side(frames: Tensor, mask: Tensor | None, by_row: bool):
    """Sizes and strides of a side, in the order of the kernels, and its mask."""
    _, B, T, d = frames.shape
    sizes = B, T, d, d if by_row else (T - 1) * d, B * d if by_row else d
    return sizes, frames if mask is None else mask.view(torch.uint8)


def gaussian_w2(x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, spectral: str,
                regularization: float, eps: float, polar: bool = True) -> tuple[Tensor, ...]:
    (N, Bx, Tx, d), (_, By, Ty, _) = x.shape, y.shape
    m, n = Tx - 1, Ty - 1
    parts = []
    for frames, mask, shape in ((x, x_mask, (N, Bx, m, d)), (y, y_mask, (N, n, By, d))):
        sizes, mask_or_any = _side(frames, mask, frames is not x)
        B, T = sizes[:2]

        def new(*shape, frames=frames):
            return torch.empty(shape, dtype=torch.float32, device=frames.device)

        mean, factor, trace, entropy = new(N, B, d), new(*shape), new(N, B), new(N, B)
        inverse = new(N, B, T - 1, T - 1) if eps else new(0)
        if N * B:
            chunks = triton.cdiv(d, BLOCK_D)
            _moments_kernel[(N * B, chunks)](frames, mask_or_any, mean, factor, *sizes, MASKED=mask is not None,
                                             BLOCK=BLOCK_D)
            _entropy_kernel[(N * B,)](factor, mask_or_any, trace, entropy, inverse, eps, *sizes,
                                      MASKED=mask is not None, ENTROPY=eps > 0,
                                      M=max(16, triton.next_power_of_2(T - 1)), BLOCK=BLOCK_D)
        parts.append((mean, factor, trace, entropy, inverse))
    (x_mean, x_factor, x_trace, x_entropy, x_inverse), (y_mean, y_factor, y_trace, y_entropy, y_inverse) = parts
    distance, kept = new(N, Bx, By), new(N, Bx, m, n, By) if polar else new(0)
    if distance.numel():
        work, rows, cols = new(N, Bx, m, n, By), max(m, n), min(m, n)
        v = new(cols * cols if polar else 0, distance.numel())
        if work.numel():
            grid = triton.cdiv(n * By, TILE), triton.cdiv(Bx * m, TILE), N
            _cross_kernel[grid](x_factor, y_factor, work, Bx * m, n * By, d, TILE=TILE, BLOCK=32)
        steps = (n * By, By) if m >= n else (By, n * By)
        _pairs_kernel[(triton.cdiv(distance.numel(), PAIRS),)](
            x_mean, y_mean, x_trace, y_trace, work, v, kept, distance, regularization, distance.numel(), Bx, By, d,
            m * n, rows, cols, *steps, SPECTRAL=SPECTRAL[spectral], POLAR=polar,
            ROWS=triton.next_power_of_2(max(rows, 1)), COLS=triton.next_power_of_2(max(cols, 1)),
            SWEEPS=SWEEPS, PAIRS=PAIRS, BLOCK=32, num_warps=1)
    return distance, x_entropy, y_entropy, x_mean, y_mean, x_factor, y_factor, x_inverse, y_inverse, kept


def gaussian_w2_backward(grad: Tensor, grad_x_entropy: Tensor, grad_y_entropy: Tensor, x: Tensor, y: Tensor,
                         x_mean: Tensor, y_mean: Tensor, x_factor: Tensor, y_factor: Tensor, x_inverse: Tensor,
                         y_inverse: Tensor, polar: Tensor, x_mask: Tensor | None,
                         y_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    (N, Bx, m, d), (_, n, By, _) = x_factor.shape, y_factor.shape
    grads = torch.zeros_like(x_factor), torch.zeros_like(y_factor)
    if polar.numel():
        weights = torch.empty_like(polar)
        _weights_kernel[(triton.cdiv(polar.numel(), 1024),)](grad, polar, weights, By, m * n, polar.numel(), BLOCK=1024)
        weights = weights.view(N, Bx * m, n * By)
        with torch.autocast(x.device.type, enabled=False):
            grads = (torch.bmm(weights, y_factor.view(N, n * By, d)),
                     torch.bmm(weights.mT, x_factor.view(N, Bx * m, d)))
    out = torch.empty_like(x), torch.empty_like(y)
    sides = ((x, x_mask, grad_x_entropy, x_mean, y_mean, x_factor, x_inverse, By, By, 1),
             (y, y_mask, grad_y_entropy, y_mean, x_mean, y_factor, y_inverse, Bx, 1, By))
    for side, grad_factor, to in zip(sides, grads, out, strict=True):
        frames, mask, grad_entropy, mean, other_mean, factor, inverse, *strides = side
        sizes, mask_or_any = _side(frames, mask, frames is y)
        if to.numel():
            _frames_kernel[(N * sizes[0], triton.cdiv(d, BLOCK_D))](
                grad, grad_entropy, mean, other_mean, factor, inverse, grad_factor, mask_or_any, to, *sizes, *strides,
                MASKED=mask is not None, ENTROPY=inverse.ndim > 1, BLOCK=BLOCK_D)
    return out


_SIZES = dict.fromkeys(("B", "T", "d", "inner", "row_stride"), "i32")
_PAIRS = {**dict.fromkeys(("x_mean_ptr", "y_mean_ptr", "x_trace_ptr", "y_trace_ptr", "a_ptr", "v_ptr", "polar_ptr",
                           "distance_ptr"), "*fp32"), "regularization": "fp32",
          **dict.fromkeys(("pairs", "Bx", "By", "d", "mn", "rows", "cols", "row_step", "col_step"), "i32")}
AOT = [  # compiled by the tests without a GPU: kernel, types of its arguments, compile-time constants
    (_moments_kernel, dict(frames_ptr="*bf16", mask_ptr="*u8", mean_ptr="*fp32", factor_ptr="*fp32", **_SIZES),
     dict(MASKED=True, BLOCK=BLOCK_D)),
    (_entropy_kernel, dict(factor_ptr="*fp32", mask_ptr="*u8", trace_ptr="*fp32", entropy_ptr="*fp32",
                           inverse_ptr="*fp32", eps="fp32", **_SIZES),
     dict(MASKED=True, ENTROPY=True, M=16, BLOCK=BLOCK_D)),
    (_cross_kernel, dict(x_ptr="*fp32", y_ptr="*fp32", out_ptr="*fp32", rows="i32", cols="i32", d="i32"),
     dict(TILE=TILE, BLOCK=32)),
    *[(_pairs_kernel, _PAIRS, dict(SPECTRAL=kind, POLAR=True, ROWS=16, COLS=16, SWEEPS=SWEEPS, PAIRS=PAIRS, BLOCK=32))
      for kind in SPECTRAL.values()],
    (_weights_kernel, dict(grad_ptr="*fp32", polar_ptr="*fp32", out_ptr="*fp32", By="i32", mn="i32", n="i64"),
     dict(BLOCK=1024)),
    (_frames_kernel, dict(**dict.fromkeys(("grad_ptr", "grad_entropy_ptr", "mean_ptr", "other_mean_ptr", "factor_ptr",
                                           "inverse_ptr", "grad_factor_ptr"), "*fp32"), mask_ptr="*u8", out_ptr="*bf16",
                          **_SIZES, **dict.fromkeys(("others", "own_stride", "other_stride"), "i32")),
     dict(MASKED=True, ENTROPY=True, BLOCK=BLOCK_D)),
]
