"""The definitions, in plain PyTorch. Every backend is held to them."""
import math

import torch
from torch import Tensor

ROUNDS = 7  # of Philox-4x32; the fewest that pass BigCrush (Salmon et al., 2011)
WORD = 0xFFFFFFFF
THRESHOLD = {"auto": 0.8, "cgs": 0.0, "cgs2": math.inf}  # a row shortened below it is projected again
NO_FLOAT64 = ("mps", "xpu")  # XPU: not on every card
PARALLEL = 8  # noise is parallel to z where so many epsilons of it are left
RANK_TOL = {dtype: 8 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}  # by what is computed in


def wide(x: Tensor) -> torch.dtype:
    """What is computed in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _real(device):
    """What noise is computed in: float64 where the device has it."""
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox-4x32 for a 64-bit key and 128-bit counters, as int64."""
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps beyond 63 bits, which leaves all 64 bits right
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _words(seed, rows, counters, stream):
    row, column = torch.arange(rows, device=seed.device)[:, None], torch.arange(counters, device=seed.device)
    zero = torch.zeros_like(row * column)
    return torch.stack(philox(seed, column + zero, (row & WORD) + zero, (row >> 32) + zero, zero + stream), -1)


def philox_noise(shape, seed: Tensor, kind: str = "gaussian") -> Tensor:
    """Noise of a counter-based generator, float64 ``[*shape]``, or float32 on devices that have no float64; see
    README.md for the layout of the counters."""
    real, (*batch, d) = _real(seed.device), shape
    rows = math.prod(batch)
    if kind == "rademacher":
        words = _words(seed, rows, -(-d // 128), 0)  # [rows, counters, 4]
        bits = words[..., None] >> torch.arange(32, device=seed.device) & 1
        return (1.0 - 2.0 * bits.to(real)).flatten(1)[:, :d].reshape(shape)
    w = _words(seed, rows, -(-d // 4), 0).unflatten(-1, (2, 2))
    u, turn = w[..., 0], w[..., 1]
    radius = (-2 * torch.log(((u >> 8) | 1).to(real) * 2.0**-24)).sqrt()  # u is odd: never 0 and never 1
    signed = ((turn << 2 & WORD) ^ 0x80000000) - 0x80000000  # the lower 30 bits of the word, as a signed fraction
    angle = math.pi / 4 * (1 + (signed >> 8).to(real) * 2.0**-23)  # in the first quadrant
    sign0, sign1 = 1 - 2 * (turn >> 31).to(real), 1 - 2 * (turn >> 30 & 1).to(real)
    pairs = torch.stack([sign0 * radius * angle.cos(), sign1 * radius * angle.sin()], -1)  # [rows, counters, 2, 2]
    return pairs.flatten(1)[:, :d].reshape(shape)


def _unit(x):
    """Rows divided by their norms, whatever their scale, and the norms; a zero row stays zero and has no gradient."""
    scale = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(scale == 0, 1, scale)
    square = (x * x).sum(-1, keepdim=True)
    norm = torch.where(square == 0, 1, square).sqrt()
    return x / norm * (square != 0), norm * scale


def orthogonal_blend(z: Tensor, ratio: Tensor, noise: str | Tensor, seed: Tensor | int | None,
                     restore_norm: bool) -> Tensor:
    (unit, norm), rho = _unit(z.to(wide(z))), ratio.to(wide(z))
    rows = torch.broadcast_shapes(z.shape[:-1], rho.shape)
    if isinstance(noise, str):
        noise = philox_noise((*rows, z.shape[-1]), torch.as_tensor(seed, device=z.device), noise)
    u = _unit(noise.detach().to(unit))[0]
    for _ in range(2):  # once more, for noise that is almost parallel to z
        u = u - (u * unit).sum(-1, keepdim=True) * unit
    parallel = u.detach().norm(dim=-1, keepdim=True) <= PARALLEL * torch.finfo(u.dtype).eps
    u = _unit(torch.where(parallel, 0, u))[0]
    inside = (rho > 0) & (rho < 1)  # beyond, ratio acts as 0 or 1; there the square roots have no gradient
    safe, limit = torch.where(inside, rho, 0.5), rho.detach().clamp(0, 1)
    a, b = torch.where(inside, (1 - safe).sqrt(), 1 - limit), torch.where(inside, safe.sqrt(), limit)
    out = a[..., None] * unit + b[..., None] * u
    return (out * norm if restore_norm else out).to(z.dtype)


def gram_schmidt(vectors: Tensor, rank_tol: float | None = None, method: str = "auto") -> Tensor:
    def project(v, q):
        return v - ((q @ v[..., None]).mT @ q)[..., 0, :]

    x, q = vectors.to(wide(vectors)), []
    rank_tol = RANK_TOL[x.dtype] if rank_tol is None else rank_tol
    for row in x.unbind(-2):
        v = row = _unit(row)[0]
        if q:
            v = project(row, torch.stack(q, -2))
            again = v.norm(dim=-1, keepdim=True) < THRESHOLD[method]
            v = torch.where(again, project(v, torch.stack(q, -2)), v)
        length = v.norm(dim=-1, keepdim=True)
        dropped = (length <= rank_tol) | (row == 0).all(-1, keepdim=True)  # not where there is a NaN
        q.append(torch.where(dropped, 0, v) / torch.where(dropped, 1, length))
    return (torch.stack(q, -2) if q else x).to(vectors.dtype)


def orthogonal_directions(z: Tensor, k: int, seed: Tensor | int, kind: str = "hadamard") -> Tensor:
    """Rows of a Hadamard matrix with random signs, reflected so that the first becomes z, up to its sign."""
    assert kind == "hadamard"  # the other kind is Gram-Schmidt of noise
    (*batch, d), seed = z.shape, torch.as_tensor(seed, device=z.device)
    unit = _unit(z.detach().reshape(-1, d).to(wide(z)))[0]
    rows = len(unit)
    words = _words(seed, rows, 1, 1)[:, 0]  # [rows, 4]
    first, step = words[:, :1], words[:, 1:2] | 1  # an odd step meets every row once, d being a power of two
    index = (first + step * torch.arange(k + 1, device=z.device)) % d  # [rows, k + 1]
    parity = index[..., None] & torch.arange(d, device=z.device)
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    signs = philox_noise((rows, 1, d), seed, "rademacher").to(unit)
    q = (1 - 2 * (parity & 1)) * signs / math.sqrt(d)  # [rows, k + 1, d], orthonormal
    cosine = (q @ unit[..., None])  # [rows, k + 1, 1]
    w = torch.where(cosine[:, :1] > 0, -q[:, :1], q[:, :1]) - unit[:, None]  # half its square is 1 + |cosine_0|
    out = q[:, 1:] + cosine[:, 1:] / (1 + cosine[:, :1].abs()) * w
    return out.view(*batch, k, d).to(z.dtype)
