"""What a command says before it starts, and what came out of it and where: a few lines, of the first process alone."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sized
from pathlib import Path

import torch
from torch import nn

from icf import __version__
from icf.config import Config
from icf.engine.score_tables import modes_named
from icf.ops import fastest

ONE_PROCESS = ("accelerate launch starts one process on a machine without a GPU, whatever --num_processes says; "
               "torchrun --nproc-per-node N -m icf.cli train .. starts N")


def started(what: str, out: Path, device: torch.device | str, processes: int = 1, **lines: str) -> str:
    """The head of a command: what it does and where its results go, the machine, the operators, and further lines."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = f", {torch.get_num_threads()} threads each" if device.type == "cpu" else ""
    rows = {"device": f"{name}; {processes} {'process' if processes == 1 else 'processes'}{threads}",
            "operators": ", ".join(f"{room} {backend}" for room, backend in fastest(device.type).items()), **lines}
    return "\n".join([f"icf {__version__}: {what} -> {out}", *(f"  {key:11}{value}" for key, value in rows.items())])


def training(cfg: Config, model: nn.Module, splits: Mapping[str, Sized], processes: int) -> dict[str, str]:
    """Of a training run: precision and effective batch, clips, parameters."""
    train, batch = cfg.train, cfg.train.batch * cfg.train.accumulate * processes
    factors = " x ".join(f"{n} {what}" for n, what in ((train.batch, "clips"), (train.accumulate, "accumulated"),
                                                       (processes, "processes")) if n > 1 or what == "clips")
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return {"step": f"{batch} clips ({factors}), {'float32' if train.amp == 'no' else train.amp}, seed {train.seed}",
            "clips": ", ".join(f"{len(data)} {split}" for split, data in splits.items()),
            "parameters": f"{counts[True] / 1e6:.2f} M trained, {counts[False] / 1e6:.2f} M frozen"}


def launched_alone() -> bool:
    """Whether `accelerate launch` has started this process and no other."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ \
        and not torch.accelerator.is_available()


def scores_in_words(results: dict) -> str:
    """The headline: J, F and their modes, and what tells whether the model listens."""
    words = (f"J {results['J']:.3f} and F {results['F']:.3f} ({modes_named(results['default_modes'])}) on "
             f"{results['counts']['clips']} {results['split']} clips")
    if "shuffled" in results["negatives"]:
        words += f"; J {results['negatives']['shuffled']['J']:.3f} with another clip's sound"
    return words


def trained(run: Path, weights: Path, results: dict) -> str:
    """The end of a training run."""
    return "\n".join([
        scores_in_words(results), f"report: {run / 'report.html'}", f"best weights: {weights}",
        f"next: icf predict CLIP.mp4 --weights {run}", f"      icf compare {run} OTHER_RUN"])
