"""The machine a command runs on: processors it may use, devices, and threads that do not get in others' way.

Imported before torch, and light: the standard library only.
"""
from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")

WAIT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "30000", "KMP_BLOCKTIME": "0"}
"""OpenMP's threads (GNU's, Intel's) spin for microseconds while they wait for one another, then sleep. By default they
spin on, which takes the processor from whom they wait for where the machine is busy, and makes everything many times
slower; not to spin at all makes the toy's step half as long again where it is idle."""


def prepare_threads() -> None:
    """Set what OpenMP reads when torch is loaded, where the user has not: how to wait, and how many threads, where a
    container may use fewer processors than it sees."""
    for name, value in WAIT.items():
        os.environ.setdefault(name, value)
    if processors() < _visible() and "MKL_NUM_THREADS" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", str(processors()))


def processors() -> int:
    """How many this process may use: those it is bound to, fewer where a control group has less time, at least one."""
    return max(1, min([_visible(), *(math.ceil(quota) for quota in _quotas())]))


def readers(workers: int | None) -> int:
    """Loader processes: `workers`, or for None as many as leave the processes of this machine their processors."""
    return min(4, processors() // (2 * int(os.getenv("LOCAL_WORLD_SIZE", "1")))) if workers is None else workers


def ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """`items`, made by a thread up to `depth` of them ahead of their use. What fails there is raised in its place."""
    source, end, pool = iter(items), object(), ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(next, source, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, source, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def _visible() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux alone
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path = Path("/")) -> Iterator[float]:
    """Processors' time per time, of every control group that this process is in and that has a limit (Linux alone).

    Within a container the group's own path may not be visible, its files are then those of the mount itself.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        mount = root / "sys/fs/cgroup" / controllers                                # version 2 names no controller
        if controllers and not mount.is_dir():
            mount = root / "sys/fs/cgroup/cpu"
        group = mount / path.lstrip("/")
        for folder in (mount, *(f for f in (group, *group.parents) if mount in f.parents)):
            quota, period = _read(folder / "cpu.max").split() or (
                _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip())
            if quota.isdecimal() and period.isdecimal() and int(period):            # `max` and -1: no limit
                yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def pick_device(name: str | None) -> str:
    """The device asked for, or an accelerator if there is one, as torch names it.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator.type if accelerator else "cpu"
    here = ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()) if accelerator)]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or f"{device.type}:{device.index or 0}" not in (*here, "cpu:0"):
        raise ValueError(f"device: expected one of {', '.join(here)}, which is what torch finds here, got {name!r}")
    return name
