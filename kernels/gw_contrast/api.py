import math
import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize, pad

from .._common.backend import IMPLEMENTED, choose, lost_by_kernels, recall, remember, require_tensors
from .._common.library import call
from . import ops, reference

SPECTRAL = ("plain", "smooth", "entropic", "eps")
ENTROPY = ("in_distance", "regularizer", "none")


def gaussian_w2(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None,
                spectral: str = "plain", regularization: float = 1e-2, eps: float = 0.0, *,
                backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Squared Wasserstein distances and relative entropies of low-rank Gaussians: the operator under the functions
    below, which are easier to call.

    Within each of N groups, every ``x`` is compared with every ``y``. Frames ``[T, d]`` stand for the Gaussian with
    their mean and their covariance (divided by T), whose rank is below T.

    Args:
        x, y: ``[N, Bx, Tx, d]`` and ``[N, By, Ty, d]``, any floating dtype; computed in float32, or float64 if given.
        x_mask, y_mask: ``[N, Bx, Tx]``, ``[N, By, Ty]``, bool, true for frames that count; all of them by default. A
            sample without any is a point mass at the origin.
        spectral, regularization: as in `gaussian_wasserstein`; "entropic" is not debiased here.
        eps: added to the covariances in the entropies alone; 0 leaves the entropies out, as zeros.
        backend: ``"cuda"``, ``"cpp"``, ``"triton"`` or ``"reference"``; by default the first that can run.

    Returns:
        Distances ``[N, Bx, By]`` and, per degree of freedom, entropies ``[N, Bx]`` and ``[N, By]``, in float32 or
        float64. Differentiable in ``x`` and ``y``, once; the reference any number of times.
    """
    masks = [mask for mask in (x_mask, y_mask) if mask is not None]
    settings = spectral, regularization, eps, x_mask is None, y_mask is None
    signature, plan = recall("gaussian_w2", backend, settings, x, y, *masks)
    if plan is not None:
        return _gaussian_w2(plan, x, y, x_mask, y_mask, spectral, float(regularization), float(eps))
    chosen = _choose(x, y, x_mask, y_mask, spectral, regularization, eps, backend)
    dtype = torch.promote_types(x.dtype, y.dtype)
    if x.dtype == y.dtype and chosen != "reference":
        remember(signature, chosen)
    run = reference.gaussian_w2 if chosen == "reference" else partial(_gaussian_w2, chosen)
    return run(x.to(dtype), y.to(dtype), x_mask, y_mask, spectral, float(regularization), float(eps))


def _choose(x, y, x_mask, y_mask, spectral, regularization, eps, backend):
    """The backend for these arguments of `gaussian_w2`, which are checked."""
    require_tensors("gaussian_w2", x=x, y=y)
    if x.ndim != 4 or y.ndim != 4 or x.shape[::3] != y.shape[::3] or 0 in (x.shape[2], y.shape[2]):
        raise ValueError("gaussian_w2: x and y must be [N, Bx, Tx, d] and [N, By, Ty, d] with N and d alike and at "
                         f"least one frame each, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not x.is_floating_point() or not y.is_floating_point() or x.device != y.device:
        raise ValueError("gaussian_w2: x and y must be floating point and on one device, got "
                         f"{x.dtype} on {x.device} and {y.dtype} on {y.device}")
    for name, mask, frames in (("x_mask", x_mask, x), ("y_mask", y_mask, y)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != frames.shape[:3]):
            raise ValueError(f"gaussian_w2: {name} must be bool and {tuple(frames.shape[:3])}, "
                             f"got {mask.dtype} and {tuple(mask.shape)}")
    if spectral not in SPECTRAL or not 0 < regularization < math.inf or not 0 <= eps < math.inf:
        raise ValueError(f"gaussian_w2: spectral must be one of {SPECTRAL}, regularization finite and above 0, "
                         f"eps finite and not below, got {spectral!r}, {regularization} and {eps}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    args = x.to(dtype), y.to(dtype), x_mask, y_mask, spectral, regularization, eps
    return choose("gaussian_w2", backend, args, ops.CAN_RUN, ops.avoid)


def _gaussian_w2(backend, x, y, *settings):  # an int among these would be squared as one, which may be no number
    polar = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    args = [a.contiguous() if isinstance(a, Tensor) else a for a in (x, y, *settings)]
    return call("gaussian_w2", backend, *args, polar)[:3]


def _distances(x, y, x_mask, y_mask, spectral, regularization, eps, backend):
    """`gaussian_w2`, debiased if entropic: the Sinkhorn divergence, 0 where x and y coincide."""
    distance, x_entropy, y_entropy = gaussian_w2(x, y, x_mask, y_mask, spectral, regularization, eps, backend=backend)
    if spectral == "entropic":
        own = []
        for z, mask in ((x, x_mask), (y, y_mask)):  # each sample against itself
            z, mask = z.flatten(0, 1)[:, None], None if mask is None else mask.flatten(0, 1)[:, None]
            own.append(gaussian_w2(z, z, mask, mask, spectral, regularization, backend=backend)[0])
        distance = distance - own[0].view_as(x_entropy)[:, :, None] / 2 - own[1].view_as(y_entropy)[:, None] / 2
    return distance, x_entropy, y_entropy


def gaussian_wasserstein(x: Tensor, y: Tensor, *, x_mask: Tensor | None = None, y_mask: Tensor | None = None,
                         spectral: str = "plain", regularization: float = 1e-2, pairs: str = "all",
                         backend: str | None = None) -> Tensor:
    """Squared 2-Wasserstein (Bures) distances ``|mx - my|^2 + tr(Sx + Sy - 2 (Sx^1/2 Sy Sx^1/2)^1/2)``, Eq. 13, between
    the Gaussians of sets of frames, from matrices of the order of the number of frames.

    Args:
        x, y: ``[Bx, Tx, d]`` and ``[By, Ty, d]``, any floating dtype; a single frame is a point mass.
        x_mask, y_mask: ``[Bx, Tx]``, ``[By, Ty]``, bool, true for frames that count; all of them by default.
        spectral: ``"plain"``, the distance itself; ``"smooth"``, singular values s replaced by
            ``sqrt(s^2 + r^2) - r`` in the cross term; ``"entropic"``, the Sinkhorn divergence with regularisation
            ``2 r KL`` (smooth, and 0 where x and y coincide); ``"eps"``, the distance between the Gaussians with ``r
            I`` added to both covariances (a reference for tests, in plain PyTorch).
        regularization: r above; ``"plain"`` ignores it.
        pairs: ``"all"``, every x with every y; ``"zip"``, each x with the y of its own index.
        backend: ``"cuda"``, ``"cpp"``, ``"triton"`` or ``"reference"``; by default the first that can run.

    Returns:
        ``[Bx, By]``, or ``[Bx]`` for ``"zip"``, in float32, or float64 if given that. Where x and y coincide, rounding
        may leave it slightly below 0. The gradient is finite everywhere: where singular values of the cross term vanish
        it is the subgradient of smallest norm.
    """
    require_tensors("gaussian_wasserstein", x=x, y=y)
    if x.ndim != 3 or y.ndim != 3:
        raise ValueError("gaussian_wasserstein: x and y must be [Bx, Tx, d] and [By, Ty, d], "
                         f"got {tuple(x.shape)} and {tuple(y.shape)}")
    if pairs not in ("all", "zip") or (pairs == "zip" and len(x) != len(y)):
        raise ValueError("gaussian_wasserstein: pairs must be 'all', or 'zip' for as many x as y, "
                         f"got {pairs!r} for {len(x)} and {len(y)}")
    group = 1 if pairs == "zip" else 0
    x, y, x_mask, y_mask = (None if a is None else a.unsqueeze(group) for a in (x, y, x_mask, y_mask))
    distance = _distances(x, y, x_mask, y_mask, spectral, regularization, 0.0, backend)[0]
    return distance[:, 0, 0] if group else distance[0]


def gaussian_entropy(x: Tensor, *, eps: float = 1e-2, per_dof: bool = True, mask: Tensor | None = None,
                     backend: str | None = None) -> Tensor:
    """Entropies of the Gaussians with the covariances ``S + eps I`` of sets of frames, Eq. 14.

    Args:
        x: ``[B, T, d]``, any floating dtype.
        eps: above 0. The printed entropy is minus infinity without it, since S has a rank below T.
        per_dof: ``log det(I + S / eps) / (2 (T - 1))``, at least 0, and 0 for a static clip and for T = 1; else the
            whole entropy ``1/2 log((2 pi e)^d det(S + eps I))`` in nats.
        mask: ``[B, T]``, bool, true for frames that count; all of them by default.
        backend: as in `gaussian_wasserstein`.

    Returns:
        ``[B]``, in float32, or float64 if given that.
    """
    require_tensors("gaussian_entropy", x=x)
    if x.ndim != 3 or eps <= 0:
        raise ValueError(f"gaussian_entropy: x must be [B, T, d] and eps above 0, got {tuple(x.shape)} and {eps}")
    masks = (None, None) if mask is None else (mask[None], mask[None, :0])
    entropy = gaussian_w2(x[None], x[None, :0], *masks, eps=eps, backend=backend)[1][0]
    if per_dof:
        return entropy
    count = x.shape[1] if mask is None else mask.sum(-1)
    constant = x.shape[2] * math.log(2 * math.pi * math.e * eps) / 2
    return entropy * (torch.as_tensor(count, device=x.device) - 1).clamp(min=1) + constant


def contrast_positives(anchors: Tensor, mode: str = "threshold", *, theta: float = 0.6, theta_low: float = 0.3,
                       k: int = 1) -> tuple[Tensor, Tensor | None]:
    """Which samples of a batch count as positives of one another, from what anchors them. A sample always counts as its
    own.

    Args:
        anchors: ``[B, d]`` features, compared by cosine; for ``"labels"``, ``[B]`` integers.
        mode: ``"diag"``, none but itself; ``"threshold"``, cosine at least ``theta``; ``"band"``, the same, and cosines
            from ``theta_low`` to ``theta`` are neither positive nor negative; ``"topk"``, the ``k`` most similar
            others; ``"labels"``, those of equal label.

    Returns:
        ``positives`` ``[B, B]``, bool, and ``ignored`` ``[B, B]``, bool, or None where nothing is ignored.
    """
    require_tensors("contrast_positives", anchors=anchors)
    B = len(anchors)
    own = torch.eye(B, dtype=torch.bool, device=anchors.device)
    if mode == "diag":
        return own, None
    if mode == "labels":
        return own | (anchors[:, None] == anchors), None
    features = normalize(anchors.detach(), dim=-1)
    cosine = features @ features.mT
    if mode == "threshold":
        return own | (cosine >= theta), None
    if mode == "band":
        positives = own | (cosine >= theta)
        return positives, ~positives & (cosine >= theta_low)
    if mode == "topk":
        nearest = cosine.masked_fill(own, -math.inf).topk(min(k, B - 1)).indices
        return own.scatter(1, nearest, True), None
    raise ValueError("contrast_positives: mode must be 'diag', 'threshold', 'band', 'topk' or 'labels', "
                     f"got {mode!r}")


class _Gather(torch.autograd.Function):
    """Samples of all processes, in their order; each process gets back the sum of all gradients of its own."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def _check_alike(x, y, group):
    """Raise on every process where shapes differ: gathering would hang, or take one sample for another."""
    own = torch.tensor([*x.shape, *y.shape], device=x.device)
    shapes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, own, group=group)
    shapes = [(tuple(shape[:3]), tuple(shape[3:])) for shape in torch.stack(shapes).tolist()]
    if len(set(shapes)) > 1:
        raise ValueError("gw_contrast: x and y must have the same shapes on every process of the group, got "
                         + ", ".join(f"{x} and {y} on process {rank}" for rank, (x, y) in enumerate(shapes)))


def _gather(x, group):
    if x is None or group is None:
        return x
    return _Gather.apply(x, group) if x.is_floating_point() else _Gather.apply(x.to(torch.uint8), group).to(x.dtype)


def _logits(distance, tau, sign):
    if sign not in ("similarity", "paper"):
        raise ValueError(f"gw_contrast: sign must be 'similarity' or 'paper', got {sign!r}")
    if sign == "paper":
        warnings.warn("gw_contrast: sign='paper' is exp(+D/tau) as printed, which drives positives apart", stacklevel=3)
    return distance / (tau if sign == "paper" else -tau)


def _row_losses(logits, positives, ignored=None):
    """-log of the share of the positives in each row; exactly 0 in a row without negatives."""
    every = logits if ignored is None else logits.masked_fill(ignored, -math.inf)
    return torch.logsumexp(every, -1) - torch.logsumexp(every.masked_fill(~positives, -math.inf), -1)


def _check_contrast(op, tau, entropy):
    if tau <= 0 or entropy not in ENTROPY:
        raise ValueError(f"{op}: tau must be above 0 and entropy one of {ENTROPY}, got {tau} and {entropy!r}")


def _in_one_call(backend, x, y, x_mask, y_mask, positives, ignored, spectral, regularization, eps, tau, gamma, entropy,
                 symmetric):
    polar = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    tensors = [t if t is None else t.contiguous() for t in (x, y, x_mask, y_mask, positives, ignored)]
    return call("gw_contrast", backend, *tensors, spectral, float(regularization), float(eps), -1 / tau, float(gamma),
                entropy, symmetric, polar)[0]


def gw_contrast(x: Tensor, y: Tensor, positives: Tensor | str = "diag", *, ignored: Tensor | None = None,
                anchors: Tensor | None = None, theta: float = 0.6, theta_low: float = 0.3, k: int = 1,
                x_mask: Tensor | None = None, y_mask: Tensor | None = None, tau: float = 0.2, gamma: float = 0.1,
                eps: float = 1e-2, entropy: str = "in_distance", symmetric: bool = True, sign: str = "similarity",
                spectral: str = "plain", regularization: float = 1e-2, group=None,
                backend: str | None = None) -> Tensor:
    """Contrast of two modalities by Gaussian Wasserstein distance and entropy, Eq. 15-16:
    ``mean_i log(sum_j exp(-D_ij / tau) / sum_{j in P(i)} exp(-D_ij / tau))``, ``D_ij = W_ij + gamma (h_i + h_j)``.

    Args:
        x, y: ``[B, Tx, d]`` and ``[B, Ty, d]``, sample i of one belonging to sample i of the other. Best unit frames:
            D is then in [0, 4], and ``tau`` does not depend on d.
        positives: ``[B, B]``, bool, or a mode of `contrast_positives`, which builds it (and ``ignored``) from
            ``anchors`` by ``theta``, ``theta_low`` and ``k``. The diagonal must be true.
        ignored: ``[B, B]``, bool, true for pairs that are no negatives either.
        x_mask, y_mask: ``[B, Tx]``, ``[B, Ty]``, bool, true for frames that count; all of them by default.
        tau: temperature of the distances (ours: .1 to .3 is a plateau for unit frames).
        gamma, eps: weight of the entropies per degree of freedom and what is added to covariances in them (ours).
        entropy: ``"in_distance"``, as printed, where the entropy of row i cancels; ``"regularizer"``, gamma times the
            mean entropy of both modalities is added to the loss instead; ``"none"``.
        symmetric: average with the same loss over columns; else x to y alone, as printed.
        sign: ``"similarity"``, exp(-D / tau); ``"paper"``, exp(+D / tau) as printed, which warns: it drives positives
            apart.
        spectral, regularization, backend: as in `gaussian_wasserstein`.
        group: process group whose samples are contrasted together, process r holding rows r B .. r B + B - 1 of the
            whole; shapes must be alike on all of them, which they first tell one another (six integers, and the device
            is waited for): else every process raises. ``positives`` and ``ignored`` are then of the whole batch,
            ``anchors`` of this process. Frames are gathered with gradient, so that the mean of the processes'
            gradients, as DDP forms it, is that of the same loss in one process, whose value every process returns.

    Returns:
        0-dimensional. Rows without negatives count as exactly 0, without gradient.
    """
    eps = eps if entropy != "none" and gamma else 0.0
    settings = spectral, regularization, eps, tau, gamma, entropy, symmetric
    diagonal, signature, chosen = isinstance(positives, str) and positives == "diag", None, None
    pairs = (None, None) if diagonal else (positives, ignored)
    constant = not any(isinstance(setting, Tensor) for setting in settings)  # a temperature may be learned
    one_call = constant and group is None and sign == "similarity" and not torch.compiler.is_compiling()
    if one_call and (diagonal or isinstance(positives, Tensor)):
        given = [t is None for t in (x_mask, y_mask, *pairs)]
        tensors = [t for t in (x, y, x_mask, y_mask, *pairs) if t is not None]
        signature, chosen = recall("gw_contrast", backend, (*settings, *given), *tensors)
    if chosen is not None:
        return _in_one_call(chosen, x, y, x_mask, y_mask, *pairs, *settings)
    require_tensors("gw_contrast", x=x, y=y)
    _check_contrast("gw_contrast", tau, entropy)
    if group is not None and lost_by_kernels((x, y, anchors)):
        raise RuntimeError("gw_contrast: samples are gathered from a group with gradients alone; forward-mode "
                           "derivatives and the transforms of torch.func need group=None")
    if group is not None and x.ndim == y.ndim == 3:  # first, as a process that raises alone leaves the others waiting
        _check_alike(x, y, group)
    if x.ndim != 3 or y.ndim != 3 or len(x) != len(y) or not len(x):
        raise ValueError("gw_contrast: x and y must be [B, Tx, d] and [B, Ty, d] with B alike and above 0, "
                         f"got {tuple(x.shape)} and {tuple(y.shape)}")
    B, rank = len(x), dist.get_rank(group) if group is not None else 0
    total = B * (dist.get_world_size(group) if group is not None else 1)
    if isinstance(positives, str):
        if positives != "diag" and anchors is None:
            raise ValueError(f"gw_contrast: positives={positives!r} needs anchors, one per sample")
        anchors = x.new_zeros(total, 1) if positives == "diag" else _gather(anchors.detach(), group)
        positives, ignored = contrast_positives(anchors, positives, theta=theta, theta_low=theta_low, k=k)
    for name, mask in (("positives", positives), ("ignored", ignored)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (total, total)):
            raise ValueError(f"gw_contrast: {name} must be bool and {(total, total)}, "
                             f"got {mask.dtype} and {tuple(mask.shape)}")
    options = spectral, regularization, eps, backend
    if one_call:
        grouped = [None if z is None else z[None] for z in (x, y, x_mask, y_mask)]
        chosen = _choose(*grouped, *options)
        if chosen in IMPLEMENTED["gw_contrast"] and spectral != "entropic" and x.dtype == y.dtype:
            remember(signature, chosen)
            return _in_one_call(chosen, x, y, x_mask, y_mask, *((None, None) if diagonal else (positives, ignored)),
                                *settings)

    def compare(x, y, x_mask, y_mask):
        """Logits [Bx, By] and the entropies of x and y."""
        distance, x_entropy, y_entropy = (
            z[0] for z in _distances(*(None if z is None else z[None] for z in (x, y, x_mask, y_mask)), *options))
        if entropy == "in_distance" and eps:
            distance = distance + gamma * (x_entropy[:, None] + y_entropy)
        return _logits(distance, tau, sign), x_entropy, y_entropy

    own = slice(rank * B, rank * B + B)
    masks = [positives] if ignored is None else [positives, ignored & ~positives]
    logits, x_entropy, y_entropy = compare(x, _gather(y, group), x_mask, _gather(y_mask, group))  # [B, total]
    rows = [mask[own] for mask in masks]
    if symmetric:
        columns = logits if group is None else compare(_gather(x, group), y, _gather(x_mask, group), y_mask)[0]
        logits = torch.cat([logits, columns.mT])  # [2 B, total]
        rows = [torch.cat([mask, mask_of_all[:, own].mT]) for mask, mask_of_all in zip(rows, masks, strict=True)]
    loss = _row_losses(logits, *rows).mean()
    if entropy == "regularizer" and eps:
        loss = loss + gamma * (x_entropy.mean() + y_entropy.mean()) / 2
    if group is None:
        return loss
    whole = loss.detach().clone()
    dist.all_reduce(whole, group=group)
    return loss + (whole / dist.get_world_size(group) - loss.detach())


def gw_text_contrast(x: Tensor, z: Tensor, counterfactuals: Tensor, weights: Tensor | None = None, *,
                     x_mask: Tensor | None = None, z_mask: Tensor | None = None,
                     counterfactual_mask: Tensor | None = None, tau: float = 0.2, gamma: float = 0.1, eps: float = 1e-2,
                     entropy: str = "in_distance", sign: str = "similarity", spectral: str = "plain",
                     regularization: float = 1e-2, backend: str | None = None) -> Tensor:
    """Contrast of samples with their text against their own counterfactual texts, Eq. 17:
    ``mean_i log(1 + sum_k w_ik exp((D(x_i, z_i) - D(x_i, c_ik)) / tau))``.

    Args:
        x: ``[B, T, d]``; z: ``[B, Tz, d]``; counterfactuals: ``[B, K, Tc, d]``.
        weights: ``[B, K]``, w above, not below 0; 1 / K by default.
        x_mask, z_mask, counterfactual_mask: ``[B, T]``, ``[B, Tz]``, ``[B, K, Tc]``, bool, true for frames that count.
        tau, gamma, eps, entropy, sign, spectral, regularization, backend: as in `gw_contrast`.

    Returns:
        0-dimensional; 0 for K = 0. Differentiable in ``weights`` too.
    """
    require_tensors("gw_text_contrast", x=x, z=z, counterfactuals=counterfactuals)
    _check_contrast("gw_text_contrast", tau, entropy)
    B, K = counterfactuals.shape[:2]
    if x.ndim != 3 or z.ndim != 3 or counterfactuals.ndim != 4 or not len(x) == len(z) == B or not B:
        raise ValueError("gw_text_contrast: x, z and counterfactuals must be [B, T, d], [B, Tz, d] and [B, K, Tc, d] "
                         f"with B alike and above 0, got {tuple(x.shape)}, {tuple(z.shape)} and "
                         f"{tuple(counterfactuals.shape)}")
    if weights is not None and weights.shape != (B, K):
        raise ValueError(f"gw_text_contrast: weights must be {(B, K)}, got {tuple(weights.shape)}")
    texts, mask = _join(z[:, None], counterfactuals, z_mask, counterfactual_mask)  # [B, 1 + K, Tz or Tc, d]
    eps = eps if entropy != "none" and gamma else 0.0
    distance, x_entropy, y_entropy = _distances(
        x[:, None], texts, None if x_mask is None else x_mask[:, None], mask, spectral, regularization, eps, backend)
    distance = distance[:, 0]  # [B, 1 + K]
    if entropy == "in_distance" and eps:
        distance = distance + gamma * (x_entropy + y_entropy)
    logits = _logits(distance, tau, sign)
    if weights is None:
        weights = torch.full((B, K), 1 / max(K, 1), dtype=logits.dtype, device=logits.device)
    log_weights = weights.to(logits.dtype).clamp(min=torch.finfo(logits.dtype).tiny).log()
    loss = (torch.logsumexp(logits + pad(log_weights, (1, 0)), -1) - logits[:, 0]).mean()
    if entropy == "regularizer" and eps:
        loss = loss + gamma * (x_entropy.mean() + y_entropy.mean()) / 2
    return loss


def _join(z, counterfactuals, z_mask, counterfactual_mask):
    """The texts in one tensor, the shorter ones padded, and the mask that this needs."""
    T = max(z.shape[2], counterfactuals.shape[2])
    if z.shape[2] == counterfactuals.shape[2] and z_mask is None and counterfactual_mask is None:
        return torch.cat([z, counterfactuals], 1), None
    frames, masks = [], []
    for text, mask in ((z, None if z_mask is None else z_mask[:, None]), (counterfactuals, counterfactual_mask)):
        missing = T - text.shape[2]
        mask = torch.ones(text.shape[:3], dtype=torch.bool, device=text.device) if mask is None else mask
        frames.append(pad(text, (0, 0, 0, missing)))
        masks.append(pad(mask, (0, missing)))
    return torch.cat(frames, 1), torch.cat(masks, 1)
