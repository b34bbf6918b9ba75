"""The definition, in plain PyTorch: the low-rank form that every backend is held to, and the dense form as printed in
the paper (Eq. 13-15), which the low-rank form is held to. README.md derives one from the other.
"""
import math

import torch
from torch import Tensor


def moments(frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [..., d], factor [..., T-1, d] with ``factor^T factor`` the covariance, and valid frames [...] of
    frames [..., T, d]. Each row of the factor compares a frame with the mean of those before it (Helmert)."""
    valid = torch.ones_like(frames[..., 0], dtype=torch.bool) if mask is None else mask  # [..., T]
    count = valid.sum(-1)
    base = frames.gather(-2, valid.int().argmax(-1)[..., None, None].expand_as(frames[..., :1, :]))
    base = torch.where(count[..., None, None] > 0, base, 0)  # the first valid frame
    change = torch.where(valid[..., None], frames - base, 0)  # exactly 0 in a static video
    total = count.clamp(min=1).to(frames.dtype)
    mean = base.squeeze(-2) + change.sum(-2) / total[..., None]
    before = valid[..., :-1].cumsum(-1).to(frames.dtype)  # valid frames before frames 1 .. T-1
    scale = torch.where(valid[..., 1:] & (before > 0), (before * (before + 1) * total[..., None]).rsqrt(), 0)
    factor = scale[..., None] * (change[..., :-1, :].cumsum(-2) - before[..., None] * change[..., 1:, :])
    return mean, factor, count


def spectral_sum(sigma: Tensor, size: int, spectral: str, regularization: float) -> Tensor:
    """The sum of f(sigma) over the last dimension: twice the nuclear norm, or a smooth form of it."""
    if spectral == "smooth":
        return (2 * sigma**2 / ((sigma**2 + regularization**2).sqrt() + regularization)).sum(-1)
    if spectral == "entropic":
        u = 4 * sigma**2 / ((4 * sigma**2 + regularization**2).sqrt() + regularization)
        return (u - regularization * torch.log1p(u / (2 * regularization))).sum(-1)
    rank_cut = size * torch.finfo(sigma.dtype).eps * sigma.detach().amax(-1, keepdim=True)
    return 2 * torch.where(sigma > rank_cut, sigma, sigma.detach()).sum(-1)  # below it, the minimum-norm subgradient


def spectral_sum_eps(cross: Tensor, x_gram: Tensor, y_gram: Tensor, eps: float) -> Tensor:
    """2 tr[((Sx + eps)^1/2 (Sy + eps) (Sx + eps)^1/2)^1/2 - eps], exactly, from matrices of order Tx + Ty - 2."""
    eye = torch.eye(x_gram.shape[-1], dtype=x_gram.dtype, device=x_gram.device)
    lower = torch.linalg.cholesky(x_gram + eps * eye)[:, :, None]  # [N, Bx, 1, m, m]
    corner = eps * (lower.mT @ lower - eps * eye).expand(*cross.shape[:3], -1, -1)
    side = math.sqrt(eps) * lower.mT @ cross
    rest = cross.mT @ cross + eps * y_gram[:, None]
    block = torch.cat([torch.cat([corner, side], -1), torch.cat([side.mT, rest], -1)], -2)
    eigenvalues = torch.linalg.eigvalsh(block).clamp(min=0)
    return 2 * (eigenvalues / ((eigenvalues + eps * eps).sqrt() + eps)).sum(-1)


def entropy(gram: Tensor, count: Tensor, eps: float) -> Tensor:
    """Half the log-determinant of I + G / eps, per degree of freedom; 0 for a single frame."""
    if eps == 0:
        return gram.new_zeros(gram.shape[:-2])
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    diagonal = torch.linalg.cholesky_ex(gram / eps + eye)[0].diagonal(dim1=-2, dim2=-1)
    return diagonal.log().sum(-1) / (count - 1).clamp(min=1)


def gaussian_w2(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None,
                spectral: str = "plain", regularization: float = 1e-2,
                eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_mean, x_factor, x_count = moments(x.to(dtype), x_mask)  # [N, Bx, d], [N, Bx, m, d], [N, Bx]
    y_mean, y_factor, y_count = moments(y.to(dtype), y_mask)  # [N, By, d], [N, By, n, d], [N, By]
    x_gram, y_gram = x_factor @ x_factor.mT, y_factor @ y_factor.mT
    cross = x_factor.flatten(1, 2) @ y_factor.flatten(1, 2).mT  # [N, Bx m, By n]
    cross = cross.unflatten(2, y_factor.shape[1:3]).unflatten(1, x_factor.shape[1:3]).transpose(2, 3)
    cross = torch.where(cross.isfinite().all(-1).all(-1)[..., None, None], cross, 0)  # the traces carry the NaN
    if spectral == "eps":
        tail = spectral_sum_eps(cross, x_gram, y_gram, regularization)
    elif 0 in cross.shape:
        tail = cross.sum((-2, -1))
    else:
        tail = spectral_sum(torch.linalg.svdvals(cross), max(cross.shape[-2:]), spectral, regularization)
    trace = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (x_gram, y_gram)]
    distance = (x_mean[:, :, None] - y_mean[:, None]).square().sum(-1) + trace[0][:, :, None] + trace[1][:, None] - tail
    return distance, entropy(x_gram, x_count, eps), entropy(y_gram, y_count, eps)


class _SquareRoot(torch.autograd.Function):
    """Symmetric square root; its derivative solves a Sylvester equation, so equal eigenvalues do no harm."""

    @staticmethod
    def forward(ctx, matrix):
        eigenvalues, vectors = torch.linalg.eigh(matrix)
        roots = eigenvalues.clamp(min=0).sqrt()
        ctx.save_for_backward(roots, vectors)
        return vectors * roots[..., None, :] @ vectors.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        roots, vectors = ctx.saved_tensors
        inner = vectors.mT @ grad @ vectors / (roots[..., None] + roots[..., None, :])
        return vectors @ ((inner + inner.mT) / 2) @ vectors.mT


def _covariance(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = x.mean(-2)
    centred = (x - mean[..., None, :]) / math.sqrt(x.shape[-2])
    return mean, centred.mT @ centred + eps * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def dense_gaussian_wasserstein(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Squared distances [Bx, By] as printed, between the Gaussians N(mean, S + eps I) of x [Bx, Tx, d], y [By, Ty, d]:
    ``|mx - my|^2 + tr(Sx + Sy - 2 (Sx^1/2 Sy Sx^1/2)^1/2)``. Needs eps > 0; d x d matrices of every pair: for tests."""
    (x_mean, x_cov), (y_mean, y_cov) = _covariance(x, eps), _covariance(y, eps)
    root = _SquareRoot.apply(x_cov)[:, None]
    inner = _SquareRoot.apply(root @ y_cov @ root)
    matrix = x_cov[:, None] + y_cov - 2 * inner  # [Bx, By, d, d]
    return (x_mean[:, None] - y_mean).square().sum(-1) + matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def dense_gaussian_entropy(x: Tensor, eps: float) -> Tensor:
    """Entropies [B] in nats as printed, ``1/2 log((2 pi e)^d det(S + eps I))``, of x [B, T, d]."""
    return (x.shape[-1] * math.log(2 * math.pi * math.e) + torch.linalg.slogdet(_covariance(x, eps)[1])[1]) / 2
