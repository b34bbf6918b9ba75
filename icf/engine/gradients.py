"""How strongly each term of the loss pulls at each part of the model."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from icf.model.losses import Losses

PARTS = {"encoder": ("visual.", "audio.", "context."), "mit": ("objective.levels.", "objective.mit."),
         "sc": ("objective.sc.",), "cdcl": ("objective.cdcl.",)}
"""Parts by the names of their parameters; what is left is the decoder."""


def gradient_norms(model: nn.Module, losses: Losses) -> dict[str, Tensor]:
    """Norms of the gradients of the total and of every term, as it is before its weight, into every part that has
    parameters to train: `grad/<term>/<part>`, 0-dim.

    To be called between forward and backward of the same step; no gradient is left behind, nothing else changes.
    """
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part, prefixes in PARTS.items() if name.startswith(prefixes)), "decoder")
            parts.setdefault(part, []).append(parameter)
    norms = {}
    for term, value in {"total": losses.total, **losses.terms}.items():
        if not value.requires_grad:
            continue
        gradients = iter(torch.autograd.grad(value, [p for group in parts.values() for p in group], retain_graph=True,
                                             allow_unused=True))
        for part, group in parts.items():
            own = [g.float().norm() for g in (next(gradients) for _ in group) if g is not None]
            norms[f"grad/{term}/{part}"] = torch.stack(own).norm() if own else value.new_zeros(())
    return norms
