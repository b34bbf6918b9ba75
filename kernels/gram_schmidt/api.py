import math
import operator

import torch
from torch import Tensor

from .._common.backend import choose, recall, remember, require_tensors
from .._common.library import call
from . import ops, reference

KINDS = ("gaussian", "rademacher")
SEED_RANGE = -(2**63), 2**63 - 1


def orthogonal_blend(
    z: Tensor,
    ratio: Tensor | float,
    *,
    noise: str | Tensor = "gaussian",
    seed: Tensor | int | None = None,
    generator: torch.Generator | None = None,
    restore_norm: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``sqrt(1 - ratio) z/|z| + sqrt(ratio) u``, ``u`` along noise minus its projection on ``z``, normalised (Eq. 7-8).

    The result is a unit vector at the cosine ``sqrt(1 - ratio)`` to ``z``, for any ``z`` and noise: ``z/|z|`` at ratio
    0, orthogonal to ``z`` at 1. The norm in Eq. 7 is read as "normalised". Noise that is drawn here is a function of
    the seed, the row and the column: the backward draws it again and nothing is stored.

    Args:
        z: ``[*, d]``, ``d >= 2``, any floating dtype; computed in float32, or in float64 for float64. Where ``*`` is 1
            against the batch dimensions of ``ratio``, or expanded and constant, rows of ``z`` are shared by results
            with noise of their own each.
        ratio: ``[*]``, one per row, broadcast with the batch dimensions of ``z``, or a number. Clamped to [0, 1].
        noise: what is drawn, ``"gaussian"`` or ``"rademacher"`` (random signs, cheaper), or the noise itself, constant,
            broadcastable to the result.
        seed: of the noise, an integer or an int64 tensor of one element, which may lie on the device: a captured CUDA
            graph then reads it anew at each replay. By default drawn from ``generator``, or PyTorch's own.
        restore_norm: multiply the result by ``|z|`` (ours; the paper works on normalised features).
        backend: ``"cuda"``, ``"cpp"``, ``"triton"`` or ``"reference"``; by default the first that can run.

    Returns:
        ``[*, d]``, of the dtype of ``z``. Differentiable in ``z`` and ``ratio``, once; the reference any number of
        times. The gradient of ``ratio`` is 0 outside (0, 1) and grows without bound towards 0 and 1. A row of zeros
        yields ``sqrt(ratio) u`` and has gradient 0; noise parallel to ``z`` yields ``u = 0``.

    Raises:
        ValueError: for arguments of the wrong kind or shape. RuntimeError: for a backend that cannot run here.
    """
    signature = plan = None
    if isinstance(ratio, Tensor) and isinstance(noise, str):
        signature, plan = recall("orthogonal_blend", backend, (noise, restore_norm), z, ratio)
    if plan is not None:
        chosen, options = plan
        seed = _seed_tensor("orthogonal_blend", seed, generator, z.device)
        return call("orthogonal_blend", chosen, z, ratio, seed, options)
    _check_rows("orthogonal_blend", z)
    acc = reference.wide(z)
    if not isinstance(ratio, Tensor):
        ratio = torch.full((), ratio, dtype=acc, device=z.device)
    elif not ratio.is_floating_point() or ratio.device != z.device:
        raise ValueError(f"orthogonal_blend: ratio must be floating point on {z.device}, like z, got {ratio.dtype} on "
                         f"{ratio.device}")
    try:
        rows = ratio.shape if ratio.shape == z.shape[:-1] else torch.broadcast_shapes(z.shape[:-1], ratio.shape)
        if isinstance(noise, Tensor):
            noise = noise.detach().to(z.device, acc).expand(*rows, z.shape[-1])
    except RuntimeError as error:
        given = f" and noise {list(noise.shape)}" if isinstance(noise, Tensor) else ""
        raise ValueError(f"orthogonal_blend: ratio must broadcast with the batch dimensions of z, and noise to the "
                         f"result, got z {list(z.shape)}, ratio {list(ratio.shape)}{given}") from error
    if isinstance(noise, str) and noise not in KINDS:
        raise ValueError(f"orthogonal_blend: noise must be a tensor or one of {KINDS}, got {noise!r}")
    if isinstance(noise, str):
        seed = _seed_tensor("orthogonal_blend", seed, generator, z.device)
    chosen = choose("orthogonal_blend", backend, (z, ratio, noise, seed), ops.CAN_RUN)
    if chosen == "reference":
        return reference.orthogonal_blend(z, ratio, noise, seed, restore_norm)
    given, (z, shared, inner) = (z, ratio), _share(z, rows)
    kind, source = (2, noise.contiguous()) if isinstance(noise, Tensor) else (KINDS.index(noise), seed)
    if ratio.shape != rows or ratio.dtype != acc:
        ratio = ratio.to(acc).expand(rows)
    options, tensors = [kind, shared, inner, int(restore_norm)], (z.contiguous(), ratio.contiguous())
    if all(map(operator.is_, tensors, given)):  # as kernels take them
        remember(signature, (chosen, options))
    return call("orthogonal_blend", chosen, *tensors, source, options)


def gram_schmidt(
    vectors: Tensor,
    *,
    against: Tensor | None = None,
    method: str = "auto",
    rank_tol: float | None = None,
    return_rank: bool = False,
    detach_basis: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Orthonormal rows with the span of ``vectors``, each what is left of its row beside the rows before, normalised.

    ``vectors = L Q`` with ``L`` lower triangular and its diagonal positive, which makes ``Q`` unique: the transposed
    ``torch.linalg.qr`` of the transposed rows, up to signs. A row that depends on those before it is dropped: its row
    of ``Q`` is zero and the others are as if it were not there.

    Args:
        vectors: ``[*, n, d]``, any floating dtype and any ``n``; computed in float32, or in float64 for float64.
        against: ``[*, m, d]``, broadcast over the batch dimensions; vectors, not necessarily independent, whose span is
            removed from ``vectors`` first.
        method: ``"auto"`` projects a row a second time if the first left less than 0.8 of it; ``"cgs2"`` always does,
            which costs twice as much where rows are independent; ``"cgs"`` never does, and loses orthogonality with the
            square of the condition number.
        rank_tol: rows of which no more than this fraction is left are dropped. By default 8 epsilons of the dtype that
            is computed in, 9.5e-7 for float32: above what duplicates and linear combinations leave, below what the last
            row at condition 1e6 does.
        return_rank: also return how many rows were kept.
        detach_basis: no gradient to ``against``.
        backend: ``"cuda"``, ``"cpp"`` or ``"reference"``; by default the first that can run.

    Returns:
        ``[*, n, d]``, of the dtype of ``vectors``; with ``return_rank`` also int64 ``[*]``. Differentiable, once; the
        reference any number of times. Gradients scale with the inverse of the smallest ``L_ii``; 0 where dropped.

    Raises:
        ValueError: for arguments of the wrong kind or shape. RuntimeError: for a backend that cannot run here.
    """
    signature = plan = None
    if against is None:
        signature, plan = recall("gram_schmidt", backend, (method, rank_tol), vectors)
    if plan is not None:
        q = _orthonormal(vectors, *plan)
        return (q, _rank(q)) if return_rank else q
    require_tensors("gram_schmidt", vectors=vectors, **({} if against is None else {"against": against}))
    if vectors.dim() < 2 or vectors.shape[-1] == 0 or not vectors.is_floating_point():
        raise ValueError(f"gram_schmidt: vectors must be [*, n, d] with d above 0 and floating point, got "
                         f"{list(vectors.shape)} of {vectors.dtype}")
    if method not in reference.THRESHOLD:
        raise ValueError(f"gram_schmidt: method must be one of {tuple(reference.THRESHOLD)}, got {method!r}")
    if rank_tol is not None and not 0 <= rank_tol < 1:
        raise ValueError(f"gram_schmidt: rank_tol must be in [0, 1), got {rank_tol}")
    first = 0
    if against is not None:
        vectors, first = _stack_on(against.detach() if detach_basis else against, vectors), against.shape[-2]
    chosen = choose("gram_schmidt", backend, (vectors,), ops.CAN_RUN)
    if chosen == "reference":
        q = reference.gram_schmidt(vectors, rank_tol, method)
    else:
        tol = reference.RANK_TOL[reference.wide(vectors)] if rank_tol is None else rank_tol
        plan = chosen, tol, reference.THRESHOLD[method]
        remember(signature, plan)
        q = _orthonormal(vectors, *plan)
    q = q[..., first:, :] if first else q
    return (q, _rank(q)) if return_rank else q


def _orthonormal(vectors, backend, tol, threshold):
    keep_l = vectors.requires_grad and torch.is_grad_enabled()  # the factor that the backward needs
    q = call("gram_schmidt", backend, vectors.contiguous(), tol, threshold, keep_l)[0]
    return q if q.dtype == vectors.dtype else q.to(vectors.dtype)


def _rank(q):
    return (q != 0).any(-1).sum(-1)


def orthogonal_directions(
    z: Tensor,
    k: int,
    *,
    kind: str = "haar",
    seed: Tensor | int | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """``k`` random unit vectors orthogonal to ``z`` and to one another.

    Args:
        z: ``[*, d]``, ``d >= 2``, any floating dtype; computed in float32, or in float64 for float64.
        k: at most ``d - 1``.
        kind: ``"haar"`` draws uniformly, by Gram-Schmidt on Gaussian noise, in O(k^2 d). ``"hadamard"`` takes rows of a
            Hadamard matrix with random signs and reflects one of them into ``z``, in O(k d) and with few random bits;
            ``d`` must be a power of two.
        seed, generator: as in ``orthogonal_blend``.
        backend: ``"cuda"``, ``"cpp"``, ``"triton"`` (kind hadamard) or ``"reference"``; by default the first that can
            run.

    Returns:
        ``[*, k, d]``, of the dtype of ``z``, constants: no gradient reaches ``z``.

    Raises:
        ValueError: for arguments of the wrong kind or shape. RuntimeError: for a backend that cannot run here.
    """
    _check_rows("orthogonal_directions", z)
    d = z.shape[-1]
    if not 0 <= k < d:
        raise ValueError(f"orthogonal_directions: k must be in [0, d - 1], got {k} for d = {d}")
    if kind not in ("haar", "hadamard"):
        raise ValueError(f"orthogonal_directions: kind must be 'haar' or 'hadamard', got {kind!r}")
    if kind == "hadamard" and d & (d - 1):
        raise ValueError(f"orthogonal_directions: kind 'hadamard' needs d to be a power of two, got {d}; use 'haar'")
    z, seed = z.detach(), _seed_tensor("orthogonal_directions", seed, generator, z.device)
    if kind == "haar":
        noise = philox_noise((*z.shape[:-1], k, d), seed, backend=backend).to(reference.wide(z))
        return gram_schmidt(noise, against=z.unsqueeze(-2).to(noise), backend=backend).to(z.dtype)
    chosen = choose("orthogonal_directions", backend, (z, seed), ops.CAN_RUN)
    if chosen == "reference":
        return reference.orthogonal_directions(z, k, seed)
    return call("orthogonal_directions", chosen, z.contiguous(), seed, k)


def philox_noise(shape: tuple[int, ...], seed: Tensor | int, kind: str = "gaussian", *,
                 backend: str | None = None) -> Tensor:
    """The noise that ``orthogonal_blend`` draws for a seed, float32 ``[*shape]`` on the device of the seed."""
    if kind not in KINDS or len(shape) == 0:
        raise ValueError(f"philox_noise: kind must be one of {KINDS} and shape not empty, got {kind!r} and {shape}")
    seed = _seed_tensor("philox_noise", seed, None, seed.device if isinstance(seed, Tensor) else "cpu")
    chosen = choose("philox_noise", backend, (seed,), ops.CAN_RUN)
    if chosen == "reference":
        return reference.philox_noise(shape, seed, kind).float()
    return call("philox_noise", chosen, seed, shape, KINDS.index(kind))


def _check_rows(op, z):
    require_tensors(op, z=z)
    if z.dim() == 0 or z.shape[-1] < 2 or not z.is_floating_point():
        raise ValueError(f"{op}: z must be [*, d] with d >= 2, where a direction orthogonal to it exists, and floating "
                         f"point, got {list(z.shape)} of {z.dtype}")


def _seed_tensor(op, seed, generator, device):
    """The seed as an int64 scalar on the device; drawn or filled there, so that nothing waits for the host."""
    if seed is None:
        where = generator.device if generator is not None else device
        return torch.randint(*SEED_RANGE, (), generator=generator, device=where).to(device)
    if not isinstance(seed, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != torch.device(device):
        raise ValueError(f"{op}: seed must be an integer or an int64 tensor of one element on {device}, got "
                         f"{list(seed.shape)} of {seed.dtype} on {seed.device}")
    return seed


def _share(z, rows):
    """z without the dimensions it is repeated along, if these are neighbours; how often, and the rows after them."""
    if z.shape[:-1] == rows and z.is_contiguous():
        return z, 1, 1
    if 0 in rows:
        return z.expand(*rows, z.shape[-1]), 1, 1
    lead = len(rows) + 1 - z.dim()
    constant = not (z.requires_grad and torch.is_grad_enabled())  # else each row is owed a gradient of its own
    for i in range(z.dim() - 1):
        if constant and z.shape[i] > 1 and z.stride(i) == 0:
            z = z.narrow(i, 0, 1)
    repeated = [i for i, size in enumerate(rows) if size > 1 and (i < lead or z.shape[i - lead] == 1)]
    if not repeated:
        return z, 1, 1
    start, stop = repeated[0], repeated[-1] + 1
    shared = math.prod(rows[start:stop])
    if shared != math.prod([rows[i] for i in repeated]):
        return z.expand(*rows, z.shape[-1]), 1, 1
    return z, shared, math.prod(rows[stop:])


def _stack_on(against, vectors):
    if against.dim() < 2 or against.shape[-1] != vectors.shape[-1] or (against.dtype, against.device) != (
            vectors.dtype, vectors.device):
        raise ValueError(f"gram_schmidt: against must be [*, m, {vectors.shape[-1]}] of {vectors.dtype} on "
                         f"{vectors.device}, got {list(against.shape)} of {against.dtype} on {against.device}")
    try:
        batch = torch.broadcast_shapes(against.shape[:-2], vectors.shape[:-2])
    except RuntimeError as error:
        raise ValueError(f"gram_schmidt: the batch dimensions must broadcast, got against {list(against.shape)} and "
                         f"vectors {list(vectors.shape)}") from error
    return torch.cat([x.expand(*batch, *x.shape[-2:]) for x in (against, vectors)], -2)
