"""Segmentation losses, Eq. 18, for the dense and the matched (Mask2Former) head, and the record of named terms."""
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

IGNORE = 255
NO_OBJECT = 0.1
"""Weight of queries without a mask in the class term *(COMBO)*."""
OBJECTIVE = "objective"
"""The part of the losses that is beside segmentation."""
FOCUS = 2
"""Exponent of focal losses, as published."""


class Losses(NamedTuple):
    """What a training step returns, all 0-dim.

    Args:
        parts: weighted, by name; their sum is differentiated.
        terms: by name, without weights, and statistics.
    """

    parts: dict[str, Tensor]
    terms: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        return sum(self.parts.values())

    def __add__(self, other: dict[str, Tensor]) -> Losses:
        """With the terms of an objective, whose `total` is one more part."""
        terms = {name: value for name, value in other.items() if name != "total"}
        return Losses({**self.parts, OBJECTIVE: other["total"]}, {**self.terms, **terms})

    def shared(self, shares: Mapping[str, Tensor]) -> Losses:
        """Parts and terms times their shares, by name; those without a share of their own have the objective's. Without
        any shares, the losses as they are."""
        return Losses(*({name: value * shares.get(name, shares[OBJECTIVE]) for name, value in values.items()}
                        for values in self)) if shares else self

    def detached(self) -> dict[str, Tensor]:
        """`total` and the terms without graph, still on their device."""
        return {name: value.detach() for name, value in {"total": self.total, **self.terms}.items()}


def dense_losses(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """BCE, dice and focal loss of one foreground, each the mean over frames, summed over heads; 0 without frames.

    Args:
        logits: [P,N,1,h,w] of P heads, enlarged to the size of the masks.
        masks: [N,H,W] uint8, 0/1, 255 where it is not known.
    """
    n = len(masks)
    known = (masks != IGNORE).float()                                                                   # [N, H, W]
    target = (masks == 1).float()
    x = _enlarge(logits.float(), masks)[:, :, 0]                                                        # [P, N, H, W]
    entropy = (F.softplus(x) - x * target) * known
    probability = x.sigmoid() * known
    count = known.sum().clamp(min=1)
    target = target.expand_as(x)
    return {"bce": entropy.sum() / count,
            "dice": _dice(probability.flatten(2), target.flatten(2)).sum() / max(n, 1),
            "focal": _focal(entropy, target).sum() / count}


def class_losses(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Cross entropy of classes, the mean over pixels, summed over heads; 0 where no pixel is known.

    Args:
        logits: [P,N,K,h,w] of P heads, enlarged to the size of the masks.
        masks: [N,H,W] uint8, class index, 255 where it is not known.
    """
    x = _enlarge(logits.float(), masks).flatten(0, 1)                                                   # [P*N, K, H, W]
    error = F.cross_entropy(x, masks.long().repeat(len(logits), 1, 1), ignore_index=IGNORE, reduction="sum")
    return {"ce": error / (masks != IGNORE).sum().clamp(min=1)}


def matched_losses(class_logits: Tensor, mask_logits: Tensor, masks: Tensor,
                   preset: str = "paper") -> dict[str, Tensor]:
    """Class, BCE and dice terms after Hungarian matching of queries to the classes of a frame, summed over heads.

    Costs are 2 class, 5 BCE, 5 dice; terms of masks are means over the matched pairs. A mask is compared at a quarter
    as many points as it has pixels, 12,544 at 224 x 224 *(COMBO)*: random ones for matching, for the loss three
    quarters of them where the prediction is least certain. Points that are not known do not count, nor do frames of
    which nothing is known. What is trained is what is read, a softmax over classes.

    Args:
        class_logits: [P,N,Q,K+1] of P heads, the last for "no object".
        mask_logits: [P,N,Q,h,w].
        masks: [N,H,W] uint8, class index; with K = 1, 0/1 and only foreground is matched. 255 where it is not known.
        preset: the class term `focal`, (1 - p)^2 (-log p), with `paper`, `ce` with `combo`.
    """
    mask_logits, class_logits = mask_logits.float(), class_logits.float()
    classes = class_logits.shape[-1] - 1
    points = masks.shape[1] * masks.shape[2] // 4
    labels, targets = _targets(masks, classes)                              # [N, G] (-1: none), [N, G, H, W]
    known = (masks != IGNORE).float()[:, None]                              # [N, 1, H, W]
    pairs = _match(class_logits, mask_logits, labels, targets, points, known)   # [P, 3, R]: frame, query, mask
    pairs_count = max(1, pairs.shape[2])
    name = "focal" if preset == "paper" else "ce"
    zero = mask_logits.sum() * 0                                            # keeps the graph where nothing is matched
    terms = {name: class_logits.sum() * 0, "bce": zero, "dice": zero}
    for scores, logits, (frame, query, mask) in zip(class_logits, mask_logits, pairs, strict=True):
        wanted = torch.full(scores.shape[:2], classes, device=scores.device)
        wanted[frame, query] = labels[frame, mask]
        weight = torch.where(wanted == classes, NO_OBJECT, 1.0) * known.amax((1, 2, 3))[:, None]        # [N, Q]
        error = F.cross_entropy(scores.transpose(1, 2), wanted, reduction="none")
        if preset == "paper":
            error = (-torch.expm1(-error)) ** FOCUS * error
        terms[name] = terms[name] + (weight * error).sum() / weight.sum().clamp(min=NO_OBJECT)
        if pairs.shape[2]:
            x, target, counts = _uncertain_points(logits[frame, query], targets[frame, mask], known[frame, 0], points)
            entropy = F.binary_cross_entropy_with_logits(x, target, counts, reduction="sum")
            terms["bce"] = terms["bce"] + entropy / counts.sum().clamp(min=1)
            terms["dice"] = terms["dice"] + _dice(x.sigmoid() * counts, target * counts).sum() / pairs_count
    return terms


def _enlarge(logits: Tensor, masks: Tensor) -> Tensor:
    """[P,N,K,h,w] at the size of the masks: [P,N,K,H,W]."""
    x = F.interpolate(logits.flatten(0, 1), size=masks.shape[1:], mode="bilinear", align_corners=False)
    return x.unflatten(0, logits.shape[:2])


def dense_counts(masks: Tensor) -> dict[str, Tensor]:
    """What each term of :func:`dense_losses`, a mean, counts: pixels or frames of masks [N,H,W]."""
    known = (masks != IGNORE).sum()
    return {"bce": known, "dice": known.new_tensor(len(masks)), "focal": known}


def class_counts(masks: Tensor) -> dict[str, Tensor]:
    """What :func:`class_losses` counts: pixels of masks [N,H,W]."""
    return {"ce": (masks != IGNORE).sum()}


def matched_counts(masks: Tensor, classes: int, queries: int) -> dict[str, Tensor]:
    """What each term of :func:`matched_losses` counts: matched pairs of masks [N,H,W] and queries, and the weights of
    all queries of frames of which something is known. Where pixels are not known, those of `bce` are near enough."""
    first = 1 if classes == 1 else 0
    present = torch.zeros(len(masks), 256, dtype=torch.bool, device=masks.device)
    present.scatter_(1, masks.flatten(1).long(), True)
    pairs = present[:, first:first + classes].sum(1).clamp(max=queries).sum()
    rest = present[:, :IGNORE].any(1).sum() * queries - pairs
    return {"ce": pairs + NO_OBJECT * rest, "focal": pairs + NO_OBJECT * rest, "bce": pairs, "dice": pairs}


def _dice(probability: Tensor, target: Tensor) -> Tensor:
    """1 - (2 |p t| + 1) / (|p| + |t| + 1) over the last axis; an empty mask met by an empty prediction costs 0."""
    overlap = (probability * target).sum(-1)
    return 1 - (2 * overlap + 1) / (probability.sum(-1) + target.sum(-1) + 1)


def _focal(entropy: Tensor, target: Tensor, alpha: float = 0.25, gamma: int = FOCUS) -> Tensor:
    """Sigmoid focal loss from the binary cross entropy -log p_t: alpha_t (1 - p_t)^gamma (-log p_t)."""
    return ((1 - alpha) + (2 * alpha - 1) * target) * (-torch.expm1(-entropy)) ** gamma * entropy


def _targets(masks: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Classes present in each frame, [N,G] int64 filled up with -1, and their masks, [N,G,H,W] float32."""
    first = 1 if classes == 1 else 0
    present = torch.zeros(len(masks), 256, dtype=torch.bool, device=masks.device)
    present.scatter_(1, masks.flatten(1).long(), True)
    rows = [row.nonzero()[:, 0] for row in present[:, first:first + classes].cpu()]
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1) if rows else torch.empty(
        0, 0, dtype=torch.int64)
    labels = labels.to(masks.device)
    return labels, (masks[:, None] == torch.where(labels < 0, -1, labels + first)[..., None, None]).float()


@torch.no_grad()
def _match(class_logits: Tensor, mask_logits: Tensor, labels: Tensor, targets: Tensor, points: int,
           known: Tensor | None = None) -> Tensor:
    """Pairs of least cost for every head: [P,3,R] int64, rows frame, query, mask. The costs leave the device once."""
    grid = 2 * torch.rand(len(targets), 1, points, 2, device=targets.device) - 1
    target = _sample(targets, grid)                                                                     # [N, G, X]
    counts = torch.ones_like(grid[:, :, :, 0]) if known is None else _sample(known, grid)               # [N, 1, X]
    number = counts.sum(-1, keepdim=True).clamp(min=1)                                                  # [N, 1, 1]
    costs = []
    for scores, logits in zip(class_logits, mask_logits, strict=True):
        x = _sample(logits, grid)                                                                       # [N, Q, X]
        overlap = x.sigmoid() @ target.transpose(1, 2)                                                  # [N, Q, G]
        found = (x.sigmoid() * counts).sum(-1)[..., None]
        dice = 1 - (2 * overlap + 1) / (found + target.sum(-1)[:, None] + 1)
        entropy = ((F.softplus(x) * counts).sum(-1)[..., None] - x @ target.transpose(1, 2)) / number
        wanted = labels.clamp(min=0)[:, None].expand(-1, scores.shape[1], -1)
        costs.append(5 * dice + 5 * entropy - 2 * scores.softmax(-1).gather(2, wanted))
    costs = torch.stack(costs).cpu()                                                                    # [P, N, Q, G]
    counts = (labels >= 0).sum(1).tolist()
    heads = []
    for head in costs.numpy():
        pairs = [(n, *pair) for n, (cost, count) in enumerate(zip(head, counts, strict=True))
                 for pair in zip(*linear_sum_assignment(cost[:, :count]), strict=True)]
        heads.append(torch.tensor(pairs, dtype=torch.int64).view(-1, 3).T)
    return torch.stack(heads).to(labels.device)


def _uncertain_points(logits: Tensor, targets: Tensor, known: Tensor, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and targets of R masks at points, and how far each is known, [R,X]. Three quarters are the least certain
    of `3 points`."""
    n, certain = len(logits), points - 3 * points // 4
    with torch.no_grad():
        grid = 2 * torch.rand(n, 1, 3 * points, 2, device=logits.device) - 1
        nearest = _sample(logits[:, None], grid)[:, 0].abs().topk(points - certain, 1, largest=False).indices
        chosen = grid[:, 0].gather(1, nearest[..., None].expand(-1, -1, 2))
        grid = torch.cat([chosen, 2 * torch.rand(n, certain, 2, device=logits.device) - 1], 1)[:, None]
        target, counts = _sample(torch.stack([targets, known], 1), grid).unbind(1)
    return _sample(logits[:, None], grid)[:, 0], target, counts


def _sample(maps: Tensor, grid: Tensor) -> Tensor:
    """maps: [N,C,H,W]; grid: [N,1,X,2] in -1..1 -> [N,C,X], bilinear."""
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)[:, :, 0]
