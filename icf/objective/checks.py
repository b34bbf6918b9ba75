"""What a foreign model may hand the objective wrongly, each told in a line that names the argument."""
from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple
from warnings import warn

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from icf.config import CDCLConfig, MITConfig, ObjectiveConfig, SCConfig


def check_config(config: ObjectiveConfig) -> None:
    """Raise TypeError where a section is no object of its class, ValueError where settings contradict one another."""
    sections = {"config": (config, ObjectiveConfig)}
    if isinstance(config, ObjectiveConfig):
        sections = {"config.mit": (config.mit, MITConfig), "config.sc": (config.sc, SCConfig),
                    "config.cdcl": (config.cdcl, CDCLConfig)}
    for name, (section, kind) in sections.items():
        if not isinstance(section, kind):
            raise TypeError(f"{name}: expected icf.{kind.__name__}, got {type(section).__name__}; write "
                            "icf.ObjectiveConfig(mit=icf.MITConfig(texts=15))")
    config.check()


def check_features(name: str, x: Tensor, clips: Sequence[int] | None, channels: int, ndim: int) -> Tensor:
    """Features [B,T,C,H,W] or [B,T,D] in float32. clips: B and T; None: any."""
    shape = "[B,T,C,H,W]" if ndim == 5 else "[B,T,D]"
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor {shape}, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != ndim or clips is not None and [*x.shape[:2]] != [*clips]:
        wanted = "" if clips is None else f" with B, T = {[*clips]} as audio has"
        raise ValueError(f"{name}: expected {shape}{wanted}, got {list(x.shape)}")
    if x.shape[2] != channels:
        raise ValueError(f"{name}: expected {channels} channels, as the objective was built for, got {x.shape[2]} in "
                         f"{list(x.shape)}")
    return x.float()


def check_masks(clips: Sequence[int], frame_mask: Tensor | None, visual_mask: Tensor | None, negative: Tensor | None,
                values: bool) -> None:
    """Shapes and types, and, where `values` are to be looked at, which waits for the device, that seconds that exist
    come first and probabilities are some."""
    for name, x, shape in (("frame_mask", frame_mask, [*clips]), ("negative", negative, [clips[0]])):
        if x is not None and (list(x.shape) != shape or x.dtype != torch.bool):
            raise ValueError(f"{name}: expected bool {shape}, got {x.dtype} {list(x.shape)}")
    if visual_mask is not None:
        if visual_mask.ndim != 5 or [*visual_mask.shape[:3]] != [*clips, 1] or not visual_mask.is_floating_point():
            raise ValueError(f"visual_mask: expected floating [{clips[0]},{clips[1]},1,h,w], got {visual_mask.dtype} "
                             f"{list(visual_mask.shape)}")
        if values and visual_mask.numel() and ((visual_mask < 0) | (visual_mask > 1)).any():
            low, high = visual_mask.aminmax()
            raise ValueError(f"visual_mask: expected probabilities from 0 to 1, got {low:.3g} to {high:.3g}; of logits "
                             "give visual_mask.sigmoid()")
    if values and frame_mask is not None and (frame_mask[:, 1:] & ~frame_mask[:, :-1]).any():
        clip = int((frame_mask[:, 1:] & ~frame_mask[:, :-1]).any(1).nonzero()[0])
        raise ValueError(f"frame_mask: expected seconds that exist before those that do not, got "
                         f"{frame_mask[clip].int().tolist()} for clip {clip}")


class Seen(NamedTuple):
    """Of an objective: optimisers that have stepped, and the ids of all their parameters."""

    optimizers: weakref.WeakSet
    parameters: set[int]


_UNSURE: weakref.WeakKeyDictionary[nn.Module, Seen] = weakref.WeakKeyDictionary()   # whose parameters may be in none


def warn_of_untrained(objective: nn.Module) -> None:
    """Warn once where an optimiser steps a second time, and parameters of `objective` that have a gradient were in none
    that has stepped. Looked at after the steps of optimisers only, until all were seen or warned of."""
    _UNSURE[objective] = Seen(weakref.WeakSet(), set())
    _watch_optimizers()


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_look)        # stays: a hook cannot remove itself while torch goes through them


def _look(optimizer: Optimizer, *_) -> None:
    if torch.compiler.is_compiling():
        return
    for objective, seen in [*_UNSURE.items()]:
        reached = {id(p): p for p in objective.parameters() if p.grad is not None}
        seen.parameters.update(id(p) for group in optimizer.param_groups for p in group["params"])
        missing = [p for key, p in reached.items() if key not in seen.parameters]
        if not reached or missing and optimizer not in seen.optimizers:     # not trained yet; another may step next
            seen.optimizers.update([optimizer] if reached else [])
            continue
        del _UNSURE[objective]
        if missing:
            warn(f"ICFObjective: {sum(p.numel() for p in missing):,} parameters that have a gradient are in no "
                 "optimiser that was stepped, so they are not trained; add [p for p in objective.parameters() if "
                 "p.requires_grad] to yours (docs/objective.md)", stacklevel=2)
