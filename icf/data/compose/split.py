"""Which picture and which recording goes into which split: never into two, and no near-duplicate of it either."""
from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from icf.data.avsbench import SPLITS

SHARES = (0.7, 0.1, 0.2)  # of train, val and test, whatever the numbers of clips: the same seed, the same split
NEAR = 0.2  # share of different places up to which two prints are of one picture or sound; by chance it is 0.5
LEAST = 64  # places that two prints must know to be compared
FEW = 3  # members of a group, below which it is split together with other such groups


def order(seed: int, key: str) -> bytes:
    """What to sort by for an order that looks random and depends on nothing else."""
    return hashlib.sha256(f"{seed} {key}".encode()).digest()


def assign(groups: Iterable[tuple[Hashable, str]], seed: int, wanted: Sequence[bool] = (True,) * 3) -> dict[str, str]:
    """The split of every key, so that each group of keys is shared out by `SHARES`, and all splits have some of each
    group of three keys or more.

    Args:
        groups: group and key; a key that comes again stays in its first group.
        seed: of the order.
        wanted: whether there is a train, val and test split.
    """
    members: dict[Hashable, list[str]] = defaultdict(list)
    for key, group in {key: group for group, key in reversed(list(groups))}.items():
        members[group].append(key)
    rest = [key for keys in members.values() if len(keys) < FEW for key in keys]
    shares = np.where(wanted, SHARES, 0) / np.where(wanted, SHARES, 0).sum()
    splits = {}
    for keys in [keys for keys in members.values() if len(keys) >= FEW] + [rest]:
        counts = np.zeros(len(SPLITS))
        for place, key in enumerate(sorted(keys, key=lambda key: order(seed, key)), start=1):
            lacking = shares * place - counts + ((counts == 0) & (shares > 0))  # first of all, one for each
            chosen = int(lacking.argmax())
            counts[chosen] += 1
            splits[key] = SPLITS[chosen]
    return splits


def without_duplicates(prints: dict[str, list[NDArray]]) -> dict[str, list[bool]]:
    """Which members of every split may stay: those near to none that stays in another; the test split keeps most.

    Args:
        prints: [places] of 1, -1 and 0 (not known) of every member, or [variants,places], of which the first is
            compared with all variants of others.
    """
    kept: dict[str, list[bool]] = {}
    for split in sorted(prints, key=("test", "val", "train").index):
        fine = np.ones(len(prints[split]), dtype=bool)
        for other, stays in kept.items():
            others = [variant for print, stay in zip(prints[other], stays, strict=True) if stay
                      for variant in np.atleast_2d(print)]
            fine &= ~_near([np.atleast_2d(print)[0] for print in prints[split]], others)
        kept[split] = fine.tolist()
    return kept


def _near(prints: list[NDArray], others: list[NDArray]) -> NDArray:
    """Whether each of N prints differs in at most `NEAR` of its places from one of the others, [N] bool."""
    if not prints or not others:
        return np.zeros(len(prints), dtype=bool)
    a, b = np.stack(prints).astype(np.float32), np.stack(others).astype(np.float32)
    near = []
    for block in np.array_split(a, len(a) // 512 + 1):
        known = np.abs(block) @ np.abs(b).T
        alike = block @ b.T >= (1 - 2 * NEAR) * known  # agreement less disagreement
        near.append((alike & (known >= LEAST)).any(axis=1))
    return np.concatenate(near)
