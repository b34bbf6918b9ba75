"""What a call costs beside the work: tiny inputs, all versions in turn in one process, medians in microseconds.

    python benchmarks/bench_calls.py [--seconds 5]

`peer` is torch-ms-deform-attn (pip install torch-ms-deform-attn), `grid_sample` the composition of Deformable DETR.
"""
import argparse
import random
import statistics
import time

import torch

from icf.ops import (
    gaussian_wasserstein,
    gram_schmidt,
    gw_contrast,
    ms_deform_attn,
    ms_deform_attn_fused,
    orthogonal_blend,
)
from icf_kernels._common.testing import require_grad
from icf_kernels.ms_deform_attn.cases import by_grid_sample, make_inputs

try:
    from torch_ms_deform_attn import ms_deform_attn as peer
except ImportError:
    peer = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = (1, 2, 1, 4, 1, 2, 2, "uniform")  # as in cases.py of ms_deform_attn


def implementations():
    """Name -> (function, arguments), what is compared side by side."""
    attention, fused = make_inputs(TINY, torch.float32, DEVICE), make_inputs(TINY, torch.float32, DEVICE, fused=True)
    shapes = torch.tensor(attention[1], device=DEVICE)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    clips = torch.nn.functional.normalize(torch.randn(2, 2, 3, 4, device=DEVICE), dim=-1)
    z, ratio = torch.randn(120, 256, device=DEVICE), torch.full((120,), 0.3, device=DEVICE)
    row = torch.randn(8, 1, 64, device=DEVICE)
    runs = {"ms_deform_attn": (ms_deform_attn, attention), "ms_deform_attn_fused": (ms_deform_attn_fused, fused),
            "grid_sample": (by_grid_sample, attention),
            "gaussian_wasserstein": (gaussian_wasserstein, tuple(clips)), "gw_contrast": (gw_contrast, tuple(clips)),
            "orthogonal_blend 120x256": (orthogonal_blend, (z, ratio)),
            "orthogonal_blend 120x256, eager": (blend_as_published, (z, ratio)),
            "gram_schmidt 8x1x64": (gram_schmidt, (row,)), "qr 8x1x64": (lambda x: torch.linalg.qr(x.mT)[0].mT, (row,))}
    if peer is not None:
        runs["peer"] = (lambda v, _, __, xy, a: peer(v, shapes, starts, xy, a), attention)
    return runs


def blend_as_published(z, ratio):
    """Eq. 7 and 8 as one writes them in PyTorch."""
    unit, noise = torch.nn.functional.normalize(z, dim=-1), torch.randn_like(z)
    u = torch.nn.functional.normalize(noise - (noise * unit).sum(-1, keepdim=True) * unit, dim=-1)
    return (1 - ratio).sqrt()[:, None] * unit + ratio.sqrt()[:, None] * u


def steps(function, args):
    """A call without gradients, and one with its backward."""
    def forward():
        with torch.no_grad():
            function(*args)

    def forward_backward():
        torch.autograd.grad(function(*with_grad), leaves, grad)

    with_grad, leaves = require_grad(args)
    grad = torch.ones_like(function(*with_grad))
    return {"forward": forward, "forward and backward": forward_backward}


def medians(runs, seconds):
    """Median time of each in microseconds, one call of each in turn: short enough to be rarely interrupted, and in
    an order that changes, since what ran before leaves caches warm or cold."""
    times = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in random.sample([*runs.items()], len(runs)):
            started = time.perf_counter()
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - started) * 1e6)
    return {name: statistics.median(taken[10:]) for name, taken in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="to spend on forward, and on forward and backward")
    options = parser.parse_args()
    every = {name: steps(*run) for name, run in implementations().items()}
    for mode in ("forward", "forward and backward"):
        found = medians({name: step[mode] for name, step in every.items()}, options.seconds)
        print(f"{mode}, {torch.get_num_threads()} threads")
        for name, took in found.items():
            against = f"{took / found['peer']:7.2f} x peer" if peer is not None else ""
            print(f"  {name:34}{took:9.1f} us{against}")


if __name__ == "__main__":
    main()
